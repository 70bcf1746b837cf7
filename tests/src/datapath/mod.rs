//! The programs without a network: loaded under pins of their own, fed with frames by `BPF_PROG_TEST_RUN`.

pub mod layout;
pub mod packet;
pub mod raw;

use std::fs;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::Context as _;
use aya::maps::{Array, HashMap, Map, MapData, RingBuf};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use stanchion_core::policy::image::{EndpointImage, MapOp, PolicyMaps as _, Slot};
use stanchion_daemon::netpol::{KernelMaps, LoadOptions, Loaded, POD_EGRESS, POD_INGRESS, load};
use stanchion_ebpf_abi::{
    Config, Event, FlowEntry, FlowKey4, INTERFACE_PLACES, Interface, LAYOUT_VERSION, config_flag, direction, flow_head, ipv4_word,
    ipv6_words, map_name,
};

use crate::stray::Maker;

/// The interface that test runs come from: loopback, which every namespace has.
pub const IF_INDEX: u32 = 1;

/// The slot of the pod behind it.
pub const SLOT: Slot = Slot(1);

/// The loaded object with one pod.
#[derive(Debug)]
pub struct Rig {
    loaded: Loaded,
    /// The policy maps.
    pub maps: KernelMaps,
    pin_root: PathBuf,
}

impl Rig {
    /// Loads under pins of this name, which go with the rig.
    ///
    /// # Errors
    /// The object was not built, or the kernel refuses it.
    pub fn new(name: &str, flow_entries: u32) -> anyhow::Result<Self> {
        let pin_root = Maker::Rig.pins(name);
        let mut loaded = load(&LoadOptions { pin_root: pin_root.clone(), flow_entries })?;
        let maps = KernelMaps::new(&mut loaded)?;
        let mut rig = Self { loaded, maps, pin_root };
        rig.configure(Config { flags: config_flag::TELL_DENIED, pod_flows: flow_entries })?;
        Ok(rig)
    }

