//! aws-node's own numbers, and where ours are meant to differ.

use super::*;

const STEADY: &str = include_str!("../../../testdata/ipam/pool-vectors-steady.csv");
const STEP: &str = include_str!("../../../testdata/ipam/pool-vectors-step.csv");

fn number<T: std::str::FromStr + Default>(text: &str) -> T {
    text.parse().unwrap_or_default()
}

/// Rows of the steady table whose numbers are not ours, and why. Matching is by mode, targets and pods wanted.
///
/// aws-node's loop adds one address a step while a burst waits; its model was cut off after 400 steps.
fn steady_differs(row: &[&str]) -> bool {
    row[0] == "p3dn.24xlarge" && row[5..8] == ["1", "1", "1"] && row[9] == "735"
}

#[test]
fn steady_states_are_those_of_aws_node() {
    let mut compared = 0;
    let mut wrong = Vec::new();
    for line in STEADY.lines().skip(1) {
        let row: Vec<&str> = line.split(',').collect();
        let mode = if row[1] == "prefix" { PoolMode::Prefixes } else { PoolMode::SecondaryIps };
        let question = PoolQuestion {
            targets: Targets {
                mode,
                warm_eni: number(row[5]),
                warm_ip: number(row[6]),
                minimum_ip: number(row[7]),
                warm_prefix: number(row[8]),
                reserve_trunk: false,
            },
            limits: PoolLimits { cards: vec![(0, number(row[2]))], slots_per_eni: number(row[3]), max_pods: number(row[4]) },
            pods: number(row[9]),
            custom_networking: false,
        };
        let answer = steady_state(&question);
        let per_eni: Vec<usize> = row[11].split(' ').map(number).collect();
        let same = answer.per_eni == per_eni
            && answer.total == number::<u64>(row[12])
            && answer.unused == number::<u64>(row[13])
            && answer.running == number::<u32>(row[10]);
        if same == steady_differs(&row) {
            wrong.push(format!("{line}\n  ours: {answer:?}"));
        }
        compared += 1;
    }
    assert!(compared > 150, "{compared}");
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn one_step_decisions_are_those_of_aws_node() {
    let mut wrong = Vec::new();
    let mut compared = 0;
    for line in STEP.lines().skip(1) {
        let row: Vec<&str> = line.split(',').collect();
        let prefix = row[0] == "prefix";
        let mode = if prefix { PoolMode::Prefixes } else { PoolMode::SecondaryIps };
        let slots = if prefix { 9 } else { number(row[1]) };
        let (total, assigned, max_pods): (u32, u32, u32) = (number(row[2]), number(row[3]), number(row[5]));
        let targets = Targets {
            mode,
            warm_eni: number(row[6]),
            warm_ip: number(row[7]),
            minimum_ip: number(row[8]),
            warm_prefix: number(row[9]),
            reserve_trunk: false,
        };
        let limits = PoolLimits { cards: vec![(0, 15)], slots_per_eni: slots, max_pods };
        let mut node = VirtualNode::new(targets, limits, false);
        let mut cidrs = if prefix { total / 16 } else { total };
        let mut device = 0;
        while cidrs > 0 {
            let here = cidrs.min(u32::from(slots));
            let request = if prefix { AddressRequest::Ipv4Prefixes(here as u16) } else { AddressRequest::Ipv4(here as u16) };
            node.perform(match node.store.enis().values().find(|eni| eni.device_index == device).map(|eni| eni.id.clone()) {
                Some(eni) => Action::Assign { eni, subnet: SubnetId::default(), request, reason: super::super::Reason::NothingFree },
                None => Action::AttachEni {
                    network_card: 0,
                    device_index: device,
                    subnet: SubnetId::default(),
                    request,
                    reason: super::super::Reason::NothingFree,
                },
            });
            device += 1;
            cidrs -= here;
        }
        for name in 0..assigned {
            let (key, pod) = virtual_pod(name);
            node.store.assign(&key, &pod, &[0], node.now).expect("free");
        }
        if prefix && !row[4].is_empty() && u32::from(node.store.stats(0, node.now).free_prefixes as u16) != number::<u32>(row[4]) {
            // aws-node scatters pods over prefixes; dense packing never gets into that state.
            continue;
        }
        node.calls.clear();
        let mut low = false;
        let mut high = false;
        node.now = node.now + super::super::ENI_MIN_AGE * 10;
        for _ in 0..4 {
            let before = node.calls.len();
            if !node.turn(Demand::default()) {
                break;
            }
            low |= node.calls[before..].iter().any(|call| call.starts_with("Assign") || call.starts_with("ENI+"));
            high |= node.calls[before..].iter().any(|call| call.starts_with("Unassign"));
            if low || high {
                break;
            }
        }
        compared += 1;
        let upstream = (row[12] == "1", row[13] == "1");
        if (low, high) != upstream && !step_differs(&row) {
            wrong.push(format!("{line}\n  ours: low {low} high {high}, calls {:?}", node.calls));
        }
    }
    assert!(compared > 90, "{compared}");
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
}

/// Rows of the step table whose decision is not ours.
fn step_differs(row: &[&str]) -> bool {
    let (total, assigned): (u64, u64) = (number(row[2]), number(row[3]));
    let ip_targets = row[7] != "0" || row[8] != "0";
    // WARM_PREFIX_TARGET=0: giving the only free prefix back would leave nothing free, and the next plan would ask for it.
    let last_prefix = row[0] == "prefix" && !ip_targets && row[9] == "0" && total - assigned == 16;
    // A whole idle ENI goes back as one (FreeENI), not address by address.
    let whole_eni = row[0] == "secondary" && ip_targets && total > number::<u64>(row[1]);
    last_prefix || whole_eni
}
