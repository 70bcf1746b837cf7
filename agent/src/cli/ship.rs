//! `stanchion ship --once`: reads container logs to their end, sends them, and ends when everything is acknowledged.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::{ArgAction, Args, ValueEnum};
use stanchion_aws::{AwsClients, Overrides};
use stanchion_core::cluster::ClusterState;
use stanchion_core::logs::config::LogFile;
use stanchion_core::logs::multiline::Rule;
use stanchion_core::logs::record::{Layout, Merge, RecordOptions};
use stanchion_core::logs::route::Template;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::cluster::read_once;
use stanchion_daemon::logs::{JsonLines, ShipReport, TailerParts, ship_once};

/// Layouts by their names.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Record {
    /// Fluent Bit's record with the pod's metadata.
    FluentBit,
    /// The line alone; the stream's name says the rest.
    Compact,
    /// The line alone, in Fluent Bit's streams.
    Raw,
}

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    /// CloudWatch Logs.
    CloudWatch,
    /// One JSON line an event.
    Stdout,
    /// The same, appended to a file.
    File(PathBuf),
}

impl FromStr for Sink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cloudwatch" => Ok(Self::CloudWatch),
            "stdout" => Ok(Self::Stdout),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("use cloudwatch, stdout or file:PATH".to_owned()),
            },
        }
    }
}

/// What the settings file says, over `settings`.
pub(crate) fn with_file(settings: LogSettings, path: &Path) -> anyhow::Result<LogSettings> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    LogFile::parse(&text).and_then(|file| file.apply(settings)).with_context(|| path.display().to_string())
}

/// Ship container logs once.
#[derive(Args, Debug)]
pub(crate) struct ShipArgs {
    /// Read everything that is there and end when it is acknowledged
    #[arg(long, required = true)]
    once: bool,
    /// Directory of container logs: /var/log/containers, or the tree /var/log/pods
    #[arg(long, default_value = "/var/log/containers")]
    log_dir: PathBuf,
    /// Pods, for metadata, as a directory of manifests
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// Node name in stream names [default: the host's name]
    #[arg(long, env = "MY_NODE_NAME")]
    node_name: Option<String>,
    /// Cluster name in group names
    #[arg(long, env = "CLUSTER_NAME", default_value = "default")]
    cluster_name: String,
    /// Layout of messages
    #[arg(long, value_enum, default_value_t = Record::FluentBit)]
    record: Record,
    /// Put a line that is a JSON object under this member as well
    #[arg(long, conflicts_with = "merge_log")]
    merge_log_key: Option<String>,
    /// Put the members of a line that is a JSON object into the record
    #[arg(long)]
    merge_log: bool,
    /// Keep `log` where its object was merged
    #[arg(long, action = ArgAction::Set, default_value_t = true)]
    keep_log: bool,
    /// Add the pod's labels
    #[arg(long)]
    labels: bool,
    /// Add the pod's annotations
    #[arg(long)]
    annotations: bool,
    /// Leave out pods with the annotation fluentbit.io/exclude
    #[arg(long)]
    honour_exclude: bool,
    /// Read lines by the parser that the pod's annotation fluentbit.io/parser names, where JSON lines are merged
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true")]
    honour_parser: bool,
    /// Join stack traces: java, go, python, ruby
    #[arg(long, value_delimiter = ',')]
    multiline: Vec<String>,
    /// Template of the log group
    #[arg(long)]
    log_group: Option<String>,
    /// Template of the log stream
    #[arg(long)]
    log_stream: Option<String>,
    /// Settings file, over these flags
    #[arg(long)]
    config: Option<PathBuf>,
    /// Compress what is sent to CloudWatch Logs
    #[arg(long, action = ArgAction::Set, default_value_t = true)]
    gzip: bool,
    /// Where events go: cloudwatch, stdout (one JSON line an event), file:PATH
    #[arg(long, default_value = "cloudwatch")]
    sink: Sink,
}

