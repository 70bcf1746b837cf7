//! Batches for PutLogEvents, legal by construction and already in the form that goes on the wire.
//!
//! Limits: <https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html>. A batch owns one
//! buffer, the complete JSON 1.1 request, that events are written into directly; nothing is copied per event afterwards. Where
//! batches are compressed, that happens while they are filled: see [`super::gzip`].

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::gzip::{Compressor, Member, inflate};
use super::json;
use crate::cloud::LogEvent;

/// What a batch may count: message bytes (UTF-8, unescaped) and [`EVENT_OVERHEAD`] for each event.
pub const MAX_BATCH_BYTES: usize = 1_048_576;
/// Counted for each event besides its message.
pub const EVENT_OVERHEAD: usize = 26;
/// Events in a batch.
pub const MAX_BATCH_EVENTS: usize = 10_000;
/// Bytes of one message, so that it fits a batch alone.
pub const MAX_MESSAGE_BYTES: usize = MAX_BATCH_BYTES - EVENT_OVERHEAD;
/// Between the first and the last event of a batch.
pub const MAX_SPAN_MS: i64 = 24 * 3600 * 1000;
/// Encoded size at which a batch is closed though the service would count less: keeps buffers of lines full of control
/// characters (six bytes each when escaped) from growing to 6 MiB.
const MAX_ENCODED_BYTES: usize = 1_900_000;
/// What closes a batch besides its span.
#[derive(Clone, Copy, Debug)]
struct Limits {
    counted: usize,
    encoded: usize,
    events: usize,
}

const LIMITS: Limits = Limits { counted: MAX_BATCH_BYTES, encoded: MAX_ENCODED_BYTES, events: MAX_BATCH_EVENTS };

/// Smaller buffers are not kept between parts and batches, in bytes: small rests of large buffers, of a thousand streams, would keep the
/// heap from using what is between them.
const LEAST_KEPT: usize = 64 << 10;

/// How an event's object begins, and what is between two. No message has this in it: there the quotes are escaped.
const BEGIN: &[u8] = b"{\"timestamp\":";
const BETWEEN: &[u8] = b"\"},{\"timestamp\":";
/// What stands behind the last one.
const END: &[u8] = b"]}";

/// A closed batch: 1 to 10,000 events of one stream in time order.
///
/// Invariants: counted bytes at most [`MAX_BATCH_BYTES`], span at most [`MAX_SPAN_MS`] unless built [`BatchBuilder::of_any_span`],
/// no empty message, order by time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBatch {
    group: Arc<str>,
    stream: Arc<str>,
    body: Body,
    /// Where the first event stands in the plain body.
    head: usize,
    events: usize,
    counted: usize,
    emf: bool,
    entity: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Plain(Bytes),
    Gzip(Bytes),
}

#[derive(Deserialize)]
struct WireEvent {
    timestamp: i64,
    message: String,
}

impl LogBatch {
    /// The log group.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// The log stream.
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// The complete body of the PutLogEvents request (`application/x-amz-json-1.1`), to be signed and sent as it is. Inflated where it
    /// is kept compressed.
    pub fn body(&self) -> Bytes {
        match &self.body {
            Body::Plain(body) => body.clone(),
            Body::Gzip(gzip) => inflate(gzip).into(),
        }
    }

    /// The body as it is kept compressed, to be sent with `content-encoding: gzip`; `None` where it is kept plain.
    pub fn gzip(&self) -> Option<&Bytes> {
        match &self.body {
            Body::Plain(_) => None,
            Body::Gzip(gzip) => Some(gzip),
        }
    }

    /// Bytes of memory that it takes.
    pub fn held_bytes(&self) -> usize {
        let (Body::Plain(body) | Body::Gzip(body)) = &self.body;
        body.len()
    }

    /// The events are metric documents: send `x-amzn-logs-format: json/emf`.
    pub fn is_emf(&self) -> bool {
        self.emf
    }

    /// Number of events, at least 1.
    pub fn len(&self) -> usize {
        self.events
    }

    /// Never: an empty batch is not made.
    pub fn is_empty(&self) -> bool {
        self.events == 0
    }

