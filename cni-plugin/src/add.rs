//! ADD.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use stanchion_core::cni::{CniError, CniResult, ErrorCode, Interface, Invocation, IpConfig, NetConf};
use stanchion_core::network::egress::EgressFamily;
use stanchion_core::network::host::DEFAULT_MTU;
use stanchion_core::network::names::{MAIN_TABLE, STRICT_BRANCH_PREFIX, check_veth_prefix, host_veth_name, pod_if_name, veth_macs};
use stanchion_core::network::{NetOp, PodPlan};
use stanchion_netlink::veth::{LinkFacts, VethEnd, VethIndices};
use stanchion_netlink::{Netlink, NetlinkError, Netns, sysctl};
use stanchion_proto::frame::Method;
use stanchion_proto::{
    ActivateEndpointReply, ActivateEndpointRequest, AddNetworkReply, AddNetworkRequest, CheckNetworkReply, CheckNetworkRequest, Endpoint,
};

use crate::agent::{self, Agent};
use crate::journal::Journal;
use crate::{branch, egress, sandbox, spool};

/// For everything. A burst of pods on a cold node waits for an ENI (up to 10 s, then EC2's pace); the kubelet's own limit is two minutes.
const PATIENCE: Duration = Duration::from_secs(45);
/// Kept back from the wait for an address, for the work that follows.
const RESERVE: Duration = Duration::from_secs(10);
/// For the release after a failure.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);
const GET_ADDRESS: &str = "get an address for the pod";
const ENFORCE: &str = "put the pod's network policy in force";

/// Sets up and describes the pod's network, or leaves nothing behind.
pub(crate) fn run(invocation: &Invocation, conf: &NetConf, journal: &mut Journal) -> Result<Value, CniError> {
    let path = invocation.netns.as_deref().unwrap_or_else(|| "".as_ref());
    // Before anything is asked for: most failures of a dying sandbox are seen here.
    let netns = sandbox::open_netns(path, invocation.netns_override)?;
    let mut agent = Agent::connect(&conf.socket, PATIENCE)?;
    let request = AddNetworkRequest {
        sandbox: Some(agent::sandbox(invocation, conf)),
        plugin_version: agent::plugin_version(),
        multi_nic: conf.multi_nic,
        wait_ms: u32::try_from(agent.left().saturating_sub(RESERVE).as_millis()).unwrap_or(u32::MAX),
    };
    let asked = agent.ask(GET_ADDRESS, Method::AddNetwork, &request);
    journal.phase("ask");
    // While the agent writes its checkpoint.
    let site = Site::open(&netns);
    let assigned = asked.and_then(|()| agent.answer::<AddNetworkReply>(GET_ADDRESS));
    journal.phase("assign");
    // A call that timed out may have been served all the same.
    let ready = assigned.and_then(|reply| {
        let mut plans = plans(&reply, invocation, conf)?;
        plans.extend(egress_plan(&reply, invocation, conf)?);
        Ok((reply, plans, site?))
    });
    let (reply, plans, mut site) = match ready {
        Ok(ready) => ready,
        Err(error) => return Err(give_back(invocation, conf, error)),
    };
    match set_up(&mut site, &mut agent, &reply, &plans, invocation, conf, journal) {
        Ok(()) => Ok(conf.render(&describe(&plans, path))),
        Err(error) => {
            let error = take_down(&mut site, &plans, invocation, error);
            Err(give_back(invocation, conf, error))
        }
    }
}

/// Where the work is done.
struct Site<'a> {
    host: Netlink,
    pod: Netlink,
    host_netns: Netns,
    netns: &'a Netns,
}

impl<'a> Site<'a> {
    fn open(netns: &'a Netns) -> Result<Self, CniError> {
        let host_netns = Netns::current().map_err(|error| sandbox::netns_error(&error))?;
        let host = Netlink::open().map_err(|error| sandbox::kernel_error(&error))?;
        Ok(Self { host, pod: sandbox::netlink_in(netns)?, host_netns, netns })
    }
}

