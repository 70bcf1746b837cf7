//! Random bytes for the programs of random policies: what the kernel does with a frame is what the definition says of the
//! packet in it. The reader of frames here shares nothing with the programs'.
//!
//! `DATAPATH_WORLDS` sets the number of policies (300 frames each); a failure names the seed and the bytes.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::manifests;
use stanchion_core::policy::engine::{Engine, Settings};
use stanchion_core::policy::image::MapImage;
use stanchion_core::policy::maps::image_allows;
use stanchion_core::policy::model::Direction;
use stanchion_ebpf_abi::direction;
use stanchion_lab::datapath::packet::{Fragment, ICMP, ICMPV6, Packet, SCTP, TCP, UDP, arp};
use stanchion_lab::datapath::{Rig, SLOT};

const FRAMES: usize = 300;
const ETHERNET: usize = 14;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The pod's addresses, the node's, and peers inside and outside of what policies name.
fn pod() -> [IpAddr; 2] {
    [ip("10.0.0.10"), ip("fd00::10")]
}

fn peers(six: bool) -> Vec<IpAddr> {
    let four = ["10.0.0.20", "10.0.0.21", "10.0.1.1", "10.0.0.1", "10.0.0.10", "192.0.2.7", "192.0.2.200"];
    let v6 = ["fd00::20", "fd00::21", "fd00:1::1", "fd00:ffff::1", "fd00::10", "2001:db8::7", "2001:db8:1::7"];
    if six { v6 } else { four }.into_iter().map(ip).collect()
}

fn world(rng: &mut StdRng) -> ClusterState {
    let mut text = r#"
{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"},{"type":"InternalIP","address":"fd00:ffff::1"}]}}
{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"x"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"x","labels":{"pod":"a"}},"spec":{"nodeName":"n1"},"status":{"podIPs":[{"ip":"10.0.0.10"},{"ip":"fd00::10"}]}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b","namespace":"x","labels":{"pod":"b"}},"spec":{"nodeName":"n2","containers":[{"name":"c","ports":[{"name":"web","containerPort":80},{"name":"dns","containerPort":53,"protocol":"UDP"}]}]},"status":{"podIPs":[{"ip":"10.0.0.20"},{"ip":"fd00::20"}]}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c","namespace":"x","labels":{"pod":"c"}},"spec":{"nodeName":"n2"},"status":{"podIPs":[{"ip":"10.0.0.21"},{"ip":"fd00::21"}]}}
"#
    .to_owned();
    let mut rule = |end: &str| {
        let mut parts = Vec::new();
        if rng.random_bool(0.8) {
            let peer = [
                r#"{"podSelector":{"matchLabels":{"pod":"b"}}}"#,
                r#"{"podSelector":{}}"#,
                r#"{"ipBlock":{"cidr":"192.0.2.0/24","except":["192.0.2.128/25"]}}"#,
                r#"{"ipBlock":{"cidr":"2001:db8::/32","except":["2001:db8:1::/48"]}}"#,
                r#"{"ipBlock":{"cidr":"10.0.0.0/8"}}"#,
            ]
            .choose(rng)
            .unwrap();
            parts.push(format!(r#""{end}":[{peer}]"#));
        }
        if rng.random_bool(0.7) {
            let port = [
                r#"{"port":80}"#,
                r#"{"port":"web"}"#,
                r#"{"protocol":"UDP","port":53,"endPort":5353}"#,
                r#"{"protocol":"SCTP"}"#,
                r#"{"protocol":"TCP","port":1,"endPort":79}"#,
                r#"{"protocol":"UDP"}"#,
            ];
            let ports: Vec<&str> = (0..rng.random_range(1..3)).map(|_| *port.choose(rng).unwrap()).collect();
            parts.push(format!(r#""ports":[{}]"#, ports.join(",")));
        }
        format!("{{{}}}", parts.join(","))
    };
    let ingress: Vec<String> = (0..2).map(|_| rule("from")).collect();
    let egress: Vec<String> = (0..2).map(|_| rule("to")).collect();
    text += &format!(
        r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"p","namespace":"x"}},"spec":{{"podSelector":{{"matchLabels":{{"pod":"a"}}}},"policyTypes":["Ingress","Egress"],"ingress":[{}],"egress":[{}]}}}}"#,
        ingress.join(","),
        egress.join(",")
    );
    ClusterState::default().replaced_by(manifests::parse("truth.json", &text).unwrap())
}

