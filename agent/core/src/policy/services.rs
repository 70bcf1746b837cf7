//! What is behind a service's address for clients on one node, as the kube-proxy there chooses it.
//!
//! The choice depends on kube-proxy's release and mode, which the agent is not told. What any of them may choose counts, from
//! 1.31 on: so a port is never more open than the choice.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

use crate::cluster::ClusterState;
use crate::ids::PodName;
use crate::objects::{EndpointConditions, EndpointSlice, Hint, IntOrString, Meta, Protocol, Service, TrafficPolicy};

/// Label that names an EndpointSlice's service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Labels of services and slices that kube-proxy passes over: another proxy's, and those of headless services.
const PASSED_OVER: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
/// Label of a node with its zone, which hints speak of.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// One port of a service address with what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePortBackends {
    /// The service; of several with one address and port the first by name.
    pub service: PodName,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
    /// The address is none that the cluster gave to the service: who may write services chose it.
    pub is_external: bool,
    /// Addresses and target ports, sorted; never empty.
    pub backends: Vec<(IpAddr, u16)>,
}

/// Service addresses with their ports.
pub type Services = BTreeMap<IpAddr, Vec<ServicePortBackends>>;

/// Every service address with its ports and the backends that a client on `node` may be sent to; of a client that is on no
/// known node, those of any. While none takes connections, those that are listed count: open connections go on. What
/// kube-proxy passes over has none; a port without backends is nothing that is translated, so its packets are judged by the address as it is.
pub fn service_addresses(cluster: &ClusterState, node: Option<&str>) -> Services {
    let place = node.map(|node| {
        let zone = cluster.nodes.get(node).and_then(|node| node.metadata.labels.get(ZONE_LABEL));
        Place { node, zone: zone.map(String::as_str).filter(|zone| !zone.is_empty()) }
    });
    let mut slices: BTreeMap<PodName, Vec<&EndpointSlice>> = BTreeMap::new();
    for (name, slice) in cluster.endpoint_slices.iter().filter(|(_, slice)| !is_passed_over(&slice.metadata)) {
        if let Some(service) = slice.metadata.labels.get(SERVICE_NAME_LABEL) {
            slices.entry(PodName::new(name.namespace.clone(), service.clone())).or_default().push(slice);
        }
    }
    let mut all: BTreeMap<IpAddr, BTreeMap<(Protocol, u16), ServicePortBackends>> = BTreeMap::new();
    for (name, service) in &cluster.services {
        let slices = slices.get(name).map(Vec::as_slice).unwrap_or_default();
        let addresses = virtual_addresses(service);
        let is_exposed = addresses.iter().any(|(_, side)| *side == Side::Outer);
        for (address, side) in addresses {
            for port in &service.spec.ports {
                let reach = Reach::of(service, side, is_exposed || port.node_port != 0);
                let backends = chosen(candidates(slices, port, address.is_ipv4()), place, reach);
                if backends.is_empty() {
                    continue;
                }
                let is_external = side == Side::Outer;
                let new = ServicePortBackends { service: name.clone(), protocol: port.protocol, port: port.port, is_external, backends };
                match all.entry(address).or_default().entry((port.protocol, port.port)) {
                    Entry::Vacant(vacant) => drop(vacant.insert(new)),
                    Entry::Occupied(mut there) => match (there.get().is_external, is_external) {
                        // An address of the cluster is its service's, whoever else writes it down.
                        (false, true) => {}
                        (true, false) => drop(there.insert(new)),
                        // Which of two services has the address is not said: what is behind either counts.
                        _ => {
                            let backends = &mut there.get_mut().backends;
                            backends.extend(new.backends);
                            backends.sort_unstable();
                            backends.dedup();
                        }
                    },
                }
            }
        }
    }
    all.into_iter().map(|(address, ports)| (address, ports.into_values().collect())).collect()
}

/// Where a client is.
#[derive(Clone, Copy)]
struct Place<'a> {
    node: &'a str,
    zone: Option<&'a str>,
}

