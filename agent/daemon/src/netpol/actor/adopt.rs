//! Pods that ran before there was policy of ours: aws-node connected them, or network policy was off.

use std::collections::{BTreeMap, HashSet};

use tracing::info;

use super::super::attach::{self, Decides};
use super::super::handle::{ActivateError, ActivateIf, ActivateRequest};
use super::super::interfaces::exists;
use super::super::slots::Sandbox;
use super::Actor;

impl Actor {
    /// Polices sandboxes that have run without. Unlike a pod that starts they have connections, which are read before their first policy
    /// is written; and where that is refused, they go on as they did.
    ///
    /// # Errors
    /// The kernel refused the policy of one: none of them was touched.
    pub(super) fn adopt(&mut self, running: Vec<ActivateRequest>) -> Result<usize, ActivateError> {
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
        if let Err(cause) = self.try_apply(ops) {
            adopted.iter().for_each(|sandbox| self.release(sandbox));
            self.save();
            return Err(ActivateError::Maps(cause));
        }
        for sandbox in &adopted {
            // Tried again at every sweep.
            if let Err(cause) = self.put(sandbox, self.attach) {
                self.fail("cannot police a pod that runs", &cause);
            }
            self.inherit(sandbox);
            info!(pod = %sandbox.pod, slot = sandbox.slot, "policed from now on");
        }
        self.retire_upstream();
        Ok(adopted.len())
    }

    pub(super) fn inherit(&mut self, sandbox: &Sandbox) {
        self.inherited.extend(sandbox.interfaces.iter().map(|interface| (interface.index, interface.name.clone())));
    }

    /// Where our programs are in place and know the newest policies, aws-network-policy-agent's go; its maps with the last of them.
    pub(super) fn retire_upstream(&mut self) {
        if !self.synced || self.behind.is_some() || self.inherited.is_empty() {
            return;
        }
        let mut upstreams = BTreeMap::new();
        for (index, name) in std::mem::take(&mut self.inherited) {
            match attach::who_decides(&mut self.loaded, &name, index) {
                Ok(Decides::Ours) => {}
                Ok(Decides::Upstreams) => drop(upstreams.insert(index, name)),
                _ if !exists(&name, index) => {}
                Ok(Decides::NotOurs) => drop(self.inherited.insert(index, name)),
                Err(cause) => {
                    self.fail("aws-network-policy-agent's programs may decide still", &cause);
                    self.inherited.insert(index, name);
                }
            }
        }
        if !upstreams.is_empty() {
            self.take_from_upstream(upstreams);
        }
        if self.inherited.is_empty() {
            match attach::remove_upstream_pins(&self.loaded) {
                Ok(true) => info!("aws-network-policy-agent's pinned maps removed"),
                Ok(false) => {}
                Err(cause) => self.fail("aws-network-policy-agent's pinned maps stay", &cause),
            }
        }
    }

    /// Ours were not asked so far: the connections that opened meanwhile are read first.
    fn take_from_upstream(&mut self, upstreams: BTreeMap<u32, String>) {
        let concerned = |sandbox: &&Sandbox| sandbox.interfaces.iter().any(|interface| upstreams.contains_key(&interface.index));
        let slots = self.slots.iter().filter(concerned).map(Sandbox::slot).filter(|slot| self.isolated.contains(slot)).collect();
        if let Err(cause) = self.seed(&slots) {
            self.fail("aws-network-policy-agent's programs stay until open connections can be read", &cause);
            self.inherited.extend(upstreams);
            return;
        }
        let interfaces = upstreams.len();
        for (index, name) in upstreams {
            if let Err(cause) = attach::remove_upstreams(&mut self.loaded, &name, index) {
                self.fail("aws-network-policy-agent's programs stay", &cause);
                self.inherited.insert(index, name);
            }
        }
        info!(interfaces, "aws-network-policy-agent's programs were removed: stanchion's decide there");
    }
}