impl ShipArgs {
    fn settings(&self) -> anyhow::Result<LogSettings> {
        let layout = match self.record {
            Record::FluentBit => Layout::FluentBit,
            Record::Compact => Layout::Compact,
            Record::Raw => Layout::Raw,
        };
        let merge = match &self.merge_log_key {
            Some(key) => Merge::Under(key.clone()),
            None if self.merge_log => Merge::Top,
            None => Merge::Off,
        };
        let record = RecordOptions { layout, merge, keep_log: self.keep_log, labels: self.labels, annotations: self.annotations };
        if layout != Layout::FluentBit && record != (RecordOptions { layout, ..RecordOptions::default() }) {
            anyhow::bail!(
                "--merge-log, --merge-log-key, --keep-log, --labels and --annotations fill Fluent Bit's record; the others have no place for them"
            );
        }
        let mut settings =
            LogSettings { record, honour_exclude: self.honour_exclude, honour_parser: self.honour_parser, ..LogSettings::new(layout) };
        settings.rules = self.multiline.iter().map(|name| Rule::built_in(name)).collect::<Result<_, _>>()?;
        if let Some(group) = &self.log_group {
            settings.group = Template::parse(group)?;
        }
        if let Some(stream) = &self.log_stream {
            settings.stream = Template::parse(stream)?;
        }
        settings.compress = self.gzip;
        if let Some(path) = &self.config {
            settings = with_file(settings, path)?;
        }
        Ok(if self.sink == Sink::CloudWatch { settings } else { settings.in_order() })
    }
}

pub(crate) fn run(args: &ShipArgs) -> anyhow::Result<ExitCode> {
    stanchion_netlink::process::bound_heaps();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(ship(args))
}

async fn ship(args: &ShipArgs) -> anyhow::Result<ExitCode> {
    let cluster = match &args.manifests {
        Some(dir) => read_once(dir)?,
        None => ClusterState::default(),
    };
    let node = match &args.node_name {
        Some(name) => name.clone(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname").context("cannot read the host's name")?.trim().to_owned(),
    };
    let parts = TailerParts { settings: args.settings()?, log_dir: args.log_dir.clone(), node, cluster_name: args.cluster_name.clone() };
    let cluster = Arc::new(cluster);
    let shipped = match &args.sink {
        Sink::Stdout => ship_once(parts, cluster, JsonLines::stdout(), SystemTime::now).await,
        Sink::File(path) => {
            let file = JsonLines::file(path).with_context(|| format!("cannot append to {}", path.display()))?;
            ship_once(parts, cluster, file, SystemTime::now).await
        }
        Sink::CloudWatch => ship_once(parts, cluster, AwsClients::load(Overrides::default()).await?.logs(), SystemTime::now).await,
    };
    Ok(report(&shipped.with_context(|| format!("cannot read {}", args.log_dir.display()))?))
}

/// Standard output may carry the events, so what is said goes to standard error.
fn report(shipped: &ShipReport) -> ExitCode {
    let counters = &shipped.counters;
    eprintln!("{} lines read, {} events acknowledged in {} batches", counters.lines_read, counters.events_shipped, counters.batches);
    let lost = [
        ("empty lines have no message in this layout", counters.dropped_empty, false),
        ("events were cut to the largest size, as set", counters.truncated_events, false),
        ("lines were cut because open lines took too much memory", counters.cut_for_memory, false),
        ("lines of excluded pods", counters.excluded, false),
        ("events are older than the service takes", counters.dropped_too_old, true),
        ("entries of the journal cannot be read", counters.journal_unreadable, true),
        ("events were rejected for their time", counters.rejected_too_old + counters.rejected_too_new + counters.rejected_expired, true),
        ("events were refused as invalid", counters.dropped_invalid, true),
    ];
    for (what, count, _) in lost.iter().filter(|(_, count, _)| *count > 0) {
        eprintln!("{count} {what}");
    }
    for (path, error) in &shipped.failed {
        eprintln!("{path}: {error}");
    }
    let whole = shipped.failed.is_empty() && counters.file_errors == 0 && !lost.iter().any(|(_, count, counts)| *counts && *count > 0);
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Ship {
        #[command(flatten)]
        args: ShipArgs,
    }

    #[test]
    fn annotations_that_name_parsers_are_followed_unless_the_flag_says_otherwise() {
        let honoured = |more: &[&str]| Ship::parse_from(["ship", "--once"].iter().chain(more)).args.settings().unwrap().honour_parser;
        assert!(honoured(&[]) && honoured(&["--honour-parser"]) && honoured(&["--honour-parser=true"]));
        assert!(!honoured(&["--honour-parser=false"]));
    }
}
