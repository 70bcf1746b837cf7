//! What one pass over /proc and the cgroups read, and how it becomes samples.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::cgroup::{CpuCounters, MemoryCounters};
use super::devices::{DeviceTracker, EfaReading, ExporterReadings};
use super::model::{
    AllowanceSample, ContainerSample, Cpu, DiskSample, DiskTotals, Faults, FilesystemSample, FilesystemSize, Flow, InterfaceSample, Memory,
    NodeSample, PodSample, Snapshot, Totals, Traffic,
};
use super::pods::{ContainerState, PodMeta, PodTable};
use super::proc::{self, InterfaceCounters, MemInfo, Stat};
use super::rate::{Delta, Rate};
use crate::ids::PodName;

/// Interfaces that cAdvisor leaves out, by the beginning of their names.
const IGNORED_INTERFACES: [&str; 8] = ["lo", "veth", "docker", "cni", "nerdctl", "dummy", "ifb", "kube-"];
/// Block devices that are no disks.
const IGNORED_DISKS: [&str; 5] = ["loop", "ram", "zram", "sr", "fd"];

/// What one pass read: counters as the kernel gives them.
#[derive(Clone, Debug)]
pub struct Readings<'a> {
    /// Monotonic time of the reads of /proc.
    pub at: Duration,
    /// Milliseconds since 1970.
    pub wall_ms: i64,
    /// /proc/stat.
    pub stat: Stat,
    /// /proc/meminfo.
    pub meminfo: MemInfo,
    /// The root cgroup's memory, where it tells (v1; on v2 without usage).
    pub root_memory: Option<MemoryCounters>,
    /// /proc/loadavg.
    pub load: [f64; 3],
    /// The host's /proc/…/net/dev as it is.
    pub net_dev: &'a str,
    /// Interfaces with a device behind them.
    pub physical_interfaces: &'a BTreeSet<String>,
    /// /proc/diskstats as it is.
    pub diskstats: &'a str,
    /// Whole disks and the EBS volume each is.
    pub disks: &'a HashMap<String, Option<String>>,
    /// File systems, one a device.
    pub filesystems: Vec<FilesystemSample>,
    /// What ENA interfaces tell of allowances.
    pub allowances: Vec<AllowanceSample>,
    /// Counters of EFA devices.
    pub efa: Vec<EfaReading>,
    /// What the exporters of GPUs and volumes told last.
    pub exported: &'a ExporterReadings,
    /// Cgroups of pods and containers.
    pub cgroups: &'a [CgroupReading],
    /// Containers' own files, where the kubelet told.
    pub container_files: &'a ContainerFiles,
    /// What other parts of the agent counted.
    pub pod_counters: &'a HashMap<PodName, PodCounters>,
}

/// What other parts of the agent counted for a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounters {
    /// Packets that policy dropped, both directions; `None` without policy.
    pub denied: Option<u64>,
    /// Bytes read from the log files that are open now; `None` where logs are not shipped.
    pub log_bytes: Option<u64>,
}

/// Containers' own files by pod uid, each with the container's name.
pub type ContainerFiles = HashMap<String, Vec<(String, FilesystemSize)>>;

/// Which cgroup it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId {
    /// The pod's uid in the API's form.
    pub pod_uid: String,
    /// The runtime's id; `None` for the pod's own cgroup.
    pub container: Option<String>,
}

/// What a cgroup's files said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupReading {
    /// Whose.
    pub id: Arc<CgroupId>,
    /// Monotonic time of the reads.
    pub at: Duration,
    /// CPU time.
    pub cpu: Option<CpuCounters>,
    /// Memory.
    pub memory: Option<MemoryCounters>,
}

/// Where our figures and the CloudWatch agent's differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Figures {
    /// Each byte counts once and stolen time is not use.
    #[default]
    Correct,
    /// As the CloudWatch agent counts: the pods' host ends are part of the node's network, and stolen time is CPU use.
    Upstream,
}

