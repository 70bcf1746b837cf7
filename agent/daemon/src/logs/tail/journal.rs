//! The node's journal: its files are read entry by entry and go the same way as log lines. A file keeps its id when it is renamed, and
//! the place of an entry in it is its position, so that a restart goes on behind what is acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use stanchion_core::logs::cri::{Header as LineHeader, Output};
use stanchion_core::logs::join::{Event, Mark};
use stanchion_core::logs::journal::{Cursor, Fields, Header, JournalError, JournalSettings, ReadAt};
use stanchion_core::logs::ledger::Ledger;
use stanchion_core::logs::positions::{Fingerprint, Position};
use stanchion_core::logs::record::{Layout, RecordOptions, RecordWriter};
use stanchion_core::logs::settings::ReadFrom;
use tracing::{info, warn};

use super::super::container::Behind;
use super::super::counters::FileStatus;
use super::super::source::open_regular;
use super::super::streams::StreamId;
use super::{Now, Tailer};

/// What names of positions begin with.
const NAME: &str = "journal:";
/// How often the files are looked at; in milliseconds.
const LOOK_MS: i64 = 1000;
/// Entries of one file in one turn, so that container logs have theirs.
const PORTION: usize = 500;

/// The files of the journal.
#[derive(Default)]
pub(super) struct Journals {
    files: BTreeMap<u64, JournalFile>,
    /// Files that cannot be read, which was told.
    refused: BTreeSet<PathBuf>,
    due_ms: i64,
}

struct JournalFile {
    path: PathBuf,
    file: File,
    header: Header,
    cursor: Cursor,
    /// First byte behind the last entry that was read.
    offset: u64,
    ledger: Ledger,
    streams: BTreeMap<String, StreamId>,
    /// Its name is gone.
    gone: bool,
    behind: Option<Behind>,
    last_error: Option<String>,
}

fn bytes_of(file: &File) -> impl ReadAt + '_ {
    move |at, buffer: &mut [u8]| file.read_exact_at(buffer, at).is_ok()
}

/// The name of a journal file's position: its id, as its path changes.
fn position_name(header: &Header) -> String {
    format!("{NAME}{}", header.id())
}

/// The position is that of a journal file.
pub(super) fn is_position(position: &Position) -> bool {
    position.path.starts_with(NAME)
}

/// Journal files in the directory and in its directories of machines. `~` ends the names of files that a crash left.
fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    let is_journal = |path: &PathBuf| path.to_str().is_some_and(|path| path.ends_with(".journal") || path.ends_with(".journal~"));
    let Ok(dir) = std::fs::canonicalize(dir) else { return Vec::new() };
    let top = entries(&dir);
    let below = top.iter().filter(|path| path.is_dir()).flat_map(|machine| entries(machine)).collect::<Vec<_>>();
    let mut files: Vec<_> = top.into_iter().chain(below).filter(is_journal).collect();
    files.sort();
    files
}

impl JournalFile {
    fn open(path: PathBuf) -> io::Result<Result<Self, JournalError>> {
        let file = open_regular(&path)?;
        let header = Header::read(&bytes_of(&file));
        Ok(header.map(|header| Self {
            path,
            file,
            header,
            cursor: Cursor::default(),
            offset: 0,
            ledger: Ledger::default(),
            streams: BTreeMap::new(),
            gone: false,
            behind: None,
            last_error: None,
        }))
    }

    /// Reading goes on with the first entry at or behind the place.
    fn begin_at(&mut self, offset: u64) -> Result<(), JournalError> {
        self.cursor = self.header.seek(&bytes_of(&self.file), offset)?;
        self.offset = offset;
        self.ledger = Ledger::starting_at(offset);
        Ok(())
    }

    fn position(&self) -> Position {
        let name = position_name(&self.header);
        Position { path: name, dev: 0, inode: 0, fingerprint: Fingerprint::default(), offset: self.ledger.safe() }
    }

    /// Everything that it has was read and is acknowledged.
    fn is_done(&self) -> bool {
        self.ledger.safe() >= self.offset
    }
}

