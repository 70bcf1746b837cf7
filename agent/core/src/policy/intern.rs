//! Names for meanings: policies, peer lists, port names, policy sets, identities and rules as small numbers. A number is
//! never used again for something else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::cluster::{ClusterState, Named, Namespaced};
use crate::ids::PodName;
use crate::objects::{NetworkPolicy, Pod, Protocol};

use super::classes::Classes;
use super::engine::{Settings, Source, UnselectedPod};
use super::image::MapImage;
use super::model::{Direction, Peer, Peers, Policy, PolicyName, PortMatch, Ports, Problem, Rule, Tier, ordered_rules};
use super::names::Names;
use super::objects::{ClusterNetworkPolicy, ClusterPolicyEndpoint, PolicyEndpoint};
use super::order::Meanings;
use super::ports::{Decision, Entry, PortFunction};
use super::program::{Program, ProgramPorts, ProgramRule, Signature};
use super::{resolve, resolved, world};

/// Pairs of numbers: of a policy set and an identity, or of two identities.
pub(super) type Pairs = BTreeSet<(u32, u32)>;

/// Peer lists with address blocks, counted in each class of addresses that they make: 24 MiB of numbers.
const MOST_IN_CLASSES: usize = 2_097_152;

/// How the pairs of sets and identities changed.
#[derive(Debug, Default)]
pub(super) struct PairChange {
    pub(super) added: Pairs,
    pub(super) removed: Pairs,
}

impl PairChange {
    /// Both, one after the other.
    pub(super) fn then(&mut self, later: Self) {
        for pair in later.removed {
            if !self.added.remove(&pair) {
                self.removed.insert(pair);
            }
        }
        for pair in later.added {
            if !self.removed.remove(&pair) {
                self.added.insert(pair);
            }
        }
    }
}

/// A rule by name: what a verdict's number stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleName {
    /// The policy.
    pub policy: PolicyName,
    /// Which list of rules.
    pub direction: Direction,
    /// Its place in that list.
    pub index: usize,
    /// Its own name, if it has one.
    pub name: String,
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}[{}]", self.policy, self.direction, self.index)?;
        if self.name.is_empty() { Ok(()) } else { write!(f, " ({})", self.name) }
    }
}

/// A policy with the number of its present content.
#[derive(Debug)]
struct Version {
    number: u32,
    /// Some peer of its egress rules is a DNS name.
    by_name: bool,
    policy: Arc<Policy>,
    problems: Vec<Problem>,
}

/// What makes a policy set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SetKey {
    direction: Direction,
    /// Numbers of policies; `None`: unknown pod, closed.
    policies: Option<Vec<u32>>,
    /// What passes where no policy decides.
    otherwise: Decision,
    /// The pod's own named ports that its ingress rules use.
    named: Vec<(String, Protocol, u16)>,
    /// The pod's namespace, if some peer is a DNS name: what the pods of one namespace learn of names is not for those of others.
    learners: String,
}

/// Objects that were resolved, to resolve only what changed.
#[derive(Debug, Default)]
struct Sources {
    network: Namespaced<NetworkPolicy>,
    cluster: Named<ClusterNetworkPolicy>,
    endpoints: Namespaced<PolicyEndpoint>,
    cluster_endpoints: Named<ClusterPolicyEndpoint>,
}

/// Everything interned.
#[derive(Debug, Default)]
pub(super) struct Interned {
    source: Source,
    unselected_pod: UnselectedPod,
    most_verdicts: usize,
    last: u32,
    sources: Sources,
    network: BTreeMap<PodName, Version>,
    cluster: BTreeMap<String, Version>,
    cluster_problems: BTreeMap<String, Vec<Problem>>,
    /// About objects that the source makes useless.
    unused: Vec<Problem>,
    by_namespace: HashMap<String, BTreeSet<PodName>>,
    sets: HashMap<SetKey, u32>,
    programs: HashMap<u32, Arc<Program>>,
    in_use: BTreeSet<u32>,
    /// By peers, and whose DNS names count for them.
    terms: HashMap<(Arc<[Peer]>, String), u32>,
    term_peers: HashMap<u32, (Arc<[Peer]>, String)>,
    names: HashMap<String, u32>,
    signatures: HashMap<Arc<Signature>, u32>,
    identities: HashMap<u32, Arc<Signature>>,
    rules: HashMap<u32, RuleName>,
    rule_ids: HashMap<RuleName, u32>,
    active: Active,
    /// Pairs of set and identity that need entries, by set, for [`Self::paired`].
    pairs: BTreeMap<u32, BTreeSet<u32>>,
    paired: BTreeSet<u32>,
    /// Entries of these pairs, by set.
    sizes: BTreeMap<u32, usize>,
    /// Sets that alone have too many: not all of their pairs are there.
    unfinished: BTreeSet<u32>,
    empty: Signature,
}

