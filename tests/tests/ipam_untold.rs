//! What EC2 and IMDS do not tell, tell late or refuse, and what the address actor makes of it; on paused time.

use std::time::Duration;

use ipnet::Ipv4Net;
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api as _, Eni};
use stanchion_core::cluster::ClusterState;
use stanchion_core::network::EniRole;
use stanchion_lab::fake_aws::{ApiError, DirectEc2, Effect, Fault, SubnetSpec, Timing};
use stanchion_lab::ipam_world::{World, WorldSpec};
use tokio::time::{Instant, timeout};

const SECOND: Duration = Duration::from_secs(1);

fn denied() -> Effect {
    Effect::Error(ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation."))
}

fn throttled() -> Effect {
    Effect::Error(ApiError::with_status(503, "RequestLimitExceeded", "Request limit exceeded."))
}

/// Where new ENIs may go: a /24 of the node's zone that is tagged for pods.
fn tagged(id: &str, cidr: &str) -> SubnetSpec {
    let mut subnet = SubnetSpec::new(id, "eu-west-1a", cidr.parse().expect("CIDR"));
    subnet.tags.insert("kubernetes.io/role/cni".to_owned(), "1".to_owned());
    subnet
}

/// The range is the length of the ENI's own address and tells the gateway: with a wrong one its pods reach nobody.
#[tokio::test(start_paused = true)]
async fn an_eni_of_a_subnet_that_nobody_described_serves_once_imds_tells_its_range() {
    let custom =
        [("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"), ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone"), ("WARM_IP_TARGET", "1")];
    for discovery in ["false", "true"] {
        let timing = Timing { imds_lag: SECOND * 20, ..Timing::default() };
        let env = [&custom[..], &[("ENABLE_SUBNET_DISCOVERY", discovery)]].concat();
        let mut world = World::start_with(WorldSpec { timing, ..WorldSpec::new("m5.large", &env) }, |cloud, _| {
            cloud.add_subnet(SubnetSpec::new("subnet-pods", "eu-west-1a", "10.0.64.0/24".parse().expect("CIDR")));
            cloud.inject(Fault::always("DescribeSubnets", denied()));
        });
        let mut state = ClusterState::default();
        let text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-1\n  labels: {topology.kubernetes.io/zone: eu-west-1a}\n---\napiVersion: crd.k8s.amazonaws.com/v1alpha1\nkind: ENIConfig\nmetadata: {name: eu-west-1a}\nspec: {subnet: subnet-pods}\n";
        for object in stanchion_core::manifests::parse("nodes.yaml", text).expect("manifests") {
            state.apply(object);
        }
        world.cluster.send_replace(std::sync::Arc::new(state));
        let why = world.add("early", SECOND * 10).await.expect_err("IMDS does not show the ENI yet").to_string();
        assert!(why.contains("the range of its subnet subnet-pods is not known"), "discovery {discovery}: {why}");
        let served = world.add("first", SECOND * 60).await.expect("served");
        assert_eq!(served.attachments[0].device_index, 1);
        let own = world.cloud.enis_of(&world.instance)[1].primary_ipv4.expect("IPv4");
        let planned: Vec<_> =
            world.host.plan().enis.into_iter().filter(|eni| eni.role == EniRole::Secondary).filter_map(|eni| eni.ipv4).collect();
        assert_eq!(planned, [Ipv4Net::new_assert(own, 24)], "discovery {discovery}");
        world.settle(SECOND * 60).await;
        let looks = world.cloud.count("DescribeNetworkInterfaces");
        assert!(looks < 15, "EC2 need not be asked for what IMDS is about to tell: {looks}");
        world.stop().await;
    }
}

/// An ENI that somebody else made, attached by hand.
async fn attached_by_hand(world: &World, device_index: u16, tags: &[(&str, &str)]) -> Eni {
    let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
    let request = CreateEni {
        client_token: String::new(),
        subnet: world.subnet.clone(),
        security_groups: vec!["sg-nodes".into()],
        description: "a person's".to_owned(),
        tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        addresses: Some(AddressRequest::Ipv4(1)),
        connection_tracking: None,
    };
    let eni = by_hand.create_eni(&request).await.expect("created");
    by_hand.attach_eni(&eni.id, &world.instance, device_index, 0).await.expect("attached");
    world.cloud.eni(&eni.id).expect("there")
}

/// Tags are EC2's: without its word only the primary ENI and those on which the agent gave out addresses are known to be the pods'.
#[tokio::test(start_paused = true)]
async fn until_ec2_tells_whose_an_eni_is_nothing_of_it_is_touched_or_given_out() {
    let mut world = World::start(WorldSpec::new("m5.xlarge", &[("WARM_IP_TARGET", "1")]));
    for n in 0..15 {
        world.add(&format!("pod-{n}"), SECOND * 60).await.expect("served");
    }
    let theirs = attached_by_hand(&world, 2, &[("node.k8s.amazonaws.com/no_manage", "true")]).await;
    let untagged = attached_by_hand(&world, 3, &[]).await;
    let planned = |world: &World, eni: &Eni| world.host.plan().enis.iter().any(|planned| planned.id == eni.id);
    while !planned(&world, &untagged) {
        tokio::time::sleep(SECOND).await;
    }
    assert_eq!((world.per_eni(), planned(&world, &theirs)), (vec![14, 2, 1, 1], false));

    world.cloud.inject(Fault::always("DescribeNetworkInterfaces", throttled()));
    world.restart();
    world.handle.ready().await.expect("ready without EC2's word");
    let second = world.cloud.enis_of(&world.instance)[1].clone();
    world.add("next", SECOND * 30).await.expect("of the ENI that has a pod");
    assert!(planned(&world, &second), "the checkpoint names it");
    world.cloud.inject(Fault::always("AssignPrivateIpAddresses", throttled()));
    let mut given = Vec::new();
    for n in 0..4 {
        match world.add(&format!("late-{n}"), SECOND).await {
            Ok(served) => given.push(served.attachments[0].eni.clone()),
            Err(error) => assert!(error.to_string().contains("EC2 has not told whether"), "{error}"),
        }
        assert!(!planned(&world, &theirs) && !planned(&world, &untagged), "no operation of the host concerns them");
    }
    assert!(!given.contains(&theirs.id) && !given.contains(&untagged.id), "{given:?}");

    world.cloud.clear_faults();
    world.cloud.inject(Fault::always("AssignPrivateIpAddresses", throttled()));
    let served = world.add("last", SECOND * 120).await.expect("EC2 has told");
    assert_eq!(served.attachments[0].eni, untagged.id);
    assert!(planned(&world, &untagged) && !planned(&world, &theirs));
    world.stop().await;
}

/// A node whose own subnet is full, beside one that is tagged for pods.
fn with_a_full_subnet(of_subnets: Fault) -> World {
    let mut spec = WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]);
    spec.subnet = "10.0.16.0/28".parse().expect("CIDR");
    World::start_with(spec, |cloud, subnet| {
        let free = (4..15).map(|n| std::net::Ipv4Addr::new(10, 0, 16, n)).filter(|ip| cloud.owner_of((*ip).into()).is_none());
        assert!(cloud.occupy(subnet, free.collect::<Vec<_>>()));
        cloud.add_subnet(tagged("subnet-pods", "10.0.64.0/24"));
        cloud.inject(of_subnets);
    })
}

