//! The product's seams straight on the model: no HTTP, so that simulations run on paused time.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_aws::ByKind;
use stanchion_core::cloud::{
    AddressRequest, CreateEni, Ec2Action, Ec2Api, Ec2Error, Eni, Imds, ImdsEni, ImdsError, InstanceIdentity, LogGroupSpec, LogSink,
    Rejected, SinkError, Subnet,
};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, Mac, SecurityGroupId, VpcId};
use stanchion_core::limits::InstanceLimits;
use stanchion_core::logs::LogBatch;

use super::cloud::{Cloud, Outcome, Spoilt};
use super::ec2::{Ec2Call, Ec2Reply, Filter, Page};
use super::faults::ApiError;
use super::logs::{LogsCall, LogsReply};
use super::logs_wire;
use super::model::State;

/// Tag key that marks the agent's ENIs, whatever instance they were made for.
const OWNED_TAG: &str = "node.k8s.amazonaws.com/instance_id";

/// EC2 without HTTP. `latency` is slept before each reply.
#[derive(Clone, Debug)]
pub struct DirectEc2 {
    cloud: Cloud,
    latency: Duration,
}

impl DirectEc2 {
    /// EC2 that answers after `latency` of the tokio clock.
    pub fn new(cloud: &Cloud, latency: Duration) -> Self {
        Self { cloud: cloud.clone(), latency }
    }

    async fn call(&self, action: Ec2Action, call: Ec2Call) -> Result<Ec2Reply, Ec2Error> {
        let Outcome { reply, delay, spoilt } = self.cloud.ec2(&call);
        tokio::time::sleep(self.latency + delay).await;
        match reply {
            Some(_) if spoilt.is_some() => Err(Ec2Error::NoReply { action, message: "the reply cannot be read".to_owned() }),
            Some(Ok(reply)) => Ok(reply),
            Some(Err(error)) => Err(stanchion_aws::ec2_error(action, &error.code, &error.message)),
            None => Err(Ec2Error::NoReply { action, message: "connection closed before the reply".to_owned() }),
        }
    }

    async fn enis(&self, ids: Vec<EniId>, filters: Vec<Filter>) -> Result<Vec<Eni>, Ec2Error> {
        let mut page = Page::default();
        let mut enis = Vec::new();
        loop {
            let call = Ec2Call::DescribeNetworkInterfaces { ids: ids.clone(), filters: filters.clone(), page };
            let Ec2Reply::Enis { items, next_token } = self.call(Ec2Action::DescribeNetworkInterfaces, call).await? else {
                unreachable!("Describe gives ENIs")
            };
            enis.extend(items.into_iter().map(|(eni, _)| eni));
            if next_token.is_none() {
                return Ok(enis);
            }
            page = Page { max_results: None, next_token };
        }
    }
}

fn filter(name: &str, value: impl Into<String>) -> Filter {
    Filter { name: name.to_owned(), values: vec![value.into()] }
}

