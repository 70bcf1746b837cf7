//! A boot of the node: what a time of day in a file is reckoned by, though somebody sets the clock before the next process reads it.

use serde::{Deserialize, Serialize};

/// Stands in a file beside times of day. Who reads them in the same boot knows by it how far the clock was set since they were written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel's random name of it: `/proc/sys/kernel/random/boot_id`, random(4).
    pub id: String,
    /// When it began: milliseconds since 1970 by the clock of who wrote this, at the time of writing.
    pub began_ms: i64,
}

impl Boot {
    /// A time of day that was `written_ms` by the clock of `written`, by the clock of this; milliseconds since 1970. `None` where nobody
    /// can tell: the node was started anew since.
    pub fn reckon(&self, written: &Self, written_ms: u64) -> Option<u64> {
        let ahead = self.began_ms.saturating_sub(written.began_ms);
        (self.id == written.id).then(|| written_ms.saturating_add_signed(ahead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(id: &str, began_ms: i64) -> Boot {
        Boot { id: id.to_owned(), began_ms }
    }

    #[test]
    fn a_time_is_reckoned_by_what_the_clock_was_set_since() {
        for (began, told) in [(5_000, Some(9_000)), (8_605_000, Some(8_609_000)), (-3_000, Some(1_000)), (-8_605_000, Some(0))] {
            assert_eq!(boot("a", began).reckon(&boot("a", 5_000), 9_000), told, "the boot began at {began}");
        }
        assert_eq!(boot("b", 5_000).reckon(&boot("a", 5_000), 9_000), None);
        assert_eq!(boot("a", i64::MAX).reckon(&boot("a", i64::MIN), 9_000), Some(9_000 + i64::MAX as u64));
    }
}
