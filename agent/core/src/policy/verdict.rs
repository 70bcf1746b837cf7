//! Verdicts by the definition: walks policies, rules, peers and ports for one connection and says who decided. Shares
//! nothing with the compiler but the model, so that each proves the other.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use crate::cluster::ClusterState;
use crate::ids::PodName;
use crate::objects::{Pod, Protocol};

use super::engine::{Source, UnselectedPod};
use super::model::{
    Action, Direction, PacketProtocol, Peer, Peers, Policy, PortMatch, Ports, Problem, Rule, Tier, ordered_rules, protocol_name,
};
use super::names::Names;
use super::resolve;
use super::services::{ServicePortBackends, Services, service_addresses};
use super::world;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// A pod by name.
    Pod(PodName),
    /// A node by name.
    Node(String),
    /// Whatever has the address.
    Address(IpAddr),
}

/// A text that names no end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no end of a connection: write namespace/pod, node:NAME or an address")]
pub struct BadEnd(pub String);

impl std::str::FromStr for End {
    type Err = BadEnd;

    fn from_str(text: &str) -> Result<Self, BadEnd> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if let Some(name) = text.strip_prefix("node:") {
            return Ok(Self::Node(name.to_owned()));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Pod(PodName::new(namespace, name)))
            }
            _ => Err(BadEnd(text.to_owned())),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "{name}"),
            Self::Node(name) => write!(f, "node:{name}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoVerdict {
    /// No such pod or node.
    #[error("{0} is not in the manifests")]
    Unknown(End),
    /// It has no address of that family.
    #[error("{0} has no IPv{1} address")]
    NoAddress(End, u8),
}

/// A rule that matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DecidingRule {
    /// Kind, namespace and name of the policy.
    pub policy: String,
    /// `admin`, `namespace` or `baseline`.
    pub tier: &'static str,
    /// Place of the rule in the manifest's list.
    pub rule: usize,
    /// The rule's own name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The peer of the rule that matched; absent if the rule is about anyone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// What one end's policies say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SideVerdict {
    /// Whether this end agrees.
    pub allowed: bool,
    /// Why, in a sentence.
    pub reason: String,
    /// The rule that decided; absent if a default did.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub decided: Option<DecidingRule>,
    /// For a denial by default: how near each selecting policy came.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Policies that select this end in this direction.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub selected_by: Vec<String>,
}

impl SideVerdict {
    fn plain(allowed: bool, reason: impl Into<String>) -> Self {
        Self { allowed, reason: reason.into(), decided: None, missing: Vec::new(), selected_by: Vec::new() }
    }
}

/// The verdict on a new connection: both ends must agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Both ends agree.
    pub allowed: bool,
    /// The destination's policies.
    pub ingress: SideVerdict,
    /// The source's policies.
    pub egress: SideVerdict,
}

/// Policies that speak for a pod in a direction.
type Selected = Arc<Vec<usize>>;

/// Answers questions about one snapshot.
#[derive(Debug)]
pub struct Evaluator<'a> {
    cluster: &'a ClusterState,
    policies: Vec<Policy>,
    /// By the node that a client is on.
    services: RefCell<HashMap<Option<String>, Services>>,
    owners: HashMap<IpAddr, &'a Arc<Pod>>,
    selected: RefCell<HashMap<(PodName, Direction), Selected>>,
    /// Names of addresses, as DNS answers gave them.
    names: Names,
    unselected_pod: UnselectedPod,
    /// What is wrong in the policies.
    pub problems: Vec<Problem>,
}

/// An end as policies see it.
#[derive(Clone, Copy)]
struct Party<'a> {
    address: IpAddr,
    /// The networked pod that has the address.
    pod: Option<&'a Pod>,
    /// The node that it is on or is.
    node: Option<&'a str>,
}

impl<'a> Evaluator<'a> {
    /// Reads the policies of a snapshot from one source. Where rules speak of DNS names, `names` says what these are.
    pub fn new(cluster: &'a ClusterState, source: Source, names: Names) -> Self {
        let mut problems = Vec::new();
        let policies = resolve::all(cluster, source, &mut problems);
        let mut owners: HashMap<IpAddr, &Arc<Pod>> = HashMap::new();
        for pod in cluster.pods.values().filter(|pod| world::is_networked(pod)) {
            for address in world::addresses(pod) {
                let owner = owners.entry(address).or_insert(pod);
                if world::claims_before(pod, owner) {
                    *owner = pod;
                }
            }
        }
        let (services, selected) = (RefCell::default(), RefCell::default());
        Self { cluster, policies, services, owners, selected, names, unselected_pod: UnselectedPod::Open, problems }
    }

