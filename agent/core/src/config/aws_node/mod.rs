//! From the DaemonSet aws-node to values of our chart that keep what its nodes do.
//!
//! What its containers read: aws/amazon-vpc-cni-k8s v1.23.1, `cmd/aws-vpc-cni/main.go` and `cmd/aws-vpc-cni-init/main.go`;
//! aws/aws-network-policy-agent v1.4.1, `pkg/config` and `pkg/ebpf/events/events.go`.

mod read;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::read::MEANINGLESS;
use super::{Config, ConfigError};
use crate::yaml::{comment, printable};
use read::{Container, Found, INIT, NODE, POLICY_AGENT, Variable};

pub use read::ReadError;

const MODE: &str = "NETWORK_POLICY_ENFORCING_MODE";
const FLOW_LOGS: &str = "STANCHION_FLOW_LOGS";

/// Variables on which only the init container acts. Of others that both have, what it does is a consequence: kernel settings for
/// a family or an egress that aws-node's own container chooses.
const INIT_ACTS: [&str; 1] = ["DISABLE_TCP_EARLY_DEMUX"];

/// Variables that are the AWS client's, there and here.
const AWS_CLIENT: [&str; 17] = [
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_CLOUDWATCH_LOGS",
    "AWS_ENDPOINT_URL_EC2",
    "AWS_ENDPOINT_URL_STS",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_USE_FIPS_ENDPOINT",
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "all_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// Why other variables found on aws-node are not taken over.
const NOT_OURS: [(&str, &str); 10] = [
    ("VPC_ID", "the agent asks IMDS for the VPC"),
    ("AWS_STS_REGIONAL_ENDPOINTS", "the agent always asks the STS of its region"),
    ("AWS_ROLE_ARN", "EKS sets it for a service account with a role: see serviceAccount.annotations"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "EKS sets it for a service account with a role: see serviceAccount.annotations"),
    ("AWS_ACCESS_KEY_ID", "keys do not belong into values: give the service account a role"),
    ("AWS_SECRET_ACCESS_KEY", "keys do not belong into values: give the service account a role"),
    ("AWS_SESSION_TOKEN", "keys do not belong into values: give the service account a role"),
    ("AWS_CA_BUNDLE", "the chart mounts no such file: add the certificates to the image's /etc/ssl/certs/ca-certificates.crt"),
    ("SSL_CERT_FILE", "the chart mounts no such file: add the certificates to the image's /etc/ssl/certs/ca-certificates.crt"),
    ("SSL_CERT_DIR", "the chart mounts no such directory: add the certificates to the image's /etc/ssl/certs/ca-certificates.crt"),
];

/// Why flags of aws-network-policy-agent are not taken over.
const FLAGS: [(&str, &str); 11] = [
    ("metrics-bind-addr", "the counters of network policy are among the metrics on port 61678"),
    ("health-probe-bind-addr", "the chart's probes ask 127.0.0.1:61679"),
    ("conntrack-cache-cleanup-period", "idle flows leave the agent's table without a setting"),
    (
        "conntrack-cache-table-size",
        "STANCHION_POLICY_FLOWS and STANCHION_POLICY_POD_FLOWS say how many flows a node and a pod have, 262,144 of each family and 65,536 unless set",
    ),
    ("log-level", "the agent has one log, with the level AWS_VPC_K8S_CNI_LOGLEVEL"),
    ("log-file", "the agent logs to stderr; the runtime keeps it"),
    ("log-file-max-size", "the agent logs to stderr; the runtime keeps it"),
    ("log-file-max-backups", "the agent logs to stderr; the runtime keeps it"),
    ("max-concurrent-reconciles", "the agent resolves all policies of a node in one go"),
    ("kubeconfig", "the agent uses its service account"),
    ("apiserver", "clusterEndpoint names the API server"),
];

const ROLE: &str = "If aws-node's ServiceAccount has a role (annotation eks.amazonaws.com/role-arn, or a Pod Identity association), \
                    give the new one that role too: serviceAccount.annotations and the role's trust policy, or another association.";

/// What becomes of the DaemonSet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Migration {
    /// Its namespace and name.
    pub daemon_set: String,
    /// The chart's `clusterName`; empty: not known.
    pub cluster_name: String,
    /// The chart's `clusterEndpoint`; empty: the service address.
    pub cluster_endpoint: String,
    /// The chart's `env`.
    pub env: BTreeMap<String, String>,
    /// What a person has to know: the variable, flag or field that it is about, and a sentence.
    pub notes: Vec<(String, String)>,
    /// Why an agent with these settings would not start.
    pub errors: Vec<ConfigError>,
}

