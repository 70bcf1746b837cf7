//! What pods learn of DNS names.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::policy::dns;
use stanchion_core::policy::frames::Datagram;
use stanchion_core::policy::image::{MapOp, Slot};
use stanchion_core::policy::maps::image_allows;
use stanchion_core::policy::model::Direction;
use tokio::time::Instant;
use tracing::debug;

use super::super::names;
use super::Actor;

/// DNS names that were learned in this time are put on disk together.
const SAVE_NAMES_AFTER: Duration = Duration::from_millis(100);

impl Actor {
    /// Takes a DNS answer to heart: what it names is in the maps when this returns.
    pub(super) fn learn(&mut self, slot: Slot, frame: &[u8]) {
        let now = self.name_clock.now();
        for message in self.messages.of(slot, frame) {
            // What is no answer says nothing.
            let Ok(answers) = dns::answers(&message) else { continue };
            let (ops, result) = self.rules.learn(slot, &answers, now);
            self.names_changed(&ops);
            self.apply(ops);
            if let Err(cause) = result {
                self.fail("cannot learn a name", &cause);
            }
        }
    }

    /// A pod may use an answer before the agent has read it: what was dropped then is sent once more on its behalf, and is judged
    /// anew on its way.
    pub(super) fn send_again(&self, slot: Slot, frame: &[u8]) {
        let (Some(sandbox), Some(datagram)) = (self.slots.get(slot), Datagram::read(frame)) else { return };
        let Datagram { source, destination, protocol, destination_port, .. } = datagram;
        let from = sandbox.interfaces.iter().find(|interface| interface.addresses().any(|address| address == source));
        let is_allowed = || image_allows(self.rules.image(), slot, Direction::Egress, destination, protocol, destination_port);
        // What is still denied would come back here.
        if let Some(from) = from
            && self.behind.is_none()
            && is_allowed()
            && let Err(cause) = self.resender.send(&datagram.with_checksum(frame), from.index)
        {
            debug!(cause = %cause, interface = from.name, "a packet that came before its DNS answer was known is lost");
        }
    }

    pub(super) fn forget_names(&mut self, open: &HashSet<IpAddr>) {
        let ops = self.rules.forget(self.name_clock.now(), |address| open.contains(&address));
        self.names_changed(&ops);
        self.apply(ops);
    }

    fn names_changed(&mut self, ops: &[MapOp]) {
        if !ops.is_empty() {
            self.names_due.get_or_insert_with(|| Instant::now() + SAVE_NAMES_AFTER);
        }
    }

    pub(super) fn save_names(&mut self) {
        if self.names_due.take_if(|due| *due <= Instant::now()).is_none() {
            return;
        }
        if let Err(cause) = names::save(&self.state_dir, self.rules.names(), &self.name_clock) {
            self.fail("cannot write the names", &cause);
        }
    }
}
