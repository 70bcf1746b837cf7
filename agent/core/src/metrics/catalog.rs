//! Every metric of Container Insights that a node agent tells: field, unit, the types of document it is on, and the
//! dimensions under which CloudWatch keeps it.
//!
//! Names, units and dimensions are those of the CloudWatch agent's awscontainerinsight receiver, so that consoles, dashboards
//! and alarms read on.

use serde::{Deserialize, Serialize};

/// The CloudWatch namespace of all metrics here.
pub const NAMESPACE: &str = "ContainerInsights";

/// The unit of a field as CloudWatch spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Per cent.
    Percent,
    /// Bytes.
    Bytes,
    /// Bytes per second.
    BytesPerSecond,
    /// Pieces per second.
    CountPerSecond,
    /// Pieces.
    Count,
    /// Thousandths of a core: CloudWatch has no such unit and gets none.
    Millicores,
    /// Seconds.
    Seconds,
    /// Watts, degrees: CloudWatch has no such units.
    Plain,
}

impl Unit {
    /// The value of `Unit` in a metric directive.
    pub fn directive(self) -> Option<&'static str> {
        match self {
            Self::Percent => Some("Percent"),
            Self::Bytes => Some("Bytes"),
            Self::BytesPerSecond => Some("Bytes/Second"),
            Self::CountPerSecond => Some("Count/Second"),
            Self::Count => Some("Count"),
            Self::Seconds => Some("Seconds"),
            Self::Plain => Some("None"),
            Self::Millicores => None,
        }
    }
}

macro_rules! fields {
    ($($variant:ident $name:literal $unit:ident,)*) => {
        /// A number in a document, without the prefix that the document's type gives it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Field {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl Field {
            /// Every field.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name without prefix.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Its unit.
            pub const fn unit(self) -> Unit {
                match self { $(Self::$variant => Unit::$unit,)* }
            }
        }
    };
}

