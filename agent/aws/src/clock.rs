//! The services' time, where the node's clock is wrong: a request signed more than five minutes off is refused.
//!
//! Each refusal carries the service's time in its `Date` header. The difference to it is kept and added from then on, so that a node
//! whose clock is off by minutes or days still ships its logs and gets its addresses.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use aws_smithy_async::time::TimeSource;

/// Below it a difference is that of a slow answer, not of a clock. The services take five minutes
/// (<https://docs.aws.amazon.com/general/latest/gr/signing-elements.html>).
const TOLERATED: Duration = Duration::from_secs(240);

/// The node's clock, corrected by what the services said. Clones share the correction.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerClock {
    /// Seconds to add to the node's clock.
    ahead: Arc<AtomicI64>,
}

impl ServerClock {
    /// Takes the time of a refusal; true if the clock was wrong and is corrected now.
    pub(crate) fn learn(&self, date: SystemTime) -> bool {
        if difference(self.now(), date).unsigned_abs() < TOLERATED.as_secs() {
            return false;
        }
        let ahead = difference(SystemTime::now(), date);
        self.ahead.store(ahead, Ordering::Relaxed);
        tracing::warn!(seconds = ahead, "the node's clock differs from AWS's: requests are signed with AWS's time; set the clock (chrony)");
        true
    }
}

impl TimeSource for ServerClock {
    fn now(&self) -> SystemTime {
        let ahead = self.ahead.load(Ordering::Relaxed);
        let by = Duration::from_secs(ahead.unsigned_abs());
        let now = SystemTime::now();
        let corrected = if ahead < 0 { now.checked_sub(by) } else { now.checked_add(by) };
        corrected.unwrap_or(now)
    }
}

/// Seconds from one to the other.
fn difference(from: SystemTime, to: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    to.duration_since(from).map_or_else(|earlier| -seconds(earlier.duration()), seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_of_minutes_is_learned_and_a_small_one_is_not() {
        let clock = ServerClock::default();
        let off = |clock: &ServerClock| difference(SystemTime::now(), clock.now());
        assert!(!clock.learn(SystemTime::now() + Duration::from_secs(200)));
        assert_eq!(off(&clock), 0);
        assert!(clock.learn(SystemTime::now() - Duration::from_secs(86_400)));
        assert!((-86_402..=-86_399).contains(&off(&clock)), "{}", off(&clock));
        assert!(!clock.clone().learn(clock.now()), "it is right now");
        assert!(clock.learn(SystemTime::now()), "and again when the node's clock was set");
        assert!(off(&clock).abs() <= 1);
    }
}
