//! The datastore: ENIs, the CIDRs on them, and who holds which address.
//!
//! Ownership is kept by address and not inside the CIDRs: an allocation and a cool-down outlive the disappearance of their
//! CIDR (a stale IMDS, a detach by hand), so that the address cannot be given to a second pod when it comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::types::{IpamKey, Time};
use crate::cloud::EniKind;
use crate::ids::{AttachmentId, EniId, Mac, PodName, SecurityGroupId, SubnetId};
use crate::limits::PREFIX_ADDRESSES;

/// What pods get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolMode {
    /// Single secondary IPv4 addresses.
    #[default]
    SecondaryIps,
    /// /28 prefixes, and single addresses where a subnet has no /28 left.
    Prefixes,
    /// One /80 on the first ENI of each managed card.
    Ipv6Prefixes,
}

impl PoolMode {
    /// As in snapshots and documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::SecondaryIps => "secondary-ips",
            Self::Prefixes => "prefixes",
            Self::Ipv6Prefixes => "ipv6-prefixes",
        }
    }

    /// The CIDR is of the kind that this mode asks for.
    pub fn wants(self, cidr: IpNet) -> bool {
        match self {
            Self::SecondaryIps => matches!(cidr, IpNet::V4(net) if net.prefix_len() == 32),
            Self::Prefixes => matches!(cidr, IpNet::V4(net) if net.prefix_len() == 28),
            Self::Ipv6Prefixes => matches!(cidr, IpNet::V6(_)),
        }
    }

    /// The CIDR's family is the one that pods get.
    pub fn serves(self, cidr: IpNet) -> bool {
        matches!((self, cidr), (Self::Ipv6Prefixes, IpNet::V6(_)) | (Self::SecondaryIps | Self::Prefixes, IpNet::V4(_)))
    }
}

/// Whether pods get addresses from an ENI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EniRole {
    /// They do.
    Pods,
    /// The primary ENI under custom networking.
    PrimaryOfCustomNetworking,
    /// Its subnet is tagged `kubernetes.io/role/cni=0`.
    ExcludedSubnet,
    /// Carries branch ENIs.
    Trunk,
    /// Has no IP addresses.
    EfaOnly,
    /// Tagged `no_manage`, or not ours under MANAGE_UNTAGGED_ENI=false: counted, never touched.
    Unmanaged,
    /// EC2 has not told yet whether it is ours: counted, not touched before it does.
    Unconfirmed,
    /// On a network card that is not managed (ENABLE_MULTI_NIC is off).
    OtherCard,
}

/// Where an attached ENI is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EniState {
    /// Its interface or its routes are not ready: it gives out nothing yet, and what it will give is on its way.
    Joining,
    /// Gives out addresses, if its role says so.
    #[default]
    Serving,
    /// Being detached: gives out nothing any more.
    Releasing,
}

/// An attached ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEni {
    /// Id.
    pub id: EniId,
    /// Ethernet address.
    pub mac: Mac,
    /// 0 on the first card is the primary ENI, wherever EC2 has attached it.
    pub device_index: u16,
    /// Card.
    pub network_card: u16,
    /// The device index that EC2 knows it by, which no other may have.
    pub attached_at: u16,
    /// Where it lives.
    pub subnet: SubnetId,
    /// The subnet's IPv4 range, for the gateway.
    pub subnet_cidr: Option<Ipv4Net>,
    /// The subnet's IPv6 ranges.
    pub subnet_ipv6_cidrs: Vec<Ipv6Net>,
    /// Its own address; never a pod's.
    pub primary_ipv4: Option<Ipv4Addr>,
    /// Type.
    pub kind: EniKind,
    /// Needed to detach; unknown until EC2 was asked.
    pub attachment: Option<AttachmentId>,
    /// Security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// Whether pods get addresses from it.
    pub role: EniRole,
    /// Since when it is here; a young ENI is not released.
    pub added: Time,
    /// Slots for addresses or prefixes besides its own address.
    pub slots: u16,
    /// The routing table; 254 is main.
    pub route_table: u32,
    /// Where it is in its life.
    pub state: EniState,
    /// What is on it; `true` while EC2 is being asked to take it away.
    pub cidrs: BTreeMap<IpNet, bool>,
}

