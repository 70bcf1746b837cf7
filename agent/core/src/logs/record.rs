//! What an event's message looks like: Fluent Bit's Kubernetes record, or the line itself.
//!
//! Fluent Bit's record is a JSON object in the order in which its filters add the members: `time`, `stream`, `_p`, `log`, the
//! merged body, `kubernetes`. Everything that is the same for all lines of a container is escaped once, when the container
//! is opened, so that a line costs its own bytes and a copy.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::batch::MAX_MESSAGE_BYTES;
use super::cri::Header;
use super::enrich::Identity;
use super::join::Event;
use super::parser::{Format, Parser};
use super::settings::{Oversize, TRUNCATED};
use super::{json, merge};

/// The layout of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Fluent Bit's, with the pod's metadata in each event.
    #[default]
    FluentBit,
    /// The line; the stream's name says which container and output it is from.
    Compact,
    /// The line, in Fluent Bit's streams (its `log_key log`).
    Raw,
}

/// What happens to a line that is a JSON object, in Fluent Bit's layout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Merge {
    /// It stays text (`Merge_Log Off`).
    #[default]
    Off,
    /// Its members become members of the record and replace those of the same name, but for `kubernetes`
    /// (`Merge_Log On`).
    Top,
    /// It becomes the value of this member (`Merge_Log_Key`).
    Under(String),
}

/// How Fluent Bit's record is filled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordOptions {
    /// The layout.
    pub layout: Layout,
    /// JSON lines.
    pub merge: Merge,
    /// `log` stays when its object was merged.
    pub keep_log: bool,
    /// The pod's labels.
    pub labels: bool,
    /// The pod's annotations.
    pub annotations: bool,
}

impl Default for RecordOptions {
    fn default() -> Self {
        Self { layout: Layout::FluentBit, merge: Merge::Off, keep_log: true, labels: false, annotations: false }
    }
}

/// Writes the messages of one container.
#[derive(Clone, Debug)]
pub struct RecordWriter {
    layout: Layout,
    merge: Merge,
    keep_log: bool,
    oversize: Oversize,
    /// Of standard output and error: the pod's own, instead of JSON.
    parsers: [Option<Parser>; 2],
    /// `,"kubernetes":{…}` and the closing brace, escaped for the body.
    tail: Vec<u8>,
    /// Its length unescaped.
    tail_len: usize,
    /// The record has `kubernetes`, which a merged body must not replace.
    has_kubernetes: bool,
}

/// What one call wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the message, unescaped; 0 if the layout has no message for it.
    pub message: usize,
    /// Bytes of the content that are in it; fewer than all when it had to be split.
    pub content: usize,
    /// The content's end was cut off.
    pub truncated: bool,
    /// The pod's parser does not match the line: it is sent as text.
    pub unparsed: bool,
}

/// A record's text as it grows inside a body: everything in it is escaped once more than the record itself needs.
struct Text<'a> {
    out: &'a mut Vec<u8>,
    len: usize,
    first: bool,
}

impl<'a> Text<'a> {
    /// A record's opening brace.
    fn begin(out: &'a mut Vec<u8>) -> Self {
        let mut text = Self { out, len: 0, first: true };
        text.ready("{", 1);
        text
    }

    /// Text that needs no escape in a record, but may in the body.
    fn json(&mut self, text: &str) {
        json::escape_text(self.out, text);
        self.len += text.len();
    }

    /// Text already escaped for the body.
    fn ready(&mut self, escaped: &str, len: usize) {
        self.out.extend_from_slice(escaped.as_bytes());
        self.len += len;
    }

    /// The inside of a string.
    fn string(&mut self, text: &[u8]) {
        self.len += json::escape_twice(self.out, text);
    }

    fn comma(&mut self) {
        if self.first {
            self.first = false;
        } else {
            self.out.push(b',');
            self.len += 1;
        }
    }

    fn quote(&mut self) {
        self.ready("\\\"", 1);
    }
}

impl RecordWriter {
    /// For a container of this identity.
    pub fn new(options: &RecordOptions, identity: Option<&Identity>) -> Self {
        Self::with_members(options, identity, &[])
    }

