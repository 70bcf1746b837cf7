//! Delivery: streams in parallel, each batch until it is taken. A stream's batches begin in their order, one at a time; several are on
//! their way where the sink orders events by itself and more batches wait.
//!
//! | the sink says | what is done |
//! |---|---|
//! | accepted | acknowledged; rejected events are counted |
//! | not found | stream, and if need be group, are created; then again |
//! | throttled, unavailable | again after a growing pause with jitter; throttling halves the number of parallel puts |
//! | not allowed | again, with longer pauses: a person must act, nothing is dropped |
//! | refused | the batch is halved until the one event that is refused stands alone; that one is dropped and counted |

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::RngExt as _;
use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::ledger::BatchId;
use stanchion_core::logs::settings::LogSettings;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tracing::warn;

use super::streams::{Sealed, StreamId};

/// Pauses between attempts: the first one's upper bound, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// The same when permissions are missing.
const PAUSE_UNAUTHORIZED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// What became of batches.
#[derive(Debug)]
pub(super) enum Report {
    /// An attempt failed; it is tried again.
    Retry { id: BatchId, throttled: bool, error: String },
    /// The batch is settled.
    Settled(Settled),
}

/// A batch that needs no more attempts.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) id: BatchId,
    pub(super) stream: StreamId,
    pub(super) events: u64,
    pub(super) bytes: u64,
    pub(super) too_old: u64,
    pub(super) too_new: u64,
    pub(super) expired: u64,
    pub(super) invalid: u64,
    pub(super) error: Option<String>,
}

/// Sends batches.
pub(super) struct Shipper<S> {
    shared: Arc<Shared<S>>,
    queues: HashMap<StreamId, Queue>,
    /// Puts of one stream at the same time.
    stream_puts: usize,
    sending: JoinSet<()>,
    reports: mpsc::UnboundedReceiver<Report>,
}

/// Batches of one stream.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Sealed>,
    sending: usize,
}

struct Shared<S> {
    sink: S,
    spec: LogGroupSpec,
    places: Places,
    // Unbounded, but each report stands for an attempt, of which there are at most as many at once as streams have batches in memory.
    reports: mpsc::UnboundedSender<Report>,
}

/// Places for puts at the same time: fewer while the service throttles, one more for every so many that it takes.
struct Places {
    semaphore: Semaphore,
    now: AtomicUsize,
    most: usize,
    taken: AtomicUsize,
}

impl Places {
    fn fewer(&self) {
        let now = self.now.load(Ordering::Relaxed);
        let less = self.semaphore.forget_permits(now / 2);
        self.now.fetch_sub(less, Ordering::Relaxed);
    }

    fn accepted(&self) {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        if taken % 10 == 9 && self.now.load(Ordering::Relaxed) < self.most {
            self.now.fetch_add(1, Ordering::Relaxed);
            self.semaphore.add_permits(1);
        }
    }
}

impl<S: LogSink> Shipper<S> {
    pub(super) fn new(sink: S, settings: &LogSettings) -> Self {
        let parallel = settings.parallel_puts.max(1);
        let places =
            Places { semaphore: Semaphore::new(parallel), now: AtomicUsize::new(parallel), most: parallel, taken: AtomicUsize::new(0) };
        let (sender, reports) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared { sink, spec: settings.group_spec.clone(), places, reports: sender });
        Self { shared, queues: HashMap::new(), stream_puts: settings.stream_puts.max(1), sending: JoinSet::new(), reports }
    }

    /// Sends the batch after those of its stream that came before.
    pub(super) fn submit(&mut self, sealed: Sealed) {
        let stream = sealed.stream;
        self.queues.entry(stream).or_default().waiting.push_back(sealed);
        self.send(stream);
    }

    /// Begins what may begin: a second put of a stream only while a further batch waits behind it, so that the batches of a stream that
    /// is not behind go one after the other.
    fn send(&mut self, stream: StreamId) {
        let Some(queue) = self.queues.get_mut(&stream) else { return };
        while queue.sending == 0 || (queue.sending < self.stream_puts && queue.waiting.len() > 1) {
            let Some(sealed) = queue.waiting.pop_front() else { break };
            queue.sending += 1;
            let shared = Arc::clone(&self.shared);
            self.sending.spawn(async move { shared.deliver(sealed).await });
        }
        if queue.sending == 0 {
            self.queues.remove(&stream);
        }
    }

    /// What happened next; never if nothing is on its way. Safe to drop and call again.
    pub(super) async fn next(&mut self) -> Report {
        let report = self.reports.recv().await.expect("this end holds a sender");
        while self.sending.try_join_next().is_some() {}
        if let Report::Settled(settled) = &report
            && let Some(queue) = self.queues.get_mut(&settled.stream)
        {
            queue.sending -= 1;
            self.send(settled.stream);
        }
        report
    }
}

