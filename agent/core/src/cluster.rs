//! The cluster's state as this node sees it, whoever brought it: a directory of manifests or the API server.
//!
//! A value of [`ClusterState`] is an immutable snapshot. Two snapshots share every object that did not change, and most of
//! the maps that lead to it: the next snapshot costs what changed, and so does finding out what did.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::ids::PodName;
use crate::objects::{EndpointSlice, EniConfig, Namespace, NetworkPolicy, Node, Pod, Service};
use crate::policy::objects::{ClusterNetworkPolicy, ClusterPolicyEndpoint, PolicyEndpoint};
use crate::shared_map::SharedMap;

/// Objects of a namespaced kind, by namespace and name.
pub type Namespaced<T> = SharedMap<PodName, Arc<T>>;
/// Objects of a cluster-scoped kind, by name.
pub type Named<T> = SharedMap<String, Arc<T>>;

/// Everything that the agent knows of the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterState {
    /// Every source was read at least once: absence means absence.
    pub synced: bool,
    /// What could not be read lately, by resource (`pods`, `eniconfigs.crd.k8s.amazonaws.com`): the reason. What was known of it
    /// before stays in the state.
    pub trouble: BTreeMap<String, String>,
    /// Kinds that the API server does not give at present: what came since is not known.
    pub stale: BTreeSet<Kind>,
    /// Namespaces.
    pub namespaces: Named<Namespace>,
    /// Pods, of all nodes where policies need them.
    pub pods: Namespaced<Pod>,
    /// Nodes.
    pub nodes: Named<Node>,
    /// Services.
    pub services: Namespaced<Service>,
    /// Backends of services.
    pub endpoint_slices: Namespaced<EndpointSlice>,
    /// NetworkPolicies, and AWS's ApplicationNetworkPolicies, by [`NetworkPolicy::key`].
    pub network_policies: Namespaced<NetworkPolicy>,
    /// ClusterNetworkPolicies of both groups, by [`ClusterNetworkPolicy::key`].
    pub cluster_network_policies: Named<ClusterNetworkPolicy>,
    /// NetworkPolicies as AWS's controller resolved them.
    pub policy_endpoints: Namespaced<PolicyEndpoint>,
    /// ClusterNetworkPolicies as AWS's controller resolved them.
    pub cluster_policy_endpoints: Named<ClusterPolicyEndpoint>,
    /// Where custom networking puts pods.
    pub eni_configs: Named<EniConfig>,
    /// The `kube-system/amazon-vpc-cni` ConfigMap's data.
    pub vpc_cni_config: Option<Arc<BTreeMap<String, String>>>,
}

impl ClusterState {
    /// A sentence for a person if NetworkPolicies are there that nobody enforced before this agent: aws-node's ConfigMap says that AWS's
    /// policy controller is off, as it does unless the add-on's `enableNetworkPolicy` is set.
    pub fn policies_new_in_force(&self) -> Option<String> {
        let config = self.vpc_cni_config.as_ref()?;
        let on = config.get("enable-network-policy-controller").is_some_and(|on| on.trim().eq_ignore_ascii_case("true"));
        let policies: Vec<String> = self.network_policies.keys().map(ToString::to_string).collect();
        if on || policies.is_empty() {
            return None;
        }
        let shown = policies.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if policies.len() > 5 { ", ..." } else { "" };
        Some(format!(
            "{} NetworkPolicies are in force on this node's pods that aws-node did not enforce (the ConfigMap kube-system/amazon-vpc-cni \
             does not say enable-network-policy-controller=true): {shown}{more}; NETWORK_POLICY_ENFORCING_MODE=none leaves them alone",
            policies.len()
        ))
    }
}

/// One object of a kind that the agent reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// v1
    Namespace(Namespace),
    /// v1
    Pod(Pod),
    /// v1
    Node(Node),
    /// v1
    Service(Service),
    /// discovery.k8s.io/v1
    EndpointSlice(EndpointSlice),
    /// networking.k8s.io/v1, or an ApplicationNetworkPolicy of networking.k8s.aws
    NetworkPolicy(NetworkPolicy),
    /// policy.networking.k8s.io or networking.k8s.aws
    ClusterNetworkPolicy(ClusterNetworkPolicy),
    /// networking.k8s.aws/v1alpha1
    PolicyEndpoint(PolicyEndpoint),
    /// networking.k8s.aws/v1alpha1
    ClusterPolicyEndpoint(ClusterPolicyEndpoint),
    /// crd.k8s.amazonaws.com/v1alpha1
    EniConfig(EniConfig),
    /// v1, only `kube-system/amazon-vpc-cni`
    VpcCniConfig(BTreeMap<String, String>),
}

