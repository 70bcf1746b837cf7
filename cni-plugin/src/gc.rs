//! GC: the runtime lists what lives; everything else of this network is released.

use std::time::Duration;

use stanchion_core::cni::{CniError, NetConf};
use stanchion_proto::{CollectGarbageRequest, ValidAttachment};

use crate::agent::Agent;

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn run(conf: &NetConf) -> Result<(), CniError> {
    let valid = conf.valid_attachments.iter();
    let valid = valid.map(|a| ValidAttachment { container_id: a.container_id.clone(), if_name: a.if_name.clone() }).collect();
    let request = CollectGarbageRequest { network_name: conf.name.clone(), valid };
    let mut agent = Agent::connect(&conf.socket, PATIENCE).await?;
    agent.call("collect garbage", async |client| client.collect_garbage(request).await).await.map(|_| ())
}
