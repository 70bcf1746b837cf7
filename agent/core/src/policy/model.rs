//! Policies in one form, whatever object they come from: what the definition-style evaluator walks and the compiler lowers.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use crate::ids::PodName;
use crate::objects::{LabelSelector, Labels, Protocol};

/// Where in the order of evaluation a policy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// ClusterNetworkPolicy before everything else.
    Admin,
    /// NetworkPolicy: decides finally for the pods it selects.
    Namespace,
    /// ClusterNetworkPolicy for pods that no NetworkPolicy selects.
    Baseline,
}

/// Whose traffic: the pod's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Into the pod.
    Ingress,
    /// Out of the pod.
    Egress,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As the maps store it.
    pub fn abi(self) -> u8 {
        match self {
            Self::Ingress => stanchion_ebpf_abi::direction::INGRESS,
            Self::Egress => stanchion_ebpf_abi::direction::EGRESS,
        }
    }

    /// `ingress` or `egress`, as the field is called in manifests.
    pub fn field(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.field())
    }
}

/// Which object a policy came from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyName {
    /// `NetworkPolicy`, `ClusterNetworkPolicy`.
    pub kind: &'static str,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its object.
    pub name: PolicyName,
    /// Its tier.
    pub tier: Tier,
    /// Lower first within a cluster tier; 0 for NetworkPolicies.
    pub priority: i32,
    /// Whom it speaks for.
    pub subject: Subject,
    /// Rules of the direction; `None`: the policy does not speak of it. An empty list of a NetworkPolicy isolates.
    pub ingress: Option<Vec<Rule>>,
    /// As `ingress`.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// The rules of a direction.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// Whom a policy speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Pods by selectors.
    Pods(PodMatch),
    /// Pods that a controller listed, sorted, and those that it will list when they have an address.
    Listed(Vec<PodName>, Vec<PodMatch>),
}

/// Pods by namespace and labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodMatch {
    /// Which namespaces.
    pub namespaces: NamespaceMatch,
    /// Which pods in them.
    pub pods: LabelSelector,
}

/// Namespaces.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamespaceMatch {
    /// One, by name.
    Name(String),
    /// By labels.
    Labels(LabelSelector),
}

impl NamespaceMatch {
    /// Whether a namespace is meant.
    pub fn matches(&self, name: &str, labels: &Labels) -> bool {
        match self {
            Self::Name(wanted) => wanted == name,
            Self::Labels(selector) => selector.matches(labels),
        }
    }
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Drops.
    Deny,
    /// Lets pass.
    Allow,
    /// Leaves the decision to the next tier.
    Pass,
}

/// A rule: any peer AND any port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, empty where it has none.
    pub name: String,
    /// Its place in the manifest's list.
    pub index: usize,
    /// What it does.
    pub action: Action,
    /// Whom it is about.
    pub peers: Peers,
    /// Which protocols and ports.
    pub ports: Ports,
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Anyone, pods or not.
    Any,
    /// Any of these; shared with the compiler, which interns equal lists.
    List(Arc<[Peer]>),
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Pods with a network of their own.
    Pods(PodMatch),
    /// Addresses, pods' addresses included.
    Block {
        /// Host bits are zero.
        net: IpNet,
        /// Cut out of it; host bits are zero.
        except: Vec<IpNet>,
    },
    /// Addresses of nodes.
    Nodes(LabelSelector),
    /// Addresses that a DNS name resolves to.
    Domain(DomainPattern),
}

/// A DNS name in lower case without the final dot; `wildcard` stands for one or more labels in front of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainPattern {
    /// The name after `*.`.
    pub name: String,
    /// Any labels in front.
    pub wildcard: bool,
}

impl DomainPattern {
    /// Whether a name (lower case, no final dot) is meant.
    pub fn matches(&self, name: &str) -> bool {
        if self.wildcard {
            name.len() > self.name.len() + 1 && name.ends_with(&self.name) && name.as_bytes()[name.len() - self.name.len() - 1] == b'.'
        } else {
            name == self.name
        }
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.wildcard {
            f.write_str("*.")?;
        }
        f.write_str(&self.name)
    }
}

/// Which protocols and ports a rule covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Every protocol, ICMP included.
    Any,
    /// Any of these.
    List(Vec<PortMatch>),
}

