//! The metric tick: one pass over /proc, /sys and the cgroups, samples, documents to CloudWatch Logs, Prometheus text.
//!
//! | task | input | output | owns | on panic |
//! |---|---|---|---|---|
//! | tick | clock, cluster watch, kernel files | [`Snapshot`] on a watch channel, documents to the shipping task | last counters, pod table | the supervisor restarts the agent's telemetry; counters start anew |
//! | ship | documents | PutLogEvents | documents not yet taken | as above; kept documents are lost |
//!
//! A tick that comes late is skipped, never queued: rates are over the time that passed.

mod cgroups;
mod read;
mod ship;
#[cfg(test)]
mod tests;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use stanchion_core::cloud::{LogEvent, LogSink};
use stanchion_core::cluster::ClusterState;
use stanchion_core::metrics::insights::{Encoder, NodeIdentity, Selection};
use stanchion_core::metrics::model::Snapshot;
use stanchion_core::metrics::pods::PodTable;
use stanchion_core::metrics::track::{ContainerFiles, Figures, Tracker};
use stanchion_core::network::names::DEFAULT_VETH_PREFIX;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub use read::{ReadError, Roots};
pub use ship::ShipCounters;

/// Ticks whose documents wait for the shipping task; that one takes them even while it waits for CloudWatch, so more than one
/// or two means that it hangs, and the tick drops rather than waits.
const WAITING_TICKS: usize = 4;

/// What is told and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// Between ticks; Container Insights expects a minute.
    pub interval: Duration,
    /// Which documents and metrics.
    pub selection: Selection,
    /// Ours, or the CloudWatch agent's with its errors.
    pub figures: Figures,
    /// The prefix of pods' host interfaces.
    pub veth_prefix: String,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(60),
            selection: Selection::default(),
            figures: Figures::default(),
            veth_prefix: DEFAULT_VETH_PREFIX.to_owned(),
        }
    }
}

/// What the tick needs.
#[derive(Debug)]
pub struct TelemetryParts<S> {
    /// Where documents go.
    pub sink: Arc<S>,
    /// Pods, services, this node.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// The kernel's views.
    pub roots: Roots,
    /// Who we are.
    pub identity: NodeIdentity,
    /// What is told.
    pub settings: TelemetrySettings,
    /// Ends the tasks.
    pub shutdown: CancellationToken,
}

/// Readers' end of telemetry. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TelemetryHandle {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    shipped: Arc<ShipCounters>,
}

impl TelemetryHandle {
    /// The samples of the last tick; empty before the first.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.borrow())
    }

    /// Notice of each tick.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.clone()
    }

    /// What happened to documents.
    pub fn shipped(&self) -> &ShipCounters {
        &self.shipped
    }
}

/// Starts the tasks. The join handle ends when both have.
pub fn spawn<S: LogSink>(parts: TelemetryParts<S>) -> (TelemetryHandle, JoinHandle<()>) {
    let TelemetryParts { sink, cluster, roots, identity, settings, shutdown } = parts;
    let (publish, snapshot) = watch::channel(Arc::default());
    let shipped = Arc::new(ShipCounters::default());
    let (documents, received) = mpsc::channel(WAITING_TICKS);
    let ship = ship::run(sink, identity.log_group(), identity.node.clone(), received, Arc::clone(&shipped), shutdown.clone());
    let collector = Collector::new(roots, cluster, identity, &settings);
    let handle = TelemetryHandle { snapshot, shipped: Arc::clone(&shipped) };
    let task = tokio::spawn(async move {
        tokio::join!(ship, tick(collector, settings.interval, publish, documents, shipped, shutdown));
    });
    (handle, task)
}

/// Ticks until the shutdown. The first pass only sets the counters' baseline.
async fn tick(
    mut collector: Collector,
    interval: Duration,
    publish: watch::Sender<Arc<Snapshot>>,
    documents: mpsc::Sender<Vec<LogEvent>>,
    shipped: Arc<ShipCounters>,
    shutdown: CancellationToken,
) {
    let phase = spread(&collector.encoder.identity().node, interval);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval + phase, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut first = true;
    loop {
        if !first {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
        }
        // The kernel answers these reads at once, but a file system that hangs must not take a worker thread with it.
        let pass = tokio::task::spawn_blocking(move || {
            let outcome = collector.collect();
            (collector, outcome)
        });
        let Ok((returned, outcome)) = pass.await else { return };
        collector = returned;
        match outcome {
            Ok((snapshot, messages)) => {
                let timestamp_ms = snapshot.wall_ms;
                publish.send_replace(Arc::new(snapshot));
                if !first {
                    let count = messages.len() as u64;
                    let events = messages.into_iter().map(|message| LogEvent { timestamp_ms, message }).collect();
                    if documents.try_send(events).is_err() {
                        shipped.dropped.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
                        warn!(documents = count, "metric documents dropped: the shipping task does not take them");
                    }
                }
            }
            Err(error) => warn!(error = &error as &dyn std::error::Error, "no metrics this time"),
        }
        first = false;
    }
}

/// A node's place in the interval, so that a thousand nodes do not send in the same second.
fn spread(node: &str, interval: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    node.hash(&mut hasher);
    let share = f64::from(u32::try_from(hasher.finish() % 1000).unwrap_or(0)) / 1000.0;
    interval.mul_f64(share / 4.0)
}

/// One pass and what it needs to remember.
#[derive(Debug)]
pub struct Collector {
    reader: read::Reader,
    tracker: Tracker,
    cluster: watch::Receiver<Arc<ClusterState>>,
    table: PodTable,
    veth_prefix: String,
    encoder: Encoder,
    files: ContainerFiles,
    fresh: bool,
}

impl Collector {
    /// Nothing read yet.
    pub fn new(roots: Roots, cluster: watch::Receiver<Arc<ClusterState>>, identity: NodeIdentity, settings: &TelemetrySettings) -> Self {
        Self {
            reader: read::Reader::new(roots),
            tracker: Tracker::new(settings.figures),
            cluster,
            table: PodTable::default(),
            veth_prefix: settings.veth_prefix.clone(),
            encoder: Encoder::new(identity, settings.selection.clone()),
            files: ContainerFiles::new(),
            fresh: true,
        }
    }

    /// Reads everything once: the samples, and the documents made of them.
    ///
    /// # Errors
    /// When /proc does not tell the node's CPU time or memory; what else is missing is left out of the samples.
    pub fn collect(&mut self) -> Result<(Snapshot, Vec<String>), ReadError> {
        if self.fresh || self.cluster.has_changed().unwrap_or(false) {
            let state = Arc::clone(&self.cluster.borrow_and_update());
            self.table = self.table.refreshed(&state, &self.encoder.identity().node, &self.veth_prefix);
            self.fresh = false;
        }
        let snapshot = self.reader.pass(&mut self.tracker, &self.table, &self.files)?;
        let documents = self.encoder.documents(&snapshot);
        debug!(pods = snapshot.pods.len(), documents = documents.len(), "metric tick");
        Ok((snapshot, documents))
    }
}
