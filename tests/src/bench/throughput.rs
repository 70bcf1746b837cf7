//! What policy costs a bulk transfer: iperf3 between two pods of a node, as bare veths, under policy, and under the same rules
//! in nftables. Each case has a node namespace of its own. A round has a transfer of each, one right after the other, and its
//! ratios to the bare veths' count, of which the median is told: a busy machine's speed changes from round to round.
//!
//! | case | on the way |
//! |---|---|
//! | bare | two veths and a route |
//! | tc alone | in the programs' places, programs that do nothing |
//! | policed | both pods isolated both ways, a rule for the server's port |
//! | nftables | the same in a forward chain, established connections first |

use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::manifests;
use stanchion_core::policy::engine::Source;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::netpol::{
    ActivateIf, ActivateRequest, AttachMode, EnforcingMode, LoadOptions, NetpolHandle, NetpolParts, load, spawn,
};
use stanchion_netlink::Netlink;
use stanchion_netlink::tc::{TcHook, TcPlace, TcProgram};
use tokio_util::sync::CancellationToken;

use super::{Row, median};
use crate::datapath::raw::Yardstick;
use crate::netns::{Netns, ip_batch, ip_json, sysctl};
use crate::stray::Maker;

/// Time for a byte under policy, in times of a bare veth's: 3 % less throughput.
const POLICED: f64 = 1.03;
const PORT: u16 = 5_201;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 2);
/// The agent's part, or iperf3's server, is up within this.
const UP: Duration = Duration::from_secs(20);

/// A node with a client and a server, and what runs there.
struct Bed {
    node: Netns,
    pods: [Netns; 2],
    server: Option<Child>,
    agent: Option<Agent>,
}

struct Agent {
    shutdown: CancellationToken,
    thread: std::thread::JoinHandle<()>,
    pins: PathBuf,
    _state: tempfile::TempDir,
}

impl Bed {
    fn new(name: &str) -> anyhow::Result<Self> {
        let prefix = Maker::ThroughputBench.name(name);
        let node = Netns::create(&format!("{prefix}-node"))?;
        sysctl(&node, "net/ipv4/ip_forward", "1")?;
        let pods = [Netns::create(&format!("{prefix}-client"))?, Netns::create(&format!("{prefix}-server"))?];
        for (number, (pod, address)) in pods.iter().zip([CLIENT, SERVER]).enumerate() {
            ip_batch(node.name(), &format!("link add eni{number} type veth peer name eth0 netns {}\n", pod.name()))?;
            let link = ip_json(&node, &["link", "show", &format!("eni{number}")])?;
            let mac = link[0]["address"].as_str().context("a veth has a MAC")?;
            ip_batch(
                pod.name(),
                &format!(
                    "addr add {address}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0 scope link\n\
                     route add default via 169.254.1.1\nneigh add 169.254.1.1 lladdr {mac} dev eth0 nud permanent\n"
                ),
            )?;
        }
        Ok(Self { node, pods, server: None, agent: None })
    }

