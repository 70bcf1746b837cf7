//! Serves the plugin's frames on the socket that also carries gRPC, see [`frame`].

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use prost::Message;
use stanchion_proto::cni_server::Cni;
use stanchion_proto::frame::{self, HEADER, MAGIC, Method};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::debug;

/// gRPC connections that wait for the server to take them up: people and tools, a few at a time.
const GRPC_BACKLOG: usize = 16;
/// A connection that says nothing for this long is closed. The plugin speaks at once; between its two calls it makes a veth.
const SILENCE: Duration = Duration::from_secs(60);

/// Takes the plugin's connections out of a stream of connections and serves them; the others, which are gRPC's, are passed on.
///
/// Ends when `connections` ends; calls that were begun are ended by the runtime, as the plugin's deadline would.
pub fn take_plugins<T: Cni>(
    connections: impl Stream<Item = io::Result<UnixStream>> + Send + 'static,
    service: T,
) -> impl Stream<Item = io::Result<UnixStream>> {
    let service = Arc::new(service);
    let (grpc, passed_on) = mpsc::channel(GRPC_BACKLOG);
    tokio::spawn(async move {
        let mut connections = std::pin::pin!(connections);
        // With the server's end nobody is taken up any more.
        while let Some(connection) = tokio::select! { biased; () = grpc.closed() => None, next = connections.next() => next } {
            let Ok(stream) = connection else { continue };
            let (service, grpc) = (Arc::clone(&service), grpc.clone());
            tokio::spawn(async move {
                match speaks_frames(&stream).await {
                    Ok(false) => drop(grpc.send(Ok(stream)).await),
                    Ok(true) => {
                        if let Err(error) = serve(stream, &*service).await {
                            debug!(%error, "a plugin's connection ended");
                        }
                    }
                    Err(error) => debug!(%error, "a connection that said nothing"),
                }
            });
        }
    });
    ReceiverStream::new(passed_on)
}

async fn speaks_frames(stream: &UnixStream) -> io::Result<bool> {
    let first = tokio::time::timeout(SILENCE, peek(stream)).await??;
    first.map(|first| first == MAGIC[0]).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// The next byte, without taking it; `None` at the end.
async fn peek(stream: &UnixStream) -> io::Result<Option<u8>> {
    let look = || {
        let mut first = [0];
        match recv(stream.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(first[0])),
            Err(Errno::EAGAIN) => Err(io::ErrorKind::WouldBlock.into()),
            Err(errno) => Err(errno.into()),
        }
    };
    stream.async_io(Interest::READABLE, look).await
}

/// Returns when the plugin has gone. It says nothing while it waits for a reply; if it does, its next request is served first.
async fn hung_up(stream: &UnixStream) {
    if matches!(peek(stream).await, Ok(Some(_))) {
        std::future::pending::<()>().await;
    }
}

/// One connection until its plugin closes it.
async fn serve<T: Cni>(mut stream: UnixStream, service: &T) -> io::Result<()> {
    let mut magic = [0; MAGIC.len()];
    tokio::time::timeout(SILENCE, stream.read_exact(&mut magic)).await??;
    if magic != MAGIC {
        let status = Status::unimplemented("this agent does not know that version of the plugin: replace /opt/cni/bin/stanchion-cni");
        return stream.write_all(&frame::encode_error(&status)).await;
    }
    loop {
        let mut header = [0; HEADER];
        match tokio::time::timeout(SILENCE, stream.read_exact(&mut header)).await? {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read.map(|_| ())?,
        }
        let (method, length) = match frame::header(header) {
            Ok(header) => header,
            // The connection's frames cannot be told apart any more.
            Err(status) => return stream.write_all(&frame::encode_error(&status)).await,
        };
        let mut body = vec![0; length];
        tokio::time::timeout(SILENCE, stream.read_exact(&mut body)).await??;
        // Nobody waits for an address any more: it must not be kept. Looked at first, as the DEL that follows a killed ADD may have been
        // served already.
        let reply = tokio::select! {
            biased;
            () = hung_up(&stream) => return Ok(()),
            reply = answer(service, method, &body) => reply,
        };
        stream.write_all(&reply.unwrap_or_else(|status| frame::encode_error(&status))).await?;
    }
}

async fn answer<T: Cni>(service: &T, method: u8, body: &[u8]) -> Result<Vec<u8>, Status> {
    let unknown = || Status::unimplemented(format!("this agent has no method {method}: the plugin is newer than the agent"));
    match Method::from_number(method).ok_or_else(unknown)? {
        Method::AddNetwork => encode(service.add_network(Request::new(frame::decode(body)?)).await),
        Method::ActivateEndpoint => encode(service.activate_endpoint(Request::new(frame::decode(body)?)).await),
        Method::DelNetwork => encode(service.del_network(Request::new(frame::decode(body)?)).await),
        Method::CheckNetwork => encode(service.check_network(Request::new(frame::decode(body)?)).await),
        Method::CollectGarbage => encode(service.collect_garbage(Request::new(frame::decode(body)?)).await),
        Method::Status => encode(service.status(Request::new(frame::decode(body)?)).await),
    }
}

fn encode<M: Message>(reply: Result<Response<M>, Status>) -> Result<Vec<u8>, Status> {
    frame::encode(0, &reply?.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use stanchion_proto as wire;

    use super::*;

    /// Counts the ADDs that it was asked for; nothing else is asked here.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    fn unasked<T>() -> Result<Response<T>, Status> {
        Err(Status::unimplemented("only ADD is asked for"))
    }

    #[tonic::async_trait]
    impl Cni for Counter {
        async fn add_network(&self, _: Request<wire::AddNetworkRequest>) -> Result<Response<wire::AddNetworkReply>, Status> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Response::new(wire::AddNetworkReply::default()))
        }

        async fn activate_endpoint(
            &self,
            _: Request<wire::ActivateEndpointRequest>,
        ) -> Result<Response<wire::ActivateEndpointReply>, Status> {
            unasked()
        }

        async fn del_network(&self, _: Request<wire::DelNetworkRequest>) -> Result<Response<wire::DelNetworkReply>, Status> {
            unasked()
        }

        async fn check_network(&self, _: Request<wire::CheckNetworkRequest>) -> Result<Response<wire::CheckNetworkReply>, Status> {
            unasked()
        }

        async fn collect_garbage(&self, _: Request<wire::CollectGarbageRequest>) -> Result<Response<wire::CollectGarbageReply>, Status> {
            unasked()
        }

        async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
            unasked()
        }
    }

    /// Serves one connection on which an ADD was asked for, by a plugin that stays or is dead by then. Returns how many were answered.
    async fn adds_served(plugin_lives: bool) -> usize {
        let (mut plugin, agent) = UnixStream::pair().unwrap();
        let request = frame::encode(Method::AddNetwork as u8, &wire::AddNetworkRequest::default()).unwrap();
        plugin.write_all(&[&MAGIC[..], &request].concat()).await.unwrap();
        let service = Counter::default();
        let live = async {
            if plugin_lives {
                let mut header = [0; HEADER];
                plugin.read_exact(&mut header).await.unwrap();
            }
            drop(plugin);
        };
        let ((), served) = tokio::join!(live, serve(agent, &service));
        served.unwrap();
        service.0.into_inner()
    }

    /// Its DEL may have come and gone before the agent read what it had asked: an address given now would be nobody's.
    #[tokio::test]
    async fn what_a_dead_plugin_asked_is_not_done() {
        assert_eq!(adds_served(true).await, 1);
        for _ in 0..64 {
            assert_eq!(adds_served(false).await, 0);
        }
    }
}
