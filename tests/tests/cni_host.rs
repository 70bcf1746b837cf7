//! The host network in a real kernel: plans applied, beside kube-proxy's and aws-node's rules; traffic through the router of a VPC
//! that drops what comes from the wrong ENI.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use cni_support::vpc::{INTERNET, PATIENCE, Vpc, connect, echo, line, seen_as, serve};
use cni_support::{OwnedNetns, ip, run};
use serde_json::Value;
use stanchion_core::ids::Mac;
use stanchion_core::network::{Egress, HostNetwork as _, HostPlan, HostReport, NetOp, Randomize, Snat};
use stanchion_lab::netns::Netns;
use stanchion_netlink::{HostNet, nft};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_every_eni_reach_the_vpc_as_themselves_and_the_internet_as_the_node() {
    let vpc = Vpc::build().await;
    for (number, address) in ["10.0.0.9", "10.0.1.21"].into_iter().enumerate() {
        assert_eq!(seen_as(vpc.pod(number), &vpc.router.0, "10.0.0.1:8080"), address);
        assert_eq!(seen_as(vpc.pod(number), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5");
        assert_eq!(
            seen_as(&vpc.router.0, vpc.pod(number), &format!("{address}:8080")),
            "10.0.0.1".replace(".0.1", if number == 0 { ".0.1" } else { ".1.1" })
        );
        assert_eq!(seen_as(vpc.pod(number), vpc.pod(1 - number), &format!("{}:8080", ["10.0.1.21", "10.0.0.9"][number])), address);
        assert_eq!(seen_as(&vpc.node.0, vpc.pod(number), &format!("{address}:8080")), "10.0.0.5");
    }
    let rules = ip(&vpc.node.0, &["rule"]);
    let rules = rules.as_array().unwrap();
    let has = |priority: u64, field: &str, value: &str| rules.iter().any(|rule| rule["priority"] == priority && rule[field] == value);
    assert!(has(512, "dst", "10.0.0.9") && has(512, "dst", "10.0.1.21"));
    assert!(has(1536, "src", "10.0.1.21") && !has(1536, "src", "10.0.0.9"));
    assert!(has(1024, "fwmark", "0x80") && has(1535, "dst", "100.64.0.0") && has(32765, "src", "10.0.1.20"));
    let main = ip(&vpc.node.0, &["route", "show", "table", "main"]);
    assert!(!main.as_array().unwrap().iter().any(|route| route["dst"] == "10.0.1.0/24"), "{main}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn external_snat_shows_the_pods_own_address() {
    let mut vpc = Vpc::build().await;
    vpc.plan.snat = None;
    vpc.heal().await;
    for (number, address) in ["10.0.0.9", "10.0.1.21"].into_iter().enumerate() {
        assert_eq!(seen_as(vpc.pod(number), &vpc.router.0, &format!("{INTERNET}:8080")), address);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_connections_survive_a_change_of_the_table() {
    let mut vpc = Vpc::build().await;
    let to: SocketAddr = format!("{INTERNET}:8080").parse().unwrap();
    let serving = serve(&vpc.router.0, to);
    let mut stream = connect(vpc.pod(1), to);
    assert_eq!(line(&mut stream), "10.0.0.5");
    let changes: [fn(&mut HostPlan); 3] = [
        |plan| plan.snat.as_mut().unwrap().randomize = Randomize::No,
        |plan| plan.snat.as_mut().unwrap().bypass.push("172.16.0.0/12".parse().unwrap()),
        // Even when new connections are not translated any more.
        |plan| plan.snat.as_mut().unwrap().bypass.push("198.51.100.0/24".parse().unwrap()),
    ];
    for change in changes {
        change(&mut vpc.plan);
        let done = vpc.heal().await;
        assert!(matches!(done[..], [NetOp::Nft { .. }]), "{done:?}");
        echo(&mut stream, "still here");
    }
    drop(stream);
    serving.join().unwrap();
}

/// DNAT to pods as kube-proxy writes it, in its three ways of writing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_node_ports_leave_by_the_eni_that_the_request_came_in_on() {
    let vpc = Vpc::build().await;
    let dnat = |port: u16, pod: &str| format!("add rule ip kube nat tcp dport {port} fib daddr type local dnat to {pod}:8080;");
    let document = format!(
        "add table ip kube; add chain ip kube nat {{ type nat hook prerouting priority -100; }}; {}{}",
        dnat(30_080, "10.0.0.9"),
        dnat(30_081, "10.0.1.21")
    );
    let mut nft = std::process::Command::new("nft");
    assert!(vpc.node.0.output(nft.arg(document)).unwrap().status.success());
    // The client is in the VPC but not in the node's subnets, and beyond it: both must get answers by eth0, where the router expects the node's address.
    run(&vpc.router.0, "ip addr add 10.0.9.9/32 dev lo");
    for source in ["10.0.9.9", INTERNET] {
        for (pod, port) in [(0, 30_080u16), (1, 30_081)] {
            let address = ["10.0.0.9", "10.0.1.21"][pod];
            let serving = serve(vpc.pod(pod), format!("{address}:8080").parse().unwrap());
            let mut stream = connect_from(&vpc.router.0, source, &format!("10.0.0.5:{port}"));
            assert_eq!(line(&mut stream), source, "the pod sees the client itself");
            echo(&mut stream, "through");
            drop(stream);
            serving.join().unwrap();
        }
    }
    // Without the marks the pod on the second ENI answers by the wrong one: the test would see it.
    let without = HostPlan { node_port_support: false, ..vpc.plan.clone() };
    vpc.host.apply(&without).await.unwrap();
    let _serving = serve_until_dropped(vpc.pod(1), "10.0.1.21:8080");
    assert!(try_connect_from(&vpc.router.0, "10.0.9.9", "10.0.0.5:30081", Duration::from_millis(700)).is_none());
}

/// A Service with session affinity and a node port, as kube-proxy's iptables mode writes it.
const AFFINITY: &str = "*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30082 -j KUBE-SVC-A
-A KUBE-SVC-A -m recent --name KUBE-SEP-A --rcheck --seconds 10800 --reap -j KUBE-SEP-A
-A KUBE-SVC-A -m recent --name KUBE-SEP-B --rcheck --seconds 10800 --reap -j KUBE-SEP-B
-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
-A KUBE-SVC-A -j KUBE-SEP-B
-A KUBE-SEP-A -p tcp -m recent --name KUBE-SEP-A --set -m tcp -j DNAT --to-destination 10.0.0.9:8080
-A KUBE-SEP-B -p tcp -m recent --name KUBE-SEP-B --set -m tcp -j DNAT --to-destination 10.0.1.21:8080
COMMIT
";

/// Feeds a table to one of the `iptables-*-restore` tools in the node.
fn restore(node: &Netns, tool: &str, document: &str) {
    let mut command = std::process::Command::new(tool);
    command.arg("--noflush").stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = node.spawn(&mut command).unwrap_or_else(|error| panic!("{tool}: {error}: apt-get install iptables"));
    child.stdin.take().unwrap().write_all(document.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Serves `pod` until the test ends: each connection hears the pod's name.
fn serve_name(netns: &Netns, address: &str, name: &'static str) {
    let listener = serve_until_dropped(netns, address);
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // A client that went away is none of the server's business.
            let _ = stream.write_all(format!("{name}\n").as_bytes());
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_affinity_holds_for_pods_of_any_eni_in_both_iptables() {
    for tool in ["/usr/sbin/iptables-nft-restore", "/usr/sbin/iptables-legacy-restore"] {
        let vpc = Vpc::build().await;
        restore(&vpc.node.0, tool, AFFINITY);
        serve_name(vpc.pod(0), "10.0.0.9:8080", "A");
        serve_name(vpc.pod(1), "10.0.1.21:8080", "B");
        let mut met = std::collections::BTreeSet::new();
        for client in 1..=12 {
            let source = format!("10.0.9.{client}");
            run(&vpc.router.0, &format!("ip addr add {source}/32 dev lo"));
            let names: Vec<String> = (0..3).map(|_| line(&mut connect_from(&vpc.router.0, &source, "10.0.0.5:30082"))).collect();
            assert!(names.iter().all(|name| *name == names[0]), "{tool}: {source} was served by {names:?}");
            met.insert(names[0].clone());
        }
        assert_eq!(met.len(), 2, "{tool}: twelve clients and one server");
    }
}

fn connect_from(netns: &Netns, source: &str, to: &str) -> TcpStream {
    let stream = try_connect_from(netns, source, to, PATIENCE).unwrap_or_else(|| panic!("{source} -> {to}: no answer"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn try_connect_from(netns: &Netns, source: &str, to: &str, patience: Duration) -> Option<TcpStream> {
    let source = SocketAddr::new(source.parse::<IpAddr>().unwrap(), 0);
    let to: SocketAddr = to.parse().unwrap();
    let connecting = async move {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(source).unwrap();
        tokio::time::timeout(patience, socket.connect(to)).await.ok()?.ok()
    };
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { connecting.await.map(|stream| stream.into_std().unwrap()) })
    };
    let stream = netns.run(run).unwrap()?;
    stream.set_nonblocking(false).unwrap();
    Some(stream)
}

fn serve_until_dropped(netns: &Netns, address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().unwrap();
    netns.run(|| TcpListener::bind(address)).unwrap().unwrap()
}

/// aws-node's rules as iptables-nft and its own nft code write them, next to kube-proxy's.
const UPSTREAM: &str = "
add table ip nat
add chain ip nat POSTROUTING { type nat hook postrouting priority 100; }
add chain ip nat KUBE-POSTROUTING
add chain ip nat AWS-SNAT-CHAIN-0
add rule ip nat POSTROUTING counter jump KUBE-POSTROUTING
add rule ip nat POSTROUTING counter jump AWS-SNAT-CHAIN-0
add rule ip nat AWS-SNAT-CHAIN-0 ip daddr 10.0.0.0/16 return
add rule ip nat AWS-SNAT-CHAIN-0 fib daddr type != local snat to 10.0.0.5
add table ip aws-cni
add chain ip aws-cni nat-prerouting { type nat hook prerouting priority -90; }
add chain ip aws-cni snat-mark
add rule ip aws-cni nat-prerouting iifname eni* jump snat-mark
add rule ip aws-cni nat-prerouting ct mark and 0x80 == 0x80 meta mark set 0x80
add rule ip aws-cni snat-mark ip daddr 10.0.0.0/16 return
add rule ip aws-cni snat-mark ct mark set ct mark or 0x80
add table ip mangle
add chain ip mangle PREROUTING { type filter hook prerouting priority -150; }
add rule ip mangle PREROUTING iifname eni* ct mark and 0x80 == 0x80 meta mark set 0x80
";

fn upstream_rules(node: &Netns) {
    let mut nft = std::process::Command::new("nft");
    let output = node.output(nft.arg(UPSTREAM)).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn ruleset(node: &Netns) -> String {
    let output = node.output(std::process::Command::new("nft").args(["list", "ruleset"])).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_taken_over_from_aws_node_without_losing_a_connection() {
    // As aws-node leaves a node: its rules, and none of ours.
    let vpc = Vpc::build().await;
    run(&vpc.node.0, "nft delete table ip stanchion");
    upstream_rules(&vpc.node.0);
    let to: SocketAddr = format!("{INTERNET}:8080").parse().unwrap();
    let serving = serve(&vpc.router.0, to);
    let mut stream = connect(vpc.pod(1), to);
    assert_eq!(line(&mut stream), "10.0.0.5");

    let host = HostNet::open_in(stanchion_netlink::Netns::open(&vpc.node.0.path()).unwrap()).unwrap();
    let report = host.apply(&vpc.plan).await.unwrap();
    assert_eq!(report.failed, []);
    assert!(matches!(report.applied[..], [NetOp::Nft { .. }]), "one transaction: {:?}", report.applied);
    let rules = ruleset(&vpc.node.0);
    assert!(!rules.contains("AWS-") && !rules.contains("aws-cni"), "{rules}");
    assert!(rules.contains("jump KUBE-POSTROUTING") && rules.contains("stanchion"), "{rules}");
    echo(&mut stream, "still here");
    drop(stream);
    serving.join().unwrap();
    assert_eq!(host.apply(&vpc.plan).await.unwrap(), HostReport::default());
    assert_eq!(seen_as(vpc.pod(1), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_egress_chains_of_aws_nodes_pods_go_with_their_pods() {
    let vpc = Vpc::build().await;
    let node = &vpc.node.0;
    // As its egress plugin leaves them: one pod lives, the other ended while nobody looked.
    run(node, "ip link add lives type bridge");
    run(node, "ip link set lives up");
    run(node, "ip route add 169.254.172.2 dev lives");
    for (address, chain) in [("169.254.172.2", "CNI-E4-aaaa"), ("169.254.172.3", "CNI-E4-bbbb")] {
        run(node, &format!("iptables-nft -t nat -N {chain}"));
        run(node, &format!("iptables-nft -t nat -A {chain} -d 224.0.0.0/4 -j ACCEPT"));
        run(node, &format!("iptables-nft -t nat -A {chain} -j SNAT --to-source 10.0.0.5 --random-fully"));
        run(node, &format!("iptables-nft -t nat -A POSTROUTING -s {address} -m comment --comment egress -j {chain}"));
    }
    let host = HostNet::open_in(stanchion_netlink::Netns::open(&node.path()).unwrap()).unwrap();
    assert_eq!(host.apply(&vpc.plan).await.unwrap().failed, []);
    let rules = ruleset(node);
    assert!(rules.contains("jump CNI-E4-aaaa") && !rules.contains("CNI-E4-bbbb"), "{rules}");
    run(node, "ip link del lives");
    assert_eq!(host.apply(&vpc.plan).await.unwrap().failed, []);
    assert!(!ruleset(node).contains("CNI-E4"), "{}", ruleset(node));
    assert_eq!(host.apply(&vpc.plan).await.unwrap(), HostReport::default());
}

/// What aws-node before nft wrote, and kube-proxy's beside it.
const LEGACY: &str = "*nat
:AWS-CONNMARK-CHAIN-0 - [0:0]
:AWS-SNAT-CHAIN-0 - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0
-A AWS-CONNMARK-CHAIN-0 -d 10.0.0.0/16 -m comment --comment \"AWS CONNMARK CHAIN, VPC CIDR\" -j RETURN
-A AWS-CONNMARK-CHAIN-0 -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --set-xmark 0x80/0x80
-A AWS-SNAT-CHAIN-0 -d 10.0.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j RETURN
-A AWS-SNAT-CHAIN-0 ! -o vlan+ -m comment --comment \"AWS, SNAT\" -m addrtype ! --dst-type LOCAL -j SNAT --to-source 10.0.0.5 --random-fully
COMMIT
*mangle
-A PREROUTING -i eth0 -m comment --comment \"AWS, primary ENI\" -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i eni+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_in_iptables_legacy_are_taken_over_too() {
    let vpc = Vpc::build().await;
    run(&vpc.node.0, "nft delete table ip stanchion");
    restore(&vpc.node.0, "/usr/sbin/iptables-legacy-restore", LEGACY);
    let to: SocketAddr = format!("{INTERNET}:8080").parse().unwrap();
    let serving = serve(&vpc.router.0, to);
    let mut stream = connect(vpc.pod(1), to);
    assert_eq!(line(&mut stream), "10.0.0.5", "aws-node's rules work as they stand here");

    let host = HostNet::open_in(stanchion_netlink::Netns::open(&vpc.node.0.path()).unwrap()).unwrap();
    let report = host.apply(&vpc.plan).await.unwrap();
    assert_eq!(report.failed, []);
    let kinds: Vec<&str> = report.applied.iter().map(|op| if matches!(op, NetOp::Legacy { .. }) { "theirs" } else { "ours" }).collect();
    assert_eq!(kinds, ["ours", "theirs", "theirs"], "never a moment without");
    let saved = vpc.node.0.output(&mut std::process::Command::new("/usr/sbin/iptables-legacy-save")).unwrap().stdout;
    let saved = String::from_utf8(saved).unwrap();
    assert!(!saved.contains("AWS"), "{saved}");
    assert!(saved.contains("-j KUBE-POSTROUTING"), "{saved}");
    echo(&mut stream, "still here");
    drop(stream);
    serving.join().unwrap();
    assert_eq!(host.apply(&vpc.plan).await.unwrap(), HostReport::default());
    assert_eq!(seen_as(vpc.pod(1), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn egress_of_the_second_family_leaves_with_the_nodes_address_and_lets_nothing_in() {
    let mut vpc = Vpc::build().await;
    // A pod of an IPv6 cluster: its IPv4 is the node's own business.
    vpc.add_pod("169.254.172.2", 0);
    vpc.plan.pods.pop();
    let range = stanchion_core::network::egress::EgressFamily::V4.range();
    vpc.plan.egress = Some(Egress { range, to: "10.0.0.5".parse().unwrap(), randomize: Randomize::Fully });
    vpc.plan.ipv6 = true;
    vpc.plan.snat = None;
    vpc.heal().await;
    for to in ["10.0.0.1:8080".to_owned(), format!("{INTERNET}:8080")] {
        assert_eq!(seen_as(vpc.pod(2), &vpc.router.0, &to), "10.0.0.5", "to {to}");
    }
    let _listening = serve_until_dropped(vpc.pod(2), "169.254.172.2:8080");
    run(&vpc.router.0, "ip route add 169.254.172.0/22 via 10.0.0.5");
    let refused = try_connect_from(&vpc.router.0, "10.0.0.1", "169.254.172.2:8080", Duration::from_secs(1));
    assert!(refused.is_none(), "nobody may open a connection to an egress address");
    // Another agent takes the node over: it has rules of its own, but none for this pod.
    vpc.plan.ipv6 = false;
    vpc.plan.snat = Some(Snat { to: "10.0.0.5".parse().unwrap(), bypass: Vec::new(), randomize: Randomize::Fully });
    vpc.heal().await;
    assert!(ruleset(&vpc.node.0).contains("source-nat"));
    assert_eq!(vpc.node.0.run(nft::remove_from_host).unwrap(), Ok(Some(true)));
    let left = ruleset(&vpc.node.0);
    assert!(left.contains("egress-nat") && !left.contains("source-nat") && !left.contains("mark-"), "{left}");
    assert_eq!(seen_as(vpc.pod(2), &vpc.router.0, &format!("{INTERNET}:8080")), "10.0.0.5");
    // Off again: nothing of it stays.
    vpc.plan.egress = None;
    vpc.heal().await;
    assert!(!ruleset(&vpc.node.0).contains("egress-"), "{}", ruleset(&vpc.node.0));
    assert_eq!(vpc.node.0.run(nft::remove_from_host).unwrap(), Ok(Some(false)));
    assert!(!ruleset(&vpc.node.0).contains("table ip stanchion"));
    assert_eq!(vpc.node.0.run(nft::remove_from_host).unwrap(), Ok(None), "there is none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_egress_has_a_table_of_its_own_that_heals() {
    let mut vpc = Vpc::build().await;
    let range = stanchion_core::network::egress::EgressFamily::V6.range();
    vpc.plan.egress = Some(Egress { range, to: "2001:db8::5".parse().unwrap(), randomize: Randomize::No });
    vpc.heal().await;
    let rules = ruleset(&vpc.node.0);
    assert!(rules.contains("table ip6 stanchion") && rules.contains("snat to 2001:db8::5"), "{rules}");
    run(&vpc.node.0, "nft flush chain ip6 stanchion egress-nat");
    assert!(matches!(vpc.heal().await[..], [NetOp::Nft { .. }]));
    vpc.plan.egress = None;
    vpc.heal().await;
    assert!(!ruleset(&vpc.node.0).contains("ip6 stanchion"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_interface_is_reported_and_the_rest_is_done() {
    let mut vpc = Vpc::build().await;
    let mut later = vpc.plan.enis[1].clone();
    later.mac = Mac([2, 0, 0, 0, 9, 9]);
    vpc.plan.enis.push(later);
    run(&vpc.node.0, "ip rule del pref 1024");
    let report = vpc.apply().await;
    assert_eq!(report.missing, [Mac([2, 0, 0, 0, 9, 9])]);
    assert_eq!(report.applied.len(), 1);
}

#[test]
fn the_oracle_reads_json() {
    let netns = OwnedNetns::create("o");
    let links: Value = ip(&netns.0, &["link"]);
    assert_eq!(links[0]["ifname"], "lo");
}
