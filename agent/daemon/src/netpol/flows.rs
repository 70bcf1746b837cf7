//! The flow tables as the agent sees them: collection of idle entries, seeding, views.

use std::collections::{HashMap as StdMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use aya::maps::{Array, HashMap, MapData as AyaMap, MapError as AyaError, PerCpuArray};
use stanchion_core::policy::image::{MapError, Refusal};
use stanchion_ebpf_abi::{
    Config, Counters, FlowEntry, FlowKey4, FlowKey6, config_flag, flow_state, ipv4_octets, ipv4_word, ipv6_octets, ipv6_words, map_name,
    stat, timeout,
};

use super::batch;
use super::follow::Listeners;
use super::handle::{Alarms, Count, EndpointCounters};
use super::maps::refused;
use super::object::{LoadError, Loaded, Raw};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// A flow of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    pub(super) slot: u16,
    /// Position of the pod's address in its list.
    pub(super) local: u8,
    pub(super) protocol: u8,
    pub(super) local_port: u16,
    pub(super) remote_port: u16,
    pub(super) remote: IpAddr,
}

impl From<FlowKey4> for FlowKey {
    fn from(key: FlowKey4) -> Self {
        let FlowKey4 { slot, protocol, local, local_port, remote_port, remote } = key;
        Self {
            slot,
            local,
            protocol,
            local_port: u16::from_be_bytes(local_port),
            remote_port: u16::from_be_bytes(remote_port),
            remote: Ipv4Addr::from(ipv4_octets(remote)).into(),
        }
    }
}

impl From<FlowKey6> for FlowKey {
    fn from(key: FlowKey6) -> Self {
        let FlowKey6 { slot, protocol, local, local_port, remote_port, remote } = key;
        Self {
            slot,
            local,
            protocol,
            local_port: u16::from_be_bytes(local_port),
            remote_port: u16::from_be_bytes(remote_port),
            remote: Ipv6Addr::from(ipv6_octets(remote)).into(),
        }
    }
}

/// What a collection found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Collected {
    /// Entries that stay, by slot.
    pub(super) live: StdMap<u16, u64>,
    /// Entries that stay, by family.
    pub(super) families: [u64; 2],
    /// Entries removed.
    pub(super) removed: u64,
    /// Which of the addresses asked about have entries that stay.
    pub(super) remotes: HashSet<IpAddr>,
}

/// Flow tables, counters and settings.
pub(super) struct Flows {
    fds: [OwnedFd; 2],
    four: HashMap<AyaMap, Raw<FlowKey4>, Raw<FlowEntry>>,
    six: HashMap<AyaMap, Raw<FlowKey6>, Raw<FlowEntry>>,
    inserted: Array<AyaMap, u64>,
    removed: Array<AyaMap, u64>,
    counters: PerCpuArray<AyaMap, Raw<Counters>>,
    stats: PerCpuArray<AyaMap, u64>,
    config: Array<AyaMap, Raw<Config>>,
}

impl Flows {
    /// Takes the maps out of the object and writes the settings.
    pub(super) fn new(loaded: &mut Loaded, config: Config) -> Result<Self, LoadError> {
        let mut flows = Self {
            fds: [loaded.map_fd(map_name::FLOWS4)?, loaded.map_fd(map_name::FLOWS6)?],
            four: loaded.map(map_name::FLOWS4)?,
            six: loaded.map(map_name::FLOWS6)?,
            inserted: loaded.map(map_name::FLOWS_INSERTED)?,
            removed: loaded.map(map_name::FLOWS_REMOVED)?,
            counters: loaded.map(map_name::COUNTERS)?,
            stats: loaded.map(map_name::STATS)?,
            config: loaded.map(map_name::CONFIG)?,
        };
        flows.config.set(0, Raw(config), 0).map_err(|source| LoadError::Map { name: map_name::CONFIG, source })?;
        Ok(flows)
    }

    /// What the programs tell of.
    pub(super) fn tell(&mut self, Listeners { all, allowed }: Listeners) -> Result<(), MapError> {
        let Raw(config) = refused(map_name::CONFIG, &"read", self.config.get(&0, 0))?;
        let mut flags = config.flags & !(config_flag::TELL_DENIED | config_flag::TELL_ALLOWED);
        if all > 0 {
            flags |= config_flag::TELL_DENIED;
        }
        if allowed > 0 {
            flags |= config_flag::TELL_ALLOWED;
        }
        refused(map_name::CONFIG, &flags, self.config.set(0, Raw(Config { flags, ..config }), 0))
    }

