//! The wall clock of core, driven by tokio's: monotonic while the process lives, and still when a test pauses time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stanchion_core::ipam::Time;
use tokio::time::Instant;

/// Converts between tokio's instants and core's [`Time`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    wall: Time,
    start: Instant,
}

impl Clock {
    pub(super) fn new(time_of_day: SystemTime) -> Self {
        let wall = time_of_day.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self { wall: Time(0) + wall, start: Instant::now() }
    }

    pub(super) fn now(&self) -> Time {
        self.wall + self.start.elapsed()
    }

    pub(super) fn instant(&self, at: Time) -> Instant {
        self.start + at.since(self.wall)
    }
}
