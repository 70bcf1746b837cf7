//! From lines to events: parts of a split line are joined, then lines of a stack trace.
//!
//! Both keep what is open for each output of the container, not of the file: parts may stand on both sides of a rotation.
//! A complete line with nothing open passes through without a copy.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cri::{Header, Line, Output};
use super::multiline::{Rule, State};
use super::settings::Redaction;

/// Where a line begins: a generation of the container's log file and the offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Counts the container's files in the order they were written.
    pub generation: u32,
    /// Bytes from the file's start.
    pub offset: u64,
}

/// First bytes of an event, one for each generation it has bytes in.
pub type Marks = SmallVec<[Mark; 1]>;

/// A complete event.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// Of its first line.
    pub header: Header<'a>,
    /// Which output.
    pub output: Output,
    /// Milliseconds since 1970: of its first line, or of its reading where that has none.
    pub timestamp_ms: i64,
    /// Joined bytes.
    pub content: &'a [u8],
    /// Where its bytes begin.
    pub marks: &'a [Mark],
}

/// Bounds of what is kept open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// An event is closed when it has this many bytes; the rest becomes further events.
    pub bytes: usize,
    /// An open group of lines is closed when nothing came for this long; in milliseconds.
    pub group_ms: i64,
    /// An open partial line is closed when nothing came for this long; in milliseconds. A writer may pause in the middle of a line,
    /// so this is longer.
    pub partial_ms: i64,
}

/// What of a line that has to be cut is held back while there are redactions: a match that begins in it may go on in the rest. Longer
/// matches are still masked as far as they are known.
const HELD_BACK: usize = 4096;
/// What a buffer may keep for the next line.
const KEPT: usize = 64 << 10;

impl Default for Bounds {
    fn default() -> Self {
        Self { bytes: 1 << 20, group_ms: 2000, partial_ms: 60_000 }
    }
}

/// Joins the lines of one container.
#[derive(Debug)]
pub struct Joiner {
    rules: Arc<[Rule]>,
    redactions: Arc<[Redaction]>,
    bounds: Bounds,
    outputs: [OutputState; 2],
}

#[derive(Debug, Default)]
struct OutputState {
    partial: Open,
    group: Open,
    memory: Memory,
}

/// What the rules remember of one output.
#[derive(Debug, Default)]
struct Memory {
    /// The rule whose group is open.
    open: Option<usize>,
    /// The rule that took the latest line of a group; asked first.
    latest: usize,
    /// Where each rule stands. It outlives its group, so that the rest of a trace that another line interrupts is one event too, as with
    /// Fluent Bit.
    states: SmallVec<[Option<State>; 4]>,
}

/// An event that is not complete; `marks` is empty when there is none. The buffers are kept for the next.
#[derive(Debug, Default)]
struct Open {
    marks: Marks,
    kind: Kind,
    time: Vec<u8>,
    tag: Vec<u8>,
    attrs: String,
    timestamp_ms: i64,
    content: Vec<u8>,
    touched_ms: i64,
    /// Everything so far is one match of a redaction: the rest of the line may belong to it, and is left out.
    withheld: bool,
}

#[derive(Clone, Copy, Debug, Default)]
enum Kind {
    #[default]
    None,
    Cri,
    Docker,
}

impl Open {
    fn is_open(&self) -> bool {
        !self.marks.is_empty()
    }

    /// What is kept in a closed buffer is nothing any more.
    fn open_bytes(&self) -> usize {
        if self.is_open() { self.content.len() } else { 0 }
    }

    fn begin(&mut self, event: &Event<'_>, now_ms: i64) {
        self.content.clear();
        // The rest of a line that the reader had to cut has no header of its own: what is kept of its beginning stands.
        if matches!(event.header, Header::Cri { time: b"", .. }) {
            return self.add(event, now_ms);
        }
        self.time.clear();
        self.tag.clear();
        self.attrs.clear();
        self.kind = match event.header {
            Header::Cri { time, tag } => {
                self.time.extend_from_slice(time);
                self.tag.extend_from_slice(tag);
                Kind::Cri
            }
            Header::Docker { time, attrs } => {
                self.time.extend_from_slice(time);
                self.attrs.push_str(attrs);
                Kind::Docker
            }
            Header::None => Kind::None,
        };
        self.timestamp_ms = event.timestamp_ms;
        self.add(event, now_ms);
    }

