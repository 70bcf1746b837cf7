//! HTTP listeners that anybody may find: so many connections at once, and none that is only held open.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// Connections at once; more wait in the kernel. A few scrapers and people come at a time.
const CONNECTIONS: usize = 32;
/// A connection to which nothing was written for this long is closed: its request does not come, or its last one was long ago. Those who
/// scrape every half minute keep theirs.
const SILENCE: Duration = Duration::from_secs(40);

/// A listener within these bounds.
pub(super) struct Bounded<L> {
    listener: L,
    places: Arc<Semaphore>,
}

impl<L> Bounded<L> {
    pub(super) fn new(listener: L) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS)) }
    }
}

impl<L: Listener> Listener for Bounded<L> {
    type Io = Connection<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed");
        let (stream, address) = self.listener.accept().await;
        (Connection { stream, silence: Box::pin(sleep(SILENCE)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that ends by itself.
pub(super) struct Connection<S> {
    stream: S,
    silence: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<S> Connection<S> {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.silence.as_mut().poll(context).is_ready()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        self.silence.as_mut().reset(Instant::now() + SILENCE);
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::sync::mpsc;

    use super::*;

    /// Connections as they are sent.
    struct Sent(mpsc::Receiver<DuplexStream>);

    impl Listener for Sent {
        type Io = DuplexStream;
        type Addr = ();

        async fn accept(&mut self) -> (DuplexStream, ()) {
            match self.0.recv().await {
                Some(stream) => (stream, ()),
                None => std::future::pending().await,
            }
        }

        fn local_addr(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_connections_open_keeps_others_out_for_a_while_only() {
        let (sender, sent) = mpsc::channel(CONNECTIONS + 1);
        let router = axum::Router::new().route("/", axum::routing::get(|| async { "told" }));
        let server = tokio::spawn(async move { axum::serve(Bounded::new(Sent(sent)), router).await });
        let connect = || {
            let (near, far) = duplex(1_024);
            sender.try_send(far).unwrap();
            near
        };
        // They begin a request, and go on with a byte now and then.
        let mut holders = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let mut holder = connect();
            holders.spawn(async move {
                let mut bytes = b"GET / HTTP/1.1\r\n".iter().chain(std::iter::repeat(&b'x'));
                while holder.write_all(&[*bytes.next().unwrap()]).await.is_ok() {
                    sleep(Duration::from_secs(1)).await;
                }
            });
        }
        let started = Instant::now();
        let mut other = connect();
        let mut told = String::new();
        other.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        other.read_to_string(&mut told).await.unwrap();
        assert!(told.ends_with("told"), "{told}");
        assert!(started.elapsed() >= SILENCE && started.elapsed() < SILENCE * 2, "{:?}", started.elapsed());
        while holders.join_next().await.is_some() {}
        server.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_used_stays() {
        let (sender, sent) = mpsc::channel(1);
        let router = axum::Router::new().route("/", axum::routing::get(|| async { "told" }));
        let server = tokio::spawn(async move { axum::serve(Bounded::new(Sent(sent)), router).await });
        let (mut scraper, far) = duplex(1_024);
        sender.try_send(far).unwrap();
        for _ in 0..8 {
            scraper.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut told = String::new();
            while !told.ends_with("told") {
                told.push(char::from(scraper.read_u8().await.unwrap()));
            }
            sleep(SILENCE * 3 / 4).await;
        }
        sleep(SILENCE).await;
        assert_eq!(scraper.read(&mut [0]).await.unwrap(), 0, "closed when nobody asks any more");
        server.abort();
    }
}
