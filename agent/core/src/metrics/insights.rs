//! Samples as Container Insights documents: one JSON text per object and tick, in version 0 of the embedded metric format.
//!
//! Version 0 has `CloudWatchMetrics`, `Version` and `Timestamp` (a string) at the root, no `_aws`; CloudWatch takes it in groups
//! named `/aws/containerinsights/<cluster>/performance`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use super::catalog::{DocType, Field, Fields, NAMESPACE, Preset, Tag, Tags, field_name, fields_of};
use super::devices::{DeviceSample, GpuOwner};
use super::model::{ContainerSample, Cpu, FilesystemSample, FilesystemSize, Memory, NodeSample, PodSample, Snapshot, Traffic};
use super::pods::{Amounts, ContainerMeta, ContainerState};
use super::track::bounded;

/// Directive texts remembered; objects come in a few shapes.
const MAX_SHAPES: usize = 128;

/// What every document says of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The cluster's name.
    pub cluster: String,
    /// The node's name.
    pub node: String,
    /// `i-…`.
    pub instance_id: String,
    /// `m5.large`.
    pub instance_type: String,
    /// `eu-west-1a`.
    pub availability_zone: String,
    /// The Auto Scaling group, if it is in one.
    pub auto_scaling_group: Option<String>,
}

impl NodeIdentity {
    /// A log group of the cluster: `performance` is that of the documents.
    pub fn log_group(&self, name: &str) -> String {
        format!("/aws/containerinsights/{}/{name}", self.cluster)
    }
}

/// Which documents and metrics are told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Selection {
    /// The metrics that CloudWatch makes of the documents.
    pub preset: Preset,
    /// Types of documents that are not sent at all.
    pub without_types: BTreeSet<DocType>,
    /// Fields that become no metric although the preset has them.
    pub without_metrics: BTreeMap<DocType, Fields>,
}

/// A word that names neither a type of document nor a metric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a type of document (Pod, ContainerFS ...) nor a metric (pod_cpu_utilization ...)")]
pub struct UnknownWord(pub String);

impl Selection {
    /// Without a type of document (`ContainerFS`), or without a metric by its CloudWatch name (`pod_cpu_reserved_capacity`): the figure
    /// stays in the documents.
    ///
    /// # Errors
    /// When the word names neither.
    pub fn without(mut self, word: &str) -> Result<Self, UnknownWord> {
        if let Some(doc) = DocType::ALL.into_iter().find(|doc| doc.name() == word) {
            self.without_types.insert(doc);
            return Ok(self);
        }
        let mut found = false;
        for doc in DocType::ALL {
            let named = |field: &Field| {
                let (prefix, name) = field_name(doc, *field);
                word.strip_prefix(prefix) == Some(name)
            };
            for field in fields_of(doc).iter().filter(named) {
                self.without_metrics.entry(doc).or_default().insert(field);
                found = true;
            }
        }
        if found { Ok(self) } else { Err(UnknownWord(word.to_owned())) }
    }

    /// The fields of a directive that become metrics.
    pub fn told(&self, doc: DocType, fields: Fields) -> Fields {
        if self.without_types.contains(&doc) {
            return Fields::default();
        }
        fields.minus(self.without_metrics.get(&doc).copied().unwrap_or_default())
    }
}

/// Makes documents; remembers the directives of each shape of document.
#[derive(Debug)]
pub struct Encoder {
    selection: Selection,
    identity: NodeIdentity,
    /// Members that all documents share, rendered.
    common: String,
    shapes: HashMap<(DocType, Fields, Tags), String>,
}

/// A document under construction.
struct Document {
    doc: DocType,
    text: Vec<u8>,
    fields: Fields,
    tags: Tags,
}

impl Encoder {
    /// For one node.
    pub fn new(identity: NodeIdentity, selection: Selection) -> Self {
        let mut common = format!(
            "{{\"ClusterName\":{},\"NodeName\":{},\"InstanceId\":{},\"InstanceType\":{},\"Version\":\"0\"",
            json(&identity.cluster),
            json(&identity.node),
            json(&identity.instance_id),
            json(&identity.instance_type),
        );
        if let Some(group) = &identity.auto_scaling_group {
            common.push_str(",\"AutoScalingGroupName\":");
            common.push_str(&json(group));
        }
        Self { selection, identity, common, shapes: HashMap::new() }
    }

    /// Whose documents.
    pub fn identity(&self) -> &NodeIdentity {
        &self.identity
    }