/// Which object: its kind and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// The kind.
    pub kind: Kind,
    /// Namespace (empty for cluster-scoped kinds) and name.
    pub name: PodName,
}

/// A kind of object that the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// v1
    Namespace,
    /// v1
    Pod,
    /// v1
    Node,
    /// v1
    Service,
    /// discovery.k8s.io/v1
    EndpointSlice,
    /// networking.k8s.io/v1, and ApplicationNetworkPolicy of networking.k8s.aws
    NetworkPolicy,
    /// policy.networking.k8s.io or networking.k8s.aws
    ClusterNetworkPolicy,
    /// networking.k8s.aws/v1alpha1
    PolicyEndpoint,
    /// networking.k8s.aws/v1alpha1
    ClusterPolicyEndpoint,
    /// crd.k8s.amazonaws.com/v1alpha1
    EniConfig,
    /// v1, only `kube-system/amazon-vpc-cni`
    VpcCniConfig,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Namespace,
        Self::Pod,
        Self::Node,
        Self::Service,
        Self::EndpointSlice,
        Self::NetworkPolicy,
        Self::ClusterNetworkPolicy,
        Self::PolicyEndpoint,
        Self::ClusterPolicyEndpoint,
        Self::EniConfig,
        Self::VpcCniConfig,
    ];
}

impl Object {
    /// Kind and name.
    pub fn key(&self) -> ObjectKey {
        let (kind, meta) = match self {
            Self::Namespace(o) => (Kind::Namespace, &o.metadata),
            Self::Pod(o) => (Kind::Pod, &o.metadata),
            Self::Node(o) => (Kind::Node, &o.metadata),
            Self::Service(o) => (Kind::Service, &o.metadata),
            Self::EndpointSlice(o) => (Kind::EndpointSlice, &o.metadata),
            Self::NetworkPolicy(o) => return ObjectKey { kind: Kind::NetworkPolicy, name: o.key() },
            Self::ClusterNetworkPolicy(o) => {
                return ObjectKey { kind: Kind::ClusterNetworkPolicy, name: PodName::new("", o.key()) };
            }
            Self::PolicyEndpoint(o) => (Kind::PolicyEndpoint, &o.metadata),
            Self::ClusterPolicyEndpoint(o) => (Kind::ClusterPolicyEndpoint, &o.metadata),
            Self::EniConfig(o) => (Kind::EniConfig, &o.metadata),
            Self::VpcCniConfig(_) => {
                return ObjectKey { kind: Kind::VpcCniConfig, name: PodName::new("kube-system", "amazon-vpc-cni") };
            }
        };
        ObjectKey { kind, name: PodName::new(meta.namespace.clone(), meta.name.clone()) }
    }
}

/// Puts the object in unless an equal one is there already, whose `Arc` then stays. True if anything changed.
fn put<K: Ord + Clone, T: PartialEq>(map: &mut SharedMap<K, Arc<T>>, key: K, object: T) -> bool {
    match map.get(&key) {
        Some(present) if **present == object => false,
        _ => {
            map.insert(key, Arc::new(object));
            true
        }
    }
}

