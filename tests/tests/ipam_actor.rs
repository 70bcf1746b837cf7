//! The address actor against the AWS model, on paused time.

use std::collections::BTreeSet;
use std::time::Duration;

use stanchion_core::ipam::Checkpoint;
use stanchion_lab::fake_aws::{ApiError, Effect, Fault, Timing};
use stanchion_lab::ipam_world::{World, WorldSpec, key};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_fresh_node_warms_up_and_serves() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [9]);
    let first = world.add("web-0", SECOND).await.expect("an address is free");
    let address = first.attachments[0].ipv4.expect("IPv4");
    assert_eq!(world.cloud.owner_of(address.into()), Some(first.attachments[0].eni.clone()));
    assert_eq!((first.attachments[0].device_index, first.attachments[0].route_table), (0, 254));
    assert_eq!(world.add("web-0", SECOND).await.as_ref(), Ok(&first), "the same key gets the same address");
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [9, 9], "one ENI's worth is kept free");
    let enis = world.cloud.enis_of(&world.instance);
    assert!(enis.iter().all(|eni| eni.attachment.as_ref().is_some_and(|attachment| attachment.delete_on_termination)));
    assert_eq!(enis[1].description, "aws-K8S-i-0000000000000000a");
    assert_eq!(enis[1].tags.get("node.k8s.amazonaws.com/instance_id").map(String::as_str), Some("i-0000000000000000a"));
    let text = std::fs::read_to_string(world.checkpoint()).expect("written before the reply");
    assert_eq!(Checkpoint::parse(&text).expect("aws-node's format").allocations.len(), 1);
    assert_eq!(world.delete("web-0").await, Ok(Some(first)));
    assert_eq!(world.delete("web-0").await, Ok(None), "a second DEL finds nothing and is content");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_waits_for_enis_and_is_served_in_full() {
    let timing = Timing { attach: SECOND * 6, ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.2xlarge", &[]) });
    let names: Vec<String> = (0..56).map(|n| format!("burst-{n}")).collect();
    let waits: Vec<_> = names
        .iter()
        .map(|name| {
            let handle = world.handle.clone();
            let request = stanchion_lab::ipam_world::request(name, SECOND * 60);
            tokio::spawn(async move { handle.assign(request).await })
        })
        .collect();
    let mut given = BTreeSet::new();
    for wait in waits {
        let assignment = wait.await.expect("no panic").expect("served within a minute");
        assert!(given.insert(assignment.attachments[0].ipv4), "no address twice");
    }
    assert_eq!(given.len(), 56);
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [14, 14, 14, 14]);
    assert_eq!(world.cloud.count("CreateNetworkInterface"), 3, "one call an ENI");
    let error = world.add("one-too-many", SECOND * 3).await.expect_err("all four ENIs are full").to_string();
    assert!(error.contains("all 4 ENIs are full and the limit is 4"), "{error}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_keeps_what_lives_and_cools_what_died() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "3")]));
    let kept = world.add("kept", SECOND * 30).await.expect("served");
    world.add("died", SECOND * 30).await.expect("served");
    world.add("released", SECOND * 30).await.expect("served");
    let released = world.delete("released").await.expect("released").expect("held");
    world.settle(SECOND * 2).await;
    world
        .veths
        .retain(|name| *name == stanchion_core::network::host_veth_name("eni", &stanchion_core::ids::PodName::new("default", "kept"), 0));
    world.restart();
    world.handle.ready().await.expect("ready");
    assert_eq!(world.handle.lookup(key("kept")).await, Ok(Some(kept.clone())));
    assert_eq!(world.handle.lookup(key("died")).await, Ok(None), "its veth is gone");
    let cooling: Vec<_> =
        world.handle.snapshot().addresses.iter().filter(|view| view.state == "cooling").map(|view| view.address).collect();
    assert!(cooling.contains(&released.attachments[0].ipv4.expect("IPv4").into()), "the cool-down outlives the restart");
    assert_eq!(cooling.len(), 2);
    let fresh = world.add("fresh", SECOND * 30).await.expect("served");
    assert!(!cooling.contains(&fresh.attachments[0].ipv4.expect("IPv4").into()));
    assert_ne!(fresh.attachments[0].ipv4, kept.attachments[0].ipv4);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_exhausted_subnet_is_named_and_recovers() {
    let mut spec = WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]);
    spec.subnet = "10.0.16.0/28".parse().expect("CIDR");
    let mut world = World::start(spec);
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    let taken: Vec<std::net::Ipv4Addr> =
        (4..15).map(|n| std::net::Ipv4Addr::new(10, 0, 16, n)).filter(|ip| world.cloud.owner_of((*ip).into()).is_none()).collect();
    assert!(world.cloud.occupy(&world.subnet, taken.clone()));
    world.add("a", SECOND).await.expect("the warm address");
    let error = world.add("b", SECOND * 2).await.expect_err("nothing is left").to_string();
    assert!(error.contains("subnet-0a") && error.contains("InsufficientFreeAddressesInSubnet"), "{error}");
    let calls = world.cloud.count("AssignPrivateIpAddresses");
    tokio::time::sleep(SECOND * 300).await;
    let tries = world.cloud.count("AssignPrivateIpAddresses") + world.cloud.count("CreateNetworkInterface") - calls;
    assert!(tries <= 10, "growing pauses, not a retry each tick: {tries}");
    world.cloud.vacate(&world.subnet, taken);
    world.add("c", SECOND * 400).await.expect("asked again after the pause");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn lost_replies_leak_nothing() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    for action in ["CreateNetworkInterface", "AttachNetworkInterface", "ModifyNetworkInterfaceAttribute", "AssignPrivateIpAddresses"] {
        world.cloud.inject(Fault::once(action, Effect::LoseReply));
    }
    for n in 0..12 {
        world.add(&format!("pod-{n}"), SECOND * 120).await.expect("served in spite of it");
    }
    world.settle(SECOND * 30).await;
    assert_eq!(world.per_eni(), [9, 9, 9]);
    assert_eq!(world.cloud.enis().len(), 3, "no ENI was left behind");
    world.cloud.assert_consistent();
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_modify_keeps_its_error_and_its_eni_goes() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    let denied = ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation.");
    world.cloud.inject(Fault::times("ModifyNetworkInterfaceAttribute", 2, Effect::Error(denied)));
    for n in 0..9 {
        world.add(&format!("pod-{n}"), SECOND).await.expect("free");
    }
    let error = world.add("tenth", SECOND * 3 / 2).await.expect_err("the ENI cannot be used").to_string();
    assert!(error.contains("UnauthorizedOperation"), "{error}");
    world.settle(SECOND * 60).await;
    assert_eq!(world.per_eni(), [9, 9], "tried again when the permission came back");
    assert_eq!(world.cloud.enis().len(), 2, "the ENI of the failed try is gone");
    world.stop().await;
}
