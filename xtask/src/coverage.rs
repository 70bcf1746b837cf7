//! Which lines the tests reach: the workspace's crates are compiled with counters, others are taken as they are built.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{build, ui};

/// What is counted: (name, sources).
const CRATES: [(&str, &str); 6] = [
    ("agent/core", "agent/core/src/"),
    ("agent/netlink", "agent/netlink/src/"),
    ("agent/daemon", "agent/daemon/src/"),
    ("agent/aws", "agent/aws/src/"),
    ("agent", "agent/src/"),
    ("cni-plugin", "cni-plugin/src/"),
];

/// Counters live in a file that is mapped, as scenarios end agents and plugins with SIGKILL.
const WRAPPER: &str = "#!/bin/sh\nexec \"$@\" -C instrument-coverage -C llvm-args=-runtime-counter-relocation\n";

/// Runs the tests and leaves `target/coverage/{report.txt,lcov.info}`; the exit code is the tests'.
///
/// # Errors
/// The tools are missing, or the workspace does not compile.
pub(crate) fn run(root: &Path, filter: &[String]) -> Result<ExitCode> {
    let tools = tools()?;
    let directory = root.join("target/coverage");
    let raw = directory.join("raw");
    if raw.exists() {
        fs::remove_dir_all(&raw).with_context(|| format!("remove {}", raw.display()))?;
    }
    fs::create_dir_all(&raw).with_context(|| format!("make {}", raw.display()))?;
    let wrapper = directory.join("rustc");
    fs::write(&wrapper, WRAPPER).and_then(|()| fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)))?;
    let counted = |command: &mut Command| {
        command.current_dir(root).env("RUSTC_WORKSPACE_WRAPPER", &wrapper);
        // %c: mapped; %m: one file for each binary, which all of its processes share.
        command.env("LLVM_PROFILE_FILE", raw.join("%c%m.profraw"));
    };

    let mut binaries = build::command(root, build::Profile::Dev);
    counted(&mut binaries);
    ui::step("build the binaries with counters", &mut binaries)?;
    let mut tests = build::cargo(root);
    tests.args(["nextest", "run", "--workspace", "--no-fail-fast"]).args(filter);
    counted(&mut tests);
    let passed = tests.status().context("start cargo nextest")?.success();

    let profile = directory.join("tests.profdata");
    let mut merge = Command::new(tools.join("llvm-profdata"));
    merge.args(["merge", "--sparse", "--failure-mode=all", "-o"]).arg(&profile).args(files(&raw)?);
    ui::step("merge the counters", &mut merge)?;

    let lcov = directory.join("lcov.info");
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--format=lcov", "--skip-functions", "--ignore-filename-regex=/(registry|rustc|target)/"]);
    export.arg("--instr-profile").arg(&profile);
    let mut list = build::cargo(root);
    list.args(["nextest", "list", "--workspace", "--list-type=binaries-only", "--message-format=json"]);
    counted(&mut list);
    for object in objects(root, &mut list)? {
        export.arg("--object").arg(object);
    }
    export.stdout(fs::File::create(&lcov)?);
    ui::step("read the counters", &mut export)?;

    let report = report(root, &fs::read_to_string(&lcov)?)?;
    fs::write(directory.join("report.txt"), &report.files)?;
    print!("{}", report.crates);
    println!("by file, with the lines that no test reaches: {}; for editors: {}", directory.join("report.txt").display(), lcov.display());
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// LLVM's tools of the compiler's own release: those of another may not read its counters.
fn tools() -> Result<PathBuf> {
    let sysroot = text(Command::new("rustc").args(["--print", "sysroot"]))?;
    let target = Path::new(sysroot.trim()).join("lib/rustlib").join(format!("{}-unknown-linux-gnu/bin", std::env::consts::ARCH));
    if !target.join("llvm-cov").exists() {
        ui::step("install llvm-cov", Command::new("rustup").args(["component", "add", "llvm-tools"]))
            .context("without rustup: the llvm-cov and llvm-profdata of `rustc -vV`'s LLVM, in rustc's lib/rustlib/*/bin")?;
    }
    Ok(target)
}

