//! SCTP by hand: many kernels have no SCTP sockets, and a filter only needs to see an INIT and its INIT-ACK.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::netns::Netns;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
/// Common header: ports, verification tag, checksum (RFC 9260, 3.1).
const HEADER: usize = 12;
/// INIT chunk without parameters (RFC 9260, 3.3.2).
const INIT_CHUNK: usize = 20;
/// State cookie parameter (RFC 9260, 3.3.3.1) that holds an IPv4 address.
const COOKIE: usize = 8;
const STATE_COOKIE: [u8; 4] = [0, 7, 0, 8];

/// A raw socket that sends and gets whole SCTP packets; std's UDP type carries it, since both are plain datagrams.
fn raw() -> io::Result<UdpSocket> {
    let fd = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)?;
    Ok(UdpSocket::from(fd))
}

/// Answers INITs to these ports with INIT-ACK and to others with ABORT, for ever.
pub(crate) async fn serve(netns: Netns, ports: Vec<u16>) -> io::Result<()> {
    let socket = netns.run(|| {
        let socket = raw()?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>(socket)
    })??;
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await?;
        let Some(packet) = Packet::read(&buffer[..length]) else { continue };
        if packet.chunk != INIT {
            continue;
        }
        let chunk = if ports.contains(&packet.to) { INIT_ACK } else { ABORT };
        let SocketAddr::V4(seen) = from else { continue };
        let cookie = Some(*seen.ip());
        let reply = Packet { from: packet.to, to: packet.from, tag: packet.init_tag, chunk, init_tag: 1, cookie };
        // A lost reply is the filter's or the router's doing, and the probe tells.
        let _ = socket.send_to(&reply.write(), from).await;
    }
}

/// Sends an INIT and waits for the answer. `WouldBlock` when none came, `ConnectionRefused` for an ABORT.
pub(crate) fn probe(to: SocketAddr, patience: Duration) -> io::Result<IpAddr> {
    let SocketAddr::V4(to) = to else { return Err(io::ErrorKind::Unsupported.into()) };
    let socket = raw()?;
    let init_tag = rand::random::<u32>() | 1;
    let init = Packet { from: rand::random_range(32768..61000), to: to.port(), tag: 0, chunk: INIT, init_tag, cookie: None };
    socket.send_to(&init.write(), SocketAddr::from((*to.ip(), 0)))?;
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.set_read_timeout(Some(left))?;
        let (length, from) = socket.recv_from(&mut buffer)?;
        let Some(packet) = Packet::read(&buffer[..length]) else { continue };
        if from.ip() != IpAddr::V4(*to.ip()) || (packet.from, packet.to, packet.tag) != (init.to, init.from, init_tag) {
            continue;
        }
        return match (packet.chunk, packet.cookie) {
            (INIT_ACK, Some(seen)) => Ok(seen.into()),
            (ABORT, _) => Err(io::ErrorKind::ConnectionRefused.into()),
            _ => continue,
        };
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packet {
    from: u16,
    to: u16,
    /// Verification tag.
    tag: u32,
    /// Type of the only chunk.
    chunk: u8,
    /// Initiate tag of an INIT or INIT-ACK.
    init_tag: u32,
    /// State cookie of an INIT-ACK, opaque to the protocol: here the address that the server sees.
    cookie: Option<Ipv4Addr>,
}

impl Packet {
    /// Reads what a raw socket gives: IPv4 header first.
    fn read(bytes: &[u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let sctp = bytes.get(header..)?;
        let u16_at = |at: usize| Some(u16::from_be_bytes(sctp.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_be_bytes(sctp.get(at..at + 4)?.try_into().ok()?));
        let chunk = *sctp.get(HEADER)?;
        let init_tag = if matches!(chunk, INIT | INIT_ACK) { u32_at(HEADER + 4)? } else { 0 };
        let cookie = if chunk == INIT_ACK { Some(Ipv4Addr::from(u32_at(HEADER + INIT_CHUNK + 4)?)) } else { None };
        Some(Self { from: u16_at(0)?, to: u16_at(2)?, tag: u32_at(4)?, chunk, init_tag, cookie })
    }

    fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + INIT_CHUNK + COOKIE);
        bytes.extend(self.from.to_be_bytes());
        bytes.extend(self.to.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        if self.chunk == ABORT {
            bytes.extend([ABORT, 0, 0, 4]);
        } else {
            bytes.extend([self.chunk, 0, 0, if self.cookie.is_some() { 28 } else { 20 }]);
            bytes.extend(self.init_tag.to_be_bytes());
            bytes.extend(65536u32.to_be_bytes());
            bytes.extend([0, 1, 0, 1]);
            bytes.extend(1u32.to_be_bytes());
            if let Some(seen) = self.cookie {
                bytes.extend(STATE_COOKIE);
                bytes.extend(seen.octets());
            }
        }
        // Connection tracking drops packets with a wrong one.
        let checksum = crc32c(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&checksum);
        bytes
    }
}

/// CRC-32C (Castagnoli), reflected (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_round_trip_and_the_checksum_is_the_known_one() {
        // The check value of CRC-32/ISCSI.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let packet = Packet { from: 40000, to: 80, tag: 7, chunk: INIT_ACK, init_tag: 9, cookie: Some(Ipv4Addr::new(10, 0, 0, 9)) };
        let mut bytes = vec![0x45];
        bytes.resize(20, 0);
        bytes.extend(packet.write());
        assert_eq!(Packet::read(&bytes), Some(packet));
        assert_eq!(Packet::read(&bytes[..30]), None);
    }
}
