//! What can go wrong, and doing it.

use std::fmt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _};
use tokio::time::sleep;

use crate::chaos::{GUARDED, NODE, ONLY_FRIEND, VERDICTS, World};
use crate::cluster::SOON;
use crate::fake_aws::{Chaos, Effect, Fault as Scripted};
use crate::netns::ip_batch;

/// A fault, and how long it lasts where it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// kill -9 of the agent, which is back after a while.
    Kill(Duration),
    /// SIGTERM to the agent, which is back after a while.
    Terminate(Duration),
    /// SIGSTOP of the agent.
    Freeze(Duration),
    /// kill -9 of a plugin in the middle of an ADD, so long after its start.
    KillPlugin(Duration),
    /// EC2 and the metadata service throttle, fail, lose replies, and are late.
    Ec2 { seed: u64, lasts: Duration },
    /// The metadata service does not answer while an agent starts that follows one that was killed: later it is asked twice a minute.
    Imds(Duration),
    /// CloudWatch Logs does not answer.
    Logs(Duration),
    /// The guarded pod's rules are deleted by hand.
    RulesGone(Duration),
    /// The guarded pod's host route is deleted by hand.
    RouteGone(Duration),
    /// Our nftables tables are deleted by hand.
    TablesGone(Duration),
    /// The disk of the state directory is full.
    DiskFull(Duration),
    /// The agent may open no more files.
    NoFiles(Duration),
    /// The kernel takes no entries into BPF maps: it has no memory, or says that they are full.
    NoEntries { errno: i32, lasts: Duration },
    /// The map of verdicts is full, with a policy's entries.
    MapFull(Duration),
    /// The agent's netlink sockets and requests fail.
    Netlink(Duration),
    /// The API server refuses everything, or ends every watch as soon as it has told what is there.
    Api { outage: bool, lasts: Duration },
}

impl Fault {
    /// One by chance; of those that end the agent only if they may.
    pub(super) fn draw(rng: &mut StdRng, may_end_the_agent: bool) -> Self {
        loop {
            let fault = Self::draw_any(rng);
            if may_end_the_agent || !matches!(fault, Self::Kill(_) | Self::Terminate(_) | Self::Imds(_)) {
                return fault;
            }
        }
    }

    /// The agent is killed, for so long by chance.
    pub(super) fn kill(rng: &mut StdRng) -> Self {
        Self::Kill(Duration::from_millis(rng.random_range(0..1_000)))
    }

    fn draw_any(rng: &mut StdRng) -> Self {
        let mut lasts = |most: u64| Duration::from_millis(rng.random_range(0..most));
        let (short, long) = (lasts(1_000), lasts(3_000));
        match rng.random_range(0..16) {
            0 => Self::Kill(short),
            1 => Self::Terminate(short),
            2 => Self::Freeze(long),
            3 => Self::KillPlugin(Duration::from_micros(rng.random_range(0..8_000))),
            4 => Self::Ec2 { seed: rng.next_u64(), lasts: long },
            5 => Self::Imds(long),
            6 => Self::Logs(long),
            7 => Self::RulesGone(short),
            8 => Self::RouteGone(short),
            9 => Self::TablesGone(short),
            10 => Self::DiskFull(long),
            11 => Self::NoFiles(long),
            12 => Self::NoEntries { errno: if rng.random_bool(0.7) { libc::ENOMEM } else { libc::E2BIG }, lasts: long },
            13 => Self::MapFull(long),
            14 => Self::Netlink(long),
            _ => Self::Api { outage: rng.random_bool(0.5), lasts: long },
        }
    }

