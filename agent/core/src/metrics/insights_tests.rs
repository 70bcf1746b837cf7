//! Every document that comes out is held against the catalog, and some figures against arithmetic done by hand.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::catalog::{DocType, Field, NAMESPACE, Preset, Unit, field_name, fields_of};
use super::cgroup::{CpuCounters, MemoryCounters};
use super::devices::{Driver, EfaReading, ExporterReadings};
use super::insights::{Encoder, NodeIdentity, Selection};
use super::model::{FilesystemSample, FilesystemSize, Snapshot};
use super::pods::PodTable;
use super::proc::{CpuTicks, MemInfo, Stat};
use super::track::{CgroupId, CgroupReading, ContainerFiles, Figures, Readings, Tracker};
use crate::branch::VethNames;
use crate::cluster::ClusterState;
use crate::network::names::host_veth_name;
use crate::objects::{Node, Pod, Service};

const MIB: u64 = 1 << 20;

pub(super) fn cluster() -> ClusterState {
    #[derive(serde::Deserialize)]
    struct List {
        items: Vec<Pod>,
    }
    let list: List = serde_json::from_str(include_str!("../../testdata/kubelet/pods.json")).unwrap();
    let mut state = ClusterState::default();
    for pod in list.items {
        state.pods.insert(pod.full_name(), Arc::new(pod));
    }
    let mut service = Service::default();
    service.metadata.name = "web-svc".into();
    service.metadata.namespace = "default".into();
    service.spec.selector.insert("app".into(), "web".into());
    state.services.insert(crate::ids::PodName::new("default", "web-svc"), Arc::new(service));
    let node: Node = serde_json::from_value(serde_json::json!({
        "metadata": { "name": "node1" },
        "status": { "capacity": { "pods": "110" }, "allocatable": { "pods": "109" }, "conditions": [{ "type": "Ready", "status": "True" }] }
    }))
    .unwrap();
    state.nodes.insert("node1".into(), Arc::new(node));
    state
}

fn identity() -> NodeIdentity {
    NodeIdentity {
        cluster: "demo \"quoted\"".into(),
        node: "node1".into(),
        instance_id: "i-0123456789abcdef0".into(),
        instance_type: "m5.large".into(),
        availability_zone: "eu-west-1a".into(),
        auto_scaling_group: Some("workers".into()),
    }
}

/// Two passes over a machine of two cores and 1,000 MiB, `seconds` apart, everything having counted `seconds` units of its rate.
pub(super) struct Machine {
    tracker: Tracker,
    table: PodTable,
}

impl Machine {
    pub(super) fn new(figures: Figures) -> Self {
        Self { tracker: Tracker::new(figures), table: PodTable::default().refreshed(&cluster(), "node1", &VethNames::default()) }
    }

    pub(super) fn pass(&mut self, second: u64) -> Snapshot {
        self.pass_after_reset(second, second)
    }

    /// At `at` everything counted for `second` seconds.
    fn pass_after_reset(&mut self, at: u64, second: u64) -> Snapshot {
        let ticks = CpuTicks { user: second * 40, system: second * 10, idle: second * 140, steal: second * 10, ..Default::default() };
        self.pass_with(Duration::from_secs(at), second, ticks)
    }

