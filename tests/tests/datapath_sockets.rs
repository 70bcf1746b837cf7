//! The actor on real wires: pods are network namespaces on veths of a node's namespace, clients and servers are real
//! sockets, policies are manifests. Every test runs once over TCX links and once over clsact filters.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::manifests;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::netpol::{
    ActivateError, ActivateIf, ActivateRequest, AttachMode, EnforcingMode, FlowRecord, FlowVerdict, LoadOptions, NetpolHandle, NetpolParts,
    load, spawn,
};
use stanchion_lab::datapath::packet::{Packet, flags};
use stanchion_lab::netns::{Netns, ip_batch};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a packet that must not arrive is waited for.
const BLOCKED: Duration = Duration::from_millis(250);
/// How long one that must arrive may take on a busy machine.
const WORKS: Duration = Duration::from_secs(5);

const MODES: [AttachMode; 2] = [AttachMode::Tcx, AttachMode::Clsact];

/// A pod's namespace, with echo servers for TCP and UDP on ports 80 and 81.
struct Pod {
    name: PodName,
    netns: Netns,
    address: Ipv4Addr,
    host_if: ActivateIf,
    /// Of the host end, which the pod's frames go to.
    host_mac: Vec<u8>,
}

/// The agent's part under test, on a thread in the node's namespace.
struct Agent {
    handle: NetpolHandle,
    shutdown: CancellationToken,
    thread: std::thread::JoinHandle<()>,
}

/// A node with pods.
struct World {
    mode: AttachMode,
    node: Netns,
    pods: Vec<Pod>,
    cluster: watch::Sender<Arc<ClusterState>>,
    handle: ClusterHandle,
    policies: String,
    extra_pods: String,
    pin_root: PathBuf,
    state: tempfile::TempDir,
    agent: Option<Agent>,
    runtime: tokio::runtime::Runtime,
}

static WORLDS: AtomicU32 = AtomicU32::new(0);