    /// All documents of a snapshot, in a fixed order.
    pub fn documents(&mut self, snapshot: &Snapshot) -> Vec<String> {
        let mut out = Vec::with_capacity(8 + snapshot.pods.len() * 5);
        self.node_documents(snapshot, &mut out);
        for pod in snapshot.pods.iter().filter(|pod| pod.is_told()) {
            self.pod_documents(snapshot, pod, &mut out);
        }
        if self.selection.preset == Preset::Enhanced {
            self.device_documents(snapshot, &mut out);
        }
        out
    }

    fn device_documents(&mut self, snapshot: &Snapshot, out: &mut Vec<String>) {
        let host = format!("{{\"host\":{}}}", json(&self.identity.node));
        for (doc, devices) in [(DocType::NodeEFA, &snapshot.efa), (DocType::NodeEBS, &snapshot.volumes)] {
            for DeviceSample { device, figures } in devices {
                let Some(mut document) = self.begin(doc, snapshot.wall_ms) else { break };
                document.raw("kubernetes", &host);
                match doc {
                    DocType::NodeEBS => document.tag(Tag::VolumeId, device),
                    _ => document.text("EfaDevice", device),
                }
                figures.iter().for_each(|(field, value)| document.number(*field, *value));
                out.push(self.finish(document));
            }
        }
        for gpu in &snapshot.gpus {
            let owner = gpu.owner.as_ref().and_then(|GpuOwner { namespace, pod, container }| {
                let pod = snapshot.pods.iter().find(|sample| sample.meta.namespace == *namespace && sample.meta.name == *pod)?;
                Some((pod, pod.meta.containers.iter().find(|meta| meta.name == *container)))
            });
            for doc in [DocType::NodeGPU, DocType::PodGPU, DocType::ContainerGPU] {
                let Some(mut document) = self.begin(doc, snapshot.wall_ms) else { continue };
                match (doc, owner) {
                    (DocType::PodGPU, Some((pod, _))) => {
                        self.pod_tags(&mut document, pod);
                        document.raw_open("kubernetes", &pod.meta.kubernetes);
                    }
                    (DocType::ContainerGPU, Some((pod, Some(container)))) => self.container_tags(&mut document, pod, container),
                    (DocType::NodeGPU, _) => document.raw("kubernetes", &host),
                    _ => continue,
                }
                document.tag(Tag::GpuDevice, &gpu.device);
                document.text("UUID", &gpu.uuid);
                gpu.figures.iter().for_each(|(field, value)| document.number(*field, *value));
                out.push(self.finish(document));
            }
        }
    }

    fn node_documents(&mut self, snapshot: &Snapshot, out: &mut Vec<String>) {
        let host = format!("{{\"host\":{}}}", json(&self.identity.node));
        if let Some(mut document) = self.begin(DocType::Node, snapshot.wall_ms) {
            document.raw("kubernetes", &host);
            node_fields(&mut document, &snapshot.node);
            out.push(self.finish(document));
        }
        for FilesystemSample { device, volume, size } in &snapshot.filesystems {
            let Some(mut document) = self.begin(DocType::NodeFS, snapshot.wall_ms) else { break };
            document.raw("kubernetes", &host);
            document.text("device", device);
            // cAdvisor's word for every file system on a disk.
            document.text("fstype", "vfs");
            self.volume(&mut document, volume.as_deref());
            filesystem_fields(&mut document, size);
            document.number(Field::FilesystemInodes, size.inodes as f64);
            document.number(Field::FilesystemInodesFree, size.inodes_free as f64);
            out.push(self.finish(document));
        }
        for disk in &snapshot.disks {
            let Some(mut document) = self.begin(DocType::NodeDiskIO, snapshot.wall_ms) else { break };
            document.raw("kubernetes", &host);
            document.text("device", &format!("/dev/{}", disk.device));
            self.volume(&mut document, disk.volume.as_deref());
            document.number(Field::DiskioBytesRead, disk.read_bytes);
            document.number(Field::DiskioBytesWrite, disk.write_bytes);
            document.number(Field::DiskioBytesTotal, disk.read_bytes + disk.write_bytes);
            document.number(Field::DiskioServicedRead, disk.reads);
            document.number(Field::DiskioServicedWrite, disk.writes);
            document.number(Field::DiskioServicedTotal, disk.reads + disk.writes);
            out.push(self.finish(document));
        }
        for interface in &snapshot.interfaces {
            let Some(mut document) = self.begin(DocType::NodeNet, snapshot.wall_ms) else { break };
            document.raw("kubernetes", &host);
            document.text("interface", &interface.name);
            traffic_fields(&mut document, &interface.traffic);
            out.push(self.finish(document));
        }
    }

