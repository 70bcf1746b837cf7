//! Hears the kernel say that links, addresses, routes, rules, interfaces' sysctls or our nft table changed.

use std::io;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, TokioSocket};
use rtnetlink::MulticastGroup;
use stanchion_core::network::nft::TABLE;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::netfilter::Changes;
use crate::socket::NetlinkError;

/// Changes come in bursts (an ADD alone makes ten): one notice for all within this time. They are not even read before.
const SETTLE: Duration = Duration::from_millis(250);
/// What is read of a message at most; that it came is all that counts.
const HEAD: usize = 64;

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
    let failed = |op| move |source| NetlinkError::Socket { op, source };
    let mut routes = TokioSocket::new(NETLINK_ROUTE).map_err(failed("open it"))?;
    join(routes.socket_mut(), &groups).map_err(failed("join multicast groups"))?;
    let mut nft = Changes::listen().map_err(failed("listen to nftables"))?;
    let (changed, receiver) = watch::channel(0);
    let task = tokio::spawn(async move {
        let mut head = Vec::with_capacity(HEAD);
        loop {
            head.clear();
            let told = tokio::select! {
                told = routes.recv(&mut head) => told.or_else(if_lost),
                told = nft.of_table(TABLE) => told,
                () = changed.closed() => return,
            };
            if let Err(error) = told {
                tracing::warn!(%error, "the kernel does not tell of the host network's changes any more: they are looked for from time to time");
                return;
            }
            tokio::time::sleep(SETTLE).await;
            while take(routes.socket_ref(), &mut head).is_some() {}
            while let Ok(Ok(())) = tokio::time::timeout(Duration::ZERO, nft.of_table(TABLE)).await {}
            changed.send_modify(|count| *count += 1);
        }
    });
    Ok((receiver, task))
}

/// From here on the kernel tells the socket what the groups are about.
fn join(socket: &mut Socket, groups: &[MulticastGroup]) -> io::Result<()> {
    socket.bind_auto()?;
    groups.iter().try_for_each(|group| socket.add_membership(*group as u32))
}

/// Some messages were lost: as good as one.
fn if_lost(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::ENOBUFS) { Ok(()) } else { Err(error) }
}

/// The head of the next message that is there; empty when some were lost.
fn take<'a>(socket: &Socket, head: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    head.clear();
    match socket.recv(head, 0) {
        Ok(_) => Some(head),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(_) => {
            head.clear();
            Some(head)
        }
    }
}

/// Hears of addresses that came or went, other than the link-local ones that every interface gives itself.
#[derive(Debug)]
pub struct AddressChanges {
    socket: Socket,
    head: Vec<u8>,
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
        join(&mut socket, &[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr]).map_err(failed)?;
        Ok(Self { socket, head: Vec::with_capacity(HEAD) })
    }

    /// Whether there were any since the last time. The kernel tells before the change is done with: what is there when this says no
    /// was there the last time.
    pub fn any(&mut self) -> bool {
        let mut any = false;
        while let Some(message) = take(&self.socket, &mut self.head) {
            any |= !is_link_local(message);
        }
        any
    }
}

/// Whether a message is about an IPv6 address of the link's scope: family and scope of `ifaddrmsg`, behind the netlink header.
fn is_link_local(message: &[u8]) -> bool {
    const HEADER: usize = 16;
    const SCOPE_LINK: u8 = 253;
    matches!(message.get(HEADER..), Some([family, _, _, SCOPE_LINK, ..]) if i32::from(*family) == libc::AF_INET6)
}
