//! Slim forms of the Kubernetes objects that the agent reads: only the fields that are used, from JSON or YAML.
//!
//! Unknown fields are ignored, as the API server may be newer than the agent; absent lists are empty. A `Labels` map is
//! ordered so that everything derived from it is deterministic.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::PodName;
use crate::policy::objects::AWS_GROUP;

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// Reads `null` as the type's default: kubectl and Go write both absent and null for an empty list.
pub(crate) fn null_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// What every object carries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", from = "WireMeta")]
pub struct Meta {
    /// Name, unique in its namespace and kind.
    pub name: String,
    /// Empty for cluster-scoped objects; manifests may leave it out, meaning `default`.
    pub namespace: String,
    /// Unique over time; empty in hand-written manifests.
    pub uid: String,
    /// Opaque version; empty in hand-written manifests.
    pub resource_version: String,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// RFC 3339; present while the object is being deleted (a terminating pod).
    pub deletion_timestamp: Option<String>,
    /// RFC 3339.
    pub creation_timestamp: Option<String>,
    /// Owners, for names of workloads.
    pub owner_references: Vec<OwnerReference>,
    /// Which maps the object did not have at all, rather than empty: log records leave them out too.
    #[serde(skip)]
    pub absent: Absent,
}

/// Maps that an object does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Absent {
    /// No labels.
    pub labels: bool,
    /// No annotations.
    pub annotations: bool,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireMeta {
    name: String,
    namespace: String,
    uid: String,
    resource_version: String,
    labels: Option<Labels>,
    annotations: Option<Labels>,
    deletion_timestamp: Option<String>,
    creation_timestamp: Option<String>,
    #[serde(deserialize_with = "null_default")]
    owner_references: Vec<OwnerReference>,
}

impl From<WireMeta> for Meta {
    fn from(wire: WireMeta) -> Self {
        Self {
            absent: Absent { labels: wire.labels.is_none(), annotations: wire.annotations.is_none() },
            name: wire.name,
            namespace: wire.namespace,
            uid: wire.uid,
            resource_version: wire.resource_version,
            labels: wire.labels.unwrap_or_default(),
            annotations: wire.annotations.unwrap_or_default(),
            deletion_timestamp: wire.deletion_timestamp,
            creation_timestamp: wire.creation_timestamp,
            owner_references: wire.owner_references,
        }
    }
}

/// Who made an object: a ReplicaSet, a Job, a DaemonSet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnerReference {
    /// `ReplicaSet`, `Job` ...
    pub kind: String,
    /// Its name.
    pub name: String,
    /// True for the one that manages the object.
    pub controller: Option<bool>,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Identity.
    pub metadata: Meta,
    /// What was asked.
    pub spec: PodSpec,
    /// What is.
    pub status: PodStatus,
}

/// What was asked of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The node it is bound to; empty while unscheduled.
    pub node_name: String,
    /// Shares the node's network: never an endpoint of ours.
    pub host_network: bool,
    /// Containers, without init containers.
    #[serde(deserialize_with = "null_default")]
    pub containers: Vec<Container>,
    /// Init containers (sidecars among them).
    #[serde(deserialize_with = "null_default")]
    pub init_containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// Name in the pod.
    pub name: String,
    /// Image as written.
    pub image: String,
    /// Declared ports, the source of named ports.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<ContainerPort>,
    /// Requests and limits.
    #[serde(deserialize_with = "null_default")]
    pub resources: Resources,
    /// `Always` on an init container marks a sidecar.
    pub restart_policy: Option<String>,
}

/// A declared port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Empty if unnamed.
    pub name: String,
    /// The number.
    pub container_port: u16,
    /// TCP when absent.
    pub protocol: Protocol,
    /// The port on the node, 0 for none.
    pub host_port: u16,
}

/// Requests and limits in Kubernetes quantities (`100m`, `128Mi`); [`quantity`] reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Upper bounds.
    #[serde(deserialize_with = "null_default")]
    pub limits: BTreeMap<String, Quantity>,
    /// What the scheduler counts.
    #[serde(deserialize_with = "null_default")]
    pub requests: BTreeMap<String, Quantity>,
}

