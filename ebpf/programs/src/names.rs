//! Copies of frames for the agent: DNS answers, from which it learns what names mean, and what pods sent before it had.

use core::ptr::{self, addr_of_mut};

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use stanchion_ebpf_abi::{FRAME_BYTES, FRAME_HEAD, frame_kind, stat};

use crate::maps::{FRAME, NAMES, NAMES_BYTES, count_stat};

/// Shortest frame worth a copy: headers of Ethernet and IPv4, and the last byte of an answer in fragments.
const LEAST: u32 = 35;

/// `BPF_RB_AVAIL_DATA`.
const UNREAD: u64 = 0;

/// Copies a frame; the agent is woken. One that was dropped is copied only while the agent has not read all answers, as only
/// then it can have come too early; and half of the room is the answers'.
#[inline(always)]
pub fn copy(skb: *mut __sk_buff, slot: u16, kind: u8) {
    const WAKE_UP: u64 = 2;
    if kind == frame_kind::EARLY {
        let unread = NAMES.query(UNREAD);
        if unread == 0 || unread > u64::from(NAMES_BYTES / 2) {
            return;
        }
    }
    let Some(place) = FRAME.get_ptr_mut(0) else { return };
    // SAFETY: a field of the context.
    let length = unsafe { (*skb).len }.min(FRAME_BYTES as u32) & FRAME_BYTES as u32;
    if length < LEAST {
        return;
    }
    // SAFETY: this CPU's own place, in which the helper writes `length` bytes, at most as many as there are.
    let record = unsafe {
        (*place).slot = slot;
        (*place).length = length as u16;
        (*place).kind = kind;
        (*place).reserved = [0; 3];
        if bpf_skb_load_bytes(skb.cast(), 0, addr_of_mut!((*place).frame).cast(), length) != 0 {
            return;
        }
        &*ptr::slice_from_raw_parts(place.cast::<u8>(), FRAME_HEAD + length as usize)
    };
    if NAMES.output::<[u8]>(record, WAKE_UP).is_err() {
        count_stat(stat::NAMES_LOST);
    }
}
