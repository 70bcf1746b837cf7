//! From Kubernetes objects to [`Policy`]: defaults filled in, CIDRs parsed and masked, rules checked.
//!
//! What is wrong in an object costs as little as possible and never opens anything: a bad peer or port of a rule that
//! allows matches nothing, while isolation stays; of a rule that denies or passes, the rule denies everything in its direction
//! (ClusterNetworkPolicy's "fail closed"). Each such case is a [`Problem`].

use std::net::IpAddr;

use ipnet::IpNet;

use super::engine::Source;
use super::model::{
    Action, Direction, DomainPattern, NamespaceMatch, Peer, Peers, PodMatch, Policy, PolicyName, PortMatch, Ports, Problem, Rule, Subject,
    Tier,
};
use super::objects::{AwsPort, ClusterNetworkPolicy, ClusterPeer, ClusterProtocol, ClusterRule, ClusterSubject, DestinationPort};
use super::resolved;
use crate::cluster::ClusterState;
use crate::objects::{IntOrString, IpBlock, LabelSelector, NetworkPolicy, PolicyPeer, PolicyPort, Protocol};

/// Kind of a NetworkPolicy in names and messages.
pub const NETWORK_POLICY: &str = "NetworkPolicy";
/// Kind of an ApplicationNetworkPolicy in names and messages.
pub const APPLICATION_NETWORK_POLICY: &str = "ApplicationNetworkPolicy";
/// Kind of a ClusterNetworkPolicy in names and messages.
pub const CLUSTER_NETWORK_POLICY: &str = "ClusterNetworkPolicy";
/// The same for AWS's kind of that name.
pub const AWS_CLUSTER_NETWORK_POLICY: &str = "ClusterNetworkPolicy.networking.k8s.aws";

const NOTHING: &str = "it matches nothing";
const CLOSED: &str = "the rule denies everything in its direction";
const IGNORED: &str = "the policy is not applied";
const NOT_ITS_OWN: &str = "what goes to the pod's own node passes all the same";

/// Problems of one object that are told one by one: its writer mends these and sees the next.
const MOST_PROBLEMS: usize = 20;

/// Collects problems of one object.
pub(super) struct Report<'a> {
    pub(super) policy: &'a PolicyName,
    problems: &'a mut Vec<Problem>,
    told: usize,
}

impl<'a> Report<'a> {
    /// Adds to `problems`.
    pub(super) fn new(policy: &'a PolicyName, problems: &'a mut Vec<Problem>) -> Self {
        Self { policy, problems, told: 0 }
    }

    pub(super) fn tell(&mut self, field: String, problem: String, consequence: &'static str, remedy: &'static str) {
        self.told += 1;
        let more = self.told.saturating_sub(MOST_PROBLEMS);
        if more > 1 {
            self.problems.pop();
        }
        let told = if more == 0 {
            Problem { policy: self.policy.clone(), field, problem, consequence, remedy }
        } else {
            Problem {
                policy: self.policy.clone(),
                field: "spec".to_owned(),
                problem: format!("{more} more fields like those are wrong"),
                consequence: "each has the consequence of its kind",
                remedy: "Mend those that are told first.",
            }
        };
        self.problems.push(told);
    }
}

/// A NetworkPolicy, or AWS's ApplicationNetworkPolicy, in the common form. Problems are added to `problems`.
pub fn network_policy(object: &NetworkPolicy, problems: &mut Vec<Problem>) -> Policy {
    let namespace = object.metadata.namespace.clone();
    let kind = if object.is_aws() { APPLICATION_NETWORK_POLICY } else { NETWORK_POLICY };
    let name = PolicyName { kind, namespace: namespace.clone(), name: object.metadata.name.clone() };
    let mut report = Report::new(&name, problems);
    let spec = &object.spec;
    let has_egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
    let (mut ingress_listed, mut egress_listed) = (true, has_egress);
    if let Some(types) = spec.policy_types.as_ref().filter(|types| !types.is_empty()) {
        ingress_listed = types.iter().any(|t| t == "Ingress");
        egress_listed = types.iter().any(|t| t == "Egress");
        for (index, unknown) in types.iter().enumerate().filter(|(_, t)| *t != "Ingress" && *t != "Egress") {
            // Which direction was meant is unknown: both are isolated.
            (ingress_listed, egress_listed) = (true, true);
            let field = format!("spec.policyTypes[{index}]");
            report.tell(field, format!("{unknown:?} is no direction"), "both directions are isolated", "Write Ingress or Egress.");
        }
    }
    let ingress = ingress_listed.then(|| {
        let rules = spec.ingress.iter().flatten().enumerate();
        rules.map(|(i, rule)| namespaced_rule(&mut report, &namespace, Direction::Ingress, i, &rule.from, &rule.ports)).collect()
    });
    let egress = egress_listed.then(|| {
        let rules = spec.egress.iter().flatten().enumerate();
        rules.map(|(i, rule)| namespaced_rule(&mut report, &namespace, Direction::Egress, i, &rule.to, &rule.ports)).collect()
    });
    let subject = Subject::Pods(PodMatch { namespaces: NamespaceMatch::Name(namespace), pods: spec.pod_selector.clone() });
    Policy { name: name.clone(), tier: Tier::Namespace, priority: 0, subject, ingress, egress }
}

