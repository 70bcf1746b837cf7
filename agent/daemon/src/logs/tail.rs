//! The tailer: follows every container's files and fills batches. It does file input, but no waiting and no sending, so
//! that a test drives it step by step; [`super::run`] drives it for real.
//!
//! A turn looks only at the containers that are due: those that grow four times a second, quiet ones twice, and ones that an event
//! of their directory would wake once in ten seconds, so that thousands of quiet files cost nothing.

mod identity;
mod journal;
mod reading;
mod report;
mod sweep;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stanchion_core::cluster::ClusterState;
use stanchion_core::logs::ledger::BatchId;
use stanchion_core::logs::positions::{Position, Positions};
use stanchion_core::logs::quota::Quotas;
use stanchion_core::logs::settings::{HostFiles, LogSettings, ReadFrom};

use super::container::{Behind, Container, Context};
use super::counters::LogCounters;
use super::discover;
use super::inherit::Inherited;
use super::source::Decoders;
use super::streams::{FileId, Sealed, Streams};
use super::watches::Watches;
use reading::Found;

/// Bytes of one read. Lines of containerd have at most 16 KiB, so little of a block is read twice.
const BLOCK: usize = 256 << 10;
/// How soon a file that grows is looked at again, and how seldom one that does not; in milliseconds.
///
/// What a look and a turn cost is per file and not per line: a file that grows four times a second takes a second of flushing and a
/// quarter, and half the CPU of ten times.
const POLL_MS: (i64, i64) = (250, 500);
/// How seldom one that an event would wake, and after how long without a byte it is watched; in milliseconds.
const WATCHED_MS: (i64, i64) = (10_000, 2000);
/// How long a renamed or deleted file is still watched for late writes: the runtime goes on with the old file until it has
/// opened the new one. In milliseconds.
const ROTATE_WAIT_MS: i64 = 5000;

/// How long the lines of a new container wait for its pod to be known: the log file may be there before the watch tells
/// of the pod. In milliseconds.
const METADATA_WAIT_MS: i64 = 3000;

/// The two clocks, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// From any origin, never back: for time-outs.
    pub mono: i64,
    /// Since 1970: for lines without time.
    pub wall: i64,
}

/// What names and places a tailer needs.
#[derive(Clone, Debug)]
pub struct TailerParts {
    /// Settings.
    pub settings: LogSettings,
    /// Where container logs are.
    pub log_dir: PathBuf,
    /// Node name, for streams and the positions file.
    pub node: String,
    /// Cluster name, for groups.
    pub cluster_name: String,
}

/// What the tailer did in one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Bytes were read.
    pub progress: bool,
    /// When to call again, in monotonic milliseconds: at once where there is more to read.
    pub next_ms: i64,
}

/// How far [`Tailer::drain`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Call again.
    Progress,
    /// Call again when a batch was acknowledged.
    Waiting,
    /// Call again at this time, in monotonic milliseconds: a quota has to refill.
    Later(i64),
    /// Everything is in batches.
    Done,
}

/// What is known of positions at the start.
#[derive(Debug)]
pub enum Restored {
    /// The agent ran here before.
    Positions(Positions),
    /// There is a file that cannot be used: everything is read from its first byte, rather twice than not at all.
    Unusable,
    /// The agent never ran here: [`ReadFrom`] decides.
    Fresh,
    /// The agent never ran here, but Fluent Bit did: files that it did not read came after its end, and are read from their first byte.
    Inherited(Inherited),
}

/// Follows files.
pub struct Tailer {
    parts: TailerParts,
    cluster: Arc<ClusterState>,
    containers: BTreeMap<u64, Container>,
    by_path: HashMap<PathBuf, u64>,
    /// Names that need no look at the link any more.
    by_name: HashMap<String, PathBuf>,
    next_container: u64,
    streams: Streams,
    counters: LogCounters,
    restored: HashMap<PathBuf, Vec<Position>>,
    /// Until a sweep has opened all that there was.
    inherited: Option<Inherited>,
    /// How far files of the node were read that may have another name now; until a sweep has looked for them.
    moved: Vec<Position>,
    /// How files without position are begun: [`ReadFrom::Tail`] only in the first scan of a fresh agent, or of what it is asked for anew.
    begin: ReadFrom,
    /// Nothing was looked at yet, and the journal was never read here.
    journal_is_new: bool,
    /// The same of files of the node: which entries of the settings.
    new_hosts: BTreeSet<usize>,
    block: Vec<u8>,
    held_bytes: u64,
    positions_dirty: bool,
    /// Files are not followed beyond their present end.
    single_pass: bool,
    /// Who is looked at when: time, number of the entry (first come, first served), container.
    due: BTreeSet<(i64, u64, u64)>,
    entries: u64,
    /// Those whose streams have no room: an acknowledgement makes them due.
    blocked: BTreeSet<u64>,
    quotas: Quotas,
    /// Bytes of lines that are not complete.
    open_bytes: usize,
    decoders: Decoders,
    watches: Watches,
    journals: journal::Journals,
    /// Directories that could not be listed at the last sweep, and why.
    unread: BTreeMap<PathBuf, String>,
}

