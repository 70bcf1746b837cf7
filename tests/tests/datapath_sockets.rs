//! The actor on real wires: pods are network namespaces on veths of a node's namespace, clients and servers are real
//! sockets, policies are manifests. Every test runs once over TCX links and once over clsact filters.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use datapath_support::*;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stanchion_core::cloud::LogGroupSpec;
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::policy::engine::Missing;
use stanchion_daemon::netpol::flow_log::{self, FlowLogSettings};
use stanchion_daemon::netpol::{ActivateError, AttachMode, EnforcingMode, FlowRecord, FlowVerdict};
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_lab::datapath::layout::move_filters;
use stanchion_lab::datapath::packet::{Packet, flags};
use stanchion_lab::fake_aws::{Clock, Cloud, CloudConfig, DirectLogs};
use stanchion_lab::netns::{Netns, ip_batch};
use tokio_util::sync::CancellationToken;

#[test]
fn replies_pass_isolated_pods_and_requests_do_not() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&(deny_in() + &policy("y", "deny-eg", "a", "  policyTypes: [Egress]\n")));
        world.activate_all();
        world.works("x/a", "y/a", 80);
        assert!(world.datagram("x/a", "y/a", 80, 100, WORKS), "a UDP exchange");
        world.blocked("y/a", "x/a", 80);
        assert!(!world.datagram("y/a", "x/a", 80, 100, BLOCKED), "y/a may send nothing");
    }
}

#[test]
fn a_policy_that_forbids_an_open_connection_stops_it_at_its_next_packet() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply("");
        world.activate_all();
        let mut stream = world.works("y/a", "x/a", 80);
        world.apply(&deny_in());
        world.blocked("y/a", "x/a", 80);
        assert!(!echoes(&mut stream, BLOCKED), "the connection is revoked");
        // And an unrelated change cuts nothing.
        let mut kept = world.works("x/a", "y/b", 80);
        world.apply(&(deny_in() + &policy("x", "other", "b", "  policyTypes: [Egress]\n")));
        assert!(echoes(&mut kept, WORKS), "a connection that stays allowed");
    }
}

#[test]
fn the_first_policy_on_a_running_pod_keeps_what_it_allows() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply("");
        world.activate_all();
        let mut mine = world.works("x/a", "y/a", 80);
        let mut allowed = world.works("y/b", "x/a", 80);
        let mut revoked = world.works("y/a", "x/a", 80);
        let from_b =
            "  policyTypes: [Ingress]\n  ingress:\n  - from:\n    - namespaceSelector: {}\n      podSelector: {matchLabels: {pod: b}}\n";
        world.apply(&policy("x", "p", "a", from_b));
        assert!(echoes(&mut mine, WORKS), "a connection that the pod opened");
        assert!(echoes(&mut allowed, WORKS), "a connection that the policy allows");
        assert!(!echoes(&mut revoked, BLOCKED), "a connection that the policy does not allow");
    }
}

#[test]
fn a_source_port_used_again_is_a_new_flow() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt};
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let server = world.server("y/a", 80);
        let netns = &world.pod("x/a").netns;
        for round in 0..200 {
            let attempt = || {
                netns.run(|| -> io::Result<TcpStream> {
                    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
                    // Ends with a reset, so that the port is free at once.
                    setsockopt(&socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
                    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
                    bind(fd, &SockaddrIn::new(0, 0, 0, 0, 40_000))?;
                    let SocketAddr::V4(server) = server else { unreachable!("the world is IPv4") };
                    connect(fd, &SockaddrIn::from(server))?;
                    Ok(TcpStream::from(socket))
                })
            };
            // The kernel may still be at taking the last round's socket down.
            let start = Instant::now();
            let mut stream = loop {
                match attempt().unwrap() {
                    Ok(stream) => break stream,
                    Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && start.elapsed() < WORKS => std::thread::yield_now(),
                    Err(error) => panic!("round {round}: {error}"),
                }
            };
            assert!(echoes(&mut stream, WORKS), "round {round}");
        }
    }
}

#[test]
fn fragments_follow_their_first() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&policy("x", "p", "a", "  policyTypes: [Ingress]\n  ingress:\n  - ports: [{protocol: UDP, port: 80}]\n"));
        world.activate_all();
        assert!(world.datagram("y/a", "x/a", 80, 6_000, WORKS), "a datagram in fragments");
        assert!(!world.datagram("y/a", "x/a", 81, 6_000, BLOCKED), "one that policy forbids");
    }
}