impl StoredEni {
    /// The instance's first ENI; it cannot be released.
    pub fn is_primary(&self) -> bool {
        self.device_index == 0 && self.network_card == 0
    }

    /// Neither the length of its own address nor its gateway is known: nothing of it can be planned. The primary ENI's are the operating
    /// system's matter.
    pub fn lacks_range(&self) -> bool {
        !self.is_primary() && self.primary_ipv4.is_some() && self.subnet_cidr.is_none()
    }

    /// Gives out addresses.
    pub fn serves_pods(&self) -> bool {
        self.role == EniRole::Pods && self.state == EniState::Serving
    }

    /// Slots that nothing is on; addresses and prefixes share them.
    pub fn room(&self) -> u16 {
        self.slots.saturating_sub(u16::try_from(self.cidrs.len()).unwrap_or(u16::MAX))
    }
}

/// The state of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressState<'a> {
    /// May be given out.
    Free,
    /// Held.
    Assigned(&'a IpamKey),
    /// Released, not given out before `until`.
    Cooling {
        /// The end of the cool-down.
        until: Time,
    },
}

/// What an attachment holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Who.
    pub pod: PodName,
    /// Nanoseconds since 1970, as the checkpoint stores it.
    pub since_ns: i64,
    /// One address a card, in card order.
    pub held: Vec<Held>,
}

/// An address that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Held {
    /// The card in whose pool it was.
    pub network_card: u16,
    /// The address.
    pub address: IpAddr,
}

/// Sums over the CIDRs that serve pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Addresses.
    pub total: u64,
    /// Held.
    pub assigned: u64,
    /// Cooling down.
    pub cooling: u64,
    /// /28 prefixes.
    pub prefixes: u32,
    /// /28 prefixes without a held or cooling address.
    pub free_prefixes: u32,
}

impl Stats {
    /// total - assigned - cooling.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.assigned + self.cooling)
    }
}

impl std::ops::AddAssign for Stats {
    fn add_assign(&mut self, rhs: Self) {
        self.total += rhs.total;
        self.assigned += rhs.assigned;
        self.cooling += rhs.cooling;
        self.prefixes += rhs.prefixes;
        self.free_prefixes += rhs.free_prefixes;
    }
}

/// ENIs, CIDRs, owners and cool-downs of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datastore {
    mode: PoolMode,
    cooldown: Duration,
    enis: BTreeMap<EniId, StoredEni>,
    allocations: BTreeMap<IpamKey, Allocation>,
    owners: BTreeMap<IpAddr, IpamKey>,
    /// Addresses that serve nobody for a while; kept after that has passed, so that the longest-free is reused first.
    resting: BTreeMap<IpAddr, Rest>,
    /// Ranges that EC2 gave to an ENI soon after another one lost them, and how long a picture may be older than that.
    moved: BTreeMap<IpNet, (EniId, Time)>,
}

/// How long an address is not given out, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Not given out before.
    pub until: Time,
    /// It goes back to EC2, and a picture may be older than that; else a pod released it, and others' tables may still name the pod.
    pub going: bool,
}

/// Expired cool-downs that are remembered for the order of reuse. A /80 has 2^48 addresses: forgetting the oldest costs
/// nothing but that order.
const REMEMBERED_RELEASES: usize = 4096;

impl Datastore {
    /// An empty store; `cooldown` is IP_COOLDOWN_PERIOD.
    pub fn new(mode: PoolMode, cooldown: Duration) -> Self {
        Self { mode, cooldown, ..Self::default() }
    }

    /// What pods get.
    pub fn mode(&self) -> PoolMode {
        self.mode
    }

    /// ENIs by id.
    pub fn enis(&self) -> &BTreeMap<EniId, StoredEni> {
        &self.enis
    }