    /// With processor time of its own.
    fn pass_with(&mut self, at: Duration, second: u64, ticks: CpuTicks) -> Snapshot {
        let web = self.table.pods().find(|pod| pod.name.ends_with("8zpz5")).unwrap();
        let veth = host_veth_name("eni", &crate::ids::PodName::new("default", web.name.clone()), 0);
        let net_dev = format!(
            "eth0: {} {second} 0 {second} 0 0 0 0 {} {second} 0 0 0 0 0 0\n{veth}: {} 1 0 0 0 0 0 0 {} 1 0 0 0 0 0 0\nlo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n",
            second * 1000,
            second * 500,
            second * 70,
            second * 30,
        );
        let diskstats = format!(
            " 259 0 nvme0n1 {second} 0 {} 0 {second} 0 {} 0 0 0 0\n 259 1 nvme0n1p1 9 0 9 0 9 0 9 0 0 0 0\n 259 2 nvme1n1 {} 0 0 0 1 0 0 0 0 0 0\n",
            second * 2,
            second * 4,
            second * 7
        );
        let cgroup = |uid: &str, container: Option<&str>, cores: u64| CgroupReading {
            id: Arc::new(CgroupId { pod_uid: uid.into(), container: container.map(str::to_owned) }),
            at,
            cpu: Some(CpuCounters { usage_ns: second * cores * 100_000_000, user_ns: second * 60_000_000, system_ns: second * 40_000_000 }),
            memory: Some(MemoryCounters {
                usage: 32 * MIB,
                inactive_file: 16 * MIB,
                pgfault: second * 3,
                hierarchical_pgfault: second * 5,
                ..Default::default()
            }),
        };
        let mut cgroups = vec![cgroup("not-known", None, 1)];
        for pod in self.table.pods() {
            cgroups.push(cgroup(&pod.uid, None, 1));
            cgroups.extend(pod.containers.iter().map(|container| cgroup(&pod.uid, Some(&container.id), 1)));
            cgroups.push(cgroup(&pod.uid, Some("the sandbox"), 1));
        }
        let size = FilesystemSize { capacity: 100, available: 55, usage: 40, inodes: 10, inodes_free: 9 };
        let files = ContainerFiles::from([(web.uid.clone(), vec![("c".to_owned(), size)])]);
        let mut exported = ExporterReadings { round: second, ..ExporterReadings::default() };
        let dcgm = include_str!("../../testdata/exporters/dcgm.txt").replace("trainer", "c");
        exported.add(Driver::Gpu, &dcgm.replace("namespace=\"ml\"", "namespace=\"default\"").replace("train-7d4b", &web.name));
        exported.add(Driver::Ebs, include_str!("../../testdata/exporters/ebs-csi-node.txt"));
        let efa = EfaReading { device: "rdmap0s6".into(), counters: [1, 2, 3, 4, 5, 6].map(|each| Some(each * second)) };
        let readings = Readings {
            at,
            wall_ms: 1_795_232_118_300 + i64::try_from(second).unwrap() * 1000,
            stat: Stat { cpu: ticks, online: 2, boot_time: 1_795_000_000, ..Default::default() },
            meminfo: MemInfo { total: 1000 * MIB, free: 600 * MIB, inactive_file: 100 * MIB, ..Default::default() },
            root_memory: None,
            load: [0.5, 0.4, 0.3],
            net_dev: &net_dev,
            physical_interfaces: &BTreeSet::from(["eth0".to_owned()]),
            diskstats: &diskstats,
            disks: &HashMap::from([("nvme0n1".to_owned(), Some("vol-0a".to_owned())), ("nvme1n1".to_owned(), None)]),
            filesystems: vec![FilesystemSample { device: "/dev/nvme0n1p1".into(), volume: Some("vol-0a".into()), size }],
            allowances: Vec::new(),
            efa: vec![efa],
            exported: &exported,
            cgroups: &cgroups,
            container_files: &files,
            pod_counters: &HashMap::new(),
        };
        self.tracker.observe(&readings, &self.table)
    }
}

#[test]
fn devices_by_hand() {
    let documents = documents(Selection { preset: Preset::Enhanced, ..Selection::default() });
    let [efa] = of_type(&documents, DocType::NodeEFA)[..] else { panic!("one device") };
    assert_eq!(
        (&efa["node_efa_rx_bytes"], &efa["node_efa_rdma_write_recv_bytes"], &efa["EfaDevice"]),
        (&1.into(), &6.into(), &"rdmap0s6".into())
    );
    let volumes = of_type(&documents, DocType::NodeEBS);
    let volume = volumes.iter().find(|volume| volume["VolumeId"] == "vol-0281cf921f3dbb69b").expect("it is told");
    assert_eq!((&volume["node_diskio_ebs_total_read_ops"], &volume["node_diskio_ebs_volume_queue_length"]), (&0.into(), &2.into()));
    let gpus = [DocType::NodeGPU, DocType::PodGPU, DocType::ContainerGPU].map(|doc| of_type(&documents, doc));
    assert_eq!(gpus.each_ref().map(Vec::len), [2, 1, 1], "one GPU is nobody's");
    assert_eq!((&gpus[1][0]["pod_gpu_utilization"], &gpus[1][0]["GpuDevice"]), (&87.into(), &"nvidia0".into()));
    assert_eq!((&gpus[2][0]["container_gpu_memory_utilization"], &gpus[2][0]["ContainerName"]), (&80.into(), &"c".into()));
    let sets = gpus[0][0]["CloudWatchMetrics"][0]["Dimensions"].as_array().unwrap();
    assert!(sets.iter().any(|set| set.as_array().unwrap().iter().any(|tag| tag == "GpuDevice")), "{sets:?}");
}