    fn add(&mut self, event: &Event<'_>, now_ms: i64) {
        if !self.withheld {
            self.content.extend_from_slice(event.content);
        }
        for mark in event.marks {
            if !self.marks.iter().any(|known| known.generation == mark.generation) {
                self.marks.push(*mark);
            }
        }
        self.touched_ms = now_ms;
    }

    /// One more line of a group. An empty one is a line end by itself, as with Fluent Bit.
    fn add_line(&mut self, event: &Event<'_>, now_ms: i64) {
        if !self.content.is_empty() && !self.content.ends_with(b"\n") {
            self.content.push(b'\n');
        }
        self.add(event, now_ms);
        if event.content.is_empty() {
            self.content.push(b'\n');
        }
    }

    fn event(&self, output: Output) -> Event<'_> {
        let header = match self.kind {
            Kind::Cri => Header::Cri { time: &self.time, tag: &self.tag },
            Kind::Docker => Header::Docker { time: &self.time, attrs: &self.attrs },
            Kind::None => Header::None,
        };
        Event { header, output, timestamp_ms: self.timestamp_ms, content: &self.content, marks: &self.marks }
    }

    /// How much of the content can go out before the rest is known, so that no match is torn. 0 where all of it is one.
    fn cut(&mut self, redactions: &[Redaction]) -> usize {
        if redactions.is_empty() {
            return self.content.len();
        }
        if let std::borrow::Cow::Owned(valid) = String::from_utf8_lossy(&self.content) {
            self.content = valid.into_bytes();
        }
        let text = std::str::from_utf8(&self.content).unwrap_or_default();
        let mut cut = text.floor_char_boundary(text.len().saturating_sub(HELD_BACK));
        // A rule later in the list may have a match across the place that an earlier one moved the cut to.
        for _ in 0..=redactions.len() {
            let before = cut;
            for rule in redactions {
                let torn = rule.pattern.find_iter(text).take_while(|found| found.start() < cut).find(|found| found.end() > cut);
                cut = torn.map_or(cut, |found| found.start());
            }
            if cut == before {
                break;
            }
        }
        cut
    }

    fn close(&mut self) {
        self.withheld = false;
        self.marks.clear();
        // A rare giant must not stay allocated for the life of the container.
        self.content.shrink_to(KEPT);
    }
}

impl Joiner {
    /// For a container whose lines may form groups by `rules`, the first match first.
    pub fn new(rules: Arc<[Rule]>, bounds: Bounds) -> Self {
        Self { rules, redactions: [].into(), bounds, outputs: Default::default() }
    }

    /// Lines that have to be cut are not cut in the middle of what these match.
    #[must_use]
    pub fn sparing(mut self, redactions: Arc<[Redaction]>) -> Self {
        self.redactions = redactions;
        self
    }

    /// Bytes of what is open.
    pub fn open_bytes(&self) -> usize {
        self.outputs.iter().map(|state| state.partial.open_bytes() + state.group.open_bytes()).sum()
    }

