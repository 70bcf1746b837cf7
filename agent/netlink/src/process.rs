//! What a process asks of the C library for itself.

use nix::sys::signal::{SigHandler, Signal, signal};

/// Heaps of the allocator at most.
///
/// glibc makes one for each thread that meets another in `malloc`, up to eight a core, and keeps what was freed in each: an agent that
/// has nothing to do held 8 MiB more than with one. Two let a log storm's threads pass each other.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 2;

/// Bounds the allocator's heaps; to be called before there are threads.
pub fn bound_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` sets a number in the allocator under its own lock; it takes no pointers. What it refuses (0) changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// A reader that goes away (`| head`) ends the process as it ends other programs, instead of a failed write in the middle of a table.
/// Not for a daemon, which must outlive its clients.
pub fn end_when_the_reader_goes() {
    // SAFETY: the default action runs no code of ours; nothing else in the process sets this signal's action after its start.
    let outcome = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    debug_assert!(outcome.is_ok(), "SIGPIPE may always have its default action");
}
