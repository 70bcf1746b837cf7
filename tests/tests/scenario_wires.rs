//! The lab itself: wires that behave as a VPC does, before any agent runs in it.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use ipnet::IpNet;
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Api, Eni};
use stanchion_lab::fake_aws::DirectEc2;
use stanchion_lab::netns::{self, ip_batch, ip_json};
use stanchion_lab::node::Node;
use stanchion_lab::probe::{Answer, PATIENCE, Protocol, Servers, probe};
use stanchion_lab::router::IMDS_ADDRESS;
use stanchion_lab::stray::Maker;
use stanchion_lab::vpc::{EC2_ADDRESS, EXAMPLE_HOST};
use stanchion_lab::wait::wait_for;
use stanchion_lab::{Vpc, run};

const SOON: Duration = Duration::from_secs(20);

fn ask(node: &Node, protocol: Protocol, to: IpAddr) -> Answer {
    probe(node.netns(), protocol, SocketAddr::new(to, 80), PATIENCE).expect("the socket works")
}

/// Creates an ENI with secondary addresses and attaches it, as an agent would.
async fn attach(vpc: &Vpc, node: &Node, device_index: u16, addresses: u16) -> Eni {
    let ec2 = DirectEc2::new(vpc.cloud(), Duration::ZERO);
    let request = CreateEni {
        client_token: format!("{}-{device_index}", node.name()),
        subnet: vpc.cloud().enis_of(node.instance())[0].subnet.clone(),
        security_groups: vec!["sg-nodes".into()],
        description: String::new(),
        tags: [].into(),
        addresses: Some(AddressRequest::Ipv4(addresses)),
        connection_tracking: None,
    };
    let eni = ec2.create_eni(&request).await.expect("an ENI");
    ec2.attach_eni(&eni.id, node.instance(), device_index, 0).await.expect("attached");
    vpc.cloud().eni(&eni.id).expect("just attached")
}

