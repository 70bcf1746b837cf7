//! The actor: one task that owns the datastore. It never waits for EC2: actions run beside it and report back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use stanchion_core::branch::wants_branch;
use stanchion_core::cloud::{ConnectionTracking, Ec2Api, Ec2Error, Imds, InstanceIdentity, Subnet};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::ids::{EniId, PodName, SecurityGroupId, SubnetId};
use stanchion_core::ipam::{Action, Allocation, Blocked, Datastore, Demand, IpamKey, Memory, Placement, PoolLimits, Targets, Time};
use stanchion_core::limits::InstanceLimits;
use stanchion_core::network::{HostNetwork, HostPlan, HostReport};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::execute::{Executor, Outcome};
use super::files::{FileError, Files};
use super::groups::{Discovered, Place};
use super::handle::{AssignError, AssignRequest, AssignedAddress, Assignment, Message, ReleaseError};
use super::observe::Observation;
use super::retry::Retry;
use super::snapshot::{IpamCounters, IpamSnapshot, RecentError};

/// Messages taken before the checkpoint is written: a burst of ADDs shares one fsync. As many as a large node can have.
const BATCH: usize = 128;
/// The slow safety tick: IMDS is read, the host network is healed.
const SAFETY_TICK: Duration = Duration::from_secs(30);
/// Failures that the snapshot keeps.
const RECENT_ERRORS: usize = 20;

/// What tasks beside the actor report.
#[derive(Debug)]
pub(super) enum Work {
    /// An EC2 action ended.
    Action(u64, Outcome),
    /// The host network was applied.
    Host(Result<HostReport, String>),
    /// ENIs were read.
    Observed(Observation),
    /// Subnets, or security groups for ENIs in them, were read.
    Discovered(Discovered),
    /// Leaked ENIs were looked for; how many were deleted.
    Swept(Result<u32, String>),
    /// An adopted ENI got its tags.
    Tended(EniId, Result<(), String>),
    /// An ENI's security groups were set.
    Groups(EniId, Result<Vec<SecurityGroupId>, Ec2Error>),
}

/// An ADD that waits for an address.
pub(super) struct Waiting {
    pub(super) request: AssignRequest,
    pub(super) reply: oneshot::Sender<Result<Assignment, AssignError>>,
    pub(super) since: Instant,
}

/// A reply that waits for the checkpoint.
enum Prepared {
    Assigned {
        key: IpamKey,
        fresh: bool,
        reply: oneshot::Sender<Result<Assignment, AssignError>>,
        waited: Option<Duration>,
    },
    Released {
        key: IpamKey,
        allocation: Allocation,
        assignment: Assignment,
        reply: oneshot::Sender<Result<Option<Assignment>, ReleaseError>>,
    },
    Collected {
        released: Vec<(IpamKey, Allocation)>,
        reply: oneshot::Sender<Result<u32, ReleaseError>>,
    },
}

pub(super) struct Actor<E, I, H> {
    pub(super) config: Arc<Config>,
    pub(super) clock: Clock,
    pub(super) executor: Executor<E>,
    pub(super) imds: Arc<I>,
    pub(super) host: Arc<H>,
    pub(super) cluster: watch::Receiver<Arc<ClusterState>>,
    pub(super) cluster_open: bool,
    pub(super) node_name: String,
    pub(super) files: Files,
    pub(super) identity: InstanceIdentity,
    pub(super) limits: InstanceLimits,
    pub(super) targets: Targets,
    pub(super) pool_limits: PoolLimits,
    pub(super) placement: Placement,
    /// The primary ENI's, for new ENIs.
    pub(super) connection_tracking: Option<ConnectionTracking>,
    pub(super) subnets: Vec<Subnet>,
    pub(super) vpc_cidrs: Vec<Ipv4Net>,
    pub(super) vpc_ipv6_cidrs: Vec<Ipv6Net>,

