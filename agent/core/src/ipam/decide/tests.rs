//! Properties of the planner: it comes to rest, keeps the limits, serves whoever waits, and never undoes itself.

use proptest::prelude::*;

use std::collections::BTreeMap;

use super::super::plan::{PoolLimits, Targets};
use super::super::simulate::VirtualNode;
use super::super::store::{Datastore, tests_support::stored_eni};
use super::*;
use crate::cloud::Ec2Error;

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
    let prefixes = |warm_ip, warm_prefix| Targets { mode: PoolMode::Prefixes, warm_ip, warm_prefix, ..Targets::default() };
    for ((enis, slots_per_eni), targets, pods, keep, per_eni) in [
        ((4, 14), Targets { warm_eni: 1, ..Targets::default() }, 40, 0, vec![14]),
        ((4, 14), Targets { warm_eni: 1, ..Targets::default() }, 40, 14, vec![14, 14]),
        ((4, 14), Targets { warm_eni: 1, ..Targets::default() }, 40, 15, vec![14, 14, 14]),
        ((4, 14), Targets { warm_ip: 5, minimum_ip: 10, ..Targets::default() }, 40, 0, vec![10]),
        ((4, 14), Targets { warm_ip: 5, minimum_ip: 10, ..Targets::default() }, 40, 9, vec![14]),
        ((8, 29), Targets { warm_ip: 2, ..Targets::default() }, 60, 10, vec![12]),
        ((8, 29), Targets { warm_eni: 2, ..Targets::default() }, 100, 0, vec![29, 29]),
        ((3, 9), prefixes(0, 1), 100, 0, vec![1]),
        ((3, 9), prefixes(0, 1), 100, 17, vec![3]),
        ((3, 9), prefixes(16, 0), 100, 1, vec![2]),
    ] {
        let mut node = VirtualNode::new(targets, PoolLimits { cards: vec![(0, enis)], slots_per_eni, max_pods: 250 }, false);
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

/// A node's state at one instant, for a single plan.
#[derive(Clone, Debug)]
struct Scene {
    store: Datastore,
    in_flight: Vec<Action>,
    memory: Memory,
    targets: Targets,
    limits: PoolLimits,
    demand: Demand,
    subnets: Vec<SubnetId>,
    provisioning: Provisioning,
}

impl Scene {
    /// m5.large in one subnet, with its primary ENI.
    fn new(targets: Targets) -> Self {
        let mut scene = Self {
            store: Datastore::new(targets.mode, Duration::ZERO),
            in_flight: Vec::new(),
            memory: Memory::new(0),
            targets,
            limits: PoolLimits { cards: vec![(0, 4)], slots_per_eni: 9, max_pods: 110 },
            demand: Demand::default(),
            subnets: vec![SubnetId::from("subnet-a")],
            provisioning: Provisioning::On,
        };
        scene.add(0, "subnet-a", 0, EniState::Serving);
        scene
    }

    /// An ENI with that many of the mode's CIDRs.
    fn add(&mut self, device_index: u16, subnet: &str, cidrs: u8, state: EniState) {
        let mut eni = stored_eni(device_index, subnet, 9);
        eni.state = state;
        eni.added = NOW;
        let id = eni.id.clone();
        self.store.put_eni(eni);
        let net = device_index as u8;
        let prefix = self.targets.mode == PoolMode::Prefixes;
        let cidr = |n: u8| -> IpNet {
            let text = if prefix { format!("10.{net}.1.{}/28", n * 16) } else { format!("10.{net}.0.{n}/32") };
            text.parse().expect("CIDR")
        };
        self.store.add_cidrs(&id, (0..cidrs).map(cidr));
    }

    /// The tag of its subnet was set long after it came.
    fn exclude(&mut self, device_index: u16) {
        let id = stored_eni(device_index, "", 9).id;
        let eni = self.store.eni_mut(&id).expect("added");
        (eni.role, eni.added) = (EniRole::ExcludedSubnet, NOW - ENI_MIN_AGE);
    }

    fn plan(&self) -> Plan {
        let demand = BTreeMap::from([(0, self.demand)]);
        plan(&PlanInput {
            store: &self.store,
            in_flight: &self.in_flight,
            memory: &self.memory,
            targets: &self.targets,
            limits: &self.limits,
            demand: &demand,
            placement: &Placement::Subnets { subnets: self.subnets.clone(), security_groups: Vec::new() },
            provisioning: self.provisioning,
            now: NOW,
        })
    }

    fn attach_indexes(&self) -> Vec<u16> {
        let index = |action: &Action| match action {
            Action::AttachEni { device_index, .. } => Some(*device_index),
            _ => None,
        };
        self.plan().actions.iter().filter_map(index).collect()
    }
}

const NOW: Time = Time(10_000_000);

fn warm_ip(warm_ip: u32) -> Targets {
    Targets { warm_ip, ..Targets::default() }
}

fn attaching(device_index: u16, request: AddressRequest) -> Action {
    let reason = Reason::PodsWaiting { short: 1 };
    Action::AttachEni { network_card: 0, device_index, subnet: SubnetId::from("subnet-a"), request, reason }
}

fn throttled(action: Ec2Action) -> Ec2Error {
    Ec2Error::Throttled { action, code: "RequestLimitExceeded".to_owned() }
}

#[test]
fn no_second_eni_while_the_first_has_room() {
    // AssignPrivateIpAddresses is throttled: the pods wait for it, and do not cost three further calls each.
    let mut scene = Scene::new(warm_ip(1));
    scene.demand.waiting = 3;
    scene.memory.failed(&throttled(Ec2Action::AssignPrivateIpAddresses), None, NOW);
    let planned = scene.plan();
    assert_eq!(planned.actions, []);
    assert!(planned.wake_at.is_some_and(|at| at > NOW), "asked again when the pause ends");
    assert!(matches!(planned.blocked[..], [(0, Blocked::ActionPaused { .. })]), "{:?}", planned.blocked);

    // The subnet gives little at a time.
    let mut scene = Scene::new(warm_ip(1));
    scene.demand.waiting = 6;
    let refused = Ec2Error::InsufficientAddresses {
        action: Ec2Action::AssignPrivateIpAddresses,
        code: "InsufficientFreeAddressesInSubnet".to_owned(),
        message: String::new(),
    };
    scene.memory.failed(&refused, Some((&scene.subnets[0], AddressRequest::Ipv4(7))), NOW);
    assert!(matches!(scene.plan().actions[..], [Action::Assign { request: AddressRequest::Ipv4(3), .. }]), "{:?}", scene.plan().actions);

    // It has no prefixes: two single addresses are kept, on one ENI.
    let mut scene = Scene::new(Targets { mode: PoolMode::Prefixes, warm_prefix: 1, ..Targets::default() });
    scene.memory.failed(&refused, Some((&scene.subnets[0], AddressRequest::Ipv4Prefixes(1))), NOW);
    assert!(matches!(scene.plan().actions[..], [Action::Assign { request: AddressRequest::Ipv4(2), .. }]), "{:?}", scene.plan().actions);
}

#[test]
fn an_eni_on_its_way_takes_the_pods_that_come_meanwhile() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 9, EniState::Serving);
    scene.limits.max_pods = 500;
    scene.in_flight = vec![attaching(1, AddressRequest::Ipv4(2))];
    // Nine free ones are on the primary ENI.
    scene.demand.waiting = 9 + 1 + 4;
    assert_eq!(scene.plan().actions, [], "it has room for seven more");
    scene.demand.waiting = 9 + 1 + 12;
    assert_eq!(scene.attach_indexes(), [2], "now it has not");
    // Attached, and its interface is not there yet: the same.
    scene.in_flight.clear();
    scene.add(1, "subnet-a", 2, EniState::Joining);
    scene.demand.waiting = 9 + 1 + 4;
    assert_eq!(scene.plan().actions, []);
}