/// Whom an address of a service is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    /// The cluster.
    Inner,
    /// Others, and pods too.
    Outer,
}

/// Which backends an address leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// All.
    Cluster,
    /// Those on the client's node.
    Local,
    /// Those on the client's node; while there is none, all, if kube-proxy uses IPVS.
    LocalElseCluster,
    /// All, as pods are clients from inside whatever the external policy is; or those on the client's node, if kube-proxy was
    /// not told which addresses are pods' (`clusterCIDR`), or uses IPVS.
    LocalAndCluster,
}

impl Reach {
    fn of(service: &Service, side: Side, is_exposed: bool) -> Self {
        let is_local = |policy| policy == Some(TrafficPolicy::Local);
        match side {
            Side::Inner if !is_local(service.spec.internal_traffic_policy) => Self::Cluster,
            Side::Inner if is_exposed => Self::LocalElseCluster,
            Side::Inner => Self::Local,
            Side::Outer if is_local(service.spec.external_traffic_policy) => Self::LocalAndCluster,
            Side::Outer => Self::Cluster,
        }
    }
}

fn is_passed_over(meta: &Meta) -> bool {
    PASSED_OVER.iter().any(|label| meta.labels.contains_key(*label))
}

/// Addresses that kube-proxy translates to backends: none of a service without an address in the cluster, whatever else it has.
fn virtual_addresses(service: &Service) -> Vec<(IpAddr, Side)> {
    let spec = &service.spec;
    if matches!(spec.cluster_ip.as_str(), "" | "None") || spec.kind == "ExternalName" || is_passed_over(&service.metadata) {
        return Vec::new();
    }
    let inner = std::iter::once(&spec.cluster_ip).chain(&spec.cluster_ips).map(|text| (text, Side::Inner));
    let entrances = service.status.load_balancer.ingress.iter().filter(|entrance| entrance.ip_mode.as_deref() != Some("Proxy"));
    let outer = spec.external_ips.iter().chain(entrances.map(|entrance| &entrance.ip)).map(|text| (text, Side::Outer));
    let mut all: Vec<(IpAddr, Side)> = inner.chain(outer).filter_map(|(text, side)| Some((text.parse().ok()?, side))).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What may be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate<'a> {
    backend: (IpAddr, u16),
    state: State,
    node: Option<&'a str>,
    zones: &'a [Hint],
    nodes: &'a [Hint],
}

/// Whether a backend takes connections: of those that there are, the least do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Ready,
    /// Still serves on its way out.
    LastResort,
    Unusable,
}

impl From<EndpointConditions> for State {
    fn from(EndpointConditions { ready, serving, terminating }: EndpointConditions) -> Self {
        match (ready != Some(false), serving != Some(false) && terminating == Some(true)) {
            (true, _) => Self::Ready,
            (false, true) => Self::LastResort,
            (false, false) => Self::Unusable,
        }
    }
}

fn candidates<'a>(slices: &[&'a EndpointSlice], port: &crate::objects::ServicePort, ipv4: bool) -> Vec<Candidate<'a>> {
    // For slices that leave the number out.
    let target = match &port.target_port {
        Some(IntOrString::Int(number)) if *number != 0 => *number,
        _ => port.port,
    };
    let mut all = Vec::new();
    for slice in slices {
        let ports = slice.ports.iter();
        for there in ports.filter(|there| there.name.as_deref().unwrap_or_default() == port.name && there.protocol == port.protocol) {
            for endpoint in &slice.endpoints {
                let addresses = endpoint.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
                all.extend(addresses.filter(|address| address.is_ipv4() == ipv4).map(|address| Candidate {
                    backend: (address, there.port.unwrap_or(target)),
                    state: endpoint.conditions.into(),
                    node: endpoint.node_name.as_deref(),
                    zones: endpoint.hints.as_ref().map(|hints| hints.for_zones.as_slice()).unwrap_or_default(),
                    nodes: endpoint.hints.as_ref().map(|hints| hints.for_nodes.as_slice()).unwrap_or_default(),
                }));
            }
        }
    }
    all
}

