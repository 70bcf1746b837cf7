//! The real SDK against the fake EC2 over loopback: every call of `Ec2Api`, every error that the planner tells apart.
#![allow(clippy::unwrap_used, reason = "a test panics")]

mod aws_common;

use std::collections::BTreeMap;
use std::time::Duration;

use aws_common::{Bed, SUBNET, bed, bed_with};
use ipnet::IpNet;
use stanchion_core::cloud::{AddressRequest, ConnectionTracking, CreateEni, Ec2Api as _, Ec2Error, Eni, EniKind};
use stanchion_core::ids::{AttachmentId, EniId, SecurityGroupId};
use stanchion_lab::fake_aws::{
    ApiError, Bucket, Chaos, CloudConfig, DirectEc2, Effect, EniEvent, Fault, InstanceSpec, Placement, SubnetSpec, Timing,
};

fn request(token: &str, addresses: Option<AddressRequest>) -> CreateEni {
    CreateEni {
        client_token: token.to_owned(),
        subnet: SUBNET.into(),
        security_groups: vec!["sg-nodes".into()],
        description: "aws-K8S-i-1".to_owned(),
        tags: BTreeMap::from([
            ("node.k8s.amazonaws.com/instance_id".to_owned(), "i-1".to_owned()),
            ("cluster.k8s.amazonaws.com/name".to_owned(), "demo & <test>".to_owned()),
        ]),
        addresses,
        connection_tracking: None,
    }
}

async fn attached(bed: &Bed, token: &str, index: u16, addresses: Option<AddressRequest>) -> (Eni, AttachmentId) {
    let eni = bed.ec2.create_eni(&request(token, addresses)).await.expect("the subnet has room");
    let attachment = bed.ec2.attach_eni(&eni.id, &bed.instance, index, 0).await.expect("the index is free");
    (eni, attachment)
}

#[tokio::test]
async fn an_eni_lives_from_creation_to_deletion() {
    let bed = bed().await;
    let mut events = bed.cloud.subscribe();
    let made = bed.ec2.create_eni(&request("t-1", Some(AddressRequest::Ipv4(3)))).await.unwrap();
    assert_eq!((made.kind, made.secondary_ipv4.len(), made.attachment.as_ref()), (EniKind::Interface, 3, None));
    assert_eq!(made.tags["cluster.k8s.amazonaws.com/name"], "demo & <test>");
    assert_eq!(made.connection_tracking, None, "the parameter is not sent");
    let own = ConnectionTracking { tcp_established: Some(600), udp_stream: Some(170), udp: None };
    let wanted = CreateEni { connection_tracking: Some(own), ..request("t-2", None) };
    let tracked = bed.ec2.create_eni(&wanted).await.unwrap();
    let described = bed.ec2.describe_enis(std::slice::from_ref(&tracked.id)).await.unwrap();
    assert_eq!((tracked.connection_tracking, described[0].connection_tracking), (Some(own), Some(own)));
    bed.ec2.delete_eni(&tracked.id).await.unwrap();

    let attachment = bed.ec2.attach_eni(&made.id, &bed.instance, 1, 0).await.unwrap();
    bed.ec2.set_delete_on_termination(&made.id, &attachment).await.unwrap();
    let described = bed.ec2.describe_enis(std::slice::from_ref(&made.id)).await.unwrap();
    let [eni] = described.as_slice() else { panic!("{described:?}") };
    assert_eq!((eni.status.as_str(), eni.mac, eni.primary_ipv4), ("in-use", made.mac, made.primary_ipv4));
    let shown = eni.attachment.clone().unwrap();
    assert_eq!((&shown.id, &shown.instance), (&attachment, &bed.instance));
    assert_eq!((shown.device_index, shown.delete_on_termination), (1, true));

    let more = bed.ec2.assign(&made.id, AddressRequest::Ipv4(2)).await.unwrap();
    assert!(more.len() == 2 && more.iter().all(|net| net.prefix_len() == 32), "{more:?}");
    bed.ec2.unassign(&made.id, &more[..1]).await.unwrap();
    let now = bed.cloud.eni(&made.id).unwrap();
    assert_eq!(now.secondary_ipv4.len(), 4);
    assert!(!now.secondary_ipv4.iter().any(|address| IpNet::V4((*address).into()) == more[0]));

    bed.cloud.add_security_group("sg-2".into());
    bed.ec2.set_security_groups(&made.id, &["sg-2".into()]).await.unwrap();
    bed.ec2.create_tags(&made.id, &BTreeMap::from([("k".to_owned(), "v".to_owned())])).await.unwrap();
    let now = bed.cloud.eni(&made.id).unwrap();
    assert_eq!((now.security_groups[0].as_str(), now.tags.len()), ("sg-2", 3));

    bed.ec2.detach_eni(&attachment).await.unwrap();
    bed.ec2.delete_eni(&made.id).await.unwrap();
    assert_eq!(bed.cloud.eni(&made.id), None);
    bed.ec2.detach_eni(&attachment).await.expect("gone is done");
    bed.ec2.delete_eni(&made.id).await.expect("gone is done");
    bed.cloud.assert_consistent();

    let kinds: Vec<_> = std::iter::from_fn(|| events.try_recv().ok())
        .map(|event| match event {
            EniEvent::Attached { eni, .. } => format!("attached {}", eni.attachment.unwrap().device_index),
            EniEvent::AddressesChanged { eni, before } => {
                format!("{} -> {}", before.secondary_ipv4.len(), eni.secondary_ipv4.len())
            }
            EniEvent::Detached { .. } => "detached".to_owned(),
            EniEvent::Deleted { .. } => "deleted".to_owned(),
        })
        .collect();
    assert_eq!(kinds, ["deleted", "attached 1", "3 -> 5", "5 -> 4", "detached", "deleted"]);
}

