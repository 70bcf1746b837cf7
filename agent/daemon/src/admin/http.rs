//! The two HTTP listeners of aws-node: metrics on :61678, introspection on 127.0.0.1:61679.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::listen::Bounded;
use super::views::Views;
use stanchion_core::metrics::exposition::Format;

/// Where the introspection listener is, as `INTROSPECTION_BIND_ADDRESS` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// `127.0.0.1:61679`
    Tcp(SocketAddr),
    /// `unix:/path`
    Unix(PathBuf),
}

impl std::str::FromStr for Bind {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) => Ok(Self::Unix(PathBuf::from(path))),
            None => text.parse().map(Self::Tcp),
        }
    }
}

/// How long the text of the metrics is told again to those who ask: any pod may, and making it costs calls of the kernel.
const TOLD_AGAIN: Duration = Duration::from_secs(1);

/// Serves `/metrics`.
pub async fn serve_metrics(address: SocketAddr, views: Arc<Views>, shutdown: CancellationToken) {
    let recent = Recent::new(move |format| {
        let views = Arc::clone(&views);
        async move { views.metrics_text(format).await }
    });
    let metrics = |State(recent): State<Recent>, headers: HeaderMap| async move {
        let format = Format::accepted(headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()));
        match recent.text(format).await {
            Some(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
            None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    };
    let router = Router::new().route("/metrics", get(metrics)).with_state(recent);
    serve(&Bind::Tcp(address), router, shutdown).await;
}

/// A text, when it was made, and in which format.
type Made = Vec<(Format, Instant, Bytes)>;

/// The texts as they were made last.
#[derive(Clone)]
struct Recent {
    make: Arc<dyn Fn(Format) -> BoxFuture<'static, String> + Send + Sync>,
    made: Arc<Mutex<Made>>,
}

impl Recent {
    fn new<F: Future<Output = String> + Send + 'static>(make: impl Fn(Format) -> F + Send + Sync + 'static) -> Self {
        Self { make: Arc::new(move |format| Box::pin(make(format))), made: Arc::default() }
    }

    /// The text of a format, made now unless it was lately; `None` if it cannot be made. Whoever asks and leaves leaves it to the next one.
    async fn text(&self, format: Format) -> Option<Bytes> {
        let Self { make, made } = self.clone();
        let making = tokio::spawn(async move {
            // Held meanwhile: one makes it for all.
            let mut made = made.lock().await;
            if let Some((.., text)) = made.iter().find(|(of, at, _)| *of == format && at.elapsed() < TOLD_AGAIN) {
                return text.clone();
            }
            let text = Bytes::from(make(format).await);
            made.retain(|(of, ..)| *of != format);
            made.push((format, Instant::now(), text.clone()));
            text
        });
        making.await.ok()
    }
}

/// Serves aws-node's introspection paths and the status page.
pub async fn serve_introspection(bind: Bind, views: Arc<Views>, shutdown: CancellationToken) {
    serve(&bind, introspection(views), shutdown).await;
}

/// aws-node's paths, then ours. `/` is the list of them for a program and the status page for a browser.
const PATHS: [&str; 12] = [
    "/v1/enis",
    "/v1/eni-configs",
    "/v1/networkutils-env-settings",
    "/v1/ipamd-env-settings",
    "/v1/status",
    "/v1/pool",
    "/v1/endpoints",
    "/v1/conntrack",
    "/v1/logs",
    "/status",
    "/livez",
    "/readyz",
];

/// The routes of the introspection listener.
pub fn introspection(views: Arc<Views>) -> Router {
    type V = State<Arc<Views>>;
    Router::new()
        .route("/", get(|headers: HeaderMap| async move { if wants_page(&headers) { page() } else { axum::Json(PATHS).into_response() } }))
        .route("/status", get(|| async { page() }))
        .route("/v1/enis", get(|State(v): V| async move { json(v.aws_enis()) }))
        .route("/v1/eni-configs", get(|State(v): V| async move { json(v.eni_configs()) }))
        .route("/v1/networkutils-env-settings", get(|State(v): V| async move { json(Some(v.network_settings())) }))
        .route("/v1/ipamd-env-settings", get(|State(v): V| async move { json(Some(v.ipamd_settings())) }))
        .route("/v1/status", get(|State(v): V| async move { json(Some(v.status().await)) }))
        .route("/v1/pool", get(|State(v): V| async move { json(v.enis()) }))
        .route("/v1/endpoints", get(|State(v): V| async move { json(v.endpoints().await) }))
        .route("/v1/conntrack", get(|State(v): V| async move { json(v.conntrack().await) }))
        .route("/v1/logs", get(|State(v): V| async move { json(v.logs().await) }))
        .route("/livez", get(|State(v): V| async move { probe(v.alive().await) }))
        .route("/readyz", get(|State(v): V| async move { probe(v.ready()) }))
        .layer(axum::middleware::from_fn(only_this_node))
        .with_state(views)
}

