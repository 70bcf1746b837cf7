use super::*;
use crate::network::host::{DEFAULT_MTU, Randomize, Snat};
use crate::network::ops::{IfAddress, NftObserved};
use crate::network::{BranchLink, BranchPod, Rule, VlanLink, eni_route_table};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

fn link(index: u32, name: &str, mac_end: u8, mtu: u32, up: bool, kind: &str) -> NodeIf {
    NodeIf { index, name: name.into(), mac: Some(mac(mac_end)), mtu, up, kind: kind.into() }
}

fn eni(device: u32, mac_end: u8, ipv4: &str) -> EniPlan {
    EniPlan {
        id: format!("eni-{device}").as_str().into(),
        mac: mac(mac_end),
        role: if device == 0 { EniRole::Primary } else { EniRole::Secondary },
        device_index: device,
        network_card: 0,
        ipv4: Some(ipv4.parse().unwrap()),
        ipv6: None,
        table: eni_route_table(0, device),
        mtu: DEFAULT_MTU,
    }
}

fn plan() -> HostPlan {
    let snat = Snat { to: "10.0.0.5".parse().unwrap(), bypass: vec!["10.0.0.0/16".parse().unwrap()], randomize: Randomize::Fully };
    HostPlan {
        enis: vec![eni(0, 1, "10.0.0.5/24"), eni(1, 2, "10.0.0.20/24")],
        pods: vec![PodHost { address: "10.0.0.21".parse().unwrap(), host_if: "eni1234".into(), table: 2 }],
        snat: Some(snat),
        external_service_cidrs: vec!["100.64.0.0/10".parse().unwrap()],
        ..HostPlan::default()
    }
}

/// A node as the image boots it, with a fresh secondary ENI and a pod's veth.
fn fresh() -> HostObserved {
    HostObserved {
        links: vec![link(2, "eth0", 1, 9001, true, ""), link(3, "eth1", 2, 1500, false, ""), link(4, "eni1234", 9, 9001, true, "veth")],
        addresses: vec![IfAddress { index: 2, address: net("10.0.0.5/24"), global: true }],
        sysctls: [("net/ipv4/ip_forward", "0"), ("net/ipv4/conf/eth0/rp_filter", "0"), ("net/ipv4/tcp_early_demux", "1")]
            .map(|(path, value)| (path.to_owned(), value.to_owned()))
            .into(),
        ..HostObserved::default()
    }
}

/// A kernel of the coarsest kind: enough to see whether the operations lead to the desired state.
fn perform(state: &mut HostObserved, ops: &[NetOp], desired: &HostPlan) {
    for op in ops {
        match op.clone() {
            NetOp::AddVlan(VlanLink { name, mac, .. }) => {
                let index = state.links.iter().map(|link| link.index).max().unwrap_or_default() + 1;
                state.links.push(NodeIf { index, name, mac: Some(mac), mtu: DEFAULT_MTU, up: true, kind: "vlan".into() });
            }
            NetOp::DeleteLink { index } => {
                state.links.retain(|link| link.index != index);
                state.routes.retain(|route| route.index != index);
            }
            NetOp::LinkUp { index } => state.links.iter_mut().filter(|link| link.index == index).for_each(|link| link.up = true),
            NetOp::Mtu { index, mtu } => state.links.iter_mut().filter(|link| link.index == index).for_each(|link| link.mtu = mtu),
            NetOp::AddAddress { index, address } => state.addresses.push(IfAddress { index, address, global: true }),
            NetOp::DeleteAddress { index, address } => {
                state.addresses.retain(|present| (present.index, present.address) != (index, address));
            }
            NetOp::ReplaceRoute(route) => {
                state.routes.retain(|present| (present.dst, present.table) != (route.dst, route.table));
                state.routes.push(route);
            }
            NetOp::DeleteRoute(route) => state.routes.retain(|present| *present != route),
            NetOp::AddRule(rule) => state.rules.push(rule),
            NetOp::DeleteRule(rule) => state.rules.retain(|present| *present != rule),
            NetOp::Sysctl { path, value } => drop(state.sysctls.insert(path, value)),
            NetOp::Nft { document } => {
                let transaction: serde_json::Value = serde_json::from_str(&document).unwrap();
                let mut made = NftObserved::default();
                for rule in transaction["nftables"].as_array().unwrap().iter().map(|command| &command["add"]["rule"]) {
                    if let (Some(chain), Some(comment)) = (rule["chain"].as_str(), rule["comment"].as_str()) {
                        made.chains.entry(chain.to_owned()).or_default().push(comment.to_owned());
                    }
                }
                state.nft = desired.uses_mark().then_some(made);
            }
            NetOp::Legacy { document } => state.upstream_legacy.retain(|present| *present != document),
            NetOp::Neighbour { .. } => unreachable!("the host has no neighbours of ours"),
        }
    }
}