fn documents(selection: Selection) -> Vec<Value> {
    let mut machine = Machine::new(Figures::Correct);
    machine.pass(100);
    let snapshot = machine.pass(160);
    let mut encoder = Encoder::new(identity(), selection);
    encoder.documents(&snapshot).iter().map(|text| serde_json::from_str(text).expect("a document is JSON")).collect()
}

fn of_type(documents: &[Value], doc: DocType) -> Vec<&Value> {
    documents.iter().filter(|document| document["Type"] == doc.name()).collect()
}

/// The rules of version 0 and of the catalog, for one document.
fn check(document: &Value, preset: Preset) {
    let members = document.as_object().unwrap();
    assert_eq!(document["Version"], "0");
    document["Timestamp"].as_str().and_then(|ms| ms.parse::<i64>().ok()).expect("a text of milliseconds");
    assert!(!members.contains_key("_aws"), "that is version 1");
    let doc = DocType::ALL.into_iter().find(|doc| document["Type"] == doc.name()).expect("a known type");
    assert_eq!(document["Sources"], serde_json::from_str::<Value>(doc.sources()).unwrap());
    assert_eq!(document["kubernetes"]["host"], "node1");
    let known: BTreeMap<String, Field> = fields_of(doc)
        .iter()
        .map(|field| {
            let (prefix, name) = field_name(doc, field);
            (format!("{prefix}{name}"), field)
        })
        .collect();
    for (name, value) in members {
        assert_eq!(value.is_number(), known.contains_key(name), "{}: {name} = {value}", doc.name());
    }
    let mut told = BTreeSet::new();
    for directive in document["CloudWatchMetrics"].as_array().into_iter().flatten() {
        assert_eq!(directive["Namespace"], NAMESPACE);
        for set in directive["Dimensions"].as_array().unwrap() {
            for tag in set.as_array().unwrap() {
                let value = members[tag.as_str().unwrap()].as_str().expect("a dimension's value is a text");
                assert!((1..=1024).contains(&value.len()));
            }
        }
        let metrics = directive["Metrics"].as_array().unwrap();
        assert!((1..=100).contains(&metrics.len()));
        for metric in metrics {
            let name = metric["Name"].as_str().unwrap();
            let field = known[name];
            assert!(members[name].is_number(), "{name} is told but not there");
            assert_eq!(metric.get("Unit").and_then(Value::as_str), field.unit().directive(), "{name}");
            assert_eq!(field.unit() == Unit::Millicores, metric.get("Unit").is_none());
            told.insert(field);
        }
    }
    let wanted = preset.directives().iter().filter(|directive| directive.doc == doc);
    for field in wanted.flat_map(|directive| directive.fields.iter()) {
        let (prefix, name) = field_name(doc, field);
        assert_eq!(told.contains(&field), members.contains_key(&format!("{prefix}{name}")), "{name} on {}", doc.name());
    }
}

#[test]
fn every_document_of_every_preset_obeys_the_catalog() {
    for preset in Preset::ALL {
        let documents = documents(Selection { preset, ..Selection::default() });
        let types: BTreeSet<_> = documents.iter().map(|document| document["Type"].as_str().unwrap()).collect();
        let devices = if preset == Preset::Enhanced { 0 } else { 5 };
        assert_eq!(types.len(), DocType::ALL.len() - devices, "{types:?}");
        for document in &documents {
            check(document, preset);
            assert_eq!(document.get("CloudWatchMetrics").is_some(), preset.directives().iter().any(|d| document["Type"] == d.doc.name()));
        }
    }
}

