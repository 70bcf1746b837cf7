//! Damage to the host network: what the executor mends when it is asked, and what the healer mends by itself.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use std::collections::BTreeSet;
use std::sync::mpsc;

use cni_support::vpc::{INTERNET, PATIENCE, Vpc, seen_as};
use cni_support::{ip, run};
use serde_json::{Value, json};
use stanchion_lab::netns::Netns;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_damaged_by_hand_heals() {
    let vpc = Vpc::build().await;
    assert_eq!(vpc.heal().await, []);
    for damage in [
        "ip rule del pref 512 to 10.0.1.21",
        "ip rule del pref 1536",
        "ip rule del pref 1024",
        "ip rule del pref 1535",
        "ip rule del pref 32765",
        "ip rule add pref 512 to 10.0.7.7 lookup main",
        "ip rule add pref 1536 from 10.0.7.7 lookup 2",
        "ip rule add pref 32765 from 10.0.7.8 lookup 7",
        "ip route del default table 2",
        "ip route flush table 2",
        "ip route del 10.0.1.21",
        "ip route add 10.0.1.0/24 dev eth1",
        "ip addr add 10.0.1.99/24 dev eth1",
        "ip addr del 10.0.1.20/24 dev eth1",
        "ip link set eth1 mtu 1400",
        "ip link set eth0 mtu 1400",
        "ip link set eth1 down",
        "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
        "sysctl -qw net.ipv4.ip_forward=0",
        "nft flush chain ip stanchion source-nat",
        "nft insert rule ip stanchion source-nat return",
        "nft delete table ip stanchion",
        "nft flush ruleset",
    ] {
        run(&vpc.node.0, damage);
        let done = vpc.heal().await;
        assert_ne!(done, [], "{damage}: unnoticed");
        assert_eq!(seen_as(vpc.pod(1), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5", "after {damage}");
        assert_eq!(seen_as(vpc.pod(1), &vpc.router.0, "10.0.0.1:8080"), "10.0.1.21", "after {damage}");
    }
}

/// Everything that the plan is about, without what the kernel counts and numbers by itself.
fn picture(node: &Netns) -> Value {
    let mut addresses = ip(node, &["-4", "addr"]);
    for link in addresses.as_array_mut().unwrap() {
        let up = link["flags"].as_array().unwrap().contains(&json!("UP"));
        *link = json!([link["ifname"], link["mtu"], up, link["addr_info"][0]["local"], link["addr_info"][1]["local"]]);
    }
    let mut routes = ip(node, &["-4", "route", "show", "table", "all"]);
    routes.as_array_mut().unwrap().sort_by_key(Value::to_string);
    let sysctls: Vec<Value> = ["ip_forward", "conf/eth0/rp_filter"]
        .map(|name| node.run(|| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap()).unwrap())
        .map(Value::from)
        .to_vec();
    let nft = node.output(std::process::Command::new("nft").args(["-s", "list", "ruleset", "ip"])).unwrap();
    json!({
        "addresses": addresses, "routes": routes, "rules": ip(node, &["rule"]), "sysctls": sysctls,
        "nft": String::from_utf8(nft.stdout).unwrap(),
    })
}

/// A firewall that reloads as firewalld does: its own table goes and comes in one transaction.
const FIREWALL: &str = "add table inet firewalld; delete table inet firewalld; add table inet firewalld; \
    add chain inet firewalld forward { type filter hook forward priority 10; }; add rule inet firewalld forward ct state established accept";

/// The healer in the node's namespace, until `shutdown`; what it mends is heard.
fn healer(vpc: &Vpc, shutdown: &CancellationToken) -> (std::thread::JoinHandle<()>, mpsc::Receiver<&'static str>) {
    let (node, host, shutdown) = (vpc.node.0.clone(), vpc.host.clone(), shutdown.clone());
    let ((heard, healed), (started, listening)) = (mpsc::channel(), mpsc::channel());
    // It listens in the namespace of the thread that starts it.
    let inside = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let task = stanchion_daemon::cni::spawn_heal(host, move |subject| heard.send(subject).unwrap_or_default(), shutdown).unwrap();
            started.send(()).unwrap();
            task.await.unwrap();
        });
    };
    let thread = std::thread::spawn(move || node.run(inside).unwrap());
    listening.recv_timeout(PATIENCE).unwrap();
    (thread, healed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_heals_by_itself_within_seconds_and_is_reported() {
    let vpc = Vpc::build().await;
    let node = &vpc.node.0;
    let shutdown = CancellationToken::new();
    let (thread, healed) = healer(&vpc, &shutdown);
    let whole = picture(node);
    for (who, damage, what) in [
        ("a person", vec!["ip rule del pref 1024", "ip route del 10.0.1.21"], &["rule", "route"][..]),
        ("a person", vec!["nft flush chain ip stanchion source-nat"], &["nft"]),
        ("a reload of nftables", vec!["nft flush ruleset"], &["nft"]),
        ("NetworkManager", vec!["ip addr del 10.0.1.20/24 dev eth1", "ip rule del pref 32765"], &["address", "rule"]),
        ("NetworkManager", vec!["ip route flush table 2", "ip rule del pref 1536"], &["route", "rule"]),
        ("NetworkManager", vec!["ip link set eth1 down"], &["link", "route"]),
        ("NetworkManager", vec!["ip link set eth1 mtu 1400", "ip addr add 10.0.1.99/24 dev eth1"], &["link", "address"]),
        ("sysctl --system", vec!["sysctl -qw net.ipv4.conf.eth0.rp_filter=1", "sysctl -qw net.ipv4.ip_forward=0"], &["sysctl"]),
    ] {
        damage.iter().for_each(|line| run(node, line));
        let mends = || async {
            let now = picture(node);
            anyhow::ensure!(now == whole, "after {damage:?} by {who}: {now:#}\ninstead of {whole:#}");
            Ok(())
        };
        stanchion_lab::wait::wait_for("the healer", PATIENCE, mends).await.unwrap();
        let mut told = BTreeSet::new();
        while !what.iter().all(|what| told.contains(what)) {
            told.insert(healed.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{damage:?}: only {told:?} is told")));
        }
    }
    shutdown.cancel();
    thread.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_firewall_that_reloads_its_own_rules_is_left_alone() {
    let vpc = Vpc::build().await;
    let shutdown = CancellationToken::new();
    let (thread, healed) = healer(&vpc, &shutdown);
    for _ in 0..3 {
        run(&vpc.node.0, &format!("nft {FIREWALL}"));
        assert_eq!(seen_as(vpc.pod(1), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5");
    }
    // Ours is still watched: the first that is told is this, and the firewall's table is as it was left.
    run(&vpc.node.0, "nft delete table ip stanchion");
    assert_eq!(healed.recv_timeout(PATIENCE), Ok("nft"));
    assert!(picture(&vpc.node.0)["nft"].as_str().unwrap().contains("table ip stanchion"));
    run(&vpc.node.0, "nft list chain inet firewalld forward");
    shutdown.cancel();
    thread.join().unwrap();
    assert_eq!(healed.try_iter().collect::<Vec<_>>(), Vec::<&str>::new(), "nothing else was changed");
}
