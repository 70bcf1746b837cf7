//! Policies on real packets: live changes, first packets, and what stays open.

use std::net::IpAddr;

use stanchion_lab::cluster::Cluster;
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Answer, Protocol};
use stanchion_lab::vpc::EXAMPLE_HOST;

async fn world() -> Cluster {
    let mut cluster = Cluster::start(&["m5.large", "m5.large"], &[("WARM_IP_TARGET", "3")]).await.expect("the cluster starts");
    for (node, namespace, name) in [(0, "x", "a"), (0, "x", "b"), (1, "x", "c"), (0, "y", "a"), (1, "y", "b")] {
        let spec = PodSpec::new(namespace, name).ports(&[80, 81]);
        cluster.add_pod(node, spec).await.expect("a pod");
    }
    cluster
}

fn policy(name: &str, spec: &str) -> String {
    format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: x, name: {name}}}\nspec: {spec}\n")
}

async fn ask(cluster: &Cluster, from: &str, protocol: Protocol, to: IpAddr) -> Answer {
    cluster.pod(from).probe(protocol, to, 80).await.expect("the socket works")
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_come_change_and_go_on_running_pods() {
    let cluster = world().await;
    let manifests = cluster.vpc().manifests().clone();
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("all is open");

    // x/a: nothing in.
    manifests.apply("p.yaml", &policy("p", "{podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress]}")).expect("written");
    cluster.settles(Protocol::Tcp, 80, |_, to| to != "x/a").await.expect("default deny");
    cluster.settles(Protocol::Udp, 80, |_, to| to != "x/a").await.expect("default deny");

    // From namespace y on TCP 80.
    let from_y = "{podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: \
                  {ns: y}}}], ports: [{protocol: TCP, port: 80}]}]}";
    manifests.apply("p.yaml", &policy("p", from_y)).expect("written");
    cluster.settles(Protocol::Tcp, 80, |from, to| to != "x/a" || from.starts_with("y/")).await.expect("namespaceSelector");
    cluster.settles(Protocol::Tcp, 81, |_, to| to != "x/a").await.expect("another port");
    cluster.settles(Protocol::Udp, 80, |_, to| to != "x/a").await.expect("another protocol");

    // A second policy adds: x/c by podSelector, by the name of the port.
    let from_c =
        "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: c}}}], ports: [{port: p-81}]}]}";
    manifests.apply("q.yaml", &policy("q", from_c)).expect("written");
    cluster.settles(Protocol::Tcp, 81, |from, to| to != "x/a" || from == "x/c").await.expect("named port");

    manifests.delete("p.yaml").expect("deleted");
    cluster.settles(Protocol::Tcp, 80, |_, to| to != "x/a").await.expect("only the second policy");
    manifests.delete("q.yaml").expect("deleted");
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("open again");
}

#[tokio::test(flavor = "multi_thread")]
async fn egress_is_limited_to_a_block_and_replies_pass() {
    let cluster = world().await;
    let spec = format!(
        "{{podSelector: {{matchLabels: {{app: b}}}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: {EXAMPLE_HOST}/32}}}}]}}]}}"
    );
    cluster.vpc().manifests().apply("p.yaml", &policy("p", &spec)).expect("written");
    cluster.settles(Protocol::Tcp, 80, |from, _| from != "x/b").await.expect("x/b opens nothing to pods");
    let answer = ask(&cluster, "x/b", Protocol::Tcp, EXAMPLE_HOST.into()).await;
    assert_eq!(answer, Answer::Reached { seen_as: cluster.node(0).public() });
    // Others open connections to it, and its replies get out: TCP and UDP.
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let answer = ask(&cluster, "y/b", protocol, cluster.pod("x/b").address()).await;
        assert_eq!(answer, Answer::Reached { seen_as: cluster.pod("y/b").address() });
    }
    // The kubelet's probes of a pod without any ingress allowed.
    let all = "{podSelector: {}, policyTypes: [Ingress, Egress]}";
    cluster.vpc().manifests().apply("p.yaml", &policy("p", all)).expect("written");
    cluster.settles(Protocol::Tcp, 80, |from, to| from.starts_with("y/") && to.starts_with("y/")).await.expect("x is shut");
    let (netns, to) = (cluster.node(0).netns().clone(), cluster.pod("x/b").address());
    let answer = tokio::task::spawn_blocking(move || {
        stanchion_lab::probe::probe(&netns, Protocol::Tcp, (to, 80).into(), stanchion_lab::probe::PATIENCE)
    });
    assert!(answer.await.expect("no panic").expect("the socket works").reached(), "the node reaches its own pod");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pod_is_guarded_from_its_first_packet() {
    let mut cluster = world().await;
    let only_c = "{podSelector: {matchLabels: {app: new}}, ingress: [{from: [{podSelector: {matchLabels: {app: c}}}]}]}";
    cluster.vpc().manifests().apply("p.yaml", &policy("p", only_c)).expect("written");
    // The policy selects nobody yet; one pod that it does select shows that it was read.
    cluster.add_pod(0, PodSpec::new("x", "new-0")).await.expect("a pod");
    cluster.settles(Protocol::Tcp, 80, |from, to| to != "x/new-0" || from == "x/c").await.expect("read");
    for round in 1..=10 {
        let name = format!("new-{round}");
        cluster.add_pod(round % 2, PodSpec::new("x", &name)).await.expect("a pod");
        let to = cluster.pod(&format!("x/{name}")).address();
        let (denied, allowed) = tokio::join!(ask(&cluster, "y/a", Protocol::Tcp, to), ask(&cluster, "x/c", Protocol::Tcp, to));
        assert_eq!(denied, Answer::Silent, "round {round}");
        assert!(allowed.reached(), "round {round}: {allowed:?}");
        cluster.delete_pod(&format!("x/{name}")).await.expect("deleted");
    }
}