fn chosen(mut all: Vec<Candidate<'_>>, place: Option<Place<'_>>, reach: Reach) -> Vec<(IpAddr, u16)> {
    all.sort_by_key(|candidate| candidate.backend);
    // On its way from slice to slice, or where a pod has another's address anew, a backend is in twice: which of the two
    // kube-proxy takes is not known.
    let is_disputed = all.windows(2).any(|two| two[0].backend == two[1].backend && two[0] != two[1]);
    let (all, unusable): (Vec<_>, Vec<_>) = all.into_iter().partition(|candidate| candidate.state != State::Unusable);
    let mut taken: Vec<&Candidate<'_>> = match place {
        _ if is_disputed => all.iter().collect(),
        None if reach != Reach::Cluster => all.iter().collect(),
        _ => {
            let local = || best(all.iter().filter(|candidate| candidate.node == place.map(|place| place.node)));
            match reach {
                Reach::Cluster => near(&all, place),
                Reach::Local => local(),
                Reach::LocalElseCluster => Some(local()).filter(|local| !local.is_empty()).unwrap_or_else(|| near(&all, place)),
                Reach::LocalAndCluster => local().into_iter().chain(near(&all, place)).collect(),
            }
        }
    };
    // New connections are refused by kube-proxy; those that stand go on to where they went.
    if taken.is_empty() {
        let is_near = |candidate: &&Candidate<'_>| reach != Reach::Local || place.is_none_or(|place| candidate.node == Some(place.node));
        taken = unusable.iter().filter(is_near).collect();
    }
    let mut backends: Vec<(IpAddr, u16)> = taken.into_iter().map(|candidate| candidate.backend).collect();
    backends.sort_unstable();
    backends.dedup();
    backends
}

/// Those in the best state.
fn best<'c, 'a>(all: impl Iterator<Item = &'c Candidate<'a>> + Clone) -> Vec<&'c Candidate<'a>> {
    let state = all.clone().map(|candidate| candidate.state).min();
    all.filter(|candidate| Some(candidate.state) == state).collect()
}

