//! Ring buffers that the programs write and the agent waits for.

use std::os::fd::OwnedFd;

use aya::maps::{MapData as AyaMap, RingBuf};
use tokio::io::unix::AsyncFd;

use super::object::{LoadError, Loaded};

/// A ring's reader.
pub(super) struct Ring {
    readable: AsyncFd<OwnedFd>,
    ring: RingBuf<AyaMap>,
    /// All was taken: the kernel tells of the next record.
    drained: bool,
}

impl Ring {
    /// Must be called in the runtime that will wait.
    pub(super) fn new(loaded: &mut Loaded, name: &'static str) -> Result<Self, LoadError> {
        // SAFETY: an `OwnedFd` gives the same open descriptor for as long as it lives.
        let readable = unsafe { AsyncFd::register(loaded.map_fd(name)?) };
        let readable = readable.map_err(|error| LoadError::Poll(error.into()))?;
        // What an earlier agent left unread is not told of again.
        Ok(Self { readable, ring: loaded.map(name)?, drained: false })
    }

    /// Returns when there is something to take.
    pub(super) async fn wait(&self) {
        if !self.drained {
            return;
        }
        match self.readable.readable().await {
            // Edge-triggered: whoever is woken takes everything, or comes back for the rest.
            Ok(mut guard) => guard.clear_ready(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Hands over what is there, up to `most` records. True if that was all.
    pub(super) fn take(&mut self, most: usize, mut each: impl FnMut(&[u8])) -> bool {
        self.drained = false;
        for _ in 0..most {
            let Some(record) = self.ring.next() else {
                self.drained = true;
                break;
            };
            each(&record);
        }
        self.drained
    }
}