#[tokio::test(start_paused = true)]
async fn subnets_that_ec2_did_not_tell_at_the_start_are_asked_for_again_at_once() {
    let mut world = with_a_full_subnet(Fault::once("DescribeSubnets", throttled()));
    timeout(SECOND * 60, world.handle.ready()).await.expect("within a minute").expect("ready");
    world.settle(SECOND * 20).await;
    let reads = world.cloud.count("DescribeSubnets");
    assert_eq!((reads, world.per_eni()), (2, vec![0, 1]));
    world.stop().await;

    // For good: as without discovery, and not asked for all the time.
    let mut world = World::start_with(WorldSpec::new("m5.large", &[]), |cloud, _| {
        cloud.inject(Fault::always("DescribeSubnets", throttled()));
    });
    for n in 0..12 {
        world.add(&format!("pod-{n}"), SECOND * 120).await.expect("of the node's own subnet");
    }
    tokio::time::sleep(SECOND * 3_600).await;
    let reads = world.cloud.count("DescribeSubnets");
    assert!((8..20).contains(&reads), "{reads} in an hour");
    world.stop().await;
}

/// The tag that keeps pods out of a subnet is in the list that is missing: no ENI is made there meanwhile.
#[tokio::test(start_paused = true)]
async fn no_eni_is_made_where_a_tag_that_is_not_known_yet_may_forbid_it() {
    let mut world = World::start_with(WorldSpec::new("m5.large", &[]), |cloud, subnet| {
        cloud.tag_subnet(subnet, "kubernetes.io/role/cni", "0");
        cloud.add_subnet(tagged("subnet-pods", "10.0.64.0/24"));
        cloud.inject(Fault::times("DescribeSubnets", 2, throttled()));
    });
    for n in 0..12 {
        world.add(&format!("pod-{n}"), SECOND * 60).await.expect("served");
    }
    world.settle(SECOND * 20).await;
    let enis = world.cloud.enis_of(&world.instance);
    assert!(enis.len() > 1 && enis.iter().skip(1).all(|eni| eni.subnet.as_str() == "subnet-pods"), "{enis:?}");
    world.stop().await;
}

