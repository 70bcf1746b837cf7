//! The cluster's state from the API server: one watch a kind, merged by one task.
//!
//! List in pages, then watch with bookmarks; 410 Gone lists anew; failures are tried again with growing, spread pauses. A
//! kind whose CRD is not installed counts as read and empty and is looked for again. No list is asked by watch, which
//! servers may refuse.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use kube::api::ApiResource;
use stanchion_core::cluster::{ClusterState, Kind, ObjectKey};
use stanchion_core::objects::{EndpointSlice, EniConfig, Namespace, NetworkPolicy, Node, Pod, Service};
use stanchion_core::policy::objects::{AWS_GROUP, ClusterNetworkPolicy, ClusterPolicyEndpoint, PolicyEndpoint};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::ClusterHandle;
use super::credentials::Clients;
use super::follow::{Source, Update, follow};
use super::slim::{Slim, VpcCniConfig};

/// Updates that wait for the owner. A list of 10,000 pods passes through; the watches wait while it is full.
const MAILBOX: usize = 1024;

/// What is read, which decides what the RBAC must allow.
#[derive(Clone, Debug)]
pub struct Scope {
    /// This node.
    pub node_name: String,
    /// Policies are resolved here: all pods, namespaces, services, endpoint slices and policies are needed, and all nodes
    /// once a policy speaks of nodes. Otherwise only this node and its pods.
    pub policy: bool,
    /// Metrics name the service that selects a pod: services are read without policy too. Where the RBAC does not allow it, they are
    /// taken as none.
    pub services: bool,
    /// Policies as AWS's controller resolved them.
    pub policy_endpoints: bool,
    /// Custom networking: ENIConfigs.
    pub eni_configs: bool,
}

/// Watches the API server until `shutdown`. Returns at once; `ClusterState::synced` tells when every kind was read.
pub fn spawn(clients: Clients, scope: &Scope, shutdown: CancellationToken) -> ClusterHandle {
    let (updates, mailbox) = mpsc::channel(MAILBOX);
    let own_node = format!("metadata.name={}", scope.node_name);
    let own_pods = format!("spec.nodeName={}", scope.node_name);
    // The owner widens this one when a policy speaks of nodes.
    let (nodes, node_selector) = watch::channel(Some(own_node));
    let mut watches = Watches { clients, updates, recovered: Arc::default(), tasks: JoinSet::new(), sources: Vec::new() };
    watches.add::<Node>(Kind::Node, None, resource("", "v1", "Node", "nodes"), node_selector);
    watches.all::<Pod>(Kind::Pod, resource("", "v1", "Pod", "pods"), (!scope.policy).then_some(own_pods));
    if scope.policy {
        let config_map = watch::channel(Some("metadata.name=amazon-vpc-cni".to_owned())).1;
        watches.add::<VpcCniConfig>(Kind::VpcCniConfig, Some("kube-system"), resource("", "v1", "ConfigMap", "configmaps"), config_map);
        watches.all::<Namespace>(Kind::Namespace, resource("", "v1", "Namespace", "namespaces"), None);
        watches.all::<Service>(Kind::Service, resource("", "v1", "Service", "services"), None);
        let slices = resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices");
        watches.all::<EndpointSlice>(Kind::EndpointSlice, slices, None);
        let policies = resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies");
        watches.all::<NetworkPolicy>(Kind::NetworkPolicy, policies, None);
        let policies = resource(AWS_GROUP, "v1alpha1", "ApplicationNetworkPolicy", "applicationnetworkpolicies");
        watches.all::<NetworkPolicy>(Kind::NetworkPolicy, policies, None);
        let policies = |group, version| resource(group, version, "ClusterNetworkPolicy", "clusternetworkpolicies");
        let [latest, earlier] = ["v1beta1", "v1alpha2"].map(|version| policies("policy.networking.k8s.io", version));
        watches.either::<ClusterNetworkPolicy>(Kind::ClusterNetworkPolicy, latest, earlier);
        watches.all::<ClusterNetworkPolicy>(Kind::ClusterNetworkPolicy, policies(AWS_GROUP, "v1alpha1"), None);
    } else if scope.services {
        watches.where_allowed::<Service>(Kind::Service, resource("", "v1", "Service", "services"));
    }
    if scope.policy_endpoints {
        let endpoints = resource(AWS_GROUP, "v1alpha1", "PolicyEndpoint", "policyendpoints");
        watches.all::<PolicyEndpoint>(Kind::PolicyEndpoint, endpoints, None);
        let endpoints = resource(AWS_GROUP, "v1alpha1", "ClusterPolicyEndpoint", "clusterpolicyendpoints");
        watches.all::<ClusterPolicyEndpoint>(Kind::ClusterPolicyEndpoint, endpoints, None);
    }
    if scope.eni_configs {
        watches.all::<EniConfig>(Kind::EniConfig, resource("crd.k8s.amazonaws.com", "v1alpha1", "ENIConfig", "eniconfigs"), None);
    }
    let (publish, state) = watch::channel(Arc::new(ClusterState::default()));
    let owner = Owner {
        unread: (0..watches.sources.len()).collect(),
        sources: watches.sources,
        failing: BTreeSet::new(),
        state: ClusterState::default(),
        listed: HashMap::new(),
        nodes,
    };
    tokio::spawn(owner.run(mailbox, watches.tasks, publish, shutdown));
    ClusterHandle { state, _fixed: None }
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    ApiResource { group: group.into(), version: version.into(), api_version, kind: kind.into(), plural: plural.into() }
}