/// Those that the hints of the ready ones give to a place, if each of these has hints and one has the place's; else all.
/// Hints for nodes are looked at first by kube-proxy from 1.34 on and not by earlier ones: both counts.
fn near<'c, 'a>(all: &'c [Candidate<'a>], place: Option<Place<'_>>) -> Vec<&'c Candidate<'a>> {
    let best = best(all.iter());
    let Some(place) = place.filter(|_| best.first().is_some_and(|candidate| candidate.state == State::Ready)) else { return best };
    let meant = |hints: fn(&Candidate<'a>) -> &'a [Hint], name: &str| {
        let meant = best.iter().filter(|candidate| hints(candidate).iter().any(|hint| hint.name == name));
        let meant: Vec<&Candidate<'a>> = meant.copied().collect();
        (!meant.is_empty() && best.iter().all(|candidate| !hints(candidate).is_empty())).then_some(meant)
    };
    let of_node = meant(|candidate| candidate.nodes, place.node).unwrap_or_default();
    let of_zone = place.zone.and_then(|zone| meant(|candidate| candidate.zones, zone));
    of_zone.unwrap_or_else(|| best.clone()).into_iter().chain(of_node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests;
    use crate::policy::proof::Rng;

    fn cluster(texts: &[&str]) -> ClusterState {
        ClusterState::default().replaced_by(manifests::parse("test.json", &texts.join("\n")).unwrap())
    }

    #[test]
    fn a_service_is_reached_at_what_kube_proxy_translates() {
        let text = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"type":"LoadBalancer","clusterIP":"172.20.0.9",
            "clusterIPs":["172.20.0.9","fd01::9"],"externalIPs":["198.51.100.1"],"ports":[{"port":80}]},
            "status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.2"},{"ip":"198.51.100.3","ipMode":"VIP"},{"ip":"198.51.100.4","ipMode":"Proxy"},
            {"hostname":"lb.example.com"}]}}}"#;
        let cluster = cluster(&[text]);
        let service = cluster.services.values().next().unwrap();
        let addresses: Vec<String> = virtual_addresses(service).iter().map(|(address, _)| address.to_string()).collect();
        assert_eq!(addresses, ["172.20.0.9", "198.51.100.1", "198.51.100.2", "198.51.100.3", "fd01::9"]);
    }

    #[test]
    fn what_kube_proxy_passes_over_is_reached_at_no_address() {
        let of = |labels: &str, slice: &str, spec: &str| {
            let all = format!(
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"s","namespace":"x","labels":{{{labels}}}}},"spec":{{{spec},"externalIPs":["198.51.100.1"],"ports":[{{"port":80}}]}},
                "status":{{"loadBalancer":{{"ingress":[{{"ip":"198.51.100.2"}}]}}}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"{slice}}}}},"endpoints":[{{"addresses":["10.0.0.1"]}}],"ports":[{{"port":80}}]}}"#
            );
            service_addresses(&cluster(&[&all]), Some("n1")).len()
        };
        let cluster_ip = r#""clusterIP":"172.20.0.9""#;
        assert_eq!(of("", "", cluster_ip), 3);
        assert_eq!(of("", "", r#""clusterIP":"None""#), 0, "headless");
        assert_eq!(of("", "", r#""clusterIP":"172.20.0.9","type":"ExternalName""#), 0);
        let (other, headless) = (r#""service.kubernetes.io/service-proxy-name":"other""#, r#""service.kubernetes.io/headless":"""#);
        for label in [other, headless] {
            assert_eq!(of(label, "", cluster_ip), 0, "{label}");
            assert_eq!(of("", &format!(",{label}"), cluster_ip), 0, "its slice: {label}");
        }
    }

    #[test]
    fn an_address_of_the_cluster_is_its_services_whoever_else_has_it() {
        let of = |name: &str, spec: &str, last: u8| {
            format!(
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"x"}},"spec":{{{spec},"ports":[{{"port":80}}]}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{name}-1","namespace":"x","labels":{{"kubernetes.io/service-name":"{name}"}}}},"endpoints":[{{"addresses":["10.0.0.{last}"]}}],"ports":[{{"port":80}}]}}"#
            )
        };
        for names in [["s", "t"], ["t", "s"]] {
            let own = of(names[0], r#""clusterIP":"172.20.0.9""#, 1);
            let other = of(names[1], r#""clusterIP":"172.20.0.8","externalIPs":["172.20.0.9"]"#, 2);
            let all = service_addresses(&cluster(&[&own, &other]), Some("n1"));
            let [port] = all[&IpAddr::from([172, 20, 0, 9])].as_slice() else { panic!("one port") };
            assert_eq!((port.backends.as_slice(), port.is_external), ([(IpAddr::from([10, 0, 0, 1]), 80)].as_slice(), false), "{names:?}");
        }
    }

    const NODES: &str = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1","labels":{"topology.kubernetes.io/zone":"a"}}}
{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2","labels":{"topology.kubernetes.io/zone":"b"}}}
{"apiVersion":"v1","kind":"Node","metadata":{"name":"n3"}}"#;

    /// The backends that clients on a node have behind each address of a service, by the last number of each.
    fn backends(spec: &str, node: Option<&str>, endpoints: &[&str]) -> BTreeMap<IpAddr, Vec<u8>> {
        let service = format!(
            r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"s","namespace":"x"}},"spec":{{"clusterIP":"172.20.0.9",{spec}"ports":[{{"port":80,"targetPort":8080}}]}}}}"#
        );
        let slice = format!(
            r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},"addressType":"IPv4","endpoints":[{}],"ports":[{{"port":8080}}]}}"#,
            endpoints.join(",")
        );
        let all = service_addresses(&cluster(&[NODES, &service, &slice]), node);
        let last = |address: IpAddr| if let IpAddr::V4(address) = address { address.octets()[3] } else { 0 };
        let of = |ports: Vec<ServicePortBackends>| {
            let [port] = ports.try_into().expect("one port");
            assert!(port.backends.iter().all(|(_, port)| *port == 8080));
            port.backends.into_iter().map(|(address, _)| last(address)).collect()
        };
        all.into_iter().map(|(address, ports)| (address, of(ports))).collect()
    }

    /// Behind the address in the cluster.
    fn inner(spec: &str, node: &str, endpoints: &[&str]) -> Vec<u8> {
        backends(spec, Some(node), endpoints).remove(&IpAddr::from([172, 20, 0, 9])).unwrap_or_default()
    }

    #[test]
    fn backends_are_those_that_connections_go_to() {
        let ready = r#"{"addresses":["10.0.0.1"],"conditions":{"ready":true,"serving":true,"terminating":false}}"#;
        let silent = r#"{"addresses":["10.0.0.2"]}"#;
        let starting = r#"{"addresses":["10.0.0.3"],"conditions":{"ready":false,"serving":false,"terminating":false}}"#;
        let leaving = r#"{"addresses":["10.0.0.4"],"conditions":{"ready":false,"serving":true,"terminating":true}}"#;
        let leaving_silently = r#"{"addresses":["10.0.0.5"],"conditions":{"ready":false,"terminating":true}}"#;
        assert_eq!(inner("", "n1", &[ready, silent, starting, leaving]), [1, 2]);
        assert_eq!(inner("", "n1", &[starting, leaving, leaving_silently]), [4, 5], "rather a pod on its way out than none");
        assert_eq!(inner("", "n1", &[starting]), [3], "what stands goes on, and kube-proxy refuses what is new");
    }

    #[test]
    fn hints_count_where_all_have_them_and_one_is_for_the_zone() {
        let a = r#"{"addresses":["10.0.0.1"],"nodeName":"n1","hints":{"forZones":[{"name":"a"}]}}"#;
        let b = r#"{"addresses":["10.0.0.2"],"nodeName":"n2","hints":{"forZones":[{"name":"b"}]}}"#;
        let c = r#"{"addresses":["10.0.0.3"],"nodeName":"n9","hints":{"forZones":[{"name":"c"},{"name":"a"}]}}"#;
        let none = r#"{"addresses":["10.0.0.4"],"nodeName":"n1"}"#;
        let starting = r#"{"addresses":["10.0.0.5"],"nodeName":"n1","conditions":{"ready":false}}"#;
        assert_eq!(inner("", "n1", &[a, b, c, starting]), [1, 3]);
        assert_eq!(inner("", "n2", &[a, b, c]), [2]);
        assert_eq!(inner("", "n3", &[a, b, c]), [1, 2, 3], "its zone is not known");
        assert_eq!(inner("", "n2", &[a, c]), [1, 3], "none is for the zone");
        assert_eq!(inner("", "n1", &[a, b, none]), [1, 2, 4], "one has no hint");
        let leaving = a.replace(r#""hints""#, r#""conditions":{"ready":false,"terminating":true},"hints""#);
        assert_eq!(inner("", "n2", &[&leaving]), [1], "none is ready: hints are not looked at");
        let twice = b.replace("10.0.0.2", "10.0.0.1");
        assert_eq!(inner("", "n1", &[a, b, &twice]), [1, 2], "which of two is meant is not known");
    }

    #[test]
    fn hints_for_nodes_add_what_a_newer_kube_proxy_chooses() {
        let of = |last: u8, zone: &str, node: &str| {
            format!(
                r#"{{"addresses":["10.0.0.{last}"],"nodeName":"{node}","hints":{{"forZones":[{{"name":"{zone}"}}],"forNodes":[{{"name":"{node}"}}]}}}}"#
            )
        };
        let (near, zone, far) = (of(1, "a", "n1"), of(2, "a", "n9"), of(3, "b", "n2"));
        assert_eq!(inner("", "n1", &[&near, &zone, &far]), [1, 2], "an earlier one looks at the zone only");
        let odd = of(1, "b", "n1");
        assert_eq!(inner("", "n1", &[&odd, &zone, &far]), [1, 2], "by node, and by zone");
    }

    #[test]
    fn a_local_policy_means_the_clients_node() {
        let here = r#"{"addresses":["10.0.0.1"],"nodeName":"n1"}"#;
        let there = r#"{"addresses":["10.0.0.2"],"nodeName":"n2"}"#;
        let leaving = r#"{"addresses":["10.0.0.3"],"nodeName":"n3","conditions":{"ready":false,"serving":true,"terminating":true}}"#;
        let local = r#""internalTrafficPolicy":"Local","#;
        assert_eq!(inner(local, "n1", &[here, there, leaving]), [1]);
        assert_eq!(inner(local, "n3", &[here, there, leaving]), [3], "rather one on its way out");
        assert!(inner(local, "n9", &[here, there]).is_empty());
        assert_eq!(inner(r#""internalTrafficPolicy":"Odd","#, "n1", &[here, there]), [1, 2]);
        let anywhere = backends(local, None, &[here, there, leaving]);
        assert_eq!(anywhere[&IpAddr::from([172, 20, 0, 9])], [1, 2, 3], "of a client anywhere");
        let outer = IpAddr::from([198, 51, 100, 1]);
        let exposed = |node, policy: &str| {
            let spec = format!(r#"{local}"externalIPs":["198.51.100.1"],"externalTrafficPolicy":"{policy}","#);
            backends(&spec, Some(node), &[here, there, leaving])
        };
        assert_eq!(exposed("n1", "Local")[&outer], [1, 2], "pods are clients from inside");
        assert_eq!(exposed("n3", "Local")[&outer], [1, 2, 3], "or not");
        assert_eq!(exposed("n3", "Cluster")[&outer], [1, 2]);
        assert_eq!(inner(&format!(r#"{local}"externalIPs":["198.51.100.1"],"#), "n9", &[here, there]), [1, 2], "IPVS");
    }

    #[test]
    fn an_address_of_two_services_leads_to_either() {
        let of = |name: &str, last: u8| {
            format!(
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"x"}},"spec":{{"clusterIP":"172.20.0.{last}","externalIPs":["198.51.100.1"],"ports":[{{"port":80}}]}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{name}-1","namespace":"x","labels":{{"kubernetes.io/service-name":"{name}"}}}},"endpoints":[{{"addresses":["10.0.0.{last}"]}}],"ports":[{{"port":80}}]}}"#
            )
        };
        let all = service_addresses(&cluster(&[&of("s", 1), &of("t", 2)]), Some("n1"));
        let ports = &all[&IpAddr::from([198, 51, 100, 1])];
        assert_eq!(ports.len(), 1);
        assert_eq!(ports[0].backends, [(IpAddr::from([10, 0, 0, 1]), 80), (IpAddr::from([10, 0, 0, 2]), 80)]);
    }

    /// A kube-proxy.
    #[derive(Clone, Copy, Debug)]
    struct Release {
        looks_at_nodes: bool,
        ipvs: bool,
        knows_pods: bool,
    }

    /// The choice of a kube-proxy by its own documentation, of backends in no more than one entry each.
    fn choice(release: Release, all: &[Candidate<'_>], node: &str, zone: Option<&str>, service: (bool, bool), side: Side) -> Vec<u8> {
        let (inner_local, outer_local) = service;
        let ready: Vec<_> = all.iter().filter(|c| c.state == State::Ready).collect();
        let leaving: Vec<_> = all.iter().filter(|c| c.state == State::LastResort).collect();
        let has = |hints: &[Hint], name: &str| hints.iter().any(|hint| hint.name == name);
        let mut cluster = ready.clone();
        if release.looks_at_nodes && ready.iter().all(|c| !c.nodes.is_empty()) && ready.iter().any(|c| has(c.nodes, node)) {
            cluster.retain(|c| has(c.nodes, node));
        } else if let Some(zone) = zone
            && ready.iter().all(|c| !c.zones.is_empty())
            && ready.iter().any(|c| has(c.zones, zone))
        {
            cluster.retain(|c| has(c.zones, zone));
        }
        if cluster.is_empty() {
            cluster.clone_from(&leaving);
        }
        let on_node = |from: &[&'_ Candidate<'_>]| from.iter().filter(|c| c.node == Some(node)).map(|c| c.backend).collect::<Vec<_>>();
        let mut local = on_node(&ready);
        if local.is_empty() {
            local = on_node(&leaving);
        }
        let cluster: Vec<_> = cluster.iter().map(|c| c.backend).collect();
        let taken = match side {
            Side::Inner if !inner_local => cluster,
            Side::Inner if release.ipvs && local.is_empty() => cluster,
            Side::Inner => local,
            Side::Outer if !outer_local => cluster,
            Side::Outer if release.ipvs && !local.is_empty() => local,
            Side::Outer if release.ipvs || release.knows_pods => cluster,
            Side::Outer => local,
        };
        let mut taken: Vec<u8> =
            taken.into_iter().map(|(address, _)| if let IpAddr::V4(v4) = address { v4.octets()[3] } else { 0 }).collect();
        taken.sort_unstable();
        taken
    }

    #[test]
    fn what_any_kube_proxy_chooses_is_among_the_backends_and_no_more_than_that() {
        let mut narrowed = 0;
        for seed in 0..4_000 {
            let mut rng = Rng::new(seed);
            let names = ["a", "b", "n1", "n2", "n3"].map(|name| Hint { name: name.to_owned() });
            let count = rng.below(5);
            let hinted = rng.chance(70);
            let all: Vec<Candidate<'_>> = (0..count)
                .map(|index| {
                    let hints =
                        |rng: &mut Rng, from: usize| if hinted && rng.chance(90) { &names[from..from + 1 + rng.below(2)] } else { &[] };
                    let (zone, node) = (rng.below(2), 2 + rng.below(2));
                    Candidate {
                        backend: (IpAddr::from([10, 0, 0, index as u8]), 80),
                        state: rng.pick(&[State::Ready, State::Ready, State::Ready, State::LastResort, State::Unusable]),
                        node: rng.pick(&[Some("n1"), Some("n2"), Some("n3"), None]),
                        zones: if zone == 0 { hints(&mut rng, 0) } else { hints(&mut rng, 1) },
                        nodes: if node == 2 { hints(&mut rng, 2) } else { hints(&mut rng, 3) },
                    }
                })
                .collect();
            let (node, zone) = (rng.pick(&["n1", "n2", "n3"]), rng.pick(&[Some("a"), Some("b"), Some("c"), None]));
            let (inner_local, outer_local, side) = (rng.chance(40), rng.chance(40), rng.pick(&[Side::Inner, Side::Outer]));
            let reach = match (side, inner_local, outer_local) {
                (Side::Inner, false, _) | (Side::Outer, _, false) => Reach::Cluster,
                (Side::Inner, true, _) => Reach::LocalElseCluster,
                (Side::Outer, _, true) => Reach::LocalAndCluster,
            };
            let found: Vec<u8> = chosen(all.clone(), Some(Place { node, zone }), reach)
                .into_iter()
                .map(|(address, _)| if let IpAddr::V4(v4) = address { v4.octets()[3] } else { 0 })
                .collect();
            let mut any: Vec<u8> = Vec::new();
            for flags in 0..8 {
                let release = Release { looks_at_nodes: flags & 1 != 0, ipvs: flags & 2 != 0, knows_pods: flags & 4 != 0 };
                let chosen = choice(release, &all, node, zone, (inner_local, outer_local), side);
                assert!(chosen.iter().all(|last| found.contains(last)), "seed {seed}: {release:?} chooses {chosen:?}, not {found:?}");
                any.extend(chosen);
            }
            if any.is_empty() {
                any.extend(0..count as u8);
            }
            any.sort_unstable();
            any.dedup();
            assert_eq!(found, any, "seed {seed}: no more than the choice");
            narrowed += usize::from(found.len() < all.iter().filter(|candidate| candidate.state == State::Ready).count());
        }
        assert!(narrowed > 200, "{narrowed}");
    }
}
