//! Which identity each address has: pods, nodes and services by address, address blocks by longest prefix.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::cluster::ClusterState;
use crate::ids::PodName;
use crate::objects::{LabelSelector, Pod};

use super::classes::Classes;
use super::engine::LocalPod;
use super::image::{MapImage, Slot};
use super::intern::{Active, Interned};
use super::model::{NamespaceMatch, Peer};
use super::names::Names;
use super::program::{OWN_NODE, ServicePort, Signature};
use super::services::{ServicePortBackends, Services, service_addresses};
use super::world;

/// What changed in the cluster.
#[derive(Default)]
pub(super) struct Stale {
    pub(super) namespaces: bool,
    pub(super) nodes: bool,
    pub(super) services: bool,
    pub(super) pods: BTreeSet<PodName>,
    pub(super) named: BTreeSet<IpAddr>,
}

/// Identities of addresses.
#[derive(Debug, Default)]
pub(super) struct Subjects {
    /// What DNS answers said.
    pub(super) names: Names,
    /// Pods' annotations count while their status has no address.
    early: bool,
    own_node: Vec<IpAddr>,
    own_name: String,
    asked: Active,
    /// Addresses of networked pods.
    pods: HashMap<PodName, Vec<IpAddr>>,
    /// The same pods by namespace.
    in_namespace: HashMap<String, BTreeSet<PodName>>,
    /// Pods that claim an address, and which local pod has it.
    claims: HashMap<IpAddr, Vec<PodName>>,
    local: HashMap<IpAddr, LocalPod>,
    nodes: HashMap<IpAddr, Vec<String>>,
    services: Services,
    /// Service addresses that an address is behind.
    fronts: HashMap<IpAddr, Vec<IpAddr>>,
    classes: Classes,
    /// Peers of a namespace's pods: peer list and pod selector.
    peers: HashMap<String, Arc<[(u32, LabelSelector)]>>,
    exact: BTreeMap<IpAddr, u32>,
    cidrs: BTreeMap<IpNet, u32>,
    counts: HashMap<u32, usize>,
    touched: BTreeSet<IpAddr>,
    cidrs_touched: bool,
}

impl Subjects {
    /// Of nobody. `early`: pods' annotations count while their status has no address.
    pub(super) fn new(early: bool) -> Self {
        Self { early, ..Self::default() }
    }

    /// The own node's addresses, sorted.
    pub(super) fn own_node(&self) -> &[IpAddr] {
        &self.own_node
    }

    /// Its name, and its addresses: of its object, and others that are known of it.
    pub(super) fn set_own_node(&mut self, cluster: &ClusterState, name: &str, others: &[IpAddr]) {
        let listed = cluster.nodes.get(name).into_iter().flat_map(|node| node.ip_addresses());
        self.own_node = listed.chain(others.iter().copied()).collect();
        self.own_node.sort_unstable();
        self.own_node.dedup();
        name.clone_into(&mut self.own_name);
    }

