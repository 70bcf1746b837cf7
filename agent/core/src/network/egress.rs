//! Egress to the address family that the cluster does not have: names, ranges and reservations as aws-node's `egress-cni` has them,
//! so that a node can be switched over with such pods running.
//!
//! | cluster | pod interface | range | reservations |
//! |---|---|---|---|
//! | IPv6, `ENABLE_V4_EGRESS` (default) | `v4if0` | 169.254.172.0/22 | `/run/cni/v6pd/egress-v4-ipam` |
//! | IPv4, `ENABLE_V6_EGRESS` | `v6if0` | fd00::ac:00/118 | `/run/cni/v4pd/egress-v6-ipam` |
//!
//! A reservation is a file named after its address, below a directory named after the network; its content is the sandbox's id and
//! the interface, each on a line (the format of the plugin `host-local`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::host::{Egress, Randomize};
use super::names::{MAX_IF_NAME, host_veth_name};
use crate::config::Config;
use crate::ids::PodName;

/// Which family is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressFamily {
    /// IPv4 from an IPv6 cluster.
    V4,
    /// IPv6 from an IPv4 cluster.
    V6,
}

impl EgressFamily {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The pods' addresses.
    pub fn range(self) -> IpNet {
        match self {
            Self::V4 => Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 172, 0), 22).into(),
            Self::V6 => Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0xac, 0), 118).into(),
        }
    }

    /// The interface in the pod.
    pub fn pod_if(self) -> &'static str {
        match self {
            Self::V4 => "v4if0",
            Self::V6 => "v6if0",
        }
    }

    /// Of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Where addresses are reserved.
    pub fn reservations(self) -> &'static str {
        match self {
            Self::V4 => "/run/cni/v6pd/egress-v4-ipam",
            Self::V6 => "/run/cni/v4pd/egress-v6-ipam",
        }
    }

    /// From the interface's name.
    pub fn of_pod_if(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.pod_if() == name)
    }

    /// The host end's name for a pod.
    pub fn host_if(self, prefix: &str, pod: &PodName) -> String {
        // A hash of another text than any attachment's.
        let other = PodName::new(pod.namespace.clone(), format!("{}/{}", pod.name, self.pod_if()));
        let name = host_veth_name(prefix, &other, 0);
        debug_assert!(name.len() <= MAX_IF_NAME, "a prefix of four and eleven digits");
        name
    }
}

/// What the settings want and the node can do; `None` also when the node has no address of the family.
pub fn wanted(config: &Config, ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>, randomize: Randomize) -> Option<Egress> {
    let to: IpAddr = match config.pool.ipv6 {
        true if config.network.v4_egress => ipv4?.into(),
        false if config.network.v6_egress => ipv6?.into(),
        _ => return None,
    };
    Some(Egress { range: EgressFamily::of(to).range(), to, randomize })
}

/// Whether an address is one of those that the node made up.
pub fn is_egress_address(address: IpAddr) -> bool {
    EgressFamily::of(address).range().contains(&address)
}

/// The addresses of a range that may be given, in the order of trial: the one after `last` first, then round. The network's address,
/// the first host (by custom the gateway's) and the last address are nobody's.
pub fn candidates(range: IpNet, last: Option<IpAddr>) -> impl Iterator<Item = IpAddr> {
    let count = 1u32.checked_shl(u32::from(range.max_prefix_len() - range.prefix_len())).unwrap_or(u32::MAX);
    let at = move |offset: u32| match range.network() {
        IpAddr::V4(network) => IpAddr::from(Ipv4Addr::from_bits(network.to_bits().wrapping_add(offset))),
        IpAddr::V6(network) => IpAddr::from(Ipv6Addr::from_bits(network.to_bits().wrapping_add(u128::from(offset)))),
    };
    let usable = count.saturating_sub(3);
    let after = (0..usable).find(|offset| Some(at(offset + 2)) == last).map_or(0, |offset| offset + 1);
    (0..usable).map(move |step| at((after + step) % usable + 2))
}

