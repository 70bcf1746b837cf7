//! Results, ours and those that come back as `prevResult`, also from pods that aws-node created.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{CniError, ErrorCode};
use super::version::Version;
use crate::ids::{Mac, PodName};
use crate::network::names::{MAIN_TABLE, eni_route_table, upstream_dummy_name};

/// What an ADD returns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CniResult {
    /// Host ends and pod ends, in pairs.
    pub interfaces: Vec<Interface>,
    /// The pod's addresses.
    pub ips: Vec<IpConfig>,
}

/// An interface of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its real Ethernet address.
    pub mac: Mac,
    /// In bytes; told from 1.1.0 on.
    pub mtu: u32,
    /// The pod's namespace; `None` on the host.
    pub sandbox: Option<String>,
}

/// An address of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpConfig {
    /// Which interface of the list.
    pub interface: usize,
    /// /32 or /128.
    pub address: IpNet,
    /// The pod's next hop.
    pub gateway: IpAddr,
}

/// A result that came back, as much of it as is needed: every version's, aws-node's too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrevResult {
    /// As it came, to be passed on.
    pub json: Value,
    /// Names, addresses as text (aws-node puts other things there), namespaces.
    pub interfaces: Vec<PrevInterface>,
    /// The pod's addresses.
    pub ips: Vec<PrevIp>,
}

/// An interface of a result that came back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PrevInterface {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its Ethernet address, or with aws-node a routing table or VLAN id.
    #[serde(default)]
    pub mac: String,
    /// The namespace, or with aws-node's dummy a device number.
    #[serde(default)]
    pub sandbox: String,
}

/// An address of a result that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrevIp {
    /// The address.
    pub address: IpAddr,
    /// Which interface of the list.
    pub interface: Option<usize>,
}

/// What aws-node's result says of a pod that it created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamPod {
    /// Non-zero: the pod has a branch ENI with this VLAN.
    pub vlan_id: u16,
    /// Host ends with address and routing table.
    pub attachments: Vec<UpstreamAttachment>,
}

/// One attachment of a pod that aws-node created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamAttachment {
    /// The host end's name.
    pub host_if: String,
    /// The pod's address.
    pub address: IpAddr,
    /// The table of its ENI.
    pub table: u32,
}

// === impl CniResult ===

impl CniResult {
    /// As the runtime's version wants it.
    pub fn to_json(&self, version: Version) -> Value {
        let interfaces: Vec<Value> = self
            .interfaces
            .iter()
            .map(|interface| {
                let mut value = json!({"name": interface.name, "mac": interface.mac});
                if version >= Version::V110 {
                    value["mtu"] = interface.mtu.into();
                }
                if let Some(sandbox) = &interface.sandbox {
                    value["sandbox"] = sandbox.clone().into();
                }
                value
            })
            .collect();
        let ips: Vec<Value> = self
            .ips
            .iter()
            .map(|ip| {
                let mut value = json!({"interface": ip.interface, "address": ip.address, "gateway": ip.gateway});
                if version < Version::V100 {
                    value["version"] = if ip.address.addr().is_ipv4() { "4" } else { "6" }.into();
                }
                value
            })
            .collect();
        let mut result = json!({"cniVersion": version.as_str(), "interfaces": interfaces, "ips": ips});
        if version < Version::V100 {
            result["dns"] = json!({});
        }
        result
    }
}

// === impl PrevResult ===

impl PrevResult {
    /// Reads a result of any version.
    ///
    /// # Errors
    /// Code 6 for what is none.
    pub fn from_json(json: Value) -> Result<Self, CniError> {
        #[derive(Deserialize)]
        struct Wire {
            #[serde(default)]
            interfaces: Option<Vec<PrevInterface>>,
            #[serde(default)]
            ips: Option<Vec<WireIp>>,
        }
        #[derive(Deserialize)]
        struct WireIp {
            address: String,
            interface: Option<usize>,
        }
        let unreadable = |text: String| CniError::new(ErrorCode::Decode, format!("prevResult is not readable: {text}"));
        let wire: Wire = serde_json::from_value(json.clone()).map_err(|error| unreadable(error.to_string()))?;
        let mut ips = Vec::new();
        for WireIp { address, interface } in wire.ips.unwrap_or_default() {
            // With or without a prefix length: only the address counts.
            let host = address.split('/').next().unwrap_or_default();
            let address = host.parse().map_err(|error| unreadable(format!("address {address:?}: {error}")))?;
            ips.push(PrevIp { address, interface });
        }
        Ok(Self { json, interfaces: wire.interfaces.unwrap_or_default(), ips })
    }

