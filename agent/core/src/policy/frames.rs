//! Frames that the programs copy for the agent: DNS answers over UDP and TCP, and packets of pods that came before the answer
//! they rely on was known.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::image::Slot;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// Connections to DNS servers that are followed at once; of more, those that opened first are forgotten.
const MOST_STREAMS: usize = 256;

/// A TCP segment or UDP datagram in a frame: no fragment, no IPv6 extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Who sent it.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// 6 or 17.
    pub protocol: u8,
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// Where the transport header begins in the frame.
    transport: usize,
    /// It and what follows, without the frame's padding.
    segment: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Reads a frame; `None` if it holds something else, or not all of it.
    pub fn read(frame: &'a [u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
        let (source, destination, protocol, transport, end) = match word(12)? {
            0x0800 => {
                let header = usize::from(frame.get(ETHERNET)? & 15) * 4;
                let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).map(Ipv4Addr::from).ok()?));
                // More fragments, or not the first.
                if header < 20 || word(ETHERNET + 6)? & 0x3fff != 0 {
                    return None;
                }
                let end = ETHERNET + usize::from(word(ETHERNET + 2)?);
                (address(ETHERNET + 12)?, address(ETHERNET + 16)?, *frame.get(ETHERNET + 9)?, ETHERNET + header, end)
            }
            0x86dd => {
                let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).map(Ipv6Addr::from).ok()?));
                let end = ETHERNET + 40 + usize::from(word(ETHERNET + 4)?);
                (address(ETHERNET + 8)?, address(ETHERNET + 24)?, *frame.get(ETHERNET + 6)?, ETHERNET + 40, end)
            }
            _ => return None,
        };
        let least = match protocol {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        let segment = frame.get(transport..end).filter(|segment| segment.len() >= least)?;
        let (source_port, destination_port) = (word(transport)?, word(transport + 2)?);
        Some(Self { source, destination, protocol, source_port, destination_port, transport, segment })
    }

    /// The frame, as far as it is the packet, with the checksum of its transport header: the pod's kernel leaves that to the
    /// interface.
    pub fn with_checksum(&self, frame: &[u8]) -> Vec<u8> {
        let mut whole = frame[..self.transport + self.segment.len()].to_vec();
        let at = self.transport + if self.protocol == TCP { 16 } else { 6 };
        whole[at..at + 2].fill(0);
        let mut sum = u64::from(self.protocol) + self.segment.len() as u64;
        let mut add = |bytes: &[u8]| {
            for pair in bytes.chunks(2) {
                sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            }
        };
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(address) => add(&address.octets()),
                IpAddr::V6(address) => add(&address.octets()),
            }
        }
        add(&whole[self.transport..]);
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let checksum = match !(sum as u16) {
            // In UDP zero says that there is none.
            0 if self.protocol == UDP => 0xffff,
            checksum => checksum,
        };
        whole[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        whole
    }
}

/// Bytes of one direction of a TCP connection that are not a whole message yet.
#[derive(Debug)]
struct Stream {
    /// Sequence number of the next byte.
    next: u32,
    bytes: Vec<u8>,
    /// Which of all that were opened.
    number: u64,
}

/// Puts DNS messages together. A connection is followed from its SYN on; one with a gap teaches nothing more.
#[derive(Debug, Default)]
pub struct Messages {
    streams: HashMap<(Slot, IpAddr, u16), Stream>,
    opened: u64,
}

impl Messages {
    /// The DNS messages that end with this frame, which a pod got from a DNS server.
    pub fn of(&mut self, slot: Slot, frame: &[u8]) -> Vec<Vec<u8>> {
        let Some(datagram) = Datagram::read(frame) else { return Vec::new() };
        if datagram.protocol == UDP {
            return vec![datagram.segment[8..].to_vec()];
        }
        let key = (slot, datagram.source, datagram.destination_port);
        let segment = datagram.segment;
        let flags = segment[13];
        let sequence = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
        if flags & SYN != 0 {
            self.open(key, sequence.wrapping_add(1));
            return Vec::new();
        }
        let data = segment.get(usize::from(segment[12] >> 4) * 4..).unwrap_or_default();
        let Some(stream) = self.streams.get_mut(&key) else { return Vec::new() };
        let seen = stream.next.wrapping_sub(sequence) as usize;
        // What was seen before comes again after a loss.
        let messages = if seen <= data.len() {
            stream.next = stream.next.wrapping_add((data.len() - seen) as u32);
            stream.bytes.extend_from_slice(&data[seen..]);
            Some(stream.messages())
        } else {
            (seen < 1 << 31).then(Vec::new)
        };
        if messages.is_none() || flags & (FIN | RST) != 0 {
            self.streams.remove(&key);
        }
        messages.unwrap_or_default()
    }

