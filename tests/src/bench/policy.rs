//! Policy at scale: a cluster of 10,000 pods and 1,000 policies, of which 110 pods are this node's, compiled and written to
//! the kernel's maps; then one change after the other.
//!
//! | figure | meaning |
//! |---|---|
//! | cold | CPU from the objects to the last map write, as after the agent's start on an empty kernel |
//! | relabel, new address | from a pod's event to the map, 99th percentile; and the map writes of the largest |
//! | churn | resident memory after many pods came and went, against that after the first tenth of them |

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use stanchion_core::cluster::{ClusterState, Object};
use stanchion_core::ids::PodName;
use stanchion_core::manifests;
use stanchion_core::policy::engine::{Engine, Settings};
use stanchion_core::policy::image::{MapOp, Slot};

use super::Row;
use crate::datapath::Rig;

const NAMESPACES: usize = 100;
const PODS: usize = 10_000;
const POLICIES: usize = 1_000;
const LOCAL: usize = 110;
const NODE: &str = "node0";

/// Seconds of CPU for a cold start.
const COLD: f64 = 2.0;
/// Milliseconds from a pod's event to the map.
const CHANGE: f64 = 10.0;
/// Entries written for one pod's change: its address, and what it has become in each policy set of the node. The records of
/// local pods are not counted: a pod some of whose flows may be revoked gets a new revision.
const WRITES: f64 = 64.0;
/// Growth of resident memory under churn.
const GROWTH: f64 = 1.1;
/// Each part of the bench ends in this time, in a debug build on a busy machine too, or the bench fails and says where it was.
const PART: Duration = Duration::from_secs(120);

const APPS: [&str; 10] = ["web", "api", "db", "cache", "queue", "auth", "mail", "cron", "proxy", "search"];

/// One pod as the API server has it; the first of each hundred or so run on this node.
fn pod(index: usize, app: usize, address: usize) -> Value {
    let node = if index.is_multiple_of(PODS / LOCAL) && index / (PODS / LOCAL) < LOCAL { 0 } else { 1 + index % 90 };
    let [a, b] = [address >> 8 & 255, address & 255];
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("p{index}"), "namespace": format!("ns{}", index % NAMESPACES), "labels": {"app": APPS[app % 10], "release": format!("r{}", index % 7)}},
        "spec": {"nodeName": format!("node{node}"), "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080 + index % 3}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": format!("10.{}.{a}.{b}", 64 + (address >> 16))}]}})
}

/// Ten policies a namespace: what each app may be reached by and may reach.
fn policy(index: usize) -> Value {
    let (namespace, app) = (index % NAMESPACES, index / NAMESPACES);
    let next = |step: usize| APPS[(app + step) % 10];
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("np{index}"), "namespace": format!("ns{namespace}")},
        "spec": {"podSelector": {"matchLabels": {"app": APPS[app]}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {"app": next(1)}}}, {"podSelector": {"matchLabels": {"app": next(2)}}}], "ports": [{"port": "http"}, {"port": 9090}]},
                {"from": [{"namespaceSelector": {"matchLabels": {"team": format!("t{}", namespace % 10)}}, "podSelector": {"matchLabels": {"app": "proxy"}}}]}],
            "egress": [
                {"to": [{"podSelector": {"matchLabels": {"app": next(3)}}}], "ports": [{"port": 8080, "endPort": 8082}]},
                {"to": [{"ipBlock": {"cidr": format!("172.{}.0.0/16", 16 + index % 16), "except": [format!("172.{}.{}.0/24", 16 + index % 16, index % 256)]}}]},
                {"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "auth"}}}], "ports": [{"protocol": "UDP", "port": 53}]}]}})
}

fn read(objects: impl Iterator<Item = Value>) -> anyhow::Result<Vec<Object>> {
    let text: Vec<String> = objects.map(|object| object.to_string()).collect();
    manifests::parse("bench.json", &text.join("\n")).context("the bench's own objects")
}

fn one_pod(index: usize, app: usize, address: usize) -> anyhow::Result<Object> {
    read(std::iter::once(pod(index, app, address)))?.pop().context("one object")
}

fn world() -> anyhow::Result<ClusterState> {
    let namespaces = (0..NAMESPACES).map(|index| {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns{index}"), "labels": {"team": format!("t{}", index % 10)}}})
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}});
    let pods = (0..PODS).map(|index| pod(index, index / NAMESPACES, index));
    let objects = namespaces.chain([node]).chain(pods).chain((0..POLICIES).map(policy));
    Ok(ClusterState::default().replaced_by(read(objects)?))
}

