//! EC2's types to the product's, refusing what cannot be right.

use std::collections::BTreeMap;
use std::str::FromStr;

use aws_sdk_ec2::types::{
    ConnectionTrackingConfiguration, ConnectionTrackingSpecificationRequest, Filter, InstanceTypeHypervisor, InstanceTypeInfo,
    NetworkInterface, NetworkInterfaceAttachment, NetworkInterfaceType, Tag,
};
use stanchion_core::cloud::{Attachment, ConnectionTracking, Eni, EniKind, Subnet};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId, VpcId};
use stanchion_core::limits::InstanceLimits;

/// A reply that lacks a field or holds a text that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadReply {
    /// A field that EC2 always sends.
    #[error("EC2's reply has no {0}")]
    Missing(&'static str),
    /// A text that cannot be read.
    #[error("EC2's reply has {field} {text:?}: {why}")]
    Unreadable { field: &'static str, text: String, why: String },
}

pub(crate) fn eni(wire: &NetworkInterface) -> Result<Eni, BadReply> {
    let primary_ipv4 = wire
        .private_ip_addresses()
        .iter()
        .find(|address| address.primary() == Some(true))
        .and_then(|address| address.private_ip_address())
        .or(wire.private_ip_address())
        .map(|text| parse("privateIpAddress", text))
        .transpose()?;
    let secondary = wire.private_ip_addresses().iter().filter(|address| address.primary() != Some(true));
    Ok(Eni {
        id: EniId::new(need("networkInterfaceId", wire.network_interface_id())?),
        mac: parse("macAddress", need("macAddress", wire.mac_address())?)?,
        kind: wire.interface_type().map_or(EniKind::Interface, kind),
        subnet: SubnetId::new(need("subnetId", wire.subnet_id())?),
        vpc: VpcId::new(need("vpcId", wire.vpc_id())?),
        status: wire.status().map_or("", |status| status.as_str()).to_owned(),
        description: wire.description().unwrap_or_default().to_owned(),
        primary_ipv4,
        secondary_ipv4: secondary
            .filter_map(|address| address.private_ip_address())
            .map(|text| parse("privateIpAddress", text))
            .collect::<Result<_, _>>()?,
        prefixes_v4: wire
            .ipv4_prefixes()
            .iter()
            .filter_map(|prefix| prefix.ipv4_prefix())
            .map(|text| parse("ipv4Prefix", text))
            .collect::<Result<_, _>>()?,
        ipv6: wire
            .ipv6_addresses()
            .iter()
            .filter_map(|address| address.ipv6_address())
            .map(|text| parse("ipv6Address", text))
            .collect::<Result<_, _>>()?,
        prefixes_v6: wire
            .ipv6_prefixes()
            .iter()
            .filter_map(|prefix| prefix.ipv6_prefix())
            .map(|text| parse("ipv6Prefix", text))
            .collect::<Result<_, _>>()?,
        security_groups: wire.groups().iter().filter_map(|group| group.group_id()).map(SecurityGroupId::from).collect(),
        attachment: wire.attachment().map(attachment).transpose()?.flatten(),
        connection_tracking: wire
            .connection_tracking_configuration()
            .map(connection_tracking)
            .filter(|own| *own != ConnectionTracking::default()),
        tags: tags(wire.tag_set()),
    })
}

fn connection_tracking(wire: &ConnectionTrackingConfiguration) -> ConnectionTracking {
    ConnectionTracking { tcp_established: wire.tcp_established_timeout(), udp_stream: wire.udp_stream_timeout(), udp: wire.udp_timeout() }
}

pub(crate) fn to_connection_tracking(own: ConnectionTracking) -> ConnectionTrackingSpecificationRequest {
    ConnectionTrackingSpecificationRequest::builder()
        .set_tcp_established_timeout(own.tcp_established)
        .set_udp_stream_timeout(own.udp_stream)
        .set_udp_timeout(own.udp)
        .build()
}

/// `None` for an attachment that is no instance's (Lambda, load balancers).
fn attachment(wire: &NetworkInterfaceAttachment) -> Result<Option<Attachment>, BadReply> {
    let (Some(id), Some(instance)) = (wire.attachment_id(), wire.instance_id()) else { return Ok(None) };
    Ok(Some(Attachment {
        id: AttachmentId::from(id),
        instance: InstanceId::from(instance),
        device_index: number("deviceIndex", wire.device_index().ok_or(BadReply::Missing("deviceIndex"))?)?,
        network_card: number("networkCardIndex", wire.network_card_index().unwrap_or(0))?,
        delete_on_termination: wire.delete_on_termination().unwrap_or(false),
    }))
}

fn kind(wire: &NetworkInterfaceType) -> EniKind {
    match wire.as_str() {
        "interface" => EniKind::Interface,
        "trunk" => EniKind::Trunk,
        "branch" => EniKind::Branch,
        "efa" => EniKind::Efa,
        "efa-only" => EniKind::EfaOnly,
        _ => EniKind::Other,
    }
}

/// `None` for a subnet without an IPv4 range: neither an IPv4 nor an IPv6 cluster has nodes or ENIs there ("VPC and subnet requirements"
/// in the EKS user guide).
pub(crate) fn subnet(wire: &aws_sdk_ec2::types::Subnet) -> Result<Option<Subnet>, BadReply> {
    let Some(cidr) = wire.cidr_block().filter(|text| !text.is_empty()) else { return Ok(None) };
    Ok(Some(Subnet {
        id: SubnetId::new(need("subnetId", wire.subnet_id())?),
        vpc: VpcId::new(need("vpcId", wire.vpc_id())?),
        availability_zone: need("availabilityZone", wire.availability_zone())?.to_owned(),
        cidr: parse("cidrBlock", cidr)?,
        ipv6_cidrs: wire
            .ipv6_cidr_block_association_set()
            .iter()
            .filter_map(|association| association.ipv6_cidr_block())
            .map(|text| parse("ipv6CidrBlock", text))
            .collect::<Result<_, _>>()?,
        available_addresses: number("availableIpAddressCount", wire.available_ip_address_count().unwrap_or(0))?,
        tags: tags(wire.tags()),
    }))
}

pub(crate) fn limits(wire: &InstanceTypeInfo) -> Result<InstanceLimits, BadReply> {
    let network = wire.network_info().ok_or(BadReply::Missing("networkInfo"))?;
    let default_network_card = number("defaultNetworkCardIndex", network.default_network_card_index().unwrap_or(0))?;
    let network_cards = network
        .network_cards()
        .iter()
        .map(|card| {
            Ok((
                number("networkCardIndex", card.network_card_index().unwrap_or(0))?,
                number("maximumNetworkInterfaces", card.maximum_network_interfaces().unwrap_or(0))?,
            ))
        })
        .collect::<Result<Vec<(u16, u16)>, BadReply>>()?;
    let on_default = network_cards.iter().find(|(index, _)| *index == default_network_card).map(|(_, most)| *most);
    let all = network.maximum_network_interfaces().ok_or(BadReply::Missing("maximumNetworkInterfaces"))?;
    let addresses = network.ipv4_addresses_per_interface().ok_or(BadReply::Missing("ipv4AddressesPerInterface"))?;
    Ok(InstanceLimits {
        instance_type: wire.instance_type().map_or("", |name| name.as_str()).to_owned(),
        max_enis: on_default.map_or_else(|| number("maximumNetworkInterfaces", all), Ok)?,
        ipv4_per_eni: number("ipv4AddressesPerInterface", addresses)?,
        hypervisor: wire.hypervisor().map_or("", InstanceTypeHypervisor::as_str).to_owned(),
        bare_metal: wire.bare_metal().unwrap_or(false),
        default_network_card,
        network_cards,
    })
}

pub(crate) fn tags(wire: &[Tag]) -> BTreeMap<String, String> {
    wire.iter().filter_map(|tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or_default().to_owned()))).collect()
}

pub(crate) fn to_tags(tags: &BTreeMap<String, String>) -> Vec<Tag> {
    tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect()
}

pub(crate) fn filter(name: impl Into<String>, values: impl IntoIterator<Item = impl Into<String>>) -> Filter {
    Filter::builder().name(name).set_values(Some(values.into_iter().map(Into::into).collect())).build()
}

pub(crate) fn need<'a>(field: &'static str, text: Option<&'a str>) -> Result<&'a str, BadReply> {
    text.filter(|text| !text.is_empty()).ok_or(BadReply::Missing(field))
}

pub(crate) fn parse<T: FromStr<Err: std::fmt::Display>>(field: &'static str, text: &str) -> Result<T, BadReply> {
    text.parse().map_err(|error: T::Err| BadReply::Unreadable { field, text: text.to_owned(), why: error.to_string() })
}

fn number<T: TryFrom<i32, Error: std::fmt::Display>>(field: &'static str, value: i32) -> Result<T, BadReply> {
    value.try_into().map_err(|error: T::Error| BadReply::Unreadable { field, text: value.to_string(), why: error.to_string() })
}
