//! What a URL of the Kubernetes API names.

/// A collection or an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// `/api/v1` or `/apis/group/version`.
    base: String,
    pub(super) group: String,
    pub(super) namespace: Option<String>,
    plural: String,
    pub(super) name: Option<String>,
    subresource: Option<String>,
}

impl Target {
    pub(super) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (base, group, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => (format!("/api/{version}"), String::new(), rest),
            ["apis", group, version, rest @ ..] => (format!("/apis/{group}/{version}"), (*group).to_owned(), rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let owned = |index: usize| rest.get(index).map(|part| (*part).to_owned());
        Some(Self { base, group, namespace, plural: owned(0)?, name: owned(1), subresource: owned(2) })
    }

    /// The cluster-wide collection: `/api/v1/pods`.
    pub(super) fn collection(&self) -> String {
        format!("{}/{}", self.base, self.plural)
    }

    /// As RBAC calls it: `pods`, `pods/status`.
    pub(super) fn resource(&self) -> String {
        match &self.subresource {
            Some(sub) => format!("{}/{sub}", self.plural),
            None => self.plural.clone(),
        }
    }

    /// `namespace/name`.
    pub(super) fn key(&self) -> Option<String> {
        Some(format!("{}/{}", self.namespace.as_deref().unwrap_or_default(), self.name.as_deref()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let target = Target::parse("/api/v1/namespaces/x/pods/a/status").unwrap();
        assert_eq!(
            (target.collection().as_str(), target.key().as_deref(), target.resource().as_str()),
            ("/api/v1/pods", Some("x/a"), "pods/status")
        );
        let target = Target::parse("/api/v1/namespaces/x").unwrap();
        assert_eq!((target.collection().as_str(), target.key().as_deref()), ("/api/v1/namespaces", Some("/x")));
        let target = Target::parse("/apis/events.k8s.io/v1/namespaces/x/events").unwrap();
        assert_eq!((target.group.as_str(), target.namespace.as_deref(), target.name), ("events.k8s.io", Some("x"), None));
        assert_eq!(Target::parse("/version"), None);
    }
}
