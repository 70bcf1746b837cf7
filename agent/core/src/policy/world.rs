//! What policies ask of pods, nodes, namespaces and services, read from one snapshot of the cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::cluster::ClusterState;
use crate::ids::PodName;
use crate::objects::{EndpointConditions, IntOrString, Labels, Pod, Protocol, Service};

use super::model::{PodMatch, Policy, Subject};

/// Annotation in which the VPC CNI publishes a pod's addresses before its status has them.
pub const POD_IPS_ANNOTATION: &str = "vpc.amazonaws.com/pod-ips";
/// Label that names an EndpointSlice's service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

static NO_LABELS: Labels = Labels::new();

/// Whether the pod has a network of its own that policies can speak of: neither in the node's network nor finished.
/// A terminating pod still counts.
pub fn is_networked(pod: &Pod) -> bool {
    !pod.spec.host_network && !pod.is_completed()
}

/// A pod's addresses, from status and annotation.
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = pod.addresses().collect();
    if let Some(text) = pod.metadata.annotations.get(POD_IPS_ANNOTATION) {
        for address in text.split(',').filter_map(|part| part.trim().parse().ok()) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
    }
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
        Subject::Listed(names) => names.binary_search(&pod.full_name()).is_ok(),
    }
}

/// Which of two pods that claim one address has it: a pod that is not on its way out, then the younger, then by name.
pub fn claims_before(left: &Pod, right: &Pod) -> bool {
    fn rank(pod: &Pod) -> (bool, Option<&String>, &str, &str) {
        (!pod.is_terminating(), pod.metadata.creation_timestamp.as_ref(), &pod.metadata.namespace, &pod.metadata.name)
    }
    rank(left) > rank(right)
}

/// One port of a service address with what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePortBackends {
    /// The service.
    pub service: PodName,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
    /// Addresses and target ports, sorted; never empty.
    pub backends: Vec<(IpAddr, u16)>,
}

/// Every service address with its ports and the backends that kube-proxy chooses from: those that are ready, or, while none
/// is, those that still serve on their way out. Headless services have none; a port without backends is nothing that is
/// translated, so its packets are judged by the address as it is.
pub fn service_addresses(cluster: &ClusterState) -> BTreeMap<IpAddr, Vec<ServicePortBackends>> {
    let mut slices: BTreeMap<PodName, Vec<&crate::objects::EndpointSlice>> = BTreeMap::new();
    for (name, slice) in &cluster.endpoint_slices {
        if let Some(service) = slice.metadata.labels.get(SERVICE_NAME_LABEL) {
            slices.entry(PodName::new(name.namespace.clone(), service.clone())).or_default().push(slice);
        }
    }
    let mut all: BTreeMap<IpAddr, Vec<ServicePortBackends>> = BTreeMap::new();
    for (name, service) in &cluster.services {
        for address in virtual_addresses(service) {
            for port in &service.spec.ports {
                let mut backends = Vec::new();
                for slice in slices.get(name).into_iter().flatten() {
                    slice_backends(slice, &port.name, port.protocol, target(port), address.is_ipv4(), &mut backends);
                }
                let Some(best) = backends.iter().map(|(rank, _)| *rank).min() else { continue };
                let mut backends: Vec<(IpAddr, u16)> =
                    backends.into_iter().filter(|(rank, _)| *rank == best).map(|(_, backend)| backend).collect();
                backends.sort_unstable();
                backends.dedup();
                let entry = ServicePortBackends { service: name.clone(), protocol: port.protocol, port: port.port, backends };
                all.entry(address).or_default().push(entry);
            }
        }
    }
    all
}

/// The numeric target port, for slices that leave theirs out.
fn target(port: &crate::objects::ServicePort) -> u16 {
    match &port.target_port {
        Some(IntOrString::Int(number)) if *number != 0 => *number,
        _ => port.port,
    }
}

