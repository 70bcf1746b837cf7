//! What a node still has of its pods.

use std::fs;
use std::path::Path;

use crate::netns::ip_json;
use crate::node::Node;
use anyhow::Context;
use serde_json::Value;

/// Everything on the node that belongs to some pod, one sentence each.
pub fn of_pods(node: &Node) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for link in list(&ip_json(node.netns(), &["link", "show"])?) {
        let name = text(&link["ifname"]);
        if name != "lo" && !name.starts_with("eth") {
            found.push(format!("{}: the interface {name}", node.name()));
        }
    }
    for family in ["-4", "-6"] {
        for rule in list(&ip_json(node.netns(), &[family, "rule", "show"])?) {
            if matches!(rule["priority"].as_u64(), Some(10 | 512 | 1536)) {
                found.push(format!("{}: the rule {rule}", node.name()));
            }
        }
        for route in list(&ip_json(node.netns(), &[family, "route", "show", "table", "all"])?) {
            let device = text(&route["dev"]);
            if device != "lo" && !device.is_empty() && !device.starts_with("eth") {
                found.push(format!("{}: the route {route}", node.name()));
            }
        }
    }
    let allocations = checkpoint(node)?;
    if allocations > 0 {
        found.push(format!("{}: {allocations} allocations in the checkpoint", node.name()));
    }
    files_in(&node.spool(), &mut |path| found.push(format!("{}: the file {}", node.name(), path.display())));
    // Programs and maps are the node's; a link pinned for a pod's interface is the pod's.
    files_in(node.bpf_dir(), &mut |path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.contains("eni") || name.contains("vlan") {
            found.push(format!("{}: the pin {}", node.name(), path.display()));
        }
    });
    Ok(found)
}

/// Allocations in the node's checkpoint file.
fn checkpoint(node: &Node) -> anyhow::Result<usize> {
    let path = node.checkpoint();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let json: Value = serde_json::from_str(&text)?;
    anyhow::ensure!(json["version"] == "vpc-cni-ipam/1", "the checkpoint is of version {}", json["version"]);
    Ok(list(&json["allocations"]).len())
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn files_in(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_in(&path, visit);
        } else {
            visit(&path);
        }
    }
}
