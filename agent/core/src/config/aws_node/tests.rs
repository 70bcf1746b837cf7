use proptest::prelude::*;
use serde_json::json;

use super::*;

/// As the EKS add-on v1.23.1 makes it and kubectl prints it, without what says nothing here.
const SHIPPED: &str = include_str!("../../../testdata/aws-node/daemonset.yaml");
const POLICY_OFF: &str = "--enable-network-policy=false";
const POLICY_ON: &str = "--enable-network-policy=true";

/// The chart's schema, as far as it speaks of these values: `clusterName` and `clusterEndpoint` are strings, `env` maps names to strings.
fn values(migration: &Migration) -> Value {
    let yaml = migration.to_yaml();
    let values: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{error}:\n{yaml}"));
    for (key, value) in values.as_object().expect(&yaml) {
        match key.as_str() {
            "clusterName" | "clusterEndpoint" => assert!(value.is_string(), "{yaml}"),
            "env" => assert_eq!(*value, json!(migration.env), "{yaml}"),
            other => panic!("{other} is no value of the chart: {yaml}"),
        }
    }
    values
}

fn migrated(text: &str) -> Migration {
    let migration = migrate(text).unwrap_or_else(|error| panic!("{error}"));
    values(&migration);
    assert!(migration.notes.iter().all(|(_, sentence)| sentence.ends_with('.') || sentence.contains('=')), "{:?}", migration.notes);
    migration
}

/// The shipped DaemonSet with a piece replaced, which must be there.
fn with(piece: &str, by: &str) -> String {
    assert!(SHIPPED.contains(piece), "{piece}");
    SHIPPED.replace(piece, by)
}

/// The shipped DaemonSet with more variables in its container or, by name, in another.
fn set(container: &str, variables: &[(&str, &str)]) -> String {
    let mut object: Value = serde_saphyr::from_str(SHIPPED).unwrap();
    let spec = object.pointer_mut("/spec/template/spec").unwrap();
    let list = if container == INIT { "initContainers" } else { "containers" };
    let containers = spec[list].as_array_mut().unwrap().iter_mut();
    let env = containers.into_iter().find(|found| found["name"] == container).unwrap()["env"].as_array_mut().unwrap();
    for (name, value) in variables {
        env.retain(|variable| variable["name"] != *name);
        env.push(json!({"name": name, "value": value}));
    }
    object.to_string()
}

fn notes<'a>(migration: &'a Migration, about: &str) -> Vec<&'a str> {
    migration.notes.iter().filter(|(name, _)| name == about).map(|(_, sentence)| sentence.as_str()).collect()
}

#[test]
fn the_shipped_daemon_set_keeps_what_it_does() {
    let migration = migrated(SHIPPED);
    assert_eq!(migration.daemon_set, "kube-system/aws-node");
    assert_eq!(migration.cluster_name, "shop");
    assert_eq!(migration.cluster_endpoint, "https://0123456789ABCDEF.gr7.eu-west-1.eks.amazonaws.com");
    let expected = [
        ("ADDITIONAL_ENI_TAGS", "{}"),
        ("ANNOTATE_POD_IP", "false"),
        ("AWS_VPC_CNI_NODE_PORT_SUPPORT", "true"),
        ("AWS_VPC_ENI_MTU", "9001"),
        ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "false"),
        ("AWS_VPC_K8S_CNI_EXTERNALSNAT", "false"),
        ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "prng"),
        ("AWS_VPC_K8S_CNI_VETHPREFIX", "eni"),
        ("AWS_VPC_K8S_PLUGIN_LOG_FILE", "/var/log/aws-routed-eni/plugin.log"),
        ("AWS_VPC_K8S_PLUGIN_LOG_LEVEL", "DEBUG"),
        ("DISABLE_NETWORK_RESOURCE_PROVISIONING", "false"),
        ("DISABLE_TCP_EARLY_DEMUX", "false"),
        ("ENABLE_IMDS_ONLY_MODE", "false"),
        ("ENABLE_IPv4", "true"),
        ("ENABLE_IPv6", "false"),
        ("ENABLE_MULTI_NIC", "false"),
        ("ENABLE_POD_ENI", "false"),
        ("DISABLE_INTROSPECTION", "false"),
        ("DISABLE_METRICS", "false"),
        ("ENABLE_PREFIX_DELEGATION", "false"),
        ("ENABLE_SUBNET_DISCOVERY", "true"),
        ("NETWORK_POLICY_ENFORCING_MODE", "none"),
        ("WARM_ENI_TARGET", "1"),
        ("WARM_PREFIX_TARGET", "1"),
    ];
    assert_eq!(migration.env, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert_eq!(migration.errors, []);
    for name in [
        "AWS_VPC_K8S_CNI_LOGLEVEL",
        "AWS_VPC_K8S_CNI_LOG_FILE",
        "VPC_CNI_VERSION",
        "VPC_ID",
        "--log-file of aws-eks-nodeagent",
        "--log-level of aws-eks-nodeagent",
        "--metrics-bind-addr of aws-eks-nodeagent",
        "--health-probe-bind-addr of aws-eks-nodeagent",
        "--conntrack-cache-cleanup-period of aws-eks-nodeagent",
    ] {
        let notes = notes(&migration, name);
        assert!(notes.len() == 1 && notes[0].starts_with(&format!("{name} is left out: ")), "{name}: {notes:?}");
    }
    assert_eq!(notes(&migration, "MY_NODE_NAME"), [""; 0]);
    assert_eq!(notes(&migration, "serviceAccount"), [ROLE]);
    assert!(migration.notes.iter().all(|(_, sentence)| !sentence.contains("no such setting")), "{:?}", migration.notes);
}

