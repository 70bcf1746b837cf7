//! What the agent writes to the API server: pods' address annotations, the start-up taint, the node's condition, the
//! CNINode's features, events.
//! Every request is in the ClusterRole of the chart.

use std::time::Duration;

use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use stanchion_core::events::Post;
use stanchion_core::ids::PodName;

use super::credentials::Clients;

/// The annotation of a pod's addresses (ANNOTATE_POD_IP), read by AWS's policy controller before the status has them.
pub const POD_IPS: &str = "vpc.amazonaws.com/pod-ips";
/// A node whose condition of this type is True gets no pods.
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";
/// Tries of a change that another writer may have got in between.
const TRIES: u32 = 5;
/// One request.
const WITHIN: Duration = Duration::from_secs(5);

/// A write that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The API server said no.
    #[error("the API server: {code} {message}")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// It said nothing, or nothing that can be read.
    #[error("the API server: {0}")]
    NoAnswer(String),
    /// Others changed the object each time.
    #[error("{0} is changed by others all the time")]
    Conflict(String),
}

/// Writes. Clones are the same.
#[derive(Clone)]
pub struct Writer {
    clients: Clients,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    /// Over the client in force.
    pub fn new(clients: Clients) -> Self {
        Self { clients }
    }

    fn client(&self) -> Client {
        self.clients.borrow().clone()
    }

