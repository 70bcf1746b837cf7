//! Dumps of the kernel's tables in the words of the plans.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use stanchion_core::ids::Mac;
use stanchion_core::network::ops::IfAddress;
use stanchion_core::network::{NodeIf, Route, Rule};

use crate::socket::{Netlink, NetlinkError};

/// The kernel's table of its own addresses; nothing of it is ours.
const LOCAL_TABLE: u32 = 255;

impl Netlink {
    /// All interfaces.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn links(&mut self) -> Result<Vec<NodeIf>, NetlinkError> {
        let entries = self.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), "list links")?;
        Ok(entries
            .iter()
            .filter_map(|entry| if let RouteNetlinkMessage::NewLink(link) = entry { Some(node_if(link)) } else { None })
            .collect())
    }

    /// All addresses of both families.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn addresses(&mut self) -> Result<Vec<IfAddress>, NetlinkError> {
        let entries = self.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), "list addresses")?;
        Ok(entries
            .iter()
            .filter_map(|entry| if let RouteNetlinkMessage::NewAddress(address) = entry { if_address(address) } else { None })
            .collect())
    }

    /// All rules of both families that look up a table.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn rules(&mut self) -> Result<Vec<Rule>, NetlinkError> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let entries = match self.dump(&RouteNetlinkMessage::GetRule(message), "list rules") {
                // The kernel was booted without IPv6.
                Err(error) if family == AddressFamily::Inet6 && matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
                    continue;
                }
                entries => entries?,
            };
            rules.extend(
                entries.iter().filter_map(|entry| if let RouteNetlinkMessage::NewRule(message) = entry { rule(message) } else { None }),
            );
        }
        Ok(rules)
    }

    /// The unicast routes of both families in all tables but local.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn routes(&mut self) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let entries = self.dump(&RouteNetlinkMessage::GetRoute(message), "list routes")?;
            routes.extend(
                entries.iter().filter_map(|entry| if let RouteNetlinkMessage::NewRoute(message) = entry { route(message) } else { None }),
            );
        }
        Ok(routes)
    }

    /// Which interface a packet to `address` would leave by; `None` when it is unreachable.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn egress(&mut self, address: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let mut message = RouteMessage::default();
        let (family, destination) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
        };
        message.header.address_family = family;
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(destination));
        match self.get(RouteNetlinkMessage::GetRoute(message), &format!("get route to {address}")) {
            Ok(RouteNetlinkMessage::NewRoute(answer)) => Ok(answer.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })),
            Ok(_) => Ok(None),
            Err(error) if matches!(error.errno(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

pub(crate) fn node_if(message: &LinkMessage) -> NodeIf {
    let mut link = NodeIf {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn if_address(message: &AddressMessage) -> Option<IfAddress> {
    // On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is ours.
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(own) if address.is_none() => address = Some(*own),
            _ => {}
        }
    }
    Some(IfAddress {
        index: message.header.index,
        address: IpNet::new(address?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
    })
}

fn rule(message: &RuleMessage) -> Option<Rule> {
    if message.header.action != RuleAction::ToTable {
        return None;
    }
    let mut rule = Rule::new(message.header.family == AddressFamily::Inet6, 0, u32::from(message.header.table));
    let (mut mark, mut mask) = (None, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(address) => rule.from = IpNet::new(*address, message.header.src_len).ok(),
            RuleAttribute::Destination(address) => rule.to = IpNet::new(*address, message.header.dst_len).ok(),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::IpProtocol(protocol) => rule.ip_proto = Some(u8::from(*protocol)),
            _ => {}
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    Some(rule)
}

fn route(message: &RouteMessage) -> Option<Route> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let zero = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut dst, mut via, mut index, mut table) = (zero, None, 0, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip(address)?,
            RouteAttribute::Gateway(address) => via = ip(address),
            RouteAttribute::Oif(oif) => index = *oif,
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    (table != LOCAL_TABLE).then_some(())?;
    Some(Route { dst: IpNet::new(dst, message.header.destination_prefix_length).ok()?, table, via, index })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
