//! Container logs and metrics on their way to CloudWatch, and the views of the command line.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, ensure};
use stanchion_lab::cloudwatch::{Delivered, node_document};
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::container_log::Output;
use stanchion_lab::fake_aws::{Effect, Fault};
use stanchion_lab::pod::PodSpec;
use stanchion_lab::wait::wait_for;

async fn arrive(cluster: &Cluster, check: impl Fn(&Delivered) -> anyhow::Result<()>) -> Delivered {
    wait_for("log events", SOON, || async {
        let delivered = Delivered::read(cluster.vpc().cloud());
        check(&delivered)?;
        Ok(delivered)
    })
    .await
    .expect("they arrive")
}

async fn one_pod() -> Cluster {
    let settings = [("WARM_IP_TARGET", "2"), ("STANCHION_LOG_FLUSH_SECONDS", "0.2"), ("STANCHION_METRICS_INTERVAL_SECONDS", "1")];
    let mut cluster = Cluster::start(&["m5.large"], &settings).await.expect("the cluster starts");
    cluster.add_pod(0, PodSpec::new("x", "app-0")).await.expect("a pod");
    cluster
}

fn write(cluster: &mut Cluster, lines: impl Iterator<Item = String>) {
    let log = &mut cluster.pod_mut("x/app-0").log;
    for line in lines {
        log.line(Output::Stdout, &line).expect("written");
    }
}

fn lines(of: &str, count: u32) -> impl Iterator<Item = String> + use<> {
    let of = of.to_owned();
    (0..count).map(move |n| format!("{of} {n}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_line_arrives_once_through_rotation_and_a_clean_restart() {
    let mut cluster = one_pod().await;
    write(&mut cluster, lines("before", 500));
    cluster.pod_mut("x/app-0").log.rotate().expect("rotated");
    write(&mut cluster, lines("rotated", 500));
    let delivered = arrive(&cluster, |d| d.exactly_once(lines("before", 500).chain(lines("rotated", 500)))).await;
    let record = &delivered.find("before 0").expect("it arrived").record;
    assert_eq!(record["kubernetes"]["pod_name"], "app-0");
    assert_eq!(record["kubernetes"]["namespace_name"], "x");
    assert_eq!(record["stream"], "stdout");

    let status = cluster.agent(0).expect("started").stop(SOON).await.expect("it stops");
    assert!(status.success(), "{status}");
    write(&mut cluster, lines("stopped", 100));
    cluster.pod_mut("x/app-0").log.rotate().expect("rotated");
    write(&mut cluster, lines("again", 100));
    cluster.start_agent(0).await.expect("it starts again");
    arrive(&cluster, |d| {
        d.exactly_once(lines("before", 500))?;
        d.exactly_once(lines("rotated", 500))?;
        d.exactly_once(lines("stopped", 100))?;
        d.exactly_once(lines("again", 100))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_line_is_lost_by_kill_9_or_an_outage() {
    let mut cluster = one_pod().await;
    cluster.vpc().cloud().inject(Fault::always("PutLogEvents", Effect::DropRequest));
    write(&mut cluster, lines("outage", 300));
    wait_for("an attempt", SOON, || async {
        ensure!(cluster.vpc().cloud().count("PutLogEvents") > 0, "none");
        Ok(())
    })
    .await
    .expect("it tries");
    cluster.agent(0).expect("started").kill().expect("killed");
    write(&mut cluster, lines("dead", 300));
    cluster.vpc().cloud().clear_faults();
    cluster.start_agent(0).await.expect("it starts again");
    arrive(&cluster, |d| d.at_least_once(lines("outage", 300).chain(lines("dead", 300)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_arrive_and_views_answer() {
    let cluster = one_pod().await;
    let document = wait_for("a node's document", SOON + Duration::from_secs(10), || async {
        node_document(cluster.vpc().cloud(), "node1").context("none yet")
    })
    .await
    .expect("it arrives");
    assert_eq!(document["ClusterName"], "stanchion-lab");
    let used = document["node_memory_utilization"].as_f64().expect("a number");
    assert!((0.0..=100.0).contains(&used), "{used}");

    let node = cluster.node(0);
    for view in ["status", "enis", "ips", "endpoints"] {
        let json = node.cli_json(&[view]).expect("JSON");
        assert!(!json.is_null(), "{view}");
        let text = node.cli(&[view]).expect("a table");
        assert!(text.lines().count() > 1, "{view}: {text}");
    }
    let endpoints = node.cli("endpoints".split(' ').collect::<Vec<_>>().as_slice()).expect("a table");
    assert!(endpoints.contains("app-0"), "{endpoints}");
    assert!(endpoints.contains(&cluster.pod("x/app-0").address().to_string()), "{endpoints}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_http_listener_can_be_switched_off() {
    let mut cluster = Cluster::start(&["m5.large"], &[("WARM_IP_TARGET", "1")]).await.expect("the cluster starts");
    let node = cluster.node(0).clone();
    let answers = |port: u16| node.netns().run(|| TcpStream::connect(("127.0.0.1", port)).is_ok()).expect("the namespace is there");
    let (metrics, introspection) = (61678, 61679);
    let both = wait_for("both listeners", SOON, || async {
        ensure!(answers(metrics) && answers(introspection), "not yet");
        Ok(())
    });
    both.await.expect("they are there unless switched off");
    cluster.agent(0).expect("runs").kill().expect("killed");
    for (variable, off, on) in [("DISABLE_METRICS", metrics, introspection), ("DISABLE_INTROSPECTION", introspection, metrics)] {
        let mut agent = node.start_agent(&[("WARM_IP_TARGET", "1"), (variable, "true")]).expect("started");
        node.ready(&mut agent, SOON).await.expect("ready");
        wait_for("the other listener", SOON, || async {
            ensure!(answers(on), "not yet");
            Ok(())
        })
        .await
        .expect("it is not concerned");
        assert!(!answers(off), "{variable}");
        agent.kill().expect("killed");
    }
}
