//! Defects of aws-node (v1.23.1) in address management, each as a test of what goes right here; the number is that of the list
//! of upstream defects. The actor is the real one, against the AWS model, on paused time.
//!
//! Elsewhere: 7 in `ipam_actor::a_failed_modify_keeps_its_error_and_its_eni_goes`, 8 in `aws_ec2` (every test reaches EC2 by an
//! override; `throttling_is_told_after_one_request`), 9 in `aws_ec2::a_full_and_a_fragmented_subnet_are_both_insufficiency`, 10 in
//! `ipamd::handle`, 13 and 14 in `stanchion_core::ipam` (`a_pod_on_several_cards_gets_all_addresses_or_none`,
//! `a_device_index_is_never_one_that_is_held_and_never_out_of_range`).

use std::time::Duration;

use stanchion_core::cloud::{AddressRequest, Ec2Api as _};
use stanchion_core::ids::SecurityGroupId;
use stanchion_lab::fake_aws::{ApiError, DirectEc2, Effect, Fault, Timing};
use stanchion_lab::ipam_world::{MUTATING, World, WorldSpec};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);
const PREFIXES: [(&str, &str); 2] = [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];

fn denied() -> Effect {
    Effect::Error(ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation."))
}

async fn started(instance_type: &str, env: &[(&str, &str)]) -> World {
    let world = World::start(WorldSpec::new(instance_type, env));
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 20).await;
    world
}

fn singles(world: &World) -> usize {
    world.cloud.enis_of(&world.instance).iter().map(|eni| eni.secondary_ipv4.len()).sum()
}

