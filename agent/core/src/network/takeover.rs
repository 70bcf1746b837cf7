//! Taking a node over from aws-node: its SNAT and mark rules go in the same transaction in which ours come.
//!
//! Recognised are its own nft table `ip aws-cni` and, where iptables writes nft, the chains `AWS-SNAT-CHAIN-*` and
//! `AWS-CONNMARK-CHAIN-*` of the tables `ip nat` and `ip mangle` with every rule that jumps to them. Translations and marks
//! of open connections live in conntrack and are not touched: no connection notices.
//!
//! The chains `CNI-E4-*` and `CNI-E6-*` that aws-node's egress plugin made for one pod each stay as long as the pod lives: they
//! translate to the address that ours do, and the node may be handed back. They go with the pod.
//!
//! iptables-legacy keeps rules in tables that nft does not show. There its chains, the rules that jump to them and the rules with
//! one of its comments go by `iptables-legacy-restore`, each table in one step, right after ours are in force.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

/// aws-node's own table, since 1.20.
const UPSTREAM_TABLE: &str = "aws-cni";
/// Chains that only aws-node makes.
const UPSTREAM_CHAINS: [&str; 2] = ["AWS-SNAT-CHAIN-", "AWS-CONNMARK-CHAIN-"];

/// Chains of one pod each, which only aws-node's egress plugin makes, and the family of their table.
const EGRESS_CHAINS: [(&str, &str); 2] = [("ip", "CNI-E4-"), ("ip6", "CNI-E6-")];

/// The old tables in which aws-node has rules.
pub const LEGACY_TABLES: [&str; 2] = ["nat", "mangle"];
/// How the comments of its rules begin: `AWS SNAT CHAIN`, `AWS, CONNMARK`, `AWS, primary ENI` ...
const UPSTREAM_COMMENTS: [&str; 2] = ["AWS SNAT CHAIN", "AWS, "];

/// Whether a table, as the kernel holds it, has something of aws-node's: names and comments stand there as they are.
pub fn is_in_legacy_table(entries: &[u8]) -> bool {
    let has = |text: &str| entries.windows(text.len()).any(|window| window == text.as_bytes());
    UPSTREAM_CHAINS.iter().chain(&UPSTREAM_COMMENTS).any(|text| has(text))
}

/// From `iptables-legacy-save -t TABLE` to the document for `iptables-legacy-restore --noflush` that removes what aws-node left;
/// `None`: nothing.
pub fn legacy_removal(saved: &str) -> Option<String> {
    let table = saved.lines().find_map(|line| line.strip_prefix('*'))?;
    let named = |name: &str| UPSTREAM_CHAINS.iter().any(|prefix| name.starts_with(prefix));
    let chains = || saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next()).filter(|name| named(name));
    let mut removal = String::new();
    for rule in saved.lines().filter_map(|line| line.strip_prefix("-A ")) {
        let words = || rule.split(' ');
        let jumps = words().zip(words().skip(1)).any(|(option, target)| matches!(option, "-j" | "-g") && named(target));
        let comment =
            rule.split_once("--comment \"").is_some_and(|(_, text)| UPSTREAM_COMMENTS.iter().any(|start| text.starts_with(start)));
        // Rules inside its chains go with the flush.
        if (jumps || comment) && !words().next().is_some_and(named) {
            removal.push_str(&format!("-D {rule}\n"));
        }
    }
    chains().for_each(|chain| removal.push_str(&format!("-F {chain}\n")));
    chains().for_each(|chain| removal.push_str(&format!("-X {chain}\n")));
    (!removal.is_empty()).then(|| format!("*{table}\n{removal}COMMIT\n"))
}

