//! Proofs of the compiler against the definition: random worlds, random changes, every prefix of the operations.

mod cases;
mod random;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::dns::Answer;
use super::engine::{Engine, Settings, Source, UnselectedPod};
use super::image::{MapImage, MapOp, PolicyMaps as _, Slot};
use super::maps::{ModelMaps, image_allows};
use super::model::{Direction, PacketProtocol};
use super::verdict::{End, Evaluator};
use super::world;
use crate::cluster::ClusterState;
use crate::ids::PodName;
use random::World;

pub(super) use random::Rng;

const PROTOCOLS: [u8; 4] = [6, 17, 132, 1];
const PORTS: [u16; 5] = [79, 80, 81, 82, 443];

/// Every question worth asking in a world: slot, direction, peer, protocol, port.
fn questions(slots: &[Slot], peers: &[IpAddr]) -> Vec<(Slot, Direction, IpAddr, u8, u16)> {
    let mut all = Vec::new();
    for slot in slots {
        for direction in Direction::BOTH {
            for peer in peers {
                for protocol in PROTOCOLS {
                    let ports: &[u16] = if protocol == 1 { &[0] } else { &PORTS };
                    all.extend(ports.iter().map(|port| (*slot, direction, *peer, protocol, *port)));
                }
            }
        }
    }
    all
}

/// The definition's answer for one side.
fn defined(evaluator: &Evaluator<'_>, pod: &PodName, direction: Direction, peer: IpAddr, protocol: u8, port: u16) -> Option<bool> {
    let (own, peer_end) = (End::Pod(pod.clone()), End::Address(peer));
    let (from, to) = if direction == Direction::Egress { (&own, &peer_end) } else { (&peer_end, &own) };
    let family = if peer.is_ipv4() { 4 } else { 6 };
    let verdict = evaluator.verdict(from, to, family, PacketProtocol::from_number(protocol), port).ok()?;
    Some(if direction == Direction::Egress { verdict.egress.allowed } else { verdict.ingress.allowed })
}

/// The engine, the maps it has written, and the local pods by slot.
struct Node {
    source: Source,
    unselected_pod: UnselectedPod,
    engine: Engine,
    maps: ModelMaps,
    local: BTreeMap<Slot, PodName>,
}

impl Node {
    fn new() -> Self {
        Self::of(Source::Policies, UnselectedPod::Open)
    }

    fn of(source: Source, unselected_pod: UnselectedPod) -> Self {
        let engine = Engine::new(Settings { node_name: "n1".to_owned(), source, unselected_pod, ..Settings::default() });
        Self { source, unselected_pod, engine, maps: ModelMaps::default(), local: BTreeMap::new() }
    }

    /// Another node of the same kind.
    fn afresh(&self) -> Self {
        Self::of(self.source, self.unselected_pod)
    }

    /// Takes a cluster over: its pods are attached, and the maps are written.
    fn follow(&mut self, cluster: &Arc<ClusterState>) {
        let ops = self.engine.set_cluster(cluster);
        self.apply(&ops);
        let ops = self.attach(cluster);
        self.apply(&ops);
    }

    fn apply(&mut self, ops: &[MapOp]) {
        self.maps.apply(ops).expect("a model has room");
        assert_eq!(self.maps.image, *self.engine.image(), "the operations make the image");
    }

