//! From the objects that AWS's controller writes (PolicyEndpoint, ClusterPolicyEndpoint) to [`Policy`]: the parts of one
//! policy put together, addresses and ports taken as they were resolved there.
//!
//! Differs from AWS's agent on purpose: rules of a direction that `podIsolation` does not list have no effect, as in the
//! policy that was resolved.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::model::{
    Action, Direction, NamespaceMatch, Peer, Peers, PodMatch, Policy, PolicyName, PortMatch, Ports, Problem, Rule, Subject, Tier,
};
use super::objects::{AWS_GROUP, ClusterPolicyEndpoint, EndpointPort, EndpointRule, PodEndpoint, PolicyEndpoint};
use super::resolve::{AWS_CLUSTER_NETWORK_POLICY, NETWORK_POLICY, Report, cidr, domain, pods_of, tier};
use crate::cluster::ClusterState;
use crate::ids::PodName;
use crate::objects::{IntOrString, LabelSelector};

/// The NetworkPolicy that an object is a part of.
pub(super) fn policy_of(object: &PolicyEndpoint) -> PodName {
    let reference = &object.spec.policy_ref;
    let namespace = if reference.namespace.is_empty() { &object.metadata.namespace } else { &reference.namespace };
    PodName::new(namespace.clone(), reference.name.clone())
}

/// The named policies as the objects of the snapshot say; `None` for those that have no object any more.
pub(super) fn network_policies(cluster: &ClusterState, names: &BTreeSet<PodName>) -> Vec<(PodName, Option<Policy>, Vec<Problem>)> {
    if names.is_empty() {
        return Vec::new();
    }
    let mut parts: BTreeMap<PodName, Vec<(&PodName, &PolicyEndpoint)>> = BTreeMap::new();
    for (name, object) in &cluster.policy_endpoints {
        parts.entry(policy_of(object)).or_default().push((name, object));
    }
    let resolve = |name: &PodName| {
        let mut problems = Vec::new();
        let policy = parts.get(name).map(|parts| network_policy(name, parts, &mut problems));
        (name.clone(), policy, problems)
    };
    names.iter().map(resolve).collect()
}

/// The named cluster policies as the objects of the snapshot say; `None` for those that have none any more or cannot be applied.
pub(super) fn cluster_policies(cluster: &ClusterState, names: &BTreeSet<String>) -> Vec<(String, Option<Policy>, Vec<Problem>)> {
    if names.is_empty() {
        return Vec::new();
    }
    let mut parts: BTreeMap<&str, Vec<(&String, &ClusterPolicyEndpoint)>> = BTreeMap::new();
    for (name, object) in &cluster.cluster_policy_endpoints {
        parts.entry(&object.spec.policy_ref.name).or_default().push((name, object));
    }
    let resolve = |name: &String| {
        let mut problems = Vec::new();
        let policy = parts.get(name.as_str()).and_then(|parts| cluster_policy(name, parts, &mut problems));
        (name.clone(), policy, problems)
    };
    names.iter().map(resolve).collect()
}

/// Every policy of the snapshot.
pub(super) fn all(cluster: &ClusterState, problems: &mut Vec<Problem>) -> Vec<Policy> {
    let names = cluster.policy_endpoints.values().map(|object| policy_of(object)).collect();
    let cluster_names = cluster.cluster_policy_endpoints.values().map(|object| object.spec.policy_ref.name.clone()).collect();
    let mut policies = Vec::new();
    let network = network_policies(cluster, &names).into_iter().map(|(_, policy, told)| (policy, told));
    let clusterwide = cluster_policies(cluster, &cluster_names).into_iter().map(|(_, policy, told)| (policy, told));
    for (policy, told) in network.chain(clusterwide) {
        policies.extend(policy);
        problems.extend(told);
    }
    policies
}