#[test]
fn a_pod_is_policed_from_its_first_packet() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.stop();
        world.enforcing = EnforcingMode::Strict;
        world.start();
        // Its agent does not know the cluster yet, and is strict.
        let error = world.activate("x/a").unwrap_err();
        assert!(matches!(error, ActivateError::NotKnown { missing: Missing::Cluster, .. }), "{error:?}");
        world.apply(&(policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n") + &policy("y", "open", "a", "  ingress: [{}]\n")));
        world.activate("y/a").unwrap();
        let server = world.server("y/a", 81);
        let socket = world.pod("x/a").netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        // Hammers before, while and after its host end comes up.
        let stop = Arc::new(AtomicBool::new(false));
        let hammer = {
            let (socket, stop) = (socket.try_clone().unwrap(), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _down = socket.send_to(&[1], server);
                }
            })
        };
        world.activate("x/a").unwrap();
        socket.set_read_timeout(Some(BLOCKED)).unwrap();
        let leaked = socket.recv(&mut [0u8; 8]);
        stop.store(true, Ordering::Relaxed);
        hammer.join().unwrap();
        assert!(leaked.is_err(), "a reply means that a packet leaked");
        let denied = world.runtime.block_on(world.agent().clone().snapshot());
        let view = denied.endpoints.iter().find(|view| view.pod == PodName::new("x", "a")).unwrap();
        assert!(view.counters.egress_denied.packets > 0 && view.egress_isolated, "{view:?}");
    }
}

/// Sends a frame out of a pod, to its host end.
fn send_frame(pod: &Pod, mut frame: Vec<u8>) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    frame[..6].copy_from_slice(&pod.host_mac);
    // The host's IP layer wants a checksum.
    let sum: u32 = frame[14..34].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    frame[24..26].copy_from_slice(&(!folded).to_be_bytes());
    pod.netns
        .run(|| {
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            // SAFETY: a sockaddr_ll is plain data; the kernel reads the index of the interface and copies the frame.
            let sent = unsafe {
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
                address.sll_ifindex = i32::try_from(index).unwrap();
                libc::sendto(
                    std::os::fd::AsRawFd::as_raw_fd(&socket),
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    std::ptr::from_ref(&address).cast(),
                    u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap(),
                )
            };
            assert_eq!(sent, isize::try_from(frame.len()).unwrap(), "{}", io::Error::last_os_error());
        })
        .unwrap();
}

#[test]
fn a_forged_source_plants_no_state_and_is_told_with_names() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let mut records = world.runtime.block_on(world.agent().follow(false));
        let (victim, forger) = (world.pod("x/a"), world.pod("y/a"));
        let ends = (IpAddr::from(victim.address), IpAddr::from(forger.address));
        send_frame(forger, Packet::tcp((ends.0, 80), (ends.1, 4_444), flags::SYN).frame());
        send_frame(forger, Packet::tcp((ends.1, 4_444), (ends.0, 80), flags::SYN | flags::ACK).frame());
        let mut told: Vec<Arc<FlowRecord>> = Vec::new();
        world.runtime.block_on(async {
            while told.len() < 2 {
                told.push(tokio::time::timeout(WORKS, records.recv()).await.unwrap().unwrap());
            }
        });
        assert_eq!((told[0].reason, told[0].verdict), ("source", FlowVerdict::Denied));
        assert_eq!(told[0].pod.as_ref(), Some(&forger.name));
        let denied = told.iter().find(|record| record.reason == "policy").unwrap_or_else(|| panic!("{told:?}"));
        assert_eq!((denied.pod.as_ref(), denied.peer.as_ref()), (Some(&victim.name), Some(&forger.name)));
        assert_eq!((denied.source_port, denied.destination_port), (4_444, 80));
        let flows = world.runtime.block_on(world.agent().clone().conntrack());
        assert!(flows.is_empty(), "{flows:?}");
    }
}

