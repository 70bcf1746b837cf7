//! Instance types: how many ENIs, addresses and cards they have.
//!
//! The table is what `DescribeInstanceTypes` said of every type on the day it was made; a type that it lacks is asked for
//! at start.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// Columns: type, ENIs, IPv4 addresses an ENI, hypervisor, metal, default card, `card:ENIs` separated by blanks.
const TABLE: &str = include_str!("instance-limits.csv");

static BY_TYPE: LazyLock<BTreeMap<&'static str, InstanceLimits>> = LazyLock::new(|| TABLE.lines().skip(1).filter_map(parse_row).collect());

/// Addresses in a /28.
pub const PREFIX_ADDRESSES: u32 = 16;

/// Pods of a node that use its own network and need no address: aws-node's and kube-proxy's. EKS adds them to the number
/// of addresses, and every row of its `eni-max-pods.txt` agrees.
const HOST_NETWORK_PODS: u32 = 2;

/// Nitro types and families that the resource controller's table gives no trunk, or does not have: `pkg/aws/vpc/limits.go` of
/// aws/amazon-vpc-resource-controller-k8s. It does not know the newest types either, which are not listed here.
const WITHOUT_TRUNK: [&str; 3] = ["i4i.large", "u-6tb1.56xlarge", "u-6tb1.112xlarge"];
const FAMILIES_WITHOUT_TRUNK: [&str; 9] = ["hpc6a", "hpc6id", "hpc7a", "hpc7g", "hpc8a", "u-9tb1", "u-12tb1", "u-18tb1", "u-24tb1"];

/// What EKS caps prefix delegation at: 110 pods below 30 vCPUs, else 250.
const PREFIX_CAP_SMALL: u32 = 110;
const PREFIX_CAP_LARGE: u32 = 250;

/// Limits of an instance type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLimits {
    /// `m5.large`.
    pub instance_type: String,
    /// ENIs on the default network card, the primary among them.
    pub max_enis: u16,
    /// IPv4 addresses of an ENI, its own among them.
    pub ipv4_per_eni: u16,
    /// `nitro`, `xen`, `unknown` or empty.
    pub hypervisor: String,
    /// Metal.
    pub bare_metal: bool,
    /// Index of the card that the primary ENI is on.
    pub default_network_card: u16,
    /// ENIs a card: (card index, maximum).
    pub network_cards: Vec<(u16, u16)>,
}

impl InstanceLimits {
    /// The built-in table's row; `None` for a type newer than the table.
    pub fn lookup(instance_type: &str) -> Option<&'static Self> {
        BY_TYPE.get(instance_type)
    }

    /// Every type of the table, in alphabetical order.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        BY_TYPE.values()
    }

    /// /28 prefixes can be delegated: Nitro or metal.
    pub fn supports_prefixes(&self) -> bool {
        self.hypervisor == "nitro" || self.bare_metal
    }

    /// AWS's resource controller gives instances of this type a trunk for branch ENIs: Nitro or metal, but neither the burstable families
    /// (t2 to t4g) nor Macs ("Assign security groups to individual Pods" in the EKS user guide), nor what the controller leaves out.
    pub fn supports_trunk(&self) -> bool {
        let family = self.instance_type.split('.').next().unwrap_or_default();
        let burstable = family.strip_prefix('t').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        let left_out = WITHOUT_TRUNK.contains(&self.instance_type.as_str()) || FAMILIES_WITHOUT_TRUNK.contains(&family);
        self.supports_prefixes() && !burstable && !family.starts_with("mac") && !left_out
    }

    /// Slots for secondary addresses or prefixes on an ENI.
    pub fn slots_per_eni(&self) -> u16 {
        self.ipv4_per_eni.saturating_sub(1)
    }

    /// ENIs that may be attached to a card, the primary among them.
    pub fn enis_of_card(&self, card: u16) -> u16 {
        if card == self.default_network_card {
            return self.max_enis;
        }
        self.network_cards.iter().find(|(index, _)| *index == card).map_or(0, |(_, enis)| *enis)
    }

    /// Pods that `enis` ENIs can hold: what EKS's own table says with single addresses, and its convention with prefixes.
    pub fn max_pods(&self, usable_enis: u16, prefixes: bool) -> u32 {
        let addresses = u32::from(usable_enis) * u32::from(self.slots_per_eni());
        if !prefixes {
            return addresses + HOST_NETWORK_PODS;
        }
        let cap = if self.is_large() { PREFIX_CAP_LARGE } else { PREFIX_CAP_SMALL };
        (addresses * PREFIX_ADDRESSES + HOST_NETWORK_PODS).min(cap)
    }

    /// 30 vCPUs or more, by the size in the name: `xlarge` is 4, `8xlarge` 32, metal always more. The table has no vCPUs.
    fn is_large(&self) -> bool {
        let size = self.instance_type.split_once('.').map_or("", |(_, size)| size);
        self.bare_metal || size.strip_suffix("xlarge").and_then(|count| count.parse::<u32>().ok()).is_some_and(|count| count >= 8)
    }
}

