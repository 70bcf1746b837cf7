//! `stanchion migrate`: a Fluent Bit configuration as ours, the DaemonSet aws-node as values of our chart.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use stanchion_core::config::aws_node;
use stanchion_core::logs::fluentbit::{migrate, sections};
use stanchion_core::logs::names::glob;

/// Translate another agent's configuration
#[derive(Args, Debug)]
pub(crate) struct MigrateArgs {
    #[command(subcommand)]
    from: From,
}

#[derive(Subcommand, Debug)]
enum From {
    /// A Fluent Bit configuration: classic, YAML, or a ConfigMap of such files
    FluentBit {
        /// The main file
        conf: PathBuf,
    },
    /// The DaemonSet aws-node, as values of the chart: what `kubectl -n kube-system get daemonset aws-node -o yaml` prints
    AwsNode {
        /// YAML or JSON, alone or in a list; - is standard input
        file: PathBuf,
    },
}

pub(crate) fn run(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    match &args.from {
        From::FluentBit { conf } => fluent_bit(conf),
        From::AwsNode { file } => daemon_set(file),
    }
}

fn fluent_bit(conf: &Path) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(conf).with_context(|| format!("cannot read {}", conf.display()))?;
    let dir = conf.parent().unwrap_or(Path::new("."));
    let found = sections(&text, &|name| included(dir, name)).with_context(|| conf.display().to_string())?;
    print!("{}", migrate(&found).to_yaml());
    Ok(ExitCode::SUCCESS)
}

/// Fails when the agent would refuse the values, after it has printed them.
fn daemon_set(file: &Path) -> anyhow::Result<ExitCode> {
    let (text, name) = if file == Path::new("-") {
        (std::io::read_to_string(std::io::stdin()), "standard input".to_owned())
    } else {
        (std::fs::read_to_string(file), file.display().to_string())
    };
    let text = text.with_context(|| format!("cannot read {name}"))?;
    let migration = aws_node::migrate(&text).context(name)?;
    print!("{}", migration.to_yaml());
    // The values are most often on their way into a file.
    for error in &migration.errors {
        eprintln!("stanchion: the agent would not start with {error}");
    }
    Ok(if migration.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Texts of the files that the name, which may be a glob in its last part, stands for; relative to the main file.
fn included(dir: &Path, name: &str) -> Vec<String> {
    let path = dir.join(name);
    let (Some(dir), Some(pattern)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return Vec::new() };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<_> =
        entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| glob(pattern, name))).map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter_map(|file| std::fs::read_to_string(file).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_includes_is_read_beside_it_in_the_order_of_names() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(directory.path().join("parts")).expect("made");
        for (name, text) in [("parts/b.conf", "second"), ("parts/a.conf", "first"), ("parts/a.yaml", "another"), ("main.conf", "main")] {
            std::fs::write(directory.path().join(name), text).expect("written");
        }
        let read = |name: &str| included(directory.path(), name);
        assert_eq!(read("parts/*.conf"), ["first", "second"]);
        assert_eq!(read("main.conf"), ["main"]);
        assert_eq!(read("nowhere/*.conf"), [""; 0]);
        let absolute = directory.path().join("parts/a.yaml");
        assert_eq!(read(&absolute.display().to_string()), ["another"]);
    }
}
