//! The order of writes. At every instant each packet's verdict is the old or the new one.
//!
//! What a policy set says of an identity never changes: both numbers are names of fixed meanings. So verdict entries are
//! written before anything points at them and removed after nothing does, unseen by packets. A packet's verdict changes
//! in two ways only: its peer's address moves to another identity, or its pod flips to another policy set. Each is one
//! atomic write. Where one change brings both, a packet could see the new set with the old identity, which is neither
//! old nor new. There an address takes a transitional identity on its way, which to sets of before is what the address
//! was, and to sets of after what it becomes: move, flip, move on. Mostly that is not needed, because the move means
//! nothing to one of the sides: it is then made on that side of the flips. Of the moves that are made first, those of
//! addresses that go come before those of addresses that come, which may need their room.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::image::{EndpointImage, MapImage, MapOp, Slot};
use super::intern::Pairs;
use super::maps::longest_match;
use super::ports::Entry;

/// From one image to the next.
pub(super) struct Change<'a> {
    /// What the maps hold.
    pub(super) old: &'a MapImage,
    /// Exact addresses that change: the new identity, `None` to remove.
    pub(super) addresses: &'a BTreeMap<IpAddr, Option<u32>>,
    /// The new CIDR table if it changes.
    pub(super) cidrs: Option<&'a BTreeMap<IpNet, u32>>,
    /// Endpoints that change, `None` to remove.
    pub(super) endpoints: &'a BTreeMap<Slot, Option<EndpointImage>>,
    /// Pairs of set and identity that are needed from now on.
    pub(super) added: &'a Pairs,
    /// Pairs that are not needed any more.
    pub(super) removed: &'a Pairs,
    /// The node's addresses from now on.
    pub(super) node_addresses: &'a [IpAddr],
}

/// What sets say of identities.
pub(super) trait Meanings {
    /// Entries of the pair, old or new; `None` if the set's or the identity's meaning is not known.
    fn entries(&self, set: u32, identity: u32) -> Option<Vec<Entry>>;
    /// The direction of a set, as the key has it; `None` if the set's meaning is not known.
    fn direction(&self, set: u32) -> Option<u8>;
    /// A number that nothing uses yet, for a set or an identity.
    fn fresh(&mut self) -> u32;
    /// Identities of which the set has entries after the change.
    fn identities_of(&self, set: u32) -> Vec<u32>;
}

/// How a move is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    /// Before the flips.
    First,
    /// After the flips.
    Last,
    /// Through a transitional identity.
    Through(u32),
}

/// Entries of a pair as the maps hold them.
pub(super) fn image_entries(image: &MapImage, set: u32, identity: u32, direction: u8) -> Vec<Entry> {
    use super::ports::Decision;
    let first = (stanchion_ebpf_abi::VerdictKey { policy: set, identity, direction, protocol: 0, port: [0; 2] }, 0);
    image
        .verdicts
        .range(first..)
        .take_while(|((key, _), _)| (key.policy, key.identity, key.direction) == (set, identity, direction))
        .map(|((key, length), value)| Entry {
            protocol: key.protocol,
            port: u16::from_be_bytes(key.port),
            length: *length,
            decision: Decision { allow: value.verdict == stanchion_ebpf_abi::verdict::ALLOW, rule: value.rule },
        })
        .collect()
}

struct Writer<'a, M: Meanings> {
    change: &'a Change<'a>,
    meanings: &'a mut M,
    ops: Vec<MapOp>,
    /// Pairs written only for the time of the change.
    temporary: BTreeMap<(u32, u32), Vec<Entry>>,
    directions: BTreeMap<u32, u8>,
    /// Where moves have led so far.
    exact_now: HashMap<IpAddr, u32>,
    blocks_now: HashMap<IpNet, u32>,
}

/// The operations that make the change.
pub(super) fn order<M: Meanings>(change: &Change<'_>, meanings: &mut M) -> Vec<MapOp> {
    let mut writer = Writer {
        change,
        meanings,
        ops: Vec::new(),
        temporary: BTreeMap::new(),
        directions: BTreeMap::new(),
        exact_now: HashMap::new(),
        blocks_now: HashMap::new(),
    };
    writer.write();
    writer.ops
}