/// Translates what kubectl printed: YAML or JSON, the DaemonSet alone or among other objects.
///
/// # Errors
/// No DaemonSet of aws-node, or several; what cannot be read.
pub fn migrate(text: &str) -> Result<Migration, ReadError> {
    let found = read::find(text)?;
    let mut migration = Migration { daemon_set: found.name.clone(), ..Migration::default() };
    migration.note("serviceAccount", ROLE);
    migration.variables(&found);
    migration.network_policy(&found);
    let set = |name: &str| match name {
        "CLUSTER_NAME" => Some(migration.cluster_name.clone()).filter(|name| !name.is_empty()),
        name => migration.env.get(name).cloned(),
    };
    match Config::read(&set) {
        Ok(config) => config.notices.into_iter().for_each(|notice| migration.note("env", notice)),
        Err(errors) => migration.errors = errors,
    }
    Ok(migration)
}

// === impl Migration ===

impl Migration {
    fn note(&mut self, about: &str, sentence: impl Into<String>) {
        self.notes.push((about.to_owned(), sentence.into()));
    }

    fn leave_out(&mut self, name: &str, why: &str) {
        self.note(name, format!("{name} is left out: {why}."));
    }

    fn variables(&mut self, found: &Found) {
        let settings = Config::read(&|_| None).expect("the defaults are accepted").settings;
        let known = |name: &str| AWS_CLIENT.contains(&name) || settings.iter().any(|setting| setting.name == name);
        let (node, init) = (found.node.variables(), found.init.variables());
        let names: BTreeSet<&str> = node.keys().chain(init.keys()).copied().collect();
        for name in names {
            let (of_node, of_init) = (node.get(name).copied(), init.get(name).copied());
            let by_init = INIT_ACTS.contains(&name);
            let Some(variable) = (if by_init { of_init.or(of_node) } else { of_node.or(of_init) }) else { continue };
            if variable.value_from.is_some() {
                self.not_here(name, known(name));
            } else {
                self.variable(name, &variable.value, known(name));
            }
            if let (Some(of_node), Some(of_init)) = (of_node, of_init)
                && self.env.contains_key(name)
                && of_node != of_init
            {
                self.conflict(name, of_node, of_init, if by_init { INIT } else { NODE });
            }
        }
        if !found.node.env_from.is_empty() || !found.init.env_from.is_empty() {
            self.note(
                "envFrom",
                "envFrom is not followed: write what its ConfigMaps and Secrets set into env, or the entries into extraEnv.",
            );
        }
    }

    /// A variable with `valueFrom`.
    fn not_here(&mut self, name: &str, known: bool) {
        match name {
            "MY_NODE_NAME" | "MY_POD_NAME" => {}
            name if known => self.leave_out(name, "the DaemonSet does not hold its value (valueFrom); put this entry into extraEnv"),
            name => self.leave_out(name, why_not(name)),
        }
    }

    fn conflict(&mut self, name: &str, of_node: &Variable, of_init: &Variable, acts: &str) {
        let shown = |variable: &Variable| match &variable.value_from {
            Some(_) => "comes from elsewhere".to_owned(),
            None => format!("is {:?}", variable.value),
        };
        let sentence = format!(
            "The containers do not agree: it {} in {NODE} and {} in {INIT}. Taken is that of {acts}, which acts on it.",
            shown(of_node),
            shown(of_init)
        );
        self.note(name, sentence);
    }

    fn variable(&mut self, name: &str, value: &str, known: bool) {
        match name {
            "MY_NODE_NAME" | "MY_POD_NAME" => return,
            "CLUSTER_NAME" => return self.cluster_name = value.to_owned(),
            "CLUSTER_ENDPOINT" => return self.cluster_endpoint = value.to_owned(),
            "HOST_CNI_BIN_PATH" | "HOST_CNI_CONFDIR_PATH" => {
                let why =
                    "the chart mounts /opt/cni/bin and /etc/cni/net.d of the host; where containerd looks elsewhere, change its volumes";
                if !matches!(value, "/host/opt/cni/bin" | "/host/etc/cni/net.d") {
                    self.leave_out(name, why);
                }
                return;
            }
            // aws-node takes any other word for DEBUG.
            "AWS_VPC_K8S_CNI_LOGLEVEL" if !matches!(value.to_ascii_lowercase().as_str(), "info" | "warn" | "error" | "fatal") => {
                let why = "DEBUG, AWS's default, is for a file on the node, and here it would fill the container's own log; info is the agent's default";
                return self.leave_out(name, why);
            }
            // The agent's default; of any other the chart makes probes that start a process each time.
            "INTROSPECTION_BIND_ADDRESS" if value == "127.0.0.1:61679" => return,
            "AWS_VPC_K8S_CNI_BACKING_STORE" if !value.starts_with("/var/run/aws-node/") => {
                let sentence =
                    "The chart mounts /var/run/aws-node only: change its volumes, or the agent does not find which pod has which address.";
                self.note(name, sentence);
            }
            name if !known => return self.leave_out(name, why_not(name)),
            _ => {}
        }
        self.env.insert(name.to_owned(), value.to_owned());
    }

