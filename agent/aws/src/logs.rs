//! CloudWatch Logs over the SDK.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_sdk_cloudwatchlogs::Client;
use aws_sdk_cloudwatchlogs::types::LogGroupClass;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::logs::LogBatch;

use crate::classify::sink_error;
use crate::failure::Failure;
use crate::renew::Renewable;

/// Pauses between requests for a retention that fail: the shortest but for the first, and the longest.
const RETENTION_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// [`LogSink`] over the SDK. Each method is one request (a new group with retention: two), sent once; a retention that was not granted is
/// asked for again beside the group's batches.
///
/// [`LogBatch`] owns the encoded request; it replaces the SDK's serialisation before signing, so that a batch costs one
/// SHA-256 and the transport, and no copy of an event.
#[derive(Clone, Debug)]
pub struct CloudWatchSink {
    client: Renewable<Client>,
    /// Batches that are kept compressed go so; the first endpoint that does not take them turns it off for good.
    gzip: Arc<AtomicBool>,
    /// It was told that the service does not take the entities.
    told: Arc<AtomicBool>,
    /// Groups that were made here and whose retention does not hold yet.
    unretained: Arc<Mutex<BTreeMap<String, Retention>>>,
}

/// A retention that is still to be asked for.
#[derive(Clone, Copy, Debug)]
struct Retention {
    days: i32,
    due: Instant,
    /// Until the next time, if it is in vain again.
    pause: Duration,
}

impl CloudWatchSink {
    pub(crate) fn new(client: Renewable<Client>) -> Self {
        Self { client, gzip: Arc::new(AtomicBool::new(true)), told: Arc::default(), unretained: Arc::default() }
    }

    /// Whether bodies go compressed now.
    pub fn gzip(&self) -> bool {
        self.gzip.load(Ordering::Relaxed)
    }

    /// Sends it; once more, with new credentials or the service's time, when the signature was refused.
    async fn send(&self, batch: &LogBatch, body: &Bytes, gzip: bool) -> Result<Rejected, Failure> {
        self.signed(|client| async move { self.send_once(&client, batch, body.clone(), gzip).await }).await
    }

    /// A request; once more, with new credentials or the service's time, when its signature was refused.
    async fn signed<T, F: Future<Output = Result<T, Failure>>>(&self, request: impl Fn(Client) -> F) -> Result<T, Failure> {
        let (number, client) = self.client.get();
        match request(client).await {
            Err(failure) if failure.is_bad_credentials() => {
                self.client.refused(number, &failure);
                request(self.client.get().1).await
            }
            reply => reply,
        }
    }

    async fn send_once(&self, client: &Client, batch: &LogBatch, body: Bytes, gzip: bool) -> Result<Rejected, Failure> {
        let emf = batch.is_emf();
        let reply = client
            .put_log_events()
            .log_group_name(batch.group())
            .log_stream_name(batch.stream())
            .set_log_events(Some(Vec::new()))
            .customize()
            .mutate_request(move |request| {
                let length = body.len().to_string();
                *request.body_mut() = SdkBody::from(body.clone());
                let headers = request.headers_mut();
                headers.insert("content-length", length);
                if gzip {
                    headers.insert("content-encoding", "gzip");
                }
                if emf {
                    headers.insert("x-amzn-logs-format", "json/emf");
                }
            })
            .send()
            .await?;
        // The events were taken all the same.
        if let Some(info) = reply.rejected_entity_info()
            && !self.told.swap(true, Ordering::Relaxed)
        {
            warn_of_entity(batch, info.error_type().as_str());
        }
        let index = |index: Option<i32>| index.and_then(|index| usize::try_from(index).ok());
        Ok(reply.rejected_log_events_info().map_or_else(Rejected::default, |info| Rejected {
            too_new_from: index(info.too_new_log_event_start_index()),
            too_old_until: index(info.too_old_log_event_end_index()),
            expired_until: index(info.expired_log_event_end_index()),
        }))
    }

    async fn put_batch(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        if self.gzip()
            && let Some(gzip) = batch.gzip()
        {
            match self.send(batch, gzip, true).await {
                Err(failure) if says_no_gzip(&failure) => {
                    tracing::warn!(group = batch.group(), "the endpoint takes no gzip bodies: sent plain from now on");
                    self.gzip.store(false, Ordering::Relaxed);
                }
                reply => return reply.map_err(to_sink_error),
            }
        }
        self.send(batch, &batch.body(), false).await.map_err(to_sink_error)
    }

