//! What a preset costs a month: metrics that CloudWatch keeps, observations, bytes of documents.
//!
//! List prices of us-east-1 (<https://aws.amazon.com/cloudwatch/pricing/>); discounts, free tiers and other regions are not in
//! them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::catalog::{Directive, DocType, GPU_SHARE, Preset, Tag, fields_of};
use super::devices::{DeviceSample, GpuOwner, GpuSample};
use super::insights::{Encoder, NodeIdentity, Selection};
use super::model::{
    ContainerSample, Cpu, DiskSample, Faults, FilesystemSample, FilesystemSize, Flow, InterfaceSample, Memory, NodeSample, NodeStatus,
    PodSample, Snapshot, Totals, Traffic,
};
use super::pods::{Amounts, ContainerMeta, ContainerState, PodMeta};

/// Dollars a month for each metric, by how many an account has: up to the first bound, then the next rate.
const METRIC_TIERS: [(f64, f64); 4] = [(10_000.0, 0.30), (250_000.0, 0.10), (1_000_000.0, 0.05), (f64::INFINITY, 0.02)];
/// Dollars for a million observations of Container Insights with enhanced observability.
const OBSERVATIONS_PER_MILLION: f64 = 0.21;
/// Dollars for a GB of log events taken in.
const INGESTION_PER_GB: f64 = 0.50;
/// What CloudWatch Logs adds to each event's size.
const EVENT_OVERHEAD: usize = 26;
/// Minutes of a month, as AWS counts in its examples.
const HOURS: f64 = 730.0;

/// A cluster's size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ClusterSize {
    /// Nodes.
    pub nodes: u64,
    /// Pods of all nodes.
    pub pods: u64,
    /// Namespaces with pods.
    pub namespaces: u64,
    /// Deployments, DaemonSets and so on: values of the dimension `PodName`.
    pub workloads: u64,
    /// Services that select pods.
    pub services: u64,
    /// Containers of a pod.
    pub containers_per_pod: u64,
    /// Disks of a node.
    pub disks_per_node: u64,
    /// EFA devices of a node.
    pub efa_per_node: u64,
    /// EBS volumes of a node that the CSI driver attached.
    pub csi_volumes_per_node: u64,
    /// GPUs of a node.
    pub gpus_per_node: u64,
    /// Seconds between ticks.
    pub interval_seconds: u64,
}

/// What a preset makes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bill {
    /// The preset.
    pub preset: Preset,
    /// Metrics that CloudWatch keeps: names times values of their dimensions.
    pub metrics: u64,
    /// Dollars a month for them.
    pub metrics_usd: f64,
    /// GB of documents a month, as CloudWatch Logs counts them.
    pub ingested_gb: f64,
    /// Dollars a month for taking them in.
    pub ingestion_usd: f64,
    /// Both.
    pub total_usd: f64,
    /// Figures told a month, each once whatever its dimensions: what enhanced observability is billed by.
    pub observations: u64,
    /// Dollars a month if billed by them instead of by metric and GB.
    pub observations_usd: f64,
}

impl ClusterSize {
    /// How many values a dimension set has on documents of a type in such a cluster.
    fn cardinality(&self, directive: &Directive, set: &[Tag]) -> u64 {
        let doc = directive.doc;
        let has = |tag| set.contains(&tag);
        let values = if has(Tag::GpuDevice) || has(Tag::VolumeId) {
            self.documents(doc)
        } else if has(Tag::NodeName) {
            self.nodes
        } else if has(Tag::FullPodName) {
            self.pods * if has(Tag::ContainerName) { self.containers_per_pod } else { 1 }
        } else if has(Tag::PodName) {
            self.workloads * if has(Tag::ContainerName) { self.containers_per_pod } else { 1 }
        } else if has(Tag::Service) {
            self.services
        } else if has(Tag::Namespace) {
            self.namespaces
        } else {
            1
        };
        match doc {
            // Not more pods have GPUs than there are GPUs.
            DocType::PodGPU | DocType::ContainerGPU => values.min(self.documents(doc)),
            _ if is_of_gpus(directive) => values.min(self.told_by(directive)),
            _ => values,
        }
    }

    /// Documents that have a directive's figures in one tick.
    fn told_by(&self, directive: &Directive) -> u64 {
        let documents = self.documents(directive.doc);
        if is_of_gpus(directive) { documents.min(self.nodes * self.gpus_per_node) } else { documents }
    }