impl Ec2Api for DirectEc2 {
    async fn describe_enis(&self, ids: &[EniId]) -> Result<Vec<Eni>, Ec2Error> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        self.enis(Vec::new(), vec![Filter { name: "network-interface-id".to_owned(), values: ids.iter().map(EniId::to_string).collect() }])
            .await
    }

    async fn describe_attached(&self, instance: &InstanceId) -> Result<Vec<Eni>, Ec2Error> {
        self.enis(Vec::new(), vec![filter("attachment.instance-id", instance.as_str())]).await
    }

    async fn describe_leaked(&self, vpc: &VpcId, tags: &BTreeMap<String, String>) -> Result<Vec<Eni>, Ec2Error> {
        let mut filters = vec![filter("status", "available"), filter("vpc-id", vpc.as_str()), filter("tag-key", OWNED_TAG)];
        filters.extend(tags.iter().map(|(key, value)| filter(&format!("tag:{key}"), value)));
        self.enis(Vec::new(), filters).await
    }

    async fn describe_subnets(&self, vpc: &VpcId, zone: &str) -> Result<Vec<Subnet>, Ec2Error> {
        let filters = vec![filter("vpc-id", vpc.as_str()), filter("availability-zone", zone)];
        let mut page = Page::default();
        let mut subnets = Vec::new();
        loop {
            let call = Ec2Call::DescribeSubnets { ids: Vec::new(), filters: filters.clone(), page };
            let Ec2Reply::Subnets { items, next_token } = self.call(Ec2Action::DescribeSubnets, call).await? else {
                unreachable!("Describe gives subnets")
            };
            subnets.extend(items);
            if next_token.is_none() {
                return Ok(subnets);
            }
            page = Page { max_results: None, next_token };
        }
    }

    async fn describe_security_groups(&self, vpc: &VpcId, (key, value): (&str, &str)) -> Result<Vec<SecurityGroupId>, Ec2Error> {
        let filters = vec![filter("vpc-id", vpc.as_str()), filter(&format!("tag:{key}"), value)];
        let mut page = Page::default();
        let mut groups = Vec::new();
        loop {
            let call = Ec2Call::DescribeSecurityGroups { filters: filters.clone(), page };
            let Ec2Reply::Groups { items, next_token } = self.call(Ec2Action::DescribeSecurityGroups, call).await? else {
                unreachable!("Describe gives security groups")
            };
            groups.extend(items);
            if next_token.is_none() {
                return Ok(groups);
            }
            page = Page { max_results: None, next_token };
        }
    }

    async fn describe_instance_type(&self, instance_type: &str) -> Result<InstanceLimits, Ec2Error> {
        let call = Ec2Call::DescribeInstanceTypes { types: vec![instance_type.to_owned()], page: Page::default() };
        match self.call(Ec2Action::DescribeInstanceTypes, call).await? {
            Ec2Reply::Types { mut items, .. } if items.len() == 1 => Ok(items.remove(0)),
            other => unreachable!("one type was asked for, EC2 gave {other:?}"),
        }
    }

    async fn create_eni(&self, request: &CreateEni) -> Result<Eni, Ec2Error> {
        match self.call(Ec2Action::CreateNetworkInterface, Ec2Call::CreateNetworkInterface(request.clone())).await? {
            Ec2Reply::Created { eni, .. } => Ok(*eni),
            other => unreachable!("Create gave {other:?}"),
        }
    }

    async fn attach_eni(&self, eni: &EniId, instance: &InstanceId, device_index: u16, network_card: u16) -> Result<AttachmentId, Ec2Error> {
        let call = Ec2Call::AttachNetworkInterface { eni: eni.clone(), instance: instance.clone(), device_index, network_card };
        match self.call(Ec2Action::AttachNetworkInterface, call).await? {
            Ec2Reply::Attached { attachment, .. } => Ok(attachment),
            other => unreachable!("Attach gave {other:?}"),
        }
    }

    async fn set_delete_on_termination(&self, eni: &EniId, attachment: &AttachmentId) -> Result<(), Ec2Error> {
        let call = Ec2Call::SetDeleteOnTermination { eni: eni.clone(), attachment: attachment.clone(), value: true };
        self.call(Ec2Action::ModifyNetworkInterfaceAttribute, call).await.map(|_| ())
    }

    async fn set_security_groups(&self, eni: &EniId, groups: &[SecurityGroupId]) -> Result<(), Ec2Error> {
        let call = Ec2Call::SetSecurityGroups { eni: eni.clone(), groups: groups.to_vec() };
        self.call(Ec2Action::ModifyNetworkInterfaceAttribute, call).await.map(|_| ())
    }

    async fn assign(&self, eni: &EniId, request: AddressRequest) -> Result<Vec<IpNet>, Ec2Error> {
        let (action, call) = match request {
            AddressRequest::Ipv6Prefixes(prefixes) => {
                (Ec2Action::AssignIpv6Addresses, Ec2Call::AssignIpv6Addresses { eni: eni.clone(), addresses: 0, prefixes })
            }
            request => (Ec2Action::AssignPrivateIpAddresses, Ec2Call::AssignPrivateIpAddresses { eni: eni.clone(), request }),
        };
        match self.call(action, call).await? {
            Ec2Reply::Assigned { cidrs, .. } => Ok(cidrs),
            other => unreachable!("Assign gave {other:?}"),
        }
    }

    async fn unassign(&self, eni: &EniId, cidrs: &[IpNet]) -> Result<(), Ec2Error> {
        let ByKind { ipv4, prefixes_v4, ipv6, prefixes_v6 } = ByKind::of(cidrs);
        if !(ipv4.is_empty() && prefixes_v4.is_empty()) {
            let call = Ec2Call::UnassignPrivateIpAddresses { eni: eni.clone(), addresses: ipv4, prefixes: prefixes_v4 };
            self.call(Ec2Action::UnassignPrivateIpAddresses, call).await?;
        }
        if !(ipv6.is_empty() && prefixes_v6.is_empty()) {
            let call = Ec2Call::UnassignIpv6Addresses { eni: eni.clone(), addresses: ipv6, prefixes: prefixes_v6 };
            self.call(Ec2Action::UnassignIpv6Addresses, call).await?;
        }
        Ok(())
    }

    async fn detach_eni(&self, attachment: &AttachmentId) -> Result<(), Ec2Error> {
        let call = Ec2Call::DetachNetworkInterface { attachment: attachment.clone() };
        gone_is_done(self.call(Ec2Action::DetachNetworkInterface, call).await)
    }

    async fn delete_eni(&self, eni: &EniId) -> Result<(), Ec2Error> {
        gone_is_done(self.call(Ec2Action::DeleteNetworkInterface, Ec2Call::DeleteNetworkInterface { eni: eni.clone() }).await)
    }

    async fn create_tags(&self, eni: &EniId, tags: &BTreeMap<String, String>) -> Result<(), Ec2Error> {
        let call = Ec2Call::CreateTags { resources: vec![eni.to_string()], tags: tags.clone() };
        self.call(Ec2Action::CreateTags, call).await.map(|_| ())
    }
}

