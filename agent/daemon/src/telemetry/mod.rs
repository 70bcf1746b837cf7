//! The metric tick: one pass over /proc, /sys and the cgroups, samples, documents to CloudWatch Logs, Prometheus text.
//!
//! | task | input | output | owns | on panic |
//! |---|---|---|---|---|
//! | tick | clock, cluster watch, kernel files | [`Snapshot`] on a watch channel, documents to the shipping task | last counters, pod table | the supervisor restarts the agent's telemetry; counters start anew |
//! | ship | documents | PutLogEvents | documents not yet taken | as above; kept documents are lost |
//! | kubelet | the kubelet's summary | containers' own files on a watch channel | – | as above |
//! | exporters | GPUs and volumes, from the exporters of their drivers | their figures on a watch channel | number of the round | as above |
//! | OTLP | snapshots | requests to a receiver | time of the last tick | as above |
//! | scrape | annotated pods | documents to a shipping task of its own | last counters | as above; counters start anew |
//! | statsd | packets | documents to a shipping task of its own | what came since the last tick | as above; that is lost |
//!
//! All but the first two run only where [`Extras`] ask for them.
//!
//! [`watch_allowances`] is a task of the network role, for a node whose telemetry is a process of its own: input the ENA counters,
//! output alarms, owns the counters of the last look; on panic no more events of that kind.
//!
//! A tick that comes late is skipped, never queued: rates are over the time that passed.

mod allowances;
mod cgroups;
mod exporters;
mod http;
mod kubelet;
mod otlp;
mod prometheus;
mod read;
mod scrape;
pub(crate) mod ship;
mod statsd;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use stanchion_core::branch::VethNames;
use stanchion_core::cloud::{LogEvent, LogGroupSpec, LogSink};
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::metrics::devices::ExporterReadings;
use stanchion_core::metrics::insights::{Encoder, NodeIdentity, Selection};
use stanchion_core::metrics::log_meter::LogMeter;
use stanchion_core::metrics::model::{AllowanceAlarm, Snapshot};
use stanchion_core::metrics::otlp::OtlpEncoder;
use stanchion_core::metrics::pods::PodTable;
use stanchion_core::metrics::scrape::Rules;
use stanchion_core::metrics::track::{ContainerFiles, Figures, PodCounters, Tracker};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::logs::LogsHandle;
use crate::netpol::{EndpointCounters, NetpolHandle};

pub use allowances::watch as watch_allowances;
pub use exporters::{ExporterCounters, ExporterSettings};
pub use kubelet::{KubeletCounters, KubeletSettings};
pub use otlp::{OtlpCounters, OtlpSettings, Signing, ToSign};
pub use prometheus::{Sources, render};
pub use read::{ReadError, Roots};
pub use scrape::ScrapeCounters;
pub use ship::ShipCounters;
pub use statsd::StatsdCounters;

/// Ticks whose documents wait for the shipping task; that one takes them even while it waits for CloudWatch, so more than one
/// or two means that it hangs, and the tick drops rather than waits.
const WAITING_TICKS: usize = 4;
/// For what other parts counted; without an answer a tick goes without it.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Alarms that a reader may be behind; there are at most five an interface and tick.
const WAITING_ALARMS: usize = 64;

/// What is told and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// Between ticks; Container Insights expects a minute.
    pub interval: Duration,
    /// Send Container Insights documents; without it the ticks serve Prometheus and `stanchion top` only.
    pub documents: bool,
    /// Which documents and metrics.
    pub selection: Selection,
    /// Ours, or the CloudWatch agent's with its errors.
    pub figures: Figures,
    /// How pods' host interfaces are named.
    pub veths: VethNames,
    /// How log groups are made.
    pub group_spec: LogGroupSpec,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(60),
            documents: true,
            selection: Selection::default(),
            figures: Figures::default(),
            veths: VethNames::default(),
            group_spec: LogGroupSpec::default(),
        }
    }
}

