//! A cloud with one node, served over loopback, and the product's clients for it.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::SocketAddr;

use ipnet::Ipv4Net;
use stanchion_aws::{AwsClients, CloudWatchSink, Overrides, SdkEc2, SdkImds};
use stanchion_core::ids::{InstanceId, VpcId};
use stanchion_lab::fake_aws::{Clock, Cloud, CloudConfig, InstanceSpec, SubnetSpec, serve_ec2, serve_imds, serve_logs};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The subnet of the node: 251 usable addresses.
pub(crate) const SUBNET: &str = "subnet-a";

/// A cloud and clients for it; the servers end with it.
pub(crate) struct Bed {
    pub(crate) cloud: Cloud,
    pub(crate) vpc: VpcId,
    /// An m5.large: 3 ENIs with 10 addresses each.
    pub(crate) instance: InstanceId,
    pub(crate) ec2: SdkEc2,
    pub(crate) imds: SdkImds,
    pub(crate) logs: CloudWatchSink,
    pub(crate) ec2_at: SocketAddr,
    pub(crate) imds_at: SocketAddr,
    pub(crate) logs_at: SocketAddr,
    servers: JoinSet<()>,
}

pub(crate) async fn bed() -> Bed {
    bed_with(Bed::config()).await
}

impl Bed {
    /// The default cloud with an IPv6 range.
    pub(crate) fn config() -> CloudConfig {
        CloudConfig { vpc_ipv6_cidrs: vec!["2001:db8::/56".parse().expect("a range")], ..CloudConfig::default() }
    }
}

pub(crate) async fn bed_with(config: CloudConfig) -> Bed {
    bed_at(config, Clock::tokio()).await
}

/// With the cloud's own time.
pub(crate) async fn bed_at(config: CloudConfig, clock: Clock) -> Bed {
    let vpc = config.vpc.clone();
    let cloud = Cloud::new(config, clock);
    let cidr: Ipv4Net = "10.0.1.0/24".parse().expect("a range");
    let mut subnet = SubnetSpec::new(SUBNET, "eu-west-1a", cidr);
    subnet.ipv6_cidrs = vec!["2001:db8:0:1::/64".parse().expect("a range")];
    let subnet = cloud.add_subnet(subnet);
    let instance = InstanceId::from("i-1");
    cloud.run_instance(InstanceSpec::new("i-1", "m5.large", &subnet));
    let mut servers = JoinSet::new();
    let (ec2, ec2_at) = listen().await;
    let (imds, imds_at) = listen().await;
    let (logs, logs_at) = listen().await;
    let (c1, c2, c3, i) = (cloud.clone(), cloud.clone(), cloud.clone(), instance.clone());
    servers.spawn(async move { match serve_ec2(ec2, c1).await {} });
    servers.spawn(async move { match serve_imds(imds, c2, i).await {} });
    servers.spawn(async move { match serve_logs(logs, c3, None).await {} });
    let overrides = Overrides {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(format!("http://{ec2_at}")),
        ec2_timeout: Some(std::time::Duration::from_secs(10)),
        logs_endpoint: Some(format!("http://{logs_at}")),
        static_keys: Some(("AKIDTEST".to_owned(), "secret".to_owned())),
        ca_bundle: None,
    };
    let clients = AwsClients::load(overrides).await.expect("no CA bundle to read");
    let imds = SdkImds::new(Some(&format!("http://{imds_at}"))).expect("a URI");
    Bed { cloud, vpc, instance, ec2: clients.ec2(), imds, logs: clients.logs(), ec2_at, imds_at, logs_at, servers }
}

pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a port");
    let at = listener.local_addr().expect("bound");
    (listener, at)
}
