//! What EC2, IMDS and CloudWatch Logs are asked, and how they answer: three of the five seams.
//!
//! `stanchion-aws` implements them over the SDK, the simulation in memory. The traits say what the product needs, not
//! what the APIs offer. One retry layer: an implementation tries one request again only where the SDK does so on
//! connection errors; whether an action is tried again is the planner's decision.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::ids::{AttachmentId, EniId, InstanceId, Mac, SecurityGroupId, SubnetId, VpcId};
use crate::logs::LogBatch;

/// An EC2 action that the agent calls, for budgets and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Ec2Action {
    /// Own instance: which device indexes are taken.
    DescribeInstances,
    /// Limits of a type that the table lacks.
    DescribeInstanceTypes,
    /// ENIs, attached or leaked.
    DescribeNetworkInterfaces,
    /// Subnets for new ENIs.
    DescribeSubnets,
    /// Security groups of ENIs in other subnets than the node's.
    DescribeSecurityGroups,
    /// A new ENI.
    CreateNetworkInterface,
    /// Attaching it.
    AttachNetworkInterface,
    /// Delete-on-termination, security groups.
    ModifyNetworkInterfaceAttribute,
    /// More IPv4 addresses or /28 prefixes.
    AssignPrivateIpAddresses,
    /// Fewer of them.
    UnassignPrivateIpAddresses,
    /// A /80 for IPv6.
    AssignIpv6Addresses,
    /// Giving it back.
    UnassignIpv6Addresses,
    /// Before deletion.
    DetachNetworkInterface,
    /// Deletion.
    DeleteNetworkInterface,
    /// Tags of adopted ENIs.
    CreateTags,
}

impl Ec2Action {
    /// Every action, in a stable order.
    pub const ALL: [Self; 15] = [
        Self::DescribeInstances,
        Self::DescribeInstanceTypes,
        Self::DescribeNetworkInterfaces,
        Self::DescribeSubnets,
        Self::DescribeSecurityGroups,
        Self::CreateNetworkInterface,
        Self::AttachNetworkInterface,
        Self::ModifyNetworkInterfaceAttribute,
        Self::AssignPrivateIpAddresses,
        Self::UnassignPrivateIpAddresses,
        Self::AssignIpv6Addresses,
        Self::UnassignIpv6Addresses,
        Self::DetachNetworkInterface,
        Self::DeleteNetworkInterface,
        Self::CreateTags,
    ];
}

/// Why EC2 did not do it; each variant is one that the planner acts on differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ec2Error {
    /// `RequestLimitExceeded`, `Throttling`: the action's budget shrinks.
    #[error("{action:?}: EC2 throttles ({code})")]
    Throttled {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
    },
    /// `InsufficientFreeAddressesInSubnet`, `InsufficientCidrBlocks`, or `InvalidParameterValue` with that text.
    #[error("{action:?}: EC2 said {code}: {message}")]
    InsufficientAddresses {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
        /// EC2's text.
        message: String,
    },
    /// `PrivateIpAddressLimitExceeded`: our picture of the ENI is stale, read it again.
    #[error("{action:?}: EC2 counts more addresses on the ENI than we do ({message})")]
    AddressLimit {
        /// What was called.
        action: Ec2Action,
        /// EC2's text.
        message: String,
    },
    /// `AttachmentLimitExceeded`, or the device index is taken.
    #[error("{action:?}: cannot attach: {code}: {message}")]
    AttachmentConflict {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
        /// EC2's text.
        message: String,
    },
    /// The ENI, address or attachment is not there (`…NotFound`).
    #[error("{action:?}: not there: {code}: {message}")]
    NotFound {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
        /// EC2's text.
        message: String,
    },
    /// `UnauthorizedOperation`, expired credentials: a person must act.
    #[error("{action:?}: not allowed ({code}): {message}")]
    Unauthorized {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
        /// EC2's text.
        message: String,
    },
    /// No reply: it may or may not have happened.
    #[error("{action:?}: no reply: {message}")]
    NoReply {
        /// What was called.
        action: Ec2Action,
        /// What the transport said.
        message: String,
    },
    /// Anything else.
    #[error("{action:?}: {code}: {message}")]
    Other {
        /// What was called.
        action: Ec2Action,
        /// EC2's error code.
        code: String,
        /// EC2's text.
        message: String,
    },
}