    fn pod_documents(&mut self, snapshot: &Snapshot, pod: &PodSample, out: &mut Vec<String>) {
        let node = &snapshot.node;
        if let Some(mut document) = self.begin(DocType::Pod, snapshot.wall_ms) {
            self.pod_tags(&mut document, pod);
            document.raw_open("kubernetes", &pod.meta.kubernetes);
            document.text("pod_status", &pod.meta.phase);
            pod_fields(&mut document, pod, node);
            out.push(self.finish(document));
        }
        if let Some(traffic) = &pod.net
            && let Some(mut document) = self.begin(DocType::PodNet, snapshot.wall_ms)
        {
            self.pod_tags(&mut document, pod);
            document.raw_open("kubernetes", &pod.meta.kubernetes);
            document.text("interface", "eth0");
            traffic_fields(&mut document, traffic);
            out.push(self.finish(document));
        }
        for sample in &pod.containers {
            let container = &pod.meta.containers[sample.index];
            if let Some(mut document) = self.begin(DocType::Container, snapshot.wall_ms) {
                self.container_tags(&mut document, pod, container);
                document.text("container_status", container.state.name());
                if let Some(reason) = container.state.reason() {
                    document.text("container_status_reason", reason);
                }
                if let Some(reason) = &container.last_termination {
                    document.text("container_last_termination_reason", reason);
                }
                container_fields(&mut document, sample, container, node);
                out.push(self.finish(document));
            }
            if let Some(files) = &sample.files
                && let Some(mut document) = self.begin(DocType::ContainerFS, snapshot.wall_ms)
            {
                self.container_tags(&mut document, pod, container);
                filesystem_fields(&mut document, files);
                out.push(self.finish(document));
            }
        }
    }

    fn volume(&self, document: &mut Document, volume: Option<&str>) {
        if let Some(volume) = volume {
            document.text("EBSVolumeId", &format!("aws://{}/{volume}", self.identity.availability_zone));
        }
    }

    fn pod_tags(&self, document: &mut Document, pod: &PodSample) {
        document.tag(Tag::Namespace, &pod.meta.namespace);
        document.tag(Tag::PodName, &pod.meta.workload);
        if let Some(service) = &pod.meta.service {
            document.tag(Tag::Service, service);
        }
        if self.selection.preset == Preset::Enhanced {
            document.tag(Tag::FullPodName, &pod.meta.name);
        }
    }

    fn container_tags(&self, document: &mut Document, pod: &PodSample, container: &ContainerMeta) {
        self.pod_tags(document, pod);
        document.tag(Tag::ContainerName, &container.name);
        document.raw("kubernetes", &pod.meta.kubernetes);
        document.text("container_name", &container.name);
        if !container.runtime.is_empty() {
            document.raw(&container.runtime, &format!("{{\"container_id\":{}}}", json(&container.id)));
        }
        document.text.push(b'}');
    }

    /// A document of a type; `None` if the selection has none of that type.
    fn begin(&self, doc: DocType, wall_ms: i64) -> Option<Document> {
        if self.selection.without_types.contains(&doc) {
            return None;
        }
        let mut text = Vec::with_capacity(3072);
        text.extend_from_slice(self.common.as_bytes());
        let tags = Tags::of(&[Tag::ClusterName, Tag::NodeName, Tag::InstanceId, Tag::InstanceType]);
        let mut document = Document { doc, text, fields: Fields::default(), tags };
        document.text("Type", doc.name());
        document.raw("Sources", doc.sources());
        document.text("Timestamp", &wall_ms.to_string());
        Some(document)
    }

    /// Adds the directives and ends the document.
    fn finish(&mut self, document: Document) -> String {
        let Document { doc, mut text, fields, tags } = document;
        let key = (doc, fields, tags);
        if self.shapes.len() >= MAX_SHAPES && !self.shapes.contains_key(&key) {
            self.shapes.clear();
        }
        let directives = self.shapes.entry(key).or_insert_with(|| directives(&self.selection, doc, fields, tags));
        text.extend_from_slice(directives.as_bytes());
        text.push(b'}');
        String::from_utf8(text).expect("made of UTF-8 strings and ASCII")
    }
}

