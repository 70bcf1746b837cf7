//! What the whole agent costs on a full node where nothing happens: the real binary with both roles in a lab, 110 pods connected by
//! the real plugin, each with policy, cgroups and log files.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt as _;
use futures_util::stream;
use serde_json::json;

use super::plot::Plot;
use super::{Progress, Row, log_rate};
use crate::Vpc;
use crate::container_log::{ContainerLog, Output};
use crate::node::Node;
use crate::pod::{Pod, PodSpec};
use crate::pod_cgroups::PodCgroups;
use crate::wait::wait_for;

const PODS: usize = 110;
/// Workloads, each with a policy of its own.
const APPS: usize = 20;
/// 234 pods, so that 110 are far from its limits.
const INSTANCE_TYPE: &str = "m5.4xlarge";
/// ADDs under way at once.
const PARALLEL: usize = 8;
/// Lines that each container wrote before the node fell silent.
const LINES: usize = 20;
/// DESIGN.md section 1.
const MAX_RSS_MIB: f64 = 40.0;
const MAX_CPU_PERCENT: f64 = 0.5;
/// A small run does not wait a minute for a tick: it has them more often, which costs more, and looks for less long.
const QUICK_TICK: Duration = Duration::from_secs(10);
const QUICK_WINDOW: Duration = Duration::from_secs(30);
/// Pods at which the agent's memory is looked at, for the plot.
const LOOKS: [usize; 5] = [0, 10, 30, 60, PODS];
/// All ADDs; they take under ten seconds on two cores.
const ADDS_WITHIN: Duration = Duration::from_secs(120);

/// Measures for `window` after everything has settled.
///
/// # Errors
/// When the lab cannot be built (root, binaries) or the agent does not get there.
pub(super) fn run(quick: bool, window: Duration, progress: &Progress) -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("start a runtime")?;
    let (window, tick) = if quick { (window.min(QUICK_WINDOW), QUICK_TICK) } else { (window, Duration::from_secs(60)) };
    runtime.block_on(measure(quick, window, tick, progress))
}

