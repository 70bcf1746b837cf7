//! aws-node's introspection documents, in its shape, so that its support tooling reads them. Sandbox ids are left out, as
//! there: any process on the node may ask.
//!
//! Shapes: `pkg/ipamd/introspect.go` and `datastore.ENIInfos` of aws/amazon-vpc-cni-k8s v1.23.1.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde_json::{Map, Value, json};
use stanchion_core::config::Setting;
use stanchion_core::ipam::Time;

use crate::ipamd::{AddressView, CidrView, EXCLUDED, EniView, IpamSnapshot};

/// `/v1/enis`: cards, their ENIs, CIDRs and the addresses that are not simply free.
pub(super) fn enis(snapshot: &IpamSnapshot) -> Value {
    let cards: Map<String, Value> = snapshot
        .pools
        .iter()
        .map(|pool| {
            let of_card = snapshot.enis.iter().filter(|eni| eni.network_card == pool.network_card);
            let enis: Map<String, Value> = of_card.map(|eni| (eni.id.to_string(), one_eni(eni, &snapshot.addresses))).collect();
            (pool.network_card.to_string(), json!({"TotalIPs": pool.total, "AssignedIPs": pool.assigned, "ENIs": enis}))
        })
        .collect();
    Value::Object(cards)
}

fn one_eni(eni: &EniView, addresses: &[AddressView]) -> Value {
    let cidrs = |v4: bool| -> Map<String, Value> {
        let family = eni.cidrs.iter().filter(|view| matches!(view.cidr, IpNet::V4(_)) == v4);
        family.map(|view| (view.cidr.to_string(), one_cidr(view, addresses))).collect()
    };
    json!({
        "ID": eni.id, "IsPrimary": eni.network_card == 0 && eni.device_index == 0, "IsTrunk": eni.kind == "trunk",
        "IsEFA": eni.kind.starts_with("efa"), "DeviceNumber": eni.device_index, "RouteTableID": eni.route_table,
        "SubnetID": eni.subnet, "IsExcludedForPodIPs": eni.role == EXCLUDED, "AvailableIPv4Cidrs": cidrs(true), "IPv6Cidrs": cidrs(false),
    })
}

fn one_cidr(view: &CidrView, addresses: &[AddressView]) -> Value {
    let held: Map<String, Value> = addresses
        .iter()
        .filter(|address| view.cidr.contains(&address.address))
        .map(|address| {
            let pod = address.pod.as_ref();
            let assigned = address.state == "assigned";
            let zero = "0001-01-01T00:00:00Z".to_owned();
            // What is empty Go leaves out here.
            let metadata: Map<String, Value> = pod
                .map(|pod| [("k8sPodNamespace".to_owned(), json!(pod.namespace)), ("k8sPodName".to_owned(), json!(pod.name))])
                .into_iter()
                .flatten()
                .collect();
            let document = json!({
                "Address": address.address.to_string(),
                "IPAMKey": {"networkName": address.key.as_ref().map(|key| key.network_name.clone()).unwrap_or_default(), "containerID": "", "ifName": ""},
                "IPAMMetadata": metadata,
                "AssignedTime": if assigned { time(address.time) } else { zero.clone() },
                // Ours is the end of the cool-down, theirs its beginning: what matters is that it is set.
                "UnassignedTime": if assigned { zero } else { time(address.time) },
            });
            (address.address.to_string(), document)
        })
        .collect();
    let (width, family) = match view.cidr {
        IpNet::V4(_) => (32, "4"),
        IpNet::V6(_) => (128, "6"),
    };
    json!({
        "Cidr": {"IP": view.cidr.network().to_string(), "Mask": mask(view.cidr.prefix_len(), width)},
        "IPAddresses": held, "IsPrefix": view.cidr.prefix_len() < width, "AddressFamily": family,
    })
}

fn time(time: Time) -> String {
    i64::try_from(time.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).unwrap_or_default().to_string()
}

/// Go writes a mask's bytes in base64.
fn mask(length: u8, width: u8) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = (0..width / 8)
        .map(|index| {
            let ones = length.saturating_sub(index * 8).min(8);
            !(0xff_u16 >> ones) as u8
        })
        .collect();
    bytes
        .chunks(3)
        .flat_map(|chunk| {
            let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            let digits = [18, 12, 6, 0].map(|shift| char::from(ALPHABET[(bits >> shift & 63) as usize]));
            let kept = chunk.len() + 1;
            digits.into_iter().take(kept).chain(std::iter::repeat_n('=', 4 - kept)).collect::<Vec<_>>()
        })
        .collect()
}