fn namespaced_rule(
    report: &mut Report<'_>,
    namespace: &str,
    direction: Direction,
    index: usize,
    peers: &[PolicyPeer],
    ports: &[PolicyPort],
) -> Rule {
    let field = format!("spec.{direction}[{index}]");
    let end = if direction == Direction::Ingress { "from" } else { "to" };
    let peers = if peers.is_empty() {
        Peers::Any
    } else {
        let peers = peers.iter().enumerate();
        Peers::List(
            peers.flat_map(|(i, peer)| namespaced_peer(report, namespace, direction, &format!("{field}.{end}[{i}]"), peer)).collect(),
        )
    };
    let ports = if ports.is_empty() {
        Ports::Any
    } else {
        let ports = ports.iter().enumerate();
        Ports::List(ports.filter_map(|(i, port)| namespaced_port(report, &format!("{field}.ports[{i}]"), port)).collect())
    };
    Rule { name: String::new(), index, action: Action::Allow, peers, ports }
}

fn namespaced_peer(report: &mut Report<'_>, namespace: &str, direction: Direction, field: &str, peer: &PolicyPeer) -> Vec<Peer> {
    if let Some(names) = &peer.domain_names {
        return named_peers(report, direction, field, peer, names);
    }
    let resolved = match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
        (Some(block), None, None) => ip_block(report, field, block),
        (Some(_), _, _) => {
            let problem = "ipBlock together with a selector".to_owned();
            report.tell(field.to_owned(), problem, NOTHING, "Write two peers: one with ipBlock, one with the selectors.");
            None
        }
        (None, None, None) => {
            report.tell(field.to_owned(), "no peer in it".to_owned(), NOTHING, "Give podSelector, namespaceSelector or ipBlock.");
            None
        }
        (None, None, Some(pods)) => {
            Some(Peer::Pods(PodMatch { namespaces: NamespaceMatch::Name(namespace.to_owned()), pods: pods.clone() }))
        }
        (None, Some(namespaces), pods) => {
            let pods = pods.clone().unwrap_or_default();
            Some(Peer::Pods(PodMatch { namespaces: NamespaceMatch::Labels(namespaces.clone()), pods }))
        }
    };
    resolved.into_iter().collect()
}

fn named_peers(report: &mut Report<'_>, direction: Direction, field: &str, peer: &PolicyPeer, names: &[String]) -> Vec<Peer> {
    let wrong = if report.policy.kind != APPLICATION_NETWORK_POLICY || direction == Direction::Ingress {
        Some("domainNames where it is no field")
    } else if peer.ip_block.is_some() || peer.namespace_selector.is_some() || peer.pod_selector.is_some() {
        Some("domainNames together with ipBlock or a selector")
    } else {
        names.is_empty().then_some("no peer in it")
    };
    if let Some(problem) = wrong {
        let remedy = "Write domainNames by themselves, as a peer of an egress rule of an ApplicationNetworkPolicy.";
        report.tell(field.to_owned(), problem.to_owned(), NOTHING, remedy);
        return Vec::new();
    }
    let resolve = |(i, text): (usize, &String)| {
        let pattern = domain(text);
        if pattern.is_none() {
            let problem = format!("{text:?} is no DNS name");
            report.tell(format!("{field}.domainNames[{i}]"), problem, NOTHING, "Write a name such as example.com or *.example.com.");
        }
        pattern.map(Peer::Domain)
    };
    names.iter().enumerate().filter_map(resolve).collect()
}

fn ip_block(report: &mut Report<'_>, field: &str, block: &IpBlock) -> Option<Peer> {
    let Some(net) = cidr(&block.cidr) else {
        let problem = format!("{:?} is no CIDR", block.cidr);
        report.tell(format!("{field}.ipBlock.cidr"), problem, NOTHING, "Write an address and a prefix length, such as 10.0.0.0/8.");
        return None;
    };
    let mut except = Vec::with_capacity(block.except.len());
    for (index, text) in block.except.iter().enumerate() {
        let Some(cut) = cidr(text) else {
            // What should have been cut out is unknown: the whole block matches nothing.
            let problem = format!("{text:?} is no CIDR");
            report.tell(
                format!("{field}.ipBlock.except[{index}]"),
                problem,
                "the whole ipBlock matches nothing",
                "Write a CIDR inside ipBlock.cidr.",
            );
            return None;
        };
        except.push(cut);
    }
    except.sort_unstable();
    except.dedup();
    Some(Peer::Block { net, except })
}

/// A CIDR with its host bits masked; a bare address is a host's CIDR.
pub fn cidr(text: &str) -> Option<IpNet> {
    let text = text.trim();
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?;
    Some(net.trunc())
}

