use super::*;
use crate::ipam::store::PoolMode;

fn question(scenario: Scenario, nodes: u32) -> FleetQuestion {
    FleetQuestion {
        nodes,
        pods_per_node: 25,
        targets: Targets { warm_eni: 1, ..Targets::default() },
        limits: PoolLimits { cards: vec![(0, 3)], slots_per_eni: 9, max_pods: 29 },
        scenario,
        over: Duration::from_secs(60),
        cooldown: Duration::from_secs(30),
        ec2: Ec2Model::default(),
        most_nodes: 500,
        seed: 1,
    }
}

fn both(question: &FleetQuestion) -> (FleetAnswer, FleetAnswer) {
    (fleet(question, Rules::AwsNode, &mut |_| {}), fleet(question, Rules::Stanchion, &mut |_| {}))
}

#[test]
fn a_burst_on_one_node_is_served_by_the_two_enis_that_it_needs() {
    let (theirs, ours) = both(&question(Scenario::Burst, 1));
    for answer in [&theirs, &ours] {
        assert_eq!((answer.pods, answer.unserved, answer.enis, answer.idle_addresses), (25, 0, 3, 2), "{answer:?}");
        assert_eq!(answer.calls["CreateNetworkInterface"], CallCount { sent: 2, throttled: 0 }, "{answer:?}");
        assert_eq!(answer.throttled_total, 0);
    }
    assert!(ours.wait_p99_s <= theirs.wait_p99_s, "{} {}", ours.wait_p99_s, theirs.wait_p99_s);
    assert!(!ours.calls.contains_key("DescribeInstances"), "the planner knows the indexes");
}

#[test]
fn the_account_throttles_a_fleet_and_everybody_is_served_in_the_end() {
    let (theirs, ours) = both(&question(Scenario::Burst, 300));
    for answer in [&theirs, &ours] {
        assert_eq!((answer.pods, answer.unserved), (7_500, 0), "{answer:?}");
        // Two ENIs each, five a second after the first hundred: EC2 alone needs 100 s.
        assert!(answer.busy_s >= 99.0, "{answer:?}");
        let attached = answer.calls["AttachNetworkInterface"];
        assert!(attached.sent - attached.throttled >= 600, "{attached:?}");
    }
    assert!(ours.throttled_total < theirs.throttled_total, "{} {}", ours.throttled_total, theirs.throttled_total);
    assert!(ours.calls_total < theirs.calls_total, "{} {}", ours.calls_total, theirs.calls_total);
    assert!(ours.wait_p99_s <= theirs.wait_p99_s, "{} {}", ours.wait_p99_s, theirs.wait_p99_s);
}

#[test]
fn scaling_to_zero_leaves_what_the_targets_ask_for() {
    let (theirs, ours) = both(&question(Scenario::Zero, 20));
    for answer in [&theirs, &ours] {
        assert_eq!((answer.enis, answer.idle_addresses), (20, 180), "one ENI's worth a node: {answer:?}");
        assert_eq!(answer.pods, 0);
    }
}

#[test]
fn a_rolling_replacement_is_served_from_the_warm_pool() {
    let mut question = question(Scenario::Rolling, 20);
    question.pods_per_node = 12;
    question.over = Duration::from_secs(300);
    let (_, ours) = both(&question);
    assert_eq!((ours.pods, ours.unserved), (240, 0));
    assert!(ours.wait_p99_s < 1.0, "{ours:?}");
    assert_eq!(ours.calls_total, 0, "churn of pods is not EC2's: {ours:?}");
}

#[test]
fn prefixes_and_ip_targets_come_to_rest() {
    for targets in [
        Targets { mode: PoolMode::Prefixes, warm_prefix: 1, ..Targets::default() },
        Targets { warm_ip: 2, minimum_ip: 5, ..Targets::default() },
    ] {
        for scenario in [Scenario::Burst, Scenario::Rolling, Scenario::Zero] {
            let question = FleetQuestion { targets, ..question(scenario, 10) };
            let (theirs, ours) = both(&question);
            assert_eq!((theirs.unserved, ours.unserved), (0, 0), "{targets:?} {scenario:?}");
            // Addresses that cool down are not free here: a replacement of pods costs a node one more prefix.
            let cooling = if scenario == Scenario::Rolling { u64::from(question.nodes) } else { 0 };
            assert!(ours.calls_total <= theirs.calls_total + theirs.calls_total / 10 + cooling, "{scenario:?}: {ours:?}\n{theirs:?}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_answer_and_a_larger_fleet_is_scaled() {
    let small = question(Scenario::Burst, 40);
    assert_eq!(both(&small), both(&small));
    let scaled = FleetQuestion { nodes: 400, most_nodes: 40, ..small };
    let answer = fleet(&scaled, Rules::Stanchion, &mut |_| {});
    assert_eq!((answer.simulated_nodes, answer.pods), (40, 10_000));
    let mut told = 0;
    let whole = fleet(&FleetQuestion { most_nodes: 400, ..scaled }, Rules::Stanchion, &mut |done| {
        assert!((0.0..=1.0).contains(&done));
        told += 1;
    });
    assert!(told > 0);
    let calls = |answer: &FleetAnswer| answer.calls["CreateNetworkInterface"].sent as f64;
    assert!((0.7..1.4).contains(&(calls(&answer) / calls(&whole))), "{answer:?}\n{whole:?}");
    assert!((answer.wait_p50_s - whole.wait_p50_s).abs() < 0.35 * whole.wait_p50_s.max(1.0), "{answer:?}\n{whole:?}");
}
