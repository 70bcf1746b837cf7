//! Whether a document is what a JSON schema says, for the keywords that `deploy/schema/cli.json` uses.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// Every keyword that is checked or says nothing about a document; another one is a fault of the schema.
const KEYWORDS: [&str; 12] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "minimum",
    "format",
    "anyOf",
    "$ref",
    "description",
    "$defs",
];

/// Checks a document against `#/$defs/name` of the schema.
///
/// # Errors
/// Where the document differs, or what the schema has that is not known here.
pub fn check(schema: &Value, name: &str, document: &Value) -> anyhow::Result<()> {
    one(schema, definition(schema, name)?, document).with_context(|| name.to_owned())
}

fn definition<'a>(schema: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    schema["$defs"].get(name).with_context(|| format!("the schema has no {name}"))
}

fn one(schema: &Value, rule: &Value, document: &Value) -> anyhow::Result<()> {
    let rule = rule.as_object().context("a rule is no object")?;
    if let Some(unknown) = rule.keys().find(|key| !KEYWORDS.contains(&key.as_str())) {
        bail!("the schema uses {unknown:?}, which is not checked");
    }
    if let Some(reference) = rule.get("$ref") {
        let name = reference.as_str().and_then(|text| text.strip_prefix("#/$defs/")).context("a reference elsewhere")?;
        one(schema, definition(schema, name)?, document)?;
    }
    if let Some(Value::Array(any)) = rule.get("anyOf") {
        let faults: Vec<_> = any.iter().map(|rule| one(schema, rule, document)).collect();
        if faults.iter().all(Result::is_err) {
            return faults.into_iter().next().unwrap_or_else(|| bail!("anyOf of nothing"));
        }
    }
    match rule.get("type") {
        None => {}
        Some(Value::Array(types)) => ensure!(types.iter().any(|kind| is(kind, document)), "{document} is none of {types:?}"),
        Some(kind) => ensure!(is(kind, document), "{document} is no {kind}"),
    }
    if let Some(Value::Array(values)) = rule.get("enum") {
        ensure!(values.contains(document), "{document} is none of {values:?}");
    }
    if let (Some(least), Some(number)) = (rule.get("minimum").and_then(Value::as_f64), document.as_f64()) {
        ensure!(number >= least, "{number} is less than {least}");
    }
    if let (Some(Value::String(format)), Some(text)) = (rule.get("format"), document.as_str()) {
        ensure!(format == "ip" && text.parse::<IpAddr>().is_ok(), "{text:?} is no {format}");
    }
    if let (Some(items), Some(elements)) = (rule.get("items"), document.as_array()) {
        for (index, element) in elements.iter().enumerate() {
            one(schema, items, element).with_context(|| format!("[{index}]"))?;
        }
    }
    let Some(members) = document.as_object() else { return Ok(()) };
    for name in rule.get("required").and_then(Value::as_array).into_iter().flatten() {
        ensure!(name.as_str().is_some_and(|name| members.contains_key(name)), "{name} is missing");
    }
    let known = rule.get("properties").and_then(Value::as_object);
    for (name, member) in members {
        match (known.and_then(|known| known.get(name)), rule.get("additionalProperties")) {
            (Some(rule), _) => one(schema, rule, member).with_context(|| format!(".{name}"))?,
            (None, Some(Value::Bool(false))) => bail!(".{name} is not in the schema"),
            (None, Some(others @ Value::Object(_))) => one(schema, others, member).with_context(|| format!(".{name}"))?,
            (None, _) => {}
        }
    }
    Ok(())
}

fn is(kind: &Value, document: &Value) -> bool {
    match kind.as_str() {
        Some("object") => document.is_object(),
        Some("array") => document.is_array(),
        Some("string") => document.is_string(),
        Some("integer") => document.is_u64() || document.is_i64(),
        Some("number") => document.is_number(),
        Some("boolean") => document.is_boolean(),
        Some("null") => document.is_null(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_named_with_its_place() {
        let schema = json!({"$defs": {
            "list": {"type": "array", "items": {"$ref": "#/$defs/pod"}},
            "pod": {"type": "object", "required": ["name"], "additionalProperties": false, "properties": {
                "name": {"type": "string"}, "ip": {"anyOf": [{"type": "string", "format": "ip"}, {"type": "null"}]},
                "count": {"type": "integer", "minimum": 0}, "state": {"enum": ["up"]},
                "more": {"type": "object", "additionalProperties": {"type": "number"}},
            }},
        }});
        let good = json!([{"name": "a", "ip": "10.0.0.1", "count": 0, "state": "up", "more": {"x": 1.5}}, {"name": "b", "ip": null}]);
        check(&schema, "list", &good).unwrap();
        for (bad, place) in [
            (json!({}), "{} is no \"array\""),
            (json!([{}]), "[0]: \"name\" is missing"),
            (json!([{"name": 1}]), "[0]: .name: 1 is no"),
            (json!([{"name": "a", "ip": "x"}]), ".ip: \"x\" is no ip"),
            (json!([{"name": "a", "count": -1}]), ".count: -1 is less"),
            (json!([{"name": "a", "count": 0.5}]), ".count: 0.5 is no"),
            (json!([{"name": "a", "state": "down"}]), ".state: \"down\" is none of"),
            (json!([{"name": "a", "more": {"x": "y"}}]), ".more: .x: \"y\" is no"),
            (json!([{"name": "a", "other": 1}]), ".other is not in the schema"),
        ] {
            let error = format!("{:#}", check(&schema, "list", &bad).unwrap_err());
            assert!(error.contains(place), "{error}");
        }
        assert!(check(&schema, "none", &good).is_err());
        assert!(check(&json!({"$defs": {"x": {"pattern": "y"}}}), "x", &good).is_err(), "an unknown keyword would check nothing");
    }
}