fn parse_row(row: &'static str) -> Option<(&'static str, InstanceLimits)> {
    let mut columns = row.split(',');
    let name = columns.next()?;
    let limits = InstanceLimits {
        instance_type: name.to_owned(),
        max_enis: columns.next()?.parse().ok()?,
        ipv4_per_eni: columns.next()?.parse().ok()?,
        hypervisor: columns.next()?.to_owned(),
        bare_metal: columns.next()?.parse().ok()?,
        default_network_card: columns.next()?.parse().ok()?,
        network_cards: columns.next()?.split_whitespace().map(parse_card).collect::<Option<_>>()?,
    };
    Some((name, limits))
}

fn parse_card(text: &str) -> Option<(u16, u16)> {
    let (card, enis) = text.split_once(':')?;
    Some((card.parse().ok()?, enis.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table_is_read() {
        assert_eq!(BY_TYPE.len(), TABLE.lines().skip(1).filter(|row| !row.is_empty()).count());
        assert!(BY_TYPE.len() > 1_300);
        assert!(BY_TYPE.values().all(|limits| limits.max_enis >= 1 && limits.ipv4_per_eni >= 2));
        assert!(BY_TYPE.values().filter(|limits| limits.network_cards.len() > 1).count() > 60);
    }

    #[test]
    fn a_trunk_needs_nitro_and_no_burstable_family() {
        let supports = |name: &str| InstanceLimits::lookup(name).unwrap().supports_trunk();
        assert!(["m5.large", "c6g.medium", "m5.metal", "trn1.32xlarge", "i4i.xlarge", "u-3tb1.56xlarge"].into_iter().all(supports));
        assert!(!["t3.large", "t4g.small", "c4.large", "m4.xlarge", "mac1.metal", "hpc7a.96xlarge"].into_iter().any(supports));
        assert!(!WITHOUT_TRUNK.into_iter().any(supports));
        let known = |family: &str| BY_TYPE.keys().any(|name| name.split('.').next() == Some(family));
        assert!(FAMILIES_WITHOUT_TRUNK.into_iter().all(known));
    }

    #[test]
    fn max_pods_agree_with_eks() {
        for (name, pods) in [
            ("t3.nano", 4),
            ("t3.small", 11),
            ("t3.medium", 17),
            ("t3.large", 35),
            ("m5.large", 29),
            ("m5.2xlarge", 58),
            ("m5.12xlarge", 234),
        ]
        .into_iter()
        .chain([("m5.24xlarge", 737), ("m4.large", 20), ("c1.medium", 12), ("g4dn.xlarge", 29), ("p5.48xlarge", 100)])
        {
            let limits = InstanceLimits::lookup(name).expect(name);
            assert_eq!(limits.max_pods(limits.max_enis, false), pods, "{name}");
        }
        let large = InstanceLimits::lookup("m5.large").expect("m5.large");
        assert_eq!(large.max_pods(3, true), 110);
        assert_eq!(InstanceLimits::lookup("m5.4xlarge").expect("m5.4xlarge").max_pods(8, true), 110);
        assert_eq!(InstanceLimits::lookup("m5.12xlarge").expect("m5.12xlarge").max_pods(8, true), 250);
        assert_eq!(InstanceLimits::lookup("p3dn.24xlarge").expect("p3dn").max_pods(15, true), 250);
        assert_eq!(large.max_pods(2, false), 20, "custom networking leaves the primary out");
    }

    #[test]
    fn cards_and_hypervisors() {
        assert!(!InstanceLimits::lookup("m4.large").expect("m4").supports_prefixes());
        assert!(InstanceLimits::lookup("m5.metal").expect("metal").supports_prefixes());
        let p4d = InstanceLimits::lookup("p4d.24xlarge").expect("p4d");
        assert!(p4d.network_cards.len() > 1 && p4d.enis_of_card(1) >= 1 && p4d.enis_of_card(99) == 0);
        assert!(InstanceLimits::lookup("m99.gigantic").is_none());
    }
}