/// What runs besides the tick, each only if it is asked for.
#[derive(Debug, Default)]
pub struct Extras {
    /// Containers' own files from the kubelet; the documents of type `ContainerFS`.
    pub kubelet: Option<KubeletSettings>,
    /// GPUs and volumes, from their drivers' exporters.
    pub exporters: Option<ExporterSettings>,
    /// An OTLP/HTTP receiver.
    pub otlp: Option<OtlpSettings>,
    /// Pods with `prometheus.io` annotations, and what becomes a metric of what they tell.
    pub scrape: Option<Rules>,
    /// A statsd listener.
    pub statsd: Option<SocketAddr>,
}

/// What the extras counted, since the start.
#[derive(Debug, Default)]
pub struct ExtraCounters {
    /// Asking the kubelet.
    pub kubelet: Arc<KubeletCounters>,
    /// Asking the exporters of GPUs and volumes.
    pub exporters: Arc<ExporterCounters>,
    /// Telling the OTLP receiver.
    pub otlp: Arc<OtlpCounters>,
    /// Scraping pods.
    pub scrape: Arc<ScrapeCounters>,
    /// Statsd packets.
    pub statsd: Arc<StatsdCounters>,
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
    /// Counts packets that policy dropped, where the network role runs too.
    pub netpol: Option<NetpolHandle>,
    /// Counts bytes of logs, where log shipping runs too.
    pub logs: Option<LogsHandle>,
    /// What runs besides.
    pub extras: Extras,
    /// Ends the tasks.
    pub shutdown: CancellationToken,
}

/// Readers' end of telemetry. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TelemetryHandle {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    shipped: Arc<ShipCounters>,
    ticks: Arc<TickCounters>,
    extras: Arc<ExtraCounters>,
    alarms: broadcast::Sender<AllowanceAlarm>,
}

/// What became of ticks, since the start.
#[derive(Debug, Default)]
pub struct TickCounters {
    /// Gave samples.
    pub done: AtomicU64,
    /// Could not read the kernel's figures.
    pub failed: AtomicU64,
    /// CPU time of the last one, microseconds.
    pub cpu_us: AtomicU64,
}

/// Telemetry on one line, for `stanchion status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TelemetryStatus {
    /// Milliseconds since 1970 of the last tick; 0 before the first.
    pub last_tick_ms: i64,
    /// Ticks that gave samples.
    pub ticks: u64,
    /// Ticks that failed.
    pub failed_ticks: u64,
    /// CPU time of the last tick, microseconds.
    pub tick_cpu_us: u64,
    /// Documents that CloudWatch took.
    pub documents_sent: u64,
    /// Documents dropped.
    pub documents_dropped: u64,
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

    /// What became of ticks.
    pub fn ticks(&self) -> &TickCounters {
        &self.ticks
    }

    /// What the extras counted.
    pub fn extras(&self) -> &ExtraCounters {
        &self.extras
    }

    /// Notice of each network allowance of the instance that was exceeded since the tick before.
    pub fn allowance_alarms(&self) -> broadcast::Receiver<AllowanceAlarm> {
        self.alarms.subscribe()
    }

    /// All of it on one line.
    pub fn status(&self) -> TelemetryStatus {
        TelemetryStatus {
            last_tick_ms: self.snapshot.borrow().wall_ms,
            ticks: self.ticks.done.load(Ordering::Relaxed),
            failed_ticks: self.ticks.failed.load(Ordering::Relaxed),
            tick_cpu_us: self.ticks.cpu_us.load(Ordering::Relaxed),
            documents_sent: self.shipped.sent.load(Ordering::Relaxed),
            documents_dropped: self.shipped.dropped.load(Ordering::Relaxed),
        }
    }
}

