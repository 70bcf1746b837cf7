//! From bytes to a flow. The common packet (no options, no extension headers, not a fragment, TCP or UDP) is read in
//! place; everything else by `bpf_skb_load_bytes`, which also reaches what is not in the linear part.

use core::mem::{MaybeUninit, offset_of};

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use stanchion_ebpf_abi::{FragmentKey, FragmentPorts, direction, reason};

use crate::{
    family::{Family, Flow, V4, V6},
    maps::FRAGMENTS,
};

pub const ETHERNET: usize = 14;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// IPv6 headers between the fixed one and the transport's.
const MAX_EXTENSIONS: usize = 8;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv4Header {
    version_length: u8,
    service: u8,
    total: [u8; 2],
    identification: [u8; 2],
    fragment: [u8; 2],
    ttl: u8,
    protocol: u8,
    checksum: [u8; 2],
    pub source: u32,
    pub destination: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv6Header {
    version_class: [u8; 4],
    payload: [u8; 2],
    next: u8,
    hops: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// How a packet relates to the flow it names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It is a packet of it.
    Member,
    /// It is an ICMP error about a packet of it.
    Related,
    /// It names none: ICMP that is neither query nor error.
    Stateless,
    /// Neighbour discovery and multicast listener reports: never blocked.
    Discovery,
}

#[derive(Clone, Copy)]
pub struct Packet<A> {
    pub source: A,
    pub destination: A,
    pub flow: Flow<A>,
    /// TCP flags, or the ICMP type.
    pub flags: u8,
    /// The packet's own protocol; differs from the flow's for [`Kind::Related`].
    pub protocol: u8,
    pub kind: Kind,
    /// The first of several fragments, with its identification.
    pub first_fragment: Option<u32>,
    /// Protocol number that all fragments carry.
    pub fragment_protocol: u8,
}

/// A [`reason`].
pub type Refusal = u8;

#[inline(always)]
fn load<T: Copy>(skb: *mut __sk_buff, offset: usize) -> Result<T, Refusal> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes size_of::<T>() bytes into the value or fails; every T here is plain bytes.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), offset as u32, value.as_mut_ptr().cast(), size_of::<T>() as u32) != 0 {
            return Err(reason::MALFORMED);
        }
        Ok(value.assume_init())
    }
}

/// Orders a packet's ends as the pod's and the peer's.
#[inline(always)]
fn ends<T>(direction: u8, source: T, destination: T) -> (T, T) {
    if direction == direction::EGRESS { (source, destination) } else { (destination, source) }
}

#[inline(always)]
fn reversed(direction: u8) -> u8 {
    direction ^ 1
}

/// Bytes of the shortest header of a protocol.
#[inline(always)]
fn least(icmp: u8, protocol: u8) -> usize {
    match protocol {
        TCP => 20,
        SCTP => 12,
        UDP => 8,
        _ if protocol == icmp => 8,
        _ => 0,
    }
}

/// Where TCP, UDP and SCTP have their ports.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ports {
    source: [u8; 2],
    destination: [u8; 2],
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Icmp {
    kind: u8,
    code: u8,
    checksum: [u8; 2],
    identifier: [u8; 2],
    sequence: [u8; 2],
}

#[inline(always)]
fn is_query<F: Family>(kind: u8) -> bool {
    if F::NUMBER == 4 { matches!(kind, 0 | 8 | 13..=18) } else { matches!(kind, 128 | 129) }
}

