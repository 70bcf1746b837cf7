//! The node's side of a branch ENI: a VLAN interface on the trunk's, a table of its own, and rules that lead the pod's packets there.
//!
//! | mode | host veth | the pod's route | rules |
//! |---|---|---|---|
//! | strict | `vlan<hash>` | in the branch's table | 10: what comes in by the VLAN interface or the veth looks up that table |
//! | standard | `eni<hash>` | in main | 512 and 1536 as of any pod, the latter to the branch's table |
//!
//! Strict: every packet of the pod, to its own node too, passes the branch ENI and its security groups. For that the rule for the
//! node's own addresses stands behind those of the pods ([`PRIORITY_LOCAL_BEHIND`]). Standard: the groups see what leaves the node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use super::host::V6_GATEWAY;
use super::names::{MAIN_TABLE, branch_route_table};
use super::ops::{HostObserved, NetOp, NodeIf, Route, Rule, VlanLink};
use crate::ids::Mac;

/// `iif <VLAN interface or veth> lookup <the branch's table>`.
pub const PRIORITY_BRANCH: u32 = 10;
/// `lookup local` while pods are in strict mode; the kernel puts it at 0.
pub const PRIORITY_LOCAL_BEHIND: u32 = 20;
/// The kernel's table of the node's own addresses.
const LOCAL_TABLE: u32 = 255;
/// IP protocol ICMPv6.
const ICMPV6: u8 = 58;
/// How the names of VLAN interfaces begin.
const VLAN_PREFIX: &str = "vlan.eth.";

/// A branch ENI and how its pod uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BranchLink {
    /// Of the VLAN interface on the trunk's.
    pub vlan_id: u16,
    /// The branch ENI's Ethernet address.
    pub mac: Mac,
    /// The trunk's Ethernet address: its interface carries the VLAN.
    pub trunk: Mac,
    /// The branch's subnet's router, for IPv4 pods.
    pub gateway: Option<Ipv4Addr>,
    /// `POD_SECURITY_GROUP_ENFORCING_MODE=strict`.
    pub strict: bool,
}

/// The host side of a pod with a branch ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BranchPod {
    /// The veth's host end.
    pub host_if: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The branch.
    pub link: BranchLink,
}

/// The VLAN interface's name.
pub fn vlan_if_name(vlan_id: u16) -> String {
    format!("{VLAN_PREFIX}{vlan_id}")
}

/// The VLAN id of an interface with such a name.
pub fn vlan_of_if(name: &str) -> Option<u16> {
    name.strip_prefix(VLAN_PREFIX)?.parse().ok().filter(|id| *id != 0)
}

/// The VLAN id of a branch's table; `None` for other tables.
pub fn vlan_of_table(table: u32) -> Option<u16> {
    u16::try_from(table.checked_sub(branch_route_table(0))?).ok().filter(|id| has_table(*id))
}

/// Whether it is a VLAN id, and its table none of the kernel's own three (253 to 255). AWS's controller gives ids up to 121.
pub fn has_table(vlan_id: u16) -> bool {
    (1..=4094).contains(&vlan_id) && !(253..=255).contains(&branch_route_table(vlan_id))
}

// === impl BranchLink ===

impl BranchLink {
    /// The VLAN interface's name.
    pub fn if_name(&self) -> String {
        vlan_if_name(self.vlan_id)
    }

    /// The branch's table.
    pub fn table(&self) -> u32 {
        branch_route_table(self.vlan_id)
    }

    /// The VLAN interface to make on the trunk's interface `parent`.
    pub fn vlan(&self, parent: u32) -> VlanLink {
        VlanLink { parent, name: self.if_name(), vlan_id: self.vlan_id, mac: self.mac }
    }

    /// Where the pod's own route is.
    pub fn pod_table(&self) -> u32 {
        if self.strict { self.table() } else { MAIN_TABLE }
    }

