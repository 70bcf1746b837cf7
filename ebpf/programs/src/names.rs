//! Copies of DNS answers for the agent, which learns from them what names mean.

use core::ptr::addr_of_mut;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use stanchion_ebpf_abi::{DNS_BYTES, DnsMessage, stat};

use crate::{
    maps::{NAMES, count_stat},
    packet::{ETHERNET, UDP},
};

/// Shortest message: its header.
const LEAST: u32 = 12;

/// Copies the UDP payload of a packet without extension headers; the agent is woken.
#[inline(always)]
pub fn copy(skb: *mut __sk_buff, slot: u16, family: u8) {
    const WAKE_UP: u64 = 2;
    let Some(offset) = payload(skb, family) else { return };
    // SAFETY: a field of the context.
    let length = unsafe { (*skb).len }.wrapping_sub(offset).min(DNS_BYTES as u32) & 0x7ff;
    if length < LEAST {
        return;
    }
    let Some(mut entry) = NAMES.reserve::<DnsMessage>(0) else {
        count_stat(stat::NAMES_LOST);
        return;
    };
    // SAFETY: the record is ours until it is submitted; the helper writes `length` bytes, at most the payload's size.
    let copied = unsafe {
        let message = entry.as_mut_ptr();
        (*message).slot = slot;
        (*message).length = length as u16;
        bpf_skb_load_bytes(skb.cast(), offset, addr_of_mut!((*message).payload).cast(), length)
    };
    if copied == 0 {
        entry.submit(WAKE_UP);
    } else {
        entry.discard(0);
    }
}

/// Where the payload begins.
#[inline(always)]
fn payload(skb: *mut __sk_buff, family: u8) -> Option<u32> {
    let mut byte = [0u8; 1];
    let mut load = |offset: usize| {
        // SAFETY: one byte into a byte.
        let result = unsafe { bpf_skb_load_bytes(skb.cast(), offset as u32, byte.as_mut_ptr().cast(), 1) };
        (result == 0).then_some(byte[0])
    };
    if family == 4 {
        return Some((ETHERNET + usize::from(load(ETHERNET)? & 15) * 4 + 8) as u32);
    }
    (load(ETHERNET + 6)? == UDP).then_some((ETHERNET + 40 + 8) as u32)
}
