//! The fake cloud on paused time, through the product's seams without HTTP: what takes how long, and what survives what.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api as _, Ec2Error, Eni, Imds as _};
use stanchion_core::ids::InstanceId;
use stanchion_lab::fake_aws::{Chaos, Clock, Cloud, CloudConfig, DirectEc2, DirectImds, EniEvent, InstanceSpec, SubnetSpec, Timing};
use tokio::time::advance;

const SECOND: Duration = Duration::from_secs(1);

struct World {
    cloud: Cloud,
    ec2: DirectEc2,
    imds: DirectImds,
    instance: InstanceId,
}

fn world(timing: Timing) -> World {
    let cloud = Cloud::new(CloudConfig { timing, ..CloudConfig::default() }, Clock::tokio_from(1_790_000_000_000));
    let subnet = cloud.add_subnet(SubnetSpec::new("subnet-a", "eu-west-1a", "10.0.1.0/24".parse().expect("a range")));
    cloud.run_instance(InstanceSpec::new("i-1", "m5.large", &subnet));
    let instance = InstanceId::from("i-1");
    let (ec2, imds) = (DirectEc2::new(&cloud, Duration::ZERO), DirectImds::new(&cloud, &instance));
    World { cloud, ec2, imds, instance }
}

impl World {
    async fn create(&self, token: &str) -> Eni {
        let request = CreateEni {
            client_token: token.to_owned(),
            subnet: "subnet-a".into(),
            security_groups: vec!["sg-nodes".into()],
            description: String::new(),
            tags: BTreeMap::new(),
            addresses: None,
            connection_tracking: None,
        };
        self.ec2.create_eni(&request).await.expect("the subnet has room")
    }

    async fn attached_in_ec2(&self) -> usize {
        self.ec2.describe_attached(&self.instance).await.expect("no fault is set").len()
    }

    async fn shown_by_imds(&self) -> usize {
        self.imds.enis().await.expect("no fault is set").len()
    }
}

#[tokio::test(start_paused = true)]
async fn an_attachment_takes_its_time_everywhere() {
    let timing = Timing {
        attach: 2 * SECOND,
        detach: 3 * SECOND,
        describe_lag: SECOND,
        imds_lag: 5 * SECOND,
        imds_incomplete: SECOND,
        ..Timing::default()
    };
    let world = world(timing);
    let mut events = world.cloud.subscribe();
    let eni = world.create("t").await;
    let attachment = world.ec2.attach_eni(&eni.id, &world.instance, 1, 0).await.unwrap();
    assert!(matches!(events.try_recv(), Ok(EniEvent::Attached { after, .. }) if after == 2 * SECOND));
    assert_eq!((world.attached_in_ec2().await, world.shown_by_imds().await), (1, 1), "nobody shows it yet");
    advance(SECOND).await;
    assert_eq!((world.attached_in_ec2().await, world.shown_by_imds().await), (2, 1), "EC2 shows it first");
    advance(4 * SECOND + SECOND / 2).await;
    assert_eq!(world.shown_by_imds().await, 1, "listed by IMDS, but without its fields");
    advance(SECOND).await;
    assert_eq!(world.shown_by_imds().await, 2);

    let addresses = world.ec2.assign(&eni.id, AddressRequest::Ipv4(2)).await.unwrap();
    assert_eq!(world.imds.enis().await.unwrap()[1].local_ipv4s.len(), 1, "IMDS lags behind new addresses too");
    advance(5 * SECOND).await;
    assert_eq!(world.imds.enis().await.unwrap()[1].local_ipv4s.len(), 1 + addresses.len());

    world.ec2.detach_eni(&attachment).await.unwrap();
    let busy = world.ec2.delete_eni(&eni.id).await.unwrap_err();
    assert!(matches!(&busy, Ec2Error::Other { message, .. } if message.contains("in use")), "{busy:?}");
    advance(3 * SECOND).await;
    world.ec2.delete_eni(&eni.id).await.unwrap();
    assert_eq!(world.shown_by_imds().await, 2, "IMDS still shows what is gone");
    advance(6 * SECOND).await;
    assert_eq!((world.attached_in_ec2().await, world.shown_by_imds().await), (1, 1));
    world.cloud.assert_consistent();
    assert_eq!(world.cloud.subnet(&"subnet-a".into()).unwrap().available_addresses, 250);
}