    /// With these members, names and texts, behind all others.
    pub fn with_members(options: &RecordOptions, identity: Option<&Identity>, members: &[(String, String)]) -> Self {
        let mut record = String::new();
        if let Some(identity) = identity {
            record.push_str(",\"kubernetes\":");
            record.push_str(&identity.to_json(options.labels, options.annotations));
        }
        for (name, value) in members {
            record.push_str(&format!(",{}:{}", Value::from(name.as_str()), Value::from(value.as_str())));
        }
        record.push('}');
        let mut tail = Vec::new();
        json::escape(&mut tail, record.as_bytes());
        Self {
            layout: options.layout,
            merge: options.merge.clone(),
            keep_log: options.keep_log,
            oversize: Oversize::Split,
            parsers: [None, None],
            tail,
            tail_len: record.len(),
            has_kubernetes: identity.is_some(),
        }
    }

    /// What becomes of an event that does not fit.
    #[must_use]
    pub fn oversize(self, oversize: Oversize) -> Self {
        Self { oversize, ..self }
    }

    /// With the parsers that the pod names for its standard output and error.
    #[must_use]
    pub fn parsing(self, parsers: [Option<Parser>; 2]) -> Self {
        Self { parsers, ..self }
    }

    /// Appends the message of as much of the event's content as fits [`MAX_MESSAGE_BYTES`], escaped for a body. `from` is
    /// where in the content to begin; further parts of a split event repeat its other members.
    pub fn write(&self, event: &Event<'_>, from: usize, out: &mut Vec<u8>) -> Written {
        let content = &event.content[from..];
        if self.layout != Layout::FluentBit {
            let line = content.strip_suffix(b"\n").unwrap_or(content);
            let newline = content.len() - line.len();
            let mark = if self.oversize == Oversize::Truncate { TRUNCATED.len() } else { 0 };
            let fit = fitting(line, MAX_MESSAGE_BYTES - mark, |byte| if byte >= 0x80 { 3 } else { 1 });
            let message = json::escape(out, &line[..fit]);
            if fit == line.len() {
                return Written { message, content: fit + newline, ..Written::default() };
            }
            if self.oversize == Oversize::Truncate {
                json::escape(out, TRUNCATED.as_bytes());
                return Written { message: message + TRUNCATED.len(), content: content.len(), truncated: true, unparsed: false };
            }
            return Written { message, content: fit, ..Written::default() };
        }
        let merges = from == 0 && self.merge != Merge::Off;
        let source = if merges { self.source(event, content) } else { None };
        let unparsed = merges && source.is_none();
        let start = out.len();
        let object = source.as_deref().and_then(|source| Some((source, merge::object(source)?)));
        // How long a record becomes is known once it is written: one that is too long is taken back.
        let merged = object.and_then(|(source, object)| self.merged(event, content, source, &object, &mut Text::begin(out)));
        if let Some(message) = merged {
            return Written { message, content: content.len(), truncated: false, unparsed };
        }
        out.truncate(start);
        let mark = if self.oversize == Oversize::Truncate { TRUNCATED.len() } else { 0 };
        let room = MAX_MESSAGE_BYTES - self.tail_len - fixed_len(&event.header) - 16 - mark;
        let fit = fitting(content, room, worst_escaped);
        let truncated = fit < content.len() && self.oversize == Oversize::Truncate;
        let mut text = Text::begin(out);
        self.header(event, &mut text, &|_| false);
        self.log(&content[..fit], if truncated { TRUNCATED } else { "" }, &mut text);
        let message = self.finish(&mut text);
        Written { message, content: if truncated { content.len() } else { fit }, truncated, unparsed }
    }

    /// What is the same for all records, and the end; the record's length.
    fn finish(&self, text: &mut Text<'_>) -> usize {
        // Only a body that has nothing but `kubernetes` leaves the record empty before it.
        let tail = if text.len == 1 && self.tail_len > 1 { &self.tail[1..] } else { &self.tail[..] };
        text.out.extend_from_slice(tail);
        text.len + self.tail_len - (self.tail.len() - tail.len())
    }

    /// The text whose members are merged: the line, or what the pod's parser made of it. Of a line whose output is not known no parser is.
    fn source<'a>(&self, event: &Event<'_>, content: &'a [u8]) -> Option<Cow<'a, str>> {
        match &self.parsers[event.output as usize] {
            Some(parser) if !matches!(parser.format, Format::Json) && !matches!(event.header, Header::None) => {
                parser.object(content).map(Cow::Owned)
            }
            _ => Some(String::from_utf8_lossy(content)),
        }
    }