    /// Puts the veths into service and iperf3's server behind one.
    fn open(&mut self) -> anyhow::Result<()> {
        for (number, address) in [CLIENT, SERVER].iter().enumerate() {
            ip_batch(self.node.name(), &format!("link set eni{number} up\nroute replace {address}/32 dev eni{number}\n"))?;
        }
        let mut command = Command::new("iperf3");
        command.args(["-s", "-p", &PORT.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        self.server = Some(self.pods[1].spawn(&mut command).context("start iperf3: `apt-get install iperf3`")?);
        let start = Instant::now();
        while self.round(8).is_err() {
            ensure!(start.elapsed() < UP, "{}: no connection from the client to the server", self.node.name());
        }
        Ok(())
    }

    /// Bytes a second of one transfer.
    fn round(&self, megabytes: u32) -> anyhow::Result<f64> {
        let mut command = Command::new("iperf3");
        let amount = format!("{megabytes}M");
        command.args(["-J", "-c", &SERVER.to_string(), "-p", &PORT.to_string(), "-n", &amount, "--connect-timeout", "2000"]);
        let output = self.pods[0].output(&mut command).context("run iperf3")?;
        let report: Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
        ensure!(output.status.success(), "iperf3: {}", report["error"]);
        let bits = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
        Ok(bits.context("iperf3 told no throughput")? / 8.0)
    }

    /// Isolates both pods both ways, but for the server's port.
    fn police(&mut self) -> anyhow::Result<()> {
        let (send, receive) = mpsc::channel();
        let shutdown = CancellationToken::new();
        let pins = PathBuf::from(format!("/sys/fs/bpf/{}", self.node.name()));
        let state = tempfile::tempdir()?;
        let (node, token) = (self.node.clone(), shutdown.clone());
        let parts = (pins.clone(), state.path().to_owned(), ClusterHandle::fixed(policies()?));
        let thread = std::thread::spawn(move || {
            let served = node.run(|| serve(parts, token, &send));
            if let Err(error) = served.map_err(anyhow::Error::from).flatten() {
                let _nobody_waits = send.send(Err(error));
            }
        });
        self.agent = Some(Agent { shutdown, thread, pins, _state: state });
        let handle = receive.recv_timeout(UP).context("network policy did not start in time")??;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        for (number, (pod, address)) in ["client", "server"].into_iter().zip([CLIENT, SERVER]).enumerate() {
            let request = ActivateRequest {
                pod: PodName::new("x", pod),
                pod_uid: String::new(),
                container_id: ContainerId::new(pod),
                endpoints: vec![ActivateIf {
                    host_if_name: format!("eni{number}"),
                    host_if_index: self.index(number)?,
                    ipv4: Some(address),
                    ipv6: None,
                }],
                shares_ingress: false,
            };
            runtime.block_on(handle.activate(request))?;
        }
        let snapshot = runtime.block_on(handle.snapshot());
        ensure!(snapshot.endpoints.iter().all(|e| e.ingress_isolated && e.egress_isolated), "both pods are isolated: {snapshot:?}");
        Ok(())
    }

    /// Puts programs that do nothing where policy's would be.
    fn attach_empty(&self) -> anyhow::Result<()> {
        let empty = Yardstick::empty()?;
        for number in 0..2 {
            let index = self.index(number)?;
            let program = |hook| TcProgram { hook, program: empty.as_fd(), name: "empty" };
            let programs = [program(TcHook::Ingress), program(TcHook::Egress)];
            let attached = self.node.run(|| Netlink::open()?.attach_programs(index, TcPlace::ours(1), &programs))??;
            ensure!(attached, "eni{number} has no clsact qdisc");
        }
        Ok(())
    }

    /// The index of a host veth.
    fn index(&self, number: usize) -> anyhow::Result<u32> {
        let link = ip_json(&self.node, &["link", "show", &format!("eni{number}")])?;
        Ok(u32::try_from(link[0]["ifindex"].as_u64().context("an index")?)?)
    }

    fn filter(&self) -> anyhow::Result<()> {
        let chain = format!(
            "add table ip compared; add chain ip compared pods {{ type filter hook forward priority 0; policy drop; }}; \
             add rule ip compared pods ct state established,related accept; \
             add rule ip compared pods ip saddr {CLIENT} ip daddr {SERVER} tcp dport {PORT} accept"
        );
        let output = self.node.output(Command::new("nft").arg(chain))?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ended_before = server.kill();
            let _status = server.wait();
        }
        if let Some(Agent { shutdown, thread, pins, .. }) = self.agent.take() {
            shutdown.cancel();
            let _reported_before = thread.join();
            let _absent = std::fs::remove_dir_all(pins);
        }
        for netns in self.pods.iter().chain([&self.node]) {
            if let Err(error) = netns.remove() {
                eprintln!("{error:#}");
            }
        }
    }
}

type Parts = (PathBuf, PathBuf, ClusterHandle);

/// Runs the agent's part in this thread's namespace until it is told to end.
fn serve(
    (pin_root, state_dir, cluster): Parts,
    shutdown: CancellationToken,
    send: &mpsc::Sender<anyhow::Result<NetpolHandle>>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let options = LoadOptions { pin_root, flow_entries: 4_096 };
        let (handle, task) = spawn(NetpolParts {
            loaded: load(&options)?,
            attach: AttachMode::Clsact,
            // The state's source must outlive the actor.
            cluster: cluster.clone(),
            node_name: "node1".to_owned(),
            source: Source::Policies,
            mode: EnforcingMode::Standard,
            annotated_pods: false,
            sync_wait: UP,
            pod_flows: options.flow_entries,
            flow_capacity: options.flow_entries,
            state_dir,
            shutdown,
        })?;
        send.send(Ok(handle)).context("the bench waits")?;
        Ok(task.await?)
    })
}

