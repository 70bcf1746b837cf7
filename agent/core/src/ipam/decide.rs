//! The pool planner: pure, deterministic, the same for the daemon, the simulation and `stanchion plan`.
//!
//! Free is total - assigned - cooling. Waiting requests and pods bound to the node are served whatever the targets say;
//! the targets say what is kept beyond them. Nothing is given back that the next plan would ask for again: a release must
//! leave every target met, and the surplus must have lasted [`SHRINK_AFTER`].

use std::time::Duration;

use ipnet::IpNet;

use super::memory::{AddressKind, Closed, Memory};
use super::plan::{Action, Blocked, Demand, Placement, Plan, PlanInput, Provisioning, Reason};
use super::store::{EniRole, EniState, PoolMode, Stats, StoredEni, addresses_of};
use super::types::Time;
use crate::cloud::{AddressRequest, Ec2Action, EniKind};
use crate::ids::{EniId, SubnetId};
use crate::limits::PREFIX_ADDRESSES;

/// How long a surplus must last before it is given back: longer than the cool-down and than a rolling restart's gap, so
/// that churn of pods does not become churn of EC2 calls.
pub const SHRINK_AFTER: Duration = Duration::from_secs(60);

/// An ENI younger than this is not released: attaching one costs ten seconds and three calls.
pub const ENI_MIN_AGE: Duration = Duration::from_secs(60);

/// How long the addresses of an ENI whose interface is not there are waited for: the longest that was ever seen is 150 s.
pub const JOIN_PATIENCE: Duration = Duration::from_secs(180);

/// How soon after a call the warm targets may ask again while no pod lacks an address: pods that come one by one share a
/// call. aws-node's loop is no quicker.
pub const REFILL_PAUSE: Duration = Duration::from_secs(5);

/// Single addresses kept free while a fragmented subnet gives no prefixes and only prefix targets are set. A full
/// prefix's worth would take the slots that the prefixes need when the subnet recovers.
const FALLBACK_WARM: u64 = 2;

/// Device indexes end here in EC2 (0 to 99); the search never goes beyond.
const DEVICE_INDEXES: u16 = 100;

/// Decides what to ask EC2 for.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let mut out = Plan::default();
    // Tokens that this plan's own actions take must not be taken twice.
    let mut budget = input.memory.clone();
    for (card, max_enis) in &input.limits.cards {
        CardPlanner::new(input, *card, *max_enis).plan(&mut budget, &mut out);
    }
    out.wake_at =
        [out.wake_at, input.memory.next_pause_end(input.now), input.store.next_cooling_end(input.now)].into_iter().flatten().min();
    out
}

struct CardPlanner<'a> {
    input: &'a PlanInput<'a>,
    card: u16,
    max_enis: u16,
    demand: Demand,
    /// CIDRs that count for the targets: those of the mode's kind, and all where the subnet is fragmented.
    counted: Stats,
    /// All CIDRs that can serve a pod.
    all: Stats,
    /// Addresses that actions under way will bring, and those of ENIs that are joining.
    coming: u64,
    /// Addresses that pods hold on ENIs that are joining.
    held_on_joining: u64,
    attaching: u16,
}

/// What is missing, in addresses.
struct Missing {
    short: u64,
    /// The part of it that pods need.
    for_pods: u64,
    reason: Reason,
    /// Whole ENIs are filled (WARM_ENI_TARGET).
    whole: bool,
}

impl<'a> CardPlanner<'a> {
    fn new(input: &'a PlanInput<'a>, card: u16, max_enis: u16) -> Self {
        let mut this = Self {
            input,
            card,
            max_enis,
            demand: input.demand.get(&card).copied().unwrap_or_default(),
            counted: Stats::default(),
            all: input.store.stats(card, input.now),
            coming: 0,
            held_on_joining: 0,
            attaching: 0,
        };
        for eni in this.joining() {
            for cidr in eni.cidrs.keys().copied() {
                if this.counts(eni, cidr) {
                    let stats = input.store.cidr_stats(cidr, input.now);
                    this.coming += stats.free();
                    this.held_on_joining += stats.total - stats.free();
                }
            }
        }
        for eni in this.serving() {
            for cidr in eni.cidrs.iter().filter(|(_, leaving)| !**leaving).map(|(cidr, _)| *cidr) {
                if this.counts(eni, cidr) {
                    this.counted += input.store.cidr_stats(cidr, input.now);
                }
            }
        }
        for action in input.in_flight {
            match action {
                Action::Assign { eni, request, .. } if this.on_card(eni) => this.coming += addresses_in(*request),
                Action::AttachEni { network_card, request, .. } if *network_card == card => {
                    this.coming += addresses_in(*request);
                    this.attaching += 1;
                }
                _ => {}
            }
        }
        this
    }