#[test]
fn node_figures() {
    let documents = documents(Selection::default());
    let [node] = of_type(&documents, DocType::Node)[..] else { panic!("one node") };
    assert_eq!((&node["ClusterName"], &node["AutoScalingGroupName"]), (&"demo \"quoted\"".into(), &"workers".into()));
    assert_eq!((&node["InstanceId"], &node["InstanceType"]), (&"i-0123456789abcdef0".into(), &"m5.large".into()));
    let number = |name: &str| node[name].as_f64().unwrap_or_else(|| panic!("{name}"));
    // 50 of 100 ticks a second is half a core; stolen time is not use.
    assert_eq!((number("node_cpu_usage_total"), number("node_cpu_usage_user"), number("node_cpu_usage_system")), (500.0, 400.0, 100.0));
    assert_eq!((number("node_cpu_limit"), number("node_cpu_utilization")), (2000.0, 25.0));
    assert_eq!((number("node_cpu_request"), number("node_cpu_reserved_capacity")), (400.0, 20.0));
    assert_eq!(number("node_memory_working_set"), (300 * MIB) as f64);
    assert_eq!((number("node_memory_utilization"), number("node_memory_limit")), (30.0, (1000 * MIB) as f64));
    assert_eq!(number("node_memory_reserved_capacity"), 12.8);
    // The pod's host end is not added to eth0.
    assert_eq!(
        (number("node_network_rx_bytes"), number("node_network_tx_bytes"), number("node_network_total_bytes")),
        (1000.0, 500.0, 1500.0)
    );
    assert_eq!((number("node_number_of_running_pods"), number("node_number_of_running_containers")), (3.0, 3.0));
    assert_eq!((number("node_status_condition_ready"), number("node_status_allocatable_pods")), (1.0, 109.0));
}

#[test]
fn each_disk_has_its_own_rates() {
    let documents = documents(Selection::default());
    let disks = of_type(&documents, DocType::NodeDiskIO);
    assert_eq!(disks.iter().map(|disk| disk["device"].as_str().unwrap()).collect::<Vec<_>>(), ["/dev/nvme0n1", "/dev/nvme1n1"]);
    assert_eq!(disks[0]["node_diskio_io_service_bytes_read"], 1024);
    assert_eq!(disks[0]["node_diskio_io_service_bytes_total"], 3072);
    assert_eq!(disks[0]["node_diskio_io_serviced_total"], 2);
    assert_eq!(disks[0]["EBSVolumeId"], "aws://eu-west-1a/vol-0a");
    assert_eq!((&disks[1]["node_diskio_io_serviced_read"], disks[1].get("EBSVolumeId")), (&7.into(), None));
    let [filesystem] = of_type(&documents, DocType::NodeFS)[..] else { panic!("one file system") };
    assert_eq!((&filesystem["node_filesystem_utilization"], &filesystem["node_filesystem_inodes_free"]), (&40.into(), &9.into()));
}

#[test]
fn pod_and_container_figures() {
    let documents = documents(Selection { preset: Preset::Enhanced, ..Selection::default() });
    let pods = of_type(&documents, DocType::Pod);
    let web = pods.iter().find(|pod| pod["FullPodName"] == "web-6b9c4cb4dc-8zpz5").unwrap();
    assert_eq!((&web["PodName"], &web["Namespace"], &web["Service"]), (&"web".into(), &"default".into(), &"web-svc".into()));
    let number = |name: &str| web[name].as_f64().unwrap_or_else(|| panic!("{name}"));
    assert_eq!((number("pod_cpu_usage_total"), number("pod_cpu_utilization")), (100.0, 5.0));
    assert_eq!((number("pod_cpu_limit"), number("pod_cpu_utilization_over_pod_limit")), (200.0, 50.0));
    assert_eq!((number("pod_memory_working_set"), number("pod_memory_utilization_over_pod_limit")), ((16 * MIB) as f64, 25.0));
    assert_eq!((number("pod_memory_pgfault"), number("pod_memory_hierarchical_pgfault")), (3.0, 5.0));
    // What the host end sends is what the pod receives.
    assert_eq!((number("pod_network_rx_bytes"), number("pod_network_tx_bytes")), (30.0, 70.0));
    assert_eq!((number("pod_status_running"), number("pod_status_pending"), number("pod_status_ready")), (1.0, 0.0, 1.0));
    assert_eq!((number("pod_number_of_containers"), number("pod_number_of_running_containers")), (1.0, 1.0));
    let bare = pods.iter().find(|pod| pod["FullPodName"] == "cli").unwrap();
    for absent in ["pod_cpu_limit", "pod_cpu_utilization_over_pod_limit", "pod_network_rx_bytes", "Service"] {
        assert_eq!(bare.get(absent), None, "{absent}");
    }
    let containers = of_type(&documents, DocType::Container);
    assert_eq!(containers.len(), 3, "sandboxes are no containers");
    assert_eq!((&containers[0]["ContainerName"], &containers[0]["container_status"]), (&"c".into(), &"Running".into()));
    assert_eq!(containers[0]["kubernetes"]["containerd"]["container_id"].as_str().map(str::len), Some(64));
    assert_eq!(containers[0]["number_of_container_restarts"], 0);
    let [files] = of_type(&documents, DocType::ContainerFS)[..] else { panic!("one container told its files") };
    assert_eq!(files["container_filesystem_utilization"], 40);
}

