//! Policy at scale: a cluster of 10,000 pods and 1,000 policies, of which 110 pods are this node's, compiled and written to
//! the kernel's maps; then one change after the other.
//!
//! Smaller clusters come first, for the plots. Beside the cold start and a pod's start stands the kernel's share of it: the same map
//! writes and nothing else. Most changes of remote pods write nothing, so there is no such floor for them.
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
use super::plot::Plot;
use crate::datapath::Rig;

const NAMESPACES: usize = 100;
const PODS: usize = 10_000;
/// Smaller clusters, for the plots.
const FEWER: [usize; 2] = [1_000, 3_000];
/// Pods for each policy.
const PODS_A_POLICY: usize = 10;
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

/// A cluster of so many pods.
#[derive(Clone, Copy)]
struct Scale(usize);

impl Scale {
    fn policies(self) -> usize {
        self.0 / PODS_A_POLICY
    }

    /// The first of each hundred or so run on this node.
    fn is_local(self, index: usize) -> bool {
        let step = self.0 / LOCAL;
        index.is_multiple_of(step) && index / step < LOCAL
    }

    /// One pod as the API server has it.
    fn pod(self, index: usize, app: usize, address: usize) -> Value {
        let node = if self.is_local(index) { 0 } else { 1 + index % 90 };
        let [a, b] = [address >> 8 & 255, address & 255];
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("p{index}"), "namespace": format!("ns{}", index % NAMESPACES), "labels": {"app": APPS[app % 10], "release": format!("r{}", index % 7)}},
            "spec": {"nodeName": format!("node{node}"), "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080 + index % 3}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": format!("10.{}.{a}.{b}", 64 + (address >> 16))}]}})
    }
}

/// Ten policies a namespace in the largest cluster: what each app may be reached by and may reach.
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

fn one(object: Value) -> anyhow::Result<Object> {
    read(std::iter::once(object))?.pop().context("one object")
}

fn world(scale: Scale) -> anyhow::Result<ClusterState> {
    let namespaces = (0..NAMESPACES).map(|index| {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns{index}"), "labels": {"team": format!("t{}", index % 10)}}})
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}});
    let pods = (0..scale.0).map(|index| scale.pod(index, index / NAMESPACES, index));
    let objects = namespaces.chain([node]).chain(pods).chain((0..scale.policies()).map(policy));
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
    scale: Scale,
    engine: Engine,
    state: Arc<ClusterState>,
    rig: Rig,
    local: Vec<(PodName, Vec<IpAddr>)>,
}

/// From an event to the map, in milliseconds: all of it, and the map writes alone.
#[derive(Default)]
struct Times {
    whole: Vec<f64>,
    writes: Vec<f64>,
}

impl Times {
    /// Times what gives the operations, and the writing of them.
    fn take(&mut self, rig: &mut Rig, decide: impl FnOnce() -> Vec<MapOp>) -> anyhow::Result<Vec<MapOp>> {
        let start = Instant::now();
        let ops = decide();
        let decided = Instant::now();
        rig.apply(&ops)?;
        self.whole.push(start.elapsed().as_secs_f64() * 1e3);
        self.writes.push(decided.elapsed().as_secs_f64() * 1e3);
        Ok(ops)
    }

    fn rows(mut self, name: &str) -> [Row; 2] {
        [50, 99].map(|percent| {
            let row = Row::plain(format!("{name}, p{percent}"), percentile(&mut self.whole, percent), "ms");
            if percent == 99 { row.target(CHANGE) } else { row }
        })
    }
}

impl Node {
    /// From the objects to the maps, as after the agent's start on an empty kernel.
    fn cold(scale: Scale) -> anyhow::Result<(Self, Vec<Row>)> {
        let state = Arc::new(world(scale)?);
        let mut rig = Rig::new("bench-policy", 1_024)?;
        let mut engine = Engine::new(Settings { node_name: NODE.to_owned(), ..Settings::default() });
        let local = state.pods.iter().filter(|(_, pod)| pod.spec.node_name == NODE);
        let local: Vec<(PodName, Vec<IpAddr>)> = local.map(|(name, pod)| (name.clone(), pod.addresses().collect())).collect();
        ensure!(local.len() == LOCAL, "{} pods are local", local.len());
        let start = cpu();
        // As the agent takes pods over: each is known to the datapath before its policies are.
        let mut ops = Vec::new();
        for (slot, (name, addresses)) in (1..).zip(&local) {
            ops.extend(engine.add_endpoint(Slot(slot), name, "", addresses));
        }
        ops.extend(engine.set_cluster(&state));
        let resolved = cpu() - start;
        rig.apply(&ops)?;
        let whole = cpu() - start;
        let name = format!("cold: {} pods, {} policies, {LOCAL} local, CPU", scale.0, scale.policies());
        let row = Row::plain(name, whole.as_secs_f64(), "s").target(COLD).beside((whole - resolved).as_secs_f64());
        let image = engine.image();
        let rows = vec![
            row.at(Plot::PolicyCold, "cold", scale.0 as f64),
            Row::plain("  map operations", ops.len() as f64, ""),
            Row::plain("  verdict entries", image.verdicts.len() as f64, ""),
            Row::plain("  addresses", image.addresses.len() as f64, ""),
        ];
        Ok((Self { scale, engine, state, rig, local }, rows))
    }

