//! Connections of the fakes: plain or TLS, closed without a reply where a fault says so.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::http::request::Parts;
use axum::http::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::cloud::{Outcome, Spoilt};
use super::faults::ApiError;
use crate::breed::bred;

/// Longest request body that is read; PutLogEvents' largest is far below.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// The connection closes instead of a reply.
#[derive(Debug, thiserror::Error)]
#[error("the connection closes without a reply")]
pub(super) struct Dropped;

pub(super) type Reply = Result<Response<Body>, Dropped>;

/// Serves until the future is dropped, which closes every connection.
pub(super) async fn serve<H, F>(listener: TcpListener, tls: Option<TlsAcceptor>, handler: H) -> Infallible
where
    H: Fn(Parts, Bytes) -> F + Send + Sync + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    let endpoint = Endpoint { handler: Arc::new(handler) };
    let mut connections = JoinSet::new();
    loop {
        // A connection that its client has given up before is no reason to stop.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _no_delay_is_only_speed = stream.set_nodelay(true);
        let (endpoint, tls) = (endpoint.clone(), tls.clone());
        connections.spawn(async move {
            match tls {
                None => connection(stream, endpoint).await,
                Some(acceptor) => {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        connection(stream, endpoint).await;
                    }
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection<S, H, F>(stream: S, endpoint: Endpoint<H>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Parts, Bytes) -> F + Send + Sync + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    let service = TowerToHyperService::new(endpoint);
    // An error here is a fault that was asked for, or a client that went away.
    let _closed = Builder::new(TokioExecutor::new()).http1_only().serve_connection(TokioIo::new(stream), service).await;
}

struct Endpoint<H> {
    handler: Arc<H>,
}

impl<H> Clone for Endpoint<H> {
    fn clone(&self) -> Self {
        Self { handler: self.handler.clone() }
    }
}

impl<B, H, F> tower::Service<Request<B>> for Endpoint<H>
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
    H: Fn(Parts, Bytes) -> F + Send + Sync + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Dropped;
    type Future = Pin<Box<dyn Future<Output = Reply> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Dropped>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let handler = self.handler.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(Body::new(body), MAX_BODY).await.map_err(|_| Dropped)?;
            handler(parts, body).await
        })
    }
}

/// Plays an outcome: waits, closes, or answers in the service's own form.
pub(super) async fn play<R>(
    outcome: Outcome<R>,
    content_type: &str,
    render: impl FnOnce(&R) -> String,
    render_error: impl FnOnce(&ApiError) -> String,
) -> Reply {
    let Outcome { reply, delay, spoilt } = outcome;
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let (status, body) = match reply.ok_or(Dropped)? {
        Ok(reply) => (200, render(&reply)),
        Err(error) => (error.status, render_error(&error)),
    };
    let (status, body) = match spoilt {
        None => (status, body.into_bytes()),
        Some(Spoilt::Replaced(text)) => (200, text.into_bytes()),
        Some(Spoilt::Damaged(seed)) => (status, bred(&[body.into_bytes()], &mut StdRng::seed_from_u64(seed))),
    };
    Ok(response(status, content_type, body))
}

pub(super) fn response(status: u16, content_type: &str, body: impl Into<Body>) -> Response<Body> {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    if let Ok(value) = content_type.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    response
}

/// A header's text, empty when it is not there.
pub(super) fn header_text<'a>(parts: &'a Parts, name: &str) -> &'a str {
    parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}
