//! A node with the daemon's planner: the same plan, the same executor's steps, on virtual time.

use std::collections::{BTreeMap, VecDeque};

use super::{Event, FleetQuestion, Node, World};
use crate::cloud::{Ec2Action, Ec2Error};
use crate::ids::EniId;
use crate::ipam::decide::plan;
use crate::ipam::memory::Memory;
use crate::ipam::plan::{Action, Demand, PlanInput, Provisioning, Targets};
use crate::ipam::simulate::{VirtualNode, virtual_pod};
use crate::ipam::store::{EniRole, EniState, PoolMode};
use crate::ipam::types::Time;
use crate::limits::PREFIX_ADDRESSES;

/// An ADD waits this long in the plugin before it fails and the kubelet comes again.
const ADD_WAIT: u64 = 35_000;
/// Tries of a step whose loss would leave something behind, as the daemon's executor has them.
const STEP_TRIES: u32 = 12;
/// First pause between them; doubles up to 8 s.
const STEP_PAUSE: u64 = 500;
/// Timers that nobody waits for are rounded up to this, so that a fleet's cool-downs do not cost a plan each.
const GRAIN: u64 = 5_000;

/// One node.
#[derive(Clone)]
pub(super) struct Ours {
    node: VirtualNode,
    jobs: BTreeMap<u32, Job>,
    next_job: u32,
    /// ADDs that wait: since when the pod asks, and since when this try.
    waiting: VecDeque<(u64, u64)>,
    bound: u32,
    next_pod: u32,
    /// Pods that run, oldest first.
    running: VecDeque<u32>,
    wake: Option<u64>,
    /// Pods that may come before the planner could want anything.
    slack: u64,
}

#[derive(Clone)]
struct Job {
    action: Action,
    step: Step,
    tries: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Only,
    Create,
    Attach,
    Modify,
    Detach,
    Delete,
    /// The interface comes up.
    Link,
}

impl Ours {
    pub(super) fn new(question: &FleetQuestion) -> Self {
        Self {
            node: VirtualNode::new(question.targets, question.limits.clone(), false).with_cooldown(question.cooldown),
            jobs: BTreeMap::new(),
            next_job: 0,
            waiting: VecDeque::new(),
            bound: 0,
            next_pod: 0,
            running: VecDeque::new(),
            wake: None,
            slack: 0,
        }
    }

    /// The same node as another instance.
    pub(super) fn of_instance(&self, seed: u64) -> Self {
        let mut node = self.clone();
        node.node.memory = Memory::new(seed);
        (node.wake, node.slack) = (None, 0);
        node
    }

    fn assign(&mut self, now: Time) -> bool {
        let (key, pod) = virtual_pod(self.next_pod);
        if self.node.store.assign(&key, &pod, &[0], now).is_none() {
            return false;
        }
        self.running.push_back(self.next_pod);
        self.next_pod += 1;
        true
    }

    fn serve(&mut self, id: u32, world: &mut World) {
        while let Some((since, _)) = self.waiting.front().copied() {
            if !self.assign(Time(world.now)) {
                break;
            }
            self.waiting.pop_front();
            world.served(since);
        }
        while let Some((since, _)) = self.waiting.front().copied().filter(|(_, tried)| tried + ADD_WAIT <= world.now) {
            self.waiting.pop_front();
            // The pod stays bound to the node and counts as demand until it asks again.
            self.bound += 1;
            let pause = world.retry_pause();
            world.at(pause, id, Event::Ask { since });
        }
    }

    fn turn(&mut self, id: u32, world: &mut World) {
        self.serve(id, world);
        let now = Time(world.now);
        let in_flight: Vec<Action> = self.jobs.values().filter(|job| job.step != Step::Link).map(|job| job.action.clone()).collect();
        let waiting = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        let demand = BTreeMap::from([(0, Demand { waiting, bound: self.bound })]);
        let planned = plan(&PlanInput {
            store: &self.node.store,
            in_flight: &in_flight,
            memory: &self.node.memory,
            targets: &self.node.targets,
            limits: &self.node.limits,
            demand: &demand,
            placement: &self.node.placement,
            provisioning: Provisioning::On,
            now,
        });
        self.node.memory.surplus_since = planned.surplus_since;
        let free = self.node.store.stats(0, now).free();
        self.slack = free.saturating_sub(warm(&self.node.targets, self.node.limits.slots_per_eni) + u64::from(self.bound + waiting));
        for action in planned.actions {
            self.start(id, action, world);
        }
        if let Some(at) = planned.wake_at {
            self.wake_at(id, at.0, world);
        }
    }