fn settled() -> HostObserved {
    let mut state = fresh();
    let ops = diff(&plan(), &state);
    perform(&mut state, &ops, &plan());
    state
}

#[test]
fn a_fresh_node_gets_everything_and_then_nothing() {
    let ops = diff(&plan(), &fresh());
    for want in [
        NetOp::Mtu { index: 3, mtu: 9001 },
        NetOp::LinkUp { index: 3 },
        NetOp::AddAddress { index: 3, address: net("10.0.0.20/24") },
        NetOp::ReplaceRoute(Route { dst: net("10.0.0.1/32"), table: 2, via: None, index: 3 }),
        NetOp::ReplaceRoute(Route { dst: net("0.0.0.0/0"), table: 2, via: Some("10.0.0.1".parse().unwrap()), index: 3 }),
        NetOp::ReplaceRoute(Route { dst: net("10.0.0.21/32"), table: 254, via: None, index: 4 }),
        NetOp::AddRule(Rule::to_host(512, "10.0.0.21".parse().unwrap(), 254)),
        NetOp::AddRule(Rule::from_host(1536, "10.0.0.21".parse().unwrap(), 2)),
        NetOp::AddRule(Rule::from_host(32_765, "10.0.0.20".parse().unwrap(), 2)),
        NetOp::AddRule(Rule { mark: Some((0x80, 0x80)), ..Rule::new(false, 1024, 254) }),
        NetOp::AddRule(Rule { to: Some(net("100.64.0.0/10")), ..Rule::new(false, 1535, 254) }),
        NetOp::Sysctl { path: "net/ipv4/conf/eth0/rp_filter".into(), value: "2".into() },
    ] {
        assert!(ops.contains(&want), "{want:?} is not among {ops:#?}");
    }
    assert!(ops.iter().all(|op| !op.removes()), "nothing was there to be removed");
    assert_eq!(diff(&plan(), &settled()), []);
}

#[test]
fn the_primary_interface_belongs_to_the_system() {
    let mut plan = plan();
    plan.enis[0].mtu = 1500;
    let of_primary: Vec<_> = diff(&plan, &settled());
    assert_eq!(of_primary, [NetOp::Mtu { index: 2, mtu: 1500 }]);
}

#[test]
fn foreign_damage_is_a_difference() {
    let good = settled();
    for gone in 0..good.rules.len() {
        let mut damaged = good.clone();
        let rule = damaged.rules.remove(gone);
        assert_eq!(diff(&plan(), &damaged), [NetOp::AddRule(rule)]);
    }
    for gone in 0..good.routes.len() {
        let mut damaged = good.clone();
        let route = damaged.routes.remove(gone);
        assert_eq!(diff(&plan(), &damaged), [NetOp::ReplaceRoute(route)]);
    }
    let damaged = HostObserved { nft: None, ..good.clone() };
    assert!(matches!(diff(&plan(), &damaged)[..], [NetOp::Nft { .. }]));
}

#[test]
fn what_the_image_put_on_a_secondary_eni_goes() {
    let mut state = settled();
    state.addresses.push(IfAddress { index: 3, address: net("10.0.0.21/24"), global: true });
    state.addresses.push(IfAddress { index: 3, address: net("fe80::1/64"), global: false });
    let connected = Route { dst: net("10.0.0.0/24"), table: 254, via: None, index: 3 };
    state.routes.push(connected.clone());
    assert_eq!(diff(&plan(), &state), [NetOp::DeleteAddress { index: 3, address: net("10.0.0.21/24") }, NetOp::DeleteRoute(connected)]);
}

