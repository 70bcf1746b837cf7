//! Security groups for pods: pods whose traffic has an ENI of its own, a branch of the node's trunk.
//!
//! A pod asks for one by the resource [`POD_ENI`] among its limits (AWS's webhook puts it there). AWS's resource controller then makes the
//! branch ENI with the wanted groups, ties it to the node's trunk under a VLAN id and tells of both in an annotation of the same name:
//! a list with one entry, `[{"eniId":"eni-…","ifAddress":"02:…","privateIp":"10.0.1.9","vlanId":3,"subnetCidr":"10.0.1.0/24"}]`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use serde_json::{Map, Value};

use crate::ids::{EniId, Mac};
use crate::network::branch::{BranchLink, has_table};
use crate::network::names::{DEFAULT_VETH_PREFIX, STRICT_BRANCH_PREFIX, host_veth_name, subnet_gateway};
use crate::objects::Pod;

/// The resource, and the annotation. A limit may have this as its beginning.
pub const POD_ENI: &str = "vpc.amazonaws.com/pod-eni";

/// A pod's branch ENI as the controller tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchEni {
    /// The ENI.
    pub eni: EniId,
    /// Its Ethernet address, which the VLAN interface has too.
    pub mac: Mac,
    /// The VLAN between trunk and instance; its own on this node.
    pub vlan_id: u16,
    /// The pod's address.
    pub ipv4: Option<Ipv4Addr>,
    /// The pod's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The branch's subnet: its router is the pod's way out.
    pub subnet: Option<Ipv4Net>,
}

/// How the first host veths of pods are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethNames {
    /// Of ordinary pods (`AWS_VPC_K8S_CNI_VETHPREFIX`).
    pub prefix: String,
    /// Pods with branch ENIs have the prefix of strict mode.
    pub strict_branches: bool,
}

impl Default for VethNames {
    fn default() -> Self {
        Self { prefix: DEFAULT_VETH_PREFIX.to_owned(), strict_branches: false }
    }
}

impl VethNames {
    /// The name of this pod's.
    pub fn of(&self, pod: &Pod) -> String {
        let prefix = if self.strict_branches && wants_branch(pod) { STRICT_BRANCH_PREFIX } else { &self.prefix };
        host_veth_name(prefix, &pod.full_name(), 0)
    }
}

impl BranchEni {
    /// The pod's addresses: of the cluster's family.
    pub fn addresses(&self, ipv6: bool) -> impl Iterator<Item = IpAddr> {
        let v4 = self.ipv4.filter(|_| !ipv6).map(IpAddr::V4);
        v4.into_iter().chain(self.ipv6.filter(|_| ipv6).map(IpAddr::V6))
    }

    /// The branch on the trunk with this Ethernet address.
    pub fn link(&self, trunk: Mac, strict: bool) -> BranchLink {
        BranchLink { vlan_id: self.vlan_id, mac: self.mac, trunk, gateway: self.subnet.map(subnet_gateway), strict }
    }
}

