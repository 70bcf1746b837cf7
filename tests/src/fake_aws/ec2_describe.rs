//! EC2's Describe actions on the model: what lags, filters and pages.

use std::collections::BTreeMap;

use stanchion_core::cloud::{Eni, Subnet};
use stanchion_core::ids::{EniId, InstanceId, SecurityGroupId, SubnetId};

use super::ec2::{Ec2Reply, Filter, Page};
use super::ec2_change::{invalid, not_found};
use super::faults::ApiError;
use super::model::State;

/// MaxResults of Describe calls: 5 to 1,000.
const MAX_RESULTS: std::ops::RangeInclusive<usize> = 5..=1000;

impl State {
    pub(super) fn describe_enis(&self, ids: &[EniId], filters: &[Filter], page: &Page) -> Result<Ec2Reply, ApiError> {
        let known: BTreeMap<_, _> = self.described().map(|eni| (&eni.id, eni)).collect();
        if let Some(unknown) = ids.iter().find(|id| !known.contains_key(id)) {
            return Err(not_found("InvalidNetworkInterfaceID.NotFound", "networkInterface ID", unknown.as_str()));
        }
        for filter in filters {
            eni_matches(None, filter)?;
        }
        let mut items = Vec::new();
        for eni in known.into_values().filter(|eni| ids.is_empty() || ids.contains(&eni.id)) {
            if filters.iter().all(|filter| eni_matches(Some(eni), filter) == Ok(true)) {
                let status = self.enis.get(&eni.id).map_or("attached", |r| r.attachment_status(self.now()));
                items.push((eni.clone(), status));
            }
        }
        let (items, next_token) = self.page(items, page, !ids.is_empty())?;
        Ok(Ec2Reply::Enis { items, next_token })
    }

    pub(super) fn describe_subnets(&self, ids: &[SubnetId], filters: &[Filter], page: &Page) -> Result<Ec2Reply, ApiError> {
        if let Some(unknown) = ids.iter().find(|id| !self.subnets.contains_key(id)) {
            return Err(not_found("InvalidSubnetID.NotFound", "subnet ID", unknown.as_str()));
        }
        for filter in filters {
            subnet_matches(None, filter)?;
        }
        let subnets = self.subnets.values().map(super::subnet::SubnetState::describe);
        let items = subnets
            .filter(|subnet| ids.is_empty() || ids.contains(&subnet.id))
            .filter(|subnet| filters.iter().all(|filter| subnet_matches(Some(subnet), filter) == Ok(true)))
            .collect();
        let (items, next_token) = self.page(items, page, !ids.is_empty())?;
        Ok(Ec2Reply::Subnets { items, next_token })
    }

    pub(super) fn describe_groups(&self, filters: &[Filter], page: &Page) -> Result<Ec2Reply, ApiError> {
        let mut items: Vec<_> = self.config.security_groups.iter().cloned().collect();
        for filter in filters {
            match (filter.name.as_str(), filter.name.strip_prefix("tag:")) {
                ("vpc-id", _) => items.retain(|_| any_of(&filter.values, self.config.vpc.as_str())),
                (_, Some(key)) => {
                    let tag = |group: &SecurityGroupId| self.group_tags.get(&(group.clone(), key.to_owned()));
                    items.retain(|group| tag(group).is_some_and(|value| any_of(&filter.values, value)));
                }
                (name, None) => return Err(invalid(format!("The filter '{name}' is invalid"))),
            }
        }
        let (items, next_token) = self.page(items, page, false)?;
        Ok(Ec2Reply::Groups { items, next_token })
    }

    pub(super) fn describe_instances(&self, ids: &[InstanceId], page: &Page) -> Result<Ec2Reply, ApiError> {
        if let Some(unknown) = ids.iter().find(|id| !self.instances.contains_key(id)) {
            return Err(not_found("InvalidInstanceID.NotFound", "instance ID", unknown.as_str()));
        }
        let instances = self.instances.values().filter(|instance| ids.is_empty() || ids.contains(&instance.id));
        let items = instances
            .map(|instance| {
                let on_it = |eni: &&Eni| eni.attachment.as_ref().is_some_and(|a| a.instance == instance.id);
                (instance.clone(), self.described().filter(on_it).cloned().collect())
            })
            .collect();
        let (items, next_token) = self.page(items, page, !ids.is_empty())?;
        Ok(Ec2Reply::Instances { items, next_token })
    }

