//! What the agent costs while nothing happens: the whole agent, and by itself the metric tick of a full node over real cgroups.

use std::time::Duration;

use anyhow::Context as _;
use stanchion_core::metrics::catalog::Preset;
use stanchion_core::metrics::insights::{NodeIdentity, Selection};
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::telemetry::{Collector, Roots, TelemetrySettings};

use super::{Row, idle_agent};
use crate::pod_cgroups::PodCgroups;

const PODS: usize = 110;
const CONTAINERS: usize = 2;

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Measures the tick, then the whole agent for `window`.
///
/// # Errors
/// When the lab or cgroups cannot be made, or /proc cannot be read.
pub fn run(quick: bool, window: Duration) -> anyhow::Result<Vec<Row>> {
    let mut rows = tick(quick)?;
    rows.extend(idle_agent::run(window)?);
    Ok(rows)
}

/// The tick: 110 pods of 2 containers, every document encoded.
fn tick(quick: bool) -> anyhow::Result<Vec<Row>> {
    let cgroups = PodCgroups::make("node1", PODS, CONTAINERS).context("make cgroups (needs root)")?;
    let rounds = if quick { 20 } else { 200 };
    let mut rows = Vec::new();
    for preset in [Preset::Standard, Preset::Enhanced] {
        let cluster = ClusterHandle::fixed(cgroups.cluster());
        let settings = TelemetrySettings { selection: Selection { preset, ..Selection::default() }, ..TelemetrySettings::default() };
        let identity = NodeIdentity { cluster: "bench".into(), node: "node1".into(), ..NodeIdentity::default() };
        let roots = Roots { cgroup: cgroups.root.path().to_owned(), ..Roots::default() };
        let mut collector = Collector::new(roots, cluster.watch(), identity, &settings);
        collector.collect()?;
        let (mut spent, mut bytes, mut documents) = (Vec::with_capacity(rounds), 0, 0);
        for _ in 0..rounds {
            let before = thread_cpu();
            let (snapshot, messages) = collector.collect()?;
            spent.push(thread_cpu().saturating_sub(before));
            let seen = snapshot.pods.iter().map(|pod| pod.containers.len()).sum::<usize>();
            anyhow::ensure!(seen == PODS * CONTAINERS, "{seen} containers seen instead of {}", PODS * CONTAINERS);
            bytes = messages.iter().map(String::len).sum();
            documents = messages.len();
        }
        spent.sort_unstable();
        let name = preset.name();
        let median = spent[spent.len() / 2].as_secs_f64() * 1e3;
        rows.push(Row::plain(format!("metric tick, CPU, {PODS} pods, {} containers, {name}", PODS * CONTAINERS), median, "ms").target(5.0));
        rows.push(Row::plain(format!("documents of a tick, {name}"), documents as f64, "documents"));
        rows.push(Row::plain(format!("bytes of a tick, {name}"), bytes as f64 / 1e3, "kB"));
    }
    let floor = floor(&cgroups, rounds)?;
    for row in rows.iter_mut().filter(|row| row.unit == "ms") {
        row.floor = Some(floor);
    }
    Ok(rows)
}

/// The same files of cgroups, kept open and read, and nothing else.
fn floor(cgroups: &PodCgroups, rounds: usize) -> anyhow::Result<f64> {
    let names: &[&str] = &[
        "memory.stat",
        "memory.usage_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.failcnt",
        "cpuacct.usage",
        "cpuacct.stat",
        "cpu.stat",
        "memory.current",
    ];
    let mut files = Vec::new();
    for pod in 0..PODS {
        for container in 0..CONTAINERS {
            for directory in cgroups.container(pod, container) {
                let parent = (container == 0).then(|| directory.parent().map(std::path::Path::to_owned)).flatten();
                for directory in parent.into_iter().chain([directory]) {
                    let paths = names.iter().map(|name| directory.join(name)).filter(|path| path.exists());
                    files.extend(paths.map(std::fs::File::open).collect::<Result<Vec<_>, _>>()?);
                }
            }
        }
    }
    let mut buffer = vec![0; 64 * 1024];
    let mut spent = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let before = thread_cpu();
        for file in &files {
            let _read = std::os::unix::fs::FileExt::read_at(file, &mut buffer, 0)?;
        }
        spent.push(thread_cpu().saturating_sub(before));
    }
    spent.sort_unstable();
    Ok(spent[rounds / 2].as_secs_f64() * 1e3)
}
