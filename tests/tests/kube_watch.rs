//! The API-server source against the fake API: lists, changes, disconnects, 410 Gone, missing CRDs, outages.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::time::Duration;

use serde_json::{Value, json};
use stanchion_core::ids::PodName;
use stanchion_daemon::cluster::{ClusterHandle, api_server};
use stanchion_lab::fake_kube::FakeKube;
use tokio_util::sync::CancellationToken;

const PODS: &str = "/api/v1/pods";

fn object(kind: &str, namespace: &str, name: &str, node: &str) -> Value {
    json!({"kind": kind, "apiVersion": "v1", "metadata": {"name": name, "namespace": namespace, "managedFields": [{"big": "x"}]}, "spec": {"nodeName": node}})
}

struct World {
    kube: FakeKube,
    cluster: ClusterHandle,
    _shutdown: tokio_util::sync::DropGuard,
}

async fn world(policy: bool, prepare: impl FnOnce(&FakeKube)) -> World {
    let kube = FakeKube::default();
    for collection in [
        PODS,
        "/api/v1/nodes",
        "/api/v1/configmaps",
        "/api/v1/namespaces",
        "/api/v1/services",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ] {
        kube.serve_collection(collection);
    }
    prepare(&kube);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(kube.clone().serve(listener));
    let client = api_server::plain_client(&format!("http://{address}")).unwrap();
    let shutdown = CancellationToken::new();
    let scope = api_server::Scope { node_name: "n1".into(), policy, eni_configs: true };
    let cluster = api_server::spawn(client, scope, shutdown.clone());
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
        kube.put("/api/v1/nodes", object("Node", "", "n1", ""));
        kube.put("/api/v1/nodes", object("Node", "", "n2", ""));
    })
    .await;
    until(&world, "the pages of the list", |s| s.synced && s.pods.len() == 1200).await;
    assert_eq!(world.cluster.latest().nodes.len(), 1, "only the own node is read");
    world.kube.put(PODS, object("Pod", "x", "new", "n1"));
    world.kube.delete(PODS, "x/p7");
    let (new, gone) = (PodName::new("x", "new"), PodName::new("x", "p7"));
    until(&world, "an addition and a deletion", |s| s.pods.contains_key(&new) && !s.pods.contains_key(&gone)).await;
}

#[tokio::test]
async fn what_happened_during_a_disconnect_or_before_a_410_is_not_missed() {
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
    world.kube.compact();
    world.kube.outage(None);
    let (a, c) = (PodName::new("x", "a"), PodName::new("x", "c"));
    until(&world, "the relist", |s| !s.pods.contains_key(&a) && s.pods.contains_key(&c)).await;
    assert!(world.cluster.latest().synced);
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
