//! A fake Kubernetes API server: list in pages, watch with resourceVersion, bookmarks, 410 Gone (refused or in the
//! stream), disconnects, kinds that are not served, lists by watch refused as a real server does, objects made and patched
//! with conflicts, RBAC, TLS. Objects are JSON as they are written to it.

mod path;
mod rbac;
pub mod tls;
mod write;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use path::Target;
pub use rbac::Rules;

/// What a real API server of 1.35 answers to a list by watch when its etcd lacks progress requests: status 200, and this
/// in the stream.
const WATCH_LIST_REFUSED: &str = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"a watch stream was requested by the client but the required storage feature RequestWatchProgress is disabled","reason":"InternalError","code":500}}"#;

/// One change: version, type (`ADDED`, `MODIFIED`, `DELETED`), collection, the object.
type Change = (u64, &'static str, String, Value);

#[derive(Default)]
struct Model {
    version: u64,
    /// Changes before this version are compacted away: watching from there is 410 Gone.
    compacted: u64,
    /// 410 comes as an event of a stream that began well.
    gone_in_stream: bool,
    /// Collection (`/api/v1/pods`) to objects by `namespace/name`.
    collections: BTreeMap<String, BTreeMap<String, Value>>,
    history: Vec<Change>,
    requests: Vec<String>,
    /// `Authorization` of every request.
    authorizations: Vec<String>,
    /// Watches end when what has happened is told.
    cuts_watches: bool,
    /// Requests are refused with this status.
    outage: Option<u16>,
    rules: Option<Rules>,
    forbidden: Vec<String>,
}

/// A cluster's API.
#[derive(Clone)]
pub struct FakeKube {
    model: Arc<Mutex<Model>>,
    version: watch::Sender<u64>,
    disconnects: watch::Sender<u64>,
    sent: Arc<AtomicU64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Params {
    watch: Option<String>,
    resource_version: Option<String>,
    field_selector: Option<String>,
    allow_watch_bookmarks: Option<String>,
    send_initial_events: Option<String>,
    limit: Option<usize>,
    #[serde(rename = "continue")]
    from: Option<String>,
}

impl Default for FakeKube {
    fn default() -> Self {
        Self { model: Arc::default(), version: watch::channel(0).0, disconnects: watch::channel(0).0, sent: Arc::default() }
    }
}

impl FakeKube {
    fn lock(&self) -> MutexGuard<'_, Model> {
        self.model.lock().expect("no holder panics while it holds the model")
    }

    /// Serves a collection from now on, empty: `/api/v1/pods`.
    pub fn serve_collection(&self, collection: &str) {
        self.lock().collections.entry(collection.to_owned()).or_default();
    }

    /// Serves a collection no longer.
    pub fn withdraw(&self, collection: &str) {
        self.lock().collections.remove(collection);
    }

    /// Makes or changes an object of a collection.
    pub fn put(&self, collection: &str, object: Value) {
        let version = self.lock().put(collection, object);
        self.version.send_replace(version);
    }

    /// An object as it is now, by `namespace/name` (or `/name`).
    pub fn get(&self, collection: &str, key: &str) -> Option<Value> {
        self.lock().collections.get(collection)?.get(key).cloned()
    }

    /// Every object of a collection.
    pub fn objects(&self, collection: &str) -> Vec<Value> {
        self.lock().collections.get(collection).into_iter().flat_map(|objects| objects.values().cloned()).collect()
    }

    /// Deletes an object by `namespace/name` (or `/name`).
    pub fn delete(&self, collection: &str, key: &str) {
        let mut model = self.lock();
        let Some(mut object) = model.collections.get_mut(collection).and_then(|objects| objects.remove(key)) else { return };
        model.version += 1;
        let version = model.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        model.history.push((version, "DELETED", collection.to_owned(), object));
        drop(model);
        self.version.send_replace(version);
    }

    /// Ends every open watch, as a restart of the server does.
    pub fn disconnect(&self) {
        self.disconnects.send_modify(|n| *n += 1);
    }

    /// Ends each watch as soon as it has told what has happened, as a proxy with a short patience does; or no longer.
    pub fn cut_watches(&self, cuts: bool) {
        self.lock().cuts_watches = cuts;
    }

    /// Forgets the history: a watch from before now is 410 Gone, as the answer to the request or as an event of the stream.
    pub fn compact(&self, in_stream: bool) {
        let mut model = self.lock();
        model.version += 1;
        model.compacted = model.version;
        model.gone_in_stream = in_stream;
        model.history.clear();
    }

    /// Refuses every request with this status, or serves again.
    pub fn outage(&self, status: Option<u16>) {
        self.lock().outage = status;
    }

    /// Answers 403 to what these rules do not allow.
    pub fn enforce(&self, rules: Rules) {
        self.lock().rules = Some(rules);
    }

    /// Requests that the rules did not allow.
    pub fn forbidden(&self) -> Vec<String> {
        self.lock().forbidden.clone()
    }

    /// `METHOD path?query` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.lock().requests.clone()
    }

    /// The `Authorization` header of every request so far; empty where there was none.
    pub fn authorizations(&self) -> Vec<String> {
        self.lock().authorizations.clone()
    }

    /// Bytes of every body sent so far: lists, and events as they left for their watch.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Serves until dropped.
    pub async fn serve<L: axum::serve::Listener<Addr: std::fmt::Debug>>(self, listener: L) -> std::io::Result<()> {
        axum::serve(listener, Router::new().fallback(answer).with_state(self)).await
    }
}

