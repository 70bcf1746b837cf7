//! Puts pods under policy that run already and were never put under it: aws-node connected them, or network policy was off.
//!
//! Who they are is known from the cluster and from the addresses that are held; which host veths are theirs from the names, as aws-node
//! makes them; and which addresses are behind a veth from the routes to it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::network::egress::EgressFamily;
use stanchion_core::network::names::STRICT_BRANCH_PREFIX;
use stanchion_core::network::{NodeIf, Route, host_veth_name};
use stanchion_netlink::{Netlink, NetlinkError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::ipamd::IpamHandle;
use crate::netpol::{ActivateIf, ActivateRequest, NetpolHandle};

/// Pauses between tries.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the task works with.
#[derive(Debug)]
pub struct AdoptParts {
    /// Who holds which address.
    pub ipam: IpamHandle,
    /// Where they come under policy.
    pub netpol: NetpolHandle,
    /// The cluster's objects.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// This node.
    pub node_name: String,
    /// Of host veths.
    pub veth_prefix: String,
    /// Ends the task.
    pub shutdown: CancellationToken,
}

/// Starts the task, which ends when it is done. It begins once addresses are served and the cluster's state is known.
pub fn spawn(parts: AdoptParts) -> JoinHandle<()> {
    tokio::spawn(async move {
        let shutdown = parts.shutdown.clone();
        // Ended before, or the parts are gone: the next agent does it.
        let _ = shutdown.run_until_cancelled(adopt(parts)).await;
    })
}

async fn adopt(parts: AdoptParts) -> Option<()> {
    parts.ipam.ready().await.ok()?;
    // The host is looked at when they can be adopted: a look from before would be old.
    parts.netpol.ready().wait_for(|ready| *ready).await.ok()?;
    let mut pause = PAUSE.0;
    loop {
        match try_adopt(&parts).await {
            Ok(Found { adopted, without_route }) => {
                if adopted > 0 {
                    info!(pods = adopted, "pods that ran before this agent are under policy");
                }
                if without_route.is_empty() {
                    return Some(());
                }
                info!(pods = ?without_route, "no route leads to these pods: whether they run is looked at again");
            }
            Err(error) => warn!(error = format!("{error:#}"), "pods may run without policy, and cannot be put under it; tried again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// What one look brought.
struct Found {
    adopted: usize,
    /// They end, or somebody took their routes away and the healer brings them back.
    without_route: Vec<PodName>,
}

async fn try_adopt(parts: &AdoptParts) -> anyhow::Result<Found> {
    let (links, routes) = host().context("look at the host's links and routes")?;
    let (running, without_route) = running(&people(parts), &parts.veth_prefix, &links, &routes);
    Ok(Found { adopted: parts.netpol.adopt(running).await?, without_route })
}

fn host() -> Result<(Vec<NodeIf>, Vec<Route>), NetlinkError> {
    let mut netlink = Netlink::open()?;
    Ok((netlink.links()?, netlink.routes()?))
}

/// What is known of a pod that may run here.
#[derive(Debug, Default)]
struct Person {
    /// As the API server knows a pod of that name, which may be another one; empty where it knows none.
    uid: String,
    /// By which the API server knows it.
    addresses: BTreeSet<IpAddr>,
    /// Its sandbox, by an address that it holds.
    holds: BTreeMap<IpAddr, ContainerId>,
}

fn people(parts: &AdoptParts) -> BTreeMap<PodName, Person> {
    let mut people: BTreeMap<PodName, Person> = BTreeMap::new();
    let cluster = parts.cluster.borrow();
    for (name, pod) in cluster.pods.iter().filter(|(_, pod)| pod.spec.node_name == parts.node_name && !pod.spec.host_network) {
        let person = people.entry(name.clone()).or_default();
        person.uid.clone_from(&pod.metadata.uid);
        person.addresses = pod.addresses().collect();
    }
    for view in &parts.ipam.snapshot().addresses {
        if let (Some(pod), Some(key)) = (&view.pod, &view.key) {
            people.entry(pod.clone()).or_default().holds.insert(view.address, key.container_id.clone());
        }
    }
    people
}

/// The sandboxes of those whose first host veth is there, with the addresses behind each of their veths; and those to one of whose veths
/// no route leads.
fn running(people: &BTreeMap<PodName, Person>, prefix: &str, links: &[NodeIf], routes: &[Route]) -> (Vec<ActivateRequest>, Vec<PodName>) {
    let by_name: BTreeMap<&str, u32> = links.iter().map(|link| (link.name.as_str(), link.index)).collect();
    let mut behind: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    for route in routes.iter().filter(|route| route.dst.prefix_len() == route.dst.max_prefix_len()) {
        behind.entry(route.index).or_default().push(route.dst.addr());
    }
    let interface = |name: String| {
        let index = *by_name.get(name.as_str())?;
        let addresses = behind.get(&index).map(Vec::as_slice).unwrap_or_default();
        Some(ActivateIf {
            host_if_name: name,
            host_if_index: index,
            ipv4: addresses.iter().find_map(|address| if let IpAddr::V4(address) = address { Some(*address) } else { None }),
            ipv6: addresses.iter().find_map(|address| if let IpAddr::V6(address) = address { Some(*address) } else { None }),
        })
    };
    let (mut running, mut without_route) = (Vec::new(), Vec::new());
    let first: HashSet<String> = people.keys().map(|pod| host_veth_name(prefix, pod, 0)).collect();
    for (pod, person) in people {
        // The second veth of a pod `x` is called as the first of a pod `x.1`.
        let names = (0..).map(|number| (number, host_veth_name(prefix, pod, number)));
        let attached = names.map_while(|(number, name)| if number > 0 && first.contains(&name) { None } else { interface(name) });
        let mut endpoints: Vec<ActivateIf> = attached.collect();
        if endpoints.is_empty() {
            endpoints.extend(interface(host_veth_name(STRICT_BRANCH_PREFIX, pod, 0)));
        }
        if endpoints.is_empty() {
            continue;
        }
        endpoints.extend(EgressFamily::ALL.into_iter().filter_map(|family| interface(family.host_if(prefix, pod))));
        if endpoints.iter().any(|end| end.addresses().next().is_none()) {
            without_route.push(pod.clone());
            continue;
        }
        let addresses: Vec<IpAddr> = endpoints.iter().flat_map(ActivateIf::addresses).collect();
        let is_known = addresses.iter().any(|address| person.addresses.contains(address));
        let uid = if is_known { person.uid.clone() } else { String::new() };
        let container = addresses.iter().find_map(|address| person.holds.get(address)).cloned();
        running.push(ActivateRequest {
            pod: pod.clone(),
            // A pod on a branch ENI holds no address of the pool: its end is seen by its veth's.
            container_id: container.unwrap_or_else(|| ContainerId::stand_in(pod)),
            pod_uid: uid,
            endpoints,
            shares_ingress: false,
        });
    }
    (running, without_route)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: String) -> NodeIf {
        NodeIf { index, name, mac: None, mtu: 9001, up: true, kind: "veth".to_owned() }
    }

    fn route(dst: &str, index: u32, table: u32) -> Route {
        Route { dst: dst.parse().expect("a range"), table, via: None, index }
    }

    #[test]
    fn a_pod_is_known_by_its_veths_and_the_routes_to_them() {
        let [a, b, c, gone, ends] = ["a", "b", "c", "gone", "ends"].map(|name| PodName::new("x", name));
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let of_api = |uid: &str, known: &str| Person { uid: uid.to_owned(), addresses: [address(known)].into(), ..Person::default() };
        let mut people: BTreeMap<PodName, Person> = [
            (a.clone(), of_api("uid-a", "10.0.0.5")),
            (b.clone(), of_api("uid-of-the-next-b", "10.0.0.99")),
            (c.clone(), of_api("uid-c", "10.0.0.7")),
            (gone, of_api("uid-gone", "10.0.0.8")),
            (ends.clone(), of_api("uid-ends", "10.0.0.9")),
            // Its only veth is not the second of `b`.
            (PodName::new("x", "b.1"), of_api("uid-b.1", "10.0.0.10")),
        ]
        .into();
        people.get_mut(&a).expect("there").holds.insert(address("10.0.0.5"), ContainerId::new("sandbox-a"));
        people.get_mut(&b).expect("there").holds.insert(address("10.0.0.6"), ContainerId::new("sandbox-b"));
        let links = [
            link(1, "eth0".to_owned()),
            link(10, host_veth_name("eni", &a, 0)),
            link(11, host_veth_name("eni", &a, 1)),
            link(12, EgressFamily::V6.host_if("eni", &a)),
            link(20, host_veth_name("eni", &b, 0)),
            link(30, host_veth_name("vlan", &c, 0)),
            link(40, host_veth_name("eni", &ends, 0)),
            link(50, host_veth_name("eni", &b, 1)),
        ];
        let routes = [
            route("0.0.0.0/0", 1, 254),
            route("10.0.0.0/16", 10, 254),
            route("10.0.0.5/32", 10, 254),
            route("10.0.1.5/32", 11, 254),
            route("fd00::ac:3/128", 12, 254),
            route("10.0.0.6/32", 20, 254),
            route("10.0.0.7/32", 30, 101),
            route("10.0.0.10/32", 50, 254),
        ];
        let (found, without_route) = running(&people, "eni", &links, &routes);
        assert_eq!(without_route, [ends]);
        let told: Vec<_> = found
            .iter()
            .map(|request| {
                let interfaces: Vec<_> = request.endpoints.iter().map(|end| (end.host_if_index, end.ipv4, end.ipv6)).collect();
                (request.pod.name.as_str(), request.pod_uid.as_str(), request.container_id.as_str(), interfaces)
            })
            .collect();
        let v4 = |text: &str| Some(text.parse().expect("IPv4"));
        assert_eq!(
            told,
            [
                (
                    "a",
                    "uid-a",
                    "sandbox-a",
                    vec![(10, v4("10.0.0.5"), None), (11, v4("10.0.1.5"), None), (12, None, Some("fd00::ac:3".parse().expect("IPv6")))]
                ),
                ("b", "", "sandbox-b", vec![(20, v4("10.0.0.6"), None)]),
                ("b.1", "uid-b.1", "of pod x/b.1", vec![(50, v4("10.0.0.10"), None)]),
                ("c", "uid-c", "of pod x/c", vec![(30, v4("10.0.0.7"), None)]),
            ]
        );
    }
}