    /// Bytes as the service counts and bills them: messages and [`EVENT_OVERHEAD`] each.
    pub fn counted_bytes(&self) -> usize {
        self.counted
    }

    /// The events, decoded: for sinks other than CloudWatch Logs, and for tests.
    pub fn events(&self) -> impl Iterator<Item = LogEvent> {
        let body = self.body();
        self.objects(&body).into_iter().map(move |place| decoded(&body[place]))
    }

    fn objects(&self, body: &[u8]) -> Vec<Range<usize>> {
        objects(body, self.head, body.len() - END.len())
    }

    /// One half each, for finding the event that the service calls invalid; `None` for a single event.
    pub fn bisect(&self) -> Option<(Self, Self)> {
        if self.events < 2 {
            return None;
        }
        let body = self.body();
        let places = self.objects(&body);
        let (left, right) = places.split_at(places.len() / 2);
        Some((self.part(&body, left), self.part(&body, right)))
    }

    fn part(&self, body: &[u8], places: &[Range<usize>]) -> Self {
        let compressor = self.gzip().map(|_| Compressor::default());
        let mut builder = BatchBuilder::new(self.group.clone(), self.stream.clone(), self.emf).compressing(compressor);
        builder.set_entity(self.entity.clone());
        for place in places {
            builder.append_encoded(&body[place.clone()]);
        }
        builder.finish().expect("half of two or more events is not empty")
    }

    /// Batches of ready events: for documents, which are few. Events are sorted; empty messages are left out and a message
    /// over [`MAX_MESSAGE_BYTES`] is cut at a character.
    pub fn from_events(group: &str, stream: &str, emf: bool, mut events: Vec<LogEvent>) -> Vec<Self> {
        events.sort_by_key(|event| event.timestamp_ms);
        let mut builder = BatchBuilder::new(group.into(), stream.into(), emf).compressing(Some(Compressor::default()));
        let mut batches = Vec::new();
        for event in &events {
            let message = &event.message[..event.message.floor_char_boundary(MAX_MESSAGE_BYTES)];
            let sealed = builder.push_with(event.timestamp_ms, |out| {
                json::escape(out, message.as_bytes());
                message.len()
            });
            batches.extend(sealed);
        }
        batches.extend(builder.finish());
        batches
    }
}

fn decoded(object: &[u8]) -> LogEvent {
    let WireEvent { timestamp, message } = serde_json::from_slice(object).expect("the builder wrote a JSON object");
    LogEvent { timestamp_ms: timestamp, message }
}

/// Places of the events' objects, of which the first begins at `head` and the last ends at `end`.
fn objects(body: &[u8], head: usize, end: usize) -> Vec<Range<usize>> {
    // Behind the quote and the brace.
    let commas = memchr::memmem::find_iter(&body[head..end], BETWEEN).map(|at| head + at + 2);
    let mut start = head;
    commas.chain([end]).map(|comma| std::mem::replace(&mut start, comma + 1)..comma).collect()
}

/// The time of an event's object.
fn timestamp_ms(object: &[u8]) -> i64 {
    let digits = object[BEGIN.len()..].split(|&byte| byte == b',').next().unwrap_or_default();
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).expect("the builder wrote a number")
}

/// Collects events of one stream and closes a batch whenever the next event would break a limit.
#[derive(Debug)]
pub struct BatchBuilder {
    group: Arc<str>,
    stream: Arc<str>,
    emf: bool,
    /// What the batch being filled is about, and what the next will be.
    entity: Option<Arc<str>>,
    next_entity: Option<Arc<str>>,
    compressor: Option<Compressor>,
    limits: Limits,
    max_span_ms: i64,
    /// Room that the buffer may keep when what was in it is compressed or gone, in bytes.
    kept: usize,
    /// Bytes of the buffer that the last batch needed: the next one's are had at once instead of doubling up to them.
    usual: usize,
    /// The request's head, then events separated by commas; nothing at all before the first event. Without what is in `member`.
    body: Vec<u8>,
    /// The beginning of the body, compressed already.
    member: Member,
    head: usize,
    events: usize,
    counted: usize,
    first_ms: i64,
    last_ms: i64,
    sorted: bool,
}

