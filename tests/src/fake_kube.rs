//! A fake Kubernetes API server: list, watch with resourceVersion, bookmarks, 410 Gone, disconnects, kinds that are not
//! served. Objects are JSON as they are written to it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// One change: version, type (`ADDED`, `MODIFIED`, `DELETED`), collection, the object.
type Change = (u64, &'static str, String, Value);

#[derive(Default)]
struct Model {
    version: u64,
    /// Changes before this version are compacted away: watching from there is 410 Gone.
    compacted: u64,
    /// Collection (`/api/v1/pods`) to objects by `namespace/name`.
    collections: BTreeMap<String, BTreeMap<String, Value>>,
    history: Vec<Change>,
    requests: Vec<String>,
    /// Requests are refused with this status.
    outage: Option<u16>,
}

/// A cluster's API.
#[derive(Clone)]
pub struct FakeKube {
    model: Arc<Mutex<Model>>,
    version: watch::Sender<u64>,
    disconnects: watch::Sender<u64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Params {
    watch: Option<String>,
    resource_version: Option<String>,
    field_selector: Option<String>,
    allow_watch_bookmarks: Option<String>,
    limit: Option<usize>,
    #[serde(rename = "continue")]
    from: Option<String>,
}

impl Default for FakeKube {
    fn default() -> Self {
        Self { model: Arc::default(), version: watch::channel(0).0, disconnects: watch::channel(0).0 }
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

    /// Makes or changes an object of a collection.
    pub fn put(&self, collection: &str, mut object: Value) {
        let mut model = self.lock();
        model.version += 1;
        let version = model.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let key = key(&object);
        let kind = match model.collections.entry(collection.to_owned()).or_default().insert(key, object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        model.history.push((version, kind, collection.to_owned(), object));
        drop(model);
        self.version.send_replace(version);
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

    /// Forgets the history: a watch from before now is 410 Gone.
    pub fn compact(&self) {
        let mut model = self.lock();
        model.version += 1;
        model.compacted = model.version;
        model.history.clear();
    }

    /// Refuses every request with this status, or serves again.
    pub fn outage(&self, status: Option<u16>) {
        self.lock().outage = status;
    }

    /// `METHOD path?query` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.lock().requests.clone()
    }

    /// Serves until dropped.
    pub async fn serve(self, listener: tokio::net::TcpListener) -> std::io::Result<()> {
        axum::serve(listener, Router::new().fallback(answer).with_state(self)).await
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

async fn answer(State(kube): State<FakeKube>, method: Method, uri: Uri, Query(params): Query<Params>) -> Response {
    let mut model = kube.lock();
    model.requests.push(format!("{method} {uri}"));
    if let Some(code) = model.outage {
        return status(code, "ServiceUnavailable", "the server is down for this test");
    }
    // `/api/v1/namespaces/x/pods` is a view of `/api/v1/pods`.
    let path = uri.path().to_owned();
    let (collection, namespace) = match path.split_once("/namespaces/").and_then(|(a, b)| b.split_once('/').map(|(n, c)| (a, n, c))) {
        Some((base, namespace, plural)) => (format!("{base}/{plural}"), Some(namespace.to_owned())),
        None => (path, None),
    };
    let Some(objects) = model.collections.get(&collection) else {
        return status(404, "NotFound", "the server could not find the requested resource");
    };
    let wanted = {
        let (namespace, selector) = (namespace.clone(), params.field_selector.clone());
        move |object: &Value| {
            selected(object, selector.as_deref())
                && namespace.as_deref().is_none_or(|n| object.pointer("/metadata/namespace").and_then(Value::as_str) == Some(n))
        }
    };
    if params.watch.as_deref().is_some_and(|w| w == "true" || w == "1") {
        let from: u64 = params.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(model.version);
        if from < model.compacted {
            return status(410, "Expired", "too old resource version");
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
    axum::Json(json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": model.version.to_string(), "continue": next}, "items": items})).into_response()
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
            let changes: Vec<Change> = kube.lock().history.iter().filter(|(version, ..)| *version > seen).cloned().collect();
            for (version, kind, of, object) in changes {
                seen = version;
                if of == collection && wanted(&object) {
                    let line = format!("{}\n", json!({"type": kind, "object": object}));
                    if lines.send(Ok(line.into())).await.is_err() {
                        return;
                    }
                } else if bookmarks {
                    let line = format!(
                        "{}\n",
                        json!({"type": "BOOKMARK", "object": {"kind": "Bookmark", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}}})
                    );
                    if lines.send(Ok(line.into())).await.is_err() {
                        return;
                    }
                }
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
