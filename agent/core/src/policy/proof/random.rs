//! Random clusters: small, both families, everything that policies can say.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::cluster::{ClusterState, Object};
use crate::manifests;

/// SplitMix64: the same world for the same seed, whatever the machine.
pub(in crate::policy) struct Rng(u64);

impl Rng {
    pub(in crate::policy) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(in crate::policy) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(in crate::policy) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(in crate::policy) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn some<T: Copy>(&mut self, from: &[T], at_most: usize) -> Vec<T> {
        let count = self.below(at_most + 1);
        (0..count).map(|_| self.pick(from)).collect()
    }
}

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 4] = ["a", "b", "c", "d"];
const NAMES: [&str; 4] = ["web", "dns", "tcp-80", "tcp-81"];
const V4_BLOCKS: [&str; 11] = [
    "0.0.0.0/0",
    "192.168.0.0/16",
    "192.168.1.0/24",
    "192.168.2.0/24",
    "192.168.1.2/32",
    "192.168.0.0/22",
    "203.0.113.0/24",
    "10.0.0.0/8",
    "192.168.2.77/24",
    "172.16.0.0/12",
    "10.0.0.2/32",
];
const V6_BLOCKS: [&str; 7] = ["::/0", "fd00::/8", "fd00:1::/32", "fd00:1::2/128", "fd00:2::/32", "fd00:3::/48", "2001:db8::/32"];
/// A stranger's address, a pod's, a node's, a service's.
const EXTERNAL: [&str; 4] = ["198.51.100.1", "192.168.1.2", "10.0.0.2", "172.20.0.10"];
const TRANSPORTS: [&str; 3] = ["TCP", "UDP", "SCTP"];

/// A cluster as manifests.
pub(super) struct World {
    namespaces: Vec<Value>,
    pods: Vec<Value>,
    nodes: Vec<Value>,
    services: Vec<Value>,
    policies: Vec<Value>,
    next: usize,
}