fn policies() -> anyhow::Result<ClusterState> {
    let pod = |name: &str, address: Ipv4Addr| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x, labels: {{pod: {name}}}}}\n\
             spec: {{nodeName: node1}}\nstatus: {{phase: Running, podIP: {address}}}\n"
        )
    };
    let text = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: x}}\n{}{}\
         ---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: server, namespace: x}}\n\
         spec:\n  podSelector: {{matchLabels: {{pod: server}}}}\n  policyTypes: [Ingress, Egress]\n\
         \x20 ingress: [{{from: [{{podSelector: {{matchLabels: {{pod: client}}}}}}], ports: [{{port: {PORT}}}]}}]\n\
         ---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: client, namespace: x}}\n\
         spec:\n  podSelector: {{matchLabels: {{pod: client}}}}\n  policyTypes: [Ingress, Egress]\n\
         \x20 egress: [{{to: [{{podSelector: {{matchLabels: {{pod: server}}}}}}], ports: [{{port: {PORT}}}]}}]\n",
        pod("client", CLIENT),
        pod("server", SERVER),
    );
    Ok(ClusterState::default().replaced_by(manifests::parse("throughput.yaml", &text)?))
}

/// Runs the bench.
///
/// # Errors
/// iperf3 or nft is not there, the kernel refuses, or no connection comes about.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let rounds = if quick { 8 } else { 100 };
    let mut beds = [Bed::new("bare")?, Bed::new("tc")?, Bed::new("policed")?, Bed::new("nftables")?];
    beds[1].attach_empty()?;
    beds[2].police()?;
    beds[3].filter()?;
    beds.iter_mut().try_for_each(Bed::open)?;
    // Milliseconds for a gigabyte, and those of the others in times of it.
    let (mut bare, mut ratios) = (Vec::with_capacity(rounds), [const { Vec::new() }; 3]);
    for round in 1..=rounds {
        eprintln!("  round {round} of {rounds}, 256 MiB each ...");
        let mut bytes = [0.0; 4];
        // Each is first as often as any other.
        for turn in 0..beds.len() {
            let bed = (round + turn) % beds.len();
            bytes[bed] = beds[bed].round(256)?;
        }
        bare.push(1e12 / bytes[0]);
        for (ratios, other) in ratios.iter_mut().zip(&bytes[1..]) {
            ratios.push(bytes[0] / other);
        }
    }
    let bare = median(bare);
    let [tc, policed, nftables] = ratios.map(|ratios| median(ratios) * bare);
    Ok(vec![
        Row::plain("iperf3, bare veths", bare, "ms/GB"),
        Row::against("iperf3, programs that do nothing in the same places", tc, "ms/GB", bare),
        Row::against("iperf3, policed both ways at both ends", policed, "ms/GB", bare).target(POLICED),
        Row::against("iperf3, the same rules in nftables", nftables, "ms/GB", bare),
    ])
}
