//! Kubernetes manifests as text: YAML of several documents, JSON, `List` objects.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cluster::Object;
use crate::policy::objects::AWS_GROUP;

/// A manifest that cannot be read. The file as a whole is then not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not YAML or JSON.
    #[error("{file}: not YAML: {message}")]
    Syntax {
        /// The file.
        file: String,
        /// Where and why.
        message: String,
    },
    /// A document that is no Kubernetes object.
    #[error("{file}: document {index}: no Kubernetes object: it needs kind and metadata.name")]
    NoObject {
        /// The file.
        file: String,
        /// Counted from 1.
        index: usize,
    },
    /// A field of the wrong shape.
    #[error("{file}: {kind} {name}: {message}")]
    Field {
        /// The file.
        file: String,
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// What is wrong.
        message: String,
    },
}

/// What kinds of object an API group serves under a name.
#[derive(Deserialize, Default)]
#[serde(default)]
struct ConfigMap {
    data: Option<BTreeMap<String, String>>,
}

/// Reads every object of a file whose kind the agent knows; other kinds are passed over. Namespaced objects without a
/// namespace are in `default`, as kubectl would put them.
///
/// # Errors
/// The first thing that cannot be read, naming file, object and field.
pub fn parse(file: &str, text: &str) -> Result<Vec<Object>, ManifestError> {
    let found = objects(text).map_err(|message| ManifestError::Syntax { file: file.to_owned(), message })?;
    let mut objects = Vec::new();
    for (index, object) in found {
        objects.extend(read_object(file, index, object)?);
    }
    Ok(objects)
}

/// Every object, those of lists one by one, each with the number of its document, counted from 1.
///
/// # Errors
/// Where and why the text is neither YAML nor JSON.
pub(crate) fn objects(text: &str) -> Result<Vec<(usize, Value)>, String> {
    let documents: Vec<Value> = if text.trim_start().starts_with(['{', '[']) {
        let documents = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        documents.collect::<Result<_, _>>().map_err(|error| error.to_string())?
    } else {
        // A cluster's state is larger than what the parser takes for an attack by default; anchors stay bounded.
        let budget = serde_saphyr::budget! {
            max_nodes: 50_000_000,
            max_events: 100_000_000,
            max_documents: 1_000_000,
            max_total_scalar_bytes: 1 << 30,
        };
        // As kubectl reads: `y` and `on` are names, not booleans.
        let options = serde_saphyr::options! { budget: budget, strict_booleans: true };
        serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string())?
    };
    let mut objects = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        unlist(index + 1, document, &mut objects);
    }
    Ok(objects)
}

fn unlist(index: usize, mut document: Value, objects: &mut Vec<(usize, Value)>) {
    if document.is_null() {
        return;
    }
    let text = |name: &str| document.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, group) = (text("kind"), text("apiVersion"));
    let Some(Value::Array(items)) = document.get_mut("items").filter(|_| kind.ends_with("List")) else {
        return objects.push((index, document));
    };
    // The items of a typed list leave out their kind.
    let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
    for mut item in std::mem::take(items) {
        if let (Some(kind), Value::Object(fields)) = (item_kind, &mut item)
            && !fields.contains_key("kind")
        {
            fields.insert("kind".to_owned(), Value::String(kind.to_owned()));
            fields.insert("apiVersion".to_owned(), Value::String(group.clone()));
        }
        unlist(index, item, objects);
    }
}

fn read_object(file: &str, index: usize, document: Value) -> Result<Option<Object>, ManifestError> {
    let no_object = || ManifestError::NoObject { file: file.to_owned(), index };
    let kind = document.get("kind").and_then(Value::as_str).ok_or_else(no_object)?.to_owned();
    let group = document.get("apiVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = document.pointer("/metadata/name").and_then(Value::as_str).ok_or_else(no_object)?.to_owned();
    let namespace = document.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default().to_owned();
    let reader = Reader { file, kind: &kind, name: &name };
    let core = group == "v1" || group.is_empty();
    let object = match kind.as_str() {
        "Namespace" if core => Object::Namespace(reader.read(document)?),
        "Pod" if core => Object::Pod(reader.read(in_namespace(document))?),
        "Node" if core => Object::Node(reader.read(document)?),
        "Service" if core => Object::Service(reader.read(in_namespace(document))?),
        "EndpointSlice" => Object::EndpointSlice(reader.read(in_namespace(document))?),
        "NetworkPolicy" if group.starts_with("networking.k8s.io/") || group.is_empty() => {
            Object::NetworkPolicy(reader.read(in_namespace(document))?)
        }
        "ApplicationNetworkPolicy" if group.starts_with(AWS_GROUP) => Object::NetworkPolicy(reader.read(in_namespace(document))?),
        "ClusterNetworkPolicy" => Object::ClusterNetworkPolicy(reader.read(document)?),
        "PolicyEndpoint" => Object::PolicyEndpoint(reader.read(in_namespace(document))?),
        "ClusterPolicyEndpoint" => Object::ClusterPolicyEndpoint(reader.read(document)?),
        "ENIConfig" => Object::EniConfig(reader.read(document)?),
        "ConfigMap" if name == "amazon-vpc-cni" && namespace == "kube-system" => {
            Object::VpcCniConfig(reader.read::<ConfigMap>(document)?.data.unwrap_or_default())
        }
        _ => return Ok(None),
    };
    Ok(Some(object))
}

/// Fills in the namespace that kubectl would use.
fn in_namespace(mut document: Value) -> Value {
    if let Some(Value::Object(meta)) = document.get_mut("metadata") {
        let missing = meta.get("namespace").and_then(Value::as_str).unwrap_or_default().is_empty();
        if missing {
            meta.insert("namespace".to_owned(), Value::String("default".to_owned()));
        }
    }
    document
}

struct Reader<'a> {
    file: &'a str,
    kind: &'a str,
    name: &'a str,
}

