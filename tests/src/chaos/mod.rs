//! Chaos: faults of every kind, drawn from a seed, on a node with traffic, policy, logs and pods that come and go.
//!
//! A storm is a few faults in a row while pods start and end. After it, with every fault lifted, what is promised is
//! checked: nobody got past a policy, no open connection broke, no address has two owners, every line arrived, and the
//! node is what it should be. When all storms are over and the pods are gone, nothing of them may be left.
//!
//! The seed decides which faults come and for how long; the machine decides what they hit. A failure names seed and storm.

mod disk;
mod faults;
mod witness;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures_util::future::try_join_all;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;
use stanchion_ebpf_abi::map_name;
use tokio::task::JoinSet;

use crate::chaos::disk::SmallDisk;
use crate::chaos::faults::Fault;
use crate::chaos::witness::Intruder;
use crate::cloudwatch::Delivered;
use crate::cluster::{Cluster, SOON};
use crate::container_log::Output;
use crate::datapath::layout::shrink;
use crate::fake_kube::FakeKube;
use crate::pod::{Pod, PodSpec};
use crate::probe::{Conversation, Protocol};
use crate::wait::wait_for;

/// The node that the faults are for; the other one's agent runs undisturbed.
const NODE: usize = 0;
const GUARDED: &str = "x/a-0";
const FRIEND: &str = "x/b-0";
const STRANGER: &str = "x/c-0";
const ONLY_FRIEND: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-b}
spec: {podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
";
/// Room of the node's map of verdicts: what it needs, and little more.
const VERDICTS: u32 = 200;
/// Lines that the guarded pod writes in a storm.
const LINES: u32 = 120;
/// Churning pods at the same time, at most.
const PODS: usize = 8;
/// Storms of a phase. One begins with a kill of the agent, and in the next no fault ends it: what it may collect shows.
const PHASE: u32 = 3;
/// A fault that was drawn so often and never hit anything is none: each hits one time in three at least.
const OFTEN: u32 = 20;
/// How much the agent's memory may grow: allocators keep what storms needed at once.
const GROWTH: u64 = 32 << 20;

/// When to end.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many storms.
    Storms(u32),
    /// With the storm in which this much time is over.
    Elapsed(Duration),
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Storms.
    pub storms: u32,
    /// Faults by name.
    pub faults: BTreeMap<String, Drawn>,
    /// Pods that were connected, whose ADD failed, and whose plugin was killed.
    pub pods: [u32; 3],
    /// Probes of these pods after storms that had to get through, and that a policy had to stop.
    pub probes: [u32; 2],
    /// Packets to them that the programs counted as denied.
    pub denied: u64,
    /// Messages of the open connection that came back.
    pub exchanges: u64,
    /// The longest time that one of them took.
    pub longest: Duration,
    /// Attempts to get past the policy.
    pub intrusions: u64,
    /// Log lines.
    pub lines: u32,
    /// Open files and threads of the node's agent before the first storm and after the last one.
    pub held: [Held; 2],
    /// Storms that the last agent lived through.
    pub lived: u32,
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// How often it was its turn.
    pub times: u32,
    /// How often it hit something: a call that failed, a rule that was there.
    pub hit: u32,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Open files.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Resident set.
    pub rss_bytes: u64,
}

/// Runs storms.
///
/// # Errors
/// The first promise that did not hold, with seed and storm.
pub async fn run(seed: u64, until: Until, say: impl Fn(&str)) -> anyhow::Result<Report> {
    let began = Instant::now();
    let mut world = World::start(seed).await?;
    loop {
        let storm = world.report.storms + 1;
        let what = world.storm().await.with_context(|| format!("seed {seed}, storm {storm}"))?;
        say(&format!("storm {storm}: {what}"));
        world.calm().await.with_context(|| format!("seed {seed}, after storm {storm} ({what})\n{}", world.last_words()))?;
        let over = match until {
            Until::Storms(storms) => storm >= storms,
            Until::Elapsed(time) => began.elapsed() >= time,
        };
        if over {
            return world.end().await.with_context(|| format!("seed {seed}, at the end of {storm} storms"));
        }
    }
}

struct World {
    // Before the cluster, whose directory it is mounted in.
    disk: SmallDisk,
    /// What the node's agent reads.
    api: FakeKube,
    intruder: Intruder,
    talk: Conversation,
    cluster: Cluster,
    rng: StdRng,
    churned: Vec<Pod>,
    /// Policies that let only the friend through to them.
    guards: BTreeSet<String>,
    /// The storm before which the agent started that runs.
    started: u32,
    /// Starts that the runtime still waits for.
    starting: JoinSet<anyhow::Result<Pod>>,
    named: u32,
    report: Report,
}

