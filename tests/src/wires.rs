//! What should be plugged where: the wiring that a VPC's state asks for, and the steps from one wiring to the next. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use stanchion_core::ids::{EniId, Mac};

/// An attached ENI as the wire sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wire {
    /// The ENI.
    pub eni: EniId,
    /// Ethernet address of the node's end.
    pub mac: Mac,
    /// Namespace of the node.
    pub netns: String,
    /// Name of the node's end.
    pub if_name: String,
    /// The ENI's subnet; its base + 1 is the gateway.
    pub subnet: Ipv4Net,
    /// The ENI's own address.
    pub primary: Ipv4Addr,
    /// Everything else assigned to it: addresses as /32 and /128, prefixes as /28 and /80.
    pub secondary: BTreeSet<IpNet>,
    /// What the internet sees instead of the primary address; `None` has no way out.
    pub public: Option<Ipv4Addr>,
    /// A branch that has no cable of its own: frames of this VLAN on the cable of this trunk. The node's end is not ours to make.
    pub over: Option<(EniId, u16)>,
}

impl Wire {
    /// Name of the router's end: the last 12 digits of the ENI's id.
    pub fn router_if(&self) -> String {
        router_if(&self.eni)
    }

    /// The subnet's router.
    pub fn gateway(&self) -> Ipv4Addr {
        gateway(self.subnet)
    }

    /// Its IPv6 address, if it has one.
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.secondary.iter().find_map(|net| match net {
            IpNet::V6(net) if net.prefix_len() == 128 => Some(net.addr()),
            _ => None,
        })
    }

    /// The link-local address that the node's end gives itself (RFC 4291, appendix A).
    pub fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.0.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
    }

    fn same_cable(&self, other: &Self) -> bool {
        (self.mac, &self.netns, &self.if_name, self.subnet, self.primary, self.public, &self.over)
            == (other.mac, &other.netns, &other.if_name, other.subnet, other.primary, other.public, &other.over)
    }
}

/// Name of the router's end of an ENI's cable.
pub fn router_if(eni: &EniId) -> String {
    let id = eni.as_str();
    format!("e{}", &id[id.len().saturating_sub(12)..])
}

/// The subnet's router: base + 1.
pub fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1)
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The cable and what it may send; both ends appear.
    Plug(Wire),
    /// Both ends vanish.
    Unplug(Wire),
    /// The ENI may send from, and gets what is sent to, one more address or prefix.
    Assign(Wire, IpNet),
    /// No longer.
    Unassign(Wire, IpNet),
}

/// The steps from one wiring to another. What is taken away goes first: an address may move between ENIs. A branch goes before its
/// trunk's cable and comes after it.
pub fn steps(now: &BTreeMap<EniId, Wire>, wanted: &BTreeMap<EniId, Wire>) -> Vec<Step> {
    let mut take = Vec::new();
    let mut give = Vec::new();
    for (eni, wire) in now {
        match wanted.get(eni) {
            Some(want) if wire.same_cable(want) => {
                take.extend(wire.secondary.difference(&want.secondary).map(|net| Step::Unassign(wire.clone(), *net)));
                give.extend(want.secondary.difference(&wire.secondary).map(|net| Step::Assign(wire.clone(), *net)));
            }
            Some(want) => {
                take.push(Step::Unplug(wire.clone()));
                give.push(Step::Plug(want.clone()));
            }
            None => take.push(Step::Unplug(wire.clone())),
        }
    }
    give.extend(wanted.iter().filter(|(eni, _)| !now.contains_key(*eni)).map(|(_, wire)| Step::Plug(wire.clone())));
    take.sort_by_key(|step| !is_branch(step));
    give.sort_by_key(is_branch);
    take.extend(give);
    take
}

fn is_branch(step: &Step) -> bool {
    let (Step::Plug(wire) | Step::Unplug(wire) | Step::Assign(wire, _) | Step::Unassign(wire, _)) = step;
    wire.over.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(eni: &str, secondary: &[&str]) -> (EniId, Wire) {
        let eni = EniId::from(eni);
        let wire = Wire {
            eni: eni.clone(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            netns: "n1".into(),
            if_name: "eth0".into(),
            subnet: "10.0.0.0/20".parse().unwrap(),
            primary: "10.0.0.10".parse().unwrap(),
            secondary: secondary.iter().map(|s| s.parse().unwrap()).collect(),
            public: None,
            over: None,
        };
        (eni, wire)
    }

    #[test]
    fn a_branch_comes_after_its_trunk_and_goes_before_it() {
        let trunk = wire("eni-0000000000000000b", &[]);
        let mut branch = wire("eni-0000000000000000a", &[]);
        branch.1.over = Some((trunk.0.clone(), 7));
        let (plug, unplug) = (|w: &Wire| Step::Plug(w.clone()), |w: &Wire| Step::Unplug(w.clone()));
        let both = BTreeMap::from([trunk.clone(), branch.clone()]);
        assert_eq!(steps(&BTreeMap::new(), &both), [plug(&trunk.1), plug(&branch.1)]);
        assert_eq!(steps(&both, &BTreeMap::new()), [unplug(&branch.1), unplug(&trunk.1)]);
    }

    #[test]
    fn an_address_leaves_one_eni_before_it_joins_another() {
        let now = BTreeMap::from([wire("eni-0000000000000000a", &["10.0.0.11/32"]), wire("eni-0000000000000000b", &[])]);
        let wanted = BTreeMap::from([wire("eni-0000000000000000a", &[]), wire("eni-0000000000000000b", &["10.0.0.11/32"])]);
        let net = "10.0.0.11/32".parse().unwrap();
        let [(_, a), (_, b)] = [wire("eni-0000000000000000a", &["10.0.0.11/32"]), wire("eni-0000000000000000b", &[])];
        assert_eq!(steps(&now, &wanted), [Step::Unassign(a, net), Step::Assign(b, net)]);
    }

    #[test]
    fn steps_to_the_same_wiring_are_none_and_to_nothing_unplug_all() {
        let now = BTreeMap::from([wire("eni-0000000000000000a", &["10.0.0.16/28"])]);
        assert_eq!(steps(&now, &now), []);
        assert_eq!(steps(&now, &BTreeMap::new()), [Step::Unplug(now.values().next().unwrap().clone())]);
        assert_eq!(steps(&BTreeMap::new(), &now), [Step::Plug(now.values().next().unwrap().clone())]);
    }

    #[test]
    fn interface_names_fit_the_kernel() {
        let (_, wire) = wire("eni-0123456789abcdef0", &[]);
        assert_eq!(wire.router_if(), "e56789abcdef0");
        assert!(wire.router_if().len() <= 15);
        assert_eq!(wire.gateway(), "10.0.0.1".parse::<Ipv4Addr>().unwrap());
        assert_eq!(wire.link_local(), "fe80::ff:fe00:1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(wire.ipv6(), None);
    }
}
