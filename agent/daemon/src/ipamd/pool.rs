//! Planning, starting actions and taking their results.

use std::time::Duration;

use ipnet::IpNet;
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api, Ec2Error, Imds};
use stanchion_core::ids::{EniId, SubnetId};
use stanchion_core::ipam::{
    Action, Blocked, DESCRIPTION_PREFIX, Demand, EniRole, EniState, Placement, PlanInput, Provisioning, plan, tags_for_new,
};
use stanchion_core::network::HostNetwork;
use tokio::time::Instant;

use super::actor::{Actor, Work};
use super::execute::{Done, Outcome};
use super::files::FileError;

/// Addresses on their way back to EC2 are not given out for this long, whatever a stale Describe or IMDS shows meanwhile; it
/// is on disk before EC2 is asked. Longer than EC2 must miss them before they are forgotten.
pub(super) const GOING: Duration = Duration::from_secs(180);
/// An ENI that may have been left detached is looked for after this time.
const SWEEP_AFTER_DOUBT: Duration = Duration::from_secs(300);
/// How soon EC2's picture is read after an action left ours in doubt.
const DOUBT: Duration = Duration::from_secs(2);

impl<E: Ec2Api, I: Imds, H: HostNetwork> Actor<E, I, H> {
    /// Asks the planner and starts what it says.
    pub(super) fn plan(&mut self) {
        let now = self.clock.now();
        self.demand.clear();
        let bound = self.bound_pods();
        for (position, (card, _)) in self.pool_limits.cards.iter().enumerate() {
            let waiting = self.waiting.iter().filter(|waiting| position == 0 || waiting.request.multi_nic).count();
            let demand = Demand { waiting: u32::try_from(waiting).unwrap_or(u32::MAX), bound: if position == 0 { bound } else { 0 } };
            self.demand.insert(*card, demand);
        }
        let mut targets = self.targets;
        if targets.reserve_trunk && self.trunk_is_overdue() && !self.waiting.is_empty() {
            targets.reserve_trunk = false;
        }
        let in_flight: Vec<Action> = self.in_flight.values().cloned().collect();
        let planned = plan(&PlanInput {
            store: &self.store,
            in_flight: &in_flight,
            memory: &self.memory,
            targets: &targets,
            limits: &self.pool_limits,
            demand: &self.demand,
            placement: &self.placement,
            provisioning: self.provisioning(),
            now,
        });
        self.blocked = planned.blocked;
        self.memory.surplus_since = planned.surplus_since;
        self.wake_at = planned.wake_at;
        self.ever_had_addresses |= self.pool_limits.cards.iter().any(|(card, _)| self.store.stats(*card, now).total > 0);
        let attaches = |action: &Action| matches!(action, Action::AttachEni { .. });
        let later = planned.actions.iter().any(attaches) && self.awaits_subnets();
        for action in planned.actions.into_iter().filter(|action| !(later && attaches(action))) {
            self.start(action);
        }
    }

    fn provisioning(&self) -> Provisioning {
        if self.terminating {
            return Provisioning::Terminating;
        }
        if self.config.pool.disable_provisioning {
            return Provisioning::Disabled;
        }
        let cordoned = self.cluster.borrow().nodes.get(&self.node_name).is_some_and(|node| {
            node.spec.unschedulable
                || node.spec.taints.iter().any(|taint| taint.key == "node.kubernetes.io/unschedulable" && taint.effect == "NoSchedule")
        });
        if cordoned && !self.config.pool.manage_non_schedulable { Provisioning::Unschedulable } else { Provisioning::On }
    }

