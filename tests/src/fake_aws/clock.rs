//! The time that the fake lives in: tokio's clock (which a test may pause) or one that only moves when told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// Where `now` comes from. Clones share it.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
    /// Unix time of `now() == 0`.
    epoch_unix_ms: i64,
}

#[derive(Clone, Debug)]
enum Source {
    /// tokio's clock: real time, or virtual under `start_paused`.
    Tokio(Instant),
    /// Nanoseconds since the start, moved by [`Clock::advance`].
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// tokio's clock, beginning at the machine's time of day.
    pub fn tokio() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::tokio_from(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
    }

    /// tokio's clock, beginning at a given time of day: the same run gives the same timestamps.
    pub fn tokio_from(unix_ms: i64) -> Self {
        Self { source: Source::Tokio(Instant::now()), epoch_unix_ms: unix_ms }
    }

    /// A clock that only moves when told.
    pub fn manual(unix_ms: i64) -> Self {
        Self { source: Source::Manual(Arc::default()), epoch_unix_ms: unix_ms }
    }

    /// Moves a manual clock.
    ///
    /// # Panics
    /// On tokio's clock, which `tokio::time::advance` moves.
    pub fn advance(&self, by: Duration) {
        match &self.source {
            Source::Manual(nanos) => {
                nanos.fetch_add(u64::try_from(by.as_nanos()).expect("less than 500 years"), Ordering::SeqCst);
            }
            Source::Tokio(_) => panic!("tokio's clock is moved by tokio::time::advance"),
        }
    }

    /// Time since the clock was made.
    pub fn now(&self) -> Duration {
        match &self.source {
            Source::Tokio(start) => start.elapsed(),
            Source::Manual(nanos) => Duration::from_nanos(nanos.load(Ordering::SeqCst)),
        }
    }

    /// Milliseconds since 1970.
    pub fn unix_ms(&self) -> i64 {
        self.epoch_unix_ms.saturating_add(i64::try_from(self.now().as_millis()).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = Clock::manual(1_000);
        assert_eq!((clock.now(), clock.unix_ms()), (Duration::ZERO, 1_000));
        clock.clone().advance(Duration::from_millis(1_500));
        assert_eq!((clock.now(), clock.unix_ms()), (Duration::from_millis(1_500), 2_500));
    }

    #[tokio::test(start_paused = true)]
    async fn the_tokio_clock_follows_paused_time() {
        let clock = Clock::tokio_from(5_000);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(clock.unix_ms(), 3_605_000);
    }
}
