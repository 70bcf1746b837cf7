//! What people and tools see of the actor's state: `stanchion enis|ips|status`, introspection, metrics.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use stanchion_core::ids::{EniId, InstanceId, Mac, PodName, SubnetId};
use stanchion_core::ipam::{IpamKey, Time};

use super::IpamStatus;

/// One consistent picture of the actor's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct IpamSnapshot {
    /// When it was taken.
    pub time: Time,
    /// The same by the process's clock; `None` before the first turn.
    #[serde(skip)]
    pub taken: Option<tokio::time::Instant>,
    /// Whether an ADD could succeed now.
    pub status: IpamStatus,
    /// This instance.
    pub instance: InstanceId,
    /// `m5.large`.
    pub instance_type: String,
    /// `secondary-ips`, `prefixes` or `ipv6-prefixes`.
    pub mode: &'static str,
    /// Pods that this node can hold.
    pub max_pods: u32,
    /// ENIs that this node may use, after MAX_ENI.
    pub max_enis: u32,
    /// Addresses that this node could hold at most.
    pub max_addresses: u64,
    /// ADD requests that wait for an address.
    pub waiting: u32,
    /// Pods bound to this node that have not asked for an address yet.
    pub bound: u32,
    /// Pool numbers, one entry a managed network card.
    pub pools: Vec<PoolView>,
    /// Attached ENIs, by card and device index.
    pub enis: Vec<EniView>,
    /// Addresses that a pod holds or that cool down.
    pub addresses: Vec<AddressView>,
    /// Subnets that lately had no addresses for us.
    pub subnets: Vec<SubnetView>,
    /// Security groups for pods are on, no trunk is attached, and there is an ENI left for it: AWS's resource controller is to attach one.
    pub wants_trunk: bool,
    /// EC2 actions under way, one sentence each.
    pub in_flight: Vec<String>,
    /// The newest failures, newest last.
    pub recent_errors: Vec<RecentError>,
    /// Counters since the start.
    pub counters: IpamCounters,
}

impl IpamSnapshot {
    /// The Ethernet address of the trunk, if one is attached.
    pub fn trunk(&self) -> Option<Mac> {
        self.enis.iter().find(|eni| eni.kind == TRUNK).map(|eni| eni.mac)
    }
}

/// [`EniView::kind`] of a trunk.
const TRUNK: &str = "trunk";
/// [`EniView::role`] of an ENI whose subnet's tag keeps pods out.
pub const EXCLUDED: &str = "excluded by its subnet's tag";

/// The pool of one network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolView {
    /// Card index.
    pub network_card: u16,
    /// Addresses in CIDRs that pods may use.
    pub total: u64,
    /// Held by pods.
    pub assigned: u64,
    /// Released less than the cool-down ago.
    pub cooling: u64,
    /// total - assigned - cooling.
    pub free: u64,
    /// /28 prefixes among the CIDRs.
    pub prefixes: u32,
    /// What the planner wanted and why, one sentence each, of its last decision.
    pub decisions: Vec<String>,
}

/// An attached ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EniView {
    /// Id.
    pub id: EniId,
    /// Ethernet address.
    pub mac: Mac,
    /// Card index.
    pub network_card: u16,
    /// Device index; 0 on card 0 is the primary.
    pub device_index: u16,
    /// Where it lives.
    pub subnet: SubnetId,
    /// Its own address.
    pub primary_ipv4: Option<std::net::Ipv4Addr>,
    /// `interface`, `trunk`, `efa` ...
    pub kind: String,
    /// `pods`, or why pods get nothing from it.
    pub role: String,
    /// Routing table; 254 is main.
    pub route_table: u32,
    /// Slots for addresses or prefixes.
    pub slots: u16,
    /// What is on it.
    pub cidrs: Vec<CidrView>,
    /// Sums over the CIDRs.
    pub total: u64,
    /// Held by pods.
    pub assigned: u64,
}

/// A CIDR on an ENI: /32, /28 or /80.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CidrView {
    /// The range.
    pub cidr: ipnet::IpNet,
    /// Addresses in it.
    pub total: u64,
    /// Held by pods.
    pub assigned: u64,
    /// Cooling down.
    pub cooling: u64,
}

/// An address that is not simply free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AddressView {
    /// The address.
    pub address: IpAddr,
    /// On which ENI.
    pub eni: EniId,
    /// `assigned` or `cooling`.
    pub state: &'static str,
    /// Who holds it.
    pub pod: Option<PodName>,
    /// The attachment, while assigned.
    pub key: Option<IpamKey>,
    /// Held since, or cooling until.
    pub time: Time,
}

/// A subnet that had no addresses for us.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubnetView {
    /// The subnet.
    pub subnet: SubnetId,
    /// `addresses` or `prefixes`.
    pub what: &'static str,
    /// First refusal of the current row.
    pub since: Time,
    /// Not asked again before.
    pub until: Time,
    /// EC2's words.
    pub reason: String,
}

/// A failure that a person may want to know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecentError {
    /// When.
    pub time: Time,
    /// What was tried.
    pub operation: String,
    /// The whole chain of what went wrong.
    pub error: String,
}

/// Counts since the start, under the words of aws-node's metrics.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct IpamCounters {
    /// `awscni_add_ip_req_count`.
    pub add_requests: u64,
    /// `awscni_del_ip_req_count` by reason.
    pub del_requests: BTreeMap<String, u64>,
    /// `awscni_no_available_ip_addresses`: an ADD ended without an address.
    pub no_available: u64,
    /// ADDs that had to wait for EC2.
    pub waited: u64,
    /// `awscni_force_removed_enis`: gone from EC2 while pods held addresses on it.
    pub force_removed_enis: u64,
    /// `awscni_force_removed_ips`.
    pub force_removed_ips: u64,
    /// `awscni_ipamd_error_count` by function.
    pub errors: BTreeMap<&'static str, u64>,
    /// `awscni_pod_eni_error_count` by function: pods whose branch ENI could not be used.
    pub pod_eni_errors: BTreeMap<&'static str, u64>,
    /// What somebody else had changed in the host network and was mended, by its subject.
    pub healed: BTreeMap<&'static str, u64>,
    /// `awscni_reconcile_count` by function.
    pub reconciles: BTreeMap<&'static str, u64>,
    /// `awscni_ipamd_action_inprogress` by function.
    pub in_progress: BTreeMap<&'static str, u64>,
    /// `awscni_ec2api_req_count`, `awscni_ec2api_error_count`, `awscni_aws_api_latency_ms`: one row an action and outcome.
    pub ec2_calls: Vec<Ec2CallStats>,
    /// Writes of the checkpoint.
    pub checkpoint_writes: u64,
    /// Time until the first address could be served, in seconds; `None` before.
    pub startup_seconds: Option<f64>,
}

/// EC2 calls of one action with one outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ec2CallStats {
    /// `CreateNetworkInterface` ...
    pub api: &'static str,
    /// EC2's error code; `None` for success.
    pub error: Option<String>,
    /// How many.
    pub count: u64,
    /// Their latencies added up, in milliseconds.
    pub total_ms: f64,
}
