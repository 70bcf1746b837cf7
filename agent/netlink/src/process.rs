//! What a process asks of the C library for itself.

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
