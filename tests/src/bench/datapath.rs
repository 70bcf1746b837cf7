//! Nanoseconds a packet, by `BPF_PROG_TEST_RUN`: CPU time around the call divided by the repetitions, the empty program
//! subtracted. The floor is a HASH lookup with a 4-byte key. A shared machine's speed changes by a factor of two within
//! seconds, so every round runs the empty program, the floor and the program one right after the other: the ratio is the
//! median of the rounds' ratios, and the figure is that many floors.
//!
//! | case | packet |
//! |---|---|
//! | A, A2 | a pod without policy, both directions |
//! | B, B2 | a TCP flow under policy, as opened and in reply |
//! | J | UDP under policy |
//! | C, C2 | denied, peer known and unknown, event ring full |
//! | D, D0 | denied, event written; and with nobody who listens |
//! | P | denied, with the entries of 1 to 1,000 policies |
//! | G | denied, with 1 to 60,000 CIDRs of one address, and of 24 bits |
//! | H | denied, a random peer of 60,000, each packet alone |
//! | F | a random flow of 60,000, each packet alone |
//! | E | a flow that opens, each packet alone |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::ensure;
use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use stanchion_core::policy::image::{EndpointImage, MapOp};
use stanchion_ebpf_abi::{Config, VERDICT_PREFIX_PORT, VerdictKey, VerdictValue, config_flag, direction, verdict};

use super::plot::Plot;
use super::{Row, median};
use crate::datapath::packet::{Packet, TCP, UDP, arp, flags};
use crate::datapath::raw::{self, Yardstick};
use crate::datapath::{IF_INDEX, Rig, take_events};

/// Ratios to the yardstick that SPECIFICATION.md promises.
const ESTABLISHED: f64 = 1.3;
const UNPOLICED: f64 = 0.1;
const DENIED: f64 = 4.0;
/// Of what it costs with the fewest policies.
const FLAT: f64 = 1.2;
/// Room of the flow tables.
const FLOWS: u32 = 262_144;

/// The peer's identity that policy allows on [`PORT`].
const FRIEND: u32 = 7;
/// An identity that policy knows and does not allow.
const STRANGER: u32 = 8;
const PORT: u16 = 80;
const POLICY: u32 = 3;

/// How often and how long.
#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    repeat: u32,
    flows: u32,
}

/// CPU nanoseconds of this thread.
fn cpu() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has a CPU clock"))
}

/// Nanoseconds of a packet, and of the floor at the same time; both without the empty program.
#[derive(Clone, Copy)]
struct Cost {
    net: f64,
    floor: f64,
}

/// What programs are measured beside.
struct Yardsticks {
    empty: Yardstick,
    hash: Yardstick,
}

impl Yardsticks {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { empty: Yardstick::empty()?, hash: Yardstick::hash()? })
    }

    /// The cost of a program on one frame, and its last answer; `between` runs after each round.
    fn beside(&self, program: impl AsFd, frame: &[u8], effort: Effort, mut between: impl FnMut()) -> anyhow::Result<(Cost, i32)> {
        let (mut floors, mut ratios) = (Vec::with_capacity(effort.rounds), Vec::with_capacity(effort.rounds));
        let mut result = 0;
        for _ in 0..effort.rounds {
            let (empty, _) = gross(&self.empty, &arp(), effort.repeat)?;
            let (hash, _) = gross(&self.hash, &arp(), effort.repeat)?;
            let (program, answer) = gross(&program, frame, effort.repeat)?;
            floors.push(hash - empty);
            ratios.push((program - empty) / (hash - empty));
            result = answer;
            between();
        }
        let floor = median(floors);
        Ok((Cost { net: median(ratios) * floor, floor }, result))
    }

    /// What the floor and the empty program cost now.
    fn floor(&self, effort: Effort) -> anyhow::Result<(f64, f64)> {
        let mut empty = Vec::with_capacity(effort.rounds);
        let (floor, _) =
            self.beside(&self.hash, &arp(), effort, || empty.extend(gross(&self.empty, &arp(), effort.repeat).map(|it| it.0)))?;
        Ok((floor.floor, median(empty)))
    }
}

/// Nanoseconds of a run of the program on one frame, the call's part of it included; and its answer.
fn gross(program: impl AsFd, frame: &[u8], repeat: u32) -> anyhow::Result<(f64, i32)> {
    let start = cpu();
    let (result, _) = raw::repeat(program.as_fd(), frame, IF_INDEX, repeat)?;
    Ok(((cpu() - start).as_secs_f64() * 1e9 / f64::from(repeat), result))
}

/// Median of the nanoseconds by the kernel's own measure of programs run once on each frame.
fn cold(program: impl AsFd, frames: &[Vec<u8>]) -> anyhow::Result<f64> {
    let mut figures = Vec::with_capacity(frames.len());
    for frame in frames {
        let (_, duration) = raw::repeat(program.as_fd(), frame, IF_INDEX, 1)?;
        figures.push(duration.as_secs_f64() * 1e9);
    }
    Ok(median(figures))
}