#[test]
fn denied_packets_reach_the_log_group_with_their_names() {
    let mut world = World::new(AttachMode::Clsact);
    world.apply(&deny_in());
    world.activate_all();
    let shutdown = CancellationToken::new();
    let group_spec = LogGroupSpec { retention_days: Some(7), ..LogGroupSpec::default() };
    let settings = FlowLogSettings { group: "/aws/containerinsights/demo/flows".to_owned(), group_spec, node: "node1".to_owned() };
    let handle = world.agent().clone();
    let (cloud, log, task, mut records) = world.runtime.block_on(async {
        let cloud = Cloud::new(CloudConfig::default(), Clock::tokio());
        let sink = Arc::new(DirectLogs::new(&cloud, Duration::ZERO));
        let (log, task) = flow_log::spawn(handle.follow(false).await, settings, sink, shutdown.clone());
        (cloud, log, task, handle.follow(false).await)
    });
    world.blocked("y/a", "x/a", 80);
    world.works("x/a", "y/a", 80);
    world.runtime.block_on(async {
        tokio::time::timeout(WORKS, records.recv()).await.unwrap().unwrap();
        shutdown.cancel();
        tokio::time::timeout(WORKS, task).await.unwrap().unwrap();
    });
    assert_eq!(cloud.log_group("/aws/containerinsights/demo/flows").unwrap().retention_days, Some(7));
    let events = cloud.events("/aws/containerinsights/demo/flows", "node1");
    let lines: Vec<serde_json::Value> = events.iter().map(|event| serde_json::from_str(&event.message).unwrap()).collect();
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    let named =
        ["verdict", "direction", "source_pod", "destination_pod", "protocol", "reason", "node"].map(|key| line[key].as_str().unwrap());
    assert_eq!(named, ["denied", "ingress", "y/a", "x/a", "TCP", "policy", "node1"]);
    assert_eq!((line["destination_port"].as_u64(), log.counters().lines_sent), (Some(80), 1), "{line}");
}

#[test]
fn an_agent_that_is_replaced_keeps_flows_and_policy() {
    for mode in modes() {
        let mut world = World::new(mode);
        let allow = "  policyTypes: [Ingress]\n  ingress:\n  - from: [{podSelector: {}}]\n    ports: [{port: 80}]\n";
        world.apply(&policy("x", "p", "a", allow));
        world.activate_all();
        let mut open = world.works("x/b", "x/a", 80);
        world.stop();
        assert!(echoes(&mut open, WORKS), "without an agent a flow goes on");
        world.works("x/b", "x/a", 80);
        world.blocked("y/a", "x/a", 80);
        world.start();
        world.blocked("y/a", "x/a", 80);
        assert!(echoes(&mut open, WORKS), "while the next agent learns");
        let policies = world.policies.clone();
        world.apply(&policies);
        assert!(echoes(&mut open, WORKS), "and afterwards");
        world.blocked("y/a", "x/a", 80);
        let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
        assert_eq!(snapshot.map_writes, 0, "a restart without a change writes nothing");
        assert_eq!(snapshot.endpoints.len(), 4);
        assert!(snapshot.endpoints.iter().any(|view| view.pod == PodName::new("x", "a") && view.ingress_isolated), "{snapshot:?}");
        // Layered changes still reach the kernel.
        world.apply("");
        world.works("y/a", "x/a", 80);
    }
}

/// What is there now is of a layout that the next agent does not read. Gives where the pins of both are.
fn make_another_layout(world: &World, layout: u16) -> [PathBuf; 2] {
    let (present, other) = (world.pin_root.join(format!("v{LAYOUT_VERSION}")), world.pin_root.join(format!("v{layout}")));
    std::fs::rename(&present, &other).unwrap();
    if world.mode == AttachMode::Clsact {
        world.pods.iter().for_each(|pod| move_filters(&world.node, &pod.host_if.host_if_name, layout).unwrap());
    }
    [present, other]
}

#[test]
fn in_strict_mode_a_pod_that_nobody_knows_is_closed_after_another_layout_too() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.stop();
        world.enforcing = EnforcingMode::Strict;
        world.start();
        let open: String =
            [("x", "a"), ("x", "b"), ("y", "b")].map(|(namespace, pod)| policy(namespace, pod, pod, "  ingress: [{}]\n")).concat();
        world.apply(&open);
        world.activate_all();
        world.works("x/a", "y/b", 80);
        world.blocked("x/a", "y/a", 80);
        world.stop();
        make_another_layout(&world, u16::try_from(LAYOUT_VERSION).unwrap() - 1);
        // Its object goes while no agent runs.
        let unknown = world.pods.pop().unwrap();
        world.cluster.send_replace(Arc::new(ClusterState::default()));
        world.start();
        world.apply(&open);
        world.works("x/a", "x/b", 80);
        let server = (unknown.address, 80).into();
        let reached = world.pod("x/a").netns.run(|| TcpStream::connect_timeout(&server, BLOCKED)).unwrap();
        world.pods.push(unknown);
        assert!(reached.is_err(), "{mode:?}: it is not known what it may receive");
    }
}

