//! Slim forms of the policy objects beyond NetworkPolicy: ClusterNetworkPolicy of both API groups, and the resolved
//! objects that AWS's controller writes (PolicyEndpoint, ClusterPolicyEndpoint).
//!
//! Fields whose wrong values the agent must survive (a tier that it does not know, a CIDR that is none) are text here;
//! `resolve` judges them and says which object, which field and what to write instead.

use serde::{Deserialize, Deserializer, Serialize};

use crate::objects::{IntOrString, LabelSelector, Meta, Protocol};

/// API group of AWS's own kinds.
pub const AWS_GROUP: &str = "networking.k8s.aws";

/// Reads `null` as the type's default.
fn null_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A ClusterNetworkPolicy: `policy.networking.k8s.io/v1beta1` or `v1alpha2`, which are the same in all fields, or AWS's kind of
/// the same name in `networking.k8s.aws/v1alpha1`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterNetworkPolicy {
    /// Group and version; decides whether rules are taken in order (Kubernetes) or by action (AWS).
    pub api_version: String,
    /// Identity.
    pub metadata: Meta,
    /// What it says.
    pub spec: ClusterNetworkPolicySpec,
}

impl ClusterNetworkPolicy {
    /// Whether it is AWS's kind.
    pub fn is_aws(&self) -> bool {
        self.api_version.starts_with(AWS_GROUP)
    }

    /// A name that is unique over both groups: AWS's carry their group.
    pub fn key(&self) -> String {
        if self.is_aws() { format!("{AWS_GROUP}/{}", self.metadata.name) } else { self.metadata.name.clone() }
    }
}

/// What a ClusterNetworkPolicy says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterNetworkPolicySpec {
    /// `Admin` or `Baseline`.
    pub tier: String,
    /// 0 to 1000, lower first within the tier.
    pub priority: i32,
    /// Whom it speaks for.
    pub subject: ClusterSubject,
    /// Rules for what comes in.
    #[serde(deserialize_with = "null_default")]
    pub ingress: Vec<ClusterRule>,
    /// Rules for what goes out.
    #[serde(deserialize_with = "null_default")]
    pub egress: Vec<ClusterRule>,
}

/// Pods by one of two selectors; exactly one is to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterSubject {
    /// All pods of the namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Pods by both selectors.
    pub pods: Option<NamespacedPods>,
}

/// Pods of namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NamespacedPods {
    /// Which namespaces; empty: all.
    #[serde(deserialize_with = "null_default")]
    pub namespace_selector: LabelSelector,
    /// Which pods in them; empty: all.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector: LabelSelector,
}

/// A rule: any peer AND any protocol or port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterRule {
    /// For people.
    pub name: String,
    /// `Accept`, `Deny` or `Pass`.
    pub action: String,
    /// Peers of an ingress rule.
    #[serde(deserialize_with = "null_default")]
    pub from: Vec<ClusterPeer>,
    /// Peers of an egress rule.
    #[serde(deserialize_with = "null_default")]
    pub to: Vec<ClusterPeer>,
    /// Protocols and ports, Kubernetes' form; empty: all.
    #[serde(deserialize_with = "null_default")]
    pub protocols: Vec<ClusterProtocol>,
    /// Protocols and ports, AWS's form; empty: all.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<AwsPort>,
}

/// A peer; exactly one field is to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterPeer {
    /// All pods of the namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Pods by both selectors.
    pub pods: Option<NamespacedPods>,
    /// Nodes, their addresses (egress).
    pub nodes: Option<LabelSelector>,
    /// CIDRs, pods' addresses included (egress).
    pub networks: Option<Vec<String>>,
    /// DNS names, `*.` in front for any labels before (egress).
    pub domain_names: Option<Vec<String>>,
}

/// A protocol with or without ports; exactly one field is to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterProtocol {
    /// TCP.
    #[serde(deserialize_with = "present")]
    pub tcp: Option<ProtocolPorts>,
    /// UDP.
    #[serde(deserialize_with = "present")]
    pub udp: Option<ProtocolPorts>,
    /// SCTP.
    #[serde(deserialize_with = "present")]
    pub sctp: Option<ProtocolPorts>,
    /// A container port's name, whatever its protocol.
    pub destination_named_port: Option<String>,
}

