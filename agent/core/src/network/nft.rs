//! Source NAT and connection marks as one nft table, replaced in one transaction.
//!
//! Every rule carries the table's fingerprint as its comment: whether the table in the kernel is the wanted one is seen
//! from the comments, whatever spelling this or that version of `nft` lists the rules in; a rule that was
//! deleted, added or edited by hand breaks the pattern.
//!
//! | chain | hook, priority | does |
//! |---|---|---|
//! | `mark-early` | prerouting, -150 (before kube-proxy's DNAT) | marks connections to node ports on the primary ENI; gives packets of pods their connection's mark |
//! | `mark-egress` | prerouting, -90 (after DNAT) | marks new connections of pods to outside the VPC |
//! | `source-nat` | nat postrouting, 110 (after kube-proxy's masquerade) | source NAT to the node's primary address |
//! | `egress-nat` | nat postrouting, 105 | source NAT of the pods' second address family to the node's address of that family |
//! | `egress-guard` | forward, 0 | refuses connections to those addresses |
//!
//! The last two are in the family that they are about; all others are IPv4's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};

use super::host::{Egress, HostPlan, Randomize, Snat};
use super::ops::NftObserved;

/// Our table's name, in the families `ip` and `ip6`.
pub const TABLE: &str = "stanchion";
/// Chains of the pods' second address family.
const EGRESS_CHAINS: [&str; 2] = ["egress-nat", "egress-guard"];

/// The wanted table: chains with their rules, as `nft -j` spells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// `ip` or `ip6`.
    family: &'static str,
    /// Empty: no table is wanted.
    chains: Vec<Chain>,
    fingerprint: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    name: &'static str,
    kind: &'static str,
    hook: &'static str,
    priority: i32,
    rules: Vec<Value>,
}

// === impl Ruleset ===

impl Ruleset {
    /// What the plan wants of IPv6.
    pub fn of_ipv6(plan: &HostPlan) -> Self {
        let egress = plan.egress.as_ref().filter(|egress| egress.to.is_ipv6());
        Self::new("ip6", egress.map(egress_chains).unwrap_or_default())
    }