fields! {
    CpuUsageTotal "cpu_usage_total" Millicores,
    CpuUsageUser "cpu_usage_user" Millicores,
    CpuUsageSystem "cpu_usage_system" Millicores,
    CpuLimit "cpu_limit" Millicores,
    CpuRequest "cpu_request" Millicores,
    CpuUtilization "cpu_utilization" Percent,
    CpuReservedCapacity "cpu_reserved_capacity" Percent,
    CpuOverPodLimit "cpu_utilization_over_pod_limit" Percent,
    CpuOverContainerLimit "cpu_utilization_over_container_limit" Percent,
    MemoryUsage "memory_usage" Bytes,
    MemoryCache "memory_cache" Bytes,
    MemoryRss "memory_rss" Bytes,
    MemoryMaxUsage "memory_max_usage" Bytes,
    MemorySwap "memory_swap" Bytes,
    MemoryFailcnt "memory_failcnt" Count,
    MemoryMappedFile "memory_mapped_file" Bytes,
    MemoryWorkingSet "memory_working_set" Bytes,
    MemoryPgfault "memory_pgfault" CountPerSecond,
    MemoryPgmajfault "memory_pgmajfault" CountPerSecond,
    MemoryHierarchicalPgfault "memory_hierarchical_pgfault" CountPerSecond,
    MemoryHierarchicalPgmajfault "memory_hierarchical_pgmajfault" CountPerSecond,
    MemoryFailuresTotal "memory_failures_total" CountPerSecond,
    MemoryLimit "memory_limit" Bytes,
    MemoryRequest "memory_request" Bytes,
    MemoryUtilization "memory_utilization" Percent,
    MemoryReservedCapacity "memory_reserved_capacity" Percent,
    MemoryOverPodLimit "memory_utilization_over_pod_limit" Percent,
    MemoryOverContainerLimit "memory_utilization_over_container_limit" Percent,
    NetworkRxBytes "network_rx_bytes" BytesPerSecond,
    NetworkRxPackets "network_rx_packets" CountPerSecond,
    NetworkRxDropped "network_rx_dropped" CountPerSecond,
    NetworkRxErrors "network_rx_errors" CountPerSecond,
    NetworkTxBytes "network_tx_bytes" BytesPerSecond,
    NetworkTxPackets "network_tx_packets" CountPerSecond,
    NetworkTxDropped "network_tx_dropped" CountPerSecond,
    NetworkTxErrors "network_tx_errors" CountPerSecond,
    NetworkTotalBytes "network_total_bytes" BytesPerSecond,
    NumberOfRunningPods "number_of_running_pods" Count,
    NumberOfRunningContainers "number_of_running_containers" Count,
    NumberOfContainers "number_of_containers" Count,
    NumberOfContainerRestarts "number_of_container_restarts" Count,
    FilesystemUsage "filesystem_usage" Bytes,
    FilesystemCapacity "filesystem_capacity" Bytes,
    FilesystemAvailable "filesystem_available" Bytes,
    FilesystemUtilization "filesystem_utilization" Percent,
    FilesystemInodes "filesystem_inodes" Count,
    FilesystemInodesFree "filesystem_inodes_free" Count,
    DiskioBytesRead "diskio_io_service_bytes_read" BytesPerSecond,
    DiskioBytesWrite "diskio_io_service_bytes_write" BytesPerSecond,
    DiskioBytesTotal "diskio_io_service_bytes_total" BytesPerSecond,
    DiskioServicedRead "diskio_io_serviced_read" CountPerSecond,
    DiskioServicedWrite "diskio_io_serviced_write" CountPerSecond,
    DiskioServicedTotal "diskio_io_serviced_total" CountPerSecond,
    StatusConditionReady "status_condition_ready" Count,
    StatusConditionDiskPressure "status_condition_disk_pressure" Count,
    StatusConditionMemoryPressure "status_condition_memory_pressure" Count,
    StatusConditionPidPressure "status_condition_pid_pressure" Count,
    StatusConditionNetworkUnavailable "status_condition_network_unavailable" Count,
    StatusConditionUnknown "status_condition_unknown" Count,
    StatusCapacityPods "status_capacity_pods" Count,
    StatusAllocatablePods "status_allocatable_pods" Count,
    StatusReady "status_ready" Count,
    StatusScheduled "status_scheduled" Count,
    StatusRunning "status_running" Count,
    StatusPending "status_pending" Count,
    StatusFailed "status_failed" Count,
    StatusUnknown "status_unknown" Count,
    StatusSucceeded "status_succeeded" Count,
    ContainersRunning "container_status_running" Count,
    ContainersTerminated "container_status_terminated" Count,
    ContainersWaiting "container_status_waiting" Count,
    WaitingCrashLoop "container_status_waiting_reason_crash_loop_back_off" Count,
    WaitingImagePull "container_status_waiting_reason_image_pull_error" Count,
    WaitingStartError "container_status_waiting_reason_start_error" Count,
    WaitingCreateError "container_status_waiting_reason_create_container_error" Count,
    WaitingCreateConfigError "container_status_waiting_reason_create_container_config_error" Count,
    TerminatedOomKilled "container_status_terminated_reason_oom_killed" Count,
    EfaRxBytes "efa_rx_bytes" BytesPerSecond,
    EfaTxBytes "efa_tx_bytes" BytesPerSecond,
    EfaRxDropped "efa_rx_dropped" CountPerSecond,
    EfaRdmaReadBytes "efa_rdma_read_bytes" BytesPerSecond,
    EfaRdmaWriteBytes "efa_rdma_write_bytes" BytesPerSecond,
    EfaRdmaWriteRecvBytes "efa_rdma_write_recv_bytes" BytesPerSecond,
    GpuUtilization "gpu_utilization" Percent,
    GpuMemoryUtilization "gpu_memory_utilization" Percent,
    GpuMemoryTotal "gpu_memory_total" Bytes,
    GpuMemoryUsed "gpu_memory_used" Bytes,
    GpuPowerDraw "gpu_power_draw" Plain,
    GpuTemperature "gpu_temperature" Plain,
    GpuTensorCoreUtilization "gpu_tensor_core_utilization" Percent,
    GpuRequest "gpu_request" Count,
    GpuLimit "gpu_limit" Count,
    GpuUsageTotal "gpu_usage_total" Count,
    GpuReservedCapacity "gpu_reserved_capacity" Percent,
    EbsReadOps "diskio_ebs_total_read_ops" Count,
    EbsWriteOps "diskio_ebs_total_write_ops" Count,
    EbsReadBytes "diskio_ebs_total_read_bytes" Bytes,
    EbsWriteBytes "diskio_ebs_total_write_bytes" Bytes,
    EbsReadTime "diskio_ebs_total_read_time" Seconds,
    EbsWriteTime "diskio_ebs_total_write_time" Seconds,
    EbsVolumeExceededIops "diskio_ebs_volume_performance_exceeded_iops" Seconds,
    EbsVolumeExceededThroughput "diskio_ebs_volume_performance_exceeded_tp" Seconds,
    EbsInstanceExceededIops "diskio_ebs_ec2_instance_performance_exceeded_iops" Seconds,
    EbsInstanceExceededThroughput "diskio_ebs_ec2_instance_performance_exceeded_tp" Seconds,
    EbsQueueLength "diskio_ebs_volume_queue_length" Count,
}

