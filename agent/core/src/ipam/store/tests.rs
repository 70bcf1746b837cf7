//! Random operations against a simple model: never two owners, nothing given out while it cools, nothing lost.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::ids::ContainerId;

#[derive(Clone, Debug)]
enum Op {
    Assign(u8),
    Release(u8),
    AddCidr(u8, u8, bool),
    RemoveCidr(u8, u8, bool),
    RemoveEni(u8),
    Leaving(u8, u8, bool),
    Wait(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u8..40).prop_map(Op::Assign),
        4 => (0u8..40).prop_map(Op::Release),
        3 => (0u8..3, 0u8..6, any::<bool>()).prop_map(|(eni, n, prefix)| Op::AddCidr(eni, n, prefix)),
        1 => (0u8..3, 0u8..6, any::<bool>()).prop_map(|(eni, n, prefix)| Op::RemoveCidr(eni, n, prefix)),
        1 => (0u8..3).prop_map(Op::RemoveEni),
        1 => (0u8..3, 0u8..6, any::<bool>()).prop_map(|(eni, n, leaving)| Op::Leaving(eni, n, leaving)),
        2 => (0u16..40_000).prop_map(Op::Wait),
    ]
}

fn key(n: u8) -> IpamKey {
    IpamKey { network_name: "aws-cni".into(), container_id: ContainerId::new(n.to_string()), if_name: "eth0".into() }
}

fn cidr(eni: u8, n: u8, prefix: bool) -> IpNet {
    let base = if prefix { Ipv4Addr::new(10, 1, eni, n * 16) } else { Ipv4Addr::new(10, 0, eni, 10 + n) };
    IpNet::V4(Ipv4Net::new_assert(base, if prefix { 28 } else { 32 }))
}

fn id(eni: u8) -> EniId {
    EniId::new(format!("eni-{eni}"))
}