impl Ec2Error {
    /// The role lacks the permission: the same call will be refused as long as nobody changes it.
    pub fn is_denied(&self) -> bool {
        let Self::Unauthorized { code, .. } = self else { return false };
        ["UnauthorizedOperation", "Client.UnauthorizedOperation", "AccessDenied", "AccessDeniedException"].contains(&code.as_str())
    }

    /// A new ENI was refused for a reason that another subnet may not have: this one is gone, or the role may not use it.
    pub fn refuses_subnet(&self) -> bool {
        match self {
            Self::NotFound { action, .. } => *action == Ec2Action::CreateNetworkInterface,
            Self::Unauthorized { action, .. } => *action == Ec2Action::CreateNetworkInterface && self.is_denied(),
            Self::Other { action, code, .. } => *action == Ec2Action::CreateNetworkInterface && code.starts_with("Invalid"),
            _ => false,
        }
    }
}

/// The type of an ENI as EC2 names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EniKind {
    /// `interface`.
    #[default]
    Interface,
    /// `trunk`: carries branch ENIs, holds no pod addresses.
    Trunk,
    /// `branch`: belongs to one pod with security groups.
    Branch,
    /// `efa`: addresses may be used, never released.
    Efa,
    /// `efa-only`: no addresses.
    EfaOnly,
    /// Any other type: left alone.
    Other,
}

/// How an ENI is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Needed to detach.
    pub id: AttachmentId,
    /// The instance.
    pub instance: InstanceId,
    /// 0 is the primary ENI (on card 0).
    pub device_index: u16,
    /// 0 unless the type has several cards.
    pub network_card: u16,
    /// EC2 deletes the ENI with the instance.
    pub delete_on_termination: bool,
}

/// How long security groups remember an idle connection, in seconds, where it is not EC2's own time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionTracking {
    /// TCP, once established.
    pub tcp_established: Option<i32>,
    /// UDP that has seen packets both ways more than once.
    pub udp_stream: Option<i32>,
    /// Other UDP.
    pub udp: Option<i32>,
}

/// An ENI as EC2 describes it. Lists keep EC2's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    /// Id.
    pub id: EniId,
    /// Ethernet address.
    pub mac: Mac,
    /// Type.
    pub kind: EniKind,
    /// Where it lives.
    pub subnet: SubnetId,
    /// Its VPC.
    pub vpc: VpcId,
    /// `available`, `in-use` ...
    pub status: String,
    /// Free text; ours begin with `aws-K8S-`.
    pub description: String,
    /// The ENI's own address; never given to a pod.
    pub primary_ipv4: Option<Ipv4Addr>,
    /// Secondary addresses, without the primary.
    pub secondary_ipv4: Vec<Ipv4Addr>,
    /// /28 prefixes.
    pub prefixes_v4: Vec<Ipv4Net>,
    /// Addresses.
    pub ipv6: Vec<Ipv6Addr>,
    /// /80 prefixes.
    pub prefixes_v6: Vec<Ipv6Net>,
    /// Security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// None while `available`.
    pub attachment: Option<Attachment>,
    /// If it has times of its own.
    pub connection_tracking: Option<ConnectionTracking>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// A subnet as EC2 describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// Id.
    pub id: SubnetId,
    /// Its VPC.
    pub vpc: VpcId,
    /// `eu-west-1a`.
    pub availability_zone: String,
    /// IPv4 range.
    pub cidr: Ipv4Net,
    /// IPv6 ranges.
    pub ipv6_cidrs: Vec<Ipv6Net>,
    /// EC2's count of free IPv4 addresses.
    pub available_addresses: u32,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// What an ENI is to get: some number, or the exact ones (for unassigning).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressRequest {
    /// That many single IPv4 addresses.
    Ipv4(u16),
    /// That many /28 prefixes.
    Ipv4Prefixes(u16),
    /// That many /80 prefixes.
    Ipv6Prefixes(u16),
}

/// A new ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateEni {
    /// Makes a repeated request return the first one's ENI, so that a lost reply leaks nothing.
    pub client_token: String,
    /// Where.
    pub subnet: SubnetId,
    /// Sorted.
    pub security_groups: Vec<SecurityGroupId>,
    /// `aws-K8S-<instance>`.
    pub description: String,
    /// Tags at creation.
    pub tags: BTreeMap<String, String>,
    /// Addresses besides the primary; `None` for none.
    pub addresses: Option<AddressRequest>,
    /// `None` leaves it to EC2.
    pub connection_tracking: Option<ConnectionTracking>,
}

