//! One attachment of a pod: a veth pair, its routes in the pod and on the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::branch::BranchLink;
use super::egress::EgressFamily;
use super::host::{PRIORITY_FROM_POD, PRIORITY_TO_POD};
use super::names::MAIN_TABLE;
use super::ops::{NetOp, Route, Rule};
use crate::ids::Mac;

/// A pod's attachment, complete: the same plan sets it up, checks it and takes it down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// 0 for the first attachment; its routes are the pod's main ones.
    pub attachment: u8,
    /// The host end's name.
    pub host_if: String,
    /// The pod end's name.
    pub pod_if: String,
    /// The host end's Ethernet address; set at creation so that udev does not change it under the pod's neighbour entry.
    pub host_mac: Mac,
    /// The pod end's Ethernet address.
    pub pod_mac: Mac,
    /// The pod's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The pod's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Of both ends, in bytes.
    pub mtu: u32,
    /// The routing table of the address's ENI.
    pub table: u32,
    /// Security groups of its own: its branch ENI, whose table `table` is then.
    pub branch: Option<BranchLink>,
}

// === impl PodPlan ===

impl PodPlan {
    /// The next hop in the pod: 169.254.1.1 (or .2, …), held by nobody, resolved by a permanent neighbour.
    pub fn gateway_v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(169, 254, 1, self.attachment + 1)
    }

    /// The same for IPv6: fe80::1 (or ::2, …).
    pub fn gateway_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, u16::from(self.attachment) + 1)
    }

    /// The addresses with their next hops.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        let v4 = self.ipv4.map(|address| (address.into(), self.gateway_v4().into()));
        let v6 = self.ipv6.map(|address| (address.into(), self.gateway_v6().into()));
        v4.into_iter().chain(v6)
    }

    /// In the pod's namespace, after the veth exists with its pod end up: address, gateway, default route, neighbour.
    ///
    /// The address comes before the routes, so that the kernel takes it as their source.
    pub fn pod_ops(&self, pod_index: u32) -> Vec<NetOp> {
        let mut ops = Vec::with_capacity(8);
        // Attachments after the first answer from their own table; main belongs to the first.
        let table = if self.attachment == 0 { MAIN_TABLE } else { u32::from(self.attachment) };
        for (address, gateway) in self.addresses() {
            let everywhere = match address {
                IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
                IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
            };
            ops.push(NetOp::AddAddress { index: pod_index, address: self.with_length(address) });
            ops.push(NetOp::ReplaceRoute(Route { dst: gateway.into(), table, via: None, index: pod_index }));
            ops.push(NetOp::ReplaceRoute(Route { dst: everywhere, table, via: Some(gateway), index: pod_index }));
            ops.push(NetOp::Neighbour { index: pod_index, address: gateway, mac: self.host_mac });
            if self.attachment > 0 {
                ops.push(NetOp::AddRule(Rule::from_host(1, address, table)));
            }
        }
        ops
    }

    /// As the interface carries it: alone, but the address of the other family with its range's length, as aws-node's has it. There is no route for
    /// the range: the pods of a node are reached by its host end, too.
    fn with_length(&self, address: IpAddr) -> IpNet {
        match EgressFamily::of_pod_if(&self.pod_if) {
            Some(family) => IpNet::new_assert(address, family.range().prefix_len()),
            None => address.into(),
        }
    }

    /// On the host, after the veth exists: the route, then the rules. This order is what makes [`diff`](super::diff())
    /// tell an orphaned rule from one of a pod that is being added.
    pub fn host_ops(&self, host_index: u32) -> Vec<NetOp> {
        let mut ops = Vec::with_capacity(6);
        for (address, _) in self.addresses() {
            ops.push(NetOp::ReplaceRoute(Route { dst: address.into(), table: self.host_table(), via: None, index: host_index }));
        }
        // Not to be asked for: the host end may not ask before its own link-local address is past duplicate detection, a second later.
        ops.extend(self.ipv6.map(|address| NetOp::Neighbour { index: host_index, address: address.into(), mac: self.pod_mac }));
        ops.extend(self.rules().into_iter().map(NetOp::AddRule));
        ops
    }

    /// The host's table with the route to the pod.
    pub fn host_table(&self) -> u32 {
        self.branch.as_ref().map_or(MAIN_TABLE, BranchLink::pod_table)
    }

    /// On the host, after the branch's VLAN interface exists: the way out by it.
    pub fn branch_ops(&self, vlan_index: u32) -> Vec<NetOp> {
        let routes = self.branch.iter().flat_map(|link| link.routes(vlan_index, self.addresses().map(|(address, _)| address)));
        routes.map(NetOp::ReplaceRoute).collect()
    }

    /// Removes the rules; the route goes with the veth.
    pub fn undo_host_ops(&self) -> Vec<NetOp> {
        self.rules().into_iter().map(NetOp::DeleteRule).collect()
    }

    /// The host's rules for the pod.
    pub fn rules(&self) -> Vec<Rule> {
        let addresses = self.addresses().map(|(address, _)| address);
        match &self.branch {
            Some(link) if link.strict => link.rules(&self.host_if, addresses),
            _ => addresses.flat_map(|address| pod_rules(address, self.table)).collect(),
        }
    }
}

