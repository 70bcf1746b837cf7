//! The node's security groups reach every ENI that carries pods.

use std::collections::BTreeSet;

use stanchion_core::cloud::{Ec2Action, Ec2Api, Imds, ImdsEni};
use stanchion_core::ids::{EniId, SecurityGroupId};
use stanchion_core::ipam::enis_with_other_groups;
use stanchion_core::network::HostNetwork;

use super::actor::{Actor, Work, chain};

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Compares with what IMDS says of the primary ENI, at every look; what failed is tried again at the next.
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
        let pool = &self.config.pool;
        if pool.custom_networking || pool.disable_provisioning || pool.imds_only {
            return;
        }
        for eni in enis_with_other_groups(self.store.enis().values(), &groups) {
            let (executor, id, groups) = (self.executor.clone(), eni.id.clone(), groups.clone());
            self.tasks.spawn(async move {
                let call = executor.ec2.set_security_groups(&id, &groups);
                let result = executor.meter.run(Ec2Action::ModifyNetworkInterfaceAttribute, call).await;
                Work::Groups(id, result.map(|()| groups).map_err(|error| chain(&error)))
            });
        }
    }

    pub(super) fn groups_set(&mut self, id: &EniId, result: Result<Vec<SecurityGroupId>, String>) {
        match result {
            Ok(groups) => {
                tracing::info!(eni = %id, ?groups, "security groups follow the node's");
                if let Some(eni) = self.store.eni_mut(id) {
                    eni.security_groups = groups;
                }
            }
            Err(error) => self.error_text("security groups", format!("{id} keeps its old security groups: {error}")),
        }
    }
}