/// The type of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DocType {
    /// The node.
    Node,
    /// A file system of it.
    NodeFS,
    /// A block device of it.
    NodeDiskIO,
    /// An interface of it.
    NodeNet,
    /// A pod.
    Pod,
    /// An interface of a pod.
    PodNet,
    /// A container.
    Container,
    /// A container's own files.
    ContainerFS,
    /// An EFA device of the node.
    NodeEFA,
    /// An EBS volume that is attached to it.
    NodeEBS,
    /// A GPU of it.
    NodeGPU,
    /// A GPU that a pod has.
    PodGPU,
    /// The same by container.
    ContainerGPU,
}

impl DocType {
    /// Every type.
    pub const ALL: [Self; 13] = [
        Self::Node,
        Self::NodeFS,
        Self::NodeDiskIO,
        Self::NodeNet,
        Self::Pod,
        Self::PodNet,
        Self::Container,
        Self::ContainerFS,
        Self::NodeEFA,
        Self::NodeEBS,
        Self::NodeGPU,
        Self::PodGPU,
        Self::ContainerGPU,
    ];

    /// The value of `Type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::NodeFS => "NodeFS",
            Self::NodeDiskIO => "NodeDiskIO",
            Self::NodeNet => "NodeNet",
            Self::Pod => "Pod",
            Self::PodNet => "PodNet",
            Self::Container => "Container",
            Self::ContainerFS => "ContainerFS",
            Self::NodeEFA => "NodeEFA",
            Self::NodeEBS => "NodeEBS",
            Self::NodeGPU => "NodeGPU",
            Self::PodGPU => "PodGPU",
            Self::ContainerGPU => "ContainerGPU",
        }
    }

    /// What precedes a field's name; the one exception is in [`field_name`].
    const fn prefix(self) -> &'static str {
        match self {
            Self::Node | Self::NodeFS | Self::NodeDiskIO | Self::NodeEFA | Self::NodeEBS | Self::NodeGPU => "node_",
            Self::NodeNet => "node_interface_",
            Self::Pod | Self::PodGPU => "pod_",
            Self::PodNet => "pod_interface_",
            Self::Container | Self::ContainerFS | Self::ContainerGPU => "container_",
        }
    }

    /// The value of `Sources`, as JSON.
    pub const fn sources(self) -> &'static str {
        match self {
            Self::Node => r#"["cadvisor","/proc","pod","calculated"]"#,
            Self::NodeFS | Self::NodeNet | Self::PodNet | Self::ContainerFS => r#"["cadvisor","calculated"]"#,
            Self::NodeDiskIO => r#"["cadvisor"]"#,
            Self::NodeEFA => r#"["/sys","calculated"]"#,
            Self::NodeEBS => r#"["ebs-csi-node","calculated"]"#,
            Self::NodeGPU | Self::PodGPU | Self::ContainerGPU => r#"["dcgm","pod","calculated"]"#,
            Self::Pod | Self::Container => r#"["cadvisor","pod","calculated"]"#,
        }
    }
}

/// The two parts of a field's name on a type of document.
pub const fn field_name(doc: DocType, field: Field) -> (&'static str, &'static str) {
    match (doc, field) {
        // Upstream gives this one no prefix, and queries rely on it.
        (DocType::Container, Field::NumberOfContainerRestarts) => ("", field.name()),
        _ => (doc.prefix(), field.name()),
    }
}

