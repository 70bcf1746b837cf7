//! CNI ADD and DEL, from the plugin's exec to its exit, against the kernel's floor.
//!
//! | rows | what answers the plugin | floor |
//! |---|---|---|
//! | one by one, bursts | a stub that answers at once: the plugin and the kernel remain | the same netlink requests from one process |
//! | agent: … | the real agent in the lab: checkpoint written (below `/run`, in memory), policy in the maps, programs attached | the same and those that attach the two programs |
//!
//! In a burst every pod is asked for at the same moment; the floor's process serves them in turn. The phases come from the
//! plugin's own log; `outside` is what exec, the linker, exit and the runtime's two pipes take.

mod floor;
mod lab;
mod stub;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use stanchion_daemon::cni::take_plugins;
use stanchion_proto::cni_server::CniServer;
use tokio_stream::wrappers::UnixListenerStream;

use self::stub::AtOnce;
use super::Row;
use super::plot::Plot;
use crate::netns::Netns;
use crate::stray::Maker;

/// Pods that a burst starts at once: a Deployment's, and all that a node of a common size holds.
const BURSTS: [usize; 2] = [30, 110];
/// A second ENI's: pods get both rules.
const TABLE: u32 = 2;

/// How long calls took.
#[derive(Debug, Default)]
struct Calls {
    add: Vec<Duration>,
    del: Vec<Duration>,
}

fn address(number: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 128, 0)) + u32::from(number))
}

/// A namespace that goes when the bench ends, however it ends.
struct Owned(Netns);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("bench cni: {error:#}");
        }
    }
}

struct Site {
    node: Owned,
    dir: tempfile::TempDir,
    plugin: PathBuf,
}

/// Measures; `quick` takes a fifth of the rounds and the smaller burst only.
///
/// # Errors
/// When namespaces cannot be made, the plugin is not built, or a call fails.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let node = Owned(Netns::create(&Maker::CniBench.name("n"))?);
    let site = Site { node, dir: tempfile::tempdir()?, plugin: plugin()? };
    let rounds = if quick { 20 } else { 100 };
    let bursts = if quick { &BURSTS[..1] } else { &BURSTS[..] };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(site.dir.path().join("agent.sock"))?
    };
    let server = tonic::transport::Server::builder().add_service(CniServer::new(AtOnce::default()));
    runtime.spawn(async move { server.serve_with_incoming(take_plugins(UnixListenerStream::new(listener), AtOnce::default())).await });

    let mut rows = Vec::new();
    let floor = floor::one_by_one(&site.node.0, rounds, None)?;
    let log = site.dir.path().join("plugin.log");
    let calls = one_by_one(&site, rounds)?;
    rows.extend(in_plot("stub", 1, verdicts("one by one", &calls, &floor, Some(1.5), None)));
    rows.extend(phases(&log, &calls)?);
    let start = version_calls(&site, rounds)?;
    rows.push(Row::plain("VERSION, p50: a process that reads, parses and prints", percentile(&start, 0.5), "ms"));
    for pods in bursts {
        let floor = floor::burst(&site.node.0, *pods, None)?;
        let calls = burst(&site, *pods)?;
        rows.extend(in_plot("stub", *pods, verdicts(&format!("burst of {pods}"), &calls, &floor, None, Some(1000.0))));
        rows.extend(phases(&log, &calls)?);
    }
    drop(site);
    rows.extend(lab::run(&runtime, rounds, bursts)?);
    Ok(rows)
}

/// The rows of one way of calling. `ratio` bounds the median of ADD against the floor; `limit` its 99th percentile, in ms.
fn verdicts(what: &str, calls: &Calls, floor: &Calls, ratio: Option<f64>, limit: Option<f64>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (verb, times, floors) in [("ADD", &calls.add, &floor.add), ("DEL", &calls.del, &floor.del)] {
        for (name, fraction) in [("p50", 0.5), ("p99", 0.99)] {
            let (value, floor) = (percentile(times, fraction), percentile(floors, fraction));
            let row = Row::against(format!("{verb}, {what}, {name}"), value, "ms", floor);
            rows.push(match (verb, name, ratio) {
                ("ADD", "p50", Some(ratio)) => row.target(ratio),
                _ => row,
            });
            if let ("ADD", "p99", Some(limit)) = (verb, name, limit) {
                rows.push(Row::plain(format!("{verb}, {what}, {name}, by itself"), value, "ms").target(limit));
            }
        }
    }
    rows
}

/// The rows of ADD as points: what it takes against how many are asked for at once.
fn in_plot(who: &str, pods: usize, rows: Vec<Row>) -> Vec<Row> {
    let place = |row: Row| match row.name.rsplit_once(", ") {
        Some((what, part)) if what.starts_with("ADD") && row.floor.is_some() => {
            let series = format!("{who}, {part}");
            row.at(Plot::AddLatency, series, pods as f64)
        }
        _ => row,
    };
    rows.into_iter().map(place).collect()
}