/// The member `CloudWatchMetrics` with its comma, or nothing if no metric is made of the document.
fn directives(selection: &Selection, doc: DocType, present: Fields, tags: Tags) -> String {
    let mut out = String::new();
    for directive in selection.preset.directives().iter().filter(|directive| directive.doc == doc) {
        let metrics = selection.told(doc, directive.fields.intersection(present));
        let sets: Vec<Vec<&str>> = directive
            .dimensions
            .iter()
            .filter(|set| tags.contains(Tags::of(set)))
            .map(|set| set.iter().map(|tag| tag.name()).collect())
            .collect();
        if metrics.is_empty() || sets.is_empty() {
            continue;
        }
        out.push_str(if out.is_empty() { ",\"CloudWatchMetrics\":[" } else { "," });
        let metrics: Vec<_> = metrics
            .iter()
            .map(|field| {
                let (prefix, name) = field_name(doc, field);
                let mut metric = serde_json::json!({ "Name": format!("{prefix}{name}") });
                if let Some(unit) = field.unit().directive() {
                    metric["Unit"] = unit.into();
                }
                metric
            })
            .collect();
        let directive = serde_json::json!({ "Namespace": NAMESPACE, "Dimensions": sets, "Metrics": metrics });
        out.push_str(&directive.to_string());
    }
    if !out.is_empty() {
        out.push(']');
    }
    out
}

impl Document {
    /// `,"key":`
    fn key(&mut self, key: &str) {
        self.text.extend_from_slice(b",\"");
        self.text.extend_from_slice(key.as_bytes());
        self.text.extend_from_slice(b"\":");
    }

    fn raw(&mut self, key: &str, json: &str) {
        self.key(key);
        self.text.extend_from_slice(json.as_bytes());
    }

    /// An object whose closing brace is missing.
    fn raw_open(&mut self, key: &str, json: &str) {
        self.raw(key, json);
        self.text.push(b'}');
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        // Writing to a Vec cannot fail, and a str is always JSON.
        let _ = serde_json::to_writer(&mut self.text, value);
    }

    fn tag(&mut self, tag: Tag, value: &str) {
        // A dimension's value has 1 to 1024 characters; a directive naming another would fail as a whole.
        if value.is_empty() || value.len() > 1024 {
            return;
        }
        self.text(tag.name(), value);
        self.tags = self.tags.with(tag);
    }

    /// A number; one that is none (0/0) is left out with its metric.
    fn number(&mut self, field: Field, value: f64) {
        if !value.is_finite() {
            return;
        }
        let (prefix, name) = field_name(self.doc, field);
        self.text.extend_from_slice(b",\"");
        self.text.extend_from_slice(prefix.as_bytes());
        self.text.extend_from_slice(name.as_bytes());
        self.text.extend_from_slice(b"\":");
        // Whole numbers without ".0", as Go writes them; 2^53 bounds what a double holds exactly.
        let _ = if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
            serde_json::to_writer(&mut self.text, &(value as i64))
        } else {
            serde_json::to_writer(&mut self.text, &value)
        };
        self.fields.insert(field);
    }

    fn maybe(&mut self, field: Field, value: Option<f64>) {
        if let Some(value) = value {
            self.number(field, value);
        }
    }
}

/// A text as a JSON string.
pub(super) fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Per cent of a whole; nothing of nothing.
fn percent(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole * 100.0)
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn node_fields(document: &mut Document, node: &NodeSample) {
    cpu_fields(document, node.cpu, node);
    document.number(Field::CpuLimit, node.cpu_limit);
    document.number(Field::CpuRequest, node.cpu_request);
    document.maybe(Field::CpuReservedCapacity, percent(node.cpu_request, node.cpu_limit));
    memory_fields(document, Some(&node.memory), node);
    document.number(Field::MemoryLimit, node.memory_limit as f64);
    document.number(Field::MemoryRequest, node.memory_request);
    document.maybe(Field::MemoryReservedCapacity, percent(node.memory_request, node.memory_limit as f64));
    if let Some(traffic) = &node.net {
        traffic_fields(document, traffic);
    }
    document.number(Field::NumberOfRunningPods, node.running_pods as f64);
    document.number(Field::NumberOfRunningContainers, node.running_containers as f64);
    if let Some(status) = &node.status {
        document.number(Field::StatusConditionReady, flag(status.ready));
        document.number(Field::StatusConditionDiskPressure, flag(status.disk_pressure));
        document.number(Field::StatusConditionMemoryPressure, flag(status.memory_pressure));
        document.number(Field::StatusConditionPidPressure, flag(status.pid_pressure));
        document.number(Field::StatusConditionNetworkUnavailable, flag(status.network_unavailable));
        document.number(Field::StatusConditionUnknown, flag(status.unknown));
        document.maybe(Field::StatusCapacityPods, status.capacity_pods);
        document.maybe(Field::StatusAllocatablePods, status.allocatable_pods);
        if let Some(gpus) = status.capacity_gpus {
            document.number(Field::GpuRequest, node.gpu_request);
            document.number(Field::GpuLimit, gpus);
            document.number(Field::GpuUsageTotal, node.gpu_usage);
            document.maybe(Field::GpuReservedCapacity, percent(node.gpu_request, gpus));
        }
    }
}

