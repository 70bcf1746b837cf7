//! The programs on a pod's host veth: `pod_egress` on its tc ingress, `pod_ingress` on its tc egress. One pair serves all
//! pods; what differs between pods is in the maps.
//!
//! Helpers and map types are those of Linux 5.10: ring buffer (5.8), `bpf_jiffies64` (5.6), bounded loops (5.3).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod family;
mod judge;
mod maps;
mod names;
mod packet;

use aya_ebpf::bindings::__sk_buff;
use stanchion_ebpf_abi::{
    EndpointPolicy, Event, IDENTITY_UNKNOWN, INTERFACE_PLACES, Interface, direction, endpoint_flag, event_verdict, frame_kind, reason,
    stat, verdict,
};

use crate::{
    family::{Address6, Family, V4, V6, key_start},
    judge::{DROP, Known, PASS, Subject, event, goes_on, is_own, outcome, police, role},
    maps::{ENDPOINTS, INTERFACES, INTERFACES_FAR, PACKET4, PACKET6, WALK, count, count_stat, is_told, tell},
    packet::{ETHERNET, FIN, Ipv4Header, Kind, NOT_FIRST, Packet, RST, SYN, TCP, UDP, ipv4_general, ipv6_general},
};

const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;
const ARP: u32 = 0x0806_u16.to_be() as u32;

// Entry points without aya's attribute, which would put a call and a return before each.

/// Out of the pod: tc ingress of the host veth.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn pod_egress(skb: *mut __sk_buff) -> i32 {
    run(skb, direction::EGRESS)
}

/// Into the pod: tc egress of the host veth.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn pod_ingress(skb: *mut __sk_buff) -> i32 {
    run(skb, direction::INGRESS)
}

#[inline(always)]
fn run(skb: *mut __sk_buff, direction: u8) -> i32 {
    let Some(interface) = interface(skb) else {
        return stranger();
    };
    let Some(endpoint) = ENDPOINTS.get(u32::from(interface.slot)) else {
        return stranger();
    };
    let policy = &endpoint.halves[usize::from(endpoint.sequence & 1)];
    if policy.flags & (endpoint_flag::ISOLATED_INGRESS | endpoint_flag::ISOLATED_EGRESS) == 0 {
        if policy.flags & endpoint_flag::READY == 0 {
            return stranger();
        }
        return if direction == direction::INGRESS { PASS } else { unpoliced(skb, interface) };
    }
    // SAFETY: a field of the context.
    match unsafe { (*skb).protocol } {
        IPV4 => policed::<V4>(skb, interface, policy, direction),
        IPV6 => policed::<V6>(skb, interface, policy, direction),
        ARP => PASS,
        _ => refuse(skb, interface.slot, direction, reason::ETHERTYPE, 0),
    }
}

/// The record of the interface that a packet goes through.
#[inline(always)]
fn interface(skb: *mut __sk_buff) -> Option<&'static Interface> {
    // SAFETY: a field of the context.
    let if_index = unsafe { (*skb).ifindex };
    match INTERFACES.get(if_index & (INTERFACE_PLACES - 1)) {
        Some(place) if place.if_index == if_index => Some(place),
        // SAFETY: read while the program runs; the agent replaces records, it does not change them.
        _ => unsafe { INTERFACES_FAR.get(if_index) },
    }
}

/// No record: the agent writes them before it attaches, so this is damage, and closed.
#[inline(always)]
fn stranger() -> i32 {
    count_stat(stat::NO_ENDPOINT);
    DROP
}

