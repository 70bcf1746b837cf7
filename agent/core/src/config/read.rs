//! The environment's names, in the order in which `stanchion config` shows them.

use super::reader::Reader;
use super::{
    Config, ConfigError, FlowLogs, NetworkConfig, OperationsConfig, OtlpSign, PoolConfig, RecordLayout, Setting, TelemetryConfig,
    UNNAMED_CLUSTER,
};
use crate::ids::PodName;
use crate::metrics::track::Figures;

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
            multi_nic: r.bool("ENABLE_MULTI_NIC", false, "ENIs of every network card are managed, for pods with several interfaces"),
            pod_eni: r.bool("ENABLE_POD_ENI", false, "security groups for pods, by trunk and branch ENIs"),
            branch_mode: r.branch_mode(),
            annotate_pod_ip: r.bool("ANNOTATE_POD_IP", false, "pods' addresses are written to their annotation"),
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
            policy_source: r.policy_source(),
            policy_flows: r.number(
                "STANCHION_POLICY_FLOWS",
                262_144,
                1_024..=8_388_608,
                "flows that each of the policy's tables (one a family) has room for; 100 bytes of kernel memory each; from the next boot on",
            ),
            policy_pod_flows: r.number(
                "STANCHION_POLICY_POD_FLOWS",
                65_536,
                64..=8_388_608,
                "flows that a pod with policy may have at once; of more each packet is judged, replies too",
            ),
            disable_tcp_early_demux: r.bool("DISABLE_TCP_EARLY_DEMUX", false, "net.ipv4.tcp_early_demux is 0"),
            v4_egress: r.bool("ENABLE_V4_EGRESS", true, "pods of an IPv6 cluster reach IPv4 destinations"),
            v6_egress: r.bool("ENABLE_V6_EGRESS", false, "pods of an IPv4 cluster reach IPv6 destinations"),
            disable_pod_v6: r.bool("DISABLE_POD_V6", false, "pods have no IPv6 at all"),
            bandwidth_plugin: r.bool("ENABLE_BANDWIDTH_PLUGIN", false, "the bandwidth plugin is chained"),
        };
        let telemetry = TelemetryConfig {
            cluster_name: if pool.cluster_name.is_empty() { UNNAMED_CLUSTER.to_owned() } else { pool.cluster_name.clone() },
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
            log_config: r.text("STANCHION_LOG_CONFIG", "", "settings file of log shipping, over the variables"),
            log_sink: r.text("STANCHION_LOG_SINK", "cloudwatch", "where log events go: cloudwatch, stdout or file:PATH"),
            log_retention_days: r.retention(),
            log_flush: r.seconds("STANCHION_LOG_FLUSH_SECONDS", 1.0, 0.05..=60.0, "how long a line may wait for company in its batch"),
            flow_logs: r.choice(
                "STANCHION_FLOW_LOGS",
                &[("none", FlowLogs::None), ("denied", FlowLogs::Denied), ("all", FlowLogs::All)],
                "log of flows that network policy judged: none, denied or all",
            ),
            flow_log_group: r.text("STANCHION_FLOW_LOG_GROUP", "/aws/containerinsights/{cluster}/flows", "log group of judged flows"),
            container_insights: r.bool("STANCHION_CONTAINER_INSIGHTS", true, "write Container Insights documents"),
            metrics_interval: r.seconds("STANCHION_METRICS_INTERVAL_SECONDS", 60.0, 1.0..=3600.0, "how often metrics are collected"),
            selection: r.selection(),
            figures: r.choice(
                "STANCHION_METRICS_FIGURES",
                &[("correct", Figures::Correct), ("upstream", Figures::Upstream)],
                "upstream: node network and CPU as the CloudWatch agent counts them",
            ),
            node_metrics: r.bool(
                "STANCHION_NODE_METRICS",
                false,
                "gauges named as node_exporter's and cAdvisor's, in the telemetry role's Prometheus text",
            ),
            kubelet: r.bool("STANCHION_KUBELET", true, "ask the kubelet for the disk use of containers"),
            kubelet_url: r.text("STANCHION_KUBELET_URL", "", "where the kubelet answers; empty is https://<node address>:10250"),
            kubelet_insecure: r.bool("STANCHION_KUBELET_INSECURE_TLS", false, "take any certificate of the kubelet"),
            otlp_endpoint: r.text("STANCHION_OTLP_ENDPOINT", "", "OTLP/HTTP receiver of metrics; empty is none"),
            otlp_sign: r.choice(
                "STANCHION_OTLP_SIGN",
                &[("auto", OtlpSign::Auto), ("always", OtlpSign::Always), ("never", OtlpSign::Never)],
                "sign OTLP requests with the agent's AWS credentials; auto: those to CloudWatch",
            ),
            scrape: r.bool("STANCHION_SCRAPE", false, "scrape this node's pods that carry prometheus.io annotations"),
            scrape_rules: r.text("STANCHION_SCRAPE_RULES", "", "file of metric declarations for what was scraped"),
            statsd: r.text("STANCHION_STATSD_ADDRESS", "", "UDP address of the statsd listener; empty is none"),
        };
        let pod_name = r.text("MY_POD_NAME", "", "this agent's pod, on which events about it are told");
        let namespace = r.text("MY_POD_NAMESPACE", "", "that pod's namespace");
        let uid = r.text("MY_POD_UID", "", "that pod's uid");
        let operations = OperationsConfig {
            own_pod: (!pod_name.is_empty() && !namespace.is_empty()).then(|| (PodName::new(namespace, pod_name), uid)),
            log_level: r.text("AWS_VPC_K8S_CNI_LOGLEVEL", "info", "tracing filter, or an aws-node level"),
            disable_introspection: r.bool("DISABLE_INTROSPECTION", false, "no introspection listener"),
            disable_metrics: r.bool("DISABLE_METRICS", false, "no metrics listener"),
            introspection_bind: r.text("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:61679", "where introspection listens"),
            cluster_endpoint: r.text("CLUSTER_ENDPOINT", "", "API server to use instead of the service address"),
            node_name: r.text("MY_NODE_NAME", "", "this node's name"),
            ec2_endpoint: r.text("AWS_EC2_ENDPOINT", "", "EC2's endpoint, before AWS_ENDPOINT_URL_EC2"),
            http_timeout: r.http_timeout(),
            cni_bin_dir: r.text("HOST_CNI_BIN_PATH", "/host/opt/cni/bin", "where the plugin is installed"),
            cni_conf_dir: r.text("HOST_CNI_CONFDIR_PATH", "/host/etc/cni/net.d", "where the conflist is written"),
            startup_taint: r.text("STANCHION_STARTUP_TAINT", "", "key of the taint taken off the node when pods can be connected"),
            node_condition: r.bool(
                "STANCHION_NODE_CONDITION",
                false,
                "write the node's condition NetworkUnavailable=False when pods can be connected",
            ),
            plugin_log_level: r.text("AWS_VPC_K8S_PLUGIN_LOG_LEVEL", "debug", "the plugin's level"),
            plugin_log_file: r.plugin_log_file(),
        };
        for (name, why) in MEANINGLESS {
            r.meaningless(name, why);
        }
        r.finish(pool, network, telemetry, operations)
    }

    /// Notices about variables among `names` that look like settings of the agent or of aws-node and are none: a typing error, or a setting
    /// of another version. What Kubernetes sets for a service of such a name is none of them.
    pub fn unknown<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<String> {
        let known = |name: &str| {
            self.settings
                .iter()
                .map(|setting| setting.name)
                .chain(MEANINGLESS.map(|(name, _)| name))
                .chain(ELSEWHERE)
                .any(|known| known == name)
        };
        let of_a_service = |name: &str| {
            name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.ends_with("_PORT") || name.contains("_PORT_")
        };
        names
            .filter(|name| FAMILIES.iter().any(|family| name.starts_with(family)) && !known(name) && !of_a_service(name))
            .map(|name| {
                format!("{name} is set and has no effect: this agent has no such setting; `stanchion config` shows all that it has")
            })
            .collect()
    }

    /// For a person: name, value, origin, meaning; the settings of `/v1/ipamd-env-settings` too.
    pub fn render(&self) -> Vec<Setting> {
        self.settings.clone()
    }
}

