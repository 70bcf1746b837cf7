//! Who watches while things break.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::netns::Netns;
use crate::probe::{Protocol, probe};

/// How long one attempt waits: a connection that the policy lets through is there in a millisecond.
const ATTEMPT: Duration = Duration::from_millis(100);

/// Tries again and again to connect where a policy forbids it.
#[derive(Debug)]
pub(super) struct Intruder {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    attempts: AtomicU64,
    got_through: AtomicU64,
}

/// What an [`Intruder`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intrusions {
    pub(super) attempts: u64,
    pub(super) got_through: u64,
}

impl Intruder {
    pub(super) fn start(netns: &Netns, to: SocketAddr) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (theirs, netns) = (Arc::clone(&shared), netns.clone());
        let thread = std::thread::Builder::new().name("intruder".to_owned()).spawn(move || {
            while !theirs.stop.load(Ordering::Relaxed) {
                let reached = probe(&netns, Protocol::Tcp, to, ATTEMPT).is_ok_and(|answer| answer.reached());
                theirs.attempts.fetch_add(1, Ordering::Relaxed);
                theirs.got_through.fetch_add(u64::from(reached), Ordering::Relaxed);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Attempts that succeeded so far.
    pub(super) fn got_through(&self) -> u64 {
        self.shared.got_through.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub(super) fn stop(&mut self) -> Intrusions {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(Err(panic)) = self.thread.take().map(std::thread::JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
        Intrusions { attempts: self.shared.attempts.load(Ordering::Relaxed), got_through: self.got_through() }
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