    /// Attaches and detaches so that the networked pods of the node are local.
    fn attach(&mut self, cluster: &ClusterState) -> Vec<MapOp> {
        let mut ops = Vec::new();
        let gone = |name: &PodName| !cluster.pods.get(name).is_some_and(|pod| world::is_networked(pod) && pod.spec.node_name == "n1");
        let slots: Vec<Slot> = self.local.iter().filter(|(_, name)| gone(name)).map(|(slot, _)| *slot).collect();
        for slot in slots {
            self.local.remove(&slot);
            ops.extend(self.engine.remove_endpoint(slot));
        }
        for (name, pod) in &cluster.pods {
            if gone(name) {
                continue;
            }
            let present = self.local.iter().find(|(_, local)| *local == name).map(|(slot, _)| *slot);
            let addresses = world::addresses(pod);
            if present.is_some_and(|slot| self.engine.image().endpoints[&slot].addresses == addresses) {
                continue;
            }
            // A pod that was made anew under its name comes with other addresses.
            let free = (1..).map(Slot).find(|slot| !self.local.contains_key(slot)).expect("few pods");
            let slot = present.unwrap_or(free);
            ops.extend(self.engine.add_endpoint(slot, name, "", &addresses));
            self.local.insert(slot, name.clone());
        }
        ops
    }

    /// Pods get DNS answers about addresses of the world, which last 10 s or 100 s.
    fn learn(&mut self, rng: &mut Rng, peers: &[IpAddr], now: u64) -> Vec<MapOp> {
        let mut ops = Vec::new();
        let slots: Vec<Slot> = self.local.keys().copied().collect();
        for _ in 0..if slots.is_empty() { 0 } else { rng.below(6) } {
            let (name, address) = (rng.pick(&["www.example.com", "db.example.com", "x.cdn.net", "elsewhere.org"]), rng.pick(peers));
            let answer = Answer { name: name.to_owned(), address, ttl: rng.pick(&[0, 100]) };
            let (more, result) = self.engine.learn(rng.pick(&slots), &[answer], now);
            assert_eq!(result, Ok(()));
            ops.extend(more);
        }
        ops
    }

    fn agrees(&self, cluster: &ClusterState, peers: &[IpAddr], told: &str) {
        let evaluator = Evaluator::new(cluster, self.source, self.engine.names().clone()).with_unselected_pod(self.unselected_pod);
        let slots: Vec<Slot> = self.local.keys().copied().collect();
        for (slot, direction, peer, protocol, port) in questions(&slots, peers) {
            let pod = &self.local[&slot];
            let Some(wanted) = defined(&evaluator, pod, direction, peer, protocol, port) else { continue };
            let found = image_allows(&self.maps.image, slot, direction, peer, protocol, port);
            if found != wanted {
                let family = if peer.is_ipv4() { 4 } else { 6 };
                let (own, other) = (End::Pod(pod.clone()), End::Address(peer));
                let (from, to) = if direction == Direction::Egress { (&own, &other) } else { (&other, &own) };
                let why = evaluator.verdict(from, to, family, PacketProtocol::from_number(protocol), port);
                panic!("{told}: {direction} of {pod}, peer {peer}, protocol {protocol} port {port}: compiled {found}, but {why:#?}");
            }
        }
    }
}

/// A random world that changes, and a node that follows it.
struct Scene {
    rng: Rng,
    world: World,
    cluster: Arc<ClusterState>,
    node: Node,
}

impl Scene {
    fn begin(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let world = World::random(&mut rng);
        let cluster = Arc::new(world.cluster());
        let mut node = Node::of(Source::Policies, mode(seed));
        node.follow(&cluster);
        Self { rng, world, cluster, node }
    }

    /// Changes the world as often as one of the numbers says; gives the peers of before and after. The node does not follow yet.
    fn change(&mut self, times: &[u64]) -> Vec<IpAddr> {
        let mut peers = self.world.peers();
        for _ in 0..self.rng.pick(times) {
            self.world.change(&mut self.rng);
        }
        self.cluster = Arc::new(self.cluster.replaced_by(self.world.objects()));
        peers.extend(self.world.peers());
        peers.sort_unstable();
        peers.dedup();
        peers
    }
}

/// Some worlds are strict.
fn mode(seed: u64) -> UnselectedPod {
    if seed % 3 == 2 { UnselectedPod::Closed } else { UnselectedPod::Open }
}

/// The number of random worlds: few in a quick run, many when asked by `POLICY_WORLDS`.
fn rounds(quick: u64) -> u64 {
    std::env::var("POLICY_WORLDS").ok().and_then(|text| text.parse().ok()).unwrap_or(quick)
}