fn text(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{} ended with {}", command.get_program().display(), output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

/// Everything with counters that ran: the test binaries, the agent, the plugin.
fn objects(root: &Path, list: &mut Command) -> Result<Vec<PathBuf>> {
    let list: serde_json::Value = serde_json::from_str(&text(list)?)?;
    let binaries = list["rust-binaries"].as_object().context("`cargo nextest list` names no binaries")?;
    let tests = binaries.values().filter_map(|binary| binary["binary-path"].as_str()).map(PathBuf::from);
    let shipped = ["stanchion", "stanchion-cni"].map(|name| build::binary(root, build::Profile::Dev, name));
    Ok(tests.chain(shipped).collect())
}

struct Report {
    /// A line for each crate.
    crates: String,
    /// A line for each file that has lines which were not reached, with these.
    files: String,
}

/// Of lcov's records what is neither a test nor reached.
fn report(root: &Path, lcov: &str) -> Result<Report> {
    let mut crates = [(0_usize, 0_usize); CRATES.len()];
    let mut files = String::new();
    for record in lcov.split("end_of_record") {
        let Some(path) = record.lines().find_map(|line| line.strip_prefix("SF:")) else { continue };
        let Ok(file) = Path::new(path).strip_prefix(root) else { continue };
        let file = file.to_string_lossy();
        let Some(krate) = CRATES.iter().position(|(_, sources)| file.starts_with(sources)) else { continue };
        let tests = tests_of(&file, &fs::read_to_string(path)?);
        let lines: BTreeMap<usize, u64> = record.lines().filter_map(counter).filter(|(line, _)| !tests.contains(line)).collect();
        let missed: Vec<usize> = lines.iter().filter(|(_, count)| **count == 0).map(|(line, _)| *line).collect();
        crates[krate].0 += lines.len() - missed.len();
        crates[krate].1 += lines.len();
        if !missed.is_empty() {
            writeln!(files, "{file}: {} of {} lines: {}", missed.len(), lines.len(), ranges(&missed))?;
        }
    }
    let mut table = String::new();
    for ((name, _), (reached, all)) in CRATES.iter().zip(crates) {
        let share = reached as f64 * 100.0 / all.max(1) as f64;
        writeln!(table, "{name:<16} {reached:>6} of {all:>6} lines  {share:>5.1} %")?;
    }
    Ok(Report { crates: table, files })
}

/// `DA:<line>,<count>`.
fn counter(record: &str) -> Option<(usize, u64)> {
    let (line, count) = record.strip_prefix("DA:")?.split_once(',')?;
    Some((line.parse().ok()?, count.split(',').next()?.parse().ok()?))
}

/// The lines of a file that are tests: all of a file of tests, else those of its module at the end.
fn tests_of(file: &str, source: &str) -> RangeInclusive<usize> {
    let of_tests = file.ends_with("tests.rs") || file.contains("/proof/");
    let lines: Vec<&str> = source.lines().collect();
    let module = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with('{'));
    match (of_tests, module) {
        (true, _) => 1..=usize::MAX,
        (false, Some(before)) => before + 1..=usize::MAX,
        (false, None) => 0..=0,
    }
}

/// `3, 7-9`.
fn ranges(lines: &[usize]) -> String {
    let runs = lines.chunk_by(|a, b| a + 1 == *b);
    runs.map(|run| if let [line] = run { line.to_string() } else { format!("{}-{}", run[0], run[run.len() - 1]) })
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_tests_are_left_out_and_missed_ones_are_named() {
        let source = "fn a() {}\n\n\nfn b() {}\n#[cfg(test)]\nmod tests {\n}\n";
        let tests = tests_of("agent/core/src/a.rs", source);
        assert!(!tests.contains(&4) && tests.contains(&5) && tests.contains(&9));
        assert!(!tests_of("agent/core/src/a.rs", "fn a() {}\n#[cfg(test)]\nmod tests;\n").contains(&2));
        assert!(tests_of("agent/core/src/config/tests.rs", source).contains(&1));
        assert_eq!(["DA:7,0", "DA:8,12,x", "LF:3"].map(counter), [Some((7, 0)), Some((8, 12)), None]);
        assert_eq!(ranges(&[1, 3, 4, 5, 9, 10]), "1, 3-5, 9-10");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let lcov = format!(
            "SF:{}/agent/core/src/lib.rs\nDA:1,3\nDA:2,0\nend_of_record\nSF:/elsewhere/a.rs\nDA:1,0\nend_of_record\n",
            root.display()
        );
        let report = report(root, &lcov).expect("a report");
        assert_eq!(report.files, "agent/core/src/lib.rs: 1 of 2 lines: 2\n");
        assert!(report.crates.starts_with("agent/core            1 of      2 lines   50.0 %\n"), "{}", report.crates);
    }
}
