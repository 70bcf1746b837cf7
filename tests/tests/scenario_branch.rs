//! Security groups for pods: real traffic by a branch ENI, with the real agent, plugin and policy.

use std::net::IpAddr;
use std::process::Command;

use anyhow::ensure;
use nix::sys::signal::Signal;
use serde_json::Value;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::netns::ip_json;
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Answer, PATIENCE, Protocol, probe};
use stanchion_lab::vpc::EXAMPLE_HOST;
use stanchion_lab::wait::wait_for;

const VLAN: u16 = 7;

/// Two nodes; on the first one a trunk, and the pod `x/guarded` with a branch.
async fn world(mode: &str) -> Cluster {
    let settings = [
        ("ENABLE_POD_ENI", "true"),
        ("POD_SECURITY_GROUP_ENFORCING_MODE", mode),
        ("DISABLE_TCP_EARLY_DEMUX", "true"),
        ("WARM_IP_TARGET", "2"),
    ];
    let mut cluster = Cluster::start(&["m5.large", "m5.large"], &settings).await.expect("the cluster starts");
    let node = cluster.node(0).clone();
    let trunk = cluster.vpc().attach_trunk(&node).await.expect("attached");
    let annotation = cluster.vpc().make_branch(&node, VLAN).await.expect("made");
    // Its ADD waits until the agent has seen the trunk.
    cluster.add_pod(0, PodSpec::new("x", "guarded").branch(&annotation)).await.expect("a pod with a branch");
    cluster.add_pod(0, PodSpec::new("x", "near")).await.expect("an ordinary pod beside it");
    cluster.add_pod(1, PodSpec::new("y", "far")).await.expect("an ordinary pod elsewhere");
    let enis = node.cli_json(&["enis"]).expect("answers");
    let shown =
        enis["enis"].as_array().expect("a list").iter().find(|eni| eni["id"] == trunk.as_str()).expect("the trunk is shown").clone();
    assert_eq!((&shown["role"], shown["total"].as_u64()), (&"trunk".into(), Some(0)));
    cluster
}

/// Counts the TCP packets to port 80 that the branch's interface brings.
fn count_on_branch(cluster: &Cluster) {
    let table = "table ip lab_count {\n counter seen { }\n chain early {\n type filter hook prerouting priority -400;\n \
                 iifname \"vlan.eth.7\" tcp dport 80 counter name seen\n }\n}";
    let output = cluster.node(0).netns().output(Command::new("nft").arg(table)).expect("runs");
    assert!(output.status.success(), "{output:?}");
}

fn seen_on_branch(cluster: &Cluster) -> u64 {
    let list = ["-j", "list", "counter", "ip", "lab_count", "seen"];
    let output = cluster.node(0).netns().output(Command::new("nft").args(list)).expect("runs");
    let listed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let counters = listed["nftables"].as_array().into_iter().flatten();
    counters.filter_map(|item| item["counter"]["packets"].as_u64()).sum()
}

async fn ask(cluster: &Cluster, from: &str, to: IpAddr) -> Answer {
    cluster.pod(from).probe(Protocol::Tcp, to, 80).await.expect("the socket works")
}

fn from_node(cluster: &Cluster, to: IpAddr) -> Answer {
    probe(cluster.node(0).netns(), Protocol::Tcp, (to, 80).into(), PATIENCE).expect("the socket works")
}

async fn pods_reach_each_other(cluster: &Cluster) {
    let guarded = cluster.pod("x/guarded").address();
    for other in ["x/near", "y/far"] {
        let address = cluster.pod(other).address();
        assert_eq!(ask(cluster, other, guarded).await, Answer::Reached { seen_as: address }, "{other} to it");
        assert_eq!(ask(cluster, "x/guarded", address).await, Answer::Reached { seen_as: guarded }, "it to {other}");
    }
    assert_eq!(cluster.vpc().refused().expect("counters").wrong_source, 0, "everything left by the ENI that has its source");
}

