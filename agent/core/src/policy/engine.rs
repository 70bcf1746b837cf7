//! The compiler as a state machine: a cluster snapshot and the local pods in, map operations in safe order out.
//!
//! Work is done for what changed only: policies whose objects changed, pods whose objects changed, and what depends on them.
//! An address's identity is the interned [`Signature`] of the address, an endpoint's policy set the interned list of the
//! policies that select it; the verdict entries are a function of the two.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::cluster::{ClusterState, Kind};
use crate::ids::PodName;
use crate::objects::Pod;

use super::dns::Answer;
use super::image::{EndpointImage, MapImage, MapOp, Slot};
use super::intern::{Interned, PairChange, Pairs, RuleName};
use super::model::{Direction, Problem};
use super::names::{Full, KnownName, Names};
use super::order::Meanings as _;
use super::order::{Change, image_entries, moved, order};
use super::subjects::{Stale, Subjects};
use super::world;

/// Namespace annotation: `"true"` reports what NetworkPolicies would deny in the namespace's pods and lets it pass. What policies
/// of the cluster deny is denied: who may annotate a namespace often may not write these.
pub const AUDIT_ANNOTATION: &str = "policy.stanchion.dev/audit";

/// What to do with a local pod that the cluster snapshot does not have (yet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownPod {
    /// Nothing passes but the own node's traffic (`strict`).
    #[default]
    Closed,
    /// Everything passes (`standard`).
    Open,
}

/// What to do with a pod that no NetworkPolicy selects, where no policy of the cluster decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnselectedPod {
    /// Everything passes (`standard`), as Kubernetes says.
    #[default]
    Open,
    /// Nothing passes but the own node's traffic (`strict`).
    Closed,
}

/// Whose resolution of policies counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// NetworkPolicy and ClusterNetworkPolicy objects, resolved here.
    #[default]
    Policies,
    /// PolicyEndpoint and ClusterPolicyEndpoint objects, as AWS's controller resolved them.
    Endpoints,
}

/// What the engine is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which objects policies are read from.
    pub source: Source,
    /// The own node: traffic with its addresses always passes.
    pub node_name: String,
    /// Pods whose policies cannot be known.
    pub unknown_pod: UnknownPod,
    /// Pods that no NetworkPolicy selects.
    pub unselected_pod: UnselectedPod,
    /// The annotations of pods say their addresses until their status does (`ANNOTATE_POD_IP`).
    pub annotated_pods: bool,
    /// Entries of all policy sets of the node together, beyond which the largest is closed.
    pub most_verdicts: usize,
}

impl Default for Settings {
    /// A quarter of the verdicts that the kernel's map takes, of which the agent's memory (256 MiB in the chart) and the kernel's that is
    /// counted with it hold no more while they are written.
    fn default() -> Self {
        Self {
            source: Source::default(),
            node_name: String::new(),
            unknown_pod: UnknownPod::default(),
            unselected_pod: UnselectedPod::default(),
            annotated_pods: false,
            most_verdicts: 1_048_576,
        }
    }
}

/// What is not known that a pod's policies depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// No snapshot was given.
    #[error("the cluster's policies and pods were not read")]
    Cluster,
    /// The snapshot has policies that may concern the pod, but not the pod.
    #[error("the pod was not seen in the cluster's state")]
    Pod,
    /// The snapshot has policies for the cluster, which go by the labels of namespaces, but not the pod's namespace.
    #[error("the pod's namespace was not seen in the cluster's state")]
    Namespace,
    /// Strict mode, and policies that were made lately may be missing from the snapshot.
    #[error("objects of kind {0:?}, by which policies go, cannot be read from the API server")]
    Policies(Kind),
}

/// A local pod as the datapath attached it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalPod {
    pub(super) name: PodName,
    pub(super) uid: String,
    pub(super) addresses: Vec<IpAddr>,
}

impl LocalPod {
    /// Its object, unless that is of an earlier pod of the same name.
    pub(super) fn object<'a>(&self, cluster: &'a ClusterState) -> Option<&'a Arc<Pod>> {
        let pod = cluster.pods.get(&self.name)?;
        (pod.is_known_as(&self.uid) && world::is_networked(pod)).then_some(pod)
    }
}