impl Model {
    fn put(&mut self, collection: &str, mut object: Value) -> u64 {
        self.version += 1;
        let version = self.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let key = key(&object);
        let kind = match self.collections.entry(collection.to_owned()).or_default().insert(key, object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        self.history.push((version, kind, collection.to_owned(), object));
        version
    }
}

fn key(object: &Value) -> String {
    let part = |name: &str| object.pointer(name).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}", part("/metadata/namespace"), part("/metadata/name"))
}

/// `metadata.name=x,spec.nodeName=y`
fn selected(object: &Value, selector: Option<&str>) -> bool {
    selector.into_iter().flat_map(|s| s.split(',')).filter(|term| !term.is_empty()).all(|term| {
        let (path, value) = term.split_once('=').unwrap_or((term, ""));
        object.pointer(&format!("/{}", path.replace('.', "/"))).and_then(Value::as_str).unwrap_or_default() == value
    })
}

fn status(code: u16, reason: &str, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason, "message": message});
    (StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), axum::Json(body)).into_response()
}

async fn answer(
    State(kube): State<FakeKube>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    Query(params): Query<Params>,
    body: Bytes,
) -> Response {
    let mut model = kube.lock();
    model.requests.push(format!("{method} {uri}"));
    let authorization = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    model.authorizations.push(authorization.to_owned());
    if let Some(code) = model.outage {
        return status(code, "ServiceUnavailable", "the server is down for this test");
    }
    let Some(target) = Target::parse(uri.path()) else { return status(404, "NotFound", "no such path") };
    let watches = params.watch.as_deref().is_some_and(|w| w == "true" || w == "1");
    if let Some(rules) = &model.rules {
        let selected = params.field_selector.as_deref().and_then(|s| s.strip_prefix("metadata.name="));
        let verb = match (&method, &target.name, watches) {
            (_, _, true) => "watch",
            (&Method::GET, Some(_), _) => "get",
            (&Method::GET, None, _) => "list",
            (&Method::POST, ..) => "create",
            (&Method::PATCH, ..) => "patch",
            _ => "other",
        };
        if !rules.allow(verb, &target, target.name.as_deref().or(selected)) {
            model.forbidden.push(format!("{verb} {uri}"));
            return status(403, "Forbidden", &format!("cannot {verb} {} in API group {:?}", target.resource(), target.group));
        }
    }
    if method != Method::GET {
        let (response, version) = model.write(&method, &target, &headers, &body);
        drop(model);
        kube.version.send_if_modified(|v| std::mem::replace(v, version) != version);
        return response;
    }
    let collection = target.collection();
    let Some(objects) = model.collections.get(&collection) else {
        // As a real server answers for a kind that it does not serve: no Status.
        return (StatusCode::NOT_FOUND, "404 page not found\n").into_response();
    };
    if let Some(key) = target.key() {
        return match objects.get(&key) {
            Some(object) => axum::Json(object).into_response(),
            None => status(404, "NotFound", &format!("{} {key} not found", target.resource())),
        };
    }
    let wanted = {
        let (namespace, selector) = (target.namespace.clone(), params.field_selector.clone());
        move |object: &Value| {
            selected(object, selector.as_deref())
                && namespace.as_deref().is_none_or(|n| object.pointer("/metadata/namespace").and_then(Value::as_str) == Some(n))
        }
    };
    if watches {
        if params.send_initial_events.is_some() {
            return ([("content-type", "application/json")], WATCH_LIST_REFUSED).into_response();
        }
        let from: u64 = params.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(model.version);
        if from < model.compacted {
            let body = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version"}});
            return match model.gone_in_stream {
                true => axum::Json(body).into_response(),
                false => status(410, "Expired", "too old resource version"),
            };
        }
        drop(model);
        return stream(kube, collection, wanted, from, params.allow_watch_bookmarks.is_some());
    }
    let from = params.from.as_deref().unwrap_or_default();
    let limit = params.limit.filter(|l| *l > 0).unwrap_or(usize::MAX);
    let mut page: Vec<(&String, &Value)> =
        objects.iter().filter(|(k, o)| k.as_str() > from && wanted(o)).take(limit.saturating_add(1)).collect();
    let next = if page.len() > limit {
        page.truncate(limit);
        page.last().map(|(key, _)| (*key).clone())
    } else {
        None
    };
    let items: Vec<&Value> = page.into_iter().map(|(_, object)| object).collect();
    let version = model.version.to_string();
    let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version, "continue": next}, "items": items});
    let body = list.to_string();
    kube.sent.fetch_add(body.len() as u64, Ordering::Relaxed);
    ([("content-type", "application/json")], body).into_response()
}

