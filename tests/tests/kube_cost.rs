//! What a node costs the API server: bytes of the first lists and of each change, at 10,000 pods with churn.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stanchion_daemon::cluster::{ClusterHandle, api_server, credentials};
use stanchion_lab::fake_kube::FakeKube;
use tokio_util::sync::CancellationToken;

const PODS: &str = "/api/v1/pods";
const POD_COUNT: usize = 10_000;
/// Pods a node: 200 nodes.
const PER_NODE: usize = 50;
/// Pods replaced a second in the whole cluster. Each is five changes: made, bound, started, ready, deleted.
const REPLACED: usize = 20;
const CHANGES_A_POD: usize = 5;
/// Seconds of churn that are played, as fast as they go.
const SECONDS: usize = 10;

/// A pod as a real kubelet and API server of 1.35 have it, managed fields included as the API server sends them.
fn template() -> Value {
    let list: Value = serde_json::from_str(include_str!("../../agent/core/testdata/kubelet/pods.json")).unwrap();
    let mut pod = list["items"][0].clone();
    // The kubelet's own list leaves these out; three managers' worth, as a Deployment's pod has.
    let fields = json!({"f:metadata": {"f:generateName": {}, "f:labels": {".": {}, "f:app": {}, "f:pod-template-hash": {}}, "f:ownerReferences": {}}, "f:spec": {"f:containers": {"k:{\"name\":\"main\"}": {".": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {}, "f:ports": {}, "f:resources": {}}}, "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}}});
    let status = json!({"f:status": {"f:conditions": {"k:{\"type\":\"Ready\"}": {".": {}, "f:lastTransitionTime": {}, "f:status": {}}}, "f:containerStatuses": {}, "f:hostIP": {}, "f:phase": {}, "f:podIP": {}, "f:podIPs": {}, "f:startTime": {}}});
    let manager = |name: &str, fields: &Value| json!({"manager": name, "operation": "Update", "apiVersion": "v1", "time": "2026-11-21T03:35:15Z", "fieldsType": "FieldsV1", "fieldsV1": fields});
    pod["metadata"]["managedFields"] = json!([manager("kube-controller-manager", &fields), manager("kubelet", &status)]);
    pod
}

fn pod(template: &Value, index: usize) -> Value {
    let mut pod = template.clone();
    pod["metadata"]["name"] = json!(format!("web-7d4b9c6f5-{index:05}"));
    pod["metadata"]["namespace"] = json!(format!("ns{}", index % 100));
    pod["spec"]["nodeName"] = json!(format!("node{}", index / PER_NODE));
    pod["status"]["podIP"] = json!(format!("10.{}.{}.{}", index >> 16, (index >> 8) & 255, index & 255));
    pod["status"]["podIPs"] = json!([{"ip": pod["status"]["podIP"]}]);
    pod
}

struct Cost {
    list: u64,
    list_took: Duration,
    a_second: u64,
}

async fn cost(policy: bool) -> Cost {
    let kube = FakeKube::default();
    for collection in [
        "/api/v1/nodes",
        "/api/v1/configmaps",
        "/api/v1/namespaces",
        "/api/v1/services",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ] {
        kube.serve_collection(collection);
    }
    let template = template();
    for index in 0..POD_COUNT {
        kube.put(PODS, pod(&template, index));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(kube.clone().serve(listener));
    let shutdown = CancellationToken::new();
    let _guard = shutdown.clone().drop_guard();
    let scope = api_server::Scope { node_name: "node0".into(), policy, services: !policy, policy_endpoints: false, eni_configs: false };
    let started = Instant::now();
    let cluster = api_server::spawn(credentials::fixed(credentials::plain(&url).unwrap()), &scope, shutdown);
    until(&cluster, |state| state.synced).await;
    let list_took = started.elapsed();
    assert_eq!(cluster.latest().pods.len(), if policy { POD_COUNT } else { PER_NODE });
    let list = kube.bytes_sent();
    // The watches stand before the churn begins.
    let watched = |requests: &[String]| requests.iter().any(|request| request.contains("/pods?") && request.contains("watch=true"));
    while !watched(&kube.requests()) {
        tokio::task::yield_now().await;
    }
    for second in 0..SECONDS {
        for replaced in 0..REPLACED {
            // Spread over all nodes alike.
            let index = (second * REPLACED + replaced) * 47 % POD_COUNT;
            for change in 0..CHANGES_A_POD - 1 {
                let mut pod = pod(&template, index);
                pod["status"]["startTime"] = json!(format!("2026-11-21T03:35:{:02}Z", change + 10));
                kube.put(PODS, pod);
            }
            let key = format!("ns{}/web-7d4b9c6f5-{index:05}", index % 100);
            kube.delete(PODS, &key);
        }
    }
    // The last change, on the own node: when it is seen, all others were sent.
    let mut last = pod(&template, 0);
    last["metadata"]["name"] = json!("last");
    kube.put(PODS, last);
    until(&cluster, |state| state.pods.keys().any(|name| name.name == "last")).await;
    Cost { list, list_took, a_second: (kube.bytes_sent() - list) / SECONDS as u64 }
}

async fn until(cluster: &ClusterHandle, condition: impl Fn(&stanchion_core::cluster::ClusterState) -> bool) {
    let mut state = cluster.watch();
    tokio::time::timeout(Duration::from_secs(60), state.wait_for(|state| condition(state))).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_costs_what_its_role_needs() {
    let size = pod(&template(), 1).to_string().len() as u64;
    let all = cost(true).await;
    let own = cost(false).await;
    let changes = (REPLACED * CHANGES_A_POD) as u64;
    println!(
        "{POD_COUNT} pods of {size} bytes, {REPLACED} replaced a second ({changes} changes):\n\
         network policy:  first lists {} bytes in {:?}, then {} bytes/s\n\
         own node only:   first lists {} bytes in {:?}, then {} bytes/s",
        all.list, all.list_took, all.a_second, own.list, own.list_took, own.a_second
    );
    // Every pod once, every change once: nothing is read twice.
    assert!(all.list < size * POD_COUNT as u64 * 11 / 10, "{}", all.list);
    assert!(all.a_second < changes * size * 12 / 10, "{}", all.a_second);
    // Without policy only this node's pods are sent.
    assert!(own.list < size * PER_NODE as u64 * 12 / 10, "{}", own.list);
    assert!(own.a_second < all.a_second / 20, "{}", own.a_second);
}
