//! A node changes from aws-node to stanchion and back while pods talk: no address changes and no connection breaks.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use rusqlite::Connection;
use serde_json::{Value, json};
use stanchion_core::conflist::{FILE_NAME, Owner, owner};
use stanchion_core::ids::PodName;
use stanchion_core::network::host_veth_name;
use stanchion_core::network::names::upstream_dummy_name;
use stanchion_lab::cloudwatch::Delivered;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::container_log::Output;
use stanchion_lab::datapath::raw::Yardstick;
use stanchion_lab::netns::{Netns, ip_json};
use stanchion_lab::node::Node;
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Conversation, Protocol};
use stanchion_lab::vpc::EXAMPLE_HOST;
use stanchion_lab::wait::wait_for;
use stanchion_netlink::Netlink;
use stanchion_netlink::tc::{TcHook, TcPlace, TcProgram};
use tokio::net::UnixListener;

/// How aws-node writes its rules; which way depends on the node's iptables and aws-node's age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Legacy,
    IptablesNft,
    OwnNftTable,
}

fn sh(netns: &Netns, script: &str) -> String {
    let output = netns.output(Command::new("/bin/sh").args(["-ec", script])).expect("a shell");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// aws-node's SNAT and marks for a node; `outbound` is where 1.20 and later differ.
fn write_upstream_rules(node: &Node, backend: Backend) {
    let primary = node.primary();
    let iptables = if backend == Backend::Legacy { "iptables-legacy" } else { "iptables-nft" };
    let snat = format!(
        "{iptables} -t nat -N AWS-SNAT-CHAIN-0
        {iptables} -t nat -A AWS-SNAT-CHAIN-0 -d 10.0.0.0/16 -m comment --comment 'AWS SNAT CHAIN' -j RETURN
        {iptables} -t nat -A AWS-SNAT-CHAIN-0 ! -o vlan+ -m comment --comment 'AWS, SNAT' -m addrtype ! --dst-type LOCAL -j SNAT --to-source {primary} --random-fully
        {iptables} -t nat -A POSTROUTING -m comment --comment 'AWS SNAT CHAIN' -j AWS-SNAT-CHAIN-0
        {iptables} -t mangle -A PREROUTING -i eth0 -m comment --comment 'AWS, primary ENI' -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
        {iptables} -t mangle -A PREROUTING -i eni+ -m comment --comment 'AWS, primary ENI' -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80"
    );
    sh(node.netns(), &snat);
    let outbound = match backend {
        Backend::OwnNftTable => "nft -f - <<END
add table ip aws-cni
add chain ip aws-cni nat-prerouting { type nat hook prerouting priority -90; }
add chain ip aws-cni snat-mark
add rule ip aws-cni nat-prerouting fib daddr type local return
add rule ip aws-cni nat-prerouting iifname \"eni*\" jump snat-mark
add rule ip aws-cni nat-prerouting ct mark and 0x80 == 0x80 meta mark set ct mark and 0x80
add rule ip aws-cni snat-mark ip daddr 10.0.0.0/16 return
add rule ip aws-cni snat-mark ct mark set ct mark or 0x80
END"
        .to_owned(),
        Backend::Legacy | Backend::IptablesNft => format!(
            "{iptables} -t nat -N AWS-CONNMARK-CHAIN-0
            {iptables} -t nat -A AWS-CONNMARK-CHAIN-0 -d 10.0.0.0/16 -m comment --comment 'AWS CONNMARK CHAIN, VPC CIDR' -j RETURN
            {iptables} -t nat -A AWS-CONNMARK-CHAIN-0 -m comment --comment 'AWS, CONNMARK' -j CONNMARK --set-xmark 0x80/0x80
            {iptables} -t nat -A PREROUTING -i eni+ -m comment --comment 'AWS, outbound connections' -j AWS-CONNMARK-CHAIN-0
            {iptables} -t nat -A PREROUTING -m comment --comment 'AWS, CONNMARK' -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80"
        ),
    };
    sh(node.netns(), &outbound);
}

fn upstream_rules(node: &Node) -> String {
    let all = sh(node.netns(), "iptables-legacy-save -t nat; iptables-legacy-save -t mangle; nft list ruleset 2>/dev/null");
    all.lines().filter(|line| line.contains("AWS-") || line.contains("aws-cni")).collect::<Vec<_>>().join("\n")
}

/// aws-node's configuration, written when it is ready, and its plugin; the other plugins that it brings are left out.
fn write_upstream_files(node: &Node) {
    let conflist = json!({
        "cniVersion": "0.4.0", "name": "aws-cni", "disableCheck": true,
        "plugins": [{"name": "aws-cni", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001", "podSGEnforcingMode": "strict"}],
    });
    for (directory, file, content) in
        [(node.cni_bin_dir(), "aws-cni", "aws-node's"), (node.cni_conf_dir(), FILE_NAME, conflist.to_string().as_str())]
    {
        std::fs::create_dir_all(&directory).expect("made");
        std::fs::write(directory.join(file), content).expect("written");
    }
}

fn conflist_owner(node: &Node) -> Owner {
    owner(&std::fs::read_to_string(node.cni_conf_dir().join(FILE_NAME)).expect("there"))
}

/// What is in the runtime's directory of plugins but `loopback`.
fn plugins(node: &Node) -> Vec<String> {
    let names = std::fs::read_dir(node.cni_bin_dir()).expect("there").flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name != "loopback").collect();
    names.sort();
    names
}

/// Takes away what aws-node would not have made: our table, our programs, our state.
fn forget_stanchion(node: &Node) {
    sh(node.netns(), "nft delete table ip stanchion");
    for link in ip_json(node.netns(), &["link"]).expect("links").as_array().expect("a list") {
        let name = link["ifname"].as_str().expect("a name");
        if name.starts_with("eni") {
            sh(node.netns(), &format!("tc qdisc del dev {name} clsact"));
        }
    }
    for file in std::fs::read_dir(node.state_dir()).expect("the state").flatten() {
        if file.path() != node.checkpoint() {
            std::fs::remove_file(file.path()).expect("removed");
        }
    }
    for pin in std::fs::read_dir(node.bpf_dir()).expect("the pins").flatten() {
        std::fs::remove_dir_all(pin.path()).expect("removed");
    }
}

/// What aws-node reads at its start and what its plugin relies on.
fn assert_adoptable(cluster: &Cluster, node: &Node) {
    let checkpoint: Value = serde_json::from_slice(&std::fs::read(node.checkpoint()).expect("a checkpoint")).expect("JSON");
    assert_eq!(checkpoint["version"], "vpc-cni-ipam/1");
    let rules = ip_json(node.netns(), &["rule"]).expect("rules");
    let has_rule = |priority: u64, key: &str, value: &str| {
        rules.as_array().expect("a list").iter().any(|rule| rule["priority"] == priority && rule[key] == value)
    };
    let mut held = BTreeMap::new();
    for allocation in checkpoint["allocations"].as_array().expect("a list") {
        for key in ["networkName", "containerID", "ifName", "ipv4", "allocationTimestamp", "metadata"] {
            assert!(!allocation[key].is_null(), "{key} of {allocation}");
        }
        held.insert(allocation["metadata"]["k8sPodName"].as_str().expect("a name").to_owned(), allocation["ipv4"].clone());
    }
    for (_, pod) in cluster.pods() {
        let (namespace, name) = pod.name().split_once('/').map(|(a, b)| (a.to_owned(), b.to_owned())).expect("two parts");
        let address = pod.address().to_string();
        assert_eq!(held.get(&name), Some(&json!(address)), "{}", pod.name());
        let veth = host_veth_name("eni", &PodName::new(namespace, name), 0);
        let routes = ip_json(node.netns(), &["route", "show", "table", "main", &address]).expect("routes");
        assert_eq!(routes[0]["dev"], veth.as_str(), "{}", pod.name());
        assert!(has_rule(512, "dst", &address), "{}", pod.name());
    }
    assert!(has_rule(1024, "fwmark", "0x80"));
}

/// Fluent Bit's database as it leaves it at its end: it read this file of the pod's so far.
fn write_fluent_bit_state(dir: &Path, log: &Path) {
    let database = Connection::open(dir.join("flb_container.db")).expect("made");
    let table = "CREATE TABLE in_tail_files (id INTEGER PRIMARY KEY, name TEXT NOT NULL, offset INTEGER, inode INTEGER, created INTEGER, rotated INTEGER DEFAULT 0)";
    database.execute(table, []).expect("made");
    let metadata = std::fs::metadata(log).expect("a log");
    let values = (log.to_str().expect("text"), metadata.len().cast_signed(), metadata.ino().cast_signed());
    database.execute("INSERT INTO in_tail_files (name, offset, inode, created) VALUES (?, ?, ?, 1795168800)", values).expect("a row");
    database.close().expect("closed");
}

async fn there_and_back(backend: Backend) {
    let fluent_bit = tempfile::tempdir().expect("a directory");
    let log_config = fluent_bit.path().join("logs.yaml");
    std::fs::write(&log_config, format!("fluent-bit-state: {}\n", fluent_bit.path().display())).expect("written");
    let log_config = log_config.display().to_string();
    let settings = [("WARM_IP_TARGET", "1"), ("STANCHION_LOG_FLUSH_SECONDS", "0.2"), ("STANCHION_LOG_CONFIG", &log_config)];
    let mut cluster = Cluster::start(&["t3.small"], &settings).await.expect("the cluster starts");
    // A t3.small's ENI holds three pods: the fourth and fifth are on a second one.
    for pod in 0..5 {
        cluster.add_pod(0, PodSpec::new("x", &format!("a-{pod}"))).await.expect("a pod");
    }
    let node = cluster.node(0).clone();
    cluster.agent(0).expect("started").kill().expect("killed");
    forget_stanchion(&node);
    write_upstream_rules(&node, backend);
    write_upstream_files(&node);
    assert_ne!(upstream_rules(&node), "");
    assert_adoptable(&cluster, &node);
    let [sent, unread] = ["sent by Fluent Bit", "written after its end"];
    let log = &mut cluster.pod_mut("x/a-0").log;
    log.line(Output::Stdout, sent).expect("written");
    write_fluent_bit_state(fluent_bit.path(), log.link());
    log.line(Output::Stdout, unread).expect("written");

    let addresses =
        |cluster: &Cluster| -> BTreeMap<String, IpAddr> { cluster.pods().map(|(_, pod)| (pod.name(), pod.address())).collect() };
    let before = addresses(&cluster);
    let internet = SocketAddr::new(EXAMPLE_HOST.into(), 80);
    let talking = || cluster.pods().filter(|(_, pod)| pod.name() != "x/a-1");
    let talks: Vec<Conversation> =
        talking().map(|(_, pod)| Conversation::start(pod.netns(), internet).expect("aws-node's rules carry it out")).collect();
    let inside = SocketAddr::new(before["x/a-4"], 80);
    let within = Conversation::start(cluster.pod("x/a-0").netns(), inside).expect("connected");

    // There. The init container first: it puts the plugin beside the old one and leaves the configuration alone.
    let (bin_dir, conf_dir) = (node.cni_bin_dir().display().to_string(), node.cni_conf_dir().display().to_string());
    node.cli(&["install", "--no-conflist", "--bin-dir", &bin_dir]).expect("every step holds");
    assert_eq!((plugins(&node), conflist_owner(&node)), (vec!["aws-cni".to_owned(), "stanchion-cni".to_owned()], Owner::AwsNode));
    cluster.start_agent(0).await.expect("it takes the node over");
    wait_for("the configuration", SOON, || async {
        ensure!(conflist_owner(&node) == Owner::Stanchion, "aws-node's");
        Ok(())
    })
    .await
    .expect("it is ours");
    assert!(node.cli(&["status"]).expect("a page").contains("addresses  ready"));
    wait_for("aws-node's rules to go", SOON, || async {
        let left = upstream_rules(&node);
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
    .await
    .expect("taken over");
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("all pairs talk");
    let served = node.cli_json(&["ips"]).expect("the addresses").to_string();
    assert!(before.values().all(|address| served.contains(&address.to_string())), "{served}");
    // A pod that aws-node made goes by aws-node's result; another comes and gets an address of its own.
    let old = cluster.pod("x/a-1");
    let (name, sandbox) = (PodName::new("x", "a-1"), node.sandbox(old));
    let host_if = host_veth_name("eni", &name, 0);
    let result = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": host_if}, {"name": "eth0", "sandbox": sandbox.netns, "mac": "254"}, {"name": upstream_dummy_name(&name), "mac": "0", "sandbox": "0"}],
        "ips": [{"interface": 1, "address": format!("{}/32", old.address())}],
    });
    let gone = old.address();
    let reply = node.plugin("DEL", &sandbox, Some(&result)).expect("runs");
    assert!(reply.success, "{} {}", reply.json, reply.stderr);
    let rules = ip_json(node.netns(), &["rule"]).expect("rules").to_string();
    assert!(!rules.contains(&format!("\"{gone}\"")), "{rules}");
    cluster.add_pod(0, PodSpec::new("x", "new")).await.expect("a pod");
    assert!(!before.values().any(|address| *address == cluster.pod("x/new").address()), "a cooling or held address was given");

    let line = "a line of a new pod".to_owned();
    cluster.pod_mut("x/new").log.line(Output::Stdout, &line).expect("written");
    let delivered = || Delivered::read(cluster.vpc().cloud());
    wait_for("the lines", SOON, || async { delivered().exactly_once([line.clone(), unread.to_owned()]) }).await.expect("they arrive");
    assert!(delivered().find(sent).is_none(), "sent once more");

    // And back: our agent stops, aws-node writes its file and rules, ours go by the command that MIGRATION.md says.
    cluster.delete_pod("x/a-1").await.expect("the rest of it");
    let too_early = node.cli(&["install", "--remove", "--bin-dir", &bin_dir, "--conf-dir", &conf_dir]).expect_err("an agent serves");
    assert!(too_early.to_string().contains("end it first"), "{too_early}");
    let status = cluster.agent(0).expect("started").stop(SOON).await.expect("it stops");
    assert!(status.success(), "{status}");
    assert_adoptable(&cluster, &node);
    let pins = node.bpf_dir().display().to_string();
    let remove = || node.cli(&["install", "--remove", "--bin-dir", &bin_dir, "--conf-dir", &conf_dir, "--bpf-dir", &pins]);
    write_upstream_rules(&node, backend);
    write_upstream_files(&node);
    write_upstream_programs(&node, &["a-0"]);
    assert!(filters(&node, "a-2").contains("pod_ingress"));
    let removed = remove().expect("every step holds");
    assert!(removed.contains("taken from 5 interfaces") && removed.contains("our table was removed"), "{removed}");
    assert!(filters(&node, "a-0").contains("handle_ingress") && !filters(&node, "a-0").contains("pod_"), "{}", filters(&node, "a-0"));
    assert_eq!((filters(&node, "a-2"), node.bpf_dir().exists()), (String::new(), false));
    assert_eq!((plugins(&node), conflist_owner(&node)), (vec!["aws-cni".to_owned()], Owner::AwsNode));
    assert!(!sh(node.netns(), "nft list tables").contains("stanchion"));
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("all pairs talk");
    for talk in talks.into_iter().chain([within]) {
        let talk = talk.stop();
        assert_eq!(talk.broken, None, "{talk:?}");
        assert!(talk.exchanges > 20 && talk.longest < Duration::from_secs(3), "{talk:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_iptables_nft_and_back() {
    there_and_back(Backend::IptablesNft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_iptables_legacy_and_back() {
    there_and_back(Backend::Legacy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_aws_nodes_own_nft_table_and_back() {
    there_and_back(Backend::OwnNftTable).await;
}

/// Both DaemonSets' pods live for aws-node's grace period, in which it goes on starting pods.
#[tokio::test(flavor = "multi_thread")]
async fn while_aws_node_still_serves_nothing_is_taken_over() {
    let mut cluster = Cluster::start(&["t3.small"], &[]).await.expect("the cluster starts");
    for pod in ["early", "late"] {
        cluster.add_pod(0, PodSpec::new("x", pod)).await.expect("a pod");
    }
    let node = cluster.node(0).clone();
    cluster.agent(0).expect("started").kill().expect("killed");
    forget_stanchion(&node);
    write_upstream_files(&node);
    let after: Value = serde_json::from_slice(&std::fs::read(node.checkpoint()).expect("a checkpoint")).expect("JSON");
    let mut before = after.clone();
    let held = before["allocations"].as_array_mut().expect("a list");
    held.retain(|allocation| allocation["metadata"]["k8sPodName"] != "late");
    assert_eq!(held.len(), 1);
    std::fs::write(node.checkpoint(), before.to_string()).expect("written");
    let aws_node = UnixListener::bind(node.checkpoint().with_file_name("ipamd.sock")).expect("bound");
    let mut agent = node.start_agent(&[]).expect("started");
    for _ in 0..3 {
        let asked = tokio::time::timeout(SOON, aws_node.accept())
            .await
            .unwrap_or_else(|_| panic!("it asks whether aws-node serves: {}", agent.tail()));
        drop(asked.expect("accepted"));
    }
    node.cli(&["status"]).expect_err("nothing of it serves");
    std::fs::write(node.checkpoint(), after.to_string()).expect("written");
    assert_eq!(conflist_owner(&node), Owner::AwsNode);
    drop(aws_node);
    node.ready(&mut agent, SOON).await.expect("it takes the node over");
    let served = node.cli_json(&["ips"]).expect("the addresses").to_string();
    for (_, pod) in cluster.pods() {
        assert!(served.contains(&pod.name().replace("x/", "")) && served.contains(&pod.address().to_string()), "{} {served}", pod.name());
    }
    assert!(agent.stop(SOON).await.expect("it stops").success());
}

/// Given to aws-node and taken back before the machine was started anew: our files are there, and say nothing of what it did.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_from_aws_node_is_taken_over_as_the_first_time() {
    let mut cluster = Cluster::start(&["t3.small"], &[]).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "a")).await.expect("a pod");
    let node = cluster.node(0).clone();
    assert!(cluster.agent(0).expect("started").stop(SOON).await.expect("it stops").success());
    assert!(node.checkpoint().with_file_name("stanchion-cooling.json").exists());
    node.cli(&["install", "--no-conflist", "--bin-dir", &node.cni_bin_dir().display().to_string()]).expect("every step holds");
    std::fs::create_dir_all(node.cni_conf_dir()).expect("made");
    let waits = || {
        let output = std::fs::read_to_string(node.agent_output()).expect("what the agents said");
        output.matches("waiting until EC2 shows what the agent before gave back").count()
    };
    for (back, waited) in [(false, 0), (true, 1), (false, 1)] {
        if back {
            write_upstream_files(&node);
        }
        let mut agent = node.start_agent(&[]).expect("started");
        node.ready(&mut agent, SOON).await.expect("it is ready");
        wait_for("the configuration", SOON, || async {
            ensure!(owner(&std::fs::read_to_string(node.cni_conf_dir().join(FILE_NAME))?) == Owner::Stanchion, "aws-node's");
            Ok(())
        })
        .await
        .expect("it is ours");
        assert_eq!(waits(), waited, "back from aws-node: {back}");
        assert!(agent.stop(SOON).await.expect("it stops").success());
    }
}

/// aws-network-policy-agent's filters on a pod's veth, and its pins; its programs let everything pass, as for a pod without policy.
fn write_upstream_programs(node: &Node, pods: &[&str]) {
    let program = Yardstick::empty().expect("it returns TC_ACT_OK");
    let place = TcPlace { priority: 1, handle: 1 };
    let programs = [(TcHook::Ingress, "handle_egress"), (TcHook::Egress, "handle_ingress")];
    for pod in pods {
        let veth = host_veth_name("eni", &PodName::new("x", *pod), 0);
        let programs = programs.map(|(hook, name)| TcProgram { hook, program: program.as_fd(), name });
        let attached = node.netns().run(|| {
            let mut netlink = Netlink::open().expect("netlink");
            let index = netlink.link_index(&veth).expect("the veth");
            netlink.attach_programs(index, place, &programs)
        });
        assert!(attached.expect("entered").expect("attached"));
    }
    std::fs::create_dir_all(upstream_pins(node).join("maps")).expect("made");
}

fn upstream_pins(node: &Node) -> PathBuf {
    node.bpf_dir().parent().expect("the root of pins").join("globals/aws")
}

fn filters(node: &Node, pod: &str) -> String {
    let veth = host_veth_name("eni", &PodName::new("x", pod), 0);
    sh(node.netns(), &format!("tc filter show dev {veth} ingress; tc filter show dev {veth} egress"))
}

/// They were never activated, and aws-network-policy-agent's programs decide by what it knew last.
#[tokio::test(flavor = "multi_thread")]
async fn pods_that_aws_node_connected_are_under_policy() {
    let mut cluster = Cluster::start(&["m5.large"], &[]).await.expect("the cluster starts");
    for pod in ["a", "b", "c"] {
        cluster.add_pod(0, PodSpec::new("x", pod).ports(&[80])).await.expect("a pod");
    }
    let node = cluster.node(0).clone();
    cluster.agent(0).expect("started").kill().expect("killed");
    forget_stanchion(&node);
    write_upstream_rules(&node, Backend::IptablesNft);
    write_upstream_files(&node);
    write_upstream_programs(&node, &["a", "b"]);
    let nothing_in = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: x, name: p}\n\
                      spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress]}\n";
    cluster.vpc().manifests().apply("p.yaml", nothing_in).expect("written");
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("aws-network-policy-agent's programs decide");
    let opened = |to: SocketAddr| Conversation::start(cluster.pod("x/a").netns(), to).expect("connected");
    let talks = [opened((cluster.pod("x/c").address(), 80).into()), opened((EXAMPLE_HOST, 80).into())];

    cluster.start_agent(0).await.expect("it takes the node over");
    cluster.settles(Protocol::Tcp, 80, |_, to| to != "x/a").await.expect("the policy is in force");
    wait_for("aws-network-policy-agent's programs to go", SOON, || async {
        let left: Vec<String> = ["a", "b", "c"].map(|pod| filters(&node, pod)).into();
        ensure!(left.iter().all(|filters| filters.contains("pod_ingress") && filters.contains("pod_egress")), "{left:?}");
        ensure!(left.iter().all(|filters| !filters.contains("handle_")), "{left:?}");
        ensure!(!upstream_pins(&node).exists(), "its pins are there");
        Ok(())
    })
    .await
    .expect("ours are in force");
    for talk in talks {
        let talk = talk.stop();
        assert_eq!(talk.broken, None, "x/a opened it before: {talk:?}");
    }

    // Once more for a pod that is policed already: what it opens meanwhile, ours do not see.
    let denied = || {
        let endpoints = node.cli_json(&["endpoints"]).expect("the endpoints");
        let of_a = endpoints["endpoints"].as_array().expect("a list").iter().find(|endpoint| endpoint["pod"]["name"] == "a").cloned();
        of_a.expect("x/a").pointer("/counters/ingress_denied/packets").and_then(Value::as_u64).expect("a count")
    };
    let before = denied();
    assert!(before > 0);
    cluster.agent(0).expect("started").kill().expect("killed");
    write_upstream_programs(&node, &["a"]);
    let talk = Conversation::start(cluster.pod("x/a").netns(), (cluster.pod("x/c").address(), 80).into()).expect("connected");
    cluster.start_agent(0).await.expect("it is back");
    wait_for("aws-network-policy-agent's programs to go", SOON, || async {
        ensure!(!filters(&node, "a").contains("handle_"), "they are there");
        Ok(())
    })
    .await
    .expect("ours are in force");
    let so_far = talk.exchanges();
    wait_for("the connection to go on", SOON, || async {
        ensure!(talk.exchanges() > so_far + 10, "{} exchanges", talk.exchanges());
        Ok(())
    })
    .await
    .expect("it was read from the kernel");
    assert_eq!((talk.stop().broken, denied()), (None, before));

    cluster.vpc().manifests().delete("p.yaml").expect("deleted");
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("a policy that goes is followed too");
    // Its end is known by its sandbox.
    let endpoints = || node.cli_json(&["endpoints"]).expect("the endpoints").to_string();
    assert!(endpoints().contains(cluster.pod("x/b").uid()), "{}", endpoints());
    let uid = cluster.pod("x/b").uid().to_owned();
    cluster.delete_pod("x/b").await.expect("deleted");
    assert!(!endpoints().contains(&uid), "{}", endpoints());
}
