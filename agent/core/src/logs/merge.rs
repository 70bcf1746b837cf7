//! Finds the JSON object at the start of a log line, without building a value.
//!
//! Strict JSON (RFC 8259) but for what follows the object, which is ignored as Fluent Bit ignores it, unless that is JSON too: a line of
//! two values is no object. Nor is one with a number beyond a double, or one that is nested deeper than Fluent Bit's reader of records
//! goes.
//!
//! What Fluent Bit's readers know otherwise is not taken as it stands: line ends at the end of a member's string go (`Merge_Log_Trim`), a
//! number of more digits than a double holds is written with the 16 that it has, and half a surrogate pair and a raw control character
//! in a string are U+FFFD.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::Value;
use smallvec::SmallVec;

/// Objects and arrays within each other, the line's own included: what Fluent Bit's reader of records (msgpack-c) follows.
const MAX_DEPTH: usize = 32;
/// Members of most objects.
const FEW: usize = 16;
/// What half a surrogate pair and a raw control character become.
const REPLACEMENT: &str = "\u{FFFD}";

/// A member of the object: places in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name with its quotes.
    pub key: Range<usize>,
    /// The value.
    pub value: Range<usize>,
}

/// An object at the start of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// From `{` to `}`.
    pub text: Range<usize>,
    /// Members in order. Of a repeated name only the last one, as readers take it.
    pub members: Vec<Member>,
    /// A name came twice, so that `text` says more than `members`.
    pub repeated: bool,
    /// Places whose text is replaced, in order.
    pub edits: Vec<(Range<usize>, String)>,
}

impl Object {
    /// The text of `range` with its edits, in pieces.
    pub fn pieces<'a>(&'a self, text: &'a str, range: Range<usize>) -> impl Iterator<Item = &'a str> {
        let first = self.edits.partition_point(|(place, _)| place.start < range.start);
        let inside = self.edits[first..].iter().take_while({
            let end = range.end;
            move |(place, _)| place.end <= end
        });
        let ends = inside.clone().map(|(place, _)| place.start).chain([range.end]);
        let starts = [range.start].into_iter().chain(inside.clone().map(|(place, _)| place.end));
        let edited = inside.map(|(_, edit)| edit.as_str()).chain([""]);
        starts.zip(ends).zip(edited).flat_map(move |((start, end), edit)| [&text[start..end], edit])
    }
}

/// Reads the object that `text` begins with, after blanks.
pub fn object(text: &str) -> Option<Object> {
    let mut scan = Scan { text: text.as_bytes(), at: 0, edits: Vec::new() };
    scan.blanks();
    let start = scan.at;
    if scan.peek() != Some(b'{') {
        return None;
    }
    let mut members = Vec::with_capacity(FEW);
    scan.members(1, &mut |key, value| members.push(Member { key, value }))?;
    let end = scan.at;
    let mut edits = std::mem::take(&mut scan.edits);
    scan.blanks();
    if scan.peek().is_some() && scan.value(1).is_some() {
        return None;
    }
    edits.extend(members.iter().filter_map(|member| Some((member.value.clone(), trimmed(&text[member.value.clone()])?))));
    edits.sort_by_key(|(place, _)| place.start);
    let repeated = remove_repeated(text, &mut members);
    Some(Object { text: start..end, members, repeated, edits })
}

/// A string without the line ends at its end, if it has any: newlines, and the letters `\n` and `\r` that a writer escaped once too
/// often. The first character stays in any case.
fn trimmed(value: &str) -> Option<String> {
    let inner = value.strip_prefix('"')?.strip_suffix('"')?;
    let ends = ["\\n", "\\r", "\\u000a", "\\u000A"];
    if !ends.iter().any(|end| inner.ends_with(end)) {
        return None;
    }
    let whole: String = serde_json::from_str(value).ok()?;
    let mut text = whole.as_str();
    while text.len() > 1 {
        let shorter = text.strip_suffix('\n').or_else(|| text.strip_suffix("\\n")).or_else(|| text.strip_suffix("\\r"));
        match shorter {
            Some(shorter) => text = shorter,
            None => break,
        }
    }
    (text.len() < whole.len()).then(|| Value::from(text).to_string())
}

