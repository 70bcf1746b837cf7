//! STATUS: can this node connect pods? containerd asks every few seconds and makes the node's readiness of it.

use std::fs;
use std::time::Duration;

use stanchion_core::cni::{CniError, ErrorCode, NetConf};
use stanchion_core::conflist::ready_mark;
use stanchion_proto::frame::Method;
use stanchion_proto::{StatusReply, StatusRequest};

use crate::agent::Agent;

const PATIENCE: Duration = Duration::from_secs(5);

/// Yes once an agent could connect pods in this boot. A no makes the node NotReady, takes its pods out of their services and evicts them
/// after minutes: an agent that is being replaced, or cannot start, is no reason for that, as it leaves pods connected and each ADD is
/// tried again. Before, what the agent says.
pub(crate) fn run(conf: &NetConf) -> Result<(), CniError> {
    let boot = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if !boot.is_empty() && fs::read(ready_mark(&conf.socket)).is_ok_and(|marked| marked == boot) {
        return Ok(());
    }
    let not_available = |error: CniError| CniError { code: ErrorCode::NotAvailable, ..error };
    let mut agent = Agent::connect(&conf.socket, PATIENCE).map_err(not_available)?;
    let reply: StatusReply = agent.call("ask for the status", Method::Status, &StatusRequest {}).map_err(not_available)?;
    if reply.ready { Ok(()) } else { Err(CniError::new(ErrorCode::NotAvailable, reply.reason)) }
}