fn eni(n: u8) -> StoredEni {
    // EC2 has listed an ENI's own address among the pods' (a foreign account's ENI).
    StoredEni { primary_ipv4: Some(Ipv4Addr::new(10, 0, n, 10)), ..tests_support::stored_eni(u16::from(n), "subnet-1", 12) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn never_two_owners_and_no_address_before_it_is_cool(ops in proptest::collection::vec(op(), 1..200), prefixes: bool) {
        let cooldown = Duration::from_secs(30);
        let mode = if prefixes { PoolMode::Prefixes } else { PoolMode::SecondaryIps };
        let mut store = Datastore::new(mode, cooldown);
        let mut held: BTreeMap<u8, IpAddr> = BTreeMap::new();
        let mut cool_at: BTreeMap<IpAddr, Time> = BTreeMap::new();
        let mut now = Time(1_000_000);
        for op in ops {
            match op {
                Op::Assign(n) => {
                    let free = store.stats(0, now).free();
                    let got = store.assign(&key(n), &PodName::new("d", n.to_string()), &[0], now).map(|allocation| allocation.held[0].address);
                    match (held.get(&n), got) {
                        (Some(has), got) => prop_assert_eq!(Some(*has), got, "asking again gives the same"),
                        (None, Some(address)) => {
                            prop_assert!(!held.values().any(|other| *other == address), "{} has an owner", address);
                            prop_assert!(cool_at.get(&address).is_none_or(|at| *at <= now), "{} is still cooling", address);
                            let on = store.eni_of(address);
                            prop_assert!(on.is_some_and(|eni| eni.serves_pods() && eni.primary_ipv4.map(IpAddr::V4) != Some(address)));
                            held.insert(n, address);
                        }
                        // The ENIs' own addresses count as free and are not given out.
                        (None, None) => prop_assert!(free <= 3, "{} are free and none was given", free),
                    }
                }
                Op::Release(n) => {
                    let released = store.release(&key(n), now).map(|allocation| allocation.held[0].address);
                    prop_assert_eq!(released, held.remove(&n));
                    if let Some(address) = released {
                        cool_at.insert(address, now + cooldown);
                    }
                }
                Op::AddCidr(e, n, prefix) => {
                    if !store.enis().contains_key(&id(e)) {
                        store.put_eni(eni(e));
                    }
                    store.add_cidrs(&id(e), [cidr(e, n, prefix)]);
                }
                Op::RemoveCidr(e, n, prefix) => store.remove_cidr(&id(e), cidr(e, n, prefix)),
                Op::RemoveEni(e) => drop(store.remove_eni(&id(e))),
                Op::Leaving(e, n, leaving) => store.set_leaving(&id(e), cidr(e, n, false), leaving),
                Op::Wait(ms) => now = now + Duration::from_millis(u64::from(ms)),
            }
            let stats = store.stats(0, now);
            prop_assert!(stats.assigned + stats.cooling <= stats.total, "the sums drift: {:?}", stats);
            prop_assert_eq!(store.allocations().len(), held.len());
        }
    }
}

#[test]
fn the_fullest_prefix_is_filled_first_and_the_longest_free_address_reused() {
    let mut store = Datastore::new(PoolMode::Prefixes, Duration::from_secs(30));
    store.put_eni(eni(0));
    store.put_eni(eni(1));
    for e in [0, 1] {
        store.add_cidrs(&id(e), [cidr(e, 0, true), cidr(e, 1, true)]);
    }
    let mut now = Time(0);
    for n in 0..17 {
        store.assign(&key(n), &PodName::default(), &[0], now).expect("free");
    }
    assert_eq!((store.assigned_in(cidr(0, 0, true)), store.assigned_in(cidr(0, 1, true))), (16, 1));
    assert_eq!(store.eni_stats(&store.enis()[&id(1)], now).assigned, 0, "the second ENI stays empty");
    let first = store.release(&key(3), now).expect("held").held[0].address;
    now = now + Duration::from_secs(1);
    let second = store.release(&key(5), now).expect("held").held[0].address;
    now = now + Duration::from_secs(40);
    let next: Vec<_> = (20..22).map(|n| store.assign(&key(n), &PodName::default(), &[0], now).expect("free").held[0].address).collect();
    assert_eq!(next, [first, second], "longest free first");
}

#[test]
fn a_pod_on_several_cards_gets_all_addresses_or_none() {
    let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
    store.put_eni(eni(0));
    store.add_cidrs(&id(0), [cidr(0, 1, false)]);
    assert!(store.assign(&key(1), &PodName::default(), &[0, 1], Time(0)).is_none(), "card 1 has nothing");
    assert_eq!(store.stats(0, Time(0)).assigned, 0, "and card 0's address is not held");
}

#[test]
fn ipv6_addresses_come_from_the_slash_80() {
    let mut store = Datastore::new(PoolMode::Ipv6Prefixes, Duration::from_secs(30));
    store.put_eni(eni(0));
    let prefix: IpNet = "2600:1f18:1:2:3::/80".parse().expect("prefix");
    store.add_cidrs(&id(0), [prefix]);
    assert_eq!(store.stats(0, Time(0)).total, 281_474_976_710_656);
    let one = store.assign(&key(1), &PodName::default(), &[0], Time(0)).expect("free").held[0].address;
    assert_eq!(one.to_string(), "2600:1f18:1:2:3::1");
}

#[test]
fn what_goes_back_to_ec2_is_told_from_what_a_pod_released() {
    let mut store = Datastore::new(PoolMode::Prefixes, Duration::from_secs(30));
    store.put_eni(eni(0));
    let (single, prefix) = (cidr(0, 3, false), cidr(0, 1, true));
    store.add_cidrs(&id(0), [single, prefix]);
    store.assign(&key(1), &PodName::default(), &[0], Time(0)).expect("free");
    store.release(&key(1), Time(0));
    assert!(!store.is_going(prefix, Time(0)), "one address of it cools down");
    store.cool(single, Time(180_000));
    assert!(store.is_going(single, Time(179_999)) && !store.is_going(single, Time(180_000)));
    store.cool(prefix, Time(180_000));
    assert!(store.is_going(prefix, Time(0)));
    store.granted(&id(0), prefix, Time(0));
    assert!(!store.is_going(prefix, Time(0)), "EC2 has given it again");
}

/// A hand takes the ENI away under the pod, the pod ends, and EC2 gives the address anew.
#[test]
fn an_address_that_comes_back_from_ec2_is_not_given_out_before_its_pods_cool_down_is_over() {
    let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
    store.put_eni(eni(0));
    let range = cidr(0, 3, false);
    store.add_cidrs(&id(0), [range]);
    store.assign(&key(1), &PodName::default(), &[0], Time(0)).expect("free");
    store.remove_eni(&id(0));
    store.release(&key(1), Time(10_000));
    store.put_eni(eni(1));
    store.granted(&id(1), range, Time(12_000));
    store.add_cidrs(&id(1), [range]);
    assert!(store.assign(&key(2), &PodName::default(), &[0], Time(39_999)).is_none(), "others' tables may still name the first pod");
    assert!(store.assign(&key(2), &PodName::default(), &[0], Time(40_000)).is_some());
    // What had gone back to EC2 and comes again serves at once, however long pods' addresses cool down.
    let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(300));
    store.put_eni(eni(0));
    store.cool(range, Time(180_000));
    assert!(store.is_going(range, Time(0)));
    store.granted(&id(0), range, Time(1_000));
    store.add_cidrs(&id(0), [range]);
    assert!(store.assign(&key(1), &PodName::default(), &[0], Time(1_000)).is_some());
}

/// An Unassign whose reply was lost, and EC2 gives the address to another ENI: a pod that gets it must be told that one.
#[test]
fn an_address_that_ec2_gives_to_another_eni_is_on_that_one_only() {
    let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
    store.put_eni(eni(0));
    store.put_eni(eni(1));
    let moved = cidr(0, 3, false);
    store.add_cidrs(&id(0), [moved]);
    store.set_leaving(&id(0), moved, true);
    assert!(!store.is_elsewhere(&id(1), moved, Time(0)), "it is on its way");
    store.granted(&id(1), moved, Time(0));
    store.add_cidrs(&id(1), [moved]);
    let address = store.assign(&key(1), &PodName::default(), &[0], Time(0)).expect("free").held[0].address;
    assert_eq!(store.eni_of(address).map(|eni| &eni.id), Some(&id(1)));
    assert!(store.is_elsewhere(&id(0), moved, Time(0)));
}
