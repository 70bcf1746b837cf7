//! Which names addresses have, by the DNS answers that policed pods got.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::dns::Answer;

/// Pairs of address and name that are kept: what a pod can make the agent remember is bounded.
const MAX_PAIRS: usize = 65_536;

/// Seconds that a name is kept at least: a connection that was begun at once gets through although its answer said 0.
const LEAST: u64 = 10;

/// And at most, as resolvers do it.
const MOST: u64 = 86_400;

/// Names by address, each until a time in seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    of: BTreeMap<IpAddr, BTreeMap<String, u64>>,
    pairs: usize,
}

impl Names {
    /// Notes an answer that came at `now`; true if it is news to policies. `Err` if there is no room.
    pub(super) fn learn(&mut self, answer: &Answer, now: u64) -> Result<bool, Full> {
        self.keep(&answer.name, answer.address, now + u64::from(answer.ttl).clamp(LEAST, MOST))
    }

    /// Notes that an address has a name, for ever.
    ///
    /// # Errors
    /// Too many are known.
    pub fn set(&mut self, name: &str, address: IpAddr) -> Result<(), Full> {
        self.keep(name, address, u64::MAX).map(drop)
    }

    /// Notes that an address has a name until a time; a later time than known counts.
    pub(super) fn keep(&mut self, name: &str, address: IpAddr, until: u64) -> Result<bool, Full> {
        if let Some(known) = self.of.get_mut(&address).and_then(|names| names.get_mut(name)) {
            *known = until.max(*known);
            return Ok(false);
        }
        if self.pairs == MAX_PAIRS {
            return Err(Full);
        }
        self.pairs += 1;
        self.of.entry(address).or_default().insert(name.to_owned(), until);
        Ok(true)
    }

    /// Forgets what has expired, but not of addresses to which flows are open: they were allowed by name. Gives the
    /// addresses that lost a name.
    pub(super) fn expire(&mut self, now: u64, is_open: impl Fn(IpAddr) -> bool) -> BTreeSet<IpAddr> {
        let mut lost = BTreeSet::new();
        self.of.retain(|address, names| {
            if names.values().any(|until| *until < now) && !is_open(*address) {
                let before = names.len();
                names.retain(|_, until| *until >= now);
                self.pairs -= before - names.len();
                lost.insert(*address);
            }
            !names.is_empty()
        });
        lost
    }

    /// The names of an address.
    pub fn of(&self, address: IpAddr) -> impl Iterator<Item = &str> {
        self.of.get(&address).into_iter().flat_map(|names| names.keys().map(String::as_str))
    }

    /// Addresses that have names.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.of.keys().copied()
    }

    /// Everything: address, name, and the second until which it holds.
    pub fn all(&self) -> impl Iterator<Item = (IpAddr, &str, u64)> {
        self.of.iter().flat_map(|(address, names)| names.iter().map(|(name, until)| (*address, name.as_str(), *until)))
    }
}

/// No more names fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_PAIRS} names of addresses are known, and no more fit: connections to further names are denied until some expire")]
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
        assert_eq!(names.learn(&answer("a.example", "192.0.2.1", 60), 100), Ok(true));
        assert_eq!(names.learn(&answer("a.example", "192.0.2.1", 60), 130), Ok(false));
        assert_eq!(names.learn(&answer("b.example", "192.0.2.1", 0), 130), Ok(true));
        assert!(names.expire(140, |_| false).is_empty());
        assert_eq!(names.expire(141, |_| false), BTreeSet::from([address]));
        assert_eq!(names.of(address).collect::<Vec<_>>(), ["a.example"]);
        assert!(names.expire(191, |_| true).is_empty(), "a flow is open");
        assert_eq!(names.expire(191, |_| false), BTreeSet::from([address]));
        assert_eq!(names, Names::default());
    }

    #[test]
    fn a_name_lives_no_longer_than_a_day_after_its_last_answer() {
        let mut names = Names::default();
        assert_eq!(names.learn(&answer("a.example", "192.0.2.1", i32::MAX.cast_unsigned()), 100), Ok(true));
        assert!(names.expire(100 + MOST, |_| false).is_empty());
        assert_eq!(names.expire(101 + MOST, |_| false).len(), 1);
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered() {
        let mut names = Names::default();
        for index in 0..u32::try_from(MAX_PAIRS).unwrap() {
            let address = IpAddr::V4((0x0a00_0000 + index).into());
            assert_eq!(names.keep("a.example", address, 100), Ok(true));
        }
        assert_eq!(names.learn(&answer("b.example", "192.0.2.1", 60), 50), Err(Full));
        assert_eq!(names.expire(101, |_| false).len(), MAX_PAIRS);
        assert_eq!(names.learn(&answer("b.example", "192.0.2.1", 60), 50), Ok(true));
    }
}
