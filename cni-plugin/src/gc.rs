//! GC: the runtime lists what lives; everything else of this network is released.

use std::time::Duration;

use stanchion_core::cni::{CniError, ErrorCode, NetConf};
use stanchion_proto::frame::Method;
use stanchion_proto::{CollectGarbageReply, CollectGarbageRequest, ValidAttachment};

use crate::agent::Agent;
use crate::egress;

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn run(conf: &NetConf) -> Result<(), CniError> {
    let missing =
        || CniError::new(ErrorCode::InvalidConfig, "GC without cni.dev/valid-attachments: what lives is not known, so nothing is released");
    let living = conf.valid_attachments.as_deref().ok_or_else(missing)?;
    let valid = living.iter().map(|a| ValidAttachment { container_id: a.container_id.clone(), if_name: a.if_name.clone() }).collect();
    let request = CollectGarbageRequest { network_name: conf.name.clone(), valid };
    egress::collect(&conf.name, living)?;
    let mut agent = Agent::connect(&conf.socket, PATIENCE)?;
    agent.call::<CollectGarbageReply>("collect garbage", Method::CollectGarbage, &request).map(|_| ())
}