/// A frame: mostly a packet with something odd about it, then mostly damaged; sometimes mere bytes.
fn frame(rng: &mut StdRng, way: u8) -> Vec<u8> {
    if rng.random_bool(0.05) {
        let mut bytes = vec![0u8; rng.random_range(54..200)];
        rng.fill_bytes(&mut bytes);
        let ethertype: u16 = *[0x0800, 0x86dd, 0x0806, 0x8100, 0x1234].choose(rng).unwrap();
        bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        return bytes;
    }
    if rng.random_bool(0.02) {
        return arp();
    }
    let six = rng.random_bool(0.5);
    let mut own = pod()[usize::from(six)];
    let all = peers(six);
    let mut peer = *all.choose(rng).unwrap();
    if six && rng.random_bool(0.05) {
        peer = ip(["fe80::1", "ff02::1", "ff05::1"].choose(rng).unwrap());
    }
    if rng.random_bool(0.05) {
        own = *all.choose(rng).unwrap();
    }
    let (source, destination) = if way == direction::EGRESS { (own, peer) } else { (peer, own) };
    let mut packet = inner(rng, source, destination, six);
    if rng.random_bool(0.15) {
        let about = inner(rng, destination, source, six);
        let kinds: &[u8] = if six { &[1, 2, 3, 4] } else { &[3, 4, 5, 11, 12] };
        packet = Packet::icmp_error(source, destination, *kinds.choose(rng).unwrap(), &about);
    }
    let mut frame = packet.frame();
    match rng.random_range(0..10) {
        0..=3 => {}
        4 | 5 => {
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(ETHERNET..frame.len());
                frame[at] = rng.random();
            }
        }
        // The headers' own lengths and kinds.
        6 | 7 => {
            let places: &[usize] = if six { &[14, 18, 19, 20, 54, 55] } else { &[14, 16, 17, 20, 21, 23] };
            let at = *places.choose(rng).unwrap();
            if at < frame.len() {
                frame[at] = rng.random();
            }
        }
        8 => frame.truncate(rng.random_range(if six { 54 } else { 34 }..=frame.len())),
        _ => frame.resize(frame.len() + rng.random_range(0..40), 0xaa),
    }
    frame
}

fn inner(rng: &mut StdRng, source: IpAddr, destination: IpAddr, six: bool) -> Packet {
    let ports: Vec<u16> = (0..2).map(|_| *[53, 79, 80, 81, 443, 5353, 40_000].choose(rng).unwrap()).collect();
    let ends = ((source, ports[0]), (destination, ports[1]));
    let mut packet = match rng.random_range(0..6) {
        0 => Packet::tcp(ends.0, ends.1, rng.random()),
        1 => Packet::tcp(ends.0, ends.1, 2),
        2 => Packet::udp(ends.0, ends.1),
        3 => Packet::sctp(ends.0, ends.1),
        4 => {
            let kind =
                if rng.random_bool(0.5) { *[0, 8, 128, 129, 130, 132, 133, 134, 135, 137, 143].choose(rng).unwrap() } else { rng.random() };
            let packet = Packet::icmp(source, destination, kind, &[0, 7, 0, 1, 9, 9, 9, 9]);
            let hops = *[packet.hops, 64, 255, rng.random()].choose(rng).unwrap();
            Packet { hops, ..packet }
        }
        _ => Packet::new(source, destination, *[47, 50, 89, 4].choose(rng).unwrap(), vec![7; 24]),
    };
    if rng.random_bool(0.2) {
        if six {
            for _ in 0..rng.random_range(1..10) {
                let kind: u8 = *[0, 43, 60, 135, 51].choose(rng).unwrap();
                let units = rng.random_range(0..3u8);
                let length = if kind == 51 { (usize::from(units) + 2) * 4 } else { (usize::from(units) + 1) * 8 };
                // An authentication header is a multiple of eight bytes in IPv6.
                let (units, length) = if kind == 51 { (units * 2, (usize::from(units) * 2 + 2) * 4) } else { (units, length) };
                let mut header = vec![0x50u8; length];
                header[1] = units;
                packet.extensions.push((kind, header));
            }
        } else {
            packet.options = vec![1; rng.random_range(1..11) * 4];
        }
    }
    if rng.random_bool(0.1) {
        packet.fragment = Some(Fragment { id: rng.random_range(0..65_536), offset: rng.random_range(0..3), more: rng.random_bool(0.7) });
    }
    packet
}