    fn plan(&self, budget: &mut Memory, out: &mut Plan) {
        if self.input.targets.mode == PoolMode::Ipv6Prefixes {
            return self.plan_ipv6(budget, out);
        }
        out.wake_at = self.joining().map(|eni| eni.added + JOIN_PATIENCE).chain(out.wake_at).min();
        let missing = self.missing();
        if missing.short > 0 {
            if self.input.provisioning == Provisioning::On {
                // They hold slots that what is missing may need, and nothing will ever serve a pod in them.
                let next_age = self.leave_excluded(budget, out);
                out.wake_at = [out.wake_at, next_age].into_iter().flatten().min();
            }
            let calls = [Ec2Action::AssignPrivateIpAddresses, Ec2Action::CreateNetworkInterface];
            let again = self.input.memory.last_call(&calls).map(|called| called + REFILL_PAUSE).filter(|at| *at > self.input.now);
            match again {
                Some(at) if missing.for_pods == 0 => out.wake_at = out.wake_at.into_iter().chain([at]).min(),
                _ => self.grow(missing, budget, out),
            }
        } else {
            self.shrink(budget, out);
        }
    }

    fn enis(&self) -> impl Iterator<Item = &'a StoredEni> + use<'a> {
        let card = self.card;
        self.input.store.enis().values().filter(move |eni| eni.network_card == card)
    }

    fn serving(&self) -> impl Iterator<Item = &'a StoredEni> + use<'a> {
        self.enis().filter(|eni| eni.serves_pods())
    }

    /// Attached, for pods, and expected to serve soon.
    fn joining(&self) -> impl Iterator<Item = &'a StoredEni> + use<'a> {
        let now = self.input.now;
        self.enis().filter(move |eni| eni.state == EniState::Joining && eni.role == EniRole::Pods && now.since(eni.added) < JOIN_PATIENCE)
    }

    fn on_card(&self, id: &EniId) -> bool {
        self.input.store.enis().get(id).is_some_and(|eni| eni.network_card == self.card)
    }

    fn busy(&self, eni: &StoredEni) -> bool {
        self.input.in_flight.iter().any(|action| action.eni() == Some(&eni.id))
    }

    /// The subnet gives no prefixes, so single addresses stand in.
    fn fragmented(&self, eni: &StoredEni) -> bool {
        self.input.targets.mode == PoolMode::Prefixes
            && self.input.memory.shortage(&eni.subnet, AddressKind::Prefixes, self.input.now).is_some()
    }

    fn counts(&self, eni: &StoredEni, cidr: IpNet) -> bool {
        let mode = self.input.targets.mode;
        mode.wants(cidr) || (mode.serves(cidr) && self.fragmented(eni))
    }

    fn ip_targets(&self) -> Option<(u64, u64)> {
        let targets = self.input.targets;
        if self.card != self.input.limits.cards.first().map_or(0, |(card, _)| *card) {
            return Some((1, 1));
        }
        (targets.warm_ip != 0 || targets.minimum_ip != 0).then_some((u64::from(targets.warm_ip), u64::from(targets.minimum_ip)))
    }

    /// What must stay (free, total), pods that are on their way included. Growth and shrinking use the same numbers: that
    /// is the hysteresis.
    fn floor(&self) -> (u64, u64) {
        let pods = u64::from(self.demand.waiting + self.demand.bound);
        match self.ip_targets() {
            Some((warm, minimum)) => (warm + pods, minimum),
            None => (self.warm_unit().max(1) + pods, 0),
        }
    }

