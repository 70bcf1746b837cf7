//! From a flow to a verdict: the flow table, and behind it identity and verdict tries.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_jiffies64};
use stanchion_ebpf_abi::{
    EndpointPolicy, Event, FlowEntry, FragmentPorts, IDENTITY_UNKNOWN, Interface, OwnKey, VERDICT_PREFIX_PORT, VerdictKey, address_flag, config_flag,
    direction, endpoint_flag, event_verdict, flow_state, interface_flag, reason, stat, timeout, verdict,
};

use crate::{
    family::{Family, Flow},
    maps::{CONFIG, FLOWS_INSERTED, FLOWS_REMOVED, FRAGMENTS, OWN, TICK_SHIFT, VERDICTS, count, count_stat, tell},
    packet::{ACK, FIN, Kind, Packet, RST, SCTP, SYN, TCP, UDP, fragment_key},
};
use aya_ebpf::maps::lpm_trie::Key;
use core::{arch::asm, ptr};

/// The packet goes on to the next program, if any: `TCX_NEXT`, `TC_ACT_UNSPEC`.
pub const PASS: i32 = -1;
/// `TC_ACT_SHOT`.
pub const DROP: i32 = 2;

#[inline(always)]
fn ticks() -> u32 {
    // SAFETY: no arguments.
    unsafe { (bpf_jiffies64() >> TICK_SHIFT.load()) as u32 }
}

/// What policy says of opening a flow.
#[derive(Clone, Copy)]
struct Judgement {
    allowed: bool,
    /// Allowed without a look at policy: the node or the pod itself. Such traffic needs no flow entry.
    exempt: bool,
    rule: u32,
    identity: u32,
}

/// A packet in one of its roles.
pub struct Subject<'a> {
    pub skb: *mut __sk_buff,
    pub interface: &'a Interface,
    pub policy: EndpointPolicy,
    pub direction: u8,
}

#[inline(always)]
fn judge<F: Family>(subject: &Subject<'_>, opener: u8, flow: &Flow<F::Address>) -> Judgement {
    let Subject { interface, policy, .. } = subject;
    if policy.flags & (1 << opener) == 0 {
        return Judgement { allowed: true, exempt: false, rule: 0, identity: IDENTITY_UNKNOWN };
    }
    let exempt = Judgement { allowed: true, exempt: true, rule: 0, identity: IDENTITY_UNKNOWN };
    if flow.remote == F::own(interface) || (interface.flags & interface_flag::MORE_ADDRESSES != 0 && is_own::<F>(interface, flow.remote)) {
        return exempt;
    }
    // SAFETY: read once; an entry replaced meanwhile gives the old or the new identity.
    let identity = match unsafe { F::addresses().get(flow.remote) } {
        Some(value) if value.flags & address_flag::NODE != 0 => return exempt,
        Some(value) if value.flags & (address_flag::ADDRESS | address_flag::HOST_CIDR) != 0 => value.identity,
        _ => F::cidr(flow.remote).unwrap_or(IDENTITY_UNKNOWN),
    };
    let port = match flow.protocol {
        TCP | UDP | SCTP if opener == direction::INGRESS => flow.local_port,
        TCP | UDP | SCTP => flow.remote_port,
        _ => [0; 2],
    };
    // Not by index: the policy was copied to the stack, which the verifier lets nobody index by a variable.
    let set = if opener == direction::EGRESS { policy.policy[1] } else { policy.policy[0] };
    let mut key = Key::new(VERDICT_PREFIX_PORT, VerdictKey { policy: set, identity, direction: opener, protocol: flow.protocol, port });
    if identity != IDENTITY_UNKNOWN
        && let Some(value) = VERDICTS.get(&key)
    {
        return Judgement { allowed: value.verdict == verdict::ALLOW, exempt: false, rule: value.rule, identity };
    }
    key.data.identity = IDENTITY_UNKNOWN;
    match VERDICTS.get(&key) {
        Some(value) => Judgement { allowed: value.verdict == verdict::ALLOW, exempt: false, rule: value.rule, identity },
        None => Judgement { allowed: false, exempt: false, rule: 0, identity },
    }
}

/// True if the address is one of the pod's.
#[inline(always)]
pub fn is_own<F: Family>(interface: &Interface, address: F::Address) -> bool {
    let key = OwnKey { slot: u32::from(interface.slot), family: u32::from(F::NUMBER), address: F::words(address) };
    // SAFETY: only asked whether it is there.
    unsafe { OWN.get(key).is_some() }
}

