//! Wire types stop here.

use std::net::IpAddr;

use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::ipam::IpamKey;
use stanchion_proto as wire;
use tonic::Status;

use crate::ipamd::{AssignError, Assignment, ReleaseError};
use crate::netpol::{ActivateError, ActivateIf};

/// Who asks.
pub(super) struct Caller {
    pub(super) key: IpamKey,
    pub(super) pod: PodName,
    pub(super) pod_uid: String,
}

/// Reads the sandbox that every call about a container carries.
pub(super) fn caller(sandbox: Option<wire::Sandbox>) -> Result<Caller, Status> {
    let sandbox = sandbox.ok_or_else(|| Status::invalid_argument("the request names no sandbox"))?;
    for (what, value) in [("network", &sandbox.network_name), ("container", &sandbox.container_id), ("interface", &sandbox.if_name)] {
        if value.is_empty() {
            return Err(Status::invalid_argument(format!("the request names no {what}")));
        }
    }
    Ok(Caller {
        key: key(sandbox.network_name, &sandbox.container_id, sandbox.if_name),
        pod: PodName::new(sandbox.pod_namespace, sandbox.pod_name),
        pod_uid: sandbox.pod_uid,
    })
}

pub(super) fn key(network_name: String, container_id: &str, if_name: String) -> IpamKey {
    IpamKey { network_name, container_id: ContainerId::new(container_id), if_name }
}

pub(super) fn attachments(assignment: &Assignment) -> Vec<wire::Attachment> {
    let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    assignment
        .attachments
        .iter()
        .map(|address| wire::Attachment {
            ipv4: text(address.ipv4.map(IpAddr::V4)),
            ipv6: text(address.ipv6.map(IpAddr::V6)),
            device_index: address.device_index.into(),
            network_card: address.network_card.into(),
            route_table: address.route_table,
        })
        .collect()
}

/// Reads a veth that the plugin made.
pub(super) fn endpoint(endpoint: &wire::Endpoint) -> Result<ActivateIf, Status> {
    if endpoint.host_if_name.is_empty() || endpoint.host_if_index == 0 {
        return Err(Status::invalid_argument("an endpoint has no host interface"));
    }
    Ok(ActivateIf {
        host_if_name: endpoint.host_if_name.clone(),
        host_if_index: endpoint.host_if_index,
        ipv4: address(&endpoint.ipv4)?,
        ipv6: address(&endpoint.ipv6)?,
    })
}

fn address<T: std::str::FromStr>(text: &str) -> Result<Option<T>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| Status::invalid_argument(format!("{text:?} is no address")))
}

/// The whole chain in one line: it ends up in the kubelet's event.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

pub(super) fn assign_status(error: &AssignError) -> Status {
    let text = chain(error);
    match error {
        AssignError::Busy(_) | AssignError::NotReady { .. } | AssignError::HostNetwork { .. } => Status::unavailable(text),
        AssignError::NoAddress { .. } => Status::resource_exhausted(text),
        AssignError::NotDurable { .. } => Status::internal(text),
    }
}

pub(super) fn release_status(error: &ReleaseError) -> Status {
    let text = chain(error);
    match error {
        ReleaseError::Busy(_) | ReleaseError::NotReady { .. } => Status::unavailable(text),
        ReleaseError::NotDurable { .. } => Status::internal(text),
    }
}

pub(super) fn activate_status(error: &ActivateError) -> Status {
    let text = chain(error);
    match error {
        ActivateError::Busy | ActivateError::NotKnown { .. } => Status::unavailable(text),
        ActivateError::NoSlot { .. } => Status::resource_exhausted(text),
        ActivateError::Maps(_) | ActivateError::Attach(_) | ActivateError::NotDurable { .. } => Status::internal(text),
    }
}
