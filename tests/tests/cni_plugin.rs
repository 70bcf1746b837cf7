//! The plugin in real namespaces, with `ip -j` as oracle and a scripted agent behind the real socket.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use cni_support::{Site, attachment, ip, recorded, run};
use serde_json::{Value, json};
use stanchion_core::network::host_veth_name;
use stanchion_lab::binaries::counters;
use stanchion_proto as wire;
use tonic::Status;

fn rules_about(site: &Site, address: &str) -> Vec<u64> {
    let rules = ip(&site.node.0, &["rule"]);
    let about = rules.as_array().unwrap().iter().filter(|rule| rule["src"] == address || rule["dst"] == address);
    about.map(|rule| rule["priority"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_gets_its_network_and_two_pods_reach_each_other() {
    let site = Site::start().await;
    run(&site.node.0, "sysctl -qw net.ipv4.ip_forward=1");
    let before = site.picture();
    let (a, b) = (site.pod("a"), site.pod("b"));
    let result = site.add(&a).await;

    let inside = ip(&a.netns.0, &["addr", "show", "eth0"]);
    assert_eq!((&inside[0]["addr_info"][0]["local"], &inside[0]["addr_info"][0]["prefixlen"]), (&json!("10.0.1.9"), &json!(32)));
    assert_eq!(inside[0]["mtu"], 1500);
    let routes = ip(&a.netns.0, &["route"]);
    assert_eq!((&routes[0]["dst"], &routes[0]["gateway"]), (&json!("default"), &json!("169.254.1.1")));
    assert_eq!((&routes[1]["dst"], &routes[1]["scope"]), (&json!("169.254.1.1"), &json!("link")));
    let host_if = site.host_if(&a);
    let outside = ip(&site.node.0, &["link", "show", &host_if]);
    let neighbour = ip(&a.netns.0, &["neigh"]);
    assert_eq!((&neighbour[0]["dst"], &neighbour[0]["state"][0]), (&json!("169.254.1.1"), &json!("PERMANENT")));
    assert_eq!(neighbour[0]["lladdr"], outside[0]["address"]);

    assert_eq!(result["interfaces"][0], json!({"name": host_if, "mac": outside[0]["address"], "mtu": 1500}));
    let sandbox = a.netns.0.path().display().to_string();
    assert_eq!(result["interfaces"][1], json!({"name": "eth0", "mac": inside[0]["address"], "mtu": 1500, "sandbox": sandbox}));
    assert_eq!(result["ips"], json!([{"address": "10.0.1.9/32", "gateway": "169.254.1.1", "interface": 1}]));

    assert_eq!(rules_about(&site, "10.0.1.9"), [512, 1536]);
    assert_eq!(site.script.lock().unwrap().down_at_activation, [true], "no packet passes before the policy is in force");

    let second = site.add(&b).await;
    assert_eq!(rules_about(&site, "10.0.1.10"), [512], "an address of the primary ENI needs no from rule");
    run(&a.netns.0, "ping -c 1 -W 2 10.0.1.10");

    for (pod, result) in [(&a, &result), (&b, &second)] {
        let check = site.call("CHECK", pod, json!({"prevResult": result})).await;
        assert!(check.ok, "{check:?}");
        let del = site.call("DEL", pod, json!({"prevResult": result})).await;
        assert!(del.ok && del.stdout.is_empty(), "{del:?}");
    }
    assert_eq!(site.picture(), before);
    assert_eq!(ip(&a.netns.0, &["link"]).as_array().unwrap().len(), 1, "only lo is left in the pod");
    assert!(site.script.lock().unwrap().held.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_pod_has_its_address_at_once() {
    let site = Site::start().await;
    let six = wire::Attachment { ipv6: "2001:db8::9".into(), route_table: 254, ..wire::Attachment::default() };
    site.script.lock().unwrap().free = [six].into();
    run(&site.node.0, "sysctl -qw net.ipv6.conf.all.forwarding=1");
    let pod = site.pod("six");
    run(&pod.netns.0, "sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    let before = site.picture();
    let result = site.add(&pod).await;
    assert_eq!(result["ips"], json!([{"address": "2001:db8::9/128", "gateway": "fe80::1", "interface": 1}]));
    let inside = ip(&pod.netns.0, &["-6", "addr", "show", "dev", "eth0", "scope", "global"]);
    assert_eq!(inside[0]["addr_info"][0]["local"], "2001:db8::9");
    assert_eq!(inside[0]["addr_info"][0]["tentative"], Value::Null, "no duplicate address detection");
    let rules = ip(&site.node.0, &["-6", "rule"]);
    assert!(rules.as_array().unwrap().iter().any(|rule| rule["priority"] == 512 && rule["dst"] == "2001:db8::9"), "{rules}");
    let del = site.call("DEL", &pod, json!({"prevResult": result})).await;
    assert!(del.ok, "{del:?}");
    assert_eq!(site.picture(), before);
    let rules = ip(&site.node.0, &["-6", "rule"]);
    assert!(!rules.to_string().contains("2001:db8::9"), "{rules}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_pod_of_several_interfaces_answers_on_each() {
    const ADDRESSES: [&str; 2] = ["2001:db8::9", "2001:db8:1::9"];
    let site = Site::start().await;
    let six = |(address, table): (&str, u32)| wire::Attachment { ipv6: address.into(), route_table: table, ..wire::Attachment::default() };
    let held = ADDRESSES.into_iter().zip([254, 10_101]).map(six).collect::<Vec<_>>();
    run(&site.node.0, "sysctl -qw net.ipv6.conf.all.forwarding=1");
    run(&site.node.0, "ip addr add 2001:db8:2::1/128 dev lo");
    run(&site.node.0, "ip link set lo up");
    let before = site.picture();
    let about = || {
        let rules = ip(&site.node.0, &["-6", "rule"]).as_array().unwrap().clone();
        let of_pod = |rule: &&Value| ADDRESSES.iter().any(|address| rule["src"] == *address || rule["dst"] == *address);
        rules.iter().filter(of_pod).map(|rule| (rule["priority"].as_u64().unwrap(), rule["table"].clone())).collect::<Vec<_>>()
    };

    // What fails on the way leaves nothing on either.
    let pod = site.pod("wide");
    {
        let mut script = site.script.lock().unwrap();
        (script.at_a_time, script.free) = (2, held.clone().into());
        script.fail_activate = Some(Status::internal("no map"));
    }
    assert!(!site.call("ADD", &pod, json!({})).await.ok);
    assert!(site.script.lock().unwrap().held.is_empty(), "both addresses are given back");
    assert_eq!((about(), site.picture()), (Vec::new(), before.clone()));
    assert_eq!(ip(&pod.netns.0, &["link"]).as_array().unwrap().len(), 1, "only lo is left in the pod");

    {
        let mut script = site.script.lock().unwrap();
        (script.free, script.fail_activate) = (held.into(), None);
    }
    let result = site.add(&pod).await;
    assert_eq!(
        result["ips"],
        json!([
            {"address": "2001:db8::9/128", "gateway": "fe80::1", "interface": 1},
            {"address": "2001:db8:1::9/128", "gateway": "fe80::2", "interface": 3}
        ])
    );
    let names: Vec<_> = result["interfaces"].as_array().unwrap().iter().map(|interface| interface["name"].clone()).collect();
    let host_ends = [0, 1].map(|index| host_veth_name("eni", &pod.name, index));
    assert_eq!(names, [json!(host_ends[0]), json!("eth0"), json!(host_ends[1]), json!("mNicIf1")]);
    let told = site.script.lock().unwrap().activations.last().unwrap().endpoints.clone();
    let told: Vec<_> = told.iter().map(|endpoint| (endpoint.host_if_name.as_str(), endpoint.ipv6.as_str())).collect();
    assert_eq!(told, [(host_ends[0].as_str(), ADDRESSES[0]), (host_ends[1].as_str(), ADDRESSES[1])], "policy is put on each");
    assert_eq!(about(), [(512, json!("main")), (512, json!("main")), (1536, json!("10101"))]);
    for (address, interface) in ADDRESSES.into_iter().zip(["eth0", "mNicIf1"]) {
        let route = ip(&pod.netns.0, &["-6", "route", "get", "2001:db8:2::1", "from", address]);
        assert_eq!(route[0]["dev"], interface, "{route}");
        run(&site.node.0, &format!("ping -6 -c 1 -W 2 -I 2001:db8:2::1 {address}"));
    }

    let check = site.call("CHECK", &pod, json!({"prevResult": result})).await;
    assert!(check.ok, "{check:?}");
    let del = site.call("DEL", &pod, json!({"prevResult": result})).await;
    assert!(del.ok, "{del:?}");
    assert_eq!((about(), site.picture()), (Vec::new(), before));
    assert_eq!(ip(&pod.netns.0, &["link"]).as_array().unwrap().len(), 1);
    assert!(site.script.lock().unwrap().held.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_del_may_come_in_every_state() {
    let mut site = Site::start().await;
    let before = site.picture();
    // Twice, and without the earlier result.
    let pod = site.pod("a");
    site.add(&pod).await;
    for _ in 0..2 {
        assert!(site.call("DEL", &pod, json!({})).await.ok);
        assert_eq!(site.picture(), before);
    }
    // The namespace is gone, with and without the earlier result.
    for with_result in [true, false] {
        let pod = site.pod("b");
        let result = site.add(&pod).await;
        pod.netns.0.clone().remove().unwrap();
        let extra = if with_result { json!({"prevResult": result}) } else { json!({}) };
        let del = site.call("DEL", &pod, extra).await;
        assert!(del.ok, "{del:?}");
        assert!(site.script.lock().unwrap().held.is_empty());
        assert_eq!(site.picture(), before, "nothing waits for the kernel to dismantle the namespace");
    }
    // The agent is gone: what is the kernel's goes now, the release waits in the spool, once.
    let pod = site.pod("c");
    let result = site.add(&pod).await;
    site.kill_agent().await;
    for _ in 0..2 {
        let del = site.call("DEL", &pod, json!({"prevResult": result})).await;
        assert!(del.ok, "{del:?}");
    }
    assert_eq!(site.picture(), before);
    let spooled: Vec<_> = std::fs::read_dir(site.spool()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(spooled.len(), 1);
    let spooled = stanchion_core::cni::Spooled::parse(&std::fs::read(&spooled[0]).unwrap()).unwrap();
    assert_eq!((spooled.container_id, spooled.network_name.as_str(), spooled.if_name.as_str()), (pod.container.clone(), "aws-cni", "eth0"));
}

/// A pod may give its interfaces other names, and its namespace may live on in a process that was handed it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_del_takes_interfaces_that_the_pod_has_renamed() {
    let site = Site::start().await;
    site.script.lock().unwrap().egress = "v6if0".to_owned();
    let before = site.picture();
    for with_result in [true, false] {
        let pod = site.pod("a");
        let result = site.add(&pod).await;
        for (name, other) in [("eth0", "mine"), ("v6if0", "mine6")] {
            run(&pod.netns.0, &format!("ip link set {name} down"));
            run(&pod.netns.0, &format!("ip link set {name} name {other}"));
            run(&pod.netns.0, &format!("ip link set {other} up"));
        }
        let extra = if with_result { json!({"prevResult": result}) } else { json!({}) };
        let del = site.call("DEL", &pod, extra).await;
        assert!(del.ok, "{del:?}");
        assert_eq!(site.picture(), before);
        assert_eq!(ip(&pod.netns.0, &["link"]).as_array().unwrap().len(), 1, "only lo is left in the pod");
    }
}

/// The second interface of a pod `db` is called as the first of a pod `db.1`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_of_another_pod_is_not_taken_for_its_name() {
    let site = Site::start().await;
    let (first, second) = (site.pod("db.1"), site.pod("db"));
    site.add(&first).await;
    let before = site.picture();
    let index = ip(&site.node.0, &["link", "show", &site.host_if(&first)])[0]["ifindex"].clone();
    {
        let mut script = site.script.lock().unwrap();
        (script.at_a_time, script.held_by) = (2, "default/db.1".to_owned());
    }
    let refused = site.call("ADD", &second, json!({})).await;
    let error: Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!((refused.ok, &error["code"], error.get("details")), (false, &json!(11), None), "{error}");
    assert!(error["msg"].as_str().unwrap().contains("is that of the pod default/db.1"), "{error}");
    assert_eq!(site.picture(), before, "nothing of the one is left, and all of the other");
    assert_eq!(ip(&site.node.0, &["link", "show", &site.host_if(&first)])[0]["ifindex"], index);
    assert!(!site.script.lock().unwrap().held.contains_key(&second.container), "its addresses came back");
    // The other ended, and its DEL was lost.
    site.script.lock().unwrap().held_by.clear();
    site.add(&second).await;
    assert_ne!(ip(&site.node.0, &["link", "show", &site.host_if(&first)])[0]["ifindex"], index);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_add_that_fails_leaves_nothing() {
    let mut site = Site::start().await;
    let before = site.picture();

    let refused = |answer: &cni_support::Answer, code: u64, words: &str| {
        let error: Value = serde_json::from_str(&answer.stdout).unwrap_or_else(|_| panic!("{answer:?}"));
        assert!(!answer.ok);
        assert_eq!(error["code"], code, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(words), "{error}");
        assert_eq!(error["cniVersion"], "1.1.0");
        assert_eq!(error.get("details"), None, "undoing had problems: {error}");
    };
    // No address: the agent's reason reaches the kubelet.
    let reason = "no free address: ENI 2 of 3 full, subnet-0a1 has 0 free of 251, EC2 said InsufficientFreeAddressesInSubnet";
    site.script.lock().unwrap().fail_assign = Some(Status::resource_exhausted(reason));
    let pod = site.pod("a");
    refused(&site.call("ADD", &pod, json!({})).await, 11, "subnet-0a1 has 0 free of 251");
    site.script.lock().unwrap().fail_assign = None;
    // The policy cannot be put in force.
    site.script.lock().unwrap().fail_activate = Some(Status::internal("the pod's programs cannot be attached: no memory"));
    refused(&site.call("ADD", &pod, json!({})).await, 5, "no memory");
    assert_eq!(ip(&pod.netns.0, &["link"]).as_array().unwrap().len(), 1);
    site.script.lock().unwrap().fail_activate = None;
    // The pod's interface name is taken, by something that is not ours to remove.
    let taken = site.pod("b");
    run(&taken.netns.0, "ip link add eth0 type bridge");
    refused(&site.call("ADD", &taken, json!({})).await, 100, "create veth eth0");
    assert_eq!(ip(&taken.netns.0, &["link", "show", "eth0"])[0]["linkinfo"], Value::Null);
    assert_eq!(ip(&taken.netns.0, &["link"]).as_array().unwrap().len(), 2, "the bridge is still there");
    // The veth goes while it is being set up, sooner or later.
    site.script.lock().unwrap().cut_at_activation = true;
    let cut = site.pod("cut");
    refused(&site.call("ADD", &cut, json!({})).await, 100, "(os error 19)");
    site.script.lock().unwrap().cut_at_activation = false;
    assert_eq!(site.picture(), before);
    assert!(site.script.lock().unwrap().held.is_empty(), "every address came back");
    // The namespace is none; nobody is asked.
    let gone = site.pod("gone");
    gone.netns.0.clone().remove().unwrap();
    let asked = site.script.lock().unwrap().released.len();
    refused(&site.call("ADD", &gone, json!({})).await, 3, "no network namespace");
    assert_eq!(site.script.lock().unwrap().released.len(), asked);
    // The agent is away.
    site.kill_agent().await;
    refused(&site.call("ADD", &pod, json!({})).await, 11, "does not answer");
    assert_eq!(site.picture(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_del_of_an_old_sandbox_does_not_hurt_the_new_one() {
    let site = Site::start().await;
    let (old, mut new) = (site.pod("db-0"), site.pod("x"));
    new.name = old.name.clone();
    let old_result = site.add(&old).await;
    let new_result = site.add(&new).await;
    assert!(site.call("DEL", &old, json!({"prevResult": old_result})).await.ok);
    let check = site.call("CHECK", &new, json!({"prevResult": new_result})).await;
    assert!(check.ok, "{check:?}");
    // Its address goes to another pod; then the runtime repeats the old DEL.
    site.script.lock().unwrap().free.push_front(attachment("10.0.1.9", 2));
    let other = site.pod("other");
    let other_result = site.add(&other).await;
    assert_eq!(other_result["ips"][0]["address"], "10.0.1.9/32");
    assert!(site.call("DEL", &old, json!({"prevResult": old_result})).await.ok);
    assert_eq!(rules_about(&site, "10.0.1.9"), [512, 1536]);
    let check = site.call("CHECK", &other, json!({"prevResult": other_result})).await;
    assert!(check.ok, "{check:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_tells_each_difference() {
    let site = Site::start().await;
    let pod = site.pod("a");
    let result = site.add(&pod).await;
    let host_if = site.host_if(&pod);
    run(&site.node.0, "ip rule del pref 512");
    run(&site.node.0, "ip route del 10.0.1.9");
    run(&pod.netns.0, "ip addr del 10.0.1.9/32 dev eth0");
    site.script.lock().unwrap().differences = vec!["the agent holds 10.0.1.7".into()];
    let answer = site.call("CHECK", &pod, json!({"prevResult": result})).await;
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(error["code"], 101);
    let rule = "the node has no rule 512 to 10.0.1.9".to_owned();
    for words in [rule, format!("no route to 10.0.1.9 by {host_if}"), "eth0 lacks 10.0.1.9".into(), "the agent holds 10.0.1.7".into()] {
        assert!(error["msg"].as_str().unwrap().contains(&words), "{error}");
    }
    assert!(!site.call("CHECK", &pod, json!({})).await.ok, "without prevResult there is nothing to compare");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbs_about_no_container() {
    let mut site = Site::start().await;
    let nobody = |verb: &str| vec![("CNI_COMMAND".to_owned(), verb.to_owned()), ("CNI_CONTAINERID".to_owned(), String::new())];
    assert!(site.exec(nobody("STATUS"), &site.conf()).await.ok);
    site.script.lock().unwrap().not_ready = Some("subnet-1 has no free address".into());
    let answer = site.exec(nobody("STATUS"), &site.conf()).await;
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!((&error["code"], &error["msg"]), (&json!(50), &json!("subnet-1 has no free address")));

    let mut conf = site.conf();
    conf["name"] = json!("no-pods-here");
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "a", "ifname": "eth0"}]);
    assert!(site.exec(nobody("GC"), &conf).await.ok);
    assert_eq!(site.script.lock().unwrap().collected[0].valid[0].container_id, "a");

    let answer = site.exec(nobody("VERSION"), &json!({"cniVersion": "1.0.0"})).await;
    let version: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(version, json!({"cniVersion": "1.0.0", "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]}));

    site.kill_agent().await;
    let answer = site.exec(nobody("STATUS"), &site.conf()).await;
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(error["code"], 50);
    // Once pods could be connected in this boot, an agent that is away does not make the node NotReady.
    let mark = stanchion_core::conflist::ready_mark(&site.socket());
    std::fs::write(&mark, "of an earlier boot").unwrap();
    assert!(!site.exec(nobody("STATUS"), &site.conf()).await.ok);
    std::fs::copy("/proc/sys/kernel/random/boot_id", &mark).unwrap();
    assert!(site.exec(nobody("STATUS"), &site.conf()).await.ok);
}

/// Each runtime's calls in their order, with the sandbox's real namespace in the place of the recorded one.
async fn replay(dir: &str) {
    let site = Site::start().await;
    let before = site.picture();
    let mut sandboxes = std::collections::BTreeMap::new();
    for (file, call) in recorded(dir) {
        let mut env: Vec<(String, String)> =
            call["env"].as_object().unwrap().iter().map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned())).collect();
        let container = call["env"]["CNI_CONTAINERID"].as_str().unwrap().to_owned();
        let netns = sandboxes.entry(container.clone()).or_insert_with(|| cni_support::OwnedNetns::create("r"));
        env.iter_mut()
            .filter(|(key, value)| key == "CNI_NETNS" && !value.is_empty())
            .for_each(|(_, value)| *value = netns.0.path().display().to_string());
        let mut conf = call["stdin"].clone();
        conf["socket"] = json!(site.socket());
        let answer = site.exec(env, &conf).await;
        assert!(answer.ok, "{dir}/{file}: {answer:?}");
        if call["verb"] == "ADD" {
            let result: Value = serde_json::from_str(&answer.stdout).unwrap();
            assert_eq!(result["cniVersion"], conf["cniVersion"], "{dir}/{file}");
            assert!(site.script.lock().unwrap().held.contains_key(&container), "{dir}/{file}");
        }
        if call["verb"] == "DEL" {
            assert!(!site.script.lock().unwrap().held.contains_key(&container), "{dir}/{file}");
        }
    }
    if site.script.lock().unwrap().held.is_empty() {
        assert_eq!(site.picture(), before);
    }
    let uids = site.script.lock().unwrap().activations.iter().all(|request| !request.sandbox.as_ref().unwrap().pod_uid.is_empty());
    assert!(uids, "containerd tells the pod's uid");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_calls_of_containerd_1_6() {
    replay("cni-containerd-1.6").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_calls_of_containerd_2_3() {
    replay("cni-containerd-2.3").await;
}

/// The journal's directory is aws-node's, which a new node does not have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_journal_is_written_where_its_directory_was_not_there() {
    let site = Site::start().await;
    let pod = site.pod("a");
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("aws-routed-eni/plugin.log");
    let answer = site.call("ADD", &pod, json!({"pluginLogFile": journal, "pluginLogLevel": "debug"})).await;
    assert!(answer.ok, "{answer:?}");
    let text = std::fs::read_to_string(&journal).unwrap();
    assert!(text.contains("verb=Add") && text.contains("outcome=ok"), "{text}");
}

/// A node without the CNI project's plugins: ours brings up `lo` when it is executed as `loopback`, as containerd does it.
#[test]
fn executed_as_loopback_it_brings_up_lo() {
    let pod = cni_support::OwnedNetns::create("lo");
    run(&pod.0, "ip link set lo down");
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("loopback");
    std::os::unix::fs::symlink(cni_support::plugin(), &program).unwrap();
    let sandbox = pod.0.path().display().to_string();
    let call = |verb: &str| {
        let mut command = std::process::Command::new(&program);
        command.env_clear().envs(counters()).envs([
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "lo"),
            ("CNI_NETNS", &sandbox),
        ]);
        command.env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=x;K8S_POD_NAME=a").env("CNI_PATH", directory.path());
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let conf = json!({"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"});
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), conf.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (ok, differs) = call("CHECK");
    assert!(!ok && differs.contains("lo is down"), "{differs}");
    let (ok, result) = call("ADD");
    assert!(ok, "{result}");
    let result: Value = serde_json::from_str(&result).unwrap();
    assert_eq!(result["interfaces"], json!([{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": sandbox}]));
    assert_eq!(result["ips"][0], json!({"interface": 0, "address": "127.0.0.1/8", "version": "4"}));
    assert!(ip(&pod.0, &["link", "show", "lo"])[0]["flags"].to_string().contains("\"UP\""));
    for verb in ["CHECK", "DEL", "DEL"] {
        assert_eq!(call(verb), (true, String::new()), "{verb}");
    }
}