#[test]
fn rules_of_dead_pods_go_and_those_of_starting_pods_stay() {
    let address: IpAddr = "10.0.0.30".parse().unwrap();
    let mut state = settled();
    state.rules.extend(pod_rules(address, 2));
    assert_eq!(diff(&plan(), &state), pod_rules(address, 2).into_iter().map(NetOp::DeleteRule).collect::<Vec<_>>());
    state.routes.push(Route { dst: address.into(), table: 254, via: None, index: 9 });
    assert_eq!(diff(&plan(), &state), [], "its route is there: an ADD is under way");
}

#[test]
fn the_old_shapes_of_aws_node_are_rewritten() {
    let mut state = settled();
    let from_pod = Rule::from_host(1536, "10.0.0.21".parse().unwrap(), 2);
    state.rules.retain(|rule| *rule != from_pod);
    let old = Rule { to: Some(net("10.0.0.0/16")), ..from_pod.clone() };
    let moved = Rule { table: 3, ..from_pod.clone() };
    state.rules.extend([old.clone(), moved.clone()]);
    assert_eq!(diff(&plan(), &state), [NetOp::AddRule(from_pod), NetOp::DeleteRule(old), NetOp::DeleteRule(moved)]);
}

#[test]
fn an_eni_that_is_detached_leaves_no_rule_and_those_of_others_stay() {
    let mut state = settled();
    let gone = Rule::from_host(32_765, "10.0.0.77".parse().unwrap(), 3);
    let foreign = Rule::from_host(32_765, "10.0.9.9".parse().unwrap(), 10_001);
    state.rules.extend([gone.clone(), foreign]);
    state.addresses.push(IfAddress { index: 8, address: net("10.0.9.9/24"), global: true });
    assert_eq!(diff(&plan(), &state), [NetOp::DeleteRule(gone)]);
}

#[test]
fn settings_that_are_switched_off_take_their_rules_along() {
    let off = HostPlan { snat: None, node_port_support: false, external_service_cidrs: vec![], ..plan() };
    let ops = diff(&off, &settled());
    assert_eq!(ops.iter().filter(|op| matches!(op, NetOp::DeleteRule(_))).count(), 2);
    assert!(ops.iter().any(|op| matches!(op, NetOp::Nft { document } if !document.contains("chain"))));
}

#[test]
fn an_eni_without_an_interface_is_missing_and_costs_nothing() {
    let mut plan = plan();
    plan.enis.push(eni(2, 7, "10.0.0.40/24"));
    assert_eq!(missing(&plan, &settled()), [mac(7)]);
    assert_eq!(diff(&plan, &settled()), []);
}

#[test]
fn rules_of_others_are_not_ours_to_judge() {
    let mut state = settled();
    state.rules.extend([
        Rule::new(false, 0, 255),
        Rule { to: Some(net("10.9.0.0/16")), ..Rule::new(false, 512, 254) },
        Rule { iif: Some("eth7".into()), ..Rule::from_host(1536, "10.0.0.99".parse().unwrap(), 9) },
        Rule { mark: Some((0x4000, 0x4000)), ..Rule::new(false, 1024, 254) },
    ]);
    assert_eq!(diff(&plan(), &state), []);
}

#[test]
fn an_older_plan_does_not_disturb_a_newer_sandbox() {
    let mut state = settled();
    let (old, new): (IpNet, IpNet) = (net("10.0.0.21/32"), net("10.0.0.35/32"));
    state.routes.iter_mut().filter(|route| route.dst == old).for_each(|route| route.dst = new);
    state.rules.retain(|rule| rule.to != Some(old) && rule.from != Some(old));
    state.rules.extend(pod_rules(new.addr(), 2));
    assert_eq!(diff(&plan(), &state), [], "the name is the same, the pod behind it is not");
    let mut starting = settled();
    starting.routes.retain(|route| route.dst != old);
    starting.links.iter_mut().filter(|link| link.name == "eni1234").for_each(|link| link.up = false);
    assert!(diff(&plan(), &starting).iter().all(|op| !matches!(op, NetOp::ReplaceRoute(_))), "its ADD is under way");
}

const BRANCH_IF: &str = "vlan9999";