    fn start(&mut self, action: Action) {
        let now = self.clock.now();
        if let Err(error) = self.announce_going(&action) {
            // What is not on disk is not begun; the next plan asks again.
            return self.error("write cool-downs", &error);
        }
        for call in action.ec2_actions() {
            self.memory.called(*call, now);
        }
        self.next_action += 1;
        let id = self.next_action;
        tracing::info!(%action, reason = %action.reason(), "pool");
        if let Some(card) = self.card_of(&action) {
            let decisions = self.decisions.entry(card).or_default();
            decisions.push(format!("{now}: {action}, as {}", action.reason()));
            let surplus = decisions.len().saturating_sub(8);
            decisions.drain(..surplus);
        }
        let executor = self.executor.clone();
        match &action {
            Action::Assign { eni, request, .. } => {
                let (eni, request) = (eni.clone(), *request);
                self.tasks.spawn(async move { Work::Action(id, executor.assign(eni, request).await) });
            }
            Action::AttachEni { network_card, device_index, subnet, request, .. } => {
                let create = self.create_request(id, subnet, *request);
                let (index, card) = (*device_index, *network_card);
                self.tasks.spawn(async move { Work::Action(id, executor.attach(create, index, card).await) });
            }
            Action::Unassign { eni, cidrs, .. } => {
                let (eni, cidrs) = (eni.clone(), cidrs.clone());
                cidrs.iter().for_each(|cidr| self.store.set_leaving(&eni, *cidr, true));
                self.tasks.spawn(async move { Work::Action(id, executor.unassign(eni, cidrs).await) });
            }
            Action::ReleaseEni { eni, .. } => {
                let attachment = self.store.enis().get(eni).and_then(|eni| eni.attachment.clone());
                if let Some(eni) = self.store.eni_mut(eni) {
                    eni.state = EniState::Releasing;
                }
                let eni = eni.clone();
                self.tasks.spawn(async move { Work::Action(id, executor.release(eni, attachment).await) });
            }
        }
        self.in_flight.insert(id, action);
    }

    /// What goes back to EC2 stops being given out first, and a crash does not forget that.
    fn announce_going(&mut self, action: &Action) -> Result<(), FileError> {
        let cidrs: Vec<_> = match action {
            Action::Unassign { cidrs, .. } => cidrs.clone(),
            Action::ReleaseEni { eni, .. } => self.store.enis().get(eni).map(|eni| eni.cidrs.keys().copied().collect()).unwrap_or_default(),
            Action::Assign { .. } | Action::AttachEni { .. } => return Ok(()),
        };
        let now = self.clock.now();
        cidrs.into_iter().for_each(|cidr| self.store.cool(cidr, now + GOING));
        self.files.write_cooling(&self.store, now)
    }

    fn card_of(&self, action: &Action) -> Option<u16> {
        match action {
            Action::AttachEni { network_card, .. } => Some(*network_card),
            other => other.eni().and_then(|id| self.store.enis().get(id)).map(|eni| eni.network_card),
        }
    }

    /// The token is unique to this try of this process and the same for every repetition of its request.
    fn create_request(&self, id: u64, subnet: &SubnetId, request: AddressRequest) -> CreateEni {
        let security_groups = match &self.placement {
            Placement::Subnets { security_groups, .. } if self.config.pool.custom_networking => security_groups.clone(),
            Placement::Subnets { security_groups, .. } => self.wanted_groups(subnet).map_or_else(|| security_groups.clone(), <[_]>::to_vec),
            Placement::Nowhere(_) => Vec::new(),
        };
        let now = self.clock.now();
        let instance = &self.identity.instance;
        let tags = tags_for_new(instance, &self.config.pool.cluster_name, &self.config.pool.additional_eni_tags, now.to_string());
        CreateEni {
            client_token: format!("{instance}-{}-{id}", now.0),
            subnet: subnet.clone(),
            security_groups,
            description: format!("{DESCRIPTION_PREFIX}{instance}"),
            tags,
            addresses: Some(request),
            connection_tracking: self.connection_tracking,
        }
    }