async fn policy_holds(cluster: &Cluster) {
    let guarded = cluster.pod("x/guarded").address();
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: x, name: p}\n\
                  spec: {podSelector: {matchLabels: {app: guarded}}, ingress: [{from: [{podSelector: {}}]}]}\n";
    cluster.vpc().manifests().apply("p.yaml", policy).expect("written");
    wait_for("only its own namespace to reach it", SOON, || async {
        ensure!(ask(cluster, "y/far", guarded).await != Answer::Reached { seen_as: cluster.pod("y/far").address() }, "y/far gets through");
        ensure!(ask(cluster, "x/near", guarded).await == Answer::Reached { seen_as: cluster.pod("x/near").address() }, "x/near does not");
        Ok(())
    })
    .await
    .expect("the policy holds on a branch pod");
    assert_eq!(from_node(cluster, guarded), Answer::Reached { seen_as: cluster.node(0).primary() }, "the kubelet always gets through");
    cluster.vpc().manifests().delete("p.yaml").expect("deleted");
    wait_for("all to reach it again", SOON, || async {
        ensure!(ask(cluster, "y/far", guarded).await == Answer::Reached { seen_as: cluster.pod("y/far").address() }, "y/far does not");
        Ok(())
    })
    .await
    .expect("without the policy all is open");
}

/// Foreign damage while a new agent, which knows the branch from the pod's annotation alone, runs.
async fn a_restarted_agent_heals(cluster: &mut Cluster, damage: &[&str]) {
    cluster.agent(0).expect("runs").kill().expect("killed");
    pods_reach_each_other(cluster).await;
    cluster.start_agent(0).await.expect("starts again");
    let node = cluster.node(0).netns().clone();
    let state = || Ok::<_, anyhow::Error>((rules(&node)?, ip_json(&node, &["route", "show", "table", "107"])?));
    let good = state().expect("read");
    // Stopped meanwhile, as it would have mended the first before the last was broken.
    cluster.agent(0).expect("runs").signal(Signal::SIGSTOP).expect("stops");
    for line in damage {
        let output = node.output(Command::new("ip").args(line.split(' '))).expect("runs");
        assert!(output.status.success(), "{line}: {output:?}");
    }
    assert_ne!(state().expect("read"), good);
    cluster.agent(0).expect("runs").signal(Signal::SIGCONT).expect("goes on");
    wait_for("the branch to be healed", SOON, || async {
        let now = state()?;
        ensure!(now == good, "{now:?} is not {good:?}");
        Ok(())
    })
    .await
    .expect("healed");
    pods_reach_each_other(cluster).await;
}

fn rules(node: &stanchion_lab::netns::Netns) -> anyhow::Result<Vec<String>> {
    let mut rules: Vec<String> = ip_json(node, &["rule"])?.as_array().into_iter().flatten().map(Value::to_string).collect();
    rules.sort();
    Ok(rules)
}

#[tokio::test(flavor = "multi_thread")]
async fn in_strict_mode_every_packet_passes_the_branch() {
    let mut cluster = world("strict").await;
    let guarded = cluster.pod("x/guarded").address();
    pods_reach_each_other(&cluster).await;
    count_on_branch(&cluster);
    assert_eq!(from_node(&cluster, guarded), Answer::Reached { seen_as: cluster.node(0).primary() });
    assert!(seen_on_branch(&cluster) > 0, "the node's own traffic too");
    // Nothing is translated: the branch has no public address, and a NAT gateway is not there.
    assert!(!matches!(ask(&cluster, "x/guarded", EXAMPLE_HOST.into()).await, Answer::Reached { .. }));
    assert!(cluster.vpc().refused().expect("counters").no_public_address > 0);
    policy_holds(&cluster).await;
    let damage = ["rule del pref 10 iif vlan.eth.7", "route flush table 107", "rule del pref 20"];
    a_restarted_agent_heals(&mut cluster, &damage).await;
    cluster.empty().await.expect("nothing of the pods stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_standard_mode_the_branch_carries_what_leaves_the_node() {
    let mut cluster = world("standard").await;
    let guarded = cluster.pod("x/guarded").address();
    pods_reach_each_other(&cluster).await;
    count_on_branch(&cluster);
    assert_eq!(from_node(&cluster, guarded), Answer::Reached { seen_as: cluster.node(0).primary() });
    assert_eq!(seen_on_branch(&cluster), 0, "what stays on the node does not");
    let answer = ask(&cluster, "x/guarded", EXAMPLE_HOST.into()).await;
    assert_eq!(answer, Answer::Reached { seen_as: cluster.node(0).public() }, "to the internet as any pod");
    policy_holds(&cluster).await;
    a_restarted_agent_heals(&mut cluster, &["rule del pref 1536", "route flush table 107"]).await;
    cluster.empty().await.expect("nothing of the pods stays");
}
