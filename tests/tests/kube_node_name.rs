//! The agent finds its node where nobody says its name, with the shipped rights.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};
use stanchion_daemon::cluster::credentials;
use stanchion_daemon::cluster::own_node::{Marks, find};
use stanchion_lab::fake_kube::{FakeKube, Rules};

const NODES: &str = "/api/v1/nodes";
const WITHIN: Duration = Duration::from_secs(20);

async fn world(nodes: &[Value]) -> (FakeKube, Client) {
    let kube = FakeKube::default();
    kube.serve_collection(NODES);
    kube.enforce(Rules::of_manifest(include_str!("../../deploy/manifests/stanchion.yaml")).unwrap());
    nodes.iter().for_each(|node| kube.put(NODES, node.clone()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(kube.clone().serve(listener));
    (kube, credentials::plain(&url).unwrap())
}

fn node(name: &str, provider: &str, address: &str) -> Value {
    json!({
        "kind": "Node", "metadata": {"name": name}, "spec": {"providerID": provider},
        "status": {"addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]},
    })
}

fn marks() -> Marks {
    Marks { hostname: "vm".into(), instance: "i-0abc".into(), address: Some("10.0.1.10".parse().unwrap()) }
}

#[tokio::test]
async fn a_node_is_found_by_the_hosts_name_then_by_its_instance_then_by_its_address() {
    let other = node("other", "aws:///eu-west-1a/i-0def", "10.0.1.11");
    let (by_name, by_instance, by_address) =
        (node("vm", "", ""), node("a", "aws:///eu-west-1a/i-0abc", "10.0.9.9"), node("node1", "", "10.0.1.10"));
    // The address of an instance that is gone may be that of another one.
    let stale = node("stale", "aws:///eu-west-1a/i-0old", "10.0.1.10");
    for (nodes, name) in [
        (vec![other.clone(), by_name, node("z", "", "10.0.1.10")], "vm"),
        (vec![stale.clone(), by_instance, other.clone()], "a"),
        (vec![stale, other, by_address], "node1"),
    ] {
        let (kube, client) = world(&nodes).await;
        assert_eq!(find(&client, &marks(), WITHIN).await, name);
        assert_eq!(kube.forbidden(), Vec::<String>::new());
        let all = kube.requests().iter().filter(|request| !request.contains("fieldSelector")).count();
        assert_eq!(all, usize::from(name != "vm"), "the others are looked at only where the host's name is no node's");
    }
}

#[tokio::test]
async fn one_beyond_the_first_page_and_one_that_registers_later_are_found() {
    let many: Vec<Value> = (0..600).map(|n| node(&format!("a{n:03}"), "", &format!("10.1.{}.{}", n / 200, n % 200))).collect();
    let (kube, client) = world(&many).await;
    let late = kube.clone();
    let registers = tokio::spawn(async move {
        while late.requests().len() < 3 {
            tokio::task::yield_now().await;
        }
        late.put(NODES, node("node1", "", "10.0.1.10"));
    });
    assert_eq!(find(&client, &marks(), WITHIN).await, "node1");
    registers.await.unwrap();
}

#[tokio::test]
async fn without_an_answer_or_a_node_it_is_the_hosts_name() {
    let (kube, client) = world(&[node("other", "", "10.0.1.11")]).await;
    assert_eq!(find(&client, &marks(), Duration::ZERO).await, "vm");
    kube.outage(Some(503));
    assert_eq!(find(&client, &marks(), WITHIN).await, "vm");
}
