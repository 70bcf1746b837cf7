//! IPv4 and IPv6: the same judgement over different address widths.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{
    bindings::__sk_buff,
    maps::{HashMap, lpm_trie::Key},
};
use stanchion_ebpf_abi::{AddressValue, FlowEntry, FlowKey4, FlowKey6, Interface};

use crate::{
    judge::Cached,
    maps::{ADDRESSES4, ADDRESSES6, CACHE4, CACHE6, CIDRS4, CIDRS6, FLOWS4, FLOWS6, PACKET4, PACKET6, cached},
    packet::{Packet, Plain, ipv4_plain, ipv6_plain},
};

/// What differs between the families.
pub trait Family: 'static {
    type Address: Copy + PartialEq;
    type Key: Copy + 'static;
    const NUMBER: u8;
    const ICMP: u8;

    fn entry(key: &Self::Key) -> Option<*mut FlowEntry>;
    fn insert(key: &Self::Key, entry: &FlowEntry, flags: u64) -> Result<(), i32>;
    fn addresses() -> &'static HashMap<Self::Address, AddressValue>;
    fn cidr(address: Self::Address) -> Option<u32>;
    /// The place of this CPU's cache for an address.
    fn cached(address: Self::Address) -> Option<*mut Cached<Self::Address>>;
    fn own(interface: &Interface) -> Self::Address;
    fn words(address: Self::Address) -> [u32; 4];
    /// The common packet: no options, no extension headers, not a fragment, TCP or UDP.
    fn plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<Self::Address>>;
    /// Puts a packet of any shape in hand: 0, or a reason to refuse it.
    fn read(skb: *mut __sk_buff, direction: u32, slot: u32) -> i32;
    /// The packet in hand.
    fn in_hand() -> Option<*mut Packet<Self::Address>>;
    /// [`crate::judge::open`] and [`crate::judge::remember`] of the packet in hand, as calls.
    fn open(head: u32, revision: u32, direction: u32, over: u32) -> i32;
    fn remember(role: u32) -> i32;
    /// [`crate::judge::judge`], as a call.
    fn judge(opener: u32, set: u32, peer: Self::Address) -> i32;
    fn head(interface: &Interface) -> u32;
    /// From the first eight bytes and the peer.
    fn key(start: u64, remote: Self::Address) -> Self::Key;
}

/// A flow as a packet names it; see [`stanchion_ebpf_abi::FlowKey4`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Flow<A> {
    pub remote: A,
    pub local_port: [u8; 2],
    pub remote_port: [u8; 2],
    pub protocol: u8,
}

/// A [`stanchion_ebpf_abi::FlowKey4`] in two words: the kernel hashes and compares keys in words, and a word that was
/// written in pieces a moment before makes the processor wait.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Key4 {
    start: u64,
    remote: u32,
    _unused: u32,
}

impl Key4 {
    #[inline(always)]
    fn as_abi(&self) -> &FlowKey4 {
        // SAFETY: the first bytes are those of that struct, whose alignment is less.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }
}

impl Key6 {
    #[inline(always)]
    fn as_abi(&self) -> &FlowKey6 {
        // SAFETY: as above.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }
}

/// The same for IPv6, without a rest.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Key6 {
    start: u64,
    remote: Address6,
}

pub struct V4;
pub struct V6;

/// An IPv6 address in two words as they lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Address6(pub u64, pub u64);

impl Address6 {
    /// The address at `OFFSET` and `NEXT` (eight bytes later) from a pointer. In assembly, because the compiler reads what is not
    /// aligned to eight bytes in pieces; the kernel's processors need not.
    ///
    /// # Safety
    /// The sixteen bytes are there.
    #[inline(always)]
    pub unsafe fn at<const OFFSET: i16, const NEXT: i16>(base: *const u8) -> Self {
        let (first, second): (u64, u64);
        // SAFETY: by the contract.
        unsafe {
            asm!("{out} = *(u64 *)({base} + {offset})", out = lateout(reg) first, base = in(reg) base, offset = const OFFSET, options(pure, readonly, nostack));
            asm!("{out} = *(u64 *)({base} + {offset})", out = lateout(reg) second, base = in(reg) base, offset = const NEXT, options(pure, readonly, nostack));
        }
        Self(first, second)
    }

    #[inline(always)]
    pub fn of([a, b, c, d]: [u32; 4]) -> Self {
        let word = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        Self(word(a, b), word(c, d))
    }
}

impl Family for V4 {
    type Address = u32;
    type Key = Key4;
    const NUMBER: u8 = 4;
    const ICMP: u8 = 1;

    #[inline(always)]
    fn plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<u32>> {
        ipv4_plain(skb, direction)
    }

    #[inline(always)]
    fn read(skb: *mut __sk_buff, direction: u32, slot: u32) -> i32 {
        crate::read4(skb, direction, slot)
    }

    #[inline(always)]
    fn in_hand() -> Option<*mut Packet<u32>> {
        PACKET4.get_ptr_mut(0)
    }