    /// Documents of a type in one tick of the whole cluster.
    fn documents(&self, doc: DocType) -> u64 {
        match doc {
            DocType::Node | DocType::NodeFS | DocType::NodeNet => self.nodes,
            DocType::NodeDiskIO => self.nodes * self.disks_per_node,
            DocType::Pod | DocType::PodNet => self.pods,
            DocType::Container | DocType::ContainerFS => self.pods * self.containers_per_pod,
            DocType::NodeEFA => self.nodes * self.efa_per_node,
            DocType::NodeEBS => self.nodes * self.csi_volumes_per_node,
            DocType::NodeGPU | DocType::PodGPU | DocType::ContainerGPU => self.nodes * self.gpus_per_node,
        }
    }
}

/// Told only where there are GPUs.
fn is_of_gpus(directive: &Directive) -> bool {
    !directive.fields.intersection(GPU_SHARE).is_empty()
}

/// What a selection costs.
pub fn bill(selection: &Selection, size: &ClusterSize) -> Bill {
    let preset = selection.preset;
    let there = || preset.directives().iter().filter(|directive| size.told_by(directive) > 0);
    let told = || there().map(|directive| (selection.told(directive.doc, directive.fields).len() as u64, directive));
    let metrics: u64 = told()
        .map(|(fields, directive)| fields * directive.dimensions.iter().map(|set| size.cardinality(directive, set)).sum::<u64>())
        .sum();
    let figures: u64 = told().map(|(fields, directive)| fields * size.told_by(directive)).sum();
    let ticks = (HOURS * 3600.0 / size.interval_seconds.max(1) as f64).round();
    let sizes = document_sizes(selection);
    let bytes: u64 = DocType::ALL.iter().map(|doc| size.documents(*doc) * sizes.get(doc).map_or(0, |bytes| *bytes as u64)).sum();
    let ingested_gb = bytes as f64 * ticks / 1e9;
    let metrics_usd = tiered(metrics as f64);
    let ingestion_usd = ingested_gb * INGESTION_PER_GB;
    let observations = figures as f64 * ticks;
    Bill {
        preset,
        metrics,
        metrics_usd,
        ingested_gb,
        ingestion_usd,
        total_usd: metrics_usd + ingestion_usd,
        observations: observations as u64,
        observations_usd: observations / 1e6 * OBSERVATIONS_PER_MILLION,
    }
}

fn tiered(metrics: f64) -> f64 {
    let mut below = 0.0;
    let mut dollars = 0.0;
    for (bound, rate) in METRIC_TIERS {
        dollars += (metrics.min(bound) - below).max(0.0) * rate;
        below = bound;
    }
    dollars
}

/// Bytes of a typical document of each type, as CloudWatch Logs counts it: from the encoder itself.
pub fn document_sizes(selection: &Selection) -> BTreeMap<DocType, usize> {
    let identity = NodeIdentity {
        cluster: "production".into(),
        node: "ip-192-168-100-200.eu-west-1.compute.internal".into(),
        instance_id: "i-0123456789abcdef0".into(),
        instance_type: "m5.xlarge".into(),
        availability_zone: "eu-west-1a".into(),
        auto_scaling_group: Some("eks-workers-0123abcd".into()),
    };
    let documents = Encoder::new(identity, selection.clone()).documents(&typical());
    let type_of = |text: &str| DocType::ALL.into_iter().find(|doc| text.contains(&format!("\"Type\":\"{}\"", doc.name())));
    documents.iter().filter_map(|text| Some((type_of(text)?, text.len() + EVENT_OVERHEAD))).collect()
}

