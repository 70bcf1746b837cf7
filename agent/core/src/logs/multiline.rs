//! Which lines of a stack trace belong together: the rules of Fluent Bit's built-in parsers java, go, python and ruby, as
//! state machines, and rules of the user's own.
//!
//! A rule looks at one line at a time: it may begin a group, go on with the group, or end it. The rules are those that
//! Fluent Bit documents, so that the same lines are joined; java and go come from fluent-plugin-detect-exceptions.

use regex_lite::Regex;

/// One rule set; the first of a list whose start matches takes the group.
#[derive(Clone, Debug)]
pub enum Rule {
    /// Exceptions with `at` frames, `Caused by:` and the like.
    Java,
    /// `panic:` with goroutines and frames.
    Go,
    /// `Traceback (most recent call last):` to the exception line.
    Python,
    /// `file:line:in` with `from` lines.
    Ruby,
    /// The user's patterns.
    User(UserRule),
}

/// A group begins at a line that `start` matches and goes on while `next` matches.
#[derive(Clone, Debug)]
pub struct UserRule {
    /// For messages about it.
    pub name: String,
    /// First line of a group.
    pub start: Regex,
    /// Following lines; without it every line that `start` does not match.
    pub next: Option<Regex>,
}

/// Where a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// After an exception or `Caused by:` line.
    JavaException,
    /// After `nested exception is:`.
    JavaNested,
    /// Among frames.
    JavaFrame,
    /// After `panic:`.
    GoPanic,
    /// After `[signal …]`.
    GoSignal,
    /// Expecting `goroutine N [...]:`.
    GoGoroutine,
    /// Expecting a function, or an empty line before the next goroutine.
    GoFunction,
    /// Expecting its file and line.
    GoFile,
    /// Expecting `File …` or the exception.
    Python,
    /// Expecting the code of a frame.
    PythonCode,
    /// Among `from` lines.
    Ruby,
    /// In the user's group.
    User,
    /// The line was the group's last.
    Done,
}

/// A name that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no multiline rule is called {0:?}: java, go, python, ruby, or a rule of your own")]
pub struct UnknownRule(pub String);

impl Rule {
    /// A built-in rule by Fluent Bit's name.
    ///
    /// # Errors
    /// The name is not one of the four.
    pub fn built_in(name: &str) -> Result<Self, UnknownRule> {
        match name {
            "java" => Ok(Self::Java),
            "go" => Ok(Self::Go),
            "python" => Ok(Self::Python),
            "ruby" => Ok(Self::Ruby),
            _ => Err(UnknownRule(name.to_owned())),
        }
    }

    /// Whether the line begins a group.
    pub fn start(&self, line: &[u8]) -> Option<State> {
        match self {
            Self::Java => java_exception(line).then_some(State::JavaException),
            Self::Go => go_start(line),
            Self::Python => (line == b"Traceback (most recent call last):").then_some(State::Python),
            Self::Ruby => ruby_start(line).then_some(State::Ruby),
            Self::User(rule) => rule.start.is_match(&String::from_utf8_lossy(line)).then_some(State::User),
        }
    }

