//! A pod: a network namespace that the real plugin connected.

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use stanchion_core::branch::POD_ENI;

use crate::binaries::counters;
use crate::container_log::ContainerLog;
use crate::netns::{Netns, feed_for_output};
use crate::node::Node;
use crate::probe::{Answer, End, PATIENCE, Protocol, Servers, probe};

/// Spec version of the lab's network configuration.
pub const CNI_VERSION: &str = "1.1.0";
/// Name of the network, as EKS has it.
pub const NETWORK: &str = "aws-cni";

/// What to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSpec {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// TCP and UDP ports that it serves.
    pub ports: Vec<u16>,
    /// Annotations, which the runtime hands to the plugin.
    pub annotations: Vec<(String, String)>,
    /// Limits of resources.
    pub limits: Vec<(String, String)>,
}

impl PodSpec {
    /// A pod that serves port 80, labelled `app: <name up to its last dash>`.
    pub fn new(namespace: &str, name: &str) -> Self {
        let app = name.rsplit_once('-').map_or(name, |(app, _)| app);
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: vec![("app".to_owned(), app.to_owned())],
            ports: vec![80],
            annotations: Vec::new(),
            limits: Vec::new(),
        }
    }

    /// With other ports.
    #[must_use]
    pub fn ports(mut self, ports: &[u16]) -> Self {
        self.ports = ports.to_vec();
        self
    }

    /// With one more annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// With security groups of its own, as this annotation of AWS's resource controller tells them.
    #[must_use]
    pub fn branch(mut self, annotation: &str) -> Self {
        self.limits.push((POD_ENI.to_owned(), "1".to_owned()));
        self.annotation(POD_ENI, annotation)
    }

    /// With one more label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    pub(crate) spec: PodSpec,
    pub(crate) uid: String,
    pub(crate) container_id: String,
    pub(crate) netns: Netns,
    pub(crate) address: IpAddr,
    pub(crate) result: Value,
    pub(crate) add_took: Duration,
    pub(crate) _servers: Servers,
    /// The pod's one container's log.
    pub log: ContainerLog,
}

impl Pod {
    /// `namespace/name`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.spec.namespace, self.spec.name)
    }

    /// Its address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Its namespace on the machine.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What the plugin printed.
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// From the plugin's exec to its result.
    pub fn add_took(&self) -> Duration {
        self.add_took
    }

    /// The sandbox's id.
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The pod's uid.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Row and column of a matrix.
    pub fn end(&self) -> End {
        End { name: self.name(), netns: self.netns.clone(), address: self.address }
    }

    /// Asks another pod or host.
    pub async fn probe(&self, protocol: Protocol, to: IpAddr, port: u16) -> anyhow::Result<Answer> {
        let (netns, to) = (self.netns.clone(), SocketAddr::new(to, port));
        Ok(tokio::task::spawn_blocking(move || probe(&netns, protocol, to, PATIENCE)).await??)
    }
}

/// What the runtime hands to the plugin for one sandbox.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The runtime's id.
    pub container_id: String,
    /// Its network namespace; empty when it is gone already.
    pub netns: String,
    /// Pod.
    pub namespace: String,
    /// Pod.
    pub name: String,
    /// Pod.
    pub uid: String,
    /// The pod's annotations.
    pub annotations: Vec<(String, String)>,
}

/// What came of a call of the plugin.
#[derive(Clone, Debug)]
pub struct PluginReply {
    /// It ended with 0.
    pub success: bool,
    /// Its stdout: a result or a CNI error; null when empty.
    pub json: Value,
    /// Exec to exit.
    pub took: Duration,
    /// Its stderr.
    pub stderr: String,
}

/// The plugin as containerd runs it, and what it gets on stdin.
pub(crate) fn plugin_command(node: &Node, verb: &str, sandbox: &Sandbox, prev_result: Option<&Value>) -> (Command, String) {
    let mut annotations = json!({"kubernetes.io/config.source": "api"});
    for (key, value) in &sandbox.annotations {
        annotations[key] = json!(value);
    }
    let mut config = json!({
        "cniVersion": CNI_VERSION,
        "name": NETWORK,
        "type": "stanchion-cni",
        "vethPrefix": "eni",
        "mtu": "9001",
        "socket": node.socket(),
        "pluginLogFile": node.plugin_log(),
        "pluginLogLevel": "DEBUG",
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations},
    });
    if let Some(result) = prev_result {
        config["prevResult"] = result.clone();
    }
    let Sandbox { container_id, netns, namespace, name, uid, annotations: _ } = sandbox;
    let mut command = Command::new(&node.binaries().plugin);
    command.env_clear().envs(counters()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).envs([
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", container_id),
        ("CNI_NETNS", netns),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    ]);
    command.env(
        "CNI_ARGS",
        format!(
            "K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid};IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace}"
        ),
    );
    (command, config.to_string())
}

/// Runs the plugin as containerd does: environment, configuration on stdin. Blocks.
pub(crate) fn call_plugin(node: &Node, verb: &str, sandbox: &Sandbox, prev_result: Option<&Value>) -> anyhow::Result<PluginReply> {
    let (mut command, input) = plugin_command(node, verb, sandbox, prev_result);
    let (output, took) = node.netns().run(|| {
        let began = Instant::now();
        feed_for_output(&mut command, &input).map(|output| (output, began.elapsed()))
    })??;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let json = if stdout.trim().is_empty() { Value::Null } else { serde_json::from_str(&stdout).context("read the plugin's stdout")? };
    Ok(PluginReply { success: output.status.success(), json, took, stderr: String::from_utf8_lossy(&output.stderr).into_owned() })
}

impl PluginReply {
    /// The result, or the plugin's words.
    pub fn into_result(self, verb: &str, pod: &str) -> anyhow::Result<Value> {
        if !self.success {
            bail!("{verb} {pod}: {} {}", self.json, self.stderr.trim());
        }
        Ok(self.json)
    }
}