    /// Memory runs out: what is open and longer than `share` bytes becomes events, as it is. Returns how many.
    pub fn relieve(&mut self, share: usize, now_ms: i64, emit: &mut impl FnMut(Event<'_>)) -> u64 {
        let mut cuts = 0;
        for (output, state) in [Output::Stdout, Output::Stderr].into_iter().zip(&mut self.outputs) {
            let OutputState { partial, group, memory } = state;
            let mut grouper = Grouper { rules: &self.rules, bounds: self.bounds, group, memory, now_ms };
            if partial.open_bytes() > share {
                grouper.take_part(partial, output, &self.redactions, emit);
                cuts += 1;
            }
            if grouper.group.open_bytes() > share {
                grouper.close(output, emit);
                cuts += 1;
            }
        }
        cuts
    }

    /// Takes a line that begins at `mark`; events that are complete go to `emit`.
    pub fn line(&mut self, line: &Line<'_>, mark: Mark, now_ms: i64, emit: &mut impl FnMut(Event<'_>)) {
        let event = Event {
            header: line.header,
            output: line.output,
            timestamp_ms: line.timestamp_ms.unwrap_or(now_ms),
            content: &line.content,
            marks: &[mark],
        };
        // Where something is masked the rest of an open line has to stay with its beginning.
        if matches!(line.header, Header::None) && self.redactions.is_empty() {
            self.close_partials(now_ms, emit);
        }
        let OutputState { partial, group, memory } = &mut self.outputs[line.output as usize];
        let mut grouper = Grouper { rules: &self.rules, bounds: self.bounds, group, memory, now_ms };
        let joins = matches!(event.header, Header::Cri { .. } | Header::Docker { .. });
        // The end of a line that the reader had to cut: its header is what is kept of its beginning.
        let ends = matches!(event.header, Header::Cri { time: b"", .. });
        if !partial.is_open() || !joins {
            if !line.partial && !ends {
                return grouper.take(event, emit);
            }
            if partial.is_open() {
                // A line of no runtime that is longer than what is read at once, after parts that never end.
                grouper.take(partial.event(line.output), emit);
                partial.close();
            }
            partial.begin(&event, now_ms);
        } else {
            partial.add(&event, now_ms);
        }
        if !line.partial {
            grouper.take(partial.event(line.output), emit);
            partial.close();
        } else if partial.content.len() >= self.bounds.bytes {
            grouper.take_part(partial, line.output, &self.redactions, emit);
        }
    }

