//! Conversations at random: connections that open, are answered, reset, closed, left idle and opened again on the same ports, while
//! policy changes and the pod's slot is given away, packet by packet against a model of what a flow is. What the programs keep of a
//! flow, and where, is not the model's business.
//!
//! `DATAPATH_CONVERSATIONS` sets their number.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

use std::collections::HashMap;
use std::net::IpAddr;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use stanchion_core::policy::image::{EndpointImage, MapOp};
use stanchion_ebpf_abi::{VERDICT_PREFIX_PORT, VerdictKey, VerdictValue, direction, timeout, verdict};
use stanchion_lab::datapath::packet::{Packet, TCP, UDP, flags};
use stanchion_lab::datapath::{Rig, SLOT, stay_on_one_cpu};

const IN: u8 = direction::INGRESS;
const OUT: u8 = direction::EGRESS;
const FRIEND: u32 = 9;
/// Packets and events of a conversation.
const STEPS: usize = 400;
/// Idle times are multiples of this many ticks: none is less than nine below one of [`timeout`], so the ticks that pass meanwhile
/// change nothing.
const IDLE: u32 = 17;
/// Policy sets, by what they let the friend (or the pod, with the friend) open.
const SETS: [(u32, &[u16]); 3] = [(5, &[80, 53]), (6, &[]), (7, &[81])];
const PORTS: [u16; 4] = [80, 81, 53, 4_000];

/// A connection as both its directions name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ends {
    six: bool,
    peer: IpAddr,
    protocol: u8,
    pod_port: u16,
    peer_port: u16,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    opener: u8,
    /// Of the policy by which the opener was allowed.
    revision: u32,
    replied: bool,
    /// The opener spoke after a reply.
    stream: bool,
    /// By [`direction`] of who closed.
    closed: [bool; 2],
    reset: bool,
    idle: u32,
}

impl Flow {
    fn opened(opener: u8, revision: u32) -> Self {
        Self { opener, revision, replied: false, stream: false, closed: [false; 2], reset: false, idle: 0 }
    }

    fn lives(&self, protocol: u8) -> bool {
        let limit = match (protocol, self.closed) {
            (TCP, _) if self.reset => timeout::TCP_RESET,
            (TCP, [true, true]) => timeout::TCP_CLOSED,
            (TCP, [true, false] | [false, true]) => timeout::TCP_HALF_CLOSED,
            (TCP, _) if self.replied => timeout::TCP_ESTABLISHED,
            (TCP, _) => timeout::TCP_OPENING,
            _ if self.stream => timeout::UDP,
            _ if self.replied => timeout::DATAGRAM_EXCHANGE,
            _ => timeout::DATAGRAM_OPENING,
        };
        self.idle <= u32::from(limit)
    }

    /// A packet of it went `way`.
    fn note(&mut self, way: u8, protocol: u8, flag: u8) {
        self.idle = 0;
        self.stream |= self.replied && way == self.opener;
        self.replied |= way != self.opener;
        if protocol == TCP {
            // Whatever follows a reset shows that it was forged, or is history.
            self.reset = flag & flags::RST != 0;
            self.closed[usize::from(way)] |= !self.reset && flag & flags::FIN != 0;
        }
    }
}

/// The pod's policy and its flows.
struct Model {
    image: EndpointImage,
    flows: HashMap<Ends, Flow>,
}

impl Model {
    /// Whether `way` may be opened.
    fn allows(&self, way: u8, ends: Ends) -> bool {
        let Some(set) = (if way == IN { self.image.ingress } else { self.image.egress }) else { return true };
        let port = if way == IN { ends.pod_port } else { ends.peer_port };
        let (_, ports) = SETS.into_iter().find(|(number, _)| *number == set).unwrap();
        ends.peer == friend(ends.six) && ports.contains(&port)
    }

