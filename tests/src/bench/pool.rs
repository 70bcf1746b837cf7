//! How long a burst of pods on a cold node waits for its last address, with EC2's latencies as parameters, beside a model of
//! aws-node's loop. Virtual time: the planner and the actor are the real ones, only waiting costs nothing.

use std::time::Duration;

use anyhow::Context as _;
use stanchion_core::limits::InstanceLimits;
use tokio::time::Instant;

use super::Row;
use crate::fake_aws::Timing;
use crate::ipam_world::{World, WorldSpec, request};

/// EC2 as seen from one node.
#[derive(Clone, Copy, Debug)]
struct Latency {
    name: &'static str,
    /// Of each call.
    call: Duration,
    /// From AttachNetworkInterface to the interface.
    attach: Duration,
    /// From a change to IMDS.
    imds: Duration,
}

const LATENCIES: [Latency; 2] = [
    Latency { name: "quick EC2", call: Duration::from_millis(250), attach: Duration::from_secs(2), imds: Duration::from_secs(1) },
    Latency { name: "slow EC2", call: Duration::from_millis(700), attach: Duration::from_secs(6), imds: Duration::from_secs(4) },
];

/// (type, pods, environment)
type Environment = &'static [(&'static str, &'static str)];
const CASES: [(&str, u32, Environment); 4] = [
    ("m5.4xlarge", 110, &[]),
    ("m5.4xlarge", 110, &[("WARM_IP_TARGET", "5"), ("MINIMUM_IP_TARGET", "10")]),
    ("m5.large", 108, &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")]),
    ("m5.xlarge", 30, &[("WARM_IP_TARGET", "1")]),
];

/// How long an ADD may wait in this bench.
const PATIENCE: Duration = Duration::from_secs(900);

/// Seconds from the burst to the last address, one row a case; the floor column is the time EC2 alone needs (one round of
/// parallel attaches), the rows named aws-node are its loop's.
///
/// # Errors
/// When a pod gets no address.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for latency in LATENCIES.iter().skip(usize::from(quick)) {
        for (instance_type, pods, env) in CASES {
            let targets: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let label = format!(
                "{} pods, {instance_type}, {}, {}",
                pods,
                if env.is_empty() { "WARM_ENI_TARGET=1".to_owned() } else { targets.join(" ") },
                latency.name
            );
            let ours = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .context("runtime")?
                .block_on(burst(instance_type, pods, env, *latency))?;
            let floor = ec2_alone(instance_type, pods, env, *latency).as_secs_f64();
            let upstream = aws_node(instance_type, pods, env, *latency).as_secs_f64();
            // EC2's own time and one second.
            rows.push(Row::against(format!("last address: {label}"), ours.as_secs_f64(), "s", floor).target((floor + 1.0) / floor));
            rows.push(Row::against(format!("  the same by aws-node's loop (model): {label}"), upstream, "s", floor));
        }
    }
    Ok(rows)
}

/// The real actor on a node that has just started; every pod asks at once.
async fn burst(instance_type: &str, pods: u32, env: &[(&str, &str)], latency: Latency) -> anyhow::Result<Duration> {
    let timing = Timing { attach: latency.attach, imds_lag: latency.imds, describe_lag: latency.call, ..Timing::default() };
    let mut world = World::start(WorldSpec { timing, latency: latency.call, ..WorldSpec::new(instance_type, env) });
    let started = Instant::now();
    let waits: Vec<_> = (0..pods)
        .map(|pod| {
            let handle = world.handle.clone();
            tokio::spawn(async move { handle.assign(request(&format!("pod-{pod}"), PATIENCE)).await })
        })
        .collect();
    for wait in waits {
        wait.await.context("an ADD panicked")?.context("an ADD got no address")?;
    }
    let elapsed = started.elapsed();
    world.stop().await;
    Ok(elapsed)
}

