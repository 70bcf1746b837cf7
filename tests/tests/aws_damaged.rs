//! Replies of EC2, IMDS and CloudWatch Logs with damaged bodies, through the SDK to what the agent makes of them: an answer, or an error
//! of a length that a person can read, and never a panic or a call without end.
#![allow(clippy::unwrap_used, reason = "a test panics")]

mod aws_common;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use aws_common::{Bed, SUBNET, bed};
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api as _, Imds as _, LogEvent, LogGroupSpec, LogSink as _};
use stanchion_core::ids::EniId;
use stanchion_core::logs::LogBatch;
use stanchion_lab::fake_aws::{Effect, Fault};

/// An error ends in a log line, `stanchion status` and the kubelet's event.
const LONGEST_ERROR: usize = 2_000;
/// No call has a longer deadline in these clients.
const DEADLINE: Duration = Duration::from_secs(15);

/// What came of the calls.
#[derive(Debug, Default)]
struct Told {
    answers: u32,
    errors: u32,
}

impl Told {
    async fn hear<T: Debug, E: Debug + ToString>(&mut self, seed: u64, call: &str, reply: impl Future<Output = Result<T, E>>) -> Option<T> {
        let Ok(reply) = tokio::time::timeout(DEADLINE, reply).await else { panic!("seed {seed}: {call} does not end") };
        match reply {
            Ok(answer) => {
                self.answers += 1;
                Some(answer)
            }
            Err(error) => {
                self.errors += 1;
                let text = error.to_string();
                assert!(!text.is_empty() && text.len() <= LONGEST_ERROR, "seed {seed}: {call}: {} bytes: {text}", text.len());
                None
            }
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    let setting =
        |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")));
    let first = setting("STANCHION_FUZZ_SEED", 20_261_122);
    first..first + setting("STANCHION_FUZZ_INPUTS", 100)
}

async fn damaged(bed: &Bed, seed: u64) -> Told {
    let mut told = Told::default();
    let damage = |action: &str| bed.cloud.inject(Fault::once(action, Effect::Damage(seed)));
    let primary = bed.cloud.enis_of(&bed.instance)[0].id.clone();
    // One time in eight what is refused is asked for: the reply is an error that is damaged.
    let eni = if seed.is_multiple_of(8) { EniId::from("eni-0none") } else { primary };

    damage("DescribeNetworkInterfaces");
    told.hear(seed, "describe", bed.ec2.describe_attached(&bed.instance)).await;
    damage("DescribeSubnets");
    told.hear(seed, "subnets", bed.ec2.describe_subnets(&bed.vpc, "eu-west-1a")).await;
    damage("CreateNetworkInterface");
    let request = CreateEni {
        client_token: format!("t-{seed}"),
        subnet: SUBNET.into(),
        security_groups: Vec::new(),
        description: "damaged".to_owned(),
        tags: BTreeMap::new(),
        addresses: Some(AddressRequest::Ipv4(2)),
        connection_tracking: None,
    };
    told.hear(seed, "create", bed.ec2.create_eni(&request)).await;
    damage("AssignPrivateIpAddresses");
    let asked = if seed.is_multiple_of(2) { AddressRequest::Ipv4(2) } else { AddressRequest::Ipv4Prefixes(1) };
    if let Some(given) = told.hear(seed, "assign", bed.ec2.assign(&eni, asked)).await {
        assert!(given.len() <= 1_000, "seed {seed}: {given:?}");
    }
    damage("AssignIpv6Addresses");
    told.hear(seed, "assign IPv6", bed.ec2.assign(&eni, AddressRequest::Ipv6Prefixes(1))).await;
    damage("AttachNetworkInterface");
    told.hear(seed, "attach", bed.ec2.attach_eni(&EniId::from("eni-0none"), &bed.instance, 1, 0)).await;
    damage("DescribeInstanceTypes");
    told.hear(seed, "type", bed.ec2.describe_instance_type("m5.large")).await;

    for path in ["api/token", "meta-data/mac", "meta-data/placement/region", "meta-data/local-ipv4"] {
        damage(&format!("imds:/latest/{path}"));
    }
    told.hear(seed, "identity", bed.imds.identity()).await;
    for _ in 0..3 {
        // One of the reads of each round, as many rounds as it takes fields.
        let fault = Fault { action: "imds:*".to_owned(), after: seed % 12, times: 1, effect: Effect::Damage(seed) };
        bed.cloud.inject(fault);
        told.hear(seed, "enis", bed.imds.enis()).await;
    }

    for action in ["CreateLogGroup", "CreateLogStream", "PutLogEvents"] {
        damage(action);
    }
    told.hear(seed, "group", bed.logs.create_group("/damaged", &LogGroupSpec::default())).await;
    told.hear(seed, "stream", bed.logs.create_stream("/damaged", "s")).await;
    let now = bed.cloud.clock().unix_ms();
    let event = LogEvent { timestamp_ms: now, message: "x".to_owned() };
    let batch = LogBatch::from_events("/damaged", "s", false, vec![event]).remove(0);
    told.hear(seed, "put", bed.logs.put(&batch)).await;
    bed.cloud.clear_faults();
    told
}

#[tokio::test]
async fn a_damaged_reply_is_an_answer_or_an_error_that_can_be_read() {
    let bed = bed().await;
    let mut sum = Told::default();
    for seed in seeds() {
        let told = damaged(&bed, seed).await;
        (sum.answers, sum.errors) = (sum.answers + told.answers, sum.errors + told.errors);
        // Room for the next ones.
        for eni in bed.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()) {
            bed.ec2.delete_eni(&eni.id).await.unwrap();
        }
        let eni = bed.cloud.enis_of(&bed.instance).remove(0);
        let v4 = eni.secondary_ipv4.iter().map(|address| ipnet::IpNet::from(std::net::IpAddr::V4(*address)));
        let given: Vec<_> =
            v4.chain(eni.prefixes_v4.iter().copied().map(Into::into)).chain(eni.prefixes_v6.iter().copied().map(Into::into)).collect();
        for cidr in given {
            bed.ec2.unassign(&eni.id, &[cidr]).await.unwrap();
        }
    }
    println!("{sum:?}");
    assert!(sum.answers > 0 && sum.errors > 0, "damage that always or never matters: {sum:?}");
}
