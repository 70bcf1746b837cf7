//! The task that drives a [`Tailer`] and its shipper on the clock.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stanchion_core::cloud::LogSink;
use stanchion_core::cluster::ClusterState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::counters::{LogCounters, LogsSnapshot};
use super::events::Events;
use super::ship::{Report, Settled, Shipper};
use super::store;
use super::tail::{Now, Tailer};

/// The sweep is the truth; events of the directory only make it come sooner.
const SWEEP: Duration = Duration::from_secs(10);
/// Positions are saved at most this often: what a crash sends twice.
const SAVE: Duration = Duration::from_secs(1);

/// Everything that the task owns.
pub(super) struct Runner<S> {
    pub(super) tailer: Tailer,
    pub(super) shipper: Shipper<S>,
    pub(super) cluster: watch::Receiver<Arc<ClusterState>>,
    pub(super) positions: Option<PathBuf>,
    pub(super) counters: watch::Sender<LogCounters>,
    pub(super) questions: mpsc::Receiver<oneshot::Sender<LogsSnapshot>>,
    pub(super) shutdown: CancellationToken,
    pub(super) grace: Duration,
    pub(super) clock: Clock,
}

/// Milliseconds of tokio's clock, which tests can pause, and of the wall.
pub(super) struct Clock {
    origin: Instant,
    wall: fn() -> SystemTime,
}

impl Clock {
    pub(super) fn new(wall: fn() -> SystemTime) -> Self {
        Self { origin: Instant::now(), wall }
    }

    pub(super) fn now(&self) -> Now {
        let since_1970 = (self.wall)().duration_since(UNIX_EPOCH).unwrap_or_default();
        let milliseconds = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Now { mono: milliseconds(self.origin.elapsed()), wall: milliseconds(since_1970) }
    }

    fn instant(&self, mono_ms: i64) -> Instant {
        self.origin + Duration::from_millis(u64::try_from(mono_ms).unwrap_or(0))
    }
}

impl<S: LogSink> Runner<S> {
    /// Runs until shutdown, then sends what can be sent within the grace period.
    pub(super) async fn run(mut self) {
        let mut events = Events::of(self.tailer.log_dir());
        self.tailer.set_cluster(self.cluster.borrow_and_update().clone());
        let mut sweep_at = Instant::now();
        let mut save_at = Instant::now();
        while !self.shutdown.is_cancelled() {
            if Instant::now() >= sweep_at {
                if let Err(error) = self.tailer.scan(self.clock.now()) {
                    warn!(dir = %self.tailer.log_dir().display(), %error, "cannot list log files");
                }
                sweep_at = Instant::now() + SWEEP;
            }
            let turn = self.tailer.turn(self.clock.now());
            self.submit();
            events.follow(&mut self.tailer, self.clock.now());
            if self.tailer.has_changed_positions() && Instant::now() >= save_at {
                self.save();
                save_at = Instant::now() + SAVE;
            }
            let mut wake = self.clock.instant(turn.next_ms).min(sweep_at);
            if self.tailer.has_changed_positions() {
                wake = wake.min(save_at);
            }
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                report = self.shipper.next() => self.settle(report),
                news = events.next() => {
                    if events.take(news, &mut self.tailer, self.clock.now()) {
                        sweep_at = Instant::now();
                    }
                }
                Ok(()) = self.cluster.changed() => self.tailer.set_cluster(self.cluster.borrow_and_update().clone()),
                Some(reply) = self.questions.recv() => {
                    // Whoever asked may have left.
                    let _ = reply.send(self.tailer.snapshot(self.clock.now()));
                }
                () = tokio::time::sleep_until(wake) => {}
            }
            self.counters.send_replace(*self.tailer.counters_mut());
        }
        self.finish().await;
    }

    fn submit(&mut self) {
        for sealed in self.tailer.take_ready() {
            self.shipper.submit(sealed);
        }
    }

    /// Last words: what is on disk now is read and sent, and what is acknowledged by then is remembered.
    async fn finish(mut self) {
        let deadline = Instant::now() + self.grace;
        if let Err(error) = self.tailer.scan(self.clock.now()) {
            warn!(%error, "cannot list log files");
        }
        self.tailer.hurry();
        let work = async {
            loop {
                let progress = self.tailer.turn(self.clock.now()).progress;
                if !progress {
                    self.tailer.seal_all();
                }
                self.submit();
                if progress {
                    tokio::task::yield_now().await;
                } else if self.tailer.in_flight() == 0 {
                    return;
                } else {
                    let report = self.shipper.next().await;
                    self.settle(report);
                }
            }
        };
        let done = tokio::time::timeout_at(deadline, work).await.is_ok();
        self.save();
        self.counters.send_replace(*self.tailer.counters_mut());
        info!(done, batches_left = self.tailer.in_flight(), "log shipping ended");
    }

    fn settle(&mut self, report: Report) {
        let now = self.clock.now();
        apply(&mut self.tailer, report, now);
    }

    fn save(&mut self) {
        let Some(path) = &self.positions else { return };
        let Some(positions) = self.tailer.changed_positions() else { return };
        if let Err(error) = store::save(path, &positions) {
            self.tailer.counters_mut().position_errors += 1;
            self.tailer.keep_positions_dirty();
            error!(path = %path.display(), %error, "cannot save positions; tried again");
        }
    }
}

/// Tells the tailer what became of a batch.
pub(super) fn apply(tailer: &mut Tailer, report: Report, now: Now) {
    match report {
        Report::Retry { id, throttled, error } => {
            tailer.counters_mut().retries += 1;
            tailer.counters_mut().throttled += u64::from(throttled);
            tailer.note_error(id, error);
        }
        Report::Settled(Settled { id, events, bytes, too_old, too_new, expired, invalid, error, .. }) => {
            let counters = tailer.counters_mut();
            counters.events_shipped += events;
            counters.bytes_shipped += bytes;
            counters.batches += 1;
            counters.rejected_too_old += too_old;
            counters.rejected_too_new += too_new;
            counters.rejected_expired += expired;
            counters.dropped_invalid += invalid;
            tailer.acknowledge(id, error, now);
        }
    }
}
