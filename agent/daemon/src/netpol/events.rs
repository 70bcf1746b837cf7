//! Events of the ring buffer, given the names of pods and rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use stanchion_core::ids::PodName;
use stanchion_ebpf_abi::{Event, direction, event_verdict, ipv4_octets, ipv6_octets, map_name, reason};
use tokio::time::{Instant, sleep_until};

use super::handle::{FlowDirection, FlowRecord, FlowVerdict};
use super::object::{LoadError, Loaded};
use super::ring::Ring;

/// Events read in one go, so that a flood cannot keep the actor from its mailbox; the ring holds about 8,000.
const BATCH: usize = 2_048;

/// Pause after the ring was emptied, so that a flood wakes the agent ten times a second and not for each packet.
const PAUSE: Duration = Duration::from_millis(100);

/// The ring's reader.
pub(super) struct Events {
    ring: Ring,
    not_before: Instant,
}

impl Events {
    /// Must be called in the runtime that will wait.
    pub(super) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self { ring: Ring::new(loaded, map_name::EVENTS)?, not_before: Instant::now() })
    }

    /// Returns when there is something to take and the pause is over.
    pub(super) async fn wait(&self) {
        sleep_until(self.not_before).await;
        self.ring.wait().await;
    }

    /// Takes what is there, up to a batch.
    pub(super) fn take(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let drained = self.ring.take(BATCH, |record| events.extend(event(record)));
        if drained {
            self.not_before = Instant::now() + PAUSE;
        }
        events
    }
}

/// A record of the ring. One of another size is of another layout's program: none is left attached, but a record may be.
fn event(record: &[u8]) -> Option<Event> {
    // SAFETY: `Event` is plain data of that size; the ring gives no promise of alignment.
    (record.len() == size_of::<Event>()).then(|| unsafe { std::ptr::read_unaligned(record.as_ptr().cast::<Event>()) })
}

/// The addresses of an event: `(local, remote)`; unspecified where the packet had none.
fn ends(event: &Event) -> (IpAddr, IpAddr) {
    let address = |words: [u32; 4]| -> IpAddr {
        if event.family == 6 { Ipv6Addr::from(ipv6_octets(words)).into() } else { Ipv4Addr::from(ipv4_octets(words[0])).into() }
    };
    (address(event.local), address(event.remote))
}

/// Makes a record of an event. `pod` is the endpoint's, `pod_at` knows the pods of other addresses, `rule` are the names of
/// its rule id.
pub(super) fn record(
    event: &Event,
    time: SystemTime,
    pod: Option<&PodName>,
    pod_at: impl Fn(IpAddr) -> Option<PodName>,
    (policy, rule): (String, String),
) -> FlowRecord {
    let (local, remote) = ends(event);
    let ports = (u16::from_be_bytes(event.local_port), u16::from_be_bytes(event.remote_port));
    let ingress = event.direction == direction::INGRESS;
    let ((source, destination), (source_port, destination_port)) =
        if ingress { ((remote, local), (ports.1, ports.0)) } else { ((local, remote), ports) };
    FlowRecord {
        time,
        verdict: match event.verdict {
            event_verdict::ALLOWED => FlowVerdict::Allowed,
            event_verdict::AUDITED => FlowVerdict::Audited,
            _ => FlowVerdict::Denied,
        },
        direction: if ingress { FlowDirection::Ingress } else { FlowDirection::Egress },
        pod: pod.cloned(),
        peer: pod_at(remote),
        source,
        destination,
        protocol: protocol_name(event),
        source_port,
        destination_port,
        length: event.length,
        policy,
        rule,
        reason: match event.reason {
            reason::POLICY => "policy",
            reason::SOURCE => "source",
            reason::MALFORMED => "malformed",
            reason::ETHERTYPE => "ethertype",
            reason::FRAGMENT => "fragment",
            reason::NO_ENDPOINT => "no-endpoint",
            _ => "exempt",
        },
    }
}

fn protocol_name(event: &Event) -> String {
    match (event.family, event.protocol) {
        (0, _) => "none".to_owned(),
        (_, 6) => "TCP".to_owned(),
        (_, 17) => "UDP".to_owned(),
        (_, 132) => "SCTP".to_owned(),
        (4, 1) => "ICMP".to_owned(),
        (6, 58) => "ICMPv6".to_owned(),
        (_, number) => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A version apart, or a kernel gone wrong: whatever the bytes are, they are a flow that can be shown, or nothing.
        #[test]
        fn any_bytes_of_the_ring_are_a_flow_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..120), whole in any::<bool>()) {
            let mut bytes = bytes;
            if whole {
                bytes.resize(size_of::<Event>(), 7);
            }
            // Where the ring has it, at any alignment.
            for shift in 0..4 {
                let shifted = [vec![0; shift], bytes.clone()].concat();
                let Some(event) = event(&shifted[shift..]) else {
                    prop_assert_ne!(bytes.len(), size_of::<Event>());
                    continue;
                };
                let flow = record(&event, SystemTime::UNIX_EPOCH, None, |_| None, Default::default());
                prop_assert_eq!(flow.source.is_ipv6(), event.family == 6);
                prop_assert_eq!(flow.direction == FlowDirection::Ingress, event.direction == direction::INGRESS);
                prop_assert!(!flow.protocol.is_empty() && !flow.reason.is_empty());
                // What was not seen to pass was denied.
                let passed = [event_verdict::ALLOWED, event_verdict::AUDITED].contains(&event.verdict);
                prop_assert_eq!(flow.verdict == FlowVerdict::Denied, !passed);
            }
        }
    }
}