fn pod_fields(document: &mut Document, pod: &PodSample, node: &NodeSample) {
    let meta = &pod.meta;
    cpu_fields(document, pod.cpu, node);
    memory_fields(document, pod.memory.as_ref(), node);
    let memory_limit = node.memory_limit as f64;
    let on_node = |of: Amounts| Amounts { cpu: bounded(of.cpu, node.cpu_limit), memory: bounded(of.memory, memory_limit) };
    let (requests, limits) = (on_node(meta.requests), on_node(meta.limits));
    request_fields(document, requests, limits);
    // Who has ended reserves nothing.
    let reserved = if meta.is_active() { requests } else { Amounts::default() };
    document.maybe(Field::CpuReservedCapacity, reserved.cpu.and_then(|cpu| percent(cpu, node.cpu_limit)));
    document.maybe(Field::MemoryReservedCapacity, reserved.memory.and_then(|memory| percent(memory, memory_limit)));
    document.maybe(Field::CpuOverPodLimit, over_limit(pod.cpu.map(|cpu| cpu.total), limits.cpu));
    document.maybe(Field::MemoryOverPodLimit, over_limit(pod.memory.map(|memory| memory.working_set as f64), limits.memory));
    if let Some(gpus) = meta.gpus.filter(|_| meta.is_active()) {
        document.number(Field::GpuRequest, gpus.request);
        document.number(Field::GpuLimit, gpus.limit);
        document.number(Field::GpuUsageTotal, if meta.phase == "Running" { gpus.limit } else { 0.0 });
        let capacity = node.status.and_then(|status| status.capacity_gpus);
        document.maybe(Field::GpuReservedCapacity, capacity.and_then(|capacity| percent(gpus.limit, capacity)));
    }
    if let Some(traffic) = &pod.net {
        traffic_fields(document, traffic);
    }
    document.number(Field::NumberOfContainerRestarts, pod.restarts as f64);
    let count = |wanted: &dyn Fn(&ContainerMeta) -> bool| meta.own_containers().filter(|container| wanted(container)).count() as f64;
    let running = count(&|c| c.state == ContainerState::Running);
    document.number(Field::NumberOfContainers, count(&|_| true));
    document.number(Field::NumberOfRunningContainers, running);
    document.number(Field::StatusReady, flag(meta.ready));
    document.number(Field::StatusScheduled, flag(meta.scheduled));
    document.number(Field::StatusUnknown, flag(meta.unknown));
    for (field, phase) in [
        (Field::StatusRunning, "Running"),
        (Field::StatusPending, "Pending"),
        (Field::StatusFailed, "Failed"),
        (Field::StatusSucceeded, "Succeeded"),
    ] {
        document.number(field, flag(meta.phase == phase));
    }
    document.number(Field::ContainersRunning, running);
    document.number(Field::ContainersTerminated, count(&|c| matches!(c.state, ContainerState::Terminated { .. })));
    document.number(Field::ContainersWaiting, count(&|c| matches!(c.state, ContainerState::Waiting { .. })));
    let waiting = |reasons: &[&str]| {
        let found = count(&|c| matches!(&c.state, ContainerState::Waiting { reason } if reasons.contains(&reason.as_str())));
        // As upstream: a reason that nobody has is not told.
        (found > 0.0).then_some(found)
    };
    document.maybe(Field::WaitingCrashLoop, waiting(&["CrashLoopBackOff"]));
    document.maybe(Field::WaitingImagePull, waiting(&["ErrImagePull", "ImagePullBackOff", "InvalidImageName"]));
    document.maybe(Field::WaitingStartError, waiting(&["StartError"]));
    document.maybe(Field::WaitingCreateError, waiting(&["CreateContainerError"]));
    document.maybe(Field::WaitingCreateConfigError, waiting(&["CreateContainerConfigError"]));
    // Of the time before the present one: a container that is down now and does not come back is not counted, as upstream.
    let killed = count(&|c| c.last_termination.as_deref().is_some_and(|reason| reason.contains("OOMKilled")));
    document.maybe(Field::TerminatedOomKilled, (killed > 0.0).then_some(killed));
}