    /// A line of no runtime's form: what was open before it stays without its end, as with Fluent Bit.
    fn close_partials(&mut self, now_ms: i64, emit: &mut impl FnMut(Event<'_>)) {
        for (output, state) in [Output::Stdout, Output::Stderr].into_iter().zip(&mut self.outputs) {
            let OutputState { partial, group, memory } = state;
            // A line of no form that is being read in pieces is not parted from its rest.
            if partial.is_open() && !matches!(partial.kind, Kind::None) {
                Grouper { rules: &self.rules, bounds: self.bounds, group, memory, now_ms }.take(partial.event(output), emit);
                partial.close();
            }
        }
    }

    /// Closes what has waited longer than the bounds say.
    pub fn expire(&mut self, now_ms: i64, emit: &mut impl FnMut(Event<'_>)) {
        self.close_if(now_ms, emit, |open, wait_ms| now_ms.saturating_sub(open.touched_ms) >= wait_ms);
    }

    /// Closes everything: no more lines come.
    pub fn flush(&mut self, now_ms: i64, emit: &mut impl FnMut(Event<'_>)) {
        self.close_if(now_ms, emit, |_, _| true);
    }

    fn close_if(&mut self, now_ms: i64, emit: &mut impl FnMut(Event<'_>), due: impl Fn(&Open, i64) -> bool) {
        for (output, state) in [Output::Stdout, Output::Stderr].into_iter().zip(&mut self.outputs) {
            let OutputState { partial, group, memory } = state;
            if partial.is_open() && due(partial, self.bounds.partial_ms) {
                Grouper { rules: &self.rules, bounds: self.bounds, group, memory, now_ms }.take(partial.event(output), emit);
                partial.close();
            }
            if group.is_open() && due(group, self.bounds.group_ms) {
                Grouper { rules: &self.rules, bounds: self.bounds, group, memory, now_ms }.close(output, emit);
            }
        }
    }

    /// Where reading of the generation would have to begin again so that nothing open is lost; `at` if nothing is open.
    pub fn resume(&self, generation: u32, at: u64) -> u64 {
        let open = self.outputs.iter().flat_map(|state| state.partial.marks.iter().chain(&state.group.marks));
        open.filter(|mark| mark.generation == generation).map(|mark| mark.offset).min().unwrap_or(at)
    }

    /// Something is open: [`Self::expire`] has work later.
    pub fn is_open(&self) -> bool {
        self.outputs.iter().any(|state| state.partial.is_open() || state.group.is_open())
    }
}

/// The second stage, for one output.
struct Grouper<'a> {
    rules: &'a [Rule],
    bounds: Bounds,
    group: &'a mut Open,
    memory: &'a mut Memory,
    now_ms: i64,
}

impl Grouper<'_> {
    /// As much of an open line as can go out; the rest stays open.
    fn take_part(&mut self, partial: &mut Open, output: Output, redactions: &[Redaction], emit: &mut impl FnMut(Event<'_>)) {
        let cut = partial.cut(redactions);
        let whole = cut == 0 || cut == partial.content.len();
        if whole {
            self.take(partial.event(output), emit);
            if redactions.is_empty() {
                return partial.close();
            }
            partial.content.clear();
            partial.withheld = true;
            return;
        }
        let event = partial.event(output);
        self.take(Event { content: &event.content[..cut], ..event }, emit);
        partial.content.drain(..cut);
        partial.content.shrink_to(partial.content.len() + KEPT);
    }

    fn take(&mut self, event: Event<'_>, emit: &mut impl FnMut(Event<'_>)) {
        if self.rules.is_empty() {
            return emit(event);
        }
        let line = event.content.strip_suffix(b"\n").unwrap_or(event.content);
        match self.step(line) {
            Some((index, state, goes_on)) => {
                let room = self.group.content.len() + event.content.len() < self.bounds.bytes;
                if goes_on && room && self.memory.open == Some(index) {
                    self.group.add_line(&event, self.now_ms);
                } else {
                    self.close(event.output, emit);
                    self.group.begin(&event, self.now_ms);
                    if goes_on && line.is_empty() {
                        self.group.content.push(b'\n');
                    }
                    self.memory.open = Some(index);
                }
                self.memory.states.resize(self.rules.len(), None);
                self.memory.states[index] = Some(state);
                self.memory.latest = index;
                if state == State::Done {
                    self.close(event.output, emit);
                }
            }
            None => {
                self.close(event.output, emit);
                emit(event);
            }
        }
    }

    /// Which rule takes the line, its state after it, and whether the line goes on with what that rule took before.
    fn step(&self, line: &[u8]) -> Option<(usize, State, bool)> {
        let latest = self.memory.latest;
        let others = (0..self.rules.len()).filter(|index| *index != latest);
        [latest].into_iter().chain(others).find_map(|index| {
            let state = self.memory.states.get(index).copied().flatten();
            let goes_on = state.and_then(|state| self.rules[index].next(state, line)).map(|next| (index, next, true));
            goes_on.or_else(|| Some((index, self.rules[index].start(line)?, false)))
        })
    }

    fn close(&mut self, output: Output, emit: &mut impl FnMut(Event<'_>)) {
        if self.memory.open.take().is_some() {
            emit(self.group.event(output));
            self.group.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Seen = Vec<(Output, i64, String, Vec<Mark>)>;

    fn run(joiner: &mut Joiner, lines: &[String]) -> Seen {
        let mut seen = Vec::new();
        let mut offset = 0;
        let mut emit = |event: Event<'_>| {
            seen.push((event.output, event.timestamp_ms, String::from_utf8_lossy(event.content).into_owned(), event.marks.to_vec()));
        };
        for line in lines {
            joiner.line(&Line::parse(line.as_bytes()), Mark { generation: 0, offset }, 5, &mut emit);
            offset += line.len() as u64 + 1;
        }
        joiner.flush(5, &mut emit);
        seen
    }

    fn plain(bytes: usize) -> Joiner {
        Joiner::new([].into(), Bounds { bytes, ..Bounds::default() })
    }

    proptest! {
        /// Any interleaving of parts of both outputs gives each output's bytes back, in order, in events within bounds.
        #[test]
        fn parts_are_joined(parts in proptest::collection::vec((any::<bool>(), any::<bool>(), "[a-z]{0,9}"), 0..60), bytes in 1_usize..40) {
            let lines: Vec<_> = parts
                .iter()
                .map(|(err, partial, text)| {
                    format!("2026-11-20T10:00:01Z {} {} {text}", if *err { "stderr" } else { "stdout" }, if *partial { "P" } else { "F" })
                })
                .collect();
            let seen = run(&mut plain(bytes), &lines);
            for output in [Output::Stdout, Output::Stderr] {
                let sent: String = seen.iter().filter(|event| event.0 == output).map(|event| event.2.as_str()).collect();
                let written: String = parts.iter().filter(|part| part.0 == (output == Output::Stderr)).map(|part| part.2.as_str()).collect();
                prop_assert_eq!(sent, written);
            }
            prop_assert!(seen.iter().all(|event| event.2.len() <= bytes + 9));
            let ends = parts.iter().filter(|part| !part.1).count();
            prop_assert!(seen.len() >= ends);
        }

        /// Until an event is emitted, resuming begins at or before its first byte.
        #[test]
        fn resume_covers_what_is_open(parts in proptest::collection::vec((any::<bool>(), any::<bool>()), 1..40)) {
            let mut joiner = plain(1000);
            let mut open: [Option<u64>; 2] = [None, None];
            for (index, (err, partial)) in parts.iter().enumerate() {
                let offset = index as u64 * 10;
                let line = format!("2026-11-20T10:00:01Z {} {} x", if *err { "stderr" } else { "stdout" }, if *partial { "P" } else { "F" });
                joiner.line(&Line::parse(line.as_bytes()), Mark { generation: 3, offset }, 0, &mut |_| {});
                let slot = &mut open[usize::from(*err)];
                *slot = if *partial { slot.or(Some(offset)) } else { None };
                let expected = open.iter().flatten().min().copied().unwrap_or(offset + 10);
                prop_assert_eq!(joiner.resume(3, offset + 10), expected);
                prop_assert_eq!(joiner.resume(2, 77), 77);
            }
        }
    }

    #[test]
    fn stack_traces_are_joined_per_output() {
        let mut joiner = Joiner::new([Rule::Java, Rule::Go, Rule::Python].into(), Bounds::default());
        let lines: Vec<String> = [
            "2026-11-20T10:00:01Z stdout F x.YException: a",
            "2026-11-20T10:00:02Z stderr F other",
            "2026-11-20T10:00:03Z stdout P \tat ",
            "2026-11-20T10:00:03Z stdout F z",
            "2026-11-20T10:00:04Z stdout F b",
        ]
        .map(String::from)
        .into();
        let seen = run(&mut joiner, &lines);
        let texts: Vec<_> = seen.iter().map(|event| event.2.as_str()).collect();
        assert_eq!(texts, ["other", "x.YException: a\n\tat z", "b"]);
        assert_eq!(seen[1].3, [Mark { generation: 0, offset: 0 }]);
    }

    #[test]
    fn a_line_of_no_form_ends_what_is_open() {
        let lines: Vec<String> = [
            "2026-11-20T10:00:01Z stdout P out ",
            "2026-11-20T10:00:02Z stderr P err ",
            "torn",
            "2026-11-20T10:00:03Z stdout F put",
            "2026-11-20T10:00:04Z stderr F or",
        ]
        .map(String::from)
        .into();
        let texts = |joiner: &mut Joiner| run(joiner, &lines).into_iter().map(|event| event.2).collect::<Vec<_>>();
        assert_eq!(texts(&mut plain(1 << 20)), ["out ", "err ", "torn", "put", "or"]);
        let rule = Redaction { pattern: regex_lite::Regex::new("x").unwrap(), replacement: "#".to_owned() };
        assert_eq!(texts(&mut plain(1 << 20).sparing([rule].into())), ["torn", "out put", "err or"], "no mask is evaded by it");
    }

    #[test]
    fn an_open_part_and_an_open_group_expire() {
        let mut joiner = Joiner::new([Rule::Java].into(), Bounds::default());
        let mut seen = Vec::new();
        let mut emit = |event: Event<'_>| seen.push(String::from_utf8_lossy(event.content).into_owned());
        let line = |text: &'static str| Line::parse(text.as_bytes());
        joiner.line(&line("2026-11-20T10:00:01Z stdout F xError: y"), Mark { generation: 0, offset: 0 }, 0, &mut emit);
        joiner.line(&line("2026-11-20T10:00:01Z stderr P dying words"), Mark { generation: 0, offset: 40 }, 0, &mut emit);
        assert!(joiner.is_open());
        joiner.expire(1999, &mut emit);
        joiner.expire(2000, &mut emit);
        assert_eq!(joiner.resume(0, 80), 40);
        joiner.expire(60_000, &mut emit);
        assert!(!joiner.is_open());
        assert_eq!(seen, ["xError: y", "dying words"]);
    }

    fn masked(pattern: &str, lines: &[String], bytes: usize) -> String {
        let rule = Redaction { pattern: regex_lite::Regex::new(pattern).unwrap(), replacement: "#".to_owned() };
        let mut joiner = plain(bytes).sparing([rule.clone()].into());
        let mut out = String::new();
        let mut emit = |event: Event<'_>| out.push_str(&rule.pattern.replace_all(&String::from_utf8_lossy(event.content), "#"));
        for (offset, line) in lines.iter().enumerate() {
            joiner.line(&Line::parse(line.as_bytes()), Mark { generation: 0, offset: offset as u64 }, 0, &mut emit);
        }
        joiner.flush(0, &mut emit);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A secret anywhere in a line that is cut into parts, and again into events: nothing of it goes out.
        #[test]
        fn no_cut_tears_what_is_to_be_masked(before in 0_usize..30_000, secret in 1_usize..3000, after in 0_usize..30_000, part in 1_usize..9000) {
            let line = format!("{} key={} {}", "a".repeat(before), "S".repeat(secret), "z".repeat(after));
            let pieces: Vec<&[u8]> = line.as_bytes().chunks(part).collect();
            let lines: Vec<String> = pieces.iter().enumerate().map(|(index, piece)| {
                let tag = if index + 1 == pieces.len() { "F" } else { "P" };
                format!("2026-11-20T10:00:01Z stdout {tag} {}", std::str::from_utf8(piece).unwrap())
            }).collect();
            let out = masked(r"key=\S+", &lines, 10_000);
            prop_assert!(!out.contains('S'), "{} of the secret's letters went out", out.matches('S').count());
            prop_assert_eq!(out, format!("{} # {}", "a".repeat(before), "z".repeat(after)));
        }
    }

    #[test]
    fn a_secret_longer_than_an_event_takes_the_rest_of_its_line_with_it() {
        let part = |tag: &str, text: &str| format!("2026-11-20T10:00:01Z stdout {tag} {text}");
        let lines =
            [part("P", &format!("key={}", "S".repeat(20_000))), part("P", &"S".repeat(20_000)), part("F", "S end"), part("F", "next")];
        assert_eq!(masked(r"key=\S+", &lines, 10_000), "#next");
    }

    #[test]
    fn memory_that_runs_out_closes_what_is_long() {
        let mut joiner = plain(1 << 20);
        let mut seen = Vec::new();
        let mut emit = |event: Event<'_>| seen.push(event.content.len());
        let line = format!("2026-11-20T10:00:01Z stdout P {}", "x".repeat(100_000));
        joiner.line(&Line::parse(line.as_bytes()), Mark { generation: 0, offset: 0 }, 0, &mut emit);
        assert_eq!(joiner.open_bytes(), 100_000);
        assert_eq!(joiner.relieve(1000, 0, &mut emit), 1);
        assert_eq!((joiner.open_bytes(), joiner.relieve(1000, 0, &mut emit)), (0, 0));
        assert_eq!(seen, [100_000]);
    }

    #[test]
    fn parts_across_a_rotation_hold_both_files() {
        let mut joiner = plain(1000);
        let mut seen = Vec::new();
        let mut emit = |event: Event<'_>| seen.push(event.marks.to_vec());
        let part = Line::parse(b"2026-11-20T10:00:01Z stdout P a");
        let end = Line::parse(b"2026-11-20T10:00:01Z stdout F b");
        joiner.line(&part, Mark { generation: 1, offset: 90 }, 0, &mut emit);
        joiner.line(&part, Mark { generation: 2, offset: 0 }, 0, &mut emit);
        assert_eq!((joiner.resume(1, 120), joiner.resume(2, 30)), (90, 0));
        joiner.line(&end, Mark { generation: 2, offset: 30 }, 0, &mut emit);
        assert_eq!(seen, [vec![Mark { generation: 1, offset: 90 }, Mark { generation: 2, offset: 0 }]]);
    }

    /// What Fluent Bit's rules make of lines around a trace: its own events, but for those that it sends twice.
    fn grouped(rules: &[Rule], lines: &[&str]) -> Vec<String> {
        let lines: Vec<_> = lines.iter().map(|line| format!("2026-11-20T10:00:01Z stdout F {line}")).collect();
        run(&mut Joiner::new(rules.into(), Bounds::default()), &lines).into_iter().map(|event| event.2).collect()
    }

    #[test]
    fn the_rest_of_an_interrupted_trace_is_one_event() {
        let lines = ["x.YException: a", "\tat b", "INFO between", "\tat c", "\t... 2 more", "INFO after"];
        assert_eq!(grouped(&[Rule::Java], &lines), ["x.YException: a\n\tat b", "INFO between", "\tat c\n\t... 2 more", "INFO after"]);
        assert_eq!(grouped(&[Rule::Java], &lines[3..]), ["\tat c", "\t... 2 more", "INFO after"], "nothing was begun");
    }

    #[test]
    fn an_empty_line_at_the_end_of_a_group_is_a_line_end() {
        let lines = ["panic: x", "", "goroutine 1 [running]:", "main.main()", "\t/app/main.go:1", "", "exit status 2", "", "end"];
        let panic = "panic: x\n\ngoroutine 1 [running]:\nmain.main()\n\t/app/main.go:1\n\n";
        assert_eq!(grouped(&[Rule::Go], &lines), [panic, "exit status 2", "", "end"]);
    }

    #[test]
    fn traces_that_follow_each_other() {
        let python = ["Traceback (most recent call last):", "  File \"a.py\", line 1, in f", "    g()", "ValueError: bad"];
        let twice = [&python[..], &python[..], &["done"]].concat();
        assert_eq!(grouped(&[Rule::Java, Rule::Go, Rule::Python], &twice), [python.join("\n"), python.join("\n"), "done".to_owned()]);
        let java = ["x.AException: a", "\tat b", "y.BException: c", "\tat d"];
        assert_eq!(grouped(&[Rule::Java], &java), ["x.AException: a\n\tat b", "y.BException: c\n\tat d"]);
        let mixed = ["x.AException: a", "\tat b", "panic: c", "", "goroutine 1 [running]:", "Traceback (most recent call last):"];
        assert_eq!(
            grouped(&[Rule::Java, Rule::Go, Rule::Python], &mixed),
            ["x.AException: a\n\tat b", "panic: c\n\ngoroutine 1 [running]:", "Traceback (most recent call last):"]
        );
    }

    #[test]
    fn only_a_whole_line_begins_a_python_trace() {
        let lines = ["ERROR Traceback (most recent call last):", "  File \"a.py\", line 1, in f"];
        assert_eq!(grouped(&[Rule::Python], &lines), lines);
    }
}
