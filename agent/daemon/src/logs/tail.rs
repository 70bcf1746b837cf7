//! The tailer: follows every container's files and fills batches. It does file input, but no waiting and no sending, so
//! that a test drives it step by step; [`super::run`] drives it for real.

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
use stanchion_core::logs::positions::{Position, Positions, VERSION};
use stanchion_core::logs::record::RecordWriter;
use stanchion_core::logs::route::Place;
use stanchion_core::logs::settings::{LogSettings, ReadFrom};
use tracing::{info, warn};

use super::container::{Container, Context};
use super::counters::{FileStatus, LogCounters, LogsSnapshot};
use super::discover::{self, Found};
use super::source::Source;
use super::streams::{FileId, Sealed, StreamId, Streams};

/// Bytes of one read. Lines of containerd have at most 16 KiB, so little of a block is read twice.
const BLOCK: usize = 256 << 10;
/// How soon a file that grows is looked at again, and how seldom one that does not; in milliseconds.
const POLL_MS: (i64, i64) = (100, 1000);
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
    /// The container to read first in the next turn, so that each gets its share.
    next_turn: u64,
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
        Self {
            parts,
            cluster: Arc::default(),
            containers: BTreeMap::new(),
            by_path: HashMap::new(),
            by_name: HashMap::new(),
            next_container: 1,
            streams: Streams::default(),
            counters: LogCounters::default(),
            restored: by_path,
            begin,
            block: vec![0; BLOCK],
            held_bytes: 0,
            positions_dirty: false,
            single_pass: false,
            next_turn: 0,
        }
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
        let before = container.streams;
        container.streams = [Output::Stdout, Output::Stderr].map(|output| {
            let excluded = settings.honour_exclude && identity.as_ref().is_some_and(|identity| identity.is_excluded(output));
            (!excluded).then(|| {
                let group = settings.group.group(place, identity.as_ref(), output);
                let stream = settings.stream.stream(place, identity.as_ref(), output);
                self.streams.join(&group, &stream, settings.emf)
            })
        });
        before.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
        container.writer = RecordWriter::new(&settings.record, identity.as_ref());
        container.identity = identity;
    }

    /// Looks which files there are, and follows what is new, renamed or gone. Safe to call at any time; the truth when events of
    /// the file system were missed.
    ///
    /// # Errors
    /// The directory cannot be listed; nothing changed then.
    pub fn scan(&mut self, now: Now) -> io::Result<()> {
        let found = discover::list(&self.parts.log_dir, &self.parts.settings, &self.by_name)?;
        let mut unopened = HashSet::new();
        for found in found {
            unopened.insert(found.live.clone());
            match self.by_path.get(&found.live) {
                Some(id) => {
                    let id = *id;
                    self.follow_rotation(id, now);
                }
                None => self.begin_container(found, now),
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

    fn begin_container(&mut self, found: Found, now: Now) {
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
            joiner: Joiner::new(settings.rules.clone(), settings.bounds),
            generations: Default::default(),
            next_generation: 0,
            known_rotated: Default::default(),
            retired: None,
            gone_ms: None,
            wait_until_ms: now.mono + METADATA_WAIT_MS,
            next_poll_ms: 0,
            poll_ms: POLL_MS.0,
        };
        let positions = self.restored.remove(&container.live).unwrap_or_default();
        match open_generations(&mut container, &positions, self.begin, now.mono) {
            Ok(()) => {
                self.next_container += 1;
                self.identify(&mut container);
                info!(path = %container.live.display(), generations = container.generations.len(), "following");
                self.by_path.insert(container.live.clone(), id);
                self.by_name.insert(container.file_name.clone(), container.live.clone());
                self.containers.insert(id, container);
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
            Ok(changed) => self.positions_dirty |= changed,
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
        let mut next_ms = now.mono + POLL_MS.1;
        let ids: Vec<u64> =
            self.containers.range(self.next_turn..).chain(self.containers.range(..self.next_turn)).map(|(id, _)| *id).collect();
        for id in ids {
            if self.is_full() {
                self.next_turn = id;
                if self.streams.flights() == 0 {
                    self.streams.seal_older_than(i64::MAX);
                }
                break;
            }
            let Some(container) = self.containers.get(&id) else { continue };
            let room = self.has_room(container);
            let look_ms = container.next_poll_ms.max(self.identified_at(container, now));
            let due = room && look_ms <= now.mono;
            if !due && !container.joiner.is_open() {
                // Without room an acknowledgement wakes the caller.
                next_ms = next_ms.min(if room { look_ms.max(now.mono + 1) } else { next_ms });
                continue;
            }
            let Some(mut container) = self.containers.remove(&id) else { continue };
            if due {
                let read = self.read(&mut container, now);
                progress |= read;
                container.poll_ms = if read { POLL_MS.0 } else { (container.poll_ms * 2).min(POLL_MS.1) };
                container.next_poll_ms = if read { 0 } else { next_look(now.mono, container.poll_ms) };
            }
            if container.joiner.is_open() {
                let all = container.gone_ms.is_some() && container.generations.iter().all(|generation| generation.finished);
                container.expire(all, &mut self.context(now));
            }
            next_ms = next_ms.min(container.next_poll_ms.max(now.mono + 1));
            let idle = due && !progress && container.gone_ms.is_none();
            if !self.single_pass && self.retire(&mut container) {
                self.by_path.remove(&container.live);
                self.by_name.remove(&container.file_name);
                container.streams.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
                self.positions_dirty = true;
            } else {
                self.containers.insert(id, container);
                if idle && !self.single_pass {
                    // A file that stops growing may have been renamed: do not wait for the sweep.
                    self.follow_rotation(id, now);
                }
            }
        }
        let flush_ms = i64::try_from(self.parts.settings.flush.as_millis()).unwrap_or(i64::MAX);
        if let Some(first) = self.streams.seal_older_than(now.mono - flush_ms) {
            next_ms = next_ms.min(first + flush_ms);
        }
        Turn { progress, next_ms }
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
    fn read(&mut self, container: &mut Container, now: Now) -> bool {
        let mut block = std::mem::take(&mut self.block);
        let mut progress = false;
        for index in 0..container.generations.len() {
            if container.generations[index].finished {
                continue;
            }
            match self.read_generation(container, index, &mut block, now) {
                Ok(read) => progress = read,
                Err(error) => {
                    self.counters.file_errors += 1;
                    container.generations[index].last_error = Some(error.to_string());
                }
            }
            if progress {
                break;
            }
        }
        self.block = block;
        progress
    }

    fn read_generation(&mut self, container: &mut Container, index: usize, block: &mut [u8], now: Now) -> io::Result<bool> {
        let generation = &mut container.generations[index];
        let size = generation.source.size()?;
        // What is compressed does not change any more, and cannot be read again from its beginning.
        let plain = matches!(generation.source, Source::Plain(_));
        let grown = plain && size != generation.size;
        generation.size = size;
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
        let waited = generation.rotated_ms.is_some_and(|since| now.mono - since >= ROTATE_WAIT_MS);
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
            container.push_generation(source, 0, rotated_ms)?;
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
        self.containers.values_mut().for_each(|container| container.next_poll_ms = 0);
        if self.turn(now).progress {
            return Drain::Progress;
        }
        if self.is_full() {
            return Drain::Waiting;
        }
        let ids: Vec<_> = self.containers.keys().copied().collect();
        for id in ids {
            let Some(mut container) = self.containers.remove(&id) else { continue };
            if self.has_room(&container) {
                self.end_of_container(&mut container, now);
            }
            self.containers.insert(id, container);
        }
        self.streams.seal_older_than(i64::MAX);
        let mut generations = self.containers.values().flat_map(|container| &container.generations);
        if generations.any(|generation| !generation.finished) { Drain::Waiting } else { Drain::Done }
    }

    fn end_of_container(&mut self, container: &mut Container, now: Now) {
        let mut block = std::mem::take(&mut self.block);
        for index in 0..container.generations.len() {
            let generation = &mut container.generations[index];
            if !generation.finished {
                match generation.source.read_at(generation.offset, &mut block) {
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
        for container in self.containers.values_mut() {
            (container.next_poll_ms, container.wait_until_ms) = (0, 0);
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

/// Opens what of a container's family has unacknowledged bytes, oldest first.
fn open_generations(container: &mut Container, positions: &[Position], begin: ReadFrom, now_ms: i64) -> io::Result<()> {
    let mut family = Vec::new();
    for (rotated, path) in discover::rotated(&container.live) {
        container.known_rotated.insert(rotated.suffix);
        match if rotated.gz { Source::open_gz(&path) } else { Source::open(&path) } {
            Ok(source) => family.push((source, true, rotated.gz)),
            // Compressed or deleted since the listing; its bytes may be gone, or in the next sweep's listing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    family.push((Source::open(&container.live)?, false, false));
    let tail_only = positions.is_empty() && begin == ReadFrom::Tail;
    let mut open = Vec::new();
    let mut matched = BTreeSet::new();
    let mut first_match = None;
    for (index, (mut source, rotated, gz)) in family.into_iter().enumerate() {
        let identity = source.identity()?;
        let mut found = None;
        for (number, position) in positions.iter().enumerate() {
            let same_file = gz || (position.dev, position.inode) == identity;
            // An empty fingerprint fits every file, and the inode may have been given to another: it says nothing.
            if same_file && position.fingerprint.len > 0 && source.begins_with(position.fingerprint)? {
                found = Some(position.offset);
                matched.insert(number);
                first_match.get_or_insert((index, number));
            }
        }
        open.push((source, rotated, found));
    }
    // Positions are in the order of the files. What is older than the first one found was done, but for files that are
    // remembered and not found, as they were empty then.
    let begin_at =
        first_match.map_or(0, |(index, number)| index.saturating_sub((0..number).filter(|earlier| !matched.contains(earlier)).count()));
    for (index, (source, rotated, found)) in open.into_iter().enumerate() {
        if index < begin_at || (tail_only && rotated) {
            continue;
        }
        let size = source.size()?;
        let offset = found.unwrap_or(if tail_only { size } else { 0 });
        // A shorter file than acknowledged was truncated while nobody looked.
        let offset = if offset > size && matches!(source, Source::Plain(_)) { 0 } else { offset };
        container.push_generation(source, offset, rotated.then_some(now_ms))?;
    }
    Ok(())
}

/// The live path may name another file than the newest generation: then that was renamed, perhaps more than once. True
/// when there is something new.
fn follow(container: &mut Container, now_ms: i64) -> io::Result<bool> {
    let metadata = std::fs::metadata(&container.live)?;
    container.gone_ms = None;
    let newest = container.generations.back();
    if newest.is_some_and(|newest| (newest.dev, newest.inode) == (metadata.dev(), metadata.ino()) && newest.rotated_ms.is_none()) {
        return Ok(false);
    }
    for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_none()) {
        generation.rotated_ms = Some(now_ms);
    }
    for (rotated, path) in discover::rotated(&container.live) {
        if container.known_rotated.contains(&rotated.suffix) {
            continue;
        }
        let missed = if rotated.gz { Source::open_gz(&path)? } else { Source::open(&path)? };
        let identity = missed.identity()?;
        // The newest generation was renamed, and perhaps compressed, since we looked: it is open here already.
        let known = if rotated.gz {
            is_compressed_form(container, &path)?
        } else {
            container.generations.iter().any(|generation| (generation.dev, generation.inode) == identity)
        };
        if !known {
            container.push_generation(missed, 0, Some(now_ms))?;
        }
        container.known_rotated.insert(rotated.suffix);
    }
    let source = Source::open(&container.live)?;
    let identity = source.identity()?;
    if !container.generations.iter().any(|generation| (generation.dev, generation.inode) == identity) {
        container.push_generation(source, 0, None)?;
    }
    container.next_poll_ms = 0;
    Ok(true)
}

/// A compressed sibling that holds the same bytes as a generation that is open.
fn is_compressed_form(container: &mut Container, path: &Path) -> io::Result<bool> {
    let mut source = Source::open_gz(path)?;
    for generation in &mut container.generations {
        if generation.fingerprint.len == 0 && matches!(generation.source, Source::Plain(_)) {
            // Written to since it was opened empty.
            generation.fingerprint = generation.source.fingerprint()?;
        }
        if generation.fingerprint.len > 0 && source.begins_with(generation.fingerprint)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// When a file without news is looked at again. Silent files are all looked at in the same moment, so that a node with hundreds of them
/// wakes once a second and not hundreds of times.
fn next_look(now_ms: i64, pause_ms: i64) -> i64 {
    let at = now_ms + pause_ms;
    if pause_ms < POLL_MS.1 { at } else { at - at % POLL_MS.1 }
}
