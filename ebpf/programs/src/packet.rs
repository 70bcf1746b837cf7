//! From bytes to a flow. The common packet (no options, no extension headers, not a fragment, TCP or UDP) is read in
//! place; everything else by `bpf_skb_load_bytes`, which also reaches what is not in the linear part.

use core::{
    mem::{MaybeUninit, offset_of},
    ops::{Deref, DerefMut},
    ptr::{self, addr_of, addr_of_mut},
};

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use stanchion_ebpf_abi::{EndpointPolicy, FragmentKey, FragmentPorts, IDENTITY_UNKNOWN, Interface, direction, reason};

use crate::{
    family::{Address, Family, Flow, Pair, V4, V6},
    maps::{FRAGMENTS, PACKET, WALK},
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
#[repr(u8)]
pub enum Kind {
    /// It is a packet of it.
    Member,
    /// It is an ICMP error about a packet of it.
    Related,
    /// It names none: ICMP that is neither query nor error.
    Stateless,
    /// Neighbour discovery and multicast listener reports on the pod's link: never blocked.
    Discovery,
}

/// What is known of a packet that its flow alone did not decide. What every such packet sets to zero lies together.
#[repr(C)]
pub struct Packet {
    /// Source and destination.
    pub ends: [Address; 2],
    pub flow: Flow<Address>,
    /// TCP flags, or the ICMP type.
    pub flags: u8,
    /// The packet's own protocol; differs from the flow's for [`Kind::Related`].
    pub protocol: u8,
    pub kind: Kind,
    /// It is the first of several fragments, and the two fields that follow are theirs.
    pub is_first: bool,
    pub identification: u32,
    /// The rule that decided, and what the peer is.
    pub rule: u32,
    pub identity: u32,
    /// What becomes of it, see `judge`.
    pub outcome: u32,
    /// What its judgement has found out so far, see `judge`.
    pub found: u8,
    /// Protocol number that all fragments carry.
    pub fragment_protocol: u8,
    pub pod: Pod,
}

/// Whose a packet is, and of which family.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Pod {
    /// Its address behind the interface.
    pub own: Address,
    pub policy: EndpointPolicy,
    /// [`stanchion_ebpf_abi::endpoint_flag`].
    pub policy_flags: u8,
    /// Where keys of its flows begin.
    pub head: u32,
    pub slot: u16,
    pub direction: u8,
    /// [`stanchion_ebpf_abi::Interface::flags`].
    pub flags: u8,
    pub family: u8,
}

impl Pod {
    /// Field by field: a copy as a whole goes by the stack, in narrow pieces that the processor cannot read wide at once.
    #[inline(always)]
    pub fn fill<F: Family>(&mut self, interface: &Interface, (flags, policy): (u8, &EndpointPolicy), direction: u8) {
        self.own = F::wide(F::own(interface));
        self.policy.revision = policy.revision;
        self.policy.policy[0] = policy.policy[0];
        self.policy.policy[1] = policy.policy[1];
        self.policy_flags = flags;
        self.head = F::head(interface);
        self.slot = interface.slot;
        self.direction = direction;
        self.flags = interface.flags;
        self.family = F::NUMBER;
    }
}

impl Packet {
    #[inline(always)]
    fn ports(&mut self, ports: Ports, from_pod: bool) {
        self.flow.ports = if from_pod { Pair::new(ports.source, ports.destination) } else { Pair::new(ports.destination, ports.source) };
    }

    // What ways part by is read anew wherever it is asked for: neither the compiler nor the verifier then follows each way to the end.

    #[inline(always)]
    pub fn is_ipv4(&self) -> bool {
        anew(&self.pod.family) == V4::NUMBER
    }

    #[inline(always)]
    pub fn is_egress(&self) -> bool {
        anew(&self.pod.direction) == direction::EGRESS
    }

    #[inline(always)]
    pub fn is(&self, kind: Kind) -> bool {
        // SAFETY: an enumeration of one byte.
        let present = unsafe { addr_of!(self.kind).cast::<u8>().read_volatile() };
        present == kind as u8
    }

    /// Of its flow.
    #[inline(always)]
    pub fn flow_protocol(&self) -> u8 {
        anew(&self.flow.protocol)
    }

    #[inline(always)]
    pub fn flags(&self) -> u8 {
        anew(&self.flags)
    }

    /// The family's protocol number of ICMP.
    #[inline(always)]
    pub fn icmp(&self) -> u8 {
        V4::ICMP + (anew(&self.pod.family) >> 1 & 1) * (V6::ICMP - V4::ICMP)
    }

