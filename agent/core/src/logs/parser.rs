//! Parsers that a pod names for its lines (`fluentbit.io/parser`): JSON, logfmt, or a regular expression with named groups.
//!
//! What a parser finds takes the place of the merged JSON object. A line that it does not match stays text.

use std::collections::BTreeMap;

use regex_lite::Regex;
use serde_json::{Map, Value};

/// How a line becomes members.
#[derive(Clone, Debug)]
pub enum Format {
    /// The line is a JSON object.
    Json,
    /// `key=value key="quoted value" flag`.
    Logfmt,
    /// Named groups.
    Regex(Regex),
}

/// Type of a member whose text is a number or a truth value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Digits.
    Integer,
    /// A decimal number.
    Float,
    /// `true` or `false`.
    Bool,
    /// Text, which members are anyway.
    Text,
}

impl Kind {
    /// By Fluent Bit's names.
    pub fn named(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "integer" | "int" => Some(Self::Integer),
            "float" => Some(Self::Float),
            "bool" => Some(Self::Bool),
            "string" => Some(Self::Text),
            _ => None,
        }
    }

    fn of(self, text: &str) -> Value {
        let number = match self {
            Self::Integer => text.parse::<i64>().ok().map(Value::from),
            Self::Float => text.parse::<f64>().ok().filter(|value| value.is_finite()).map(Value::from),
            Self::Bool => text.to_ascii_lowercase().parse::<bool>().ok().map(Value::from),
            Self::Text => None,
        };
        number.unwrap_or_else(|| Value::from(text))
    }
}

/// A parser.
#[derive(Clone, Debug)]
pub struct Parser {
    /// What annotations call it.
    pub name: String,
    /// How it reads.
    pub format: Format,
    /// Members that are not text.
    pub types: BTreeMap<String, Kind>,
}

/// Patterns of the parsers that Fluent Bit's own parsers file has for common servers; the time stays a member.
const BUILT_IN: [(&str, &str); 3] = [
    (
        "apache",
        r#"^(?<host>[^ ]*) [^ ]* (?<user>[^ ]*) \[(?<time>[^\]]*)\] "(?<method>\S+)(?: +(?<path>[^"]*?)(?: +\S*)?)?" (?<code>[^ ]*) (?<size>[^ ]*)(?: "(?<referer>[^"]*)" "(?<agent>[^"]*)")?$"#,
    ),
    (
        "apache2",
        r#"^(?<host>[^ ]*) [^ ]* (?<user>[^ ]*) \[(?<time>[^\]]*)\] "(?<method>\S+)(?: +(?<path>[^ ]*) +\S*)?" (?<code>[^ ]*) (?<size>[^ ]*)(?: "(?<referer>[^"]*)" "(?<agent>.*)")?$"#,
    ),
    (
        "nginx",
        r#"^(?<remote>[^ ]*) (?<host>[^ ]*) (?<user>[^ ]*) \[(?<time>[^\]]*)\] "(?<method>\S+)(?: +(?<path>[^"]*?)(?: +\S*)?)?" (?<code>[^ ]*) (?<size>[^ ]*)(?: "(?<referer>[^"]*)" "(?<agent>[^"]*)")"#,
    ),
];

/// The parsers that every node knows: json, logfmt, apache, apache2, nginx.
pub fn built_in() -> Vec<Parser> {
    let plain = [("json", Format::Json), ("logfmt", Format::Logfmt)];
    let patterns = BUILT_IN.map(|(name, pattern)| (name, Format::Regex(Regex::new(pattern).expect("a built-in pattern is well-formed"))));
    plain.into_iter().chain(patterns).map(|(name, format)| Parser { name: name.to_owned(), format, types: BTreeMap::new() }).collect()
}

impl Parser {
    /// The members of the line as a JSON object; `None` where the line is none of the parser's. The JSON parser gives the
    /// line itself: whoever merges it reads it anyway, and sees whether it is an object.
    pub fn object(&self, line: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let found: Map<String, Value> = match &self.format {
            Format::Json => return Some(text.to_owned()),
            Format::Logfmt => logfmt(text)?,
            Format::Regex(pattern) => {
                let captures = pattern.captures(text)?;
                pattern
                    .capture_names()
                    .flatten()
                    .filter_map(|name| Some((name.to_owned(), Value::from(captures.name(name)?.as_str()))))
                    .filter(|(_, value)| value != "")
                    .collect()
            }
        };
        let typed = found.into_iter().map(|(name, value)| {
            let typed = match (self.types.get(&name), &value) {
                (Some(kind), Value::String(text)) => kind.of(text),
                _ => value,
            };
            (name, typed)
        });
        Some(Value::Object(typed.collect()).to_string())
    }
}