/// A key that is there says something even when its value is `null`.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

/// Ports of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProtocolPorts {
    /// Absent: all.
    pub destination_port: Option<DestinationPort>,
}

/// One port or a range.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationPort {
    /// One port.
    pub number: Option<u16>,
    /// From `start` to `end`, both included.
    pub range: Option<PortRange>,
}

/// A port range.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortRange {
    /// TCP when absent (AWS's form only).
    pub protocol: Protocol,
    /// First port.
    pub start: u16,
    /// Last port.
    pub end: u16,
}

/// A port of AWS's ClusterNetworkPolicy; exactly one field is to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AwsPort {
    /// One port.
    pub port_number: Option<AwsPortNumber>,
    /// A range.
    pub port_range: Option<PortRange>,
    /// A container port's name.
    pub named_port: Option<String>,
}

/// A port with its protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AwsPortNumber {
    /// TCP when absent.
    pub protocol: Protocol,
    /// The port; 0 or absent: all ports of the protocol.
    pub port: u16,
}

/// A part of a NetworkPolicy as AWS's controller resolved it (`networking.k8s.aws/v1alpha1`). A policy may be spread
/// over several of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyEndpoint {
    /// Identity; the namespace is the policy's.
    pub metadata: Meta,
    /// What it says.
    pub spec: PolicyEndpointSpec,
}

/// What a PolicyEndpoint says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyEndpointSpec {
    /// The NetworkPolicy.
    pub policy_ref: PolicyRef,
    /// Copied from the policy.
    pub pod_selector: Option<LabelSelector>,
    /// `Ingress`, `Egress`: which directions of the pods are isolated.
    #[serde(deserialize_with = "null_default")]
    pub pod_isolation: Vec<String>,
    /// Pods that the policy selects and that have an address.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector_endpoints: Vec<PodEndpoint>,
    /// Resolved ingress peers.
    #[serde(deserialize_with = "null_default")]
    pub ingress: Vec<EndpointRule>,
    /// Resolved egress peers.
    #[serde(deserialize_with = "null_default")]
    pub egress: Vec<EndpointRule>,
}

/// The policy that was resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyRef {
    /// Name.
    pub name: String,
    /// Namespace; empty for cluster-scoped policies.
    pub namespace: String,
}

/// A selected pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodEndpoint {
    /// The pod's name.
    pub name: String,
    /// The pod's namespace.
    pub namespace: String,
}

/// A resolved peer with its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointRule {
    /// An address or CIDR.
    pub cidr: String,
    /// A DNS name, instead of `cidr`.
    pub domain_name: String,
    /// Cut out of the CIDR.
    #[serde(deserialize_with = "null_default")]
    pub except: Vec<String>,
    /// Ports; empty: all.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<EndpointPort>,
    /// `Accept`, `Deny` or `Pass`; only in ClusterPolicyEndpoints.
    pub action: String,
}

/// A port of a resolved peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// TCP when absent.
    pub protocol: Option<Protocol>,
    /// Absent: all ports of the protocol.
    pub port: Option<IntOrString>,
    /// The end of a range.
    pub end_port: Option<u16>,
}

/// A part of a ClusterNetworkPolicy as AWS's controller resolved it (`networking.k8s.aws/v1alpha1`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterPolicyEndpoint {
    /// Identity.
    pub metadata: Meta,
    /// What it says.
    pub spec: ClusterPolicyEndpointSpec,
}

/// What a ClusterPolicyEndpoint says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterPolicyEndpointSpec {
    /// The ClusterNetworkPolicy.
    pub policy_ref: PolicyRef,
    /// `Admin` or `Baseline`.
    pub tier: String,
    /// 0 to 1000.
    pub priority: i32,
    /// Copied from the policy.
    pub subject: Option<ClusterSubject>,
    /// Pods that the policy selects and that have an address.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector_endpoints: Vec<PodEndpoint>,
    /// Resolved ingress peers.
    #[serde(deserialize_with = "null_default")]
    pub ingress: Vec<EndpointRule>,
    /// Resolved egress peers.
    #[serde(deserialize_with = "null_default")]
    pub egress: Vec<EndpointRule>,
}