/// The commands that remove what aws-node left, from `nft -j list ruleset`; empty when there is nothing. `lives`: a pod has this
/// egress address.
pub fn removal(ruleset: &Value, lives: impl Fn(IpAddr) -> bool) -> Vec<Value> {
    let items = ruleset["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let living = living_egress_chains(items, lives);
    let goes = |family: &Value, name: &Value| is_upstream(family, name) || (is_egress(family, name) && !living.contains(&text(name)));
    let mut commands = Vec::new();
    let (mut flushes, mut chains) = (Vec::new(), Vec::new());
    for item in items {
        let (table, chain, rule) = (&item["table"], &item["chain"], &item["rule"]);
        if table["family"] == "ip" && table["name"] == UPSTREAM_TABLE {
            commands.push(json!({"delete": {"table": {"family": "ip", "name": UPSTREAM_TABLE}}}));
        }
        if goes(&chain["family"], &chain["name"]) {
            let this = json!({"family": chain["family"], "table": chain["table"], "name": chain["name"]});
            flushes.push(json!({"flush": {"chain": this}}));
            chains.push(json!({"delete": {"chain": this}}));
        }
        // Rules inside those chains go with the flush.
        let family = &rule["family"];
        if rule["table"] != UPSTREAM_TABLE && !goes(family, &rule["chain"]) && targets(&rule["expr"]).any(|target| goes(family, target)) {
            let this = json!({"family": family, "table": rule["table"], "chain": rule["chain"], "handle": rule["handle"]});
            commands.push(json!({"delete": {"rule": this}}));
        }
    }
    commands.extend(flushes);
    commands.extend(chains);
    commands
}

/// Whether a listing of chains (`nft -j list chains`) has any of aws-node's.
pub fn is_present(chains: &Value) -> bool {
    let items = chains["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| &item["chain"]).any(|chain| {
        let (family, name) = (&chain["family"], &chain["name"]);
        (family == "ip" && chain["table"] == UPSTREAM_TABLE) || is_upstream(family, name) || is_egress(family, name)
    })
}

/// The chains to which the packets of a living pod's egress address go.
fn living_egress_chains(items: &[Value], lives: impl Fn(IpAddr) -> bool) -> BTreeSet<String> {
    let rules = items.iter().map(|item| &item["rule"]).filter(|rule| source(&rule["expr"]).is_some_and(&lives));
    rules.flat_map(|rule| targets(&rule["expr"]).filter(|target| is_egress(&rule["family"], target)).map(text)).collect()
}

fn is_upstream(family: &Value, name: &Value) -> bool {
    family == "ip" && name.as_str().is_some_and(|name| UPSTREAM_CHAINS.iter().any(|prefix| name.starts_with(prefix)))
}

fn is_egress(family: &Value, name: &Value) -> bool {
    name.as_str().is_some_and(|name| EGRESS_CHAINS.iter().any(|(of, prefix)| family == of && name.starts_with(prefix)))
}

fn text(name: &Value) -> String {
    name.as_str().unwrap_or_default().to_owned()
}

/// Where a rule sends its packets.
fn targets(expr: &Value) -> impl Iterator<Item = &Value> {
    let statements = expr.as_array().map(Vec::as_slice).unwrap_or_default();
    statements.iter().flat_map(|statement| [&statement["jump"]["target"], &statement["goto"]["target"]])
}