    /// An ENI to change.
    pub fn eni_mut(&mut self, id: &EniId) -> Option<&mut StoredEni> {
        self.enis.get_mut(id)
    }

    /// What is held.
    pub fn allocations(&self) -> &BTreeMap<IpamKey, Allocation> {
        &self.allocations
    }

    /// Addresses whose cool-down has not ended.
    pub fn cooling(&self, now: Time) -> impl Iterator<Item = (IpAddr, Rest)> + '_ {
        self.resting.iter().filter(move |(_, rest)| rest.until > now).map(|(address, rest)| (*address, *rest))
    }

    /// When the next cool-down ends.
    pub fn next_cooling_end(&self, now: Time) -> Option<Time> {
        self.cooling(now).map(|(_, rest)| rest.until).min()
    }

    /// The state of an address, whether or not an ENI has it.
    pub fn state(&self, address: IpAddr, now: Time) -> AddressState<'_> {
        if let Some(key) = self.owners.get(&address) {
            return AddressState::Assigned(key);
        }
        match self.resting.get(&address) {
            Some(rest) if rest.until > now => AddressState::Cooling { until: rest.until },
            _ => AddressState::Free,
        }
    }

    /// The ENI on which an address is: by itself or in a prefix of the one length that EC2 delegates (/28, /80). Asked for each address
    /// of the node after every change, so not by looking through all of them.
    pub fn eni_of(&self, address: IpAddr) -> Option<&StoredEni> {
        let lengths = if address.is_ipv4() { [32, 28] } else { [128, 80] };
        let cidrs = lengths.map(|length| IpNet::new_assert(address, length).trunc());
        self.enis.values().find(|eni| cidrs.iter().any(|cidr| eni.cidrs.contains_key(cidr)))
    }

    /// ENIs of these subnets serve no new pods; those of others do again.
    pub fn set_excluded(&mut self, subnets: &BTreeSet<SubnetId>) {
        for eni in self.enis.values_mut() {
            eni.role = match (eni.role, subnets.contains(&eni.subnet)) {
                (EniRole::Pods, true) => EniRole::ExcludedSubnet,
                (EniRole::ExcludedSubnet, false) => EniRole::Pods,
                (role, _) => role,
            };
        }
    }

    /// Whether a pod holds an address of this card that is on no ENI that we know.
    pub fn has_homeless(&self, network_card: u16) -> bool {
        let mut held = self.allocations.values().flat_map(|allocation| &allocation.held).filter(|held| held.network_card == network_card);
        held.any(|held| self.eni_of(held.address).is_none())
    }

    /// Adds an ENI or replaces what is known of it; its CIDRs are those given.
    pub fn put_eni(&mut self, eni: StoredEni) {
        self.enis.insert(eni.id.clone(), eni);
    }

    /// Forgets an ENI. What pods hold on it stays held.
    pub fn remove_eni(&mut self, id: &EniId) -> Option<StoredEni> {
        self.enis.remove(id)
    }

    /// Adds CIDRs to an ENI; those that are there stay as they are. Returns whether the ENI is known.
    pub fn add_cidrs(&mut self, id: &EniId, cidrs: impl IntoIterator<Item = IpNet>) -> bool {
        let Some(eni) = self.enis.get_mut(id) else { return false };
        for cidr in cidrs {
            eni.cidrs.entry(cidr).or_insert(false);
        }
        true
    }

    /// The range has just gone back to EC2, as [`Self::cool`] was told: who still sees it looks at an old picture. A pod's
    /// cool-down does not count.
    pub fn is_going(&self, cidr: IpNet, now: Time) -> bool {
        let going = |address| self.resting.get(&address).is_some_and(|rest| rest.going && rest.until > now);
        addresses_of(cidr) <= u64::from(PREFIX_ADDRESSES)
            && addresses(cidr).all(|address| !self.owners.contains_key(&address) && going(address))
    }

    /// EC2 has just given the range to an ENI (again): it is on no other one, whatever we thought of a call without a reply, and
    /// what kept it from being given out is over. A pod's own cool-down goes on: the ENI may have been taken away under it. True: the
    /// range had just left one, which must be on disk before it is given out, as an old picture may still show it there.
    pub fn granted(&mut self, id: &EniId, cidr: IpNet, now: Time) -> bool {
        for eni in self.enis.values_mut().filter(|eni| eni.id != *id) {
            eni.cidrs.remove(&cidr);
        }
        let mut left = None;
        for (_, rest) in self.resting.range_mut(cidr.network()..=cidr.broadcast()) {
            left = left.max(Some(rest.until).filter(|until| *until > now));
            if rest.going {
                *rest = Rest { until: now.min(rest.until), going: false };
            }
        }
        if let Some(until) = left {
            self.moved.insert(cidr, (id.clone(), until));
        }
        left.is_some()
    }

    /// Another ENI has the range by what we know, and is not giving it back; or it came to another one so lately that who sees it
    /// here looks at an old picture.
    pub fn is_elsewhere(&self, id: &EniId, cidr: IpNet, now: Time) -> bool {
        self.enis.values().any(|eni| eni.id != *id && eni.cidrs.get(&cidr) == Some(&false))
            || self.moved.get(&cidr).is_some_and(|(eni, until)| eni != id && *until > now)
    }

    /// Ranges that came to an ENI lately, and until when a picture may be older than that.
    pub fn moved(&self, now: Time) -> impl Iterator<Item = (IpNet, &EniId, Time)> + '_ {
        self.moved.iter().filter(move |(_, (_, until))| *until > now).map(|(cidr, (eni, until))| (*cidr, eni, *until))
    }

    /// Records such a range (second checkpoint file).
    pub fn restore_moved(&mut self, cidr: IpNet, eni: EniId, until: Time) {
        self.moved.insert(cidr, (eni, until));
    }

    /// Takes a CIDR off an ENI; what pods hold in it stays held.
    pub fn remove_cidr(&mut self, id: &EniId, cidr: IpNet) {
        if let Some(eni) = self.enis.get_mut(id) {
            eni.cidrs.remove(&cidr);
        }
    }

    /// Marks a CIDR as leaving (nothing is given out of it) or as staying.
    pub fn set_leaving(&mut self, id: &EniId, cidr: IpNet, leaving: bool) {
        if let Some(flag) = self.enis.get_mut(id).and_then(|eni| eni.cidrs.get_mut(&cidr)) {
            *flag = leaving;
        }
    }

    /// Addresses held in a range.
    pub fn assigned_in(&self, cidr: IpNet) -> u64 {
        self.owners.range(cidr.network()..=cidr.broadcast()).count() as u64
    }

    /// Addresses cooling in a range.
    pub fn cooling_in(&self, cidr: IpNet, now: Time) -> u64 {
        self.resting.range(cidr.network()..=cidr.broadcast()).filter(|(_, rest)| rest.until > now).count() as u64
    }

    /// Nothing in the range is held or cooling.
    pub fn is_idle(&self, cidr: IpNet, now: Time) -> bool {
        self.assigned_in(cidr) == 0 && self.cooling_in(cidr, now) == 0
    }

    /// Sums of one ENI's CIDRs, those that are leaving left out.
    pub fn eni_stats(&self, eni: &StoredEni, now: Time) -> Stats {
        let mut sum = Stats::default();
        for (cidr, leaving) in &eni.cidrs {
            if !leaving && self.mode.serves(*cidr) {
                sum += self.cidr_stats(*cidr, now);
            }
        }
        sum
    }

    /// Numbers of one CIDR.
    pub fn cidr_stats(&self, cidr: IpNet, now: Time) -> Stats {
        let assigned = self.assigned_in(cidr);
        let cooling = self.cooling_in(cidr, now);
        let prefix = matches!(cidr, IpNet::V4(net) if net.prefix_len() == 28);
        Stats {
            total: addresses_of(cidr),
            assigned,
            cooling,
            prefixes: u32::from(prefix),
            free_prefixes: u32::from(prefix && assigned + cooling == 0),
        }
    }

    /// Sums of a card's ENIs that serve pods.
    pub fn stats(&self, network_card: u16, now: Time) -> Stats {
        let mut sum = Stats::default();
        for eni in self.enis.values().filter(|eni| eni.network_card == network_card && eni.serves_pods()) {
            sum += self.eni_stats(eni, now);
        }
        sum
    }

    /// Gives the attachment one address of each card in `cards`, or nothing at all; an attachment that holds some keeps
    /// exactly those. `None` when a card has no free address.
    pub fn assign(&mut self, key: &IpamKey, pod: &PodName, cards: &[u16], now: Time) -> Option<&Allocation> {
        if !self.allocations.contains_key(key) {
            let held = cards
                .iter()
                .map(|card| self.pick(*card, now).map(|address| Held { network_card: *card, address }))
                .collect::<Option<Vec<_>>>()?;
            let since_ns = i64::try_from(now.0).unwrap_or(i64::MAX).saturating_mul(1_000_000);
            self.hold(key.clone(), Allocation { pod: pod.clone(), since_ns, held });
        }
        self.allocations.get(key)
    }

    /// Records what an attachment holds already (checkpoint). Refused, naming the other holder, when one of the addresses
    /// is held by another attachment.
    pub fn restore(&mut self, key: IpamKey, allocation: Allocation) -> Result<(), IpamKey> {
        let taken = allocation.held.iter().find_map(|held| self.owners.get(&held.address).filter(|owner| **owner != key).cloned());
        if let Some(owner) = taken {
            return Err(owner);
        }
        match self.allocations.get_mut(&key) {
            Some(existing) => {
                for held in allocation.held {
                    self.resting.remove(&held.address);
                    self.owners.insert(held.address, key.clone());
                    if !existing.held.contains(&held) {
                        existing.held.push(held);
                    }
                }
                existing.held.sort();
            }
            None => self.hold(key, allocation),
        }
        Ok(())
    }

    /// Records a cool-down (second checkpoint file); an address that is held stays held.
    pub fn restore_cooling(&mut self, address: IpAddr, rest: Rest) {
        if !self.owners.contains_key(&address) {
            self.resting.insert(address, rest);
        }
    }

    /// Keeps the idle addresses of a range from being given out before `until`: they are about to go back to EC2, and a
    /// stale Describe or IMDS may show them once more.
    pub fn cool(&mut self, cidr: IpNet, until: Time) {
        if addresses_of(cidr) > u64::from(PREFIX_ADDRESSES) {
            return;
        }
        self.moved.remove(&cidr);
        for address in addresses(cidr).filter(|address| !self.owners.contains_key(address)) {
            self.resting.insert(address, Rest { until, going: true });
        }
    }

    /// Releases what the attachment holds; the addresses cool down from now.
    pub fn release(&mut self, key: &IpamKey, now: Time) -> Option<Allocation> {
        let allocation = self.allocations.remove(key)?;
        for held in &allocation.held {
            self.owners.remove(&held.address);
            self.resting.insert(held.address, Rest { until: now + self.cooldown, going: false });
        }
        self.forget_oldest(now);
        Some(allocation)
    }

    /// Takes an assignment back that nobody heard of: no cool-down.
    pub fn undo_assign(&mut self, key: &IpamKey) {
        if let Some(allocation) = self.allocations.remove(key) {
            for held in &allocation.held {
                self.owners.remove(&held.address);
            }
        }
    }

    /// Takes a release back that could not be made durable.
    pub fn undo_release(&mut self, key: IpamKey, allocation: Allocation) {
        for held in &allocation.held {
            self.resting.remove(&held.address);
        }
        self.hold(key, allocation);
    }

    fn hold(&mut self, key: IpamKey, allocation: Allocation) {
        for held in &allocation.held {
            self.resting.remove(&held.address);
            self.owners.insert(held.address, key.clone());
        }
        self.allocations.insert(key, allocation);
    }

    /// The address to give out next: the fullest ENI first (the primary before all, it can never be released), the fullest
    /// prefix of it, then the address that has been free the longest. Full ENIs and prefixes leave others empty, and empty
    /// ones can go back to EC2.
    fn pick(&self, network_card: u16, now: Time) -> Option<IpAddr> {
        let mut enis: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.network_card == network_card && eni.serves_pods())
            .map(|eni| (eni, self.eni_stats(eni, now)))
            .filter(|(_, stats)| stats.free() > 0)
            .collect();
        enis.sort_by_key(|(eni, stats)| (!eni.is_primary(), std::cmp::Reverse(stats.assigned), eni.device_index));
        enis.into_iter().find_map(|(eni, _)| self.pick_on(eni, now))
    }

    fn pick_on(&self, eni: &StoredEni, now: Time) -> Option<IpAddr> {
        eni.cidrs
            .iter()
            .filter(|(cidr, leaving)| !**leaving && self.mode.serves(**cidr))
            .filter_map(|(cidr, _)| {
                let (free_since, address) = self.longest_free(*cidr, eni.primary_ipv4, now)?;
                Some((!self.mode.wants(*cidr), std::cmp::Reverse(self.assigned_in(*cidr)), free_since, address))
            })
            .min()
            .map(|(_, _, _, address)| address)
    }

    /// The free address of a range that was released the longest ago; one never used counts as released at 0. The ENI's own
    /// address is never given out, even when EC2 lists it among the pods' (a foreign account's ENI did).
    fn longest_free(&self, cidr: IpNet, own: Option<Ipv4Addr>, now: Time) -> Option<(Time, IpAddr)> {
        let own = own.map(IpAddr::V4);
        let mut best: Option<(Time, IpAddr)> = None;
        for address in addresses(cidr) {
            if Some(address) == own || self.owners.contains_key(&address) {
                continue;
            }
            match self.resting.get(&address) {
                None => return Some((Time(0), address)),
                Some(rest) if rest.until > now => {}
                Some(rest) => best = best.min(Some((rest.until, address))).or(Some((rest.until, address))),
            }
        }
        best
    }

    fn forget_oldest(&mut self, now: Time) {
        if self.resting.len() > REMEMBERED_RELEASES {
            self.resting.retain(|_, rest| rest.until > now);
        }
    }
}