/// One address family's cast.
#[derive(Clone, Copy)]
struct Cast {
    name: &'static str,
    pod: IpAddr,
    friend: IpAddr,
    stranger: IpAddr,
    nobody: IpAddr,
    many: fn(u32) -> IpAddr,
    wide: fn(u32) -> IpNet,
}

fn many4(index: u32) -> IpAddr {
    Ipv4Addr::from(0x0b00_0000 + index).into()
}

fn many6(index: u32) -> IpAddr {
    Ipv6Addr::from(0xfd01_u128 << 112 | u128::from(index)).into()
}

fn wide4(index: u32) -> IpNet {
    IpNet::new(Ipv4Addr::from(0x2000_0000 + (index << 8)).into(), 24).expect("24 bits")
}

fn wide6(index: u32) -> IpNet {
    IpNet::new(Ipv6Addr::from(0xfd02_u128 << 112 | u128::from(index) << 64).into(), 64).expect("64 bits")
}

const CASTS: [Cast; 2] = [
    Cast {
        name: "v4",
        pod: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 10)),
        friend: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 20)),
        stranger: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 30)),
        nobody: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        many: many4,
        wide: wide4,
    },
    Cast {
        name: "v6",
        pod: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x10)),
        friend: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x20)),
        stranger: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x30)),
        nobody: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        many: many6,
        wide: wide6,
    },
];

/// A packet between the pod's port and a peer's, in the direction of the packet; the flow's opener used `PORT` as the
/// destination.
fn packet(
    cast: &Cast,
    peer: IpAddr,
    opener: u8,
    way: u8,
    client_port: u16,
    make: impl Fn((IpAddr, u16), (IpAddr, u16)) -> Packet,
) -> Vec<u8> {
    let pod_is_client = opener == direction::EGRESS;
    let pod = (cast.pod, if pod_is_client { client_port } else { PORT });
    let peer = (peer, if pod_is_client { PORT } else { client_port });
    if way == direction::EGRESS { make(pod, peer) } else { make(peer, pod) }.frame()
}

fn tcp(flags: u8) -> impl Fn((IpAddr, u16), (IpAddr, u16)) -> Packet {
    move |source, destination| Packet::tcp(source, destination, flags)
}

fn image(isolated: bool) -> EndpointImage {
    let policy = isolated.then_some(POLICY);
    EndpointImage {
        addresses: CASTS.iter().map(|cast| cast.pod).collect(),
        ingress: policy,
        egress: policy,
        revision: 1,
        ..EndpointImage::default()
    }
}

fn policies() -> Vec<MapOp> {
    let mut ops = Vec::new();
    for way in [direction::INGRESS, direction::EGRESS] {
        for protocol in [TCP, UDP] {
            let key = VerdictKey { policy: POLICY, identity: FRIEND, direction: way, protocol, port: PORT.to_be_bytes() };
            ops.push(MapOp::SetVerdict(key, VERDICT_PREFIX_PORT, VerdictValue { rule: 1, verdict: verdict::ALLOW, reserved: [0; 3] }));
        }
    }
    for cast in CASTS {
        ops.push(MapOp::SetAddress(cast.friend, FRIEND));
        ops.push(MapOp::SetAddress(cast.stranger, STRANGER));
    }
    ops
}

/// Runs the bench.
///
/// # Errors
/// The object was not built, the kernel refuses, or a case does not do what its name says.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let effort =
        if quick { Effort { rounds: 9, repeat: 50_000, flows: 6_000 } } else { Effort { rounds: 61, repeat: 100_000, flows: 60_000 } };
    let mut rows = Vec::new();
    let yardsticks = Yardsticks::new()?;
    let (floor, empty) = yardsticks.floor(effort)?;
    rows.push(Row::plain("empty program, gross", empty, "ns"));
    rows.push(Row::plain("yardstick: HASH lookup, 4-byte key", floor, "ns"));
    let start = cpu();
    let mut rig = Rig::new("bench", FLOWS)?;
    rows.push(Row::plain("load the object and make the maps, CPU", (cpu() - start).as_secs_f64() * 1e3, "ms"));
    let start = cpu();
    rig.load_programs_again()?;
    rows.push(Row::plain("load the object on maps that are there, CPU", (cpu() - start).as_secs_f64() * 1e3, "ms"));
    let start = cpu();
    rig.load_again()?;
    rows.push(Row::plain("take what is pinned, CPU", (cpu() - start).as_secs_f64() * 1e3, "ms"));
    rig.apply(&policies())?;
    for cast in CASTS {
        for way in [direction::INGRESS, direction::EGRESS] {
            let name = |case: &str| format!("{case} {} {}", cast.name, if way == direction::EGRESS { "egress" } else { "ingress" });
            let mut bench = Bench { rig: &mut rig, cast, way, effort, yardsticks: &yardsticks };
            bench.unpoliced(&name, &mut rows)?;
            bench.established(&name, &mut rows)?;
            bench.denied(&name, &mut rows)?;
            bench.many_policies(&name, &mut rows)?;
            bench.many_cidrs(&name, &mut rows)?;
            bench.many_flows(&name, &mut rows)?;
            // What one pod opened counts against its cap, and 60,000 flows of each case do not fit one table.
            rig.forget_flows()?;
        }
    }
    Ok(rows)
}