struct Watches {
    clients: Clients,
    updates: mpsc::Sender<(usize, Update)>,
    recovered: Arc<Notify>,
    /// They end with the owner, and the owner with any of them: readers see then that nobody writes the state any more.
    tasks: JoinSet<()>,
    sources: Vec<Source>,
}

impl Watches {
    /// Every object of a cluster-wide list, or those that a fixed field selector picks.
    fn all<T: Slim>(&mut self, kind: Kind, resource: ApiResource, fields: Option<String>) {
        self.add::<T>(kind, None, resource, watch::channel(fields).1);
    }

    /// Every object of a cluster-wide list; none where the RBAC does not allow it.
    fn where_allowed<T: Slim>(&mut self, kind: Kind, resource: ApiResource) {
        self.follow::<T>(Source { kind, resource, earlier: None, namespace: None, optional: true }, watch::channel(None).1);
    }

    /// Every object of a cluster-wide list, in the first of two versions that is served.
    fn either<T: Slim>(&mut self, kind: Kind, latest: ApiResource, earlier: ApiResource) {
        self.follow::<T>(
            Source { kind, resource: latest, earlier: Some(earlier), namespace: None, optional: false },
            watch::channel(None).1,
        );
    }

    fn add<T: Slim>(
        &mut self,
        kind: Kind,
        namespace: Option<&'static str>,
        resource: ApiResource,
        selector: watch::Receiver<Option<String>>,
    ) {
        self.follow::<T>(Source { kind, resource, earlier: None, namespace, optional: false }, selector);
    }

    fn follow<T: Slim>(&mut self, source: Source, selector: watch::Receiver<Option<String>>) {
        let index = self.sources.len();
        self.sources.push(source.clone());
        let (clients, updates, recovered) = (self.clients.clone(), self.updates.clone(), Arc::clone(&self.recovered));
        self.tasks.spawn(follow::<T>(index, source, clients, selector, updates, recovered));
    }
}

/// Owns the state.
struct Owner {
    sources: Vec<Source>,
    state: ClusterState,
    /// Sources that were never read to the end.
    unread: HashSet<usize>,
    /// Sources that are not answered at present.
    failing: BTreeSet<usize>,
    /// What the lists under way have named.
    listed: HashMap<usize, HashSet<ObjectKey>>,
    /// The field selector of nodes.
    nodes: watch::Sender<Option<String>>,
}

