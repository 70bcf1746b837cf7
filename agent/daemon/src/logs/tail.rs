//! The tailer: follows every container's files and fills batches. It does file input, but no waiting and no sending, so
//! that a test drives it step by step; [`super::run`] drives it for real.
//!
//! A turn looks only at the containers that are due: those that grow ten times a second, quiet ones twice, and ones that an event
//! of their directory would wake once in ten seconds, so that thousands of quiet files cost nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::logs::cri::Output;
use stanchion_core::logs::enrich::Identity;
use stanchion_core::logs::join::Joiner;
use stanchion_core::logs::ledger::BatchId;
use stanchion_core::logs::names::glob;
use stanchion_core::logs::parser::Parser;
use stanchion_core::logs::positions::{Position, Positions, VERSION};
use stanchion_core::logs::quota::Quotas;
use stanchion_core::logs::record::{Merge, RecordWriter};
use stanchion_core::logs::route::Place;
use stanchion_core::logs::settings::{LogSettings, ReadFrom};
use tracing::{info, warn};

use super::container::{Container, Context};
use super::counters::{FileStatus, LogCounters, LogsSnapshot};
use super::discover::{self, Found, Siblings};
use super::follow::{follow, open_generations};
use super::source::{Decoders, Source};
use super::streams::{FileId, Sealed, StreamId, Streams};
use super::watches::Watches;

/// Bytes of one read. Lines of containerd have at most 16 KiB, so little of a block is read twice.
const BLOCK: usize = 256 << 10;
/// How soon a file that grows is looked at again, and how seldom one that does not; in milliseconds.
const POLL_MS: (i64, i64) = (100, 500);
/// How seldom one that an event would wake, and after how long without a byte it is watched; in milliseconds.
const WATCHED_MS: (i64, i64) = (10_000, 2000);
/// Looks are put together on a grid of this many milliseconds, so that many files wake the task once.
const GRID_MS: i64 = 20;
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
    /// Bytes were read: call again soon.
    pub progress: bool,
    /// When to call again otherwise, in monotonic milliseconds.
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
    /// How files without position are begun: [`ReadFrom::Tail`] only in the first scan of a fresh agent.
    begin: ReadFrom,
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
}