    /// Another answer for pods that no NetworkPolicy selects: they are open as Kubernetes says, unless the enforcing mode is strict.
    #[must_use]
    pub fn with_unselected_pod(self, unselected_pod: UnselectedPod) -> Self {
        Self { unselected_pod, ..self }
    }

    /// The verdict on a new connection's first packet. `port` is 0 for protocols without ports.
    ///
    /// # Errors
    /// An end that is unknown or has no address of the family (4 or 6).
    pub fn verdict(&self, from: &End, to: &End, family: u8, protocol: PacketProtocol, port: u16) -> Result<Verdict, NoVerdict> {
        let (source, destination) = (self.party(from, family)?, self.party(to, family)?);
        let (egress, ingress) = match self.service_port(source.node, destination.address, protocol, port) {
            Some(service) if destination.pod.is_none() => self.service(source, destination, &service),
            _ => (
                self.side(Direction::Egress, source, destination, protocol, port),
                self.side(Direction::Ingress, destination, source, protocol, port),
            ),
        };
        Ok(Verdict { allowed: egress.allowed && ingress.allowed, ingress, egress })
    }

    /// Whether some rule speaks of DNS names.
    pub fn is_by_name(&self) -> bool {
        let rules = self.policies.iter().flat_map(|policy| policy.rules(Direction::Egress)).flatten();
        let mut lists = rules.filter_map(|rule| if let Peers::List(peers) = &rule.peers { Some(peers) } else { None });
        lists.any(|peers| peers.iter().any(|peer| matches!(peer, Peer::Domain(_))))
    }

    fn party(&self, end: &End, family: u8) -> Result<Party<'a>, NoVerdict> {
        let unknown = || NoVerdict::Unknown(end.clone());
        let of_family = |addresses: Vec<IpAddr>| {
            let found = addresses.into_iter().find(|address| address.is_ipv4() == (family == 4));
            found.ok_or_else(|| NoVerdict::NoAddress(end.clone(), family))
        };
        match end {
            End::Address(address) if address.is_ipv4() != (family == 4) => Err(NoVerdict::NoAddress(end.clone(), family)),
            End::Address(address) => Ok(self.at(*address)),
            End::Node(name) => {
                let node = self.cluster.nodes.get(name).ok_or_else(unknown)?;
                Ok(Party { address: of_family(node.ip_addresses().collect())?, pod: None, node: Some(&node.metadata.name) })
            }
            End::Pod(name) => {
                let pod = self.cluster.pods.get(name).ok_or_else(unknown)?;
                let mut addresses = world::addresses(pod);
                if pod.spec.host_network
                    && let Some(node) = self.cluster.nodes.get(&pod.spec.node_name)
                {
                    addresses.splice(0..0, node.ip_addresses());
                }
                let node = Some(pod.spec.node_name.as_str()).filter(|node| !node.is_empty());
                Ok(Party { address: of_family(addresses)?, pod: world::is_networked(pod).then_some(&**pod), node })
            }
        }
    }

    /// Whatever has an address.
    fn at(&self, address: IpAddr) -> Party<'a> {
        let pod = self.owners.get(&address).map(|pod| &***pod);
        Party { address, pod, node: pod.map(|pod| pod.spec.node_name.as_str()).filter(|node| !node.is_empty()) }
    }

    fn service_port(&self, node: Option<&str>, address: IpAddr, protocol: PacketProtocol, port: u16) -> Option<ServicePortBackends> {
        let mut services = self.services.borrow_mut();
        let services = services.entry(node.map(str::to_owned)).or_insert_with(|| service_addresses(self.cluster, node));
        let mut ports = services.get(&address)?.iter();
        ports.find(|service| PacketProtocol::Transport(service.protocol) == protocol && service.port == port).cloned()
    }

    /// A service address: every backend must be open, as the choice falls after the check. One that is external is not opened by its
    /// service where a rule denies it.
    fn service(&self, source: Party<'a>, destination: Party<'a>, service: &ServicePortBackends) -> (SideVerdict, SideVerdict) {
        let protocol = PacketProtocol::Transport(service.protocol);
        let of_address = service.is_external.then(|| self.judge(Direction::Egress, source, destination, protocol, service.port));
        let mut sides = [of_address.filter(|verdict| !verdict.allowed && verdict.decided.is_some()), None];
        for (address, target) in &service.backends {
            let backend = self.at(*address);
            let mut both = [
                self.judge(Direction::Egress, source, backend, protocol, *target),
                self.judge(Direction::Ingress, backend, source, protocol, *target),
            ];
            if *address == source.address && both[1].decided.is_none() {
                both[1] = SideVerdict::plain(true, "a pod reaches itself through a service, unless a ClusterNetworkPolicy denies it");
            }
            for (side, verdict) in sides.iter_mut().zip(both) {
                if side.as_ref().is_none_or(|kept: &SideVerdict| kept.allowed && !verdict.allowed) {
                    let reason = format!("service {}, backend {address} port {target}: {}", service.service, verdict.reason);
                    *side = Some(SideVerdict { reason, ..verdict });
                }
            }
        }
        let [egress, ingress] = sides.map(|side| side.unwrap_or_else(|| SideVerdict::plain(true, "no backend")));
        (egress, ingress)
    }

    /// What the policies of `local` say of `remote`, if a packet between them leaves the pod at all.
    fn side(&self, direction: Direction, local: Party<'a>, remote: Party<'a>, protocol: PacketProtocol, port: u16) -> SideVerdict {
        if local.address == remote.address || local.pod.is_some_and(|pod| world::addresses(pod).contains(&remote.address)) {
            return SideVerdict::plain(true, "a pod always reaches itself");
        }
        self.judge(direction, local, remote, protocol, port)
    }

    /// What the policies of `local` say of `remote`.
    fn judge(&self, direction: Direction, local: Party<'a>, remote: Party<'a>, protocol: PacketProtocol, port: u16) -> SideVerdict {
        let Some(pod) = local.pod else {
            return SideVerdict::plain(true, format!("{} is no pod that policies can select", local.address));
        };
        let own_node = self.cluster.nodes.get(&pod.spec.node_name);
        if own_node.is_some_and(|node| node.ip_addresses().any(|address| address == remote.address)) {
            return SideVerdict::plain(true, format!("{} is the pod's own node", pod.spec.node_name));
        }
        let selected = self.selecting(pod, direction);
        let policies: Vec<&Policy> = selected.iter().map(|index| &self.policies[*index]).collect();
        let question = Question { evaluator: self, direction, local: pod, remote, protocol, port };
        SideVerdict { selected_by: policies.iter().map(|policy| policy.name.to_string()).collect(), ..question.answer(&policies) }
    }

    fn selecting(&self, pod: &Pod, direction: Direction) -> Selected {
        let key = (pod.full_name(), direction);
        if let Some(selected) = self.selected.borrow().get(&key) {
            return Arc::clone(selected);
        }
        let applies = |policy: &Policy| policy.rules(direction).is_some() && world::selects(self.cluster, policy, pod);
        let indices = (0..self.policies.len()).filter(|index| applies(&self.policies[*index])).collect();
        let selected: Selected = Arc::new(indices);
        self.selected.borrow_mut().insert(key, Arc::clone(&selected));
        selected
    }
}

