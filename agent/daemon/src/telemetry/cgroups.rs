//! Finding and reading the cgroups of pods: v1, hybrid and v2.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
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

/// Files of cgroups kept open at most: six of each of 500 cgroups and some.
const MAX_KEPT: usize = 4096;
/// A read that gave less than this gave all: the kernel fills at least a page before it stops short.
const SHORT: usize = 2048;
/// Each memory.stat is read at least once in as many passes. It costs the kernel more than all the other files together, and of what
/// a cgroup holds in which nothing ran and whose usage stayed, only the split between active and inactive pages can change.
const READ_EVERY: usize = 5;

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
        let file = self.open(dir, name)?;
        self.text_of(&file)
    }

    /// The text of `dir/name` through `kept`, a file that stays open from one tick to the next: the kernel makes the text anew
    /// at each read from offset 0, and opening costs six times what most of these reads cost.
    fn read_kept(&mut self, kept: &mut Kept, room: &mut usize, dir: &Path, name: &str) -> Option<&str> {
        if matches!(kept, Kept::Closed) {
            let file = match self.open(dir, name) {
                Some(file) => file,
                None => {
                    *kept = Kept::Absent;
                    return None;
                }
            };
            if *room == 0 {
                return self.text_of(&file);
            }
            *room -= 1;
            *kept = Kept::Open(file);
        }
        match kept {
            Kept::Open(file) => self.text_of(file),
            Kept::Closed | Kept::Absent => None,
        }
    }

    fn open(&mut self, dir: &Path, name: &str) -> Option<fs::File> {
        self.path.clear();
        self.path.push(dir);
        self.path.push(name);
        fs::File::open(&self.path).ok()
    }

    /// All that a file says, from its beginning.
    pub(super) fn text_of(&mut self, file: &fs::File) -> Option<&str> {
        if self.buffer.is_empty() {
            self.buffer.resize(16 * 1024, 0);
        }
        let mut filled = 0;
        loop {
            if filled == self.buffer.len() {
                self.buffer.resize(filled * 2, 0);
            }
            match file.read_at(&mut self.buffer[filled..], filled as u64).ok()? {
                0 => break,
                read => filled += read,
            }
            // cgroup and seq files give all they have at once, if it fits; only long ones need another look.
            if filled < SHORT {
                break;
            }
        }
        std::str::from_utf8(&self.buffer[..filled]).ok()
    }
}

/// A file that may stay open.
#[derive(Debug, Default)]
enum Kept {
    /// Not tried yet, or no room to keep it.
    #[default]
    Closed,
    /// Open.
    Open(fs::File),
    /// This kernel has none.
    Absent,
}

/// The cgroups of pods.
#[derive(Debug)]
pub(super) struct Cgroups {
    cpu: Controller,
    memory: Controller,
    /// Directories of pods, relative to a controller's root.
    roots: Vec<PathBuf>,
    /// Directories that were listed, in the memory tree.
    listings: HashMap<PathBuf, Listing>,
    known: Vec<Known>,
    /// Which pass this is.
    pass: usize,
    /// Files that may still be kept open.
    room: usize,
}

/// What a directory held when it was listed.
#[derive(Debug)]
struct Listing {
    /// Open, so that asking for the links takes no walk along the path.
    directory: fs::File,
    /// The number of its subdirectories plus two, which the kernel gives without listing; `None` where the file system does not.
    links: Option<u64>,
    directories: Vec<String>,
    pass: u64,
}

#[derive(Debug)]
struct Known {
    id: Arc<CgroupId>,
    relative: PathBuf,
    cpu: PathBuf,
    memory: PathBuf,
    files: [Kept; 6],
    /// What was read last.
    used: Option<CpuCounters>,
    held: Option<MemoryCounters>,
    /// Of a pod: what is not its known containers' (its sandbox, pages of containers that ended).
    rest: Option<MemoryCounters>,
}

impl Known {
    fn open_files(&self) -> usize {
        self.files.iter().filter(|file| matches!(file, Kept::Open(_))).count()
    }