/// The host's rules for a pod's address on an ENI with this table.
pub fn pod_rules(address: IpAddr, table: u32) -> Vec<Rule> {
    let mut rules = vec![Rule::to_host(PRIORITY_TO_POD, address, MAIN_TABLE)];
    if table != MAIN_TABLE {
        rules.push(Rule::from_host(PRIORITY_FROM_POD, address, table));
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> PodPlan {
        PodPlan {
            attachment: 0,
            host_if: "enicc21c2d7785".into(),
            pod_if: "eth0".into(),
            host_mac: Mac([2, 0, 0, 0, 0, 1]),
            pod_mac: Mac([2, 0, 0, 0, 0, 2]),
            ipv4: Some(Ipv4Addr::new(10, 0, 1, 9)),
            ipv6: None,
            mtu: 9001,
            table: 2,
            branch: None,
        }
    }

    #[test]
    fn a_pod_has_only_its_address_and_a_gateway_that_nobody_holds() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let gateway: IpAddr = "169.254.1.1".parse().unwrap();
        assert_eq!(
            plan().pod_ops(3),
            [
                NetOp::AddAddress { index: 3, address: net("10.0.1.9/32") },
                NetOp::ReplaceRoute(Route { dst: net("169.254.1.1/32"), table: 254, via: None, index: 3 }),
                NetOp::ReplaceRoute(Route { dst: net("0.0.0.0/0"), table: 254, via: Some(gateway), index: 3 }),
                NetOp::Neighbour { index: 3, address: gateway, mac: Mac([2, 0, 0, 0, 0, 1]) },
            ]
        );
    }

    #[test]
    fn an_address_of_the_other_family_has_its_ranges_length() {
        let carried = |plan: PodPlan| match &plan.pod_ops(3)[0] {
            NetOp::AddAddress { address, .. } => address.to_string(),
            other => panic!("{other:?}"),
        };
        let v4 = PodPlan { pod_if: "v4if0".into(), ipv4: Some(Ipv4Addr::new(169, 254, 172, 9)), ..plan() };
        let v6 = PodPlan { pod_if: "v6if0".into(), ipv4: None, ipv6: Some("fd00::ac:9".parse().unwrap()), ..plan() };
        assert_eq!([carried(v4), carried(v6), carried(plan())], ["169.254.172.9/22", "fd00::ac:9/118", "10.0.1.9/32"]);
    }

    #[test]
    fn later_attachments_route_from_their_own_table() {
        let second = PodPlan { attachment: 1, ..plan() };
        let ops = second.pod_ops(4);
        assert!(ops.contains(&NetOp::AddRule(Rule::from_host(1, "10.0.1.9".parse().unwrap(), 1))));
        assert!(ops.iter().all(|op| !matches!(op, NetOp::ReplaceRoute(route) if route.table == MAIN_TABLE)));
        assert_eq!(second.gateway_v4(), Ipv4Addr::new(169, 254, 1, 2));
    }

    #[test]
    fn the_host_route_is_written_before_the_rules() {
        let ops = plan().host_ops(7);
        assert!(matches!(ops[0], NetOp::ReplaceRoute(_)));
        assert_eq!(ops.len(), 3, "route, rule 512, rule 1536");
        assert_eq!(PodPlan { table: MAIN_TABLE, ..plan() }.host_ops(7).len(), 2, "an address of the primary ENI needs no from rule");
        assert_eq!(plan().undo_host_ops().len(), 2);
        let six = PodPlan { ipv4: None, ipv6: Some("2001:db8::9".parse().unwrap()), ..plan() };
        assert!(
            matches!(six.host_ops(7)[1], NetOp::Neighbour { index: 7, mac: Mac([2, 0, 0, 0, 0, 2]), .. }),
            "nobody waits for neighbour discovery"
        );
    }

    #[test]
    fn a_pod_with_security_groups_leaves_by_its_branch() {
        let link = BranchLink {
            vlan_id: 7,
            mac: Mac([2, 0, 0, 0, 0, 7]),
            trunk: Mac([2, 0, 0, 0, 0, 8]),
            gateway: Some("10.0.1.1".parse().unwrap()),
            strict: true,
        };
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let route = |dst: &str, table, via: Option<&str>, index| {
            NetOp::ReplaceRoute(Route { dst: net(dst), table, via: via.map(|via| via.parse().unwrap()), index })
        };
        let iif = |name: &str| NetOp::AddRule(Rule { iif: Some(name.into()), ..Rule::new(false, 10, 107) });
        let strict = PodPlan { host_if: "vlancc21c2d7785".into(), table: 107, branch: Some(link.clone()), ..plan() };
        assert_eq!(strict.branch_ops(5), [route("10.0.1.1/32", 107, None, 5), route("0.0.0.0/0", 107, Some("10.0.1.1"), 5)]);
        assert_eq!(strict.host_ops(7), [route("10.0.1.9/32", 107, None, 7), iif("vlan.eth.7"), iif("vlancc21c2d7785")]);
        let standard = PodPlan { table: 107, branch: Some(BranchLink { strict: false, ..link }), ..plan() };
        assert_eq!(standard.branch_ops(5), strict.branch_ops(5));
        let as_any = PodPlan { branch: None, ..standard.clone() };
        assert_eq!(standard.host_ops(7), as_any.host_ops(7), "512 to main and 1536 to the branch's table");
    }
}
