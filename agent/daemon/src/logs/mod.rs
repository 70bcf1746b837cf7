//! Container logs: files in, batches out, positions kept.
//!
//! One task owns the [`Tailer`] (open files, open lines, open batches, ledgers) and the shipper (one put at a time for each
//! stream, streams in parallel). A batch is on its way until the sink took it; only then do the files' safe offsets move, and
//! only these are saved. When memory is full of unacknowledged batches, reading stops: the log files are the buffer. A log
//! group that takes nothing has half of the memory at most, so that the others go on. If the task panics, the supervisor
//! starts it again from the saved positions.

mod container;
mod counters;
mod discover;
mod events;
mod follow;
mod inherit;
#[cfg(test)]
mod quiet_tests;
mod run;
mod ship;
mod sinks;
mod source;
mod store;
mod streams;
mod tail;
mod watches;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stanchion_core::cloud::LogSink;
use stanchion_core::cluster::ClusterState;
use stanchion_core::logs::settings::LogSettings;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use counters::{FileStatus, LogCounters, LogsSnapshot};
pub use inherit::Inherited;
pub use sinks::JsonLines;
pub use streams::{Sealed, StreamId};
pub use tail::{Drain, Now, Restored, Tailer, TailerParts, Turn};

/// Name of the positions file in the state directory.
pub const POSITIONS_FILE: &str = "log-positions.json";

/// What log shipping is made of.
pub struct LogsParts<S> {
    /// How files become events.
    pub settings: LogSettings,
    /// Where events go.
    pub sink: S,
    /// The pod table.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// Node name.
    pub node: String,
    /// Cluster name.
    pub cluster_name: String,
    /// Where positions are kept; must exist.
    pub state_dir: PathBuf,
    /// `/var/log/containers`, or the tree `/var/log/pods`.
    pub log_dir: PathBuf,
    /// Ends the task, after `grace` at the latest.
    pub shutdown: CancellationToken,
    /// How long the last lines may take to be sent.
    pub grace: Duration,
    /// The time of day; `SystemTime::now` where time is not simulated.
    pub wall: fn() -> SystemTime,
}

/// Asks the task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LogsHandle {
    counters: watch::Receiver<LogCounters>,
    questions: mpsc::Sender<oneshot::Sender<LogsSnapshot>>,
}

impl LogsHandle {
    /// Totals, as of the task's last turn.
    pub fn counters(&self) -> LogCounters {
        *self.counters.borrow()
    }

    /// The state of every file; `None` when the task has ended, or when too many ask at once.
    pub async fn snapshot(&self) -> Option<LogsSnapshot> {
        let (reply, answer) = oneshot::channel();
        self.questions.try_send(reply).ok()?;
        answer.await.ok()
    }
}

/// Starts log shipping.
pub fn spawn<S: LogSink>(parts: LogsParts<S>) -> (LogsHandle, JoinHandle<()>) {
    let positions = parts.state_dir.join(POSITIONS_FILE);
    let restored = store::load(&positions, &parts.node);
    let shipper = ship::Shipper::new(parts.sink, &parts.settings);
    let (fluent_bit, ended) = (parts.settings.fluent_bit_state.clone(), parts.shutdown.clone());
    let tailer_parts = TailerParts { settings: parts.settings, log_dir: parts.log_dir, node: parts.node, cluster_name: parts.cluster_name };
    let (counters, counters_receiver) = watch::channel(LogCounters::default());
    // A few people and one scraper ask at a time.
    let (questions, mut questions_receiver) = mpsc::channel(8);
    let runner = move |restored, questions| run::Runner {
        tailer: Tailer::new(tailer_parts, restored),
        shipper,
        cluster: parts.cluster,
        positions: Some(positions),
        counters,
        questions,
        shutdown: parts.shutdown,
        grace: parts.grace,
        clock: run::Clock::new(parts.wall),
    };
    let task = async move {
        let restored = match restored {
            // Whoever ends before it is known where to begin has nothing to say.
            Restored::Fresh => {
                let inherited = answering(&mut questions_receiver, Inherited::of(&fluent_bit, parts.wall));
                match ended.run_until_cancelled(inherited).await {
                    Some(inherited) => inherited.map_or(Restored::Fresh, Restored::Inherited),
                    None => return,
                }
            }
            restored => restored,
        };
        runner(restored, questions_receiver).run().await;
    };
    (LogsHandle { counters: counters_receiver, questions }, tokio::spawn(task))
}

/// Who asks meanwhile is told that no file is followed yet.
async fn answering<T>(questions: &mut mpsc::Receiver<oneshot::Sender<LogsSnapshot>>, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(reply) = questions.recv() => {
                // Whoever asked may have left.
                let _ = reply.send(LogsSnapshot::default());
            }
        }
    }
}

/// What a single pass did.
#[derive(Debug)]
pub struct ShipReport {
    /// Totals.
    pub counters: LogCounters,
    /// Files and directories that could not be read, with the reason.
    pub failed: Vec<(String, String)>,
}

/// Reads every file to its end, sends everything, and returns when all is acknowledged. Keeps no positions. Lines without
/// a time of their own get that of `wall`.
///
/// # Errors
/// The log directory cannot be listed.
pub async fn ship_once<S: LogSink>(
    parts: TailerParts,
    cluster: Arc<ClusterState>,
    sink: S,
    wall: fn() -> SystemTime,
) -> std::io::Result<ShipReport> {
    let mut shipper = ship::Shipper::new(sink, &parts.settings);
    let clock = run::Clock::new(wall);
    let mut tailer = Tailer::new(parts, Restored::Fresh);
    tailer.set_cluster(cluster);
    tailer.scan(clock.now())?;
    loop {
        let state = tailer.drain(clock.now());
        for sealed in tailer.take_ready() {
            shipper.submit(sealed);
        }
        match state {
            Drain::Progress => tokio::task::yield_now().await,
            Drain::Done if tailer.in_flight() == 0 => break,
            Drain::Later(at_ms) => {
                let wait = u64::try_from(at_ms - clock.now().mono).unwrap_or(0).max(1);
                let pause = tokio::time::sleep(Duration::from_millis(wait));
                tokio::select! {
                    () = pause => {}
                    report = shipper.next() => run::apply(&mut tailer, report, clock.now()),
                }
            }
            Drain::Waiting | Drain::Done => run::apply(&mut tailer, shipper.next().await, clock.now()),
        }
    }
    let snapshot = tailer.snapshot(clock.now());
    let failed = snapshot.files.into_iter().filter_map(|file| Some((file.path, file.last_error?))).chain(tailer.unread()).collect();
    Ok(ShipReport { counters: snapshot.counters, failed })
}
