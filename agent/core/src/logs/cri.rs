//! One line of a container log file: the CRI form of containerd and CRI-O, or docker's json-file.
//!
//! CRI: `<RFC 3339 time> <stdout|stderr> <tag[:tag…]> <content>`; the time has 0 to 9 fraction digits and `Z` or an offset;
//! tag `P` says that the content goes on in the next line of the same stream. docker: `{"log":"…\n","stream":"…","time":"…"}`,
//! a `log` without the newline goes on.

use std::borrow::Cow;

use memchr::memchr;
use serde::{Deserialize, Serialize};

use super::merge;

/// Which of the container's outputs a line is from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// File descriptor 1.
    #[default]
    Stdout,
    /// File descriptor 2.
    Stderr,
}

impl Output {
    /// `stdout` or `stderr`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// What a line carries besides its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header<'a> {
    /// A CRI line.
    Cri {
        /// As written, for records that repeat it.
        time: &'a [u8],
        /// The text of the tag field.
        tag: &'a [u8],
    },
    /// A docker json-file line.
    Docker {
        /// As written; empty where there is none.
        time: &'a [u8],
        /// Labels and variables that the daemon's log options name, as `"attrs":{...}`; empty where there are none.
        attrs: &'a str,
    },
    /// Neither: the whole line is content.
    None,
}

/// A parsed line; the newline is not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// What stood before the content.
    pub header: Header<'a>,
    /// Standard output for lines without a header.
    pub output: Output,
    /// Milliseconds since 1970; `None` where the line has no readable time.
    pub timestamp_ms: Option<i64>,
    /// More of the same line follows.
    pub partial: bool,
    /// Raw bytes, possibly not UTF-8; owned only where docker's escapes had to be undone.
    pub content: Cow<'a, [u8]>,
}

impl<'a> Line<'a> {
    /// Reads a line in whichever form it has; a line in none is all content.
    pub fn parse(line: &'a [u8]) -> Self {
        cri(line).or_else(|| docker(line)).or_else(|| loose_cri(line)).unwrap_or_else(|| Self::plain(line))
    }

    /// What of a file's line is a line: without the carriage return before its newline, unless that is all of it, and without the zeros that
    /// a truncated or sparse file begins with. `None` where nothing is left: there is no line.
    pub fn trim(line: &'a [u8]) -> Option<&'a [u8]> {
        let line = line.strip_suffix(b"\r").filter(|rest| !rest.is_empty()).unwrap_or(line);
        let zeros = line.iter().take_while(|&&byte| byte == 0).count();
        Some(&line[zeros..]).filter(|line| !line.is_empty())
    }

    /// A line that is all content.
    pub fn plain(line: &'a [u8]) -> Self {
        Self { header: Header::None, output: Output::Stdout, timestamp_ms: None, partial: false, content: Cow::Borrowed(line) }
    }
}

/// Longest time that records repeat: they have to have room for it.
const MAX_TIME: usize = 1024;
/// Longest text of docker's options, for the same reason.
const MAX_ATTRS: usize = 64 << 10;

/// Splits at the first space.
fn word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = memchr(b' ', text)?;
    Some((&text[..at], &text[at + 1..]))
}

fn cri(line: &[u8]) -> Option<Line<'_>> {
    let (time, rest) = word(line)?;
    let (output, rest) = match rest.get(..7)? {
        b"stdout " => (Output::Stdout, &rest[7..]),
        b"stderr " => (Output::Stderr, &rest[7..]),
        _ => return None,
    };
    // An empty content may come without its separator when something trimmed the line.
    let (tag, content) = word(rest).unwrap_or((rest, b""));
    if !(1..=MAX_TIME).contains(&time.len()) {
        return None;
    }
    let partial = match tag.split(|&byte| byte == b':').next() {
        Some(b"P") => true,
        Some(b"F") => false,
        _ => return None,
    };
    Some(Line { header: Header::Cri { time, tag }, output, timestamp_ms: timestamp_ms(time), partial, content: Cow::Borrowed(content) })
}