/// A watch: every later change of the collection, until the client goes or the test disconnects it.
fn stream(kube: FakeKube, collection: String, wanted: impl Fn(&Value) -> bool + Send + 'static, from: u64, bookmarks: bool) -> Response {
    let (lines, body) = mpsc::channel::<Result<Bytes, Infallible>>(64);
    tokio::spawn(async move {
        let mut seen = from;
        let mut versions = kube.version.subscribe();
        let mut disconnects = kube.disconnects.subscribe();
        disconnects.mark_unchanged();
        loop {
            versions.mark_unchanged();
            let changes: Vec<Change> = {
                let model = kube.lock();
                let first = model.history.partition_point(|(version, ..)| *version <= seen);
                let others = model.history.last().map(|(version, ..)| *version).filter(|version| *version > seen);
                let mut changes: Vec<Change> =
                    model.history[first..].iter().filter(|(_, _, of, object)| *of == collection && wanted(object)).cloned().collect();
                // Progress past what others changed, as a bookmark.
                if let (true, Some(version)) = (bookmarks, others)
                    && changes.last().is_none_or(|(last, ..)| *last < version)
                {
                    let bookmark = json!({"kind": "Bookmark", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}});
                    changes.push((version, "BOOKMARK", collection.clone(), bookmark));
                }
                changes
            };
            for (version, kind, _, object) in changes {
                seen = version;
                let line = format!("{}\n", json!({"type": kind, "object": object}));
                // A real server sends a bookmark about once a minute: they are not counted.
                if kind != "BOOKMARK" {
                    kube.sent.fetch_add(line.len() as u64, Ordering::Relaxed);
                }
                if lines.send(Ok(line.into())).await.is_err() {
                    return;
                }
            }
            if kube.lock().cuts_watches {
                return;
            }
            tokio::select! {
                _ = versions.changed() => {}
                _ = disconnects.changed() => return,
                () = lines.closed() => return,
            }
        }
    });
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(body));
    ([("content-type", "application/json")], body).into_response()
}
