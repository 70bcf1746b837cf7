//! GC: the runtime lists what lives; everything else of this network is released.

use std::time::Duration;

use stanchion_core::cni::{CniError, NetConf};
use stanchion_proto::frame::Method;
use stanchion_proto::{CollectGarbageReply, CollectGarbageRequest, ValidAttachment};

use crate::agent::Agent;
use crate::egress;

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn run(conf: &NetConf) -> Result<(), CniError> {
    // What lives is not known, as from `cnitool gc`: nothing is released, and the call is none that failed.
    let Some(living) = conf.valid_attachments.as_deref() else { return Ok(()) };
    let valid = living.iter().map(|a| ValidAttachment { container_id: a.container_id.clone(), if_name: a.if_name.clone() }).collect();
    let request = CollectGarbageRequest { network_name: conf.name.clone(), valid };
    egress::collect(&conf.name, living)?;
    let mut agent = Agent::connect(&conf.socket, PATIENCE)?;
    agent.call::<CollectGarbageReply>("collect garbage", Method::CollectGarbage, &request).map(|_| ())
}