impl World {
    /// Pods x/a, x/b, y/a, y/b, none active yet; the agent runs.
    fn new(mode: AttachMode) -> Self {
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("stdp{}-{number}", std::process::id());
        let node = Netns::create(&format!("{prefix}-node")).unwrap();
        node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).unwrap().unwrap();
        // A rule that asks for a connection's state: without one the kernel tracks nothing.
        let tracking =
            "add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state established accept";
        assert!(node.output(std::process::Command::new("nft").arg(tracking)).unwrap().status.success());
        let (cluster, handle) = ClusterHandle::channel(ClusterState::default());
        let pin_root = PathBuf::from(format!("/sys/fs/bpf/{prefix}"));
        let mut world = Self {
            mode,
            node,
            pods: Vec::new(),
            cluster,
            handle,
            policies: String::new(),
            extra_pods: String::new(),
            pin_root,
            state: tempfile::tempdir().unwrap(),
            agent: None,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        };
        ip_batch(world.node.name(), "link add up0 type bridge\naddr add 10.88.0.1/24 dev up0\nlink set up0 up\n").unwrap();
        for (index, name) in ["x/a", "x/b", "y/a", "y/b"].into_iter().enumerate() {
            world.add_pod(&prefix, name, u8::try_from(index + 1).unwrap());
        }
        world.start();
        world
    }

    fn add_pod(&mut self, prefix: &str, name: &str, number: u8) {
        let (namespace, pod) = name.split_once('/').unwrap();
        let netns = Netns::create(&format!("{prefix}-{namespace}{pod}")).unwrap();
        let address = Ipv4Addr::new(10, 77, 0, number);
        let host = format!("eni{number}");
        ip_batch(self.node.name(), &format!("link add {host} type veth peer name eth0 netns {}\n", netns.name())).unwrap();
        let mac = |netns: &Netns, link: &str| {
            let text = netns.run(|| std::process::Command::new("ip").args(["-j", "link", "show", link]).output()).unwrap().unwrap().stdout;
            let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
            (json[0]["address"].as_str().unwrap().to_owned(), u32::try_from(json[0]["ifindex"].as_u64().unwrap()).unwrap())
        };
        let (host_mac, index) = mac(&self.node, &host);
        let pod_lines = format!(
            "addr add {address}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\n\
             neigh add 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent\n"
        );
        ip_batch(netns.name(), &pod_lines).unwrap();
        let host_if = ActivateIf { host_if_name: host, host_if_index: index, ipv4: Some(address), ipv6: None };
        for port in [80, 81] {
            serve(&netns, port);
        }
        let host_mac = host_mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
        self.pods.push(Pod { name: PodName::new(namespace, pod), netns, address, host_if, host_mac });
    }

    fn start(&mut self) {
        let (send, receive) = mpsc::channel();
        let (node, mode, shutdown) = (self.node.clone(), self.mode, CancellationToken::new());
        let (pin_root, state_dir, cluster, token) =
            (self.pin_root.clone(), self.state.path().to_owned(), self.handle.clone(), shutdown.clone());
        let thread = std::thread::spawn(move || {
            node.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let parts = NetpolParts {
                        loaded: load(&LoadOptions { pin_root, flow_entries: 4_096 }).unwrap(),
                        attach: mode,
                        cluster,
                        node_name: "node1".to_owned(),
                        mode: EnforcingMode::Strict,
                        sync_wait: Duration::from_millis(300),
                        pod_flows: 4_096,
                        flow_capacity: 4_096,
                        state_dir,
                        shutdown: token,
                    };
                    let (handle, task) = spawn(parts).unwrap();
                    send.send(handle).unwrap();
                    task.await.unwrap();
                });
            })
            .unwrap();
        });
        let handle = receive.recv().unwrap();
        self.agent = Some(Agent { handle, shutdown, thread });
    }

    fn stop(&mut self) {
        if let Some(Agent { shutdown, thread, .. }) = self.agent.take() {
            shutdown.cancel();
            thread.join().unwrap();
        }
    }

    fn agent(&self) -> &NetpolHandle {
        &self.agent.as_ref().unwrap().handle
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name.to_string() == name).unwrap()
    }

    fn server(&self, name: &str, port: u16) -> SocketAddr {
        (self.pod(name).address, port).into()
    }

    /// Makes the cluster what the pods and these policies say, and waits until it is in force.
    fn apply(&mut self, policies: &str) {
        self.policies = policies.to_owned();
        let mut text = self.extra_pods.clone();
        for namespace in ["x", "y"] {
            text +=
                &format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: \"{namespace}\", labels: {{ns: \"{namespace}\"}}}}\n");
        }
        for Pod { name, address, .. } in &self.pods {
            text += &format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: \"{}\", namespace: \"{}\", labels: {{pod: \"{}\"}}}}\nspec: {{nodeName: node1, containers: []}}\n\
                 status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}]}}\n",
                name.name, name.namespace, name.name
            );
        }
        text += policies;
        let objects = manifests::parse("test.yaml", &text).unwrap();
        self.cluster.send_replace(Arc::new(ClusterState::default().replaced_by(objects)));
        // The actor looks at the cluster before its mailbox: an answer means that it was applied. Its ready flag says so once.
        let handle = self.agent().clone();
        self.runtime.block_on(async {
            let mut ready = handle.ready();
            tokio::time::timeout(WORKS, ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
            handle.conntrack().await;
            handle.conntrack().await;
        });
    }

    fn activate(&self, name: &str) -> Result<(), ActivateError> {
        let Pod { name, host_if, .. } = self.pod(name);
        let request = ActivateRequest {
            pod: name.clone(),
            pod_uid: String::new(),
            container_id: ContainerId::new(name.to_string()),
            endpoints: vec![host_if.clone()],
            shares_ingress: false,
        };
        let handle = self.agent().clone();
        self.runtime.block_on(handle.activate(request))?;
        let lines = format!("link set {0} up\nroute replace {1}/32 dev {0}\n", host_if.host_if_name, host_if.ipv4.unwrap());
        ip_batch(self.node.name(), &lines).unwrap();
        Ok(())
    }

    fn activate_all(&self) {
        for pod in &self.pods {
            self.activate(&pod.name.to_string()).unwrap();
        }
    }

    /// A connection, if it comes about.
    fn connect(&self, from: &str, to: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
        let address = self.server(to, port);
        let stream = self.pod(from).netns.run(|| TcpStream::connect_timeout(&address, patience)).unwrap()?;
        stream.set_nodelay(true).unwrap();
        Ok(stream)
    }

    #[track_caller]
    fn works(&self, from: &str, to: &str, port: u16) -> TcpStream {
        let mut stream = self.connect(from, to, port, WORKS).unwrap_or_else(|error| panic!("TCP {from} -> {to}:{port}: {error}"));
        assert!(echoes(&mut stream, WORKS), "TCP {from} -> {to}:{port} is silent");
        stream
    }

    #[track_caller]
    fn blocked(&self, from: &str, to: &str, port: u16) {
        let result = self.connect(from, to, port, BLOCKED);
        assert!(result.is_err(), "TCP {from} -> {to}:{port} must be blocked");
    }

    /// A datagram of this size, echoed.
    fn datagram(&self, from: &str, to: &str, port: u16, size: usize, patience: Duration) -> bool {
        let address = self.server(to, port);
        let socket = self.pod(from).netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        let message = vec![7u8; size];
        socket.send_to(&message, address).unwrap();
        let mut reply = vec![0u8; size];
        socket.recv(&mut reply).is_ok_and(|length| length == size)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(Agent { shutdown, .. }) = &self.agent {
                shutdown.cancel();
            }
        } else {
            self.stop();
        }
        for pod in &self.pods {
            let _gone = pod.netns.remove();
        }
        let _gone = self.node.remove();
        let _gone = std::fs::remove_dir_all(&self.pin_root);
    }
}

