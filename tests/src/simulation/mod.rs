//! The whole agent in a simulated world, drawn from a seed: hours of pods, policies, logs, faults and crashes in seconds.
//!
//! One thread, tokio's clock paused: whenever everything waits, time goes on to the next timer. What runs are the daemon's own parts,
//! put together as the binary does ([`agent`]); what they see is the world's:
//!
//! | they see | that is |
//! |---|---|
//! | the clock | paused; the time of day follows it, and jumps |
//! | EC2, IMDS, CloudWatch Logs | [`fake_aws`](crate::fake_aws), which throttles, fails, loses requests and replies, and is late |
//! | policy in the kernel | the machine's: maps, programs and links of a namespace of the world's own |
//! | the host's network | a model, in which interfaces come late |
//! | Kubernetes | objects, published as the cluster's source publishes them; or not, while the API server is away |
//! | runtime and plugin | the same calls in the same order, with undoing and the spool ([`plugin`]) |
//!
//! Not inside: the plugin's process, sockets, the AWS SDK, the client of the API server, routes and nft rules. [`chaos`](crate::chaos)
//! breaks these, with the real binaries.
//!
//! The seed decides everything but one thing: when the kernel tells of a grown log file, which is never more than a reason to look.

mod agent;
mod checks;
mod files;
mod garbage;
mod objects;
mod plugin;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::ops::AddAssign;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::ids::{InstanceId, PodName, SubnetId};
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::netpol::KernelMaps;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_netlink::Netlink;
use stanchion_netlink::tc::{TcHook, TcPlace};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::fake_aws::{Bucket, Chaos, Clock, Cloud, CloudConfig, Effect, Fault, InstanceSpec, SubnetSpec, Timing};
use crate::ipam_world::{ModelHost, NODE};
use crate::netns::Netns;
use crate::stray::Maker;
use crate::wall;
use agent::Agent;
use files::Files;
use objects::Objects;
use plugin::{Plugin, Sandbox};

/// Steps of one life: some hours of a node.
pub const STEPS: u64 = 150;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// Pods on the node at the same time, at most.
const PODS: usize = 9;
const TYPES: [&str; 2] = ["m5.large", "t3.small"];
const SETTINGS: [&[(&str, &str)]; 4] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")],
    &[("WARM_IP_TARGET", "1"), ("IP_COOLDOWN_PERIOD", "5")],
];
/// How long nothing has to have been broken for a pod to be connected for sure: longer than IMDS and EC2 lag.
const HEALTHY_FOR: Duration = Duration::from_secs(45);
/// What a pod waits then: longer than the agent pauses between attempts.
const PATIENCE: Duration = Duration::from_secs(300);
/// Addresses that pods can have on the smallest instance.
const ROOM: usize = 9;
/// Everything that can happen in a step.
pub const EVENTS: [&str; 22] = [
    "AWS recovered",
    "AWS went bad",
    "CloudWatch fell silent",
    "EC2 throttled",
    "IMDS fell silent",
    "a crash among starting pods",
    "a crash at rest",
    "a restart in good order",
    "an upgrade",
    "another agent's turn",
    "garbage collected",
    "log lines",
    "pods ended",
    "pods started",
    "policies or labels changed",
    "the API server came back",
    "the API server went away",
    "the agent stayed away",
    "the subnet ran out",
    "the time of day jumped",
    "time jumped",
    "time passed",
];
/// What a storm of throttling is about.
const THROTTLED: [&str; 5] = [
    "CreateNetworkInterface",
    "AttachNetworkInterface",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
    "DetachNetworkInterface",
];

/// What a life saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Steps.
    pub steps: u64,
    /// Simulated seconds.
    pub seconds: u64,
    /// Pods that were connected.
    pub pods: u64,
    /// Of these, pods that had to be: nothing was broken, and there was room.
    pub healthy: u64,
    /// Pods that could not be, while things were broken.
    pub refused: u64,
    /// Why the last of them could not.
    pub last_refusal: String,
    /// Log lines written, all of which arrived.
    pub lines: u64,
    /// Verdicts of the kernel's maps that were held against the definition.
    pub verdicts: u64,
    /// What happened, by name.
    pub events: BTreeMap<&'static str, u64>,
}

impl AddAssign for Told {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.seconds += other.seconds;
        self.pods += other.pods;
        self.healthy += other.healthy;
        self.refused += other.refused;
        self.last_refusal = other.last_refusal;
        self.lines += other.lines;
        self.verdicts += other.verdicts;
        for (name, count) in other.events {
            *self.events.entry(name).or_default() += count;
        }
    }
}