fn namespaced_port(report: &mut Report<'_>, field: &str, port: &PolicyPort) -> Option<PortMatch> {
    let protocol = port.protocol.unwrap_or_default();
    match (&port.port, port.end_port) {
        (None, None) => Some(PortMatch::Range(protocol, 0, u16::MAX)),
        (Some(IntOrString::Str(name)), None) => Some(PortMatch::Named(Some(protocol), name.clone())),
        (Some(IntOrString::Int(first)), last) => {
            let last = last.unwrap_or(*first);
            if last < *first {
                let problem = format!("{last} is less than port {first}");
                report.tell(format!("{field}.endPort"), problem, NOTHING, "Write an endPort that is not less than port.");
                return None;
            }
            Some(PortMatch::Range(protocol, *first, last))
        }
        (None | Some(IntOrString::Str(_)), Some(_)) => {
            report.tell(format!("{field}.endPort"), "endPort without a numeric port".to_owned(), NOTHING, "Give port as a number.");
            None
        }
    }
}

/// A ClusterNetworkPolicy of either group in the common form; `None` if it cannot be applied at all.
pub fn cluster_network_policy(object: &ClusterNetworkPolicy, problems: &mut Vec<Problem>) -> Option<Policy> {
    let kind = if object.is_aws() { AWS_CLUSTER_NETWORK_POLICY } else { CLUSTER_NETWORK_POLICY };
    let name = PolicyName { kind, namespace: String::new(), name: object.metadata.name.clone() };
    let mut report = Report::new(&name, problems);
    let tier = tier(&mut report, &object.spec.tier)?;
    let subject = cluster_subject(&mut report, &object.spec.subject)?;
    let mut rules = |direction: Direction, rules: &[ClusterRule]| {
        let mut resolved: Vec<Rule> =
            rules.iter().enumerate().map(|(i, rule)| cluster_rule(&mut report, object.is_aws(), direction, i, rule)).collect();
        if object.is_aws() {
            // AWS's kind does not keep the order of rules: at one priority Deny beats Accept beats Pass.
            resolved.sort_by_key(|rule| rule.action);
        }
        (!resolved.is_empty()).then_some(resolved)
    };
    let ingress = rules(Direction::Ingress, &object.spec.ingress);
    let egress = rules(Direction::Egress, &object.spec.egress);
    Some(Policy { name: name.clone(), tier, priority: object.spec.priority, subject: Subject::Pods(subject), ingress, egress })
}

pub(super) fn tier(report: &mut Report<'_>, text: &str) -> Option<Tier> {
    match text {
        "Admin" => Some(Tier::Admin),
        "Baseline" => Some(Tier::Baseline),
        other => {
            report.tell("spec.tier".to_owned(), format!("{other:?} is no tier"), IGNORED, "Write Admin or Baseline.");
            None
        }
    }
}

fn cluster_subject(report: &mut Report<'_>, subject: &ClusterSubject) -> Option<PodMatch> {
    let pods = pods_of(subject);
    if pods.is_none() {
        let problem = "not exactly one of namespaces and pods".to_owned();
        report.tell("spec.subject".to_owned(), problem, IGNORED, "Give namespaces or pods.");
    }
    pods
}

/// `None` if it is not exactly one of the two.
pub(super) fn pods_of(subject: &ClusterSubject) -> Option<PodMatch> {
    match (&subject.namespaces, &subject.pods) {
        (Some(namespaces), None) => {
            Some(PodMatch { namespaces: NamespaceMatch::Labels(namespaces.clone()), pods: LabelSelector::default() })
        }
        (None, Some(pods)) => {
            let namespaces = NamespaceMatch::Labels(pods.namespace_selector.clone());
            Some(PodMatch { namespaces, pods: pods.pod_selector.clone() })
        }
        _ => None,
    }
}

fn cluster_rule(report: &mut Report<'_>, aws: bool, direction: Direction, index: usize, rule: &ClusterRule) -> Rule {
    let field = format!("spec.{direction}[{index}]");
    let closed = |action| Rule { name: rule.name.clone(), index, action, peers: Peers::Any, ports: Ports::Any };
    let action = match rule.action.as_str() {
        "Accept" | "Allow" => Action::Allow,
        "Deny" => Action::Deny,
        "Pass" => Action::Pass,
        other => {
            report.tell(format!("{field}.action"), format!("{other:?} is no action"), CLOSED, "Write Accept, Deny or Pass.");
            return closed(Action::Deny);
        }
    };
    let (end, peers) = match direction {
        Direction::Ingress => ("from", &rule.from),
        Direction::Egress => ("to", &rule.to),
    };
    let consequence = if action == Action::Allow { NOTHING } else { CLOSED };
    let mut bad = false;
    if peers.is_empty() {
        report.tell(format!("{field}.{end}"), "no peer".to_owned(), consequence, "List at least one peer.");
        bad = true;
    }
    let mut resolved = Vec::new();
    for (i, peer) in peers.iter().enumerate() {
        bad |= !cluster_peer(report, consequence, direction, action, &format!("{field}.{end}[{i}]"), peer, &mut resolved);
    }
    let ports = cluster_ports(report, consequence, aws, &field, rule, &mut bad);
    if bad && action != Action::Allow {
        return closed(Action::Deny);
    }
    Rule { name: rule.name.clone(), index, action, peers: Peers::List(resolved.into()), ports }
}

