//! JSON string escaping on the hot path: once for a body, twice for a JSON document inside a body.
//!
//! Most bytes of a log line need no escape, so a line is copied in runs between the bytes that do. Bytes that are not UTF-8
//! become U+FFFD, one for each maximal ill-formed part, as CloudWatch Logs takes only UTF-8.

/// U+FFFD in UTF-8.
const REPLACEMENT: &str = "\u{FFFD}";
const HEX: &[u8; 16] = b"0123456789abcdef";

/// Width of the block that the scan tests at once; LLVM turns the loop over it into vector compares.
const BLOCK: usize = 32;
/// Width of what is looked at inside a block that holds a special byte.
const WORD: usize = size_of::<u64>();
/// Longest form of one byte: `\\u001f`.
const LONGEST: usize = 7;

/// What a special byte becomes: up to [`LONGEST`] bytes, and how many in the last place. A fixed width is one store.
type Form = [u8; LONGEST + 1];
/// By byte; only those that [`is_special`] have one.
type Forms = [Form; b'\\' as usize + 1];

/// Inside a JSON string.
static ONCE: Forms = forms(1);
/// Inside a JSON string inside a JSON string.
static TWICE: Forms = forms(2);

/// Appends `bytes` as the inside of a JSON string, and returns their length once they are valid UTF-8: what CloudWatch Logs counts of a raw
/// line.
pub fn escape(out: &mut Vec<u8>, bytes: &[u8]) -> usize {
    let mut len = 0;
    each_valid(bytes, |text| {
        escape_valid(out, text.as_bytes(), &ONCE);
        len += text.len();
    });
    len
}

/// As [`escape`], for what is known to be text.
pub fn escape_text(out: &mut Vec<u8>, text: &str) {
    escape_valid(out, text.as_bytes(), &ONCE);
}

/// Appends `bytes` as the inside of a JSON string that is itself inside a JSON string, and returns how long the inner form
/// is: the bytes that CloudWatch Logs counts.
pub fn escape_twice(out: &mut Vec<u8>, bytes: &[u8]) -> usize {
    let mut inner = 0;
    each_valid(bytes, |text| inner += text.len() + escape_valid(out, text.as_bytes(), &TWICE));
    inner
}

/// Calls `piece` with the valid parts and a replacement for each invalid one.
fn each_valid(bytes: &[u8], mut piece: impl FnMut(&str)) {
    // The check of the whole is several times faster than walking chunks, and nearly every line passes it.
    if let Ok(text) = std::str::from_utf8(bytes) {
        return piece(text);
    }
    for chunk in bytes.utf8_chunks() {
        piece(chunk.valid());
        if !chunk.invalid().is_empty() {
            piece(REPLACEMENT);
        }
    }
}

/// Copies blocks that need no escape as they are, and the others word by word. Returns by how much one escape makes the text longer.
fn escape_valid(out: &mut Vec<u8>, mut text: &[u8], forms: &Forms) -> usize {
    let mut grown = 0;
    loop {
        let plain = plain_blocks(text);
        out.extend_from_slice(&text[..plain]);
        text = &text[plain..];
        if text.is_empty() {
            return grown;
        }
        let (block, rest) = text.split_at(text.len().min(BLOCK));
        grown += escape_block(out, block, forms);
        text = rest;
    }
}

/// At most [`BLOCK`] bytes. What is written goes through a buffer that is always long enough, in stores of one word each of which only the
/// beginning counts: the next one overwrites the rest.
fn escape_block(out: &mut Vec<u8>, block: &[u8], forms: &Forms) -> usize {
    let mut written = [0; BLOCK * LONGEST + WORD];
    let (mut at, mut grown) = (0, 0);
    for bytes in block.chunks(WORD) {
        let mut word = [b' '; WORD];
        word[..bytes.len()].copy_from_slice(bytes);
        let value = u64::from_le_bytes(word);
        let mut special = special_bytes(value);
        let mut from = 0;
        while special != 0 {
            let place = special.trailing_zeros() as usize / 8;
            written[at..at + WORD].copy_from_slice(&(value >> (8 * from)).to_le_bytes());
            at += place - from;
            let form = &forms[usize::from(word[place])];
            written[at..at + WORD].copy_from_slice(form);
            at += usize::from(form[LONGEST]);
            // One backslash more, or `\\u00` and one digit.
            grown += if form[LONGEST] > 4 { 5 } else { 1 };
            from = place + 1;
            special &= special - 1;
        }
        if from < bytes.len() {
            written[at..at + WORD].copy_from_slice(&(value >> (8 * from)).to_le_bytes());
            at += bytes.len() - from;
        }
    }
    out.extend_from_slice(&written[..at]);
    grown
}

