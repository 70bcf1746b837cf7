//! EC2's replies as XML.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ipnet::IpNet;
use stanchion_core::cloud::{Eni, EniKind, Subnet};
use stanchion_core::limits::InstanceLimits;

use super::ec2::Ec2Reply;
use super::faults::ApiError;
use super::model::InstanceView;

const NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";
const OWNER: &str = "123456789012";

/// Elements, escaped, in order.
#[derive(Default)]
struct Xml(String);

impl Xml {
    fn text(&mut self, name: &str, value: impl std::fmt::Display) -> &mut Self {
        let value = value.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _a_string_takes_every_write = write!(self.0, "<{name}>{value}</{name}>");
        self
    }

    fn group(&mut self, name: &str, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let _a_string_takes_every_write = write!(self.0, "<{name}>");
        fill(self);
        let _a_string_takes_every_write = write!(self.0, "</{name}>");
        self
    }

    fn items<T>(&mut self, name: &str, items: impl IntoIterator<Item = T>, mut fill: impl FnMut(&mut Self, T)) -> &mut Self {
        self.group(name, |xml| {
            for item in items {
                xml.group("item", |xml| fill(xml, item));
            }
        })
    }
}

/// Writes a reply of the action.
pub(super) fn render(action: &str, reply: &Ec2Reply) -> String {
    let mut xml = Xml::default();
    match reply {
        Ec2Reply::Enis { items, next_token } => {
            xml.items("networkInterfaceSet", items, |xml, (item, status)| eni(xml, item, status));
            token(&mut xml, next_token.as_deref());
        }
        Ec2Reply::Subnets { items, next_token } => {
            xml.items("subnetSet", items, subnet);
            token(&mut xml, next_token.as_deref());
        }
        Ec2Reply::Groups { items, next_token } => {
            xml.items("securityGroupInfo", items, |xml, group| {
                xml.text("ownerId", OWNER).text("groupId", group).text("groupName", "of-pods").text("groupDescription", "");
            });
            token(&mut xml, next_token.as_deref());
        }
        Ec2Reply::Instances { items, next_token } => {
            xml.items("reservationSet", items, |xml, (instance, enis)| {
                xml.text("reservationId", "r-0123456789abcdef0").text("ownerId", OWNER);
                xml.items("instancesSet", [instance], |xml, instance| self::instance(xml, instance, enis));
            });
            token(&mut xml, next_token.as_deref());
        }
        Ec2Reply::Types { items, next_token } => {
            xml.items("instanceTypeSet", items, limits);
            token(&mut xml, next_token.as_deref());
        }
        Ec2Reply::Created { eni: made, client_token } => {
            xml.group("networkInterface", |xml| eni(xml, made, "attached")).text("clientToken", client_token);
        }
        Ec2Reply::Attached { attachment, network_card } => {
            xml.text("attachmentId", attachment).text("networkCardIndex", network_card);
        }
        Ec2Reply::Assigned { eni, cidrs } => {
            xml.text("networkInterfaceId", eni);
            let (v4, v6): (Vec<&IpNet>, Vec<&IpNet>) = cidrs.iter().partition(|cidr| cidr.addr().is_ipv4());
            if action == "AssignIpv6Addresses" {
                let (addresses, prefixes): (Vec<&IpNet>, Vec<&IpNet>) = v6.into_iter().partition(|cidr| cidr.prefix_len() == 128);
                xml.group("assignedIpv6Addresses", |xml| {
                    for address in &addresses {
                        xml.text("item", address.addr());
                    }
                });
                xml.group("assignedIpv6PrefixSet", |xml| {
                    for prefix in &prefixes {
                        xml.text("item", prefix);
                    }
                });
            } else {
                let (addresses, prefixes): (Vec<&IpNet>, Vec<&IpNet>) = v4.into_iter().partition(|cidr| cidr.prefix_len() == 32);
                xml.items("assignedPrivateIpAddressesSet", addresses, |xml, a| {
                    xml.text("privateIpAddress", a.addr());
                });
                xml.items("assignedIpv4PrefixSet", prefixes, |xml, p| {
                    xml.text("ipv4Prefix", p);
                });
                xml.text("return", true);
            }
        }
        Ec2Reply::Unassigned { eni } if action == "UnassignIpv6Addresses" => {
            xml.text("networkInterfaceId", eni);
        }
        Ec2Reply::Unassigned { .. } | Ec2Reply::Done => {
            xml.text("return", true);
        }
    }
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{action}Response xmlns=\"{NAMESPACE}\">\
         <requestId>5a3c1d2e-0000-4000-8000-000000000000</requestId>{}</{action}Response>",
        xml.0
    )
}

/// Writes an error.
pub(super) fn render_error(error: &ApiError) -> String {
    let mut xml = Xml::default();
    xml.group("Response", |xml| {
        xml.group("Errors", |xml| {
            xml.group("Error", |xml| {
                xml.text("Code", &error.code).text("Message", &error.message);
            });
        });
        xml.text("RequestID", "5a3c1d2e-0000-4000-8000-000000000000");
    });
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", xml.0)
}

fn token(xml: &mut Xml, token: Option<&str>) {
    if let Some(token) = token {
        xml.text("nextToken", token);
    }
}