    /// What it says if aws-node made it for this pod; `None` for our own and others' results.
    ///
    /// aws-node writes, for each attachment, the host end and the pod end whose `mac` is the routing table (from 1.20 on;
    /// before it was empty), then a dummy interface whose `mac` is the VLAN id and whose `sandbox` the device number.
    pub fn upstream(&self, pod: &PodName) -> Option<UpstreamPod> {
        let dummy_name = upstream_dummy_name(pod);
        let dummy = self.interfaces.iter().find(|interface| interface.name == dummy_name)?;
        let vlan_id = dummy.mac.parse().unwrap_or(0);
        let device_table = dummy.sandbox.parse().map_or(MAIN_TABLE, |device| eni_route_table(0, device));
        let attachments = self
            .ips
            .iter()
            .filter_map(|ip| {
                let pod_end = ip.interface?;
                let host_if = self.interfaces.get(pod_end.checked_sub(1)?)?.name.clone();
                let table = self.interfaces.get(pod_end)?.mac.parse().unwrap_or(device_table);
                Some(UpstreamAttachment { host_if, address: ip.address, table })
            })
            .collect();
        Some(UpstreamPod { vlan_id, attachments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> CniResult {
        let interface = |name: &str, sandbox: Option<&str>| Interface {
            name: name.into(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 9001,
            sandbox: sandbox.map(str::to_owned),
        };
        CniResult {
            interfaces: vec![interface("eni1", None), interface("eth0", Some("/run/netns/x"))],
            ips: vec![IpConfig { interface: 1, address: "10.0.0.9/32".parse().unwrap(), gateway: "169.254.1.1".parse().unwrap() }],
        }
    }

    #[test]
    fn each_version_gets_its_own_shape() {
        let old = result().to_json(Version::V031);
        assert_eq!((&old["ips"][0]["version"], &old["dns"]), (&json!("4"), &json!({})));
        assert_eq!(old["interfaces"][0].get("mtu"), None);
        let middle = result().to_json(Version::V100);
        assert_eq!((middle["ips"][0].get("version"), middle.get("dns")), (None, None));
        let new = result().to_json(Version::V110);
        assert_eq!(new["interfaces"][1], json!({"name":"eth0","mac":"02:00:00:00:00:01","mtu":9001,"sandbox":"/run/netns/x"}));
        assert_eq!(new["ips"][0], json!({"interface":1,"address":"10.0.0.9/32","gateway":"169.254.1.1"}));
    }

    #[test]
    fn our_own_results_come_back_whole() {
        for version in Version::ALL {
            let back = PrevResult::from_json(result().to_json(version)).unwrap();
            assert_eq!(back.interfaces[1].sandbox, "/run/netns/x");
            assert_eq!(back.ips, [PrevIp { address: "10.0.0.9".parse().unwrap(), interface: Some(1) }]);
            assert_eq!(back.upstream(&PodName::new("default", "sample-pod")), None, "real MACs are no tables");
        }
    }

    #[test]
    fn pods_of_aws_node_are_understood() {
        let pod = PodName::new("default", "sample-pod");
        let made = |table: &str, vlan: &str, device: &str| {
            let json = json!({"cniVersion":"0.4.0","interfaces":[{"name":"enicc21c2d7785"},{"name":"eth0","sandbox":"/proc/42/ns/net","mac":table},
                {"name":"dummycc21c2d7785","mac":vlan,"sandbox":device}],"ips":[{"version":"4","address":"10.0.1.9/32","interface":1}],"dns":{}});
            PrevResult::from_json(json).unwrap().upstream(&pod).unwrap()
        };
        let attachment = |table| UpstreamAttachment { host_if: "enicc21c2d7785".into(), address: "10.0.1.9".parse().unwrap(), table };
        assert_eq!(made("3", "0", "2"), UpstreamPod { vlan_id: 0, attachments: vec![attachment(3)] });
        assert_eq!(made("", "0", "2").attachments, [attachment(3)], "before 1.20 only the device number was told");
        assert_eq!(made("", "0", "0").attachments, [attachment(254)]);
        assert_eq!(made("", "7", "0").vlan_id, 7);
    }

    #[test]
    fn half_a_result_is_no_reason_to_fail() {
        let nothing = PrevResult::from_json(json!({"cniVersion":"1.0.0","interfaces":null})).unwrap();
        assert!(nothing.ips.is_empty());
        assert_eq!(PrevResult::from_json(json!({"ips":[{"address":"ten"}]})).unwrap_err().code, ErrorCode::Decode);
    }
}