/// Pool and packets are decided alike by the printed values and by what the DaemonSet said, but for network policy.
#[test]
fn the_agent_decides_by_the_values_as_by_the_daemon_set() {
    let variables = [
        ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"),
        ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone"),
        ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.0.0.0/8,100.64.0.0/10"),
        ("ADDITIONAL_ENI_TAGS", r#"{"team": "net\u0007\"s", "cost": "a: b # c"}"#),
        ("ENABLE_POD_ENI", "true"),
        ("MINIMUM_IP_TARGET", "12"),
        ("WARM_IP_TARGET", "4"),
    ];
    let text = set(NODE, &variables);
    let migration = migrated(&text);
    let values = values(&migration);
    let printed = Config::read(&|name| Some(values["env"].get(name)?.as_str()?.to_owned())).unwrap();
    let found = read::find(&text).unwrap();
    let said = Config::read(&|name| Some(found.node.variables().get(name).filter(|_| name != MODE)?.value.clone())).unwrap();
    let cluster_name = values["clusterName"].as_str().unwrap().to_owned();
    assert_eq!(super::super::PoolConfig { cluster_name, ..printed.pool }, said.pool);
    assert_eq!(super::super::NetworkConfig { policy_mode: said.network.policy_mode, ..printed.network }, said.network);
    // ENABLE_POD_ENI in strict mode without DISABLE_TCP_EARLY_DEMUX.
    assert!(notes(&migration, "env")[0].contains("DISABLE_TCP_EARLY_DEMUX=true"));
}

#[test]
fn policies_that_nobody_enforced_stay_unenforced() {
    let says = |text: &str, why: &str| {
        let migration = migrated(text);
        assert_eq!(migration.env[MODE], "none", "{why}");
        let notes = notes(&migration, MODE);
        assert!(notes.len() == 1 && notes[0].starts_with(why), "{why}: {notes:?}");
        assert!(notes[0].contains("`kubectl get networkpolicies -A`") && notes[0].contains("set \"standard\""));
        let (yaml, line) = (migration.to_yaml(), format!("  # {}\n  {MODE}: \"none\"\n", notes[0]));
        assert!(yaml.contains(&line), "{yaml}");
    };
    let off = "aws-eks-nodeagent runs without --enable-network-policy=true, so";
    says(SHIPPED, off);
    for other in ["--enable-ipv6=false", "--enable-network-policy=no", "--enable-network-policy=true\n        - --enable-network-policy=0"]
    {
        says(&with(POLICY_OFF, other), off);
    }
    says(&with("name: aws-eks-nodeagent", "name: another"), "The DaemonSet has no container aws-eks-nodeagent, so");
    says(&set(NODE, &[(MODE, "strict")]), off);
    says(&set(NODE, &[(MODE, "lenient")]), off);
}

#[test]
fn policies_that_are_enforced_stay_so() {
    for on in
        [POLICY_ON, "--enable-network-policy", "--enable-network-policy=T", "--enable-network-policy=0\n        - --enable-network-policy"]
    {
        let migration = migrated(&with(POLICY_OFF, on));
        assert_eq!((migration.env[MODE].as_str(), notes(&migration, MODE)), ("standard", vec![]), "{on}");
        assert!(!migration.env.contains_key(FLOW_LOGS));
    }
    let on = |mode: &str| migrated(&set(NODE, &[(MODE, mode)]).replace(POLICY_OFF, POLICY_ON)).env[MODE].clone();
    // As the chart's default; what the agent is told is in the file.
    assert_eq!(on(""), "standard");
    for mode in ["Strict", "none"] {
        assert_eq!(on(mode), mode);
    }
    assert_eq!(migrate(&set(NODE, &[(MODE, "lenient")]).replace(POLICY_OFF, POLICY_ON)).unwrap().errors[0].name, MODE);
}

#[test]
fn the_switch_of_awss_controller_counts_where_it_is_known() {
    let list = |data: Value| {
        let set: Value = serde_saphyr::from_str(&with(POLICY_OFF, POLICY_ON)).unwrap();
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "amazon-vpc-cni", "namespace": "kube-system"}, "data": data});
        migrated(&json!({"apiVersion": "v1", "kind": "List", "items": [map, set]}).to_string())
    };
    assert_eq!(list(json!({"enable-network-policy-controller": "true", "enable-windows-ipam": "false"})).env[MODE], "standard");
    for data in [json!({"enable-network-policy-controller": "false"}), json!({"enable-windows-ipam": "false"}), Value::Null] {
        let migration = list(data);
        assert_eq!(migration.env[MODE], "none");
        assert!(notes(&migration, MODE)[0].starts_with("ConfigMap amazon-vpc-cni does not say"));
    }
    let documents = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: amazon-vpc-cni, namespace: kube-system}}\ndata: {{enable-network-policy-controller: \"false\"}}\n---\n{}",
        with(POLICY_OFF, POLICY_ON)
    );
    assert_eq!(migrated(&documents).env[MODE], "none");
}

