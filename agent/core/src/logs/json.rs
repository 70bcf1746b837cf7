//! JSON string escaping on the hot path: once for a body, twice for a JSON document inside a body.
//!
//! Most bytes of a log line need no escape, so a line is copied in runs between the bytes that do. Bytes that are not UTF-8
//! become U+FFFD, one for each maximal ill-formed part, as CloudWatch Logs takes only UTF-8.

/// U+FFFD in UTF-8.
const REPLACEMENT: &str = "\u{FFFD}";
const HEX: &[u8; 16] = b"0123456789abcdef";

/// Width of the block that the scan tests at once; LLVM turns the loop over it into vector compares.
const BLOCK: usize = 32;

/// Appends `bytes` as the inside of a JSON string.
pub fn escape(out: &mut Vec<u8>, bytes: &[u8]) {
    each_valid(bytes, |text| each_run(text, out, once));
}

/// Appends `bytes` as the inside of a JSON string that is itself inside a JSON string, and returns how long the inner form
/// is: the bytes that CloudWatch Logs counts.
pub fn escape_twice(out: &mut Vec<u8>, bytes: &[u8]) -> usize {
    let mut inner = 0;
    each_valid(bytes, |text| {
        inner += text.len();
        each_run(text, out, |out, byte| inner += twice(out, byte) - 1);
    });
    inner
}

/// Length of `bytes` once they are valid UTF-8: what CloudWatch Logs counts of a raw line.
pub fn valid_len(bytes: &[u8]) -> usize {
    let mut len = 0;
    each_valid(bytes, |text| len += text.len());
    len
}

/// Calls `piece` with the valid parts and a replacement for each invalid one.
fn each_valid(bytes: &[u8], mut piece: impl FnMut(&[u8])) {
    // The check of the whole is several times faster than walking chunks, and nearly every line passes it.
    if std::str::from_utf8(bytes).is_ok() {
        return piece(bytes);
    }
    for chunk in bytes.utf8_chunks() {
        piece(chunk.valid().as_bytes());
        if !chunk.invalid().is_empty() {
            piece(REPLACEMENT.as_bytes());
        }
    }
}

/// Copies runs that need no escape and calls `special` for each byte between them.
fn each_run(mut text: &[u8], out: &mut Vec<u8>, mut special: impl FnMut(&mut Vec<u8>, u8)) {
    loop {
        let run = plain_prefix(text);
        out.extend_from_slice(&text[..run]);
        let Some(&byte) = text.get(run) else { return };
        special(out, byte);
        text = &text[run + 1..];
    }
}

fn is_special(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// How many leading bytes need no escape.
pub fn plain_prefix(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(block) = text.get(at..at + BLOCK) {
        // No early exit inside the block: that is what lets it be one vector compare.
        if block.iter().fold(false, |hit, &byte| hit | is_special(byte)) {
            break;
        }
        at += BLOCK;
    }
    at + text[at..].iter().position(|&byte| is_special(byte)).unwrap_or(text.len() - at)
}

fn short_escape(byte: u8) -> Option<u8> {
    match byte {
        b'"' | b'\\' => Some(byte),
        b'\n' => Some(b'n'),
        b'\t' => Some(b't'),
        b'\r' => Some(b'r'),
        0x08 => Some(b'b'),
        0x0c => Some(b'f'),
        _ => None,
    }
}

fn hex(byte: u8) -> [u8; 4] {
    [b'0', b'0', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]
}

fn once(out: &mut Vec<u8>, byte: u8) {
    out.push(b'\\');
    match short_escape(byte) {
        Some(short) => out.push(short),
        None => {
            out.push(b'u');
            out.extend_from_slice(&hex(byte));
        }
    }
}

/// Returns the length of the inner escape.
fn twice(out: &mut Vec<u8>, byte: u8) -> usize {
    match short_escape(byte) {
        Some(short @ (b'"' | b'\\')) => {
            out.extend_from_slice(&[b'\\', b'\\', b'\\', short]);
            2
        }
        Some(short) => {
            out.extend_from_slice(&[b'\\', b'\\', short]);
            2
        }
        None => {
            out.extend_from_slice(b"\\\\u");
            out.extend_from_slice(&hex(byte));
            6
        }
    }
}

/// Appends a decimal number.
pub fn integer(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reference(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    proptest! {
        #[test]
        fn once_reads_back_as_the_lossy_text(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut out = vec![b'"'];
            escape(&mut out, &bytes);
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), reference(&bytes));
            prop_assert_eq!(valid_len(&bytes), reference(&bytes).len());
        }

        #[test]
        fn twice_is_serde_json_applied_twice(text in "\\PC{0,80}|[\\x00-\\x7f]{0,80}") {
            let mut out = vec![b'"'];
            out.extend_from_slice(b"\\\"");
            let inner = escape_twice(&mut out, text.as_bytes());
            out.extend_from_slice(b"\\\"\"");
            let message: String = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(&message, &serde_json::to_string(&text).unwrap());
            prop_assert_eq!(inner + 2, message.len());
        }

        #[test]
        fn integers_print_like_the_standard_library(value in any::<i64>()) {
            let mut out = Vec::new();
            integer(&mut out, value);
            prop_assert_eq!(String::from_utf8(out).unwrap(), value.to_string());
        }

        #[test]
        fn plain_prefix_stops_at_the_first_special_byte(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let expected = bytes.iter().position(|&byte| is_special(byte)).unwrap_or(bytes.len());
            prop_assert_eq!(plain_prefix(&bytes), expected);
        }
    }
}
