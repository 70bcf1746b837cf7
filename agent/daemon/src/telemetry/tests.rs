//! The tasks over the real kernel and over trees made by the test.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use stanchion_core::cloud::{LogGroupSpec, Rejected, SinkError};
use stanchion_core::logs::batch::LogBatch;
use stanchion_core::metrics::exposition::{Family, Format, Kind};
use stanchion_core::metrics::families;
use tokio::time::timeout;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// A service in memory whose groups must be made first, and that refuses as often as it is told.
#[derive(Debug, Default)]
struct MemorySink {
    state: Mutex<SinkState>,
    taken: tokio::sync::Notify,
}

#[derive(Debug, Default)]
struct SinkState {
    stream: Option<(String, String)>,
    outages: usize,
    messages: Vec<String>,
}

impl LogSink for MemorySink {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        assert!(batch.is_emf());
        let mut state = self.state.lock().unwrap();
        if state.outages > 0 {
            state.outages -= 1;
            return Err(SinkError::Unavailable("connection refused".into()));
        }
        if state.stream.as_ref().is_none_or(|(group, stream)| group != batch.group() || stream != batch.stream()) {
            return Err(SinkError::NotFound("the specified log stream does not exist".into()));
        }
        state.messages.extend(batch.events().map(|event| event.message));
        self.taken.notify_one();
        Ok(Rejected::default())
    }

    async fn create_group(&self, _group: &str, _spec: &LogGroupSpec) -> Result<(), SinkError> {
        Err(SinkError::Unauthorized("made by Terraform, no permission".into()))
    }

    async fn create_stream(&self, group: &str, stream: &str) -> Result<(), SinkError> {
        self.state.lock().unwrap().stream = Some((group.to_owned(), stream.to_owned()));
        Ok(())
    }
}

fn identity() -> NodeIdentity {
    NodeIdentity { cluster: "demo".into(), node: "node1".into(), ..Default::default() }
}

#[tokio::test]
async fn documents_of_the_real_kernel_arrive_after_an_outage() {
    let sink = Arc::new(MemorySink::default());
    sink.state.lock().unwrap().outages = 2;
    let (_keep, cluster) = watch::channel(Arc::new(ClusterState::default()));
    let shutdown = CancellationToken::new();
    let settings = TelemetrySettings { interval: Duration::from_millis(200), ..Default::default() };
    let (handle, task) = spawn(TelemetryParts {
        sink: Arc::clone(&sink),
        cluster,
        roots: Roots::default(),
        identity: identity(),
        settings,
        netpol: None,
        shutdown: shutdown.clone(),
    });
    timeout(LIMIT, sink.taken.notified()).await.expect("documents arrive");
    shutdown.cancel();
    timeout(LIMIT, task).await.expect("ends").expect("without panic");
    let state = sink.state.lock().unwrap();
    assert_eq!(state.stream, Some(("/aws/containerinsights/demo/performance".into(), "node1".into())));
    let node: serde_json::Value = serde_json::from_str(&state.messages[0]).unwrap();
    assert_eq!((&node["Type"], &node["ClusterName"], &node["NodeName"]), (&"Node".into(), &"demo".into(), &"node1".into()));
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(node["node_cpu_limit"].as_f64().unwrap() >= (cores * 1000) as f64);
    let used = node["node_cpu_usage_total"].as_f64().unwrap();
    assert!(used >= 0.0 && used <= node["node_cpu_limit"].as_f64().unwrap() * 1.2, "{used}");
    assert!(node["node_memory_working_set"].as_f64().unwrap() < node["node_memory_limit"].as_f64().unwrap());
    assert!(state.messages.iter().any(|message| message.contains("\"Type\":\"NodeFS\"")));
    assert_eq!(handle.shipped().dropped.load(Ordering::Relaxed), 0);
    assert!(handle.snapshot().node.memory_limit > 0);
}

const UID: &str = "b0839fa0-6ab0-4be2-85bf-944547b6ef59";
const ID: &str = "46d42a41bef56d47fa2e9311c2fd4dc89cbc5868b40ce7888e3dd25024c9727f";