async fn measure(quick: bool, window: Duration, tick: Duration, progress: &Progress) -> anyhow::Result<Vec<Row>> {
    progress.at("idle agent: a lab with one node");
    let mut vpc = Vpc::builder().start().await?;
    vpc.manifests().namespace("x", &[("ns", "x")])?;
    for app in 0..APPS {
        vpc.manifests().apply(&format!("policy-{app}.json"), &policy(app))?;
    }
    let node = vpc.node("node1", INSTANCE_TYPE).await?;
    let mut cgroups = PodCgroups::empty(node.name()).context("make cgroups (needs root)")?;
    let cgroup_root = cgroups.root.path().display().to_string();
    // A runtime has made it before the agent comes.
    fs::create_dir_all(node.cni_conf_dir()).context("make the directory of network configurations")?;
    let seconds = tick.as_secs().to_string();
    let settings = [("WARM_IP_TARGET", "5"), ("STANCHION_METRICS_INTERVAL_SECONDS", &seconds)];
    let mut agent = node.start_agent_with(&settings, &[("--cgroup-root", &cgroup_root)])?;
    node.ready(&mut agent, Duration::from_secs(60)).await?;
    progress.at(format_args!("idle agent: {PODS} pods by the plugin"));
    let specs = (0..PODS).map(|index| PodSpec::new("x", &format!("app{}-{index}", index % APPS)).ports(&[]));
    let mut adds = stream::iter(specs.map(|spec| node.add_pod(spec))).buffer_unordered(PARALLEL);
    let (mut pods, mut logs, mut memory) = (Vec::with_capacity(PODS), Vec::new(), Vec::new());
    let deadline = tokio::time::Instant::now() + ADDS_WITHIN;
    loop {
        if LOOKS.contains(&pods.len()) {
            memory.extend(resident(&Usage::read(agent.pid())?, pods.len()));
        }
        if pods.len() == PODS {
            break;
        }
        let added = tokio::time::timeout_at(deadline, adds.next()).await;
        let added = added.with_context(|| format!("{} of {PODS} pods are connected after {ADDS_WITHIN:?}", pods.len()))?;
        let mut pod = added.context("the stream of ADDs ended")??;
        run_containers(&vpc, &node, &mut cgroups, &mut pod, &mut logs)?;
        pods.push(pod);
    }
    drop(adds);
    progress.at(format_args!("idle agent: until a metric tick has every container; one comes every {} s", tick.as_secs()));
    // Its place within the interval is the node's own: up to a quarter later; and one may have begun before the last pod was there.
    wait_for("a metric tick with every container", tick * 3 + Duration::from_secs(20), || async {
        let told = node.cli_json(&["top"])?;
        let containers: usize =
            told["pods"].as_array().into_iter().flatten().filter_map(|pod| pod["containers"].as_array()).map(Vec::len).sum();
        ensure!(containers == PODS * 2, "{containers} of {}", PODS * 2);
        Ok(())
    })
    .await?;
    progress.at("idle agent: until every log line is acknowledged");
    wait_for("every line to be acknowledged", Duration::from_secs(60), || async {
        let logs = node.cli_json(&["logs"])?;
        let shipped = logs["totals"]["events_shipped"].as_u64().unwrap_or(0);
        ensure!(shipped >= (PODS * 2 * LINES) as u64, "{shipped} events shipped");
        Ok(())
    })
    .await?;
    // What the lab itself asked above is over; the runtime's blocking threads leave after ten seconds.
    progress.at("idle agent: twelve seconds for what was asked to be over");
    tokio::time::sleep(Duration::from_secs(12)).await;
    progress.at(format_args!("idle agent: watched for {} s", window.as_secs()));
    let before = Usage::read(agent.pid())?;
    let start = Instant::now();
    tokio::time::sleep(window).await;
    let after = Usage::read(agent.pid())?;
    let mut rows = rows(&before, &after, start.elapsed(), tick);
    rows.extend(memory);
    rows.extend(log_rate::run(quick, &node, agent.pid(), &mut pods, progress).await?);
    progress.at("idle agent: stopped and cleaned up");
    agent.stop(Duration::from_secs(20)).await?;
    // Namespaces and files go with the VPC.
    drop(pods);
    Ok(rows)
}

fn resident(usage: &Usage, pods: usize) -> [Row; 2] {
    [("resident", usage.rss_kib), ("anonymous", usage.anonymous_kib)].map(|(what, kib)| {
        let row = Row::plain(format!("agent as {pods} pods have come, {what}"), kib as f64 / 1024.0, "MiB");
        row.at(Plot::Memory, what, pods as f64)
    })
}

/// Writes what the kubelet and the runtime would have: the pod's status with its containers, their cgroups, their logs.
fn run_containers(vpc: &Vpc, node: &Node, cgroups: &mut PodCgroups, pod: &mut Pod, logs: &mut Vec<ContainerLog>) -> anyhow::Result<()> {
    let (spec, uid, address) = (pod.spec.clone(), pod.uid.clone(), pod.address());
    let ids: Vec<String> = [1, 2].iter().map(|n| format!("{:0>63}{n}", uid.replace('-', ""))).collect();
    cgroups.add(&uid, &ids)?;
    let names = ["main", "sidecar"];
    let mut sidecar = ContainerLog::create(&node.var_log(), &spec.namespace, &spec.name, &uid, names[1], &ids[1])?;
    for line in 0..LINES {
        pod.log.line(Output::Stdout, &format!("GET /orders/{line} 200"))?;
        sidecar.line(Output::Stderr, &format!("proxied request {line}"))?;
    }
    logs.push(sidecar);
    let resources = json!({"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}});
    let containers: Vec<_> =
        names.iter().map(|name| json!({"name": name, "image": "registry.example/a:1", "resources": resources})).collect();
    let statuses: Vec<_> = names
        .iter()
        .zip(&ids)
        .map(|(name, id)| json!({"name": name, "containerID": format!("containerd://{id}"), "restartCount": 0, "state": {"running": {}}}))
        .collect();
    let labels: BTreeMap<_, _> = spec.labels.iter().cloned().collect();
    let object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": spec.namespace, "name": spec.name, "uid": uid, "labels": labels},
        "spec": {"nodeName": node.name(), "containers": containers},
        "status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "containerStatuses": statuses,
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}],
        },
    });
    vpc.manifests().apply(&format!("pod-{}-{}.json", spec.namespace, spec.name), &object.to_string())?;
    Ok(())
}

