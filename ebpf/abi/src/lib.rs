//! What the eBPF programs and the agent both know: keys, values, events and constants.
//!
//! Every struct is `repr(C)`, without padding, and pinned in size by a test. A change of any of them is a change of
//! [`LAYOUT_VERSION`], which is part of the pin path.
#![no_std]

/// Version of everything in this crate; maps are pinned under `…/stanchion/v<LAYOUT_VERSION>/`.
pub const LAYOUT_VERSION: u32 = 1;

/// Direction of a packet as the pod sees it.
pub mod direction {
    /// Into the pod (tc egress of the host veth).
    pub const INGRESS: u8 = 0;
    /// Out of the pod (tc ingress of the host veth).
    pub const EGRESS: u8 = 1;
}

/// Verdicts as stored in the verdict map.
pub mod verdict {
    /// Drop.
    pub const DENY: u8 = 0;
    /// Let pass.
    pub const ALLOW: u8 = 1;
}

/// The identity of an address that is in no class of any policy: only wildcard verdicts apply.
pub const IDENTITY_UNKNOWN: u32 = 0;

/// Protocol value of a verdict that speaks for every protocol.
pub const PROTOCOL_ANY: u8 = 0;

/// Key of the verdict trie, most significant first: an entry may be as short as policy + identity + direction
/// ([`VERDICT_PREFIX_ANY`] bits), end with the protocol ([`VERDICT_PREFIX_PROTOCOL`]), or cover a block of ports (up to
/// 16 bits more). The program looks up the packet's identity first; only if nothing is found, identity 0. So an entry
/// of a specific identity is final for whatever it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct VerdictKey {
    /// The policy set of an endpoint and direction.
    pub policy: u32,
    /// The peer's identity, or 0 for any peer.
    pub identity: u32,
    /// [`direction`].
    pub direction: u8,
    /// IP protocol number; not looked at by entries of [`VERDICT_PREFIX_ANY`] bits.
    pub protocol: u8,
    /// Destination port, big-endian; ICMP and other protocols without ports: 0.
    pub port: [u8; 2],
}

/// Prefix length of an entry for all protocols and ports.
pub const VERDICT_PREFIX_ANY: u32 = 72;
/// Prefix length of an entry for all ports of a protocol.
pub const VERDICT_PREFIX_PROTOCOL: u32 = 80;
/// Prefix length of an entry for one port.
pub const VERDICT_PREFIX_PORT: u32 = 96;

/// Value of the verdict trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct VerdictValue {
    /// The rule that decided, for events and `explain`; 0 is the default of the isolated direction.
    pub rule: u32,
    /// [`verdict`].
    pub verdict: u8,
    /// Zero.
    pub reserved: [u8; 3],
}