/// A line whose time is written with spaces, or is none: Fluent Bit's pattern takes anything for it.
fn loose_cri(line: &[u8]) -> Option<Line<'_>> {
    memchr::memmem::find_iter(line, b" std").take_while(|at| *at <= MAX_TIME).filter(|at| *at > 0).find_map(|at| {
        let rest = &line[at + 1..];
        let output = match rest.get(..7)? {
            b"stdout " => Output::Stdout,
            b"stderr " => Output::Stderr,
            _ => return None,
        };
        let tag = rest.get(7..8).filter(|tag| matches!(tag[0], b'F' | b'P') && rest.get(8) == Some(&b' '))?;
        let (time, content) = (&line[..at], Cow::Borrowed(&rest[9..]));
        Some(Line { header: Header::Cri { time, tag }, output, timestamp_ms: timestamp_ms(time), partial: tag == b"P", content })
    })
}

#[derive(Deserialize)]
struct DockerLine<'a> {
    #[serde(borrow)]
    log: Cow<'a, str>,
    #[serde(borrow, default)]
    stream: Cow<'a, str>,
    #[serde(default)]
    time: &'a str,
}

fn docker(line: &[u8]) -> Option<Line<'_>> {
    if line.first() != Some(&b'{') {
        return None;
    }
    let parsed: DockerLine<'_> = serde_json::from_slice(line).ok()?;
    let time = parsed.time.as_bytes();
    let content = match parsed.log {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    };
    Some(Line {
        header: Header::Docker { time, attrs: attrs(line).unwrap_or_default() },
        output: if parsed.stream == "stderr" { Output::Stderr } else { Output::Stdout },
        timestamp_ms: timestamp_ms(time),
        partial: !content.ends_with(b"\n"),
        content,
    })
}

/// The member as it stands, if there is one that needs no change to be JSON that everybody reads.
fn attrs(line: &[u8]) -> Option<&str> {
    memchr::memmem::find(line, b"\"attrs\"")?;
    let text = std::str::from_utf8(line).ok()?;
    let object = merge::object(text)?;
    let member = object.members.iter().find(|member| &text[member.key.clone()] == "\"attrs\"")?;
    let place = member.key.start..member.value.end;
    if place.len() > MAX_ATTRS {
        return None;
    }
    object.edits.iter().all(|(edit, _)| !place.contains(&edit.start)).then(|| &text[place])
}

