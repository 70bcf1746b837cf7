//! The words of the pool planner: what it is told, what it answers. The decisions are in [`super::decide`].

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use serde::Serialize;

use super::memory::Memory;
use super::store::{Datastore, PoolMode};
use super::types::Time;
use crate::cloud::{AddressRequest, Ec2Action};
use crate::config::PoolConfig;
use crate::ids::{EniId, SecurityGroupId, SubnetId};
use crate::limits::InstanceLimits;

/// How much to keep ready: aws-node's variables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Targets {
    /// What pods get.
    pub mode: PoolMode,
    /// WARM_ENI_TARGET.
    pub warm_eni: u32,
    /// WARM_IP_TARGET; 0 is unset.
    pub warm_ip: u32,
    /// MINIMUM_IP_TARGET; 0 is unset.
    pub minimum_ip: u32,
    /// WARM_PREFIX_TARGET.
    pub warm_prefix: u32,
    /// One ENI of card 0 is kept for the trunk until one is attached.
    pub reserve_trunk: bool,
}

impl Targets {
    /// What the settings ask for on this type. Prefix delegation falls back to single addresses where the type has none;
    /// IPv6 cannot, and the error says so.
    ///
    /// # Errors
    /// A sentence for the start's refusal.
    pub fn from_config(config: &PoolConfig, limits: &InstanceLimits) -> Result<Self, String> {
        let mode = match (config.ipv6, config.prefix_delegation && limits.supports_prefixes()) {
            (true, true) => PoolMode::Ipv6Prefixes,
            (true, false) => return Err(format!("IPv6 needs prefix delegation, which {} does not have", limits.instance_type)),
            (false, true) => PoolMode::Prefixes,
            (false, false) => PoolMode::SecondaryIps,
        };
        Ok(Self {
            mode,
            warm_eni: config.warm_eni_target,
            warm_ip: config.warm_ip_target,
            minimum_ip: config.minimum_ip_target,
            warm_prefix: config.warm_prefix_target,
            reserve_trunk: config.pod_eni && limits.supports_trunk(),
        })
    }
}

/// What the instance can hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolLimits {
    /// ENIs each managed card may have, unmanaged ones among them, after MAX_ENI: (card, ENIs).
    pub cards: Vec<(u16, u16)>,
    /// Slots for addresses or prefixes on an ENI besides its own address.
    pub slots_per_eni: u16,
    /// Pods that the node may run: warm targets do not grow the pool beyond it.
    pub max_pods: u32,
}

impl PoolLimits {
    /// Addresses that the managed cards can hold at most.
    pub fn addresses(&self, mode: PoolMode) -> u64 {
        let per_slot = if mode == PoolMode::Prefixes { u64::from(crate::limits::PREFIX_ADDRESSES) } else { 1 };
        self.cards.iter().map(|(_, enis)| u64::from(*enis) * u64::from(self.slots_per_eni) * per_slot).sum()
    }
}

/// Pods that need an address of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Demand {
    /// ADD requests that wait.
    pub waiting: u32,
    /// Pods that the scheduler has bound to this node and that have not asked yet.
    pub bound: u32,
}

/// Where new ENIs go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Subnets in the order of preference, and the security groups.
    Subnets {
        /// At least one.
        subnets: Vec<SubnetId>,
        /// Sorted.
        security_groups: Vec<SecurityGroupId>,
    },
    /// Nowhere, and why (no ENIConfig for this node).
    Nowhere(String),
}

/// Whether ENIs and addresses may be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Provisioning {
    /// Yes.
    #[default]
    On,
    /// DISABLE_NETWORK_RESOURCE_PROVISIONING or ENABLE_IMDS_ONLY_MODE: something else provides them.
    Disabled,
    /// The node is cordoned: nothing is attached and nothing released.
    Unschedulable,
    /// The agent is stopping.
    Terminating,
}

/// Everything a plan depends on.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// What is there.
    pub store: &'a Datastore,
    /// Actions that were started and have not ended.
    pub in_flight: &'a [Action],
    /// EC2's earlier answers.
    pub memory: &'a Memory,
    /// How much to keep.
    pub targets: &'a Targets,
    /// What the instance can hold.
    pub limits: &'a PoolLimits,
    /// Who needs addresses, by card.
    pub demand: &'a BTreeMap<u16, Demand>,
    /// Where new ENIs go.
    pub placement: &'a Placement,
    /// Whether anything may be asked for.
    pub provisioning: Provisioning,
    /// Now.
    pub now: Time,
}