impl Owner {
    /// Applies what has come, then publishes once if it changed anything.
    async fn run(
        mut self,
        mut mailbox: mpsc::Receiver<(usize, Update)>,
        mut watches: JoinSet<()>,
        publish: watch::Sender<Arc<ClusterState>>,
        shutdown: CancellationToken,
    ) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(ended) = watches.join_next() => {
                    if let Err(error) = ended {
                        error!(%error, "a watch of the API server ended");
                    }
                    return;
                }
                count = mailbox.recv_many(&mut batch, MAILBOX) => if count == 0 { return },
            }
            let mut changed = false;
            for (index, update) in batch.drain(..) {
                match &update {
                    Update::Failed(_) => {
                        self.failing.insert(index);
                    }
                    Update::Begin | Update::Listed(_) | Update::Unreadable(..) => {}
                    Update::Complete | Update::Applied(_) | Update::Deleted(_) | Update::Absent(_) | Update::Well => {
                        self.failing.remove(&index);
                    }
                }
                changed |= self.take(index, update);
            }
            let stale = self.failing.iter().map(|index| self.sources[*index].kind).collect();
            changed |= self.state.stale != stale;
            self.state.stale = stale;
            let synced = self.unread.is_empty();
            changed |= std::mem::replace(&mut self.state.synced, synced) != synced;
            if changed {
                self.widen_nodes();
                publish.send_replace(Arc::new(self.state.clone()));
            }
        }
    }

    /// True if anything changed that readers see.
    fn take(&mut self, index: usize, update: Update) -> bool {
        let source = &self.sources[index];
        match update {
            Update::Begin => {
                self.listed.insert(index, HashSet::new());
                false
            }
            Update::Listed(object) => {
                self.listed.entry(index).or_default().insert(object.key());
                self.state.apply(object)
            }
            Update::Complete => {
                let named = self.listed.remove(&index).unwrap_or_default();
                let gone: Vec<ObjectKey> =
                    self.state.keys(source.kind).into_iter().filter(|key| source.owns(key) && !named.contains(key)).collect();
                gone.iter().for_each(|key| self.state.remove(key));
                let mended = self.state.trouble.remove(&source.name()).is_some();
                self.unread.remove(&index) || mended || !gone.is_empty()
            }
            Update::Applied(object) => {
                let mended = self.state.trouble.remove(&source.name()).is_some();
                self.state.apply(object) || mended
            }
            Update::Deleted(key) => {
                self.state.remove(&key);
                true
            }
            Update::Unreadable(key, problem) => {
                warn!(kind = ?key.kind, name = %key.name, problem, "this object cannot be read: what was known of it stays");
                self.state.trouble.insert(source.name(), format!("{}: {problem}", key.name));
                self.listed.entry(index).or_default().insert(key);
                true
            }
            Update::Absent(trouble) => {
                match trouble {
                    Some(trouble) => drop(self.state.trouble.insert(source.name(), trouble)),
                    None => drop(self.state.trouble.remove(&source.name())),
                }
                if self.unread.remove(&index) {
                    info!(
                        resource = source.resource.plural,
                        group = source.resource.group,
                        "not there: taken as empty and looked for again"
                    );
                }
                let gone: Vec<ObjectKey> = self.state.keys(source.kind).into_iter().filter(|key| source.owns(key)).collect();
                gone.iter().for_each(|key| self.state.remove(key));
                true
            }
            Update::Well => self.state.trouble.remove(&source.name()).is_some(),
            Update::Failed(problem) => self.state.trouble.insert(source.name(), problem.clone()) != Some(problem),
        }
    }

    /// All nodes are read once a policy names nodes as peers: before, each node's heartbeats would be read for nothing.
    fn widen_nodes(&mut self) {
        if self.nodes.borrow().is_none() {
            return;
        }
        let speaks_of_nodes = |policy: &ClusterNetworkPolicy| {
            let rules = policy.spec.ingress.iter().chain(&policy.spec.egress);
            rules.flat_map(|rule| rule.from.iter().chain(&rule.to)).any(|peer| peer.nodes.is_some())
        };
        if self.state.cluster_network_policies.values().any(|policy| speaks_of_nodes(policy)) {
            info!("a policy speaks of nodes: all nodes are read");
            self.nodes.send_replace(None);
        }
    }
}