    #[inline(always)]
    fn open(head: u32, revision: u32, direction: u32, over: u32) -> i32 {
        crate::open4(head, revision, direction, over)
    }

    #[inline(always)]
    fn remember(role: u32) -> i32 {
        crate::remember4(role)
    }

    #[inline(always)]
    fn judge(opener: u32, set: u32, peer: u32) -> i32 {
        crate::judge4(opener, set, peer)
    }

    #[inline(always)]
    fn entry(key: &Key4) -> Option<*mut FlowEntry> {
        FLOWS4.get_ptr_mut(key.as_abi())
    }

    #[inline(always)]
    fn insert(key: &Key4, entry: &FlowEntry, flags: u64) -> Result<(), i32> {
        FLOWS4.insert(key.as_abi(), entry, flags)
    }

    #[inline(always)]
    fn addresses() -> &'static HashMap<u32, AddressValue> {
        &ADDRESSES4
    }

    #[inline(always)]
    fn cidr(address: u32) -> Option<u32> {
        CIDRS4.get(Key::new(32, address)).copied()
    }

    #[inline(always)]
    fn cached(address: u32) -> Option<*mut Cached<u32>> {
        cached(&CACHE4, address.wrapping_mul(SPREAD) >> 16)
    }

    #[inline(always)]
    fn own(interface: &Interface) -> u32 {
        interface.ipv4
    }

    #[inline(always)]
    fn words(address: u32) -> [u32; 4] {
        [address, 0, 0, 0]
    }

    #[inline(always)]
    fn head(interface: &Interface) -> u32 {
        interface.head4
    }

    #[inline(always)]
    fn key(start: u64, remote: u32) -> Key4 {
        Key4 { start, remote, _unused: 0 }
    }
}

impl Family for V6 {
    type Address = Address6;
    type Key = Key6;
    const NUMBER: u8 = 6;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<Address6>> {
        ipv6_plain(skb, direction)
    }

    #[inline(always)]
    fn read(skb: *mut __sk_buff, direction: u32, slot: u32) -> i32 {
        crate::read6(skb, direction, slot)
    }

    #[inline(always)]
    fn in_hand() -> Option<*mut Packet<Address6>> {
        PACKET6.get_ptr_mut(0)
    }

    #[inline(always)]
    fn open(head: u32, revision: u32, direction: u32, over: u32) -> i32 {
        crate::open6(head, revision, direction, over)
    }

    #[inline(always)]
    fn remember(role: u32) -> i32 {
        crate::remember6(role)
    }

    #[inline(always)]
    fn judge(opener: u32, set: u32, Address6(first, second): Address6) -> i32 {
        crate::judge6(opener, set, first, second)
    }

    #[inline(always)]
    fn entry(key: &Key6) -> Option<*mut FlowEntry> {
        FLOWS6.get_ptr_mut(key.as_abi())
    }

    #[inline(always)]
    fn insert(key: &Key6, entry: &FlowEntry, flags: u64) -> Result<(), i32> {
        FLOWS6.insert(key.as_abi(), entry, flags)
    }

    #[inline(always)]
    fn addresses() -> &'static HashMap<Address6, AddressValue> {
        &ADDRESSES6
    }

    #[inline(always)]
    fn cidr(address: Address6) -> Option<u32> {
        CIDRS6.get(Key::new(128, address)).copied()
    }

    #[inline(always)]
    fn cached(address: Address6) -> Option<*mut Cached<Address6>> {
        let folded = address.0 ^ address.1.rotate_left(21);
        cached(&CACHE6, ((folded ^ folded >> 32) as u32).wrapping_mul(SPREAD) >> 16)
    }

    #[inline(always)]
    fn own(interface: &Interface) -> Address6 {
        const AT: i16 = offset_of!(Interface, ipv6) as i16;
        // SAFETY: within the struct.
        unsafe { Address6::at::<AT, { AT + 8 }>(core::ptr::from_ref(interface).cast()) }
    }

    #[inline(always)]
    fn words(Address6(first, second): Address6) -> [u32; 4] {
        [first as u32, (first >> 32) as u32, second as u32, (second >> 32) as u32]
    }

    #[inline(always)]
    fn head(interface: &Interface) -> u32 {
        interface.head6
    }

    #[inline(always)]
    fn key(start: u64, remote: Address6) -> Key6 {
        Key6 { start, remote }
    }
}

/// Spreads neighbouring addresses: 2^32 by the golden ratio.
pub const SPREAD: u32 = 0x9e37_79b1;

/// The first eight bytes of a flow key.
#[inline(always)]
pub fn key_start(head: u32, protocol: u8, local_port: [u8; 2], remote_port: [u8; 2]) -> u64 {
    let ports = u64::from(u16::from_ne_bytes(local_port)) | u64::from(u16::from_ne_bytes(remote_port)) << 16;
    u64::from(head | u32::from(protocol) << 16) | ports << 32
}