    /// Brings every identity up to date.
    pub(super) fn update(&mut self, cluster: &ClusterState, local: &BTreeMap<Slot, LocalPod>, interned: &mut Interned, stale: &Stale) {
        let mut dirty: BTreeSet<IpAddr> = BTreeSet::new();
        let asked = interned.active().clone();
        if self.asked != asked {
            let before = std::mem::replace(&mut self.asked, asked);
            self.peers.clear();
            self.reshape(cluster, interned, &before, &mut dirty);
        }
        if stale.namespaces {
            self.peers.clear();
        }
        self.local = local.values().flat_map(|pod| pod.addresses.iter().map(|address| (*address, pod.clone()))).collect();
        for name in &stale.pods {
            self.claim(cluster, local, name, &mut dirty);
        }
        if stale.nodes {
            dirty.extend(self.nodes.keys());
            self.nodes.clear();
            for (name, node) in &cluster.nodes {
                for address in node.ip_addresses() {
                    self.nodes.entry(address).or_default().push(name.clone());
                }
            }
            dirty.extend(self.nodes.keys());
        }
        if stale.services || stale.nodes {
            self.set_services(cluster, &mut dirty);
        }
        if stale.namespaces {
            self.everything(&mut dirty);
        }
        dirty.extend(&stale.named);
        // Service addresses last: they are made of the identities of others.
        let fronts: Vec<IpAddr> = dirty.iter().filter_map(|address| self.fronts.get(address)).flatten().copied().collect();
        dirty.extend(fronts);
        let (services, others): (Vec<IpAddr>, Vec<IpAddr>) = dirty.into_iter().partition(|address| self.services.contains_key(address));
        for address in others.into_iter().chain(services) {
            let is_subject =
                self.claims.contains_key(&address) || self.nodes.contains_key(&address) || self.services.contains_key(&address);
            let is_subject = is_subject || (self.asked.by_name && self.names.has(address));
            // What is nobody's any more is what its block is.
            let signature = if is_subject { self.signature(cluster, interned, address) } else { Signature::default() };
            let identity = interned.identity(signature);
            self.set_exact(address, identity);
        }
    }

    fn everything(&self, dirty: &mut BTreeSet<IpAddr>) {
        dirty.extend(self.claims.keys());
        dirty.extend(self.nodes.keys());
        dirty.extend(self.services.keys());
        dirty.extend(self.names.addresses());
    }

    /// Other peer lists are asked about than before: notes the addresses that are in one that came or went. A pod's start
    /// brings a few lists; most addresses are in none of these, and are not looked at.
    fn reshape(&mut self, cluster: &ClusterState, interned: &mut Interned, before: &Active, dirty: &mut BTreeSet<IpAddr>) {
        if before.names != self.asked.names || before.egress != self.asked.egress || before.by_name != self.asked.by_name {
            self.everything(dirty);
        }
        // Of lists that went nothing but the signatures is left.
        let gone: BTreeSet<u32> = before.terms.difference(&self.asked.terms).copied().collect();
        if !gone.is_empty() {
            let concerned = interned.identities_with(&gone);
            dirty.extend(self.exact.iter().filter(|(_, identity)| concerned.contains(identity)).map(|(address, _)| *address));
        }
        let mut blocks = interned.has_blocks(&gone);
        let come: Vec<u32> = self.asked.terms.difference(&before.terms).copied().collect();
        for peer in come.iter().flat_map(|term| interned.peers(*term)) {
            match peer {
                Peer::Pods(wanted) => {
                    let meant = |namespace: &&String| match &wanted.namespaces {
                        NamespaceMatch::Name(name) => name == *namespace,
                        NamespaceMatch::Labels(selector) => selector.matches(world::namespace_labels(cluster, namespace)),
                    };
                    for namespace in self.in_namespace.keys().filter(meant) {
                        let matching = self.in_namespace[namespace]
                            .iter()
                            .filter(|name| cluster.pods.get(*name).is_some_and(|pod| wanted.pods.matches(&pod.metadata.labels)));
                        dirty.extend(matching.filter_map(|name| self.pods.get(name)).flatten());
                    }
                }
                Peer::Block { net, .. } => {
                    blocks = true;
                    let subjects = self.claims.keys().chain(self.nodes.keys()).chain(self.services.keys());
                    dirty.extend(subjects.filter(|address| net.contains(*address)));
                    dirty.extend(self.names.addresses().filter(|address| net.contains(address)));
                    // Not a subject, but what is behind one.
                    dirty.extend(self.fronts.keys().filter(|address| net.contains(*address)));
                }
                Peer::Nodes(_) => dirty.extend(self.nodes.keys()),
                Peer::Domain(_) => dirty.extend(self.names.addresses()),
            }
        }
        if blocks {
            self.classes = Classes::new(interned.active_terms());
            self.set_cidrs(interned);
        }
    }

