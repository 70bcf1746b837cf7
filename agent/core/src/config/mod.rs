//! Every setting: aws-node's environment names with their defaults and Go's parsing quirks, and stanchion's own.
//!
//! The environment is read once, through a closure that a test can fill. All errors are collected, so that a person mends
//! them in one go; each value keeps its origin for `stanchion config` and `/v1/ipamd-env-settings`.
//! Names and defaults: aws/amazon-vpc-cni-k8s v1.23.1, README and `cmd/aws-vpc-cni/main.go`.

pub mod aws_node;
mod go;
mod read;
mod reader;

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::Serialize;

pub use go::parse_bool;

use crate::ids::PodName;
use crate::metrics::insights::Selection;
use crate::metrics::track::Figures;
use crate::policy::engine::Source;

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Nobody said otherwise.
    Default,
    /// The variable is set.
    Environment,
    /// The variable is set, but to something that aws-node would ignore too: the default holds.
    Ignored,
}

/// A setting as it is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The variable.
    pub name: &'static str,
    /// Its value in force, as text.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
    /// What it does.
    pub about: &'static str,
}

/// A setting that stops the start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value:?}: {problem}; {remedy}")]
pub struct ConfigError {
    /// The variable.
    pub name: &'static str,
    /// What it is set to.
    pub value: String,
    /// What is wrong with that.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

/// How connections are given a source port by SNAT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RandomizeSnat {
    /// `prng`: fully random.
    #[default]
    Prng,
    /// `hashrandom`: hash and offset.
    HashRandom,
    /// `none`: the kernel's choice, in order.
    None,
}

/// How much of the traffic of a pod with security groups of its own passes its branch ENI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BranchMode {
    /// `strict`: all of it, node to pod too; no SNAT.
    #[default]
    Strict,
    /// `standard`: what leaves the node; SNAT as for other pods.
    Standard,
}

/// Whether a pod's veth is policed before its policy is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyMode {
    /// No enforcement at all.
    None,
    /// An unknown policy state opens.
    Standard,
    /// An unknown policy state fails the ADD.
    Strict,
}

/// Record layouts of container logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordLayout {
    /// As Fluent Bit's kubernetes filter writes them.
    #[default]
    FluentBit,
    /// The pod's identity once a stream, not in every event.
    Compact,
    /// The line alone.
    Raw,
}

/// What the flow log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowLogs {
    /// There is none.
    #[default]
    None,
    /// Packets that policy denied, or would have without audit mode.
    Denied,
    /// Those and flows that opened.
    All,
}

/// Which OTLP requests carry an AWS signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OtlpSign {
    /// Those to CloudWatch's own endpoints.
    #[default]
    Auto,
    /// All: the receiver stands for CloudWatch, behind an endpoint of a VPC or a proxy.
    Always,
    /// None.
    Never,
}

impl OtlpSign {
    /// The region whose key signs requests to `endpoint` from an agent in `home`; `None` if they carry no signature.
    pub fn region(self, endpoint: &str, home: &str) -> Option<String> {
        let host = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest).split(['/', ':', '?']).next().unwrap_or_default();
        let host = host.to_ascii_lowercase();
        let inner = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"));
        let named = inner.and_then(|inner| inner.strip_prefix("monitoring.").or_else(|| inner.strip_prefix("monitoring-fips.")));
        let named = named.filter(|region| !region.is_empty() && !region.contains('.')).map(str::to_owned);
        match self {
            Self::Auto => named,
            Self::Always => named.or_else(|| Some(home.to_owned())),
            Self::Never => None,
        }
    }
}

/// Everything that is set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Pool sizing and ENI management.
    pub pool: PoolConfig,
    /// What packets meet.
    pub network: NetworkConfig,
    /// Logs and metrics.
    pub telemetry: TelemetryConfig,
    /// Listeners and paths.
    pub operations: OperationsConfig,
    /// Each setting with its origin, in the order read.
    #[serde(skip)]
    pub settings: Vec<Setting>,
    /// Sentences for the log at start: values that were ignored, variables that mean nothing here.
    #[serde(skip)]
    pub notices: Vec<String>,
}

