//! What EC2 and IMDS do not tell, tell late or refuse, and what the address actor makes of it; on paused time.

use std::time::Duration;

use ipnet::Ipv4Net;
use stanchion_core::cluster::ClusterState;
use stanchion_core::network::EniRole;
use stanchion_lab::fake_aws::{ApiError, Effect, Fault, SubnetSpec, Timing};
use stanchion_lab::ipam_world::{World, WorldSpec};

const SECOND: Duration = Duration::from_secs(1);

fn denied() -> Effect {
    Effect::Error(ApiError::with_status(403, "UnauthorizedOperation", "You are not authorized to perform this operation."))
}

/// The range is the length of the ENI's own address and tells the gateway: with a wrong one its pods reach nobody.
#[tokio::test(start_paused = true)]
async fn an_eni_of_a_subnet_that_nobody_described_serves_once_imds_tells_its_range() {
    let custom =
        [("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"), ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone"), ("WARM_IP_TARGET", "1")];
    for discovery in ["false", "true"] {
        let timing = Timing { imds_lag: SECOND * 20, ..Timing::default() };
        let env = [&custom[..], &[("ENABLE_SUBNET_DISCOVERY", discovery)]].concat();
        let mut world = World::start_with(WorldSpec { timing, ..WorldSpec::new("m5.large", &env) }, |cloud, _| {
            cloud.add_subnet(SubnetSpec::new("subnet-pods", "eu-west-1a", "10.0.64.0/24".parse().expect("CIDR")));
            cloud.inject(Fault::always("DescribeSubnets", denied()));
        });
        let mut state = ClusterState::default();
        let text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-1\n  labels: {topology.kubernetes.io/zone: eu-west-1a}\n---\napiVersion: crd.k8s.amazonaws.com/v1alpha1\nkind: ENIConfig\nmetadata: {name: eu-west-1a}\nspec: {subnet: subnet-pods}\n";
        for object in stanchion_core::manifests::parse("nodes.yaml", text).expect("manifests") {
            state.apply(object);
        }
        world.cluster.send_replace(std::sync::Arc::new(state));
        let why = world.add("early", SECOND * 10).await.expect_err("IMDS does not show the ENI yet").to_string();
        assert!(why.contains("the range of its subnet subnet-pods is not known"), "discovery {discovery}: {why}");
        let served = world.add("first", SECOND * 60).await.expect("served");
        assert_eq!(served.attachments[0].device_index, 1);
        let own = world.cloud.enis_of(&world.instance)[1].primary_ipv4.expect("IPv4");
        let planned: Vec<_> =
            world.host.plan().enis.into_iter().filter(|eni| eni.role == EniRole::Secondary).filter_map(|eni| eni.ipv4).collect();
        assert_eq!(planned, [Ipv4Net::new_assert(own, 24)], "discovery {discovery}");
        world.settle(SECOND * 60).await;
        let looks = world.cloud.count("DescribeNetworkInterfaces");
        assert!(looks < 15, "EC2 need not be asked for what IMDS is about to tell: {looks}");
        world.stop().await;
    }
}