impl<M: Meanings> Writer<'_, M> {
    fn write(&mut self) {
        let change = self.change;
        for address in change.node_addresses.iter().filter(|a| !change.old.node_addresses.contains(a)) {
            self.ops.push(MapOp::SetNodeAddress(*address));
        }
        for (set, identity) in change.added {
            let entries = self.meanings.entries(*set, *identity).unwrap_or_default();
            let direction = self.direction(*set);
            write_entries(&mut self.ops, *set, *identity, direction, &entries);
        }
        self.visible();
        for (set, identity) in change.removed {
            let direction = self.direction(*set);
            let entries = image_entries(change.old, *set, *identity, direction);
            remove_entries(&mut self.ops, *set, *identity, direction, &entries);
        }
        for ((set, identity), entries) in std::mem::take(&mut self.temporary) {
            let direction = self.direction(set);
            remove_entries(&mut self.ops, set, identity, direction, &entries);
        }
        for address in change.old.node_addresses.iter().filter(|a| !change.node_addresses.contains(a)) {
            self.ops.push(MapOp::RemoveNodeAddress(*address));
        }
    }

    /// The writes that packets see.
    fn visible(&mut self) {
        let change = self.change;
        // Flips by what they change: the policy set of one direction.
        let mut flips: BTreeSet<(Option<u32>, Option<u32>)> = BTreeSet::new();
        let mut sets_in_use: BTreeSet<u32> = BTreeSet::new();
        for (slot, old) in &change.old.endpoints {
            let new = match change.endpoints.get(slot) {
                None => Some(old),
                Some(new) => new.as_ref(),
            };
            sets_in_use.extend(old.ingress.iter().chain(&old.egress));
            let Some(new) = new else { continue };
            sets_in_use.extend(new.ingress.iter().chain(&new.egress));
            for (before, after) in [(old.ingress, new.ingress), (old.egress, new.egress)] {
                if before != after {
                    flips.insert((before, after));
                }
            }
        }
        for (_, new) in change.endpoints.iter().filter(|(slot, _)| !change.old.endpoints.contains_key(*slot)) {
            // A pod that was not there: what is said of it must hold from its first packet.
            for set in new.iter().flat_map(|new| [new.ingress, new.egress]).flatten() {
                sets_in_use.insert(set);
                flips.insert((None, Some(set)));
            }
        }
        let sources: BTreeSet<u32> = flips.iter().filter_map(|(before, _)| *before).collect();
        let targets: BTreeSet<u32> = flips.iter().filter_map(|(_, after)| *after).collect();

        let exact = exact_moves(self.change.old, self.change.addresses, self.change.cidrs);
        let blocks = block_moves(self.change.old, self.change.cidrs);
        let pairs: Pairs =
            exact.iter().map(|m| (m.from, m.to)).chain(blocks.iter().map(|m| (m.from, m.to))).filter(|(a, b)| a != b).collect();
        let mut paths: BTreeMap<(u32, u32), Path> = BTreeMap::new();
        for (from, to) in pairs {
            let path = if flips.is_empty() || sources.iter().all(|set| self.same(*set, from, to)) {
                Path::First
            } else if targets.iter().all(|set| self.same(*set, from, to)) {
                Path::Last
            } else {
                Path::Through(self.meanings.fresh())
            };
            paths.insert((from, to), path);
        }
        let clones = self.write_temporaries(&paths, &sources, &targets, &sets_in_use);
        let exact = self.make_room(exact, &paths);

        if !flips.is_empty() {
            let identity_at = |from, to| match paths.get(&(from, to)) {
                None | Some(Path::First) => to,
                Some(Path::Last) => from,
                Some(Path::Through(transit)) => *transit,
            };
            self.move_all(&exact, &blocks, &identity_at, false);
        }
        let swap = |set: Option<u32>| set.map(|set| clones.get(&set).copied().unwrap_or(set));
        let mut later = Vec::new();
        for (slot, endpoint) in change.endpoints {
            let Some(endpoint) = endpoint else {
                self.ops.push(MapOp::RemoveEndpoint(*slot));
                continue;
            };
            let before = change.old.endpoints.get(slot);
            let flipped = before.is_none_or(|old| (old.ingress, old.egress) != (endpoint.ingress, endpoint.egress));
            if !flipped {
                // Only its revision grows, or its addresses change: after the moves, so that flows are judged by them.
                later.push(MapOp::SetEndpoint(*slot, endpoint.clone()));
                continue;
            }
            let first = EndpointImage { ingress: swap(endpoint.ingress), egress: swap(endpoint.egress), ..endpoint.clone() };
            if first != *endpoint {
                later.push(MapOp::SetEndpoint(*slot, endpoint.clone()));
            }
            self.ops.push(MapOp::SetEndpoint(*slot, first));
        }
        self.move_all(&exact, &blocks, &|_, to| to, true);
        self.ops.append(&mut later);
    }

    /// Forgets the addresses whose moves may be made first, so that a full map takes those that come; gives the other moves.
    /// Without its entry an address is what its block is: so the block must be the same now and in the end. What goes through
    /// a transitional identity, or after the flips, keeps its entry until then, and its room.
    fn make_room(&mut self, exact: Vec<Move<IpAddr>>, paths: &BTreeMap<(u32, u32), Path>) -> Vec<Move<IpAddr>> {
        let Change { old, cidrs, .. } = self.change;
        let is_first = |m: &Move<IpAddr>| matches!(paths.get(&(m.from, m.to)), None | Some(Path::First));
        let is_in_place = |m: &Move<IpAddr>| cidrs.is_none() || longest_match(&old.cidrs, m.place) == m.to;
        let (gone, others): (Vec<_>, Vec<_>) = exact.into_iter().partition(|m| !m.stays && is_first(m) && is_in_place(m));
        self.ops.extend(gone.into_iter().map(|m| MapOp::RemoveAddress(m.place)));
        others
    }

    fn direction(&mut self, set: u32) -> u8 {
        let known = self.directions.get(&set).copied().or_else(|| self.meanings.direction(set));
        known.unwrap_or_else(|| {
            // A set from before a restart: an endpoint has it in one direction.
            let egress = self.change.old.endpoints.values().any(|endpoint| endpoint.egress == Some(set));
            if egress { stanchion_ebpf_abi::direction::EGRESS } else { stanchion_ebpf_abi::direction::INGRESS }
        })
    }

    /// Entries of a pair at the time of the change.
    fn entries(&mut self, set: u32, identity: u32) -> Vec<Entry> {
        if let Some(entries) = self.meanings.entries(set, identity) {
            return entries;
        }
        let direction = self.direction(set);
        image_entries(self.change.old, set, identity, direction)
    }

    fn same(&mut self, set: u32, from: u32, to: u32) -> bool {
        match (self.meanings.entries(set, from), self.meanings.entries(set, to)) {
            (Some(from), Some(to)) => from == to,
            // A set from before a restart: what it would say of a new identity is not known.
            _ => false,
        }
    }

    /// Writes what sets on one side of the flips must know of identities of the other side. Gives the sets that are flipped
    /// to as well as from, with their stand-ins.
    fn write_temporaries(
        &mut self,
        paths: &BTreeMap<(u32, u32), Path>,
        sources: &BTreeSet<u32>,
        targets: &BTreeSet<u32>,
        sets_in_use: &BTreeSet<u32>,
    ) -> BTreeMap<u32, u32> {
        let mut clones = BTreeMap::new();
        if paths.values().any(|path| *path != Path::First) {
            for set in sources.intersection(targets) {
                let clone = self.meanings.fresh();
                let direction = self.direction(*set);
                self.directions.insert(clone, direction);
                clones.insert(*set, clone);
                for identity in self.meanings.identities_of(*set) {
                    let entries = self.entries(*set, identity);
                    self.temporary.insert((clone, identity), entries);
                }
            }
        }
        for ((from, to), path) in paths {
            for set in sets_in_use {
                let is_target = targets.contains(set);
                let clone = clones.get(set).copied();
                match path {
                    Path::First => {
                        let entries = self.entries(*set, if is_target && !sources.contains(set) { *to } else { *from });
                        if sources.contains(set) || is_target {
                            self.temporarily(*set, *to, entries);
                        }
                    }
                    Path::Last => {
                        if is_target {
                            let entries = self.entries(*set, *to);
                            self.temporarily(clone.unwrap_or(*set), *from, entries);
                        }
                    }
                    Path::Through(transit) => {
                        let side = if is_target && !sources.contains(set) { *to } else { *from };
                        let entries = self.entries(*set, side);
                        self.temporarily(*set, *transit, entries);
                        if let Some(clone) = clone {
                            let entries = self.entries(*set, *to);
                            self.temporarily(clone, *transit, entries);
                        }
                    }
                }
            }
        }
        for ((set, identity), entries) in self.temporary.clone() {
            let direction = self.direction(set);
            write_entries(&mut self.ops, set, identity, direction, &entries);
        }
        clones
    }

    /// Notes a pair for the time of the change, unless it is there anyway.
    fn temporarily(&mut self, set: u32, identity: u32, entries: Vec<Entry>) {
        let pair = (set, identity);
        if identity == 0 || entries.is_empty() || self.change.added.contains(&pair) || self.temporary.contains_key(&pair) {
            return;
        }
        let direction = self.direction(set);
        let there = !image_entries(self.change.old, set, identity, direction).is_empty();
        if !there {
            self.temporary.insert(pair, entries);
        }
    }

    /// Moves everything to what `identity_at` gives for its old and new identity. Blocks are set longest first and removed
    /// shortest first, so that every address is found in its old or its new one.
    fn move_all(&mut self, exact: &[Move<IpAddr>], blocks: &[Move<IpNet>], identity_at: &dyn Fn(u32, u32) -> u32, last: bool) {
        for m in exact.iter().filter(|m| m.stays || !last) {
            let wanted = identity_at(m.from, m.to);
            if self.exact_now.insert(m.place, wanted).or(m.was) != Some(wanted) {
                self.ops.push(MapOp::SetAddress(m.place, wanted));
            }
        }
        let mut longest_first: Vec<&Move<IpNet>> = blocks.iter().collect();
        longest_first.sort_by_key(|m| std::cmp::Reverse(m.place.prefix_len()));
        for m in longest_first.iter().filter(|m| m.stays || !last) {
            let wanted = identity_at(m.from, m.to);
            if self.blocks_now.insert(m.place, wanted).or(m.was) != Some(wanted) {
                self.ops.push(MapOp::SetCidr(m.place, wanted));
            }
        }
        if last {
            self.ops.extend(longest_first.iter().rev().filter(|m| !m.stays).map(|m| MapOp::RemoveCidr(m.place)));
            self.ops.extend(exact.iter().filter(|m| !m.stays).map(|m| MapOp::RemoveAddress(m.place)));
        }
    }
}