fn eni(xml: &mut Xml, eni: &Eni, attachment_status: &str) {
    xml.text("networkInterfaceId", &eni.id)
        .text("subnetId", &eni.subnet)
        .text("vpcId", &eni.vpc)
        .text("ownerId", OWNER)
        .text("description", &eni.description)
        .text("requesterManaged", false)
        .text("status", if eni.attachment.is_some() { "in-use" } else { &eni.status })
        .text("macAddress", eni.mac)
        .text("sourceDestCheck", true)
        .text("interfaceType", kind(eni.kind));
    if let Some(primary) = eni.primary_ipv4 {
        xml.text("privateIpAddress", primary);
    }
    let addresses = eni.primary_ipv4.iter().chain(&eni.secondary_ipv4);
    xml.items("privateIpAddressesSet", addresses, |xml, address| {
        xml.text("privateIpAddress", address).text("primary", eni.primary_ipv4 == Some(*address));
    });
    if !eni.prefixes_v4.is_empty() {
        xml.items("ipv4PrefixSet", &eni.prefixes_v4, |xml, prefix| {
            xml.text("ipv4Prefix", prefix);
        });
    }
    xml.items("ipv6AddressesSet", &eni.ipv6, |xml, address| {
        xml.text("ipv6Address", address);
    });
    if !eni.prefixes_v6.is_empty() {
        xml.items("ipv6PrefixSet", &eni.prefixes_v6, |xml, prefix| {
            xml.text("ipv6Prefix", prefix);
        });
    }
    xml.items("groupSet", &eni.security_groups, |xml, group| {
        xml.text("groupId", group).text("groupName", "nodes");
    });
    if let Some(attachment) = &eni.attachment {
        xml.group("attachment", |xml| {
            xml.text("attachmentId", &attachment.id)
                .text("instanceId", &attachment.instance)
                .text("instanceOwnerId", OWNER)
                .text("deviceIndex", attachment.device_index)
                .text("networkCardIndex", attachment.network_card)
                .text("status", attachment_status)
                .text("deleteOnTermination", attachment.delete_on_termination);
        });
    }
    if let Some(own) = &eni.connection_tracking {
        xml.group("connectionTrackingConfiguration", |xml| {
            let fields = [("tcpEstablishedTimeout", own.tcp_established), ("udpStreamTimeout", own.udp_stream), ("udpTimeout", own.udp)];
            for (name, seconds) in fields {
                if let Some(seconds) = seconds {
                    xml.text(name, seconds);
                }
            }
        });
    }
    tags(xml, &eni.tags);
}

fn subnet(xml: &mut Xml, subnet: &Subnet) {
    xml.text("subnetId", &subnet.id)
        .text("state", "available")
        .text("vpcId", &subnet.vpc)
        .text("cidrBlock", subnet.cidr)
        .text("availableIpAddressCount", subnet.available_addresses)
        .text("availabilityZone", &subnet.availability_zone)
        .text("ownerId", OWNER);
    xml.items("ipv6CidrBlockAssociationSet", &subnet.ipv6_cidrs, |xml, cidr| {
        xml.text("ipv6CidrBlock", cidr).group("ipv6CidrBlockState", |xml| {
            xml.text("state", "associated");
        });
    });
    tags(xml, &subnet.tags);
}

fn instance(xml: &mut Xml, instance: &InstanceView, enis: &[Eni]) {
    xml.text("instanceId", &instance.id).text("instanceType", &instance.limits.instance_type).text("subnetId", &instance.subnet).group(
        "placement",
        |xml| {
            xml.text("availabilityZone", &instance.availability_zone);
        },
    );
    xml.items("networkInterfaceSet", enis, |xml, item| eni(xml, item, "attached"));
    tags(xml, &instance.tags);
}

fn limits(xml: &mut Xml, limits: &InstanceLimits) {
    xml.text("instanceType", &limits.instance_type).text("bareMetal", limits.bare_metal);
    if limits.supports_prefixes() && !limits.bare_metal || limits.hypervisor == "xen" {
        xml.text("hypervisor", &limits.hypervisor);
    }
    let cards = if limits.network_cards.is_empty() { vec![(0, limits.max_enis)] } else { limits.network_cards.clone() };
    xml.group("networkInfo", |xml| {
        xml.text("maximumNetworkInterfaces", cards.iter().map(|(_, most)| u32::from(*most)).sum::<u32>())
            .text("maximumNetworkCards", cards.len())
            .text("defaultNetworkCardIndex", limits.default_network_card)
            .text("ipv4AddressesPerInterface", limits.ipv4_per_eni)
            .text("ipv6AddressesPerInterface", limits.ipv4_per_eni)
            .text("ipv6Supported", true);
        xml.items("networkCards", cards, |xml, (index, most)| {
            xml.text("networkCardIndex", index).text("maximumNetworkInterfaces", most);
        });
    });
}

fn tags(xml: &mut Xml, tags: &BTreeMap<String, String>) {
    xml.items("tagSet", tags, |xml, (key, value)| {
        xml.text("key", key).text("value", value);
    });
}

fn kind(kind: EniKind) -> &'static str {
    match kind {
        EniKind::Interface => "interface",
        EniKind::Trunk => "trunk",
        EniKind::Branch => "branch",
        EniKind::Efa => "efa",
        EniKind::EfaOnly => "efa-only",
        EniKind::Other => "vpc_endpoint",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_errors_have_ec2s_shape() {
        let text = render_error(&ApiError::bad("InvalidParameterValue", "a<b & c>d"));
        assert!(text.contains("<Response><Errors><Error><Code>InvalidParameterValue</Code>"), "{text}");
        assert!(text.contains("<Message>a&lt;b &amp; c&gt;d</Message></Error></Errors><RequestID>"), "{text}");
    }
}