    /// Addresses that the ENI or prefix target asks to be free.
    fn warm_unit(&self) -> u64 {
        let targets = self.input.targets;
        match targets.mode {
            PoolMode::Prefixes => u64::from(targets.warm_prefix) * u64::from(PREFIX_ADDRESSES),
            _ => u64::from(targets.warm_eni) * u64::from(self.input.limits.slots_per_eni),
        }
    }

    fn missing(&self) -> Missing {
        let free = self.counted.free() + self.coming;
        let total = self.counted.total + self.coming + self.held_on_joining;
        let any_free = self.all.free() + self.coming;
        let pods = u64::from(self.demand.waiting + self.demand.bound);
        let for_pods = pods.saturating_sub(any_free);
        let (warm, reason) = self.missing_for_targets(free, total, pods);
        let whole = self.ip_targets().is_none() && self.input.targets.mode == PoolMode::SecondaryIps;
        if for_pods > 0 {
            let waiting = u64::from(self.demand.waiting).saturating_sub(any_free);
            let reason =
                if waiting > 0 { Reason::PodsWaiting { short: clamp(waiting) } } else { Reason::PodsBound { short: clamp(for_pods) } };
            return Missing { short: for_pods.max(warm), for_pods, reason, whole };
        }
        Missing { short: warm, for_pods, reason, whole }
    }

    fn missing_for_targets(&self, free: u64, total: u64, pods: u64) -> (u64, Reason) {
        let most = self.steps_until_max_pods(free, total, pods);
        if most == 0 {
            return (0, Reason::NothingFree);
        }
        if let Some((warm, minimum)) = self.ip_targets() {
            let below_warm = (warm + pods).saturating_sub(free).min(most);
            let below_minimum = minimum.saturating_sub(total).min(most);
            return if below_warm >= below_minimum {
                (below_warm, Reason::BelowWarmIp { short: clamp(below_warm) })
            } else {
                (below_minimum, Reason::BelowMinimumIp { short: clamp(below_minimum) })
            };
        }
        let unit = self.warm_unit();
        let short = (unit.max(1) + pods).saturating_sub(free).min(most);
        let reason = match self.input.targets.mode {
            _ if unit == 0 => Reason::NothingFree,
            PoolMode::Prefixes => Reason::BelowWarmPrefix { short: clamp(short) },
            _ => Reason::BelowWarmEni { short: clamp(short) },
        };
        (short, reason)
    }

    /// What the targets may add at most. Nobody can come beyond max pods: aws-node takes no further step once it has as many addresses,
    /// and a burst that is served in one call ends where its steps would.
    fn steps_until_max_pods(&self, free: u64, total: u64, pods: u64) -> u64 {
        let max_pods = u64::from(self.input.limits.max_pods);
        let (prefix, slots) = (u64::from(PREFIX_ADDRESSES), u64::from(self.input.limits.slots_per_eni));
        let prefixes = self.input.targets.mode == PoolMode::Prefixes;
        let (unit, wanted) = (self.warm_unit(), total.saturating_sub(free) + pods);
        let mut now = total;
        while now < max_pods {
            let left = now.saturating_sub(wanted);
            let step = match self.ip_targets() {
                Some((warm, minimum)) => warm.saturating_sub(left).max(minimum.saturating_sub(now)),
                None if left >= unit.max(1) => 0,
                None if prefixes => (unit - left / prefix * prefix).max(1),
                None => slots.max(1),
            };
            if step == 0 {
                break;
            }
            now += if prefixes { step.next_multiple_of(prefix) } else { step };
        }
        now - total
    }

    fn grow(&self, missing: Missing, budget: &mut Memory, out: &mut Plan) {
        let waiting_only = match self.input.provisioning {
            Provisioning::On => false,
            // A cordoned node still runs DaemonSet pods: those that wait get addresses on the ENIs that are there.
            Provisioning::Unschedulable => true,
            state => return out.blocked.push((self.card, Blocked::Provisioning(state))),
        };
        let mut growth =
            Growth { left: if waiting_only { missing.for_pods } else { missing.short }, for_pods: missing.for_pods, ..Growth::default() };
        let mut enis: Vec<_> = self.serving().filter(|eni| eni.room() > 0 && !self.busy(eni)).collect();
        enis.sort_by_key(|eni| (!eni.is_primary(), eni.device_index));
        for eni in enis {
            if growth.left == 0 {
                break;
            }
            self.fill(eni, &missing, &mut growth, budget, out);
        }
        if waiting_only {
            if growth.left > 0 {
                growth.blocked.push(Blocked::Provisioning(self.input.provisioning));
            }
        } else {
            let later = self.room_left(&out.actions, None);
            if growth.left > later {
                growth.left -= later;
                self.attach(&missing, &mut growth, budget, out);
                if growth.left > 0 {
                    self.make_room(&growth, budget, out);
                }
                growth.left += later;
            }
        }
        out.wake_at = [out.wake_at, growth.wake_at].into_iter().flatten().min();
        if growth.left > 0 {
            out.blocked.extend(growth.blocked.into_iter().map(|blocked| (self.card, blocked)));
        }
    }

