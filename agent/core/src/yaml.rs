//! YAML that people and parsers read: comments that stay comments, and values as JSON.

use serde_json::Value;

/// One line, whatever the text has in it.
pub(crate) fn comment(out: &mut String, text: &str) {
    out.push_str("# ");
    out.extend(text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }));
    out.push('\n');
}

/// A value as JSON that is YAML too: JSON lets characters stand that YAML 1.2 (section 5.1) wants escaped.
pub(crate) fn printable(value: &Value) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}
