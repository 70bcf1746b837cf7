//! The aws-node that a node was switched from: while it ends, it still serves its plugin, holds addresses and writes the checkpoint.
//! Kubernetes ends the pods of one DaemonSet and starts those of another at the same time, and aws-node's entrypoint takes no
//! notice of SIGTERM, so the two live side by side for aws-node's whole grace period (ten seconds by its manifest). Of two agents
//! with the same addresses one gives out what the other holds; the one that comes waits.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tracing::{info, warn};

/// How often it is asked whether it still serves.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// How often a person is told what is waited for.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Until a listener on the loopback that does not answer is somebody else's.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// aws-node's own service among those of its health service.
const HEALTH_SERVICE: &str = "grpc.health.v1.aws-node";

/// Where aws-node serves its plugin.
#[derive(Clone, Debug)]
pub struct Predecessor {
    /// Since v1.23.0.
    pub socket: PathBuf,
    /// Before that.
    pub address: SocketAddr,
}

impl Predecessor {
    /// The places of a node whose checkpoint lies in `directory`.
    pub fn beside(directory: &std::path::Path) -> Self {
        Self { socket: directory.join("ipamd.sock"), address: SocketAddr::from((Ipv4Addr::LOCALHOST, 50_051)) }
    }

    /// Returns when none serves; true if one did before.
    pub async fn ended(&self) -> bool {
        let began = Instant::now();
        let mut said = None;
        while let Some(place) = self.serves().await {
            if said.is_none_or(|said: Instant| said.elapsed() >= SAY_EVERY) {
                said = Some(Instant::now());
                warn!(
                    place,
                    seconds = began.elapsed().as_secs(),
                    "aws-node still serves on this node; waiting for its end: keep its DaemonSet off this node"
                );
            }
            sleep(ASK_EVERY).await;
        }
        if said.is_some() {
            info!(seconds = began.elapsed().as_secs(), "aws-node has ended");
        }
        said.is_some()
    }

    /// Where one answers.
    async fn serves(&self) -> Option<String> {
        if UnixStream::connect(&self.socket).await.is_ok() {
            return Some(self.socket.display().to_string());
        }
        timeout(ANSWERS_WITHIN, self.serves_on_loopback()).await.unwrap_or(false).then(|| self.address.to_string())
    }

    /// Other programs like that port, too.
    async fn serves_on_loopback(&self) -> bool {
        let Ok(endpoint) = Endpoint::from_shared(format!("http://{}", self.address)) else { return false };
        let Ok(channel) = endpoint.connect().await else { return false };
        HealthClient::new(channel).check(HealthCheckRequest { service: HEALTH_SERVICE.to_owned() }).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::net::{TcpListener, UnixListener};
    use tokio_util::sync::CancellationToken;
    use tonic_health::ServingStatus;
    use tonic_health::server::health_reporter;

    use super::*;

    /// One whose two places are the test's own.
    async fn predecessor() -> (tempfile::TempDir, Predecessor, TcpListener) {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let predecessor = Predecessor { address: listener.local_addr().expect("its address"), ..Predecessor::beside(directory.path()) };
        (directory, predecessor, listener)
    }

    #[tokio::test]
    async fn one_that_serves_at_its_socket_is_waited_for_and_a_socket_that_it_left_is_not() {
        let (_directory, predecessor, port) = predecessor().await;
        drop(port);
        assert!(!predecessor.ended().await);
        let socket = UnixListener::bind(&predecessor.socket).expect("bound");
        let mut ended = Box::pin(predecessor.ended());
        tokio::select! {
            _ = &mut ended => panic!("it serves"),
            accepted = socket.accept() => drop(accepted.expect("it was asked")),
        }
        assert!(ended.as_mut().now_or_never().is_none());
        drop(socket);
        assert!(predecessor.socket.exists());
        assert!(ended.await);
    }

    #[tokio::test]
    async fn of_the_programs_on_its_port_only_aws_node_is_waited_for() {
        for (service, is_aws_nodes) in [("grpc.health.v1.aws-node", true), ("somebody.else", false)] {
            let (_directory, predecessor, port) = predecessor().await;
            let (reporter, health) = health_reporter();
            reporter.set_service_status(service, ServingStatus::Serving).await;
            let end = CancellationToken::new();
            let connections = tokio_stream::wrappers::TcpListenerStream::new(port);
            let served = tonic::transport::Server::builder()
                .add_service(health)
                .serve_with_incoming_shutdown(connections, end.clone().cancelled_owned());
            let served = tokio::spawn(served);
            assert_eq!(predecessor.serves().await.is_some(), is_aws_nodes, "{service}");
            end.cancel();
            served.await.expect("no panic").expect("served");
            assert!(!predecessor.ended().await);
        }
    }
}
