//! Hears the kernel say that links, addresses, routes, rules, interfaces' sysctls or our nft table changed.

use std::time::Duration;

use futures_util::StreamExt as _;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rtnetlink::MulticastGroup;
use stanchion_core::network::nft::TABLE;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::netfilter::Changes;
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
        MulticastGroup::Ipv4Netconf,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv6Rule,
        MulticastGroup::Ipv6Netconf,
    ];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(|source| NetlinkError::Socket { op: "join multicast groups", source })?;
    let mut nft = Changes::listen().map_err(|source| NetlinkError::Socket { op: "listen to nftables", source })?;
    let connection = tokio::spawn(connection);
    let (changed, receiver) = watch::channel(0);
    let task = tokio::spawn(async move {
        loop {
            tokio::select! {
                message = messages.next() => if message.is_none() { break },
                told = nft.of_table(TABLE) => if let Err(error) = told {
                    tracing::warn!(%error, "changes of nftables are not told any more");
                    break;
                },
                () = changed.closed() => break,
            }
            tokio::time::sleep(SETTLE).await;
            while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, messages.next()).await {}
            while let Ok(Ok(())) = tokio::time::timeout(Duration::ZERO, nft.of_table(TABLE)).await {}
            changed.send_modify(|count| *count += 1);
        }
        // The connection ends with its last handle.
        drop(handle);
        connection.abort();
    });
    Ok((receiver, task))
}

/// Hears of addresses that came or went, other than the link-local ones that every interface gives itself.
#[derive(Debug)]
pub struct AddressChanges {
    socket: Socket,
    buffer: Vec<u8>,
}

impl AddressChanges {
    /// For the calling thread's namespace.
    ///
    /// # Errors
    /// When no multicast socket is to be had.
    pub fn listen() -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError::Socket { op: "listen to addresses", source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed)?;
        for group in [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr] {
            socket.add_membership(group as u32).map_err(failed)?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(4096) })
    }

    /// Whether there were any since the last time. The kernel tells before the change is done with: what is there when this says no
    /// was there the last time.
    pub fn any(&mut self) -> bool {
        let mut any = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => any |= !is_link_local(&self.buffer),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return any,
                // Some were lost.
                Err(_) => return true,
            }
        }
    }
}

/// Whether a message is about an IPv6 address of the link's scope: family and scope of `ifaddrmsg`, behind the netlink header.
fn is_link_local(message: &[u8]) -> bool {
    const HEADER: usize = 16;
    const SCOPE_LINK: u8 = 253;
    matches!(message.get(HEADER..), Some([family, _, _, SCOPE_LINK, ..]) if i32::from(*family) == libc::AF_INET6)
}
