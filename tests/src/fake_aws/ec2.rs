//! EC2's requests and replies.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{AddressRequest, CreateEni, Eni, Subnet};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId};
use stanchion_core::limits::InstanceLimits;

use super::faults::ApiError;
use super::model::{InstanceView, State};

/// A filter of a Describe call: any of the values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// `attachment.instance-id`, `tag:Name` ...
    pub name: String,
    /// Any of them; `*` matches any text.
    pub values: Vec<String>,
}

/// Which part of a list is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// MaxResults.
    pub max_results: Option<usize>,
    /// NextToken.
    pub next_token: Option<String>,
}

/// An EC2 request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the parameters of the EC2 action of that name")]
pub enum Ec2Call {
    DescribeNetworkInterfaces { ids: Vec<EniId>, filters: Vec<Filter>, page: Page },
    DescribeSubnets { ids: Vec<SubnetId>, filters: Vec<Filter>, page: Page },
    DescribeSecurityGroups { filters: Vec<Filter>, page: Page },
    DescribeInstances { ids: Vec<InstanceId>, page: Page },
    DescribeInstanceTypes { types: Vec<String>, page: Page },
    CreateNetworkInterface(CreateEni),
    AttachNetworkInterface { eni: EniId, instance: InstanceId, device_index: u16, network_card: u16 },
    SetDeleteOnTermination { eni: EniId, attachment: AttachmentId, value: bool },
    SetSecurityGroups { eni: EniId, groups: Vec<SecurityGroupId> },
    AssignPrivateIpAddresses { eni: EniId, request: AddressRequest },
    UnassignPrivateIpAddresses { eni: EniId, addresses: Vec<Ipv4Addr>, prefixes: Vec<Ipv4Net> },
    AssignIpv6Addresses { eni: EniId, addresses: u16, prefixes: u16 },
    UnassignIpv6Addresses { eni: EniId, addresses: Vec<Ipv6Addr>, prefixes: Vec<Ipv6Net> },
    DetachNetworkInterface { attachment: AttachmentId },
    DeleteNetworkInterface { eni: EniId },
    CreateTags { resources: Vec<String>, tags: BTreeMap<String, String> },
}

/// What EC2 answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the elements of EC2's replies")]
pub enum Ec2Reply {
    /// With the state of each attachment.
    Enis {
        items: Vec<(Eni, &'static str)>,
        next_token: Option<String>,
    },
    Subnets {
        items: Vec<Subnet>,
        next_token: Option<String>,
    },
    Groups {
        items: Vec<SecurityGroupId>,
        next_token: Option<String>,
    },
    Instances {
        items: Vec<(InstanceView, Vec<Eni>)>,
        next_token: Option<String>,
    },
    Types {
        items: Vec<InstanceLimits>,
        next_token: Option<String>,
    },
    Created {
        eni: Box<Eni>,
        client_token: String,
    },
    Attached {
        attachment: AttachmentId,
        network_card: u16,
    },
    Assigned {
        eni: EniId,
        cidrs: Vec<IpNet>,
    },
    Unassigned {
        eni: EniId,
    },
    Done,
}

impl Ec2Call {
    /// The action's name in the API.
    pub fn action(&self) -> &'static str {
        match self {
            Self::DescribeNetworkInterfaces { .. } => "DescribeNetworkInterfaces",
            Self::DescribeSubnets { .. } => "DescribeSubnets",
            Self::DescribeSecurityGroups { .. } => "DescribeSecurityGroups",
            Self::DescribeInstances { .. } => "DescribeInstances",
            Self::DescribeInstanceTypes { .. } => "DescribeInstanceTypes",
            Self::CreateNetworkInterface(_) => "CreateNetworkInterface",
            Self::AttachNetworkInterface { .. } => "AttachNetworkInterface",
            Self::SetDeleteOnTermination { .. } | Self::SetSecurityGroups { .. } => "ModifyNetworkInterfaceAttribute",
            Self::AssignPrivateIpAddresses { .. } => "AssignPrivateIpAddresses",
            Self::UnassignPrivateIpAddresses { .. } => "UnassignPrivateIpAddresses",
            Self::AssignIpv6Addresses { .. } => "AssignIpv6Addresses",
            Self::UnassignIpv6Addresses { .. } => "UnassignIpv6Addresses",
            Self::DetachNetworkInterface { .. } => "DetachNetworkInterface",
            Self::DeleteNetworkInterface { .. } => "DeleteNetworkInterface",
            Self::CreateTags { .. } => "CreateTags",
        }
    }
}

impl State {
    pub(super) fn ec2(&mut self, call: &Ec2Call) -> Result<Ec2Reply, ApiError> {
        match call {
            Ec2Call::DescribeNetworkInterfaces { ids, filters, page } => self.describe_enis(ids, filters, page),
            Ec2Call::DescribeSubnets { ids, filters, page } => self.describe_subnets(ids, filters, page),
            Ec2Call::DescribeSecurityGroups { filters, page } => self.describe_groups(filters, page),
            Ec2Call::DescribeInstances { ids, page } => self.describe_instances(ids, page),
            Ec2Call::DescribeInstanceTypes { types, page } => self.describe_types(types, page),
            Ec2Call::CreateNetworkInterface(request) => self.create(request),
            Ec2Call::AttachNetworkInterface { eni, instance, device_index, network_card } => {
                self.attach(eni, instance, *device_index, *network_card)
            }
            Ec2Call::SetDeleteOnTermination { eni, attachment, value } => self.set_delete_on_termination(eni, attachment, *value),
            Ec2Call::SetSecurityGroups { eni, groups } => self.set_groups(eni, groups),
            Ec2Call::AssignPrivateIpAddresses { eni, request } => self.assign(eni, *request),
            Ec2Call::UnassignPrivateIpAddresses { eni, addresses, prefixes } => self.unassign(eni, addresses, prefixes),
            Ec2Call::AssignIpv6Addresses { eni, addresses, prefixes } => self.assign_ipv6(eni, *addresses, *prefixes),
            Ec2Call::UnassignIpv6Addresses { eni, addresses, prefixes } => self.unassign_ipv6(eni, addresses, prefixes),
            Ec2Call::DetachNetworkInterface { attachment } => self.detach(attachment),
            Ec2Call::DeleteNetworkInterface { eni } => self.delete(eni),
            Ec2Call::CreateTags { resources, tags } => self.create_tags(resources, tags),
        }
    }
}
