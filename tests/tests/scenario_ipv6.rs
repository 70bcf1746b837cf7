//! Nodes of an IPv6 cluster: the real agent and plugin, a /80 for each node's pods, and IPv4 destinations through the node's address.

use std::net::{IpAddr, SocketAddr};

use ipnet::Ipv6Net;
use stanchion_lab::Vpc;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::node::Node;
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Answer, PATIENCE, Protocol, probe};
use stanchion_lab::vpc::EXAMPLE_HOST;
use stanchion_lab::wait::wait_for;

/// As aws-node wants it said.
const IPV6: [(&str, &str); 3] = [("ENABLE_IPv6", "true"), ("ENABLE_IPv4", "false"), ("ENABLE_PREFIX_DELEGATION", "true")];

const ONLY_C: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-c}
spec: {podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: c}}}]}]}
";

/// What the node's one ENI has for pods.
fn prefix(node: &Node) -> Ipv6Net {
    let enis = node.cli_json(&["enis"]).expect("enis");
    let enis = enis["enis"].as_array().expect("a list");
    assert_eq!(enis.len(), 1, "pods live on the primary ENI: {enis:?}");
    let cidrs = enis[0]["cidrs"].as_array().expect("a list");
    assert_eq!(cidrs.len(), 1, "{cidrs:?}");
    cidrs[0]["cidr"].as_str().and_then(|cidr| cidr.parse().ok()).expect("an IPv6 prefix")
}

