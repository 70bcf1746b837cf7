//! This node's pods as metrics name them: workload, service, requests, limits, states.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;

use super::insights::json;
use super::model::NodeStatus;
use crate::branch::VethNames;
use crate::cluster::ClusterState;
use crate::objects::{CONFIG_HASH, Container, ContainerStatus, LabelSelector, Node, Pod, Quantity, Service};

/// The letters of the suffixes that ReplicaSets get (`k8s.io/apimachinery/pkg/util/rand`).
const SAFE_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// What is known of a pod, fixed until its object changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PodMeta {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The uid that its cgroup carries.
    pub uid: String,
    /// The dimension `PodName`: the workload's name; of a Job only its beginning.
    pub workload: String,
    /// Kind and name of the workload.
    pub owner: Option<(&'static str, String)>,
    /// The first service, by name, that selects it.
    pub service: Option<String>,
    /// On the node's network: has no traffic of its own.
    pub host_network: bool,
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: String,
    /// When the kubelet took it on: milliseconds since 1970.
    pub started_ms: Option<i64>,
    /// Condition `Ready` is True.
    pub ready: bool,
    /// Condition `PodScheduled` is True.
    pub scheduled: bool,
    /// What the scheduler counts.
    pub requests: Amounts,
    /// Sum over its containers, where each has one.
    pub limits: Amounts,
    /// Its containers, sidecars among them.
    pub containers: Vec<ContainerMeta>,
    /// The host end of its veth under aws-node's naming.
    #[serde(skip)]
    pub host_interface: String,
    /// The document's `kubernetes` object without its closing brace.
    #[serde(skip)]
    pub kubernetes: String,
}

/// Millicores and bytes; `None` where nothing was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Amounts {
    /// Millicores.
    pub cpu: Option<f64>,
    /// Bytes.
    pub memory: Option<f64>,
}

/// What is known of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ContainerMeta {
    /// Name in the pod.
    pub name: String,
    /// `containerd`, `cri-o`, `docker`; empty before it exists.
    pub runtime: String,
    /// The runtime's id; empty before it exists.
    pub id: String,
    /// Asked.
    pub requests: Amounts,
    /// Upper bounds.
    pub limits: Amounts,
    /// Restarts in its pod's life.
    pub restarts: u64,
    /// What it is doing.
    pub state: ContainerState,
    /// Since when it runs: milliseconds since 1970.
    pub started_ms: Option<i64>,
    /// Why it ended the last time (`OOMKilled`, `Error` …).
    pub last_termination: Option<String>,
}

/// What a container is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub enum ContainerState {
    /// Its status is not known.
    #[default]
    Unknown,
    /// Runs.
    Running,
    /// Is to run.
    Waiting {
        /// `CrashLoopBackOff` …
        reason: String,
    },
    /// Ended.
    Terminated {
        /// `Completed`, `OOMKilled` …
        reason: String,
    },
}

impl ContainerState {
    /// The value of `container_status`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Running => "Running",
            Self::Waiting { .. } => "Waiting",
            Self::Terminated { .. } => "Terminated",
        }
    }

    /// Why, where there is a reason.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Waiting { reason } | Self::Terminated { reason } if !reason.is_empty() => Some(reason),
            _ => None,
        }
    }
}

impl PodMeta {
    /// Takes part in what the node has promised: not ended.
    pub fn is_active(&self) -> bool {
        !matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }
}

/// The pods of one node.
#[derive(Clone, Debug, Default)]
pub struct PodTable {
    pods: Vec<(Arc<Pod>, Arc<PodMeta>)>,
    by_uid: BTreeMap<String, usize>,
    services: Vec<Arc<Service>>,
    /// What the node's object says.
    pub node: Option<NodeStatus>,
}

impl PodTable {
    /// The pods bound to `node`, in order of namespace and name; what did not change since `self` is taken over.
    #[must_use]
    pub fn refreshed(&self, cluster: &ClusterState, node: &str, veths: &VethNames) -> Self {
        let services: Vec<_> = cluster.services.values().cloned().collect();
        let same_services = services.len() == self.services.len() && services.iter().zip(&self.services).all(|(a, b)| Arc::ptr_eq(a, b));
        let known: BTreeMap<*const Pod, &Arc<PodMeta>> =
            if same_services { self.pods.iter().map(|(pod, meta)| (Arc::as_ptr(pod), meta)).collect() } else { BTreeMap::new() };
        let pods: Vec<_> = cluster
            .pods
            .values()
            .filter(|pod| pod.spec.node_name == node)
            .map(|pod| {
                let meta = known.get(&Arc::as_ptr(pod)).map(|meta| Arc::clone(meta));
                (Arc::clone(pod), meta.unwrap_or_else(|| Arc::new(pod_meta(pod, node, &services, veths))))
            })
            .collect();
        let by_uid = pods.iter().enumerate().map(|(index, (_, meta))| (meta.uid.clone(), index)).collect();
        Self { pods, by_uid, services, node: cluster.nodes.get(node).map(|node| node_status(node)) }
    }