/// Objects of this source that say what no policy object says, while policy objects are what counts.
pub(super) fn unused(cluster: &ClusterState) -> Vec<Problem> {
    const CONSEQUENCE: &str = "it is not enforced";
    const REMEDY: &str = "Set NETWORK_POLICY_SOURCE=policy-endpoints where AWS's controller resolves policies, or write a policy object.";
    let problem = |kind, name: &PodName, of: String| Problem {
        policy: PolicyName { kind, namespace: name.namespace.clone(), name: name.name.clone() },
        field: "spec.policyRef".to_owned(),
        problem: format!("{of} is not there, and policies are resolved from their own objects"),
        consequence: CONSEQUENCE,
        remedy: REMEDY,
    };
    let namespaced = cluster.policy_endpoints.iter().map(|(name, object)| (name, policy_of(object)));
    let of_aws = |policy: &PodName| PodName::new(policy.namespace.clone(), format!("{AWS_GROUP}/{}", policy.name));
    let is_there = |policy: &PodName| [policy.clone(), of_aws(policy)].iter().any(|name| cluster.network_policies.contains_key(name));
    let namespaced = namespaced.filter(|(_, policy)| !is_there(policy));
    let mut problems: Vec<Problem> =
        namespaced.map(|(name, policy)| problem("PolicyEndpoint", name, format!("NetworkPolicy {policy}"))).collect();
    for (name, object) in &cluster.cluster_policy_endpoints {
        let policy = &object.spec.policy_ref.name;
        if !cluster.cluster_network_policies.values().any(|present| present.is_aws() && present.metadata.name == *policy) {
            let name = PodName::new("", name.clone());
            problems.push(problem("ClusterPolicyEndpoint", &name, format!("ClusterNetworkPolicy {policy}")));
        }
    }
    problems
}

fn network_policy(name: &PodName, parts: &[(&PodName, &PolicyEndpoint)], problems: &mut Vec<Problem>) -> Policy {
    let policy = PolicyName { kind: NETWORK_POLICY, namespace: name.namespace.clone(), name: name.name.clone() };
    let mut report = Report::new(&policy, problems);
    let listed: BTreeSet<&str> = parts.iter().flat_map(|(_, part)| part.spec.pod_isolation.iter().map(String::as_str)).collect();
    for unknown in listed.iter().filter(|word| !matches!(**word, "Ingress" | "Egress")) {
        let problem = format!("{unknown:?} is no direction");
        report.tell("spec.podIsolation".to_owned(), problem, "both directions are isolated", "Write Ingress or Egress.");
    }
    let unclear = listed.is_empty() || listed.iter().any(|word| !matches!(*word, "Ingress" | "Egress"));
    let mut rules = |direction: Direction, rules_of: fn(&PolicyEndpoint) -> &[EndpointRule], is_listed: bool| {
        let all = parts.iter().flat_map(|(part, object)| rules_of(object).iter().map(move |rule| (part, rule)));
        is_listed.then(|| {
            all.enumerate().map(|(i, (part, rule))| endpoint_rule(&mut report, &part.name, direction, i, rule, Action::Allow)).collect()
        })
    };
    let ingress = rules(Direction::Ingress, |object| &object.spec.ingress, unclear || listed.contains("Ingress"));
    let has_egress = parts.iter().any(|(_, object)| !object.spec.egress.is_empty());
    let egress = rules(
        Direction::Egress,
        |object| &object.spec.egress,
        (unclear && (has_egress || !listed.is_empty())) || listed.contains("Egress"),
    );
    let selected = |pods: &LabelSelector| PodMatch { namespaces: NamespaceMatch::Name(name.namespace.clone()), pods: pods.clone() };
    let subject = subject(
        parts.iter().flat_map(|(_, object)| &object.spec.pod_selector_endpoints),
        parts.iter().filter_map(|(_, object)| object.spec.pod_selector.as_ref().map(selected)),
    );
    Policy { name: policy.clone(), tier: Tier::Namespace, priority: 0, subject, ingress, egress }
}