/// What the agent's reply means for this pod.
fn plans(reply: &AddNetworkReply, invocation: &Invocation, conf: &NetConf) -> Result<Vec<PodPlan>, CniError> {
    let unusable = |text: String| CniError::new(ErrorCode::Decode, format!("the agent's reply cannot be used: {text}"));
    if reply.attachments.is_empty() {
        return Err(unusable("it has no address".to_owned()));
    }
    let (prefix, mtu) = prefix_and_mtu(reply, conf);
    check_veth_prefix(prefix).map_err(|error| unusable(error.to_string()))?;
    let branch = branch::of_reply(reply).map_err(unusable)?;
    let prefix = if branch.as_ref().is_some_and(|branch| branch.strict) { STRICT_BRANCH_PREFIX } else { prefix };
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
            branch: branch.clone(),
        })
    };
    let plans = reply.attachments.iter().enumerate().map(plan).collect::<Result<Vec<_>, _>>()?;
    match plans.iter().find(|plan| plan.addresses().next().is_none()) {
        Some(plan) => Err(unusable(format!("attachment {} has no address", plan.attachment))),
        None => Ok(plans),
    }
}

/// The interface of the other family, with an address that is reserved from here on.
fn egress_plan(reply: &AddNetworkReply, invocation: &Invocation, conf: &NetConf) -> Result<Option<PodPlan>, CniError> {
    let Some(egress) = &reply.egress else { return Ok(None) };
    let unknown = || CniError::new(ErrorCode::Decode, format!("the agent's reply cannot be used: egress by {:?}", egress.if_name));
    let family = EgressFamily::of_pod_if(&egress.if_name).ok_or_else(unknown)?;
    let address = egress::reserve(family, &conf.name, &invocation.container_id)?;
    let (ipv4, ipv6) = match address {
        IpAddr::V4(address) => (Some(address), None),
        IpAddr::V6(address) => (None, Some(address)),
    };
    let (prefix, mtu) = prefix_and_mtu(reply, conf);
    let (host_mac, pod_mac) = veth_macs(&invocation.container_id, family.pod_if());
    Ok(Some(PodPlan {
        // Its routes are the pod's main ones, of their family.
        attachment: 0,
        host_if: family.host_if(prefix, &invocation.pod),
        pod_if: family.pod_if().to_owned(),
        host_mac,
        pod_mac,
        ipv4,
        ipv6,
        mtu,
        table: MAIN_TABLE,
        branch: None,
    }))
}

fn prefix_and_mtu<'a>(reply: &'a AddNetworkReply, conf: &'a NetConf) -> (&'a str, u32) {
    let prefix = if reply.veth_prefix.is_empty() { &conf.veth_prefix } else { &reply.veth_prefix };
    (prefix, conf.mtu.or(Some(reply.pod_mtu).filter(|mtu| *mtu != 0)).unwrap_or(DEFAULT_MTU))
}

fn address<T: std::str::FromStr>(text: &str) -> Result<Option<T>, &'static str> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|_| "an address is none") }
}