    /// All of them, in a fixed order.
    pub fn pods(&self) -> impl ExactSizeIterator<Item = &Arc<PodMeta>> {
        self.pods.iter().map(|(_, meta)| meta)
    }

    /// Whether a pod has a container with this id: the id of its sandbox is none of them.
    pub fn has_container(&self, uid: &str, id: &str) -> bool {
        let pod = self.position(uid).and_then(|at| self.pods.get(at));
        pod.is_some_and(|(_, meta)| meta.containers.iter().any(|container| container.id == id))
    }

    /// The place in [`Self::pods`] of the pod with this uid.
    pub fn position(&self, uid: &str) -> Option<usize> {
        self.by_uid.get(uid).copied()
    }
}

fn pod_meta(pod: &Pod, node: &str, services: &[Arc<Service>], veths: &VethNames) -> PodMeta {
    let meta = &pod.metadata;
    let condition = |kind: &str| pod.status.conditions.iter().any(|c| c.kind == kind && c.status == "True");
    let sidecars = pod.spec.init_containers.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let statuses = || pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
    let containers: Vec<_> =
        pod.spec.containers.iter().chain(sidecars).map(|c| container_meta(c, statuses().find(|status| status.name == c.name))).collect();
    let owner = owner(pod);
    let service = services
        .iter()
        .find(|service| {
            let wanted = &service.spec.selector;
            service.metadata.namespace == meta.namespace
                && !wanted.is_empty()
                && LabelSelector { match_labels: wanted.clone(), ..Default::default() }.matches(&meta.labels)
        })
        .map(|service| service.metadata.name.clone());
    let workload = match &owner {
        Some(("Job", name)) => job_prefix(name).to_owned(),
        _ => workload(pod),
    };
    let mut out = PodMeta {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.annotations.get(CONFIG_HASH).unwrap_or(&meta.uid).clone(),
        workload,
        owner,
        service,
        host_network: pod.spec.host_network,
        phase: if pod.status.phase.is_empty() { "Unknown".to_owned() } else { pod.status.phase.clone() },
        started_ms: pod.status.start_time.as_deref().and_then(milliseconds),
        ready: condition("Ready"),
        scheduled: condition("PodScheduled"),
        requests: Amounts { cpu: sum_of_set(&containers, |c| c.requests.cpu), memory: sum_of_set(&containers, |c| c.requests.memory) },
        limits: Amounts { cpu: sum_of_all(&containers, |c| c.limits.cpu), memory: sum_of_all(&containers, |c| c.limits.memory) },
        containers,
        host_interface: veths.of(pod),
        kubernetes: String::new(),
    };
    out.kubernetes = kubernetes_object(&out, pod, node);
    out
}

/// The `kubernetes` object of a pod's documents, open at its end so that a container's adds its own members.
fn kubernetes_object(meta: &PodMeta, pod: &Pod, node: &str) -> String {
    let mut out = format!("{{\"host\":{}", json(node));
    let labels = serde_json::to_string(&pod.metadata.labels).unwrap_or_else(|_| "{}".to_owned());
    // Writing to a String cannot fail.
    let _ = write!(out, ",\"labels\":{labels},\"namespace_name\":{}", json(&meta.namespace));
    let _ = write!(out, ",\"pod_id\":{},\"pod_name\":{}", json(&pod.metadata.uid), json(&meta.name));
    if let Some((kind, _)) = &meta.owner {
        let _ = write!(out, ",\"pod_owners\":[{{\"owner_kind\":\"{kind}\",\"owner_name\":{}}}]", json(&meta.workload));
    }
    if let Some(service) = &meta.service {
        let _ = write!(out, ",\"service_name\":{}", json(service));
    }
    out
}