/// In standard mode what is not known is open, but not where the agent before policed it.
#[test]
fn a_policed_pod_whose_object_went_while_no_agent_ran_is_not_opened_by_another_layout() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.stop();
        world.enforcing = EnforcingMode::Standard;
        world.start();
        world.apply(&policy("y", "from-nobody", "b", "  policyTypes: [Ingress]\n"));
        world.activate_all();
        world.blocked("x/a", "y/b", 80);
        world.stop();
        make_another_layout(&world, u16::try_from(LAYOUT_VERSION).unwrap() - 1);
        // Its object goes while no agent runs.
        let unknown = world.pods.pop().unwrap();
        let policies = world.policies.clone();
        world.cluster.send_replace(Arc::new(ClusterState::default()));
        // The first agent of the new layout ends before it knows the cluster.
        world.start();
        world.stop();
        for _ in 0..2 {
            world.start();
            world.apply(&policies);
            world.works("x/a", "x/b", 80);
            let (into, out_of) = ((unknown.address, 80).into(), world.server("x/a", 80));
            let reached = world.pod("x/a").netns.run(|| TcpStream::connect_timeout(&into, BLOCKED)).unwrap();
            let reaches = unknown.netns.run(|| TcpStream::connect_timeout(&out_of, WORKS)).unwrap();
            assert!(reached.is_err(), "{mode:?}: it was closed in this direction");
            assert!(reaches.is_ok(), "{mode:?}: and never in the other: {reaches:?}");
            world.stop();
        }
        world.pods.push(unknown);
    }
}

#[test]
fn an_agent_of_another_layout_takes_over_without_a_gap() {
    let older = u16::try_from(LAYOUT_VERSION).unwrap() - 1;
    for (mode, layout) in modes().map(|mode| (mode, older)).chain([(AttachMode::Clsact, older + 2)]) {
        let mut world = World::new(mode);
        let allow = "  policyTypes: [Ingress]\n  ingress:\n  - from: [{podSelector: {}}]\n    ports: [{port: 80}]\n";
        world.apply(&policy("x", "p", "a", allow));
        world.activate_all();
        let mut open = world.works("x/b", "x/a", 80);
        world.stop();
        let [present, other] = make_another_layout(&world, layout);
        // From outside a pod and from inside, without a pause, while one takes over from the other.
        let stop = Arc::new(AtomicBool::new(false));
        let hammers = [hammer(&world, "y/a", "x/a", 80, &stop), hammer(&world, "x/b", "x/a", 81, &stop)];
        world.start();
        assert!(echoes(&mut open, WORKS), "{mode:?}: while the next agent learns");
        let policies = world.policies.clone();
        world.apply(&policies);
        assert!(echoes(&mut open, WORKS), "{mode:?}: and afterwards");
        world.works("x/b", "x/a", 80);
        stop.store(true, Ordering::Relaxed);
        for hammer in hammers {
            let (tries, passed) = hammer.join().unwrap();
            assert!(tries > 0 && passed == 0, "{mode:?}: {passed} of {tries} forbidden datagrams were answered");
        }
        world.blocked("y/a", "x/a", 80);
        let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
        assert!(present.exists() && !other.exists(), "{mode:?}: the other layout's programs and maps are gone: {}", snapshot.last_error);
        // Only its own programs are left: they follow policy alone.
        world.apply("");
        world.works("y/a", "x/a", 80);
    }
}

/// Sends datagrams to a pod's echo server until told to stop; gives how many were sent, each from a port of its own, and
/// how many were answered.
fn hammer(world: &World, from: &str, to: &str, port: u16, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<(u32, u32)> {
    let (netns, server, stop) = (world.pod(from).netns.clone(), world.server(to, port), Arc::clone(stop));
    std::thread::spawn(move || {
        netns
            .run(|| {
                let (mut tries, mut passed) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                    socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
                    socket.send_to(b"?", server).unwrap();
                    tries += 1;
                    passed += u32::from(socket.recv(&mut [0; 8]).is_ok());
                }
                (tries, passed)
            })
            .unwrap()
    })
}