    fn wake_at(&mut self, id: u32, at: u64, world: &mut World) {
        let at = if self.waiting.is_empty() { at.div_ceil(GRAIN) * GRAIN } else { at };
        let at = at.max(world.now + 1);
        if self.wake.is_none_or(|planned| planned <= world.now || planned > at) {
            self.wake = Some(at);
            world.at(at - world.now, id, Event::Wake);
        }
    }

    fn start(&mut self, id: u32, action: Action, world: &mut World) {
        let now = Time(world.now);
        for call in action.ec2_actions() {
            self.node.memory.called(*call, now);
        }
        let step = match &action {
            Action::Assign { .. } => Step::Only,
            Action::AttachEni { .. } => Step::Create,
            Action::Unassign { eni, cidrs, .. } => {
                cidrs.iter().for_each(|cidr| self.node.store.set_leaving(eni, *cidr, true));
                Step::Only
            }
            Action::ReleaseEni { eni, .. } => {
                if let Some(eni) = self.node.store.eni_mut(eni) {
                    eni.state = EniState::Releasing;
                }
                Step::Detach
            }
        };
        self.next_job += 1;
        self.jobs.insert(self.next_job, Job { action, step, tries: 0 });
        self.send(id, self.next_job, world);
    }

    fn send(&mut self, id: u32, number: u32, world: &mut World) {
        if let Some(job) = self.jobs.get(&number)
            && let Some(call) = call_of(job)
        {
            world.call(id, number, call);
        }
    }

    fn replied(&mut self, id: u32, number: u32, admitted: bool, world: &mut World) {
        let Some(job) = self.jobs.get(&number).cloned() else { return };
        let Some(call) = call_of(&job) else { return };
        let now = Time(world.now);
        if !admitted {
            self.node.memory.failed(&Ec2Error::Throttled { action: call, code: "RequestLimitExceeded".to_owned() }, None, now);
            return self.refused(id, number, &job, world);
        }
        self.node.memory.succeeded(call, now);
        let next = match job.step {
            Step::Create => Some(Step::Attach),
            Step::Attach => Some(Step::Modify),
            Step::Detach => Some(Step::Delete),
            Step::Modify => {
                let eni = self.attached(&job.action);
                if let Some(eni) = eni.and_then(|eni| self.node.store.eni_mut(&eni)) {
                    (eni.state, eni.added) = (EniState::Joining, now);
                }
                let rest = world.ec2.attach().saturating_sub(world.ec2.latency());
                world.at(rest, id, Event::Ready { job: number });
                Some(Step::Link)
            }
            Step::Only | Step::Delete | Step::Link => None,
        };
        match next {
            Some(step) => {
                self.jobs.insert(number, Job { step, tries: 0, ..job });
                self.send(id, number, world);
            }
            None => {
                self.jobs.remove(&number);
                if !matches!(job.action, Action::AttachEni { .. }) {
                    self.node.perform(job.action);
                }
            }
        }
        self.turn(id, world);
    }