fn container_meta(container: &Container, status: Option<&ContainerStatus>) -> ContainerMeta {
    let amounts = |of: &BTreeMap<String, Quantity>| Amounts {
        cpu: of.get("cpu").and_then(Quantity::value).map(|cores| cores * 1000.0),
        memory: of.get("memory").and_then(Quantity::value),
    };
    let mut out = ContainerMeta {
        name: container.name.clone(),
        requests: amounts(&container.resources.requests),
        limits: amounts(&container.resources.limits),
        ..ContainerMeta::default()
    };
    // The API server sets an absent request to the limit.
    out.requests.cpu = out.requests.cpu.or(out.limits.cpu);
    out.requests.memory = out.requests.memory.or(out.limits.memory);
    let Some(status) = status else { return out };
    if let Some((runtime, id)) = status.container_id.split_once("://") {
        (out.runtime, out.id) = (runtime.to_owned(), id.to_owned());
    }
    let reason = |state: Option<&serde_json::Value>| state?.get("reason")?.as_str().map(str::to_owned);
    out.restarts = u64::from(status.restart_count);
    out.state = if status.state.contains_key("running") {
        ContainerState::Running
    } else if let Some(waiting) = status.state.get("waiting") {
        ContainerState::Waiting { reason: reason(Some(waiting)).unwrap_or_default() }
    } else if let Some(ended) = status.state.get("terminated") {
        ContainerState::Terminated { reason: reason(Some(ended)).unwrap_or_default() }
    } else {
        ContainerState::Unknown
    };
    let running = status.state.get("running").and_then(|running| running.get("startedAt")?.as_str());
    out.started_ms = running.and_then(milliseconds);
    out.last_termination = reason(status.last_state.get("terminated"));
    out
}

/// RFC 3339 as milliseconds since 1970.
fn milliseconds(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(|at| at.as_millisecond())
}

fn sum_of_set(containers: &[ContainerMeta], of: impl Fn(&ContainerMeta) -> Option<f64>) -> Option<f64> {
    containers.iter().filter_map(of).reduce(|a, b| a + b)
}

fn sum_of_all(containers: &[ContainerMeta], of: impl Fn(&ContainerMeta) -> Option<f64>) -> Option<f64> {
    containers.iter().map(of).reduce(|a, b| Some(a? + b?)).flatten()
}

/// Name of the workload that made a pod; the pod's own where none did.
pub fn workload(pod: &Pod) -> String {
    let meta = &pod.metadata;
    match owner(pod) {
        Some((_, name)) => name,
        None if meta.namespace == "kube-system" && meta.name.starts_with("kube-proxy-") => "kube-proxy".to_owned(),
        None => meta.name.clone(),
    }
}

/// Kind and name of the workload that made a pod.
fn owner(pod: &Pod) -> Option<(&'static str, String)> {
    let owners = &pod.metadata.owner_references;
    let owner = owners.iter().find(|owner| owner.controller == Some(true)).or(owners.first())?;
    Some(match owner.kind.as_str() {
        "ReplicaSet" => match deployment_of(&owner.name) {
            Some(deployment) => ("Deployment", deployment.to_owned()),
            None => ("ReplicaSet", owner.name.clone()),
        },
        "Job" => match cron_job_of(&owner.name) {
            Some(cron_job) => ("CronJob", cron_job.to_owned()),
            None => ("Job", owner.name.clone()),
        },
        "DaemonSet" => ("DaemonSet", owner.name.clone()),
        // Each of its pods is an individual, and upstream names it so.
        "StatefulSet" => ("StatefulSet", pod.metadata.name.clone()),
        "ReplicationController" => ("ReplicationController", owner.name.clone()),
        // A static pod's mirror is owned by its Node, an operator's pod by a resource of its own kind.
        _ => return None,
    })
}

/// `web-6b9c4cb4dc` is of the Deployment `web`: a suffix of three or more letters that a ReplicaSet may get.
fn deployment_of(replica_set: &str) -> Option<&str> {
    let (name, suffix) = replica_set.rsplit_once('-')?;
    (!name.is_empty() && suffix.len() >= 3 && suffix.bytes().all(|b| SAFE_ALPHABET.contains(&b))).then_some(name)
}

