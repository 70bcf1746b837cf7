//! The DaemonSet aws-node in what kubectl printed.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::config::parse_bool;
use crate::manifests;
use crate::objects::null_default;

const COMMAND: &str = "kubectl -n kube-system get daemonset aws-node -o yaml";
/// aws-node's own container; whatever the DaemonSet is called, it is one of aws-node with it.
pub(super) const NODE: &str = "aws-node";
pub(super) const INIT: &str = "aws-vpc-cni-init";
/// aws-network-policy-agent.
pub(super) const POLICY_AGENT: &str = "aws-eks-nodeagent";
/// Objects that an error names at most.
const NAMED: usize = 5;

/// Why a text cannot be translated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Neither YAML nor JSON.
    #[error("neither YAML nor JSON: {0}")]
    Syntax(String),
    /// Nothing in it: kubectl says on its standard error why.
    #[error("there is no object in it; it needs what `{COMMAND}` prints")]
    Empty,
    /// Objects, none of which is the one.
    #[error("no DaemonSet has a container {NODE}: there is {}; it needs what `{COMMAND}` prints", found.join(", "))]
    Foreign {
        /// Kinds and names.
        found: Vec<String>,
    },
    /// More than one DaemonSet of aws-node.
    #[error("several DaemonSets have a container {NODE}: {}; give it one of them", names.join(", "))]
    Several {
        /// Namespaces and names.
        names: Vec<String>,
    },
    /// A field of the wrong shape.
    #[error("DaemonSet {name}: {message}")]
    Field {
        /// Namespace and name.
        name: String,
        /// What is wrong.
        message: String,
    },
}

/// What of the input says how a node behaves.
#[derive(Debug)]
pub(super) struct Found {
    /// Namespace and name.
    pub(super) name: String,
    pub(super) node: Container,
    pub(super) init: Container,
    pub(super) policy_agent: Option<Container>,
    /// The ConfigMap's switch of AWS's network policy controller; `None` when the ConfigMap is not in the input.
    pub(super) controller: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    #[serde(deserialize_with = "null_default")]
    init_containers: Vec<Container>,
    #[serde(deserialize_with = "null_default")]
    containers: Vec<Container>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Container {
    #[serde(deserialize_with = "null_default")]
    name: String,
    #[serde(deserialize_with = "null_default")]
    command: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    args: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    env: Vec<Variable>,
    #[serde(deserialize_with = "null_default")]
    pub(super) env_from: Vec<Value>,
}

/// A variable of a container's environment.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Variable {
    name: String,
    #[serde(default, deserialize_with = "null_default")]
    pub(super) value: String,
    /// Where Kubernetes takes the value from instead.
    pub(super) value_from: Option<Value>,
}

impl Container {
    /// As the process sees them: of two of a name the later one. Empty is absent, to aws-node and to the agent.
    pub(super) fn variables(&self) -> BTreeMap<&str, &Variable> {
        let mut variables: BTreeMap<&str, &Variable> = self.env.iter().map(|variable| (variable.name.as_str(), variable)).collect();
        variables.retain(|_, variable| !variable.value.is_empty() || variable.value_from.is_some());
        variables
    }

    /// Flags with their values as pflag reads them, the last of each name; a flag without a value has none.
    pub(super) fn flags(&self) -> BTreeMap<&str, Option<&str>> {
        let words: Vec<&str> = self.command.iter().chain(&self.args).map(String::as_str).collect();
        let flags = words.iter().enumerate().filter_map(|(index, word)| {
            let flag = word.strip_prefix("--").filter(|flag| !flag.is_empty())?;
            Some(match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                // A switch does not take the next word.
                None if flag.starts_with("enable-") => (flag, None),
                None => (flag, words.get(index + 1).copied().filter(|next| !next.starts_with("--"))),
            })
        });
        flags.collect()
    }

    /// Whether a switch is on.
    pub(super) fn has(&self, flag: &str) -> bool {
        self.flags().get(flag).is_some_and(|value| value.is_none_or(|value| parse_bool(value) == Some(true)))
    }
}

pub(super) fn find(text: &str) -> Result<Found, ReadError> {
    let objects = manifests::objects(text).map_err(ReadError::Syntax)?;
    let objects: Vec<Value> = objects.into_iter().map(|(_, object)| object).collect();
    let sets: Vec<&Value> = objects.iter().filter(|object| is_aws_node(object)).collect();
    let set = match sets[..] {
        [set] => set,
        [] if objects.is_empty() => return Err(ReadError::Empty),
        [] => return Err(ReadError::Foreign { found: described(&objects) }),
        _ => return Err(ReadError::Several { names: sets.iter().map(|set| full_name(set)).collect() }),
    };
    let name = full_name(set);
    let spec = set.pointer("/spec/template/spec").cloned().unwrap_or_default();
    let mut spec: PodSpec =
        serde_json::from_value(spec).map_err(|error| ReadError::Field { name: name.clone(), message: error.to_string() })?;
    let mut take = |name: &str| {
        let lists = [&mut spec.containers, &mut spec.init_containers];
        lists.into_iter().find_map(|list| list.iter().position(|container| container.name == name).map(|at| list.swap_remove(at)))
    };
    let (node, init, policy_agent) = (take(NODE).unwrap_or_default(), take(INIT).unwrap_or_default(), take(POLICY_AGENT));
    let controller = objects.iter().find(|object| full_name(object) == "kube-system/amazon-vpc-cni" && object["kind"] == "ConfigMap");
    let controller = controller.map(|map| map.pointer("/data/enable-network-policy-controller") == Some(&Value::from("true")));
    Ok(Found { name, node, init, policy_agent, controller })
}

fn is_aws_node(object: &Value) -> bool {
    object["kind"] == "DaemonSet" && containers(object).any(|name| name == NODE)
}

/// Names of an object's containers, if it is a workload's.
fn containers(object: &Value) -> impl Iterator<Item = &str> {
    let list = object.pointer("/spec/template/spec/containers").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|container| container["name"].as_str())
}

fn full_name(object: &Value) -> String {
    let field = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    match (field("namespace"), field("name")) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}

fn described(objects: &[Value]) -> Vec<String> {
    let one = |object: &Value| match object["kind"].as_str() {
        None => "a document that is no Kubernetes object".to_owned(),
        Some(kind) => {
            let containers: Vec<&str> = containers(object).collect();
            let of = if containers.is_empty() { String::new() } else { format!(" (containers: {})", containers.join(", ")) };
            format!("{kind} {}", full_name(object)).trim_end().to_owned() + &of
        }
    };
    let mut found: Vec<String> = objects.iter().take(NAMED).map(one).collect();
    if objects.len() > NAMED {
        found.push(format!("{} more", objects.len() - NAMED));
    }
    found
}
