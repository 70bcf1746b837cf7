//! Objects as they come from the API server, cut down to their slim form while they are read.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use stanchion_core::cluster::Object;
use stanchion_core::objects::{EndpointSlice, EniConfig, Meta, Namespace, NetworkPolicy, Node, Pod, Service};
use stanchion_core::policy::objects::{ClusterNetworkPolicy, ClusterPolicyEndpoint, PolicyEndpoint};

/// A kind in its slim form.
pub(super) trait Slim: DeserializeOwned + Clone + std::fmt::Debug + Send + Sync + 'static {
    fn into_object(self, api_version: &str) -> Object;
}

macro_rules! slim {
    ($($kind:ident),*) => {$(
        impl Slim for $kind {
            fn into_object(self, _: &str) -> Object {
                Object::$kind(self)
            }
        }
    )*};
}
slim!(Namespace, Pod, Node, Service, EndpointSlice, EniConfig, PolicyEndpoint, ClusterPolicyEndpoint);

impl Slim for NetworkPolicy {
    fn into_object(mut self, api_version: &str) -> Object {
        // The group tells two kinds apart; the items of a list may leave it out.
        api_version.clone_into(&mut self.api_version);
        Object::NetworkPolicy(self)
    }
}

impl Slim for ClusterNetworkPolicy {
    fn into_object(mut self, api_version: &str) -> Object {
        // The group decides how rules are ordered; the items of a list may leave it out.
        api_version.clone_into(&mut self.api_version);
        Object::ClusterNetworkPolicy(self)
    }
}

/// The one ConfigMap that is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct VpcCniConfig {
    data: Option<BTreeMap<String, String>>,
}

impl Slim for VpcCniConfig {
    fn into_object(self, _: &str) -> Object {
        Object::VpcCniConfig(self.data.unwrap_or_default())
    }
}

/// An object with the metadata that kube's watcher wants. An object that cannot be read keeps its name and says why, so
/// that one bad object does not hide all others of its kind.
#[derive(Clone, Debug)]
pub(super) struct Watched<T> {
    pub(super) object: Result<T, String>,
    pub(super) meta: ObjectMeta,
}

impl<'de, T: Slim> Deserialize<'de> for Watched<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut document = Value::deserialize(deserializer)?;
        let text = |field: &str| document.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            ..Default::default()
        };
        // Heartbeats and the like change nothing that is read here but the version: without it the object is the same.
        if let Some(Value::Object(metadata)) = document.get_mut("metadata") {
            metadata.remove("resourceVersion");
        }
        Ok(Self { object: serde_json::from_value(document).map_err(|error| error.to_string()), meta })
    }
}

impl<T: Slim> kube::Resource for Watched<T> {
    type DynamicType = ApiResource;
    type Scope = <DynamicObject as kube::Resource>::Scope;

    fn kind(dt: &ApiResource) -> Cow<'_, str> {
        dt.kind.as_str().into()
    }
    fn group(dt: &ApiResource) -> Cow<'_, str> {
        dt.group.as_str().into()
    }
    fn version(dt: &ApiResource) -> Cow<'_, str> {
        dt.version.as_str().into()
    }
    fn plural(dt: &ApiResource) -> Cow<'_, str> {
        dt.plural.as_str().into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// Slim metadata, for objects that are only known by name.
pub(super) fn named(meta: &ObjectMeta) -> Meta {
    Meta { name: meta.name.clone().unwrap_or_default(), namespace: meta.namespace.clone().unwrap_or_default(), ..Meta::default() }
}
