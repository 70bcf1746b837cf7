//! What log shipping did, counted; and what it tells people.

use serde::Serialize;

/// Totals since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogCounters {
    /// Lines read from files.
    pub lines_read: u64,
    /// Bytes of them, newlines included.
    pub bytes_read: u64,
    /// Entries read from the node's journal.
    pub journal_entries: u64,
    /// Entries of it that cannot be read.
    pub journal_unreadable: u64,
    /// Times that a container's files were looked at.
    pub looks: u64,
    /// Events acknowledged by the sink.
    pub events_shipped: u64,
    /// Bytes of them as CloudWatch Logs counts and bills.
    pub bytes_shipped: u64,
    /// Batches acknowledged.
    pub batches: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Of these, because the service throttled.
    pub throttled: u64,
    /// Events accepted by the call but rejected as too old.
    pub rejected_too_old: u64,
    /// … as too new.
    pub rejected_too_new: u64,
    /// … as older than the group's retention.
    pub rejected_expired: u64,
    /// Events that the service called invalid, alone.
    pub dropped_invalid: u64,
    /// Events outside the age window, not sent.
    pub dropped_too_old: u64,
    /// Lines without text where the layout would make an empty message.
    pub dropped_empty: u64,
    /// Events with a time too far ahead, sent with the present time.
    pub clamped_too_new: u64,
    /// Events whose end was cut off, where that is set.
    pub truncated_events: u64,
    /// Lines that were closed before their end because all of them together took too much memory.
    pub cut_for_memory: u64,
    /// Lines of pods that ask not to be read.
    pub excluded: u64,
    /// Events in which something was masked.
    pub redacted: u64,
    /// Lines that the parser which their pod names does not match: sent as text.
    pub unparsed: u64,
    /// Looks that read nothing because the namespace had used up its rate.
    pub quota_waits: u64,
    /// Files that became shorter than what was read.
    pub truncations: u64,
    /// Bytes given up because rotated files took more disk than allowed.
    pub evicted_bytes: u64,
    /// Errors of opening and reading files.
    pub file_errors: u64,
    /// Times that the positions file could not be written.
    pub position_errors: u64,
}

/// One generation of a container's log file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileStatus {
    /// The live path.
    pub path: String,
    /// Namespace, pod and container; empty for files that are no container's.
    pub namespace: String,
    /// Pod.
    pub pod: String,
    /// Container.
    pub container: String,
    /// Renamed or deleted, but not done.
    pub rotated: bool,
    /// Read so far, in bytes.
    pub offset: u64,
    /// Acknowledged so far.
    pub safe: u64,
    /// Its size.
    pub size: u64,
    /// Bytes not acknowledged.
    pub lag_bytes: u64,
    /// Seconds that some of them wait at least; 0 without lag.
    pub lag_seconds: u64,
    /// Log group of its standard output.
    pub group: String,
    /// Log stream of its standard output.
    pub stream: String,
    /// The last error of the file or its stream.
    pub last_error: Option<String>,
}

/// The state of log shipping at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogsSnapshot {
    /// Every open file, by path.
    pub files: Vec<FileStatus>,
    /// Totals.
    pub counters: LogCounters,
    /// Encoded bytes in memory that are not acknowledged.
    pub memory_bytes: usize,
    /// Disk space kept by deleted files that are still being read.
    pub held_bytes: u64,
}
