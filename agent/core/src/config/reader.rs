//! One method a kind of value; each records what it read.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::Ipv4Net;

use super::go::{parse_bool, parse_int};
use super::{
    BranchMode, Config, ConfigError, NetworkConfig, OperationsConfig, Origin, PolicyMode, PoolConfig, RandomizeSnat, Setting,
    TelemetryConfig, UNNAMED_CLUSTER,
};
use crate::metrics::catalog::Preset;
use crate::metrics::insights::Selection;
use crate::policy::engine::Source;

pub(super) struct Reader<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    settings: Vec<Setting>,
    notices: Vec<String>,
    errors: Vec<ConfigError>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(get: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { get, settings: Vec::new(), notices: Vec::new(), errors: Vec::new() }
    }

    /// The variable; set but empty counts as absent, as in a manifest's `value: ""`.
    fn raw(&self, name: &str) -> Option<String> {
        (self.get)(name).filter(|value| !value.is_empty())
    }

    fn record(&mut self, name: &'static str, value: impl Into<String>, origin: Origin, about: &'static str) {
        self.settings.push(Setting { name, value: value.into(), origin, about });
    }

    fn error(&mut self, name: &'static str, value: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        self.errors.push(ConfigError { name, value: value.to_owned(), problem: problem.into(), remedy: remedy.into() });
    }

    /// Reads a value that aws-node ignores when it cannot be parsed: so do we, and say it.
    fn lenient<T: std::fmt::Display>(
        &mut self,
        name: &'static str,
        default: T,
        about: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let (value, origin) = match self.raw(name) {
            None => (default, Origin::Default),
            Some(text) => match parse(&text) {
                Some(value) => (value, Origin::Environment),
                None => {
                    self.notices.push(format!("{name}={text:?} cannot be used: the default {default} holds, as with aws-node"));
                    (default, Origin::Ignored)
                }
            },
        };
        self.record(name, value.to_string(), origin, about);
        value
    }

    pub(super) fn bool(&mut self, name: &'static str, default: bool, about: &'static str) -> bool {
        self.lenient(name, default, about, parse_bool)
    }

    /// A pool target: negative or unparsable is the default.
    pub(super) fn target(&mut self, name: &'static str, default: u32, about: &'static str) -> u32 {
        self.lenient(name, default, about, |text| text.parse::<i64>().ok().and_then(|n| u32::try_from(n).ok()))
    }

    pub(super) fn text(&mut self, name: &'static str, default: &str, about: &'static str) -> String {
        let (value, origin) = match self.raw(name) {
            Some(value) => (value, Origin::Environment),
            None => (default.to_owned(), Origin::Default),
        };
        self.record(name, value.clone(), origin, about);
        value
    }

    /// One of some words; another word stops the start.
    pub(super) fn choice<T: Copy + Default + PartialEq>(&mut self, name: &'static str, words: &[(&str, T)], about: &'static str) -> T {
        let word_of = |value: T| words.iter().find(|(_, v)| *v == value).map_or("", |(word, _)| *word);
        let Some(text) = self.raw(name) else {
            self.record(name, word_of(T::default()), Origin::Default, about);
            return T::default();
        };
        if let Some((word, value)) = words.iter().find(|(word, _)| *word == text) {
            self.record(name, *word, Origin::Environment, about);
            return *value;
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        self.error(name, &text, "no such choice", format!("use one of {}", known.join(", ")));
        T::default()
    }

    pub(super) fn seconds(&mut self, name: &'static str, default: f64, range: RangeInclusive<f64>, about: &'static str) -> Duration {
        let (value, origin) = match self.raw(name) {
            None => (default, Origin::Default),
            Some(text) => match text.parse::<f64>() {
                Ok(value) if range.contains(&value) => (value, Origin::Environment),
                _ => {
                    self.error(name, &text, "not a number of seconds in range", format!("use {} to {}", range.start(), range.end()));
                    (default, Origin::Default)
                }
            },
        };
        self.record(name, value.to_string(), origin, about);
        Duration::from_secs_f64(value)
    }

    pub(super) fn max_eni(&mut self) -> Option<u16> {
        let about = "upper bound of ENIs; unset is the instance's own";
        let value = self.lenient("MAX_ENI", -1, about, |text| text.parse::<i64>().ok());
        u16::try_from(value).ok().filter(|n| *n > 0)
    }

    pub(super) fn cooldown(&mut self) -> Duration {
        const NAME: &str = "IP_COOLDOWN_PERIOD";
        let (value, origin) = match self.raw(NAME) {
            None => (30, Origin::Default),
            Some(text) => match text.parse::<u32>() {
                Ok(value) => (value, Origin::Environment),
                Err(_) => {
                    self.error(NAME, &text, "not a number of seconds", "use 0 or more, 30 is the default");
                    (30, Origin::Default)
                }
            },
        };
        self.record(NAME, value.to_string(), origin, "seconds that a released address rests");
        Duration::from_secs(u64::from(value))
    }

    pub(super) fn retention(&mut self) -> Option<u32> {
        /// <https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutRetentionPolicy.html>
        const ALLOWED: [u32; 23] =
            [1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653, 0];
        const NAME: &str = "STANCHION_LOG_RETENTION_DAYS";
        let about = "days that a log group made by the agent keeps its events; 0 is for ever";
        let (value, origin) = match self.raw(NAME) {
            None => (0, Origin::Default),
            Some(text) => match text.parse().ok().filter(|days| ALLOWED.contains(days)) {
                Some(days) => (days, Origin::Environment),
                None => {
                    self.error(
                        NAME,
                        &text,
                        "CloudWatch Logs has no such retention",
                        "use 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365 ... or 0",
                    );
                    (0, Origin::Default)
                }
            },
        };
        self.record(NAME, value.to_string(), origin, about);
        (value > 0).then_some(value)
    }

    /// The metric preset and what is left out of it.
    pub(super) fn selection(&mut self) -> Selection {
        const WITHOUT: &str = "STANCHION_METRICS_WITHOUT";
        let words = Preset::ALL.map(|preset| (preset.name(), preset));
        let preset = self.choice("STANCHION_METRICS_PRESET", &words, "metrics that CloudWatch makes of the documents");
        let mut selection = Selection { preset, ..Selection::default() };
        let text = self.text(WITHOUT, "", "types of documents and metrics left out of the preset");
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match selection.clone().without(word) {
                Ok(smaller) => selection = smaller,
                Err(error) => self.error(WITHOUT, &text, error.to_string(), "take the names from the documents"),
            }
        }
        selection
    }

    pub(super) fn mtu(&mut self, name: &'static str, default: u32, ipv6: bool, about: &'static str) -> u32 {
        self.number(name, default, if ipv6 { 1280..=9001 } else { 576..=9001 }, about)
    }

    /// A number in a range; anything else stops the start.
    pub(super) fn number(&mut self, name: &'static str, default: u32, range: RangeInclusive<u32>, about: &'static str) -> u32 {
        let (value, origin) = match self.raw(name) {
            None => (default, Origin::Default),
            Some(text) => match text.parse::<u32>() {
                Ok(value) if range.contains(&value) => (value, Origin::Environment),
                _ => {
                    self.error(name, &text, "not a number in range", format!("use {} to {}", range.start(), range.end()));
                    (default, Origin::Default)
                }
            },
        };
        self.record(name, value.to_string(), origin, about);
        value
    }

    pub(super) fn connmark(&mut self) -> u32 {
        let parse = |text: &str| parse_int(text).and_then(|n| u32::try_from(n).ok()).filter(|n| *n != 0);
        self.lenient("AWS_VPC_K8S_CNI_CONNMARK", 0x80, "mark of connections that use the primary ENI, its own mask", parse)
    }

    pub(super) fn veth_prefix(&mut self) -> String {
        const NAME: &str = "AWS_VPC_K8S_CNI_VETHPREFIX";
        let prefix = self.text(NAME, "eni", "prefix of host veths");
        if prefix.len() > 4 || matches!(prefix.as_str(), "eth" | "lo" | "vlan") || !prefix.bytes().all(|b| b.is_ascii_alphanumeric()) {
            self.error(NAME, &prefix, "no usable prefix", "use at most 4 letters or digits, not eth, lo or vlan");
        }
        prefix
    }

    pub(super) fn randomize_snat(&mut self) -> RandomizeSnat {
        const NAME: &str = "AWS_VPC_K8S_CNI_RANDOMIZESNAT";
        let about = "source ports of SNAT: prng, hashrandom or none";
        let word =
            self.lenient(NAME, "prng".to_owned(), about, |text| matches!(text, "prng" | "hashrandom" | "none").then(|| text.to_owned()));
        match word.as_str() {
            "hashrandom" => RandomizeSnat::HashRandom,
            "none" => RandomizeSnat::None,
            _ => RandomizeSnat::Prng,
        }
    }

    pub(super) fn policy_mode(&mut self) -> PolicyMode {
        const NAME: &str = "NETWORK_POLICY_ENFORCING_MODE";
        let text = self.text(NAME, "standard", "network policy: none, standard or strict");
        match text.to_ascii_lowercase().as_str() {
            "none" => PolicyMode::None,
            "standard" => PolicyMode::Standard,
            "strict" => PolicyMode::Strict,
            _ => {
                self.error(NAME, &text, "no such mode", "use none, standard or strict");
                PolicyMode::Strict
            }
        }
    }

    pub(super) fn policy_source(&mut self) -> Source {
        const NAME: &str = "NETWORK_POLICY_SOURCE";
        let text = self.text(NAME, "policies", "where network policies are read: policies or policy-endpoints");
        match text.to_ascii_lowercase().as_str() {
            "policies" => Source::Policies,
            "policy-endpoints" => Source::Endpoints,
            _ => {
                self.error(
                    NAME,
                    &text,
                    "no such source",
                    "use policies (NetworkPolicy objects) or policy-endpoints (PolicyEndpoint objects)",
                );
                Source::Policies
            }
        }
    }

    /// A list of IPv4 CIDRs; an entry that is none is passed over and said.
    pub(super) fn cidrs(&mut self, name: &'static str, about: &'static str) -> Vec<Ipv4Net> {
        let Some(text) = self.raw(name) else {
            self.record(name, "", Origin::Default, about);
            return Vec::new();
        };
        let mut cidrs = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse::<Ipv4Net>() {
                Ok(cidr) => cidrs.push(cidr.trunc()),
                Err(_) => self.notices.push(format!("{name}: {part:?} is no IPv4 CIDR and is passed over, as with aws-node")),
            }
        }
        cidrs.sort();
        cidrs.dedup();
        let shown: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
        self.record(name, shown.join(","), Origin::Environment, about);
        cidrs
    }

    /// A JSON map; keys that contain `k8s.amazonaws.com` are dropped, as aws-node does.
    pub(super) fn tags(&mut self) -> BTreeMap<String, String> {
        const NAME: &str = "ADDITIONAL_ENI_TAGS";
        let about = "more tags for ENIs, a JSON object";
        let Some(text) = self.raw(NAME) else {
            self.record(NAME, "{}", Origin::Default, about);
            return BTreeMap::new();
        };
        match serde_json::from_str::<BTreeMap<String, String>>(&text) {
            Ok(mut tags) => {
                for key in tags.extract_if(.., |key, _| key.contains("k8s.amazonaws.com")) {
                    self.notices.push(format!("{NAME}: {:?} is reserved and passed over", key.0));
                }
                self.record(NAME, serde_json::json!(tags).to_string(), Origin::Environment, about);
                tags
            }
            Err(error) => {
                self.notices.push(format!("{NAME}: no JSON object of texts ({error}): no tags are added, as with aws-node"));
                self.record(NAME, "{}", Origin::Ignored, about);
                BTreeMap::new()
            }
        }
    }

    /// aws-node aborts on another word only when security groups for pods are on; here a typing error is always told.
    pub(super) fn branch_mode(&mut self) -> BranchMode {
        self.choice(
            "POD_SECURITY_GROUP_ENFORCING_MODE",
            &[("strict", BranchMode::Strict), ("standard", BranchMode::Standard)],
            "traffic of pods with security groups that passes their branch ENI",
        )
    }

    /// Seconds; aws-node's least is its default, 10.
    pub(super) fn http_timeout(&mut self) -> Duration {
        let about = "seconds that one request to EC2 may take, 10 at least";
        let seconds = self.lenient("HTTP_TIMEOUT", 10u64, about, |text| text.parse().ok().filter(|seconds| *seconds >= 10));
        Duration::from_secs(seconds)
    }

    /// The plugin's standard output is its result, so that it cannot log there.
    pub(super) fn plugin_log_file(&mut self) -> String {
        const NAME: &str = "AWS_VPC_K8S_PLUGIN_LOG_FILE";
        let file = self.text(NAME, "/var/log/aws-routed-eni/plugin.log", "where the plugin logs; stderr is allowed");
        if file == "stdout" {
            self.error(NAME, &file, "the plugin's standard output is its result", "name a file, or stderr");
        }
        file
    }

    /// A variable that means nothing here: said once.
    pub(super) fn meaningless(&mut self, name: &str, why: &str) {
        if self.raw(name).is_some() {
            self.notices.push(format!("{name} is set and means nothing here: {why}"));
        }
    }

    /// Rules across settings, then the whole.
    pub(super) fn finish(
        mut self,
        pool: PoolConfig,
        network: NetworkConfig,
        telemetry: TelemetryConfig,
        operations: OperationsConfig,
    ) -> Result<Config, Vec<ConfigError>> {
        if pool.ipv4 == pool.ipv6 {
            let remedy = "set one of ENABLE_IPv4 and ENABLE_IPv6 to true and the other to false";
            self.error("ENABLE_IPv6", &pool.ipv6.to_string(), "pods have exactly one address family", remedy);
        }
        if pool.ipv6 && !pool.prefix_delegation {
            self.error("ENABLE_IPv6", "true", "IPv6 pods need prefixes", "set ENABLE_PREFIX_DELEGATION to true");
        }
        if pool.ipv6 && pool.custom_networking {
            self.error("ENABLE_IPv6", "true", "custom networking is for IPv4", "unset AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG");
        }
        if pool.pod_eni && pool.imds_only {
            let remedy = "unset ENABLE_IMDS_ONLY_MODE or ENABLE_POD_ENI";
            self.error("ENABLE_POD_ENI", "true", "only EC2 tells which ENI is the trunk", remedy);
        }
        if pool.prefix_delegation && pool.ipv4 && pool.warm_ip_target == 0 && pool.minimum_ip_target == 0 && pool.warm_prefix_target == 0 {
            let remedy = "set WARM_PREFIX_TARGET (1 is usual), WARM_IP_TARGET or MINIMUM_IP_TARGET";
            self.error("ENABLE_PREFIX_DELEGATION", "true", "no target says how many prefixes to hold", remedy);
        }
        if pool.pod_eni && pool.branch_mode == BranchMode::Strict && !network.disable_tcp_early_demux {
            let notice = "ENABLE_POD_ENI=true in strict mode: the kubelet's TCP probes of pods with security groups need DISABLE_TCP_EARLY_DEMUX=true";
            self.notices.push(notice.to_owned());
        }
        if telemetry.node_metrics && operations.disable_metrics {
            let notice = "STANCHION_NODE_METRICS=true has no effect where DISABLE_METRICS is true: give the container of logs and metrics a listener \
                          (--metrics-address, telemetry.metricsAddress of the chart)";
            self.notices.push(notice.to_owned());
        }
        if pool.cluster_name.is_empty() && (telemetry.logs || telemetry.container_insights) {
            self.notices.push(format!(
                "CLUSTER_NAME is not set: logs and metrics are told as those of a cluster named {UNNAMED_CLUSTER:?}, together with those of every \
                 other cluster of this account and region without a name; set it to the cluster's name, clusterName of the chart."
            ));
        }
        if self.errors.is_empty() {
            Ok(Config { pool, network, telemetry, operations, settings: self.settings, notices: self.notices })
        } else {
            Err(self.errors)
        }
    }
}
