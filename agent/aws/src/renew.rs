//! A client whose cached credentials or token can be thrown away.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use crate::failure::Failure;

/// An SDK client and how to make it again with an empty credential cache.
///
/// The SDK keeps credentials until they say that they expire. Ones that the service refuses before (a revoked session, a
/// role that was made anew) would be used until then; a new client asks for new ones at its first request.
pub(crate) struct Renewable<C> {
    current: Arc<RwLock<(u64, C)>>,
    make: Arc<dyn Fn() -> C + Send + Sync>,
}

impl<C: Clone> Renewable<C> {
    pub(crate) fn new(make: impl Fn() -> C + Send + Sync + 'static) -> Self {
        Self { current: Arc::new(RwLock::new((0, make()))), make: Arc::new(make) }
    }

    /// The client, and its number for [`Self::refused`].
    pub(crate) fn get(&self) -> (u64, C) {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A request of client `number` was not taken for its signature: the credentials are wrong, or the node's clock is. The SDK's client
    /// learns the service's time from the refusal and signs with it from then on, so that one is kept.
    pub(crate) fn refused(&self, number: u64, failure: &Failure) {
        if !failure.tells_another_time() {
            self.renew(number);
        }
    }

    /// Replaces client `number`; whoever comes second finds it done.
    pub(crate) fn renew(&self, number: u64) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.0 == number {
            *current = (number + 1, (self.make)());
        }
    }
}

impl<C> Clone for Renewable<C> {
    fn clone(&self) -> Self {
        Self { current: self.current.clone(), make: self.make.clone() }
    }
}

impl<C> fmt::Debug for Renewable<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renewable")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn many_that_find_the_same_client_refused_renew_it_once() {
        let made = Arc::new(AtomicU32::new(0));
        let counter = made.clone();
        let client = Renewable::new(move || counter.fetch_add(1, Ordering::SeqCst));
        let seen = client.get();
        client.renew(seen.0);
        client.clone().renew(seen.0);
        assert_eq!((made.load(Ordering::SeqCst), client.get()), (2, (1, 1)));
    }
}
