//! From nothing to a serving actor: who am I, what is attached, who holds what.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::{Ipv4Net, Ipv6Net};
use stanchion_core::boot::Boot;
use stanchion_core::cloud::{Ec2Action, Ec2Api, Ec2Error, Eni, Imds, ImdsEni, ImdsError, InstanceIdentity};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::ids::PodName;
use stanchion_core::ipam::{
    CoolingEntry, CoolingFile, Datastore, EniState, Memory, Placement, PoolLimits, PoolMode, Rest, Targets, managed_cards, restore,
};
use stanchion_core::limits::InstanceLimits;
use stanchion_core::network::{HostNetwork, host_veth_name};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::actor::{Actor, chain};
use super::clock::Clock;
use super::execute::Executor;
use super::files::{FileError, Files};
use super::groups::{Discovered, Place, discover};
use super::handle::{IpamHandle, IpamStatus, MAILBOX};
use super::meter::Meter;
use super::observe::{GONE_AFTER, SUBNETS_EVERY, SUBNETS_PAUSE};
use super::pool::GOING;
use super::retry::Retry;
use super::snapshot::{IpamCounters, IpamSnapshot};

/// Pauses between tries of a start that IMDS or the instance's limits held up.
const START_PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Tries of EC2 before the start goes on with what IMDS shows: a node without EC2 must still serve what it has.
const EC2_TRIES: u32 = 3;
/// After another agent's end EC2 tells of its last calls within this time, and so does IMDS: aws-node's checkpoint does not say what has
/// just gone back to the subnet, and an old picture would give that to a pod.
const EC2_SETTLES: Duration = Duration::from_secs(5);
const IMDS_SETTLES: Duration = Duration::from_secs(30);
/// Until EC2 is asked again after a start without its answer.
const UNVERIFIED_PAUSE: Duration = Duration::from_secs(10);
/// The first sweep comes within this time after the start, spread over the fleet.
const FIRST_SWEEP_WITHIN: u64 = 300;

/// What the actor is made of.
#[derive(Debug)]
pub struct IpamdParts<E, I, H> {
    /// Every setting.
    pub config: Arc<Config>,
    /// EC2.
    pub ec2: E,
    /// IMDS.
    pub imds: I,
    /// The host network.
    pub host: H,
    /// The checkpoint; `config.pool.backing_store` in production. The cool-downs are kept beside it.
    pub checkpoint: PathBuf,
    /// Names of the host's interfaces at start: an allocation whose pod has no veth is given up.
    pub interfaces: BTreeSet<String>,
    /// The cluster's objects: pods bound to this node, ENIConfigs, whether the node is cordoned.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// This node's name.
    pub node_name: String,
    /// aws-node served this node before us, by its answer or by its configuration; where neither is there any more, its files tell.
    pub succeeds: bool,
    /// Ends the actor; nothing is removed.
    pub shutdown: CancellationToken,
    /// The time of day.
    pub time_of_day: SystemTime,
    /// The boot that runs, by that clock; [`this_boot`](crate::boot::this_boot) where time is not simulated.
    pub boot: Option<Boot>,
}

/// Why the actor cannot start at all; what may pass by itself is tried again instead.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings do not fit this instance.
    #[error("the settings do not fit this instance: {0}")]
    Settings(String),
    /// The checkpoint cannot be read.
    #[error("the checkpoint cannot be used")]
    Checkpoint(#[from] FileError),
}

/// What may pass by itself.
#[derive(Debug, thiserror::Error)]
enum NotYet {
    #[error(transparent)]
    Imds(#[from] ImdsError),
    #[error("IMDS does not show the primary ENI {0} yet")]
    NoPrimary(stanchion_core::ids::Mac),
    #[error("IMDS does not show the VPC's IPv4 ranges yet")]
    NoVpcRange,
    #[error("the limits of {instance_type} are not in the table and EC2 does not tell them")]
    Limits { instance_type: String, source: Ec2Error },
}

/// Starts the actor. The handle can be used at once: requests wait until the start is through.
pub fn spawn<E: Ec2Api, I: Imds, H: HostNetwork>(parts: IpamdParts<E, I, H>) -> (IpamHandle, JoinHandle<Result<(), StartError>>) {
    let (mailbox, inbox) = mpsc::channel(MAILBOX);
    let (snapshots, snapshot) = watch::channel(Arc::new(IpamSnapshot {
        status: IpamStatus { ready: false, reason: "starting: asking IMDS who this instance is".to_owned() },
        ..IpamSnapshot::default()
    }));
    let handle = IpamHandle { mailbox, snapshot };
    let task = tokio::spawn(async move {
        let shutdown = parts.shutdown.clone();
        let actor = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            actor = start(parts, snapshots) => actor?,
        };
        actor.run(inbox, shutdown).await;
        Ok(())
    });
    (handle, task)
}

