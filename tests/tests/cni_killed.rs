//! kill -9 of the plugin at every system call of an ADD: the runtime's DEL leaves nothing behind, and the next ADD succeeds.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, ExitStatus, Stdio};

use cni_support::{Pod, Site};
use serde_json::json;
use stanchion_lab::binaries::counters;

/// ADD under strace; `inject` is its fault, `log` gets the system calls.
fn add(site: &Site, pod: &Pod, log: &std::path::Path, inject: Option<&str>) -> ExitStatus {
    let mut command = Command::new("/usr/bin/strace");
    command.env_clear().envs(counters()).arg("-o").arg(log);
    if let Some(inject) = inject {
        command.args(["-e", inject]);
    }
    command.arg(cni_support::plugin()).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).envs([
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", &pod.container),
        ("CNI_NETNS", &pod.netns.0.path().display().to_string()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", &format!("K8S_POD_NAME={};K8S_POD_NAMESPACE={}", pod.name.name, pod.name.namespace)),
    ]);
    let mut child = site.node.0.spawn(&mut command).expect("strace: apt-get install strace");
    // It may be dead already.
    let _ = child.stdin.take().unwrap().write_all(site.conf().to_string().as_bytes());
    child.wait().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_system_call_an_add_leaves_nothing_after_del() {
    let site = Site::start().await;
    // Enough addresses: each ADD may take another.
    let free = (0..2000u16).map(|n| cni_support::attachment(&format!("10.7.{}.{}", n / 250, n % 250 + 1), 2));
    site.script.lock().unwrap().free = free.collect();
    let before = site.picture();
    let log = site.dir.path().join("calls");
    let pod = site.pod("p");
    assert!(add(&site, &pod, &log, None).success());
    assert!(site.call("DEL", &pod, json!({})).await.ok);
    assert_eq!(site.picture(), before);
    let calls = std::fs::read_to_string(&log).unwrap();
    let names = calls.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.trim());
    let names: Vec<String> = names.filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')).map(str::to_owned).collect();
    // From the first connection to the agent on something can be left; before it only the process starts.
    let first = names.iter().position(|name| name == "connect").expect("it connects to the agent");
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    let mut kills = 0;
    for (place, name) in names.iter().enumerate() {
        let nth = seen.entry(name).or_default();
        *nth += 1;
        if place < first || name == "execve" || name == "exit_group" {
            continue;
        }
        let pod = site.pod("p");
        let status = add(&site, &pod, &log, Some(&format!("inject={name}:signal=KILL:when={nth}")));
        let at = format!("killed at call {place}: {name} number {nth}");
        kills += u32::from(!status.success());
        assert!(site.call("DEL", &pod, json!({})).await.ok, "{at}");
        assert_eq!(site.picture(), before, "{at}");
        assert!(site.script.lock().unwrap().held.is_empty(), "{at}: the address is still held");
        assert_eq!(cni_support::ip(&pod.netns.0, &["link"]).as_array().unwrap().len(), 1, "{at}: the pod still has an interface");
    }
    assert!(kills >= 20, "{kills} of {} calls were met", names.len() - first);
    let pod = site.pod("after");
    site.add(&pod).await;
}
