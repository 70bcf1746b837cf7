//! A node: a network namespace with an instance's interfaces, its agent, and its pods.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use stanchion_core::conflist::ready_mark;
use stanchion_core::ids::InstanceId;

use crate::agent::{Agent, Start};
use crate::binaries::Binaries;
use crate::cables::Cables;
use crate::cluster::SOON;
use crate::container_log::ContainerLog;
use crate::fake_kube::FakeKube;
use crate::manifests::{ContainerSpec, Manifests, PodManifest};
use crate::netns::Netns;
use crate::pod::{PluginReply, Pod, PodSpec, Sandbox, call_plugin, plugin_command};
use crate::probe::{End, Servers};
use crate::refusals::Refusals;
use crate::router::IMDS_ADDRESS;
use crate::wait::wait_for;

/// Name of the lab's cluster.
pub const CLUSTER_NAME: &str = "stanchion-lab";

/// A node. Clones are the same node.
#[derive(Clone, Debug)]
pub struct Node {
    pub(crate) inner: std::sync::Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) name: String,
    pub(crate) instance: InstanceId,
    pub(crate) instance_type: String,
    pub(crate) netns: Netns,
    pub(crate) primary: Ipv4Addr,
    pub(crate) public: Ipv4Addr,
    /// Everything of the node that is a file on its disk.
    pub(crate) dir: PathBuf,
    pub(crate) bpf: PathBuf,
    /// In memory, as `/run` is.
    pub(crate) state: PathBuf,
    pub(crate) run_id: String,
    pub(crate) binaries: Binaries,
    pub(crate) manifests: Manifests,
    /// Endpoints, region, credentials: what every agent of the lab is told.
    pub(crate) aws_env: BTreeMap<String, String>,
    pub(crate) pods: AtomicU32,
    pub(crate) cables: Cables,
    /// The API server that its agents read, if not the manifests.
    pub(crate) kubeconfig: OnceLock<PathBuf>,
    /// What its agents may be refused.
    pub(crate) refusals: OnceLock<Refusals>,
}

/// A pod that was scheduled here and is not connected yet.
struct Bound {
    spec: PodSpec,
    manifest: PodManifest,
    netns: Netns,
    sandbox: Sandbox,
    /// Id of the container to come.
    log_id: String,
}

impl Node {
    /// Its name in Kubernetes.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its id in EC2.
    pub fn instance(&self) -> &InstanceId {
        &self.inner.instance
    }

    /// Its instance type.
    pub fn instance_type(&self) -> &str {
        &self.inner.instance_type
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// The primary ENI's address.
    pub fn primary(&self) -> IpAddr {
        self.inner.primary.into()
    }

    /// What the internet sees of the primary address.
    pub fn public(&self) -> IpAddr {
        self.inner.public.into()
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.inner.dir.join("agent.sock")
    }

    /// The agent's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.inner.state.clone()
    }

    /// Where the plugin leaves releases that it could not deliver: beside the socket.
    pub fn spool(&self) -> PathBuf {
        self.inner.dir.join("spool")
    }

    /// The plugin's journal.
    pub fn plugin_log(&self) -> PathBuf {
        self.inner.dir.join("plugin.log")
    }

    /// The checkpoint of allocations.
    pub fn checkpoint(&self) -> PathBuf {
        self.state_dir().join("ipam.json")
    }

    /// The node's `/var/log`.
    pub fn var_log(&self) -> PathBuf {
        self.inner.dir.join("var-log")
    }

