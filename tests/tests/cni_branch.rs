//! Pods with security groups of their own, by the real plugin. The test machine's kernel may have no VLANs: a bridge of the VLAN interface's name
//! with the branch's Ethernet address stands for one that an earlier sandbox of the pod left, which the plugin goes on using.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use cni_support::{OwnedNetns, Pod, Site, attachment, ip, run};
use serde_json::{Value, json};
use stanchion_core::network::host_veth_name;
use stanchion_netlink::{Netlink, Netns};
use stanchion_proto as wire;

const BRANCH_MAC: &str = "02:00:00:00:00:77";
const TRUNK_MAC: &str = "02:00:00:00:00:88";

/// A node with a trunk, whose agent gives a branch with VLAN 7 and 10.0.7.9.
async fn site(mode: &str) -> Site {
    let site = Site::start().await;
    run(&site.node.0, &format!("ip link add eth1 address {TRUNK_MAC} type bridge"));
    run(&site.node.0, "ip link set eth1 up");
    give_branch(&site, mode);
    site
}

fn give_branch(site: &Site, mode: &str) {
    give_branch_of(site, mode, 7, BRANCH_MAC);
}

/// The agent gives VLAN n and 10.0.n.9 next.
fn give_branch_of(site: &Site, mode: &str, vlan_id: u32, mac: &str) {
    let mut script = site.script.lock().unwrap();
    script.free.push_front(attachment(&format!("10.0.{vlan_id}.9"), 100 + vlan_id));
    script.branch = Some(wire::BranchEni {
        vlan_id,
        mac: mac.to_owned(),
        subnet_gateway: format!("10.0.{vlan_id}.1"),
        enforcing_mode: mode.to_owned(),
        trunk_mac: TRUNK_MAC.to_owned(),
    });
}

fn stand_in(site: &Site) {
    stand_in_for(site, 7, BRANCH_MAC);
}

fn stand_in_for(site: &Site, vlan_id: u32, mac: &str) {
    run(&site.node.0, &format!("ip link add vlan.eth.{vlan_id} address {mac} type bridge"));
}

fn host_if(pod: &Pod, mode: &str) -> String {
    host_veth_name(if mode == "strict" { "vlan" } else { "eni" }, &pod.name, 0)
}

