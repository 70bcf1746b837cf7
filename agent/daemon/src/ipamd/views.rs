//! The actor's state as others see it.

use std::sync::Arc;

use stanchion_core::cloud::{Ec2Api, Imds};
use stanchion_core::ipam::{AddressState, EniRole, EniState, StoredEni};
use stanchion_core::network::HostNetwork;

use super::actor::Actor;
use super::handle::IpamStatus;
use super::snapshot::{AddressView, CidrView, EXCLUDED, EniView, IpamSnapshot, PoolView, SubnetView};

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Publishes a new picture; readers see the latest.
    pub(super) fn publish(&mut self) {
        let status = self.status();
        if status.ready && self.counters.startup_seconds.is_none() {
            let seconds = self.started.elapsed().as_secs_f64();
            tracing::info!(seconds, "ready");
            self.counters.startup_seconds = Some(seconds);
        }
        let snapshot = self.picture(status);
        self.snapshots.send_replace(Arc::new(snapshot));
    }

    /// Ready from the first address on. An exhausted pool does not make the node unready: the pods that wait are told why,
    /// and those that run are not concerned.
    fn status(&self) -> IpamStatus {
        if self.ever_had_addresses {
            return IpamStatus { ready: true, reason: String::new() };
        }
        IpamStatus { ready: false, reason: format!("no address yet: {}", self.why_no_address()) }
    }

    fn picture(&self, status: IpamStatus) -> IpamSnapshot {
        let now = self.clock.now();
        let mut counters = self.counters.clone();
        counters.ec2_calls = self.executor.meter.rows();
        for action in self.in_flight.values() {
            let function = match action {
                stanchion_core::ipam::Action::Assign { .. } => "increaseIPPool",
                stanchion_core::ipam::Action::AttachEni { .. } => "increaseIPPoolAllocENI",
                stanchion_core::ipam::Action::Unassign { .. } => "decreaseIPPool",
                stanchion_core::ipam::Action::ReleaseEni { .. } => "tryFreeENI",
            };
            *counters.in_progress.entry(function).or_default() += 1;
        }
        let mut enis: Vec<EniView> = self.store.enis().values().map(|eni| self.eni_view(eni)).collect();
        enis.sort_by_key(|eni| (eni.network_card, eni.device_index));
        let demand = self.demand.values().copied().next().unwrap_or_default();
        let max_enis: u32 = self.pool_limits.cards.iter().map(|(_, enis)| u32::from(*enis)).sum();
        let per_slot = if self.targets.mode == stanchion_core::ipam::PoolMode::Prefixes { 16 } else { 1 };
        IpamSnapshot {
            time: now,
            taken: Some(tokio::time::Instant::now()),
            status,
            instance: self.identity.instance.clone(),
            instance_type: self.identity.instance_type.clone(),
            mode: self.targets.mode.name(),
            max_pods: self.pool_limits.max_pods,
            max_enis,
            max_addresses: u64::from(max_enis) * u64::from(self.pool_limits.slots_per_eni) * per_slot,
            waiting: demand.waiting,
            bound: demand.bound,
            pools: self.pool_limits.cards.iter().map(|(card, _)| self.pool_view(*card)).collect(),
            enis,
            addresses: self.address_views(),
            subnets: self.subnet_views(),
            wants_trunk: self.wants_trunk(),
            in_flight: self.in_flight.values().map(|action| format!("{action}, as {}", action.reason())).collect(),
            recent_errors: self.errors.iter().cloned().collect(),
            counters,
        }
    }

    fn pool_view(&self, card: u16) -> PoolView {
        let stats = self.store.stats(card, self.clock.now());
        let mut decisions = self.decisions.get(&card).cloned().unwrap_or_default();
        decisions.extend(self.blocked.iter().filter(|(of, _)| *of == card).map(|(_, blocked)| format!("blocked: {blocked}")));
        PoolView {
            network_card: card,
            total: stats.total,
            assigned: stats.assigned,
            cooling: stats.cooling,
            free: stats.free(),
            prefixes: stats.prefixes,
            decisions,
        }
    }

    fn eni_view(&self, eni: &StoredEni) -> EniView {
        let now = self.clock.now();
        let role = match (eni.state, eni.role) {
            (EniState::Releasing, _) => "releasing",
            (EniState::Joining, _) if eni.lacks_range() => "joining: the range of its subnet is not known yet",
            (EniState::Joining, _) => "joining: its interface is not ready",
            (_, EniRole::Pods) => "pods",
            (_, EniRole::PrimaryOfCustomNetworking) => "node only (custom networking)",
            (_, EniRole::ExcludedSubnet) => EXCLUDED,
            (_, EniRole::Trunk) => "trunk",
            (_, EniRole::EfaOnly) => "efa-only",
            (_, EniRole::Unmanaged) => "unmanaged",
            (_, EniRole::Unconfirmed) => "not used before EC2 tells its tags",
            (_, EniRole::OtherCard) => "on a card that is not managed",
        };
        let cidrs = eni.cidrs.keys().map(|cidr| {
            let stats = self.store.cidr_stats(*cidr, now);
            CidrView { cidr: *cidr, total: stats.total, assigned: stats.assigned, cooling: stats.cooling }
        });
        let sums = self.store.eni_stats(eni, now);
        EniView {
            id: eni.id.clone(),
            mac: eni.mac,
            network_card: eni.network_card,
            device_index: eni.device_index,
            subnet: eni.subnet.clone(),
            primary_ipv4: eni.primary_ipv4,
            kind: format!("{:?}", eni.kind).to_lowercase(),
            role: role.to_owned(),
            route_table: eni.route_table,
            slots: eni.slots,
            cidrs: cidrs.collect(),
            total: sums.total,
            assigned: sums.assigned,
        }
    }

    fn address_views(&self) -> Vec<AddressView> {
        let now = self.clock.now();
        let eni_of = |address| self.store.eni_of(address).map(|eni| eni.id.clone()).unwrap_or_default();
        let held = self.store.allocations().iter().flat_map(|(key, allocation)| {
            allocation.held.iter().map(move |held| AddressView {
                address: held.address,
                eni: eni_of(held.address),
                state: "assigned",
                pod: Some(allocation.pod.clone()),
                key: Some(key.clone()),
                time: stanchion_core::ipam::Time(u64::try_from(allocation.since_ns / 1_000_000).unwrap_or(0)),
            })
        });
        let cooling =
            self.store.cooling(now).filter(|(address, _)| matches!(self.store.state(*address, now), AddressState::Cooling { .. })).map(
                |(address, rest)| AddressView { address, eni: eni_of(address), state: "cooling", pod: None, key: None, time: rest.until },
            );
        let mut views: Vec<_> = held.chain(cooling).collect();
        views.sort_by_key(|view| view.address);
        views
    }

    fn subnet_views(&self) -> Vec<SubnetView> {
        let shortages = self.memory.shortages(self.clock.now());
        shortages
            .map(|((subnet, kind), shortage)| SubnetView {
                subnet: subnet.clone(),
                what: kind.name(),
                since: shortage.since,
                until: shortage.until,
                reason: shortage.error.clone(),
            })
            .collect()
    }
}
