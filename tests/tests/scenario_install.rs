//! The conflist follows the agent: away before it can connect pods, there right after, put back when it is lost; and the
//! agent against an API server over TLS on its own node, with the shipped rights.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use stanchion_lab::Vpc;
use stanchion_lab::cluster::SOON;
use stanchion_lab::fake_kube::tls::TlsListener;
use stanchion_lab::fake_kube::{FakeKube, Rules};
use stanchion_lab::node::Node;
use stanchion_lab::wait::wait_for;

const PODS: &str = "/api/v1/pods";
const NODES: &str = "/api/v1/nodes";
const EVENTS: &str = "/apis/events.k8s.io/v1/events";
const TAINT: &str = "stanchion/not-ready";

/// A node as the API server shows it, with another runtime than the default.
fn node(name: &str) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}, {"key": "other", "effect": "NoSchedule"}]},
        "status": {"capacity": {"pods": "29"}, "nodeInfo": {"containerRuntimeVersion": "containerd://2.3.4"}},
    })
}

/// Puts a portmap into the node's plugins, or another in its place, that says it speaks these versions.
fn portmap_that_speaks(node: &Node, versions: &[&str]) {
    fs::create_dir_all(node.cni_bin_dir()).unwrap();
    let (path, new) = (node.cni_bin_dir().join("portmap"), node.cni_bin_dir().join(".portmap.new"));
    fs::write(&new, format!("#!/bin/sh\necho '{}'\n", json!({"cniVersion": "1.0.0", "supportedVersions": versions}))).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(new, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_conflist_comes_when_pods_can_and_the_node_is_told() {
    let mut vpc = Vpc::builder().start().await.unwrap();
    let node1 = vpc.node("node1", "m5.large").await.unwrap();
    let kube = FakeKube::default();
    for collection in [
        PODS,
        NODES,
        EVENTS,
        "/api/v1/configmaps",
        "/api/v1/namespaces",
        "/api/v1/services",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ] {
        kube.serve_collection(collection);
    }
    kube.put(NODES, node("node1"));
    kube.enforce(Rules::of_manifest(include_str!("../../deploy/manifests/stanchion-all-features.yaml")).unwrap());
    let tcp = node1.netns().tcp_listener("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = TlsListener::over(tcp).unwrap();
    let kubeconfig = node1.state_dir().with_file_name("kubeconfig");
    let ca = kubeconfig.with_file_name("ca.pem");
    fs::create_dir_all(kubeconfig.parent().unwrap()).unwrap();
    fs::write(&ca, stanchion_lab::fake_aws::TEST_CA_PEM).unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{server: {:?}, certificate-authority: ca.pem}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n",
        listener.url().unwrap()
    );
    fs::write(&kubeconfig, text).unwrap();
    tokio::spawn(kube.clone().serve(listener));

    // What a boot finds: aws-node's or our own configuration of the last one.
    let conflist = node1.cni_conf_dir().join("10-aws.conflist");
    fs::create_dir_all(node1.cni_conf_dir()).unwrap();
    fs::write(&conflist, r#"{"cniVersion":"0.4.0","name":"aws-cni","plugins":[{"type":"aws-cni"}]}"#).unwrap();
    let old = fs::File::options().write(true).open(&conflist).unwrap();
    old.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();

    // A distribution's portmap is older than the runtime.
    portmap_that_speaks(&node1, &["0.4.0", "1.0.0"]);

    let settings = [("STANCHION_STARTUP_TAINT", TAINT), ("ANNOTATE_POD_IP", "true"), ("STANCHION_NODE_CONDITION", "true")];
    let mut agent = node1.start_agent_of(("--kubeconfig", &kubeconfig.display().to_string()), &settings, &[]).unwrap();
    // The moment of readiness and the moment of the file.
    let mut early = None;
    let ready = wait_for("the agent to be ready", SOON, || {
        let (status, there) = (node1.cli_json(&["status"]), fs::read_to_string(&conflist).is_ok_and(|text| text.contains("stanchion-cni")));
        let now_ready = status.as_ref().is_ok_and(|status| status["ipam"]["ready"] == true);
        if there && !now_ready {
            early = Some(format!("{status:?}"));
        }
        async move {
            anyhow::ensure!(now_ready, "{status:?}");
            Ok(Instant::now())
        }
    })
    .await;
    let ready = ready.unwrap_or_else(|error| panic!("{error:#}\n{}", agent.tail()));
    assert_eq!(early, None, "no configuration before the agent can serve");
    let read = || fs::read_to_string(&conflist).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let document = wait_for("the conflist", Duration::from_secs(2), || {
        let document = read().filter(|document| document["plugins"][0]["type"] == "stanchion-cni");
        async move { document.ok_or_else(|| anyhow::anyhow!("not there")) }
    })
    .await
    .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.tail()));
    assert!(ready.elapsed() < Duration::from_secs(1), "it came {:?} after the agent was ready", ready.elapsed());
    assert_eq!((document["cniVersion"].as_str(), document["plugins"][1]["type"].as_str()), (Some("1.0.0"), Some("portmap")));
    assert_eq!(document["plugins"][0]["socket"], node1.socket().display().to_string());
    let plugin = node1.cni_bin_dir().join("stanchion-cni");
    assert_eq!(fs::read(&plugin).unwrap(), fs::read(&node1.binaries().plugin).unwrap(), "the plugin is in place before it");

    // Lost: put back.
    fs::remove_file(&conflist).unwrap();
    wait_for("the conflist to come back", Duration::from_secs(15), || {
        let there = read().is_some();
        async move { there.then_some(()).ok_or_else(|| anyhow::anyhow!("not there")) }
    })
    .await
    .unwrap();

    // A service mesh chains itself in, in its own way of writing: it stays, also when the rest is written anew.
    let mut chained = read().unwrap();
    chained["plugins"].as_array_mut().unwrap().push(json!({"type": "istio-cni"}));
    fs::write(&conflist, chained.to_string()).unwrap();

    // A newer portmap: STATUS for containerd 2.
    portmap_that_speaks(&node1, &["0.4.0", "1.0.0", "1.1.0"]);
    wait_for("the newer version", Duration::from_secs(15), || {
        let version = read().map(|document| document["cniVersion"].clone());
        async move {
            anyhow::ensure!(version == Some(json!("1.1.0")), "{version:?}");
            Ok(())
        }
    })
    .await
    .unwrap();
    let plugins = read().unwrap()["plugins"].clone();
    assert_eq!([0, 1, 2].map(|place| plugins[place]["type"].as_str().unwrap()), ["stanchion-cni", "portmap", "istio-cni"]);

    wait_for("the taint to go, the condition and the event to come", SOON, || {
        let conditions = kube.get(NODES, "/node1").unwrap()["status"]["conditions"].clone();
        let taints = kube.get(NODES, "/node1").unwrap()["spec"]["taints"].clone();
        let reasons: Vec<String> =
            kube.objects(EVENTS).iter().map(|event| event["reason"].as_str().unwrap_or_default().to_owned()).collect();
        async move {
            anyhow::ensure!(taints == json!([{"key": "other", "effect": "NoSchedule"}]), "{taints}");
            anyhow::ensure!(conditions[0]["type"] == "NetworkUnavailable" && conditions[0]["status"] == "False", "{conditions}");
            anyhow::ensure!(reasons.iter().any(|reason| reason == "NetworkReady"), "{reasons:?}");
            Ok(())
        }
    })
    .await
    .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", kube.forbidden(), agent.tail()));
    assert_eq!(kube.forbidden(), Vec::<String>::new());

    // What the status page and probes read, from inside the node.
    let page = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
        let ask = move || -> std::io::Result<String> {
            let mut stream = TcpStream::connect("127.0.0.1:61679")?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        node1.netns().run(ask).unwrap().unwrap()
    };
    assert!(page("/readyz").starts_with("HTTP/1.1 200"), "{}", page("/readyz"));
    assert!(page("/livez").starts_with("HTTP/1.1 200"), "{}", page("/livez"));
    assert!(page("/v1/enis").contains("\"AvailableIPv4Cidrs\""));
    let status = page("/status");
    assert!(status.contains("content-security-policy: default-src 'none'") && status.contains("<!doctype html>"), "{status}");
    assert!(!status.contains("src=") && !status.contains("<link"), "the page needs nothing from elsewhere");

    // A bundle for a person elsewhere: everything the agent says, no secret of a neighbour's configuration.
    fs::write(node1.cni_conf_dir().join("90-other.conf"), r#"{"type": "other", "token": "hunter2-hunter2"}"#).unwrap();
    let bundle = node1.state_dir().with_file_name("bundle.tar.gz");
    let (file, conf) = (bundle.display().to_string(), node1.cni_conf_dir().display().to_string());
    node1.cli(&["support", "--file", &file, "--conf-dir", &conf]).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(fs::File::open(&bundle).unwrap()).read_to_string(&mut text).unwrap();
    for name in ["agent/status.json", "agent/config.json", "network/routes.json", "cni/10-aws.conflist", "cni/90-other.conf"] {
        assert!(text.contains(name), "{name} is not in the bundle");
    }
    assert!(text.contains("stanchion-cni") && !text.contains("hunter2"));

    agent.stop(SOON).await.unwrap();
    assert!(conflist.exists(), "stopping removes nothing");
    let mark = fs::read(stanchion_core::conflist::ready_mark(&node1.socket())).unwrap();
    assert_eq!(mark, fs::read("/proc/sys/kernel/random/boot_id").unwrap(), "STATUS goes on to say yes");
}