impl BatchBuilder {
    /// An empty builder.
    pub fn new(group: Arc<str>, stream: Arc<str>, emf: bool) -> Self {
        Self {
            group,
            stream,
            emf,
            entity: None,
            next_entity: None,
            compressor: None,
            limits: LIMITS,
            max_span_ms: MAX_SPAN_MS,
            kept: usize::MAX,
            usual: 0,
            body: Vec::new(),
            member: Member::default(),
            head: 0,
            events: 0,
            counted: 0,
            first_ms: 0,
            last_ms: 0,
            sorted: true,
        }
    }

    /// Batches are compressed with it while they are filled.
    #[must_use]
    pub fn compressing(mut self, compressor: Option<Compressor>) -> Self {
        self.compressor = compressor;
        self
    }

    /// Batches that begin from now on say that they are about this entity: the member's value, as JSON.
    pub fn set_entity(&mut self, entity: Option<Arc<str>>) {
        self.next_entity = entity;
    }

    /// Batches may span any time: for a sink that is not the service.
    #[must_use]
    pub fn of_any_span(mut self) -> Self {
        self.max_span_ms = i64::MAX;
        self
    }

    /// How much room, in bytes, the buffer may keep from part to part and from one full batch to the next.
    pub fn keep(&mut self, bytes: usize) {
        self.kept = bytes;
    }

    /// Empties the buffer, and gives back what of its memory is not to be kept.
    fn clear(&mut self) {
        self.body.clear();
        if self.kept < LEAST_KEPT {
            self.body = Vec::new();
        } else {
            // But no room for a whole body or a huge event, if they are compressed.
            self.body.shrink_to(self.kept.min(2 * Member::PART));
        }
    }

    /// Makes room for an event: the head before the first, a comma before each other.
    fn next_event(&mut self) {
        if self.events == 0 {
            self.begin();
        } else {
            self.body.push(b',');
        }
    }

    fn begin(&mut self) {
        self.body.reserve(self.usual.min(self.kept));
        self.body.extend_from_slice(b"{\"logGroupName\":\"");
        json::escape(&mut self.body, self.group.as_bytes());
        self.body.extend_from_slice(b"\",\"logStreamName\":\"");
        json::escape(&mut self.body, self.stream.as_bytes());
        self.body.push(b'"');
        self.entity.clone_from(&self.next_entity);
        if let Some(entity) = &self.entity {
            self.body.extend_from_slice(b",\"entity\":");
            self.body.extend_from_slice(entity.as_bytes());
        }
        self.body.extend_from_slice(b",\"logEvents\":[");
        self.head = self.body.len();
        self.counted = 0;
        self.sorted = true;
    }

    /// Number of events.
    pub fn len(&self) -> usize {
        self.events
    }

    /// No event yet.
    pub fn is_empty(&self) -> bool {
        self.events == 0
    }

    /// Bytes of memory that the events so far take, room for more included; 0 without any.
    pub fn held_bytes(&self) -> usize {
        if self.is_empty() { 0 } else { self.body.capacity() + self.member.held_bytes() }
    }

    /// Length of the body so far, before compression.
    fn encoded_bytes(&self) -> usize {
        self.member.plain_bytes() + self.body.len()
    }

    /// Adds an event: `write` appends the message, escaped for a JSON string, and returns its unescaped length, which must
    /// not exceed [`MAX_MESSAGE_BYTES`]. A message of length 0 is not added, as the service refuses it.
    ///
    /// When the event does not fit, the events before it are closed as a batch and it becomes the first of the next.
    pub fn push_with(&mut self, timestamp_ms: i64, write: impl FnOnce(&mut Vec<u8>) -> usize) -> Option<LogBatch> {
        let before = self.body.len();
        self.next_event();
        let start = self.body.len();
        self.body.extend_from_slice(BEGIN);
        json::integer(&mut self.body, timestamp_ms);
        self.body.extend_from_slice(b",\"message\":\"");
        let message = write(&mut self.body);
        self.body.extend_from_slice(b"\"}");
        if message == 0 {
            self.body.truncate(before);
            return None;
        }
        debug_assert!(message <= MAX_MESSAGE_BYTES, "the caller cuts messages");
        let counted = message + EVENT_OVERHEAD;
        if self.fits(timestamp_ms, counted) {
            self.account(timestamp_ms, counted);
            self.compress_some();
            return None;
        }
        let event = self.body.split_off(start);
        self.body.truncate(before);
        let sealed = self.close(true);
        self.next_event();
        self.body.extend_from_slice(&event);
        self.account(timestamp_ms, counted);
        sealed
    }