/// A node with one of everything.
fn typical() -> Snapshot {
    let cpu = Some(Cpu { total: 123.456_789, user: 100.123_456, system: 23.333_333 });
    let faults = Faults { minor: 12.345_678, major: 0.016_666, hierarchical_minor: 12.345_678, hierarchical_major: 0.016_666 };
    let memory = Memory {
        usage: 123_456_789,
        working_set: 98_765_432,
        cache: 12_345_678,
        rss: 87_654_321,
        max_usage: 123_456_789,
        mapped_file: 1_234_567,
        faults: Some(faults),
        ..Memory::default()
    };
    let flow = Flow { bytes: 12_345.678_9, packets: 123.456_7, dropped: 0.0, errors: 0.0 };
    let traffic = Traffic { rx: flow, tx: flow };
    let size = FilesystemSize {
        capacity: 85_886_742_528,
        available: 70_123_456_789,
        usage: 15_763_285_739,
        inodes: 41_942_464,
        inodes_free: 41_800_000,
    };
    let amounts = Amounts { cpu: Some(250.0), memory: Some(268_435_456.0) };
    let container = ContainerMeta {
        name: "application".into(),
        runtime: "containerd".into(),
        id: "0123456789abcdef".repeat(4),
        requests: amounts,
        limits: amounts,
        state: ContainerState::Running,
        ..ContainerMeta::default()
    };
    let meta = PodMeta {
        namespace: "production".into(),
        name: "checkout-service-6b9c4cb4dc-8zpz5".into(),
        uid: "b0839fa0-6ab0-4be2-85bf-944547b6ef59".into(),
        workload: "checkout-service".into(),
        owner: Some(("Deployment", "checkout-service".into())),
        service: Some("checkout".into()),
        phase: "Running".into(),
        requests: amounts,
        limits: amounts,
        containers: vec![container],
        kubernetes: "{\"host\":\"ip-192-168-100-200.eu-west-1.compute.internal\",\"labels\":{\"app.kubernetes.io/name\":\"checkout-service\",\"pod-template-hash\":\"6b9c4cb4dc\"},\"namespace_name\":\"production\",\"pod_id\":\"b0839fa0-6ab0-4be2-85bf-944547b6ef59\",\"pod_name\":\"checkout-service-6b9c4cb4dc-8zpz5\",\"pod_owners\":[{\"owner_kind\":\"Deployment\",\"owner_name\":\"checkout-service\"}],\"service_name\":\"checkout\"".into(),
        ..PodMeta::default()
    };
    let figures = |doc| fields_of(doc).iter().map(|field| (field, 12_345.678_9));
    let sample = ContainerSample { index: 0, cpu_ns: None, cpu, memory: Some(memory), restarts: 0, files: Some(size) };
    Snapshot {
        wall_ms: 1_795_232_118_300,
        node: NodeSample {
            cpu,
            cpu_limit: 4000.0,
            cpu_request: 1500.0,
            memory,
            memory_limit: 16_484_212_736,
            memory_request: 1_610_612_736.0,
            net: Some(traffic),
            running_pods: 20,
            running_containers: 25,
            status: Some(NodeStatus { ready: true, capacity_pods: Some(58.0), allocatable_pods: Some(58.0), ..NodeStatus::default() }),
            ..NodeSample::default()
        },
        filesystems: vec![FilesystemSample { device: "/dev/nvme0n1p1".into(), volume: Some("vol-0123456789abcdef0".into()), size }],
        disks: vec![DiskSample {
            device: "nvme0n1".into(),
            volume: Some("vol-0123456789abcdef0".into()),
            read_bytes: 1_234.567_8,
            write_bytes: 123_456.789,
            reads: 1.234_567,
            writes: 12.345_678,
        }],
        allowances: Vec::new(),
        alarms: Vec::new(),
        efa: vec![DeviceSample { device: "rdmap0s6".into(), figures: figures(DocType::NodeEFA).collect() }],
        volumes: vec![DeviceSample { device: "vol-0123456789abcdef0".into(), figures: figures(DocType::NodeEBS).collect() }],
        gpus: vec![GpuSample {
            device: "nvidia0".into(),
            uuid: "GPU-4cf8db2d-06c0-7d70-1a51-e59b25b2c16c".into(),
            owner: Some(GpuOwner { namespace: meta.namespace.clone(), pod: meta.name.clone(), container: "application".into() }),
            figures: figures(DocType::NodeGPU).collect(),
        }],
        interfaces: vec![InterfaceSample { name: "ens5".into(), traffic }],
        pods: vec![PodSample {
            meta: Arc::new(meta),
            cpu,
            memory: Some(memory),
            net: Some(traffic),
            net_totals: None,
            restarts: 0,
            denied: None,
            log_bytes: None,
            containers: vec![sample],
        }],
        unknown_pods: 0,
        totals: Totals::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: ClusterSize = ClusterSize {
        nodes: 3,
        pods: 60,
        namespaces: 5,
        workloads: 20,
        services: 10,
        containers_per_pod: 1,
        disks_per_node: 1,
        efa_per_node: 0,
        csi_volumes_per_node: 0,
        gpus_per_node: 0,
        interval_seconds: 60,
    };

    fn of(preset: Preset) -> Selection {
        Selection { preset, ..Selection::default() }
    }

    #[test]
    fn what_is_left_out_costs_nothing() {
        let all = bill(&of(Preset::Enhanced), &SMALL);
        let without = of(Preset::Enhanced).without("Container").unwrap().without("ContainerFS").unwrap();
        let less = bill(&without, &SMALL);
        // 12 metrics of containers for the cluster, each container of a pod, and each container of a workload.
        assert_eq!(all.metrics - less.metrics, 12 * (1 + 60 + 20));
        assert!(less.ingested_gb < all.ingested_gb && less.observations < all.observations);
        let one = bill(&of(Preset::Standard).without("pod_number_of_container_restarts").unwrap(), &SMALL);
        assert_eq!(bill(&of(Preset::Standard), &SMALL).metrics - one.metrics, 20);
        assert!(of(Preset::Standard).without("pod_colour").is_err());
    }

    #[test]
    fn presets_cost_more_the_more_they_tell() {
        let bills: Vec<_> = Preset::ALL.iter().map(|preset| bill(&of(*preset), &SMALL)).collect();
        assert_eq!(bills[0].metrics, 0);
        assert!(bills.windows(2).all(|pair| pair[0].metrics < pair[1].metrics && pair[0].total_usd < pair[1].total_usd), "{bills:?}");
    }

    #[test]
    fn minimal_by_hand() {
        // Seven of the node and one of its file systems for the cluster, four of pods for each namespace.
        let bill = bill(&of(Preset::Minimal), &SMALL);
        assert_eq!(bill.metrics, 7 + 1 + 4 * 5);
        assert!((bill.metrics_usd - 28.0 * 0.30).abs() < 1e-9);
        assert_eq!(bill.observations, (7 * 3 + 3 + 4 * 60) * 43_800);
    }

    #[test]
    fn standard_by_hand() {
        let per_set = 7 * (3 + 1) + 4 + (3 + 1) + 6 * (20 + 1 + 10 + 5) + 2 * (20 + 1) + 20;
        assert_eq!(bill(&of(Preset::Standard), &SMALL).metrics, per_set);
    }

    #[test]
    fn devices_cost_where_they_are() {
        let with = ClusterSize { gpus_per_node: 2, efa_per_node: 1, csi_volumes_per_node: 4, ..SMALL };
        let surplus = bill(&of(Preset::Enhanced), &with).metrics - bill(&of(Preset::Enhanced), &SMALL).metrics;
        let (efa, ebs) = (6 * (1 + 3), 11 * (1 + 3 + 12));
        // Six GPUs, so at most six pods, services and namespaces that have one.
        let (nodes, pods, containers) = (7 * (1 + 3 + 6), 7 * (1 + 5 + 6 + 6 + 6 + 6), 7 * (1 + 6 + 6 + 6));
        // What they have and ask for: three figures of nodes, four of pods.
        let share = 3 * (3 + 1) + 4 * (6 + 1 + 6 + 6);
        assert_eq!(surplus, efa + ebs + nodes + pods + containers + share);
        assert_eq!(bill(&of(Preset::Standard), &with).metrics, bill(&of(Preset::Standard), &SMALL).metrics);
    }

    #[test]
    fn tiers() {
        assert!((tiered(10_000.0) - 3000.0).abs() < 1e-9);
        assert!((tiered(10_100.0) - 3010.0).abs() < 1e-9);
        assert!((tiered(2_000_000.0) - (3000.0 + 24_000.0 + 37_500.0 + 20_000.0)).abs() < 1e-6);
    }

    #[test]
    fn documents_are_of_the_known_size() {
        let sizes = document_sizes(&of(Preset::Enhanced));
        assert_eq!(sizes.len(), DocType::ALL.len());
        assert!((2000..5000).contains(&sizes[&DocType::Pod]), "{sizes:?}");
        assert_eq!(document_sizes(&of(Preset::Standard)).len(), DocType::ALL.len() - 5, "devices are told with the enhanced preset only");
        assert!(document_sizes(&of(Preset::LogsOnly))[&DocType::Pod] < sizes[&DocType::Pod]);
    }
}