/// What is written for a number that a double or a 64-bit integer does not hold as it stands: `None` within the outer option is
/// no number at all (beyond a double), `None` outside leaves it as it is.
fn reduced(text: &str) -> Option<Option<String>> {
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let digits = mantissa.bytes().filter(u8::is_ascii_digit).count();
    let whole = !text.contains(['.', 'e', 'E']);
    if whole && (digits < 19 || text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok()) {
        return None;
    }
    if !whole && digits <= 15 && text.len() == mantissa.len() {
        return None;
    }
    let value: f64 = text.parse().ok()?;
    if !value.is_finite() {
        return Some(None);
    }
    // A double without a fraction is written in full as long as an integer of 64 bits holds it.
    let full = value.fract() == 0.0 && (-TWO_TO_63..TWO_TO_63).contains(&value);
    let text = if full { format!("{value:.1}") } else { sixteen_digits(value) };
    (whole || digits > 15).then_some(Some(text))
}

/// 2^63, which a double holds.
const TWO_TO_63: f64 = 9_223_372_036_854_775_808.0;

/// As C's `%.16g`: a number that JSON has too.
fn sixteen_digits(value: f64) -> String {
    format!("{value:.15e}").parse().map_or_else(|_| value.to_string(), |rounded: f64| Value::from(rounded).to_string())
}

/// The name without quotes and escapes.
pub fn key_text<'a>(text: &'a str, key: &Range<usize>) -> Cow<'a, str> {
    let quoted = &text[key.clone()];
    let inner = &quoted[1..quoted.len() - 1];
    if inner.contains('\\') { serde_json::from_str(quoted).map_or(Cow::Borrowed(inner), Cow::Owned) } else { Cow::Borrowed(inner) }
}

fn remove_repeated(text: &str, members: &mut Vec<Member>) -> bool {
    let names: SmallVec<[_; FEW]> = members.iter().map(|member| key_text(text, &member.key)).collect();
    // Few names are compared with each other faster than they are sorted.
    if names.len() <= FEW && !names.iter().enumerate().any(|(index, name)| names[..index].contains(name)) {
        return false;
    }
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by(|&a, &b| names[a].cmp(&names[b]).then(a.cmp(&b)));
    let superseded: Vec<usize> = order.windows(2).filter(|pair| names[pair[0]] == names[pair[1]]).map(|pair| pair[0]).collect();
    let mut index = 0;
    members.retain(|_| {
        index += 1;
        !superseded.contains(&(index - 1))
    });
    !superseded.is_empty()
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    edits: Vec<(Range<usize>, String)>,
}

