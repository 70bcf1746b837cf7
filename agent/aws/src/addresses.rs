//! Addresses and prefixes, sorted by the parameter of EC2 that takes them.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// What an Unassign call takes, each kind in a parameter of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ByKind {
    /// /32.
    pub ipv4: Vec<Ipv4Addr>,
    /// Shorter than /32.
    pub prefixes_v4: Vec<Ipv4Net>,
    /// /128.
    pub ipv6: Vec<Ipv6Addr>,
    /// Shorter than /128.
    pub prefixes_v6: Vec<Ipv6Net>,
}

impl ByKind {
    /// Sorts addresses and prefixes; their order within a kind stays.
    pub fn of(cidrs: &[IpNet]) -> Self {
        let mut sorted = Self::default();
        for cidr in cidrs {
            match cidr {
                IpNet::V4(net) if net.prefix_len() == 32 => sorted.ipv4.push(net.addr()),
                IpNet::V4(net) => sorted.prefixes_v4.push(*net),
                IpNet::V6(net) if net.prefix_len() == 128 => sorted.ipv6.push(net.addr()),
                IpNet::V6(net) => sorted.prefixes_v6.push(*net),
            }
        }
        sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_route_is_an_address_and_anything_shorter_a_prefix() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let sorted = ByKind::of(&[net("10.0.0.7/32"), net("10.0.0.16/28"), net("2001:db8::1/128"), net("2001:db8:0:0:1::/80")]);
        assert_eq!(sorted.ipv4, ["10.0.0.7".parse::<Ipv4Addr>().unwrap()]);
        assert_eq!(sorted.prefixes_v4, ["10.0.0.16/28".parse::<Ipv4Net>().unwrap()]);
        assert_eq!(sorted.ipv6, ["2001:db8::1".parse::<Ipv6Addr>().unwrap()]);
        assert_eq!(sorted.prefixes_v6, ["2001:db8:0:0:1::/80".parse::<Ipv6Net>().unwrap()]);
    }
}