    /// What the plan wants of IPv4; `primary_if` is the name of the primary ENI's interface, if it is known.
    pub fn of(plan: &HostPlan, primary_if: Option<&str>) -> Self {
        let mut chains = Vec::new();
        if plan.uses_mark() {
            let mut early = Vec::new();
            if let (true, Some(primary)) = (plan.node_port_support, primary_if) {
                early.push(json!([is("iifname", primary), to_local(&["daddr", "iif"]), set_connection_mark(plan.mark)]));
            }
            early.push(json!([is("iifname", &format!("{}*", plan.veth_prefix)), marked(plan.mark), set_packet_mark(plan.mark)]));
            if plan.node_port_support {
                early.push(json!([is("iifname", "vlan*"), marked(plan.mark), set_packet_mark(plan.mark)]));
            }
            chains.push(Chain { name: "mark-early", kind: "filter", hook: "prerouting", priority: -150, rules: early });
        }
        if let (false, Some(snat)) = (plan.ipv6, &plan.snat) {
            let mut egress = vec![json!([not("iifname", &format!("{}*", plan.veth_prefix)), {"return": null}])];
            // A later packet of the connection has its mark already, or shall not get one in mid-flow.
            egress.push(json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related", "invalid"]}}, {"return": null}]));
            egress.push(json!([to_local(&["daddr"]), {"return": null}]));
            egress.extend(bypass_rule(snat));
            egress.push(json!([set_connection_mark(plan.mark), set_packet_mark(plan.mark)]));
            chains.push(Chain { name: "mark-egress", kind: "filter", hook: "prerouting", priority: -90, rules: egress });

            let mut rules = Vec::new();
            rules.extend(bypass_rule(snat));
            rules.push(json!([is("oifname", "vlan*"), {"return": null}]));
            rules.push(json!([to_local(&["daddr"]), {"return": null}]));
            rules.push(json!([snat_statement(snat.to.into(), snat.randomize)]));
            chains.push(Chain { name: "source-nat", kind: "nat", hook: "postrouting", priority: 110, rules });
        }
        chains.extend(plan.egress.as_ref().filter(|egress| egress.to.is_ipv4()).into_iter().flat_map(egress_chains));
        Self::new("ip", chains)
    }

    fn new(family: &'static str, chains: Vec<Chain>) -> Self {
        let mut text = String::new();
        for Chain { name, kind, hook, priority, rules } in &chains {
            text.push_str(&format!("{name} {kind} {hook} {priority}\n"));
            for rule in rules {
                text.push_str(&format!("{rule}\n"));
            }
        }
        let digest = Sha1::digest(text.as_bytes());
        let fingerprint = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self { family, chains, fingerprint }
    }

    /// Whether a table is wanted at all.
    pub fn is_wanted(&self) -> bool {
        !self.chains.is_empty()
    }

    /// Whether the kernel has exactly this.
    pub fn is_in_force(&self, observed: Option<&NftObserved>) -> bool {
        match observed {
            None => self.chains.is_empty(),
            Some(observed) => !self.chains.is_empty() && observed.chains == self.comments(),
        }
    }

    /// The transaction that makes it so: the old table goes and the new one comes in the same instant. Connections keep
    /// their translation and their marks, which live in conntrack.
    pub fn transaction(&self) -> Vec<Value> {
        let table = json!({"family": self.family, "name": TABLE});
        // Adding first makes the deletion succeed whether or not it existed.
        let mut commands = vec![json!({"add": {"table": table}}), json!({"delete": {"table": table}})];
        if self.chains.is_empty() {
            return commands;
        }
        commands.push(json!({"add": {"table": table}}));
        for Chain { name, kind, hook, priority, .. } in &self.chains {
            commands.push(json!({"add": {"chain": {
                "family": self.family, "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
            }}}));
        }
        for chain in &self.chains {
            for (number, expr) in chain.rules.iter().enumerate() {
                commands.push(json!({"add": {"rule": {
                    "family": self.family, "table": TABLE, "chain": chain.name, "expr": expr, "comment": self.comment(number),
                }}}));
            }
        }
        commands
    }

    fn comment(&self, number: usize) -> String {
        format!("{} {number}", self.fingerprint)
    }

    fn comments(&self) -> BTreeMap<String, Vec<String>> {
        self.chains.iter().map(|chain| (chain.name.to_owned(), (0..chain.rules.len()).map(|n| self.comment(n)).collect())).collect()
    }
}

/// The document for `nft -j -f -` with these commands.
pub fn document(commands: &[Value]) -> String {
    json!({"nftables": commands}).to_string()
}

/// The commands by which what the kernel has of `ip`'s table goes, for an agent with source NAT and marks of its own; the chains of the second
/// address family stay, as aws-node makes such rules only for pods that it connects. True with them if something stays.
pub fn removal(observed: &NftObserved) -> (Vec<Value>, bool) {
    let family = "ip";
    let (stay, go): (Vec<&String>, Vec<&String>) = observed.chains.keys().partition(|chain| EGRESS_CHAINS.contains(&chain.as_str()));
    if stay.is_empty() {
        return (vec![json!({"delete": {"table": {"family": family, "name": TABLE}}})], false);
    }
    let commands = go.into_iter().flat_map(|chain| {
        let chain = json!({"chain": {"family": family, "table": TABLE, "name": chain}});
        [json!({"flush": chain}), json!({"delete": chain})]
    });
    (commands.collect(), true)
}

/// aws-node's chain a pod, once for all pods, and its guard.
fn egress_chains(egress: &Egress) -> Vec<Chain> {
    let (protocol, multicast, reject) =
        if egress.to.is_ipv4() { ("ip", ("224.0.0.0", 4), "icmp") } else { ("ip6", ("ff00::", 8), "icmpv6") };
    let address = |field: &str, op: &str, net: (String, u8)| {
        let left = json!({"payload": {"protocol": protocol, "field": field}});
        json!({"match": {"op": op, "left": left, "right": {"prefix": {"addr": net.0, "len": net.1}}}})
    };
    let range = || (egress.range.network().to_string(), egress.range.prefix_len());
    let nat = vec![
        json!([address("saddr", "!=", range()), {"return": null}]),
        json!([address("daddr", "==", (multicast.0.to_owned(), multicast.1)), {"return": null}]),
        json!([snat_statement(egress.to, egress.randomize)]),
    ];
    let is_new = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}});
    let refuse = json!({"reject": {"type": reject, "expr": "port-unreachable"}});
    let guard = vec![json!([address("daddr", "==", range()), is_new, refuse])];
    vec![
        Chain { name: EGRESS_CHAINS[0], kind: "nat", hook: "postrouting", priority: 105, rules: nat },
        Chain { name: EGRESS_CHAINS[1], kind: "filter", hook: "forward", priority: 0, rules: guard },
    ]
}

