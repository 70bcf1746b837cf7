//! One pass over /proc, /sys and the cgroups.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use stanchion_core::metrics::model::{AllowanceSample, FilesystemSample, FilesystemSize, Snapshot};
use stanchion_core::metrics::pods::PodTable;
use stanchion_core::metrics::proc;
use stanchion_core::metrics::track::{CgroupReading, ContainerFiles, PodCounters, Readings, Tracker};

use stanchion_netlink::ethtool;
use tracing::warn;

use super::cgroups::{Cgroups, KernelFile};

/// Where the kernel's views are mounted: the host's, which a container may see under other names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`
    pub cgroup: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into(), sys: "/sys".into() }
    }
}

/// Why a pass gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file without which there are no figures.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
    },
}

/// Reads and keeps what need not be asked each time.
#[derive(Debug)]
pub(super) struct Reader {
    roots: Roots,
    started: Instant,
    cgroups: Cgroups,
    file: KernelFile,
    net_dev: String,
    diskstats: String,
    readings: Vec<CgroupReading>,
    /// Interfaces, and whether a device is behind each.
    interfaces: HashMap<String, bool>,
    physical: BTreeSet<String>,
    /// Disks with a device behind them and their EBS volumes; others map to nothing in `checked_disks`.
    disks: HashMap<String, Option<String>>,
    checked_disks: BTreeSet<String>,
    allowances: Vec<AllowanceSample>,
}

impl Reader {
    pub(super) fn new(roots: Roots) -> Self {
        Self {
            cgroups: Cgroups::new(&roots.cgroup),
            roots,
            started: Instant::now(),
            file: KernelFile::default(),
            net_dev: String::new(),
            diskstats: String::new(),
            readings: Vec::new(),
            interfaces: HashMap::new(),
            physical: BTreeSet::new(),
            disks: HashMap::new(),
            checked_disks: BTreeSet::new(),
            allowances: Vec::new(),
        }
    }

    /// One pass, turned into samples.
    pub(super) fn pass(
        &mut self,
        tracker: &mut Tracker,
        table: &PodTable,
        files: &ContainerFiles,
        pod_counters: &HashMap<String, PodCounters>,
    ) -> Result<Snapshot, ReadError> {
        let proc_root = self.roots.proc.as_path();
        let missing = |name: &str| ReadError::Unreadable { path: proc_root.join(name) };
        let at = self.started.elapsed();
        let stat = self.file.read(proc_root, "stat").and_then(proc::stat).ok_or_else(|| missing("stat"))?;
        let meminfo = self.file.read(proc_root, "meminfo").and_then(proc::meminfo).ok_or_else(|| missing("meminfo"))?;
        let load = self.file.read(proc_root, "loadavg").and_then(proc::loadavg).unwrap_or_default();
        // "net" is a link to the reader's own namespace; the host's is that of process 1.
        let net_dev = if self.roots.proc == Path::new("/proc") { "net/dev" } else { "1/net/dev" };
        keep(&mut self.net_dev, self.file.read(proc_root, net_dev));
        keep(&mut self.diskstats, self.file.read(proc_root, "diskstats"));
        self.cgroups.read(self.started, &mut self.file, &mut self.readings);
        let root_memory = self.cgroups.root_memory(&mut self.file);
        self.learn_devices();
        let filesystems = self.filesystems();
        let allowances = self.allowances();
        let wall_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
        let readings = Readings {
            at,
            wall_ms,
            stat,
            meminfo,
            root_memory,
            load,
            net_dev: &self.net_dev,
            physical_interfaces: &self.physical,
            diskstats: &self.diskstats,
            disks: &self.disks,
            filesystems,
            allowances,
            cgroups: &self.readings,
            container_files: files,
            pod_counters,
        };
        Ok(tracker.observe(&readings, table))
    }