/// The counters of the last tick: as many as there are cgroups and interfaces now, no history.
#[derive(Debug, Default)]
pub struct Tracker {
    figures: Figures,
    tick: u64,
    /// User, system, stolen and idle time of all processors, nanoseconds.
    cpu: Option<[u64; 4]>,
    root_faults: [Rate; 4],
    cgroups: HashMap<Arc<CgroupId>, CgroupState>,
    interfaces: HashMap<String, Seen<[Rate; 8]>>,
    disks: HashMap<String, Seen<[Rate; 4]>>,
    pods: HashMap<String, Seen<PodState>>,
    allowances: Vec<AllowanceSample>,
    devices: DeviceTracker,
}

#[derive(Debug, Default)]
struct CgroupState {
    tick: u64,
    cpu: [Rate; 3],
    faults: [Rate; 4],
}

/// What is remembered of a pod besides its cgroups.
#[derive(Debug, Default)]
struct PodState {
    restarts: Vec<(String, Delta)>,
    denied: Rate,
    log_bytes: Rate,
}

#[derive(Debug, Default)]
struct Seen<T> {
    tick: u64,
    state: T,
}

/// An interface in one pass.
#[derive(Clone, Copy, Debug)]
struct Wire<'a> {
    traffic: Option<Traffic>,
    counters: InterfaceCounters<'a>,
}

impl Tracker {
    /// Nothing seen yet.
    pub fn new(figures: Figures) -> Self {
        Self { figures, ..Self::default() }
    }

    /// Turns one pass into samples. What is gone is forgotten.
    pub fn observe(&mut self, readings: &Readings<'_>, table: &PodTable) -> Snapshot {
        self.tick += 1;
        let wires = self.interfaces(readings);
        let mut pods: Vec<PodSample> = table.pods().map(|meta| self.pod(meta, &wires)).collect();
        let mut unknown_pods = 0;
        for reading in readings.cgroups {
            let (cpu, memory) = self.cgroup(reading);
            let Some(pod) = table.position(&reading.id.pod_uid).and_then(|at| pods.get_mut(at)) else {
                unknown_pods += usize::from(reading.id.container.is_none());
                continue;
            };
            match &reading.id.container {
                None => (pod.cpu, pod.memory) = (cpu, memory),
                Some(id) => {
                    // The sandbox has a cgroup but no container status.
                    let Some(index) = pod.meta.containers.iter().position(|container| container.id == *id) else { continue };
                    let name = &pod.meta.containers[index].name;
                    let files = readings.container_files.get(&pod.meta.uid).and_then(|of| of.iter().find(|(of, _)| of == name));
                    let files = files.map(|(_, size)| *size);
                    let cpu_ns = reading.cpu.map(|cpu| cpu.usage_ns);
                    pod.containers.push(ContainerSample { index, cpu_ns, cpu, memory, restarts: 0, files });
                }
            }
        }
        for pod in &mut pods {
            let meta = Arc::clone(&pod.meta);
            let state = self.pod_state(&meta.uid);
            let deltas: Vec<u64> = meta.containers.iter().map(|container| state.restarted(&container.name, container.restarts)).collect();
            pod.restarts = deltas.iter().zip(&meta.containers).filter(|(_, container)| !container.sidecar).map(|(delta, _)| delta).sum();
            for container in &mut pod.containers {
                container.restarts = deltas.get(container.index).copied().unwrap_or(0);
            }
            let counters = readings.pod_counters.get(&PodName::new(meta.namespace.clone(), meta.name.clone())).copied().unwrap_or_default();
            pod.denied = counters.denied.and_then(|packets| state.denied.update(readings.at, packets));
            pod.log_bytes = counters.log_bytes.and_then(|bytes| state.log_bytes.update(readings.at, bytes));
        }
        let interfaces = self.node_interfaces(readings, table, &wires);
        let node = self.node(readings, table, &interfaces);
        let disks = self.disks(readings);
        let before = |sample: &AllowanceSample| self.allowances.iter().find(|before| before.interface == sample.interface);
        let alarms = readings.allowances.iter().filter_map(|sample| Some(sample.risen_since(before(sample)?))).flatten().collect();
        self.allowances.clone_from(&readings.allowances);
        let totals = totals(readings, &wires, &interfaces, &disks);
        let efa = self.devices.efa(readings.at, &readings.efa);
        let (gpus, volumes) = self.devices.exported(readings.exported);
        self.forget();
        Snapshot {
            wall_ms: readings.wall_ms,
            node,
            filesystems: readings.filesystems.clone(),
            disks,
            interfaces,
            allowances: readings.allowances.clone(),
            alarms,
            efa,
            volumes,
            gpus,
            pods,
            unknown_pods,
            totals,
        }
    }