/// Which policy sets an endpoint has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Binding {
    pub(super) ingress: Option<u32>,
    pub(super) egress: Option<u32>,
    pub(super) audit: bool,
}

/// What an update has to look at.
#[derive(Default)]
struct Dirty {
    policies: bool,
    namespaces: bool,
    nodes: bool,
    services: bool,
    pods: BTreeSet<PodName>,
    slots: BTreeSet<Slot>,
    /// Addresses whose DNS names have changed.
    named: BTreeSet<IpAddr>,
}

/// The policy compiler of one node.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    cluster: Option<Arc<ClusterState>>,
    local: BTreeMap<Slot, LocalPod>,
    bindings: BTreeMap<Slot, Binding>,
    /// What is closed because its policies are too large.
    too_large: BTreeMap<Slot, Vec<Problem>>,
    interned: Interned,
    subjects: Subjects,
    extra_node_addresses: Vec<IpAddr>,
    /// The image has numbers that an earlier agent gave.
    from_before: bool,
    /// The directions in which an earlier agent policed pods; of use until the first snapshot.
    policed_before: BTreeMap<Slot, [bool; 2]>,
    image: MapImage,
}

impl Engine {
    /// Without a cluster and without pods.
    pub fn new(settings: Settings) -> Self {
        Self {
            interned: Interned::new(&settings),
            subjects: Subjects::new(settings.annotated_pods),
            settings,
            cluster: None,
            local: BTreeMap::new(),
            bindings: BTreeMap::new(),
            too_large: BTreeMap::new(),
            extra_node_addresses: Vec::new(),
            from_before: false,
            policed_before: BTreeMap::new(),
            image: MapImage::default(),
        }
    }

    /// Another answer for pods that are not known, from now on.
    pub fn set_unknown_pod(&mut self, unknown_pod: UnknownPod) {
        self.settings.unknown_pod = unknown_pod;
    }

    /// What the maps hold once every operation given so far was applied.
    pub fn image(&self) -> &MapImage {
        &self.image
    }

    /// Pods that are closed because their policies are too large. They come and go with pods, too, not only with policies.
    pub fn closed_as_too_large(&self) -> impl Iterator<Item = Slot> {
        self.too_large.keys().copied()
    }

    /// What is wrong in the policies of the last snapshot.
    pub fn problems(&self) -> Vec<Problem> {
        let mut too_large: Vec<Problem> = Vec::new();
        for problem in self.too_large.values().flatten() {
            if !too_large.contains(problem) {
                too_large.push(problem.clone());
            }
        }
        too_large.into_iter().chain(self.interned.problems()).collect()
    }