impl ClusterState {
    /// Adds or replaces an object. A namespace gets the label `kubernetes.io/metadata.name` that the API server would
    /// give it. True if anything changed.
    pub fn apply(&mut self, object: Object) -> bool {
        let full = |meta: &crate::objects::Meta| PodName::new(meta.namespace.clone(), meta.name.clone());
        match object {
            Object::Namespace(mut o) => {
                let name = o.metadata.name.clone();
                o.metadata.labels.insert("kubernetes.io/metadata.name".to_owned(), name.clone());
                put(&mut self.namespaces, name, o)
            }
            Object::Pod(o) => put(&mut self.pods, full(&o.metadata), o),
            Object::Node(o) => put(&mut self.nodes, o.metadata.name.clone(), o),
            Object::Service(o) => put(&mut self.services, full(&o.metadata), o),
            Object::EndpointSlice(o) => put(&mut self.endpoint_slices, full(&o.metadata), o),
            Object::NetworkPolicy(o) => put(&mut self.network_policies, o.key(), o),
            Object::ClusterNetworkPolicy(o) => put(&mut self.cluster_network_policies, o.key(), o),
            Object::PolicyEndpoint(o) => put(&mut self.policy_endpoints, full(&o.metadata), o),
            Object::ClusterPolicyEndpoint(o) => put(&mut self.cluster_policy_endpoints, o.metadata.name.clone(), o),
            Object::EniConfig(o) => put(&mut self.eni_configs, o.metadata.name.clone(), o),
            Object::VpcCniConfig(data) => {
                let changed = self.vpc_cni_config.as_deref() != Some(&data);
                if changed {
                    self.vpc_cni_config = Some(Arc::new(data));
                }
                changed
            }
        }
    }

    /// Forgets an object; one that is not there is no error.
    pub fn remove(&mut self, key: &ObjectKey) {
        match key.kind {
            Kind::Namespace => drop(self.namespaces.remove(&key.name.name)),
            Kind::Pod => drop(self.pods.remove(&key.name)),
            Kind::Node => drop(self.nodes.remove(&key.name.name)),
            Kind::Service => drop(self.services.remove(&key.name)),
            Kind::EndpointSlice => drop(self.endpoint_slices.remove(&key.name)),
            Kind::NetworkPolicy => drop(self.network_policies.remove(&key.name)),
            Kind::ClusterNetworkPolicy => drop(self.cluster_network_policies.remove(&key.name.name)),
            Kind::PolicyEndpoint => drop(self.policy_endpoints.remove(&key.name)),
            Kind::ClusterPolicyEndpoint => drop(self.cluster_policy_endpoints.remove(&key.name.name)),
            Kind::EniConfig => drop(self.eni_configs.remove(&key.name.name)),
            Kind::VpcCniConfig => self.vpc_cni_config = None,
        }
    }

    /// Every object of a kind.
    pub fn keys(&self, kind: Kind) -> Vec<ObjectKey> {
        fn named<T>(kind: Kind, map: &Named<T>) -> Vec<ObjectKey> {
            map.keys().map(|name| ObjectKey { kind, name: PodName::new("", name.clone()) }).collect()
        }
        fn namespaced<T>(kind: Kind, map: &Namespaced<T>) -> Vec<ObjectKey> {
            map.keys().map(|name| ObjectKey { kind, name: name.clone() }).collect()
        }
        match kind {
            Kind::Namespace => named(kind, &self.namespaces),
            Kind::Pod => namespaced(kind, &self.pods),
            Kind::Node => named(kind, &self.nodes),
            Kind::Service => namespaced(kind, &self.services),
            Kind::EndpointSlice => namespaced(kind, &self.endpoint_slices),
            Kind::NetworkPolicy => namespaced(kind, &self.network_policies),
            Kind::ClusterNetworkPolicy => named(kind, &self.cluster_network_policies),
            Kind::PolicyEndpoint => namespaced(kind, &self.policy_endpoints),
            Kind::ClusterPolicyEndpoint => named(kind, &self.cluster_policy_endpoints),
            Kind::EniConfig => named(kind, &self.eni_configs),
            Kind::VpcCniConfig => {
                let name = PodName::new("kube-system", "amazon-vpc-cni");
                self.vpc_cni_config.iter().map(|_| ObjectKey { kind, name: name.clone() }).collect()
            }
        }
    }

