//! EC2's mutations of the model, with EC2's own error codes and texts.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{AddressRequest, Attachment, CreateEni, Eni, EniKind};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId};
use stanchion_core::limits::InstanceLimits;

use super::cloud::cidrs_of;
use super::ec2::Ec2Reply;
use super::faults::ApiError;
use super::model::{EniEvent, Settle, State};
use super::subnet::NoRoom;

/// A client token's longest text (EC2: "up to 64 ASCII characters").
const CLIENT_TOKEN_MAX: usize = 64;
/// Tags a resource (EC2 user guide, tag restrictions).
const TAGS_MAX: usize = 50;

impl State {
    // === ENIs ===

    pub(super) fn create(&mut self, request: &CreateEni) -> Result<Ec2Reply, ApiError> {
        let token = request.client_token.clone();
        if token.len() > CLIENT_TOKEN_MAX || !token.is_ascii() {
            return Err(invalid(format!("Value ({token}) for parameter clientToken is invalid.")));
        }
        let asked = format!("{request:?}");
        if let Some((before, eni)) = self.tokens.get(&token).filter(|_| !token.is_empty()) {
            if *before != asked {
                let message = "The idempotent token has been used with different parameters";
                return Err(ApiError::bad("IdempotentParameterMismatch", message));
            }
            return Ok(Ec2Reply::Created { eni: Box::new(eni.clone()), client_token: token });
        }
        self.check_groups(&request.security_groups)?;
        check_tags(&request.tags)?;
        let vpc = self.config.vpc.clone();
        let subnet = self
            .subnets
            .get_mut(&request.subnet)
            .ok_or_else(|| not_found("InvalidSubnetID.NotFound", "subnet ID", request.subnet.as_str()))?;
        let primary = subnet.take_addresses(1).map_err(no_room)?[0];
        let mut taken = (Vec::new(), Vec::new(), Vec::new());
        let more = match request.addresses {
            None => Ok(()),
            Some(AddressRequest::Ipv4(n)) => subnet.take_addresses(n).map(|a| taken.0 = a).map_err(no_room),
            Some(AddressRequest::Ipv4Prefixes(n)) => subnet.take_prefixes(n).map(|p| taken.1 = p).map_err(no_room_for_prefix),
            Some(AddressRequest::Ipv6Prefixes(n)) => {
                let prefixes: Result<Vec<_>, _> = (0..n).map(|_| subnet.take_ipv6()).collect();
                prefixes.map(|p| taken.2 = p.into_iter().map(ipv6_prefix).collect()).map_err(no_room_for_ipv6)
            }
        };
        if let Err(error) = more {
            subnet.give_back(primary.into());
            return Err(error);
        }
        let eni = Eni {
            id: EniId::new(format!("eni-{}", self.fresh_hex())),
            mac: self.fresh_mac(),
            kind: EniKind::Interface,
            subnet: request.subnet.clone(),
            vpc,
            status: "available".to_owned(),
            description: request.description.clone(),
            primary_ipv4: Some(primary),
            secondary_ipv4: taken.0,
            prefixes_v4: taken.1,
            ipv6: Vec::new(),
            prefixes_v6: taken.2,
            security_groups: request.security_groups.clone(),
            attachment: None,
            connection_tracking: request.connection_tracking,
            tags: request.tags.clone(),
        };
        self.store(eni.clone());
        if !token.is_empty() {
            self.tokens.insert(token.clone(), (asked, Eni { status: "pending".to_owned(), ..eni.clone() }));
        }
        Ok(Ec2Reply::Created { eni: Box::new(Eni { status: "pending".to_owned(), ..eni }), client_token: token })
    }