/// ENIs that the pods need, and addresses of one.
fn enis_needed(instance_type: &str, pods: u32, env: &[(&str, &str)]) -> (u32, u32) {
    let slots = InstanceLimits::lookup(instance_type).map_or(1, |limits| u32::from(limits.slots_per_eni()));
    let prefixes = env.iter().any(|(name, _)| *name == "ENABLE_PREFIX_DELEGATION");
    let per_eni = if prefixes { slots * 16 } else { slots };
    (pods.div_ceil(per_eni), per_eni)
}

/// What EC2 needs when it is asked for everything at once: the calls of one ENI and its attachment, or one Assign.
fn ec2_alone(instance_type: &str, pods: u32, env: &[(&str, &str)], latency: Latency) -> Duration {
    match enis_needed(instance_type, pods, env).0 {
        0 | 1 => latency.call,
        // Create, attach; delete-on-termination is set while the interface comes.
        _ => latency.call * 2 + latency.attach.max(latency.call),
    }
}

/// aws-node's loop: one step a tick of 5 s plus the step's own calls and waits (2.1, 2.6 and 6.3 of the reference). Before it
/// one step is done at init, which the pods wait for as well. The burst is there from the start; the loop only sees what
/// is free, so it asks for its targets again and again.
fn aws_node(instance_type: &str, pods: u32, env: &[(&str, &str)], latency: Latency) -> Duration {
    let value = |wanted: &str| env.iter().find(|(name, _)| *name == wanted).and_then(|(_, value)| value.parse::<u32>().ok()).unwrap_or(0);
    let slots = InstanceLimits::lookup(instance_type).map_or(1, |limits| u32::from(limits.slots_per_eni()));
    let (warm_ip, minimum_ip, warm_prefix) = (value("WARM_IP_TARGET"), value("MINIMUM_IP_TARGET"), value("WARM_PREFIX_TARGET"));
    let prefixes = env.iter().any(|(name, _)| *name == "ENABLE_PREFIX_DELEGATION");
    let unit = if prefixes { 16 } else { 1 };
    let mut on_eni = vec![0u32];
    let mut time = Duration::ZERO;
    loop {
        let total: u32 = on_eni.iter().sum::<u32>() * unit;
        let assigned = total.min(pods);
        if assigned == pods {
            return time;
        }
        if total > 0 {
            time += Duration::from_secs(5);
        }
        let free = total - assigned;
        let ask = if warm_ip + minimum_ip > 0 {
            warm_ip.saturating_sub(free).max(minimum_ip.saturating_sub(total)).div_ceil(unit).max(1)
        } else if prefixes {
            warm_prefix.max(1)
        } else {
            slots
        };
        match on_eni.iter_mut().find(|used| **used < slots) {
            Some(used) => {
                *used += ask.min(slots - *used);
                time += latency.call;
            }
            None => {
                on_eni.push(ask.min(slots));
                // Create, DescribeInstances, Attach, Modify; then polls of IMDS at 100 ms doubling until it shows the ENI.
                time += latency.call * 4 + polled(latency.attach.max(latency.imds));
            }
        }
    }
}

/// When a poll at 0.1, 0.3, 0.7 ... s first sees what is there after `lag`.
fn polled(lag: Duration) -> Duration {
    let mut at = Duration::ZERO;
    let mut pause = Duration::from_millis(100);
    while at < lag {
        at += pause;
        pause = (pause * 2).min(Duration::from_secs(60));
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_burst_beats_the_loop_and_ec2_alone_bounds_it() {
        let rows = run(true).expect("every pod is served");
        for pair in rows.chunks(2) {
            assert_eq!(pair[0].holds(), Some(true), "{}: {} s, EC2 alone {:?}", pair[0].name, pair[0].value, pair[0].floor);
            assert!(pair[0].value < pair[1].value, "{} {} s, {} s by the loop", pair[0].name, pair[0].value, pair[1].value);
            assert!(pair[0].value >= pair[0].floor.expect("a floor") * 0.99, "{} is quicker than EC2", pair[0].name);
        }
    }
}
