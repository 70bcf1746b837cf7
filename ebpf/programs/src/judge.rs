//! From a flow to a verdict: the flow table, and behind it identity and verdict tries.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_jiffies64};
use stanchion_ebpf_abi::{
    EndpointPolicy, Event, FlowEntry, FragmentPorts, IDENTITY_UNKNOWN, Interface, OwnKey, VERDICT_PREFIX_PORT, VerdictKey, address_flag,
    direction, endpoint_flag, event_verdict, flow_state, frame_kind, interface_flag, reason, stat, timeout, verdict,
};

use crate::{
    family::{Family, Flow, SPREAD, key_start},
    maps::{
        CONFIG, FLOWS_INSERTED, FLOWS_REMOVED, FRAGMENTS, GENERATION, OWN, TICK_SHIFT, VERDICT_CACHE, VERDICTS, cached, count, count_stat,
        is_told, tell,
    },
    packet::{ACK, FIN, Kind, NOT_FIRST, Packet, RST, SCTP, SYN, TCP, UDP, fragment_key},
};
use aya_ebpf::maps::lpm_trie::Key;
use core::{
    arch::asm,
    ptr::{self, addr_of},
};

/// The packet goes on to the next program, if any: `TCX_NEXT`, `TC_ACT_UNSPEC`.
pub const PASS: i32 = -1;
/// `TC_ACT_SHOT`.
pub const DROP: i32 = 2;

#[inline(always)]
fn ticks() -> u32 {
    // SAFETY: no arguments.
    unsafe { (bpf_jiffies64() >> TICK_SHIFT.load()) as u32 }
}

/// A packet in one of its roles.
pub struct Subject<'a> {
    pub skb: *mut __sk_buff,
    pub interface: &'a Interface,
    pub policy: EndpointPolicy,
    pub direction: u8,
}

/// What a policy set says of opening the flow of the packet in hand with `peer`; the rule and the identity are put to the packet.
pub mod judged {
    pub const DENIED: i32 = 0;
    pub const ALLOWED: i32 = 1;
    /// Allowed without a look at policy: the node or the pod itself. Such traffic needs no flow entry.
    pub const EXEMPT: i32 = 2;
}

#[inline(always)]
pub fn judge<F: Family>(opener: u8, set: u32, peer: F::Address) -> i32 {
    let Some(packet) = F::in_hand() else { return judged::DENIED };
    // SAFETY: this CPU's own place.
    let packet = unsafe { &mut *packet };
    let flow = packet.flow;
    let generation = generation();
    let identity = identity::<F>(peer, generation);
    if identity == NODE {
        return judged::EXEMPT;
    }
    packet.identity = identity;
    let port = match flow.protocol {
        TCP | UDP | SCTP if opener == direction::INGRESS => flow.local_port,
        TCP | UDP | SCTP => flow.remote_port,
        _ => [0; 2],
    };
    let what = u32::from(opener) | u32::from(flow.protocol) << 8 | u32::from(u16::from_ne_bytes(port)) << 16;
    let spread = (set ^ identity.rotate_left(11) ^ what.rotate_left(22)).wrapping_mul(SPREAD) >> 16;
    let Some(cached) = cached(&VERDICT_CACHE, spread) else { return judged::DENIED };
    // SAFETY: this CPU's own place.
    let is_known = unsafe {
        (*cached).generation == generation && (*cached).policy == set && (*cached).identity == identity && (*cached).what == what
    };
    if !is_known {
        let mut key = Key::new(VERDICT_PREFIX_PORT, VerdictKey { policy: set, identity, direction: opener, protocol: flow.protocol, port });
        let mut value = None;
        if identity != IDENTITY_UNKNOWN {
            value = VERDICTS.get(&key);
        }
        if value.is_none() {
            key.data.identity = IDENTITY_UNKNOWN;
            value = VERDICTS.get(&key);
        }
        let (rule, verdict) = value.map_or((0, verdict::DENY), |value| (value.rule, value.verdict));
        // SAFETY: as above.
        unsafe { *cached = CachedVerdict { policy: set, identity, what, generation, rule, verdict: u32::from(verdict) } };
    }
    // SAFETY: as above. From memory on every way, as in `identity`.
    unsafe {
        packet.rule = addr_of!((*cached).rule).read_volatile();
        if addr_of!((*cached).verdict).read_volatile() == u32::from(verdict::ALLOW) { judged::ALLOWED } else { judged::DENIED }
    }
}

