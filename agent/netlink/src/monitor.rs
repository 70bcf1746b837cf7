//! Hears the kernel say that links, addresses, routes or rules changed.

use std::time::Duration;

use futures_util::StreamExt as _;
use rtnetlink::MulticastGroup;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::socket::NetlinkError;

/// Changes come in bursts (an ADD alone makes eight): one notice for all within this time.
const SETTLE: Duration = Duration::from_millis(250);

/// Starts a task that bumps the counter whenever the network of the calling thread's namespace has changed; it ends when
/// the receiver is dropped. A lost message costs nothing: the counter says "look again", not what.
///
/// # Errors
/// When no multicast socket is to be had.
pub fn spawn() -> Result<(watch::Receiver<u64>, JoinHandle<()>), NetlinkError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv6Rule,
    ];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(|source| NetlinkError::Socket { op: "join multicast groups", source })?;
    let connection = tokio::spawn(connection);
    let (changed, receiver) = watch::channel(0);
    let task = tokio::spawn(async move {
        while tokio::select! { message = messages.next() => message.is_some(), () = changed.closed() => false } {
            tokio::time::sleep(SETTLE).await;
            while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, messages.next()).await {}
            changed.send_modify(|count| *count += 1);
        }
        // The connection ends with its last handle.
        drop(handle);
        connection.abort();
    });
    Ok((receiver, task))
}