/// Starts the tasks. The join handle ends when all have.
pub fn spawn<S: LogSink>(parts: TelemetryParts<S>) -> (TelemetryHandle, JoinHandle<()>) {
    let TelemetryParts { sink, cluster, roots, identity, settings, netpol, logs, extras, shutdown } = parts;
    let (publish, snapshot) = watch::channel(Arc::default());
    let (alarms, _) = broadcast::channel(WAITING_ALARMS);
    let (shipped, ticks) = (Arc::new(ShipCounters::default()), Arc::new(TickCounters::default()));
    let counters = Arc::new(ExtraCounters::default());
    let mut tasks: Vec<Pin<Box<dyn Future<Output = ()> + Send>>> = Vec::new();
    let mut ship_to = |group: String| {
        let (documents, received) = mpsc::channel(WAITING_TICKS);
        let to = ship::Destination { group, stream: identity.node.clone(), spec: settings.group_spec.clone(), emf: true };
        let task = ship::run(Arc::clone(&sink), to, received, Arc::clone(&shipped), shutdown.clone());
        tasks.push(Box::pin(task));
        documents
    };
    let documents = ship_to(identity.log_group("performance"));
    let scraped = extras.scrape.map(|rules| (rules, ship_to(identity.log_group("prometheus"))));
    let statsd = extras.statsd.map(|address| (address, ship_to(identity.log_group("statsd"))));
    let mut collector = Collector::new(roots, cluster.clone(), identity.clone(), &settings);
    if let Some(kubelet) = extras.kubelet {
        let (publish, files) = watch::channel(Arc::default());
        collector.files = Some(files);
        let (node, counters) = (identity.node.clone(), Arc::clone(&counters.kubelet));
        let (cluster, interval, shutdown) = (cluster.clone(), settings.interval, shutdown.clone());
        tasks.push(Box::pin(kubelet::Kubelet { settings: kubelet, node, cluster, interval, counters, publish, shutdown }.run()));
    }
    if let Some(asked) = extras.exporters {
        let (publish, exported) = watch::channel(Arc::default());
        collector.exported = Some(exported);
        let (node, counters) = (identity.node.clone(), Arc::clone(&counters.exporters));
        let (cluster, interval, shutdown) = (cluster.clone(), settings.interval, shutdown.clone());
        tasks.push(Box::pin(exporters::Exporters { settings: asked, node, cluster, interval, counters, publish, shutdown }.run()));
    }
    if let Some(receiver) = extras.otlp {
        let encoder = OtlpEncoder::new(&identity, env!("CARGO_PKG_VERSION"));
        let (snapshots, counters) = (snapshot.clone(), Arc::clone(&counters.otlp));
        tasks.push(Box::pin(otlp::Otlp { settings: receiver, encoder, snapshots, counters, shutdown: shutdown.clone() }.run()));
    }
    let (node, cluster_name, interval) = (identity.node, identity.cluster, settings.interval);
    if let Some((rules, documents)) = scraped {
        let (node, cluster_name, counters) = (node.clone(), cluster_name.clone(), Arc::clone(&counters.scrape));
        tasks.push(Box::pin(
            scrape::Scrape { rules, node, cluster_name, cluster, interval, documents, counters, shutdown: shutdown.clone() }.run(),
        ));
    }
    if let Some((address, documents)) = statsd {
        let counters = Arc::clone(&counters.statsd);
        tasks.push(Box::pin(
            statsd::Listener { address, node, cluster_name, interval, documents, counters, shutdown: shutdown.clone() }.run(),
        ));
    }
    let handle =
        TelemetryHandle { snapshot, shipped: Arc::clone(&shipped), ticks: Arc::clone(&ticks), extras: counters, alarms: alarms.clone() };
    let ticker = Ticker { interval, publish, documents, shipped, ticks, netpol, logs, log_meter: LogMeter::default(), alarms, shutdown };
    tasks.push(Box::pin(ticker.run(collector)));
    let task = tokio::spawn(async move {
        futures_util::future::join_all(tasks).await;
    });
    (handle, task)
}

/// The tick task.
struct Ticker {
    interval: Duration,
    publish: watch::Sender<Arc<Snapshot>>,
    documents: mpsc::Sender<Vec<LogEvent>>,
    shipped: Arc<ShipCounters>,
    ticks: Arc<TickCounters>,
    netpol: Option<NetpolHandle>,
    logs: Option<LogsHandle>,
    log_meter: LogMeter,
    alarms: broadcast::Sender<AllowanceAlarm>,
    shutdown: CancellationToken,
}

