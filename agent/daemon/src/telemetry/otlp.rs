//! Sends each tick's samples to an OTLP receiver.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, StatusCode, Uri};
use stanchion_core::metrics::model::Snapshot;
use stanchion_core::metrics::otlp::{self, OtlpEncoder};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::http::{Ask, Client, HttpError, Reply, Trust};

const WITHIN: Duration = Duration::from_secs(10);
/// A reply is a few bytes: what was rejected and why.
const MAX_REPLY: usize = 64 << 10;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What became of requests, since the start.
#[derive(Debug, Default)]
pub struct OtlpCounters {
    /// Taken by the receiver.
    pub sent: AtomicU64,
    /// Dropped: refused, or a newer tick came first.
    pub dropped: AtomicU64,
    /// Data points that the receiver left out of requests it took.
    pub rejected_points: AtomicU64,
}

/// Where requests go.
#[derive(Debug)]
pub struct OtlpSettings {
    /// `http://collector:4318`, or with the whole path.
    pub endpoint: String,
    /// For a receiver that wants an AWS signature.
    pub sign: Option<Signing>,
}

/// A request that is to be signed.
#[derive(Clone, Debug)]
pub struct ToSign {
    /// The whole URL.
    pub url: String,
    /// What the header `host` says.
    pub host: String,
    /// As it is sent.
    pub body: Bytes,
}

type Headers = Result<Vec<(String, String)>, Box<dyn std::error::Error + Send + Sync>>;

/// Gives the headers that sign a POST: the credentials are kept where the AWS clients are made.
pub struct Signing(Box<dyn Fn(ToSign) -> BoxFuture<'static, Headers> + Send + Sync>);

impl Signing {
    /// With this function.
    pub fn new<F: Future<Output = Headers> + Send + 'static>(sign: impl Fn(ToSign) -> F + Send + Sync + 'static) -> Self {
        Self(Box::new(move |request| Box::pin(sign(request))))
    }
}

impl std::fmt::Debug for Signing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signing")
    }
}

/// What the task needs.
pub(super) struct Otlp {
    pub(super) settings: OtlpSettings,
    pub(super) encoder: OtlpEncoder,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) counters: Arc<OtlpCounters>,
    pub(super) shutdown: CancellationToken,
}

/// Whether a request may be tried again.
enum Outcome {
    Taken { rejected_points: u64 },
    Refused,
    Later(Option<Duration>),
}

impl Otlp {
    /// Sends until the shutdown. A tick that cannot be sent before the next one is dropped: figures of a minute ago are worth less than
    /// those of now.
    pub(super) async fn run(mut self) {
        let base = self.settings.endpoint.trim_end_matches('/');
        let url = if base.ends_with("/v1/metrics") { base.to_owned() } else { format!("{base}/v1/metrics") };
        let mut client = Client::new(Trust::System);
        loop {
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = self.shutdown.cancelled() => return,
            }
            let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
            let requests: Vec<Bytes> = self.encoder.requests(&snapshot).into_iter().map(Bytes::from).collect();
            for (index, request) in requests.iter().enumerate() {
                if !self.send(&mut client, &url, request).await {
                    self.counters.dropped.fetch_add((requests.len() - index) as u64, Ordering::Relaxed);
                    break;
                }
            }
        }
    }

    /// Sends until it is taken; false when it was refused, a newer tick is there, or the agent ends.
    async fn send(&mut self, client: &mut Client, url: &str, request: &Bytes) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            let wait = match judge(url, self.exchange(client, url, request).await) {
                Outcome::Taken { rejected_points } => {
                    self.counters.sent.fetch_add(1, Ordering::Relaxed);
                    self.counters.rejected_points.fetch_add(rejected_points, Ordering::Relaxed);
                    return true;
                }
                Outcome::Refused => return false,
                Outcome::Later(after) => after.unwrap_or(pause).max(pause),
            };
            pause = (pause * 2).min(LONGEST_PAUSE);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = self.snapshots.changed() => {
                    self.snapshots.mark_changed();
                    return false;
                }
                () = self.shutdown.cancelled() => return false,
            }
        }
    }

    async fn exchange(&self, client: &mut Client, url: &str, request: &Bytes) -> Result<Reply, HttpError> {
        let mut headers =
            vec![(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf")), (CONTENT_ENCODING, HeaderValue::from_static("gzip"))];
        let body = compressed(request);
        if let Some(signing) = &self.settings.sign {
            headers.extend(signature(signing, url, &body).await?);
        }
        client.ask(Ask { method: Method::POST, url, headers, body, limit: MAX_REPLY, within: WITHIN }).await
    }
}

async fn signature(signing: &Signing, url: &str, body: &Bytes) -> Result<Vec<(HeaderName, HeaderValue)>, HttpError> {
    let authority = url.parse().ok().and_then(|uri: Uri| Some(uri.authority()?.to_string()));
    let host = authority.ok_or_else(|| HttpError::Url { url: url.to_owned() })?;
    let failed = |source| HttpError::Sign { to: url.to_owned(), source };
    let headers = (signing.0)(ToSign { url: url.to_owned(), host, body: body.clone() }).await.map_err(failed)?;
    let header = |(name, value): (String, String)| {
        let mut value = HeaderValue::try_from(value).map_err(|error| failed(error.into()))?;
        value.set_sensitive(true);
        Ok((HeaderName::try_from(name).map_err(|error| failed(error.into()))?, value))
    };
    headers.into_iter().map(header).collect()
}

/// <https://opentelemetry.io/docs/specs/otlp/#otlphttp-response>: 429, 502, 503 and 504 may be tried again, others not; points that the
/// receiver rejects of a request it takes must not be.
fn judge(url: &str, reply: Result<Reply, HttpError>) -> Outcome {
    match reply {
        Ok(reply) if reply.status.is_success() => {
            let (rejected_points, words) = otlp::rejected(&reply.body);
            if rejected_points > 0 || !words.is_empty() {
                warn!(url, rejected_points, words, "the OTLP receiver has something to say of the metrics it took");
            }
            Outcome::Taken { rejected_points }
        }
        Ok(reply) => {
            let status = reply.status;
            let retry = matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
            );
            warn!(url, %status, retry, "the OTLP receiver did not take the metrics");
            let after = reply.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_secs);
            if retry { Outcome::Later(after.map(|after| after.min(LONGEST_PAUSE))) } else { Outcome::Refused }
        }
        Err(error) => {
            warn!(url, error = &error as &dyn std::error::Error, "the OTLP receiver cannot be reached");
            if matches!(error, HttpError::Url { .. }) { Outcome::Refused } else { Outcome::Later(None) }
        }
    }
}

fn compressed(request: &Bytes) -> Bytes {
    use std::io::Write as _;
    let mut out = flate2::write::GzEncoder::new(Vec::with_capacity(request.len() / 4), flate2::Compression::fast());
    // Writing to memory cannot fail.
    let _written = out.write_all(request);
    out.finish().map_or_else(|_| request.clone(), Bytes::from)
}