/// One life of a node: `steps` steps, each followed by the checks; then every fault ends and what must be restored is looked at.
///
/// # Errors
/// The first promise that does not hold, with seed and step; or the namespace cannot be made.
pub fn run(seed: u64, steps: u64) -> anyhow::Result<Told> {
    let place = Place::make(seed)?;
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let live = || -> anyhow::Result<Told> {
        let root = place.root.clone();
        runtime().context("make a runtime")?.block_on(async {
            let mut world = World::start(seed, root)?;
            world.live(steps).await
        })
    };
    place.netns.run(live)?.with_context(|| format!("seed {seed}"))
}

/// The command that lives a life again.
pub fn again(seed: u64, steps: u64) -> String {
    format!("cargo xtask soak --simulate --minutes 0 --seed {seed} --steps {steps}")
}

/// A namespace and a directory of pins, gone when dropped.
struct Place {
    netns: Netns,
    root: PathBuf,
}

impl Place {
    fn make(seed: u64) -> anyhow::Result<Self> {
        let name = Maker::Simulation.name(&seed.to_string());
        Ok(Self { netns: Netns::create(&name)?, root: PathBuf::from("/sys/fs/bpf").join(name) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.netns.remove() {
            eprintln!("{error:#}");
        }
        if self.root.exists()
            && let Err(error) = fs::remove_dir_all(&self.root)
        {
            eprintln!("cannot remove {}: {error}", self.root.display());
        }
    }
}

/// What lives longer than an agent.
struct Ground {
    cloud: Cloud,
    instance: InstanceId,
    host: ModelHost,
    cluster: ClusterHandle,
    pins: PathBuf,
    directory: tempfile::TempDir,
    config: Arc<Config>,
}

impl Ground {
    fn dir(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// A pod on the node, as the kubelet has it.
struct Pod {
    sandbox: Sandbox,
    address: Ipv4Addr,
}

struct World {
    random: StdRng,
    ground: Ground,
    subnet: SubnetId,
    agent: Option<Agent>,
    publish: watch::Sender<Arc<ClusterState>>,
    objects: Objects,
    /// The API server is away: what changes is not told.
    away: bool,
    pods: BTreeMap<PodName, Pod>,
    /// When each address was last given back by a pod.
    ended: BTreeMap<Ipv4Addr, Instant>,
    files: Files,
    /// The kernel's maps, as anybody may read them.
    maps: KernelMaps,
    policy: checks::Policy,
    occupied: Vec<Ipv4Addr>,
    /// When something was last broken, or the agent began anew; `None` while something is.
    sound_since: Option<Instant>,
    open_files: BTreeMap<String, usize>,
    next: u32,
    told: Told,
    _follower: JoinHandle<()>,
}

impl World {
    fn start(seed: u64, pins: PathBuf) -> anyhow::Result<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let timing = Timing::drawn(&mut random, seed);
        let mut config = CloudConfig { timing, ..CloudConfig::default() };
        config.vpc_cidrs = vec!["10.0.0.0/16".parse()?];
        let cloud = Cloud::new(config, Clock::tokio());
        wall::set(&cloud, 0);
        let subnet = cloud.add_subnet(SubnetSpec::new("subnet-0a", "eu-west-1a", "10.0.16.0/26".parse()?));
        let instance = InstanceId::from("i-0000000000000000a");
        let instance_type = TYPES[random.random_range(0..TYPES.len())];
        cloud.run_instance(InstanceSpec { id: instance.clone(), ..InstanceSpec::new("i-0", instance_type, &subnet) });
        let host = ModelHost::default();
        let follower = host.follow(&cloud, &instance);
        // In memory where that is to be had: every checkpoint is synced.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
        for name in ["state", "containers", "spool", "cgroup"] {
            fs::create_dir(directory.path().join(name))?;
        }
        // The machine's own would have whatever else runs on it.
        fs::write(directory.path().join("cgroup/cgroup.controllers"), "cpu memory")?;
        let objects = Objects::new();
        let (publish, cluster) = ClusterHandle::channel(ClusterState::default());
        let settings = SETTINGS[random.random_range(0..SETTINGS.len())];
        let read = |name: &str| settings.iter().find(|(setting, _)| *setting == name).map(|(_, value)| (*value).to_owned());
        let config = Arc::new(Config::read(&read).map_err(|errors| anyhow::anyhow!("the world's settings: {errors:?}"))?);
        let ground = Ground { cloud, instance, host, cluster, pins, directory, config };
        let maps = KernelMaps::new(&mut stanchion_daemon::netpol::load(&ground.load_options())?)?;
        let mut world = Self {
            files: Files::new(ground.dir("containers")),
            random,
            subnet,
            agent: None,
            publish,
            objects,
            away: false,
            pods: BTreeMap::new(),
            ended: BTreeMap::new(),
            maps,
            policy: checks::Policy::default(),
            occupied: Vec::new(),
            sound_since: Some(Instant::now()),
            open_files: BTreeMap::new(),
            next: 0,
            told: Told::default(),
            _follower: follower,
            ground,
        };
        world.publish();
        world.agent = Some(Agent::start(&world.ground)?);
        world.open_files = open_files()?;
        Ok(world)
    }

    async fn live(&mut self, steps: u64) -> anyhow::Result<Told> {
        let began = Instant::now();
        for step in 0..steps {
            let what = self.step().await.with_context(|| format!("step {step}"))?;
            tracing::info!(step, what, at = began.elapsed().as_secs_f64());
            *self.told.events.entry(what).or_default() += 1;
            self.told.steps += 1;
            // Here and not in a check: what looks whether anything moves must move nothing itself.
            if self.random.random_bool(0.1) {
                self.files.collect(&self.arrived())?;
            }
            self.check().await.with_context(|| format!("step {step}, after {what}"))?;
        }
        self.rest().await.with_context(|| format!("at rest after {steps} steps"))?;
        self.told.seconds = began.elapsed().as_secs();
        self.told.lines = self.files.written();
        Ok(self.told.clone())
    }

    async fn step(&mut self) -> anyhow::Result<&'static str> {
        let millis = |range: std::ops::Range<u64>, random: &mut StdRng| Duration::from_millis(random.random_range(range));
        Ok(match self.random.random_range(0..101) {
            0..25 => {
                self.start_pods(None).await?;
                "pods started"
            }
            25..42 => {
                self.end_pods().await;
                "pods ended"
            }
            42..44 => {
                self.collect_garbage().await?;
                "garbage collected"
            }
            44..52 => {
                self.objects.change(&mut self.random);
                self.publish();
                "policies or labels changed"
            }
            52..66 => {
                self.files.write(&mut self.random)?;
                sleep(millis(0..3_000, &mut self.random)).await;
                "log lines"
            }
            66..74 => {
                sleep(millis(0..90_000, &mut self.random)).await;
                "time passed"
            }
            74 => {
                // As after a suspended machine: every timer is late at once.
                tokio::time::advance(millis(600_000..7_200_000, &mut self.random)).await;
                self.disturbed();
                "time jumped"
            }
            75..78 => {
                let minutes = self.random.random_range(-90..90);
                wall::set(&self.ground.cloud, minutes);
                self.disturbed();
                "the time of day jumped"
            }
            78..81 => {
                self.away = !self.away;
                self.publish();
                self.disturbed();
                if self.away { "the API server went away" } else { "the API server came back" }
            }
            81..84 => {
                self.chaos();
                "AWS went bad"
            }
            84..87 => {
                self.calm();
                "AWS recovered"
            }
            87 => {
                self.ground.cloud.inject(Fault::times("imds:*", 60, Effect::DropRequest));
                self.sound_since = None;
                "IMDS fell silent"
            }
            88 => {
                self.sound_since = None;
                for action in THROTTLED {
                    self.ground.cloud.set_bucket(action, Bucket { size: 1.0, per_second: self.random.random_range(0.02..0.5) });
                }
                "EC2 throttled"
            }
            89 => {
                self.exhaust();
                "the subnet ran out"
            }
            90 => {
                self.ground.cloud.inject(Fault::always("PutLogEvents", Effect::DropRequest));
                "CloudWatch fell silent"
            }
            91..94 => {
                self.crash().await?;
                self.restart().await?;
                "a crash at rest"
            }
            94..97 => {
                // Somewhere among the calls of an ADD.
                let polls = self.random.random_range(0..300);
                let after = if self.random.random_bool(0.5) { Duration::ZERO } else { millis(0..400, &mut self.random) };
                self.start_pods(Some((polls, after))).await?;
                "a crash among starting pods"
            }
            97 => {
                self.crash().await?;
                "the agent stayed away"
            }
            98 => {
                self.stop().await?;
                self.restart().await?;
                "a restart in good order"
            }
            _ => {
                self.stop().await?;
                self.as_another_version_left_it()?;
                let was_aws_node = self.random.random_bool(0.5);
                if was_aws_node {
                    self.as_aws_node_left_it()?;
                }
                self.restart().await?;
                if was_aws_node { "another agent's turn" } else { "an upgrade" }
            }
        })
    }

    /// Something was amiss until now.
    fn disturbed(&mut self) {
        self.sound_since = self.sound_since.map(|_| Instant::now());
    }

    /// A pod that asks now has to be connected: all has been well for a while, and pods, with those that ended lately, have room.
    fn has_to_serve(&self, pods: usize) -> bool {
        let well = self.sound_since.is_some_and(|since| since.elapsed() >= HEALTHY_FOR);
        let resting = self.ended.values().filter(|ended| ended.elapsed() <= self.ground.config.pool.ip_cooldown + SECOND).count();
        well && self.agent.is_some() && !self.away && self.pods.len() + resting + pods <= ROOM
    }

    /// Tells the agent what the objects are, if there is an API server.
    fn publish(&mut self) {
        if !self.away {
            let state = self.objects.state();
            self.policy.told(&state);
            self.publish.send_replace(state);
        }
    }

    fn plugin(&self) -> Plugin {
        Plugin { service: self.agent.as_ref().map(Agent::service), spool: self.ground.dir("spool") }
    }

    /// Some pods at once. With a crash: after so many turns of the scheduler and so much time.
    async fn start_pods(&mut self, crash: Option<(u32, Duration)>) -> anyhow::Result<()> {
        let count = usize::min(self.random.random_range(1..4), PODS.saturating_sub(self.pods.len()));
        self.start_so_many(count, crash).await
    }

    async fn start_so_many(&mut self, count: usize, crash: Option<(u32, Duration)>) -> anyhow::Result<()> {
        let has_to_serve = crash.is_none() && self.has_to_serve(count);
        let mut starts = Vec::new();
        for _ in 0..count {
            self.next += 1;
            let name = self.objects.bind(&mut self.random, self.next);
            let sandbox = Sandbox::new(&name, self.next);
            let wait = Duration::from_millis(self.random.random_range(10..15_000));
            starts.push((sandbox, if has_to_serve { PATIENCE } else { wait }));
        }
        self.publish();
        let plugin = self.plugin();
        let calls: Vec<_> = starts
            .into_iter()
            .map(|(sandbox, wait)| {
                let plugin = plugin.clone();
                tokio::spawn(async move {
                    let added = plugin.add(&sandbox, wait).await;
                    (sandbox, added, Instant::now())
                })
            })
            .collect();
        if let Some((turns, after)) = crash {
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            sleep(after).await;
            self.crash().await?;
        }
        for call in calls {
            let (sandbox, added, given) = call.await.context("the plugin panicked")?;
            let name = sandbox.pod.clone();
            match added {
                Ok(address) => {
                    self.told.pods += 1;
                    self.told.healthy += u64::from(has_to_serve);
                    let twice = self.pods.values().find(|pod| pod.address == address);
                    ensure!(twice.is_none(), "{address} of {name} is also that of {}", twice.map_or(&name, |pod| &pod.sandbox.pod));
                    let rested = self.ended.get(&address).map(|ended| given - *ended);
                    // Each start reads the clocks to the millisecond.
                    let cooldown = self.ground.config.pool.ip_cooldown;
                    let cool = rested.is_none_or(|rested| rested + SECOND / 10 > cooldown);
                    ensure!(cool, "{address} of {name} had another pod {rested:?} before, and cools down for {cooldown:?}");
                    tracing::info!(pod = %name, %address, "started");
                    self.objects.runs(&name, address);
                    self.files.open(&name)?;
                    self.pods.insert(name, Pod { sandbox, address });
                }
                Err(error) if has_to_serve => return Err(error.context(format!("{name} was refused while nothing was broken"))),
                Err(error) => {
                    self.told.refused += 1;
                    self.told.last_refusal = format!("{error:#}");
                    self.objects.delete(&name);
                }
            }
        }
        if crash.is_some() {
            self.restart().await?;
        }
        self.publish();
        Ok(())
    }

    async fn end_pods(&mut self) {
        let ended: Vec<PodName> = self.pods.keys().filter(|_| self.random.random_bool(0.35)).cloned().collect();
        let plugin = self.plugin();
        for name in ended {
            let Some(pod) = self.pods.remove(&name) else { continue };
            tracing::info!(pod = %name, address = %pod.address, "ends");
            self.ended.insert(pod.address, Instant::now());
            // The kubelet may tell of the end before the runtime calls, or after.
            let told_first = self.random.random_bool(0.3);
            if told_first {
                self.objects.delete(&name);
                self.publish();
            }
            // Where the namespace went first, the link went with it.
            let link_first = self.random.random_bool(0.2);
            if link_first {
                plugin::remove_link(&pod.sandbox.link);
            }
            plugin.del(&pod.sandbox, "PodDeleted").await;
            self.objects.delete(&name);
            self.files.close(&name);
        }
        self.publish();
    }

    fn chaos(&mut self) {
        self.sound_since = None;
        self.ground.cloud.set_chaos(Chaos {
            seed: self.random.next_u64(),
            throttle: self.random.random_range(0..200),
            internal_error: self.random.random_range(0..100),
            lose_reply: self.random.random_range(0..150),
            drop_request: self.random.random_range(0..100),
            delay: self.random.random_range(0..200),
            max_delay: SECOND * 5,
        });
    }

    /// Every fault of AWS ends.
    fn calm(&mut self) {
        self.sound_since = Some(Instant::now());
        self.ground.cloud.clear_faults();
        for action in THROTTLED {
            self.ground.cloud.set_bucket(action, Bucket { size: 1e9, per_second: 1e9 });
        }
        self.ground.cloud.vacate(&self.subnet, std::mem::take(&mut self.occupied));
    }

    /// Others take every free address of the subnet.
    fn exhaust(&mut self) {
        self.sound_since = None;
        for last in 4..63 {
            let address = Ipv4Addr::new(10, 0, 16, last);
            if self.ground.cloud.occupy(&self.subnet, [address]) {
                self.occupied.push(address);
            }
        }
    }

    /// As kill -9 ends it: calls that are on their way go on, nothing else does.
    async fn crash(&mut self) -> anyhow::Result<()> {
        match self.agent.take() {
            Some(agent) => agent.kill().await,
            None => Ok(()),
        }
    }

    async fn stop(&mut self) -> anyhow::Result<()> {
        match self.agent.take() {
            Some(agent) => agent.stop().await,
            None => Ok(()),
        }
    }

    async fn restart(&mut self) -> anyhow::Result<()> {
        self.crash().await?;
        self.disturbed();
        self.agent = Some(Agent::start(&self.ground)?);
        Ok(())
    }

    /// It attaches no programs of ours: what polices the pods is away.
    fn as_aws_node_left_it(&mut self) -> anyhow::Result<()> {
        let (mut netlink, place) = (Netlink::open()?, TcPlace::ours(u16::try_from(LAYOUT_VERSION)?));
        for link in plugin::links()?.iter().filter(|name| name.starts_with("eni")) {
            let index = netlink.link_index(link)?;
            for hook in [TcHook::Ingress, TcHook::Egress] {
                // One whose pod did not come to it has none.
                let _had_one = netlink.detach_program(index, hook, place)?;
            }
        }
        for pins in fs::read_dir(&self.ground.pins)? {
            fs::remove_dir_all(pins?.path())?;
        }
        self.maps = KernelMaps::new(&mut stanchion_daemon::netpol::load(&self.ground.load_options())?)?;
        self.policy.forget();
        match fs::remove_file(self.ground.dir("state").join(agent::ENDPOINTS)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// aws-node's files: it keeps no cool-downs, and older releases tell less of each pod.
    fn as_another_version_left_it(&mut self) -> anyhow::Result<()> {
        let state = self.ground.dir("state");
        let Ok(text) = fs::read(state.join(agent::CHECKPOINT)) else { return Ok(()) };
        let mut file: serde_json::Value = serde_json::from_slice(&text)?;
        for entry in file["allocations"].as_array_mut().into_iter().flatten() {
            if let Some(metadata) = entry["metadata"].as_object_mut() {
                metadata.remove("interfacesCount");
            }
        }
        fs::write(state.join(agent::CHECKPOINT), file.to_string())?;
        self.ended.clear();
        match fs::remove_file(state.join(agent::COOLING)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Descriptors of this process, by what they are of.
fn open_files() -> anyhow::Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        // The directory's own is gone by now.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        let kind = target.to_string_lossy().chars().filter(|letter| !letter.is_ascii_digit()).collect();
        *kinds.entry(kind).or_default() += 1;
    }
    Ok(kinds)
}

impl Ground {
    fn load_options(&self) -> stanchion_daemon::netpol::LoadOptions {
        stanchion_daemon::netpol::LoadOptions { pin_root: self.pins.clone(), flow_entries: 1_024 }
    }

    fn node(&self) -> &'static str {
        NODE
    }
}