/// A dimension of a metric: the name of a tag at the document's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Tag {
    /// `ClusterName`
    ClusterName,
    /// `NodeName`
    NodeName,
    /// `InstanceId`
    InstanceId,
    /// `Namespace`
    Namespace,
    /// `PodName`: the workload's name, not the pod's.
    PodName,
    /// `FullPodName`
    FullPodName,
    /// `Service`
    Service,
    /// `ContainerName`
    ContainerName,
    /// `InstanceType`
    InstanceType,
    /// `GpuDevice`: `nvidia0`
    GpuDevice,
    /// `VolumeId`: `vol-…`
    VolumeId,
}

impl Tag {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterName => "ClusterName",
            Self::NodeName => "NodeName",
            Self::InstanceId => "InstanceId",
            Self::Namespace => "Namespace",
            Self::PodName => "PodName",
            Self::FullPodName => "FullPodName",
            Self::Service => "Service",
            Self::ContainerName => "ContainerName",
            Self::InstanceType => "InstanceType",
            Self::GpuDevice => "GpuDevice",
            Self::VolumeId => "VolumeId",
        }
    }
}

/// A set of tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tags(u16);

impl Tags {
    /// The set of these.
    pub const fn of(tags: &[Tag]) -> Self {
        let (mut bits, mut index) = (0, 0);
        while index < tags.len() {
            bits |= 1 << tags[index] as u16;
            index += 1;
        }
        Self(bits)
    }

    /// With one more.
    #[must_use]
    pub const fn with(self, tag: Tag) -> Self {
        Self(self.0 | 1 << tag as u16)
    }

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A set of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Fields(u128);

impl Fields {
    /// The set of these.
    pub const fn of(fields: &[Field]) -> Self {
        let (mut bits, mut index) = (0, 0);
        while index < fields.len() {
            bits |= 1 << fields[index] as u128;
            index += 1;
        }
        Self(bits)
    }

    /// Adds one.
    pub fn insert(&mut self, field: Field) {
        self.0 |= 1 << field as u128;
    }

    /// Whether it is in.
    pub const fn contains(self, field: Field) -> bool {
        self.0 >> field as u128 & 1 == 1
    }

    /// In both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Not in `other`.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// None at all.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Those in it, in the order of [`Field::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Field> {
        Field::ALL.iter().copied().filter(move |field| self.contains(*field))
    }
}

/// Metrics of a type of document and the dimension sets under which CloudWatch keeps each.
#[derive(Clone, Copy, Debug)]
pub struct Directive {
    /// On documents of this type.
    pub doc: DocType,
    /// These fields, as far as the document has them.
    pub fields: Fields,
    /// Those sets whose tags the document has.
    pub dimensions: &'static [&'static [Tag]],
}

/// Which metrics CloudWatch is told to make of the documents: each costs money every month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// None: the documents stay queryable by Logs Insights.
    LogsOnly,
    /// Utilisation of nodes and of namespaces and workloads, nothing per pod or service.
    Minimal,
    /// What the CloudWatch agent tells without enhanced observability.
    #[default]
    Standard,
    /// What it tells with `enhanced_container_insights`.
    Enhanced,
}

impl Preset {
    /// Every preset, the cheapest first.
    pub const ALL: [Self; 4] = [Self::LogsOnly, Self::Minimal, Self::Standard, Self::Enhanced];

    /// As written in settings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LogsOnly => "logsonly",
            Self::Minimal => "minimal",
            Self::Standard => "standard",
            Self::Enhanced => "enhanced",
        }
    }

    /// Its directives.
    pub const fn directives(self) -> &'static [Directive] {
        match self {
            Self::LogsOnly => &[],
            Self::Minimal => MINIMAL,
            Self::Standard => STANDARD,
            Self::Enhanced => ENHANCED,
        }
    }
}

impl std::str::FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(text: &str) -> Result<Self, UnknownPreset> {
        Self::ALL.into_iter().find(|preset| preset.name() == text).ok_or_else(|| UnknownPreset(text.to_owned()))
    }
}

/// A text that names no preset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no metric preset; there are logsonly, minimal, standard and enhanced")]
pub struct UnknownPreset(pub String);