/// What policy is asked about a frame, if anything.
#[derive(Debug, PartialEq)]
enum Question {
    Passes,
    Judged { source: IpAddr, remote: IpAddr, protocol: u8, port: u16 },
}

fn at<const N: usize>(frame: &[u8], offset: usize) -> Option<[u8; N]> {
    frame.get(offset..offset + N)?.try_into().ok()
}

fn word(frame: &[u8], offset: usize) -> Option<u16> {
    at(frame, offset).map(u16::from_be_bytes)
}

/// Reads a frame by the RFCs; `None` where it is cut off or contradicts itself.
fn question(frame: &[u8], way: u8) -> Option<Question> {
    let (source, destination, protocol, offset, room) = match word(frame, 12)? {
        0x0806 => return Some(Question::Passes),
        0x0800 => {
            let header = usize::from(frame[14] & 15) * 4;
            let total = usize::from(word(frame, 16)?);
            if frame[14] >> 4 != 4 || header < 20 || (total != 0 && total < header) || word(frame, 20)? & 0x1fff != 0 {
                return None;
            }
            let [source, destination] = [26, 30].map(|offset| Ipv4Addr::from(at::<4>(frame, offset).unwrap()).into());
            let room = if total == 0 { usize::MAX } else { total - header };
            (source, destination, frame[23], ETHERNET + header, room)
        }
        0x86dd => {
            let [source, destination] = [22, 38].map(|offset| Ipv6Addr::from(at::<16>(frame, offset).unwrap()).into());
            if frame[14] >> 4 != 6 {
                return None;
            }
            let (mut next, mut offset, mut headers) = (frame[20], ETHERNET + 40, 0);
            while let 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140 = next {
                headers += 1;
                let header: [u8; 8] = at(frame, offset)?;
                if next == 44 && u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                    return None;
                }
                offset += match next {
                    44 => 8,
                    51 => (usize::from(header[1]) + 2) * 4,
                    _ => (usize::from(header[1]) + 1) * 8,
                };
                next = header[0];
            }
            // Eight are read; whether a transport header follows the eighth is not looked at any more.
            if headers >= 8 {
                return None;
            }
            let payload = usize::from(word(frame, 18)?);
            let room = if payload == 0 { usize::MAX } else { (ETHERNET + 40 + payload).checked_sub(offset)? };
            (source, destination, next, offset, room)
        }
        _ => return None,
    };
    let six = frame[12] == 0x86;
    let icmp = if six { ICMPV6 } else { ICMP };
    let least = match protocol {
        TCP => 20,
        SCTP => 12,
        UDP => 8,
        _ if protocol == icmp => 8,
        _ => 0,
    };
    if room < least || frame.len() < offset + least {
        return None;
    }
    let remote = if way == direction::EGRESS { destination } else { source };
    let mut port = 0;
    if matches!(protocol, TCP | UDP | SCTP) {
        port = word(frame, offset + 2)?;
    }
    if protocol == icmp {
        let kind = frame[offset];
        let is_discovery = match (way, source, destination) {
            (direction::INGRESS, IpAddr::V6(from), _) => match kind {
                133..=137 => frame[21] == 255,
                130..=132 | 143 => from.is_unicast_link_local(),
                _ => false,
            },
            (direction::EGRESS, _, IpAddr::V6(to)) if to.is_unicast_link_local() || to.segments()[0] == 0xff02 => {
                matches!(kind, 130..=133 | 135 | 136 | 143)
            }
            _ => false,
        };
        if six && is_discovery {
            return Some(Question::Passes);
        }
        let is_error = if six { matches!(kind, 1..=4) } else { matches!(kind, 3 | 4 | 5 | 11 | 12) };
        if is_error {
            // What it quotes must be readable, if it goes to whom it is about; no flow is known, so it is judged as ICMP.
            let quoted = offset + 8;
            let is_astray = |sender: IpAddr| way == direction::EGRESS && sender != destination;
            let (inner, ports_at) = if six {
                let next = *frame.get(quoted + 6)?;
                let _whole: [u8; 40] = at(frame, quoted)?;
                if frame[quoted] >> 4 != 6 {
                    return None;
                }
                match next {
                    _ if is_astray(Ipv6Addr::from(at::<16>(frame, quoted + 8)?).into()) => (255, quoted),
                    44 => {
                        let header: [u8; 8] = at(frame, quoted + 40)?;
                        let first = u16::from_be_bytes([header[2], header[3]]) >> 3 == 0;
                        if first { (header[0], quoted + 48) } else { (255, quoted) }
                    }
                    other => (other, quoted + 40),
                }
            } else {
                let header: [u8; 20] = at(frame, quoted)?;
                let length = usize::from(header[0] & 15) * 4;
                if header[0] >> 4 != 4 || length < 20 {
                    return None;
                }
                let first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
                if first && !is_astray(Ipv4Addr::from(at::<4>(frame, quoted + 12)?).into()) {
                    (header[9], quoted + length)
                } else {
                    (255, quoted)
                }
            };
            let needed = if inner == icmp {
                8
            } else if matches!(inner, TCP | UDP | SCTP) {
                4
            } else {
                0
            };
            if frame.len() < ports_at + needed && needed > 0 {
                return None;
            }
        }
    }
    Some(Question::Judged { source, remote, protocol, port })
}