/// Adds what the peer means; false if it means nothing that is known.
fn cluster_peer(
    report: &mut Report<'_>,
    consequence: &'static str,
    direction: Direction,
    action: Action,
    field: &str,
    peer: &ClusterPeer,
    resolved: &mut Vec<Peer>,
) -> bool {
    let given =
        [peer.namespaces.is_some(), peer.pods.is_some(), peer.nodes.is_some(), peer.networks.is_some(), peer.domain_names.is_some()];
    let empty = [&peer.networks, &peer.domain_names].into_iter().flatten().any(Vec::is_empty);
    if given.iter().filter(|there| **there).count() != 1 || empty {
        let remedy = "Give exactly one of namespaces, pods, nodes, networks, domainNames.";
        report.tell(field.to_owned(), "not exactly one kind of peer".to_owned(), consequence, remedy);
        return false;
    }
    // AWS's kind has networks in both directions.
    let aws = report.policy.kind == AWS_CLUSTER_NETWORK_POLICY;
    let only_egress = peer.nodes.is_some() || peer.domain_names.is_some() || (peer.networks.is_some() && !aws);
    if direction == Direction::Ingress && only_egress {
        let problem = "a peer that only egress rules may have".to_owned();
        let remedy = if aws { "Use namespaces, pods or networks in ingress rules." } else { "Use namespaces or pods in ingress rules." };
        report.tell(field.to_owned(), problem, consequence, remedy);
        return false;
    }
    if let Some(namespaces) = &peer.namespaces {
        resolved.push(Peer::Pods(PodMatch { namespaces: NamespaceMatch::Labels(namespaces.clone()), pods: LabelSelector::default() }));
    }
    if let Some(pods) = &peer.pods {
        let namespaces = NamespaceMatch::Labels(pods.namespace_selector.clone());
        resolved.push(Peer::Pods(PodMatch { namespaces, pods: pods.pod_selector.clone() }));
    }
    if let Some(nodes) = &peer.nodes {
        if action == Action::Deny {
            let problem = "a rule that denies nodes, which may be the pod's own".to_owned();
            report.tell(format!("{field}.nodes"), problem, NOT_ITS_OWN, "Guard on the node itself what its pods must not reach.");
        }
        resolved.push(Peer::Nodes(nodes.clone()));
    }
    let mut good = true;
    for (i, text) in peer.networks.iter().flatten().enumerate() {
        if let Some(net) = cidr(text) {
            resolved.push(Peer::Block { net, except: Vec::new() });
        } else {
            good = false;
            let problem = format!("{text:?} is no CIDR");
            report.tell(
                format!("{field}.networks[{i}]"),
                problem,
                consequence,
                "Write an address and a prefix length, such as 10.0.0.0/8.",
            );
        }
    }
    for (i, text) in peer.domain_names.iter().flatten().enumerate() {
        let problem = if action == Action::Deny {
            Some("a rule that denies by name (the name's other addresses would stay open)".to_owned())
        } else {
            domain(text).map(|pattern| resolved.push(Peer::Domain(pattern))).is_none().then(|| format!("{text:?} is no DNS name"))
        };
        if let Some(problem) = problem {
            good = false;
            let remedy = "Write a name such as example.com or *.example.com, in a rule with Accept.";
            report.tell(format!("{field}.domainNames[{i}]"), problem, consequence, remedy);
        }
    }
    good
}

/// A DNS name pattern; `None` if the text is none.
pub fn domain(text: &str) -> Option<DomainPattern> {
    let lower = text.trim().trim_end_matches('.').to_ascii_lowercase();
    let (wildcard, name) = match lower.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, lower.as_str()),
    };
    let label = |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    (name.len() <= 253 && name.split('.').all(label)).then(|| DomainPattern { name: name.to_owned(), wildcard })
}

fn cluster_ports(report: &mut Report<'_>, consequence: &'static str, aws: bool, field: &str, rule: &ClusterRule, bad: &mut bool) -> Ports {
    let mut resolved = Vec::new();
    let listed = if aws { rule.ports.len() } else { rule.protocols.len() };
    let (wrong_field, wrong) = if aws { ("protocols", rule.protocols.len()) } else { ("ports", rule.ports.len()) };
    if wrong > 0 {
        let problem = "not a field of this API group".to_owned();
        let remedy = "Use protocols in policy.networking.k8s.io and ports in networking.k8s.aws.";
        report.tell(format!("{field}.{wrong_field}"), problem, consequence, remedy);
        *bad = true;
        return Ports::List(Vec::new());
    }
    if listed == 0 {
        return Ports::Any;
    }
    for (i, protocol) in rule.protocols.iter().enumerate() {
        if !kubernetes_ports(protocol, &mut resolved) {
            *bad = true;
            let remedy = "Give exactly one of tcp, udp, sctp (with destinationPort number or range) and destinationNamedPort.";
            report.tell(format!("{field}.protocols[{i}]"), "no valid protocol and port".to_owned(), consequence, remedy);
        }
    }
    for (i, port) in rule.ports.iter().enumerate() {
        if !aws_ports(port, &mut resolved) {
            *bad = true;
            let remedy = "Give exactly one of portNumber, portRange (start not above end) and namedPort.";
            report.tell(format!("{field}.ports[{i}]"), "no valid port".to_owned(), consequence, remedy);
        }
    }
    Ports::List(resolved)
}