    /// The state that consists of just these objects, sharing with `self` every object that is equal in both. Later
    /// objects replace earlier ones of the same kind and name.
    pub fn replaced_by(&self, objects: impl IntoIterator<Item = Object>) -> Self {
        let mut next = Self { synced: true, trouble: BTreeMap::new(), stale: BTreeSet::new(), ..self.clone() };
        let objects: HashMap<ObjectKey, Object> = objects.into_iter().map(|object| (object.key(), object)).collect();
        let gone: Vec<ObjectKey> =
            Kind::ALL.into_iter().flat_map(|kind| self.keys(kind)).filter(|key| !objects.contains_key(key)).collect();
        gone.iter().for_each(|key| next.remove(key));
        for object in objects.into_values() {
            next.apply(object);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Meta;

    fn pod(name: &str, node: &str) -> Object {
        let mut pod = Pod { metadata: Meta { name: name.into(), namespace: "x".into(), ..Meta::default() }, ..Pod::default() };
        pod.spec.node_name = node.into();
        Object::Pod(pod)
    }

    #[test]
    fn unchanged_objects_are_shared_and_gone_ones_are_gone() {
        let first = ClusterState::default().replaced_by([pod("a", "n1"), pod("b", "n1"), pod("c", "n1")]);
        let second = first.replaced_by([pod("a", "n1"), pod("b", "n2")]);
        let key = |name: &str| PodName::new("x", name);
        assert!(Arc::ptr_eq(&first.pods[&key("a")], &second.pods[&key("a")]));
        assert!(!Arc::ptr_eq(&first.pods[&key("b")], &second.pods[&key("b")]));
        assert!(!second.pods.contains_key(&key("c")));
        assert!(second.synced);
    }

    #[test]
    fn policies_that_aws_node_left_alone_are_told() {
        let config = |on: &str| Object::VpcCniConfig(BTreeMap::from([("enable-network-policy-controller".to_owned(), on.to_owned())]));
        let policy = |name: &str| {
            Object::NetworkPolicy(NetworkPolicy {
                metadata: Meta { name: name.to_owned(), namespace: "x".to_owned(), ..Meta::default() },
                ..NetworkPolicy::default()
            })
        };
        let told = |objects: Vec<Object>| ClusterState::default().replaced_by(objects).policies_new_in_force();
        let said = told(vec![config("false"), policy("deny"), policy("allow")]).expect("a notice");
        assert!(said.starts_with("2 NetworkPolicies") && said.contains("x/allow, x/deny;"), "{said}");
        assert!(told(vec![Object::VpcCniConfig(BTreeMap::new()), policy("deny")]).is_some(), "off unless it says otherwise");
        assert_eq!(told(vec![config("true"), policy("deny")]), None);
        assert_eq!(told(vec![config("false")]), None);
        assert_eq!(told(vec![policy("deny")]), None, "no cluster of aws-node's");
    }

    #[test]
    fn an_object_of_every_kind_comes_changes_and_goes() {
        let mut kinds = Vec::new();
        for (kind, spec) in [
            ("Namespace", ""),
            ("Pod", ""),
            ("Node", ""),
            ("Service", ""),
            ("EndpointSlice", ""),
            ("NetworkPolicy", "apiVersion: networking.k8s.io/v1"),
            ("ClusterNetworkPolicy", "apiVersion: networking.k8s.aws/v1alpha1"),
            ("PolicyEndpoint", ""),
            ("ClusterPolicyEndpoint", ""),
            ("ENIConfig", ""),
            ("ConfigMap", ""),
        ] {
            let (name, namespace) = match kind {
                "ConfigMap" => ("amazon-vpc-cni", "namespace: kube-system,"),
                "Namespace" | "Node" | "ClusterNetworkPolicy" | "ClusterPolicyEndpoint" | "ENIConfig" => ("a", ""),
                _ => ("a", "namespace: x,"),
            };
            let object = |label: &str| {
                let text =
                    format!("kind: {kind}\n{spec}\nmetadata: {{name: {name}, {namespace} labels: {{v: {label}}}}}\ndata: {{v: {label}}}\n");
                crate::manifests::parse("f.yaml", &text).unwrap().pop().unwrap_or_else(|| panic!("{kind} is known"))
            };
            let key = object("one").key();
            kinds.push(key.kind);
            let mut state = ClusterState::default();
            assert!(state.apply(object("one")), "{kind}");
            let first = state.clone();
            assert!(!state.apply(object("one")), "{kind}: nothing changed");
            assert!(state == first && state.apply(object("two")) && state != first, "{kind}");
            assert_eq!(state.keys(key.kind), std::slice::from_ref(&key), "{kind}");
            assert!(Kind::ALL.into_iter().all(|other| other == key.kind || state.keys(other).is_empty()), "{kind}");
            state.remove(&key);
            assert!(state == ClusterState::default(), "{kind}: nothing is left");
            state.remove(&key);
            let replaced = first.replaced_by([]);
            assert!(replaced.keys(key.kind).is_empty(), "{kind}");
        }
        assert_eq!(kinds, Kind::ALL);
    }
}
