//! EC2 over the SDK.

use std::collections::BTreeMap;
use std::error::Error;

use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::{Filter, InstanceType, NetworkInterfaceAttachmentChanges, ResourceType, TagSpecification};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Action, Ec2Api, Ec2Error, Eni, Subnet};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, VpcId};
use stanchion_core::limits::InstanceLimits;

use crate::addresses::ByKind;
use crate::classify::ec2_error;
use crate::convert::{self, BadReply, filter, need, parse};
use crate::failure::Failure;
use crate::renew::Renewable;

/// Items a page of a Describe call: its most.
const PAGE: i32 = 1000;
/// Values of a filter, at most (EC2 API reference, "Filters").
const FILTER_VALUES: usize = 200;
/// Tag key of every ENI that the agent, or aws-node before it, has made.
const OWNED_TAG: &str = "node.k8s.amazonaws.com/instance_id";

/// [`Ec2Api`] over the SDK: each method is one request (a list: one a page), sent once.
#[derive(Clone, Debug)]
pub struct SdkEc2 {
    client: Renewable<Client>,
}

impl SdkEc2 {
    pub(crate) fn new(client: Renewable<Client>) -> Self {
        Self { client }
    }

    fn sdk(&self) -> Client {
        self.client.get().1
    }

    /// Credentials that were refused are not used again: the next attempt gets new ones.
    fn failed<E: ProvideErrorMetadata + Error + 'static>(&self, action: Ec2Action, error: SdkError<E, HttpResponse>) -> Ec2Error {
        let failure = Failure::from(error);
        if failure.is_bad_credentials() {
            self.client.refused(self.client.get().0, &failure);
        }
        match failure {
            Failure::Refused { code, message, .. } => ec2_error(action, &code, &message),
            Failure::NoCredentials(message) => Ec2Error::Unauthorized { action, code: "NoCredentials".to_owned(), message },
            Failure::NotSent(message) => Ec2Error::Other { action, code: "NotSent".to_owned(), message },
            Failure::NoReply(message) => Ec2Error::NoReply { action, message },
        }
    }

    async fn describe(&self, filters: Vec<Filter>) -> Result<Vec<Eni>, Ec2Error> {
        let action = Ec2Action::DescribeNetworkInterfaces;
        let request = self.sdk().describe_network_interfaces().max_results(PAGE).set_filters(Some(filters));
        let mut enis = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let reply = request.clone().set_next_token(token.clone()).send().await.map_err(|e| self.failed(action, e))?;
            for eni in reply.network_interfaces() {
                enis.push(convert::eni(eni).map_err(|bad| unreadable(action, &bad))?);
            }
            token = next_page(action, token, reply.next_token)?;
            if token.is_none() {
                return Ok(enis);
            }
        }
    }
}

impl Ec2Api for SdkEc2 {
    async fn describe_enis(&self, ids: &[EniId]) -> Result<Vec<Eni>, Ec2Error> {
        // A filter, where the parameter of that name would fail the call for one unknown id.
        let mut enis = Vec::new();
        for ids in ids.chunks(FILTER_VALUES) {
            enis.extend(self.describe(vec![filter("network-interface-id", ids.iter().map(EniId::as_str))]).await?);
        }
        Ok(enis)
    }

    async fn describe_attached(&self, instance: &InstanceId) -> Result<Vec<Eni>, Ec2Error> {
        self.describe(vec![filter("attachment.instance-id", [instance.as_str()])]).await
    }

    async fn describe_leaked(&self, vpc: &VpcId, tags: &BTreeMap<String, String>) -> Result<Vec<Eni>, Ec2Error> {
        let mut filters = vec![filter("status", ["available"]), filter("vpc-id", [vpc.as_str()]), filter("tag-key", [OWNED_TAG])];
        filters.extend(tags.iter().map(|(key, value)| filter(format!("tag:{key}"), [value])));
        self.describe(filters).await
    }