    fn cgroup(&mut self, reading: &CgroupReading) -> (Option<Cpu>, Option<Memory>) {
        let tick = self.tick;
        let state = match self.cgroups.get_mut(&reading.id) {
            Some(state) => state,
            None => self.cgroups.entry(Arc::clone(&reading.id)).or_default(),
        };
        state.tick = tick;
        let cpu = reading.cpu.and_then(|cpu| {
            let rates = Rate::update_all(&mut state.cpu, reading.at, [cpu.usage_ns, cpu.user_ns, cpu.system_ns])?;
            Some(millicores(rates))
        });
        let memory = reading.memory.map(|memory| Memory::new(&memory, faults(&mut state.faults, reading.at, &memory)));
        (cpu, memory)
    }

    /// Traffic of every interface as the node sees it, and what it is made of.
    fn interfaces<'a>(&mut self, readings: &Readings<'a>) -> HashMap<&'a str, Wire<'a>> {
        let tick = self.tick;
        let mut out = HashMap::with_capacity(self.interfaces.len());
        for counters in proc::net_dev(readings.net_dev) {
            let entry = match self.interfaces.get_mut(counters.name) {
                Some(entry) => entry,
                None => self.interfaces.entry(counters.name.to_owned()).or_default(),
            };
            entry.tick = tick;
            let traffic = traffic(&mut entry.state, readings.at, &counters);
            out.insert(counters.name, Wire { traffic, counters });
        }
        out
    }

    fn pod(&self, meta: &Arc<PodMeta>, wires: &HashMap<&str, Wire<'_>>) -> PodSample {
        let wire = if meta.host_network { None } else { wires.get(meta.host_interface.as_str()) };
        PodSample {
            meta: Arc::clone(meta),
            cpu: None,
            memory: None,
            net: wire.and_then(|wire| wire.traffic).map(Traffic::seen_from_the_other_end),
            net_totals: wire.map(|wire| [wire.counters.tx, wire.counters.rx]),
            restarts: 0,
            denied: None,
            log_bytes: None,
            containers: Vec::new(),
        }
    }

    fn pod_state(&mut self, uid: &str) -> &mut PodState {
        let tick = self.tick;
        if !self.pods.contains_key(uid) {
            self.pods.insert(uid.to_owned(), Seen::default());
        }
        let entry = self.pods.get_mut(uid).expect("just inserted");
        entry.tick = tick;
        &mut entry.state
    }

    fn node_interfaces(&self, readings: &Readings<'_>, table: &PodTable, wires: &HashMap<&str, Wire<'_>>) -> Vec<InterfaceSample> {
        let pods: BTreeSet<&str> = table.pods().map(|pod| pod.host_interface.as_str()).collect();
        let counted = |name: &str| match self.figures {
            Figures::Upstream => !IGNORED_INTERFACES.iter().any(|prefix| name.starts_with(prefix)),
            Figures::Correct if !readings.physical_interfaces.is_empty() => readings.physical_interfaces.contains(name),
            // A branch ENI's VLAN carries what its trunk counts too.
            Figures::Correct => {
                !pods.contains(name) && !name.starts_with("vlan") && !IGNORED_INTERFACES.iter().any(|prefix| name.starts_with(prefix))
            }
        };
        let mut out: Vec<_> = wires
            .iter()
            .filter(|(name, _)| counted(name))
            .filter_map(|(name, wire)| Some(InterfaceSample { name: (*name).to_owned(), traffic: wire.traffic? }))
            .collect();
        out.sort_by(|a, b| a.name.cmp(&b.name));
        out
    }

    fn node(&mut self, readings: &Readings<'_>, table: &PodTable, interfaces: &[InterfaceSample]) -> NodeSample {
        let cpu = self.node_cpu(readings);
        let memory = node_memory(&readings.meminfo, readings.root_memory);
        let faults = readings.root_memory.and_then(|root| faults(&mut self.root_faults, readings.at, &root));
        let active = || table.pods().filter(|pod| pod.is_active());
        let (cpu_limit, memory_limit) = (f64::from(readings.stat.online) * 1000.0, readings.meminfo.total);
        NodeSample {
            cpu,
            cpu_limit,
            cpu_request: active().filter_map(|pod| bounded(pod.requests.cpu, cpu_limit)).sum(),
            memory: Memory::new(&memory, faults),
            memory_limit,
            memory_request: active().filter_map(|pod| bounded(pod.requests.memory, memory_limit as f64)).sum(),
            gpu_request: active().filter_map(|pod| pod.gpus).map(|gpus| gpus.request).sum(),
            gpu_usage: active().filter(|pod| pod.phase == "Running").filter_map(|pod| pod.gpus).map(|gpus| gpus.limit).sum(),
            net: interfaces.iter().map(|interface| interface.traffic).reduce(Traffic::plus),
            load: readings.load,
            boot_ms: i64::try_from(readings.stat.boot_time.saturating_mul(1000)).unwrap_or(0),
            running_pods: table.pods().filter(|pod| pod.phase == "Running").count(),
            running_containers: table.pods().flat_map(|pod| pod.own_containers()).filter(|c| c.state == ContainerState::Running).count(),
            status: table.node,
        }
    }

    /// The node's CPU use as a share of the time that /proc/stat itself accounts for.
    ///
    /// Dividing by a clock of ours instead gave 100.2 % of a busy node: the kernel counts in ticks of 10 ms, each field of each
    /// processor rounded by itself, and the clock is read at another moment than the counters.
    fn node_cpu(&mut self, readings: &Readings<'_>) -> Option<Cpu> {
        let ticks = readings.stat.cpu;
        let now = [ticks.user_ns(), ticks.system_ns(), ticks.steal_ns(), ticks.idle_ns()];
        let last = self.cpu.replace(now)?;
        // Idle and I/O wait are estimates that may go back a little; use never does unless its counters began anew.
        if now[0] < last[0] || now[1] < last[1] {
            return None;
        }
        let [user, system, stolen, idle] = std::array::from_fn(|at| now[at].saturating_sub(last[at]) as f64);
        let accounted = user + system + stolen + idle;
        if accounted <= 0.0 {
            return None;
        }
        let limit = f64::from(readings.stat.online) * 1000.0;
        let share = |part: f64| part / accounted * limit;
        let used = if self.figures == Figures::Upstream { user + system + stolen } else { user + system };
        Some(Cpu { total: share(used).min(limit), user: share(user), system: share(system) })
    }

    fn disks(&mut self, readings: &Readings<'_>) -> Vec<DiskSample> {
        let tick = self.tick;
        let mut out = Vec::new();
        for disk in proc::diskstats(readings.diskstats) {
            let volume = match readings.disks.get(disk.name) {
                Some(volume) => volume.clone(),
                None if readings.disks.is_empty() => None,
                // A partition, or no disk.
                None => continue,
            };
            let used = disk.reads > 0 || disk.writes > 0;
            if !used || IGNORED_DISKS.iter().any(|prefix| disk.name.starts_with(prefix)) {
                continue;
            }
            let entry = match self.disks.get_mut(disk.name) {
                Some(entry) => entry,
                None => self.disks.entry(disk.name.to_owned()).or_default(),
            };
            entry.tick = tick;
            let counters = [disk.read_bytes, disk.write_bytes, disk.reads, disk.writes];
            if let Some([read_bytes, write_bytes, reads, writes]) = Rate::update_all(&mut entry.state, readings.at, counters) {
                out.push(DiskSample { device: disk.name.to_owned(), volume, read_bytes, write_bytes, reads, writes });
            }
        }
        out
    }

    fn forget(&mut self) {
        let tick = self.tick;
        self.cgroups.retain(|_, state| state.tick == tick);
        self.interfaces.retain(|_, seen| seen.tick == tick);
        self.disks.retain(|_, seen| seen.tick == tick);
        self.pods.retain(|_, seen| seen.tick == tick);
    }
}