impl<S: LogSink> Shared<S> {
    async fn deliver(&self, sealed: Sealed) {
        let Sealed { id, stream, batch } = sealed;
        let mut settled = Settled { id, stream, events: 0, bytes: 0, too_old: 0, too_new: 0, expired: 0, invalid: 0, error: None };
        let mut parts = VecDeque::from([batch]);
        while let Some(part) = parts.pop_front() {
            match self.put(id, &part).await {
                Ok(rejected) => count(&mut settled, &part, rejected),
                Err(error) => match part.bisect() {
                    Some((left, right)) => {
                        parts.push_front(right);
                        parts.push_front(left);
                    }
                    None => {
                        warn!(group = part.group(), stream = part.stream(), %error, "dropped one event: the service refuses it");
                        settled.invalid += 1;
                        settled.error = Some(error);
                    }
                },
            }
        }
        // The receiver is gone only when the process ends.
        let _ = self.reports.send(Report::Settled(settled));
    }

    /// Tries until the batch is taken, or refused for what it is.
    async fn put(&self, id: BatchId, batch: &LogBatch) -> Result<Rejected, String> {
        for attempt in 0.. {
            let result = {
                let _place = self.places.semaphore.acquire().await.expect("the semaphore is never closed");
                // A request's future has tens of kilobytes: only those that have a place hold one, however many streams wait.
                Box::pin(self.put_once(batch)).await
            };
            let error = match result {
                Ok(rejected) => {
                    self.places.accepted();
                    return Ok(rejected);
                }
                Err(SinkError::Invalid(message)) => return Err(message),
                Err(error) => error,
            };
            let throttled = matches!(error, SinkError::Throttled { .. });
            if throttled {
                self.places.fewer();
            }
            let _ = self.reports.send(Report::Retry { id, throttled, error: error.to_string() });
            tokio::time::sleep(pause(&error, attempt)).await;
        }
        unreachable!("attempts do not end")
    }

    async fn put_once(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        match self.sink.put(batch).await {
            Err(SinkError::NotFound(_)) => {
                self.create(batch).await?;
                self.sink.put(batch).await
            }
            other => other,
        }
    }

    async fn create(&self, batch: &LogBatch) -> Result<(), SinkError> {
        match self.sink.create_stream(batch.group(), batch.stream()).await {
            Err(SinkError::NotFound(_)) => {
                self.sink.create_group(batch.group(), &self.spec).await?;
                self.sink.create_stream(batch.group(), batch.stream()).await
            }
            other => other,
        }
    }
}

/// Full jitter: anything up to the bound, so that nodes that failed together do not come back together.
fn pause(error: &SinkError, attempt: u32) -> Duration {
    let (first, longest) = if matches!(error, SinkError::Unauthorized(_)) { PAUSE_UNAUTHORIZED } else { PAUSE };
    let bound = first.saturating_mul(1 << attempt.min(16)).min(longest);
    let asked = match error {
        SinkError::Throttled { retry_after: Some(asked), .. } => *asked,
        _ => Duration::ZERO,
    };
    asked + bound.mul_f64(rand::rng().random_range(0.1..=1.0))
}

fn count(settled: &mut Settled, part: &LogBatch, rejected: Rejected) {
    let events = part.len();
    let expired = rejected.expired_until.unwrap_or(0).min(events);
    let too_old = rejected.too_old_until.unwrap_or(0).min(events).saturating_sub(expired);
    let too_new = events - rejected.too_new_from.unwrap_or(events).min(events);
    let lost = (expired + too_old + too_new).min(events);
    settled.expired += expired as u64;
    settled.too_old += too_old as u64;
    settled.too_new += too_new as u64;
    settled.events += (events - lost) as u64;
    settled.bytes += part.counted_bytes() as u64;
    if lost > 0 {
        settled.error = Some(format!("{lost} events rejected for their time"));
        warn!(group = part.group(), stream = part.stream(), expired, too_old, too_new, "the service rejected events for their time");
    }
}
