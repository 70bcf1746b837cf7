//! What the runtime says in the environment.

use std::path::PathBuf;

use super::error::{CniError, ErrorCode};
use crate::ids::PodName;
use crate::network::names::MAX_IF_NAME;

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Give the pod its network.
    Add,
    /// Take it away; as often as the runtime likes.
    Del,
    /// Is it as it was set up?
    Check,
    /// Release what is not in the list.
    Gc,
    /// Could an ADD be served now?
    Status,
    /// Which versions?
    Version,
}

/// One call, its environment read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What to do.
    pub verb: Verb,
    /// `CNI_CONTAINERID`; empty for verbs that concern no container.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub if_name: String,
    /// `CNI_NETNS`; `None` when it is empty, as in a DEL after a reboot.
    pub netns: Option<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be the node's own.
    pub netns_override: bool,
    /// Of `CNI_ARGS`.
    pub pod: PodName,
    /// `K8S_POD_UID` of `CNI_ARGS`, empty if the runtime does not say.
    pub pod_uid: String,
}

// === impl Verb ===

impl Verb {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            _ => return None,
        })
    }

    /// Whether it is about one container.
    fn has_container(self) -> bool {
        matches!(self, Self::Add | Self::Del | Self::Check)
    }
}

// === impl Invocation ===

impl Invocation {
    /// Reads the environment through `variable`.
    ///
    /// # Errors
    /// Code 4, naming the variable.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let invalid = |text: String| CniError::new(ErrorCode::InvalidEnvironment, text);
        let command = variable("CNI_COMMAND").unwrap_or_default();
        let verb = Verb::parse(&command)
            .ok_or_else(|| invalid(format!("CNI_COMMAND is {command:?}; it must be ADD, DEL, CHECK, GC, STATUS or VERSION")))?;
        let mut invocation = Self {
            verb,
            container_id: variable("CNI_CONTAINERID").unwrap_or_default(),
            if_name: variable("CNI_IFNAME").unwrap_or_default(),
            netns: variable("CNI_NETNS").filter(|path| !path.is_empty()).map(PathBuf::from),
            netns_override: variable("CNI_NETNS_OVERRIDE").is_some_and(|text| crate::config::parse_bool(&text) == Some(true)),
            pod: PodName::default(),
            pod_uid: String::new(),
        };
        if !verb.has_container() {
            return Ok(invocation);
        }
        check_container_id(&invocation.container_id).map_err(invalid)?;
        check_if_name(&invocation.if_name).map_err(invalid)?;
        if invocation.netns.is_none() && verb != Verb::Del {
            return Err(invalid(format!("CNI_NETNS is empty, and {command} needs the pod's network namespace")));
        }
        // In any order, with pairs that other plugins understand.
        for pair in variable("CNI_ARGS").unwrap_or_default().split(';') {
            match pair.split_once('=') {
                Some(("K8S_POD_NAME", name)) => invocation.pod.name = name.to_owned(),
                Some(("K8S_POD_NAMESPACE", namespace)) => invocation.pod.namespace = namespace.to_owned(),
                Some(("K8S_POD_UID", uid)) => invocation.pod_uid = uid.to_owned(),
                _ => {}
            }
        }
        if verb == Verb::Add && (invocation.pod.name.is_empty() || invocation.pod.namespace.is_empty()) {
            return Err(invalid(
                "CNI_ARGS lacks K8S_POD_NAME or K8S_POD_NAMESPACE: this plugin gives addresses to Kubernetes pods only".to_owned(),
            ));
        }
        Ok(invocation)
    }
}

/// The specification's rule: alphanumeric first, then also `_`, `.`, `-`. Also keeps it usable as a file name.
fn check_container_id(id: &str) -> Result<(), String> {
    let good = id.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if good { Ok(()) } else { Err(format!("CNI_CONTAINERID is {id:?}; it must be letters, digits, '_', '.', '-'")) }
}

/// The specification's and the kernel's rule.
fn check_if_name(name: &str) -> Result<(), String> {
    let good = !name.is_empty()
        && name.len() <= MAX_IF_NAME
        && !matches!(name, "." | "..")
        && !name.bytes().any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0);
    if good { Ok(()) } else { Err(format!("CNI_IFNAME is {name:?}; it must be an interface name of at most {MAX_IF_NAME} characters")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Invocation, CniError> {
        Invocation::from_env(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "57601f51"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/var/run/netns/x"),
        ("CNI_ARGS", "K8S_POD_UID=4e64;IgnoreUnknown=1;K8S_POD_NAMESPACE=default;X=;K8S_POD_NAME=cli;K8S_POD_INFRA_CONTAINER_ID=5760"),
    ];

    fn with(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
        ADD.iter().map(|(key, old)| if *key == name { (name, value) } else { (*key, *old) }).collect()
    }

    #[test]
    fn arguments_come_in_any_order() {
        let add = read(&ADD).unwrap();
        assert_eq!((add.verb, add.pod, add.pod_uid.as_str()), (Verb::Add, PodName::new("default", "cli"), "4e64"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (name, value, said) in [
            ("CNI_COMMAND", "add", "CNI_COMMAND"),
            ("CNI_CONTAINERID", "", "CNI_CONTAINERID"),
            ("CNI_CONTAINERID", "../../etc", "CNI_CONTAINERID"),
            ("CNI_IFNAME", "a-very-long-interface", "CNI_IFNAME"),
            ("CNI_IFNAME", "a/b", "CNI_IFNAME"),
            ("CNI_NETNS", "", "CNI_NETNS"),
            ("CNI_ARGS", "", "K8S_POD_NAME"),
        ] {
            let error = read(&with(name, value)).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidEnvironment);
            assert!(error.msg.contains(said), "{}", error.msg);
        }
    }

    #[test]
    fn a_del_needs_neither_namespace_nor_pod() {
        let del = read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "a1"), ("CNI_IFNAME", "eth0")]).unwrap();
        assert_eq!(del.netns, None);
        assert!(read(&[("CNI_COMMAND", "STATUS"), ("CNI_CONTAINERID", "")]).is_ok(), "containerd sends empty variables");
    }
}