/// A role without ec2:DescribeSubnets never will tell: nobody waits for it.
#[tokio::test(start_paused = true)]
async fn a_role_that_may_not_read_subnets_puts_enis_into_the_nodes_own_at_once() {
    let mut world = World::start_with(WorldSpec::new("m5.large", &[]), |cloud, _| {
        cloud.inject(Fault::always("DescribeSubnets", denied()));
    });
    for n in 0..12 {
        world.add(&format!("pod-{n}"), SECOND * 3).await.expect("served");
    }
    tokio::time::sleep(SECOND * 3_600).await;
    assert!(world.cloud.count("DescribeSubnets") <= 7, "{}", world.cloud.count("DescribeSubnets"));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_takes_no_enis_does_not_hold_up_the_next() {
    let mut world = World::start_with(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "1")]), |cloud, _| {
        cloud.add_subnet(tagged("subnet-big", "10.0.128.0/18"));
    });
    world.handle.ready().await.expect("ready");
    world.settle(SECOND * 20).await;
    world.cloud.remove_subnet(&"subnet-big".into());
    // The list of before is all that there is.
    world.cloud.inject(Fault::once("DescribeSubnets", throttled()));
    for n in 0..9 {
        world.add(&format!("pod-{n}"), SECOND * 10).await.expect("of the primary ENI");
    }
    let asked = Instant::now();
    let served = world.add("tenth", SECOND * 30).await.expect("of an ENI in the node's own subnet");
    assert_eq!(served.attachments[0].device_index, 1);
    assert!(asked.elapsed() < SECOND * 3, "{:?}", asked.elapsed());
    world.settle(SECOND * 60).await;
    let refused = world.cloud.calls().iter().filter(|call| call.error.as_deref() == Some("InvalidSubnetID.NotFound")).count();
    assert_eq!((refused, world.cloud.count("DescribeSubnets")), (1, 3), "the list is read anew, and the subnet is not in it");
    world.stop().await;
}

/// SageMaker HyperPod: IMDS and EC2 show the node's own ENI at index 1.
#[tokio::test(start_paused = true)]
async fn the_nodes_own_eni_is_its_own_wherever_it_is_attached() {
    let mut world = World::start(WorldSpec { device_index: 1, ..WorldSpec::new("m5.large", &[]) });
    let own = world.cloud.enis_of(&world.instance)[0].clone();
    for restarted in [false, true] {
        if restarted {
            world.restart();
        }
        for n in 0..12 {
            let served = world.add(&format!("pod-{n}"), SECOND * 60).await.expect("served").attachments[0].clone();
            let main = (0, 254);
            assert_eq!((served.device_index, served.route_table) == main, served.eni == own.id, "pod-{n}: {served:?}");
        }
        world.settle(SECOND * 60).await;
        let roles: Vec<_> = world.host.plan().enis.into_iter().map(|eni| (eni.mac == own.mac, eni.role)).collect();
        assert!(roles.iter().all(|(is_own, role)| *is_own == (*role == EniRole::Primary)), "{roles:?}");
        let indexes: Vec<_> =
            world.cloud.enis_of(&world.instance).iter().filter_map(|eni| Some(eni.attachment.as_ref()?.device_index)).collect();
        assert_eq!(indexes, [1, 2, 3], "one that is taken is not asked for");
        for n in 0..12 {
            world.delete(&format!("pod-{n}")).await.expect("released").expect("held");
        }
        tokio::time::sleep(SECOND * 600).await;
        assert_eq!(world.cloud.enis_of(&world.instance)[0].id, own.id, "it is never given back");
    }
    let refused: Vec<_> = world.cloud.calls().into_iter().filter(|call| call.error.is_some()).collect();
    assert!(refused.is_empty(), "{refused:?}");
    world.stop().await;
}

