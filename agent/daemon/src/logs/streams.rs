//! Batches being filled, one for each log stream, and which bytes of which files each of them holds.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use stanchion_core::logs::entity::Entity;
use stanchion_core::logs::gzip::Compressor;
use stanchion_core::logs::join::{Event, Mark};
use stanchion_core::logs::ledger::BatchId;
use stanchion_core::logs::record::{RecordWriter, Written};
use stanchion_core::logs::settings::LogSettings;
use stanchion_core::logs::{BatchBuilder, LogBatch};

/// Spreads numbers that are counted here: a stream is looked up for each event, and nobody outside can choose its number.
#[derive(Clone, Copy, Debug, Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, number: u64) {
        // The odd number nearest to 2^64 over the golden ratio.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A stream, in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

/// A generation of a container's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FileId {
    pub(super) container: u64,
    pub(super) generation: u32,
}

/// A closed batch on its way.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// To be acknowledged by.
    pub id: BatchId,
    /// Batches of one stream keep their order.
    pub stream: StreamId,
    /// The events.
    pub batch: LogBatch,
}

/// One stream.
pub(super) struct Stream {
    pub(super) group: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) builder: BatchBuilder,
    pub(super) batch: BatchId,
    /// Files with a pin in the batch being filled.
    pub(super) files: Vec<FileId>,
    /// Latest pin, so that most lines of a file need none.
    pub(super) last_pin: Option<(FileId, u64)>,
    /// When the first event came, in milliseconds of the monotonic clock.
    pub(super) first_ms: i64,
    /// Bytes sealed and not acknowledged.
    pub(super) in_flight: usize,
    pub(super) last_error: Option<String>,
    /// What it is about.
    entity: Entity,
    /// Container outputs that write here.
    users: usize,
}

impl Stream {
    /// Remembers which bytes of which files the batch being filled has.
    fn pin(&mut self, event: &Event<'_>, container: u64, pin: &mut dyn FnMut(BatchId, Mark)) {
        for mark in event.marks {
            let file = FileId { container, generation: mark.generation };
            if self.last_pin.is_some_and(|(last, offset)| last == file && offset <= mark.offset) {
                continue;
            }
            self.last_pin = Some((file, mark.offset));
            if !self.files.contains(&file) {
                self.files.push(file);
            }
            pin(self.batch, *mark);
        }
    }
}

/// What an unacknowledged batch holds.
struct Flight {
    stream: StreamId,
    group: Arc<str>,
    bytes: usize,
    files: Vec<FileId>,
}

/// A log group with unacknowledged batches: what it refuses, it mostly refuses to all its streams.
#[derive(Default)]
struct Group {
    in_flight: usize,
    /// Why the latest of its batches is being tried again.
    error: Option<String>,
}

/// All streams.
pub(super) struct Streams {
    /// One for all, as each body is compressed in parts.
    compressor: Option<Compressor>,
    /// Batches hold to the service's 24 hours.
    bounded_span: bool,
    /// What all of it may take, and what of it one stream may have on its way.
    memory_bytes: usize,
    stream_bytes: usize,
    by_name: HashMap<(Arc<str>, Arc<str>), StreamId>,
    streams: HashMap<StreamId, Stream, BuildHasherDefault<Spread>>,
    flights: HashMap<BatchId, Flight>,
    groups: HashMap<Arc<str>, Group>,
    ready: Vec<Sealed>,
    next: u64,
    in_flight: usize,
    filling: usize,
}

impl Streams {
    /// Without any.
    pub(super) fn new(settings: &LogSettings) -> Self {
        Self {
            compressor: settings.compress.then(Compressor::default),
            bounded_span: settings.age.is_some(),
            memory_bytes: settings.memory_bytes,
            stream_bytes: settings.stream_bytes,
            by_name: HashMap::new(),
            streams: HashMap::default(),
            flights: HashMap::new(),
            groups: HashMap::new(),
            ready: Vec::new(),
            next: 0,
            in_flight: 0,
            filling: 0,
        }
    }