fn cluster_policy(name: &str, parts: &[(&String, &ClusterPolicyEndpoint)], problems: &mut Vec<Problem>) -> Option<Policy> {
    let policy = PolicyName { kind: AWS_CLUSTER_NETWORK_POLICY, namespace: String::new(), name: name.to_owned() };
    let mut report = Report::new(&policy, problems);
    let (_, first) = parts.first()?;
    let tier = tier(&mut report, &first.spec.tier)?;
    let mut rules = |direction: Direction, rules_of: fn(&ClusterPolicyEndpoint) -> &[EndpointRule]| {
        let all = parts.iter().flat_map(|(part, object)| rules_of(object).iter().map(move |rule| (part, rule)));
        let mut resolved: Vec<Rule> = Vec::new();
        for (index, (part, rule)) in all.enumerate() {
            let action = match rule.action.as_str() {
                "Accept" | "Allow" => Action::Allow,
                "Deny" => Action::Deny,
                "Pass" => Action::Pass,
                other => {
                    let field = format!("{part} spec.{direction}[{index}].action");
                    report.tell(field, format!("{other:?} is no action"), CLOSED, "Write Accept, Deny or Pass.");
                    resolved.push(closed(index));
                    continue;
                }
            };
            resolved.push(endpoint_rule(&mut report, part, direction, index, rule, action));
        }
        resolved.sort_by_key(|rule| rule.action);
        (!resolved.is_empty()).then_some(resolved)
    };
    let ingress = rules(Direction::Ingress, |object| &object.spec.ingress);
    let egress = rules(Direction::Egress, |object| &object.spec.egress);
    let subject = subject(
        parts.iter().flat_map(|(_, object)| &object.spec.pod_selector_endpoints),
        parts.iter().filter_map(|(_, object)| pods_of(object.spec.subject.as_ref()?)),
    );
    Some(Policy { name: policy.clone(), tier, priority: first.spec.priority, subject, ingress, egress })
}

const NOTHING: &str = "it matches nothing";
const CLOSED: &str = "the rule denies everything in its direction";

fn closed(index: usize) -> Rule {
    Rule { name: String::new(), index, action: Action::Deny, peers: Peers::Any, ports: Ports::Any }
}

/// AWS's controller lists a pod when it has an address: one that starts is known by the selectors.
fn subject<'a>(pods: impl Iterator<Item = &'a PodEndpoint>, selectors: impl Iterator<Item = PodMatch>) -> Subject {
    let mut names: Vec<PodName> = pods.map(|pod| PodName::new(pod.namespace.clone(), pod.name.clone())).collect();
    names.sort_unstable();
    names.dedup();
    let mut selectors: Vec<PodMatch> = selectors.collect();
    selectors.sort_unstable();
    selectors.dedup();
    Subject::Listed(names, selectors)
}

fn endpoint_rule(report: &mut Report<'_>, part: &str, direction: Direction, index: usize, rule: &EndpointRule, action: Action) -> Rule {
    let field = format!("{part} spec.{direction}[{index}]");
    let consequence = if action == Action::Allow { NOTHING } else { CLOSED };
    let mut bad = false;
    let mut peers = Vec::new();
    match (rule.cidr.as_str(), rule.domain_name.as_str()) {
        ("", "") | (_, "") => match block(rule) {
            Some(peer) => peers.push(peer),
            None => {
                bad = true;
                let problem = format!("{:?} except {:?} is no CIDR", rule.cidr, rule.except);
                report.tell(format!("{field}.cidr"), problem, consequence, "Write an address and a prefix length, such as 10.0.0.0/8.");
            }
        },
        ("", name) => match domain(name).filter(|_| direction == Direction::Egress && action != Action::Deny) {
            Some(pattern) => peers.push(Peer::Domain(pattern)),
            None => {
                bad = true;
                let remedy = "Write a name such as example.com or *.example.com, in an egress rule that accepts.";
                report.tell(format!("{field}.domainName"), format!("{name:?} cannot be a peer here"), consequence, remedy);
            }
        },
        (_, name) => {
            bad = true;
            let problem = format!("cidr together with domainName {name:?}");
            report.tell(field.clone(), problem, consequence, "Write two entries.");
        }
    }
    let mut list = Vec::new();
    for (i, port) in rule.ports.iter().enumerate() {
        if let Some(port) = port_match(port) {
            list.push(port);
        } else {
            bad = true;
            let remedy = "Give a port, or a range whose endPort is not less than its port.";
            report.tell(format!("{field}.ports[{i}]"), "no valid port".to_owned(), consequence, remedy);
        }
    }
    if bad && action != Action::Allow {
        return closed(index);
    }
    let ports = if rule.ports.is_empty() { Ports::Any } else { Ports::List(list) };
    Rule { name: String::new(), index, action, peers: Peers::List(Arc::from(peers)), ports }
}

