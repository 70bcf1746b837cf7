//! The same with the real agent: addresses from the fake EC2, the checkpoint on disk, policy in the kernel's maps, programs attached.

use std::time::Duration;

use anyhow::Context as _;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use tokio::runtime::Runtime;

use super::floor::Programs;
use super::{Calls, Owned, at_once, floor, in_plot, phases, pod_netns, verdicts};
use crate::bench::Row;
use crate::cluster::{Cluster, SOON};
use crate::manifests::PodManifest;
use crate::node::Node;
use crate::pod::Sandbox;
use crate::wait::wait_for;

/// Eight ENIs of thirty addresses.
const INSTANCE_TYPE: &str = "m5.4xlarge";
const NAMESPACE: &str = "x";
/// One that isolates every pod of the bench: policy is compiled and written in each ADD.
const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: x, name: only-same}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: 80}, {port: 443}]}], egress: [{to: [{podSelector: {}}]}]}
";

/// A pod that the cluster knows and that has a namespace.
struct Pod {
    sandbox: Sandbox,
    _netns: Owned,
}

/// One by one and bursts.
pub(super) fn run(runtime: &Runtime, rounds: usize, bursts: &[usize]) -> anyhow::Result<Vec<Row>> {
    let most = bursts.iter().copied().max().unwrap_or(1);
    let warm = (most + 10).to_string();
    // A released address rests for a while, and a burst follows the other.
    let settings = [("WARM_IP_TARGET", warm.as_str()), ("MINIMUM_IP_TARGET", &warm), ("IP_COOLDOWN_PERIOD", "0")];
    let mut cluster = runtime.block_on(Cluster::start(&[INSTANCE_TYPE], &settings))?;
    cluster.vpc().manifests().apply("policy.yaml", POLICY)?;
    let node = cluster.node(0).clone();
    let pods = (0..most).map(|number| pod(&node, number)).collect::<anyhow::Result<Vec<_>>>()?;
    runtime.block_on(filled(&node, most))?;

    let add = |pod: &Pod| call(&node, "ADD", pod);
    let del = |pod: &Pod| call(&node, "DEL", pod);
    // Once unmeasured: it waits until the agent has read the manifests.
    let last = pods.last().context("no pods")?;
    add(last)?;
    del(last)?;
    std::fs::write(node.plugin_log(), "")?;
    let mut calls = Calls::default();
    for pod in pods.iter().cycle().take(rounds) {
        calls.add.push(add(pod)?);
        calls.del.push(del(pod)?);
    }
    let programs = Programs::pinned(&node.bpf_dir().join(format!("v{LAYOUT_VERSION}")))?;
    let floor = floor::one_by_one(node.netns(), rounds, Some(&programs))?;
    let mut rows = in_plot("agent", 1, verdicts("agent, one by one", &calls, &floor, None, None));
    rows.extend(phases(&node.plugin_log(), &calls)?);
    for count in bursts {
        runtime.block_on(filled(&node, *count))?;
        let pods = &pods[..*count];
        let calls = Calls { add: at_once(pods, |_, pod| add(pod))?, del: at_once(pods, |_, pod| del(pod))? };
        let floor = floor::burst(node.netns(), *count, Some(&programs))?;
        rows.extend(in_plot("agent", *count, verdicts(&format!("agent, burst of {count}"), &calls, &floor, None, Some(1000.0))));
        rows.extend(phases(&node.plugin_log(), &calls)?);
    }
    let report = cluster.agent(0)?.ended()?;
    anyhow::ensure!(report.is_none(), "the agent ended during the bench: {report:?}");
    Ok(rows)
}

fn pod(node: &Node, number: usize) -> anyhow::Result<Pod> {
    let name = format!("p{number}");
    let uid = format!("00000000-0000-4000-8000-{number:012}");
    let manifest = PodManifest {
        namespace: NAMESPACE.to_owned(),
        name: name.clone(),
        uid: uid.clone(),
        node: node.name().to_owned(),
        labels: vec![("app".to_owned(), name.clone())],
        annotations: Vec::new(),
        containers: Vec::new(),
        ips: Vec::new(),
    };
    node.inner.manifests.pod(&manifest)?;
    // Numbers of their own: the floor makes namespaces too.
    let netns = pod_netns(1000 + number)?;
    let sandbox = Sandbox {
        container_id: format!("bench{number}"),
        netns: netns.0.path().display().to_string(),
        namespace: NAMESPACE.to_owned(),
        name,
        uid,
        annotations: Vec::new(),
    };
    Ok(Pod { sandbox, _netns: netns })
}

/// Waits until the agent has so many free addresses.
async fn filled(node: &Node, wanted: usize) -> anyhow::Result<()> {
    wait_for("a warm pool", SOON, || async {
        let status = node.cli_json(&["status"])?;
        let free = status.pointer("/ipam/pools/0/free").and_then(serde_json::Value::as_u64);
        let free = free.with_context(|| format!("no count of free addresses in {status}"))?;
        anyhow::ensure!(usize::try_from(free)? >= wanted, "{free} free addresses, {wanted} wanted");
        Ok(())
    })
    .await
}

fn call(node: &Node, verb: &str, pod: &Pod) -> anyhow::Result<Duration> {
    let reply = node.plugin(verb, &pod.sandbox, None)?;
    let took = reply.took;
    reply.into_result(verb, &pod.sandbox.name)?;
    Ok(took)
}