/// EC2, as far as the agent needs it.
pub trait Ec2Api: Send + Sync + 'static {
    /// ENIs by id; an id that does not exist is left out rather than failing the call.
    fn describe_enis(&self, ids: &[EniId]) -> impl Future<Output = Result<Vec<Eni>, Ec2Error>> + Send;
    /// Every ENI attached to the instance.
    fn describe_attached(&self, instance: &InstanceId) -> impl Future<Output = Result<Vec<Eni>, Ec2Error>> + Send;
    /// ENIs in state `available` that carry the tag key `node.k8s.amazonaws.com/instance_id`, in the VPC, with all the
    /// given tags.
    fn describe_leaked(&self, vpc: &VpcId, tags: &BTreeMap<String, String>) -> impl Future<Output = Result<Vec<Eni>, Ec2Error>> + Send;
    /// Subnets of the VPC in the zone, those without an IPv4 range left out.
    fn describe_subnets(&self, vpc: &VpcId, zone: &str) -> impl Future<Output = Result<Vec<Subnet>, Ec2Error>> + Send;
    /// Security groups of the VPC that have a tag with this value.
    fn describe_security_groups(
        &self,
        vpc: &VpcId,
        tag: (&str, &str),
    ) -> impl Future<Output = Result<Vec<SecurityGroupId>, Ec2Error>> + Send;
    /// Limits of an instance type.
    fn describe_instance_type(&self, instance_type: &str) -> impl Future<Output = Result<crate::limits::InstanceLimits, Ec2Error>> + Send;
    /// Creates an ENI; the same `client_token` gives the same ENI.
    fn create_eni(&self, request: &CreateEni) -> impl Future<Output = Result<Eni, Ec2Error>> + Send;
    /// Attaches it.
    fn attach_eni(
        &self,
        eni: &EniId,
        instance: &InstanceId,
        device_index: u16,
        network_card: u16,
    ) -> impl Future<Output = Result<AttachmentId, Ec2Error>> + Send;
    /// EC2 deletes the ENI when the instance ends.
    fn set_delete_on_termination(&self, eni: &EniId, attachment: &AttachmentId) -> impl Future<Output = Result<(), Ec2Error>> + Send;
    /// Replaces the security groups.
    fn set_security_groups(&self, eni: &EniId, groups: &[SecurityGroupId]) -> impl Future<Output = Result<(), Ec2Error>> + Send;
    /// Adds addresses or prefixes; returns the new ones (a single address as /32 or /128).
    fn assign(&self, eni: &EniId, request: AddressRequest) -> impl Future<Output = Result<Vec<IpNet>, Ec2Error>> + Send;
    /// Takes addresses (/32) and prefixes (/28, /80) away; one kind a call.
    fn unassign(&self, eni: &EniId, cidrs: &[IpNet]) -> impl Future<Output = Result<(), Ec2Error>> + Send;
    /// Detaches; not there is success.
    fn detach_eni(&self, attachment: &AttachmentId) -> impl Future<Output = Result<(), Ec2Error>> + Send;
    /// Deletes; not there is success.
    fn delete_eni(&self, eni: &EniId) -> impl Future<Output = Result<(), Ec2Error>> + Send;
    /// Adds tags.
    fn create_tags(&self, eni: &EniId, tags: &BTreeMap<String, String>) -> impl Future<Output = Result<(), Ec2Error>> + Send;
}

/// What the instance knows of itself, fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceIdentity {
    /// `i-…`.
    pub instance: InstanceId,
    /// `m5.large`.
    pub instance_type: String,
    /// `eu-west-1`.
    pub region: String,
    /// `eu-west-1a`.
    pub availability_zone: String,
    /// The primary ENI's MAC.
    pub primary_mac: Mac,
    /// The primary ENI's IPv4 address, if any.
    pub local_ipv4: Option<Ipv4Addr>,
    /// The primary IPv6 address, if any.
    pub ipv6: Option<Ipv6Addr>,
    /// Its Auto Scaling group, where IMDS tells tags (the launch template's `InstanceMetadataTags: enabled`).
    pub auto_scaling_group: Option<String>,
}

