//! The maps. The loader sets the sizes of the flow tables. Names and layouts are the abi crate's.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
};
use stanchion_ebpf_abi::{
    AddressKey, AddressValue, Config, Counters, ENDPOINT_SLOTS, Endpoint, Event, FAR_PLACES, FlowEntry, FlowKey4, FlowKey6, FragmentKey,
    FragmentPorts, INTERFACE_PLACES, Interface, OwnKey, PodFrame, VerdictKey, VerdictValue, config_flag, event_verdict, stat,
};

use crate::{
    family::Address,
    judge::{Cached, CachedVerdict},
    packet::{Packet, Walk},
    recent::Recent,
};

/// Memory is taken when an entry is added, not for the whole table at once.
const NO_PREALLOC: u32 = 1;

/// A tick is `1 << TICK_SHIFT` jiffies. The loader sets it from the kernel's HZ so that a tick is one second or a little more.
#[unsafe(no_mangle)]
pub static TICK_SHIFT: Global<u32> = Global::new(8);

#[map]
pub static INTERFACES: Array<Interface> = Array::with_max_entries(INTERFACE_PLACES + FAR_PLACES, 0);
#[map]
pub static INTERFACES_FAR: HashMap<u32, u32> = HashMap::with_max_entries(FAR_PLACES, NO_PREALLOC);
#[map]
pub static ENDPOINTS: Array<Endpoint> = Array::with_max_entries(ENDPOINT_SLOTS, 0);
#[map]
pub static OWN: HashMap<OwnKey, u32> = HashMap::with_max_entries(16_384, NO_PREALLOC);
#[map]
pub static ADDRESSES: HashMap<AddressKey, AddressValue> = HashMap::with_max_entries(262_144, NO_PREALLOC);
#[map]
pub static CIDRS4: LpmTrie<u32, u32> = LpmTrie::with_max_entries(1_048_576, 0);
#[map]
pub static CIDRS6: LpmTrie<Address, u32> = LpmTrie::with_max_entries(1_048_576, 0);
#[map]
pub static VERDICTS: LpmTrie<VerdictKey, VerdictValue> = LpmTrie::with_max_entries(4_194_304, 0);
// Flow tables are preallocated: an insert cannot fail for want of memory, and the bound is the size.
#[map]
pub static FLOWS4: HashMap<FlowKey4, FlowEntry> = HashMap::with_max_entries(262_144, 0);
#[map]
pub static FLOWS6: HashMap<FlowKey6, FlowEntry> = HashMap::with_max_entries(262_144, 0);
#[map]
pub static FLOWS_INSERTED: Array<u64> = Array::with_max_entries(ENDPOINT_SLOTS, 0);
#[map]
pub static FLOWS_REMOVED: Array<u64> = Array::with_max_entries(ENDPOINT_SLOTS, 0);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> = LruHashMap::with_max_entries(8_192, 0);
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(ENDPOINT_SLOTS, 0);
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);
#[map]
pub static GENERATION: Array<u32> = Array::with_max_entries(1, 0);
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(524_288, 0);
#[map]
pub static NAMES: RingBuf = RingBuf::with_byte_size(NAMES_BYTES, 0);

/// Room for copied frames.
pub const NAMES_BYTES: u32 = 262_144;

/// Where a frame is copied to before its length is known to the ring.
#[map]
pub static FRAME: PerCpuArray<PodFrame> = PerCpuArray::with_max_entries(1, 0);

/// The packet in hand. In a map and not on the stack, so that the verifier forgets by which way each field was written: it then
/// follows what comes once, not once for every way.
#[map]
pub static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(1, 0);

/// Identities by a hash of the address, see [`Cached`]: of IPv4, then of IPv6.
#[map]
pub static CACHE: PerCpuArray<Cache<Cached>> = PerCpuArray::with_max_entries(2, 0);

/// Verdicts by a hash of the question.
#[map]
pub static VERDICT_CACHE: PerCpuArray<Cache<CachedVerdict>> = PerCpuArray::with_max_entries(1, 0);

/// Flows by a hash of their ends.
#[map]
pub static RECENT: PerCpuArray<Cache<Recent>> = PerCpuArray::with_max_entries(1, 0);

/// One value of many entries: the kernel takes its time for each value of a per-CPU map.
pub type Cache<T> = [T; CACHED as usize];

/// Entries of each of these; a power of two. A per-CPU value has at most 32 KiB.
pub const CACHED: u32 = 1_024;

/// The place for a hash in one of the map's caches.
#[inline(always)]
pub fn cached<T>(caches: &PerCpuArray<Cache<T>>, which: u32, hash: u32) -> Option<*mut T> {
    let first = caches.get_ptr_mut(which)?.cast::<T>();
    // SAFETY: within the value.
    Some(unsafe { first.add((hash & (CACHED - 1)) as usize) })
}

/// Adds one to a [`stat`].
#[inline(always)]
pub fn count_stat(index: u32) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: a per-CPU value; programs on one CPU do not interrupt each other's read-modify-write in tc.
        unsafe { *value += 1 };
    }
}

/// Counts a packet of `length` bytes.
#[inline(always)]
pub fn count(slot: u32, direction: u8, verdict: u8, length: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: as above; both indices are below 2.
        unsafe {
            let counter = &mut (*counters).of[direction as usize & 1][verdict as usize & 1];
            counter.packets += 1;
            counter.bytes += u64::from(length);
        }
    }
}

/// Whether someone listens to events with the verdict.
#[inline(always)]
pub fn is_told(verdict: u8) -> bool {
    let flag = if verdict == event_verdict::ALLOWED { config_flag::TELL_ALLOWED } else { config_flag::TELL_DENIED };
    CONFIG.get(0).is_some_and(|config| config.flags & flag != 0)
}

/// Writes an event if there is room. The kernel wakes the agent if it had read all before: while it pauses after a batch,
/// nobody is woken.
#[inline(always)]
pub fn tell(event: Event) {
    match EVENTS.reserve::<Event>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(0);
        }
        None => count_stat(stat::EVENTS_LOST),
    }
}