    pub(super) fn describe_types(&self, types: &[String], page: &Page) -> Result<Ec2Reply, ApiError> {
        if let Some(unknown) = types.iter().find(|name| !self.limits.contains_key(*name)) {
            let message = format!("The following supplied instance types do not exist: [{unknown}]");
            return Err(ApiError::bad("InvalidInstanceType", message));
        }
        let items = self.limits.values().filter(|l| types.is_empty() || types.contains(&l.instance_type)).cloned().collect();
        let (items, next_token) = self.page(items, page, !types.is_empty())?;
        Ok(Ec2Reply::Types { items, next_token })
    }

    fn page<T>(&self, mut items: Vec<T>, page: &Page, by_id: bool) -> Result<(Vec<T>, Option<String>), ApiError> {
        if page.max_results.is_some() && by_id {
            let message = "The parameter MaxResults cannot be used with a list of IDs";
            return Err(ApiError::bad("InvalidParameterCombination", message));
        }
        if let Some(wanted) = page.max_results
            && !MAX_RESULTS.contains(&wanted)
        {
            let message = format!("Value ( {wanted} ) for parameter maxResults is invalid. Expecting a value between 5 and 1000.");
            return Err(ApiError::bad("InvalidParameterValue", message));
        }
        let start = match &page.next_token {
            None => 0,
            Some(token) => token
                .strip_prefix("page-")
                .and_then(|n| n.parse::<usize>().ok())
                .filter(|start| *start <= items.len())
                .ok_or_else(|| ApiError::bad("InvalidNextToken", "The token is not valid"))?,
        };
        // A list of ids comes whole; EC2 pages only what it has to look for.
        let size = if by_id { usize::MAX } else { page.max_results.unwrap_or(usize::MAX).min(self.config.page_size) };
        let next = start.saturating_add(size);
        let token = (next < items.len()).then(|| format!("page-{next}"));
        items.truncate(next);
        items.drain(..start);
        Ok((items, token))
    }
}

/// Whether the ENI passes the filter; without an ENI, whether the filter exists.
fn eni_matches(eni: Option<&Eni>, filter: &Filter) -> Result<bool, ApiError> {
    let text = |f: fn(&Eni) -> Option<String>| Ok(eni.is_some_and(|eni| f(eni).is_some_and(|v| any_of(&filter.values, &v))));
    match filter.name.as_str() {
        "network-interface-id" => text(|e| Some(e.id.to_string())),
        "attachment.instance-id" => text(|e| Some(e.attachment.as_ref()?.instance.to_string())),
        "attachment.attachment-id" => text(|e| Some(e.attachment.as_ref()?.id.to_string())),
        "status" => text(|e| Some(e.status.clone())),
        "vpc-id" => text(|e| Some(e.vpc.to_string())),
        "subnet-id" => text(|e| Some(e.subnet.to_string())),
        "description" => text(|e| Some(e.description.clone())),
        "mac-address" => text(|e| Some(e.mac.to_string())),
        "tag-key" => Ok(eni.is_some_and(|e| e.tags.keys().any(|k| any_of(&filter.values, k)))),
        name => match name.strip_prefix("tag:") {
            Some(key) => Ok(eni.is_some_and(|e| e.tags.get(key).is_some_and(|v| any_of(&filter.values, v)))),
            None => Err(invalid(format!("The filter '{name}' is invalid"))),
        },
    }
}

fn subnet_matches(subnet: Option<&Subnet>, filter: &Filter) -> Result<bool, ApiError> {
    let text = |f: fn(&Subnet) -> String| Ok(subnet.is_some_and(|subnet| any_of(&filter.values, &f(subnet))));
    match filter.name.as_str() {
        "vpc-id" => text(|s| s.vpc.to_string()),
        "availability-zone" | "availabilityZone" => text(|s| s.availability_zone.clone()),
        "subnet-id" => text(|s| s.id.to_string()),
        "tag-key" => Ok(subnet.is_some_and(|s| s.tags.keys().any(|k| any_of(&filter.values, k)))),
        name => match name.strip_prefix("tag:") {
            Some(key) => Ok(subnet.is_some_and(|s| s.tags.get(key).is_some_and(|v| any_of(&filter.values, v)))),
            None => Err(invalid(format!("The filter '{name}' is invalid"))),
        },
    }
}

fn any_of(values: &[String], text: &str) -> bool {
    values.iter().any(|value| value == "*" || value == text)
}
