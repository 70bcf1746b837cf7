//! What a kubelet's `/stats/summary` says that the kernel does not: how much of the disk each container's own files take.
//!
//! Under containerd and CRI-O only the runtime knows a writable layer's size, and the kubelet asks it; cAdvisor's
//! `/metrics/cadvisor` has no such figure there.
//! <https://kubernetes.io/docs/reference/instrumentation/node-metrics/>

use std::collections::HashMap;

use serde::Deserialize;

use super::model::FilesystemSize;
use super::track::ContainerFiles;

#[derive(Deserialize)]
struct Summary {
    #[serde(default)]
    pods: Vec<Pod>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pod {
    pod_ref: PodRef,
    #[serde(default)]
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct PodRef {
    #[serde(default)]
    uid: String,
}

#[derive(Deserialize)]
struct Container {
    name: String,
    rootfs: Option<Usage>,
}

/// Every figure may be absent: a container that just started, a runtime that does not tell.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Usage {
    used_bytes: Option<u64>,
    capacity_bytes: Option<u64>,
    available_bytes: Option<u64>,
    inodes: Option<u64>,
    inodes_free: Option<u64>,
}

/// The containers' own files, by the pod's uid (a static pod's is its configuration's hash, as its cgroup has it).
///
/// # Errors
/// When the text is no summary.
pub fn container_files(summary: &[u8]) -> Result<ContainerFiles, serde_json::Error> {
    let summary: Summary = serde_json::from_slice(summary)?;
    let mut out = HashMap::with_capacity(summary.pods.len());
    for pod in summary.pods {
        let files: Vec<_> = pod.containers.into_iter().filter_map(|container| Some((container.name, size(&container.rootfs?)?))).collect();
        if !files.is_empty() {
            out.insert(pod.pod_ref.uid, files);
        }
    }
    Ok(out)
}

fn size(usage: &Usage) -> Option<FilesystemSize> {
    Some(FilesystemSize {
        usage: usage.used_bytes?,
        capacity: usage.capacity_bytes?,
        available: usage.available_bytes?,
        inodes: usage.inodes.unwrap_or(0),
        inodes_free: usage.inodes_free.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RECORDED: &[u8] = include_bytes!("../../testdata/kubelet/stats-summary.json");

    #[test]
    fn a_recorded_summary() {
        let files = container_files(RECORDED).unwrap();
        let all: Vec<_> = files.values().flatten().collect();
        assert_eq!((files.len(), all.len()), (3, 3));
        let [(name, size)] = &files["4e648617-793e-457d-aae6-949af5a2cb2a"][..] else { panic!("one container") };
        assert_eq!(name, "c");
        assert_eq!((size.usage, size.capacity, size.available), (28_672, 270_553_174_016, 65_034_383_360));
        assert_eq!((size.inodes, size.inodes_free), (16_777_216, 16_013_032));
    }

    #[test]
    fn what_is_not_told_is_left_out() {
        let text = br#"{"node":{},"pods":[
            {"podRef":{"name":"a","namespace":"b","uid":"u"},"containers":[{"name":"new"},{"name":"odd","rootfs":{"capacityBytes":1}},
             {"name":"told","rootfs":{"usedBytes":1,"capacityBytes":4,"availableBytes":2}}]},
            {"podRef":{"name":"empty","namespace":"b","uid":"v"}}]}"#;
        let files = container_files(text).unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files["u"].iter().map(|(name, size)| (name.as_str(), size.usage)).collect::<Vec<_>>(), [("told", 1)]);
        assert!(container_files(b"{}").unwrap().is_empty());
        assert!(container_files(b"Unauthorized").is_err());
    }

    proptest! {
        #[test]
        fn cut_or_changed_anywhere_nothing_panics(end in 0usize..RECORDED.len(), at in 0usize..RECORDED.len(), byte: u8) {
            let _ = container_files(&RECORDED[..end]);
            let mut changed = RECORDED.to_vec();
            changed[at] = byte;
            let _ = container_files(&changed);
        }
    }
}
