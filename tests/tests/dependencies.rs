//! What is built in: each crate under a licence that Apache-2.0 software may carry, and from crates.io with its checksum.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Licences without duties beyond naming the author.
const ALLOWED: [&str; 10] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "ISC",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "Unlicense",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Whether an expression of crates.io can be met: every part of an AND by one of its alternatives. `/` is the old form of OR.
fn permitted(expression: &str) -> bool {
    let part_is = |part: &str| {
        let alternatives = part.trim().trim_start_matches('(').trim_end_matches(')').replace('/', " OR ");
        alternatives.split(" OR ").any(|licence| ALLOWED.contains(&licence.trim()))
    };
    !expression.is_empty() && expression.split(" AND ").all(part_is)
}

#[test]
fn every_licence_is_permitted() {
    assert!(permitted("(MIT OR Apache-2.0) AND Unicode-3.0") && permitted("GPL-2.0/MIT") && permitted("Apache-2.0 / MIT"));
    assert!(!permitted("GPL-3.0-only") && !permitted("MIT AND GPL-2.0") && !permitted(""));
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--workspace", "--edges", "normal,build", "--prefix", "none", "--no-dedupe"])
        .args(["--format", "{p}|{l}"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).unwrap();
    // Crates of the workspace are named with their directory; an empty line parts their trees.
    let foreign: std::collections::BTreeSet<&str> = text.lines().filter(|line| !line.is_empty() && !line.contains(" (/")).collect();
    assert!(foreign.len() > 200, "the tree was not read: {text}");
    let refused: Vec<&&str> = foreign.iter().filter(|line| !line.split_once('|').is_some_and(|(_, licence)| permitted(licence))).collect();
    assert!(refused.is_empty(), "not on the list of licences: {refused:?}");
}

#[test]
fn every_crate_is_from_crates_io_and_its_content_is_fixed() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let packages: Vec<&str> = lock.split("[[package]]").skip(1).collect();
    let foreign: Vec<&&str> = packages.iter().filter(|package| package.contains("\nsource = ")).collect();
    assert!(foreign.len() > 200 && packages.len() - foreign.len() < 20, "{} of {}", foreign.len(), packages.len());
    for package in foreign {
        assert!(package.contains("source = \"registry+https://github.com/rust-lang/crates.io-index\""), "{package}");
        assert!(package.contains("\nchecksum = \""), "{package}");
    }
}