    pub(super) fn attach(&mut self, id: &EniId, instance: &InstanceId, device_index: u16, network_card: u16) -> Result<Ec2Reply, ApiError> {
        let eni = self.eni(id)?.clone();
        let host = self.instances.get(instance).ok_or_else(|| not_found("InvalidInstanceID.NotFound", "instance ID", instance.as_str()))?;
        if eni.status != "available" {
            return Err(in_use(id));
        }
        let limits = host.limits.clone();
        let zone = self.subnets.get(&eni.subnet).map(|s| s.describe().availability_zone);
        if zone.as_ref() != Some(&host.availability_zone) {
            let message = format!(
                "You may not attach a network interface to an instance if they are not in the same availability zone ({instance}, {id})"
            );
            return Err(invalid(message));
        }
        let present: Vec<_> = self.live_enis().filter_map(|e| e.attachment.as_ref()).filter(|a| a.instance == *instance).collect();
        if present.iter().any(|a| a.device_index == device_index && a.network_card == network_card) {
            return Err(invalid(format!("Instance '{instance}' already has an interface attached at device index '{device_index}'.")));
        }
        let Some((_, most)) = card_limits(&limits).into_iter().find(|(card, _)| *card == network_card) else {
            return Err(invalid(format!("Network card index {network_card} exceeds the limit for {}", limits.instance_type)));
        };
        let on_card = present.iter().filter(|a| a.network_card == network_card).count();
        if on_card >= usize::from(most) {
            let message = format!("Interface count {} exceeds the limit for {}", on_card + 1, limits.instance_type);
            return Err(ApiError::bad("AttachmentLimitExceeded", message));
        }
        check_slots(&eni, &limits)?;
        let has_prefixes = !eni.prefixes_v4.is_empty() || !eni.prefixes_v6.is_empty();
        if has_prefixes && !limits.supports_prefixes() {
            return Err(unsupported_prefixes(&limits));
        }
        let attachment = AttachmentId::new(format!("eni-attach-{}", self.fresh_hex()));
        let eni = Eni {
            status: "in-use".to_owned(),
            attachment: Some(Attachment {
                id: attachment.clone(),
                instance: instance.clone(),
                device_index,
                network_card,
                delete_on_termination: false,
            }),
            ..eni
        };
        let (after, incomplete) = (self.config.timing.attach, self.config.timing.imds_incomplete);
        let at = self.now() + after;
        self.store(eni.clone());
        if let Some(record) = self.enis.get_mut(id) {
            record.attaching(at, incomplete);
        }
        if let Some(subnet) = self.subnets.get(&eni.subnet).map(super::subnet::SubnetState::describe) {
            self.emit(&EniEvent::Attached { instance: instance.clone(), eni, subnet, after });
        }
        Ok(Ec2Reply::Attached { attachment, network_card })
    }

    pub(super) fn set_delete_on_termination(&mut self, id: &EniId, attachment: &AttachmentId, value: bool) -> Result<Ec2Reply, ApiError> {
        let mut eni = self.eni(id)?.clone();
        match &mut eni.attachment {
            Some(present) if present.id == *attachment => present.delete_on_termination = value,
            _ => return Err(not_found("InvalidAttachmentID.NotFound", "attachment ID", attachment.as_str())),
        }
        self.store(eni);
        Ok(Ec2Reply::Done)
    }

    pub(super) fn set_groups(&mut self, id: &EniId, groups: &[SecurityGroupId]) -> Result<Ec2Reply, ApiError> {
        let eni = self.eni(id)?.clone();
        self.check_groups(groups)?;
        self.store(Eni { security_groups: groups.to_vec(), ..eni });
        Ok(Ec2Reply::Done)
    }