fn is(key: &str, value: &str) -> Value {
    json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": value}})
}

fn not(key: &str, value: &str) -> Value {
    json!({"match": {"op": "!=", "left": {"meta": {"key": key}}, "right": value}})
}

fn to_local(flags: &[&str]) -> Value {
    json!({"match": {"op": "==", "left": {"fib": {"result": "type", "flags": flags}}, "right": "local"}})
}

fn marked(mark: u32) -> Value {
    json!({"match": {"op": "==", "left": {"&": [{"ct": {"key": "mark"}}, mark]}, "right": mark}})
}

fn set_connection_mark(mark: u32) -> Value {
    json!({"mangle": {"key": {"ct": {"key": "mark"}}, "value": {"|": [{"ct": {"key": "mark"}}, mark]}}})
}

fn set_packet_mark(mark: u32) -> Value {
    json!({"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, mark]}}})
}

/// Returns for destinations that see the pod's own address.
fn bypass_rule(snat: &Snat) -> Option<Value> {
    // Overlapping prefixes in one set are refused by nft.
    let nets = Ipv4Net::aggregate(&snat.bypass);
    if nets.is_empty() {
        return None;
    }
    if nets.iter().any(|net| net.prefix_len() == 0) {
        return Some(json!([{"return": null}]));
    }
    let set: Vec<Value> = nets.iter().map(|net| json!({"prefix": {"addr": net.network(), "len": net.prefix_len()}})).collect();
    let left = json!({"payload": {"protocol": "ip", "field": "daddr"}});
    Some(json!([{"match": {"op": "==", "left": left, "right": {"set": set}}}, {"return": null}]))
}

fn snat_statement(to: IpAddr, randomize: Randomize) -> Value {
    match randomize {
        Randomize::Fully => json!({"snat": {"addr": to, "flags": ["fully-random"]}}),
        Randomize::Hash => json!({"snat": {"addr": to, "flags": ["random"]}}),
        Randomize::No => json!({"snat": {"addr": to}}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> HostPlan {
        let bypass = vec!["10.0.0.0/16".parse().unwrap(), "10.0.3.0/24".parse().unwrap()];
        HostPlan { snat: Some(Snat { to: "10.0.0.5".parse().unwrap(), bypass, randomize: Randomize::Fully }), ..HostPlan::default() }
    }

    fn listing_of(ruleset: &Ruleset) -> NftObserved {
        NftObserved { chains: ruleset.comments() }
    }

    #[test]
    fn what_goes_for_another_agent_leaves_the_second_family_alone() {
        let table = |name: &str| json!({"delete": {"table": {"family": "ip", "name": name}}});
        assert_eq!(removal(&listing_of(&Ruleset::of(&plan(), Some("eth0")))), (vec![table(TABLE)], false));
        let egress = Egress { to: "10.0.0.5".parse().unwrap(), range: "169.254.172.0/22".parse().unwrap(), randomize: Randomize::Fully };
        let observed = listing_of(&Ruleset::of(&HostPlan { egress: Some(egress), ..plan() }, Some("eth0")));
        let (commands, stays) = removal(&observed);
        assert!(stays);
        let of = |verb: &str| -> Vec<String> {
            let names = commands.iter().filter_map(|command| command[verb]["chain"]["name"].as_str());
            names.map(str::to_owned).collect()
        };
        let went: Vec<_> = observed.chains.keys().filter(|chain| !chain.starts_with("egress")).cloned().collect();
        assert!(went.len() >= 2);
        assert_eq!((of("flush"), of("delete")), (went.clone(), went));
    }

    #[test]
    fn a_table_is_recognised_and_any_edit_of_it_too() {
        let wanted = Ruleset::of(&plan(), Some("eth0"));
        assert!(!wanted.is_in_force(None));
        let mut observed = listing_of(&wanted);
        assert!(wanted.is_in_force(Some(&observed)));
        observed.chains.get_mut("source-nat").unwrap().pop();
        assert!(!wanted.is_in_force(Some(&observed)));
        let other = HostPlan { mark: 0x100, ..plan() };
        assert!(!Ruleset::of(&other, Some("eth0")).is_in_force(Some(&listing_of(&wanted))));
        assert!(!Ruleset::of(&plan(), Some("ens5")).is_in_force(Some(&listing_of(&wanted))), "the primary interface has another name");
        let of_others = NftObserved { chains: BTreeMap::from([("source-nat".to_owned(), vec![String::new()])]) };
        assert!(!wanted.is_in_force(Some(&of_others)), "rules without our comments are not ours");
    }

    #[test]
    fn without_snat_and_node_ports_no_table_is_wanted() {
        let none = Ruleset::of(&HostPlan { snat: None, node_port_support: false, ..HostPlan::default() }, Some("eth0"));
        assert!(none.is_in_force(None));
        assert!(!none.is_in_force(Some(&NftObserved::default())));
        assert_eq!(none.transaction().len(), 2, "add and delete: gone whether it was there or not");
        assert!(Ruleset::of(&HostPlan { ipv6: true, ..plan() }, Some("eth0")).is_in_force(None), "IPv6 nodes translate nothing");
    }

    #[test]
    fn external_snat_keeps_the_node_port_marks() {
        let external = Ruleset::of(&HostPlan { snat: None, ..plan() }, Some("eth0"));
        assert_eq!(external.chains.iter().map(|chain| chain.name).collect::<Vec<_>>(), ["mark-early"]);
    }

    #[test]
    fn excluding_everything_translates_nothing() {
        let mut all = plan();
        all.snat.as_mut().unwrap().bypass.push("0.0.0.0/0".parse().unwrap());
        let ruleset = Ruleset::of(&all, Some("eth0"));
        let snat = ruleset.chains.iter().find(|chain| chain.name == "source-nat").unwrap();
        assert_eq!(snat.rules[0], json!([{"return": null}]));
    }

    #[test]
    fn egress_is_translated_in_its_own_family_only() {
        let names = |ruleset: &Ruleset| ruleset.chains.iter().map(|chain| chain.name).collect::<Vec<_>>();
        let egress =
            |range: &str, to: &str| Some(Egress { range: range.parse().unwrap(), to: to.parse().unwrap(), randomize: Randomize::No });
        let four = HostPlan { ipv6: true, egress: egress("169.254.172.0/22", "10.0.0.5"), ..HostPlan::default() };
        assert_eq!(names(&Ruleset::of(&four, Some("eth0"))), ["egress-nat", "egress-guard"], "of an IPv6 cluster nothing else is IPv4's");
        assert!(!Ruleset::of_ipv6(&four).is_wanted());
        let six = HostPlan { egress: egress("fd00::ac:0/118", "2001:db8::5"), ..plan() };
        assert_eq!(names(&Ruleset::of_ipv6(&six)), ["egress-nat", "egress-guard"]);
        assert_eq!(Ruleset::of(&six, Some("eth0")), Ruleset::of(&plan(), Some("eth0")));
        assert!(Ruleset::of_ipv6(&six).transaction().iter().all(|command| !command.to_string().contains(r#""family":"ip""#)));
    }
}
