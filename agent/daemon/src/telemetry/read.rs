//! One pass over /proc, /sys and the cgroups.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stanchion_core::ids::PodName;
use stanchion_core::metrics::devices::{EFA_COUNTERS, EfaReading, ExporterReadings};
use stanchion_core::metrics::model::{AllowanceSample, FilesystemSample, FilesystemSize, Snapshot};
use stanchion_core::metrics::pods::PodTable;
use stanchion_core::metrics::proc;
use stanchion_core::metrics::track::{CgroupId, CgroupReading, ContainerFiles, PodCounters, Readings, Tracker};

use super::cgroups::{Cgroups, KernelFile};
use super::{allowances, wall_ms};

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
    disks_in_use: Mounts,
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
            disks_in_use: Mounts::default(),
        }
    }

    /// One pass, turned into samples.
    pub(super) fn pass(
        &mut self,
        tracker: &mut Tracker,
        table: &PodTable,
        files: &ContainerFiles,
        exported: &ExporterReadings,
        pod_counters: &HashMap<PodName, PodCounters>,
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
        let wanted = |id: &CgroupId| id.container.as_ref().is_none_or(|container| table.has_container(&id.pod_uid, container));
        self.cgroups.read(self.started, &wanted, &mut self.file, &mut self.readings);
        let root_memory = self.cgroups.root_memory(&mut self.file);
        self.learn_devices();
        let filesystems = self.filesystems();
        let allowances = self.allowances();
        let efa = self.efa();
        let wall_ms = wall_ms();
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
            efa,
            exported,
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
                let physical = allowances::is_physical(&self.roots.sys, name);
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

    /// Counters of EFA devices: other RDMA devices have none of these files.
    fn efa(&mut self) -> Vec<EfaReading> {
        let class = self.roots.sys.join("class/infiniband");
        let mut devices = names(&class);
        devices.sort_unstable();
        let mut read = |device: String| {
            let ports = class.join(&device).join("ports");
            let mut reading = EfaReading { device, counters: Default::default() };
            for port in names(&ports) {
                let directory = ports.join(port).join("hw_counters");
                for ((name, _), total) in EFA_COUNTERS.iter().zip(&mut reading.counters) {
                    if let Some(count) = self.file.read(&directory, name).and_then(|text| text.trim().parse::<u64>().ok()) {
                        *total = Some(total.unwrap_or(0) + count);
                    }
                }
            }
            reading.counters.iter().any(Option::is_some).then_some(reading)
        };
        devices.into_iter().filter_map(&mut read).collect()
    }

    /// Allowance counters of interfaces with a device.
    fn allowances(&self) -> Vec<AllowanceSample> {
        self.physical.iter().filter_map(|name| allowances::counters(name)).collect()
    }

    /// Sizes of the file systems on block devices, one a device.
    fn filesystems(&mut self) -> Vec<FilesystemSample> {
        self.disks_in_use.refresh(&self.roots, &mut self.file);
        let size = |path: &PathBuf| {
            let stat = nix::sys::statvfs::statvfs(path).ok()?;
            let block = stat.fragment_size();
            let capacity = stat.blocks() * block;
            (capacity > 0).then(|| FilesystemSize {
                capacity,
                available: stat.blocks_available() * block,
                usage: capacity.saturating_sub(stat.blocks_free() * block),
                inodes: stat.files(),
                inodes_free: stat.files_free(),
            })
        };
        let sample = |found: &Mounted| {
            Some(FilesystemSample { device: found.device.clone(), volume: found.volume.clone(), size: size(&found.path)? })
        };
        self.disks_in_use.found.iter().filter_map(sample).collect()
    }
}

/// The file systems on block devices. Listing a node's mounts costs more than a millisecond where many pods run, so it is done only
/// when the kernel says that they changed.
#[derive(Debug, Default)]
struct Mounts {
    mountinfo: Option<File>,
    found: Vec<Mounted>,
}

/// A file system that can be asked.
#[derive(Debug)]
struct Mounted {
    device: String,
    volume: Option<String>,
    path: PathBuf,
}