/// Pool sizing and ENI management.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PoolConfig {
    /// ENIs' worth of free addresses to hold; not used when an IP target is set.
    pub warm_eni_target: u32,
    /// Free addresses to hold; 0 is unset.
    pub warm_ip_target: u32,
    /// Floor of all addresses; 0 is unset.
    pub minimum_ip_target: u32,
    /// Free /28 prefixes to hold.
    pub warm_prefix_target: u32,
    /// Upper bound of ENIs; `None` is the instance's.
    pub max_eni: Option<u16>,
    /// /28 prefixes instead of single addresses.
    pub prefix_delegation: bool,
    /// IPv4 pods. Exactly one family is on.
    pub ipv4: bool,
    /// IPv6 pods.
    pub ipv6: bool,
    /// Pods' ENIs are made as an ENIConfig says; the primary ENI is not used.
    pub custom_networking: bool,
    /// The node annotation that names the ENIConfig.
    pub eni_config_annotation: String,
    /// The node label that names the ENIConfig.
    pub eni_config_label: String,
    /// Attach and free ENIs on a cordoned node too.
    pub manage_non_schedulable: bool,
    /// New ENIs may be put into tagged subnets of the zone.
    pub subnet_discovery: bool,
    /// More tags for ENIs.
    pub additional_eni_tags: BTreeMap<String, String>,
    /// Tags ENIs and narrows the leaked-ENI sweep; names log groups. Empty: unknown.
    pub cluster_name: String,
    /// No hourly sweep.
    pub disable_leaked_eni_cleanup: bool,
    /// Never create, attach, assign or tag.
    pub disable_provisioning: bool,
    /// Implies the two above: only IMDS is read.
    pub imds_only: bool,
    /// ENIs without the instance tag are ours too.
    pub manage_untagged_eni: bool,
    /// ENIs on network cards other than the default one are managed too, for pods that ask for several interfaces.
    pub multi_nic: bool,
    /// Security groups for pods: trunk and branch ENIs.
    pub pod_eni: bool,
    /// How pods with security groups are enforced.
    pub branch_mode: BranchMode,
    /// A pod's addresses are written to its annotation `vpc.amazonaws.com/pod-ips`.
    pub annotate_pod_ip: bool,
    /// How long a released address rests.
    pub ip_cooldown: Duration,
    /// The checkpoint.
    pub backing_store: String,
}

/// What packets meet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkConfig {
    /// Marks so that replies of node-port connections leave by the primary ENI.
    pub node_port_support: bool,
    /// No SNAT here: a NAT gateway does it.
    pub external_snat: bool,
    /// Source ports of SNAT.
    pub randomize_snat: RandomizeSnat,
    /// Destinations outside the VPC that are not SNATed.
    pub exclude_snat_cidrs: Vec<Ipv4Net>,
    /// Destinations that pods on secondary ENIs reach by the primary.
    pub external_service_cidrs: Vec<Ipv4Net>,
    /// The mark, its own mask.
    pub connmark: u32,
    /// Host veths' prefix.
    pub veth_prefix: String,
    /// MTU of ENIs.
    pub eni_mtu: u32,
    /// MTU of pods.
    pub pod_mtu: u32,
    /// Enforcement of network policy.
    pub policy_mode: PolicyMode,
    /// Which objects network policies are read from.
    pub policy_source: Source,
    /// Flows that each of the policy's tables, one a family, has room for.
    pub policy_flows: u32,
    /// Flows that a pod may have open at once.
    pub policy_pod_flows: u32,
    /// `net.ipv4.tcp_early_demux` is set to 0, so that the kubelet can probe pods with a branch ENI in strict mode.
    pub disable_tcp_early_demux: bool,
    /// Pods of an IPv6 cluster reach IPv4 destinations through the node's address.
    pub v4_egress: bool,
    /// Pods of an IPv4 cluster reach IPv6 destinations through the node's address.
    pub v6_egress: bool,
    /// Pods have no IPv6 at all, not even link-local.
    pub disable_pod_v6: bool,
    /// The bandwidth plugin is chained.
    pub bandwidth_plugin: bool,
}

