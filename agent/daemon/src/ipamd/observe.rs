//! What is attached to this instance: read at start, compared from time to time, healed on the host.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{Ec2Action, Ec2Api, Ec2Error, Eni, EniKind, Imds, ImdsEni, Subnet};
use stanchion_core::config::{BranchMode, RandomizeSnat};
use stanchion_core::ids::{EniId, SubnetId};
use stanchion_core::ipam::{
    Action, Adoption, DESCRIPTION_PREFIX, EniRole, EniState, Leak, Placement, StoredEni, TAG_CLUSTER, TAG_CREATED, Time, ec2_cidrs,
    eni_config_name, excluded_subnets, imds_cidrs, judge_leak, missing_tags, place_by_discovery, place_by_eni_config,
};
use stanchion_core::network::egress;
use stanchion_core::network::{EniPlan, EniRole as HostRole, HostNetwork, HostPlan, HostReport, NetOp, PodHost, Randomize, Snat};
use tokio::time::Instant;

use super::actor::{Actor, Work, chain};
use super::execute::Executor;
use super::groups::wants_subnets;
use super::retry::Retry;

/// How often IMDS is read when nothing happens.
const OBSERVE_EVERY: Duration = Duration::from_secs(60);
/// The same while pods wait for it: AWS's resource controller is to attach a trunk, or IMDS to tell the range of a new ENI's subnet.
const OBSERVE_SOON: Duration = Duration::from_secs(5);
/// Pauses after EC2 did not tell what is attached, the first and the longest.
const DESCRIBE_PAUSE: (Duration, Duration) = (OBSERVE_SOON, OBSERVE_EVERY);
/// How often the host network is healed.
const HEAL_EVERY: Duration = Duration::from_secs(15);
/// How often the zone's subnets are read.
pub(super) const SUBNETS_EVERY: Duration = Duration::from_secs(600);
/// First pause before subnets that EC2 did not tell are asked for again; doubles up to [`SUBNETS_EVERY`].
pub(super) const SUBNETS_PAUSE: Duration = Duration::from_secs(5);
/// A list that is older than this is read anew before an ENI is made by it, as aws-node does: tags and free addresses change.
const SUBNETS_FRESH: Duration = Duration::from_secs(10);
/// How long a new ENI waits for that.
const SUBNETS_WAIT: Duration = Duration::from_secs(5);
/// New ENIs wait for the first list while the pause is shorter than this, as a tag may keep pods out of the node's own subnet. Then they
/// go there: a node whose EC2 tells no list still has to serve, and an ENI in a wrong place is given back when the list comes.
const SUBNETS_PATIENCE: Duration = Duration::from_secs(60);
/// How often leaked ENIs are looked for.
pub(super) const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// EC2 must miss something this long before it is forgotten: Describe lags behind, too.
pub(super) const GONE_AFTER: Duration = Duration::from_secs(30);
/// The same where only IMDS may be asked (ENABLE_IMDS_ONLY_MODE), which leaves out an attached ENI for a while at times.
const HIDDEN_AT_MOST: Duration = Duration::from_secs(180);
/// Pauses between looks for the interface of a new ENI.
const LINK_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(400));

/// What IMDS and, if it was asked, EC2 show.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) imds: Result<Vec<ImdsEni>, String>,
    pub(super) ec2: Option<Result<Vec<Eni>, Ec2Error>>,
    pub(super) vpc_cidrs: Option<(Vec<Ipv4Net>, Vec<Ipv6Net>)>,
}

