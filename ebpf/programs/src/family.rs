//! IPv4 and IPv6. The common packet's way differs in address width and is written for each; everything else works on wide
//! addresses and asks for the family where tables or constants differ.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{bindings::__sk_buff, maps::lpm_trie::Key};
use stanchion_ebpf_abi::{AddressKey, AddressValue, FlowEntry, FlowKey4, FlowKey6, Interface};

use crate::{
    maps::{ADDRESSES, CIDRS4, CIDRS6, FLOWS4, FLOWS6},
    packet::{Plain, ipv4_plain, ipv6_plain},
};

/// What differs between the families on the common packet's way.
pub trait Family: 'static {
    type Address: Copy + PartialEq;
    type Key: Copy + 'static;
    const NUMBER: u8;
    const ICMP: u8;

    fn entry(key: &Self::Key) -> Option<*mut FlowEntry>;
    fn own(interface: &Interface) -> Self::Address;
    /// The common packet: no options, no extension headers, not a fragment, TCP or UDP.
    fn plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<Self::Address>>;
    fn head(interface: &Interface) -> u32;
    /// From the first eight bytes and the peer.
    fn key(start: u64, remote: Self::Address) -> Self::Key;
    fn wide(address: Self::Address) -> Address;
}

/// A flow as a packet names it; see [`stanchion_ebpf_abi::FlowKey4`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Flow<A> {
    pub remote: A,
    pub ports: Pair,
    pub protocol: u8,
}

/// The pod's port and the peer's as they lie in a flow's key. In one word: a word that was written in pieces a moment before makes
/// the processor wait.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Pair(u32);

impl Pair {
    pub const NONE: Self = Self(0);

    #[inline(always)]
    pub fn new(pod: [u8; 2], peer: [u8; 2]) -> Self {
        Self(u32::from(u16::from_ne_bytes(pod)) | u32::from(u16::from_ne_bytes(peer)) << 16)
    }

    #[inline(always)]
    pub fn word(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub fn pod(self) -> [u8; 2] {
        (self.0 as u16).to_ne_bytes()
    }

    #[inline(always)]
    pub fn peer(self) -> [u8; 2] {
        ((self.0 >> 16) as u16).to_ne_bytes()
    }

    /// The peer's if `is_opened_by_pod` is 1, the pod's if it is 0.
    #[inline(always)]
    pub fn of_server(self, is_opened_by_pod: u8) -> [u8; 2] {
        ((self.0 >> (16 * u32::from(is_opened_by_pod & 1))) as u16).to_ne_bytes()
    }
}

/// A [`stanchion_ebpf_abi::FlowKey4`] in two words: the kernel hashes and compares keys in words.
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

/// The same for IPv6, without a rest. Of an IPv4 flow its first bytes are a [`FlowKey4`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct WideKey {
    start: u64,
    remote: Address,
}

impl WideKey {
    #[inline(always)]
    pub fn new(start: u64, remote: Address) -> Self {
        Self { start, remote }
    }

