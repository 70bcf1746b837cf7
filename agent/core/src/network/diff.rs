//! From the plan and what is there to the operations that are missing.

use super::branch::{
    BranchPod, branch_ops, ended_branches, is_misplaced_local_rule, is_of_a_gone_pod, is_of_an_earlier_branch, wanted_local_rules,
};
use super::host::{
    EniPlan, EniRole, HostPlan, PRIORITY_EXTERNAL_SERVICE, PRIORITY_FROM_ENI, PRIORITY_FROM_POD, PRIORITY_MARK, PRIORITY_TO_POD, PodHost,
    V6_GATEWAY,
};
use super::names::{MAIN_TABLE, subnet_gateway};
use super::nft::{Ruleset, document};
use super::ops::{HostObserved, NetOp, NodeIf, Route, Rule};
use super::pod::pod_rules;
use crate::ids::Mac;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What has to be done, in a safe order: what is added first, what is taken away last.
///
/// Nothing of others is touched: only rules of our priorities and shapes, routes of ENI tables, addresses of ENIs that carry
/// pods, our nft table. ENIs whose interface is missing are skipped, see [`missing`].
pub fn diff(desired: &HostPlan, observed: &HostObserved) -> Vec<NetOp> {
    let mut ops = Vec::new();
    for (path, value) in wanted_sysctls(desired, observed) {
        if observed.sysctls.get(&path).is_some_and(|present| *present != value) {
            ops.push(NetOp::Sysctl { path, value });
        }
    }
    for eni in &desired.enis {
        if let Some(link) = observed.link_with_mac(eni.mac) {
            eni_ops(eni, link, desired.ipv6, observed, &mut ops);
        }
    }
    let primary_if = desired.primary().and_then(|eni| observed.link_with_mac(eni.mac));
    let mut commands = Vec::new();
    // A rule must not name an interface that is not known: with the primary ENI missing the table stays as it is.
    if primary_if.is_some() || desired.primary().is_none() {
        let ruleset = Ruleset::of(desired, primary_if.map(|link| link.name.as_str()));
        if !ruleset.is_in_force(observed.nft.as_ref()) {
            commands.extend(ruleset.transaction());
        }
        commands.extend(observed.upstream.iter().cloned());
    }
    let ipv6 = Ruleset::of_ipv6(desired);
    if !ipv6.is_in_force(observed.nft_ipv6.as_ref()) {
        commands.extend(ipv6.transaction());
    }
    if !commands.is_empty() {
        ops.push(NetOp::Nft { document: document(&commands) });
    }
    // Once ours are in force.
    ops.extend(observed.upstream_legacy.iter().map(|document| NetOp::Legacy { document: document.clone() }));
    pod_routes(desired, observed, &mut ops);
    for pod in &desired.branches {
        if let Some(veth) = branch_veth(pod, observed) {
            branch_ops(pod, veth, observed, &mut ops);
        }
    }

    let wanted = wanted_rules(desired, observed);
    ops.extend(wanted.iter().filter(|rule| !observed.rules.contains(rule)).cloned().map(NetOp::AddRule));
    let stale: Vec<&Rule> = observed.rules.iter().filter(|rule| is_stale(rule, &wanted, desired, observed)).collect();
    ops.extend(ended_branches(&stale, observed));
    ops.extend(stale.into_iter().cloned().map(NetOp::DeleteRule));
    ops.sort_by_key(NetOp::removes);
    ops
}

/// The ENIs of the plan that have no interface (yet).
pub fn missing(desired: &HostPlan, observed: &HostObserved) -> Vec<Mac> {
    desired.enis.iter().map(|eni| eni.mac).filter(|mac| observed.link_with_mac(*mac).is_none()).collect()
}

/// The sysctls that the plan wants, as paths below `/proc/sys`; those of the primary interface need its name.
pub fn wanted_sysctls(desired: &HostPlan, observed: &HostObserved) -> Vec<(String, String)> {
    let primary = desired.primary().and_then(|eni| observed.link_with_mac(eni.mac)).map(|link| link.name.as_str());
    host_sysctls(desired.ipv6, desired.egress.is_some(), desired.tcp_early_demux, primary)
}