impl Tailer {
    /// A tailer that has not looked at anything yet.
    pub fn new(parts: TailerParts, restored: Restored) -> Self {
        let mut by_path: HashMap<PathBuf, Vec<Position>> = HashMap::new();
        let journal_is_new = match &restored {
            Restored::Fresh | Restored::Inherited(_) => true,
            Restored::Unusable => false,
            Restored::Positions(positions) => !positions.files.iter().any(journal::is_position),
        };
        let (mut new_hosts, mut moved) = (BTreeSet::new(), Vec::new());
        let mut inherited = None;
        let begin = match restored {
            Restored::Fresh => parts.settings.read_from,
            Restored::Inherited(found) => {
                inherited = Some(found);
                ReadFrom::Head
            }
            Restored::Unusable => ReadFrom::Head,
            Restored::Positions(positions) => {
                let is_new = |entry: &HostFiles| !positions.files.iter().any(|position| discover::is_of_entry(entry, &position.path));
                let hosts = parts.settings.host_files.iter().enumerate();
                new_hosts = hosts.filter(|(_, entry)| is_new(entry)).map(|(index, _)| index).collect();
                let is_host = |path: &str| parts.settings.host_files.iter().any(|entry| discover::is_of_entry(entry, path));
                moved = positions.files.iter().filter(|position| is_host(&position.path)).cloned().collect();
                for position in positions.files {
                    by_path.entry(PathBuf::from(&position.path)).or_default().push(position);
                }
                ReadFrom::Head
            }
        };
        let settings = &parts.settings;
        let streams = Streams::new(settings);
        let quotas = Quotas::new(settings.quotas.clone());
        Self {
            parts,
            cluster: Arc::default(),
            containers: BTreeMap::new(),
            by_path: HashMap::new(),
            by_name: HashMap::new(),
            next_container: 1,
            streams,
            counters: LogCounters::default(),
            restored: by_path,
            inherited,
            moved,
            begin,
            journal_is_new,
            new_hosts,
            block: vec![0; BLOCK],
            held_bytes: 0,
            positions_dirty: false,
            single_pass: false,
            due: BTreeSet::new(),
            entries: 0,
            blocked: BTreeSet::new(),
            quotas,
            open_bytes: 0,
            decoders: Decoders::default(),
            watches: Watches::default(),
            journals: journal::Journals::default(),
            unread: BTreeMap::new(),
        }
    }

