//! A model of aws-node v1.23's rules: one loop, one step a tick, no memory of throttling, no demand.
//!
//! Simplified: a decrease and the release of an ENI take one call a tick; the reads of IMDS and the hourly sweep are left out.

use std::collections::VecDeque;

use super::{Event, FleetQuestion, LOOP_PERIOD, Node, World};
use crate::cloud::Ec2Action;
use crate::ipam::store::PoolMode;

/// The SDK's tries of one call, and the bound of its first pause; the bound doubles.
const SDK_TRIES: u32 = 3;
const SDK_PAUSE: u64 = 1_000;
/// Tries of Detach and Delete on release, their first pause doubling.
const FREE_TRIES: u32 = 12;
const FREE_PAUSE: u64 = 200;
/// Between Detach and Delete.
const DETACHED: u64 = 2_000;
/// A younger ENI is not freed; addresses are taken back at most this often apart.
const ENI_MIN_AGE: u64 = 60_000;
const DECREASE_EVERY: u64 = 30_000;
/// The loop is simulated for this long after a change: past the cool-down, the ENI's age and the decrease's pause.
const ACTIVE: u64 = 180_000;

/// An address or a prefix.
#[derive(Clone, Debug, Default)]
struct Cidr {
    used: u8,
    /// Ends of cool-downs.
    cooling: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Eni {
    added: u64,
    cidrs: Vec<Cidr>,
}

#[derive(Clone, Debug)]
enum Task {
    Assign {
        eni: usize,
        count: u16,
        single: bool,
    },
    New {
        count: u16,
    },
    Unassign {
        eni: usize,
        count: usize,
    },
    Free {
        eni: usize,
    },
    /// An ENI that could not be attached or set up goes.
    Drop,
    /// The interface is waited for.
    Wait {
        count: u16,
    },
}

#[derive(Clone, Debug)]
struct Job {
    task: Task,
    calls: VecDeque<Ec2Action>,
    tries: u32,
}

/// One node.
#[derive(Clone, Debug)]
pub(super) struct AwsNode {
    unit: u8,
    slots: u16,
    max_enis: u16,
    max_pods: u64,
    warm_eni: u64,
    warm_ip: u64,
    minimum: u64,
    warm_prefix: u64,
    cooldown: u64,
    enis: Vec<Eni>,
    job: Option<Job>,
    decreased: u64,
    active_until: u64,
    ticking: bool,
}

impl AwsNode {
    pub(super) fn new(question: &FleetQuestion) -> Self {
        let targets = question.targets;
        Self {
            unit: if targets.mode == PoolMode::SecondaryIps { 1 } else { 16 },
            slots: question.limits.slots_per_eni,
            max_enis: question.limits.cards.first().map_or(1, |(_, enis)| *enis),
            max_pods: u64::from(question.limits.max_pods),
            warm_eni: u64::from(targets.warm_eni),
            warm_ip: u64::from(targets.warm_ip),
            minimum: u64::from(targets.minimum_ip),
            warm_prefix: u64::from(targets.warm_prefix),
            cooldown: u64::try_from(question.cooldown.as_millis()).unwrap_or(u64::MAX),
            enis: vec![Eni { added: 0, cidrs: Vec::new() }],
            job: None,
            decreased: 0,
            active_until: 0,
            ticking: false,
        }
    }

    fn cidrs(&self) -> impl Iterator<Item = &Cidr> {
        self.enis.iter().flat_map(|eni| &eni.cidrs)
    }

    fn total(&self) -> u64 {
        self.cidrs().count() as u64 * u64::from(self.unit)
    }

    fn assigned(&self) -> u64 {
        self.cidrs().map(|cidr| u64::from(cidr.used)).sum()
    }

    fn by_ip(&self) -> bool {
        self.warm_ip != 0 || self.minimum != 0
    }