#[test]
fn policy_event_logs_become_a_flow_log() {
    let logs = |policy: &str, events: bool, cloudwatch: bool| {
        let text = with(POLICY_OFF, policy)
            .replace("--enable-policy-event-logs=false", &format!("--enable-policy-event-logs={events}"))
            .replace("--enable-cloudwatch-logs=false", &format!("--enable-cloudwatch-logs={cloudwatch}"));
        migrated(&text)
    };
    for (events, cloudwatch, expected) in [(false, false, None), (true, false, Some("denied")), (true, true, Some("all"))] {
        let migration = logs(POLICY_ON, events, cloudwatch);
        assert_eq!(migration.env.get(FLOW_LOGS).map(String::as_str), expected);
        assert_eq!(notes(&migration, FLOW_LOGS).len(), usize::from(expected.is_some()));
    }
    let alone = logs(POLICY_ON, false, true);
    assert!(!alone.env.contains_key(FLOW_LOGS));
    assert_eq!(notes(&alone, "--enable-cloudwatch-logs of aws-eks-nodeagent").len(), 1);
    let idle = logs(POLICY_OFF, true, true);
    assert!(!idle.env.contains_key(FLOW_LOGS));
    assert!(notes(&idle, "--enable-policy-event-logs of aws-eks-nodeagent")[0].contains("STANCHION_FLOW_LOGS"));
}

