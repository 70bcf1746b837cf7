//! Finds the JSON object at the start of a log line, without building a value.
//!
//! Strict JSON (RFC 8259) but for what follows the object, which is ignored as Fluent Bit ignores it. An object that a strict
//! reader of the record would refuse later (lone surrogates, raw control characters) is no object.

use std::borrow::Cow;
use std::ops::Range;

/// Deeper nesting is not followed; readers of the record have limits too.
const MAX_DEPTH: usize = 100;

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
}

/// Reads the object that `text` begins with, after blanks.
pub fn object(text: &[u8]) -> Option<Object> {
    let mut scan = Scan { text, at: 0 };
    scan.blanks();
    let start = scan.at;
    if scan.peek() != Some(b'{') {
        return None;
    }
    std::str::from_utf8(text).ok()?;
    let mut members = Vec::new();
    scan.members(0, &mut |key, value| members.push(Member { key, value }))?;
    let repeated = remove_repeated(text, &mut members);
    Some(Object { text: start..scan.at, members, repeated })
}

/// The name without quotes and escapes.
pub fn key_text<'a>(text: &'a [u8], key: &Range<usize>) -> Cow<'a, [u8]> {
    let quoted = &text[key.clone()];
    let inner = &quoted[1..quoted.len() - 1];
    if inner.contains(&b'\\') {
        serde_json::from_slice::<String>(quoted).map_or(Cow::Borrowed(inner), |name| Cow::Owned(name.into_bytes()))
    } else {
        Cow::Borrowed(inner)
    }
}

fn remove_repeated(text: &[u8], members: &mut Vec<Member>) -> bool {
    let before = members.len();
    let names: Vec<_> = members.iter().map(|member| key_text(text, &member.key)).collect();
    let mut order: Vec<usize> = (0..before).collect();
    order.sort_by(|&a, &b| names[a].cmp(&names[b]).then(a.cmp(&b)));
    let superseded: Vec<usize> = order.windows(2).filter(|pair| names[pair[0]] == names[pair[1]]).map(|pair| pair[0]).collect();
    if superseded.is_empty() {
        return false;
    }
    let mut index = 0;
    members.retain(|_| {
        index += 1;
        !superseded.contains(&(index - 1))
    });
    true
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
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

    /// From `{` to behind `}`.
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

    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.peek()? {
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
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
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
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        let kind = *self.text.get(self.at + 1)?;
        self.at += 2;
        if kind != b'u' {
            return matches!(kind, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't').then_some(());
        }
        let unit = self.unit()?;
        match unit {
            0xd800..=0xdbff => {
                self.text[self.at..].starts_with(b"\\u").then_some(())?;
                self.at += 2;
                matches!(self.unit()?, 0xdc00..=0xdfff).then_some(())
            }
            0xdc00..=0xdfff => None,
            _ => Some(()),
        }
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
    use serde_json::{Map, Value};

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

    proptest! {
        #[test]
        fn members_are_what_serde_json_reads(value in json(), before in "[ \t]{0,3}", after in "[ a-z]{0,9}") {
            let Value::Object(expected) = value else { return Ok(()) };
            let text = format!("{before}{}{after}", serde_json::to_string(&expected).unwrap());
            let bytes = text.as_bytes();
            let object = object(bytes).unwrap();
            let members: Map<String, Value> = object
                .members
                .iter()
                .map(|member| {
                    let key = String::from_utf8(key_text(bytes, &member.key).into_owned()).unwrap();
                    (key, serde_json::from_slice(&bytes[member.value.clone()]).unwrap())
                })
                .collect();
            prop_assert_eq!(members, expected);
            prop_assert!(!object.repeated);
        }

        #[test]
        fn nothing_is_accepted_that_serde_json_refuses(text in "[{}\\[\\]\",:0-9a-eu.\\\\ -]{0,30}") {
            if let Some(object) = object(text.as_bytes()) {
                let slice = &text.as_bytes()[object.text];
                prop_assert!(serde_json::from_slice::<Value>(slice).is_ok(), "{}", text);
            }
        }
    }

    #[test]
    fn of_a_repeated_name_the_last_counts() {
        let text = br#"{"a":1,"b":2,"\u0061":3,"a":4}"#;
        let object = object(text).unwrap();
        assert!(object.repeated);
        let values: Vec<_> = object.members.iter().map(|member| &text[member.value.clone()]).collect();
        assert_eq!(values, [b"2", b"4"]);
    }

    #[test]
    fn what_is_no_object() {
        let deep = "{\"a\":".repeat(200);
        for text in
            ["", "[1]", "\"x\"", "42", "{\"broken\": ", "{\"a\":01}", "{\"a\":\"\\ud800\"}", "{\"a\":\"\t\"}", "{a:1}", "{\"a\":1,}", &deep]
        {
            assert_eq!(object(text.as_bytes()), None, "{text}");
        }
        assert!(object(b"  {} trailing").is_some_and(|object| object.members.is_empty()));
    }
}