impl World {
    pub(super) fn random(rng: &mut Rng) -> Self {
        let namespaces = NAMESPACES.map(|name| namespace(rng, name)).to_vec();
        let node = |name: &str, v4: &str, v6: &str, labels: Value| {
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
                "status": {"addresses": [{"type": "InternalIP", "address": v4}, {"type": "InternalIP", "address": v6}]}})
        };
        let nodes = vec![
            node("n1", "10.0.0.1", "fd00:ffff::1", json!({"zone": "a", "topology.kubernetes.io/zone": "a"})),
            node("n2", "10.0.0.2", "fd00:ffff::2", json!({"zone": "b", "topology.kubernetes.io/zone": "b"})),
        ];
        let mut world = Self { namespaces, pods: Vec::new(), nodes, services: Vec::new(), policies: Vec::new(), next: 0 };
        for ns in 0..3 {
            for pod in 0..4 {
                if rng.chance(85) {
                    world.pods.push(random_pod(rng, ns, pod));
                }
            }
        }
        for index in 0..rng.below(3) {
            let service = world.random_service(rng, index);
            world.services.extend(service);
        }
        for _ in 0..1 + rng.below(6) {
            let policy = world.random_policy(rng);
            world.policies.push(policy);
        }
        world
    }

    /// One change of something.
    pub(super) fn change(&mut self, rng: &mut Rng) {
        match rng.below(12) {
            0 | 1 if !self.pods.is_empty() => {
                let at = rng.below(self.pods.len());
                self.pods[at]["metadata"]["labels"] = labels(rng);
            }
            2 if !self.pods.is_empty() => drop(self.pods.swap_remove(rng.below(self.pods.len()))),
            3 | 4 => {
                let pod = {
                    let (ns, pod) = (rng.below(3), rng.below(4));
                    random_pod(rng, ns, pod)
                };
                self.pods.retain(|present| {
                    present["metadata"]["name"] != pod["metadata"]["name"]
                        || present["metadata"]["namespace"] != pod["metadata"]["namespace"]
                });
                self.pods.push(pod);
            }
            5 => {
                let at = rng.below(3);
                self.namespaces[at] = namespace(rng, NAMESPACES[at]);
            }
            6 if !self.policies.is_empty() => drop(self.policies.swap_remove(rng.below(self.policies.len()))),
            7 if !self.policies.is_empty() => {
                // An edit: other rules under the same name.
                let at = rng.below(self.policies.len());
                let mut edited = self.random_policy(rng);
                if edited["kind"] == self.policies[at]["kind"] {
                    edited["metadata"] = self.policies[at]["metadata"].clone();
                    self.policies[at] = edited;
                }
            }
            8 => {
                let service = self.random_service(rng, 0);
                self.services.retain(|present| {
                    present["metadata"]["name"] != service[0]["metadata"]["name"]
                        && present["metadata"]["name"] != service[1]["metadata"]["name"]
                });
                self.services.extend(service);
            }
            9 => {
                let at = rng.below(2);
                let mut labels = json!({"zone": rng.pick(&["a", "b"])});
                if rng.chance(80) {
                    labels["topology.kubernetes.io/zone"] = json!(rng.pick(&["a", "b"]));
                }
                self.nodes[at]["metadata"]["labels"] = labels;
            }
            _ => {
                let policy = self.random_policy(rng);
                self.policies.push(policy);
            }
        }
    }

    pub(super) fn objects(&self) -> Vec<Object> {
        let all = self.namespaces.iter().chain(&self.nodes).chain(&self.pods).chain(&self.services).chain(&self.policies);
        objects(all)
    }

    pub(super) fn cluster(&self) -> ClusterState {
        ClusterState::default().replaced_by(self.objects())
    }

    /// Addresses worth asking about.
    pub(super) fn peers(&self) -> Vec<IpAddr> {
        let mut all: Vec<IpAddr> = [
            "203.0.113.10",
            "172.16.5.5",
            "10.0.0.1",
            "10.0.0.2",
            "2001:db8::10",
            "fd99::5",
            "fd00:ffff::1",
            "fd00:ffff::2",
            "192.168.1.2",
            "192.168.2.200",
            "fd00:1::2",
            "172.20.0.10",
            "172.20.0.11",
            "fd00:aaaa::10",
            "198.51.100.1",
            "8.8.8.8",
        ]
        .map(|text| text.parse().expect("an address"))
        .to_vec();
        for pod in &self.pods {
            let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
            all.extend(ips.filter_map(|ip| ip["ip"].as_str()?.parse::<IpAddr>().ok()));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    fn random_service(&self, rng: &mut Rng, index: usize) -> Vec<Value> {
        let name = format!("s{index}");
        let target = rng.pick(&[80, 81]);
        let v4: Vec<&str> = self.pods.iter().filter_map(|pod| pod["status"]["podIPs"][0]["ip"].as_str()).collect();
        let backends = if v4.is_empty() { Vec::new() } else { rng.some(&v4, 3) };
        let hinted = rng.chance(50);
        let endpoints: Vec<Value> = backends.iter().map(|ip| random_endpoint(rng, ip, hinted)).collect();
        let policies = [rng.pick(&["Cluster", "Cluster", "Local"]), rng.pick(&["Cluster", "Local"])];
        vec![
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "y"},
                "spec": {"clusterIP": format!("172.20.0.1{index}"), "externalIPs": rng.some(&EXTERNAL, 2),
                    "internalTrafficPolicy": policies[0], "externalTrafficPolicy": policies[1],
                    "ports": [{"name": "p", "port": 80, "targetPort": target}, {"name": "q", "port": 443, "protocol": "UDP"}]}}),
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("{name}-1"), "namespace": "y", "labels": {"kubernetes.io/service-name": name}},
                "endpoints": endpoints, "ports": [{"name": "p", "port": target}, {"name": "q", "protocol": "UDP", "port": 80}]}),
        ]
    }

    fn random_policy(&mut self, rng: &mut Rng) -> Value {
        self.next += 1;
        match rng.below(10) {
            0..=6 => network_policy(rng, self.next),
            7 | 8 => cluster_policy(rng, self.next),
            _ => aws_cluster_policy(rng, self.next),
        }
    }
}

