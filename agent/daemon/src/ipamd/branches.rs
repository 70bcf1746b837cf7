//! Security groups for pods, as far as ipamd is concerned: the trunk, and the host's side of branch ENIs.
//!
//! AWS's resource controller attaches the trunk and makes the branches; what it wrote into the pods' annotations is the desired state, so
//! that nothing of it has to be kept in a file.

use std::time::Duration;

use stanchion_core::branch::{branch_of, wants_branch};
use stanchion_core::cloud::{Ec2Api, EniKind, Imds};
use stanchion_core::config::BranchMode;
use stanchion_core::network::names::STRICT_BRANCH_PREFIX;
use stanchion_core::network::{BranchPod, HostNetwork, HostPlan, PodHost, host_veth_name};

use tokio::time::Instant;

use super::actor::Actor;

/// How long an ENI is kept for the trunk while pods wait for an address: the resource controller takes seconds where it is there and knows the type.
const TRUNK_PATIENCE: Duration = Duration::from_secs(300);

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Notes since when a trunk is wanted.
    pub(super) fn follow_trunk(&mut self) {
        self.trunk_wanted = self.wants_trunk().then(|| self.trunk_wanted.unwrap_or_else(Instant::now));
    }

    /// Nobody has attached one for so long that nobody may do so at all.
    pub(super) fn trunk_is_overdue(&self) -> bool {
        self.trunk_wanted.is_some_and(|since| since.elapsed() >= TRUNK_PATIENCE)
    }

    /// Whether the resource controller is to attach a trunk: it is wanted, it is not there, and an ENI is left for it.
    pub(super) fn wants_trunk(&self) -> bool {
        let mut enis = self.store.enis().values();
        if !self.targets.reserve_trunk || enis.clone().any(|eni| eni.kind == EniKind::Trunk) {
            return false;
        }
        let Some((card, limit)) = self.pool_limits.cards.first() else { return false };
        let attached = enis.by_ref().filter(|eni| eni.network_card == *card).count();
        attached < usize::from(*limit)
    }

    /// The branches of this node's pods; the diff looks after those whose veth lives.
    pub(super) fn add_branches(&self, plan: &mut HostPlan) {
        let trunk = self.store.enis().values().find(|eni| eni.kind == EniKind::Trunk).map(|eni| eni.mac);
        let (true, Some(trunk)) = (self.config.pool.pod_eni, trunk) else { return };
        let strict = self.config.pool.branch_mode == BranchMode::Strict;
        let prefix = if strict { STRICT_BRANCH_PREFIX } else { plan.veth_prefix.as_str() };
        let cluster = self.cluster.borrow();
        for (name, pod) in cluster.pods.iter().filter(|(_, pod)| pod.spec.node_name == self.node_name && !pod.is_completed()) {
            // An annotation that cannot be read fails the pod's ADD, which says so.
            if let (true, Ok(Some(branch))) = (wants_branch(pod), branch_of(pod)) {
                let addresses: Vec<_> = branch.addresses(plan.ipv6).collect();
                let link = branch.link(trunk, strict);
                let host_if = host_veth_name(prefix, name, 0);
                if !strict {
                    plan.pods.extend(addresses.iter().map(|address| PodHost {
                        address: *address,
                        host_if: host_if.clone(),
                        table: link.table(),
                    }));
                }
                plan.branches.push(BranchPod { host_if, addresses, link });
            }
        }
    }
}
