//! Names and numbers that aws-node also uses, so that a node can be switched over live in both directions.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha1::{Digest as _, Sha1};

use crate::ids::{Mac, PodName};

/// The prefix of host veths when nobody says otherwise (`AWS_VPC_K8S_CNI_VETHPREFIX`).
pub const DEFAULT_VETH_PREFIX: &str = "eni";
/// The prefix of host veths of pods with a branch ENI in strict mode; the SNAT rule leaves `vlan*` alone.
pub const STRICT_BRANCH_PREFIX: &str = "vlan";
/// The kernel's main table.
pub const MAIN_TABLE: u32 = 254;
/// Linux' limit of an interface name without its NUL (`IFNAMSIZ` - 1).
pub const MAX_IF_NAME: usize = 15;
/// Hex digits of the pod's hash in a veth name: with a prefix of four, 15 characters.
const HASH_DIGITS: usize = 11;

/// Why a veth prefix is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("veth prefix {0:?}: 1 to 4 characters, and none of eth, lo, vlan")]
pub struct BadVethPrefix(pub String);

/// Checks `AWS_VPC_K8S_CNI_VETHPREFIX`.
///
/// # Errors
/// When the prefix is empty, longer than four characters, not printable ASCII, or taken.
pub fn check_veth_prefix(prefix: &str) -> Result<(), BadVethPrefix> {
    let taken = ["eth", "lo", "vlan"].contains(&prefix);
    let printable = prefix.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if prefix.is_empty() || prefix.len() > 4 || taken || !printable { Err(BadVethPrefix(prefix.to_owned())) } else { Ok(()) }
}

/// The host end's name of a pod's attachment `index` (0 is the first).
pub fn host_veth_name(prefix: &str, pod: &PodName, index: usize) -> String {
    let mut text = format!("{}.{}", pod.namespace, pod.name);
    if index > 0 {
        text = format!("{text}.{index}");
    }
    format!("{prefix}{}", sha1_hex(&text, HASH_DIGITS))
}

/// The pod end's name: what the runtime asked for, then `mNicIf1`, `mNicIf2`, …
pub fn pod_if_name(requested: &str, index: usize) -> String {
    if index == 0 { requested.to_owned() } else { format!("mNicIf{index}") }
}

/// The Ethernet addresses of a veth's host and pod end: locally administered, unicast, the same whenever the same attachment is
/// set up again.
pub fn veth_macs(container_id: &str, if_name: &str) -> (Mac, Mac) {
    let end = |side: &str| {
        let digest = Sha1::digest(format!("{side}/{container_id}/{if_name}").as_bytes());
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&digest[..6]);
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Mac(bytes)
    };
    (end("host"), end("pod"))
}

/// The name of the interface that aws-node invents in its results to carry a VLAN id and a device number.
pub fn upstream_dummy_name(pod: &PodName) -> String {
    format!("dummy{}", sha1_hex(&format!("{}.{}", pod.namespace, pod.name), HASH_DIGITS))
}

/// The routing table of an ENI: main for the primary, then `device + 1`; other network cards from 10000.
pub fn eni_route_table(network_card: u32, device_index: u32) -> u32 {
    match (network_card, device_index) {
        (0, 0) => MAIN_TABLE,
        (0, device) => device + 1,
        (card, device) => 10_000 + 100 * card + device,
    }
}

/// The routing table of a branch ENI.
pub fn branch_route_table(vlan_id: u16) -> u32 {
    100 + u32::from(vlan_id)
}

/// The VPC router's address in a subnet: the second one.
pub fn subnet_gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1)
}

fn sha1_hex(text: &str, digits: usize) -> String {
    let mut hex = String::with_capacity(40);
    for byte in Sha1::digest(text.as_bytes()) {
        hex.push_str(&format!("{byte:02x}"));
    }
    hex.truncate(digits);
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn veth_names_are_those_of_aws_node() {
        for (namespace, name, want) in [
            ("kube-system", "coredns-57ff979f67-qqbdh", "enib5faff8a083"),
            ("kube-system", "coredns-57ff979f67-8ns9b", "eni9571956a6cc"),
            ("default", "sample-pod", "enicc21c2d7785"),
        ] {
            assert_eq!(host_veth_name("eni", &PodName::new(namespace, name), 0), want);
        }
        let pod = PodName::new("default", "sample-pod");
        assert_ne!(host_veth_name("eni", &pod, 1), host_veth_name("eni", &pod, 0));
        assert!(host_veth_name("abcd", &pod, 7).len() <= MAX_IF_NAME);
    }

    #[test]
    fn macs_are_local_unicast_and_of_one_attachment() {
        let (host, pod) = veth_macs("57601f51", "eth0");
        assert_eq!(veth_macs("57601f51", "eth0"), (host, pod));
        assert_ne!(host, pod);
        assert_ne!(veth_macs("57601f51", "mNicIf1").1, pod);
        assert!([host, pod].iter().all(|mac| mac.0[0] & 3 == 2));
    }

    #[test]
    fn tables_are_those_of_aws_node() {
        for (device, card, want) in [(0, 0, 254), (1, 0, 2), (3, 0, 4), (1, 1, 10_101), (3, 2, 10_203), (0, 1, 10_100)] {
            assert_eq!(eni_route_table(card, device), want, "device {device} card {card}");
        }
        assert_eq!(branch_route_table(7), 107);
    }

    #[test]
    fn the_gateway_is_the_second_address() {
        assert_eq!(subnet_gateway("10.0.64.0/19".parse().unwrap()), Ipv4Addr::new(10, 0, 64, 1));
        assert_eq!(subnet_gateway("10.0.64.77/19".parse().unwrap()), Ipv4Addr::new(10, 0, 64, 1));
    }

    #[test]
    fn prefixes_that_would_clash_are_refused() {
        for good in ["eni", "e", "abcd", "cni-"] {
            assert_eq!(check_veth_prefix(good), Ok(()));
        }
        for bad in ["", "eth", "lo", "vlan", "abcde", "a/b", "a b"] {
            assert!(check_veth_prefix(bad).is_err(), "{bad:?}");
        }
    }
}