impl World {
    async fn start(seed: u64) -> anyhow::Result<Self> {
        let settings = [("WARM_IP_TARGET", "3"), ("MINIMUM_IP_TARGET", "6"), ("STANCHION_LOG_FLUSH_SECONDS", "0.2")];
        let mut cluster = Cluster::start(&["m5.large", "t3.small"], &settings).await?;
        cluster.agent(NODE)?.kill()?;
        let disk = SmallDisk::over(&cluster.node(NODE).state_dir())?;
        let api = cluster.node(NODE).reads_an_api_server()?;
        // Its agents can be refused things from here on.
        cluster.node(NODE).refusals();
        shrink(cluster.node(NODE).bpf_dir(), map_name::VERDICTS, VERDICTS)?;
        cluster.start_agent(NODE).await?;
        cluster.vpc().manifests().apply("only-b.yaml", ONLY_FRIEND)?;
        for (node, name) in [(NODE, "a-0"), (1, "b-0"), (1, "c-0")] {
            cluster.add_pod(node, PodSpec::new("x", name)).await?;
        }
        cluster.settles(Protocol::Tcp, 80, allowed).await?;
        let guarded = SocketAddr::new(cluster.pod(GUARDED).address(), 80);
        let talk = Conversation::start(cluster.pod(FRIEND).netns(), guarded)?;
        let intruder = Intruder::start(cluster.pod(STRANGER).netns(), guarded)?;
        let mut report = Report::default();
        report.held[0] = Held::of(cluster.agent(NODE)?.pid())?;
        let rng = StdRng::seed_from_u64(seed);
        let (churned, guards, starting) = (Vec::new(), BTreeSet::new(), JoinSet::new());
        Ok(Self { disk, api, intruder, talk, cluster, rng, churned, guards, started: 0, starting, named: 0, report })
    }

    async fn start_agent(&mut self) -> anyhow::Result<()> {
        self.started = self.report.storms;
        self.cluster.start_agent(NODE).await
    }

    /// A few faults in a row, pods coming and going, lines being written. Says what was done.
    async fn storm(&mut self) -> anyhow::Result<String> {
        let may_end_the_agent = (self.report.storms / PHASE).is_multiple_of(2);
        let mut begins = may_end_the_agent && self.report.storms.is_multiple_of(PHASE);
        self.report.storms += 1;
        let mut done = Vec::new();
        for _ in 0..self.rng.random_range(1..=3) {
            self.churn().await?;
            self.write(LINES / 3)?;
            let fault =
                if std::mem::take(&mut begins) { Fault::kill(&mut self.rng) } else { Fault::draw(&mut self.rng, may_end_the_agent) };
            let hit = self.strike(fault).await?;
            let drawn = self.report.faults.entry(fault.name().to_owned()).or_default();
            drawn.times += 1;
            drawn.hit += u32::from(hit);
            done.push(format!("{fault}{}", if hit { "" } else { ", which hit nothing" }));
        }
        self.write(LINES / 3)?;
        Ok(done.join(", "))
    }

    /// Starts some pods without waiting for them, ends others, changes policies that concern them.
    async fn churn(&mut self) -> anyhow::Result<()> {
        let node = self.cluster.node(NODE).clone();
        self.collect(false).await?;
        while !self.churned.is_empty() && self.rng.random_bool(0.4) {
            let pod = self.churned.swap_remove(self.rng.random_range(0..self.churned.len()));
            if self.rng.random_bool(0.3) {
                // The namespace goes first, as after a reboot of the container runtime.
                pod.netns().remove()?;
            }
            node.delete_pod(pod).await?;
        }
        for _ in 0..self.rng.random_range(0..3) {
            if self.churned.len() + self.starting.len() < PODS {
                let (node, spec) = (node.clone(), self.spec());
                self.starting.spawn(async move { node.add_pod(spec).await });
            }
        }
        let policy = format!("churn-{}", self.rng.random_range(0..3));
        if self.rng.random_bool(0.5) {
            self.guard(policy)?;
        } else if self.guards.remove(&policy) {
            self.cluster.vpc().manifests().delete(&format!("{policy}.yaml"))?;
        }
        Ok(())
    }

    /// A policy that lets only the friend through to churning pods.
    fn guard(&mut self, policy: String) -> anyhow::Result<()> {
        let text = ONLY_FRIEND.replace("only-b", &policy).replace("app: a", "app: churn");
        self.cluster.vpc().manifests().apply(&format!("{policy}.yaml"), &text)?;
        self.guards.insert(policy);
        Ok(())
    }

