//! Pods that start under churn while a client inside sends from its first instruction and two outside send before the pod
//! is there: nothing forbidden passes, nothing allowed is dropped.
//!
//! `DATAPATH_STARTS` sets the number of starts for each way of attaching.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use datapath_support::{WORKS, World, modes, policy};
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_daemon::netpol::{ActivateIf, ActivateRequest, FlowRecord, FlowVerdict};
use stanchion_lab::netns::{Netns, ip_batch};
use stanchion_lab::stray::Maker;
use tokio::sync::broadcast::error::RecvError;

/// Between two packets of a client: also how long it waits for an answer that nobody gives.
const PACE: Duration = Duration::from_micros(300);

/// Destination ports: of the new pods 80 is open to x/b, 81 to nobody, 82 to x/b, who does not use it; of y/a the new pods
/// may reach 90, not 91.
const ALLOWED_IN: u16 = 80;
const CLOSED: u16 = 81;
const OTHERS: u16 = 82;
const ALLOWED_OUT: u16 = 90;
const FORBIDDEN_OUT: u16 = 91;

/// Sends to some ports of the address in `target` (0: nobody) until told to stop.
fn hammer(netns: &Netns, target: &Arc<AtomicU32>, stop: &Arc<AtomicBool>, ports: &'static [u16]) -> JoinHandle<()> {
    let (netns, target, stop) = (netns.clone(), Arc::clone(target), Arc::clone(stop));
    std::thread::spawn(move || {
        let socket = netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        socket.set_read_timeout(Some(PACE)).unwrap();
        while !stop.load(Ordering::Relaxed) {
            let address = Ipv4Addr::from(target.load(Ordering::Relaxed));
            for port in ports.iter().filter(|_| !address.is_unspecified()) {
                // Until the way is there, the kernel refuses.
                let _unreachable = socket.send_to(&[1], SocketAddr::from((address, *port)));
            }
            let _nobody_answers = socket.recv(&mut [0u8; 8]);
        }
    })
}

fn listen(netns: &Netns, port: u16) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(("0.0.0.0", port))).unwrap().unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Takes what has come, by source address.
fn drain(socket: &UdpSocket, seen: &mut BTreeMap<IpAddr, u32>) {
    while let Ok((_, source)) = socket.recv_from(&mut [0u8; 64]) {
        *seen.entry(source.ip()).or_default() += 1;
    }
}

fn policies() -> String {
    let ports = |list: &[u16]| list.iter().map(|port| format!("{{protocol: UDP, port: {port}}}")).collect::<Vec<_>>().join(", ");
    let rest = format!(
        "  policyTypes: [Ingress, Egress]\n  ingress:\n  - from: [{{podSelector: {{matchLabels: {{pod: b}}}}}}]\n    ports: [{}]\n  egress:\n  - to: \
         [{{namespaceSelector: {{matchLabels: {{ns: \"y\"}}}}, podSelector: {{matchLabels: {{pod: a}}}}}}]\n    ports: [{}]\n",
        ports(&[ALLOWED_IN, OTHERS]),
        ports(&[ALLOWED_OUT]),
    );
    policy("x", "new", "new", &rest)
}

fn object(name: &str, address: Ipv4Addr) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: \"x\", labels: {{pod: new}}}}\nspec: {{nodeName: node1, containers: []}}\n\
         status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}]}}\n"
    )
}

