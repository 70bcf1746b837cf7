//! One container's log: its generations, its open lines, its streams.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use stanchion_core::logs::cri::{Header, Line, Output};
use stanchion_core::logs::enrich::Identity;
use stanchion_core::logs::join::{Event, Joiner, Mark};
use stanchion_core::logs::ledger::Ledger;
use stanchion_core::logs::names::ContainerRef;
use stanchion_core::logs::positions::{Fingerprint, Position};
use stanchion_core::logs::record::RecordWriter;
use stanchion_core::logs::settings::LogSettings;
use tracing::warn;

use super::counters::LogCounters;
use super::discover::Unread;
use super::source::Source;
use super::streams::{StreamId, Streams};

/// Numbers from one file of a container to its next: room for the truncations of each.
const NUMBERS: u32 = 1 << 12;

/// Bytes that wait to be acknowledged. While a file grows it is never without any: how long they wait is told by those that were there at
/// one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behind {
    pub(super) since_ms: i64,
    /// Where the bytes ended that were there then.
    until: u64,
}

impl Behind {
    /// From now on, unless some wait already.
    pub(super) fn since(before: Option<Self>, until: u64, now_ms: i64) -> Self {
        before.unwrap_or(Self { since_ms: now_ms, until })
    }

    /// What waits after everything before `safe` was acknowledged, of what was read up to `offset`.
    pub(super) fn after(before: Option<Self>, safe: u64, offset: u64, now_ms: i64) -> Option<Self> {
        before.filter(|behind| safe < behind.until).or((safe < offset).then_some(Self { since_ms: now_ms, until: offset }))
    }

    pub(super) fn seconds(self, now_ms: i64) -> u64 {
        u64::try_from((now_ms - self.since_ms) / 1000).unwrap_or(0)
    }
}

/// A file that is, or was, the container's log.
pub(super) struct Generation {
    pub(super) number: u32,
    pub(super) source: Source,
    pub(super) dev: u64,
    pub(super) inode: u64,
    pub(super) fingerprint: Fingerprint,
    /// First byte that was not read yet.
    pub(super) offset: u64,
    /// When last looked at, as the time of its last change, in nanoseconds since 1970.
    pub(super) size: u64,
    pub(super) modified_ns: i128,
    pub(super) ledger: Ledger,
    /// Since when it is not the live file, in monotonic milliseconds.
    pub(super) rotated_ms: Option<i64>,
    /// Nothing more will be read from it.
    pub(super) finished: bool,
    /// It ended because the file was truncated: its bytes are gone.
    pub(super) truncated: bool,
    /// In the middle of a line longer than a block: its output, and whether it goes on after its newline.
    pub(super) long_line: Option<(Output, bool)>,
    /// Bytes are unacknowledged.
    pub(super) behind: Option<Behind>,
    pub(super) last_error: Option<String>,
}

impl Generation {
    pub(super) fn new(number: u32, source: Source, offset: u64) -> io::Result<Self> {
        let (dev, inode) = source.identity()?;
        let fingerprint = source.fingerprint()?;
        let size = source.size()?;
        Ok(Self {
            number,
            source,
            dev,
            inode,
            fingerprint,
            offset,
            size,
            modified_ns: 0,
            ledger: Ledger::starting_at(offset),
            rotated_ms: None,
            finished: false,
            truncated: false,
            long_line: None,
            behind: None,
            last_error: None,
        })
    }

    /// How far it is acknowledged, under the path that the container's log has.
    pub(super) fn position(&self, live: &Path) -> Position {
        Position {
            path: live.to_string_lossy().into_owned(),
            dev: self.dev,
            inode: self.inode,
            fingerprint: self.fingerprint,
            offset: self.ledger.safe(),
        }
    }

    /// Everything in it is acknowledged and nothing more comes.
    pub(super) fn is_done(&self) -> bool {
        self.finished && self.ledger.safe() >= self.offset
    }
}

