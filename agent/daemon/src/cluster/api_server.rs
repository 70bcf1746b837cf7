//! The cluster's state from the API server: one watch a kind, merged by one task.
//!
//! List, then watch with bookmarks; 410 Gone lists anew; errors are tried again with growing, jittered pauses (kube's
//! default back-off). A kind whose CRD is not installed counts as read and empty, and is asked for again at that pace.
//! Objects are cut down to their slim form while they are read: the full ones are never held.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use stanchion_core::cluster::{ClusterState, Kind, Object, ObjectKey};
use stanchion_core::objects::{EndpointSlice, EniConfig, Meta, Namespace, NetworkPolicy, Node, Pod, Service};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ClusterHandle;

/// Updates that wait for the owner. A list of 10,000 pods passes through; the watches wait while it is full.
const MAILBOX: usize = 1024;

/// What is read, which decides what the RBAC must allow.
#[derive(Clone, Debug)]
pub struct Scope {
    /// This node.
    pub node_name: String,
    /// Policies are resolved here: all pods, namespaces, services, endpoint slices and policies are needed. Otherwise
    /// only this node's pods.
    pub policy: bool,
    /// Custom networking: ENIConfigs.
    pub eni_configs: bool,
}

/// A slim object with the metadata that kube's watcher wants.
#[derive(Clone, Debug)]
struct Watched<T> {
    object: T,
    meta: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
}

/// Slim kinds.
trait Slim: DeserializeOwned + Clone + std::fmt::Debug + Send + 'static {
    fn meta(&self) -> &Meta;
    fn into_object(self) -> Object;
}

macro_rules! slim {
    ($($kind:ident),*) => {$(
        impl Slim for $kind {
            fn meta(&self) -> &Meta {
                &self.metadata
            }
            fn into_object(self) -> Object {
                Object::$kind(self)
            }
        }
    )*};
}
slim!(Namespace, Pod, Node, Service, EndpointSlice, NetworkPolicy, EniConfig);

/// The one ConfigMap that is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct VpcCniConfig {
    metadata: Meta,
    data: Option<std::collections::BTreeMap<String, String>>,
}

impl Slim for VpcCniConfig {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
    fn into_object(self) -> Object {
        Object::VpcCniConfig(self.data.unwrap_or_default())
    }
}

impl<'de, T: Slim> Deserialize<'de> for Watched<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = T::deserialize(deserializer)?;
        let text = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let meta = object.meta();
        let meta = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            name: text(&meta.name),
            namespace: text(&meta.namespace),
            uid: text(&meta.uid),
            resource_version: text(&meta.resource_version),
            ..Default::default()
        };
        Ok(Self { object, meta })
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
    fn meta(&self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
        &self.meta
    }
    fn meta_mut(&mut self) -> &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
        &mut self.meta
    }
}

/// What a watch tells the owner.
enum Update {
    /// A new list begins.
    Begin,
    /// An object of the list.
    Listed(Object),
    /// The list is complete: what it did not name is gone.
    Complete,
    /// Made or changed.
    Applied(Object),
    /// Gone.
    Deleted(ObjectKey),
    /// The kind is not served here.
    Absent,
}

/// Watches the API server until `shutdown`. Returns at once; `ClusterState::synced` tells when every kind was read.
pub fn spawn(client: Client, scope: Scope, shutdown: CancellationToken) -> ClusterHandle {
    let (updates, mailbox) = mpsc::channel(MAILBOX);
    let mut kinds = Vec::new();
    let own_node = format!("metadata.name={}", scope.node_name);
    let own_pods = format!("spec.nodeName={}", scope.node_name);
    let mut watches = Watches { client, updates, shutdown: shutdown.clone(), kinds: &mut kinds };
    watches.add::<Node>(Kind::Node, resource("", "v1", "Node", "nodes"), None, Some(&own_node));
    watches.add::<Pod>(Kind::Pod, resource("", "v1", "Pod", "pods"), None, (!scope.policy).then_some(own_pods.as_str()));
    watches.add::<VpcCniConfig>(
        Kind::VpcCniConfig,
        resource("", "v1", "ConfigMap", "configmaps"),
        Some("kube-system"),
        Some("metadata.name=amazon-vpc-cni"),
    );
    if scope.policy {
        watches.add::<Namespace>(Kind::Namespace, resource("", "v1", "Namespace", "namespaces"), None, None);
        watches.add::<Service>(Kind::Service, resource("", "v1", "Service", "services"), None, None);
        let slices = resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices");
        watches.add::<EndpointSlice>(Kind::EndpointSlice, slices, None, None);
        let policies = resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies");
        watches.add::<NetworkPolicy>(Kind::NetworkPolicy, policies, None, None);
    }
    if scope.eni_configs {
        watches.add::<EniConfig>(Kind::EniConfig, resource("crd.k8s.amazonaws.com", "v1alpha1", "ENIConfig", "eniconfigs"), None, None);
    }
    let (publish, state) = watch::channel(Arc::new(ClusterState::default()));
    tokio::spawn(own(mailbox, publish, kinds, shutdown));
    ClusterHandle { state, _fixed: None }
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    ApiResource { group: group.into(), version: version.into(), api_version, kind: kind.into(), plural: plural.into() }
}