/// A protocol with ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMatch {
    /// From the first to the last, both included.
    Range(Protocol, u16, u16),
    /// The container port of that name on the destination pod; `None`: whatever its protocol.
    Named(Option<Protocol>, String),
}

/// The protocol of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PacketProtocol {
    /// One that rules can name.
    Transport(Protocol),
    /// Any other, ICMP and ICMPv6 among them, by number.
    Other(u8),
}

impl PacketProtocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Transport(protocol) => protocol.number(),
            Self::Other(number) => number,
        }
    }

    /// From the IP protocol number.
    pub fn from_number(number: u8) -> Self {
        match number {
            6 => Self::Transport(Protocol::Tcp),
            17 => Self::Transport(Protocol::Udp),
            132 => Self::Transport(Protocol::Sctp),
            other => Self::Other(other),
        }
    }
}

/// Name of a protocol as manifests write it.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

impl fmt::Display for PacketProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(protocol) => f.pad(protocol_name(*protocol)),
            Self::Other(1) => f.pad("ICMP"),
            Self::Other(58) => f.pad("ICMPv6"),
            Self::Other(number) => f.pad(&format!("protocol {number}")),
        }
    }
}

/// Something in an object that the agent cannot do as written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{policy}: {field}: {problem}; {consequence}. {remedy}")]
pub struct Problem {
    /// The object.
    pub policy: PolicyName,
    /// Path of the field.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
    /// What the agent does instead.
    pub consequence: &'static str,
    /// What to write.
    pub remedy: &'static str,
}

/// The rules of a tier and direction in their order of evaluation, with the policies they belong to. `None`: no policy
/// speaks of the direction in that tier.
///
/// Kubernetes' cluster policies go by priority, then name, then the order in which rules are written; AWS's by priority,
/// then action (Deny, Accept, Pass). NetworkPolicies have no order; theirs is by name.
pub fn ordered_rules<'a>(policies: &[&'a Policy], tier: Tier, direction: Direction) -> Option<Vec<(&'a Policy, &'a Rule)>> {
    let mut rules = Vec::new();
    let mut any = false;
    for policy in policies.iter().filter(|policy| policy.tier == tier) {
        if let Some(list) = policy.rules(direction) {
            any = true;
            rules.extend(list.iter().map(|rule| (*policy, rule)));
        }
    }
    rules.sort_by_key(|(policy, rule)| {
        let aws = policy.name.kind == super::resolve::AWS_CLUSTER_NETWORK_POLICY;
        (policy.priority, aws.then_some(rule.action), &policy.name, rule.index)
    });
    any.then_some(rules)
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods(PodMatch { namespaces: NamespaceMatch::Name(name), pods }) => {
                write!(f, "pods {} in namespace {name}", SelectorText(pods))
            }
            Self::Pods(PodMatch { namespaces: NamespaceMatch::Labels(labels), pods }) => {
                write!(f, "pods {} in namespaces {}", SelectorText(pods), SelectorText(labels))
            }
            Self::Block { net, except } if except.is_empty() => write!(f, "{net}"),
            Self::Block { net, except } => {
                write!(f, "{net} except ")?;
                for (index, cut) in except.iter().enumerate() {
                    write!(f, "{}{cut}", if index > 0 { ", " } else { "" })?;
                }
                Ok(())
            }
            Self::Nodes(labels) => write!(f, "nodes {}", SelectorText(labels)),
            Self::Domain(pattern) => write!(f, "{pattern}"),
        }
    }
}

/// A selector as kubectl writes it: `(all)`, `app=web,tier in (a,b),!old`.
pub struct SelectorText<'a>(pub &'a LabelSelector);

impl fmt::Display for SelectorText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use crate::objects::SelectorOperator::{DoesNotExist, Exists, In, NotIn};
        let mut terms: Vec<String> = self.0.match_labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        terms.extend(self.0.match_expressions.iter().map(|term| match term.operator {
            In => format!("{} in ({})", term.key, term.values.join(",")),
            NotIn => format!("{} notin ({})", term.key, term.values.join(",")),
            Exists => term.key.clone(),
            DoesNotExist => format!("!{}", term.key),
        }));
        if terms.is_empty() { f.write_str("(all)") } else { f.write_str(&terms.join(",")) }
    }
}
