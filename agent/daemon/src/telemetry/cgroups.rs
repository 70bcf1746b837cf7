//! Finding and reading the cgroups of pods: v1, hybrid and v2.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use stanchion_core::metrics::cgroup::{self, CpuCounters, Kind, MemoryCounters};
use stanchion_core::metrics::track::{CgroupId, CgroupReading};

/// How deep below the root the kubelet's root may lie: `/system.slice/docker-….scope/kubelet.slice/kubelet-kubepods.slice`.
const MAX_ROOT_DEPTH: usize = 4;
/// Directories looked at while searching for it.
const MAX_SEARCHED: usize = 2000;
/// Directories below it that are read in one pass; a node holds at most 250 pods or so.
const MAX_CGROUPS: usize = 4096;

/// A cgroup tree that carries a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Controller {
    V1(PathBuf),
    V2(PathBuf),
}

impl Controller {
    /// The v1 tree under one of these names, else the v2 tree.
    fn find(root: &Path, v1_names: &[&str]) -> Self {
        match v1_names.iter().map(|name| root.join(name)).find(|path| path.is_dir()) {
            Some(path) => Self::V1(path),
            // Hybrid: the v2 tree is mounted beside the v1 trees.
            None if root.join("unified").is_dir() => Self::V2(root.join("unified")),
            None => Self::V2(root.to_owned()),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::V1(path) | Self::V2(path) => path,
        }
    }
}

/// Reads small kernel files into one reused buffer.
#[derive(Debug, Default)]
pub(super) struct KernelFile {
    path: PathBuf,
    buffer: Vec<u8>,
}

impl KernelFile {
    /// The text of `dir/name`; `None` when it cannot be read (gone, not supported) or is no text.
    pub(super) fn read(&mut self, dir: &Path, name: &str) -> Option<&str> {
        self.path.clear();
        self.path.push(dir);
        self.path.push(name);
        let mut file = fs::File::open(&self.path).ok()?;
        if self.buffer.is_empty() {
            self.buffer.resize(16 * 1024, 0);
        }
        let mut filled = 0;
        loop {
            if filled == self.buffer.len() {
                self.buffer.resize(filled * 2, 0);
            }
            match file.read(&mut self.buffer[filled..]).ok()? {
                0 => break,
                read => filled += read,
            }
        }
        std::str::from_utf8(&self.buffer[..filled]).ok()
    }
}

/// The cgroups of pods.
#[derive(Debug)]
pub(super) struct Cgroups {
    cpu: Controller,
    memory: Controller,
    /// Directories of pods, relative to a controller's root.
    roots: Vec<PathBuf>,
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    id: Arc<CgroupId>,
    cpu: PathBuf,
    memory: PathBuf,
}

impl Cgroups {
    /// Looks at how the trees under `root` (usually /sys/fs/cgroup) are mounted.
    pub(super) fn new(root: &Path) -> Self {
        Self {
            cpu: Controller::find(root, &["cpuacct", "cpu,cpuacct", "cpuacct,cpu"]),
            memory: Controller::find(root, &["memory"]),
            roots: Vec::new(),
            known: Vec::new(),
        }
    }

    /// The root cgroup's memory; `None` where the kernel has no memory.stat there.
    pub(super) fn root_memory(&self, file: &mut KernelFile) -> Option<MemoryCounters> {
        memory(&self.memory, self.memory.path(), file)
    }

    /// Reads every pod's and container's cgroup into `out`; `since` is the origin of the times.
    pub(super) fn read(&mut self, since: Instant, file: &mut KernelFile, out: &mut Vec<CgroupReading>) {
        out.clear();
        self.rescan();
        for known in &self.known {
            let cpu = cpu(&self.cpu, &known.cpu, file);
            let memory = memory(&self.memory, &known.memory, file);
            if cpu.is_none() && memory.is_none() {
                // Gone between listing and reading.
                continue;
            }
            out.push(CgroupReading { id: Arc::clone(&known.id), at: since.elapsed(), cpu, memory });
        }
    }

