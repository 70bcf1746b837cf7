//! The samples of one tick, in the units that encoders write: millicores, bytes, pieces and bytes per second.
//!
//! A rate is `None` until its counter was seen twice without a reset. Collectors make these, encoders read them, and neither
//! knows the other.

use std::sync::Arc;

use serde::Serialize;

use super::cgroup::MemoryCounters;
use super::devices::{DeviceSample, GpuSample};
use super::pods::PodMeta;
use super::proc::{Direction, MemInfo, Stat};

/// All samples of one tick.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Snapshot {
    /// When it was taken: milliseconds since 1970.
    pub wall_ms: i64,
    /// The node itself.
    pub node: NodeSample,
    /// Its file systems, one a device.
    pub filesystems: Vec<FilesystemSample>,
    /// Its block devices.
    pub disks: Vec<DiskSample>,
    /// Its interfaces (without the host ends of pods).
    pub interfaces: Vec<InterfaceSample>,
    /// What its ENA interfaces tell of the instance's network allowances.
    pub allowances: Vec<AllowanceSample>,
    /// Allowances that were exceeded since the tick before.
    pub alarms: Vec<AllowanceAlarm>,
    /// Its EFA devices.
    pub efa: Vec<DeviceSample>,
    /// Its EBS volumes, where the EBS CSI driver tells of them.
    pub volumes: Vec<DeviceSample>,
    /// Its GPUs, where dcgm-exporter tells of them.
    pub gpus: Vec<GpuSample>,
    /// Its pods, those without cgroups (pending, ended) included.
    pub pods: Vec<PodSample>,
    /// Pod cgroups that no known pod owns.
    pub unknown_pods: usize,
    /// The kernel's counters, for those who make rates themselves.
    #[serde(skip)]
    pub totals: Totals,
}

/// Counters since boot, as the kernel has them.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// /proc/stat.
    pub stat: Stat,
    /// /proc/meminfo.
    pub meminfo: MemInfo,
    /// Both directions of the interfaces in [`Snapshot::interfaces`].
    pub interfaces: Vec<(String, [Direction; 2])>,
    /// The devices in [`Snapshot::disks`].
    pub disks: Vec<DiskTotals>,
}

/// Counters of a block device since boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskTotals {
    /// `nvme0n1`
    pub device: String,
    /// Reads completed, bytes of them, milliseconds of them.
    pub reads: [u64; 3],
    /// Writes completed, bytes of them, milliseconds of them.
    pub writes: [u64; 3],
    /// Under way now.
    pub in_flight: u64,
    /// Milliseconds with anything under way.
    pub busy_ms: u64,
}

/// CPU use in millicores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cpu {
    /// All of it.
    pub total: f64,
    /// User mode.
    pub user: f64,
    /// Kernel mode.
    pub system: f64,
}

/// Page faults per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Faults {
    /// Of the cgroup itself.
    pub minor: f64,
    /// Of them, those that needed I/O.
    pub major: f64,
    /// With descendants.
    pub hierarchical_minor: f64,
    /// Of them, those that needed I/O.
    pub hierarchical_major: f64,
}

/// Memory use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// All that is charged, bytes.
    pub usage: u64,
    /// What could not be taken away without hurting, bytes.
    pub working_set: u64,
    /// Page cache, bytes.
    pub cache: u64,
    /// Anonymous, bytes.
    pub rss: u64,
    /// The most it was, bytes.
    pub max_usage: u64,
    /// Swapped out, bytes.
    pub swap: u64,
    /// Mapped files, bytes.
    pub mapped_file: u64,
    /// How often the limit was hit since the cgroup exists.
    pub failcnt: u64,
    /// Page faults.
    pub faults: Option<Faults>,
}

impl Memory {
    /// Sizes of a reading, with the fault rates made of it.
    pub fn new(counters: &MemoryCounters, faults: Option<Faults>) -> Self {
        Self {
            usage: counters.usage,
            working_set: counters.working_set(),
            cache: counters.cache,
            rss: counters.rss,
            max_usage: counters.max_usage,
            swap: counters.swap,
            mapped_file: counters.mapped_file,
            failcnt: counters.failcnt,
            faults,
        }
    }
}

/// One direction of an interface, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Flow {
    /// Bytes.
    pub bytes: f64,
    /// Packets.
    pub packets: f64,
    /// Dropped.
    pub dropped: f64,
    /// Errors.
    pub errors: f64,
}

/// Both directions of an interface as its owner sees them: a pod's `rx` is what came to the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Received.
    pub rx: Flow,
    /// Sent.
    pub tx: Flow,
}

