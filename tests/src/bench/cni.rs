//! CNI ADD and DEL, from the plugin's exec to its exit, against the kernel's floor.
//!
//! The floor is the same netlink requests, sent one after the other by this process in the same node namespace. The agent
//! is a real tonic server in this process that answers at once: what remains is the plugin and the kernel. The phases come from
//! the plugin's own log.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use stanchion_core::ids::PodName;
use stanchion_core::network::names::veth_macs;
use stanchion_core::network::{NetOp, PodPlan, host_veth_name};
use stanchion_netlink::Netlink;
use stanchion_netlink::veth::VethEnd;
use stanchion_proto as wire;
use stanchion_proto::cni_server::{Cni, CniServer};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::Row;
use crate::netns::Netns;

/// Pods that the burst starts at once.
const BURST: usize = 30;
/// A second ENI's: pods get both rules.
const TABLE: u32 = 2;

/// A reply at once: an address by the sandbox's number, no policy.
#[derive(Default)]
struct AtOnce {
    held: Mutex<BTreeMap<String, wire::Attachment>>,
}

#[tonic::async_trait]
impl Cni for AtOnce {
    async fn add_network(&self, request: Request<wire::AddNetworkRequest>) -> Result<Response<wire::AddNetworkReply>, Status> {
        let sandbox = request.into_inner().sandbox.ok_or_else(|| Status::invalid_argument("no sandbox"))?;
        let number: u16 = sandbox.pod_name.trim_start_matches('p').parse().map_err(|_| Status::invalid_argument("no number"))?;
        let attachment = wire::Attachment { ipv4: address(number).to_string(), route_table: TABLE, ..wire::Attachment::default() };
        self.held.lock().map_err(|_| Status::internal("poisoned"))?.insert(sandbox.container_id, attachment.clone());
        let reply = wire::AddNetworkReply { attachments: vec![attachment], policy_mode: "standard".into(), ..Default::default() };
        Ok(Response::new(reply))
    }

    async fn activate_endpoint(&self, _: Request<wire::ActivateEndpointRequest>) -> Result<Response<wire::ActivateEndpointReply>, Status> {
        Ok(Response::new(wire::ActivateEndpointReply { policy_us: 0 }))
    }

    async fn del_network(&self, request: Request<wire::DelNetworkRequest>) -> Result<Response<wire::DelNetworkReply>, Status> {
        let sandbox = request.into_inner().sandbox.unwrap_or_default();
        let held = self.held.lock().map_err(|_| Status::internal("poisoned"))?.remove(&sandbox.container_id);
        Ok(Response::new(wire::DelNetworkReply { attachments: held.into_iter().collect(), vlan_id: 0 }))
    }

    async fn check_network(&self, _: Request<wire::CheckNetworkRequest>) -> Result<Response<wire::CheckNetworkReply>, Status> {
        Ok(Response::new(wire::CheckNetworkReply::default()))
    }

    async fn collect_garbage(&self, _: Request<wire::CollectGarbageRequest>) -> Result<Response<wire::CollectGarbageReply>, Status> {
        Ok(Response::new(wire::CollectGarbageReply::default()))
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        Ok(Response::new(wire::StatusReply { ready: true, reason: String::new() }))
    }
}

fn address(number: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 128, 0)) + u32::from(number))
}

/// A namespace that goes when the bench ends, however it ends.
struct Owned(Netns);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("bench cni: {error:#}");
        }
    }
}

struct Site {
    node: Owned,
    dir: tempfile::TempDir,
    plugin: PathBuf,
    rounds: usize,
}

/// Measures; `quick` takes a fifth of the rounds.
///
/// # Errors
/// When namespaces cannot be made, the plugin is not built, or a call fails.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let id = std::process::id();
    let node = Owned(Netns::create(&format!("stcnib{id}-n"))?);
    let site = Site { node, dir: tempfile::tempdir()?, plugin: plugin()?, rounds: if quick { 20 } else { 100 } };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(site.dir.path().join("agent.sock"))?
    };
    let server = tonic::transport::Server::builder().add_service(CniServer::new(AtOnce::default()));
    runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));

    let mut rows = Vec::new();
    let (floor_add, floor_del) = floor(&site)?;
    let (add, del) = one_by_one(&site)?;
    let phases = phases(&site.dir.path().join("plugin.log"))?;
    let (p50, p99) = (0.50, 0.99);
    rows.push(Row::against("ADD, one by one, p50", percentile(&add, p50), "ms", percentile(&floor_add, p50)).target(1.5));
    rows.push(Row::against("ADD, one by one, p99", percentile(&add, p99), "ms", percentile(&floor_add, p99)));
    rows.push(Row::against("DEL, one by one, p50", percentile(&del, p50), "ms", percentile(&floor_del, p50)));
    rows.push(Row::against("DEL, one by one, p99", percentile(&del, p99), "ms", percentile(&floor_del, p99)));
    for (phase, values) in &phases {
        rows.push(Row::plain(format!("  {phase}, p50"), percentile(values, p50), "ms"));
    }
    let burst = burst(&site)?;
    rows.push(Row::plain(format!("ADD, burst of {BURST}, p50"), percentile(&burst, p50), "ms"));
    rows.push(Row::plain(format!("ADD, burst of {BURST}, p99"), percentile(&burst, p99), "ms").target(1000.0));
    Ok(rows)
}

/// The plugin of the smallest profile if it was built, else the one beside this binary.
fn plugin() -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let beside = here.parent().context("the binary has no directory")?;
    let candidates = [beside.join("../plugin/stanchion-cni"), beside.join("stanchion-cni"), beside.join("../stanchion-cni")];
    let found = candidates.into_iter().find(|path| path.is_file());
    found.context("stanchion-cni is not built: cargo build --profile plugin -p stanchion-cni")
}

