//! What an event's message looks like: Fluent Bit's Kubernetes record, or the line itself.
//!
//! Fluent Bit's record is a JSON object in the order in which its filters add the members: `time`, `stream`, `_p`, `log`, the
//! merged body, `kubernetes`. Everything that is the same for all lines of a container is escaped once, when the container
//! is opened, so that a line costs its own bytes and a copy.

use serde::{Deserialize, Serialize};

use super::batch::MAX_MESSAGE_BYTES;
use super::cri::Header;
use super::enrich::Identity;
use super::join::Event;
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
    /// `,"kubernetes":{…}` and the closing brace, escaped for the body.
    tail: Vec<u8>,
    /// Its length unescaped.
    tail_len: usize,
    /// The record has `kubernetes`, which a merged body must not replace.
    has_kubernetes: bool,
}

/// What one call wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the message, unescaped; 0 if the layout has no message for it.
    pub message: usize,
    /// Bytes of the content that are in it; fewer than all when it had to be split.
    pub content: usize,
}

/// A record's text as it grows inside a body: everything in it is escaped once more than the record itself needs.
struct Text<'a> {
    out: &'a mut Vec<u8>,
    len: usize,
    first: bool,
}

impl Text<'_> {
    /// Text that needs no escape in a record, but may in the body.
    fn json(&mut self, text: &[u8]) {
        json::escape(self.out, text);
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
        let mut record = String::new();
        if let Some(identity) = identity {
            record.push_str(",\"kubernetes\":");
            record.push_str(&identity.to_json(options.labels, options.annotations));
        }
        record.push('}');
        let mut tail = Vec::new();
        json::escape(&mut tail, record.as_bytes());
        Self {
            layout: options.layout,
            merge: options.merge.clone(),
            keep_log: options.keep_log,
            tail,
            tail_len: record.len(),
            has_kubernetes: identity.is_some(),
        }
    }

    /// Appends the message of as much of the event's content as fits [`MAX_MESSAGE_BYTES`], escaped for a body. `from` is
    /// where in the content to begin; further parts of a split event repeat its other members.
    pub fn write(&self, event: &Event<'_>, from: usize, out: &mut Vec<u8>) -> Written {
        let content = &event.content[from..];
        if self.layout != Layout::FluentBit {
            let line = content.strip_suffix(b"\n").unwrap_or(content);
            let newline = content.len() - line.len();
            let fit = fitting(line, MAX_MESSAGE_BYTES, |byte| if byte >= 0x80 { 3 } else { 1 });
            json::escape(out, &line[..fit]);
            let message = json::valid_len(&line[..fit]);
            return Written { message, content: if fit == line.len() { fit + newline } else { fit } };
        }
        let room = MAX_MESSAGE_BYTES - self.tail_len - fixed_len(&event.header) - 16;
        let fit = fitting(content, room, worst_escaped);
        let whole = from == 0 && fit == content.len();
        let object = if whole && self.merge != Merge::Off { merge::object(content) } else { None };
        let mut text = Text { out, len: 0, first: true };
        text.json(b"{");
        match object {
            Some(object) => self.merged(event, content, &object, &mut text),
            None => {
                self.header(event, &mut text, &|_| false);
                self.log(&content[..fit], &mut text);
            }
        }
        let before_tail = text.len;
        // Only a body that has nothing but `kubernetes` leaves the record empty before it.
        let tail = if before_tail == 1 && self.has_kubernetes { &self.tail[1..] } else { &self.tail[..] };
        text.out.extend_from_slice(tail);
        text.len += self.tail_len - (self.tail.len() - tail.len());
        Written { message: text.len, content: fit }
    }

    fn header(&self, event: &Event<'_>, text: &mut Text<'_>, replaced: &dyn Fn(&[u8]) -> bool) {
        let (time, tag) = match event.header {
            Header::Cri { time, tag } => (Some(time), Some(tag)),
            Header::Docker { time } => (Some(time), None),
            Header::None => (None, None),
        };
        let mut member = |name: &str, escaped_name: &str, value: &[u8]| {
            if !replaced(name.as_bytes()) {
                text.comma();
                text.ready(escaped_name, name.len() + 4);
                text.string(value);
                text.quote();
            }
        };
        if let Some(time) = time {
            member("time", "\\\"time\\\":\\\"", time);
            member("stream", "\\\"stream\\\":\\\"", event.output.name().as_bytes());
        }
        if let Some(tag) = tag {
            member("_p", "\\\"_p\\\":\\\"", tag);
        }
    }

    fn log(&self, content: &[u8], text: &mut Text<'_>) {
        text.comma();
        text.ready("\\\"log\\\":\\\"", 7);
        text.string(content);
        text.quote();
    }

    fn merged(&self, event: &Event<'_>, content: &[u8], object: &merge::Object, text: &mut Text<'_>) {
        let fits = |text: &Text<'_>| object.text.len() * 2 + text.len + self.tail_len + 256 < MAX_MESSAGE_BYTES;
        match &self.merge {
            Merge::Under(key) => {
                self.header(event, text, &|_| false);
                let merged = !object.members.is_empty() && content.len() * 6 + key.len() * 6 < MAX_MESSAGE_BYTES / 2 && fits(text);
                if self.keep_log || !merged {
                    self.log(content, text);
                }
                if merged {
                    text.comma();
                    text.quote();
                    text.string(key.as_bytes());
                    text.ready("\\\":", 2);
                    self.object(content, object, text);
                }
            }
            Merge::Off | Merge::Top => {
                let kubernetes = |member: &merge::Member| self.has_kubernetes && *merge::key_text(content, &member.key) == *b"kubernetes";
                let names: Vec<_> = object.members.iter().map(|member| merge::key_text(content, &member.key)).collect();
                let replaced = |name: &[u8]| names.iter().any(|key| **key == *name);
                if content.len() * 6 >= MAX_MESSAGE_BYTES / 2 {
                    self.header(event, text, &|_| false);
                    return self.log(content, text);
                }
                self.header(event, text, &replaced);
                if self.keep_log && !replaced(b"log") {
                    self.log(content, text);
                }
                for member in object.members.iter().filter(|member| !kubernetes(member)) {
                    text.comma();
                    text.json(&content[member.key.start..member.key.end]);
                    text.json(b":");
                    text.json(&content[member.value.clone()]);
                }
            }
        }
    }

    fn object(&self, content: &[u8], object: &merge::Object, text: &mut Text<'_>) {
        if !object.repeated {
            return text.json(&content[object.text.clone()]);
        }
        text.json(b"{");
        for (index, member) in object.members.iter().enumerate() {
            if index > 0 {
                text.json(b",");
            }
            text.json(&content[member.key.clone()]);
            text.json(b":");
            text.json(&content[member.value.clone()]);
        }
        text.json(b"}");
    }
}

/// Upper bound of what the members before the content take in the message.
fn fixed_len(header: &Header<'_>) -> usize {
    let values = match header {
        Header::Cri { time, tag } => time.len() + tag.len(),
        Header::Docker { time } => time.len(),
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
