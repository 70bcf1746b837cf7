//! The API-server source against the fake API: lists, changes, disconnects, 410 Gone, missing CRDs, outages.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::time::Duration;

use serde_json::{Value, json};
use stanchion_core::cluster::Kind;
use stanchion_core::ids::PodName;
use stanchion_core::metrics::insights::NodeIdentity;
use stanchion_daemon::cluster::api_server::{self, Scope};
use stanchion_daemon::cluster::{ClusterHandle, credentials};
use stanchion_daemon::telemetry::{Collector, Roots, TelemetrySettings};
use stanchion_lab::fake_kube::{FakeKube, Rules};
use tokio_util::sync::CancellationToken;

const PODS: &str = "/api/v1/pods";
const NODES: &str = "/api/v1/nodes";
const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies";
const EARLIER_CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const APPLICATION_POLICIES: &str = "/apis/networking.k8s.aws/v1alpha1/applicationnetworkpolicies";
const AWS_CLUSTER_POLICIES: &str = "/apis/networking.k8s.aws/v1alpha1/clusternetworkpolicies";

fn object(kind: &str, namespace: &str, name: &str, node: &str) -> Value {
    json!({"kind": kind, "apiVersion": "v1", "metadata": {"name": name, "namespace": namespace, "managedFields": [{"big": "x"}]}, "spec": {"nodeName": node}})
}

/// The scope of a process with the telemetry role alone.
fn metrics_alone() -> Scope {
    Scope { node_name: "n1".into(), policy: false, services: true, policy_endpoints: false, eni_configs: false }
}

struct World {
    kube: FakeKube,
    cluster: ClusterHandle,
    _shutdown: tokio_util::sync::DropGuard,
}

async fn world(policy: bool, prepare: impl FnOnce(&FakeKube)) -> World {
    world_of(Scope { node_name: "n1".into(), policy, services: false, policy_endpoints: policy, eni_configs: true }, prepare).await
}

async fn world_of(scope: Scope, prepare: impl FnOnce(&FakeKube)) -> World {
    let kube = FakeKube::default();
    for collection in [PODS, NODES, "/api/v1/configmaps", "/api/v1/namespaces", SERVICES, SLICES, POLICIES] {
        kube.serve_collection(collection);
    }
    prepare(&kube);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(kube.clone().serve(listener));
    let client = credentials::plain(&format!("http://{address}")).unwrap();
    let shutdown = CancellationToken::new();
    let cluster = api_server::spawn(credentials::fixed(client), &scope, shutdown.clone());
    World { kube, cluster, _shutdown: shutdown.drop_guard() }
}

async fn until(world: &World, what: &str, condition: impl Fn(&stanchion_core::cluster::ClusterState) -> bool) {
    let mut state = world.cluster.watch();
    let found = tokio::time::timeout(Duration::from_secs(20), state.wait_for(|state| condition(state))).await;
    assert!(found.is_ok(), "{what}: {:?}\n{:#?}", world.cluster.latest(), world.kube.requests());
}

#[tokio::test]
async fn lists_then_follows_changes_and_survives_a_missing_crd() {
    let world = world(true, |kube| {
        for index in 0..1200 {
            kube.put(PODS, object("Pod", "x", &format!("p{index}"), "n2"));
        }
        kube.put(NODES, object("Node", "", "n1", ""));
        kube.put(NODES, object("Node", "", "n2", ""));
    })
    .await;
    until(&world, "the pages of the list", |s| s.synced && s.pods.len() == 1200).await;
    assert_eq!(world.cluster.latest().nodes.len(), 1, "only the own node is read");
    world.kube.put(PODS, object("Pod", "x", "new", "n1"));
    world.kube.delete(PODS, "x/p7");
    let (new, gone) = (PodName::new("x", "new"), PodName::new("x", "p7"));
    until(&world, "an addition and a deletion", |s| s.pods.contains_key(&new) && !s.pods.contains_key(&gone)).await;
}

