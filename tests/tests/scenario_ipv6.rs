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
