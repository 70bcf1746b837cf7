//! The flows that this CPU has seen go on within the present tick: their next packets are told by one line of memory, without the
//! flow table. It says nothing that the table would not say: an entry is written where the table said that the flow goes on under
//! this revision and had the time noted, and whatever changes a flow (TCP flags, another revision, a later tick) goes by the table.
//! That a datagram of the opener follows a reply may so be told a tick later, which only shortens the idle time of a flow that is not a
//! tick old. After a reset, or a SYN on old ports, the next packet changes the flow again: then the pod's epoch has grown, for all CPUs.

use crate::{
    family::{Address, SPREAD},
    maps::{RECENT, cached},
};

/// One direction of a flow. All zero: none, as no flow has protocol 0.
#[derive(Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Recent {
    /// The flow's key, and in two bits that TCP and UDP leave free in the protocol: direction and family.
    start: u64,
    remote: Address,
    /// The revision and the endpoint's epoch.
    pod: u32,
    tick: u32,
}

impl Recent {
    #[inline(always)]
    pub fn new((start, remote): (u64, Address), (direction, family): (u8, u8), (revision, epoch): (u32, [u8; 2]), tick: u32) -> Self {
        let which = u64::from(direction & 1) << 22 | u64::from(family & 2) << 22;
        // Within a tick no revision grows by 2^16.
        Self { start: start | which, remote, pod: revision ^ u32::from(u16::from_ne_bytes(epoch)) << 16, tick }
    }

    /// Where it is if it is known: `*place == self`.
    #[inline(always)]
    pub fn place(&self) -> Option<*mut Self> {
        let folded = self.start ^ self.remote.0 ^ self.remote.1.rotate_left(21);
        cached(&RECENT, 0, ((folded ^ folded >> 32) as u32).wrapping_mul(SPREAD) >> 16)
    }
}