async fn what_happened_before_a_410_is_not_missed(in_stream: bool) {
    let world = world(true, |kube| {
        kube.put(PODS, object("Pod", "x", "a", "n1"));
        kube.put(PODS, object("Pod", "x", "b", "n1"));
    })
    .await;
    until(&world, "start", |s| s.synced && s.pods.len() == 2).await;
    world.kube.outage(Some(503));
    world.kube.disconnect();
    world.kube.delete(PODS, "x/a");
    world.kube.put(PODS, object("Pod", "x", "c", "n1"));
    world.kube.compact(in_stream);
    world.kube.outage(None);
    let (a, c) = (PodName::new("x", "a"), PodName::new("x", "c"));
    until(&world, "the relist", |s| !s.pods.contains_key(&a) && s.pods.contains_key(&c)).await;
    assert!(world.cluster.latest().synced);
    assert!(!world.kube.requests().iter().any(|r| r.contains("sendInitialEvents")), "a list by watch may be refused: none is asked");
}

#[tokio::test]
async fn gone_as_an_answer_lists_anew() {
    what_happened_before_a_410_is_not_missed(false).await;
}

#[tokio::test]
async fn gone_in_the_stream_lists_anew() {
    what_happened_before_a_410_is_not_missed(true).await;
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_asked_again_and_said() {
    let world = world(false, |kube| {
        kube.put(PODS, object("Pod", "x", "mine", "n1"));
        kube.outage(Some(503));
    })
    .await;
    until(&world, "the trouble", |s| s.trouble.contains_key("pods") && !s.synced).await;
    world.kube.outage(None);
    until(&world, "the end of the outage", |s| s.synced && s.pods.len() == 1 && s.trouble.is_empty()).await;
}

/// The API server does not bound the ports of EndpointSlices: whoever may write one must not blind every node.
#[tokio::test]
async fn an_object_that_cannot_be_read_hides_no_other() {
    let slice = |name: &str, port: i64| json!({"kind": "EndpointSlice", "metadata": {"name": name, "namespace": "x"}, "addressType": "IPv4", "ports": [{"port": port}]});
    let world = world(true, |kube| {
        kube.put(SLICES, slice("bad", 70_000));
        kube.put(SLICES, slice("good", 80));
    })
    .await;
    until(&world, "the good one", |s| s.synced && s.endpoint_slices.contains_key(&PodName::new("x", "good"))).await;
    // A bad change leaves what was known.
    world.kube.put(SLICES, slice("good", -1));
    until(&world, "the trouble", |s| s.trouble.get("endpointslices").is_some_and(|t| t.contains("x/good"))).await;
    assert_eq!(world.cluster.latest().endpoint_slices.len(), 1);
    world.kube.put(SLICES, slice("good", 81));
    until(&world, "its mending", |s| s.trouble.is_empty()).await;
}

#[tokio::test]
async fn cluster_policies_of_both_groups_are_kept_apart_and_nodes_are_read_when_they_speak_of_them() {
    let policy = |name: &str, group: &str, egress: Value| json!({"apiVersion": group, "kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": {"tier": "Admin", "egress": egress}});
    let (kubernetes, aws) = ("policy.networking.k8s.io/v1beta1", "networking.k8s.aws/v1alpha1");
    let world = world(true, |kube| {
        kube.serve_collection(CLUSTER_POLICIES);
        kube.put(AWS_CLUSTER_POLICIES, policy("a", aws, json!([])));
        kube.put(CLUSTER_POLICIES, policy("a", kubernetes, json!([])));
        kube.put(NODES, object("Node", "", "n1", ""));
        kube.put(NODES, object("Node", "", "n2", ""));
    })
    .await;
    until(&world, "both", |s| s.synced && s.cluster_network_policies.len() == 2).await;
    assert_eq!(world.cluster.latest().nodes.len(), 1);
    world.kube.delete(CLUSTER_POLICIES, "/a");
    until(&world, "one", |s| s.cluster_network_policies.keys().collect::<Vec<_>>() == ["networking.k8s.aws/a"]).await;
    world.kube.put(CLUSTER_POLICIES, policy("b", kubernetes, json!([{"action": "Deny", "to": [{"nodes": {}}]}])));
    until(&world, "all nodes", |s| s.nodes.len() == 2).await;
}

#[tokio::test]
async fn application_network_policies_are_read_beside_network_policies() {
    let policy = |kind: &str, group: &str| json!({"apiVersion": group, "kind": kind, "metadata": {"name": "p", "namespace": "x"}, "spec": {"podSelector": {}}});
    let world = world(true, |kube| {
        kube.put(POLICIES, policy("NetworkPolicy", "networking.k8s.io/v1"));
        kube.put(APPLICATION_POLICIES, policy("ApplicationNetworkPolicy", "networking.k8s.aws/v1alpha1"));
    })
    .await;
    until(&world, "both", |s| s.synced && s.network_policies.len() == 2).await;
    world.kube.delete(POLICIES, "x/p");
    until(&world, "AWS's", |s| s.network_policies.keys().map(ToString::to_string).collect::<Vec<_>>() == ["x/networking.k8s.aws/p"]).await;
    world.kube.delete(APPLICATION_POLICIES, "x/p");
    until(&world, "none", |s| s.network_policies.is_empty()).await;
}

/// A server with a CRD from before v1beta1.
#[tokio::test]
async fn cluster_policies_are_read_in_the_version_that_is_served() {
    let policy = |name: &str, version: &str| {
        let api_version = format!("policy.networking.k8s.io/{version}");
        json!({"apiVersion": api_version, "kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": {"tier": "Admin"}})
    };
    let world = world(true, |kube| kube.put(EARLIER_CLUSTER_POLICIES, policy("old", "v1alpha2"))).await;
    until(&world, "the earlier version", |s| s.synced && s.cluster_network_policies.contains_key("old")).await;
    world.kube.put(EARLIER_CLUSTER_POLICIES, policy("second", "v1alpha2"));
    until(&world, "a change", |s| s.cluster_network_policies.contains_key("second") && s.trouble.is_empty()).await;
}

#[tokio::test]
async fn a_forbidden_custom_resource_is_taken_as_empty_and_a_forbidden_pod_list_is_not() {
    let rules = "kind: ClusterRole\nmetadata: {name: r}\nrules:\n- {apiGroups: ['', discovery.k8s.io, networking.k8s.io], resources: [nodes, namespaces, configmaps, services, endpointslices, networkpolicies], verbs: [list, watch]}\n";
    let more = format!("{rules}- {{apiGroups: [''], resources: [pods], verbs: [list, watch]}}\n");
    let world = world(true, |kube| kube.enforce(Rules::of_manifest(rules).unwrap())).await;
    until(&world, "the trouble", |s| s.trouble.get("pods").is_some_and(|t| t.starts_with("403"))).await;
    assert!(!world.cluster.latest().synced);
    world.kube.enforce(Rules::of_manifest(&more).unwrap());
    until(&world, "the rest", |s| s.synced).await;
}

/// Rights are taken and given again while a release is rolled out, and what is between may answer in the server's place: none of
/// it lifts a policy. That the API server serves the kind no longer does.
#[tokio::test]
async fn what_was_read_stays_while_the_server_does_not_give_it() {
    const NAMESPACES: &str = "/api/v1/namespaces";
    let policy = json!({"apiVersion": "networking.k8s.aws/v1alpha1", "kind": "ClusterNetworkPolicy", "metadata": {"name": "a"}, "spec": {"tier": "Admin"}});
    let rules = |more: &str| {
        let text = format!(
            "kind: ClusterRole\nmetadata: {{name: r}}\nrules:\n- {{apiGroups: ['', discovery.k8s.io, networking.k8s.io{more}], resources: ['*'], verbs: [list, watch]}}\n"
        );
        Rules::of_manifest(&text).unwrap()
    };
    let of_aws = "clusternetworkpolicies.networking.k8s.aws";
    let world = world(true, |kube| {
        kube.enforce(rules(", networking.k8s.aws"));
        kube.put(AWS_CLUSTER_POLICIES, policy);
        kube.serve_collection(APPLICATION_POLICIES);
        kube.put(NAMESPACES, object("Namespace", "", "x", ""));
    })
    .await;
    let is_there = |s: &stanchion_core::cluster::ClusterState| s.cluster_network_policies.len() == 1 && s.namespaces.len() == 1;
    until(&world, "the start", |s| s.synced && is_there(s) && !s.trouble.contains_key(of_aws)).await;
    let stays = async |what: &str, said: &[(&str, &str)]| {
        world.kube.disconnect();
        until(&world, what, |s| said.iter().all(|(of, text)| s.trouble.get(*of).is_some_and(|t| t.contains(text)))).await;
        assert!(is_there(&world.cluster.latest()), "{what}: {:?}", world.cluster.latest());
    };
    world.kube.enforce(rules(""));
    // Of the one there is a policy, of the other there was none: that one is no reason to wait for anything.
    let empty = "applicationnetworkpolicies.networking.k8s.aws";
    stays("without the right", &[(of_aws, "forbidden now"), (empty, "taken as empty")]).await;
    let stale = world.cluster.latest().stale.clone();
    assert!(stale.contains(&Kind::ClusterNetworkPolicy) && !stale.contains(&Kind::NetworkPolicy), "{stale:?}");
    world.kube.enforce(rules(", networking.k8s.aws"));
    world.kube.disconnect();
    // The trouble goes with the next change that is seen.
    let change = json!({"apiVersion": "networking.k8s.aws/v1alpha1", "kind": "ClusterNetworkPolicy", "metadata": {"name": "a"}, "spec": {"tier": "Baseline"}});
    world.kube.put(AWS_CLUSTER_POLICIES, change);
    until(&world, "the right again", |s| !s.trouble.contains_key(of_aws)).await;
    world.kube.outage(Some(404));
    stays("a load balancer's 404", &[(of_aws, "404"), ("namespaces", "404")]).await;
    world.kube.outage(None);
    world.kube.withdraw(AWS_CLUSTER_POLICIES);
    world.kube.disconnect();
    until(&world, "the kind is gone", |s| s.cluster_network_policies.is_empty() && !s.trouble.contains_key(of_aws)).await;
    assert_eq!(world.cluster.latest().namespaces.len(), 1);
}

#[tokio::test]
async fn without_policy_only_own_pods_are_asked_for() {
    let world = world(false, |kube| {
        kube.put(PODS, object("Pod", "x", "mine", "n1"));
        kube.put(PODS, object("Pod", "x", "other", "n2"));
    })
    .await;
    until(&world, "start", |s| s.synced).await;
    assert_eq!(world.cluster.latest().pods.keys().cloned().collect::<Vec<_>>(), [PodName::new("x", "mine")]);
    assert!(!world.kube.requests().iter().any(|r| r.contains("networkpolicies") || r.contains("/services")));
}

/// A pod that starts after an outage needs its policies, not only its object: no kind is asked much later than another.
#[tokio::test]
async fn after_an_outage_kinds_are_known_again_together() {
    let world = world(true, |kube| kube.put(PODS, object("Pod", "x", "a", "n1"))).await;
    until(&world, "start", |s| s.synced && s.stale.is_empty()).await;
    world.kube.outage(Some(503));
    world.kube.disconnect();
    // Pauses have grown to six seconds and more.
    let asked = || world.kube.requests().iter().filter(|r| r.starts_with("GET /apis/networking.k8s.io/v1/networkpolicies?")).count();
    let before = asked();
    stanchion_lab::wait::wait_for("the fifth refusal", Duration::from_secs(60), || {
        let count = asked() - before;
        async move {
            anyhow::ensure!(count >= 5, "{count}");
            Ok(())
        }
    })
    .await
    .unwrap();
    let kinds = world.cluster.latest().stale.clone();
    assert!(kinds.len() >= 6, "{kinds:?}");
    world.kube.outage(None);
    until(&world, "the first", |s| s.stale.len() < kinds.len()).await;
    let first = std::time::Instant::now();
    until(&world, "the others", |s| s.stale.is_empty() && s.trouble.is_empty()).await;
    assert!(first.elapsed() < Duration::from_secs(2), "{:?} after the first", first.elapsed());
}

/// A process that ships metrics and judges no policy: its pods' documents name their service.
#[tokio::test]
async fn metrics_know_the_service_of_a_pod_without_policy() {
    let world = world_of(metrics_alone(), |kube| {
        let pod = |name: &str, node: &str| json!({"metadata": {"name": name, "namespace": "x", "labels": {"app": "web"}}, "spec": {"nodeName": node}});
        kube.put(PODS, pod("mine", "n1"));
        kube.put(PODS, pod("other", "n2"));
        kube.put(SERVICES, json!({"metadata": {"name": "web-svc", "namespace": "x"}, "spec": {"selector": {"app": "web"}}}));
    })
    .await;
    until(&world, "pods and services", |s| s.synced).await;
    let identity = NodeIdentity { cluster: "c".into(), node: "n1".into(), ..NodeIdentity::default() };
    let mut collector = Collector::new(Roots::default(), world.cluster.watch(), identity, &TelemetrySettings::default());
    let (_, documents) = collector.collect().unwrap();
    let documents = documents.iter().map(|text| serde_json::from_str::<Value>(text).unwrap());
    let pods: Vec<Value> = documents.filter(|document| document["Type"] == "Pod").collect();
    let [pod] = &pods[..] else { panic!("one pod of this node: {pods:?}") };
    assert_eq!((&pod["Service"], &pod["kubernetes"]["service_name"]), (&json!("web-svc"), &json!("web-svc")));
    assert!(
        !world.kube.requests().iter().any(|r| r.contains("networkpolicies") || r.contains("/namespaces?") || r.contains("endpointslices"))
    );
}

/// A ClusterRole from before services were read costs the dimension, not the metrics.
#[tokio::test]
async fn services_that_may_not_be_read_hold_up_no_metrics() {
    let rules =
        "kind: ClusterRole\nmetadata: {name: r}\nrules:\n- {apiGroups: [''], resources: [nodes, pods, configmaps], verbs: [list, watch]}\n";
    let world = world_of(metrics_alone(), |kube| {
        kube.put(PODS, object("Pod", "x", "mine", "n1"));
        kube.enforce(Rules::of_manifest(rules).unwrap());
    })
    .await;
    until(&world, "the rest", |s| s.synced && s.pods.len() == 1).await;
    let said = world.cluster.latest().trouble.get("services").cloned();
    assert!(said.as_ref().is_some_and(|text| text.starts_with("reading services is forbidden")), "{said:?}");
}

/// What is between may end each watch at once: then every node asks ever more slowly, and no change is missed.
#[tokio::test]
async fn watches_that_are_cut_at_once_are_begun_with_growing_pauses() {
    let started = std::time::Instant::now();
    let world = world(false, |kube| {
        kube.put(PODS, object("Pod", "x", "a", "n1"));
        kube.cut_watches(true);
    })
    .await;
    until(&world, "the list", |s| s.synced).await;
    // Seen by the fifth watch at the latest, whose predecessors waited at least 1.9 seconds.
    let watches = || world.kube.requests().iter().filter(|r| r.starts_with("GET /api/v1/pods?") && r.contains("watch=true")).count();
    stanchion_lab::wait::wait_for("the fifth watch", Duration::from_secs(30), || {
        let count = watches();
        async move {
            anyhow::ensure!(count >= 5, "{count}");
            Ok(())
        }
    })
    .await
    .unwrap();
    assert!(started.elapsed() >= Duration::from_millis(1875), "five watches within {:?}", started.elapsed());
    world.kube.put(PODS, object("Pod", "x", "b", "n1"));
    until(&world, "a change between two watches", |s| s.pods.len() == 2).await;
}

/// An API server of another age: what it does not serve is said, and the rest works.
#[tokio::test]
async fn a_kind_of_kubernetes_itself_that_is_not_served_is_taken_as_none_and_said() {
    let world = world(true, |kube| {
        kube.put(PODS, object("Pod", "x", "a", "n1"));
        kube.withdraw(SLICES);
    })
    .await;
    until(&world, "the rest", |s| s.synced && s.pods.len() == 1).await;
    let said = world.cluster.latest().trouble.get("endpointslices").cloned();
    assert!(said.as_ref().is_some_and(|text| text.starts_with("endpointslices of discovery.k8s.io/v1 are not served here")), "{said:?}");
}
