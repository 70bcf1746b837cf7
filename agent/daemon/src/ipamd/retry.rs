//! When something that failed is tried again.

use std::time::Duration;

use tokio::time::Instant;

/// Not before an instant, which each failure puts off for longer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    not_before: Instant,
    pause: Duration,
}

impl Retry {
    /// At once.
    pub(super) fn new() -> Self {
        Self { not_before: Instant::now(), pause: Duration::ZERO }
    }

    /// Whether it may be tried.
    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.not_before
    }

    /// It failed: after the first pause, which doubles up to the longest. Returns when.
    pub(super) fn failed(&mut self, (first, longest): (Duration, Duration)) -> Instant {
        self.pause = (self.pause * 2).clamp(first, longest);
        self.not_before = Instant::now() + self.pause;
        self.not_before
    }
}