    /// Looks at the container then; a sooner time stands.
    fn schedule(&mut self, id: u64, at_ms: i64) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        if let Some((due_ms, entry)) = container.due {
            if due_ms <= at_ms {
                return;
            }
            self.due.remove(&(due_ms, entry, id));
        }
        self.entries += 1;
        container.due = Some((at_ms, self.entries));
        self.due.insert((at_ms, self.entries, id));
        self.blocked.remove(&id);
    }

    /// Reads what there is, within the memory budget, and closes batches that are due.
    pub fn turn(&mut self, now: Now) -> Turn {
        let mut progress = false;
        let later = self.due.split_off(&(now.mono + 1, 0, 0));
        let mut due = std::mem::replace(&mut self.due, later).into_iter();
        for entry in due.by_ref() {
            if self.is_full() {
                if self.streams.flights() == 0 {
                    self.streams.seal_older_than(i64::MAX);
                }
                // Whoever was not served comes first in the next turn.
                self.due.insert(entry);
                break;
            }
            progress |= self.look(entry.2, now);
        }
        self.due.extend(due);
        let journals = self.read_journals(now);
        progress |= journals;
        let flush_ms = i64::try_from(self.parts.settings.flush.as_millis()).unwrap_or(i64::MAX);
        let mut next_ms = if journals { now.mono } else { now.mono + WATCHED_MS.0 };
        // While memory is full, an acknowledgement wakes the caller.
        if !self.is_full()
            && let Some((due_ms, _, _)) = self.due.first()
        {
            next_ms = next_ms.min(*due_ms);
        }
        if !self.is_full()
            && let Some(due_ms) = self.journals_due()
        {
            next_ms = next_ms.min(due_ms);
        }
        if let Some(first) = self.streams.seal_older_than(now.mono - flush_ms) {
            next_ms = next_ms.min(first + flush_ms);
        }
        Turn { progress, next_ms: next_ms.max(now.mono + i64::from(!progress)) }
    }

    /// Reads one block of a container that is due, and says when it is due again; true if something was read.
    fn look(&mut self, id: u64, now: Now) -> bool {
        let Some(mut container) = self.containers.remove(&id) else { return false };
        container.due = None;
        self.counters.looks += 1;
        let namespace = container.names.as_ref().map(|names| names.namespace.clone()).unwrap_or_default();
        let allowed_ms = self.quotas.ready_at(&namespace, now.mono);
        self.counters.quota_waits += u64::from(allowed_ms > now.mono);
        let ready_ms = self.identified_at(&container, now).max(allowed_ms);
        let room = self.has_room(&container);
        let mut found = Found::Nothing;
        if ready_ms <= now.mono && room {
            let before = (self.counters.bytes_read, self.counters.lines_read);
            found = self.read(&mut container, self.quotas.portion(&namespace, BLOCK), now);
            let after = (self.counters.bytes_read, self.counters.lines_read);
            self.quotas.spend(&namespace, after.0 - before.0, after.1 - before.1);
        }
        let read = found != Found::Nothing;
        if container.joiner.is_open() {
            let all = container.gone_ms.is_some() && container.generations.iter().all(|generation| generation.finished);
            // What may not be read yet may be the end of it.
            let waits = (ready_ms > now.mono || !room) && container.has_unread();
            if all || !waits {
                container.expire(all, &mut self.context(now));
            }
        }
        self.relieve(&mut container, now);
        if !self.single_pass && self.retire(&mut container) {
            self.forget(container);
            return read;
        }
        let idle = ready_ms <= now.mono && room && !read;
        let mut pause_ms = POLL_MS.0;
        if read {
            container.quiet_ms = now.mono;
            self.watches.leave(&mut container);
        } else if idle && now.mono - container.quiet_ms >= WATCHED_MS.1 {
            let sleeps = (container.watched || container.generations.is_empty()) && !container.joiner.is_open();
            pause_ms = if sleeps { WATCHED_MS.0 } else { POLL_MS.1 };
            if !self.single_pass && container.gone_ms.is_none() {
                self.watches.ask(&mut container);
            }
        }
        let waits = container.generations.iter().any(|generation| !generation.finished && generation.source.waits());
        let (open, gone) = (container.joiner.is_open(), container.gone_ms.is_some());
        self.containers.insert(id, container);
        let next_ms = match found {
            Found::Block => now.mono,
            Found::Rest if self.single_pass => now.mono,
            _ if ready_ms > now.mono => ready_ms,
            _ if room => next_look(now.mono, pause_ms),
            _ => i64::MAX,
        };
        if !room {
            self.blocked.insert(id);
            // An open line grows old all the same.
            if open {
                self.schedule(id, now.mono + POLL_MS.1);
            }
        } else if read || waits || ready_ms > now.mono || !self.single_pass {
            self.schedule(id, next_ms);
        }
        if idle && !self.single_pass && !gone {
            // A file that stops growing may have been renamed: do not wait for the sweep.
            self.follow_rotation(id, now);
        }
        read
    }

    /// Keeps account of lines that are not complete, and closes those of the container where all together are too long.
    fn relieve(&mut self, container: &mut Container, now: Now) {
        let limit = self.parts.settings.open_bytes;
        let others = self.open_bytes - container.open_bytes;
        if others + container.joiner.open_bytes() > limit {
            let share = limit / (self.containers.len() + 1);
            container.relieve(share, &mut self.context(now));
        }
        container.open_bytes = container.joiner.open_bytes();
        self.open_bytes = others + container.open_bytes;
    }

    /// Directories to watch, and those that need no watch any more, since the last call.
    pub(super) fn take_watch_changes(&mut self) -> Vec<(PathBuf, bool)> {
        self.watches.take_changes()
    }

    /// The directory is watched from now on; its quiet files are looked at once more, as they may have grown before.
    pub(super) fn watched(&mut self, dir: &Path, now: Now) {
        for id in self.watches.confirm(dir) {
            if let Some(container) = self.containers.get_mut(&id) {
                container.watched = true;
                self.schedule(id, now.mono);
            }
        }
    }

    /// Something happened to a file, or to a directory of some.
    pub(super) fn touched(&mut self, path: &Path, now: Now) {
        if let Some(id) = self.by_path.get(path).copied() {
            self.schedule(id, now.mono);
        }
    }

    /// Events were lost: every file may have grown.
    pub(super) fn touched_all(&mut self, now: Now) {
        let ids: Vec<_> = self.containers.keys().copied().collect();
        ids.into_iter().for_each(|id| self.schedule(id, now.mono));
    }

    /// When the container's lines may be read: at once if its pod is known, or if it is no container.
    fn identified_at(&self, container: &Container, now: Now) -> i64 {
        let known = self.single_pass || container.identity.as_ref().is_none_or(|identity| identity.pod.is_some());
        if known { now.mono } else { container.wait_until_ms }
    }

    fn has_room(&self, container: &Container) -> bool {
        container.streams.into_iter().flatten().all(|id| self.streams.has_room(id))
    }

    fn context(&mut self, now: Now) -> Context<'_> {
        Context {
            settings: &self.parts.settings,
            streams: &mut self.streams,
            counters: &mut self.counters,
            now_ms: now.mono,
            wall_ms: now.wall,
        }
    }

    /// Looks at every file in the next turn, whenever its turn would be: before the end of the process.
    pub fn hurry(&mut self) {
        self.hurry_journals();
        let ids: Vec<_> = self.containers.keys().copied().collect();
        for id in ids {
            if let Some(container) = self.containers.get_mut(&id) {
                container.wait_until_ms = 0;
            }
            self.schedule(id, 0);
        }
    }

    /// Closes every open batch: at the end of the process, when what is open is sent as it is.
    pub fn seal_all(&mut self) {
        self.streams.seal_older_than(i64::MAX);
    }

    /// Batches to send.
    pub fn take_ready(&mut self) -> Vec<Sealed> {
        self.streams.take_ready()
    }

    /// The batch was taken, or given up for the reason in `error`: its bytes need not be read again.
    pub fn acknowledge(&mut self, id: BatchId, error: Option<String>, now: Now) {
        for FileId { container, generation } in self.streams.settle(id, error) {
            if self.acknowledge_journal(container, id, now) {
                continue;
            }
            let Some(generation) = self.containers.get_mut(&container).and_then(|container| container.generation_mut(generation)) else {
                continue;
            };
            generation.ledger.release(id);
            generation.behind = Behind::after(generation.behind, generation.ledger.safe(), generation.offset, now.mono);
            self.positions_dirty = true;
            if generation.finished {
                // Perhaps its container's last.
                self.schedule(container, now.mono);
            }
        }
        let blocked = std::mem::take(&mut self.blocked);
        let (with_room, without): (BTreeSet<_>, _) =
            blocked.into_iter().partition(|id| self.containers.get(id).is_none_or(|container| self.has_room(container)));
        self.blocked = without;
        with_room.into_iter().for_each(|id| self.schedule(id, now.mono));
    }

    /// A batch is being tried again.
    pub fn note_error(&mut self, id: BatchId, error: String) {
        self.streams.note_error(id, error);
    }

    /// Totals, also for the shipper to add to.
    pub fn counters_mut(&mut self) -> &mut LogCounters {
        &mut self.counters
    }

    /// Batches not acknowledged yet.
    pub fn in_flight(&self) -> usize {
        self.streams.flights()
    }

    /// Memory is full of unacknowledged batches.
    pub fn is_full(&self) -> bool {
        self.streams.is_full()
    }

    /// The directory that is watched.
    pub fn log_dir(&self) -> &Path {
        &self.parts.log_dir
    }
}

/// When a file without news is looked at again. Files are looked at in common moments, so that a node with hundreds of them wakes a few
/// times a second and not hundreds of times, and what they filled is sent together.
fn next_look(now_ms: i64, pause_ms: i64) -> i64 {
    let at = now_ms + pause_ms;
    at - at % pause_ms.min(POLL_MS.1)
}
