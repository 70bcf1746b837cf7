//! The kubelet, an OTLP receiver, scraped pods and statsd, over real sockets.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse as _;
use axum::routing::{get, post};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use prost::Message as _;
use serde_json::{Value, json};
use stanchion_core::cluster::ClusterState;
use stanchion_core::metrics::catalog::Preset;
use stanchion_core::metrics::insights::{NodeIdentity, Selection};
use stanchion_core::metrics::otlp::wire::{ExportMetricsPartialSuccess, ExportMetricsServiceRequest, ExportMetricsServiceResponse, metric};
use stanchion_core::metrics::scrape::Rules;
use stanchion_core::objects::Pod;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::telemetry::{
    self, ExporterSettings, Extras, KubeletSettings, OtlpSettings, Roots, TelemetryHandle, TelemetryParts, TelemetrySettings,
};
use stanchion_lab::fake_aws::{Clock, Cloud, CloudConfig, DirectLogs, TEST_CA_PEM, test_acceptor};
use stanchion_lab::pod_cgroups::PodCgroups;
use stanchion_lab::wait::wait_for;
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(40);

/// Serves on the loopback until the test ends.
async fn serve(tls: Option<TlsAcceptor>, router: Router) -> SocketAddr {
    serve_at("127.0.0.1:0", tls, router).await
}

async fn serve_at(address: &str, tls: Option<TlsAcceptor>, router: Router) -> SocketAddr {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, router) = (tls.clone(), router.clone());
            tokio::spawn(async move {
                let service = TowerToHyperService::new(router);
                let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http1_only();
                // A client that does not trust us goes away.
                match tls {
                    None => drop(http.serve_connection(TokioIo::new(stream), service).await),
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            drop(http.serve_connection(TokioIo::new(stream), service).await);
                        }
                    }
                }
            });
        }
    });
    address
}