proptest::proptest! {
    /// However the ticks fall beside our clock, and even where idle time goes back: a node uses no more than it has.
    #[test]
    fn a_node_never_uses_more_than_it_has(
        steps in proptest::collection::vec((1u64..3000, 0u64..500, 0u64..500, 0u64..50, -3i64..500), 1..20),
        upstream: bool,
    ) {
        let mut machine = Machine::new(if upstream { Figures::Upstream } else { Figures::Correct });
        let (mut at, mut ticks) = (Duration::ZERO, CpuTicks { idle: 100, ..CpuTicks::default() });
        machine.pass_with(at, 1, ticks);
        for (ms, user, system, steal, idle) in steps {
            at += Duration::from_millis(ms);
            ticks.user += user;
            ticks.system += system;
            ticks.steal += steal;
            ticks.idle = ticks.idle.saturating_add_signed(idle);
            let node = machine.pass_with(at, 1, ticks).node;
            if let Some(cpu) = node.cpu {
                proptest::prop_assert!(cpu.total <= node.cpu_limit && cpu.total >= 0.0, "{cpu:?}");
                proptest::prop_assert!(cpu.user + cpu.system <= cpu.total + 1e-6);
            }
        }
    }
}

#[test]
fn upstreams_figures_on_request() {
    let mut machine = Machine::new(Figures::Upstream);
    machine.pass(1);
    let node = machine.pass(2).node;
    assert_eq!(node.net.unwrap().rx.bytes, 1070.0, "the pod's host end counts again");
    assert_eq!(node.cpu.unwrap().total, 600.0, "with stolen time");
}

#[test]
fn what_is_deselected_is_not_told() {
    let mut selection = Selection { preset: Preset::Enhanced, ..Selection::default() };
    for word in ["Container", "PodNet", "pod_cpu_utilization"] {
        selection = selection.without(word).unwrap();
    }
    let documents = documents(selection);
    assert!(of_type(&documents, DocType::Container).is_empty() && of_type(&documents, DocType::PodNet).is_empty());
    for pod in of_type(&documents, DocType::Pod) {
        assert!(pod["pod_cpu_utilization"].is_number(), "the figure stays in the document");
        assert!(!pod["CloudWatchMetrics"].to_string().contains("\"pod_cpu_utilization\""));
    }
    let [node] = of_type(&documents, DocType::Node)[..] else { panic!("one node") };
    assert!(node["CloudWatchMetrics"].to_string().contains("\"node_cpu_utilization\""), "only the pods' is left out");
}

