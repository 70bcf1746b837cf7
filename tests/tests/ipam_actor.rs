//! The address actor against the AWS model, on paused time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use stanchion_core::ipam::{Checkpoint, CoolingFile};
use stanchion_core::network::NetOp;
use stanchion_lab::fake_aws::{ApiError, Effect, Fault, Timing};
use stanchion_lab::ipam_world::{World, WorldSpec, key};
use stanchion_lab::wall;

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

/// The healer, whom the kernel tells of every change, is not the only one who mends.
#[tokio::test(start_paused = true)]
async fn what_is_mended_with_the_plan_that_is_in_force_is_counted_and_what_a_new_plan_changes_is_not() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 60).await;
    let healed = |world: &World| world.handle.snapshot().counters.healed.clone();
    assert_eq!(healed(&world), BTreeMap::new(), "what the first plan did was missing, not damaged");
    world.host.damage([NetOp::LinkUp { index: 2 }, NetOp::Mtu { index: 2, mtu: 9_001 }, NetOp::Mtu { index: 3, mtu: 9_001 }]);
    world.settle(SECOND * 60).await;
    assert_eq!(healed(&world), BTreeMap::from([("link", 3)]));
    // A pod, and an ENI that its start brings: the plan is another one.
    let applied = world.host.applied();
    world.host.damage([NetOp::LinkUp { index: 3 }]);
    world.add("web-0", SECOND).await.expect("an address is free");
    world.settle(SECOND * 60).await;
    assert!(world.host.applied() > applied);
    assert_eq!(healed(&world), BTreeMap::from([("link", 3)]));
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

/// Between two processes; by the boot in the file the next one knows how far.
#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_makes_no_cool_down_longer_or_shorter() {
    for minutes in [-300, 300] {
        let mut world = World::start(WorldSpec::new("m5.large", &[]));
        let gone = world.add("gone", SECOND * 30).await.expect("served").attachments[0].ipv4.expect("IPv4");
        world.delete("gone").await.expect("released");
        let cools = |world: &World| world.handle.snapshot().addresses.iter().any(|view| view.state == "cooling" && view.address == gone);
        tokio::time::sleep(SECOND * 10).await;
        wall::set(&world.cloud, minutes);
        world.restart();
        world.handle.ready().await.expect("ready");
        tokio::time::sleep(SECOND * 15).await;
        assert!(cools(&world), "clock set by {minutes} minutes: 25 of its 30 seconds are over");
        tokio::time::sleep(SECOND * 10).await;
        assert!(!cools(&world), "clock set by {minutes} minutes");
        world.stop().await;
    }
}

/// What the file says was written by the clock before, and in another boot.
#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_back_before_a_boot_makes_no_cool_down_longer() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    let gone = world.add("gone", SECOND * 30).await.expect("served").attachments[0].ipv4.expect("IPv4");
    world.delete("gone").await.expect("released");
    let path = world.checkpoint().with_file_name("stanchion-cooling.json");
    let mut file = CoolingFile::parse(&std::fs::read_to_string(&path).expect("written before the reply")).expect("the agent's own");
    assert!(!file.cooling.is_empty());
    file.boot.as_mut().expect("the simulated one").id.clear();
    file.cooling.iter_mut().for_each(|entry| entry.until = entry.until + SECOND * 18_000);
    std::fs::write(&path, serde_json::to_string(&file).expect("JSON")).expect("written");
    world.restart();
    world.handle.ready().await.expect("ready");
    let cools = |world: &World| world.handle.snapshot().addresses.iter().any(|view| view.state == "cooling" && view.address == gone);
    assert!(cools(&world), "it still cools down");
    tokio::time::sleep(SECOND * 240).await;
    assert!(!cools(&world));
    world.stop().await;
}