/// Idle ticks of a flow in a state.
#[inline(always)]
fn timeout(icmp: u8, protocol: u8, state: u8) -> u16 {
    let replied = state & flow_state::REPLIED != 0;
    if protocol == TCP {
        let closed = flow_state::FIN_POD | flow_state::FIN_PEER;
        return if state & flow_state::RESET != 0 {
            timeout::TCP_RESET
        } else if state & closed == closed {
            timeout::TCP_CLOSED
        } else if state & closed != 0 {
            timeout::TCP_HALF_CLOSED
        } else if replied {
            timeout::TCP_ESTABLISHED
        } else {
            timeout::TCP_OPENING
        };
    }
    if protocol == icmp {
        timeout::ICMP
    } else if !replied {
        timeout::DATAGRAM_OPENING
    } else if protocol == UDP {
        timeout::UDP
    } else {
        timeout::OTHER
    }
}

/// State bits after a TCP packet with these flags; a RST that was followed by something else was forged or is history.
#[inline(always)]
fn next_state<F: Family>(state: u8, packet: &Packet<F::Address>, direction: u8) -> u8 {
    let from_pod = direction == direction::EGRESS;
    let opened_by_pod = state & flow_state::OPENED_BY_POD != 0;
    let mut next = state;
    if from_pod != opened_by_pod {
        next |= flow_state::REPLIED;
    }
    if packet.flow.protocol == TCP {
        next &= !flow_state::RESET;
        if packet.flags & (FIN | RST) != 0 {
            if packet.flags & RST != 0 {
                next |= flow_state::RESET;
            } else if from_pod {
                next |= flow_state::FIN_POD;
            } else {
                next |= flow_state::FIN_PEER;
            }
        }
    }
    next
}

/// Notes a packet of a flow. Two CPUs may write at once: each writes whole fields, and either result is right.
///
/// # Safety
/// `entry` points into the flow table.
#[inline(always)]
unsafe fn touch<F: Family>(entry: *mut FlowEntry, now: u32, packet: &Packet<F::Address>, direction: u8) {
    // SAFETY: by the contract.
    unsafe {
        if (*entry).seen != now {
            (*entry).seen = now;
        }
        let state = (*entry).state;
        let next = next_state::<F>(state, packet, direction);
        if next != state {
            (*entry).state = next;
            (*entry).timeout = timeout(F::ICMP, packet.flow.protocol, next);
        }
    }
}

#[inline(always)]
fn open<F: Family>(subject: &Subject<'_>, key: &F::Key, now: u32, rule: u32, packet: &Packet<F::Address>) {
    let slot = u32::from(subject.interface.slot);
    let (Some(inserted), Some(removed), Some(config)) = (FLOWS_INSERTED.get_ptr_mut(slot), FLOWS_REMOVED.get(slot), CONFIG.get(0)) else {
        return;
    };
    // SAFETY: a value of an array, changed only by atomic additions. That the check and the addition are not one step lets
    // a pod exceed its cap by the number of CPUs.
    if unsafe { ptr::read_volatile(inserted) }.wrapping_sub(*removed) as i64 >= i64::from(config.pod_flows) {
        count_stat(stat::POD_CAP);
        return;
    }
    let opened = if subject.direction == direction::EGRESS { flow_state::OPENED_BY_POD } else { 0 };
    let state = next_state::<F>(opened, packet, subject.direction);
    let entry = FlowEntry {
        revision: subject.policy.revision,
        seen: now,
        rule,
        timeout: timeout(F::ICMP, packet.flow.protocol, state),
        state,
        reserved: 0,
    };
    match F::flows().insert(key, entry, 0) {
        // SAFETY: as above. The target has no compare-and-swap, so `core` offers no atomic addition either.
        Ok(()) => unsafe { asm!("lock *(u64 *)({at} + 0) += {one}", at = in(reg) inserted, one = in(reg) 1u64) },
        Err(_) => count_stat(stat::TABLE_FULL),
    }
}

