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
mod recent;

use aya_ebpf::bindings::__sk_buff;
use stanchion_ebpf_abi::{
    Endpoint, Event, INTERFACE_PLACES, Interface, direction, endpoint_flag, event_verdict, frame_kind, reason, stat, verdict,
};

use crate::{
    family::{Address, Family, Flow, V4, V6, key_start},
    judge::{DNS, DROP, PASS, is_own, ticks},
    maps::{ENDPOINTS, INTERFACES, INTERFACES_FAR, WALK, count, count_stat, is_told, tell},
    packet::{ETHERNET, FIN, InHand, Ipv4Header, Plain, Pod, RST, SYN, TCP, anew, ipv4_general, ipv6_general},
    recent::Recent,
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
    let Some((interface, endpoint)) = pod(skb) else {
        return stranger();
    };
    // Read once: it says which half it speaks of.
    let flags = anew(&endpoint.flags);
    if flags & (endpoint_flag::ISOLATED_INGRESS | endpoint_flag::ISOLATED_EGRESS) == 0 {
        if flags & endpoint_flag::READY == 0 {
            return stranger();
        }
        return if direction == direction::INGRESS { PASS } else { unpoliced(skb, interface) };
    }
    // SAFETY: a field of the context.
    match unsafe { (*skb).protocol } {
        IPV4 => policed::<V4>(skb, interface, endpoint, flags, direction),
        IPV6 => policed::<V6>(skb, interface, endpoint, flags, direction),
        ARP => PASS,
        _ => refuse(skb, interface.slot, direction, reason::ETHERTYPE, 0),
    }
}

/// The record of the interface that a packet goes through.
#[inline(always)]
fn interface(skb: *mut __sk_buff) -> Option<&'static Interface> {
    // SAFETY: a field of the context.
    let if_index = unsafe { (*skb).ifindex };
    let place = INTERFACES.get(if_index & (INTERFACE_PLACES - 1))?;
    if place.if_index == if_index {
        return Some(place);
    }
    // SAFETY: a number, read at once.
    let place = INTERFACES.get(unsafe { *INTERFACES_FAR.get(if_index)? })?;
    // The agent may have given the place away meanwhile.
    (place.if_index == if_index).then_some(place)
}

/// The pod behind the interface that a packet goes through.
#[inline(always)]
fn pod(skb: *mut __sk_buff) -> Option<(&'static Interface, &'static Endpoint)> {
    let interface = interface(skb)?;
    Some((interface, ENDPOINTS.get(u32::from(interface.slot))?))
}

/// No record: the agent writes them before it attaches, so this is damage, and closed.
#[inline(always)]
fn stranger() -> i32 {
    count_stat(stat::NO_ENDPOINT);
    DROP
}

/// A packet of a pod with policy. The common one is done when its flow is found; others are only taken in hand here.
#[inline(always)]
fn policed<F: Family>(skb: *mut __sk_buff, interface: &Interface, endpoint: &Endpoint, policy_flags: u8, direction: u8) -> i32 {
    let policy = endpoint.half(policy_flags);
    let Some(plain) = F::plain(skb, direction) else {
        return match InHand::get() {
            Some(mut packet) => {
                packet.pod.fill::<F>(interface, (policy_flags, policy), direction);
                police(skb, in_hand::NOTHING)
            }
            None => DROP,
        };
    };
    let Plain { source, destination, flow, flags } = plain;
    let mut state = in_hand::PACKET;
    let is_told_names = direction == direction::INGRESS && flow.ports.peer() == DNS && policy_flags & endpoint_flag::BY_NAME != 0;
    if (direction == direction::INGRESS || source == F::own(interface))
        && (flow.protocol != TCP || flags & (SYN | FIN | RST) == 0)
        && !is_told_names
    {
        let now = ticks();
        let start = key_start(F::head(interface), flow.protocol, flow.ports);
        let recent = Recent::new((start, F::wide(flow.remote)), (direction, F::NUMBER), (policy.revision, endpoint.epoch), now);
        let Some(place) = recent.place() else { return DROP };
        // SAFETY: this CPU's own place.
        let mut goes_on = unsafe { *place == recent };
        if !goes_on {
            match F::entry(&F::key(start, flow.remote)) {
                Some(entry) => {
                    goes_on = judge::goes_on(entry, flow.protocol, policy, direction, now);
                    if goes_on {
                        // SAFETY: as above.
                        unsafe { *place = recent };
                    }
                }
                None => state = in_hand::NEW,
            }
        }
        if goes_on {
            // SAFETY: a field of the context.
            count(u32::from(interface.slot), direction, verdict::ALLOW, unsafe { (*skb).len });
            return PASS;
        }
    }
    let Some(mut packet) = InHand::get() else { return DROP };
    let Flow { remote, ports, protocol } = flow;
    packet.pod.fill::<F>(interface, (policy_flags, policy), direction);
    packet.begin(F::wide(source), F::wide(destination), Flow { remote: F::wide(remote), ports, protocol }, flags);
    police(skb, state)
}

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
        if protocol == IPV6 && data + ETHERNET + 40 <= end && Address::at::<22, 30>(data as *const u8) == V6::own(interface) {
            return PASS;
        }
        if protocol == ARP {
            return PASS;
        }
    }
    unpoliced_general(skb)
}