fn set_up(
    site: &mut Site<'_>,
    agent: &mut Agent,
    reply: &AddNetworkReply,
    plans: &[PodPlan],
    invocation: &Invocation,
    conf: &NetConf,
    journal: &mut Journal,
) -> Result<(), CniError> {
    let indices = create(site, plans, |host_if, index| other_holder(agent, invocation, conf, host_if, index))?;
    journal.phase("veth");
    let policed = !reply.policy_mode.is_empty();
    if policed {
        let endpoints = plans.iter().zip(&indices).map(|(plan, index)| endpoint(plan, index.peer)).collect();
        let request =
            ActivateEndpointRequest { sandbox: Some(agent::sandbox(invocation, conf)), endpoints, shares_ingress: conf.shares_ingress };
        agent.ask(ENFORCE, Method::ActivateEndpoint, &request)?;
    }
    // While the agent attaches the programs; the host end is down, so nothing passes.
    let dressed = dress(site, plans, &indices);
    journal.phase("pod");
    if policed {
        // In any case: until it has answered, the agent is at work on an interface that a failure would remove.
        agent.answer::<ActivateEndpointReply>(ENFORCE)?;
        journal.phase("policy");
    }
    dressed?;
    plans.iter().try_for_each(|plan| branch::connect(&mut site.host, plan))?;
    // Only now can a packet pass.
    let mut ops = Vec::new();
    for (plan, index) in plans.iter().zip(&indices) {
        ops.push(NetOp::LinkUp { index: index.peer });
        ops.extend(plan.host_ops(index.peer));
    }
    site.host.perform_all(&ops).map_err(|error| sandbox::kernel_error(&error))?;
    journal.phase("host");
    for plan in plans {
        wait_until_running(&mut site.pod, &plan.pod_if).map_err(|error| sandbox::kernel_error(&error))?;
    }
    journal.phase("carrier");
    Ok(())
}

/// The pod's first packet must not be lost: the pod end was up before the host end, so the kernel lets it send a moment later. A
/// kernel that takes longer than this is not waited for: a lost packet is sent again, a failed ADD costs seconds.
fn wait_until_running(pod: &mut Netlink, name: &str) -> Result<(), NetlinkError> {
    const AT_MOST: Duration = Duration::from_secs(2);
    let began = Instant::now();
    while !pod.is_running(name)? && began.elapsed() < AT_MOST {
        #[allow(
            clippy::disallowed_methods,
            reason = "the condition is asked again, with a deadline; a listener would cost every ADD two requests"
        )]
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The other pod that has a host end, if the agent knows one.
fn other_holder(agent: &mut Agent, invocation: &Invocation, conf: &NetConf, host_if: &str, index: u32) -> Result<Option<String>, CniError> {
    let endpoint = Endpoint { host_if_name: host_if.to_owned(), host_if_index: index, ..Endpoint::default() };
    let request = CheckNetworkRequest { sandbox: Some(agent::sandbox(invocation, conf)), endpoints: vec![endpoint] };
    let reply: CheckNetworkReply = agent.call("ask whose interface has the pod's name", Method::CheckNetwork, &request)?;
    Ok(Some(reply.held_by).filter(|pod| !pod.is_empty()))
}

/// Creates the veths, pod ends up, host ends down. `holder` tells the other pod of a host end that is there already.
fn create(
    site: &mut Site<'_>,
    plans: &[PodPlan],
    mut holder: impl FnMut(&str, u32) -> Result<Option<String>, CniError>,
) -> Result<Vec<VethIndices>, CniError> {
    if plans.iter().any(|plan| plan.ipv6.is_some()) {
        // Some runtimes start sandboxes with IPv6 switched off; a kernel without it refuses the address later, with a better message.
        let switched = site.netns.run(|| {
            let _ = sysctl::ensure(Path::new(sysctl::ROOT), "net/ipv6/conf/default/disable_ipv6", "0");
            let _ = sysctl::ensure(Path::new(sysctl::ROOT), "net/ipv6/conf/lo/disable_ipv6", "0");
        });
        switched.map_err(|error| sandbox::netns_error(&error))?;
    }
    plans.iter().map(|plan| create_one(site, plan, &mut holder)).collect()
}