/// The plugin of the smallest profile if it was built, else the one beside this binary.
fn plugin() -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let beside = here.parent().context("the binary has no directory")?;
    let candidates = [beside.join("../plugin/stanchion-cni"), beside.join("stanchion-cni"), beside.join("../stanchion-cni")];
    // Beside a debug build the other profile's may be an old one.
    let candidates = candidates.into_iter().skip(usize::from(beside.ends_with("debug")));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.context("stanchion-cni is not built: cargo build -p stanchion-cni")
}

fn pod_netns(number: usize) -> anyhow::Result<Owned> {
    Ok(Owned(Netns::create(&Maker::CniBench.name(&format!("p{number}")))?))
}

fn one_by_one(site: &Site, rounds: usize) -> anyhow::Result<Calls> {
    let mut calls = Calls::default();
    for number in 0..rounds {
        let pod = pod_netns(number)?;
        calls.add.push(call(site, "ADD", number, &pod.0.path())?);
        calls.del.push(call(site, "DEL", number, &pod.0.path())?);
    }
    Ok(calls)
}

fn version_calls(site: &Site, rounds: usize) -> anyhow::Result<Vec<Duration>> {
    (0..rounds).map(|number| call(site, "VERSION", number, Path::new(""))).collect()
}

/// All at once, as the kubelet does after a node has become ready, and when it is drained.
fn burst(site: &Site, pods: usize) -> anyhow::Result<Calls> {
    let pods = (0..pods).map(pod_netns).collect::<anyhow::Result<Vec<_>>>()?;
    let all = |verb: &str| at_once(&pods, |number, pod| call(site, verb, number, &pod.0.path()));
    Ok(Calls { add: all("ADD")?, del: all("DEL")? })
}

/// Calls for every pod from a thread of its own.
fn at_once<P: Sync>(pods: &[P], call: impl Fn(usize, &P) -> anyhow::Result<Duration> + Sync) -> anyhow::Result<Vec<Duration>> {
    let call = &call;
    std::thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().enumerate().map(|(number, pod)| scope.spawn(move || call(number, pod))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// One call of the plugin in the node's namespace, from before exec to after exit.
fn call(site: &Site, verb: &str, number: usize, netns: &Path) -> anyhow::Result<Duration> {
    let conf = serde_json::json!({
        "cniVersion": "1.1.0", "name": "aws-cni", "type": "stanchion-cni", "socket": site.dir.path().join("agent.sock"),
        "pluginLogFile": site.dir.path().join("plugin.log"),
    });
    let (elapsed, output) = site.node.0.run(|| -> anyhow::Result<_> {
        let mut command = Command::new(&site.plugin);
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("bench{number}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns)
            .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=bench;K8S_POD_NAME=p{number}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn()?;
        child.stdin.take().context("no standard input")?.write_all(conf.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        Ok((started.elapsed(), output))
    })??;
    if !output.status.success() {
        bail!("{verb} of pod {number}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Ok(elapsed)
}

/// The medians of the phases in the plugin's log, `verb=Add … connect_us=… total_us=…`, and what the calls took besides; empties the log.
fn phases(log: &Path, calls: &Calls) -> anyhow::Result<Vec<Row>> {
    let text = std::fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    std::fs::write(log, "").with_context(|| format!("empty {}", log.display()))?;
    // In the order of the first line that has them.
    let mut phases: Vec<(String, Vec<Duration>)> = Vec::new();
    for line in text.lines() {
        let words: Vec<(&str, &str)> = line.split(' ').filter_map(|word| word.split_once('=')).collect();
        let verb = words.iter().find(|(key, _)| *key == "verb").map_or("?", |(_, verb)| *verb).to_uppercase();
        for (key, value) in words {
            let (Some(phase), Ok(us)) = (key.strip_suffix("_us"), value.parse()) else { continue };
            let (phase, took) = (format!("{verb} {phase}"), Duration::from_micros(us));
            match phases.iter_mut().find(|(name, _)| *name == phase) {
                Some((_, times)) => times.push(took),
                None => phases.push((phase, vec![took])),
            }
        }
    }
    let inside: BTreeMap<&str, f64> = phases.iter().map(|(phase, times)| (phase.as_str(), percentile(times, 0.5))).collect();
    let mut rows: Vec<Row> = phases.iter().map(|(phase, _)| Row::plain(format!("  {phase}, p50"), inside[phase.as_str()], "ms")).collect();
    for (verb, times) in [("ADD", &calls.add), ("DEL", &calls.del)] {
        let total = inside.get(format!("{verb} total").as_str()).copied().unwrap_or(f64::NAN);
        rows.push(Row::plain(format!("  {verb} outside, p50"), percentile(times, 0.5) - total, "ms"));
    }
    Ok(rows)
}

/// In milliseconds; the nearest rank.
fn percentile(times: &[Duration], fraction: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among some hundred values"
    )]
    let rank = ((sorted.len() as f64 * fraction).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(rank - 1).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}
