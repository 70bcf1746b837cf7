//! Operations as netlink messages.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::{LinkUnspec, LinkVlan};
use stanchion_core::ids::Mac;
use stanchion_core::network::{NetOp, Route, Rule, VlanLink};

use crate::socket::{Mode, Request};

/// The request for an operation; `None` for those that are not netlink's.
pub(crate) fn request(op: &NetOp) -> Option<Request> {
    let (message, mode, words) = match op {
        NetOp::AddVlan(vlan) => {
            let words = format!("add VLAN {} as {} on link {}", vlan.vlan_id, vlan.name, vlan.parent);
            (RouteNetlinkMessage::NewLink(vlan_message(vlan)), Mode::Create, words)
        }
        NetOp::DeleteLink { index } => {
            (RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(*index).build()), Mode::Change, format!("delete link {index}"))
        }
        NetOp::LinkUp { index } => {
            let link = LinkUnspec::new_with_index(*index).up().build();
            (RouteNetlinkMessage::SetLink(link), Mode::Change, format!("set link {index} up"))
        }
        NetOp::Mtu { index, mtu } => {
            let link = LinkUnspec::new_with_index(*index).mtu(*mtu).build();
            (RouteNetlinkMessage::SetLink(link), Mode::Change, format!("set link {index} mtu {mtu}"))
        }
        NetOp::AddAddress { index, address } => {
            let words = format!("add address {address} to link {index}");
            (RouteNetlinkMessage::NewAddress(address_message(*index, *address)), Mode::Replace, words)
        }
        NetOp::DeleteAddress { index, address } => {
            let words = format!("delete address {address} from link {index}");
            (RouteNetlinkMessage::DelAddress(address_message(*index, *address)), Mode::Change, words)
        }
        NetOp::ReplaceRoute(route) => (RouteNetlinkMessage::NewRoute(route_message(route)), Mode::Replace, route_words("set", route)),
        NetOp::DeleteRoute(route) => {
            let mut message = route_message(route);
            // Whoever put it there, and with whatever scope.
            message.header.protocol = RouteProtocol::Unspec;
            message.header.scope = RouteScope::NoWhere;
            (RouteNetlinkMessage::DelRoute(message), Mode::Change, route_words("delete", route))
        }
        NetOp::AddRule(rule) => (RouteNetlinkMessage::NewRule(rule_message(rule)), Mode::Create, rule_words("add", rule)),
        NetOp::DeleteRule(rule) => (RouteNetlinkMessage::DelRule(rule_message(rule)), Mode::Change, rule_words("delete", rule)),
        NetOp::Neighbour { index, address, mac } => {
            let words = format!("set neighbour {address} on link {index} to {mac}");
            (RouteNetlinkMessage::NewNeighbour(neighbour_message(*index, *address, *mac)), Mode::Replace, words)
        }
        NetOp::Sysctl { .. } | NetOp::Nft { .. } | NetOp::Legacy { .. } => return None,
    };
    Some(Request { message, mode, words })
}

fn vlan_message(vlan: &VlanLink) -> LinkMessage {
    LinkVlan::new(&vlan.name, vlan.parent, vlan.vlan_id).address(vlan.mac.0.to_vec()).up().build()
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    // No connected route: the plans say what is reachable by which link. No duplicate detection: EC2 gives an address once,
    // and waiting for it would cost a pod one to two seconds.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad));
    if address.addr().is_ipv4() {
        message.attributes.push(AddressAttribute::Local(address.addr()));
    }
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = if route.via.is_none() && route.dst.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    if let Ok(table) = u8::try_from(route.table) {
        message.header.table = table;
    } else {
        message.attributes.push(RouteAttribute::Table(route.table));
    }
    if route.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route_address(route.dst.addr())));
    }
    message.attributes.extend(route.via.map(|via| RouteAttribute::Gateway(route_address(via))));
    if route.index != 0 {
        message.attributes.push(RouteAttribute::Oif(route.index));
    }
    message
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    if let Ok(table) = u8::try_from(rule.table) {
        message.header.table = table;
    } else {
        message.attributes.push(RuleAttribute::Table(rule.table));
    }
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        message.attributes.push(RuleAttribute::Source(from.addr()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        message.attributes.push(RuleAttribute::Destination(to.addr()));
    }
    if let Some((mark, mask)) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    message.attributes.extend(rule.iif.clone().map(RuleAttribute::Iifname));
    message.attributes.extend(rule.ip_proto.map(|number| RuleAttribute::IpProtocol(IpProtocol::from(number))));
    message
}

fn neighbour_message(index: u32, address: IpAddr, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let destination = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    message
}

fn route_words(verb: &str, route: &Route) -> String {
    let via = route.via.map(|via| format!(" via {via}")).unwrap_or_default();
    format!("{verb} route {}{via} dev link {} table {}", route.dst, route.index, route.table)
}

fn rule_words(verb: &str, rule: &Rule) -> String {
    let mut words = format!("{verb} rule {}:", rule.priority);
    if let Some(from) = rule.from {
        words.push_str(&format!(" from {from}"));
    }
    if let Some(to) = rule.to {
        words.push_str(&format!(" to {to}"));
    }
    if let Some((mark, mask)) = rule.mark {
        words.push_str(&format!(" fwmark {mark:#x}/{mask:#x}"));
    }
    if let Some(iif) = &rule.iif {
        words.push_str(&format!(" iif {iif}"));
    }
    if let Some(number) = rule.ip_proto {
        words.push_str(&format!(" ipproto {number}"));
    }
    format!("{words} lookup {}", rule.table)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkSerializable as _;

    use super::*;

    /// What `ip link add link 3 name vlan.eth.7 address 02:0a:0b:0c:0d:0e up type vlan id 7` asks of the kernel: the header of
    /// `rtnetlink(7)`, then attributes by `if_link.h` (IFLA_IFNAME 3, IFLA_LINK 5, IFLA_ADDRESS 1, IFLA_LINKINFO 18 with kind and data,
    /// in which IFLA_VLAN_ID 1), each padded to four bytes; a text ends with a NUL.
    #[test]
    fn a_vlan_interface_is_asked_for_byte_by_byte() {
        let vlan = VlanLink { parent: 3, name: "vlan.eth.7".into(), vlan_id: 7, mac: Mac([2, 10, 11, 12, 13, 14]) };
        let Request { message, mode, words } = request(&NetOp::AddVlan(vlan)).unwrap();
        assert_eq!((mode, words.as_str()), (Mode::Create, "add VLAN 7 as vlan.eth.7 on link 3"));
        assert_eq!(message.message_type(), 16, "RTM_NEWLINK");
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let (header, attributes) = bytes.split_at(16);
        // Family, type and index 0: the kernel numbers it. Flags and their mask: IFF_UP.
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        let mut seen = attributes_of(attributes);
        seen.sort();
        let info = [vec![9, 0, 1, 0], b"vlan\0\0\0\0".to_vec(), vec![12, 0, 2, 0, 6, 0, 1, 0, 7, 0, 0, 0]].concat();
        let wanted = [(1, vec![2, 10, 11, 12, 13, 14]), (3, b"vlan.eth.7\0".to_vec()), (5, vec![3, 0, 0, 0]), (18, info)];
        assert_eq!(seen, wanted);
    }

    fn attributes_of(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut attributes = Vec::new();
        while let [l0, l1, k0, k1, ..] = *bytes {
            let length = usize::from(u16::from_ne_bytes([l0, l1]));
            attributes.push((u16::from_ne_bytes([k0, k1]), bytes[4..length].to_vec()));
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        attributes
    }
}