/// Addresses in a CIDR; a /80 has 2^48.
pub fn addresses_of(cidr: IpNet) -> u64 {
    1u64.checked_shl(u32::from(cidr.max_prefix_len() - cidr.prefix_len())).unwrap_or(u64::MAX)
}

/// Every address of the range, first and last included: in a VPC they are ordinary. Pods of a /80 start at its second
/// address, as the first is the subnet-router anycast address.
fn addresses(cidr: IpNet) -> Box<dyn Iterator<Item = IpAddr>> {
    match cidr {
        IpNet::V4(net) => Box::new((u32::from(net.network())..=u32::from(net.broadcast())).map(|bits| IpAddr::V4(bits.into()))),
        IpNet::V6(net) => {
            let first = u128::from(net.network());
            let last = u128::from(net.broadcast());
            Box::new((first.saturating_add(u128::from(first < last))..=last).map(|bits| IpAddr::V6(bits.into())))
        }
    }
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// A serving ENI `eni-<index>` without CIDRs.
    pub(in super::super) fn stored_eni(device_index: u16, subnet: &str, slots: u16) -> StoredEni {
        StoredEni {
            id: EniId::new(format!("eni-{device_index}")),
            mac: Mac::default(),
            device_index,
            network_card: 0,
            attached_at: device_index,
            subnet: SubnetId::from(subnet),
            subnet_cidr: None,
            subnet_ipv6_cidrs: Vec::new(),
            primary_ipv4: None,
            kind: EniKind::Interface,
            attachment: None,
            security_groups: Vec::new(),
            role: EniRole::Pods,
            added: Time(0),
            slots,
            route_table: 254,
            state: EniState::Serving,
            cidrs: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests;