/// The documents of the recording's web pod in another phase, with or without its cgroups.
fn told_of_an_ended_pod(phase: &str, cgroups: bool) -> Vec<Value> {
    let mut machine = Machine::new(Figures::Correct);
    let mut state = cluster();
    let key = state.pods.keys().find(|name| name.name.ends_with("8zpz5")).unwrap().clone();
    let mut pod = (*state.pods[&key]).clone();
    pod.status.phase = phase.into();
    state.pods.insert(key.clone(), Arc::new(pod));
    machine.table = machine.table.refreshed(&state, "node1", &VethNames::default());
    machine.pass(100);
    let mut snapshot = machine.pass(160);
    if !cgroups {
        let pod = snapshot.pods.iter_mut().find(|pod| pod.meta.name == key.name).unwrap();
        (pod.cpu, pod.memory) = (None, None);
        pod.containers.clear();
    }
    let mut encoder = Encoder::new(identity(), Selection { preset: Preset::Enhanced, ..Selection::default() });
    let told = encoder.documents(&snapshot).into_iter().map(|text| serde_json::from_str(&text).unwrap());
    let of_device = |document: &Value| document["Type"].as_str().is_some_and(|name| name.ends_with("GPU"));
    told.filter(|document: &Value| document["FullPodName"] == *key.name && !of_device(document)).collect()
}

#[test]
fn a_pod_that_ended_is_told_as_long_as_its_cgroup_is_there_and_reserves_nothing() {
    for phase in ["Succeeded", "Failed"] {
        assert_eq!(told_of_an_ended_pod(phase, false), Vec::<Value>::new(), "{phase}");
        let told = told_of_an_ended_pod(phase, true);
        let [pod] = of_type(&told, DocType::Pod)[..] else { panic!("{phase}: {told:?}") };
        assert_eq!((&pod["pod_status"], &pod["pod_cpu_request"]), (&phase.into(), &200.into()));
        assert_eq!((pod.get("pod_cpu_reserved_capacity"), pod.get("pod_memory_reserved_capacity")), (None, None), "{phase}");
    }
    let told = told_of_an_ended_pod("Pending", false);
    let [pod] = of_type(&told, DocType::Pod)[..] else { panic!("who is to run is told: {told:?}") };
    assert_eq!((&pod["pod_status_pending"], &pod["pod_cpu_reserved_capacity"]), (&1.into(), &10.into()));
}

/// The documents of the recording's web pod with other resources, on the machine of 2,000 millicores and 1,000 MiB with 4 GPUs or none,
/// and the node's own.
fn told_of_resources(resources: &Value, gpus: Option<&str>) -> (Value, Value) {
    let mut machine = Machine::new(Figures::Correct);
    let mut state = cluster();
    let key = state.pods.keys().find(|name| name.name.ends_with("8zpz5")).unwrap().clone();
    let mut pod = (*state.pods[&key]).clone();
    pod.spec.containers[0].resources = serde_json::from_value(resources.clone()).unwrap();
    state.pods.insert(key.clone(), Arc::new(pod));
    if let Some(gpus) = gpus {
        let capacity = serde_json::json!({ "pods": "110", "nvidia.com/gpu": gpus });
        let node = serde_json::json!({ "metadata": { "name": "node1" }, "status": { "capacity": capacity } });
        state.nodes.insert("node1".into(), Arc::new(serde_json::from_value(node).unwrap()));
    }
    machine.table = machine.table.refreshed(&state, "node1", &VethNames::default());
    machine.pass(100);
    let snapshot = machine.pass(160);
    let mut encoder = Encoder::new(identity(), Selection { preset: Preset::Enhanced, ..Selection::default() });
    let documents: Vec<Value> = encoder.documents(&snapshot).iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    documents.iter().for_each(|document| check(document, Preset::Enhanced));
    let pod = of_type(&documents, DocType::Pod).into_iter().find(|document| document["FullPodName"] == *key.name).unwrap().clone();
    (pod, of_type(&documents, DocType::Node)[0].clone())
}