fn namespace(rng: &mut Rng, name: &str) -> Value {
    let mut labels = json!({"ns": name});
    if rng.chance(40) {
        labels["team"] = json!(rng.pick(&["red", "blue"]));
    }
    if rng.chance(10) {
        labels.as_object_mut().expect("an object").remove("ns");
    }
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn labels(rng: &mut Rng) -> Value {
    let mut labels = json!({"pod": rng.pick(&PODS)});
    if rng.chance(30) {
        labels["tier"] = json!(rng.pick(&["db", "web"]));
    }
    labels
}

fn random_pod(rng: &mut Rng, ns: usize, pod: usize) -> Value {
    let ports: Vec<Value> = (0..rng.below(4))
        .map(|_| json!({"name": rng.pick(&NAMES), "containerPort": rng.pick(&[80, 81, 82]), "protocol": rng.pick(&TRANSPORTS)}))
        .collect();
    let host = rng.chance(7);
    let node = rng.pick(&["n1", "n1", "n2"]);
    let mut ips = vec![format!("192.168.{}.{}", ns + 1, pod + 1)];
    if rng.chance(70) {
        ips.push(format!("fd00:{}::{}", ns + 1, pod + 1));
    }
    if host {
        ips = if node == "n1" { vec!["10.0.0.1".into()] } else { vec!["10.0.0.2".into()] };
    }
    let ips: Vec<Value> = ips.into_iter().map(|ip| json!({"ip": ip})).collect();
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": PODS[pod], "namespace": NAMESPACES[ns], "labels": labels(rng)},
        "spec": {"nodeName": node, "hostNetwork": host, "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": if rng.chance(5) { "Succeeded" } else { "Running" }, "podIPs": ips}})
}

fn random_endpoint(rng: &mut Rng, ip: &str, hinted: bool) -> Value {
    let mut endpoint = json!({"addresses": [ip], "nodeName": rng.pick(&["n1", "n2"])});
    if hinted {
        endpoint["hints"] = json!({"forZones": [{"name": rng.pick(&["a", "b"])}]});
        if rng.chance(30) {
            endpoint["hints"]["forNodes"] = json!([{"name": rng.pick(&["n1", "n2"])}]);
        }
    }
    match rng.below(8) {
        0 => endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true}),
        1 => endpoint["conditions"] = json!({"ready": false}),
        _ => {}
    }
    endpoint
}

fn selector(rng: &mut Rng, key: &str, values: &[&str]) -> Value {
    match rng.below(6) {
        0 => json!({}),
        1 => {
            let (operator, values) = (rng.pick(&["In", "NotIn"]), [rng.pick(values), rng.pick(values)]);
            json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
        }
        2 => {
            let (key, operator) = (rng.pick(&[key, "tier", "team"]), rng.pick(&["Exists", "DoesNotExist"]));
            json!({"matchExpressions": [{"key": key, "operator": operator}]})
        }
        _ => json!({"matchLabels": {key: rng.pick(values)}}),
    }
}

fn pods(rng: &mut Rng) -> Value {
    selector(rng, "pod", &PODS)
}

fn namespaces(rng: &mut Rng) -> Value {
    selector(rng, "ns", &NAMESPACES)
}

fn network_policy(rng: &mut Rng, number: usize) -> Value {
    let mut spec = json!({"podSelector": pods(rng)});
    match rng.below(4) {
        0 => {}
        1 => spec["policyTypes"] = json!(["Ingress"]),
        2 => spec["policyTypes"] = json!(["Egress"]),
        _ => spec["policyTypes"] = json!(["Ingress", "Egress"]),
    }
    for (direction, end) in [("ingress", "from"), ("egress", "to")] {
        if rng.chance(75) {
            let rules: Vec<Value> = (0..rng.below(4)).map(|_| network_rule(rng, end)).collect();
            spec[direction] = json!(rules);
        }
    }
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("p{number}"), "namespace": rng.pick(&NAMESPACES)}, "spec": spec})
}