impl Mounts {
    fn refresh(&mut self, roots: &Roots, file: &mut KernelFile) {
        let init = roots.proc.join("1");
        match &self.mountinfo {
            Some(mountinfo) if !mounts_changed(mountinfo) => return,
            Some(_) => {}
            None => self.mountinfo = File::open(init.join("mountinfo")).ok(),
        }
        self.found.clear();
        let own = file.read(Path::new("/proc/thread-self"), "mountinfo").unwrap_or_default().to_owned();
        let Some(text) = self.mountinfo.as_ref().and_then(|mountinfo| file.text_of(mountinfo)) else { return };
        for Device { device, number: (major, minor), paths } in devices(text, &own, &init.join("root")) {
            let same = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|meta| device_number(meta.dev()) == (major, minor));
            let Some(path) = paths.into_iter().find(same) else { continue };
            let sys = roots.sys.join(format!("dev/block/{major}:{minor}"));
            let volume = ["device/serial", "../device/serial"].iter().find_map(|path| ebs_volume(file.read(&sys, path)?));
            self.found.push(Mounted { device, volume, path });
        }
    }
}

/// A block device that is mounted on the host, and where it may be reached.
struct Device {
    device: String,
    number: (u32, u32),
    paths: Vec<PathBuf>,
}

/// The block devices among the host's mounts, reached by these as process 1 sees them below `root`; where it may not be entered, by our
/// `own`: a container has directories of the host's disk, such as /var/log, but the disk's `/` is not its own.
fn devices(host: &str, own: &str, root: &Path) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::new();
    for mount in proc::mountinfo(host).filter(|mount| mount.source.starts_with("/dev/")) {
        let path = root.join(mount.point.trim_start_matches('/'));
        match devices.iter_mut().find(|device| device.number == mount.device) {
            Some(device) => device.paths.push(path),
            None => devices.push(Device { device: mount.source.to_owned(), number: mount.device, paths: vec![path] }),
        }
    }
    for mount in proc::mountinfo(own) {
        if let Some(device) = devices.iter_mut().find(|device| device.number == mount.device) {
            device.paths.push(PathBuf::from(mount.point.into_owned()));
        }
    }
    devices
}

/// Whether the mounts changed since this was asked the last time; always for a copy of the file, which the kernel does not watch.
fn mounts_changed(mountinfo: &File) -> bool {
    if mountinfo.metadata().map_or(true, |meta| meta.len() > 0) {
        return true;
    }
    let mut asked = [PollFd::new(mountinfo.as_fd(), PollFlags::POLLPRI)];
    match poll(&mut asked, PollTimeout::ZERO) {
        Ok(_) => asked[0].revents().is_none_or(|events| events.intersects(PollFlags::POLLPRI | PollFlags::POLLERR)),
        Err(_) => true,
    }
}

/// What a directory holds; nothing if it is not there.
fn names(directory: &Path) -> Vec<String> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    /// As in a container that has a directory of the host's disk, may not enter the host's mounts and has another disk, or none, as its `/`.
    #[test]
    fn a_disk_of_which_only_a_directory_is_seen_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let own = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let disk = proc::mountinfo(&own).find(|mount| mount.source.starts_with("/dev/")).expect("the tests lie on a disk");
        let (major, minor) = disk.device;
        // The device of the second is nowhere: a volume of a pod.
        let host = format!("1 0 {major}:{minor} / / rw - ext4 /dev/disk rw\n2 1 4095:7 / /var/lib/kubelet/v rw - ext4 /dev/volume rw\n");
        let (root, point) = (dir.path().to_owned(), PathBuf::from(&*disk.point));
        let seen = std::thread::spawn(move || {
            // What this thread mounts is its own, and goes with it.
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            mount(Some("none"), &root, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            for directory in ["proc", "var/log", "host/proc/1"] {
                std::fs::create_dir_all(root.join(directory)).unwrap();
            }
            mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&str>).unwrap();
            mount(Some(&point), &root.join("var/log"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            std::fs::write(root.join("host/proc/1/mountinfo"), host).unwrap();
            nix::unistd::chroot(&root).unwrap();
            std::env::set_current_dir("/").unwrap();
            Reader::new(Roots { proc: "/host/proc".into(), ..Roots::default() }).filesystems()
        });
        let seen = seen.join().unwrap();
        assert_eq!(seen.iter().map(|seen| seen.device.as_str()).collect::<Vec<_>>(), ["/dev/disk"]);
        let stat = nix::sys::statvfs::statvfs(&*disk.point).unwrap();
        assert_eq!(seen[0].size.capacity, stat.blocks() * stat.fragment_size());
    }
}
