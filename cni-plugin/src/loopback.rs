//! The plugin `loopback`, when executed under that name: runtimes call it for every pod before ours, and a node without the CNI
//! project's plugins has none. `lo` goes up; its namespace takes everything along when it goes.

use serde_json::{Value, json};
use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf, Verb, Version};
use stanchion_core::network::NetOp;

use crate::sandbox;

/// The name of the program and of the plugin's type.
pub(crate) const NAME: &str = "loopback";
const INTERFACE: &str = "lo";

/// Performs the call; `None`: nothing is to be printed.
pub(crate) fn call(stdin: &[u8]) -> Result<Option<Value>, CniError> {
    let invocation = Invocation::from_env(|name| std::env::var(name).ok())?;
    let asked = NetConf::peek_version(stdin);
    if invocation.verb == Verb::Version {
        return Ok(Some(Version::report(asked.as_deref())));
    }
    let version = Version::negotiate(asked.as_deref().unwrap_or_default())?;
    match invocation.verb {
        Verb::Add => add(&invocation, version).map(Some),
        Verb::Check => check(&invocation).map(|()| None),
        Verb::Del | Verb::Gc | Verb::Status | Verb::Version => Ok(None),
    }
}

fn add(invocation: &Invocation, version: Version) -> Result<Value, CniError> {
    let path = invocation.netns.as_deref().unwrap_or_else(|| "".as_ref());
    let mut pod = sandbox::netlink_in(&sandbox::open_netns(path, false)?)?;
    let index = pod.link_index(INTERFACE).map_err(|error| sandbox::kernel_error(&error))?;
    pod.perform_all(&[NetOp::LinkUp { index }]).map_err(|error| sandbox::kernel_error(&error))?;
    let addresses = pod.addresses().map_err(|error| sandbox::kernel_error(&error))?;
    let on_lo = addresses.iter().filter(|present| present.index == index);
    let ips: Vec<Value> = on_lo
        .map(|present| {
            let mut ip = json!({"interface": 0, "address": present.address});
            if version < Version::V100 {
                ip["version"] = if present.address.addr().is_ipv4() { "4" } else { "6" }.into();
            }
            ip
        })
        .collect();
    let interface = json!({"name": INTERFACE, "mac": "00:00:00:00:00:00", "sandbox": path.display().to_string()});
    Ok(json!({"cniVersion": version.as_str(), "interfaces": [interface], "ips": ips}))
}

fn check(invocation: &Invocation) -> Result<(), CniError> {
    let path = invocation.netns.as_deref().unwrap_or_else(|| "".as_ref());
    let mut pod = sandbox::netlink_in(&sandbox::open_netns(path, false)?)?;
    let facts = pod.link(INTERFACE).map_err(|error| sandbox::kernel_error(&error))?;
    if facts.is_some_and(|facts| facts.link.up) { Ok(()) } else { Err(CniError::new(ErrorCode::Differs, "lo is down")) }
}