    /// aws-node's variable says how policy is enforced, aws-network-policy-agent's flag and the controller's switch whether.
    fn network_policy(&mut self, found: &Found) {
        let idle = match &found.policy_agent {
            None => Some(format!("The DaemonSet has no container {POLICY_AGENT}")),
            Some(agent) if !agent.has("enable-network-policy") => Some(format!("{POLICY_AGENT} runs without --enable-network-policy=true")),
            Some(_) if found.controller == Some(false) => {
                Some("ConfigMap amazon-vpc-cni does not say enable-network-policy-controller: \"true\"".to_owned())
            }
            Some(_) => None,
        };
        match idle {
            Some(why) => {
                self.env.insert(MODE.to_owned(), "none".to_owned());
                self.note(
                    MODE,
                    format!(
                        "{why}, so aws-node enforces no network policy. \
                         With \"standard\", NetworkPolicy objects that nobody has enforced so far would come into force with the switch: \
                         list them with `kubectl get networkpolicies -A`, and set \"standard\" when that is wanted."
                    ),
                );
            }
            None => {
                self.env.entry(MODE.to_owned()).or_insert_with(|| "standard".to_owned());
            }
        }
        if let Some(agent) = &found.policy_agent {
            self.policy_logs(agent);
            self.policy_flags(agent);
        }
    }

    /// Upstream's event log holds both verdicts: in its file the allowed ones at the level debug only, in CloudWatch always.
    fn policy_logs(&mut self, agent: &Container) {
        let enforced = !self.env.get(MODE).is_some_and(|mode| mode.eq_ignore_ascii_case("none"));
        match (agent.has("enable-policy-event-logs"), agent.has("enable-cloudwatch-logs")) {
            (false, false) => {}
            (false, true) => self.leave_out(
                "--enable-cloudwatch-logs of aws-eks-nodeagent",
                "without --enable-policy-event-logs it has no effect there either",
            ),
            (true, _) if !enforced => self.leave_out(
                "--enable-policy-event-logs of aws-eks-nodeagent",
                "nothing is judged while no policy is enforced; with \"standard\" set STANCHION_FLOW_LOGS to \"denied\" as well",
            ),
            (true, true) => {
                self.env.insert(FLOW_LOGS.to_owned(), "all".to_owned());
                self.note(
                    FLOW_LOGS,
                    "aws-network-policy-agent sends what it denies and what it allows to CloudWatch Logs. \
                     \"all\" does so too, to /aws/containerinsights/<cluster>/flows; \"denied\" costs less.",
                );
            }
            (true, false) => {
                self.env.insert(FLOW_LOGS.to_owned(), "denied".to_owned());
                self.note(
                    FLOW_LOGS,
                    "aws-network-policy-agent writes what it denies to a file on the node. \
                     Here it goes to CloudWatch Logs, /aws/containerinsights/<cluster>/flows; \
                     without this line `stanchion flows --follow` shows it on the node, and nothing is sent.",
                );
            }
        }
    }

    fn policy_flags(&mut self, agent: &Container) {
        const HERE: [&str; 4] = ["enable-network-policy", "enable-ipv6", "enable-policy-event-logs", "enable-cloudwatch-logs"];
        for flag in agent.flags().keys().filter(|flag| !HERE.contains(flag)) {
            let why = FLAGS.iter().find(|(known, _)| known == flag).map_or("the agent has no such setting", |(_, why)| why);
            self.leave_out(&format!("--{flag} of {POLICY_AGENT}"), why);
        }
    }

    /// The chart's values: YAML, with what a person has to know as comments.
    pub fn to_yaml(&self) -> String {
        let mut out = String::new();
        comment(
            &mut out,
            &format!(
                "Values of stanchion's chart that keep what DaemonSet {} does: read the comments, then `helm install stanchion deploy/chart --namespace kube-system --values FILE`.",
                self.daemon_set
            ),
        );
        for error in &self.errors {
            comment(&mut out, &format!("THE AGENT WOULD NOT START WITH {error}."));
        }
        for (_, sentence) in self.notes.iter().filter(|(about, _)| !self.env.contains_key(about)) {
            comment(&mut out, sentence);
        }
        for (name, value) in [("clusterName", &self.cluster_name), ("clusterEndpoint", &self.cluster_endpoint)] {
            if !value.is_empty() {
                out.push_str(&format!("{name}: {}\n", printable(&Value::from(value.as_str()))));
            }
        }
        out.push_str("env:\n");
        for (name, value) in &self.env {
            for (_, sentence) in self.notes.iter().filter(|(about, _)| about == name) {
                out.push_str("  ");
                comment(&mut out, sentence);
            }
            out.push_str(&format!("  {name}: {}\n", printable(&Value::from(value.as_str()))));
        }
        out
    }
}

fn why_not(name: &str) -> &'static str {
    MEANINGLESS.iter().chain(&NOT_OURS).find(|(known, _)| *known == name).map_or("the agent has no such setting", |(_, why)| why)
}

#[cfg(test)]
mod tests;