#[tokio::test(start_paused = true)]
async fn termination_takes_the_enis_that_say_so() {
    let world = world(Timing::default());
    let (kept, taken) = (world.create("kept").await, world.create("taken").await);
    world.ec2.attach_eni(&kept.id, &world.instance, 1, 0).await.unwrap();
    let attachment = world.ec2.attach_eni(&taken.id, &world.instance, 2, 0).await.unwrap();
    world.ec2.set_delete_on_termination(&taken.id, &attachment).await.unwrap();
    world.cloud.terminate_instance(&world.instance);
    let left = world.cloud.enis();
    assert!(left.len() == 1 && left[0].id == kept.id && left[0].attachment.is_none(), "{left:?}");
    assert_eq!(world.cloud.subnet(&"subnet-a".into()).unwrap().available_addresses, 250);
    assert_eq!(world.cloud.owner_of(IpAddr::V4(kept.primary_ipv4.unwrap())), Some(kept.id));
    assert_eq!(world.cloud.owner_of(IpAddr::V4(taken.primary_ipv4.unwrap())), None);
}

/// Random calls, faults and pauses: addresses are held once and none is lost, and what Describe shows in the end is so.
#[tokio::test(start_paused = true)]
async fn no_address_is_lost_or_doubled_whatever_happens() {
    for seed in 0..20 {
        let timing =
            Timing { attach: SECOND, detach: SECOND, describe_lag: SECOND, imds_lag: SECOND, jitter: 2.0, seed, ..Timing::default() };
        let world = world(timing);
        let chaos = Chaos { seed, throttle: 50, internal_error: 50, lose_reply: 50, drop_request: 50, delay: 50, max_delay: SECOND };
        world.cloud.set_chaos(chaos);
        let mut draw = seed;
        let mut pick = |below: usize| {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (draw >> 33) as usize % below
        };
        for step in 0..400 {
            let enis = world.cloud.enis();
            let eni = enis[pick(enis.len())].clone();
            // Whether a call works is not the matter here.
            let _reply = match pick(6) {
                0 if enis.len() < 12 => {
                    let request = CreateEni {
                        client_token: format!("{seed}-{step}"),
                        subnet: "subnet-a".into(),
                        security_groups: Vec::new(),
                        description: String::new(),
                        tags: BTreeMap::new(),
                        addresses: Some(if pick(2) == 0 { AddressRequest::Ipv4(3) } else { AddressRequest::Ipv4Prefixes(1) }),
                        connection_tracking: None,
                    };
                    world.ec2.create_eni(&request).await.map(|_| ())
                }
                1 => world.ec2.attach_eni(&eni.id, &world.instance, pick(4) as u16, 0).await.map(|_| ()),
                2 => world.ec2.assign(&eni.id, AddressRequest::Ipv4(pick(4) as u16)).await.map(|_| ()),
                3 => {
                    let cidrs: Vec<_> = eni.secondary_ipv4.iter().take(2).map(|a| ipnet::IpNet::V4((*a).into())).collect();
                    world.ec2.unassign(&eni.id, &cidrs).await
                }
                4 => match &eni.attachment {
                    Some(attachment) => world.ec2.detach_eni(&attachment.id).await,
                    None => world.ec2.delete_eni(&eni.id).await,
                },
                _ => {
                    advance(SECOND * pick(3) as u32).await;
                    Ok(())
                }
            };
            world.cloud.assert_consistent();
            let held: usize = world.cloud.enis().iter().map(|eni| 1 + eni.secondary_ipv4.len() + 16 * eni.prefixes_v4.len()).sum();
            let free = world.cloud.subnet(&"subnet-a".into()).unwrap().available_addresses as usize;
            assert_eq!(held + free, 251, "seed {seed} step {step}");
        }
        world.cloud.clear_faults();
        advance(10 * SECOND).await;
        let shown = world.ec2.describe_attached(&world.instance).await.unwrap();
        assert_eq!(shown.len(), world.cloud.enis_of(&world.instance).len(), "seed {seed}");
    }
}