fn cpu() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has a CPU clock"))
}

/// Resident bytes of this process.
fn resident() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = text.split_whitespace().nth(1).context("the second field")?.parse()?;
    Ok(pages * 4096.0)
}

/// Descriptors of this process.
fn open_files() -> anyhow::Result<f64> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count() as f64)
}

struct Node {
    engine: Engine,
    state: Arc<ClusterState>,
    rig: Rig,
}

impl Node {
    /// The next state with one object changed, into the maps; gives the time it took and the operations.
    fn change(&mut self, object: Object) -> anyhow::Result<(Duration, Vec<MapOp>)> {
        let start = Instant::now();
        let mut next = ClusterState::clone(&self.state);
        next.apply(object);
        self.state = Arc::new(next);
        let ops = self.engine.set_cluster(&self.state);
        self.rig.apply(&ops)?;
        Ok((start.elapsed(), ops))
    }
}

/// One part of the bench: tells when it begins and fails when it takes too long.
struct Part {
    name: String,
    of: usize,
    since: Instant,
}

impl Part {
    fn begin(name: impl Into<String>, of: usize) -> Self {
        let name = name.into();
        eprintln!("  {name}, {of} times ...");
        Self { name, of, since: Instant::now() }
    }

    /// Called after each step with how many there were.
    fn after(&self, done: usize) -> anyhow::Result<()> {
        let Self { name, of, since } = self;
        ensure!(since.elapsed() < PART, "{name}: {done} of {of} after {} s", PART.as_secs());
        Ok(())
    }
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * percent / 100]
}