    pub(super) store: Datastore,
    pub(super) memory: Memory,
    pub(super) in_flight: BTreeMap<u64, Action>,
    pub(super) waiting: VecDeque<Waiting>,
    /// Pods bound to this node that have no address by the cluster's account.
    pub(super) wanting: Vec<PodName>,
    pub(super) demand: BTreeMap<u16, Demand>,
    pub(super) blocked: Vec<(u16, Blocked)>,
    pub(super) decisions: BTreeMap<u16, Vec<String>>,
    pub(super) tasks: JoinSet<Work>,
    pub(super) next_action: u64,
    /// ENIs and CIDRs that EC2 no longer shows, and since when.
    pub(super) missing: BTreeMap<(EniId, Option<ipnet::IpNet>), Time>,
    /// What EC2 was asked to take away and did not answer for, and since when. It serves nobody.
    pub(super) doubtful: BTreeMap<(EniId, Option<ipnet::IpNet>), Time>,
    /// Addresses that pods held or had lately when the agent started; `None` where EC2 is never asked.
    pub(super) given_out: Option<BTreeSet<IpAddr>>,
    /// EC2 has confirmed the picture that IMDS gave.
    pub(super) ec2_verified: bool,
    /// Where EC2 is asked for subnets and security groups.
    pub(super) place: Option<Place>,
    pub(super) excluded: BTreeSet<SubnetId>,
    /// ENIs whose tags were looked at.
    pub(super) tagged: BTreeSet<EniId>,
    pub(super) host_due: Option<Instant>,
    pub(super) host_running: bool,
    /// The plan that is being applied, and the one that the host was left with, if nothing of it was missing or refused.
    pub(super) host_planned: Option<HostPlan>,
    pub(super) host_in_force: Option<HostPlan>,
    pub(super) host_pause: Duration,
    /// What the host refused the last time, as it was told.
    pub(super) host_refused: Vec<String>,
    pub(super) observe_due: Instant,
    pub(super) observing: bool,
    pub(super) subnets_due: Instant,
    pub(super) subnets_pause: Duration,
    /// When EC2 told the list, if that was its last answer, and since when it is being asked.
    pub(super) subnets_told: Option<Instant>,
    pub(super) subnets_asked: Option<Instant>,
    /// Security groups that are tagged for ENIs in other subnets than the node's; `None` before EC2 has told them.
    pub(super) pod_groups: Option<Vec<SecurityGroupId>>,
    pub(super) pod_groups_retry: Retry,
    /// ENIs whose security groups are being changed, and those for which EC2 refused it.
    pub(super) regrouping: BTreeSet<EniId>,
    pub(super) regroup_retry: BTreeMap<EniId, Retry>,
    /// When EC2 may be asked what is attached.
    pub(super) describe_retry: Retry,
    /// Since when a trunk is wanted.
    pub(super) trunk_wanted: Option<Instant>,
    /// Why new ENIs wait for the first list of the zone's subnets, if they do.
    pub(super) subnets_awaited: Option<String>,
    pub(super) sweep_due: Instant,
    pub(super) wake_at: Option<Time>,
    pub(super) ever_had_addresses: bool,
    pub(super) started: Instant,
    pub(super) counters: IpamCounters,
    pub(super) errors: VecDeque<RecentError>,
    pub(super) snapshots: watch::Sender<Arc<IpamSnapshot>>,
    pub(super) terminating: bool,
}

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Serves until the mailbox closes or `shutdown` is cancelled. Stopping removes nothing.
    pub(super) async fn run(mut self, mut mailbox: mpsc::Receiver<Message>, shutdown: CancellationToken) {
        // Those who asked during the start count in the first plan.
        if let Ok(message) = mailbox.try_recv() {
            self.take_batch(message, &mut mailbox);
        }
        loop {
            self.turn();
            let wake = self.next_wake();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                message = mailbox.recv() => match message {
                    Some(message) => {
                        self.take_batch(message, &mut mailbox);
                        // Those who were answered run before the plan that follows from it.
                        yield_now().await;
                    }
                    None => return,
                },
                Some(done) = self.tasks.join_next() => match done {
                    Ok(work) => self.finish(work),
                    Err(error) => self.error("task", &error),
                },
                changed = self.cluster.changed(), if self.cluster_open => match changed {
                    Ok(()) => self.cluster_changed(),
                    // The source of objects is gone; what is known stays.
                    Err(_) => self.cluster_open = false,
                },
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Everything that follows from the present state: serve, plan, start tasks, publish.
    pub(super) fn turn(&mut self) {
        self.serve_waiting();
        self.follow_trunk();
        self.plan();
        self.start_due_tasks();
        self.publish();
    }

    fn next_wake(&self) -> Instant {
        let planned = self.wake_at.map(|at| self.clock.instant(at));
        let deadline = self.waiting.iter().map(|waiting| waiting.request.deadline).min();
        let host = self.host_due.filter(|_| !self.host_running);
        let observe = (!self.observing).then_some(self.observe_due);
        let fixed = [Instant::now() + SAFETY_TICK, self.subnets_due, self.sweep_due];
        [planned, deadline, host, observe].into_iter().flatten().chain(fixed).min().unwrap_or_else(Instant::now)
    }

    fn take_batch(&mut self, first: Message, mailbox: &mut mpsc::Receiver<Message>) {
        let mut prepared = Vec::new();
        self.prepare(first, &mut prepared);
        for _ in 1..BATCH {
            match mailbox.try_recv() {
                Ok(message) => self.prepare(message, &mut prepared),
                Err(_) => break,
            }
        }
        self.commit(prepared);
    }

    fn prepare(&mut self, message: Message, prepared: &mut Vec<Prepared>) {
        match message {
            Message::Assign(request, reply) => {
                self.counters.add_requests += 1;
                // Those who wait come first; a key that holds addresses is answered at once.
                let held = self.store.allocations().contains_key(&request.key);
                if !held && (self.is_behind_others(&request) || !self.try_assign(&request)) {
                    self.waiting.push_back(Waiting { request, reply, since: Instant::now() });
                    return;
                }
                prepared.push(Prepared::Assigned { key: request.key, fresh: !held, reply, waited: None });
            }
            Message::Lookup(key, reply) => {
                // A caller that went away needs no answer.
                let _ = reply.send(self.store.allocations().get(&key).map(|allocation| self.assignment(allocation)));
            }
            Message::Release(key, reason, reply) => {
                *self.counters.del_requests.entry(reason).or_default() += 1;
                self.waiting.retain(|waiting| waiting.request.key != key);
                let key = if self.store.allocations().contains_key(&key) { key } else { key.legacy() };
                match self.release(&key) {
                    Some((allocation, assignment)) => prepared.push(Prepared::Released { key, allocation, assignment, reply }),
                    None => drop(reply.send(Ok(None))),
                }
            }
            Message::BranchFailed(operation) => *self.counters.pod_eni_errors.entry(operation).or_default() += 1,
            Message::Healed(subject) => *self.counters.healed.entry(subject).or_default() += 1,
            Message::CollectGarbage(network, valid, reply) => {
                let stale: Vec<_> =
                    self.store.allocations().keys().filter(|key| key.network_name == network && !valid.contains(key)).cloned().collect();
                let released = stale.into_iter().filter_map(|key| self.release(&key).map(|(allocation, _)| (key, allocation))).collect();
                prepared.push(Prepared::Collected { released, reply });
            }
        }
    }

    /// Somebody waits for what it asks for. A pod that lacks an address of one card leaves those of the others to others.
    fn is_behind_others(&self, request: &AssignRequest) -> bool {
        self.waiting.iter().any(|waiting| request.multi_nic || !waiting.request.multi_nic)
    }

    fn try_assign(&mut self, request: &AssignRequest) -> bool {
        let cards: Vec<u16> = self.pool_limits.cards.iter().map(|(card, _)| *card).collect();
        let now = self.clock.now();
        // One address of every card, or one of the first card that has any.
        let at_a_time = if request.multi_nic { cards.len() } else { 1 };
        cards.chunks(at_a_time.max(1)).any(|cards| self.store.assign(&request.key, &request.pod, cards, now).is_some())
    }

    fn release(&mut self, key: &IpamKey) -> Option<(Allocation, Assignment)> {
        let assignment = self.assignment(self.store.allocations().get(key)?);
        Some((self.store.release(key, self.clock.now())?, assignment))
    }

    /// What waits is served as soon as an address is there, or told why not when its time is over.
    fn serve_waiting(&mut self) {
        let mut prepared = Vec::new();
        let now = Instant::now();
        for waiting in std::mem::take(&mut self.waiting) {
            if waiting.reply.is_closed() {
                continue;
            }
            if self.is_behind_others(&waiting.request) || !self.try_assign(&waiting.request) {
                self.waiting.push_back(waiting);
                continue;
            }
            let waited = Some(waiting.since.elapsed());
            prepared.push(Prepared::Assigned { key: waiting.request.key, fresh: true, reply: waiting.reply, waited });
        }
        self.commit(prepared);
        let (late, rest): (VecDeque<_>, VecDeque<_>) = self.waiting.drain(..).partition(|waiting| waiting.request.deadline <= now);
        self.waiting = rest;
        for waiting in late {
            self.counters.no_available += 1;
            let error = AssignError::NoAddress { waited: waiting.since.elapsed(), reason: self.why_no_address() };
            tracing::warn!(pod = %waiting.request.pod, %error, "ADD ends without an address");
            let _ = waiting.reply.send(Err(error));
        }
    }

    /// One write for all of them, then the replies. A failed write takes everything back.
    fn commit(&mut self, prepared: Vec<Prepared>) {
        let changed = prepared.iter().any(|entry| match entry {
            Prepared::Assigned { fresh, .. } => *fresh,
            Prepared::Released { .. } => true,
            Prepared::Collected { released, .. } => !released.is_empty(),
        });
        if changed {
            self.counters.checkpoint_writes += 1;
            // The cool-downs first: an address that is in neither file could be given out at once after a crash.
            let now = self.clock.now();
            if prepared.iter().any(|entry| !matches!(entry, Prepared::Assigned { .. }))
                && let Err(error) = self.files.write_cooling(&self.store, now)
            {
                self.error("write cool-downs", &error);
                return self.take_back(prepared, &error);
            }
            if let Err(error) = self.files.write_checkpoint(&self.store) {
                self.error("write checkpoint", &error);
                return self.take_back(prepared, &error);
            }
        }
        let mut unheard = Vec::new();
        for entry in prepared {
            match entry {
                Prepared::Assigned { key, fresh, reply, waited } => {
                    self.counters.waited += u64::from(waited.is_some());
                    let Some(allocation) = self.store.allocations().get(&key) else { continue };
                    let assignment = self.assignment(allocation);
                    let pod = allocation.pod.clone();
                    if reply.send(Ok(assignment)).is_err() && fresh {
                        tracing::info!(%pod, %key, "nobody waits for this address any more");
                        unheard.push(key);
                    } else {
                        tracing::debug!(%pod, %key, waited_ms = waited.map(|waited| waited.as_millis()), "assigned");
                    }
                }
                Prepared::Released { assignment, reply, .. } => drop(reply.send(Ok(Some(assignment)))),
                Prepared::Collected { released, reply } => {
                    drop(reply.send(Ok(u32::try_from(released.len()).unwrap_or(u32::MAX))));
                }
            }
        }
        if !unheard.is_empty() {
            unheard.iter().for_each(|key| self.store.undo_assign(key));
            if let Err(error) = self.files.write_checkpoint(&self.store) {
                // The file holds more than the store: the next write mends it, and a restart prunes by veth.
                self.error("write checkpoint", &error);
            }
        }
    }

    fn take_back(&mut self, prepared: Vec<Prepared>, error: &FileError) {
        let path = self.files.checkpoint_path().display().to_string();
        let message = chain(error);
        for entry in prepared.into_iter().rev() {
            match entry {
                Prepared::Assigned { key, fresh, reply, .. } => {
                    if fresh {
                        self.store.undo_assign(&key);
                    }
                    let _ = reply.send(Err(AssignError::NotDurable { path: path.clone(), message: message.clone() }));
                }
                Prepared::Released { key, allocation, reply, .. } => {
                    self.store.undo_release(key, allocation);
                    let _ = reply.send(Err(ReleaseError::NotDurable { path: path.clone(), message: message.clone() }));
                }
                Prepared::Collected { released, reply } => {
                    for (key, allocation) in released.into_iter().rev() {
                        self.store.undo_release(key, allocation);
                    }
                    let _ = reply.send(Err(ReleaseError::NotDurable { path: path.clone(), message: message.clone() }));
                }
            }
        }
    }

    /// What an attachment is told.
    fn assignment(&self, allocation: &Allocation) -> Assignment {
        let attachments = allocation.held.iter().map(|held| {
            let eni = self.store.eni_of(held.address);
            let (ipv4, ipv6) = match held.address {
                IpAddr::V4(address) => (Some(address), None),
                IpAddr::V6(address) => (None, Some(address)),
            };
            AssignedAddress {
                ipv4,
                ipv6,
                eni: eni.map(|eni| eni.id.clone()).unwrap_or_default(),
                device_index: eni.map_or(0, |eni| eni.device_index),
                network_card: eni.map_or(held.network_card, |eni| eni.network_card),
                route_table: eni.map_or(stanchion_core::network::names::MAIN_TABLE, |eni| eni.route_table),
            }
        });
        let mut vpc_cidrs: Vec<ipnet::IpNet> =
            self.vpc_cidrs.iter().copied().map(Into::into).chain(self.vpc_ipv6_cidrs.iter().copied().map(Into::into)).collect();
        if !self.config.network.external_snat {
            vpc_cidrs.extend(self.config.network.exclude_snat_cidrs.iter().copied().map(ipnet::IpNet::from));
        }
        Assignment { attachments: attachments.collect(), external_snat: self.config.network.external_snat, vpc_cidrs }
    }

    fn finish(&mut self, work: Work) {
        match work {
            Work::Action(id, outcome) => self.action_done(id, outcome),
            Work::Host(report) => self.host_done(report),
            Work::Observed(observation) => self.observed(observation),
            Work::Discovered(discovered) => self.discovered(discovered),
            Work::Swept(result) => self.swept(result),
            Work::Tended(eni, result) => self.tended(&eni, result),
            Work::Groups(eni, result) => self.groups_set(&eni, result),
        }
    }

    /// Remembers and tells a failure; the log line and the counter are one event.
    pub(super) fn error(&mut self, operation: &'static str, error: &dyn std::error::Error) {
        self.error_text(operation, chain(error));
    }

    pub(super) fn error_text(&mut self, operation: &'static str, error: String) {
        tracing::warn!(operation, error, "ipamd");
        *self.counters.errors.entry(operation).or_default() += 1;
        if self.errors.len() == RECENT_ERRORS {
            self.errors.pop_front();
        }
        self.errors.push_back(RecentError { time: self.clock.now(), operation: operation.to_owned(), error });
    }

    /// Pods that are bound to this node, want an address of ours and have not asked.
    pub(super) fn bound_pods(&self) -> u32 {
        if self.wanting.is_empty() {
            return 0;
        }
        let asked: BTreeSet<&PodName> = self
            .store
            .allocations()
            .values()
            .map(|allocation| &allocation.pod)
            .chain(self.waiting.iter().map(|waiting| &waiting.request.pod))
            .collect();
        u32::try_from(self.wanting.iter().filter(|name| !asked.contains(name)).count()).unwrap_or(u32::MAX)
    }

    /// Pods bound to this node that have no address by the cluster's account: looked for once a change, as a cluster has
    /// many pods and a plan is made at every ADD.
    pub(super) fn find_wanting(&mut self) {
        let cluster = self.cluster.borrow();
        let wanting = cluster.pods.iter().filter(|(_, pod)| {
            let has_branch = self.config.pool.pod_eni && wants_branch(pod);
            pod.spec.node_name == self.node_name
                && !pod.spec.host_network
                && !pod.is_completed()
                && !pod.is_terminating()
                && pod.addresses().next().is_none()
                && !has_branch
        });
        self.wanting = if cluster.synced { wanting.map(|(name, _)| name.clone()).collect() } else { Vec::new() };
    }
}

/// An error and all its sources in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
