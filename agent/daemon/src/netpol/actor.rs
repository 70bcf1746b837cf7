//! The task that owns endpoints, rules, maps and programs.
//!
//! Kernel calls are made in the task itself: each takes microseconds, and their order is the safety argument.

mod adopt;
mod answers;
mod writes;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::ContainerId;
use stanchion_core::policy::RuleName;
use stanchion_core::policy::engine::{Engine, Settings, Source, UnknownPod, UnselectedPod};
use stanchion_core::policy::frames::Messages;
use stanchion_core::policy::image::{EndpointImage, MapError, PolicyMaps as _, Refusal, Slot};
use stanchion_ebpf_abi::{Config, FlowEntry, flow_state, frame_kind};
use stanchion_netlink::NetlinkError;
use stanchion_netlink::monitor::AddressChanges;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use self::writes::{Behind, is_isolated, newly_isolated};
use super::attach::{AttachMode, attach, attached_by, clear, detach, pinned_interfaces, retire};

use super::events::{Events, record};
use super::files::ENDPOINTS;
use super::flows::{FlowKey, Flows, state_name};
use super::follow::Listeners;
use super::handle::{
    ActivateError, ActivateReport, ActivateRequest, EndpointView, EnforcingMode, FLOW_BACKLOG, FlowRecord, FlowView, InterfaceView, LOOKS,
    MAILBOX, Message, NetpolHandle, NetpolSnapshot,
};
use super::interfaces::{Interfaces, exists, node_addresses};
use super::maps::KernelMaps;
use super::names::{self, NameClock, PodFrames};
use super::object::{LoadError, Loaded};
use super::raw::Resender;
use super::slots::{HostInterface, Sandbox, Slots};
use crate::cluster::ClusterHandle;

/// How often idle flows are collected and reality is compared with the records.
const SWEEP: Duration = Duration::from_secs(10);

/// Requests answered in one turn.
const MESSAGES: usize = 32;

/// Who asks for a picture of the actor.
type Looks = mpsc::Receiver<oneshot::Sender<Arc<NetpolSnapshot>>>;

/// What the actor is made of.
#[derive(Debug)]
pub struct NetpolParts {
    /// The eBPF object, see [`super::load`].
    pub loaded: Loaded,
    /// How to attach; [`AttachMode::Clsact`] outside tests.
    pub attach: AttachMode,
    /// Policies, pods, namespaces.
    pub cluster: ClusterHandle,
    /// This node's name in the cluster.
    pub node_name: String,
    /// Which objects policies are read from.
    pub source: Source,
    /// What happens to pods that start before the cluster's state is known, and to those that no policy selects.
    pub mode: EnforcingMode,
    /// Pods' annotations say their addresses until their status does (`ANNOTATE_POD_IP`).
    pub annotated_pods: bool,
    /// How long such a pod waits for it, and how long one that policies may concern waits for its own object.
    pub sync_wait: Duration,
    /// Flows a pod may have at once; more are judged packet by packet.
    pub pod_flows: u32,
    /// Room of each flow table, as loaded.
    pub flow_capacity: u32,
    /// Where `endpoints.json` and `names.json` live; what is there need not outlive the machine's boot.
    pub state_dir: PathBuf,
    /// Ends the task; nothing is detached.
    pub shutdown: CancellationToken,
}

