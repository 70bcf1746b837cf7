//! What policies ask of pods, nodes and namespaces, read from one snapshot of the cluster.

use std::net::IpAddr;

use crate::cluster::ClusterState;
use crate::objects::{Labels, Pod, Protocol};

use super::model::{PodMatch, Policy, Subject};

/// Annotation in which the VPC CNI publishes a pod's address before its status has it (`ANNOTATE_POD_IP`).
pub const POD_IPS_ANNOTATION: &str = "vpc.amazonaws.com/pod-ips";

static NO_LABELS: Labels = Labels::new();

/// Whether the pod has a network of its own that policies can speak of: neither in the node's network nor finished.
/// A terminating pod still counts.
pub fn is_networked(pod: &Pod) -> bool {
    !pod.spec.host_network && !pod.is_completed()
}

/// A pod's addresses, from its status: what the kubelet says, and nobody else may write.
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    pod.addresses().collect()
}

/// The addresses, one a family, that the annotation of a pod says while its status has none. Whoever may write pods may write it, so it
/// counts for no more than an address that nobody else has.
pub fn early_addresses(pod: &Pod) -> Vec<IpAddr> {
    let is_possible = |address: &IpAddr| {
        let is_local = match address {
            IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        !(is_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
    };
    if pod.spec.node_name.is_empty() || pod.addresses().next().is_some() {
        return Vec::new();
    }
    let text = pod.metadata.annotations.get(POD_IPS_ANNOTATION).map(String::as_str).unwrap_or_default();
    let mut all: Vec<IpAddr> = text.split(',').filter_map(|part| part.trim().parse().ok()).filter(is_possible).collect();
    all.sort_by_key(IpAddr::is_ipv6);
    all.dedup_by_key(|address| address.is_ipv6());
    all
}

/// A pod's named ports, sidecars included.
pub fn named_ports(pod: &Pod) -> impl Iterator<Item = (&str, Protocol, u16)> {
    let sidecars = pod.spec.init_containers.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = pod.spec.containers.iter().chain(sidecars).flat_map(|container| &container.ports);
    ports.filter(|port| !port.name.is_empty()).map(|port| (port.name.as_str(), port.protocol, port.container_port))
}

/// A namespace's labels; none if it is not known.
pub fn namespace_labels<'a>(cluster: &'a ClusterState, namespace: &str) -> &'a Labels {
    cluster.namespaces.get(namespace).map_or(&NO_LABELS, |object| &object.metadata.labels)
}

/// Whether a pod is meant. The pod must be networked.
pub fn matches(cluster: &ClusterState, wanted: &PodMatch, pod: &Pod) -> bool {
    let namespace = &pod.metadata.namespace;
    wanted.namespaces.matches(namespace, namespace_labels(cluster, namespace)) && wanted.pods.matches(&pod.metadata.labels)
}

/// Whether a policy speaks for a pod. The pod must be networked.
pub fn selects(cluster: &ClusterState, policy: &Policy, pod: &Pod) -> bool {
    match &policy.subject {
        Subject::Pods(wanted) => matches(cluster, wanted, pod),
        Subject::Listed(names, selectors) => {
            names.binary_search(&pod.full_name()).is_ok() || selectors.iter().any(|wanted| matches(cluster, wanted, pod))
        }
    }
}

/// Which of two pods that claim one address has it: a pod that is not on its way out, then the younger, then by name.
pub fn claims_before(left: &Pod, right: &Pod) -> bool {
    fn rank(pod: &Pod) -> (bool, Option<&String>, &str, &str) {
        (!pod.is_terminating(), pod.metadata.creation_timestamp.as_ref(), &pod.metadata.namespace, &pod.metadata.name)
    }
    rank(left) > rank(right)
}
