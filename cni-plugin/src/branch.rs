//! Pods with security groups of their own: the VLAN interface of the branch ENI, its table and rules.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use stanchion_core::cni::result::PrevResult;
use stanchion_core::cni::{CniError, ErrorCode, Invocation};
use stanchion_core::network::branch::{PRIORITY_BRANCH, vlan_if_name, vlan_of_if, vlan_of_table};
use stanchion_core::network::host::PRIORITY_FROM_POD;
use stanchion_core::network::names::branch_route_table;
use stanchion_core::network::{BranchLink, HostObserved, NetOp, PodPlan, Rule};
use stanchion_netlink::vlan::lacks_vlans;
use stanchion_netlink::{Netlink, NetlinkError, sysctl};
use stanchion_proto::AddNetworkReply;

use crate::sandbox::kernel_error;

/// The branch ENI of the agent's reply; `None` for ordinary pods.
pub(crate) fn of_reply(reply: &AddNetworkReply) -> Result<Option<BranchLink>, String> {
    let Some(branch) = &reply.branch else { return Ok(None) };
    let mac = |what: &str, text: &str| text.parse().map_err(|_| format!("{text:?} is no Ethernet address of the {what}"));
    let gateway = match branch.subnet_gateway.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| format!("{text:?} is no gateway"))?),
    };
    let strict = match branch.enforcing_mode.as_str() {
        "strict" => true,
        "standard" => false,
        other => return Err(format!("enforcing mode {other:?}")),
    };
    let vlan_id = u16::try_from(branch.vlan_id).ok().filter(|id| vlan_of_table(branch_route_table(*id)).is_some());
    let vlan_id = vlan_id.ok_or_else(|| format!("VLAN id {}", branch.vlan_id))?;
    if let [attachment] = reply.attachments.as_slice()
        && attachment.route_table == branch_route_table(vlan_id)
    {
        let (mac, trunk) = (mac("branch ENI", &branch.mac)?, mac("trunk", &branch.trunk_mac)?);
        return Ok(Some(BranchLink { vlan_id, mac, trunk, gateway, strict }));
    }
    Err(format!("a branch ENI is one attachment with table {}", branch_route_table(vlan_id)))
}

/// Makes the branch's interface and its table's routes. What an earlier pod with this VLAN id left goes first, and what an earlier sandbox of this
/// pod had by another; an interface with the branch's own Ethernet address is that of an earlier sandbox of this pod and stays.
pub(crate) fn connect(host: &mut Netlink, plan: &PodPlan) -> Result<(), CniError> {
    let Some(link) = &plan.branch else { return Ok(()) };
    remove_rules(host, link.vlan_id)?;
    if link.strict {
        remove_other_branches(host, &plan.host_if, link.vlan_id)?;
    }
    let observed = HostObserved { links: host.links().map_err(|error| kernel_error(&error))?, ..HostObserved::default() };
    let present = observed.link_named(&link.if_name());
    let index = match present {
        Some(present) if present.mac == Some(link.mac) => {
            host.perform_all(&[NetOp::LinkUp { index: present.index }]).map_err(|error| kernel_error(&error))?;
            present.index
        }
        _ => {
            if let Some(stale) = present {
                host.delete_link_by_index(stale.index).map_err(|error| kernel_error(&error))?;
            }
            let trunk = observed.link_with_mac(link.trunk).ok_or_else(|| {
                CniError::new(ErrorCode::TryAgain, format!("the interface {} of the node's trunk ENI is not there (yet)", link.trunk))
            })?;
            host.create_vlan(&link.vlan(trunk.index)).map_err(|error| of_vlan(&error))?
        }
    };
    // The router's advertisements are the node's business.
    let _ = sysctl::ensure(Path::new(sysctl::ROOT), &format!("net/ipv6/conf/{}/accept_ra", link.if_name()), "0");
    host.perform_all(&plan.branch_ops(index)).map_err(|error| kernel_error(&error))
}

fn of_vlan(error: &NetlinkError) -> CniError {
    if lacks_vlans(error) {
        let remedy = "this kernel has no VLAN interfaces, which security groups for pods need: load its module 8021q, or schedule such pods elsewhere";
        return CniError::new(ErrorCode::Kernel, remedy).with_details(error.chain());
    }
    kernel_error(error)
}