    async fn describe_subnets(&self, vpc: &VpcId, zone: &str) -> Result<Vec<Subnet>, Ec2Error> {
        let action = Ec2Action::DescribeSubnets;
        let filters = vec![filter("vpc-id", [vpc.as_str()]), filter("availability-zone", [zone])];
        let request = self.sdk().describe_subnets().max_results(PAGE).set_filters(Some(filters));
        let mut subnets = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let reply = request.clone().set_next_token(token.clone()).send().await.map_err(|e| self.failed(action, e))?;
            for subnet in reply.subnets() {
                subnets.extend(convert::subnet(subnet).map_err(|bad| unreadable(action, &bad))?);
            }
            token = next_page(action, token, reply.next_token)?;
            if token.is_none() {
                return Ok(subnets);
            }
        }
    }

    async fn describe_security_groups(&self, vpc: &VpcId, (key, value): (&str, &str)) -> Result<Vec<SecurityGroupId>, Ec2Error> {
        let action = Ec2Action::DescribeSecurityGroups;
        let filters = vec![filter("vpc-id", [vpc.as_str()]), filter(format!("tag:{key}"), [value])];
        let request = self.sdk().describe_security_groups().max_results(PAGE).set_filters(Some(filters));
        let mut groups = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let reply = request.clone().set_next_token(token.clone()).send().await.map_err(|e| self.failed(action, e))?;
            for group in reply.security_groups() {
                groups.push(need("groupId", group.group_id()).map(SecurityGroupId::from).map_err(|bad| unreadable(action, &bad))?);
            }
            token = next_page(action, token, reply.next_token)?;
            if token.is_none() {
                return Ok(groups);
            }
        }
    }

    async fn describe_instance_type(&self, instance_type: &str) -> Result<InstanceLimits, Ec2Error> {
        let action = Ec2Action::DescribeInstanceTypes;
        let request = self.sdk().describe_instance_types().instance_types(InstanceType::from(instance_type));
        let reply = request.send().await.map_err(|e| self.failed(action, e))?;
        let info = reply.instance_types().first().ok_or(BadReply::Missing("instanceTypeSet"));
        info.and_then(convert::limits).map_err(|bad| unreadable(action, &bad))
    }

    async fn create_eni(&self, request: &CreateEni) -> Result<Eni, Ec2Error> {
        let action = Ec2Action::CreateNetworkInterface;
        let mut call = self
            .sdk()
            .create_network_interface()
            .client_token(&request.client_token)
            .subnet_id(request.subnet.as_str())
            .description(&request.description)
            .set_groups(Some(request.security_groups.iter().map(SecurityGroupId::to_string).collect()))
            .set_connection_tracking_specification(request.connection_tracking.map(convert::to_connection_tracking));
        if !request.tags.is_empty() {
            let tags = convert::to_tags(&request.tags);
            let specification = TagSpecification::builder().resource_type(ResourceType::NetworkInterface).set_tags(Some(tags)).build();
            call = call.tag_specifications(specification);
        }
        call = match request.addresses {
            None | Some(AddressRequest::Ipv4(0) | AddressRequest::Ipv4Prefixes(0) | AddressRequest::Ipv6Prefixes(0)) => call,
            Some(AddressRequest::Ipv4(count)) => call.secondary_private_ip_address_count(count.into()),
            Some(AddressRequest::Ipv4Prefixes(count)) => call.ipv4_prefix_count(count.into()),
            Some(AddressRequest::Ipv6Prefixes(count)) => call.ipv6_prefix_count(count.into()),
        };
        let reply = call.send().await.map_err(|e| self.failed(action, e))?;
        let made = reply.network_interface().ok_or(BadReply::Missing("networkInterface"));
        let mut eni = made.and_then(convert::eni).map_err(|bad| unreadable(action, &bad))?;
        if eni.tags.is_empty() {
            // EC2's reply to Create does not always carry the tags that it has set.
            eni.tags = request.tags.clone();
        }
        Ok(eni)
    }

    async fn attach_eni(&self, eni: &EniId, instance: &InstanceId, device_index: u16, network_card: u16) -> Result<AttachmentId, Ec2Error> {
        let action = Ec2Action::AttachNetworkInterface;
        let mut call = self
            .sdk()
            .attach_network_interface()
            .network_interface_id(eni.as_str())
            .instance_id(instance.as_str())
            .device_index(device_index.into());
        // Types with one card refuse the parameter on some regions' older stacks.
        if network_card > 0 {
            call = call.network_card_index(network_card.into());
        }
        let reply = call.send().await.map_err(|e| self.failed(action, e))?;
        let id = need("attachmentId", reply.attachment_id()).map_err(|bad| unreadable(action, &bad))?;
        Ok(AttachmentId::from(id))
    }

    async fn set_delete_on_termination(&self, eni: &EniId, attachment: &AttachmentId) -> Result<(), Ec2Error> {
        let changes = NetworkInterfaceAttachmentChanges::builder().attachment_id(attachment.as_str()).delete_on_termination(true).build();
        let call = self.sdk().modify_network_interface_attribute().network_interface_id(eni.as_str()).attachment(changes);
        call.send().await.map_err(|e| self.failed(Ec2Action::ModifyNetworkInterfaceAttribute, e))?;
        Ok(())
    }

    async fn set_security_groups(&self, eni: &EniId, groups: &[SecurityGroupId]) -> Result<(), Ec2Error> {
        let groups = groups.iter().map(SecurityGroupId::to_string).collect();
        let call = self.sdk().modify_network_interface_attribute().network_interface_id(eni.as_str()).set_groups(Some(groups));
        call.send().await.map_err(|e| self.failed(Ec2Action::ModifyNetworkInterfaceAttribute, e))?;
        Ok(())
    }

    async fn assign(&self, eni: &EniId, request: AddressRequest) -> Result<Vec<IpNet>, Ec2Error> {
        let (addresses, prefixes) = match request {
            AddressRequest::Ipv4(count) => (Some(i32::from(count)), None),
            AddressRequest::Ipv4Prefixes(count) => (None, Some(i32::from(count))),
            AddressRequest::Ipv6Prefixes(count) => return self.assign_ipv6_prefixes(eni, count).await,
        };
        let action = Ec2Action::AssignPrivateIpAddresses;
        let call = self
            .sdk()
            .assign_private_ip_addresses()
            .network_interface_id(eni.as_str())
            .set_secondary_private_ip_address_count(addresses)
            .set_ipv4_prefix_count(prefixes);
        let reply = call.send().await.map_err(|e| self.failed(action, e))?;
        let addresses = reply.assigned_private_ip_addresses().iter().filter_map(|address| address.private_ip_address());
        let prefixes = reply.assigned_ipv4_prefixes().iter().filter_map(|prefix| prefix.ipv4_prefix());
        let addresses = addresses.map(|text| parse("privateIpAddress", text).map(|a: std::net::Ipv4Addr| IpNet::V4(a.into())));
        let prefixes = prefixes.map(|text| parse("ipv4Prefix", text).map(|net: Ipv4Net| IpNet::V4(net)));
        addresses.chain(prefixes).collect::<Result<_, _>>().map_err(|bad| unreadable(action, &bad))
    }

    async fn unassign(&self, eni: &EniId, cidrs: &[IpNet]) -> Result<(), Ec2Error> {
        let ByKind { ipv4, prefixes_v4, ipv6, prefixes_v6 } = ByKind::of(cidrs);
        if !(ipv4.is_empty() && prefixes_v4.is_empty()) {
            let call = self
                .sdk()
                .unassign_private_ip_addresses()
                .network_interface_id(eni.as_str())
                .set_private_ip_addresses(texts(&ipv4))
                .set_ipv4_prefixes(texts(&prefixes_v4));
            call.send().await.map_err(|e| self.failed(Ec2Action::UnassignPrivateIpAddresses, e))?;
        }
        if !(ipv6.is_empty() && prefixes_v6.is_empty()) {
            let call = self
                .sdk()
                .unassign_ipv6_addresses()
                .network_interface_id(eni.as_str())
                .set_ipv6_addresses(texts(&ipv6))
                .set_ipv6_prefixes(texts(&prefixes_v6));
            call.send().await.map_err(|e| self.failed(Ec2Action::UnassignIpv6Addresses, e))?;
        }
        Ok(())
    }

    async fn detach_eni(&self, attachment: &AttachmentId) -> Result<(), Ec2Error> {
        let reply = self.sdk().detach_network_interface().attachment_id(attachment.as_str()).send().await;
        gone_is_done(reply.map(|_| ()).map_err(|e| self.failed(Ec2Action::DetachNetworkInterface, e)))
    }

    async fn delete_eni(&self, eni: &EniId) -> Result<(), Ec2Error> {
        let reply = self.sdk().delete_network_interface().network_interface_id(eni.as_str()).send().await;
        gone_is_done(reply.map(|_| ()).map_err(|e| self.failed(Ec2Action::DeleteNetworkInterface, e)))
    }

    async fn create_tags(&self, eni: &EniId, tags: &BTreeMap<String, String>) -> Result<(), Ec2Error> {
        let call = self.sdk().create_tags().resources(eni.as_str()).set_tags(Some(convert::to_tags(tags)));
        call.send().await.map_err(|e| self.failed(Ec2Action::CreateTags, e))?;
        Ok(())
    }
}