#[test]
fn an_eni_that_never_gets_its_interface_is_not_waited_for_for_ever() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 9, EniState::Serving);
    scene.add(1, "subnet-a", 9, EniState::Joining);
    scene.demand.waiting = 12;
    let planned = scene.plan();
    assert_eq!((planned.actions.len(), planned.wake_at), (0, Some(NOW + JOIN_PATIENCE)), "{:?}", planned.actions);
    let id = stored_eni(1, "subnet-a", 9).id;
    scene.store.eni_mut(&id).expect("there").added = NOW - JOIN_PATIENCE;
    assert_eq!(scene.attach_indexes(), [2]);
}

#[test]
fn another_subnet_serves_when_the_first_refuses_though_an_eni_has_room() {
    let mut scene = Scene::new(warm_ip(1));
    scene.demand.waiting = 3;
    let refused = Ec2Error::InsufficientAddresses {
        action: Ec2Action::AssignPrivateIpAddresses,
        code: "InsufficientFreeAddressesInSubnet".to_owned(),
        message: String::new(),
    };
    scene.memory.failed(&refused, Some((&scene.subnets[0].clone(), AddressRequest::Ipv4(1))), NOW);
    assert_eq!(scene.attach_indexes(), [0u16; 0], "the only subnet is paused");
    scene.subnets.push(SubnetId::from("subnet-b"));
    let planned = scene.plan();
    assert!(
        matches!(&planned.actions[..], [Action::AttachEni { subnet, request: AddressRequest::Ipv4(4), .. }] if subnet.as_str() == "subnet-b"),
        "{:?}",
        planned.actions
    );
}

