//! Container log files, and what was written to them.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use stanchion_core::ids::PodName;
use stanchion_core::logs::positions::Positions;

use crate::wall;

/// What every line begins with; metric documents do not.
pub(super) const LINE: &str = "line ";

/// A file: the live one of a container, or one that was rotated away.
struct Written {
    /// Where it was when it was live.
    live: PathBuf,
    /// Where it is.
    path: PathBuf,
    /// Bytes at the end of each line, and its number.
    ends: Vec<(u64, u64)>,
}

/// All log files of the node.
pub(super) struct Files {
    directory: PathBuf,
    open: BTreeMap<PodName, (File, u64)>,
    /// By inode.
    written: BTreeMap<u64, Written>,
    lines: u64,
    rotations: u32,
}

impl Files {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, open: BTreeMap::new(), written: BTreeMap::new(), lines: 0, rotations: 0 }
    }

    /// Lines so far.
    pub(super) fn written(&self) -> u64 {
        self.lines
    }

    /// A container starts.
    pub(super) fn open(&mut self, pod: &PodName) -> anyhow::Result<()> {
        let number: u64 = pod.name.trim_start_matches("pod-").parse()?;
        let live = self.directory.join(format!("{}_{}_app-{number:064x}.log", pod.name, pod.namespace));
        let opened = self.create(live)?;
        self.open.insert(pod.clone(), opened);
        Ok(())
    }

    fn create(&mut self, live: PathBuf) -> anyhow::Result<(File, u64)> {
        let file = File::create(&live).with_context(|| format!("create {}", live.display()))?;
        let inode = file.metadata()?.ino();
        self.written.insert(inode, Written { path: live.clone(), live, ends: Vec::new() });
        Ok((file, inode))
    }

    /// It ended; its file stays, as the kubelet leaves it for a while.
    pub(super) fn close(&mut self, pod: &PodName) {
        self.open.remove(pod);
    }

    /// Some lines to some containers; now and then a file is rotated.
    pub(super) fn write(&mut self, random: &mut StdRng) -> anyhow::Result<()> {
        let pods: Vec<PodName> = self.open.keys().filter(|_| random.random_bool(0.7)).cloned().collect();
        for pod in pods {
            for _ in 0..random.random_range(1..15) {
                let stamp = jiff::Timestamp::try_from(wall::now())?;
                let line = format!("{stamp:.9} stdout F {LINE}{}\n", self.lines);
                let Some((file, inode)) = self.open.get_mut(&pod) else { continue };
                file.write_all(line.as_bytes())?;
                let Some(Written { ends, .. }) = self.written.get_mut(inode) else { continue };
                let before = ends.last().map_or(0, |(end, _)| *end);
                ends.push((before + line.len() as u64, self.lines));
                self.lines += 1;
            }
            if random.random_bool(0.2) {
                self.rotate(&pod)?;
            }
        }
        Ok(())
    }

    fn rotate(&mut self, pod: &PodName) -> anyhow::Result<()> {
        let Some((_, inode)) = self.open.get(pod) else { return Ok(()) };
        let Some(written) = self.written.get_mut(inode) else { return Ok(()) };
        self.rotations += 1;
        let live = written.live.clone();
        written.path = PathBuf::from(format!("{}.20261121-{:06}", live.display(), self.rotations));
        fs::rename(&live, &written.path)?;
        let opened = self.create(live)?;
        self.open.insert(pod.clone(), opened);
        Ok(())
    }

    /// What is on disk as acknowledged has arrived.
    pub(super) fn check(&self, positions: &Positions, arrived: &HashSet<u64>) -> anyhow::Result<()> {
        for position in &positions.files {
            // An inode number may be another file's by now.
            let Some(written) = self.written.get(&position.inode).filter(|written| written.live.as_os_str() == position.path.as_str())
            else {
                continue;
            };
            for (_, number) in written.ends.iter().take_while(|(end, _)| *end <= position.offset) {
                ensure!(
                    arrived.contains(number),
                    "{} is acknowledged to byte {}, and line {number} has not arrived",
                    position.path,
                    position.offset
                );
            }
        }
        Ok(())
    }

    /// Files with lines that have not arrived: where each is, how many it has, and the first and last that are missing.
    pub(super) fn missing(&self, arrived: &HashSet<u64>) -> Vec<String> {
        let of = |written: &Written| {
            let missing: Vec<u64> = written.ends.iter().map(|(_, number)| *number).filter(|number| !arrived.contains(number)).collect();
            let (first, last) = (missing.first()?, missing.last()?);
            Some(format!("{}: {} of {} lines, {first} to {last}", written.path.display(), missing.len(), written.ends.len()))
        };
        self.written.values().filter_map(of).collect()
    }

    /// The kubelet deletes what ended containers left, all files of one together, once it has arrived.
    pub(super) fn collect(&mut self, arrived: &HashSet<u64>) -> anyhow::Result<()> {
        let live = |inode: &u64| self.open.values().any(|(_, open)| open == inode);
        let done = |written: &Written| written.ends.iter().all(|(_, number)| arrived.contains(number));
        let kept = self.written.iter().filter(|(inode, written)| live(inode) || !done(written));
        let kept: HashSet<PathBuf> = kept.map(|(_, written)| written.live.clone()).collect();
        for (_, written) in self.written.extract_if(.., |_, written| !kept.contains(&written.live)) {
            fs::remove_file(&written.path).with_context(|| format!("remove {}", written.path.display()))?;
        }
        Ok(())
    }
}
