//! Names for meanings: policies, peer lists, port names, policy sets, identities and rules as small numbers. A number is
//! never used again for something else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::cluster::{ClusterState, Named, Namespaced};
use crate::ids::PodName;
use crate::objects::{NetworkPolicy, Pod, Protocol};

use super::image::MapImage;
use super::model::{Direction, Peer, Peers, Policy, PolicyName, PortMatch, Ports, Problem, Rule, Tier, ordered_rules};
use super::objects::ClusterNetworkPolicy;
use super::order::Meanings;
use super::ports::{Decision, Entry, PortFunction};
use super::program::{Program, ProgramPorts, ProgramRule, Signature};
use super::{resolve, world};

/// Pairs of numbers: of a policy set and an identity, or of two identities.
pub(super) type Pairs = BTreeSet<(u32, u32)>;

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
    policy: Arc<Policy>,
    problems: Vec<Problem>,
}

/// What makes a policy set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SetKey {
    direction: Direction,
    /// Numbers of policies; `None`: unknown pod, closed.
    policies: Option<Vec<u32>>,
    /// The pod's own named ports that its ingress rules use.
    named: Vec<(String, Protocol, u16)>,
}

/// Objects that were resolved, to resolve only what changed.
#[derive(Debug, Default)]
struct Sources {
    network: Namespaced<NetworkPolicy>,
    cluster: Named<ClusterNetworkPolicy>,
}

/// Everything interned.
#[derive(Debug, Default)]
pub(super) struct Interned {
    last: u32,
    sources: Sources,
    network: BTreeMap<PodName, Version>,
    cluster: BTreeMap<String, Option<Version>>,
    cluster_problems: BTreeMap<String, Vec<Problem>>,
    by_namespace: HashMap<String, Vec<PodName>>,
    sets: HashMap<SetKey, u32>,
    programs: HashMap<u32, Arc<Program>>,
    in_use: BTreeSet<u32>,
    terms: HashMap<Arc<[Peer]>, u32>,
    term_peers: HashMap<u32, Arc<[Peer]>>,
    names: HashMap<String, u32>,
    signatures: HashMap<Arc<Signature>, u32>,
    identities: HashMap<u32, Arc<Signature>>,
    rules: HashMap<u32, RuleName>,
    rule_ids: HashMap<RuleName, u32>,
    active: Active,
    /// Pairs of set and identity that need entries, by set, for [`Self::paired`].
    pairs: BTreeMap<u32, BTreeSet<u32>>,
    paired: BTreeSet<u32>,
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
}