/// A restart with a Describe that lags: the pod's address is not shown yet, and its ENI looks empty.
#[test]
fn no_eni_is_released_while_a_pods_address_is_on_none() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 4, EniState::Serving);
    scene.add(1, "subnet-a", 3, EniState::Serving);
    let id = stored_eni(1, "subnet-a", 9).id;
    scene.store.eni_mut(&id).expect("there").added = NOW - ENI_MIN_AGE * 2;
    scene.memory.surplus_since.insert(0, NOW - SHRINK_AFTER);
    let releases = |scene: &Scene| scene.plan().actions.iter().any(|action| matches!(action, Action::ReleaseEni { .. }));
    assert!(releases(&scene), "{:?}", scene.plan().actions);
    let (key, pod) = super::super::simulate::virtual_pod(7);
    let held = vec![super::super::Held { network_card: 0, address: "10.1.0.77".parse().expect("address") }];
    scene.store.restore(key.clone(), super::super::Allocation { pod, since_ns: 0, held }).expect("one owner");
    assert!(!releases(&scene), "{:?}", scene.plan().actions);
    scene.store.add_cidrs(&id, ["10.1.0.77/32".parse().expect("CIDR")]);
    assert!(!releases(&scene), "now it is seen to be in use");
}

/// m5.large with two ENIs in a subnet that is excluded by now, and pods that wait for a third.
#[test]
fn enis_of_an_excluded_subnet_make_room_for_others() {
    let mut scene = Scene::new(warm_ip(1));
    scene.limits.cards = vec![(0, 3)];
    scene.demand.waiting = 3;
    for index in [0, 1, 2] {
        scene.add(index, "subnet-a", 9, EniState::Serving);
        scene.exclude(index);
    }
    scene.subnets = vec![SubnetId::from("subnet-t")];
    let actions = scene.plan().actions;
    let goes = |id: &str| actions.iter().any(|action| matches!(action, Action::ReleaseEni { eni, .. } if eni.as_str() == id));
    assert!(goes("eni-1") && goes("eni-2") && !goes("eni-0"), "{actions:?}");
    assert!(
        actions.iter().any(|action| matches!(action, Action::Unassign { cidrs, .. } if cidrs.len() == 9)),
        "the primary's: {actions:?}"
    );
    scene.store.eni_mut(&"eni-2".into()).expect("there").added = NOW;
    assert_eq!(scene.plan().wake_at, Some(NOW + ENI_MIN_AGE), "one that has just come stays for a while");
    scene.provisioning = Provisioning::Unschedulable;
    assert_eq!(scene.plan().actions, [], "on a cordoned node nothing is released");
    scene.provisioning = Provisioning::On;
    scene.store.remove_eni(&"eni-1".into());
    assert_eq!(scene.attach_indexes(), [1]);
}

/// EC2 has it at index 1: that one is taken.
#[test]
fn a_primary_eni_that_is_attached_elsewhere_keeps_its_index() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 9, EniState::Serving);
    scene.store.eni_mut(&"eni-0".into()).expect("there").attached_at = 1;
    scene.demand.waiting = 12;
    assert_eq!(scene.attach_indexes(), [2]);
}