    /// Takes the result of an action.
    pub(super) fn action_done(&mut self, id: u64, outcome: Outcome) {
        let now = self.clock.now();
        let Some(action) = self.in_flight.get(&id).cloned() else { return };
        let asked = match &action {
            Action::Assign { subnet, request, .. } | Action::AttachEni { subnet, request, .. } => Some((subnet, *request)),
            Action::Unassign { .. } | Action::ReleaseEni { .. } => None,
        };
        for (call, error) in &outcome.steps {
            match error {
                None => self.memory.succeeded(*call, now),
                Some(error) => self.memory.failed(error, asked, now),
            }
        }
        self.in_flight.remove(&id);
        match outcome.result {
            Done::Assigned { eni, cidrs } => {
                if let Some((subnet, request)) = asked {
                    self.memory.subnet_gave(subnet, request);
                }
                self.granted(&eni, &cidrs);
                self.store.add_cidrs(&eni, cidrs);
            }
            Done::Refreshed { eni, cidrs } => {
                let there: Vec<_> = cidrs
                    .into_iter()
                    .filter(|cidr| !self.store.is_going(*cidr, now) && !self.store.is_elsewhere(&eni, *cidr, now))
                    .collect();
                self.store.add_cidrs(&eni, there);
                self.observe_due = self.observe_due.min(Instant::now() + DOUBT);
            }
            Done::Attached(eni) => {
                if let Some((subnet, request)) = asked {
                    self.memory.subnet_gave(subnet, request);
                    self.memory.subnet_took_eni(subnet);
                }
                tracing::info!(eni = %eni.id, mac = %eni.mac, subnet = %eni.subnet, "attached");
                let subnet = self.subnets.iter().find(|subnet| subnet.id == eni.subnet);
                if let Some(mut record) = self.adoption(now).record(None, Some(&eni), subnet) {
                    self.granted(&record.id, &record.cidrs.keys().copied().collect::<Vec<_>>());
                    record.subnet_cidr = record.subnet_cidr.or_else(|| self.known_subnet_cidr(&record.subnet));
                    record.state = EniState::Joining;
                    if record.lacks_range() {
                        // IMDS tells it.
                        self.observe_due = self.observe_due.min(Instant::now() + DOUBT);
                    }
                    self.store.put_eni(record);
                    self.host_due = Some(Instant::now());
                }
            }
            Done::Unassigned { eni, cidrs } => cidrs.into_iter().for_each(|cidr| self.store.remove_cidr(&eni, cidr)),
            Done::Released { eni, deleted } => {
                if !deleted {
                    self.sweep_due = self.sweep_due.min(Instant::now() + SWEEP_AFTER_DOUBT);
                    self.error_text("delete ENI", format!("{eni} is detached but could not be deleted; the sweep tries again"));
                }
                self.store.remove_eni(&eni);
                self.host_due = Some(Instant::now());
            }
            Done::Failed(error) => self.action_failed(&action, &error),
        }
    }

    /// Ranges that left another ENI just before are told to the next process, before anybody gets an address of them: as long as the
    /// file is not written it says that they are on their way to EC2, and they serve nobody.
    fn granted(&mut self, eni: &EniId, cidrs: &[IpNet]) {
        let now = self.clock.now();
        let moved = cidrs.iter().filter(|cidr| self.store.granted(eni, **cidr, now)).count();
        if moved > 0
            && let Err(error) = self.files.write_cooling(&self.store, now)
        {
            self.error("write cool-downs", &error);
        }
    }