    fn open(&mut self, key: (Slot, IpAddr, u16), next: u32) {
        if self.streams.len() >= MOST_STREAMS
            && !self.streams.contains_key(&key)
            && let Some(first) = self.streams.iter().min_by_key(|(_, stream)| stream.number).map(|(key, _)| *key)
        {
            self.streams.remove(&first);
        }
        self.opened += 1;
        self.streams.insert(key, Stream { next, bytes: Vec::new(), number: self.opened });
    }
}

impl Stream {
    /// Takes out what is whole: each message has its length in two bytes in front (RFC 1035, 4.2.2), so no more than 64 KiB wait.
    fn messages(&mut self) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while let [high, low, rest @ ..] = self.bytes.as_slice() {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            let Some(message) = rest.get(..length) else { break };
            messages.push(message.to_vec());
            self.bytes.drain(..2 + length);
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: Slot = Slot(3);

    /// A segment from port 53 of 10.0.0.53 to port 4,000 of 10.0.0.9.
    fn segment(flags: u8, sequence: u32, data: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + data.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 53, 10, 0, 0, 9]);
        frame.extend([0, 53, 0x0f, 0xa0]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        frame.extend(data);
        // Ethernet's shortest frame has 60 bytes.
        frame.resize(frame.len().max(60), 0xee);
        frame
    }

    #[test]
    fn messages_come_out_whole_however_the_stream_is_cut() {
        let stream = [&[0, 3][..], b"one", &[0, 0], &[0, 5], b"three"].concat();
        for cut in 1..stream.len() {
            let mut messages = Messages::default();
            let start = u32::MAX - 4;
            let mut found = messages.of(SLOT, &segment(SYN | 16, start - 1, &[]));
            for (at, part) in [(0, &stream[..cut]), (0, &stream[..1]), (cut, &stream[cut..]), (cut, &stream[cut..])] {
                let at = u32::try_from(at).unwrap();
                found.extend(messages.of(SLOT, &segment(16, start.wrapping_add(at), part)));
            }
            assert_eq!(found, [b"one".to_vec(), Vec::new(), b"three".to_vec()], "cut at {cut}");
            assert_eq!(messages.of(SLOT, &segment(FIN | 16, start, &[])), Vec::<Vec<u8>>::new());
            assert!(messages.streams.is_empty());
        }
    }

    #[test]
    fn a_gap_ends_what_can_be_learnt_and_a_stream_from_its_middle_teaches_nothing() {
        let mut messages = Messages::default();
        let message = [&[0, 1][..], b"x"].concat();
        assert!(messages.of(SLOT, &segment(16, 0, &message)).is_empty());
        messages.of(SLOT, &segment(SYN | 16, 99, &[]));
        assert!(messages.of(SLOT, &segment(16, 101, &message)).is_empty(), "a byte is missing");
        assert!(messages.of(SLOT, &segment(16, 100, &message)).is_empty(), "it is followed no more");
    }

    #[test]
    fn a_flood_of_connections_takes_a_bounded_room() {
        let mut messages = Messages::default();
        for slot in 0..1_000 {
            messages.of(Slot(slot), &segment(SYN | 16, 0, &[]));
        }
        assert_eq!(messages.streams.len(), MOST_STREAMS);
        assert_eq!(messages.of(Slot(999), &segment(16, 1, &[0, 1, 7])), [vec![7]]);
    }

    #[test]
    fn a_checksum_is_that_of_the_packet_without_padding() {
        let frame = segment(SYN, 7, b"odd");
        let datagram = Datagram::read(&frame).unwrap();
        let whole = datagram.with_checksum(&frame);
        assert_eq!(whole.len(), ETHERNET + 43);
        // The sum over a packet with its checksum is all ones.
        let pseudo = [&whole[26..34], &[0, TCP, 0, 23], &whole[34..], &[0]].concat();
        let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum >> 16) + (sum & 0xffff), 0xffff);
    }

    #[test]
    fn what_is_cut_off_or_a_fragment_is_no_datagram() {
        let frame = segment(SYN, 7, b"data");
        for length in 0..ETHERNET + 44 {
            assert_eq!(Datagram::read(&frame[..length]), None, "{length}");
        }
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        assert_eq!(Datagram::read(&fragment), None);
    }
}
