//! What is shipped in deploy/: the manifests that the chart renders to are safe and complete, and what is named in them
//! exists. That they are what the chart renders is `deploy/render.py --check`, with Helm's own engine.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stanchion_core::config::Config;
use stanchion_core::logs::config::LogFile;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn documents(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(deploy().join("manifests").join(name)).unwrap();
    text.split("\n---").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

fn daemon_set(name: &str) -> Value {
    documents(name).into_iter().find(|document| document["kind"] == "DaemonSet").unwrap()
}

fn containers(daemon_set: &Value) -> impl Iterator<Item = &Value> {
    let spec = &daemon_set["spec"]["template"]["spec"];
    spec["initContainers"].as_array().unwrap().iter().chain(spec["containers"].as_array().unwrap())
}

fn container(daemon_set: &Value, name: &str) -> Value {
    containers(daemon_set).find(|container| container["name"] == name).unwrap().clone()
}

/// What the last of a container's arguments that begin so says.
fn argument(container: &Value, flag: &str) -> Option<String> {
    let arguments = container["args"].as_array().unwrap().iter();
    arguments.filter_map(|argument| argument.as_str().unwrap().strip_prefix(flag)).next_back().map(str::to_owned)
}

/// The container's mounts of paths of the host: path and mount.
fn host_mounts(daemon_set: &Value, container: &Value) -> Vec<(String, Value)> {
    let volumes = daemon_set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    let mounts = container["volumeMounts"].as_array().unwrap().iter();
    let host = mounts.filter_map(|mount| {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        Some((volume["hostPath"]["path"].as_str()?.to_owned(), mount.clone()))
    });
    host.collect()
}

const BOTH: [&str; 2] = ["stanchion.yaml", "stanchion-all-features.yaml"];

#[test]
fn the_telemetry_container_has_no_privilege() {
    let set = daemon_set("stanchion.yaml");
    let telemetry = container(&set, "telemetry");
    let context = &telemetry["securityContext"];
    assert_eq!(context["capabilities"], serde_json::json!({"drop": ["ALL"]}));
    assert_eq!((&context["readOnlyRootFilesystem"], &context["allowPrivilegeEscalation"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
    let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    for mount in telemetry["volumeMounts"].as_array().unwrap() {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        let own = mount["name"].as_str().unwrap().starts_with("telemetry-");
        assert!(own || volume["hostPath"].is_null() || mount["readOnly"] == true, "{mount} is writable");
    }
    // It cannot reach the plugin's socket.
    assert!(!telemetry.to_string().contains("/var/run/stanchion/"));
}

#[test]
fn the_network_container_has_the_capabilities_that_the_agent_keeps_and_no_more() {
    let network = container(&daemon_set("stanchion.yaml"), "network");
    let context = &network["securityContext"];
    assert_eq!(context["privileged"], Value::Null);
    assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
    let added: BTreeSet<&str> = context["capabilities"]["add"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    let source = std::fs::read_to_string(deploy().join("../agent/src/privileges.rs")).unwrap();
    let list = source.split("const NETWORK").nth(1).unwrap().split("];").next().unwrap();
    let kept: BTreeSet<&str> = list.split("Capability::CAP_").skip(1).map(|c| c.split([',', ']', '\n']).next().unwrap()).collect();
    assert_eq!(added, kept);
    let page = std::fs::read_to_string(deploy().join("SECURITY.md")).unwrap();
    assert!(kept.iter().all(|capability| page.contains(&format!("`CAP_{capability}`"))), "SECURITY.md names each of {kept:?}");
}

#[test]
fn the_network_container_may_pin_programs_where_apparmor_is_enforced() {
    let set = daemon_set("stanchion.yaml");
    for (name, profile) in [("network", serde_json::json!({"type": "Unconfined"})), ("telemetry", Value::Null), ("install", Value::Null)] {
        assert_eq!(container(&set, name)["securityContext"]["appArmorProfile"], profile, "{name}");
    }
    let page = std::fs::read_to_string(deploy().join("SECURITY.md")).unwrap();
    assert!(page.contains("network.securityContext.appArmorProfile"));
}

#[test]
fn the_network_container_may_set_back_sysctls_of_the_hosts_network_and_no_others() {
    for name in BOTH {
        let set = daemon_set(name);
        let network = container(&set, "network");
        let root = argument(&network, "--sysctl-root=").unwrap();
        let below: Vec<_> = host_mounts(&set, &network).into_iter().filter(|(path, _)| path.starts_with("/proc")).collect();
        let [(path, mount)] = below.as_slice() else { panic!("{name}: {below:?}") };
        assert_eq!((path.as_str(), &mount["mountPath"]), ("/proc/sys/net", &Value::String(format!("{root}/net"))), "{name}");
        assert_ne!(mount["readOnly"], true, "{name}");
        assert_eq!(argument(&container(&set, "telemetry"), "--sysctl-root="), None);
    }
}

#[test]
fn each_path_of_the_host_that_can_be_written_is_said_with_its_reason() {
    let page = std::fs::read_to_string(deploy().join("SECURITY.md")).unwrap();
    for name in BOTH {
        let set = daemon_set(name);
        for container in containers(&set).filter(|container| container["securityContext"]["privileged"] != true) {
            let row = format!("| {} |", container["name"].as_str().unwrap());
            for (path, mount) in host_mounts(&set, container) {
                let said = page.lines().any(|line| line.starts_with(&row) && line.contains(&format!("`{path}`")));
                assert!(said || mount["readOnly"] == true, "{name}: SECURITY.md has no row of {row} with {path}");
            }
        }
    }
}

#[test]
fn every_volume_is_mounted_and_every_mount_has_its_volume() {
    for name in BOTH {
        let set = daemon_set(name);
        let names = |list: &Value| -> BTreeSet<String> {
            list.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
        };
        let volumes = names(&set["spec"]["template"]["spec"]["volumes"]);
        let mounted: BTreeSet<String> = containers(&set).flat_map(|container| names(&container["volumeMounts"])).collect();
        assert_eq!(volumes, mounted, "{name}");
    }
}

#[test]
fn the_agent_accepts_the_environment_of_each_container() {
    for name in BOTH {
        for container in containers(&daemon_set(name)) {
            let environment = container["env"].as_array().unwrap();
            let get = |name: &str| {
                let entry = environment.iter().find(|entry| entry["name"] == name)?;
                Some(entry["value"].as_str().unwrap_or("node1").to_owned())
            };
            let config = Config::read(&get).unwrap_or_else(|errors| panic!("{name} {}: {errors:?}", container["name"]));
            let known: BTreeSet<&str> = config.settings.iter().map(|setting| setting.name).collect();
            let mut seen = BTreeSet::new();
            for entry in environment {
                let variable = entry["name"].as_str().unwrap();
                assert!(known.contains(variable), "{name}: {variable} is no setting of the agent");
                // The kubelet would take the last one.
                assert!(seen.insert(variable), "{name} {}: {variable} twice", container["name"]);
            }
        }
    }
}

#[test]
fn the_telemetry_container_finds_the_settings_of_log_shipping_where_the_environment_says() {
    let name = "stanchion-all-features.yaml";
    let (documents, set) = (documents(name), daemon_set(name));
    let telemetry = container(&set, "telemetry");
    let variable = telemetry["env"].as_array().unwrap().iter().find(|entry| entry["name"] == "STANCHION_LOG_CONFIG").unwrap();
    let path = Path::new(variable["value"].as_str().unwrap());
    let mounts = telemetry["volumeMounts"].as_array().unwrap();
    let mount = mounts.iter().find(|mount| Path::new(mount["mountPath"].as_str().unwrap()) == path.parent().unwrap()).unwrap();
    let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
    let map = documents.iter().find(|d| d["kind"] == "ConfigMap" && d["metadata"]["name"] == volume["configMap"]["name"]).unwrap();
    let text = map["data"][path.file_name().unwrap().to_str().unwrap()].as_str().unwrap();
    let settings = LogFile::parse(text).unwrap().apply(LogSettings::new(Layout::FluentBit)).unwrap();
    // A journal in memory is mounted where it is looked for.
    let journal = settings.journal.unwrap().dirs;
    assert!(mounts.iter().any(|mount| journal.iter().any(|directory| mount["mountPath"] == *directory)), "{journal:?}");
}

#[test]
fn every_port_that_prometheus_asks_is_a_containers() {
    let name = "stanchion-all-features.yaml";
    let set = daemon_set(name);
    let ports = |container: &Value| container["ports"].as_array().cloned().unwrap_or_default();
    let served: BTreeSet<String> = containers(&set).flat_map(ports).map(|port| port["name"].as_str().unwrap().to_owned()).collect();
    for (kind, list) in [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints"), ("Service", "ports")] {
        let document = documents(name).into_iter().find(|document| document["kind"] == kind).unwrap();
        let port = |asked: &Value| asked[if kind == "Service" { "targetPort" } else { "port" }].as_str().unwrap().to_owned();
        let asked: BTreeSet<String> = document["spec"][list].as_array().unwrap().iter().map(port).collect();
        assert_eq!(asked, served, "{kind}");
    }
    let telemetry = container(&set, "telemetry");
    let address: std::net::SocketAddr = argument(&telemetry, "--metrics-address=").unwrap().parse().unwrap();
    assert_eq!(telemetry["ports"][0]["containerPort"], address.port());
}

#[test]
fn a_cni_stays_until_the_node_ends_and_comes_before_everything_else() {
    let set = daemon_set("stanchion.yaml");
    let spec = &set["spec"]["template"]["spec"];
    assert_eq!(spec["priorityClassName"], "system-node-critical");
    assert_eq!(spec["hostNetwork"], true);
    assert_eq!(spec["tolerations"], serde_json::json!([{"operator": "Exists"}]));
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], "10%");
    // The cluster's DNS needs a CNI: the node's own resolver is used.
    assert_eq!(spec["dnsPolicy"], "Default");
    assert!(spec["terminationGracePeriodSeconds"].as_u64().unwrap() > 12, "the last log lines have 12 s");
    for container in containers(&set) {
        assert!(!container["resources"]["requests"].is_null(), "{} asks for no resources", container["name"]);
    }
    let network = container(&set, "network");
    for probe in ["livenessProbe", "readinessProbe"] {
        assert_eq!(network[probe]["httpGet"]["host"], "127.0.0.1", "{probe}: no process is started for it");
        assert_eq!(network[probe]["httpGet"]["port"], 61679);
    }
}

#[test]
fn nothing_is_random_and_nothing_needs_a_hook() {
    let directory = deploy().join("chart/templates");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["rand", "genCA", "genSigned", "now", "lookup", "helm.sh/hook", "uuidv4"] {
            let used = text.split(|c: char| !(c.is_ascii_alphanumeric() || "./".contains(c))).any(|found| found == word);
            assert!(!used, "{}: {word}", path.display());
        }
    }
}

#[test]
fn iam_policies_are_documents_that_name_each_action_once() {
    for entry in std::fs::read_dir(deploy().join("iam")).unwrap() {
        let path = entry.unwrap().path();
        let policy: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(policy["Version"], "2012-10-17", "{}", path.display());
        let mut seen = BTreeSet::new();
        for statement in policy["Statement"].as_array().unwrap() {
            let actions: Vec<&str> = match &statement["Action"] {
                Value::String(action) => vec![action],
                actions => actions.as_array().unwrap().iter().map(|action| action.as_str().unwrap()).collect(),
            };
            for action in actions {
                assert!(!action.contains('*'), "{}: {action}", path.display());
                assert!(seen.insert(action.to_owned()), "{}: {action} twice", path.display());
            }
        }
    }
}

#[test]
fn the_iam_policies_allow_every_ec2_call_that_the_agent_makes() {
    use stanchion_core::cloud::Ec2Action;
    let text = |name: &str| std::fs::read_to_string(deploy().join("iam").join(name)).unwrap();
    let (ipv4, ipv6) = (text("ipv4.json"), text("ipv6.json"));
    for action in Ec2Action::ALL {
        let name = format!("\"ec2:{action:?}\"");
        let for_ipv6 = format!("{action:?}").contains("Ipv6");
        assert!(if for_ipv6 { &ipv6 } else { &ipv4 }.contains(&name), "{name} is in no policy");
    }
}
