//! The acceptance cases: every cell of every matrix, by the definition and by the compiled maps.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::super::engine::{Engine, Settings, Source};
use super::super::image::Slot;
use super::super::maps::image_allows;
use super::super::model::{Direction, PacketProtocol};
use super::super::names::Names;
use super::super::verdict::{End, Evaluator};
use super::super::world;
use crate::cluster::ClusterState;
use crate::manifests;

/// A world in the form of the case files.
struct CaseWorld {
    namespaces: BTreeMap<String, Value>,
    pods: BTreeMap<String, Value>,
    nodes: BTreeMap<String, [String; 2]>,
    externals: BTreeMap<String, Vec<String>>,
    policies: BTreeMap<String, Value>,
}

fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

impl CaseWorld {
    fn new() -> Self {
        let mut world = Self {
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            nodes: BTreeMap::from([
                ("node1".to_owned(), ["10.0.0.1".to_owned(), "fd00:ffff::1".to_owned()]),
                ("node2".to_owned(), ["10.0.0.2".to_owned(), "fd00:ffff::2".to_owned()]),
            ]),
            externals: BTreeMap::from([
                ("ext1".to_owned(), vec!["203.0.113.10".to_owned(), "2001:db8::10".to_owned()]),
                ("ext2".to_owned(), vec!["172.16.5.5".to_owned(), "fd99::5".to_owned()]),
            ]),
            policies: BTreeMap::new(),
        };
        for (n, ns) in ["x", "y", "z"].into_iter().enumerate() {
            world.namespaces.insert(ns.to_owned(), json!({"ns": ns}));
            for (p, pod) in ["a", "b", "c"].into_iter().enumerate() {
                let (n, p) = (n + 1, p + 1);
                world.pods.insert(
                    format!("{ns}/{pod}"),
                    json!({"labels": {"pod": pod}, "ips": [format!("192.168.{n}.{p}"), format!("fd00:{n}::{p}")]}),
                );
            }
        }
        world
    }

    fn set_pod(&mut self, name: &str, spec: &Value) {
        let short = name.split('/').nth(1).unwrap_or_default();
        let base = self.pods.get(name).cloned().unwrap_or_else(|| json!({"labels": {"pod": short}, "ips": []}));
        let mut pod = json!({"labels": base["labels"], "ips": base["ips"]});
        for (key, value) in fields(spec) {
            pod[key] = value.clone();
        }
        self.pods.insert(name.to_owned(), pod);
    }

    fn begin(&mut self, case: &Value) {
        for (name, labels) in fields(&case["namespaces"]) {
            self.namespaces.insert(name.clone(), labels.clone());
        }
        for (name, spec) in fields(&case["pods"]) {
            self.set_pod(name, spec);
        }
        for name in texts(&case["remove_pods"]) {
            self.pods.remove(&name);
        }
        for (name, addresses) in fields(&case["externals"]) {
            self.externals.insert(name.clone(), texts(addresses));
        }
    }

    fn step(&mut self, step: &Value) {
        for object in step["apply"].as_array().into_iter().flatten() {
            let meta = &object["metadata"];
            let name = meta["name"].as_str().unwrap_or_default();
            let key = match meta["namespace"].as_str() {
                Some(namespace) => format!("{namespace}/{name}"),
                None => name.to_owned(),
            };
            self.policies.insert(key, object.clone());
        }
        for key in texts(&step["delete"]) {
            assert!(self.policies.remove(&key).is_some(), "{key} is there to delete");
        }
        for (name, labels) in fields(&step["set_pod_labels"]) {
            self.pods.get_mut(name).expect("the pod is there")["labels"] = labels.clone();
        }
        for (name, phase) in fields(&step["set_pod_phase"]) {
            self.pods.get_mut(name).expect("the pod is there")["phase"] = phase.clone();
        }
        for (name, labels) in fields(&step["set_namespace_labels"]).chain(fields(&step["create_namespaces"])) {
            self.namespaces.insert(name.clone(), labels.clone());
        }
        for (name, spec) in fields(&step["create_pods"]) {
            self.set_pod(name, spec);
        }
        for name in texts(&step["delete_pods"]) {
            self.pods.remove(&name);
        }
    }

