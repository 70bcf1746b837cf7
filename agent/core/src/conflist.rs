//! The network configuration that the container runtime reads: `10-aws.conflist`, network `aws-cni`, as aws-node names them,
//! so that a node can be handed over in both directions.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The file's name; aws-node's too.
pub const FILE_NAME: &str = "10-aws.conflist";
/// The plugin's file name in the runtime's directory of binaries.
pub const PLUGIN: &str = "stanchion-cni";
/// The network's name, part of every allocation's key; aws-node's too.
const NETWORK: &str = "aws-cni";
/// aws-node's plugin.
const AWS_PLUGIN: &str = "aws-cni";

/// What the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflist<'a> {
    /// The specification's version; see [`version_for`].
    pub version: &'static str,
    /// The agent's socket on the host.
    pub socket: &'a Path,
    /// The plugin's journal: a file, `stderr`, or empty for none.
    pub log_file: &'a str,
    /// aws-node's word for what goes there.
    pub log_level: &'a str,
    /// Plugins after ours. Their binaries must be there: a missing plugin fails every pod.
    pub chained: &'a [Chained],
}

/// A plugin of the CNI project that runs after ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chained {
    /// For `hostPort`.
    Portmap,
    /// ENABLE_BANDWIDTH_PLUGIN: the annotations `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`.
    Bandwidth,
    /// DISABLE_POD_V6: no IPv6 in the pod, not even link-local.
    NoIpv6,
}

impl Chained {
    /// The binary's name.
    pub fn binary(self) -> &'static str {
        match self {
            Self::Portmap => "portmap",
            Self::Bandwidth => "bandwidth",
            Self::NoIpv6 => "tuning",
        }
    }

    /// Every one of them.
    const ALL: [Self; 3] = [Self::Portmap, Self::Bandwidth, Self::NoIpv6];

    fn document(self) -> Value {
        match self {
            Self::Portmap => json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
            Self::Bandwidth => json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
            Self::NoIpv6 => {
                let sysctl: serde_json::Map<String, Value> =
                    ["all", "default", "lo"].iter().map(|name| (format!("net.ipv6.conf.{name}.disable_ipv6"), json!("1"))).collect();
                json!({"type": "tuning", "sysctl": sysctl})
            }
        }
    }
}

impl Conflist<'_> {
    /// The file's content, with those plugins of the file that is there (`present`, `null` for none) that somebody else chained into it:
    /// service meshes put theirs into the first configuration by name and expect it to stay.
    pub fn render(&self, present: &Value) -> String {
        let mut own = json!({
            "type": PLUGIN,
            "socket": self.socket.display().to_string(),
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        });
        if !self.log_file.is_empty() {
            own["pluginLogFile"] = json!(self.log_file);
            own["pluginLogLevel"] = json!(self.log_level);
        }
        let plugins = std::iter::once(own).chain(self.chained.iter().map(|plugin| plugin.document())).collect();
        let document = json!({"cniVersion": self.version, "name": NETWORK, "plugins": with_others(plugins, present)});
        format!("{document:#}\n")
    }
}

/// What somebody else chained into a configuration of ours or aws-node's.
pub fn others(configuration: &Value) -> impl Iterator<Item = &Value> {
    plugins(configuration).iter().filter(|plugin| !is_known(plugin))
}

/// None where the first plugin, which makes the interface, is a third one's: such a configuration is replaced.
fn plugins(configuration: &Value) -> &[Value] {
    let plugins = configuration.get("plugins").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let first = plugins.first().map(kind).unwrap_or_default();
    if [PLUGIN, AWS_PLUGIN].contains(&first) { plugins } else { &[] }
}

/// The name of a plugin's binary.
pub fn kind(plugin: &Value) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Ours, aws-node's, or one that both chain by their settings. `tuning` may be anybody's: by what it says.
fn is_known(plugin: &Value) -> bool {
    let tuning = Chained::NoIpv6.binary();
    [PLUGIN, AWS_PLUGIN, "egress-cni"].contains(&kind(plugin))
        || Chained::ALL.iter().any(|chained| *plugin == chained.document() || (kind(plugin) == chained.binary() && kind(plugin) != tuning))
}

/// `list` with the plugins of others, each after the same one of `list` as it is in `present`.
fn with_others(mut list: Vec<Value>, present: &Value) -> Vec<Value> {
    // The first is whoever connects the pod.
    let mut place = 1;
    for plugin in plugins(present) {
        if !is_known(plugin) {
            list.insert(place, plugin.clone());
            place += 1;
        } else if let Some(ours) = list.iter().position(|ours| kind(ours) == kind(plugin) && is_known(ours)) {
            place = ours + 1;
        }
    }
    list
}

