//! A node namespace, pods, and a scripted agent behind the real tonic server.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use stanchion_core::ids::PodName;
use stanchion_core::network::host_veth_name;
use stanchion_daemon::cni::take_plugins;
use stanchion_lab::binaries::counters;
use stanchion_lab::netns::Netns;
use stanchion_lab::stray::Maker;
use stanchion_proto as wire;
use stanchion_proto::cni_server::{Cni, CniServer};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

pub(crate) mod vpc;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The plugin as cargo built it.
pub(crate) fn plugin() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("stanchion-cni");
    assert!(path.is_file(), "{} is not there: cargo build -p stanchion-cni", path.display());
    path
}

/// A namespace that goes away with the test.
pub(crate) struct OwnedNetns(pub(crate) Netns);

impl OwnedNetns {
    pub(crate) fn create(role: &str) -> Self {
        assert!(is_root(), "these tests make network namespaces: run them as root");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self(Netns::create(&Maker::CniTest.name(&format!("{role}{number}"))).unwrap())
    }
}

impl Drop for OwnedNetns {
    fn drop(&mut self) {
        // Gone already where the test was about that.
        let _ = self.0.clone().remove();
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
}

/// What the scripted agent shall do and what it saw.
#[derive(Default)]
pub(crate) struct Script {
    /// Addresses to give, in order.
    pub(crate) free: VecDeque<wire::Attachment>,
    /// Addresses that a pod gets; 0 is one.
    pub(crate) at_a_time: usize,
    /// Container to what it holds.
    pub(crate) held: BTreeMap<String, Vec<wire::Attachment>>,
    pub(crate) fail_assign: Option<Status>,
    pub(crate) fail_activate: Option<Status>,
    /// For each activation: the host end was down, and existed.
    pub(crate) down_at_activation: Vec<bool>,
    pub(crate) activations: Vec<wire::ActivateEndpointRequest>,
    pub(crate) released: Vec<(String, String)>,
    pub(crate) collected: Vec<wire::CollectGarbageRequest>,
    pub(crate) differences: Vec<String>,
    /// Another pod, of which the interface is that is asked about.
    pub(crate) held_by: String,
    pub(crate) not_ready: Option<String>,
    pub(crate) no_policy: bool,
    /// `v4if0` or `v6if0`; empty: no egress.
    pub(crate) egress: String,
    /// The pod has security groups of its own.
    pub(crate) branch: Option<wire::BranchEni>,
    /// Somebody deletes the veth while the policy is being put in force.
    pub(crate) cut_at_activation: bool,
}

#[derive(Clone)]
struct Agent {
    script: Arc<Mutex<Script>>,
    node: Netns,
}

#[tonic::async_trait]
impl Cni for Agent {
    async fn add_network(&self, request: Request<wire::AddNetworkRequest>) -> Result<Response<wire::AddNetworkReply>, Status> {
        let sandbox = request.into_inner().sandbox.unwrap();
        let mut script = self.script.lock().unwrap();
        if let Some(status) = &script.fail_assign {
            return Err(status.clone());
        }
        let attachments = match script.held.get(&sandbox.container_id) {
            Some(held) => held.clone(),
            None => {
                let wanted = script.at_a_time.max(1);
                if script.free.len() < wanted {
                    return Err(Status::resource_exhausted("no free address: subnet-1 has 0 free of 251"));
                }
                script.free.drain(..wanted).collect()
            }
        };
        script.held.insert(sandbox.container_id, attachments.clone());
        Ok(Response::new(wire::AddNetworkReply {
            attachments,
            policy_mode: if script.no_policy { String::new() } else { "standard".to_owned() },
            pod_mtu: 1500,
            veth_prefix: "eni".to_owned(),
            branch: script.branch.clone(),
            egress: (!script.egress.is_empty()).then(|| wire::Egress { if_name: script.egress.clone() }),
            ..wire::AddNetworkReply::default()
        }))
    }