/// Milliseconds since 1970 of an RFC 3339 time, fraction cut; `None` if it is not one.
pub fn timestamp_ms(text: &[u8]) -> Option<i64> {
    // Of known length, so that no place in it needs a check.
    let head: &[u8; 19] = text.first_chunk()?;
    let digit = |at: usize| head[at].wrapping_sub(b'0');
    let two = |at: usize| i64::from(digit(at)) * 10 + i64::from(digit(at + 1));
    let is = |at: usize, byte: u8| text.get(at) == Some(&byte);
    let separators = head[4] == b'-' && head[7] == b'-' && matches!(head[10], b'T' | b't') && head[13] == b':' && head[16] == b':';
    if !separators || [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18].iter().any(|&at| digit(at) > 9) {
        return None;
    }
    let (year, month, day) = (two(0) * 100 + two(2), two(5), two(8));
    let (hour, minute, second) = (two(11), two(14), two(17));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut at = 19;
    let mut milliseconds = 0;
    if is(at, b'.') {
        at += 1;
        let fraction = text[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if fraction == 0 {
            return None;
        }
        for place in at..at + 3 {
            let digit = text.get(place).filter(|_| place < at + fraction).map_or(0, |digit| i64::from(digit - b'0'));
            milliseconds = milliseconds * 10 + digit;
        }
        at += fraction;
    }
    let offset_minutes = match text.get(at)? {
        b'Z' | b'z' if text.len() == at + 1 => 0,
        sign @ (b'+' | b'-') => {
            // `+05:30`, `+0530` and `+05`.
            let two = |from: usize| match text.get(from..from + 2)? {
                [tens @ b'0'..=b'9', ones @ b'0'..=b'9'] => Some(i64::from(tens - b'0') * 10 + i64::from(ones - b'0')),
                _ => None,
            };
            let minutes = match text.len() - at {
                3 => 0,
                5 => two(at + 3)?,
                6 if is(at + 3, b':') => two(at + 4)?,
                _ => return None,
            };
            let minutes = two(at + 1)? * 60 + minutes;
            if *sign == b'-' { -minutes } else { minutes }
        }
        _ => return None,
    };
    let minutes = (days_since_1970(year, month, day) * 24 + hour) * 60 + minute - offset_minutes;
    Some((minutes * 60 + second) * 1000 + milliseconds)
}

/// Days since 1970-01-01 of a Gregorian date: years begin in March, so that the leap day is the last of one.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_give_a_line_whose_content_is_part_of_them(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let line = Line::parse(&bytes);
            if let Cow::Borrowed(content) = line.content {
                prop_assert!(content.len() <= bytes.len());
            }
        }

        #[test]
        fn cri_lines_read_back(content in proptest::collection::vec(any::<u8>().prop_filter("newline", |b| *b != b'\n'), 0..80),
                               stderr in any::<bool>(), partial in any::<bool>()) {
            let stream = if stderr { "stderr" } else { "stdout" };
            let tag = if partial { "P" } else { "F" };
            let mut bytes = format!("2026-11-20T10:00:01.5Z {stream} {tag} ").into_bytes();
            bytes.extend_from_slice(&content);
            let line = Line::parse(&bytes);
            prop_assert_eq!(line.output.name(), stream);
            prop_assert_eq!(line.partial, partial);
            prop_assert_eq!(line.timestamp_ms, Some(1_795_168_801_500));
            prop_assert_eq!(&*line.content, &content[..]);
        }

        #[test]
        fn times_agree_with_jiff(seconds in 0_i64..4_000_000_000, nanos in 0_u32..1_000_000_000, digits in 0_usize..10, offset in -14_i32..15) {
            let instant = jiff::Timestamp::new(seconds, i32::try_from(nanos).unwrap()).unwrap();
            let zone = jiff::tz::Offset::from_hours(i8::try_from(offset).unwrap()).unwrap();
            let fraction = format!("{nanos:09}");
            let civil = zone.to_datetime(instant).strftime("%Y-%m-%dT%H:%M:%S").to_string();
            let text = if digits == 0 { civil } else { format!("{civil}.{}", &fraction[..digits]) };
            let zone = if offset == 0 { "Z".to_owned() } else { format!("{}{:02}:00", if offset < 0 { '-' } else { '+' }, offset.abs()) };
            let shown: i64 = if digits == 0 { 0 } else { format!("{:0<3}", &fraction[..digits.min(3)]).parse().unwrap() };
            prop_assert_eq!(timestamp_ms(format!("{text}{zone}").as_bytes()), Some(seconds * 1000 + shown));
        }

        #[test]
        fn odd_times_do_not_panic(text in "[0-9TZ:.+-]{0,40}") {
            timestamp_ms(text.as_bytes());
        }
    }

    #[test]
    fn further_tags_and_a_trimmed_empty_content() {
        let line = Line::parse(b"2026-11-20T10:00:12Z stdout P:x more");
        assert!(line.partial);
        let line = Line::parse(b"2026-11-20T10:00:12Z stderr F");
        assert_eq!((line.partial, &*line.content), (false, &b""[..]));
        assert_eq!(Line::parse(b"not a cri line at all"), Line::plain(b"not a cri line at all"));
    }

    #[test]
    fn another_tag_is_no_cri_line() {
        for text in [&b"2026-11-20T10:00:12Z stdout X text"[..], b"2026-11-20T10:00:12Z stdout  text", b"a stdout Ptext x", b" stdout F x"]
        {
            assert_eq!(Line::parse(text), Line::plain(text));
        }
    }

    #[test]
    fn a_time_of_several_words_is_a_time_that_cannot_be_read() {
        for (text, time, content, partial) in [
            (&b"2026-11-20 10:00:12 stderr P a b"[..], &b"2026-11-20 10:00:12"[..], &b"a b"[..], true),
            (b"2026-11-20T10:00:12Z stdout X text stderr F y", b"2026-11-20T10:00:12Z stdout X text", b"y", false),
            (b"x stdin stderr F ", b"x stdin", b"", false),
        ] {
            let line = Line::parse(text);
            assert_eq!(line.header, Header::Cri { time, tag: if partial { b"P" } else { b"F" } });
            assert_eq!((line.output, line.timestamp_ms, &*line.content, line.partial), (Output::Stderr, None, content, partial));
        }
    }

    #[test]
    fn a_time_that_leaves_a_record_no_room_is_none() {
        for time in ["t".repeat(MAX_TIME + 1), "t ".repeat(MAX_TIME)] {
            let line = format!("{time} stdout F x");
            assert_eq!(Line::parse(line.as_bytes()), Line::plain(line.as_bytes()));
        }
    }

    #[test]
    fn offsets_with_and_without_their_colon() {
        for offset in ["+05:30", "+0530"] {
            assert_eq!(timestamp_ms(format!("2026-11-20T15:30:13.5{offset}").as_bytes()), Some(1_795_168_813_500), "{offset}");
        }
        assert_eq!(timestamp_ms(b"2026-11-20T08:00:13-02"), Some(1_795_168_813_000));
        for odd in ["+5", "+053", "+05:3", "+05:300", "+", "+0x:30"] {
            assert_eq!(timestamp_ms(format!("2026-11-20T15:30:13{odd}").as_bytes()), None, "{odd}");
        }
    }

    #[test]
    fn what_is_left_of_a_files_line() {
        assert_eq!(Line::trim(b"text\r"), Some(&b"text"[..]));
        assert_eq!(Line::trim(b"\0\0\0text\r\r"), Some(&b"text\r"[..]));
        assert_eq!((Line::trim(b""), Line::trim(b"\0\0"), Line::trim(b"\r")), (None, None, Some(&b"\r"[..])));
    }

    #[test]
    fn docker_lines_with_and_without_end() {
        let line = Line::parse(br#"{"log":"a\tb\n","stream":"stderr","time":"2026-11-20T10:00:01.123456789Z"}"#);
        assert_eq!((&*line.content, line.output, line.partial), (&b"a\tb\n"[..], Output::Stderr, false));
        assert_eq!(line.timestamp_ms, Some(1_795_168_801_123));
        assert!(Line::parse(br#"{"log":"a","stream":"stdout","time":"2026-11-20T10:00:01Z"}"#).partial);
        // Labels and variables that the daemon's log options name.
        let line = br#"{"log":"b\n","stream":"stdout","attrs":{"env":"x","tag":"{\"a\":1}"},"time":"2026-11-20T10:00:01Z"}"#;
        assert_eq!(
            (&*Line::parse(line).content, Line::parse(line).header),
            (&b"b\n"[..], Header::Docker { time: b"2026-11-20T10:00:01Z", attrs: r#""attrs":{"env":"x","tag":"{\"a\":1}"}"# })
        );
        for no_json in [r#"{"log":"b\n","attrs":{"a":"\ud800"}}"#, r#"{"log":"b \"attrs\" \n"}"#] {
            assert_eq!(Line::parse(no_json.as_bytes()).header, Header::Docker { time: b"", attrs: "" }, "{no_json}");
        }
        assert_eq!(Line::parse(br#"{"msg":"not docker's"}"#).header, Header::None);
    }
}