fn kubernetes_ports(entry: &ClusterProtocol, resolved: &mut Vec<PortMatch>) -> bool {
    let transports = [(Protocol::Tcp, &entry.tcp), (Protocol::Udp, &entry.udp), (Protocol::Sctp, &entry.sctp)];
    let mut given = transports.into_iter().filter_map(|(protocol, ports)| ports.as_ref().map(|ports| (protocol, ports)));
    match (given.next(), given.next(), &entry.destination_named_port) {
        (None, None, Some(name)) if !name.is_empty() => resolved.push(PortMatch::Named(None, name.clone())),
        (Some((protocol, ports)), None, None) => match &ports.destination_port {
            None => resolved.push(PortMatch::Range(protocol, 0, u16::MAX)),
            Some(DestinationPort { number: Some(number), range: None }) => resolved.push(PortMatch::Range(protocol, *number, *number)),
            Some(DestinationPort { number: None, range: Some(range) }) if range.start <= range.end => {
                resolved.push(PortMatch::Range(protocol, range.start, range.end));
            }
            Some(_) => return false,
        },
        _ => return false,
    }
    true
}

fn aws_ports(entry: &AwsPort, resolved: &mut Vec<PortMatch>) -> bool {
    match (&entry.port_number, &entry.port_range, &entry.named_port) {
        (Some(number), None, None) if number.port == 0 => resolved.push(PortMatch::Range(number.protocol, 0, u16::MAX)),
        (Some(number), None, None) => resolved.push(PortMatch::Range(number.protocol, number.port, number.port)),
        (None, Some(range), None) if range.start <= range.end => {
            resolved.push(PortMatch::Range(range.protocol, range.start, range.end));
        }
        (None, None, Some(name)) if !name.is_empty() => resolved.push(PortMatch::Named(None, name.clone())),
        _ => return false,
    }
    true
}

/// Every policy of a snapshot, by one source.
pub fn all(cluster: &ClusterState, source: Source, problems: &mut Vec<Problem>) -> Vec<Policy> {
    if source == Source::Endpoints {
        return resolved::all(cluster, problems);
    }
    problems.extend(resolved::unused(cluster));
    let mut policies: Vec<Policy> = cluster.network_policies.values().map(|object| network_policy(object, problems)).collect();
    policies.extend(cluster.cluster_network_policies.values().filter_map(|object| cluster_network_policy(object, problems)));
    policies
}

#[cfg(test)]
mod tests {
    use super::super::model::PacketProtocol;
    use super::super::names::Names;
    use super::super::verdict::{End, Evaluator};
    use super::*;
    use crate::manifests;

    /// The policy is x/a's; x/b is a peer that asks it, 203.0.113.9 one that it asks.
    const PODS: &str = "---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {nodeName: n1, containers: []}, status: {podIP: 192.168.1.1}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x}, spec: {nodeName: n1, containers: []}, status: {podIP: 192.168.1.2}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: x}}
---
";

    struct Judged {
        problems: Vec<String>,
        cluster: ClusterState,
    }

    impl Judged {
        fn of(policy: &str) -> Self {
            let objects = manifests::parse("test.yaml", &format!("{PODS}{policy}")).unwrap();
            let cluster = ClusterState::default().replaced_by(objects);
            let problems = Evaluator::new(&cluster, Source::Policies, Names::default()).problems.iter().map(Problem::to_string).collect();
            Self { problems, cluster }
        }

        /// Exactly one problem, at this field.
        fn tells(&self, field: &str, about: &str) {
            let [problem] = self.problems.as_slice() else { panic!("{about}: {:?}", self.problems) };
            assert!(problem.contains(&format!(": {field}: ")), "{about}: {problem}");
        }

        fn allows(&self, from: &str, to: &str, port: u16) -> bool {
            let (from, to): (End, End) = (from.parse().unwrap(), to.parse().unwrap());
            let evaluator = Evaluator::new(&self.cluster, Source::Policies, Names::default());
            evaluator.verdict(&from, &to, 4, PacketProtocol::from_number(6), port).unwrap().allowed
        }

        fn ingress(&self, port: u16) -> bool {
            self.allows("x/b", "x/a", port)
        }

        fn egress(&self, port: u16) -> bool {
            self.allows("x/a", "203.0.113.9", port)
        }
    }

