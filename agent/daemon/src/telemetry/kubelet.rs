//! Asks the kubelet for what the kernel does not tell: the disk use of containers.
//!
//! Without it (no service account, no permission, an unreachable port) everything else goes on and the documents of type
//! `ContainerFS` are absent.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderValue};
use stanchion_core::cluster::ClusterState;
use stanchion_core::metrics::kubelet::container_files;
use stanchion_core::metrics::track::ContainerFiles;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::http::{Ask, Client, HttpError, Trust};

/// A summary of 250 pods has about 2 MB.
const MAX_SUMMARY: usize = 32 << 20;
const WITHIN: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Asks missed in a row after which old figures are taken back.
const STALE_AFTER: u32 = 3;

/// How the kubelet is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletSettings {
    /// `https://10.0.0.7:10250`; empty: the node's internal address. With `http://` (the read-only port) no token is needed or shown.
    pub url: String,
    /// Take any certificate: clusters whose kubelets sign their own.
    pub insecure: bool,
    /// The service account's token and CA are here.
    pub service_account: PathBuf,
}

impl Default for KubeletSettings {
    fn default() -> Self {
        Self { url: String::new(), insecure: false, service_account: "/var/run/secrets/kubernetes.io/serviceaccount".into() }
    }
}

impl KubeletSettings {
    /// The kubelet's read-only port: it wants no token, and would be shown it in the clear.
    fn is_open(&self) -> bool {
        self.url.starts_with("http://")
    }
}

/// What became of asking, since the start.
#[derive(Debug, Default)]
pub struct KubeletCounters {
    /// Summaries read.
    pub read: AtomicU64,
    /// Asked in vain.
    pub failed: AtomicU64,
}

/// Why there is no summary.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("the address of node {node} is not known yet")]
    NoAddress { node: String },
    #[error("cannot read the service account's token {}", path.display())]
    Token { path: PathBuf, source: std::io::Error },
    #[error("the service account's token {} is no text for a header", path.display())]
    OddToken { path: PathBuf },
    #[error("cannot ask the kubelet")]
    Http(#[from] HttpError),
    #[error("the kubelet answered {status}: the service account needs `get` on nodes/stats")]
    Refused { status: StatusCode },
    #[error("the kubelet answered {status}")]
    Status { status: StatusCode },
    #[error("the kubelet's summary cannot be read")]
    Summary(#[source] serde_json::Error),
}

/// What the task needs.
pub(super) struct Kubelet {
    pub(super) settings: KubeletSettings,
    pub(super) node: String,
    pub(super) cluster: watch::Receiver<Arc<ClusterState>>,
    pub(super) interval: Duration,
    pub(super) counters: Arc<KubeletCounters>,
    pub(super) publish: watch::Sender<Arc<ContainerFiles>>,
    pub(super) shutdown: CancellationToken,
}

impl Kubelet {
    /// Asks until the shutdown, with growing pauses while it fails.
    pub(super) async fn run(self) {
        if !self.settings.is_open() && !self.settings.service_account.join("token").exists() {
            info!(
                service_account = %self.settings.service_account.display(),
                "no service account: the kubelet is not asked, there are no figures of containers' file systems"
            );
            return;
        }
        let trust = if self.settings.insecure { Trust::Anyone } else { Trust::File(self.settings.service_account.join("ca.crt")) };
        let mut client = Client::new(trust);
        let first_pause = FIRST_PAUSE.min(self.interval);
        let (mut pause, mut failures, mut last_told) = (first_pause, 0u32, String::new());
        loop {
            let wait = match self.ask(&mut client).await {
                Ok(files) => {
                    self.counters.read.fetch_add(1, Ordering::Relaxed);
                    self.publish.send_replace(Arc::new(files));
                    (pause, failures) = (first_pause, 0);
                    last_told.clear();
                    self.interval
                }
                Err(error) => {
                    self.counters.failed.fetch_add(1, Ordering::Relaxed);
                    // The CA may have been exchanged.
                    client.forget_certificates();
                    failures += 1;
                    if failures == STALE_AFTER {
                        self.publish.send_replace(Arc::default());
                    }
                    let text = error.to_string();
                    if text != last_told {
                        warn!(error = &error as &dyn std::error::Error, "no figures of containers' file systems");
                        last_told = text;
                    }
                    let wait = pause.min(LONGEST_PAUSE);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    async fn ask(&self, client: &mut Client) -> Result<ContainerFiles, AskError> {
        let base = match self.settings.url.trim_end_matches('/') {
            "" => self.node_url()?,
            url => url.to_owned(),
        };
        let url = format!("{base}/stats/summary");
        let mut ask = Ask::get(&url, MAX_SUMMARY, WITHIN);
        if !self.settings.is_open() {
            ask.headers.push((AUTHORIZATION, self.bearer().await?));
        }
        let reply = client.ask(ask).await?;
        match reply.status {
            StatusCode::OK => container_files(&reply.body).map_err(AskError::Summary),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Err(AskError::Refused { status }),
            status => Err(AskError::Status { status }),
        }
    }

    /// The service account's token; read each time, because the kubelet replaces it every hour.
    async fn bearer(&self) -> Result<HeaderValue, AskError> {
        let path = self.settings.service_account.join("token");
        let token = tokio::fs::read_to_string(&path).await.map_err(|source| AskError::Token { path: path.clone(), source })?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| AskError::OddToken { path })?;
        bearer.set_sensitive(true);
        Ok(bearer)
    }

    /// The address that the kubelet's certificate names.
    fn node_url(&self) -> Result<String, AskError> {
        let cluster = self.cluster.borrow();
        let addresses = cluster.nodes.get(&self.node).map(|node| node.status.addresses.as_slice()).unwrap_or_default();
        let internal = addresses.iter().filter(|address| address.kind == "InternalIP");
        let address = internal.filter_map(|address| address.address.parse::<IpAddr>().ok()).next();
        match address {
            Some(IpAddr::V4(address)) => Ok(format!("https://{address}:10250")),
            Some(IpAddr::V6(address)) => Ok(format!("https://[{address}]:10250")),
            None => Err(AskError::NoAddress { node: self.node.clone() }),
        }
    }
}