#[tokio::test]
async fn prefixes_and_ipv6_come_and_go() {
    let bed = bed().await;
    let (eni, _) = attached(&bed, "t", 1, Some(AddressRequest::Ipv4Prefixes(1))).await;
    assert_eq!(eni.prefixes_v4.len(), 1);
    let more = bed.ec2.assign(&eni.id, AddressRequest::Ipv4Prefixes(2)).await.unwrap();
    assert!(more.len() == 2 && more.iter().all(|net| net.prefix_len() == 28), "{more:?}");
    let v6 = bed.ec2.assign(&eni.id, AddressRequest::Ipv6Prefixes(1)).await.unwrap();
    assert!(v6.len() == 1 && v6[0].prefix_len() == 80, "{v6:?}");
    let shown = bed.ec2.describe_enis(std::slice::from_ref(&eni.id)).await.unwrap().remove(0);
    assert_eq!((shown.prefixes_v4.len(), shown.prefixes_v6.len()), (3, 1));
    bed.ec2.unassign(&eni.id, &more).await.unwrap();
    bed.ec2.unassign(&eni.id, &v6).await.unwrap();
    let now = bed.cloud.eni(&eni.id).unwrap();
    assert_eq!((now.prefixes_v4.len(), now.prefixes_v6.len()), (1, 0));
}

#[tokio::test]
async fn the_same_token_gives_the_same_eni_and_a_lost_reply_leaks_none() {
    let bed = bed().await;
    bed.cloud.inject(Fault::once("CreateNetworkInterface", Effect::LoseReply));
    let wanted = request("token-1", Some(AddressRequest::Ipv4(1)));
    let lost = bed.ec2.create_eni(&wanted).await.unwrap_err();
    assert!(matches!(lost, Ec2Error::NoReply { .. }), "{lost:?}");
    assert_eq!(bed.cloud.count("CreateNetworkInterface"), 1, "the SDK must not have tried again by itself");
    let first = bed.ec2.create_eni(&wanted).await.unwrap();
    assert_eq!(bed.ec2.create_eni(&wanted).await.unwrap().id, first.id);
    assert_eq!(bed.cloud.enis().len(), 2, "the primary one and the new one");
    let other = bed.ec2.create_eni(&request("token-1", None)).await.unwrap_err();
    assert!(matches!(&other, Ec2Error::Other { code, .. } if code == "IdempotentParameterMismatch"), "{other:?}");
}