/// How names of settings begin, ours and aws-node's.
const FAMILIES: [&str; 13] = [
    "STANCHION_",
    "AWS_VPC_",
    "AWS_MANAGE_",
    "AWS_EXTERNAL_SERVICE_",
    "WARM_",
    "MINIMUM_IP_",
    "MAX_ENI",
    "ENABLE_",
    "DISABLE_",
    "ENI_CONFIG_",
    "POD_SECURITY_GROUP_",
    "NETWORK_POLICY_",
    "INTROSPECTION_",
];

/// Variables of the commands that are asked by people.
const ELSEWHERE: [&str; 1] = ["STANCHION_SOCKET"];

/// Variables that aws-node or its companions know and that mean nothing here; said once at start.
pub(super) const MEANINGLESS: [(&str, &str); 10] = [
    ("ENABLE_NFTABLES", "nftables is always used"),
    ("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "deprecated upstream as well"),
    ("AWS_VPC_K8S_CNI_LOG_FILE", "the agent logs to stderr; the runtime keeps it"),
    ("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", "egress is the one plugin's work; pluginLogFile has it"),
    ("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "egress is the one plugin's work; pluginLogFile has it"),
    ("VPC_CNI_VERSION", "the version is compiled in"),
    ("USE_CLOUDWATCH", "the metrics helper is a program of its own"),
    ("USE_PROMETHEUS", "the metrics helper is a program of its own"),
    ("AWS_CLUSTER_ID", "the metrics helper is a program of its own"),
    ("METRIC_UPDATE_INTERVAL", "the metrics helper is a program of its own; STANCHION_METRICS_INTERVAL_SECONDS is ours"),
];