/// A transport protocol of the NetworkPolicy and Service APIs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// IP protocol 6; the API's default.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// IP protocol 17.
    #[serde(rename = "UDP")]
    Udp,
    /// IP protocol 132.
    #[serde(rename = "SCTP")]
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// What a pod is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`; empty in hand-written manifests.
    pub phase: String,
    /// The first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<IpAddr>,
    /// All addresses, one a family.
    #[serde(rename = "podIPs", deserialize_with = "null_default")]
    pub pod_ips: Vec<PodIp>,
    /// The node's address.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<IpAddr>,
    /// RFC 3339.
    pub start_time: Option<String>,
    /// State of each container.
    #[serde(deserialize_with = "null_default")]
    pub container_statuses: Vec<ContainerStatus>,
    /// State of each init container.
    #[serde(deserialize_with = "null_default")]
    pub init_container_statuses: Vec<ContainerStatus>,
    /// `Ready`, `PodScheduled` ...
    #[serde(deserialize_with = "null_default")]
    pub conditions: Vec<Condition>,
    /// `Guaranteed`, `Burstable`, `BestEffort`.
    pub qos_class: String,
    /// Why a pod failed (`Evicted` ...).
    pub reason: String,
}

/// One of a pod's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIp {
    /// The address.
    pub ip: IpAddr,
}

/// A condition of a pod or node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// `Ready` ...
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False`, `Unknown`.
    pub status: String,
}

/// The state of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerStatus {
    /// Name in the pod.
    pub name: String,
    /// `containerd://<64 hex>`; empty before it exists.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Image as resolved by the runtime.
    pub image: String,
    /// Image with digest.
    #[serde(rename = "imageID")]
    pub image_id: String,
    /// How often it was restarted.
    pub restart_count: u32,
    /// Passed its readiness probe.
    pub ready: bool,
    /// `waiting`, `running` or `terminated`, each with details.
    #[serde(deserialize_with = "null_default")]
    pub state: BTreeMap<String, serde_json::Value>,
    /// The state before the last restart.
    #[serde(deserialize_with = "null_default")]
    pub last_state: BTreeMap<String, serde_json::Value>,
}

/// The annotation of static pods with the uid that the kubelet knows them by; the API server gave their mirror another.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";

impl Pod {
    /// Namespace and name.
    pub fn full_name(&self) -> PodName {
        PodName::new(self.metadata.namespace.clone(), self.metadata.name.clone())
    }

    /// All addresses, the primary first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let listed = self.status.pod_ips.iter().map(|entry| entry.ip);
        let primary = self.status.pod_ip.filter(|ip| !self.status.pod_ips.iter().any(|entry| entry.ip == *ip));
        primary.into_iter().chain(listed)
    }

    /// Its containers ended for good: its address may belong to another pod already.
    pub fn is_completed(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Whether it can be the pod that the kubelet and the runtime know by a uid: a pod of the same name may be a later one. An
    /// empty uid is not known.
    pub fn is_known_as(&self, uid: &str) -> bool {
        let Meta { uid: own, annotations, .. } = &self.metadata;
        uid.is_empty() || own.is_empty() || own == uid || annotations.get(CONFIG_HASH).is_some_and(|hash| hash == uid)
    }

    /// Is being deleted; still counts as target and peer.
    pub fn is_terminating(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Identity and labels; the API server adds `kubernetes.io/metadata.name`.
    pub metadata: Meta,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Identity, labels, annotations.
    pub metadata: Meta,
    /// Taints and provider id.
    pub spec: NodeSpec,
    /// Addresses and capacity.
    pub status: NodeStatus,
}

/// What was asked of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSpec {
    /// Cordoned.
    pub unschedulable: bool,
    /// Taints.
    #[serde(deserialize_with = "null_default")]
    pub taints: Vec<Taint>,
    /// `aws:///eu-west-1a/i-0123…`.
    #[serde(rename = "providerID")]
    pub provider_id: String,
}

/// A taint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
    /// `NoSchedule`, `PreferNoSchedule`, `NoExecute`.
    pub effect: String,
}