    /// Whether the line goes on with a group in `state`, and the state after it.
    pub fn next(&self, state: State, line: &[u8]) -> Option<State> {
        if state == State::Done {
            return None;
        }
        match self {
            Self::Java => java_next(state, line),
            Self::Go => go_next(state, line),
            Self::Python => python_next(state, line),
            Self::Ruby => ruby_frame(line).then_some(State::Ruby),
            Self::User(rule) => {
                let line = String::from_utf8_lossy(line);
                let goes_on = rule.next.as_ref().map_or_else(|| !rule.start.is_match(&line), |next| next.is_match(&line));
                goes_on.then_some(State::User)
            }
        }
    }
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

/// The line without leading blanks, and whether there were some.
fn unindent(line: &[u8]) -> (&[u8], bool) {
    let indent = line.iter().take_while(|&&byte| is_blank(byte)).count();
    (&line[indent..], indent > 0)
}

fn java_exception(line: &[u8]) -> bool {
    memchr::memchr3_iter(b':', b'\r', b'\n', line).any(|at| {
        [&b"Exception"[..], b"Error", b"Throwable", b"V8 errors stack trace"]
            .iter()
            .any(|word| line[..at].strip_suffix(*word).is_some_and(|before| !before.is_empty()))
    })
}

fn java_next(state: State, line: &[u8]) -> Option<State> {
    let (text, indented) = unindent(line);
    let after_exception = state == State::JavaException;
    if state == State::JavaNested {
        return java_exception(line).then_some(State::JavaException);
    }
    if after_exception && text.starts_with(b"nested exception is:") {
        return Some(State::JavaNested);
    }
    if after_exception && line.iter().all(|&byte| byte == b'\r' || byte == b'\n') {
        return Some(State::JavaException);
    }
    if text.starts_with(b"Caused by:") || text.starts_with(b"Suppressed:") {
        return Some(State::JavaException);
    }
    let frame = indented
        && (text.starts_with(b"at ") || text.starts_with(b"eval at ") || text == b"--- End of inner exception stack trace ---")
        || line == b"--- End of stack trace from previous location where exception was thrown ---"
        || java_omitted(text);
    frame.then_some(State::JavaFrame)
}

/// `... 12 more`, `... 3 common frames omitted`.
fn java_omitted(text: &[u8]) -> bool {
    // Fluent Bit's pattern has three unescaped dots: any three characters.
    let Some((b' ', rest)) = text.get(3..).and_then(|rest| rest.split_first()).map(|(first, rest)| (*first, rest)) else { return false };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    digits > 0 && (rest[digits..].starts_with(b" more") || rest[digits..].starts_with(b" common frames omitted"))
}

fn go_start(line: &[u8]) -> Option<State> {
    let panic =
        memchr::memmem::find_iter(line, b"panic: ").any(|at| at == 0 || !(line[at - 1].is_ascii_alphanumeric() || line[at - 1] == b'_'));
    if panic { Some(State::GoPanic) } else { memchr::memmem::find(line, b"http: panic serving").map(|_| State::GoGoroutine) }
}

fn go_next(state: State, line: &[u8]) -> Option<State> {
    match state {
        State::GoPanic | State::GoSignal | State::GoFunction if line.is_empty() => Some(State::GoGoroutine),
        State::GoPanic if line.starts_with(b"[signal ") => Some(State::GoSignal),
        State::GoGoroutine if goroutine(line) => Some(State::GoFunction),
        State::GoFunction if line.starts_with(b"created by ") || go_function(line) => Some(State::GoFile),
        State::GoFile if line.first().is_some_and(|&byte| is_space(byte)) => Some(State::GoFunction),
        _ => None,
    }
}

/// `goroutine 1 [running]:`
fn goroutine(line: &[u8]) -> bool {
    let Some(rest) = line.strip_prefix(b"goroutine ") else { return false };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let Some(state) = rest[digits..].strip_prefix(b" [").and_then(|rest| rest.strip_suffix(b"]:")) else { return false };
    digits > 0 && !state.is_empty() && !state.contains(&b']')
}

/// `main.(*Server).Serve(0x1, …)`: dotted names and an opening parenthesis.
fn go_function(line: &[u8]) -> bool {
    let names = line.iter().position(|&byte| is_space(byte) || byte == b':').unwrap_or(line.len());
    memchr::memchr_iter(b'(', line).take_while(|&at| at < names || line[..at].iter().all(|&byte| !is_space(byte) && byte != b':')).any(
        |at| {
            let head = &line[..at];
            let dot = memchr::memrchr(b'.', head);
            let name = dot.map_or(head, |dot| &head[dot + 1..]);
            let path_holds = dot.is_none_or(|dot| head[..dot].split(|&byte| byte == b'.').all(|part| !part.is_empty()));
            !name.is_empty() && !name.iter().any(|byte| matches!(byte, b'(' | b')')) && path_holds
        },
    )
}

fn python_next(state: State, line: &[u8]) -> Option<State> {
    let (text, indented) = unindent(line);
    match state {
        State::PythonCode => (!text.is_empty()).then_some(State::Python),
        _ if indented && text.starts_with(b"File ") => Some(State::PythonCode),
        _ => python_exception(line).then_some(State::Done),
    }
}

/// `package.ValueError: …`
fn python_exception(line: &[u8]) -> bool {
    memchr::memchr(b':', line).is_some_and(|colon| {
        let name = &line[..colon];
        name.split(|&byte| byte == b'.').all(|part| !part.is_empty())
            && !name.iter().any(|&byte| is_space(byte) || matches!(byte, b'(' | b')'))
    })
}

/// `<something>:12:in `
fn ruby_location(line: &[u8]) -> bool {
    memchr::memmem::find_iter(line, b":in").any(|at| {
        let spaced = line.get(at + 3).is_some_and(|&byte| is_space(byte));
        let digits = line[..at].iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        let before = &line[..at - digits];
        spaced && digits > 0 && before.len() > 1 && before.ends_with(b":")
    })
}

fn ruby_start(line: &[u8]) -> bool {
    ruby_location(line)
}

fn ruby_frame(line: &[u8]) -> bool {
    let spaces = line.iter().take_while(|&&byte| is_space(byte)).count();
    let Some(rest) = line[spaces..].strip_prefix(b"from") else { return false };
    spaces > 0 && rest.first().is_some_and(|&byte| is_space(byte)) && ruby_location(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Number of lines that the rule joins to the first.
    fn joined(rule: &Rule, lines: &[&str]) -> usize {
        let mut state = rule.start(lines[0].as_bytes()).unwrap_or_else(|| panic!("{} begins nothing", lines[0]));
        for (count, line) in lines[1..].iter().enumerate() {
            if state == State::Done {
                return count;
            }
            match rule.next(state, line.as_bytes()) {
                Some(next) => state = next,
                None => return count,
            }
        }
        lines.len() - 1
    }

    #[test]
    fn java_with_causes_and_omitted_frames() {
        let lines = [
            "2026 ERROR java.lang.IllegalStateException: boom",
            "\tat com.x.A.b(A.java:10)",
            "    at com.x.A.c(A.java:20)",
            "Caused by: java.io.IOException: disk",
            "\t... 12 more",
            "\tSuppressed: x.YException: z",
            "\t\tat com.x.A.b(A.java:10)",
            "\t... 3 common frames omitted",
            "INFO next line",
        ];
        assert_eq!(joined(&Rule::Java, &lines), 7);
        assert_eq!(joined(&Rule::Java, &["xException: a; ", "nested exception is: ", "\tjava.io.IOException: x", "\tat a", "end"]), 3);
        assert!(Rule::Java.start(b"Exception: at the very start").is_none());
        assert!(Rule::Java.start(b"java.lang.NullPointerException").is_none());
    }

    #[test]
    fn go_with_signal_and_two_goroutines() {
        let lines = [
            "panic: runtime error: invalid memory address",
            "[signal SIGSEGV: segmentation violation]",
            "",
            "goroutine 1 [running]:",
            "github.com/x/y.(*Server).Serve(0xc000, 0x1)",
            "\t/app/main.go:10 +0x1d",
            "created by main.start",
            "\t/app/main.go:20",
            "",
            "goroutine 7 [chan receive, 2 minutes]:",
            "main.main()",
            "\t/app/main.go:1",
            "exit status 2",
        ];
        assert_eq!(joined(&Rule::Go, &lines), 11);
        assert!(Rule::Go.start(b"dontpanic: x").is_none());
        assert_eq!(Rule::Go.start(b"x http: panic serving 1.2.3.4"), Some(State::GoGoroutine));
    }

    #[test]
    fn python_and_ruby() {
        let lines =
            ["Traceback (most recent call last):", "  File \"a.py\", line 1, in <module>", "    f()", "pkg.ValueError: bad", "done: x"];
        assert_eq!(joined(&Rule::Python, &lines), 3);
        let lines = ["/app/x.rb:10:in `f': boom (RuntimeError)", "\tfrom /app/y.rb:2:in `g'", "\tfrom /app/z.rb:3:in `<main>'", "ok"];
        assert_eq!(joined(&Rule::Ruby, &lines), 2);
    }

    #[test]
    fn user_rules_with_and_without_continuation() {
        let rule = |next: Option<&str>| {
            Rule::User(UserRule {
                name: "u".into(),
                start: Regex::new(r"^\d{4}").unwrap(),
                next: next.map(|next| Regex::new(next).unwrap()),
            })
        };
        assert_eq!(joined(&rule(None), &["2026 a", "b", "c", "2026 d"]), 2);
        assert_eq!(joined(&rule(Some(r"^\s")), &["2026 a", " b", "c"]), 1);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(prop_oneof![Just(b':'), Just(b'.'), Just(b'('), Just(b' '), any::<u8>()], 0..40)) {
            for rule in [Rule::Java, Rule::Go, Rule::Python, Rule::Ruby] {
                rule.start(&line);
                for state in [State::JavaException, State::JavaNested, State::GoGoroutine, State::GoFunction, State::GoFile, State::Python, State::Ruby] {
                    rule.next(state, &line);
                }
            }
        }
    }
}
