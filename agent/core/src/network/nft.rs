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

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};

use super::host::{HostPlan, Randomize, Snat};
use super::ops::NftObserved;

/// Our table's name, in family `ip`.
pub const TABLE: &str = "stanchion";

/// The wanted table: chains with their rules, as `nft -j` spells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
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
    /// What the plan wants; `primary_if` is the name of the primary ENI's interface, if it is known.
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
            rules.push(json!([snat_statement(snat)]));
            chains.push(Chain { name: "source-nat", kind: "nat", hook: "postrouting", priority: 110, rules });
        }
        let mut text = String::new();
        for Chain { name, kind, hook, priority, rules } in &chains {
            text.push_str(&format!("{name} {kind} {hook} {priority}\n"));
            for rule in rules {
                text.push_str(&format!("{rule}\n"));
            }
        }
        let digest = Sha1::digest(text.as_bytes());
        let fingerprint = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self { chains, fingerprint }
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
        let table = json!({"family": "ip", "name": TABLE});
        // Adding first makes the deletion succeed whether or not it existed.
        let mut commands = vec![json!({"add": {"table": table}}), json!({"delete": {"table": table}})];
        if self.chains.is_empty() {
            return commands;
        }
        commands.push(json!({"add": {"table": table}}));
        for Chain { name, kind, hook, priority, .. } in &self.chains {
            commands.push(json!({"add": {"chain": {
                "family": "ip", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
            }}}));
        }
        for chain in &self.chains {
            for (number, expr) in chain.rules.iter().enumerate() {
                commands.push(json!({"add": {"rule": {
                    "family": "ip", "table": TABLE, "chain": chain.name, "expr": expr, "comment": self.comment(number),
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

/// Reads `nft -j list table ip stanchion`.
///
/// # Errors
/// When it is not the JSON that nft writes.
pub fn parse_listing(text: &str) -> Result<NftObserved, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Listing {
        nftables: Vec<Value>,
    }
    let listing: Listing = serde_json::from_str(text)?;
    let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for item in &listing.nftables {
        if let Some(name) = item["chain"]["name"].as_str() {
            chains.entry(name.to_owned()).or_default();
        }
        if let Some(chain) = item["rule"]["chain"].as_str() {
            let comment = item["rule"]["comment"].as_str().unwrap_or_default();
            chains.entry(chain.to_owned()).or_default().push(comment.to_owned());
        }
    }
    Ok(NftObserved { chains })
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

fn snat_statement(snat: &Snat) -> Value {
    match snat.randomize {
        Randomize::Fully => json!({"snat": {"addr": snat.to, "flags": ["fully-random"]}}),
        Randomize::Hash => json!({"snat": {"addr": snat.to, "flags": ["random"]}}),
        Randomize::No => json!({"snat": {"addr": snat.to}}),
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
    fn a_listing_without_our_comments_is_not_ours() {
        let text = r#"{"nftables":[{"metainfo":{"version":"1.0.6"}},{"table":{"family":"ip","name":"stanchion"}},
            {"chain":{"family":"ip","table":"stanchion","name":"source-nat"}},{"rule":{"chain":"source-nat","expr":[]}}]}"#;
        let observed = parse_listing(text).unwrap();
        assert_eq!(observed.chains["source-nat"], [""]);
        assert!(!Ruleset::of(&plan(), None).is_in_force(Some(&observed)));
    }
}