/// Defect 14 of aws-node: an index at its array's bound ended the process.
#[test]
fn a_device_index_is_never_one_that_is_held_and_never_out_of_range() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 9, EniState::Serving);
    scene.limits = PoolLimits { cards: vec![(0, 200)], slots_per_eni: 9, max_pods: 5_000 };
    scene.demand.waiting = 20;
    // Found after a restart and not ready yet, being detached, held by others, and numbers that EC2 does not give.
    scene.add(1, "subnet-a", 0, EniState::Joining);
    scene.add(2, "subnet-a", 0, EniState::Releasing);
    for index in [3, 100, 101, u16::MAX] {
        let mut foreign = stored_eni(index, "subnet-a", 9);
        foreign.role = EniRole::Unmanaged;
        scene.store.put_eni(foreign);
    }
    scene.in_flight = vec![attaching(4, AddressRequest::Ipv4(9))];
    scene.demand.waiting = 9 + 9 + 9 + 5;
    assert_eq!(scene.attach_indexes(), [5]);
    for index in 5..100 {
        let mut foreign = stored_eni(index, "subnet-a", 9);
        foreign.role = EniRole::Unmanaged;
        scene.store.put_eni(foreign);
    }
    let planned = scene.plan();
    assert!(
        planned.actions.is_empty() && planned.blocked.iter().any(|(_, blocked)| matches!(blocked, Blocked::AllFull { .. })),
        "{planned:?}"
    );
}

#[test]
fn each_network_card_has_its_own_limit_and_its_own_indexes() {
    let mut scene = Scene::new(warm_ip(1));
    scene.add(0, "subnet-a", 9, EniState::Serving);
    scene.add(1, "subnet-a", 9, EniState::Serving);
    scene.limits.cards = vec![(0, 2), (1, 2)];
    let demand = BTreeMap::from([(0, Demand { waiting: 30, bound: 0 }), (1, Demand { waiting: 30, bound: 0 })]);
    let planned = plan(&PlanInput {
        store: &scene.store,
        in_flight: &[],
        memory: &scene.memory,
        targets: &scene.targets,
        limits: &scene.limits,
        demand: &demand,
        placement: &Placement::Subnets { subnets: scene.subnets.clone(), security_groups: Vec::new() },
        provisioning: Provisioning::On,
        now: NOW,
    });
    let attaches: Vec<_> = planned
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::AttachEni { network_card, device_index, .. } => Some((*network_card, *device_index)),
            _ => None,
        })
        .collect();
    assert_eq!(attaches, [(1, 1), (1, 2)], "card 0 is full, and card 1 counts for itself");
    assert!(planned.blocked.iter().any(|(card, blocked)| *card == 1 && matches!(blocked, Blocked::AllFull { enis: 2, of: 2, .. })));
}

