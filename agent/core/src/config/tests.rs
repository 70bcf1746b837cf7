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
        ("NETWORK_POLICY_SOURCE", "elsewhere"),
        ("ENABLE_PREFIX_DELEGATION", "true"),
        ("ENABLE_IPv4", "false"),
        ("POD_SECURITY_GROUP_ENFORCING_MODE", "lax"),
        ("STANCHION_LOG_RECORD", "xml"),
    ])
    .unwrap_err();
    let names: Vec<&str> = errors.iter().map(|e| e.name).collect();
    for name in [
        "AWS_VPC_ENI_MTU",
        "AWS_VPC_K8S_CNI_VETHPREFIX",
        "IP_COOLDOWN_PERIOD",
        "NETWORK_POLICY_ENFORCING_MODE",
        "NETWORK_POLICY_SOURCE",
        "ENABLE_IPv6",
        "POD_SECURITY_GROUP_ENFORCING_MODE",
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

#[test]
fn security_groups_for_pods_need_ec2_to_tell_the_trunk() {
    let config = read(&[("ENABLE_POD_ENI", "true"), ("POD_SECURITY_GROUP_ENFORCING_MODE", "standard")]).unwrap();
    assert!(config.pool.pod_eni && config.pool.branch_mode == BranchMode::Standard && config.notices.is_empty());
    let strict = read(&[("ENABLE_POD_ENI", "true")]).unwrap();
    assert!(strict.pool.branch_mode == BranchMode::Strict && strict.notices[0].contains("DISABLE_TCP_EARLY_DEMUX=true"));
    assert!(read(&[("ENABLE_POD_ENI", "true"), ("DISABLE_TCP_EARLY_DEMUX", "true")]).unwrap().notices.is_empty());
    let errors = read(&[("ENABLE_POD_ENI", "true"), ("ENABLE_IMDS_ONLY_MODE", "true")]).unwrap_err();
    assert_eq!((errors.len(), errors[0].name), (1, "ENABLE_POD_ENI"));
}

/// aws-node's own words for each variable, and what a node with the switch on must be told until the effect is there.
#[test]
fn a_switch_without_its_effect_is_refused_and_never_ignored() {
    for name in ["ENABLE_MULTI_NIC", "ENABLE_POD_ENI", "ANNOTATE_POD_IP", "ENABLE_V6_EGRESS", "ENABLE_BANDWIDTH_PLUGIN", "DISABLE_POD_V6"] {
        for on in ["true", "1", "T"] {
            match read(&[(name, on)]) {
                Ok(config) => {
                    let setting = config.settings.iter().find(|setting| setting.name == name).expect(name);
                    assert_eq!((setting.value.as_str(), setting.origin), ("true", Origin::Environment), "{name} works, then it shows");
                }
                Err(errors) => assert!(errors.len() == 1 && errors[0].name == name && errors[0].value == on, "{errors:?}"),
            }
        }
        assert!(read(&[(name, "false")]).is_ok(), "{name}");
    }
}

#[test]
fn every_variable_of_aws_node_is_known() {
    // vpc-cni's README and main.go at v1.23.1.
    let names = [
        "WARM_ENI_TARGET",
        "WARM_IP_TARGET",
        "MINIMUM_IP_TARGET",
        "WARM_PREFIX_TARGET",
        "MAX_ENI",
        "ENABLE_PREFIX_DELEGATION",
        "ENABLE_IPv4",
        "ENABLE_IPv6",
        "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG",
        "ENI_CONFIG_ANNOTATION_DEF",
        "ENI_CONFIG_LABEL_DEF",
        "AWS_MANAGE_ENIS_NON_SCHEDULABLE",
        "ENABLE_SUBNET_DISCOVERY",
        "ADDITIONAL_ENI_TAGS",
        "CLUSTER_NAME",
        "DISABLE_LEAKED_ENI_CLEANUP",
        "DISABLE_NETWORK_RESOURCE_PROVISIONING",
        "ENABLE_IMDS_ONLY_MODE",
        "MANAGE_UNTAGGED_ENI",
        "ENABLE_MULTI_NIC",
        "ENABLE_POD_ENI",
        "POD_SECURITY_GROUP_ENFORCING_MODE",
        "ANNOTATE_POD_IP",
        "IP_COOLDOWN_PERIOD",
        "AWS_VPC_K8S_CNI_BACKING_STORE",
        "NETWORK_POLICY_ENFORCING_MODE",
        "AWS_VPC_CNI_NODE_PORT_SUPPORT",
        "AWS_VPC_K8S_CNI_EXTERNALSNAT",
        "AWS_VPC_K8S_CNI_RANDOMIZESNAT",
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
        "AWS_EXTERNAL_SERVICE_CIDRS",
        "AWS_VPC_K8S_CNI_CONNMARK",
        "AWS_VPC_K8S_CNI_VETHPREFIX",
        "AWS_VPC_ENI_MTU",
        "POD_MTU",
        "DISABLE_TCP_EARLY_DEMUX",
        "ENABLE_V4_EGRESS",
        "ENABLE_V6_EGRESS",
        "DISABLE_POD_V6",
        "ENABLE_BANDWIDTH_PLUGIN",
        "ENABLE_NFTABLES",
        "AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER",
        "AWS_VPC_K8S_CNI_LOGLEVEL",
        "AWS_VPC_K8S_CNI_LOG_FILE",
        "AWS_VPC_K8S_PLUGIN_LOG_LEVEL",
        "AWS_VPC_K8S_PLUGIN_LOG_FILE",
        "AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE",
        "AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE",
        "DISABLE_INTROSPECTION",
        "DISABLE_METRICS",
        "INTROSPECTION_BIND_ADDRESS",
        "HOST_CNI_BIN_PATH",
        "HOST_CNI_CONFDIR_PATH",
        "AWS_EC2_ENDPOINT",
        "HTTP_TIMEOUT",
        "CLUSTER_ENDPOINT",
        "MY_NODE_NAME",
        "MY_POD_NAME",
        "VPC_CNI_VERSION",
        "USE_CLOUDWATCH",
        "USE_PROMETHEUS",
        "METRIC_UPDATE_INTERVAL",
    ];
    let read_names = std::cell::RefCell::new(std::collections::BTreeSet::new());
    Config::read(&|name| {
        read_names.borrow_mut().insert(name.to_owned());
        None
    })
    .unwrap();
    let unread: Vec<_> = names.iter().filter(|name| !read_names.borrow().contains(**name)).collect();
    assert!(unread.is_empty(), "nobody looks at {unread:?}");
}

#[test]
fn quirks_of_the_operations_settings() {
    for (text, seconds) in [("10", 10), ("30", 30), ("9", 10), ("0", 10), ("-1", 10), ("x", 10)] {
        assert_eq!(read(&[("HTTP_TIMEOUT", text)]).unwrap().operations.http_timeout, Duration::from_secs(seconds), "{text}");
    }
    assert_eq!(read(&[("AWS_VPC_K8S_PLUGIN_LOG_FILE", "stdout")]).unwrap_err()[0].name, "AWS_VPC_K8S_PLUGIN_LOG_FILE");
    assert_eq!(read(&[("POD_SECURITY_GROUP_ENFORCING_MODE", "lenient")]).unwrap_err()[0].name, "POD_SECURITY_GROUP_ENFORCING_MODE");
    assert_eq!(read(&[("AWS_EC2_ENDPOINT", "http://10.0.0.1")]).unwrap().operations.ec2_endpoint, "http://10.0.0.1");
    assert!(read(&[("DISABLE_TCP_EARLY_DEMUX", "true")]).unwrap().network.disable_tcp_early_demux);
}

#[test]
fn metrics_are_selected_by_preset_and_name() {
    use crate::metrics::catalog::{DocType, Field, Preset};
    use crate::metrics::track::Figures;
    let config = read(&[
        ("STANCHION_METRICS_PRESET", "enhanced"),
        ("STANCHION_METRICS_WITHOUT", "ContainerFS, pod_cpu_limit"),
        ("STANCHION_METRICS_FIGURES", "upstream"),
        ("STANCHION_NODE_METRICS", "true"),
    ])
    .unwrap();
    let telemetry = &config.telemetry;
    assert_eq!((telemetry.selection.preset, telemetry.figures, telemetry.node_metrics), (Preset::Enhanced, Figures::Upstream, true));
    assert!(telemetry.selection.without_types.contains(&DocType::ContainerFS));
    assert!(telemetry.selection.without_metrics[&DocType::Pod].contains(Field::CpuLimit));
    assert_eq!(read(&[]).unwrap().telemetry.selection.preset, Preset::Standard);
    for (name, value) in
        [("STANCHION_METRICS_PRESET", "everything"), ("STANCHION_METRICS_WITHOUT", "Pods"), ("STANCHION_METRICS_FIGURES", "x")]
    {
        let errors = read(&[(name, value)]).unwrap_err();
        assert_eq!(errors.iter().map(|error| error.name).collect::<Vec<_>>(), [name]);
    }
}

#[test]
fn otlp_requests_are_signed_for_whom_it_says() {
    let region = |sign: OtlpSign, endpoint: &str| sign.region(endpoint, "eu-west-1");
    for (endpoint, named) in [
        ("https://monitoring.us-east-2.amazonaws.com/v1/metrics", Some("us-east-2")),
        ("https://MONITORING.us-east-2.amazonaws.com:443", Some("us-east-2")),
        ("https://monitoring-fips.us-gov-west-1.amazonaws.com", Some("us-gov-west-1")),
        ("https://monitoring.cn-north-1.amazonaws.com.cn/", Some("cn-north-1")),
        ("http://collector.monitoring.svc:4318", None),
        ("https://monitoring.us-east-2.amazonaws.com.example.org", None),
        ("https://example.org/monitoring.us-east-2.amazonaws.com", None),
    ] {
        assert_eq!(region(OtlpSign::Auto, endpoint).as_deref(), named, "{endpoint}");
        assert_eq!(region(OtlpSign::Always, endpoint).as_deref(), named.or(Some("eu-west-1")), "{endpoint}");
        assert_eq!(region(OtlpSign::Never, endpoint), None);
    }
}
