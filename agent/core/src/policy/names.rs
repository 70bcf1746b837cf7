//! Which names addresses have, by the DNS answers that policed pods got.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::dns::Answer;

/// Pairs of address and name that are kept: what pods can make the agent remember is bounded.
const MAX_PAIRS: usize = 65_536;

/// Those that the pods of one namespace can make it remember: others find room.
const MAX_OF_NAMESPACE: usize = 16_384;

/// Seconds that a name is kept at least: a connection that was begun at once gets through although its answer said 0.
const LEAST: u64 = 10;

/// And at most, as resolvers do it.
const MOST: u64 = 86_400;

/// An address's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownName {
    /// The address.
    pub address: IpAddr,
    /// Lower case, without the final dot.
    pub name: String,
    /// The namespace whose pods have learnt it, and for which it counts; empty: for all.
    pub namespace: String,
    /// The second until which it holds.
    pub until: u64,
}

/// Names by address, each for the pods of one namespace and until a time in seconds: whoever answers the pods of one tells nothing to
/// those of another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// By namespace and name.
    of: BTreeMap<IpAddr, BTreeMap<(String, String), u64>>,
    pairs: BTreeMap<String, usize>,
}

impl Names {
    /// Notes an answer that a pod of the namespace got at `now`; true if it is news to policies. `Err` if there is no room.
    pub(super) fn learn(&mut self, namespace: &str, answer: &Answer, now: u64) -> Result<bool, Full> {
        let until = now + u64::from(answer.ttl).clamp(LEAST, MOST);
        self.keep(KnownName { address: answer.address, name: answer.name.clone(), namespace: namespace.to_owned(), until })
    }

    /// Notes that an address has a name, for all and for ever.
    ///
    /// # Errors
    /// Too many are known.
    pub fn set(&mut self, name: &str, address: IpAddr) -> Result<(), Full> {
        self.keep(KnownName { address, name: name.to_owned(), namespace: String::new(), until: u64::MAX }).map(drop)
    }

    /// Notes that an address has a name until a time; a later time than known counts.
    pub(super) fn keep(&mut self, KnownName { address, name, namespace, until }: KnownName) -> Result<bool, Full> {
        let key = (namespace, name);
        if let Some(known) = self.of.get_mut(&address).and_then(|names| names.get_mut(&key)) {
            *known = until.max(*known);
            return Ok(false);
        }
        let of_namespace = self.pairs.get(&key.0).copied().unwrap_or_default();
        // Names that are for all are of no pod's making, or of an earlier agent's, which had no other bound.
        let share = if key.0.is_empty() { MAX_PAIRS } else { MAX_OF_NAMESPACE };
        if of_namespace >= share || self.pairs.values().sum::<usize>() >= MAX_PAIRS {
            return Err(Full);
        }
        *self.pairs.entry(key.0.clone()).or_default() += 1;
        self.of.entry(address).or_default().insert(key, until);
        Ok(true)
    }

    /// Forgets what has expired, but not of addresses to which flows are open: they were allowed by name. Gives the
    /// addresses that lost a name.
    pub(super) fn expire(&mut self, now: u64, is_open: impl Fn(IpAddr) -> bool) -> BTreeSet<IpAddr> {
        let mut lost = BTreeSet::new();
        self.of.retain(|address, names| {
            if names.values().any(|until| *until < now) && !is_open(*address) {
                names.retain(|(namespace, _), until| {
                    let stays = *until >= now;
                    if !stays && let Some(pairs) = self.pairs.get_mut(namespace) {
                        *pairs -= 1;
                    }
                    stays
                });
                lost.insert(*address);
            }
            !names.is_empty()
        });
        self.pairs.retain(|_, pairs| *pairs > 0);
        lost
    }

    /// The names of an address that count for the pods of a namespace.
    pub fn of(&self, address: IpAddr, namespace: &str) -> impl Iterator<Item = &str> {
        let names = self.of.get(&address).into_iter().flat_map(|names| names.keys());
        names.filter(move |(of, _)| of.is_empty() || of == namespace).map(|(_, name)| name.as_str())
    }

    /// Whether an address has a name.
    pub fn has(&self, address: IpAddr) -> bool {
        self.of.contains_key(&address)
    }

    /// Addresses that have names.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.of.keys().copied()
    }

    /// Everything.
    pub fn all(&self) -> impl Iterator<Item = KnownName> {
        let known = |address: IpAddr, (namespace, name): &(String, String), until: u64| KnownName {
            address,
            name: name.clone(),
            namespace: namespace.clone(),
            until,
        };
        self.of.iter().flat_map(move |(address, names)| names.iter().map(move |(key, until)| known(*address, key, *until)))
    }
}

/// No more names fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_PAIRS} names of addresses are known, or {MAX_OF_NAMESPACE} by pods of this namespace, and no more fit: connections to further names are \
     denied until some expire"
)]
pub struct Full;

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(name: &str, address: &str, ttl: u32) -> Answer {
        Answer { name: name.to_owned(), address: address.parse().unwrap(), ttl }
    }

    #[test]
    fn a_name_lives_as_long_as_its_last_answer_says_or_a_flow_is_open() {
        let mut names = Names::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(names.learn("x", &answer("a.example", "192.0.2.1", 60), 100), Ok(true));
        assert_eq!(names.learn("x", &answer("a.example", "192.0.2.1", 60), 130), Ok(false));
        assert_eq!(names.learn("x", &answer("b.example", "192.0.2.1", 0), 130), Ok(true));
        assert!(names.expire(140, |_| false).is_empty());
        assert_eq!(names.expire(141, |_| false), BTreeSet::from([address]));
        assert_eq!(names.of(address, "x").collect::<Vec<_>>(), ["a.example"]);
        assert!(names.has(address) && names.of(address, "y").next().is_none());
        assert!(names.expire(191, |_| true).is_empty(), "a flow is open");
        assert_eq!(names.expire(191, |_| false), BTreeSet::from([address]));
        assert_eq!(names, Names::default());
    }

    #[test]
    fn a_name_lives_no_longer_than_a_day_after_its_last_answer() {
        let mut names = Names::default();
        assert_eq!(names.learn("x", &answer("a.example", "192.0.2.1", i32::MAX.cast_unsigned()), 100), Ok(true));
        assert!(names.expire(100 + MOST, |_| false).is_empty());
        assert_eq!(names.expire(101 + MOST, |_| false).len(), 1);
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered() {
        let mut names = Names::default();
        let fill = |names: &mut Names, namespace: &str, first: u32, count: usize| {
            for index in 0..u32::try_from(count).unwrap() {
                let address = IpAddr::V4((first + index).into());
                let known = KnownName { address, name: "a.example".to_owned(), namespace: namespace.to_owned(), until: 100 };
                assert_eq!(names.keep(known), Ok(true));
            }
        };
        fill(&mut names, "x", 0x0a00_0000, MAX_OF_NAMESPACE);
        assert_eq!(names.learn("x", &answer("b.example", "192.0.2.1", 60), 50), Err(Full));
        assert_eq!(names.learn("y", &answer("b.example", "192.0.2.1", 60), 50), Ok(true), "others find room");
        fill(&mut names, "", 0x0b00_0000, MAX_PAIRS - MAX_OF_NAMESPACE - 1);
        assert_eq!(names.learn("y", &answer("c.example", "192.0.2.1", 60), 50), Err(Full));
        assert_eq!(names.expire(111, |_| false).len(), MAX_PAIRS);
        assert_eq!(names, Names::default());
    }
}