    /// Any address of any ENI, in the order in which a hash map happens to be walked.
    fn assign(&mut self, world: &mut World) -> bool {
        let now = world.now;
        let unit = usize::from(self.unit);
        let first = world.random.below(self.enis.len() as u64) as usize;
        let count = self.enis.len();
        for offset in 0..count {
            let eni = &mut self.enis[(first + offset) % count];
            let from = world.random.below(eni.cidrs.len() as u64) as usize;
            let cidrs = eni.cidrs.len();
            for step in 0..cidrs {
                let cidr = &mut eni.cidrs[(from + step) % cidrs];
                cidr.cooling.retain(|end| *end > now);
                if usize::from(cidr.used) + cidr.cooling.len() < unit {
                    cidr.used += 1;
                    return true;
                }
            }
        }
        false
    }

    fn release(&mut self, world: &mut World) {
        let held = self.assigned();
        let mut nth = world.random.below(held);
        for cidr in self.enis.iter_mut().flat_map(|eni| &mut eni.cidrs) {
            if nth < u64::from(cidr.used) {
                cidr.used -= 1;
                return cidr.cooling.push(world.now + self.cooldown);
            }
            nth -= u64::from(cidr.used);
        }
    }

    fn changed(&mut self, id: u32, world: &mut World) {
        self.active_until = world.now + ACTIVE;
        if !self.ticking && self.job.is_none() {
            self.ticking = true;
            let phase = world.random.below(LOOP_PERIOD);
            world.at(phase, id, Event::Wake);
        }
    }

    fn tick(&mut self, id: u32, world: &mut World) {
        let now = world.now;
        self.cidrs_mut().for_each(|cidr| cidr.cooling.retain(|end| *end > now));
        match self.decide(world) {
            Some((task, calls)) => {
                self.ticking = false;
                self.active_until = now + ACTIVE;
                self.job = Some(Job { task, calls: calls.iter().copied().collect(), tries: 0 });
                self.send(id, world);
            }
            None if now < self.active_until => {
                self.ticking = true;
                world.at(LOOP_PERIOD, id, Event::Wake);
            }
            None => self.ticking = false,
        }
    }

    fn cidrs_mut(&mut self) -> impl Iterator<Item = &mut Cidr> {
        self.enis.iter_mut().flat_map(|eni| &mut eni.cidrs)
    }

    fn decide(&mut self, world: &mut World) -> Option<(Task, &'static [Ec2Action])> {
        let (total, assigned) = (self.total(), self.assigned());
        // Cooling addresses count as free.
        let free = total - assigned;
        let unit = u64::from(self.unit);
        let free_prefixes = self.cidrs().filter(|cidr| cidr.used == 0).count() as u64;
        let short = self.warm_ip.saturating_sub(free).max(self.minimum.saturating_sub(total));
        let low = match (total >= self.max_pods, self.by_ip()) {
            (true, _) => false,
            (false, true) => short > 0,
            (false, false) if self.unit == 1 => free < self.warm_eni * u64::from(self.slots) || (self.warm_eni == 0 && free == 0),
            (false, false) => free < 16 * self.warm_prefix || (self.warm_prefix == 0 && free == 0),
        };
        if low {
            let wanted = match (self.by_ip(), self.unit) {
                (true, _) => short.div_ceil(unit).max(1),
                (false, 1) => u64::MAX,
                (false, _) => self.warm_prefix.saturating_sub(free_prefixes).max(1),
            };
            return self.increase(u16::try_from(wanted).unwrap_or(u16::MAX), world);
        }
        if world.now >= self.decreased + DECREASE_EVERY {
            let over = match (self.by_ip(), self.unit) {
                (true, 1) => free.saturating_sub(self.warm_ip).min(total.saturating_sub(self.minimum)),
                (true, _) => {
                    let prefixes = total / 16;
                    let over = free_prefixes.min(prefixes.saturating_sub((assigned + self.warm_ip).div_ceil(16)));
                    over.min(prefixes.saturating_sub(self.minimum.div_ceil(16)))
                }
                (false, 1) => 0,
                (false, _) => free_prefixes.saturating_sub(self.warm_prefix),
            };
            let idle = |eni: &Eni| eni.cidrs.iter().filter(|cidr| cidr.used == 0 && cidr.cooling.is_empty()).count();
            if over > 0
                && let Some(eni) = self.enis.iter().position(|eni| idle(eni) > 0)
            {
                self.decreased = world.now;
                let count = idle(&self.enis[eni]).min(usize::try_from(over).unwrap_or(usize::MAX));
                return Some((Task::Unassign { eni, count }, &[Ec2Action::UnassignPrivateIpAddresses]));
            }
        }
        self.removable(world.now).map(|eni| {
            let calls: &[Ec2Action] =
                &[Ec2Action::DescribeNetworkInterfaces, Ec2Action::DetachNetworkInterface, Ec2Action::DeleteNetworkInterface];
            (Task::Free { eni }, calls)
        })
    }