    /// Every churned pod is reached by whom the policies let through, and by nobody else.
    async fn guards_hold(&mut self) -> anyhow::Result<()> {
        let ends = [FRIEND, STRANGER].map(|name| self.cluster.pod(name));
        let guarded = !self.guards.is_empty();
        wait_for("churned pods to be guarded", SOON, || async {
            let probes = self.churned.iter().flat_map(|pod| {
                ends.map(|from| async move {
                    let reached = from.probe(Protocol::Tcp, pod.address(), 80).await?.reached();
                    let may = !guarded || from.name() == FRIEND;
                    ensure!(
                        reached == may,
                        "{} {} {}",
                        from.name(),
                        if reached { "gets through to" } else { "does not reach" },
                        pod.name()
                    );
                    Ok(())
                })
            });
            try_join_all(probes).await
        })
        .await?;
        let pods = u32::try_from(self.churned.len())?;
        self.report.probes[0] += if guarded { pods } else { 2 * pods };
        self.report.probes[1] += if guarded { pods } else { 0 };
        Ok(())
    }

    /// Packets to pods at these addresses that were denied.
    fn denied(&self, pods: &BTreeSet<IpAddr>) -> anyhow::Result<u64> {
        let shown = self.cluster.node(NODE).cli_json(&["endpoints"])?;
        let endpoints = shown["endpoints"].as_array().context("a list of endpoints")?;
        let of = |endpoint: &Value| {
            let address = endpoint.pointer("/interfaces/0/addresses/0")?.as_str()?.parse().ok()?;
            let ours = pods.contains(&address);
            endpoint.pointer("/counters/ingress_denied/packets").and_then(Value::as_u64).filter(|_| ours)
        };
        Ok(endpoints.iter().filter_map(of).sum())
    }

    fn spec(&mut self) -> PodSpec {
        self.named += 1;
        PodSpec::new("x", &format!("churn-{}", self.named))
    }

    /// Takes the pods whose start has ended, or all of them.
    async fn collect(&mut self, all: bool) -> anyhow::Result<()> {
        while let Some(start) = if all { self.starting.join_next().await } else { self.starting.try_join_next() } {
            match start? {
                Ok(pod) => {
                    self.report.pods[0] += 1;
                    self.churned.push(pod);
                }
                // While things are broken a pod may fail to start; the kubelet tries again.
                Err(_) => self.report.pods[1] += 1,
            }
        }
        Ok(())
    }

    fn write(&mut self, count: u32) -> anyhow::Result<()> {
        let first = self.report.lines;
        self.report.lines += count;
        let rotate = self.rng.random_bool(0.2);
        let log = &mut self.cluster.pod_mut(GUARDED).log;
        for line in first..self.report.lines {
            log.line(Output::Stdout, &line_text(line))?;
        }
        if rotate {
            log.rotate()?;
        }
        Ok(())
    }

    /// Lifts every fault and checks what is promised.
    async fn calm(&mut self) -> anyhow::Result<()> {
        self.cluster.vpc().cloud().clear_faults();
        self.disk.empty()?;
        self.cluster.node(NODE).refusals().lift();
        self.collect(true).await?;
        let node = self.cluster.node(NODE).clone();
        node.ready(self.cluster.agent(NODE)?, SOON).await?;
        // A watch that was cut begins anew after a pause, and tells the storm's changes in their order: who knows this policy knows them all.
        // What the maps did not take comes within about a second; until then no pod starts.
        let storm = self.report.storms;
        let newest = format!("x/calm-{storm}");
        let _ = self.cluster.vpc().manifests().delete(&format!("calm-{}.yaml", storm.saturating_sub(1)));
        let text = ONLY_FRIEND.replace("only-b", &format!("calm-{storm}"));
        self.cluster.vpc().manifests().apply(&format!("calm-{storm}.yaml"), &text)?;
        wait_for("every policy in the maps", SOON, || async {
            let known = node.cli_json(&["policy", "show", GUARDED])?.to_string();
            ensure!(known.contains(&newest), "{newest} is not among {known}");
            let status = node.cli_json(&["status"])?;
            ensure!(status["policy"]["ready"] == true, "{}", status["policy"]["reason"]);
            Ok(())
        })
        .await?;
        ensure!(self.intruder.got_through() == 0, "{} connections got past the policy", self.intruder.got_through());
        ensure!(!self.talk.is_over(), "the open connection broke");
        self.cluster.settles(Protocol::Tcp, 80, allowed).await?;
        self.addresses_have_one_owner()?;
        let lines = self.report.lines;
        wait_for("every line", SOON, || async { Delivered::read(self.cluster.vpc().cloud()).at_least_once((0..lines).map(line_text)) })
            .await?;
        self.cluster.vpc().cloud().assert_consistent();
        // A pod that starts now is connected and guarded like any other.
        let spec = self.spec();
        let pod = node.add_pod(spec).await.context("a pod after the storm")?;
        self.report.pods[0] += 1;
        self.churned.push(pod);
        self.guards_hold().await
    }

