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

/// Gives pages that hold nothing but freed memory back to the kernel.
///
/// glibc does so by itself only at the end of a heap: what a metric tick or a burst of pods had asked for stayed, 7 MiB of an agent's 44
/// with 110 pods. Takes a millisecond or two of the calling thread, in which other threads may wait for a heap.
pub fn give_back_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` works on the allocator's own books under its own locks; it takes no pointers. Its answer says whether there
    // was something to give back.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A reader that goes away (`| head`) ends the process as it ends other programs, instead of a failed write in the middle of a table.
/// Not for a daemon, which must outlive its clients.
pub fn end_when_the_reader_goes() {
    // SAFETY: the default action runs no code of ours; nothing else in the process sets this signal's action after its start.
    let outcome = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    debug_assert!(outcome.is_ok(), "SIGPIPE may always have its default action");
}
