//! Memory for a process that lives for a millisecond.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of the arena. What is never touched costs nothing: these are pages of zeroes that the kernel has not made yet.
const SIZE: usize = 1 << 20;

#[repr(C, align(16))]
struct Bytes(UnsafeCell<[MaybeUninit<u8>; SIZE]>);

/// A global allocator that hands out one block after the other from an array of the program, and asks the C library only when that is full.
///
/// musl's allocator maps and unmaps a page for every second size that is asked for, which took a tenth of an ADD. A block that is freed
/// before the next one was taken is used again; any other one is not.
pub struct Arena {
    bytes: Bytes,
    /// Offset of the first byte that nobody has; at most [`SIZE`].
    used: AtomicUsize,
}

// SAFETY: the bytes are reached only through blocks of `alloc`, and no two threads are given the same block: `used` moves by one atomic
// operation from a block's start to its end.
unsafe impl Sync for Arena {}

impl Arena {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "made once, as a constant, where a trait's method cannot be called")]
    pub const fn new() -> Self {
        Self { bytes: Bytes(UnsafeCell::new([MaybeUninit::uninit(); SIZE])), used: AtomicUsize::new(0) }
    }

    /// The offset of a block of this arena.
    fn offset(&self, block: *mut u8) -> Option<usize> {
        block.addr().checked_sub(self.bytes.0.get().addr()).filter(|offset| *offset < SIZE)
    }
}

// SAFETY: a block lies between two values of `used` that one compare-and-exchange replaced, so it overlaps no other one that is
// alive: `used` goes back only to the start of the last block, in `dealloc` of that block. It is aligned, as the array is aligned to
// 16 and greater alignments are left to the C library's allocator, which also gets back exactly the blocks that it gave.
unsafe impl GlobalAlloc for Arena {
    // SAFETY: the caller's layout is not empty.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut used = self.used.load(Ordering::Relaxed);
        while layout.align() <= align_of::<Bytes>() {
            let start = used.next_multiple_of(layout.align());
            let Some(end) = start.checked_add(layout.size()).filter(|end| *end <= SIZE) else { break };
            match self.used.compare_exchange_weak(used, end, Ordering::Acquire, Ordering::Relaxed) {
                // SAFETY: `start` is at most `SIZE`, so the pointer is one of the array or one past it.
                Ok(_) => return unsafe { self.bytes.0.get().cast::<u8>().add(start) },
                Err(now) => used = now,
            }
        }
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller gives back a block of `alloc` that nobody uses any more, with its layout.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match self.offset(block) {
            // Of the last block; else nothing changes.
            Some(start) => _ = self.used.compare_exchange(start + layout.size(), start, Ordering::Release, Ordering::Relaxed),
            // SAFETY: a block that is not of the array was given by `System` for this layout.
            None => unsafe { System.dealloc(block, layout) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).expect("a layout")
    }

    #[test]
    fn blocks_are_aligned_and_overlap_no_other() {
        static ARENA: Arena = Arena::new();
        let arena = &ARENA;
        let mut end = 0;
        for (size, align) in [(1, 1), (8, 8), (3, 1), (32, 16), (5, 2), (16, 4)] {
            // SAFETY: the layout is not empty.
            let block = unsafe { arena.alloc(layout(size, align)) };
            assert!(block.addr().is_multiple_of(align) && arena.offset(block).is_some_and(|offset| offset >= end), "{size} {align}");
            // SAFETY: the block has `size` bytes that are nobody else's.
            unsafe { block.write_bytes(0xa5, size) };
            end = arena.offset(block).expect("of the arena") + size;
        }
    }

    #[test]
    fn only_the_last_block_is_used_again() {
        static ARENA: Arena = Arena::new();
        let arena = &ARENA;
        let one = layout(64, 8);
        // SAFETY: the layout is not empty; each block is freed once, with the layout that it was asked for with.
        unsafe {
            let (first, second) = (arena.alloc(one), arena.alloc(one));
            arena.dealloc(second, one);
            assert_eq!(arena.alloc(one), second);
            arena.dealloc(first, one);
            assert!(![first, second].contains(&arena.alloc(one)));
        }
    }

    #[test]
    fn what_does_not_fit_is_the_c_librarys() {
        static ARENA: Arena = Arena::new();
        let arena = &ARENA;
        let (most, page) = (layout(SIZE - 8, 1), layout(64, 4096));
        // SAFETY: the layouts are not empty; each block is freed once, with the layout that it was asked for with.
        unsafe {
            let (whole, aligned) = (arena.alloc(most), arena.alloc(page));
            let beyond = arena.alloc(layout(16, 1));
            assert_eq!([whole, aligned, beyond].map(|block| arena.offset(block).is_some()), [true, false, false]);
            assert!(aligned.addr().is_multiple_of(4096));
            aligned.write_bytes(1, 64);
            beyond.write_bytes(1, 16);
            assert!(arena.offset(arena.alloc(layout(8, 1))).is_some(), "what is left is given out");
            arena.dealloc(aligned, page);
            arena.dealloc(beyond, layout(16, 1));
        }
    }

    #[test]
    fn threads_are_given_different_blocks() {
        static ARENA: Arena = Arena::new();
        let arena = &ARENA;
        let blocks = std::thread::scope(|scope| {
            let many = || {
                // SAFETY: the layout is not empty.
                (0..1000).map(|_| unsafe { arena.alloc(layout(24, 8)) }.addr()).collect::<Vec<_>>()
            };
            let (a, b) = (scope.spawn(many), scope.spawn(many));
            let mut all = a.join().expect("ended");
            all.extend(b.join().expect("ended"));
            all
        });
        let different: std::collections::BTreeSet<_> = blocks.iter().map(|block| block / 24).collect();
        assert_eq!((different.len(), blocks.len()), (2000, 2000));
    }
}