/// What was found out before the actor can be built.
struct Found {
    identity: InstanceIdentity,
    limits: InstanceLimits,
    imds: Vec<ImdsEni>,
    vpc_cidrs: Vec<Ipv4Net>,
    vpc_ipv6_cidrs: Vec<Ipv6Net>,
}

impl Found {
    fn primary(&self) -> Option<&ImdsEni> {
        self.imds.iter().find(|eni| eni.mac == self.identity.primary_mac)
    }
}

/// Whether an agent with these settings gives addresses back to EC2.
fn gives_back(config: &Config) -> bool {
    !config.pool.imds_only && !config.pool.disable_provisioning && !config.pool.ipv6
}

async fn start<E: Ec2Api, I: Imds, H: HostNetwork>(
    parts: IpamdParts<E, I, H>,
    snapshots: watch::Sender<Arc<IpamSnapshot>>,
) -> Result<Actor<E, I, H>, StartError> {
    let started = Instant::now();
    let clock = Clock::new(parts.time_of_day);
    let meter = Meter::default();
    let ec2 = Arc::new(parts.ec2);
    let imds = Arc::new(parts.imds);
    let takes_over = gives_back(&parts.config) && (parts.succeeds || Files::another_agents(&parts.checkpoint));
    if takes_over {
        let reason = "starting: waiting until EC2 shows what the agent before gave back".to_owned();
        tracing::info!(seconds = EC2_SETTLES.as_secs(), reason, "ipamd");
        snapshots.send_modify(|snapshot| Arc::make_mut(snapshot).status.reason = reason);
        sleep(EC2_SETTLES).await;
    }
    let mut found = find_out(&*imds, &*ec2, &meter, &snapshots).await;
    let targets = Targets::from_config(&parts.config.pool, &found.limits).map_err(StartError::Settings)?;
    if parts.config.pool.prefix_delegation && targets.mode == PoolMode::SecondaryIps {
        tracing::warn!(instance_type = found.identity.instance_type, "no prefix delegation on this type: single addresses are used");
    }
    let executor = Executor { ec2, meter, instance: found.identity.instance.clone() };
    let may_ask = !parts.config.pool.imds_only;
    let zone = found.identity.availability_zone.clone();
    let tries_until = if takes_over { started + IMDS_SETTLES } else { started };
    let attached = async { if may_ask { ask_attached(&executor, tries_until).await } else { None } };
    let place = found.primary().map(|primary| Place { vpc: primary.vpc.clone(), zone, subnet: primary.subnet.clone() });
    let discovered = async {
        match &place {
            Some(place) => discover(&executor, place, &parts.config.pool).await,
            None => Discovered::default(),
        }
    };
    let (attached, discovered) = tokio::join!(attached, discovered);
    if takes_over && attached.is_none() {
        found = find_out(&*imds, &*executor.ec2, &executor.meter, &snapshots).await;
    }
    let Found { identity, limits, imds: shown, vpc_cidrs, vpc_ipv6_cidrs } = found;

    let seed = seed_of(identity.instance.as_str());
    let eni_limit = parts.config.pool.max_eni.map_or(limits.max_enis, |max| max.min(limits.max_enis));
    let cards = managed_cards(&limits, eni_limit, parts.config.pool.multi_nic, &shown, attached.as_deref());
    let now = Instant::now();
    let mut actor = Actor {
        files: Files::new(&parts.checkpoint, &cards, parts.boot),
        clock,
        executor,
        imds,
        host: Arc::new(parts.host),
        cluster: parts.cluster,
        cluster_open: true,
        node_name: parts.node_name,
        pool_limits: PoolLimits { cards, slots_per_eni: limits.slots_per_eni(), max_pods: 0 },
        placement: Placement::Nowhere("the primary ENI is not known yet".to_owned()),
        connection_tracking: None,
        subnets: Vec::new(),
        excluded: BTreeSet::new(),
        place,
        vpc_cidrs,
        vpc_ipv6_cidrs,
        store: Datastore::new(targets.mode, parts.config.pool.ip_cooldown),
        memory: Memory::new(seed),
        in_flight: BTreeMap::new(),
        waiting: VecDeque::new(),
        wanting: Vec::new(),
        demand: BTreeMap::new(),
        blocked: Vec::new(),
        decisions: BTreeMap::new(),
        tasks: JoinSet::new(),
        next_action: 0,
        missing: BTreeMap::new(),
        doubtful: BTreeMap::new(),
        tagged: BTreeSet::new(),
        given_out: None,
        ec2_verified: attached.is_some(),
        host_due: Some(now),
        host_running: false,
        host_planned: None,
        host_in_force: None,
        host_pause: Duration::from_millis(100),
        host_refused: Vec::new(),
        observe_due: now + UNVERIFIED_PAUSE,
        observing: false,
        subnets_due: now + SUBNETS_EVERY,
        subnets_pause: SUBNETS_PAUSE,
        subnets_told: None,
        subnets_asked: None,
        pod_groups: None,
        pod_groups_retry: Retry::new(),
        regrouping: BTreeSet::new(),
        regroup_retry: BTreeMap::new(),
        describe_retry: Retry::new(),
        trunk_wanted: None,
        subnets_awaited: None,
        sweep_due: now + Duration::from_secs(seed % FIRST_SWEEP_WITHIN),
        wake_at: None,
        ever_had_addresses: false,
        started,
        counters: IpamCounters::default(),
        errors: VecDeque::new(),
        snapshots,
        terminating: false,
        config: parts.config,
        identity,
        limits,
        targets,
    };
    actor.discovered(discovered);
    let cooling = actor.take_moved();
    actor.take_given_out(&cooling)?;
    actor.take_enis(&shown, attached.as_deref());
    if attached.is_some() {
        actor.observe_due = now + actor.observation_pause();
    }
    actor.take_cooling(cooling);
    actor.take_checkpoint(&parts.interfaces)?;
    actor.doubt_going();
    actor.find_wanting();
    actor.set_max_pods();
    actor.place();
    Ok(actor)
}

