use super::*;

fn read(pairs: &[(&str, &str)]) -> Result<Config, Vec<ConfigError>> {
    let map: BTreeMap<String, String> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Config::read(&|name| map.get(name).cloned())
}

#[test]
fn defaults_are_those_of_the_shipped_manifest() {
    let config = read(&[]).unwrap();
    assert_eq!((config.pool.warm_eni_target, config.pool.warm_ip_target, config.pool.minimum_ip_target), (1, 0, 0));
    assert!(config.pool.ipv4 && config.pool.subnet_discovery && config.network.node_port_support);
    assert_eq!(config.pool.ip_cooldown, Duration::from_secs(30));
    assert_eq!((config.network.connmark, config.network.eni_mtu, config.network.pod_mtu), (0x80, 9001, 9001));
    assert!(config.notices.is_empty());
    assert!(config.settings.iter().all(|s| s.origin == Origin::Default && !s.about.is_empty()));
}

#[test]
fn go_quirks() {
    for (text, want) in [("1", true), ("t", true), ("TRUE", true), ("True", true), ("0", false), ("F", false)] {
        assert_eq!(read(&[("AWS_VPC_K8S_CNI_EXTERNALSNAT", text)]).unwrap().network.external_snat, want, "{text}");
    }
    // Unparsable or negative: the default, with a notice.
    let config = read(&[("AWS_VPC_CNI_NODE_PORT_SUPPORT", "yes"), ("WARM_ENI_TARGET", "-1"), ("WARM_IP_TARGET", "two")]).unwrap();
    assert!(config.network.node_port_support);
    assert_eq!((config.pool.warm_eni_target, config.pool.warm_ip_target, config.notices.len()), (1, 0, 3));
    for (text, want) in [("0x40", 0x40), ("64", 64), ("010", 8), ("0", 0x80), ("junk", 0x80), ("0b11", 3)] {
        assert_eq!(read(&[("AWS_VPC_K8S_CNI_CONNMARK", text)]).unwrap().network.connmark, want, "{text}");
    }
    for (text, want) in [("0", None), ("-3", None), ("2", Some(2)), ("x", None)] {
        assert_eq!(read(&[("MAX_ENI", text)]).unwrap().pool.max_eni, want, "{text}");
    }
    assert_eq!(read(&[("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "dice")]).unwrap().network.randomize_snat, RandomizeSnat::Prng);
    let cidrs = read(&[("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.1.2.3/16, junk,::/0,0.0.0.0/0")]).unwrap();
    assert_eq!(cidrs.network.exclude_snat_cidrs, ["0.0.0.0/0".parse().unwrap(), "10.1.0.0/16".parse().unwrap()]);
    assert_eq!(cidrs.notices.len(), 2);
    let tags = read(&[("ADDITIONAL_ENI_TAGS", r#"{"a":"b","node.k8s.amazonaws.com/x":"c"}"#)]).unwrap();
    assert_eq!(tags.pool.additional_eni_tags, BTreeMap::from([("a".into(), "b".into())]));
}

#[test]
fn every_error_at_once_with_its_remedy() {
    let errors = read(&[
        ("AWS_VPC_ENI_MTU", "100"),
        ("AWS_VPC_K8S_CNI_VETHPREFIX", "toolong"),
        ("IP_COOLDOWN_PERIOD", "-1"),
        ("NETWORK_POLICY_ENFORCING_MODE", "maybe"),
        ("ENABLE_PREFIX_DELEGATION", "true"),
        ("ENABLE_IPv4", "false"),
        ("ENABLE_POD_ENI", "true"),
        ("STANCHION_LOG_RECORD", "xml"),
    ])
    .unwrap_err();
    let names: Vec<&str> = errors.iter().map(|e| e.name).collect();
    for name in [
        "AWS_VPC_ENI_MTU",
        "AWS_VPC_K8S_CNI_VETHPREFIX",
        "IP_COOLDOWN_PERIOD",
        "NETWORK_POLICY_ENFORCING_MODE",
        "ENABLE_IPv6",
        "ENABLE_POD_ENI",
        "STANCHION_LOG_RECORD",
    ] {
        assert!(names.contains(&name), "{name} not in {names:?}");
    }
    assert!(errors.iter().all(|e| !e.remedy.is_empty()));
}

#[test]
fn what_means_nothing_is_said_and_what_is_off_is_accepted() {
    let config = read(&[("ENABLE_NFTABLES", "true"), ("ENABLE_POD_ENI", "false"), ("ENABLE_MULTI_NIC", "0")]).unwrap();
    assert_eq!(config.notices.len(), 1);
}