    /// The stream of that name; each call needs a [`Self::leave`].
    pub(super) fn join(&mut self, group: &str, name: &str, emf: bool, entity: Option<Arc<str>>) -> StreamId {
        let id = self.find(group, name, emf);
        let stream = self.streams.get_mut(&id).expect("it was just found");
        stream.users += 1;
        stream.entity.join(entity);
        stream.builder.set_entity(stream.entity.one().cloned());
        id
    }

    fn find(&mut self, group: &str, name: &str, emf: bool) -> StreamId {
        let key = (Arc::from(group), Arc::from(name));
        if let Some(id) = self.by_name.get(&key) {
            return *id;
        }
        let id = StreamId(self.number());
        let batch = BatchId(self.number());
        let (group, name) = key.clone();
        let builder = BatchBuilder::new(group.clone(), name.clone(), emf).compressing(self.compressor.clone());
        let builder = if self.bounded_span { builder } else { builder.of_any_span() };
        let stream = Stream {
            group,
            name,
            builder,
            batch,
            files: Vec::new(),
            last_pin: None,
            first_ms: 0,
            in_flight: 0,
            last_error: None,
            users: 0,
            entity: Entity::default(),
        };
        self.streams.insert(id, stream);
        self.by_name.insert(key, id);
        id
    }

    /// One user less. What is in the batch being filled is sent.
    pub(super) fn leave(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.users -= 1;
        if stream.users == 0 {
            self.seal(id);
            if let Some(stream) = self.streams.remove(&id) {
                self.by_name.remove(&(stream.group, stream.name));
            }
        }
    }