    fn addresses_have_one_owner(&self) -> anyhow::Result<()> {
        let mut seen = BTreeSet::new();
        let node = self.cluster.node(NODE);
        let assigned: BTreeSet<_> = self.cluster.vpc().assigned(node).into_iter().collect();
        let steady = self.cluster.pods().filter(|(on, _)| on.name() == node.name()).map(|(_, pod)| pod);
        for pod in steady.chain(&self.churned) {
            ensure!(seen.insert(pod.address()), "{} of {} has another owner too", pod.address(), pod.name());
            ensure!(assigned.contains(&pod.address()), "{} of {} is not the node's in EC2", pod.address(), pod.name());
        }
        Ok(())
    }

    /// An agent that starts now finds the maps as it would have written them.
    async fn restart_writes_nothing(&mut self) -> anyhow::Result<()> {
        self.cluster.agent(NODE)?.kill()?;
        self.cluster.start_agent(NODE).await?;
        let text = self.cluster.node(NODE).metrics()?;
        let writes = text.lines().find_map(|line| line.strip_prefix("stanchion_policy_map_writes_total "));
        ensure!(writes == Some("0"), "a restart wrote to the policy maps: {writes:?}");
        Ok(())
    }

    /// Ends every pod and looks for what is left.
    async fn end(mut self) -> anyhow::Result<Report> {
        for (name, drawn) in &self.report.faults {
            ensure!(drawn.hit > 0 || drawn.times < OFTEN, "{name}: drawn {} times, and hit nothing", drawn.times);
        }
        self.guard("churn-0".to_owned())?;
        self.guards_hold().await?;
        self.report.denied = self.denied(&self.churned.iter().map(Pod::address).collect())?;
        ensure!(self.report.denied > 0, "nothing that was sent to the churned pods was counted as denied");
        let node = self.cluster.node(NODE).clone();
        for pod in self.churned.drain(..) {
            node.delete_pod(pod).await?;
        }
        self.report.lived = self.report.storms - self.started;
        let pid = self.cluster.agent(NODE)?.pid();
        let before = self.report.held[0];
        self.report.held[1] = wait_for("the agent to hold no more than before", SOON, || async {
            let held = Held::of(pid)?;
            // A connection to EC2 or CloudWatch may be open or not.
            ensure!(held.files <= before.files + 8 && held.threads <= before.threads + 2, "{before:?} before, now {held:?}");
            ensure!(held.rss_bytes <= before.rss_bytes + GROWTH, "{before:?} before, now {held:?}");
            Ok(held)
        })
        .await?;
        self.restart_writes_nothing().await?;
        let intrusions = self.intruder.stop();
        ensure!(intrusions.got_through == 0, "{} connections got past the policy", intrusions.got_through);
        self.report.intrusions = intrusions.attempts;
        let talk = self.talk.stop();
        if let Some(broken) = talk.broken {
            bail!("the open connection broke: {broken}");
        }
        (self.report.exchanges, self.report.longest) = (talk.exchanges, talk.longest);
        for name in self.cluster.pod_names() {
            self.cluster.delete_pod(&name).await?;
        }
        wait_for("nothing to be left of any pod", SOON, || async {
            let left = self.cluster.leftovers()?;
            ensure!(left.is_empty(), "{}", left.join("; "));
            Ok(())
        })
        .await?;
        Ok(self.report)
    }

    /// What the agent said last, for a failure's message.
    fn last_words(&mut self) -> String {
        self.cluster.agent(NODE).map(|agent| agent.tail()).unwrap_or_default()
    }
}

fn allowed(from: &str, to: &str) -> bool {
    to != GUARDED || from == FRIEND
}

fn line_text(number: u32) -> String {
    format!("line {number} of the storm")
}

impl Held {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).map(Iterator::count);
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
        let pages: u64 = statm.split(' ').nth(1).context("statm has two fields")?.parse()?;
        Ok(Self { files: count("fd")?, threads: count("task")?, rss_bytes: pages * 4096 })
    }
}