    fn header(&self, event: &Event<'_>, text: &mut Text<'_>, replaced: &dyn Fn(&[u8]) -> bool) {
        let (time, tag, attrs) = match event.header {
            Header::Cri { time, tag } => (Some(time), Some(tag), ""),
            Header::Docker { time, attrs } => (Some(time).filter(|time| !time.is_empty()), None, attrs),
            Header::None => (None, None, ""),
        };
        let mut member = |name: &str, escaped_name: &str, value: &[u8]| {
            if !replaced(name.as_bytes()) {
                text.comma();
                text.ready(escaped_name, name.len() + 4);
                match value {
                    b"F" => text.ready("F", 1),
                    b"stdout" => text.ready("stdout", 6),
                    b"stderr" => text.ready("stderr", 6),
                    _ => text.string(value),
                }
                text.quote();
            }
        };
        if let Some(time) = time {
            member("time", "\\\"time\\\":\\\"", time);
        }
        if !matches!(event.header, Header::None) {
            member("stream", "\\\"stream\\\":\\\"", event.output.name().as_bytes());
        }
        if let Some(tag) = tag {
            member("_p", "\\\"_p\\\":\\\"", tag);
        }
        if !attrs.is_empty() && !replaced(b"attrs") {
            text.comma();
            text.json(attrs);
        }
    }

    fn log(&self, content: &[u8], mark: &str, text: &mut Text<'_>) {
        text.comma();
        text.ready("\\\"log\\\":\\\"", 7);
        text.string(content);
        text.ready(mark, mark.len());
        text.quote();
    }

    /// The record with the members of `object`, which is of `source`; its length. `None` if it is longer than an event may be.
    fn merged(&self, event: &Event<'_>, content: &[u8], source: &str, object: &merge::Object, text: &mut Text<'_>) -> Option<usize> {
        match &self.merge {
            Merge::Under(key) => {
                self.header(event, text, &|_| false);
                if self.keep_log {
                    self.log(content, "", text);
                }
                // An object without members is merged by leaving no trace of it.
                if !object.members.is_empty() {
                    text.comma();
                    text.quote();
                    text.string(key.as_bytes());
                    text.ready("\\\":", 2);
                    self.object(source, object, text);
                }
            }
            Merge::Off | Merge::Top => {
                let kubernetes = |member: &merge::Member| self.has_kubernetes && *merge::key_text(source, &member.key) == *"kubernetes";
                let names: Vec<_> = object.members.iter().map(|member| merge::key_text(source, &member.key)).collect();
                let replaced = |name: &[u8]| names.iter().any(|key| key.as_bytes() == name);
                self.header(event, text, &replaced);
                if self.keep_log && !replaced(b"log") {
                    self.log(content, "", text);
                }
                for member in object.members.iter().filter(|member| !kubernetes(member)) {
                    text.comma();
                    object.pieces(source, member.key.clone()).for_each(|piece| text.json(piece));
                    text.json(":");
                    object.pieces(source, member.value.clone()).for_each(|piece| text.json(piece));
                }
            }
        }
        Some(self.finish(text)).filter(|message| *message <= MAX_MESSAGE_BYTES)
    }

    fn object(&self, source: &str, object: &merge::Object, text: &mut Text<'_>) {
        if !object.repeated {
            return object.pieces(source, object.text.clone()).for_each(|piece| text.json(piece));
        }
        text.json("{");
        for (index, member) in object.members.iter().enumerate() {
            if index > 0 {
                text.json(",");
            }
            object.pieces(source, member.key.clone()).for_each(|piece| text.json(piece));
            text.json(":");
            object.pieces(source, member.value.clone()).for_each(|piece| text.json(piece));
        }
        text.json("}");
    }
}

/// Upper bound of what the members before the content take in the message.
fn fixed_len(header: &Header<'_>) -> usize {
    let values = match header {
        Header::Cri { time, tag } => time.len() + tag.len(),
        Header::Docker { time, attrs } => time.len() + attrs.len(),
        Header::None => 0,
    };
    values * 6 + 64
}

/// Most that a byte can take in the message once escaped and made UTF-8.
fn worst_escaped(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' => 2,
        0..0x20 => 6,
        0x80.. => 3,
        _ => 1,
    }
}