    pub(super) fn detach(&mut self, attachment: &AttachmentId) -> Result<Ec2Reply, ApiError> {
        let eni = self
            .by_attachment(attachment)
            .ok_or_else(|| not_found("InvalidAttachmentID.NotFound", "attachment ID", attachment.as_str()))?
            .clone();
        let Some(present) = &eni.attachment else { return Ok(Ec2Reply::Done) };
        if self.instances.get(&present.instance).is_some_and(|instance| instance.primary == eni.id) {
            let message = "The network interface at device index 0 and networkCard index 0 cannot be detached.";
            return Err(ApiError::bad("OperationNotPermitted", message));
        }
        let running = self.enis.get(&eni.id).and_then(|r| r.settles);
        if matches!(running, Some((_, Settle::Available))) {
            return Ok(Ec2Reply::Done);
        }
        let after = self.config.timing.detach;
        self.emit(&EniEvent::Detached { instance: present.instance.clone(), eni: eni.clone(), after });
        if after == Duration::ZERO {
            self.store(Eni { status: "available".to_owned(), attachment: None, ..eni });
        } else {
            let at = self.now() + after;
            self.store(Eni { status: "detaching".to_owned(), ..eni.clone() });
            if let Some(record) = self.enis.get_mut(&eni.id) {
                record.settles = Some((at, Settle::Available));
            }
        }
        Ok(Ec2Reply::Done)
    }

    pub(super) fn delete(&mut self, id: &EniId) -> Result<Ec2Reply, ApiError> {
        if self.eni(id)?.attachment.is_some() {
            return Err(in_use(id));
        }
        self.remove(id);
        Ok(Ec2Reply::Done)
    }

    // === addresses ===

    pub(super) fn assign(&mut self, id: &EniId, request: AddressRequest) -> Result<Ec2Reply, ApiError> {
        let before = self.eni(id)?.clone();
        let (count, prefix) = match request {
            AddressRequest::Ipv4(n) => (n, false),
            AddressRequest::Ipv4Prefixes(n) => (n, true),
            AddressRequest::Ipv6Prefixes(_) => return Err(invalid("AssignPrivateIpAddresses takes no IPv6 prefixes".to_owned())),
        };
        if count == 0 {
            return Err(invalid("Value (0) for parameter secondaryPrivateIpAddressCount is invalid.".to_owned()));
        }
        self.check_room(&before, u32::from(count), prefix)?;
        let subnet = self
            .subnets
            .get_mut(&before.subnet)
            .ok_or_else(|| not_found("InvalidSubnetID.NotFound", "subnet ID", before.subnet.as_str()))?;
        let mut eni = before.clone();
        let cidrs = if prefix {
            let prefixes = subnet.take_prefixes(count).map_err(no_room_for_prefix)?;
            eni.prefixes_v4.extend(&prefixes);
            prefixes.into_iter().map(IpNet::V4).collect()
        } else {
            let addresses = subnet.take_addresses(count).map_err(no_room)?;
            eni.secondary_ipv4.extend(&addresses);
            addresses.into_iter().map(|a| IpNet::V4(a.into())).collect()
        };
        self.change(before, eni);
        Ok(Ec2Reply::Assigned { eni: id.clone(), cidrs })
    }

    pub(super) fn unassign(&mut self, id: &EniId, addresses: &[Ipv4Addr], prefixes: &[Ipv4Net]) -> Result<Ec2Reply, ApiError> {
        let before = self.eni(id)?.clone();
        let mut eni = before.clone();
        if addresses.is_empty() && prefixes.is_empty() {
            return Err(ApiError::bad("MissingParameter", "Either 'privateIpAddresses' or 'ipv4Prefixes' should be provided."));
        }
        if addresses.iter().any(|a| eni.primary_ipv4 == Some(*a)) {
            return Err(invalid("The primary private IP address of a network interface cannot be unassigned".to_owned()));
        }
        if addresses.iter().any(|a| !eni.secondary_ipv4.contains(a)) || prefixes.iter().any(|p| !eni.prefixes_v4.contains(p)) {
            return Err(invalid(format!("Some of the specified addresses are not assigned to interface {id}")));
        }
        eni.secondary_ipv4.retain(|a| !addresses.contains(a));
        eni.prefixes_v4.retain(|p| !prefixes.contains(p));
        if let Some(subnet) = self.subnets.get_mut(&eni.subnet) {
            addresses.iter().for_each(|a| subnet.give_back((*a).into()));
            prefixes.iter().for_each(|p| subnet.give_back(*p));
        }
        self.change(before, eni);
        Ok(Ec2Reply::Unassigned { eni: id.clone() })
    }

