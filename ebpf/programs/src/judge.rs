//! From a flow to a verdict: the flow table, and behind it identity and verdict tries.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_jiffies64};
use stanchion_ebpf_abi::{
    EndpointPolicy, Event, FlowEntry, FragmentPorts, IDENTITY_UNKNOWN, OwnKey, VERDICT_PREFIX_PORT, VerdictKey, address_flag, direction,
    endpoint_flag, event_verdict, flow_state, frame_kind, interface_flag, reason, stat, timeout, verdict,
};

use crate::{
    family::{Address, Flow, Pair, SPREAD, WideKey, key_start},
    maps::{
        CACHE, CONFIG, ENDPOINTS, FLOWS_INSERTED, FLOWS_REMOVED, FRAGMENTS, GENERATION, OWN, TICK_SHIFT, VERDICT_CACHE, VERDICTS, cached,
        count, count_stat, is_told, tell,
    },
    packet::{ACK, FIN, InHand, Kind, Packet, RST, SCTP, SYN, TCP, UDP, anew, fragment_key},
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

pub const DNS: [u8; 2] = 53u16.to_be_bytes();

/// The present tick.
#[inline(always)]
pub fn ticks() -> u32 {
    // SAFETY: no arguments.
    unsafe { (bpf_jiffies64() >> TICK_SHIFT.load()) as u32 }
}

mod judged {
    pub const DENIED: i32 = 0;
    pub const ALLOWED: i32 = 1;
    /// Allowed without a look at policy: the node or the pod itself. Such traffic needs no flow entry, but for DNS.
    pub const EXEMPT: i32 = 2;
    /// Denied by isolation, and let pass all the same: told, and a flow like any other.
    pub const AUDITED: i32 = 3;
}

/// What a policy set says of opening the packet's flow with `peer`; the rule and the identity are put to the packet.
#[inline(always)]
fn judge(packet: &mut Packet, set: u32, peer: Address) -> i32 {
    let generation = generation();
    let identity = identity(packet, peer, generation);
    if identity == NODE {
        return judged::EXEMPT;
    }
    packet.identity = identity;
    let protocol = packet.flow_protocol();
    let opener = anew(&packet.found) & found::OPENER;
    let mut port = [0; 2];
    if matches!(protocol, TCP | UDP | SCTP) {
        port = packet.flow.ports.of_server(opener);
    }
    let what = u32::from(opener) | u32::from(protocol) << 8 | u32::from(u16::from_ne_bytes(port)) << 16;
    let spread = (set ^ identity.rotate_left(11) ^ what.rotate_left(22)).wrapping_mul(SPREAD) >> 16;
    let Some(cached) = cached(&VERDICT_CACHE, 0, spread) else { return judged::DENIED };
    // SAFETY: this CPU's own place.
    let is_known = unsafe {
        (*cached).generation == generation && (*cached).policy == set && (*cached).identity == identity && (*cached).what == what
    };
    if !is_known {
        let mut key = Key::new(VERDICT_PREFIX_PORT, VerdictKey { policy: set, identity, direction: opener, protocol, port });
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
pub struct Cached {
    address: Address,
    generation: u32,
    identity: u32,
}

/// What an address is to policies. The tables cost two lookups, of which one grows with the number of CIDRs; so this CPU keeps what
/// they said, as long as the agent changes nothing in them.
#[inline(always)]
fn identity(packet: &Packet, address: Address, generation: u32) -> u32 {
    // 2 for IPv4, 3 for IPv6.
    let which = u32::from(anew(&packet.pod.family)) >> 1 & 1;
    let Some(cached) = cached(&CACHE, which, address.hash()) else { return IDENTITY_UNKNOWN };
    // SAFETY: this CPU's own place.
    let cached = unsafe { &mut *cached };
    if cached.generation != generation || cached.address != address {
        *cached = Cached { address, generation, identity: IDENTITY_UNKNOWN };
        match address.exact(anew(&packet.pod.family)) {
            Some(value) if value.flags & address_flag::NODE != 0 => cached.identity = NODE,
            Some(value) if value.flags & (address_flag::ADDRESS | address_flag::HOST_CIDR) != 0 => cached.identity = value.identity,
            _ => {
                if let Some(identity) = address.cidr(packet.is_ipv4()) {
                    cached.identity = identity;
                }
            }
        }
    }
    anew(&cached.identity)
}

/// True if the address is one of the pod's.
#[inline(always)]
pub fn is_own(slot: u16, family: u8, address: Address) -> bool {
    let key = OwnKey { slot: u32::from(slot), family: u32::from(family), address: address.words() };
    // SAFETY: only asked whether it is there.
    unsafe { OWN.get(key).is_some() }
}

/// Idle ticks of TCP, ICMP, UDP and other flows by their state. A table, because the verifier follows each branch of a decision.
static TIMEOUTS: [[u16; flow_state::SEEDED as usize]; 4] = {
    let mut table = [[0; flow_state::SEEDED as usize]; 4];
    let mut state = 0;
    while state < flow_state::SEEDED {
        let replied = state & flow_state::REPLIED != 0;
        let closed = state & (flow_state::FIN_POD | flow_state::FIN_PEER);
        let at = state as usize;
        table[0][at] = if state & flow_state::RESET != 0 {
            timeout::TCP_RESET
        } else if closed == flow_state::FIN_POD | flow_state::FIN_PEER {
            timeout::TCP_CLOSED
        } else if closed != 0 {
            timeout::TCP_HALF_CLOSED
        } else if replied {
            timeout::TCP_ESTABLISHED
        } else {
            timeout::TCP_OPENING
        };
        table[1][at] = timeout::ICMP;
        table[2][at] = if state & flow_state::STREAM != 0 {
            timeout::UDP
        } else if replied {
            timeout::DATAGRAM_EXCHANGE
        } else {
            timeout::DATAGRAM_OPENING
        };
        table[3][at] = if replied { timeout::OTHER } else { timeout::DATAGRAM_OPENING };
        state += 1;
    }
    table
};

/// Idle ticks of the packet's flow in a state.
#[inline(always)]
fn timeout(packet: &Packet, state: u8) -> u16 {
    let protocol = packet.flow_protocol();
    let kind = if protocol == TCP {
        0
    } else if protocol == packet.icmp() {
        1
    } else if protocol == UDP {
        2
    } else {
        3
    };
    TIMEOUTS[kind][usize::from(state) & (flow_state::SEEDED as usize - 1)]
}

/// State bits after a packet, of TCP with its flags; a RST that was followed by something else was forged or is history.
#[inline(always)]
fn next_state(state: u8, packet: &Packet) -> u8 {
    let from_pod = anew(&packet.pod.direction);
    // By shifts for the same reason as above. REPLIED if it is of the other direction than the opener's.
    let from_peer_of_opener = from_pod ^ state & flow_state::OPENED_BY_POD;
    let mut next = state | from_peer_of_opener << 1;
    if packet.flow_protocol() != TCP {
        next |= (state & flow_state::REPLIED & !(from_peer_of_opener << 1)) << 1;
    } else {
        let flags = packet.flags();
        let (reset, fin) = (flags / RST & 1, flags & FIN);
        next = next & !flow_state::RESET | reset << 4 | (fin & !reset) << (3 - from_pod);
    }
    next
}

const _: () = assert!(
    direction::EGRESS == 1
        && flow_state::OPENED_BY_POD == 1
        && flow_state::REPLIED == 1 << 1
        && flow_state::FIN_POD == 1 << 2
        && flow_state::STREAM == 1 << 2
        && flow_state::FIN_PEER == 1 << 3
        && flow_state::RESET == 1 << 4
        && FIN == 1
);

/// Notes a packet of a flow. Two CPUs may write at once: each writes whole fields, and either result is right.
///
/// # Safety
/// `entry` points into the flow table.
#[inline(always)]
unsafe fn touch(entry: *mut FlowEntry, now: u32, packet: &Packet) {
    // SAFETY: by the contract.
    unsafe {
        if (*entry).seen != now {
            (*entry).seen = now;
        }
        let state = (*entry).state;
        let next = next_state(state, packet);
        if next != state {
            (*entry).state = next;
            (*entry).timeout = timeout(packet, next);
        }
    }
}

/// Remembers the flow of the packet in hand, unless its pod has as many as it may; or writes it over an expired or closed one,
/// which keeps its place in the pod's count.
#[inline(always)]
fn open(packet: InHand) {
    const ABSENT_OR_NOT: u64 = 0;
    const EXISTING: u64 = 2;
    let slot = u32::from(packet.pod.slot);
    let (Some(inserted), Some(removed), Some(config)) = (FLOWS_INSERTED.get_ptr_mut(slot), FLOWS_REMOVED.get(slot), CONFIG.get(0)) else {
        return;
    };
    // SAFETY: a value of an array, changed only by atomic additions. That the check and the addition are not one step lets
    // a pod exceed its cap by the number of CPUs.
    if !packet.has(found::TAKEN) && unsafe { ptr::read_volatile(inserted) }.wrapping_sub(*removed) as i64 >= i64::from(config.pod_flows) {
        count_stat(stat::POD_CAP);
        return;
    }
    let state = next_state(anew(&packet.pod.direction), &packet);
    let entry = FlowEntry {
        revision: packet.pod.policy.revision,
        seen: ticks(),
        rule: packet.rule,
        timeout: timeout(&packet, state),
        state,
        reserved: 0,
    };
    let flags = if packet.has(found::TAKEN) { EXISTING } else { ABSENT_OR_NOT };
    let result = packet.key().insert(packet.is_ipv4(), &entry, flags);
    if packet.has(found::TAKEN) {
        // It may be gone meanwhile.
        return;
    }
    match result {
        // SAFETY: as above. The target has no compare-and-swap, so `core` offers no atomic addition either.
        Ok(()) => unsafe { asm!("lock *(u64 *)({at} + 0) += {one}", at = in(reg) inserted, one = in(reg) 1u64) },
        Err(_) => count_stat(stat::TABLE_FULL),
    }
}

/// Writes to the flow of the packet in hand that another policy allows it.
#[inline(always)]
pub fn renew() {
    let Some(packet) = InHand::get() else { return };
    let Some(entry) = packet.key().entry(packet.is_ipv4()) else { return };
    // SAFETY: as in `goes_on`.
    unsafe {
        (*entry).rule = packet.rule;
        (*entry).revision = packet.pod.policy.revision;
        touch(entry, ticks(), &packet);
    }
}

/// Whether a packet belongs to a flow whose policy has not changed since it was judged, and changes nothing about it but
/// the time of its last packet, which is noted. For packets without TCP flags that mean something.
#[inline(always)]
pub fn goes_on(entry: *mut FlowEntry, protocol: u8, policy: &EndpointPolicy, direction: u8, now: u32) -> bool {
    // SAFETY: the entry lives until the end of the program, though it may by then describe another flow (deleted and used
    // again); that flow would get this one's time stamp, nothing else.
    unsafe {
        let (state, seen) = ((*entry).state, (*entry).seen);
        let from_opener = (state & flow_state::OPENED_BY_POD != 0) == (direction == direction::EGRESS);
        if (*entry).revision != policy.revision
            || state & flow_state::RESET != 0
            || !(from_opener || state & flow_state::REPLIED != 0)
            || (protocol == UDP && from_opener && state & (flow_state::REPLIED | flow_state::STREAM) == flow_state::REPLIED)
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

/// Bits of [`Packet::found`].
mod found {
    /// The flow was opened by the pod ([`super::direction::EGRESS`]) or by its peer.
    pub const OPENER: u8 = 1;
    /// It goes on, under another policy.
    pub const KNOWN: u8 = 2;
    /// The table has an entry for it, of this flow or of one before.
    pub const TAKEN: u8 = 4;
    /// It is back on the veth that it came from.
    pub const HAIRPIN: u8 = 8;
    /// The table is known to have none.
    pub const NEW: u8 = 16;
    /// Its next packet changes it again: CPUs that keep it are to ask the table.
    pub const TURNS: u8 = 32;
}

impl Packet {
    #[inline(always)]
    fn has(&self, bit: u8) -> bool {
        anew(&self.found) & bit != 0
    }

    #[inline(always)]
    fn is_opened_by_pod(&self) -> bool {
        self.has(found::OPENER)
    }

    /// The peer's end is a DNS server's.
    #[inline(always)]
    fn is_with_dns(&self) -> bool {
        matches!(self.flow_protocol(), TCP | UDP) && self.flow.ports.peer() == DNS
    }

    /// Of a packet that passed: it came from a DNS server that the pod had asked. Whoever may reach the pod can send from that port.
    #[inline(always)]
    pub fn is_answer(&self) -> bool {
        !self.is_egress() && self.is_opened_by_pod() && self.is_with_dns()
    }

    #[inline(always)]
    fn key(&self) -> WideKey {
        let Flow { protocol, ports, remote } = self.flow;
        WideKey::new(key_start(self.pod.head, protocol, ports), remote)
    }
}

/// A value of [`Packet::outcome`]: passes, and there is nothing to tell.
const UNTOLD: u32 = 255;

/// A value of [`Packet::outcome`].
#[inline(always)]
fn outcome(verdict: u8, reason: u8) -> u32 {
    u32::from(verdict) | u32::from(reason) << 8
}

/// Decides on the packet in hand, of an isolated pod; `is_new`: the table is known to have no flow of it. True if it passes.
#[inline(always)]
pub fn police(skb: *mut __sk_buff, mut packet: InHand, is_new: bool) -> bool {
    // SAFETY: fields of the context.
    let (length, is_back) = unsafe { ((*skb).len, (*skb).ingress_ifindex == (*skb).ifindex) };
    packet.found = packet.pod.direction | is_new as u8 * found::NEW;
    if is_back && !packet.is_egress() {
        packet.found |= found::HAIRPIN;
    }
    packet.outcome = decide(skb, packet);
    // After the table: who still keeps it from before is before this packet.
    if packet.has(found::TURNS)
        && let Some(endpoint) = ENDPOINTS.get_ptr_mut(u32::from(packet.pod.slot))
    {
        // SAFETY: a byte of an array's value that only programs write; two that add at once add one, which is enough.
        unsafe { (*endpoint).epoch[1] = (*endpoint).epoch[1].wrapping_add(1) };
    }
    let outcome = anew(&packet.outcome);
    let passes = outcome as u8 != event_verdict::DENIED;
    count(u32::from(packet.pod.slot), anew(&packet.pod.direction), u8::from(passes), length);
    if outcome != UNTOLD {
        event(&packet, length, outcome);
    }
    passes
}

/// What becomes of the packet.
#[inline(always)]
fn decide(skb: *mut __sk_buff, mut packet: InHand) -> u32 {
    if packet.is(Kind::Discovery) {
        return UNTOLD;
    }
    if packet.is_egress() && packet.source() != packet.pod.own && !is_own(packet.pod.slot, packet.pod.family, packet.source()) {
        return outcome(event_verdict::DENIED, reason::SOURCE);
    }
    if !packet.has(found::NEW)
        && !packet.is(Kind::Stateless)
        && let Some(entry) = packet.key().entry(packet.is_ipv4())
    {
        let now = ticks();
        packet.found |= found::TAKEN;
        // SAFETY: as in `goes_on`.
        unsafe {
            let state = (*entry).state;
            // A SYN where more than SYNs were seen opens a new connection on the same ports.
            let is_tcp = packet.flow_protocol() == TCP && packet.is(Kind::Member);
            let opens = is_tcp
                && packet.flags() & (SYN | ACK) == SYN
                && state & (flow_state::REPLIED | flow_state::FIN_POD | flow_state::FIN_PEER | flow_state::RESET) != 0;
            if opens || (is_tcp && packet.flags() & RST != 0) {
                packet.found |= found::TURNS;
            }
            if now.wrapping_sub((*entry).seen) <= u32::from((*entry).timeout) && !opens {
                packet.found = anew(&packet.found) & !found::OPENER | (state & flow_state::OPENED_BY_POD);
                if (*entry).revision == packet.pod.policy.revision {
                    if packet.is(Kind::Member) {
                        touch(entry, now, &packet);
                    }
                    remember_fragment(&packet);
                    return UNTOLD;
                }
                packet.found |= found::KNOWN;
            }
        }
    }
    if packet.is(Kind::Related) && !packet.has(found::KNOWN) {
        crate::judge_itself();
    }
    let mut result = judged::ALLOWED;
    if packet.pod.policy_flags & (1 << (anew(&packet.found) & found::OPENER)) != 0 {
        let set = packet.pod.policy.policy[usize::from(anew(&packet.found) & found::OPENER)];
        let remote = packet.flow.remote;
        let is_own = remote == packet.pod.own
            || (packet.pod.flags & interface_flag::MORE_ADDRESSES != 0 && is_own(packet.pod.slot, packet.pod.family, remote));
        // A hairpin is back on the veth that it came from: the pod reaches itself through a service. Who sent it cannot be told
        // from its source, which is the node's where kube-proxy masquerades.
        let peer = if packet.has(found::HAIRPIN) { packet.pod.own } else { remote };
        result = if is_own && !packet.has(found::HAIRPIN) { judged::EXEMPT } else { judge(&mut packet, set, peer) };
        // Only rules that deny speak of a pod and itself, and those are cluster policies'; isolation does not.
        if packet.has(found::HAIRPIN) && (result != judged::DENIED || packet.rule == 0) {
            result = judged::EXEMPT;
        }
    }
    // Isolation names no rule. What does is a policy of the cluster, which an annotation of the namespace does not lift.
    if result == judged::DENIED && packet.rule == 0 && packet.pod.policy_flags & endpoint_flag::AUDIT != 0 {
        result = judged::AUDITED;
    }
    packet.outcome = result as u32;
    let result = anew(&packet.outcome) as i32;
    if result == judged::DENIED {
        if packet.is_egress() && packet.is_opened_by_pod() && packet.pod.policy_flags & endpoint_flag::BY_NAME != 0 {
            crate::copy_frame(skb, u32::from(packet.pod.slot), u32::from(frame_kind::EARLY));
        }
        return outcome(event_verdict::DENIED, reason::POLICY);
    }
    // Answers count where the pod opened the flow: what it asks of the node's own server has one, too.
    if packet.is(Kind::Member) && (result != judged::EXEMPT || (packet.is_egress() && packet.is_with_dns())) {
        if !packet.has(found::KNOWN) {
            // A reset opens nothing.
            if packet.flow_protocol() != TCP || packet.flags() & RST == 0 {
                open(packet);
            }
        } else {
            crate::renew();
        }
    }
    remember_fragment(&packet);
    if anew(&packet.outcome) == judged::AUDITED as u32 {
        return outcome(event_verdict::AUDITED, reason::POLICY);
    }
    if packet.has(found::KNOWN) {
        return UNTOLD;
    }
    outcome(event_verdict::ALLOWED, if anew(&packet.outcome) == judged::EXEMPT as u32 { reason::EXEMPT } else { reason::POLICY })
}

/// An ICMP error about no flow that we know is judged as the ICMP packet that it is.
#[inline(always)]
pub fn judge_itself() {
    let Some(mut packet) = InHand::get() else { return };
    let remote = packet.ends[usize::from(packet.pod.direction & 1)];
    packet.flow = Flow { remote, ports: Pair::NONE, protocol: packet.protocol };
}

/// Lets the fragments that follow a first one pass with it.
#[inline(always)]
fn remember_fragment(packet: &Packet) {
    if packet.is_first {
        crate::remember();
    }
}

/// See [`remember_fragment`]; of the packet in hand.
#[inline(always)]
pub fn remember() {
    let Some(packet) = InHand::get() else { return };
    let Flow { protocol, ports, .. } = packet.flow;
    let value = FragmentPorts { protocol, reserved: [0; 3], local_port: ports.pod(), remote_port: ports.peer() };
    let key = fragment_key(&packet, packet.identification);
    let _lost_if_full = FRAGMENTS.insert(&key, &value, 0);
}

/// Tells of a packet.
#[inline(always)]
fn event(packet: &Packet, length: u32, outcome: u32) {
    if !is_told(outcome as u8) {
        return;
    }
    let from_pod = usize::from(anew(&packet.pod.direction) & 1);
    let (local, remote) = (packet.ends[from_pod ^ 1], packet.ends[from_pod]);
    tell(Event {
        slot: packet.pod.slot,
        direction: anew(&packet.pod.direction),
        verdict: outcome as u8,
        reason: (outcome >> 8) as u8,
        protocol: packet.protocol,
        family: packet.pod.family,
        flags: packet.flags,
        rule: packet.rule,
        identity: packet.identity,
        length,
        local_port: packet.flow.ports.pod(),
        remote_port: packet.flow.ports.peer(),
        local: local.words(),
        remote: remote.words(),
    });
}

const _: () =
    assert!(found::OPENER == direction::EGRESS && found::OPENER == flow_state::OPENED_BY_POD && UNTOLD as u8 != event_verdict::DENIED);
