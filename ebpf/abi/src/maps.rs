//! The other maps: interfaces, endpoints, addresses, counters, settings.

use crate::map_data;

/// Names of the maps in the object and of their pins.
pub mod map_name {
    /// ARRAY of [`super::Interface`] by the low bits of the interface index; behind these places are those of [`INTERFACES_FAR`].
    pub const INTERFACES: &str = "INTERFACES";
    /// HASH by interface index of places in [`INTERFACES`], for those whose own place is taken.
    pub const INTERFACES_FAR: &str = "INTERFACES_FAR";
    /// ARRAY of [`super::Endpoint`] by slot.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// HASH of the position in the endpoint's address list by [`super::OwnKey`].
    pub const OWN: &str = "OWN";
    /// HASH of [`super::AddressValue`] by [`super::AddressKey`]. One for both families: a cluster's pods have one of them, and the
    /// kernel takes its time for each bucket.
    pub const ADDRESSES: &str = "ADDRESSES";
    /// LPM trie of identities by IPv4 prefix.
    pub const CIDRS4: &str = "CIDRS4";
    /// LPM trie of identities by IPv6 prefix.
    pub const CIDRS6: &str = "CIDRS6";
    /// LPM trie of [`crate::VerdictValue`] by [`crate::VerdictKey`].
    pub const VERDICTS: &str = "VERDICTS";
    /// HASH of [`crate::FlowEntry`] by [`crate::FlowKey4`].
    pub const FLOWS4: &str = "FLOWS4";
    /// HASH of [`crate::FlowEntry`] by [`crate::FlowKey6`].
    pub const FLOWS6: &str = "FLOWS6";
    /// ARRAY of u64 by slot: flows ever inserted by the programs.
    pub const FLOWS_INSERTED: &str = "FLOWS_INSERTED";
    /// ARRAY of u64 by slot: flows ever removed by the agent (seeded ones count as removed before they are inserted).
    pub const FLOWS_REMOVED: &str = "FLOWS_REMOVED";
    /// LRU_HASH of [`crate::FragmentPorts`] by [`crate::FragmentKey`].
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// PERCPU_ARRAY of [`super::Counters`] by slot.
    pub const COUNTERS: &str = "COUNTERS";
    /// PERCPU_ARRAY of u64 by [`super::stat`].
    pub const STATS: &str = "STATS";
    /// ARRAY with one u32 that grows whenever what an address means or a verdict has changed, after the change.
    pub const GENERATION: &str = "GENERATION";
    /// ARRAY with one [`super::Config`].
    pub const CONFIG: &str = "CONFIG";
    /// RINGBUF of [`crate::Event`].
    pub const EVENTS: &str = "EVENTS";
    /// RINGBUF of [`crate::PodFrame`].
    pub const NAMES: &str = "NAMES";
}

/// Places of [`map_name::INTERFACES`] that interfaces have by their index; a power of two.
pub const INTERFACE_PLACES: u32 = 16_384;

/// Places behind these, for interfaces that find their own taken.
pub const FAR_PLACES: u32 = ENDPOINT_SLOTS;

/// Entries of [`map_name::ENDPOINTS`] and the arrays beside it. EC2's largest instances run 737 pods.
pub const ENDPOINT_SLOTS: u32 = 4_096;

/// What the programs know of a host veth. All zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Interface {
    /// The interface's index: says whether this place of the array is its own.
    pub if_index: u32,
    /// The pod.
    pub slot: u16,
    /// [`interface_flag`].
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
    /// Where keys of IPv4 flows begin: [`crate::flow_head`] with the position of `ipv4` in the endpoint's address list.
    pub head4: u32,
    /// The same for `ipv6`.
    pub head6: u32,
    /// The address behind this veth; 0 if it has none of this family.
    pub ipv4: u32,
    /// Zero.
    pub reserved2: u32,
    /// The address behind this veth; zero if it has none of this family.
    pub ipv6: [u32; 4],
}

/// Bits of [`Interface::flags`].
pub mod interface_flag {
    /// The pod has further addresses; look in [`super::map_name::OWN`] before calling one foreign.
    pub const MORE_ADDRESSES: u8 = 1;
}

/// A pod's policy, in two halves: the agent writes the half that is not in use and then [`Self::flags`] in a second write that changes
/// a single byte (and the epoch when the pod goes), so that a packet sees the old policy or the new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Endpoint {
    /// [`endpoint_flag`]: of the policy in use, and which half it is in.
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
    /// What CPUs keep of the pod's flows stands as long as this stays the same. The first grows by one when the slot ceases to be a
    /// pod's, and is the agent's to write; the second when a packet changes a flow so that its next packets change it again, and is
    /// the programs'. (A policy that the agent writes in the same microseconds takes that back, for the rest of the tick.)
    pub epoch: [u8; 2],
    /// Zero.
    pub reserved2: [u8; 4],
    /// The halves.
    pub halves: [EndpointPolicy; 2],
}