impl SdkEc2 {
    async fn assign_ipv6_prefixes(&self, eni: &EniId, count: u16) -> Result<Vec<IpNet>, Ec2Error> {
        let action = Ec2Action::AssignIpv6Addresses;
        let call = self.sdk().assign_ipv6_addresses().network_interface_id(eni.as_str()).ipv6_prefix_count(count.into());
        let reply = call.send().await.map_err(|e| self.failed(action, e))?;
        let prefixes = reply.assigned_ipv6_prefixes().iter().map(|text| parse("ipv6Prefix", text).map(|net: Ipv6Net| IpNet::V6(net)));
        prefixes.collect::<Result<_, _>>().map_err(|bad| unreadable(action, &bad))
    }
}

fn texts(items: &[impl ToString]) -> Option<Vec<String>> {
    (!items.is_empty()).then(|| items.iter().map(ToString::to_string).collect())
}

fn gone_is_done(reply: Result<(), Ec2Error>) -> Result<(), Ec2Error> {
    match reply {
        Err(Ec2Error::NotFound { .. }) => Ok(()),
        reply => reply,
    }
}

/// The next page's token; one that repeats would never end.
fn next_page(action: Ec2Action, last: Option<String>, next: Option<String>) -> Result<Option<String>, Ec2Error> {
    let next = next.filter(|token| !token.is_empty());
    if next.is_some() && next == last {
        let message = "EC2 gave the same page token twice".to_owned();
        return Err(Ec2Error::Other { action, code: "UnreadableReply".to_owned(), message });
    }
    Ok(next)
}

/// The service did it, but what it says cannot be used: nobody knows the result.
fn unreadable(action: Ec2Action, bad: &BadReply) -> Ec2Error {
    Ec2Error::NoReply { action, message: bad.to_string() }
}