/// Decides on a packet of an isolated pod.
#[inline(always)]
pub fn police<F: Family>(subject: &Subject<'_>, packet: &Packet<F::Address>, identification: u32) -> i32 {
    let Subject { skb, interface, policy, direction } = subject;
    let (slot, direction) = (u32::from(interface.slot), *direction);
    // SAFETY: a field of the context.
    let length = unsafe { (**skb).len };
    if packet.kind == Kind::Discovery {
        count(slot, direction, verdict::ALLOW, length);
        return PASS;
    }
    let key = F::key(interface, &packet.flow);
    let now = ticks();
    let mut known: *mut FlowEntry = ptr::null_mut();
    let mut opener = direction;
    let mut taken = false;
    if packet.kind != Kind::Stateless
        && let Some(entry) = F::flows().get_ptr_mut(key)
    {
        taken = true;
        // SAFETY: the entry lives until the end of the program, though it may by then describe another flow (deleted and
        // used again); that flow would get this one's time stamp, nothing else.
        unsafe {
            let state = (*entry).state;
            // A SYN where more than SYNs were seen opens a new connection on the same ports.
            let opens = packet.flow.protocol == TCP
                && packet.flags & (SYN | ACK) == SYN
                && packet.kind == Kind::Member
                && state & (flow_state::REPLIED | flow_state::FIN_POD | flow_state::FIN_PEER | flow_state::RESET) != 0;
            if now.wrapping_sub((*entry).seen) <= u32::from((*entry).timeout) && !opens {
                opener = if state & flow_state::OPENED_BY_POD != 0 { direction::EGRESS } else { direction::INGRESS };
                if (*entry).revision == policy.revision {
                    if packet.kind == Kind::Member {
                        touch::<F>(entry, now, packet, direction);
                    }
                    remember_fragment::<F>(packet, direction, interface.slot, identification);
                    count(slot, direction, verdict::ALLOW, length);
                    return PASS;
                }
                known = entry;
            }
        }
    }
    let mut flow = packet.flow;
    if packet.kind == Kind::Stateless || (packet.kind == Kind::Related && known.is_null()) {
        // About no flow that we know: judged as the ICMP packet that it is.
        let (source, destination) = (packet.source, packet.destination);
        flow = Flow {
            remote: if direction == direction::EGRESS { destination } else { source },
            local_port: [0; 2],
            remote_port: [0; 2],
            protocol: packet.protocol,
        };
    }
    let Judgement { allowed, exempt, rule, identity } = judge::<F>(subject, opener, &flow);
    let mut told = event_verdict::DENIED;
    if allowed {
        told = event_verdict::ALLOWED;
        if packet.kind == Kind::Member && !exempt {
            if known.is_null() {
                // A reset opens nothing.
                if packet.flow.protocol != TCP || packet.flags & RST == 0 {
                    if taken {
                        replace::<F>(subject, &key, now, rule, packet);
                    } else {
                        open::<F>(subject, &key, now, rule, packet);
                    }
                }
            } else {
                // SAFETY: as above.
                unsafe {
                    (*known).rule = rule;
                    (*known).revision = policy.revision;
                    touch::<F>(known, now, packet, direction);
                }
            }
        }
        remember_fragment::<F>(packet, direction, interface.slot, identification);
    } else if policy.flags & endpoint_flag::AUDIT != 0 {
        told = event_verdict::AUDITED;
    }
    let passes = told != event_verdict::DENIED;
    count(slot, direction, passes as u8, length);
    if told != event_verdict::ALLOWED || (known.is_null() && CONFIG.get(0).is_some_and(|config| config.flags & config_flag::TELL_ALLOWED != 0)) {
        let why = if exempt { reason::EXEMPT } else { reason::POLICY };
        tell(event::<F>(subject, packet, told, why, rule, identity, length));
    }
    if passes { PASS } else { DROP }
}

/// Lets the fragments that follow a first one pass with it.
#[inline(always)]
fn remember_fragment<F: Family>(packet: &Packet<F::Address>, direction: u8, slot: u16, identification: u32) {
    if packet.first_fragment.is_some() {
        let Flow { protocol, local_port, remote_port, .. } = packet.flow;
        let value = FragmentPorts { protocol, reserved: [0; 3], local_port, remote_port };
        let _lost_if_full = FRAGMENTS.insert(fragment_key::<F>(packet, direction, slot, identification), value, 0);
    }
}

/// Writes a new flow over an expired or closed one, which keeps its place in the pod's count.
#[inline(always)]
fn replace<F: Family>(subject: &Subject<'_>, key: &F::Key, now: u32, rule: u32, packet: &Packet<F::Address>) {
    let opened = if subject.direction == direction::EGRESS { flow_state::OPENED_BY_POD } else { 0 };
    let state = next_state::<F>(opened, packet, subject.direction);
    let entry = FlowEntry {
        revision: subject.policy.revision,
        seen: now,
        rule,
        timeout: timeout(F::ICMP, packet.flow.protocol, state),
        state,
        reserved: 0,
    };
    const EXISTING: u64 = 2;
    let _gone_meanwhile = F::flows().insert(key, entry, EXISTING);
}

#[inline(always)]
pub fn event<F: Family>(
    subject: &Subject<'_>,
    packet: &Packet<F::Address>,
    verdict: u8,
    reason: u8,
    rule: u32,
    identity: u32,
    length: u32,
) -> Event {
    let (local, remote) =
        if subject.direction == direction::EGRESS { (packet.source, packet.destination) } else { (packet.destination, packet.source) };
    Event {
        slot: subject.interface.slot,
        direction: subject.direction,
        verdict,
        reason,
        protocol: packet.protocol,
        family: F::NUMBER,
        flags: packet.flags,
        rule,
        identity,
        length,
        local_port: packet.flow.local_port,
        remote_port: packet.flow.remote_port,
        local: F::words(local),
        remote: F::words(remote),
    }
}
