//! Pods on two nodes, their addresses on several ENIs, and everything gone after them.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr};

use stanchion_lab::Vpc;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::fake_aws::SubnetSpec;
use stanchion_lab::node::Node;
use stanchion_lab::pod::{CNI_VERSION, PodSpec};
use stanchion_lab::probe::{Answer, Protocol};
use stanchion_lab::vpc::EXAMPLE_HOST;
use stanchion_proto as wire;
use stanchion_proto::frame;

/// Device index of the ENI that an address is assigned to in EC2.
fn device_of(cluster: &Cluster, address: IpAddr) -> u16 {
    let eni = cluster.vpc().cloud().owner_of(address).unwrap_or_else(|| panic!("{address} is nobody's in EC2"));
    cluster.vpc().cloud().eni(&eni).and_then(|eni| eni.attachment).expect("attached").device_index
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_every_eni_reach_each_other_and_the_internet_and_leave_nothing() {
    let mut cluster = Cluster::start(&["t3.small", "m5.large"], &[("WARM_IP_TARGET", "1")]).await.expect("the cluster starts");
    for pod in 0..7 {
        cluster.add_pod(0, PodSpec::new("x", &format!("a-{pod}"))).await.expect("a pod on node1");
    }
    for pod in 0..2 {
        cluster.add_pod(1, PodSpec::new("y", &format!("b-{pod}"))).await.expect("a pod on node2");
    }
    let addresses: BTreeSet<IpAddr> = cluster.pods().map(|(_, pod)| pod.address()).collect();
    assert_eq!(addresses.len(), 9);
    // A t3.small's ENI holds three: seven need three ENIs.
    let devices: BTreeSet<u16> = cluster.pods().map(|(_, pod)| device_of(&cluster, pod.address())).collect();
    assert_eq!(devices, BTreeSet::from([0, 1, 2]));

    for protocol in [Protocol::Tcp, Protocol::Udp] {
        cluster.settles(protocol, 80, |_, _| true).await.expect("all pairs talk");
    }
    for (node, pod) in cluster.pods() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let answer = pod.probe(protocol, EXAMPLE_HOST.into(), 80).await.expect("the socket works");
            assert_eq!(answer, Answer::Reached { seen_as: node.public() }, "{} {protocol:?}", pod.name());
        }
        // Within the VPC nothing is translated.
        let (_, other) = cluster.pods().find(|(_, other)| other.name() != pod.name()).expect("nine pods");
        let answer = pod.probe(Protocol::Tcp, other.address(), 80).await.expect("the socket works");
        assert_eq!(answer, Answer::Reached { seen_as: pod.address() });
    }
    assert_eq!(cluster.vpc().refused().expect("counters").wrong_source, 0);

    cluster.empty().await.expect("nothing of the pods stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_pods_gets_addresses_although_the_pool_was_small() {
    let cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "1")]).await.expect("the cluster starts");
    let node = cluster.node(0).clone();
    let starts = (0..20).map(|pod| {
        let node: Node = node.clone();
        tokio::spawn(async move { node.add_pod(PodSpec::new("x", &format!("burst-{pod}"))).await })
    });
    let mut pods = Vec::new();
    for start in starts.collect::<Vec<_>>() {
        pods.push(start.await.expect("no panic").expect("an address in time"));
    }
    let addresses: BTreeSet<IpAddr> = pods.iter().map(|pod| pod.address()).collect();
    assert_eq!(addresses.len(), pods.len());
    for pod in &pods {
        let answer = pod.probe(Protocol::Tcp, EXAMPLE_HOST.into(), 80).await.expect("the socket works");
        assert_eq!(answer, Answer::Reached { seen_as: node.public() }, "{}", pod.name());
    }
}