    /// For one that is not read: its end is the only sign of a container that took its place.
    fn is_there(&self) -> bool {
        !matches!(self.memory.try_exists(), Ok(false))
    }
}

impl Cgroups {
    /// Looks at how the trees under `root` (usually /sys/fs/cgroup) are mounted.
    pub(super) fn new(root: &Path) -> Self {
        Self {
            cpu: Controller::find(root, &["cpuacct", "cpu,cpuacct", "cpuacct,cpu"]),
            memory: Controller::find(root, &["memory"]),
            roots: Vec::new(),
            listings: HashMap::new(),
            known: Vec::new(),
            pass: 0,
            room: files_to_keep(),
        }
    }

    /// The root cgroup's memory; `None` where the kernel has no memory.stat there.
    pub(super) fn root_memory(&self, file: &mut KernelFile) -> Option<MemoryCounters> {
        let mut files = <[Kept; 6]>::default();
        memory(&self.memory, self.memory.path(), &mut files, &mut 0, file)
    }

    /// Reads into `out` the cgroups of pods and of those containers that `wanted` names: a pod's sandbox has a cgroup of its own
    /// that nobody asks for. `since` is the origin of the times.
    pub(super) fn read(&mut self, since: Instant, wanted: &dyn Fn(&CgroupId) -> bool, file: &mut KernelFile, out: &mut Vec<CgroupReading>) {
        if !self.read_known(since, wanted, file, out) {
            // A directory took the place of another: the number of links told nothing.
            self.listings.clear();
            self.read_known(since, wanted, file, out);
        }
    }

    /// Reads what is there; false if something that was listed is gone.
    fn read_known(
        &mut self,
        since: Instant,
        wanted: &dyn Fn(&CgroupId) -> bool,
        file: &mut KernelFile,
        out: &mut Vec<CgroupReading>,
    ) -> bool {
        out.clear();
        let changed = |listing: &Listing| listing.links.is_none() || links(&listing.directory) != listing.links;
        // With nobody known the root itself may be another one by now.
        if self.known.is_empty() || self.listings.is_empty() || self.listings.values().any(changed) {
            self.rescan();
        }
        let mut complete = true;
        self.pass = self.pass.wrapping_add(1);
        let (pass, count) = (self.pass, self.known.len());
        let mut left = self.known.as_mut_slice();
        while let Some((first, others)) = left.split_first_mut() {
            // A pod comes right before its containers.
            let inside = others.iter().take_while(|other| other.relative.starts_with(&first.relative)).count();
            let (inside, others) = others.split_at_mut(inside);
            // A fifth of all at a time, so that no pass costs more than another.
            let place = count - others.len();
            let due = |at: usize| (place + at + pass).is_multiple_of(READ_EVERY);
            left = others;
            if first.id.container.is_some() && !wanted(&first.id) {
                complete &= first.is_there();
                continue;
            }
            let before = first.used;
            let used = cpu(&self.cpu, first, &mut self.room, file);
            // The time belongs to the processor time, of which a rate is made.
            let at = since.elapsed();
            let before_inside = out.len();
            let mut sum = MemoryCounters::default();
            for (number, container) in inside.iter_mut().enumerate() {
                if !wanted(&container.id) {
                    complete &= container.is_there();
                    continue;
                }
                let before = container.used;
                let used = cpu(&self.cpu, container, &mut self.room, file);
                let at = since.elapsed();
                let keep = used.is_some() && used == before && !due(number + 1);
                let memory = held(&self.memory, container, keep, &mut self.room, file);
                complete &= used.is_some() || memory.is_some();
                sum = sum.combined(&memory.unwrap_or_default(), u64::wrapping_add);
                if used.is_some() || memory.is_some() {
                    out.push(CgroupReading { id: Arc::clone(&container.id), at, cpu: used, memory });
                }
            }
            let slept = used.is_some() && used == before;
            let memory = if inside.is_empty() {
                held(&self.memory, first, slept && !due(0), &mut self.room, file)
            } else {
                around(&self.memory, first, &sum, slept, !due(0), &mut self.room, file)
            };
            complete &= used.is_some() || memory.is_some();
            if used.is_some() || memory.is_some() {
                out.insert(before_inside, CgroupReading { id: Arc::clone(&first.id), at, cpu: used, memory });
            }
        }
        complete
    }