#[tokio::test]
async fn each_error_is_what_the_planner_takes_it_for() {
    let bed = bed().await;
    let (eni, attachment) = attached(&bed, "t", 1, None).await;

    let taken = bed.ec2.create_eni(&request("t2", None)).await.unwrap();
    let error = bed.ec2.attach_eni(&taken.id, &bed.instance, 1, 0).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::AttachmentConflict { code, .. } if code == "InvalidParameterValue"), "{error:?}");
    bed.ec2.attach_eni(&taken.id, &bed.instance, 2, 0).await.unwrap();
    let fourth = bed.ec2.create_eni(&request("t3", None)).await.unwrap();
    let error = bed.ec2.attach_eni(&fourth.id, &bed.instance, 3, 0).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::AttachmentConflict { code, .. } if code == "AttachmentLimitExceeded"), "{error:?}");

    // m5.large: 10 addresses an ENI, its own among them.
    bed.ec2.assign(&eni.id, AddressRequest::Ipv4(9)).await.unwrap();
    let error = bed.ec2.assign(&eni.id, AddressRequest::Ipv4(1)).await.unwrap_err();
    assert!(matches!(error, Ec2Error::AddressLimit { .. }), "{error:?}");

    let error = bed.ec2.assign(&"eni-none".into(), AddressRequest::Ipv4(1)).await.unwrap_err();
    assert!(matches!(error, Ec2Error::NotFound { .. }), "{error:?}");
    let stranger: IpNet = "10.0.99.1/32".parse().unwrap();
    let error = bed.ec2.unassign(&eni.id, &[stranger]).await.unwrap_err();
    assert!(matches!(error, Ec2Error::NotFound { .. }), "{error:?}");
    let error = bed.ec2.delete_eni(&eni.id).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Other { message, .. } if message.contains("in use")), "{error:?}");
    let primary = bed.cloud.enis_of(&bed.instance)[0].attachment.clone().unwrap().id;
    let error = bed.ec2.detach_eni(&primary).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Other { code, .. } if code == "OperationNotPermitted"), "{error:?}");

    let denied = ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation.");
    bed.cloud.inject(Fault::once("DetachNetworkInterface", Effect::Error(denied)));
    let error = bed.ec2.detach_eni(&attachment).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Unauthorized { message, .. } if message.contains("not authorized")), "{error:?}");
}

#[tokio::test]
async fn a_full_and_a_fragmented_subnet_are_both_insufficiency() {
    let bed = bed().await;
    let (eni, _) = attached(&bed, "t", 1, None).await;
    bed.cloud.fragment(&SUBNET.into());
    for error in [
        bed.ec2.assign(&eni.id, AddressRequest::Ipv4Prefixes(1)).await.unwrap_err(),
        bed.ec2.create_eni(&request("t2", Some(AddressRequest::Ipv4Prefixes(1)))).await.unwrap_err(),
    ] {
        assert!(matches!(&error, Ec2Error::InsufficientAddresses { code, .. } if code == "InsufficientCidrBlocks"), "{error:?}");
    }
    bed.ec2.assign(&eni.id, AddressRequest::Ipv4(1)).await.expect("single addresses are left");
    let subnet = bed.cloud.subnet(&SUBNET.into()).unwrap();
    bed.cloud.occupy(&SUBNET.into(), subnet.cidr.hosts());
    assert_eq!(bed.cloud.subnet(&SUBNET.into()).unwrap().available_addresses, 0);
    for (addresses, code) in [
        (AddressRequest::Ipv4(1), "InsufficientFreeAddressesInSubnet"),
        // A code that says nothing; only the text tells.
        (AddressRequest::Ipv4Prefixes(1), "InvalidParameterValue"),
    ] {
        let error = bed.ec2.assign(&eni.id, addresses).await.unwrap_err();
        assert!(matches!(&error, Ec2Error::InsufficientAddresses { code: got, .. } if got == code), "{error:?}");
    }
}

#[tokio::test]
async fn throttling_is_told_after_one_request() {
    let bed = bed().await;
    bed.cloud.set_bucket("DescribeNetworkInterfaces", Bucket { size: 2.0, per_second: 0.001 });
    for _ in 0..2 {
        bed.ec2.describe_attached(&bed.instance).await.unwrap();
    }
    let error = bed.ec2.describe_attached(&bed.instance).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Throttled { code, .. } if code == "RequestLimitExceeded"), "{error:?}");
    assert_eq!(bed.cloud.count("DescribeNetworkInterfaces"), 3);
}

