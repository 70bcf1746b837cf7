//! Every setting: aws-node's environment names with their defaults and Go's parsing quirks, and stanchion's own.
//!
//! The environment is read once, through a closure that a test can fill. All errors are collected, so that a person mends
//! them in one go; each value keeps its origin for `stanchion config` and `/v1/ipamd-env-settings`.
//! Names and defaults: aws/amazon-vpc-cni-k8s v1.23.1, README and `cmd/aws-vpc-cni/main.go`.

mod go;
mod reader;

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::Serialize;

pub use go::parse_bool;
use reader::Reader;

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
}

/// Logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TelemetryConfig {
    /// Layout of container log events.
    pub record: RecordLayout,
    /// Template of container logs' group.
    pub log_group: String,
    /// Days that a group made by the agent keeps its events; `None` for ever.
    pub log_retention_days: Option<u32>,
    /// Seconds that a line may wait for company in its batch.
    pub log_flush: Duration,
    /// Ship container logs.
    pub logs: bool,
    /// Write Container Insights documents.
    pub container_insights: bool,
    /// How often.
    pub metrics_interval: Duration,
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
}

impl Config {
    /// Reads every setting through `get`.
    ///
    /// # Errors
    /// Every setting that stops the start, not only the first.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, Vec<ConfigError>> {
        let mut r = Reader::new(get);
        let imds_only = r.bool("ENABLE_IMDS_ONLY_MODE", false, "only IMDS is read; nothing is created, attached or swept");
        let ipv6 = r.bool("ENABLE_IPv6", false, "IPv6 pods");
        let pool = PoolConfig {
            warm_eni_target: r.target("WARM_ENI_TARGET", 1, "ENIs' worth of free addresses to hold"),
            warm_ip_target: r.target("WARM_IP_TARGET", 0, "free addresses to hold; overrides WARM_ENI_TARGET"),
            minimum_ip_target: r.target("MINIMUM_IP_TARGET", 0, "floor of all addresses"),
            warm_prefix_target: r.target("WARM_PREFIX_TARGET", 0, "free /28 prefixes to hold"),
            max_eni: r.max_eni(),
            prefix_delegation: r.bool("ENABLE_PREFIX_DELEGATION", false, "/28 prefixes instead of single addresses"),
            // aws-node defaults to false here and its manifest says true: absent means the family that is not otherwise chosen.
            ipv4: r.bool("ENABLE_IPv4", !ipv6, "IPv4 pods"),
            ipv6,
            custom_networking: r.bool("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", false, "pods' ENIs are made as an ENIConfig says"),
            eni_config_annotation: r.text(
                "ENI_CONFIG_ANNOTATION_DEF",
                "k8s.amazonaws.com/eniConfig",
                "node annotation that names the ENIConfig",
            ),
            eni_config_label: r.text("ENI_CONFIG_LABEL_DEF", "k8s.amazonaws.com/eniConfig", "node label that names the ENIConfig"),
            manage_non_schedulable: r.bool("AWS_MANAGE_ENIS_NON_SCHEDULABLE", false, "attach and free ENIs on a cordoned node too"),
            subnet_discovery: r.bool("ENABLE_SUBNET_DISCOVERY", true, "new ENIs may be put into tagged subnets of the zone"),
            additional_eni_tags: r.tags(),
            cluster_name: r.text("CLUSTER_NAME", "", "tags ENIs, narrows the leaked-ENI sweep, names log groups"),
            disable_leaked_eni_cleanup: imds_only | r.bool("DISABLE_LEAKED_ENI_CLEANUP", false, "no hourly sweep of leaked ENIs"),
            disable_provisioning: imds_only | r.bool("DISABLE_NETWORK_RESOURCE_PROVISIONING", false, "never create, attach, assign or tag"),
            imds_only,
            manage_untagged_eni: r.bool("MANAGE_UNTAGGED_ENI", true, "ENIs without the instance tag are managed too"),
            ip_cooldown: r.cooldown(),
            backing_store: r.text("AWS_VPC_K8S_CNI_BACKING_STORE", "/var/run/aws-node/ipam.json", "the checkpoint of allocations"),
        };
        let eni_mtu = r.mtu("AWS_VPC_ENI_MTU", 9001, pool.ipv6, "MTU of ENIs");
        let network = NetworkConfig {
            node_port_support: r.bool("AWS_VPC_CNI_NODE_PORT_SUPPORT", true, "replies of node-port connections leave by the primary ENI"),
            external_snat: r.bool("AWS_VPC_K8S_CNI_EXTERNALSNAT", false, "no SNAT on the node"),
            randomize_snat: r.randomize_snat(),
            exclude_snat_cidrs: r.cidrs("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "destinations that are not SNATed"),
            external_service_cidrs: r.cidrs("AWS_EXTERNAL_SERVICE_CIDRS", "destinations reached by the primary ENI"),
            connmark: r.connmark(),
            veth_prefix: r.veth_prefix(),
            eni_mtu,
            pod_mtu: r.mtu("POD_MTU", eni_mtu, pool.ipv6, "MTU of pods"),
            policy_mode: r.policy_mode(),
        };
        let telemetry = TelemetryConfig {
            logs: r.bool("STANCHION_LOGS", true, "ship container logs"),
            record: r.choice(
                "STANCHION_LOG_RECORD",
                &[("fluent-bit", RecordLayout::FluentBit), ("compact", RecordLayout::Compact), ("raw", RecordLayout::Raw)],
                "layout of container log events",
            ),
            log_group: r.text(
                "STANCHION_LOG_GROUP",
                "/aws/containerinsights/{cluster}/application",
                "log group template of container logs",
            ),
            log_retention_days: r.retention(),
            log_flush: r.seconds("STANCHION_LOG_FLUSH_SECONDS", 1.0, 0.05..=60.0, "how long a line may wait for company in its batch"),
            container_insights: r.bool("STANCHION_CONTAINER_INSIGHTS", true, "write Container Insights documents"),
            metrics_interval: r.seconds("STANCHION_METRICS_INTERVAL_SECONDS", 60.0, 1.0..=3600.0, "how often metrics are collected"),
        };
        let operations = OperationsConfig {
            log_level: r.text("AWS_VPC_K8S_CNI_LOGLEVEL", "info", "tracing filter, or an aws-node level"),
            disable_introspection: r.bool("DISABLE_INTROSPECTION", false, "no introspection listener"),
            disable_metrics: r.bool("DISABLE_METRICS", false, "no metrics listener"),
            introspection_bind: r.text("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:61679", "where introspection listens"),
            cluster_endpoint: r.text("CLUSTER_ENDPOINT", "", "API server to use instead of the service address"),
            node_name: r.text("MY_NODE_NAME", "", "this node's name"),
        };
        r.refuse_unless_default("ENABLE_MULTI_NIC", "false", "pods on several network cards are not supported by this version");
        r.refuse_unless_default("ENABLE_POD_ENI", "false", "security groups for pods are not supported by this version");
        r.refuse_unless_default("ANNOTATE_POD_IP", "false", "annotating pods is not supported by this version");
        r.refuse_unless_default("ENABLE_V6_EGRESS", "false", "IPv6 egress from IPv4 clusters is not supported by this version");
        r.refuse_unless_default("ENABLE_BANDWIDTH_PLUGIN", "false", "chain the bandwidth plugin in a conflist of your own");
        r.refuse_unless_default("DISABLE_POD_V6", "false", "chain the tuning plugin in a conflist of your own");
        for (name, why) in MEANINGLESS {
            r.meaningless(name, why);
        }
        r.finish(pool, network, telemetry, operations)
    }

    /// For a person: name, value, origin, meaning; the settings of `/v1/ipamd-env-settings` too.
    pub fn render(&self) -> Vec<Setting> {
        self.settings.clone()
    }
}

/// Variables that aws-node or its companions know and that mean nothing here; said once at start.
const MEANINGLESS: [(&str, &str); 11] = [
    ("ENABLE_NFTABLES", "nftables is always used"),
    ("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "deprecated upstream as well"),
    ("AWS_VPC_K8S_CNI_LOG_FILE", "the agent logs to stderr; the runtime keeps it"),
    ("AWS_EC2_ENDPOINT", "use AWS_ENDPOINT_URL_EC2, the SDK's own variable"),
    ("ENABLE_V4_EGRESS", "there is no egress plugin to switch"),
    ("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", "there is no egress plugin"),
    ("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "there is no egress plugin"),
    ("HTTP_TIMEOUT", "request time-outs are fixed"),
    ("VPC_CNI_VERSION", "the version is compiled in"),
    ("POD_SECURITY_GROUP_ENFORCING_MODE", "security groups for pods are not supported by this version"),
    ("MY_POD_NAME", "the agent does not ask for its own pod"),
];

#[cfg(test)]
mod tests;