/// A trunk on eth2 and a pod with security groups of its own, connected by the plugin but for what the host plan adds.
fn with_branch(strict: bool) -> (HostPlan, HostObserved) {
    let mut plan = plan();
    plan.enis.push(EniPlan { role: EniRole::Trunk, ..eni(2, 3, "10.0.2.20/24") });
    let host_if = if strict { BRANCH_IF.to_owned() } else { "eni9999".to_owned() };
    let address: IpAddr = "10.0.2.30".parse().unwrap();
    let link = BranchLink { vlan_id: 7, mac: mac(7), trunk: mac(3), gateway: Some("10.0.2.1".parse().unwrap()), strict };
    plan.branches = vec![BranchPod { host_if: host_if.clone(), addresses: vec![address], link }];
    plan.strict_branches = strict;
    if !strict {
        plan.pods.push(PodHost { address, host_if: host_if.clone(), table: 107 });
    }
    let mut state = fresh();
    state.links.extend([link_of(5, "eth2", 3, ""), link_of(6, &host_if, 8, "veth")]);
    state.rules = vec![Rule::new(false, 0, 255)];
    for _ in 0..2 {
        let ops = diff(&plan, &state);
        perform(&mut state, &ops, &plan);
    }
    assert_eq!(diff(&plan, &state), [], "two looks suffice: the interface, then its routes");
    (plan, state)
}

fn link_of(index: u32, name: &str, mac_end: u8, kind: &str) -> NodeIf {
    link(index, name, mac_end, DEFAULT_MTU, true, kind)
}

#[test]
fn a_branch_has_an_interface_on_the_trunk_a_table_and_its_modes_rules() {
    for strict in [true, false] {
        let (_, state) = with_branch(strict);
        let vlan = state.link_named("vlan.eth.7").expect("made on the trunk's interface");
        assert_eq!((vlan.mac, vlan.up), (Some(mac(7)), true));
        let route =
            |dst: &str, table, via: Option<&str>, index| Route { dst: net(dst), table, via: via.map(|via| via.parse().unwrap()), index };
        for want in [
            route("10.0.2.1/32", 107, None, vlan.index),
            route("0.0.0.0/0", 107, Some("10.0.2.1"), vlan.index),
            route("10.0.2.30/32", if strict { 107 } else { 254 }, None, 6),
        ] {
            assert!(state.routes.contains(&want), "strict {strict}: {want:?}");
        }
        let iif = |name: &str| Rule { iif: Some(name.into()), ..Rule::new(false, 10, 107) };
        let local = |priority| Rule::new(false, priority, 255);
        let address = "10.0.2.30".parse().unwrap();
        let of_strict = [iif("vlan.eth.7"), iif(BRANCH_IF), local(20)];
        let of_standard = [local(0), Rule::to_host(512, address, 254), Rule::from_host(1536, address, 107)];
        let (there, absent) = if strict { (of_strict, of_standard) } else { (of_standard, of_strict) };
        assert!(there.iter().all(|rule| state.rules.contains(rule)), "strict {strict}: {:?}", state.rules);
        assert!(!absent.iter().any(|rule| state.rules.contains(rule)), "strict {strict}: {:?}", state.rules);
    }
}

#[test]
fn damage_to_a_branch_is_a_difference() {
    for strict in [true, false] {
        let (plan, good) = with_branch(strict);
        for gone in 0..good.rules.len() {
            let mut damaged = good.clone();
            let rule = damaged.rules.remove(gone);
            // The kernel's own rule is only ours to mend where strict mode moved it.
            let mends = if rule == Rule::new(false, 0, 255) { vec![] } else { vec![NetOp::AddRule(rule)] };
            assert_eq!(diff(&plan, &damaged), mends);
        }
        for gone in 0..good.routes.len() {
            let mut damaged = good.clone();
            let route = damaged.routes.remove(gone);
            assert_eq!(diff(&plan, &damaged), [NetOp::ReplaceRoute(route)]);
        }
        let mut damaged = good.clone();
        let vlan = good.link_named("vlan.eth.7").unwrap().index;
        perform(&mut damaged, &[NetOp::DeleteLink { index: vlan }], &plan);
        let again = VlanLink { parent: 5, name: "vlan.eth.7".into(), vlan_id: 7, mac: mac(7) };
        assert_eq!(diff(&plan, &damaged), [NetOp::AddVlan(again)]);
        damaged.links.retain(|link| link.name != "eth2");
        assert_eq!(diff(&plan, &damaged), [], "without the trunk's interface there is nothing to make it on");
    }
}