    /// What a later agent with the same object does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn load_again(&self) -> anyhow::Result<()> {
        load(&LoadOptions { pin_root: self.pin_root.clone(), flow_entries: 0 })?;
        Ok(())
    }

    /// What an agent with another object of the same layout does: it takes the maps.
    ///
    /// # Errors
    /// The kernel's.
    pub fn load_programs_again(&self) -> anyhow::Result<()> {
        fs::remove_dir_all(self.pin_root.join(format!("v{LAYOUT_VERSION}")).join("programs"))?;
        self.load_again()
    }

    /// What an agent leaves that is killed when it has applied operations and not yet told the programs, and what the next one does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn killed_after(&mut self, ops: &[MapOp]) -> anyhow::Result<()> {
        let mut generation: Array<MapData, u32> = Map::Array(self.pin(map_name::GENERATION)?).try_into()?;
        let before = generation.get(&0, 0)?;
        self.apply(ops)?;
        generation.set(0, before, 0)?;
        self.loaded = load(&LoadOptions { pin_root: self.pin_root.clone(), flow_entries: 0 })?;
        self.maps = KernelMaps::new(&mut self.loaded)?;
        Ok(())
    }

    fn pin(&self, name: &str) -> anyhow::Result<MapData> {
        MapData::from_pin(self.pin_root.join(format!("v{LAYOUT_VERSION}")).join(name)).with_context(|| format!("open the pin of {name}"))
    }

    /// Writes the programs' settings.
    ///
    /// # Errors
    /// The kernel's.
    pub fn configure(&mut self, Config { flags, pod_flows }: Config) -> anyhow::Result<()> {
        let mut map: Array<MapData, [u32; 2]> = Map::Array(self.pin(map_name::CONFIG)?).try_into()?;
        Ok(map.set(0, [flags, pod_flows], 0)?)
    }

    /// Puts a pod with these addresses behind [`IF_INDEX`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn pod(&mut self, image: &EndpointImage) -> anyhow::Result<()> {
        let position = |wanted: fn(&IpAddr) -> bool| image.addresses.iter().position(wanted);
        let (four, six) = (position(IpAddr::is_ipv4), position(IpAddr::is_ipv6));
        let interface = Interface {
            if_index: IF_INDEX,
            slot: SLOT.0,
            flags: u8::from(image.addresses.len() > 2),
            head4: flow_head(SLOT.0, u8::try_from(four.unwrap_or(0))?),
            head6: flow_head(SLOT.0, u8::try_from(six.unwrap_or(0))?),
            ipv4: four.map_or(0, |at| match image.addresses[at] {
                IpAddr::V4(a) => ipv4_word(a.octets()),
                IpAddr::V6(_) => 0,
            }),
            ipv6: six.map_or([0; 4], |at| match image.addresses[at] {
                IpAddr::V6(a) => ipv6_words(a.octets()),
                IpAddr::V4(_) => [0; 4],
            }),
            ..Interface::default()
        };
        self.interfaces()?.set(IF_INDEX, interface_bytes(interface), 0)?;
        self.apply(&[MapOp::SetEndpoint(SLOT, image.clone())])
    }

    /// Moves the pod's record to a place behind the others', as the agent does where an interface of another pod has its own.
    ///
    /// # Errors
    /// The kernel's.
    pub fn move_far(&mut self, other: Slot) -> anyhow::Result<()> {
        let mut places = self.interfaces()?;
        let record = places.get(&IF_INDEX, 0)?;
        places.set(INTERFACE_PLACES, record, 0)?;
        let mut far: HashMap<MapData, u32, u32> = Map::HashMap(self.pin(map_name::INTERFACES_FAR)?).try_into()?;
        far.insert(IF_INDEX, INTERFACE_PLACES, 0)?;
        let neighbour = Interface { if_index: IF_INDEX + INTERFACE_PLACES, slot: other.0, ..Interface::default() };
        Ok(places.set(IF_INDEX, interface_bytes(neighbour), 0)?)
    }

    /// What a program finds that looked the far place up just before the agent gave it away.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give_far_place_away(&mut self, other: Slot) -> anyhow::Result<()> {
        let next = Interface { if_index: IF_INDEX + 2 * INTERFACE_PLACES, slot: other.0, ..Interface::default() };
        Ok(self.interfaces()?.set(INTERFACE_PLACES, interface_bytes(next), 0)?)
    }

    fn interfaces(&self) -> anyhow::Result<Array<MapData, [u8; 40]>> {
        Ok(Map::Array(self.pin(map_name::INTERFACES)?).try_into()?)
    }

    /// Applies operations.
    ///
    /// # Errors
    /// The kernel's.
    pub fn apply(&mut self, ops: &[MapOp]) -> anyhow::Result<()> {
        self.maps.apply(ops).map_err(|(index, error)| anyhow::anyhow!("{:?}: {error}", ops[index]))
    }

    /// Gives a frame to the program of a direction; true if it passes.
    ///
    /// # Errors
    /// The kernel's, or a result that is neither pass nor drop.
    pub fn passes(&mut self, direction: u8, frame: &[u8]) -> anyhow::Result<bool> {
        match raw::run(self.program(direction)?, frame, IF_INDEX)? {
            -1 => Ok(true),
            2 => Ok(false),
            other => anyhow::bail!("the program answers {other}"),
        }
    }

    /// Gives the pod a frame that it sent itself and that comes back on the same interface; true if it passes.
    ///
    /// # Errors
    /// See [`Self::passes`].
    pub fn passes_back(&mut self, frame: &[u8]) -> anyhow::Result<bool> {
        let result = raw::run_back(self.program(direction::INGRESS)?, frame, IF_INDEX)?;
        anyhow::ensure!(matches!(result, -1 | 2), "the program answers {result}");
        Ok(result == -1)
    }

    /// The program of a direction.
    ///
    /// # Errors
    /// It is not loaded.
    pub fn program(&mut self, direction: u8) -> anyhow::Result<std::os::fd::BorrowedFd<'_>> {
        let name = if direction == direction::EGRESS { POD_EGRESS } else { POD_INGRESS };
        Ok(self.loaded.program(name)?.fd()?.as_fd())
    }

    /// The IPv4 flow table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flows4(&self) -> anyhow::Result<HashMap<MapData, [u8; 12], [u8; 16]>> {
        Ok(Map::HashMap(self.pin(map_name::FLOWS4)?).try_into()?)
    }

    /// The IPv6 flow table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flows6(&self) -> anyhow::Result<HashMap<MapData, [u8; 24], [u8; 16]>> {
        Ok(Map::HashMap(self.pin(map_name::FLOWS6)?).try_into()?)
    }

    /// Empties the flow tables and the table of fragments.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_flows(&mut self) -> anyhow::Result<()> {
        let (mut four, mut six) = (self.flows4()?, self.flows6()?);
        let mut fragments: HashMap<MapData, [u8; 40], [u8; 8]> = Map::LruHashMap(self.pin(map_name::FRAGMENTS)?).try_into()?;
        for key in four.keys().collect::<Result<Vec<_>, _>>()? {
            four.remove(&key)?;
        }
        for key in six.keys().collect::<Result<Vec<_>, _>>()? {
            six.remove(&key)?;
        }
        for key in fragments.keys().collect::<Result<Vec<_>, _>>()? {
            fragments.remove(&key)?;
        }
        // The pod's count of them, as the agent settles it.
        let mut inserted: Array<MapData, u64> = Map::Array(self.pin(map_name::FLOWS_INSERTED)?).try_into()?;
        Ok(inserted.set(u32::from(SLOT.0), 0, 0)?)
    }

    /// Makes every flow older. What a CPU keeps of it for the rest of the real tick stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn grow_old(&mut self, ticks: u32) -> anyhow::Result<()> {
        let older = |bytes| {
            let mut entry = flow_entry(bytes);
            entry.seen = entry.seen.wrapping_sub(ticks);
            flow_bytes(entry)
        };
        let (mut four, mut six) = (self.flows4()?, self.flows6()?);
        for key in four.keys().collect::<Result<Vec<_>, _>>()? {
            let entry = older(four.get(&key, 0)?);
            four.insert(key, entry, 0)?;
        }
        for key in six.keys().collect::<Result<Vec<_>, _>>()? {
            let entry = older(six.get(&key, 0)?);
            six.insert(key, entry, 0)?;
        }
        Ok(())
    }

    /// Removes IPv4 flows that were idle for longer than their time before the newest flow's last packet, and counts the pod's, as
    /// the agent does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn collect(&mut self) -> anyhow::Result<()> {
        let mut table = self.flows4()?;
        let flows = table.iter().collect::<Result<Vec<_>, _>>()?;
        let now = flows.iter().map(|(_, bytes)| flow_entry(*bytes).seen).max().unwrap_or(0);
        let mut live = 0;
        for (key, bytes) in flows {
            let entry = flow_entry(bytes);
            if now - entry.seen > u32::from(entry.timeout) {
                table.remove(&key)?;
            } else {
                live += 1;
            }
        }
        let mut inserted: Array<MapData, u64> = Map::Array(self.pin(map_name::FLOWS_INSERTED)?).try_into()?;
        Ok(inserted.set(u32::from(SLOT.0), live, 0)?)
    }

    /// The events since the ring was opened or emptied.
    ///
    /// # Errors
    /// The kernel's.
    pub fn events(&self) -> anyhow::Result<RingBuf<MapData>> {
        Ok(Map::RingBuf(self.pin(map_name::EVENTS)?).try_into()?)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.pin_root) {
            eprintln!("cannot remove {}: {error}", self.pin_root.display());
        }
    }
}

