//! ADD.

use std::time::Duration;

use serde_json::Value;
use stanchion_core::cni::{CniError, CniResult, ErrorCode, Interface, Invocation, IpConfig, NetConf};
use stanchion_core::network::host::DEFAULT_MTU;
use stanchion_core::network::names::{check_veth_prefix, host_veth_name, pod_if_name, veth_macs};
use stanchion_core::network::{NetOp, PodPlan};
use stanchion_netlink::veth::VethEnd;
use stanchion_netlink::{Netlink, Netns, sysctl};
use stanchion_proto::{ActivateEndpointRequest, AddNetworkReply, AddNetworkRequest, Endpoint};

use crate::agent::{self, Agent};
use crate::journal::Journal;
use crate::{sandbox, spool};

/// For everything. A burst of pods on a cold node waits for an ENI (up to 10 s, then EC2's pace); the kubelet's own limit is two minutes.
const PATIENCE: Duration = Duration::from_secs(45);
/// Kept back from the wait for an address, for the work that follows.
const RESERVE: Duration = Duration::from_secs(10);
/// For the release after a failure.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);

/// Sets up and describes the pod's network, or leaves nothing behind.
pub(crate) async fn run(invocation: &Invocation, conf: &NetConf, journal: &mut Journal) -> Result<Value, CniError> {
    let path = invocation.netns.as_deref().unwrap_or_else(|| "".as_ref());
    // Before anything is asked for: most failures of a dying sandbox are seen here.
    let netns = sandbox::open_netns(path)?;
    let host_netns = Netns::current().map_err(|error| sandbox::netns_error(&error))?;
    let mut host = Netlink::open().map_err(|error| sandbox::kernel_error(&error))?;
    let mut agent = Agent::connect(&conf.socket, PATIENCE).await?;
    journal.phase("connect");

    let request = AddNetworkRequest {
        sandbox: Some(agent::sandbox(invocation, conf)),
        plugin_version: agent::plugin_version(),
        multi_nic: conf.multi_nic,
        wait_ms: u32::try_from(agent.left().saturating_sub(RESERVE).as_millis()).unwrap_or(u32::MAX),
    };
    let assigned = agent.call("get an address for the pod", async |client| client.add_network(request).await).await;
    journal.phase("assign");
    // A call that timed out may have been served all the same.
    let reply = match assigned {
        Ok(reply) => reply,
        Err(error) => return Err(give_back(invocation, conf, error).await),
    };
    let plans = match plans(&reply, invocation, conf) {
        Ok(plans) => plans,
        Err(error) => return Err(give_back(invocation, conf, error).await),
    };
    let mut site = Site { host: &mut host, host_netns: &host_netns, netns: &netns };
    match set_up(&mut site, &mut agent, &reply, &plans, invocation, conf, journal).await {
        Ok(()) => Ok(conf.render(&describe(&plans, path))),
        Err(error) => {
            let error = take_down(&mut site, &plans, invocation, error);
            Err(give_back(invocation, conf, error).await)
        }
    }
}

/// Where the work is done.
struct Site<'a> {
    host: &'a mut Netlink,
    host_netns: &'a Netns,
    netns: &'a Netns,
}

