//! What the eBPF programs and the agent both know: keys, values, events and constants.
//!
//! Every struct is `repr(C)`, without padding, and pinned in size by a test. A change of any of them is a change of
//! [`LAYOUT_VERSION`], which is part of the pin path.
#![no_std]

mod event;
mod flow;
mod maps;

pub use event::{Event, FRAME_BYTES, FRAME_HEAD, PodFrame, event_verdict, frame_kind, reason};
pub use flow::{FlowEntry, FlowKey4, FlowKey6, FragmentKey, FragmentPorts, flow_head, flow_state, timeout};
pub use maps::{
    AddressKey, AddressValue, Config, Counter, Counters, ENDPOINT_SLOTS, Endpoint, EndpointPolicy, FAR_PLACES, INTERFACE_PLACES, Interface,
    OwnKey, address_flag, config_flag, endpoint_flag, interface_flag, map_name, stat,
};

/// A struct that may be copied to and from a kernel map byte by byte.
///
/// # Safety
/// The type is `repr(C)`, without padding, and every bit pattern is a value of it.
pub unsafe trait MapData: Copy + 'static {}

/// Marks the types of this crate, and checks that none has padding: the sum of the fields is the size.
macro_rules! map_data {
    ($($type:ty = $size:literal),+ $(,)?) => {
        $(
            // SAFETY: integers and arrays of them only; the size below leaves no room for padding.
            unsafe impl $crate::MapData for $type {}
            const _: () = assert!(size_of::<$type>() == $size);
        )+
    };
}
pub(crate) use map_data;

/// Version of everything in this crate; maps are pinned under `…/stanchion/v<LAYOUT_VERSION>/`.
pub const LAYOUT_VERSION: u32 = 6;

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

map_data!(VerdictKey = 12, VerdictValue = 8);

/// An IPv4 address as the maps hold it: network byte order in memory, so a load from a packet compares equal.
pub const fn ipv4_word(octets: [u8; 4]) -> u32 {
    u32::from_ne_bytes(octets)
}

/// The octets of [`ipv4_word`].
pub const fn ipv4_octets(word: u32) -> [u8; 4] {
    word.to_ne_bytes()
}

/// An IPv6 address as the maps hold it: four words, each in network byte order in memory.
pub const fn ipv6_words(o: [u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
        u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
        u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
        u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
    ]
}

/// The octets of [`ipv6_words`].
pub const fn ipv6_octets(words: [u32; 4]) -> [u8; 16] {
    let [a, b, c, d] = [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        let four = [10, 0, 0, 7];
        assert_eq!(ipv4_octets(ipv4_word(four)), four);
        let six: [u8; 16] = core::array::from_fn(|i| i as u8 * 17);
        assert_eq!(ipv6_octets(ipv6_words(six)), six);
    }

    #[test]
    fn the_verdict_prefixes_end_at_field_borders() {
        assert_eq!(VERDICT_PREFIX_ANY as usize, 8 * core::mem::offset_of!(VerdictKey, protocol));
        assert_eq!(VERDICT_PREFIX_PROTOCOL as usize, 8 * core::mem::offset_of!(VerdictKey, port));
        assert_eq!(VERDICT_PREFIX_PORT as usize, 8 * size_of::<VerdictKey>());
    }
}