#[test]
fn the_container_that_acts_on_a_variable_decides() {
    let init = migrated(&set(INIT, &[("DISABLE_TCP_EARLY_DEMUX", "true"), ("ENABLE_V6_EGRESS", "true")]));
    assert_eq!((init.env["DISABLE_TCP_EARLY_DEMUX"].as_str(), init.env["ENABLE_V6_EGRESS"].as_str()), ("true", "true"));
    assert!(notes(&init, "DISABLE_TCP_EARLY_DEMUX").is_empty());

    let demux = migrated(&set(NODE, &[("DISABLE_TCP_EARLY_DEMUX", "true")]));
    assert_eq!(demux.env["DISABLE_TCP_EARLY_DEMUX"], "false");
    let note = "The containers do not agree: it is \"true\" in aws-node and is \"false\" in aws-vpc-cni-init. Taken is that of aws-vpc-cni-init, which acts on it.";
    assert_eq!(notes(&demux, "DISABLE_TCP_EARLY_DEMUX"), [note]);

    let family = migrated(&set(INIT, &[("ENABLE_IPv6", "true")]));
    assert_eq!(family.env["ENABLE_IPv6"], "false");
    assert!(notes(&family, "ENABLE_IPv6")[0].ends_with("Taken is that of aws-node, which acts on it."));

    let empty = migrated(&set(NODE, &[("ENABLE_IPv6", "")]));
    assert_eq!((empty.env["ENABLE_IPv6"].as_str(), notes(&empty, "ENABLE_IPv6")), ("false", vec![]));

    // Two of a name in one container: the later one, as the process sees it.
    let twice = migrated(&with(
        "- name: WARM_ENI_TARGET\n          value: \"1\"",
        "- {name: WARM_ENI_TARGET, value: \"1\"}\n        - {name: WARM_ENI_TARGET, value: \"3\"}",
    ));
    assert_eq!(twice.env["WARM_ENI_TARGET"], "3");
}

#[test]
fn what_the_agent_does_not_know_is_named_and_not_taken() {
    let migration = migrated(&set(
        NODE,
        &[
            ("SOMETHING_ELSE", "a secret"),
            ("ENABLE_NFTABLES", "true"),
            ("AWS_SECRET_ACCESS_KEY", "a secret"),
            ("AWS_CA_BUNDLE", "/ca.pem"),
            ("HTTPS_PROXY", "http://proxy:3128"),
            ("AWS_REGION", "eu-west-1"),
            ("CLUSTER_NAME", ""),
            ("WARM_PREFIX_TARGET", ""),
        ],
    ));
    assert_eq!(notes(&migration, "SOMETHING_ELSE"), ["SOMETHING_ELSE is left out: the agent has no such setting."]);
    assert_eq!(notes(&migration, "ENABLE_NFTABLES"), ["ENABLE_NFTABLES is left out: nftables is always used."]);
    for name in ["AWS_SECRET_ACCESS_KEY", "AWS_CA_BUNDLE"] {
        assert_eq!(notes(&migration, name).len(), 1);
        assert!(!migration.env.contains_key(name));
    }
    assert!(!migration.to_yaml().contains("a secret"));
    // The AWS client reads these.
    assert_eq!((migration.env["HTTPS_PROXY"].as_str(), migration.env["AWS_REGION"].as_str()), ("http://proxy:3128", "eu-west-1"));
    // Empty is absent, to both.
    assert!(migration.cluster_name.is_empty() && !migration.env.contains_key("WARM_PREFIX_TARGET"));
    let flag = migrated(&with("--log-level=debug", "--new-flag\n        - \"7\""));
    assert_eq!(notes(&flag, "--new-flag of aws-eks-nodeagent").len(), 1);
    let from = migrated(&with(
        "      - env:\n        - name: ADDITIONAL_ENI_TAGS",
        "      - envFrom: [{configMapRef: {name: more}}]\n        env:\n        - name: ADDITIONAL_ENI_TAGS",
    ));
    assert_eq!(notes(&from, "envFrom").len(), 1);
}

