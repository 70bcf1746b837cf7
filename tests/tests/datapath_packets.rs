//! What the programs do with single packets, by `BPF_PROG_TEST_RUN`.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use stanchion_core::policy::image::{EndpointImage, MapOp, Slot};
use stanchion_daemon::netpol::{LoadOptions, POD_EGRESS, POD_INGRESS, load};
use stanchion_ebpf_abi::{
    Config, FlowKey4, LAYOUT_VERSION, VERDICT_PREFIX_ANY, VERDICT_PREFIX_PORT, VERDICT_PREFIX_PROTOCOL, VerdictKey, VerdictValue,
    config_flag, direction, event_verdict, ipv4_word, map_name, reason, verdict,
};
use stanchion_lab::datapath::packet::{Fragment, ICMP, ICMPV6, Packet, SCTP, TCP, UDP, arp, flags};
use stanchion_lab::datapath::{Rig, SLOT, flow_bytes, flow_entry, key4, stay_on_one_cpu, take_events};
use stanchion_lab::stray::Maker;

const IN: u8 = direction::INGRESS;
const OUT: u8 = direction::EGRESS;

/// Policy set of the isolated pod; allows [`FRIEND`] on port 80 of TCP, UDP and SCTP, and ICMP, both ways.
const SET: u32 = 5;
const FRIEND: u32 = 9;
const RULE: u32 = 77;

