//! The other plugins of a conflist behind ours, as Debian packages them; egress to the other family; what runtimes do at the edges.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use cni_support::{Pod, Site, ip, run};
use serde_json::{Value, json};
use stanchion_core::network::egress::EgressFamily;
use stanchion_lab::netns::Netns;
use stanchion_proto as wire;

const PATIENCE: Duration = Duration::from_secs(5);

/// A plugin of `containernetworking-plugins`, called as libcni calls the next one of a list.
fn chained(site: &Site, name: &str, verb: &str, pod: &Pod, conf: &Value) -> Result<Value, String> {
    let args = format!("IgnoreUnknown=1;K8S_POD_NAME={};K8S_POD_NAMESPACE={}", pod.name.name, pod.name.namespace);
    let mut command = Command::new(format!("/usr/lib/cni/{name}"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear().envs([
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", &pod.container),
        ("CNI_NETNS", &pod.netns.0.path().display().to_string()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", &args),
        ("CNI_PATH", "/usr/lib/cni"),
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    ]);
    let mut child =
        site.node.0.spawn(&mut command).unwrap_or_else(|error| panic!("{name}: {error}: apt-get install containernetworking-plugins"));
    child.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    if !output.status.success() {
        return Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
}

/// Somebody outside the node, behind `up0`.
fn outside(site: &Site) -> cni_support::OwnedNetns {
    let netns = cni_support::OwnedNetns::create("out");
    run(&site.node.0, &format!("ip link add up0 type veth peer name eth0 netns {}", netns.0.name()));
    for (place, line) in [
        (&site.node.0, "ip addr add 192.0.2.1/24 dev up0"),
        (&site.node.0, "ip link set up0 up"),
        (&site.node.0, "ip link set lo up"),
        (&site.node.0, "sysctl -qw net.ipv4.ip_forward=1"),
        (&netns.0, "ip addr add 192.0.2.9/24 dev eth0"),
        (&netns.0, "ip link set eth0 up"),
        (&netns.0, "ip route add default via 192.0.2.1"),
    ] {
        run(place, line);
    }
    netns
}

fn echo_once(netns: &Netns, address: &str) -> std::thread::JoinHandle<()> {
    let address: SocketAddr = address.parse().unwrap();
    let listener = netns.run(|| TcpListener::bind(address)).unwrap().unwrap();
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(format!("{}\n", peer.ip()).as_bytes()).unwrap();
    })
}

fn ask(netns: &Netns, address: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().unwrap();
    let mut stream = netns.run(|| TcpStream::connect_timeout(&address, PATIENCE)).unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn portmap_and_tuning_go_on_from_our_result() {
    let site = Site::start().await;
    let out = outside(&site);
    let before = site.picture();
    let pod = site.pod("web");
    // Debian's plugins speak up to 1.0.0.
    let answer = site.call("ADD", &pod, json!({"cniVersion": "1.0.0"})).await;
    assert!(answer.ok, "{answer:?}");
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    let portmap = json!({
        "cniVersion": "1.0.0", "name": "aws-cni", "type": "portmap", "snat": true, "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": [{"hostPort": 30_080, "containerPort": 8080, "protocol": "tcp"}]}, "prevResult": result,
    });
    let passed_on = chained(&site, "portmap", "ADD", &pod, &portmap).unwrap();
    assert_eq!((&passed_on["interfaces"], &passed_on["ips"]), (&result["interfaces"], &result["ips"]), "passed on as it came");
    let tuning = json!({
        "cniVersion": "1.0.0", "name": "aws-cni", "type": "tuning", "prevResult": result,
        "sysctl": {"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1", "net.ipv6.conf.lo.disable_ipv6": "1"},
    });
    chained(&site, "tuning", "ADD", &pod, &tuning).unwrap();
    let addresses = ip(&pod.netns.0, &["-6", "addr"]);
    assert!(!addresses.to_string().contains("inet6"), "DISABLE_POD_V6: {addresses}");
    let serving = echo_once(&pod.netns.0, "10.0.1.9:8080");
    assert_eq!(ask(&out.0, "192.0.2.1:30080").unwrap(), "192.0.2.9");
    serving.join().unwrap();
    // Portmap's own CHECK wants chains of IPv6 that it never made.
    chained(&site, "tuning", "CHECK", &pod, &tuning).unwrap();
    let check = site.call("CHECK", &pod, json!({"cniVersion": "1.0.0", "prevResult": result})).await;
    assert!(check.ok, "{check:?}");
    chained(&site, "portmap", "DEL", &pod, &portmap).unwrap();
    assert!(site.call("DEL", &pod, json!({"cniVersion": "1.0.0", "prevResult": result})).await.ok);
    assert_eq!(site.picture(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bandwidth_plugin_shapes_behind_our_result_and_the_agent_is_told() {
    let site = Site::start().await;
    let pod = site.pod("slow");
    let annotations = json!({"io.kubernetes.cri.pod-annotations": {"kubernetes.io/egress-bandwidth": "10M"}});
    let answer = site.call("ADD", &pod, json!({"cniVersion": "1.0.0", "runtimeConfig": annotations})).await;
    assert!(answer.ok, "{answer:?}");
    assert!(site.script.lock().unwrap().activations[0].shares_ingress, "filters would be in its way");
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    let rate = json!({"ingressRate": 10_000_000, "ingressBurst": 10_000_000, "egressRate": 10_000_000, "egressBurst": 10_000_000});
    let conf = json!({
        "cniVersion": "1.0.0", "name": "aws-cni", "type": "bandwidth", "capabilities": {"bandwidth": true},
        "runtimeConfig": {"bandwidth": rate}, "prevResult": result,
    });
    chained(&site, "bandwidth", "ADD", &pod, &conf).unwrap();
    let output = site.node.0.output(Command::new("tc").args(["qdisc", "show", "dev", &site.host_if(&pod)])).unwrap();
    let qdiscs = String::from_utf8(output.stdout).unwrap();
    assert!(qdiscs.contains("tbf") && qdiscs.contains("ingress"), "{qdiscs}");
    chained(&site, "bandwidth", "DEL", &pod, &conf).unwrap();
    assert!(site.call("DEL", &pod, json!({"cniVersion": "1.0.0", "prevResult": result})).await.ok);
}

fn reserved(family: EgressFamily, network: &str, container: &str) -> Vec<String> {
    let directory = std::path::Path::new(family.reservations()).join(network);
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| std::fs::read_to_string(entry.path()).is_ok_and(|text| text.starts_with(container)));
    ours.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_an_ipv6_cluster_gets_an_interface_for_ipv4() {
    let site = Site::start().await;
    let attachment = |address: &str| wire::Attachment { ipv6: address.into(), route_table: 254, ..wire::Attachment::default() };
    {
        let mut script = site.script.lock().unwrap();
        script.free = [attachment("2001:db8::9"), attachment("2001:db8::10")].into();
        script.egress = "v4if0".into();
    }
    run(&site.node.0, "sysctl -qw net.ipv6.conf.all.forwarding=1");
    let out = outside(&site);
    let before = site.picture();
    let (pod, other) = (site.pod("six"), site.pod("seven"));
    let (result, second) = (site.add(&pod).await, site.add(&other).await);
    let addresses = reserved(EgressFamily::V4, "aws-cni", &pod.container);
    let [address] = &addresses[..] else { panic!("{addresses:?}") };
    let inside = ip(&pod.netns.0, &["addr", "show", "v4if0"]);
    assert_eq!((&inside[0]["addr_info"][0]["local"], &inside[0]["addr_info"][0]["prefixlen"]), (&json!(address), &json!(22)));
    let routes = ip(&pod.netns.0, &["route"]);
    assert!(!routes.as_array().unwrap().iter().any(|route| route["dst"] == "169.254.172.0/22"), "{routes}");
    assert_eq!((&routes[0]["dst"], &routes[0]["dev"]), (&json!("default"), &json!("v4if0")));
    assert_eq!(result["ips"][1], json!({"address": format!("{address}/32"), "gateway": "169.254.1.1", "interface": 3}));
    assert_eq!((&result["interfaces"][1]["name"], &result["interfaces"][3]["name"]), (&json!("eth0"), &json!("v4if0")));
    let endpoints = site.script.lock().unwrap().activations[0].endpoints.clone();
    assert_eq!((endpoints.len(), &endpoints[1].ipv4), (2, address), "policy judges both interfaces");
    // Without the agent's translation here: the outside sees the pod's made-up address and can answer it.
    run(&out.0, &format!("ip route add {address} via 192.0.2.1"));
    let serving = echo_once(&out.0, "192.0.2.9:80");
    assert_eq!(&ask(&pod.netns.0, "192.0.2.9:80").unwrap(), address);
    serving.join().unwrap();
    assert!(site.call("CHECK", &pod, json!({"prevResult": result})).await.ok);
    assert_ne!(result["ips"][1]["address"], second["ips"][1]["address"]);
    for (pod, extra) in [(&pod, json!({"prevResult": result})), (&other, json!({}))] {
        assert!(site.call("DEL", pod, extra).await.ok);
        assert_eq!(reserved(EgressFamily::V4, "aws-cni", &pod.container), Vec::<String>::new());
    }
    assert_eq!(site.picture(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_an_ipv4_cluster_gets_an_interface_for_ipv6_and_gc_frees_what_was_lost() {
    let site = Site::start().await;
    site.script.lock().unwrap().egress = "v6if0".into();
    // A network of its own: reservations are the machine's, and GC is about all of a network's.
    let network = format!("gc-{}", std::process::id());
    let (pod, lost) = (site.pod("four"), site.pod("lost"));
    let answer = site.call("ADD", &pod, json!({"name": network})).await;
    assert!(answer.ok, "{answer:?}");
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert!(site.call("ADD", &lost, json!({"name": network})).await.ok);
    let inside = ip(&pod.netns.0, &["-6", "addr", "show", "dev", "v6if0", "scope", "global"]);
    let address = inside[0]["addr_info"][0]["local"].as_str().unwrap().to_owned();
    assert_eq!(inside[0]["addr_info"][0]["prefixlen"], 118, "as aws-node's, whose tests read it");
    assert_eq!(reserved(EgressFamily::V6, &network, &pod.container), std::slice::from_ref(&address));
    assert!(address.starts_with("fd00::ac:"), "{address}");
    let routes = ip(&pod.netns.0, &["-6", "route", "show", "default"]);
    assert_eq!((&routes[0]["gateway"], &routes[0]["dev"]), (&json!("fe80::1"), &json!("v6if0")));
    let neighbours = ip(&site.node.0, &["-6", "neigh", "show", &address]);
    assert_eq!(neighbours[0]["state"][0], "PERMANENT", "the first answer waits for nobody");
    // The runtime knows only one of them.
    let mut conf = site.conf();
    conf["name"] = json!(network);
    conf["cni.dev/valid-attachments"] = json!([{"containerID": pod.container, "ifname": "eth0"}]);
    let gc = vec![("CNI_COMMAND".to_owned(), "GC".to_owned())];
    assert!(site.exec(gc, &conf).await.ok);
    assert_eq!(reserved(EgressFamily::V6, &network, &lost.container), Vec::<String>::new());
    assert_eq!(reserved(EgressFamily::V6, &network, &pod.container), [address]);
    assert!(site.call("DEL", &pod, json!({"name": network, "prevResult": result})).await.ok);
    assert_eq!(reserved(EgressFamily::V6, &network, &pod.container), Vec::<String>::new());
    std::fs::remove_dir_all(std::path::Path::new(EgressFamily::V6.reservations()).join(&network)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gc_that_does_not_say_what_lives_releases_nothing() {
    let site = Site::start().await;
    let gc = || vec![("CNI_COMMAND".to_owned(), "GC".to_owned())];
    let mut conf = site.conf();
    conf["name"] = json!("no-pods-here");
    // As from `cnitool gc`, which goes on to other plugins only if this one does not fail.
    let answer = site.exec(gc(), &conf).await;
    assert!(answer.ok && answer.stdout.is_empty(), "{answer:?}");
    assert!(site.script.lock().unwrap().collected.is_empty());
    // Go writes an empty list so, too.
    for (count, empty) in [json!([]), Value::Null].into_iter().enumerate() {
        conf["cni.dev/valid-attachments"] = empty;
        assert!(site.exec(gc(), &conf).await.ok, "an empty list says that nothing lives");
        let collected = &site.script.lock().unwrap().collected;
        assert_eq!((collected.len(), collected[count].valid.len()), (count + 1, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nodes_own_namespace_is_refused_unless_the_runtime_insists() {
    let site = Site::start().await;
    let pod = site.pod("host");
    let env = |more: &[(&str, &str)]| -> Vec<(String, String)> {
        let netns = site.node.0.path().display().to_string();
        let base = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "pod0"),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=x;K8S_POD_NAME=host"),
        ];
        base.iter().chain(more).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let answer = site.exec(env(&[]), &site.conf()).await;
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(error["code"], 4, "{error}");
    let answer = site.exec(env(&[("CNI_NETNS_OVERRIDE", "1")]), &site.conf()).await;
    assert!(answer.ok, "{answer:?}");
    drop(pod);
}

/// What aws-node's plugin returned at an ADD, and what its pod has on the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_aws_node_created_are_taken_down_from_its_result() {
    let site = Site::start().await;
    let before = site.picture();
    let pod = site.pod("theirs");
    let host_if = site.host_if(&pod);
    for (table, vlan, device, release) in [("2", "0", "1", "since 1.20"), ("", "0", "1", "before 1.20"), ("107", "7", "0", "a branch ENI")]
    {
        run(&site.node.0, &format!("ip link add {host_if} type veth peer name eth0 netns {}", pod.netns.0.name()));
        run(&pod.netns.0, "ip addr add 10.0.1.77/32 dev eth0");
        run(&site.node.0, &format!("ip link set {host_if} up"));
        run(&site.node.0, &format!("ip route add 10.0.1.77 dev {host_if}"));
        run(&site.node.0, "ip rule add pref 512 to 10.0.1.77 lookup main");
        run(&site.node.0, "ip rule add pref 1536 from 10.0.1.77 lookup 2");
        if vlan != "0" {
            // This kernel has no VLANs; the name is what counts.
            run(&site.node.0, "ip link add vlan.eth.7 type bridge");
            run(&site.node.0, "ip rule add pref 10 iif vlan.eth.7 lookup 107");
            run(&site.node.0, &format!("ip rule add pref 10 iif {host_if} lookup 107"));
        }
        let dummy = stanchion_core::network::names::upstream_dummy_name(&pod.name);
        let result = json!({
            "cniVersion": "0.4.0", "dns": {},
            "interfaces": [{"name": host_if}, {"name": "eth0", "sandbox": pod.netns.0.path(), "mac": table}, {"name": dummy, "mac": vlan, "sandbox": device}],
            "ips": [{"version": "4", "interface": 1, "address": "10.0.1.77/32"}],
        });
        let del = site.call("DEL", &pod, json!({"cniVersion": "0.4.0", "prevResult": result})).await;
        assert!(del.ok, "{release}: {del:?}");
        assert_eq!(site.picture(), before, "{release}");
    }
}