/// A node whose eight pods have ended, in the instant in which their addresses are on their way to EC2.
async fn giving_back(timing: Timing) -> World {
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]) });
    for n in 0..8 {
        world.add(&format!("early-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 60).await;
    for n in 0..8 {
        world.delete(&format!("early-{n}")).await.expect("released");
    }
    addresses_are_given_back(&world).await;
    world
}

/// Returns in the instant in which the next addresses are on their way to EC2.
async fn addresses_are_given_back(world: &World) {
    let asked = || world.cloud.count("UnassignPrivateIpAddresses");
    let before = asked();
    for _ in 0..6_000 {
        if asked() > before {
            return;
        }
        tokio::time::sleep(SECOND / 10).await;
    }
    panic!("nothing was given back within ten minutes");
}

/// The process ends while addresses go back to EC2, the next one is shown what was before that, and EC2 tells nothing more for longer
/// than they cool down.
#[tokio::test(start_paused = true)]
async fn what_was_on_its_way_to_ec2_serves_nobody_until_ec2_shows_it_again() {
    let timing = Timing { describe_lag: SECOND * 5, imds_lag: SECOND * 20, ..Timing::default() };
    let mut world = giving_back(timing).await;
    let there = world.per_eni()[0];
    world.restart();
    world.handle.ready().await.expect("ready");
    let shown = world.handle.snapshot().enis[0].cidrs.len();
    assert!(shown > there, "the picture is old: {shown} addresses of {there}");
    let failing = ApiError::with_status(500, "InternalError", "An internal error has occurred");
    world.cloud.inject(Fault::always("DescribeNetworkInterfaces", Effect::Error(failing)));
    // Pods that come one by one just when the cool-downs are over.
    tokio::time::sleep(SECOND * 181).await;
    for n in 0..8 {
        let served = world.add(&format!("late-{n}"), SECOND * 30).await.expect("EC2 gives addresses");
        let at = &served.attachments[0];
        assert_eq!(world.cloud.owner_of(at.ipv4.expect("IPv4").into()).as_ref(), Some(&at.eni), "late-{n}: {served:?}");
    }
    world.cloud.clear_faults();
    world.settle(SECOND * 200).await;
    let known: u64 = world.handle.snapshot().pools.iter().map(|pool| pool.total).sum();
    assert_eq!(known, world.per_eni().iter().sum::<usize>() as u64, "what EC2 does not show is forgotten in the end");
    world.stop().await;
}

/// The same end of the process, before EC2 heard of it: the addresses are still the node's.
#[tokio::test(start_paused = true)]
async fn what_did_not_go_to_ec2_after_all_serves_again() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]));
    for n in 0..8 {
        world.add(&format!("early-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 60).await;
    world.cloud.inject(Fault::always("UnassignPrivateIpAddresses", Effect::DropRequest));
    for n in 0..8 {
        world.delete(&format!("early-{n}")).await.expect("released");
    }
    addresses_are_given_back(&world).await;
    world.restart();
    world.handle.ready().await.expect("ready");
    let there = world.per_eni()[0];
    let sure = world.handle.snapshot().pools[0].total;
    assert!(sure < there as u64, "{sure} of {there}, as nobody knows of the others");
    world.cloud.inject(Fault::always("AssignPrivateIpAddresses", Effect::DropRequest));
    tokio::time::sleep(SECOND * 181).await;
    for n in 0..there {
        world.add(&format!("late-{n}"), SECOND).await.expect("EC2 has shown them");
    }
    world.stop().await;
}

/// An agent of aws-node's ends in the instant after it gave addresses back, which its checkpoint does not say; EC2 tells, or only IMDS.
#[tokio::test(start_paused = true)]
async fn what_another_agent_has_just_given_back_is_not_taken_over() {
    for ec2_answers in [true, false] {
        let timing = Timing { describe_lag: SECOND * 3, imds_lag: SECOND * 25, ..Timing::default() };
        let mut world = giving_back(timing).await;
        world.kill();
        std::fs::remove_file(world.checkpoint().with_file_name("stanchion-cooling.json")).expect("stanchion's own");
        if !ec2_answers {
            let failing = ApiError::with_status(500, "InternalError", "An internal error has occurred");
            world.cloud.inject(Fault::always("DescribeNetworkInterfaces", Effect::Error(failing)));
        }
        world.restart();
        let asked = tokio::time::Instant::now();
        for n in 0..8 {
            let served = world.add(&format!("late-{n}"), SECOND * 60).await.expect("EC2 gives addresses");
            let at = &served.attachments[0];
            assert_eq!(world.cloud.owner_of(at.ipv4.expect("IPv4").into()).as_ref(), Some(&at.eni), "late-{n}: {served:?}");
        }
        let most = if ec2_answers { SECOND * 15 } else { SECOND * 60 };
        assert!(asked.elapsed() < most, "EC2 answers {ec2_answers}: {:?}", asked.elapsed());
        world.stop().await;
    }
}

/// A node whose pod `a` has the last address of its subnet, and the addresses that others took.
async fn exhausted() -> (World, Vec<std::net::Ipv4Addr>) {
    let mut spec = WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]);
    spec.subnet = "10.0.16.0/28".parse().expect("CIDR");
    let mut world = World::start(spec);
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    let taken: Vec<std::net::Ipv4Addr> =
        (4..15).map(|n| std::net::Ipv4Addr::new(10, 0, 16, n)).filter(|ip| world.cloud.owner_of((*ip).into()).is_none()).collect();
    assert!(world.cloud.occupy(&world.subnet, taken.clone()));
    world.add("a", SECOND).await.expect("the warm address");
    (world, taken)
}