    pub(super) fn name(self) -> &'static str {
        self.parts().0
    }

    fn parts(self) -> (&'static str, Duration) {
        match self {
            Self::Kill(for_) => ("agent killed", for_),
            Self::Terminate(for_) => ("agent stopped", for_),
            Self::Freeze(for_) => ("agent frozen", for_),
            Self::KillPlugin(after) => ("plugin killed", after),
            Self::Ec2 { lasts, .. } => ("EC2 faults", lasts),
            Self::Imds(for_) => ("metadata service away", for_),
            Self::Logs(for_) => ("CloudWatch Logs away", for_),
            Self::RulesGone(for_) => ("rules deleted", for_),
            Self::RouteGone(for_) => ("route deleted", for_),
            Self::TablesGone(for_) => ("nft tables deleted", for_),
            Self::DiskFull(for_) => ("disk full", for_),
            Self::NoFiles(for_) => ("no file descriptors", for_),
            Self::NoEntries { errno: libc::ENOMEM, lasts } => ("no memory for map entries", lasts),
            Self::NoEntries { lasts, .. } => ("map entries refused", lasts),
            Self::MapFull(for_) => ("verdict map full", for_),
            Self::Netlink(for_) => ("netlink fails", for_),
            Self::Api { outage: true, lasts } => ("API server away", lasts),
            Self::Api { lasts, .. } => ("watches cut", lasts),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, time) = self.parts();
        write!(f, "{name} ({time:.0?})")
    }
}

