//! A pod that takes the name of one whose lines are not all read: they stay the first one's.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs::{self, File};
use std::io::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use stanchion_core::cluster::{ClusterState, Object};
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::logs::{Now, Restored, Tailer, TailerParts};

fn cluster(uid: &str, team: &str, annotations: Value) -> Arc<ClusterState> {
    let pod = json!({
        "metadata": {"name": "web-0", "namespace": "shop", "uid": uid, "labels": {"team": team}, "annotations": annotations},
        "spec": {"nodeName": "n", "containers": [{"name": "app", "image": "i"}]},
        "status": {},
    });
    let mut cluster = ClusterState { synced: true, ..ClusterState::default() };
    cluster.apply(Object::Pod(serde_json::from_value(pod).unwrap()));
    Arc::new(cluster)
}

/// Groups and records of lines that a pod with these annotations wrote before another pod took its name, and that are read after it.
fn after_replacement(annotations: Value) -> Vec<(String, Value)> {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("shop_web-0_uid-a/app");
    fs::create_dir_all(&dir).unwrap();
    let mut file = File::create(dir.join("0.log")).unwrap();
    let settings = LogSettings { age: None, group: "{label:team}".to_owned().try_into().unwrap(), ..LogSettings::new(Layout::FluentBit) };
    let parts = TailerParts { settings, log_dir: root.path().to_owned(), node: "n".into(), cluster_name: "c".into() };
    let mut tailer = Tailer::new(parts, Restored::Fresh);
    let now = Now { mono: 0, wall: 1_795_168_800_000 };
    tailer.set_cluster(cluster("uid-a", "x", annotations));
    tailer.scan(now).unwrap();
    writeln!(file, "2026-11-20T10:00:00Z stdout F last words").unwrap();
    tailer.set_cluster(cluster("uid-b", "y", json!({})));
    let now = Now { mono: 10_000, ..now };
    tailer.turn(now);
    tailer.seal_all();
    let sealed = tailer.take_ready();
    assert_eq!(tailer.counters_mut().lines_read, 1);
    let events = sealed.iter().flat_map(|sealed| sealed.batch.events().map(|event| (sealed.batch.group().to_owned(), event.message)));
    events.map(|(group, message)| (group, serde_json::from_str(&message).unwrap())).collect()
}

#[test]
fn a_replaced_pods_lines_keep_its_identity() {
    let events = after_replacement(json!({}));
    assert_eq!(events.len(), 1);
    let (group, record) = &events[0];
    assert_eq!((group.as_str(), &record["kubernetes"]["pod_id"]), ("x", &json!("uid-a")));
}

#[test]
fn a_replaced_pods_lines_stay_excluded() {
    assert_eq!(after_replacement(json!({"fluentbit.io/exclude": "true"})), []);
}