impl Tailer {
    /// Which journal files there are. `begin` is for those that were there before the agent was ever asked for any.
    pub(super) fn scan_journals(&mut self, begin: Option<ReadFrom>) {
        let Some(settings) = &self.parts.settings.journal else { return };
        let paths: Vec<PathBuf> = settings.dirs.iter().flat_map(|dir| list(Path::new(dir))).collect();
        let known: BTreeMap<[u8; 16], u64> = self.journals.files.iter().map(|(id, file)| (file.header.file_id, *id)).collect();
        self.journals.files.values_mut().for_each(|file| file.gone = true);
        for path in paths {
            if self.journals.refused.contains(&path) {
                continue;
            }
            let named = self.journals.files.values_mut().find(|file| file.path == path && is_same(file, &path));
            if let Some(file) = named {
                file.gone = false;
                continue;
            }
            let mut opened = match JournalFile::open(path.clone()) {
                Ok(Ok(opened)) => opened,
                // Being made: it has its header at the next sweep.
                Ok(Err(JournalError::Signature)) => continue,
                Ok(Err(error)) => {
                    self.counters.file_errors += 1;
                    warn!(path = %path.display(), %error, "a journal file is left out");
                    self.journals.refused.insert(path);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.counters.file_errors += 1;
                    warn!(path = %path.display(), %error, "cannot open a journal file");
                    continue;
                }
            };
            if let Some(file) = known.get(&opened.header.file_id).and_then(|id| self.journals.files.get_mut(id)) {
                // Renamed.
                (file.path, file.gone) = (path, false);
                continue;
            }
            let restored = self.restored.remove(Path::new(&position_name(&opened.header)));
            let offset = match (restored.as_ref().and_then(|positions| positions.first()), begin) {
                (Some(position), _) => position.offset,
                (None, Some(ReadFrom::Tail)) => opened.header.tail.saturating_add(1),
                (None, _) => 0,
            };
            if let Err(error) = opened.begin_at(offset) {
                self.counters.file_errors += 1;
                warn!(path = %path.display(), %error, "a journal file cannot be read");
                continue;
            }
            info!(path = %path.display(), offset, "following the journal");
            let id = self.next_container;
            self.next_container += 1;
            self.journals.files.insert(id, opened);
            self.journals.due_ms = 0;
            self.positions_dirty = true;
        }
        let gone: Vec<_> = self.journals.files.iter().filter(|(_, file)| file.gone && file.is_done()).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(file) = self.journals.files.remove(&id) {
                file.streams.into_values().for_each(|stream| self.streams.leave(stream));
                self.positions_dirty = true;
            }
        }
    }

    /// Reads a portion of each file that is due; true if there may be more at once.
    pub(super) fn read_journals(&mut self, now: Now) -> bool {
        let Some(settings) = self.parts.settings.journal.clone() else { return false };
        if now.mono < self.journals.due_ms && !self.single_pass {
            return false;
        }
        let mut progress = false;
        for id in self.journals.files.keys().copied().collect::<Vec<_>>() {
            let Some(mut file) = self.journals.files.remove(&id) else { continue };
            match Header::read(&bytes_of(&file.file)) {
                Ok(header) => file.header = header,
                Err(error) => file.last_error = Some(error.to_string()),
            }
            match self.read_journal(id, &mut file, &settings, now) {
                Ok(more) => progress |= more,
                Err(error) => {
                    self.counters.file_errors += u64::from(file.last_error.is_none());
                    file.last_error = Some(error.to_string());
                }
            }
            self.journals.files.insert(id, file);
        }
        self.journals.due_ms = now.mono + LOOK_MS;
        if progress {
            self.journals.due_ms = now.mono;
        }
        progress
    }

    fn read_journal(&mut self, id: u64, file: &mut JournalFile, settings: &JournalSettings, now: Now) -> Result<bool, JournalError> {
        for _ in 0..PORTION {
            if self.is_full() || !file.streams.values().all(|stream| self.streams.has_room(*stream)) {
                if file.header.tail >= file.offset {
                    file.behind = Some(Behind::since(file.behind, file.header.tail.saturating_add(1), now.mono));
                }
                return Ok(false);
            }
            let Some(offset) = file.header.next(&bytes_of(&file.file), &mut file.cursor)? else { return Ok(false) };
            let mut fields = Fields::default();
            let entry = file.header.entry(&bytes_of(&file.file), offset, |field| fields.take(field));
            match entry {
                Ok(entry) => {
                    self.counters.journal_entries += 1;
                    self.ship_entry(
                        id,
                        file,
                        &fields,
                        settings,
                        (offset, i64::try_from(entry.realtime_us / 1000).unwrap_or(i64::MAX)),
                        now,
                    );
                }
                Err(error) => {
                    self.counters.journal_unreadable += 1;
                    file.last_error = Some(error.to_string());
                }
            }
            file.offset = offset + 1;
            file.behind = Some(Behind::since(file.behind, file.offset, now.mono));
            file.ledger.resume_at(file.offset);
            self.positions_dirty = true;
        }
        Ok(true)
    }

    /// `at` is the entry's place and its time, in milliseconds since 1970.
    fn ship_entry(&mut self, id: u64, file: &mut JournalFile, fields: &Fields, settings: &JournalSettings, at: (u64, i64), now: Now) {
        let writer = RecordWriter::new(&RecordOptions { layout: Layout::Raw, ..RecordOptions::default() }, None)
            .oversize(self.parts.settings.oversize);
        for place in fields.streams(settings) {
            let (group, stream) = place.names(&self.parts.cluster_name, &self.parts.node);
            let stream = *file.streams.entry(stream).or_insert_with_key(|stream| self.streams.join(&group, stream, false, None));
            let mut context = self.context(now);
            let Some(timestamp_ms) = context.time(at.1) else { continue };
            let record = fields.record(&place, settings, |message| context.masked(message));
            let event = Event {
                header: LineHeader::None,
                output: Output::Stdout,
                timestamp_ms,
                content: record.as_bytes(),
                marks: &[Mark { generation: 0, offset: at.0 }],
            };
            let (_, written) =
                context.streams.push(stream, &event, &writer, id, now.mono, &mut |batch, mark| file.ledger.pin(batch, mark.offset));
            context.counters.truncated_events += u64::from(written.truncated);
        }
    }

    /// A batch with entries of the file was taken; false if the file is none of the journal's.
    pub(super) fn acknowledge_journal(&mut self, id: u64, batch: stanchion_core::logs::ledger::BatchId, now: Now) -> bool {
        let Some(file) = self.journals.files.get_mut(&id) else { return false };
        file.ledger.release(batch);
        file.behind = Behind::after(file.behind, file.ledger.safe(), file.offset, now.mono);
        self.positions_dirty = true;
        // There is room again.
        self.journals.due_ms = self.journals.due_ms.min(now.mono);
        true
    }

    /// Some file has entries that are not read.
    pub(super) fn has_unread_journals(&self) -> bool {
        self.journals.files.values().any(|file| {
            let mut cursor = file.cursor;
            matches!(file.header.next(&bytes_of(&file.file), &mut cursor), Ok(Some(_)))
        })
    }

    /// When to look at the journal again, in monotonic milliseconds; `None` without one.
    pub(super) fn journals_due(&self) -> Option<i64> {
        (!self.journals.files.is_empty()).then_some(self.journals.due_ms)
    }

    /// Looks at the journal in the next turn.
    pub(super) fn hurry_journals(&mut self) {
        self.journals.due_ms = 0;
    }

    pub(super) fn journal_positions(&self) -> impl Iterator<Item = Position> {
        self.journals.files.values().map(JournalFile::position)
    }

    pub(super) fn journal_status(&self, now: Now) -> impl Iterator<Item = FileStatus> {
        self.journals.files.values().map(move |file| {
            let (safe, size) = (file.ledger.safe(), file.header.tail.max(file.offset));
            let stream = file.streams.values().find_map(|id| self.streams.get(*id));
            let behind = file.behind.filter(|_| safe < size);
            FileStatus {
                path: file.path.to_string_lossy().into_owned(),
                namespace: String::new(),
                pod: String::new(),
                container: String::new(),
                rotated: file.gone,
                offset: file.offset,
                safe,
                size,
                // Behind the last entry lie tables and what is not written yet.
                lag_bytes: if file.is_done() && behind.is_none() { 0 } else { size.saturating_sub(safe) },
                lag_seconds: behind.map_or(0, |behind| behind.seconds(now.mono)),
                group: stream.map(|stream| stream.group.to_string()).unwrap_or_default(),
                stream: stream.map(|stream| stream.name.to_string()).unwrap_or_default(),
                last_error: file.last_error.clone().or_else(|| stream.and_then(|stream| self.streams.error(stream))),
            }
        })
    }
}

/// The path still names the open file.
fn is_same(file: &JournalFile, path: &Path) -> bool {
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => identity(open) == identity(named),
        _ => false,
    }
}
