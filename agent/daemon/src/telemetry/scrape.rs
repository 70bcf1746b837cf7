//! Scrapes this node's annotated pods and turns their text into documents.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use hyper::header::{ACCEPT, HeaderValue};
use stanchion_core::cloud::LogEvent;
use stanchion_core::cluster::ClusterState;
use stanchion_core::metrics::scrape::{Rules, Scraper, targets};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::http::{Ask, Client, HttpError, Trust};
use super::wall_ms;

/// A reply of 10,000 series has about 1.5 MB.
const MAX_TEXT: usize = 8 << 20;
const WITHIN: Duration = Duration::from_secs(10);
/// Pods asked at once: their texts are in memory together.
const PARALLEL: usize = 4;

/// What became of scrapes, since the start.
#[derive(Debug, Default)]
pub struct ScrapeCounters {
    /// Answered with a text.
    pub done: AtomicU64,
    /// Not reached, or answered otherwise.
    pub failed: AtomicU64,
    /// Series left out: histograms, untyped, too many.
    pub dropped_series: AtomicU64,
}

/// What the task needs.
pub(super) struct Scrape {
    pub(super) rules: Rules,
    pub(super) node: String,
    pub(super) cluster_name: String,
    pub(super) cluster: watch::Receiver<Arc<ClusterState>>,
    pub(super) interval: Duration,
    pub(super) documents: mpsc::Sender<Vec<LogEvent>>,
    pub(super) counters: Arc<ScrapeCounters>,
    pub(super) shutdown: CancellationToken,
}

impl Scrape {
    /// Scrapes at each interval until the shutdown; a round that takes longer makes the next one skip.
    pub(super) async fn run(self) {
        let mut scraper = Scraper::new(self.rules);
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.shutdown.cancelled() => return,
            }
            let wanted = targets(&self.cluster.borrow(), &self.node, &self.cluster_name);
            scraper.keep(&wanted);
            let mut answers =
                stream::iter(wanted.into_iter().map(|target| async move { (fetch(&target.url).await, target) })).buffer_unordered(PARALLEL);
            while let Some((answer, target)) = answers.next().await {
                match answer {
                    Ok(text) => {
                        let wall_ms = wall_ms();
                        let scraped = scraper.documents(&target, &text, wall_ms);
                        self.counters.done.fetch_add(1, Ordering::Relaxed);
                        self.counters.dropped_series.fetch_add(scraped.dropped as u64, Ordering::Relaxed);
                        debug!(url = target.url, documents = scraped.documents.len(), dropped = scraped.dropped, "scraped");
                        let documents = scraped.documents.into_iter().map(|message| LogEvent { timestamp_ms: wall_ms, message });
                        // One pod's at a time: those of a round may be more than there is memory for.
                        tokio::select! {
                            _ = self.documents.send(documents.collect()) => {}
                            () = self.shutdown.cancelled() => return,
                        }
                    }
                    Err(error) => {
                        self.counters.failed.fetch_add(1, Ordering::Relaxed);
                        debug!(url = target.url, error = &error as &dyn std::error::Error, "cannot be scraped");
                    }
                }
            }
        }
    }
}

/// Why a pod was not scraped.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("cannot ask")]
    Http(#[from] HttpError),
    #[error("it answered {0}")]
    Status(hyper::StatusCode),
}

/// The text at a pod's URL.
pub(super) async fn fetch(url: &str) -> Result<String, FetchError> {
    let mut ask = Ask::get(url, MAX_TEXT, WITHIN);
    ask.headers.push((ACCEPT, HeaderValue::from_static("text/plain;version=0.0.4")));
    // Pods' certificates are for services' names, not for addresses: whoever has the pod's address is the pod.
    let reply = Client::new(Trust::Anyone).ask(ask).await?;
    if !reply.status.is_success() {
        return Err(FetchError::Status(reply.status));
    }
    Ok(String::from_utf8_lossy(&reply.body).into_owned())
}