/// Why the actor did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The object lacks a map.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The slot table of an earlier agent cannot be read.
    #[error("cannot read {path}")]
    Slots {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The pinned maps cannot be read.
    #[error("cannot read the pinned maps")]
    Maps(#[source] MapError),
    /// The node's addresses cannot be followed.
    #[error("cannot follow the node's addresses")]
    Addresses(#[source] NetlinkError),
}

/// Starts the actor: takes over what an earlier agent left in the kernel, replaces its programs, and from then on keeps the
/// maps as the cluster's state says. Must run in the node's network namespace, on every thread of the runtime.
///
/// # Errors
/// See [`SpawnError`]; nothing was changed then.
pub fn spawn(parts: NetpolParts) -> Result<(NetpolHandle, JoinHandle<()>), SpawnError> {
    let NetpolParts { mut loaded, attach, cluster, node_name, source, mode, annotated_pods, sync_wait, .. } = parts;
    let NetpolParts { pod_flows, flow_capacity, state_dir, shutdown, .. } = parts;
    let slots = Slots::open(&state_dir).map_err(|source| SpawnError::Slots { path: state_dir.join(ENDPOINTS), source })?;
    let maps = KernelMaps::new(&mut loaded)?;
    let flows = Flows::new(&mut loaded, Config { flags: 0, pod_flows })?;
    let events = Events::new(&mut loaded)?;
    let frames = PodFrames::new(&mut loaded)?;
    let resender = Resender::new().map_err(LoadError::Clock)?;
    let interfaces = Interfaces::new(&mut loaded)?;
    let address_changes = AddressChanges::listen().map_err(SpawnError::Addresses)?;
    let kernel = maps.read().map_err(SpawnError::Maps)?;
    let isolated = kernel.endpoints.iter().filter(|(_, e)| is_isolated(e)).map(|(slot, _)| *slot).collect();
    let replaces = loaded.others().is_ok_and(|others| !others.is_empty());
    // An agent of another layout was here: its programs stay and enforce until ours know the policies.
    let unknown_pod = if replaces { UnknownPod::Open } else { unknown_pod(mode) };
    let unselected_pod = match mode {
        EnforcingMode::Standard => UnselectedPod::Open,
        EnforcingMode::Strict => UnselectedPod::Closed,
    };
    let mut rules = Engine::new(Settings { source, node_name, unknown_pod, unselected_pod, annotated_pods, ..Settings::default() });
    rules.rebase(kernel);
    rules.remember_policed(slots.policed());
    let name_clock = NameClock::start();
    match names::read(&state_dir, &name_clock) {
        Ok(known) => rules.remember(known),
        Err(cause) => {
            warn!(cause = %cause, "the DNS names of the agent before are not known: connections by name are denied until pods ask again");
        }
    }
    let (mailbox, inbox) = mpsc::channel(MAILBOX);
    let (asks, looks) = mpsc::channel(LOOKS);
    let (records, _) = broadcast::channel(FLOW_BACKLOG);
    let (ready, is_ready) = watch::channel(false);
    let (listeners, listening) = watch::channel(Listeners::default());
    let mut actor = Actor {
        loaded,
        attach,
        rules,
        maps,
        interfaces,
        flows,
        events,
        messages: Messages::default(),
        resender,
        name_clock,
        names_due: None,
        problems: Vec::new(),
        too_large: BTreeSet::new(),
        state_dir,
        slots,
        isolated,
        behind: None,
        unseeded: 0,
        waiting: Vec::new(),
        orphans: BTreeMap::new(),
        gone: BTreeSet::new(),
        inherited: BTreeMap::new(),
        node_addresses: BTreeSet::new(),
        address_changes,
        listening,
        cluster: cluster.watch(),
        state: cluster.latest(),
        mode,
        sync_wait,
        flow_capacity,
        live: HashMap::new(),
        families: [0; 2],
        last_error: String::new(),
        synced: false,
        ready,
        records: records.clone(),
    };
    actor.take_over();
    let handle = NetpolHandle { mailbox, looks: asks, flows: records, listeners: Arc::new(listeners), ready: is_ready };
    Ok((handle, tokio::spawn(actor.run((inbox, looks), frames, shutdown))))
}

/// What a pod that is not known may do.
fn unknown_pod(mode: EnforcingMode) -> UnknownPod {
    match mode {
        EnforcingMode::Standard => UnknownPod::Open,
        EnforcingMode::Strict => UnknownPod::Closed,
    }
}

/// An interface that has programs and no sandbox.
struct Orphan {
    name: String,
    /// It was one at the last sweep already.
    rested: bool,
}

/// An activation that waits for the cluster's state.
struct Waiting {
    request: ActivateRequest,
    reply: oneshot::Sender<Result<ActivateReport, ActivateError>>,
    since: Instant,
}

struct Actor {
    loaded: Loaded,
    attach: AttachMode,
    rules: Engine,
    maps: KernelMaps,
    interfaces: Interfaces,
    flows: Flows,
    events: Events,
    messages: Messages,
    resender: Resender,
    name_clock: NameClock,
    /// When what the engine knows of names is put on disk; `None`: the file has it.
    names_due: Option<Instant>,
    /// What is wrong in the policies, as last told.
    problems: Vec<String>,
    /// Pods that were closed then because their policies are too large.
    too_large: BTreeSet<Slot>,
    state_dir: PathBuf,
    slots: Slots,
    /// Endpoints that the kernel polices, so that one that becomes so is noticed.
    isolated: BTreeSet<Slot>,
    behind: Option<Behind>,
    /// Writes that were put off one after the other because open connections could not be read.
    unseeded: u32,
    waiting: Vec<Waiting>,
    /// By interface index.
    orphans: BTreeMap<u32, Orphan>,
    /// Sandboxes of which no interface was left at the last sweep.
    gone: BTreeSet<ContainerId>,
    /// By index, interfaces from which aws-network-policy-agent's programs were not taken yet, if they are there.
    inherited: BTreeMap<u32, String>,
    /// As the engine knows them.
    node_addresses: BTreeSet<IpAddr>,
    address_changes: AddressChanges,
    listening: watch::Receiver<Listeners>,
    cluster: watch::Receiver<Arc<ClusterState>>,
    state: Arc<ClusterState>,
    mode: EnforcingMode,
    sync_wait: Duration,
    flow_capacity: u32,
    live: HashMap<u16, u64>,
    families: [u64; 2],
    last_error: String,
    synced: bool,
    ready: watch::Sender<bool>,
    records: broadcast::Sender<Arc<FlowRecord>>,
}

impl Actor {
    async fn run(mut self, (mut inbox, mut looks): (mpsc::Receiver<Message>, Looks), mut frames: PodFrames, shutdown: CancellationToken) {
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.follow();
        let (mut messages, mut askers): (_, Vec<oneshot::Sender<_>>) = (Vec::new(), Vec::new());
        loop {
            let due = self.due();
            // By lot among what is ready: nothing keeps anything else from its turn.
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = self.cluster.changed() => match changed {
                    Ok(()) => self.follow(),
                    // The source of the cluster's state is gone with the rest of the agent; policies stay as they are.
                    Err(_) => return,
                },
                count = inbox.recv_many(&mut messages, MESSAGES) => {
                    if count == 0 {
                        return;
                    }
                    self.catch_up();
                    messages.drain(..).for_each(|message| self.answer(message));
                }
                // One picture for all who wait, made after each asked.
                _ = looks.recv_many(&mut askers, LOOKS) => {
                    self.catch_up();
                    let picture = Arc::new(self.snapshot());
                    askers.drain(..).for_each(|asker| drop(asker.send(Arc::clone(&picture))));
                }
                () = frames.wait() => frames.take(|slot, kind, frame| match kind {
                    frame_kind::EARLY => self.send_again(slot, frame),
                    _ => self.learn(slot, frame),
                }),
                // The senders live in the handles, without which nothing comes any more.
                Ok(()) = self.listening.changed() => self.listen(),
                () = self.events.wait() => self.tell(),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.expire_waiting();
                    self.save_names();
                    self.mend();
                }
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    /// When something is to be done that no event brings.
    fn due(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|waiting| waiting.since + self.sync_wait);
        waiting.chain(self.names_due).chain(self.behind.as_ref().map(|behind| behind.mend)).min()
    }

    /// Start: sandboxes of which a veth lives are attached anew, which replaces an older agent's programs; the others go. Before a slot is
    /// given away, so do the flows of those that were freed just before the agent's end.
    fn take_over(&mut self) {
        self.collect();
        self.refresh_node_addresses();
        let known: Vec<Sandbox> = self.slots.iter().cloned().collect();
        for sandbox in known {
            if !is_there(&sandbox) {
                self.release(&sandbox);
                continue;
            }
            let ops = self.rules.add_endpoint(sandbox.slot(), &sandbox.pod, &sandbox.pod_uid, &sandbox.addresses());
            self.apply(ops);
            if let Err(cause) = self.put_again(&sandbox) {
                self.fail("cannot attach again", &cause);
            }
            self.inherit(&sandbox);
        }
        self.save();
    }

    fn answer(&mut self, message: Message) {
        // A caller that went away needs no answer.
        match message {
            Message::Activate(request, reply) if self.rules.can_judge(&request.pod, &request.pod_uid).is_err() => {
                self.waiting.push(Waiting { request, reply, since: Instant::now() });
                self.expire_waiting();
            }
            Message::Activate(request, reply) => drop(reply.send(self.activate(request, Instant::now()))),
            Message::Adopt(running, reply) => drop(reply.send(self.adopt(running))),
            Message::Deactivate(container, reply) => drop(reply.send(self.deactivate(&container))),
            Message::Flows(reply) => drop(reply.send(self.conntrack())),
            Message::Listen(reply) => {
                self.listen();
                let _unheard = reply.send(());
            }
        }
    }

    /// Lets the programs tell what is listened to, and nothing else.
    fn listen(&mut self) {
        let listeners = *self.listening.borrow_and_update();
        if let Err(cause) = self.flows.tell(listeners) {
            self.fail("cannot change what the programs tell", &cause);
        }
    }

    /// Whoever asks is answered from the newest state.
    fn catch_up(&mut self) {
        if self.cluster.has_changed().unwrap_or(false) {
            self.follow();
        }
    }

    /// Takes the newest state of the cluster.
    fn follow(&mut self) {
        let state = Arc::clone(&self.cluster.borrow_and_update());
        if !state.synced {
            return;
        }
        let before = std::mem::replace(&mut self.state, state);
        let start = Instant::now();
        self.rules.set_unknown_pod(unknown_pod(self.mode));
        let ops = self.rules.set_cluster(&self.state);
        let count = ops.len();
        self.apply(ops);
        debug!(operations = count, micros = start.elapsed().as_micros() as u64, "cluster state applied");
        if !self.synced || !same_policies(&before, &self.state) {
            self.look_for_problems();
        }
        if !self.synced {
            self.synced = true;
            if self.note_exactly_policed() {
                self.save();
            }
            let interfaces: Vec<u32> = self.slots.iter().flat_map(|sandbox| &sandbox.interfaces).map(|interface| interface.index).collect();
            if let Err(cause) = retire(&self.loaded, &interfaces) {
                self.fail("cannot remove what another version left", &cause);
            }
            self.retire_upstream();
            info!(endpoints = self.slots.len(), operations = count, "policies are in force");
            self.ready.send_replace(true);
        }
        let (judged, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|w| self.rules.can_judge(&w.request.pod, &w.request.pod_uid).is_ok());
        self.waiting = waiting;
        for Waiting { request, reply, since } in judged {
            drop(reply.send(self.activate(request, since)));
        }
    }

    /// A pod may be what makes policies too large.
    fn look_for_too_large(&mut self) {
        if !self.rules.closed_as_too_large().eq(self.too_large.iter().copied()) {
            self.too_large = self.rules.closed_as_too_large().collect();
            self.look_for_problems();
        }
    }

    /// Tells what is newly wrong in the policies.
    fn look_for_problems(&mut self) {
        let problems: Vec<String> = self.rules.problems().iter().map(ToString::to_string).collect();
        let told: HashSet<&String> = self.problems.iter().collect();
        for problem in problems.iter().filter(|problem| !told.contains(problem)) {
            warn!(problem, "a policy cannot be enforced as written");
        }
        self.problems = problems;
    }

    fn expire_waiting(&mut self) {
        let (expired, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|waiting| waiting.since.elapsed() >= self.sync_wait);
        self.waiting = waiting;
        for Waiting { request, reply, since } in expired {
            let result = match self.rules.can_judge(&request.pod, &request.pod_uid) {
                Err(missing) if self.mode == EnforcingMode::Strict => Err(ActivateError::NotKnown { missing, waited: since.elapsed() }),
                Err(missing) => {
                    warn!(pod = %request.pod, %missing, "starts before all of its policies are known, as the enforcing mode is standard");
                    self.activate(request, since)
                }
                Ok(()) => self.activate(request, since),
            };
            drop(reply.send(result));
        }
    }

    fn activate(&mut self, request: ActivateRequest, since: Instant) -> Result<ActivateReport, ActivateError> {
        let used = self.slots.len();
        let mode = if request.shares_ingress { AttachMode::beside_ingress_qdisc() } else { self.attach };
        let sandbox = self.slots.assign(request).ok_or(ActivateError::NoSlot { used })?;
        let result = self.try_activate(&sandbox, mode);
        if let Err(cause) = result {
            self.fail("cannot activate", &cause);
            self.release(&sandbox);
            self.save();
            return Err(cause);
        }
        let policy_us = u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX);
        info!(pod = %sandbox.pod, slot = sandbox.slot, micros = policy_us, "activated");
        Ok(ActivateReport { policy_us })
    }

    fn try_activate(&mut self, sandbox: &Sandbox, mode: AttachMode) -> Result<(), ActivateError> {
        if self.address_changes.any() {
            self.refresh_node_addresses();
        }
        if !self.rules.image().endpoints.contains_key(&sandbox.slot()) {
            self.flows.clear_counters(sandbox.slot).map_err(ActivateError::Maps)?;
        }
        let ops = self.rules.add_endpoint(sandbox.slot(), &sandbox.pod, &sandbox.pod_uid, &sandbox.addresses());
        self.note_policed(&ops);
        self.slots.save().map_err(|source| ActivateError::NotDurable { path: self.slots.path(), source })?;
        // Its first packet is still to come: there is nothing to seed.
        self.isolated.extend(ops.iter().filter_map(newly_isolated));
        self.try_apply(ops).map_err(ActivateError::Maps)?;
        self.put(sandbox, mode)
    }

    /// Interface records, then programs: never a program without a record.
    fn put(&mut self, sandbox: &Sandbox, mode: AttachMode) -> Result<(), ActivateError> {
        self.interfaces.set(sandbox, |_| true).map_err(ActivateError::Maps)?;
        for interface in &sandbox.interfaces {
            attach(&mut self.loaded, mode, &interface.name, interface.index).map_err(ActivateError::Attach)?;
        }
        Ok(())
    }

    /// Puts what a sandbox has in place again. A pod may delete one of its interfaces: the others stay policed.
    fn put_again(&mut self, sandbox: &Sandbox) -> Result<(), ActivateError> {
        let (present, gone): (Vec<_>, Vec<_>) = sandbox.interfaces.iter().partition(|interface| exists(&interface.name, interface.index));
        for HostInterface { name, index, .. } in gone {
            self.interfaces.remove(*index).map_err(ActivateError::Maps)?;
            detach(&self.loaded, name, *index).map_err(ActivateError::Attach)?;
        }
        self.interfaces.set(sandbox, |interface| present.contains(&interface)).map_err(ActivateError::Maps)?;
        for HostInterface { name, index, .. } in present {
            attach(&mut self.loaded, self.attach, name, *index).map_err(ActivateError::Attach)?;
        }
        Ok(())
    }

    fn deactivate(&mut self, container: &ContainerId) -> bool {
        let Some(sandbox) = self.slots.of(container).cloned() else {
            return false;
        };
        self.release(&sandbox);
        self.save();
        info!(pod = %sandbox.pod, slot = sandbox.slot, "deactivated");
        true
    }

    /// Takes a sandbox out. Programs on veths that still exist let nothing pass while the veth is being taken down; if it is
    /// there at the second sweep from now, they go.
    fn release(&mut self, sandbox: &Sandbox) {
        for interface in &sandbox.interfaces {
            if let Err(cause) = self.interfaces.remove(interface.index) {
                self.fail("cannot forget an interface", &cause);
            }
            if exists(&interface.name, interface.index) {
                self.orphans.insert(interface.index, Orphan { name: interface.name.clone(), rested: false });
            } else if let Err(cause) = detach(&self.loaded, &interface.name, interface.index) {
                self.fail("cannot detach", &cause);
            }
        }
        let ops = self.rules.remove_endpoint(sandbox.slot());
        self.apply(ops);
        self.isolated.remove(&sandbox.slot());
        self.slots.release(sandbox.slot());
    }

    fn save(&mut self) {
        if let Err(cause) = self.slots.save() {
            self.fail("cannot write the slot table", &cause);
        }
    }

    fn fail(&mut self, what: &'static str, cause: &dyn std::error::Error) {
        let chain: Vec<String> = std::iter::successors(Some(cause), |cause| cause.source()).map(ToString::to_string).collect();
        let chain = chain.join(": ");
        error!(cause = %chain, "{what}");
        self.last_error = format!("{what}: {chain}");
    }

    fn endpoint(&self, slot: Slot) -> Option<&EndpointImage> {
        self.rules.image().endpoints.get(&slot)
    }

    fn refresh_node_addresses(&mut self) {
        match node_addresses() {
            Ok(addresses) if addresses == self.node_addresses => {}
            Ok(addresses) => {
                self.node_addresses.clone_from(&addresses);
                let ops = self.rules.set_node_addresses(addresses);
                self.apply(ops);
            }
            Err(cause) => self.fail("cannot read the node's addresses", &cause),
        }
    }

    fn sweep(&mut self) {
        self.last_error.clear();
        self.refresh_node_addresses();
        self.collect();
        let known: Vec<Sandbox> = self.slots.iter().cloned().collect();
        let mut gone = BTreeSet::new();
        let mut released = false;
        for sandbox in &known {
            if is_there(sandbox) {
                if let Err(cause) = self.put_again(sandbox) {
                    self.fail("cannot attach again", &cause);
                }
            } else if self.gone.contains(&sandbox.container_id) {
                // Twice in a row: its DEL was lost, or is on its way to find nothing.
                self.release(sandbox);
                released = true;
            } else {
                gone.insert(sandbox.container_id.clone());
            }
        }
        self.gone = gone;
        if released {
            self.save();
        }
        self.detach_orphans();
        self.retire_upstream();
    }

    /// Takes programs from interfaces that are no sandbox's.
    fn detach_orphans(&mut self) {
        for index in pinned_interfaces(&self.loaded) {
            let name = nix::net::if_::if_indextoname(index).ok().and_then(|name| name.into_string().ok());
            self.orphans.entry(index).or_insert(Orphan { name: name.unwrap_or_default(), rested: false });
        }
        let used: HashSet<u32> = self.slots.iter().flat_map(|sandbox| &sandbox.interfaces).map(|interface| interface.index).collect();
        self.orphans.retain(|index, _| !used.contains(index));
        let mut gone = Vec::new();
        for (index, orphan) in &mut self.orphans {
            if orphan.rested || !exists(&orphan.name, *index) {
                gone.push((*index, orphan.name.clone()));
            }
            orphan.rested = true;
        }
        for (index, name) in gone {
            self.orphans.remove(&index);
            let result = if exists(&name, index) { clear(&self.loaded, &name, index) } else { detach(&self.loaded, &name, index) };
            match result {
                Ok(()) => info!(interface = name, index, "programs removed: no active pod has this interface"),
                Err(cause) => self.fail("cannot remove programs", &cause),
            }
        }
    }

    fn collect(&mut self) {
        let result = self.loaded.clock.now().map_err(|cause| MapError {
            map: "clock",
            operation: "read".to_owned(),
            refusal: Refusal::Other,
            message: cause.to_string(),
        });
        let result = result.and_then(|now| {
            let by_name: HashSet<IpAddr> = self.rules.names().addresses().collect();
            let is_held = |slot| self.slots.get(Slot(slot)).is_some();
            let collected = self.flows.collect(now, &is_held, &by_name)?;
            self.flows.settle(self.slots.iter().map(|sandbox| sandbox.slot), &collected.live)?;
            Ok(collected)
        });
        match result {
            Ok(collected) => {
                self.slots.cooled();
                self.live = collected.live;
                self.families = collected.families;
                // Flows that another agent's programs let through are told by the kernel once policies are in force: what is open is not
                // known before.
                if self.synced && self.unseeded == 0 {
                    self.forget_names(&collected.remotes);
                }
            }
            Err(cause) => self.fail("cannot collect idle flows", &cause),
        }
    }

    /// Passes events on.
    fn tell(&mut self) {
        let events = self.events.take();
        let time = SystemTime::now();
        for event in &events {
            let pod = self.slots.get(Slot(event.slot)).map(|sandbox| &sandbox.pod);
            let names = self.rules.rule(event.rule).map(|rule| (rule.policy.to_string(), rule_name(rule))).unwrap_or_default();
            // The last subscriber may just have left.
            let _unheard = self.records.send(Arc::new(record(event, time, pod, |address| self.rules.pod_at(address), names)));
        }
    }

    fn snapshot(&mut self) -> NetpolSnapshot {
        let mut endpoints = Vec::with_capacity(self.slots.len());
        let mut policies = self.rules.policies();
        for sandbox in self.slots.iter() {
            let image = self.endpoint(sandbox.slot());
            endpoints.push(EndpointView {
                slot: sandbox.slot,
                pod: sandbox.pod.clone(),
                pod_uid: sandbox.pod_uid.clone(),
                container_id: sandbox.container_id.clone(),
                interfaces: sandbox
                    .interfaces
                    .iter()
                    .map(|interface| InterfaceView {
                        name: interface.name.clone(),
                        index: interface.index,
                        addresses: interface.addresses().collect(),
                        attached: attached_by(&self.loaded, interface.index),
                    })
                    .collect(),
                policies: policies.remove(&sandbox.slot()).unwrap_or_default(),
                ingress_isolated: image.is_some_and(|image| image.ingress.is_some()),
                egress_isolated: image.is_some_and(|image| image.egress.is_some()),
                audit: image.is_some_and(|image| image.audit),
                revision: image.map_or(0, |image| image.revision),
                flows: self.live.get(&sandbox.slot).copied().unwrap_or(0),
                counters: self.flows.counters(sandbox.slot).unwrap_or_default(),
            });
        }
        let reason = if !self.synced {
            "the cluster's state is not known yet".to_owned()
        } else if let Some(Behind { missing, cause, .. }) = &self.behind {
            format!("{missing} map writes wait: {cause}")
        } else {
            String::new()
        };
        NetpolSnapshot {
            ready: reason.is_empty(),
            reason,
            endpoints,
            flows: self.families,
            flow_capacity: self.flow_capacity,
            alarms: self.flows.alarms().unwrap_or_default(),
            map_writes: self.maps.writes(),
            problems: self.problems.clone(),
            last_error: self.last_error.clone(),
        }
    }

    fn conntrack(&self) -> Vec<FlowView> {
        let Ok(now) = self.loaded.clock.now() else {
            return Vec::new();
        };
        let tick = self.loaded.clock.tick_seconds();
        let seconds = |ticks: u32| (f64::from(ticks) * tick) as u32;
        let view = |(key, entry): (FlowKey, FlowEntry)| {
            let sandbox = self.slots.get(Slot(key.slot));
            FlowView {
                pod: sandbox.map(|sandbox| sandbox.pod.clone()),
                local: sandbox.and_then(|sandbox| sandbox.addresses().get(usize::from(key.local)).copied()),
                local_port: key.local_port,
                remote: key.remote,
                remote_port: key.remote_port,
                protocol: key.protocol,
                opened_by_pod: entry.state & flow_state::OPENED_BY_POD != 0,
                state: state_name(key.protocol, entry.state),
                idle_seconds: seconds(now.wrapping_sub(entry.seen)),
                timeout_seconds: seconds(u32::from(entry.timeout)),
                current: self.endpoint(Slot(key.slot)).is_some_and(|image| image.revision == entry.revision),
            }
        };
        self.flows.all().into_iter().map(view).collect()
    }
}

/// Whether two states have the same objects that policies are read from.
fn same_policies(a: &ClusterState, b: &ClusterState) -> bool {
    a.network_policies.same(&b.network_policies)
        && a.cluster_network_policies.same(&b.cluster_network_policies)
        && a.policy_endpoints.same(&b.policy_endpoints)
        && a.cluster_policy_endpoints.same(&b.cluster_policy_endpoints)
}

/// Whether an interface of a sandbox is left. A pod may delete some of them itself, which is no reason to let go of the others.
fn is_there(sandbox: &Sandbox) -> bool {
    sandbox.interfaces.iter().any(|interface| exists(&interface.name, interface.index))
}

/// A rule within its policy: `ingress[2]`, with its own name if it has one.
fn rule_name(RuleName { direction, index, name, .. }: &RuleName) -> String {
    if name.is_empty() { format!("{direction}[{index}]") } else { format!("{direction}[{index}] ({name})") }
}