    fn api(&self, kind: GroupVersionKind, plural: &str, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk_with_plural(&kind, plural);
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
            None => Api::all_with(self.client(), &resource),
        }
    }

    fn pods(&self, namespace: &str) -> Api<DynamicObject> {
        self.api(GroupVersionKind::gvk("", "v1", "Pod"), "pods", Some(namespace))
    }

    /// Writes the pod's addresses to its annotation. A pod of another uid is not touched.
    ///
    /// # Errors
    /// It is not written; the ADD must fail, as its readers would wait.
    pub async fn annotate(&self, pod: &PodName, uid: &str, addresses: &str) -> Result<(), WriteError> {
        let mut metadata = json!({"annotations": {POD_IPS: addresses}});
        if !uid.is_empty() {
            metadata["uid"] = json!(uid);
        }
        patch(&self.pods(&pod.namespace), &pod.name, &json!({"metadata": metadata})).await
    }

    /// Empties the annotation if it still names these addresses; a pod that is gone is done.
    ///
    /// # Errors
    /// It is not written.
    pub async fn clear_annotation(&self, pod: &PodName, addresses: &str) -> Result<(), WriteError> {
        let api = self.pods(&pod.namespace);
        self.change(&api, &pod.name, |object| {
            let present = object.pointer("/metadata/annotations")?.get(POD_IPS)?.as_str()?;
            (present == addresses).then(|| json!({"metadata": {"annotations": {POD_IPS: ""}}}))
        })
        .await
        .map(drop)
    }

    /// Takes the taints of this key off the node; true if there was one.
    ///
    /// # Errors
    /// It is not taken off.
    pub async fn remove_taint(&self, node: &str, key: &str) -> Result<bool, WriteError> {
        let api = self.api(GroupVersionKind::gvk("", "v1", "Node"), "nodes", None);
        self.change(&api, node, |object| {
            let taints = object.pointer("/spec/taints")?.as_array()?;
            let kept: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != key).collect();
            (kept.len() < taints.len()).then(|| json!({"spec": {"taints": kept}}))
        })
        .await
    }

    /// Says in the node's condition NetworkUnavailable that its network is there, beside the conditions of others.
    ///
    /// # Errors
    /// It is not written.
    pub async fn network_available(&self, node: &str, now: &str) -> Result<(), WriteError> {
        let api = self.api(GroupVersionKind::gvk("", "v1", "Node"), "nodes", None);
        let condition = json!({
            "type": NETWORK_UNAVAILABLE, "status": "False", "reason": "StanchionReady", "message": "pods can be connected",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        });
        // A strategic merge: the list of conditions has `type` as its key.
        let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
        within(api.patch_status(node, &PatchParams::default(), &patch)).await.map(drop).map_err(refused)
    }

    /// Puts a feature with this value into the CNINode of the node; true if it was changed. A node without CNINode (AWS's
    /// resource controller makes it) is `Ok(false)`.
    ///
    /// # Errors
    /// It is not written.
    pub async fn set_feature(&self, node: &str, name: &str, value: &str) -> Result<bool, WriteError> {
        let api = self.api(GroupVersionKind::gvk("vpcresources.k8s.aws", "v1alpha1", "CNINode"), "cninodes", None);
        self.change(&api, node, |object| {
            let mut features = object.pointer("/spec/features").and_then(Value::as_array).cloned().unwrap_or_default();
            // An empty value is left out by the server.
            let has = |feature: &Value| feature["name"] == name && feature["value"].as_str().unwrap_or_default() == value;
            if features.iter().any(has) {
                return None;
            }
            let wanted = json!({"name": name, "value": value});
            features.retain(|feature| feature["name"] != name);
            features.push(wanted);
            Some(json!({"spec": {"features": features}}))
        })
        .await
    }

    /// Sends an event or its count. A count whose event is gone is dropped.
    ///
    /// # Errors
    /// It is not written.
    pub async fn post(&self, post: Post) -> Result<(), WriteError> {
        let events = |namespace: &str| self.api(GroupVersionKind::gvk("events.k8s.io", "v1", "Event"), "events", Some(namespace));
        match post {
            Post::Create { namespace, object } => {
                let object: DynamicObject = serde_json::from_value(object).map_err(|error| WriteError::NoAnswer(error.to_string()))?;
                let api = events(&namespace);
                within(api.create(&PostParams::default(), &object)).await.map(drop).map_err(refused)
            }
            Post::Count { namespace, name, patch: series } => patch(&events(&namespace), &name, &series).await,
        }
    }

    /// Reads, and patches what `wanted` makes of it unless somebody else was faster, then again. A missing object and no
    /// wish are `false`.
    async fn change(&self, api: &Api<DynamicObject>, name: &str, wanted: impl Fn(&Value) -> Option<Value>) -> Result<bool, WriteError> {
        for _ in 0..TRIES {
            let object = match within(api.get(name)).await {
                Ok(object) => serde_json::to_value(object).map_err(|error| WriteError::NoAnswer(error.to_string()))?,
                // Of a kind that it does not serve a server says so in plain text, without a reason.
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(false),
                Err(error) => return Err(refused(error)),
            };
            let Some(mut patch) = wanted(&object) else { return Ok(false) };
            patch["metadata"]["resourceVersion"] = object["metadata"]["resourceVersion"].clone();
            match within(api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))).await {
                Ok(_) => return Ok(true),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(false),
                Err(error) => return Err(refused(error)),
            }
        }
        Err(WriteError::Conflict(name.to_owned()))
    }
}

async fn patch(api: &Api<DynamicObject>, name: &str, patch: &Value) -> Result<(), WriteError> {
    match within(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await {
        Ok(_) => Ok(()),
        Err(error) => Err(refused(error)),
    }
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(WITHIN, request).await {
        Ok(answer) => answer,
        Err(_) => Err(kube::Error::Service(format!("no answer within {} s", WITHIN.as_secs()).into())),
    }
}

fn refused(error: kube::Error) -> WriteError {
    match error {
        kube::Error::Api(status) => WriteError::Refused { code: status.code, message: status.message.clone() },
        error => WriteError::NoAnswer(error.to_string()),
    }
}

impl WriteError {
    /// What it is about is not there any more, or soon will not be: a namespace, an event whose time has passed.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Refused { code: 404 | 409, .. } => true,
            // The words of the API server's admission of namespaces (`NamespaceTerminating`).
            Self::Refused { code: 403, message } => message.contains("because it is being terminated"),
            _ => false,
        }
    }

    /// Sending the same again cannot help.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Refused { code: 400..=499, .. }) && !matches!(self, Self::Refused { code: 401 | 403 | 408 | 429, .. })
    }
}