    #[test]
    fn what_is_wrong_in_a_rule_that_allows_matches_nothing_and_isolation_stays() {
        for (rule, field) in [
            ("from: [{ipBlock: {cidr: 192.168.1.0/24}, podSelector: {}}]", "spec.ingress[0].from[0]"),
            ("from: [{ipBlock: {cidr: 192.168.1.0/24}, namespaceSelector: {}}]", "spec.ingress[0].from[0]"),
            ("from: [{}]", "spec.ingress[0].from[0]"),
            ("from: [{ipBlock: {cidr: 192.168.1.0/33}}]", "spec.ingress[0].from[0].ipBlock.cidr"),
            ("from: [{ipBlock: {cidr: 192.168.1.0/24, except: [192.168.1.9, some]}}]", "spec.ingress[0].from[0].ipBlock.except[1]"),
            ("ports: [{port: 80, endPort: 79}]", "spec.ingress[0].ports[0].endPort"),
            ("ports: [{port: http, endPort: 90}]", "spec.ingress[0].ports[0].endPort"),
            ("ports: [{endPort: 90}]", "spec.ingress[0].ports[0].endPort"),
        ] {
            let judged = Judged::of(&format!(
                "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: p, namespace: x}}, spec: \
                 {{podSelector: {{}}, ingress: [{{{rule}}}, {{ports: [{{port: 81}}]}}]}}}}"
            ));
            judged.tells(field, rule);
            assert!(!judged.ingress(80), "{rule}: opened");
            assert!(judged.ingress(81), "{rule}: the rule beside it");
            assert!(judged.egress(80), "{rule}: the other direction");
        }
    }

