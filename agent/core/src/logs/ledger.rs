//! How far a file may be forgotten: the safe offset.
//!
//! Each event of a batch in flight pins its file at the event's first byte, until the batch is acknowledged. The safe
//! offset is the lowest pin, or where the reader would resume if nothing is pinned. It therefore never passes a byte that
//! is not acknowledged, in whatever order batches of several streams are, and never moves back.

use std::collections::BTreeMap;

/// Number of a batch, unique in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);

/// The offsets of one file generation, in bytes.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// First byte of each unacknowledged batch's events in this file.
    pins: BTreeMap<BatchId, u64>,
    resume: u64,
    safe: u64,
}

impl Ledger {
    /// A file whose bytes before `offset` are acknowledged.
    pub fn starting_at(offset: u64) -> Self {
        Self { pins: BTreeMap::new(), resume: offset, safe: offset }
    }

    /// An event that begins at `offset` went into the batch.
    pub fn pin(&mut self, batch: BatchId, offset: u64) {
        let first = self.pins.entry(batch).or_insert(offset);
        *first = (*first).min(offset);
    }

    /// The batch was acknowledged, or given up and counted.
    pub fn release(&mut self, batch: BatchId) {
        self.pins.remove(&batch);
        self.advance();
    }

    /// Everything before `offset` was put into batches or is of no interest; at most the start of an open partial line.
    pub fn resume_at(&mut self, offset: u64) {
        self.resume = offset;
        self.advance();
    }

    fn advance(&mut self) {
        let pinned = self.pins.values().copied().min().unwrap_or(u64::MAX);
        self.safe = self.safe.max(pinned.min(self.resume));
    }

    /// Everything before it is acknowledged.
    pub fn safe(&self) -> u64 {
        self.safe
    }

    /// Batches that hold events of this file.
    pub fn in_flight(&self) -> usize {
        self.pins.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Lines of ten bytes go to one of three streams; batches are closed and acknowledged in any order.
        #[test]
        fn safe_never_passes_an_unacknowledged_line(steps in proptest::collection::vec((0_u8..4, 0_u64..3, 0_usize..8), 1..200)) {
            let mut ledger = Ledger::default();
            let mut lines: BTreeMap<u64, BatchId> = BTreeMap::new();
            let mut open: [u64; 3] = [1, 2, 3];
            let mut next = 4;
            let mut closed: BTreeSet<u64> = BTreeSet::new();
            let mut offset = 0;
            let mut last_safe = 0;
            for (step, stream, pick) in steps {
                match step {
                    0 | 1 => {
                        let batch = BatchId(open[usize::try_from(stream).unwrap()]);
                        ledger.pin(batch, offset);
                        lines.insert(offset, batch);
                        offset += 10;
                        ledger.resume_at(offset);
                    }
                    2 => {
                        closed.insert(std::mem::replace(&mut open[usize::try_from(stream).unwrap()], next));
                        next += 1;
                    }
                    _ => {
                        if let Some(batch) = closed.iter().nth(pick).copied() {
                            closed.remove(&batch);
                            ledger.release(BatchId(batch));
                            lines.retain(|_, of| of.0 != batch);
                        }
                    }
                }
                let expected = lines.keys().next().copied().unwrap_or(offset);
                prop_assert_eq!(ledger.safe(), expected);
                prop_assert!(ledger.safe() >= last_safe);
                last_safe = ledger.safe();
            }
        }
    }

    #[test]
    fn an_open_partial_line_holds_the_offset() {
        let mut ledger = Ledger::starting_at(100);
        ledger.pin(BatchId(1), 140);
        ledger.resume_at(120);
        ledger.release(BatchId(1));
        assert_eq!(ledger.safe(), 120);
        ledger.resume_at(200);
        assert_eq!((ledger.safe(), ledger.in_flight()), (200, 0));
    }
}