/// One side's question.
struct Question<'q, 'a> {
    evaluator: &'q Evaluator<'a>,
    direction: Direction,
    local: &'a Pod,
    remote: Party<'a>,
    protocol: PacketProtocol,
    port: u16,
}

impl Question<'_, '_> {
    fn answer(&self, policies: &[&Policy]) -> SideVerdict {
        if let Some(verdict) = self.tier(policies, Tier::Admin) {
            return verdict;
        }
        if let Some(rules) = ordered_rules(policies, Tier::Namespace, self.direction) {
            return self.first(&rules, Tier::Namespace).unwrap_or_else(|| self.denied(policies));
        }
        if let Some(verdict) = self.tier(policies, Tier::Baseline) {
            return verdict;
        }
        let is_selected = |policy: &Policy| policy.tier == Tier::Namespace && world::selects(self.evaluator.cluster, policy, self.local);
        if self.evaluator.unselected_pod == UnselectedPod::Closed && !self.evaluator.policies.iter().any(is_selected) {
            return SideVerdict::plain(false, "no NetworkPolicy selects the pod, and the enforcing mode is strict");
        }
        let which = if policies.is_empty() { "no policy selects the pod" } else { "no rule of the policies that select the pod matches" };
        SideVerdict::plain(true, format!("{which} for {}", self.direction))
    }

    /// The decision of a cluster tier; `None` if it has none or passes.
    fn tier(&self, policies: &[&Policy], tier: Tier) -> Option<SideVerdict> {
        let rules = ordered_rules(policies, tier, self.direction)?;
        self.first(&rules, tier)
    }

