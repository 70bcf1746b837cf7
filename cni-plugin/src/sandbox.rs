//! Taking a pod's network down, whatever of it is there: for DEL, and to undo an ADD that failed half-way.

use std::net::IpAddr;
use std::path::Path;

use stanchion_core::cni::{CniError, ErrorCode, Invocation};
use stanchion_core::network::egress::EgressFamily;
use stanchion_core::network::host::{PRIORITY_FROM_POD, PRIORITY_TO_POD};
use stanchion_core::network::names::{STRICT_BRANCH_PREFIX, host_veth_name, pod_if_name, veth_macs};
use stanchion_core::network::{NetOp, Rule};
use stanchion_netlink::netns::NetnsError;
use stanchion_netlink::veth::LinkFacts;
use stanchion_netlink::{Netlink, NetlinkError, Netns};

/// More attachments than an instance has network cards.
const MAX_ATTACHMENTS: usize = 32;
/// Rules of one address: one each of two priorities, or a few of old releases.
const MAX_RULES: usize = 64;

/// The pod's namespace, if it still exists and is not the host's (unless the runtime says that it may be).
pub(crate) fn open_netns(path: &Path, may_be_the_hosts: bool) -> Result<Netns, CniError> {
    let netns = Netns::open(path).map_err(|error| netns_error(&error))?;
    let host = Netns::current().map_err(|error| netns_error(&error))?;
    if netns.id() == host.id() && !may_be_the_hosts {
        let path = path.display();
        return Err(CniError::new(ErrorCode::InvalidEnvironment, format!("{path} is the node's own network namespace, not a pod's")));
    }
    Ok(netns)
}

pub(crate) fn netns_error(error: &NetnsError) -> CniError {
    let code = if matches!(error, NetnsError::Gone { .. }) { ErrorCode::UnknownContainer } else { ErrorCode::Io };
    let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    CniError::new(code, format!("{error}{source}"))
}

pub(crate) fn kernel_error(error: &NetlinkError) -> CniError {
    CniError::new(ErrorCode::Kernel, error.chain())
}

/// A socket in the pod's namespace.
pub(crate) fn netlink_in(netns: &Netns) -> Result<Netlink, CniError> {
    netns.run(Netlink::open).map_err(|error| netns_error(&error))?.map_err(|error| kernel_error(&error))
}

/// Deletes the sandbox's veths from their pod ends, which cannot hit those of a newer sandbox of the same pod; returns
/// the addresses that they carried.
pub(crate) fn remove_veths(netns: &Netns, if_name: &str) -> Result<Vec<IpAddr>, CniError> {
    let mut pod = netlink_in(netns)?;
    let mut removed = Vec::new();
    for family in EgressFamily::ALL {
        if let Some(facts) = pod.link(family.pod_if()).map_err(|error| kernel_error(&error))?.filter(|facts| facts.link.kind == "veth") {
            remove_veth(&mut pod, &facts, &mut removed)?;
        }
    }
    for attachment in 0..MAX_ATTACHMENTS {
        let name = pod_if_name(if_name, attachment);
        let facts = pod.link(&name).map_err(|error| kernel_error(&error))?;
        // A runtime may have put an interface of another kind there: not ours.
        let Some(facts) = facts.filter(|facts| facts.link.kind == "veth") else {
            if attachment == 0 {
                continue;
            } else {
                break;
            };
        };
        remove_veth(&mut pod, &facts, &mut removed)?;
    }
    Ok(removed)
}

/// Deletes the sandbox's veths from their host ends, for when the pod's namespace cannot be entered, or does not show them under the names
/// that they were given. The Ethernet address, which is made
/// of the container's id, tells them from those of a newer sandbox of the same pod.
pub(crate) fn remove_host_ends(host: &mut Netlink, invocation: &Invocation, prefix: &str) -> Result<(), CniError> {
    let failed = |error: NetlinkError| kernel_error(&error);
    let egress = EgressFamily::ALL.map(|family| (family.host_if(prefix, &invocation.pod), family.pod_if().to_owned()));
    let attachments =
        (0..MAX_ATTACHMENTS).map(|index| (host_veth_name(prefix, &invocation.pod, index), pod_if_name(&invocation.if_name, index)));
    let strict = (host_veth_name(STRICT_BRANCH_PREFIX, &invocation.pod, 0), invocation.if_name.clone());
    for (number, (host_if, pod_if)) in egress.into_iter().chain([strict]).chain(attachments).enumerate() {
        let Some(LinkFacts { link, .. }) = host.link(&host_if).map_err(failed)? else {
            // Attachments have consecutive numbers.
            if number > EgressFamily::ALL.len() + 1 { break } else { continue }
        };
        if link.kind == "veth" && link.mac == Some(veth_macs(&invocation.container_id, &pod_if).0) {
            host.delete_link_by_index(link.index).map_err(failed)?;
        }
    }
    Ok(())
}

fn remove_veth(pod: &mut Netlink, facts: &LinkFacts, removed: &mut Vec<IpAddr>) -> Result<(), CniError> {
    let addresses = pod.addresses().map_err(|error| kernel_error(&error))?;
    removed.extend(addresses.iter().filter(|a| a.index == facts.link.index && a.global).map(|a| a.address.addr()));
    pod.delete_link(&facts.link.name).map(|_| ()).map_err(|error| kernel_error(&error))
}

/// Deletes the host's rules for the addresses, whatever table they name, unless another pod's veth has the address by now: a DEL may come
/// again long after the address was released and given to somebody else.
pub(crate) fn remove_rules(host: &mut Netlink, addresses: &[IpAddr], own_names: &[String]) -> Result<(), CniError> {
    for address in addresses {
        if belongs_to_another(host, *address, own_names).map_err(|error| kernel_error(&error))? {
            continue;
        }
        // Table 0 matches every table.
        for rule in [Rule::to_host(PRIORITY_TO_POD, *address, 0), Rule::from_host(PRIORITY_FROM_POD, *address, 0)] {
            for _ in 0..MAX_RULES {
                if !host.delete_rule(&rule).map_err(|error| kernel_error(&error))? {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn belongs_to_another(host: &mut Netlink, address: IpAddr, own_names: &[String]) -> Result<bool, NetlinkError> {
    let Some(index) = host.egress(address)? else { return Ok(false) };
    let Some(facts) = host.link_by_index(index)? else { return Ok(false) };
    Ok(facts.link.kind == "veth" && !own_names.contains(&facts.link.name) && has_host_route(host, address, index)?)
}

/// Whether the route is the address's own one and not the node's default route, which in a test may leave by a veth too.
fn has_host_route(host: &mut Netlink, address: IpAddr, index: u32) -> Result<bool, NetlinkError> {
    Ok(host.routes()?.iter().any(|route| route.index == index && route.dst == address.into()))
}

/// Undoes what was done of some operations of the host; every failure is told.
pub(crate) fn undo(host: &mut Netlink, ops: &[NetOp]) -> Vec<String> {
    match host.perform(ops) {
        Ok(results) => results.into_iter().filter_map(|result| result.err().map(|error| error.chain())).collect(),
        Err(error) => vec![error.chain()],
    }
}