    /// Addresses that fit on ENIs that are there or on their way (all, or those of one subnet), beyond what is under way and
    /// `planned`. They are asked for when a call, a pause or an attachment ends: as soon as a new ENI would come, for fewer
    /// calls. A subnet that refuses counts for nothing.
    fn room_left(&self, planned: &[Action], subnet: Option<&SubnetId>) -> u64 {
        let wanted = |other: &SubnetId| subnet.is_none_or(|subnet| subnet == other);
        let under_way = || self.input.in_flight.iter().chain(planned);
        let there = self.serving().chain(self.joining()).filter(|eni| wanted(&eni.subnet)).map(|eni| {
            let asked = under_way().filter(|action| action.eni() == Some(&eni.id)).map(|action| match action {
                Action::Assign { request, .. } => AddressKind::of(*request).1,
                _ => 0,
            });
            u64::from(eni.room().saturating_sub(asked.sum())) * self.unit(&eni.subnet)
        });
        let coming = under_way().filter_map(|action| match action {
            Action::AttachEni { network_card, subnet, request, .. } if *network_card == self.card && wanted(subnet) => {
                let room = self.input.limits.slots_per_eni.saturating_sub(AddressKind::of(*request).1);
                Some(u64::from(room) * self.unit(subnet))
            }
            _ => None,
        });
        there.chain(coming).sum()
    }

    /// Addresses that a slot brings in a subnet now.
    fn unit(&self, subnet: &SubnetId) -> u64 {
        let gives = |kind| self.input.memory.allowance(subnet, kind, 1, self.input.now).is_ok();
        match self.input.targets.mode {
            PoolMode::Prefixes if gives(AddressKind::Prefixes) => u64::from(PREFIX_ADDRESSES),
            _ => u64::from(gives(AddressKind::Addresses)),
        }
    }

    /// Asks for more on an ENI that has room.
    fn fill(&self, eni: &StoredEni, missing: &Missing, growth: &mut Growth, budget: &mut Memory, out: &mut Plan) {
        let Some(request) = self.request(&eni.subnet, eni.room(), 0, missing, growth) else { return };
        if !growth.afford(&[Ec2Action::AssignPrivateIpAddresses], budget, self.input.now) {
            return;
        }
        growth.got(request);
        out.actions.push(Action::Assign { eni: eni.id.clone(), subnet: eni.subnet.clone(), request, reason: missing.reason });
    }