impl Scan<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        self.blanks();
        (self.peek() == Some(byte)).then(|| self.at += 1)
    }

    /// From `{` to behind `}`; `depth` counts this object.
    fn members(&mut self, depth: usize, each: &mut dyn FnMut(Range<usize>, Range<usize>)) -> Option<()> {
        self.take(b'{')?;
        self.blanks();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Some(());
        }
        loop {
            self.blanks();
            let key = self.at;
            self.string()?;
            let key = key..self.at;
            self.take(b':')?;
            self.blanks();
            let value = self.at;
            self.value(depth + 1)?;
            each(key, value..self.at);
            self.blanks();
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Some(());
                }
                _ => return None,
            }
        }
    }

    /// `depth` is that of an object or array, if it is one.
    fn value(&mut self, depth: usize) -> Option<()> {
        match self.peek()? {
            b'{' | b'[' if depth > MAX_DEPTH => None,
            b'{' => self.members(depth, &mut |_, _| {}),
            b'[' => self.array(depth),
            b'"' => self.string(),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => self.number(),
        }
    }

    fn array(&mut self, depth: usize) -> Option<()> {
        self.at += 1;
        self.blanks();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Some(());
        }
        loop {
            self.blanks();
            self.value(depth + 1)?;
            self.blanks();
            match self.peek()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Some(());
                }
                _ => return None,
            }
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.text[self.at..].starts_with(word).then(|| self.at += word.len())
    }

    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let first = self.at;
        self.digits()?;
        if self.text[first] == b'0' && self.at - first > 1 {
            return None;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        let text = std::str::from_utf8(&self.text[start..self.at]).ok()?;
        if text == "-0" {
            self.edits.push((start..self.at, "0".to_owned()));
        }
        // Nearly all numbers are short integers.
        if (text.len() > 15 || text.contains(['e', 'E']))
            && let Some(reduced) = reduced(text)
        {
            self.edits.push((start..self.at, reduced?));
        }
        Some(())
    }

    fn string(&mut self) -> Option<()> {
        if self.peek() != Some(b'"') {
            return None;
        }
        self.at += 1;
        loop {
            self.at += super::json::plain_prefix(&self.text[self.at..]);
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Some(());
                }
                b'\\' => self.escape()?,
                _ => {
                    self.edits.push((self.at..self.at + 1, REPLACEMENT.to_owned()));
                    self.at += 1;
                }
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        let start = self.at;
        let kind = *self.text.get(self.at + 1)?;
        self.at += 2;
        if kind != b'u' {
            return matches!(kind, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't').then_some(());
        }
        let unit = self.unit()?;
        let end = self.at;
        let alone = match unit {
            0xd800..=0xdbff => {
                let next = self.text[self.at..].starts_with(b"\\u").then(|| {
                    self.at += 2;
                    self.unit()
                });
                !matches!(next, Some(Some(0xdc00..=0xdfff)))
            }
            0xdc00..=0xdfff => true,
            _ => false,
        };
        if alone {
            // What follows it stands for itself.
            self.at = end;
            self.edits.push((start..end, REPLACEMENT.to_owned()));
        }
        Some(())
    }

    fn unit(&mut self) -> Option<u16> {
        let hex = std::str::from_utf8(self.text.get(self.at..self.at + 4)?).ok()?;
        self.at += 4;
        if !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        u16::from_str_radix(hex, 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Map;

    use super::*;

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<i32>().prop_map(|eighths| Value::from(f64::from(eighths) / 8.0)),
            "\\PC{0,10}|[\\x00-\\x7f]{0,10}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z\"\\\\]{0,4}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The rule of `Merge_Log_Trim`, from the last byte on.
    fn trimmed_by_the_rule(value: Value) -> Value {
        let Value::String(text) = value else { return value };
        let bytes = text.as_bytes();
        let mut len = bytes.len();
        while len > 1 {
            match &bytes[..len] {
                [.., b'\n'] => len -= 1,
                [.., b'\\', b'n' | b'r'] => len -= 2,
                _ => break,
            }
        }
        Value::from(&text[..len])
    }

    fn edited(text: &str) -> Option<String> {
        let object = object(text)?;
        Some(object.pieces(text, object.text.clone()).collect())
    }

    #[test]
    fn line_ends_at_the_end_of_a_members_string_go() {
        assert_eq!(
            edited(r#"{"a":"x\n\r\n","b":{"c":"y\n"},"d":"\n\n","e":"z\u000a"} "#).unwrap(),
            r#"{"a":"x\n\r","b":{"c":"y\n"},"d":"\n","e":"z"}"#
        );
        assert_eq!(edited(r#"{"path":"C:\\n","cr":"x\r","only":"\\n"}"#).unwrap(), r#"{"path":"C:","cr":"x\r","only":""}"#);
    }

    #[test]
    fn numbers_beyond_their_type() {
        for (number, written) in [
            ("12345678901234567890", "12345678901234567890"),
            ("-9223372036854775808", "-9223372036854775808"),
            ("123456789012345678901234567890", "1.234567890123457e+29"),
            ("0.30000000000000004", "0.3"),
            ("1e3", "1e3"),
            ("[1,{\"x\":3.14159265358979312}]", "[1,{\"x\":3.141592653589793}]"),
            ("1795168809.123456789", "1795168809.123457"),
            ("123456789012345678.0", "123456789012345680.0"),
            ("-9223372036854775809", "-9223372036854775808.0"),
            ("-0", "0"),
        ] {
            let text = edited(&format!("{{\"n\":{number}}}")).unwrap();
            let read: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(read["n"], serde_json::from_str::<Value>(written).unwrap(), "{number}: {text}");
        }
        assert_eq!(object(r#"{"n":1e400}"#), None);
        assert_eq!(object(r#"{"n":[-1e999]}"#), None);
    }

    #[test]
    fn two_values_in_a_line_are_no_object() {
        for text in [r#"{"a":1}{"b":2}"#, r#"{"a":1} 42"#, r#"{"a":1} true"#, r#"{"a":1} [1]"#] {
            assert_eq!(object(text), None, "{text}");
        }
        for text in [
            r#"{"a":1} trailing"#,
            r#"{"a":1},"#,
            "{\"a\":1}\n",
            r#"{"a":1} {"broken":"#,
            "{\"a\":1} \u{fffd}",
            r#"{"a":1} 01:02"#,
            r#"{"a":1} -"#,
        ] {
            assert!(object(text).is_some(), "{text}");
        }
    }

    #[test]
    fn what_no_string_can_hold_is_replaced() {
        for (text, expected) in [
            (r#"{"high":"a\ud800b"}"#, "{\"high\":\"a\u{fffd}b\"}"),
            (r#"{"low":"\udc00"}"#, "{\"low\":\"\u{fffd}\"}"),
            (r#"{"two":"\ud83d\ud83d\ude00"}"#, "{\"two\":\"\u{fffd}\\ud83d\\ude00\"}"),
            (r#"{"other":"\ud83d\u0041"}"#, "{\"other\":\"\u{fffd}\\u0041\"}"),
            (r#"{"k\udfff":1}"#, "{\"k\u{fffd}\":1}"),
            ("{\"tab\":\"a\tb\"}", "{\"tab\":\"a\u{fffd}b\"}"),
        ] {
            assert_eq!(edited(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn thirty_two_levels_are_followed() {
        let nested = |levels: usize| format!("{{\"a\":{}1{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        assert!(object(&nested(32)).is_some());
        assert_eq!(object(&nested(33)), None);
    }

    proptest! {
        #[test]
        fn members_are_what_serde_json_reads(value in json(), before in "[ \t]{0,3}", after in "[ a-z]{0,9}") {
            let Value::Object(expected) = value else { return Ok(()) };
            // `null`, `true` and `false` would be a second value.
            let text = format!("{before}{} x{after}", serde_json::to_string(&expected).unwrap());
            let object = object(&text).unwrap();
            let members: Map<String, Value> = object
                .members
                .iter()
                .map(|member| {
                    let key = key_text(&text, &member.key).into_owned();
                    (key, serde_json::from_str(&object.pieces(&text, member.value.clone()).collect::<String>()).unwrap())
                })
                .collect();
            let whole: Map<String, Value> = serde_json::from_str(&object.pieces(&text, object.text.clone()).collect::<String>()).unwrap();
            prop_assert_eq!(&whole, &members);
            let expected: Map<String, Value> = expected.into_iter().map(|(key, value)| (key, trimmed_by_the_rule(value))).collect();
            prop_assert_eq!(members, expected);
            prop_assert!(!object.repeated);
        }

        #[test]
        fn nothing_is_written_that_serde_json_refuses(text in "[{}\\[\\]\",:0-9a-eu.\\\\ -]{0,30}|\\{\"k\":\"(\\\\u[d][89abcdef]00|[\\x00-\\x20]|\\\\n|x){0,6}\"\\}") {
            if let Some(object) = object(&text) {
                let written: String = object.pieces(&text, object.text.clone()).collect();
                prop_assert!(serde_json::from_str::<Value>(&written).is_ok(), "{}", text);
            }
        }
    }

    #[test]
    fn of_a_repeated_name_the_last_counts() {
        let text = r#"{"a":1,"b":2,"\u0061":3,"a":4}"#;
        let object = object(text).unwrap();
        assert!(object.repeated);
        let values: Vec<_> = object.members.iter().map(|member| &text[member.value.clone()]).collect();
        assert_eq!(values, ["2", "4"]);
    }

    #[test]
    fn what_is_no_object() {
        let deep = "{\"a\":".repeat(200);
        for text in [
            "",
            "[1]",
            "\"x\"",
            "42",
            "{\"broken\": ",
            "{\"a\":01}",
            "{\"a\":\"\\ud8\"}",
            "{\"a\":\"\\x41\"}",
            "{\"a\":NaN}",
            "{a:1}",
            "{\"a\":1,}",
            &deep,
        ] {
            assert_eq!(object(text), None, "{text}");
        }
        assert!(object("  {} trailing").is_some_and(|object| object.members.is_empty()));
    }
}