/// The VLAN ids that an earlier result tells, ours or aws-node's.
pub(crate) fn of_result(prev: &PrevResult, invocation: &Invocation) -> BTreeSet<u16> {
    let theirs = prev.upstream(&invocation.pod).map(|upstream| upstream.vlan_id).filter(|id| *id != 0);
    prev.interfaces.iter().filter_map(|interface| vlan_of_if(&interface.name)).chain(theirs).collect()
}

/// The VLAN ids that rules of these host ends and addresses tell, for a DEL without an earlier result. Asked after the sandbox's veths went: a
/// host end that is still there is a newer sandbox's.
pub(crate) fn of_rules(host: &mut Netlink, host_ifs: &[String], addresses: &[IpAddr]) -> Result<BTreeSet<u16>, CniError> {
    let mut found = BTreeSet::new();
    for rule in host.rules().map_err(|error| kernel_error(&error))? {
        let Some(vlan_id) = vlan_of_table(rule.table) else { continue };
        let own = match (rule.priority, &rule.iif, rule.from) {
            (PRIORITY_BRANCH, Some(iif), _) => {
                host_ifs.contains(iif) && !leads_to(host, rule.table, iif).map_err(|error| kernel_error(&error))?
            }
            (PRIORITY_FROM_POD, _, Some(from)) => addresses.contains(&from.addr()),
            _ => false,
        };
        found.extend(own.then_some(vlan_id));
    }
    Ok(found)
}

/// Takes a branch down, its interface (which takes the table's routes along) and every rule to its table; unless a living veth is behind it by
/// now: a DEL may come again long after the VLAN id was given to somebody else.
pub(crate) fn remove(host: &mut Netlink, vlan_id: u16) -> Result<(), CniError> {
    if serves_a_pod(host, vlan_id).map_err(|error| kernel_error(&error))? {
        return Ok(());
    }
    remove_rules(host, vlan_id)?;
    host.delete_link(&vlan_if_name(vlan_id)).map(|_| ()).map_err(|error| kernel_error(&error))
}

fn serves_a_pod(host: &mut Netlink, vlan_id: u16) -> Result<bool, NetlinkError> {
    let (mut host_ifs, mut addresses) = (Vec::new(), Vec::new());
    for rule in rules_of(host, vlan_id)? {
        host_ifs.extend(rule.iif.filter(|iif| vlan_of_if(iif).is_none()));
        addresses.extend(rule.from);
    }
    for host_if in host_ifs {
        if leads_to(host, branch_route_table(vlan_id), &host_if)? {
            return Ok(true);
        }
    }
    Ok(!addresses.is_empty() && host.routes()?.iter().any(|route| addresses.contains(&route.dst)))
}

/// The veth is there and the table has its pod's route, which an ADD writes before the rules. A rule alone does not tell: it takes in whatever
/// interface comes by that name, as that of a newer sandbox of the pod on another branch.
fn leads_to(host: &mut Netlink, table: u32, host_if: &str) -> Result<bool, NetlinkError> {
    let Some(facts) = host.link(host_if)? else { return Ok(false) };
    Ok(host.routes()?.iter().any(|route| route.table == table && route.index == facts.link.index))
}

/// Rules that lead what comes in by this veth to the branch of an earlier sandbox stand before the new ones; they go, and that branch with them.
fn remove_other_branches(host: &mut Netlink, host_if: &str, vlan_id: u16) -> Result<(), CniError> {
    for rule in host.rules().map_err(|error| kernel_error(&error))? {
        let other = vlan_of_table(rule.table).filter(|other| *other != vlan_id && rule.priority == PRIORITY_BRANCH);
        if let (Some(other), Some(iif)) = (other, &rule.iif)
            && iif == host_if
        {
            host.delete_rule(&rule).map_err(|error| kernel_error(&error))?;
            remove(host, other)?;
        }
    }
    Ok(())
}

fn remove_rules(host: &mut Netlink, vlan_id: u16) -> Result<(), CniError> {
    for rule in rules_of(host, vlan_id).map_err(|error| kernel_error(&error))? {
        host.delete_rule(&rule).map_err(|error| kernel_error(&error))?;
    }
    Ok(())
}

/// The rules of pods to a branch's table.
fn rules_of(host: &mut Netlink, vlan_id: u16) -> Result<Vec<Rule>, NetlinkError> {
    let table = branch_route_table(vlan_id);
    let ours = |rule: &Rule| rule.table == table && matches!(rule.priority, PRIORITY_BRANCH | PRIORITY_FROM_POD);
    Ok(host.rules()?.into_iter().filter(ours).collect())
}