    /// The way out by the VLAN interface, for pods with these addresses: the router, then everything by it.
    pub fn routes(&self, vlan_index: u32, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Route> {
        let mut routes = Vec::with_capacity(4);
        for address in addresses {
            let (gateway, everywhere): (IpAddr, IpNet) = match (address, self.gateway) {
                (IpAddr::V4(_), Some(gateway)) => (gateway.into(), Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into()),
                (IpAddr::V4(_), None) => continue,
                (IpAddr::V6(_), _) => (V6_GATEWAY.into(), Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()),
            };
            routes.push(Route { dst: gateway.into(), table: self.table(), via: None, index: vlan_index });
            routes.push(Route { dst: everywhere, table: self.table(), via: Some(gateway), index: vlan_index });
        }
        routes
    }

    /// Strict mode's rules for a pod behind `host_if`; in standard mode a pod has those of any other.
    pub fn rules(&self, host_if: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Rule> {
        if !self.strict {
            return Vec::new();
        }
        let by = |ipv6: bool, name: &str| Rule { iif: Some(name.to_owned()), ..Rule::new(ipv6, PRIORITY_BRANCH, self.table()) };
        let families = addresses.into_iter().map(|address| address.is_ipv6());
        families.flat_map(|ipv6| [by(ipv6, &self.if_name()), by(ipv6, host_if)]).collect()
    }
}

/// The rule for the node's own addresses, where strict mode wants it, and on IPv6 the one by which a VLAN interface hears from the router.
pub(super) fn wanted_local_rules(strict: bool, ipv6: bool, observed: &[Rule]) -> Vec<Rule> {
    let (first, behind) = (Rule::new(ipv6, 0, LOCAL_TABLE), Rule::new(ipv6, PRIORITY_LOCAL_BEHIND, LOCAL_TABLE));
    match strict {
        true if ipv6 => vec![behind, router_rule()],
        true => vec![behind],
        // The kernel's own; wanted back where strict mode has moved it.
        false if observed.contains(&behind) => vec![first],
        false => Vec::new(),
    }
}

/// Whether a rule stands where [`wanted_local_rules`] does not want it.
pub(super) fn is_misplaced_local_rule(rule: &Rule, strict: bool, ipv6: bool) -> bool {
    let moved = Rule::new(rule.ipv6, if strict { 0 } else { PRIORITY_LOCAL_BEHIND }, LOCAL_TABLE);
    (*rule == moved && (rule.ipv6 == ipv6 || !strict)) || (!strict && *rule == router_rule())
}

/// Answers of the router to a VLAN interface's questions: they come in by that interface, whose table does not know them.
fn router_rule() -> Rule {
    Rule { from: Some(IpAddr::from(V6_GATEWAY).into()), ip_proto: Some(ICMPV6), ..Rule::new(true, 0, LOCAL_TABLE) }
}

/// What a living pod's branch lacks. An interface that is made now gets its routes at the next look, which its coming causes.
pub(super) fn branch_ops(pod: &BranchPod, veth: &NodeIf, observed: &HostObserved, ops: &mut Vec<NetOp>) {
    let addresses = || pod.addresses.iter().copied();
    let mut wanted = Vec::new();
    match observed.link_named(&pod.link.if_name()) {
        Some(vlan) => {
            if !vlan.up {
                ops.push(NetOp::LinkUp { index: vlan.index });
            }
            wanted.extend(pod.link.routes(vlan.index, addresses()));
        }
        None => ops.extend(observed.link_with_mac(pod.link.trunk).map(|trunk| NetOp::AddVlan(pod.link.vlan(trunk.index)))),
    }
    // In standard mode the pod's route is one of main, like any pod's.
    let own = addresses().filter(|_| pod.link.strict);
    wanted.extend(own.map(|address| Route { dst: address.into(), table: pod.link.table(), via: None, index: veth.index }));
    ops.extend(wanted.into_iter().filter(|route| !observed.routes.contains(route)).map(NetOp::ReplaceRoute));
}

/// Strict rules of pods whose veth is gone. A rule is the last thing that an ADD writes, so an interface that is not in the later dump
/// of links was there and went.
pub(super) fn is_of_a_gone_pod(rule: &Rule, observed: &HostObserved) -> bool {
    let gone = |name: &String| vlan_of_if(name).is_none() && observed.link_named(name).is_none();
    rule.priority == PRIORITY_BRANCH && vlan_of_table(rule.table).is_some() && rule.iif.as_ref().is_some_and(gone)
}

/// A strict rule for the veth of a pod whose branch is another by now: its veth's name is that of an earlier sandbox, and so is the rule, which
/// stands before the pod's own.
pub(super) fn is_of_an_earlier_branch(rule: &Rule, wanted: &[Rule]) -> bool {
    let moved = |wanted: &Rule| {
        (wanted.priority, wanted.ipv6, &wanted.iif) == (PRIORITY_BRANCH, rule.ipv6, &rule.iif) && wanted.table != rule.table
    };
    rule.priority == PRIORITY_BRANCH && rule.iif.is_some() && vlan_of_table(rule.table).is_some() && wanted.iter().any(moved)
}

/// What goes with the last rule that a pod had to a branch's table: the VLAN interface, which takes the table's routes along, and its
/// rule. A table without any such rule is left alone: its pod is being added.
pub(super) fn ended_branches(stale: &[&Rule], observed: &HostObserved) -> Vec<NetOp> {
    let mut tables: Vec<u32> = stale.iter().map(|rule| rule.table).collect();
    tables.sort_unstable();
    tables.dedup();
    let mut ops = Vec::new();
    for (table, vlan_id) in tables.into_iter().filter_map(|table| Some((table, vlan_of_table(table)?))) {
        let name = vlan_if_name(vlan_id);
        let (own, pods): (Vec<_>, Vec<_>) =
            observed.rules.iter().filter(|rule| rule.table == table).partition(|rule| rule.iif.as_ref() == Some(&name));
        if pods.iter().all(|rule| stale.contains(rule)) {
            ops.extend(own.into_iter().cloned().map(NetOp::DeleteRule));
            ops.extend(observed.link_named(&name).map(|link| NetOp::DeleteLink { index: link.index }));
        }
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_tables_tell_the_vlan() {
        assert_eq!((vlan_of_if("vlan.eth.7"), vlan_of_if("vlancc21c2d7785"), vlan_of_if("vlan.eth.0")), (Some(7), None, None));
        assert_eq!([107, 4194, 100, 4195, 254, 2, 10_101].map(vlan_of_table), [Some(7), Some(4094), None, None, None, None, None]);
    }
}