#[test]
fn the_node_reaches_its_pods_whatever_their_policy() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&(deny_in() + &policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n")));
        world.activate_all();
        let server = world.server("x/a", 80);
        let mut probe = world.node.run(|| TcpStream::connect_timeout(&server, WORKS)).unwrap().unwrap();
        assert!(echoes(&mut probe, WORKS));
    }
}

/// The node translates a service's address to y/a, as a kube-proxy in zone `a` does.
#[test]
fn a_service_is_judged_by_the_backends_that_kube_proxy_may_choose_here() {
    for mode in modes() {
        let mut world = World::new(mode);
        let [near, far] = ["y/a", "y/b"].map(|name| world.pod(name).address);
        let nat = format!(
            "add chain inet t n {{ type nat hook prerouting priority -100; }}; add rule inet t n ip daddr 10.96.0.9 tcp dport 80 dnat ip to {near}"
        );
        assert!(world.node.output(std::process::Command::new("nft").arg(nat)).unwrap().status.success());
        let only_near =
            policy("x", "only-near", "a", "  egress: [{to: [{podSelector: {matchLabels: {pod: a}}, namespaceSelector: {}}]}]\n");
        let service = |zone: &str, traffic: &str, hints: [&str; 2]| {
            format!(
                "{only_near}---\napiVersion: v1\nkind: Node\nmetadata: {{name: node1, labels: {{{zone}}}}}\n---\napiVersion: v1\nkind: Service\n\
                 metadata: {{name: s, namespace: \"y\"}}\nspec: {{clusterIP: 10.96.0.9, internalTrafficPolicy: {traffic}, ports: [{{port: 80}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s-1, namespace: \"y\", labels: {{kubernetes.io/service-name: s}}}}\n\
                 addressType: IPv4\nports: [{{port: 80}}]\nendpoints:\n- {{addresses: [{near}], nodeName: node1, {}}}\n- {{addresses: [{far}], nodeName: node2, {}}}\n",
                hints[0], hints[1]
            )
        };
        let zones = ["hints: {forZones: [{name: a}]}", "hints: {forZones: [{name: b}]}"];
        let connects = |world: &World, patience: Duration| {
            let pod = world.pod("x/a");
            pod.netns.run(|| TcpStream::connect_timeout(&(Ipv4Addr::new(10, 96, 0, 9), 80).into(), patience)).unwrap().is_ok()
        };
        world.apply(&service("topology.kubernetes.io/zone: a", "Cluster", zones));
        world.activate_all();
        assert!(connects(&world, WORKS), "{mode:?}: near");
        // Only the node's label changes, to a zone whose backend is closed to the pod.
        world.apply(&service("topology.kubernetes.io/zone: b", "Cluster", zones));
        assert!(!connects(&world, BLOCKED), "{mode:?}: the other zone");
        world.apply(&service("topology.kubernetes.io/zone: a", "Cluster", zones));
        assert!(connects(&world, WORKS), "{mode:?}: near again");
        world.apply(&service("", "Cluster", zones));
        assert!(!connects(&world, BLOCKED), "{mode:?}: a zone that is not known");
        world.apply(&service("topology.kubernetes.io/zone: a", "Cluster", ["", zones[1]]));
        assert!(!connects(&world, BLOCKED), "{mode:?}: a backend without hints");
        world.apply(&service("", "Local", ["", ""]));
        assert!(connects(&world, WORKS), "{mode:?}: on this node");
    }
}

