//! This machine's name in the cluster, where nobody says it: a kubelet may have been given another than the host's.

use std::net::IpAddr;
use std::time::Duration;

use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Client};
use serde_json::Value;
use stanchion_core::ids::InstanceId;
use tokio::time::Instant;
use tracing::{info, warn};

/// A kubelet that starts beside the agent has registered its node by then.
pub const REGISTERS_WITHIN: Duration = Duration::from_secs(20);
/// Pause before the nodes are looked through again: doubled each time.
const PAUSE: Duration = Duration::from_millis(500);
/// Nodes a request.
const PAGE: u32 = 500;

/// What this machine is known by.
#[derive(Clone, Debug)]
pub struct Marks {
    /// The host's name, which a kubelet takes when it is given none.
    pub hostname: String,
    /// The end of the node's `providerID`.
    pub instance: InstanceId,
    /// The primary ENI's address, which is the node's `InternalIP`.
    pub address: Option<IpAddr>,
}

/// The name of this machine's Node: the host's name, if there is a Node of that name; else that of the Node with this
/// instance's id or address. One that is not there yet is waited for. The host's name when the API server does not answer.
pub async fn find(client: &Client, marks: &Marks, within: Duration) -> String {
    let nodes =
        ApiResource { group: String::new(), version: "v1".into(), api_version: "v1".into(), kind: "Node".into(), plural: "nodes".into() };
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &nodes);
    let (deadline, mut pause) = (Instant::now() + within, PAUSE);
    loop {
        match look(&api, marks).await {
            Ok(Some(name)) => {
                info!(node = name, host = marks.hostname, "this machine's node; MY_NODE_NAME is not set");
                return name;
            }
            Ok(None) if Instant::now() + pause < deadline => tokio::time::sleep(pause).await,
            Ok(None) => {
                warn!(
                    host = marks.hostname,
                    "no node has this machine's name, instance or address: the host's name is taken; set MY_NODE_NAME"
                );
                return marks.hostname.clone();
            }
            Err(error) => {
                warn!(host = marks.hostname, %error, "nodes cannot be looked through: the host's name is taken; set MY_NODE_NAME if it is not the node's");
                return marks.hostname.clone();
            }
        }
        pause *= 2;
    }
}

async fn look(api: &Api<DynamicObject>, marks: &Marks) -> kube::Result<Option<String>> {
    let own = ListParams::default().fields(&format!("metadata.name={}", marks.hostname));
    if !api.list(&own).await?.items.is_empty() {
        return Ok(Some(marks.hostname.clone()));
    }
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await?;
        if let Some(node) = list.items.iter().find(|node| is_this(marks, &node.data)) {
            return Ok(node.metadata.name.clone());
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(None),
        }
    }
}

fn is_this(marks: &Marks, node: &Value) -> bool {
    let provider = node.pointer("/spec/providerID").and_then(Value::as_str).unwrap_or_default();
    if let Some((_, instance)) = provider.rsplit_once('/') {
        return instance == marks.instance.as_str();
    }
    let addresses = node.pointer("/status/addresses").and_then(Value::as_array);
    addresses.into_iter().flatten().any(|entry| {
        let address = entry["address"].as_str().and_then(|text| text.parse::<IpAddr>().ok());
        entry["type"] == "InternalIP" && address.is_some() && address == marks.address
    })
}