    /// Where the node's runtime would look for network configurations; not there until a test makes it.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.inner.dir.join("net.d")
    }

    /// Where the node's runtime would look for plugins.
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.inner.dir.join("cni-bin")
    }

    /// Where the agent pins its maps and programs.
    pub fn bpf_dir(&self) -> &Path {
        &self.inner.bpf
    }

    /// Where the agent's output goes.
    pub fn agent_output(&self) -> PathBuf {
        self.inner.dir.join("agent.log")
    }

    /// The binaries that it runs.
    pub fn binaries(&self) -> &Binaries {
        &self.inner.binaries
    }

    /// Row and column of a matrix, for the node itself.
    pub fn end(&self) -> End {
        End { name: format!("node:{}", self.name()), netns: self.netns().clone(), address: self.primary() }
    }

    /// What the node's agents can be refused: those that are started from now on.
    pub fn refusals(&self) -> &Refusals {
        self.inner.refusals.get_or_init(Refusals::default)
    }

    /// Starts the real agent in the node's namespace with aws-node's environment names; what is given is added.
    pub fn start_agent(&self, settings: &[(&str, &str)]) -> anyhow::Result<Agent> {
        self.start_agent_with(settings, &[])
    }

    /// As [`Node::start_agent`], with more flags.
    pub fn start_agent_with(&self, settings: &[(&str, &str)], flags: &[(&str, &str)]) -> anyhow::Result<Agent> {
        let manifests = self.inner.manifests.dir().display().to_string();
        self.start_agent_of(("--manifests", &manifests), settings, flags)
    }

    /// As [`Node::start_agent_with`], with another source of the cluster's state: `--kubeconfig FILE`.
    pub fn start_agent_of(&self, source: (&str, &str), settings: &[(&str, &str)], flags: &[(&str, &str)]) -> anyhow::Result<Agent> {
        self.start_build(&self.binaries().stanchion, source, settings, flags)
    }

    /// As [`Node::start_agent`], with the binary of another build.
    pub fn start_other_agent(&self, program: &Path, settings: &[(&str, &str)]) -> anyhow::Result<Agent> {
        let manifests = self.inner.manifests.dir().display().to_string();
        match self.inner.kubeconfig.get() {
            Some(kubeconfig) => self.start_build(program, ("--kubeconfig", &kubeconfig.display().to_string()), settings, &[]),
            None => self.start_build(program, ("--manifests", &manifests), settings, &[]),
        }
    }

    /// From now on [`Node::start_other_agent`] gives the agents an API server of this node's that shows the manifests.
    ///
    /// # Errors
    /// It cannot be served.
    pub fn reads_an_api_server(&self) -> anyhow::Result<FakeKube> {
        let kube = self.inner.manifests.api()?;
        let listener = self.netns().tcp_listener((Ipv4Addr::LOCALHOST, 0).into())?;
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{server: \"http://{}\"}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n",
            listener.local_addr()?
        );
        let path = self.inner.dir.join("kubeconfig");
        std::fs::write(&path, config)?;
        tokio::spawn(kube.clone().serve(listener));
        self.inner.kubeconfig.get_or_init(|| path);
        Ok(kube)
    }

    fn start_build(
        &self,
        program: &Path,
        source: (&str, &str),
        settings: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> anyhow::Result<Agent> {
        std::fs::create_dir_all(self.var_log().join("containers"))?;
        // STATUS says yes from an earlier agent's readiness on; here this one has to say so.
        if let Err(error) = std::fs::remove_file(ready_mark(&self.socket()))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
        let path = |path: PathBuf| path.display().to_string();
        let mut args = vec![
            (source.0, source.1.to_owned()),
            ("--node-name", self.name().to_owned()),
            ("--socket", path(self.socket())),
            ("--state-dir", path(self.state_dir())),
            ("--bpf-dir", path(self.bpf_dir().to_owned())),
            ("--cni-conf-dir", path(self.cni_conf_dir())),
            ("--cni-bin-dir", path(self.cni_bin_dir())),
            ("--log-dir", path(self.var_log().join("containers"))),
        ];
        args.extend(flags.iter().map(|(flag, value)| (*flag, (*value).to_owned())));
        let mut env = self.inner.aws_env.clone();
        env.extend([("MY_NODE_NAME", self.name()), ("CLUSTER_NAME", CLUSTER_NAME)].map(|(k, v)| (k.to_owned(), v.to_owned())));
        env.insert("AWS_VPC_K8S_CNI_BACKING_STORE".to_owned(), path(self.checkpoint()));
        env.extend(settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let start = Start {
            program: program.to_owned(),
            args: std::iter::once("agent".to_owned()).chain(args.into_iter().flat_map(|(k, v)| [k.to_owned(), v])).collect(),
            env,
            output: self.agent_output(),
            refusals: self.inner.refusals.get().cloned(),
        };
        Agent::start(self.netns(), &start)
    }

    /// What an agent on this node is told about AWS and the cluster, as NAME=VALUE.
    pub fn agent_env(&self) -> Vec<String> {
        let told = [("MY_NODE_NAME", self.name()), ("CLUSTER_NAME", CLUSTER_NAME)];
        let aws = self.inner.aws_env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        aws.chain(told).map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// The text of the agent's `:61678/metrics`.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let text = self.netns().run(|| -> std::io::Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 61_678))?;
            stream.set_read_timeout(Some(SOON))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        })?;
        Ok(text?)
    }

    /// Waits until the agent says that a pod could be connected.
    pub async fn ready(&self, agent: &mut Agent, at_most: Duration) -> anyhow::Result<()> {
        let waited = wait_for(&format!("the agent of {} to be ready", self.name()), at_most, || {
            let ended = agent.ended();
            let reply = self.plugin("STATUS", &self.no_sandbox(), None);
            async move {
                if let Some(status) = ended? {
                    bail!("it ended: {status}");
                }
                let reply = reply?;
                if !reply.success {
                    bail!("not ready: {} {}", reply.json, reply.stderr.trim());
                }
                Ok(())
            }
        })
        .await;
        waited.with_context(|| format!("the last lines of {}:\n{}", agent.output().display(), agent.tail()))
    }

    fn no_sandbox(&self) -> Sandbox {
        let empty = String::new;
        Sandbox { container_id: empty(), netns: empty(), namespace: empty(), name: empty(), uid: empty(), annotations: Vec::new() }
    }

    /// `stanchion ARGS` against this node's agent; stdout.
    pub fn cli(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.binaries().stanchion);
        command.args(args).env("STANCHION_SOCKET", self.socket());
        let output = self.netns().output(&mut command)?;
        if !output.status.success() {
            let said = [output.stderr, output.stdout].map(|text| String::from_utf8_lossy(&text).trim().to_owned());
            bail!("stanchion {}: {}", args.join(" "), said.join("\n"));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// [`Node::cli`] with `-o json`, parsed.
    pub fn cli_json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let text = self.cli(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("stanchion {}: not JSON: {text}", args.join(" ")))
    }

    /// Calls the plugin as the runtime does. Blocks.
    pub fn plugin(&self, verb: &str, sandbox: &Sandbox, prev_result: Option<&Value>) -> anyhow::Result<PluginReply> {
        call_plugin(self, verb, sandbox, prev_result)
    }

    /// What a scheduler, kubelet and runtime do for a pod: bound to the node, its namespace made, the plugin called, its
    /// address published, its container (servers on the pod's ports) started. After a failed ADD they clean up.
    pub async fn add_pod(&self, spec: PodSpec) -> anyhow::Result<Pod> {
        let mut bound = self.bind(spec)?;
        let (node, sandbox) = (self.clone(), bound.sandbox.clone());
        let reply = tokio::task::spawn_blocking(move || node.plugin("ADD", &sandbox, None)).await??;
        let add_took = reply.took;
        let what = format!("{}/{}", bound.spec.namespace, bound.spec.name);
        let result = match reply.into_result("ADD", &what) {
            Ok(result) => result,
            Err(error) => {
                self.unbind(bound).await?;
                return Err(error.context(format!("the agent's last lines:\n{}", crate::agent::tail(&self.agent_output()))));
            }
        };
        let address = result["ips"][0]["address"].as_str().with_context(|| format!("{what}: no address in {result}"))?;
        let address: ipnet::IpNet = address.parse()?;
        // The router hears of an address a moment after EC2 has told the agent: what a pod sent before would be lost there.
        self.inner.cables.settled().await?;
        bound.manifest.ips.push(address.addr());
        self.inner.manifests.pod(&bound.manifest)?;
        let Bound { spec, netns, sandbox, log_id, .. } = bound;
        let Sandbox { container_id, uid, .. } = sandbox;
        let servers = match address.addr() {
            IpAddr::V4(_) => Servers::start(&netns, &spec.ports)?,
            IpAddr::V6(_) => Servers::start_on(&netns, Ipv6Addr::UNSPECIFIED, &spec.ports)?,
        };
        let log = ContainerLog::create(&self.var_log(), &spec.namespace, &spec.name, &uid, "main", &log_id)?;
        Ok(Pod { spec, uid, container_id, netns, address: address.addr(), result, add_took, _servers: servers, log })
    }

    /// An ADD whose plugin is killed `after` that long, and the clean-up that kubelet and runtime do then. Says whether the
    /// plugin had ended before.
    pub async fn add_pod_killed(&self, spec: PodSpec, after: Duration) -> anyhow::Result<bool> {
        let bound = self.bind(spec)?;
        let (mut command, input) = plugin_command(self, "ADD", &bound.sandbox, None);
        let mut plugin = self.netns().spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()))?;
        // It may be killed, or fail, before it has read everything.
        let _ = plugin.stdin.take().expect("stdin is piped").write_all(input.as_bytes());
        let ended = tokio::task::spawn_blocking(move || {
            std::thread::park_timeout(after);
            let ended = plugin.try_wait()?.is_some();
            plugin.kill()?;
            plugin.wait().map(|_| ended)
        })
        .await??;
        self.unbind(bound).await?;
        Ok(ended)
    }

    /// The object and the namespace of a new pod.
    fn bind(&self, spec: PodSpec) -> anyhow::Result<Bound> {
        let number = self.inner.pods.fetch_add(1, Ordering::Relaxed);
        let digest = |what: &str| {
            use sha2::Digest as _;
            let hash = sha2::Sha256::digest(format!("{what} {} {} {} {number}", self.name(), spec.namespace, spec.name));
            hash.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
        };
        let uid = digest("uid");
        let uid = format!("{}-{}-4{}-8{}-{}", &uid[..8], &uid[8..12], &uid[13..16], &uid[17..20], &uid[20..32]);
        let container = ContainerSpec {
            name: "main".to_owned(),
            image: format!("registry.example/{}:1", spec.name),
            ports: spec.ports.iter().map(|port| (format!("p-{port}"), *port)).collect(),
            limits: spec.limits.clone(),
        };
        let manifest = PodManifest {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            uid: uid.clone(),
            node: self.name().to_owned(),
            labels: spec.labels.clone(),
            annotations: spec.annotations.clone(),
            containers: vec![container],
            ips: Vec::new(),
        };
        self.inner.manifests.pod(&manifest)?;
        let netns = Netns::create(&format!("stlab{}-pod-{}-{}-{number}", self.inner.run_id, spec.namespace, spec.name))?;
        let sandbox = Sandbox {
            container_id: digest("sandbox"),
            netns: netns.path().display().to_string(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            uid,
            annotations: spec.annotations.clone(),
        };
        let log_id = digest("container");
        Ok(Bound { spec, manifest, netns, sandbox, log_id })
    }

    /// What kubelet and runtime do with a sandbox that did not come to be: DEL until it works, then the rest.
    async fn unbind(&self, bound: Bound) -> anyhow::Result<()> {
        let what = format!("the plugin's DEL of {}/{}", bound.spec.namespace, bound.spec.name);
        wait_for(&what, SOON, || {
            let (node, sandbox) = (self.clone(), bound.sandbox.clone());
            async move {
                let reply = tokio::task::spawn_blocking(move || node.plugin("DEL", &sandbox, None)).await??;
                reply.into_result("DEL", "it").map(drop)
            }
        })
        .await?;
        bound.netns.remove()?;
        Ok(self.inner.manifests.delete_pod(&bound.spec.namespace, &bound.spec.name)?)
    }

    /// What the kubelet and the runtime do when a pod ends: DEL, then the namespace, the logs and the object go.
    pub async fn delete_pod(&self, pod: Pod) -> anyhow::Result<()> {
        let node = self.clone();
        tokio::task::spawn_blocking(move || {
            let sandbox = node.sandbox(&pod);
            node.plugin("DEL", &sandbox, Some(&pod.result))?.into_result("DEL", &pod.name())?;
            pod.netns.remove()?;
            node.inner.manifests.delete_pod(&pod.spec.namespace, &pod.spec.name)?;
            let Pod { log, .. } = pod;
            log.delete()?;
            Ok(())
        })
        .await?
    }

    /// The sandbox of a pod, to call the plugin for it.
    pub fn sandbox(&self, pod: &Pod) -> Sandbox {
        Sandbox {
            container_id: pod.container_id.clone(),
            netns: pod.netns.path().display().to_string(),
            namespace: pod.spec.namespace.clone(),
            name: pod.spec.name.clone(),
            uid: pod.uid.clone(),
            annotations: pod.spec.annotations.clone(),
        }
    }
}

/// What every agent in a lab is told about AWS.
pub(crate) fn aws_env(region: &str, ec2: &str, logs: &str) -> BTreeMap<String, String> {
    [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("AWS_REGION", region),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.0),
        ("AWS_SECRET_ACCESS_KEY", ACCESS_KEY.1),
        ("AWS_ENDPOINT_URL_EC2", ec2),
        ("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", logs),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", &format!("http://{IMDS_ADDRESS}")),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into()
}

/// The lab's access key: id and secret.
pub const ACCESS_KEY: (&str, &str) = ("AKIALABLABLABLABLAB1", "lab-secret-that-opens-nothing");
