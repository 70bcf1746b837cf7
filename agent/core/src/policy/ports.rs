//! Verdicts as functions of protocol and port, and their shortest form as prefix entries of the verdict trie.

use stanchion_ebpf_abi::{PROTOCOL_ANY, VERDICT_PREFIX_ANY, VERDICT_PREFIX_PROTOCOL, VerdictKey, VerdictValue, verdict};

use crate::objects::Protocol;

/// Protocols that rules can name, in the order of [`PortFunction::transports`].
pub const TRANSPORTS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// How far evaluation of a protocol and port has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No rule has matched yet.
    Open,
    /// A Pass rule matched: the rest of the tier does not apply.
    Passed,
    /// Decided.
    Done(Decision),
}

/// A verdict and the rule that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision {
    /// Lets pass.
    pub allow: bool,
    /// Id of the rule, 0 for the default.
    pub rule: u32,
}

impl Decision {
    /// What an isolated direction does with what nothing allows.
    pub const DENY: Self = Self { allow: false, rule: 0 };
    /// What a direction does that nothing isolates.
    pub const ALLOW: Self = Self { allow: true, rule: 0 };

    /// As the map stores it.
    pub fn value(self) -> VerdictValue {
        VerdictValue { rule: self.rule, verdict: if self.allow { verdict::ALLOW } else { verdict::DENY }, reserved: [0; 3] }
    }

    /// Whether an entry is needed to get from `other` to `self`: the verdict differs, or a denial has another reason.
    fn needs_entry_over(self, other: Self) -> bool {
        self.allow != other.allow || (!self.allow && self.rule != other.rule)
    }
}

/// Consecutive port ranges with one state each: the first port of each, ascending, starting with 0.
type Segments<T> = Vec<(u16, T)>;

/// A value for every protocol and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortFunction<T> {
    /// Protocols that have no ports in rules.
    pub other: T,
    /// TCP, UDP and SCTP.
    pub transports: [Segments<T>; 3],
}

fn index(protocol: Protocol) -> usize {
    match protocol {
        Protocol::Tcp => 0,
        Protocol::Udp => 1,
        Protocol::Sctp => 2,
    }
}

impl<T: Copy + PartialEq> PortFunction<T> {
    /// The same everywhere.
    pub fn constant(value: T) -> Self {
        Self { other: value, transports: std::array::from_fn(|_| vec![(0, value)]) }
    }

    /// The value of a protocol and port.
    pub fn at(&self, protocol: Protocol, port: u16) -> T {
        let segments = &self.transports[index(protocol)];
        segments[segments.partition_point(|(start, _)| *start <= port) - 1].1
    }

    /// Changes values everywhere.
    pub fn update_all(&mut self, change: impl Fn(T) -> T) {
        self.other = change(self.other);
        for segments in &mut self.transports {
            for (_, value) in segments.iter_mut() {
                *value = change(*value);
            }
            segments.dedup_by_key(|(_, value)| *value);
        }
    }

    /// Changes values of a protocol from the first to the last port, both included.
    pub fn update(&mut self, protocol: Protocol, first: u16, last: u16, change: impl Fn(T) -> T) {
        let segments = &mut self.transports[index(protocol)];
        let mut next = Vec::with_capacity(segments.len() + 2);
        for (at, (start, value)) in segments.iter().copied().enumerate() {
            let end = segments.get(at + 1).map_or(u16::MAX, |(s, _)| s - 1);
            if end < first || start > last {
                next.push((start, value));
                continue;
            }
            if start < first {
                next.push((start, value));
            }
            next.push((start.max(first), change(value)));
            if end > last {
                next.push((last + 1, value));
            }
        }
        next.dedup_by_key(|(_, value)| *value);
        *segments = next;
    }