    pub(super) fn assign_ipv6(&mut self, id: &EniId, addresses: u16, prefixes: u16) -> Result<Ec2Reply, ApiError> {
        let before = self.eni(id)?.clone();
        self.check_room(&before, 0, prefixes > 0)?;
        if let Some(limits) = self.limits_of(&before) {
            let held = before.ipv6.len() + before.prefixes_v6.len() + usize::from(addresses) + usize::from(prefixes);
            if held > usize::from(limits.ipv4_per_eni) {
                return Err(ApiError::bad("Ipv6AddressLimitExceeded", "Number of IPv6 addresses will exceed limit."));
            }
        }
        let mut eni = before.clone();
        let subnet = self
            .subnets
            .get_mut(&before.subnet)
            .ok_or_else(|| not_found("InvalidSubnetID.NotFound", "subnet ID", before.subnet.as_str()))?;
        let mut cidrs: Vec<IpNet> = Vec::new();
        for n in 0..addresses + prefixes {
            let Ok(start) = subnet.take_ipv6() else {
                cidrs.iter().for_each(|cidr| match cidr {
                    IpNet::V6(net) => subnet.give_back_ipv6(net.network()),
                    IpNet::V4(_) => {}
                });
                return Err(no_room_for_ipv6(NoRoom::Addresses));
            };
            if n < addresses {
                eni.ipv6.push(start);
                cidrs.push(IpNet::V6(start.into()));
            } else {
                eni.prefixes_v6.push(ipv6_prefix(start));
                cidrs.push(IpNet::V6(ipv6_prefix(start)));
            }
        }
        self.change(before, eni);
        Ok(Ec2Reply::Assigned { eni: id.clone(), cidrs })
    }

    pub(super) fn unassign_ipv6(&mut self, id: &EniId, addresses: &[Ipv6Addr], prefixes: &[Ipv6Net]) -> Result<Ec2Reply, ApiError> {
        let before = self.eni(id)?.clone();
        let mut eni = before.clone();
        if addresses.iter().any(|a| !eni.ipv6.contains(a)) || prefixes.iter().any(|p| !eni.prefixes_v6.contains(p)) {
            return Err(invalid(format!("Some of the specified addresses are not assigned to interface {id}")));
        }
        eni.ipv6.retain(|a| !addresses.contains(a));
        eni.prefixes_v6.retain(|p| !prefixes.contains(p));
        if let Some(subnet) = self.subnets.get_mut(&eni.subnet) {
            addresses.iter().for_each(|a| subnet.give_back_ipv6(*a));
            prefixes.iter().for_each(|p| subnet.give_back_ipv6(p.network()));
        }
        self.change(before, eni);
        Ok(Ec2Reply::Unassigned { eni: id.clone() })
    }

    pub(super) fn create_tags(&mut self, resources: &[String], tags: &BTreeMap<String, String>) -> Result<Ec2Reply, ApiError> {
        check_tags(tags)?;
        for resource in resources {
            let eni = self.eni(&EniId::new(resource))?.clone();
            let mut merged = eni.tags.clone();
            merged.extend(tags.clone());
            if merged.len() > TAGS_MAX {
                return Err(ApiError::bad("TagLimitExceeded", "The maximum number of Tags for a resource has been reached."));
            }
            self.store(Eni { tags: merged, ..eni });
        }
        Ok(Ec2Reply::Done)
    }

    fn change(&mut self, before: Eni, eni: Eni) {
        self.store(eni.clone());
        if cidrs_of(&eni).ne(cidrs_of(&before)) {
            self.emit(&EniEvent::AddressesChanged { eni, before });
        }
    }

