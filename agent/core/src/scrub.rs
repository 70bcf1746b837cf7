//! Takes secrets out of text that leaves the node: support bundles.
//!
//! Nothing that the agent writes holds a secret; other programs' configurations may. What looks like one is replaced, so
//! that a person can send the bundle without reading all of it.

/// What stands where a secret was.
const REMOVED: &str = "<removed>";
/// Names whose value is a secret, wherever they appear in a longer name.
const NAMES: [&str; 11] = [
    "token",
    "secret",
    "password",
    "passwd",
    "authorization",
    "credential",
    "client-key",
    "private-key",
    "privatekey",
    "access-key",
    "accesskey",
];

/// The text without values of telling names, PEM keys, AWS access keys, JSON web tokens and passwords in URLs.
pub fn scrub(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut in_pem = false;
    for line in text.split_inclusive('\n') {
        if line.contains("-----BEGIN") && line.contains("PRIVATE KEY") {
            in_pem = !line.contains("-----END");
            clean.push_str(REMOVED);
            clean.push('\n');
        } else if in_pem {
            in_pem = !line.contains("-----END");
        } else {
            clean.push_str(&words(&values(line)));
        }
    }
    clean
}

/// `name: value`, `name=value`, `"name":"value"` and `--name value` of telling names.
fn values(line: &str) -> String {
    let lower = line.to_ascii_lowercase().replace('_', "-");
    let mut clean = String::with_capacity(line.len());
    let mut from = 0;
    while let Some((at, name)) = NAMES.iter().filter_map(|name| Some((from + lower.get(from..)?.find(name)?, *name))).min() {
        let rest_of_name = lower[at..].find(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).map_or(lower.len(), |end| at + end);
        let after = &line[rest_of_name..];
        // A quote that closes the name, then a separator.
        let unquoted = after.trim_start_matches(['"', '\'']);
        let value = unquoted.trim_start_matches([' ', '\t']);
        let separated = value.strip_prefix(':').or_else(|| value.strip_prefix('='));
        let value = separated.map(|value| value.trim_start_matches([' ', '\t']));
        let start = match value {
            Some(value) => line.len() - value.len(),
            None => {
                clean.push_str(&line[from..rest_of_name.max(at + name.len())]);
                from = rest_of_name.max(at + name.len());
                continue;
            }
        };
        clean.push_str(&line[from..start]);
        let value = &line[start..];
        from = start + secret_len(value);
        if from > start {
            clean.push_str(REMOVED);
        }
    }
    clean.push_str(&line[from..]);
    clean
}

/// How long the value is: to the closing quote, or to the end of an unquoted word; a scheme word (`Bearer`) belongs to it.
/// An opened object or list is no value.
fn secret_len(value: &str) -> usize {
    let Some(first) = value.chars().next() else { return 0 };
    if matches!(first, '"' | '\'') {
        return value[1..].find(first).map_or(value.trim_end().len(), |end| end + 2);
    }
    if matches!(first, '{' | '[' | '|' | '>') || value.starts_with("null") {
        return 0;
    }
    let end = |text: &str| text.find(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | '}' | ']' | '&')).unwrap_or(text.len());
    let word = end(value);
    match value[..word].to_ascii_lowercase().as_str() {
        "bearer" | "basic" => {
            let rest = value[word..].trim_start_matches(' ');
            value.len() - rest.len() + end(rest)
        }
        _ => word,
    }
}

/// Words that are secrets whatever their name.
fn words(line: &str) -> String {
    let boundary = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '/' | '@' | '+' | '='));
    let mut clean = String::with_capacity(line.len());
    for piece in line.split_inclusive(boundary) {
        let (word, end) = match piece.char_indices().next_back() {
            Some((at, c)) if boundary(c) => piece.split_at(at),
            _ => (piece, ""),
        };
        match word {
            word if is_access_key(word) || is_web_token(word) => clean.push_str(REMOVED),
            word => match url_password(word) {
                Some((before, after)) => {
                    clean.push_str(before);
                    clean.push_str(REMOVED);
                    clean.push_str(after);
                }
                None => clean.push_str(word),
            },
        }
        clean.push_str(end);
    }
    clean
}

/// `AKIA` or `ASIA` and 16 capitals or digits.
fn is_access_key(word: &str) -> bool {
    word.len() == 20
        && (word.starts_with("AKIA") || word.starts_with("ASIA"))
        && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// Three parts of base64, the first one a JSON object.
fn is_web_token(word: &str) -> bool {
    word.find("eyJ").is_some_and(|at| word[at..].matches('.').count() == 2 && word.len() - at > 40)
}

/// `scheme://user:password@host` around the password.
fn url_password(word: &str) -> Option<(&str, &str)> {
    let authority = word.find("://")? + 3;
    let at = authority + word[authority..].find('@')?;
    let colon = authority + word[authority..at].find(':')?;
    Some((&word[..=colon], &word[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let token = format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", "e".repeat(40));
        for (text, clean) in [
            ("token: abc\n", "token: <removed>\n"),
            ("{\"apiToken\":\"a b\",\"x\":1}", "{\"apiToken\":<removed>,\"x\":1}"),
            ("AWS_SECRET_ACCESS_KEY=wJalr/x+y region=eu", "AWS_SECRET_ACCESS_KEY=<removed> region=eu"),
            ("Authorization: Bearer abc.def next", "Authorization: <removed> next"),
            ("key AKIAIOSFODNN7EXAMPLE, more", "key <removed>, more"),
            ("https://u:p4ss@host/path", "https://u:<removed>@host/path"),
            ("{\"secrets\": [1]}", "{\"secrets\": [1]}"),
            ("the token expired", "the token expired"),
            ("a\n-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY-----\nb\n", "a\n<removed>\nb\n"),
        ] {
            assert_eq!(scrub(text), clean, "{text}");
        }
        assert_eq!(scrub(&format!("seen {token} here")), "seen <removed> here");
        let ipam = r#"{"key":{"container_id":"abc","network":"aws-cni"},"address":"10.0.0.1"}"#;
        assert_eq!(scrub(ipam), ipam, "the agent's own documents stay whole");
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic_and_no_named_secret_survives(before in "\\PC{0,20}", secret in "[a-z0-9]{8,20}Zq", after in "\\PC{0,20}") {
            scrub(&before);
            let text = format!("{before}\npassword = \"{secret}\" {after}\nclient_key: {secret}\n");
            prop_assert!(!scrub(&text).contains(&secret), "{}", scrub(&text));
        }
    }
}