    #[test]
    fn a_direction_that_is_none_isolates_both() {
        let judged = Judged::of(
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: \
             {podSelector: {}, policyTypes: [Ingress, egress], egress: [{ports: [{port: 81}]}]}}",
        );
        judged.tells("spec.policyTypes[1]", "egress in small letters");
        assert!(!judged.ingress(80) && !judged.egress(80));
        assert!(judged.egress(81), "the rules of the direction hold");
    }

    fn cluster_policy(group: &str, spec: &str) -> Judged {
        Judged::of(&format!("{{apiVersion: {group}, kind: ClusterNetworkPolicy, metadata: {{name: c}}, spec: {{priority: 5, {spec}}}}}"))
    }

    const KUBERNETES: &str = "policy.networking.k8s.io/v1alpha2";
    const AWS: &str = "networking.k8s.aws/v1alpha1";
    const ONE: &str = "subject: {pods: {podSelector: {matchLabels: {app: a}}}}";

    #[test]
    fn what_is_wrong_in_a_cluster_rule_opens_nothing_whatever_its_action() {
        const ANY: &str = "to: [{networks: [0.0.0.0/0]}]";
        for (group, body, field) in [
            (KUBERNETES, "to: []", "to"),
            (KUBERNETES, "to: [{}]", "to[0]"),
            (KUBERNETES, "to: [{namespaces: {}, networks: [0.0.0.0/0]}]", "to[0]"),
            (KUBERNETES, "to: [{networks: []}]", "to[0]"),
            (KUBERNETES, "to: [{domainNames: []}]", "to[0]"),
            (KUBERNETES, "to: [{networks: [203.0.113.0/33]}]", "to[0].networks[0]"),
            (KUBERNETES, "to: [{domainNames: [exa mple.com]}]", "to[0].domainNames[0]"),
            (KUBERNETES, &format!("{ANY}, protocols: [{{}}]"), "protocols[0]"),
            (KUBERNETES, &format!("{ANY}, protocols: [{{tcp: {{}}, udp: {{}}}}]"), "protocols[0]"),
            (KUBERNETES, &format!("{ANY}, protocols: [{{tcp: {{destinationPort: {{}}}}}}]"), "protocols[0]"),
            (KUBERNETES, &format!("{ANY}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 81, end: 80}}}}}}}}]"), "protocols[0]"),
            (KUBERNETES, &format!("{ANY}, protocols: [{{destinationNamedPort: ''}}]"), "protocols[0]"),
            (KUBERNETES, &format!("{ANY}, ports: [{{portNumber: {{port: 80}}}}]"), "ports"),
            (AWS, &format!("{ANY}, protocols: [{{tcp: {{}}}}]"), "protocols"),
            (AWS, &format!("{ANY}, ports: [{{}}]"), "ports[0]"),
            (AWS, &format!("{ANY}, ports: [{{portNumber: {{port: 80}}, namedPort: http}}]"), "ports[0]"),
            (AWS, &format!("{ANY}, ports: [{{portRange: {{start: 81, end: 80}}}}]"), "ports[0]"),
        ] {
            for action in ["Accept", "Pass", "Deny"] {
                let but =
                    if group == AWS { "ports: [{portNumber: {port: 81}}]" } else { "protocols: [{tcp: {destinationPort: {number: 81}}}]" };
                // Of AWS's kind, Deny comes before Accept wherever it is written: what nothing matches is denied by another tier.
                let rest = if group == AWS { String::new() } else { format!(", {{action: Deny, {ANY}}}") };
                let judged = cluster_policy(
                    group,
                    &format!("tier: Admin, {ONE}, egress: [{{action: {action}, {body}}}, {{action: Accept, {ANY}, {but}}}{rest}]"),
                );
                let about = format!("{action}, {body}");
                judged.tells(&format!("spec.egress[0].{field}"), &about);
                let allows = action == "Accept";
                assert_eq!(judged.egress(80), allows && group == AWS, "{about}: what only the wrong rule could speak of");
                assert_eq!(judged.egress(81), allows, "{about}: a rule that denies or passes closes, one that allows is as if not there");
                assert!(judged.ingress(80), "{about}: the other direction");
            }
        }
    }

    #[test]
    fn a_rule_of_no_known_action_or_with_peers_of_the_other_direction_closes() {
        for (rules, field) in [
            ("egress: [{action: Drop, to: [{networks: [198.51.100.0/24]}]}]", "spec.egress[0].action"),
            ("egress: [{action: Deny, to: [{domainNames: [example.com]}]}]", "spec.egress[0].to[0].domainNames[0]"),
        ] {
            let judged = cluster_policy(KUBERNETES, &format!("tier: Admin, {ONE}, {rules}"));
            judged.tells(field, rules);
            assert!(!judged.egress(80) && judged.ingress(80), "{rules}");
        }
        for peer in ["networks: [198.51.100.0/24]", "nodes: {}", "domainNames: [example.com]"] {
            let rules = format!("ingress: [{{action: Deny, from: [{{{peer}}}]}}]");
            let judged = cluster_policy(KUBERNETES, &format!("tier: Admin, {ONE}, {rules}"));
            judged.tells("spec.ingress[0].from[0]", &rules);
            assert!(!judged.ingress(80) && judged.egress(80), "{rules}");
        }
    }

    #[test]
    fn a_rule_that_denies_nodes_is_told_to_leave_out_the_pods_own() {
        const NODES: &str =
            "{apiVersion: v1, kind: Node, metadata: {name: n}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}";
        for (action, told) in [("Deny", 1), ("Accept", 0), ("Pass", 0)] {
            let judged = cluster_policy(KUBERNETES, &format!("tier: Admin, {ONE}, egress: [{{action: {action}, to: [{{nodes: {{}}}}]}}]"));
            assert_eq!(judged.problems.len(), told, "{action}: {:?}", judged.problems);
            assert!(judged.problems.iter().all(|problem| problem.contains(": spec.egress[0].to[0].nodes: ")), "{:?}", judged.problems);
        }
        let judged = Judged::of(&format!(
            "{NODES}\n---\n{{apiVersion: {KUBERNETES}, kind: ClusterNetworkPolicy, metadata: {{name: c}}, spec: {{priority: 5, tier: Admin, \
             {ONE}, egress: [{{action: Deny, to: [{{nodes: {{}}}}]}}]}}}}"
        ));
        assert!(!judged.allows("x/a", "192.0.2.1", 80), "the rule holds for other nodes");
    }

    #[test]
    fn a_cluster_policy_of_no_known_tier_or_subject_is_told_and_not_applied() {
        const RULES: &str = "ingress: [{action: Deny, from: [{namespaces: {}}]}]";
        for (spec, field) in [
            ("tier: admin, subject: {namespaces: {}}", "spec.tier"),
            ("tier: Admin, subject: {}", "spec.subject"),
            ("tier: Admin, subject: {namespaces: {}, pods: {}}", "spec.subject"),
        ] {
            let judged = cluster_policy(KUBERNETES, &format!("{spec}, {RULES}"));
            judged.tells(field, spec);
            assert!(judged.problems[0].contains("the policy is not applied"), "{spec}");
            assert!(judged.ingress(80), "{spec}");
        }
    }

    /// AWS's kind: a NetworkPolicy that may name what it reaches.
    #[test]
    fn an_application_network_policy_isolates_and_opens_names() {
        let of = |spec: &str| {
            Judged::of(&format!(
                "{{apiVersion: networking.k8s.aws/v1alpha1, kind: ApplicationNetworkPolicy, metadata: {{name: p, namespace: x}}, spec: {{{spec}}}}}"
            ))
        };
        let isolated = of("podSelector: {}, policyTypes: [Egress]");
        assert!(!isolated.egress(80) && isolated.allows("203.0.113.9", "x/a", 80));
        assert!(isolated.problems.is_empty(), "{:?}", isolated.problems);
        let named = of(
            "podSelector: {}, policyTypes: [Egress], egress: [{to: [{domainNames: ['*.example.com', api.cdn.net]}], ports: [{port: 443}]}, \
             {to: [{ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: 81}]}]",
        );
        let mut names = Names::default();
        names.set("www.example.com", "198.51.100.7".parse().unwrap()).unwrap();
        names.set("api.cdn.net", "198.51.100.8".parse().unwrap()).unwrap();
        let evaluator = Evaluator::new(&named.cluster, Source::Policies, names);
        let to = |address: &str, port| {
            evaluator.verdict(&"x/a".parse().unwrap(), &address.parse().unwrap(), 4, PacketProtocol::from_number(6), port).unwrap().allowed
        };
        assert!(to("198.51.100.7", 443) && to("198.51.100.8", 443) && to("203.0.113.9", 81));
        assert!(!to("198.51.100.7", 80) && !to("198.51.100.9", 443) && !to("203.0.113.9", 443));
        for (rules, field) in [
            ("egress: [{to: [{domainNames: [exa mple.com]}]}]", "spec.egress[0].to[0].domainNames[0]"),
            ("egress: [{to: [{domainNames: []}]}]", "spec.egress[0].to[0]"),
            ("egress: [{to: [{domainNames: [example.com], ipBlock: {cidr: 0.0.0.0/0}}]}]", "spec.egress[0].to[0]"),
            ("ingress: [{from: [{domainNames: [example.com]}]}]", "spec.ingress[0].from[0]"),
        ] {
            let judged = of(&format!("podSelector: {{}}, policyTypes: [Ingress, Egress], {rules}"));
            judged.tells(field, rules);
            assert!(!judged.egress(80) && !judged.ingress(80), "{rules}");
        }
    }

    /// One name in both groups: two policies.
    #[test]
    fn policies_of_two_groups_with_one_name_are_two() {
        let judged = Judged::of(
            "{apiVersion: networking.k8s.aws/v1alpha1, kind: ApplicationNetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {}, \
             policyTypes: [Egress]}}\n---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {}, \
             egress: [{ports: [{port: 81}]}]}}",
        );
        assert!(judged.egress(81) && !judged.egress(80) && !judged.ingress(80));
    }

    /// As AWS's controller would resolve it.
    #[test]
    fn rules_for_what_comes_in_may_name_networks_in_awss_kind_and_no_other() {
        let then = "{action: Accept, from: [{namespaces: {}}], ports: [{portNumber: {port: 81}}]}";
        let parts = |action: &str| {
            format!(
                "{PODS}{{apiVersion: networking.k8s.aws/v1alpha1, kind: ClusterPolicyEndpoint, metadata: {{name: c-1}}, spec: {{policyRef: {{name: c}}, tier: Admin, priority: 5, \
                 podSelectorEndpoints: [{{name: a, namespace: x}}], ingress: [{{action: {action}, cidr: 192.168.1.2/32}}, \
                 {{action: Accept, cidr: 192.168.1.2/32, ports: [{{port: 81}}]}}]}}}}\n---\n{ISOLATES}"
            )
        };
        const ISOLATES: &str = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {matchLabels: {app: a}}}}";
        const ISOLATES_PART: &str = "{apiVersion: networking.k8s.aws/v1alpha1, kind: PolicyEndpoint, metadata: {name: p-1, namespace: x}, spec: {policyRef: {name: p}, \
             podIsolation: [Ingress], podSelectorEndpoints: [{name: a, namespace: x}]}}";
        for (action, allowed) in [("Accept", [true, true]), ("Deny", [false, false]), ("Pass", [false, true])] {
            let rules = format!("ingress: [{{action: {action}, from: [{{networks: [192.168.1.2/32]}}]}}, {then}]");
            let policy = |group| {
                Judged::of(&format!(
                    "{{apiVersion: {group}, kind: ClusterNetworkPolicy, metadata: {{name: c}}, spec: {{priority: 5, tier: Admin, {ONE}, {rules}}}}}\n---\n{ISOLATES}"
                ))
            };
            let judged = policy(AWS);
            assert!(judged.problems.is_empty(), "{action}: {:?}", judged.problems);
            assert_eq!([judged.ingress(80), judged.ingress(81)], allowed, "{action}");
            let text = parts(action).replace(ISOLATES, ISOLATES_PART);
            let cluster = ClusterState::default().replaced_by(manifests::parse("test.yaml", &text).unwrap());
            let resolved = Evaluator::new(&cluster, Source::Endpoints, Names::default());
            let from_b = |port| {
                let (from, to): (End, End) = ("x/b".parse().unwrap(), "x/a".parse().unwrap());
                resolved.verdict(&from, &to, 4, PacketProtocol::from_number(6), port).unwrap().allowed
            };
            assert_eq!([from_b(80), from_b(81)], allowed, "{action}, resolved");
            assert!(policy(KUBERNETES).problems[0].contains(": spec.ingress[0].from[0]: "), "{action}");
        }
    }

    #[test]
    fn of_many_problems_of_one_policy_some_are_told_and_the_rest_are_counted() {
        let peers = "{ipBlock: {cidr: nonsense}}, ".repeat(40_000);
        let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: \
             {podSelector: {}, ingress: [{from: [PEERS]}]}}";
        let judged = Judged::of(&policy.replace("PEERS", &peers));
        assert_eq!(judged.problems.len(), MOST_PROBLEMS + 1);
        assert!(judged.problems[0].contains("spec.ingress[0].from[0].ipBlock.cidr"), "{}", judged.problems[0]);
        assert!(judged.problems[MOST_PROBLEMS].contains("39980 more"), "{}", judged.problems[MOST_PROBLEMS]);
        assert!(!judged.ingress(80));
    }

    #[test]
    fn a_good_peer_beside_a_bad_one_still_counts_where_it_allows() {
        let rules =
            "egress: [{action: Accept, to: [{networks: [203.0.113.0/24, nonsense]}]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]";
        let judged = cluster_policy(KUBERNETES, &format!("tier: Admin, {ONE}, {rules}"));
        judged.tells("spec.egress[0].to[0].networks[1]", rules);
        assert!(judged.egress(80) && !judged.allows("x/a", "198.51.100.1", 80));
    }
}