/// As upstream's `getResourceSettingForPod`.
#[test]
fn a_pod_asks_for_no_more_than_the_node_has() {
    let resources = serde_json::json!({"limits": {"cpu": "8", "memory": "4000Mi"}, "requests": {"cpu": "3", "memory": "2000Mi"}});
    let (pod, node) = told_of_resources(&resources, None);
    assert_eq!((&pod["pod_cpu_limit"], &pod["pod_cpu_request"]), (&2000.into(), &2000.into()));
    assert_eq!((&pod["pod_cpu_reserved_capacity"], &pod["pod_cpu_utilization_over_pod_limit"]), (&100.into(), &5.into()));
    let memory: Value = (1000 * MIB).into();
    assert_eq!((&pod["pod_memory_limit"], &pod["pod_memory_request"]), (&memory, &memory));
    assert_eq!(pod["pod_memory_reserved_capacity"], 100);
    // Another pod of the recording asks for 200 millicores and 64 MiB.
    assert_eq!((&node["node_cpu_request"], &node["node_memory_request"]), (&2200.into(), &(1064 * MIB).into()));
    let nothing = serde_json::json!({"limits": {"cpu": "0", "memory": "0"}, "requests": {"cpu": "0", "memory": "0"}});
    let (pod, _) = told_of_resources(&nothing, None);
    for absent in ["limit", "request", "reserved_capacity", "utilization_over_pod_limit"] {
        assert_eq!((pod.get(format!("pod_cpu_{absent}")), pod.get(format!("pod_memory_{absent}"))), (None, None), "{absent}");
    }
}

/// Without any exporter, as upstream's `decorateGPU`.
#[test]
fn gpus_that_pods_ask_for() {
    let two = serde_json::json!({"limits": {"nvidia.com/gpu": "2"}, "requests": {"nvidia.com/gpu": "2"}});
    let (pod, node) = told_of_resources(&two, Some("4"));
    let figures = |document: &Value, prefix: &str| {
        ["request", "limit", "usage_total", "reserved_capacity"].map(|name| document[format!("{prefix}_gpu_{name}")].as_f64())
    };
    assert_eq!(figures(&pod, "pod"), [Some(2.0), Some(2.0), Some(2.0), Some(50.0)]);
    assert_eq!(figures(&node, "node"), [Some(2.0), Some(4.0), Some(2.0), Some(50.0)]);
    let dimensions = |document: &Value, metric: &str| -> Vec<Value> {
        let directives = document["CloudWatchMetrics"].as_array().unwrap().iter();
        let naming = directives.filter(|directive| directive["Metrics"].as_array().unwrap().iter().any(|told| told["Name"] == metric));
        naming.flat_map(|directive| directive["Dimensions"].as_array().unwrap().clone()).collect()
    };
    let sets = dimensions(&pod, "pod_gpu_usage_total");
    for set in [
        &["PodName", "Namespace", "ClusterName"][..],
        &["ClusterName"],
        &["FullPodName", "PodName", "Namespace", "ClusterName"],
        &["Service", "Namespace", "ClusterName"],
    ] {
        assert!(sets.contains(&set.into()), "{set:?} in {sets:?}");
    }
    assert_eq!(sets.len(), 4);
    assert_eq!(dimensions(&node, "node_gpu_limit").len(), 2);
    assert_eq!(dimensions(&node, "node_gpu_request"), [] as [Value; 0], "a figure without a metric");
    let (pod, node) = told_of_resources(&serde_json::json!({}), Some("4"));
    assert_eq!((figures(&pod, "pod"), figures(&node, "node")), ([None; 4], [Some(0.0), Some(4.0), Some(0.0), Some(0.0)]));
    for without in [None, Some("0")] {
        let (pod, node) = told_of_resources(&serde_json::json!({}), without);
        assert_eq!((figures(&pod, "pod"), figures(&node, "node")), ([None; 4], [None; 4]));
    }
}