    fn first(&self, rules: &[(&Policy, &Rule)], tier: Tier) -> Option<SideVerdict> {
        for (policy, rule) in rules {
            let Some(peer) = self.peer(rule) else { continue };
            if !self.ports_match(rule) {
                continue;
            }
            let allowed = match rule.action {
                Action::Pass => return None,
                Action::Allow => true,
                Action::Deny => false,
            };
            let decided = DecidingRule {
                policy: policy.name.to_string(),
                tier: tier_name(tier),
                rule: rule.index,
                name: rule.name.clone(),
                peer: peer.map(ToString::to_string),
            };
            let verb = if allowed { "allowed" } else { "denied" };
            let reason = format!("{verb} by {} {}[{}]", policy.name, self.direction, rule.index);
            return Some(SideVerdict { decided: Some(decided), ..SideVerdict::plain(allowed, reason) });
        }
        None
    }

    /// Denied since nothing allows it: says what each policy would need.
    fn denied(&self, policies: &[&Policy]) -> SideVerdict {
        let mut missing = Vec::new();
        for policy in policies.iter().filter(|policy| policy.tier == Tier::Namespace) {
            let rules = policy.rules(self.direction).unwrap_or_default();
            let near: Vec<String> = rules
                .iter()
                .filter(|rule| self.peer(rule).is_some())
                .map(|rule| format!("{}[{}] is about this peer, but only for {}", self.direction, rule.index, ports_text(&rule.ports)))
                .collect();
            let why = match (rules.is_empty(), near.is_empty()) {
                (true, _) => format!("has no {} rule", self.direction),
                (false, true) => format!("has no {} rule about this peer", self.direction),
                (false, false) => near.join("; "),
            };
            missing.push(format!("{} {why}", policy.name));
        }
        let reason = format!("isolated for {}, and no rule of the policies that select the pod allows it", self.direction);
        SideVerdict { missing, ..SideVerdict::plain(false, reason) }
    }

    /// Whether the rule is about the remote end: `Some(None)` if it is about anyone, else the peer that matches.
    fn peer<'r>(&self, rule: &'r Rule) -> Option<Option<&'r Peer>> {
        match &rule.peers {
            Peers::Any => Some(None),
            Peers::List(peers) => peers.iter().find(|peer| self.is_peer(peer)).map(Some),
        }
    }

    fn is_peer(&self, peer: &Peer) -> bool {
        let cluster = self.evaluator.cluster;
        let address = self.remote.address;
        match peer {
            Peer::Pods(wanted) => self.remote.pod.is_some_and(|pod| world::matches(cluster, wanted, pod)),
            Peer::Block { net, except } => net.contains(&address) && !except.iter().any(|cut| cut.contains(&address)),
            Peer::Nodes(selector) => {
                cluster.nodes.values().any(|node| selector.matches(&node.metadata.labels) && node.ip_addresses().any(|a| a == address))
            }
            Peer::Domain(pattern) => self.evaluator.names.of(address, &self.local.metadata.namespace).any(|name| pattern.matches(name)),
        }
    }

    fn ports_match(&self, rule: &Rule) -> bool {
        let Ports::List(ports) = &rule.ports else { return true };
        let PacketProtocol::Transport(protocol) = self.protocol else { return false };
        let destination = if self.direction == Direction::Ingress { Some(self.local) } else { self.remote.pod };
        ports.iter().any(|wanted| match wanted {
            PortMatch::Range(of, first, last) => *of == protocol && (*first..=*last).contains(&self.port),
            PortMatch::Named(of, name) => {
                let named = |(n, p, number): (&str, Protocol, u16)| n == name && p == protocol && number == self.port;
                of.is_none_or(|of| of == protocol) && destination.is_some_and(|pod| world::named_ports(pod).any(named))
            }
        })
    }
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Admin => "admin",
        Tier::Namespace => "namespace",
        Tier::Baseline => "baseline",
    }
}

/// Ports as people write them: `TCP/80, UDP/53-54`.
fn ports_text(ports: &Ports) -> String {
    let Ports::List(list) = ports else { return "all ports".to_owned() };
    let texts = list.iter().map(|port| match port {
        PortMatch::Range(protocol, 0, u16::MAX) => format!("{}, all ports", protocol_name(*protocol)),
        PortMatch::Range(protocol, first, last) if first == last => format!("{}/{first}", protocol_name(*protocol)),
        PortMatch::Range(protocol, first, last) => format!("{}/{first}-{last}", protocol_name(*protocol)),
        PortMatch::Named(protocol, name) => format!("{}/{name}", protocol.map_or("any", protocol_name)),
    });
    let text = texts.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "no port (none is valid)".to_owned() } else { text }
}