fn write(path: &Path, name: &str, text: &str) {
    std::fs::create_dir_all(path).unwrap();
    std::fs::write(path.join(name), text).unwrap();
}

fn write_v2(dir: &Path, usage_usec: u64) {
    write(dir, "cpu.stat", &format!("usage_usec {usage_usec}\nuser_usec 1\nsystem_usec 2\n"));
    write(dir, "memory.stat", "anon 4096\nfile 8192\nfile_mapped 0\ninactive_file 1000\npgfault 1\npgmajfault 0\n");
    write(dir, "memory.current", "5000\n");
}

fn write_v1(root: &Path, relative: &str, usage_ns: u64) {
    let cpu = root.join("cpu,cpuacct").join(relative);
    write(&cpu, "cpuacct.usage", &format!("{usage_ns}\n"));
    write(&cpu, "cpuacct.stat", "user 1\nsystem 2\n");
    let memory = root.join("memory").join(relative);
    write(&memory, "memory.stat", "total_rss 4096\ntotal_cache 8192\ntotal_inactive_file 1000\npgfault 1\npgmajfault 0\n");
    write(&memory, "memory.usage_in_bytes", "5000\n");
}

/// Each layout must give the same pod and container.
#[test]
fn layouts_of_cgroups() {
    let dashed = UID.replace('-', "_");
    let v2 = [
        (format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{dashed}.slice"), format!("cri-containerd-{ID}.scope")),
        (format!("kubepods.slice/kubepods-pod{dashed}.slice"), format!("crio-{ID}.scope")),
        (format!("kubepods/besteffort/pod{UID}"), ID.to_owned()),
        (
            format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{dashed}.slice"),
            format!("cri-containerd-{ID}.scope"),
        ),
    ];
    for (pod, container) in v2 {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join(pod);
        write(dir.path(), "cgroup.controllers", "cpu memory");
        write_v2(&dir.path().join("system.slice/sshd.service"), 7);
        write_v2(&pod, 2000);
        write_v2(&pod.join(&container), 1000);
        // A container's own cgroups are of no interest.
        write_v2(&pod.join(&container).join("init.scope"), 1);
        check_layout(dir.path(), &container);
    }
    for (pod, container) in [
        (format!("kubepods/pod{UID}"), ID.to_owned()),
        (format!("kubepods.slice/kubepods-pod{dashed}.slice"), format!("docker-{ID}.scope")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_v1(dir.path(), &pod, 2_000_000);
        write_v1(dir.path(), &format!("{pod}/{container}"), 1_000_000);
        // Hybrid: the v2 tree exists, without the controllers.
        std::fs::create_dir_all(dir.path().join("unified")).unwrap();
        check_layout(dir.path(), &container);
    }
}

fn check_layout(root: &Path, container: &str) {
    let mut cgroups = cgroups::Cgroups::new(root);
    let (mut file, mut out) = (cgroups::KernelFile::default(), Vec::new());
    for _twice in 0..2 {
        cgroups.read(std::time::Instant::now(), &mut file, &mut out);
        let found: Vec<_> = out.iter().map(|reading| (reading.id.pod_uid.as_str(), reading.id.container.as_deref())).collect();
        assert_eq!(found, [(UID, None), (UID, Some(ID))], "{container}");
        assert_eq!(out.iter().map(|reading| reading.cpu.unwrap().usage_ns).collect::<Vec<_>>(), [2_000_000, 1_000_000]);
        assert!(out.iter().all(|reading| reading.memory.unwrap().working_set() == 4000));
    }
}

/// A text as a scraper reads it: headings before samples, each family once and known, labels as declared, numbers readable.
fn check_exposition(text: &str, format: Format) -> BTreeSet<String> {
    let known: HashMap<&str, &Family> = families::AWS_NODE.iter().chain(families::OWN).map(|family| (family.name, *family)).collect();
    let (mut seen, mut current) = (BTreeSet::new(), String::new());
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            assert!(format == Format::OpenMetrics && lines.peek().is_none());
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            current = rest.split(' ').next().unwrap().to_owned();
            assert!(seen.insert(current.clone()), "{current} is told twice");
            let kind = lines.next().unwrap();
            assert!(kind.starts_with(&format!("# TYPE {current} ")), "{kind}");
            let full = if known.contains_key(current.as_str()) { current.clone() } else { format!("{current}_total") };
            let wanted = known.get(full.as_str()).unwrap_or_else(|| panic!("{current} is in no table"));
            let unknown = format == Format::OpenMetrics && wanted.kind == Kind::Counter && !wanted.name.ends_with("_total");
            assert!(kind.ends_with(if unknown { "unknown" } else { wanted.kind.name() }), "{kind}");
            current = full;
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            let name = series.split('{').next().unwrap();
            assert!(
                name.strip_prefix(current.as_str()).is_some_and(|suffix| ["", "_sum", "_count", "_bucket"].contains(&suffix)),
                "{line}"
            );
            for label in known[current.as_str()].labels {
                assert!(series.contains(&format!("{label}=\"")), "{line}");
            }
        }
    }
    seen
}