/// What a node is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// Addresses by type.
    #[serde(deserialize_with = "null_default")]
    pub addresses: Vec<NodeAddress>,
    /// Sum of resources.
    #[serde(deserialize_with = "null_default")]
    pub capacity: BTreeMap<String, Quantity>,
    /// What pods may use of it.
    #[serde(deserialize_with = "null_default")]
    pub allocatable: BTreeMap<String, Quantity>,
    /// `Ready`, `MemoryPressure` ...
    #[serde(deserialize_with = "null_default")]
    pub conditions: Vec<Condition>,
    /// Versions.
    #[serde(deserialize_with = "null_default")]
    pub node_info: NodeInfo,
}

/// Versions on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeInfo {
    /// `containerd://2.3.4`.
    pub container_runtime_version: String,
}

/// One of a node's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `Hostname`, `ExternalIP`, `InternalDNS` ...
    #[serde(rename = "type")]
    pub kind: String,
    /// The address or name.
    pub address: String,
}

impl Node {
    /// Addresses that are IP addresses (`InternalIP`, `ExternalIP`).
    pub fn ip_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.status.addresses.iter().filter_map(|entry| entry.address.parse().ok())
    }
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Identity.
    pub metadata: Meta,
    /// What was asked.
    pub spec: ServiceSpec,
    /// What there is.
    #[serde(deserialize_with = "null_default")]
    pub status: ServiceStatus,
}

/// What there is of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Its load balancer.
    #[serde(deserialize_with = "null_default")]
    pub load_balancer: LoadBalancer,
}

/// Where a load balancer takes connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    /// Its entrances.
    #[serde(deserialize_with = "null_default")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// An entrance of a load balancer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerIngress {
    /// Empty if it has a name only.
    pub ip: String,
    /// `Proxy`: the load balancer gets the packets even from inside the cluster. Else kube-proxy translates them.
    pub ip_mode: Option<String>,
}

