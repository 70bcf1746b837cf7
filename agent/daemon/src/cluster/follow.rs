//! One kind's list and watch, for ever: what is seen goes to the owner.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use futures_util::StreamExt as _;
use kube::api::ApiResource;
use kube::client::Body;
use kube::runtime::watcher::{self, Error, Event};
use kube::{Api, Client};
use rand::RngExt as _;
use stanchion_core::cluster::{Kind, Object, ObjectKey};
use stanchion_core::ids::PodName;
use stanchion_core::policy::objects::AWS_GROUP;
use tokio::sync::{Notify, mpsc, watch};
use tracing::warn;

use super::credentials::Clients;
use super::limits::is_watch;
use super::slim::{Slim, Watched, named};

/// Pauses after a failure: doubled from the first to the second, each spread by half.
const PAUSE: (Duration, Duration) = (Duration::from_millis(400), Duration::from_secs(15));
/// A kind that is not served is asked for again after about this time. A list of a kind that does not exist costs the API
/// server one look-up.
const ABSENT_PAUSE: Duration = Duration::from_secs(25);

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
    /// Asking fails no longer.
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

    /// Two API groups serve such a kind.
    fn is_of_two(&self) -> bool {
        matches!(self.kind, Kind::NetworkPolicy | Kind::ClusterNetworkPolicy)
    }

    fn is_aws_policy(&self) -> bool {
        self.is_of_two() && self.resource.group == AWS_GROUP
    }

    /// What trouble with it is told under: two groups serve kinds of one name.
    pub(super) fn name(&self) -> String {
        let ApiResource { group, plural, .. } = &self.resource;
        if self.custom() { format!("{plural}.{group}") } else { plural.clone() }
    }

    /// Whether an object of this kind came from this source.
    pub(super) fn owns(&self, key: &ObjectKey) -> bool {
        !self.is_of_two() || key.name.name.strip_prefix(AWS_GROUP).is_some_and(|rest| rest.starts_with('/')) == self.is_aws_policy()
    }

    fn key(&self, meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> ObjectKey {
        let meta = named(meta);
        let name = if self.is_aws_policy() { format!("{AWS_GROUP}/{}", meta.name) } else { meta.name };
        ObjectKey { kind: self.kind, name: PodName::new(meta.namespace, name) }
    }
}

/// Passes one source's events to the owner. A new client or another selector begins with a new list. `recovered` tells those that
/// pause after a failure that another has been answered again.
pub(super) async fn follow<T: Slim>(
    index: usize,
    mut source: Source,
    mut clients: Clients,
    mut selector: watch::Receiver<Option<String>>,
    updates: mpsc::Sender<(usize, Update)>,
    recovered: Arc<Notify>,
) {
    let (begins, mut begun) = watch::channel(());
    let mut pause = PAUSE.0;
    let mut complaint = String::new();
    // What it has was read to the end once; of a kind that may be missing, something was there. And whether the list under way has any.
    let (mut is_known, mut has_any) = (false, false);
    // One version was not there: the other is asked for before the kind counts as absent.
    let mut one_absent = false;
    loop {
        let client = telling(clients.borrow_and_update().clone(), begins.clone());
        let fields = selector.borrow_and_update().clone();
        let api: Api<Watched<T>> = match source.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &source.resource),
            None => Api::all_with(client, &source.resource),
        };
        let mut events = Box::pin(watcher::watcher(api, watcher::Config { field_selector: fields, ..watcher::Config::default() }));
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                // A watch that was refused and then stands says nothing until something changes.
                () = changed(&mut begun), if !complaint.is_empty() => {
                    complaint.clear();
                    recovered.notify_waiters();
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
                        if !complaint.is_empty() {
                            complaint.clear();
                            recovered.notify_waiters();
                        }
                    }
                    match event {
                        Event::Init => has_any = false,
                        Event::InitApply(_) => has_any = true,
                        Event::InitDone => is_known = has_any || !source.custom(),
                        Event::Apply(_) => is_known = true,
                        Event::Delete(_) => {}
                    }
                    (read(&source, event), Rest::Go)
                }
                Err(error) => {
                    begun.mark_unchanged();
                    judge(&source, is_known, error, &mut pause)
                }
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
            if let Update::Absent(_) = &update {
                is_known = false;
            }
            if updates.send((index, update)).await.is_err() {
                return;
            }
            match rest {
                Rest::Go => {}
                Rest::Pause(duration) => pause_for(duration, &recovered).await,
                Rest::Anew(duration) => {
                    tokio::time::sleep(duration).await;
                    break;
                }
            }
        }
    }
}

/// The client, which tells of each watch that the server begins.
fn telling(client: Client, begins: watch::Sender<()>) -> Client {
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, begins) = (client.clone(), begins.clone());
        async move {
            let watches = is_watch(request.uri());
            let answer = client.send(request).await?;
            if watches && answer.status().is_success() {
                begins.send_replace(());
            }
            Ok::<_, kube::Error>(answer)
        }
    });
    Client::new(service, "default")
}

/// Waits for so long, or until another source is answered: then this one soon is, too.
async fn pause_for(duration: Duration, recovered: &Notify) {
    tokio::select! {
        () = tokio::time::sleep(duration) => {}
        () = recovered.notified() => tokio::time::sleep(spread(PAUSE.0).min(duration)).await,
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

/// What a failure means. What `is_known` is given up only where the API server itself says that the kind is gone: rights are
/// taken and given again while a release is rolled out, and what is between may answer in the server's place.
fn judge(source: &Source, is_known: bool, error: Error, pause: &mut Duration) -> (Update, Rest) {
    let (code, is_own, text) = match &error {
        Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status)) => {
            // Of a kind that it does not serve, the API server says so in plain text, and no more than this.
            let is_own = status.reason == "NotFound" || status.message == "404 page not found";
            (status.code, is_own, format!("{} {}: {}", status.code, status.reason, status.message))
        }
        Error::WatchError(status) => (0, false, format!("{} {}: {}", status.code, status.reason, status.message)),
        error => (0, false, root_cause(error)),
    };
    match code {
        404 if source.custom() && (is_own || !is_known) => (Update::Absent(None), Rest::Anew(spread(ABSENT_PAUSE))),
        404 if !is_known => {
            let ApiResource { plural, api_version, .. } = &source.resource;
            let problem = format!(
                "{plural} of {api_version} are not served here, so they are taken as none: policies do not see them; \
                 every Kubernetes from 1.21 on serves them ({text})"
            );
            (Update::Absent(Some(problem)), Rest::Anew(spread(ABSENT_PAUSE)))
        }
        // The right to read a custom resource is checked before whether it exists.
        403 if (source.custom() || source.optional) && !is_known => {
            let resource = source.name();
            let problem = format!("reading {resource} is forbidden, so it is taken as empty: add it to the ClusterRole ({text})");
            (Update::Absent(Some(problem)), Rest::Anew(spread(ABSENT_PAUSE)))
        }
        code => {
            let rest = spread(*pause);
            *pause = (*pause * 2).min(PAUSE.1);
            let problem = match code {
                403 if is_known => format!("reading is forbidden now, what was read before stays: add it to the ClusterRole ({text})"),
                404 if is_known => format!("not served now, what was read before stays ({text})"),
                _ => text,
            };
            // kube's watcher lists anew when a stream says 410; some servers refuse the request itself.
            (Update::Failed(problem), if code == 410 { Rest::Anew(rest) } else { Rest::Pause(rest) })
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