fn network_rule(rng: &mut Rng, end: &str) -> Value {
    let mut rule = json!({});
    if rng.chance(80) {
        let peers: Vec<Value> = (0..1 + rng.below(3)).map(|_| network_peer(rng)).collect();
        rule[end] = json!(peers);
    }
    if rng.chance(70) {
        let ports: Vec<Value> = (0..1 + rng.below(3)).map(|_| network_port(rng)).collect();
        rule["ports"] = json!(ports);
    }
    rule
}

fn network_peer(rng: &mut Rng) -> Value {
    match rng.below(7) {
        0 => json!({"podSelector": pods(rng)}),
        1 => json!({"namespaceSelector": namespaces(rng)}),
        2 | 3 => json!({"namespaceSelector": namespaces(rng), "podSelector": pods(rng)}),
        _ => {
            let blocks: &[&str] = if rng.chance(70) { &V4_BLOCKS } else { &V6_BLOCKS };
            json!({"ipBlock": {"cidr": rng.pick(blocks), "except": rng.some(blocks, 2)}})
        }
    }
}

fn network_port(rng: &mut Rng) -> Value {
    let mut port = json!({});
    if rng.chance(70) {
        port["protocol"] = json!(rng.pick(&TRANSPORTS));
    }
    match rng.below(6) {
        0 => {}
        1 => port["port"] = json!(rng.pick(&NAMES)),
        2 => {
            port["port"] = json!(rng.pick(&[1, 79, 80]));
            port["endPort"] = json!(rng.pick(&[80, 81, 65535]));
        }
        _ => port["port"] = json!(rng.pick(&[80, 81, 82])),
    }
    port
}

fn cluster_subject(rng: &mut Rng) -> Value {
    if rng.chance(50) {
        json!({"namespaces": namespaces(rng)})
    } else {
        json!({"pods": {"namespaceSelector": namespaces(rng), "podSelector": pods(rng)}})
    }
}

fn cluster_peer(rng: &mut Rng, egress: bool) -> Value {
    match rng.below(if egress { 6 } else { 2 }) {
        5 => json!({"domainNames": [rng.pick(&["www.example.com", "*.example.com", "*.cdn.net"])]}),
        0 => json!({"namespaces": namespaces(rng)}),
        1 => json!({"pods": {"namespaceSelector": namespaces(rng), "podSelector": pods(rng)}}),
        2 => json!({"nodes": {"matchLabels": {"zone": rng.pick(&["a", "b"])}}}),
        _ => networks(rng),
    }
}

fn networks(rng: &mut Rng) -> Value {
    json!({"networks": [rng.pick(&V4_BLOCKS), rng.pick(&V6_BLOCKS)]})
}

fn cluster_rules(rng: &mut Rng, egress: bool, ports: fn(&mut Rng) -> Value, ports_field: &str) -> Vec<Value> {
    let count = rng.below(4);
    let rules = (0..count).map(|_| {
        let peers: Vec<Value> = (0..1 + rng.below(2)).map(|_| cluster_peer(rng, egress)).collect();
        let mut rule = json!({"action": rng.pick(&["Accept", "Deny", "Pass"]), if egress { "to" } else { "from" }: peers});
        if rng.chance(60) {
            let list: Vec<Value> = (0..1 + rng.below(2)).map(|_| ports(rng)).collect();
            rule[ports_field] = json!(list);
        }
        rule
    });
    rules.collect()
}

fn cluster_policy(rng: &mut Rng, number: usize) -> Value {
    let protocol = |rng: &mut Rng| {
        let transport = rng.pick(&["tcp", "udp", "sctp"]);
        match rng.below(4) {
            0 => json!({transport: {}}),
            1 => json!({transport: {"destinationPort": {"range": {"start": 80, "end": rng.pick(&[81, 443])}}}}),
            2 => json!({"destinationNamedPort": rng.pick(&NAMES)}),
            _ => json!({transport: {"destinationPort": {"number": rng.pick(&[80, 81])}}}),
        }
    };
    json!({"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": format!("c{number}")},
        "spec": {"tier": rng.pick(&["Admin", "Baseline"]), "priority": rng.below(3), "subject": cluster_subject(rng),
            "ingress": cluster_rules(rng, false, protocol, "protocols"), "egress": cluster_rules(rng, true, protocol, "protocols")}})
}

