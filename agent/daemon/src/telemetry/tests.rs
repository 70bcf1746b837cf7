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
    spec: Option<LogGroupSpec>,
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

    async fn create_group(&self, _group: &str, spec: &LogGroupSpec) -> Result<(), SinkError> {
        self.state.lock().unwrap().spec = Some(spec.clone());
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
    let group_spec = LogGroupSpec { retention_days: Some(7), tags: [("team".into(), "a".into())].into(), ..Default::default() };
    let settings = TelemetrySettings { interval: Duration::from_millis(200), group_spec: group_spec.clone(), ..Default::default() };
    let (handle, task) = spawn(TelemetryParts {
        sink: Arc::clone(&sink),
        cluster,
        roots: Roots::default(),
        identity: identity(),
        settings,
        netpol: None,
        logs: None,
        extras: Extras::default(),
        shutdown: shutdown.clone(),
    });
    timeout(LIMIT, sink.taken.notified()).await.expect("documents arrive");
    shutdown.cancel();
    timeout(LIMIT, task).await.expect("ends").expect("without panic");
    let state = sink.state.lock().unwrap();
    assert_eq!(state.stream, Some(("/aws/containerinsights/demo/performance".into(), "node1".into())));
    assert_eq!(state.spec, Some(group_spec), "it is kept as long as container logs");
    let node: serde_json::Value = serde_json::from_str(&state.messages[0]).unwrap();
    assert_eq!((&node["Type"], &node["ClusterName"], &node["NodeName"]), (&"Node".into(), &"demo".into(), &"node1".into()));
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(node["node_cpu_limit"].as_f64().unwrap() >= (cores * 1000) as f64);
    let used = node["node_cpu_usage_total"].as_f64().unwrap();
    assert!(used >= 0.0 && used <= node["node_cpu_limit"].as_f64().unwrap(), "{used}");
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
        cgroups.read(std::time::Instant::now(), &|_| true, &mut file, &mut out);
        let found: Vec<_> = out.iter().map(|reading| (reading.id.pod_uid.as_str(), reading.id.container.as_deref())).collect();
        assert_eq!(found, [(UID, None), (UID, Some(ID))], "{container}");
        assert_eq!(out.iter().map(|reading| reading.cpu.unwrap().usage_ns).collect::<Vec<_>>(), [2_000_000, 1_000_000]);
        assert!(out.iter().all(|reading| reading.memory.unwrap().working_set() == 4000));
    }
}

/// An EFA device beside another RDMA device, which has counters of other names.
#[test]
fn efa_counters_are_read_from_every_port() {
    let sys = tempfile::tempdir().unwrap();
    let class = sys.path().join("class/infiniband");
    let counters = |device: &str, port: &str| class.join(device).join("ports").join(port).join("hw_counters");
    write(&counters("mlx5_0", "1"), "rx_read_requests", "7\n");
    let settings = TelemetrySettings {
        selection: Selection { preset: stanchion_core::metrics::catalog::Preset::Enhanced, ..Selection::default() },
        ..TelemetrySettings::default()
    };
    let roots = Roots { sys: sys.path().to_owned(), ..Roots::default() };
    let (_keep, cluster) = watch::channel(Arc::new(ClusterState::default()));
    let mut collector = Collector::new(roots, cluster, identity(), &settings);
    let mut told = Vec::new();
    for pass in [1u64, 2] {
        for port in ["1", "2"] {
            for name in ["rx_bytes", "tx_bytes", "rx_drops"] {
                write(&counters("rdmap0s6", port), name, &format!("{}\n", pass * 1_000_000));
            }
        }
        told = collector.collect().expect("/proc is readable").1;
    }
    let documents: Vec<serde_json::Value> = told.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    let efa: Vec<_> = documents.iter().filter(|document| document["Type"] == "NodeEFA").collect();
    let [efa] = efa[..] else { panic!("one device: {efa:?}") };
    assert_eq!(efa["EfaDevice"], "rdmap0s6");
    let rate = |name: &str| efa[name].as_f64().unwrap_or_else(|| panic!("{name} in {efa}"));
    assert!(rate("node_efa_rx_bytes") > 0.0 && rate("node_efa_rx_bytes") == rate("node_efa_rx_dropped"));
    assert!(efa["node_efa_rdma_read_bytes"].is_null(), "a file that is not there is no figure");
}

fn write_memory(dir: &Path, usage_usec: u64, anon: u64, current: u64) {
    write(dir, "cpu.stat", &format!("usage_usec {usage_usec}\nuser_usec 1\nsystem_usec 2\n"));
    write(dir, "memory.stat", &format!("anon {anon}\nfile 0\nfile_mapped 0\ninactive_file 0\npgfault 7\npgmajfault 0\n"));
    write(dir, "memory.current", &format!("{current}\n"));
}

