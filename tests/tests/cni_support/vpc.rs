//! A node with two ENIs behind the router of a VPC, its host network made by the agent's own executor.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use stanchion_core::ids::Mac;
use stanchion_core::network::{EniPlan, EniRole, HostNetwork as _, HostPlan, HostReport, NetOp, PodHost, PodPlan, Randomize, Snat};
use stanchion_lab::netns::Netns;
use stanchion_netlink::veth::VethEnd;
use stanchion_netlink::{HostNet, Netlink};

use super::{OwnedNetns, run};

pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// Somewhere outside the VPC; the router has it.
pub(crate) const INTERNET: &str = "198.51.100.1";

/// A node with two ENIs in two subnets, a pod on each, and the VPC's router.
pub(crate) struct Vpc {
    pub(crate) node: OwnedNetns,
    pub(crate) router: OwnedNetns,
    pub(crate) pods: Vec<(OwnedNetns, PodPlan)>,
    pub(crate) host: HostNet,
    pub(crate) plan: HostPlan,
}

impl Vpc {
    pub(crate) async fn build() -> Self {
        let (node, router) = (OwnedNetns::create("n"), OwnedNetns::create("r"));
        let mut enis = Vec::new();
        for (device, address) in [(0u32, "10.0.0.5/24"), (1, "10.0.1.20/24")] {
            let (near, far) = (format!("eth{device}"), format!("rt{device}"));
            let mac = Mac([2, 0, 0, 0, 1, u8::try_from(device).unwrap()]);
            let own = VethEnd { name: far.clone(), mac: Mac([2, 0, 0, 0, 2, u8::try_from(device).unwrap()]) };
            let peer = VethEnd { name: near, mac };
            let node_fd = stanchion_netlink::Netns::open(&node.0.path()).unwrap();
            router.0.run(|| Netlink::open().unwrap().create_veth(&own, &peer, &node_fd, 1500).unwrap()).unwrap();
            run(&router.0, &format!("ip addr add 10.0.{device}.1/24 dev {far}"));
            // As EC2: a source that does not belong to this ENI's side is dropped.
            run(&router.0, &format!("sysctl -qw net.ipv4.conf.{far}.rp_filter=1"));
            enis.push(EniPlan {
                id: format!("eni-{device}").as_str().into(),
                mac,
                role: if device == 0 { EniRole::Primary } else { EniRole::Secondary },
                device_index: device,
                network_card: 0,
                ipv4: Some(address.parse().unwrap()),
                ipv6: None,
                table: stanchion_core::network::eni_route_table(0, device),
                mtu: 1500,
            });
        }
        run(&router.0, "sysctl -qw net.ipv4.ip_forward=1");
        run(&router.0, &format!("ip addr add {INTERNET}/32 dev lo"));
        run(&node.0, "ip addr add 10.0.0.5/24 dev eth0");
        run(&node.0, "ip link set eth0 up");
        run(&node.0, "ip route add default via 10.0.0.1");
        let host = HostNet::open_in(stanchion_netlink::Netns::open(&node.0.path()).unwrap()).unwrap();
        let snat = Snat { to: "10.0.0.5".parse().unwrap(), bypass: vec!["10.0.0.0/16".parse().unwrap()], randomize: Randomize::Fully };
        let plan =
            HostPlan { enis, snat: Some(snat), external_service_cidrs: vec!["100.64.0.0/10".parse().unwrap()], ..HostPlan::default() };
        let mut vpc = Self { node, router, pods: Vec::new(), host, plan };
        vpc.apply().await;
        vpc.add_pod("10.0.0.9", 0);
        vpc.add_pod("10.0.1.21", 1);
        vpc.apply().await;
        vpc
    }

    /// What the plugin does, and the VPC's mapping of the address to the ENI.
    pub(crate) fn add_pod(&mut self, address: &str, device: u32) {
        let number = u8::try_from(self.pods.len()).unwrap();
        let netns = OwnedNetns::create("p");
        let ipv4: Ipv4Addr = address.parse().unwrap();
        let plan = PodPlan {
            attachment: 0,
            host_if: format!("eni{number}"),
            pod_if: "eth0".into(),
            host_mac: Mac([2, 0, 0, 0, 3, number]),
            pod_mac: Mac([2, 0, 0, 0, 4, number]),
            ipv4: Some(ipv4),
            ipv6: None,
            mtu: 1500,
            table: stanchion_core::network::eni_route_table(0, device),
            branch: None,
        };
        let node_fd = stanchion_netlink::Netns::open(&self.node.0.path()).unwrap();
        let inside = || {
            let mut netlink = Netlink::open().unwrap();
            let own = VethEnd { name: plan.pod_if.clone(), mac: plan.pod_mac };
            let peer = VethEnd { name: plan.host_if.clone(), mac: plan.host_mac };
            netlink.create_veth(&own, &peer, &node_fd, 1500).unwrap();
            let index = netlink.link_index(&plan.pod_if).unwrap();
            netlink.perform_all(&plan.pod_ops(index)).unwrap();
        };
        netns.0.run(inside).unwrap();
        let outside = || {
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link_index(&plan.host_if).unwrap();
            netlink.perform_all(&[NetOp::LinkUp { index }]).unwrap();
            netlink.perform_all(&plan.host_ops(index)).unwrap();
        };
        self.node.0.run(outside).unwrap();
        let mac = self.plan.enis[usize::try_from(device).unwrap()].mac;
        run(&self.router.0, &format!("ip neigh add {address} lladdr {mac} dev rt{device}"));
        self.plan.pods.push(PodHost { address: ipv4.into(), host_if: plan.host_if.clone(), table: plan.table });
        self.pods.push((netns, plan));
    }

    pub(crate) async fn apply(&self) -> HostReport {
        let report = self.host.apply(&self.plan).await.unwrap();
        assert_eq!(report.failed, [], "the kernel refused");
        report
    }

    /// Applies until nothing is left to be done, which must be at once.
    pub(crate) async fn heal(&self) -> Vec<NetOp> {
        let done = self.apply().await.applied;
        assert_eq!(self.apply().await.applied, [], "the second time there is nothing to do");
        done
    }

    pub(crate) fn pod(&self, number: usize) -> &Netns {
        &self.pods[number].0.0
    }
}

/// Accepts one connection and tells the client whom it saw; then echoes until the end.
pub(crate) fn serve(netns: &Netns, address: SocketAddr) -> std::thread::JoinHandle<()> {
    let listener = netns.run(|| TcpListener::bind(address)).unwrap().unwrap();
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("{}\n", peer.ip()).as_bytes()).unwrap();
        let mut buffer = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..count]).unwrap();
        }
    })
}

pub(crate) fn connect(netns: &Netns, address: SocketAddr) -> TcpStream {
    let stream = netns.run(|| TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
    let stream = stream.unwrap_or_else(|error| panic!("{} -> {address}: {error}", netns.name()));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub(crate) fn line(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() && byte[0] != b'\n' {
        text.push(char::from(byte[0]));
    }
    text
}

/// Whom the server at `to` sees when `from` connects.
pub(crate) fn seen_as(from: &Netns, server: &Netns, to: &str) -> String {
    let to = to.parse().unwrap();
    let serving = serve(server, to);
    let mut stream = connect(from, to);
    let seen = line(&mut stream);
    drop(stream);
    serving.join().unwrap();
    seen
}

pub(crate) fn echo(stream: &mut TcpStream, text: &str) {
    stream.write_all(format!("{text}\n").as_bytes()).unwrap();
    assert_eq!(line(stream), text);
}
