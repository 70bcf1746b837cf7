//! Subnets and security groups of ENIs that carry pods: what EC2 says of them, and the groups that change.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use stanchion_core::cloud::{Ec2Action, Ec2Api, Ec2Error, Imds, ImdsEni, Subnet};
use stanchion_core::config::PoolConfig;
use stanchion_core::ids::{EniId, SecurityGroupId, SubnetId, VpcId};
use stanchion_core::ipam::{TAG_GROUP_ROLE, enis_with_other_groups, finds_other_subnets, groups_in};
use stanchion_core::network::HostNetwork;

use super::actor::{Actor, Work};
use super::execute::Executor;
use super::retry::Retry;

/// Pauses after EC2 did not tell the security groups for other subnets than the node's, the first and the longest.
const GROUPS_PAUSE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));
/// Pauses after EC2 did not change an ENI's groups, the first and the longest.
const REGROUP_PAUSE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));

/// Where EC2 is asked.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) vpc: VpcId,
    pub(super) zone: String,
    /// The node's.
    pub(super) subnet: SubnetId,
}

/// What EC2 told; `None` where it was not asked.
#[derive(Debug, Default)]
pub(super) struct Discovered {
    subnets: Option<Result<Vec<Subnet>, Ec2Error>>,
    groups: Option<Result<Vec<SecurityGroupId>, Ec2Error>>,
}

/// Whether the zone's subnets are to be known.
pub(super) fn wants_subnets(pool: &PoolConfig) -> bool {
    pool.subnet_discovery && !pool.imds_only && !pool.disable_provisioning
}

/// With IPv6 only nodes with several network cards make ENIs, and the ENIConfig decides under custom networking.
fn wants_groups(pool: &PoolConfig) -> bool {
    wants_subnets(pool) && !pool.custom_networking && (!pool.ipv6 || pool.multi_nic)
}

/// Asks EC2 for the zone's subnets, and for the groups of ENIs in another one than the node's if there is any: also every ten minutes, where aws-node
/// asks every 30 s, which is 170 calls a second of an account with 5,000 nodes.
pub(super) async fn discover<E: Ec2Api>(executor: &Executor<E>, place: &Place, pool: &PoolConfig) -> Discovered {
    if !wants_subnets(pool) {
        return Discovered::default();
    }
    let call = executor.ec2.describe_subnets(&place.vpc, &place.zone);
    let subnets = executor.meter.run(Ec2Action::DescribeSubnets, call).await;
    let others = |subnets: &Vec<Subnet>| finds_other_subnets(subnets, &place.subnet, &pool.cluster_name);
    let groups = if wants_groups(pool) && subnets.as_ref().is_ok_and(others) {
        let call = executor.ec2.describe_security_groups(&place.vpc, TAG_GROUP_ROLE);
        Some(executor.meter.run(Ec2Action::DescribeSecurityGroups, call).await)
    } else {
        None
    };
    Discovered { subnets: Some(subnets), groups }
}

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Asks EC2 beside the actor.
    pub(super) fn start_discovery(&mut self) {
        let Some(place) = self.place.clone() else { return };
        let (executor, config) = (self.executor.clone(), Arc::clone(&self.config));
        self.tasks.spawn(async move { Work::Discovered(discover(&executor, &place, &config.pool).await) });
    }

    pub(super) fn discovered(&mut self, discovered: Discovered) {
        match discovered.groups {
            Some(Ok(mut groups)) => {
                groups.sort();
                self.pod_groups_retry = Retry::new();
                self.pod_groups = Some(groups);
                self.regroup();
            }
            // What was known stays; without it ENIs elsewhere keep the groups that they have, and new ones get the node's.
            Some(Err(error)) => {
                // A role that may not ask is asked for when the subnets are.
                if !error.is_denied() {
                    self.subnets_due = self.subnets_due.min(self.pod_groups_retry.failed(GROUPS_PAUSE));
                }
                self.error("describe security groups", &error);
            }
            None => {}
        }
        match discovered.subnets {
            Some(result) => self.subnets_read(result),
            None => self.place(),
        }
    }

    /// The groups that an ENI for pods shall have in a subnet; `None` while EC2 has not told them.
    pub(super) fn wanted_groups(&self, subnet: &SubnetId) -> Option<&[SecurityGroupId]> {
        let primary = self.store.enis().values().find(|eni| eni.is_primary())?;
        let tagged = if wants_groups(&self.config.pool) { self.pod_groups.as_deref() } else { Some(&[][..]) };
        groups_in(subnet, &primary.subnet, &primary.security_groups, tagged)
    }

    /// Compares with what IMDS says of the primary ENI, at every look.
    pub(super) fn follow_groups(&mut self, imds: &[ImdsEni]) {
        let Some(shown) = imds.iter().find(|eni| eni.mac == self.identity.primary_mac) else { return };
        let mut groups = shown.security_groups.clone();
        groups.sort();
        let primary = self.store.enis().values().find(|eni| eni.is_primary()).map(|eni| eni.id.clone());
        let Some(primary) = primary.and_then(|id| self.store.eni_mut(&id)) else { return };
        let known: BTreeSet<&SecurityGroupId> = primary.security_groups.iter().collect();
        if known != groups.iter().collect() {
            tracing::info!(?groups, "the node's security groups changed");
            primary.security_groups.clone_from(&groups);
            self.place();
        }
        self.regroup();
    }

    /// Gives ENIs the groups that they shall have, one change of an ENI at a time; what failed is tried again after a pause.
    fn regroup(&mut self) {
        let pool = &self.config.pool;
        if pool.custom_networking || pool.disable_provisioning || pool.imds_only {
            return;
        }
        let action = Ec2Action::ModifyNetworkInterfaceAttribute;
        let now = self.clock.now();
        let differ = enis_with_other_groups(self.store.enis().values(), |subnet| self.wanted_groups(subnet));
        let due = |id: &EniId| !self.regrouping.contains(id) && self.regroup_retry.get(id).is_none_or(Retry::is_due);
        let changes: Vec<_> =
            differ.into_iter().filter(|(eni, _)| due(&eni.id)).map(|(eni, groups)| (eni.id.clone(), groups.to_vec())).collect();
        for (id, groups) in changes {
            if self.memory.may_call(action, now).is_err() {
                return;
            }
            self.memory.called(action, now);
            self.regrouping.insert(id.clone());
            let executor = self.executor.clone();
            self.tasks.spawn(async move {
                let call = executor.ec2.set_security_groups(&id, &groups);
                let result = executor.meter.run(action, call).await;
                Work::Groups(id, result.map(|()| groups))
            });
        }
    }

    pub(super) fn groups_set(&mut self, id: &EniId, result: Result<Vec<SecurityGroupId>, Ec2Error>) {
        self.regrouping.remove(id);
        match result {
            Ok(groups) => {
                tracing::info!(eni = %id, ?groups, "security groups follow the node's, or those that are tagged for pods");
                self.regroup_retry.remove(id);
                if let Some(eni) = self.store.eni_mut(id) {
                    eni.security_groups = groups;
                }
            }
            Err(error) => {
                self.regroup_retry.retain(|known, _| self.store.enis().contains_key(known));
                self.regroup_retry.entry(id.clone()).or_insert_with(Retry::new).failed(REGROUP_PAUSE);
                // A group that cannot be set is no reason to attach no ENI: only what concerns the whole action is remembered.
                if matches!(error, Ec2Error::Throttled { .. }) {
                    self.memory.failed(&error, None, self.clock.now());
                }
                self.error_text("security groups", format!("{id} keeps its old security groups: {error}"));
            }
        }
    }
}
