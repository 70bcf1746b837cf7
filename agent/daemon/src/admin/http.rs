//! The two HTTP listeners of aws-node: metrics on :61678, introspection on 127.0.0.1:61679.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

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

/// Serves `/metrics`.
pub async fn serve_metrics(address: SocketAddr, views: Arc<Views>, shutdown: CancellationToken) {
    let metrics = |State(views): State<Arc<Views>>, headers: HeaderMap| async move {
        let format = Format::accepted(headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()));
        ([(header::CONTENT_TYPE, format.content_type())], views.metrics_text(format).await).into_response()
    };
    let router = Router::new().route("/metrics", get(metrics)).with_state(views);
    serve(&Bind::Tcp(address), router, shutdown).await;
}

/// Serves aws-node's introspection paths and the status page.
pub async fn serve_introspection(bind: Bind, views: Arc<Views>, shutdown: CancellationToken) {
    const PATHS: [&str; 4] = ["/v1/enis", "/v1/eni-configs", "/v1/networkutils-env-settings", "/v1/ipamd-env-settings"];
    let router = Router::new()
        .route("/", get(|| async { axum::Json(PATHS) }))
        .route("/v1/enis", get(|State(v): State<Arc<Views>>| async move { json(v.enis()) }))
        .route("/v1/eni-configs", get(|State(v): State<Arc<Views>>| async move { json(v.eni_configs()) }))
        .route("/v1/networkutils-env-settings", get(|State(v): State<Arc<Views>>| async move { json(Some(v.config())) }))
        .route("/v1/ipamd-env-settings", get(|State(v): State<Arc<Views>>| async move { json(Some(v.config())) }))
        .with_state(views);
    serve(&bind, router, shutdown).await;
}

fn json(value: Option<Value>) -> axum::response::Response {
    match value {
        Some(value) => axum::Json(value).into_response(),
        None => (StatusCode::NOT_FOUND, "this process does not run the network role\n").into_response(),
    }
}

/// Binds with growing pauses (the port may still be held by the agent that this one replaces) and serves until shutdown.
async fn serve(bind: &Bind, router: Router, shutdown: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let failed = match bind {
            Bind::Tcp(address) => match tokio::net::TcpListener::bind(address).await {
                Ok(listener) => {
                    info!(%address, "HTTP listens");
                    let ended = shutdown.clone();
                    axum::serve(listener, router.clone()).with_graceful_shutdown(async move { ended.cancelled().await }).await.err()
                }
                Err(error) => Some(error),
            },
            Bind::Unix(path) => match super::socket::bind(path) {
                Ok(listener) => {
                    let ended = shutdown.clone();
                    axum::serve(listener, router.clone()).with_graceful_shutdown(async move { ended.cancelled().await }).await.err()
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