/// Asks until it is known; the snapshots say meanwhile what is missing.
async fn find_out(imds: &impl Imds, ec2: &impl Ec2Api, meter: &Meter, snapshots: &watch::Sender<Arc<IpamSnapshot>>) -> Found {
    let mut pause = START_PAUSE.0;
    loop {
        match find_out_once(imds, ec2, meter).await {
            Ok(found) => return found,
            Err(error) => {
                let reason = format!("starting: {}", chain(&error));
                tracing::warn!(reason, "ipamd");
                snapshots.send_modify(|snapshot| Arc::make_mut(snapshot).status.reason = reason);
                sleep(pause).await;
                pause = (pause * 2).min(START_PAUSE.1);
            }
        }
    }
}

async fn find_out_once(imds: &impl Imds, ec2: &impl Ec2Api, meter: &Meter) -> Result<Found, NotYet> {
    let identity = imds.identity().await?;
    let shown = imds.enis().await?;
    if !shown.iter().any(|eni| eni.mac == identity.primary_mac) {
        return Err(NotYet::NoPrimary(identity.primary_mac));
    }
    // Every VPC has one; without it traffic inside the VPC would get the node's address.
    let vpc_cidrs = imds.vpc_ipv4_cidrs(identity.primary_mac).await?;
    if vpc_cidrs.is_empty() {
        return Err(NotYet::NoVpcRange);
    }
    let vpc_ipv6_cidrs = imds.vpc_ipv6_cidrs(identity.primary_mac).await?;
    let limits = match InstanceLimits::lookup(&identity.instance_type) {
        Some(limits) => limits.clone(),
        None => {
            let call = ec2.describe_instance_type(&identity.instance_type);
            let told = meter.run(Ec2Action::DescribeInstanceTypes, call).await;
            told.map_err(|source| NotYet::Limits { instance_type: identity.instance_type.clone(), source })?
        }
    };
    Ok(Found { identity, limits, imds: shown, vpc_cidrs, vpc_ipv6_cidrs })
}

/// Some tries, and as many more as fit in before `tries_until`.
async fn ask_attached<E: Ec2Api>(executor: &Executor<E>, tries_until: Instant) -> Option<Vec<Eni>> {
    let mut pause = START_PAUSE.0;
    let mut tries = 0;
    while tries < EC2_TRIES || Instant::now() < tries_until {
        match executor.attached().await {
            Ok(enis) => return Some(enis),
            Err(error) => tracing::warn!(error = chain(&error), "EC2 does not tell what is attached; IMDS is used meanwhile"),
        }
        tries += 1;
        sleep(pause).await;
        pause = (pause * 2).min(START_PAUSE.1);
    }
    None
}