/// Pairs; a word without `=` is a member that is true. `None` where there is no pair at all.
fn logfmt(text: &str) -> Option<Map<String, Value>> {
    let mut members = Map::new();
    let mut pairs = false;
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(['=', ' ']).unwrap_or(rest.len());
        let name = &rest[..end];
        rest = &rest[end..];
        let value = match rest.strip_prefix('=') {
            None => Value::Bool(true),
            Some(after) => {
                pairs = true;
                let (value, after) = logfmt_value(after);
                rest = after;
                Value::String(value)
            }
        };
        if !name.is_empty() {
            members.insert(name.to_owned(), value);
        }
        rest = rest.trim_start();
    }
    (pairs && !members.is_empty()).then_some(members)
}

fn logfmt_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(' ').unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                value.push(match c {
                    'n' => '\n',
                    't' => '\t',
                    other => other,
                });
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &quoted[at + 1..]),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(name: &str, line: &str) -> Option<Value> {
        let parsers = built_in();
        let parser = parsers.iter().find(|parser| parser.name == name).unwrap();
        parser.object(line.as_bytes()).and_then(|text| serde_json::from_str(&text).ok())
    }

    #[test]
    fn servers_access_lines() {
        let line = r#"192.168.2.20 - - [28/Jul/2006:10:27:10 -0300] "GET /cgi-bin/try/ HTTP/1.0" 200 3395 "-" "curl/8 (x)""#;
        let expected = serde_json::json!({
            "host": "192.168.2.20", "user": "-", "time": "28/Jul/2006:10:27:10 -0300", "method": "GET", "path": "/cgi-bin/try/",
            "code": "200", "size": "3395", "referer": "-", "agent": "curl/8 (x)",
        });
        assert_eq!(parsed("apache2", line).unwrap(), expected);
        assert_eq!(parsed("apache", line).unwrap(), expected);
        assert_eq!(parsed("nginx", &format!("10.0.0.1 {}", &line[13..])).unwrap()["remote"], "10.0.0.1");
        assert_eq!(parsed("apache", "no access line"), None);
    }

    #[test]
    fn logfmt_pairs() {
        let line = r#"level=info msg="it \"works\"" n=7 flag empty="#;
        let expected = serde_json::json!({"level": "info", "msg": "it \"works\"", "n": "7", "flag": true, "empty": ""});
        assert_eq!(parsed("logfmt", line).unwrap(), expected);
        assert_eq!(parsed("logfmt", "only words here"), None);
    }

    #[test]
    fn types() {
        let mut parser = Parser {
            name: "x".into(),
            format: Format::Regex(Regex::new(r"^(?<n>\S+) (?<f>\S+) (?<b>\S+) (?<t>\S+)$").unwrap()),
            types: BTreeMap::new(),
        };
        for (name, kind) in [("n", "integer"), ("f", "float"), ("b", "bool"), ("t", "string")] {
            parser.types.insert(name.to_owned(), Kind::named(kind).unwrap());
        }
        let read = |line: &[u8]| serde_json::from_str::<Value>(&parser.object(line).unwrap()).unwrap();
        assert_eq!(read(b"5 1.5 True 9\n"), serde_json::json!({"n": 5, "f": 1.5, "b": true, "t": "9"}));
        assert_eq!(read(b"x inf maybe 9"), serde_json::json!({"n": "x", "f": "inf", "b": "maybe", "t": "9"}));
    }

    proptest! {
        #[test]
        fn any_line_gives_an_object_or_nothing(line in "\\PC{0,40}|[a-z=\" \\\\]{0,40}") {
            for parser in built_in().iter().filter(|parser| parser.name != "json") {
                if let Some(text) = parser.object(line.as_bytes()) {
                    prop_assert!(serde_json::from_str::<Map<String, Value>>(&text).is_ok(), "{}", text);
                }
            }
        }
    }
}
