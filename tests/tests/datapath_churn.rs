//! Pods that come and go by the hundred, here and elsewhere: what they took is given back.
//!
//! `DATAPATH_CHURN` sets the number of rounds of 25 pods each here and as many elsewhere.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use aya::maps::{MapData, MapInfo};
use datapath_support::{World, deny_in, modes, policy};
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_daemon::netpol::{ActivateIf, ActivateRequest};
use stanchion_ebpf_abi::{LAYOUT_VERSION, map_name};
use stanchion_lab::netns::{Netns, ip_batch, ip_json};
use stanchion_lab::stray::Maker;
use stanchion_lab::wait::wait_for;

const PODS: u8 = 25;

/// The kernel takes namespaces down one after the other, those of others too.
const GONE: Duration = Duration::from_secs(60);

/// What grows where something is not given back.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Descriptors of this process.
    files: usize,
    /// Links that are pinned.
    links: usize,
    addresses: usize,
    own: usize,
    verdicts: usize,
    endpoints: usize,
}

fn entries(directory: impl AsRef<Path>) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

fn keys(world: &World, map: &str) -> usize {
    let pin = world.pin_root.join(format!("v{LAYOUT_VERSION}")).join(map);
    let data = || MapData::from_pin(&pin).unwrap();
    let size = MapInfo::from_pin(&pin).unwrap().key_size();
    let map = aya::maps::Map::from_map_data(data()).unwrap();
    match (map, size) {
        (map @ aya::maps::Map::HashMap(_), 20) => aya::maps::HashMap::<_, [u8; 20], [u8; 8]>::try_from(map).unwrap().keys().count(),
        (map @ aya::maps::Map::HashMap(_), _) => aya::maps::HashMap::<_, [u8; 24], u32>::try_from(map).unwrap().keys().count(),
        (map, _) => aya::maps::lpm_trie::LpmTrie::<_, [u8; 12], [u8; 8]>::try_from(map).unwrap().keys().count(),
    }
}

fn held(world: &World) -> Held {
    Held {
        files: entries("/proc/self/fd"),
        links: entries(world.pin_root.join(format!("v{LAYOUT_VERSION}")).join("links")),
        addresses: keys(world, map_name::ADDRESSES),
        own: keys(world, map_name::OWN),
        verdicts: keys(world, map_name::VERDICTS),
        endpoints: world.runtime.block_on(world.agent().snapshot()).endpoints.len(),
    }
}

/// Bytes of memory that this process has of its own.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    kilobytes.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1_024
}

fn object(name: &str, node: &str, label: &str, address: Ipv4Addr) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: \"x\", labels: {{pod: \"{label}\"}}}}\n\
         spec: {{nodeName: {node}, containers: []}}\nstatus: {{phase: Running, podIPs: [{{ip: {address}}}]}}\n"
    )
}

/// Pods of labels of their own here and elsewhere; those here are made active, and all are gone at the end.
fn round(world: &mut World, policies: &str, number: usize) {
    let pods = Netns::create(&Maker::DatapathTest.name(&format!("churn{number}"))).unwrap();
    let links = (1..=PODS).map(|n| format!("link add new{n} type veth peer name p{n} netns {}\n", pods.name()));
    ip_batch(world.node.name(), &links.collect::<String>()).unwrap();
    let shown = ip_json(&world.node, &["link"]).unwrap();
    let index = |name: &str| {
        let link = shown.as_array().unwrap().iter().find(|link| link["ifname"] == name).unwrap();
        u32::try_from(link["ifindex"].as_u64().unwrap()).unwrap()
    };
    let objects = (1..=PODS).map(|n| {
        let (label, last) = (format!("r{number}-{n}"), n);
        object(&format!("here-{n}"), "node1", &label, Ipv4Addr::new(10, 77, 1, last))
            + &object(&format!("there-{n}"), "node2", "b", Ipv4Addr::new(10, 78, u8::try_from(number % 250).unwrap(), last))
    });
    world.extra_pods = objects.collect();
    world.apply(policies);
    let handle = world.agent().clone();
    for n in 1..=PODS {
        let name = format!("here-{n}");
        let host_if_name = format!("new{n}");
        let endpoint =
            ActivateIf { host_if_index: index(&host_if_name), host_if_name, ipv4: Some(Ipv4Addr::new(10, 77, 1, n)), ipv6: None };
        let request = ActivateRequest {
            pod: PodName::new("x", name.clone()),
            pod_uid: String::new(),
            container_id: ContainerId::new(format!("{name}-{number}")),
            endpoints: vec![endpoint],
            shares_ingress: false,
        };
        world.runtime.block_on(handle.activate(request)).unwrap();
    }
    // The interfaces go before their pods are taken out, as they do with a namespace.
    pods.remove().unwrap();
    drop(pods);
    let gone = wait_for("the interfaces to go", GONE, || async {
        let left = ip_json(&world.node, &["link"])?;
        ensure!(!left.to_string().contains("\"new"), "{left}");
        Ok(())
    });
    world.runtime.block_on(gone).unwrap();
    for n in 1..=PODS {
        assert!(world.runtime.block_on(handle.deactivate(ContainerId::new(format!("here-{n}-{number}")))), "pod {n} of round {number}");
    }
    world.extra_pods.clear();
    world.apply(policies);
}

#[test]
fn what_pods_took_is_given_back() {
    let rounds: usize = std::env::var("DATAPATH_CHURN").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    for mode in modes() {
        let mut world = World::new(mode);
        // Every pod is selected, and pods elsewhere are peers.
        let everyone = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: everyone, namespace: \"x\"}\n\
                        spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80}, {port: 443}]}]}\n";
        let policies = deny_in() + everyone + &policy("x", "own", "r0-1", "  ingress: [{ports: [{port: 8080}]}]\n");
        world.apply(&policies);
        world.activate_all();
        // What is made once is made in the first rounds.
        round(&mut world, &policies, 0);
        round(&mut world, &policies, 1);
        let (before, memory) = (held(&world), resident());
        for number in 2..2 + rounds {
            round(&mut world, &policies, number);
        }
        assert_eq!(held(&world), before, "{mode:?}");
        let grown = resident().saturating_sub(memory);
        assert!(grown < 4 << 20, "{mode:?}: {grown} bytes more after {rounds} rounds");
    }
}
