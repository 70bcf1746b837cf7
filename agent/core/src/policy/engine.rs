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
#[derive(Clone, Debug, Default)]
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
            interned: Interned::new(settings.source, settings.unselected_pod),
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
mod tests {
    use super::*;
    use crate::manifests;
    use crate::policy::maps::image_allows;

    const CLUSTER: &str = r#"
{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"}]}}
{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"x"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"x","labels":{"pod":"a"}},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.1"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b","namespace":"x","labels":{"pod":"b"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.2"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c","namespace":"x","labels":{"pod":"c"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.3"}}
"#;
    const POLICY: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"x"},
        "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"ingress":[{"from":[{"podSelector":{"matchLabels":{"pod":"b"}}}],"ports":[{"port":80}]}]}}"#;

    fn cluster(texts: &[&str]) -> Arc<ClusterState> {
        let objects = texts.iter().flat_map(|text| manifests::parse("test.json", text).unwrap());
        Arc::new(ClusterState::default().replaced_by(objects))
    }

    /// Deleted by force, it runs on until its sandbox goes.
    #[test]
    fn a_pod_whose_object_is_gone_stays_policed() {
        let without: Vec<&str> = CLUSTER.lines().filter(|line| !line.contains(r#""name":"a""#)).collect();
        let without = cluster(&[&without.join("\n"), POLICY]);
        for unknown_pod in [UnknownPod::Open, UnknownPod::Closed] {
            let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod, ..Settings::default() });
            let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
            let from =
                |engine: &Engine, peer: &str| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, 80);
            engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
            engine.add_endpoint(Slot(1), &name, "", &[own]);
            engine.set_cluster(&without);
            assert!(!engine.knows(&name, ""));
            assert!(from(&engine, "192.168.1.2") && !from(&engine, "192.168.1.3"), "{unknown_pod:?}");
            // Another pod in its place has nothing of it.
            engine.add_endpoint(Slot(1), &PodName::new("x", "new"), "", &[own]);
            assert_eq!(from(&engine, "192.168.1.3"), unknown_pod == UnknownPod::Open);
        }
    }

    /// The maps remember that it was policed, and not by what.
    #[test]
    fn a_pod_whose_object_went_while_no_agent_ran_is_not_opened() {
        let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
        let without: Vec<&str> = CLUSTER.lines().filter(|line| !line.contains(r#""name":"a""#)).collect();
        let without = cluster(&[&without.join("\n"), POLICY]);
        let engine = || Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
        let passes =
            |engine: &Engine, direction, peer: &str, port| image_allows(engine.image(), Slot(1), direction, peer.parse().unwrap(), 6, port);
        let mut first = engine();
        first.set_cluster(&cluster(&[CLUSTER, POLICY]));
        first.add_endpoint(Slot(1), &name, "", &[own]);
        let mut next = engine();
        next.rebase(first.image().clone());
        next.add_endpoint(Slot(1), &name, "", &[own]);
        assert!(passes(&next, Direction::Ingress, "192.168.1.2", 80), "what was in force stays until the cluster is known");
        let ops = next.set_cluster(&without);
        let mut image = first.image().clone();
        for op in &ops {
            image.apply(op);
            assert!(!image_allows(&image, Slot(1), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80), "{op:?}");
        }
        assert!(!passes(&next, Direction::Ingress, "192.168.1.2", 81));
        assert!(passes(&next, Direction::Ingress, "10.0.0.1", 81), "the own node");
        assert!(passes(&next, Direction::Egress, "192.168.1.3", 80), "what was not isolated is not");
        // Its object comes again, or it was only late.
        next.set_cluster(&cluster(&[CLUSTER, POLICY]));
        assert!(passes(&next, Direction::Ingress, "192.168.1.2", 80) && !passes(&next, Direction::Ingress, "192.168.1.3", 80));
        // A pod that comes now and is not known has nothing of it.
        next.set_cluster(&without);
        next.add_endpoint(Slot(2), &PodName::new("x", "new"), "", &["192.168.1.9".parse().unwrap()]);
        assert!(image_allows(next.image(), Slot(2), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80));
    }

    /// The agent starts beside a pod that the API server does not know, on an address of which it still tells another pod.
    #[test]
    fn what_an_unknown_pod_leaves_is_again_whose_the_cluster_says() {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
        engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
        let address: IpAddr = "192.168.1.2".parse().unwrap();
        engine.add_endpoint(Slot(2), &PodName::new("x", "unknown"), "", &[address]);
        engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
        let passes = |engine: &Engine| image_allows(engine.image(), Slot(1), Direction::Ingress, address, 6, 80);
        assert!(!passes(&engine), "nothing is known of who has it");
        engine.remove_endpoint(Slot(2));
        assert!(passes(&engine));
    }

    #[test]
    fn what_goes_makes_room_for_what_comes() {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
        engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
        engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
        let moved = CLUSTER.replace("192.168.1.2", "192.168.1.4").replace(r#""name":"b""#, r#""name":"b2""#);
        let ops = engine.set_cluster(&cluster(&[&moved, POLICY]));
        let at = |wanted: &dyn Fn(&MapOp) -> bool| ops.iter().position(wanted).unwrap_or_else(|| panic!("{ops:?}"));
        let gone: IpAddr = "192.168.1.2".parse().unwrap();
        let came: IpAddr = "192.168.1.4".parse().unwrap();
        let gone = at(&|op| *op == MapOp::RemoveAddress(gone));
        assert!(gone < at(&|op| matches!(op, MapOp::SetAddress(address, _) if *address == came)), "{ops:?}");
    }

    /// The runtime knows a static pod by another uid than the API server.
    #[test]
    fn a_static_pod_is_policed() {
        let mirror = CLUSTER.replace(
            r#""labels":{"pod":"a"}"#,
            r#""labels":{"pod":"a"},"uid":"b7e1","annotations":{"kubernetes.io/config.hash":"49bc","kubernetes.io/config.mirror":"49bc"}"#,
        );
        let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
        engine.set_cluster(&cluster(&[&mirror, POLICY]));
        let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
        for (uid, is_known) in [("b7e1", true), ("49bc", true), ("", true), ("0000", false)] {
            assert_eq!(engine.knows(&name, uid), is_known, "{uid}");
            engine.add_endpoint(Slot(1), &name, uid, &[own]);
            let passes = image_allows(engine.image(), Slot(1), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80);
            assert_eq!(passes, !is_known, "{uid}");
        }
    }

    /// Connections that stand go on: of new ones kube-proxy makes none.
    #[test]
    fn a_connection_through_a_service_outlives_the_readiness_of_its_backends() {
        const EGRESS: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"x"},
            "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"podSelector":{"matchLabels":{"pod":"b"}}}]}]}}"#;
        const SERVICE: &str = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"clusterIP":"172.20.0.9","ports":[{"port":80}]}}"#;
        let slice = |conditions: &str| {
            format!(
                r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},
                "addressType":"IPv4","endpoints":[{{"addresses":["192.168.1.2"],"conditions":{{{conditions}}}}}],"ports":[{{"port":8080}}]}}"#
            )
        };
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
        engine.set_cluster(&cluster(&[CLUSTER, EGRESS, SERVICE, &slice(r#""ready":true"#)]));
        engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
        let passes = |engine: &Engine| image_allows(engine.image(), Slot(1), Direction::Egress, "172.20.0.9".parse().unwrap(), 6, 80);
        let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
        assert!(passes(&engine));
        let before = revision(&engine);
        engine.set_cluster(&cluster(&[CLUSTER, EGRESS, SERVICE, &slice(r#""ready":false,"serving":false"#)]));
        assert!(passes(&engine) && revision(&engine) == before);
    }

    /// AWS's controller lists a pod once it has an address, which is after its start.
    #[test]
    fn a_pod_that_a_resolved_policy_selects_is_policed_before_it_is_listed() {
        let part = |kind: &str, metadata: &str, selector: &str| {
            format!(
                r#"{{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"{kind}","metadata":{metadata},"spec":{{"policyRef":{{"name":"p"}},{selector},
                "podSelectorEndpoints":[],"podIsolation":["Ingress"],"tier":"Admin","ingress":[{{"cidr":"192.168.1.3","action":"Deny","ports":[{{"port":81}}]}}]}}}}"#
            )
        };
        let of = |name: &str, from: &str, part: &str| {
            let mut engine = Engine::new(Settings {
                node_name: "n1".into(),
                source: Source::Endpoints,
                unknown_pod: UnknownPod::Open,
                ..Settings::default()
            });
            engine.set_cluster(&cluster(&[CLUSTER, part]));
            engine.add_endpoint(Slot(1), &PodName::new("x", name), "", &["192.168.1.9".parse().unwrap()]);
            image_allows(engine.image(), Slot(1), Direction::Ingress, from.parse().unwrap(), 6, 81)
        };
        let namespaced = |selector: &str| part("PolicyEndpoint", r#"{"name":"p-1","namespace":"x"}"#, selector);
        let by_label = namespaced(r#""podSelector":{"matchLabels":{"pod":"a"}}"#);
        assert!(!of("a", "192.168.1.2", &by_label) && of("a", "192.168.1.3", &by_label));
        assert!(of("b", "192.168.1.2", &by_label), "the selector is of others");
        assert!(!of("b", "192.168.1.2", &namespaced(r#""podSelector":{}"#)), "all pods of the namespace");
        assert!(of("a", "192.168.1.2", &namespaced(r#""podSelector":null"#)), "no selector");
        let clusterwide = |subject: &str| part("ClusterPolicyEndpoint", r#"{"name":"p-1"}"#, subject);
        let by_label = clusterwide(r#""subject":{"pods":{"namespaceSelector":{},"podSelector":{"matchLabels":{"pod":"a"}}}}"#);
        assert!(!of("a", "192.168.1.3", &by_label) && of("a", "192.168.1.2", &by_label));
        assert!(of("b", "192.168.1.3", &by_label));
    }

    fn passes(engine: &Engine, direction: Direction, peer: &str, port: u16) -> bool {
        image_allows(engine.image(), Slot(1), direction, peer.parse().unwrap(), 6, port)
    }

    /// A node's engine with x/a in slot 1.
    fn with_a(settings: Settings, texts: &[&str]) -> Engine {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..settings });
        engine.set_cluster(&cluster(texts));
        engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
        engine
    }

    const TO_PODS: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"e","namespace":"x"},
        "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"namespaceSelector":{}}]}]}}"#;

    /// Who may write pods may write their annotations.
    #[test]
    fn an_annotation_takes_nothing_from_others_and_gives_no_address_to_a_pod_that_has_one() {
        let claims = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"d","namespace":"x","labels":{"pod":"d"},"creationTimestamp":"2026-01-01T00:00:00Z",
            "annotations":{"vpc.amazonaws.com/pod-ips":"203.0.113.7, 192.168.1.2,10.0.0.2"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.9"}}"#;
        let engine = with_a(Settings::default(), &[CLUSTER, POLICY, TO_PODS, claims]);
        assert!(!passes(&engine, Direction::Egress, "203.0.113.7", 443), "nobody's");
        assert!(!passes(&engine, Direction::Egress, "10.0.0.2", 443), "a node's");
        assert!(passes(&engine, Direction::Egress, "192.168.1.9", 443), "what its status says");
        assert!(passes(&engine, Direction::Ingress, "192.168.1.2", 80), "another pod's");
        assert_eq!(engine.pod_at("192.168.1.2".parse().unwrap()), Some(PodName::new("x", "b")));
    }

    /// ANNOTATE_POD_IP: other nodes know a pod before its kubelet has told its address.
    #[test]
    fn an_annotation_counts_until_the_status_comes_where_it_is_asked_for_and_nobody_else_has_the_address() {
        let pod = |name: &str, node: &str, annotated: &str, status: &str| {
            format!(
                r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"x","labels":{{"pod":"b"}},"annotations":{{"vpc.amazonaws.com/pod-ips":"{annotated}"}}}},
                "spec":{{"nodeName":"{node}"}},"status":{{{status}}}}}"#
            )
        };
        let nodes = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.2"}]}}"#;
        let asked = || Settings { annotated_pods: true, ..Settings::default() };
        let from = |settings: Settings, pods: &str, peer: &str| {
            passes(&with_a(settings, &[CLUSTER, POLICY, nodes, pods]), Direction::Ingress, peer, 80)
        };
        let early = pod("early", "n2", "192.168.1.7, 192.168.1.8", "");
        assert!(from(asked(), &early, "192.168.1.7") && !from(asked(), &early, "192.168.1.8"), "one a family");
        assert!(!from(Settings::default(), &early, "192.168.1.7"), "nobody writes it");
        assert!(!from(asked(), &pod("early", "", "192.168.1.7", ""), "192.168.1.7"), "bound to no node");
        for others in ["192.168.1.3", "10.0.0.2", "169.254.169.254"] {
            assert!(!from(asked(), &pod("early", "n2", others, ""), others), "{others}");
        }
        let two = pod("early", "n2", "192.168.1.7", "") + "\n" + &pod("late", "n2", "192.168.1.7", "");
        assert!(!from(asked(), &two, "192.168.1.7"), "whose it is is not known");
        let mut engine = with_a(asked(), &[CLUSTER, POLICY, &early]);
        engine.set_cluster(&cluster(&[CLUSTER, POLICY, &pod("early", "n2", "192.168.1.7", r#""podIP":"192.168.1.8""#)]));
        assert!(passes(&engine, Direction::Ingress, "192.168.1.8", 80) && !passes(&engine, Direction::Ingress, "192.168.1.7", 80));
    }

    /// A service of namespace y with a backend.
    fn service(name: &str, metadata: &str, spec: &str, backend: &str) -> String {
        format!(
            r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"y"{metadata}}},"spec":{{{spec},"ports":[{{"port":80}}]}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{name}-1","namespace":"y","labels":{{"kubernetes.io/service-name":"{name}"}}}},"addressType":"IPv4","endpoints":[{{"addresses":["{backend}"]}}],"ports":[{{"port":80}}]}}"#
        )
    }

    const TO_B: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"e","namespace":"x"},
        "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"podSelector":{"matchLabels":{"pod":"b"}}},{"ipBlock":{"cidr":"198.51.100.0/24"}}]}]}}"#;

    #[test]
    fn a_service_that_kube_proxy_passes_over_opens_and_closes_nothing() {
        let with = |metadata: &str, spec: &str| {
            let opens = service("s", metadata, &format!(r#"{spec},"externalIPs":["203.0.113.7"]"#), "192.168.1.2");
            let closes = service("t", metadata, &format!(r#"{spec},"externalIPs":["198.51.100.1"]"#), "192.168.1.3");
            let engine = with_a(Settings::default(), &[CLUSTER, TO_B, &opens, &closes]);
            (passes(&engine, Direction::Egress, "203.0.113.7", 80), passes(&engine, Direction::Egress, "198.51.100.1", 80))
        };
        let cluster_ip = r#""clusterIP":"172.20.0.9""#;
        assert_eq!(with("", cluster_ip), (true, false), "the backend decides");
        for (metadata, spec) in [
            ("", r#""clusterIP":"None""#),
            ("", r#""type":"ExternalName","externalName":"example.com""#),
            (r#","labels":{"service.kubernetes.io/service-proxy-name":"other"}"#, cluster_ip),
            (r#","labels":{"service.kubernetes.io/headless":""}"#, cluster_ip),
        ] {
            assert_eq!(with(metadata, spec), (false, true), "{metadata} {spec}");
        }
    }

    /// The rest of what a service may write down as its own.
    #[test]
    fn an_external_address_takes_nothing_from_rules_services_and_pods() {
        let denies = r#"{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},
            "spec":{"tier":"Admin","subject":{"namespaces":{}},"egress":[{"action":"Deny","to":[{"networks":["203.0.113.0/24"]}]}]}}"#;
        let dns = service("dns", "", r#""clusterIP":"172.20.0.10""#, "192.168.1.2");
        let to = |external: &str, backend: &str, texts: &[&str], peer: &str| {
            let other = service("s", "", &format!(r#""clusterIP":"172.20.0.9","externalIPs":["{external}"]"#), backend);
            let mut all = vec![CLUSTER, TO_B, dns.as_str(), other.as_str()];
            all.extend(texts);
            passes(&with_a(Settings::default(), &all), Direction::Egress, peer, 80)
        };
        assert!(to("203.0.113.7", "192.168.1.2", &[], "203.0.113.7"), "the backend decides");
        assert!(!to("203.0.113.7", "192.168.1.2", &[denies], "203.0.113.7"), "a rule denies the address");
        assert!(!to("203.0.113.7", "10.0.0.1", &[denies], "203.0.113.7"), "whatever is behind it");
        assert!(to("172.20.0.10", "192.168.1.3", &[], "172.20.0.10"), "another service's");
        assert!(to("192.168.1.2", "192.168.1.3", &[], "192.168.1.2"), "a pod's");
        assert!(to("192.168.1.2", "192.168.1.3", &[], "172.20.0.10"), "a backend's of another service");
    }

    /// AWS's strict mode: a pod needs a policy to have network.
    #[test]
    fn in_strict_mode_a_pod_that_no_policy_selects_is_closed() {
        let strict = |source| Settings { source, unselected_pod: UnselectedPod::Closed, ..Settings::default() };
        let open = |engine: &Engine| {
            [(Direction::Ingress, "192.168.1.2"), (Direction::Ingress, "192.168.1.3"), (Direction::Egress, "192.168.1.3")]
                .map(|(direction, peer)| passes(engine, direction, peer, 80))
        };
        let part = r#"{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"PolicyEndpoint","metadata":{"name":"p-1","namespace":"x"},
            "spec":{"policyRef":{"name":"p","namespace":"x"},"podIsolation":["Ingress"],"podSelectorEndpoints":[{"name":"a","namespace":"x"}],
            "ingress":[{"cidr":"192.168.1.2","ports":[{"port":80}]}]}}"#;
        for (source, policy) in [(Source::Policies, POLICY), (Source::Endpoints, part)] {
            let mut engine = with_a(strict(source), &[CLUSTER]);
            let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
            assert_eq!(engine.can_judge(&PodName::new("x", "a"), ""), Ok(()), "it starts");
            assert_eq!(open(&engine), [false; 3], "{source:?}: no policy");
            assert!(
                passes(&engine, Direction::Ingress, "10.0.0.1", 80) && passes(&engine, Direction::Egress, "10.0.0.1", 80),
                "the own node"
            );
            engine.set_cluster(&cluster(&[CLUSTER, policy]));
            assert_eq!(open(&engine), [true, false, true], "{source:?}: as the policy says, and what it does not isolate is open");
            let before = revision(&engine);
            engine.set_cluster(&cluster(&[CLUSTER]));
            assert_eq!(open(&engine), [false; 3], "{source:?}: its last policy is gone");
            assert!(revision(&engine) > before, "what is open is judged anew");
            engine.set_cluster(&cluster(&[&CLUSTER.replace(r#""labels":{"pod":"a"}"#, r#""labels":{"pod":"z"}"#), POLICY]));
            assert_eq!(open(&engine), [false; 3], "{source:?}: the policy is of others");
        }
    }

    #[test]
    fn in_strict_mode_policies_of_the_cluster_come_before_what_is_closed_by_default() {
        let of = |tier: &str| {
            format!(
                r#"{{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{{"name":"c"}},"spec":{{"tier":"{tier}","subject":{{"namespaces":{{}}}},
                "ingress":[{{"action":"Accept","from":[{{"pods":{{"podSelector":{{"matchLabels":{{"pod":"c"}}}}}}}}]}},{{"action":"Pass","from":[{{"namespaces":{{}}}}]}}]}}}}"#
            )
        };
        let strict = || Settings { unselected_pod: UnselectedPod::Closed, ..Settings::default() };
        for tier in ["Admin", "Baseline"] {
            let policy = of(tier);
            let engine = with_a(strict(), &[CLUSTER, &policy]);
            assert!(passes(&engine, Direction::Ingress, "192.168.1.3", 80), "{tier}: accepted");
            assert!(!passes(&engine, Direction::Ingress, "192.168.1.2", 80), "{tier}: passed on to nothing");
            assert!(!passes(&engine, Direction::Egress, "192.168.1.3", 80), "{tier}: the other direction");
            let engine = with_a(strict(), &[CLUSTER, &policy, POLICY]);
            assert_eq!(passes(&engine, Direction::Ingress, "192.168.1.3", 81), tier == "Admin");
            assert!(
                passes(&engine, Direction::Ingress, "192.168.1.2", 80) && passes(&engine, Direction::Egress, "192.168.1.3", 80),
                "{tier}"
            );
        }
    }

    /// AWS's controller is behind: nobody knows whether a policy comes.
    #[test]
    fn in_strict_mode_a_pod_that_no_resolved_policy_speaks_of_starts_closed() {
        let part = r#"{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"PolicyEndpoint","metadata":{"name":"p-1","namespace":"x"},
            "spec":{"policyRef":{"name":"p","namespace":"x"},"podIsolation":["Ingress"],"podSelectorEndpoints":[{"name":"a","namespace":"x"}]}}"#;
        let judged = |name: &str, unknown_pod| {
            let strict = Settings { source: Source::Endpoints, unknown_pod, unselected_pod: UnselectedPod::Closed, ..Settings::default() };
            let mut engine = Engine::new(Settings { node_name: "n1".into(), ..strict });
            engine.set_cluster(&cluster(&[CLUSTER, part]));
            let name = PodName::new("x", name);
            engine.add_endpoint(Slot(1), &name, "", &["192.168.1.1".parse().unwrap()]);
            (engine.can_judge(&name, ""), passes(&engine, Direction::Egress, "192.168.1.3", 80))
        };
        for unknown_pod in [UnknownPod::Closed, UnknownPod::Open] {
            assert_eq!(judged("a", unknown_pod), (Ok(()), true), "what the policy does not isolate");
            assert_eq!(judged("b", unknown_pod), (Ok(()), false));
        }
    }

    /// Whoever answers the pods of one namespace may lie to them, and to nobody else.
    #[test]
    fn a_name_counts_for_pods_of_the_namespace_that_has_learnt_it() {
        let policy = |namespace: &str| {
            format!(
                r#"{{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"ApplicationNetworkPolicy","metadata":{{"name":"p","namespace":"{namespace}"}},
                "spec":{{"podSelector":{{}},"policyTypes":["Egress"],"egress":[{{"to":[{{"domainNames":["www.example.com"]}}]}}]}}}}"#
            )
        };
        let of_cluster = r#"{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},"spec":{"tier":"Admin","subject":{"namespaces":{}},
            "egress":[{"action":"Accept","to":[{"domainNames":["www.example.com"]}]},{"action":"Deny","to":[{"networks":["0.0.0.0/0"]}]}]}}"#;
        let y = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"y"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"e","namespace":"y"},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.5"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"f","namespace":"y"},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.6"}}"#;
        let address: IpAddr = "203.0.113.7".parse().unwrap();
        for policies in [vec![policy("x"), policy("y")], vec![of_cluster.to_owned()]] {
            let mut texts = vec![CLUSTER, y];
            texts.extend(policies.iter().map(String::as_str));
            let mut engine = with_a(Settings::default(), &texts);
            engine.add_endpoint(Slot(2), &PodName::new("y", "e"), "", &["192.168.1.5".parse().unwrap()]);
            engine.add_endpoint(Slot(3), &PodName::new("y", "f"), "", &["192.168.1.6".parse().unwrap()]);
            let open = |engine: &Engine| [1, 2, 3].map(|slot| image_allows(engine.image(), Slot(slot), Direction::Egress, address, 6, 443));
            let answer = Answer { name: "www.example.com".to_owned(), address, ttl: 100 };
            let (_, result) = engine.learn(Slot(2), std::slice::from_ref(&answer), 1_000);
            assert_eq!((result, open(&engine)), (Ok(()), [false, true, true]));
            let (_, result) = engine.learn(Slot(1), &[answer], 1_000);
            assert_eq!((result, open(&engine)), (Ok(()), [true, true, true]));
            engine.forget(2_000, |_| false);
            assert_eq!(open(&engine), [false; 3]);
        }
    }

    /// In namespace y, so that pods of x have nothing of it.
    fn large(name: &str, rules: &[String]) -> String {
        format!(
            r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"{name}","namespace":"y"}},"spec":{{"podSelector":{{"matchLabels":{{"pod":"{name}"}}}},"policyTypes":["Egress"],"egress":[{}]}}}}"#,
            rules.join(",")
        )
    }

    /// Who may write policies for one namespace does not take the agent from others.
    #[test]
    fn policies_that_come_to_too_much_close_their_own_pods_and_leave_others_alone() {
        let pods = ["large", "broad"].map(|name| {
            format!(r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"y","labels":{{"pod":"{name}"}}}},"spec":{{"nodeName":"n1"}}}}"#)
        });
        let ports = |count: u32| (0..count).map(|n| format!(r#"{{"port":{}}}"#, 1 + 2 * n)).collect::<Vec<_>>().join(",");
        let host = |n: u32| format!("10.{}.{}.{}/32", n >> 16, n >> 8 & 255, n & 255);
        let one = |n: u32| format!(r#"{{"to":[{{"ipBlock":{{"cidr":"{}"}}}}],"ports":[{{"port":{}}}]}}"#, host(n), 2 * (n % 2_000));
        let anywhere = |count: u32| format!(r#"{{"to":[{{"ipBlock":{{"cidr":"0.0.0.0/0"}}}}],"ports":[{}]}}"#, ports(count));
        let product: Vec<String> = std::iter::once(anywhere(2_000)).chain((0..1_000).map(one)).collect();
        let many: Vec<String> = (0..2_600).map(one).collect();
        let classes = |n: u32| {
            format!(
                r#"{{"to":[{{"ipBlock":{{"cidr":"0.0.0.0/0"}}}},{{"ipBlock":{{"cidr":"{}"}}}}],"ports":[{{"port":{}}}]}}"#,
                host(n),
                1 + n % 2
            )
        };
        let classes: Vec<String> = (0..1_600).map(classes).collect();
        let beside = r#"{"to":[{"ipBlock":{"cidr":"203.0.113.0/24"}}],"ports":[{"port":7000}]}"#;
        let broad = large("broad", &[anywhere(450), beside.to_owned()]);
        for (about, rules) in [("ports by peers", product), ("peers that others have ports for", many), ("peers by peers", classes)] {
            let all = [CLUSTER, POLICY, &pods[0], &pods[1], &broad];
            let mut engine = with_a(Settings::default(), &all);
            engine.add_endpoint(Slot(2), &PodName::new("y", "large"), "", &["192.168.1.7".parse().unwrap()]);
            engine.add_endpoint(Slot(3), &PodName::new("y", "broad"), "", &["192.168.1.8".parse().unwrap()]);
            let to = |engine: &Engine, slot, peer: &str, port| {
                image_allows(engine.image(), Slot(slot), Direction::Egress, peer.parse().unwrap(), 6, port)
            };
            assert!(to(&engine, 2, "10.0.0.9", 18) && engine.problems().is_empty(), "{about}");
            let policy = large("large", &rules);
            let ops = engine.set_cluster(&cluster(&[&all[..], &[&policy]].concat()));
            assert!(ops.len() < 10_000, "{about}: {} operations", ops.len());
            assert!(!to(&engine, 2, "10.0.0.9", 18) && !to(&engine, 2, "10.0.0.9", 17), "{about}: closed");
            let problems = engine.problems();
            let [problem] = problems.as_slice() else { panic!("{about}: {problems:?}") };
            assert!(problem.to_string().contains("NetworkPolicy y/large: spec.egress: "), "{about}: {problem}");
            assert!(
                passes(&engine, Direction::Ingress, "192.168.1.2", 80) && !passes(&engine, Direction::Ingress, "192.168.1.3", 80),
                "{about}"
            );
            assert!(to(&engine, 3, "10.0.0.9", 17) && !to(&engine, 3, "10.0.0.9", 18), "{about}: another large one");
            assert!(engine.set_cluster(&cluster(&[&all[..], &[&policy]].concat())).is_empty(), "{about}: it stays so");
            // An agent that finds everything at once.
            let mut next = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
            next.add_endpoint(Slot(2), &PodName::new("y", "large"), "", &["192.168.1.7".parse().unwrap()]);
            next.add_endpoint(Slot(3), &PodName::new("y", "broad"), "", &["192.168.1.8".parse().unwrap()]);
            next.set_cluster(&cluster(&[&all[..], &[&policy]].concat()));
            assert!(to(&next, 3, "10.0.0.9", 17) && !to(&next, 3, "10.0.0.9", 18) && to(&next, 3, "203.0.113.9", 7_000), "{about}");
            assert!(!to(&next, 2, "10.0.0.9", 18) && next.problems() == problems, "{about}");
            engine.set_cluster(&cluster(&[&all[..], &[&large("large", &rules[rules.len() - 10..])]].concat()));
            assert!(engine.problems().is_empty() && !to(&engine, 2, "10.9.9.9", 6_000), "{about}: mended");
        }
    }

    const BY_NAMESPACE: &str = r#"{"apiVersion":"policy.networking.k8s.io/v1beta1","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},
        "spec":{"tier":"Admin","subject":{"namespaces":{"matchLabels":{"kubernetes.io/metadata.name":"x"}}},
        "ingress":[{"action":"Deny","from":[{"pods":{"namespaceSelector":{},"podSelector":{"matchLabels":{"pod":"c"}}}}]}]}}"#;

    /// After an outage of the API server kinds come one after the other.
    #[test]
    fn a_pod_is_judged_when_what_selects_it_is_known() {
        let namespace = CLUSTER.lines().find(|line| line.contains(r#""Namespace""#)).unwrap();
        let without = CLUSTER.replace(namespace, "");
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
        let judged = |engine: &mut Engine, cluster: Arc<ClusterState>| {
            engine.set_cluster(&cluster);
            engine.can_judge(&PodName::new("x", "a"), "")
        };
        assert_eq!(engine.can_judge(&PodName::new("x", "a"), ""), Err(Missing::Cluster));
        assert_eq!(judged(&mut engine, cluster(&[namespace])), Ok(()), "no policy could concern it");
        assert_eq!(judged(&mut engine, cluster(&[namespace, POLICY])), Err(Missing::Pod));
        assert_eq!(judged(&mut engine, cluster(&[&without, POLICY])), Ok(()), "by its namespace's name");
        assert_eq!(judged(&mut engine, cluster(&[&without, BY_NAMESPACE])), Err(Missing::Namespace));
        assert_eq!(judged(&mut engine, cluster(&[CLUSTER, BY_NAMESPACE])), Ok(()));
        for (kind, strict) in
            [(Kind::NetworkPolicy, Err(Missing::Policies(Kind::NetworkPolicy))), (Kind::PolicyEndpoint, Ok(())), (Kind::Service, Ok(()))]
        {
            let stale = Arc::new(ClusterState { stale: [kind].into(), ..(*cluster(&[CLUSTER])).clone() });
            engine.set_unknown_pod(UnknownPod::Closed);
            assert_eq!(judged(&mut engine, Arc::clone(&stale)), strict);
            engine.set_unknown_pod(UnknownPod::Open);
            assert_eq!(judged(&mut engine, stale), Ok(()), "{kind:?}");
        }
    }

    /// Who may annotate a namespace often may not write policies for the cluster.
    #[test]
    fn audit_lifts_isolation_and_no_denial_by_a_policy_of_the_cluster() {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
        let audited = CLUSTER.replace(
            r#"{"name":"x"}"#,
            r#"{"name":"x","labels":{"kubernetes.io/metadata.name":"x"},"annotations":{"policy.stanchion.dev/audit":"true"}}"#,
        );
        engine.set_cluster(&cluster(&[&audited, POLICY, BY_NAMESPACE]));
        engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
        let from = |peer: &str, port| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port);
        assert!(from("192.168.1.2", 80), "allowed");
        assert!(from("192.168.1.2", 81), "the NetworkPolicy's isolation is only told");
        assert!(!from("192.168.1.3", 80), "the Admin tier denies");
        // What is let through has flows, which the Admin tier's later denial ends.
        let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
        let before = revision(&engine);
        let allows_more = POLICY.replace(r#""port":80"#, r#""port":80,"endPort":90"#);
        engine.set_cluster(&cluster(&[&audited, &allows_more, BY_NAMESPACE]));
        engine.set_cluster(&cluster(&[&audited, &allows_more, &BY_NAMESPACE.replace(r#""pod":"c""#, r#""pod":"b""#)]));
        let from = |peer: &str, port| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port);
        assert!(!from("192.168.1.2", 81) && revision(&engine) > before);
        // Behind a service, one backend that only isolation denies and one that the Admin tier does.
        let egress = BY_NAMESPACE.replace("ingress", "egress").replace("from", "to");
        let isolates = POLICY.replace(r#""ingress":"#, r#""policyTypes":["Egress"],"ingress":"#);
        let service = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"clusterIP":"172.20.0.9","ports":[{"port":80}]}}"#;
        for (backends, passes) in [(r#""192.168.1.2""#, true), (r#""192.168.1.3""#, false), (r#""192.168.1.2","192.168.1.3""#, false)] {
            let slice = format!(
                r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},
                "addressType":"IPv4","endpoints":[{{"addresses":[{backends}]}}],"ports":[{{"port":8080}}]}}"#
            );
            engine.set_cluster(&cluster(&[&audited, &isolates, &egress, service, &slice]));
            let found = image_allows(engine.image(), Slot(1), Direction::Egress, "172.20.0.9".parse().unwrap(), 6, 80);
            assert_eq!(found, passes, "{backends}");
        }
    }

    #[test]
    fn one_policy_one_pod() {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
        let name = PodName::new("x", "a");
        let own: IpAddr = "192.168.1.1".parse().unwrap();
        let (slot, from) = (Slot(1), |engine: &Engine, peer: &str, port| {
            image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port)
        });
        assert!(!engine.knows(&name, ""));
        let ops = engine.add_endpoint(slot, &name, "", &[own]);
        assert!(matches!(ops.as_slice(), [MapOp::SetEndpoint(Slot(1), image)] if image.ingress.is_some()), "closed until known");
        engine.set_cluster(&cluster(&[CLUSTER]));
        assert!(engine.knows(&name, ""));
        assert!(from(&engine, "192.168.1.3", 80));
        let ops = engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
        assert!(from(&engine, "192.168.1.2", 80));
        assert!(!from(&engine, "192.168.1.2", 81));
        assert!(!from(&engine, "192.168.1.3", 80));
        assert!(from(&engine, "10.0.0.1", 81), "the own node");
        assert!(matches!(ops.last(), Some(MapOp::SetEndpoint(..))), "entries first, then the flip: {ops:?}");
        assert!(engine.set_cluster(&cluster(&[CLUSTER, POLICY])).is_empty());
        assert!(!engine.remove_endpoint(slot).is_empty());
        let node = MapImage { node_addresses: vec!["10.0.0.1".parse().unwrap()], ..MapImage::default() };
        assert_eq!(*engine.image(), node, "nothing is left but the node");
    }
}
