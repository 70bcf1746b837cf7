//! Container logs and metrics on their way to CloudWatch, and the views of the command line.

use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use stanchion_lab::cloudwatch::{Delivered, node_document};
use stanchion_lab::cluster::{Cluster, SOON};
use stanchion_lab::container_log::Output;
use stanchion_lab::fake_aws::{Effect, Fault};
use stanchion_lab::pod::PodSpec;
use stanchion_lab::probe::{Conversation, Protocol, probe};
use stanchion_lab::schema;
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

const DENY_A: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: deny}
spec: {podSelector: {matchLabels: {app: app}}, policyTypes: [Ingress]}
";

/// The pod is policed, talks to another one, and its ten lines have arrived.
async fn one_pod_at_work() -> (Cluster, Conversation) {
    let mut cluster = one_pod().await;
    cluster.vpc().manifests().apply("p.yaml", DENY_A).expect("written");
    cluster.add_pod(0, PodSpec::new("x", "other")).await.expect("a pod");
    cluster.settles(Protocol::Tcp, 80, |_, to| !to.starts_with("x/app")).await.expect("the policy holds");
    write(&mut cluster, lines("line", 10));
    arrive(&cluster, |d| d.exactly_once(lines("line", 10))).await;
    let remote = SocketAddr::new(cluster.pod("x/other").address(), 80);
    let open = Conversation::start(cluster.pod("x/app-0").netns(), remote).expect("connected");
    (cluster, open)
}

/// What scripts rely on: `deploy/schema/cli.json`.
#[tokio::test(flavor = "multi_thread")]
async fn every_json_document_is_what_the_schema_says() {
    let schema: Value = serde_json::from_str(include_str!("../../deploy/schema/cli.json")).expect("JSON");
    let (cluster, open) = one_pod_at_work().await;
    let node = cluster.node(0).clone();
    let check = |name: &str, document: &Value| {
        schema::check(&schema, name, document).unwrap_or_else(|error| panic!("{error:#}\n{document:#}"));
    };
    let bin_dir = node.cni_bin_dir().display().to_string();
    let install = ["install", "--no-conflist", "--bin-dir", &bin_dir];
    let pool = ["plan", "pool", "--instance-type", "m5.large", "--pods", "5"];
    for (name, command, filled) in [
        ("status", &["status"][..], "/ipam/pools/0"),
        ("enis", &["enis"][..], "/enis/0/cidrs/0"),
        ("ips", &["ips"][..], "/addresses/0/key"),
        ("endpoints", &["endpoints"][..], "/endpoints/0/interfaces/0/addresses/0"),
        ("policy", &["policy", "show"][..], "/endpoints/0/endpoint/pod"),
        ("conntrack", &["conntrack"][..], "/flows/0/remote"),
        ("logs", &["logs"][..], "/files/0/path"),
        ("config", &["config"][..], "/0/origin"),
        ("pool_plan", &pool[..], "/per_eni/0"),
        ("install", &install[..], "/0/mark"),
    ] {
        let document = node.cli_json(command).expect("JSON");
        assert!(document.pointer(filled).is_some_and(|value| !value.is_null()), "{name} says nothing at {filled}: {document:#}");
        check(name, &document);
    }
    assert_eq!(open.stop().broken, None);
    // A flow is a line, told while it is followed.
    let (asking, from, to) = (node.clone(), cluster.pod("x/other").netns().clone(), SocketAddr::new(cluster.pod("x/app-0").address(), 80));
    let flow = tokio::task::spawn_blocking(move || asking.cli(&["flows", "-o", "json"]));
    while !flow.is_finished() {
        let (from, to) = (from.clone(), to);
        let probed = tokio::task::spawn_blocking(move || probe(&from, Protocol::Udp, to, Duration::from_millis(20)));
        assert!(!probed.await.expect("no panic").expect("a socket").reached());
    }
    let line = flow.await.expect("no panic").expect("a line");
    check("flow", &serde_json::from_str(&line).expect("JSON"));
}

