//! The planner against an EC2 that obeys at once: what a node ends up with.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use super::decide::plan;
use super::memory::Memory;
use super::plan::{Action, Demand, Placement, PlanInput, PoolLimits, Provisioning, Targets};
use super::store::{Datastore, EniRole, EniState, PoolMode, StoredEni};
use super::types::{IpamKey, Time};
use crate::cloud::{AddressRequest, EniKind};
use crate::ids::{ContainerId, EniId, Mac, PodName, SubnetId};

/// A capacity question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolQuestion {
    /// The warm targets.
    pub targets: Targets,
    /// What the instance can hold.
    pub limits: PoolLimits,
    /// Pods that want an address, all at once, on a node that had settled without them.
    pub pods: u32,
    /// The primary ENI is not for pods.
    pub custom_networking: bool,
}

/// Where it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolAnswer {
    /// Pods that got an address.
    pub running: u32,
    /// CIDRs on each ENI, in device order, the primary first.
    pub per_eni: Vec<usize>,
    /// Addresses in them.
    pub total: u64,
    /// Addresses that no pod holds.
    pub unused: u64,
    /// EC2's work in order: `Assign9` (CIDRs for an ENI that was there), `ENI+9` (a new one with that many), `Unassign3`,
    /// `FreeENI`.
    pub calls: Vec<String>,
}

/// A node on virtual time, with an EC2 that has every address and does everything at once.
#[derive(Clone)]
pub(crate) struct VirtualNode {
    pub(crate) store: Datastore,
    pub(crate) memory: Memory,
    pub(crate) now: Time,
    pub(crate) calls: Vec<String>,
    pub(super) targets: Targets,
    pub(super) limits: PoolLimits,
    pub(super) placement: Placement,
    next_cidr: u32,
    next_eni: u32,
    /// Pods of the last start that got nothing.
    refused: u32,
}

/// Turns after which a pool that still changes is said to oscillate; the largest instance settles in a few dozen.
const MOST_TURNS: u32 = 5_000;

impl VirtualNode {
    pub(crate) fn new(targets: Targets, limits: PoolLimits, custom_networking: bool) -> Self {
        let subnet = SubnetId::from("subnet-virtual");
        let mut node = Self {
            // Pods of a capacity question do not come and go: no cool-down.
            store: Datastore::new(targets.mode, Duration::ZERO),
            memory: Memory::new(0),
            now: Time(1_000_000),
            calls: Vec::new(),
            targets,
            limits,
            placement: Placement::Subnets { subnets: vec![subnet], security_groups: Vec::new() },
            next_cidr: 0,
            next_eni: 0,
            refused: 0,
        };
        let role = if custom_networking { EniRole::PrimaryOfCustomNetworking } else { EniRole::Pods };
        let cards: Vec<u16> = node.limits.cards.iter().map(|(card, _)| *card).collect();
        for card in cards {
            if card == 0 {
                node.add_eni(0, 0, role);
            }
        }
        node
    }

    /// The same node with a cool-down; nobody holds an address yet.
    pub(super) fn with_cooldown(mut self, cooldown: Duration) -> Self {
        let mut store = Datastore::new(self.targets.mode, cooldown);
        self.store.enis().values().for_each(|eni| store.put_eni(eni.clone()));
        self.store = store;
        self
    }

    pub(super) fn add_eni(&mut self, network_card: u16, device_index: u16, role: EniRole) -> EniId {
        self.next_eni += 1;
        let id = EniId::new(format!("eni-{:08x}", self.next_eni));
        self.store.put_eni(StoredEni {
            id: id.clone(),
            mac: Mac::default(),
            device_index,
            network_card,
            attached_at: device_index,
            subnet: SubnetId::from("subnet-virtual"),
            subnet_cidr: None,
            subnet_ipv6_cidrs: Vec::new(),
            primary_ipv4: None,
            kind: EniKind::Interface,
            attachment: None,
            security_groups: Vec::new(),
            role,
            added: self.now,
            slots: self.limits.slots_per_eni,
            route_table: 0,
            state: EniState::Serving,
            cidrs: BTreeMap::new(),
        });
        id
    }