fn link(node: &Node, name: &str) -> anyhow::Result<serde_json::Value> {
    let links = ip_json(node.netns(), &["link", "show", "dev", name])?;
    Ok(links[0].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_reach_each_other_and_the_internet_as_their_public_address() {
    let mut vpc = Vpc::builder().start().await.expect("the lab starts");
    let (one, two) = (vpc.node("n1", "m5.large").await.expect("n1"), vpc.node("n2", "m5.large").await.expect("n2"));
    let _servers = Servers::start(two.netns(), &[80]).expect("servers");
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        assert_eq!(ask(&one, protocol, two.primary()), Answer::Reached { seen_as: one.primary() });
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        assert_eq!(ask(&one, protocol, EXAMPLE_HOST.into()), Answer::Reached { seen_as: one.public() });
    }
    assert_eq!(vpc.refused().expect("counters").wrong_source, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_works_only_through_the_eni_that_it_is_assigned_to() {
    let mut vpc = Vpc::builder().start().await.expect("the lab starts");
    let (one, two) = (vpc.node("n1", "m5.large").await.expect("n1"), vpc.node("n2", "m5.large").await.expect("n2"));
    let _servers = Servers::start(two.netns(), &[80]).expect("servers");

    let eni = attach(&vpc, &one, 1, 1).await;
    let shown = wait_for("the interface", SOON, || async { link(&one, "eth1") }).await.expect("it appears");
    assert_eq!(shown["address"].as_str(), Some(eni.mac.to_string().as_str()));
    assert_eq!(shown["mtu"], 9001);

    // The address as a pod's would be: local here, sent through the wrong cable first.
    let secondary = eni.secondary_ipv4[0];
    let gateway = "10.0.0.1";
    ip_batch(
        one.netns().name(),
        &format!("link set eth1 up\naddr add {secondary}/32 dev lo\nroute replace default via {gateway} dev eth0 src {secondary}\n"),
    )
    .expect("configure the node");
    assert_eq!(ask(&one, Protocol::Tcp, two.primary()), Answer::Silent);
    assert!(vpc.refused().expect("counters").wrong_source > 0);

    ip_batch(
        one.netns().name(),
        &format!(
            "route add {gateway} dev eth1 table 2 scope link\nroute add default via {gateway} dev eth1 table 2\n\
             rule add from {secondary} lookup 2 priority 1536\n"
        ),
    )
    .expect("route by source");
    assert_eq!(ask(&one, Protocol::Tcp, two.primary()), Answer::Reached { seen_as: secondary.into() });
    // It has no public address, so the internet is closed to it.
    assert_eq!(ask(&one, Protocol::Tcp, EXAMPLE_HOST.into()), Answer::Silent);
    assert!(vpc.refused().expect("counters").no_public_address > 0);

    let ec2 = DirectEc2::new(vpc.cloud(), Duration::ZERO);
    ec2.unassign(&eni.id, &[IpNet::from(IpAddr::from(secondary))]).await.expect("unassigned");
    wait_for("the address to be nobody's", SOON, || async {
        let answer = ask(&one, Protocol::Tcp, two.primary());
        ensure!(answer == Answer::Silent, "{answer:?}");
        Ok(())
    })
    .await
    .expect("it stops working");

    let attachment = vpc.cloud().eni(&eni.id).and_then(|eni| eni.attachment).expect("still attached");
    ec2.detach_eni(&attachment.id).await.expect("detached");
    wait_for("the interface to vanish", SOON, || async {
        ensure!(link(&one, "eth1").is_err(), "it is there");
        Ok(())
    })
    .await
    .expect("it vanishes");
}

/// A request from inside the node's namespace; the reply's body.
fn http(node: &Node, to: Ipv4Addr, request: &str) -> String {
    node.netns()
        .run(|| {
            let mut stream = TcpStream::connect((to, 80)).expect("connected");
            stream.write_all(format!("{request}Host: x\r\nConnection: close\r\n\r\n").as_bytes()).expect("sent");
            let mut reply = String::new();
            stream.read_to_string(&mut reply).expect("a reply");
            reply.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).expect("a body")
        })
        .expect("entered")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metadata_service_knows_who_asks_and_ec2_answers() {
    let mut vpc = Vpc::builder().start().await.expect("the lab starts");
    let nodes = [vpc.node("n1", "t3.small").await.expect("n1"), vpc.node("n2", "m5.large").await.expect("n2")];
    for node in &nodes {
        let seconds = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
        let token = http(node, IMDS_ADDRESS, &format!("PUT /latest/api/token HTTP/1.1\r\n{seconds}Content-Length: 0\r\n"));
        let get = |path: &str| http(node, IMDS_ADDRESS, &format!("GET /latest/{path} HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}\r\n"));
        assert_eq!(get("meta-data/instance-id"), node.instance().as_str());
        assert_eq!(get("meta-data/instance-type"), node.instance_type());
        let unsigned = http(node, EC2_ADDRESS, "POST / HTTP/1.1\r\nContent-Length: 0\r\n");
        assert!(unsigned.contains("MissingAuthenticationToken"), "{unsigned}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_ends_leaves_nothing() {
    let mut vpc = Vpc::builder().start().await.expect("the lab starts");
    vpc.node("n1", "t3.small").await.expect("n1");
    let (dir, prefix) = (vpc.dir().to_owned(), format!("stlab{}-", vpc.run_id()));
    assert_eq!(netns::names(&prefix).len(), 3);
    drop(vpc);
    assert_eq!(netns::names(&prefix), Vec::<String>::new());
    assert!(!Path::new(&dir).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_run_left_is_swept_and_a_living_run_is_not() {
    // No process has this id: the kernel's largest is 2^22.
    let (id, netns) = ("4999999x0", "stlab4999999x0-node1");
    let dir = Path::new(run::RUNS_DIR).join(id);
    std::fs::create_dir_all(&dir).expect("made");
    std::fs::write(dir.join("lock"), "").expect("made");
    netns::Netns::create(netns).expect("made");
    // Of a bench, a simulation or a test, which have no directory.
    let stray = "stdp4999999-0-node";
    let pins = Path::new("/sys/fs/bpf").join("strig4999999-bench");
    let (living, living_pins) = (Maker::Rig.name("living"), Maker::Rig.pins("living"));
    netns::Netns::create(stray).expect("made");
    let living_netns = netns::Netns::create(&living).expect("made");
    for dir in [&pins.join("v1"), &living_pins] {
        std::fs::create_dir_all(dir).expect("made");
    }
    let vpc = Vpc::builder().start().await.expect("the lab starts");
    assert_eq!(netns::names(netns), Vec::<String>::new());
    assert!(!dir.exists());
    assert_eq!(netns::names(stray), Vec::<String>::new());
    assert!(!pins.exists());
    run::sweep();
    assert_eq!(netns::names(&living), [living]);
    assert!(living_pins.exists());
    living_netns.remove().expect("removed");
    std::fs::remove_dir(&living_pins).expect("removed");
    assert!(vpc.dir().exists());
    assert_eq!(netns::names(vpc.router().name()).len(), 1);
}