    /// Asks for new ENIs, several at a time when one is not enough.
    fn attach(&self, missing: &Missing, growth: &mut Growth, budget: &mut Memory, out: &mut Plan) {
        let reserved = u16::from(
            self.input.targets.reserve_trunk && self.card == 0 && !self.input.store.enis().values().any(|eni| eni.kind == EniKind::Trunk),
        );
        let mut attached = u16::try_from(self.enis().count()).unwrap_or(u16::MAX).saturating_add(self.attaching);
        let mut indexes: Vec<u16> = self.enis().map(|eni| eni.attached_at).collect();
        indexes.extend(self.input.in_flight.iter().filter_map(|action| match action {
            Action::AttachEni { network_card, device_index, .. } if *network_card == self.card => Some(*device_index),
            _ => None,
        }));
        while growth.left > 0 {
            if attached + reserved >= self.max_enis {
                return growth.blocked.push(Blocked::AllFull { enis: attached, of: self.max_enis, trunk_reserved: reserved > 0 });
            }
            let subnets = match self.input.placement {
                Placement::Subnets { subnets, .. } => subnets,
                Placement::Nowhere(why) => return growth.blocked.push(Blocked::Nowhere(why.clone())),
            };
            let Some(device_index) = (1..DEVICE_INDEXES).find(|index| !indexes.contains(index)) else {
                return growth.blocked.push(Blocked::AllFull { enis: attached, of: self.max_enis, trunk_reserved: false });
            };
            let slots = self.input.limits.slots_per_eni;
            let Some((subnet, request)) = subnets.iter().find_map(|subnet| {
                if let Some(closed) = self.input.memory.closed(subnet, self.input.now) {
                    growth.closed(subnet, closed);
                    return None;
                }
                let elsewhere = self.room_left(&out.actions, Some(subnet));
                Some((subnet, self.request(subnet, slots, elsewhere, missing, growth)?))
            }) else {
                return;
            };
            let calls = [Ec2Action::CreateNetworkInterface, Ec2Action::AttachNetworkInterface, Ec2Action::ModifyNetworkInterfaceAttribute];
            if !growth.afford(&calls, budget, self.input.now) {
                return;
            }
            growth.got(request);
            attached += 1;
            indexes.push(device_index);
            out.actions.push(Action::AttachEni {
                network_card: self.card,
                device_index,
                subnet: subnet.clone(),
                request,
                reason: missing.reason,
            });
        }
    }

    /// What to ask a subnet for, given the room on the ENI and the room `elsewhere` in that subnet; `None` while it is paused.
    fn request(&self, subnet: &SubnetId, room: u16, elsewhere: u64, missing: &Missing, growth: &mut Growth) -> Option<AddressRequest> {
        match self.input.targets.mode {
            PoolMode::Prefixes => {
                let prefixes = growth.left.div_ceil(u64::from(PREFIX_ADDRESSES));
                let singles = match self.ip_targets() {
                    Some(_) => growth.left,
                    None => growth
                        .for_pods
                        .max(FALLBACK_WARM.saturating_sub(self.all.free() + self.coming + growth.got))
                        .saturating_sub(elsewhere),
                };
                self.ask(subnet, AddressKind::Prefixes, prefixes, room, growth)
                    .or_else(|| self.ask(subnet, AddressKind::Addresses, singles, room, growth))
            }
            PoolMode::Ipv6Prefixes => self.ask(subnet, AddressKind::Ipv6, growth.left, room, growth),
            _ if missing.whole => self.ask(subnet, AddressKind::Addresses, u64::from(room), room, growth),
            _ => self.ask(subnet, AddressKind::Addresses, growth.left, room, growth),
        }
    }

    fn ask(&self, subnet: &SubnetId, kind: AddressKind, wanted: u64, room: u16, growth: &mut Growth) -> Option<AddressRequest> {
        let memory = self.input.memory;
        let wanted = u16::try_from(wanted).unwrap_or(u16::MAX).min(room);
        if wanted == 0 {
            return None;
        }
        match memory.allowance(subnet, kind, wanted, self.input.now) {
            Ok(count) => Some(kind.request(count)),
            Err(until) => {
                growth.wake(until);
                if let Some(shortage) = memory.shortage(subnet, kind, self.input.now) {
                    let blocked = Blocked::Subnet { subnet: subnet.clone(), since: shortage.since, until, error: shortage.error.clone() };
                    if !growth.blocked.contains(&blocked) {
                        growth.blocked.push(blocked);
                    }
                }
                None
            }
        }
    }

    /// Everything is full: idle CIDRs of the other kind give up their slots.
    fn make_room(&self, growth: &Growth, budget: &mut Memory, out: &mut Plan) {
        let unit = if self.input.targets.mode == PoolMode::Prefixes { u64::from(PREFIX_ADDRESSES) } else { 1 };
        let mut slots = usize::try_from(growth.left.div_ceil(unit)).unwrap_or(usize::MAX);
        for eni in self.serving().filter(|eni| eni.room() == 0 && !self.busy(eni)) {
            let cidrs: Vec<_> = self.idle_of_other_kind(eni).take(slots).collect();
            slots -= cidrs.len();
            push_unassign(eni, cidrs, Reason::OtherKind, budget, self.input.now, out);
        }
    }