#[test]
fn a_scrape_of_a_busy_node_is_valid_and_bounded() {
    let mut ipam = crate::ipamd::IpamSnapshot { max_enis: 3, max_addresses: 27, ..Default::default() };
    ipam.pools.push(crate::ipamd::PoolView { total: 18, assigned: 4, ..Default::default() });
    ipam.counters.startup_seconds = Some(1.5);
    ipam.counters.add_requests = 7;
    ipam.counters.del_requests.insert("PodDeleted".into(), 3);
    ipam.counters.errors.insert("assignPodIPv4AddressUnsafe", 1);
    for (error, count) in [(None, 2), (Some("Throttled".to_owned()), 1), (Some("Other \"x\"".to_owned()), 1)] {
        ipam.counters.ec2_calls.push(crate::ipamd::Ec2CallStats { api: "CreateNetworkInterface", error, count, total_ms: 50.0 });
    }
    let mut netpol = crate::netpol::NetpolSnapshot { ready: true, ..Default::default() };
    for index in 0..300 {
        let endpoint = crate::netpol::EndpointView {
            slot: index,
            pod: stanchion_core::ids::PodName::new("default", format!("p-{index}")),
            pod_uid: String::new(),
            container_id: "c".into(),
            interfaces: Vec::new(),
            ingress_isolated: true,
            egress_isolated: false,
            audit: false,
            revision: 1,
            flows: 0,
            counters: EndpointCounters::default(),
        };
        netpol.endpoints.push(endpoint);
    }
    let logs = crate::logs::LogsSnapshot::default();
    let sources = Sources { ipam: Some(&ipam), netpol: Some(&netpol), logs: Some(&logs), version: "0.1.0", ..Default::default() };
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let text = render(&sources, format);
        let seen = check_exposition(&text, format);
        for name in [
            "awscni_eni_max",
            "awscni_total_ip_addresses",
            "awscni_add_ip_req_count",
            "awscni_ec2api_error_count",
            "process_resident_memory_bytes",
        ] {
            assert!(seen.contains(name), "{name}");
        }
        assert!(text.contains(
            "awscni_ipamd_startup_duration_seconds_bucket{success=\"true\",with_api_server=\"true\",failure_reason=\"\",le=\"2.5\"} 1\n"
        ));
        assert!(text.contains("awscni_aws_api_latency_ms_count{api=\"CreateNetworkInterface\",error=\"true\",status=\"400\"} 2\n"));
        assert!(text.contains("awscni_aws_api_error_count{api=\"CreateNetworkInterface\",error=\"Other \\\"x\\\"\"} 1\n"));
        // 300 policed pods have 1,200 series a family: 1,000 are told, the rest is counted.
        assert!(text.contains("stanchion_metrics_capped_samples 400\n"));
    }
}
