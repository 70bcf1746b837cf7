//! CHECK: is the pod's network as ADD left it, in the pod, on the host and in the agent's books?

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::cni::result::PrevResult;
use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf};
use stanchion_core::network::Rule;
use stanchion_core::network::host::PRIORITY_TO_POD;
use stanchion_core::network::names::MAIN_TABLE;
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
                if !routes.iter().any(|r| r.dst == address.into() && r.table == MAIN_TABLE && r.index == facts.link.index) {
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
        if !rules.contains(&Rule::to_host(PRIORITY_TO_POD, address, MAIN_TABLE)) {
            differences.push(format!("the node has no rule {PRIORITY_TO_POD} to {address}"));
        }
    }
    Ok((endpoints.into_values().collect(), differences))
}
