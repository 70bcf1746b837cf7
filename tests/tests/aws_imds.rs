//! The SDK's IMDSv2 client against the fake metadata service: complete and incomplete ENIs, lag, tokens, faults.
#![allow(clippy::unwrap_used, reason = "a test panics")]

mod aws_common;

use std::time::Duration;

use aws_common::{Bed, SUBNET, bed, bed_with};
use stanchion_aws::SdkImds;
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api as _, Imds as _, ImdsError};
use stanchion_core::ids::EniId;
use stanchion_lab::fake_aws::{ApiError, CloudConfig, DirectImds, Effect, Fault, InstanceSpec, Timing};

async fn attach(bed: &Bed, index: u16, addresses: Option<AddressRequest>) -> EniId {
    let request = CreateEni {
        client_token: format!("t-{index}"),
        subnet: SUBNET.into(),
        security_groups: vec!["sg-nodes".into()],
        description: String::new(),
        tags: Default::default(),
        addresses,
        connection_tracking: None,
    };
    let eni = bed.ec2.create_eni(&request).await.expect("the subnet has room");
    bed.ec2.attach_eni(&eni.id, &bed.instance, index, 0).await.expect("the index is free");
    eni.id
}

#[tokio::test]
async fn an_instance_learns_itself_and_its_enis() {
    let bed = bed().await;
    let id = attach(&bed, 1, Some(AddressRequest::Ipv4Prefixes(2))).await;
    bed.ec2.assign(&id, AddressRequest::Ipv6Prefixes(1)).await.unwrap();
    let me = bed.imds.identity().await.unwrap();
    let primary = bed.cloud.enis_of(&bed.instance)[0].clone();
    assert_eq!((me.instance, me.instance_type.as_str(), me.region.as_str()), (bed.instance.clone(), "m5.large", "eu-west-1"));
    assert_eq!(me.auto_scaling_group, None, "most launch templates do not let IMDS tell tags");
    assert_eq!((me.availability_zone.as_str(), me.primary_mac, me.local_ipv4), ("eu-west-1a", primary.mac, primary.primary_ipv4));
    let enis = bed.imds.enis().await.unwrap();
    assert_eq!(enis.len(), 2);
    let second = enis.iter().find(|eni| eni.id == id).unwrap();
    assert_eq!((second.device_index, second.network_card, second.prefixes_v4.len(), second.prefixes_v6.len()), (1, 0, 2, 1));
    assert_eq!(second.local_ipv4s, [bed.cloud.eni(&id).unwrap().primary_ipv4.unwrap()]);
    assert_eq!(second.subnet_cidr.unwrap().to_string(), "10.0.1.0/24");
    assert_eq!(second.security_groups, ["sg-nodes".into()]);
    assert_eq!(bed.imds.vpc_ipv4_cidrs(me.primary_mac).await.unwrap(), bed.cloud.vpc_cidrs());
    assert_eq!(bed.imds.vpc_ipv6_cidrs(me.primary_mac).await.unwrap().len(), 1);
    assert_eq!(DirectImds::new(&bed.cloud, &bed.instance).enis().await.unwrap(), enis, "both ways show the same");
}

#[tokio::test]
async fn an_instance_with_ipv6_and_a_second_card_says_so() {
    let bed = bed_with(Bed::config()).await;
    let tags = [("aws:autoscaling:groupName".to_owned(), "eks-workers-0123".to_owned())].into();
    let spec = InstanceSpec { ipv6: true, tags, ..InstanceSpec::new("i-2", "p4d.24xlarge", &SUBNET.into()) };
    let id = spec.id.clone();
    bed.cloud.run_instance(spec);
    let request = CreateEni {
        client_token: "t".into(),
        subnet: SUBNET.into(),
        security_groups: Vec::new(),
        description: String::new(),
        tags: Default::default(),
        addresses: None,
        connection_tracking: None,
    };
    let eni = bed.ec2.create_eni(&request).await.unwrap();
    bed.ec2.attach_eni(&eni.id, &id, 1, 2).await.unwrap();
    let (listener, at) = aws_common::listen().await;
    let server = tokio::spawn(stanchion_lab::fake_aws::serve_imds(listener, bed.cloud.clone(), id));
    let imds = SdkImds::new(Some(&format!("http://{at}"))).unwrap();
    let me = imds.identity().await.unwrap();
    assert_eq!((me.ipv6.is_some(), me.auto_scaling_group.as_deref()), (true, Some("eks-workers-0123")));
    let enis = imds.enis().await.unwrap();
    assert_eq!(enis.iter().find(|e| e.id == eni.id).unwrap().network_card, 2);
    assert!(enis.iter().find(|e| e.id == eni.id).unwrap().security_groups.is_empty());
    server.abort();
}