/// FNV-1a: spreads a fleet's pauses and sweeps.
fn seed_of(instance: &str) -> u64 {
    instance.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// What went from ENI to ENI lately, before the first picture of them, which may be older; returns the cool-downs.
    fn take_moved(&mut self) -> Vec<CoolingEntry> {
        match self.files.read_cooling() {
            Ok(file) => {
                let CoolingFile { cooling, moved, .. } = file.unwrap_or_default();
                let longest = self.clock.now() + GOING;
                moved.into_iter().for_each(|entry| self.store.restore_moved(entry.cidr, entry.eni, entry.until.min(longest)));
                cooling
            }
            Err(error) => {
                self.error("read cool-downs", &error);
                Vec::new()
            }
        }
    }

    /// What the files say of pods' addresses, before the first picture of the ENIs: where EC2 does not tell, an ENI is ours by them.
    fn take_given_out(&mut self, cooling: &[CoolingEntry]) -> Result<(), StartError> {
        if self.config.pool.imds_only {
            return Ok(());
        }
        let mut given_out: BTreeSet<IpAddr> = cooling.iter().map(|entry| entry.address).collect();
        for (card, _) in self.pool_limits.cards.clone() {
            let held = self.files.read_checkpoint(card)?.map(|file| file.allocations).unwrap_or_default();
            given_out.extend(held.iter().filter_map(|entry| entry.ipv4.map(IpAddr::V4).or(entry.ipv6.map(IpAddr::V6))));
        }
        self.given_out = Some(given_out);
        Ok(())
    }

    /// None lasts longer from now than when it began: the node may have been started anew since, with its clock behind.
    fn take_cooling(&mut self, cooling: Vec<CoolingEntry>) {
        let now = self.clock.now();
        for CoolingEntry { address, until, going } in cooling {
            let released = now + self.config.pool.ip_cooldown;
            let going = going.unwrap_or(until > released);
            let until = until.min(if going { now + GOING } else { released });
            self.store.restore_cooling(address, Rest { until, going });
        }
    }

    /// The primary ENI's interface is the node's own and there; the others join when theirs are ready.
    fn take_enis(&mut self, shown: &[ImdsEni], attached: Option<&[Eni]>) {
        self.adopt(shown, attached);
        let primary = self.store.enis().values().find(|eni| eni.is_primary()).map(|eni| eni.id.clone());
        if let Some(eni) = primary.and_then(|id| self.store.eni_mut(&id)) {
            eni.state = EniState::Serving;
        }
    }

    /// The last process ended while these went back to EC2: the picture that still shows them may be older than that. As after a reply
    /// that got lost, they serve nobody until EC2 has told, however long that takes it.
    fn doubt_going(&mut self) {
        if self.config.pool.imds_only {
            return;
        }
        let now = self.clock.now();
        let shown = self.store.enis().values().flat_map(|eni| eni.cidrs.keys().map(|cidr| (eni.id.clone(), *cidr)));
        let going: Vec<_> = shown.filter(|(_, cidr)| self.store.is_going(*cidr, now)).collect();
        for (eni, cidr) in going {
            self.store.set_leaving(&eni, cidr, true);
            self.doubtful.insert((eni, Some(cidr)), now);
            self.observe_due = self.observe_due.min(Instant::now() + GONE_AFTER);
        }
    }

    /// Who holds what, by the checkpoint; what it lacks cannot be known.
    fn take_checkpoint(&mut self, interfaces: &BTreeSet<String>) -> Result<(), StartError> {
        let now = self.clock.now();
        let suffixes: BTreeSet<&str> = interfaces.iter().filter_map(|name| name.get(name.len().checked_sub(VETH_HASH)?..)).collect();
        let mut fresh = true;
        for (card, _) in self.pool_limits.cards.clone() {
            let Some(file) = self.files.read_checkpoint(card)? else { continue };
            fresh = false;
            let restored = restore(&mut self.store, &file, card, now, |pod| suffixes.contains(veth_hash(pod).as_str()));
            tracing::info!(card, kept = restored.kept, released = restored.released.len(), "checkpoint read");
            for (key, address) in &restored.refused {
                self.error_text("restore", format!("{address} is held twice in the checkpoint; {key} loses it"));
            }
            if !restored.without_eni.is_empty() {
                // The picture of the ENIs may be stale; EC2 tells.
                self.ec2_verified = false;
                self.observe_due = Instant::now();
            }
        }
        // Also where nothing cools down: by this file the next start tells that the node was ours.
        let written = self.files.write_cooling(&self.store, now);
        if fresh {
            written.unwrap_or_else(|error| self.error("write cool-downs", &error));
            return Ok(());
        }
        written?;
        self.files.write_checkpoint(&self.store)?;
        Ok(())
    }
}

/// Hex digits of the pod's hash in a host veth's name, whatever its prefix.
const VETH_HASH: usize = 11;

fn veth_hash(pod: &PodName) -> String {
    host_veth_name("", pod, 0)
}