/// What the agent's reply means for this pod.
fn plans(reply: &AddNetworkReply, invocation: &Invocation, conf: &NetConf) -> Result<Vec<PodPlan>, CniError> {
    let unusable = |text: String| CniError::new(ErrorCode::Decode, format!("the agent's reply cannot be used: {text}"));
    if reply.branch.is_some() {
        let text = "security groups for pods need a VLAN interface, which this plugin does not set up";
        return Err(CniError::new(ErrorCode::UnsupportedField, text));
    }
    if reply.attachments.is_empty() {
        return Err(unusable("it has no address".to_owned()));
    }
    let prefix = if reply.veth_prefix.is_empty() { &conf.veth_prefix } else { &reply.veth_prefix };
    check_veth_prefix(prefix).map_err(|error| unusable(error.to_string()))?;
    let mtu = conf.mtu.or(Some(reply.pod_mtu).filter(|mtu| *mtu != 0)).unwrap_or(DEFAULT_MTU);
    let plan = |(index, attachment): (usize, &stanchion_proto::Attachment)| {
        let pod_if = pod_if_name(&invocation.if_name, index);
        let (host_mac, pod_mac) = veth_macs(&invocation.container_id, &pod_if);
        Ok(PodPlan {
            attachment: u8::try_from(index).map_err(|_| unusable("too many attachments".to_owned()))?,
            host_if: host_veth_name(prefix, &invocation.pod, index),
            pod_if,
            host_mac,
            pod_mac,
            ipv4: address(&attachment.ipv4).map_err(|text| unusable(text.to_owned()))?,
            ipv6: address(&attachment.ipv6).map_err(|text| unusable(text.to_owned()))?,
            mtu,
            table: attachment.route_table,
        })
    };
    let plans = reply.attachments.iter().enumerate().map(plan).collect::<Result<Vec<_>, _>>()?;
    match plans.iter().find(|plan| plan.addresses().next().is_none()) {
        Some(plan) => Err(unusable(format!("attachment {} has no address", plan.attachment))),
        None => Ok(plans),
    }
}

fn address<T: std::str::FromStr>(text: &str) -> Result<Option<T>, &'static str> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|_| "an address is none") }
}

async fn set_up(
    site: &mut Site<'_>,
    agent: &mut Agent,
    reply: &AddNetworkReply,
    plans: &[PodPlan],
    invocation: &Invocation,
    conf: &NetConf,
    journal: &mut Journal,
) -> Result<(), CniError> {
    let (mut pod, host_indices) = create(site, plans).map_err(|error| sandbox::kernel_error(&error))?;
    journal.phase("veth");
    if !reply.policy_mode.is_empty() {
        let endpoints = plans.iter().zip(&host_indices).map(|(plan, index)| endpoint(plan, *index)).collect();
        let request = ActivateEndpointRequest { sandbox: Some(agent::sandbox(invocation, conf)), endpoints };
        agent.call("put the pod's network policy in force", async |client| client.activate_endpoint(request).await).await?;
        journal.phase("policy");
    }
    // Only now can a packet pass.
    let mut ops = Vec::new();
    for (plan, index) in plans.iter().zip(&host_indices) {
        ops.push(NetOp::LinkUp { index: *index });
        ops.extend(plan.host_ops(*index));
    }
    site.host.perform_all(&ops).map_err(|error| sandbox::kernel_error(&error))?;
    journal.phase("host");
    for plan in plans {
        wait_until_running(&mut pod, &plan.pod_if).await.map_err(|error| sandbox::kernel_error(&error))?;
    }
    journal.phase("carrier");
    Ok(())
}

