//! The plugin's part of a conflist, as the runtime hands it over on standard input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::error::{CniError, ErrorCode};
use super::result::{CniResult, PrevResult};
use super::version::Version;
use crate::network::names::{DEFAULT_VETH_PREFIX, check_veth_prefix};

/// Where the agent listens when the configuration does not say.
pub const DEFAULT_SOCKET: &str = "/var/run/stanchion/agent.sock";
/// The directory of spooled releases, beside the socket.
const SPOOL: &str = "spool";
/// `k8s.amazonaws.com/nicConfig: multi-nic-attachment` asks for an address on every network card.
const MULTI_NIC: (&str, &str) = ("k8s.amazonaws.com/nicConfig", "multi-nic-attachment");

/// The bandwidth plugin, chained behind us, shapes what such a pod sends by an ingress qdisc on the host veth.
const EGRESS_BANDWIDTH: &str = "kubernetes.io/egress-bandwidth";

/// The configuration: aws-node's keys, and `socket` and `spoolDir` of our own.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConf {
    /// The specification's version.
    pub version: Version,
    /// The network's name; part of every allocation's key.
    pub name: String,
    /// The agent's socket.
    pub socket: PathBuf,
    /// Where releases wait while the agent is away.
    pub spool_dir: PathBuf,
    /// The prefix of host veths; the agent's reply has the last word.
    pub veth_prefix: String,
    /// The pods' MTU in bytes; `None`: what the agent says.
    pub mtu: Option<u32>,
    /// The pod's annotation asks for several interfaces.
    pub multi_nic: bool,
    /// Another plugin of the chain will put an ingress qdisc on the host veth.
    pub shares_ingress: bool,
    /// What an earlier ADD returned, unread: a DEL must not fail on it.
    pub prev_result: Option<serde_json::Value>,
    /// GC: the attachments that live; `None`: the runtime did not say, which does not mean that none does. `null` is how libcni writes an
    /// empty list.
    pub valid_attachments: Option<Vec<ValidAttachment>>,
    /// `pluginLogFile`: a file, or `stderr`; `None`: no log.
    pub log_file: Option<PathBuf>,
    /// `pluginLogLevel`.
    pub log_level: LogLevel,
}

/// Which calls are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// All: `DEBUG` and `INFO`.
    #[default]
    Calls,
    /// Those that failed: `WARN`, `ERROR`, `FATAL`.
    Failures,
}

/// An attachment that the runtime still knows (`cni.dev/valid-attachments`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Its interface.
    #[serde(rename = "ifname")]
    pub if_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    socket: Option<PathBuf>,
    spool_dir: Option<PathBuf>,
    veth_prefix: Option<String>,
    plugin_log_file: Option<PathBuf>,
    plugin_log_level: Option<String>,
    #[serde(default, deserialize_with = "number_or_text")]
    mtu: Option<u32>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    prev_result: Option<serde_json::Value>,
    #[serde(default, rename = "cni.dev/valid-attachments", deserialize_with = "said")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    /// The key's name in the first draft, which libcni still sends too.
    #[serde(default, rename = "cni.dev/attachments", deserialize_with = "said")]
    attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default, rename = "io.kubernetes.cri.pod-annotations")]
    annotations: Option<BTreeMap<String, String>>,
}

/// A list that was said, if only as `null`.
fn said<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    Option::deserialize(deserializer).map(|list| Some(list.unwrap_or_default()))
}

/// aws-node renders its MTU as a string.
fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u32),
        Text(String),
    }
    match Option::<Either>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Either::Number(number)) => Ok(Some(number)),
        Some(Either::Text(text)) if text.is_empty() => Ok(None),
        Some(Either::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

// === impl LogLevel ===

impl LogLevel {
    /// aws-node's words in any case; another one means `DEBUG`, as there.
    fn parse(text: &str) -> Self {
        match text.to_ascii_uppercase().as_str() {
            "WARN" | "ERROR" | "FATAL" => Self::Failures,
            _ => Self::Calls,
        }
    }

    /// Whether a call with this outcome is logged.
    pub fn wants(self, failed: bool) -> bool {
        failed || self == Self::Calls
    }
}

// === impl NetConf ===

impl NetConf {
    /// Reads standard input.
    ///
    /// # Errors
    /// Code 6 for what is no JSON object, 1 for an unknown version, 7 for a value out of range.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let wire: Wire = serde_json::from_slice(text)
            .map_err(|error| CniError::new(ErrorCode::Decode, format!("the network configuration is not readable: {error}")))?;
        let version = Version::negotiate(&wire.cni_version)?;
        let invalid = |text: String| CniError::new(ErrorCode::InvalidConfig, text);
        if wire.name.is_empty() {
            return Err(invalid("the network configuration has no name".to_owned()));
        }
        let veth_prefix = wire.veth_prefix.unwrap_or_else(|| DEFAULT_VETH_PREFIX.to_owned());
        check_veth_prefix(&veth_prefix).map_err(|error| invalid(error.to_string()))?;
        // The bounds of AWS_VPC_ENI_MTU.
        if let Some(mtu) = wire.mtu.filter(|mtu| !(576..=9001).contains(mtu)) {
            return Err(invalid(format!("mtu {mtu} is not between 576 and 9001")));
        }
        let socket = wire.socket.unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
        let spool_dir = wire.spool_dir.unwrap_or_else(|| spool_beside(&socket));
        let log_file = wire.plugin_log_file.filter(|path| !path.as_os_str().is_empty());
        if log_file.as_deref() == Some(Path::new("stdout")) {
            return Err(invalid("pluginLogFile is stdout, which is where the result goes; use a file or stderr".to_owned()));
        }
        let (key, value) = MULTI_NIC;
        let annotations = wire.runtime_config.annotations.unwrap_or_default();
        let multi_nic = annotations.get(key).is_some_and(|text| text == value);
        let shares_ingress = annotations.contains_key(EGRESS_BANDWIDTH);
        let prev_result = wire.prev_result.filter(|value| !value.is_null());
        Ok(Self {
            version,
            name: wire.name,
            socket,
            spool_dir,
            veth_prefix,
            mtu: wire.mtu,
            multi_nic,
            shares_ingress,
            prev_result,
            valid_attachments: wire.valid_attachments.or(wire.attachments),
            log_file,
            log_level: LogLevel::parse(wire.plugin_log_level.as_deref().unwrap_or_default()),
        })
    }

    /// The version that a configuration asks for, even if the rest of it is nonsense: for VERSION and for errors.
    pub fn peek_version(text: &[u8]) -> Option<String> {
        #[derive(Deserialize)]
        struct Peek {
            #[serde(rename = "cniVersion")]
            version: Option<String>,
        }
        serde_json::from_slice::<Peek>(text).ok()?.version
    }

    /// What an earlier ADD returned; `None` when the runtime sent nothing.
    ///
    /// # Errors
    /// Code 6 when it is no result.
    pub fn read_prev_result(&self) -> Result<Option<PrevResult>, CniError> {
        self.prev_result.clone().map(PrevResult::from_json).transpose()
    }

    /// A result in the configuration's version.
    pub fn render(&self, result: &CniResult) -> serde_json::Value {
        result.to_json(self.version)
    }
}

