//! The address actor, EC2, IMDS and the host under lag, throttling, lost replies and crashes, by seed.
//!
//! `STANCHION_SEEDS=from..to` runs others than the built-in range; a failure prints its seed.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use stanchion_core::ids::PodName;
use stanchion_core::network::host_veth_name;
use stanchion_lab::fake_aws::{Bucket, Chaos, Timing};
use stanchion_lab::ipam_world::{World, WorldSpec, request};

const SECOND: Duration = Duration::from_secs(1);
/// Operations of one run.
const STEPS: u32 = 120;

const SETTINGS: [&[(&str, &str)]; 5] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")],
    &[("WARM_ENI_TARGET", "0"), ("IP_COOLDOWN_PERIOD", "5")],
    &[("MINIMUM_IP_TARGET", "11"), ("MAX_ENI", "2")],
];

fn seeds() -> std::ops::Range<u64> {
    let asked = std::env::var("STANCHION_SEEDS").ok();
    let range = asked.as_deref().and_then(|text| text.split_once("..")).and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    range.unwrap_or(0..16)
}

#[test]
fn no_seed_gives_an_address_twice_or_leaks_one() {
    let mut steps = 0u64;
    for seed in seeds() {
        println!("seed {seed}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("runtime");
        runtime.block_on(run(seed));
        steps += u64::from(STEPS);
    }
    assert!(steps > 0);
}

async fn run(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let timing = Timing {
        attach: Duration::from_millis(random.random_range(0..6_000)),
        detach: Duration::from_millis(random.random_range(0..4_000)),
        describe_lag: Duration::from_millis(random.random_range(0..2_000)),
        imds_lag: Duration::from_millis(random.random_range(0..20_000)),
        imds_incomplete: Duration::from_millis(random.random_range(0..1_000)),
        jitter: 0.5,
        seed,
    };
    let settings = SETTINGS[random.random_range(0..SETTINGS.len())];
    let mut spec = WorldSpec { timing, ..WorldSpec::new("m5.large", settings) };
    if random.random_bool(0.3) {
        spec.subnet = "10.0.16.0/26".parse().expect("CIDR");
    }
    let mut world = World::start(spec);
    let mut pods: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
    let mut next = 0u32;
    for step in 0..STEPS {
        match random.random_range(0..100) {
            0..45 => {
                let burst = random.random_range(1..6);
                let waits: Vec<_> = (0..burst)
                    .map(|_| {
                        next += 1;
                        let (name, handle) = (format!("pod-{next}"), world.handle.clone());
                        let wait = Duration::from_millis(random.random_range(10..15_000));
                        tokio::spawn(async move { (handle.assign(request(&name, wait)).await, name) })
                    })
                    .collect();
                for wait in waits {
                    let (result, name) = wait.await.expect("no panic");
                    if let Ok(assignment) = result {
                        let address = assignment.attachments[0].ipv4.expect("IPv4");
                        let twice = pods.iter().find(|(_, other)| **other == address);
                        assert!(twice.is_none(), "seed {seed} step {step}: {address} for {name} and {twice:?}");
                        assert!(world.cloud.owner_of(address.into()).is_some(), "seed {seed} step {step}: {address} is on no ENI");
                        world.veths.insert(host_veth_name("eni", &PodName::new("default", name.clone()), 0));
                        pods.insert(name, address);
                    }
                }
            }
            45..75 => {
                let gone: Vec<String> = pods.keys().filter(|_| random.random_bool(0.3)).cloned().collect();
                for name in gone {
                    // A DEL that was not answered may still be done: the pod is gone, its address is not ours to judge.
                    pods.remove(&name);
                    drop(world.delete(&name).await);
                }
            }
            75..85 => tokio::time::sleep(Duration::from_millis(random.random_range(0..120_000))).await,
            85..91 => world.cloud.set_chaos(Chaos {
                seed: random.random(),
                throttle: random.random_range(0..200),
                internal_error: random.random_range(0..100),
                lose_reply: random.random_range(0..150),
                drop_request: random.random_range(0..100),
                delay: random.random_range(0..200),
                max_delay: SECOND * 5,
            }),
            91..94 => world.cloud.clear_faults(),
            94..96 => {
                let enis = world.cloud.enis_of(&world.instance);
                let eni = &enis[random.random_range(0..enis.len())];
                world.cloud.hide_from_imds(&eni.id, SECOND * 40);
            }
            _ => {
                // A crash in the middle of whatever is under way.
                let (handle, name) = (world.handle.clone(), format!("crash-{step}"));
                let asked = tokio::spawn(async move { handle.assign(request(&name, SECOND)).await });
                tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
                world.restart();
                drop(asked.await);
            }
        }
        assert!(!world.has_ended(), "seed {seed} step {step}: the actor ended");
        world.cloud.assert_consistent();
        for (name, address) in &pods {
            assert!(world.cloud.owner_of((*address).into()).is_some(), "seed {seed} step {step}: {address} of {name} went back to EC2");
        }
    }
    the_world_heals(&mut world, seed, &pods).await;
}

/// With the faults over, everything is as if nothing had happened.
async fn the_world_heals(world: &mut World, seed: u64, pods: &BTreeMap<String, Ipv4Addr>) {
    world.cloud.clear_faults();
    world.restart();
    world.handle.ready().await.expect("ready");
    tokio::time::sleep(SECOND * 1_200).await;
    world.settle(SECOND * 200).await;
    let snapshot = world.handle.snapshot();
    let held: BTreeMap<String, Ipv4Addr> = snapshot
        .addresses
        .iter()
        .filter(|view| view.state == "assigned")
        .filter_map(|view| {
            Some((
                view.pod.as_ref()?.name.clone(),
                match view.address {
                    std::net::IpAddr::V4(address) => address,
                    std::net::IpAddr::V6(_) => return None,
                },
            ))
        })
        .collect();
    assert_eq!(&held, pods, "seed {seed}: what is held is what lives");
    let attached = world.cloud.enis_of(&world.instance);
    // The sweep of the next hour has the last word on ENIs that a crash left behind.
    tokio::time::sleep(SECOND * 3_700).await;
    let left: Vec<_> = world.cloud.enis().into_iter().filter(|eni| eni.attachment.is_none()).map(|eni| eni.id).collect();
    assert!(left.is_empty(), "seed {seed}: left behind {left:?}");
    assert!(attached.len() <= 3);
    let known: u64 = snapshot.pools.iter().map(|pool| pool.total).sum();
    let there: usize = attached.iter().map(|eni| eni.secondary_ipv4.len() + 16 * eni.prefixes_v4.len()).sum();
    assert_eq!(known, there as u64, "seed {seed}: the agent knows every address that EC2 counts");
}

#[tokio::test(start_paused = true)]
async fn a_throttling_storm_slows_calls_and_serves_everyone() {
    let mut world = World::start(WorldSpec::new("m5.2xlarge", &[("WARM_IP_TARGET", "1")]));
    for action in ["AssignPrivateIpAddresses", "CreateNetworkInterface", "AttachNetworkInterface"] {
        world.cloud.set_bucket(action, Bucket { size: 1.0, per_second: 0.1 });
    }
    for n in 0..40 {
        world.add(&format!("pod-{n}"), SECOND * 900).await.expect("served in the end");
    }
    let throttled = world.cloud.calls().iter().filter(|call| call.error.as_deref() == Some("RequestLimitExceeded")).count();
    assert!(throttled <= 60, "{throttled} calls were thrown at a closed door");
    world.stop().await;
}
