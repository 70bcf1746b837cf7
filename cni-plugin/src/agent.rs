//! The connection to the agent: one, with one deadline for everything.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf};
use stanchion_proto::cni_client::CniClient;
use stanchion_proto::{DelNetworkReply, DelNetworkRequest, Sandbox};
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The agent, as long as the deadline has not passed.
pub(crate) struct Agent {
    client: CniClient<Channel>,
    deadline: Instant,
    socket: PathBuf,
}

impl Agent {
    /// Connects; everything that is asked must be answered within `patience`.
    pub(crate) async fn connect(socket: &Path, patience: Duration) -> Result<Self, CniError> {
        let deadline = Instant::now() + patience;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is a formality: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://agent");
        match tokio::time::timeout_at(deadline, endpoint.connect_with_connector(connector)).await {
            Ok(Ok(channel)) => Ok(Self { client: CniClient::new(channel), deadline, socket: socket.to_owned() }),
            Ok(Err(error)) => Err(away(socket, &chain(&error))),
            Err(_) => Err(away(socket, "no answer to the connection")),
        }
    }

    /// One call, within what is left of the time.
    pub(crate) async fn call<T>(
        &mut self,
        what: &'static str,
        call: impl AsyncFnOnce(&mut CniClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, CniError> {
        match tokio::time::timeout_at(self.deadline, call(&mut self.client)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(refused(&self.socket, what, &status)),
            Err(_) => Err(CniError::new(ErrorCode::TryAgain, format!("{what}: the agent did not answer in time"))),
        }
    }

    /// What is left of the time.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Releases what the sandbox holds.
    pub(crate) async fn release(&mut self, sandbox: Sandbox, reason: &str) -> Result<DelNetworkReply, CniError> {
        let request = DelNetworkRequest { sandbox: Some(sandbox), reason: reason.to_owned(), plugin_version: plugin_version() };
        self.call("release the pod's addresses", async |client| client.del_network(request).await).await
    }
}

/// Who asks, in the protocol's words.
pub(crate) fn sandbox(invocation: &Invocation, conf: &NetConf) -> Sandbox {
    Sandbox {
        network_name: conf.name.clone(),
        container_id: invocation.container_id.clone(),
        if_name: invocation.if_name.clone(),
        pod_namespace: invocation.pod.namespace.clone(),
        pod_name: invocation.pod.name.clone(),
        pod_uid: invocation.pod_uid.clone(),
        netns: invocation.netns.as_deref().map(|path| path.display().to_string()).unwrap_or_default(),
    }
}

pub(crate) fn plugin_version() -> String {
    stanchion_proto::PROTOCOL_VERSION.to_owned()
}

fn away(socket: &Path, why: &str) -> CniError {
    let socket = socket.display();
    CniError::new(ErrorCode::TryAgain, format!("the stanchion agent does not answer at {socket} ({why}): is its pod running on this node?"))
}

fn refused(socket: &Path, what: &str, status: &Status) -> CniError {
    match status.code() {
        // The connection broke, or never was.
        Code::Unavailable if status.message().is_empty() || std::error::Error::source(status).is_some() => away(socket, status.message()),
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Aborted => {
            CniError::new(ErrorCode::TryAgain, format!("{what}: {}", status.message()))
        }
        Code::InvalidArgument => CniError::new(ErrorCode::InvalidEnvironment, format!("{what}: {}", status.message())),
        code => CniError::new(ErrorCode::Io, format!("{what}: {} ({code:?})", status.message())),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