impl PodState {
    /// Restarts of a container since the last tick.
    fn restarted(&mut self, container: &str, restarts: u64) -> u64 {
        let at = self.restarts.iter().position(|(name, _)| name == container).unwrap_or_else(|| {
            self.restarts.push((container.to_owned(), Delta::default()));
            self.restarts.len() - 1
        });
        self.restarts[at].1.update(restarts)
    }
}

/// What a pod asks for, or may have at most, is told as no more than the node has; nothing asked is not told.
pub fn bounded(amount: Option<f64>, node: f64) -> Option<f64> {
    amount.filter(|amount| *amount > 0.0).map(|amount| if node > 0.0 { amount.min(node) } else { amount })
}

/// The counters of what the snapshot tells.
fn totals(readings: &Readings<'_>, wires: &HashMap<&str, Wire<'_>>, interfaces: &[InterfaceSample], disks: &[DiskSample]) -> Totals {
    let both = |name: &str| wires.get(name).map(|wire| [wire.counters.rx, wire.counters.tx]).unwrap_or_default();
    let told = proc::diskstats(readings.diskstats).filter(|disk| disks.iter().any(|told| told.device == disk.name));
    Totals {
        stat: readings.stat.clone(),
        meminfo: readings.meminfo,
        interfaces: interfaces.iter().map(|interface| (interface.name.clone(), both(&interface.name))).collect(),
        disks: told
            .map(|disk| DiskTotals {
                device: disk.name.to_owned(),
                reads: [disk.reads, disk.read_bytes, disk.read_ms],
                writes: [disk.writes, disk.write_bytes, disk.write_ms],
                in_flight: disk.in_flight,
                busy_ms: disk.busy_ms,
            })
            .collect(),
    }
}

