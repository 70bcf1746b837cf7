//! `stanchion-core` decides and touches nothing: no runtime, no file system, no clock, no AWS below it or in it.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn nothing_below_core_has_effects() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--package", "stanchion-core", "--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).unwrap();
    let crates: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains(&"serde_json"), "the tree was not read: {text}");
    for name in &crates {
        let forbidden = ["tokio", "mio", "nix", "rustix", "hyper", "notify", "socket2", "kube", "aya", "rtnetlink", "chrono", "time"];
        assert!(!forbidden.contains(name) && !name.starts_with("aws-") && !name.starts_with("tokio-"), "stanchion-core depends on {name}");
    }
}

/// Names of modules that are only compiled into tests; those may read their data.
fn test_modules(directory: &Path) -> Vec<String> {
    let mut modules = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            modules.extend(test_modules(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            let declared = lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]");
            modules.extend(declared.filter_map(|pair| pair[1].strip_prefix("mod ")?.strip_suffix(';').map(str::to_owned)));
        }
    }
    modules
}

#[test]
fn core_itself_reads_no_clock_file_or_environment() {
    let sources = root().join("agent/core/src");
    let test_modules = test_modules(&sources);
    let mut pending = vec![sources];
    let mut seen = 0;
    while let Some(path) = pending.pop() {
        if path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| test_modules.iter().any(|module| module == stem)) {
            continue;
        }
        if path.is_dir() {
            pending.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        // Tests may read their data.
        if !name.ends_with(".rs") || name.contains("test") || path.iter().any(|part| part == "tests") {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for forbidden in [
            "std::fs",
            "std::env::",
            "Instant::now",
            "SystemTime::now",
            "Timestamp::now",
            "Zoned::now",
            "std::process",
            "TcpStream",
            "thread::",
        ] {
            for (index, line) in code.lines().enumerate() {
                let comment = line.trim_start().starts_with("//");
                assert!(comment || !line.contains(forbidden), "{}:{}: {forbidden}", path.display(), index + 1);
            }
        }
    }
    assert!(seen > 10, "the sources were not found");
}