    #[inline(always)]
    pub fn source(&self) -> Address {
        self.ends[0]
    }

    /// A packet of its flow, until headers say otherwise.
    #[inline(always)]
    pub fn begin(&mut self, source: Address, destination: Address, flow: Flow<Address>, flags: u8) {
        self.ends = [source, destination];
        self.flow.remote = flow.remote;
        self.flow.ports = flow.ports;
        self.flow.protocol = flow.protocol;
        self.flags = flags;
        self.protocol = flow.protocol;
        self.kind = Kind::Member;
        self.is_first = false;
        self.rule = 0;
        self.identity = IDENTITY_UNKNOWN;
    }
}

/// This CPU's packet in hand. A pointer, dereferenced access by access: what is called by who has it changes it too.
#[derive(Clone, Copy)]
pub struct InHand(*mut Packet);

impl InHand {
    #[inline(always)]
    pub fn get() -> Option<Self> {
        PACKET.get_ptr_mut(0).map(Self)
    }
}

impl Deref for InHand {
    type Target = Packet;

    #[inline(always)]
    fn deref(&self) -> &Packet {
        // SAFETY: this CPU's own place; programs on one CPU do not interrupt each other in tc.
        unsafe { &*self.0 }
    }
}

impl DerefMut for InHand {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Packet {
        // SAFETY: as above.
        unsafe { &mut *self.0 }
    }
}

#[inline(always)]
pub fn anew<T: Copy>(value: &T) -> T {
    // SAFETY: a reference.
    unsafe { ptr::from_ref(value).read_volatile() }
}

/// How far the headers of an IPv6 packet have been read. In a map and not on the stack, see `maps`.
#[repr(C)]
pub struct Walk {
    offset: u32,
    /// Of what is at `offset`.
    protocol: u32,
    /// Of the fragment header, if `fragmented`.
    identification: u32,
    /// Its offset and more-flag.
    place: u16,
    /// What follows it.
    next: u8,
    fragmented: u8,
}