/// What the sets in use ask of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Active {
    /// Peer lists.
    pub(super) terms: BTreeSet<u32>,
    /// Port names.
    pub(super) names: BTreeSet<u32>,
    /// Some endpoint's egress is judged: service addresses matter.
    pub(super) egress: bool,
    /// Some peer is a DNS name.
    pub(super) by_name: bool,
}

impl Interned {
    /// Empty, to be filled from one source.
    pub(super) fn new(settings: &Settings) -> Self {
        let Settings { source, unselected_pod, most_verdicts, .. } = *settings;
        Self { source, unselected_pod, most_verdicts, ..Self::default() }
    }

    fn next(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// Numbers of the image are not given to anything else.
    pub(super) fn avoid(&mut self, image: &MapImage) {
        let identities = image.addresses.values().chain(image.cidrs.values()).copied();
        let keys = image.verdicts.keys().flat_map(|(key, _)| [key.policy, key.identity]);
        let sets = image.endpoints.values().flat_map(|e| [e.ingress, e.egress]).flatten();
        self.last = identities.chain(keys).chain(sets).max().unwrap_or(0).max(self.last);
    }

    /// Resolves the policies whose objects changed.
    pub(super) fn resolve(&mut self, cluster: &ClusterState) {
        match self.source {
            Source::Policies => {
                for name in self.sources.network.changed(&cluster.network_policies) {
                    let mut problems = Vec::new();
                    let policy = cluster.network_policies.get(&name).map(|object| resolve::network_policy(object, &mut problems));
                    self.put_network(name, policy, problems);
                }
                for name in self.sources.cluster.changed(&cluster.cluster_network_policies) {
                    let mut problems = Vec::new();
                    let object = cluster.cluster_network_policies.get(&name);
                    let policy = object.and_then(|object| resolve::cluster_network_policy(object, &mut problems));
                    self.put_cluster(name, policy, problems);
                }
                if !self.sources.endpoints.same(&cluster.policy_endpoints)
                    || !self.sources.network.same(&cluster.network_policies)
                    || !self.sources.cluster_endpoints.same(&cluster.cluster_policy_endpoints)
                    || !self.sources.cluster.same(&cluster.cluster_network_policies)
                {
                    self.unused = resolved::unused(cluster);
                }
            }
            Source::Endpoints => {
                let changed = self.sources.endpoints.changed(&cluster.policy_endpoints);
                let objects = changed.iter().flat_map(|name| [&self.sources.endpoints, &cluster.policy_endpoints].map(|all| all.get(name)));
                let policies: BTreeSet<PodName> = objects.flatten().map(|object| resolved::policy_of(object)).collect();
                for (name, policy, problems) in resolved::network_policies(cluster, &policies) {
                    self.put_network(name, policy, problems);
                }
                let changed = self.sources.cluster_endpoints.changed(&cluster.cluster_policy_endpoints);
                let objects = changed
                    .iter()
                    .flat_map(|name| [&self.sources.cluster_endpoints, &cluster.cluster_policy_endpoints].map(|all| all.get(name)));
                let policies: BTreeSet<String> = objects.flatten().map(|object| object.spec.policy_ref.name.clone()).collect();
                for (name, policy, problems) in resolved::cluster_policies(cluster, &policies) {
                    self.put_cluster(name, policy, problems);
                }
            }
        }
        self.sources = Sources {
            network: cluster.network_policies.clone(),
            cluster: cluster.cluster_network_policies.clone(),
            endpoints: cluster.policy_endpoints.clone(),
            cluster_endpoints: cluster.cluster_policy_endpoints.clone(),
        };
    }

    fn put_network(&mut self, name: PodName, policy: Option<Policy>, problems: Vec<Problem>) {
        let Some(policy) = policy else {
            self.network.remove(&name);
            if let Some(names) = self.by_namespace.get_mut(&name.namespace) {
                names.remove(&name);
            }
            return;
        };
        match self.network.get_mut(&name) {
            Some(version) if *version.policy == policy => version.problems = problems,
            _ => {
                let (number, by_name) = (self.next(), has_names(&policy));
                self.by_namespace.entry(name.namespace.clone()).or_default().insert(name.clone());
                self.network.insert(name, Version { number, by_name, policy: Arc::new(policy), problems });
            }
        }
    }

    fn put_cluster(&mut self, name: String, policy: Option<Policy>, problems: Vec<Problem>) {
        let unchanged = matches!((self.cluster.get(&name), &policy), (Some(version), Some(policy)) if *version.policy == *policy);
        match policy {
            Some(_) if unchanged => {}
            Some(policy) => {
                let (number, by_name) = (self.next(), has_names(&policy));
                self.cluster.insert(name.clone(), Version { number, by_name, policy: Arc::new(policy), problems: Vec::new() });
            }
            None => drop(self.cluster.remove(&name)),
        }
        if problems.is_empty() {
            self.cluster_problems.remove(&name)
        } else {
            self.cluster_problems.insert(name, problems)
        };
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        let network = self.network.values().flat_map(|version| &version.problems);
        network.chain(self.cluster_problems.values().flatten()).chain(&self.unused).cloned().collect()
    }

    /// Names of the policies in each set.
    pub(super) fn policies_of_sets(&self) -> HashMap<u32, Vec<String>> {
        let versions = self.network.values().chain(self.cluster.values());
        let names: HashMap<u32, String> = versions.map(|version| (version.number, version.policy.name.to_string())).collect();
        let of = |key: &SetKey| key.policies.iter().flatten().filter_map(|number| names.get(number)).cloned().collect();
        self.sets.iter().map(|(key, id)| (*id, of(key))).collect()
    }

    /// Policies that can select the pod.
    fn near(&self, pod: &Pod) -> impl Iterator<Item = &Version> {
        let namespaced = self.by_namespace.get(&pod.metadata.namespace).into_iter().flatten().map(|name| &self.network[name]);
        namespaced.chain(self.cluster.values())
    }

    /// The set of the policies that select the pod; `None`: the direction is not judged.
    pub(super) fn set_of(&mut self, cluster: &ClusterState, pod: &Pod, direction: Direction) -> Option<u32> {
        let mut by_name = false;
        let versions: Vec<(u32, Arc<Policy>)> = self
            .near(pod)
            .filter(|version| version.policy.rules(direction).is_some() && world::selects(cluster, &version.policy, pod))
            .inspect(|version| by_name |= version.by_name && direction == Direction::Egress)
            .map(|version| (version.number, Arc::clone(&version.policy)))
            .collect();
        let is_selected = |version: &Version| version.policy.tier == Tier::Namespace && world::selects(cluster, &version.policy, pod);
        let otherwise = match self.unselected_pod {
            // One NetworkPolicy that selects it, in whatever direction, and the pod is as Kubernetes says.
            UnselectedPod::Closed if !self.near(pod).any(is_selected) => Decision::DENY,
            _ => Decision::ALLOW,
        };
        if versions.is_empty() && otherwise.allow {
            return None;
        }
        let policies: Vec<&Policy> = versions.iter().map(|(_, policy)| &**policy).collect();
        let named = if direction == Direction::Ingress { own_ports(&policies, pod) } else { Vec::new() };
        let numbers = versions.iter().map(|(number, _)| *number).collect();
        let learners = if by_name { pod.metadata.namespace.clone() } else { String::new() };
        let key = SetKey { direction, policies: Some(numbers), otherwise, named, learners };
        if let Some(id) = self.sets.get(&key) {
            return Some(*id);
        }
        let program = self.compile(&policies, &key);
        Some(self.add_set(key, program))
    }

    /// The set of pods of which nothing is known.
    pub(super) fn closed(&mut self, direction: Direction) -> u32 {
        let key = SetKey { direction, policies: None, otherwise: Decision::DENY, named: Vec::new(), learners: String::new() };
        match self.sets.get(&key) {
            Some(id) => *id,
            None => self.add_set(key, Program::closed(direction)),
        }
    }

    fn add_set(&mut self, key: SetKey, program: Program) -> u32 {
        let id = self.next();
        self.sets.insert(key, id);
        self.programs.insert(id, Arc::new(program));
        id
    }

    fn compile(&mut self, policies: &[&Policy], key: &SetKey) -> Program {
        let (direction, otherwise) = (key.direction, key.otherwise);
        let [admin, namespace, baseline] = [Tier::Admin, Tier::Namespace, Tier::Baseline].map(|tier| {
            let rules = ordered_rules(policies, tier, direction)?;
            Some(rules.into_iter().map(|(policy, rule)| self.compile_rule(policy, rule, key)).collect::<Vec<_>>())
        });
        let mut program = Program::new(direction, admin.unwrap_or_default(), namespace, baseline.unwrap_or_default(), otherwise);
        program.by_name = program.terms().iter().any(|term| is_by_name(self.peers(*term)));
        program
    }

    fn compile_rule(&mut self, policy: &Policy, rule: &Rule, key: &SetKey) -> ProgramRule {
        let (direction, own) = (key.direction, &key.named);
        let name = RuleName { policy: policy.name.clone(), direction, index: rule.index, name: rule.name.clone() };
        let term = match &rule.peers {
            Peers::Any => None,
            Peers::List(peers) => Some(self.term(peers, &key.learners)),
        };
        let ports = match &rule.ports {
            Ports::Any => None,
            Ports::List(list) => {
                let mut ports = ProgramPorts::default();
                for port in list {
                    match port {
                        PortMatch::Range(protocol, first, last) => ports.ranges.push((*protocol, *first, *last)),
                        PortMatch::Named(protocol, name) if direction == Direction::Ingress => {
                            let same = own.iter().filter(|(n, p, _)| n == name && protocol.is_none_or(|wanted| wanted == *p));
                            ports.ranges.extend(same.map(|(_, protocol, number)| (*protocol, *number, *number)));
                        }
                        PortMatch::Named(protocol, name) => ports.names.push((*protocol, self.port_name(name))),
                    }
                }
                Some(ports)
            }
        };
        ProgramRule { id: self.rule_id(name), action: rule.action, term, ports }
    }

    fn term(&mut self, peers: &Arc<[Peer]>, learners: &str) -> u32 {
        let key = (Arc::clone(peers), if is_by_name(peers) { learners.to_owned() } else { String::new() });
        if let Some(id) = self.terms.get(&key) {
            return *id;
        }
        let id = self.next();
        self.terms.insert(key.clone(), id);
        self.term_peers.insert(id, key);
        id
    }

    fn port_name(&mut self, name: &str) -> u32 {
        if let Some(id) = self.names.get(name) {
            return *id;
        }
        let id = self.next();
        self.names.insert(name.to_owned(), id);
        id
    }

    /// A hash of the name, so that it is the same after a restart.
    fn rule_id(&mut self, name: RuleName) -> u32 {
        if let Some(id) = self.rule_ids.get(&name) {
            return *id;
        }
        // FNV-1a.
        let text = format!("{name}");
        let mut id = text.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)).max(1);
        while self.rules.contains_key(&id) {
            id = id.wrapping_add(1).max(1);
        }
        self.rules.insert(id, name.clone());
        self.rule_ids.insert(name, id);
        id
    }

    pub(super) fn rule(&self, id: u32) -> Option<&RuleName> {
        self.rules.get(&id)
    }

    /// The sets that endpoints have from now on. True if they ask other things of addresses than those before.
    pub(super) fn use_sets(&mut self, sets: BTreeSet<u32>) -> bool {
        self.in_use = sets;
        let mut active = Active::default();
        for set in &self.in_use {
            let program = &self.programs[set];
            active.terms.extend(program.terms());
            active.names.extend(program.names());
            active.egress |= program.direction == Direction::Egress;
            active.by_name |= program.by_name;
        }
        let changed = active != self.active;
        self.active = active;
        changed
    }

    /// Whether the set has peers that are DNS names.
    pub(super) fn is_by_name(&self, set: u32) -> bool {
        self.programs.get(&set).is_some_and(|program| program.by_name)
    }

    /// Whether a rule of the set is about the DNS name.
    pub(super) fn speaks_of(&self, set: u32, name: &str) -> bool {
        let peers = self.programs.get(&set).into_iter().flat_map(|program| program.terms()).flat_map(|term| self.peers(*term));
        peers.into_iter().any(|peer| matches!(peer, Peer::Domain(pattern) if pattern.matches(name)))
    }

    pub(super) fn active(&self) -> &Active {
        &self.active
    }

    /// Peer lists that sets in use ask about.
    pub(super) fn active_terms(&self) -> impl Iterator<Item = (u32, &[Peer])> {
        self.active.terms.iter().map(|term| (*term, self.peers(*term)))
    }

    /// Whether the address has one of the names in the peer list, for the pods whose sets have that list.
    pub(super) fn is_named(&self, term: u32, names: &Names, address: IpAddr) -> bool {
        let Some((peers, learners)) = self.term_peers.get(&term) else { return false };
        let holds = |peer: &Peer| matches!(peer, Peer::Domain(pattern) if names.of(address, learners).any(|name| pattern.matches(name)));
        peers.iter().any(holds)
    }

    /// A peer list that a set in use asks about.
    pub(super) fn peers(&self, term: u32) -> &[Peer] {
        self.term_peers.get(&term).map_or(&[], |(peers, _)| peers)
    }

    /// Whether some of the peer lists have address blocks; so do those that are forgotten, as far as one knows.
    pub(super) fn has_blocks(&self, terms: &BTreeSet<u32>) -> bool {
        let has = |(peers, _): &(Arc<[Peer]>, String)| peers.iter().any(|peer| matches!(peer, Peer::Block { .. }));
        terms.iter().any(|term| self.term_peers.get(term).is_none_or(has))
    }

    /// Identities of addresses that are in one of the peer lists, and of services whose backends are.
    pub(super) fn identities_with(&self, terms: &BTreeSet<u32>) -> BTreeSet<u32> {
        let holds = |signature: &Signature| signature.terms.iter().any(|term| terms.contains(term));
        let direct: BTreeSet<u32> = self.identities.iter().filter(|(_, signature)| holds(signature)).map(|(id, _)| *id).collect();
        let behind = |signature: &Signature| {
            signature.services.iter().flat_map(|service| &service.backends).any(|(backend, _)| direct.contains(backend))
        };
        let services = self.identities.iter().filter(|(_, signature)| behind(signature)).map(|(id, _)| *id);
        direct.iter().copied().chain(services).collect()
    }

    /// The number of a port name that egress rules use.
    pub(super) fn active_name(&self, name: &str) -> Option<u32> {
        self.names.get(name).copied().filter(|id| self.active.names.contains(id))
    }

    /// The identity that means this; 0 for nothing.
    pub(super) fn identity(&mut self, signature: Signature) -> u32 {
        if signature.is_empty() {
            return 0;
        }
        if let Some(id) = self.signatures.get(&signature) {
            return *id;
        }
        let id = self.next();
        let signature = Arc::new(signature);
        self.signatures.insert(Arc::clone(&signature), id);
        self.identities.insert(id, signature);
        id
    }

    /// Other numbers for identities and policy sets; what is not named keeps its own.
    pub(super) fn renumber(&mut self, identities: &BTreeMap<u32, u32>, sets: &BTreeMap<u32, u32>) {
        let identity = |id: u32| identities.get(&id).copied().unwrap_or(id);
        let set = |id: u32| sets.get(&id).copied().unwrap_or(id);
        let signatures = std::mem::take(&mut self.identities).into_iter().map(|(id, signature)| {
            let mut signature = Arc::unwrap_or_clone(signature);
            for service in &mut signature.services {
                service.backends.iter_mut().for_each(|(backend, _)| *backend = identity(*backend));
                service.backends.sort_unstable();
            }
            (identity(id), Arc::new(signature))
        });
        self.identities = signatures.collect();
        self.signatures = self.identities.iter().map(|(id, signature)| (Arc::clone(signature), *id)).collect();
        self.paired = std::mem::take(&mut self.paired).into_iter().map(identity).collect();
        let pairs = std::mem::take(&mut self.pairs).into_iter();
        self.pairs = pairs.map(|(id, paired)| (set(id), paired.into_iter().map(identity).collect())).collect();
        self.sizes = std::mem::take(&mut self.sizes).into_iter().map(|(id, size)| (set(id), size)).collect();
        self.sets.values_mut().for_each(|id| *id = set(*id));
        self.programs = std::mem::take(&mut self.programs).into_iter().map(|(id, program)| (set(id), program)).collect();
        self.in_use = std::mem::take(&mut self.in_use).into_iter().map(set).collect();
    }

    fn signature(&self, identity: u32) -> &Signature {
        self.identities.get(&identity).map_or(&self.empty, |signature| signature)
    }

    /// What a set decides for an identity; `None` for sets and identities from before a restart.
    pub(super) fn decide(&self, set: u32, identity: u32) -> Option<PortFunction<Decision>> {
        let program = self.programs.get(&set)?;
        let signature = if identity == 0 { &self.empty } else { self.identities.get(&identity)? };
        Some(program.decide(signature, &|id| self.signature(id)))
    }

    /// Every pair of a set and an identity in use that needs entries: what is new and what is gone since the last call. No more of a set
    /// than until [`Self::heaviest`] gives it.
    pub(super) fn update_pairs(&mut self, identities: BTreeSet<u32>) -> PairChange {
        let mut change = PairChange::default();
        let (mut pairs, mut sizes) = (std::mem::take(&mut self.pairs), std::mem::take(&mut self.sizes));
        let unused: Vec<u32> = pairs.keys().filter(|set| !self.in_use.contains(set)).copied().collect();
        for set in unused {
            sizes.remove(&set);
            self.unfinished.remove(&set);
            change.removed.extend(pairs.remove(&set).into_iter().flatten().map(|identity| (set, identity)));
        }
        let fresh: Vec<u32> = identities.difference(&self.paired).copied().collect();
        let gone: Vec<u32> = self.paired.difference(&identities).copied().collect();
        let count = |set, identity| self.entries(set, identity).map_or(0, |entries| entries.len());
        let mut unfinished = BTreeSet::new();
        for set in &self.in_use {
            let program = &self.programs[set];
            let is_new = !pairs.contains_key(set);
            let (present, size) = (pairs.entry(*set).or_default(), sizes.entry(*set).or_default());
            if is_new {
                present.insert(0);
                change.added.insert((*set, 0));
                *size = count(*set, 0);
            }
            for identity in gone.iter().filter(|identity| present.remove(identity)) {
                *size = size.saturating_sub(count(*set, *identity));
                change.removed.insert((*set, *identity));
            }
            let missing = || identities.iter().filter(|identity| !present.contains(identity)).copied().collect::<Vec<u32>>();
            let come: Vec<u32> = if is_new || self.unfinished.contains(set) { missing() } else { fresh.clone() };
            for identity in come {
                if *size > self.most_verdicts {
                    unfinished.insert(*set);
                    break;
                }
                if self.identities.get(&identity).is_some_and(|signature| program.knows(signature)) {
                    *size += count(*set, identity);
                    present.insert(identity);
                    change.added.insert((*set, identity));
                }
            }
        }
        (self.pairs, self.sizes, self.unfinished, self.paired) = (pairs, sizes, unfinished, identities);
        change
    }

    /// If the address blocks of all sets together make too many classes: the set with most of them.
    pub(super) fn widest(&self) -> Option<u32> {
        if !Classes::exceed(self.active_terms(), MOST_IN_CLASSES) {
            return None;
        }
        let blocks = |term: &u32| self.peers(*term).iter().filter(|peer| matches!(peer, Peer::Block { .. })).count();
        self.in_use.iter().copied().max_by_key(|set| self.programs[set].terms().iter().map(blocks).sum::<usize>())
    }

    /// If all sets together have too many entries: the one that makes most of them, by those it has and by the peer lists for which others
    /// have them.
    pub(super) fn heaviest(&self) -> Option<u32> {
        if self.sizes.values().sum::<usize>() <= self.most_verdicts {
            return None;
        }
        let weight = |set: &u32| self.sizes[set].saturating_mul(self.programs.get(set).map_or(0, |program| program.terms().len()) + 1);
        self.sizes.keys().copied().max_by_key(weight)
    }

    /// What there is to be told of a set that is too large.
    pub(super) fn too_large(&self, set: u32) -> Option<Problem> {
        let (key, _) = self.sets.iter().find(|(_, id)| **id == set)?;
        let numbers = key.policies.iter().flatten();
        let versions = self.network.values().chain(self.cluster.values());
        let policies: HashMap<u32, &Arc<Policy>> = versions.map(|version| (version.number, &version.policy)).collect();
        let ports = |rule: &Rule| if let Ports::List(list) = &rule.ports { list.len() } else { 0 };
        let size = |policy: &&Arc<Policy>| policy.rules(key.direction).into_iter().flatten().map(|rule| 1 + ports(rule)).sum::<usize>();
        let policy = numbers.filter_map(|number| policies.get(number).copied()).max_by_key(size)?;
        Some(Problem {
            policy: policy.name.clone(),
            field: format!("spec.{}", key.direction),
            problem: format!(
                "the policies of the node's pods come to more than {} verdicts or {MOST_IN_CLASSES} parts of address classes, mostly by this one",
                self.most_verdicts
            ),
            consequence: "the pods that it selects are closed in this direction",
            remedy: "Write ranges of ports and fewer rules with ports of their own.",
        })
    }

    /// The pairs as of the last update.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.pairs.iter().flat_map(|(set, identities)| identities.iter().map(|identity| (*set, *identity)))
    }

    /// Drops what nothing refers to any more.
    pub(super) fn forget_unused(&mut self) {
        let in_use = &self.in_use;
        self.sets.retain(|_, id| in_use.contains(id));
        self.programs.retain(|id, _| in_use.contains(id));
        let active = &self.active;
        self.terms.retain(|_, id| active.terms.contains(id));
        self.term_peers.retain(|id, _| active.terms.contains(id));
        self.names.retain(|_, id| active.names.contains(id));
        let backends: BTreeSet<u32> = self
            .paired
            .iter()
            .filter_map(|id| self.identities.get(id))
            .flat_map(|signature| signature.services.iter().flat_map(|service| service.backends.iter().map(|(id, _)| *id)))
            .collect();
        let paired = &self.paired;
        let keep = |id: &u32| paired.contains(id) || backends.contains(id);
        self.signatures.retain(|_, id| keep(id));
        self.identities.retain(|id, _| keep(id));
    }
}

