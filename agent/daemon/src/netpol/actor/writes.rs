//! Writing policy to the kernel's maps, and what happens when it refuses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::policy::image::{EndpointImage, MapError, MapOp, PolicyMaps as _, Refusal, Slot};
use stanchion_ebpf_abi::flow_state;
use tokio::time::Instant;
use tracing::info;

use super::super::conntrack::{self, Connection};
use super::super::flows::FlowKey;
use super::Actor;

/// After the kernel refused a write, the next try. Each reads all maps: of full ones it takes a tenth of the time at most.
const MEND_AFTER: Duration = Duration::from_secs(1);

/// So often a pod's first policy waits for its open connections to be read; then it comes without them.
const SEED_TRIES: u32 = 10;

/// The maps are not what the engine believes, because the kernel refused a write.
pub(super) struct Behind {
    /// Writes that were not made.
    pub(super) missing: usize,
    pub(super) cause: MapError,
    /// When what is missing is worked out from what the maps hold, and written. What comes until then waits with it.
    pub(super) mend: Instant,
}

impl Actor {
    /// Applies operations, now or when the kernel takes them.
    pub(super) fn apply(&mut self, ops: Vec<MapOp>) {
        // Told where it was refused.
        let _later = self.try_apply(ops);
    }

    /// Works off what the kernel refused.
    pub(super) fn mend(&mut self) {
        if self.behind.as_ref().is_some_and(|behind| behind.mend <= Instant::now()) {
            self.apply(Vec::new());
        }
    }

    /// Applies operations. While an earlier one is missing nothing is written: packets would see a change without what was to
    /// come before it.
    pub(super) fn try_apply(&mut self, ops: Vec<MapOp>) -> Result<(), MapError> {
        self.look_for_too_large();
        let start = Instant::now();
        let (missing, result) = match &self.behind {
            None => self.write(&ops),
            Some(behind) if behind.mend > Instant::now() => return Err(behind.cause.clone()),
            Some(Behind { missing, .. }) => {
                let missing = *missing;
                match self.maps.read() {
                    Ok(image) => {
                        let ops = self.rules.rebase(image);
                        self.write(&ops)
                    }
                    Err(cause) => (missing, Err(cause)),
                }
            }
        };
        let was_behind = self.behind.is_some();
        self.behind = None;
        match &result {
            Ok(()) if was_behind => info!("the maps hold every policy again"),
            Ok(()) => {}
            Err(cause) => {
                self.fail("cannot write policy; what is enforced stays as it is, and no pod starts", cause);
                self.behind = Some(Behind { missing, cause: cause.clone(), mend: Instant::now() + MEND_AFTER.max(start.elapsed() * 9) });
            }
        }
        result
    }

    /// Writes to the kernel; with a failure, how many operations are missing.
    fn write(&mut self, ops: &[MapOp]) -> (usize, Result<(), MapError>) {
        if self.note_policed(ops) {
            self.save();
        }
        let first: BTreeSet<Slot> = ops.iter().filter_map(newly_isolated).filter(|slot| !self.isolated.contains(slot)).collect();
        if let Err(cause) = self.seed(&first)
            && self.unseeded < SEED_TRIES
        {
            self.unseeded += 1;
            return (ops.len(), Err(cause));
        }
        self.unseeded = 0;
        let result = self.maps.apply(ops);
        // Once more for what opened meanwhile; told there.
        let _opened_meanwhile = self.seed(&first);
        match result {
            Ok(()) => {
                let endpoints = &self.rules.image().endpoints;
                self.isolated = endpoints.iter().filter(|(_, endpoint)| is_isolated(endpoint)).map(|(slot, _)| *slot).collect();
                if self.synced && self.note_exactly_policed() {
                    self.save();
                }
                (0, Ok(()))
            }
            Err((index, cause)) => (ops.len() - index, Err(cause)),
        }
    }

