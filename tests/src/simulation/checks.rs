//! What must hold after every step, and when everything has come to rest.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use rand::RngExt as _;
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::logs::positions::Positions;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_core::policy::engine::{Source, UnselectedPod};
use stanchion_core::policy::image::{MapImage, PolicyMaps as _, Slot};
use stanchion_core::policy::maps::image_allows;
use stanchion_core::policy::model::{Direction, PacketProtocol};
use stanchion_core::policy::names::Names;
use stanchion_core::policy::verdict::{End, Evaluator};
use stanchion_daemon::logs::POSITIONS_FILE;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use tokio::time::{Instant, sleep};

use super::files::LINE;
use super::{HEALTHY_FOR, HOUR, MINUTE, ROOM, SECOND, World, objects, open_files, plugin};
use crate::ipam_world::{MUTATING, NODE};
use crate::leftovers;

/// Questions about each pod after each step; the space of all has a few hundred.
const QUESTIONS: usize = 30;
/// TCP, UDP, ICMP.
const PROTOCOLS: [u8; 3] = [6, 17, 1];
const PORTS: [u16; 3] = [80, 81, 443];
/// Actions of the pool that may be under way at once: as many as the node has ENIs, and a few.
const IN_FLIGHT: usize = 8;
/// Within which the pool has its size and everything is delivered, once nothing is broken.
const HEALED_WITHIN: std::time::Duration = std::time::Duration::from_secs(2 * 3_600);

/// What the agent was told of the cluster, and which pods it polices.
#[derive(Default)]
pub(super) struct Policy {
    /// One of these is what the maps say; the last is the newest.
    possible: Vec<Arc<ClusterState>>,
    slots: BTreeMap<Slot, PodName>,
}

impl Policy {
    pub(super) fn told(&mut self, state: &Arc<ClusterState>) {
        self.possible.push(Arc::clone(state));
    }

    /// No pod is policed.
    pub(super) fn forget(&mut self) {
        self.slots.clear();
    }

    fn newest(&self) -> &ClusterState {
        self.possible.last().expect("the first state is told before anything is checked")
    }
}

impl World {
    pub(super) async fn check(&mut self) -> anyhow::Result<()> {
        if let Some(agent) = &self.agent {
            if let Some(part) = agent.ended() {
                bail!("{part} ended");
            }
            let in_flight = agent.ipam.snapshot().in_flight.len();
            ensure!(in_flight <= IN_FLIGHT, "{in_flight} pool actions are under way");
        }
        self.addresses()?;
        self.verdicts().await?;
        self.logs().await
    }

    /// Every pod has an address of its own, which EC2 says is the node's.
    fn addresses(&self) -> anyhow::Result<()> {
        self.ground.cloud.assert_consistent();
        for (name, pod) in &self.pods {
            let owner = self.ground.cloud.owner_of(pod.address.into());
            let owner = owner.with_context(|| format!("{} of {name} went back to EC2", pod.address))?;
            let eni = self.ground.cloud.eni(&owner).with_context(|| format!("{owner} is no ENI"))?;
            let attached = eni.attachment.as_ref().is_some_and(|attachment| attachment.instance == self.ground.instance);
            ensure!(attached, "{} of {name} is on {owner}, which is not the node's", pod.address);
        }
        Ok(())
    }

