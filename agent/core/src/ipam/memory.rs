//! What the planner remembers of EC2's answers: subnets without addresses, and how often each action may be called.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::types::Time;
use crate::cloud::{AddressRequest, Ec2Action, Ec2Error};
use crate::ids::SubnetId;

/// First pause after a subnet refused even one address; doubles with each further refusal.
const FIRST_SUBNET_PAUSE: Duration = Duration::from_secs(10);
/// Longest: addresses come back when other nodes shrink, which takes minutes.
const LONGEST_SUBNET_PAUSE: Duration = Duration::from_secs(600);
/// First pause of an action that failed for no reason that we know; doubles.
const FIRST_ACTION_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause of a failing action.
const LONGEST_ACTION_PAUSE: Duration = Duration::from_secs(60);
/// Longest pause of a throttled one: a fleet's nodes must ask often enough to use what its account gives when few of them are
/// left, and 15 s of each of 5,000 is a tenth of what aws-node's tries are.
const LONGEST_THROTTLE_PAUSE: Duration = Duration::from_secs(15);
/// Calls that may follow each other at once. EC2's buckets hold 100 to 200 mutating calls for a whole account; a node that
/// starts needs about one for each ENI.
const BURST: f64 = 8.0;
/// Calls a second after the burst, until EC2 throttles.
const FULL_RATE: f64 = 2.0;
/// The lowest rate that throttling brings us to: one call in 10 s.
const LOWEST_RATE: f64 = 0.1;
/// What a success adds to the rate, so that a storm's end is found in about a dozen calls.
const RATE_STEP: f64 = 0.15;

/// What a subnet can be short of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressKind {
    /// Single IPv4 addresses.
    Addresses,
    /// /28 prefixes: sixteen free addresses in a row.
    Prefixes,
    /// /80 prefixes.
    Ipv6,
}

impl AddressKind {
    /// The kind and number that a request asks for.
    pub fn of(request: AddressRequest) -> (Self, u16) {
        match request {
            AddressRequest::Ipv4(count) => (Self::Addresses, count),
            AddressRequest::Ipv4Prefixes(count) => (Self::Prefixes, count),
            AddressRequest::Ipv6Prefixes(count) => (Self::Ipv6, count),
        }
    }

    /// The request for that many.
    pub fn request(self, count: u16) -> AddressRequest {
        match self {
            Self::Addresses => AddressRequest::Ipv4(count),
            Self::Prefixes => AddressRequest::Ipv4Prefixes(count),
            Self::Ipv6 => AddressRequest::Ipv6Prefixes(count),
        }
    }

    /// As in snapshots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Addresses => "addresses",
            Self::Prefixes => "prefixes",
            Self::Ipv6 => "ipv6",
        }
    }
}

/// A subnet that refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// First refusal of the row.
    pub since: Time,
    /// Not asked again before; the last refusal where it was not of a single one.
    pub until: Time,
    /// The most to ask for in one call: halves with each refusal, doubles with each success.
    pub at_most: u16,
    /// Nothing was given since the last refusal.
    pub unmet: bool,
    /// Refusals of a single one in a row.
    pub refusals: u32,
    /// EC2's words.
    pub error: String,
}

impl Shortage {
    /// Nobody has asked for so long after the pause that it tells nothing of the subnet any more.
    fn is_over(&self, now: Time) -> bool {
        now.since(self.until) > LONGEST_SUBNET_PAUSE
    }
}

/// A subnet that takes no new ENI, though not for want of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Closed {
    /// First refusal of the row.
    pub since: Time,
    /// Not asked again before.
    pub until: Time,
    /// Refusals in a row.
    pub refusals: u32,
    /// EC2's words.
    pub error: String,
}

/// How often an action may be called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    tokens: f64,
    rate: f64,
    updated: Time,
    /// The last call.
    called: Option<Time>,
    paused_until: Time,
    failures: u32,
    /// The failure behind the pause, if any.
    pub error: Option<String>,
}

