//! What a node still has of its pods.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::Context;
use aya::maps::{MapData, MapInfo, MapType};
use serde_json::Value;
use stanchion_ebpf_abi::{LAYOUT_VERSION, map_name};

use crate::datapath::raw;
use crate::netns::ip_json;
use crate::node::Node;

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
    // Programs and maps are the node's; a link is pinned for a pod's interface.
    let pins = node.bpf_dir().join(format!("v{LAYOUT_VERSION}"));
    files_in(&pins.join("links"), &mut |path| found.push(format!("{}: the pin {}", node.name(), path.display())));
    for map in OF_PODS {
        let left = entries(&pins.join(map)).with_context(|| format!("read the map {map} of {}", node.name()))?;
        if left > 0 {
            found.push(format!("{}: {left} entries of {map}", node.name()));
        }
    }
    Ok(found)
}

/// Maps that have something only while there are pods: which veths they are behind, which addresses are theirs, what they may.
pub(crate) const OF_PODS: [&str; 4] = [map_name::INTERFACES, map_name::INTERFACES_FAR, map_name::OWN, map_name::VERDICTS];

/// Entries of a pinned map, of an array those that are not zero; none where no agent has made it.
pub(crate) fn entries(pin: &Path) -> anyhow::Result<usize> {
    if !pin.exists() {
        return Ok(0);
    }
    let info = MapInfo::from_pin(pin)?;
    let array = info.map_type()? == MapType::Array;
    let map = MapData::from_pin(pin)?;
    let entries = raw::entries(map.fd().as_fd(), info.key_size(), info.value_size())?;
    Ok(entries.iter().filter(|(_, value)| !array || value.iter().any(|byte| *byte != 0)).count())
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