/// Where the agent says, beside its socket, that pods could be connected: a file with the id of the boot in which that was so.
pub fn ready_mark(socket: &Path) -> PathBuf {
    socket.with_file_name("ready")
}

/// Versions of the specification that a configuration may have, newest first. 1.1.0 brings STATUS, from which containerd 2
/// makes the node's readiness.
const VERSIONS: [&str; 3] = ["1.1.0", "1.0.0", "0.4.0"];
/// What a chained plugin is taken to speak that does not say: the CNI project's plugins of the years before 1.1.0.
const UNSAID: [&str; 2] = ["1.0.0", "0.4.0"];

/// The newest version that the runtime, as the Node object names it (`containerd://2.3.4`), and every chained plugin speak.
/// All plugins of a list are called with the list's version, and one that does not know it fails every pod. `chained` has
/// each plugin's versions, `None` where it did not say.
///
/// # Errors
/// The first plugin that speaks none of ours, by its place.
pub fn version_for(runtime: &str, chained: &[Option<Vec<String>>]) -> Result<&'static str, usize> {
    let major =
        runtime.strip_prefix("containerd://").and_then(|version| version.trim_start_matches('v').split('.').next()?.parse::<u32>().ok());
    // Older runtimes refuse a version that they do not know.
    let mut spoken: Vec<&str> = VERSIONS.into_iter().skip(usize::from(major.is_none_or(|major| major < 2))).collect();
    for (index, plugin) in chained.iter().enumerate() {
        match plugin {
            Some(versions) => spoken.retain(|version| versions.iter().any(|v| v == version)),
            None => spoken.retain(|version| UNSAID.contains(version)),
        }
        if spoken.is_empty() {
            return Err(index);
        }
    }
    // There is at least one: the oldest is never skipped for a runtime.
    VERSIONS.into_iter().find(|version| spoken.contains(version)).ok_or(0)
}

/// What a plugin is told when it is asked for its versions, after `CNI_COMMAND=VERSION`.
pub const VERSION_QUESTION: &str = r#"{"cniVersion":"1.0.0"}"#;

/// The versions of a plugin's answer; `None` if it is none.
pub fn spoken(answer: &[u8]) -> Option<Vec<String>> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    Some(answer.get("supportedVersions")?.as_array()?.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Whose configuration a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The first plugin is ours.
    Stanchion,
    /// The first plugin is `aws-cni`.
    AwsNode,
    /// Another one, or no configuration at all.
    Other,
}

/// Whose it is.
pub fn owner(content: &str) -> Owner {
    let document: Value = serde_json::from_str(content).unwrap_or_default();
    match document.pointer("/plugins/0/type").and_then(Value::as_str) {
        Some(PLUGIN) => Owner::Stanchion,
        Some(AWS_PLUGIN) => Owner::AwsNode,
        _ => Owner::Other,
    }
}

