//! Asks the exporters of GPU and EBS drivers that run on the node; where none runs, nothing is asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stanchion_core::cluster::ClusterState;
use stanchion_core::metrics::devices::{Driver, ExporterReadings, exporters};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::scrape::{FetchError, fetch};

/// What became of asking, since the start.
#[derive(Debug, Default)]
pub struct ExporterCounters {
    /// Answered with a text.
    pub read: AtomicU64,
    /// Not reached, or answered otherwise.
    pub failed: AtomicU64,
}

/// Which exporters are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExporterSettings {
    /// dcgm-exporter, for GPUs.
    pub gpus: bool,
    /// The EBS CSI driver's node pod, for volumes.
    pub volumes: bool,
}

/// What the task needs.
pub(super) struct Exporters {
    pub(super) settings: ExporterSettings,
    pub(super) node: String,
    pub(super) cluster: watch::Receiver<Arc<ClusterState>>,
    pub(super) interval: Duration,
    pub(super) counters: Arc<ExporterCounters>,
    pub(super) publish: watch::Sender<Arc<ExporterReadings>>,
    pub(super) shutdown: CancellationToken,
}

impl Exporters {
    /// Asks at each interval until the shutdown.
    pub(super) async fn run(self) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut round, mut schemes) = (0, BTreeMap::new());
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.shutdown.cancelled() => return,
            }
            let mut found = exporters(&self.cluster.borrow(), &self.node);
            found.retain(|(driver, _)| match driver {
                Driver::Gpu => self.settings.gpus,
                Driver::Ebs => self.settings.volumes,
            });
            schemes.retain(|address, _| found.iter().any(|(_, there)| there == address));
            round += 1;
            let mut readings = ExporterReadings { round, ..ExporterReadings::default() };
            for (driver, address) in found {
                match ask(address, &mut schemes).await {
                    Ok(text) => {
                        self.counters.read.fetch_add(1, Ordering::Relaxed);
                        readings.add(driver, &text);
                    }
                    Err(error) => {
                        self.counters.failed.fetch_add(1, Ordering::Relaxed);
                        debug!(?driver, %address, error = &error as &dyn std::error::Error, "cannot be asked");
                    }
                }
            }
            self.publish.send_replace(Arc::new(readings));
        }
    }
}

/// An exporter's text: plain as NVIDIA's and the EBS driver's charts have it, or over TLS as the CloudWatch add-on has its
/// dcgm-exporter; what answered last is tried first.
async fn ask(address: SocketAddr, schemes: &mut BTreeMap<SocketAddr, &'static str>) -> Result<String, FetchError> {
    let first = *schemes.entry(address).or_insert("http");
    let outcome = fetch(&format!("{first}://{address}/metrics")).await;
    if outcome.is_ok() {
        return outcome;
    }
    let second = if first == "http" { "https" } else { "http" };
    let text = fetch(&format!("{second}://{address}/metrics")).await.or(outcome)?;
    schemes.insert(address, second);
    Ok(text)
}
