//! Policy on real wires where somebody else has a hand in it: the pod itself, another plugin, the runtime's garbage collection, and who asks
//! without end.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use datapath_support::*;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stanchion_core::ids::{ContainerId, PodName};
use stanchion_daemon::cni::{CniService, CniSettings, Told};
use stanchion_daemon::netpol::{ActivateIf, ActivateRequest, AttachMode};
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_lab::ipam_world::{self, WorldSpec};
use stanchion_lab::netns::ip_batch;
use stanchion_lab::wait::wait_for;
use stanchion_proto as wire;
use stanchion_proto::cni_server::Cni as _;
use tonic::Request;

/// Longer than a sweep takes to come round.
const SWEPT: Duration = Duration::from_secs(40);

/// What a command says in the node's namespace.
fn on_node(world: &World, line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = world.node.output(Command::new(words.next().unwrap()).args(words)).unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn until(world: &World, what: &str, holds: impl AsyncFn() -> bool) {
    let check = || async {
        anyhow::ensure!(holds().await, "not yet");
        Ok(())
    };
    world.runtime.block_on(wait_for(what, SWEPT, check)).unwrap();
}

/// Waits until the agent has looked at its pods so many times: it puts back what is taken from y/b.
fn wait_for_sweeps(world: &World, count: usize) {
    let decoy = &world.pod("y/b").host_if;
    let pin = world.pin_root.join(format!("v{LAYOUT_VERSION}/links/{}-ingress", decoy.host_if_index));
    for _ in 0..count {
        let is_link = pin.exists();
        match is_link {
            true => std::fs::remove_file(&pin).unwrap(),
            false => drop(on_node(world, &format!("tc qdisc del dev {} clsact", decoy.host_if_name))),
        }
        let is_back = || match is_link {
            true => pin.exists(),
            false => on_node(world, &format!("tc qdisc show dev {}", decoy.host_if_name)).contains("clsact"),
        };
        until(world, "a look of the agent at its pods", async || is_back());
    }
}

/// x/a with a second veth, as a pod of an IPv6 cluster has one; active.
fn with_second_interface(world: &World) {
    let pod = world.pod("x/a");
    ip_batch(world.node.name(), &format!("link add eg1 type veth peer name v4if0 netns {}\nlink set eg1 up\n", pod.netns.name())).unwrap();
    ip_batch(pod.netns.name(), "link set v4if0 up\n").unwrap();
    let index = world.node.run(|| nix::net::if_::if_nametoindex("eg1")).unwrap().unwrap();
    let second =
        ActivateIf { host_if_name: "eg1".to_owned(), host_if_index: index, ipv4: Some(Ipv4Addr::new(169, 254, 172, 9)), ipv6: None };
    let request = ActivateRequest {
        pod: pod.name.clone(),
        pod_uid: String::new(),
        container_id: ContainerId::new("x/a"),
        endpoints: vec![pod.host_if.clone(), second],
        shares_ingress: false,
    };
    world.runtime.block_on(world.agent().clone().activate(request)).unwrap();
    world.bring_up("x/a");
}

/// Whether a datagram of the pod from an address that is not its own reaches another pod.
fn forged_arrives(world: &World) -> bool {
    let victim = world.pod("y/a").netns.run(|| UdpSocket::bind("0.0.0.0:7777")).unwrap().unwrap();
    victim.set_read_timeout(Some(BLOCKED)).unwrap();
    let target: SocketAddr = world.server("y/a", 7777);
    let pod = world.pod("x/a");
    ip_batch(pod.netns.name(), "addr add 10.99.0.9/32 dev lo\n").unwrap();
    let sender = pod.netns.run(|| UdpSocket::bind("10.99.0.9:0")).unwrap().unwrap();
    sender.send_to(b"?", target).unwrap();
    let arrived = victim.recv(&mut [0; 8]).is_ok();
    ip_batch(pod.netns.name(), "addr del 10.99.0.9/32 dev lo\n").unwrap();
    arrived
}

#[test]
fn a_pod_that_deletes_one_of_its_interfaces_stays_policed_on_the_other() {
    deletes_one_of_its_interfaces(AttachMode::Clsact);
}

#[test]
fn a_pod_that_deletes_one_of_its_interfaces_stays_policed_by_links_where_the_kernel_has_them() {
    modes().skip(1).for_each(deletes_one_of_its_interfaces);
}

fn deletes_one_of_its_interfaces(mode: AttachMode) {
    let mut world = World::new(mode);
    world.apply(&(deny_in() + &policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n")));
    world.activate("y/a").unwrap();
    world.activate("y/b").unwrap();
    with_second_interface(&world);
    let holds = |world: &World, when: &str| {
        world.blocked("y/a", "x/a", 80);
        world.blocked("x/a", "y/a", 80);
        assert!(!forged_arrives(world), "{mode:?}: a forged source, {when}");
    };
    holds(&world, "before");
    // From within.
    ip_batch(world.pod("x/a").netns.name(), "link del v4if0\n").unwrap();
    wait_for_sweeps(&world, 4);
    holds(&world, "after four looks");
    world.stop();
    world.start();
    let policies = world.policies.clone();
    world.apply(&policies);
    holds(&world, "with the next agent");
    let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
    assert!(snapshot.endpoints.iter().any(|view| view.pod == PodName::new("x", "a")), "{snapshot:?}");
    // With its last one it is gone.
    ip_batch(world.node.name(), "link del eni1\n").unwrap();
    until(&world, "the end of a pod without interfaces", async || world.agent().clone().snapshot().await.endpoints.len() == 2);
}

/// The bandwidth plugin puts an ingress qdisc on the host end after us, which has the place of clsact.
#[test]
fn a_pod_whose_host_end_another_plugin_shapes_stays_policed_and_shaped() {
    // Before Linux 6.6 there is no other place.
    if AttachMode::beside_ingress_qdisc() != AttachMode::Tcx {
        return;
    }
    let mut world = World::new(AttachMode::Clsact);
    world.apply(&deny_in());
    for name in ["y/a", "y/b"] {
        world.activate(name).unwrap();
    }
    let Pod { name, host_if, .. } = world.pod("x/a");
    let request = ActivateRequest {
        pod: name.clone(),
        pod_uid: String::new(),
        container_id: ContainerId::new("x/a"),
        endpoints: vec![host_if.clone()],
        shares_ingress: true,
    };
    world.runtime.block_on(world.agent().clone().activate(request)).unwrap();
    on_node(&world, "tc qdisc add dev eni1 ingress");
    on_node(&world, "tc qdisc add dev eni1 root tbf rate 1gbit burst 1mb latency 25ms");
    world.bring_up("x/a");
    let holds = |world: &World| {
        let qdiscs = on_node(world, "tc qdisc show dev eni1");
        assert!(qdiscs.contains("qdisc ingress") && qdiscs.contains("qdisc tbf") && !qdiscs.contains("clsact"), "{qdiscs}");
        world.blocked("y/a", "x/a", 80);
        world.works("x/a", "y/a", 80);
        assert!(!forged_arrives(world), "a forged source");
        let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
        let attached: Vec<&str> = snapshot.endpoints.iter().flat_map(|view| &view.interfaces).map(|interface| interface.attached).collect();
        assert_eq!((snapshot.last_error.as_str(), attached), ("", vec!["clsact", "clsact", "tcx"]));
    };
    holds(&world);
    wait_for_sweeps(&world, 2);
    holds(&world);
    world.stop();
    world.start();
    let policies = world.policies.clone();
    world.apply(&policies);
    holds(&world);
    wait_for_sweeps(&world, 1);
    holds(&world);
}

/// Asks without end, by whoever may, and changes of the cluster without end.
#[test]
fn who_asks_without_end_keeps_neither_pods_from_starting_nor_the_agent_from_looking_at_them() {
    let mut world = World::new(AttachMode::Clsact);
    world.apply(&deny_in());
    world.activate("y/b").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let asking = {
        let (handle, stop) = (world.agent().clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                // They leave before they are answered.
                runtime.block_on(async {
                    let askers = (0..1_000).map(|_| tokio::time::timeout(Duration::ZERO, handle.snapshot()));
                    futures_util::future::join_all(askers).await
                });
                asked += 1_000;
            }
            asked
        })
    };
    let changing = {
        let (cluster, stop) = (world.cluster.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let state = cluster.borrow().as_ref().clone();
                cluster.send_replace(Arc::new(state));
            }
        })
    };
    for name in ["x/a", "x/b", "y/a"] {
        let activated = world.runtime.block_on(async { tokio::time::timeout(SWEPT, world.agent().activate(world.request(name))).await });
        activated.expect("within the deadline").unwrap();
        world.bring_up(name);
    }
    wait_for_sweeps(&world, 1);
    world.works("x/a", "y/a", 80);
    world.blocked("y/a", "x/a", 80);
    let answered = world.runtime.block_on(async { tokio::time::timeout(SWEPT, world.agent().snapshot()).await });
    assert_eq!(answered.expect("within the deadline").endpoints.len(), 4);
    stop.store(true, Ordering::Relaxed);
    changing.join().unwrap();
    assert!(asking.join().unwrap() > 0);
}