/// Echoes on a port until the process ends.
fn serve(netns: &Netns, port: u16) {
    let (listener, socket) =
        netns.run(|| (TcpListener::bind(("0.0.0.0", port)).unwrap(), UdpSocket::bind(("0.0.0.0", port)).unwrap())).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut buffer = [0u8; 1_024];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = vec![0u8; 65_536];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let _unreachable = socket.send_to(&buffer[..length], peer);
        }
    });
}

/// Whether a byte comes back.
fn echoes(stream: &mut TcpStream, patience: Duration) -> bool {
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut byte = [0u8; 1];
    stream.write_all(&[42]).is_ok() && stream.read_exact(&mut byte).is_ok()
}

fn policy(namespace: &str, name: &str, pod: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: \"{namespace}\"}}\n\
         spec:\n  podSelector: {{matchLabels: {{pod: {pod}}}}}\n{rest}"
    )
}

fn deny_in() -> String {
    policy("x", "deny-in", "a", "  policyTypes: [Ingress]\n")
}

#[test]
fn replies_pass_isolated_pods_and_requests_do_not() {
    for mode in MODES {
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
    for mode in MODES {
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
    for mode in MODES {
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
    for mode in MODES {
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
    for mode in MODES {
        let mut world = World::new(mode);
        world.apply(&policy("x", "p", "a", "  policyTypes: [Ingress]\n  ingress:\n  - ports: [{protocol: UDP, port: 80}]\n"));
        world.activate_all();
        assert!(world.datagram("y/a", "x/a", 80, 6_000, WORKS), "a datagram in fragments");
        assert!(!world.datagram("y/a", "x/a", 81, 6_000, BLOCKED), "one that policy forbids");
    }
}

#[test]
fn a_pod_is_policed_from_its_first_packet() {
    for mode in MODES {
        let mut world = World::new(mode);
        // Its agent does not know the cluster yet, and is strict.
        let error = world.activate("x/a").unwrap_err();
        assert!(matches!(error, ActivateError::NotSynced { .. }), "{error:?}");
        world.apply(&policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n"));
        world.activate("y/a").unwrap();
        let server = world.server("y/a", 81);
        let socket = world.pod("x/a").netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        // Hammers before, while and after its host end comes up.
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
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
    for mode in MODES {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let mut records = world.agent().subscribe();
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
fn an_agent_that_is_replaced_keeps_flows_and_policy() {
    for mode in MODES {
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
        assert_eq!(snapshot.endpoints.len(), 4);
        assert!(snapshot.endpoints.iter().any(|view| view.pod == PodName::new("x", "a") && view.ingress_isolated), "{snapshot:?}");
        // Layered changes still reach the kernel.
        world.apply("");
        world.works("y/a", "x/a", 80);
    }
}

#[test]
fn the_node_reaches_its_pods_whatever_their_policy() {
    for mode in MODES {
        let mut world = World::new(mode);
        world.apply(&(deny_in() + &policy("x", "deny-eg", "a", "  policyTypes: [Egress]\n")));
        world.activate_all();
        let server = world.server("x/a", 80);
        let mut probe = world.node.run(|| TcpStream::connect_timeout(&server, WORKS)).unwrap().unwrap();
        assert!(echoes(&mut probe, WORKS));
    }
}

#[test]
fn a_deleted_pod_leaves_nothing_and_its_slot_inherits_nothing() {
    for mode in MODES {
        let mut world = World::new(mode);
        world.apply(&deny_in());
        world.activate_all();
        let _open = world.works("x/a", "y/a", 80);
        let handle = world.agent().clone();
        assert!(world.runtime.block_on(handle.deactivate(ContainerId::from("x/a"))));
        assert!(!world.runtime.block_on(handle.deactivate(ContainerId::from("x/a"))), "twice is once");
        world.blocked("x/a", "y/a", 80);
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