impl World {
    /// Does it, and undoes what lasts; damage to the kernel's state is the agent's to mend. Says whether it hit anything: a call that
    /// failed, an entry that was there.
    pub(super) async fn strike(&mut self, fault: Fault) -> anyhow::Result<bool> {
        let node = self.cluster.node(NODE).clone();
        let cloud = self.cluster.vpc().cloud().clone();
        let ended = self.cluster.agent(NODE)?.ended()?;
        ensure!(ended.is_none(), "the agent ended by itself: {ended:?}");
        Ok(match fault {
            Fault::Kill(away) => {
                self.cluster.agent(NODE)?.kill()?;
                sleep(away).await;
                self.start_agent().await?;
                true
            }
            Fault::Terminate(away) => {
                let status = self.cluster.agent(NODE)?.stop(SOON).await?;
                ensure!(status.success(), "the agent ended with {status}");
                sleep(away).await;
                self.start_agent().await?;
                true
            }
            Fault::Freeze(lasts) => {
                let pid = self.cluster.agent(NODE)?.pid();
                self.cluster.agent(NODE)?.signal(Signal::SIGSTOP)?;
                sleep(lasts).await;
                let is_frozen = std::fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(") T ");
                self.cluster.agent(NODE)?.signal(Signal::SIGCONT)?;
                is_frozen
            }
            Fault::KillPlugin(after) => {
                let spec = self.spec();
                let had_ended = node.add_pod_killed(spec, after).await?;
                self.report.pods[2] += 1;
                !had_ended
            }
            Fault::Ec2 { seed, lasts } => {
                let failed = cloud.failed();
                cloud.set_chaos(Chaos {
                    seed,
                    throttle: 200,
                    internal_error: 100,
                    lose_reply: 100,
                    drop_request: 100,
                    delay: 200,
                    max_delay: Duration::from_millis(500),
                });
                sleep(lasts).await;
                cloud.clear_faults();
                cloud.failed() > failed
            }
            Fault::Imds(lasts) => {
                let failed = cloud.failed();
                cloud.inject(Scripted::always("imds:*", Effect::DropRequest));
                self.cluster.agent(NODE)?.kill()?;
                let comes_back = async {
                    sleep(lasts).await;
                    cloud.clear_faults();
                };
                let (started, ()) = tokio::join!(self.start_agent(), comes_back);
                started?;
                cloud.failed() > failed
            }
            Fault::Logs(lasts) => {
                let failed = cloud.failed();
                cloud.inject(Scripted::always("PutLogEvents", Effect::DropRequest));
                sleep(lasts).await;
                cloud.clear_faults();
                cloud.failed() > failed
            }
            Fault::RulesGone(pause) => {
                let address = self.cluster.pod(GUARDED).address();
                // An earlier storm may have deleted it, and the agent not yet put it back.
                let was_there = ip_batch(node.netns().name(), &format!("rule del priority 512 to {address}\n")).is_ok();
                sleep(pause).await;
                was_there
            }
            Fault::RouteGone(pause) => {
                let address = self.cluster.pod(GUARDED).address();
                let was_there = ip_batch(node.netns().name(), &format!("route del {address}/32\n")).is_ok();
                sleep(pause).await;
                was_there
            }
            Fault::TablesGone(pause) => {
                let mut was_there = false;
                for family in ["ip", "ip6"] {
                    // Absent where it has nothing to say.
                    let delete = node.netns().output(Command::new("nft").args(["delete", "table", family, "stanchion"]));
                    was_there |= delete.context("run nft")?.status.success();
                }
                sleep(pause).await;
                was_there
            }
            Fault::DiskFull(lasts) => {
                let told = self.told_of(libc::ENOSPC)?;
                self.disk.fill()?;
                sleep(lasts).await;
                self.disk.empty()?;
                self.told_of(libc::ENOSPC)? > told
            }
            Fault::NoFiles(lasts) => {
                let pid = self.cluster.agent(NODE)?.pid();
                let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
                let before = limit_files(pid, None)?;
                let told = self.told_of(libc::EMFILE)?;
                limit_files(pid, Some(&open.to_string()))?;
                sleep(lasts).await;
                limit_files(pid, Some(&before))?;
                self.told_of(libc::EMFILE)? > told
            }
            Fault::NoEntries { errno, lasts } => {
                node.refusals().refuse_map_updates(0, errno);
                self.churn().await?;
                sleep(lasts).await;
                node.refusals().lift() > 0
            }
            Fault::MapFull(lasts) => {
                let ports: Vec<String> = (0..VERDICTS + 50).map(|n| format!("{{port: {}}}", 1_001 + 2 * n)).collect();
                let more = format!("ingress: [{{ports: [{}]}}, {{from:", ports.join(", "));
                let text = ONLY_FRIEND.replace("name: only-b", "name: full").replace("ingress: [{from:", &more);
                self.cluster.vpc().manifests().apply("full.yaml", &text)?;
                let until = Instant::now() + lasts;
                let mut is_told = false;
                while Instant::now() < until {
                    is_told |= node.cli_json(&["status"]).is_ok_and(|status| status["policy"]["ready"] == false);
                    sleep(Duration::from_millis(50)).await;
                }
                self.cluster.vpc().manifests().delete("full.yaml")?;
                is_told
            }
            Fault::Netlink(lasts) => {
                node.refusals().refuse_netlink(libc::ENOBUFS);
                sleep(lasts).await;
                node.refusals().lift() > 0
            }
            Fault::Api { outage, lasts } => {
                let asked = self.api.requests().len();
                if outage {
                    self.api.outage(Some(503));
                    self.api.disconnect();
                } else {
                    self.api.cut_watches(true);
                    self.api.compact(false);
                }
                self.churn().await?;
                sleep(lasts).await;
                // Each was refused, or is a watch that takes the place of one that was cut.
                let was_asked = self.api.requests().len() > asked;
                self.api.outage(None);
                self.api.cut_watches(false);
                was_asked
            }
        })
    }

    /// How often the node's agents have told of an error of this number.
    fn told_of(&self, errno: i32) -> anyhow::Result<usize> {
        let output = std::fs::read(self.cluster.node(NODE).agent_output())?;
        Ok(String::from_utf8_lossy(&output).matches(&format!("(os error {errno})")).count())
    }
}

/// Sets the soft limit of open files of a process, or tells it.
fn limit_files(pid: u32, soft: Option<&str>) -> anyhow::Result<String> {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &pid.to_string()]);
    match soft {
        Some(soft) => command.arg(format!("--nofile={soft}:")),
        None => command.args(["--nofile", "--noheadings", "--output", "SOFT"]),
    };
    let output = command.output().context("run prlimit")?;
    ensure!(output.status.success(), "prlimit: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