/// The sysctls of a node, as paths below `/proc/sys` and values, in the order in which they are to be written: `ipv6` of its pods,
/// `egress` of theirs to the other family, `primary` the interface of the primary ENI if it is known.
pub fn host_sysctls(ipv6: bool, egress: bool, early_demux: bool, primary: Option<&str>) -> Vec<(String, String)> {
    let mut wanted = vec![("net/ipv4/tcp_early_demux".to_owned(), u8::from(early_demux).to_string())];
    // With forwarding on, router advertisements are only heard with 2. Before it: the default route that a router advertised would go.
    let forwarding_ipv6 = || {
        let heard = primary.map(|name| (format!("net/ipv6/conf/{name}/accept_ra"), "2".to_owned()));
        heard.into_iter().chain([("net/ipv6/conf/all/forwarding".to_owned(), "1".to_owned())])
    };
    if ipv6 {
        wanted.push(("net/ipv6/conf/all/disable_ipv6".to_owned(), "0".to_owned()));
        wanted.extend(forwarding_ipv6());
        if egress {
            wanted.push(("net/ipv4/ip_forward".to_owned(), "1".to_owned()));
        }
    } else {
        wanted.push(("net/ipv4/ip_forward".to_owned(), "1".to_owned()));
        // Answers of node-port connections come from pods on other ENIs: loose reverse path check.
        wanted.extend(primary.map(|name| (format!("net/ipv4/conf/{name}/rp_filter"), "2".to_owned())));
        if egress {
            wanted.extend(forwarding_ipv6());
        }
    }
    wanted
}

fn eni_ops(eni: &EniPlan, link: &NodeIf, ipv6: bool, observed: &HostObserved, ops: &mut Vec<NetOp>) {
    let index = link.index;
    if link.mtu != eni.mtu {
        ops.push(NetOp::Mtu { index, mtu: eni.mtu });
    }
    if eni.role == EniRole::Primary {
        return;
    }
    if !link.up {
        ops.push(NetOp::LinkUp { index });
    }
    // The image's own tooling may have put secondary addresses there, which the node would answer for instead of the pods.
    let own = eni.ipv4.map(IpNet::from).into_iter().chain(eni.ipv6.map(IpNet::from)).collect::<Vec<_>>();
    for present in observed.addresses.iter().filter(|present| present.index == index && present.global) {
        if !own.contains(&present.address) {
            ops.push(NetOp::DeleteAddress { index, address: present.address });
        }
    }
    for address in own {
        if !observed.addresses.iter().any(|present| present.index == index && present.address == address) {
            ops.push(NetOp::AddAddress { index, address });
        }
        table_routes(eni.table, address, index, observed, ops);
        // Other hosts of the subnet are reached by the primary ENI: the router drops the node's own address on this one.
        let connected = Route { dst: address.trunc(), table: MAIN_TABLE, via: None, index };
        if observed.routes.contains(&connected) {
            ops.push(NetOp::DeleteRoute(connected));
        }
    }
    // The pods' addresses are of a prefix; the ENI itself needs none of their family.
    if ipv6 && eni.ipv6.is_none() && eni.role == EniRole::Secondary {
        table_routes(eni.table, IpAddr::from(V6_GATEWAY).into(), index, observed, ops);
    }
}

/// The way out of an ENI's table, of the address's family.
fn table_routes(table: u32, address: IpNet, index: u32, observed: &HostObserved, ops: &mut Vec<NetOp>) {
    let (gateway, default): (IpAddr, IpNet) = match address {
        IpNet::V4(net) => (subnet_gateway(net).into(), Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into()),
        IpNet::V6(_) => (V6_GATEWAY.into(), Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()),
    };
    for route in [Route { dst: gateway.into(), table, via: None, index }, Route { dst: default, table, via: Some(gateway), index }] {
        if !observed.routes.contains(&route) {
            ops.push(NetOp::ReplaceRoute(route));
        }
    }
}

/// A pod's host route, while its veth lives.
fn pod_routes(desired: &HostPlan, observed: &HostObserved, ops: &mut Vec<NetOp>) {
    for pod in &desired.pods {
        let Some(link) = pod_link(pod, desired, observed) else { continue };
        let route = Route { dst: pod.address.into(), table: MAIN_TABLE, via: None, index: link.index };
        if !observed.routes.contains(&route) {
            ops.push(NetOp::ReplaceRoute(route));
        }
    }
}

/// The pod's host end, if it is up and still this pod's. Down: its ADD is under way. With another address behind it: a
/// newer sandbox of the same pod has taken the name, and the plan is older than that.
fn pod_link<'a>(pod: &PodHost, desired: &HostPlan, observed: &'a HostObserved) -> Option<&'a NodeIf> {
    let link = observed.link_named(&pod.host_if).filter(|link| link.up)?;
    let own = |dst: IpNet| desired.pods.iter().any(|other| other.host_if == pod.host_if && IpNet::from(other.address) == dst);
    let same_family = |dst: IpNet| dst.addr().is_ipv4() == pod.address.is_ipv4();
    let behind = || observed.routes.iter().filter(|route| route.index == link.index && route.table == MAIN_TABLE && is_host(route.dst));
    let taken = behind().any(|route| same_family(route.dst) && !own(route.dst));
    (!taken).then_some(link)
}

