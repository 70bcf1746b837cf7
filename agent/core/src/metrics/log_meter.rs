//! How many bytes of logs were read for each pod, from the offsets of the files that are open at the moment.

use std::collections::HashMap;

use crate::ids::PodName;

/// Bytes read for each pod since it was first seen; only grows, through rotation too.
#[derive(Debug, Default)]
pub struct LogMeter {
    /// Offsets of each log's generations at the last look, oldest first.
    offsets: HashMap<String, Vec<u64>>,
    totals: HashMap<PodName, u64>,
}

impl LogMeter {
    /// Takes a look: for each open file the log's path, its pod, and how far it is read; the generations of a log oldest first. What a
    /// file gave between the last look and its end is not known any more once it is closed.
    pub fn look(&mut self, files: impl IntoIterator<Item = (String, PodName, u64)>) -> &HashMap<PodName, u64> {
        let mut now: HashMap<String, (PodName, Vec<u64>)> = HashMap::new();
        for (path, pod, offset) in files {
            now.entry(path).or_insert_with(|| (pod, Vec::new())).1.push(offset);
        }
        self.totals.retain(|pod, _| now.values().any(|(seen, _)| seen == pod));
        let mut next = HashMap::with_capacity(now.len());
        for (path, (pod, offsets)) in now {
            let before = self.offsets.remove(&path).unwrap_or_default();
            *self.totals.entry(pod).or_default() += grown(&before, &offsets);
            next.insert(path, offsets);
        }
        self.offsets = next;
        &self.totals
    }
}

/// What generations gave: the oldest ones may have been closed, new ones begin at 0.
fn grown(before: &[u64], now: &[u64]) -> u64 {
    // The most of them that can be the same files: none may have shrunk.
    let closed = (0..=before.len()).find(|closed| {
        let kept = &before[*closed..];
        kept.len() <= now.len() && kept.iter().zip(now).all(|(before, now)| before <= now)
    });
    let kept = &before[closed.unwrap_or(before.len())..];
    now.iter().enumerate().map(|(index, now)| now - kept.get(index).copied().unwrap_or(0)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn look(meter: &mut LogMeter, offsets: &[u64]) -> u64 {
        let pod = PodName::new("x", "a");
        let files = offsets.iter().map(|offset| ("/var/log/containers/a.log".to_owned(), pod.clone(), *offset));
        meter.look(files).get(&pod).copied().unwrap_or(0)
    }

    #[test]
    fn rotation_loses_nothing_that_was_seen() {
        let mut meter = LogMeter::default();
        assert_eq!(look(&mut meter, &[10]), 10);
        assert_eq!(look(&mut meter, &[30]), 30);
        assert_eq!(look(&mut meter, &[35, 4]), 39, "rotated");
        assert_eq!(look(&mut meter, &[9]), 44, "the old file is closed");
        assert_eq!(look(&mut meter, &[2]), 46, "rotated and closed between two looks");
        assert_eq!(look(&mut meter, &[]), 0, "a pod that is gone is forgotten");
    }

    proptest! {
        /// Never more than was read, never less than what every look could see.
        #[test]
        fn totals_grow_and_do_not_exceed_what_was_read(steps in prop::collection::vec((0u64..100, prop::bool::weighted(0.2), prop::bool::weighted(0.3)), 1..60)) {
            let mut meter = LogMeter::default();
            let (mut generations, mut read, mut last) = (vec![0u64], 0, 0);
            for (bytes, rotate, close) in steps {
                *generations.last_mut().unwrap() += bytes;
                read += bytes;
                if rotate {
                    generations.push(0);
                }
                if close && generations.len() > 1 {
                    generations.remove(0);
                }
                let told = look(&mut meter, &generations);
                prop_assert!(told >= last && told <= read, "{told} of {read}, {last} before");
                last = told;
            }
        }
    }
}