    fn increase(&self, wanted: u16, world: &mut World) -> Option<(Task, &'static [Ec2Action])> {
        let room = |eni: &Eni| self.slots.saturating_sub(eni.cidrs.len() as u16);
        let first = world.random.below(self.enis.len() as u64) as usize;
        let candidates = (0..self.enis.len()).map(|offset| (first + offset) % self.enis.len());
        if let Some(eni) = candidates.into_iter().find(|eni| room(&self.enis[*eni]) > 0) {
            let count = wanted.min(room(&self.enis[eni]));
            return Some((Task::Assign { eni, count, single: false }, &[Ec2Action::AssignPrivateIpAddresses]));
        }
        if self.enis.len() >= usize::from(self.max_enis) {
            return None;
        }
        let calls: &[Ec2Action] = &[
            Ec2Action::DescribeSubnets,
            Ec2Action::CreateNetworkInterface,
            Ec2Action::DescribeInstances,
            Ec2Action::AttachNetworkInterface,
            Ec2Action::ModifyNetworkInterfaceAttribute,
        ];
        Some((Task::New { count: wanted.min(self.slots) }, calls))
    }

    /// An ENI without pods whose loss leaves the targets met.
    fn removable(&self, now: u64) -> Option<usize> {
        let (total, assigned) = (self.total(), self.assigned());
        let per_eni = u64::from(self.slots) * u64::from(self.unit);
        let empty = |eni: &Eni| eni.cidrs.iter().all(|cidr| cidr.used == 0 && cidr.cooling.is_empty());
        let surplus = self.by_ip()
            || (self.unit == 1 && total - assigned >= (self.warm_eni + 1) * per_eni)
            || (self.unit == 16 && self.enis.iter().skip(1).any(empty));
        if !surplus {
            return None;
        }
        (1..self.enis.len()).find(|index| {
            let eni = &self.enis[*index];
            let gone = eni.cidrs.len() as u64 * u64::from(self.unit);
            let (rest_total, rest_free) = (total - gone, (total - assigned).saturating_sub(gone));
            let round = |target: u64| target.div_ceil(u64::from(self.unit)) * u64::from(self.unit);
            let covered = rest_free >= round(self.warm_ip) && rest_total >= round(self.minimum);
            let prefixes = self.unit == 1 || rest_free / 16 >= self.warm_prefix || self.by_ip();
            empty(eni) && now >= eni.added + ENI_MIN_AGE && covered && prefixes
        })
    }

    fn send(&mut self, id: u32, world: &mut World) {
        match self.job.as_ref().and_then(|job| job.calls.front().copied()) {
            Some(call) => world.call(id, 0, call),
            None => self.finish(id, world),
        }
    }