/// One container.
pub(super) struct Container {
    pub(super) id: u64,
    /// The file that the runtime writes, symlinks resolved.
    pub(super) live: PathBuf,
    /// The name under /var/log/containers.
    pub(super) file_name: String,
    /// What the names say; `None` for a file that is no container's.
    pub(super) names: Option<ContainerRef>,
    pub(super) identity: Option<Identity>,
    pub(super) writer: RecordWriter,
    /// Streams of standard output and error; `None` when excluded.
    pub(super) streams: [Option<StreamId>; 2],
    pub(super) joiner: Joiner,
    /// Oldest first; the last is live unless it is rotated.
    pub(super) generations: VecDeque<Generation>,
    pub(super) next_generation: u32,
    /// Suffixes of rotated siblings that were seen: a new one is a rotation that happened between two looks.
    pub(super) known_rotated: BTreeSet<String>,
    /// The newest generation that is done: after a restart everything up to it is known to be done too.
    pub(super) retired: Option<(u32, Position)>,
    /// The live path is gone, since when.
    pub(super) gone_ms: Option<i64>,
    /// Lines wait until then for the pod's metadata, if the pod is not known yet.
    pub(super) wait_until_ms: i64,
    /// When it is looked at next, as in the tailer's list; `None` while it waits for an acknowledgement.
    pub(super) due: Option<(i64, u64)>,
    /// Since when nothing was read.
    pub(super) quiet_ms: i64,
    /// An event of its directory wakes it: it need not be looked at.
    pub(super) watched: bool,
    /// Bytes of its lines that are not complete, as counted in the tailer's sum.
    pub(super) open_bytes: usize,
    /// A file of the node itself, by which entry of the settings.
    pub(super) host: Option<usize>,
    /// Rotated files that could not be opened, and why.
    pub(super) unopened: Vec<(PathBuf, String)>,
}

/// What reading needs besides the container.
pub(super) struct Context<'a> {
    pub(super) settings: &'a LogSettings,
    pub(super) streams: &'a mut Streams,
    pub(super) counters: &'a mut LogCounters,
    pub(super) now_ms: i64,
    pub(super) wall_ms: i64,
}

impl Context<'_> {
    /// The time to send for an event of this one, in milliseconds since 1970; `None`, counted, for one that is too old to be taken.
    pub(super) fn time(&mut self, timestamp_ms: i64) -> Option<i64> {
        let Some(window) = self.settings.age else { return Some(timestamp_ms) };
        let age_ms = self.wall_ms.saturating_sub(timestamp_ms);
        if age_ms > i64::try_from(window.past.as_millis()).unwrap_or(i64::MAX) {
            self.counters.dropped_too_old += 1;
            return None;
        }
        if age_ms < -i64::try_from(window.future.as_millis()).unwrap_or(i64::MAX) {
            self.counters.clamped_too_new += 1;
            return Some(self.wall_ms);
        }
        Some(timestamp_ms)
    }

    /// The text without what must not leave the node; `None` where there is no such thing in it.
    pub(super) fn masked(&mut self, content: &[u8]) -> Option<String> {
        let masked = redact(&self.settings.redactions, content);
        self.counters.redacted += u64::from(masked.is_some());
        masked
    }
}

impl Container {
    /// Goes on without rotated files that cannot be opened, and says so; how many.
    pub(super) fn pass_over(&mut self, unread: Unread) -> u64 {
        let count = unread.len() as u64;
        for (path, error) in unread {
            warn!(path = %path.display(), %error, "a rotated file cannot be opened: lines of it that were not read before are lost");
            self.unopened.push((path, error.to_string()));
        }
        count
    }