    async fn activate_endpoint(
        &self,
        request: Request<wire::ActivateEndpointRequest>,
    ) -> Result<Response<wire::ActivateEndpointReply>, Status> {
        let request = request.into_inner();
        let name = request.endpoints[0].host_if_name.clone();
        let links = ip(&self.node, &["link"]);
        let link = links.as_array().unwrap().iter().find(|link| link["ifname"] == name.as_str());
        let down = link.is_some_and(|link| !link["flags"].as_array().unwrap().contains(&"UP".into()));
        let mut script = self.script.lock().unwrap();
        if script.cut_at_activation {
            run(&self.node, &format!("ip link del {name}"));
        }
        script.down_at_activation.push(down);
        script.activations.push(request);
        match &script.fail_activate {
            Some(status) => Err(status.clone()),
            None => Ok(Response::new(wire::ActivateEndpointReply { policy_us: 1 })),
        }
    }

    async fn del_network(&self, request: Request<wire::DelNetworkRequest>) -> Result<Response<wire::DelNetworkReply>, Status> {
        let request = request.into_inner();
        let container = request.sandbox.unwrap().container_id;
        let mut script = self.script.lock().unwrap();
        script.released.push((container.clone(), request.reason));
        let attachments = script.held.remove(&container).unwrap_or_default();
        Ok(Response::new(wire::DelNetworkReply { attachments, vlan_id: 0 }))
    }

    async fn check_network(&self, _: Request<wire::CheckNetworkRequest>) -> Result<Response<wire::CheckNetworkReply>, Status> {
        let script = self.script.lock().unwrap();
        Ok(Response::new(wire::CheckNetworkReply { differences: script.differences.clone(), held_by: script.held_by.clone() }))
    }

    async fn collect_garbage(&self, request: Request<wire::CollectGarbageRequest>) -> Result<Response<wire::CollectGarbageReply>, Status> {
        self.script.lock().unwrap().collected.push(request.into_inner());
        Ok(Response::new(wire::CollectGarbageReply { released: 1 }))
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        let reason = self.script.lock().unwrap().not_ready.clone();
        Ok(Response::new(wire::StatusReply { ready: reason.is_none(), reason: reason.unwrap_or_default() }))
    }
}

/// A node with its agent.
pub(crate) struct Site {
    pub(crate) node: OwnedNetns,
    pub(crate) script: Arc<Mutex<Script>>,
    pub(crate) dir: tempfile::TempDir,
    server: Option<tokio::task::JoinHandle<()>>,
}

/// What the plugin answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) ok: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A sandbox of a pod.
pub(crate) struct Pod {
    pub(crate) netns: OwnedNetns,
    pub(crate) container: String,
    pub(crate) name: PodName,
}

pub(crate) fn attachment(ipv4: &str, table: u32) -> wire::Attachment {
    wire::Attachment { ipv4: ipv4.to_owned(), route_table: table, ..wire::Attachment::default() }
}

impl Site {
    /// With an agent that holds 10.0.1.9 (table 2), 10.0.1.10 (main) and then 10.0.1.11 … (table 2).
    pub(crate) async fn start() -> Self {
        let node = OwnedNetns::create("n");
        let free = [2, 254].into_iter().chain(std::iter::repeat(2)).zip(9..60u8);
        let free = free.map(|(table, last)| attachment(&Ipv4Addr::new(10, 0, 1, last).to_string(), table)).collect();
        let script = Arc::new(Mutex::new(Script { free, ..Script::default() }));
        let mut site = Self { node, script, dir: tempfile::tempdir().unwrap(), server: None };
        site.serve();
        site
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub(crate) fn spool(&self) -> PathBuf {
        self.dir.path().join("spool")
    }

    pub(crate) fn serve(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        let agent = Agent { script: self.script.clone(), node: self.node.0.clone() };
        let connections = take_plugins(UnixListenerStream::new(listener), agent.clone());
        let server = tonic::transport::Server::builder().add_service(CniServer::new(agent));
        self.server = Some(tokio::spawn(async move { server.serve_with_incoming(connections).await.unwrap() }));
    }

    /// The agent goes away; its socket file stays, as after kill -9.
    pub(crate) async fn kill_agent(&mut self) {
        let server = self.server.take().unwrap();
        server.abort();
        let _ = server.await;
    }

    pub(crate) fn pod(&self, name: &str) -> Pod {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Reservations of egress addresses are the machine's: no other process may have a container of this name.
        let container = format!("c{}-{number}x{name}", std::process::id());
        Pod { netns: OwnedNetns::create("p"), container, name: PodName::new("default", name) }
    }

    pub(crate) fn conf(&self) -> Value {
        json!({"cniVersion": "1.1.0", "name": "aws-cni", "type": "stanchion-cni", "socket": self.socket(), "mtu": "1500"})
    }

    pub(crate) async fn call(&self, verb: &str, pod: &Pod, extra: Value) -> Answer {
        let mut conf = self.conf();
        for (key, value) in extra.as_object().unwrap() {
            conf[key] = value.clone();
        }
        let args = format!("IgnoreUnknown=1;K8S_POD_NAME={};K8S_POD_NAMESPACE={}", pod.name.name, pod.name.namespace);
        let env = [
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", pod.container.clone()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_NETNS", pod.netns.0.path().display().to_string()),
            ("CNI_ARGS", args),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
        ];
        self.exec(env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(), &conf).await
    }