/// How many leading bytes of `content` take at most `room`, cut before a character; at least one character.
fn fitting(content: &[u8], room: usize, cost: impl Fn(u8) -> usize) -> usize {
    if content.len() * 6 <= room {
        return content.len();
    }
    let mut used = 0;
    let over = content.iter().position(|&byte| {
        used += cost(byte);
        used > room
    });
    let Some(mut cut) = over else { return content.len() };
    // Back out of a multi-byte character, unless the bytes are not UTF-8 at all.
    for back in 0..4 {
        if cut > back && content[cut - back] & 0xc0 != 0x80 {
            cut -= back;
            break;
        }
    }
    cut.max(1)
}

#[cfg(test)]
mod tests {
    use super::super::batch::BatchBuilder;
    use super::super::cri::Output;
    use super::super::join::Mark;
    use super::super::parser::built_in;
    use super::*;

    fn written(writer: &RecordWriter, content: &[u8]) -> Vec<String> {
        let marks = [Mark { generation: 0, offset: 0 }];
        let event = Event {
            header: Header::Cri { time: b"2026-11-20T10:00:01Z", tag: b"F" },
            output: Output::Stdout,
            timestamp_ms: 0,
            content,
            marks: &marks,
        };
        let mut builder = BatchBuilder::new("g".into(), "s".into(), false);
        let mut batches = Vec::new();
        let mut from = 0;
        loop {
            let mut part = Written::default();
            batches.extend(builder.push_with(0, |out| {
                part = writer.write(&event, from, out);
                part.message
            }));
            from += part.content;
            if from >= content.len() {
                break;
            }
        }
        batches.extend(builder.finish());
        batches.iter().flat_map(super::super::batch::LogBatch::events).map(|event| event.message).collect()
    }

    fn options(merge: Merge, keep_log: bool) -> RecordOptions {
        RecordOptions { merge, keep_log, ..RecordOptions::default() }
    }

