//! What the rules of ClusterRoles and Roles allow, so that a test finds every request that they do not.

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::Value;

use super::path::Target;

/// A rule of a Role or ClusterRole.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PolicyRule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    resource_names: Vec<String>,
    verbs: Vec<String>,
}

/// Rules with the namespace they hold in; none for a ClusterRole.
#[derive(Clone, Debug, Default)]
pub struct Rules(Vec<(Option<String>, PolicyRule)>);

impl Rules {
    /// Every Role and ClusterRole of a manifest with several documents, as if all were bound.
    pub fn of_manifest(text: &str) -> anyhow::Result<Self> {
        let mut rules = Vec::new();
        for document in text.split("\n---") {
            let document: Value = serde_saphyr::from_str(document).context("a document of the manifest")?;
            let kind = document["kind"].as_str().unwrap_or_default();
            if !matches!(kind, "Role" | "ClusterRole") {
                continue;
            }
            let namespace = (kind == "Role").then(|| document["metadata"]["namespace"].as_str().unwrap_or_default().to_owned());
            let parsed: Vec<PolicyRule> = serde_json::from_value(document["rules"].clone()).context("rules")?;
            rules.extend(parsed.into_iter().map(|rule| (namespace.clone(), rule)));
        }
        anyhow::ensure!(!rules.is_empty(), "the manifest has no rules");
        Ok(Self(rules))
    }

    /// Whether a request is allowed; `name` is the object's, also where a list's field selector gives it.
    pub(super) fn allow(&self, verb: &str, target: &Target, name: Option<&str>) -> bool {
        self.0.iter().any(|(namespace, rule)| {
            let has = |list: &[String], wanted: &str| list.iter().any(|entry| entry == wanted || entry == "*");
            namespace.as_deref().is_none_or(|namespace| target.namespace.as_deref() == Some(namespace))
                && has(&rule.verbs, verb)
                && has(&rule.api_groups, &target.group)
                && has(&rule.resources, &target.resource())
                && (rule.resource_names.is_empty() || name.is_some_and(|name| has(&rule.resource_names, name)))
        })
    }
}