#[test]
fn random_worlds_compile_to_what_the_definition_says() {
    for seed in 0..rounds(30) {
        let Scene { world, cluster, mut node, .. } = Scene::begin(seed);
        node.agrees(&cluster, &world.peers(), &format!("seed {seed}"));
        let ops = node.learn(&mut Rng::new(seed), &world.peers(), 1_000);
        node.apply(&ops);
        node.agrees(&cluster, &world.peers(), &format!("seed {seed}, with names"));
    }
}

#[test]
fn a_changed_world_is_as_one_compiled_afresh_and_no_prefix_opens_more() {
    for seed in 0..rounds(5) {
        let mut scene = Scene::begin(1_000_000 + seed);
        for step in 0..6u64 {
            let told = format!("seed {seed} step {step}");
            let before = scene.node.maps.image.clone();
            // Often one change, sometimes several at once, which no watch delivers but a directory of manifests does.
            let peers = scene.change(&[1, 1, 1, 2, 4]);
            let Scene { rng, cluster, node, .. } = &mut scene;
            let ops = node.engine.set_cluster(cluster);
            every_prefix_is_old_or_new(&before, &ops, &peers, &told);
            node.apply(&ops);
            let ops = node.attach(cluster);
            node.apply(&ops);
            node.agrees(cluster, &peers, &told);
            assert!(node.engine.set_cluster(cluster).is_empty(), "{told}: nothing changed");
            for now in [step * 30, step * 30 + 15] {
                let before = node.maps.image.clone();
                let ops = if now % 2 == 0 { node.learn(rng, &peers, now) } else { node.engine.forget(now, |address| address == peers[0]) };
                every_prefix_is_old_or_new(&before, &ops, &peers, &told);
                node.apply(&ops);
                node.agrees(cluster, &peers, &told);
            }
            same_size_as_fresh(node, cluster, &told);
        }
    }
}

/// Policies as AWS's controller writes them: parts that come, change and go.
#[test]
fn parts_of_resolved_policies_change_as_if_compiled_afresh() {
    for seed in 0..rounds(4) {
        let mut rng = Rng::new(6_000_000 + seed);
        let world = World::random(&mut rng);
        let mut node = Node::of(Source::Endpoints, mode(seed));
        let mut cluster = Arc::new(world.cluster());
        let mut parts = BTreeMap::new();
        for step in 0..6 {
            let told = format!("seed {seed} step {step}");
            for _ in 0..=rng.below(3) {
                let name = (rng.chance(30), rng.below(2), rng.below(2));
                if rng.chance(25) {
                    parts.remove(&name);
                } else {
                    parts.insert(name, random::part(&mut rng, name));
                }
            }
            cluster = Arc::new(cluster.replaced_by(world.objects().into_iter().chain(random::objects(parts.values()))));
            let before = node.maps.image.clone();
            let ops = node.engine.set_cluster(&cluster);
            every_prefix_is_old_or_new(&before, &ops, &world.peers(), &told);
            node.apply(&ops);
            let ops = node.attach(&cluster);
            node.apply(&ops);
            node.agrees(&cluster, &world.peers(), &told);
            assert!(node.engine.set_cluster(&cluster).is_empty(), "{told}: nothing changed");
        }
        cluster = Arc::new(cluster.replaced_by(world.objects()));
        node.follow(&cluster);
        let is_closed = node.unselected_pod == UnselectedPod::Closed;
        assert!(node.maps.image.endpoints.values().all(|endpoint| endpoint.isolated() == [is_closed; 2]), "seed {seed}");
    }
}