    /// The kernel's maps say what the objects say; while the agent is away, or has not been told, what they said.
    async fn verdicts(&mut self) -> anyhow::Result<()> {
        let mut certain = false;
        if let Some(agent) = &self.agent {
            // The actor takes the cluster's newest state before it answers.
            let snapshot = agent.netpol.snapshot().await;
            ensure!(snapshot.reason.is_empty(), "policy is not in force: {}", snapshot.reason);
            ensure!(snapshot.last_error.is_empty(), "policy: {}", snapshot.last_error);
            self.policy.slots = snapshot.endpoints.iter().map(|endpoint| (Slot(endpoint.slot), endpoint.pod.clone())).collect();
            for name in self.pods.keys().filter(|_| agent.has_adopted()) {
                ensure!(self.policy.slots.values().any(|pod| pod == name), "{name} runs and is not policed");
            }
            self.policy.possible.drain(..self.policy.possible.len() - 1);
            certain = true;
        }
        let image = self.maps.read()?;
        let states = self.policy.possible.clone();
        let strictly = |state| Evaluator::new(state, Source::Policies, Names::default()).with_unselected_pod(UnselectedPod::Closed);
        let evaluators: Vec<Evaluator<'_>> = states.iter().map(|state| strictly(state)).collect();
        let known = self.as_the_agent_knows_it();
        let known = strictly(&known);
        let peers = objects::peers(self.policy.newest());
        let slots: Vec<_> = self.policy.slots.iter().filter(|(_, pod)| self.pods.contains_key(*pod)).collect();
        for (slot, pod) in slots {
            for _ in 0..QUESTIONS {
                let protocol = PROTOCOLS[self.random.random_range(0..PROTOCOLS.len())];
                let question = Question {
                    pod,
                    direction: Direction::BOTH[self.random.random_range(0..2)],
                    peer: peers[self.random.random_range(0..peers.len())],
                    protocol,
                    port: if protocol == 1 { 0 } else { PORTS[self.random.random_range(0..PORTS.len())] },
                };
                // A local pod whose address its kubelet has not told yet is known to the agent only.
                let Some(newest) = question.defined(&known) else { continue };
                let says = question.asked(&image, *slot);
                self.told.verdicts += 1;
                if certain {
                    ensure!(says == newest, "{question:?}: the maps say {says}, the objects {newest}");
                } else if says {
                    let some = evaluators.iter().any(|evaluator| question.defined(evaluator) == Some(true));
                    ensure!(some, "{question:?}: the maps allow what no state of the objects allowed");
                }
            }
        }
        Ok(())
    }

