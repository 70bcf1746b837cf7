//! The node's time of day: the cloud's, and so many minutes off.

use std::cell::Cell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stanchion_core::boot::Boot;
use tokio::time::Instant;

use crate::fake_aws::Cloud;

thread_local! {
    /// What it was, and when; a world on paused time has a thread of its own.
    static SET: Cell<Option<(SystemTime, Instant)>> = const { Cell::new(None) };
}

/// Puts this thread's clock so many minutes before or behind the cloud's. CloudWatch takes lines of up to two hours from now.
pub fn set(cloud: &Cloud, minutes: i64) {
    let millis = cloud.clock().unix_ms() + minutes * 60_000;
    let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    SET.set(Some((time, Instant::now())));
}

/// The time of day. It follows tokio's clock; on a thread where it was never set, it is the machine's.
pub fn now() -> SystemTime {
    SET.get().map_or_else(SystemTime::now, |(time, since)| time + since.elapsed())
}

/// The boot of a node that has been up since the first second of the cloud's clock.
pub fn boot(cloud: &Cloud) -> Boot {
    let since_1970 = now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now_ms = i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX);
    Boot { id: "the only one".to_owned(), began_ms: now_ms - cloud.clock().unix_ms() }
}