    fn manifests(&self) -> String {
        let mut all = Vec::new();
        for (name, labels) in &self.namespaces {
            all.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
        }
        for (name, ips) in &self.nodes {
            let addresses: Vec<Value> = ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
            all.push(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses}}));
        }
        for (name, spec) in &self.pods {
            let (namespace, short) = name.split_once('/').expect("namespace/name");
            let ports: Vec<Value> = if let Some(ports) = spec["ports"].as_array() {
                let port = |p: &Value| json!({"name": p["name"], "containerPort": p["port"], "protocol": p.get("protocol").unwrap_or(&json!("TCP"))});
                ports.iter().map(port).collect()
            } else {
                let port = |(protocol, number)| json!({"name": format!("serve-{number}-{}", str::to_lowercase(protocol)), "containerPort": number, "protocol": protocol});
                ["TCP", "UDP", "SCTP"].into_iter().flat_map(|protocol| [(protocol, 80), (protocol, 81)]).map(port).collect()
            };
            let node = spec["node"].as_str().unwrap_or("node1");
            let host = spec["hostNetwork"] == true;
            let ips = if host { self.nodes[node].to_vec() } else { texts(&spec["ips"]) };
            let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
            let mut meta = Map::from_iter([
                ("name".to_owned(), json!(short)),
                ("namespace".to_owned(), json!(namespace)),
                ("labels".to_owned(), spec["labels"].clone()),
            ]);
            if spec["terminating"] == true {
                meta.insert("deletionTimestamp".to_owned(), json!("2026-01-01T00:00:00Z"));
            }
            all.push(json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta,
                "spec": {"nodeName": node, "hostNetwork": host, "containers": [{"name": "c", "ports": ports}]},
                "status": {"phase": spec["phase"].as_str().unwrap_or("Running"), "podIPs": ips}}));
        }
        all.extend(self.policies.values().cloned());
        all.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    fn end(&self, name: &str, family: u64) -> End {
        if self.nodes.contains_key(name) {
            return End::Node(name.to_owned());
        }
        if let Some(addresses) = self.externals.get(name) {
            let addresses = addresses.iter().map(|text| text.parse::<IpAddr>().expect("an address"));
            return End::Address(addresses.into_iter().find(|a| a.is_ipv4() == (family == 4)).expect("an address of the family"));
        }
        name.parse().expect("namespace/pod")
    }
}

/// One engine a node: what both ends' maps say.
fn enforced(
    engines: &BTreeMap<String, (Engine, BTreeMap<String, Slot>)>,
    cluster: &ClusterState,
    from: &End,
    to: &End,
    family: u64,
    protocol: u8,
    port: u16,
) -> bool {
    let address = |end: &End| -> Option<IpAddr> {
        let mut all: Vec<IpAddr> = match end {
            End::Address(address) => vec![*address],
            End::Node(name) => cluster.nodes[name].ip_addresses().collect(),
            End::Pod(name) => world::addresses(&cluster.pods[name]),
        };
        all.retain(|a| a.is_ipv4() == (family == 4));
        all.first().copied()
    };
    let (Some(source), Some(destination)) = (address(from), address(to)) else { return true };
    [(from, Direction::Egress, destination), (to, Direction::Ingress, source)].into_iter().all(|(end, direction, peer)| {
        let End::Pod(name) = end else { return true };
        let (engine, slots) = &engines[&cluster.pods[name].spec.node_name];
        slots.get(&name.to_string()).is_none_or(|slot| image_allows(engine.image(), *slot, direction, peer, protocol, port))
    })
}

