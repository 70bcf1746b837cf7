//! The node's time of day: the cloud's, and so many minutes off.

use std::cell::Cell;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::fake_aws::Cloud;

thread_local! {
    /// What it was, and when; a world on paused time has a thread of its own.
    static SET: Cell<Option<(SystemTime, Instant)>> = const { Cell::new(None) };
}

/// Puts this thread's clock so many minutes before or behind the cloud's. CloudWatch takes lines of up to two hours from now.
pub fn set(cloud: &Cloud, minutes: i64) {
    let millis = cloud.clock().unix_ms() + minutes * 60_000;
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    SET.set(Some((time, Instant::now())));
}

/// The time of day. It follows tokio's clock; on a thread where it was never set, it is the machine's.
pub fn now() -> SystemTime {
    SET.get().map_or_else(SystemTime::now, |(time, since)| time + since.elapsed())
}
