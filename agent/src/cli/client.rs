//! The connection to the agent's socket.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use stanchion_proto::debug_client::DebugClient;
use tonic::transport::{Channel, Endpoint};

/// Where the agent is, and how to show what it says.
#[derive(clap::Args, Clone)]
pub(crate) struct Connection {
    /// The agent's socket
    #[arg(long, global = true, default_value = stanchion_proto::DEFAULT_SOCKET, env = "STANCHION_SOCKET")]
    pub(crate) socket: PathBuf,
    /// table for people, json for scripts
    #[arg(short, long, global = true, value_parser = ["table", "json"], default_value = "table")]
    pub(crate) output: String,
    /// Ask again every so many seconds (--watch=5) until interrupted
    #[arg(short, long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "2", value_name = "SECONDS",
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) watch: Option<u16>,
}

/// Connects, or says what to do.
pub(crate) async fn connect(socket: &Path) -> Result<DebugClient<Channel>> {
    let path = socket.to_owned();
    // The address is never looked at: the connector goes to the socket.
    let channel = Endpoint::from_static("http://agent.invalid")
        .connect_timeout(std::time::Duration::from_secs(5))
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| {
            format!("no agent answers at {}: is it running on this node, and are you root? (--socket names another one)", socket.display())
        })?;
    Ok(DebugClient::new(channel))
}

/// Runs one question on a small runtime.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?.block_on(future)
}