#[test]
fn starts_under_churn_leak_nothing_and_lose_nothing() {
    let starts: u32 = std::env::var("DATAPATH_STARTS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    for mode in modes() {
        let mut world = World::new(mode);
        world.apply(&policies());
        world.activate_all();
        let server = world.pod("y/a").netns.clone();
        let (allowed_out, forbidden_out) = (listen(&server, ALLOWED_OUT), listen(&server, FORBIDDEN_OUT));
        let (target, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let outside = [
            hammer(&world.pod("x/b").netns, &target, &stop, &[ALLOWED_IN, CLOSED]),
            hammer(&world.pod("y/b").netns, &target, &stop, &[ALLOWED_IN, OTHERS]),
        ];
        let mut records = world.runtime.block_on(world.agent().follow(false));
        let friend = IpAddr::from(world.pod("x/b").address);
        let mut denied = 0;
        for start in 0..starts {
            let name = format!("new-{start}");
            let address = Ipv4Addr::new(10, 77, u8::try_from(1 + start / 200 % 200).unwrap(), u8::try_from(1 + start % 200).unwrap());
            let told = format!("{mode:?}, start {start}");
            // Mostly the pod's object is there before its sandbox; now and then it comes late, and the start waits for it.
            let late = start % 4 == 3;
            if !late {
                world.extra_pods = object(&name, address);
                world.apply(&policies());
            }
            let netns = Netns::create(&Maker::DatapathTest.name(&format!("{}-{start}", format!("{mode:?}").to_lowercase()))).unwrap();
            ip_batch(world.node.name(), &format!("link add new{start} type veth peer name eth0 netns {}\n", netns.name())).unwrap();
            let link = stanchion_lab::netns::ip_json(&world.node, &["link", "show", &format!("new{start}")]).unwrap();
            let (mac, index) = (link[0]["address"].as_str().unwrap(), u32::try_from(link[0]["ifindex"].as_u64().unwrap()).unwrap());
            ip_batch(
                netns.name(),
                &format!(
                    "addr add {address}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\n\
                     neigh add 169.254.1.1 lladdr {mac} dev eth0 nud permanent\n"
                ),
            )
            .unwrap();
            let [allowed_in, closed, others] = [ALLOWED_IN, CLOSED, OTHERS].map(|port| listen(&netns, port));
            let inside_target = Arc::new(AtomicU32::new(world.pod("y/a").address.into()));
            let inside_stop = Arc::new(AtomicBool::new(false));
            let inside = hammer(&netns, &inside_target, &inside_stop, &[ALLOWED_OUT, FORBIDDEN_OUT]);
            target.store(address.into(), Ordering::Relaxed);

            let endpoint = ActivateIf { host_if_name: format!("new{start}"), host_if_index: index, ipv4: Some(address), ipv6: None };
            let container = ContainerId::new(name.clone());
            let request = ActivateRequest {
                pod: PodName::new("x", name.clone()),
                pod_uid: String::new(),
                container_id: container.clone(),
                endpoints: vec![endpoint],
                shares_ingress: false,
            };
            let handle = world.agent().clone();
            let activation = world.runtime.spawn(async move { handle.activate(request).await });
            if late {
                // The request first.
                world.runtime.block_on(tokio::task::yield_now());
                world.extra_pods = object(&name, address);
                world.apply(&policies());
            }
            world.runtime.block_on(activation).unwrap().unwrap_or_else(|error| panic!("{told}: {error}"));
            ip_batch(world.node.name(), &format!("link set new{start} up\nroute replace {address}/32 dev new{start}\n")).unwrap();

            let (mut seen, mut forbidden) = (BTreeMap::new(), BTreeMap::new());
            let mut reached = BTreeMap::new();
            let begin = Instant::now();
            while !(seen.contains_key(&friend) && reached.contains_key(&IpAddr::from(address))) {
                assert!(begin.elapsed() < WORKS, "{told}: what is allowed does not get through: in {seen:?}, out {reached:?}");
                drain(&allowed_in, &mut seen);
                drain(&allowed_out, &mut reached);
                std::thread::yield_now();
            }
            inside_stop.store(true, Ordering::Relaxed);
            inside.join().unwrap();
            target.store(0, Ordering::Relaxed);
            drain(&allowed_in, &mut seen);
            for socket in [&closed, &others] {
                drain(socket, &mut forbidden);
            }
            assert!(forbidden.is_empty() && seen.keys().all(|source| *source == friend), "{told}: leaked in: {forbidden:?} {seen:?}");
            let mut leaked = BTreeMap::new();
            drain(&forbidden_out, &mut leaked);
            assert!(leaked.is_empty(), "{told}: leaked out: {leaked:?}");

            // Denials of the new pod: never of what is allowed.
            let handle = world.agent().clone();
            let told_of: Vec<Arc<FlowRecord>> = world.runtime.block_on(async {
                handle.snapshot().await;
                let mut all = Vec::new();
                loop {
                    match tokio::time::timeout(Duration::ZERO, records.recv()).await {
                        Ok(Ok(record)) => all.push(record),
                        // More came than are kept.
                        Ok(Err(RecvError::Lagged(_))) => {}
                        _ => return all,
                    }
                }
            });
            for record in told_of.iter().filter(|record| record.verdict == FlowVerdict::Denied && record.destination_port != 0) {
                let allowed = (record.source == friend && record.destination_port == ALLOWED_IN) || record.destination_port == ALLOWED_OUT;
                assert!(!allowed, "{told}: an allowed packet was dropped: {record:?}");
                denied += 1;
            }
            let handle = world.agent().clone();
            assert!(world.runtime.block_on(handle.deactivate(container)), "{told}");
            ip_batch(world.node.name(), &format!("link del new{start}\n")).unwrap();
            netns.remove().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        outside.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(denied > 0, "the forbidden packets were sent and told");
    }
}
