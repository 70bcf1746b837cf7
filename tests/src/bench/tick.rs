//! The metric tick of a full node by itself: real cgroups, every document encoded, beside the kernel's share of it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use stanchion_core::metrics::catalog::Preset;
use stanchion_core::metrics::insights::{NodeIdentity, Selection};
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::telemetry::{Collector, Roots, TelemetrySettings};

use super::plot::Plot;
use super::{Progress, Row};
use crate::pod_cgroups::PodCgroups;

const PODS: usize = 110;
/// Smaller nodes, for the plot.
const FEWER: [usize; 2] = [10, 50];
const CONTAINERS: usize = 2;
/// What a tick may cost: milliseconds of one core, each minute.
const MAX_MS: f64 = 5.0;
/// The files that a tick reads of a cgroup in which something ran.
const FILES: [&str; 8] = [
    "memory.stat",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.failcnt",
    "cpuacct.usage",
    "cpuacct.stat",
    "cpu.stat",
    "memory.current",
];

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Ticks over containers that all work, then over the same containers asleep.
///
/// # Errors
/// When cgroups or processes cannot be made.
pub(super) fn run(quick: bool, progress: &Progress) -> anyhow::Result<Vec<Row>> {
    let rounds = if quick { 20 } else { 200 };
    let mut rows = Vec::new();
    for pods in FEWER {
        progress.at(format_args!("metric tick: {pods} pods"));
        let mut node = Node::start(pods)?;
        rows.extend(node.measure(Preset::Standard, rounds)?.rows(pods, Preset::Standard));
    }
    progress.at(format_args!("metric tick: {PODS} pods, a process in each of {} containers", PODS * CONTAINERS));
    let mut node = Node::start(PODS)?;
    let floor = node.floor(rounds)?;
    for preset in [Preset::Standard, Preset::Enhanced] {
        progress.at(format_args!("metric tick: {rounds} ticks, {}", preset.name()));
        let cost = node.measure(preset, rounds)?;
        // The bound is on the figure; what it takes to read the same files, and nothing else, stands beside it.
        rows.extend(cost.rows(PODS, preset).map(|row| row.target(MAX_MS).beside(floor)));
        let name = preset.name();
        rows.push(Row::plain(format!("documents of a tick, {name}"), cost.busy.documents as f64, "documents"));
        rows.push(Row::plain(format!("bytes of a tick, {name}"), cost.busy.bytes as f64 / 1e3, "kB"));
    }
    Ok(rows)
}

/// Cgroups of a node's pods, with a process in each container. The processes go first: a cgroup in use cannot be removed.
struct Node {
    workers: Vec<Worker>,
    cgroups: PodCgroups,
}

/// A tick over containers that all work, and over the same containers asleep.
struct Cost {
    busy: Ticks,
    idle: Ticks,
}

impl Cost {
    fn rows(&self, pods: usize, preset: Preset) -> impl Iterator<Item = Row> {
        let name = preset.name();
        let row = move |state: &str, ms| {
            let row = Row::plain(format!("metric tick, CPU, {pods} pods, all containers {state}, {name}"), ms, "ms");
            row.at(Plot::Tick, format!("{state}, {name}"), pods as f64)
        };
        [row("at work", self.busy.ms), row("asleep", self.idle.ms)].into_iter()
    }
}

impl Node {
    fn start(pods: usize) -> anyhow::Result<Self> {
        let cgroups = PodCgroups::make("node1", pods, CONTAINERS).context("make cgroups (needs root)")?;
        let mut node = Self { workers: Vec::with_capacity(pods * CONTAINERS), cgroups };
        for pod in 0..pods {
            for container in 0..CONTAINERS {
                let worker = Worker::start()?;
                node.cgroups.enter(pod, container, worker.0.id()).context("move a process into its cgroups")?;
                node.workers.push(worker);
            }
        }
        Ok(node)
    }

