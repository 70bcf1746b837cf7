//! Pods that ran before there was policy of ours: aws-node connected them, or network policy was off.

use std::collections::HashSet;

use tracing::info;

use super::super::attach;
use super::super::handle::{ActivateError, ActivateIf, ActivateRequest};
use super::super::interfaces::exists;
use super::super::slots::Sandbox;
use super::Actor;

impl Actor {
    /// Polices sandboxes that have run without. Unlike a pod that starts they have connections, which are read before their first policy
    /// is written.
    pub(super) fn adopt(&mut self, running: Vec<ActivateRequest>) -> usize {
        let active: HashSet<u32> = self.slots.iter().flat_map(|sandbox| &sandbox.interfaces).map(|interface| interface.index).collect();
        let (mut adopted, mut ops) = (Vec::new(), Vec::new());
        for request in running {
            let is_new = |interface: &ActivateIf| {
                exists(&interface.host_if_name, interface.host_if_index) && !active.contains(&interface.host_if_index)
            };
            if !request.endpoints.iter().all(is_new) {
                continue;
            }
            let used = self.slots.len();
            let Some(sandbox) = self.slots.assign(request) else {
                self.fail("cannot police a pod that runs", &ActivateError::NoSlot { used });
                break;
            };
            if let Err(cause) = self.flows.clear_counters(sandbox.slot) {
                self.fail("cannot clear a pod's counters", &cause);
            }
            ops.extend(self.rules.add_endpoint(sandbox.slot(), &sandbox.pod, &sandbox.pod_uid, &sandbox.addresses()));
            adopted.push(sandbox);
        }
        self.save();
        self.apply(ops);
        for sandbox in &adopted {
            // Tried again at every sweep.
            if let Err(cause) = self.put(sandbox, self.attach) {
                self.fail("cannot police a pod that runs", &cause);
            }
            self.inherit(sandbox);
            info!(pod = %sandbox.pod, slot = sandbox.slot, "policed from now on");
        }
        self.retire_upstream();
        adopted.len()
    }

    pub(super) fn inherit(&mut self, sandbox: &Sandbox) {
        self.inherited.extend(sandbox.interfaces.iter().map(|interface| (interface.index, interface.name.clone())));
    }

    /// Where our programs decide by the newest policies, aws-network-policy-agent's go; its maps with the last of them.
    pub(super) fn retire_upstream(&mut self) {
        if !self.synced || self.behind.is_some() || self.inherited.is_empty() {
            return;
        }
        let mut taken = 0;
        for (index, name) in std::mem::take(&mut self.inherited) {
            match attach::retire_upstream(&mut self.loaded, &name, index) {
                Ok(Some(found)) => taken += usize::from(found),
                _ if !exists(&name, index) => {}
                Ok(None) => drop(self.inherited.insert(index, name)),
                Err(cause) => {
                    self.fail("aws-network-policy-agent's program stays", &cause);
                    self.inherited.insert(index, name);
                }
            }
        }
        if taken > 0 {
            info!(interfaces = taken, "aws-network-policy-agent's programs removed: stanchion's are in force there");
        }
        if self.inherited.is_empty() {
            match attach::remove_upstream_pins(&self.loaded) {
                Ok(true) => info!("aws-network-policy-agent's pinned maps removed"),
                Ok(false) => {}
                Err(cause) => self.fail("aws-network-policy-agent's pinned maps stay", &cause),
            }
        }
    }
}