    /// Lists the tree again, those directories whose number of subdirectories changed; what was known is kept with its files.
    fn rescan(&mut self) {
        let tree = self.memory.path().to_owned();
        if self.known.is_empty() {
            self.listings.clear();
        }
        self.roots.retain(|root| tree.join(root).is_dir());
        if self.roots.is_empty() {
            self.roots = find_roots(&tree);
        }
        let pass = self.listings.values().map(|listing| listing.pass).max().unwrap_or(0) + 1;
        let mut found = Vec::with_capacity(self.known.len());
        for root in &self.roots {
            list(&tree, root, None, pass, &mut self.listings, &mut found);
        }
        self.listings.retain(|_, listing| listing.pass == pass);
        found.sort_by(|a: &Found, b| a.relative.cmp(&b.relative));
        let mut old = std::mem::take(&mut self.known).into_iter().peekable();
        for Found { relative, pod_uid, container } in found {
            while let Some(gone) = old.next_if(|known| known.relative < relative) {
                self.room += gone.open_files();
            }
            let known = old.next_if(|known| known.relative == relative).unwrap_or_else(|| Known {
                id: Arc::new(CgroupId { pod_uid, container }),
                cpu: self.cpu.path().join(&relative),
                memory: tree.join(&relative),
                relative,
                files: Default::default(),
                used: None,
                held: None,
                rest: None,
            });
            self.known.push(known);
        }
        self.room += old.map(|gone| gone.open_files()).sum::<usize>();
    }
}

/// How many files may stay open: half of what the process may have, so that the rest of the agent is not short of them.
fn files_to_keep() -> usize {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    usize::try_from(soft / 2).unwrap_or(MAX_KEPT).min(MAX_KEPT)
}