    /// The policies that select each local pod, by slot.
    pub fn policies(&self) -> BTreeMap<Slot, Vec<String>> {
        let names = self.interned.policies_of_sets();
        let of = |binding: &Binding| {
            let sets = [binding.ingress, binding.egress].into_iter().flatten();
            let mut all: Vec<String> = sets.filter_map(|set| names.get(&set)).flatten().cloned().collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        self.bindings.iter().map(|(slot, binding)| (*slot, of(binding))).collect()
    }

    /// The rule behind the number in a verdict; `None` for 0, the default of an isolated direction.
    pub fn rule(&self, id: u32) -> Option<&RuleName> {
        self.interned.rule(id)
    }

    /// The pod that has an address, by the datapath or the snapshot.
    pub fn pod_at(&self, address: IpAddr) -> Option<PodName> {
        self.subjects.pod_at(self.cluster.as_deref()?, address)
    }

    /// Whether policies can be judged for the pod: a snapshot is there and has the pod, of that uid if both are known.
    pub fn knows(&self, pod: &PodName, uid: &str) -> bool {
        let local = LocalPod { name: pod.clone(), uid: uid.to_owned(), addresses: Vec::new() };
        self.cluster.as_deref().is_some_and(|cluster| local.object(cluster).is_some())
    }

    /// Whether the pod's policies can be told: a snapshot is there and has the pod, or has no policy that could concern it.
    ///
    /// # Errors
    /// What is not known yet.
    pub fn can_judge(&self, pod: &PodName, uid: &str) -> Result<(), Missing> {
        let Some(cluster) = &self.cluster else { return Err(Missing::Cluster) };
        let local = LocalPod { name: pod.clone(), uid: uid.to_owned(), addresses: Vec::new() };
        let object = local.object(cluster);
        let by_endpoints = self.settings.source == Source::Endpoints;
        let (clusterwide, namespaced, kinds) = if by_endpoints {
            let namespaced = cluster.policy_endpoints.keys().any(|part| part.namespace == pod.namespace);
            (!cluster.cluster_policy_endpoints.is_empty(), namespaced, [Kind::PolicyEndpoint, Kind::ClusterPolicyEndpoint])
        } else {
            let namespaced = cluster.network_policies.keys().any(|policy| policy.namespace == pod.namespace);
            (!cluster.cluster_network_policies.is_empty(), namespaced, [Kind::NetworkPolicy, Kind::ClusterNetworkPolicy])
        };
        let is_strict = self.settings.unknown_pod == UnknownPod::Closed;
        if let Some(kind) = kinds.into_iter().chain([Kind::Namespace]).find(|kind| is_strict && cluster.stale.contains(kind)) {
            return Err(Missing::Policies(kind));
        }
        match object {
            None if clusterwide || namespaced => Err(Missing::Pod),
            Some(_) if clusterwide && !cluster.namespaces.contains_key(&pod.namespace) => Err(Missing::Namespace),
            _ => Ok(()),
        }
    }

    /// The cluster has changed (or is known for the first time).
    pub fn set_cluster(&mut self, cluster: &Arc<ClusterState>) -> Vec<MapOp> {
        let dirty = match &self.cluster {
            None => Dirty {
                policies: true,
                namespaces: true,
                nodes: true,
                services: true,
                // Pods of the node that the API server does not know have their addresses all the same.
                pods: cluster.pods.keys().chain(self.local.values().map(|pod| &pod.name)).cloned().collect(),
                slots: self.local.keys().copied().collect(),
                named: BTreeSet::new(),
            },
            Some(old) => Dirty {
                policies: !old.network_policies.same(&cluster.network_policies)
                    || !old.cluster_network_policies.same(&cluster.cluster_network_policies)
                    || !old.policy_endpoints.same(&cluster.policy_endpoints)
                    || !old.cluster_policy_endpoints.same(&cluster.cluster_policy_endpoints),
                namespaces: !old.namespaces.same(&cluster.namespaces),
                nodes: !old.nodes.same(&cluster.nodes),
                services: !old.services.same(&cluster.services) || !old.endpoint_slices.same(&cluster.endpoint_slices),
                pods: old.pods.changed(&cluster.pods).into_iter().collect(),
                slots: BTreeSet::new(),
                named: BTreeSet::new(),
            },
        };
        self.cluster = Some(Arc::clone(cluster));
        self.update(dirty)
    }

    /// Addresses of the own node beyond those in its Node object (secondary ENIs, link-local).
    pub fn set_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<MapOp> {
        self.extra_node_addresses = addresses.into_iter().collect();
        self.update(Dirty { nodes: true, ..Dirty::default() })
    }

    /// A pod was attached, or its addresses changed. Its addresses are the pod's from now on, whatever its status says.
    pub fn add_endpoint(&mut self, slot: Slot, pod: &PodName, uid: &str, addresses: &[IpAddr]) -> Vec<MapOp> {
        let local = LocalPod { name: pod.clone(), uid: uid.to_owned(), addresses: addresses.to_vec() };
        let mut dirty = Dirty { pods: BTreeSet::from([pod.clone()]), slots: BTreeSet::from([slot]), ..Dirty::default() };
        if let Some(replaced) = self.local.insert(slot, local) {
            if replaced.name != *pod || replaced.uid != uid {
                self.bindings.remove(&slot);
                self.policed_before.remove(&slot);
            }
            dirty.pods.insert(replaced.name);
        }
        self.update(dirty)
    }

    /// A pod was detached.
    pub fn remove_endpoint(&mut self, slot: Slot) -> Vec<MapOp> {
        self.policed_before.remove(&slot);
        let Some(gone) = self.local.remove(&slot) else { return Vec::new() };
        self.update(Dirty { pods: BTreeSet::from([gone.name]), slots: BTreeSet::from([slot]), ..Dirty::default() })
    }

    /// A pod got DNS answers at `now` (seconds). They count if an egress rule of its own speaks of the name, and for the pods of its namespace:
    /// so a pod teaches only names that policy lets it reach, and no other namespace's pods.
    ///
    /// # Errors
    /// Too many names are known; what fitted is in the operations.
    pub fn learn(&mut self, slot: Slot, answers: &[Answer], now: u64) -> (Vec<MapOp>, Result<(), Full>) {
        let Some(set) = self.bindings.get(&slot).and_then(|binding| binding.egress) else { return (Vec::new(), Ok(())) };
        let namespace = self.local.get(&slot).map(|pod| pod.name.namespace.clone()).unwrap_or_default();
        let mut named = BTreeSet::new();
        let mut result = Ok(());
        for answer in answers.iter().filter(|answer| self.interned.speaks_of(set, &answer.name)) {
            match self.subjects.names.learn(&namespace, answer, now) {
                Ok(true) => drop(named.insert(answer.address)),
                Ok(false) => {}
                Err(full) => result = Err(full),
            }
        }
        let ops = if named.is_empty() { Vec::new() } else { self.update(Dirty { named, ..Dirty::default() }) };
        (ops, result)
    }

    /// Names that an earlier agent knew; before the first snapshot.
    pub fn remember(&mut self, names: impl IntoIterator<Item = KnownName>) {
        for known in names {
            // An earlier agent had the same bound.
            let _no_room = self.subjects.names.keep(known);
        }
    }

    /// The directions in which an earlier agent policed pods, for what its maps do not tell; before the first snapshot.
    pub fn remember_policed(&mut self, policed: impl IntoIterator<Item = (Slot, [bool; 2])>) {
        self.policed_before.extend(policed);
    }

    /// Forgets names whose time has come at `now` (seconds), unless flows to their addresses are open.
    pub fn forget(&mut self, now: u64, is_open: impl Fn(IpAddr) -> bool) -> Vec<MapOp> {
        let named = self.subjects.names.expire(now, is_open);
        if named.is_empty() { Vec::new() } else { self.update(Dirty { named, ..Dirty::default() }) }
    }

    /// What is known of names.
    pub fn names(&self) -> &Names {
        &self.subjects.names
    }

    /// The maps hold `image`, not what the engine believes: gives what is missing.
    ///
    /// At start, before the first snapshot, nothing is written and pods that were enforced stay so; policy sets and identities
    /// whose content is unchanged keep their numbers when the snapshot comes, so that a restart without a change writes
    /// nothing. Later it is what mends maps that refused an operation: whatever of it and of those after it is still wanted
    /// comes again, after what no packet sees and nobody wants has made room.
    pub fn rebase(&mut self, image: MapImage) -> Vec<MapOp> {
        self.interned.avoid(&image);
        self.image = image;
        if self.cluster.is_some() {
            return self.write(PairChange::default(), true);
        }
        self.from_before = true;
        let slots: Vec<Slot> = self.local.keys().copied().collect();
        slots.into_iter().flat_map(|slot| self.unknown_endpoint(slot)).collect()
    }

    fn update(&mut self, dirty: Dirty) -> Vec<MapOp> {
        let Some(cluster) = self.cluster.clone() else {
            // Who may talk to the pod is not known yet; one that the maps already know keeps its record.
            return dirty.slots.into_iter().flat_map(|slot| self.unknown_endpoint(slot)).collect();
        };
        if dirty.policies {
            self.interned.resolve(&cluster);
        }
        let everyone = dirty.policies || dirty.namespaces;
        let slots: Vec<Slot> = self.local.keys().copied().collect();
        for slot in slots {
            let local = &self.local[&slot];
            if everyone || dirty.slots.contains(&slot) || dirty.pods.contains(&local.name) {
                let binding = self.bind(&cluster, slot);
                if self.bindings.insert(slot, binding) != Some(binding) {
                    self.too_large.remove(&slot);
                }
            }
        }
        self.bindings.retain(|slot, _| self.local.contains_key(slot));
        self.too_large.retain(|slot, _| self.local.contains_key(slot));
        self.use_sets();
        if dirty.nodes {
            self.subjects.set_own_node(&cluster, &self.settings.node_name, &self.extra_node_addresses);
        }
        let Dirty { namespaces, nodes, services, pods, named, .. } = dirty;
        let stale = Stale { namespaces, nodes, services, pods, named };
        self.subjects.update(&cluster, &self.local, &mut self.interned, &stale);
        let mut change = self.interned.update_pairs(self.subjects.identities());
        while let Some(set) = self.interned.heaviest()
            && self.close(set)
        {
            // What only that set asked of addresses is not asked any more.
            self.use_sets();
            self.subjects.update(&cluster, &self.local, &mut self.interned, &Stale::default());
            change.then(self.interned.update_pairs(self.subjects.identities()));
        }
        self.write(change, false)
    }

    fn use_sets(&mut self) {
        loop {
            let sets = self.bindings.values().flat_map(|binding| [binding.ingress, binding.egress]).flatten();
            if !self.interned.use_sets(sets.collect()) || !self.interned.widest().is_some_and(|set| self.close(set)) {
                return;
            }
        }
    }

    /// Closes the pods that have this set; false if there are none, or they are closed already.
    fn close(&mut self, set: u32) -> bool {
        let Some(problem) = self.interned.too_large(set) else { return false };
        let mut found = false;
        for (slot, binding) in &mut self.bindings {
            for (bound, direction) in [(&mut binding.ingress, Direction::Ingress), (&mut binding.egress, Direction::Egress)] {
                if *bound == Some(set) {
                    *bound = Some(self.interned.closed(direction));
                    let told = self.too_large.entry(*slot).or_default();
                    if !told.contains(&problem) {
                        told.push(problem.clone());
                    }
                    found = true;
                }
            }
        }
        found
    }

    /// The record of a pod without a cluster snapshot.
    fn unknown_endpoint(&mut self, slot: Slot) -> Vec<MapOp> {
        let op = match self.local.get(&slot) {
            None if self.image.endpoints.contains_key(&slot) => MapOp::RemoveEndpoint(slot),
            None => return Vec::new(),
            Some(local) => {
                let present = self.image.endpoints.get(&slot);
                if present.is_some_and(|image| image.addresses == local.addresses) {
                    return Vec::new();
                }
                let (ingress, egress) = match self.settings.unknown_pod {
                    UnknownPod::Open => (None, None),
                    UnknownPod::Closed => (Some(self.interned.closed(Direction::Ingress)), Some(self.interned.closed(Direction::Egress))),
                };
                let revision = present.map_or(1, |image| image.revision + 1);
                let addresses = local.addresses.clone();
                MapOp::SetEndpoint(slot, EndpointImage { addresses, ingress, egress, revision, audit: false, by_name: false })
            }
        };
        self.image.apply(&op);
        vec![op]
    }

    /// Which policies select a local pod.
    fn bind(&mut self, cluster: &ClusterState, slot: Slot) -> Binding {
        let local = &self.local[&slot];
        let audit = cluster
            .namespaces
            .get(&local.name.namespace)
            .is_some_and(|ns| ns.metadata.annotations.get(AUDIT_ANNOTATION).is_some_and(|value| value == "true"));
        let Some(pod) = local.object(cluster) else {
            // Deleted by force, it may run on for a while: what was in force stays.
            if let Some(binding) = self.bindings.get(&slot) {
                return *binding;
            }
            // The agent before may have policed it, by policies that are not known any more: what they said of addresses that have
            // changed since cannot be told. As its object is gone, it ends: until then it is closed rather than open.
            let before = self.image.endpoints.get(&slot).filter(|before| self.from_before && before.addresses == local.addresses);
            let in_maps = before.map_or([false; 2], EndpointImage::isolated);
            let noted = self.policed_before.get(&slot).filter(|_| self.from_before).copied().unwrap_or_default();
            let [was_ingress, was_egress] = [in_maps[0] || noted[0], in_maps[1] || noted[1]];
            let is_strict = self.settings.unknown_pod == UnknownPod::Closed;
            let mut closed = |direction, was_isolated| (is_strict || was_isolated).then(|| self.interned.closed(direction));
            return Binding { ingress: closed(Direction::Ingress, was_ingress), egress: closed(Direction::Egress, was_egress), audit };
        };
        let [ingress, egress] = Direction::BOTH.map(|direction| self.interned.set_of(cluster, pod, direction));
        Binding { ingress, egress, audit }
    }

    /// From what the maps hold to what they are to hold: by what has changed, or by `all` that the image has.
    fn write(&mut self, change: PairChange, all: bool) -> Vec<MapOp> {
        let from_before = std::mem::take(&mut self.from_before);
        self.policed_before.clear();
        let all = all || from_before;
        if from_before {
            self.recognise_identities();
        }
        if all {
            self.recognise_sets();
        }
        let PairChange { mut added, mut removed } = change;
        let mut unseen = Vec::new();
        if all {
            (added, removed) = self.compare_pairs();
            unseen = self.remove_unseen(&mut removed);
        }
        let addresses = self.subjects.changed_addresses(&self.image, all);
        let cidrs = self.subjects.changed_cidrs(&self.image, all);
        let endpoints = self.changed_endpoints(&moved(&self.image, &addresses, cidrs.as_ref()));
        let change = Change {
            old: &self.image,
            addresses: &addresses,
            cidrs: cidrs.as_ref(),
            endpoints: &endpoints,
            added: &added,
            removed: &removed,
            node_addresses: self.subjects.own_node(),
        };
        let ops = order(&change, &mut self.interned);
        for op in &ops {
            self.image.apply(op);
        }
        self.interned.forget_unused();
        unseen.extend(ops);
        unseen
    }

    /// Takes those pairs out of the image, and out of `removed`, of which no endpoint has the set or no address the identity: a
    /// change that was broken off left them.
    fn remove_unseen(&mut self, removed: &mut Pairs) -> Vec<MapOp> {
        let MapImage { addresses, cidrs, verdicts, endpoints, .. } = &self.image;
        let sets: BTreeSet<u32> = endpoints.values().flat_map(|endpoint| [endpoint.ingress, endpoint.egress]).flatten().collect();
        let identities: BTreeSet<u32> = addresses.values().chain(cidrs.values()).copied().chain([0]).collect();
        let (seen, unseen): (Pairs, Pairs) =
            std::mem::take(removed).into_iter().partition(|(set, identity)| sets.contains(set) && identities.contains(identity));
        *removed = seen;
        let entries = verdicts.keys().filter(|(key, _)| unseen.contains(&(key.policy, key.identity)));
        let ops: Vec<MapOp> = entries.map(|(key, length)| MapOp::RemoveVerdict(*key, *length)).collect();
        for op in &ops {
            self.image.apply(op);
        }
        ops
    }

    /// Gives identities the numbers that an earlier agent gave them, by the addresses that have them. What is not recognised keeps
    /// its new number.
    fn recognise_identities(&mut self) {
        let identities = self.subjects.known_as(&self.image);
        self.subjects.renumber(&identities);
        self.interned.renumber(&identities, &BTreeMap::new());
    }

    /// Gives policy sets the numbers that endpoints have in the maps, if those say the same of every identity and stand for
    /// nothing else here: they are of an earlier agent, or of a time before a change that was broken off and taken back.
    fn recognise_sets(&mut self) {
        let mut sets: BTreeMap<u32, u32> = BTreeMap::new();
        let mut taken: BTreeSet<u32> = BTreeSet::new();
        for (slot, binding) in &self.bindings {
            let Some(old) = self.image.endpoints.get(slot) else { continue };
            for (before, after) in [(old.ingress, binding.ingress), (old.egress, binding.egress)] {
                let (Some(before), Some(after)) = (before, after) else { continue };
                let is_free = !taken.contains(&before) && self.interned.direction(before).is_none();
                if is_free && !sets.contains_key(&after) && self.is_same_set(before, after) {
                    sets.insert(after, before);
                    taken.insert(before);
                }
            }
        }
        self.interned.renumber(&BTreeMap::new(), &sets);
        let known = |set: Option<u32>| set.map(|set| sets.get(&set).copied().unwrap_or(set));
        for binding in self.bindings.values_mut() {
            *binding = Binding { ingress: known(binding.ingress), egress: known(binding.egress), ..*binding };
        }
    }

    /// Whether the maps say under the number `before` what the set `after` says, of every identity that the maps have.
    fn is_same_set(&self, before: u32, after: u32) -> bool {
        let Some(direction) = self.interned.direction(after) else { return false };
        let known: BTreeSet<u32> = self.image.addresses.values().chain(self.image.cidrs.values()).copied().collect();
        let identities = self.subjects.identities().into_iter().filter(|identity| known.contains(identity)).chain([0]);
        let same = |identity| {
            let mut entries = self.interned.entries(after, identity)?;
            let mut there = image_entries(&self.image, before, identity, direction);
            entries.sort_unstable();
            there.sort_unstable();
            Some(entries == there)
        };
        identities.into_iter().all(|identity| same(identity) == Some(true))
    }

    /// Pairs that the image lacks, and pairs that it should not have.
    fn compare_pairs(&self) -> (Pairs, Pairs) {
        let present: Pairs = self.image.verdicts.keys().map(|(key, _)| (key.policy, key.identity)).collect();
        let wanted: Pairs = self.interned.pairs().collect();
        let complete = |(set, identity): &(u32, u32)| {
            let direction = self.interned.direction(*set)?;
            let mut entries = self.interned.entries(*set, *identity)?;
            entries.sort_unstable();
            let mut there = image_entries(&self.image, *set, *identity, direction);
            there.sort_unstable();
            Some(entries == there)
        };
        let added = wanted.iter().filter(|pair| complete(pair) != Some(true)).copied().collect();
        (added, present.difference(&wanted).copied().collect())
    }

    /// Records of endpoints that change. A revision grows if a flow of the pod could be revoked.
    fn changed_endpoints(&self, moved: &Pairs) -> BTreeMap<Slot, Option<EndpointImage>> {
        let mut changed = BTreeMap::new();
        let mut known = HashMap::new();
        for (slot, local) in &self.local {
            let binding = self.bindings.get(slot).copied().unwrap_or_default();
            let old = self.image.endpoints.get(slot);
            let mut endpoint = EndpointImage {
                addresses: local.addresses.clone(),
                ingress: binding.ingress,
                egress: binding.egress,
                revision: old.map_or(1, |old| old.revision),
                audit: binding.audit,
                by_name: binding.egress.is_some_and(|set| self.interned.is_by_name(set)),
            };
            if let Some(old) = old {
                // What audit let pass has flows too: whatever is decided otherwise may revoke them.
                let audit = old.audit;
                let mut revokes =
                    |before, after| *known.entry((before, after, audit)).or_insert_with(|| self.revokes((before, after), audit, moved));
                let revoked = [(old.ingress, binding.ingress), (old.egress, binding.egress)];
                if revoked.into_iter().any(|(before, after)| revokes(before, after)) || (old.audit && !endpoint.audit) {
                    endpoint.revision = old.revision.wrapping_add(1);
                }
            }
            if old != Some(&endpoint) {
                changed.insert(*slot, Some(endpoint));
            }
        }
        changed.extend(self.image.endpoints.keys().filter(|slot| !self.local.contains_key(*slot)).map(|slot| (*slot, None)));
        changed
    }

    /// Whether something that passed does not any more, for an endpoint whose set was `before` and becomes `after`; where it was audited,
    /// whether anything is decided otherwise.
    fn revokes(&self, (before, after): (Option<u32>, Option<u32>), audit: bool, moved: &Pairs) -> bool {
        let Some(after) = after else { return false };
        let Some(before) = before else { return true };
        let stationary = (before != after)
            .then(|| self.interned.identities_of(before).into_iter().chain(self.interned.identities_of(after)))
            .into_iter()
            .flatten()
            .chain((before != after).then_some(0));
        let pairs = stationary.map(|identity| (identity, identity)).chain(moved.iter().copied());
        // What is not known (from before a restart) may have been allowed.
        let within = |(from, to)| match (self.interned.decide(before, from), self.interned.decide(after, to)) {
            (Some(old), Some(new)) => {
                if audit {
                    old == new
                } else {
                    old.is_within(&new)
                }
            }
            _ => false,
        };
        !pairs.into_iter().all(within)
    }
}

#[cfg(test)]
mod tests;