    fn finish(&mut self, id: u32, world: &mut World) {
        let Some(job) = self.job.take() else { return };
        let fresh = |count: u16| vec![Cidr::default(); usize::from(count)];
        match job.task {
            Task::Assign { eni, count, .. } => self.enis[eni].cidrs.extend(fresh(count)),
            Task::New { count } => {
                // IMDS is polled with a doubling pause; the interface must be there.
                let (mut waited, mut pause) = (0, 100);
                while waited < world.ec2.attach() {
                    waited += pause;
                    pause = (pause * 2).min(60_000);
                }
                self.job = Some(Job { task: Task::Wait { count }, calls: VecDeque::new(), tries: 0 });
                return world.at(waited, id, Event::Ready { job: 0 });
            }
            Task::Wait { count } => self.enis.push(Eni { added: world.now, cidrs: fresh(count) }),
            Task::Unassign { eni, count } => {
                let mut left = count;
                self.enis[eni].cidrs.retain(|cidr| {
                    let goes = left > 0 && cidr.used == 0 && cidr.cooling.is_empty();
                    left -= usize::from(goes);
                    !goes
                });
            }
            Task::Free { eni } => drop(self.enis.remove(eni)),
            Task::Drop => {}
        }
        self.next_tick(id, world);
    }

    fn next_tick(&mut self, id: u32, world: &mut World) {
        self.ticking = true;
        world.at(LOOP_PERIOD, id, Event::Wake);
    }

    fn replied(&mut self, id: u32, admitted: bool, world: &mut World) {
        let Some(job) = self.job.as_mut() else { return };
        if admitted {
            let done = job.calls.pop_front();
            job.tries = 0;
            let freeing = matches!(job.task, Task::Free { .. } | Task::Drop) && done == Some(Ec2Action::DetachNetworkInterface);
            return if freeing { world.at(DETACHED, id, Event::Send { job: 0 }) } else { self.send(id, world) };
        }
        job.tries += 1;
        let freeing = matches!(job.task, Task::Free { .. } | Task::Drop);
        let (most, bound) = if freeing { (FREE_TRIES, FREE_PAUSE) } else { (SDK_TRIES, SDK_PAUSE) };
        if job.tries < most {
            let pause = world.random.below((bound << job.tries.saturating_sub(1).min(7)).min(60_000)) + 1;
            return world.at(pause, id, Event::Send { job: 0 });
        }
        let failed_at = job.calls.front().copied();
        let undo: &[Ec2Action] = match (&job.task, failed_at) {
            (Task::Assign { eni, single: false, .. }, _) => {
                // The same again at once, for one.
                let task = Task::Assign { eni: *eni, count: 1, single: true };
                self.job = Some(Job { task, calls: VecDeque::from([Ec2Action::AssignPrivateIpAddresses]), tries: 0 });
                return self.send(id, world);
            }
            (Task::New { .. }, Some(Ec2Action::DescribeInstances | Ec2Action::AttachNetworkInterface)) => {
                &[Ec2Action::DeleteNetworkInterface]
            }
            (Task::New { .. }, Some(Ec2Action::ModifyNetworkInterfaceAttribute)) => {
                &[Ec2Action::DescribeNetworkInterfaces, Ec2Action::DetachNetworkInterface, Ec2Action::DeleteNetworkInterface]
            }
            _ => &[],
        };
        if undo.is_empty() {
            self.job = None;
            return self.next_tick(id, world);
        }
        self.job = Some(Job { task: Task::Drop, calls: undo.iter().copied().collect(), tries: 0 });
        self.send(id, world);
    }
}

impl Node for AwsNode {
    fn handle(&mut self, id: u32, event: Event, world: &mut World) {
        match event {
            Event::Bound => {}
            Event::Ask { since } => {
                if self.assign(world) {
                    world.served(since);
                } else {
                    let pause = world.retry_pause();
                    world.at(pause, id, Event::Ask { since });
                }
                self.changed(id, world);
            }
            Event::End { .. } => {
                self.release(world);
                self.changed(id, world);
            }
            Event::Send { .. } => self.send(id, world),
            Event::Reply { admitted, .. } => self.replied(id, admitted, world),
            Event::Ready { .. } => self.finish(id, world),
            Event::Wake if self.job.is_none() => self.tick(id, world),
            Event::Wake => {}
        }
    }

    fn idle(&self) -> (u64, u64) {
        (self.total() - self.assigned(), self.enis.len() as u64)
    }
}
