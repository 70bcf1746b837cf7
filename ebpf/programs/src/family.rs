//! IPv4 and IPv6: the same judgement over different address widths.

use aya_ebpf::maps::{HashMap, lpm_trie::Key};
use stanchion_ebpf_abi::{AddressValue, FlowEntry, FlowKey4, FlowKey6, Interface};

use crate::maps::{ADDRESSES4, ADDRESSES6, CIDRS4, CIDRS6, FLOWS4, FLOWS6};

/// What differs between the families.
pub trait Family: 'static {
    type Address: Copy + PartialEq;
    type Key: Copy + 'static;
    const NUMBER: u8;
    const ICMP: u8;

    fn flows() -> &'static HashMap<Self::Key, FlowEntry>;
    fn addresses() -> &'static HashMap<Self::Address, AddressValue>;
    fn cidr(address: Self::Address) -> Option<u32>;
    fn own(interface: &Interface) -> Self::Address;
    fn words(address: Self::Address) -> [u32; 4];
    fn key(interface: &Interface, flow: &Flow<Self::Address>) -> Self::Key;
}

/// A flow as a packet names it; see [`FlowKey4`].
#[derive(Clone, Copy)]
pub struct Flow<A> {
    pub remote: A,
    pub local_port: [u8; 2],
    pub remote_port: [u8; 2],
    pub protocol: u8,
}

pub struct V4;
pub struct V6;

impl Family for V4 {
    type Address = u32;
    type Key = FlowKey4;
    const NUMBER: u8 = 4;
    const ICMP: u8 = 1;

    #[inline(always)]
    fn flows() -> &'static HashMap<FlowKey4, FlowEntry> {
        &FLOWS4
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
    fn own(interface: &Interface) -> u32 {
        interface.ipv4
    }

    #[inline(always)]
    fn words(address: u32) -> [u32; 4] {
        [address, 0, 0, 0]
    }

    #[inline(always)]
    fn key(interface: &Interface, flow: &Flow<u32>) -> FlowKey4 {
        let Flow { remote, local_port, remote_port, protocol } = *flow;
        FlowKey4 { slot: interface.slot, protocol, local: interface.local4, local_port, remote_port, remote }
    }
}

impl Family for V6 {
    type Address = [u32; 4];
    type Key = FlowKey6;
    const NUMBER: u8 = 6;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn flows() -> &'static HashMap<FlowKey6, FlowEntry> {
        &FLOWS6
    }

    #[inline(always)]
    fn addresses() -> &'static HashMap<[u32; 4], AddressValue> {
        &ADDRESSES6
    }

    #[inline(always)]
    fn cidr(address: [u32; 4]) -> Option<u32> {
        CIDRS6.get(Key::new(128, address)).copied()
    }

    #[inline(always)]
    fn own(interface: &Interface) -> [u32; 4] {
        interface.ipv6
    }

    #[inline(always)]
    fn words(address: [u32; 4]) -> [u32; 4] {
        address
    }

    #[inline(always)]
    fn key(interface: &Interface, flow: &Flow<[u32; 4]>) -> FlowKey6 {
        let Flow { remote, local_port, remote_port, protocol } = *flow;
        FlowKey6 { slot: interface.slot, protocol, local: interface.local6, local_port, remote_port, remote }
    }
}