    /// The newest objects without the pods whose address another pod of the node holds by now: while the API server is away an address may
    /// come to a next pod before the end of the last one is told, and then only the agent knows that nothing is known of its holder.
    fn as_the_agent_knows_it(&self) -> ClusterState {
        let mut known = self.policy.newest().clone();
        let held: BTreeMap<IpAddr, &PodName> = self.pods.iter().map(|(name, pod)| (pod.address.into(), name)).collect();
        let is_anothers = |name: &PodName, address: IpAddr| held.get(&address).is_some_and(|holder| *holder != name);
        let of_the_past = known.pods.iter().filter(|(name, pod)| pod.addresses().any(|address| is_anothers(name, address)));
        for name in of_the_past.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            known.pods.remove(&name);
        }
        known
    }

    /// No offset is past what has arrived, and memory is bounded.
    async fn logs(&mut self) -> anyhow::Result<()> {
        if let Some(agent) = &self.agent
            && let Some(snapshot) = agent.logs.snapshot().await
        {
            // A batch is begun below the bound and ends at most one batch above it.
            let most = LogSettings::new(Layout::Raw).memory_bytes + (1 << 20);
            ensure!(snapshot.memory_bytes <= most, "{} bytes of log lines in memory", snapshot.memory_bytes);
        }
        let arrived = self.arrived();
        if let Some(positions) = self.positions()? {
            self.files.check(&positions, &arrived)?;
        }
        Ok(())
    }

    fn positions(&self) -> anyhow::Result<Option<Positions>> {
        match std::fs::read(self.ground.dir("state").join(POSITIONS_FILE)) {
            Ok(text) => Ok(Some(Positions::parse(&text, NODE).context("the positions file")?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Numbers of the lines that CloudWatch has.
    pub(super) fn arrived(&self) -> HashSet<u64> {
        let cloud = &self.ground.cloud;
        let streams = cloud.log_groups().into_iter().flat_map(|group| {
            let streams = cloud.log_streams(&group);
            streams.into_iter().map(move |stream| (group.clone(), stream))
        });
        let events = streams.flat_map(|(group, stream)| cloud.events(&group, &stream));
        events.filter_map(|event| event.message.strip_prefix(LINE)?.parse().ok()).collect()
    }

    fn changes(&self) -> usize {
        MUTATING.iter().map(|action| self.ground.cloud.count(action)).sum()
    }

    /// Those that came after so many others, and why the pool asked for its last ones.
    fn changes_after(&self, count: usize) -> String {
        let changing = self.ground.cloud.calls().into_iter().filter(|call| MUTATING.contains(&call.action.as_str())).skip(count);
        let calls: Vec<String> = changing.map(|call| format!("{:?} {} {:?}", call.at, call.action, call.error)).collect();
        let pools = self.agent.as_ref().map(|agent| agent.ipam.snapshot().pools.clone());
        format!("{}; pools: {pools:?}", calls.join(", "))
    }

    /// Every fault ends: everything is as if nothing had happened, nothing moves, and when the pods end nothing is left.
    pub(super) async fn rest(&mut self) -> anyhow::Result<()> {
        self.calm();
        self.away = false;
        self.publish();
        self.restart().await?;
        self.until("every line to arrive, and the pool to rest", |world| {
            let agent = world.agent.as_ref().context("an agent")?;
            let missing = world.files.missing(&world.arrived());
            ensure!(missing.is_empty(), "not arrived: {missing:#?}; {:?}; {:?}", agent.logs.counters(), world.positions());
            let snapshot = agent.ipam.snapshot();
            ensure!(snapshot.status.ready, "{}", snapshot.status.reason);
            ensure!(snapshot.in_flight.is_empty(), "{:?} under way", snapshot.in_flight);
            let held = snapshot.addresses.iter().filter(|view| view.state == "assigned");
            let held: BTreeMap<String, IpAddr> = held.filter_map(|view| Some((view.pod.as_ref()?.name.clone(), view.address))).collect();
            let lives: BTreeMap<String, IpAddr> = world.pods.iter().map(|(name, pod)| (name.name.clone(), pod.address.into())).collect();
            ensure!(held == lives, "held are {held:?}, alive {lives:?}");
            Ok(())
        })
        .await?;
        // Cool-downs, the pool's last word, and the sweep for ENIs that a crash left behind.
        sleep(HOUR * 2).await;
        self.check().await?;
        self.is_quiet().await?;
        self.serves().await?;
        let ended: Vec<PodName> = self.pods.keys().cloned().collect();
        let plugin = self.plugin();
        for name in ended {
            if let Some(pod) = self.pods.remove(&name) {
                plugin.del(&pod.sandbox, "PodDeleted").await;
                self.objects.delete(&name);
                self.files.close(&name);
            }
        }
        self.publish();
        // The kubelet removes the logs with the pods; what is there is watched, however many pods a long life had.
        self.files.collect(&self.arrived())?;
        sleep(HOUR * 2).await;
        self.is_empty().await
    }

    /// For an hour: no call that changes something in EC2, no map write, no line sent, no position written; and a restart changes nothing.
    async fn is_quiet(&mut self) -> anyhow::Result<()> {
        let agent = self.agent.as_ref().context("an agent")?;
        ensure!(agent.has_adopted(), "nobody has looked for pods that ran before the agent");
        let look = || async {
            let lines = agent.logs.counters();
            (agent.netpol.snapshot().await.map_writes, lines.batches, lines.retries)
        };
        let (before, changes, positions) = (look().await, self.changes(), self.positions()?);
        sleep(HOUR).await;
        let after = look().await;
        ensure!(before == after, "while nothing happened (map writes, batches, retries) went from {before:?} to {after:?}");
        ensure!(changes == self.changes(), "while nothing happened EC2 was changed: {}", self.changes_after(changes));
        ensure!(positions == self.positions()?, "while nothing happened positions were written");
        let metrics = agent.telemetry.status();
        ensure!(metrics.documents_dropped == 0 && metrics.failed_ticks == 0 && metrics.documents_sent > 0, "{metrics:?}");
        self.restart().await?;
        sleep(MINUTE * 10).await;
        let agent = self.agent.as_ref().context("an agent")?;
        let writes = agent.netpol.snapshot().await.map_writes;
        ensure!(writes == 0, "a restart without a change wrote {writes} map entries");
        ensure!(changes == self.changes(), "a restart without a change changed EC2: {}", self.changes_after(changes));
        let again = agent.logs.counters().events_shipped;
        ensure!(again == 0, "a restart without a change sent {again} lines again");
        self.check().await
    }

    /// With nothing broken pods are connected, as many as there is room for.
    async fn serves(&mut self) -> anyhow::Result<()> {
        const MORE: usize = 3;
        while self.pods.len() > ROOM - MORE {
            self.end_pods().await;
        }
        sleep(HEALTHY_FOR).await;
        let before = self.told.healthy;
        self.start_so_many(MORE, None).await?;
        ensure!(self.told.healthy == before + MORE as u64, "{} pods were to be served for sure", self.told.healthy - before);
        self.check().await
    }

    /// Nothing of any pod is left.
    async fn is_empty(&mut self) -> anyhow::Result<()> {
        self.check().await?;
        let image = self.maps.read()?;
        ensure!(image.endpoints.is_empty(), "endpoints are left: {:?}", image.endpoints);
        ensure!(image.verdicts.is_empty(), "verdicts are left: {:?}", image.verdicts);
        ensure!(image.addresses.is_empty(), "addresses are left: {:?}", image.addresses);
        ensure!(image.cidrs.is_empty(), "CIDRs are left: {:?}", image.cidrs);
        for map in leftovers::OF_PODS {
            let left = leftovers::entries(&self.ground.pins.join(format!("v{LAYOUT_VERSION}")).join(map))?;
            ensure!(left == 0, "{left} entries of {map} are left");
        }
        let links: Vec<String> = plugin::links()?.into_iter().filter(|name| name.starts_with("eni")).collect();
        ensure!(links.is_empty(), "links are left: {links:?}");
        let spooled = std::fs::read_dir(self.ground.dir("spool"))?.count();
        ensure!(spooled == 0, "{spooled} releases are left in the spool");
        let agent = self.agent.as_ref().context("an agent")?;
        let snapshot = agent.ipam.snapshot();
        let held: Vec<_> = snapshot.addresses.iter().filter(|view| view.state == "assigned").collect();
        ensure!(held.is_empty(), "addresses are held: {held:?}");
        let left: Vec<_> = self.ground.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()).map(|eni| eni.id).collect();
        ensure!(left.is_empty(), "ENIs are left: {left:?}");
        let (files, before) = (open_files()?, &self.open_files);
        // Log files that are still looked at, for a while.
        ensure!(files.values().sum::<usize>() <= before.values().sum::<usize>() + 16, "open are {files:#?}, at the start {before:#?}");
        Ok(())
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALED_WITHIN;
        while let Err(not_yet) = holds(self) {
            if Instant::now() >= deadline {
                return Err(not_yet.context(format!("waited {} s for {what}", HEALED_WITHIN.as_secs())));
            }
            sleep(SECOND * 20).await;
        }
        Ok(())
    }
}

/// A new flow's first packet.
#[derive(Debug)]
struct Question<'a> {
    pod: &'a PodName,
    direction: Direction,
    peer: IpAddr,
    protocol: u8,
    port: u16,
}

impl Question<'_> {
    /// What the maps say.
    fn asked(&self, image: &MapImage, slot: Slot) -> bool {
        image_allows(image, slot, self.direction, self.peer, self.protocol, self.port)
    }

    /// What the objects say; `None` where they do not know the pod or its address.
    fn defined(&self, evaluator: &Evaluator<'_>) -> Option<bool> {
        let (own, peer) = (End::Pod(self.pod.clone()), End::Address(self.peer));
        let (from, to) = if self.direction == Direction::Egress { (&own, &peer) } else { (&peer, &own) };
        let verdict = evaluator.verdict(from, to, 4, PacketProtocol::from_number(self.protocol), self.port).ok()?;
        Some(if self.direction == Direction::Egress { verdict.egress.allowed } else { verdict.ingress.allowed })
    }
}