const CLUSTER: &[Tag] = &[Tag::ClusterName];
const NODE: &[Tag] = &[Tag::NodeName, Tag::InstanceId, Tag::ClusterName];
const NAMESPACE_: &[Tag] = &[Tag::ClusterName, Tag::Namespace];
const SERVICE: &[Tag] = &[Tag::Service, Tag::Namespace, Tag::ClusterName];
const WORKLOAD: &[Tag] = &[Tag::PodName, Tag::Namespace, Tag::ClusterName];
const POD: &[Tag] = &[Tag::FullPodName, Tag::PodName, Tag::Namespace, Tag::ClusterName];
const CONTAINER: &[Tag] = &[Tag::ContainerName, Tag::PodName, Tag::Namespace, Tag::ClusterName];
const POD_CONTAINER: &[Tag] = &[Tag::ContainerName, Tag::FullPodName, Tag::PodName, Tag::Namespace, Tag::ClusterName];

const NODE_VOLUME: &[Tag] = &[Tag::NodeName, Tag::InstanceId, Tag::ClusterName, Tag::VolumeId];
const NODE_GPU: &[Tag] = &[Tag::NodeName, Tag::InstanceId, Tag::ClusterName, Tag::InstanceType, Tag::GpuDevice];
const POD_GPU: &[Tag] = &[Tag::FullPodName, Tag::PodName, Tag::Namespace, Tag::ClusterName, Tag::GpuDevice];
const CONTAINER_GPU: &[Tag] = &[Tag::ContainerName, Tag::FullPodName, Tag::PodName, Tag::Namespace, Tag::ClusterName, Tag::GpuDevice];

const NODE_BASE: &[Field] = &[
    Field::CpuUtilization,
    Field::MemoryUtilization,
    Field::NetworkTotalBytes,
    Field::CpuReservedCapacity,
    Field::MemoryReservedCapacity,
    Field::NumberOfRunningPods,
    Field::NumberOfRunningContainers,
];
const NODE_SIZES: &[Field] = &[Field::CpuUsageTotal, Field::CpuLimit, Field::MemoryWorkingSet, Field::MemoryLimit];
const POD_USE: &[Field] = &[
    Field::CpuUtilization,
    Field::MemoryUtilization,
    Field::NetworkRxBytes,
    Field::NetworkTxBytes,
    Field::CpuOverPodLimit,
    Field::MemoryOverPodLimit,
];

const MINIMAL: &[Directive] = &[
    Directive { doc: DocType::Node, fields: Fields::of(NODE_BASE), dimensions: &[CLUSTER] },
    Directive { doc: DocType::NodeFS, fields: Fields::of(&[Field::FilesystemUtilization]), dimensions: &[CLUSTER] },
    Directive {
        doc: DocType::Pod,
        fields: Fields::of(&[Field::CpuUtilization, Field::MemoryUtilization, Field::CpuOverPodLimit, Field::MemoryOverPodLimit]),
        dimensions: &[NAMESPACE_],
    },
];

const STANDARD: &[Directive] = &[
    Directive { doc: DocType::Node, fields: Fields::of(NODE_BASE), dimensions: &[NODE, CLUSTER] },
    Directive { doc: DocType::Node, fields: Fields::of(NODE_SIZES), dimensions: &[CLUSTER] },
    Directive { doc: DocType::NodeFS, fields: Fields::of(&[Field::FilesystemUtilization]), dimensions: &[NODE, CLUSTER] },
    Directive { doc: DocType::Pod, fields: Fields::of(POD_USE), dimensions: &[WORKLOAD, CLUSTER, SERVICE, NAMESPACE_] },
    Directive {
        doc: DocType::Pod,
        fields: Fields::of(&[Field::CpuReservedCapacity, Field::MemoryReservedCapacity]),
        dimensions: &[WORKLOAD, CLUSTER],
    },
    Directive { doc: DocType::Pod, fields: Fields::of(&[Field::NumberOfContainerRestarts]), dimensions: &[WORKLOAD] },
];

