//! One kind's list and watch, for ever: what is seen goes to the owner.

use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::api::ApiResource;
use kube::runtime::watcher::{self, Error, Event};
use rand::RngExt as _;
use stanchion_core::cluster::{Kind, Object, ObjectKey};
use stanchion_core::ids::PodName;
use stanchion_core::policy::objects::AWS_GROUP;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use super::credentials::Clients;
use super::slim::{Slim, Watched, named};

/// Pauses after a failure: doubled from the first to the second, each spread by half.
const PAUSE: (Duration, Duration) = (Duration::from_millis(400), Duration::from_secs(15));
/// A kind that is not served is asked for again after about this time. A list of a kind that does not exist costs the API
/// server one look-up.
const ABSENT_PAUSE: Duration = Duration::from_secs(25);
/// A watch that was refused and then stands says nothing until something changes: so long without a failure means that it
/// stands. Longer than a request may hang.
const WELL_AFTER: Duration = Duration::from_secs(75);

/// What a watch tells the owner.
pub(super) enum Update {
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
    /// There, but not readable: what was known of it stays.
    Unreadable(ObjectKey, String),
    /// The kind is not served here, or (a custom resource, or an optional one) not allowed, which is trouble.
    Absent(Option<String>),
    /// Asking fails.
    Failed(String),
    /// Asking has not failed for a while.
    Well,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) kind: Kind,
    pub(super) resource: ApiResource,
    /// The same in an earlier version of its API, for servers that do not know that one. The fields that are read are the same.
    pub(super) earlier: Option<ApiResource>,
    /// Only this namespace.
    pub(super) namespace: Option<&'static str>,
    /// Readers do without it where the RBAC does not allow it.
    pub(super) optional: bool,
}

impl Source {
    /// Not part of every Kubernetes: the kind may be missing, and so may the right to read it.
    pub(super) fn custom(&self) -> bool {
        !matches!(self.resource.group.as_str(), "" | "discovery.k8s.io" | "networking.k8s.io")
    }

    fn is_aws_cluster_policy(&self) -> bool {
        self.kind == Kind::ClusterNetworkPolicy && self.resource.group == AWS_GROUP
    }

    /// Whether an object of this kind came from this source: two API groups serve a ClusterNetworkPolicy.
    pub(super) fn owns(&self, key: &ObjectKey) -> bool {
        self.kind != Kind::ClusterNetworkPolicy
            || key.name.name.strip_prefix(AWS_GROUP).is_some_and(|rest| rest.starts_with('/')) == self.is_aws_cluster_policy()
    }

    fn key(&self, meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> ObjectKey {
        let meta = named(meta);
        let name = if self.is_aws_cluster_policy() { format!("{AWS_GROUP}/{}", meta.name) } else { meta.name };
        ObjectKey { kind: self.kind, name: PodName::new(meta.namespace, name) }
    }
}

/// Passes one source's events to the owner. A new client or another selector begins with a new list.
pub(super) async fn follow<T: Slim>(
    index: usize,
    mut source: Source,
    mut clients: Clients,
    mut selector: watch::Receiver<Option<String>>,
    updates: mpsc::Sender<(usize, Update)>,
) {
    let mut pause = PAUSE.0;
    let mut complaint = String::new();
    // One version was not there: the other is asked for before the kind counts as absent.
    let mut one_absent = false;
    loop {
        let client = clients.borrow_and_update().clone();
        let fields = selector.borrow_and_update().clone();
        let api: Api<Watched<T>> = match source.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &source.resource),
            None => Api::all_with(client, &source.resource),
        };
        let mut events = Box::pin(watcher::watcher(api, watcher::Config { field_selector: fields, ..watcher::Config::default() }));
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = tokio::time::sleep(WELL_AFTER), if !complaint.is_empty() => {
                    complaint.clear();
                    if updates.send((index, Update::Well)).await.is_err() {
                        return;
                    }
                    continue;
                }
                () = changed(&mut clients) => break,
                () = changed(&mut selector) => break,
            };
            let Some(event) = event else { break };
            let (update, rest) = match event {
                Ok(event) => {
                    // A list begins before the server has answered.
                    if !matches!(event, Event::Init) {
                        pause = PAUSE.0;
                        one_absent = false;
                    }
                    complaint.clear();
                    (read(&source, event), Rest::Go)
                }
                Err(error) => judge(&source, error, &mut pause),
            };
            if let Update::Absent(None) = &update
                && let Some(earlier) = &mut source.earlier
            {
                std::mem::swap(&mut source.resource, earlier);
                one_absent = !one_absent;
                if one_absent {
                    break;
                }
            }
            // The same complaint is made once, until something succeeds.
            if let Update::Failed(problem) | Update::Absent(Some(problem)) = &update
                && *problem != complaint
            {
                warn!(resource = source.resource.plural, problem, "the API server does not answer as it should; tried again");
                problem.clone_into(&mut complaint);
            }
            if updates.send((index, update)).await.is_err() {
                return;
            }
            match rest {
                Rest::Go => {}
                Rest::Pause(duration) => tokio::time::sleep(duration).await,
                Rest::Anew(duration) => {
                    tokio::time::sleep(duration).await;
                    break;
                }
            }
        }
    }
}