/// The one source address whose packets a rule is about.
fn source(expr: &Value) -> Option<IpAddr> {
    let of = |statement: &Value| {
        let this = &statement["match"];
        let matches = this["op"] == "==" && this["left"]["payload"]["field"] == "saddr";
        matches.then(|| this["right"].as_str()?.parse().ok()).flatten()
    };
    expr.as_array()?.iter().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_old_tables_only_aws_nodes_rules_go() {
        let saved = "# Generated by iptables-save\n*nat\n:PREROUTING ACCEPT [0:0]\n:AWS-CONNMARK-CHAIN-0 - [0:0]\n:AWS-SNAT-CHAIN-0 - [0:0]\n:KUBE-SERVICES - [0:0]\n\
            -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
            -A PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -j AWS-CONNMARK-CHAIN-0\n\
            -A PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80\n\
            -A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0\n\
            -A AWS-SNAT-CHAIN-0 -d 10.0.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j RETURN\nCOMMIT\n";
        assert_eq!(
            legacy_removal(saved).unwrap().lines().collect::<Vec<_>>(),
            [
                "*nat",
                "-D PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -j AWS-CONNMARK-CHAIN-0",
                "-D PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80",
                "-D POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0",
                "-F AWS-CONNMARK-CHAIN-0",
                "-F AWS-SNAT-CHAIN-0",
                "-X AWS-CONNMARK-CHAIN-0",
                "-X AWS-SNAT-CHAIN-0",
                "COMMIT",
            ]
        );
        assert_eq!(legacy_removal("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"), None);
        assert_eq!(legacy_removal(""), None);
        assert!(is_in_legacy_table(b"\0\0AWS-SNAT-CHAIN-0\0") && !is_in_legacy_table(b"\0KUBE-SERVICES\0"));
    }

    #[test]
    fn only_aws_nodes_own_rules_go() {
        let ruleset = json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "ip", "name": "nat", "handle": 1}},
            {"chain": {"family": "ip", "table": "nat", "name": "POSTROUTING", "handle": 1}},
            {"chain": {"family": "ip", "table": "nat", "name": "AWS-SNAT-CHAIN-0", "handle": 2}},
            {"chain": {"family": "ip", "table": "nat", "name": "KUBE-POSTROUTING", "handle": 3}},
            {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING", "handle": 4, "expr": [{"jump": {"target": "KUBE-POSTROUTING"}}]}},
            {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING", "handle": 5,
                "expr": [{"xt": {"type": "match", "name": "comment"}}, {"jump": {"target": "AWS-SNAT-CHAIN-0"}}]}},
            {"rule": {"family": "ip", "table": "nat", "chain": "AWS-SNAT-CHAIN-0", "handle": 6, "expr": [{"return": null}]}},
            {"table": {"family": "ip", "name": "aws-cni", "handle": 2}},
            {"table": {"family": "ip6", "name": "aws-cni", "handle": 3}},
        ]});
        assert!(is_present(&ruleset));
        assert_eq!(
            removal(&ruleset, |_| false),
            [
                json!({"delete": {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING", "handle": 5}}}),
                json!({"delete": {"table": {"family": "ip", "name": "aws-cni"}}}),
                json!({"flush": {"chain": {"family": "ip", "table": "nat", "name": "AWS-SNAT-CHAIN-0"}}}),
                json!({"delete": {"chain": {"family": "ip", "table": "nat", "name": "AWS-SNAT-CHAIN-0"}}}),
            ]
        );
        let ours = json!({"nftables": [{"chain": {"family": "ip", "table": "stanchion", "name": "source-nat"}}]});
        assert!(!is_present(&ours));
        assert_eq!(removal(&ours, |_| false), Vec::<Value>::new());
    }
    #[test]
    fn a_pods_egress_chain_goes_with_the_pod() {
        let jump = |family: &str, address: &str, chain: &str, handle: u32| {
            let expr = json!([
                {"match": {"op": "==", "left": {"payload": {"protocol": family, "field": "saddr"}}, "right": address}},
                {"xt": {"type": "match", "name": "comment"}},
                {"jump": {"target": chain}},
            ]);
            json!({"rule": {"family": family, "table": "nat", "chain": "POSTROUTING", "handle": handle, "expr": expr}})
        };
        let chain = |family: &str, name: &str| json!({"chain": {"family": family, "table": "nat", "name": name}});
        let ruleset = json!({"nftables": [
            chain("ip", "CNI-E4-aaaa"), chain("ip", "CNI-E4-bbbb"), chain("ip6", "CNI-E6-cccc"), chain("ip6", "KUBE-POSTROUTING"),
            chain("ip", "CNI-E4-lost"),
            jump("ip", "169.254.172.2", "CNI-E4-aaaa", 7),
            jump("ip", "169.254.172.3", "CNI-E4-bbbb", 8),
            jump("ip6", "fd00::ac:2", "CNI-E6-cccc", 9),
            {"rule": {"family": "ip", "table": "nat", "chain": "CNI-E4-aaaa", "handle": 10, "expr": [{"accept": null}]}},
        ]});
        assert!(is_present(&ruleset));
        let lives = |address: IpAddr| address.to_string() == "169.254.172.3";
        let text = json!(removal(&ruleset, lives)).to_string();
        for gone in [r#""handle":7"#, r#""handle":9"#, "CNI-E4-aaaa", "CNI-E6-cccc", "CNI-E4-lost"] {
            assert!(text.contains(gone), "{gone}: {text}");
        }
        for stays in ["CNI-E4-bbbb", r#""handle":8"#, "KUBE-POSTROUTING", r#""handle":10"#] {
            assert!(!text.contains(stays), "{stays}: {text}");
        }
        let removed = |what: &str| removal(&ruleset, lives).iter().filter(|command| command.to_string().contains(what)).count();
        assert_eq!((removed(r#""flush""#), removed(r#""delete""#)), (3, 5), "a chain is emptied before it goes");
    }
}