#[test]
fn a_service_address_that_ipvs_put_on_the_node_is_judged_as_one() {
    for mode in modes() {
        let mut world = World::new(mode);
        let service = Ipv4Addr::new(10, 99, 0, 1);
        // A dummy in truth, which not every kernel has; only its name matters.
        ip_batch(world.node.name(), &format!("link add kube-ipvs0 type bridge\naddr add {service}/32 dev kube-ipvs0\n")).unwrap();
        world.apply(&policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n"));
        world.activate_all();
        let listener = world.node.run(|| TcpListener::bind("0.0.0.0:80")).unwrap().unwrap();
        let connect = |pod: &str, address: Ipv4Addr, patience: Duration| {
            world.pod(pod).netns.run(|| TcpStream::connect_timeout(&(address, 80).into(), patience)).unwrap()
        };
        let _unpoliced = connect("x/b", service, WORKS).unwrap();
        let _the_node = connect("x/a", Ipv4Addr::new(10, 88, 0, 1), WORKS).unwrap();
        assert!(connect("x/a", service, BLOCKED).is_err(), "{mode:?}: no rule allows a service, and it is not the node");
        drop(listener);
    }
}

#[test]
fn a_deleted_pod_leaves_nothing_and_its_slot_inherits_nothing() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let _open = world.works("x/a", "y/a", 80);
        let handle = world.agent().clone();
        assert!(world.runtime.block_on(handle.deactivate(ContainerId::from("x/a"))));
        assert!(!world.runtime.block_on(handle.deactivate(ContainerId::from("x/a"))), "twice is once");
        world.blocked("x/a", "y/a", 80);
        // Nobody takes the veth down: it is not left shut for ever.
        let start = Instant::now();
        while world.connect("x/a", "y/a", 80, BLOCKED).is_err() {
            assert!(start.elapsed() < Duration::from_secs(35), "programs are still on a veth that no pod has");
        }
        ip_batch(world.node.name(), "link del eni1\n").unwrap();
        let start = Instant::now();
        let flows = || world.runtime.block_on(handle.conntrack()).iter().filter(|flow| flow.pod.is_none()).count();
        while flows() > 0 {
            assert!(start.elapsed() < Duration::from_secs(25), "the flows of the deleted pod are still there");
            std::thread::yield_now();
        }
        let snapshot = world.runtime.block_on(handle.snapshot());
        assert_eq!(snapshot.endpoints.len(), 3);
    }
}

/// The agent that deleted the pod ends before it has taken the pod's flows away.
#[test]
fn a_slot_that_was_freed_before_a_restart_passes_nothing_on() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let _open = world.works("x/a", "y/a", 80);
        let flows = |world: &World| world.runtime.block_on(world.agent().clone().conntrack());
        assert!(flows(&world).iter().any(|flow| flow.pod == Some(PodName::new("x", "a"))));
        assert!(world.runtime.block_on(world.agent().clone().deactivate(ContainerId::from("x/a"))));
        world.stop();
        world.start();
        // Before it hands out the first slot.
        let left = flows(&world);
        assert!(left.iter().all(|flow| flow.pod.is_some()), "{mode:?}: {left:?}");
    }
}

/// Answers every question for an address with these.
fn serve_dns(netns: &Netns, addresses: Vec<Ipv4Addr>) {
    let socket = netns.run(|| UdpSocket::bind(("0.0.0.0", 53))).unwrap().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0u8; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let _unreachable = socket.send_to(&answered(&buffer[..length], &addresses), peer);
        }
    });
}

/// The same over TCP, to one client: the answer comes in two pieces.
fn serve_dns_by_tcp(pod: &Pod, address: Ipv4Addr) {
    let listener = pod.netns.run(|| TcpListener::bind(("0.0.0.0", 53))).unwrap().unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut question = vec![0; 2];
        client.read_exact(&mut question).unwrap();
        question.resize(usize::from(u16::from_be_bytes([question[0], question[1]])), 0);
        client.read_exact(&mut question).unwrap();
        let answer = answered(&question, &[address]);
        let whole = [&u16::try_from(answer.len()).unwrap().to_be_bytes()[..], &answer].concat();
        client.set_nodelay(true).unwrap();
        client.write_all(&whole[..30]).unwrap();
        client.write_all(&whole[30..]).unwrap();
        // Until the client has gone.
        let _end = client.read(&mut [0]);
    });
}

/// The question with addresses of type A, class IN, for 300 s.
fn answered(question: &[u8], addresses: &[Ipv4Addr]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2..6].copy_from_slice(&[0x81, 0x80, 0, 1]);
    answer[6..8].copy_from_slice(&u16::try_from(addresses.len()).unwrap().to_be_bytes());
    for address in addresses {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}

fn question(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat());
    [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0].into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
}

/// Asks for a name, and waits for the answer.
fn resolve(pod: &Pod, server: SocketAddr, name: &str) {
    let socket = pod.netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket.set_read_timeout(Some(WORKS)).unwrap();
    socket.send_to(&question(name), server).unwrap();
    socket.recv(&mut [0u8; 4_096]).unwrap();
}