    /// Lists the tree again; ids that were known are kept.
    fn rescan(&mut self) {
        self.roots.retain(|root| self.memory.path().join(root).is_dir());
        if self.roots.is_empty() {
            self.roots = find_roots(self.memory.path());
        }
        let mut found = Vec::with_capacity(self.known.len());
        let mut old = std::mem::take(&mut self.known).into_iter().peekable();
        for root in &self.roots {
            list(self.memory.path(), root, None, &mut found);
        }
        found.sort_by(|a: &Found, b| a.relative.cmp(&b.relative));
        for Found { relative, pod_uid, container } in found {
            let memory = self.memory.path().join(&relative);
            while old.next_if(|known| known.memory < memory).is_some() {}
            match old.next_if(|known| known.memory == memory) {
                Some(known) => self.known.push(known),
                None => {
                    let id = Arc::new(CgroupId { pod_uid, container });
                    self.known.push(Known { id, cpu: self.cpu.path().join(&relative), memory });
                }
            }
        }
    }
}

/// A directory of a pod or container.
struct Found {
    relative: PathBuf,
    pod_uid: String,
    container: Option<String>,
}

/// Where the kubelet's pods are, relative to the tree.
fn find_roots(tree: &Path) -> Vec<PathBuf> {
    let mut level = vec![PathBuf::new()];
    let mut searched = 0;
    for _ in 0..MAX_ROOT_DEPTH {
        let mut next = Vec::new();
        let mut roots = Vec::new();
        for relative in level {
            for name in directories(&tree.join(&relative)) {
                searched += 1;
                let path = relative.join(&name);
                if cgroup::is_kubepods_root(&name) {
                    roots.push(path);
                } else if searched < MAX_SEARCHED {
                    next.push(path);
                }
            }
        }
        if !roots.is_empty() {
            return roots;
        }
        level = next;
    }
    Vec::new()
}

fn list(tree: &Path, relative: &Path, pod: Option<&str>, out: &mut Vec<Found>) {
    for name in directories(&tree.join(relative)) {
        if out.len() >= MAX_CGROUPS {
            return;
        }
        let path = relative.join(&name);
        match (cgroup::classify(&name), pod) {
            (Kind::Group, None) => list(tree, &path, None, out),
            (Kind::Pod { uid }, None) => {
                let uid = cgroup::pod_uid(uid);
                list(tree, &path, Some(&uid), out);
                out.push(Found { relative: path, pod_uid: uid, container: None });
            }
            (Kind::Container { id }, Some(uid)) => {
                out.push(Found { pod_uid: uid.to_owned(), container: Some(id.to_owned()), relative: path });
            }
            (Kind::PodContainer { uid, id }, _) => {
                out.push(Found { pod_uid: cgroup::pod_uid(uid), container: Some(id.to_owned()), relative: path });
            }
            _ => {}
        }
    }
}

/// Names of the directories in a directory; none if it is gone.
fn directories(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn cpu(controller: &Controller, dir: &Path, file: &mut KernelFile) -> Option<CpuCounters> {
    match controller {
        Controller::V1(_) => {
            let usage_ns = cgroup::single(file.read(dir, "cpuacct.usage")?)?;
            let (user_ns, system_ns) = cgroup::cpuacct_stat(file.read(dir, "cpuacct.stat")?)?;
            Some(CpuCounters { usage_ns, user_ns, system_ns })
        }
        Controller::V2(_) => Some(cgroup::cpu_stat_v2(file.read(dir, "cpu.stat")?)?.0),
    }
}

fn memory(controller: &Controller, dir: &Path, file: &mut KernelFile) -> Option<MemoryCounters> {
    let mut out;
    match controller {
        Controller::V1(_) => {
            out = cgroup::memory_stat_v1(file.read(dir, "memory.stat")?)?;
            out.usage = file.read(dir, "memory.usage_in_bytes").and_then(cgroup::single).unwrap_or(0);
            out.max_usage = file.read(dir, "memory.max_usage_in_bytes").and_then(cgroup::single).unwrap_or(0);
            out.failcnt = file.read(dir, "memory.failcnt").and_then(cgroup::single).unwrap_or(0);
        }
        Controller::V2(_) => {
            out = cgroup::memory_stat_v2(file.read(dir, "memory.stat")?)?;
            out.usage = file.read(dir, "memory.current").and_then(cgroup::single).unwrap_or(0);
            out.max_usage = file.read(dir, "memory.peak").and_then(cgroup::single).unwrap_or(0);
            out.swap = file.read(dir, "memory.swap.current").and_then(cgroup::single).unwrap_or(0);
        }
    }
    Some(out)
}
