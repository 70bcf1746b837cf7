//! Frames for the programs, byte by byte.

use std::net::IpAddr;

/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// SCTP.
pub const SCTP: u8 = 132;
/// ICMP.
pub const ICMP: u8 = 1;
/// ICMPv6.
pub const ICMPV6: u8 = 58;

/// TCP flags.
pub mod flags {
    /// Last data.
    pub const FIN: u8 = 1;
    /// First packet.
    pub const SYN: u8 = 2;
    /// Abort.
    pub const RST: u8 = 4;
    /// Everything but the first packet.
    pub const ACK: u8 = 16;
}

/// A fragment's place.
#[derive(Clone, Copy, Debug)]
pub struct Fragment {
    /// Identification.
    pub id: u32,
    /// In units of eight bytes.
    pub offset: u16,
    /// Others follow.
    pub more: bool,
}

/// What a frame is made of; [`Packet::frame`] writes it.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Source.
    pub source: IpAddr,
    /// Destination, of the same family.
    pub destination: IpAddr,
    /// IP protocol of `body`.
    pub protocol: u8,
    /// Everything after the IP header and its options or extension headers.
    pub body: Vec<u8>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers as `(number, bytes)`, each a multiple of eight bytes, their next-header field filled in here.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Set for a fragment.
    pub fragment: Option<Fragment>,
    /// The hop limit, or the time to live.
    pub hops: u8,
}

impl Packet {
    /// Any protocol.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, body: Vec<u8>) -> Self {
        Self { source, destination, protocol, body, options: Vec::new(), extensions: Vec::new(), fragment: None, hops: 64 }
    }

    /// TCP with 10 bytes of data, so that an IPv4 frame has 64 bytes.
    pub fn tcp((source, source_port): (IpAddr, u16), (destination, destination_port): (IpAddr, u16), flags: u8) -> Self {
        let mut body = vec![0u8; 30];
        body[..2].copy_from_slice(&source_port.to_be_bytes());
        body[2..4].copy_from_slice(&destination_port.to_be_bytes());
        body[12] = 5 << 4;
        body[13] = flags;
        Self::new(source, destination, TCP, body)
    }

    /// UDP with 22 bytes of data.
    pub fn udp((source, source_port): (IpAddr, u16), (destination, destination_port): (IpAddr, u16)) -> Self {
        let mut body = vec![0u8; 30];
        body[..2].copy_from_slice(&source_port.to_be_bytes());
        body[2..4].copy_from_slice(&destination_port.to_be_bytes());
        body[4..6].copy_from_slice(&30u16.to_be_bytes());
        Self::new(source, destination, UDP, body)
    }

    /// An SCTP INIT chunk.
    pub fn sctp((source, source_port): (IpAddr, u16), (destination, destination_port): (IpAddr, u16)) -> Self {
        let mut body = vec![0u8; 32];
        body[..2].copy_from_slice(&source_port.to_be_bytes());
        body[2..4].copy_from_slice(&destination_port.to_be_bytes());
        body[12] = 1;
        body[15] = 20;
        Self::new(source, destination, SCTP, body)
    }

    /// ICMP or ICMPv6 by the addresses' family; `rest` begins at the fifth byte. Neighbour discovery has the hop limit that it must have.
    pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, rest: &[u8]) -> Self {
        let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
        let mut body = vec![kind, 0, 0, 0];
        body.extend_from_slice(rest);
        let hops = if protocol == ICMPV6 && matches!(kind, 133..=137) { 255 } else { 64 };
        Self { hops, ..Self::new(source, destination, protocol, body) }
    }

    /// An ICMP error of this type about a packet, of which it quotes the header and eight bytes more.
    pub fn icmp_error(source: IpAddr, destination: IpAddr, kind: u8, about: &Self) -> Self {
        let quoted = about.frame();
        let header = if about.source.is_ipv4() { 20 + about.options.len() } else { 40 };
        let mut rest = vec![0u8; 4];
        rest.extend_from_slice(&quoted[14..(14 + header + 8).min(quoted.len())]);
        Self::icmp(source, destination, kind, &rest)
    }

    /// The Ethernet frame. Checksums are zero: no program looks at them.
    pub fn frame(&self) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend_from_slice(&[0x08, 0x00]);
                let header = 20 + self.options.len();
                let words = u8::try_from(header / 4).expect("options are short");
                let total = u16::try_from(header + self.body.len()).expect("bodies are short");
                frame.extend_from_slice(&[0x40 | words, 0]);
                frame.extend_from_slice(&total.to_be_bytes());
                let Fragment { id, offset, more } = self.fragment.unwrap_or(Fragment { id: 0, offset: 0, more: false });
                frame.extend_from_slice(&u16::try_from(id).expect("IPv4 has 16 bits").to_be_bytes());
                frame.extend_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
                frame.extend_from_slice(&[self.hops, self.protocol, 0, 0]);
                frame.extend_from_slice(&source.octets());
                frame.extend_from_slice(&destination.octets());
                frame.extend_from_slice(&self.options);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
                let mut chain = self.extensions.clone();
                if let Some(Fragment { id, offset, more }) = self.fragment {
                    let mut header = vec![0u8; 8];
                    header[2..4].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
                    header[4..].copy_from_slice(&id.to_be_bytes());
                    chain.push((44, header));
                }
                let numbers: Vec<u8> = chain.iter().map(|(number, _)| *number).chain([self.protocol]).collect();
                let payload = chain.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + self.body.len();
                frame.extend_from_slice(&u16::try_from(payload).expect("bodies are short").to_be_bytes());
                frame.extend_from_slice(&[numbers[0], self.hops]);
                frame.extend_from_slice(&source.octets());
                frame.extend_from_slice(&destination.octets());
                for ((_, bytes), next) in chain.iter_mut().zip(&numbers[1..]) {
                    bytes[0] = *next;
                    frame.extend_from_slice(bytes);
                }
            }
            _ => unreachable!("both ends are of one family"),
        }
        frame.extend_from_slice(&self.body);
        frame
    }
}

/// An ARP request.
pub fn arp() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&[2, 0, 0, 0, 0, 1, 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.resize(60, 0);
    frame
}
