//! Every setting of log shipping, with its default.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use regex_lite::Regex;

use super::join::Bounds;
use super::journal::JournalSettings;
use super::multiline::Rule;
use super::parser::{Parser, built_in};
use super::quota::Quota;
use super::record::{Layout, Merge, RecordOptions};
use super::route::{COMPACT_STREAM, FLUENT_BIT_GROUP, FLUENT_BIT_STREAM, Template, TemplateError};
use crate::cloud::LogGroupSpec;
use crate::config::{RecordLayout, TelemetryConfig};

/// Where reading of a file without position begins, if the file was there before the agent ever was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadFrom {
    /// Its first byte, rotated siblings included.
    #[default]
    Head,
    /// Its end. Files that appear later are read from their first byte all the same.
    Tail,
}

/// Times that the sink takes; `None` takes all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgeWindow {
    /// Older events are counted and dropped: the service refuses them. 14 days for CloudWatch Logs.
    pub past: Duration,
    /// Newer events get the present time. Two hours for CloudWatch Logs.
    pub future: Duration,
}

/// Where Container Insights' Fluent Bit keeps its databases.
pub const FLUENT_BIT_STATE: &str = "/var/fluent-bit/state";

/// What PutLogEvents takes: <https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html>.
pub const CLOUDWATCH_WINDOW: AgeWindow = AgeWindow { past: Duration::from_hours(14 * 24), future: Duration::from_hours(2) };

/// Text that never leaves the node: each match is replaced.
#[derive(Clone, Debug)]
pub struct Redaction {
    /// What to find.
    pub pattern: Regex,
    /// What stands there instead; `$1` is the first group.
    pub replacement: String,
}

/// What becomes of an event that is larger than the service takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Oversize {
    /// It becomes several events.
    #[default]
    Split,
    /// Its end is cut off, counted, and marked with [`TRUNCATED`].
    Truncate,
}

/// What the text of a truncated event ends with.
pub const TRUNCATED: &str = "[Truncated...]";

/// Files that go elsewhere than the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// File names as under /var/log/containers, as globs.
    pub files: Vec<String>,
    /// Group of what matches.
    pub group: Template,
    /// Stream of what matches.
    pub stream: Template,
    /// Fluent Bit's records have the pod's metadata, and what follows from it: JSON lines are merged, annotations are followed.
    pub kubernetes: bool,
    /// They have the members of [`LogSettings::node`].
    pub node: bool,
}

/// Log files of the node itself: each line is an event, with the time of its reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFiles {
    /// Directory and a glob for names in it, as `/var/log/messages` or `/var/log/amazon/*.log`.
    pub path: String,
    /// Group of them.
    pub group: Template,
    /// Stream of them.
    pub stream: Template,
}

/// How log files become events.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// Layout of messages.
    pub record: RecordOptions,
    /// Template of the log group.
    pub group: Template,
    /// Template of the log stream.
    pub stream: Template,
    /// Stack traces, in order of preference.
    pub rules: Arc<[Rule]>,
    /// Bounds of joined events.
    pub bounds: Bounds,
    /// Replacements, in order.
    pub redactions: Arc<[Redaction]>,
    /// Parsers that pods may name.
    pub parsers: Arc<[Parser]>,
    /// The annotations `fluentbit.io/parser` are followed, where JSON lines are merged.
    pub honour_parser: bool,
    /// How fast namespaces are read.
    pub quotas: Vec<Quota>,
    /// Files that go elsewhere; the first that matches counts.
    pub routes: Vec<Route>,
    /// Members that say which node it is, in the records of routes that ask for them.
    pub node: Vec<(String, String)>,
    /// Files of the node.
    pub host_files: Vec<HostFiles>,
    /// The node's journal; `None` leaves it unread.
    pub journal: Option<JournalSettings>,
    /// Events larger than the service takes.
    pub oversize: Oversize,
    /// The annotation `fluentbit.io/exclude` is followed.
    pub honour_exclude: bool,
    /// File names to read, as globs; empty reads all.
    pub include: Vec<String>,
    /// File names to leave out.
    pub exclude: Vec<String>,
    /// Start of old files.
    pub read_from: ReadFrom,
    /// Directory of Fluent Bit's databases: a fresh agent goes on where they say that it ended. One that is not there has none.
    pub fluent_bit_state: PathBuf,
    /// A batch is sent at the latest this long after its first event.
    pub flush: Duration,
    /// Times that are sent; `None` for a sink that is no service, to which nothing is too old and no batch too wide.
    pub age: Option<AgeWindow>,
    /// Events are metric documents.
    pub emf: bool,
    /// Groups that are created.
    pub group_spec: LogGroupSpec,
    /// Bytes in memory, unsent and unacknowledged: reading stops there. For log groups that take nothing it stops at half of it, and what
    /// they filled before that was known may go beyond it, at most as much again.
    pub memory_bytes: usize,
    /// Bytes of lines that are not complete yet, of all containers; beyond it the longest are closed as they are.
    pub open_bytes: usize,
    /// Part of it that one stream may take, so that a noisy pod delays only itself.
    pub stream_bytes: usize,
    /// Disk space that rotated and deleted files may keep taking because they are not read to the end; beyond it the oldest are given up.
    pub held_bytes: u64,
    /// Puts at the same time.
    pub parallel_puts: usize,
    /// Of these, of one stream while it has batches waiting. The service orders events by their times, other sinks do not.
    pub stream_puts: usize,
    /// Batches say which workload they are of, and on which instance it runs; `None` where they say nothing.
    pub entity: Option<InstanceId>,
    /// Batches are kept and sent compressed.
    pub compress: bool,
}