impl Tailer {
    /// A tailer that has not looked at anything yet.
    pub fn new(parts: TailerParts, restored: Restored) -> Self {
        let mut by_path: HashMap<PathBuf, Vec<Position>> = HashMap::new();
        let begin = match restored {
            Restored::Fresh => parts.settings.read_from,
            Restored::Unusable => ReadFrom::Head,
            Restored::Positions(positions) => {
                for position in positions.files {
                    by_path.entry(PathBuf::from(&position.path)).or_default().push(position);
                }
                ReadFrom::Head
            }
        };
        let settings = &parts.settings;
        // Half of the memory for what is being filled: the other half is on its way.
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
            begin,
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

    /// Takes a new state of the cluster: identities of containers whose pod changed are made anew.
    pub fn set_cluster(&mut self, cluster: Arc<ClusterState>) {
        let pods = |state: &ClusterState, names: &PodName| state.pods.get(names).cloned();
        let mut changed = Vec::new();
        for (id, container) in &self.containers {
            let Some(names) = &container.names else { continue };
            let key = PodName::new(names.namespace.clone(), names.pod.clone());
            match (pods(&self.cluster, &key), pods(&cluster, &key)) {
                // A pod that is gone keeps its last known identity.
                (_, None) => {}
                (Some(old), Some(new)) if Arc::ptr_eq(&old, &new) => {}
                _ => changed.push(*id),
            }
        }
        self.cluster = cluster;
        for id in changed {
            if let Some(mut container) = self.containers.remove(&id) {
                self.identify(&mut container);
                self.containers.insert(id, container);
                self.schedule(id, 0);
            }
        }
    }

    fn identify(&mut self, container: &mut Container) {
        let settings = &self.parts.settings;
        let identity = container.names.as_ref().map(|names| {
            let pod = self.cluster.pods.get(&PodName::new(names.namespace.clone(), names.pod.clone()));
            Identity::new(names, pod.map(|pod| &**pod))
        });
        let place = Place { cluster: &self.parts.cluster_name, node: &self.parts.node, file: &container.file_name };
        let (group, stream) = match container.host {
            Some(host) => (&settings.host_files[host].group, &settings.host_files[host].stream),
            None => {
                let any = |globs: &[String]| globs.iter().any(|pattern| glob(pattern, &container.file_name));
                let route = settings.routes.iter().find(|route| any(&route.files));
                route.map_or((&settings.group, &settings.stream), |route| (&route.group, &route.stream))
            }
        };
        let before = container.streams;
        container.streams = [Output::Stdout, Output::Stderr].map(|output| {
            let excluded = settings.honour_exclude && identity.as_ref().is_some_and(|identity| identity.is_excluded(output));
            (!excluded).then(|| {
                let group = group.group(place, identity.as_ref(), output);
                let stream = stream.stream(place, identity.as_ref(), output);
                self.streams.join(&group, &stream, settings.emf)
            })
        });
        before.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
        let parsers = [Output::Stdout, Output::Stderr].map(|output| self.parser(identity.as_ref(), output));
        container.writer = RecordWriter::new(&settings.record, identity.as_ref()).oversize(settings.oversize).parsing(parsers);
        container.identity = identity;
    }

    /// The parser that the pod names for the output.
    fn parser(&self, identity: Option<&Identity>, output: Output) -> Option<Parser> {
        let settings = &self.parts.settings;
        if !settings.honour_parser || settings.record.merge == Merge::Off {
            return None;
        }
        let name = identity?.fluent_bit_annotation("parser", output)?;
        let parser = settings.parsers.iter().find(|parser| parser.name == name);
        if parser.is_none() {
            warn!(pod = identity?.names.pod, parser = name, "the pod names a parser that is not known: its lines are read as JSON");
        }
        parser.cloned()
    }

    /// Looks which files there are, and follows what is new, renamed or gone. Safe to call at any time; the truth when events of
    /// the file system were missed.
    ///
    /// # Errors
    /// The directory cannot be listed; nothing changed then.
    pub fn scan(&mut self, now: Now) -> io::Result<()> {
        let found = discover::list(&self.parts.log_dir, &self.parts.settings, &self.by_name)?;
        let mut unopened = HashSet::new();
        let mut siblings = Siblings::default();
        for found in found {
            unopened.insert(found.live.clone());
            match self.by_path.get(&found.live) {
                Some(id) => {
                    let id = *id;
                    self.follow_rotation(id, now);
                }
                None => self.begin_container(found, &mut siblings, now),
            }
        }
        // What follows appears while we are here: it is read from its first byte.
        self.begin = ReadFrom::Head;
        self.restored.retain(|path, _| unopened.contains(path));
        let ids: Vec<_> = self.containers.keys().copied().collect();
        for id in ids {
            self.check_gone(id, now);
        }
        self.evict(now);
        Ok(())
    }

    fn begin_container(&mut self, found: Found, siblings: &mut Siblings, now: Now) {
        let id = self.next_container;
        let settings = &self.parts.settings;
        let mut container = Container {
            id,
            live: found.live,
            file_name: found.file_name,
            names: found.names,
            identity: None,
            writer: RecordWriter::new(&settings.record, None),
            streams: [None, None],
            joiner: Joiner::new(settings.rules.clone(), settings.bounds).sparing(settings.redactions.clone()),
            generations: Default::default(),
            next_generation: 0,
            known_rotated: Default::default(),
            retired: None,
            gone_ms: None,
            wait_until_ms: now.mono + METADATA_WAIT_MS,
            due: None,
            poll_ms: POLL_MS.0,
            quiet_ms: now.mono,
            watched: false,
            open_bytes: 0,
            host: found.host,
        };
        let positions = self.restored.remove(&container.live).unwrap_or_default();
        match open_generations(&mut container, &positions, self.begin, siblings, now.mono) {
            Ok(()) => {
                self.next_container += 1;
                self.identify(&mut container);
                info!(path = %container.live.display(), generations = container.generations.len(), "following");
                self.by_path.insert(container.live.clone(), id);
                self.by_name.insert(container.file_name.clone(), container.live.clone());
                self.containers.insert(id, container);
                self.schedule(id, now.mono);
                self.positions_dirty = true;
            }
            Err(error) => {
                self.counters.file_errors += 1;
                if !positions.is_empty() {
                    self.restored.insert(container.live.clone(), positions);
                }
                warn!(path = %container.live.display(), %error, "cannot open; tried again at the next sweep");
            }
        }
    }

    fn follow_rotation(&mut self, id: u64, now: Now) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        match follow(container, now.mono) {
            Ok(false) => {}
            Ok(true) => {
                self.positions_dirty = true;
                self.schedule(id, now.mono);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.counters.file_errors += 1;
                warn!(path = %container.live.display(), %error, "cannot follow the rotation");
            }
        }
    }