#[inline(always)]
fn is_error<F: Family>(kind: u8) -> bool {
    if F::NUMBER == 4 { matches!(kind, 3 | 4 | 5 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// Router solicitation, neighbour solicitation and advertisement, multicast listener messages; what only routers send
/// (router advertisement, redirect) is let in but not out of a pod.
#[inline(always)]
fn is_discovery<F: Family>(direction: u8, kind: u8) -> bool {
    F::NUMBER == 6 && (matches!(kind, 130..=133 | 135 | 136 | 143) || (direction == direction::INGRESS && matches!(kind, 134 | 137)))
}

/// What the transport header at `offset` says, as `(ports, flags, kind)`; for an ICMP error the flow is filled in by the
/// caller.
#[inline(always)]
fn transport<F: Family>(skb: *mut __sk_buff, offset: usize, protocol: u8, direction: u8) -> Result<(Ports, u8, Kind), Refusal> {
    let none = Ports { source: [0; 2], destination: [0; 2] };
    if protocol == TCP {
        let header: [u8; 20] = load(skb, offset)?;
        let ports = Ports { source: [header[0], header[1]], destination: [header[2], header[3]] };
        return Ok((ports, header[13], Kind::Member));
    }
    if protocol == UDP {
        let header: [u8; 8] = load(skb, offset)?;
        return Ok((Ports { source: [header[0], header[1]], destination: [header[2], header[3]] }, 0, Kind::Member));
    }
    if protocol == SCTP {
        let header: [u8; 12] = load(skb, offset)?;
        return Ok((Ports { source: [header[0], header[1]], destination: [header[2], header[3]] }, 0, Kind::Member));
    }
    if protocol == F::ICMP {
        let header: Icmp = load(skb, offset)?;
        if is_query::<F>(header.kind) {
            // The identifier stands on the pod's side of the key in both directions.
            let (source, destination) = ends(direction, header.identifier, [0; 2]);
            return Ok((Ports { source, destination }, header.kind, Kind::Member));
        }
        let kind = if is_error::<F>(header.kind) {
            Kind::Related
        } else if is_discovery::<F>(direction, header.kind) {
            Kind::Discovery
        } else {
            Kind::Stateless
        };
        return Ok((none, header.kind, kind));
    }
    // SAFETY: a field of the context.
    if offset > unsafe { (*skb).len } as usize {
        return Err(reason::MALFORMED);
    }
    Ok((none, 0, Kind::Member))
}

/// The flow that the packet quoted by an ICMP error belongs to: it travelled against `direction`.
#[inline(always)]
fn quoted<F: Family>(skb: *mut __sk_buff, offset: usize, protocol: u8, direction: u8, remote: F::Address) -> Result<Flow<F::Address>, Refusal> {
    let quoted_direction = reversed(direction);
    let ports = if protocol == F::ICMP {
        let header: Icmp = load(skb, offset)?;
        let (source, destination) = ends(quoted_direction, header.identifier, [0; 2]);
        Ports { source, destination }
    } else if protocol == TCP || protocol == UDP || protocol == SCTP {
        load(skb, offset)?
    } else {
        Ports { source: [0; 2], destination: [0; 2] }
    };
    let (local_port, remote_port) = ends(quoted_direction, ports.source, ports.destination);
    Ok(Flow { remote, local_port, remote_port, protocol })
}

/// Reads the common IPv4 packet in place; `None` for every other.
#[inline(always)]
pub fn ipv4_plain(skb: *mut __sk_buff, direction: u8) -> Option<Packet<u32>> {
    // SAFETY: packet memory between data and data_end, compared before each access as the verifier demands.
    unsafe {
        let data = (*skb).data as usize;
        if data + ETHERNET + 40 <= (*skb).data_end as usize {
            let ip = &*((data + ETHERNET) as *const Ipv4Header);
            let l4 = (data + ETHERNET + 20) as *const u8;
            let protocol = ip.protocol;
            if ip.version_length == 0x45
                && ip.fragment[0] & 0x3f == 0
                && ip.fragment[1] == 0
                && (protocol == TCP || protocol == UDP)
                && u16::from_be_bytes(ip.total) >= 40
            {
                let ports = &*l4.cast::<Ports>();
                let (_, remote) = ends(direction, ip.source, ip.destination);
                let (local_port, remote_port) = ends(direction, ports.source, ports.destination);
                return Some(Packet {
                    source: ip.source,
                    destination: ip.destination,
                    flow: Flow { remote, local_port, remote_port, protocol },
                    flags: if protocol == TCP { *l4.add(13) } else { 0 },
                    protocol,
                    kind: Kind::Member,
                    first_fragment: None,
                    fragment_protocol: 0,
                });
            }
        }
    }
    None
}

/// Reads any IPv4 packet.
#[inline(always)]
pub fn ipv4_general(skb: *mut __sk_buff, direction: u8, slot: u16) -> Result<Packet<u32>, Refusal> {
    let ip: Ipv4Header = load(skb, ETHERNET)?;
    let header = usize::from(ip.version_length & 15) * 4;
    let total = usize::from(u16::from_be_bytes(ip.total));
    // A total length of 0 is a segmentation-offloaded packet of more than 64 KiB.
    if ip.version_length >> 4 != 4 || header < 20 || (total != 0 && total < header) {
        return Err(reason::MALFORMED);
    }
    let offset = ETHERNET + header;
    let protocol = ip.protocol;
    let (_, remote) = ends(direction, ip.source, ip.destination);
    let mut packet = Packet {
        source: ip.source,
        destination: ip.destination,
        flow: Flow { remote, local_port: [0; 2], remote_port: [0; 2], protocol },
        flags: 0,
        protocol,
        kind: Kind::Member,
        first_fragment: None,
        fragment_protocol: protocol,
    };
    let fragment = u16::from_be_bytes(ip.fragment) & 0x3fff;
    let identification = u32::from(u16::from_be_bytes(ip.identification));
    if fragment & 0x1fff != 0 {
        // The second eight bytes of a TCP header alone could rewrite the flags that were judged.
        if protocol == TCP && fragment & 0x1fff == 1 {
            return Err(reason::MALFORMED);
        }
        later_fragment::<V4>(&mut packet, direction, slot, identification)?;
        return Ok(packet);
    }
    if fragment != 0 {
        packet.first_fragment = Some(identification);
    }
    if total != 0 && total < header + least(V4::ICMP, protocol) {
        return Err(reason::MALFORMED);
    }
    let (ports, flags, kind) = transport::<V4>(skb, offset, protocol, direction)?;
    (packet.flow.local_port, packet.flow.remote_port) = ends(direction, ports.source, ports.destination);
    packet.flags = flags;
    packet.kind = kind;
    if kind == Kind::Related {
        let inner: Ipv4Header = load(skb, offset + 8)?;
        let inner_header = usize::from(inner.version_length & 15) * 4;
        if inner.version_length >> 4 != 4 || inner_header < 20 {
            return Err(reason::MALFORMED);
        }
        if u16::from_be_bytes(inner.fragment) & 0x1fff != 0 {
            packet.kind = Kind::Stateless;
            return Ok(packet);
        }
        let (_, inner_remote) = ends(reversed(direction), inner.source, inner.destination);
        packet.flow = quoted::<V4>(skb, offset + 8 + inner_header, inner.protocol, direction, inner_remote)?;
    }
    Ok(packet)
}

/// Reads the common IPv6 packet in place; `None` for every other.
#[inline(always)]
pub fn ipv6_plain(skb: *mut __sk_buff, direction: u8) -> Option<Packet<[u32; 4]>> {
    // SAFETY: as in `ipv4`.
    unsafe {
        let data = (*skb).data as usize;
        if data + ETHERNET + 60 <= (*skb).data_end as usize {
            let ip = &*((data + ETHERNET) as *const Ipv6Header);
            let l4 = (data + ETHERNET + 40) as *const u8;
            let protocol = ip.next;
            if ip.version_class[0] >> 4 == 6 && (protocol == TCP || protocol == UDP) && u16::from_be_bytes(ip.payload) >= 20 {
                let ports = &*l4.cast::<Ports>();
                let (_, remote) = ends(direction, ip.source, ip.destination);
                let (local_port, remote_port) = ends(direction, ports.source, ports.destination);
                return Some(Packet {
                    source: ip.source,
                    destination: ip.destination,
                    flow: Flow { remote, local_port, remote_port, protocol },
                    flags: if protocol == TCP { *l4.add(13) } else { 0 },
                    protocol,
                    kind: Kind::Member,
                    first_fragment: None,
                    fragment_protocol: 0,
                });
            }
        }
    }
    None
}

/// Where the headers of an IPv6 packet led.
struct Chain {
    offset: usize,
    protocol: u8,
    /// Identification, offset and more-flag, next header: of the fragment header, if there is one.
    fragment: Option<(u32, u16, u8)>,
}

/// Walks extension headers from `offset`; stops at the transport header or at a fragment that is not the first.
#[inline(always)]
fn extensions(skb: *mut __sk_buff, mut offset: usize, mut protocol: u8) -> Result<Chain, Refusal> {
    let mut fragment = None;
    for _ in 0..MAX_EXTENSIONS {
        match protocol {
            0 | 43 | 60 | 135 | 139 | 140 => {
                let header: [u8; 8] = load(skb, offset)?;
                protocol = header[0];
                offset += (usize::from(header[1]) + 1) * 8;
            }
            51 => {
                let header: [u8; 8] = load(skb, offset)?;
                protocol = header[0];
                offset += (usize::from(header[1]) + 2) * 4;
            }
            44 => {
                let header: [u8; 8] = load(skb, offset)?;
                let place = u16::from_be_bytes([header[2], header[3]]) & 0xfff9;
                protocol = header[0];
                fragment = Some((u32::from_be_bytes([header[4], header[5], header[6], header[7]]), place, protocol));
                if place & 0xfff8 != 0 {
                    return Ok(Chain { offset, protocol, fragment });
                }
                offset += 8;
            }
            _ => return Ok(Chain { offset, protocol, fragment }),
        }
    }
    Err(reason::MALFORMED)
}

/// Reads any IPv6 packet.
#[inline(always)]
pub fn ipv6_general(skb: *mut __sk_buff, direction: u8, slot: u16) -> Result<Packet<[u32; 4]>, Refusal> {
    let ip: Ipv6Header = load(skb, ETHERNET)?;
    if ip.version_class[0] >> 4 != 6 {
        return Err(reason::MALFORMED);
    }
    let Chain { offset, protocol, fragment } = extensions(skb, ETHERNET + 40, ip.next)?;
    let (_, remote) = ends(direction, ip.source, ip.destination);
    let mut packet = Packet {
        source: ip.source,
        destination: ip.destination,
        flow: Flow { remote, local_port: [0; 2], remote_port: [0; 2], protocol },
        flags: 0,
        protocol,
        kind: Kind::Member,
        first_fragment: None,
        fragment_protocol: 0,
    };
    if let Some((identification, place, next)) = fragment {
        packet.fragment_protocol = next;
        if place & 0xfff8 != 0 {
            if protocol == TCP && place >> 3 == 1 {
                return Err(reason::MALFORMED);
            }
            later_fragment::<V6>(&mut packet, direction, slot, identification)?;
            return Ok(packet);
        }
        if place & 1 != 0 {
            packet.first_fragment = Some(identification);
        }
    }
    // A payload length of 0 is a segmentation-offloaded packet of more than 64 KiB.
    let payload = usize::from(u16::from_be_bytes(ip.payload));
    if payload != 0 && ETHERNET + 40 + payload < offset + least(V6::ICMP, protocol) {
        return Err(reason::MALFORMED);
    }
    let (ports, flags, kind) = transport::<V6>(skb, offset, protocol, direction)?;
    (packet.flow.local_port, packet.flow.remote_port) = ends(direction, ports.source, ports.destination);
    packet.flags = flags;
    packet.kind = kind;
    if kind == Kind::Related {
        let inner: Ipv6Header = load(skb, offset + 8)?;
        if inner.version_class[0] >> 4 != 6 {
            return Err(reason::MALFORMED);
        }
        let (_, inner_remote) = ends(reversed(direction), inner.source, inner.destination);
        let at = offset + 8 + size_of::<Ipv6Header>();
        let (at, inner_protocol) = if inner.next == 44 {
            let header: [u8; 8] = load(skb, at)?;
            if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
                packet.kind = Kind::Stateless;
                return Ok(packet);
            }
            (at + 8, header[0])
        } else {
            (at, inner.next)
        };
        packet.flow = quoted::<V6>(skb, at, inner_protocol, direction, inner_remote)?;
    }
    Ok(packet)
}

#[inline(always)]
pub fn fragment_key<F: Family>(packet: &Packet<F::Address>, direction: u8, slot: u16, identification: u32) -> FragmentKey {
    FragmentKey {
        slot,
        direction,
        protocol: packet.fragment_protocol,
        identification,
        source: F::words(packet.source),
        destination: F::words(packet.destination),
    }
}

/// Gives a fragment the ports of the first one, which passed.
#[inline(always)]
fn later_fragment<F: Family>(packet: &mut Packet<F::Address>, direction: u8, slot: u16, identification: u32) -> Result<(), Refusal> {
    let key = fragment_key::<F>(packet, direction, slot, identification);
    // SAFETY: the value is copied at once; an entry reused meanwhile gives ports of another datagram of the same table.
    let Some(FragmentPorts { protocol, local_port, remote_port, .. }) = (unsafe { FRAGMENTS.get(key) }) else {
        return Err(reason::FRAGMENT);
    };
    packet.protocol = *protocol;
    packet.flow.protocol = *protocol;
    packet.flow.local_port = *local_port;
    packet.flow.remote_port = *remote_port;
    // No flags of its own: it belongs to what the first fragment opened.
    packet.flags = ACK;
    Ok(())
}

const _: () = assert!(offset_of!(Ipv4Header, source) == 12 && size_of::<Ipv4Header>() == 20 && size_of::<Ipv6Header>() == 40);

/// The source of an IPv4 packet, if it is one.
#[inline(always)]
pub fn addresses4(skb: *mut __sk_buff) -> Option<u32> {
    let ip: Ipv4Header = load(skb, ETHERNET).ok()?;
    (ip.version_length >> 4 == 4).then_some(ip.source)
}

/// The source of an IPv6 packet, and whether it is neighbour discovery.
#[inline(always)]
pub fn addresses6(skb: *mut __sk_buff, direction: u8) -> Option<([u32; 4], bool)> {
    let ip: Ipv6Header = load(skb, ETHERNET).ok()?;
    if ip.version_class[0] >> 4 != 6 {
        return None;
    }
    let Ok(Chain { offset, protocol, fragment: None }) = extensions(skb, ETHERNET + 40, ip.next) else {
        return Some((ip.source, false));
    };
    let kind = if protocol == V6::ICMP { load::<u8>(skb, offset).unwrap_or(0) } else { 0 };
    Some((ip.source, is_discovery::<V6>(direction, kind)))
}

/// Source and destination for an event, zero where they cannot be read.
#[inline(always)]
pub fn peek(skb: *mut __sk_buff, family: u8) -> ([u32; 4], [u32; 4]) {
    match family {
        4 => match load::<Ipv4Header>(skb, ETHERNET) {
            Ok(ip) => ([ip.source, 0, 0, 0], [ip.destination, 0, 0, 0]),
            Err(_) => ([0; 4], [0; 4]),
        },
        6 => match load::<Ipv6Header>(skb, ETHERNET) {
            Ok(ip) => (ip.source, ip.destination),
            Err(_) => ([0; 4], [0; 4]),
        },
        _ => ([0; 4], [0; 4]),
    }
}