impl Endpoint {
    /// The half that flags speak of.
    #[inline(always)]
    pub fn half(&self, flags: u8) -> &EndpointPolicy {
        &self.halves[usize::from(flags & endpoint_flag::SECOND != 0)]
    }

    /// The policy in use, and its flags.
    pub fn policy(&self) -> (u8, &EndpointPolicy) {
        (self.flags & !endpoint_flag::SECOND, self.half(self.flags))
    }

    /// The two records to write, one after the other, for a policy with these flags to be in use.
    pub fn change(mut self, flags: u8, policy: EndpointPolicy) -> [Self; 2] {
        let half = self.flags & endpoint_flag::SECOND ^ endpoint_flag::SECOND;
        self.halves[usize::from(half != 0)] = policy;
        let [pods, changes] = self.epoch;
        let pods = pods.wrapping_add(u8::from(flags & endpoint_flag::READY == 0));
        [self, Self { flags: flags & !endpoint_flag::SECOND | half, epoch: [pods, changes], ..self }]
    }
}

/// One half of an [`Endpoint`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndpointPolicy {
    /// Never 0 of a pod.
    pub revision: u32,
    /// Policy sets by [`crate::direction`].
    pub policy: [u32; 2],
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flag {
    /// Ingress is isolated. Bit number = [`crate::direction::INGRESS`].
    pub const ISOLATED_INGRESS: u8 = 1;
    /// Egress is isolated. Bit number = [`crate::direction::EGRESS`].
    pub const ISOLATED_EGRESS: u8 = 2;
    /// Nothing is dropped for isolation, only told; what a rule denies is dropped.
    pub const AUDIT: u8 = 4;
    /// The slot is in use.
    pub const READY: u8 = 8;
    /// Egress rules speak of DNS names: copies of the DNS answers that the pod gets go to [`super::map_name::NAMES`], and of what it
    /// sends too early.
    pub const BY_NAME: u8 = 16;
    /// The second half is in use, else the first.
    pub const SECOND: u8 = 128;
}

/// An address of a pod, by its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct OwnKey {
    /// The pod's slot.
    pub slot: u32,
    /// 4 or 6.
    pub family: u32,
    /// The address, an IPv4 address in the first word.
    pub address: [u32; 4],
}

/// An address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct AddressKey {
    /// An IPv4 address in the first word.
    pub address: [u32; 4],
    /// 4 or 6.
    pub family: u32,
}

/// What an exact address is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct AddressValue {
    /// The identity, 0 for none.
    pub identity: u32,
    /// [`address_flag`].
    pub flags: u32,
}

/// Bits of [`AddressValue::flags`].
pub mod address_flag {
    /// `identity` was set for this address.
    pub const ADDRESS: u32 = 1;
    /// An address of the node itself: always passes.
    pub const NODE: u32 = 2;
    /// `identity` is that of a CIDR which is this one address: kept here because a hash costs the same whatever its size.
    pub const HOST_CIDR: u32 = 4;
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes with Ethernet headers.
    pub bytes: u64,
}

/// A pod's counters on one CPU: one cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Counters {
    /// By [`crate::direction`], then [`crate::verdict`] (what audit mode let pass counts as allowed).
    pub of: [[Counter; 2]; 2],
}

/// Indices of [`map_name::STATS`].
pub mod stat {
    /// An event found the ring full.
    pub const EVENTS_LOST: u32 = 0;
    /// A flow found the table full: its packets pass if policy allows them, each judged; its replies are judged too.
    pub const TABLE_FULL: u32 = 1;
    /// A flow found its pod at the cap: as above.
    pub const POD_CAP: u32 = 2;
    /// Packets without an interface or endpoint record.
    pub const NO_ENDPOINT: u32 = 3;
    /// A DNS answer found its ring full: the pod's connections to what it names are denied until it asks again.
    pub const NAMES_LOST: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

/// Settings that the programs read when a flow opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Config {
    /// [`config_flag`].
    pub flags: u32,
    /// Flows a pod may have at once.
    pub pod_flows: u32,
}

/// Bits of [`Config::flags`].
pub mod config_flag {
    /// Tell of flows that open.
    pub const TELL_ALLOWED: u32 = 1;
    /// Tell of denied packets, and of those that would be without audit mode.
    pub const TELL_DENIED: u32 = 2;
}

map_data!(
    Interface = 40,
    Endpoint = 32,
    EndpointPolicy = 12,
    OwnKey = 24,
    AddressKey = 20,
    AddressValue = 8,
    Counter = 16,
    Counters = 64,
    Config = 8
);