impl Ticker {
    /// Ticks until the shutdown. The first pass only sets the counters' baseline.
    async fn run(mut self, mut collector: Collector) {
        let phase = spread(&collector.encoder.identity().node, self.interval);
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + self.interval + phase, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut first = true;
        loop {
            if !first {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = self.shutdown.cancelled() => return,
                }
            }
            collector.pod_counters = self.pod_counters().await;
            // The kernel answers these reads at once, but a file system that hangs must not take a worker thread with it.
            let pass = tokio::task::spawn_blocking(move || {
                let before = thread_cpu();
                let outcome = collector.collect();
                (collector, outcome, thread_cpu().saturating_sub(before))
            });
            let (returned, outcome, cpu) = match pass.await.map_err(JoinError::try_into_panic) {
                Ok(done) => done,
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                // The runtime ends.
                Err(Err(_)) => return,
            };
            collector = returned;
            self.ticks.cpu_us.store(u64::try_from(cpu.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
            match outcome {
                Ok((snapshot, messages)) => {
                    self.ticks.done.fetch_add(1, Ordering::Relaxed);
                    let timestamp_ms = snapshot.wall_ms;
                    for alarm in &snapshot.alarms {
                        let AllowanceAlarm { interface, allowance, packets } = alarm;
                        warn!(%interface, allowance, packets, "the instance's network allowance was exceeded");
                        // Nobody may be listening.
                        let _heard = self.alarms.send(alarm.clone());
                    }
                    self.publish.send_replace(Arc::new(snapshot));
                    if !first && !messages.is_empty() {
                        self.send(timestamp_ms, messages);
                    }
                }
                Err(error) => {
                    self.ticks.failed.fetch_add(1, Ordering::Relaxed);
                    warn!(error = &error as &dyn std::error::Error, "no metrics this time");
                }
            }
            first = false;
        }
    }

    fn send(&self, timestamp_ms: i64, messages: Vec<String>) {
        let count = messages.len() as u64;
        let events = messages.into_iter().map(|message| LogEvent { timestamp_ms, message }).collect();
        if self.documents.try_send(events).is_err() {
            self.shipped.dropped.fetch_add(count, Ordering::Relaxed);
            warn!(documents = count, "metric documents dropped: the shipping task does not take them");
        }
    }

    /// What the other parts counted for each pod.
    async fn pod_counters(&mut self) -> HashMap<PodName, PodCounters> {
        let mut counters: HashMap<PodName, PodCounters> = HashMap::new();
        if let Some(netpol) = &self.netpol {
            let snapshot = netpol.snapshot().await;
            let denied = |counters: &EndpointCounters| counters.ingress_denied.packets + counters.egress_denied.packets;
            for endpoint in &snapshot.endpoints {
                counters.entry(endpoint.pod.clone()).or_default().denied = Some(denied(&endpoint.counters));
            }
        }
        let logs = async {
            match &self.logs {
                Some(logs) => logs.snapshot().await,
                None => None,
            }
        };
        // A log storm must not hold up the tick.
        if let Ok(Some(snapshot)) = tokio::time::timeout(ANSWER_WITHIN, logs).await {
            let files = snapshot.files.into_iter().map(|file| (file.path, PodName::new(file.namespace, file.pod), file.offset));
            for (pod, bytes) in self.log_meter.look(files) {
                counters.entry(pod.clone()).or_default().log_bytes = Some(*bytes);
            }
        }
        counters
    }
}

/// Milliseconds since 1970.
fn wall_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
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
    veths: VethNames,
    encoder: Encoder,
    files: Option<watch::Receiver<Arc<ContainerFiles>>>,
    exported: Option<watch::Receiver<Arc<ExporterReadings>>>,
    pod_counters: HashMap<PodName, PodCounters>,
    encode: bool,
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
            veths: settings.veths.clone(),
            encoder: Encoder::new(identity, settings.selection.clone()),
            files: None,
            exported: None,
            pod_counters: HashMap::new(),
            encode: settings.documents,
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
            self.table = self.table.refreshed(&state, &self.encoder.identity().node, &self.veths);
            self.fresh = false;
        }
        let files = self.files.as_ref().map(|files| Arc::clone(&files.borrow())).unwrap_or_default();
        let exported = self.exported.as_ref().map(|exported| Arc::clone(&exported.borrow())).unwrap_or_default();
        let snapshot = self.reader.pass(&mut self.tracker, &self.table, &files, &exported, &self.pod_counters)?;
        let documents = if self.encode { self.encoder.documents(&snapshot) } else { Vec::new() };
        debug!(pods = snapshot.pods.len(), documents = documents.len(), "metric tick");
        Ok((snapshot, documents))
    }
}
