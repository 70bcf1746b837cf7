//! The kernel's floor: the netlink requests of ADD and DEL, one after the other from one process, with nothing between them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use aya::programs::SchedClassifier;
use stanchion_core::ids::PodName;
use stanchion_core::network::names::veth_macs;
use stanchion_core::network::{NetOp, PodPlan, host_veth_name};
use stanchion_netlink::Netlink;
use stanchion_netlink::tc::{TcHook, TcPlace, TcProgram};
use stanchion_netlink::veth::VethEnd;

use super::{Calls, Owned, TABLE, address, pod_netns};
use crate::netns::Netns;

/// The two programs of a pod, for the floor of an ADD that puts policy in force: clsact and two filters are among its requests.
pub(super) struct Programs([(TcHook, OwnedFd); 2]);

impl Programs {
    /// Those that an agent has pinned.
    pub(super) fn pinned(layout: &Path) -> anyhow::Result<Self> {
        let home = std::fs::read_dir(layout.join("programs"))?.next().context("no program is pinned")??.path();
        let of = |hook, name: &str| -> anyhow::Result<_> {
            let program = SchedClassifier::from_pin(home.join(name)).with_context(|| format!("open the pin of {name}"))?;
            Ok((hook, program.fd()?.as_fd().try_clone_to_owned()?))
        };
        Ok(Self([of(TcHook::Ingress, "pod_egress")?, of(TcHook::Egress, "pod_ingress")?]))
    }
}

/// One pod after the other, each with its own time.
pub(super) fn one_by_one(node: &Netns, rounds: usize, programs: Option<&Programs>) -> anyhow::Result<Calls> {
    let mut calls = Calls::default();
    for number in 0..rounds {
        let pod = pod_netns(number)?;
        let (path, plan) = (pod.0.path(), plan(number)?);
        node.run(|| -> anyhow::Result<()> {
            let started = Instant::now();
            add(&path, &plan, programs)?;
            calls.add.push(started.elapsed());
            let started = Instant::now();
            delete(&path, &plan)?;
            calls.del.push(started.elapsed());
            Ok(())
        })??;
    }
    Ok(calls)
}

/// All pods are asked for at the same moment; each waits until the one process has come to it.
pub(super) fn burst(node: &Netns, pods: usize, programs: Option<&Programs>) -> anyhow::Result<Calls> {
    let sandboxes = (0..pods).map(pod_netns).collect::<anyhow::Result<Vec<_>>>()?;
    let plans = (0..pods).map(plan).collect::<anyhow::Result<Vec<_>>>()?;
    let work: Vec<(&Owned, &PodPlan)> = sandboxes.iter().zip(&plans).collect();
    node.run(|| Ok(Calls { add: in_turn(&work, |netns, plan| add(netns, plan, programs))?, del: in_turn(&work, delete)? }))?
}

fn in_turn(work: &[(&Owned, &PodPlan)], step: impl Fn(&Path, &PodPlan) -> anyhow::Result<()>) -> anyhow::Result<Vec<Duration>> {
    let started = Instant::now();
    work.iter().map(|(pod, plan)| step(&pod.0.path(), plan).map(|()| started.elapsed())).collect()
}

fn plan(number: usize) -> anyhow::Result<PodPlan> {
    let (host_mac, pod_mac) = veth_macs(&format!("floor{number}"), "eth0");
    Ok(PodPlan {
        attachment: 0,
        host_if: host_veth_name("eni", &PodName::new("floor", number.to_string()), 0),
        pod_if: "eth0".to_owned(),
        host_mac,
        pod_mac,
        ipv4: Some(address(u16::try_from(number)?)),
        ipv6: None,
        mtu: 9001,
        table: TABLE,
        branch: None,
    })
}

fn add(netns: &Path, plan: &PodPlan, programs: Option<&Programs>) -> anyhow::Result<()> {
    let (pod_ns, node_ns) = (stanchion_netlink::Netns::open(netns)?, stanchion_netlink::Netns::current()?);
    let mut host = Netlink::open()?;
    let mut pod = pod_ns.run(Netlink::open)??;
    let own = VethEnd { name: plan.pod_if.clone(), mac: plan.pod_mac };
    let peer = VethEnd { name: plan.host_if.clone(), mac: plan.host_mac };
    let index = pod.create_veth(&own, &peer, &node_ns, plan.mtu)?;
    for op in plan.pod_ops(index.own) {
        pod.perform_all(&[op])?;
    }
    if let Some(Programs(programs)) = programs {
        /// Any that is free.
        const PLACE: TcPlace = TcPlace { priority: 1, handle: 1 };
        let programs = programs.each_ref().map(|(hook, program)| TcProgram { hook: *hook, program: program.as_fd(), name: "floor" });
        host.attach_programs(index.peer, PLACE, &programs)?;
    }
    host.perform_all(&[NetOp::LinkUp { index: index.peer }])?;
    for op in plan.host_ops(index.peer) {
        host.perform_all(&[op])?;
    }
    Ok(())
}

fn delete(netns: &Path, plan: &PodPlan) -> anyhow::Result<()> {
    let pod_ns = stanchion_netlink::Netns::open(netns)?;
    let mut host = Netlink::open()?;
    let mut pod = pod_ns.run(Netlink::open)??;
    pod.delete_link(&plan.pod_if)?;
    for op in plan.undo_host_ops() {
        host.perform_all(&[op])?;
    }
    Ok(())
}