    /// Asks /sys once about each interface and disk that is new.
    fn learn_devices(&mut self) {
        let names: BTreeSet<&str> = proc::net_dev(&self.net_dev).map(|interface| interface.name).collect();
        self.interfaces.retain(|name, _| names.contains(name.as_str()));
        for name in names {
            if !self.interfaces.contains_key(name) {
                let physical = self.roots.sys.join("class/net").join(name).join("device").exists();
                self.interfaces.insert(name.to_owned(), physical);
            }
        }
        self.physical = self.interfaces.iter().filter(|(_, physical)| **physical).map(|(name, _)| name.clone()).collect();
        let names: BTreeSet<&str> = proc::diskstats(&self.diskstats).map(|disk| disk.name).collect();
        self.checked_disks.retain(|name| names.contains(name.as_str()));
        self.disks.retain(|name, _| names.contains(name.as_str()));
        for name in names {
            if self.checked_disks.insert(name.to_owned()) {
                let device = self.roots.sys.join("block").join(name).join("device");
                if device.exists() {
                    let volume = self.file.read(&device, "serial").and_then(ebs_volume);
                    self.disks.insert(name.to_owned(), volume);
                }
            }
        }
    }

    /// Allowance counters of interfaces with a device, with a warning where one rose since the last tick: nothing else tells why an
    /// instance drops packets.
    fn allowances(&mut self) -> Vec<AllowanceSample> {
        let read = |name: &String| {
            let counters = ethtool::statistics(name).ok()?;
            AllowanceSample::from_counters(name, counters.iter().map(|(name, value)| (name.as_str(), *value)))
        };
        let now: Vec<AllowanceSample> = self.physical.iter().filter_map(read).collect();
        for sample in &now {
            let Some(before) = self.allowances.iter().find(|before| before.interface == sample.interface) else { continue };
            for ((allowance, value), (_, last)) in sample.exceeded().into_iter().zip(before.exceeded()) {
                if value > last {
                    let packets = value - last;
                    warn!(interface = %sample.interface, allowance, packets, "the instance's network allowance was exceeded");
                }
            }
        }
        self.allowances.clone_from(&now);
        now
    }

    /// Sizes of the file systems on block devices, one a device.
    fn filesystems(&mut self) -> Vec<FilesystemSample> {
        let init = self.roots.proc.join("1");
        let Some(text) = self.file.read(&init, "mountinfo") else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for mount in proc::mountinfo(text) {
            if mount.source.starts_with("/dev/") && seen.insert(mount.device) {
                found.push((mount.source.to_owned(), mount.device, mount.point.into_owned()));
            }
        }
        let mut out = Vec::new();
        for (device, (major, minor), point) in found {
            // The host's mount as process 1 sees it; where that may not be entered, our own, if it is the same.
            let on_host = init.join("root").join(point.trim_start_matches('/'));
            let same = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|meta| device_number(meta.dev()) == (major, minor));
            let Some(path) = [on_host, PathBuf::from(point)].into_iter().find(same) else { continue };
            let Ok(stat) = nix::sys::statvfs::statvfs(&path) else { continue };
            let block = stat.fragment_size();
            let capacity = stat.blocks() * block;
            if capacity == 0 {
                continue;
            }
            let sys = self.roots.sys.join(format!("dev/block/{major}:{minor}"));
            let volume = ["device/serial", "../device/serial"].iter().find_map(|path| ebs_volume(self.file.read(&sys, path)?));
            let size = FilesystemSize {
                capacity,
                available: stat.blocks_available() * block,
                usage: capacity.saturating_sub(stat.blocks_free() * block),
                inodes: stat.files(),
                inodes_free: stat.files_free(),
            };
            out.push(FilesystemSample { device, volume, size });
        }
        out
    }
}

fn device_number(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

fn keep(slot: &mut String, text: Option<&str>) {
    slot.clear();
    slot.push_str(text.unwrap_or_default());
}

/// The EBS volume of an NVMe serial number: `vol0123…` without the dash.
fn ebs_volume(serial: &str) -> Option<String> {
    let digits = serial.trim().strip_prefix("vol")?;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit())).then(|| format!("vol-{digits}"))
}