/// Each takes over the sets of another, while all of them are peers that the sets speak of.
#[test]
fn pods_that_change_places_disturb_no_verdict() {
    let cluster = |labels: [&str; 3]| {
        let pods = labels.iter().zip(["a", "b", "c"]).zip(1..).map(|((label, name), last)| {
            format!(
                "{{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {{\"name\": \"{name}\", \"namespace\": \"x\", \"labels\": {{\"l\": \"{label}\"}}}}, \
                 \"spec\": {{\"nodeName\": \"n1\", \"containers\": []}}, \"status\": {{\"podIPs\": [{{\"ip\": \"192.168.1.{last}\"}}]}}}}"
            )
        });
        let allows = |label: &str, direction: &str, end: &str, peer: &str, port: u16| {
            format!(
                "{{\"apiVersion\": \"networking.k8s.io/v1\", \"kind\": \"NetworkPolicy\", \"metadata\": {{\"name\": \"{label}-{direction}-{peer}\", \"namespace\": \"x\"}}, \
                 \"spec\": {{\"podSelector\": {{\"matchLabels\": {{\"l\": \"{label}\"}}}}, \"policyTypes\": [\"Ingress\", \"Egress\"], \"{direction}\": [{{\"{end}\": \
                 [{{\"podSelector\": {{\"matchLabels\": {{\"l\": \"{peer}\"}}}}}}], \"ports\": [{{\"port\": {port}}}]}}]}}}}"
            )
        };
        let policies = [("1", "2", 80), ("2", "3", 81), ("3", "1", 82), ("1", "3", 443), ("2", "1", 79)];
        let policies = policies
            .into_iter()
            .flat_map(|(label, peer, port)| [allows(label, "ingress", "from", peer, port), allows(label, "egress", "to", peer, port)]);
        let text = pods.chain(policies).collect::<Vec<_>>().join("\n");
        Arc::new(ClusterState::default().replaced_by(crate::manifests::parse("world.json", &text).expect("valid")))
    };
    let peers: Vec<IpAddr> =
        ["192.168.1.1", "192.168.1.2", "192.168.1.3", "203.0.113.10"].map(|text| text.parse().expect("an address")).to_vec();
    let orders = [["1", "2", "3"], ["2", "1", "3"], ["2", "3", "1"], ["3", "1", "2"], ["1", "3", "2"], ["1", "1", "2"], ["2", "1", "1"]];
    for from in orders {
        for to in orders {
            let told = format!("{from:?} to {to:?}");
            let mut node = Node::new();
            node.follow(&cluster(from));
            let (before, after) = (node.maps.image.clone(), cluster(to));
            let ops = node.engine.set_cluster(&after);
            every_prefix_is_old_or_new(&before, &ops, &peers, &told);
            node.apply(&ops);
            node.agrees(&after, &peers, &told);
            same_size_as_fresh(&node, &after, &told);
        }
    }
}

/// After every prefix of the operations, each packet of a pod that stays has its old or its new verdict.
fn every_prefix_is_old_or_new(before: &MapImage, ops: &[MapOp], peers: &[IpAddr], told: &str) {
    let mut after = before.clone();
    ops.iter().for_each(|op| after.apply(op));
    let slots: Vec<Slot> = before.endpoints.keys().filter(|slot| after.endpoints.contains_key(*slot)).copied().collect();
    let ask = |image: &MapImage, q: &(Slot, Direction, IpAddr, u8, u16)| image_allows(image, q.0, q.1, q.2, q.3, q.4);
    // Packets whose verdict is the same before and after are the ones that a bad order would disturb.
    let steady: Vec<_> =
        questions(&slots, peers).into_iter().map(|q| (q, ask(before, &q))).filter(|(q, old)| *old == ask(&after, q)).collect();
    let mut image = before.clone();
    for (index, op) in ops.iter().enumerate() {
        image.apply(op);
        // Entries of sets and identities that nothing points at are seen by no packet.
        if matches!(op, MapOp::SetVerdict(key, ..) | MapOp::RemoveVerdict(key, ..) if !in_use(&image, key.policy)) {
            continue;
        }
        for (question, verdict) in &steady {
            assert_eq!(ask(&image, question), *verdict, "{told}: after operation {index} of {}: {op:?}: {question:?}", ops.len());
        }
    }
}

