//! CHECK: is the pod's network as ADD left it, in the pod, on the host and in the agent's books?

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::cni::result::PrevResult;
use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf};
use stanchion_core::network::Rule;
use stanchion_core::network::branch::{PRIORITY_BRANCH, vlan_of_if};
use stanchion_core::network::host::{PRIORITY_FROM_POD, PRIORITY_TO_POD};
use stanchion_core::network::names::{MAIN_TABLE, STRICT_BRANCH_PREFIX, branch_route_table};
use stanchion_netlink::{Netlink, NetlinkError, Netns};
use stanchion_proto::frame::Method;
use stanchion_proto::{CheckNetworkReply, CheckNetworkRequest, Endpoint};

use crate::agent::{self, Agent};
use crate::sandbox;

const PATIENCE: Duration = Duration::from_secs(10);

/// Fails with one sentence for each difference.
pub(crate) fn run(invocation: &Invocation, conf: &NetConf) -> Result<(), CniError> {
    let prev = conf
        .read_prev_result()?
        .ok_or_else(|| CniError::new(ErrorCode::InvalidConfig, "CHECK needs the prevResult of the ADD that it checks"))?;
    let path = invocation.netns.as_deref().unwrap_or_else(|| "".as_ref());
    let netns = sandbox::open_netns(path, invocation.netns_override)?;
    let (endpoints, mut differences) = compare(&netns, &prev).map_err(|error| sandbox::kernel_error(&error))?;
    let mut agent = Agent::connect(&conf.socket, PATIENCE)?;
    let request = CheckNetworkRequest { sandbox: Some(agent::sandbox(invocation, conf)), endpoints };
    let reply: CheckNetworkReply = agent.call("check the pod's network", Method::CheckNetwork, &request)?;
    differences.extend(reply.differences);
    if differences.is_empty() { Ok(()) } else { Err(CniError::new(ErrorCode::Differs, differences.join("; "))) }
}

/// Compares the kernel with the result; also returns what the agent wants to know.
fn compare(netns: &Netns, prev: &PrevResult) -> Result<(Vec<Endpoint>, Vec<String>), NetlinkError> {
    let mut differences = Vec::new();
    let mut endpoints: BTreeMap<usize, Endpoint> = BTreeMap::new();
    let mut host = Netlink::open()?;
    let mut pod = netns
        .run(Netlink::open)
        .map_err(|error| NetlinkError::Socket { op: "open it in the pod", source: std::io::Error::other(error) })??;
    let (rules, routes) = (host.rules()?, host.routes()?);
    let vlan = prev.interfaces.iter().find_map(|interface| Some((&interface.name, vlan_of_if(&interface.name)?)));
    if let Some((name, _)) = vlan
        && !host.link(name)?.is_some_and(|facts| facts.link.up)
    {
        differences.push(format!("the node has no interface {name} that is up"));
    }
    let pod_addresses = pod.addresses()?;
    for ip in &prev.ips {
        let address = ip.address;
        let Some(pod_end) = ip.interface.filter(|index| *index > 0) else { continue };
        let (Some(inside), Some(outside)) = (prev.interfaces.get(pod_end), prev.interfaces.get(pod_end - 1)) else { continue };
        let (pod_facts, host_facts) = (pod.link(&inside.name)?, host.link(&outside.name)?);
        match &pod_facts {
            None => differences.push(format!("the pod has no interface {}", inside.name)),
            Some(facts) => {
                if !facts.link.up {
                    differences.push(format!("{} is down", inside.name));
                }
                if !pod_addresses.iter().any(|present| present.index == facts.link.index && present.address.addr() == address) {
                    differences.push(format!("{} lacks {address}", inside.name));
                }
            }
        }
        match &host_facts {
            None => differences.push(format!("the node has no interface {}", outside.name)),
            Some(facts) => {
                if !facts.link.up {
                    differences.push(format!("{} is down", outside.name));
                }
                if pod_facts.is_some_and(|pod| pod.peer_index != Some(facts.link.index)) {
                    differences.push(format!("{} is not the other end of the pod's {}", outside.name, inside.name));
                }
                let table = table_of(vlan, &outside.name);
                if !routes.iter().any(|r| r.dst == address.into() && r.table == table && r.index == facts.link.index) {
                    differences.push(format!("the node has no route to {address} by {}", outside.name));
                }
                let endpoint = endpoints.entry(pod_end).or_default();
                endpoint.host_if_name.clone_from(&outside.name);
                endpoint.host_if_index = facts.link.index;
                match address {
                    IpAddr::V4(_) => endpoint.ipv4 = address.to_string(),
                    IpAddr::V6(_) => endpoint.ipv6 = address.to_string(),
                }
            }
        }
        match (vlan, table_of(vlan, &outside.name)) {
            (_, MAIN_TABLE) => {
                if !rules.contains(&Rule::to_host(PRIORITY_TO_POD, address, MAIN_TABLE)) {
                    differences.push(format!("the node has no rule {PRIORITY_TO_POD} to {address}"));
                }
                if let Some((name, id)) = vlan
                    && !rules.contains(&Rule::from_host(PRIORITY_FROM_POD, address, branch_route_table(id)))
                {
                    differences.push(format!("the node has no rule {PRIORITY_FROM_POD} from {address} to the table of {name}"));
                }
            }
            (vlan, table) => {
                for iif in vlan.map(|(name, _)| name).into_iter().chain([&outside.name]) {
                    let rule = Rule { iif: Some(iif.clone()), ..Rule::new(address.is_ipv6(), PRIORITY_BRANCH, table) };
                    if !rules.contains(&rule) {
                        differences.push(format!("the node has no rule {PRIORITY_BRANCH} for what comes in by {iif}"));
                    }
                }
            }
        }
    }
    Ok((endpoints.into_values().collect(), differences))
}

/// The host's table with the route to a pod behind `host_if`: main but for pods with a branch ENI in strict mode, whose host end's name tells.
fn table_of(vlan: Option<(&String, u16)>, host_if: &str) -> u32 {
    match vlan {
        Some((_, id)) if host_if.starts_with(STRICT_BRANCH_PREFIX) => branch_route_table(id),
        _ => MAIN_TABLE,
    }
}
