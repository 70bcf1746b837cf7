//! Verdicts as functions of protocol and port, and their shortest form as prefix entries of the verdict trie.

use std::collections::BTreeMap;

use stanchion_ebpf_abi::{PROTOCOL_ANY, VERDICT_PREFIX_ANY, VERDICT_PREFIX_PROTOCOL, VerdictKey, VerdictValue, verdict};

use crate::objects::Protocol;

/// Protocols that rules can name, in the order of [`PortFunction::transports`].
pub const TRANSPORTS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// What a rule does with what it matches and no rule before it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The rest of the tier does not apply.
    Passed,
    /// Decided.
    Done(Decision),
}

/// A verdict and the rule that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

    /// Changes values of a protocol from the first to the last port, both included.
    pub fn update(&mut self, protocol: Protocol, first: u16, last: u16, change: impl Fn(T) -> T) {
        let segments = &mut self.transports[index(protocol)];
        // Those that the range touches, and the one on either side, which may be the same afterwards.
        let from = segments.partition_point(|(start, _)| *start <= first) - 1;
        let to = segments.partition_point(|(start, _)| *start <= last);
        let (before, after) = (from.saturating_sub(1), segments.len().min(to + 1));
        let mut next: Segments<T> = segments[before..from].to_vec();
        for at in from..to {
            let (start, value) = segments[at];
            if start < first {
                next.push((start, value));
            }
            next.push((start.max(first), change(value)));
            if at + 1 == to && last < segments.get(to).map_or(u16::MAX, |(start, _)| start - 1) {
                next.push((last + 1, value));
            }
        }
        next.extend_from_slice(&segments[to..after]);
        next.dedup_by_key(|(_, value)| *value);
        segments.splice(before..after, next);
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

/// A function in the making: rules are asked in their order, and what one has decided no later one changes.
#[derive(Debug)]
pub struct Draft {
    other: Option<Outcome>,
    /// What no rule has matched yet: by its first port, its last.
    open: [BTreeMap<u16, u16>; 3],
    passed: [Vec<(u16, u16)>; 3],
    /// By the first port.
    done: [Segments<Decision>; 3],
}

impl Default for Draft {
    /// Nothing is decided.
    fn default() -> Self {
        let open = std::array::from_fn(|_| BTreeMap::from([(0, u16::MAX)]));
        Self { other: None, open, passed: Default::default(), done: Default::default() }
    }
}

impl Draft {
    /// A rule for every protocol.
    pub fn settle_all(&mut self, outcome: Outcome) {
        self.other = self.other.or(Some(outcome));
        for at in 0..TRANSPORTS.len() {
            for (first, last) in std::mem::take(&mut self.open[at]) {
                self.note(at, first, last, outcome);
            }
        }
    }

    /// A rule for ports of a protocol from the first to the last, both included.
    pub fn settle(&mut self, protocol: Protocol, first: u16, last: u16, outcome: Outcome) {
        let at = index(protocol);
        if let Some((begin, end)) = self.open[at].range(..first).next_back().map(|(begin, end)| (*begin, *end))
            && end >= first
        {
            self.open[at].insert(begin, first - 1);
            self.open[at].insert(first, end);
        }
        while let Some((begin, end)) = self.open[at].range(first..=last).next().map(|(begin, end)| (*begin, *end)) {
            self.open[at].remove(&begin);
            if end > last {
                self.open[at].insert(last + 1, end);
            }
            self.note(at, begin, end.min(last), outcome);
        }
    }

    fn note(&mut self, at: usize, first: u16, last: u16, outcome: Outcome) {
        match outcome {
            Outcome::Done(decision) => self.done[at].push((first, decision)),
            Outcome::Passed => self.passed[at].push((first, last)),
        }
    }

    /// The next tier is asked about what was passed on to it, and about what no rule has matched.
    pub fn next_tier(&mut self) {
        self.other = self.other.filter(|outcome| *outcome != Outcome::Passed);
        for (open, passed) in self.open.iter_mut().zip(&mut self.passed) {
            open.extend(passed.drain(..));
        }
    }

    /// `otherwise`: what is so far undecided.
    pub fn finish(mut self, otherwise: Decision) -> PortFunction<Decision> {
        self.next_tier();
        let Self { other, open, done, .. } = self;
        let mut transports = done;
        for (segments, open) in transports.iter_mut().zip(open) {
            segments.extend(open.into_keys().map(|first| (first, otherwise)));
            segments.sort_unstable_by_key(|(first, _)| *first);
            segments.dedup_by_key(|(_, decision)| *decision);
        }
        PortFunction { other: if let Some(Outcome::Done(decision)) = other { decision } else { otherwise }, transports }
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

    /// Protocol, or 3 for all; first and last port in any order; what is decided, or nothing to pass on.
    type TestRule = (usize, u16, u16, Option<Decision>);

    /// What the rules say of one port: the first that matches, tier by tier.
    fn first_match(rules: &[Vec<TestRule>], protocol: usize, port: u16, otherwise: Decision) -> Decision {
        for tier in rules {
            let matches = |rule: &&TestRule| match rule.0 {
                3 => true,
                of => of == protocol && (rule.1.min(rule.2)..=rule.1.max(rule.2)).contains(&port),
            };
            if let Some(decision) = tier.iter().find(matches).and_then(|rule| rule.3) {
                return decision;
            }
        }
        otherwise
    }

    proptest! {
        #[test]
        fn the_first_rule_that_matches_decides(
            tiers in proptest::collection::vec(
                proptest::collection::vec((0usize..4, 0u16..40, prop_oneof![0u16..40, Just(u16::MAX)], proptest::option::of(decision())), 0..8), 0..3),
            otherwise in decision(),
        ) {
            let mut draft = Draft::default();
            for tier in &tiers {
                for (protocol, a, b, decision) in tier {
                    let outcome = decision.map_or(Outcome::Passed, Outcome::Done);
                    match TRANSPORTS.get(*protocol) {
                        Some(protocol) => draft.settle(*protocol, *a.min(b), *a.max(b), outcome),
                        None => draft.settle_all(outcome),
                    }
                }
                draft.next_tier();
            }
            let function = draft.finish(otherwise);
            prop_assert_eq!(function.other, first_match(&tiers, 3, 0, otherwise));
            for (at, protocol) in TRANSPORTS.into_iter().enumerate() {
                prop_assert!(function.transports[at][0].0 == 0 && function.transports[at].windows(2).all(|two| two[0].0 < two[1].0));
                for port in (0..45).chain([u16::MAX - 1, u16::MAX]) {
                    prop_assert_eq!(function.at(protocol, port), first_match(&tiers, at, port, otherwise));
                }
            }
        }

        #[test]
        fn an_update_changes_its_ports_and_no_others(before in function(), a in any::<u16>(), b in any::<u16>(), decision in decision()) {
            let (first, last) = (a.min(b), a.max(b));
            let mut after = before.clone();
            after.update(Protocol::Udp, first, last, |_| decision);
            let segments = &after.transports[1];
            prop_assert!(segments[0].0 == 0 && segments.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 != two[1].1));
            for port in [0, first.saturating_sub(1), first, last, last.saturating_add(1), u16::MAX] {
                let wanted = if (first..=last).contains(&port) { decision } else { before.at(Protocol::Udp, port) };
                prop_assert_eq!(after.at(Protocol::Udp, port), wanted);
            }
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
