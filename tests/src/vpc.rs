//! The VPC as a whole: cloud, router, internet, nodes.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::Context;
use ipnet::{Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{CreateEni, Ec2Api as _, EniKind};
use stanchion_core::ids::{EniId, SubnetId};
use tokio::task::JoinSet;

use crate::binaries::Binaries;
use crate::cables::{Cables, Socket};
use crate::fake_aws::{Clock, Cloud, CloudConfig, DirectEc2, InstanceSpec, SubnetSpec, Timing, serve_ec2, serve_imds, serve_logs};
use crate::manifests::Manifests;
use crate::netns::{self, Netns};
use crate::node::{ACCESS_KEY, Inner, Node, aws_env};
use crate::probe::Servers;
use crate::router::{IMDS_ADDRESS, ROUTER_IPV6, Refused, Router};
use crate::run::Run;
use crate::wait::wait_for;
use crate::wires::gateway;

/// Where EC2 answers.
pub const EC2_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// Where CloudWatch Logs answers.
pub const LOGS_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 81);
/// A host on the internet that serves port 80 on TCP and UDP.
pub const EXAMPLE_HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// A VPC to build.
#[derive(Clone, Debug)]
pub struct VpcBuilder {
    config: CloudConfig,
    subnets: Vec<SubnetSpec>,
}

/// A VPC; dropping it kills and removes everything in it.
#[derive(Debug)]
pub struct Vpc {
    // Before `run`, whose drop removes the namespaces they live in.
    tasks: JoinSet<()>,
    _servers: Servers,
    cloud: Cloud,
    cables: Cables,
    router: Netns,
    internet: Netns,
    manifests: Manifests,
    binaries: Binaries,
    nodes: u8,
    subnets: Vec<SubnetId>,
    run: Arc<Run>,
}

impl VpcBuilder {
    /// How long things take in the cloud.
    #[must_use]
    pub fn timing(mut self, timing: Timing) -> Self {
        self.config.timing = timing;
        self
    }

    /// Other subnets than the two of the default, in the order in which nodes are put into them.
    #[must_use]
    pub fn subnets(mut self, subnets: Vec<SubnetSpec>) -> Self {
        self.subnets = subnets;
        self
    }

    /// With a /64 of IPv6 in every subnet and an IPv6 address for every instance.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        let range = |subnet: u16, length| Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 1, subnet, 0, 0, 0, 0), length);
        self.config.vpc_ipv6_cidrs = vec![range(0, 56)];
        for (subnet, number) in self.subnets.iter_mut().zip(1..) {
            subnet.ipv6_cidrs = vec![range(number, 64)];
        }
        self
    }

    /// Makes namespaces and starts the services in them.
    pub async fn start(self) -> anyhow::Result<Vpc> {
        let binaries = Binaries::find()?;
        let run = Arc::new(Run::start()?);
        let (router, internet) = (run.netns("router")?, run.netns("internet")?);
        let hosts = [EC2_ADDRESS, LOGS_ADDRESS, EXAMPLE_HOST];
        let built = Router::build(router.clone(), &internet, &self.config.vpc_cidrs, &self.config.vpc_ipv6_cidrs, &hosts)?;
        let cloud = Cloud::new(self.config, Clock::tokio());
        cloud.add_access_key(ACCESS_KEY.0, ACCESS_KEY.1, None, None);
        let subnets = self.subnets.into_iter().map(|subnet| cloud.add_subnet(subnet)).collect();
        let cables = Cables::new(built, cloud.clone())?;
        let mut tasks = JoinSet::new();
        tasks.spawn(cables.clone().follow(cloud.subscribe()));
        let ec2 = internet.tcp_listener(SocketAddr::from((EC2_ADDRESS, 80)))?;
        tasks.spawn(never(serve_ec2(ec2, cloud.clone())));
        let logs = internet.tcp_listener(SocketAddr::from((LOGS_ADDRESS, 80)))?;
        tasks.spawn(never(serve_logs(logs, cloud.clone(), None)));
        let servers = Servers::start_on(&internet, EXAMPLE_HOST, &[80])?;
        let manifests = Manifests::create(run.dir().join("manifests"))?;
        Ok(Vpc { tasks, _servers: servers, cloud, cables, router, internet, manifests, binaries, nodes: 0, subnets, run })
    }
}