/// What metrics call a cluster whose name is not set, as the templates of logs' groups do: CloudWatch takes no empty dimension.
pub const UNNAMED_CLUSTER: &str = "none";

/// Logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TelemetryConfig {
    /// `CLUSTER_NAME`, or [`UNNAMED_CLUSTER`]: in the documents' log groups and dimensions.
    pub cluster_name: String,
    /// Layout of container log events.
    pub record: RecordLayout,
    /// Template of container logs' group.
    pub log_group: String,
    /// Days that a group made by the agent keeps its events; `None` for ever.
    pub log_retention_days: Option<u32>,
    /// Seconds that a line may wait for company in its batch.
    pub log_flush: Duration,
    /// Settings file of log shipping; empty: none.
    pub log_config: String,
    /// `cloudwatch`, `stdout`, or `file:` and a path.
    pub log_sink: String,
    /// Ship container logs.
    pub logs: bool,
    /// What the log of judged flows holds.
    pub flow_logs: FlowLogs,
    /// Its group; `{cluster}` is the cluster's name.
    pub flow_log_group: String,
    /// Write Container Insights documents.
    pub container_insights: bool,
    /// How often.
    pub metrics_interval: Duration,
    /// Which documents and metrics.
    pub selection: Selection,
    /// Ours, or the CloudWatch agent's with its errors.
    pub figures: Figures,
    /// Gauges under the names of node_exporter and cAdvisor in the Prometheus text too.
    pub node_metrics: bool,
    /// Ask the kubelet how much of the disk containers use.
    pub kubelet: bool,
    /// Where the kubelet answers; empty: the node's address, port 10250.
    pub kubelet_url: String,
    /// Take any certificate of the kubelet.
    pub kubelet_insecure: bool,
    /// OTLP/HTTP receiver of metrics; empty: none.
    pub otlp_endpoint: String,
    /// Which requests to it carry an AWS signature.
    pub otlp_sign: OtlpSign,
    /// Scrape pods that are annotated for Prometheus.
    pub scrape: bool,
    /// File of the CloudWatch agent's metric declarations for what was scraped; empty: no metrics, documents only.
    pub scrape_rules: String,
    /// UDP address of the statsd listener; empty: none.
    pub statsd: String,
}

/// Listeners and paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OperationsConfig {
    /// A tracing filter or an aws-node level.
    pub log_level: String,
    /// No introspection listener.
    pub disable_introspection: bool,
    /// No metrics listener.
    pub disable_metrics: bool,
    /// `127.0.0.1:61679` or `unix:<path>`.
    pub introspection_bind: String,
    /// API server to use instead of the cluster's service address; empty: in-cluster.
    pub cluster_endpoint: String,
    /// This node's name; empty: the flag must say it.
    pub node_name: String,
    /// This agent's pod with its uid; `None`: events about the agent are told on the node.
    pub own_pod: Option<(PodName, String)>,
    /// EC2's endpoint; empty: `AWS_ENDPOINT_URL_EC2`, else the region's.
    pub ec2_endpoint: String,
    /// How long one request to EC2 may take; a longer one counts as a lost reply.
    pub http_timeout: Duration,
    /// Where the plugin's binary is installed.
    pub cni_bin_dir: String,
    /// Where the conflist is written.
    pub cni_conf_dir: String,
    /// Key of the taint that is taken off the node when pods can be connected; empty: none.
    pub startup_taint: String,
    /// The node's condition NetworkUnavailable is written as False when pods can be connected.
    pub node_condition: bool,
    /// The plugin's level.
    pub plugin_log_level: String,
    /// Where the plugin logs.
    pub plugin_log_file: String,
}

#[cfg(test)]
mod tests;