fn aws_cluster_policy(rng: &mut Rng, number: usize) -> Value {
    let port = |rng: &mut Rng| match rng.below(3) {
        0 => json!({"portRange": {"protocol": rng.pick(&TRANSPORTS), "start": 80, "end": 82}}),
        1 => json!({"namedPort": rng.pick(&NAMES)}),
        _ => json!({"portNumber": {"protocol": rng.pick(&TRANSPORTS), "port": rng.pick(&[80, 81])}}),
    };
    let mut ingress = cluster_rules(rng, false, port, "ports");
    if rng.chance(40) {
        ingress.push(json!({"action": rng.pick(&["Accept", "Deny", "Pass"]), "from": [networks(rng)], "ports": [port(rng)]}));
    }
    json!({"apiVersion": "networking.k8s.aws/v1alpha1", "kind": "ClusterNetworkPolicy", "metadata": {"name": format!("c{number}")},
        "spec": {"tier": rng.pick(&["Admin", "Baseline"]), "priority": rng.below(3), "subject": cluster_subject(rng),
            "ingress": ingress, "egress": cluster_rules(rng, true, port, "ports")}})
}

pub(super) fn objects<'a>(all: impl Iterator<Item = &'a Value>) -> Vec<Object> {
    let text = all.map(ToString::to_string).collect::<Vec<_>>().join("\n");
    if text.is_empty() { Vec::new() } else { manifests::parse("world.json", &text).expect("random worlds are valid") }
}

/// A part of a resolved policy: whether of a cluster's, of which, and which part of it.
pub(super) fn part(rng: &mut Rng, (clusterwide, policy, part): (bool, usize, usize)) -> Value {
    let mut spec = json!({"policyRef": {"name": format!("r{policy}"), "namespace": "x"}});
    // A NetworkPolicy's pods are those of its namespace.
    let namespaces: &[&str] = if clusterwide { &NAMESPACES } else { &["x"] };
    let listed: Vec<Value> = (0..rng.below(4)).map(|_| json!({"name": rng.pick(&PODS), "namespace": rng.pick(namespaces)})).collect();
    spec["podSelectorEndpoints"] = json!(listed);
    if rng.chance(40) {
        let (field, selected) = if clusterwide { ("subject", cluster_subject(rng)) } else { ("podSelector", pods(rng)) };
        spec[field] = selected;
    }
    for direction in ["ingress", "egress"] {
        let rules: Vec<Value> = (0..rng.below(3)).map(|_| part_rule(rng, clusterwide)).collect();
        spec[direction] = json!(rules);
    }
    let (kind, metadata) = if clusterwide {
        spec["tier"] = json!(rng.pick(&["Admin", "Baseline"]));
        spec["priority"] = json!(rng.below(3));
        ("ClusterPolicyEndpoint", json!({"name": format!("r{policy}-{part}")}))
    } else {
        spec["podIsolation"] = json!(rng.some(&["Ingress", "Egress"], 2));
        ("PolicyEndpoint", json!({"name": format!("r{policy}-{part}"), "namespace": "x"}))
    };
    json!({"apiVersion": "networking.k8s.aws/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
}

fn part_rule(rng: &mut Rng, clusterwide: bool) -> Value {
    let blocks: &[&str] = if rng.chance(70) { &V4_BLOCKS } else { &V6_BLOCKS };
    let ports: Vec<Value> = (0..rng.below(3)).map(|_| network_port(rng)).collect();
    let mut rule = json!({"cidr": rng.pick(blocks), "except": rng.some(blocks, 1), "ports": ports});
    if clusterwide {
        rule["action"] = json!(rng.pick(&["Accept", "Deny", "Pass"]));
    }
    rule
}
