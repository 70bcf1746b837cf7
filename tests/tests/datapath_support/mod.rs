//! A node with pods in network namespaces and the policy actor on it, for tests over real sockets.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::manifests;
use stanchion_core::policy::engine::Source;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::netpol::{
    ActivateError, ActivateIf, ActivateRequest, AttachMode, EnforcingMode, LoadOptions, NetpolHandle, NetpolParts, load, spawn,
};
use stanchion_lab::netns::{Netns, ip_batch};
use stanchion_lab::refusals::Refusals;
use stanchion_lab::stray::Maker;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a packet that must not arrive is waited for.
pub(crate) const BLOCKED: Duration = Duration::from_millis(250);
/// How long one that must arrive may take on a busy machine.
pub(crate) const WORKS: Duration = Duration::from_secs(5);

/// The ways of attaching that this kernel has: clsact everywhere, TCX from Linux 6.6.
pub(crate) fn modes() -> impl Iterator<Item = AttachMode> {
    let newest = AttachMode::beside_ingress_qdisc();
    [AttachMode::Clsact, newest].into_iter().take(if newest == AttachMode::Tcx { 2 } else { 1 })
}

/// A pod's namespace, with echo servers for TCP and UDP on ports 80 and 81.
pub(crate) struct Pod {
    pub(crate) name: PodName,
    pub(crate) netns: Netns,
    pub(crate) address: Ipv4Addr,
    pub(crate) host_if: ActivateIf,
    /// Of the host end, which the pod's frames go to.
    pub(crate) host_mac: Vec<u8>,
}

/// The agent's part under test, on a thread in the node's namespace.
pub(crate) struct Agent {
    pub(crate) handle: NetpolHandle,
    pub(crate) shutdown: CancellationToken,
    pub(crate) thread: std::thread::JoinHandle<()>,
}

/// A node with pods.
pub(crate) struct World {
    pub(crate) mode: AttachMode,
    pub(crate) enforcing: EnforcingMode,
    pub(crate) node: Netns,
    pub(crate) pods: Vec<Pod>,
    pub(crate) cluster: watch::Sender<Arc<ClusterState>>,
    pub(crate) handle: ClusterHandle,
    pub(crate) policies: String,
    pub(crate) extra_pods: String,
    pub(crate) pin_root: PathBuf,
    pub(crate) state: tempfile::TempDir,
    /// What the agent is refused; it is started anew for it.
    pub(crate) refusals: Option<Refusals>,
    pub(crate) agent: Option<Agent>,
    pub(crate) runtime: tokio::runtime::Runtime,
}

static WORLDS: AtomicU32 = AtomicU32::new(0);