    /// A refused first step ends the job: whether to try again is the planner's. A later one is tried again, and undone in
    /// the end.
    fn refused(&mut self, id: u32, number: u32, job: &Job, world: &mut World) {
        let again = !matches!(job.step, Step::Only | Step::Create | Step::Detach) && job.tries + 1 < STEP_TRIES;
        if again {
            let pause = STEP_PAUSE << job.tries.min(4);
            let pause = pause + world.random.below(pause / 2);
            self.jobs.insert(number, Job { tries: job.tries + 1, ..job.clone() });
            return world.at(pause, id, Event::Send { job: number });
        }
        self.jobs.remove(&number);
        match &job.action {
            Action::AttachEni { .. } if job.step == Step::Attach => {
                self.jobs.insert(number, Job { step: Step::Delete, tries: 0, ..job.clone() });
                self.send(id, number, world);
            }
            Action::Unassign { eni, cidrs, .. } => cidrs.iter().for_each(|cidr| self.node.store.set_leaving(eni, *cidr, false)),
            Action::ReleaseEni { eni, .. } if job.step == Step::Detach => {
                if let Some(eni) = self.node.store.eni_mut(eni) {
                    eni.state = EniState::Serving;
                }
            }
            // What is detached and cannot be deleted is left to the sweep.
            Action::ReleaseEni { .. } => self.node.perform(job.action.clone()),
            _ => {}
        }
        self.turn(id, world);
    }

    fn attached(&mut self, action: &Action) -> Option<EniId> {
        let Action::AttachEni { network_card, device_index, request, subnet, .. } = action else { return None };
        self.node.memory.subnet_gave(subnet, *request);
        let eni = self.node.add_eni(*network_card, *device_index, EniRole::Pods);
        let cidrs = self.node.new_cidrs(*request);
        self.node.store.add_cidrs(&eni, cidrs);
        Some(eni)
    }
}

impl Node for Ours {
    fn handle(&mut self, id: u32, event: Event, world: &mut World) {
        let now = Time(world.now);
        match event {
            Event::Bound => {
                self.bound += 1;
                match self.slack.checked_sub(1) {
                    Some(slack) => self.slack = slack,
                    None => self.turn(id, world),
                }
            }
            Event::Ask { since } => {
                self.bound = self.bound.saturating_sub(1);
                if self.waiting.is_empty() && self.assign(now) {
                    return world.served(since);
                }
                self.waiting.push_back((since, world.now));
                world.at(ADD_WAIT, id, Event::Wake);
                self.turn(id, world);
            }
            Event::End { .. } => {
                let Some(pod) = self.running.pop_front() else { return };
                self.node.store.release(&virtual_pod(pod).0, now);
                if let Some(end) = self.node.store.next_cooling_end(now) {
                    self.wake_at(id, end.0, world);
                }
            }
            Event::Send { job } => self.send(id, job, world),
            Event::Reply { job, admitted } => self.replied(id, job, admitted, world),
            Event::Ready { job } => {
                if let Some(Job { action: Action::AttachEni { device_index, .. }, .. }) = self.jobs.remove(&job) {
                    let ready = self.node.store.enis().values().find(|eni| eni.device_index == device_index).map(|eni| eni.id.clone());
                    if let Some(eni) = ready.and_then(|eni| self.node.store.eni_mut(&eni)) {
                        eni.state = EniState::Serving;
                    }
                }
                self.turn(id, world);
            }
            Event::Wake => self.turn(id, world),
        }
    }

    fn idle(&self) -> (u64, u64) {
        let stats = self.node.store.stats(0, Time(u64::MAX));
        (stats.total - stats.assigned, self.node.store.enis().len() as u64)
    }
}

fn call_of(job: &Job) -> Option<Ec2Action> {
    match job.step {
        Step::Only => job.action.ec2_actions().first().copied(),
        Step::Create => Some(Ec2Action::CreateNetworkInterface),
        Step::Attach => Some(Ec2Action::AttachNetworkInterface),
        Step::Modify => Some(Ec2Action::ModifyNetworkInterfaceAttribute),
        Step::Detach => Some(Ec2Action::DetachNetworkInterface),
        Step::Delete => Some(Ec2Action::DeleteNetworkInterface),
        Step::Link => None,
    }
}

/// Free addresses that the targets ask for.
fn warm(targets: &Targets, slots: u16) -> u64 {
    if targets.warm_ip != 0 || targets.minimum_ip != 0 {
        return u64::from(targets.warm_ip);
    }
    let unit = match targets.mode {
        PoolMode::SecondaryIps => u64::from(targets.warm_eni) * u64::from(slots),
        _ => u64::from(targets.warm_prefix) * u64::from(PREFIX_ADDRESSES),
    };
    unit.max(1)
}