    pub(super) fn new_cidrs(&mut self, request: AddressRequest) -> Vec<IpNet> {
        let mut take = |count: u16, of: fn(u32) -> IpNet| {
            (0..count)
                .map(|_| {
                    self.next_cidr += 1;
                    of(self.next_cidr)
                })
                .collect()
        };
        // Singles in 10/9 and prefixes in 10.128/9 cannot collide.
        match request {
            AddressRequest::Ipv4(count) => take(count, |n| IpNet::from(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)))),
            AddressRequest::Ipv4Prefixes(count) => {
                take(count, |n| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(0x0a80_0000 + n * 16), 28)))
            }
            AddressRequest::Ipv6Prefixes(count) => {
                take(count, |n| IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from((0x2600u128 << 112) + (u128::from(n) << 48)), 80)))
            }
        }
    }

    /// One plan, done at once; returns whether anything was done.
    fn turn(&mut self, demand: Demand) -> bool {
        let demand = BTreeMap::from([(0, demand)]);
        let planned = plan(&PlanInput {
            store: &self.store,
            in_flight: &[],
            memory: &self.memory,
            targets: &self.targets,
            limits: &self.limits,
            demand: &demand,
            placement: &self.placement,
            provisioning: Provisioning::On,
            now: self.now,
        });
        self.memory.surplus_since = planned.surplus_since;
        let acted = !planned.actions.is_empty();
        for action in planned.actions {
            for call in action.ec2_actions() {
                self.memory.called(*call, self.now);
            }
            self.perform(action);
        }
        if !acted {
            let Some(at) = planned.wake_at.filter(|at| *at > self.now) else { return false };
            self.now = at;
        }
        true
    }

    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::Assign { eni, request, .. } => {
                let cidrs = self.new_cidrs(request);
                self.calls.push(format!("Assign{}", cidrs.len()));
                self.store.add_cidrs(&eni, cidrs);
            }
            Action::AttachEni { network_card, device_index, request, .. } => {
                let cidrs = self.new_cidrs(request);
                self.calls.push(format!("ENI+{}", cidrs.len()));
                let eni = self.add_eni(network_card, device_index, EniRole::Pods);
                self.store.add_cidrs(&eni, cidrs);
            }
            Action::Unassign { eni, cidrs, .. } => {
                self.calls.push(format!("Unassign{}", cidrs.len()));
                for cidr in cidrs {
                    self.store.remove_cidr(&eni, cidr);
                }
            }
            Action::ReleaseEni { eni, .. } => {
                self.calls.push("FreeENI".to_owned());
                self.store.remove_eni(&eni);
            }
        }
    }

    /// Plans and performs until nothing is left to do. Returns false if the pool does not come to rest.
    pub(crate) fn settle(&mut self) -> bool {
        (0..MOST_TURNS).any(|_| !self.turn(Demand::default()))
    }

    /// Pods that ask at once; those that cannot be served after everything was tried stay without an address.
    pub(crate) fn start_pods(&mut self, names: std::ops::Range<u32>) {
        let mut waiting: Vec<u32> = names.rev().collect();
        for _ in 0..MOST_TURNS {
            while let Some(name) = waiting.last() {
                let (key, pod) = virtual_pod(*name);
                if self.store.assign(&key, &pod, &[0], self.now).is_none() {
                    break;
                }
                waiting.pop();
            }
            let demand = Demand { waiting: u32::try_from(waiting.len()).unwrap_or(u32::MAX), bound: 0 };
            self.refused = demand.waiting;
            if waiting.is_empty() || !self.turn(demand) {
                break;
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn stop_pods(&mut self, names: std::ops::Range<u32>) {
        for name in names {
            self.store.release(&virtual_pod(name).0, self.now);
        }
    }

    /// Pods below `names` that were ever started and not stopped; as many as run when all could be served.
    #[cfg(test)]
    pub(crate) fn wanted(&self, names: u32) -> u64 {
        u64::from(names).min(self.store.allocations().len() as u64 + u64::from(self.refused))
    }

    /// The same node under other targets, as after a restart.
    #[cfg(test)]
    pub(crate) fn switch(mut self, targets: Targets) -> Self {
        let mut store = Datastore::new(targets.mode, Duration::ZERO);
        for eni in self.store.enis().values() {
            store.put_eni(eni.clone());
        }
        for (key, allocation) in self.store.allocations() {
            store.restore(key.clone(), allocation.clone()).expect("one owner each");
        }
        (self.store, self.targets) = (store, targets);
        self
    }

    pub(crate) fn answer(&self) -> PoolAnswer {
        let mut enis: Vec<_> = self.store.enis().values().collect();
        enis.sort_by_key(|eni| (eni.network_card, eni.device_index));
        let stats = self.store.stats(0, self.now);
        PoolAnswer {
            running: u32::try_from(self.store.allocations().len()).unwrap_or(u32::MAX),
            per_eni: enis.iter().map(|eni| eni.cidrs.len()).collect(),
            total: stats.total,
            unused: stats.total - stats.assigned,
            calls: self.calls.clone(),
        }
    }
}

pub(super) fn virtual_pod(name: u32) -> (IpamKey, PodName) {
    let key = IpamKey { network_name: "aws-cni".to_owned(), container_id: ContainerId::new(name.to_string()), if_name: "eth0".to_owned() };
    (key, PodName::new("default", format!("pod-{name}")))
}

/// What a node ends up with.
pub fn steady_state(question: &PoolQuestion) -> PoolAnswer {
    let mut node = VirtualNode::new(question.targets, question.limits.clone(), question.custom_networking);
    node.settle();
    // In IPv6 mode a /80 holds every pod a node can run; the kubelet's limit decides.
    let pods = if question.targets.mode == PoolMode::Ipv6Prefixes { question.pods.min(question.limits.max_pods) } else { question.pods };
    node.start_pods(0..pods);
    node.settle();
    node.answer()
}

#[cfg(test)]
mod tests;