/// Telemetry with a fast tick into a fake CloudWatch.
struct Bed {
    cloud: Cloud,
    handle: TelemetryHandle,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Bed {
    fn start(cluster: &ClusterHandle, cgroups: &Path, extras: Extras) -> Self {
        Self::start_with(cluster, cgroups, extras, Preset::default())
    }

    fn start_with(cluster: &ClusterHandle, cgroups: &Path, extras: Extras, preset: Preset) -> Self {
        let cloud = Cloud::new(CloudConfig::default(), Clock::tokio());
        let shutdown = CancellationToken::new();
        let (handle, task) = telemetry::spawn(TelemetryParts {
            sink: Arc::new(DirectLogs::new(&cloud, Duration::ZERO)),
            cluster: cluster.watch(),
            roots: Roots { cgroup: cgroups.to_owned(), ..Roots::default() },
            identity: NodeIdentity {
                cluster: "demo".into(),
                node: "node1".into(),
                availability_zone: "eu-west-1a".into(),
                ..Default::default()
            },
            settings: TelemetrySettings {
                interval: Duration::from_millis(300),
                selection: Selection { preset, ..Selection::default() },
                ..TelemetrySettings::default()
            },
            netpol: None,
            logs: None,
            extras,
            shutdown: shutdown.clone(),
        });
        Self { cloud, handle, shutdown, task }
    }

    fn documents(&self, group: &str) -> Vec<Value> {
        let events = self.cloud.events(&format!("/aws/containerinsights/demo/{group}"), "node1");
        events.iter().map(|event| serde_json::from_str(&event.message).unwrap()).collect()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(SOON, self.task).await.expect("it ends").expect("without panic");
    }
}

/// A kubelet that knows one token, and whose summary has the container of a pod of ours.
fn kubelet(uid: &str, token: Arc<Mutex<String>>) -> Router {
    let summary = json!({"node": {}, "pods": [{
        "podRef": {"name": "pod-0", "namespace": "default", "uid": uid},
        "containers": [{"name": "c0", "rootfs": {"usedBytes": 4096, "capacityBytes": 8192, "availableBytes": 2048}}],
    }]});
    let answer = move |headers: HeaderMap| {
        let right = format!("Bearer {}", token.lock().unwrap());
        let known = headers.get("authorization").is_some_and(|value| value == right.as_str());
        let reply = if known { axum::Json(summary.clone()).into_response() } else { StatusCode::FORBIDDEN.into_response() };
        async move { reply }
    };
    Router::new().route("/stats/summary", get(answer))
}

fn service_account(token: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), format!("{token}\n")).unwrap();
    std::fs::write(dir.path().join("ca.crt"), TEST_CA_PEM).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_files_come_from_the_kubelet_and_nothing_else_depends_on_it() {
    let cgroups = PodCgroups::make("node1", 1, 1).expect("cgroups need root");
    let cluster = ClusterHandle::fixed(cgroups.cluster());
    let token = Arc::new(Mutex::new("later".to_owned()));
    let address = serve(Some(test_acceptor()), kubelet(&cgroups.pods[0].metadata.uid, Arc::clone(&token))).await;
    let account = service_account("now");
    let settings =
        KubeletSettings { url: format!("https://localhost:{}", address.port()), insecure: false, service_account: account.path().into() };
    let bed = Bed::start(&cluster, cgroups.root.path(), Extras { kubelet: Some(settings), ..Extras::default() });
    let of_type =
        |bed: &Bed, name: &str| bed.documents("performance").into_iter().filter(|document| document["Type"] == name).collect::<Vec<_>>();
    // Refused: the rest is told all the same.
    wait_for("documents without the kubelet", SOON, || async {
        let failed = bed.handle.extras().kubelet.failed.load(Ordering::Relaxed);
        ensure!(failed > 0 && !of_type(&bed, "Container").is_empty(), "{failed} failures");
        Ok(())
    })
    .await
    .unwrap();
    assert!(of_type(&bed, "ContainerFS").is_empty());
    // The token is read anew each time, as the kubelet exchanges it.
    std::fs::write(account.path().join("token"), "later\n").unwrap();
    let files =
        wait_for("the container's files", SOON, || async { of_type(&bed, "ContainerFS").pop().ok_or_else(|| anyhow::anyhow!("none yet")) })
            .await
            .unwrap();
    assert_eq!((&files["ContainerName"], &files["container_filesystem_usage"]), (&json!("c0"), &json!(4096)));
    assert_eq!((&files["container_filesystem_utilization"], &files["container_filesystem_available"]), (&json!(50), &json!(2048)));
    // Refused again for long: old figures are not told for ever.
    *token.lock().unwrap() = "another".to_owned();
    wait_for("old figures to be taken back", SOON, || async {
        let snapshot = bed.handle.snapshot();
        ensure!(snapshot.pods[0].containers[0].files.is_none(), "still there");
        Ok(())
    })
    .await
    .unwrap();
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_with_a_strangers_certificate_is_not_shown_the_token() {
    let cgroups = PodCgroups::make("node1", 1, 1).expect("cgroups need root");
    let cluster = ClusterHandle::fixed(cgroups.cluster());
    let token = Arc::new(Mutex::new("now".to_owned()));
    let uid = &cgroups.pods[0].metadata.uid;
    // The certificate is for localhost and 127.0.0.1.
    let right = serve(Some(test_acceptor()), kubelet(uid, Arc::clone(&token))).await;
    let wrong = serve_at("127.0.0.2:0", Some(test_acceptor()), kubelet(uid, token)).await;
    let account = service_account("now");
    let read = |bed: &Bed| bed.handle.extras().kubelet.read.load(Ordering::Relaxed);
    for (address, insecure, trusted) in [(right, false, true), (wrong, false, false), (wrong, true, true)] {
        let url = format!("https://{address}");
        let settings = KubeletSettings { url, insecure, service_account: account.path().into() };
        let bed = Bed::start(&cluster, cgroups.root.path(), Extras { kubelet: Some(settings), ..Extras::default() });
        wait_for("an answer or a refusal", SOON, || async {
            let failed = bed.handle.extras().kubelet.failed.load(Ordering::Relaxed);
            ensure!(failed > 1 || read(&bed) > 0, "nothing yet");
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(read(&bed) > 0, trusted);
        bed.stop().await;
    }
}

/// The recorded summary, over the port that wants no token: nothing is shown to whoever listens there.
#[tokio::test(flavor = "multi_thread")]
async fn the_read_only_port_is_asked_without_a_token() {
    let asked: Arc<Mutex<Vec<bool>>> = Arc::default();
    let headers = Arc::clone(&asked);
    let answer = move |map: HeaderMap| {
        headers.lock().unwrap().push(map.contains_key("authorization"));
        async { include_str!("../../agent/core/testdata/kubelet/stats-summary.json") }
    };
    let address = serve(None, Router::new().route("/stats/summary", get(answer))).await;
    let settings =
        KubeletSettings { url: format!("http://{address}/"), insecure: false, service_account: "/nonexistent/serviceaccount".into() };
    let cluster = ClusterHandle::fixed(ClusterState::default());
    let empty = tempfile::tempdir().unwrap();
    let bed = Bed::start(&cluster, empty.path(), Extras { kubelet: Some(settings), ..Extras::default() });
    wait_for("a summary", SOON, || async {
        let read = bed.handle.extras().kubelet.read.load(Ordering::Relaxed);
        ensure!(read > 0, "none yet");
        Ok(())
    })
    .await
    .unwrap();
    assert!(asked.lock().unwrap().iter().all(|shown| !shown));
    bed.stop().await;
}

/// A figure by pod, container and metric.
type Told = BTreeMap<(String, String, String), f64>;

fn gauges(request: &ExportMetricsServiceRequest) -> Told {
    let mut told = Told::new();
    for resource in &request.resource_metrics {
        let attributes = &resource.resource.as_ref().unwrap().attributes;
        let get = |key: &str| {
            attributes.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.as_ref()?.string_value.clone()).unwrap_or_default()
        };
        assert_eq!((get("k8s.cluster.name"), get("k8s.node.name")), ("demo".into(), "node1".into()));
        for metric in resource.scope_metrics.iter().flat_map(|scope| &scope.metrics) {
            if let Some(metric::Data::Gauge(gauge)) = &metric.data {
                told.insert((get("k8s.pod.name"), get("k8s.container.name"), metric.name.clone()), gauge.data_points[0].as_double.unwrap());
            }
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn an_otlp_receiver_gets_every_tick_and_a_busy_one_is_asked_again() {
    let cgroups = PodCgroups::make("node1", 1, 1).expect("cgroups need root");
    let cluster = ClusterHandle::fixed(cgroups.cluster());
    let received: Arc<Mutex<Vec<ExportMetricsServiceRequest>>> = Arc::default();
    let refusals = Arc::new(Mutex::new(1));
    let taken = Arc::clone(&received);
    let receive = move |headers: HeaderMap, body: Bytes| {
        let busy = {
            let mut left = refusals.lock().unwrap();
            std::mem::replace(&mut *left, 0) > 0
        };
        let reply = if busy {
            (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "0")]).into_response()
        } else {
            assert_eq!(
                (&headers["content-type"], &headers["content-encoding"]),
                (&"application/x-protobuf".parse().unwrap(), &"gzip".parse().unwrap())
            );
            let mut text = Vec::new();
            flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut text).unwrap();
            taken.lock().unwrap().push(ExportMetricsServiceRequest::decode(&text[..]).unwrap());
            let partial_success = ExportMetricsPartialSuccess { rejected_data_points: 3, error_message: "too old".into() };
            ExportMetricsServiceResponse { partial_success: Some(partial_success) }.encode_to_vec().into_response()
        };
        async move { reply }
    };
    let address = serve(None, Router::new().route("/v1/metrics", post(receive))).await;
    let otlp = OtlpSettings { endpoint: format!("http://{address}/"), sign: None };
    let bed = Bed::start(&cluster, cgroups.root.path(), Extras { otlp: Some(otlp), ..Extras::default() });
    // A tick may come so soon after the one before that the kernel counted no CPU time in between.
    let told = wait_for("two requests, and the node's CPU", SOON, || async {
        let requests = received.lock().unwrap();
        ensure!(requests.len() >= 2, "{} requests", requests.len());
        let busy = |told: &Told| told[&(String::new(), String::new(), "k8s.node.cpu.usage".to_owned())] > 0.0;
        requests[1..].iter().map(gauges).find(busy).context("no CPU time yet")
    })
    .await
    .unwrap();
    let value = |pod: &str, container: &str, name: &str| told[&(pod.to_owned(), container.to_owned(), name.to_owned())];
    assert!(value("", "", "k8s.node.uptime") > 0.0);
    assert!(value("pod-0", "", "k8s.pod.cpu.usage") >= 0.0);
    assert!(value("pod-0", "c0", "k8s.container.memory_limit_utilization") >= 0.0);
    let counters = &bed.handle.extras().otlp;
    wait_for("the points that the receiver left out to be counted", SOON, || async {
        let (sent, rejected) = (counters.sent.load(Ordering::Relaxed), counters.rejected_points.load(Ordering::Relaxed));
        ensure!(sent > 0 && rejected >= 3, "{rejected} of {sent} requests");
        Ok(())
    })
    .await
    .unwrap();
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn annotated_pods_are_scraped_into_documents() {
    let scrapes = Arc::new(Mutex::new(0u64));
    let count = Arc::clone(&scrapes);
    let text = move || {
        let mut scrapes = count.lock().unwrap();
        *scrapes += 1;
        let text = format!("# TYPE orders_total counter\norders_total{{shop=\"a\"}} {}\n# TYPE queue gauge\nqueue 7\n", *scrapes * 5);
        async move { text }
    };
    let address = serve(None, Router::new().route("/stats", get(text))).await;
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "shop-1", "namespace": "x", "uid": "u", "annotations": {
            "prometheus.io/scrape": "true", "prometheus.io/port": address.port().to_string(), "prometheus.io/path": "/stats"}},
        "spec": {"nodeName": "node1", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": "127.0.0.1"},
    }))
    .unwrap();
    let mut state = ClusterState { synced: true, ..ClusterState::default() };
    state.pods.insert(pod.full_name(), Arc::new(pod));
    let cluster = ClusterHandle::fixed(state);
    let rules = r#"{"metric_declaration": [{"source_labels": ["Namespace"], "label_matcher": "^x$",
        "dimensions": [["ClusterName", "Namespace", "shop"]], "metric_selectors": ["^orders_total$"]}]}"#;
    let empty = tempfile::tempdir().unwrap();
    let bed = Bed::start(&cluster, empty.path(), Extras { scrape: Some(Rules::parse(rules).unwrap()), ..Extras::default() });
    let counter = wait_for("a counter's growth", SOON, || async {
        let mut documents = bed.documents("prometheus").into_iter();
        documents.find(|document| !document["orders_total"].is_null()).ok_or_else(|| anyhow::anyhow!("none yet"))
    })
    .await
    .unwrap();
    assert_eq!((&counter["orders_total"], &counter["pod_name"], &counter["ClusterName"]), (&json!(5), &json!("shop-1"), &json!("demo")));
    assert_eq!(counter["CloudWatchMetrics"][0]["Dimensions"], json!([["ClusterName", "Namespace", "shop"]]));
    assert!(bed.documents("prometheus").iter().any(|document| document["queue"] == 7));
    bed.stop().await;
}

