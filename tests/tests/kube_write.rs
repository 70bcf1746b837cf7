//! What the agent writes to the API server, and that the shipped RBAC allows each of its requests and no more is asked.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::time::Duration;

use serde_json::{Value, json};
use stanchion_core::events::{Event, Post, Recorder, Regarding};
use stanchion_core::ids::PodName;
use stanchion_daemon::cluster::credentials;
use stanchion_daemon::cluster::write::{POD_IPS, WriteError, Writer};
use stanchion_daemon::cluster::{ClusterHandle, api_server};
use stanchion_lab::fake_kube::{FakeKube, Rules};
use tokio_util::sync::CancellationToken;

const PODS: &str = "/api/v1/pods";
const NODES: &str = "/api/v1/nodes";
const EVENTS: &str = "/apis/events.k8s.io/v1/events";
const CNI_NODES: &str = "/apis/vpcresources.k8s.aws/v1alpha1/cninodes";
/// The chart with every feature that needs a right of its own.
const ALL_RIGHTS: &str = include_str!("../../deploy/manifests/stanchion-all-features.yaml");
/// The chart as it is installed without values.
const DEFAULT_RIGHTS: &str = include_str!("../../deploy/manifests/stanchion.yaml");

async fn world(rights: &str) -> (FakeKube, Writer) {
    let kube = FakeKube::default();
    for collection in [PODS, NODES, EVENTS] {
        kube.serve_collection(collection);
    }
    kube.enforce(Rules::of_manifest(rights).unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(kube.clone().serve(listener));
    let writer = Writer::new(credentials::fixed(credentials::plain(&url).unwrap()));
    (kube, writer)
}

fn pod(uid: &str) -> Value {
    json!({"kind": "Pod", "metadata": {"name": "a", "namespace": "x", "uid": uid, "annotations": {"keep": "me"}}})
}

#[tokio::test]
async fn a_pod_is_annotated_and_cleared_only_while_it_is_the_same_pod_with_the_same_address() {
    let (kube, writer) = world(ALL_RIGHTS).await;
    let name = PodName::new("x", "a");
    kube.put(PODS, pod("u1"));
    writer.annotate(&name, "u1", "10.0.0.9").await.unwrap();
    let annotations = || kube.get(PODS, "x/a").unwrap()["metadata"]["annotations"].clone();
    assert_eq!(annotations(), json!({"keep": "me", POD_IPS: "10.0.0.9"}));
    writer.clear_annotation(&name, "10.0.0.8").await.unwrap();
    assert_eq!(annotations()[POD_IPS], "10.0.0.9", "another pod's release must not clear it");
    writer.clear_annotation(&name, "10.0.0.9").await.unwrap();
    assert_eq!(annotations()[POD_IPS], "");
    // A StatefulSet's next pod of this name.
    let error = writer.annotate(&name, "u0", "10.0.0.7").await.unwrap_err();
    assert!(matches!(error, WriteError::Refused { code: 409, .. }), "{error}");
    assert_eq!(annotations()[POD_IPS], "");
    kube.delete(PODS, "x/a");
    writer.clear_annotation(&name, "10.0.0.9").await.unwrap();
    assert!(kube.forbidden().is_empty(), "{:?}", kube.forbidden());
}

#[tokio::test]
async fn only_the_start_up_taint_goes() {
    let (kube, writer) = world(ALL_RIGHTS).await;
    let taint = |key: &str| json!({"key": key, "effect": "NoSchedule"});
    kube.put(NODES, json!({"kind": "Node", "metadata": {"name": "n1"}, "spec": {"taints": [taint("stanchion/start"), taint("other")]}}));
    assert!(writer.remove_taint("n1", "stanchion/start").await.unwrap());
    assert_eq!(kube.get(NODES, "/n1").unwrap()["spec"]["taints"], json!([taint("other")]));
    assert!(!writer.remove_taint("n1", "stanchion/start").await.unwrap());
    assert!(!writer.remove_taint("n2", "stanchion/start").await.unwrap());
    assert!(kube.forbidden().is_empty(), "{:?}", kube.forbidden());
}

#[tokio::test]
async fn the_nodes_condition_is_put_beside_those_of_others() {
    let (kube, writer) = world(ALL_RIGHTS).await;
    let of = |kind: &str, status: &str| json!({"type": kind, "status": status});
    let conditions = [of("Ready", "True"), of("NetworkUnavailable", "True")];
    kube.put(NODES, json!({"kind": "Node", "metadata": {"name": "n1"}, "status": {"conditions": conditions}}));
    writer.network_available("n1", "2026-11-21T15:00:00Z").await.unwrap();
    let now = kube.get(NODES, "/n1").unwrap()["status"]["conditions"].clone();
    assert_eq!((now.as_array().unwrap().len(), &now[0], now[1]["status"].as_str()), (2, &conditions[0], Some("False")), "{now}");
    assert_eq!((now[1]["reason"].as_str(), now[1]["lastTransitionTime"].as_str()), (Some("StanchionReady"), Some("2026-11-21T15:00:00Z")));
    assert!(writer.network_available("n2", "").await.is_err());
    assert!(kube.forbidden().is_empty(), "{:?}", kube.forbidden());
}

#[tokio::test]
async fn the_cninode_names_the_eni_config_and_keeps_its_other_features() {
    let (kube, writer) = world(ALL_RIGHTS).await;
    // Not served, then not there: no failure.
    assert!(!writer.set_feature("n1", "CustomNetworking", "a").await.unwrap());
    kube.serve_collection(CNI_NODES);
    assert!(!writer.set_feature("n1", "CustomNetworking", "a").await.unwrap());
    // As the server keeps a feature without a value.
    let other = json!({"name": "SecurityGroupsForPods"});
    kube.put(CNI_NODES, json!({"metadata": {"name": "n1"}, "spec": {"features": [other, {"name": "CustomNetworking", "value": "old"}]}}));
    assert!(writer.set_feature("n1", "CustomNetworking", "a").await.unwrap());
    let features = || kube.get(CNI_NODES, "/n1").unwrap()["spec"]["features"].clone();
    assert_eq!(features(), json!([other, {"name": "CustomNetworking", "value": "a"}]));
    assert!(!writer.set_feature("n1", "CustomNetworking", "a").await.unwrap());
    assert!(!writer.set_feature("n1", "SecurityGroupsForPods", "").await.unwrap());
    assert!(kube.forbidden().is_empty(), "{:?}", kube.forbidden());
}

#[tokio::test]
async fn events_are_made_and_counted_with_the_rights_of_the_default_chart() {
    let (kube, writer) = world(DEFAULT_RIGHTS).await;
    let mut recorder = Recorder::new("n1");
    let regarding = Regarding::Pod(PodName::new("x", "a"), "u1".into());
    let event = Event { regarding, warning: true, reason: "NoFreeAddress", action: "AssignAddress", note: "no free address".into() };
    writer.post(recorder.record(event.clone(), 1_000_000).unwrap()).await.unwrap();
    assert_eq!(recorder.record(event, 1_001_000), None);
    let counts = recorder.due(1_040_000);
    assert_eq!(counts.len(), 1);
    for post in counts {
        writer.post(post).await.unwrap();
    }
    let written = kube.objects(EVENTS);
    assert_eq!(written.len(), 1);
    assert_eq!((written[0]["metadata"]["namespace"].as_str(), written[0]["series"]["count"].as_u64()), (Some("x"), Some(2)));
    let gone = Post::Count { namespace: "x".into(), name: "none".into(), patch: json!({}) };
    assert!(writer.post(gone).await.unwrap_err().is_final());
    // What is not switched on is not allowed either.
    kube.put(PODS, pod("u1"));
    assert!(writer.annotate(&PodName::new("x", "a"), "u1", "10.0.0.9").await.is_err());
    assert!(kube.forbidden().iter().all(|request| request.starts_with("patch /api/v1/namespaces/x/pods/a")), "{:?}", kube.forbidden());
}

/// Every kind is listed and watched, once with all features and once with the default ones: no request is forbidden.
#[tokio::test]
async fn no_read_is_asked_that_the_rbac_does_not_allow() {
    for (rights, policy_endpoints, eni_configs) in [(DEFAULT_RIGHTS, false, false), (ALL_RIGHTS, true, true)] {
        for policy in [true, false] {
            let kube = FakeKube::default();
            let collections = [
                PODS,
                NODES,
                "/api/v1/configmaps",
                "/api/v1/namespaces",
                "/api/v1/services",
                "/apis/discovery.k8s.io/v1/endpointslices",
                "/apis/networking.k8s.io/v1/networkpolicies",
                "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
                "/apis/networking.k8s.aws/v1alpha1/clusternetworkpolicies",
                "/apis/networking.k8s.aws/v1alpha1/applicationnetworkpolicies",
                "/apis/networking.k8s.aws/v1alpha1/policyendpoints",
                "/apis/networking.k8s.aws/v1alpha1/clusterpolicyendpoints",
                "/apis/crd.k8s.amazonaws.com/v1alpha1/eniconfigs",
            ];
            for collection in collections {
                kube.serve_collection(collection);
            }
            kube.enforce(Rules::of_manifest(rights).unwrap());
            let cluster = read(&kube, policy, policy_endpoints, eni_configs).await;
            let watches = |kube: &FakeKube| kube.requests().iter().filter(|request| request.contains("watch=true")).count();
            let expected = 2 + if policy { 8 } else { 1 } + if policy_endpoints { 2 } else { 0 } + usize::from(eni_configs);
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while watches(&kube) < expected && tokio::time::Instant::now() < deadline {
                tokio::task::yield_now().await;
            }
            assert_eq!((watches(&kube), kube.forbidden()), (expected, Vec::new()));
            assert!(cluster.latest().synced && cluster.latest().trouble.is_empty());
        }
    }
}

async fn read(kube: &FakeKube, policy: bool, policy_endpoints: bool, eni_configs: bool) -> ClusterHandle {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(kube.clone().serve(listener));
    let clients = credentials::fixed(credentials::plain(&url).unwrap());
    let scope = api_server::Scope { node_name: "n1".into(), policy, services: true, policy_endpoints, eni_configs };
    let cluster = api_server::spawn(clients, &scope, CancellationToken::new());
    let mut state = cluster.watch();
    tokio::time::timeout(Duration::from_secs(20), state.wait_for(|state| state.synced)).await.unwrap().unwrap();
    cluster
}