    fn passes(&mut self, way: u8, ends: Ends, flag: u8) -> bool {
        if self.image.ingress.is_none() && self.image.egress.is_none() {
            // No flows are kept of a pod without policy; when it gets one, the kernel's connection tracking tells them.
            return true;
        }
        let known = self.flows.get(&ends).copied().filter(|flow| flow.lives(ends.protocol));
        // A SYN opens another connection on the ports of one that has had more than SYNs.
        let reopens = ends.protocol == TCP && flag & (flags::SYN | flags::ACK) == flags::SYN;
        let known = known.filter(|flow| !(reopens && (flow.replied || flow.reset || flow.closed.contains(&true))));
        let revision = self.image.revision;
        match known {
            Some(flow) if flow.revision != revision && !self.allows(flow.opener, ends) => false,
            Some(mut flow) => {
                flow.revision = revision;
                flow.note(way, ends.protocol, flag);
                self.flows.insert(ends, flow);
                true
            }
            None if !self.allows(way, ends) => false,
            None => {
                // A reset opens nothing.
                if ends.protocol != TCP || flag & flags::RST == 0 {
                    let mut flow = Flow::opened(way, revision);
                    flow.note(way, ends.protocol, flag);
                    self.flows.insert(ends, flow);
                }
                true
            }
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(six: bool) -> IpAddr {
    ip(if six { "fd00::10" } else { "10.0.0.10" })
}

fn friend(six: bool) -> IpAddr {
    ip(if six { "fd00::20" } else { "10.0.0.20" })
}

fn stranger(six: bool) -> IpAddr {
    ip(if six { "fd00::30" } else { "10.0.0.30" })
}

fn ends(rng: &mut StdRng) -> Ends {
    let six = rng.random_bool(0.5);
    let peer = if rng.random_bool(0.9) { friend(six) } else { stranger(six) };
    let mut port = || *PORTS.choose(rng).unwrap();
    let (pod_port, peer_port) = (port(), port());
    Ends { six, peer, protocol: if rng.random_bool(0.7) { TCP } else { UDP }, pod_port, peer_port }
}

fn frame(way: u8, ends: Ends, flag: u8) -> Vec<u8> {
    let (pod, peer) = ((pod(ends.six), ends.pod_port), (ends.peer, ends.peer_port));
    let (source, destination) = if way == OUT { (pod, peer) } else { (peer, pod) };
    let packet = if ends.protocol == TCP { Packet::tcp(source, destination, flag) } else { Packet::udp(source, destination) };
    packet.frame()
}

/// A policy of the pod, under a revision.
fn image(rng: &mut StdRng, revision: u32) -> EndpointImage {
    let mut set = || rng.random_bool(0.75).then(|| SETS.choose(rng).unwrap().0);
    let (ingress, egress) = (set(), set());
    EndpointImage {
        addresses: vec![pod(false), pod(true)],
        ingress,
        egress,
        revision,
        by_name: rng.random_bool(0.3),
        ..EndpointImage::default()
    }
}

/// Gives the slot anew: a CPU would keep what it knows until the real tick ends.
fn anew(rig: &mut Rig, image: &EndpointImage) {
    rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
    rig.pod(image).unwrap();
}

#[test]
fn random_conversations_fare_as_a_model_of_flows_says() {
    let conversations: u64 = std::env::var("DATAPATH_CONVERSATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    stay_on_one_cpu().unwrap();
    let mut rig = Rig::new("conversations", 1_024).unwrap();
    let mut ops = Vec::new();
    for (policy, ports) in SETS {
        for (port, way, protocol) in
            ports.iter().flat_map(|port| [IN, OUT].map(|way| (*port, way))).flat_map(|(p, w)| [TCP, UDP].map(|it| (p, w, it)))
        {
            let key = VerdictKey { policy, identity: FRIEND, direction: way, protocol, port: port.to_be_bytes() };
            ops.push(MapOp::SetVerdict(key, VERDICT_PREFIX_PORT, VerdictValue { rule: 1, verdict: verdict::ALLOW, reserved: [0; 3] }));
        }
    }
    ops.extend([false, true].map(|six| MapOp::SetAddress(friend(six), FRIEND)));
    rig.apply(&ops).unwrap();
    let (mut passed, mut dropped) = (0, 0);
    for seed in 0..conversations {
        let rng = &mut StdRng::seed_from_u64(seed);
        let mut model = Model { image: image(rng, 1), flows: HashMap::new() };
        rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
        rig.forget_flows().unwrap();
        rig.pod(&model.image).unwrap();
        // Few connections at a time, so that something happens to each.
        let mut talk: Vec<Ends> = (0..4).map(|_| ends(rng)).collect();
        let mut told = Vec::new();
        for _ in 0..STEPS {
            match rng.random_range(0..100) {
                0..3 => {
                    model.image = image(rng, model.image.revision + 1);
                    rig.pod(&model.image).unwrap();
                    told.push(format!("{:?}", model.image));
                }
                3..5 => {
                    let ticks = IDLE * *[1, 2, 3, 4, 10, 11, 100, 211, 212, 1_270].choose(rng).unwrap();
                    rig.grow_old(ticks).unwrap();
                    anew(&mut rig, &model.image);
                    model.flows.values_mut().for_each(|flow| flow.idle += ticks);
                    told.push(format!("{ticks} ticks"));
                }
                5 => {
                    // Another pod, whose revisions begin again; the collector has taken the flows of the one before.
                    rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
                    rig.forget_flows().unwrap();
                    model = Model { image: image(rng, 1), flows: HashMap::new() };
                    rig.pod(&model.image).unwrap();
                    told.push(format!("another pod: {:?}", model.image));
                }
                6..9 => talk[rng.random_range(0..4)] = ends(rng),
                _ => {
                    let ends = *talk.choose(rng).unwrap();
                    let way = if rng.random_bool(0.5) { IN } else { OUT };
                    let kinds = [flags::SYN, flags::SYN | flags::ACK, flags::FIN | flags::ACK, flags::RST];
                    let flag = if rng.random_bool(0.6) { flags::ACK } else { *kinds.choose(rng).unwrap() };
                    let wanted = model.passes(way, ends, flag);
                    told.push(format!("{ends:?} {way} {flag:#x}: {wanted}"));
                    let found = rig.passes(way, &frame(way, ends, flag)).unwrap();
                    assert_eq!(found, wanted, "seed {seed}: {told:#?}");
                    // The table learns of the opener's next datagram when a CPU that kept the last one asks it.
                    let is_exchange = |flow: &Flow| ends.protocol == UDP && way != flow.opener && !flow.stream;
                    if model.flows.get(&ends).is_some_and(is_exchange) {
                        anew(&mut rig, &model.image);
                    }
                    passed += u32::from(found);
                    dropped += u32::from(!found);
                }
            }
        }
    }
    println!("{passed} passed, {dropped} dropped");
    assert!(passed > dropped / 4 && dropped > passed / 4, "{passed} passed, {dropped} dropped: they are too much alike");
}