    fn check_gone(&mut self, id: u64, now: Now) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        if container.gone_ms.is_none() && !container.live.exists() {
            container.gone_ms = Some(now.mono);
            for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_none()) {
                generation.rotated_ms = Some(now.mono);
            }
            self.schedule(id, now.mono);
        }
    }

    /// Deleted files keep their disk space while they are open here: beyond the budget the oldest are given up, loudly.
    fn evict(&mut self, now: Now) {
        let mut held = Vec::new();
        for container in self.containers.values_mut() {
            for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_some()) {
                if let Ok(metadata) = generation.source.metadata()
                    && metadata.nlink() == 0
                {
                    held.push((generation.rotated_ms, container.id, generation.number, metadata.len()));
                }
            }
        }
        held.sort_unstable();
        let mut total: u64 = held.iter().map(|(_, _, _, size)| size).sum();
        for (_, id, number, size) in held {
            if total <= self.parts.settings.held_bytes {
                break;
            }
            total -= size;
            let Some(container) = self.containers.get_mut(&id) else { continue };
            let Some(generation) = container.generation_mut(number) else { continue };
            let lost = generation.source.size().unwrap_or(size).saturating_sub(generation.offset);
            self.counters.evicted_bytes += lost;
            warn!(path = %container.live.display(), lost, "gave up a deleted file: too much disk is held by files not read yet");
            if let Some(generation) = container.generation_mut(number) {
                generation.finished = true;
                generation.rotated_ms = Some(now.mono - ROTATE_WAIT_MS);
            }
            container.generations.retain(|generation| generation.number != number);
        }
        self.held_bytes = total;
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
        let flush_ms = i64::try_from(self.parts.settings.flush.as_millis()).unwrap_or(i64::MAX);
        let mut next_ms = now.mono + WATCHED_MS.0;
        // While memory is full, an acknowledgement wakes the caller.
        if !self.is_full()
            && let Some((due_ms, _, _)) = self.due.first()
        {
            next_ms = next_ms.min(*due_ms);
        }
        if let Some(first) = self.streams.seal_older_than(now.mono - flush_ms) {
            next_ms = next_ms.min(first + flush_ms);
        }
        Turn { progress, next_ms: next_ms.max(now.mono + 1) }
    }

    /// Reads one block of a container that is due, and says when it is due again; true if something was read.
    fn look(&mut self, id: u64, now: Now) -> bool {
        let Some(mut container) = self.containers.remove(&id) else { return false };
        container.due = None;
        self.counters.looks += 1;
        let namespace = container.names.as_ref().map(|names| names.namespace.clone()).unwrap_or_default();
        let ready_ms = self.identified_at(&container, now).max(self.quotas.ready_at(&namespace, now.mono));
        let room = self.has_room(&container);
        let mut read = false;
        if ready_ms <= now.mono && room {
            let before = (self.counters.bytes_read, self.counters.lines_read);
            read = self.read(&mut container, self.quotas.portion(&namespace, BLOCK), now);
            let after = (self.counters.bytes_read, self.counters.lines_read);
            self.quotas.spend(&namespace, after.0 - before.0, after.1 - before.1);
        }
        if container.joiner.is_open() {
            let all = container.gone_ms.is_some() && container.generations.iter().all(|generation| generation.finished);
            container.expire(all, &mut self.context(now));
        }
        self.relieve(&mut container, now);
        if !self.single_pass && self.retire(&mut container) {
            self.forget(container);
            return read;
        }
        let idle = ready_ms <= now.mono && room && !read;
        let mut pause_ms = POLL_MS.0;
        if read {
            (container.poll_ms, container.quiet_ms) = (POLL_MS.0, now.mono);
            self.watches.leave(&mut container);
        } else if idle {
            let sleeps = container.watched && !container.joiner.is_open();
            pause_ms = if sleeps { WATCHED_MS.0 } else { container.poll_ms };
            container.poll_ms = (container.poll_ms * 2).min(POLL_MS.1);
            if now.mono - container.quiet_ms >= WATCHED_MS.1 && !self.single_pass && container.gone_ms.is_none() {
                self.watches.ask(&mut container);
            }
        }
        let waits = container.generations.iter().any(|generation| !generation.finished && generation.source.waits());
        let (open, gone) = (container.joiner.is_open(), container.gone_ms.is_some());
        self.containers.insert(id, container);
        let next_ms = match (read, room) {
            (true, _) => now.mono,
            (false, true) if ready_ms > now.mono => ready_ms,
            (false, true) => next_look(now.mono, pause_ms),
            (false, false) => i64::MAX,
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

    fn forget(&mut self, mut container: Container) {
        self.watches.leave(&mut container);
        self.open_bytes -= container.open_bytes;
        self.by_path.remove(&container.live);
        self.by_name.remove(&container.file_name);
        container.streams.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
        self.positions_dirty = true;
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
            if let Some(container) = self.containers.get_mut(&id) {
                container.poll_ms = POLL_MS.0;
            }
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
        container
            .streams
            .into_iter()
            .flatten()
            .filter_map(|id| self.streams.get(id))
            .all(|stream| stream.in_flight < self.parts.settings.stream_bytes)
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

    /// Reads one block of the oldest generation that has one.
    fn read(&mut self, container: &mut Container, portion: usize, now: Now) -> bool {
        let mut whole = std::mem::take(&mut self.block);
        let block = &mut whole[..portion];
        let mut progress = false;
        for index in 0..container.generations.len() {
            if container.generations[index].finished {
                continue;
            }
            match self.read_generation(container, index, block, now) {
                Ok(read) => progress = read,
                Err(error) => {
                    self.counters.file_errors += 1;
                    let generation = &mut container.generations[index];
                    // What is broken in a compressed file stays so: the rest of the family must not wait for it.
                    if matches!(generation.source, Source::Gz(_)) {
                        warn!(path = %container.live.display(), %error, "a compressed sibling cannot be read to its end");
                        generation.finished = true;
                    }
                    generation.last_error = Some(error.to_string());
                }
            }
            if progress {
                break;
            }
        }
        self.block = whole;
        progress
    }

    fn read_generation(&mut self, container: &mut Container, index: usize, block: &mut [u8], now: Now) -> io::Result<bool> {
        let generation = &mut container.generations[index];
        if !generation.source.may_read(&self.decoders)? {
            return Ok(false);
        }
        // What is compressed does not change any more, and cannot be read again from its beginning.
        let plain = matches!(generation.source, Source::Plain(_));
        let size = generation.source.size()?;
        // A file that was truncated may have the same size again.
        let modified_ns = generation.source.modified_ns()?;
        let grown = plain && (size, modified_ns) != (generation.size, generation.modified_ns);
        (generation.size, generation.modified_ns) = (size, modified_ns);
        let truncated = plain && size < generation.offset;
        if truncated || (grown && !generation.source.begins_with(generation.fingerprint)?) {
            return self.restart(container, index, now);
        }
        let generation = &mut container.generations[index];
        let read = if plain && generation.offset >= size { 0 } else { generation.source.read_at(generation.offset, block)? };
        if generation.fingerprint.len < 256 && grown {
            generation.fingerprint = generation.source.fingerprint()?;
        }
        let full = read == block.len();
        let safe = generation.ledger.safe();
        let used = container.take_block(index, &block[..read], full, &mut self.context(now));
        let generation = &mut container.generations[index];
        // Lines that are not sent, as of excluded pods, are done with at once.
        self.positions_dirty |= generation.ledger.safe() != safe;
        generation.last_error = None;
        if used > 0 {
            generation.behind_since_ms.get_or_insert(now.mono);
            return Ok(true);
        }
        let waited = generation.rotated_ms.is_some_and(|since| self.single_pass || now.mono - since >= ROTATE_WAIT_MS);
        if waited && read < block.len() {
            self.finish_generation(container, index, &block[..read], now);
            return Ok(read > 0);
        }
        Ok(false)
    }

    /// Nothing more comes: a line without its end is complete.
    fn finish_generation(&mut self, container: &mut Container, index: usize, rest: &[u8], now: Now) {
        if !rest.is_empty() {
            container.take_tail(index, rest, &mut self.context(now));
        }
        container.generations[index].finished = true;
    }

    /// The file is shorter than what was read, or begins with other bytes: it was truncated and is written anew. What was
    /// not read before is lost by the nature of it.
    fn restart(&mut self, container: &mut Container, index: usize, now: Now) -> io::Result<bool> {
        self.counters.truncations += 1;
        let generation = &mut container.generations[index];
        warn!(path = %container.live.display(), offset = generation.offset, size = generation.size, "truncated; reading from its beginning");
        let again = generation.source.again()?;
        let rotated_ms = generation.rotated_ms;
        generation.rotated_ms.get_or_insert(now.mono);
        generation.finished = true;
        generation.truncated = true;
        if let Some(source) = again {
            container.push_again(index, source, rotated_ms)?;
        }
        self.positions_dirty = true;
        Ok(true)
    }

    /// Forgets generations that are done; true when the container has none left and is gone.
    fn retire(&mut self, container: &mut Container) -> bool {
        let live = &container.live;
        let retired = &mut container.retired;
        let before = container.generations.len();
        container.generations.retain(|generation| {
            let done = generation.is_done();
            // What was truncated, or is empty, is no file that could be found again.
            let findable = !generation.truncated && generation.fingerprint.len > 0;
            if done && findable && retired.as_ref().is_none_or(|(number, _)| *number < generation.number) {
                *retired = Some((generation.number, generation.position(live)));
            }
            !done
        });
        self.positions_dirty |= before != container.generations.len();
        container.gone_ms.is_some() && container.generations.is_empty() && !container.joiner.is_open()
    }

    /// Reads everything to its end, whatever the clocks say, and closes all lines and batches; for a single pass. Batches
    /// are to be taken after each call.
    pub fn drain(&mut self, now: Now) -> Drain {
        self.single_pass = true;
        if self.turn(now).progress {
            return Drain::Progress;
        }
        if self.is_full() || !self.blocked.is_empty() {
            return Drain::Waiting;
        }
        if let Some((due_ms, _, _)) = self.due.first() {
            return Drain::Later(*due_ms);
        }
        let unread = |container: &Container| container.generations.iter().any(|generation| !generation.finished);
        let ids: Vec<_> = self.containers.iter().filter(|(_, container)| unread(container)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(mut container) = self.containers.remove(&id) else { continue };
            if self.has_room(&container) {
                self.end_of_container(&mut container, now);
            }
            self.containers.insert(id, container);
        }
        self.streams.seal_older_than(i64::MAX);
        if self.containers.values().any(unread) { Drain::Waiting } else { Drain::Done }
    }

    fn end_of_container(&mut self, container: &mut Container, now: Now) {
        let mut block = std::mem::take(&mut self.block);
        for index in 0..container.generations.len() {
            let generation = &mut container.generations[index];
            if !generation.finished {
                let read = match generation.source.may_read(&self.decoders) {
                    Ok(false) => continue,
                    Ok(true) => generation.source.read_at(generation.offset, &mut block),
                    Err(error) => Err(error),
                };
                match read {
                    Ok(read) => self.finish_generation(container, index, &block[..read], now),
                    Err(error) => {
                        self.counters.file_errors += 1;
                        let generation = &mut container.generations[index];
                        generation.last_error = Some(error.to_string());
                        generation.finished = true;
                    }
                }
            }
        }
        self.block = block;
        container.expire(true, &mut self.context(now));
    }

    /// Looks at every file in the next turn, whenever its turn would be: before the end of the process.
    pub fn hurry(&mut self) {
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
            let Some(generation) = self.containers.get_mut(&container).and_then(|container| container.generation_mut(generation)) else {
                continue;
            };
            generation.ledger.release(id);
            generation.behind_since_ms = (generation.ledger.safe() < generation.offset).then_some(now.mono);
            self.positions_dirty = true;
            if generation.finished {
                // Perhaps its container's last.
                self.schedule(container, now.mono);
            }
        }
        for id in std::mem::take(&mut self.blocked) {
            self.schedule(id, now.mono);
        }
    }

    /// A batch is being tried again.
    pub fn note_error(&mut self, stream: StreamId, error: String) {
        self.streams.note_error(stream, error);
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
        self.streams.bytes() >= self.parts.settings.memory_bytes
    }

    /// The positions of the last call were not saved.
    pub fn keep_positions_dirty(&mut self) {
        self.positions_dirty = true;
    }

    /// Some file is acknowledged further than the last call of [`Self::changed_positions`] told.
    pub fn has_changed_positions(&self) -> bool {
        self.positions_dirty
    }

    /// The positions, if they changed since the last call.
    pub fn changed_positions(&mut self) -> Option<Positions> {
        std::mem::take(&mut self.positions_dirty).then(|| self.positions())
    }

    /// How far each file is acknowledged, with what was restored for files that could not be opened yet.
    pub fn positions(&self) -> Positions {
        let open = self.containers.values().flat_map(|container| {
            let generations = container.generations.iter().map(|generation| generation.position(&container.live));
            container.retired.iter().map(|(_, position)| position.clone()).chain(generations)
        });
        let files = open.chain(self.restored.values().flatten().cloned()).collect();
        Positions { version: VERSION, node: self.parts.node.clone(), files }
    }

    /// The state for people.
    pub fn snapshot(&self, now: Now) -> LogsSnapshot {
        let mut files = Vec::new();
        for container in self.containers.values() {
            let stream = container.streams[0].or(container.streams[1]).and_then(|id| self.streams.get(id));
            let name = |field: fn(&stanchion_core::logs::names::ContainerRef) -> &String| {
                container.names.as_ref().map(field).cloned().unwrap_or_default()
            };
            for generation in &container.generations {
                let (offset, safe) = (generation.offset, generation.ledger.safe());
                let size = generation.size.max(offset);
                let behind = generation.behind_since_ms.filter(|_| safe < size);
                files.push(FileStatus {
                    path: container.live.to_string_lossy().into_owned(),
                    namespace: name(|names| &names.namespace),
                    pod: name(|names| &names.pod),
                    container: name(|names| &names.container),
                    rotated: generation.rotated_ms.is_some(),
                    offset,
                    safe,
                    size,
                    lag_bytes: size - safe,
                    lag_seconds: behind.map_or(0, |since| u64::try_from((now.mono - since) / 1000).unwrap_or(0)),
                    group: stream.map(|stream| stream.group.to_string()).unwrap_or_default(),
                    stream: stream.map(|stream| stream.name.to_string()).unwrap_or_default(),
                    last_error: generation.last_error.clone().or_else(|| stream.and_then(|stream| stream.last_error.clone())),
                });
            }
        }
        LogsSnapshot { files, counters: self.counters, memory_bytes: self.streams.bytes(), held_bytes: self.held_bytes }
    }

    /// The directory that is watched.
    pub fn log_dir(&self) -> &Path {
        &self.parts.log_dir
    }
}

/// When a file without news is looked at again. Silent files are all looked at in the same moment, so that a node with hundreds of them
/// wakes twice a second and not hundreds of times; busy ones on a finer grid.
fn next_look(now_ms: i64, pause_ms: i64) -> i64 {
    let at = now_ms + pause_ms;
    if pause_ms < POLL_MS.1 { at + GRID_MS - 1 - (at + GRID_MS - 1) % GRID_MS } else { at - at % POLL_MS.1 }
}