const ENHANCED: &[Directive] = &[
    Directive { doc: DocType::Node, fields: Fields::of(NODE_BASE), dimensions: &[NODE, CLUSTER] },
    Directive { doc: DocType::Node, fields: Fields::of(NODE_SIZES), dimensions: &[NODE, CLUSTER] },
    Directive {
        doc: DocType::Node,
        fields: Fields::of(&[
            Field::StatusConditionReady,
            Field::StatusConditionDiskPressure,
            Field::StatusConditionMemoryPressure,
            Field::StatusConditionPidPressure,
            Field::StatusConditionNetworkUnavailable,
            Field::StatusConditionUnknown,
            Field::StatusCapacityPods,
            Field::StatusAllocatablePods,
        ]),
        dimensions: &[NODE, CLUSTER],
    },
    Directive { doc: DocType::Node, fields: GPU_SHARE.minus(Fields::of(&[Field::GpuRequest])), dimensions: &[NODE, CLUSTER] },
    Directive {
        doc: DocType::NodeNet,
        fields: Fields::of(&[Field::NetworkRxDropped, Field::NetworkTxDropped]),
        dimensions: &[NODE, CLUSTER],
    },
    Directive {
        doc: DocType::NodeDiskIO,
        fields: Fields::of(&[Field::DiskioBytesTotal, Field::DiskioServicedTotal]),
        dimensions: &[NODE, CLUSTER],
    },
    Directive {
        doc: DocType::NodeFS,
        fields: Fields::of(&[Field::FilesystemUtilization, Field::FilesystemInodes, Field::FilesystemInodesFree]),
        dimensions: &[NODE, CLUSTER],
    },
    Directive { doc: DocType::Pod, fields: Fields::of(POD_USE), dimensions: &[POD, WORKLOAD, CLUSTER, SERVICE, NAMESPACE_] },
    Directive {
        doc: DocType::Pod,
        fields: Fields::of(&[
            Field::CpuReservedCapacity,
            Field::MemoryReservedCapacity,
            Field::NumberOfContainerRestarts,
            Field::NumberOfContainers,
            Field::NumberOfRunningContainers,
            Field::StatusReady,
            Field::StatusScheduled,
            Field::StatusRunning,
            Field::StatusPending,
            Field::StatusFailed,
            Field::StatusUnknown,
            Field::StatusSucceeded,
            Field::MemoryRequest,
            Field::MemoryLimit,
            Field::CpuLimit,
            Field::CpuRequest,
            Field::CpuUsageTotal,
            Field::MemoryWorkingSet,
            Field::ContainersRunning,
            Field::ContainersTerminated,
            Field::ContainersWaiting,
            Field::WaitingCrashLoop,
            Field::WaitingImagePull,
            Field::WaitingStartError,
            Field::WaitingCreateError,
            Field::WaitingCreateConfigError,
            Field::TerminatedOomKilled,
        ]),
        dimensions: &[WORKLOAD, CLUSTER, POD, SERVICE],
    },
    Directive { doc: DocType::Pod, fields: GPU_SHARE, dimensions: &[WORKLOAD, CLUSTER, POD, SERVICE] },
    Directive {
        doc: DocType::PodNet,
        fields: Fields::of(&[Field::NetworkRxDropped, Field::NetworkTxDropped]),
        dimensions: &[POD, WORKLOAD, NAMESPACE_, CLUSTER],
    },
    Directive {
        doc: DocType::Container,
        fields: Fields::of(&[
            Field::CpuUtilization,
            Field::CpuOverContainerLimit,
            Field::CpuLimit,
            Field::CpuRequest,
            Field::MemoryUtilization,
            Field::MemoryOverContainerLimit,
            Field::MemoryFailuresTotal,
            Field::MemoryLimit,
            Field::MemoryRequest,
        ]),
        dimensions: &[CLUSTER, POD_CONTAINER, CONTAINER],
    },
    Directive {
        doc: DocType::ContainerFS,
        fields: Fields::of(&[Field::FilesystemUsage, Field::FilesystemAvailable, Field::FilesystemUtilization]),
        dimensions: &[CLUSTER, POD_CONTAINER, CONTAINER],
    },
    Directive { doc: DocType::NodeEFA, fields: EFA, dimensions: &[CLUSTER, NODE] },
    Directive { doc: DocType::NodeEBS, fields: EBS, dimensions: &[CLUSTER, NODE, NODE_VOLUME] },
    Directive { doc: DocType::NodeGPU, fields: GPU, dimensions: &[CLUSTER, NODE, NODE_GPU] },
    Directive { doc: DocType::PodGPU, fields: GPU, dimensions: &[CLUSTER, NAMESPACE_, SERVICE, WORKLOAD, POD, POD_GPU] },
    Directive { doc: DocType::ContainerGPU, fields: GPU, dimensions: &[CLUSTER, CONTAINER, POD_CONTAINER, CONTAINER_GPU] },
];

