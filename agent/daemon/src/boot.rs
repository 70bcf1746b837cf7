//! This boot of the node, as the kernel tells it.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use stanchion_core::boot::Boot;

/// The boot that runs, by a clock that says `time_of_day` now. `None` where the kernel does not tell: times in files are then read as
/// they were written.
pub fn this_boot(time_of_day: SystemTime) -> Option<Boot> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
    let up = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?);
    let since_1970 = time_of_day.duration_since(UNIX_EPOCH).unwrap_or_default();
    let began_ms = i64::try_from(since_1970.as_millis()).ok()?.checked_sub(i64::try_from(up.as_millis()).ok()?)?;
    Some(Boot { id, began_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_began_as_long_ago_as_the_node_is_up_whatever_the_clock_says() {
        let now = SystemTime::now();
        let [here, ahead] = [now, now + Duration::from_hours(2)].map(|now| this_boot(now).expect("the kernel tells"));
        assert_eq!(here.id, ahead.id);
        let set = ahead.reckon(&here, 0).expect("the same boot");
        assert!((7_199_000..=7_200_000).contains(&set), "{set}");
        let uptime = fs::read_to_string("/proc/uptime").expect("its uptime");
        let up: f64 = uptime.split(' ').next().and_then(|up| up.parse().ok()).expect("its form");
        let began = now.duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64() - up;
        assert!((began - here.began_ms as f64 / 1e3).abs() < 1.0, "{began} {here:?}");
    }
}