/// The node's EC2 instance; empty where it is not known.
pub type InstanceId = String;

impl LogSettings {
    /// Defaults for a layout: Container Insights' names for Fluent Bit's record and raw lines, names that say everything
    /// for the compact one.
    pub fn new(layout: Layout) -> Self {
        let stream = if layout == Layout::Compact { COMPACT_STREAM } else { FLUENT_BIT_STREAM };
        let template = |text| Template::parse(text).expect("a built-in template is well-formed");
        Self {
            record: RecordOptions { layout, ..RecordOptions::default() },
            group: template(FLUENT_BIT_GROUP),
            stream: template(stream),
            rules: [].into(),
            bounds: Bounds::default(),
            redactions: [].into(),
            parsers: built_in().into(),
            honour_parser: true,
            quotas: Vec::new(),
            routes: Vec::new(),
            node: Vec::new(),
            host_files: Vec::new(),
            journal: None,
            oversize: Oversize::Split,
            honour_exclude: true,
            include: Vec::new(),
            exclude: Vec::new(),
            read_from: ReadFrom::Head,
            fluent_bit_state: PathBuf::new(),
            flush: Duration::from_secs(1),
            age: Some(CLOUDWATCH_WINDOW),
            emf: false,
            group_spec: LogGroupSpec::default(),
            memory_bytes: 10 << 20,
            open_bytes: 4 << 20,
            stream_bytes: 4 << 20,
            held_bytes: 1 << 30,
            parallel_puts: 4,
            stream_puts: 3,
            entity: None,
            compress: true,
        }
    }

    /// For a sink that takes what it gets in the order in which it comes, and is no service: nothing is too old for it.
    #[must_use]
    pub fn in_order(self) -> Self {
        Self { age: None, stream_puts: 1, compress: false, ..self }
    }

    /// The agent's defaults for a layout: in Fluent Bit's record, all that Container Insights' Fluent Bit is set to.
    pub fn container_insights(layout: Layout) -> Self {
        let mut settings =
            Self { routes: Self::container_insights_routes(), fluent_bit_state: FLUENT_BIT_STATE.into(), ..Self::new(layout) };
        if layout == Layout::FluentBit {
            settings.record.merge = Merge::Under("log_processed".to_owned());
            settings.honour_exclude = false;
        }
        settings
    }

    /// What the agent's variables say.
    ///
    /// # Errors
    /// A template of the log group that cannot be read.
    pub fn of_agent(config: &TelemetryConfig) -> Result<Self, TemplateError> {
        let mut settings = Self::container_insights(match config.record {
            RecordLayout::FluentBit => Layout::FluentBit,
            RecordLayout::Compact => Layout::Compact,
            RecordLayout::Raw => Layout::Raw,
        });
        settings.group = Template::parse(&config.log_group)?;
        settings.flush = config.log_flush;
        settings.group_spec.retention_days = config.log_retention_days;
        Ok(settings)
    }

    /// Container Insights' other group: what the node's own parts write is its dataplane. Its Fluent Bit adds the node there, not the pod.
    fn container_insights_routes() -> Vec<Route> {
        let template = |text| Template::parse(text).expect("a built-in template is well-formed");
        vec![Route {
            files: ["aws-node-*", "kube-proxy-*", "stanchion-*"].map(str::to_owned).into(),
            group: template("/aws/containerinsights/{cluster}/dataplane"),
            stream: template("{node}-dataplane.tail.var.log.containers.{file}"),
            kubernetes: false,
            node: true,
        }]
    }
}