    fn measure(&mut self, preset: Preset, rounds: usize) -> anyhow::Result<Cost> {
        let Self { workers, cgroups } = self;
        let busy = ticks(cgroups, preset, rounds, || workers.iter_mut().try_for_each(Worker::work))?;
        Ok(Cost { busy, idle: ticks(cgroups, preset, rounds, || Ok(()))? })
    }

    fn floor(&mut self, rounds: usize) -> anyhow::Result<f64> {
        let Self { workers, cgroups } = self;
        floor(cgroups, rounds, || workers.iter_mut().try_for_each(Worker::work))
    }
}

/// A process that does a little whenever it is told to.
struct Worker(Child);

impl Worker {
    fn start() -> anyhow::Result<Self> {
        let spawned = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Ok(Self(spawned.context("start cat")?))
    }

    /// Has it run once.
    fn work(&mut self) -> anyhow::Result<()> {
        let (Some(input), Some(output)) = (self.0.stdin.as_mut(), self.0.stdout.as_mut()) else { anyhow::bail!("cat has no pipes") };
        input.write_all(b"x").context("write to cat")?;
        output.read_exact(&mut [0]).context("read from cat")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended; its cgroup can be removed only when it is gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ticks of one kind.
struct Ticks {
    /// CPU of one, the median.
    ms: f64,
    documents: usize,
    bytes: usize,
}

fn ticks(cgroups: &PodCgroups, preset: Preset, rounds: usize, mut between: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Ticks> {
    let cluster = ClusterHandle::fixed(cgroups.cluster());
    let settings = TelemetrySettings { selection: Selection { preset, ..Selection::default() }, ..TelemetrySettings::default() };
    let identity = NodeIdentity { cluster: "bench".into(), node: "node1".into(), ..NodeIdentity::default() };
    let roots = Roots { cgroup: cgroups.root.path().to_owned(), ..Roots::default() };
    let mut collector = Collector::new(roots, cluster.watch(), identity, &settings);
    collector.collect()?;
    let mut spent = Vec::with_capacity(rounds);
    let mut out = Ticks { ms: 0.0, documents: 0, bytes: 0 };
    for _ in 0..rounds {
        between()?;
        let before = thread_cpu();
        let (snapshot, messages) = collector.collect()?;
        spent.push(thread_cpu().saturating_sub(before));
        let seen = snapshot.pods.iter().map(|pod| pod.containers.len()).sum::<usize>();
        let there = cgroups.pods.len() * CONTAINERS;
        anyhow::ensure!(seen == there, "{seen} containers seen instead of {there}");
        (out.documents, out.bytes) = (messages.len(), messages.iter().map(String::len).sum());
    }
    out.ms = median_ms(spent);
    Ok(out)
}

fn median_ms(mut spent: Vec<Duration>) -> f64 {
    spent.sort_unstable();
    spent[spent.len() / 2].as_secs_f64() * 1e3
}

/// The same files of cgroups, kept open and read, and nothing else.
fn floor(cgroups: &PodCgroups, rounds: usize, mut between: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut files = Vec::new();
    for pod in 0..cgroups.pods.len() {
        for container in 0..CONTAINERS {
            for directory in cgroups.container(pod, container) {
                let parent = (container == 0).then(|| directory.parent().map(Path::to_owned)).flatten();
                for directory in parent.into_iter().chain([directory]) {
                    let paths = FILES.iter().map(|name| directory.join(name)).filter(|path| path.exists());
                    files.extend(paths.map(File::open).collect::<Result<Vec<_>, _>>()?);
                }
            }
        }
    }
    let mut buffer = vec![0; 64 * 1024];
    let mut spent = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        between()?;
        let before = thread_cpu();
        for file in &files {
            let _read = file.read_at(&mut buffer, 0)?;
        }
        spent.push(thread_cpu().saturating_sub(before));
    }
    Ok(median_ms(spent))
}