/// Something to ask EC2 for. Executors choose nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Action {
    /// More addresses on an ENI.
    Assign {
        /// Which.
        eni: EniId,
        /// Its subnet.
        subnet: SubnetId,
        /// What to ask for.
        request: AddressRequest,
        /// Why.
        reason: Reason,
    },
    /// A new ENI: create, attach, delete-on-termination.
    AttachEni {
        /// On which card.
        network_card: u16,
        /// At which index.
        device_index: u16,
        /// In which subnet.
        subnet: SubnetId,
        /// Its first addresses.
        request: AddressRequest,
        /// Why.
        reason: Reason,
    },
    /// Fewer addresses on an ENI.
    Unassign {
        /// Which.
        eni: EniId,
        /// Idle CIDRs, all of one kind.
        cidrs: Vec<IpNet>,
        /// Why.
        reason: Reason,
    },
    /// An ENI without pods: detach and delete.
    ReleaseEni {
        /// Which.
        eni: EniId,
        /// Why.
        reason: Reason,
    },
}

impl Action {
    /// Why it is to be done.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Assign { reason, .. }
            | Self::AttachEni { reason, .. }
            | Self::Unassign { reason, .. }
            | Self::ReleaseEni { reason, .. } => *reason,
        }
    }

    /// The ENI that it changes; `None` for a new one.
    pub fn eni(&self) -> Option<&EniId> {
        match self {
            Self::Assign { eni, .. } | Self::Unassign { eni, .. } | Self::ReleaseEni { eni, .. } => Some(eni),
            Self::AttachEni { .. } => None,
        }
    }

    /// The EC2 calls that it makes, first to last.
    pub fn ec2_actions(&self) -> &'static [Ec2Action] {
        match self {
            Self::Assign { request: AddressRequest::Ipv6Prefixes(_), .. } => &[Ec2Action::AssignIpv6Addresses],
            Self::Assign { .. } => &[Ec2Action::AssignPrivateIpAddresses],
            Self::AttachEni { .. } => {
                &[Ec2Action::CreateNetworkInterface, Ec2Action::AttachNetworkInterface, Ec2Action::ModifyNetworkInterfaceAttribute]
            }
            Self::Unassign { cidrs, .. } if cidrs.iter().any(|cidr| matches!(cidr, IpNet::V6(_))) => &[Ec2Action::UnassignIpv6Addresses],
            Self::Unassign { .. } => &[Ec2Action::UnassignPrivateIpAddresses],
            Self::ReleaseEni { .. } => &[Ec2Action::DetachNetworkInterface, Ec2Action::DeleteNetworkInterface],
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Assign { eni, request, .. } => write!(f, "assign {} to {eni}", Amount(*request)),
            Self::AttachEni { network_card, device_index, subnet, request, .. } => {
                write!(f, "attach an ENI of {subnet} as device {device_index} of card {network_card} with {}", Amount(*request))
            }
            Self::Unassign { eni, cidrs, .. } => write!(f, "unassign {} of {eni}", cidrs.len()),
            Self::ReleaseEni { eni, .. } => write!(f, "release {eni}"),
        }
    }
}

/// `3 addresses`, `1 prefix`.
struct Amount(AddressRequest);

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, one, many) = match self.0 {
            AddressRequest::Ipv4(count) => (count, "address", "addresses"),
            AddressRequest::Ipv4Prefixes(count) => (count, "/28 prefix", "/28 prefixes"),
            AddressRequest::Ipv6Prefixes(count) => (count, "/80 prefix", "/80 prefixes"),
        };
        write!(f, "{count} {}", if count == 1 { one } else { many })
    }
}