    pub(super) fn get(&self, id: StreamId) -> Option<&Stream> {
        self.streams.get(&id)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes a batch that the stream's builder closed because the next event did not fit.
    pub(super) fn sealed(&mut self, id: StreamId, batch: LogBatch) {
        let next = BatchId(self.number());
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let bytes = batch.held_bytes();
        let sealed = Sealed { id: std::mem::replace(&mut stream.batch, next), stream: id, batch };
        stream.in_flight += bytes;
        stream.last_pin = None;
        self.in_flight += bytes;
        let (group, files) = (Arc::clone(&stream.group), std::mem::take(&mut stream.files));
        self.groups.entry(Arc::clone(&group)).or_default().in_flight += bytes;
        self.flights.insert(sealed.id, Flight { stream: id, group, bytes, files });
        self.ready.push(sealed);
    }

    /// Closes the batch being filled, if it has events.
    pub(super) fn seal(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let filled = stream.builder.held_bytes();
        if let Some(batch) = stream.builder.finish() {
            self.filling -= filled;
            self.sealed(id, batch);
        }
    }

    /// Closes batches whose first event came before `before_ms`; returns when the next one falls due, as the time of its first event.
    pub(super) fn seal_older_than(&mut self, before_ms: i64) -> Option<i64> {
        let open = self.streams.iter().filter(|(_, stream)| !stream.builder.is_empty());
        let (due, waiting): (Vec<_>, Vec<_>) = open.map(|(id, stream)| (*id, stream.first_ms)).partition(|(_, first)| *first <= before_ms);
        for (id, _) in due {
            self.seal(id);
        }
        waiting.iter().map(|(_, first)| *first).min()
    }

    /// Batches closed since the last call, in the order of closing.
    pub(super) fn take_ready(&mut self) -> Vec<Sealed> {
        std::mem::take(&mut self.ready)
    }

    /// The batch needs no memory any more; the files whose ledgers are to hear of it.
    pub(super) fn settle(&mut self, id: BatchId, error: Option<String>) -> Vec<FileId> {
        let Some(flight) = self.flights.remove(&id) else { return Vec::new() };
        self.in_flight -= flight.bytes;
        if let Some(group) = self.groups.get_mut(&flight.group) {
            group.in_flight -= flight.bytes;
            group.error = None;
            if group.in_flight == 0 {
                self.groups.remove(&flight.group);
            }
        }
        if let Some(stream) = self.streams.get_mut(&flight.stream) {
            stream.in_flight -= flight.bytes;
            stream.last_error = error;
        }
        flight.files
    }

    /// Unacknowledged batches.
    pub(super) fn flights(&self) -> usize {
        self.flights.len()
    }

    /// Bytes in memory: being filled, and unacknowledged.
    pub(super) fn bytes(&self) -> usize {
        self.in_flight + self.filling
    }

    /// Of these, of groups that take nothing.
    fn refused_bytes(&self) -> usize {
        self.groups.values().filter(|group| group.error.is_some()).map(|group| group.in_flight).sum()
    }

    /// Memory is full. Groups that take nothing leave half of it to the others: where they filled more before that was known, the others
    /// have so much beyond it.
    pub(super) fn is_full(&self) -> bool {
        let bytes = self.bytes();
        let others = || bytes - self.refused_bytes();
        bytes >= self.memory_bytes && (others() >= self.memory_bytes / 2 || bytes >= 2 * self.memory_bytes)
    }

    /// The stream may get more, as far as it and its group are concerned.
    pub(super) fn has_room(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_none_or(|stream| {
            let refused = self.groups.get(&stream.group).is_some_and(|group| group.error.is_some());
            stream.in_flight < self.stream_bytes && !(refused && self.refused_bytes() >= self.memory_bytes / 2)
        })
    }

    /// The last error of the stream, or what keeps its group from taking anything.
    pub(super) fn error(&self, stream: &Stream) -> Option<String> {
        let group = || self.groups.get(&stream.group).and_then(|group| group.error.clone());
        stream.last_error.clone().or_else(group)
    }

    /// Puts an event into the stream's batch, in as many parts as its size needs. `pin` hears of each batch that holds
    /// some of it. Returns the number of parts, 0 when the layout has no message for it, and what was written of the last one.
    pub(super) fn push(
        &mut self,
        id: StreamId,
        event: &Event<'_>,
        writer: &RecordWriter,
        container: u64,
        now_ms: i64,
        pin: &mut dyn FnMut(BatchId, Mark),
    ) -> (usize, Written) {
        let (mut from, mut parts) = (0, 0);
        // Half of the memory is for what is being filled. A buffer stays as large as it got only while there are few.
        let share = self.memory_bytes / 2 / self.streams.len().max(1);
        loop {
            let Some(stream) = self.streams.get_mut(&id) else { return (parts, Written::default()) };
            stream.builder.keep(share);
            let before = stream.builder.held_bytes();
            let was_empty = stream.builder.is_empty();
            let mut written = Written::default();
            let sealed = stream.builder.push_with(event.timestamp_ms, |out| {
                written = writer.write(event, from, out);
                written.message
            });
            if was_empty || sealed.is_some() {
                stream.first_ms = now_ms;
            }
            self.filling = self.filling - before + stream.builder.held_bytes();
            // Nearly every event goes into the batch that is open: its stream is found once.
            let stream = match sealed {
                None => Some(stream),
                Some(batch) => {
                    self.sealed(id, batch);
                    self.streams.get_mut(&id)
                }
            };
            if written.message > 0
                && let Some(stream) = stream
            {
                parts += 1;
                stream.pin(event, container, pin);
            }
            from += written.content;
            if from >= event.content.len() {
                return (parts, written);
            }
        }
    }

    /// Remembers why a batch is being tried again.
    pub(super) fn note_error(&mut self, id: BatchId, error: String) {
        let Some(flight) = self.flights.get(&id) else { return };
        if let Some(stream) = self.streams.get_mut(&flight.stream) {
            stream.last_error = Some(error.clone());
        }
        if let Some(group) = self.groups.get_mut(&flight.group) {
            group.error = Some(error);
        }
    }
}
