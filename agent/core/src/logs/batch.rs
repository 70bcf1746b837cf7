//! Batches for PutLogEvents, legal by construction and already in the form that goes on the wire.
//!
//! Limits: <https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html>. A batch owns one
//! buffer, the complete JSON 1.1 request, that events are written into directly; nothing is copied per event afterwards. Where
//! batches are compressed, that happens while they are filled: see [`super::gzip`].

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

/// Smaller buffers are not kept for the next batch; in bytes.
const LEAST_KEPT: usize = 64 << 10;

/// A closed batch: 1 to 10,000 events of one stream in time order.
///
/// Invariants: counted bytes at most [`MAX_BATCH_BYTES`], span at most [`MAX_SPAN_MS`] unless built [`BatchBuilder::of_any_span`],
/// no empty message, order by time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBatch {
    group: Arc<str>,
    stream: Arc<str>,
    body: Body,
    events: Arc<[Span]>,
    counted: usize,
    emf: bool,
    entity: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Plain(Bytes),
    Gzip(Bytes),
}

/// Where an event's JSON object stands in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    timestamp_ms: i64,
    start: u32,
    end: u32,
    /// Message bytes and overhead, as the service counts.
    counted: u32,
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
        body.len() + self.events.len() * size_of::<Span>()
    }

    /// The events are metric documents: send `x-amzn-logs-format: json/emf`.
    pub fn is_emf(&self) -> bool {
        self.emf
    }

    /// Number of events, at least 1.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Never: an empty batch is not made.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Bytes as the service counts and bills them: messages and [`EVENT_OVERHEAD`] each.
    pub fn counted_bytes(&self) -> usize {
        self.counted
    }

    /// Milliseconds since 1970 of the first and the last event.
    pub fn time_range(&self) -> (i64, i64) {
        let at = |span: Option<&Span>| span.map_or(0, |span| span.timestamp_ms);
        (at(self.events.first()), at(self.events.last()))
    }

    /// The events, decoded: for sinks other than CloudWatch Logs, and for tests.
    pub fn events(&self) -> impl Iterator<Item = LogEvent> + '_ {
        let body = self.body();
        self.events.iter().map(move |span| {
            let object = &body[span.start as usize..span.end as usize];
            let wire: WireEvent = serde_json::from_slice(object).expect("the builder wrote a JSON object");
            LogEvent { timestamp_ms: wire.timestamp, message: wire.message }
        })
    }

    /// One half each, for finding the event that the service calls invalid; `None` for a single event.
    pub fn bisect(&self) -> Option<(Self, Self)> {
        if self.events.len() < 2 {
            return None;
        }
        let body = self.body();
        let (left, right) = self.events.split_at(self.events.len() / 2);
        Some((self.part(&body, left), self.part(&body, right)))
    }

    fn part(&self, body: &[u8], spans: &[Span]) -> Self {
        let compressor = self.gzip().map(|_| Compressor::default());
        let mut builder = BatchBuilder::new(self.group.clone(), self.stream.clone(), self.emf).compressing(compressor);
        builder.set_entity(self.entity.clone());
        for span in spans {
            builder.append_encoded(&body[span.start as usize..span.end as usize], *span);
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
    /// The request's head, then events separated by commas; nothing at all before the first event. Without what is in `member`.
    body: Vec<u8>,
    /// The beginning of the body, compressed already.
    member: Member,
    head: usize,
    events: Vec<Span>,
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
            body: Vec::new(),
            member: Member::default(),
            head: 0,
            events: Vec::new(),
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

    /// Gives back memory beyond `bytes` that the batches before needed; while there is no event. Little is not worth keeping: small rests of
    /// large buffers, of a thousand streams, would keep the heap from using what is between them.
    pub fn shrink_to(&mut self, bytes: usize) {
        if !self.events.is_empty() {
            return;
        }
        if bytes < LEAST_KEPT {
            (self.body, self.events) = (Vec::new(), Vec::new());
        } else {
            self.body.shrink_to(bytes);
            self.events.shrink_to(bytes / size_of::<Span>());
        }
    }

    /// Makes room for an event: the head before the first, a comma before each other.
    fn next_event(&mut self) {
        if self.events.is_empty() {
            self.begin();
        } else {
            self.body.push(b',');
        }
    }

    fn begin(&mut self) {
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
        self.events.len()
    }

    /// No event yet.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Bytes of memory that the events so far take; 0 without any.
    pub fn held_bytes(&self) -> usize {
        self.body.len() + self.member.compressed_bytes() + self.events.len() * size_of::<Span>()
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
        self.body.extend_from_slice(b"{\"timestamp\":");
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
            self.account(timestamp_ms, self.member.plain_bytes() + start, counted);
            self.compress_some();
            return None;
        }
        let event = self.body.split_off(start);
        self.body.truncate(before);
        let sealed = self.finish();
        self.next_event();
        self.body.extend_from_slice(&event);
        self.account(timestamp_ms, self.head, counted);
        sealed
    }

    /// Compresses what is written, if that is enough to be worth it.
    fn compress_some(&mut self) {
        if let Some(compressor) = &self.compressor
            && self.body.len() >= Member::PART
        {
            compressor.append(&mut self.member, &self.body);
            self.body.clear();
        }
    }

    /// Adds an event that another batch had encoded and counted; the limits hold because they held there.
    fn append_encoded(&mut self, object: &[u8], span: Span) {
        self.next_event();
        let start = self.encoded_bytes();
        self.body.extend_from_slice(object);
        self.account(span.timestamp_ms, start, span.counted as usize);
        self.compress_some();
    }

    fn fits(&self, timestamp_ms: i64, counted: usize) -> bool {
        self.events.is_empty()
            || (self.events.len() < self.limits.events
                && self.counted + counted <= self.limits.counted
                && self.encoded_bytes() <= self.limits.encoded
                && self.last_ms.max(timestamp_ms).saturating_sub(self.first_ms.min(timestamp_ms)) <= self.max_span_ms)
    }

    fn account(&mut self, timestamp_ms: i64, start: usize, counted: usize) {
        if self.events.is_empty() {
            (self.first_ms, self.last_ms) = (timestamp_ms, timestamp_ms);
        } else {
            self.sorted &= timestamp_ms >= self.last_ms;
            self.first_ms = self.first_ms.min(timestamp_ms);
            self.last_ms = self.last_ms.max(timestamp_ms);
        }
        self.counted += counted;
        self.events.push(Span { timestamp_ms, start: narrow(start), end: narrow(self.encoded_bytes()), counted: narrow(counted) });
    }

    /// Closes what is there; `None` when there is nothing. The builder is empty afterwards.
    pub fn finish(&mut self) -> Option<LogBatch> {
        if self.events.is_empty() {
            return None;
        }
        let mut events = std::mem::take(&mut self.events);
        let mut body = std::mem::take(&mut self.body);
        let mut member = std::mem::take(&mut self.member);
        if !self.sorted {
            // All of it is needed at once: rare enough to begin again.
            if let Some(compressor) = &self.compressor {
                let whole = compressor.finish(std::mem::take(&mut member), &body);
                body = inflate(&whole);
            }
            body = self.in_time_order(&body, &mut events);
        }
        body.extend_from_slice(b"]}");
        let kept: Arc<[Span]> = events.as_slice().into();
        let body = if let Some(compressor) = &self.compressor {
            let gzip = compressor.finish(member, &body);
            // Both buffers serve the next batch, but not with room for a whole body or a huge event.
            body.clear();
            body.shrink_to(2 * Member::PART);
            events.clear();
            (self.body, self.events) = (body, events);
            Body::Gzip(gzip.into())
        } else {
            Body::Plain(body.into())
        };
        let (group, stream, entity) = (self.group.clone(), self.stream.clone(), self.entity.take());
        Some(LogBatch { group, stream, body, events: kept, counted: self.counted, emf: self.emf, entity })
    }

    /// The two streams of a container are written by two threads, so lines can be a little out of order; the service
    /// refuses a batch that is. Equal timestamps keep the order of the file.
    fn in_time_order(&self, body: &[u8], events: &mut [Span]) -> Vec<u8> {
        events.sort_by_key(|span| span.timestamp_ms);
        let mut sorted = Vec::with_capacity(body.len() + 2);
        sorted.extend_from_slice(&body[..self.head]);
        for (index, span) in events.iter_mut().enumerate() {
            if index > 0 {
                sorted.push(b',');
            }
            let start = sorted.len();
            sorted.extend_from_slice(&body[span.start as usize..span.end as usize]);
            *span = Span { start: narrow(start), end: narrow(sorted.len()), ..*span };
        }
        sorted
    }
}

/// Offsets in a body: one event is at most six times a mebibyte when escaped.
fn narrow(offset: usize) -> u32 {
    u32::try_from(offset).expect("a body is far below 4 GiB")
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