fn pod_netns(number: usize) -> anyhow::Result<Owned> {
    Ok(Owned(Netns::create(&format!("stcnib{}-p{number}", std::process::id()))?))
}

/// The requests of ADD and of DEL, back to back, in this process.
fn floor(site: &Site) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    for number in 0..site.rounds {
        let pod = pod_netns(number)?;
        let (path, plan) = (pod.0.path(), plan(number)?);
        let timed = site.node.0.run(|| -> anyhow::Result<(Duration, Duration)> {
            let started = Instant::now();
            floor_add(&path, &plan)?;
            let added = started.elapsed();
            let started = Instant::now();
            floor_del(&path, &plan)?;
            Ok((added, started.elapsed()))
        })??;
        adds.push(timed.0);
        dels.push(timed.1);
    }
    Ok((adds, dels))
}

fn plan(number: usize) -> anyhow::Result<PodPlan> {
    let (host_mac, pod_mac) = veth_macs(&format!("floor{number}"), "eth0");
    Ok(PodPlan {
        attachment: 0,
        host_if: host_veth_name("eni", &PodName::new("floor", number.to_string()), 0),
        pod_if: "eth0".to_owned(),
        host_mac,
        pod_mac,
        ipv4: Some(address(u16::try_from(number)?)),
        ipv6: None,
        mtu: 9001,
        table: TABLE,
    })
}

fn floor_add(netns: &Path, plan: &PodPlan) -> anyhow::Result<()> {
    let (pod_ns, node_ns) = (stanchion_netlink::Netns::open(netns)?, stanchion_netlink::Netns::current()?);
    let mut host = Netlink::open()?;
    let mut pod = pod_ns.run(Netlink::open)??;
    let own = VethEnd { name: plan.pod_if.clone(), mac: plan.pod_mac };
    let peer = VethEnd { name: plan.host_if.clone(), mac: plan.host_mac };
    pod.create_veth(&own, &peer, &node_ns, plan.mtu)?;
    let index = pod.link_index(&plan.pod_if)?;
    for op in plan.pod_ops(index) {
        pod.perform_all(&[op])?;
    }
    let index = host.link_index(&plan.host_if)?;
    host.perform_all(&[NetOp::LinkUp { index }])?;
    for op in plan.host_ops(index) {
        host.perform_all(&[op])?;
    }
    Ok(())
}

fn floor_del(netns: &Path, plan: &PodPlan) -> anyhow::Result<()> {
    let pod_ns = stanchion_netlink::Netns::open(netns)?;
    let mut host = Netlink::open()?;
    let mut pod = pod_ns.run(Netlink::open)??;
    pod.delete_link(&plan.pod_if)?;
    for op in plan.undo_host_ops() {
        host.perform_all(&[op])?;
    }
    Ok(())
}

fn one_by_one(site: &Site) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    for number in 0..site.rounds {
        let pod = pod_netns(number)?;
        adds.push(call(site, "ADD", number, &pod.0.path())?);
        dels.push(call(site, "DEL", number, &pod.0.path())?);
    }
    Ok((adds, dels))
}

/// All at once, as the kubelet does after a node has become ready.
fn burst(site: &Site) -> anyhow::Result<Vec<Duration>> {
    let pods = (0..BURST).map(pod_netns).collect::<anyhow::Result<Vec<_>>>()?;
    let add = |(number, pod): (usize, &Owned)| call(site, "ADD", number, &pod.0.path());
    let times = std::thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().enumerate().map(|pod| scope.spawn(move || add(pod))).collect();
        calls
            .into_iter()
            .map(|call| call.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    for (number, pod) in pods.iter().enumerate() {
        call(site, "DEL", number, &pod.0.path())?;
    }
    Ok(times)
}

/// One call of the plugin in the node's namespace, from before exec to after exit.
fn call(site: &Site, verb: &str, number: usize, netns: &Path) -> anyhow::Result<Duration> {
    let conf = serde_json::json!({
        "cniVersion": "1.1.0", "name": "aws-cni", "type": "stanchion-cni", "socket": site.dir.path().join("agent.sock"),
        "pluginLogFile": site.dir.path().join("plugin.log"),
    });
    let (elapsed, output) = site.node.0.run(|| -> anyhow::Result<_> {
        let mut command = Command::new(&site.plugin);
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("bench{number}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns)
            .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=bench;K8S_POD_NAME=p{number}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn()?;
        child.stdin.take().context("no standard input")?.write_all(conf.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        Ok((started.elapsed(), output))
    })??;
    if !output.status.success() {
        bail!("{verb} of pod {number}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Ok(elapsed)
}

/// The phases of the calls in the plugin's log: `verb=Add … connect_us=… assign_us=… total_us=…`.
fn phases(log: &Path) -> anyhow::Result<BTreeMap<String, Vec<Duration>>> {
    let text = std::fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    let mut phases: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<(&str, &str)> = line.split(' ').filter_map(|word| word.split_once('=')).collect();
        let verb = words.iter().find(|(key, _)| *key == "verb").map_or("?", |(_, verb)| *verb).to_uppercase();
        for (key, value) in words {
            if let (Some(phase), Ok(us)) = (key.strip_suffix("_us"), value.parse()) {
                phases.entry(format!("{verb} {phase}")).or_default().push(Duration::from_micros(us));
            }
        }
    }
    Ok(phases)
}

/// In milliseconds; the nearest rank.
fn percentile(times: &[Duration], fraction: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among some hundred values"
    )]
    let rank = ((sorted.len() as f64 * fraction).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(rank - 1).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}