/// memory.stat is read only where it may say something new, and what it would have said is told all the same.
#[test]
fn memory_of_pods_and_sleepers_is_known_without_reading_it_all() {
    let dir = tempfile::tempdir().unwrap();
    let pod = dir.path().join(format!("kubepods/pod{UID}"));
    let (container, sandbox) = (pod.join(ID), pod.join("f".repeat(64)));
    write(dir.path(), "cgroup.controllers", "cpu memory");
    write_memory(&sandbox, 5, 500, 600);
    write_memory(&container, 1000, 3000, 5000);
    write_memory(&pod, 2000, 3500, 9000);
    let mut cgroups = cgroups::Cgroups::new(dir.path());
    let (mut file, mut out) = (cgroups::KernelFile::default(), Vec::new());
    let mut look = || {
        let wanted = |id: &stanchion_core::metrics::track::CgroupId| id.container.as_deref().is_none_or(|container| container == ID);
        cgroups.read(std::time::Instant::now(), &wanted, &mut file, &mut out);
        let told: Vec<_> = out.iter().map(|reading| reading.memory.expect("it has memory")).collect();
        (told[0].rss, told[0].usage, told[1].rss)
    };
    assert_eq!(look(), (3500, 9000, 3000));
    // Nobody is believed to sleep for ever.
    write_memory(&pod, 2000, 3501, 9000);
    (1..=5).find(|_| look().0 == 3501).expect("it is read in one of five passes");
    write_memory(&pod, 2000, 3500, 9000);
    assert_eq!(look().0, 3501, "asleep: what it said is taken as it was");
    // The container works and grows by 1000; the pod's own file is not asked, or it would say 1.
    write_memory(&container, 1100, 4000, 6000);
    write_memory(&pod, 2100, 1, 10_000);
    assert_eq!(look(), (4501, 10_000, 4000));
    // Something else in the pod grew: only the file knows what.
    write_memory(&pod, 2200, 4700, 10_700);
    write_memory(&container, 1200, 4000, 6000);
    assert_eq!(look(), (4700, 10_700, 4000));
}

/// A text as a scraper reads it: headings before samples, each family once and known, labels as declared, numbers readable.
fn check_exposition(text: &str, format: Format) -> BTreeSet<String> {
    let known: HashMap<&str, &Family> =
        families::AWS_NODE.iter().chain(families::OWN).chain(families::NODE).map(|family| (family.name, *family)).collect();
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
            pod: PodName::new("default", format!("p-{index}")),
            policies: Vec::new(),
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
    let flow_log = Some(crate::netpol::flow_log::FlowLogCounters { lines_sent: 7, lines_dropped: 2, records_lost: 1 });
    let sources = Sources { ipam: Some(&ipam), netpol: Some(&netpol), flow_log, logs: Some(&logs), version: "0.1.0", ..Default::default() };
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
        assert!(text.contains("stanchion_flow_log_lines_sent_total 7\n") && text.contains("stanchion_flow_log_lines_dropped_total 2\n"));
    }
}