/// A packet of a pod with policy. The common one is done when its flow is found; whatever else there is to know of others
/// is read only after that.
#[inline(always)]
fn policed<F: Family>(skb: *mut __sk_buff, interface: &Interface, policy: &EndpointPolicy, direction: u8) -> i32 {
    let mut known = Known::NotAsked;
    if let Some(plain) = F::plain(skb, direction)
        && (direction == direction::INGRESS || plain.source == F::own(interface))
        && (plain.protocol != TCP || plain.flags & (SYN | FIN | RST) == 0)
    {
        let flow = plain.flow;
        let key = F::key(key_start(F::head(interface), flow.protocol, flow.local_port, flow.remote_port), flow.remote);
        known = match F::entry(&key) {
            Some(entry) => {
                let is_answer = direction == direction::INGRESS && flow.remote_port == DNS;
                if !(is_answer && policy.flags & endpoint_flag::BY_NAME != 0) && goes_on(entry, policy, direction) {
                    // SAFETY: a field of the context.
                    count(u32::from(interface.slot), direction, verdict::ALLOW, unsafe { (*skb).len });
                    return PASS;
                }
                Known::Entry(entry)
            }
            None => Known::Nothing,
        };
    }
    let Some(packet) = F::in_hand() else { return DROP };
    // SAFETY: this CPU's own copy; programs on one CPU do not interrupt each other in tc.
    let packet = unsafe { &mut *packet };
    match F::plain(skb, direction) {
        Some(plain) => {
            *packet = Packet {
                source: plain.source,
                destination: plain.destination,
                flow: plain.flow,
                flags: plain.flags,
                protocol: plain.protocol,
                kind: Kind::Member,
                first_fragment: NOT_FIRST,
                fragment_protocol: 0,
                rule: 0,
                identity: IDENTITY_UNKNOWN,
            }
        }
        None => {
            let why = F::read(skb, u32::from(direction), u32::from(interface.slot));
            if why != 0 {
                return refuse(skb, interface.slot, direction, why as u8, F::NUMBER);
            }
        }
    }
    let policy = *policy;
    let subject = Subject { skb, interface, policy, direction };
    if direction == direction::EGRESS
        && packet.source != F::own(interface)
        && packet.kind != Kind::Discovery
        && !is_own::<F>(interface, packet.source)
    {
        // SAFETY: a field of the context.
        let length = unsafe { (*skb).len };
        count(u32::from(interface.slot), direction, verdict::DENY, length);
        event::<F>(length, role(interface.slot, direction), outcome(event_verdict::DENIED, reason::SOURCE));
        return DROP;
    }
    let result = police::<F>(&subject, packet, known);
    if result == PASS
        && direction == direction::INGRESS
        && policy.flags & endpoint_flag::BY_NAME != 0
        && matches!(packet.flow.protocol, TCP | UDP)
        && packet.flow.remote_port == DNS
    {
        copy_frame(skb, u32::from(interface.slot), u32::from(frame_kind::ANSWER));
    }
    result
}

const DNS: [u8; 2] = 53u16.to_be_bytes();

/// A pod that no policy selects: everything passes, but not from addresses that are not its own.
#[inline(always)]
fn unpoliced(skb: *mut __sk_buff, interface: &Interface) -> i32 {
    // SAFETY: fields of the context, and packet memory compared with data_end before it is read.
    unsafe {
        let (data, end) = ((*skb).data as usize, (*skb).data_end as usize);
        let protocol = (*skb).protocol;
        if protocol == IPV4 && data + ETHERNET + 20 <= end && (*((data + ETHERNET) as *const Ipv4Header)).source == interface.ipv4 {
            return PASS;
        }
        if protocol == IPV6 && data + ETHERNET + 40 <= end && Address6::at::<22, 30>(data as *const u8) == V6::own(interface) {
            return PASS;
        }
        if protocol == ARP {
            return PASS;
        }
    }
    unpoliced_general(skb)
}

// What follows is called, not inlined: the verifier goes through each once, by itself. What every denied packet needs is
// inlined all the same: a return costs as much as a map lookup where the kernel guards it.

