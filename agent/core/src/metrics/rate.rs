//! Rates over monotonic time.

use std::time::Duration;

/// Two readings closer than this give no rate: the quotient would be noise (the CloudWatch agent's bound).
const MIN_INTERVAL: Duration = Duration::from_micros(50);

/// The last reading of a counter that only grows until it is reset.
///
/// A missed tick makes one longer interval, not a spike: the rate is per elapsed second. A counter that went down was
/// reset (a container restarted, an interface was made again); how much it had counted before is unknown, so that interval has no rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    last: Option<(Duration, u64)>,
}

impl Rate {
    /// Takes a reading made at `at` on a monotonic clock; units per second since the reading before, unless there was none, the
    /// counter went down, or hardly any time passed.
    pub fn update(&mut self, at: Duration, value: u64) -> Option<f64> {
        let Some((last_at, last_value)) = self.last else {
            self.last = Some((at, value));
            return None;
        };
        let elapsed = at.checked_sub(last_at).filter(|elapsed| *elapsed >= MIN_INTERVAL);
        let Some(elapsed) = elapsed else {
            // Too soon: keep the older baseline, unless the counter was reset meanwhile.
            if value < last_value {
                self.last = Some((last_at.max(at), value));
            }
            return None;
        };
        self.last = Some((at, value));
        let grown = value.checked_sub(last_value)?;
        Some(grown as f64 / elapsed.as_secs_f64())
    }

    /// Rates of several counters that one file gave at the same time.
    pub fn update_all<const N: usize>(rates: &mut [Self; N], at: Duration, values: [u64; N]) -> Option<[f64; N]> {
        let mut out = [0.0; N];
        let mut complete = true;
        for ((rate, value), slot) in rates.iter_mut().zip(values).zip(&mut out) {
            match rate.update(at, value) {
                Some(per_second) => *slot = per_second,
                None => complete = false,
            }
        }
        complete.then_some(out)
    }
}

/// How much a count grew since the last tick; nothing at the first sight of it, nothing when it went down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    last: Option<u64>,
}

impl Delta {
    /// Takes a reading.
    pub fn update(&mut self, value: u64) -> u64 {
        self.last.replace(value).map_or(0, |last| value.saturating_sub(last))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the ticks (late, missed, early) and resets: what the rates say was counted never exceeds what the counter
        /// counted, and without resets or dense ticks it is exactly that.
        #[test]
        fn rates_times_time_is_what_was_counted(steps in prop::collection::vec((0u64..200_000_000, 0u64..1_000_000, prop::bool::weighted(0.1)), 1..60)) {
            let mut rate = Rate::default();
            let (mut at, mut value, mut counted, mut told) = (Duration::ZERO, 0u64, 0.0, 0.0);
            let (mut last_told, mut resets) = (None::<Duration>, 0);
            for (nanos, grown, reset) in steps {
                at += Duration::from_nanos(nanos);
                if reset && value > 0 {
                    resets += 1;
                    value = 0;
                } else {
                    value += grown;
                    if last_told.is_some() {
                        counted += grown as f64;
                    }
                }
                let got = rate.update(at, value);
                if let Some(per_second) = got {
                    prop_assert!(per_second.is_finite() && per_second >= 0.0);
                    told += per_second * (at - last_told.expect("a rate needs a first reading")).as_secs_f64();
                }
                if last_told.is_none() || got.is_some() || rate.last.is_some_and(|(t, _)| t == at) {
                    last_told = Some(at);
                }
            }
            prop_assert!(told <= counted * (1.0 + 1e-9) + 1e-6, "told {told} counted {counted}");
            if resets == 0 && rate.last.is_some_and(|(t, v)| t == at && v == value) {
                prop_assert!((told - counted).abs() <= counted * 1e-9 + 1e-6, "told {told} counted {counted}");
            }
        }

        /// A steady counter has its rate whatever the spacing of the ticks.
        #[test]
        fn missed_ticks_do_not_spike(gaps in prop::collection::vec(1u64..20, 2..30)) {
            let mut rate = Rate::default();
            let mut second = 0;
            for (index, gap) in gaps.iter().enumerate() {
                second += gap;
                let got = rate.update(Duration::from_secs(second), second * 1000);
                if index == 0 {
                    prop_assert_eq!(got, None);
                } else {
                    prop_assert!((got.expect("steady") - 1000.0).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn a_reset_has_no_rate_and_the_next_interval_has() {
        let mut rate = Rate::default();
        assert_eq!(rate.update(Duration::from_secs(1), 1_000_000), None);
        assert_eq!(rate.update(Duration::from_secs(2), 10), None);
        assert_eq!(rate.update(Duration::from_secs(3), 30), Some(20.0));
    }

    #[test]
    fn readings_too_close_keep_the_baseline() {
        let mut rate = Rate::default();
        rate.update(Duration::from_secs(1), 0);
        assert_eq!(rate.update(Duration::from_secs(1) + Duration::from_micros(10), 500), None);
        assert_eq!(rate.update(Duration::from_secs(2), 1000), Some(1000.0));
        assert_eq!(rate.update(Duration::from_millis(1500), 1200), None, "time going back gives nothing");
    }

    #[test]
    fn restarts_count_from_the_second_sight() {
        let mut delta = Delta::default();
        assert_eq!([7, 7, 9, 0, 1].map(|n| delta.update(n)), [0, 0, 2, 0, 1]);
    }
}