/// Keeps the calling thread on one of its CPUs, so that what a CPU keeps of a packet is there for the next one.
///
/// # Errors
/// The kernel's.
pub fn stay_on_one_cpu() -> anyhow::Result<()> {
    let (this_thread, mut one) = (Pid::from_raw(0), CpuSet::new());
    let allowed = sched_getaffinity(this_thread)?;
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    one.set(first.context("a thread has a CPU")?)?;
    Ok(sched_setaffinity(this_thread, &one)?)
}

/// Takes the events out of a ring.
pub fn take_events(ring: &mut RingBuf<MapData>) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(item) = ring.next() {
        assert_eq!(item.len(), size_of::<Event>(), "an event of another layout");
        // SAFETY: plain data of this size; the ring promises no alignment.
        events.push(unsafe { std::ptr::read_unaligned(item.as_ptr().cast::<Event>()) });
    }
    events
}

fn interface_bytes(interface: Interface) -> [u8; 40] {
    // SAFETY: an ABI type without padding, of this size.
    unsafe { std::mem::transmute(interface) }
}

/// An entry of the flow table from its bytes.
pub fn flow_entry(bytes: [u8; 16]) -> FlowEntry {
    // SAFETY: an ABI type without padding, of this size.
    unsafe { std::mem::transmute(bytes) }
}

/// The bytes of an entry of the flow table.
pub fn flow_bytes(entry: FlowEntry) -> [u8; 16] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(entry) }
}

/// The bytes of a key.
pub fn key4(key: FlowKey4) -> [u8; 12] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(key) }
}