    /// Which addresses a pod claims now.
    fn claim(&mut self, cluster: &ClusterState, local: &BTreeMap<Slot, LocalPod>, name: &PodName, dirty: &mut BTreeSet<IpAddr>) {
        let mut addresses = Vec::new();
        let locals: Vec<&LocalPod> = local.values().filter(|pod| pod.name == *name).collect();
        if let Some(pod) = cluster.pods.get(name).filter(|pod| world::is_networked(pod)) {
            addresses = world::addresses(pod);
            if self.early && locals.is_empty() {
                addresses.extend(world::early_addresses(pod));
            }
        }
        addresses.extend(locals.iter().flat_map(|pod| &pod.addresses));
        addresses.sort_unstable();
        addresses.dedup();
        let before = if addresses.is_empty() {
            if let Some(names) = self.in_namespace.get_mut(&name.namespace) {
                names.remove(name);
                if names.is_empty() {
                    self.in_namespace.remove(&name.namespace);
                }
            }
            self.pods.remove(name)
        } else {
            self.in_namespace.entry(name.namespace.clone()).or_default().insert(name.clone());
            self.pods.insert(name.clone(), addresses.clone())
        };
        for address in before.into_iter().flatten() {
            if let Some(claims) = self.claims.get_mut(&address) {
                claims.retain(|claim| claim != name);
                if claims.is_empty() {
                    self.claims.remove(&address);
                }
            }
            dirty.insert(address);
        }
        for address in addresses {
            self.claims.entry(address).or_default().push(name.clone());
            dirty.insert(address);
        }
    }

    fn set_services(&mut self, cluster: &ClusterState, dirty: &mut BTreeSet<IpAddr>) {
        let services = service_addresses(cluster, Some(&self.own_name));
        let changed = services.iter().filter(|(address, ports)| self.services.get(*address) != Some(*ports)).map(|(address, _)| *address);
        dirty.extend(changed);
        dirty.extend(self.services.keys().filter(|address| !services.contains_key(*address)));
        self.fronts.clear();
        for (front, ports) in &services {
            let backends: HashSet<IpAddr> = ports.iter().flat_map(|port| port.backends.iter().map(|(address, _)| *address)).collect();
            for backend in backends {
                self.fronts.entry(backend).or_default().push(*front);
            }
        }
        self.services = services;
    }

    /// The name of the pod that has an address.
    pub(super) fn pod_at(&self, cluster: &ClusterState, address: IpAddr) -> Option<PodName> {
        let local = self.local.get(&address).map(|pod| pod.name.clone());
        local.or_else(|| self.owner(cluster, address).map(|pod| pod.full_name()))
    }

