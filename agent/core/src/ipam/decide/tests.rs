//! Properties of the planner: it comes to rest, keeps the limits, serves whoever waits, and never undoes itself.

use proptest::prelude::*;

use super::super::plan::{PoolLimits, Targets};
use super::super::simulate::VirtualNode;
use super::*;

fn targets() -> impl Strategy<Value = Targets> {
    (any::<bool>(), 0u32..3, 0u32..12, 0u32..30, 0u32..3, any::<bool>()).prop_map(
        |(prefixes, warm_eni, warm_ip, minimum_ip, warm_prefix, reserve_trunk)| Targets {
            mode: if prefixes { PoolMode::Prefixes } else { PoolMode::SecondaryIps },
            warm_eni,
            // Half of the cases without IP targets.
            warm_ip: warm_ip.saturating_sub(6),
            minimum_ip: minimum_ip.saturating_sub(15),
            warm_prefix,
            reserve_trunk,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn the_pool_rests_keeps_limits_and_serves_everyone_it_can(
        targets in targets(),
        enis in 1u16..6,
        slots in 1u16..12,
        max_pods in 1u32..120,
        steps in proptest::collection::vec((0u32..60, 0u32..60), 1..5),
    ) {
        let limits = PoolLimits { cards: vec![(0, enis)], slots_per_eni: slots, max_pods };
        let mut node = VirtualNode::new(targets, limits, false);
        prop_assert!(node.settle(), "never rests: {:?}", node.calls);
        for (from, count) in steps {
            node.start_pods(from..from + count);
            prop_assert!(node.settle(), "never rests: {:?}", node.calls);
            let reserved = u16::from(targets.reserve_trunk && enis > 1);
            let answer = node.answer();
            prop_assert!(answer.per_eni.len() <= usize::from(enis));
            prop_assert!(answer.per_eni.iter().all(|cidrs| *cidrs <= usize::from(slots)));
            let per_slot = if targets.mode == PoolMode::Prefixes { 16 } else { 1 };
            let most = u64::from((enis - reserved).max(1)) * u64::from(slots) * per_slot;
            let running = u64::from(answer.running);
            let wanted = node.wanted(from + count);
            prop_assert!(running >= wanted.min(most), "{} of {} run where {} fit: {:?}", running, wanted, most, answer);
            // Rest is rest: nothing happens in the next hour.
            let calls = node.calls.len();
            node.now = node.now + Duration::from_secs(3_600);
            prop_assert!(node.settle());
            prop_assert_eq!(node.calls.len(), calls, "moves without a cause: {:?}", node.calls);
            node.stop_pods(from..from + count / 2);
            prop_assert!(node.settle(), "never rests: {:?}", node.calls);
        }
    }
}

#[test]
fn warm_eni_target_zero_does_not_oscillate() {
    let targets = Targets { warm_eni: 0, ..Targets::default() };
    let mut node = VirtualNode::new(targets, PoolLimits { cards: vec![(0, 3)], slots_per_eni: 9, max_pods: 29 }, false);
    node.start_pods(0..9);
    assert!(node.settle());
    let calls = node.calls.len();
    node.now = node.now + Duration::from_secs(86_400);
    assert!(node.settle());
    assert_eq!(node.calls.len(), calls, "{:?}", node.calls);
}

#[test]
fn scale_down_gives_whole_enis_back_and_then_addresses() {
    for (targets, pods, keep, per_eni) in [
        (Targets { warm_eni: 1, ..Targets::default() }, 40, 0, vec![14]),
        (Targets { warm_eni: 1, ..Targets::default() }, 40, 14, vec![14, 14]),
        (Targets { warm_eni: 1, ..Targets::default() }, 40, 15, vec![14, 14, 14]),
        (Targets { warm_ip: 5, minimum_ip: 10, ..Targets::default() }, 40, 0, vec![10]),
        (Targets { warm_ip: 5, minimum_ip: 10, ..Targets::default() }, 40, 9, vec![14]),
    ] {
        let mut node = VirtualNode::new(targets, PoolLimits { cards: vec![(0, 4)], slots_per_eni: 14, max_pods: 58 }, false);
        node.settle();
        node.start_pods(0..pods);
        assert!(node.settle());
        node.stop_pods(keep..pods);
        assert!(node.settle());
        assert_eq!(node.answer().per_eni, per_eni, "{targets:?}, {pods} to {keep}: {:?}", node.calls);
    }
}

#[test]
fn other_kinds_go_when_the_mode_was_switched() {
    let limits = PoolLimits { cards: vec![(0, 3)], slots_per_eni: 9, max_pods: 110 };
    let mut node = VirtualNode::new(Targets { warm_eni: 1, ..Targets::default() }, limits.clone(), false);
    node.start_pods(0..4);
    assert!(node.settle());
    let mut switched = node.switch(Targets { mode: PoolMode::Prefixes, warm_prefix: 1, ..Targets::default() });
    assert!(switched.settle());
    let singles = switched.store.enis().values().flat_map(|eni| eni.cidrs.keys()).filter(|cidr| cidr.prefix_len() == 32).count();
    assert_eq!(singles, 4, "only those that pods hold stay: {:?}", switched.calls);
    assert!(switched.store.stats(0, switched.now).prefixes >= 1);
}