    /// Takes the block that begins at the generation's offset; returns how many bytes of it were used. A line that the block
    /// cuts off is left for the next read, unless it fills the whole block: then it is taken in pieces.
    pub(super) fn take_block(&mut self, index: usize, block: &[u8], full: bool, context: &mut Context<'_>) -> usize {
        let mut lines =
            Lines { container: self.id, writer: &self.writer, outputs: self.streams, generations: &mut self.generations, context };
        let (number, base) = (lines.generations[index].number, lines.generations[index].offset);
        let joiner = &mut self.joiner;
        let mut at = 0;
        let mark = |at: usize| Mark { generation: number, offset: base + at as u64 };
        for newline in memchr::memchr_iter(b'\n', block) {
            let bytes = &block[at..newline];
            let long = lines.generations[index].long_line.take();
            let bytes = if long.is_some() { Some(bytes) } else { Line::trim(bytes) };
            if let Some(bytes) = bytes {
                lines.context.counters.lines_read += 1;
                lines.take(joiner, bytes, long, mark(at));
            }
            at = newline + 1;
        }
        if at == 0 && full && !block.is_empty() {
            let long = lines.generations[index].long_line.take();
            let next = long.or_else(|| {
                let line = Line::parse(block);
                matches!(line.header, Header::Cri { .. }).then_some((line.output, line.partial))
            });
            lines.take_cut(joiner, block, long, mark(0));
            // A line of no runtime ends with its newline.
            lines.generations[index].long_line = next.or(Some((Output::Stdout, false)));
            at = block.len();
        }
        lines.context.counters.bytes_read += at as u64;
        self.generations[index].offset += at as u64;
        self.settle_resume();
        at
    }

    /// Takes the rest of a file that ends without a newline.
    pub(super) fn take_tail(&mut self, index: usize, bytes: &[u8], context: &mut Context<'_>) {
        let mut with_end = bytes.to_vec();
        with_end.push(b'\n');
        self.take_block(index, &with_end, false, context);
        self.generations[index].offset -= 1;
        context.counters.bytes_read -= 1;
        self.settle_resume();
    }

    /// Closes what is long and open, because there is no memory for it.
    pub(super) fn relieve(&mut self, share: usize, context: &mut Context<'_>) {
        let mut lines =
            Lines { container: self.id, writer: &self.writer, outputs: self.streams, generations: &mut self.generations, context };
        let now_ms = lines.context.now_ms;
        let cuts = self.joiner.relieve(share, now_ms, &mut |event| lines.emit(event));
        context.counters.cut_for_memory += cuts;
        self.settle_resume();
    }

    /// Closes what waited too long, or everything.
    pub(super) fn expire(&mut self, all: bool, context: &mut Context<'_>) {
        let mut lines =
            Lines { container: self.id, writer: &self.writer, outputs: self.streams, generations: &mut self.generations, context };
        let now_ms = lines.context.now_ms;
        if all {
            self.joiner.flush(now_ms, &mut |event| lines.emit(event));
        } else {
            self.joiner.expire(now_ms, &mut |event| lines.emit(event));
        }
        self.settle_resume();
    }

    /// Tells each generation's ledger where reading would begin again.
    fn settle_resume(&mut self) {
        for generation in &mut self.generations {
            generation.ledger.resume_at(self.joiner.resume(generation.number, generation.offset));
        }
    }

    /// Some of its files have bytes that were not read.
    pub(super) fn has_unread(&self) -> bool {
        let unread = |generation: &Generation| generation.source.size().is_ok_and(|size| size > generation.offset);
        self.generations.iter().any(|generation| !generation.finished && unread(generation))
    }

    pub(super) fn generation_mut(&mut self, number: u32) -> Option<&mut Generation> {
        self.generations.iter_mut().find(|generation| generation.number == number)
    }

    /// Appends a generation that is newer than all others.
    pub(super) fn push_generation(&mut self, source: Source, offset: u64, rotated_ms: Option<i64>) -> io::Result<()> {
        let mut generation = Generation::new(self.next_generation, source, offset)?;
        generation.rotated_ms = rotated_ms;
        self.next_generation += NUMBERS;
        self.generations.push_back(generation);
        Ok(())
    }