#[test]
fn a_name_that_policy_allows_means_the_addresses_in_the_pods_dns_answers() {
    for mode in modes() {
        let mut world = World::new(mode);
        let allow = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: c}\nspec:\n  tier: Admin\n  priority: 1\n  \
                     subject: {pods: {namespaceSelector: {matchLabels: {ns: \"x\"}}, podSelector: {matchLabels: {pod: a}}}}\n  egress:\n  \
                     - {action: Accept, to: [{networks: [0.0.0.0/0]}], protocols: [{udp: {destinationPort: {number: 53}}}]}\n  \
                     - {action: Accept, to: [{domainNames: [\"*.example.com\"]}], protocols: [{tcp: {destinationPort: {number: 80}}}]}\n  \
                     - {action: Deny, to: [{networks: [0.0.0.0/0]}]}\n";
        world.apply(&format!("---\n{allow}"));
        world.activate_all();
        serve_dns(&world.pod("y/a").netns, vec![world.pod("y/b").address]);
        let server = SocketAddr::from((world.pod("y/a").address, 53));
        world.blocked("x/a", "y/b", 80);
        resolve(world.pod("x/a"), server, "www.example.org");
        // Another pod's answers teach nothing.
        resolve(world.pod("x/b"), server, "www.example.com");
        world.blocked("x/a", "y/b", 80);
        resolve(world.pod("x/a"), server, "www.Example.com");
        let mut open = world.works("x/a", "y/b", 80);
        world.blocked("x/a", "y/b", 81);
        world.blocked("x/a", "x/b", 80);
        // What a name means outlives the agent.
        let start = Instant::now();
        while !world.state.path().join("names.json").exists() {
            assert!(start.elapsed() < WORKS, "names are not written");
            std::thread::yield_now();
        }
        world.stop();
        world.start();
        let policies = world.policies.clone();
        world.apply(&policies);
        assert!(echoes(&mut open, WORKS), "after a restart");
        world.works("x/a", "y/b", 80);
        let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
        assert_eq!((snapshot.map_writes, snapshot.problems.len()), (0, 0), "{snapshot:?}");
    }
}

/// x/a reaches the DNS servers in pods named a, and by name.
const BY_NAME: &str = "---\napiVersion: policy.networking.k8s.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {name: c}\nspec:\n  tier: Admin\n  \
     priority: 1\n  subject: {pods: {namespaceSelector: {matchLabels: {ns: \"x\"}}, podSelector: {matchLabels: {pod: a}}}}\n  egress:\n  \
     - {action: Accept, to: [{pods: {podSelector: {matchLabels: {pod: a}}}}]}\n  \
     - {action: Accept, to: [{domainNames: [\"*.example.com\"]}]}\n  \
     - {action: Deny, to: [{networks: [0.0.0.0/0]}]}\n";

/// The answer's time is over, and what is open is known only when the kernel has been asked.
#[test]
fn a_connection_by_name_outlives_its_answer_and_another_layout() {
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(BY_NAME);
        world.activate_all();
        serve_dns(&world.pod("y/a").netns, vec![world.pod("y/b").address]);
        resolve(world.pod("x/a"), SocketAddr::from((world.pod("y/a").address, 53)), "www.example.com");
        let mut open = world.works("x/a", "y/b", 80);
        let file = world.state.path().join("names.json");
        let start = Instant::now();
        while !file.exists() {
            assert!(start.elapsed() < WORKS, "names are not written");
            std::thread::yield_now();
        }
        world.stop();
        let mut names: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        names["names"].as_array_mut().unwrap().iter_mut().for_each(|name| name[2] = 1.into());
        std::fs::write(&file, names.to_string()).unwrap();
        make_another_layout(&world, u16::try_from(LAYOUT_VERSION).unwrap() - 1);
        world.start();
        assert!(echoes(&mut open, WORKS), "{mode:?}: while the next agent learns");
        let policies = world.policies.clone();
        world.apply(&policies);
        for _ in 0..3 {
            assert!(echoes(&mut open, WORKS), "{mode:?}: and afterwards");
        }
        world.works("x/a", "y/b", 80);
    }
}

/// The address stands behind so many others that it comes in the second fragment.
#[test]
fn a_dns_answer_in_fragments_is_learnt() {
    let mut world = World::new(AttachMode::beside_ingress_qdisc());
    world.apply(BY_NAME);
    world.activate_all();
    let others = (1..=120).map(|last| Ipv4Addr::new(203, 0, 113, last));
    serve_dns(&world.pod("y/a").netns, others.chain([world.pod("y/b").address]).collect());
    world.blocked("x/a", "y/b", 80);
    resolve(world.pod("x/a"), SocketAddr::from((world.pod("y/a").address, 53)), "www.example.com");
    world.works("x/a", "y/b", 80);
}

/// A datagram is sent once: it arrives although it left before the agent can have read the answer.
#[test]
fn what_a_pod_sends_in_the_instant_of_a_dns_answer_is_not_lost() {
    let mut world = World::new(AttachMode::beside_ingress_qdisc());
    world.apply(BY_NAME);
    world.activate_all();
    serve_dns(&world.pod("y/a").netns, vec![world.pod("y/b").address]);
    serve_dns_by_tcp(world.pod("y/a"), world.pod("x/b").address);
    let server = SocketAddr::from((world.pod("y/a").address, 53));
    let client = world.pod("x/a");
    let hears = |name: &str| {
        let socket = world.pod(name).netns.run(|| UdpSocket::bind(("0.0.0.0", 7_000))).unwrap().unwrap();
        socket.set_read_timeout(Some(WORKS)).unwrap();
        socket
    };
    world.blocked("x/a", "y/b", 80);
    world.blocked("x/a", "x/b", 80);
    let (first, second) = (hears("y/b"), hears("x/b"));
    let socket = client.netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    resolve(client, server, "one.example.com");
    socket.send_to(b"at once", (world.pod("y/b").address, 7_000)).unwrap();
    let (length, from) = first.recv_from(&mut [0; 16]).unwrap();
    assert_eq!((length, from.ip()), (7, client.address.into()));

    let mut connection = client.netns.run(|| TcpStream::connect(server)).unwrap().unwrap();
    let question = question("two.example.com");
    connection.write_all(&[&u16::try_from(question.len()).unwrap().to_be_bytes()[..], &question].concat()).unwrap();
    connection.read_exact(&mut vec![0; 2 + question.len() + 16]).unwrap();
    socket.send_to(b"at once", (world.pod("x/b").address, 7_000)).unwrap();
    assert_eq!(second.recv(&mut [0; 16]).unwrap(), 7);
}

/// Whoever a pod lets in may send from port 53 what looks like an answer.
#[test]
fn a_dns_answer_that_the_pod_did_not_ask_for_teaches_nothing() {
    for policies in [BY_NAME.to_owned(), BY_NAME.to_owned() + &deny_in()] {
        let mut world = World::new(AttachMode::beside_ingress_qdisc());
        world.apply(&policies);
        world.activate_all();
        let (client, forger) = (world.pod("x/a"), world.pod("y/b"));
        serve_dns(&world.pod("y/a").netns, Vec::new());
        serve_dns(&world.node, vec![forger.address]);
        let forged = answered(&question("www.example.com"), &[forger.address]);
        let socket = forger.netns.run(|| UdpSocket::bind(("0.0.0.0", 53))).unwrap().unwrap();
        socket.send_to(&forged, (client.address, 80)).unwrap();
        let framed = [&u16::try_from(forged.len()).unwrap().to_be_bytes()[..], &forged].concat();
        if let Ok(mut connection) = connect_from(forger, 53, (client.address, 80).into()) {
            connection.write_all(&framed).unwrap();
            connection.read_exact(&mut vec![0; framed.len()]).unwrap();
        }
        // The agent reads in order: it has seen them when it has seen what the pod asked for.
        resolve(client, SocketAddr::from((world.pod("y/a").address, 53)), "www.example.org");
        world.blocked("x/a", "y/b", 80);
        world.blocked("x/a", "y/b", 80);
        // No policy speaks of the node's own DNS cache: what a pod asks it counts all the same.
        resolve(client, "10.88.0.1:53".parse().unwrap(), "www.example.com");
        world.works("x/a", "y/b", 80);
    }
}

/// A connection from this port, if it comes about soon.
fn connect_from(pod: &Pod, port: u16, to: SocketAddr) -> io::Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt};
    let SocketAddr::V4(to) = to else { unreachable!("the world is IPv4") };
    let connected = pod.netns.run(|| -> io::Result<TcpStream> {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Bounds connect, too.
        setsockopt(&socket, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(0, 250_000))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        bind(fd, &SockaddrIn::new(0, 0, 0, 0, port))?;
        connect(fd, &SockaddrIn::from(to))?;
        Ok(TcpStream::from(socket))
    });
    connected.unwrap()
}