impl Budget {
    fn new(now: Time) -> Self {
        Self { tokens: BURST, rate: FULL_RATE, updated: now, called: None, paused_until: Time(0), failures: 0, error: None }
    }

    fn tokens_at(&self, now: Time) -> f64 {
        (self.tokens + now.since(self.updated).as_secs_f64() * self.rate).min(BURST)
    }

    fn ready_at(&self, now: Time) -> Time {
        let missing = 1.0 - self.tokens_at(now);
        let refill = if missing <= 0.0 { now } else { now + Duration::from_secs_f64(missing / self.rate) + Duration::from_millis(1) };
        refill.max(self.paused_until)
    }
}

/// The planner's memory; the actor feeds it with every answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    shortages: BTreeMap<(SubnetId, AddressKind), Shortage>,
    closed: BTreeMap<SubnetId, Closed>,
    budgets: BTreeMap<Ec2Action, Budget>,
    /// Since when each card has more than its targets, without interruption.
    pub surplus_since: BTreeMap<u16, Time>,
    jitter: u64,
}

impl Memory {
    /// `seed` (from the instance id) spreads the pauses of a fleet.
    pub fn new(seed: u64) -> Self {
        Self { jitter: seed, ..Self::default() }
    }

    /// Subnets that refused lately and have given nothing since.
    pub fn shortages(&self, now: Time) -> impl Iterator<Item = (&(SubnetId, AddressKind), &Shortage)> {
        self.shortages.iter().filter(move |(_, shortage)| shortage.until > now || (shortage.unmet && !shortage.is_over(now)))
    }

    /// The shortage of a subnet, paused or not.
    pub fn shortage(&self, subnet: &SubnetId, kind: AddressKind, now: Time) -> Option<&Shortage> {
        self.shortages.get(&(subnet.clone(), kind)).filter(|shortage| !shortage.is_over(now))
    }

    /// How many of `wanted` a subnet may be asked for now; `Err` is when to ask again.
    pub fn allowance(&self, subnet: &SubnetId, kind: AddressKind, wanted: u16, now: Time) -> Result<u16, Time> {
        match self.shortage(subnet, kind, now) {
            Some(shortage) if shortage.until > now => Err(shortage.until),
            Some(shortage) => Ok(wanted.min(shortage.at_most)),
            None => Ok(wanted),
        }
    }

    /// Why a subnet is not asked for a new ENI now, if it is not.
    pub fn closed(&self, subnet: &SubnetId, now: Time) -> Option<&Closed> {
        self.closed.get(subnet).filter(|closed| closed.until > now)
    }

    /// Whether an action may be called now; `Err` is when.
    pub fn may_call(&self, action: Ec2Action, now: Time) -> Result<(), Time> {
        match self.budgets.get(&action).map(|budget| budget.ready_at(now)) {
            Some(at) if at > now => Err(at),
            _ => Ok(()),
        }
    }

    /// Why an action is paused, if it failed.
    pub fn pause_reason(&self, action: Ec2Action) -> Option<&str> {
        self.budgets.get(&action)?.error.as_deref()
    }

    /// Takes a token; the caller asked [`Self::may_call`].
    pub fn called(&mut self, action: Ec2Action, now: Time) {
        let budget = self.budgets.entry(action).or_insert_with(|| Budget::new(now));
        budget.tokens = budget.tokens_at(now) - 1.0;
        budget.updated = now;
        budget.called = Some(now);
    }

    /// When one of these was last called.
    pub fn last_call(&self, actions: &[Ec2Action]) -> Option<Time> {
        actions.iter().filter_map(|action| self.budgets.get(action)?.called).max()
    }

    /// Pauses an action after an unlucky number of tries elsewhere (a shortage has its own memory).
    fn pause(&mut self, action: Ec2Action, longest: Duration, error: String, now: Time) {
        let jitter = self.next_jitter();
        let budget = self.budgets.entry(action).or_insert_with(|| Budget::new(now));
        let pause = doubled(FIRST_ACTION_PAUSE, budget.failures, longest);
        budget.failures = budget.failures.saturating_add(1);
        budget.paused_until = now + stretched(pause, jitter);
        budget.error = Some(error);
    }