#[test]
fn settings_of_a_container_that_the_chart_makes_are_not_taken() {
    let migration = migrated(&set(
        NODE,
        &[
            ("AWS_VPC_K8S_CNI_LOGLEVEL", "ERROR"),
            ("DISABLE_METRICS", "1"),
            ("DISABLE_INTROSPECTION", "true"),
            ("INTROSPECTION_BIND_ADDRESS", "unix:/run/x"),
            ("HOST_CNI_BIN_PATH", "/host/opt/cni/bin"),
            ("HOST_CNI_CONFDIR_PATH", "/elsewhere"),
            ("AWS_VPC_K8S_CNI_BACKING_STORE", "/data/ipam.json"),
        ],
    ));
    assert_eq!((migration.env["AWS_VPC_K8S_CNI_LOGLEVEL"].as_str(), migration.env["DISABLE_METRICS"].as_str()), ("ERROR", "1"));
    assert_eq!(
        (migration.env["DISABLE_INTROSPECTION"].as_str(), migration.env["INTROSPECTION_BIND_ADDRESS"].as_str()),
        ("true", "unix:/run/x")
    );
    let name = "HOST_CNI_CONFDIR_PATH";
    assert!(!migration.env.contains_key(name) && notes(&migration, name).len() == 1);
    assert!(!migration.env.contains_key("HOST_CNI_BIN_PATH") && notes(&migration, "HOST_CNI_BIN_PATH").is_empty());
    assert_eq!(migration.env["AWS_VPC_K8S_CNI_BACKING_STORE"], "/data/ipam.json");
    assert_eq!(notes(&migration, "AWS_VPC_K8S_CNI_BACKING_STORE").len(), 1);
    let as_there = migrated(&set(NODE, &[("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:61679"), ("AWS_VPC_K8S_CNI_LOGLEVEL", "verbose")]));
    assert!(notes(&as_there, "INTROSPECTION_BIND_ADDRESS").is_empty() && !as_there.env.contains_key("AWS_VPC_K8S_CNI_LOGLEVEL"));
}

#[test]
fn a_value_from_elsewhere_is_the_charts_or_a_persons() {
    let text = with(
        "fieldPath: metadata.name\n",
        "fieldPath: metadata.name\n        - {name: CLUSTER_NAME, valueFrom: {configMapKeyRef: {name: c, key: n}}}\n",
    );
    let migration = migrated(&text);
    assert!(migration.cluster_name.is_empty());
    assert!(notes(&migration, "CLUSTER_NAME")[0].contains("extraEnv"));
    assert_eq!(notes(&migration, "MY_POD_NAME"), [""; 0], "the chart sets its own");
}

#[test]
fn settings_that_the_agent_refuses_are_told_first() {
    let migration = migrated(&set(NODE, &[("AWS_VPC_ENI_MTU", "100"), ("WARM_IP_TARGET", "two"), ("IP_COOLDOWN_PERIOD", "-1")]));
    let names: Vec<&str> = migration.errors.iter().map(|error| error.name).collect();
    assert_eq!(names, ["IP_COOLDOWN_PERIOD", "AWS_VPC_ENI_MTU"]);
    let yaml = migration.to_yaml();
    let second = yaml.lines().nth(1).unwrap();
    assert!(second.starts_with("# THE AGENT WOULD NOT START WITH IP_COOLDOWN_PERIOD=\"-1\": "), "{second}");
    // What aws-node ignores is ignored here too, and said.
    let ignored = migrated(&set(NODE, &[("WARM_IP_TARGET", "two")]));
    assert!(ignored.errors.is_empty() && notes(&ignored, "env")[0].starts_with("WARM_IP_TARGET=\"two\" cannot be used"));
}

#[test]
fn every_form_that_kubectl_prints_is_read() {
    let expected = migrated(SHIPPED);
    let object: Value = serde_saphyr::from_str(SHIPPED).unwrap();
    let proxy = json!({"kind": "DaemonSet", "metadata": {"name": "kube-proxy"}, "spec": {"template": {"spec": {"containers": [{"name": "kube-proxy"}]}}}});
    assert_eq!(migrated(&object.to_string()), expected);
    assert_eq!(migrated(&serde_json::to_string_pretty(&object).unwrap()), expected);
    assert_eq!(migrated(&json!({"kind": "List", "items": [proxy, object]}).to_string()), expected);
    assert_eq!(migrated(&json!({"kind": "DaemonSetList", "apiVersion": "apps/v1", "items": [object]}).to_string()), expected);
    assert_eq!(migrated(&format!("---\n{SHIPPED}---\n{proxy}\n")), expected);
    assert_eq!(migrated(&SHIPPED.replace('\n', "\r\n")), expected);
    // An absent list is null in what some templates print.
    let bare = "kind: DaemonSet\nmetadata: {name: aws-node}\nspec: {template: {spec: {initContainers: null, containers: [{name: aws-node, env: null, args: }]}}}\n";
    assert_eq!(migrated(bare).env, BTreeMap::from([(MODE.to_owned(), "none".to_owned())]));
}