/// A reservation's content.
pub fn reservation(container_id: &str, if_name: &str) -> String {
    format!("{container_id}\r\n{if_name}")
}

/// Whether a reservation is this sandbox's; files of old releases have the id only.
pub fn is_reserved_for(content: &str, container_id: &str, if_name: &str) -> bool {
    let mut lines = content.lines().map(str::trim);
    lines.next() == Some(container_id) && lines.next().is_none_or(|name| name.is_empty() || name == if_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ranges_are_those_of_aws_node() {
        assert_eq!(EgressFamily::V4.range().to_string(), "169.254.172.0/22");
        assert_eq!(EgressFamily::V6.range().to_string(), "fd00::ac:0/118");
        assert_eq!(EgressFamily::of_pod_if("v6if0"), Some(EgressFamily::V6));
        assert_eq!(EgressFamily::of_pod_if("eth0"), None);
        let pod = PodName::new("default", "sample-pod");
        let names = EgressFamily::ALL.map(|family| family.host_if("eni", &pod));
        assert_ne!(names[0], names[1]);
        assert!(names.iter().all(|name| name.starts_with("eni") && *name != host_veth_name("eni", &pod, 0)));
    }

    #[test]
    fn a_node_without_an_address_of_the_family_has_no_egress() {
        let config = |pairs: &[(&str, &str)]| {
            let read = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            Config::read(&read).unwrap_or_else(|errors| panic!("{errors:?}"))
        };
        let (four, six) = (Some(Ipv4Addr::new(10, 0, 0, 5)), Some("2001:db8::5".parse().unwrap()));
        let to = |config: &Config, four, six| wanted(config, four, six, Randomize::No).map(|egress| egress.to.to_string());
        let plain = config(&[]);
        assert_eq!(to(&plain, four, six), None, "off by default in IPv4 clusters");
        let on = config(&[("ENABLE_V6_EGRESS", "true")]);
        assert_eq!(to(&on, four, six).as_deref(), Some("2001:db8::5"));
        assert_eq!(to(&on, four, None), None);
        let six_cluster =
            [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
        assert_eq!(to(&config(&six_cluster), four, six).as_deref(), Some("10.0.0.5"), "on by default in IPv6 clusters");
        let off = config(&[&six_cluster[..], &[("ENABLE_V4_EGRESS", "false")]].concat());
        assert_eq!(to(&off, four, six), None);
        assert!(is_egress_address("169.254.172.9".parse().unwrap()) && !is_egress_address("169.254.1.1".parse().unwrap()));
    }

    #[test]
    fn every_address_is_tried_once_beginning_after_the_last() {
        for family in EgressFamily::ALL {
            let range = family.range();
            let all: Vec<_> = candidates(range, None).collect();
            assert_eq!(all.len(), 1024 - 3);
            assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
            assert!(all.iter().all(|address| range.contains(address)));
            let from_the_middle: Vec<_> = candidates(range, Some(all[500])).collect();
            assert_eq!((from_the_middle[0], from_the_middle.len()), (all[501], all.len()));
            assert_eq!(from_the_middle.last(), Some(&all[500]));
            assert_eq!(candidates(range, all.last().copied()).next(), Some(all[0]), "round");
        }
        let first = candidates(EgressFamily::V4.range(), None).next().unwrap();
        assert_eq!(first.to_string(), "169.254.172.2");
    }

    #[test]
    fn reservations_are_host_locals() {
        let text = reservation("57601f51", "v4if0");
        assert_eq!(text, "57601f51\r\nv4if0");
        assert!(is_reserved_for(&text, "57601f51", "v4if0"));
        assert!(is_reserved_for("57601f51", "57601f51", "v4if0"));
        for other in ["57601f5\r\nv4if0", "57601f51\r\neth0", ""] {
            assert!(!is_reserved_for(other, "57601f51", "v4if0"), "{other:?}");
        }
    }
}
