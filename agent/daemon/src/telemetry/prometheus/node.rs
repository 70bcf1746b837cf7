//! The node and its containers under the names of node_exporter and cAdvisor.

use stanchion_core::metrics::exposition::{Exposition, Family};
use stanchion_core::metrics::families as f;
use stanchion_core::metrics::model::{ContainerSample, DiskTotals, FilesystemSize, Snapshot};
use stanchion_core::metrics::pods::ContainerMeta;
use stanchion_core::metrics::proc::{Direction, USER_HZ};

/// What a pod's interface is called inside the pod.
const POD_INTERFACE: &str = "eth0";

pub(in crate::telemetry) fn node_and_containers(out: &mut Exposition, snapshot: &Snapshot) {
    processor_and_memory(out, snapshot);
    devices(out, snapshot);
    containers(out, snapshot);
    pods(out, snapshot);
}

fn processor_and_memory(out: &mut Exposition, snapshot: &Snapshot) {
    let (stat, meminfo) = (&snapshot.totals.stat, &snapshot.totals.meminfo);
    let [one, five, fifteen] = snapshot.node.load;
    out.single(&f::NODE_LOAD1, one);
    out.single(&f::NODE_LOAD5, five);
    out.single(&f::NODE_LOAD15, fifteen);
    out.single(&f::NODE_BOOT, stat.boot_time as f64);
    let cpu = &stat.cpu;
    let mut samples = out.family(&f::NODE_CPU);
    for (mode, ticks) in [
        ("user", cpu.user),
        ("nice", cpu.nice),
        ("system", cpu.system),
        ("idle", cpu.idle),
        ("iowait", cpu.iowait),
        ("irq", cpu.irq),
        ("softirq", cpu.softirq),
        ("steal", cpu.steal),
    ] {
        samples.value(&[mode], ticks as f64 / USER_HZ as f64);
    }
    out.single(&f::NODE_SWITCHES, stat.context_switches as f64);
    out.single(&f::NODE_FORKS, stat.forks as f64);
    out.single(&f::NODE_RUNNING, stat.running as f64);
    out.single(&f::NODE_BLOCKED, stat.blocked as f64);
    for (family, bytes) in [
        (&f::NODE_MEMORY_TOTAL, meminfo.total),
        (&f::NODE_MEMORY_FREE, meminfo.free),
        (&f::NODE_MEMORY_AVAILABLE, meminfo.available),
        (&f::NODE_MEMORY_BUFFERS, meminfo.buffers),
        (&f::NODE_MEMORY_CACHED, meminfo.cached),
        (&f::NODE_MEMORY_SWAP_TOTAL, meminfo.swap_total),
        (&f::NODE_MEMORY_SWAP_FREE, meminfo.swap_free),
        (&f::NODE_MEMORY_DIRTY, meminfo.dirty),
        (&f::NODE_MEMORY_SLAB, meminfo.slab),
        (&f::NODE_MEMORY_SLAB_RECLAIMABLE, meminfo.slab_reclaimable),
    ] {
        out.single(family, bytes as f64);
    }
}

