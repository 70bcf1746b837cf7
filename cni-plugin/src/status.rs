//! STATUS: could an ADD be served now? containerd asks every few seconds and makes the node's readiness of it.

use std::time::Duration;

use stanchion_core::cni::{CniError, ErrorCode, NetConf};
use stanchion_proto::frame::Method;
use stanchion_proto::{StatusReply, StatusRequest};

use crate::agent::Agent;

const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(conf: &NetConf) -> Result<(), CniError> {
    let not_available = |error: CniError| CniError { code: ErrorCode::NotAvailable, ..error };
    let mut agent = Agent::connect(&conf.socket, PATIENCE).map_err(not_available)?;
    let reply: StatusReply = agent.call("ask for the status", Method::Status, &StatusRequest {}).map_err(not_available)?;
    if reply.ready { Ok(()) } else { Err(CniError::new(ErrorCode::NotAvailable, reply.reason)) }
}