#[tokio::test(start_paused = true)]
async fn an_exhausted_subnet_is_named_and_recovers() {
    let (mut world, taken) = exhausted().await;
    let error = world.add("b", SECOND * 2).await.expect_err("nothing is left").to_string();
    for word in ["subnet-0a", "has 0 free of 11 since ", "EC2 said InsufficientFreeAddressesInSubnet", "see `stanchion enis`"] {
        assert!(error.contains(word), "{word} is not in {error}");
    }
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

#[tokio::test(start_paused = true)]
async fn a_detached_eni_is_forgotten_only_when_ec2_confirms() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    for n in 0..10 {
        world.add(&format!("pod-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 5).await;
    let second = world.cloud.enis_of(&world.instance)[1].clone();
    world.cloud.hide_from_imds(&second.id, SECOND * 600);
    tokio::time::sleep(SECOND * 500).await;
    let snapshot = world.handle.snapshot();
    assert!(snapshot.enis.iter().any(|eni| eni.id == second.id), "IMDS alone deletes nothing");
    assert_eq!(snapshot.counters.force_removed_enis, 0);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_unwritable_checkpoint_takes_the_assignment_back() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.add("first", SECOND * 10).await.expect("served");
    // A directory in the place of the temporary file: the next write fails, as on a full disk.
    let mut temporary = world.checkpoint().into_os_string();
    temporary.push(".tmp");
    std::fs::create_dir(&temporary).expect("directory");
    let error = world.add("second", SECOND).await.expect_err("not durable").to_string();
    assert!(error.contains("ipam.json"), "{error}");
    assert_eq!(world.handle.lookup(key("second")).await, Ok(None));
    assert!(world.delete("first").await.is_err(), "a release that is not durable did not happen");
    assert!(world.handle.lookup(key("first")).await.expect("answered").is_some());
    std::fs::remove_dir(&temporary).expect("directory");
    world.add("second", SECOND).await.expect("served now");
    world.stop().await;
}

/// The process ends with only one of the two files written, or neither, whichever cannot be: the address is its pod's or rests.
#[tokio::test(start_paused = true)]
async fn a_release_of_which_one_file_cannot_be_written_gives_nobody_the_address_at_once() {
    for (file, the_pod_lives) in ["ipam.json", "stanchion-cooling.json"].into_iter().flat_map(|file| [(file, true), (file, false)]) {
        let mut world = World::start(WorldSpec::new("t3.small", &[("WARM_ENI_TARGET", "0")]));
        let held = world.add("first", SECOND * 30).await.expect("served");
        world.settle(SECOND * 60).await;
        let temporary = world.checkpoint().with_file_name(format!("{file}.tmp"));
        std::fs::create_dir(&temporary).expect("directory");
        let veths = world.veths.clone();
        assert!(world.delete("first").await.is_err(), "{file}: a release that is not durable did not happen");
        assert_eq!(world.handle.lookup(key("first")).await, Ok(Some(held.clone())), "{file}");
        world.kill();
        std::fs::remove_dir(&temporary).expect("directory");
        if the_pod_lives {
            world.veths = veths;
        }
        world.restart();
        world.handle.ready().await.expect("ready");
        assert_eq!(world.handle.lookup(key("first")).await, Ok(the_pod_lives.then(|| held.clone())), "{file}");
        // All that the ENI has.
        for pod in 1..3 {
            let next = world.add(&format!("next-{pod}"), SECOND * 10).await.expect("served");
            assert_ne!(next.attachments[0].ipv4, held.attachments[0].ipv4, "{file}, the pod lives: {the_pod_lives}");
        }
        world.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_went_away_keeps_nothing() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]));
    world.handle.ready().await.expect("ready");
    let handle = world.handle.clone();
    let impatient = tokio::spawn(async move { handle.assign(stanchion_lab::ipam_world::request("gone", SECOND * 60)).await });
    world.add("taken", SECOND * 60).await.expect("served");
    impatient.abort();
    world.settle(SECOND * 5).await;
    let held = world.handle.snapshot().addresses.iter().filter(|view| view.state == "assigned").count();
    assert!(held <= 2);
    assert!(world.handle.snapshot().waiting == 0, "nobody waits for a caller that is gone");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn custom_networking_leaves_the_primary_eni_to_the_node() {
    use stanchion_core::cluster::ClusterState;
    use stanchion_core::manifests::parse;
    let mut world = World::start(WorldSpec::new(
        "m5.large",
        &[("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"), ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone")],
    ));
    let pods = world.cloud.add_subnet(stanchion_lab::fake_aws::SubnetSpec::new(
        "subnet-pods",
        "eu-west-1a",
        "10.0.64.0/24".parse().expect("CIDR"),
    ));
    let error = world.add("early", SECOND * 5).await.expect_err("no ENIConfig yet").to_string();
    assert!(error.contains("no address yet") || error.contains("node-1 is not known yet"), "{error}");
    assert!(!world.handle.status().ready);
    let mut state = ClusterState::default();
    let text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-1\n  labels: {topology.kubernetes.io/zone: eu-west-1a}\n---\napiVersion: crd.k8s.amazonaws.com/v1alpha1\nkind: ENIConfig\nmetadata: {name: eu-west-1a}\nspec: {subnet: subnet-pods}\n";
    for object in parse("nodes.yaml", text).expect("manifests") {
        state.apply(object);
    }
    world.cluster.send_replace(std::sync::Arc::new(state));
    let first = world.add("first", SECOND * 60).await.expect("served from the pods' subnet");
    assert!("10.0.64.0/24".parse::<ipnet::Ipv4Net>().expect("CIDR").contains(&first.attachments[0].ipv4.expect("IPv4")));
    assert_eq!((first.attachments[0].device_index, first.attachments[0].route_table), (1, 2));
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [0, 9, 9], "nothing on the primary ENI");
    assert!(world.cloud.enis_of(&world.instance).iter().skip(1).all(|eni| eni.subnet == pods));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_fragmented_subnet_gives_single_addresses_instead_of_prefixes() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    world.cloud.fragment(&world.subnet);
    for n in 0..20 {
        world.add(&format!("pod-{n}"), SECOND * 30).await.expect("sixteen of the prefix, then single addresses");
    }
    assert!(world.cloud.enis_of(&world.instance).iter().any(|eni| !eni.secondary_ipv4.is_empty()));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_bound_to_the_node_have_their_address_before_they_ask() {
    use stanchion_core::cluster::ClusterState;
    use stanchion_core::manifests::parse;
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    let mut state = ClusterState { synced: true, ..ClusterState::default() };
    for n in 0..6 {
        let text = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: bound-{n}, namespace: default}}\nspec: {{nodeName: node-1}}\n");
        for object in parse("pods.yaml", &text).expect("manifest") {
            state.apply(object);
        }
    }
    world.cluster.send_replace(std::sync::Arc::new(state));
    world.settle(SECOND * 5).await;
    assert_eq!(world.per_eni(), [7], "six for the pods, one warm");
    for n in 0..6 {
        let started = tokio::time::Instant::now();
        world.add(&format!("bound-{n}"), SECOND).await.expect("ready for it");
        assert_eq!(started.elapsed(), Duration::ZERO, "no wait");
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_ipv6_node_has_one_prefix_and_needs_no_pool() {
    let env = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let mut world = World::start(WorldSpec::new("m5.large", &env));
    let mut given = BTreeSet::new();
    for n in 0..100 {
        let assignment = world.add(&format!("pod-{n}"), SECOND * 20).await.expect("served");
        let address = assignment.attachments[0].ipv6.expect("IPv6");
        assert_eq!(assignment.attachments[0].ipv4, None);
        assert!(world.cloud.owner_of(address.into()).is_some() && given.insert(address));
    }
    world.settle(SECOND * 60).await;
    assert_eq!(world.per_eni(), [1]);
    assert_eq!((world.cloud.count("AssignIpv6Addresses"), world.cloud.count("CreateNetworkInterface")), (1, 0));
    assert!(world.host.plan().ipv6 && world.host.plan().snat.is_none());
    world.restart();
    world.handle.ready().await.expect("ready");
    assert!(
        world
            .handle
            .lookup(key("pod-42"))
            .await
            .expect("answered")
            .is_some_and(|held| given.contains(&held.attachments[0].ipv6.expect("IPv6")))
    );
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_an_adopted_eni_keeps_its_index_and_its_room() {
    let timing = Timing { attach: SECOND * 8, ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.xlarge", &[("WARM_IP_TARGET", "1")]) });
    for n in 0..15 {
        world.add(&format!("old-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [14, 2]);
    // Its interface is gone for a while, as when udev renames it: the ENI is adopted, and not ready.
    let second = world.cloud.enis_of(&world.instance)[1].mac;
    world.host.delay_link(second, SECOND * 10);
    let (creates, attaches) = (world.cloud.count("CreateNetworkInterface"), world.cloud.count("AttachNetworkInterface"));
    world.restart();
    let waits: Vec<_> = (0..6)
        .map(|n| {
            let handle = world.handle.clone();
            tokio::spawn(async move { handle.assign(stanchion_lab::ipam_world::request(&format!("new-{n}"), SECOND * 60)).await })
        })
        .collect();
    for wait in waits {
        let given = wait.await.expect("no panic").expect("served when the interface is back");
        assert_eq!(given.attachments[0].device_index, 1, "the second ENI has room for all of them");
    }
    world.settle(SECOND * 20).await;
    let made = (world.cloud.count("CreateNetworkInterface") - creates, world.cloud.count("AttachNetworkInterface") - attaches);
    assert_eq!((world.per_eni(), made), (vec![14, 8], (0, 0)), "no third ENI, no clash of indexes");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_that_trickle_in_while_an_eni_attaches_share_it() {
    let timing = Timing { attach: SECOND * 8, ..Timing::default() };
    let world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.2xlarge", &[("WARM_IP_TARGET", "1")]) });
    world.handle.ready().await.expect("ready");
    let mut waits = Vec::new();
    for n in 0..20 {
        let handle = world.handle.clone();
        waits.push(tokio::spawn(async move { handle.assign(stanchion_lab::ipam_world::request(&format!("pod-{n}"), SECOND * 60)).await }));
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    for wait in waits {
        wait.await.expect("no panic").expect("served");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [14, 7], "one ENI, not one a pod");
    assert_eq!(world.cloud.count("CreateNetworkInterface"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_on_every_network_card_keeps_its_addresses_through_a_restart() {
    // Two cards.
    let mut world = World::start(WorldSpec::new("c6in.32xlarge", &[("ENABLE_MULTI_NIC", "true"), ("WARM_IP_TARGET", "2")]));
    world.handle.ready().await.expect("ready");
    let wide =
        |name: &str| stanchion_daemon::ipamd::AssignRequest { multi_nic: true, ..stanchion_lab::ipam_world::request(name, SECOND * 30) };
    let held = world.handle.assign(wide("wide")).await.expect("an address of either card");
    let cards: Vec<_> = held.attachments.iter().map(|attachment| (attachment.network_card, attachment.route_table)).collect();
    assert_eq!(cards, [(0, 254), (1, 10_101)]);
    world.veths.insert(stanchion_core::network::host_veth_name("eni", &stanchion_core::ids::PodName::new("default", "wide"), 0));
    let plain = world.add("plain", SECOND).await.expect("served");
    assert_eq!(plain.attachments.len(), 1);
    let second_file = world.checkpoint().with_file_name("ipam-nic-1.json");
    let of_card_1 = || Checkpoint::parse(&std::fs::read_to_string(&second_file).expect("written")).expect("aws-node's format").allocations;
    assert_eq!(of_card_1().len(), 1, "each card has its file");
    world.settle(SECOND * 20).await;

    world.restart();
    world.handle.ready().await.expect("ready");
    assert_eq!(world.handle.lookup(key("wide")).await, Ok(Some(held.clone())));
    let hosts = world.host.plan().pods;
    assert_eq!(hosts.iter().filter(|pod| held.attachments.iter().any(|a| a.ipv4.map(Into::into) == Some(pod.address))).count(), 2);
    let other = world.handle.assign(wide("other")).await.expect("an address of either card");
    assert!(other.attachments.iter().all(|attachment| held.attachments.iter().all(|a| a.ipv4 != attachment.ipv4)), "no address twice");
    assert_eq!(world.delete("wide").await, Ok(Some(held)));
    assert_eq!(world.handle.release(key("other"), "PodDeleted").await, Ok(Some(other)));
    assert_eq!(of_card_1().len(), 0);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn each_network_card_of_an_ipv6_node_has_one_prefix_for_pods_of_several_interfaces() {
    let env = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let mut world = World::start(WorldSpec::new("c6in.32xlarge", &[&env[..], &[("ENABLE_MULTI_NIC", "true")]].concat()));
    world.handle.ready().await.expect("ready");
    let wide =
        |name: &str| stanchion_daemon::ipamd::AssignRequest { multi_nic: true, ..stanchion_lab::ipam_world::request(name, SECOND * 30) };
    let held = world.handle.assign(wide("wide")).await.expect("an address of either card");
    let cards: Vec<_> = held.attachments.iter().map(|attachment| (attachment.network_card, attachment.route_table)).collect();
    assert_eq!(cards, [(0, 254), (1, 10_101)]);
    let addresses: Vec<_> = held.attachments.iter().map(|attachment| attachment.ipv6.expect("IPv6")).collect();
    assert!(addresses.iter().all(|address| world.cloud.owner_of((*address).into()).is_some()));
    assert_eq!(world.add("plain", SECOND).await.expect("served").attachments.len(), 1);
    world.veths.insert(stanchion_core::network::host_veth_name("eni", &stanchion_core::ids::PodName::new("default", "wide"), 0));
    world.settle(SECOND * 60).await;
    let calls = (world.cloud.count("AssignIpv6Addresses"), world.cloud.count("CreateNetworkInterface"));
    assert_eq!((world.per_eni(), calls), (vec![1, 1], (1, 1)), "one /80 a card, and nothing more");

    world.restart();
    world.handle.ready().await.expect("ready");
    assert_eq!(world.handle.lookup(key("wide")).await, Ok(Some(held.clone())));
    let hosts = world.host.plan().pods;
    assert_eq!(hosts.iter().filter(|pod| addresses.iter().any(|address| pod.address == *address)).count(), 2);
    assert_eq!(world.delete("wide").await, Ok(Some(held)));
    let second_file = world.checkpoint().with_file_name("ipam-nic-1.json");
    let left = Checkpoint::parse(&std::fs::read_to_string(&second_file).expect("written")).expect("aws-node's format");
    assert_eq!(left.allocations.len(), 0);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_ipv6_pod_that_gets_no_address_of_a_card_keeps_none_of_the_others() {
    let env = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let spec = WorldSpec::new("c6in.32xlarge", &[&env[..], &[("ENABLE_MULTI_NIC", "true")]].concat());
    let denied = ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation.");
    let mut world = World::start_with(spec, |cloud, _| cloud.inject(Fault::always("CreateNetworkInterface", Effect::Error(denied))));
    world.handle.ready().await.expect("ready");
    let wide = || stanchion_daemon::ipamd::AssignRequest { multi_nic: true, ..stanchion_lab::ipam_world::request("wide", SECOND * 10) };
    let error = world.handle.assign(wide()).await.expect_err("card 1 has no ENI").to_string();
    assert!(error.contains("UnauthorizedOperation"), "{error}");
    assert_eq!(world.handle.lookup(key("wide")).await, Ok(None));
    assert_eq!(world.add("plain", SECOND).await.expect("the first card serves").attachments.len(), 1);
    world.cloud.clear_faults();
    world.settle(SECOND * 60).await;
    assert_eq!(world.handle.assign(wide()).await.expect("tried again when the permission came").attachments.len(), 2);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_the_switch_only_the_first_card_is_managed() {
    let mut world = World::start(WorldSpec::new("c6in.32xlarge", &[("WARM_IP_TARGET", "2")]));
    world.handle.ready().await.expect("ready");
    let wide = stanchion_daemon::ipamd::AssignRequest { multi_nic: true, ..stanchion_lab::ipam_world::request("wide", SECOND) };
    assert_eq!(world.handle.assign(wide).await.expect("served").attachments.len(), 1);
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni().len(), 1);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_on_every_card_that_waits_for_one_of_them_holds_up_no_other_pod() {
    let spec = WorldSpec::new("c6in.32xlarge", &[("ENABLE_MULTI_NIC", "true"), ("WARM_IP_TARGET", "4")]);
    let denied = ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation.");
    let mut world = World::start_with(spec, |cloud, _| cloud.inject(Fault::always("CreateNetworkInterface", Effect::Error(denied))));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 5).await;
    let waits: Vec<_> = ["wide-0", "wide-1"]
        .map(|name| {
            let wide = stanchion_daemon::ipamd::AssignRequest { multi_nic: true, ..stanchion_lab::ipam_world::request(name, SECOND * 60) };
            let handle = world.handle.clone();
            tokio::spawn(async move { handle.assign(wide).await })
        })
        .into();
    tokio::time::sleep(SECOND).await;
    assert_eq!(world.handle.snapshot().waiting, 2);
    for n in 0..20 {
        let asked = tokio::time::Instant::now();
        let plain = world.add(&format!("plain-{n}"), SECOND * 10).await.expect("the first card serves");
        assert_eq!(plain.attachments.len(), 1);
        assert!(asked.elapsed() < SECOND * 2, "plain-{n} waited {:?}", asked.elapsed());
    }
    world.cloud.clear_faults();
    for wait in waits {
        assert_eq!(wait.await.expect("no panic").expect("served when the permission came").attachments.len(), 2);
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn new_enis_forget_idle_connections_when_the_primary_one_does() {
    use stanchion_core::cloud::ConnectionTracking;
    let own = ConnectionTracking { tcp_established: Some(600), udp_stream: None, udp: Some(30) };
    for wanted in [None, Some(own)] {
        let mut world = World::start_with(WorldSpec::new("m5.large", &[]), |cloud, _| {
            cloud.set_connection_tracking(&cloud.enis()[0].id, wanted);
        });
        for n in 0..10 {
            world.add(&format!("pod-{n}"), SECOND * 30).await.expect("served");
        }
        let enis = world.cloud.enis_of(&world.instance);
        assert!(enis.len() > 1 && enis.iter().all(|eni| eni.connection_tracking == wanted), "{enis:?}");
        world.stop().await;
    }
}

/// What the kernel will refuse tomorrow as well, as a sysctl on a read-only file system.
#[tokio::test(start_paused = true)]
async fn what_the_host_refuses_for_good_is_told_once_and_tried_every_quarter_of_a_minute() {
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 60).await;
    let told = |world: &World| world.handle.snapshot().counters.errors.get("host network").copied().unwrap_or_default();
    let sysctl = |path: &str| NetOp::Sysctl { path: path.to_owned(), value: "1".to_owned() };
    world.host.refuse([sysctl("net/ipv4/ip_forward")]);
    let applied = world.host.applied();
    tokio::time::sleep(SECOND * 600).await;
    let times = world.host.applied() - applied;
    assert!((35..60).contains(&times), "{times} times in ten minutes");
    assert_eq!(told(&world), 1);
    // An ENI that waits for its interface does not wait for the healer.
    let asked = tokio::time::Instant::now();
    for n in 0..10 {
        world.add(&format!("pod-{n}"), SECOND * 30).await.expect("served");
    }
    assert!(asked.elapsed() < SECOND * 5, "{:?}", asked.elapsed());
    assert_eq!(told(&world), 1, "still the same");
    world.host.refuse([sysctl("net/ipv4/ip_forward"), sysctl("net/ipv4/tcp_early_demux")]);
    tokio::time::sleep(SECOND * 60).await;
    assert_eq!(told(&world), 2, "what is new is told");
    world.host.refuse([]);
    tokio::time::sleep(SECOND * 60).await;
    world.host.refuse([sysctl("net/ipv4/ip_forward")]);
    tokio::time::sleep(SECOND * 60).await;
    assert_eq!(told(&world), 3, "what comes back is told again");
    world.stop().await;
}

/// A /24 of the node's zone with this tag `kubernetes.io/role/cni`.
fn subnet_with_role(id: &str, role: &str) -> stanchion_lab::fake_aws::SubnetSpec {
    let mut subnet = stanchion_lab::fake_aws::SubnetSpec::new(id, "eu-west-1a", "10.0.64.0/24".parse().expect("CIDR"));
    subnet.tags.insert("kubernetes.io/role/cni".to_owned(), role.to_owned());
    subnet
}

/// Tags may have been set in the minutes since the list was read last.
#[tokio::test(start_paused = true)]
async fn an_eni_is_made_where_the_tags_of_now_let_it() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 20).await;
    let other = world.cloud.add_subnet(subnet_with_role("subnet-0b", "1"));
    world.cloud.tag_subnet(&world.subnet, "kubernetes.io/role/cni", "0");
    world.cloud.clear_calls();
    for n in 0..10 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    let enis = world.cloud.enis_of(&world.instance);
    assert!(enis.len() > 1 && enis.iter().skip(1).all(|eni| eni.subnet == other), "{enis:?}");
    assert!(world.cloud.count("DescribeSubnets") <= 2, "{}", world.cloud.count("DescribeSubnets"));
    // EC2 does not answer: what is known is what there is.
    world.cloud.inject(Fault::always("DescribeSubnets", Effect::Delay(SECOND * 3_600)));
    tokio::time::sleep(SECOND * 60).await;
    let asked = tokio::time::Instant::now();
    for n in 10..20 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("served");
    }
    assert!(asked.elapsed() < SECOND * 10, "{:?}", asked.elapsed());
    world.stop().await;
}

/// As aws-node has it since 1.22: the groups of the VPC that are tagged for pods, on ENIs outside the node's subnet.
#[tokio::test(start_paused = true)]
async fn enis_in_a_discovered_subnet_have_the_security_groups_that_are_tagged_for_pods() {
    const ROLE: &str = "kubernetes.io/role/cni";
    let tagged = stanchion_core::ids::SecurityGroupId::from("sg-pods");
    let mut world = World::start_with(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]), |cloud, subnet| {
        cloud.add_subnet(subnet_with_role("subnet-0b", "1"));
        cloud.tag_subnet(subnet, ROLE, "0");
        cloud.tag_security_group(&"sg-pods".into(), ROLE, "1");
    });
    for n in 0..3 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("served");
    }
    let groups = |world: &World| -> Vec<Vec<String>> {
        let of = |eni: stanchion_core::cloud::Eni| eni.security_groups.iter().map(ToString::to_string).collect();
        world.cloud.enis_of(&world.instance).into_iter().map(of).collect()
    };
    assert_eq!(groups(&world), [["sg-nodes"], ["sg-pods"]]);
    let modified = |world: &World| world.cloud.calls().iter().filter(|call| call.action == "ModifyNetworkInterfaceAttribute").count();
    assert_eq!(modified(&world), 1, "its end with the instance: it was made with them");
    // Whoever may not ask leaves them as they are.
    let denied = ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation.");
    world.cloud.inject(Fault::always("DescribeSecurityGroups", Effect::Error(denied.clone())));
    world.restart();
    world.handle.ready().await.expect("ready");
    tokio::time::sleep(SECOND * 900).await;
    assert_eq!((groups(&world)[1].as_slice(), modified(&world)), (&["sg-pods".to_owned()][..], 1));
    assert!(world.cloud.count("DescribeSecurityGroups") < 10, "{}", world.cloud.count("DescribeSecurityGroups"));
    world.cloud.clear_faults();
    world.cloud.untag_security_group(&tagged, ROLE);
    tokio::time::sleep(SECOND * 700).await;
    assert_eq!(groups(&world), [["sg-nodes"], ["sg-nodes"]], "without such a group the node's");
    world.cloud.tag_security_group(&tagged, ROLE, "1");
    tokio::time::sleep(SECOND * 640).await;
    assert_eq!(groups(&world), [["sg-nodes"], ["sg-pods"]]);
    world.stop().await;

    // Where all ENIs are in the node's subnet nobody asks.
    let mut world = World::start(WorldSpec::new("m5.large", &[]));
    for n in 0..12 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("served");
    }
    tokio::time::sleep(SECOND * 900).await;
    assert_eq!(world.cloud.count("DescribeSecurityGroups"), 0);
    world.stop().await;
}

/// The type may be one that the resource controller gives no trunk.
#[tokio::test(start_paused = true)]
async fn an_eni_is_not_kept_for_a_trunk_for_ever_while_pods_wait() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("ENABLE_POD_ENI", "true")]));
    for n in 0..18 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("of two ENIs");
    }
    let why = world.add("early", SECOND * 10).await.expect_err("the third is for the trunk").to_string();
    assert!(why.contains("kept for the trunk"), "{why}");
    tokio::time::sleep(SECOND * 3_600).await;
    assert_eq!(world.per_eni(), [9, 9], "as long as nobody waits it is kept");
    world.add("late", SECOND * 10).await.expect("nobody has attached a trunk");
    assert!(!world.handle.snapshot().wants_trunk);
    world.stop().await;
}

/// An event is told for each shortage that lasts: one that is over must not be told for ever.
#[tokio::test(start_paused = true)]
async fn a_subnet_that_gives_again_is_not_said_to_be_exhausted() {
    let (mut world, taken) = exhausted().await;
    world.add("b", SECOND * 2).await.expect_err("nothing is left");
    assert_eq!(world.handle.snapshot().subnets.len(), 1);
    world.cloud.vacate(&world.subnet, taken.clone());
    world.add("c", SECOND * 60).await.expect("asked again after the pause");
    world.settle(SECOND * 5).await;
    assert_eq!(world.handle.snapshot().subnets, [], "it gives");
    // Those that wanted more are gone before it gives.
    assert!(
        world.cloud.occupy(&world.subnet, taken.into_iter().filter(|ip| world.cloud.owner_of((*ip).into()).is_none()).collect::<Vec<_>>())
    );
    world.add("d", SECOND * 2).await.ok();
    world.add("e", SECOND * 2).await.expect_err("nothing is left");
    for name in ["a", "c", "d"] {
        world.delete(name).await.expect("released");
    }
    tokio::time::sleep(SECOND * 1_500).await;
    assert_eq!(world.handle.snapshot().subnets, [], "nobody has asked for long");
    world.stop().await;
}