struct Bench<'a> {
    rig: &'a mut Rig,
    cast: Cast,
    way: u8,
    effort: Effort,
    yardsticks: &'a Yardsticks,
}

/// A packet's cost beside the floor's.
fn row(name: String, cost: Cost) -> Row {
    Row::against(name, cost.net.max(0.0), "ns", cost.floor)
}

impl Bench<'_> {
    /// A packet's cost; checks what becomes of it.
    fn hot(&mut self, program: u8, frame: &[u8], passes: bool) -> anyhow::Result<Cost> {
        let (cost, result) = self.yardsticks.beside(self.rig.program(program)?, frame, self.effort, || {})?;
        ensure!((result == -1) == passes, "the program answers {result}");
        Ok(cost)
    }

    fn unpoliced(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        self.rig.pod(&image(false))?;
        let frame = packet(&self.cast, self.cast.nobody, self.way, self.way, 4_000, tcp(flags::ACK));
        let cost = self.hot(self.way, &frame, true)?;
        rows.push(row(name("A  no policy,"), cost).target(UNPOLICED));
        let cost = self.hot(self.way, &arp(), true)?;
        rows.push(row(name("   ARP, no policy,"), cost).target(UNPOLICED));
        Ok(())
    }

    fn established(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        self.rig.pod(&image(true))?;
        let (cast, way) = (self.cast, self.way);
        let back = way ^ 1;
        for (frame, direction) in [(flags::SYN, way), (flags::SYN | flags::ACK, back), (flags::ACK, way)]
            .map(|(flags, direction)| (packet(&cast, cast.friend, way, direction, 4_001, tcp(flags)), direction))
        {
            ensure!(self.rig.passes(direction, &frame)?, "the handshake passes");
        }
        let frame = packet(&cast, cast.friend, way, way, 4_001, tcp(flags::ACK));
        let cost = self.hot(way, &frame, true)?;
        rows.push(row(name("B  established,"), cost).target(ESTABLISHED));
        let frame = packet(&cast, cast.friend, way, back, 4_001, tcp(flags::ACK));
        let cost = self.hot(back, &frame, true)?;
        rows.push(row(name("B2 established, reply,"), cost).target(ESTABLISHED));
        let frame = packet(&cast, cast.friend, way, way, 4_002, Packet::udp);
        let cost = self.hot(way, &frame, true)?;
        rows.push(row(name("J  UDP,"), cost).target(ESTABLISHED));
        let cost = self.hot(way, &arp(), true)?;
        rows.push(row(name("   ARP,"), cost).target(UNPOLICED));
        Ok(())
    }

    fn denied(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let (cast, way) = (self.cast, self.way);
        let known = packet(&cast, cast.stranger, way, way, 4_003, tcp(flags::SYN));
        let unknown = packet(&cast, cast.nobody, way, way, 4_004, tcp(flags::SYN));
        // The first of these fills the ring.
        for (case, frame) in [("C  denied, known peer, ring full,", &known), ("C2 denied, unknown peer, ring full,", &unknown)] {
            let cost = self.hot(way, frame, false)?;
            rows.push(row(name(case), cost).target(DENIED));
        }
        let mut ring = self.rig.events()?;
        drop(take_events(&mut ring));
        // As many as the ring holds, then it is emptied.
        let effort = Effort { repeat: 5_000, rounds: self.effort.rounds * 2, ..self.effort };
        let (cost, _) = self.yardsticks.beside(self.rig.program(way)?, &known, effort, || drop(take_events(&mut ring)))?;
        rows.push(row(name("D  denied, event written,"), cost).target(DENIED));
        self.rig.configure(Config { flags: 0, pod_flows: FLOWS })?;
        let cost = self.hot(way, &known, false)?;
        rows.push(row(name("D0 denied, nobody listens,"), cost).target(DENIED));
        self.rig.configure(Config { flags: config_flag::TELL_DENIED, pod_flows: FLOWS })
    }

    /// Other pods' policies: each allows ten peers a port.
    fn many_policies(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let (cast, way) = (self.cast, self.way);
        let entry = |policy: u32, peer: u32| {
            let identity = 100 + (policy * 7 + peer) % 500;
            (VerdictKey { policy: POLICY + policy, identity, direction: way, protocol: TCP, port: PORT.to_be_bytes() }, VERDICT_PREFIX_PORT)
        };
        let value = VerdictValue { rule: 1, verdict: verdict::ALLOW, reserved: [0; 3] };
        let entries = |policies: std::ops::Range<u32>| policies.flat_map(|policy| (0..10).map(move |peer| entry(policy, peer)));
        let frame = packet(&cast, cast.stranger, way, way, 4_007, tcp(flags::SYN));
        let (mut present, mut one) = (1, None);
        for count in [1, 1_000] {
            let ops: Vec<MapOp> = entries(present..count).map(|(key, bits)| MapOp::SetVerdict(key, bits, value)).collect();
            self.rig.apply(&ops)?;
            present = count;
            let cost = self.hot(way, &frame, false)?;
            let name_of_row = name(&format!("P  denied, {count} policies,"));
            let row = match one {
                None => row(name_of_row, cost).target(DENIED),
                Some(ratio) => Row::against(name_of_row + " of those with 1", cost.net, "ns", ratio * cost.floor).target(FLAT),
            };
            rows.push(row.at(Plot::PacketCost, name("policies,"), f64::from(count)));
            one.get_or_insert(cost.net / cost.floor);
        }
        self.rig.apply(&entries(1..present).map(|(key, bits)| MapOp::RemoveVerdict(key, bits)).collect::<Vec<_>>())
    }

    fn many_cidrs(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let (cast, way) = (self.cast, self.way);
        for (kind, net_of) in [("of one address", None), ("wide", Some(cast.wide))] {
            let net_of = |index: u32| net_of.map_or_else(|| IpNet::from((cast.many)(index)), |wide| wide(index));
            let mut present = 0;
            for count in [1u32, 1_000, 10_000, 60_000] {
                let ops: Vec<MapOp> = (present..count).map(|index| MapOp::SetCidr(net_of(index), STRANGER)).collect();
                self.rig.apply(&ops)?;
                present = count;
                let frame = packet(&cast, net_of(count / 2).addr(), way, way, 4_005, tcp(flags::SYN));
                let cost = self.hot(way, &frame, false)?;
                let row = row(name(&format!("G  denied, {count} CIDRs {kind},")), cost).target(DENIED);
                rows.push(row.at(Plot::PacketCost, name(&format!("CIDRs {kind},")), f64::from(count)));
            }
            if kind == "of one address" {
                let frames: Vec<Vec<u8>> = (0..self.effort.flows)
                    .map(|index| packet(&cast, (cast.many)(index.wrapping_mul(7_919) % 60_000), way, way, 4_006, tcp(flags::SYN)))
                    .collect();
                let cost = self.alone(&frames)?;
                rows.push(row(name("H  denied, random peer of 60000, cold,"), cost));
            }
            let ops: Vec<MapOp> = (0..present).map(|index| MapOp::RemoveCidr(net_of(index))).collect();
            self.rig.apply(&ops)?;
        }
        Ok(())
    }

    fn many_flows(&mut self, name: &dyn Fn(&str) -> String, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let (cast, way) = (self.cast, self.way);
        let peers = (0..64).map(cast.many).map(|address| MapOp::SetAddress(address, FRIEND));
        self.rig.apply(&peers.collect::<Vec<_>>())?;
        let frame = |index: u32, flags: u8| {
            let port = 1_024 + u16::try_from(index / 64 % 60_000).expect("below 65,536");
            packet(&cast, (cast.many)(index % 64), way, way, port, tcp(flags))
        };
        let frames: Vec<Vec<u8>> = (0..self.effort.flows).map(|index| frame(index, flags::SYN)).collect();
        let cost = self.alone(&frames)?;
        rows.push(row(name("E  flow opens, cold,"), cost));
        let frames: Vec<Vec<u8>> =
            (0..self.effort.flows).map(|index| frame(index.wrapping_mul(7_919) % self.effort.flows, flags::ACK)).collect();
        let cost = self.alone(&frames)?;
        rows.push(row(name("F  random flow, cold,"), cost));
        let peers = (0..64).map(cast.many).map(MapOp::RemoveAddress);
        self.rig.apply(&peers.collect::<Vec<_>>())
    }

    /// The cost of packets that each come alone, less an empty program that comes alone.
    fn alone(&mut self, frames: &[Vec<u8>]) -> anyhow::Result<Cost> {
        let empty = cold(&self.yardsticks.empty, &frames[..frames.len().min(5_000)])?;
        let net = cold(self.rig.program(self.way)?, frames)? - empty;
        let (floor, _) = self.yardsticks.floor(Effort { rounds: 5, ..self.effort })?;
        Ok(Cost { net, floor })
    }
}