/// Whether both images have the same blocks and every pod of both the same policy sets: nothing but addresses moves.
fn only_addresses_move(before: &MapImage, after: &MapImage) -> bool {
    let sets = |image: &MapImage, slot: &Slot| image.endpoints.get(slot).map(|endpoint| (endpoint.ingress, endpoint.egress));
    let slots = before.endpoints.keys().chain(after.endpoints.keys());
    before.cidrs == after.cidrs && slots.into_iter().all(|slot| sets(before, slot) == sets(after, slot))
}

/// A change of as many addresses as go needs no more room than there was.
#[test]
fn a_change_of_addresses_needs_no_room_beside_theirs() {
    let mut replaced = 0;
    for seed in 0..rounds(40) {
        let mut scene = Scene::begin(6_000_000 + seed);
        for step in 0..8 {
            scene.change(&[2, 4, 8]);
            let Scene { cluster, node, .. } = &mut scene;
            let mut image = node.maps.image.clone();
            let before = image.clone();
            let ops = node.engine.set_cluster(cluster);
            let after = node.engine.image();
            if only_addresses_move(&before, after) {
                let most = before.addresses.len().max(after.addresses.len());
                for op in &ops {
                    image.apply(op);
                    assert!(image.addresses.len() <= most, "seed {seed} step {step}: {op:?} of {ops:?}");
                }
                let goes = before.addresses.keys().any(|address| !after.addresses.contains_key(address));
                replaced += usize::from(goes && after.addresses.keys().any(|address| !before.addresses.contains_key(address)));
            }
            node.apply(&ops);
            let ops = node.attach(cluster);
            node.apply(&ops);
        }
    }
    assert!(replaced > 3, "{replaced}");
}

fn in_use(image: &MapImage, policy: u32) -> bool {
    image.endpoints.values().any(|endpoint| endpoint.ingress == Some(policy) || endpoint.egress == Some(policy))
}

fn same_size_as_fresh(node: &Node, cluster: &Arc<ClusterState>, told: &str) {
    let mut fresh = node.afresh();
    fresh.engine.remember(node.engine.names().all());
    fresh.engine.set_cluster(cluster);
    fresh.attach(cluster);
    let (old, new) = (node.engine.image(), fresh.engine.image());
    let size = |image: &MapImage| (image.addresses.len(), image.cidrs.len(), image.endpoints.len(), image.verdicts.len());
    let only = |left: &MapImage, right: &MapImage| {
        left.addresses.keys().filter(|a| !right.addresses.contains_key(*a)).copied().collect::<Vec<_>>()
    };
    assert_eq!(size(old), size(new), "{told}: something is left over: {:?} {:?}", only(old, new), only(new, old));
}

#[test]
fn a_revision_grows_when_something_is_revoked() {
    let mut grown = 0;
    for seed in 0..rounds(8) {
        let mut scene = Scene::begin(2_000_000 + seed);
        for _ in 0..6 {
            let before = scene.node.engine.image().clone();
            let peers_before = scene.world.peers();
            scene.change(&[1]);
            let Scene { cluster, node, .. } = &mut scene;
            let ops = node.engine.set_cluster(cluster);
            node.apply(&ops);
            let after = node.engine.image().clone();
            for (slot, old) in &before.endpoints {
                let Some(new) = after.endpoints.get(slot) else { continue };
                let revoked = questions(&[*slot], &peers_before).into_iter().any(|(slot, direction, peer, protocol, port)| {
                    image_allows(&before, slot, direction, peer, protocol, port)
                        && !image_allows(&after, slot, direction, peer, protocol, port)
                });
                assert!(!revoked || new.revision > old.revision, "seed {seed}: a flow of {slot:?} is revoked");
                grown += u32::from(new.revision > old.revision);
            }
            node.follow(cluster);
        }
    }
    assert!(grown > 0);
}

