use super::*;

fn read(pairs: &[(&str, &str)]) -> Result<Config, Vec<ConfigError>> {
    let map: BTreeMap<String, String> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Config::read(&|name| map.get(name).cloned())
}

/// Without it a notice is due.
const NAMED: (&str, &str) = ("CLUSTER_NAME", "c");

#[test]
fn defaults_are_those_of_the_shipped_manifest() {
    let config = read(&[]).unwrap();
    assert_eq!((config.pool.warm_eni_target, config.pool.warm_ip_target, config.pool.minimum_ip_target), (1, 0, 0));
    assert!(config.pool.ipv4 && config.pool.subnet_discovery && config.network.node_port_support);
    assert_eq!(config.pool.ip_cooldown, Duration::from_secs(30));
    assert_eq!((config.network.connmark, config.network.eni_mtu, config.network.pod_mtu), (0x80, 9001, 9001));
    assert_eq!(config.notices.len(), 1, "the cluster's name is the user's to give");
    assert!(config.settings.iter().all(|s| s.origin == Origin::Default && !s.about.is_empty()));
}

#[test]
fn go_quirks() {
    for (text, want) in [("1", true), ("t", true), ("TRUE", true), ("True", true), ("0", false), ("F", false)] {
        assert_eq!(read(&[("AWS_VPC_K8S_CNI_EXTERNALSNAT", text)]).unwrap().network.external_snat, want, "{text}");
    }
    // Unparsable or negative: the default, with a notice.
    let config = read(&[("AWS_VPC_CNI_NODE_PORT_SUPPORT", "yes"), ("WARM_ENI_TARGET", "-1"), ("WARM_IP_TARGET", "two"), NAMED]).unwrap();
    assert!(config.network.node_port_support);
    assert_eq!((config.pool.warm_eni_target, config.pool.warm_ip_target, config.notices.len()), (1, 0, 3));
    for (text, want) in [("0x40", 0x40), ("64", 64), ("010", 8), ("0", 0x80), ("junk", 0x80), ("0b11", 3)] {
        assert_eq!(read(&[("AWS_VPC_K8S_CNI_CONNMARK", text)]).unwrap().network.connmark, want, "{text}");
    }
    for (text, want) in [("0", None), ("-3", None), ("2", Some(2)), ("x", None)] {
        assert_eq!(read(&[("MAX_ENI", text)]).unwrap().pool.max_eni, want, "{text}");
    }
    assert_eq!(read(&[("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "dice")]).unwrap().network.randomize_snat, RandomizeSnat::Prng);
    let cidrs = read(&[("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.1.2.3/16, junk,::/0,0.0.0.0/0"), NAMED]).unwrap();
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
        ("STANCHION_POLICY_FLOWS", "0"),
        ("STANCHION_POLICY_POD_FLOWS", "many"),
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
        "STANCHION_POLICY_FLOWS",
        "STANCHION_POLICY_POD_FLOWS",
    ] {
        assert!(names.contains(&name), "{name} not in {names:?}");
    }
    assert!(errors.iter().all(|e| !e.remedy.is_empty()));
}

#[test]
fn settings_that_exclude_each_other_are_refused_by_name() {
    const V6: [(&str, &str); 2] = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true")];
    const PREFIXES: [(&str, &str); 2] = [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let v6 = [&V6[..], &PREFIXES].concat();
    assert!(read(&v6).is_ok());
    assert!(read(&[&v6[..], &[("ENABLE_MULTI_NIC", "true")]].concat()).is_ok_and(|config| config.pool.multi_nic));
    for (settings, name) in [
        (V6.to_vec(), "ENABLE_IPv6"),
        ([&v6[..], &[("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")]].concat(), "ENABLE_IPv6"),
        (vec![("ENABLE_IPv6", "true")], "ENABLE_IPv6"),
        (PREFIXES[..1].to_vec(), "ENABLE_PREFIX_DELEGATION"),
        (vec![("STANCHION_LOG_RETENTION_DAYS", "8")], "STANCHION_LOG_RETENTION_DAYS"),
        (vec![("AWS_VPC_K8S_CNI_VETHPREFIX", "vlan")], "AWS_VPC_K8S_CNI_VETHPREFIX"),
        (vec![("AWS_VPC_K8S_CNI_VETHPREFIX", "e-i")], "AWS_VPC_K8S_CNI_VETHPREFIX"),
    ] {
        let errors = read(&settings).unwrap_err();
        assert!(errors.iter().any(|error| error.name == name && !error.remedy.is_empty()), "{settings:?}: {errors:?}");
    }
}

#[test]
fn a_cluster_without_a_name_has_metrics_all_the_same_and_is_told_of_it() {
    use crate::logs::cri::Output;
    use crate::logs::route::{Place, Template};
    let unnamed = read(&[]).unwrap();
    let [notice] = &unnamed.notices[..] else { panic!("{:?}", unnamed.notices) };
    assert!(notice.starts_with("CLUSTER_NAME is not set"), "{notice}");
    assert_eq!((unnamed.telemetry.cluster_name.as_str(), unnamed.pool.cluster_name.as_str()), (UNNAMED_CLUSTER, ""));
    // The same word as in the groups of logs.
    let place = Place { cluster: "", node: "n", file: "f" };
    assert_eq!(Template::parse("{cluster}").unwrap().group(place, None, Output::Stdout), UNNAMED_CLUSTER);
    let named = read(&[NAMED]).unwrap();
    assert_eq!((named.telemetry.cluster_name.as_str(), named.notices.len()), ("c", 0));
    // Who ships nothing under the name is not told.
    assert!(read(&[("STANCHION_LOGS", "false"), ("STANCHION_CONTAINER_INSIGHTS", "false")]).unwrap().notices.is_empty());
}

#[test]
fn what_means_nothing_is_said_and_what_is_off_is_accepted() {
    let config = read(&[("ENABLE_NFTABLES", "true"), ("ENABLE_POD_ENI", "false"), ("ENABLE_MULTI_NIC", "0"), NAMED]).unwrap();
    assert_eq!(config.notices.len(), 1);
}

#[test]
fn security_groups_for_pods_need_ec2_to_tell_the_trunk() {
    let config = read(&[("ENABLE_POD_ENI", "true"), ("POD_SECURITY_GROUP_ENFORCING_MODE", "standard"), NAMED]).unwrap();
    assert!(config.pool.pod_eni && config.pool.branch_mode == BranchMode::Standard && config.notices.is_empty());
    let strict = read(&[("ENABLE_POD_ENI", "true")]).unwrap();
    assert!(strict.pool.branch_mode == BranchMode::Strict && strict.notices[0].contains("DISABLE_TCP_EARLY_DEMUX=true"));
    assert!(read(&[("ENABLE_POD_ENI", "true"), ("DISABLE_TCP_EARLY_DEMUX", "true"), NAMED]).unwrap().notices.is_empty());
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

type Beside = &'static [(&'static str, &'static str)];

/// vpc-cni's README and main.go at v1.23.1, and its metrics helper: each variable with another value than its default, behind it what it
/// needs beside it.
const OF_AWS_NODE: [(&str, &str, Beside); 63] = [
    ("WARM_ENI_TARGET", "2", &[]),
    ("WARM_IP_TARGET", "2", &[]),
    ("MINIMUM_IP_TARGET", "2", &[]),
    ("WARM_PREFIX_TARGET", "2", &[]),
    ("MAX_ENI", "2", &[]),
    ("ENABLE_PREFIX_DELEGATION", "true", &[("WARM_PREFIX_TARGET", "1")]),
    ("ENABLE_IPv4", "false", &[("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")]),
    ("ENABLE_IPv6", "true", &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")]),
    ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true", &[]),
    ("ENI_CONFIG_ANNOTATION_DEF", "example.org/eni", &[]),
    ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone", &[]),
    ("AWS_MANAGE_ENIS_NON_SCHEDULABLE", "true", &[]),
    ("ENABLE_SUBNET_DISCOVERY", "false", &[]),
    ("ADDITIONAL_ENI_TAGS", r#"{"a":"b"}"#, &[]),
    ("CLUSTER_NAME", "c", &[]),
    ("DISABLE_LEAKED_ENI_CLEANUP", "true", &[]),
    ("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true", &[]),
    ("ENABLE_IMDS_ONLY_MODE", "true", &[]),
    ("MANAGE_UNTAGGED_ENI", "false", &[]),
    ("ENABLE_MULTI_NIC", "true", &[]),
    ("ENABLE_POD_ENI", "true", &[]),
    ("POD_SECURITY_GROUP_ENFORCING_MODE", "standard", &[("ENABLE_POD_ENI", "true")]),
    ("ANNOTATE_POD_IP", "true", &[]),
    ("IP_COOLDOWN_PERIOD", "60", &[]),
    ("AWS_VPC_K8S_CNI_BACKING_STORE", "/run/x/ipam.json", &[]),
    ("NETWORK_POLICY_ENFORCING_MODE", "strict", &[]),
    ("AWS_VPC_CNI_NODE_PORT_SUPPORT", "false", &[]),
    ("AWS_VPC_K8S_CNI_EXTERNALSNAT", "true", &[]),
    ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "none", &[]),
    ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.9.0.0/16", &[]),
    ("AWS_EXTERNAL_SERVICE_CIDRS", "10.9.0.0/16", &[]),
    ("AWS_VPC_K8S_CNI_CONNMARK", "0x40", &[]),
    ("AWS_VPC_K8S_CNI_VETHPREFIX", "pod", &[]),
    ("AWS_VPC_ENI_MTU", "1500", &[]),
    ("POD_MTU", "1500", &[]),
    ("DISABLE_TCP_EARLY_DEMUX", "true", &[]),
    ("ENABLE_V4_EGRESS", "false", &[]),
    ("ENABLE_V6_EGRESS", "true", &[]),
    ("DISABLE_POD_V6", "true", &[]),
    ("ENABLE_BANDWIDTH_PLUGIN", "true", &[]),
    ("ENABLE_NFTABLES", "true", &[]),
    ("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "false", &[]),
    ("AWS_VPC_K8S_CNI_LOGLEVEL", "ERROR", &[]),
    ("AWS_VPC_K8S_CNI_LOG_FILE", "/tmp/x", &[]),
    ("AWS_VPC_K8S_PLUGIN_LOG_LEVEL", "ERROR", &[]),
    ("AWS_VPC_K8S_PLUGIN_LOG_FILE", "stderr", &[]),
    ("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", "/tmp/x", &[]),
    ("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "/tmp/x", &[]),
    ("DISABLE_INTROSPECTION", "true", &[]),
    ("DISABLE_METRICS", "true", &[]),
    ("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:1", &[]),
    ("HOST_CNI_BIN_PATH", "/x", &[]),
    ("HOST_CNI_CONFDIR_PATH", "/x", &[]),
    ("AWS_EC2_ENDPOINT", "http://10.0.0.1", &[]),
    ("HTTP_TIMEOUT", "20", &[]),
    ("CLUSTER_ENDPOINT", "https://x", &[]),
    ("MY_NODE_NAME", "n", &[]),
    ("MY_POD_NAME", "p", &[("MY_POD_NAMESPACE", "kube-system")]),
    ("VPC_CNI_VERSION", "v1", &[]),
    ("USE_CLOUDWATCH", "no", &[]),
    ("USE_PROMETHEUS", "true", &[]),
    ("METRIC_UPDATE_INTERVAL", "9", &[]),
    ("AWS_CLUSTER_ID", "c", &[]),
];

#[test]
fn every_variable_of_aws_node_has_an_effect_or_is_said_to_have_none() {
    for (name, value, beside) in OF_AWS_NODE {
        let without = if name == "ENABLE_IPv6" || name == "ENABLE_IPv4" { Config::read(&|_| None) } else { read(beside) };
        let without = without.unwrap_or_else(|errors| panic!("{name}: {errors:?}"));
        let with = read(&[beside, &[(name, value)]].concat()).unwrap_or_else(|errors| panic!("{name}: {errors:?}"));
        let parts = |config: &Config| (config.pool.clone(), config.network.clone(), config.telemetry.clone(), config.operations.clone());
        let told = |config: &Config| config.notices.iter().filter(|notice| notice.contains(name)).count();
        if parts(&with) == parts(&without) {
            assert_eq!(told(&with), 1, "{name} changes nothing and is not said to: {:?}", with.notices);
        } else {
            let shown = with.settings.iter().filter(|setting| setting.name == name && setting.origin == Origin::Environment);
            assert_eq!(shown.count(), 1, "{name} is not shown");
        }
    }
}

/// A field that nothing but the configuration names would be a setting without effect.
#[test]
fn every_setting_is_read_by_the_agent() {
    fn sources(dir: &std::path::Path, text: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("core/src/config") {
                sources(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut code = String::new();
    sources(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut code);
    let mut fields = 0;
    for part in include_str!("mod.rs").split("pub struct ").filter(|part| part.split_once(' ').is_some_and(|(n, _)| n.ends_with("Config")))
    {
        let body = part.split_once("\n}").map_or(part, |(body, _)| body);
        for field in body.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(':')) {
            assert!(code.contains(&format!(".{}", field.0)), "nothing reads {}", field.0);
            fields += 1;
        }
    }
    assert!(fields > 60, "only {fields} settings were found: has the file another form?");
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

#[test]
fn names_that_look_like_settings_and_are_none_are_told() {
    let config = read(&[("STANCHION_NODE_METRICS", "true"), ("DISABLE_METRICS", "true")]).unwrap();
    assert!(config.notices[0].starts_with("STANCHION_NODE_METRICS=true has no effect"), "{:?}", config.notices);
    let told = config.unknown(
        [
            "WARM_IP_TARGETS",
            "STANCHION_METRIC_PRESET",
            "AWS_VPC_K8S_NEW",
            // Settings, and a variable of aws-node that is told elsewhere.
            "WARM_IP_TARGET",
            "STANCHION_METRICS_PRESET",
            "STANCHION_SOCKET",
            "ENABLE_NFTABLES",
            // Others' business.
            "PATH",
            "AWS_REGION",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            // Of a service called stanchion.
            "STANCHION_SERVICE_HOST",
            "STANCHION_SERVICE_PORT_METRICS",
            "STANCHION_PORT",
            "STANCHION_PORT_61678_TCP_ADDR",
        ]
        .into_iter(),
    );
    let names: Vec<&str> = told.iter().filter_map(|notice| notice.split(' ').next()).collect();
    assert_eq!(names, ["WARM_IP_TARGETS", "STANCHION_METRIC_PRESET", "AWS_VPC_K8S_NEW"]);
}