#[test]
fn a_branch_goes_when_its_pod_went_without_a_delete() {
    for strict in [true, false] {
        let (mut plan, mut state) = with_branch(strict);
        perform(&mut state, &[NetOp::DeleteLink { index: 6 }], &plan);
        plan.branches.clear();
        plan.pods.retain(|pod| pod.table != 107);
        let ops = diff(&plan, &state);
        perform(&mut state, &ops, &plan);
        assert_eq!(state.link_named("vlan.eth.7"), None, "strict {strict}");
        assert!(
            !state.rules.iter().any(|rule| rule.table == 107) && !state.routes.iter().any(|route| route.table == 107),
            "strict {strict}"
        );
        assert_eq!(diff(&plan, &state), []);
    }
}

#[test]
fn a_branch_whose_pod_is_being_added_stays_although_the_plan_does_not_know_it() {
    let (mut plan, mut state) = with_branch(true);
    plan.branches.clear();
    assert_eq!(diff(&plan, &state), [], "its veth lives");
    state.rules.retain(|rule| rule.priority != 10);
    assert_eq!(diff(&plan, &state), [], "its rules are yet to come");
}

/// Its rules stand before the pod's own, as they are older.
#[test]
fn the_branch_that_an_earlier_sandbox_of_the_pod_had_goes() {
    let (plan, good) = with_branch(true);
    let mut state = good.clone();
    let iif = |name: &str| Rule { iif: Some(name.into()), ..Rule::new(false, 10, 109) };
    state.rules.extend([iif("vlan.eth.9"), iif(BRANCH_IF)]);
    state.links.push(link_of(99, "vlan.eth.9", 9, "vlan"));
    state.routes.push(Route { dst: net("0.0.0.0/0"), table: 109, via: Some("10.0.2.1".parse().unwrap()), index: 99 });
    let mut shared = state.clone();
    let ops = diff(&plan, &state);
    perform(&mut state, &ops, &plan);
    assert_eq!((&state.rules, &state.links, &state.routes), (&good.rules, &good.links, &good.routes), "{ops:?}");
    // Another pod has been given that branch meanwhile.
    shared.rules.push(iif("vlan8888"));
    shared.links.push(link_of(98, "vlan8888", 8, "veth"));
    assert_eq!(diff(&plan, &shared), [NetOp::DeleteRule(iif(BRANCH_IF))]);
}

#[test]
fn the_other_mode_puts_the_rule_for_the_nodes_addresses_back() {
    let (mut plan, mut state) = with_branch(true);
    (plan.strict_branches, plan.branches) = (false, vec![]);
    let (first, behind) = (Rule::new(false, 0, 255), Rule::new(false, 20, 255));
    let ops = diff(&plan, &state);
    assert_eq!(ops, [NetOp::AddRule(first), NetOp::DeleteRule(behind)], "at no instant is the node without it");
    perform(&mut state, &ops, &plan);
    assert_eq!(diff(&plan, &state), []);
}

#[test]
fn another_cards_eni_on_an_ipv6_node_carries_pods_without_an_address_of_its_own() {
    let pod: IpAddr = "2600:1f18:0:7:9::2".parse().unwrap();
    let card = EniPlan { network_card: 1, table: eni_route_table(1, 1), ..eni(1, 2, "10.0.0.20/24") };
    let desired = HostPlan {
        enis: vec![eni(0, 1, "10.0.0.5/24"), card],
        pods: vec![PodHost { address: pod, host_if: "eni1234".into(), table: 10_101 }],
        ipv6: true,
        ..HostPlan::default()
    };
    let mut state = fresh();
    let ops = diff(&desired, &state);
    perform(&mut state, &ops, &desired);
    assert_eq!(diff(&desired, &state), []);
    let route = |dst: &str, via: Option<IpAddr>| Route { dst: net(dst), table: 10_101, via, index: 3 };
    for wanted in [route("fe80:ec2::1/128", None), route("::/0", Some(V6_GATEWAY.into()))] {
        assert!(state.routes.contains(&wanted), "{wanted:?} in {:?}", state.routes);
    }
    assert!(state.rules.contains(&Rule::to_host(PRIORITY_TO_POD, pod, MAIN_TABLE)));
    assert!(state.rules.contains(&Rule::from_host(PRIORITY_FROM_POD, pod, 10_101)));
    assert!(state.routes.iter().all(|route| route.table != MAIN_TABLE || route.index == 4), "the primary's routes are the system's");
    // The interface was down for a moment: the kernel threw its IPv6 routes away.
    state.routes.retain(|route| route.table != 10_101 || route.dst.addr().is_ipv4());
    assert_eq!(diff(&desired, &state).len(), 2);
}

