//! DEL: as often as the runtime likes, with or without the agent, the namespace and the earlier result.

use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf};
use stanchion_core::network::egress::EgressFamily;
use stanchion_core::network::names::{STRICT_BRANCH_PREFIX, host_veth_name};
use stanchion_netlink::Netlink;
use stanchion_proto::DelNetworkReply;

use crate::agent::{self, Agent};
use crate::journal::Journal;
use crate::{branch, egress, sandbox, spool};

/// For the agent's part.
const PATIENCE: Duration = Duration::from_secs(10);
const REASON: &str = "PodDeleted";
/// As many attachments as names are made up for when there is no earlier result.
const ATTACHMENTS: usize = 8;

/// Takes the network down, then gives the addresses back: an address whose network still exists is never free.
pub(crate) fn run(invocation: &Invocation, conf: &NetConf, journal: &mut Journal) -> Result<(), CniError> {
    let mut host = Netlink::open().map_err(|error| sandbox::kernel_error(&error))?;
    // An unreadable result is no reason to keep the address.
    let prev = conf.read_prev_result().unwrap_or_default().unwrap_or_default();
    let mut addresses: Vec<IpAddr> = prev.ips.iter().map(|ip| ip.address).collect();
    let mut own_names: Vec<String> = prev.interfaces.iter().map(|interface| interface.name.clone()).collect();
    own_names.extend((0..ATTACHMENTS).map(|index| host_veth_name(&conf.veth_prefix, &invocation.pod, index)));
    own_names.extend(EgressFamily::ALL.map(|family| family.host_if(&conf.veth_prefix, &invocation.pod)));
    own_names.push(host_veth_name(STRICT_BRANCH_PREFIX, &invocation.pod, 0));
    let netns = invocation.netns.as_deref().map(|path| sandbox::open_netns(path, invocation.netns_override));
    match netns {
        Some(Ok(netns)) => addresses.extend(sandbox::remove_veths(&netns, &invocation.if_name)?),
        other => {
            let why = other.and_then(Result::err).filter(|error| error.code != ErrorCode::UnknownContainer);
            journal.note(why.as_ref().map_or("the namespace is gone", |error| &error.msg));
        }
    }
    // The kernel dismantles a namespace when it gets round to it, seconds later under load; and a pod may have renamed its ends.
    sandbox::remove_host_ends(&mut host, invocation, &conf.veth_prefix)?;
    addresses.sort_unstable();
    addresses.dedup();
    let mut branches = branch::of_result(&prev, invocation);
    if prev.interfaces.is_empty() {
        branches.extend(branch::of_rules(&mut host, &own_names, &addresses)?);
    }
    // Our own ends are gone by now, whatever has their names is a newer sandbox's. Those of aws-node may live as long as the kernel likes.
    let lingering: &[String] = if prev.upstream(&invocation.pod).is_some() { &own_names } else { &[] };
    sandbox::remove_rules(&mut host, &addresses, lingering)?;
    branches.iter().try_for_each(|vlan_id| branch::remove(&mut host, *vlan_id))?;
    egress::release(&conf.name, &invocation.container_id)?;
    journal.phase("kernel");

    let who = agent::sandbox(invocation, conf);
    let released = match Agent::connect(&conf.socket, PATIENCE) {
        Ok(mut agent) => agent.release(who.clone(), REASON),
        Err(error) => Err(error),
    };
    let outcome = match released {
        Ok(reply) => {
            // What the agent knew and we did not: no earlier result, no namespace.
            let unknown: Vec<IpAddr> = held(&reply).filter(|address| !addresses.contains(address)).collect();
            sandbox::remove_rules(&mut host, &unknown, lingering)?;
            match u16::try_from(reply.vlan_id) {
                Ok(vlan_id) if vlan_id != 0 && !branches.contains(&vlan_id) => branch::remove(&mut host, vlan_id),
                _ => Ok(()),
            }
        }
        Err(error) => {
            journal.note(&error.msg);
            spool::leave(&conf.spool_dir, &who, REASON)
        }
    };
    journal.phase("release");
    outcome
}

fn held(reply: &DelNetworkReply) -> impl Iterator<Item = IpAddr> {
    reply.attachments.iter().flat_map(|attachment| [&attachment.ipv4, &attachment.ipv6]).filter_map(|text| text.parse().ok())
}