#[test]
fn other_input_is_named_with_what_to_do() {
    let error = |text: &str| migrate(text).unwrap_err().to_string();
    for empty in ["", "\n", "---\n", r#"{"kind": "List", "items": []}"#] {
        assert!(error(empty).starts_with("there is no object in it; "), "{empty:?}");
    }
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: aws-node-x7x2k, namespace: kube-system}\nspec: {containers: [{name: aws-node}]}\n";
    assert_eq!(
        error(pod),
        "no DaemonSet has a container aws-node: there is Pod kube-system/aws-node-x7x2k; it needs what `kubectl -n kube-system get daemonset aws-node -o yaml` prints"
    );
    let renamed = error(&with("        name: aws-node\n        ports", "        name: cilium-agent\n        ports"));
    assert!(renamed.contains("there is DaemonSet kube-system/aws-node (containers: cilium-agent, aws-eks-nodeagent);"), "{renamed}");
    assert!(error("Error from server (Forbidden): daemonsets.apps is forbidden").contains("a document that is no Kubernetes object"));
    assert!(error("kind: Pod\n").contains("there is Pod;"));
    assert!(error(&"kind: Secret\nmetadata: {name: s}\n---\n".repeat(9)).contains("Secret s, 4 more;"));
    assert_eq!(
        error(&format!("{SHIPPED}---\n{SHIPPED}")),
        "several DaemonSets have a container aws-node: kube-system/aws-node, kube-system/aws-node; give it one of them"
    );
    let shape = error(&with("value: prng", "value: [prng]"));
    assert!(shape.starts_with("DaemonSet kube-system/aws-node: invalid type"), "{shape}");
    // Where it is: the line and the column.
    let syntax = error(&with("      containers:\n", "     containers:\n"));
    assert!(syntax.starts_with("neither YAML nor JSON: ") && syntax.contains("line"), "{syntax}");
    assert!(error("{\"kind\": ").contains("line 1"));
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![any::<String>(), "[ -~\\n]{0,20}", "(true|false|1|none|strict|DEBUG|[0-9]{1,4}|\\$\\(X\\)|#.*|---|: |\u{85}|\u{feff})"]
}

fn name() -> impl Strategy<Value = String> {
    let settings = Config::read(&|_| None).unwrap().settings;
    let known: Vec<String> = settings.iter().map(|setting| setting.name.to_owned()).chain(AWS_CLIENT.map(str::to_owned)).collect();
    prop_oneof![4 => prop::sample::select(known), 1 => piece()]
}

proptest! {
    /// Whatever a DaemonSet holds: what is printed is YAML of the chart's shape, each value as it was; a variable that is set is in
    /// `env`, in a value of its own, or in a comment.
    #[test]
    fn whatever_it_holds_is_printed_as_values_of_the_chart(
        node in prop::collection::btree_map(name(), piece(), 0..8),
        init in prop::collection::btree_map(name(), piece(), 0..3),
        flags in prop::collection::vec(piece().prop_map(|flag| format!("--{flag}")), 0..4),
        set in piece(),
    ) {
        let env = |map: &BTreeMap<String, String>| map.iter().map(|(name, value)| json!({"name": name, "value": value})).collect::<Vec<_>>();
        let spec = json!({
            "initContainers": [{"name": INIT, "env": env(&init)}],
            "containers": [{"name": NODE, "env": env(&node)}, {"name": POLICY_AGENT, "args": flags}],
        });
        let text = json!({"kind": "DaemonSet", "metadata": {"name": set}, "spec": {"template": {"spec": spec}}}).to_string();
        let migration = migrate(&text).unwrap();
        let printed = values(&migration);
        for (name, value) in node.iter().filter(|(name, value)| !value.is_empty() && !INIT_ACTS.contains(&name.as_str())) {
            let elsewhere = match name.as_str() {
                "MY_NODE_NAME" | "MY_POD_NAME" | "HOST_CNI_BIN_PATH" | "HOST_CNI_CONFDIR_PATH" | "INTROSPECTION_BIND_ADDRESS" | MODE => true,
                "CLUSTER_NAME" => printed["clusterName"] == **value,
                "CLUSTER_ENDPOINT" => printed["clusterEndpoint"] == **value,
                name => migration.notes.iter().any(|(about, _)| about == name),
            };
            prop_assert!(migration.env.get(name) == Some(value) || elsewhere, "{}", name);
        }
    }
}