const fn is_special(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// The highest bit of each byte that [`is_special`], exactly: no byte's sum reaches the next.
const fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    const LOW: u64 = ONES * 0x7f;
    const HIGH: u64 = ONES * 0x80;
    const fn is_zero(word: u64) -> u64 {
        !(((word & LOW) + LOW) | word)
    }
    let control = !((word & LOW) + ONES * 0x60) & !word;
    (control | is_zero(word ^ (ONES * b'"' as u64)) | is_zero(word ^ (ONES * b'\\' as u64))) & HIGH
}

/// How many leading bytes, in whole blocks, need no escape.
fn plain_blocks(text: &[u8]) -> usize {
    let mut at = 0;
    // No early exit inside the block: that is what lets it be one vector compare.
    while text.get(at..at + BLOCK).is_some_and(|block| !block.iter().fold(false, |hit, &byte| hit | is_special(byte))) {
        at += BLOCK;
    }
    at
}

/// How many leading bytes need no escape.
pub fn plain_prefix(text: &[u8]) -> usize {
    // Most strings of an object are short.
    let first = text.first_chunk().map_or(0, |word| special_bytes(u64::from_le_bytes(*word)));
    if first != 0 {
        return first.trailing_zeros() as usize / 8;
    }
    let mut at = plain_blocks(text);
    while let Some(word) = text[at..].first_chunk() {
        let special = special_bytes(u64::from_le_bytes(*word));
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += WORD;
    }
    at + text[at..].iter().position(|&byte| is_special(byte)).unwrap_or(text.len() - at)
}

const fn short_escape(byte: u8) -> Option<u8> {
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

/// The forms of a byte escaped `times`, 1 or 2.
const fn forms(times: usize) -> Forms {
    let mut forms = [[0; LONGEST + 1]; b'\\' as usize + 1];
    let mut byte = 0;
    while byte <= b'\\' {
        if is_special(byte) {
            let inner = match short_escape(byte) {
                Some(short) => [b'\\', short, 0, 0, 0, 0],
                None => [b'\\', b'u', b'0', b'0', HEX[(byte >> 4) as usize], HEX[(byte & 15) as usize]],
            };
            let (mut form, mut len, mut at) = ([0; LONGEST + 1], 0, 0);
            while at < inner.len() && inner[at] != 0 {
                if times == 2 && is_special(inner[at]) {
                    form[len] = b'\\';
                    len += 1;
                }
                form[len] = inner[at];
                len += 1;
                at += 1;
            }
            form[LONGEST] = len as u8;
            forms[byte as usize] = form;
        }
        byte += 1;
    }
    forms
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
            let len = escape(&mut out, &bytes);
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), reference(&bytes));
            prop_assert_eq!(len, reference(&bytes).len());
        }

        #[test]
        fn twice_is_serde_json_applied_twice(text in "\\PC{0,80}|[\\x00-\\x7f]{0,80}|([a-z]{0,12}[\"\\\\]){0,12}") {
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
        fn plain_prefix_stops_at_the_first_special_byte(bytes in proptest::collection::vec(prop_oneof![20 => 0x20_u8..=0xff, 1 => any::<u8>()], 0..200)) {
            let expected = bytes.iter().position(|&byte| is_special(byte)).unwrap_or(bytes.len());
            prop_assert_eq!(plain_prefix(&bytes), expected);
        }
    }
}