fn scene() -> impl Strategy<Value = Scene> {
    let enis = proptest::collection::vec((1u16..6, any::<bool>(), 0u8..10, 0u8..3, any::<bool>()), 0..5);
    let attachings = proptest::collection::vec((1u16..6, 1u16..10), 0..3);
    (targets(), enis, attachings, 0u8..10, any::<[bool; 4]>(), (0u32..60, 0u32..10)).prop_map(
        |(mut targets, enis, attachings, primary, [throttle_assign, throttle_create, singles_gone, prefixes_gone], (waiting, bound))| {
            targets.warm_eni = 0;
            targets.reserve_trunk = false;
            if targets.warm_ip == 0 {
                targets.warm_ip = 1;
            }
            let mut scene = Scene::new(targets);
            scene.add(0, "subnet-a", primary, EniState::Serving);
            for (index, second, cidrs, state, excluded) in enis {
                let state = [EniState::Joining, EniState::Serving, EniState::Releasing][usize::from(state)];
                scene.add(index, if second { "subnet-b" } else { "subnet-a" }, cidrs.min(9), state);
                if excluded {
                    scene.exclude(index);
                }
            }
            for (index, count) in attachings {
                let taken = scene.store.enis().values().any(|eni| eni.device_index == index);
                let twice =
                    scene.in_flight.iter().any(|action| matches!(action, Action::AttachEni { device_index, .. } if *device_index == index));
                if !taken && !twice {
                    let request =
                        if targets.mode == PoolMode::Prefixes { AddressRequest::Ipv4Prefixes(count) } else { AddressRequest::Ipv4(count) };
                    scene.in_flight.push(attaching(index, request));
                }
            }
            scene.subnets.push(SubnetId::from("subnet-b"));
            if throttle_assign {
                scene.memory.failed(&throttled(Ec2Action::AssignPrivateIpAddresses), None, NOW);
            }
            if throttle_create {
                scene.memory.failed(&throttled(Ec2Action::CreateNetworkInterface), None, NOW);
            }
            let refused = |request| {
                let error = Ec2Error::InsufficientAddresses {
                    action: Ec2Action::AssignPrivateIpAddresses,
                    code: "InsufficientFreeAddressesInSubnet".to_owned(),
                    message: String::new(),
                };
                (error, request)
            };
            let subnet = SubnetId::from("subnet-a");
            for (gone, request) in [(singles_gone, AddressRequest::Ipv4(1)), (prefixes_gone, AddressRequest::Ipv4Prefixes(1))] {
                if gone {
                    let (error, request) = refused(request);
                    scene.memory.failed(&error, Some((&subnet, request)), NOW);
                }
            }
            scene.demand = Demand { waiting, bound };
            scene
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn one_plan_keeps_indexes_limits_and_room(scene in scene()) {
        let planned = scene.plan();
        let mut indexes: Vec<u16> = scene.store.enis().values().map(|eni| eni.device_index).collect();
        let in_flight = scene.in_flight.iter().chain(&planned.actions).filter_map(|action| match action {
            Action::AttachEni { device_index, .. } => Some(*device_index),
            _ => None,
        });
        indexes.extend(in_flight);
        let count = indexes.len();
        indexes.sort_unstable();
        indexes.dedup();
        prop_assert_eq!(indexes.len(), count, "an index is asked for twice: {:?}", planned.actions);
        let attaches = planned.actions.iter().any(|action| matches!(action, Action::AttachEni { .. }));
        prop_assert!(!attaches || count <= 4);

        // Room for all that could be missing, in subnets that give: then no ENI is attached.
        let gives = |subnet: &SubnetId, kind| scene.memory.allowance(subnet, kind, 1, NOW).is_ok();
        let unit = |subnet: &SubnetId| match scene.targets.mode {
            PoolMode::Prefixes if gives(subnet, AddressKind::Prefixes) => 16,
            _ => u64::from(gives(subnet, AddressKind::Addresses)),
        };
        let room: u64 = scene
            .store
            .enis()
            .values()
            .filter(|eni| eni.state != EniState::Releasing && eni.role == EniRole::Pods)
            .map(|eni| u64::from(eni.room()) * unit(&eni.subnet))
            .sum();
        let Targets { warm_ip, minimum_ip, .. } = scene.targets;
        let most_missing = u64::from(scene.demand.waiting + scene.demand.bound + warm_ip + minimum_ip);
        if room >= most_missing {
            prop_assert!(!attaches, "room {} for at most {}: {:?}", room, most_missing, planned.actions);
        }

        // No pod will ever get an address of an excluded ENI, whoever waits: it keeps no slot that another one could have.
        if planned.blocked.iter().any(|(_, blocked)| matches!(blocked, Blocked::AllFull { .. })) {
            for eni in scene.store.enis().values().filter(|eni| eni.role == EniRole::ExcludedSubnet && eni.state == EniState::Serving) {
                let goes = planned.actions.iter().any(|action| matches!(action, Action::ReleaseEni { eni: id, .. } if *id == eni.id));
                prop_assert!(goes, "{:?} stays: {:?}", eni.id, planned.actions);
            }
        }
    }
}

#[test]
fn a_cordoned_node_serves_those_that_wait_and_attaches_nothing() {
    let mut scene = Scene::new(warm_ip(5));
    scene.provisioning = Provisioning::Unschedulable;
    assert_eq!(scene.plan().actions, [], "no warm addresses");
    scene.demand.waiting = 3;
    let plan = scene.plan();
    assert!(matches!(plan.actions.as_slice(), [Action::Assign { request: AddressRequest::Ipv4(3), .. }]), "{:?}", plan.actions);
    scene.demand.waiting = 12;
    let plan = scene.plan();
    assert!(matches!(plan.actions.as_slice(), [Action::Assign { request: AddressRequest::Ipv4(9), .. }]), "{:?}", plan.actions);
    assert_eq!(plan.blocked, [(0, Blocked::Provisioning(Provisioning::Unschedulable))], "three of them wait, and are told why");
}

#[test]
fn a_node_that_something_else_provides_for_asks_for_nothing() {
    for provisioning in [Provisioning::Disabled, Provisioning::Terminating] {
        for mode in [PoolMode::SecondaryIps, PoolMode::Prefixes, PoolMode::Ipv6Prefixes] {
            let mut scene = Scene::new(Targets { mode, warm_ip: 5, ..Targets::default() });
            scene.provisioning = provisioning;
            scene.demand.waiting = 3;
            let plan = scene.plan();
            assert_eq!((plan.actions.as_slice(), plan.blocked), (&[][..], vec![(0, Blocked::Provisioning(provisioning))]), "{mode:?}");
        }
    }
}

fn ipv6() -> Scene {
    Scene::new(Targets { mode: PoolMode::Ipv6Prefixes, ..Targets::default() })
}

#[test]
fn an_ipv6_node_gets_its_prefix_once_cordoned_or_not() {
    for provisioning in [Provisioning::On, Provisioning::Unschedulable] {
        let mut scene = ipv6();
        scene.provisioning = provisioning;
        let plan = scene.plan();
        assert!(
            matches!(plan.actions.as_slice(), [Action::Assign { request: AddressRequest::Ipv6Prefixes(1), .. }]),
            "a node that is cordoned at its first start runs DaemonSets too ({provisioning:?}): {plan:?}"
        );
        scene.in_flight = plan.actions;
        assert_eq!(scene.plan().actions, [], "it is asked for");
        scene.in_flight.clear();
        scene.store.add_cidrs(&"eni-0".into(), ["2600:1::/80".parse().expect("CIDR")]);
        assert_eq!(scene.plan().actions, [], "it is there");
    }
}

#[test]
fn each_network_card_of_an_ipv6_node_gets_one_prefix() {
    let mut scene = ipv6();
    scene.store.add_cidrs(&"eni-0".into(), ["2600:1::/80".parse().expect("CIDR")]);
    scene.limits.cards = vec![(0, 4), (1, 2)];
    let made = scene.plan().actions;
    let [Action::AttachEni { network_card: 1, device_index: 1, request: AddressRequest::Ipv6Prefixes(1), .. }] = made.as_slice() else {
        panic!("card 1 has no ENI yet: {made:?}");
    };
    scene.in_flight = made;
    assert_eq!(scene.plan().actions, [], "it is asked for");
    scene.in_flight.clear();

    // One that the instance was launched with: it is there without a prefix, and serves when its interface does.
    let mut first = StoredEni { network_card: 1, state: EniState::Joining, ..stored_eni(1, "subnet-a", 9) };
    let id = first.id.clone();
    scene.store.put_eni(first.clone());
    assert_eq!(scene.plan().actions, []);
    first.state = EniState::Serving;
    scene.store.put_eni(first);
    for provisioning in [Provisioning::On, Provisioning::Unschedulable] {
        scene.provisioning = provisioning;
        let asked = scene.plan().actions;
        let [Action::Assign { eni, request: AddressRequest::Ipv6Prefixes(1), .. }] = asked.as_slice() else { panic!("{asked:?}") };
        assert_eq!(*eni, id);
    }
    scene.store.add_cidrs(&id, ["2600:2::/80".parse().expect("CIDR")]);
    assert_eq!(scene.plan().actions, [], "one holds more pods than any node");
}

#[test]
fn a_card_of_an_ipv6_node_that_can_have_no_eni_says_why() {
    let mut scene = ipv6();
    scene.store.add_cidrs(&"eni-0".into(), ["2600:1::/80".parse().expect("CIDR")]);
    scene.limits.cards = vec![(0, 4), (1, 0)];
    let plan = scene.plan();
    assert!(plan.actions.is_empty() && matches!(plan.blocked[..], [(1, Blocked::AllFull { enis: 0, of: 0, .. })]), "{plan:?}");
    scene.limits.cards = vec![(0, 4), (1, 2)];
    scene.provisioning = Provisioning::Unschedulable;
    let plan = scene.plan();
    assert_eq!((plan.actions, plan.blocked), (Vec::new(), vec![(1, Blocked::Provisioning(Provisioning::Unschedulable))]));
}

#[test]
fn an_ipv6_prefix_that_is_refused_is_asked_for_again_later() {
    let subnet = SubnetId::from("subnet-a");
    let asked = Some((&subnet, AddressRequest::Ipv6Prefixes(1)));
    let action = Ec2Action::AssignIpv6Addresses;
    let refused = Ec2Error::InsufficientAddresses { action, code: "InsufficientCidrBlocks".to_owned(), message: String::new() };
    let mut scene = ipv6();
    scene.memory.failed(&refused, asked, NOW);
    let plan = scene.plan();
    assert_eq!(plan.actions, []);
    let [(0, Blocked::Subnet { until, .. })] = plan.blocked.as_slice() else { panic!("{plan:?}") };
    assert_eq!(plan.wake_at, Some(*until), "and not before");
    let mut scene = ipv6();
    scene.memory.failed(&throttled(action), asked, NOW);
    let plan = scene.plan();
    assert_eq!(plan.actions, []);
    assert!(plan.wake_at.is_some_and(|at| at > NOW), "{plan:?}");
}