fn container_fields(document: &mut Document, sample: &ContainerSample, container: &ContainerMeta, node: &NodeSample) {
    cpu_fields(document, sample.cpu, node);
    memory_fields(document, sample.memory.as_ref(), node);
    request_fields(document, container.requests, container.limits);
    document.maybe(Field::CpuOverContainerLimit, over_limit(sample.cpu.map(|cpu| cpu.total), container.limits.cpu));
    let working_set = sample.memory.map(|memory| memory.working_set as f64);
    document.maybe(Field::MemoryOverContainerLimit, over_limit(working_set, container.limits.memory));
    document.number(Field::NumberOfContainerRestarts, sample.restarts as f64);
}

fn over_limit(used: Option<f64>, limit: Option<f64>) -> Option<f64> {
    percent(used?, limit?)
}

fn request_fields(document: &mut Document, requests: Amounts, limits: Amounts) {
    document.maybe(Field::CpuRequest, requests.cpu);
    document.maybe(Field::CpuLimit, limits.cpu);
    document.maybe(Field::MemoryRequest, requests.memory);
    document.maybe(Field::MemoryLimit, limits.memory);
}

fn cpu_fields(document: &mut Document, cpu: Option<Cpu>, node: &NodeSample) {
    let Some(cpu) = cpu else { return };
    document.number(Field::CpuUsageTotal, cpu.total);
    document.number(Field::CpuUsageUser, cpu.user);
    document.number(Field::CpuUsageSystem, cpu.system);
    document.maybe(Field::CpuUtilization, percent(cpu.total, node.cpu_limit));
}

fn memory_fields(document: &mut Document, memory: Option<&Memory>, node: &NodeSample) {
    let Some(memory) = memory else { return };
    document.number(Field::MemoryUsage, memory.usage as f64);
    document.number(Field::MemoryCache, memory.cache as f64);
    document.number(Field::MemoryRss, memory.rss as f64);
    document.number(Field::MemoryMaxUsage, memory.max_usage as f64);
    document.number(Field::MemorySwap, memory.swap as f64);
    document.number(Field::MemoryFailcnt, memory.failcnt as f64);
    document.number(Field::MemoryMappedFile, memory.mapped_file as f64);
    document.number(Field::MemoryWorkingSet, memory.working_set as f64);
    document.maybe(Field::MemoryUtilization, percent(memory.working_set as f64, node.memory_limit as f64));
    if let Some(faults) = &memory.faults {
        document.number(Field::MemoryPgfault, faults.minor);
        document.number(Field::MemoryPgmajfault, faults.major);
        document.number(Field::MemoryHierarchicalPgfault, faults.hierarchical_minor);
        document.number(Field::MemoryHierarchicalPgmajfault, faults.hierarchical_major);
        document.number(Field::MemoryFailuresTotal, faults.minor + faults.major);
    }
}

fn traffic_fields(document: &mut Document, traffic: &Traffic) {
    let Traffic { rx, tx } = traffic;
    document.number(Field::NetworkRxBytes, rx.bytes);
    document.number(Field::NetworkRxPackets, rx.packets);
    document.number(Field::NetworkRxDropped, rx.dropped);
    document.number(Field::NetworkRxErrors, rx.errors);
    document.number(Field::NetworkTxBytes, tx.bytes);
    document.number(Field::NetworkTxPackets, tx.packets);
    document.number(Field::NetworkTxDropped, tx.dropped);
    document.number(Field::NetworkTxErrors, tx.errors);
    document.number(Field::NetworkTotalBytes, rx.bytes + tx.bytes);
}

fn filesystem_fields(document: &mut Document, size: &FilesystemSize) {
    document.number(Field::FilesystemUsage, size.usage as f64);
    document.number(Field::FilesystemCapacity, size.capacity as f64);
    document.number(Field::FilesystemAvailable, size.available as f64);
    document.maybe(Field::FilesystemUtilization, percent(size.usage as f64, size.capacity as f64));
}