#[test]
fn an_ipv6_branch_hears_the_router_although_its_table_does_not_know_it() {
    let address: IpAddr = "2001:db8::30".parse().unwrap();
    let link = BranchLink { vlan_id: 7, mac: mac(7), trunk: mac(1), gateway: None, strict: true };
    let plan = HostPlan {
        ipv6: true,
        branches: vec![BranchPod { host_if: BRANCH_IF.into(), addresses: vec![address], link }],
        strict_branches: true,
        ..HostPlan::default()
    };
    let mut state = HostObserved {
        links: vec![link_of(2, "eth0", 1, ""), link_of(4, "vlan.eth.7", 7, "vlan"), link_of(6, BRANCH_IF, 8, "veth")],
        rules: vec![Rule::new(false, 0, 255), Rule::new(true, 0, 255)],
        ..HostObserved::default()
    };
    let ops = diff(&plan, &state);
    perform(&mut state, &ops, &plan);
    let router = Rule { from: Some(IpAddr::from(V6_GATEWAY).into()), ip_proto: Some(58), ..Rule::new(true, 0, 255) };
    for want in [router, Rule::new(true, 20, 255), Rule { iif: Some("vlan.eth.7".into()), ..Rule::new(true, 10, 107) }] {
        assert!(state.rules.contains(&want), "{want:?} is not among {:?}", state.rules);
    }
    assert!(state.rules.contains(&Rule::new(false, 0, 255)) && !state.rules.contains(&Rule::new(true, 0, 255)));
    assert!(state.routes.contains(&Route { dst: net("::/0"), table: 107, via: Some(V6_GATEWAY.into()), index: 4 }));
    assert_eq!(diff(&plan, &state), []);
}

/// With forwarding on, the kernel throws away the default route that a router advertised unless it hears routers all the same.
#[test]
fn a_node_hears_its_router_before_it_forwards() {
    for (ipv6, egress) in [(true, false), (true, true), (false, true)] {
        let paths: Vec<_> = host_sysctls(ipv6, egress, true, Some("ens5")).into_iter().map(|(path, _)| path).collect();
        let place = |name: &str| paths.iter().position(|path| path == name).expect("wanted");
        assert!(place("net/ipv6/conf/ens5/accept_ra") < place("net/ipv6/conf/all/forwarding"), "{paths:?}");
    }
}

#[test]
fn what_aws_node_left_goes_in_the_transaction_in_which_ours_comes() {
    let removal = serde_json::json!({"delete": {"table": {"family": "ip", "name": "aws-cni"}}});
    let documents = |observed: &HostObserved| -> Vec<String> {
        let ops = diff(&plan(), observed);
        ops.into_iter().filter_map(|op| if let NetOp::Nft { document } = op { Some(document) } else { None }).collect()
    };
    let both = documents(&HostObserved { upstream: vec![removal.clone()], ..fresh() });
    assert_eq!(both.len(), 1);
    assert!(both[0].contains("aws-cni") && both[0].contains("source-nat"));
    let only_theirs = documents(&HostObserved { upstream: vec![removal], ..settled() });
    assert!(only_theirs[0].contains("aws-cni") && !only_theirs[0].contains("source-nat"));
}

#[test]
fn rules_of_iptables_legacy_go_once_ours_are_in_force() {
    let theirs = "*nat\n-F AWS-SNAT-CHAIN-0\n-X AWS-SNAT-CHAIN-0\nCOMMIT\n".to_owned();
    let mut state = HostObserved { upstream_legacy: vec![theirs.clone()], ..fresh() };
    let ops = diff(&plan(), &state);
    let place = |wanted: fn(&NetOp) -> bool| ops.iter().position(wanted).unwrap();
    assert!(place(|op| matches!(op, NetOp::Nft { .. })) < place(|op| matches!(op, NetOp::Legacy { .. })));
    assert!(ops.contains(&NetOp::Legacy { document: theirs }));
    perform(&mut state, &ops, &plan());
    assert_eq!(state.upstream_legacy, Vec::<String>::new());
}