impl Traffic {
    /// Sums two.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let sum = |a: Flow, b: Flow| Flow {
            bytes: a.bytes + b.bytes,
            packets: a.packets + b.packets,
            dropped: a.dropped + b.dropped,
            errors: a.errors + b.errors,
        };
        Self { rx: sum(self.rx, other.rx), tx: sum(self.tx, other.tx) }
    }

    /// What the owner's peer sees: a host end's received is its pod's sent.
    #[must_use]
    pub fn seen_from_the_other_end(self) -> Self {
        Self { rx: self.tx, tx: self.rx }
    }
}

/// The node.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NodeSample {
    /// CPU use.
    pub cpu: Option<Cpu>,
    /// Cores online, in millicores.
    pub cpu_limit: f64,
    /// Sum of the requests of its pods, millicores.
    pub cpu_request: f64,
    /// Memory use.
    pub memory: Memory,
    /// What the kernel manages, bytes.
    pub memory_limit: u64,
    /// Sum of the requests of its pods, bytes.
    pub memory_request: f64,
    /// Sum of the GPUs that its pods ask for.
    pub gpu_request: f64,
    /// Sum of those that its running pods have.
    pub gpu_usage: f64,
    /// Sum over its interfaces.
    pub net: Option<Traffic>,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// When it booted: milliseconds since 1970; 0 where the kernel does not tell.
    pub boot_ms: i64,
    /// Pods in phase Running.
    pub running_pods: usize,
    /// Containers in state running.
    pub running_containers: usize,
    /// What its Node object says, if it is known.
    pub status: Option<NodeStatus>,
}

/// Conditions and sizes from the Node object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NodeStatus {
    /// `Ready` is True.
    pub ready: bool,
    /// `DiskPressure` is True.
    pub disk_pressure: bool,
    /// `MemoryPressure` is True.
    pub memory_pressure: bool,
    /// `PIDPressure` is True.
    pub pid_pressure: bool,
    /// `NetworkUnavailable` is True.
    pub network_unavailable: bool,
    /// Any condition is Unknown.
    pub unknown: bool,
    /// Pods it can hold.
    pub capacity_pods: Option<f64>,
    /// Pods the scheduler may put there.
    pub allocatable_pods: Option<f64>,
    /// GPUs, if it has any.
    pub capacity_gpus: Option<f64>,
}

/// A file system.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FilesystemSample {
    /// `/dev/nvme0n1p1`.
    pub device: String,
    /// Its EBS volume (`vol-…`), if it is on one.
    pub volume: Option<String>,
    /// Bytes and inodes.
    pub size: FilesystemSize,
}

/// How full a file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FilesystemSize {
    /// All bytes.
    pub capacity: u64,
    /// Bytes obtainable without privilege.
    pub available: u64,
    /// Bytes in use.
    pub usage: u64,
    /// All inodes.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// A block device, per second.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DiskSample {
    /// `nvme0n1`.
    pub device: String,
    /// Its EBS volume (`vol-…`), if it is one.
    pub volume: Option<String>,
    /// Bytes read.
    pub read_bytes: f64,
    /// Bytes written.
    pub write_bytes: f64,
    /// Reads.
    pub reads: f64,
    /// Writes.
    pub writes: f64,
}

/// An interface of the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct InterfaceSample {
    /// `eth0`, `ens5`.
    pub name: String,
    /// Its traffic.
    pub traffic: Traffic,
}

/// What the ENA driver counted of packets beyond the instance's allowances, since the interface exists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AllowanceSample {
    /// `eth0`, `ens5`.
    pub interface: String,
    /// Queued or dropped for too many bytes received.
    pub bw_in: u64,
    /// Queued or dropped for too many bytes sent.
    pub bw_out: u64,
    /// Queued or dropped for too many packets.
    pub pps: u64,
    /// Dropped because no more connections can be tracked.
    pub conntrack: u64,
    /// Dropped for too many packets to DNS, metadata and time services.
    pub linklocal: u64,
    /// Connections that may still be tracked; `None` before driver 2.8.1.
    pub conntrack_available: Option<u64>,
}

impl AllowanceSample {
    /// From a driver's counters; `None` if the driver is not ENA.
    pub fn from_counters<'a>(interface: &str, counters: impl Iterator<Item = (&'a str, u64)>) -> Option<Self> {
        let mut out = Self { interface: interface.to_owned(), ..Self::default() };
        let mut found = false;
        for (name, value) in counters {
            let slot = match name {
                "bw_in_allowance_exceeded" => &mut out.bw_in,
                "bw_out_allowance_exceeded" => &mut out.bw_out,
                "pps_allowance_exceeded" => &mut out.pps,
                "conntrack_allowance_exceeded" => &mut out.conntrack,
                "linklocal_allowance_exceeded" => &mut out.linklocal,
                "conntrack_allowance_available" => out.conntrack_available.insert(0),
                _ => continue,
            };
            *slot = value;
            found = true;
        }
        found.then_some(out)
    }

    /// What rose since `before`; nothing where the driver began to count anew.
    pub fn risen_since(&self, before: &Self) -> impl Iterator<Item = AllowanceAlarm> {
        let pairs = self.exceeded().into_iter().zip(before.exceeded());
        pairs.filter_map(|((allowance, now), (_, before))| {
            let packets = now.checked_sub(before).filter(|packets| *packets > 0)?;
            Some(AllowanceAlarm { interface: self.interface.clone(), allowance, packets })
        })
    }

    /// Name and value of each counter of packets beyond an allowance.
    pub fn exceeded(&self) -> [(&'static str, u64); 5] {
        [("bw_in", self.bw_in), ("bw_out", self.bw_out), ("pps", self.pps), ("conntrack", self.conntrack), ("linklocal", self.linklocal)]
    }
}

