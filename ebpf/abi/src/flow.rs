//! The flow table: one entry for both directions of a connection of one pod.

use crate::map_data;

/// Key of an IPv4 flow, the same for both directions: the pod's end is always `local`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey4 {
    /// The pod.
    pub slot: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Which of the pod's addresses: its position in the endpoint's list.
    pub local: u8,
    /// The pod's port, big-endian; the identifier of an ICMP query.
    pub local_port: [u8; 2],
    /// The peer's port, big-endian; 0 for ICMP and protocols without ports.
    pub remote_port: [u8; 2],
    /// The peer, see [`crate::ipv4_word`].
    pub remote: u32,
}

/// Key of an IPv6 flow; see [`FlowKey4`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey6 {
    /// The pod.
    pub slot: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Which of the pod's addresses: its position in the endpoint's list.
    pub local: u8,
    /// The pod's port, big-endian; the identifier of an ICMP query.
    pub local_port: [u8; 2],
    /// The peer's port, big-endian; 0 for ICMPv6 and protocols without ports.
    pub remote_port: [u8; 2],
    /// The peer, see [`crate::ipv6_words`].
    pub remote: [u32; 4],
}

/// The first four bytes of a flow key without its protocol, which stands in the third.
pub const fn flow_head(slot: u16, local: u8) -> u32 {
    let [low, high] = slot.to_ne_bytes();
    u32::from_ne_bytes([low, high, 0, local])
}

/// What is known of a flow. It exists only because a packet that opened it passed policy, or because it was seeded from the
/// kernel's connection tracking; then its revision is 0, which no endpoint ever has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowEntry {
    /// The endpoint's revision under which the opening direction was allowed. Another one: judge that direction again.
    pub revision: u32,
    /// When a packet was last seen, in ticks (`1 << TICK_SHIFT` jiffies, a constant of the loaded program); written only when it changes.
    pub seen: u32,
    /// The rule that allowed it; 0 for none (not isolated).
    pub rule: u32,
    /// Idle ticks after which the entry counts as absent.
    pub timeout: u16,
    /// [`flow_state`].
    pub state: u8,
    /// Zero.
    pub reserved: u8,
}

/// Bits of [`FlowEntry::state`].
pub mod flow_state {
    /// The pod opened the flow; else the peer did.
    pub const OPENED_BY_POD: u8 = 1;
    /// A packet of the other direction was seen.
    pub const REPLIED: u8 = 2;
    /// TCP: the pod sent FIN.
    pub const FIN_POD: u8 = 4;
    /// Not TCP: the opener spoke again after a reply.
    pub const STREAM: u8 = 4;
    /// TCP: the peer sent FIN.
    pub const FIN_PEER: u8 = 8;
    /// TCP: either end sent RST.
    pub const RESET: u8 = 16;
    /// Written by the agent from the kernel's connection tracking.
    pub const SEEDED: u8 = 32;
}

/// Key of a fragmented datagram whose first fragment passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey {
    /// The pod.
    pub slot: u16,
    /// [`crate::direction`].
    pub direction: u8,
    /// Protocol of the IPv4 header, next header of the IPv6 fragment header.
    pub protocol: u8,
    /// Identification as in the packet (IPv4: the upper half zero).
    pub identification: u32,
    /// Source, an IPv4 address in the first word.
    pub source: [u32; 4],
    /// Destination, an IPv4 address in the first word.
    pub destination: [u32; 4],
}

/// What the first fragment said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentPorts {
    /// The transport protocol, after extension headers.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// As in [`FlowKey4`].
    pub local_port: [u8; 2],
    /// As in [`FlowKey4`].
    pub remote_port: [u8; 2],
}

map_data!(FlowKey4 = 12, FlowKey6 = 24, FlowEntry = 16, FragmentKey = 40, FragmentPorts = 8);

/// Idle times after which an entry counts as absent, in ticks (1.0 to 1.7 seconds each, see `TICK_SHIFT` of the programs).
pub mod timeout {
    /// TCP, nothing came back yet.
    pub const TCP_OPENING: u16 = 60;
    /// TCP, both ends spoke: six hours.
    pub const TCP_ESTABLISHED: u16 = 21_600;
    /// TCP, one end has closed.
    pub const TCP_HALF_CLOSED: u16 = 3_600;
    /// TCP, both ends have closed: the last acknowledgements and repeated FINs.
    pub const TCP_CLOSED: u16 = 30;
    /// TCP after RST; a later packet without RST takes this back, as a reset can be forged.
    pub const TCP_RESET: u16 = 10;
    /// Datagrams in one direction only.
    pub const DATAGRAM_OPENING: u16 = 60;
    /// UDP, a question and its answer: as nf_conntrack has it.
    pub const DATAGRAM_EXCHANGE: u16 = 30;
    /// UDP, the opener spoke again after a reply.
    pub const UDP: u16 = 180;
    /// ICMP queries.
    pub const ICMP: u16 = 30;
    /// SCTP and every other protocol, in both directions.
    pub const OTHER: u16 = 600;
}