/// What a person sees who opens the node's page: in a real browser, whose console must have nothing to say.
#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_shows_addresses_policy_flows_and_logs_in_a_browser() {
    let (cluster, open) = one_pod_at_work().await;
    let remote = SocketAddr::new(cluster.pod("x/other").address(), 80);
    let node = cluster.node(0).clone();
    wait_for("warm addresses", SOON, || async {
        let enis = node.cli_json(&["enis"])?;
        let (held, total) = (enis["enis"][0]["assigned"].as_u64(), enis["enis"][0]["total"].as_u64());
        ensure!(held == Some(2) && total > held, "{enis:#}");
        Ok(())
    })
    .await
    .expect("the pool is filled again");
    let home = node.state_dir().with_file_name("chromium");
    let mut browser = Command::new("/usr/bin/chromium");
    browser.env("HOME", &home).arg(format!("--user-data-dir={}", home.display()));
    browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]);
    browser.args(["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]);
    // The page asks the agent at once and every three seconds.
    browser.args(["--virtual-time-budget=6000", "--dump-dom", "http://127.0.0.1:61679/"]);
    let at_work = node.clone();
    let shown = tokio::task::spawn_blocking(move || at_work.netns().output(&mut browser)).await.expect("no panic").expect("it runs");
    let (dom, said) = (String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
    assert!(!said.contains("CONSOLE"), "{said}");
    let section = |from: &str, to: &str| dom.split(from).nth(1).and_then(|rest| rest.split(to).next()).unwrap_or_default().to_owned();
    let summary = section("<p id=\"summary\">", "</p>");
    assert!(summary.contains("addresses: ready") && summary.contains("policy: ready"), "{summary}\n{said}");
    let enis = section("<div id=\"enis\">", "<h2>");
    for eni in node.cli_json(&["enis"]).expect("JSON")["enis"].as_array().expect("a list") {
        assert!(enis.contains(eni["id"].as_str().expect("an id")), "{eni}: {enis}");
    }
    for pod in ["x/app-0", "x/other"] {
        let dot = format!("<i class=\"assigned\" title=\"{} assigned {pod}\">", cluster.pod(pod).address());
        assert_eq!(enis.matches(&dot).count(), 1, "{dot}: {enis}");
    }
    assert!(enis.contains("<i></i>"), "warm addresses are free: {enis}");
    let endpoints = section("<table id=\"endpoints\">", "</table>");
    let row = endpoints.split("<tr>").find(|row| row.contains("<td>x/app-0</td>")).expect("a row of the pod");
    assert!(row.contains(&cluster.pod("x/app-0").address().to_string()) && row.contains("<td>isolated</td><td>open</td>"), "{row}");
    let flows = section("<table id=\"flows\">", "</table>");
    // That of a probe before it may still be there.
    let is_open =
        |row: &str| ["<td>x/app-0</td>", &format!("<td>{remote}</td>"), "<td>established</td>"].iter().all(|cell| row.contains(cell));
    assert!(flows.split("<tr>").any(is_open), "{flows}");
    let logs = section("<table id=\"logs\">", "</table>");
    assert!(logs.contains("app-0_x_main") || logs.contains("x_app-0"), "{logs}");
    assert!(logs.contains("<td>0</td><td>0</td>"), "nothing is behind: {logs}");
    assert_eq!(open.stop().broken, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_asked_again_and_again_until_its_reader_goes() {
    let cluster = Cluster::start(&["m5.large"], &[]).await.expect("the cluster starts");
    let node = cluster.node(0);
    let mut command = Command::new(&node.binaries().stanchion);
    command.args(["status", "--watch=1", "-o", "json"]).env("STANCHION_SOCKET", node.socket()).stdout(Stdio::piped());
    let mut watching = command.spawn().expect("it runs");
    let mut answers = BufReader::new(watching.stdout.take().expect("stdout is piped")).lines();
    for _ in 0..2 {
        let answer = answers.next().expect("it goes on").expect("text");
        assert_eq!(serde_json::from_str::<Value>(&answer).expect("a document a line")["node"], "node1");
    }
    drop(answers);
    watching.wait().expect("it ends with its reader");
}