    /// Compresses what is written, if that is enough to be worth it.
    fn compress_some(&mut self) {
        if let Some(compressor) = &self.compressor
            && self.body.len() >= Member::PART
        {
            compressor.append(&mut self.member, &self.body);
            self.clear();
        }
    }

    /// Adds an event that another batch had encoded; the limits hold because they held there.
    fn append_encoded(&mut self, object: &[u8]) {
        self.next_event();
        self.body.extend_from_slice(object);
        let LogEvent { timestamp_ms, message } = decoded(object);
        self.account(timestamp_ms, message.len() + EVENT_OVERHEAD);
        self.compress_some();
    }

    fn fits(&self, timestamp_ms: i64, counted: usize) -> bool {
        self.events == 0
            || (self.events < self.limits.events
                && self.counted + counted <= self.limits.counted
                && self.encoded_bytes() <= self.limits.encoded
                && self.last_ms.max(timestamp_ms).saturating_sub(self.first_ms.min(timestamp_ms)) <= self.max_span_ms)
    }

    fn account(&mut self, timestamp_ms: i64, counted: usize) {
        if self.events == 0 {
            (self.first_ms, self.last_ms) = (timestamp_ms, timestamp_ms);
        } else {
            self.sorted &= timestamp_ms >= self.last_ms;
            self.first_ms = self.first_ms.min(timestamp_ms);
            self.last_ms = self.last_ms.max(timestamp_ms);
        }
        self.counted += counted;
        self.events += 1;
    }

    /// Closes what is there; `None` when there is nothing. The builder is empty afterwards, and takes no memory.
    pub fn finish(&mut self) -> Option<LogBatch> {
        self.close(false)
    }

    /// `goes_on` if the next batch is begun at once.
    fn close(&mut self, goes_on: bool) -> Option<LogBatch> {
        if self.events == 0 {
            return None;
        }
        let mut member = std::mem::take(&mut self.member);
        if !self.sorted {
            // All of it is needed at once: rare enough to begin again.
            if let Some(compressor) = &self.compressor {
                self.body = inflate(&compressor.finish(std::mem::take(&mut member), &self.body));
            }
            self.body = self.in_time_order();
        }
        self.body.extend_from_slice(END);
        self.usual = if self.compressor.is_some() && member.plain_bytes() > 0 { Member::PART } else { self.body.len() };
        let body = if let Some(compressor) = &self.compressor {
            let gzip = compressor.finish(member, &self.body);
            if goes_on {
                self.clear();
            } else {
                self.body = Vec::new();
            }
            Body::Gzip(gzip.into())
        } else {
            let mut body = std::mem::take(&mut self.body);
            body.shrink_to_fit();
            Body::Plain(body.into())
        };
        let (group, stream, entity) = (self.group.clone(), self.stream.clone(), self.entity.take());
        let events = std::mem::take(&mut self.events);
        Some(LogBatch { group, stream, body, head: self.head, events, counted: self.counted, emf: self.emf, entity })
    }

