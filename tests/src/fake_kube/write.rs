//! Objects made and patched over the API.

use axum::http::{HeaderMap, Method};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::path::Target;
use super::{Model, status};

impl Model {
    /// The answer, and the version after it.
    pub(super) fn write(&mut self, method: &Method, target: &Target, headers: &HeaderMap, body: &[u8]) -> (Response, u64) {
        let response = match self.changed(method, target, headers, body) {
            Ok(object) => {
                self.put(&target.collection(), object.clone());
                axum::Json(object).into_response()
            }
            Err(response) => *response,
        };
        (response, self.version)
    }

    fn changed(&self, method: &Method, target: &Target, headers: &HeaderMap, body: &[u8]) -> Result<Value, Box<Response>> {
        let refuse = |code, reason: &str, message: String| Box::new(status(code, reason, &message));
        let collection = target.collection();
        let objects = self.collections.get(&collection).ok_or_else(|| refuse(404, "NotFound", format!("{collection} is not served")))?;
        let document: Value = serde_json::from_slice(body).map_err(|error| refuse(400, "BadRequest", error.to_string()))?;
        if *method == Method::POST {
            let mut object = document;
            if let Some(namespace) = &target.namespace {
                object["metadata"]["namespace"] = json!(namespace);
            }
            let key = super::key(&object);
            if key.ends_with('/') {
                return Err(refuse(422, "Invalid", "metadata.name: Required value".to_owned()));
            }
            return if objects.contains_key(&key) { Err(refuse(409, "AlreadyExists", key)) } else { Ok(object) };
        }
        let content = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let strategic = content == "application/strategic-merge-patch+json" && target.resource() == "nodes/status";
        if *method != Method::PATCH || !(strategic || content == "application/merge-patch+json") {
            return Err(refuse(415, "UnsupportedMediaType", format!("{method} {content}")));
        }
        let key = target.key().ok_or_else(|| refuse(405, "MethodNotAllowed", "no object is named".to_owned()))?;
        let mut object = objects.get(&key).cloned().ok_or_else(|| refuse(404, "NotFound", format!("{key} not found")))?;
        if let Some(version) = document.pointer("/metadata/resourceVersion")
            && Some(version) != object.pointer("/metadata/resourceVersion")
        {
            return Err(refuse(409, "Conflict", "the object has been modified".to_owned()));
        }
        if let Some(uid) = document.pointer("/metadata/uid")
            && Some(uid) != object.pointer("/metadata/uid")
        {
            return Err(refuse(409, "Conflict", "the UID in the precondition does not match".to_owned()));
        }
        let before = object.pointer("/status/conditions").cloned();
        merge(&mut object, &document);
        if strategic && let (Some(Value::Array(before)), Some(Value::Array(now))) = (before, object.pointer_mut("/status/conditions")) {
            // The key of this list is the type: those of other types stay.
            let others = before.into_iter().filter(|old| now.iter().all(|new| new["type"] != old["type"])).collect::<Vec<_>>();
            now.splice(0..0, others);
        }
        Ok(object)
    }
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(fields) = target else { return };
    for (name, value) in patch {
        match value {
            Value::Null => drop(fields.remove(name)),
            value => merge(fields.entry(name).or_insert(Value::Null), value),
        }
    }
}