/// A node that waits for its trunk looks every few seconds, an account that throttles is asked less and less.
#[tokio::test(start_paused = true)]
async fn ec2_that_throttles_is_not_asked_at_every_look() {
    let mut world = World::start(WorldSpec::new("m5.xlarge", &[("ENABLE_POD_ENI", "true"), ("WARM_ENI_TARGET", "2")]));
    world.handle.ready().await.expect("ready");
    // Between two looks.
    tokio::time::sleep(SECOND * 123).await;
    // The node's security groups change, and IMDS shows an ENI that is not known.
    let primary = world.cloud.enis_of(&world.instance)[0].id.clone();
    let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
    by_hand.set_security_groups(&primary, &["sg-pods".into()]).await.expect("changed");
    world.cloud.inject(Fault::always("DescribeNetworkInterfaces", throttled()));
    world.cloud.inject(Fault::always("ModifyNetworkInterfaceAttribute", throttled()));
    let unknown = attached_by_hand(&world, 2, &[]).await.id;
    world.cloud.clear_calls();
    tokio::time::sleep(SECOND * 3_600).await;
    let (described, modified) = (world.cloud.count("DescribeNetworkInterfaces"), world.cloud.count("ModifyNetworkInterfaceAttribute"));
    assert!((20..=70).contains(&described), "{described} in an hour");
    assert!((4..=20).contains(&modified), "{modified} in an hour");
    world.cloud.clear_faults();
    tokio::time::sleep(SECOND * 120).await;
    assert!(world.handle.snapshot().enis.iter().any(|eni| eni.id == unknown), "found once EC2 answers");
    world.stop().await;
}

/// Without the VPC's ranges everything would look like outside of it, and get the node's address.
#[tokio::test(start_paused = true)]
async fn no_source_nat_is_written_before_the_vpcs_ranges_are_known() {
    let unavailable = Effect::Error(ApiError::with_status(503, "ServiceUnavailable", ""));
    let path = "imds:/latest/meta-data/network/interfaces/macs/vpc-ipv4-cidr-blocks";
    let mut world = World::start_with(WorldSpec::new("m5.large", &[]), |cloud, _| cloud.inject(Fault::times(path, 5, unavailable)));
    for _ in 0..1_200 {
        let plan = world.host.plan();
        let vpc: Ipv4Net = "10.0.0.0/16".parse().expect("CIDR");
        assert!(plan.snat.as_ref().is_none_or(|snat| snat.bypass.contains(&vpc)), "{:?}", plan.snat);
        tokio::time::sleep(SECOND / 10).await;
    }
    assert!(world.host.plan().snat.is_some());
    let served = world.add("first", SECOND).await.expect("served");
    assert!(served.vpc_cidrs.iter().any(|cidr| cidr.to_string() == "10.0.0.0/16"), "{:?}", served.vpc_cidrs);
    world.stop().await;
}

/// Where only IMDS may be asked, what it no longer shows for minutes is somebody else's.
#[tokio::test(start_paused = true)]
async fn in_imds_only_mode_what_imds_stops_showing_is_forgotten_and_what_it_hides_for_a_while_is_not() {
    let timing = Timing { imds_lag: SECOND * 5, ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, ..WorldSpec::new("m5.large", &[("ENABLE_IMDS_ONLY_MODE", "true")]) });
    let by_hand = DirectEc2::new(&world.cloud, Duration::ZERO);
    let primary = world.cloud.enis_of(&world.instance)[0].id.clone();
    let given = by_hand.assign(&primary, AddressRequest::Ipv4(3)).await.expect("provided");
    world.handle.ready().await.expect("ready");
    let total = |world: &World| world.handle.snapshot().pools[0].total;
    assert_eq!(total(&world), 3);

    // Nothing that IMDS does not say takes anything away.
    world.cloud.inject(Fault::always("imds:*", Effect::DropRequest));
    tokio::time::sleep(SECOND * 900).await;
    world.cloud.clear_faults();
    let second = attached_by_hand(&world, 1, &[]).await;
    tokio::time::sleep(SECOND * 120).await;
    assert_eq!(total(&world), 4);
    world.cloud.hide_from_imds(&second.id, SECOND * 100);
    tokio::time::sleep(SECOND * 300).await;
    assert_eq!(total(&world), 4, "back before three minutes were over");
    world.cloud.hide_from_imds(&primary, SECOND * 600);
    tokio::time::sleep(SECOND * 590).await;
    assert_eq!(total(&world), 4, "the primary ENI cannot go");
    tokio::time::sleep(SECOND * 120).await;

    by_hand.unassign(&primary, &given[1..]).await.expect("taken back");
    by_hand.detach_eni(&second.attachment.expect("attached").id).await.expect("detached");
    tokio::time::sleep(SECOND * 600).await;
    let served = world.add("first", SECOND).await.expect("the one that is left");
    assert_eq!(world.cloud.owner_of(served.attachments[0].ipv4.expect("IPv4").into()), Some(primary));
    let why = world.add("second", SECOND).await.expect_err("nothing else is there").to_string();
    assert!(why.contains("1 addresses, 1 held"), "{why}");
    world.stop().await;
}
