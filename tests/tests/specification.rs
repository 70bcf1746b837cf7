//! SPECIFICATION.md and the threats of deploy/SECURITY.md name tests and benches that exist.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A Rust module's text, whether it is a file or a directory (then of all files in it).
fn module(path: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(path.with_extension("rs")) {
        return Some(text + &module_files(path));
    }
    path.is_dir().then(|| module_files(path))
}

fn module_files(directory: &Path) -> String {
    let Ok(entries) = fs::read_dir(directory) else { return String::new() };
    entries
        .flatten()
        .filter_map(|entry| if entry.path().is_dir() { Some(module_files(&entry.path())) } else { fs::read_to_string(entry.path()).ok() })
        .collect()
}

/// Whether a path names a file or directory of modules, or a function or inline module in one.
fn is_there(segments: &[&str]) -> bool {
    let last = segments[segments.len() - 1];
    let bases = [
        "tests/tests",
        "tests/src",
        "agent/daemon/tests",
        "agent/core/tests",
        "agent/core/src",
        "agent/daemon/src",
        "agent/netlink/src",
        "agent/src",
        "proto/src",
        "cni-plugin/src",
    ];
    bases.iter().any(|base| {
        (1..=segments.len()).any(|depth| {
            let text = module(&root().join(base).join(segments[..depth].join("/")));
            text.is_some_and(|text| {
                depth == segments.len() || text.contains(&format!("fn {last}(")) || text.contains(&format!("mod {last}"))
            })
        })
    })
}

/// What is wrong with a name in the column "shown by"; `None` when what it names is there.
fn fault(name: &str) -> Option<String> {
    // A variable may stand with a value.
    let name = name.split_once('=').filter(|_| !name.contains(' ')).map_or(name, |(variable, _)| variable);
    let there = if let Some(bench) = name.strip_prefix("bench ") {
        let registered = fs::read_to_string(root().join("tests/src/bin/bench.rs")).unwrap().to_lowercase();
        module(&root().join("tests/src/bench").join(bench)).is_some() && registered.contains(bench)
    } else if let Some(command) = name.strip_prefix("stanchion ") {
        let verb = command.split(' ').next().unwrap();
        module(&root().join("agent/src"))
            .is_some_and(|text| text.to_lowercase().contains(&format!("{verb}(")) || text.to_lowercase().contains(&format!("{verb} {{")))
    } else if let Some(task) = name.strip_prefix("cargo xtask ") {
        module(&root().join("xtask/src")).is_some_and(|text| text.to_lowercase().contains(task.split(' ').next().unwrap()))
    } else if name.contains('/') {
        root().join(name).exists()
    } else if name.starts_with("--") {
        module(&root().join("tests/src/bin")).is_some_and(|text| text.contains(&format!("{}:", name.trim_start_matches('-'))))
    } else if name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_') {
        module_files(&root().join("tests")).contains(name) || module_files(&root().join("agent")).contains(name)
    } else {
        is_there(&name.split("::").collect::<Vec<_>>())
    };
    (!there).then(|| format!("`{name}` does not exist"))
}

/// The rows of every table of a page, without the heads, which stand above a line of dashes.
fn rows(text: &str) -> Vec<Vec<String>> {
    let is_rule = |line: &str| line.starts_with("|---");
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    let lines: Vec<&str> = text.lines().chain([""]).collect();
    let is_row = |pair: &&[&str]| pair[0].starts_with('|') && !is_rule(pair[0]) && !is_rule(pair[1]);
    lines.windows(2).filter(is_row).map(|pair| cells(pair[0])).collect()
}

fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_test_and_bench_that_the_specification_names_exists() {
    let rows = rows(&fs::read_to_string(root().join("SPECIFICATION.md")).unwrap());
    assert!(rows.len() > 10, "the table was not found: {rows:?}");
    let mut faults = Vec::new();
    for row in &rows {
        let shown_by = row.get(2).unwrap_or_else(|| panic!("a row without the column \"shown by\": {row:?}"));
        if names(shown_by).is_empty() {
            faults.push(format!("{:?} names neither test nor bench", row[0]));
        }
        faults.extend(names(shown_by).into_iter().filter_map(fault));
    }
    assert!(faults.is_empty(), "SPECIFICATION.md: {}", faults.join("; "));
}

#[test]
fn every_defence_of_the_threat_model_has_tests_that_exist() {
    let page = fs::read_to_string(root().join("deploy/SECURITY.md")).unwrap();
    let section = page.split("\n## ").find_map(|section| section.strip_prefix("Threats\n")).unwrap();
    let rows = rows(section);
    let mut faults = Vec::new();
    for row in &rows {
        let [_, what, defence, tests] = row.as_slice() else { panic!("not four columns: {row:?}") };
        assert!(!what.is_empty() && !defence.is_empty(), "{row:?}");
        if names(tests).is_empty() {
            faults.push(format!("{what:?} names no test"));
        }
        faults.extend(names(tests).into_iter().filter_map(fault));
    }
    assert!(faults.is_empty(), "deploy/SECURITY.md: {}", faults.join("; "));
    for who in ["hostile pod", "hostile API object", "hostile local user", "compromised telemetry container"] {
        assert!(rows.iter().any(|row| row[0] == who), "no threat of a {who} is named");
    }
}

#[test]
fn a_name_of_nothing_is_found_out() {
    for name in [
        "bench nothing",
        "no_such_binary",
        "scenario_restart::no_such_test",
        "policy::nothing::at_all",
        "stanchion juggle",
        "NO_SUCH_VARIABLE_X",
        "deploy/NOTHING.md",
        "--juggle",
    ] {
        // This file holds the last one itself; it is spelt apart here so that it is not found.
        let name = name.replace("VARIABLE_X", &["VARIABLE", "_Y"].concat());
        assert!(fault(&name).is_some(), "{name} passes for something that exists");
    }
}