    // === checks ===

    fn limits_of(&self, eni: &Eni) -> Option<&InstanceLimits> {
        self.instances.get(&eni.attachment.as_ref()?.instance).map(|instance| &instance.limits)
    }

    fn check_room(&self, eni: &Eni, more: u32, prefix: bool) -> Result<(), ApiError> {
        let Some(limits) = self.limits_of(eni) else { return Ok(()) };
        if prefix && !limits.supports_prefixes() {
            return Err(unsupported_prefixes(limits));
        }
        if slots(eni) as u32 + more > u32::from(limits.ipv4_per_eni) {
            return Err(ApiError::bad("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit."));
        }
        Ok(())
    }

    fn check_groups(&self, groups: &[SecurityGroupId]) -> Result<(), ApiError> {
        match groups.iter().find(|group| !self.config.security_groups.contains(group)) {
            Some(unknown) => Err(ApiError::bad("InvalidGroup.NotFound", format!("The security group '{unknown}' does not exist"))),
            None => Ok(()),
        }
    }
}

/// Slots taken: the ENI's own address, single ones, and one for each prefix.
fn slots(eni: &Eni) -> usize {
    usize::from(eni.primary_ipv4.is_some()) + eni.secondary_ipv4.len() + eni.prefixes_v4.len()
}

fn check_slots(eni: &Eni, limits: &InstanceLimits) -> Result<(), ApiError> {
    if slots(eni) > usize::from(limits.ipv4_per_eni) {
        return Err(ApiError::bad("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit."));
    }
    Ok(())
}

fn card_limits(limits: &InstanceLimits) -> Vec<(u16, u16)> {
    if limits.network_cards.is_empty() { vec![(0, limits.max_enis)] } else { limits.network_cards.clone() }
}

fn check_tags(tags: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (key, value) in tags {
        if key.is_empty() || key.chars().count() > 128 || value.chars().count() > 256 || key.starts_with("aws:") {
            return Err(invalid(format!("Tag key or value is invalid: {key}={value}")));
        }
    }
    if tags.len() > TAGS_MAX {
        return Err(ApiError::bad("TagLimitExceeded", "The maximum number of Tags for a resource has been reached."));
    }
    Ok(())
}

fn ipv6_prefix(start: Ipv6Addr) -> Ipv6Net {
    Ipv6Net::new(start, 80).expect("80 is a prefix length")
}

pub(super) fn invalid(message: String) -> ApiError {
    ApiError::bad("InvalidParameterValue", message)
}

pub(super) fn not_found(code: &str, what: &str, id: &str) -> ApiError {
    ApiError::bad(code, format!("The {what} '{id}' does not exist"))
}

fn in_use(id: &EniId) -> ApiError {
    invalid(format!("Network interface '{id}' is currently in use."))
}

fn unsupported_prefixes(limits: &InstanceLimits) -> ApiError {
    invalid(format!("Instance type {} does not support prefix delegation", limits.instance_type))
}

fn no_room(_: NoRoom) -> ApiError {
    let message = "The specified subnet does not have enough free addresses to satisfy the request.";
    ApiError::bad("InsufficientFreeAddressesInSubnet", message)
}

/// A subnet without addresses and one without whole blocks differ: the first gives `InvalidParameterValue`.
fn no_room_for_prefix(why: NoRoom) -> ApiError {
    match why {
        NoRoom::Addresses => invalid("There aren't sufficient free Ipv4 addresses or prefixes".to_owned()),
        NoRoom::Fragmented => {
            ApiError::bad("InsufficientCidrBlocks", "The specified subnet does not have enough free cidr blocks to satisfy the request.")
        }
    }
}

fn no_room_for_ipv6(_: NoRoom) -> ApiError {
    ApiError::bad("InvalidParameterValue", "The subnet does not have enough free IPv6 addresses or prefixes")
}