/// An attached ENI as IMDS shows it; eventually consistent: adopt from it, never delete on its word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImdsEni {
    /// Ethernet address.
    pub mac: Mac,
    /// Id.
    pub id: EniId,
    /// Device index.
    pub device_index: u16,
    /// Network card, 0 when IMDS has none.
    pub network_card: u16,
    /// Where it lives.
    pub subnet: SubnetId,
    /// The subnet's IPv4 range.
    pub subnet_cidr: Option<Ipv4Net>,
    /// The subnet's IPv6 ranges.
    pub subnet_ipv6_cidrs: Vec<Ipv6Net>,
    /// Its VPC.
    pub vpc: VpcId,
    /// Security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// `local-ipv4s`: the first is the ENI's own address; empty for EFA-only devices.
    pub local_ipv4s: Vec<Ipv4Addr>,
    /// /28 prefixes.
    pub prefixes_v4: Vec<Ipv4Net>,
    /// IPv6 addresses.
    pub ipv6s: Vec<Ipv6Addr>,
    /// /80 prefixes.
    pub prefixes_v6: Vec<Ipv6Net>,
}

/// IMDS did not answer as it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImdsError {
    /// No answer, or an error status.
    #[error("IMDS {path}: {message}")]
    Unreachable {
        /// The path under `latest/`.
        path: String,
        /// What went wrong.
        message: String,
    },
    /// An answer that cannot be read.
    #[error("IMDS {path}: cannot read {text:?}: {message}")]
    Unreadable {
        /// The path under `latest/`.
        path: String,
        /// What it said.
        text: String,
        /// Why it cannot be read.
        message: String,
    },
}

/// The instance metadata service.
pub trait Imds: Send + Sync + 'static {
    /// Who this instance is.
    fn identity(&self) -> impl Future<Output = Result<InstanceIdentity, ImdsError>> + Send;
    /// Attached ENIs; one whose fields are not complete yet is left out.
    fn enis(&self) -> impl Future<Output = Result<Vec<ImdsEni>, ImdsError>> + Send;
    /// The VPC's IPv4 ranges.
    fn vpc_ipv4_cidrs(&self, primary: Mac) -> impl Future<Output = Result<Vec<Ipv4Net>, ImdsError>> + Send;
    /// The VPC's IPv6 ranges.
    fn vpc_ipv6_cidrs(&self, primary: Mac) -> impl Future<Output = Result<Vec<Ipv6Net>, ImdsError>> + Send;
}

/// One event of a log stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEvent {
    /// Milliseconds since 1970.
    pub timestamp_ms: i64,
    /// UTF-8, at most 1 MiB less overhead.
    pub message: String,
}

/// What PutLogEvents did not take of an accepted batch: index ranges as the API gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rejected {
    /// Events from this index on are too new.
    pub too_new_from: Option<usize>,
    /// Events before this index are too old.
    pub too_old_until: Option<usize>,
    /// Events before this index are expired by retention.
    pub expired_until: Option<usize>,
}

/// How a new log group is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogGroupSpec {
    /// Days; `None` keeps for ever.
    pub retention_days: Option<u32>,
    /// `STANDARD` or `INFREQUENT_ACCESS`; empty for the service's default.
    pub class: String,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// Why a batch was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The group or stream does not exist yet.
    #[error("log group or stream does not exist: {0}")]
    NotFound(String),
    /// Slow down: `ThrottlingException`, `ServiceUnavailable`.
    #[error("throttled: {message}")]
    Throttled {
        /// What the service said.
        message: String,
        /// How long it asked us to wait.
        retry_after: Option<Duration>,
    },
    /// The batch itself is wrong; sending it again cannot help.
    #[error("refused: {0}")]
    Invalid(String),
    /// Permissions or credentials: a person must act; kept and tried again.
    #[error("not allowed: {0}")]
    Unauthorized(String),
    /// No reply: it may or may not have been taken.
    #[error("no reply: {0}")]
    Unavailable(String),
}

/// Where log events go: CloudWatch Logs, stdout, a file.
pub trait LogSink: Send + Sync + 'static {
    /// Puts a legal batch, in time order.
    ///
    /// The batch owns the complete request, already encoded: the CloudWatch implementation sends [`LogBatch::body`] as it
    /// is (through the SDK: `customize().interceptor` or `map_request` puts it in place of the SDK's own serialisation
    /// before signing, and may gzip it), so that no event is copied or encoded again, nor on a retry. Others decode
    /// [`LogBatch::events`]. Documents that are few come from [`LogBatch::from_events`].
    fn put(&self, batch: &LogBatch) -> impl Future<Output = Result<Rejected, SinkError>> + Send;
    /// Makes the group unless it exists; its retention may come to hold only later.
    fn create_group(&self, group: &str, spec: &LogGroupSpec) -> impl Future<Output = Result<(), SinkError>> + Send;
    /// Makes the stream unless it exists.
    fn create_stream(&self, group: &str, stream: &str) -> impl Future<Output = Result<(), SinkError>> + Send;
}