fn ask(node: &Node, to: IpAddr) -> Answer {
    probe(node.netns(), Protocol::Tcp, SocketAddr::new(to, 80), PATIENCE).expect("probed")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_an_ipv6_cluster_reach_each_other_and_ipv4_destinations() {
    let mut cluster = Cluster::start_in(Vpc::builder().ipv6(), &["m5.large", "m5.large"], &IPV6).await.expect("the cluster starts");
    for (node, name) in [(0, "a-0"), (0, "b-0"), (1, "c-0")] {
        cluster.add_pod(node, PodSpec::new("x", name)).await.expect("a pod");
    }
    for (node, pod) in cluster.pods() {
        let prefix = prefix(node);
        assert_eq!(prefix.prefix_len(), 80);
        let IpAddr::V6(address) = pod.address() else { panic!("{} has {}", pod.name(), pod.address()) };
        assert!(prefix.contains(&address), "{address} of {} is not of {prefix}", pod.name());
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        cluster.settles(protocol, 80, |_, _| true).await.expect("pods reach each other");
    }
    // As themselves, on this node and on the other; the kubelet's probes too.
    let (a, b, c) = (cluster.pod("x/a-0"), cluster.pod("x/b-0"), cluster.pod("x/c-0"));
    for (from, to) in [(a, b), (a, c), (c, a)] {
        let answer = from.probe(Protocol::Tcp, to.address(), 80).await.expect("probed");
        assert_eq!(answer, Answer::Reached { seen_as: from.address() }, "{} to {}", from.name(), to.name());
    }
    assert!(ask(cluster.node(0), a.address()).reached(), "the node reaches its pod");

    // Out over IPv4, with the node's own address; nobody gets in by that way.
    for (node, pod) in cluster.pods() {
        let answer = pod.probe(Protocol::Tcp, EXAMPLE_HOST.into(), 80).await.expect("probed");
        assert_eq!(answer, Answer::Reached { seen_as: node.public() }, "{}", pod.name());
    }
    let inside =
        a.result()["ips"].as_array().expect("addresses").iter().filter_map(|ip| ip["address"].as_str()?.parse::<ipnet::IpNet>().ok());
    let egress = inside.map(|net| net.addr()).find(IpAddr::is_ipv4).expect("an IPv4 address");
    assert!(!b.probe(Protocol::Tcp, egress, 80).await.expect("probed").reached(), "{egress} answers another pod");

    cluster.vpc().manifests().apply("p.yaml", ONLY_C).expect("written");
    let allowed = |from: &str, to: &str| to != "x/a-0" || from == "x/c-0";
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    let before = prefix(cluster.node(0));
    cluster.agent(0).expect("started").kill().expect("killed");
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("it holds without the agent");
    cluster.start_agent(0).await.expect("it starts again");
    assert_eq!(prefix(cluster.node(0)), before);
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("and with the next");
    assert_eq!(cluster.vpc().refused().expect("counted").wrong_source, 0, "a packet left by an ENI that its source is not assigned to");

    for name in cluster.pod_names() {
        cluster.delete_pod(&name).await.expect("deleted");
    }
    wait_for("the pods' traces to go", SOON, || {
        let left = cluster.leftovers();
        async {
            let left = left?;
            anyhow::ensure!(left.is_empty(), "{}", left.join(", "));
            Ok(())
        }
    })
    .await
    .expect("nothing stays");
}

const ONLY_FAR: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-far}
spec: {podSelector: {matchLabels: {app: wide}}, ingress: [{from: [{podSelector: {matchLabels: {app: far}}}]}]}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_pod_with_an_interface_on_every_network_card_is_reached_on_each() {
    let settings = [&IPV6[..], &[("ENABLE_MULTI_NIC", "true")]].concat();
    let mut cluster =
        Cluster::start_in(Vpc::builder().ipv6(), &["c6in.32xlarge", "m5.large"], &settings).await.expect("the cluster starts");
    let wide = PodSpec::new("x", "wide-0").annotation("k8s.amazonaws.com/nicConfig", "multi-nic-attachment");
    cluster.add_pod(0, wide).await.expect("an address of either card");
    cluster.add_pod(0, PodSpec::new("x", "near-0")).await.expect("a pod with one");
    cluster.add_pod(1, PodSpec::new("x", "far-0")).await.expect("a pod elsewhere");
    let ips = cluster.pod("x/wide-0").result()["ips"].as_array().cloned().expect("addresses");
    let address = |ip: &serde_json::Value| ip["address"].as_str()?.parse::<ipnet::IpNet>().ok().map(|net| net.addr());
    let held: Vec<IpAddr> = ips.iter().map(|ip| address(ip).expect("an address")).filter(IpAddr::is_ipv6).collect();
    let card_of = |address: &IpAddr| {
        let eni = cluster.vpc().cloud().owner_of(*address).unwrap_or_else(|| panic!("{address} is nobody's in EC2"));
        cluster.vpc().cloud().eni(&eni).and_then(|eni| eni.attachment).expect("attached").network_card
    };
    assert_eq!(held.iter().map(card_of).collect::<Vec<_>>(), [0, 1]);

    // The answer leaves by the ENI that has the address: the router drops it on any other.
    let reached = async |cluster: &Cluster, from: &str| {
        let pod = cluster.pod(from);
        let mut seen = Vec::new();
        for address in &held {
            seen.push(
                pod.probe(Protocol::Tcp, *address, 80).await.expect("the socket works") == Answer::Reached { seen_as: pod.address() },
            );
        }
        seen
    };
    for from in ["x/near-0", "x/far-0"] {
        assert_eq!(reached(&cluster, from).await, [true, true], "{from}");
    }
    // Policy holds on each interface, without the agent and with the next one.
    cluster.vpc().manifests().apply("p.yaml", ONLY_FAR).expect("written");
    let allowed = |from: &str, to: &str| to != "x/wide-0" || from == "x/far-0";
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    assert_eq!((reached(&cluster, "x/near-0").await, reached(&cluster, "x/far-0").await), (vec![false, false], vec![true, true]));
    cluster.agent(0).expect("started").kill().expect("killed");
    assert_eq!((reached(&cluster, "x/near-0").await, reached(&cluster, "x/far-0").await), (vec![false, false], vec![true, true]));
    cluster.start_agent(0).await.expect("it starts again");
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    assert_eq!((reached(&cluster, "x/near-0").await, reached(&cluster, "x/far-0").await), (vec![false, false], vec![true, true]));

    assert_eq!(cluster.vpc().refused().expect("counters").wrong_source, 0);
    cluster.empty().await.expect("nothing of the pods stays");
}