impl World {
    /// Pods x/a, x/b, y/a, y/b, none active yet; the agent runs.
    pub(crate) fn new(mode: AttachMode) -> Self {
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let prefix = Maker::DatapathTest.name(&number.to_string());
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
            enforcing: EnforcingMode::Standard,
            node,
            pods: Vec::new(),
            cluster,
            handle,
            policies: String::new(),
            extra_pods: String::new(),
            pin_root,
            state: tempfile::tempdir().unwrap(),
            refusals: None,
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

    pub(crate) fn add_pod(&mut self, prefix: &str, name: &str, number: u8) {
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

    pub(crate) fn start(&mut self) {
        let (send, receive) = mpsc::channel();
        let (node, mode, enforcing, shutdown) = (self.node.clone(), self.mode, self.enforcing, CancellationToken::new());
        let (pin_root, state_dir, cluster, token) =
            (self.pin_root.clone(), self.state.path().to_owned(), self.handle.clone(), shutdown.clone());
        let refusals = self.refusals.clone();
        let thread = std::thread::spawn(move || {
            node.run(|| {
                if let Some(refusals) = &refusals {
                    refusals.install().unwrap();
                }
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let parts = NetpolParts {
                        loaded: load(&LoadOptions { pin_root, flow_entries: 4_096 }).unwrap(),
                        attach: mode,
                        cluster,
                        node_name: "node1".to_owned(),
                        source: Source::Policies,
                        mode: enforcing,
                        annotated_pods: false,
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

    pub(crate) fn stop(&mut self) {
        if let Some(Agent { shutdown, thread, .. }) = self.agent.take() {
            shutdown.cancel();
            thread.join().unwrap();
        }
    }

    pub(crate) fn agent(&self) -> &NetpolHandle {
        &self.agent.as_ref().unwrap().handle
    }

    pub(crate) fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name.to_string() == name).unwrap()
    }

    pub(crate) fn server(&self, name: &str, port: u16) -> SocketAddr {
        (self.pod(name).address, port).into()
    }

    /// Makes the cluster what the pods and these policies say, and waits until it is in force.
    pub(crate) fn apply(&mut self, policies: &str) {
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
        // The actor looks at the cluster before it answers: an answer means that it was applied. Its ready flag says so once.
        let handle = self.agent().clone();
        self.runtime.block_on(async {
            let mut ready = handle.ready();
            tokio::time::timeout(WORKS, ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
            handle.conntrack().await;
            handle.conntrack().await;
        });
    }

    pub(crate) fn request(&self, name: &str) -> ActivateRequest {
        let Pod { name, host_if, .. } = self.pod(name);
        ActivateRequest {
            pod: name.clone(),
            pod_uid: String::new(),
            container_id: ContainerId::new(name.to_string()),
            endpoints: vec![host_if.clone()],
            shares_ingress: false,
        }
    }

    pub(crate) fn activate(&self, name: &str) -> Result<(), ActivateError> {
        let handle = self.agent().clone();
        self.runtime.block_on(handle.activate(self.request(name)))?;
        self.bring_up(name);
        Ok(())
    }

    /// From now on it has network, policed or not.
    pub(crate) fn bring_up(&self, name: &str) {
        let host_if = &self.pod(name).host_if;
        let lines = format!("link set {0} up\nroute replace {1}/32 dev {0}\n", host_if.host_if_name, host_if.ipv4.unwrap());
        ip_batch(self.node.name(), &lines).unwrap();
    }

    pub(crate) fn adopt(&self, name: &str) -> Result<usize, ActivateError> {
        let handle = self.agent().clone();
        self.runtime.block_on(handle.adopt(vec![self.request(name)]))
    }

    pub(crate) fn activate_all(&self) {
        for pod in &self.pods {
            self.activate(&pod.name.to_string()).unwrap();
        }
    }

    /// A connection, if it comes about.
    pub(crate) fn connect(&self, from: &str, to: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
        let address = self.server(to, port);
        let stream = self.pod(from).netns.run(|| TcpStream::connect_timeout(&address, patience)).unwrap()?;
        stream.set_nodelay(true).unwrap();
        Ok(stream)
    }

    #[track_caller]
    pub(crate) fn works(&self, from: &str, to: &str, port: u16) -> TcpStream {
        let mut stream = self.connect(from, to, port, WORKS).unwrap_or_else(|error| panic!("TCP {from} -> {to}:{port}: {error}"));
        assert!(echoes(&mut stream, WORKS), "TCP {from} -> {to}:{port} is silent");
        stream
    }

    #[track_caller]
    pub(crate) fn blocked(&self, from: &str, to: &str, port: u16) {
        let result = self.connect(from, to, port, BLOCKED);
        assert!(result.is_err(), "TCP {from} -> {to}:{port} must be blocked");
    }

    /// A datagram of this size, echoed. Sent again now and then while there is patience: a busy kernel loses datagrams, and of
    /// fragments that its processors put out of order those before the first are dropped.
    pub(crate) fn datagram(&self, from: &str, to: &str, port: u16, size: usize, patience: Duration) -> bool {
        let address = self.server(to, port);
        let socket = self.pod(from).netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        socket.set_read_timeout(Some(patience.min(Duration::from_millis(500)))).unwrap();
        let (message, mut reply) = (vec![7u8; size], vec![0u8; size]);
        let start = Instant::now();
        loop {
            socket.send_to(&message, address).unwrap();
            if socket.recv(&mut reply).is_ok_and(|length| length == size) {
                return true;
            }
            if start.elapsed() >= patience {
                return false;
            }
        }
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
pub(crate) fn serve(netns: &Netns, port: u16) {
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
pub(crate) fn echoes(stream: &mut TcpStream, patience: Duration) -> bool {
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut byte = [0u8; 1];
    stream.write_all(&[42]).is_ok() && stream.read_exact(&mut byte).is_ok()
}

pub(crate) fn policy(namespace: &str, name: &str, pod: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: \"{namespace}\"}}\n\
         spec:\n  podSelector: {{matchLabels: {{pod: {pod}}}}}\n{rest}"
    )
}

pub(crate) fn deny_in() -> String {
    policy("x", "deny-in", "a", "  policyTypes: [Ingress]\n")
}