/// The next agent: it finds the maps as `node` left them, learns of its pods, then of the cluster.
fn restarted(node: &Node, cluster: &Arc<ClusterState>) -> (Node, Vec<MapOp>) {
    let mut next = Node { maps: node.maps.clone(), local: node.local.clone(), ..node.afresh() };
    next.engine.remember(node.engine.names().all());
    let mut ops = next.engine.rebase(node.maps.read().expect("a model can be read"));
    for (slot, name) in &node.local {
        ops.extend(next.engine.add_endpoint(*slot, name, "", &node.maps.image.endpoints[slot].addresses));
    }
    ops.extend(next.engine.set_cluster(cluster));
    (next, ops)
}

#[test]
fn a_restart_without_a_change_writes_nothing() {
    let mut endpoints = 0;
    for seed in 0..rounds(40) {
        let mut scene = Scene::begin(3_000_000 + seed);
        // Numbers that were given in another order than the next agent gives them.
        for step in 0..4 {
            let (mut next, ops) = restarted(&scene.node, &scene.cluster);
            assert!(ops.is_empty(), "seed {seed} step {step}: {ops:?}");
            assert!(next.engine.set_cluster(&scene.cluster).is_empty(), "seed {seed} step {step}");
            endpoints += scene.node.local.len();
            if step == 2 {
                // What was recognised behaves as what was made.
                scene.node = next;
            }
            scene.change(&[1]);
            let Scene { rng, world, cluster, node } = &mut scene;
            node.follow(cluster);
            let ops = node.learn(rng, &world.peers(), 1_000);
            node.apply(&ops);
            node.agrees(cluster, &world.peers(), &format!("seed {seed} step {step}"));
        }
    }
    assert!(endpoints > 100);
}

#[test]
fn a_restart_over_a_change_opens_nothing_on_the_way() {
    for seed in 0..rounds(8) {
        let mut scene = Scene::begin(4_000_000 + seed);
        for step in 0..4 {
            let told = format!("seed {seed} step {step}");
            let before = scene.node.maps.image.clone();
            let peers = scene.change(&[1, 1, 2, 4]);
            let Scene { cluster, node, .. } = &mut scene;
            let (next, ops) = restarted(node, cluster);
            every_prefix_is_old_or_new(&before, &ops, &peers, &told);
            *node = next;
            node.apply(&ops);
            let ops = node.attach(cluster);
            node.apply(&ops);
            node.agrees(cluster, &peers, &told);
            same_size_as_fresh(node, cluster, &told);
        }
    }
}

/// The kernel refuses an operation, and perhaps one of those that mend it too, while the world goes on.
#[test]
fn maps_that_refused_operations_are_mended_and_open_nothing_on_the_way() {
    let mut refused = 0;
    for seed in 0..rounds(3) {
        let mut scene = Scene::begin(5_000_000 + seed);
        for step in 0..3 {
            let mut peers = scene.change(&[1, 2, 4]);
            let mut ops = scene.node.engine.set_cluster(&scene.cluster);
            for attempt in 0..2 {
                let told = format!("seed {seed} step {step} attempt {attempt}");
                let written = scene.rng.below(ops.len() + 1);
                scene.node.maps.apply(&ops[..written]).expect("a model has room");
                refused += usize::from(written < ops.len());
                let before = scene.node.maps.image.clone();
                peers.extend(scene.change(&[0, 0, 1]));
                let Scene { cluster, node, .. } = &mut scene;
                let _not_written = node.engine.set_cluster(cluster);
                ops = node.engine.rebase(node.maps.read().expect("a model can be read"));
                every_prefix_is_old_or_new(&before, &ops, &peers, &told);
            }
            let told = format!("seed {seed} step {step}");
            let Scene { cluster, node, .. } = &mut scene;
            node.apply(&ops);
            let ops = node.attach(cluster);
            node.apply(&ops);
            node.agrees(cluster, &peers, &told);
            same_size_as_fresh(node, cluster, &told);
        }
    }
    assert!(refused > 3, "{refused} operations were refused");
}