/// Ingress from the next workload, egress to DNS and a network.
fn policy(app: usize) -> String {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": format!("app{app}")},
        "spec": {
            "podSelector": {"matchLabels": {"app": format!("app{app}")}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": format!("app{}", (app + 1) % APPS)}}}], "ports": [{"port": 80}]}],
            "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}, {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
        },
    })
    .to_string()
}

/// What the kernel says of a process.
#[derive(Debug, Default)]
struct Usage {
    rss_kib: u64,
    anonymous_kib: u64,
    /// Clock ticks of 10 ms, ended threads included.
    cpu_ticks: u64,
    fds: usize,
    /// Nanoseconds on a processor and voluntary context switches, by the names of the threads that live.
    threads: BTreeMap<String, (u64, u64)>,
    thread_count: usize,
}

impl Usage {
    fn read(pid: u32) -> anyhow::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| format!("read /proc/{pid}/{name}"));
        let rollup = read("smaps_rollup")?;
        let kib = |key: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).with_context(|| format!("no {key} in smaps_rollup"))
        };
        let stat = stanchion_core::metrics::proc::process_stat(&read("stat")?).context("read the agent's stat")?;
        let mut out = Self {
            rss_kib: kib("Rss:")?,
            anonymous_kib: kib("Anonymous:")?,
            cpu_ticks: stat.user_ticks + stat.system_ticks,
            fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            ..Self::default()
        };
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // A thread may end while it is looked at.
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let nanos = read("schedstat").split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0u64);
            let status = read("status");
            let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            let switches = switches.and_then(|rest| rest.trim().parse().ok()).unwrap_or(0u64);
            let slot = out.threads.entry(read("comm").trim().to_owned()).or_default();
            *slot = (slot.0 + nanos, slot.1 + switches);
            out.thread_count += 1;
        }
        Ok(out)
    }
}

fn rows(before: &Usage, after: &Usage, window: Duration, tick: Duration) -> Vec<Row> {
    let seconds = window.as_secs_f64();
    let mib = |kib: u64| kib as f64 / 1024.0;
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let cpu = (after.cpu_ticks - before.cpu_ticks) as f64 / stanchion_core::metrics::proc::USER_HZ as f64;
    let mut rows = vec![
        Row::plain(format!("agent, {PODS} pods, RSS, {profile}"), mib(after.rss_kib), "MiB").target(MAX_RSS_MIB),
        Row::plain("agent, of it anonymous", mib(after.anonymous_kib), "MiB"),
        Row::plain("agent, of it files (the binary)", mib(after.rss_kib.saturating_sub(after.anonymous_kib)), "MiB"),
        Row::plain(format!("agent, CPU of one core over {seconds:.0} s, a tick every {} s", tick.as_secs()), cpu / seconds * 100.0, "%")
            .target(MAX_CPU_PERCENT),
        Row::plain("agent, open files", after.fds as f64, "files"),
        Row::plain("agent, threads", after.thread_count as f64, "threads"),
    ];
    for (name, (nanos, switches)) in &after.threads {
        let (nanos_before, switches_before) = before.threads.get(name).copied().unwrap_or_default();
        rows.push(Row::plain(format!("  threads {name:?}, CPU"), nanos.saturating_sub(nanos_before) as f64 / 1e9 / seconds * 100.0, "%"));
        rows.push(Row::plain(
            format!("  threads {name:?}, wake-ups a second"),
            switches.saturating_sub(switches_before) as f64 / seconds,
            "1/s",
        ));
    }
    rows
}
