//! Frames that the programs copy for the agent: DNS answers over UDP and TCP, and packets of pods that came before the answer
//! they rely on was known.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::image::Slot;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// IPv6's header for fragments.
const FRAGMENT: u8 = 44;

/// Connections to DNS servers that are followed at once; of more, those that opened first are forgotten.
const MOST_STREAMS: usize = 256;

/// Datagrams in fragments that are put together at once, each of 64 KiB at most; of more, those that began first are forgotten.
const MOST_PARTIAL: usize = 16;

/// An IP packet in a frame: no IPv6 extension headers but the one for fragments.
struct Ip<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Where the payload begins in the frame.
    at: usize,
    /// Without the frame's padding.
    payload: &'a [u8],
    /// Of a fragment: the datagram's identification, the payload's place in it, and whether there is more behind it.
    part: Option<(u32, usize, bool)>,
}

impl<'a> Ip<'a> {
    /// Reads a frame; `None` if it holds something else, or not all of it.
    fn read(frame: &'a [u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
        let part =
            |identification: u32, place: u16, more: bool| (place != 0 || more).then_some((identification, usize::from(place) * 8, more));
        match word(12)? {
            0x0800 => {
                let header = usize::from(frame.get(ETHERNET)? & 15) * 4;
                let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).map(Ipv4Addr::from).ok()?));
                if header < 20 {
                    return None;
                }
                let (at, end) = (ETHERNET + header, ETHERNET + usize::from(word(ETHERNET + 2)?));
                let place = word(ETHERNET + 6)?;
                Some(Self {
                    source: address(ETHERNET + 12)?,
                    destination: address(ETHERNET + 16)?,
                    protocol: *frame.get(ETHERNET + 9)?,
                    at,
                    payload: frame.get(at..end)?,
                    part: part(word(ETHERNET + 4)?.into(), place & 0x1fff, place & 0x2000 != 0),
                })
            }
            0x86dd => {
                let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).map(Ipv6Addr::from).ok()?));
                let mut ip = Self {
                    source: address(ETHERNET + 8)?,
                    destination: address(ETHERNET + 24)?,
                    protocol: *frame.get(ETHERNET + 6)?,
                    at: ETHERNET + 40,
                    payload: frame.get(ETHERNET + 40..ETHERNET + 40 + usize::from(word(ETHERNET + 4)?))?,
                    part: None,
                };
                if ip.protocol == FRAGMENT {
                    let [next, _, high, low, a, b, c, d, payload @ ..] = ip.payload else { return None };
                    let place = u16::from_be_bytes([*high, *low]);
                    (ip.protocol, ip.at, ip.payload) = (*next, ip.at + 8, payload);
                    ip.part = part(u32::from_be_bytes([*a, *b, *c, *d]), place >> 3, place & 1 != 0);
                }
                Some(ip)
            }
            _ => None,
        }
    }
}

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
        Self::of(Ip::read(frame)?)
    }

    fn of(ip: Ip<'a>) -> Option<Self> {
        let least = match ip.protocol {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        let Ip { source, destination, protocol, at, payload, part: None } = ip else { return None };
        let [s0, s1, d0, d1, ..] = payload else { return None };
        let (source_port, destination_port) = (u16::from_be_bytes([*s0, *s1]), u16::from_be_bytes([*d0, *d1]));
        (payload.len() >= least).then_some(Self {
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            transport: at,
            segment: payload,
        })
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

/// The first fragments of a datagram.
#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    /// Which of all that were begun.
    number: u64,
}

/// Puts DNS messages together. A connection is followed from its SYN on; one with a gap teaches nothing more. Fragments must come
/// in their order, as they do where the node tracks connections; of others nothing is learnt.
#[derive(Debug, Default)]
pub struct Messages {
    streams: HashMap<(Slot, IpAddr, u16), Stream>,
    partial: HashMap<(Slot, IpAddr, u32), Partial>,
    begun: u64,
}

impl Messages {
    /// The DNS messages that end with this frame, which a pod got from a DNS server.
    pub fn of(&mut self, slot: Slot, frame: &[u8]) -> Vec<Vec<u8>> {
        let Some(ip) = Ip::read(frame) else { return Vec::new() };
        if let Some(part) = ip.part {
            let whole = self.put(slot, &ip, part).and_then(|datagram| Some(datagram.get(8..)?.to_vec()));
            return whole.into_iter().collect();
        }
        let Some(datagram) = Datagram::of(ip) else { return Vec::new() };
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
        make_room(&mut self.streams, &key, MOST_STREAMS, |stream| stream.number);
        self.begun += 1;
        self.streams.insert(key, Stream { next, bytes: Vec::new(), number: self.begun });
    }

    /// Takes a fragment in; gives the UDP datagram that it completes.
    fn put(&mut self, slot: Slot, ip: &Ip<'_>, (identification, place, more): (u32, usize, bool)) -> Option<Vec<u8>> {
        let key = (slot, ip.source, identification);
        if ip.protocol != UDP {
            return None;
        }
        if place == 0 {
            make_room(&mut self.partial, &key, MOST_PARTIAL, |partial| partial.number);
            self.begun += 1;
            self.partial.insert(key, Partial { bytes: ip.payload.to_vec(), number: self.begun });
            return None;
        }
        let mut partial = self.partial.remove(&key)?;
        if partial.bytes.len() != place {
            return None;
        }
        partial.bytes.extend_from_slice(ip.payload);
        if more {
            self.partial.insert(key, partial);
            return None;
        }
        Some(partial.bytes)
    }
}

/// Forgets the oldest if there is no room for one of that key.
fn make_room<K: Copy + Eq + Hash, V>(all: &mut HashMap<K, V>, key: &K, most: usize, number: impl Fn(&V) -> u64) {
    if all.len() >= most
        && !all.contains_key(key)
        && let Some(oldest) = all.iter().min_by_key(|(_, value)| number(value)).map(|(key, _)| *key)
    {
        all.remove(&oldest);
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

    /// A fragment of a datagram to 10.0.0.9, or to fd00::9.
    fn fragment(v6: bool, identification: u8, place: usize, more: bool, data: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(u16::try_from(8 + data.len()).unwrap().to_be_bytes());
            frame.extend([FRAGMENT, 64]);
            for last in [0x53, 9] {
                frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
            }
            frame.extend([UDP, 0]);
            frame.extend((u16::try_from(place).unwrap() | u16::from(more)).to_be_bytes());
            frame.extend([0, 0, 0, identification]);
        } else {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend(u16::try_from(20 + data.len()).unwrap().to_be_bytes());
            frame.extend([0, identification]);
            frame.extend((u16::try_from(place / 8).unwrap() | u16::from(more) << 13).to_be_bytes());
            frame.extend([64, UDP, 0, 0, 10, 0, 0, 53, 10, 0, 0, 9]);
        }
        frame.extend(data);
        frame.resize(frame.len().max(60), 0xee);
        frame
    }

    #[test]
    fn an_answer_in_fragments_is_one_message() {
        let answer: Vec<u8> = (0..100).collect();
        let datagram = [&[0, 53, 0x0f, 0xa0, 0, 108, 0, 0][..], &answer].concat();
        for v6 in [false, true] {
            let part = |identification: u8, from: usize, to: usize| fragment(v6, identification, from, to < 108, &datagram[from..to]);
            let mut messages = Messages::default();
            let mut take = |frame: &[u8]| messages.of(SLOT, frame);
            let none = Vec::<Vec<u8>>::new();
            assert_eq!(take(&part(1, 0, 48)), none);
            assert_eq!(take(&part(2, 0, 104)), none, "another datagram between them");
            assert_eq!(take(&part(1, 48, 56)), none);
            assert_eq!(take(&part(1, 56, 108)), std::slice::from_ref(&answer), "v6: {v6}");
            assert_eq!(take(&part(2, 104, 108)), std::slice::from_ref(&answer), "v6: {v6}");
            // A gap, an overlap, and a rest without a beginning teach nothing.
            for wrong in [[0, 48, 56, 108], [0, 56, 48, 108], [8, 48, 48, 108]] {
                take(&part(3, wrong[0], wrong[1]));
                assert_eq!(take(&part(3, wrong[2], wrong[3])), none, "{wrong:?}");
            }
            // An identification comes round again: the rest of an old datagram is not put behind a new one.
            take(&part(4, 0, 64));
            take(&part(4, 0, 48));
            assert_eq!(take(&part(4, 64, 108)), none);
            for identification in 0..=255 {
                take(&part(identification, 0, 48));
            }
            assert_eq!(messages.partial.len(), MOST_PARTIAL);
        }
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
        for part in [fragment(false, 1, 48, true, &[7; 40]), fragment(true, 1, 48, true, &[7; 40])] {
            let whole = part.len();
            for length in 0..whole {
                assert_eq!(Ip::read(&part[..length]).map(|ip| ip.part), None, "{length} of {whole}");
            }
            assert_eq!(Ip::read(&part).and_then(|ip| ip.part), Some((1, 48, true)));
            assert_eq!(Datagram::read(&part), None);
        }
        for (byte, value) in [(12, 0x88), (14, 0x44), (23, 1)] {
            let mut other = frame.clone();
            other[byte] = value;
            assert_eq!(Datagram::read(&other), None, "another kind of frame, a header that is too short, ICMP");
            assert!(Messages::default().of(SLOT, &other).is_empty());
        }
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        assert_eq!(Datagram::read(&fragment), None);
    }
}