/// A page of another origin may send the browser of somebody who forwards this port here under a name of its own (DNS
/// rebinding): only names of the node itself are answered.
async fn only_this_node(request: axum::extract::Request, next: axum::middleware::Next) -> axum::response::Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    // A Unix socket has no host; a forwarded port is localhost.
    if name.is_empty() || name == "localhost" || name.parse::<std::net::IpAddr>().is_ok() {
        return next.run(request).await;
    }
    (StatusCode::FORBIDDEN, "ask by address or as localhost\n").into_response()
}

fn wants_page(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).is_some_and(|accept| accept.contains("text/html"))
}

fn page() -> axum::response::Response {
    // Nothing but what is in the page and this listener's own documents.
    const POLICY: &str =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'";
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, POLICY)], include_str!("page.html"))
        .into_response()
}

fn probe(state: Result<(), String>) -> axum::response::Response {
    match state {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n").into_response(),
    }
}

fn json(value: Option<Value>) -> axum::response::Response {
    match value {
        Some(value) => axum::Json(value).into_response(),
        None => (StatusCode::NOT_FOUND, "this process does not run the network role\n").into_response(),
    }
}

/// `[::]` is every address of both families; on a node whose kernel has no IPv6, of the one that is there.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        outcome => outcome,
    }
}

/// Binds with growing pauses (the port may still be held by the agent that this one replaces) and serves until shutdown.
async fn serve(bind: &Bind, router: Router, shutdown: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let failed = match bind {
            Bind::Tcp(address) => match listen(*address).await {
                Ok(listener) => {
                    info!(%address, "HTTP listens");
                    let ended = shutdown.clone();
                    axum::serve(Bounded::new(listener), router.clone())
                        .with_graceful_shutdown(async move { ended.cancelled().await })
                        .await
                        .err()
                }
                Err(error) => Some(error),
            },
            Bind::Unix(path) => match super::socket::bind(path) {
                Ok(listener) => {
                    let ended = shutdown.clone();
                    axum::serve(Bounded::new(listener), router.clone())
                        .with_graceful_shutdown(async move { ended.cancelled().await })
                        .await
                        .err()
                }
                Err(error) => Some(std::io::Error::other(error)),
            },
        };
        let Some(error) = failed else { return };
        warn!(?bind, %error, ?pause, "HTTP cannot listen; tried again");
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(Duration::from_secs(60));
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    /// Names of pods, files and rules come from whoever may make them.
    #[test]
    fn the_page_makes_text_of_what_it_is_told() {
        let page = include_str!("page.html");
        for way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "setAttribute", "eval(", "Function("] {
            assert!(!page.contains(way), "{way} would make more than text of a name");
        }
        assert!(page.contains("textContent"));
    }

    /// However many ask, and leave before they are told.
    #[tokio::test(start_paused = true)]
    async fn a_text_is_made_once_a_second() {
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let made = Arc::clone(&count);
        let recent = Recent::new(move |format| {
            let number = made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                format!("{format:?} {number}")
            }
        });
        for second in 0..3 {
            for _ in 0..100 {
                let _left = tokio::time::timeout(Duration::from_micros(1), recent.text(Format::Prometheus)).await;
            }
            assert_eq!(recent.text(Format::Prometheus).await.unwrap(), format!("Prometheus {second}"));
            tokio::time::sleep(TOLD_AGAIN).await;
        }
        assert_eq!(recent.text(Format::OpenMetrics).await.unwrap(), "OpenMetrics 3");
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn another_host_name_is_refused() {
        let router = Router::new().route("/", get(|| async { "told" })).layer(axum::middleware::from_fn(only_this_node));
        for (host, status) in [
            ("127.0.0.1:61679", 200),
            ("[::1]:61679", 200),
            ("localhost:8080", 200),
            ("10.0.1.10:61679", 200),
            ("attacker.example:61679", 403),
            ("127.0.0.1.attacker.example", 403),
            ("localhost.attacker.example:80", 403),
        ] {
            let request = Request::builder().uri("/").header(header::HOST, host).body(axum::body::Body::empty()).unwrap();
            assert_eq!(router.clone().oneshot(request).await.unwrap().status(), status, "{host}");
        }
    }
}