    /// The next state with one object changed, into the maps; gives the operations.
    fn change(&mut self, object: Object, times: &mut Times) -> anyhow::Result<Vec<MapOp>> {
        let Self { engine, state, rig, .. } = self;
        times.take(rig, || {
            let mut next = ClusterState::clone(state);
            next.apply(object);
            *state = Arc::new(next);
            engine.set_cluster(state)
        })
    }

    fn pod_starts(&mut self) -> anyhow::Result<[Row; 2]> {
        let Self { engine, rig, local, .. } = self;
        let part = Part::begin("a pod's start", LOCAL);
        let mut times = Times::default();
        for (slot, (name, addresses)) in (1..).zip(&*local) {
            let gone = engine.remove_endpoint(Slot(slot));
            rig.apply(&gone)?;
            times.take(rig, || engine.add_endpoint(Slot(slot), name, "", addresses))?;
            part.after(times.whole.len())?;
        }
        let writes = percentile(&mut times.writes, 50);
        let [median, last] = times.rows("a pod's start: its policy to the map");
        Ok([median.beside(writes), last])
    }

    /// Changes of remote pods: what they are labelled, and where they are.
    fn remote_changes(&mut self, changes: usize) -> anyhow::Result<Vec<Row>> {
        type Choice = fn(usize, usize) -> usize;
        let relabelled: Choice = |turn, index| index / NAMESPACES + 1 + turn % 3;
        let moved: Choice = |turn, _| PODS + turn;
        let scale = self.scale;
        let mut rows = Vec::new();
        for (name, app_of, address_of) in [
            ("relabel of a remote pod", relabelled, (|_, index| index) as Choice),
            ("new address of a remote pod", (|_, index| index / NAMESPACES) as Choice, moved),
        ] {
            let part = Part::begin(name, changes);
            let (mut times, mut most) = (Times::default(), 0usize);
            let remote = |turn: usize| 1 + (turn * 7_919) % (scale.0 - 1);
            for turn in (0..).filter(|turn| !scale.is_local(remote(*turn))).take(changes) {
                let index = remote(turn);
                let before = self.state.pods.get(&PodName::new(format!("ns{}", index % NAMESPACES), format!("p{index}"))).cloned();
                let object = one(scale.pod(index, app_of(turn, index), address_of(turn, index)))?;
                let mut own: Vec<IpAddr> = before.iter().flat_map(|pod| pod.addresses()).collect();
                if let Object::Pod(pod) = &object {
                    own.extend(pod.addresses());
                }
                let ops = self.change(object, &mut times)?;
                let foreign = ops.iter().find(|op| match op {
                    MapOp::SetAddress(address, _) | MapOp::RemoveAddress(address) => !own.contains(address),
                    MapOp::SetCidr(..) | MapOp::RemoveCidr(_) | MapOp::SetNodeAddress(_) | MapOp::RemoveNodeAddress(_) => true,
                    MapOp::SetVerdict(..) | MapOp::RemoveVerdict(..) | MapOp::SetEndpoint(..) | MapOp::RemoveEndpoint(_) => false,
                });
                ensure!(foreign.is_none(), "a change of one pod touches another's entry: {foreign:?}");
                part.after(times.whole.len())?;
                most = most.max(ops.iter().filter(|op| !matches!(op, MapOp::SetEndpoint(..))).count());
            }
            let rank = |row: Row, part: &str| row.at(Plot::PolicyChange, format!("{name}, {part}"), scale.0 as f64);
            let [median, last] = times.rows(&format!("{name} to the map, {} pods", scale.0));
            rows.extend([rank(median, "p50"), rank(last, "p99")]);
            rows.push(Row::plain("  entries written, most", most as f64, "").target(WRITES));
        }
        Ok(rows)
    }

    fn churn(&mut self, churn: usize) -> anyhow::Result<Vec<Row>> {
        let part = Part::begin("a pod made and deleted", churn);
        let (mut first, files) = (0.0, open_files()?);
        let start = Instant::now();
        for turn in 0..churn {
            // Comes with labels of its own now and then: identities come and go with it.
            let index = PODS + turn % 500;
            let mut object = self.scale.pod(index, turn, PODS + 20_000 + turn % 40_000);
            object["metadata"]["labels"]["release"] = json!(format!("r{turn}"));
            let object = one(object)?;
            let key = object.key();
            self.change(object, &mut Times::default())?;
            let mut next = ClusterState::clone(&self.state);
            next.remove(&key);
            self.state = Arc::new(next);
            let ops = self.engine.set_cluster(&self.state);
            self.rig.apply(&ops)?;
            if turn == churn / 10 {
                first = resident()?;
            }
            part.after(turn + 1)?;
        }
        let rate = churn as f64 / start.elapsed().as_secs_f64();
        Ok(vec![
            Row::plain("churn: pods made and deleted", rate, "pods/s"),
            Row::against(format!("  resident after {churn} of them"), resident()? / 1e6, "MB", first / 1e6).target(GROWTH),
            Row::against("  open files", open_files()?, "", files).target(1.0),
        ])
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
    let mut rows = Vec::new();
    for pods in FEWER {
        let (mut node, cold) = Node::cold(Scale(pods))?;
        rows.extend(cold);
        rows.extend(node.remote_changes(changes / 4)?);
    }
    let (mut node, cold) = Node::cold(Scale(PODS))?;
    rows.extend(cold);
    rows.extend(node.pod_starts()?);
    rows.extend(node.remote_changes(changes)?);
    rows.extend(node.churn(churn)?);
    Ok(rows)
}