/// When the machine booted, seconds since 1970, from the content of `/proc/stat`.
pub fn boot_time(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::NetConf;

    #[test]
    fn the_plugin_reads_what_is_rendered() {
        let conflist = Conflist {
            version: "1.1.0",
            socket: Path::new("/run/a.sock"),
            log_file: "/var/log/p.log",
            log_level: "ERROR",
            chained: &[Chained::Portmap, Chained::Bandwidth, Chained::NoIpv6],
        };
        let text = conflist.render(&Value::Null);
        assert_eq!(owner(&text), Owner::Stanchion);
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!([1, 2, 3].map(|index| document["plugins"][index]["type"].as_str().unwrap()), ["portmap", "bandwidth", "tuning"]);
        assert_eq!(document["plugins"][3]["sysctl"]["net.ipv6.conf.lo.disable_ipv6"], "1");
        // The runtime hands the plugin its own part with the list's version and name.
        let mut part = document["plugins"][0].clone();
        part["cniVersion"] = document["cniVersion"].clone();
        part["name"] = document["name"].clone();
        let conf = NetConf::parse(part.to_string().as_bytes()).unwrap();
        assert_eq!(
            (conf.name.as_str(), conf.socket.to_str(), conf.log_file.as_deref()),
            ("aws-cni", Some("/run/a.sock"), Some(Path::new("/var/log/p.log")))
        );
        let bare = Conflist { log_file: "", chained: &[], ..conflist }.render(&Value::Null);
        assert!(!bare.contains("portmap") && !bare.contains("pluginLog"), "{bare}");
    }

    #[test]
    fn what_others_chained_in_stays_in_its_place() {
        let conflist = |chained: &'static [Chained]| Conflist {
            version: "1.0.0",
            socket: Path::new("/run/a.sock"),
            log_file: "",
            log_level: "",
            chained,
        };
        let types = |text: &str| -> Vec<String> {
            let document: Value = serde_json::from_str(text).unwrap();
            document["plugins"].as_array().unwrap().iter().map(|plugin| kind(plugin).to_owned()).collect()
        };
        let istio = json!({"type": "istio-cni", "log_level": "info"});
        let sysctls = json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "1024"}});
        // As aws-node's entrypoint writes it, with two guests.
        let aws = json!({"cniVersion": "0.4.0", "name": "aws-cni", "plugins": [
            {"type": "aws-cni"}, {"type": "egress-cni"}, sysctls, {"type": "portmap", "snat": true}, Chained::NoIpv6.document(), istio,
        ]});
        assert_eq!(others(&aws).collect::<Vec<_>>(), [&sysctls, &istio]);
        let first = conflist(&[Chained::Portmap]).render(&aws);
        assert_eq!(types(&first), [PLUGIN, "tuning", "portmap", "istio-cni"]);
        let first: Value = serde_json::from_str(&first).unwrap();
        assert_eq!((&first["plugins"][1], &first["plugins"][3]), (&sysctls, &istio));
        // Ours again, with other settings: the guests stay, what the settings chained no more does not.
        let second = conflist(&[Chained::Portmap, Chained::Bandwidth, Chained::NoIpv6]).render(&first);
        assert_eq!(types(&second), [PLUGIN, "tuning", "portmap", "istio-cni", "bandwidth", "tuning"]);
        let third = conflist(&[]).render(&serde_json::from_str(&second).unwrap());
        assert_eq!(types(&third), [PLUGIN, "tuning", "istio-cni"]);
        assert_eq!(serde_json::from_str::<Value>(&third).unwrap()["plugins"][1], sysctls);
        // Nothing of somebody else's own network, nor of what is none.
        for present in [json!({"plugins": [{"type": "cilium-cni"}, istio]}), json!({"plugins": []}), json!([1]), Value::Null] {
            assert_eq!(types(&conflist(&[Chained::Portmap]).render(&present)), [PLUGIN, "portmap"], "{present}");
        }
    }

    #[test]
    fn versions_by_runtime_and_chained_plugins() {
        let of_1_0 = || spoken(br#"{"cniVersion":"1.0.0","supportedVersions":["0.1.0","0.3.1","0.4.0","1.0.0"]}"#);
        let of_1_1 = || spoken(br#"{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}"#);
        let of_0_4 = || Some(vec!["0.4.0".to_owned()]);
        for (runtime, chained, version) in [
            ("containerd://2.3.4", vec![], Ok("1.1.0")),
            ("containerd://v2.0.1", vec![], Ok("1.1.0")),
            ("containerd://1.6.20~ds1", vec![], Ok("1.0.0")),
            ("cri-o://1.35.0", vec![], Ok("1.0.0")),
            ("", vec![], Ok("1.0.0")),
            ("containerd://2.1.9", vec![of_1_1()], Ok("1.1.0")),
            ("containerd://2.1.9", vec![of_1_1(), of_1_0()], Ok("1.0.0")),
            ("containerd://2.1.9", vec![None], Ok("1.0.0")),
            ("containerd://1.6.20", vec![of_1_1()], Ok("1.0.0")),
            ("containerd://2.1.9", vec![of_1_1(), of_0_4()], Ok("0.4.0")),
            ("containerd://2.1.9", vec![of_1_0(), Some(vec!["0.2.0".to_owned()])], Err(1)),
        ] {
            assert_eq!(version_for(runtime, &chained), version, "{runtime} {chained:?}");
        }
        assert_eq!(spoken(b"exec format error"), None);
    }

    #[test]
    fn owners_and_boot_time() {
        assert_eq!(owner(r#"{"cniVersion":"0.4.0","name":"aws-cni","plugins":[{"type":"aws-cni"}]}"#), Owner::AwsNode);
        assert_eq!(owner("{"), Owner::Other);
        assert_eq!(boot_time("cpu 1 2\nbtime 1795247715\nprocesses 3\n"), Some(1_795_247_715));
        assert_eq!(boot_time("cpu 1 2\n"), None);
    }
}