/// What the common packet says.
#[derive(Clone, Copy)]
pub struct Plain<A> {
    pub source: A,
    pub destination: A,
    pub flow: Flow<A>,
    /// TCP flags.
    pub flags: u8,
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
#[repr(C, align(2))]
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
/// (router advertisement, redirect) is let in but not out of a pod. Into a pod it must come from the link: neighbour discovery has a hop
/// limit that no router leaves (RFC 4861, 6.1 and 7.1), and who speaks of listeners a link-local address (RFC 2710, 3; RFC 3810, 5),
/// from which no router forwards. Out of a pod it must stay on the link: its next hop and the node that asks for it have link-local
/// addresses.
#[inline(always)]
fn is_discovery<F: Family>(skb: *mut __sk_buff, direction: u8, kind: u8, [source, destination]: [Address; 2]) -> bool {
    if F::NUMBER != 6 {
        return false;
    }
    if direction != direction::INGRESS {
        return matches!(kind, 130..=133 | 135 | 136 | 143) && destination.is_on_link();
    }
    match kind {
        133..=137 => load::<u8>(skb, ETHERNET + offset_of!(Ipv6Header, hops)) == Ok(255),
        130..=132 | 143 => source.is_link_local(),
        _ => false,
    }
}

/// Reads the transport header at `offset`. Of an ICMP error the flow is left to the caller.
#[inline(always)]
fn transport<F: Family>(skb: *mut __sk_buff, offset: usize, packet: &mut Packet) -> Refusal {
    let protocol = packet.flow.protocol;
    if protocol == TCP || protocol == UDP || protocol == SCTP {
        let Ok(ports) = load::<Ports>(skb, offset) else { return reason::MALFORMED };
        packet.ports(ports, packet.is_egress());
        // The last byte of the header, and of TCP the flags too, must be there.
        let last = if protocol == TCP {
            12
        } else if protocol == UDP {
            4
        } else {
            8
        };
        let Ok(rest) = load::<[u8; 4]>(skb, offset + last) else { return reason::MALFORMED };
        if protocol == TCP {
            packet.flags = rest[1];
            let Ok(_urgent) = load::<[u8; 4]>(skb, offset + 16) else { return reason::MALFORMED };
        }
        return 0;
    }
    if protocol == F::ICMP {
        let Ok(header) = load::<Icmp>(skb, offset) else { return reason::MALFORMED };
        packet.flags = header.kind;
        if is_query::<F>(header.kind) {
            // The identifier stands on the pod's side of the key in both directions.
            packet.flow.ports = Pair::new(header.identifier, [0; 2]);
        } else {
            packet.kind = if is_error::<F>(header.kind) {
                Kind::Related
            } else if is_discovery::<F>(skb, anew(&packet.pod.direction), header.kind, packet.ends) {
                Kind::Discovery
            } else {
                Kind::Stateless
            };
        }
        return 0;
    }
    // SAFETY: a field of the context.
    if offset > unsafe { (*skb).len } as usize { reason::MALFORMED } else { 0 }
}

/// Makes the flow that of the packet quoted by an ICMP error, which travelled the other way.
#[inline(always)]
fn quoted<F: Family>(skb: *mut __sk_buff, offset: usize, protocol: u8, packet: &mut Packet) -> Refusal {
    packet.flow.protocol = protocol;
    if protocol == F::ICMP {
        let Ok(header) = load::<Icmp>(skb, offset) else { return reason::MALFORMED };
        packet.flow.ports = Pair::new(header.identifier, [0; 2]);
    } else if protocol == TCP || protocol == UDP || protocol == SCTP {
        let Ok(ports) = load::<Ports>(skb, offset) else { return reason::MALFORMED };
        packet.ports(ports, !packet.is_egress());
    }
    0
}

/// Whether an error of the pod goes elsewhere than to the source of the packet that it quotes, which no host's does (RFC 1122, 3.2.2;
/// RFC 4443, 2.2): with a flow to anybody it would carry data to everybody.
#[inline(always)]
fn is_astray(packet: &Packet, source: Address) -> bool {
    packet.is_egress() && packet.ends[1] != source
}

/// Begins a packet: everything but what further headers say.
#[inline(always)]
fn begin(packet: &mut Packet, source: Address, destination: Address, protocol: u8) {
    packet.fragment_protocol = protocol;
    packet.begin(source, destination, Flow { remote: source, ports: Pair::NONE, protocol }, 0);
    if packet.is_egress() {
        packet.flow.remote = destination;
    }
}

/// Reads the common IPv4 packet in place; `None` for every other.
#[inline(always)]
pub fn ipv4_plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<u32>> {
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
                let (local, peer) = ends(direction, ports.source, ports.destination);
                return Some(Plain {
                    source: ip.source,
                    destination: ip.destination,
                    flow: Flow { remote, ports: Pair::new(local, peer), protocol },
                    flags: if protocol == TCP { *l4.add(13) } else { 0 },
                });
            }
        }
    }
    None
}

/// Reads any IPv4 packet: 0, or a reason to refuse it.
#[inline(always)]
pub fn ipv4_general(skb: *mut __sk_buff, packet: &mut Packet) -> Refusal {
    let Ok(ip) = load::<Ipv4Header>(skb, ETHERNET) else { return reason::MALFORMED };
    let header = usize::from(ip.version_length & 15) * 4;
    let total = usize::from(u16::from_be_bytes(ip.total));
    // A total length of 0 is a segmentation-offloaded packet of more than 64 KiB.
    if ip.version_length >> 4 != 4 || header < 20 || (total != 0 && total < header) {
        return reason::MALFORMED;
    }
    let offset = ETHERNET + header;
    let protocol = ip.protocol;
    begin(packet, Address::of4(ip.source), Address::of4(ip.destination), protocol);
    let fragment = u16::from_be_bytes(ip.fragment) & 0x3fff;
    let identification = u32::from(u16::from_be_bytes(ip.identification));
    if fragment & 0x1fff != 0 {
        // The second eight bytes of a TCP header alone could rewrite the flags that were judged.
        if protocol == TCP && fragment & 0x1fff == 1 {
            return reason::MALFORMED;
        }
        return later_fragment(packet, identification);
    }
    if fragment != 0 {
        (packet.is_first, packet.identification) = (true, identification);
    }
    if total != 0 && total < header + least(V4::ICMP, protocol) {
        return reason::MALFORMED;
    }
    let refusal = transport::<V4>(skb, offset, packet);
    if refusal != 0 || packet.kind != Kind::Related {
        return refusal;
    }
    let Ok(inner) = load::<Ipv4Header>(skb, offset + 8) else { return reason::MALFORMED };
    let inner_header = usize::from(inner.version_length & 15) * 4;
    if inner.version_length >> 4 != 4 || inner_header < 20 {
        return reason::MALFORMED;
    }
    if u16::from_be_bytes(inner.fragment) & 0x1fff != 0 || is_astray(packet, Address::of4(inner.source)) {
        packet.kind = Kind::Stateless;
        return 0;
    }
    packet.flow.remote = Address::of4(if packet.is_egress() { inner.source } else { inner.destination });
    quoted::<V4>(skb, offset + 8 + inner_header, inner.protocol, packet)
}

