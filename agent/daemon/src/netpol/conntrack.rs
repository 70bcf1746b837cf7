//! The kernel's own connection tracking, read once when a running pod gets its first policy (ctnetlink,
//! `include/uapi/linux/netfilter/nfnetlink_conntrack.h`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use stanchion_netlink::netfilter::{self, find};

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuple {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// The identifier for ICMP.
    pub(super) source_port: u16,
    /// 0 for ICMP.
    pub(super) destination_port: u16,
}

/// A connection as the kernel tracks it: with address translation, the two directions are not mirror images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    pub(super) original: Tuple,
    pub(super) reply: Tuple,
    /// Packets were seen in both directions.
    pub(super) replied: bool,
    /// TCP only: the connection is not being closed.
    pub(super) open: bool,
}

/// Reads the table of this network namespace.
///
/// # Errors
/// No socket, no privilege, or a reply that is no conntrack message.
pub(super) fn dump() -> io::Result<Vec<Connection>> {
    /// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_GET`.
    const GET_CONNTRACK: u16 = netfilter::kind(1, 1);
    let mut connections = Vec::new();
    // Connections come and go during every dump; the kernel does not tell.
    netfilter::dump(GET_CONNTRACK, 0, &[], |attributes| connections.extend(connection(attributes)))?;
    Ok(connections)
}

fn connection(buffer: &[u8]) -> Option<Connection> {
    const ORIGINAL: u16 = 1;
    const REPLY: u16 = 2;
    const STATUS: u16 = 3;
    const PROTOCOL_INFO: u16 = 4;
    const SEEN_REPLY: u32 = 2;
    const TCP_ESTABLISHED: u8 = 3;
    let status = u32::from_be_bytes(find(buffer, STATUS)?.try_into().ok()?);
    // Protocol info, its TCP part, the state in that: type 1 in both.
    let tcp_state =
        find(buffer, PROTOCOL_INFO).and_then(|info| find(info, 1)).and_then(|tcp| find(tcp, 1)).and_then(|state| state.first().copied());
    Some(Connection {
        original: tuple(find(buffer, ORIGINAL)?)?,
        reply: tuple(find(buffer, REPLY)?)?,
        replied: status & SEEN_REPLY != 0,
        open: tcp_state.is_none_or(|state| state <= TCP_ESTABLISHED),
    })
}

fn tuple(buffer: &[u8]) -> Option<Tuple> {
    let (addresses, protocol) = (find(buffer, 1)?, find(buffer, 2)?);
    let address = |four: u16, six: u16| -> Option<IpAddr> {
        if let Some(octets) = find(addresses, four) {
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into());
        }
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(find(addresses, six)?).ok()?).into())
    };
    let port = |kind: u16| find(protocol, kind).and_then(|value| Some(u16::from_be_bytes(value.try_into().ok()?)));
    // Ports are 2 and 3, the identifiers of ICMP and ICMPv6 4 and 7.
    Some(Tuple {
        source: address(1, 3)?,
        destination: address(2, 4)?,
        protocol: *find(protocol, 1)?.first()?,
        source_port: port(2).or_else(|| port(4)).or_else(|| port(7)).unwrap_or(0),
        destination_port: port(3).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple_bytes(source: [u8; 4], destination: [u8; 4], source_port: u16, destination_port: u16) -> Vec<u8> {
        let addresses = [attribute(1, &source), attribute(2, &destination)].concat();
        let protocol =
            [attribute(1, &[6]), attribute(2, &source_port.to_be_bytes()), attribute(3, &destination_port.to_be_bytes())].concat();
        [attribute(1 | 0x8000, &addresses), attribute(2 | 0x8000, &protocol)].concat()
    }

    fn message() -> Vec<u8> {
        let original = tuple_bytes([10, 0, 0, 1], [10, 100, 0, 1], 4000, 80);
        let reply = tuple_bytes([10, 0, 0, 2], [10, 0, 0, 1], 8080, 4000);
        let state = attribute(4 | 0x8000, &attribute(1 | 0x8000, &attribute(1, &[3])));
        [attribute(1 | 0x8000, &original), attribute(2 | 0x8000, &reply), attribute(3, &14u32.to_be_bytes()), state].concat()
    }

    #[test]
    fn a_translated_connection_is_read_in_both_directions() {
        let connection = connection(&message()).unwrap();
        assert_eq!(connection.original.destination, IpAddr::from([10, 100, 0, 1]));
        assert_eq!((connection.reply.source, connection.reply.source_port), (IpAddr::from([10, 0, 0, 2]), 8080));
        assert!(connection.replied && connection.open);
    }

    #[test]
    fn a_message_cut_anywhere_is_refused_or_read_without_panic() {
        let whole = message();
        for length in 0..whole.len() {
            if let Some(read) = connection(&whole[..length]) {
                // Only the last attribute, the TCP state, may be missing.
                assert_eq!(read.original, connection(&whole).unwrap().original);
            }
        }
    }
}
