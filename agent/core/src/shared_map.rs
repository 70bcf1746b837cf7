//! An ordered map whose copies share what they have in common.
//!
//! Entries lie in sorted runs behind `Arc`s. A copy costs nothing until one of the two is changed; a change then copies the
//! list of runs and one run. Two copies are compared by their runs first, so that finding what changed between them costs
//! about as much as the changes did.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Index;
use std::sync::Arc;

/// Entries a run may have; it is split in halves beyond. A change copies one run and, of each of the others, a pointer.
const RUN: usize = 32;

type Run<K, V> = Arc<Vec<(K, V)>>;

/// See the module.
pub struct SharedMap<K, V> {
    /// None is empty; their keys ascend within and across runs.
    runs: Arc<Vec<Run<K, V>>>,
    len: usize,
}

impl<K, V> SharedMap<K, V> {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Entries in order of their keys.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { runs: self.runs.iter(), run: [].iter() }
    }

    /// Keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// Values in order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Ord, V> SharedMap<K, V> {
    /// The run that has the key or would get it, and the key's place in it.
    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(usize, Result<usize, usize>)>
    where
        K: Borrow<Q>,
    {
        let after = self.runs.partition_point(|run| run[0].0.borrow() <= key);
        let run = after.saturating_sub(1);
        let place = self.runs.get(run)?.binary_search_by(|(present, _)| present.borrow().cmp(key));
        Some((run, place))
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        match self.find(key)? {
            (run, Ok(place)) => Some(&self.runs[run][place].1),
            (_, Err(_)) => None,
        }
    }

    /// Whether there is such a key.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// Sets a key's value; gives the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let Some((index, place)) = self.find(&key) else {
            Arc::make_mut(&mut self.runs).push(Arc::new(vec![(key, value)]));
            self.len += 1;
            return None;
        };
        let runs = Arc::make_mut(&mut self.runs);
        let run = Arc::make_mut(&mut runs[index]);
        match place {
            Ok(place) => Some(std::mem::replace(&mut run[place].1, value)),
            Err(place) => {
                run.insert(place, (key, value));
                self.len += 1;
                if run.len() > RUN {
                    let second = run.split_off(RUN / 2);
                    runs.insert(index + 1, Arc::new(second));
                }
                None
            }
        }
    }

    /// Takes a key out; gives its value.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (index, Ok(place)) = self.find(key)? else { return None };
        let runs = Arc::make_mut(&mut self.runs);
        let run = Arc::make_mut(&mut runs[index]);
        let (_, value) = run.remove(place);
        self.len -= 1;
        let left = run.len();
        if left == 0 {
            runs.remove(index);
        } else if left < RUN / 4 && runs.get(index + 1).is_some_and(|next| left + next.len() <= RUN / 2) {
            let next = Arc::unwrap_or_clone(runs.remove(index + 1));
            Arc::make_mut(&mut runs[index]).extend(next);
        }
        Some(value)
    }
}

impl<K: Ord + Clone, T> SharedMap<K, Arc<T>> {
    /// Keys that only one of the two maps has, or that stand for different objects, in order.
    pub fn changed(&self, other: &Self) -> Vec<K> {
        let mut keys = Vec::new();
        if Arc::ptr_eq(&self.runs, &other.runs) {
            return keys;
        }
        let (mut left, mut right) = (Cursor::new(&self.runs), Cursor::new(&other.runs));
        loop {
            if left.place == 0
                && right.place == 0
                && let (Some(one), Some(two)) = (left.runs.first(), right.runs.first())
                && Arc::ptr_eq(one, two)
            {
                left.skip();
                right.skip();
                continue;
            }
            let order = match (left.entry(), right.entry()) {
                (None, None) => return keys,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((one, _)), Some((two, _))) => one.cmp(two),
            };
            let gone = order.is_le().then(|| left.next()).flatten();
            let come = order.is_ge().then(|| right.next()).flatten();
            match (gone, come) {
                (Some((_, one)), Some((_, two))) if Arc::ptr_eq(one, two) => {}
                (Some((key, _)), _) | (None, Some((key, _))) => keys.push(key.clone()),
                (None, None) => return keys,
            }
        }
    }

    /// Whether both maps have the same objects, not only equal ones.
    pub fn same(&self, other: &Self) -> bool {
        self.len == other.len && self.changed(other).is_empty()
    }
}