/// Which identities addresses leave and take.
pub(super) fn moved(old: &MapImage, addresses: &BTreeMap<IpAddr, Option<u32>>, cidrs: Option<&BTreeMap<IpNet, u32>>) -> Pairs {
    let exact = exact_moves(old, addresses, cidrs).into_iter().map(|m| (m.from, m.to));
    let blocks = block_moves(old, cidrs).into_iter().map(|m| (m.from, m.to));
    exact.chain(blocks).filter(|(from, to)| from != to).collect()
}

/// Exact addresses with their identities before and after.
fn exact_moves(old: &MapImage, addresses: &BTreeMap<IpAddr, Option<u32>>, cidrs: Option<&BTreeMap<IpNet, u32>>) -> Vec<Move<IpAddr>> {
    let new_cidrs = cidrs.unwrap_or(&old.cidrs);
    let moves = addresses.iter().map(|(address, new)| Move {
        place: *address,
        from: old.identity(*address),
        to: new.unwrap_or_else(|| longest_match(new_cidrs, *address)),
        stays: new.is_some(),
        was: old.addresses.get(address).copied(),
    });
    moves.collect()
}

/// Every block of the old or the new table, with the identities of its part outside longer blocks.
fn block_moves(old: &MapImage, cidrs: Option<&BTreeMap<IpNet, u32>>) -> Vec<Move<IpNet>> {
    let (old, Some(new)) = (&old.cidrs, cidrs) else { return Vec::new() };
    let places: BTreeSet<IpNet> = old.keys().chain(new.keys()).copied().collect();
    let moves = places.into_iter().map(|place| Move {
        place,
        from: longest_block(old, place),
        to: longest_block(new, place),
        stays: new.contains_key(&place),
        was: old.get(&place).copied(),
    });
    moves.collect()
}

/// A place whose identity may change.
struct Move<P> {
    place: P,
    from: u32,
    to: u32,
    /// It has an entry afterwards.
    stays: bool,
    /// Its entry before.
    was: Option<u32>,
}

/// The identity of a block's own part: of the longest block that contains it.
fn longest_block(cidrs: &BTreeMap<IpNet, u32>, place: IpNet) -> u32 {
    let outer = (0..=place.prefix_len()).rev().filter_map(|length| IpNet::new(place.addr(), length).ok());
    outer.map(|net| net.trunc()).find_map(|net| cidrs.get(&net).copied()).unwrap_or(0)
}

fn write_entries(ops: &mut Vec<MapOp>, set: u32, identity: u32, direction: u8, entries: &[Entry]) {
    ops.extend(entries.iter().map(|e| MapOp::SetVerdict(e.key(set, identity, direction), e.length, e.decision.value())));
}

fn remove_entries(ops: &mut Vec<MapOp>, set: u32, identity: u32, direction: u8, entries: &[Entry]) {
    ops.extend(entries.iter().map(|e| MapOp::RemoveVerdict(e.key(set, identity, direction), e.length)));
}