/// Reads the common IPv6 packet in place; `None` for every other.
#[inline(always)]
pub fn ipv6_plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<Address>> {
    // SAFETY: as in `ipv4`.
    unsafe {
        let data = (*skb).data as usize;
        if data + ETHERNET + 60 <= (*skb).data_end as usize {
            let ip = &*((data + ETHERNET) as *const Ipv6Header);
            let l4 = (data + ETHERNET + 40) as *const u8;
            let protocol = ip.next;
            if ip.version_class[0] >> 4 == 6 && (protocol == TCP || protocol == UDP) && u16::from_be_bytes(ip.payload) >= 20 {
                let ports = &*l4.cast::<Ports>();
                let at = data as *const u8;
                let (source, destination) = (Address::at::<22, 30>(at), Address::at::<38, 46>(at));
                let (_, remote) = ends(direction, source, destination);
                let (local, peer) = ends(direction, ports.source, ports.destination);
                return Some(Plain {
                    source,
                    destination,
                    flow: Flow { remote, ports: Pair::new(local, peer), protocol },
                    flags: if protocol == TCP { *l4.add(13) } else { 0 },
                });
            }
        }
    }
    None
}

/// Walks extension headers; stops at the transport header or at a fragment that is not the first.
#[inline(always)]
pub fn extensions(skb: *mut __sk_buff, walk: *mut Walk, offset: usize, protocol: u8) -> Refusal {
    // SAFETY: this CPU's own place. Volatile, because the call below changes it, and so that the verifier forgets what it was.
    unsafe {
        (*walk).fragmented = 0;
        addr_of_mut!((*walk).offset).write_volatile(offset as u32);
        addr_of_mut!((*walk).protocol).write_volatile(u32::from(protocol));
        for _ in 0..MAX_EXTENSIONS {
            let protocol = addr_of_mut!((*walk).protocol).read_volatile();
            if !matches!(protocol, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
                return 0;
            }
            match crate::step6(skb) {
                GOES_ON => {}
                ENDS => return 0,
                _ => return reason::MALFORMED,
            }
        }
    }
    reason::MALFORMED
}

/// Answers of [`step`]; everything else is damage.
const ENDS: i32 = 0;
const GOES_ON: i32 = 1;

/// Goes over the extension header at which the walk is.
#[inline(always)]
pub fn step(skb: *mut __sk_buff, walk: &mut Walk) -> i32 {
    let Walk { offset, protocol, .. } = *walk;
    let Ok(header) = load::<[u8; 8]>(skb, offset as usize) else { return -1 };
    walk.protocol = u32::from(header[0]);
    let mut length = (u32::from(header[1]) + 1) * 8;
    if protocol == 51 {
        length = (u32::from(header[1]) + 2) * 4;
    }
    if protocol == 44 {
        length = 8;
        let place = u16::from_be_bytes([header[2], header[3]]) & 0xfff9;
        walk.identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        walk.place = place;
        walk.next = header[0];
        walk.fragmented = 1;
        if place & 0xfff8 != 0 {
            return ENDS;
        }
    }
    walk.offset = offset + length;
    GOES_ON
}