/// Reads IMDS, and EC2 when IMDS shows something else than `known`; what it does not show yet of `awaited` is nothing to ask EC2 for.
pub(super) async fn observe<E: Ec2Api, I: Imds>(
    executor: Executor<E>,
    imds: Arc<I>,
    primary: stanchion_core::ids::Mac,
    mut known: BTreeMap<EniId, BTreeSet<IpNet>>,
    awaited: BTreeSet<EniId>,
    ask_ec2: AskEc2,
) -> Observation {
    let shown = imds.enis().await;
    let differs = match &shown {
        Ok(enis) => {
            let shown: BTreeMap<EniId, BTreeSet<IpNet>> =
                enis.iter().map(|eni| (eni.id.clone(), imds_cidrs(eni).into_iter().collect())).collect();
            known.retain(|id, _| shown.contains_key(id) || !awaited.contains(id));
            shown != known
        }
        // Without IMDS only EC2 can tell.
        Err(_) => true,
    };
    let ec2 = match ask_ec2 {
        AskEc2::Never => None,
        AskEc2::IfDifferent if !differs => None,
        AskEc2::IfDifferent | AskEc2::Always => Some(executor.attached().await),
    };
    let vpc_cidrs = match (imds.vpc_ipv4_cidrs(primary).await, imds.vpc_ipv6_cidrs(primary).await) {
        (Ok(v4), Ok(v6)) => Some((v4, v6)),
        _ => None,
    };
    Observation { imds: shown.map_err(|error| chain(&error)), ec2, vpc_cidrs }
}

