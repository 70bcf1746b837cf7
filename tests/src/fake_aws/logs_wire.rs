//! CloudWatch Logs on the wire: AWS JSON 1.1.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;

use super::faults::ApiError;
use super::logs::{LogsCall, LogsReply};

/// What the service sets when a Describe call has no limit.
const DEFAULT_LIMIT: usize = 50;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PutLogEvents {
    log_group_name: String,
    log_stream_name: String,
    log_events: Vec<InputLogEvent>,
    #[serde(default, rename = "sequenceToken")]
    _ignored_by_the_service: Option<String>,
    #[serde(default)]
    entity: Option<Entity>,
}

/// What the events are about.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entity {
    /// Which it is.
    pub key_attributes: BTreeMap<String, String>,
    /// What else is known of it.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InputLogEvent {
    timestamp: i64,
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CreateLogGroup {
    log_group_name: String,
    #[serde(default)]
    log_group_class: String,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CreateLogStream {
    log_group_name: String,
    log_stream_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PutRetentionPolicy {
    log_group_name: String,
    retention_in_days: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Describe {
    #[serde(default)]
    log_group_name: String,
    #[serde(default)]
    log_group_name_prefix: String,
    #[serde(default)]
    log_stream_name_prefix: String,
    #[serde(default)]
    limit: Option<usize>,
    #[serde(default)]
    next_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TagResource {
    resource_arn: String,
    tags: BTreeMap<String, String>,
}

/// Reads a request; `target` is the X-Amz-Target header, `emf` whether x-amzn-logs-format names that format.
pub(super) fn parse(target: &str, emf: bool, body: &[u8]) -> Result<LogsCall, ApiError> {
    let operation = target
        .strip_prefix("Logs_20140328.")
        .ok_or_else(|| ApiError::bad("UnknownOperationException", format!("unknown target {target:?}")))?;
    Ok(match operation {
        "PutLogEvents" => {
            let PutLogEvents { log_group_name: group, log_stream_name: stream, log_events, entity, .. } = from_json(body)?;
            let events = log_events.into_iter().map(|e| (e.timestamp, e.message)).collect();
            LogsCall::PutLogEvents { group, stream, events, emf, entity }
        }
        "CreateLogGroup" => {
            let CreateLogGroup { log_group_name: group, log_group_class: class, tags } = from_json(body)?;
            LogsCall::CreateLogGroup { group, class, tags }
        }
        "CreateLogStream" => {
            let CreateLogStream { log_group_name: group, log_stream_name: stream } = from_json(body)?;
            LogsCall::CreateLogStream { group, stream }
        }
        "PutRetentionPolicy" => {
            let PutRetentionPolicy { log_group_name: group, retention_in_days: days } = from_json(body)?;
            LogsCall::PutRetentionPolicy { group, days }
        }
        "DescribeLogGroups" => {
            let Describe { log_group_name_prefix: prefix, limit, next_token, .. } = from_json(body)?;
            LogsCall::DescribeLogGroups { prefix, limit: limit.unwrap_or(DEFAULT_LIMIT), next_token }
        }
        "DescribeLogStreams" => {
            let Describe { log_group_name: group, log_stream_name_prefix: prefix, limit, next_token, .. } = from_json(body)?;
            LogsCall::DescribeLogStreams { group, prefix, limit: limit.unwrap_or(DEFAULT_LIMIT), next_token }
        }
        "TagResource" => {
            let TagResource { resource_arn, tags } = from_json(body)?;
            let group = resource_arn.split(":log-group:").nth(1).unwrap_or_default().trim_end_matches(":*").to_owned();
            LogsCall::TagResource { group, tags }
        }
        other => return Err(ApiError::bad("UnknownOperationException", format!("unknown operation {other:?}"))),
    })
}

/// Writes a reply.
pub(super) fn render(reply: &LogsReply, region: &str) -> String {
    let json = match reply {
        LogsReply::Done => return String::new(),
        LogsReply::Put { too_new_from, too_old_until, expired_until } => {
            let mut reply = json!({ "nextSequenceToken": "49590302902837298392837298" });
            if too_new_from.or(*too_old_until).or(*expired_until).is_some() {
                let mut info = serde_json::Map::new();
                for (name, index) in [
                    ("tooNewLogEventStartIndex", too_new_from),
                    ("tooOldLogEventEndIndex", too_old_until),
                    ("expiredLogEventEndIndex", expired_until),
                ] {
                    if let Some(index) = index {
                        info.insert(name.to_owned(), (*index).into());
                    }
                }
                reply["rejectedLogEventsInfo"] = info.into();
            }
            reply
        }
        LogsReply::Groups { items, next_token } => {
            let groups: Vec<_> = items
                .iter()
                .map(|view| {
                    let arn = format!("arn:aws:logs:{region}:123456789012:log-group:{}:*", view.name);
                    let mut group = json!({
                        "logGroupName": view.name, "arn": arn, "creationTime": view.created_ms, "logGroupClass": view.class,
                        "storedBytes": 0, "metricFilterCount": 0,
                    });
                    if let Some(days) = view.retention_days {
                        group["retentionInDays"] = days.into();
                    }
                    group
                })
                .collect();
            with_token(json!({ "logGroups": groups }), next_token.as_deref())
        }
        LogsReply::Streams { names, next_token } => {
            let streams: Vec<_> = names.iter().map(|name| json!({ "logStreamName": name })).collect();
            with_token(json!({ "logStreams": streams }), next_token.as_deref())
        }
    };
    json.to_string()
}

/// Writes an error.
pub(super) fn render_error(error: &ApiError) -> String {
    json!({ "__type": error.code, "message": error.message }).to_string()
}

fn with_token(mut reply: serde_json::Value, token: Option<&str>) -> serde_json::Value {
    if let Some(token) = token {
        reply["nextToken"] = token.into();
    }
    reply
}

fn from_json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad("SerializationException", error.to_string()))
}