struct Watches<'a> {
    client: Client,
    updates: mpsc::Sender<(Kind, Update)>,
    shutdown: CancellationToken,
    kinds: &'a mut Vec<Kind>,
}

impl Watches<'_> {
    fn add<T: Slim + Sync>(&mut self, kind: Kind, resource: ApiResource, namespace: Option<&str>, fields: Option<&str>) {
        self.kinds.push(kind);
        let api: Api<Watched<T>> = match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let config = watcher::Config { field_selector: fields.map(str::to_owned), ..watcher::Config::default() };
        let updates = self.updates.clone();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = follow(api, config, kind, updates) => {}
            }
        });
    }
}

/// Passes one kind's events to the owner, for ever.
async fn follow<T: Slim + Sync>(api: Api<Watched<T>>, config: watcher::Config, kind: Kind, updates: mpsc::Sender<(Kind, Update)>) {
    let watch = || Box::pin(watcher::watcher(api.clone(), config.clone()).default_backoff());
    let mut events = watch();
    let mut complaint = String::new();
    while let Some(event) = events.next().await {
        let update = match event {
            Ok(Event::Init) => Update::Begin,
            Ok(Event::InitApply(watched)) => Update::Listed(watched.object.into_object()),
            Ok(Event::InitDone) => {
                complaint.clear();
                Update::Complete
            }
            Ok(Event::Apply(watched)) => Update::Applied(watched.object.into_object()),
            Ok(Event::Delete(watched)) => Update::Deleted(watched.object.into_object().key()),
            Err(watcher::Error::InitialListFailed(kube::Error::Api(status))) if status.code == 404 => Update::Absent,
            Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) if status.code == 410 => {
                // kube's watcher lists anew when a stream says 410; some servers refuse the request itself.
                events = watch();
                continue;
            }
            Err(error) => {
                // The same complaint is made once, until a list succeeds.
                let text = format!("{:#}", anyhow::Error::new(error));
                if text != complaint {
                    warn!(?kind, error = text, "the API server does not answer as it should; tried again");
                    complaint = text;
                }
                continue;
            }
        };
        if updates.send((kind, update)).await.is_err() {
            return;
        }
    }
}

/// Owns the state: applies what has come, then publishes once.
async fn own(
    mut mailbox: mpsc::Receiver<(Kind, Update)>,
    publish: watch::Sender<Arc<ClusterState>>,
    kinds: Vec<Kind>,
    shutdown: CancellationToken,
) {
    let mut state = ClusterState::default();
    let mut unread: HashSet<Kind> = kinds.into_iter().collect();
    let mut listed: std::collections::HashMap<Kind, HashSet<ObjectKey>> = std::collections::HashMap::new();
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            count = mailbox.recv_many(&mut batch, MAILBOX) => if count == 0 { return },
        }
        for (kind, update) in batch.drain(..) {
            match update {
                Update::Begin => drop(listed.insert(kind, HashSet::new())),
                Update::Listed(object) => {
                    listed.entry(kind).or_default().insert(object.key());
                    state.apply(object);
                }
                Update::Complete => {
                    let named = listed.remove(&kind).unwrap_or_default();
                    for key in state.keys(kind) {
                        if !named.contains(&key) {
                            state.remove(&key);
                        }
                    }
                    unread.remove(&kind);
                }
                Update::Applied(object) => state.apply(object),
                Update::Deleted(key) => state.remove(&key),
                Update::Absent => {
                    if unread.remove(&kind) {
                        info!(?kind, "not served by this API server: taken as empty");
                    }
                    for key in state.keys(kind) {
                        state.remove(&key);
                    }
                }
            }
        }
        state.synced = unread.is_empty();
        publish.send_replace(Arc::new(state.clone()));
    }
}

/// The client for a kubeconfig, or for the service account when there is none. `endpoint` (CLUSTER_ENDPOINT) replaces the
/// service address, so that nothing depends on kube-proxy at boot.
///
/// # Errors
/// No credentials are found, or they cannot be read.
pub async fn client(kubeconfig: Option<&std::path::Path>, endpoint: &str) -> anyhow::Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path).with_context(|| format!("read the kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .with_context(|| format!("use the kubeconfig {}", path.display()))?
        }
        None => {
            kube::Config::incluster().context("no service account: pass --kubeconfig, or --manifests for a cluster without API server")?
        }
    };
    if !endpoint.is_empty() {
        config.cluster_url = endpoint.parse().with_context(|| format!("CLUSTER_ENDPOINT={endpoint:?}"))?;
    }
    Client::try_from(config).context("build the Kubernetes client")
}

/// A client for a plain HTTP endpoint without credentials: a proxy beside the agent, or a test.
///
/// # Errors
/// The URL cannot be read.
pub fn plain_client(url: &str) -> anyhow::Result<Client> {
    Ok(Client::try_from(kube::Config::new(url.parse()?))?)
}