    /// Puts what is written to a truncated file after what it held before, but before any newer file.
    pub(super) fn push_again(&mut self, index: usize, source: Source, rotated_ms: Option<i64>) -> io::Result<()> {
        let number = self.generations[index].number + 1;
        if number.is_multiple_of(NUMBERS) {
            return self.push_generation(source, 0, rotated_ms);
        }
        let mut generation = Generation::new(number, source, 0)?;
        generation.rotated_ms = rotated_ms;
        self.generations.insert(index + 1, generation);
        Ok(())
    }
}

/// Lines on their way to the streams of their container.
struct Lines<'a, 'b> {
    container: u64,
    writer: &'a RecordWriter,
    outputs: [Option<StreamId>; 2],
    generations: &'a mut VecDeque<Generation>,
    context: &'a mut Context<'b>,
}

impl Lines<'_, '_> {
    /// A line up to its newline; `long` if it is the last piece of one that was taken in pieces.
    fn take(&mut self, joiner: &mut Joiner, bytes: &[u8], long: Option<(Output, bool)>, mark: Mark) {
        let line = match long {
            Some((output, partial)) => rest_of_line(bytes, output, partial),
            None => Line::parse(bytes),
        };
        self.give(joiner, line, mark);
    }

    /// A piece of a line that has no newline in sight.
    fn take_cut(&mut self, joiner: &mut Joiner, bytes: &[u8], long: Option<(Output, bool)>, mark: Mark) {
        let line = match long {
            Some((output, _)) => rest_of_line(bytes, output, true),
            None => Line { partial: true, ..Line::parse(bytes) },
        };
        self.give(joiner, line, mark);
    }

    fn give(&mut self, joiner: &mut Joiner, mut line: Line<'_>, mark: Mark) {
        line.timestamp_ms.get_or_insert(self.context.wall_ms);
        let now_ms = self.context.now_ms;
        joiner.line(&line, mark, now_ms, &mut |event| self.emit(event));
    }

    fn emit(&mut self, event: Event<'_>) {
        // Which output a line without a header is from is not known: it is left out where both are.
        let other = if matches!(event.header, Header::None) { self.outputs[1] } else { None };
        let Some(stream) = self.outputs[event.output as usize].or(other) else {
            self.context.counters.excluded += 1;
            return;
        };
        let mut event = event;
        let Some(timestamp_ms) = self.context.time(event.timestamp_ms) else { return };
        event.timestamp_ms = timestamp_ms;
        let masked = self.context.masked(event.content);
        if let Some(masked) = &masked {
            event.content = masked.as_bytes();
        }
        let Self { container, writer, generations, context, .. } = self;
        let (parts, written) = context.streams.push(stream, &event, writer, *container, context.now_ms, &mut |batch, mark| {
            if let Some(generation) = generations.iter_mut().rev().find(|generation| generation.number == mark.generation) {
                generation.ledger.pin(batch, mark.offset);
            }
        });
        context.counters.dropped_empty += u64::from(parts == 0);
        context.counters.truncated_events += u64::from(written.truncated);
        context.counters.unparsed += u64::from(written.unparsed);
    }
}

/// A later piece of a line: what is kept of its first piece says the rest.
fn rest_of_line(bytes: &[u8], output: Output, partial: bool) -> Line<'_> {
    Line { header: Header::Cri { time: b"", tag: b"" }, output, timestamp_ms: None, partial, content: bytes.into() }
}

fn redact(rules: &[stanchion_core::logs::settings::Redaction], content: &[u8]) -> Option<String> {
    let mut current: Option<String> = None;
    for rule in rules {
        let text = current.as_deref().map_or_else(|| String::from_utf8_lossy(content), Into::into);
        if rule.pattern.is_match(&text) {
            current = Some(rule.pattern.replace_all(&text, rule.replacement.as_str()).into_owned());
        }
    }
    current
}
