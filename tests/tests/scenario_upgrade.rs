//! The agent is replaced by one of another version, and that one by the first again, while pods talk, are refused and write
//! logs: no flow breaks or loses a packet, nothing gets past a policy, no address changes, no line is lost.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_lab::cloudwatch::Delivered;
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::container_log::Output;
use stanchion_lab::datapath::layout;
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Conversation, Datagrams, Protocol, probe};
use stanchion_lab::wait::wait_for;

const ONLY_B: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-b}
spec: {podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
";

fn allowed(from: &str, to: &str) -> bool {
    !to.starts_with("x/a") || from.starts_with("x/b")
}

/// The version before or after.
enum Other {
    /// This one, which finds programs and maps of the layout before its own on the way there, of the one after it on the way
    /// back.
    Layouts,
    /// A binary of another build.
    Build(PathBuf),
}

/// Datagrams that a policy forbids, one after the other until told to stop: how many were sent, how many answered.
fn intrude(cluster: &Cluster, from: &str, to: &str, stop: &Arc<AtomicBool>) -> JoinHandle<(u32, u32)> {
    let (netns, to, stop) = (cluster.pod(from).netns().clone(), SocketAddr::new(cluster.pod(to).address(), 80), Arc::clone(stop));
    std::thread::spawn(move || {
        let (mut tries, mut passed) = (0, 0);
        while !stop.load(Ordering::Relaxed) {
            let answer = probe(&netns, Protocol::Udp, to, Duration::from_millis(2)).expect("a socket");
            tries += 1;
            passed += u32::from(answer.reached());
        }
        (tries, passed)
    })
}

fn addresses(cluster: &Cluster) -> BTreeMap<String, IpAddr> {
    cluster.pods().map(|(_, pod)| (pod.name(), pod.address())).collect()
}

/// Writes 100 lines that arrive as `phase n`.
fn write(cluster: &mut Cluster, written: &mut Vec<String>, phase: &str) {
    let log = &mut cluster.pod_mut("x/a-0").log;
    for n in 0..100 {
        let line = format!("{phase} {n}");
        log.line(Output::Stdout, &line).expect("written");
        written.push(line);
    }
}

async fn there_and_back(other: Other) {
    let settings = [("WARM_IP_TARGET", "2"), ("STANCHION_LOG_FLUSH_SECONDS", "0.2")];
    let mut cluster = Cluster::start(&["m5.large", "m5.large"], &settings).await.expect("the cluster starts");
    let node = cluster.node(0).clone();
    if let Other::Build(program) = &other {
        cluster.agent(0).expect("started").stop(SOON).await.expect("it stops");
        std::fs::remove_dir_all(node.bpf_dir()).expect("nothing of this version is left");
        cluster.start_other_agent(0, program).await.expect("the other build starts");
    }
    cluster.vpc().manifests().apply("p.yaml", ONLY_B).expect("written");
    for (node, name) in [(0, "a-0"), (0, "t-0"), (0, "c-0"), (1, "b-0"), (1, "c-1")] {
        cluster.add_pod(node, PodSpec::new("x", name)).await.expect("a pod");
    }
    cluster.settles(Protocol::Tcp, 80, allowed).await.expect("the policy holds");
    let before = addresses(&cluster);
    let talks = [("x/b-0", "x/a-0"), ("x/c-0", "x/t-0"), ("x/c-1", "x/t-0")].map(|(from, to)| {
        let to = SocketAddr::new(before[to], 80);
        (from, to, Conversation::start(cluster.pod(from).netns(), to).expect("connected"))
    });
    // Where a connection sends again what was lost, these tell of it.
    let streams = [("x/b-0", "x/a-0"), ("x/c-0", "x/t-0"), ("x/c-1", "x/t-0")].map(|(from, to)| {
        let at = SocketAddr::new(before[to], if from == "x/c-1" { 4_001 } else { 4_000 });
        (from, to, Datagrams::start(cluster.pod(from).netns(), cluster.pod(to).netns(), at).expect("sockets"))
    });
    let stop = Arc::new(AtomicBool::new(false));
    let intruders = ["x/c-0", "x/c-1"].map(|from| (from, intrude(&cluster, from, "x/a-0", &stop)));
    let mut written = Vec::new();

    let own = u16::try_from(LAYOUT_VERSION).expect("a small number");
    for (way, found) in [("there", own - 1), ("back", own + 1)] {
        write(&mut cluster, &mut written, &format!("before {way}"));
        let status = cluster.agent(0).expect("started").stop(SOON).await.expect("it stops");
        assert!(status.success(), "{way}: {status}");
        write(&mut cluster, &mut written, &format!("between {way}"));
        cluster.pod_mut("x/a-0").log.rotate().expect("rotated");
        match &other {
            Other::Layouts => {
                layout::leave_as(node.netns(), node.bpf_dir(), found).expect("another layout");
                cluster.start_agent(0).await.expect("it takes over");
            }
            Other::Build(_) if way == "there" => cluster.start_agent(0).await.expect("it takes over"),
            Other::Build(program) => cluster.start_other_agent(0, program).await.expect("the other build takes over"),
        }
        write(&mut cluster, &mut written, &format!("after {way}"));
        cluster.settles(Protocol::Tcp, 80, allowed).await.unwrap_or_else(|error| panic!("{way}: {error:#}"));
        let served = node.cli_json(&["ips"]).expect("the addresses").to_string();
        let here = ["x/a-0", "x/t-0", "x/c-0"].map(|pod| before[pod].to_string());
        assert!(here.iter().all(|address| served.contains(&format!("\"{address}\""))), "{way}: {served}");
        // It goes on: a pod comes, is guarded, and goes.
        cluster.add_pod(0, PodSpec::new("x", "a-1")).await.expect("a pod");
        cluster.settles(Protocol::Tcp, 80, allowed).await.unwrap_or_else(|error| panic!("{way}, new pod: {error:#}"));
        assert!(!before.values().any(|address| *address == cluster.pod("x/a-1").address()), "{way}: an address that is held was given");
        cluster.delete_pod("x/a-1").await.expect("deleted");
        let layouts = || std::fs::read_dir(node.bpf_dir()).into_iter().flatten().flatten().count();
        wait_for("what the other version left to go", SOON, || async {
            ensure!(layouts() == 1, "{} layouts", layouts());
            Ok(())
        })
        .await
        .unwrap_or_else(|error| panic!("{way}: {error:#}"));
        // Not one packet of the flows to a pod that may be reached was taken for a forbidden one.
        let endpoints = node.cli_json(&["endpoints"]).expect("the endpoints");
        let open = endpoints["endpoints"].as_array().expect("a list").iter().find(|endpoint| endpoint["pod"]["name"] == "t-0");
        let denied = open.map(|endpoint| endpoint["counters"]["ingress_denied"]["packets"].clone());
        assert_eq!(denied, Some(0.into()), "{way}: {endpoints}");
        let metrics = node.metrics().expect("the agent answers");
        for alarm in ["stanchion_policy_no_endpoint_packets_total 0", "stanchion_policy_events_lost_total 0"] {
            assert!(metrics.lines().any(|line| line == alarm), "{way}: {alarm} is not in\n{metrics}");
        }
        assert_eq!(addresses(&cluster), before, "{way}");
    }

    stop.store(true, Ordering::Relaxed);
    for (from, intruder) in intruders {
        let (tries, passed) = intruder.join().expect("no panic");
        assert!(tries > 0 && passed == 0, "{passed} of {tries} forbidden datagrams of {from} were answered");
    }
    for (from, to, talk) in talks {
        let talk = talk.stop();
        assert_eq!(talk.broken, None, "{from} to {to}: {talk:?}");
        assert!(talk.exchanges > 100 && talk.longest < Duration::from_secs(3), "{from} to {to}: {talk:?}");
    }
    for (from, to, stream) in streams {
        let stream = stream.stop().expect("sockets");
        assert!(stream.sent > 100 && stream.lost.is_empty(), "{from} to {to}: {stream:?}");
    }
    wait_for("every line", SOON, || async { Delivered::read(cluster.vpc().cloud()).exactly_once(written.iter().cloned()) })
        .await
        .expect("each arrives once");
}

#[tokio::test(flavor = "multi_thread")]
async fn to_another_layout_of_programs_and_maps_and_back() {
    there_and_back(Other::Layouts).await;
}

/// With `STANCHION_OTHER_BUILD=FILE`, the binary of another build: from it to this one and back. Without, the switch is
/// between two copies of this one.
#[tokio::test(flavor = "multi_thread")]
async fn to_another_build_and_back() {
    let other = std::env::var_os("STANCHION_OTHER_BUILD").map(PathBuf::from);
    let copies = tempfile::tempdir().expect("a directory");
    let program = other.unwrap_or_else(|| {
        let copy = copies.path().join("stanchion");
        std::fs::copy(stanchion_lab::binaries::Binaries::find().expect("built").stanchion, &copy).expect("copied");
        copy
    });
    there_and_back(Other::Build(program)).await;
}
