//! This node's pods as metrics name them: workload, service, requests, limits, states.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;

use super::insights::json;
use super::model::NodeStatus;
use crate::branch::VethNames;
use crate::cluster::ClusterState;
use crate::objects::{CONFIG_HASH, Container, ContainerStatus, LabelSelector, Node, OwnerReference, Pod, Quantity, Service};

/// The letters of the suffixes that ReplicaSets get (`k8s.io/apimachinery/pkg/util/rand`).
const SAFE_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Kubernetes' own.
const WORKLOADS: [&str; 7] = ["Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob", "ReplicationController"];
/// NVIDIA's GPUs among a container's resources and a node's.
const GPU: &str = "nvidia.com/gpu";

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
    /// One of the two is Unknown: the node was lost.
    pub unknown: bool,
    /// Sum over its containers, of those that have one.
    pub requests: Amounts,
    /// Sum over its containers, where each has one.
    pub limits: Amounts,
    /// GPUs, where it asks for any.
    pub gpus: Option<Gpus>,
    /// Its containers, then its sidecars.
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

/// GPUs of NVIDIA, over all containers of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Gpus {
    /// Asked.
    pub request: f64,
    /// Upper bound: what it has.
    pub limit: f64,
}

/// What is known of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ContainerMeta {
    /// Name in the pod.
    pub name: String,
    /// An init container that runs as long as the pod: it is told by itself, but no figure of the pod counts it, as upstream.
    pub sidecar: bool,
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
    /// Its containers without sidecars.
    pub fn own_containers(&self) -> impl Iterator<Item = &ContainerMeta> {
        self.containers.iter().filter(|container| !container.sidecar)
    }

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
    let condition = |kind: &str, is: &str| pod.status.conditions.iter().any(|c| c.kind == kind && c.status == is);
    let sidecars = pod.spec.init_containers.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let statuses = || pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
    let status = |container: &Container| statuses().find(|status| status.name == container.name);
    let mut containers: Vec<_> = pod.spec.containers.iter().map(|c| container_meta(c, status(c))).collect();
    let requests = Amounts { cpu: sum_of_set(&containers, |c| c.requests.cpu), memory: sum_of_set(&containers, |c| c.requests.memory) };
    let limits = Amounts { cpu: sum_of_all(&containers, |c| c.limits.cpu), memory: sum_of_all(&containers, |c| c.limits.memory) };
    containers.extend(sidecars.map(|c| ContainerMeta { sidecar: true, ..container_meta(c, status(c)) }));
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
    let mut out = PodMeta {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.annotations.get(CONFIG_HASH).unwrap_or(&meta.uid).clone(),
        workload: pod_name(pod),
        owner,
        service,
        host_network: pod.spec.host_network,
        phase: if pod.status.phase.is_empty() { "Unknown".to_owned() } else { pod.status.phase.clone() },
        started_ms: pod.status.start_time.as_deref().and_then(milliseconds),
        ready: condition("Ready", "True"),
        scheduled: condition("PodScheduled", "True"),
        unknown: condition("Ready", "Unknown") || condition("PodScheduled", "Unknown"),
        requests,
        limits,
        gpus: gpus(pod),
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
    // Writing to a String cannot fail.
    if !pod.metadata.labels.is_empty() {
        let labels = serde_json::to_string(&pod.metadata.labels).unwrap_or_else(|_| "{}".to_owned());
        let _ = write!(out, ",\"labels\":{labels}");
    }
    let _ = write!(out, ",\"namespace_name\":{}", json(&meta.namespace));
    let _ = write!(out, ",\"pod_id\":{},\"pod_name\":{}", json(&pod.metadata.uid), json(&meta.name));
    let owners: Vec<_> = owners(pod)
        .map(|(kind, name)| {
            let name = if kind == "Job" { job_prefix(name) } else { name };
            format!("{{\"owner_kind\":{},\"owner_name\":{}}}", json(kind), json(name))
        })
        .collect();
    if !owners.is_empty() {
        let _ = write!(out, ",\"pod_owners\":[{}]", owners.join(","));
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

/// Sums over the containers that ask: the others have none, whatever upstream makes of them.
fn gpus(pod: &Pod) -> Option<Gpus> {
    let sum = |of: fn(&Container) -> &BTreeMap<String, Quantity>| {
        pod.spec.containers.iter().filter_map(|container| of(container).get(GPU)?.value()).reduce(|a, b| a + b)
    };
    let limit = sum(|container| &container.resources.limits).filter(|limit| *limit > 0.0)?;
    Some(Gpus { request: sum(|container| &container.resources.requests).unwrap_or(limit), limit })
}

/// Name of what made a pod, whatever its kind; the pod's own where nothing did.
pub fn workload(pod: &Pod) -> String {
    let found = first_owner(pod).map_or(pod.metadata.name.as_str(), |(_, name)| name);
    found.to_owned()
}

/// The dimension `PodName`, by upstream's rules. A pod of a StatefulSet is an individual, and so is one of whatever is no workload of
/// Kubernetes' own: a static pod's mirror is owned by its Node, an operator's pod by a resource of the operator's.
fn pod_name(pod: &Pod) -> String {
    let name = &pod.metadata.name;
    let found = owners(pod).find_map(|(kind, owner)| match kind {
        "StatefulSet" => Some(name.as_str()),
        "Job" => Some(job_prefix(owner)),
        "Deployment" | "ReplicaSet" | "CronJob" | "DaemonSet" | "ReplicationController" => Some(owner),
        _ => None,
    });
    found.unwrap_or(if name.starts_with("kube-proxy") { "kube-proxy" } else { name }).to_owned()
}

/// Kind and name of the workload that made a pod, if it is one of Kubernetes' own.
fn owner(pod: &Pod) -> Option<(&'static str, String)> {
    let (kind, name) = first_owner(pod)?;
    Some((WORKLOADS.into_iter().find(|known| *known == kind)?, name.to_owned()))
}

/// The owner that manages the pod, or else the first.
fn first_owner(pod: &Pod) -> Option<(&str, &str)> {
    let manages = pod.metadata.owner_references.iter().position(|owner| owner.controller == Some(true)).unwrap_or(0);
    owner_of(pod.metadata.owner_references.get(manages)?)
}

fn owners(pod: &Pod) -> impl Iterator<Item = (&str, &str)> {
    pod.metadata.owner_references.iter().filter_map(owner_of)
}

/// Kind and name, of what stands behind a ReplicaSet or a Job where its name tells.
fn owner_of(owner: &OwnerReference) -> Option<(&str, &str)> {
    let (kind, name) = (owner.kind.as_str(), owner.name.as_str());
    if kind.is_empty() || name.is_empty() {
        return None;
    }
    Some(match kind {
        "ReplicaSet" => deployment_of(name).map_or((kind, name), |deployment| ("Deployment", deployment)),
        "Job" => cron_job_of(name).map_or((kind, name), |cron_job| ("CronJob", cron_job)),
        _ => (kind, name),
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
    let amount = |of: &BTreeMap<String, Quantity>, what: &str| of.get(what).and_then(Quantity::value);
    NodeStatus {
        ready: is("Ready"),
        disk_pressure: is("DiskPressure"),
        memory_pressure: is("MemoryPressure"),
        pid_pressure: is("PIDPressure"),
        network_unavailable: is("NetworkUnavailable"),
        unknown: node.status.conditions.iter().any(|c| c.status == "Unknown"),
        capacity_pods: amount(&node.status.capacity, "pods"),
        allocatable_pods: amount(&node.status.allocatable, "pods"),
        capacity_gpus: amount(&node.status.capacity, GPU).filter(|gpus| *gpus > 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::insights_tests::cluster;
    use super::*;

    fn owned_by(name: &str, owners: &[(&str, &str)]) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = name.into();
        let controller = Some(true);
        let reference = |(kind, name): &(&str, &str)| OwnerReference { kind: (*kind).into(), name: (*name).into(), controller };
        pod.metadata.owner_references = owners.iter().map(reference).collect();
        pod
    }

    fn object(meta: &PodMeta) -> serde_json::Value {
        serde_json::from_str(&format!("{}}}", meta.kubernetes)).unwrap()
    }

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
        let object = object(web);
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
        let named = |kind: &str, name: &str| owner(&owned_by("p-0", &[(kind, name)]));
        assert_eq!(named("ReplicaSet", "web-6b9c4cb4dc"), Some(("Deployment", "web".into())));
        assert_eq!(named("ReplicaSet", "web-aeiou"), Some(("ReplicaSet", "web-aeiou".into())), "no vowels in a suffix");
        assert_eq!(named("ReplicaSet", "web-bc"), Some(("ReplicaSet", "web-bc".into())));
        assert_eq!(named("Job", "backup-28012345"), Some(("CronJob", "backup".into())));
        assert_eq!(named("Job", "backup-123"), Some(("Job", "backup-123".into())));
        assert_eq!(named("StatefulSet", "db"), Some(("StatefulSet", "db".into())));
        assert_eq!(named("Node", "node1"), None);
    }

    /// As upstream's `addPodOwnersAndPodName`, and the workload of a log stream's entity as Fluent Bit's kubernetes filter has it.
    #[test]
    fn every_owner_is_told_and_some_name_the_pod() {
        type Owners<'a> = &'a [(&'a str, &'a str)];
        let told: [(&str, Owners<'_>, &str, Owners<'_>, &str); 9] = [
            ("db-0", &[("StatefulSet", "db")], "db-0", &[("StatefulSet", "db")], "db"),
            ("etcd-node1", &[("Node", "node1")], "etcd-node1", &[("Node", "node1")], "node1"),
            ("train-1-x", &[("Workflow", "train-1")], "train-1-x", &[("Workflow", "train-1")], "train-1"),
            ("ds-x", &[("Elasticsearch", "es"), ("DaemonSet", "ds")], "ds", &[("Elasticsearch", "es"), ("DaemonSet", "ds")], "es"),
            (
                "web-6b9c4cb4dc-x",
                &[("ReplicaSet", "web-6b9c4cb4dc"), ("Job", "etl-1")],
                "web",
                &[("Deployment", "web"), ("Job", "etl")],
                "web",
            ),
            ("half", &[("", "x"), ("Node", "")], "half", &[], "half"),
            ("rc-x", &[("ReplicationController", "rc")], "rc", &[("ReplicationController", "rc")], "rc"),
            ("kube-proxy-x", &[], "kube-proxy", &[], "kube-proxy-x"),
            ("cli", &[], "cli", &[], "cli"),
        ];
        for (name, owners, pod_name, told, entity) in told {
            let pod = owned_by(name, owners);
            let meta = pod_meta(&pod, "node1", &[], &VethNames::default());
            assert_eq!(meta.workload, pod_name);
            let told: Vec<_> = told.iter().map(|(kind, name)| serde_json::json!({"owner_kind": kind, "owner_name": name})).collect();
            let object = object(&meta);
            assert_eq!(object.get("pod_owners").cloned(), (!told.is_empty()).then(|| told.into()), "{name}");
            assert_eq!(object.get("labels"), None, "{name}: it has none");
            assert_eq!(workload(&pod), entity);
        }
    }

    #[test]
    fn sidecars_are_no_containers_of_the_pod() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "containers": [{"name": "app", "resources": {"limits": {"cpu": "1", "memory": "64Mi"}}}],
                "initContainers": [{"name": "proxy", "restartPolicy": "Always", "resources": {"requests": {"cpu": "2"}}}, {"name": "once"}],
            },
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "Unknown"}, {"type": "PodScheduled", "status": "True"}]},
        }))
        .unwrap();
        let meta = pod_meta(&pod, "node1", &[], &VethNames::default());
        let asked = Amounts { cpu: Some(1000.0), memory: Some(67_108_864.0) };
        assert_eq!((meta.requests, meta.limits), (asked, asked));
        assert_eq!(meta.containers.iter().map(|c| (c.name.as_str(), c.sidecar)).collect::<Vec<_>>(), [("app", false), ("proxy", true)]);
        assert!(meta.unknown && meta.scheduled && !meta.ready);
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
            let pod = owned_by(&format!("{job}-abcde"), &[("Job", job)]);
            let meta = pod_meta(&pod, "node1", &[], &VethNames::default());
            assert_eq!(meta.workload, pod_name);
            let object = object(&meta);
            assert_eq!((&object["pod_owners"][0]["owner_kind"], &object["pod_owners"][0]["owner_name"]), (&kind.into(), &pod_name.into()));
            // Elsewhere a Job has its whole name.
            assert_eq!(workload(&pod), if kind == "Job" { job } else { pod_name });
        }
    }
}
