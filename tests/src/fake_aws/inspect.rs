//! Looking at the model: what tests and the lab ask it, without lag and without being counted as calls.

use std::collections::{BTreeMap, BTreeSet};

use stanchion_core::cloud::{Eni, Subnet};
use stanchion_core::ids::{EniId, InstanceId, SubnetId};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::clock::Clock;
use super::cloud::{Cloud, LoggedCall, attached_to, cidrs_of};
use super::logs::{GroupView, LogsTotals, StoredEvent};
use super::logs_wire::Entity;
use super::model::{EniEvent, InstanceView};
use super::subnet::SubnetState;

impl Cloud {
    /// Every change of an ENI from now on, in order.
    pub fn subscribe(&self) -> UnboundedReceiver<EniEvent> {
        let (sender, receiver) = unbounded_channel();
        self.lock().subscribers.push(sender);
        receiver
    }

    /// The clock.
    pub fn clock(&self) -> Clock {
        self.lock().clock.clone()
    }

    /// The region's name.
    pub fn region(&self) -> String {
        self.lock().config.region.clone()
    }

    /// The VPC's IPv4 ranges.
    pub fn vpc_cidrs(&self) -> Vec<ipnet::Ipv4Net> {
        self.lock().config.vpc_cidrs.clone()
    }

    /// An ENI as it is, without lag.
    pub fn eni(&self, id: &EniId) -> Option<Eni> {
        self.settled().live(id).cloned()
    }

    /// Every ENI, without lag, by id.
    pub fn enis(&self) -> Vec<Eni> {
        self.settled().live_enis().cloned().collect()
    }

    /// ENIs of an instance, without lag, by device index.
    pub fn enis_of(&self, instance: &InstanceId) -> Vec<Eni> {
        let mut enis: Vec<_> = self.settled().live_enis().filter(|e| attached_to(e, instance)).cloned().collect();
        enis.sort_by_key(|eni| eni.attachment.as_ref().map(|a| (a.network_card, a.device_index)));
        enis
    }

    /// The ENI that holds an address, be it its own, a secondary one or of a prefix.
    pub fn owner_of(&self, address: std::net::IpAddr) -> Option<EniId> {
        self.settled().live_enis().find(|eni| cidrs_of(eni).any(|cidr| cidr.contains(&address))).map(|eni| eni.id.clone())
    }

    /// A subnet with its count of free addresses.
    pub fn subnet(&self, id: &SubnetId) -> Option<Subnet> {
        self.lock().subnets.get(id).map(SubnetState::describe)
    }

    /// Every subnet, by id.
    pub fn subnets(&self) -> Vec<Subnet> {
        self.lock().subnets.values().map(SubnetState::describe).collect()
    }

    /// Whole free /28 blocks of a subnet.
    pub fn free_prefixes(&self, id: &SubnetId) -> u32 {
        self.lock().subnets.get(id).map_or(0, SubnetState::free_prefixes)
    }

    /// An instance.
    pub fn instance(&self, id: &InstanceId) -> Option<InstanceView> {
        self.lock().instances.get(id).cloned()
    }

    /// Every instance, by id.
    pub fn instances(&self) -> Vec<InstanceView> {
        self.lock().instances.values().cloned().collect()
    }

    /// Every call so far.
    pub fn calls(&self) -> Vec<LoggedCall> {
        self.lock().calls.clone()
    }

    /// How many calls failed so far, or had no reply.
    pub fn failed(&self) -> usize {
        self.lock().calls.iter().filter(|call| call.lost || call.error.is_some()).count()
    }

    /// How often an action was called.
    pub fn count(&self, action: &str) -> usize {
        self.lock().calls.iter().filter(|call| call.action == action).count()
    }

    /// Calls by action, IMDS paths left out.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for call in self.lock().calls.iter().filter(|call| !call.action.starts_with("imds:")) {
            *counts.entry(call.action.clone()).or_default() += 1;
        }
        counts
    }

    /// Forgets the calls so far.
    pub fn clear_calls(&self) {
        self.lock().calls.clear();
    }

    /// Checks the model against itself: every address of an ENI is in its subnet, held once, and counted.
    ///
    /// # Panics
    /// When it is not so: a mistake of the fake.
    pub fn assert_consistent(&self) {
        let state = self.lock();
        let mut seen = BTreeSet::new();
        for eni in state.live_enis() {
            for cidr in cidrs_of(eni) {
                assert!(seen.insert(cidr), "{cidr} is held twice, last by {}", eni.id);
            }
        }
    }
}

impl Cloud {
    /// Events of a stream in the order in which they were taken.
    pub fn events(&self, group: &str, stream: &str) -> Vec<StoredEvent> {
        self.lock().logs.events(group, stream)
    }

    /// Names of the log groups.
    pub fn log_groups(&self) -> Vec<String> {
        self.lock().logs.group_names()
    }

    /// Names of a group's streams.
    pub fn log_streams(&self, group: &str) -> Vec<String> {
        self.lock().logs.stream_names(group)
    }

    /// A group's retention, class and tags.
    pub fn log_group(&self, group: &str) -> Option<GroupView> {
        self.lock().logs.view(group)
    }

    /// Makes a group, as Terraform would.
    pub fn add_log_group(&self, group: &str) {
        let mut state = self.lock();
        let now = state.clock.unix_ms();
        state.logs.add_group(group, now);
    }

    /// Makes a stream of a group that exists.
    pub fn add_log_stream(&self, group: &str, stream: &str) {
        self.lock().logs.add_stream(group, stream);
    }

    /// Removes a group with its streams, as a person would.
    pub fn delete_log_group(&self, group: &str) {
        self.lock().logs.delete_group(group);
    }

    /// What the latest put to a stream said that it is about.
    pub fn log_entity(&self, group: &str, stream: &str) -> Option<Entity> {
        self.lock().logs.entity(group, stream)
    }

    /// Counters over all streams.
    pub fn logs_totals(&self) -> LogsTotals {
        self.lock().logs.totals()
    }
}
