//! What the programs tell the agent through the ring buffer.

use crate::map_data;

/// One judged packet: every denied one, and, when switched on, each that opened a flow. The reader adds the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Event {
    /// The pod; 0 if the interface is unknown.
    pub slot: u16,
    /// [`crate::direction`].
    pub direction: u8,
    /// [`event_verdict`].
    pub verdict: u8,
    /// [`reason`].
    pub reason: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// 4 or 6; 0 when the packet is neither.
    pub family: u8,
    /// TCP flags, ICMP type.
    pub flags: u8,
    /// The rule that decided, 0 for the default.
    pub rule: u32,
    /// The peer's identity.
    pub identity: u32,
    /// Bytes of the packet with its Ethernet header.
    pub length: u32,
    /// The pod's port, big-endian.
    pub local_port: [u8; 2],
    /// The peer's port, big-endian.
    pub remote_port: [u8; 2],
    /// The pod's end as in the packet, an IPv4 address in the first word.
    pub local: [u32; 4],
    /// The peer's end, an IPv4 address in the first word.
    pub remote: [u32; 4],
}

/// What happened to the packet of an [`Event`].
pub mod event_verdict {
    /// Dropped.
    pub const DENIED: u8 = 0;
    /// Passed, and opened a flow.
    pub const ALLOWED: u8 = 1;
    /// Passed only because the endpoint is in audit mode.
    pub const AUDITED: u8 = 2;
}

/// Why.
pub mod reason {
    /// A verdict of the policy, or the default of an isolated direction.
    pub const POLICY: u8 = 0;
    /// The pod sent from an address that is not its own.
    pub const SOURCE: u8 = 1;
    /// Headers are cut off or contradict themselves, or there are too many of them.
    pub const MALFORMED: u8 = 2;
    /// Neither IPv4, IPv6 nor ARP.
    pub const ETHERTYPE: u8 = 3;
    /// A fragment whose first fragment did not pass, or was not seen.
    pub const FRAGMENT: u8 = 4;
    /// The interface has no record: the agent repairs this when it starts.
    pub const NO_ENDPOINT: u8 = 5;
    /// Passed: not isolated, an own address, the node, or neighbour discovery.
    pub const EXEMPT: u8 = 6;
}

/// Bytes of a frame that are copied at most: one less than a power of two. DNS answers over UDP are shorter (RFC 9715 asks for at
/// most 1,400), and so is a segment of one over TCP, unless several were put together on the way; then the connection teaches
/// nothing more.
pub const FRAME_BYTES: usize = 8_191;

/// A frame that the programs copy for the agent; a record ends with the frame's last byte that was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PodFrame {
    /// The pod.
    pub slot: u16,
    /// Bytes of `frame` that were copied.
    pub length: u16,
    /// [`frame_kind`].
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The frame from its Ethernet header on.
    pub frame: [u8; FRAME_BYTES + 1],
}

/// Bytes of [`PodFrame`] in front of the frame.
pub const FRAME_HEAD: usize = 8;

/// Why a [`PodFrame`] was copied.
pub mod frame_kind {
    /// The pod got it from port 53 in a flow that it had opened, and rules of the pod speak of DNS names.
    pub const ANSWER: u8 = 0;
    /// The pod sent it, and it was dropped while answers waited for the agent: it may have been allowed by one of them.
    pub const EARLY: u8 = 1;
}

map_data!(Event = 56, PodFrame = 8_200);
