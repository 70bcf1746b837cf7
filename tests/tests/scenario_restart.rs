//! The agent is killed, stopped and started again: pods notice nothing and nothing is lost or given twice.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Conversation, Protocol};
use stanchion_lab::wait::wait_for;

const ONLY_B: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-b}
spec: {podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
";

fn allowed(from: &str, to: &str) -> bool {
    !to.starts_with("x/a") || from.starts_with("x/b")
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_and_policy_outlive_the_agent() {
    let mut cluster = Cluster::start(&["t3.small", "m5.large"], &[("WARM_IP_TARGET", "1")]).await.expect("the cluster starts");
    cluster.vpc().manifests().apply("p.yaml", ONLY_B).expect("written");
    for (node, name) in [(0, "a-0"), (0, "c-0"), (0, "c-1"), (0, "a-1"), (1, "b-0"), (1, "c-2")] {
        cluster.add_pod(node, PodSpec::new("x", name)).await.expect("a pod");
    }
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    let talks: Vec<Conversation> = ["x/a-0", "x/a-1"]
        .map(|to| {
            let to = SocketAddr::new(cluster.pod(to).address(), 80);
            Conversation::start(cluster.pod("x/b-0").netns(), to).expect("connected")
        })
        .into();
    for round in 0..3 {
        cluster.agent(0).expect("started").kill().expect("killed");
        cluster.settles(Protocol::Tcp, 80, allowed).await.unwrap_or_else(|error| panic!("round {round}, dead: {error:#}"));
        cluster.start_agent(0).await.expect("it starts again");
        cluster.settles(Protocol::Tcp, 80, allowed).await.unwrap_or_else(|error| panic!("round {round}, back: {error:#}"));
    }
    for talk in talks {
        let talk = talk.stop();
        assert_eq!(talk.broken, None);
        assert!(talk.exchanges > 100, "{talk:?}");
        assert!(talk.longest < Duration::from_secs(3), "{talk:?}");
    }
    // The policy goes on following the manifests.
    cluster.vpc().manifests().delete("p.yaml").expect("deleted");
    cluster.settles(Protocol::Tcp, 80, |_, _| true).await.expect("open");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_among_starting_pods_it_gives_no_address_twice() {
    let mut cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "2")]).await.expect("the cluster starts");
    let node = cluster.node(0).clone();
    let mut running = Vec::new();
    for round in 0..4 {
        let starts: Vec<_> = (0..4)
            .map(|pod| {
                let (node, spec) = (node.clone(), PodSpec::new("x", &format!("r{round}-{pod}")));
                tokio::spawn(async move { node.add_pod(spec).await })
            })
            .collect();
        // Some are served before the kill, some fail, some wait for the next agent; the runtime would try again.
        while node.cli_json(&["status"]).is_ok_and(|_| starts.iter().all(|start| !start.is_finished())) {
            tokio::task::yield_now().await;
        }
        cluster.agent(0).expect("started").kill().expect("killed");
        cluster.start_agent(0).await.expect("it starts again");
        for start in starts {
            running.extend(start.await.expect("no panic"));
        }
    }
    let addresses: Vec<IpAddr> = running.iter().map(|pod| pod.address()).collect();
    assert!(!addresses.is_empty());
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len(), "{addresses:?}");
    for pod in running {
        node.delete_pod(pod).await.expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_deleted_while_the_agent_is_down_is_released_when_it_is_back() {
    let mut cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "2")]).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "a")).await.expect("a pod");
    cluster.agent(0).expect("started").kill().expect("killed");
    cluster.delete_pod("x/a").await.expect("DEL works without the agent");
    cluster.start_agent(0).await.expect("it starts again");
    wait_for("the release", SOON, || async {
        let left = cluster.leftovers()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
    .expect("nothing of the pod stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_takes_nothing_away() {
    let mut cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "2")]).await.expect("the cluster starts");
    cluster.vpc().manifests().apply("p.yaml", ONLY_B).expect("written");
    for name in ["a", "b", "c"] {
        cluster.add_pod(0, PodSpec::new("x", name)).await.expect("a pod");
    }
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    let status = cluster.agent(0).expect("started").stop(SOON).await.expect("it stops");
    assert!(status.success(), "{status}");
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy still holds");
}

/// As with a DaemonSet whose new pod comes before the old one ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_gives_way_to_the_first() {
    let mut cluster = Cluster::start(&["t3.small"], &[]).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "a")).await.expect("a pod");
    let node = cluster.node(0).clone();
    let held = std::fs::metadata(node.checkpoint()).and_then(|file| file.modified()).expect("a checkpoint");
    let mut second = node.start_agent(&[]).expect("started");
    let status = wait_for("the second agent to end", SOON, || {
        let ended = second.ended();
        async { ended?.context("it still runs") }
    })
    .await
    .expect("it ends by itself");
    assert!(!status.success());
    assert!(second.tail().contains("another agent serves"), "{}", second.tail());
    assert_eq!(std::fs::metadata(node.checkpoint()).and_then(|file| file.modified()).expect("the first one's"), held);
    cluster.add_pod(0, PodSpec::new("x", "b")).await.expect("the first one serves");
}