impl Vpc {
    /// 10.0.0.0/16 in eu-west-1 with a subnet in each of two zones; interfaces appear 300 ms after they are attached.
    pub fn builder() -> VpcBuilder {
        let subnet = |id: &str, zone, cidr: &str| SubnetSpec::new(id, zone, cidr.parse::<Ipv4Net>().expect("a constant"));
        let timing = Timing {
            attach: Duration::from_millis(300),
            detach: Duration::from_millis(300),
            imds_lag: Duration::from_millis(100),
            ..Timing::default()
        };
        VpcBuilder {
            config: CloudConfig { timing, ..CloudConfig::default() },
            subnets: vec![
                subnet("subnet-0a000000000000001", "eu-west-1a", "10.0.0.0/20"),
                subnet("subnet-0b000000000000002", "eu-west-1b", "10.0.16.0/20"),
            ],
        }
    }

    /// The cloud behind it: to look at and to break.
    pub fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    /// The router's namespace.
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// The internet's namespace.
    pub fn internet(&self) -> &Netns {
        &self.internet
    }

    /// The cluster's state as the agents read it.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        self.run.dir()
    }

    /// The run's id, which every namespace of it carries.
    pub fn run_id(&self) -> &str {
        self.run.id()
    }

    /// What the router refused so far.
    pub fn refused(&self) -> anyhow::Result<Refused> {
        self.cables.refused()
    }

    /// Launches an instance and configures its primary interface, as an AMI does. Nodes go into the subnets in turn.
    pub async fn node(&mut self, name: &str, instance_type: &str) -> anyhow::Result<Node> {
        let turn = usize::from(self.nodes) % self.subnets.len().max(1);
        let subnet = self.subnets.get(turn).context("the VPC has no subnet")?;
        self.nodes += 1;
        let number = self.nodes;
        let dir = self.dir().join(name);
        std::fs::create_dir_all(&dir)?;
        let netns = self.run.netns(name)?;
        // As AL2 leaves them: an agent that needs otherwise must say so.
        for (key, value) in [("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "1"), ("ip_forward", "1")] {
            netns::sysctl(&netns, &format!("net/ipv4/{key}"), value)?;
        }
        let mut spec = InstanceSpec::new(format!("i-{number:017x}"), instance_type, subnet);
        spec.ipv6 = self.cloud.subnets().iter().any(|known| known.id == *subnet && !known.ipv6_cidrs.is_empty());
        if spec.ipv6 {
            // Nothing waits until its own addresses are found to be unique.
            netns::sysctl(&netns, "net/ipv6/conf/default/accept_dad", "0")?;
        }
        let instance = spec.id.clone();
        let public = Ipv4Addr::new(198, 51, 100, number);
        self.cables.add_node(instance.clone(), Socket { netns: netns.name().to_owned(), public });
        let eni = self.cloud.run_instance(spec);
        let wire = wait_for("the primary interface", Duration::from_secs(10), || {
            let wire = self.cables.plugged().remove(&eni);
            async { wire.context("it is not there yet") }
        })
        .await?;
        let mut lines = format!(
            "addr add {}/{} dev eth0\nlink set eth0 up\nroute add default via {} dev eth0\n",
            wire.primary,
            wire.subnet.prefix_len(),
            gateway(wire.subnet)
        );
        if let Some(address) = wire.ipv6() {
            // What DHCPv6 and the router's advertisement say.
            lines.push_str(&format!("addr add {address}/128 dev eth0 nodad\nroute add default via {ROUTER_IPV6} dev eth0\n"));
        }
        netns::ip_batch(netns.name(), &lines)?;
        // The metadata service answers on the node's own cable, so that it knows who asks.
        let listener = self.router.tcp_listener_on(SocketAddr::from((IMDS_ADDRESS, 80)), &wire.router_if())?;
        self.tasks.spawn(never(serve_imds(listener, self.cloud.clone(), instance.clone())));
        self.manifests.node(name, wire.primary.into(), instance_type)?;
        Ok(Node {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                instance,
                instance_type: instance_type.to_owned(),
                netns,
                primary: wire.primary,
                public,
                bpf: self.dir().join("bpf").join(name),
                state: self.dir().join("run").join(name),
                dir,
                run_id: self.run_id().to_owned(),
                binaries: self.binaries.clone(),
                manifests: self.manifests.clone(),
                aws_env: aws_env(&self.cloud.region(), &format!("http://{EC2_ADDRESS}"), &format!("http://{LOGS_ADDRESS}")),
                pods: AtomicU32::new(0),
                cables: self.cables.clone(),
                kubeconfig: OnceLock::new(),
                refusals: OnceLock::new(),
            }),
        })
    }

    /// What AWS's resource controller does for a node that wants security groups for pods: attaches a trunk ENI, at the last device index.
    pub async fn attach_trunk(&self, node: &Node) -> anyhow::Result<EniId> {
        let ec2 = DirectEc2::new(&self.cloud, Duration::ZERO);
        let eni = ec2.create_eni(&self.for_node(node, "aws-k8s-trunk-eni")?).await?;
        self.cloud.set_kind(&eni.id, EniKind::Trunk);
        let limits = self.cloud.instance(node.instance()).context("the node's instance is gone")?.limits;
        ec2.attach_eni(&eni.id, node.instance(), limits.max_enis - 1, 0).await?;
        Ok(eni.id)
    }

    /// What it does for a pod: makes a branch ENI and ties it to the node's trunk; the text of the pod's annotation.
    pub async fn make_branch(&self, node: &Node, vlan_id: u16) -> anyhow::Result<String> {
        let eni = DirectEc2::new(&self.cloud, Duration::ZERO).create_eni(&self.for_node(node, "aws-k8s-branch-eni")?).await?;
        self.cloud.set_kind(&eni.id, EniKind::Branch);
        self.cables.add_branch(eni.id.clone(), node.instance().clone(), vlan_id).await?;
        let subnet = self.cloud.subnets().into_iter().find(|subnet| subnet.id == eni.subnet).context("its subnet is gone")?.cidr;
        let entry = serde_json::json!({
            "eniId": eni.id, "ifAddress": eni.mac, "privateIp": eni.primary_ipv4, "ipv6Addr": "", "vlanId": vlan_id,
            "subnetCidr": subnet, "subnetV6Cidr": "", "associationID": format!("trunk-assoc-{vlan_id}"),
        });
        Ok(serde_json::json!([entry]).to_string())
    }

    fn for_node(&self, node: &Node, description: &str) -> anyhow::Result<CreateEni> {
        let instance = self.cloud.instance(node.instance()).context("the node's instance is gone")?;
        Ok(CreateEni {
            client_token: String::new(),
            subnet: instance.subnet,
            security_groups: vec!["sg-pods".into()],
            description: description.to_owned(),
            tags: [("eks:eni:owner".to_owned(), "eks-vpc-resource-controller".to_owned())].into(),
            addresses: None,
            connection_tracking: None,
        })
    }

    /// Addresses that the cloud counts as assigned to an instance's ENIs besides their own.
    pub fn assigned(&self, node: &Node) -> Vec<IpAddr> {
        self.cloud.enis_of(node.instance()).into_iter().flat_map(|eni| eni.secondary_ipv4).map(IpAddr::from).collect()
    }
}

async fn never(service: impl Future<Output = Infallible>) {
    match service.await {}
}