#[tokio::test(start_paused = true)]
async fn defect_01_cooling_addresses_are_not_free() {
    let mut world = started("m5.large", &[("WARM_IP_TARGET", "2")]).await;
    for name in ["a", "b"] {
        world.add(name, SECOND).await.expect("warm");
    }
    world.settle(SECOND * 10).await;
    for name in ["a", "b"] {
        world.delete(name).await.expect("released");
    }
    for name in ["c", "d", "e", "f"] {
        let asked = Instant::now();
        world.add(name, SECOND * 20).await.expect("served while a and b cool down");
        assert!(asked.elapsed() < SECOND, "{name} waited {:?} for a cool-down", asked.elapsed());
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_02_a_minimum_alone_starves_nobody_and_a_target_of_zero_enis_does_not_swing() {
    let mut world = started("m5.large", &[("MINIMUM_IP_TARGET", "11")]).await;
    for n in 0..20 {
        world.add(&format!("pod-{n}"), SECOND * 20).await.expect("the twelfth too");
    }
    world.stop().await;

    let mut world = started("m5.large", &[("WARM_ENI_TARGET", "0")]).await;
    for n in 0..9 {
        world.add(&format!("pod-{n}"), SECOND * 20).await.expect("served");
    }
    world.settle(SECOND * 200).await;
    let (made, gone) = (world.cloud.count("CreateNetworkInterface"), world.cloud.count("DeleteNetworkInterface"));
    tokio::time::sleep(SECOND * 7_200).await;
    assert_eq!((world.cloud.count("CreateNetworkInterface"), world.cloud.count("DeleteNetworkInterface")), (made, gone));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_03_the_sums_are_right_after_an_eni_went_with_its_pods() {
    let mut world = started("m5.large", &[]).await;
    for n in 0..14 {
        world.add(&format!("pod-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [9, 9, 9]);
    let second = world.cloud.enis_of(&world.instance)[1].clone();
    let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
    by_hand.detach_eni(&second.attachment.expect("attached").id).await.expect("detached");
    by_hand.delete_eni(&second.id).await.expect("deleted");
    tokio::time::sleep(SECOND * 300).await;
    let snapshot = world.handle.snapshot();
    assert_eq!((snapshot.counters.force_removed_enis, snapshot.enis.iter().any(|eni| eni.id == second.id)), (1, false));
    let there: usize = world.per_eni().iter().sum();
    let pool = &snapshot.pools[0];
    assert_eq!(pool.total, there as u64, "{pool:?}");
    assert_eq!(pool.total, pool.assigned + pool.cooling + pool.free, "{pool:?}");
    for n in 0..14 {
        assert!(world.delete(&format!("pod-{n}")).await.expect("released").is_some(), "what it held stayed its own");
    }
    world.settle(SECOND * 200).await;
    let pool = &world.handle.snapshot().pools[0];
    assert_eq!((pool.assigned, pool.cooling, pool.total), (0, 0, pool.free), "{pool:?}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_04_single_addresses_left_from_before_prefixes_go_back_when_their_pods_end() {
    let mut world = started("m5.large", &[]).await;
    for n in 0..4 {
        world.add(&format!("old-{n}"), SECOND).await.expect("warm");
    }
    world.settle(SECOND * 20).await;
    PREFIXES.iter().for_each(|(name, value)| world.set_env(name, value));
    world.restart();
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 200).await;
    assert_eq!(singles(&world), 4, "those of the pods");
    for n in 0..4 {
        world.delete(&format!("old-{n}")).await.expect("released").expect("held");
    }
    world.settle(SECOND * 200).await;
    assert_eq!(singles(&world), 0, "EC2 has them back");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_05_an_excluded_subnet_gets_its_addresses_back_from_ec2() {
    let mut world = started("m5.large", &[("WARM_IP_TARGET", "6")]).await;
    for n in 0..2 {
        world.add(&format!("pod-{n}"), SECOND).await.expect("warm");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [8]);
    world.cloud.tag_subnet(&world.subnet, "kubernetes.io/role/cni", "0");
    let mut other = stanchion_lab::fake_aws::SubnetSpec::new("subnet-0b", "eu-west-1a", "10.0.64.0/24".parse().expect("CIDR"));
    other.tags.insert("kubernetes.io/role/cni".to_owned(), "1".to_owned());
    let other = world.cloud.add_subnet(other);
    tokio::time::sleep(SECOND * 900).await;
    world.settle(SECOND * 100).await;
    let enis = world.cloud.enis_of(&world.instance);
    assert_eq!(enis[0].secondary_ipv4.len(), 2, "only what pods hold stays in the excluded subnet");
    assert!(enis.len() == 2 && enis[1].subnet == other, "new addresses come from the other");
    world.delete("pod-0").await.expect("released");
    world.settle(SECOND * 200).await;
    assert_eq!(world.cloud.enis_of(&world.instance)[0].secondary_ipv4.len(), 1);
    world.stop().await;
}

/// All ENIs that the instance may have are in the subnet, and nothing new fits beside them.
#[tokio::test(start_paused = true)]
async fn defect_05_enis_of_an_excluded_subnet_leave_their_slots_to_pods_that_wait() {
    let mut world = started("m5.large", &[]).await;
    for n in 0..18 {
        world.add(&format!("old-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [9, 9, 9]);
    world.cloud.tag_subnet(&world.subnet, "kubernetes.io/role/cni", "0");
    let mut other = stanchion_lab::fake_aws::SubnetSpec::new("subnet-0b", "eu-west-1a", "10.0.64.0/24".parse().expect("CIDR"));
    other.tags.insert("kubernetes.io/role/cni".to_owned(), "1".to_owned());
    let other = world.cloud.add_subnet(other);
    tokio::time::sleep(SECOND * 900).await;
    for n in 0..18 {
        world.delete(&format!("old-{n}")).await.expect("released");
    }
    // Longer than addresses cool down.
    for n in 0..12 {
        world.add(&format!("new-{n}"), SECOND * 120).await.expect("of the subnet that is for pods");
    }
    world.settle(SECOND * 100).await;
    let enis = world.cloud.enis_of(&world.instance);
    assert!(enis.len() == 3 && enis.iter().skip(1).all(|eni| eni.subnet == other), "{enis:?}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_06_ipv6_pods_keep_their_host_routes_after_a_restart() {
    let env = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let mut world = World::start(WorldSpec::new("m5.large", &env));
    let address = world.add("six", SECOND * 20).await.expect("served").attachments[0].ipv6.expect("IPv6");
    world.restart();
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 20).await;
    let planned: Vec<_> = world.host.plan().pods.iter().map(|pod| pod.address).collect();
    assert_eq!(planned, [std::net::IpAddr::from(address)]);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_10_a_call_that_hangs_for_minutes_stops_nobody_and_is_told() {
    let mut world = started("m5.large", &[("WARM_IP_TARGET", "3")]).await;
    world.cloud.inject(Fault::once("AssignPrivateIpAddresses", Effect::Delay(SECOND * 600)));
    for name in ["a", "b", "c"] {
        world.add(name, SECOND).await.expect("free ones are given while EC2 hangs");
    }
    let told = world.add("d", SECOND * 5).await.expect_err("nothing is free").to_string();
    assert!(told.contains("under way: assign"), "{told}");
    assert!(world.delete("a").await.expect("a DEL does not wait for EC2").is_some());
    assert!(world.handle.status().ready);
    tokio::time::sleep(SECOND * 700).await;
    world.add("e", SECOND * 20).await.expect("served when the call ended");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_15_the_same_events_give_the_same_addresses_and_the_same_calls() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let mut world = started("m5.xlarge", &PREFIXES).await;
        let mut given = Vec::new();
        for n in 0..40 {
            given.push(world.add(&format!("pod-{n}"), SECOND * 20).await.expect("served").attachments[0].ipv4);
            if n % 3 == 0 {
                world.delete(&format!("pod-{n}")).await.expect("released");
            }
        }
        world.settle(SECOND * 200).await;
        let calls: Vec<String> =
            world.cloud.calls().into_iter().map(|call| call.action).filter(|action| !action.starts_with("imds")).collect();
        runs.push((given, world.per_eni(), calls));
        world.stop().await;
    }
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0].1.len(), 1, "packed on the first ENI");
}

#[tokio::test(start_paused = true)]
async fn defect_16_an_eni_that_ec2_does_not_release_goes_on_serving() {
    let mut world = started("m5.large", &[]).await;
    for n in 0..3 {
        world.add(&format!("pod-{n}"), SECOND).await.expect("warm");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(world.per_eni(), [9, 9]);
    world.cloud.inject(Fault::always("DetachNetworkInterface", denied()));
    for n in 0..3 {
        world.delete(&format!("pod-{n}")).await.expect("released");
    }
    tokio::time::sleep(SECOND * 400).await;
    assert!(world.cloud.count("DetachNetworkInterface") > 0, "it was tried");
    let snapshot = world.handle.snapshot();
    assert!(snapshot.recent_errors.iter().any(|error| error.error.contains("UnauthorizedOperation")), "{:?}", snapshot.recent_errors);
    let (tags, looks) = (world.cloud.count("CreateTags"), world.handle.snapshot().enis.len());
    assert_eq!(looks, 2, "it was never forgotten");
    for n in 10..28 {
        world.add(&format!("pod-{n}"), SECOND).await.expect("both ENIs serve without a further call");
    }
    assert_eq!(world.cloud.count("CreateTags"), tags, "nothing was adopted anew");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_18_one_prefix_of_two_that_were_wanted_is_taken() {
    let mut spec = WorldSpec::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "2")]);
    spec.subnet = "10.0.16.0/26".parse().expect("CIDR");
    let mut world = World::start_with(spec, |cloud, subnet| {
        // EC2 keeps addresses of the first and the last block: of the two whole ones, one is broken.
        assert!(cloud.occupy(subnet, [std::net::Ipv4Addr::new(10, 0, 16, 37)]));
    });
    world.handle.ready().await.expect("ready");
    for n in 0..16 {
        world.add(&format!("pod-{n}"), SECOND * 30).await.expect("the one prefix serves sixteen");
    }
    assert_eq!(world.cloud.enis_of(&world.instance)[0].prefixes_v4.len(), 1);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn defect_19_an_unknown_pod_is_no_error() {
    let mut world = started("m5.large", &[]).await;
    assert_eq!(world.delete("nobody").await, Ok(None), "by type, not by the text of an error");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_nodes_security_groups_reach_every_eni() {
    let mut world = started("m5.large", &[]).await;
    world.add("first", SECOND).await.expect("warm");
    world.settle(SECOND * 20).await;
    let group = SecurityGroupId::from("sg-new");
    world.cloud.add_security_group(group.clone());
    let primary = world.cloud.enis_of(&world.instance)[0].id.clone();
    let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
    by_hand.set_security_groups(&primary, std::slice::from_ref(&group)).await.expect("changed by hand");
    // The first try is refused; the next look tries again.
    world.cloud.inject(Fault::once("ModifyNetworkInterfaceAttribute", denied()));
    tokio::time::sleep(SECOND * 150).await;
    let groups = |world: &World| world.cloud.enis_of(&world.instance).iter().map(|eni| eni.security_groups.clone()).collect::<Vec<_>>();
    assert_eq!(groups(&world), vec![vec![group.clone()]; 2]);
    assert!(world.handle.snapshot().recent_errors.iter().any(|error| error.operation == "security groups"));
    for n in 0..9 {
        world.add(&format!("pod-{n}"), SECOND * 20).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    assert_eq!(groups(&world), vec![vec![group]; 3], "a new ENI too");
    world.stop().await;
}

/// Something else puts addresses on the primary ENI; the agent only gives out what it finds.
async fn provided_by_others(env: &[(&str, &str)]) -> World {
    let timing = Timing { imds_lag: SECOND * 5, ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.large", env) });
    let why = world.add("early", SECOND * 3).await.expect_err("nothing is there").to_string();
    assert!(why.contains("DISABLE_NETWORK_RESOURCE_PROVISIONING") || why.contains("no address yet"), "{why}");
    let primary = world.cloud.enis_of(&world.instance)[0].id.clone();
    DirectEc2::new(&world.cloud, Duration::ZERO).assign(&primary, AddressRequest::Ipv4(3)).await.expect("provided");
    world.cloud.clear_calls();
    for n in 0..3 {
        world.add(&format!("pod-{n}"), SECOND * 120).await.expect("found and given out");
    }
    world.add("fourth", SECOND * 3).await.expect_err("nobody asks for more");
    for n in 0..3 {
        world.delete(&format!("pod-{n}")).await.expect("released");
    }
    tokio::time::sleep(SECOND * 7_200).await;
    for action in MUTATING.into_iter().chain(["AssignIpv6Addresses"]) {
        assert_eq!(world.cloud.count(action), 0, "{action} with {env:?}");
    }
    world
}

#[tokio::test(start_paused = true)]
async fn without_provisioning_nothing_is_changed_in_ec2() {
    let mut world = provided_by_others(&[("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true")]).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn in_imds_only_mode_ec2_is_never_called() {
    let mut world = provided_by_others(&[("ENABLE_IMDS_ONLY_MODE", "true")]).await;
    let calls: Vec<_> = world.cloud.calls().into_iter().map(|call| call.action).filter(|action| !action.starts_with("imds")).collect();
    assert!(calls.is_empty(), "{calls:?}");
    world.restart();
    world.handle.ready().await.expect("ready from IMDS alone");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn leaked_enis_are_swept_unless_that_is_switched_off() {
    for (value, left) in [("true", 1), ("false", 0)] {
        let mut world = started("m5.large", &[("DISABLE_LEAKED_ENI_CLEANUP", value), ("WARM_IP_TARGET", "1")]).await;
        let request = stanchion_core::cloud::CreateEni {
            client_token: "leak".to_owned(),
            subnet: world.subnet.clone(),
            security_groups: vec![SecurityGroupId::from("sg-nodes")],
            description: format!("aws-K8S-{}", world.instance),
            tags: [("node.k8s.amazonaws.com/instance_id".to_owned(), world.instance.to_string())].into(),
            addresses: None,
            connection_tracking: None,
        };
        DirectEc2::new(&world.cloud, Duration::ZERO).create_eni(&request).await.expect("left behind");
        tokio::time::sleep(SECOND * 4_000).await;
        let available = world.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()).count();
        assert_eq!(available, left, "DISABLE_LEAKED_ENI_CLEANUP={value}");
        world.stop().await;
    }
}