/// Why the annotation cannot be used; each sentence names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BranchError {
    /// No list with an entry.
    #[error("annotation {POD_ENI} is no JSON list with a branch ENI: {0}")]
    Shape(String),
    /// An entry without a field.
    #[error("annotation {POD_ENI} has no {0}")]
    Missing(&'static str),
    /// A field with something else in it.
    #[error("annotation {POD_ENI}: {field} is {value}, which is no {wanted}")]
    Value {
        /// Which.
        field: &'static str,
        /// What it says.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

/// Whether the pod asks for security groups of its own. Any container counts: the webhook writes to the first, a person may write to
/// another.
pub fn wants_branch(pod: &Pod) -> bool {
    let mut containers = pod.spec.containers.iter().chain(&pod.spec.init_containers);
    !pod.spec.host_network && containers.any(|container| container.resources.limits.keys().any(|name| name.starts_with(POD_ENI)))
}

/// The pod's branch ENI; `None` until the controller has written it.
///
/// # Errors
/// The annotation is there and cannot be used.
pub fn branch_of(pod: &Pod) -> Result<Option<BranchEni>, BranchError> {
    pod.metadata.annotations.get(POD_ENI).map(|text| parse(text)).transpose()
}

/// Reads the annotation's text.
///
/// # Errors
/// It cannot be used.
pub fn parse(text: &str) -> Result<BranchEni, BranchError> {
    let list: Vec<Map<String, Value>> = serde_json::from_str(text).map_err(|error| BranchError::Shape(error.to_string()))?;
    let fields = Fields(list.first().ok_or_else(|| BranchError::Shape("the list is empty".to_owned()))?);
    let vlan = fields.get("vlanId").ok_or(BranchError::Missing("vlanId"))?;
    let vlan_id = vlan.as_u64().and_then(|id| u16::try_from(id).ok()).filter(|id| has_table(*id));
    let branch = BranchEni {
        eni: fields.text("eniId").unwrap_or_default().into(),
        mac: fields.parsed("ifAddress", "Ethernet address")?.ok_or(BranchError::Missing("ifAddress"))?,
        vlan_id: vlan_id.ok_or_else(|| BranchError::Value {
            field: "vlanId",
            value: vlan.to_string(),
            wanted: "VLAN id with a routing table (1 to 4094 without 153 to 155)",
        })?,
        ipv4: fields.parsed("privateIp", "IPv4 address")?,
        ipv6: fields.parsed("ipv6Addr", "IPv6 address")?,
        subnet: fields.parsed("subnetCidr", "IPv4 CIDR")?,
    };
    match (branch.ipv4, branch.ipv6, branch.subnet) {
        (None, None, _) => Err(BranchError::Missing("privateIp")),
        (Some(_), _, None) => Err(BranchError::Missing("subnetCidr")),
        (Some(ipv4), _, Some(subnet)) if !subnet.contains(&ipv4) => {
            Err(BranchError::Value { field: "privateIp", value: ipv4.to_string(), wanted: "address of subnetCidr" })
        }
        _ => Ok(branch),
    }
}

/// An entry's fields. Their names are written in more than one case (`vlanId`, `vlanID`); Go reads them all.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(key, value)| key.eq_ignore_ascii_case(name) && !value.is_null()).map(|(_, value)| value)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str().filter(|text| !text.is_empty())
    }

    /// `None`: absent or empty, as Go writes what is not set.
    fn parsed<T: std::str::FromStr>(&self, field: &'static str, wanted: &'static str) -> Result<Option<T>, BranchError> {
        let wrong = |value: String| BranchError::Value { field, value, wanted };
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| wrong(format!("{text:?}"))),
            Some(other) => Err(wrong(other.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITTEN: &str = r#"[{"eniId":"eni-0a1","ifAddress":"02:0a:0b:0c:0d:0e","privateIp":"10.0.1.9","ipv6Addr":"","vlanId":3,"subnetCidr":"10.0.1.0/24","subnetV6Cidr":"","associationID":"trunk-assoc-1"}]"#;

    fn branch() -> BranchEni {
        BranchEni {
            eni: "eni-0a1".into(),
            mac: "02:0a:0b:0c:0d:0e".parse().unwrap(),
            vlan_id: 3,
            ipv4: Some(Ipv4Addr::new(10, 0, 1, 9)),
            ipv6: None,
            subnet: Some("10.0.1.0/24".parse().unwrap()),
        }
    }

    #[test]
    fn the_controllers_words_are_read_in_any_case() {
        assert_eq!(parse(WRITTEN), Ok(branch()));
        assert_eq!(parse(&WRITTEN.replace("vlanId", "vlanID").replace("eniId", "ENIID").replace("privateIp", "privateIP")), Ok(branch()));
        let six =
            r#"[{"eniId":"e","ifAddress":"02:00:00:00:00:01","ipv6Addr":"2001:db8::9","vlanId":4094,"subnetV6Cidr":"2001:db8::/64"}]"#;
        let read = parse(six).unwrap();
        assert_eq!((read.ipv4, read.ipv6, read.vlan_id), (None, Some("2001:db8::9".parse().unwrap()), 4094));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (text, says) in [
            ("", "no JSON list"),
            ("{}", "no JSON list"),
            ("[]", "the list is empty"),
            ("[{}]", "no vlanId"),
            (&WRITTEN.replace(":3,", ":0,"), "vlanId is 0, which is no VLAN id"),
            (&WRITTEN.replace(":3,", ":4095,"), "vlanId is 4095"),
            (&WRITTEN.replace(":3,", ":154,"), "vlanId is 154"),
            (&WRITTEN.replace(":3,", ":\"3\","), "vlanId is \"3\""),
            (&WRITTEN.replace("02:0a", "zz"), "ifAddress is \"zz:0b"),
            (&WRITTEN.replace("\"ifAddress\"", "\"mac\""), "no ifAddress"),
            (&WRITTEN.replace("10.0.1.9", ""), "no privateIp"),
            (&WRITTEN.replace("10.0.1.9", "10.0.2.9"), "privateIp is 10.0.2.9, which is no address of subnetCidr"),
            (&WRITTEN.replace("10.0.1.0/24", "10.0.1.0"), "subnetCidr is \"10.0.1.0\""),
            (&WRITTEN.replace("\"subnetCidr\"", "\"subnet\""), "no subnetCidr"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn the_limit_of_any_container_asks_and_the_hosts_network_does_not() {
        let pod = |spec: &str| -> Pod { serde_json::from_str(&format!(r#"{{"metadata":{{"name":"a"}},"spec":{spec}}}"#)).unwrap() };
        let limit = r#"{"name":"c","resources":{"limits":{"vpc.amazonaws.com/pod-eni":"1"}}}"#;
        assert!(wants_branch(&pod(&format!(r#"{{"containers":[{{"name":"b"}},{limit}]}}"#))));
        assert!(wants_branch(&pod(&format!(r#"{{"initContainers":[{limit}]}}"#))));
        let names = VethNames { strict_branches: true, ..VethNames::default() };
        assert!(names.of(&pod(&format!(r#"{{"containers":[{limit}]}}"#))).starts_with("vlan"));
        assert!(names.of(&Pod::default()).starts_with("eni"));
        assert!(!wants_branch(&pod(&format!(r#"{{"hostNetwork":true,"containers":[{limit}]}}"#))));
        assert!(!wants_branch(&pod(r#"{"containers":[{"name":"b","resources":{"limits":{"cpu":"1"}}}]}"#)));
    }

    #[test]
    fn a_pod_without_the_annotation_has_no_branch_yet() {
        let mut pod = Pod::default();
        assert_eq!(branch_of(&pod), Ok(None));
        pod.metadata.annotations.insert(POD_ENI.to_owned(), WRITTEN.to_owned());
        assert_eq!(branch_of(&pod), Ok(Some(branch())));
    }
}