    /// EC2 did it: the action's rate grows, its pauses end.
    pub fn succeeded(&mut self, action: Ec2Action, now: Time) {
        let Some(budget) = self.budgets.get_mut(&action) else { return };
        budget.tokens = budget.tokens_at(now);
        budget.updated = now;
        budget.rate = (budget.rate + RATE_STEP).min(FULL_RATE);
        budget.failures = 0;
        budget.paused_until = Time(0);
        budget.error = None;
    }

    /// EC2 gave what was asked of a subnet.
    pub fn subnet_gave(&mut self, subnet: &SubnetId, request: AddressRequest) {
        let (kind, count) = AddressKind::of(request);
        let key = (subnet.clone(), kind);
        if let Some(shortage) = self.shortages.get_mut(&key) {
            // Less than it may be asked for: nobody wanted more.
            let in_full = count < shortage.at_most;
            shortage.refusals = 0;
            shortage.unmet = false;
            shortage.at_most = shortage.at_most.max(count).saturating_mul(2);
            if in_full || shortage.at_most >= 64 {
                self.shortages.remove(&key);
            }
        }
    }

    /// EC2 made an ENI in a subnet.
    pub fn subnet_took_eni(&mut self, subnet: &SubnetId) {
        self.closed.remove(subnet);
    }

    /// EC2 did not do it. `asked` is what was asked of which subnet, for the actions that ask one.
    pub fn failed(&mut self, error: &Ec2Error, asked: Option<(&SubnetId, AddressRequest)>, now: Time) {
        if let Some((subnet, _)) = asked.filter(|_| error.refuses_subnet()) {
            return self.subnet_closed(subnet, error.to_string(), now);
        }
        match error {
            Ec2Error::Throttled { action, .. } => {
                self.pause(*action, LONGEST_THROTTLE_PAUSE, error.to_string(), now);
                if let Some(budget) = self.budgets.get_mut(action) {
                    budget.rate = (budget.rate / 2.0).max(LOWEST_RATE);
                    budget.tokens = 0.0;
                    budget.updated = now;
                }
            }
            Ec2Error::InsufficientAddresses { action, .. } => match asked {
                Some((subnet, request)) => self.subnet_refused(subnet, request, error.to_string(), now),
                None => self.pause(*action, LONGEST_ACTION_PAUSE, error.to_string(), now),
            },
            // The picture is stale; reading it anew is the cure, not waiting. A short pause keeps a lie from spinning.
            Ec2Error::AddressLimit { action, .. }
            | Ec2Error::AttachmentConflict { action, .. }
            | Ec2Error::NotFound { action, .. }
            | Ec2Error::Unauthorized { action, .. }
            | Ec2Error::NoReply { action, .. }
            | Ec2Error::Other { action, .. } => self.pause(*action, LONGEST_ACTION_PAUSE, error.to_string(), now),
        }
    }

    fn subnet_refused(&mut self, subnet: &SubnetId, request: AddressRequest, error: String, now: Time) {
        let (kind, count) = AddressKind::of(request);
        let jitter = self.next_jitter();
        self.shortages.retain(|_, shortage| !shortage.is_over(now));
        let shortage = self.shortages.entry((subnet.clone(), kind)).or_insert_with(|| Shortage {
            since: now,
            until: now,
            at_most: count,
            unmet: true,
            refusals: 0,
            error: String::new(),
        });
        shortage.error = error;
        shortage.unmet = true;
        shortage.until = shortage.until.max(now);
        shortage.at_most = (count / 2).max(1);
        if count <= 1 {
            let pause = doubled(FIRST_SUBNET_PAUSE, shortage.refusals, LONGEST_SUBNET_PAUSE);
            shortage.until = now + stretched(pause, jitter);
            shortage.refusals = shortage.refusals.saturating_add(1);
        }
    }