#[tokio::test]
async fn lists_are_read_to_their_last_page() {
    let bed = bed_with(CloudConfig { page_size: 7, ..Bed::config() }).await;
    let mut ids = Vec::new();
    for n in 0..30 {
        ids.push(bed.ec2.create_eni(&request(&format!("t-{n}"), None)).await.unwrap().id);
    }
    ids.push("eni-unknown".into());
    bed.cloud.clear_calls();
    let described = bed.ec2.describe_enis(&ids).await.unwrap();
    assert_eq!(described.len(), 30, "the unknown one is left out");
    assert_eq!(bed.cloud.count("DescribeNetworkInterfaces"), 5);
    let tags = BTreeMap::from([("cluster.k8s.amazonaws.com/name".to_owned(), "demo & <test>".to_owned())]);
    assert_eq!(bed.ec2.describe_leaked(&bed.vpc, &tags).await.unwrap().len(), 30);
    let none = BTreeMap::from([("cluster.k8s.amazonaws.com/name".to_owned(), "other".to_owned())]);
    assert_eq!(bed.ec2.describe_leaked(&bed.vpc, &none).await.unwrap(), []);
    for n in 0..20 {
        let cidr = format!("10.0.{}.0/24", 100 + n).parse().unwrap();
        bed.cloud.add_subnet(SubnetSpec::new(format!("subnet-x{n}"), "eu-west-1a", cidr));
    }
    bed.cloud.add_subnet(SubnetSpec::new("subnet-b", "eu-west-1b", "10.0.200.0/24".parse().unwrap()));
    let subnets = bed.ec2.describe_subnets(&bed.vpc, "eu-west-1a").await.unwrap();
    assert_eq!(subnets.len(), 21);
    assert!(subnets.iter().all(|subnet| subnet.availability_zone == "eu-west-1a" && subnet.available_addresses > 200));
    for n in 0..20 {
        let group = SecurityGroupId::new(format!("sg-{n:02}"));
        bed.cloud.add_security_group(group.clone());
        bed.cloud.tag_security_group(&group, "role", if n % 2 == 0 { "1" } else { "0" });
    }
    let tagged = bed.ec2.describe_security_groups(&bed.vpc, ("role", "1")).await.unwrap();
    assert_eq!(tagged.iter().map(SecurityGroupId::as_str).collect::<Vec<_>>()[..2], ["sg-00", "sg-02"]);
    assert_eq!((tagged.len(), bed.cloud.count("DescribeSecurityGroups")), (10, 2));
    assert_eq!(bed.ec2.describe_security_groups(&"vpc-other".into(), ("role", "1")).await.unwrap(), []);
    assert_eq!(bed.ec2.describe_enis(&[]).await.unwrap(), [], "no id is no ENI, not every ENI");
}

#[tokio::test]
async fn limits_of_types_with_several_cards_are_read() {
    let bed = bed().await;
    let limits = bed.ec2.describe_instance_type("p4d.24xlarge").await.unwrap();
    assert_eq!((limits.max_enis, limits.ipv4_per_eni, limits.network_cards.len()), (15, 50, 4));
    assert!(limits.supports_prefixes());
    let limits = bed.ec2.describe_instance_type("m5.large").await.unwrap();
    assert_eq!((limits.max_enis, limits.ipv4_per_eni, limits.default_network_card), (3, 10, 0));
    let error = bed.ec2.describe_instance_type("m99.huge").await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Other { code, .. } if code == "InvalidInstanceType"), "{error:?}");
}

#[tokio::test]
async fn describe_lags_behind_what_was_done() {
    let lag = Duration::from_millis(400);
    let bed = bed_with(CloudConfig { timing: Timing { describe_lag: lag, ..Timing::default() }, ..Bed::config() }).await;
    let eni = bed.ec2.create_eni(&request("t", None)).await.unwrap();
    assert_eq!(bed.ec2.describe_enis(std::slice::from_ref(&eni.id)).await.unwrap(), []);
    tokio::time::timeout(Duration::from_secs(10), async {
        while bed.ec2.describe_enis(std::slice::from_ref(&eni.id)).await.unwrap().is_empty() {}
    })
    .await
    .expect("shown after the lag");
}