    #[inline(always)]
    fn as_abi4(&self) -> &FlowKey4 {
        // SAFETY: as above.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }

    #[inline(always)]
    fn as_abi6(&self) -> &FlowKey6 {
        // SAFETY: as above.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }

    #[inline(always)]
    pub fn entry(&self, is_ipv4: bool) -> Option<*mut FlowEntry> {
        if is_ipv4 { FLOWS4.get_ptr_mut(self.as_abi4()) } else { FLOWS6.get_ptr_mut(self.as_abi6()) }
    }

    #[inline(always)]
    pub fn insert(&self, is_ipv4: bool, entry: &FlowEntry, flags: u64) -> Result<(), i32> {
        if is_ipv4 { FLOWS4.insert(self.as_abi4(), entry, flags) } else { FLOWS6.insert(self.as_abi6(), entry, flags) }
    }
}

pub struct V4;
pub struct V6;

/// An IPv6 address in two words as they lie in memory; an IPv4 address as the first bytes of one that is otherwise zero.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Address(pub u64, pub u64);

impl Address {
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

    #[inline(always)]
    pub fn of4(word: u32) -> Self {
        Self(u64::from(word), 0)
    }

    #[inline(always)]
    pub fn words(self) -> [u32; 4] {
        [self.0 as u32, (self.0 >> 32) as u32, self.1 as u32, (self.1 >> 32) as u32]
    }

    /// The pod's own address behind an interface.
    #[inline(always)]
    pub fn own(interface: &Interface, is_ipv4: bool) -> Self {
        if is_ipv4 { Self::of4(interface.ipv4) } else { V6::own(interface) }
    }

    /// What the hash of exact addresses has of it.
    #[inline(always)]
    pub fn exact(self, family: u8) -> Option<AddressValue> {
        /// An [`AddressKey`] in words, see [`WideKey`].
        #[repr(C)]
        struct Words(Address, u64);
        let key = Words(self, u64::from(family));
        // SAFETY: the first bytes are those of that struct, whose alignment is less. Read once; an entry replaced meanwhile gives
        // the old or the new identity.
        unsafe { ADDRESSES.get(&*core::ptr::from_ref(&key).cast::<AddressKey>()) }.copied()
    }

    /// The identity of the narrowest prefix around it.
    #[inline(always)]
    pub fn cidr(self, is_ipv4: bool) -> Option<u32> {
        if is_ipv4 { CIDRS4.get(Key::new(32, self.0 as u32)) } else { CIDRS6.get(Key::new(128, self)) }.copied()
    }

    /// An IPv6 address of link-local scope: fe80::/10, ff02::/16.
    #[inline(always)]
    pub fn is_on_link(self) -> bool {
        self.is_link_local() || u16::from_be(self.0 as u16) == 0xff02
    }

    /// One of fe80::/10.
    #[inline(always)]
    pub fn is_link_local(self) -> bool {
        u16::from_be(self.0 as u16) & 0xffc0 == 0xfe80
    }

    #[inline(always)]
    pub fn hash(self) -> u32 {
        let folded = self.0 ^ self.1.rotate_left(21);
        ((folded ^ folded >> 32) as u32).wrapping_mul(SPREAD) >> 16
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
    fn entry(key: &Key4) -> Option<*mut FlowEntry> {
        FLOWS4.get_ptr_mut(key.as_abi())
    }

    #[inline(always)]
    fn own(interface: &Interface) -> u32 {
        interface.ipv4
    }

    #[inline(always)]
    fn head(interface: &Interface) -> u32 {
        interface.head4
    }

    #[inline(always)]
    fn key(start: u64, remote: u32) -> Key4 {
        Key4 { start, remote, _unused: 0 }
    }

    #[inline(always)]
    fn wide(address: u32) -> Address {
        Address::of4(address)
    }
}

impl Family for V6 {
    type Address = Address;
    type Key = WideKey;
    const NUMBER: u8 = 6;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn plain(skb: *mut __sk_buff, direction: u8) -> Option<Plain<Address>> {
        ipv6_plain(skb, direction)
    }

    #[inline(always)]
    fn entry(key: &WideKey) -> Option<*mut FlowEntry> {
        FLOWS6.get_ptr_mut(key.as_abi6())
    }

    #[inline(always)]
    fn own(interface: &Interface) -> Address {
        const AT: i16 = offset_of!(Interface, ipv6) as i16;
        // SAFETY: within the struct.
        unsafe { Address::at::<AT, { AT + 8 }>(core::ptr::from_ref(interface).cast()) }
    }

    #[inline(always)]
    fn head(interface: &Interface) -> u32 {
        interface.head6
    }

    #[inline(always)]
    fn key(start: u64, remote: Address) -> WideKey {
        WideKey::new(start, remote)
    }

    #[inline(always)]
    fn wide(address: Address) -> Address {
        address
    }
}

/// Spreads neighbouring addresses: 2^32 by the golden ratio.
pub const SPREAD: u32 = 0x9e37_79b1;

/// The first eight bytes of a flow key.
#[inline(always)]
pub fn key_start(head: u32, protocol: u8, ports: Pair) -> u64 {
    u64::from(head | u32::from(protocol) << 16) | u64::from(ports.word()) << 32
}