/// Addresses that kube-proxy translates to backends.
fn virtual_addresses(service: &Service) -> Vec<IpAddr> {
    let spec = &service.spec;
    let entrances = service.status.load_balancer.ingress.iter().filter(|entrance| entrance.ip_mode.as_deref() != Some("Proxy"));
    let texts = std::iter::once(&spec.cluster_ip).chain(&spec.cluster_ips).chain(&spec.external_ips);
    let texts = texts.chain(entrances.map(|entrance| &entrance.ip));
    let mut all: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Which backends are taken: of those that there are, the least.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Ready,
    LastResort,
}

fn rank(conditions: EndpointConditions) -> Option<Rank> {
    let EndpointConditions { ready, serving, terminating } = conditions;
    if ready != Some(false) {
        return Some(Rank::Ready);
    }
    (serving == Some(true) && terminating == Some(true)).then_some(Rank::LastResort)
}

fn slice_backends(
    slice: &crate::objects::EndpointSlice,
    port_name: &str,
    protocol: Protocol,
    fallback: u16,
    ipv4: bool,
    backends: &mut Vec<(Rank, (IpAddr, u16))>,
) {
    for port in &slice.ports {
        if port.name.as_deref().unwrap_or_default() != port_name || port.protocol != protocol {
            continue;
        }
        for endpoint in &slice.endpoints {
            let Some(rank) = rank(endpoint.conditions) else { continue };
            let addresses = endpoint.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
            let addresses = addresses.filter(|address| address.is_ipv4() == ipv4);
            backends.extend(addresses.map(|address| (rank, (address, port.port.unwrap_or(fallback)))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests;

    #[test]
    fn a_service_is_reached_at_what_kube_proxy_translates() {
        let text = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"type":"LoadBalancer","clusterIP":"172.20.0.9",
            "clusterIPs":["172.20.0.9","fd01::9"],"externalIPs":["198.51.100.1"],"ports":[{"port":80}]},
            "status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.2"},{"ip":"198.51.100.3","ipMode":"VIP"},{"ip":"198.51.100.4","ipMode":"Proxy"},
            {"hostname":"lb.example.com"}]}}}"#;
        let cluster = ClusterState::default().replaced_by(manifests::parse("test.json", text).unwrap());
        let service = cluster.services.values().next().unwrap();
        let addresses: Vec<String> = virtual_addresses(service).iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["172.20.0.9", "198.51.100.1", "198.51.100.2", "198.51.100.3", "fd01::9"]);
    }

    #[test]
    fn backends_are_those_that_connections_go_to() {
        let ready = r#"{"addresses":["10.0.0.1"],"conditions":{"ready":true,"serving":true,"terminating":false}}"#;
        let silent = r#"{"addresses":["10.0.0.2"]}"#;
        let starting = r#"{"addresses":["10.0.0.3"],"conditions":{"ready":false,"serving":false,"terminating":false}}"#;
        let leaving = r#"{"addresses":["10.0.0.4"],"conditions":{"ready":false,"serving":true,"terminating":true}}"#;
        let backends = |endpoints: &[&str]| {
            let text = format!(
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"s","namespace":"x"}},"spec":{{"clusterIP":"172.20.0.9","ports":[{{"port":80,"targetPort":8080}}]}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},"addressType":"IPv4","endpoints":[{}],"ports":[{{"port":8080}}]}}"#,
                endpoints.join(",")
            );
            let cluster = ClusterState::default().replaced_by(manifests::parse("test.json", &text).unwrap());
            let ports = service_addresses(&cluster).into_values().flatten();
            ports.flat_map(|port| port.backends).map(|(address, port)| format!("{address}:{port}")).collect::<Vec<_>>()
        };
        assert_eq!(backends(&[ready, silent, starting, leaving]), ["10.0.0.1:8080", "10.0.0.2:8080"]);
        assert_eq!(backends(&[starting, leaving]), ["10.0.0.4:8080"], "rather a pod on its way out than none");
        assert!(backends(&[starting]).is_empty());
    }
}