    fn idle_of_other_kind(&self, eni: &'a StoredEni) -> impl Iterator<Item = IpNet> {
        let mode = self.input.targets.mode;
        let fragmented = self.fragmented(eni);
        self.idle(eni).filter(move |cidr| mode.serves(*cidr) && !mode.wants(*cidr) && !fragmented)
    }

    /// Idle CIDRs of an ENI, the highest first, so that the low ones are kept and reused.
    fn idle(&self, eni: &'a StoredEni) -> impl Iterator<Item = IpNet> + use<'a> {
        let input = self.input;
        let idle = move |cidr: &IpNet| input.store.is_idle(*cidr, input.now);
        eni.cidrs.iter().rev().filter(|(_, leaving)| !**leaving).map(|(cidr, _)| *cidr).filter(idle)
    }

    fn shrink(&self, budget: &mut Memory, out: &mut Plan) {
        let now = self.input.now;
        if self.input.provisioning != Provisioning::On || self.demand.waiting > 0 || self.coming > 0 {
            return;
        }
        let mut actions = Plan::default();
        let mut tokens = budget.clone();
        let next_age = self.find_surplus(&mut tokens, &mut actions);
        // A pod's address that is on no ENI may be on one whose newest addresses we have not seen: none goes until EC2 has told.
        if actions.actions.iter().any(|action| matches!(action, Action::ReleaseEni { .. })) && self.input.store.has_homeless(self.card) {
            actions.actions.retain(|action| !matches!(action, Action::ReleaseEni { .. }));
        }
        if actions.actions.is_empty() {
            // What is being given back was a surplus; the rest of it need not wait again.
            if let Some(since) = self.input.memory.surplus_since.get(&self.card)
                && self.enis().any(|eni| self.busy(eni))
            {
                out.surplus_since.insert(self.card, *since);
            }
            // A spent budget may be all that holds it up.
            out.wake_at = [out.wake_at, actions.wake_at, next_age].into_iter().flatten().min();
            return;
        }
        let since = self.input.memory.surplus_since.get(&self.card).copied().unwrap_or(now);
        out.surplus_since.insert(self.card, since);
        if now.since(since) >= SHRINK_AFTER {
            *budget = tokens;
            out.actions.append(&mut actions.actions);
        }
        out.wake_at =
            [out.wake_at, actions.wake_at, next_age, Some(since + SHRINK_AFTER).filter(|at| *at > now)].into_iter().flatten().min();
    }

    /// What could go; returns when an ENI that is too young now will be old enough.
    fn find_surplus(&self, budget: &mut Memory, out: &mut Plan) -> Option<Time> {
        let now = self.input.now;
        let (floor_free, floor_total) = self.floor();
        let mut free = self.counted.free();
        let mut total = self.counted.total;
        let mut free_prefixes = u64::from(self.counted.free_prefixes);
        let mut next_age = self.leave_excluded(budget, out);
        let mut released = Vec::new();

        let mut candidates: Vec<_> = self.enis().filter(|eni| eni.role != EniRole::ExcludedSubnet && self.releasable(eni)).collect();
        candidates.sort_by_key(|eni| std::cmp::Reverse(eni.device_index));
        for eni in candidates {
            let mut gone = Stats::default();
            for cidr in eni.cidrs.keys().filter(|cidr| self.counts(eni, **cidr)) {
                gone += self.input.store.cidr_stats(*cidr, now);
            }
            let keeps = free.saturating_sub(gone.free()) >= floor_free && total.saturating_sub(gone.total) >= floor_total;
            if !keeps || free < gone.free() {
                continue;
            }
            let old_enough = eni.added + ENI_MIN_AGE;
            if old_enough > now {
                next_age = [next_age, Some(old_enough)].into_iter().flatten().min();
                continue;
            }
            if !afford(&[Ec2Action::DetachNetworkInterface, Ec2Action::DeleteNetworkInterface], budget, now, out) {
                break;
            }
            let reason = Reason::AboveTargets { over: clamp(free - floor_free) };
            free -= gone.free();
            total -= gone.total;
            free_prefixes -= u64::from(gone.free_prefixes);
            released.push(&eni.id);
            out.actions.push(Action::ReleaseEni { eni: eni.id.clone(), reason });
        }

        let mut enis: Vec<_> = self.serving().filter(|eni| !released.contains(&&eni.id) && !self.busy(eni)).collect();
        enis.sort_by_key(|eni| (eni.is_primary(), self.input.store.eni_stats(eni, now).assigned, std::cmp::Reverse(eni.device_index)));
        let by_cidr = self.ip_targets().is_some() || self.input.targets.mode == PoolMode::Prefixes;
        let mut over_prefixes = match self.ip_targets() {
            Some(_) => u64::MAX,
            None => free_prefixes.saturating_sub(u64::from(self.input.targets.warm_prefix)),
        };
        for eni in enis {
            let mut cidrs = Vec::new();
            let over = free.saturating_sub(floor_free).min(total.saturating_sub(floor_total));
            for cidr in self.idle(eni).filter(|cidr| by_cidr && self.counts(eni, *cidr)) {
                let size = addresses_of(cidr);
                if free.saturating_sub(size) < floor_free || total.saturating_sub(size) < floor_total || free < size || over_prefixes == 0 {
                    continue;
                }
                free -= size;
                total -= size;
                over_prefixes -= 1;
                cidrs.push(cidr);
            }
            push_unassign(eni, cidrs, Reason::AboveTargets { over: clamp(over) }, budget, now, out);
            push_unassign(eni, self.idle_of_other_kind(eni).collect(), Reason::OtherKind, budget, now, out);
        }
        next_age
    }

    /// ENIs of excluded subnets without pods go; one that cannot go (yet) gives its idle addresses back to the subnet. Returns when one that
    /// is too young now will be old enough.
    fn leave_excluded(&self, budget: &mut Memory, out: &mut Plan) -> Option<Time> {
        let now = self.input.now;
        let mut next_age = None;
        // As in [`Self::shrink`].
        let all_are_seen = !self.input.store.has_homeless(self.card);
        let excluded = |eni: &&StoredEni| eni.role == EniRole::ExcludedSubnet && eni.state == EniState::Serving && !self.busy(eni);
        for eni in self.enis().filter(excluded) {
            let old_enough = eni.added + ENI_MIN_AGE;
            if !self.releasable(eni) {
                push_unassign(eni, self.idle(eni).collect(), Reason::ExcludedSubnet, budget, now, out);
            } else if old_enough > now {
                next_age = [next_age, Some(old_enough)].into_iter().flatten().min();
            } else if all_are_seen && afford(&[Ec2Action::DetachNetworkInterface, Ec2Action::DeleteNetworkInterface], budget, now, out) {
                out.actions.push(Action::ReleaseEni { eni: eni.id.clone(), reason: Reason::ExcludedSubnet });
            }
        }
        next_age
    }

    /// Ours, empty, cool, and of a kind that can go.
    fn releasable(&self, eni: &StoredEni) -> bool {
        let now = self.input.now;
        !eni.is_primary()
            && eni.state == EniState::Serving
            && eni.kind == EniKind::Interface
            && matches!(eni.role, EniRole::Pods | EniRole::ExcludedSubnet)
            && !self.busy(eni)
            && eni.cidrs.iter().all(|(cidr, leaving)| !leaving && self.input.store.is_idle(*cidr, now))
    }

    /// One /80 on a card's first ENI holds more pods than any node; there is no pool to keep warm. Card 0's first is the primary ENI, which
    /// is always there; another card may have none yet.
    fn plan_ipv6(&self, budget: &mut Memory, out: &mut Plan) {
        let of_pods: Vec<_> = self.enis().filter(|eni| if self.card == 0 { eni.is_primary() } else { eni.role == EniRole::Pods }).collect();
        if self.attaching > 0 || of_pods.iter().any(|eni| eni.cidrs.keys().any(|cidr| matches!(cidr, IpNet::V6(_)))) {
            return;
        }
        let missing = Missing { short: 1, for_pods: 1, reason: Reason::NoIpv6Prefix, whole: false };
        let mut growth = Growth { left: 1, for_pods: 1, ..Growth::default() };
        match (of_pods.into_iter().min_by_key(|eni| eni.device_index), self.input.provisioning) {
            (Some(first), _) if !first.serves_pods() || self.busy(first) => return,
            // A cordoned node's DaemonSet pods need it too.
            (Some(first), Provisioning::On | Provisioning::Unschedulable) => {
                if let Some(request) = self.request(&first.subnet, 1, 0, &missing, &mut growth)
                    && growth.afford(&[Ec2Action::AssignIpv6Addresses], budget, self.input.now)
                {
                    growth.got(request);
                    let (eni, subnet) = (first.id.clone(), first.subnet.clone());
                    out.actions.push(Action::Assign { eni, subnet, request, reason: missing.reason });
                }
            }
            (None, _) if self.card == 0 => return,
            (None, Provisioning::On) => self.attach(&missing, &mut growth, budget, out),
            (_, state) => growth.blocked.push(Blocked::Provisioning(state)),
        }
        out.blocked.extend(growth.blocked.into_iter().map(|blocked| (self.card, blocked)));
        out.wake_at = [out.wake_at, growth.wake_at].into_iter().flatten().min();
    }
}

/// Growth that is being planned.
#[derive(Default)]
struct Growth {
    left: u64,
    for_pods: u64,
    /// Addresses that this plan asks for.
    got: u64,
    blocked: Vec<Blocked>,
    wake_at: Option<Time>,
}

impl Growth {
    fn got(&mut self, request: AddressRequest) {
        self.got += addresses_in(request);
        self.left = self.left.saturating_sub(addresses_in(request));
        self.for_pods = self.for_pods.saturating_sub(addresses_in(request));
    }