impl Reader<'_> {
    fn read<T: DeserializeOwned>(&self, document: Value) -> Result<T, ManifestError> {
        serde_json::from_value(document).map_err(|e| ManifestError::Field {
            file: self.file.to_owned(),
            kind: self.kind.to_owned(),
            name: self.name.to_owned(),
            message: e.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_documents_lists_and_unknown_kinds() {
        let text = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: }\n---\n\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n";
        let objects = parse("f.yaml", text).unwrap();
        assert_eq!(objects.len(), 2);
        assert!(matches!(&objects[1], Object::Pod(pod) if pod.metadata.namespace == "default"));
        let json = r#"{"apiVersion":"v1","kind":"PodList","items":[{"metadata":{"name":"a","namespace":"x"}}]}"#;
        assert!(matches!(&parse("f.json", json).unwrap()[0], Object::Pod(pod) if pod.metadata.namespace == "x"));
    }

    #[test]
    fn a_namespace_may_be_called_y() {
        let objects =
            parse("f.yaml", "kind: Pod\nmetadata: {name: on, namespace: y, labels: {n: no}}\nspec: {hostNetwork: true}\n").unwrap();
        let [Object::Pod(pod)] = objects.as_slice() else { panic!("{objects:?}") };
        assert_eq!((pod.metadata.name.as_str(), pod.metadata.namespace.as_str(), pod.metadata.labels["n"].as_str()), ("on", "y", "no"));
        assert!(pod.spec.host_network);
    }

    #[test]
    fn errors_name_the_object() {
        let error = parse("f.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: maybe}\n").unwrap_err();
        assert!(error.to_string().starts_with("f.yaml: Pod a: "), "{error}");
        assert!(matches!(parse("f.yaml", "a: [").unwrap_err(), ManifestError::Syntax { .. }));
        assert!(matches!(parse("f.yaml", "kind: Pod\n").unwrap_err(), ManifestError::NoObject { index: 1, .. }));
        assert!(matches!(parse("f.json", "{]").unwrap_err(), ManifestError::Syntax { .. }));
        assert!(matches!(
            parse("f.yaml", "kind: List\nitems:\n- {metadata: {name: a}}\n").unwrap_err(),
            ManifestError::NoObject { index: 1, .. }
        ));
        for (kind, field) in [
            ("Namespace", "metadata: {name: a, labels: 1}"),
            ("Node", "metadata: {name: a}, status: 1"),
            ("Service", "metadata: {name: a}, spec: 1"),
            ("EndpointSlice", "metadata: {name: a}, endpoints: 1"),
            ("NetworkPolicy", "metadata: {name: a}, spec: {ingress: 1}"),
            ("NetworkPolicy", "metadata: {name: a}, spec: {ingress: [{ports: [{port: 70000}]}]}"),
            ("ClusterNetworkPolicy", "metadata: {name: a}, spec: {priority: high}"),
            ("PolicyEndpoint", "metadata: {name: a}, spec: {podIsolation: Ingress}"),
            ("ClusterPolicyEndpoint", "metadata: {name: a}, spec: {priority: high}"),
            ("ENIConfig", "metadata: {name: a}, spec: {subnet: [a]}"),
        ] {
            let error = parse("f.yaml", &format!("---\n{{kind: {kind}, {field}}}\n")).unwrap_err();
            assert!(error.to_string().starts_with(&format!("f.yaml: {kind} a: ")), "{error}");
        }
    }
}