/// Runs the bench.
///
/// # Errors
/// The eBPF object was not built, the kernel refuses a write, or a change touches what it must not.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let (changes, churn) = if quick { (200, 2_000) } else { (2_000, 50_000) };
    let state = Arc::new(world()?);
    let rig = Rig::new("bench-policy", 1_024)?;
    let mut rows = Vec::new();
    let engine = Engine::new(Settings { node_name: NODE.to_owned(), ..Settings::default() });
    let mut node = Node { engine, state, rig };

    let local = node.state.pods.iter().filter(|(_, pod)| pod.spec.node_name == NODE);
    let local: Vec<(PodName, Vec<IpAddr>)> = local.map(|(name, pod)| (name.clone(), pod.addresses().collect())).collect();
    ensure!(local.len() == LOCAL, "{} pods are local", local.len());
    let start = cpu();
    // As the agent takes pods over: each is known to the datapath before its policies are.
    let mut ops = Vec::new();
    for (slot, (name, addresses)) in (1..).zip(&local) {
        ops.extend(node.engine.add_endpoint(Slot(slot), name, "", addresses));
    }
    ops.extend(node.engine.set_cluster(&node.state));
    let resolved = cpu() - start;
    let count = ops.len();
    node.rig.apply(&ops)?;
    let whole = cpu() - start;
    rows.push(Row::plain(format!("cold: {PODS} pods, {POLICIES} policies, {LOCAL} local, CPU"), whole.as_secs_f64(), "s").target(COLD));
    rows.push(Row::plain("  of which resolving and compiling", resolved.as_secs_f64(), "s"));
    rows.push(Row::plain("  map operations", count as f64, ""));
    let image = node.engine.image();
    rows.push(Row::plain("  verdict entries", image.verdicts.len() as f64, ""));
    rows.push(Row::plain("  addresses", image.addresses.len() as f64, ""));

    let part = Part::begin("a pod's start", LOCAL);
    let mut starts = Vec::new();
    for (slot, (name, addresses)) in (1..).zip(&local) {
        let gone = node.engine.remove_endpoint(Slot(slot));
        node.rig.apply(&gone)?;
        let start = Instant::now();
        let ops = node.engine.add_endpoint(Slot(slot), name, "", addresses);
        node.rig.apply(&ops)?;
        starts.push(start.elapsed().as_secs_f64() * 1e3);
        part.after(starts.len())?;
    }
    rows.push(Row::plain("a pod's start: its policy to the map, p50", percentile(&mut starts, 50), "ms"));
    rows.push(Row::plain("a pod's start: its policy to the map, p99", percentile(&mut starts, 99), "ms").target(CHANGE));

    let remote = |turn: usize| 1 + (turn * 7_919) % (PODS - 1);
    let is_remote = |index: usize| !(index.is_multiple_of(PODS / LOCAL) && index / (PODS / LOCAL) < LOCAL);
    for (name, app_of, address_of) in [
        (
            "relabel of a remote pod",
            (|turn: usize, index: usize| index / NAMESPACES + 1 + turn % 3) as fn(usize, usize) -> usize,
            (|_, index| index) as fn(usize, usize) -> usize,
        ),
        ("new address of a remote pod", |_, index| index / NAMESPACES, |turn, _| PODS + turn),
    ] {
        let part = Part::begin(name, changes);
        let (mut times, mut most) = (Vec::new(), 0usize);
        for turn in (0..).filter(|turn| is_remote(remote(*turn))).take(changes) {
            let index = remote(turn);
            let before = node.state.pods.get(&PodName::new(format!("ns{}", index % NAMESPACES), format!("p{index}"))).cloned();
            let object = one_pod(index, app_of(turn, index), address_of(turn, index))?;
            let mut own: Vec<IpAddr> = before.iter().flat_map(|pod| pod.addresses()).collect();
            if let Object::Pod(pod) = &object {
                own.extend(pod.addresses());
            }
            let (time, ops) = node.change(object)?;
            let foreign = ops.iter().find(|op| match op {
                MapOp::SetAddress(address, _) | MapOp::RemoveAddress(address) => !own.contains(address),
                MapOp::SetCidr(..) | MapOp::RemoveCidr(_) | MapOp::SetNodeAddress(_) | MapOp::RemoveNodeAddress(_) => true,
                MapOp::SetVerdict(..) | MapOp::RemoveVerdict(..) | MapOp::SetEndpoint(..) | MapOp::RemoveEndpoint(_) => false,
            });
            ensure!(foreign.is_none(), "a change of one pod touches another's entry: {foreign:?}");
            times.push(time.as_secs_f64() * 1e3);
            part.after(times.len())?;
            most = most.max(ops.iter().filter(|op| !matches!(op, MapOp::SetEndpoint(..))).count());
        }
        rows.push(Row::plain(format!("{name} to the map, p50"), percentile(&mut times, 50), "ms"));
        rows.push(Row::plain(format!("{name} to the map, p99"), percentile(&mut times, 99), "ms").target(CHANGE));
        rows.push(Row::plain("  entries written, most", most as f64, "").target(WRITES));
    }

    let part = Part::begin("a pod made and deleted", churn);
    let (mut first, files) = (0.0, open_files()?);
    let start = Instant::now();
    for turn in 0..churn {
        // Comes with labels of its own now and then: identities come and go with it.
        let index = PODS + turn % 500;
        let mut object = pod(index, turn, PODS + 20_000 + turn % 40_000);
        object["metadata"]["labels"]["release"] = json!(format!("r{turn}"));
        let object = read(std::iter::once(object))?.pop().context("one object")?;
        let key = object.key();
        node.change(object)?;
        let mut next = ClusterState::clone(&node.state);
        next.remove(&key);
        node.state = Arc::new(next);
        let ops = node.engine.set_cluster(&node.state);
        node.rig.apply(&ops)?;
        if turn == churn / 10 {
            first = resident()?;
        }
        part.after(turn + 1)?;
    }
    let rate = churn as f64 / start.elapsed().as_secs_f64();
    rows.push(Row::plain("churn: pods made and deleted", rate, "pods/s"));
    rows.push(Row::against(format!("  resident after {churn} of them"), resident()? / 1e6, "MB", first / 1e6).target(GROWTH));
    rows.push(Row::against("  open files", open_files()?, "", files).target(1.0));
    Ok(rows)
}