/// As a plugin that waits no longer than two seconds: the words of the real agent, which the kubelet's event ends with.
fn refusal(node: &Node, pod: &str) -> String {
    let mut stream = std::os::unix::net::UnixStream::connect(node.socket()).expect("connected");
    stream.set_read_timeout(Some(SOON)).expect("set");
    let sandbox = wire::Sandbox {
        network_name: "aws-cni".to_owned(),
        container_id: format!("c-{pod}"),
        if_name: "eth0".to_owned(),
        pod_namespace: "x".to_owned(),
        pod_name: pod.to_owned(),
        ..wire::Sandbox::default()
    };
    let request = wire::AddNetworkRequest { sandbox: Some(sandbox), wait_ms: 2_000, ..wire::AddNetworkRequest::default() };
    let request = frame::encode(frame::Method::AddNetwork as u8, &request).expect("encoded");
    stream.write_all(&[&frame::MAGIC[..], &request].concat()).expect("written");
    let mut header = [0; frame::HEADER];
    stream.read_exact(&mut header).expect("an answer");
    let (code, length) = frame::header(header).expect("a frame");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("its body");
    frame::reply::<wire::AddNetworkReply>(code, &body).expect_err("there is no address").message().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_an_address_is_told_which_eni_and_which_subnet_is_full_since_when() {
    let subnet = SubnetSpec::new("subnet-0c000000000000003", "eu-west-1a", "10.0.0.0/28".parse().expect("a CIDR"));
    let id = subnet.id.clone();
    let mut vpc = Vpc::builder().subnets(vec![subnet]).start().await.expect("the VPC starts");
    vpc.manifests().namespace("x", &[]).expect("written");
    let node = vpc.node("node1", "t3.medium").await.expect("a node");
    let mut agent = node.start_agent(&[("WARM_IP_TARGET", "1")]).expect("started");
    node.ready(&mut agent, SOON).await.expect("ready");
    // Others take what is left of the subnet.
    for last in 4..15 {
        // One that the agent was faster with is served to a pod below.
        vpc.cloud().occupy(&id, [Ipv4Addr::new(10, 0, 0, last)]);
    }
    let mut pods = Vec::new();
    let free = |node: &Node| node.cli_json(&["status"]).expect("answers")["ipam"]["pools"][0]["free"].as_u64().expect("a number");
    while free(&node) > 0 {
        pods.push(node.add_pod(PodSpec::new("x", &format!("a-{}", pods.len()))).await.expect("an address that was warm"));
    }
    assert!(!pods.is_empty());
    let told = |words: &str| {
        for word in [
            "no free address after ",
            "of 1 ENIs full (limit 3)",
            "subnet-0c000000000000003 has 0 free of 11 since 20",
            "EC2 said InsufficientFreeAddressesInSubnet",
            "see `stanchion enis` on the node",
        ] {
            assert!(words.contains(word), "{word:?} is not in {words}");
        }
    };
    told(&refusal(&node, "late"));

    // The same from the plugin, as the runtime gets it and the kubelet's event says it: after all of the plugin's patience.
    let error = node.add_pod(PodSpec::new("x", "later")).await.expect_err("there is no address").root_cause().to_string();
    let answer = error.strip_prefix("ADD x/later: ").unwrap_or_else(|| panic!("the plugin did not answer: {error}"));
    let mut answer = serde_json::Deserializer::from_str(answer).into_iter::<serde_json::Value>();
    let answer = answer.next().expect("a CNI error").expect("in JSON");
    assert_eq!((&answer["code"], &answer["cniVersion"]), (&11.into(), &CNI_VERSION.into()), "try again later: {answer}");
    let words = answer["msg"].as_str().expect("a text");
    told(words);
    assert!(words.starts_with("get an address for the pod: "), "{words}");
    // It left nothing behind.
    let netns = stanchion_lab::netns::names(&format!("stlab{}-pod-x-later", vpc.run_id()));
    assert_eq!(netns, Vec::<String>::new());
    let status = node.cli_json(&["status"]).expect("answers");
    assert_eq!(status["ipam"]["pools"][0]["assigned"].as_u64(), Some(pods.len() as u64), "{status:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn add_and_del_may_be_repeated_and_del_needs_nothing() {
    let mut cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "2")]).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "a")).await.expect("a pod");
    let (node, sandbox, result) = {
        let pod = cluster.pod("x/a");
        (cluster.node(0).clone(), cluster.node(0).sandbox(pod), pod.result().clone())
    };
    assert!(node.plugin("CHECK", &sandbox, Some(&result)).expect("runs").success);
    // Without prevResult, then again, then with the namespace gone: the runtime does all three.
    for round in 0..2 {
        let reply = node.plugin("DEL", &sandbox, None).expect("runs");
        assert!(reply.success, "round {round}: {} {}", reply.json, reply.stderr);
    }
    cluster.pod("x/a").netns().remove().expect("removed");
    let reply = node.plugin("DEL", &sandbox, Some(&result)).expect("runs");
    assert!(reply.success, "{} {}", reply.json, reply.stderr);
    let mut never = sandbox.clone();
    never.container_id = "0".repeat(64);
    never.netns.clear();
    let reply = node.plugin("DEL", &never, None).expect("runs");
    assert!(reply.success, "{} {}", reply.json, reply.stderr);
    assert_eq!(cluster.leftovers().expect("looked"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_an_interface_on_every_network_card_is_reached_on_each() {
    let settings = [("ENABLE_MULTI_NIC", "true"), ("WARM_IP_TARGET", "2")];
    let mut cluster = Cluster::start(&["c6in.32xlarge", "m5.large"], &settings).await.expect("the cluster starts");
    let wide = PodSpec::new("x", "wide").annotation("k8s.amazonaws.com/nicConfig", "multi-nic-attachment");
    cluster.add_pod(0, wide).await.expect("an address of either card");
    cluster.add_pod(0, PodSpec::new("x", "plain")).await.expect("a pod with one");
    cluster.add_pod(1, PodSpec::new("y", "far")).await.expect("a pod elsewhere");
    let addresses = |cluster: &Cluster, name: &str| -> Vec<IpAddr> {
        let ips = cluster.pod(name).result()["ips"].as_array().cloned().expect("addresses");
        let address = |ip: &serde_json::Value| ip["address"].as_str()?.parse::<ipnet::IpNet>().ok();
        ips.iter().map(|ip| address(ip).expect("an address").addr()).collect()
    };
    let card_of = |cluster: &Cluster, address: IpAddr| {
        let eni = cluster.vpc().cloud().owner_of(address).unwrap_or_else(|| panic!("{address} is nobody's in EC2"));
        cluster.vpc().cloud().eni(&eni).and_then(|eni| eni.attachment).expect("attached").network_card
    };
    let held = addresses(&cluster, "x/wide");
    assert_eq!(held.iter().map(|address| card_of(&cluster, *address)).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(addresses(&cluster, "x/plain").len(), 1);
    let names: Vec<_> = cluster.pod("x/wide").result()["interfaces"].as_array().expect("interfaces").clone();
    assert_eq!((&names[1]["name"], &names[3]["name"]), (&"eth0".into(), &"mNicIf1".into()));
    // The answer leaves by the ENI that has the address: the router drops it on any other.
    for address in &held {
        for from in ["x/plain", "y/far"] {
            let answer = cluster.pod(from).probe(Protocol::Tcp, *address, 80).await.expect("the socket works");
            assert_eq!(answer, Answer::Reached { seen_as: cluster.pod(from).address() }, "{from} to {address}");
        }
    }
    assert_eq!(cluster.vpc().refused().expect("counters").wrong_source, 0);
    cluster.empty().await.expect("nothing of the pods stays");
}