fn create_one(
    site: &mut Site<'_>,
    plan: &PodPlan,
    mut holder: impl FnMut(&str, u32) -> Result<Option<String>, CniError>,
) -> Result<VethIndices, CniError> {
    let own = VethEnd { name: plan.pod_if.clone(), mac: plan.pod_mac };
    let peer = VethEnd { name: plan.host_if.clone(), mac: plan.host_mac };
    let error = match site.pod.create_veth(&own, &peer, &site.host_netns, plan.mtu) {
        Err(error) if error.errno() == Some(libc::EEXIST) => error,
        created => return created.map_err(|error| sandbox::kernel_error(&error)),
    };
    // The name in the pod is taken; or that on the host.
    let Some(LinkFacts { link, .. }) = site.host.link(&plan.host_if).map_err(|error| sandbox::kernel_error(&error))? else {
        return Err(sandbox::kernel_error(&error));
    };
    if let Some(other) = holder(&link.name, link.index)? {
        let name = &link.name;
        let text = format!("the host interface {name} is that of the pod {other}, which runs: both pods' names make this one");
        return Err(CniError::new(ErrorCode::TryAgain, text));
    }
    // A StatefulSet's pod comes back under its old name while the old sandbox still dies.
    site.host.delete_link_by_index(link.index).map_err(|error| sandbox::kernel_error(&error))?;
    site.pod.create_veth(&own, &peer, &site.host_netns, plan.mtu).map_err(|error| sandbox::kernel_error(&error))
}

/// Addresses, routes and neighbours in the pod, and what the host end must not hear.
fn dress(site: &mut Site<'_>, plans: &[PodPlan], indices: &[VethIndices]) -> Result<(), CniError> {
    let ops: Vec<NetOp> = plans.iter().zip(indices).flat_map(|(plan, index)| plan.pod_ops(index.own)).collect();
    site.pod.perform_all(&ops).map_err(|error| sandbox::kernel_error(&error))?;
    for plan in plans {
        // A pod must not advertise itself as the node's router.
        let _ = sysctl::write(&format!("net/ipv6/conf/{}/accept_ra", plan.host_if), "0");
    }
    Ok(())
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
        problems.extend(sandbox::undo(&mut site.host, &plan.undo_host_ops()));
    }
    if let Err(error) = sandbox::remove_veths(site.netns, &invocation.if_name) {
        problems.push(error.msg);
    }
    for link in plans.iter().filter_map(|plan| plan.branch.as_ref()) {
        problems.extend(branch::remove(&mut site.host, link.vlan_id).err().map(|error| error.msg));
    }
    if problems.is_empty() { error } else { error.with_details(format!("while undoing: {}", problems.join("; "))) }
}

/// Gives the addresses back, now or by the spool; returns the error that made it necessary.
fn give_back(invocation: &Invocation, conf: &NetConf, error: CniError) -> CniError {
    const REASON: &str = "SetupNSFailed";
    let error = match egress::release(&conf.name, &invocation.container_id) {
        Ok(()) => error,
        Err(problem) => error.with_details(problem.msg),
    };
    let sandbox = agent::sandbox(invocation, conf);
    // A connection of its own: the first one's time may be over.
    let released = match Agent::connect(&conf.socket, UNDO_PATIENCE) {
        Ok(mut agent) => agent.release(sandbox.clone(), REASON).map(|_| ()),
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

fn describe(plans: &[PodPlan], netns: &Path) -> CniResult {
    let mut result = CniResult::default();
    for plan in plans {
        let pod_end = result.interfaces.len() + 1;
        result.interfaces.push(Interface { name: plan.host_if.clone(), mac: plan.host_mac, mtu: plan.mtu, sandbox: None });
        let sandbox = Some(netns.display().to_string());
        result.interfaces.push(Interface { name: plan.pod_if.clone(), mac: plan.pod_mac, mtu: plan.mtu, sandbox });
        result.ips.extend(plan.addresses().map(|(address, gateway)| IpConfig { interface: pod_end, address: address.into(), gateway }));
    }
    // After the pairs: it has no end in the pod.
    for (plan, link) in plans.iter().filter_map(|plan| Some((plan, plan.branch.as_ref()?))) {
        result.interfaces.push(Interface { name: link.if_name(), mac: link.mac, mtu: plan.mtu, sandbox: None });
    }
    result
}
