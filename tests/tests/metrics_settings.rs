//! The metric settings of the real agent: each shows in what it tells.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::net::UdpSocket;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, ensure};
use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::routing::{get, post};
use serde_json::Value;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::fake_aws::signed_scope;
use stanchion_lab::node::{ACCESS_KEY, CLUSTER_NAME};
use stanchion_lab::pod::PodSpec;
use stanchion_lab::wait::wait_for;

fn documents(cluster: &Cluster, group: &str) -> Vec<Value> {
    let cloud = cluster.vpc().cloud();
    let events = cloud.events(&format!("/aws/containerinsights/{CLUSTER_NAME}/{group}"), "node1");
    events.iter().map(|event| serde_json::from_str(&event.message).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_setting_shows() {
    let settings = [
        ("WARM_IP_TARGET", "2"),
        ("STANCHION_METRICS_INTERVAL_SECONDS", "1"),
        ("STANCHION_METRICS_PRESET", "enhanced"),
        ("STANCHION_METRICS_WITHOUT", "NodeFS,pod_status_ready"),
        ("STANCHION_METRICS_FIGURES", "upstream"),
        ("STANCHION_NODE_METRICS", "true"),
        ("STANCHION_STATSD_ADDRESS", "127.0.0.1:8125"),
    ];
    let mut cluster = Cluster::start(&["m5.large"], &settings).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "app-0")).await.expect("a pod");
    let told = wait_for("documents of the pod and of its host interface", SOON, || async {
        let told = documents(&cluster, "performance");
        let of = |name: &'static str| told.iter().filter(move |document| document["Type"] == name);
        let pod = of("Pod").any(|document| document["FullPodName"] == "app-0");
        // As the CloudWatch agent counts: the pod's host end is an interface of the node.
        let host_end = of("NodeNet").any(|document| document["interface"].as_str().is_some_and(|name| name.starts_with("eni")));
        ensure!(pod && host_end, "pod: {pod}, host end: {host_end}");
        Ok(told)
    })
    .await
    .unwrap();
    assert!(!told.iter().any(|document| document["Type"] == "NodeFS"), "left out by its type");
    let pod = told.iter().find(|document| document["Type"] == "Pod").expect("it is there");
    let metrics = pod["CloudWatchMetrics"].to_string();
    assert!(metrics.contains("\"pod_status_running\"") && !metrics.contains("\"pod_status_ready\""), "{metrics}");
    let node = cluster.node(0);
    let text = node.metrics().expect("the metrics listener answers");
    for name in ["node_load1 ", "node_memory_MemTotal_bytes ", "awscni_connmark_backend{backend=\"nftables\"} 1"] {
        assert!(text.contains(name), "{name} in {text}");
    }
    let counted = wait_for("a statsd document", SOON, || async {
        node.netns().run(|| UdpSocket::bind("127.0.0.1:0")?.send_to(b"orders:2|c", "127.0.0.1:8125"))?.context("send a packet")?;
        let mut told = documents(&cluster, "statsd").into_iter();
        told.find(|document| !document["orders"].is_null()).context("none yet")
    })
    .await
    .unwrap();
    assert_eq!(counted["orders"].as_u64().map(|orders| orders % 2), Some(0));
}

/// The kubelet's read-only port, an OTLP receiver and an annotated pod, all on the node's loopback.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_over_http_is_asked() {
    let settings = [
        ("WARM_IP_TARGET", "1"),
        ("STANCHION_METRICS_INTERVAL_SECONDS", "1"),
        ("STANCHION_KUBELET_URL", "http://127.0.0.1:10255"),
        ("STANCHION_OTLP_ENDPOINT", "http://127.0.0.1:4318"),
        ("STANCHION_OTLP_SIGN", "always"),
        ("STANCHION_SCRAPE", "true"),
    ];
    let cluster = Cluster::start(&["m5.large"], &settings).await.expect("the cluster starts");
    let node = cluster.node(0);
    // As CloudWatch: a request is taken only with a signature that the agent's own key made over this very body.
    let scope: Arc<Mutex<String>> = Arc::default();
    let seen = Arc::clone(&scope);
    let receive = move |request: Request| {
        let seen = Arc::clone(&seen);
        async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
            match signed_scope(ACCESS_KEY, &parts, &body) {
                Ok(scope) => {
                    *seen.lock().expect("no panic") = scope;
                    StatusCode::OK
                }
                Err(_) => StatusCode::FORBIDDEN,
            }
        }
    };
    let router = Router::new()
        .route("/stats/summary", get(|| async { r#"{"node":{},"pods":[]}"# }))
        .route("/v1/metrics", post(receive))
        .route("/metrics", get(|| async { "# TYPE queue gauge\nqueue 3\n" }));
    for port in [10255, 4318, 9102] {
        let listener = node.netns().tcp_listener(([127, 0, 0, 1], port).into()).expect("a free port");
        let router = router.clone();
        tokio::spawn(async move { axum::serve(listener, router).await });
    }
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "x", "name": "scraped", "uid": "u-scraped", "annotations": {
            "prometheus.io/scrape": "true", "prometheus.io/port": "9102"}},
        "spec": {"nodeName": "node1", "hostNetwork": true, "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": "127.0.0.1"},
    });
    cluster.vpc().manifests().apply("pod-x-scraped.json", &pod.to_string()).expect("written");
    wait_for("each of them to be counted", SOON, || async {
        let text = node.metrics()?;
        let missing =
            ["kubelet_summaries_total{outcome=\"read\"}", "otlp_requests_total{outcome=\"sent\"}", "scrapes_total{outcome=\"read\"}"]
                .into_iter()
                .find(|series| text.contains(&format!("stanchion_{series} 0")) || !text.contains(series));
        ensure!(missing.is_none(), "{missing:?}");
        Ok(())
    })
    .await
    .unwrap();
    let scope = scope.lock().expect("no panic").clone();
    assert!(scope.ends_with("/eu-west-1/monitoring/aws4_request"), "{scope}");
    wait_for("the scraped document", SOON, || async {
        let scraped = documents(&cluster, "prometheus");
        ensure!(scraped.iter().any(|document| document["queue"] == 3 && document["pod_name"] == "scraped"), "{scraped:?}");
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_cannot_be_used_stops_the_start_with_its_name() {
    let mut vpc = stanchion_lab::Vpc::builder().start().await.expect("a VPC");
    let node = vpc.node("node1", "m5.large").await.expect("a node");
    for (name, value) in
        [("STANCHION_METRICS_PRESET", "everything"), ("STANCHION_METRICS_WITHOUT", "Pods"), ("STANCHION_STATSD_ADDRESS", "8125")]
    {
        let mut agent = node.start_agent(&[(name, value)]).expect("it is started");
        let status = wait_for("the agent to refuse", SOON, || {
            let ended = agent.ended();
            async move { ended?.context("it still runs") }
        })
        .await
        .unwrap();
        assert!(!status.success());
        let said = std::fs::read_to_string(agent.output()).unwrap();
        assert!(said.contains(name) && said.contains(value), "{name}: {said}");
    }
}