/// An init container that stays is told by itself; upstream counts `containerStatuses` alone, and conditions, not the phase, tell what is
/// not known.
#[test]
fn a_sidecar_is_told_and_not_counted() {
    let mut machine = Machine::new(Figures::Correct);
    let key = cluster().pods.keys().find(|name| name.name.ends_with("8zpz5")).unwrap().clone();
    let mut told = Vec::new();
    for restarts in [0, 4] {
        let mut state = cluster();
        let mut pod = (*state.pods[&key]).clone();
        pod.spec.init_containers = serde_json::from_value(serde_json::json!([{"name": "proxy", "restartPolicy": "Always"}])).unwrap();
        pod.status.init_container_statuses = serde_json::from_value(serde_json::json!([{
            "name": "proxy", "restartCount": restarts, "containerID": "containerd://feed", "state": {"running": {}},
            "lastState": {"terminated": {"reason": "OOMKilled"}},
        }]))
        .unwrap();
        pod.status.conditions.iter_mut().filter(|condition| condition.kind == "Ready").for_each(|ready| ready.status = "Unknown".into());
        state.pods.insert(key.clone(), Arc::new(pod));
        machine.table = machine.table.refreshed(&state, "node1", &VethNames::default());
        let snapshot = machine.pass(100 + restarts);
        let mut encoder = Encoder::new(identity(), Selection { preset: Preset::Enhanced, ..Selection::default() });
        told = encoder.documents(&snapshot).iter().map(|text| serde_json::from_str::<Value>(text).unwrap()).collect();
    }
    let of_pod = |doc| of_type(&told, doc).into_iter().filter(|document| document["FullPodName"] == *key.name).collect::<Vec<_>>();
    let [pod] = of_pod(DocType::Pod)[..] else { panic!("one pod") };
    for (figure, value) in [
        ("number_of_containers", 1),
        ("number_of_running_containers", 1),
        ("container_status_running", 1),
        ("number_of_container_restarts", 0),
        ("cpu_limit", 200),
        ("status_unknown", 1),
        ("status_ready", 0),
        ("status_running", 1),
    ] {
        assert_eq!(pod[format!("pod_{figure}")], value, "{figure}");
    }
    assert_eq!(pod.get("pod_container_status_terminated_reason_oom_killed"), None);
    assert_eq!(of_type(&told, DocType::Node)[0]["node_number_of_running_containers"], 3);
    let containers: Vec<_> = of_pod(DocType::Container)
        .iter()
        .map(|container| (&container["ContainerName"], &container["number_of_container_restarts"]))
        .collect();
    assert_eq!(containers, [(&"c".into(), &0.into()), (&"proxy".into(), &4.into())]);
}

#[test]
fn a_container_that_ended_for_want_of_memory_counts_once_it_is_back() {
    let mut machine = Machine::new(Figures::Correct);
    let ended = serde_json::json!({"terminated": {"reason": "OOMKilled"}});
    for (now, last, counted) in [(Some(&ended), None, None), (None, Some(&ended), Some(1.0)), (Some(&ended), Some(&ended), Some(1.0))] {
        let mut state = cluster();
        let key = state.pods.keys().find(|name| name.name.ends_with("8zpz5")).unwrap().clone();
        let mut pod = (*state.pods[&key]).clone();
        let status = &mut pod.status.container_statuses[0];
        if let Some(now) = now {
            status.state = serde_json::from_value(now.clone()).unwrap();
        }
        if let Some(last) = last {
            status.last_state = serde_json::from_value(last.clone()).unwrap();
        }
        state.pods.insert(key.clone(), Arc::new(pod));
        machine.table = machine.table.refreshed(&state, "node1", &VethNames::default());
        let snapshot = machine.pass(160);
        let mut encoder = Encoder::new(identity(), Selection { preset: Preset::Enhanced, ..Selection::default() });
        let documents: Vec<Value> = encoder.documents(&snapshot).iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        let pod = of_type(&documents, DocType::Pod).into_iter().find(|document| document["FullPodName"] == *key.name).unwrap();
        let found = pod.get("pod_container_status_terminated_reason_oom_killed").and_then(Value::as_f64);
        assert_eq!(found, counted);
    }
}

#[test]
fn the_first_pass_and_a_restarted_container_have_no_rates() {
    let mut machine = Machine::new(Figures::Correct);
    let first = machine.pass(100);
    assert!(first.node.cpu.is_none() && first.disks.is_empty() && first.interfaces.is_empty());
    assert!(first.pods.iter().all(|pod| pod.cpu.is_none() && pod.memory.is_some_and(|memory| memory.faults.is_none())));
    assert_eq!(first.unknown_pods, 1);
    let second = machine.pass(160);
    assert!(second.pods.iter().all(|pod| pod.cpu.is_some()));
    // Counters begin again: no figure, then figures again; never a spike.
    let reset = machine.pass_after_reset(220, 5);
    assert!(reset.pods.iter().all(|pod| pod.cpu.is_none()));
    let after = machine.pass_after_reset(280, 65);
    assert!(after.pods.iter().all(|pod| pod.cpu.is_some_and(|cpu| (cpu.total - 100.0).abs() < 1e-9)));
}