    /// The two streams of a container are written by two threads, so lines can be a little out of order; the service
    /// refuses a batch that is. Equal timestamps keep the order of the file.
    fn in_time_order(&self) -> Vec<u8> {
        let body = &self.body;
        let mut events: Vec<_> =
            objects(body, self.head, body.len()).into_iter().map(|place| (timestamp_ms(&body[place.clone()]), place)).collect();
        events.sort_by_key(|(timestamp_ms, _)| *timestamp_ms);
        let mut sorted = Vec::with_capacity(body.len() + END.len());
        sorted.extend_from_slice(&body[..self.head]);
        for (index, (_, place)) in events.into_iter().enumerate() {
            if index > 0 {
                sorted.push(b',');
            }
            sorted.extend_from_slice(&body[place]);
        }
        sorted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A thousandth of the service's, so that cases near each limit are many and small.
    const SMALL: Limits = Limits { counted: 1000, encoded: 1900, events: 20 };

    fn legal(batch: &LogBatch, limits: Limits) {
        let events: Vec<_> = batch.events().collect();
        assert!((1..=limits.events).contains(&events.len()));
        let counted: usize = events.iter().map(|event| event.message.len() + EVENT_OVERHEAD).sum();
        assert_eq!(counted, batch.counted_bytes());
        assert!(counted <= limits.counted);
        assert!(events.is_sorted_by_key(|event| event.timestamp_ms));
        assert!(events[events.len() - 1].timestamp_ms - events[0].timestamp_ms <= MAX_SPAN_MS);
        assert!(events.iter().all(|event| !event.message.is_empty()));
        let request: serde_json::Value = serde_json::from_slice(&batch.body()).unwrap();
        assert_eq!(request["logGroupName"], "g");
        assert_eq!(request["logStreamName"], "s \"quoted\"");
        assert_eq!(request["logEvents"].as_array().unwrap().len(), events.len());
    }

    fn batches(events: &[(i64, String)]) -> Vec<LogBatch> {
        batches_of(events, false, LIMITS)
    }

    fn batches_of(events: &[(i64, String)], compress: bool, limits: Limits) -> Vec<LogBatch> {
        let mut builder = BatchBuilder::new("g".into(), "s \"quoted\"".into(), false).compressing(compress.then(Compressor::default));
        builder.limits = limits;
        let mut batches = Vec::new();
        for (timestamp, message) in events {
            batches.extend(builder.push_with(*timestamp, |out| {
                json::escape(out, message.as_bytes());
                message.len()
            }));
        }
        batches.extend(builder.finish());
        batches
    }

    proptest! {
        #[test]
        fn every_batch_is_legal_and_no_event_is_lost(
            times in prop_oneof![Just(3 * MAX_SPAN_MS), Just(1000_i64)],
            events in proptest::collection::vec(
                (0.0..1.0, prop_oneof![
                    8 => "\\PC{0,12}",
                    1 => (500..=SMALL.counted - EVENT_OVERHEAD).prop_map(|len| "x".repeat(len)),
                    1 => (1_usize..400).prop_map(|len| "\u{1}".repeat(len)),
                ]),
                0..60,
            ),
        ) {
            let events: Vec<(i64, String)> = events.into_iter().map(|(part, text)| ((part * times as f64) as i64, text)).collect();
            let batches = batches_of(&events, false, SMALL);
            batches.iter().for_each(|batch| legal(batch, SMALL));
            let compressed = batches_of(&events, true, SMALL);
            prop_assert_eq!(compressed.len(), batches.len());
            for (compressed, plain) in compressed.iter().zip(&batches) {
                prop_assert_eq!(compressed.body(), plain.body());
                prop_assert!(compressed.gzip().is_some() && plain.gzip().is_none());
                prop_assert_eq!(compressed.events().collect::<Vec<_>>(), plain.events().collect::<Vec<_>>());
            }
            let mut sent: Vec<_> = batches.iter().flat_map(|batch| batch.events().map(|event| (event.timestamp_ms, event.message))).collect();
            let mut expected: Vec<_> = events.into_iter().filter(|event| !event.1.is_empty()).collect();
            sent.sort();
            expected.sort();
            prop_assert_eq!(sent, expected);
        }

        #[test]
        fn halves_of_a_batch_are_the_batch(times in proptest::collection::vec(0_i64..1000, 2..40)) {
            let events: Vec<_> = times.iter().map(|time| (*time, format!("m{time}"))).collect();
            for compress in [false, true] {
                let whole = &batches_of(&events, compress, LIMITS)[0];
                let (left, right) = whole.bisect().unwrap();
                prop_assert_eq!(left.gzip().is_some(), compress);
                legal(&left, LIMITS);
                legal(&right, LIMITS);
                prop_assert_eq!(left.events().chain(right.events()).collect::<Vec<_>>(), whole.events().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn days_apart_are_one_batch_for_a_sink_that_is_not_the_service() {
        let events = [(9 * MAX_SPAN_MS, "late"), (0, "early")];
        let push = |builder: &mut BatchBuilder, (timestamp_ms, text): (i64, &str)| {
            builder.push_with(timestamp_ms, |out| {
                json::escape(out, text.as_bytes());
                text.len()
            })
        };
        let mut builder = BatchBuilder::new("g".into(), "s".into(), false).of_any_span();
        assert!(events.iter().all(|event| push(&mut builder, *event).is_none()));
        let batch = builder.finish().unwrap();
        assert_eq!(batch.events().map(|event| event.message).collect::<Vec<_>>(), ["early", "late"]);
        let mut builder = BatchBuilder::new("g".into(), "s".into(), false);
        assert!(push(&mut builder, events[0]).is_none());
        assert_eq!(push(&mut builder, events[1]).unwrap().len(), 1);
    }

    #[test]
    fn a_batch_and_its_halves_name_their_entity() {
        let mut builder = BatchBuilder::new("g".into(), "s".into(), false);
        let push = |builder: &mut BatchBuilder| {
            for time in 0..2 {
                builder.push_with(time, |out| {
                    out.push(b'x');
                    1
                });
            }
        };
        let entity = |batch: &LogBatch| serde_json::from_slice::<serde_json::Value>(&batch.body()).unwrap().get("entity").cloned();
        push(&mut builder);
        builder.set_entity(Some(r#"{"keyAttributes":{}}"#.into()));
        assert_eq!(entity(&builder.finish().unwrap()), None, "it had begun before");
        push(&mut builder);
        let batch = builder.finish().unwrap();
        let named = Some(serde_json::json!({"keyAttributes": {}}));
        assert_eq!(entity(&batch), named);
        let (left, right) = batch.bisect().unwrap();
        assert_eq!((entity(&left), entity(&right)), (named.clone(), named));
    }

    #[test]
    fn ten_thousand_events_close_a_batch() {
        let events: Vec<_> = (0..MAX_BATCH_EVENTS as i64 + 1).map(|time| (time, "x".to_owned())).collect();
        let lengths: Vec<_> = batches(&events).iter().map(LogBatch::len).collect();
        assert_eq!(lengths, [MAX_BATCH_EVENTS, 1]);
    }

    #[test]
    fn control_characters_close_a_batch_before_its_buffer_is_six_times_as_large() {
        let events: Vec<_> = (0..4).map(|time| (time, "\u{1}".repeat(250_000))).collect();
        let lengths: Vec<_> = batches(&events).iter().map(LogBatch::len).collect();
        assert_eq!(lengths, [1, 1, 1, 1], "two of them are under a mebibyte, but 3 MB encoded");
    }

    #[test]
    fn a_mebibyte_is_filled_to_the_last_byte() {
        let events: Vec<_> = (0..17).map(|time| (time, "x".repeat(MAX_BATCH_BYTES / 16 - EVENT_OVERHEAD))).collect();
        let counts: Vec<_> = batches(&events).iter().map(LogBatch::counted_bytes).collect();
        assert_eq!(counts, [MAX_BATCH_BYTES, MAX_BATCH_BYTES / 16]);
    }

    #[test]
    fn a_batch_of_several_parts_is_one_body_in_the_order_of_time() {
        for step in [1, -1] {
            let events: Vec<_> =
                (0..6000).map(|number| (1_000_000 + step * number, format!("event {number} {}", "x".repeat(120)))).collect();
            let (plain, compressed) = (batches(&events), batches_of(&events, true, LIMITS));
            assert!(plain.len() == 1 && plain[0].body().len() > 3 * Member::PART);
            assert_eq!(plain[0].body(), compressed[0].body());
            assert!(plain[0].events().eq(compressed[0].events()));
            legal(&compressed[0], LIMITS);
        }
    }

    #[test]
    fn ready_documents_are_sorted_and_cut() {
        let events = vec![
            LogEvent { timestamp_ms: 2, message: "é".repeat(MAX_MESSAGE_BYTES) },
            LogEvent { timestamp_ms: 1, message: "first".to_owned() },
        ];
        let batches = LogBatch::from_events("g", "s \"quoted\"", true, events);
        batches.iter().for_each(|batch| legal(batch, LIMITS));
        assert_eq!(batches.len(), 2);
        assert!(batches[0].is_emf());
        assert_eq!(batches[0].events().next().unwrap().message, "first");
    }
}
