//! The vocabulary between decision and kernel: what is there, and the operations that change it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use super::branch::vlan_of_table;
use super::names::MAIN_TABLE;
use crate::ids::Mac;

/// What was read of a network namespace.
///
/// Rules must be read before routes: a pod's route is written before its rules, so a rule whose route is not in the
/// later dump belongs to no pod that is being added right now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostObserved {
    /// All interfaces.
    pub links: Vec<NodeIf>,
    /// All addresses.
    pub addresses: Vec<IfAddress>,
    /// The rules of both families.
    pub rules: Vec<Rule>,
    /// The unicast routes of both families, all tables but local.
    pub routes: Vec<Route>,
    /// The sysctls that the plan names (`net/ipv4/ip_forward`); one that the kernel lacks is absent.
    pub sysctls: BTreeMap<String, String>,
    /// The fingerprints that our nft table carries, see [`nft`](super::nft); `None`: there is no such table.
    pub nft: Option<NftObserved>,
    /// The same of the family `ip6`.
    pub nft_ipv6: Option<NftObserved>,
    /// The nft commands that remove what aws-node left, see [`takeover`](super::takeover).
    pub upstream: Vec<serde_json::Value>,
    /// The same for the old tables of iptables-legacy, a document each.
    pub upstream_legacy: Vec<String>,
}

/// What is known of our nft table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NftObserved {
    /// For each chain the comments of its rules, in order.
    pub chains: BTreeMap<String, Vec<String>>,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeIf {
    /// The kernel's number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; `None` for what is not Ethernet.
    pub mac: Option<Mac>,
    /// In bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The kind as `ip link` names it (`veth`, `vlan`), empty for hardware.
    pub kind: String,
}

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IfAddress {
    /// The interface's number.
    pub index: u32,
    /// Address and prefix length.
    pub address: IpNet,
    /// Scope global: not link-local or host.
    pub global: bool,
}

/// A unicast route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Route {
    /// Where to; `/0` is the default route.
    pub dst: IpNet,
    /// In which table.
    pub table: u32,
    /// Next hop; `None`: the destination is on the link (IPv4 scope link).
    pub via: Option<IpAddr>,
    /// Out of which interface; 0 when observed without one.
    pub index: u32,
}

/// A policy routing rule with action "look up a table".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Rule {
    /// IPv6 rules are a list of their own.
    pub ipv6: bool,
    /// Lower is earlier.
    pub priority: u32,
    /// Source.
    pub from: Option<IpNet>,
    /// Destination.
    pub to: Option<IpNet>,
    /// Packet mark and mask.
    pub mark: Option<(u32, u32)>,
    /// Incoming interface.
    pub iif: Option<String>,
    /// Number of the transport protocol.
    pub ip_proto: Option<u8>,
    /// The table.
    pub table: u32,
}

/// A VLAN interface to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VlanLink {
    /// The number of the interface that carries it.
    pub parent: u32,
    /// Its name.
    pub name: String,
    /// The 802.1Q tag.
    pub vlan_id: u16,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// One change of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NetOp {
    /// Makes a VLAN interface, up.
    AddVlan(VlanLink),
    /// Removes an interface; that it is gone already is no failure.
    DeleteLink {
        /// Its number.
        index: u32,
    },
    /// Sets an interface up.
    LinkUp {
        /// Its number.
        index: u32,
    },
    /// Sets its MTU.
    Mtu {
        /// Its number.
        index: u32,
        /// In bytes.
        mtu: u32,
    },
    /// Adds an address; IPv6 without duplicate address detection, with no connected route for the prefix.
    AddAddress {
        /// The interface's number.
        index: u32,
        /// Address and prefix length.
        address: IpNet,
    },
    /// Removes one.
    DeleteAddress {
        /// The interface's number.
        index: u32,
        /// Address and prefix length.
        address: IpNet,
    },
    /// Adds or replaces a route.
    ReplaceRoute(Route),
    /// Removes one.
    DeleteRoute(Route),
    /// Adds a rule; that it is there already is no failure.
    AddRule(Rule),
    /// Removes one; that it is gone already is no failure.
    DeleteRule(Rule),
    /// A permanent neighbour: nobody is asked with ARP or ND.
    Neighbour {
        /// The interface's number.
        index: u32,
        /// Whose.
        address: IpAddr,
        /// Its Ethernet address.
        mac: Mac,
    },
    /// Writes a sysctl.
    Sysctl {
        /// Path below `/proc/sys`.
        path: String,
        /// The value.
        value: String,
    },
    /// Replaces our nft table (or removes it) in one transaction: an `nft -j -f -` document.
    Nft {
        /// The document.
        document: String,
    },
    /// Removes aws-node's rules from a table of iptables-legacy: an `iptables-legacy-restore --noflush` document.
    Legacy {
        /// The document.
        document: String,
    },
}

// === impl HostObserved ===

impl HostObserved {
    /// The interface with this name.
    pub fn link_named(&self, name: &str) -> Option<&NodeIf> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The interface with this Ethernet address that is no veth or VLAN (those may copy an ENI's address).
    pub fn link_with_mac(&self, mac: Mac) -> Option<&NodeIf> {
        let matches = |link: &&NodeIf| link.mac == Some(mac) && link.kind != "vlan";
        self.links.iter().filter(matches).min_by_key(|link| (!link.kind.is_empty(), link.index))
    }
}

// === impl Rule ===

impl Rule {
    /// A rule without selectors.
    pub fn new(ipv6: bool, priority: u32, table: u32) -> Self {
        Self { ipv6, priority, from: None, to: None, mark: None, iif: None, ip_proto: None, table }
    }

    /// `from <address> lookup <table>`.
    pub fn from_host(priority: u32, address: IpAddr, table: u32) -> Self {
        Self { from: Some(address.into()), ..Self::new(address.is_ipv6(), priority, table) }
    }

    /// `to <address> lookup <table>`.
    pub fn to_host(priority: u32, address: IpAddr, table: u32) -> Self {
        Self { to: Some(address.into()), ..Self::new(address.is_ipv6(), priority, table) }
    }
}

// === impl NetOp ===

impl NetOp {
    /// Whether it is a route to a pod or of its branch, whose interface goes when the pod does.
    pub fn is_of_a_pod(&self) -> bool {
        let is_host = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
        let of_a_branch = |table: u32| vlan_of_table(table).is_some();
        match self {
            Self::ReplaceRoute(Route { dst, table, via, .. }) => {
                of_a_branch(*table) || (*table == MAIN_TABLE && via.is_none() && is_host(dst))
            }
            _ => false,
        }
    }

    /// What it changes, in one word.
    pub fn subject(&self) -> &'static str {
        match self {
            Self::AddVlan(_) | Self::DeleteLink { .. } | Self::LinkUp { .. } | Self::Mtu { .. } => "link",
            Self::AddAddress { .. } | Self::DeleteAddress { .. } => "address",
            Self::ReplaceRoute(_) | Self::DeleteRoute(_) => "route",
            Self::AddRule(_) | Self::DeleteRule(_) => "rule",
            Self::Neighbour { .. } => "neighbour",
            Self::Sysctl { .. } => "sysctl",
            Self::Nft { .. } => "nft",
            Self::Legacy { .. } => "iptables-legacy",
        }
    }

    /// Whether it takes something away: those come after all additions.
    pub fn removes(&self) -> bool {
        matches!(self, Self::DeleteAddress { .. } | Self::DeleteRoute(_) | Self::DeleteRule(_) | Self::DeleteLink { .. })
    }
}
