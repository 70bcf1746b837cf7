//! What the node's network shall be.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::branch::BranchPod;
use super::names::{DEFAULT_VETH_PREFIX, host_veth_name};
use crate::ids::{EniId, Mac, PodName};

/// `to <pod> lookup main`.
pub const PRIORITY_TO_POD: u32 = 512;
/// `fwmark 0x80/0x80 lookup main`.
pub const PRIORITY_MARK: u32 = 1024;
/// `to <external service CIDR> lookup main`.
pub const PRIORITY_EXTERNAL_SERVICE: u32 = 1535;
/// `from <pod> lookup <table of its ENI>`.
pub const PRIORITY_FROM_POD: u32 = 1536;
/// `from <ENI primary address> lookup <table>`.
pub const PRIORITY_FROM_ENI: u32 = 32_765;
/// The VPC router's link-local address for IPv6 in every subnet, beside one that is made of its Ethernet address ("VPC router" in the
/// VPC user guide).
pub const V6_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);
/// `AWS_VPC_K8S_CNI_CONNMARK` when nobody says otherwise.
pub const DEFAULT_MARK: u32 = 0x80;
/// `AWS_VPC_ENI_MTU` when nobody says otherwise: jumbo frames, the most a VPC carries.
pub const DEFAULT_MTU: u32 = 9001;

/// The desired state of the host network: a pure function of the datastore and the settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostPlan {
    /// The ENIs that the agent manages, the primary one included.
    pub enis: Vec<EniPlan>,
    /// Pods that hold an address. Their routes and rules are healed while their veth lives.
    pub pods: Vec<PodHost>,
    /// Pods with security groups of their own: their VLAN interfaces and tables. In standard mode they are among `pods` too.
    pub branches: Vec<BranchPod>,
    /// Pods with security groups may be in strict mode: the rule for the node's own addresses stands behind theirs.
    pub strict_branches: bool,
    /// The host veths' name prefix.
    pub veth_prefix: String,
    /// Source NAT of what leaves the VPC; `None` with `AWS_VPC_K8S_CNI_EXTERNALSNAT=true` and on IPv6 nodes.
    pub snat: Option<Snat>,
    /// Answers of node-port connections leave by the primary ENI (`AWS_VPC_CNI_NODE_PORT_SUPPORT`).
    pub node_port_support: bool,
    /// The bit of the packet and connection mark that says "by the primary ENI"; used as its own mask.
    pub mark: u32,
    /// `AWS_EXTERNAL_SERVICE_CIDRS`: always by the primary ENI.
    pub external_service_cidrs: Vec<Ipv4Net>,
    /// IPv6 node: forwarding and router advertisements are set accordingly, IPv4 rules and NAT are not wanted.
    pub ipv6: bool,
    /// Pods reach the family that the cluster does not have through the node's address.
    pub egress: Option<Egress>,
    /// `net.ipv4.tcp_early_demux`; 0 lets the kubelet probe pods with a branch ENI in strict mode.
    pub tcp_early_demux: bool,
}

/// An ENI and how its interface and table shall be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EniPlan {
    /// Its id, for reports only: the interface is found by `mac`.
    pub id: EniId,
    /// The interface's Ethernet address.
    pub mac: Mac,
    /// What it is for.
    pub role: EniRole,
    /// The attachment's device index.
    pub device_index: u32,
    /// The network card it is attached to.
    pub network_card: u32,
    /// Its primary address with the subnet's length (`10.0.1.7/24`).
    pub ipv4: Option<Ipv4Net>,
    /// Its first IPv6 address with the subnet's length.
    pub ipv6: Option<Ipv6Net>,
    /// Its routing table, see [`eni_route_table`](super::eni_route_table).
    pub table: u32,
    /// In bytes.
    pub mtu: u32,
}

/// What an ENI is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum EniRole {
    /// The instance's first: its addresses, routes and state belong to the operating system; only the MTU is set.
    Primary,
    /// Carries pods.
    Secondary,
    /// Carries branch ENIs of pods with security groups; no `from` rule of its own.
    Trunk,
}

/// The host side of a pod: one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodHost {
    /// The address.
    pub address: IpAddr,
    /// The host end's name.
    pub host_if: String,
    /// The routing table of the address's ENI; main needs no `from` rule.
    pub table: u32,
}

/// Source NAT of what leaves the VPC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snat {
    /// The node's primary address.
    pub to: Ipv4Addr,
    /// Destinations that see the pod's own address: the VPC's CIDRs and `AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS`.
    pub bypass: Vec<Ipv4Net>,
    /// How ports are chosen.
    pub randomize: Randomize,
}

/// Source NAT for the pods' second address family: IPv4 in an IPv6 cluster (`ENABLE_V4_EGRESS`), or IPv6 in an IPv4 cluster
/// (`ENABLE_V6_EGRESS`). The pods' addresses are the node's own business: nothing from outside may open a connection to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Egress {
    /// The pods' addresses, see [`egress`](super::egress).
    pub range: IpNet,
    /// The node's address of that family.
    pub to: IpAddr,
    /// How ports are chosen.
    pub randomize: Randomize,
}

/// `AWS_VPC_K8S_CNI_RANDOMIZESNAT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Randomize {
    /// `prng`: a random free port (`--random-fully`).
    #[default]
    Fully,
    /// `hashrandom`: a keyed hash of the flow (`--random`).
    Hash,
    /// `none`: the pod's port if it is free.
    No,
}

// === impl HostPlan ===

impl Default for HostPlan {
    fn default() -> Self {
        Self {
            enis: Vec::new(),
            pods: Vec::new(),
            branches: Vec::new(),
            strict_branches: false,
            veth_prefix: DEFAULT_VETH_PREFIX.to_owned(),
            snat: None,
            node_port_support: true,
            mark: DEFAULT_MARK,
            external_service_cidrs: Vec::new(),
            ipv6: false,
            egress: None,
            tcp_early_demux: true,
        }
    }
}

impl HostPlan {
    /// The primary ENI.
    pub fn primary(&self) -> Option<&EniPlan> {
        self.enis.iter().find(|eni| eni.role == EniRole::Primary)
    }

    /// Whether the mark's rule is wanted: node ports or SNAT use it, on IPv4 only.
    pub fn uses_mark(&self) -> bool {
        !self.ipv6 && (self.node_port_support || self.snat.is_some())
    }
}

// === impl PodHost ===

impl PodHost {
    /// The host side of attachment `index` of `pod`.
    pub fn new(veth_prefix: &str, pod: &PodName, index: usize, address: IpAddr, table: u32) -> Self {
        Self { address, host_if: host_veth_name(veth_prefix, pod, index), table }
    }
}