/// A pod with security groups of its own that ran before the agent: no list of the runtime has the id under which it is active.
#[test]
fn garbage_collection_takes_policy_from_what_the_runtime_could_name_and_did_not() {
    let mut world = World::new(AttachMode::Clsact);
    world.apply(&(deny_in() + &policy("y", "deny-in", "a", "  policyTypes: [Ingress]\n")));
    for name in ["x/a", "x/b"] {
        world.activate(name).unwrap();
    }
    let Pod { name, host_if, .. } = world.pod("y/a");
    let running = ActivateRequest {
        pod: name.clone(),
        pod_uid: String::new(),
        container_id: ContainerId::stand_in(name),
        endpoints: vec![host_if.clone()],
        shares_ingress: false,
    };
    assert_eq!(world.runtime.block_on(world.agent().clone().adopt(vec![running])).unwrap(), 1);
    world.bring_up("y/a");
    let _runtime = world.runtime.enter();
    let addresses = ipam_world::World::start(WorldSpec::new("m5.large", &[]));
    world.runtime.block_on(addresses.handle.ready()).expect("it starts");
    let settings = CniSettings { pod_mtu: 9_001, veth_prefix: "eni".to_owned(), egress: None, strict_policy: true };
    let service = CniService::new(addresses.handle.clone(), Some(world.agent().clone()), None, settings, Told::default());
    let sandbox = |container: &str, pod: &PodName| wire::Sandbox {
        network_name: "aws-cni".to_owned(),
        container_id: container.to_owned(),
        if_name: "eth0".to_owned(),
        pod_namespace: pod.namespace.clone(),
        pod_name: pod.name.clone(),
        ..wire::Sandbox::default()
    };
    let collect = |living: &[&str]| {
        let valid =
            living.iter().map(|container| wire::ValidAttachment { container_id: (*container).to_owned(), if_name: "eth0".to_owned() });
        let request = wire::CollectGarbageRequest { network_name: "aws-cni".to_owned(), valid: valid.collect() };
        world.runtime.block_on(service.collect_garbage(Request::new(request))).unwrap();
        let snapshot = world.runtime.block_on(world.agent().clone().snapshot());
        snapshot.endpoints.iter().map(|view| view.pod.to_string()).collect::<Vec<_>>()
    };
    // Whose interface it is that is there already, for an ADD that wants its name.
    let holder = |asks: &str| {
        let asks = world.pod(asks).name.clone();
        let endpoint = wire::Endpoint {
            host_if_name: host_if.host_if_name.clone(),
            host_if_index: host_if.host_if_index,
            ..wire::Endpoint::default()
        };
        let request = wire::CheckNetworkRequest { sandbox: Some(sandbox("c", &asks)), endpoints: vec![endpoint] };
        world.runtime.block_on(service.check_network(Request::new(request))).unwrap().into_inner().held_by
    };
    assert_eq!((holder("y/b").as_str(), holder("y/a").as_str()), ("y/a", ""));
    assert_eq!(collect(&["x/a", "x/b"]), ["x/a", "x/b", "y/a"]);
    assert_eq!(collect(&["x/a"]), ["x/a", "y/a"]);
    world.blocked("x/a", "y/a", 80);
    let other = IpAddr::from(world.pod("x/a").address);
    let node = world.node.run(|| TcpStream::connect_timeout(&(other, 80).into(), WORKS)).unwrap();
    assert!(node.is_ok(), "the node reaches them still: {node:?}");
}