fn expected(image: &MapImage, frame: &[u8], way: u8) -> bool {
    match question(frame, way) {
        None => false,
        Some(Question::Passes) => true,
        Some(Question::Judged { source, remote, protocol, port }) => {
            let (direction, is_own) = match way {
                direction::EGRESS => (Direction::Egress, pod().contains(&source)),
                _ => (Direction::Ingress, true),
            };
            is_own && image_allows(image, SLOT, direction, remote, protocol, port)
        }
    }
}

#[test]
fn random_frames_under_random_policies_fare_as_the_definition_says() {
    let worlds: u64 = std::env::var("DATAPATH_WORLDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let mut rig = Rig::new("truth", 1_024).unwrap();
    let (mut passed, mut dropped, mut read) = (0, 0, 0);
    for seed in 0..worlds {
        let rng = &mut StdRng::seed_from_u64(seed);
        let cluster = Arc::new(world(rng));
        let mut engine = Engine::new(Settings { node_name: "n1".to_owned(), ..Settings::default() });
        let mut ops = engine.set_cluster(&cluster);
        ops.extend(engine.add_endpoint(SLOT, &PodName::new("x", "a"), "", &pod()));
        rig.apply(&ops).unwrap();
        rig.pod(&engine.image().endpoints[&SLOT]).unwrap();
        for index in 0..FRAMES {
            let way = if rng.random_bool(0.5) { direction::EGRESS } else { direction::INGRESS };
            let frame = frame(rng, way);
            let wanted = expected(engine.image(), &frame, way);
            let found = rig.passes(way, &frame).unwrap();
            let told = format!("seed {seed} frame {index}, {way}: {:?}: {}", question(&frame, way), hex(&frame));
            assert_eq!(found, wanted, "{told}");
            if found {
                assert!(rig.passes(way, &frame).unwrap(), "a second time: {told}");
            }
            passed += u32::from(found);
            dropped += u32::from(!found);
            read += u32::from(question(&frame, way).is_some());
            rig.forget_flows().unwrap();
        }
        let ops: Vec<_> = engine.remove_endpoint(SLOT);
        rig.apply(&ops).unwrap();
        let gone = Arc::new(ClusterState::default());
        rig.apply(&engine.set_cluster(&gone)).unwrap();
    }
    println!("{passed} passed, {dropped} dropped, {read} could be read");
    assert!(passed > 100 && dropped > 100 && read > 500, "{passed} {dropped} {read}");
}

fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}