impl Meanings for Interned {
    fn entries(&self, set: u32, identity: u32) -> Option<Vec<Entry>> {
        let program = self.programs.get(&set)?;
        if identity == 0 {
            return Some(program.wildcard_entries());
        }
        let signature = self.identities.get(&identity)?;
        Some(if program.knows(signature) { program.entries_of(signature, &|id| self.signature(id)) } else { Vec::new() })
    }

    fn direction(&self, set: u32) -> Option<u8> {
        self.programs.get(&set).map(|program| program.direction.abi())
    }

    fn fresh(&mut self) -> u32 {
        self.next()
    }

    fn identities_of(&self, set: u32) -> Vec<u32> {
        self.pairs.get(&set).into_iter().flatten().copied().collect()
    }
}

fn is_by_name(peers: &[Peer]) -> bool {
    peers.iter().any(|peer| matches!(peer, Peer::Domain(_)))
}

fn has_names(policy: &Policy) -> bool {
    let mut rules = policy.egress.iter().flatten();
    rules.any(|rule| matches!(&rule.peers, Peers::List(peers) if is_by_name(peers)))
}

/// The pod's own ports that ingress rules name.
fn own_ports(policies: &[&Policy], pod: &Pod) -> Vec<(String, Protocol, u16)> {
    let rules = policies.iter().flat_map(|policy| policy.rules(Direction::Ingress)).flatten();
    let lists = rules.filter_map(|rule| if let Ports::List(list) = &rule.ports { Some(list) } else { None });
    let mut named: Vec<(String, Protocol, u16)> = Vec::new();
    for port in lists.flatten() {
        let PortMatch::Named(wanted, name) = port else { continue };
        let same = world::named_ports(pod).filter(|(n, p, _)| n == name && wanted.is_none_or(|w| w == *p));
        named.extend(same.map(|(n, p, number)| (n.to_owned(), p, number)));
    }
    named.sort_unstable();
    named.dedup();
    named
}