impl Interned {
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
        let mut regroup = false;
        for name in super::engine::changed(&self.sources.network, &cluster.network_policies) {
            let Some(object) = cluster.network_policies.get(&name) else {
                self.network.remove(&name);
                regroup = true;
                continue;
            };
            let mut problems = Vec::new();
            let policy = resolve::network_policy(object, &mut problems);
            match self.network.get_mut(&name) {
                Some(version) if *version.policy == policy => version.problems = problems,
                _ => {
                    let number = self.next();
                    self.network.insert(name, Version { number, policy: Arc::new(policy), problems });
                    regroup = true;
                }
            }
        }
        for name in super::engine::changed(&self.sources.cluster, &cluster.cluster_network_policies) {
            self.cluster_problems.remove(&name);
            let Some(object) = cluster.cluster_network_policies.get(&name) else {
                self.cluster.remove(&name);
                continue;
            };
            let mut problems = Vec::new();
            let policy = resolve::cluster_network_policy(object, &mut problems);
            let unchanged = matches!((self.cluster.get(&name), &policy), (Some(Some(version)), Some(policy)) if *version.policy == *policy);
            if !unchanged {
                let number = self.next();
                let version = policy.map(|policy| Version { number, policy: Arc::new(policy), problems: Vec::new() });
                self.cluster.insert(name.clone(), version);
            }
            self.cluster_problems.insert(name, problems);
        }
        if regroup {
            self.by_namespace.clear();
            for name in self.network.keys() {
                self.by_namespace.entry(name.namespace.clone()).or_default().push(name.clone());
            }
        }
        self.sources = Sources { network: cluster.network_policies.clone(), cluster: cluster.cluster_network_policies.clone() };
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        let network = self.network.values().flat_map(|version| &version.problems);
        network.chain(self.cluster_problems.values().flatten()).cloned().collect()
    }

    /// The set of the policies that select the pod; `None`: the direction is not judged.
    pub(super) fn set_of(&mut self, cluster: &ClusterState, pod: &Pod, direction: Direction) -> Option<u32> {
        let namespaced = self.by_namespace.get(&pod.metadata.namespace).into_iter().flatten().map(|name| &self.network[name]);
        let versions: Vec<(u32, Arc<Policy>)> = namespaced
            .chain(self.cluster.values().flatten())
            .filter(|version| version.policy.rules(direction).is_some() && world::selects(cluster, &version.policy, pod))
            .map(|version| (version.number, Arc::clone(&version.policy)))
            .collect();
        if versions.is_empty() {
            return None;
        }
        let policies: Vec<&Policy> = versions.iter().map(|(_, policy)| &**policy).collect();
        let named = if direction == Direction::Ingress { own_ports(&policies, pod) } else { Vec::new() };
        let key = SetKey { direction, policies: Some(versions.iter().map(|(number, _)| *number).collect()), named };
        if let Some(id) = self.sets.get(&key) {
            return Some(*id);
        }
        let program = self.compile(&policies, direction, &key.named);
        Some(self.add_set(key, program))
    }

    /// The set of pods of which nothing is known.
    pub(super) fn closed(&mut self, direction: Direction) -> u32 {
        let key = SetKey { direction, policies: None, named: Vec::new() };
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

    fn compile(&mut self, policies: &[&Policy], direction: Direction, own: &[(String, Protocol, u16)]) -> Program {
        let [admin, namespace, baseline] = [Tier::Admin, Tier::Namespace, Tier::Baseline].map(|tier| {
            let rules = ordered_rules(policies, tier, direction)?;
            Some(rules.into_iter().map(|(policy, rule)| self.compile_rule(policy, rule, direction, own)).collect::<Vec<_>>())
        });
        Program::new(direction, admin.unwrap_or_default(), namespace, baseline.unwrap_or_default())
    }

    fn compile_rule(&mut self, policy: &Policy, rule: &Rule, direction: Direction, own: &[(String, Protocol, u16)]) -> ProgramRule {
        let name = RuleName { policy: policy.name.clone(), direction, index: rule.index, name: rule.name.clone() };
        let term = match &rule.peers {
            Peers::Any => None,
            Peers::List(peers) => Some(self.term(peers)),
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

    fn term(&mut self, peers: &Arc<[Peer]>) -> u32 {
        if let Some(id) = self.terms.get(peers) {
            return *id;
        }
        let id = self.next();
        self.terms.insert(Arc::clone(peers), id);
        self.term_peers.insert(id, Arc::clone(peers));
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
        }
        let changed = active != self.active;
        self.active = active;
        changed
    }

    pub(super) fn active(&self) -> &Active {
        &self.active
    }

    /// Peer lists that sets in use ask about.
    pub(super) fn active_terms(&self) -> impl Iterator<Item = (u32, &[Peer])> {
        self.active.terms.iter().map(|term| (*term, &*self.term_peers[term]))
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

    fn signature(&self, identity: u32) -> &Signature {
        self.identities.get(&identity).map_or(&self.empty, |signature| signature)
    }

    /// What a set decides for an identity; `None` for sets and identities from before a restart.
    pub(super) fn decide(&self, set: u32, identity: u32) -> Option<PortFunction<Decision>> {
        let program = self.programs.get(&set)?;
        let signature = if identity == 0 { &self.empty } else { self.identities.get(&identity)? };
        Some(program.decide(signature, &|id| self.signature(id)))
    }

    /// Every pair of a set and an identity in use that needs entries: what is new and what is gone since the last call.
    pub(super) fn update_pairs(&mut self, identities: BTreeSet<u32>) -> (Pairs, Pairs) {
        let (mut added, mut removed) = (BTreeSet::new(), BTreeSet::new());
        let sets: Vec<u32> = self.pairs.keys().copied().collect();
        for set in sets.into_iter().filter(|set| !self.in_use.contains(set)) {
            removed.extend(self.pairs.remove(&set).into_iter().flatten().map(|identity| (set, identity)));
        }
        let fresh: Vec<u32> = identities.difference(&self.paired).copied().collect();
        let gone: Vec<u32> = self.paired.difference(&identities).copied().collect();
        for set in &self.in_use {
            let program = &self.programs[set];
            let mut add = |present: &mut BTreeSet<u32>, identity: u32| {
                if self.identities.get(&identity).is_some_and(|signature| program.knows(signature)) {
                    present.insert(identity);
                    added.insert((*set, identity));
                }
            };
            match self.pairs.get_mut(set) {
                Some(present) => {
                    removed.extend(gone.iter().filter(|identity| present.remove(identity)).map(|identity| (*set, *identity)));
                    fresh.iter().for_each(|identity| add(present, *identity));
                }
                None => {
                    let mut present = BTreeSet::from([0]);
                    identities.iter().for_each(|identity| add(&mut present, *identity));
                    added.insert((*set, 0));
                    self.pairs.insert(*set, present);
                }
            }
        }
        self.paired = identities;
        (added, removed)
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