fn gone_is_done(reply: Result<Ec2Reply, Ec2Error>) -> Result<(), Ec2Error> {
    match reply {
        Ok(_) | Err(Ec2Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// IMDS of one instance without HTTP.
#[derive(Clone, Debug)]
pub struct DirectImds {
    cloud: Cloud,
    instance: InstanceId,
}

impl DirectImds {
    /// IMDS as the instance sees it.
    pub fn new(cloud: &Cloud, instance: &InstanceId) -> Self {
        Self { cloud: cloud.clone(), instance: instance.clone() }
    }

    async fn ask<R>(&self, path: &str, act: impl FnOnce(&mut State) -> Result<R, ApiError>) -> Result<R, ImdsError> {
        let Outcome { reply, delay, spoilt } = self.cloud.imds(path, act);
        tokio::time::sleep(delay).await;
        let unreachable = |message: String| ImdsError::Unreachable { path: path.to_owned(), message };
        match (reply, spoilt) {
            (Some(_), Some(spoilt)) => {
                let text = if let Spoilt::Replaced(text) = spoilt { text } else { "damaged".to_owned() };
                Err(ImdsError::Unreadable { path: path.to_owned(), text, message: "garbage".to_owned() })
            }
            (Some(Ok(value)), None) => Ok(value),
            (Some(Err(error)), None) => Err(unreachable(format!("{} {}", error.status, error.code))),
            (None, _) => Err(unreachable("connection closed before the reply".to_owned())),
        }
    }
}

impl Imds for DirectImds {
    async fn identity(&self) -> Result<InstanceIdentity, ImdsError> {
        self.ask("/latest/meta-data/instance-id", |state| {
            let instance = state.instances.get(&self.instance).cloned().ok_or_else(not_running)?;
            let enis = state.seen_by_imds(&self.instance);
            let (primary, _) = enis.iter().find(|(eni, _)| eni.id == instance.primary).ok_or_else(not_running)?;
            Ok(InstanceIdentity {
                instance: instance.id,
                instance_type: instance.limits.instance_type,
                region: state.config.region.clone(),
                availability_zone: instance.availability_zone,
                primary_mac: primary.mac,
                local_ipv4: primary.primary_ipv4,
                ipv6: primary.ipv6.first().copied(),
                auto_scaling_group: instance.tags.get("aws:autoscaling:groupName").cloned(),
            })
        })
        .await
    }

    async fn enis(&self) -> Result<Vec<ImdsEni>, ImdsError> {
        self.ask("/latest/meta-data/network/interfaces/macs/", |state| {
            let seen = state.seen_by_imds(&self.instance);
            Ok(seen.iter().filter(|(_, complete)| *complete).filter_map(|(eni, _)| imds_eni(state, eni)).collect())
        })
        .await
    }

    async fn vpc_ipv4_cidrs(&self, _primary: Mac) -> Result<Vec<Ipv4Net>, ImdsError> {
        self.ask("/latest/meta-data/network/interfaces/macs/vpc-ipv4-cidr-blocks", |state| Ok(state.config.vpc_cidrs.clone())).await
    }

    async fn vpc_ipv6_cidrs(&self, _primary: Mac) -> Result<Vec<Ipv6Net>, ImdsError> {
        self.ask("/latest/meta-data/network/interfaces/macs/vpc-ipv6-cidr-blocks", |state| Ok(state.config.vpc_ipv6_cidrs.clone())).await
    }
}

fn imds_eni(state: &State, eni: &Eni) -> Option<ImdsEni> {
    let attachment = eni.attachment.as_ref()?;
    let subnet = state.subnets.get(&eni.subnet)?.describe();
    Some(ImdsEni {
        mac: eni.mac,
        id: eni.id.clone(),
        device_index: attachment.device_index,
        network_card: attachment.network_card,
        subnet: eni.subnet.clone(),
        subnet_cidr: Some(subnet.cidr),
        subnet_ipv6_cidrs: subnet.ipv6_cidrs,
        vpc: eni.vpc.clone(),
        security_groups: eni.security_groups.clone(),
        local_ipv4s: eni.primary_ipv4.iter().chain(&eni.secondary_ipv4).copied().collect(),
        prefixes_v4: eni.prefixes_v4.clone(),
        ipv6s: eni.ipv6.clone(),
        prefixes_v6: eni.prefixes_v6.clone(),
    })
}

fn not_running() -> ApiError {
    ApiError::with_status(404, "NotFound", "")
}

/// CloudWatch Logs without HTTP.
#[derive(Clone, Debug)]
pub struct DirectLogs {
    cloud: Cloud,
    latency: Duration,
}

impl DirectLogs {
    /// CloudWatch Logs that answers after `latency` of the tokio clock.
    pub fn new(cloud: &Cloud, latency: Duration) -> Self {
        Self { cloud: cloud.clone(), latency }
    }

    async fn call(&self, call: LogsCall) -> Result<LogsReply, SinkError> {
        let Outcome { reply, delay, spoilt } = self.cloud.logs(call);
        tokio::time::sleep(self.latency + delay).await;
        match reply {
            Some(_) if spoilt.is_some() => Err(SinkError::Unavailable("the reply cannot be read".to_owned())),
            Some(Ok(reply)) => Ok(reply),
            Some(Err(error)) => Err(stanchion_aws::sink_error(&error.code, error.status, &error.message, None)),
            None => Err(SinkError::Unavailable("connection closed before the reply".to_owned())),
        }
    }
}

impl LogSink for DirectLogs {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        let call = logs_wire::parse("Logs_20140328.PutLogEvents", batch.is_emf(), &batch.body())
            .map_err(|error| stanchion_aws::sink_error(&error.code, error.status, &error.message, None))?;
        match self.call(call).await? {
            LogsReply::Put { too_new_from, too_old_until, expired_until } => Ok(Rejected { too_new_from, too_old_until, expired_until }),
            other => unreachable!("PutLogEvents gave {other:?}"),
        }
    }

    async fn create_group(&self, group: &str, spec: &LogGroupSpec) -> Result<(), SinkError> {
        let create = LogsCall::CreateLogGroup { group: group.to_owned(), class: spec.class.clone(), tags: spec.tags.clone() };
        match self.call(create).await {
            Err(error) if is_exists(&error) => return Ok(()),
            reply => reply?,
        };
        match spec.retention_days {
            Some(days) => self.call(LogsCall::PutRetentionPolicy { group: group.to_owned(), days }).await.map(|_| ()),
            None => Ok(()),
        }
    }

    async fn create_stream(&self, group: &str, stream: &str) -> Result<(), SinkError> {
        match self.call(LogsCall::CreateLogStream { group: group.to_owned(), stream: stream.to_owned() }).await {
            Err(error) if is_exists(&error) => Ok(()),
            reply => reply.map(|_| ()),
        }
    }
}

fn is_exists(error: &SinkError) -> bool {
    matches!(error, SinkError::Invalid(text) if text.starts_with("ResourceAlreadyExistsException"))
}