/// `backup-28012345` is of the CronJob `backup`: minutes (or seconds, before 1.21) since 1970.
fn cron_job_of(job: &str) -> Option<&str> {
    let (name, suffix) = job.rsplit_once('-')?;
    (!name.is_empty() && (8..=10).contains(&suffix.len()) && suffix.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

/// `etl-20261123-x7k2p` is told as `etl`, as upstream does: whoever makes Jobs gives each a name of its own, and names are metrics.
fn job_prefix(job: &str) -> &str {
    job.split(['-', '.']).next().unwrap_or(job)
}

fn node_status(node: &Node) -> NodeStatus {
    let is = |kind: &str| node.status.conditions.iter().any(|c| c.kind == kind && c.status == "True");
    let pods = |of: &BTreeMap<String, Quantity>| of.get("pods").and_then(Quantity::value);
    NodeStatus {
        ready: is("Ready"),
        disk_pressure: is("DiskPressure"),
        memory_pressure: is("MemoryPressure"),
        pid_pressure: is("PIDPressure"),
        network_unavailable: is("NetworkUnavailable"),
        unknown: node.status.conditions.iter().any(|c| c.status == "Unknown"),
        capacity_pods: pods(&node.status.capacity),
        allocatable_pods: pods(&node.status.allocatable),
    }
}

#[cfg(test)]
mod tests {
    use super::super::insights_tests::cluster;
    use super::*;
    use crate::objects::OwnerReference;

    #[test]
    fn a_recorded_kubelet_gives_workload_service_limits_states() {
        let table = PodTable::default().refreshed(&cluster(), "node1", &VethNames::default());
        let web = table.pods().find(|pod| pod.name == "web-6b9c4cb4dc-8zpz5").unwrap();
        assert_eq!((web.workload.as_str(), web.service.as_deref()), ("web", Some("web-svc")));
        assert_eq!(web.owner, Some(("Deployment", "web".to_owned())));
        assert_eq!(web.requests, Amounts { cpu: Some(200.0), memory: Some(67_108_864.0) });
        assert_eq!(web.limits, web.requests);
        assert!(web.ready && web.scheduled && web.phase == "Running");
        let container = &web.containers[0];
        assert_eq!((container.name.as_str(), container.runtime.as_str(), &container.state), ("c", "containerd", &ContainerState::Running));
        assert_eq!(container.id, "46d42a41bef56d47fa2e9311c2fd4dc89cbc5868b40ce7888e3dd25024c9727f");
        let bare = table.pods().find(|pod| pod.name == "cli").unwrap();
        assert_eq!((bare.workload.as_str(), &bare.owner, &bare.service), ("cli", &None, &None));
        assert_eq!(bare.requests, Amounts::default());
        assert_eq!(table.position(&web.uid).map(|at| table.pods().nth(at).unwrap().name.as_str()), Some("web-6b9c4cb4dc-8zpz5"));
        let object: serde_json::Value = serde_json::from_str(&format!("{}}}", web.kubernetes)).unwrap();
        assert_eq!(object["pod_owners"][0]["owner_kind"], "Deployment");
        assert_eq!(object["labels"]["app"], "web");
    }

    #[test]
    fn what_did_not_change_is_taken_over() {
        let mut state = cluster();
        let first = PodTable::default().refreshed(&state, "node1", &VethNames::default());
        let changed = crate::ids::PodName::new("default", "cli");
        let mut pod = (*state.pods[&changed]).clone();
        pod.status.phase = "Failed".into();
        state.pods.insert(changed, Arc::new(pod));
        let second = first.refreshed(&state, "node1", &VethNames::default());
        for (old, new) in first.pods().zip(second.pods()) {
            assert_eq!(Arc::ptr_eq(old, new), new.name != "cli", "{}", new.name);
        }
        assert_eq!(second.refreshed(&state, "another", &VethNames::default()).pods().len(), 0);
    }

    #[test]
    fn workloads() {
        let named = |kind: &str, name: &str| {
            let mut pod = Pod::default();
            pod.metadata.name = "p-0".into();
            pod.metadata.owner_references = vec![OwnerReference { kind: kind.into(), name: name.into(), controller: Some(true) }];
            owner(&pod)
        };
        assert_eq!(named("ReplicaSet", "web-6b9c4cb4dc"), Some(("Deployment", "web".into())));
        assert_eq!(named("ReplicaSet", "web-aeiou"), Some(("ReplicaSet", "web-aeiou".into())), "no vowels in a suffix");
        assert_eq!(named("ReplicaSet", "web-bc"), Some(("ReplicaSet", "web-bc".into())));
        assert_eq!(named("Job", "backup-28012345"), Some(("CronJob", "backup".into())));
        assert_eq!(named("Job", "backup-123"), Some(("Job", "backup-123".into())));
        assert_eq!(named("StatefulSet", "db"), Some(("StatefulSet", "p-0".into())));
        assert_eq!(named("Node", "node1"), None);
    }

    /// The names of Jobs that a pipeline makes differ each time: upstream's `PodName` ends at the first `-` or `.`, and so do dashboards.
    #[test]
    fn the_pod_name_of_a_jobs_pods_is_upstreams() {
        for (job, pod_name, kind) in [
            ("etl-20261123-x7k2p", "etl", "Job"),
            ("etl.daily-1", "etl", "Job"),
            ("etl", "etl", "Job"),
            ("nightly-backup-28012345", "nightly-backup", "CronJob"),
        ] {
            let mut pod = Pod::default();
            pod.metadata.name = format!("{job}-abcde");
            pod.metadata.owner_references = vec![OwnerReference { kind: "Job".into(), name: job.into(), controller: Some(true) }];
            let meta = pod_meta(&pod, "node1", &[], &VethNames::default());
            assert_eq!(meta.workload, pod_name);
            let object: serde_json::Value = serde_json::from_str(&format!("{}}}", meta.kubernetes)).unwrap();
            assert_eq!((&object["pod_owners"][0]["owner_kind"], &object["pod_owners"][0]["owner_name"]), (&kind.into(), &pod_name.into()));
            // Elsewhere a Job has its whole name.
            assert_eq!(workload(&pod), if kind == "Job" { job } else { pod_name });
        }
    }
}