#[tokio::test]
async fn an_eni_without_its_fields_is_left_out_until_it_has_them() {
    let timing = Timing { attach: Duration::from_millis(200), imds_incomplete: Duration::from_millis(600), ..Timing::default() };
    let bed = bed_with(CloudConfig { timing, ..Bed::config() }).await;
    let id = attach(&bed, 1, None).await;
    assert_eq!(bed.imds.enis().await.unwrap().len(), 1);
    let mac = bed.cloud.eni(&id).unwrap().mac;
    // Once the MAC is listed it lacks its fields, and then has them.
    let seen = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Some(eni) = bed.imds.enis().await.unwrap().into_iter().find(|eni| eni.id == id) {
                return eni;
            }
        }
    })
    .await
    .expect("complete after a second");
    assert_eq!((seen.mac, seen.device_index, seen.local_ipv4s.len()), (mac, 1, 1));
    let partial = bed.cloud.calls().iter().filter(|call| call.action.ends_with(&format!("{mac}/device-number"))).count();
    assert!(partial > 1, "the incomplete ENI was looked at");
}

#[tokio::test]
async fn an_eni_that_imds_forgets_for_a_while_is_just_not_listed() {
    let bed = bed().await;
    let id = attach(&bed, 1, None).await;
    bed.cloud.hide_from_imds(&id, Duration::from_secs(3600));
    let enis = bed.imds.enis().await.unwrap();
    assert!(enis.len() == 1 && enis[0].device_index == 0, "{enis:?}");
}

#[tokio::test]
async fn one_token_serves_all_reads_and_a_refused_one_is_renewed() {
    let bed = bed().await;
    for _ in 0..5 {
        bed.imds.enis().await.unwrap();
    }
    assert_eq!(bed.cloud.count("imds:/latest/api/token"), 1);
    bed.cloud.inject(Fault::once("imds:/latest/meta-data/mac", Effect::Error(ApiError::with_status(401, "Unauthorized", ""))));
    bed.imds.identity().await.expect("a 401 gives a new token and another try");
}

/// As after a clock that was set back: the SDK takes its token for good.
#[tokio::test]
async fn a_token_that_is_refused_again_and_again_is_replaced() {
    let bed = bed().await;
    bed.cloud.inject(Fault::once("imds:/latest/api/token", Effect::Garbage("damaged".to_owned())));
    bed.imds.identity().await.expect("another token is asked for");
    assert_eq!(bed.cloud.count("imds:/latest/api/token"), 2);
    bed.imds.enis().await.unwrap();
    assert_eq!(bed.cloud.count("imds:/latest/api/token"), 2, "the new one is kept");
}

#[tokio::test]
async fn only_version_2_is_answered() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let bed = bed().await;
    for (request, want) in [
        ("GET /latest/meta-data/mac HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "401"),
        ("GET /latest/api/token HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "405"),
        ("PUT /latest/api/token HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", "400"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(bed.imds_at).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with(&format!("HTTP/1.1 {want}")), "{reply}");
    }
}

#[tokio::test]
async fn faults_are_errors_that_name_the_path() {
    let bed = bed().await;
    let path = "imds:/latest/meta-data/instance-type";
    bed.cloud.inject(Fault::always(path, Effect::Error(ApiError::with_status(500, "InternalError", ""))));
    let error = bed.imds.identity().await.unwrap_err();
    assert!(matches!(&error, ImdsError::Unreachable { path, .. } if path == "meta-data/instance-type"), "{error:?}");
    bed.cloud.clear_faults();
    bed.cloud.inject(Fault::once("imds:/latest/meta-data/mac", Effect::Garbage("not a mac".into())));
    let error = bed.imds.identity().await.unwrap_err();
    assert!(matches!(&error, ImdsError::Unreadable { text, .. } if text == "not a mac"), "{error:?}");
    for nonsense in ["\u{0}", "zz:zz/", "<html>", "02:00:00:00:00:01/ ???/", &"x".repeat(100_000)] {
        bed.cloud.inject(Fault::once("imds:/latest/meta-data/network/interfaces/macs/", Effect::Garbage(nonsense.to_owned())));
        let reply = bed.imds.enis().await;
        assert!(matches!(&reply, Err(ImdsError::Unreadable { text, .. }) if text.len() < 1_000), "{reply:?}");
    }
    bed.cloud.inject(Fault::always("imds:*", Effect::DropRequest));
    let error = bed.imds.enis().await.unwrap_err();
    assert!(matches!(error, ImdsError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn a_silent_imds_is_given_up_within_its_deadline() {
    let bed = bed().await;
    bed.cloud.inject(Fault::always("imds:*", Effect::Delay(Duration::from_secs(600))));
    let started = std::time::Instant::now();
    let error = bed.imds.identity().await.unwrap_err();
    assert!(matches!(error, ImdsError::Unreachable { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
}