    /// Removes entries that were idle for longer than their time at tick `now`, and all of slots that are no pod's.
    ///
    /// An entry is read a second time before it is removed: if a packet came meanwhile, it stays. Only the agent removes,
    /// so nobody's view of the table is compared with another's.
    /// `watched` are addresses of which the caller wants to know whether flows to them stay.
    pub(super) fn collect(&mut self, now: u32, is_held: &dyn Fn(u16) -> bool, watched: &HashSet<IpAddr>) -> Result<Collected, MapError> {
        let mut collected = Collected::default();
        let [four, six] = &self.fds;
        collect_one(four.as_fd(), &mut self.four, (map_name::FLOWS4, 0), now, is_held, watched, &mut collected)?;
        collect_one(six.as_fd(), &mut self.six, (map_name::FLOWS6, 1), now, is_held, watched, &mut collected)?;
        Ok(collected)
    }

    /// Tells the programs how many flows each of the slots has, for the cap. Flows opened since the collection make this
    /// a little low until the next one.
    pub(super) fn settle(&mut self, slots: impl Iterator<Item = u16>, live: &StdMap<u16, u64>) -> Result<(), MapError> {
        for slot in slots {
            let index = u32::from(slot);
            let inserted = refused(map_name::FLOWS_INSERTED, &slot, self.inserted.get(&index, 0))?;
            let removed = inserted.wrapping_sub(live.get(&slot).copied().unwrap_or(0));
            if refused(map_name::FLOWS_REMOVED, &slot, self.removed.get(&index, 0))? != removed {
                refused(map_name::FLOWS_REMOVED, &slot, self.removed.set(index, removed, 0))?;
            }
        }
        Ok(())
    }