#[tokio::test]
async fn nonsense_is_an_error_and_never_a_panic() {
    let bed = bed().await;
    let whole = "<?xml version=\"1.0\"?><DescribeNetworkInterfacesResponse><networkInterfaceSet><item>\
        <networkInterfaceId>eni-1</networkInterfaceId><subnetId>s</subnetId><vpcId>v</vpcId>\
        <macAddress>02:00:00:00:00:01</macAddress><privateIpAddressesSet><item><privateIpAddress>10.0.0.9</privateIpAddress>\
        <primary>true</primary></item></privateIpAddressesSet><attachment><attachmentId>a</attachmentId>\
        <instanceId>i</instanceId><deviceIndex>1</deviceIndex></attachment></item></networkInterfaceSet>\
        </DescribeNetworkInterfacesResponse>";
    let say = |text: &str| bed.cloud.inject(Fault::once("DescribeNetworkInterfaces", Effect::Garbage(text.to_owned())));
    say(whole);
    assert_eq!(bed.ec2.describe_attached(&bed.instance).await.unwrap()[0].id, EniId::from("eni-1"));
    for (field, bad) in [
        ("02:00:00:00:00:01", "02:00:00"),
        ("<macAddress>02:00:00:00:00:01</macAddress>", ""),
        ("<networkInterfaceId>eni-1</networkInterfaceId>", ""),
        ("10.0.0.9", "10.0.0.999"),
        ("<deviceIndex>1", "<deviceIndex>-1"),
        ("<deviceIndex>1", "<deviceIndex>70000"),
        ("<deviceIndex>1", "<deviceIndex>one"),
        ("</networkInterfaceSet>", "</networkInterfaceSet><nextToken>same</nextToken>"),
    ] {
        let text = whole.replace(field, bad);
        assert_ne!(text, whole);
        say(&text);
        say(&text);
        let reply = bed.ec2.describe_attached(&bed.instance).await;
        assert!(reply.is_err(), "{bad:?}: {reply:?}");
        bed.cloud.clear_faults();
    }
    // A reply cut short at any place.
    for end in (0..whole.len()).step_by(7) {
        say(&whole[..end]);
        if let Ok(enis) = bed.ec2.describe_attached(&bed.instance).await {
            assert!(enis.len() <= 1, "{enis:?}");
        }
    }
    for text in ["", "not xml", "<html>502</html>", "{}"] {
        bed.cloud.inject(Fault::once("CreateNetworkInterface", Effect::Garbage(text.to_owned())));
        let reply = bed.ec2.create_eni(&request("x", None)).await;
        assert!(matches!(reply, Err(Ec2Error::NoReply { .. })), "{text:?}: {reply:?}");
    }
}

#[tokio::test]
async fn signatures_are_checked_and_expired_keys_are_a_persons_matter() {
    let bed = bed().await;
    bed.cloud.add_access_key("AKIDTEST", "wrong", None, None);
    let error = bed.ec2.describe_attached(&bed.instance).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Unauthorized { code, .. } if code == "AuthFailure"), "{error:?}");
    bed.cloud.add_access_key("AKIDTEST", "secret", None, Some(Duration::from_secs(3600)));
    bed.ec2.describe_attached(&bed.instance).await.expect("the signature is right");
    bed.cloud.expire_keys();
    let error = bed.ec2.describe_attached(&bed.instance).await.unwrap_err();
    assert!(matches!(&error, Ec2Error::Unauthorized { code, .. } if code == "RequestExpired"), "{error:?}");
}

/// Random calls over HTTP and the same calls on the model directly end in the same world.
#[tokio::test]
async fn http_and_the_direct_way_agree() {
    let (over_http, direct) = (bed().await, bed().await);
    let twin = DirectEc2::new(&direct.cloud, Duration::ZERO);
    for bed in [&over_http, &direct] {
        let chaos = Chaos { seed: 11, throttle: 60, internal_error: 40, lose_reply: 60, drop_request: 60, ..Chaos::default() };
        bed.cloud.set_chaos(chaos);
    }
    let mut ids: Vec<EniId> = vec![over_http.cloud.enis()[0].id.clone()];
    for step in 0..300u64 {
        let draw = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        let pick = |n: u64, salt: u32| (draw >> salt) % n;
        let eni = ids[pick(ids.len() as u64, 3) as usize].clone();
        let attachment = over_http.cloud.eni(&eni).and_then(|eni| eni.attachment).map(|a| a.id);
        let (a, b) = match pick(7, 17) {
            0 | 1 => {
                let wanted = request(&format!("t{}", pick(40, 9)), Some(AddressRequest::Ipv4(1)));
                (over_http.ec2.create_eni(&wanted).await.map(|e| ids.push(e.id)), twin.create_eni(&wanted).await.map(|_| ()))
            }
            2 => {
                let index = pick(4, 11) as u16;
                (
                    over_http.ec2.attach_eni(&eni, &over_http.instance, index, 0).await.map(|_| ()),
                    twin.attach_eni(&eni, &direct.instance, index, 0).await.map(|_| ()),
                )
            }
            3 => (
                over_http.ec2.assign(&eni, AddressRequest::Ipv4(2)).await.map(|_| ()),
                twin.assign(&eni, AddressRequest::Ipv4(2)).await.map(|_| ()),
            ),
            4 => (
                over_http.ec2.assign(&eni, AddressRequest::Ipv4Prefixes(1)).await.map(|_| ()),
                twin.assign(&eni, AddressRequest::Ipv4Prefixes(1)).await.map(|_| ()),
            ),
            5 => match attachment {
                Some(attachment) => (over_http.ec2.detach_eni(&attachment).await, twin.detach_eni(&attachment).await),
                None => continue,
            },
            _ => (over_http.ec2.delete_eni(&eni).await, twin.delete_eni(&eni).await),
        };
        let kind = |reply: &Result<(), Ec2Error>| reply.as_ref().err().map(std::mem::discriminant);
        assert_eq!(kind(&a), kind(&b), "step {step}: {a:?} and {b:?}");
    }
    assert_eq!(over_http.cloud.enis(), direct.cloud.enis());
    assert!(over_http.cloud.enis().len() > 3);
    over_http.cloud.assert_consistent();
}