    fn closed(&mut self, subnet: &SubnetId, closed: &Closed) {
        let Closed { since, until, error, .. } = closed.clone();
        self.wake(until);
        let blocked = Blocked::ClosedSubnet { subnet: subnet.clone(), since, until, error };
        if !self.blocked.contains(&blocked) {
            self.blocked.push(blocked);
        }
    }

    fn wake(&mut self, at: Time) {
        self.wake_at = [self.wake_at, Some(at)].into_iter().flatten().min();
    }

    fn afford(&mut self, calls: &[Ec2Action], budget: &mut Memory, now: Time) -> bool {
        for action in calls {
            if let Err(until) = budget.may_call(*action, now) {
                self.wake(until);
                let error = budget.pause_reason(*action).map(str::to_owned);
                let blocked = Blocked::ActionPaused { action: *action, until, error };
                if !self.blocked.contains(&blocked) {
                    self.blocked.push(blocked);
                }
                return false;
            }
        }
        calls.iter().for_each(|action| budget.called(*action, now));
        true
    }
}

fn afford(calls: &[Ec2Action], budget: &mut Memory, now: Time, out: &mut Plan) -> bool {
    for action in calls {
        if let Err(until) = budget.may_call(*action, now) {
            out.wake_at = [out.wake_at, Some(until)].into_iter().flatten().min();
            return false;
        }
    }
    calls.iter().for_each(|action| budget.called(*action, now));
    true
}

fn push_unassign(eni: &StoredEni, cidrs: Vec<IpNet>, reason: Reason, budget: &mut Memory, now: Time, out: &mut Plan) {
    // One call takes addresses or prefixes, not both.
    let (singles, prefixes): (Vec<_>, Vec<_>) = cidrs.into_iter().partition(|cidr| cidr.prefix_len() == cidr.max_prefix_len());
    // One call at a time on an ENI: the other kind has its turn in the next plan.
    let Some(cidrs) = [singles, prefixes].into_iter().find(|cidrs| !cidrs.is_empty()) else { return };
    if out.actions.iter().any(|action| action.eni() == Some(&eni.id)) {
        return;
    }
    if afford(&[Ec2Action::UnassignPrivateIpAddresses], budget, now, out) {
        out.actions.push(Action::Unassign { eni: eni.id.clone(), cidrs, reason });
    }
}

/// Addresses that a request brings.
pub fn addresses_in(request: AddressRequest) -> u64 {
    match request {
        AddressRequest::Ipv4(count) => u64::from(count),
        AddressRequest::Ipv4Prefixes(count) => u64::from(count) * u64::from(PREFIX_ADDRESSES),
        AddressRequest::Ipv6Prefixes(count) => u64::from(count) << 48,
    }
}

fn clamp(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
