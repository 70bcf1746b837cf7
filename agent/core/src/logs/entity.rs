//! What CloudWatch is told a log stream is about: the `entity` of PutLogEvents, as Fluent Bit's `add_entity` has it.
//!
//! CloudWatch links a service's metrics, traces and logs by it. A batch has one, so a stream that several workloads share has none.

use std::sync::Arc;

use serde_json::json;

use super::enrich::Identity;

/// Most that a value may have, in characters (PutLogEvents API reference, `EntityKeyAttributesValue`).
const VALUE_MAX: usize = 512;

/// What the pod does not say.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The cluster's name.
    pub cluster: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// The node's instance; empty where it is not known.
    pub instance: &'a str,
}

/// Of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Entity {
    /// Nobody who writes to it is known.
    #[default]
    Unknown,
    /// The member's value, as JSON.
    One(Arc<str>),
    /// Several share the stream.
    Several,
}

impl Entity {
    /// One more writes to the stream.
    pub fn join(&mut self, other: Option<Arc<str>>) {
        match (&*self, other) {
            (Self::Unknown, Some(other)) => *self = Self::One(other),
            (Self::One(known), Some(other)) if *known != other => *self = Self::Several,
            _ => {}
        }
    }

    /// What the batch says.
    pub fn one(&self) -> Option<&Arc<str>> {
        if let Self::One(entity) = self { Some(entity) } else { None }
    }
}

/// The value of the member `entity` for a container of that identity; `None` while its pod is not known.
pub fn of(identity: &Identity, place: Place<'_>) -> Option<Arc<str>> {
    let pod = identity.pod.as_ref()?;
    let cut = |text: String| text.chars().take(VALUE_MAX).collect::<String>();
    let mut attributes = serde_json::Map::new();
    for (name, value) in [
        ("PlatformType", "AWS::EKS"),
        ("EKS.Cluster", place.cluster),
        ("K8s.Namespace", &identity.names.namespace),
        ("K8s.Workload", &pod.workload),
        ("K8s.Node", place.node),
        ("EC2.InstanceId", place.instance),
        ("AWS.ServiceNameSource", "K8sWorkload"),
    ] {
        // The service takes no empty value.
        if !value.is_empty() {
            attributes.insert(name.to_owned(), cut(value.to_owned()).into());
        }
    }
    let environment = cut(format!("eks:{}/{}", place.cluster, identity.names.namespace));
    let key = json!({"Type": "Service", "Name": cut(pod.workload.clone()), "Environment": environment});
    Some(json!({"keyAttributes": key, "attributes": attributes}).to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::names::parse_flat;
    use crate::objects::Pod;

    #[test]
    fn a_pods_entity_is_its_workload() {
        let names = parse_flat(&format!("web-6b9c4cb4dc-8zpz5_shop_app-{:064x}.log", 7)).unwrap();
        let place = Place { cluster: "c", node: "n", instance: "" };
        assert_eq!(of(&Identity::new(&names, None), place), None);
        let pod: Pod = serde_json::from_value(json!({"metadata": {
            "name": "web-6b9c4cb4dc-8zpz5", "namespace": "shop",
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web-6b9c4cb4dc", "controller": true}],
        }}))
        .unwrap();
        let entity: serde_json::Value = serde_json::from_str(&of(&Identity::new(&names, Some(&pod)), place).unwrap()).unwrap();
        assert_eq!(
            entity,
            json!({
                "keyAttributes": {"Type": "Service", "Name": "web", "Environment": "eks:c/shop"},
                "attributes": {"PlatformType": "AWS::EKS", "EKS.Cluster": "c", "K8s.Namespace": "shop", "K8s.Workload": "web",
                    "K8s.Node": "n", "AWS.ServiceNameSource": "K8sWorkload"},
            })
        );
    }

    #[test]
    fn a_stream_that_is_shared_has_none() {
        let mut entity = Entity::default();
        entity.join(None);
        entity.join(Some("a".into()));
        entity.join(Some("a".into()));
        entity.join(None);
        assert_eq!(entity.one().map(|one| &**one), Some("a"));
        entity.join(Some("b".into()));
        entity.join(Some("b".into()));
        assert_eq!(entity.one(), None);
    }
}