/// Addresses of one family.
#[derive(Clone, Copy)]
struct Cast {
    pod: IpAddr,
    friend: IpAddr,
    stranger: IpAddr,
    node: IpAddr,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn casts() -> [Cast; 2] {
    let four = Cast { pod: ip("10.0.0.10"), friend: ip("10.0.0.20"), stranger: ip("10.0.0.30"), node: ip("10.0.0.1") };
    let six = Cast { pod: ip("fd00::10"), friend: ip("fd00::20"), stranger: ip("fd00::30"), node: ip("fd00::1") };
    [four, six]
}

fn image(ingress: Option<u32>, egress: Option<u32>) -> EndpointImage {
    EndpointImage { addresses: casts().map(|cast| cast.pod).to_vec(), ingress, egress, revision: 1, ..EndpointImage::default() }
}

fn isolated() -> EndpointImage {
    image(Some(SET), Some(SET))
}

fn allow(policy: u32, identity: u32, direction: u8, protocol: u8, port: u16, bits: u32) -> MapOp {
    let key = VerdictKey { policy, identity, direction, protocol, port: port.to_be_bytes() };
    MapOp::SetVerdict(key, bits, VerdictValue { rule: RULE, verdict: verdict::ALLOW, reserved: [0; 3] })
}

/// A rig with the cast's policy and an isolated pod.
fn rig(name: &str) -> Rig {
    let mut rig = Rig::new(name, 1_024).unwrap();
    let mut ops = Vec::new();
    for way in [IN, OUT] {
        for protocol in [TCP, UDP, SCTP] {
            ops.push(allow(SET, FRIEND, way, protocol, 80, VERDICT_PREFIX_PORT));
        }
        for protocol in [ICMP, ICMPV6] {
            ops.push(allow(SET, FRIEND, way, protocol, 0, VERDICT_PREFIX_PROTOCOL));
        }
    }
    for cast in casts() {
        ops.push(MapOp::SetAddress(cast.friend, FRIEND));
        ops.push(MapOp::SetNodeAddress(cast.node));
    }
    rig.apply(&ops).unwrap();
    rig.pod(&isolated()).unwrap();
    rig
}

impl Cast {
    /// A packet of a connection between the pod and a peer: the one that opened it used port `client`.
    fn packet(
        &self,
        peer: IpAddr,
        opener: u8,
        way: u8,
        ports: (u16, u16),
        make: impl Fn((IpAddr, u16), (IpAddr, u16)) -> Packet,
    ) -> Packet {
        let (client, server) = ports;
        let (pod_port, peer_port) = if opener == OUT { (client, server) } else { (server, client) };
        let (pod, peer) = ((self.pod, pod_port), (peer, peer_port));
        if way == OUT { make(pod, peer) } else { make(peer, pod) }
    }
}

fn tcp(flags: u8) -> impl Fn((IpAddr, u16), (IpAddr, u16)) -> Packet + Copy {
    move |source, destination| Packet::tcp(source, destination, flags)
}

/// The shortest frame that the kernel's test run takes: it wants a whole IP header.
fn least(cast: &Cast) -> usize {
    if cast.pod.is_ipv4() { 34 } else { 54 }
}

#[track_caller]
fn check(rig: &mut Rig, way: u8, packet: &Packet, passes: bool, what: &str) {
    assert_eq!(rig.passes(way, &packet.frame()).unwrap(), passes, "{what}: {packet:?}");
}

#[test]
fn an_allowed_flow_passes_both_ways_and_nothing_else_does() {
    let mut rig = rig("flows");
    for cast in casts() {
        for (opener, client) in [(IN, 4_000), (OUT, 5_000)] {
            let back = opener ^ 1;
            for (make, name) in [
                (Packet::udp as fn((IpAddr, u16), (IpAddr, u16)) -> Packet, "UDP"),
                (Packet::sctp, "SCTP"),
                (|s, d| Packet::tcp(s, d, flags::SYN), "TCP"),
            ] {
                let ports = (client, 80);
                check(&mut rig, back, &cast.packet(cast.friend, opener, back, ports, make), false, "a reply to nothing");
                check(&mut rig, opener, &cast.packet(cast.friend, opener, opener, (client, 81), make), false, "another port");
                check(&mut rig, opener, &cast.packet(cast.stranger, opener, opener, ports, make), false, "another peer");
                check(&mut rig, opener, &cast.packet(cast.friend, opener, opener, ports, make), true, name);
                let reply: fn((IpAddr, u16), (IpAddr, u16)) -> Packet =
                    if name == "TCP" { |s, d| Packet::tcp(s, d, flags::SYN | flags::ACK) } else { make };
                check(&mut rig, back, &cast.packet(cast.friend, opener, back, ports, reply), true, "its reply");
                check(&mut rig, back, &cast.packet(cast.friend, opener, back, (client + 1, 80), reply), false, "a reply to another flow");
            }
        }
    }
}

#[test]
fn an_echo_is_a_flow_by_its_identifier() {
    let mut rig = rig("echo");
    for (cast, (request, reply)) in casts().into_iter().zip([(8, 0), (128, 129)]) {
        // Only the pod may ask.
        let key =
            VerdictKey { policy: SET, identity: FRIEND, direction: IN, protocol: if request == 8 { ICMP } else { ICMPV6 }, port: [0; 2] };
        rig.apply(&[MapOp::RemoveVerdict(key, VERDICT_PREFIX_PROTOCOL)]).unwrap();
        let answer = |id| Packet::icmp(cast.friend, cast.pod, reply, &[0, id, 0, 1]);
        check(&mut rig, IN, &answer(7), false, "an answer to nothing");
        check(&mut rig, OUT, &Packet::icmp(cast.pod, cast.friend, request, &[0, 7, 0, 1]), true, "the question");
        check(&mut rig, IN, &answer(7), true, "its answer");
        check(&mut rig, IN, &answer(8), false, "the answer to another question");
        check(&mut rig, IN, &Packet::icmp(cast.friend, cast.pod, request, &[0, 9, 0, 1]), false, "a question to the pod");
    }
}

#[test]
fn an_error_about_a_known_flow_passes_and_about_an_unknown_one_is_judged_as_icmp() {
    let mut rig = rig("errors");
    for (cast, kind) in casts().into_iter().zip([3, 1]) {
        let router = cast.stranger;
        let sent = cast.packet(cast.friend, OUT, OUT, (4_000, 80), tcp(flags::SYN));
        let about = |packet: &Packet| Packet::icmp_error(router, cast.pod, kind, packet);
        check(&mut rig, IN, &about(&sent), false, "about a flow that was not sent");
        check(&mut rig, OUT, &sent, true, "the flow");
        check(&mut rig, IN, &about(&sent), true, "about the flow");
        let other = cast.packet(cast.friend, OUT, OUT, (4_001, 80), tcp(flags::SYN));
        check(&mut rig, IN, &about(&other), false, "about another flow");
        // What the pod answers about a packet that it received, where no rule lets it send ICMP.
        let icmp = if cast.pod.is_ipv4() { ICMP } else { ICMPV6 };
        let key = VerdictKey { policy: SET, identity: FRIEND, direction: OUT, protocol: icmp, port: [0; 2] };
        rig.apply(&[MapOp::RemoveVerdict(key, VERDICT_PREFIX_PROTOCOL)]).unwrap();
        let got = cast.packet(cast.friend, IN, IN, (4_002, 80), Packet::udp);
        let complaint = |to| Packet::icmp_error(cast.pod, to, kind, &got);
        check(&mut rig, OUT, &complaint(cast.friend), false, "about a packet that did not come");
        check(&mut rig, IN, &got, true, "the packet");
        check(&mut rig, OUT, &complaint(cast.friend), true, "about it");
        check(&mut rig, OUT, &complaint(router), false, "about it, to somebody who did not send it");
        // Every cut of the quotation is refused or judged, never mistaken.
        let frame = about(&other).frame();
        for length in least(&cast)..frame.len() {
            assert!(!rig.passes(IN, &frame[..length]).unwrap(), "an error cut to {length} bytes");
        }
    }
}

#[test]
fn a_syn_on_an_old_entry_is_judged_anew() {
    let mut rig = rig("syn");
    for cast in casts() {
        // A flow that the pod opened to the friend's port 80, from its own port 80.
        let ports = (80, 80);
        for (way, flags) in [(OUT, flags::SYN), (IN, flags::SYN | flags::ACK), (OUT, flags::ACK)] {
            check(&mut rig, way, &cast.packet(cast.friend, OUT, way, ports, tcp(flags)), true, "the handshake");
        }
        // Both ends' ports are 80, so policy lets the friend open one, too. Revoke that.
        let key = VerdictKey { policy: SET, identity: FRIEND, direction: IN, protocol: TCP, port: 80u16.to_be_bytes() };
        rig.apply(&[MapOp::RemoveVerdict(key, VERDICT_PREFIX_PORT)]).unwrap();
        check(&mut rig, IN, &cast.packet(cast.friend, OUT, IN, ports, tcp(flags::SYN)), false, "the friend's SYN on the pod's flow");
        check(&mut rig, IN, &cast.packet(cast.friend, OUT, IN, ports, tcp(flags::ACK)), true, "the flow goes on");
        check(&mut rig, OUT, &cast.packet(cast.friend, OUT, OUT, ports, tcp(flags::SYN)), true, "the pod uses the ports again");
        check(&mut rig, IN, &cast.packet(cast.friend, OUT, IN, ports, tcp(flags::SYN | flags::ACK)), true, "and is answered");
        rig.apply(&[allow(SET, FRIEND, IN, TCP, 80, VERDICT_PREFIX_PORT)]).unwrap();
    }
}

#[test]
fn a_flow_lives_through_a_change_that_still_allows_it_and_ends_with_one_that_does_not() {
    let mut rig = rig("revision");
    for cast in casts() {
        let ports = (4_000, 80);
        let there = cast.packet(cast.friend, IN, IN, ports, tcp(flags::ACK));
        let back = cast.packet(cast.friend, IN, OUT, ports, tcp(flags::ACK));
        rig.pod(&isolated()).unwrap();
        check(&mut rig, IN, &cast.packet(cast.friend, IN, IN, ports, tcp(flags::SYN)), true, "opens");
        check(&mut rig, OUT, &cast.packet(cast.friend, IN, OUT, ports, tcp(flags::SYN | flags::ACK)), true, "is answered");
        // Egress closes entirely: the reply belongs to a flow that ingress still allows.
        rig.pod(&EndpointImage { egress: Some(SET + 1), revision: 2, ..isolated() }).unwrap();
        check(&mut rig, OUT, &back, true, "the reply after an unrelated change");
        check(&mut rig, IN, &there, true, "goes on");
        // Ingress closes: both directions stop at the next packet, whichever it is.
        rig.pod(&EndpointImage { ingress: Some(SET + 1), revision: 3, ..isolated() }).unwrap();
        check(&mut rig, OUT, &back, false, "the reply of a revoked flow");
        check(&mut rig, IN, &there, false, "a revoked flow");
        rig.pod(&EndpointImage { revision: 4, ..isolated() }).unwrap();
        check(&mut rig, OUT, &back, true, "the flow is allowed again");
    }
}

/// What a CPU keeps of a flow for the rest of a tick stands for that flow's packets, and for no others.
#[test]
fn what_a_cpu_keeps_of_a_flow_is_no_other_ones_and_ends_with_the_tick() {
    stay_on_one_cpu().unwrap();
    let mut rig = rig("recent");
    let [four, six] = casts();
    // Its peer's address begins with the bytes of `four`'s and goes on with zeros: the keys of a pod without IPv6 do not differ otherwise.
    let lookalike = Cast { friend: ip("a00:14::"), ..six };
    let alone = EndpointImage { addresses: vec![four.pod], ..isolated() };
    let ports = (4_000, 80);
    let ack = tcp(flags::ACK);
    for cast in [four, six] {
        let pod = if cast.pod.is_ipv4() { &alone } else { &isolated() };
        let packet = |way, flags| cast.packet(cast.friend, IN, way, ports, tcp(flags));
        // A flow that the table no longer has and that this CPU still knows in both directions. A tick may end between the two.
        let known = |rig: &mut Rig| {
            for _ in 0..10 {
                rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
                rig.pod(pod).unwrap();
                rig.forget_flows().unwrap();
                check(rig, IN, &packet(IN, flags::SYN), true, "opens");
                check(rig, OUT, &packet(OUT, flags::SYN | flags::ACK), true, "is answered");
                for way in [IN, OUT, IN, OUT] {
                    check(rig, way, &packet(way, flags::ACK), true, "goes on");
                }
                rig.forget_flows().unwrap();
                if rig.passes(OUT, &packet(OUT, flags::ACK).frame()).unwrap() {
                    return;
                }
            }
            panic!("no CPU keeps anything of a flow");
        };
        for flags in [flags::FIN | flags::ACK, flags::RST, flags::SYN | flags::ACK] {
            known(&mut rig);
            check(&mut rig, OUT, &packet(OUT, flags), false, "what changes a flow is for the table");
        }
        let other = |peer, ports| cast.packet(peer, IN, OUT, ports, ack);
        known(&mut rig);
        check(&mut rig, OUT, &cast.packet(cast.friend, IN, OUT, ports, Packet::udp), false, "the other protocol");
        check(&mut rig, OUT, &other(cast.stranger, ports), false, "another peer");
        check(&mut rig, OUT, &other(cast.friend, (4_001, 80)), false, "another port");
        check(&mut rig, OUT, &other(cast.friend, (4_000, 81)), false, "another port of the pod");
        if cast.pod.is_ipv4() {
            check(&mut rig, IN, &lookalike.packet(lookalike.friend, IN, IN, ports, ack), false, "the other family");
        }

        known(&mut rig);
        rig.pod(&EndpointImage { ingress: Some(SET + 1), revision: 2, ..pod.clone() }).unwrap();
        check(&mut rig, OUT, &packet(OUT, flags::ACK), false, "another revision");
        check(&mut rig, IN, &packet(IN, flags::ACK), false, "another revision");

        known(&mut rig);
        rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
        check(&mut rig, OUT, &packet(OUT, flags::ACK), false, "the pod is gone");
        rig.pod(pod).unwrap();
        check(&mut rig, OUT, &packet(OUT, flags::ACK), false, "the slot is another pod's, at the same revision");

        // One direction only: nothing came back.
        rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
        rig.pod(pod).unwrap();
        rig.forget_flows().unwrap();
        for _ in 0..3 {
            check(&mut rig, IN, &cast.packet(cast.friend, IN, IN, ports, Packet::udp), true, "a datagram of the opener");
        }
        rig.forget_flows().unwrap();
        check(&mut rig, OUT, &cast.packet(cast.friend, IN, OUT, ports, Packet::udp), false, "the other direction");

        known(&mut rig);
        let until = Instant::now() + Duration::from_secs(10);
        while rig.passes(OUT, &packet(OUT, flags::ACK).frame()).unwrap() {
            assert!(Instant::now() < until, "kept beyond the tick");
        }
    }
}

#[test]
fn an_idle_flow_is_forgotten_after_its_time() {
    let mut rig = rig("idle");
    let cast = casts()[0];
    let key = key4(FlowKey4 {
        slot: SLOT.0,
        protocol: TCP,
        local: 0,
        local_port: 4_000u16.to_be_bytes(),
        remote_port: 80u16.to_be_bytes(),
        remote: ipv4_word([10, 0, 0, 20]),
    });
    let packet = |way, flags| cast.packet(cast.friend, OUT, way, (4_000, 80), tcp(flags));
    check(&mut rig, OUT, &packet(OUT, flags::SYN), true, "opens");
    let mut flows = rig.flows4().unwrap();
    let mut timeout = |flags: &[(u8, u8)]| {
        for (way, flags) in flags {
            check(&mut rig, *way, &packet(*way, *flags), true, "a packet of the flow");
        }
        flow_entry(flows.get(&key, 0).unwrap()).timeout
    };
    let both = flags::FIN | flags::ACK;
    assert_eq!(timeout(&[]), stanchion_ebpf_abi::timeout::TCP_OPENING);
    assert_eq!(timeout(&[(IN, flags::SYN | flags::ACK)]), stanchion_ebpf_abi::timeout::TCP_ESTABLISHED);
    assert_eq!(timeout(&[(OUT, flags::RST)]), stanchion_ebpf_abi::timeout::TCP_RESET);
    assert_eq!(timeout(&[(IN, flags::ACK)]), stanchion_ebpf_abi::timeout::TCP_ESTABLISHED, "a forged reset is taken back");
    assert_eq!(timeout(&[(OUT, both)]), stanchion_ebpf_abi::timeout::TCP_HALF_CLOSED);
    assert_eq!(timeout(&[(IN, both)]), stanchion_ebpf_abi::timeout::TCP_CLOSED);
    let mut entry = flow_entry(flows.get(&key, 0).unwrap());
    entry.seen = entry.seen.wrapping_sub(u32::from(entry.timeout) + 2);
    flows.insert(key, flow_bytes(entry), 0).unwrap();
    check(&mut rig, IN, &packet(IN, flags::ACK), false, "a reply after the flow's time");
    check(&mut rig, OUT, &packet(OUT, flags::ACK), true, "the opener's packet is judged and opens it again");
    check(&mut rig, IN, &packet(IN, flags::ACK), true, "which lets replies in");
}

/// A question and its answer are soon forgotten, as nf_conntrack does it; what the opener goes on with is not.
#[test]
fn a_datagram_exchange_ends_soon_and_a_stream_does_not() {
    use stanchion_ebpf_abi::timeout::{DATAGRAM_EXCHANGE, DATAGRAM_OPENING, UDP as UDP_STREAM};
    stay_on_one_cpu().unwrap();
    let mut rig = rig("stream");
    let cast = casts()[0];
    for opener in [OUT, IN] {
        let back = opener ^ 1;
        for (port, packets) in [
            (4_000, [(opener, DATAGRAM_OPENING), (back, DATAGRAM_EXCHANGE), (back, DATAGRAM_EXCHANGE), (opener, UDP_STREAM)].as_slice()),
            // Two questions at once, as glibc asks for both families.
            (4_001, &[(opener, DATAGRAM_OPENING), (opener, DATAGRAM_OPENING), (opener, DATAGRAM_OPENING), (back, DATAGRAM_EXCHANGE)]),
            // A CPU has kept the second question for the rest of the tick.
            (4_001, &[(back, DATAGRAM_EXCHANGE), (opener, UDP_STREAM), (back, UDP_STREAM), (opener, UDP_STREAM)]),
        ] {
            let (pod_port, peer_port) = if opener == OUT { (port, 80) } else { (80, port) };
            let key = key4(FlowKey4 {
                slot: SLOT.0,
                protocol: UDP,
                local: 0,
                local_port: u16::to_be_bytes(pod_port),
                remote_port: u16::to_be_bytes(peer_port),
                remote: ipv4_word([10, 0, 0, 20]),
            });
            rig.apply(&[MapOp::RemoveEndpoint(SLOT)]).unwrap();
            rig.pod(&isolated()).unwrap();
            for (index, (way, timeout)) in packets.iter().enumerate() {
                check(&mut rig, *way, &cast.packet(cast.friend, opener, *way, (port, 80), Packet::udp), true, "a packet of the flow");
                let entry = flow_entry(rig.flows4().unwrap().get(&key, 0).unwrap());
                assert_eq!(entry.timeout, *timeout, "opened {opener}, port {port}, packet {index}");
            }
        }
    }
}

/// A pod asks for 100 names a second, each from a port of its own, as a resolver does; a tick is a second at least.
#[test]
fn a_pod_that_asks_for_a_hundred_names_a_second_loses_no_answer() {
    let network = stanchion_core::config::Config::read(&|_| None).unwrap().network;
    let mut rig = rig_of("lookups", network.policy_flows, network.policy_pod_flows);
    rig.apply(&[allow(SET, FRIEND, OUT, UDP, 53, VERDICT_PREFIX_PORT)]).unwrap();
    let cast = casts()[0];
    for first in (10_000..30_000).step_by(1_000) {
        for port in first..first + 1_000 {
            let packet = |way| cast.packet(cast.friend, OUT, way, (port, 53), Packet::udp);
            check(&mut rig, OUT, &packet(OUT), true, "the question");
            check(&mut rig, IN, &packet(IN), true, "its answer");
        }
        // As often as the agent.
        rig.grow_old(10).unwrap();
        rig.collect().unwrap();
    }
}

#[test]
fn options_and_extension_headers_do_not_shift_the_ports() {
    let mut rig = rig("options");
    let [four, six] = casts();
    for words in 1..=10 {
        let mut packet = four.packet(four.friend, IN, IN, (4_000 + words, 81), Packet::udp);
        // The four bytes where a careless reader looks for ports say: from 4000 to 80.
        packet.options = [[0x0f, 0xa0, 0, 80]; 1].concat().repeat(usize::from(words));
        check(&mut rig, IN, &packet, false, "port 81 behind options");
        packet.body[2..4].copy_from_slice(&80u16.to_be_bytes());
        check(&mut rig, IN, &packet, true, "port 80 behind options");
    }
    for number in [0, 43, 60, 135] {
        for count in 1..=7 {
            let mut packet = six.packet(six.friend, IN, IN, (4_000, 81), Packet::udp);
            packet.extensions = vec![(number, vec![0, 1, 0, 80, 0, 80, 0, 80, 0, 80, 0, 80, 0, 80, 0, 80]); count];
            check(&mut rig, IN, &packet, false, "port 81 behind extension headers");
            packet.body[2..4].copy_from_slice(&80u16.to_be_bytes());
            check(&mut rig, IN, &packet, true, "port 80 behind extension headers");
        }
        let mut packet = six.packet(six.friend, IN, IN, (4_000, 80), Packet::udp);
        packet.extensions = vec![(number, vec![0; 8]); 9];
        check(&mut rig, IN, &packet, false, "more extension headers than anybody uses");
    }
    let mut packet = six.packet(six.friend, IN, IN, (4_000, 80), Packet::udp);
    packet.extensions = vec![(51, [[0, 4, 0, 0, 0, 0, 0, 1].as_slice(), &[0; 16]].concat())];
    check(&mut rig, IN, &packet, true, "an authentication header counts in words");
}

#[test]
fn fragments_follow_their_first() {
    let mut rig = rig("fragments");
    for cast in casts() {
        for (id, port, passes) in [(7, 80, true), (8, 81, false)] {
            let whole = cast.packet(cast.friend, IN, IN, (4_000, port), Packet::udp);
            let piece = |offset: u16, more| Packet {
                body: if offset == 0 { whole.body[..24].to_vec() } else { vec![0, 80, 0, 80, 1, 2] },
                fragment: Some(Fragment { id, offset, more }),
                ..whole.clone()
            };
            check(&mut rig, IN, &piece(3, false), false, "a later fragment before the first");
            check(&mut rig, IN, &piece(0, true), passes, "the first fragment");
            check(&mut rig, IN, &piece(3, true), passes, "a middle fragment");
            check(&mut rig, IN, &piece(9, false), passes, "the last fragment");
            check(&mut rig, OUT, &piece(3, false), false, "a fragment of the other direction");
            // A second datagram of the same flow, and one in reply.
            for (way, id) in [(IN, 20 + id), (OUT, 30 + id)] {
                let whole = cast.packet(cast.friend, IN, way, (4_000, port), Packet::udp);
                for (offset, more) in [(0, true), (3, false)] {
                    let body = if offset == 0 { whole.body[..24].to_vec() } else { vec![0; 6] };
                    let piece = Packet { body, fragment: Some(Fragment { id, offset, more }), ..whole.clone() };
                    check(&mut rig, way, &piece, passes, "a datagram of a flow that is known");
                }
            }
        }
        let whole = cast.packet(cast.friend, IN, IN, (4_000, 80), tcp(flags::SYN));
        let first = Packet { fragment: Some(Fragment { id: 9, offset: 0, more: true }), ..whole.clone() };
        check(&mut rig, IN, &first, true, "the first fragment of TCP");
        let second = Packet { fragment: Some(Fragment { id: 9, offset: 1, more: false }), ..whole.clone() };
        check(&mut rig, IN, &second, false, "a fragment that would rewrite the flags");
        let tiny = Packet { body: whole.body[..8].to_vec(), fragment: Some(Fragment { id: 10, offset: 0, more: true }), ..whole };
        check(&mut rig, IN, &tiny, false, "a first fragment without the whole header");
    }
}

#[test]
fn a_packet_cut_anywhere_is_dropped() {
    let mut rig = rig("cut");
    for cast in casts() {
        let header = least(&cast);
        let makes: [(Packet, usize); 4] = [
            (cast.packet(cast.friend, IN, IN, (4_000, 80), tcp(flags::SYN)), 20),
            (cast.packet(cast.friend, IN, IN, (4_001, 80), Packet::udp), 8),
            (cast.packet(cast.friend, IN, IN, (4_002, 80), Packet::sctp), 12),
            (Packet::icmp(cast.friend, cast.pod, if cast.pod.is_ipv4() { 8 } else { 128 }, &[0; 8]), 8),
        ];
        for (packet, transport) in makes {
            let frame = packet.frame();
            for length in least(&cast)..frame.len() {
                let passes = rig.passes(IN, &frame[..length]).unwrap();
                assert_eq!(passes, length >= header + transport, "protocol {} cut to {length} bytes", packet.protocol);
            }
            // The frame is long enough, but the IP header says that its packet is not.
            let mut short = frame.clone();
            let claimed = u16::try_from(transport - 1).unwrap();
            if cast.pod.is_ipv4() {
                short[16..18].copy_from_slice(&(20 + claimed).to_be_bytes());
            } else {
                short[18..20].copy_from_slice(&claimed.to_be_bytes());
            }
            assert!(!rig.passes(IN, &short).unwrap(), "protocol {} with padding for a header", packet.protocol);
        }
        let mut frame = cast.packet(cast.friend, IN, IN, (4_003, 80), Packet::udp).frame();
        for version in (0..16).filter(|version| *version != if cast.pod.is_ipv4() { 4 } else { 6 }) {
            frame[14] = version << 4 | 5;
            assert!(!rig.passes(IN, &frame).unwrap(), "IP version {version}");
        }
    }
    let mut frame = casts()[0].packet(ip("10.0.0.20"), IN, IN, (4_003, 80), Packet::udp).frame();
    for words in 0..5 {
        frame[14] = 0x40 | words;
        assert!(!rig.passes(IN, &frame).unwrap(), "an IPv4 header of {words} words");
    }
}

#[test]
fn a_pod_sends_only_from_its_own_addresses_with_or_without_policy() {
    let mut rig = rig("source");
    for image in [isolated(), image(None, None)] {
        rig.pod(&image).unwrap();
        for cast in casts() {
            let own = Packet::tcp((cast.pod, 4_000), (cast.friend, 80), flags::SYN);
            check(&mut rig, OUT, &own, true, "its own address");
            for foreign in [cast.friend, cast.stranger, cast.node] {
                check(&mut rig, OUT, &Packet::tcp((foreign, 4_000), (cast.friend, 80), flags::SYN), false, "a foreign address");
                check(&mut rig, OUT, &Packet::udp((foreign, 80), (cast.friend, 4_000)), false, "a foreign address");
            }
        }
        check(&mut rig, OUT, &Packet::udp((ip("0.0.0.0"), 68), (ip("255.255.255.255"), 67)), false, "no address");
        check(&mut rig, OUT, &Packet::udp((ip("fe80::1"), 546), (ip("ff02::1:2"), 547)), false, "a link-local address");
        assert!(rig.passes(OUT, &arp()).unwrap(), "ARP");
        assert!(rig.passes(IN, &arp()).unwrap(), "ARP");
        for ethertype in [0x8100u16, 0x88a8, 0x8847, 0x88e5, 0x8864, 0x0842, 0x9000, 0x0600, 0xffff] {
            let mut frame = Packet::tcp((casts()[0].pod, 4_000), (casts()[0].friend, 80), flags::SYN).frame();
            frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            assert!(!rig.passes(OUT, &frame).unwrap(), "ethertype {ethertype:#06x}");
        }
    }
    // A second address of the family, known by slot.
    for base in [isolated(), image(None, None)] {
        let mut addresses = base.addresses.clone();
        addresses.extend([ip("10.0.0.11"), ip("fd00::11")]);
        rig.pod(&EndpointImage { addresses, revision: 2, ..base.clone() }).unwrap();
        check(&mut rig, OUT, &Packet::tcp((ip("10.0.0.11"), 4_000), (ip("10.0.0.20"), 80), flags::SYN), true, "its second address");
        check(&mut rig, OUT, &Packet::tcp((ip("fd00::11"), 4_000), (ip("fd00::20"), 80), flags::SYN), true, "its second address");
        rig.pod(&EndpointImage { revision: 3, ..base }).unwrap();
        check(&mut rig, OUT, &Packet::tcp((ip("10.0.0.11"), 4_000), (ip("10.0.0.20"), 80), flags::SYN), false, "no longer its address");
    }
}

#[test]
fn neighbour_discovery_is_never_blocked() {
    let mut rig = rig("discovery");
    let (own, router, all) = (ip("fe80::10"), ip("fe80::1"), ip("ff02::1"));
    for image in [isolated(), image(None, None)] {
        rig.pod(&image).unwrap();
        for kind in [133, 135, 136] {
            for source in [own, ip("::"), casts()[1].pod] {
                check(&mut rig, OUT, &Packet::icmp(source, all, kind, &[0; 20]), true, "what a host sends");
            }
        }
        for kind in 133..=137 {
            check(&mut rig, IN, &Packet::icmp(router, all, kind, &[0; 20]), true, "what a host receives");
        }
        for kind in [134, 137] {
            check(&mut rig, OUT, &Packet::icmp(own, all, kind, &[0; 20]), false, "what only routers send");
        }
        // Listener reports carry a hop-by-hop header.
        let mut report = Packet::icmp(own, ip("ff02::16"), 143, &[0; 20]);
        report.extensions = vec![(0, vec![0, 0, 5, 2, 0, 0, 1, 0])];
        check(&mut rig, OUT, &report, true, "a multicast listener report");
    }
    rig.pod(&isolated()).unwrap();
    check(&mut rig, IN, &Packet::icmp(casts()[1].stranger, casts()[1].pod, 128, &[0; 4]), false, "an echo is not discovery");
}

/// What is called neighbour discovery and comes from beyond the link is none.
#[test]
fn neighbour_discovery_from_beyond_the_link_is_judged_as_icmp() {
    let mut rig = rig("from-beyond");
    let cast = casts()[1];
    for (image, passes) in [(isolated(), false), (image(None, None), true)] {
        rig.pod(&image).unwrap();
        for kind in 133..=137 {
            for source in [cast.stranger, ip("fe80::1"), ip("::")] {
                let near = Packet::icmp(source, cast.pod, kind, &[0; 20]);
                check(&mut rig, IN, &near, true, "from the link, whoever it is");
                for hops in [0, 1, 64, 254] {
                    check(&mut rig, IN, &Packet { hops, ..near.clone() }, passes, "as any other packet to the pod");
                }
            }
            let friends = Packet { hops: 64, ..Packet::icmp(cast.friend, cast.pod, kind, &[0; 20]) };
            check(&mut rig, IN, &friends, true, "where a rule allows ICMP");
        }
        for kind in [130, 131, 132, 143] {
            for near in ["fe80::1", "febf::1"] {
                check(&mut rig, IN, &Packet::icmp(ip(near), ip("ff02::1"), kind, &[0; 20]), true, "from the link");
            }
            for beyond in [cast.stranger, ip("fec0::1"), ip("ff02::1"), ip("::")] {
                check(&mut rig, IN, &Packet::icmp(beyond, cast.pod, kind, &[0; 20]), passes, "as any other packet to the pod");
            }
        }
    }
    let mut covered = Packet::icmp(cast.stranger, cast.pod, 135, &[0; 20]);
    covered.extensions = vec![(0, vec![0, 0, 5, 2, 0, 0, 1, 0])];
    rig.pod(&isolated()).unwrap();
    check(&mut rig, IN, &covered, true, "behind a header, from the link");
    check(&mut rig, IN, &Packet { hops: 254, ..covered }, false, "behind a header, from beyond");
}

/// Of two interfaces whose indices share a place, one has its record behind the others'.
#[test]
fn an_interface_whose_place_is_taken_is_found_behind_the_others_and_only_itself() {
    let mut rig = rig("far");
    // Behind the one that has the place is a pod without policy: who took its record would let everything in.
    let neighbour = Slot(2);
    rig.apply(&[MapOp::SetEndpoint(neighbour, image(None, None))]).unwrap();
    rig.move_far(neighbour).unwrap();
    for cast in casts() {
        for (opener, client) in [(IN, 4_000), (OUT, 5_000)] {
            let open = |peer, port| cast.packet(peer, opener, opener, (client, port), tcp(flags::SYN));
            check(&mut rig, opener, &open(cast.friend, 80), true, "allowed");
            check(
                &mut rig,
                opener ^ 1,
                &cast.packet(cast.friend, opener, opener ^ 1, (client, 80), tcp(flags::SYN | flags::ACK)),
                true,
                "its reply",
            );
            check(&mut rig, opener, &open(cast.friend, 81), false, "denied");
            check(&mut rig, opener, &open(cast.stranger, 80), false, "denied");
        }
        let forged = Packet::tcp((cast.stranger, 4_000), (cast.friend, 80), flags::SYN);
        check(&mut rig, OUT, &forged, false, "a forged source");
    }
    rig.give_far_place_away(neighbour).unwrap();
    for cast in casts() {
        for way in [IN, OUT] {
            let packet = cast.packet(cast.friend, way, way, (6_000, 80), tcp(flags::SYN));
            check(&mut rig, way, &packet, false, "the place is another interface's");
        }
    }
}

/// What is called neighbour discovery and leaves the link is none.
#[test]
fn neighbour_discovery_that_would_leave_the_link_is_judged_as_icmp() {
    let mut rig = rig("beyond");
    let cast = casts()[1];
    let own = ip("fe80::10");
    for (image, passes) in [(isolated(), false), (image(None, None), true)] {
        rig.pod(&image).unwrap();
        for kind in [130, 131, 132, 133, 135, 136, 143] {
            for beyond in [cast.stranger, ip("2001:db8::1"), ip("fec0::1"), ip("fc80::1"), ip("ff05::2"), ip("ff0e::1")] {
                check(&mut rig, OUT, &Packet::icmp(cast.pod, beyond, kind, &[0; 20]), passes, "as any other packet of the pod");
                for foreign in [own, ip("::"), cast.stranger] {
                    check(&mut rig, OUT, &Packet::icmp(foreign, beyond, kind, &[0; 20]), false, "a source that is not the pod's");
                }
            }
            check(&mut rig, OUT, &Packet::icmp(cast.pod, cast.friend, kind, &[0; 20]), true, "where a rule allows ICMP");
            for near in [ip("fe80::1"), ip("febf::1"), ip("ff02::2"), ip("ff02::1:ff00:20")] {
                for source in [own, ip("::"), cast.pod] {
                    check(&mut rig, OUT, &Packet::icmp(source, near, kind, &[0; 20]), true, "on the link");
                }
            }
        }
    }
}

#[test]
fn the_node_and_the_pod_itself_always_pass() {
    let mut rig = rig("node");
    rig.pod(&image(Some(SET + 1), Some(SET + 1))).unwrap();
    for cast in casts() {
        for peer in [cast.node, cast.pod] {
            check(&mut rig, IN, &Packet::tcp((peer, 4_000), (cast.pod, 8_080), flags::SYN), true, "a probe");
            check(&mut rig, OUT, &Packet::udp((cast.pod, 4_000), (peer, 53)), true, "to the node");
        }
        rig.apply(&[MapOp::RemoveNodeAddress(cast.node)]).unwrap();
        check(&mut rig, IN, &Packet::tcp((cast.node, 4_000), (cast.pod, 8_080), flags::SYN), false, "no longer the node");
    }
}

/// A pod that reaches itself through a service: its packets come back with the node's address where kube-proxy masquerades, with
/// its own where not.
#[test]
fn a_pod_reaches_itself_through_a_service_unless_a_rule_denies_it() {
    const ITSELF: u32 = 30;
    let mut rig = rig("hairpin");
    let deny = VerdictKey { policy: SET, identity: ITSELF, direction: IN, protocol: TCP, port: 8_080u16.to_be_bytes() };
    let value = |rule| VerdictValue { rule, verdict: verdict::DENY, reserved: [0; 3] };
    for cast in casts() {
        rig.apply(&[MapOp::SetAddress(cast.pod, ITSELF)]).unwrap();
        for source in [cast.node, cast.pod] {
            let frame = Packet::tcp((source, 4_000), (cast.pod, 8_080), flags::SYN).frame();
            assert!(rig.passes_back(&frame).unwrap(), "isolation does not speak of it: {source}");
            rig.apply(&[MapOp::SetVerdict(deny, VERDICT_PREFIX_PORT, value(0))]).unwrap();
            assert!(rig.passes_back(&frame).unwrap(), "nor does it as an entry: {source}");
            rig.apply(&[MapOp::SetVerdict(deny, VERDICT_PREFIX_PORT, value(RULE))]).unwrap();
            assert!(!rig.passes_back(&frame).unwrap(), "a rule denies: {source}");
            assert!(rig.passes(IN, &frame).unwrap(), "the node's own probe: {source}");
            rig.apply(&[MapOp::RemoveVerdict(deny, VERDICT_PREFIX_PORT)]).unwrap();
        }
    }
}

#[test]
fn a_specific_identity_decides_before_any_and_a_longer_prefix_before_a_shorter() {
    let mut rig = rig("verdicts");
    let set = SET + 7;
    let deny = |identity, protocol, port: u16, bits| {
        let key = VerdictKey { policy: set, identity, direction: IN, protocol, port: port.to_be_bytes() };
        MapOp::SetVerdict(key, bits, VerdictValue { rule: 1, verdict: verdict::DENY, reserved: [0; 3] })
    };
    rig.apply(&[
        // Anybody: everything but TCP 8080 to 8083.
        allow(set, 0, IN, 0, 0, VERDICT_PREFIX_ANY),
        deny(0, TCP, 8_080, VERDICT_PREFIX_PORT - 2),
        // The friend: only UDP, and not its port 53.
        deny(FRIEND, 0, 0, VERDICT_PREFIX_ANY),
        allow(set, FRIEND, IN, UDP, 0, VERDICT_PREFIX_PROTOCOL),
        deny(FRIEND, UDP, 53, VERDICT_PREFIX_PORT),
    ])
    .unwrap();
    rig.pod(&image(Some(set), None)).unwrap();
    for cast in casts() {
        for (peer, make, port, passes) in [
            (cast.stranger, Packet::udp as fn((IpAddr, u16), (IpAddr, u16)) -> Packet, 53, true),
            (cast.stranger, |s, d| Packet::tcp(s, d, flags::SYN), 8_079, true),
            (cast.stranger, |s, d| Packet::tcp(s, d, flags::SYN), 8_080, false),
            (cast.stranger, |s, d| Packet::tcp(s, d, flags::SYN), 8_083, false),
            (cast.stranger, |s, d| Packet::tcp(s, d, flags::SYN), 8_084, true),
            (cast.friend, |s, d| Packet::tcp(s, d, flags::SYN), 80, false),
            (cast.friend, Packet::udp, 54, true),
            (cast.friend, Packet::udp, 53, false),
        ] {
            check(&mut rig, IN, &make((peer, 4_000), (cast.pod, port)), passes, "verdict");
        }
    }
}

#[test]
fn what_an_address_means_changes_with_the_next_packet() {
    let mut rig = rig("meaning");
    for cast in casts() {
        let host = ipnet::IpNet::from(cast.stranger);
        let wide = ipnet::IpNet::new(cast.stranger, host.prefix_len() - 8).unwrap().trunc();
        let mut port = 4_000;
        let mut passes = |rig: &mut Rig, wanted: bool, what: &str| {
            // Looked up, and then remembered.
            for _ in 0..2 {
                port += 1;
                check(rig, IN, &cast.packet(cast.stranger, IN, IN, (port, 80), Packet::udp), wanted, what);
            }
        };
        passes(&mut rig, false, "nobody");
        for (op, wanted) in [
            (MapOp::SetCidr(wide, FRIEND), true),
            (MapOp::SetCidr(host, FRIEND + 1), false),
            (MapOp::SetAddress(cast.stranger, FRIEND), true),
            (MapOp::SetAddress(cast.stranger, FRIEND + 1), false),
            (MapOp::SetNodeAddress(cast.stranger), true),
            (MapOp::RemoveNodeAddress(cast.stranger), false),
            (MapOp::RemoveAddress(cast.stranger), false),
            (MapOp::RemoveCidr(host), true),
            (MapOp::RemoveCidr(wide), false),
        ] {
            rig.apply(std::slice::from_ref(&op)).unwrap();
            passes(&mut rig, wanted, &format!("after {op:?}"));
        }
    }
}

/// Each CPU remembers verdicts; a change of one is seen by the next packet, and by a flow that the same batch revokes.
#[test]
fn a_verdict_changes_with_the_next_packet() {
    let mut rig = rig("changes");
    let cast = casts()[0];
    let key = VerdictKey { policy: SET, identity: FRIEND, direction: IN, protocol: TCP, port: 80u16.to_be_bytes() };
    let syn = |port| Packet::tcp((cast.friend, port), (cast.pod, 80), flags::SYN);
    let allowed = allow(SET, FRIEND, IN, TCP, 80, VERDICT_PREFIX_PORT);
    for round in 0..3 {
        check(&mut rig, IN, &syn(4_000 + round), true, "allowed");
        let revoked = EndpointImage { revision: 10 + u32::from(round), ..isolated() };
        rig.apply(&[MapOp::RemoveVerdict(key, VERDICT_PREFIX_PORT), MapOp::SetEndpoint(SLOT, revoked)]).unwrap();
        check(&mut rig, IN, &syn(4_000 + round), false, "the flow is revoked");
        check(&mut rig, IN, &syn(5_000 + round), false, "a new one is denied");
        rig.apply(std::slice::from_ref(&allowed)).unwrap();
        check(&mut rig, IN, &syn(5_000 + round), true, "allowed again");
        rig.forget_flows().unwrap();
    }
}

#[test]
fn what_an_agent_wrote_before_it_was_killed_is_in_force_with_the_next_one() {
    let mut rig = rig("killed");
    for cast in casts() {
        let opens = |port| Packet::tcp((cast.friend, port), (cast.pod, 80), flags::SYN);
        check(&mut rig, IN, &opens(4_000), true, "allowed, and remembered");
        rig.killed_after(&[MapOp::RemoveAddress(cast.friend)]).unwrap();
        check(&mut rig, IN, &opens(4_001), false, "what the agent had written");
        rig.apply(&[MapOp::SetAddress(cast.friend, FRIEND)]).unwrap();
        check(&mut rig, IN, &opens(4_002), true, "as before");
    }
}

#[test]
fn audit_tells_and_lets_pass() {
    let mut rig = rig("audit");
    let mut ring = rig.events().unwrap();
    rig.pod(&EndpointImage { audit: true, ..isolated() }).unwrap();
    let cast = casts()[0];
    let packet = cast.packet(cast.stranger, IN, IN, (4_000, 80), tcp(flags::SYN));
    check(&mut rig, IN, &packet, true, "audited");
    check(&mut rig, OUT, &Packet::udp((cast.stranger, 1), (cast.friend, 80)), false, "audit is about policy, not about forged sources");
    let key = VerdictKey { policy: SET, identity: 0, direction: IN, protocol: TCP, port: 81u16.to_be_bytes() };
    let denies = VerdictValue { rule: RULE, verdict: verdict::DENY, reserved: [0; 3] };
    rig.apply(&[MapOp::SetVerdict(key, VERDICT_PREFIX_PORT, denies)]).unwrap();
    let packet = cast.packet(cast.stranger, IN, IN, (4_000, 81), tcp(flags::SYN));
    check(&mut rig, IN, &packet, false, "a rule that denies is a cluster policy's");
    let verdicts: Vec<(u8, u8)> = take_events(&mut ring).iter().map(|event| (event.verdict, event.reason)).collect();
    let [audited, denied] = [event_verdict::AUDITED, event_verdict::DENIED].map(|verdict| (verdict, reason::POLICY));
    assert_eq!(verdicts, [audited, (event_verdict::DENIED, reason::SOURCE), denied]);
}

/// What audit lets pass goes on as a flow: nothing else is asked about its replies and later packets.
#[test]
fn audit_breaks_no_connection() {
    for (opens, answers) in [(OUT, IN), (IN, OUT)] {
        let mut rig = rig("audit-flows");
        let mut ring = rig.events().unwrap();
        // The other direction is not isolated; a policy of the cluster denies what a peer begins there.
        let image = if opens == OUT { image(Some(SET + 1), Some(SET)) } else { image(Some(SET), Some(SET + 1)) };
        rig.pod(&EndpointImage { audit: true, ..image }).unwrap();
        let denies = VerdictValue { rule: RULE, verdict: verdict::DENY, reserved: [0; 3] };
        let key = VerdictKey { policy: SET + 1, identity: 0, direction: answers, protocol: 0, port: [0; 2] };
        rig.apply(&[MapOp::SetVerdict(key, VERDICT_PREFIX_ANY, denies)]).unwrap();
        let cast = casts()[0];
        let packet = |way, flags| cast.packet(cast.stranger, opens, way, (4_000, 80), tcp(flags));
        check(&mut rig, answers, &packet(answers, flags::SYN | flags::ACK), false, "no answer to anything");
        check(&mut rig, opens, &packet(opens, flags::SYN), true, "audited");
        check(&mut rig, answers, &packet(answers, flags::SYN | flags::ACK), true, "its answer");
        check(&mut rig, opens, &packet(opens, flags::ACK), true, "what follows");
        rig.grow_old(10).unwrap();
        check(&mut rig, answers, &packet(answers, flags::ACK), true, "and later");
        check(
            &mut rig,
            answers,
            &cast.packet(cast.stranger, answers, answers, (4_001, 80), tcp(flags::SYN)),
            false,
            "what the peer begins",
        );
        let audited = take_events(&mut ring).iter().filter(|event| event.verdict == event_verdict::AUDITED).count();
        assert_eq!(audited, 1, "each flow is told once");
    }
}

/// A datagram that audit lets pass arrives whole.
#[test]
fn audit_lets_every_fragment_of_a_datagram_pass() {
    let mut rig = rig("audit-fragments");
    rig.pod(&EndpointImage { audit: true, ..isolated() }).unwrap();
    for cast in casts() {
        for (way, id) in [(IN, 7), (OUT, 8)] {
            let whole = cast.packet(cast.stranger, way, way, (4_000, 81), Packet::udp);
            for (offset, more) in [(0, true), (3, true), (6, false)] {
                let body = if offset == 0 { whole.body[..24].to_vec() } else { vec![0; if more { 24 } else { 6 }] };
                let piece = Packet { body, fragment: Some(Fragment { id, offset, more }), ..whole.clone() };
                check(&mut rig, way, &piece, true, "audited");
            }
        }
    }
}

#[test]
fn events_say_who_what_and_why() {
    let mut rig = rig("events");
    let mut ring = rig.events().unwrap();
    let cast = casts()[0];
    let denied = cast.packet(cast.stranger, IN, IN, (4_000, 80), tcp(flags::SYN));
    let allowed = cast.packet(cast.friend, IN, IN, (4_000, 80), tcp(flags::SYN));
    check(&mut rig, IN, &denied, false, "denied");
    check(&mut rig, IN, &allowed, true, "allowed, not told");
    rig.configure(Config { flags: 0, pod_flows: 1_024 }).unwrap();
    check(&mut rig, IN, &denied, false, "denied, but nobody listens");
    rig.configure(Config { flags: config_flag::TELL_ALLOWED, pod_flows: 1_024 }).unwrap();
    let opened = cast.packet(cast.friend, IN, IN, (4_001, 80), tcp(flags::SYN));
    check(&mut rig, IN, &opened, true, "allowed, told");
    check(&mut rig, IN, &cast.packet(cast.friend, IN, IN, (4_001, 80), tcp(flags::ACK)), true, "not told again");
    let events = take_events(&mut ring);
    let [first, second] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((first.slot, first.direction, first.verdict, first.reason), (SLOT.0, IN, event_verdict::DENIED, reason::POLICY));
    assert_eq!((first.family, first.protocol, first.flags), (4, TCP, flags::SYN));
    assert_eq!((u16::from_be_bytes(first.local_port), u16::from_be_bytes(first.remote_port)), (80, 4_000));
    assert_eq!((first.local[0], first.remote[0]), (ipv4_word([10, 0, 0, 10]), ipv4_word([10, 0, 0, 30])));
    assert_eq!((first.rule, first.identity, first.length), (0, 0, 64));
    assert_eq!((second.verdict, second.rule, second.identity), (event_verdict::ALLOWED, RULE, FRIEND));
}

/// The kernel verifies an object once: who comes later takes what is pinned, unless it works on other maps than those pinned.
#[test]
fn programs_that_are_pinned_are_taken_as_long_as_the_maps_are_theirs() {
    let pin_root = Maker::Rig.pins("again");
    let programs = || {
        let mut loaded = load(&LoadOptions { pin_root: pin_root.clone(), flow_entries: 1_024 }).unwrap();
        [POD_EGRESS, POD_INGRESS].map(|name| loaded.program(name).unwrap().info().unwrap().id())
    };
    let first = programs();
    assert_eq!(programs(), first);
    let layout = pin_root.join(format!("v{LAYOUT_VERSION}"));
    std::fs::remove_file(layout.join(map_name::FLOWS6)).unwrap();
    let second = programs();
    assert!(first.iter().all(|id| !second.contains(id)), "{first:?} {second:?}");
    assert_eq!(programs(), second);
    let object = std::fs::read_dir(layout.join("programs")).unwrap().next().unwrap().unwrap();
    std::fs::remove_file(object.path().join(POD_INGRESS)).unwrap();
    assert_ne!(programs(), second, "one is missing");
    std::fs::remove_dir_all(pin_root).unwrap();
}

#[test]
fn a_pod_at_its_cap_and_a_full_table_keep_judging_packets() {
    for (name, entries, cap) in [("cap", 1_024, 8), ("full", 8, 1_024)] {
        let mut rig = rig_of(name, entries, cap);
        let cast = casts()[0];
        let packet =
            |port, way| cast.packet(cast.friend, OUT, way, (port, 80), tcp(if way == OUT { flags::SYN } else { flags::SYN | flags::ACK }));
        for port in 4_000..4_020 {
            check(&mut rig, OUT, &packet(port, OUT), true, "policy allows it whether it is remembered or not");
        }
        let live = (4_000..4_020).filter(|port| rig.passes(IN, &packet(*port, IN).frame()).unwrap()).count();
        assert!((8..16).contains(&live), "{name}: {live} flows are remembered, about 8 have room");
        check(&mut rig, IN, &packet(4_000, IN), true, "the first flow is still known");
    }
}

fn rig_of(name: &str, entries: u32, cap: u32) -> Rig {
    let mut rig = Rig::new(name, entries).unwrap();
    rig.configure(Config { flags: 0, pod_flows: cap }).unwrap();
    rig.apply(&[allow(SET, FRIEND, OUT, TCP, 80, VERDICT_PREFIX_PORT), MapOp::SetAddress(casts()[0].friend, FRIEND)]).unwrap();
    rig.pod(&isolated()).unwrap();
    rig
}