/// The number of links of a directory, where it counts subdirectories; `None` if the file system does not count.
fn links(directory: &fs::File) -> Option<u64> {
    directory.metadata().ok().map(|meta| meta.nlink()).filter(|links| *links >= 2)
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

fn list(tree: &Path, relative: &Path, pod: Option<&str>, pass: u64, listings: &mut HashMap<PathBuf, Listing>, out: &mut Vec<Found>) {
    let known = listings.get(relative).is_some_and(|listing| listing.links.is_some() && links(&listing.directory) == listing.links);
    if !known {
        let path = tree.join(relative);
        let Ok(directory) = fs::File::open(&path) else { return };
        // The count first: what is added while listing is found at the next pass.
        let listing = Listing { links: links(&directory), directory, directories: directories(&path), pass };
        listings.insert(relative.to_owned(), listing);
    }
    let Some(listing) = listings.get_mut(relative) else { return };
    listing.pass = pass;
    for name in listing.directories.clone() {
        if out.len() >= MAX_CGROUPS {
            return;
        }
        let path = relative.join(&name);
        match (cgroup::classify(&name), pod) {
            (Kind::Group, None) => list(tree, &path, None, pass, listings, out),
            (Kind::Pod { uid }, None) => {
                let uid = cgroup::pod_uid(uid);
                list(tree, &path, Some(&uid), pass, listings, out);
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

fn cpu(controller: &Controller, known: &mut Known, room: &mut usize, file: &mut KernelFile) -> Option<CpuCounters> {
    let Known { cpu: dir, files: [usage, split, ..], used, .. } = known;
    *used = match controller {
        Controller::V1(_) => {
            let usage_ns = cgroup::single(file.read_kept(usage, room, dir, "cpuacct.usage")?)?;
            match *used {
                // Not a nanosecond used: user and system time are what they were.
                Some(last) if last.usage_ns == usage_ns => Some(last),
                _ => {
                    let (user_ns, system_ns) = cgroup::cpuacct_stat(file.read_kept(split, room, dir, "cpuacct.stat")?)?;
                    Some(CpuCounters { usage_ns, user_ns, system_ns })
                }
            }
        }
        Controller::V2(_) => Some(cgroup::cpu_stat_v2(file.read_kept(usage, room, dir, "cpu.stat")?)?),
    };
    *used
}

/// The memory of a cgroup. With `keep` nothing ran in it: while its usage is what it was, so are its faults and its parts.
fn held(controller: &Controller, known: &mut Known, keep: bool, room: &mut usize, file: &mut KernelFile) -> Option<MemoryCounters> {
    if let Some(last) = known.held.filter(|_| keep)
        && usage(controller, known, room, file) == Some(last.usage)
    {
        return Some(last);
    }
    known.held = memory(controller, &known.memory, &mut known.files, room, file);
    known.held
}

/// The memory of a pod whose known containers hold `inside`: with `keep`, and while the usage of the rest is what it was, so are the rest's parts, as
/// nothing runs there but a process that sleeps.
fn around(
    controller: &Controller,
    known: &mut Known,
    inside: &MemoryCounters,
    slept: bool,
    keep: bool,
    room: &mut usize,
    file: &mut KernelFile,
) -> Option<MemoryCounters> {
    if let Some(rest) = known.rest.filter(|_| keep)
        && let Some(usage) = usage(controller, known, room, file)
        && usage.wrapping_sub(inside.usage) == rest.usage
    {
        if let Some(last) = known.held.filter(|last| slept && last.usage == usage) {
            return Some(last);
        }
        let mut out = rest.combined(inside, u64::wrapping_add);
        let Known { memory: dir, files: [_, _, _, _, max_usage, last], .. } = known;
        match controller {
            Controller::V1(_) => {
                out.max_usage = file.read_kept(max_usage, room, dir, "memory.max_usage_in_bytes").and_then(cgroup::single).unwrap_or(0);
                out.failcnt = file.read_kept(last, room, dir, "memory.failcnt").and_then(cgroup::single).unwrap_or(0);
            }
            Controller::V2(_) => {
                out.max_usage = file.read_kept(max_usage, room, dir, "memory.peak").and_then(cgroup::single).unwrap_or(0);
                (out.pgfault, out.pgmajfault) = (out.hierarchical_pgfault, out.hierarchical_pgmajfault);
            }
        }
        known.held = Some(out);
        return known.held;
    }
    let whole = held(controller, known, false, room, file)?;
    known.rest = Some(whole.combined(inside, u64::wrapping_sub));
    Some(whole)
}

fn usage(controller: &Controller, known: &mut Known, room: &mut usize, file: &mut KernelFile) -> Option<u64> {
    let Known { memory: dir, files: [_, _, _, usage, ..], .. } = known;
    let name = match controller {
        Controller::V1(_) => "memory.usage_in_bytes",
        Controller::V2(_) => "memory.current",
    };
    file.read_kept(usage, room, dir, name).and_then(cgroup::single)
}

fn memory(controller: &Controller, dir: &Path, files: &mut [Kept; 6], room: &mut usize, file: &mut KernelFile) -> Option<MemoryCounters> {
    let [_, _, stat, usage, max_usage, last] = files;
    let mut out;
    match controller {
        Controller::V1(_) => {
            out = cgroup::memory_stat_v1(file.read_kept(stat, room, dir, "memory.stat")?)?;
            out.usage = file.read_kept(usage, room, dir, "memory.usage_in_bytes").and_then(cgroup::single).unwrap_or(0);
            out.max_usage = file.read_kept(max_usage, room, dir, "memory.max_usage_in_bytes").and_then(cgroup::single).unwrap_or(0);
            out.failcnt = file.read_kept(last, room, dir, "memory.failcnt").and_then(cgroup::single).unwrap_or(0);
        }
        Controller::V2(_) => {
            out = cgroup::memory_stat_v2(file.read_kept(stat, room, dir, "memory.stat")?)?;
            out.usage = file.read_kept(usage, room, dir, "memory.current").and_then(cgroup::single).unwrap_or(0);
            out.max_usage = file.read_kept(max_usage, room, dir, "memory.peak").and_then(cgroup::single).unwrap_or(0);
            out.swap = file.read_kept(last, room, dir, "memory.swap.current").and_then(cgroup::single).unwrap_or(0);
        }
    }
    Some(out)
}