/// Whether EC2 is asked for the attached ENIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AskEc2 {
    Never,
    IfDifferent,
    Always,
}

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    pub(super) fn adoption(&self, now: Time) -> Adoption<'_> {
        Adoption {
            identity: &self.identity,
            custom_networking: self.config.pool.custom_networking,
            manage_untagged: self.config.pool.manage_untagged_eni,
            cards: &self.pool_limits.cards,
            excluded_subnets: &self.excluded,
            given_out: self.given_out.as_ref(),
            slots: self.limits.slots_per_eni(),
            now,
        }
    }

    /// Until IMDS is read again when nothing happens.
    pub(super) fn observation_pause(&self) -> Duration {
        let trunk = self.wants_trunk() && !self.trunk_is_overdue();
        if trunk || self.awaiting_range().next().is_some() { OBSERVE_SOON } else { OBSERVE_EVERY }
    }

    /// ENIs that cannot join before their subnet's range is known.
    fn awaiting_range(&self) -> impl Iterator<Item = &StoredEni> {
        self.store.enis().values().filter(|eni| eni.state == EniState::Joining && eni.lacks_range())
    }

    /// ENIs that came before their subnet was known join once somebody tells its ranges: IMDS, EC2's list or another ENI of it.
    fn learn_ranges(&mut self, imds: &[ImdsEni]) {
        let awaiting: Vec<_> = self.awaiting_range().map(|eni| (eni.id.clone(), eni.subnet.clone())).collect();
        for (id, subnet) in awaiting {
            let shown = imds.iter().find(|shown| shown.subnet == subnet && shown.subnet_cidr.is_some());
            let cidr = shown.and_then(|shown| shown.subnet_cidr).or_else(|| self.known_subnet_cidr(&subnet));
            if let (Some(cidr), Some(eni)) = (cidr, self.store.eni_mut(&id)) {
                eni.subnet_cidr = Some(cidr);
                if let Some(shown) = shown {
                    eni.subnet_ipv6_cidrs.clone_from(&shown.subnet_ipv6_cidrs);
                }
                self.host_due = Some(Instant::now());
            }
        }
    }

    pub(super) fn known_subnet_cidr(&self, subnet: &SubnetId) -> Option<Ipv4Net> {
        let of_enis = self.store.enis().values().filter(|eni| eni.subnet == *subnet).find_map(|eni| eni.subnet_cidr);
        of_enis.or_else(|| self.subnets.iter().find(|known| known.id == *subnet).map(|known| known.cidr))
    }

    /// Starts what is due, each at most once at a time.
    pub(super) fn start_due_tasks(&mut self) {
        let now = Instant::now();
        if !self.host_running && self.host_due.is_some_and(|due| due <= now) {
            self.host_running = true;
            self.host_due = None;
            let (host, plan) = (Arc::clone(&self.host), self.host_plan());
            self.host_planned = Some(plan.clone());
            self.tasks.spawn(async move { Work::Host(host.apply(&plan).await.map_err(|error| chain(&error))) });
        }
        if !self.observing && self.observe_due <= now {
            self.observing = true;
            let known = self.store.enis().values().map(|eni| (eni.id.clone(), eni.cidrs.keys().copied().collect())).collect();
            let may_ask = self.describe_retry.is_due()
                && self.memory.may_call(Ec2Action::DescribeNetworkInterfaces, self.clock.now()).is_ok()
                && !self.config.pool.imds_only;
            let ask = match (!may_ask, self.ec2_verified && self.missing.is_empty() && self.doubtful.is_empty()) {
                (true, _) => AskEc2::Never,
                (false, true) => AskEc2::IfDifferent,
                (false, false) => AskEc2::Always,
            };
            let awaited = self.awaiting_range().map(|eni| eni.id.clone()).collect();
            let (executor, imds, primary) = (self.executor.clone(), Arc::clone(&self.imds), self.identity.primary_mac);
            *self.counters.reconciles.entry("eniReconcileAdd").or_default() += 1;
            self.tasks.spawn(async move { Work::Observed(observe(executor, imds, primary, known, awaited, ask).await) });
        }
        if self.subnets_due <= now {
            self.subnets_due = now + SUBNETS_EVERY;
            self.read_subnets();
        }
        if self.sweep_due <= now {
            self.sweep_due = now + SWEEP_EVERY;
            // With IPv6 only nodes with several network cards make ENIs.
            let pool = &self.config.pool;
            let makes_enis = !pool.disable_provisioning && (!pool.ipv6 || pool.multi_nic);
            if makes_enis && !pool.disable_leaked_eni_cleanup {
                self.sweep();
            }
        }
    }

    fn read_subnets(&mut self) {
        if wants_subnets(&self.config.pool) {
            self.subnets_asked = Some(Instant::now());
            self.start_discovery();
        }
    }

    /// Whether a new ENI waits for EC2 to tell the subnets anew. Where EC2 does not tell, the list is as old as it is.
    pub(super) fn awaits_subnets(&mut self) -> bool {
        let now = Instant::now();
        if self.config.pool.custom_networking {
            return false;
        }
        if self.subnets_asked.is_none() && self.subnets_told.is_some_and(|told| now >= told + SUBNETS_FRESH) {
            self.read_subnets();
        }
        let waits = self.subnets_asked.is_some_and(|asked| now < asked + SUBNETS_WAIT);
        if waits {
            let at = self.clock.now() + SUBNETS_WAIT;
            self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
        }
        waits
    }

    pub(super) fn subnets_read(&mut self, result: Result<Vec<Subnet>, Ec2Error>) {
        self.subnets_awaited = None;
        self.subnets_asked = None;
        self.subnets_told = result.is_ok().then(Instant::now);
        match result {
            Ok(subnets) => {
                self.subnets_pause = SUBNETS_PAUSE;
                self.excluded = excluded_subnets(&subnets);
                self.subnets = subnets;
                // A tag that was set or taken away concerns the ENIs that are there.
                self.store.set_excluded(&self.excluded);
                self.learn_ranges(&[]);
            }
            Err(error) => {
                // A role that may not ask goes on without discovery.
                if !error.is_denied() {
                    self.subnets_due = self.subnets_due.min(Instant::now() + self.subnets_pause);
                    if self.subnets.is_empty() && self.subnets_pause < SUBNETS_PATIENCE {
                        self.subnets_awaited = Some(format!("EC2 has not told the tags of the zone's subnets yet: {error}"));
                    }
                    self.subnets_pause = (self.subnets_pause * 2).min(SUBNETS_EVERY);
                }
                self.error("describe subnets", &error);
            }
        }
        self.place();
    }

    /// Where new ENIs go, from the settings, the cluster and the subnets.
    pub(super) fn place(&mut self) {
        let Some(primary) = self.store.enis().values().find(|eni| eni.is_primary()) else { return };
        let pool = &self.config.pool;
        self.placement = if pool.custom_networking {
            let cluster = self.cluster.borrow();
            match cluster.nodes.get(&self.node_name) {
                None => Placement::Nowhere(format!("node {} is not known yet", self.node_name)),
                Some(node) => {
                    let name = eni_config_name(node, &pool.eni_config_annotation, &pool.eni_config_label);
                    place_by_eni_config(name, cluster.eni_configs.get(name).map(Arc::as_ref), &primary.security_groups)
                }
            }
        } else if let Some(why) = &self.subnets_awaited {
            Placement::Nowhere(why.clone())
        } else {
            place_by_discovery(&self.subnets, &primary.subnet, &pool.cluster_name, pool.subnet_discovery, &primary.security_groups)
        };
    }

    pub(super) fn cluster_changed(&mut self) {
        self.cluster.borrow_and_update();
        self.find_wanting();
        self.place();
        self.set_max_pods();
    }

    /// The kubelet's limit if it is known, else the type's.
    pub(super) fn set_max_pods(&mut self) {
        let capacity = self.cluster.borrow().nodes.get(&self.node_name).and_then(|node| node.status.capacity.get("pods")?.value());
        let usable =
            self.pool_limits.cards.first().map_or(1, |(_, enis)| *enis).saturating_sub(u16::from(self.config.pool.custom_networking));
        let prefixes = self.targets.mode != stanchion_core::ipam::PoolMode::SecondaryIps;
        self.pool_limits.max_pods = match capacity {
            Some(pods) if pods >= 1.0 && pods <= f64::from(u16::MAX) => pods as u32,
            _ => self.limits.max_pods(usable, prefixes),
        };
    }

    /// Compares what is shown with what is known: adopts at once, forgets only what EC2 has missed for a while.
    pub(super) fn observed(&mut self, observation: Observation) {
        self.observing = false;
        self.observe_due = Instant::now() + self.observation_pause();
        if let Some((v4, v6)) = observation.vpc_cidrs
            && !v4.is_empty()
            && (v4 != self.vpc_cidrs || v6 != self.vpc_ipv6_cidrs)
        {
            (self.vpc_cidrs, self.vpc_ipv6_cidrs) = (v4, v6);
            self.host_due = Some(Instant::now());
        }
        let imds = observation.imds.unwrap_or_else(|error| {
            self.error_text("read IMDS", error);
            Vec::new()
        });
        self.learn_ranges(&imds);
        match observation.ec2 {
            Some(Ok(ec2)) => {
                self.ec2_verified = true;
                self.describe_retry = Retry::new();
                self.memory.succeeded(Ec2Action::DescribeNetworkInterfaces, self.clock.now());
                self.adopt(&imds, Some(&ec2));
                let there = ec2.iter().map(|eni| (eni.id.clone(), ec2_cidrs(eni))).collect();
                self.forget_missing(&there, GONE_AFTER);
                self.resolve_doubts(&ec2);
                if !self.missing.is_empty() || !self.doubtful.is_empty() {
                    self.observe_due = self.observe_due.min(Instant::now() + GONE_AFTER);
                }
            }
            Some(Err(error)) => {
                self.ec2_verified = false;
                self.describe_retry.failed(DESCRIBE_PAUSE);
                self.memory.failed(&error, None, self.clock.now());
                self.error("describe ENIs", &error);
            }
            None if self.config.pool.imds_only => {
                self.adopt(&imds, None);
                // A read that failed tells nothing of what is gone, nor does one without the primary ENI, which cannot go.
                if imds.iter().any(|eni| eni.mac == self.identity.primary_mac) {
                    let there = imds.iter().map(|eni| (eni.id.clone(), imds_cidrs(eni))).collect();
                    self.forget_missing(&there, HIDDEN_AT_MOST);
                }
            }
            None => {}
        }
        self.observe_due = self.observe_due.min(Instant::now() + self.observation_pause());
        self.follow_groups(&imds);
    }

    /// Takes what is shown and not known.
    pub(super) fn adopt(&mut self, imds: &[ImdsEni], ec2: Option<&[Eni]>) {
        let now = self.clock.now();
        let ids: BTreeSet<&EniId> = match ec2 {
            Some(ec2) => ec2.iter().map(|eni| &eni.id).collect(),
            None => imds.iter().map(|eni| &eni.id).collect(),
        };
        for id in ids {
            let shown = imds.iter().find(|eni| eni.id == *id);
            let described = ec2.and_then(|enis| enis.iter().find(|eni| eni.id == *id));
            let subnet = described.map(|eni| &eni.subnet).and_then(|subnet| self.subnets.iter().find(|known| known.id == *subnet));
            let Some(mut record) = self.adoption(now).record(shown, described, subnet) else { continue };
            if self.is_in_hand(&record) {
                continue;
            }
            record.subnet_cidr = record.subnet_cidr.or_else(|| self.known_subnet_cidr(&record.subnet));
            record.cidrs.retain(|cidr, _| !self.store.is_going(*cidr, now) && !self.store.is_elsewhere(&record.id, *cidr, now));
            match self.store.eni_mut(&record.id) {
                Some(known) => {
                    if is_hands_off(known.role) && !is_hands_off(record.role) {
                        tracing::info!(eni = %record.id, mac = %record.mac, role = ?record.role, "adopted, as EC2 tells that it is ours");
                        known.state = EniState::Joining;
                        known.added = now;
                        known.cidrs.clear();
                        self.host_due = Some(Instant::now());
                    }
                    known.role = record.role;
                    known.kind = record.kind;
                    known.attachment = record.attachment.or(known.attachment.take());
                    known.security_groups = record.security_groups;
                    known.primary_ipv4 = record.primary_ipv4.or(known.primary_ipv4);
                    known.subnet_cidr = record.subnet_cidr.or(known.subnet_cidr);
                    let id = record.id;
                    self.store.add_cidrs(&id, record.cidrs.into_keys());
                }
                None if is_hands_off(record.role) => self.store.put_eni(record),
                None => {
                    tracing::info!(eni = %record.id, mac = %record.mac, role = ?record.role, "adopted");
                    record.state = EniState::Joining;
                    self.store.put_eni(record);
                    self.host_due = Some(Instant::now());
                }
            }
            if let Some(eni) = described {
                if eni.mac == self.identity.primary_mac {
                    self.connection_tracking = eni.connection_tracking;
                }
                self.tend(eni);
            }
        }
        self.place();
    }

    /// An action of ours is changing it: what Describe shows meanwhile is neither old nor new.
    fn is_in_hand(&self, record: &StoredEni) -> bool {
        self.in_flight.values().any(|action| match action {
            Action::AttachEni { network_card, device_index, .. } => {
                *network_card == record.network_card && *device_index == record.device_index
            }
            other => other.eni() == Some(&record.id),
        })
    }

    /// Gives an adopted ENI the tags it lacks, and one that a crash of ours left without it its end with the instance. Once for
    /// each ENI; what failed is tried again at the next look.
    fn tend(&mut self, eni: &Eni) {
        let pool = &self.config.pool;
        let managed = self.store.enis().get(&eni.id).is_some_and(|stored| !is_hands_off(stored.role) && stored.kind != EniKind::Trunk);
        if !managed || pool.disable_provisioning || !self.tagged.insert(eni.id.clone()) {
            return;
        }
        let tags = missing_tags(eni, &self.identity.instance, &pool.cluster_name, &pool.additional_eni_tags);
        let outlives = eni.attachment.as_ref().filter(|attachment| !attachment.delete_on_termination);
        let attachment = outlives.filter(|_| eni.description.starts_with(DESCRIPTION_PREFIX)).map(|attachment| attachment.id.clone());
        if tags.is_empty() && attachment.is_none() {
            return;
        }
        let (executor, id) = (self.executor.clone(), eni.id.clone());
        self.tasks.spawn(async move {
            let tagged = if tags.is_empty() { Ok(()) } else { executor.create_tags(&id, &tags).await };
            let ends = match &attachment {
                Some(attachment) => executor.set_delete_on_termination(&id, attachment, &mut Vec::new()).await,
                None => Ok(()),
            };
            let result = tagged.and(ends).map_err(|error| chain(&error));
            Work::Tended(id, result)
        });
    }

    pub(super) fn tended(&mut self, id: &EniId, result: Result<(), String>) {
        if let Err(error) = result {
            self.tagged.remove(id);
            self.error_text("tag ENI", format!("{id}: {error}"));
        }
    }

    /// Forgets ENIs and CIDRs that were not `there` in looks at least `after` apart, nor in any between. Allocations stay: they end with
    /// their pods.
    fn forget_missing(&mut self, there: &BTreeMap<EniId, Vec<IpNet>>, after: Duration) {
        let now = self.clock.now();
        let mut missing = BTreeMap::new();
        for eni in self.store.enis().values() {
            let doubtful = self.doubtful.contains_key(&(eni.id.clone(), None));
            if (eni.state == EniState::Releasing && !doubtful) || self.in_flight.values().any(|action| action.eni() == Some(&eni.id)) {
                continue;
            }
            match there.get(&eni.id) {
                None => drop(missing.insert((eni.id.clone(), None), now)),
                Some(there) => {
                    for cidr in eni.cidrs.keys().filter(|cidr| !there.contains(cidr)) {
                        missing.insert((eni.id.clone(), Some(*cidr)), now);
                    }
                }
            }
        }
        for (what, since) in &mut missing {
            if let Some(first) = self.missing.get(what) {
                *since = *first;
            }
        }
        let gone: Vec<_> = missing.iter().filter(|(_, since)| now.since(**since) >= after).map(|(what, _)| what.clone()).collect();
        for what in gone {
            missing.remove(&what);
            self.forget(&what.0, what.1);
        }
        self.missing = missing;
    }

    /// What EC2 still has after a while was not taken away and serves again; what it has not goes the way of the missing.
    fn resolve_doubts(&mut self, ec2: &[Eni]) {
        let now = self.clock.now();
        for ((id, cidr), since) in std::mem::take(&mut self.doubtful) {
            let described = ec2.iter().find(|eni| eni.id == id);
            let there = described.is_some_and(|eni| cidr.is_none_or(|cidr| ec2_cidrs(eni).contains(&cidr)));
            let known = self.store.enis().get(&id).is_some_and(|eni| cidr.is_none_or(|cidr| eni.cidrs.contains_key(&cidr)));
            if !known {
                continue;
            }
            if !there || now.since(since) < GONE_AFTER {
                self.doubtful.insert((id, cidr), since);
                continue;
            }
            match cidr {
                Some(cidr) => self.store.set_leaving(&id, cidr, false),
                None => {
                    if let Some(eni) = self.store.eni_mut(&id) {
                        eni.state = EniState::Serving;
                    }
                }
            }
        }
    }

    fn forget(&mut self, id: &EniId, cidr: Option<IpNet>) {
        let held = |cidr: &IpNet| self.store.assigned_in(*cidr);
        match cidr {
            Some(cidr) => {
                self.counters.force_removed_ips += held(&cidr);
                tracing::warn!(eni = %id, %cidr, "the ENI no longer has this CIDR");
                self.store.remove_cidr(id, cidr);
            }
            None => {
                let pods: u64 = self.store.enis().get(id).map_or(0, |eni| eni.cidrs.keys().map(held).sum());
                self.counters.force_removed_enis += u64::from(pods > 0);
                tracing::warn!(eni = %id, pods, "this ENI is no longer attached");
                self.store.remove_eni(id);
                self.host_due = Some(Instant::now());
            }
        }
    }

    /// What the host network shall be.
    pub(super) fn host_plan(&self) -> HostPlan {
        let network = &self.config.network;
        let managed = self.store.enis().values().filter(|eni| !is_hands_off(eni.role) && eni.state != EniState::Releasing);
        let primary = self.store.enis().values().find(|eni| eni.is_primary()).and_then(|eni| eni.primary_ipv4).or(self.identity.local_ipv4);
        let bypass = self.vpc_cidrs.iter().chain(&network.exclude_snat_cidrs).copied().collect();
        let randomize = match network.randomize_snat {
            RandomizeSnat::Prng => Randomize::Fully,
            RandomizeSnat::HashRandom => Randomize::Hash,
            RandomizeSnat::None => Randomize::No,
        };
        let mut plan = HostPlan {
            enis: managed.filter_map(|eni| eni_plan(eni, network.eni_mtu)).collect(),
            pods: self.pod_hosts(),
            branches: Vec::new(),
            strict_branches: self.config.pool.pod_eni && self.config.pool.branch_mode == BranchMode::Strict,
            veth_prefix: network.veth_prefix.clone(),
            snat: primary.filter(|_| !network.external_snat && !self.config.pool.ipv6).map(|to| Snat { to, bypass, randomize }),
            node_port_support: network.node_port_support,
            mark: network.connmark,
            external_service_cidrs: network.external_service_cidrs.clone(),
            ipv6: self.config.pool.ipv6,
            egress: egress::wanted(&self.config, self.identity.local_ipv4, self.identity.ipv6, randomize),
            tcp_early_demux: !network.disable_tcp_early_demux,
        };
        self.add_branches(&mut plan);
        plan
    }

    fn pod_hosts(&self) -> Vec<PodHost> {
        let prefix = &self.config.network.veth_prefix;
        let named = self.store.allocations().values().filter(|allocation| !allocation.pod.name.is_empty());
        named
            .flat_map(|allocation| {
                allocation.held.iter().enumerate().filter_map(|(index, held)| {
                    let table = self.store.eni_of(held.address)?.route_table;
                    Some(PodHost::new(prefix, &allocation.pod, index, held.address, table))
                })
            })
            .collect()
    }

    /// ENIs whose interface is there and whose operations all succeeded begin to serve.
    pub(super) fn host_done(&mut self, report: Result<HostReport, String>) {
        self.host_running = false;
        let now = Instant::now();
        let heal_at = now + HEAL_EVERY;
        let report = match report {
            Ok(report) => report,
            Err(error) => {
                self.host_refuses(vec![error]);
                self.host_pause = (self.host_pause * 2).clamp(LINK_PAUSE.0, HEAL_EVERY);
                self.host_due = Some(now + self.host_pause);
                return;
            }
        };
        let as_before = self.host_refuses(report.failed.iter().map(|failed| format!("{:?}: {}", failed.op, failed.error)).collect());
        let planned = self.host_planned.take();
        if !report.applied.is_empty() {
            self.host_changed(&report.applied, planned.is_some() && planned == self.host_in_force);
        }
        let trouble = !report.failed.is_empty();
        let mut waits = false;
        let mut ready = Vec::new();
        for eni in self.store.enis().values().filter(|eni| eni.state == EniState::Joining && !eni.lacks_range()) {
            // One that joined after the plan was made waits for the next.
            let newer = !planned.as_ref().is_some_and(|plan| plan.enis.iter().any(|planned| planned.id == eni.id));
            let refused = report.failed.iter().any(|failed| concerns(&failed.op, eni));
            if newer || refused || report.missing.contains(&eni.mac) {
                waits = true;
            } else {
                ready.push(eni.id.clone());
            }
        }
        let progress = !ready.is_empty();
        for id in ready {
            if let Some(eni) = self.store.eni_mut(&id) {
                eni.state = EniState::Serving;
                tracing::info!(eni = %eni.id, device = eni.device_index, table = eni.route_table, "ENI serves pods");
            }
        }
        let again = if !waits && !trouble {
            self.host_pause = LINK_PAUSE.0;
            heal_at
        } else {
            // What is refused again and again, as a sysctl on a read-only file system, is not worth more than the healer's looks.
            let longest = if waits || !as_before { LINK_PAUSE.1 } else { HEAL_EVERY };
            self.host_pause = if progress { LINK_PAUSE.0 } else { (self.host_pause * 2).clamp(LINK_PAUSE.0, longest) };
            now + self.host_pause
        };
        self.host_due = Some(self.host_due.map_or(again, |due| due.min(again)));
        self.host_in_force = planned.filter(|_| !trouble && report.missing.is_empty());
    }

    /// Tells what the host refuses, once until it was not refused; whether nothing of it is new.
    fn host_refuses(&mut self, refused: Vec<String>) -> bool {
        let before = std::mem::replace(&mut self.host_refused, refused.clone());
        let new: Vec<_> = refused.into_iter().filter(|failure| !before.contains(failure)).collect();
        let as_before = new.is_empty();
        new.into_iter().for_each(|failure| self.error_text("host network", failure));
        as_before
    }

    /// Tells what was done to the host network. With the plan that was in force it was damage, as what the healer finds.
    fn host_changed(&mut self, ops: &[NetOp], was_in_force: bool) {
        if was_in_force {
            tracing::warn!(?ops, "healed: the host network was not as planned; somebody changed it, or an interface has just come");
            ops.iter().for_each(|op| *self.counters.healed.entry(op.subject()).or_default() += 1);
        } else {
            tracing::info!(operations = ops.len(), "host network changed");
        }
    }

    /// Deletes ENIs that nodes of this cluster left behind.
    fn sweep(&mut self) {
        let Some(vpc) = self.place.as_ref().map(|place| place.vpc.clone()) else { return };
        let own_in_hand = self.in_flight.values().any(|action| matches!(action, Action::AttachEni { .. } | Action::ReleaseEni { .. }));
        let (executor, own, now) = (self.executor.clone(), self.identity.instance.clone(), self.clock.now());
        let mut tags = BTreeMap::new();
        if !self.config.pool.cluster_name.is_empty() {
            tags.insert(TAG_CLUSTER.to_owned(), self.config.pool.cluster_name.clone());
        }
        self.tasks.spawn(async move {
            let call = executor.ec2.describe_leaked(&vpc, &tags);
            let found = match executor.meter.run(Ec2Action::DescribeNetworkInterfaces, call).await {
                Ok(found) => found,
                Err(error) => return Work::Swept(Err(chain(&error))),
            };
            let mut deleted = 0;
            for eni in found {
                let ours = eni.tags.get(stanchion_core::ipam::TAG_INSTANCE).is_some_and(|instance| instance == own.as_str());
                match judge_leak(&eni, &own, ours && own_in_hand, now) {
                    Leak::Leave => {}
                    Leak::TagAge => {
                        let tag = BTreeMap::from([(TAG_CREATED.to_owned(), now.to_string())]);
                        if let Err(error) = executor.create_tags(&eni.id, &tag).await {
                            return Work::Swept(Err(format!("tagging {}: {}", eni.id, chain(&error))));
                        }
                    }
                    Leak::Delete => deleted += u32::from(executor.delete(&eni.id).await),
                }
            }
            Work::Swept(Ok(deleted))
        });
    }

    pub(super) fn swept(&mut self, result: Result<u32, String>) {
        match result {
            Ok(0) => {}
            Ok(deleted) => tracing::info!(deleted, "deleted ENIs that were left behind"),
            Err(error) => self.error_text("sweep", error),
        }
    }
}

