//! The address actor, EC2, IMDS and the host under lag, throttling, lost replies, hands and crashes, by seed.
//!
//! ```text
//! STANCHION_SIM_STEPS=1000000 cargo test -p stanchion-lab --test ipam_simulation no_seed    # a long run
//! STANCHION_SIM_MINUTES=20 ...                                                                    # as many as fit into that
//! STANCHION_SIM_SEED=17 cargo test -p stanchion-lab --test ipam_simulation no_seed          # one seed; a failure prints it
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use stanchion_core::cloud::{AddressRequest, Ec2Api as _};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::ids::{EniId, PodName};
use stanchion_core::manifests;
use stanchion_core::network::host_veth_name;
use stanchion_daemon::ipamd::{AssignError, Assignment};
use stanchion_lab::fake_aws::{Bucket, Chaos, DirectEc2, Effect, Fault, SubnetSpec, Timing};
use stanchion_lab::ipam_world::{MUTATING, World, WorldSpec, request};
use stanchion_lab::wall;
use tokio::task::JoinHandle;

const SECOND: Duration = Duration::from_secs(1);
/// Operations of one world's life.
const STEPS_A_RUN: u64 = 250;
/// A few seconds; CI asks for a million.
const STEPS_UNASKED: u64 = 5_000;

/// Seeds that found something.
const ONCE_FAILED: [u64; 3] = [41, 69, 763];

const TYPES: [&str; 3] = ["m5.large", "t3.small", "m5.xlarge"];
const SETTINGS: [&[(&str, &str)]; 9] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")],
    &[("WARM_ENI_TARGET", "0"), ("IP_COOLDOWN_PERIOD", "5")],
    &[("MINIMUM_IP_TARGET", "11"), ("MAX_ENI", "2")],
    &[("WARM_IP_TARGET", "1"), ("CLUSTER_NAME", "lab")],
    CUSTOM_NETWORKING,
    &[
        ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"),
        ("ENI_CONFIG_LABEL_DEF", "zone"),
        ("ENABLE_PREFIX_DELEGATION", "true"),
        ("WARM_PREFIX_TARGET", "1"),
    ],
    IMDS_ONLY,
];
const CUSTOM_NETWORKING: &[(&str, &str)] =
    &[("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"), ("ENI_CONFIG_LABEL_DEF", "zone"), ("WARM_IP_TARGET", "2")];
/// Somebody else gives the node its addresses.
const IMDS_ONLY: &[(&str, &str)] = &[("ENABLE_IMDS_ONLY_MODE", "true")];
/// Where custom networking has the pods' ENIs.
const POD_SUBNET: &str = "subnet-pods";
const OBJECTS: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {zone: eu-west-1a}}
---
apiVersion: crd.k8s.amazonaws.com/v1alpha1
kind: ENIConfig
metadata: {name: eu-west-1a}
spec: {subnet: subnet-pods}
";

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("runtime")
}