fn check(case: &Value, told: &str) -> u32 {
    let mut world = CaseWorld::new();
    world.begin(case);
    let mut cluster = Arc::new(ClusterState::default());
    let mut engines: BTreeMap<String, (Engine, BTreeMap<String, Slot>)> = BTreeMap::new();
    for node in ["node1", "node2"] {
        let engine = Engine::new(Settings { node_name: node.to_owned(), ..Settings::default() });
        engines.insert(node.to_owned(), (engine, BTreeMap::new()));
    }
    let mut cells = 0;
    for (index, step) in case["steps"].as_array().expect("steps").iter().enumerate() {
        world.step(step);
        cluster = Arc::new(cluster.replaced_by(manifests::parse("case.json", &world.manifests()).expect("a valid case")));
        for (node, (engine, slots)) in &mut engines {
            engine.set_cluster(&cluster);
            let local = cluster.pods.iter().filter(|(_, pod)| world::is_networked(pod) && pod.spec.node_name == *node);
            let local: BTreeMap<String, _> = local.map(|(name, pod)| (name.to_string(), (name, pod))).collect();
            let gone: Vec<String> = slots.keys().filter(|name| !local.contains_key(*name)).cloned().collect();
            for name in gone {
                engine.remove_endpoint(slots.remove(&name).expect("it was there"));
            }
            for (text, (name, pod)) in local {
                let free = (1..).map(Slot).find(|slot| !slots.values().any(|taken| taken == slot)).expect("few pods");
                let slot = *slots.entry(text).or_insert(free);
                engine.add_endpoint(slot, name, "", &world::addresses(pod));
            }
        }
        let evaluator = Evaluator::new(&cluster, Source::Policies, Names::default());
        let columns = texts(&step["expect"]["columns"]);
        for matrix in step["expect"]["matrices"].as_array().expect("matrices") {
            let family = matrix["family"].as_u64().expect("a family");
            for probe in texts(&matrix["probes"]) {
                let (protocol, port) = probe.split_once('/').unwrap_or((&probe, "0"));
                let protocol = match protocol {
                    "TCP" => 6,
                    "UDP" => 17,
                    "SCTP" => 132,
                    _ => 1,
                };
                let port: u16 = port.parse().expect("a port");
                for (row, cells_of_row) in fields(&matrix["rows"]) {
                    for (column, wanted) in columns.iter().zip(cells_of_row.as_str().expect("a row").chars()) {
                        let (from, to) = (world.end(row, family), world.end(column, family));
                        let number = u8::try_from(family).expect("4 or 6");
                        let defined = evaluator.verdict(&from, &to, number, PacketProtocol::from_number(protocol), port);
                        let told = format!("{told} step {index}: {row} -> {column} {probe} IPv{family}");
                        let found = defined.as_ref().map_or('-', |verdict| if verdict.allowed { '.' } else { 'X' });
                        assert_eq!(found, wanted, "{told}: {defined:?}");
                        if wanted != '-' && row != column {
                            assert_eq!(enforced(&engines, &cluster, &from, &to, family, protocol, port), wanted == '.', "{told}, compiled");
                        }
                        cells += 1;
                    }
                }
            }
        }
    }
    cells
}

/// Every matrix case of a directory.
fn check_directory(directory: &std::path::Path) -> (u32, u32) {
    let (mut cases, mut cells) = (0, 0);
    let mut paths: Vec<_> =
        std::fs::read_dir(directory).expect("the cases are there").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "yaml")) {
        let text = std::fs::read_to_string(&path).expect("readable");
        let case: Value = serde_saphyr::from_str_with_options(&text, serde_saphyr::options! { strict_booleans: true }).expect("YAML");
        if case["kind"] != "flow" {
            cells += check(&case, &path.file_name().expect("a file").to_string_lossy());
            cases += 1;
        }
    }
    (cases, cells)
}

#[test]
fn every_cell_of_the_acceptance_cases() {
    let (cases, cells) = check_directory(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/netpol-cases"));
    assert!(cases >= 40 && cells > 17_000, "{cases} cases, {cells} cells");
    // More of them, made by the reference evaluator, in a long run.
    if let Some(directory) = std::env::var_os("POLICY_CASES") {
        let (cases, cells) = check_directory(std::path::Path::new(&directory));
        assert!(cases > 0);
        println!("{cases} cases, {cells} cells");
    }
}