    /// Whether `holds` is true of the values of both at every protocol and port.
    pub fn all_with<U: Copy>(&self, other: &PortFunction<U>, holds: impl Fn(T, U) -> bool) -> bool {
        holds(self.other, other.other)
            && self.transports.iter().zip(&other.transports).all(|(left, right)| {
                let (mut l, mut r) = (0, 0);
                loop {
                    if !holds(left[l].1, right[r].1) {
                        return false;
                    }
                    let next_left = left.get(l + 1).map(|(start, _)| *start);
                    let next_right = right.get(r + 1).map(|(start, _)| *start);
                    match (next_left, next_right) {
                        (None, None) => return true,
                        (Some(a), Some(b)) if a == b => {
                            l += 1;
                            r += 1;
                        }
                        (Some(a), Some(b)) if a < b => l += 1,
                        (Some(_), None) => l += 1,
                        (None | Some(_), Some(_)) => r += 1,
                    }
                }
            })
    }
}

impl PortFunction<Decision> {
    /// Whether everything that `self` allows, `other` allows too.
    pub fn is_within(&self, other: &Self) -> bool {
        self.all_with(other, |mine, theirs| !mine.allow || theirs.allow)
    }
}

/// An entry of the verdict trie without its policy set, identity and direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// IP protocol number, [`PROTOCOL_ANY`] where the prefix ends before it.
    pub protocol: u8,
    /// First port of the block.
    pub port: u16,
    /// Prefix length in bits of the whole key.
    pub length: u32,
    /// The verdict.
    pub decision: Decision,
}

impl Entry {
    /// The key in the map.
    pub fn key(&self, policy: u32, identity: u32, direction: u8) -> VerdictKey {
        VerdictKey { policy, identity, direction, protocol: self.protocol, port: self.port.to_be_bytes() }
    }
}

/// The entries that say `function` where `base` is what is found without them, few of them.
pub fn entries(function: &PortFunction<Decision>, base: &PortFunction<Decision>) -> Vec<Entry> {
    let without_any = entries_over(function, None, base);
    if !function.other.needs_entry_over(base.other) {
        return without_any;
    }
    let mut all = vec![Entry { protocol: PROTOCOL_ANY, port: 0, length: VERDICT_PREFIX_ANY, decision: function.other }];
    all.extend(entries_over(function, Some(function.other), base));
    all
}

/// Entries of the three transports under an entry `parent` for all protocols, or under nothing.
fn entries_over(function: &PortFunction<Decision>, parent: Option<Decision>, base: &PortFunction<Decision>) -> Vec<Entry> {
    let mut all = Vec::new();
    for (at, protocol) in TRANSPORTS.into_iter().enumerate() {
        let (wanted, below) = (&function.transports[at], &base.transports[at]);
        let number = protocol.number();
        let mut best = match parent {
            Some(parent) => blocks(number, wanted, &[(0, parent)]),
            None => blocks(number, wanted, below),
        };
        // An entry for the whole protocol with exceptions may need fewer.
        let mut tried: Vec<Decision> = Vec::new();
        for (_, decision) in wanted {
            if best.len() <= 1 || tried.contains(decision) {
                continue;
            }
            tried.push(*decision);
            let mut candidate = vec![Entry { protocol: number, port: 0, length: VERDICT_PREFIX_PROTOCOL, decision: *decision }];
            candidate.extend(blocks(number, wanted, &[(0, *decision)]));
            if candidate.len() < best.len() {
                best = candidate;
            }
            if tried.len() >= 4 {
                break;
            }
        }
        all.extend(best);
    }
    all
}

/// Port blocks wherever `wanted` differs from `below`.
fn blocks(protocol: u8, wanted: &[(u16, Decision)], below: &[(u16, Decision)]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut run: Option<(u32, Decision)> = None;
    let (mut w, mut b) = (0, 0);
    let mut start = 0u32;
    loop {
        let next_wanted = wanted.get(w + 1).map_or(0x1_0000, |(s, _)| u32::from(*s));
        let next_below = below.get(b + 1).map_or(0x1_0000, |(s, _)| u32::from(*s));
        let end = next_wanted.min(next_below);
        let decision = wanted[w].1;
        let needed = decision.needs_entry_over(below[b].1).then_some(decision);
        if run.map(|(_, d)| d) != needed {
            if let Some((first, decision)) = run {
                split(protocol, first, start, decision, &mut entries);
            }
            run = needed.map(|d| (start, d));
        }
        if end == 0x1_0000 {
            if let Some((first, decision)) = run {
                split(protocol, first, end, decision, &mut entries);
            }
            return entries;
        }
        if next_wanted == end {
            w += 1;
        }
        if next_below == end {
            b += 1;
        }
        start = end;
    }
}