    /// Adds a flow that the kernel's connection tracking knows, unless the table has it. Revision 0 makes its next packet
    /// be judged.
    pub(super) fn seed(&mut self, key: FlowKey, state: u8, now: u32) -> Result<(), MapError> {
        const ABSENT: u64 = 1;
        let state = state | flow_state::SEEDED;
        let entry = Raw(FlowEntry { revision: 0, seen: now, rule: 0, timeout: seeded_timeout(key.protocol, state), state, reserved: 0 });
        let FlowKey { slot, local, protocol, local_port, remote_port, remote } = key;
        let (local_port, remote_port) = (local_port.to_be_bytes(), remote_port.to_be_bytes());
        let (map, result) = match remote {
            IpAddr::V4(a) => {
                let key = FlowKey4 { slot, protocol, local, local_port, remote_port, remote: ipv4_word(a.octets()) };
                (map_name::FLOWS4, self.four.insert(Raw(key), entry, ABSENT))
            }
            IpAddr::V6(a) => {
                let key = FlowKey6 { slot, protocol, local, local_port, remote_port, remote: ipv6_words(a.octets()) };
                (map_name::FLOWS6, self.six.insert(Raw(key), entry, ABSENT))
            }
        };
        match result {
            Err(AyaError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => refused(map, &key, other),
        }
    }

    /// Every entry, for views.
    pub(super) fn all(&self) -> Vec<(FlowKey, FlowEntry)> {
        let mut all = Vec::new();
        let [four, six] = &self.fds;
        let read = batch::for_each(four, |key: FlowKey4, entry| all.push((key.into(), entry)))
            .and_then(|()| batch::for_each(six, |key: FlowKey6, entry| all.push((key.into(), entry))));
        if let Err(cause) = read {
            tracing::warn!(cause = %cause, "cannot read the flow tables");
        }
        all
    }

    /// A pod's counters over all CPUs.
    pub(super) fn counters(&self, slot: u16) -> Result<EndpointCounters, MapError> {
        let values = refused(map_name::COUNTERS, &slot, self.counters.get(&u32::from(slot), 0))?;
        let sum = |direction: usize, verdict: usize| {
            values.iter().fold(Count::default(), |sum, Raw(counters)| {
                let counter = counters.of[direction][verdict];
                Count { packets: sum.packets + counter.packets, bytes: sum.bytes + counter.bytes }
            })
        };
        Ok(EndpointCounters { ingress_denied: sum(0, 0), ingress_allowed: sum(0, 1), egress_denied: sum(1, 0), egress_allowed: sum(1, 1) })
    }

    /// Sets a pod's counters to zero, that of its flows too, for the next holder of its slot.
    pub(super) fn clear_counters(&mut self, slot: u16) -> Result<(), MapError> {
        let index = u32::from(slot);
        let values = refused(map_name::COUNTERS, &slot, self.counters.get(&index, 0))?;
        let zeros: Vec<Raw<Counters>> = values.iter().map(|_| Raw(Counters::default())).collect();
        let zeros = zeros.try_into().map_err(|error: std::io::Error| MapError {
            map: map_name::COUNTERS,
            operation: "clear".to_owned(),
            refusal: Refusal::Other,
            message: error.to_string(),
        })?;
        refused(map_name::COUNTERS, &slot, self.counters.set(index, zeros, 0))?;
        self.settle([slot].into_iter(), &StdMap::new())
    }

    /// What should be zero.
    pub(super) fn alarms(&self) -> Result<Alarms, MapError> {
        let sum = |index: u32| -> Result<u64, MapError> { Ok(refused(map_name::STATS, &index, self.stats.get(&index, 0))?.iter().sum()) };
        Ok(Alarms {
            events_lost: sum(stat::EVENTS_LOST)?,
            flow_table_full: sum(stat::TABLE_FULL)?,
            pod_flow_cap: sum(stat::POD_CAP)?,
            no_endpoint: sum(stat::NO_ENDPOINT)?,
            names_lost: sum(stat::NAMES_LOST)?,
        })
    }
}

fn collect_one<K: Copy + stanchion_ebpf_abi::MapData + Into<FlowKey>>(
    fd: BorrowedFd<'_>,
    table: &mut HashMap<AyaMap, Raw<K>, Raw<FlowEntry>>,
    (name, family): (&'static str, usize),
    now: u32,
    is_held: &dyn Fn(u16) -> bool,
    watched: &HashSet<IpAddr>,
    collected: &mut Collected,
) -> Result<(), MapError> {
    let expired = |entry: &FlowEntry| {
        let idle = now.wrapping_sub(entry.seen);
        // A packet of the last instant may be ahead of `now`.
        idle < u32::MAX / 2 && idle > u32::from(entry.timeout)
    };
    let mut dead = Vec::new();
    let mut look = |key: K, entry: FlowEntry| {
        let FlowKey { slot, remote, .. } = key.into();
        if !is_held(slot) || expired(&entry) {
            dead.push((Raw(key), slot));
        } else {
            *collected.live.entry(slot).or_default() += 1;
            collected.families[family] += 1;
            if watched.contains(&remote) {
                collected.remotes.insert(remote);
            }
        }
    };
    batch::for_each(fd, &mut look).map_err(|error| MapError {
        map: name,
        operation: "collect".to_owned(),
        refusal: Refusal::Other,
        message: error.to_string(),
    })?;
    for (key, slot) in dead {
        let still = !is_held(slot) || table.get(&key, 0).is_ok_and(|Raw(entry)| expired(&entry));
        if still && table.remove(&key).is_ok() {
            collected.removed += 1;
        }
    }
    Ok(())
}

fn seeded_timeout(protocol: u8, state: u8) -> u16 {
    let replied = state & flow_state::REPLIED != 0;
    match protocol {
        TCP if replied => timeout::TCP_ESTABLISHED,
        TCP => timeout::TCP_OPENING,
        ICMP | ICMPV6 => timeout::ICMP,
        _ if !replied => timeout::DATAGRAM_OPENING,
        UDP => timeout::UDP,
        _ => timeout::OTHER,
    }
}

/// A flow's state in a word.
pub(super) fn state_name(protocol: u8, state: u8) -> &'static str {
    let fins = state & (flow_state::FIN_POD | flow_state::FIN_PEER);
    if protocol == TCP && state & flow_state::RESET != 0 {
        "reset"
    } else if protocol == TCP && fins == flow_state::FIN_POD | flow_state::FIN_PEER {
        "closed"
    } else if protocol == TCP && fins != 0 {
        "half-closed"
    } else if state & flow_state::REPLIED != 0 {
        "established"
    } else {
        "opening"
    }
}