    pub(crate) async fn exec(&self, env: Vec<(String, String)>, conf: &Value) -> Answer {
        let (node, text) = (self.node.0.clone(), conf.to_string());
        tokio::task::spawn_blocking(move || run_plugin(&node, env, &text)).await.unwrap()
    }

    /// ADD that must succeed.
    pub(crate) async fn add(&self, pod: &Pod) -> Value {
        let answer = self.call("ADD", pod, json!({})).await;
        assert!(answer.ok, "{answer:?}");
        serde_json::from_str(&answer.stdout).unwrap()
    }

    /// Everything of the node's network that a pod may change. What the kernel itself writes follows the interfaces, some of it late.
    pub(crate) fn picture(&self) -> Value {
        let mut links = ip(&self.node.0, &["link"]);
        links.as_array_mut().unwrap().sort_by_key(|link| link["ifname"].to_string());
        let mut routes = ip(&self.node.0, &["route", "show", "table", "all"]);
        routes.as_array_mut().unwrap().retain(|route| route["protocol"] != "kernel");
        json!({
            "links": links.as_array().unwrap().iter().map(|link| link["ifname"].clone()).collect::<Vec<_>>(),
            "routes": routes,
            "rules": ip(&self.node.0, &["rule"]),
        })
    }

    pub(crate) fn host_if(&self, pod: &Pod) -> String {
        host_veth_name("eni", &pod.name, 0)
    }
}

fn run_plugin(node: &Netns, env: Vec<(String, String)>, text: &str) -> Answer {
    let mut command = Command::new(plugin());
    command.env_clear().envs(counters()).envs(env).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = node.spawn(&mut command).unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Answer {
        ok: output.status.success(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// `ip -j` inside: the oracle.
pub(crate) fn ip(netns: &Netns, arguments: &[&str]) -> Value {
    let output = netns.output(Command::new("ip").arg("-j").args(arguments)).unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    if text.trim().is_empty() { json!([]) } else { serde_json::from_str(&text).unwrap() }
}

/// A command that must succeed, inside.
pub(crate) fn run(netns: &Netns, line: &str) {
    let mut words = line.split_whitespace();
    let output = netns.output(Command::new(words.next().unwrap()).args(words)).unwrap();
    assert!(output.status.success(), "{line}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn recorded(dir: &str) -> Vec<(String, Value)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/cni").join(dir);
    let mut calls: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    calls.sort();
    let read = |path: PathBuf| {
        let call = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        (path.file_name().unwrap().to_string_lossy().into_owned(), call)
    };
    calls.into_iter().map(read).collect()
}