    /// Notes the directions in which pods will be policed beside those in which they are: before the kernel does, as this process may
    /// end between the two. True if there is something new to save.
    pub(super) fn note_policed(&mut self, ops: &[MapOp]) -> bool {
        let mut is_new = false;
        for op in ops {
            let MapOp::SetEndpoint(slot, image) = op else { continue };
            let ([was_ingress, was_egress], [ingress, egress]) = (self.slots.policed_in(*slot), image.isolated());
            is_new |= self.slots.note_policed(*slot, [was_ingress || ingress, was_egress || egress]);
        }
        is_new
    }

    /// Notes the directions in which pods are policed, now that the kernel does as the engine says. Not before the cluster is known: until
    /// then what the agent before noted holds.
    pub(super) fn note_exactly_policed(&mut self) -> bool {
        let mut is_new = false;
        for (slot, image) in &self.rules.image().endpoints {
            is_new |= self.slots.note_policed(*slot, image.isolated());
        }
        is_new
    }

    /// Gives pods that come under our policy the flows they have, from the kernel's connection tracking.
    ///
    /// # Errors
    /// The kernel or this process had no room to read them, which passes. What does not is told here.
    pub(super) fn seed(&mut self, slots: &BTreeSet<Slot>) -> Result<(), MapError> {
        if slots.is_empty() {
            return Ok(());
        }
        let connections = match conntrack::dump() {
            Ok(connections) => connections,
            Err(cause) => {
                self.fail("cannot read the kernel's connections; open ones of newly policed pods may break", &cause);
                let passes = matches!(cause.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM | libc::EMFILE | libc::ENFILE));
                let (map, operation) = ("of the kernel's connections", "read".to_owned());
                let error = MapError { map, operation, refusal: Refusal::Other, message: cause.to_string() };
                return if passes { Err(error) } else { Ok(()) };
            }
        };
        let Ok(now) = self.loaded.clock.now() else { return Ok(()) };
        for slot in slots {
            let Some(sandbox) = self.slots.get(*slot) else { continue };
            let addresses = sandbox.addresses();
            let flows: Vec<(FlowKey, u8)> = connections.iter().flat_map(|connection| seeds(*slot, &addresses, connection)).collect();
            for (key, state) in flows {
                if let Err(cause) = self.flows.seed(key, state, now) {
                    self.fail("cannot seed a flow", &cause);
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

pub(super) fn is_isolated(endpoint: &EndpointImage) -> bool {
    endpoint.ingress.is_some() || endpoint.egress.is_some()
}

/// The slot of an operation that sets an isolated endpoint.
pub(super) fn newly_isolated(op: &MapOp) -> Option<Slot> {
    match op {
        MapOp::SetEndpoint(slot, image) if is_isolated(image) => Some(*slot),
        _ => None,
    }
}

/// The flows of a pod in a tracked connection: as the one who opened it, as the one who answers, or both.
fn seeds(slot: Slot, addresses: &[IpAddr], connection: &Connection) -> impl Iterator<Item = (FlowKey, u8)> {
    let Connection { original, reply, replied, open } = connection;
    let state = if *replied { flow_state::REPLIED } else { 0 };
    let key = |local: &IpAddr, local_port, remote, remote_port| {
        let position = addresses.iter().position(|address| address == local)?;
        let local = u8::try_from(position).ok()?;
        Some(FlowKey { slot: slot.0, local, protocol: original.protocol, local_port, remote_port, remote })
    };
    let icmp = matches!(original.protocol, 1 | 58);
    // What a pod sends is the original tuple before translation; what reaches a pod is the reply tuple turned round. An
    // ICMP identifier stands on the pod's side whoever asked.
    let as_client = key(&original.source, original.source_port, original.destination, original.destination_port);
    let (server_port, client_port) = if icmp { (original.source_port, 0) } else { (reply.source_port, reply.destination_port) };
    let as_server = key(&reply.source, server_port, reply.destination, client_port);
    let open = *open;
    [as_client.map(|key| (key, state | flow_state::OPENED_BY_POD)), as_server.map(|key| (key, state))]
        .into_iter()
        .flatten()
        .filter(move |_| open)
}
