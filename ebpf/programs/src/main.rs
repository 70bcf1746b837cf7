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
mod packet;

use aya_ebpf::bindings::__sk_buff;
use stanchion_ebpf_abi::{
    EndpointPolicy, Event, INTERFACE_PLACES, Interface, direction, endpoint_flag, event_verdict, reason, stat, verdict,
};

use crate::{
    family::{Family, V4, V6},
    judge::{DROP, PASS, Subject, event, is_own, police},
    maps::{ENDPOINTS, INTERFACES, INTERFACES_FAR, count, count_stat, tell},
    packet::{ETHERNET, Ipv4Header, Ipv6Header, Kind, ipv4_general, ipv4_plain, ipv6_general, ipv6_plain},
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
    // SAFETY: a field of the context.
    let if_index = unsafe { (*skb).ifindex };
    let interface = match INTERFACES.get(if_index & (INTERFACE_PLACES - 1)) {
        Some(place) if place.if_index == if_index => place,
        // SAFETY: read while the program runs; the agent replaces records, it does not change them.
        _ => match unsafe { INTERFACES_FAR.get(if_index) } {
            Some(far) => far,
            None => return stranger(),
        },
    };
    let Some(endpoint) = ENDPOINTS.get(u32::from(interface.slot)) else {
        return stranger();
    };
    let policy = endpoint.halves[usize::from(endpoint.sequence & 1)];
    if policy.flags & (endpoint_flag::ISOLATED_INGRESS | endpoint_flag::ISOLATED_EGRESS) == 0 {
        return unpoliced(skb, interface, policy, direction);
    }
    // SAFETY: a field of the context.
    match unsafe { (*skb).protocol } {
        IPV4 => {
            let subject = Subject { skb, interface, policy, direction };
            // Apart, not one after the other: the common packet then never meets the variables of the others.
            if let Some(packet) = ipv4_plain(skb, direction) {
                return policed::<V4>(&subject, &packet);
            }
            match ipv4_general(skb, direction, interface.slot) {
                Ok(packet) => policed::<V4>(&subject, &packet),
                Err(why) => refuse(&subject, why, 4),
            }
        }
        IPV6 => {
            let subject = Subject { skb, interface, policy, direction };
            // Apart, not one after the other: the common packet then never meets the variables of the others.
            if let Some(packet) = ipv6_plain(skb, direction) {
                return policed::<V6>(&subject, &packet);
            }
            match ipv6_general(skb, direction, interface.slot) {
                Ok(packet) => policed::<V6>(&subject, &packet),
                Err(why) => refuse(&subject, why, 6),
            }
        }
        ARP => PASS,
        _ => refuse(&Subject { skb, interface, policy, direction }, reason::ETHERTYPE, 0),
    }
}

/// No record: the agent writes them before it attaches, so this is damage, and closed.
#[inline(always)]
fn stranger() -> i32 {
    count_stat(stat::NO_ENDPOINT);
    DROP
}

#[inline(always)]
fn policed<F: Family>(subject: &Subject<'_>, packet: &packet::Packet<F::Address>) -> i32 {
    if subject.direction == direction::EGRESS
        && packet.source != F::own(subject.interface)
        && packet.kind != Kind::Discovery
        && !is_own::<F>(subject.interface, packet.source)
    {
        // SAFETY: a field of the context.
        let length = unsafe { (*subject.skb).len };
        count(u32::from(subject.interface.slot), subject.direction, verdict::DENY, length);
        tell(event::<F>(subject, packet, event_verdict::DENIED, reason::SOURCE, 0, 0, length));
        return DROP;
    }
    let identification = match packet.first_fragment {
        Some(identification) => identification,
        None => 0,
    };
    police::<F>(subject, packet, identification)
}

/// A pod that no policy selects: everything passes, but not from addresses that are not its own.
#[inline(always)]
fn unpoliced(skb: *mut __sk_buff, interface: &Interface, policy: EndpointPolicy, direction: u8) -> i32 {
    if policy.flags & endpoint_flag::READY == 0 {
        return stranger();
    }
    if direction == direction::INGRESS {
        return PASS;
    }
    // SAFETY: fields of the context, and packet memory compared with data_end before it is read.
    unsafe {
        let (data, end) = ((*skb).data as usize, (*skb).data_end as usize);
        let protocol = (*skb).protocol;
        if protocol == IPV4 && data + ETHERNET + 20 <= end && (*((data + ETHERNET) as *const Ipv4Header)).source == interface.ipv4 {
            return PASS;
        }
        if protocol == IPV6 && data + ETHERNET + 40 <= end && (*((data + ETHERNET) as *const Ipv6Header)).source == interface.ipv6 {
            return PASS;
        }
        if protocol == ARP {
            return PASS;
        }
    }
    unpoliced_general(skb, interface, policy, direction)
}

/// Further addresses, neighbour discovery from link-local ones, headers outside the linear part; and what is refused.
#[inline(always)]
fn unpoliced_general(skb: *mut __sk_buff, interface: &Interface, policy: EndpointPolicy, direction: u8) -> i32 {
    let subject = Subject { skb, interface, policy, direction };
    // SAFETY: a field of the context.
    let (why, family) = match unsafe { (*skb).protocol } {
        IPV4 => match packet::addresses4(skb) {
            Some(source) if source == interface.ipv4 || is_own::<V4>(interface, source) => return PASS,
            Some(_) => (reason::SOURCE, 4),
            None => (reason::MALFORMED, 4),
        },
        IPV6 => match packet::addresses6(skb, direction) {
            Some((source, discovery)) if discovery || source == interface.ipv6 || is_own::<V6>(interface, source) => return PASS,
            Some(_) => (reason::SOURCE, 6),
            None => (reason::MALFORMED, 6),
        },
        _ => (reason::ETHERTYPE, 0),
    };
    refuse(&subject, why, family)
}

/// Drops a packet that cannot be judged, with an event that says what little is known.
#[inline(always)]
fn refuse(subject: &Subject<'_>, why: u8, family: u8) -> i32 {
    let Subject { skb, interface, direction, .. } = subject;
    // SAFETY: a field of the context.
    let length = unsafe { (**skb).len };
    count(u32::from(interface.slot), *direction, verdict::DENY, length);
    let (source, destination) = packet::peek(*skb, family);
    let (local, remote) = if *direction == direction::EGRESS { (source, destination) } else { (destination, source) };
    tell(Event {
        slot: interface.slot,
        direction: *direction,
        verdict: event_verdict::DENIED,
        reason: why,
        protocol: 0,
        family,
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

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers used are open to every licence; the kernel asks for the word all the same.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
