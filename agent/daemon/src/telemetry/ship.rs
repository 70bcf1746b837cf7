//! Documents on their way to CloudWatch Logs: kept through an outage, bounded, oldest dropped first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stanchion_core::cloud::{LogEvent, LogGroupSpec, LogSink, SinkError};
use stanchion_core::logs::batch::LogBatch;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Bytes of documents kept while they cannot be sent: about half an hour of a node with 30 pods.
const MAX_KEPT_BYTES: usize = 8 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What happened to documents, since the start.
#[derive(Debug, Default)]
pub struct ShipCounters {
    /// Taken by the service.
    pub sent: AtomicU64,
    /// Dropped: too many kept, refused, or too old.
    pub dropped: AtomicU64,
    /// Requests that failed and were tried again.
    pub retries: AtomicU64,
}

/// Where documents go.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) group: String,
    pub(crate) stream: String,
    /// How the group is made.
    pub(crate) spec: LogGroupSpec,
    /// CloudWatch makes metrics of them.
    pub(crate) emf: bool,
}

/// Sends documents until `documents` closes or `shutdown`; what is kept then counts as dropped.
pub(crate) async fn run<S: LogSink>(
    sink: Arc<S>,
    to: Destination,
    mut documents: mpsc::Receiver<Vec<LogEvent>>,
    counters: Arc<ShipCounters>,
    shutdown: CancellationToken,
) {
    let Destination { group, stream, spec, emf } = to;
    let mut kept: VecDeque<LogBatch> = VecDeque::new();
    let mut pause = FIRST_PAUSE;
    loop {
        if kept.is_empty() {
            let events = tokio::select! {
                events = documents.recv() => events,
                () = shutdown.cancelled() => None,
            };
            match events {
                Some(events) => keep(&mut kept, LogBatch::from_events(&group, &stream, emf, events), &counters),
                None => return,
            }
        }
        let Some(batch) = kept.pop_front() else { continue };
        match put(&*sink, &batch, &spec, &counters).await {
            Ok(()) => pause = FIRST_PAUSE,
            Err(error) => {
                counters.retries.fetch_add(1, Ordering::Relaxed);
                warn!(%group, error = &error as &dyn std::error::Error, pause_ms = pause.as_millis(), "documents are kept: they cannot be put to their log group");
                kept.push_front(batch);
                let wait = match &error {
                    SinkError::Throttled { retry_after: Some(after), .. } => (*after).max(pause),
                    _ => pause,
                };
                pause = (pause * 2).min(LONGEST_PAUSE);
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    Some(events) = documents.recv() => keep(&mut kept, LogBatch::from_events(&group, &stream, emf, events), &counters),
                    () = shutdown.cancelled() => {
                        counters.dropped.fetch_add(kept.iter().map(|batch| batch.len() as u64).sum(), Ordering::Relaxed);
                        return;
                    }
                }
            }
        }
    }
}

/// Puts a batch; makes the group and stream if they are missing. An error means that it may be tried again.
async fn put<S: LogSink>(sink: &S, batch: &LogBatch, spec: &LogGroupSpec, counters: &ShipCounters) -> Result<(), SinkError> {
    let mut outcome = sink.put(batch).await;
    if let Err(SinkError::NotFound(_)) = outcome {
        info!(group = batch.group(), stream = batch.stream(), "making log group and stream");
        // Without permission for the group the stream may still be possible.
        let group = sink.create_group(batch.group(), spec).await;
        sink.create_stream(batch.group(), batch.stream()).await.map_err(|error| group.err().unwrap_or(error))?;
        outcome = sink.put(batch).await;
    }
    let total = batch.len();
    let lost = match outcome {
        Ok(rejected) => {
            let old = rejected.too_old_until.max(rejected.expired_until).unwrap_or(0);
            let new = rejected.too_new_from.map_or(0, |from| total.saturating_sub(from));
            (old + new).min(total)
        }
        Err(SinkError::Invalid(message)) => {
            warn!(group = batch.group(), documents = total, message, "documents were refused");
            total
        }
        Err(error) => return Err(error),
    };
    counters.dropped.fetch_add(lost as u64, Ordering::Relaxed);
    counters.sent.fetch_add((total - lost) as u64, Ordering::Relaxed);
    Ok(())
}

fn keep(kept: &mut VecDeque<LogBatch>, batches: Vec<LogBatch>, counters: &ShipCounters) {
    kept.extend(batches);
    let mut bytes: usize = kept.iter().map(LogBatch::counted_bytes).sum();
    while bytes > MAX_KEPT_BYTES && kept.len() > 1 {
        if let Some(oldest) = kept.pop_front() {
            bytes -= oldest.counted_bytes();
            counters.dropped.fetch_add(oldest.len() as u64, Ordering::Relaxed);
        }
    }
}