/// Why the pool grows or shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Reason {
    /// Requests wait and nothing is free for them.
    PodsWaiting {
        /// Addresses that are missing for them.
        short: u32,
    },
    /// Pods are bound to this node and nothing is free for them.
    PodsBound {
        /// Addresses that are missing for them.
        short: u32,
    },
    /// Fewer free than WARM_IP_TARGET.
    BelowWarmIp {
        /// Addresses.
        short: u32,
    },
    /// Fewer in all than MINIMUM_IP_TARGET.
    BelowMinimumIp {
        /// Addresses.
        short: u32,
    },
    /// Fewer free than WARM_ENI_TARGET ENIs hold.
    BelowWarmEni {
        /// Addresses.
        short: u32,
    },
    /// Fewer free than WARM_PREFIX_TARGET prefixes hold.
    BelowWarmPrefix {
        /// Addresses.
        short: u32,
    },
    /// Nothing is free and the targets are 0.
    NothingFree,
    /// IPv6 mode, and no ENI of the card has a /80.
    NoIpv6Prefix,
    /// More free than every target asks for, long enough.
    AboveTargets {
        /// Addresses.
        over: u32,
    },
    /// Idle CIDRs of the kind that the mode no longer uses.
    OtherKind,
    /// The ENI's subnet is excluded by its tag.
    ExcludedSubnet,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PodsWaiting { short } => write!(f, "{short} waiting pods have no address"),
            Self::PodsBound { short } => write!(f, "{short} pods bound to this node have no address ready"),
            Self::BelowWarmIp { short } => write!(f, "{short} below WARM_IP_TARGET"),
            Self::BelowMinimumIp { short } => write!(f, "{short} below MINIMUM_IP_TARGET"),
            Self::BelowWarmEni { short } => write!(f, "{short} below WARM_ENI_TARGET"),
            Self::BelowWarmPrefix { short } => write!(f, "{short} below WARM_PREFIX_TARGET"),
            Self::NothingFree => f.write_str("nothing is free"),
            Self::NoIpv6Prefix => f.write_str("no ENI of the card has a /80"),
            Self::AboveTargets { over } => write!(f, "{over} above the targets"),
            Self::OtherKind => f.write_str("idle and of the kind that is no longer used"),
            Self::ExcludedSubnet => f.write_str("its subnet is tagged kubernetes.io/role/cni=0"),
        }
    }
}

/// Why the pool cannot grow as far as it should, for error texts and status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Blocked {
    /// All ENIs are full and no further may be attached.
    AllFull {
        /// Attached (or on the way), unmanaged ones among them.
        enis: u16,
        /// The limit.
        of: u16,
        /// One of them is kept for the trunk.
        trunk_reserved: bool,
    },
    /// EC2 said that the subnet has none.
    Subnet {
        /// Which.
        subnet: SubnetId,
        /// First refusal.
        since: Time,
        /// Next try.
        until: Time,
        /// EC2's words.
        error: String,
    },
    /// EC2 makes no ENI in the subnet, for another reason.
    ClosedSubnet {
        /// Which.
        subnet: SubnetId,
        /// First refusal.
        since: Time,
        /// Next try.
        until: Time,
        /// EC2's words.
        error: String,
    },
    /// The action's budget is spent, or it failed lately.
    ActionPaused {
        /// Which.
        action: Ec2Action,
        /// Next try.
        until: Time,
        /// The failure, if any.
        error: Option<String>,
    },
    /// No subnet for a new ENI.
    Nowhere(String),
    /// Nothing may be asked for.
    Provisioning(Provisioning),
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllFull { enis, of, trunk_reserved } => {
                write!(f, "all {enis} ENIs are full and the limit is {of}")?;
                if *trunk_reserved {
                    f.write_str(", one of them kept for the trunk (ENABLE_POD_ENI)")?;
                }
                Ok(())
            }
            Self::Subnet { subnet, since, until, error } => {
                write!(f, "subnet {subnet} has none free since {since}, EC2 said {error}; next try at {until}")
            }
            Self::ClosedSubnet { subnet, since, until, error } => {
                write!(f, "subnet {subnet} takes no new ENI since {since}, EC2 said {error}; next try at {until}")
            }
            Self::ActionPaused { action, until, error: Some(error) } => write!(f, "{action:?} failed ({error}); next try at {until}"),
            Self::ActionPaused { action, until, error: None } => write!(f, "{action:?} is rate-limited until {until}"),
            Self::Nowhere(why) => write!(f, "no subnet for a new ENI: {why}"),
            Self::Provisioning(Provisioning::Disabled) => {
                f.write_str("the agent may not ask EC2 for addresses (DISABLE_NETWORK_RESOURCE_PROVISIONING or ENABLE_IMDS_ONLY_MODE)")
            }
            Self::Provisioning(Provisioning::Unschedulable) => {
                f.write_str("the node is unschedulable and AWS_MANAGE_ENIS_NON_SCHEDULABLE is false")
            }
            Self::Provisioning(_) => f.write_str("the agent is stopping"),
        }
    }
}

/// What to do, and what stands in the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be started now, all of them, in any order.
    pub actions: Vec<Action>,
    /// Why less than wanted is asked for: (card, reason).
    pub blocked: Vec<(u16, Blocked)>,
    /// Cards with more than their targets, and since when; the caller stores it in [`Memory::surplus_since`].
    pub surplus_since: BTreeMap<u16, Time>,
    /// When to plan again though nothing happened.
    pub wake_at: Option<Time>,
}