    fn action_failed(&mut self, action: &Action, error: &Ec2Error) {
        // After a reply that got lost it may be gone: it serves nobody until EC2 has told.
        let unknown = matches!(error, Ec2Error::NoReply { .. });
        let now = self.clock.now();
        match action {
            Action::Unassign { eni, cidrs, .. } if unknown => {
                self.doubtful.extend(cidrs.iter().map(|cidr| ((eni.clone(), Some(*cidr)), now)));
            }
            Action::ReleaseEni { eni, .. } if unknown => drop(self.doubtful.insert((eni.clone(), None), now)),
            Action::Unassign { eni, cidrs, .. } => cidrs.iter().for_each(|cidr| self.store.set_leaving(eni, *cidr, false)),
            Action::ReleaseEni { eni, .. } => {
                if let Some(eni) = self.store.eni_mut(eni) {
                    eni.state = EniState::Serving;
                }
            }
            // The list that named the subnet may be old.
            Action::AttachEni { .. } if error.refuses_subnet() => self.subnets_due = Instant::now(),
            Action::Assign { .. } | Action::AttachEni { .. } => {}
        }
        // What EC2 does not find, or has another opinion of, we must look at.
        if matches!(
            error,
            Ec2Error::NotFound { .. } | Ec2Error::AttachmentConflict { .. } | Ec2Error::AddressLimit { .. } | Ec2Error::NoReply { .. }
        ) {
            self.ec2_verified = false;
            self.observe_due = self.observe_due.min(Instant::now() + DOUBT);
            self.sweep_due = self.sweep_due.min(Instant::now() + SWEEP_AFTER_DOUBT);
        }
        let operation = match action {
            Action::Assign { .. } => "increaseIPPool",
            Action::AttachEni { .. } => "increaseIPPoolAllocENI",
            Action::Unassign { .. } => "decreaseIPPool",
            Action::ReleaseEni { .. } => "tryFreeENI",
        };
        self.error_text(operation, format!("{action}: {error}"));
    }

    /// For the kubelet's event: everything that stands between a pod and an address.
    pub(super) fn why_no_address(&self) -> String {
        let now = self.clock.now();
        let mut parts = Vec::new();
        for (card, max) in &self.pool_limits.cards {
            let stats = self.store.stats(*card, now);
            let enis = self.store.enis().values().filter(|eni| eni.network_card == *card);
            let full = enis.clone().filter(|eni| eni.serves_pods() && eni.room() == 0).count();
            parts.push(format!(
                "{} of {} ENIs full (limit {max}), {} addresses, {} held, {} cooling down",
                full,
                enis.count(),
                stats.total,
                stats.assigned,
                stats.cooling
            ));
        }
        parts.extend(self.blocked.iter().map(|(_, blocked)| self.told(blocked)));
        parts.extend(self.in_flight.values().map(|action| format!("under way: {action}")));
        let joining = self.store.enis().values().filter(|eni| eni.state == EniState::Joining);
        parts.extend(joining.map(|eni| {
            let lacking = if eni.lacks_range() {
                format!("the range of its subnet {} is not known: IMDS does not tell it", eni.subnet)
            } else {
                format!("its interface {} is not ready", eni.mac)
            };
            format!("{} is attached but {lacking} since {} s", eni.id, now.since(eni.added).as_secs())
        }));
        let unconfirmed = self.store.enis().values().filter(|eni| eni.role == EniRole::Unconfirmed);
        parts.extend(unconfirmed.map(|eni| format!("{} is not used: EC2 has not told whether it is the agent's", eni.id)));
        if !self.blocked.iter().any(|(_, blocked)| tells_failure(blocked))
            && let Some(last) = self.errors.back()
        {
            parts.push(format!("last failure at {}: {}", last.time, last.error));
        }
        parts.push("see `stanchion enis` on the node".to_owned());
        parts.join("; ")
    }

    /// With the subnet's size where it is known.
    fn told(&self, blocked: &Blocked) -> String {
        /// The first four addresses and the last one are EC2's (VPC user guide, subnet sizing).
        const EC2S_OWN: u64 = 5;
        if let Blocked::Subnet { subnet, since, until, error } = blocked
            && let Some(cidr) = self.known_subnet_cidr(subnet)
        {
            let size = (1u64 << (32 - cidr.prefix_len())).saturating_sub(EC2S_OWN);
            return format!("subnet {subnet} has 0 free of {size} since {since}, EC2 said {error}; next try at {until}");
        }
        blocked.to_string()
    }
}

/// EC2's words are in it.
fn tells_failure(blocked: &Blocked) -> bool {
    matches!(blocked, Blocked::Subnet { .. } | Blocked::ClosedSubnet { .. } | Blocked::ActionPaused { error: Some(_), .. })
}