    /// The pod that has an address.
    fn owner<'a>(&self, cluster: &'a ClusterState, address: IpAddr) -> Option<&'a Arc<Pod>> {
        if let Some(pod) = self.local.get(&address) {
            return pod.object(cluster);
        }
        let claims = self.claims.get(&address)?;
        let networked = claims.iter().filter_map(|name| cluster.pods.get(name)).filter(|pod| world::is_networked(pod));
        let listed = networked.clone().filter(|pod| pod.addresses().any(|listed| listed == address));
        let listed = listed.reduce(|best, pod| if world::claims_before(pod, best) { pod } else { best });
        // By an annotation a pod has what nobody else has.
        let is_free = claims.len() == 1 && !self.nodes.contains_key(&address) && !self.services.contains_key(&address);
        listed.or_else(|| is_free.then(|| networked.clone().next()).flatten())
    }

    /// What an address is to the sets in use.
    fn signature(&mut self, cluster: &ClusterState, interned: &mut Interned, address: IpAddr) -> Signature {
        let mut signature = self.own_signature(cluster, interned, address);
        // A pod's address stays the pod's, whatever services say.
        let is_pods = self.local.contains_key(&address) || self.owner(cluster, address).is_some();
        if self.asked.egress
            && !is_pods
            && let Some(ports) = self.services.get(&address).cloned()
        {
            signature.services = ports.into_iter().map(|port| self.service_port(cluster, interned, port)).collect();
            signature.services.sort_unstable();
            signature.services.dedup_by(|later, first| (later.protocol, later.port) == (first.protocol, first.port));
        }
        signature
    }

    /// What an address is where no service has it.
    fn own_signature(&mut self, cluster: &ClusterState, interned: &Interned, address: IpAddr) -> Signature {
        let mut signature = Signature { terms: self.classes.terms(address).to_vec(), ..Signature::default() };
        if let Some(pod) = self.owner(cluster, address) {
            let peers = self.peers_of(cluster, interned, &pod.metadata.namespace);
            let matching = peers.iter().filter(|(_, selector)| selector.matches(&pod.metadata.labels));
            signature.terms.extend(matching.map(|(term, _)| *term));
            if !self.asked.names.is_empty() {
                let named = world::named_ports(pod).filter_map(|(name, p, number)| Some((interned.active_name(name)?, p, number)));
                signature.named = named.collect();
            }
        }
        if let Some(names) = self.nodes.get(&address) {
            for (term, peers) in interned.active_terms() {
                let holds = |selector: &LabelSelector| {
                    names.iter().filter_map(|name| cluster.nodes.get(name)).any(|node| selector.matches(&node.metadata.labels))
                };
                if peers.iter().any(|peer| matches!(peer, Peer::Nodes(selector) if holds(selector))) {
                    signature.terms.push(term);
                }
            }
        }
        if self.asked.by_name {
            let named = self.asked.terms.iter().filter(|term| interned.is_named(**term, &self.names, address));
            signature.terms.extend(named);
        }
        signature.terms.sort_unstable();
        signature.terms.dedup();
        signature.named.sort_unstable();
        signature.named.dedup();
        signature
    }

    fn service_port(&mut self, cluster: &ClusterState, interned: &mut Interned, port: ServicePortBackends) -> ServicePort {
        let mut backends = Vec::with_capacity(port.backends.len());
        for (address, target) in port.backends {
            let identity = if self.own_node.contains(&address) {
                OWN_NODE
            } else if let Some(identity) = self.exact.get(&address).filter(|_| !self.services.contains_key(&address)) {
                *identity
            } else {
                // It may be another service's address too: the translation is made once.
                let signature = self.own_signature(cluster, interned, address);
                interned.identity(signature)
            };
            backends.push((identity, target));
        }
        backends.sort_unstable();
        backends.dedup();
        ServicePort { protocol: port.protocol, port: port.port, is_external: port.is_external, backends }
    }

    /// The peers that can be pods of a namespace.
    fn peers_of(&mut self, cluster: &ClusterState, interned: &Interned, namespace: &str) -> Arc<[(u32, LabelSelector)]> {
        if let Some(peers) = self.peers.get(namespace) {
            return Arc::clone(peers);
        }
        let labels = world::namespace_labels(cluster, namespace);
        let mut peers = Vec::new();
        for (term, list) in interned.active_terms() {
            for peer in list {
                if let Peer::Pods(wanted) = peer
                    && match &wanted.namespaces {
                        NamespaceMatch::Name(name) => name == namespace,
                        NamespaceMatch::Labels(selector) => selector.matches(labels),
                    }
                {
                    peers.push((term, wanted.pods.clone()));
                }
            }
        }
        let peers: Arc<[(u32, LabelSelector)]> = peers.into();
        self.peers.insert(namespace.to_owned(), Arc::clone(&peers));
        peers
    }

    fn set_exact(&mut self, address: IpAddr, identity: u32) {
        let before = if identity == 0 { self.exact.remove(&address) } else { self.exact.insert(address, identity) };
        if before.unwrap_or(0) != identity {
            self.touched.insert(address);
            self.count(before, (identity != 0).then_some(identity));
        }
    }

    fn set_cidrs(&mut self, interned: &mut Interned) {
        let mut cidrs: BTreeMap<IpNet, u32> = BTreeMap::new();
        // Parents come before what they contain; a block with its parent's identity needs no entry.
        let mut stack: Vec<(IpNet, u32)> = Vec::new();
        for (net, terms) in &self.classes.boundaries {
            while stack.last().is_some_and(|(outer, _)| !outer.contains(net)) {
                stack.pop();
            }
            let identity = interned.identity(Signature { terms: terms.clone(), ..Signature::default() });
            if stack.last().map_or(0, |(_, identity)| *identity) != identity {
                cidrs.insert(*net, identity);
                stack.push((*net, identity));
            }
        }
        if cidrs != self.cidrs {
            let before = std::mem::replace(&mut self.cidrs, cidrs);
            let now: Vec<u32> = self.cidrs.values().copied().collect();
            now.into_iter().for_each(|identity| self.count(None, Some(identity)));
            before.into_values().for_each(|identity| self.count(Some(identity), None));
            self.cidrs_touched = true;
        }
    }

    fn count(&mut self, gone: Option<u32>, come: Option<u32>) {
        if let Some(identity) = come.filter(|identity| *identity != 0) {
            *self.counts.entry(identity).or_default() += 1;
        }
        if let Some(identity) = gone.filter(|identity| *identity != 0)
            && let Some(count) = self.counts.get_mut(&identity)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&identity);
            }
        }
    }

    /// Identities that some address has.
    pub(super) fn identities(&self) -> BTreeSet<u32> {
        self.counts.keys().copied().collect()
    }

    /// New identities with the numbers that the same addresses have in an image from before a restart. One to one: the
    /// first address decides.
    pub(super) fn known_as(&self, image: &MapImage) -> BTreeMap<u32, u32> {
        let mut known = BTreeMap::new();
        let mut taken: BTreeSet<u32> = BTreeSet::new();
        let exact = self.exact.iter().map(|(address, new)| (*new, image.addresses.get(address)));
        let blocks = self.cidrs.iter().map(|(net, new)| (*new, image.cidrs.get(net)));
        for (new, old) in exact.chain(blocks) {
            let Some(old) = old.copied().filter(|old| *old != 0 && new != 0) else { continue };
            if !known.contains_key(&new) && taken.insert(old) {
                known.insert(new, old);
            }
        }
        known
    }

    /// Other numbers for identities; what is not named keeps its own.
    pub(super) fn renumber(&mut self, identities: &BTreeMap<u32, u32>) {
        let known = |identity: u32| identities.get(&identity).copied().unwrap_or(identity);
        self.exact.values_mut().for_each(|identity| *identity = known(*identity));
        self.cidrs.values_mut().for_each(|identity| *identity = known(*identity));
        self.counts = std::mem::take(&mut self.counts).into_iter().map(|(identity, count)| (known(identity), count)).collect();
    }

    /// Exact entries that differ from the image's; all of them or those touched since the last call.
    pub(super) fn changed_addresses(&mut self, image: &MapImage, all: bool) -> BTreeMap<IpAddr, Option<u32>> {
        let mut touched = std::mem::take(&mut self.touched);
        if all {
            touched.extend(self.exact.keys().chain(image.addresses.keys()));
        }
        let wanted = touched.into_iter().map(|address| (address, self.exact.get(&address).copied()));
        wanted.filter(|(address, identity)| image.addresses.get(address).copied() != *identity).collect()
    }

    /// The table of blocks if it differs from the image's.
    pub(super) fn changed_cidrs(&mut self, image: &MapImage, all: bool) -> Option<BTreeMap<IpNet, u32>> {
        let look = std::mem::take(&mut self.cidrs_touched) || all;
        (look && image.cidrs != self.cidrs).then(|| self.cidrs.clone())
    }
}