/// Which fields a type of document may have.
pub const fn fields_of(doc: DocType) -> Fields {
    match doc {
        DocType::Node => Fields(
            CPU.0
                | MEMORY.0
                | NET.0
                | GPU_SHARE.0
                | Fields::of(NODE_BASE).0
                | Fields::of(NODE_SIZES).0
                | Fields::of(&[
                    Field::CpuRequest,
                    Field::MemoryRequest,
                    Field::StatusConditionReady,
                    Field::StatusConditionDiskPressure,
                    Field::StatusConditionMemoryPressure,
                    Field::StatusConditionPidPressure,
                    Field::StatusConditionNetworkUnavailable,
                    Field::StatusConditionUnknown,
                    Field::StatusCapacityPods,
                    Field::StatusAllocatablePods,
                ])
                .0,
        ),
        DocType::NodeFS => FILESYSTEM,
        DocType::ContainerFS => FILESYSTEM.minus(Fields::of(&[Field::FilesystemInodes, Field::FilesystemInodesFree])),
        DocType::NodeDiskIO => Fields::of(&[
            Field::DiskioBytesRead,
            Field::DiskioBytesWrite,
            Field::DiskioBytesTotal,
            Field::DiskioServicedRead,
            Field::DiskioServicedWrite,
            Field::DiskioServicedTotal,
        ]),
        DocType::NodeNet | DocType::PodNet => NET,
        DocType::NodeEFA => EFA,
        DocType::NodeEBS => EBS,
        DocType::NodeGPU | DocType::PodGPU | DocType::ContainerGPU => GPU,
        DocType::Pod => Fields(
            CPU.0
                | MEMORY.0
                | NET.0
                | GPU_SHARE.0
                | POD_OWN.0
                | Fields::of(&[
                    Field::CpuOverPodLimit,
                    Field::MemoryOverPodLimit,
                    Field::CpuReservedCapacity,
                    Field::MemoryReservedCapacity,
                ])
                .0,
        ),
        DocType::Container => Fields(
            CPU.0
                | MEMORY.0
                | Fields::of(&[Field::CpuOverContainerLimit, Field::MemoryOverContainerLimit, Field::NumberOfContainerRestarts]).0,
        ),
    }
}

