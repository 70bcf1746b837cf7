//! nfnetlink, the kernel's interface to nftables and connection tracking: dumps, questions, and word of changes.
//!
//! A message is a netlink header, `nfgenmsg` (family, version, resource) and attributes (`linux/netfilter/nfnetlink.h`).

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr, TokioSocket};

/// Bytes of `nlmsghdr` and of `nfgenmsg`.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// `NLMSG_ERROR`, `NLMSG_DONE` of `linux/netlink.h`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NFNL_SUBSYS_NFTABLES`, `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const NFTABLES: u16 = 10;
const CHANGES_OF_NFTABLES: u32 = 7;
/// The table's name is the first attribute of everything that nftables tells (`NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`,
/// `NFTA_RULE_TABLE`, `NFTA_SET_TABLE` ... of `linux/netfilter/nf_tables.h`).
const TABLE_NAME: u16 = 1;

/// A request or the type of an answer: subsystem and message of it.
pub const fn kind(subsystem: u16, message: u16) -> u16 {
    subsystem << 8 | message
}

/// What nftables is asked (`NFT_MSG_*`).
pub(crate) const GET_TABLE: u16 = kind(NFTABLES, 1);
pub(crate) const GET_RULE: u16 = kind(NFTABLES, 7);

/// Reads a whole table of the calling thread's namespace: `each` gets the attributes of every entry. False: the table changed
/// meanwhile, and what was read may lack entries that were there all the time.
///
/// # Errors
/// No socket, no privilege, the kernel's refusal, or an answer that is no netlink message.
pub fn dump(kind: u16, family: u8, attributes: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<bool> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.send_to(&request(kind, NLM_F_REQUEST | NLM_F_DUMP, family, attributes), &SocketAddr::new(0, 0), 0)?;
    let mut is_whole = true;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in messages(&datagram) {
            let Message { kind, flags, body } = message?;
            is_whole &= flags & NLM_F_DUMP_INTR == 0;
            match (kind, refusal(body)) {
                (DONE, None) => return Ok(is_whole),
                (DONE, Some(error)) if error.raw_os_error() == Some(libc::EINTR) => return Ok(false),
                (DONE | ERROR, error) => return Err(error.unwrap_or_else(|| io::ErrorKind::InvalidData.into())),
                _ => each(body.get(NFGENMSG..).unwrap_or_default()),
            }
        }
    }
}

/// Asks for one object: whether it exists.
pub(crate) fn exists(kind: u16, family: u8, attributes: &[u8]) -> io::Result<bool> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.send_to(&request(kind, NLM_F_REQUEST, family, attributes), &SocketAddr::new(0, 0), 0)?;
    let (datagram, _) = socket.recv_from_full()?;
    let Message { kind, body, .. } = messages(&datagram).next().ok_or(io::ErrorKind::UnexpectedEof)??;
    match refusal(body).filter(|_| kind == ERROR) {
        None => Ok(true),
        Some(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Some(error) => Err(error),
    }
}

/// Word of every change of the nftables of the namespace in which it was made.
pub(crate) struct Changes(TokioSocket);

impl Changes {
    pub(crate) fn listen() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(CHANGES_OF_NFTABLES)?;
        Ok(Self(socket))
    }

    /// Returns when a table of that name has changed, or may have: messages were lost.
    pub(crate) async fn of_table(&mut self, name: &str) -> io::Result<()> {
        loop {
            match self.0.recv_from_full().await {
                Ok((datagram, _)) if names_table(&datagram, name) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn names_table(datagram: &[u8], name: &str) -> bool {
    messages(datagram).map_while(Result::ok).any(|message| {
        let attributes = message.body.get(NFGENMSG..).unwrap_or_default();
        find(attributes, TABLE_NAME).is_some_and(|value| text(value) == name.as_bytes())
    })
}

/// The attributes in a buffer, as `(type, value)`; ends at the first that is cut off.
pub fn attributes(mut buffer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// Nested and byte-order flags are not part of the type.
    const TYPE: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let (header, _) = buffer.split_at_checked(4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE;
        let value = buffer.get(4..length)?;
        buffer = buffer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn find(buffer: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(buffer).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// An attribute that holds a string.
pub(crate) fn string(kind: u16, value: &str) -> Vec<u8> {
    let length = 4 + value.len() + 1;
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend_from_slice(&u16::try_from(length).expect("names are short").to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value.as_bytes());
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// A string without the zero that ends it.
pub(crate) fn text(value: &[u8]) -> &[u8] {
    value.strip_suffix(&[0]).unwrap_or(value)
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

fn request(kind: u16, flags: u16, family: u8, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + NFGENMSG + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&u32::try_from(length).expect("requests are short").to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    // Sequence and port: one request a socket.
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, 0, 0, 0]);
    bytes.extend_from_slice(attributes);
    bytes
}

fn messages(mut rest: &[u8]) -> impl Iterator<Item = io::Result<Message<'_>>> {
    std::iter::from_fn(move || {
        let (header, tail) = rest.split_at_checked(HEADER)?;
        let length = usize::try_from(u32::from_ne_bytes(header[..4].try_into().expect("four bytes"))).unwrap_or(usize::MAX);
        let kind = u16::from_ne_bytes(header[4..6].try_into().expect("two bytes"));
        let flags = u16::from_ne_bytes(header[6..8].try_into().expect("two bytes"));
        let Some(body) = length.checked_sub(HEADER).and_then(|length| tail.get(..length)) else {
            rest = &[];
            return Some(Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message is cut off")));
        };
        rest = tail.get(length.next_multiple_of(4) - HEADER..).unwrap_or_default();
        Some(Ok(Message { kind, flags, body }))
    })
}

/// The error of an acknowledgement or of the end of a dump.
fn refusal(body: &[u8]) -> Option<io::Error> {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    (code < 0).then(|| io::Error::from_raw_os_error(-code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_of_our_table_are_ours() {
        let told = |table: &str| request(kind(NFTABLES, 6), 0, 2, &string(TABLE_NAME, table));
        assert!(names_table(&told("stanchion"), "stanchion"));
        assert!(!names_table(&told("stanchion2"), "stanchion"));
        let both = [told("kube-proxy"), told("stanchion")].concat();
        assert!(names_table(&both, "stanchion"), "several messages come in one datagram");
        assert!(!names_table(&both[..30], "stanchion"), "what is cut off names nothing");
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let whole = request(GET_TABLE, 1, 2, &string(TABLE_NAME, "x"));
        assert_eq!(messages(&whole).map(|message| message.unwrap().kind).collect::<Vec<_>>(), [GET_TABLE]);
        assert!(messages(&whole[..20]).next().unwrap().is_err());
        assert_eq!(find(&whole[HEADER + NFGENMSG..], TABLE_NAME).map(text), Some(&b"x"[..]));
    }
}