/// `/v1/networkutils-env-settings`: what decides the data path.
pub(super) fn network_settings(settings: &[Setting]) -> Value {
    named(settings, true)
}

/// `/v1/ipamd-env-settings`: everything else.
pub(super) fn ipamd_settings(settings: &[Setting]) -> Value {
    named(settings, false)
}

/// aws-node's variables of its network half.
const NETWORK: [&str; 12] = [
    "AWS_VPC_CNI_NODE_PORT_SUPPORT",
    "AWS_VPC_ENI_MTU",
    "AWS_VPC_K8S_CNI_CONNMARK",
    "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
    "AWS_VPC_K8S_CNI_EXTERNALSNAT",
    "AWS_VPC_K8S_CNI_RANDOMIZESNAT",
    "AWS_VPC_K8S_CNI_VETHPREFIX",
    "AWS_EXTERNAL_SERVICE_CIDRS",
    "DISABLE_TCP_EARLY_DEMUX",
    "ENABLE_V4_EGRESS",
    "ENABLE_V6_EGRESS",
    "POD_MTU",
];

fn named(settings: &[Setting], network: bool) -> Value {
    let value = |text: &str| match text {
        "true" => json!(true),
        "false" => json!(false),
        text => text.parse::<i64>().map_or_else(|_| json!(text), |number| json!(number)),
    };
    let chosen = settings.iter().filter(|setting| NETWORK.contains(&setting.name) == network);
    let map: BTreeMap<&str, Value> = chosen.map(|setting| (setting.name, value(&setting.value))).collect();
    json!(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipamd::PoolView;
    use stanchion_core::config::Config;
    use stanchion_core::ids::PodName;

    #[test]
    fn masks_are_gos() {
        for (length, width, text) in [(32, 32, "/////w=="), (28, 32, "////8A=="), (80, 128, "/////////////wAAAAAAAA==")] {
            assert_eq!(mask(length, width), text, "/{length}");
        }
    }

    #[test]
    fn enis_have_aws_nodes_shape_and_no_sandbox_id() {
        let address = AddressView {
            address: "10.0.0.9".parse().unwrap(),
            eni: "eni-1".into(),
            state: "assigned",
            pod: Some(PodName::new("x", "a")),
            key: None,
            time: Time(1_795_000_000_000),
        };
        let eni = EniView {
            id: "eni-1".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            network_card: 0,
            device_index: 0,
            subnet: "subnet-1".into(),
            primary_ipv4: None,
            kind: "interface".into(),
            role: "pods".into(),
            route_table: 254,
            slots: 9,
            cidrs: vec![CidrView { cidr: "10.0.0.9/32".parse().unwrap(), total: 1, assigned: 1, cooling: 0 }],
            total: 1,
            assigned: 1,
        };
        let pools = vec![PoolView { total: 1, assigned: 1, ..PoolView::default() }];
        let document = enis(&IpamSnapshot { pools, enis: vec![eni], addresses: vec![address], ..IpamSnapshot::default() });
        let shown = &document["0"]["ENIs"]["eni-1"];
        assert_eq!((shown["SubnetID"].as_str(), shown["IsExcludedForPodIPs"].as_bool()), (Some("subnet-1"), Some(false)));
        assert_eq!(document["0"]["AssignedIPs"], 1);
        let held = &document["0"]["ENIs"]["eni-1"]["AvailableIPv4Cidrs"]["10.0.0.9/32"];
        assert_eq!((held["Cidr"]["Mask"].as_str(), held["IsPrefix"].as_bool()), (Some("/////w=="), Some(false)));
        let address = &held["IPAddresses"]["10.0.0.9"];
        assert_eq!((address["IPAMMetadata"]["k8sPodName"].as_str(), address["IPAMKey"]["containerID"].as_str()), (Some("a"), Some("")));
        assert_eq!(address["AssignedTime"], "2026-11-18T11:06:40Z");
    }

    #[test]
    fn settings_are_split_as_aws_node_splits_them() {
        let settings = Config::read(&|_| None).unwrap().render();
        let (network, ipamd) = (network_settings(&settings), ipamd_settings(&settings));
        assert_eq!(network["AWS_VPC_K8S_CNI_EXTERNALSNAT"], false);
        assert_eq!(network.as_object().unwrap().len(), NETWORK.len(), "each of them is a setting: {network}");
        assert_eq!(ipamd["WARM_ENI_TARGET"], 1);
        assert!(ipamd.get("POD_MTU").is_none());
    }
}