#[tokio::test]
async fn scattered_addresses_fragment_a_subnet_by_themselves() {
    let bed = bed_with(CloudConfig { placement: Placement::Scattered { seed: 5 }, ..Bed::config() }).await;
    for n in 0..12 {
        bed.cloud.run_instance(InstanceSpec::new(format!("i-{}", n + 10), "m5.large", &SUBNET.into()));
    }
    let (eni, _) = attached(&bed, "t", 1, Some(AddressRequest::Ipv4(9))).await;
    assert_eq!(eni.secondary_ipv4.len(), 9);
    let free = bed.cloud.subnet(&SUBNET.into()).unwrap().available_addresses;
    let prefixes = bed.cloud.free_prefixes(&SUBNET.into());
    assert!(prefixes * 16 < free / 2, "{free} addresses but {prefixes} blocks");
}

/// An IPv6-only subnet has no IPv4 range: it can hold no ENI of ours, and says nothing of those beside it.
#[tokio::test]
async fn a_subnet_without_an_ipv4_range_is_passed_over() {
    let bed = bed().await;
    let item = |id: &str, ranges: &str| {
        format!(
            "<item><subnetId>{id}</subnetId><vpcId>v</vpcId>{ranges}<availableIpAddressCount>0</availableIpAddressCount>\
             <availabilityZone>eu-west-1a</availabilityZone></item>"
        )
    };
    let reply = |items: &[String]| {
        format!("<?xml version=\"1.0\"?><DescribeSubnetsResponse><subnetSet>{}</subnetSet></DescribeSubnetsResponse>", items.concat())
    };
    let ipv6 = "<ipv6Native>true</ipv6Native><ipv6CidrBlockAssociationSet><item><ipv6CidrBlock>2001:db8:0:2::/64</ipv6CidrBlock></item>\
                </ipv6CidrBlockAssociationSet>";
    let (native, empty) = (item("subnet-6", ipv6), item("subnet-7", &format!("<cidrBlock></cidrBlock>{ipv6}")));
    let text = reply(&[native, item("subnet-4", "<cidrBlock>10.0.7.0/24</cidrBlock>"), empty]);
    bed.cloud.inject(Fault::once("DescribeSubnets", Effect::Garbage(text)));
    let subnets = bed.ec2.describe_subnets(&bed.vpc, "eu-west-1a").await.unwrap();
    let read: Vec<_> = subnets.iter().map(|subnet| (subnet.id.as_str(), subnet.cidr.to_string())).collect();
    assert_eq!(read, [("subnet-4", "10.0.7.0/24".to_owned())]);
    for bad in ["<cidrBlock>10.0.7.0/44</cidrBlock>", "<cidrBlock>ten</cidrBlock>"] {
        bed.cloud.inject(Fault::once("DescribeSubnets", Effect::Garbage(reply(&[item("subnet-4", bad)]))));
        assert!(bed.ec2.describe_subnets(&bed.vpc, "eu-west-1a").await.is_err(), "{bad}");
    }
}