/// Further addresses, neighbour discovery from link-local ones, headers outside the linear part; and what is refused.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn unpoliced_general(skb: *mut __sk_buff) -> i32 {
    let Some(interface) = interface(skb) else {
        return stranger();
    };
    // SAFETY: a field of the context.
    let (why, family) = match unsafe { (*skb).protocol } {
        IPV4 => match packet::addresses4(skb) {
            Some(source) if source == interface.ipv4 || is_own::<V4>(interface, source) => return PASS,
            Some(_) => (reason::SOURCE, 4),
            None => (reason::MALFORMED, 4),
        },
        IPV6 => match packet::addresses6(skb, direction::EGRESS) {
            Some((source, discovery)) if discovery || source == V6::own(interface) || is_own::<V6>(interface, source) => return PASS,
            Some(_) => (reason::SOURCE, 6),
            None => (reason::MALFORMED, 6),
        },
        _ => (reason::ETHERTYPE, 0),
    };
    refuse(skb, interface.slot, direction::EGRESS, why, family)
}

/// Drops a packet that cannot be judged, with an event that says what little is known.
#[inline(always)]
fn refuse(skb: *mut __sk_buff, slot: u16, direction: u8, why: u8, family: u8) -> i32 {
    refused(skb, u32::from(slot), u32::from(direction), u32::from(why), u32::from(family))
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn refused(skb: *mut __sk_buff, slot: u32, direction: u32, why: u32, family: u32) -> i32 {
    // SAFETY: a field of the context.
    let length = unsafe { (*skb).len };
    let direction = direction as u8;
    count(slot, direction, verdict::DENY, length);
    if !is_told(event_verdict::DENIED) {
        return DROP;
    }
    let (source, destination) = packet::peek(skb, family as u8);
    let (local, remote) = if direction == direction::EGRESS { (source, destination) } else { (destination, source) };
    tell(Event {
        slot: slot as u16,
        direction,
        verdict: event_verdict::DENIED,
        reason: why as u8,
        protocol: 0,
        family: family as u8,
        flags: 0,
        rule: 0,
        identity: 0,
        length,
        local_port: [0; 2],
        remote_port: [0; 2],
        local,
        remote,
    });
    DROP
}

/// Puts an IPv4 packet of any shape in hand: 0, or a [`reason`] to refuse it.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn read4(skb: *mut __sk_buff, direction: u32, slot: u32) -> i32 {
    // SAFETY: this CPU's own place.
    let refusal =
        PACKET4.get_ptr_mut(0).map_or(reason::MALFORMED, |place| ipv4_general(skb, direction as u8, slot as u16, unsafe { &mut *place }));
    i32::from(refusal)
}

/// The same for IPv6.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn read6(skb: *mut __sk_buff, direction: u32, slot: u32) -> i32 {
    // SAFETY: this CPU's own place.
    let refusal =
        PACKET6.get_ptr_mut(0).map_or(reason::MALFORMED, |place| ipv6_general(skb, direction as u8, slot as u16, unsafe { &mut *place }));
    i32::from(refusal)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn open4(head: u32, revision: u32, direction: u32, over: u32) -> i32 {
    judge::open::<V4>(head, revision, direction as u8, over != 0);
    0
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn remember4(role: u32) -> i32 {
    judge::remember::<V4>(role);
    0
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn open6(head: u32, revision: u32, direction: u32, over: u32) -> i32 {
    judge::open::<V6>(head, revision, direction as u8, over != 0);
    0
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn remember6(role: u32) -> i32 {
    judge::remember::<V6>(role);
    0
}

/// See [`packet::extensions`], from behind the fixed header.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn walk6(skb: *mut __sk_buff, protocol: u32) -> i32 {
    // SAFETY: this CPU's own place.
    WALK.get_ptr_mut(0).map_or(i32::from(reason::MALFORMED), |walk| i32::from(packet::extensions(skb, walk, ETHERNET + 40, protocol as u8)))
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn judge4(opener: u32, set: u32, peer: u32) -> i32 {
    judge::judge::<V4>(opener as u8, set, peer)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn judge6(opener: u32, set: u32, first: u64, second: u64) -> i32 {
    judge::judge::<V6>(opener as u8, set, Address6(first, second))
}

/// See [`names::copy`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn copy_frame(skb: *mut __sk_buff, slot: u32, kind: u32) -> i32 {
    names::copy(skb, slot as u16, kind as u8);
    0
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers used are open to every licence; the kernel asks for the word all the same.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