fn is_hands_off(role: EniRole) -> bool {
    matches!(role, EniRole::Unmanaged | EniRole::Unconfirmed | EniRole::EfaOnly | EniRole::OtherCard)
}

/// The operation makes the ENI's table, rule or address.
fn concerns(op: &NetOp, eni: &StoredEni) -> bool {
    match op {
        NetOp::ReplaceRoute(route) => route.table == eni.route_table,
        NetOp::AddRule(rule) => rule.table == eni.route_table,
        NetOp::AddAddress { address, .. } => Some(address.addr()) == eni.primary_ipv4.map(Into::into),
        _ => false,
    }
}

/// `None` while its subnet's range is not known: with a wrong length the gateway would be wrong, and its pods would reach nobody.
fn eni_plan(eni: &StoredEni, mtu: u32) -> Option<EniPlan> {
    if eni.lacks_range() {
        return None;
    }
    let role = match eni.role {
        _ if eni.is_primary() => HostRole::Primary,
        EniRole::Trunk => HostRole::Trunk,
        _ => HostRole::Secondary,
    };
    let length = eni.subnet_cidr.map_or(32, |cidr| cidr.prefix_len());
    Some(EniPlan {
        id: eni.id.clone(),
        mac: eni.mac,
        role,
        device_index: u32::from(eni.device_index),
        network_card: u32::from(eni.network_card),
        ipv4: eni.primary_ipv4.and_then(|address| Ipv4Net::new(address, length).ok()),
        ipv6: None,
        table: eni.route_table,
        mtu,
    })
}
