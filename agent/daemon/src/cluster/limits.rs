//! How much this node asks of the API server at most, whatever goes wrong between them: a bucket for all requests, and
//! growing pauses for a watch that is cut as soon as it stands. kube's watcher begins the next watch at once when one ends
//! well, so a proxy that ends each of them would be asked as fast as it answers, by every node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::follow::spread;

/// Requests that may leave at once. Reading a cluster of 10,000 pods takes about 60, a full node of pods that are annotated
/// one each.
const BURST: u32 = 200;
/// Time that earns one more request.
const EARNED: Duration = Duration::from_millis(50);
/// A watch that began this long ago was not cut short: servers and load balancers end them after minutes.
const STOOD: Duration = Duration::from_secs(10);
/// Pause before a watch whose predecessor was cut short: doubled from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Pauses from here on are told.
const TOLD: Duration = Duration::from_secs(4);

/// The limits of one client. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits(Arc<Mutex<State>>);

impl Limits {
    /// Waits until this request may leave.
    pub(super) async fn admit(&self, uri: &axum::http::Uri) {
        let watch = is_watch(uri);
        let now = Instant::now();
        let wait = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let bucket = state.take(now);
            bucket.max(if watch { state.begin(uri.path(), now) } else { Duration::ZERO })
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// This request was refused, or failed: who asks pauses then, and a watch that never stood was not cut.
    pub(super) fn refused(&self, uri: &axum::http::Uri) {
        if is_watch(uri) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).watches.remove(uri.path());
        }
    }
}

/// Whether a request asks for a watch.
pub(super) fn is_watch(uri: &axum::http::Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"))
}

#[derive(Debug, Default)]
struct State {
    /// When the bucket is full again.
    full: Option<Instant>,
    /// The last beginning of each watch and the pause before it, by path.
    watches: HashMap<String, (Instant, Duration)>,
}

impl State {
    /// Takes one request out of the bucket; how long it must wait for it.
    fn take(&mut self, now: Instant) -> Duration {
        let full = self.full.map_or(now, |full| full.max(now)) + EARNED;
        self.full = Some(full);
        full.saturating_duration_since(now).saturating_sub(EARNED * BURST)
    }

    /// Notes the beginning of a watch; how long it must wait.
    fn begin(&mut self, path: &str, now: Instant) -> Duration {
        let pause = match self.watches.get(path) {
            Some((began, pause)) if now.saturating_duration_since(*began) < STOOD => (*pause * 2).clamp(PAUSE.0, PAUSE.1),
            _ => Duration::ZERO,
        };
        let told_before = self.watches.get(path).is_some_and(|(_, before)| *before >= TOLD);
        if pause >= TOLD && !told_before {
            warn!(path, "each watch is cut as soon as it stands, by the API server or by what is between: asked with pauses");
        }
        let wait = spread(pause);
        self.watches.insert(path.to_owned(), (now + wait, pause));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_leaves_at_once_and_what_follows_at_the_rate() {
        let (mut state, now) = (State::default(), Instant::now());
        assert!((0..BURST).all(|_| state.take(now).is_zero()));
        assert_eq!((state.take(now), state.take(now)), (EARNED, EARNED * 2));
        assert!(state.take(now + EARNED * BURST * 2).is_zero(), "rest earns it back");
    }

    #[test]
    fn a_watch_that_is_cut_is_begun_ever_more_slowly_and_one_that_stood_at_once() {
        let (mut state, mut now) = (State::default(), Instant::now());
        let mut waited = Duration::ZERO;
        for start in 0..20 {
            let wait = state.begin("/api/v1/pods", now);
            assert!(start > 0 || wait.is_zero(), "the first begins at once");
            assert!(wait <= PAUSE.1 * 3 / 2);
            waited += wait;
            now += wait;
        }
        assert!(waited > Duration::from_secs(180), "{waited:?}");
        assert!(state.begin("/api/v1/nodes", now).is_zero(), "each watch by itself");
        assert!(state.begin("/api/v1/pods", now + STOOD).is_zero());
    }

    #[test]
    fn a_watch_that_was_refused_was_not_cut() {
        let (limits, now) = (Limits::default(), Instant::now());
        let uri = "/api/v1/pods?watch=true".parse().unwrap();
        for _ in 0..20 {
            assert!(limits.0.lock().unwrap().begin("/api/v1/pods", now).is_zero());
            limits.refused(&uri);
        }
    }
}