/// What leads to the branch: rules as `priority selector table`, routes of table 107.
fn branch_state(site: &Site) -> (Vec<String>, Vec<String>) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rules = ip(&site.node.0, &["rule"]);
    let own = rules.as_array().unwrap().iter().filter(|rule| rule["priority"].as_u64().is_some_and(|p| (1..32_000).contains(&p)));
    let own = own.map(|rule| {
        let (iif, dst) = (text(&rule["iif"]), text(&rule["dst"]));
        let by = if !iif.is_empty() {
            format!("iif {iif}")
        } else if !dst.is_empty() {
            format!("to {dst}")
        } else {
            format!("from {}", text(&rule["src"]))
        };
        format!("{} {by} {}", rule["priority"], text(&rule["table"]))
    });
    let routes = ip(&site.node.0, &["route", "show", "table", "107"]);
    let routes = routes.as_array().unwrap().iter().map(|route| format!("{} {}", text(&route["dst"]), text(&route["dev"])));
    let (mut own, mut routes): (Vec<_>, Vec<_>) = (own.collect(), routes.collect());
    own.sort();
    routes.sort();
    (own, routes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_connected_to_its_branch_checked_and_taken_down() {
    for mode in ["strict", "standard"] {
        let site = site(mode).await;
        let before = site.picture();
        stand_in(&site);
        let pod = site.pod("guarded");
        let result = site.add(&pod).await;
        let veth = host_if(&pod, mode);
        let (rules, routes) = branch_state(&site);
        let way_out = ["10.0.7.1 vlan.eth.7".to_owned(), "default vlan.eth.7".to_owned()];
        if mode == "strict" {
            assert_eq!(rules, ["10 iif vlan.eth.7 107".to_owned(), format!("10 iif {veth} 107")]);
            assert_eq!(routes, [&way_out[..1], &[format!("10.0.7.9 {veth}")], &way_out[1..]].concat());
        } else {
            assert_eq!(rules, ["1536 from 10.0.7.9 107", "512 to 10.0.7.9 main"]);
            assert_eq!(routes, way_out);
        }
        let named: Vec<&Value> = result["interfaces"].as_array().unwrap().iter().map(|interface| &interface["name"]).collect();
        assert_eq!(named, [&json!(veth), &json!("eth0"), &json!("vlan.eth.7")]);
        assert_eq!(result["ips"], json!([{"interface": 1, "address": "10.0.7.9/32", "gateway": "169.254.1.1"}]));
        assert_eq!(site.script.lock().unwrap().activations[0].endpoints[0].host_if_name, veth, "network policy is in force on its veth");

        let check = site.call("CHECK", &pod, json!({"prevResult": result})).await;
        assert!(check.ok, "{mode}: {check:?}");
        run(&site.node.0, "ip link set vlan.eth.7 down");
        let gone = if mode == "strict" { "ip rule del pref 10 iif vlan.eth.7" } else { "ip rule del pref 1536 from 10.0.7.9" };
        run(&site.node.0, gone);
        let check = site.call("CHECK", &pod, json!({"prevResult": result})).await;
        assert!(
            !check.ok && check.stdout.contains("no interface vlan.eth.7 that is up") && check.stdout.contains("no rule 1"),
            "{check:?}"
        );

        for _ in 0..2 {
            let del = site.call("DEL", &pod, json!({"prevResult": result})).await;
            assert!(del.ok, "{mode}: {del:?}");
            assert_eq!(site.picture(), before, "{mode}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_without_a_result_finds_the_branch_by_its_rules() {
    for mode in ["strict", "standard"] {
        let site = site(mode).await;
        let before = site.picture();
        stand_in(&site);
        let pod = site.pod("guarded");
        site.add(&pod).await;
        let del = site.call("DEL", &pod, json!({})).await;
        assert!(del.ok, "{mode}: {del:?}");
        assert_eq!(site.picture(), before, "{mode}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_delete_of_an_earlier_sandbox_leaves_the_branch_to_the_new_one() {
    for mode in ["strict", "standard"] {
        let site = site(mode).await;
        stand_in(&site);
        let (old, new) = (site.pod("guarded"), site.pod("guarded"));
        let result = site.add(&old).await;
        give_branch(&site, mode);
        site.add(&new).await;
        let living = (branch_state(&site), site.picture());
        for extra in [json!({"prevResult": result}), json!({})] {
            let del = site.call("DEL", &old, extra).await;
            assert!(del.ok, "{mode}: {del:?}");
            assert_eq!((branch_state(&site), site.picture()), living, "{mode}");
        }
    }
}

/// A StatefulSet's pod that was deleted by force has a branch of its own before the runtime has ended its first sandbox, and the same veth's name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_comes_back_with_another_branch_leaves_by_that_one() {
    const NEXT_MAC: &str = "02:00:00:00:00:78";
    for mode in ["strict", "standard"] {
        let site = site(mode).await;
        let before = site.picture();
        stand_in(&site);
        let (old, new) = (site.pod("guarded"), site.pod("guarded"));
        let first = site.add(&old).await;
        give_branch_of(&site, mode, 8, NEXT_MAC);
        stand_in_for(&site, 8, NEXT_MAC);
        let second = site.add(&new).await;
        let veth = host_if(&new, mode);
        let own = if mode == "strict" {
            ["10 iif vlan.eth.8 108".to_owned(), format!("10 iif {veth} 108")]
        } else {
            ["1536 from 10.0.8.9 108".to_owned(), "512 to 10.0.8.9 main".to_owned()]
        };
        let living = |site: &Site| {
            let (rules, _) = branch_state(site);
            own.iter().all(|rule| rules.contains(rule)) && !rules.contains(&format!("10 iif {veth} 107"))
        };
        assert!(living(&site), "{mode}: {:?}", branch_state(&site));
        for extra in [json!({"prevResult": first}), json!({})] {
            // As an older plugin has left it.
            if mode == "strict" {
                run(&site.node.0, &format!("ip rule add pref 10 iif {veth} lookup 107"));
                stand_in(&site);
            }
            let del = site.call("DEL", &old, extra).await;
            assert!(del.ok && living(&site), "{mode}: {del:?} {:?}", branch_state(&site));
            assert_eq!(branch_state(&site).0, own, "{mode}: nothing of the first branch is left");
            assert!(!ip(&site.node.0, &["link"]).to_string().contains("vlan.eth.7"), "{mode}");
        }
        let del = site.call("DEL", &new, json!({"prevResult": second})).await;
        assert!(del.ok, "{mode}: {del:?}");
        assert_eq!(site.picture(), before, "{mode}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_pod_with_this_vlan_left_is_replaced() {
    let site = site("strict").await;
    stand_in(&site);
    run(&site.node.0, "ip rule add pref 10 iif vlan12345678901 lookup 107");
    run(&site.node.0, "ip rule add pref 1536 from 10.0.7.99 lookup 107");
    let pod = site.pod("guarded");
    site.add(&pod).await;
    let (rules, _) = branch_state(&site);
    assert_eq!(rules, ["10 iif vlan.eth.7 107".to_owned(), format!("10 iif {} 107", host_if(&pod, "strict"))]);
}

/// With VLANs the interface is a real one; without them the error says what to do, and nothing stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_vlan_interface_is_made_or_the_error_says_what_the_kernel_lacks() {
    let site = site("strict").await;
    let before = site.picture();
    let pod = site.pod("guarded");
    let add = site.call("ADD", &pod, json!({})).await;
    let answer: Value = serde_json::from_str(&add.stdout).unwrap();
    if has_vlans(&site.node) {
        assert!(add.ok, "{add:?}");
        let link = &ip(&site.node.0, &["-d", "link", "show", "vlan.eth.7"])[0];
        assert_eq!((&link["linkinfo"]["info_data"]["id"], &link["address"]), (&json!(7), &json!(BRANCH_MAC)));
        return;
    }
    assert!(!add.ok && answer["msg"].as_str().unwrap().contains("8021q"), "{answer}");
    assert!(answer["details"].as_str().unwrap().contains("add VLAN 7 as vlan.eth.7"), "{answer}");
    assert_eq!(site.picture(), before);
    assert_eq!(site.script.lock().unwrap().released.len(), 1);
}

/// The probe that the agent makes at its start says what the kernel does when it is asked in earnest, and makes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_probe_for_vlans_says_what_the_kernel_does() {
    let node = OwnedNetns::create("n");
    let links = ip(&node.0, &["link"]);
    let probed = has_vlans(&node);
    assert_eq!(ip(&node.0, &["link"]), links);
    run(&node.0, "ip link add eth1 type bridge");
    let made = node.0.output(std::process::Command::new("ip").args("link add link eth1 name v type vlan id 7".split(' '))).unwrap();
    assert_eq!(probed, made.status.success(), "{made:?}");
}

fn has_vlans(node: &OwnedNetns) -> bool {
    Netns::open(&node.0.path()).unwrap().run(|| Netlink::open().unwrap().has_vlans().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trunk_that_is_not_there_yet_is_waited_for_by_the_kubelet() {
    let site = site("strict").await;
    run(&site.node.0, "ip link del eth1");
    let before = site.picture();
    let add = site.call("ADD", &site.pod("guarded"), json!({})).await;
    let answer: Value = serde_json::from_str(&add.stdout).unwrap();
    assert!(answer["msg"].as_str().unwrap().contains(TRUNK_MAC) && answer["code"] == 11, "{answer}");
    assert_eq!(site.picture(), before);
}
