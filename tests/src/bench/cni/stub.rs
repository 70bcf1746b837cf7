//! An agent that answers at once: what remains is the plugin and the kernel.

use std::collections::BTreeMap;
use std::sync::Mutex;

use stanchion_proto as wire;
use stanchion_proto::cni_server::Cni;
use tonic::{Request, Response, Status};

use super::{TABLE, address};

/// A reply at once: an address by the sandbox's number, no policy.
#[derive(Default)]
pub(super) struct AtOnce {
    held: Mutex<BTreeMap<String, wire::Attachment>>,
}

#[tonic::async_trait]
impl Cni for AtOnce {
    async fn add_network(&self, request: Request<wire::AddNetworkRequest>) -> Result<Response<wire::AddNetworkReply>, Status> {
        let sandbox = request.into_inner().sandbox.ok_or_else(|| Status::invalid_argument("no sandbox"))?;
        let number: u16 = sandbox.pod_name.trim_start_matches('p').parse().map_err(|_| Status::invalid_argument("no number"))?;
        let attachment = wire::Attachment { ipv4: address(number).to_string(), route_table: TABLE, ..wire::Attachment::default() };
        self.held.lock().map_err(|_| Status::internal("poisoned"))?.insert(sandbox.container_id, attachment.clone());
        let reply = wire::AddNetworkReply { attachments: vec![attachment], policy_mode: "standard".into(), ..Default::default() };
        Ok(Response::new(reply))
    }

    async fn activate_endpoint(&self, _: Request<wire::ActivateEndpointRequest>) -> Result<Response<wire::ActivateEndpointReply>, Status> {
        Ok(Response::new(wire::ActivateEndpointReply { policy_us: 0 }))
    }

    async fn del_network(&self, request: Request<wire::DelNetworkRequest>) -> Result<Response<wire::DelNetworkReply>, Status> {
        let sandbox = request.into_inner().sandbox.unwrap_or_default();
        let held = self.held.lock().map_err(|_| Status::internal("poisoned"))?.remove(&sandbox.container_id);
        Ok(Response::new(wire::DelNetworkReply { attachments: held.into_iter().collect(), vlan_id: 0 }))
    }

    async fn check_network(&self, _: Request<wire::CheckNetworkRequest>) -> Result<Response<wire::CheckNetworkReply>, Status> {
        Ok(Response::new(wire::CheckNetworkReply::default()))
    }

    async fn collect_garbage(&self, _: Request<wire::CollectGarbageRequest>) -> Result<Response<wire::CollectGarbageReply>, Status> {
        Ok(Response::new(wire::CollectGarbageReply::default()))
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        Ok(Response::new(wire::StatusReply { ready: true, reason: String::new() }))
    }
}