#[test]
fn no_seed_gives_an_address_twice_or_leaks_one() {
    if let Some(seed) = number("STANCHION_SIM_SEED") {
        // As the daemon logs it: RUST_LOG=stanchion_daemon=debug.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
        println!("seed {seed}, {} steps: {}", STEPS_A_RUN, live(seed));
        return;
    }
    for seed in ONCE_FAILED {
        live(seed);
    }
    let runs = number("STANCHION_SIM_STEPS").unwrap_or(STEPS_UNASKED).div_ceil(STEPS_A_RUN);
    let until = number("STANCHION_SIM_MINUTES").map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    println!("{runs} seeds of {STEPS_A_RUN} steps");
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    let told: Vec<Told> = std::thread::scope(|scope| {
        let worker = || {
            let mut told = Told::default();
            loop {
                if until.is_some_and(|until| Instant::now() > until) {
                    return told;
                }
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= runs {
                    return told;
                }
                match catch_unwind(AssertUnwindSafe(|| live(seed))) {
                    Ok(of_run) => told += of_run,
                    Err(panic) => {
                        eprintln!(
                            "seed {seed} fails; again: STANCHION_SIM_SEED={seed} cargo test -p stanchion-lab --test ipam_simulation no_seed"
                        );
                        resume_unwind(panic);
                    }
                }
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let sum = told.into_iter().fold(Told::default(), |mut sum, told| {
        sum += told;
        sum
    });
    println!("{sum}");
    let taken = next.into_inner().min(runs);
    if taken < runs {
        println!("{taken} of {runs} seeds in the minutes given");
    }
    assert_eq!(sum.steps, taken * STEPS_A_RUN);
    assert!(
        sum.served > 0 && sum.crashes > 0 && sum.survived > 0 && sum.set > 0 && sum.detached > 0 && sum.storms > 0 && sum.exhausted > 0,
        "every fault has its turn: {sum}"
    );
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    steps: u64,
    served: u64,
    crashes: u64,
    survived: u64,
    set: u64,
    detached: u64,
    storms: u64,
    exhausted: u64,
}

impl std::ops::AddAssign for Told {
    fn add_assign(&mut self, rhs: Self) {
        self.steps += rhs.steps;
        self.served += rhs.served;
        self.crashes += rhs.crashes;
        self.survived += rhs.survived;
        self.set += rhs.set;
        self.detached += rhs.detached;
        self.storms += rhs.storms;
        self.exhausted += rhs.exhausted;
    }
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { steps, served, crashes, survived, set, detached, storms, exhausted } = self;
        write!(f, "{steps} steps: {served} pods served, {crashes} crashes ({set} with the clock set) survived by {survived} new pods, ")?;
        write!(f, "{detached} ENIs detached by hand, ")?;
        write!(f, "{storms} throttling storms, {exhausted} exhausted subnets")
    }
}

fn live(seed: u64) -> Told {
    paused().block_on(async { Life::begin(seed).await.run().await })
}

/// One world from its start to its healing.
struct Life {
    seed: u64,
    random: StdRng,
    world: World,
    pods: BTreeMap<String, Ipv4Addr>,
    /// Pods whose ENI was taken away by hand: their address is gone, and must not be another's while they live.
    stranded: BTreeMap<String, Ipv4Addr>,
    /// Those ENIs. Until the agent hears of it, it gives out their addresses.
    by_hand: BTreeSet<EniId>,
    /// When each address was last given back by a pod.
    ended: BTreeMap<Ipv4Addr, tokio::time::Instant>,
    cooldown: Duration,
    /// Addresses that somebody else holds for a while.
    occupied: Vec<Ipv4Addr>,
    small: bool,
    imds_only: bool,
    /// Minutes that the node's clock is before EC2's.
    off: i64,
    next: u32,
    told: Told,
}

impl Life {
    /// Inside a runtime: the actor is spawned there.
    async fn begin(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let timing = Timing::drawn(&mut random, seed);
        let settings = SETTINGS[random.random_range(0..SETTINGS.len())];
        let mut spec = WorldSpec { timing, ..WorldSpec::new(TYPES[random.random_range(0..TYPES.len())], settings) };
        let small = random.random_bool(0.4);
        if small {
            spec.subnet = "10.0.16.0/26".parse().expect("CIDR");
        }
        let config = Config::read(&|name| spec.env.get(name).cloned()).expect("valid settings");
        let (cooldown, imds_only) = (config.pool.ip_cooldown, config.pool.imds_only);
        let world = World::start_with(spec, |cloud, _| {
            cloud.add_subnet(SubnetSpec::new(POD_SUBNET, "eu-west-1a", "10.0.64.0/25".parse().expect("CIDR")));
        });
        let objects = manifests::parse("nodes.yaml", OBJECTS).expect("manifests");
        world.cluster.send_replace(Arc::new(ClusterState::default().replaced_by(objects)));
        if imds_only {
            let primary = world.cloud.enis_of(&world.instance)[0].id.clone();
            let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
            by_hand.assign(&primary, AddressRequest::Ipv4(3)).await.expect("provided");
        }
        let (pods, stranded) = (BTreeMap::new(), BTreeMap::new());
        Self {
            seed,
            random,
            world,
            pods,
            stranded,
            by_hand: BTreeSet::new(),
            ended: BTreeMap::new(),
            cooldown,
            occupied: Vec::new(),
            small,
            imds_only,
            off: 0,
            next: 0,
            told: Told::default(),
        }
    }

    async fn run(mut self) -> Told {
        for step in 0..STEPS_A_RUN {
            self.step(step).await;
            self.told.steps += 1;
            self.check(step);
        }
        self.heal().await;
        self.told
    }

    async fn step(&mut self, step: u64) {
        match self.random.random_range(0..1_000) {
            0..430 => self.burst(step).await,
            430..700 => self.end_some().await,
            700..800 => tokio::time::sleep(Duration::from_millis(self.random.random_range(0..120_000))).await,
            800..850 => self.world.cloud.set_chaos(Chaos {
                seed: self.random.random(),
                throttle: self.random.random_range(0..200),
                internal_error: self.random.random_range(0..100),
                lose_reply: self.random.random_range(0..150),
                drop_request: self.random.random_range(0..100),
                delay: self.random.random_range(0..200),
                max_delay: SECOND * 5,
            }),
            850..880 => self.calm(),
            880..895 => {
                let enis = self.world.cloud.enis_of(&self.world.instance);
                let eni = &enis[self.random.random_range(0..enis.len())];
                self.world.cloud.hide_from_imds(&eni.id, SECOND * 40);
            }
            895..905 => self.world.cloud.inject(Fault::times("imds:*", 60, Effect::DropRequest)),
            905..920 => self.storm(),
            920..935 => self.exhaust(),
            935..945 => self.detach_by_hand().await,
            945..970 => self.crash_at_an_effect(step).await,
            _ => {
                // A crash in the middle of whatever is under way.
                let (handle, name) = (self.world.handle.clone(), format!("crash-{step}"));
                let asked = (name.clone(), tokio::spawn(async move { handle.assign(request(&name, SECOND)).await }));
                tokio::time::sleep(Duration::from_millis(self.random.random_range(0..400))).await;
                self.crash(step, vec![asked]).await;
            }
        }
    }

    /// Of the pods that asked some were answered before the end: each of these lives, or dies with the process. Now and then the node's clock
    /// has been set back or forward when the next one starts.
    async fn crash(&mut self, step: u64, asked: Vec<(String, JoinHandle<Result<Assignment, AssignError>>)>) {
        self.told.crashes += 1;
        self.world.kill();
        let ended = tokio::time::Instant::now();
        for (name, asked) in asked {
            let answer = asked.await.expect("no panic");
            if let Ok(assignment) = answer
                && self.random.random_bool(0.7)
            {
                self.told.survived += 1;
                self.starts(step, name, &assignment, ended);
            }
        }
        if self.random.random_bool(0.1) {
            self.off += self.random.random_range(-120..120);
            self.told.set += 1;
            wall::set(&self.world.cloud, self.off);
        }
        self.world.restart();
    }

    /// Faults, storms and strangers' addresses end.
    fn calm(&mut self) {
        self.world.cloud.clear_faults();
        for action in MUTATING {
            self.world.cloud.set_bucket(action, Bucket { size: 1e9, per_second: 1e9 });
        }
        let subnet = self.world.subnet.clone();
        self.world.cloud.vacate(&subnet, std::mem::take(&mut self.occupied));
    }

    async fn burst(&mut self, step: u64) {
        let burst = self.random.random_range(1..6);
        let waits: Vec<_> = (0..burst)
            .map(|_| {
                self.next += 1;
                let (name, handle) = (format!("pod-{}", self.next), self.world.handle.clone());
                let wait = Duration::from_millis(self.random.random_range(10..15_000));
                tokio::spawn(async move { (handle.assign(request(&name, wait)).await, tokio::time::Instant::now(), name) })
            })
            .collect();
        for wait in waits {
            let (result, given, name) = wait.await.expect("no panic");
            if let Ok(assignment) = result {
                self.starts(step, name, &assignment, given);
            }
        }
    }

    /// A pod that was given an address.
    fn starts(&mut self, step: u64, name: String, assignment: &Assignment, given: tokio::time::Instant) {
        self.told.served += 1;
        let address = assignment.attachments[0].ipv4.expect("IPv4");
        let twice = self.pods.iter().chain(&self.stranded).find(|(_, other)| **other == address);
        assert!(twice.is_none(), "seed {} step {step}: {address} for {name} and {twice:?}", self.seed);
        let rested = self.ended.get(&address).map(|ended| given - *ended);
        // Each start reads the clocks to the millisecond.
        let cool = rested.is_none_or(|rested| rested + SECOND / 10 > self.cooldown);
        assert!(cool, "seed {} step {step}: {address} for {name} after {rested:?}\n{}", self.seed, self.story());
        self.world.veths.insert(host_veth_name("eni", &PodName::new("default", name.clone()), 0));
        if self.by_hand.contains(&assignment.attachments[0].eni) {
            self.stranded.insert(name, address);
            return;
        }
        let owner = self.world.cloud.owner_of(address.into());
        let told = &assignment.attachments[0].eni;
        assert_eq!(owner.as_ref(), Some(told), "seed {} step {step}: {name} got {address}\n{}", self.seed, self.story());
        self.pods.insert(name, address);
    }

    async fn end_some(&mut self) {
        let stranded: Vec<String> = std::mem::take(&mut self.stranded).into_keys().collect();
        let gone = self.pods.keys().filter(|_| self.random.random_bool(0.3)).cloned().chain(stranded);
        for name in gone.collect::<Vec<_>>() {
            // A DEL that was not answered may still be done: the pod is gone, its address is not ours to judge.
            self.pods.remove(&name);
            let asked = tokio::time::Instant::now();
            if let Ok(Some(ended)) = self.world.delete(&name).await {
                self.ended.extend(ended.attachments.iter().filter_map(|held| Some((held.ipv4?, asked))));
            }
        }
    }

    fn storm(&mut self) {
        self.told.storms += 1;
        for action in MUTATING {
            self.world.cloud.set_bucket(action, Bucket { size: 1.0, per_second: self.random.random_range(0.02..0.5) });
        }
    }

    /// Others take the subnet's free addresses, or one of every block.
    fn exhaust(&mut self) {
        self.told.exhausted += 1;
        if !self.small {
            return self.world.cloud.fragment(&self.world.subnet);
        }
        for last in 4..63 {
            let address = Ipv4Addr::new(10, 0, 16, last);
            if self.world.cloud.occupy(&self.world.subnet, [address]) {
                self.occupied.push(address);
            }
        }
    }

    async fn detach_by_hand(&mut self) {
        let enis = self.world.cloud.enis_of(&self.world.instance);
        let Some(eni) = enis.get(1..).filter(|others| !others.is_empty()) else { return };
        let eni = &eni[self.random.random_range(0..eni.len())];
        let Some(attachment) = &eni.attachment else { return };
        let by_hand = DirectEc2::new(&self.world.cloud, Duration::ZERO);
        // The hand's reply may be lost as well.
        drop(by_hand.detach_eni(&attachment.id).await);
        if self.world.cloud.eni(&eni.id).is_some_and(|eni| eni.status == "in-use") {
            return;
        }
        self.told.detached += 1;
        self.by_hand.insert(eni.id.clone());
        let on_it = |address: Ipv4Addr| eni.secondary_ipv4.contains(&address) || eni.prefixes_v4.iter().any(|net| net.contains(&address));
        let stranded = self.pods.extract_if(.., |_, address| on_it(*address)).collect::<Vec<_>>();
        self.stranded.extend(stranded);
    }

    /// EC2 has done it, or is about to answer, or has just answered: the process ends there.
    async fn crash_at_an_effect(&mut self, step: u64) {
        let action = MUTATING[self.random.random_range(0..MUTATING.len())];
        let before = self.world.cloud.count(action);
        let asked: Vec<_> = (0..12)
            .map(|n| {
                let (handle, name) = (self.world.handle.clone(), format!("effect-{step}-{n}"));
                (name.clone(), tokio::spawn(async move { handle.assign(request(&name, SECOND * 20)).await }))
            })
            .collect();
        for _ in 0..2_000 {
            if self.world.cloud.count(action) > before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let after = [0, 60, 101, 110, 250][self.random.random_range(0..5)];
        tokio::time::sleep(Duration::from_millis(after)).await;
        self.crash(step, asked).await;
    }

    /// What led to a failure: EC2's last calls, and what the agent holds.
    fn story(&self) -> String {
        let calls = self.world.cloud.calls();
        let last = calls.iter().filter(|call| !call.action.starts_with("imds")).rev().take(40).collect::<Vec<_>>();
        let calls: Vec<String> = last
            .iter()
            .rev()
            .map(|call| format!("{:?} {} {:?}{}", call.at, call.action, call.error, if call.lost { " lost" } else { "" }))
            .collect();
        let snapshot = self.world.handle.snapshot();
        let enis: Vec<String> = snapshot.enis.iter().map(|eni| format!("{} {} {:?}", eni.id, eni.role, eni.cidrs)).collect();
        let there: Vec<_> =
            self.world.cloud.enis().into_iter().map(|eni| (eni.id, eni.status, eni.secondary_ipv4, eni.prefixes_v4)).collect();
        format!(
            "calls:\n{}\nby hand: {:?}\nthe agent's ENIs:\n{}\nEC2's: {there:#?}\nerrors: {:#?}",
            calls.join("\n"),
            self.by_hand,
            enis.join("\n"),
            snapshot.recent_errors
        )
    }

    fn check(&self, step: u64) {
        let seed = self.seed;
        assert!(!self.world.has_ended(), "seed {seed} step {step}: the actor ended");
        self.world.cloud.assert_consistent();
        for (name, address) in &self.pods {
            let owner = self.world.cloud.owner_of((*address).into());
            assert!(owner.is_some(), "seed {seed} step {step}: {address} of {name} went back to EC2\n{}", self.story());
        }
        let attached = self.world.cloud.enis_of(&self.world.instance);
        let indexes: BTreeSet<_> =
            attached.iter().filter_map(|eni| eni.attachment.as_ref().map(|attachment| attachment.device_index)).collect();
        assert_eq!(indexes.len(), attached.len(), "seed {seed} step {step}: an index is taken twice");
    }

    /// With the faults over, everything is as if nothing had happened.
    async fn heal(&mut self) {
        let seed = self.seed;
        self.calm();
        self.world.restart();
        self.world.handle.ready().await.expect("ready");
        for name in std::mem::take(&mut self.stranded).into_keys() {
            self.world.delete(&name).await.expect("released");
        }
        tokio::time::sleep(SECOND * 1_200).await;
        self.world.settle(SECOND * 200).await;
        let snapshot = self.world.handle.snapshot();
        let held = snapshot.addresses.iter().filter(|view| view.state == "assigned").filter_map(|view| match view.address {
            IpAddr::V4(address) => Some((view.pod.as_ref()?.name.clone(), address)),
            IpAddr::V6(_) => None,
        });
        assert_eq!(held.collect::<BTreeMap<_, _>>(), self.pods, "seed {seed}: what is held is what lives");
        let attached = self.world.cloud.enis_of(&self.world.instance);
        // The sweep of the next hour has the last word on ENIs that a crash left behind.
        tokio::time::sleep(SECOND * 3_700).await;
        let left: Vec<_> = self.world.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()).map(|eni| eni.id).collect();
        assert!(left.is_empty(), "seed {seed}: left behind {left:?}");
        if self.imds_only {
            // That of the others.
            let changes: usize = MUTATING.iter().map(|action| self.world.cloud.count(action)).sum();
            assert_eq!(changes, 1, "seed {seed}: only IMDS is to be read");
        }
        assert!(attached.len() <= snapshot.max_enis as usize, "seed {seed}: {} ENIs", attached.len());
        let known: u64 = snapshot.pools.iter().map(|pool| pool.total).sum();
        let there: usize = attached.iter().map(|eni| eni.secondary_ipv4.len() + 16 * eni.prefixes_v4.len()).sum();
        assert_eq!(known, there as u64, "seed {seed}: the agent knows every address that EC2 counts");
    }
}

/// Every call of a node's life, one after the other: the process ends when EC2 has done it and before it was heard, and when it
/// was just heard.
#[test]
fn a_crash_at_every_effect_leaks_nothing() {
    let mut crashed = 0;
    for settings in [&[("WARM_IP_TARGET", "1")][..], &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")], &[]] {
        for after in [Duration::from_millis(5), Duration::from_millis(105)] {
            for nth in 1..40 {
                if !paused().block_on(crash_after(settings, nth, after)) {
                    break;
                }
                crashed += 1;
            }
        }
    }
    assert!(crashed >= 50, "only {crashed} effects");
}

/// A node's life with a crash at its `nth` call; false when it has fewer.
async fn crash_after(settings: &[(&str, &str)], nth: usize, after: Duration) -> bool {
    let timing = Timing { attach: SECOND * 2, imds_lag: SECOND * 3, describe_lag: Duration::from_millis(400), ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("t3.small", settings) });
    let calls = |world: &World| MUTATING.iter().map(|action| world.cloud.count(action)).sum::<usize>();
    let mut crashed = false;
    let mut waits = Vec::new();
    // Eight pods come, stay a minute, and go; the pool shrinks after it.
    for tick in 0..12_000u32 {
        if tick == 0 {
            for n in 0..8 {
                let handle = world.handle.clone();
                waits.push(tokio::spawn(async move { handle.assign(request(&format!("pod-{n}"), SECOND * 30)).await.is_ok() }));
            }
        }
        if tick == 2_500 {
            for n in 0..8 {
                drop(world.delete(&format!("pod-{n}")).await);
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        if calls(&world) >= nth {
            tokio::time::sleep(after).await;
            world.restart();
            crashed = true;
            break;
        }
    }
    for wait in waits {
        drop(wait.await);
    }
    world.handle.ready().await.expect("ready");
    for n in 0..8 {
        world.delete(&format!("pod-{n}")).await.expect("released");
    }
    tokio::time::sleep(SECOND * 1_200).await;
    world.settle(SECOND * 200).await;
    tokio::time::sleep(SECOND * 3_700).await;
    let context = format!("{settings:?}, call {nth}, {after:?} after it");
    let left: Vec<_> = world.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()).map(|eni| eni.id).collect();
    assert!(left.is_empty(), "{context}: left behind {left:?}");
    let attached = world.cloud.enis_of(&world.instance);
    assert!(
        attached.iter().all(|eni| eni.attachment.as_ref().is_some_and(|attachment| attachment.delete_on_termination)),
        "{context}: an ENI would outlive the instance"
    );
    let known: u64 = world.handle.snapshot().pools.iter().map(|pool| pool.total).sum();
    let there: usize = attached.iter().map(|eni| eni.secondary_ipv4.len() + 16 * eni.prefixes_v4.len()).sum();
    assert_eq!(known, there as u64, "{context}");
    assert_eq!(world.handle.snapshot().pools[0].assigned, 0, "{context}");
    world.stop().await;
    crashed
}

#[tokio::test(start_paused = true)]
async fn a_throttling_storm_slows_calls_and_serves_everyone() {
    let mut world = World::start(WorldSpec::new("m5.2xlarge", &[("WARM_IP_TARGET", "1")]));
    for action in ["AssignPrivateIpAddresses", "CreateNetworkInterface", "AttachNetworkInterface"] {
        world.cloud.set_bucket(action, Bucket { size: 1.0, per_second: 0.1 });
    }
    for n in 0..40 {
        world.add(&format!("pod-{n}"), SECOND * 900).await.expect("served in the end");
    }
    let throttled = world.cloud.calls().iter().filter(|call| call.error.as_deref() == Some("RequestLimitExceeded")).count();
    assert!(throttled <= 60, "{throttled} calls were thrown at a closed door");
    world.stop().await;
}