const CPU: Fields = Fields::of(&[
    Field::CpuUsageTotal,
    Field::CpuUsageUser,
    Field::CpuUsageSystem,
    Field::CpuLimit,
    Field::CpuRequest,
    Field::CpuUtilization,
]);
const MEMORY: Fields = Fields::of(&[
    Field::MemoryUsage,
    Field::MemoryCache,
    Field::MemoryRss,
    Field::MemoryMaxUsage,
    Field::MemorySwap,
    Field::MemoryFailcnt,
    Field::MemoryMappedFile,
    Field::MemoryWorkingSet,
    Field::MemoryPgfault,
    Field::MemoryPgmajfault,
    Field::MemoryHierarchicalPgfault,
    Field::MemoryHierarchicalPgmajfault,
    Field::MemoryFailuresTotal,
    Field::MemoryLimit,
    Field::MemoryRequest,
    Field::MemoryUtilization,
]);
const NET: Fields = Fields::of(&[
    Field::NetworkRxBytes,
    Field::NetworkRxPackets,
    Field::NetworkRxDropped,
    Field::NetworkRxErrors,
    Field::NetworkTxBytes,
    Field::NetworkTxPackets,
    Field::NetworkTxDropped,
    Field::NetworkTxErrors,
    Field::NetworkTotalBytes,
]);
const EFA: Fields = Fields::of(&[
    Field::EfaRxBytes,
    Field::EfaTxBytes,
    Field::EfaRxDropped,
    Field::EfaRdmaReadBytes,
    Field::EfaRdmaWriteBytes,
    Field::EfaRdmaWriteRecvBytes,
]);
const GPU: Fields = Fields::of(&[
    Field::GpuUtilization,
    Field::GpuMemoryUtilization,
    Field::GpuMemoryTotal,
    Field::GpuMemoryUsed,
    Field::GpuPowerDraw,
    Field::GpuTemperature,
    Field::GpuTensorCoreUtilization,
]);
/// GPUs as a node has and its pods ask for them; only where there are any.
pub const GPU_SHARE: Fields = Fields::of(&[Field::GpuRequest, Field::GpuLimit, Field::GpuUsageTotal, Field::GpuReservedCapacity]);
const EBS: Fields = Fields::of(&[
    Field::EbsReadOps,
    Field::EbsWriteOps,
    Field::EbsReadBytes,
    Field::EbsWriteBytes,
    Field::EbsReadTime,
    Field::EbsWriteTime,
    Field::EbsVolumeExceededIops,
    Field::EbsVolumeExceededThroughput,
    Field::EbsInstanceExceededIops,
    Field::EbsInstanceExceededThroughput,
    Field::EbsQueueLength,
]);
const FILESYSTEM: Fields = Fields::of(&[
    Field::FilesystemUsage,
    Field::FilesystemCapacity,
    Field::FilesystemAvailable,
    Field::FilesystemUtilization,
    Field::FilesystemInodes,
    Field::FilesystemInodesFree,
]);
const POD_OWN: Fields = Fields::of(&[
    Field::NumberOfContainerRestarts,
    Field::NumberOfContainers,
    Field::NumberOfRunningContainers,
    Field::StatusReady,
    Field::StatusScheduled,
    Field::StatusRunning,
    Field::StatusPending,
    Field::StatusFailed,
    Field::StatusUnknown,
    Field::StatusSucceeded,
    Field::ContainersRunning,
    Field::ContainersTerminated,
    Field::ContainersWaiting,
    Field::WaitingCrashLoop,
    Field::WaitingImagePull,
    Field::WaitingStartError,
    Field::WaitingCreateError,
    Field::WaitingCreateConfigError,
    Field::TerminatedOomKilled,
]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directive_names_fields_that_its_document_can_have() {
        for preset in Preset::ALL {
            for directive in preset.directives() {
                assert!(directive.fields.minus(fields_of(directive.doc)).is_empty(), "{preset:?} {directive:?}");
                assert!(directive.fields.len() <= 100, "EMF takes at most 100 metrics a directive");
                assert!(!directive.dimensions.is_empty() && directive.dimensions.iter().all(|set| set.len() <= 30));
            }
        }
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        assert!(Field::ALL.len() <= 128, "Fields is a u128");
        for field in Field::ALL {
            assert_eq!(Fields::of(&[*field]).iter().collect::<Vec<_>>(), [*field]);
        }
        assert!(Tags::of(POD).contains(Tags::of(WORKLOAD)) && !Tags::of(WORKLOAD).contains(Tags::of(POD)));
    }

    #[test]
    fn names_are_upstreams() {
        let name = |doc, field| {
            let (prefix, rest) = field_name(doc, field);
            format!("{prefix}{rest}")
        };
        assert_eq!(name(DocType::Container, Field::NumberOfContainerRestarts), "number_of_container_restarts");
        assert_eq!(name(DocType::Pod, Field::NumberOfContainerRestarts), "pod_number_of_container_restarts");
        assert_eq!(name(DocType::PodNet, Field::NetworkRxDropped), "pod_interface_network_rx_dropped");
        assert_eq!(name(DocType::NodeFS, Field::FilesystemUtilization), "node_filesystem_utilization");
        assert_eq!(name(DocType::Pod, Field::ContainersRunning), "pod_container_status_running");
        assert_eq!(name(DocType::NodeEBS, Field::EbsVolumeExceededThroughput), "node_diskio_ebs_volume_performance_exceeded_tp");
        assert_eq!(name(DocType::NodeEFA, Field::EfaRdmaWriteRecvBytes), "node_efa_rdma_write_recv_bytes");
        assert_eq!(name(DocType::ContainerGPU, Field::GpuMemoryUsed), "container_gpu_memory_used");
        assert_eq!(name(DocType::Node, Field::GpuReservedCapacity), "node_gpu_reserved_capacity");
    }
}