/// Reads any IPv6 packet: 0, or a reason to refuse it.
#[inline(always)]
pub fn ipv6_general(skb: *mut __sk_buff, packet: &mut Packet) -> Refusal {
    let (Ok(ip), Some(walk)) = (load::<Ipv6Header>(skb, ETHERNET), WALK.get_ptr_mut(0)) else { return reason::MALFORMED };
    if ip.version_class[0] >> 4 != 6 || crate::walk6(skb, u32::from(ip.next)) != 0 {
        return reason::MALFORMED;
    }
    // SAFETY: this CPU's own place.
    let (offset, protocol, fragmented, place, identification, next) = unsafe {
        let walk = &*walk;
        let offset = addr_of!(walk.offset).read_volatile() as usize;
        (offset, addr_of!(walk.protocol).read_volatile() as u8, walk.fragmented != 0, walk.place, walk.identification, walk.next)
    };
    begin(packet, Address::of(ip.source), Address::of(ip.destination), protocol);
    packet.fragment_protocol = 0;
    if fragmented {
        packet.fragment_protocol = next;
        if place & 0xfff8 != 0 {
            if protocol == TCP && place >> 3 == 1 {
                return reason::MALFORMED;
            }
            return later_fragment(packet, identification);
        }
        if place & 1 != 0 {
            (packet.is_first, packet.identification) = (true, identification);
        }
    }
    // A payload length of 0 is a segmentation-offloaded packet of more than 64 KiB.
    let payload = usize::from(u16::from_be_bytes(ip.payload));
    if payload != 0 && ETHERNET + 40 + payload < offset + least(V6::ICMP, protocol) {
        return reason::MALFORMED;
    }
    let refusal = transport::<V6>(skb, offset, packet);
    if refusal != 0 || packet.kind != Kind::Related {
        return refusal;
    }
    let Ok(inner) = load::<Ipv6Header>(skb, offset + 8) else { return reason::MALFORMED };
    if inner.version_class[0] >> 4 != 6 {
        return reason::MALFORMED;
    }
    if is_astray(packet, Address::of(inner.source)) {
        packet.kind = Kind::Stateless;
        return 0;
    }
    packet.flow.remote = Address::of(if packet.is_egress() { inner.source } else { inner.destination });
    let at = offset + 8 + size_of::<Ipv6Header>();
    if inner.next != 44 {
        return quoted::<V6>(skb, at, inner.next, packet);
    }
    let Ok(header) = load::<[u8; 8]>(skb, at) else { return reason::MALFORMED };
    if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
        packet.flow.remote = packet.ends[usize::from(packet.pod.direction & 1)];
        packet.kind = Kind::Stateless;
        return 0;
    }
    quoted::<V6>(skb, at + 8, header[0], packet)
}

#[inline(always)]
pub fn fragment_key(packet: &Packet, identification: u32) -> FragmentKey {
    FragmentKey {
        slot: packet.pod.slot,
        direction: packet.pod.direction,
        protocol: packet.fragment_protocol,
        identification,
        source: packet.ends[0].words(),
        destination: packet.ends[1].words(),
    }
}

/// Gives a fragment the ports of the first one, which passed.
#[inline(always)]
fn later_fragment(packet: &mut Packet, identification: u32) -> Refusal {
    let key = fragment_key(packet, identification);
    // SAFETY: the value is copied at once; an entry reused meanwhile gives ports of another datagram of the same table.
    let Some(FragmentPorts { protocol, local_port, remote_port, .. }) = (unsafe { FRAGMENTS.get(&key) }) else {
        return reason::FRAGMENT;
    };
    packet.protocol = *protocol;
    packet.flow.protocol = *protocol;
    packet.flow.ports = Pair::new(*local_port, *remote_port);
    // No flags of its own: it belongs to what the first fragment opened.
    packet.flags = ACK;
    0
}

const _: () = assert!(offset_of!(Ipv4Header, source) == 12 && size_of::<Ipv4Header>() == 20 && size_of::<Ipv6Header>() == 40);

/// The source of an IPv4 packet, if it is one, and that it is not neighbour discovery.
#[inline(always)]
pub fn addresses4(skb: *mut __sk_buff) -> Option<(Address, bool)> {
    let ip: Ipv4Header = load(skb, ETHERNET).ok()?;
    (ip.version_length >> 4 == 4).then_some((Address::of4(ip.source), false))
}

/// The source of an IPv6 packet, and whether it is neighbour discovery.
#[inline(always)]
pub fn addresses6(skb: *mut __sk_buff, direction: u8) -> Option<(Address, bool)> {
    let ip: Ipv6Header = load(skb, ETHERNET).ok()?;
    if ip.version_class[0] >> 4 != 6 {
        return None;
    }
    let walk = WALK.get_ptr_mut(0)?;
    if crate::walk6(skb, u32::from(ip.next)) != 0 {
        return Some((Address::of(ip.source), false));
    }
    // SAFETY: this CPU's own place.
    let (offset, protocol, fragmented) =
        unsafe { (addr_of!((*walk).offset).read_volatile(), addr_of!((*walk).protocol).read_volatile(), (*walk).fragmented != 0) };
    if fragmented || protocol != u32::from(V6::ICMP) {
        return Some((Address::of(ip.source), false));
    }
    let kind = load::<u8>(skb, offset as usize).unwrap_or(0);
    Some((Address::of(ip.source), is_discovery::<V6>(skb, direction, kind, [Address::of(ip.source), Address::of(ip.destination)])))
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