/// The CloudWatch add-on's exporter of GPUs speaks TLS on the port on which NVIDIA's speaks plainly; both are on the node's loopback
/// here.
#[tokio::test(flavor = "multi_thread")]
async fn gpus_and_volumes_are_told_where_their_drivers_exporters_run() {
    let answer = |text: &'static str| Router::new().route("/metrics", get(move || async move { text }));
    let gpus = answer(include_str!("../../agent/core/testdata/exporters/dcgm.txt"));
    let volumes = answer(include_str!("../../agent/core/testdata/exporters/ebs-csi-node.txt"));
    let mut state = ClusterState { synced: true, ..ClusterState::default() };
    for (label, address) in [("nvidia-dcgm-exporter", "127.0.0.94"), ("ebs-csi-node", "127.0.0.33")] {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": label, "namespace": "kube-system", "uid": label, "labels": {"app": label}},
            "spec": {"nodeName": "node1", "containers": [{"name": "c"}]}, "status": {"phase": "Running", "podIP": address},
        }))
        .unwrap();
        state.pods.insert(pod.full_name(), Arc::new(pod));
    }
    serve_at("127.0.0.94:9400", Some(test_acceptor()), gpus).await;
    serve_at("127.0.0.33:3302", None, volumes).await;
    let cluster = ClusterHandle::fixed(state);
    let empty = tempfile::tempdir().unwrap();
    let asked = Some(ExporterSettings { gpus: true, volumes: true });
    let bed = Bed::start_with(&cluster, empty.path(), Extras { exporters: asked, ..Extras::default() }, Preset::Enhanced);
    let of_type = |name: &str| bed.documents("performance").into_iter().filter(|document| document["Type"] == name).collect::<Vec<_>>();
    wait_for("a GPU and a volume", SOON, || async {
        ensure!(!of_type("NodeGPU").is_empty() && !of_type("NodeEBS").is_empty(), "not yet");
        Ok(())
    })
    .await
    .unwrap();
    let gpu = of_type("NodeGPU").into_iter().find(|gpu| gpu["GpuDevice"] == "nvidia0").expect("it is told");
    assert_eq!((&gpu["node_gpu_utilization"], &gpu["node_gpu_memory_used"]), (&json!(87), &json!(12_582_912_000_u64)));
    assert_eq!(of_type("NodeEBS")[0]["node_diskio_ebs_total_write_ops"], 0);
    assert!(of_type("PodGPU").is_empty(), "the pod that has it is not known here");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statsd_packets_become_documents() {
    let cluster = ClusterHandle::fixed(ClusterState::default());
    // A port that was free a moment ago.
    let address = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let bed = Bed::start(&cluster, empty.path(), Extras { statsd: Some(address), ..Extras::default() });
    let sender = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let told = wait_for("a statsd document", SOON, || async {
        // Refused until the listener is there.
        let _refused = sender.send_to(b"orders:3|c|#shop:a\nqueue:7|g", address).await;
        let found = |name: &str| bed.documents("statsd").into_iter().find(|document| !document[name].is_null());
        found("orders").zip(found("queue")).ok_or_else(|| anyhow::anyhow!("none yet"))
    })
    .await
    .unwrap();
    assert_eq!((told.0["orders"].as_u64().unwrap() % 3, &told.0["shop"], &told.0["metric_type"]), (0, &json!("a"), &json!("counter")));
    assert_eq!((&told.1["queue"], &told.1["CloudWatchMetrics"][0]["Namespace"]), (&json!(7), &json!("CWAgent")));
    bed.stop().await;
}