    fn subnet_closed(&mut self, subnet: &SubnetId, error: String, now: Time) {
        let jitter = self.next_jitter();
        let closed =
            self.closed.entry(subnet.clone()).or_insert_with(|| Closed { since: now, until: now, refusals: 0, error: String::new() });
        closed.error = error;
        closed.until = now + stretched(doubled(FIRST_ACTION_PAUSE, closed.refusals, LONGEST_ACTION_PAUSE), jitter);
        closed.refusals = closed.refusals.saturating_add(1);
    }

    /// When the earliest pause ends.
    pub fn next_pause_end(&self, now: Time) -> Option<Time> {
        let subnets = self.shortages.values().map(|shortage| shortage.until);
        let closed = self.closed.values().map(|closed| closed.until);
        let actions = self.budgets.values().map(|budget| budget.paused_until);
        subnets.chain(closed).chain(actions).filter(|until| *until > now).min()
    }

    /// A number in 0..1 (splitmix64).
    fn next_jitter(&mut self) -> f64 {
        self.jitter = self.jitter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.jitter;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        f64::from(u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }
}

fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1 << times.min(16)).min(longest)
}

/// Up to a quarter longer.
fn stretched(pause: Duration, jitter: f64) -> Duration {
    pause.mul_f64(1.0 + jitter / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTION: Ec2Action = Ec2Action::AssignPrivateIpAddresses;

    fn insufficient() -> Ec2Error {
        Ec2Error::InsufficientAddresses { action: ACTION, code: "InsufficientFreeAddressesInSubnet".to_owned(), message: "no".to_owned() }
    }

    #[test]
    fn a_refusing_subnet_is_asked_for_half_and_then_paused_longer_each_time() {
        let subnet = SubnetId::from("subnet-1");
        let mut memory = Memory::new(1);
        let mut now = Time(0);
        for (asked, next) in [(9u16, 4u16), (4, 2), (2, 1)] {
            memory.failed(&insufficient(), Some((&subnet, AddressRequest::Ipv4(asked))), now);
            assert_eq!(memory.allowance(&subnet, AddressKind::Addresses, 9, now), Ok(next));
        }
        let mut last = Duration::ZERO;
        for _ in 0..10 {
            memory.failed(&insufficient(), Some((&subnet, AddressRequest::Ipv4(1))), now);
            let until = memory.allowance(&subnet, AddressKind::Addresses, 9, now).expect_err("paused");
            assert!(until.since(now) <= LONGEST_SUBNET_PAUSE.mul_f64(1.25));
            assert!(until.since(now) >= last.mul_f64(0.8));
            last = until.since(now);
            now = until;
        }
        assert!(last >= LONGEST_SUBNET_PAUSE);
        assert_eq!(memory.allowance(&subnet, AddressKind::Prefixes, 9, now), Ok(9), "another kind is not concerned");
        assert_eq!(memory.allowance(&SubnetId::from("subnet-2"), AddressKind::Addresses, 9, now), Ok(9));
        memory.subnet_gave(&subnet, AddressRequest::Ipv4(1));
        assert_eq!(memory.shortages(now).count(), 0, "it has given what was asked");
        assert_eq!(memory.allowance(&subnet, AddressKind::Addresses, 9, now), Ok(2), "and may not have much more");
        memory.subnet_gave(&subnet, AddressRequest::Ipv4(1));
        assert_eq!(memory.allowance(&subnet, AddressKind::Addresses, 9, now), Ok(9), "nobody wanted a second one");
    }

    /// Pods that wanted more are gone, and nobody asks.
    #[test]
    fn a_shortage_is_forgotten_when_nobody_asked_for_long_after_its_pause() {
        let subnet = SubnetId::from("subnet-1");
        let mut memory = Memory::new(1);
        for count in [4, 1] {
            memory.failed(&insufficient(), Some((&subnet, AddressRequest::Ipv4Prefixes(count))), Time(0));
            let until = memory.shortage(&subnet, AddressKind::Prefixes, Time(0)).expect("short").until;
            let last = until + LONGEST_SUBNET_PAUSE;
            for (now, told) in [(Time(0), 1), (until, 1), (last, 1), (last + Duration::from_secs(1), 0)] {
                assert_eq!(memory.shortages(now).count(), told, "{count} at {now}");
                assert_eq!(memory.shortage(&subnet, AddressKind::Prefixes, now).is_some(), told > 0, "{count} at {now}");
            }
            let later = last + Duration::from_secs(1);
            memory.failed(&insufficient(), Some((&subnet, AddressRequest::Ipv4Prefixes(2))), later);
            let anew = memory.shortage(&subnet, AddressKind::Prefixes, later).expect("short");
            assert_eq!((anew.since, anew.refusals), (later, 0), "another shortage");
            memory = Memory::new(1);
        }
    }

    #[test]
    fn a_subnet_that_takes_no_eni_is_closed_for_longer_each_time_and_holds_up_no_other() {
        let (gone, other) = (SubnetId::from("subnet-1"), SubnetId::from("subnet-2"));
        let (action, code, message) = (Ec2Action::CreateNetworkInterface, "InvalidSubnetID.NotFound".to_owned(), "no".to_owned());
        let refused = Ec2Error::NotFound { action, code, message };
        let asked = Some((&gone, AddressRequest::Ipv4(1)));
        let mut memory = Memory::new(3);
        let mut now = Time(0);
        let mut last = Duration::ZERO;
        for _ in 0..10 {
            memory.failed(&refused, asked, now);
            let until = memory.closed(&gone, now).expect("closed").until;
            assert!(until.since(now) >= last.mul_f64(0.8) && until.since(now) <= LONGEST_ACTION_PAUSE.mul_f64(1.25));
            assert_eq!(memory.next_pause_end(now), Some(until));
            last = until.since(now);
            now = until;
        }
        assert!(last >= LONGEST_ACTION_PAUSE && memory.closed(&gone, now).is_none());
        memory.failed(&refused, asked, now);
        assert_eq!((memory.closed(&other, now), memory.may_call(action, now)), (None, Ok(())));
        assert_eq!(memory.allowance(&gone, AddressKind::Addresses, 9, now), Ok(9), "ENIs that are there get addresses");
        memory.subnet_took_eni(&gone);
        assert_eq!(memory.closed(&gone, now), None);
        // What says nothing of the subnet pauses the action.
        let (code, message) = ("InternalError".to_owned(), "no".to_owned());
        memory.failed(&Ec2Error::Other { action, code, message }, asked, now);
        assert!(memory.closed(&gone, now).is_none() && memory.may_call(action, now).is_err());
    }

    #[test]
    fn throttling_halves_the_rate_and_success_restores_it() {
        let mut memory = Memory::new(7);
        let mut now = Time(1_000);
        let throttled = Ec2Error::Throttled { action: ACTION, code: "RequestLimitExceeded".to_owned() };
        for _ in 0..8 {
            assert_eq!(memory.may_call(ACTION, now), Ok(()));
            memory.called(ACTION, now);
        }
        assert!(memory.may_call(ACTION, now).is_err(), "the burst is spent");
        for _ in 0..10 {
            memory.failed(&throttled, None, now);
            now = memory.may_call(ACTION, now).expect_err("paused");
            assert_eq!(memory.may_call(ACTION, now), Ok(()), "the time that is named is enough");
            memory.called(ACTION, now);
        }
        for _ in 0..20 {
            memory.succeeded(ACTION, now);
        }
        now = now + Duration::from_secs(1);
        assert_eq!(memory.may_call(ACTION, now), Ok(()));
        assert_eq!(memory.may_call(Ec2Action::CreateNetworkInterface, now), Ok(()), "other actions have their own budget");
    }
}