// What follows is called, not inlined: the verifier goes through each once, by itself, and not once for every way to it. A packet
// that no flow decides costs one call: a return takes as long as a map lookup where the kernel guards it.

/// What the caller of [`police`] knows of the packet, beside whose it is.
mod in_hand {
    /// It is to be read yet.
    pub const NOTHING: u32 = 0;
    /// It was read.
    pub const PACKET: u32 = 1;
    /// The same, and the table has no flow of it.
    pub const NEW: u32 = 2;
}

/// Decides on the packet in hand, of a pod with policy.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn police(skb: *mut __sk_buff, known: u32) -> i32 {
    let Some(packet) = InHand::get() else { return DROP };
    if known == in_hand::NOTHING {
        let why = if packet.is_ipv4() { read4(skb) } else { read6(skb) };
        if why != 0 {
            let Pod { slot, direction, family, .. } = packet.pod;
            return refuse(skb, slot, direction, why as u8, family);
        }
    }
    if !judge::police(skb, packet, known == in_hand::NEW) {
        return DROP;
    }
    if packet.pod.policy_flags & endpoint_flag::BY_NAME != 0 && packet.is_answer() {
        copy_frame(skb, u32::from(packet.pod.slot), u32::from(frame_kind::ANSWER));
    }
    PASS
}

/// Further addresses, neighbour discovery from link-local ones, headers outside the linear part; and what is refused.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn unpoliced_general(skb: *mut __sk_buff) -> i32 {
    let Some(mut packet) = InHand::get() else { return DROP };
    // SAFETY: a field of the context.
    let protocol = unsafe { (*skb).protocol };
    let read = match protocol {
        IPV4 => packet::addresses4(skb),
        IPV6 => packet::addresses6(skb, direction::EGRESS),
        _ => None,
    };
    packet.outcome = match read {
        Some((_, true)) => return PASS,
        Some((source, _)) => {
            packet.ends[0] = source;
            u32::from(reason::SOURCE)
        }
        None => u32::from(reason::MALFORMED),
    };
    let Some(interface) = interface(skb) else {
        return stranger();
    };
    let (family, why) = match protocol {
        IPV4 => (V4::NUMBER, anew(&packet.outcome) as u8),
        IPV6 => (V6::NUMBER, anew(&packet.outcome) as u8),
        _ => (0, reason::ETHERTYPE),
    };
    if why == reason::SOURCE {
        let source = packet.source();
        if source == Address::own(interface, family == V4::NUMBER) || is_own(interface.slot, family, source) {
            return PASS;
        }
    }
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
extern "C" fn read4(skb: *mut __sk_buff) -> i32 {
    InHand::get().map_or(i32::from(reason::MALFORMED), |mut packet| i32::from(ipv4_general(skb, &mut packet)))
}

/// The same for IPv6.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn read6(skb: *mut __sk_buff) -> i32 {
    InHand::get().map_or(i32::from(reason::MALFORMED), |mut packet| i32::from(ipv6_general(skb, &mut packet)))
}

/// See [`judge::remember`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn remember() -> i32 {
    judge::remember();
    0
}

/// See [`judge::judge_itself`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn judge_itself() -> i32 {
    judge::judge_itself();
    0
}

/// See [`judge::renew`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn renew() -> i32 {
    judge::renew();
    0
}

/// See [`packet::extensions`], from behind the fixed header.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn walk6(skb: *mut __sk_buff, protocol: u32) -> i32 {
    WALK.get_ptr_mut(0).map_or(i32::from(reason::MALFORMED), |walk| i32::from(packet::extensions(skb, walk, ETHERNET + 40, protocol as u8)))
}

/// See [`packet::step`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn step6(skb: *mut __sk_buff) -> i32 {
    // SAFETY: this CPU's own place.
    WALK.get_ptr_mut(0).map_or(-1, |walk| packet::step(skb, unsafe { &mut *walk }))
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