/// A place in the runs that are still to come.
struct Cursor<'a, K, V> {
    runs: &'a [Run<K, V>],
    place: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn new(runs: &'a [Run<K, V>]) -> Self {
        Self { runs, place: 0 }
    }

    fn entry(&self) -> Option<&'a (K, V)> {
        self.runs.first().map(|run| &run[self.place])
    }

    fn next(&mut self) -> Option<&'a (K, V)> {
        let entry = self.entry()?;
        self.place += 1;
        if self.place == self.runs[0].len() {
            self.skip();
        }
        Some(entry)
    }

    fn skip(&mut self) {
        self.runs = &self.runs[1..];
        self.place = 0;
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { runs: Arc::default(), len: 0 }
    }
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> Self {
        Self { runs: Arc::clone(&self.runs), len: self.len }
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.runs, &other.runs) || self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Borrow<Q>, Q: Ord + ?Sized, V> Index<&Q> for SharedMap<K, V> {
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("the map has the key")
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for SharedMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<'a, K, V> IntoIterator for &'a SharedMap<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Iter<'a, K, V> {
        self.iter()
    }
}

/// Entries in order of their keys.
#[derive(Debug)]
pub struct Iter<'a, K, V> {
    runs: std::slice::Iter<'a, Run<K, V>>,
    run: std::slice::Iter<'a, (K, V)>,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((key, value)) = self.run.next() {
                return Some((key, value));
            }
            self.run = self.runs.next()?.iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn whole(map: &SharedMap<u16, Arc<u32>>) {
        assert!(map.runs.iter().all(|run| (1..=RUN).contains(&run.len())), "no run is empty or too long");
        assert_eq!(map.runs.iter().map(|run| run.len()).sum::<usize>(), map.len());
    }

    proptest! {
        /// Against the standard map, and the comparison with every fifth copy against one entry by entry.
        #[test]
        fn is_a_map_and_tells_what_changed(steps in proptest::collection::vec((0..300u16, 0..5u8), 0..1_200)) {
            let mut map: SharedMap<u16, Arc<u32>> = SharedMap::default();
            let mut model: BTreeMap<u16, Arc<u32>> = BTreeMap::new();
            let mut copy = (map.clone(), model.clone());
            for (number, (key, what)) in (0..).zip(steps) {
                if what < 3 {
                    let value = Arc::new(number);
                    prop_assert_eq!(map.insert(key, Arc::clone(&value)), model.insert(key, value));
                } else {
                    prop_assert_eq!(map.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(map.get(&key), model.get(&key));
                prop_assert_eq!(map.len(), model.len());
                whole(&map);
                if number % 5 == 0 {
                    let (before, model_before) = std::mem::replace(&mut copy, (map.clone(), model.clone()));
                    prop_assert!(before.iter().eq(&model_before), "a copy stays what it was");
                    let keys: BTreeSet<u16> = model.keys().chain(model_before.keys()).copied().collect();
                    let differs = |key: &u16| match (model.get(key), model_before.get(key)) {
                        (Some(one), Some(two)) => !Arc::ptr_eq(one, two),
                        _ => true,
                    };
                    let expected: Vec<u16> = keys.into_iter().filter(differs).collect();
                    prop_assert_eq!(before.same(&map), expected.is_empty());
                    prop_assert_eq!(before.changed(&map), expected);
                }
            }
            prop_assert!(map.iter().eq(&model));
        }
    }

    #[test]
    fn a_change_copies_one_run() {
        let map: SharedMap<u16, Arc<u32>> = (0..10_000).map(|key| (key, Arc::new(u32::from(key)))).collect();
        let mut next = map.clone();
        next.insert(5_000, Arc::new(0));
        let own = next.runs.iter().zip(map.runs.iter()).filter(|(one, two)| !Arc::ptr_eq(one, two)).count();
        assert_eq!((own, map.changed(&next)), (1, vec![5_000]));
        assert_eq!(*map[&5_000], 5_000);
    }
}
