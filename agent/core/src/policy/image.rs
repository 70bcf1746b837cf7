//! The map image: what the kernel maps hold for the policies of this node, and the operations that lead from one image
//! to the next. The compiler makes it, [`PolicyMaps`] implementations (the kernel's maps, a model in tests) apply it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use stanchion_ebpf_abi::{VerdictKey, VerdictValue};

/// A pod's place in the endpoint array: 1 to 65,535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u16);

/// What the datapath knows of one local pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointImage {
    /// The pod's addresses: what it may send from, and what it is reached at.
    pub addresses: Vec<IpAddr>,
    /// Policy set of the ingress direction; `None`: not isolated, everything may come in.
    pub ingress: Option<u32>,
    /// Policy set of the egress direction; `None`: not isolated.
    pub egress: Option<u32>,
    /// Grows with every change that can revoke a flow of this pod; flow entries of an older revision are judged anew.
    pub revision: u32,
    /// Report what isolation would deny, deny only what a rule denies.
    pub audit: bool,
    /// Its egress rules speak of DNS names: the answers it gets are of interest.
    pub by_name: bool,
}

impl EndpointImage {
    /// Whether ingress and egress are isolated.
    pub fn isolated(&self) -> [bool; 2] {
        [self.ingress.is_some(), self.egress.is_some()]
    }
}

/// Everything that the maps hold. A policy set is immutable once an endpoint points at it, unless the change is
/// monotone in every packet's verdict; see the order of operations in the compiler's diff.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapImage {
    /// Exact addresses (pods) to identities.
    pub addresses: BTreeMap<IpAddr, u32>,
    /// Elementary CIDR classes to identities, looked up by longest prefix when no exact address is found.
    pub cidrs: BTreeMap<IpNet, u32>,
    /// Verdicts by key and prefix length in bits.
    pub verdicts: BTreeMap<(VerdictKey, u32), VerdictValue>,
    /// Local pods.
    pub endpoints: BTreeMap<Slot, EndpointImage>,
    /// The node's own addresses: traffic between them and its pods always passes.
    pub node_addresses: Vec<IpAddr>,
}

/// One write to the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Exact address to identity.
    SetAddress(IpAddr, u32),
    /// Forget it.
    RemoveAddress(IpAddr),
    /// CIDR class to identity.
    SetCidr(IpNet, u32),
    /// Forget it.
    RemoveCidr(IpNet),
    /// A verdict.
    SetVerdict(VerdictKey, u32, VerdictValue),
    /// Forget it.
    RemoveVerdict(VerdictKey, u32),
    /// A pod's record, atomically.
    SetEndpoint(Slot, EndpointImage),
    /// The slot is free again.
    RemoveEndpoint(Slot),
    /// An address of the node.
    SetNodeAddress(IpAddr),
    /// Not the node's any more.
    RemoveNodeAddress(IpAddr),
}

/// A write that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("map {map}: {operation}: {message}{refusal}")]
pub struct MapError {
    /// The map.
    pub map: &'static str,
    /// What was tried.
    pub operation: String,
    /// What it was for want of.
    pub refusal: Refusal,
    /// What the kernel said.
    pub message: String,
}

/// What a write was refused for want of. Each is told and tried again in the same way: the one who asks for more room is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The map has as many entries as it may.
    Full,
    /// The kernel has no memory for an entry, or the agent's control group may have no more.
    NoMemory,
    /// Anything else.
    Other,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => " (the map is full)",
            Self::NoMemory => " (no memory for it: the node has none free, or the agent's memory limit is reached)",
            Self::Other => "",
        })
    }
}

/// The kernel's policy maps, or a model of them.
pub trait PolicyMaps: Send {
    /// Applies the operations in order; stops at the first failure and says which (its index).
    fn apply(&mut self, ops: &[MapOp]) -> Result<(), (usize, MapError)>;
    /// Reads everything back, for a restart that changes nothing.
    fn read(&self) -> Result<MapImage, MapError>;
}
