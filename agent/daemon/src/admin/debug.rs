//! The Debug gRPC service.

use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::Stream;
use serde_json::Value;
use stanchion_proto::debug_server::Debug;
use stanchion_proto::{FlowEvent, GetStatusRequest, JsonReply, ListRequest, PolicyRequest, SetLogLevelRequest, StreamFlowsRequest};
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use super::views::Views;
use crate::netpol::FlowRecord;

/// Changes the log filter of the running process; the text is a tracing filter.
pub type SetLogFilter = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// Answers from the views.
pub struct DebugService {
    /// What can be looked at.
    pub views: Arc<Views>,
    /// The log filter's switch.
    pub set_log_filter: SetLogFilter,
}

fn reply(document: Option<Value>, role: &str) -> Result<Response<JsonReply>, Status> {
    match document {
        Some(document) => Ok(Response::new(JsonReply { json: document.to_string() })),
        None => Err(Status::failed_precondition(format!("this agent does not run the {role} role: ask the one that does (--socket)"))),
    }
}

#[tonic::async_trait]
impl Debug for DebugService {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<JsonReply>, Status> {
        reply(Some(self.views.status().await), "")
    }

    async fn list_enis(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.enis(), "network")
    }

    async fn list_ips(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.enis(), "network")
    }

    async fn list_endpoints(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.endpoints().await, "network")
    }

    async fn get_policy(&self, request: Request<PolicyRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.policy(&request.get_ref().pod).await, "network")
    }

    async fn list_conntrack(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.conntrack().await, "network")
    }

    async fn list_logs(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.logs().await, "telemetry")
    }

    async fn get_config(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(Some(self.views.config()), "")
    }

    async fn get_metrics(&self, _: Request<ListRequest>) -> Result<Response<JsonReply>, Status> {
        reply(self.views.latest_metrics(), "telemetry")
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<JsonReply>, Status> {
        let filter = &request.get_ref().filter;
        (self.set_log_filter)(filter).map_err(|problem| Status::invalid_argument(format!("{filter:?} is no log filter: {problem}")))?;
        reply(Some(serde_json::json!({"filter": filter})), "")
    }

    type StreamFlowsStream = Pin<Box<dyn Stream<Item = Result<FlowEvent, Status>> + Send>>;

    async fn stream_flows(&self, request: Request<StreamFlowsRequest>) -> Result<Response<Self::StreamFlowsStream>, Status> {
        let StreamFlowsRequest { allowed, pod } = request.into_inner();
        let Some(netpol) = &self.views.netpol else {
            return Err(Status::failed_precondition("this agent does not run the network role"));
        };
        let records = netpol.follow(allowed).await;
        let events = futures_util::stream::unfold((records, pod), |(mut records, pod)| async move {
            loop {
                let event = match records.recv().await {
                    Ok(record) if wanted(&record, &pod) => Ok(event(&record)),
                    Ok(_) => continue,
                    Err(RecvError::Lagged(count)) => Err(Status::data_loss(format!("{count} flows were lost: this reader is too slow"))),
                    Err(RecvError::Closed) => return None,
                };
                return Some((event, (records, pod)));
            }
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// Whether a follower asked for this record: `pod` is `namespace/name`, `namespace/` or empty.
fn wanted(record: &FlowRecord, pod: &str) -> bool {
    let side = |name: Option<&stanchion_core::ids::PodName>| {
        name.is_some_and(|name| if pod.ends_with('/') { pod.trim_end_matches('/') == name.namespace } else { name.to_string() == pod })
    };
    pod.is_empty() || side(record.source_pod()) || side(record.destination_pod())
}

fn event(record: &FlowRecord) -> FlowEvent {
    let since = record.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let text = |value: serde_json::Result<Value>| value.ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    let pod = |name: Option<&stanchion_core::ids::PodName>| name.map(ToString::to_string).unwrap_or_default();
    FlowEvent {
        time_unix_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        verdict: text(serde_json::to_value(record.verdict)),
        direction: text(serde_json::to_value(record.direction)),
        source: record.source.to_string(),
        source_pod: pod(record.source_pod()),
        destination: record.destination.to_string(),
        destination_pod: pod(record.destination_pod()),
        protocol: record.protocol.clone(),
        source_port: record.source_port.into(),
        destination_port: record.destination_port.into(),
        policy: record.policy.clone(),
        rule: record.rule.clone(),
        reason: record.reason.to_owned(),
        packets: 1,
        bytes: record.length.into(),
    }
}