fn millicores([usage, user, system]: [f64; 3]) -> Cpu {
    // Nanoseconds a second to thousandths of a core.
    Cpu { total: usage / 1e6, user: user / 1e6, system: system / 1e6 }
}

fn faults(rates: &mut [Rate; 4], at: Duration, memory: &MemoryCounters) -> Option<Faults> {
    let counters = [memory.pgfault, memory.pgmajfault, memory.hierarchical_pgfault, memory.hierarchical_pgmajfault];
    let [minor, major, hierarchical_minor, hierarchical_major] = Rate::update_all(rates, at, counters)?;
    Some(Faults { minor, major, hierarchical_minor, hierarchical_major })
}

fn traffic(rates: &mut [Rate; 8], at: Duration, counters: &InterfaceCounters<'_>) -> Option<Traffic> {
    let (rx, tx) = (counters.rx, counters.tx);
    let values = [rx.bytes, rx.packets, rx.dropped, rx.errors, tx.bytes, tx.packets, tx.dropped, tx.errors];
    let r = Rate::update_all(rates, at, values)?;
    let flow = |at: usize| Flow { bytes: r[at], packets: r[at + 1], dropped: r[at + 2], errors: r[at + 3] };
    Some(Traffic { rx: flow(0), tx: flow(4) })
}

/// The node's memory: the root cgroup's where it tells, the rest from /proc/meminfo.
fn node_memory(meminfo: &MemInfo, root: Option<MemoryCounters>) -> MemoryCounters {
    let from_meminfo = MemoryCounters {
        usage: meminfo.total.saturating_sub(meminfo.free),
        cache: meminfo.cached,
        rss: meminfo.anon,
        mapped_file: meminfo.mapped,
        swap: meminfo.swap_total.saturating_sub(meminfo.swap_free),
        inactive_file: meminfo.inactive_file,
        ..MemoryCounters::default()
    };
    match root {
        // The v2 root has no usage of its own.
        Some(root) if root.usage == 0 => MemoryCounters { usage: from_meminfo.usage, swap: from_meminfo.swap, ..root },
        Some(root) => root,
        None => from_meminfo,
    }
}