fn block(rule: &EndpointRule) -> Option<Peer> {
    let net = cidr(&rule.cidr)?;
    let mut except = rule.except.iter().map(|text| cidr(text)).collect::<Option<Vec<IpNet>>>()?;
    except.sort_unstable();
    except.dedup();
    Some(Peer::Block { net, except })
}

fn port_match(port: &EndpointPort) -> Option<PortMatch> {
    let protocol = port.protocol.unwrap_or_default();
    match (&port.port, port.end_port) {
        (None | Some(IntOrString::Int(0)), None) => Some(PortMatch::Range(protocol, 0, u16::MAX)),
        (Some(IntOrString::Int(first)), last) => {
            let last = last.filter(|last| *last != 0).unwrap_or(*first);
            (last >= *first).then_some(PortMatch::Range(protocol, *first, last))
        }
        (Some(IntOrString::Str(name)), None) => Some(PortMatch::Named(Some(protocol), name.clone())),
        (None | Some(IntOrString::Str(_)), Some(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::Source;
    use super::super::model::PacketProtocol;
    use super::super::names::Names;
    use super::super::verdict::{End, Evaluator};
    use super::*;
    use crate::manifests;

    const PODS: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: x}
spec: {nodeName: n1, containers: []}
status: {podIP: 192.168.1.1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: x}
spec: {nodeName: n1, containers: []}
status: {podIP: 192.168.1.2}
";
    /// One policy in two parts: the second has the pod and a further peer, and an egress rule that no direction lists.
    const PARTS: &str = r#"
---
apiVersion: networking.k8s.aws/v1alpha1
kind: PolicyEndpoint
metadata: {name: p-1, namespace: x}
spec:
  policyRef: {name: p, namespace: x}
  podIsolation: [Ingress]
  ingress:
  - {cidr: 10.0.0.0/8, except: [10.1.0.0/16], ports: [{port: 80, protocol: TCP}]}
---
apiVersion: networking.k8s.aws/v1alpha1
kind: PolicyEndpoint
metadata: {name: p-2, namespace: x}
spec:
  policyRef: {name: p, namespace: x}
  podIsolation: [Ingress]
  podSelectorEndpoints: [{hostIP: 10.0.0.1, podIP: 192.168.1.1, name: a, namespace: x}]
  ingress:
  - {cidr: 192.168.1.2, ports: [{protocol: UDP}, {port: 90, endPort: 92}]}
  egress:
  - {cidr: 203.0.113.0/24}
"#;

    fn cluster(texts: &[&str]) -> ClusterState {
        let objects = texts.iter().flat_map(|text| manifests::parse("test.yaml", text).unwrap());
        ClusterState::default().replaced_by(objects)
    }

    fn allowed(cluster: &ClusterState, source: Source, from: &str, to: &str, protocol: u8, port: u16) -> bool {
        let evaluator = Evaluator::new(cluster, source, Names::default());
        let (from, to): (End, End) = (from.parse().unwrap(), to.parse().unwrap());
        evaluator.verdict(&from, &to, 4, PacketProtocol::from_number(protocol), port).unwrap().allowed
    }

    #[test]
    fn the_parts_of_a_policy_are_one_policy() {
        let cluster = cluster(&[PODS, PARTS]);
        let of_parts = |from: &str, protocol, port| allowed(&cluster, Source::Endpoints, from, "x/a", protocol, port);
        assert!(of_parts("10.9.9.9", 6, 80));
        let odd = PARTS.replace("hostIP: 10.0.0.1, podIP: 192.168.1.1", "hostIP: node1, podIP: ''");
        assert!(!allowed(&self::cluster(&[PODS, &odd]), Source::Endpoints, "10.1.9.9", "x/a", 6, 80), "addresses are not looked at");
        assert!(!of_parts("10.1.9.9", 6, 80), "excepted");
        assert!(!of_parts("10.9.9.9", 6, 81));
        assert!(of_parts("x/b", 17, 1_234) && of_parts("x/b", 6, 91) && !of_parts("x/b", 6, 93));
        assert!(!of_parts("203.0.113.5", 6, 80), "isolated");
        assert!(allowed(&cluster, Source::Endpoints, "10.1.9.9", "x/b", 6, 1), "a pod that no part lists");
        assert!(allowed(&cluster, Source::Endpoints, "x/a", "8.8.8.8", 6, 1), "rules of a direction that is not listed");
        assert!(of_parts("x/a", 6, 1), "itself");
    }

    #[test]
    fn the_other_source_says_what_it_does_not_enforce() {
        let cluster = cluster(&[PODS, PARTS]);
        let native = Evaluator::new(&cluster, Source::Policies, Names::default());
        let told: Vec<String> = native.problems.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("PolicyEndpoint x/p-1") && told[0].contains("NETWORK_POLICY_SOURCE"), "{told:?}");
        assert!(allowed(&cluster, Source::Policies, "203.0.113.5", "x/a", 6, 80));
    }

    #[test]
    fn cluster_parts_go_by_tier_and_action_and_bad_ones_close() {
        let part = |rules: &str| {
            format!(
                "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: ClusterPolicyEndpoint\nmetadata: {{name: c-1}}\nspec:\n  policyRef: {{name: c}}\n  \
                 tier: Admin\n  priority: 5\n  podSelectorEndpoints: [{{name: a, namespace: x, podIP: 192.168.1.1, hostIP: 10.0.0.1}}]\n  egress:\n{rules}"
            )
        };
        let rules = "  - {cidr: 0.0.0.0/0, action: Accept}\n  - {cidr: 203.0.113.0/24, action: Deny, ports: [{port: 443}]}\n";
        let state = cluster(&[PODS, &part(rules)]);
        assert!(!allowed(&state, Source::Endpoints, "x/a", "203.0.113.9", 6, 443), "Deny before Accept");
        assert!(allowed(&state, Source::Endpoints, "x/a", "203.0.113.9", 6, 80));
        let state = cluster(&[PODS, &part("  - {cidr: nonsense, action: Deny}\n")]);
        assert!(!allowed(&state, Source::Endpoints, "x/a", "203.0.113.9", 6, 80));
        assert_eq!(Evaluator::new(&state, Source::Endpoints, Names::default()).problems.len(), 1);
    }

    #[test]
    fn a_name_is_a_peer_of_egress_rules_that_accept() {
        let mut names = Names::default();
        names.set("www.example.com", "203.0.113.9".parse().unwrap()).unwrap();
        let part = "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: PolicyEndpoint\nmetadata: {name: p-1, namespace: x}\nspec:\n  policyRef: {name: p}\n  \
                    podIsolation: [Egress]\n  podSelectorEndpoints: [{name: a, namespace: x}]\n  egress: [{domainName: \"*.example.com\", ports: [{port: 443}]}]\n";
        let state = cluster(&[PODS, part]);
        let evaluator = Evaluator::new(&state, Source::Endpoints, names);
        assert!(evaluator.is_by_name());
        let to = |address: &str, port| {
            evaluator.verdict(&"x/a".parse().unwrap(), &address.parse().unwrap(), 4, PacketProtocol::from_number(6), port).unwrap().allowed
        };
        assert!(to("203.0.113.9", 443) && !to("203.0.113.9", 80) && !to("203.0.113.8", 443));
    }

    /// The fields that are told.
    fn told(cluster: &ClusterState) -> Vec<String> {
        Evaluator::new(cluster, Source::Endpoints, Names::default()).problems.iter().map(|problem| problem.field.clone()).collect()
    }

    #[test]
    fn what_is_wrong_in_a_part_opens_nothing() {
        for (rule, field) in [
            ("{cidr: 203.0.113.0/33}", "cidr"),
            ("{cidr: 203.0.113.0/24, except: [some]}", "cidr"),
            ("{ports: [{port: 80}]}", "cidr"),
            ("{domainName: exa mple.com}", "domainName"),
            ("{cidr: 0.0.0.0/0, domainName: example.com}", ""),
            ("{cidr: 0.0.0.0/0, ports: [{port: 80, endPort: 79}]}", "ports[0]"),
            ("{cidr: 0.0.0.0/0, ports: [{port: http, endPort: 90}]}", "ports[0]"),
            ("{cidr: 0.0.0.0/0, ports: [{endPort: 90}]}", "ports[0]"),
        ] {
            let field = |part: &str| format!("{part} spec.egress[0]{}{field}", if field.is_empty() { "" } else { "." });
            let part = format!(
                "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: PolicyEndpoint\nmetadata: {{name: p-1, namespace: x}}\nspec: {{policyRef: {{name: p}}, \
                 podIsolation: [Egress], podSelectorEndpoints: [{{name: a, namespace: x}}], egress: [{rule}, {{cidr: 0.0.0.0/0, ports: [{{port: 81}}]}}]}}\n"
            );
            let state = cluster(&[PODS, &part]);
            assert_eq!(told(&state), [field("p-1")], "{rule}");
            let egress = |state: &ClusterState, port| allowed(state, Source::Endpoints, "x/a", "203.0.113.9", 6, port);
            assert!(!egress(&state, 80) && egress(&state, 81), "{rule}");
            for action in ["Deny", "Pass", "Drop"] {
                let rule = format!("{}, action: {action}}}", rule.strip_suffix('}').unwrap());
                let part = format!(
                    "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: ClusterPolicyEndpoint\nmetadata: {{name: c-1}}\nspec: {{policyRef: {{name: c}}, tier: Admin, \
                     podSelectorEndpoints: [{{name: a, namespace: x}}], egress: [{rule}, {{cidr: 0.0.0.0/0, action: Accept}}]}}\n"
                );
                let state = cluster(&[PODS, &part]);
                let field = if action == "Drop" { "c-1 spec.egress[0].action".to_owned() } else { field("c-1") };
                assert_eq!(told(&state), [field], "{rule}");
                assert!(!egress(&state, 80) && !egress(&state, 81), "{rule}: it closes the direction");
                assert!(allowed(&state, Source::Endpoints, "x/b", "x/a", 6, 80), "{rule}: the other direction");
            }
        }
    }

    #[test]
    fn a_direction_that_is_none_or_missing_isolates() {
        let part = |isolation: &str, rules: &str| {
            format!(
                "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: PolicyEndpoint\nmetadata: {{name: p-1, namespace: x}}\nspec: {{policyRef: {{name: p}}, \
                 podIsolation: {isolation}, podSelectorEndpoints: [{{name: a, namespace: x}}]{rules}}}\n"
            )
        };
        for (isolation, rules, problems, ingress, egress) in [
            ("[ingress]", "", 1, false, false),
            ("[Ingress]", "", 0, false, true),
            ("[]", "", 0, false, true),
            ("[]", ", egress: [{cidr: 10.0.0.0/8}]", 0, false, false),
        ] {
            let state = cluster(&[PODS, &part(isolation, rules)]);
            assert_eq!(told(&state).len(), problems, "{isolation}{rules}");
            assert_eq!(allowed(&state, Source::Endpoints, "x/b", "x/a", 6, 80), ingress, "{isolation}{rules}");
            assert_eq!(allowed(&state, Source::Endpoints, "x/a", "8.8.8.8", 6, 80), egress, "{isolation}{rules}");
        }
    }
}
