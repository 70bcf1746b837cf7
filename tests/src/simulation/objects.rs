//! The cluster's objects.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rand::RngExt as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::manifests;

use crate::ipam_world::NODE;

const NAMESPACES: [&str; 2] = ["x", "y"];
const APPS: [&str; 3] = ["a", "b", "c"];
/// Outside the cluster, in a block of some rule and in none.
const STRANGERS: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 10), Ipv4Addr::new(8, 8, 8, 8)];

struct Pod {
    app: &'static str,
    node: &'static str,
    address: Option<Ipv4Addr>,
}

/// Pods, namespaces and policies.
pub(super) struct Objects {
    pods: BTreeMap<PodName, Pod>,
    teams: BTreeMap<&'static str, &'static str>,
    policies: BTreeMap<String, Value>,
}

fn pick<T: Copy>(random: &mut StdRng, from: &[T]) -> T {
    from[random.random_range(0..from.len())]
}

impl Objects {
    /// Three pods of another node, no policy.
    pub(super) fn new() -> Self {
        let mut pods = BTreeMap::new();
        for (number, app) in (1..).zip(APPS) {
            let pod = Pod { app, node: "node-2", address: Some(Ipv4Addr::new(10, 0, 200, number)) };
            pods.insert(PodName::new(NAMESPACES[usize::from(number) % 2], format!("remote-{number}")), pod);
        }
        Self { pods, teams: NAMESPACES.map(|name| (name, "red")).into(), policies: BTreeMap::new() }
    }

    /// A pod that the scheduler has bound to the node.
    pub(super) fn bind(&mut self, random: &mut StdRng, number: u32) -> PodName {
        let name = PodName::new(pick(random, &NAMESPACES), format!("pod-{number}"));
        self.pods.insert(name.clone(), Pod { app: pick(random, &APPS), node: NODE, address: None });
        name
    }

    /// Its kubelet tells its address.
    pub(super) fn runs(&mut self, name: &PodName, address: Ipv4Addr) {
        if let Some(pod) = self.pods.get_mut(name) {
            pod.address = Some(address);
        }
    }

    pub(super) fn delete(&mut self, name: &PodName) {
        self.pods.remove(name);
    }

    /// One change of something that is no pod's start or end.
    pub(super) fn change(&mut self, random: &mut StdRng) {
        match random.random_range(0..10) {
            0 | 1 => {
                let names: Vec<PodName> = self.pods.keys().cloned().collect();
                let name = &names[random.random_range(0..names.len())];
                let app = pick(random, &APPS);
                self.pods.entry(name.clone()).and_modify(|pod| pod.app = app);
            }
            2 => {
                let remote = PodName::new("x", "remote-9");
                if self.pods.remove(&remote).is_none() {
                    let address = Some(Ipv4Addr::new(10, 0, 201, random.random_range(1..250)));
                    self.pods.insert(remote, Pod { app: pick(random, &APPS), node: "node-3", address });
                }
            }
            3 => {
                let team = pick(random, &["red", "blue"]);
                self.teams.insert(pick(random, &NAMESPACES), team);
            }
            4 | 5 if !self.policies.is_empty() => {
                let names: Vec<String> = self.policies.keys().cloned().collect();
                self.policies.remove(&names[random.random_range(0..names.len())]);
            }
            _ => {
                let name = format!("p{}", random.random_range(0..6));
                let policy = policy(random, &name);
                self.policies.insert(name, policy);
            }
        }
    }

    /// What the API server has.
    pub(super) fn state(&self) -> Arc<ClusterState> {
        let namespaces = self.teams.iter().map(|(name, team)| {
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"ns": name, "team": team}}})
        });
        let pods = self.pods.iter().map(|(name, pod)| {
            let addresses: Vec<Value> = pod.address.iter().map(|address| json!({"ip": address})).collect();
            let phase = if pod.address.is_some() { "Running" } else { "Pending" };
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name.name, "namespace": name.namespace, "labels": {"app": pod.app}},
                "spec": {"nodeName": pod.node, "containers": [{"name": "c"}]},
                "status": {"phase": phase, "podIP": pod.address, "podIPs": addresses}})
        });
        let text: Vec<String> = namespaces.chain(pods).chain(self.policies.values().cloned()).map(|object| object.to_string()).collect();
        let objects = manifests::parse("simulation.json", &text.join("\n")).expect("the simulation's objects are valid");
        Arc::new(ClusterState::default().replaced_by(objects))
    }
}

/// Addresses worth asking about in a state: its pods', and strangers'.
pub(super) fn peers(state: &ClusterState) -> Vec<IpAddr> {
    let pods = state.pods.values().flat_map(|pod| pod.addresses());
    pods.chain(STRANGERS.map(IpAddr::V4)).collect()
}

fn peer(random: &mut StdRng) -> Value {
    match random.random_range(0..5) {
        0 => json!({"podSelector": {"matchLabels": {"app": pick(random, &APPS)}}}),
        1 => json!({"namespaceSelector": {"matchLabels": {"team": pick(random, &["red", "blue"])}}}),
        2 => {
            json!({"namespaceSelector": {"matchLabels": {"ns": pick(random, &NAMESPACES)}}, "podSelector": {"matchLabels": {"app": pick(random, &APPS)}}})
        }
        3 => json!({"ipBlock": {"cidr": "10.0.0.0/16", "except": ["10.0.200.0/24"]}}),
        _ => json!({"ipBlock": {"cidr": pick(random, &["203.0.113.0/24", "0.0.0.0/0", "10.0.16.0/26"])}}),
    }
}

fn rules(random: &mut StdRng, end: &str) -> Vec<Value> {
    let count = random.random_range(0..3);
    let rule = |random: &mut StdRng| {
        let mut rule = json!({});
        if random.random_bool(0.85) {
            let peers: Vec<Value> = (0..random.random_range(1..3)).map(|_| peer(random)).collect();
            rule[end] = json!(peers);
        }
        if random.random_bool(0.6) {
            rule["ports"] = json!([{"protocol": pick(random, &["TCP", "UDP"]), "port": pick(random, &[80, 81])}]);
        }
        rule
    };
    (0..count).map(|_| rule(random)).collect()
}

fn policy(random: &mut StdRng, name: &str) -> Value {
    let types = pick(random, &[&["Ingress"][..], &["Egress"], &["Ingress", "Egress"]]);
    let selector = if random.random_bool(0.3) { json!({}) } else { json!({"matchLabels": {"app": pick(random, &APPS)}}) };
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": pick(random, &NAMESPACES)},
        "spec": {"podSelector": selector, "policyTypes": types, "ingress": rules(random, "from"), "egress": rules(random, "to")}})
}