/// A question to the verdict trie that this CPU has asked. The trie grows deeper with the number of policies; this does not. All
/// zero: none, as no generation is 0.
#[repr(C)]
pub struct CachedVerdict {
    policy: u32,
    identity: u32,
    /// Direction, protocol and port.
    what: u32,
    generation: u32,
    rule: u32,
    verdict: u32,
}

/// What the tables say may be kept as long as this stays the same. To be read before them: what is changed in them meanwhile
/// makes an entry worthless, not wrong.
#[inline(always)]
fn generation() -> u32 {
    match GENERATION.get(0) {
        // SAFETY: a word of an array; volatile, so that it is read now.
        Some(generation) => unsafe { ptr::read_volatile(generation) }.wrapping_add(1),
        None => 0,
    }
}

/// Stands for the node's addresses among identities.
const NODE: u32 = u32::MAX;

/// An address whose identity this CPU has looked up. All zero: none, as no generation is 0.
#[repr(C)]
pub struct Cached<A> {
    address: A,
    generation: u32,
    identity: u32,
}

/// What an address is to policies. The tables cost two lookups, of which one grows with the number of CIDRs; so this CPU keeps what
/// they said, as long as the agent changes nothing in them.
#[inline(always)]
fn identity<F: Family>(address: F::Address, generation: u32) -> u32 {
    let Some(cached) = F::cached(address) else { return IDENTITY_UNKNOWN };
    // SAFETY: this CPU's own place.
    unsafe {
        if (*cached).generation != generation || (*cached).address != address {
            // Read once; an entry replaced meanwhile gives the old or the new identity.
            let identity = match F::addresses().get(address) {
                Some(value) if value.flags & address_flag::NODE != 0 => NODE,
                Some(value) if value.flags & (address_flag::ADDRESS | address_flag::HOST_CIDR) != 0 => value.identity,
                _ => F::cidr(address).unwrap_or(IDENTITY_UNKNOWN),
            };
            *cached = Cached { address, generation, identity };
        }
        // From memory on every way: the verifier then follows what comes once.
        addr_of!((*cached).identity).read_volatile()
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

/// State bits after a packet, with TCP's flags; a RST that was followed by something else was forged or is history.
#[inline(always)]
fn next_state(state: u8, protocol: u8, flags: u8, direction: u8) -> u8 {
    let from_pod = direction == direction::EGRESS;
    let opened_by_pod = state & flow_state::OPENED_BY_POD != 0;
    let mut next = state;
    if from_pod != opened_by_pod {
        next |= flow_state::REPLIED;
    }
    if protocol == TCP {
        next &= !flow_state::RESET;
        if flags & RST != 0 {
            next |= flow_state::RESET;
        } else if flags & FIN != 0 {
            next |= if from_pod { flow_state::FIN_POD } else { flow_state::FIN_PEER };
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
        let next = next_state(state, packet.flow.protocol, packet.flags, direction);
        if next != state {
            (*entry).state = next;
            (*entry).timeout = timeout(F::ICMP, packet.flow.protocol, next);
        }
    }
}

/// Remembers the flow of the packet in hand, unless its pod has as many as it may; or writes it over an expired or closed
/// one (`over`), which keeps its place in the pod's count.
#[inline(always)]
pub fn open<F: Family>(head: u32, revision: u32, direction: u8, over: bool) {
    const ABSENT_OR_NOT: u64 = 0;
    const EXISTING: u64 = 2;
    let Some(packet) = F::in_hand() else { return };
    // SAFETY: this CPU's own place.
    let packet = unsafe { &*packet };
    let slot = head & 0xffff;
    let (Some(inserted), Some(removed), Some(config)) = (FLOWS_INSERTED.get_ptr_mut(slot), FLOWS_REMOVED.get(slot), CONFIG.get(0)) else {
        return;
    };
    // SAFETY: a value of an array, changed only by atomic additions. That the check and the addition are not one step lets
    // a pod exceed its cap by the number of CPUs.
    if !over && unsafe { ptr::read_volatile(inserted) }.wrapping_sub(*removed) as i64 >= i64::from(config.pod_flows) {
        count_stat(stat::POD_CAP);
        return;
    }
    let opened = if direction == direction::EGRESS { flow_state::OPENED_BY_POD } else { 0 };
    let state = next_state(opened, packet.flow.protocol, packet.flags, direction);
    let entry = FlowEntry {
        revision,
        seen: ticks(),
        rule: packet.rule,
        timeout: timeout(F::ICMP, packet.flow.protocol, state),
        state,
        reserved: 0,
    };
    let Flow { protocol, local_port, remote_port, remote } = packet.flow;
    let key = F::key(key_start(head, protocol, local_port, remote_port), remote);
    if over {
        let _gone_meanwhile = F::insert(&key, &entry, EXISTING);
        return;
    }
    match F::insert(&key, &entry, ABSENT_OR_NOT) {
        // SAFETY: as above. The target has no compare-and-swap, so `core` offers no atomic addition either.
        Ok(()) => unsafe { asm!("lock *(u64 *)({at} + 0) += {one}", at = in(reg) inserted, one = in(reg) 1u64) },
        Err(_) => count_stat(stat::TABLE_FULL),
    }
}

/// What the flow table said of a packet's flow.
#[derive(Clone, Copy)]
pub enum Known {
    NotAsked,
    Nothing,
    Entry(*mut FlowEntry),
}

/// Whether a packet belongs to a flow whose policy has not changed since it was judged, and changes nothing about it but
/// the time of its last packet, which is noted. For packets without TCP flags that mean something.
#[inline(always)]
pub fn goes_on(entry: *mut FlowEntry, policy: &EndpointPolicy, direction: u8) -> bool {
    let now = ticks();
    // SAFETY: the entry lives until the end of the program, though it may by then describe another flow (deleted and used
    // again); that flow would get this one's time stamp, nothing else.
    unsafe {
        let (state, seen) = ((*entry).state, (*entry).seen);
        let from_opener = (state & flow_state::OPENED_BY_POD != 0) == (direction == direction::EGRESS);
        if (*entry).revision != policy.revision
            || state & flow_state::RESET != 0
            || !(from_opener || state & flow_state::REPLIED != 0)
            || now.wrapping_sub(seen) > u32::from((*entry).timeout)
        {
            return false;
        }
        if seen != now {
            (*entry).seen = now;
        }
    }
    true
}

/// Decides on a packet of an isolated pod.
#[inline(always)]
pub fn police<F: Family>(subject: &Subject<'_>, packet: &mut Packet<F::Address>, asked: Known) -> i32 {
    let Subject { skb, interface, policy, direction } = subject;
    let (slot, direction) = (u32::from(interface.slot), *direction);
    // SAFETY: a field of the context.
    let length = unsafe { (**skb).len };
    if packet.kind == Kind::Discovery {
        count(slot, direction, verdict::ALLOW, length);
        return PASS;
    }
    let Flow { protocol, local_port, remote_port, remote } = packet.flow;
    let key = F::key(key_start(F::head(interface), protocol, local_port, remote_port), remote);
    let now = ticks();
    let entry = match asked {
        Known::Entry(entry) => entry,
        Known::NotAsked if packet.kind != Kind::Stateless => F::entry(&key).unwrap_or(ptr::null_mut()),
        _ => ptr::null_mut(),
    };
    let mut known: *mut FlowEntry = ptr::null_mut();
    let mut opener = direction;
    let taken = !entry.is_null();
    if taken {
        // SAFETY: as in `goes_on`.
        unsafe {
            let state = (*entry).state;
            // A SYN where more than SYNs were seen opens a new connection on the same ports.
            let opens = protocol == TCP
                && packet.flags & (SYN | ACK) == SYN
                && packet.kind == Kind::Member
                && state & (flow_state::REPLIED | flow_state::FIN_POD | flow_state::FIN_PEER | flow_state::RESET) != 0;
            if now.wrapping_sub((*entry).seen) <= u32::from((*entry).timeout) && !opens {
                opener = if state & flow_state::OPENED_BY_POD != 0 { direction::EGRESS } else { direction::INGRESS };
                if (*entry).revision == policy.revision {
                    if packet.kind == Kind::Member {
                        touch::<F>(entry, now, packet, direction);
                    }
                    remember_fragment::<F>(packet, direction, interface.slot);
                    count(slot, direction, verdict::ALLOW, length);
                    return PASS;
                }
                known = entry;
            }
        }
    }
    if packet.kind == Kind::Stateless || (packet.kind == Kind::Related && known.is_null()) {
        // About no flow that we know: judged as the ICMP packet that it is.
        let remote = if direction == direction::EGRESS { packet.destination } else { packet.source };
        packet.flow = Flow { remote, local_port: [0; 2], remote_port: [0; 2], protocol: packet.protocol };
    }
    let mut result = judged::ALLOWED;
    if policy.flags & (1 << opener) != 0 {
        // Not by index: the policy was copied to the stack, which the verifier lets nobody index by a variable.
        let set = if opener == direction::EGRESS { policy.policy[1] } else { policy.policy[0] };
        let remote = packet.flow.remote;
        let is_own =
            remote == F::own(interface) || (interface.flags & interface_flag::MORE_ADDRESSES != 0 && is_own::<F>(interface, remote));
        // Back on the veth that it came from: the pod reaches itself through a service. Who sent it cannot be told from its source,
        // which is the node's where kube-proxy masquerades.
        // SAFETY: fields of the context.
        let is_hairpin = direction == direction::INGRESS && unsafe { (**skb).ingress_ifindex == (**skb).ifindex };
        result = if is_own && !is_hairpin {
            judged::EXEMPT
        } else {
            F::judge(u32::from(opener), set, if is_hairpin { F::own(interface) } else { remote })
        };
        // Only rules that deny speak of a pod and itself, and those are cluster policies'; isolation does not.
        if is_hairpin && (result != judged::DENIED || packet.rule == 0) {
            result = judged::EXEMPT;
        }
    }
    let mut told = event_verdict::DENIED;
    if result != judged::DENIED {
        told = event_verdict::ALLOWED;
        if packet.kind == Kind::Member && result != judged::EXEMPT {
            if known.is_null() {
                // A reset opens nothing.
                if packet.flow.protocol != TCP || packet.flags & RST == 0 {
                    F::open(F::head(interface), policy.revision, u32::from(direction), u32::from(taken));
                }
            } else {
                // SAFETY: as above.
                unsafe {
                    (*known).rule = packet.rule;
                    (*known).revision = policy.revision;
                    touch::<F>(known, now, packet, direction);
                }
            }
        }
        remember_fragment::<F>(packet, direction, interface.slot);
    } else if policy.flags & endpoint_flag::AUDIT != 0 {
        told = event_verdict::AUDITED;
    } else if direction == direction::EGRESS && opener == direction::EGRESS && policy.flags & endpoint_flag::BY_NAME != 0 {
        crate::copy_frame(*skb, slot, u32::from(frame_kind::EARLY));
    }
    let passes = told != event_verdict::DENIED;
    count(slot, direction, passes as u8, length);
    if told != event_verdict::ALLOWED || known.is_null() {
        let why = if result == judged::EXEMPT { reason::EXEMPT } else { reason::POLICY };
        event::<F>(length, role(interface.slot, direction), outcome(told, why));
    }
    if passes { PASS } else { DROP }
}

/// A pod and a direction in one argument.
#[inline(always)]
pub fn role(slot: u16, direction: u8) -> u32 {
    u32::from(slot) | u32::from(direction) << 16
}

/// A verdict and its reason in one argument.
#[inline(always)]
pub fn outcome(verdict: u8, reason: u8) -> u32 {
    u32::from(verdict) | u32::from(reason) << 8
}

/// Lets the fragments that follow a first one pass with it.
#[inline(always)]
fn remember_fragment<F: Family>(packet: &Packet<F::Address>, direction: u8, slot: u16) {
    if packet.first_fragment != NOT_FIRST {
        F::remember(role(slot, direction));
    }
}

/// See [`remember_fragment`]; of the packet in hand.
#[inline(always)]
pub fn remember<F: Family>(role: u32) {
    let Some(packet) = F::in_hand() else { return };
    // SAFETY: this CPU's own place.
    let packet = unsafe { &*packet };
    let Flow { protocol, local_port, remote_port, .. } = packet.flow;
    let value = FragmentPorts { protocol, reserved: [0; 3], local_port, remote_port };
    let key = fragment_key::<F>(packet, (role >> 16) as u8, role as u16, packet.first_fragment as u32);
    let _lost_if_full = FRAGMENTS.insert(&key, &value, 0);
}

/// Tells of the packet in hand.
#[inline(always)]
pub fn event<F: Family>(length: u32, role: u32, outcome: u32) {
    if !is_told(outcome as u8) {
        return;
    }
    let Some(packet) = F::in_hand() else { return };
    // SAFETY: this CPU's own place.
    let packet = unsafe { &*packet };
    let direction = (role >> 16) as u8;
    let (local, remote) =
        if direction == direction::EGRESS { (packet.source, packet.destination) } else { (packet.destination, packet.source) };
    tell(Event {
        slot: role as u16,
        direction,
        verdict: outcome as u8,
        reason: (outcome >> 8) as u8,
        protocol: packet.protocol,
        family: F::NUMBER,
        flags: packet.flags,
        rule: packet.rule,
        identity: packet.identity,
        length,
        local_port: packet.flow.local_port,
        remote_port: packet.flow.remote_port,
        local: F::words(local),
        remote: F::words(remote),
    });
}