    /// Asks for the group's retention; in vain, it is asked for again when the group has taken a batch.
    async fn retain(&self, group: &str, retention: Retention) {
        let Retention { days, pause, .. } = retention;
        let request = |client: Client| async move {
            client.put_retention_policy().log_group_name(group).retention_in_days(days).send().await.map(drop).map_err(Failure::from)
        };
        match self.signed(request).await.map_err(to_sink_error) {
            Ok(()) => {}
            Err(SinkError::Invalid(message)) => {
                tracing::warn!(group, days, message, "the service has no such retention: the group keeps its events for ever; set another");
            }
            Err(error) => {
                tracing::warn!(group, days, %error, "the retention of a new log group does not hold yet; it is asked for again");
                let again =
                    Retention { due: Instant::now() + pause, pause: (pause * 2).clamp(RETENTION_PAUSE.0, RETENTION_PAUSE.1), ..retention };
                self.unretained.lock().unwrap_or_else(PoisonError::into_inner).insert(group.to_owned(), again);
            }
        }
    }

    /// The group's retention, if it is to be asked for now; whoever takes it asks.
    fn take_unretained(&self, group: &str) -> Option<Retention> {
        let mut unretained = self.unretained.lock().unwrap_or_else(PoisonError::into_inner);
        unretained.get(group).filter(|retention| retention.due <= Instant::now())?;
        unretained.remove(group)
    }
}

impl LogSink for CloudWatchSink {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        let reply = self.put_batch(batch).await;
        if reply.is_ok()
            && let Some(retention) = self.take_unretained(batch.group())
        {
            self.retain(batch.group(), retention).await;
        }
        reply
    }

    async fn create_group(&self, group: &str, spec: &LogGroupSpec) -> Result<(), SinkError> {
        let create = |client: Client| async move {
            let mut call = client.create_log_group().log_group_name(group);
            if !spec.class.is_empty() {
                call = call.log_group_class(LogGroupClass::from(spec.class.as_str()));
            }
            if !spec.tags.is_empty() {
                call = call.set_tags(Some(spec.tags.clone().into_iter().collect()));
            }
            call.send().await.map(drop).map_err(Failure::from)
        };
        match self.signed(create).await {
            // Whoever made it has set its retention.
            Err(failure) if already_exists(&failure) => return Ok(()),
            reply => reply.map_err(to_sink_error)?,
        }
        if let Some(days) = spec.retention_days {
            let days = i32::try_from(days).map_err(|_| SinkError::Invalid(format!("a retention of {days} days")))?;
            self.retain(group, Retention { days, due: Instant::now(), pause: Duration::ZERO }).await;
        }
        Ok(())
    }

    async fn create_stream(&self, group: &str, stream: &str) -> Result<(), SinkError> {
        let create = |client: Client| async move {
            client.create_log_stream().log_group_name(group).log_stream_name(stream).send().await.map(drop).map_err(Failure::from)
        };
        match self.signed(create).await {
            Err(failure) if already_exists(&failure) => Ok(()),
            reply => reply.map_err(to_sink_error),
        }
    }
}

fn warn_of_entity(batch: &LogBatch, error: &str) {
    tracing::warn!(group = batch.group(), stream = batch.stream(), error, "the service does not take the entity of a stream; told once");
}

/// What an endpoint says that reads a compressed body as it is.
fn says_no_gzip(failure: &Failure) -> bool {
    match failure {
        Failure::Refused { status: 415, .. } => true,
        Failure::Refused { code, .. } => matches!(
            code.as_str(),
            "SerializationException" | "UnsupportedMediaType" | "UnsupportedMediaTypeException" | "UnknownOperationException"
        ),
        _ => false,
    }
}

fn already_exists(failure: &Failure) -> bool {
    matches!(failure, Failure::Refused { code, .. } if code == "ResourceAlreadyExistsException")
}

fn to_sink_error(failure: Failure) -> SinkError {
    match failure {
        Failure::Refused { code, message, status, retry_after, .. } => sink_error(&code, status, &message, retry_after),
        Failure::NoCredentials(message) => SinkError::Unauthorized(message),
        Failure::NotSent(message) => SinkError::Invalid(message),
        Failure::NoReply(message) => SinkError::Unavailable(message),
    }
}
