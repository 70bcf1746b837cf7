//! Where `unsafe` is, and that each place says why it is sound.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Directories (or files) that may have it, and what for.
const PLACES: [(&str, &str); 7] = [
    ("agent/daemon/src/netpol", "bpf system calls, maps of plain data, ring buffers"),
    ("agent/netlink/src", "ioctls and socket options without a safe wrapper, the state and the memory of the calling process"),
    ("ebpf/abi/src", "the mark of plain data"),
    ("ebpf/programs/src", "what the verifier checks, not the compiler"),
    ("tests/src/datapath", "the same maps and system calls, by test"),
    ("tests/src/refusals.rs", "a seccomp filter and its notifications"),
    ("tests/tests/datapath_sockets.rs", "raw sockets"),
];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Lines with an unsafe block, function, implementation or trait. Attributes and words within texts are none.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe trait ", "unsafe extern "].iter().any(|form| code.contains(form))
        && !code.contains('"')
}

/// Whether the comment right above the statement, or in it above the line, gives the reason.
fn is_argued(lines: &[&str], at: usize) -> bool {
    let is_reason = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    // A reason covers the statement below it: nothing between them ends one.
    let mut above = lines[..at].iter().rev().map(|line| line.trim()).take(12);
    is_reason(lines[at]) || above.find(|line| is_reason(line) || line.is_empty() || *line == "}").is_some_and(is_reason)
}

#[test]
fn unsafe_code_is_where_it_may_be_and_says_why_it_is_sound() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    sources(root, &mut files);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for path in files.iter().filter(|path| !path.ends_with("unsafe_inventory.rs")) {
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let name = path.strip_prefix(root).unwrap();
        for at in (0..lines.len()).filter(|at| is_unsafe(lines[*at])) {
            match PLACES.iter().find(|(place, _)| name.starts_with(place)) {
                Some((place, _)) => *counts.entry(place).or_default() += 1,
                None => wrong.push(format!("{}:{}: not a place for unsafe code", name.display(), at + 1)),
            }
            if !is_argued(&lines, at) {
                wrong.push(format!("{}:{}: no `SAFETY:` comment above it: {}", name.display(), at + 1, lines[at].trim()));
            }
        }
    }
    for (place, what) in PLACES {
        println!("{:>4}  {place}: {what}", counts.get(place).copied().unwrap_or(0));
        assert!(counts.contains_key(place), "{place} has no unsafe code any more: take it off the list");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_reason_is_one_only_for_what_follows_it() {
    let text =
        "// SAFETY: a\nlet x =\n    unsafe { f() };\n\nlet y = unsafe { g() };\n/// # Safety\n/// b\nunsafe fn h() {}\n}\nunsafe { i() }";
    let lines: Vec<&str> = text.lines().collect();
    let argued = (0..lines.len()).filter(|at| is_unsafe(lines[*at])).map(|at| (at, is_argued(&lines, at)));
    assert_eq!(argued.collect::<Vec<_>>(), [(2, true), (4, false), (7, true), (9, false)]);
    assert!(!is_unsafe("#[unsafe(no_mangle)]") && !is_unsafe("// unsafe { x }") && !is_unsafe("\"script-src 'unsafe-inline'\""));
}