/// The default spool directory of an agent's socket.
pub fn spool_beside(socket: &Path) -> PathBuf {
    socket.parent().unwrap_or(Path::new("/")).join(SPOOL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetConf, CniError> {
        NetConf::parse(text.as_bytes())
    }

    #[test]
    fn aws_nodes_conflist_is_understood() {
        let conf = parse(
            r#"{"cniVersion":"0.4.0","name":"aws-cni","type":"stanchion-cni","vethPrefix":"eni","mtu":"9001","podSGEnforcingMode":"strict",
                "pluginLogFile":"/var/log/aws-routed-eni/plugin.log","pluginLogLevel":"DEBUG","capabilities":{"io.kubernetes.cri.pod-annotations":true},
                "runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"k8s.amazonaws.com/nicConfig":"multi-nic-attachment"}}}"#,
        )
        .unwrap();
        assert_eq!((conf.version, conf.mtu, conf.multi_nic, conf.shares_ingress), (Version::V040, Some(9001), true, false));
        assert_eq!(conf.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(conf.spool_dir, Path::new("/var/run/stanchion/spool"));
    }

    #[test]
    fn a_pod_that_the_bandwidth_plugin_will_shape_is_seen() {
        let conf = |annotation: &str| {
            let text = format!(
                r#"{{"cniVersion":"1.0.0","name":"x","runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{{"{annotation}":"10M"}}}}}}"#
            );
            parse(&text).unwrap()
        };
        assert!(conf("kubernetes.io/egress-bandwidth").shares_ingress);
        assert!(!conf("kubernetes.io/ingress-bandwidth").shares_ingress, "a root qdisc is in nobody's way");
    }

    #[test]
    fn nonsense_is_refused_with_its_code() {
        for (text, code) in [
            ("", ErrorCode::Decode),
            ("[]", ErrorCode::Decode),
            (r#"{"cniVersion":"9.9.9","name":"x"}"#, ErrorCode::IncompatibleVersion),
            (r#"{"cniVersion":"1.0.0"}"#, ErrorCode::InvalidConfig),
            (r#"{"cniVersion":"1.0.0","name":"x","pluginLogFile":"stdout"}"#, ErrorCode::InvalidConfig),
            (r#"{"cniVersion":"1.0.0","name":"x","mtu":100}"#, ErrorCode::InvalidConfig),
            (r#"{"cniVersion":"1.0.0","name":"x","mtu":"many"}"#, ErrorCode::Decode),
            (r#"{"cniVersion":"1.0.0","name":"x","vethPrefix":"toolong"}"#, ErrorCode::InvalidConfig),
        ] {
            assert_eq!(parse(text).unwrap_err().code, code, "{text}");
        }
        assert_eq!(NetConf::peek_version(br#"{"cniVersion":"9.9.9"}"#).as_deref(), Some("9.9.9"));
    }

    #[test]
    fn the_list_of_the_living_is_read() {
        let conf = parse(r#"{"cniVersion":"1.1.0","name":"x","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#).unwrap();
        assert_eq!(conf.valid_attachments, Some(vec![ValidAttachment { container_id: "a".into(), if_name: "eth0".into() }]));
        let conf = parse(r#"{"cniVersion":"1.1.0","name":"x","cni.dev/attachments":[]}"#).unwrap();
        assert_eq!(conf.valid_attachments, Some(vec![]));
        let conf = parse(r#"{"cniVersion":"1.1.0","name":"x","cni.dev/valid-attachments":null,"cni.dev/attachments":null}"#).unwrap();
        assert_eq!(conf.valid_attachments, Some(vec![]), "as Go writes an empty list");
        assert_eq!(parse(r#"{"cniVersion":"1.1.0","name":"x"}"#).unwrap().valid_attachments, None);
    }
}