/// An allowance of the instance that was exceeded between two ticks: nothing else tells why an instance drops packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AllowanceAlarm {
    /// `ens5`
    pub interface: String,
    /// `bw_in`, `bw_out`, `pps`, `conntrack`, `linklocal`
    pub allowance: &'static str,
    /// Queued or dropped.
    pub packets: u64,
}

impl AllowanceAlarm {
    /// For people: what happened and what helps.
    pub fn sentence(&self) -> String {
        let Self { interface, allowance, packets } = self;
        let (what, remedy) = match *allowance {
            "bw_in" => ("bandwidth of received data", "a larger instance type has more"),
            "bw_out" => ("bandwidth of sent data", "a larger instance type has more"),
            "pps" => ("packets a second", "a larger instance type has more"),
            "conntrack" => ("tracked connections", "a larger instance type has more; security groups that allow all traffic track none"),
            _ => ("packets to DNS, metadata and time services (1,024 a second for an interface)", "NodeLocal DNSCache spares them"),
        };
        format!("{packets} packets of {interface} were queued or dropped: the instance's allowance of {what} was exceeded; {remedy}")
    }
}

/// A pod.
#[derive(Clone, Debug, Serialize)]
pub struct PodSample {
    /// Who it is.
    pub meta: Arc<PodMeta>,
    /// CPU use.
    pub cpu: Option<Cpu>,
    /// Memory use.
    pub memory: Option<Memory>,
    /// Its traffic; `None` for a pod on the node's network.
    pub net: Option<Traffic>,
    /// What it received and sent since its interface exists.
    #[serde(skip)]
    pub net_totals: Option<[Direction; 2]>,
    /// Restarts of its containers since the last tick.
    pub restarts: u64,
    /// Packets a second that policy dropped; `None` for a pod without policy.
    pub denied: Option<f64>,
    /// Bytes a second read from its containers' logs; `None` where logs are not shipped.
    pub log_bytes: Option<f64>,
    /// Its containers that have a cgroup.
    pub containers: Vec<ContainerSample>,
}

impl PodSample {
    /// Whether there is something to tell: the object of a pod that ended may stay for days after its cgroup.
    pub fn is_told(&self) -> bool {
        self.meta.is_active() || self.cpu.is_some() || self.memory.is_some()
    }
}

/// A container.
#[derive(Clone, Debug, Serialize)]
pub struct ContainerSample {
    /// Its index in [`PodMeta::containers`].
    pub index: usize,
    /// CPU time since its cgroup exists, nanoseconds.
    #[serde(skip)]
    pub cpu_ns: Option<u64>,
    /// CPU use.
    pub cpu: Option<Cpu>,
    /// Memory use.
    pub memory: Option<Memory>,
    /// Restarts since the last tick.
    pub restarts: u64,
    /// Its own files, where the kubelet told.
    pub files: Option<FilesystemSize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ena_has_allowances() {
        let ena = [
            ("tx_timeout", 0),
            ("bw_in_allowance_exceeded", 3),
            ("linklocal_allowance_exceeded", 9),
            ("conntrack_allowance_available", 136_812),
        ];
        let sample = AllowanceSample::from_counters("ens5", ena.into_iter()).unwrap();
        assert_eq!((sample.bw_in, sample.linklocal, sample.conntrack_available), (3, 9, Some(136_812)));
        assert_eq!(AllowanceSample::from_counters("ens6", ena[..3].iter().copied()).unwrap().conntrack_available, None);
        let before = AllowanceSample { bw_in: 1, linklocal: 9, pps: 4, ..sample.clone() };
        let risen: Vec<_> = sample.risen_since(&before).collect();
        assert_eq!(risen, [AllowanceAlarm { interface: "ens5".into(), allowance: "bw_in", packets: 2 }]);
        assert!(risen[0].sentence().starts_with("2 packets of ens5"));
        assert_eq!(AllowanceSample::from_counters("eth0", [("rx_queue_0_packets", 7)].into_iter()), None);
    }
}