/// Writes a tree from `testdata/trees`: a note, then `=== path` and the file's text for each file.
fn plant(tree: &str, root: &Path) {
    for part in tree.split("\n=== ").skip(1) {
        let (path, text) = part.split_once('\n').unwrap_or((part, ""));
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        // The split took the newline before the next heading.
        std::fs::write(path, if text.is_empty() || text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") }).unwrap();
    }
}

/// A cluster with the one pod that the trees have.
fn pod_of_the_trees(runtime: &str) -> ClusterState {
    let pod: stanchion_core::objects::Pod = serde_json::from_value(serde_json::json!({
        "metadata": { "name": "web", "namespace": "default", "uid": UID },
        "spec": { "nodeName": "node1", "containers": [{ "name": "c" }] },
        "status": { "phase": "Running", "containerStatuses": [
            { "name": "c", "containerID": format!("{runtime}://{ID}"), "restartCount": 0, "state": { "running": {} } }] },
    }))
    .unwrap();
    let mut state = ClusterState { synced: true, ..ClusterState::default() };
    state.pods.insert(pod.full_name(), Arc::new(pod));
    state
}

/// Multiplies the counters of processor time in a file by three.
fn run_on(path: &Path) {
    let Ok(text) = std::fs::read_to_string(path) else { return };
    let words: Vec<String> = text
        .split_inclusive([' ', '\n'])
        .map(|word| match word.trim().parse::<u64>() {
            Ok(number) => word.replace(word.trim(), &(number * 3).to_string()),
            Err(_) => word.to_owned(),
        })
        .collect();
    std::fs::write(path, words.concat()).unwrap();
}

/// Whatever the kernel's layout, the driver and the runtime: one pod with one container, the same figures, the sandbox not among them.
#[test]
fn recorded_trees_of_every_layout_give_the_same_pod() {
    let trees = [
        (include_str!("../../testdata/trees/v1-cgroupfs-containerd.txt"), "containerd", true),
        (include_str!("../../testdata/trees/hybrid-systemd-docker.txt"), "docker", true),
        (include_str!("../../testdata/trees/v2-systemd-containerd.txt"), "containerd", true),
        (include_str!("../../testdata/trees/v2-systemd-crio.txt"), "cri-o", false),
        (include_str!("../../testdata/trees/v2-nested-containerd.txt"), "containerd", true),
        (include_str!("../../testdata/trees/v2-cgroupfs-containerd.txt"), "containerd", true),
    ];
    for (tree, runtime, has_peak) in trees {
        let name = tree.lines().next().unwrap();
        let dir = tempfile::tempdir().unwrap();
        plant(tree, dir.path());
        let (_keep, cluster) = watch::channel(Arc::new(pod_of_the_trees(runtime)));
        let roots = Roots { proc: dir.path().join("proc"), cgroup: dir.path().join("cgroup"), sys: dir.path().join("sys") };
        let mut collector = Collector::new(roots, cluster, identity(), &TelemetrySettings::default());
        let (first, _) = collector.collect().unwrap();
        assert!(first.pods[0].cpu.is_none(), "{name}: nothing to count from");
        let mut directories = vec![dir.path().join("cgroup")];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).unwrap().flatten() {
                if entry.path().is_dir() {
                    directories.push(entry.path());
                }
            }
            for file in ["cpu.stat", "cpuacct.usage", "cpuacct.stat"] {
                run_on(&directory.join(file));
            }
        }
        let (snapshot, documents) = collector.collect().unwrap();
        assert_eq!((snapshot.pods.len(), snapshot.unknown_pods), (1, 0), "{name}");
        let pod = &snapshot.pods[0];
        let [container] = &pod.containers[..] else { panic!("{name}: {:?}", pod.containers) };
        let (of_pod, of_container) = (pod.memory.unwrap(), container.memory.unwrap());
        assert_eq!((of_pod.usage, of_container.usage), (26_066_944, 25_804_800), "{name}");
        assert_eq!((of_container.rss, of_container.working_set), (25_280_512, 25_804_800 - 90_112), "{name}");
        assert_eq!(of_pod.max_usage > 0, has_peak, "{name}");
        assert!(of_container.faults.is_some_and(|faults| faults.minor == 0.0), "{name}");
        let (of_pod, of_container) = (pod.cpu.unwrap(), container.cpu.unwrap());
        assert!(of_container.total > 0.0 && of_container.user > 0.0, "{name}: {of_container:?}");
        assert!((of_pod.total / of_container.total - 1.0).abs() < 0.5, "{name}: {of_pod:?} {of_container:?}");
        assert_eq!((snapshot.node.cpu_limit, snapshot.node.memory_limit), (2000.0, 24_684_084 * 1024), "{name}");
        let types: BTreeSet<String> = documents
            .iter()
            .map(|text| serde_json::from_str::<serde_json::Value>(text).unwrap()["Type"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(types, ["Container", "Node", "NodeDiskIO", "NodeNet", "Pod"].map(str::to_owned).into(), "{name}");
    }
}

/// The recorded node and its pod under node_exporter's and cAdvisor's names.
#[test]
fn a_recorded_node_under_the_usual_names() {
    use stanchion_core::metrics::exposition::Exposition;
    let dir = tempfile::tempdir().unwrap();
    plant(include_str!("../../testdata/trees/v2-systemd-containerd.txt"), dir.path());
    let veth = stanchion_core::network::names::host_veth_name("eni", &PodName::new("default", "web"), 0);
    let net_dev = dir.path().join("proc/1/net/dev");
    let with_pod = std::fs::read_to_string(&net_dev).unwrap() + &format!("{veth}: 70 7 0 2 0 0 0 0 30 3 0 0 0 0 0 0\n");
    std::fs::write(&net_dev, with_pod).unwrap();
    let (_keep, cluster) = watch::channel(Arc::new(pod_of_the_trees("containerd")));
    let roots = Roots { proc: dir.path().join("proc"), cgroup: dir.path().join("cgroup"), sys: dir.path().join("sys") };
    let mut collector = Collector::new(roots, cluster, identity(), &TelemetrySettings::default());
    collector.collect().unwrap();
    let (snapshot, _) = collector.collect().unwrap();
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let mut out = Exposition::new(format);
        prometheus::node::node_and_containers(&mut out, &snapshot);
        let text = out.finish();
        check_exposition(&text, format);
        for line in [
            "node_boot_time_seconds 1795232750",
            "node_memory_MemTotal_bytes 25276502016",
            "node_network_receive_bytes_total{device=\"eth0\"} 1037338115",
            "container_cpu_usage_seconds_total{namespace=\"default\",pod=\"web\",container=\"c\"} 0.050376",
            "container_memory_working_set_bytes{namespace=\"default\",pod=\"web\",container=\"c\"} 25714688",
            // What the host end sent is what the pod received.
            "container_network_receive_bytes_total{namespace=\"default\",pod=\"web\",interface=\"eth0\"} 30",
            "container_network_transmit_packets_dropped_total{namespace=\"default\",pod=\"web\",interface=\"eth0\"} 2",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} in {text}");
        }
        assert!(
            text.contains("node_cpu_seconds_total{mode=\"steal\"} 63.02\n")
                && text.contains("node_disk_written_bytes_total{device=\"vda\"}")
        );
    }
}