/// The pod's first packet must not be lost: the pod end was up before the host end, so the kernel lets it send a moment later. A
/// kernel that takes longer than this is not waited for: a lost packet is sent again, a failed ADD costs seconds.
async fn wait_until_running(pod: &mut Netlink, name: &str) -> Result<(), stanchion_netlink::NetlinkError> {
    const AT_MOST: Duration = Duration::from_secs(2);
    let began = tokio::time::Instant::now();
    while !pod.is_running(name)? && began.elapsed() < AT_MOST {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Creates the veths, pod ends complete and up, host ends down; returns a socket in the pod and the host ends' numbers.
fn create(site: &mut Site<'_>, plans: &[PodPlan]) -> Result<(Netlink, Vec<u32>), stanchion_netlink::NetlinkError> {
    let wants_ipv6 = plans.iter().any(|plan| plan.ipv6.is_some());
    let mut pod = match site.netns.run(|| {
        if wants_ipv6 {
            // Some runtimes start sandboxes with IPv6 switched off; a kernel without it refuses the address later, with a better message.
            let _ = sysctl::ensure("net/ipv6/conf/default/disable_ipv6", "0");
            let _ = sysctl::ensure("net/ipv6/conf/lo/disable_ipv6", "0");
        }
        Netlink::open()
    }) {
        Ok(opened) => opened?,
        Err(error) => {
            return Err(stanchion_netlink::NetlinkError::Socket { op: "open it in the pod", source: std::io::Error::other(error) });
        }
    };
    let mut host_indices = Vec::with_capacity(plans.len());
    for plan in plans {
        // A StatefulSet's pod comes back under its old name while the old sandbox still dies.
        site.host.delete_link(&plan.host_if)?;
        let own = VethEnd { name: plan.pod_if.clone(), mac: plan.pod_mac };
        let peer = VethEnd { name: plan.host_if.clone(), mac: plan.host_mac };
        pod.create_veth(&own, &peer, site.host_netns, plan.mtu)?;
        let pod_index = pod.link_index(&plan.pod_if)?;
        pod.perform_all(&plan.pod_ops(pod_index))?;
        host_indices.push(site.host.link_index(&plan.host_if)?);
        // A pod must not advertise itself as the node's router.
        let _ = sysctl::ensure(&format!("net/ipv6/conf/{}/accept_ra", plan.host_if), "0");
    }
    Ok((pod, host_indices))
}

fn endpoint(plan: &PodPlan, host_if_index: u32) -> Endpoint {
    Endpoint {
        host_if_name: plan.host_if.clone(),
        host_if_index,
        ipv4: plan.ipv4.map(|address| address.to_string()).unwrap_or_default(),
        ipv6: plan.ipv6.map(|address| address.to_string()).unwrap_or_default(),
        pod_mac: plan.pod_mac.to_string(),
        host_mac: plan.host_mac.to_string(),
    }
}

/// Undoes the kernel's part in reverse; what could not be undone is added to the error's details.
fn take_down(site: &mut Site<'_>, plans: &[PodPlan], invocation: &Invocation, error: CniError) -> CniError {
    let mut problems = Vec::new();
    for plan in plans.iter().rev() {
        problems.extend(sandbox::undo(site.host, &plan.undo_host_ops()));
    }
    if let Err(error) = sandbox::remove_veths(site.netns, &invocation.if_name) {
        problems.push(error.msg);
    }
    if problems.is_empty() { error } else { error.with_details(format!("while undoing: {}", problems.join("; "))) }
}

/// Gives the addresses back, now or by the spool; returns the error that made it necessary.
async fn give_back(invocation: &Invocation, conf: &NetConf, error: CniError) -> CniError {
    const REASON: &str = "SetupNSFailed";
    let sandbox = agent::sandbox(invocation, conf);
    // A connection of its own: the first one's time may be over.
    let released = match Agent::connect(&conf.socket, UNDO_PATIENCE).await {
        Ok(mut agent) => agent.release(sandbox.clone(), REASON).await.map(|_| ()),
        Err(error) => Err(error),
    };
    match released {
        Ok(()) => error,
        Err(_) => match spool::leave(&conf.spool_dir, &sandbox, REASON) {
            Ok(()) => error,
            Err(problem) => error.with_details(problem.msg),
        },
    }
}

fn describe(plans: &[PodPlan], netns: &std::path::Path) -> CniResult {
    let mut result = CniResult::default();
    for plan in plans {
        let pod_end = result.interfaces.len() + 1;
        result.interfaces.push(Interface { name: plan.host_if.clone(), mac: plan.host_mac, mtu: plan.mtu, sandbox: None });
        let sandbox = Some(netns.display().to_string());
        result.interfaces.push(Interface { name: plan.pod_if.clone(), mac: plan.pod_mac, mtu: plan.mtu, sandbox });
        result.ips.extend(plan.addresses().map(|(address, gateway)| IpConfig { interface: pod_end, address: address.into(), gateway }));
    }
    result
}