/// What was asked of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `None` for headless, an address, or empty.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// One a family.
    #[serde(rename = "clusterIPs", deserialize_with = "null_default")]
    pub cluster_ips: Vec<String>,
    /// External addresses that kube-proxy also translates.
    #[serde(rename = "externalIPs", deserialize_with = "null_default")]
    pub external_ips: Vec<String>,
    /// Ports.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<ServicePort>,
    /// Which pods back it; empty means hand-made endpoints.
    #[serde(deserialize_with = "null_default")]
    pub selector: Labels,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalName`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whom connections to the cluster's addresses may reach; absent: `Cluster`.
    pub internal_traffic_policy: Option<TrafficPolicy>,
    /// Whom connections to external addresses may reach; absent: `Cluster`.
    pub external_traffic_policy: Option<TrafficPolicy>,
}

/// Which of a service's backends may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Those on the node where the connection begins or comes in.
    Local,
    /// All.
    #[serde(other)]
    Cluster,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Name, joins with the EndpointSlice's port name.
    pub name: String,
    /// TCP when absent.
    pub protocol: Protocol,
    /// The service's port.
    pub port: u16,
    /// Number or name on the backend; the service port when absent.
    pub target_port: Option<IntOrString>,
    /// The port on nodes, 0 for none.
    pub node_port: u16,
}

/// The backends of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// Identity; label `kubernetes.io/service-name` names the service.
    pub metadata: Meta,
    /// `IPv4`, `IPv6`, `FQDN`.
    pub address_type: String,
    /// Backends.
    #[serde(deserialize_with = "null_default")]
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports on every backend.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<SlicePort>,
}

/// A backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Addresses of one backend.
    #[serde(deserialize_with = "null_default")]
    pub addresses: Vec<String>,
    /// Whether it takes connections.
    #[serde(deserialize_with = "null_default")]
    pub conditions: EndpointConditions,
    /// The node it runs on.
    pub node_name: Option<Box<str>>,
    /// Who should prefer it.
    pub hints: Option<Box<EndpointHints>>,
}

/// For whom the control plane meant a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointHints {
    /// Clients in these zones.
    #[serde(deserialize_with = "null_default")]
    pub for_zones: Vec<Hint>,
    /// Clients on these nodes.
    #[serde(deserialize_with = "null_default")]
    pub for_nodes: Vec<Hint>,
}

/// A zone or a node in a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hint {
    /// Its name.
    pub name: String,
}

/// State of a backend; what is not said is as it is with a pod that runs well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Takes new connections.
    pub ready: Option<bool>,
    /// Would, were it not on its way out.
    pub serving: Option<bool>,
    /// On its way out.
    pub terminating: Option<bool>,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// Joins with the service port's name.
    pub name: Option<String>,
    /// TCP when absent.
    pub protocol: Protocol,
    /// Absent means all.
    pub port: Option<u16>,
}

/// A selector over labels; empty selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Every pair must be there.
    #[serde(deserialize_with = "null_default")]
    pub match_labels: Labels,
    /// Every expression must hold.
    #[serde(deserialize_with = "null_default")]
    pub match_expressions: Vec<SelectorExpression>,
}

/// One term of a selector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct SelectorExpression {
    /// Label key.
    pub key: String,
    /// The comparison.
    pub operator: SelectorOperator,
    /// Values, for `In` and `NotIn`.
    #[serde(deserialize_with = "null_default")]
    pub values: Vec<String>,
}

/// The comparison of a selector term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SelectorOperator {
    /// The key is there with one of the values.
    #[default]
    In,
    /// The key is missing or has none of the values.
    NotIn,
    /// The key is there.
    Exists,
    /// The key is missing.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether the labels satisfy every term.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|term| {
                let value = labels.get(&term.key);
                match term.operator {
                    SelectorOperator::In => value.is_some_and(|v| term.values.contains(v)),
                    SelectorOperator::NotIn => value.is_none_or(|v| !term.values.contains(v)),
                    SelectorOperator::Exists => value.is_some(),
                    SelectorOperator::DoesNotExist => value.is_none(),
                }
            })
    }
}

/// A NetworkPolicy (networking.k8s.io/v1).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicy {
    /// Group and version; tells AWS's kind.
    pub api_version: String,
    /// Identity; the namespace it speaks for.
    pub metadata: Meta,
    /// What it says.
    pub spec: NetworkPolicySpec,
}

impl NetworkPolicy {
    /// Whether it is AWS's kind.
    pub fn is_aws(&self) -> bool {
        self.api_version.starts_with(AWS_GROUP)
    }

    /// A name that is unique over both kinds in the namespace: AWS's carry their group.
    pub fn key(&self) -> PodName {
        let Meta { namespace, name, .. } = &self.metadata;
        let name = if self.is_aws() { format!("{AWS_GROUP}/{name}") } else { name.clone() };
        PodName::new(namespace.clone(), name)
    }
}

/// What a NetworkPolicy says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicySpec {
    /// Whom it isolates.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector: LabelSelector,
    /// `Ingress`, `Egress`; absent: Ingress, and Egress iff an egress rule exists.
    pub policy_types: Option<Vec<String>>,
    /// Who may come in.
    pub ingress: Option<Vec<IngressRule>>,
    /// Where they may go.
    pub egress: Option<Vec<EgressRule>>,
}

/// One ingress rule: any peer AND any port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IngressRule {
    /// Empty: anyone.
    #[serde(deserialize_with = "null_default")]
    pub from: Vec<PolicyPeer>,
    /// Empty: all ports and protocols.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<PolicyPort>,
}

/// One egress rule: any peer AND any port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EgressRule {
    /// Empty: anyone.
    #[serde(deserialize_with = "null_default")]
    pub to: Vec<PolicyPeer>,
    /// Empty: all ports and protocols.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<PolicyPort>,
}

/// A peer: pods by selectors, or addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyPeer {
    /// Pods, in the policy's namespace unless `namespace_selector` is there too.
    pub pod_selector: Option<LabelSelector>,
    /// Namespaces.
    pub namespace_selector: Option<LabelSelector>,
    /// Addresses; excludes the others.
    pub ip_block: Option<IpBlock>,
    /// DNS names, `*.` in front for any labels before; AWS's kind only, egress only; excludes the others.
    pub domain_names: Option<Vec<String>>,
}

/// Addresses of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IpBlock {
    /// The CIDR as written; host bits are masked.
    pub cidr: String,
    /// Cut out of it.
    #[serde(deserialize_with = "null_default")]
    pub except: Vec<String>,
}

/// A port of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyPort {
    /// TCP when absent.
    pub protocol: Option<Protocol>,
    /// Absent: all ports of the protocol.
    pub port: Option<IntOrString>,
    /// The end of a numeric range, inclusive.
    pub end_port: Option<u16>,
}

/// A number or a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// A port number.
    Int(u16),
    /// A port name (or digits in quotes, which the API treats as a name).
    Str(String),
}

/// A Kubernetes quantity as written (`100m`, `128Mi`, `2`); numbers are taken as text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Int(i64),
            Float(f64),
            Text(String),
        }
        Ok(Self(match Raw::deserialize(deserializer)? {
            Raw::Int(n) => n.to_string(),
            Raw::Float(n) => n.to_string(),
            Raw::Text(text) => text,
        }))
    }
}

impl Quantity {
    /// The value in base units (cores, bytes, pieces); `None` if it is no quantity.
    /// Suffixes: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.
    pub fn value(&self) -> Option<f64> {
        let text = self.0.trim();
        let split = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(split);
        let factor = match suffix {
            "n" => 1e-9,
            "u" => 1e-6,
            "m" => 1e-3,
            "" => 1.0,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "P" => 1e15,
            "E" => 1e18,
            "Ki" => 1024.0,
            "Mi" => 1024f64.powi(2),
            "Gi" => 1024f64.powi(3),
            "Ti" => 1024f64.powi(4),
            "Pi" => 1024f64.powi(5),
            "Ei" => 1024f64.powi(6),
            // "12e3" and "12E3": the exponent form.
            _ => return text.parse().ok(),
        };
        Some(digits.parse::<f64>().ok()? * factor)
    }
}

/// The ENIConfig custom resource (crd.k8s.amazonaws.com/v1alpha1), cluster-scoped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EniConfig {
    /// Identity: the name that node annotation or label gives.
    pub metadata: Meta,
    /// What it says.
    pub spec: EniConfigSpec,
}

/// Where and with which security groups pod ENIs are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EniConfigSpec {
    /// Required.
    pub subnet: String,
    /// Empty: those of the primary ENI.
    #[serde(deserialize_with = "null_default")]
    pub security_groups: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, want) in [("100m", 0.1), ("128Mi", 134_217_728.0), ("2", 2.0), ("1.5", 1.5), ("12e3", 12_000.0), ("1k", 1e3)] {
            assert!((Quantity(text.into()).value().unwrap() - want).abs() < 1e-9, "{text}");
        }
        let suffixes = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
        for (power, suffix) in (-3..).map(|power| power * 3).zip(suffixes) {
            assert_eq!(Quantity(format!("-2{suffix}")).value(), format!("-2e{power}").parse().ok(), "{suffix}");
        }
        for (power, suffix) in (1..).map(|power| power * 10).zip(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]) {
            assert_eq!(Quantity(format!("1.5{suffix}")).value(), Some(1.5 * 2f64.powi(power)), "{suffix}");
        }
        for text in ["12 apples", "", "m", "1KiB", "1.2.3", "--1"] {
            assert_eq!(Quantity(text.into()).value(), None, "{text}");
        }
        let read = |text: &str| serde_json::from_str::<Quantity>(text).unwrap().value();
        assert_eq!([read("3"), read("0.5"), read(r#""500m""#)], [Some(3.0), Some(0.5), Some(0.5)]);
    }

    #[test]
    fn not_in_holds_when_the_key_is_missing() {
        let selector = LabelSelector {
            match_expressions: vec![SelectorExpression { key: "ns".into(), operator: SelectorOperator::NotIn, values: vec!["x".into()] }],
            ..Default::default()
        };
        assert!(selector.matches(&Labels::new()));
        assert!(!selector.matches(&Labels::from([("ns".into(), "x".into())])));
    }
}