/// What comes after an event.
enum Rest {
    Go,
    /// The watcher goes on from where it was.
    Pause(Duration),
    /// A new list.
    Anew(Duration),
}

fn read<T: Slim>(source: &Source, event: Event<Watched<T>>) -> Update {
    let object = |watched: Watched<T>, of: fn(Object) -> Update| match watched.object {
        Ok(object) => of(object.into_object(&source.resource.api_version)),
        Err(problem) => Update::Unreadable(source.key(&watched.meta), problem),
    };
    match event {
        Event::Init => Update::Begin,
        Event::InitApply(watched) => object(watched, Update::Listed),
        Event::InitDone => Update::Complete,
        Event::Apply(watched) => object(watched, Update::Applied),
        Event::Delete(watched) => Update::Deleted(source.key(&watched.meta)),
    }
}

fn judge(source: &Source, error: Error, pause: &mut Duration) -> (Update, Rest) {
    let (code, text) = match &error {
        Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status)) => {
            (status.code, format!("{} {}: {}", status.code, status.reason, status.message))
        }
        Error::WatchError(status) => (0, format!("{} {}: {}", status.code, status.reason, status.message)),
        error => (0, root_cause(error)),
    };
    match code {
        404 if source.custom() => (Update::Absent(None), Rest::Anew(spread(ABSENT_PAUSE))),
        404 => {
            let ApiResource { plural, api_version, .. } = &source.resource;
            let problem = format!(
                "{plural} of {api_version} are not served here, so they are taken as none: policies do not see them; \
                 every Kubernetes from 1.21 on serves them ({text})"
            );
            (Update::Absent(Some(problem)), Rest::Anew(spread(ABSENT_PAUSE)))
        }
        // The right to read a custom resource is checked before whether it exists.
        403 if source.custom() || source.optional => {
            let ApiResource { plural, group, .. } = &source.resource;
            let resource = if group.is_empty() { plural.clone() } else { format!("{plural}.{group}") };
            let problem = format!("reading {resource} is forbidden, so it is taken as empty: add it to the ClusterRole ({text})");
            (Update::Absent(Some(problem)), Rest::Anew(spread(ABSENT_PAUSE)))
        }
        code => {
            let rest = spread(*pause);
            *pause = (*pause * 2).min(PAUSE.1);
            // kube's watcher lists anew when a stream says 410; some servers refuse the request itself.
            (Update::Failed(text), if code == 410 { Rest::Anew(rest) } else { Rest::Pause(rest) })
        }
    }
}

/// kube's errors repeat their causes in their own words: the innermost says most.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Between half and one and a half of it, so that a fleet does not ask as one.
pub(super) fn spread(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..1.5))
}

/// Returns when there is a new value; never when there will be none.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