fn devices(out: &mut Exposition, snapshot: &Snapshot) {
    type OfFilesystem = fn(&FilesystemSize) -> u64;
    let filesystems: [(&'static Family, OfFilesystem); 5] = [
        (&f::NODE_FS_SIZE, |size| size.capacity),
        (&f::NODE_FS_FREE, |size| size.capacity.saturating_sub(size.usage)),
        (&f::NODE_FS_AVAIL, |size| size.available),
        (&f::NODE_FS_FILES, |size| size.inodes),
        (&f::NODE_FS_FILES_FREE, |size| size.inodes_free),
    ];
    for (family, of) in filesystems {
        let mut samples = out.family(family);
        for filesystem in &snapshot.filesystems {
            samples.value(&[&filesystem.device], of(&filesystem.size) as f64);
        }
    }
    type OfDisk = fn(&DiskTotals) -> f64;
    let disks: [(&'static Family, OfDisk); 8] = [
        (&f::NODE_DISK_READS, |disk| disk.reads[0] as f64),
        (&f::NODE_DISK_READ_BYTES, |disk| disk.reads[1] as f64),
        (&f::NODE_DISK_READ_TIME, |disk| disk.reads[2] as f64 / 1e3),
        (&f::NODE_DISK_WRITES, |disk| disk.writes[0] as f64),
        (&f::NODE_DISK_WRITTEN, |disk| disk.writes[1] as f64),
        (&f::NODE_DISK_WRITE_TIME, |disk| disk.writes[2] as f64 / 1e3),
        (&f::NODE_DISK_NOW, |disk| disk.in_flight as f64),
        (&f::NODE_DISK_BUSY, |disk| disk.busy_ms as f64 / 1e3),
    ];
    for (family, of) in disks {
        let mut samples = out.family(family);
        for disk in &snapshot.totals.disks {
            samples.value(&[&disk.device], of(disk));
        }
    }
    for (families, direction) in [
        ([&f::NODE_NET_RX_BYTES, &f::NODE_NET_RX_PACKETS, &f::NODE_NET_RX_ERRORS, &f::NODE_NET_RX_DROPS], 0),
        ([&f::NODE_NET_TX_BYTES, &f::NODE_NET_TX_PACKETS, &f::NODE_NET_TX_ERRORS, &f::NODE_NET_TX_DROPS], 1),
    ] {
        for (family, of) in families.into_iter().zip(COUNTS) {
            let mut samples = out.family(family);
            for (name, both) in &snapshot.totals.interfaces {
                samples.value(&[name], of(&both[direction]) as f64);
            }
        }
    }
}

/// In the order of the families of an interface.
const COUNTS: [fn(&Direction) -> u64; 4] =
    [|direction| direction.bytes, |direction| direction.packets, |direction| direction.errors, |direction| direction.dropped];

fn containers(out: &mut Exposition, snapshot: &Snapshot) {
    type OfContainer = fn(&ContainerSample, &ContainerMeta) -> Option<f64>;
    let families: [(&'static Family, OfContainer); 6] = [
        (&f::CONTAINER_CPU, |sample, _| sample.cpu_ns.map(|ns| ns as f64 / 1e9)),
        (&f::CONTAINER_MEMORY, |sample, _| sample.memory.map(|memory| memory.working_set as f64)),
        (&f::CONTAINER_USAGE, |sample, _| sample.memory.map(|memory| memory.usage as f64)),
        (&f::CONTAINER_RSS, |sample, _| sample.memory.map(|memory| memory.rss as f64)),
        (&f::CONTAINER_CACHE, |sample, _| sample.memory.map(|memory| memory.cache as f64)),
        (&f::CONTAINER_STARTED, |_, meta| meta.started_ms.map(|ms| ms as f64 / 1e3)),
    ];
    for (family, of) in families {
        let mut samples = out.family(family);
        for pod in &snapshot.pods {
            for sample in &pod.containers {
                let meta = &pod.meta.containers[sample.index];
                if let Some(value) = of(sample, meta) {
                    samples.value(&[&pod.meta.namespace, &pod.meta.name, &meta.name], value);
                }
            }
        }
    }
}

fn pods(out: &mut Exposition, snapshot: &Snapshot) {
    for (families, direction) in [
        ([&f::CONTAINER_RX_BYTES, &f::CONTAINER_RX_PACKETS, &f::CONTAINER_RX_ERRORS, &f::CONTAINER_RX_DROPS], 0),
        ([&f::CONTAINER_TX_BYTES, &f::CONTAINER_TX_PACKETS, &f::CONTAINER_TX_ERRORS, &f::CONTAINER_TX_DROPS], 1),
    ] {
        for (family, of) in families.into_iter().zip(COUNTS) {
            let mut samples = out.family(family);
            for pod in &snapshot.pods {
                if let Some(both) = &pod.net_totals {
                    samples.value(&[&pod.meta.namespace, &pod.meta.name, POD_INTERFACE], of(&both[direction]) as f64);
                }
            }
        }
    }
}