    #[test]
    fn a_merged_object_without_members_leaves_no_trace() {
        for (merge, keep_log, expected) in [
            (Merge::Under("m".into()), true, r#"{"time":"2026-11-20T10:00:01Z","stream":"stdout","_p":"F","log":"{}"}"#),
            (Merge::Under("m".into()), false, r#"{"time":"2026-11-20T10:00:01Z","stream":"stdout","_p":"F"}"#),
            (Merge::Top, false, r#"{"time":"2026-11-20T10:00:01Z","stream":"stdout","_p":"F"}"#),
        ] {
            assert_eq!(written(&RecordWriter::new(&options(merge, keep_log), None), b"{}"), [expected]);
        }
    }

    #[test]
    fn the_pods_parser_takes_the_place_of_json() {
        let logfmt = built_in().into_iter().find(|parser| parser.name == "logfmt");
        let writer = RecordWriter::new(&options(Merge::Under("m".into()), false), None).parsing([logfmt, None]);
        let head = r#"{"time":"2026-11-20T10:00:01Z","stream":"stdout","_p":"F","#;
        assert_eq!(written(&writer, b"a=1 b=x"), [format!(r#"{head}"m":{{"a":"1","b":"x"}}}}"#)]);
        assert_eq!(written(&writer, b"plain"), [format!(r#"{head}"log":"plain"}}"#)]);
        assert_eq!(written(&writer, br#"{"j":1}"#), [format!(r#"{head}"log":"{{\"j\":1}}"}}"#)], "JSON is not tried then");
    }

    #[test]
    fn bytes_that_are_not_text_do_not_keep_an_object_from_being_merged() {
        for (merge, expected) in [
            (Merge::Top, "{\"time\":\"2026-11-20T10:00:01Z\",\"stream\":\"stdout\",\"_p\":\"F\",\"a\":\"x\u{fffd}y\"}"),
            (
                Merge::Under("m".into()),
                "{\"time\":\"2026-11-20T10:00:01Z\",\"stream\":\"stdout\",\"_p\":\"F\",\"m\":{\"a\":\"x\u{fffd}y\"}}",
            ),
        ] {
            assert_eq!(written(&RecordWriter::new(&options(merge, false), None), b"{\"a\":\"x\xffy\"} \xfe"), [expected]);
        }
    }

    /// A line that is an object of that many bytes, with something to escape in it.
    fn object_of(bytes: usize) -> String {
        let mut line = String::from(r#"{"level":"info","quoted":"a\"b\\\\n","n":7,"text":""#);
        line.push_str(&"x".repeat(bytes - line.len() - 2));
        line.push_str("\"}");
        line
    }

    #[test]
    fn an_object_of_any_size_is_merged_as_long_as_its_record_fits() {
        let identity = Identity::default();
        for merge in [Merge::Under("m".into()), Merge::Top] {
            for keep_log in [true, false] {
                let writer = RecordWriter::new(&options(merge.clone(), keep_log), Some(&identity));
                for bytes in [200, 40_000, 45_000, 100_000, 175_000, 500_000] {
                    let line = object_of(bytes);
                    let record: Value = serde_json::from_str(&written(&writer, line.as_bytes())[0]).unwrap();
                    let object: Value = serde_json::from_str(&line).unwrap();
                    let found = if merge == Merge::Top { &record["text"] } else { &record["m"]["text"] };
                    assert_eq!(*found, object["text"], "{merge:?} {keep_log} {bytes}");
                    assert_eq!(record.get("log").and_then(Value::as_str), keep_log.then_some(line.as_str()), "{merge:?} {bytes}");
                }
            }
        }
    }

    #[test]
    fn an_object_whose_record_is_over_the_limit_stays_text() {
        let whole = |writer: &RecordWriter, bytes: usize| {
            let messages = written(writer, object_of(bytes).as_bytes());
            assert!(messages.iter().all(|message| message.len() <= MAX_MESSAGE_BYTES));
            let records = messages.iter().map(|message| serde_json::from_str::<Value>(message).unwrap());
            records.map(|record| record.get("log").and_then(Value::as_str).unwrap_or_default().to_owned()).collect::<Vec<_>>()
        };
        for merge in [Merge::Under("m".into()), Merge::Top] {
            // The line twice, then once.
            for (keep_log, fits) in [(true, MAX_MESSAGE_BYTES / 2 - 300), (false, MAX_MESSAGE_BYTES - 300)] {
                let writer = RecordWriter::new(&options(merge.clone(), keep_log), None);
                let kept = if keep_log { object_of(fits) } else { String::new() };
                assert_eq!(whole(&writer, fits), [kept], "{merge:?} {keep_log}");
                let over = whole(&writer, fits + 600);
                assert_eq!(over.concat(), object_of(fits + 600), "{merge:?} {keep_log}");
            }
        }
    }

    #[test]
    fn what_dockers_options_add_is_in_the_record() {
        let line = br#"{"log":"{\"b\":1}\n","stream":"stderr","attrs":{"tag":"x\"y"}}"#;
        let line = super::super::cri::Line::parse(line);
        let event = Event { header: line.header, output: line.output, timestamp_ms: 0, content: &line.content, marks: &[] };
        let mut out = Vec::new();
        let writer = RecordWriter::new(&options(Merge::Top, false), None);
        let written = writer.write(&event, 0, &mut out);
        let message: String = serde_json::from_str(&format!("\"{}\"", String::from_utf8(out).unwrap())).unwrap();
        assert_eq!((message.as_str(), written.message), (r#"{"stream":"stderr","attrs":{"tag":"x\"y"},"b":1}"#, message.len()));
    }

    #[test]
    fn members_of_the_node_come_last() {
        let node = [("az".to_owned(), "eu-west-1a".to_owned()), ("q\"".to_owned(), "\\".to_owned())];
        let writer = RecordWriter::with_members(&RecordOptions::default(), None, &node);
        assert_eq!(
            written(&writer, b"{}"),
            [r#"{"time":"2026-11-20T10:00:01Z","stream":"stdout","_p":"F","log":"{}","az":"eu-west-1a","q\"":"\\"}"#]
        );
    }

    #[test]
    fn large_events_are_split_or_truncated_as_set() {
        let content = "\u{e9}".repeat(MAX_MESSAGE_BYTES);
        for layout in [Layout::FluentBit, Layout::Raw] {
            let options = RecordOptions { layout, ..RecordOptions::default() };
            let split = written(&RecordWriter::new(&options, None), content.as_bytes());
            assert!(split.len() > 2);
            assert_eq!(split.iter().map(|text| text.matches('\u{e9}').count()).sum::<usize>(), MAX_MESSAGE_BYTES);
            let cut = written(&RecordWriter::new(&options, None).oversize(Oversize::Truncate), content.as_bytes());
            assert_eq!(cut.len(), 1);
            assert!(cut[0].len() <= MAX_MESSAGE_BYTES && cut[0].contains(TRUNCATED), "{}", cut[0].len());
            assert_eq!(written(&RecordWriter::new(&options, None).oversize(Oversize::Truncate), b"short").len(), 1);
        }
    }
}