/// Ports from `first` to before `end` as prefix blocks: at most 30.
fn split(protocol: u8, mut first: u32, end: u32, decision: Decision, entries: &mut Vec<Entry>) {
    while first < end {
        let aligned = if first == 0 { 16 } else { first.trailing_zeros() };
        let fits = (end - first).ilog2();
        let bits = aligned.min(fits);
        let port = u16::try_from(first).expect("a port is below 65,536");
        entries.push(Entry { protocol, port, length: VERDICT_PREFIX_PROTOCOL + 16 - bits, decision });
        first += 1 << bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decision() -> impl Strategy<Value = Decision> {
        (any::<bool>(), 0u32..3).prop_map(|(allow, rule)| Decision { allow, rule })
    }

    fn function() -> impl Strategy<Value = PortFunction<Decision>> {
        let update = (0usize..4, any::<u16>(), any::<u16>(), decision());
        (decision(), proptest::collection::vec(update, 0..6)).prop_map(|(initial, updates)| {
            let mut function = PortFunction::constant(initial);
            for (protocol, a, b, decision) in updates {
                match TRANSPORTS.get(protocol) {
                    Some(protocol) => function.update(*protocol, a.min(b), a.max(b), |_| decision),
                    None => function.other = decision,
                }
            }
            function
        })
    }

    /// Longest match among the entries, else what is below.
    fn look_up(entries: &[Entry], protocol: u8, port: u16, below: Decision) -> Decision {
        let covers =
            |e: &&Entry| e.length == VERDICT_PREFIX_ANY || e.protocol == protocol && (u32::from(e.port ^ port) >> (96 - e.length)) == 0;
        entries.iter().filter(covers).max_by_key(|e| e.length).map_or(below, |e| e.decision)
    }

    proptest! {
        #[test]
        fn entries_say_what_the_function_says(wanted in function(), base in function(), ports in proptest::collection::vec(any::<u16>(), 20)) {
            let entries = entries(&wanted, &base);
            let mut keys: Vec<_> = entries.iter().map(|e| (e.protocol, e.port, e.length)).collect();
            keys.sort_unstable();
            keys.dedup();
            prop_assert_eq!(keys.len(), entries.len());
            let same = |found: Decision, wanted: Decision| found.allow == wanted.allow && (found.allow || found.rule == wanted.rule);
            prop_assert!(same(look_up(&entries, 1, 0, base.other), wanted.other));
            for (at, protocol) in TRANSPORTS.into_iter().enumerate() {
                let edges = wanted.transports[at].iter().chain(&base.transports[at]).flat_map(|(s, _)| [*s, s.wrapping_sub(1)]);
                for port in edges.chain(ports.iter().copied()) {
                    prop_assert!(same(look_up(&entries, protocol.number(), port, base.at(protocol, port)), wanted.at(protocol, port)));
                }
            }
        }

        #[test]
        fn within_means_no_port_is_lost(left in function(), right in function()) {
            let edges = |at: usize| left.transports[at].iter().chain(&right.transports[at]).map(|(s, _)| *s).collect::<Vec<_>>();
            let wanted = (!left.other.allow || right.other.allow)
                && TRANSPORTS.into_iter().enumerate().all(|(at, p)| edges(at).into_iter().all(|port| !left.at(p, port).allow || right.at(p, port).allow));
            prop_assert_eq!(left.is_within(&right), wanted);
        }
    }

    #[test]
    fn a_range_needs_few_blocks() {
        let base = PortFunction::constant(Decision::DENY);
        let allow = Decision { allow: true, rule: 7 };
        let mut all = base.clone();
        all.update(Protocol::Tcp, 0, u16::MAX, |_| allow);
        assert_eq!(entries(&all, &base), [Entry { protocol: 6, port: 0, length: 80, decision: allow }]);
        let mut widest = base.clone();
        widest.update(Protocol::Tcp, 1, 65534, |_| allow);
        // The whole protocol, with its first and last port taken out.
        assert_eq!(entries(&widest, &base).len(), 3);
    }
}