/// The same for a pod with a branch ENI.
fn branch_veth<'a>(pod: &BranchPod, observed: &'a HostObserved) -> Option<&'a NodeIf> {
    let link = observed.link_named(&pod.host_if).filter(|link| link.up)?;
    let own = |dst: IpNet| pod.addresses.iter().any(|address| IpNet::from(*address) == dst);
    let taken = observed.routes.iter().any(|route| route.index == link.index && is_host(route.dst) && !own(route.dst));
    (!taken).then_some(link)
}

fn wanted_rules(desired: &HostPlan, observed: &HostObserved) -> Vec<Rule> {
    let mut wanted = wanted_local_rules(desired.strict_branches, desired.ipv6, &observed.rules);
    for pod in desired.branches.iter().filter(|pod| branch_veth(pod, observed).is_some()) {
        wanted.extend(pod.link.rules(&pod.host_if, pod.addresses.iter().copied()));
    }
    for pod in &desired.pods {
        if pod_link(pod, desired, observed).is_some() {
            wanted.extend(pod_rules(pod.address, pod.table));
        }
    }
    for eni in desired.enis.iter().filter(|eni| eni.role == EniRole::Secondary) {
        if observed.link_with_mac(eni.mac).is_some() {
            let addresses = eni.ipv4.map(|net| net.addr().into()).into_iter().chain(eni.ipv6.map(|net| net.addr().into()));
            wanted.extend(addresses.map(|address| Rule::from_host(PRIORITY_FROM_ENI, address, eni.table)));
        }
    }
    if desired.uses_mark() {
        wanted.push(Rule { mark: Some((desired.mark, desired.mark)), ..Rule::new(false, PRIORITY_MARK, MAIN_TABLE) });
    }
    if !desired.ipv6 {
        let to = |cidr: &Ipv4Net| Rule { to: Some(cidr.trunc().into()), ..Rule::new(false, PRIORITY_EXTERNAL_SERVICE, MAIN_TABLE) };
        wanted.extend(desired.external_service_cidrs.iter().map(to));
    }
    wanted
}

/// Whether a rule has one of our shapes and no reason to be there any more.
fn is_stale(rule: &Rule, wanted: &[Rule], desired: &HostPlan, observed: &HostObserved) -> bool {
    if wanted.contains(rule) {
        return false;
    }
    if is_misplaced_local_rule(rule, desired.strict_branches, desired.ipv6)
        || is_of_a_gone_pod(rule, observed)
        || is_of_an_earlier_branch(rule, wanted)
    {
        return true;
    }
    if rule.iif.is_some() {
        return false;
    }
    match rule.priority {
        PRIORITY_TO_POD if rule.table == MAIN_TABLE && rule.from.is_none() => {
            rule.to.is_some_and(|to| is_host(to) && pod_is_gone(to, desired, observed))
        }
        // Old releases of aws-node wrote one rule for each VPC CIDR, with `to`: those go even while the pod lives.
        PRIORITY_FROM_POD => {
            rule.from.is_some_and(|from| is_host(from) && (has_other_table(from, wanted) || pod_is_gone(from, desired, observed)))
        }
        PRIORITY_FROM_ENI => rule.to.is_none() && rule.from.is_some_and(|from| is_host(from) && eni_is_gone(from, wanted, observed)),
        PRIORITY_MARK => rule.table == MAIN_TABLE && rule.mark == Some((desired.mark, desired.mark)),
        PRIORITY_EXTERNAL_SERVICE => rule.table == MAIN_TABLE && rule.to.is_some() && rule.from.is_none(),
        _ => false,
    }
}

fn is_host(net: IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// The plan does not know the pod, and no route leads to it: its veth is gone. A pod that is just being added has its route first.
fn pod_is_gone(address: IpNet, desired: &HostPlan, observed: &HostObserved) -> bool {
    let planned = desired.pods.iter().any(|pod| IpNet::from(pod.address) == address && observed.link_named(&pod.host_if).is_some());
    !planned && !observed.routes.iter().any(|route| route.dst == address)
}

/// The plan wants this pod's packets in another table than the rule says (or the rule has the old shape).
fn has_other_table(address: IpNet, wanted: &[Rule]) -> bool {
    wanted.iter().any(|rule| rule.priority == PRIORITY_TO_POD && rule.to == Some(address))
}

/// No interface has the address: the ENI was detached. Addresses of ENIs that others manage are left alone.
fn eni_is_gone(address: IpNet, wanted: &[Rule], observed: &HostObserved) -> bool {
    let planned = wanted.iter().any(|rule| rule.priority == PRIORITY_FROM_ENI && rule.from == Some(address));
    planned || !observed.addresses.iter().any(|present| present.address.addr() == address.addr())
}

#[cfg(test)]
mod tests;
