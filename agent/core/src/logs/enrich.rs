//! Who wrote a line: the pod's and container's identity, from the file's name and the pod table.

use serde::Serialize;
use serde_json::{Map, Value};

use super::cri::Output;
use super::names::ContainerRef;
use crate::metrics::pods::workload;
use crate::objects::{Absent, ContainerStatus, Labels, Pod};

/// What is known of a container instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// From the names.
    pub names: ContainerRef,
    /// The pod's, if it was ever seen.
    pub pod: Option<PodIdentity>,
}

/// What the pod object adds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PodIdentity {
    /// Pod uid.
    pub uid: String,
    /// The node's name.
    pub host: String,
    /// The pod's address.
    pub ip: String,
    /// Name of what made it: its Deployment, DaemonSet, …; its own where nothing did.
    pub workload: String,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// Which of the two the pod does not have at all.
    #[serde(skip)]
    pub absent: Absent,
    /// `repo@sha256:…`.
    pub image_hash: String,
    /// The image as the runtime resolved it.
    pub image: String,
}

impl Identity {
    /// Joins names and pod; `None` for the pod leaves what the names say.
    pub fn new(names: &ContainerRef, pod: Option<&Pod>) -> Self {
        let Some(pod) = pod.filter(|pod| pod.is_known_as(&names.uid)) else { return Self { names: names.clone(), pod: None } };
        let status = status(pod, &names.container);
        let mut names = names.clone();
        names.uid.clone_from(&pod.metadata.uid);
        if names.id.is_empty() {
            names.id = status.map(|status| container_id(&status.container_id)).unwrap_or_default();
        }
        let text = |field: Option<&String>| field.cloned().unwrap_or_default();
        let known = PodIdentity {
            uid: pod.metadata.uid.clone(),
            host: pod.spec.node_name.clone(),
            ip: pod.status.pod_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            workload: workload(pod),
            labels: pod.metadata.labels.clone(),
            annotations: pod.metadata.annotations.clone(),
            absent: pod.metadata.absent,
            image_hash: status.map(|status| image_hash(&status.image_id)).unwrap_or_default(),
            image: text(status.map(|status| &status.image)),
        };
        Self { names, pod: Some(known) }
    }

    /// The value of Fluent Bit's member `kubernetes`.
    pub fn to_json(&self, labels: bool, annotations: bool) -> String {
        let mut members = Vec::new();
        let mut add = |name: &str, value: &str| {
            if !value.is_empty() {
                members.push((name.to_owned(), Value::from(value)));
            }
        };
        add("pod_name", &self.names.pod);
        add("namespace_name", &self.names.namespace);
        if let Some(pod) = &self.pod {
            add("pod_id", &pod.uid);
            add("host", &pod.host);
            add("pod_ip", &pod.ip);
        }
        add("container_name", &self.names.container);
        add("docker_id", &self.names.id);
        if let Some(pod) = &self.pod {
            add("container_hash", &pod.image_hash);
            add("container_image", &pod.image);
            let map = |labels: &Labels| {
                Value::Object(labels.iter().map(|(key, value)| (key.clone(), Value::from(value.as_str()))).collect::<Map<_, _>>())
            };
            let at = members.iter().position(|(name, _)| name == "host").unwrap_or(members.len());
            if annotations && !pod.absent.annotations {
                members.insert(at, ("annotations".to_owned(), map(&pod.annotations)));
            }
            if labels && !pod.absent.labels {
                members.insert(at, ("labels".to_owned(), map(&pod.labels)));
            }
        }
        let text: Vec<_> = members.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", text.join(","))
    }

    /// The annotation `fluentbit.io/<name>`, by Fluent Bit's precedence: `<name>_<output>-<container>`, `<name>-<container>`, `<name>`,
    /// `<name>_<output>`. It takes the first of those that name no container in the order of the names, as the API serves them.
    pub fn fluent_bit_annotation(&self, name: &str, output: Output) -> Option<&str> {
        let annotations = &self.pod.as_ref()?.annotations;
        let (output, container) = (output.name(), &self.names.container);
        [format!("{name}_{output}-{container}"), format!("{name}-{container}"), name.to_owned(), format!("{name}_{output}")]
            .iter()
            .find_map(|key| annotations.get(&format!("fluentbit.io/{key}")))
            .map(String::as_str)
    }

    /// The pod asks that the output is not shipped.
    pub fn is_excluded(&self, output: Output) -> bool {
        self.fluent_bit_annotation("exclude", output)
            .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "true" | "on" | "yes"))
    }
}

fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let all = pod.status.container_statuses.iter().chain(&pod.status.init_container_statuses);
    all.into_iter().find(|status| status.name == container)
}

/// `containerd://<id>` without the runtime.
fn container_id(text: &str) -> String {
    text.rsplit_once("://").map_or(text, |(_, id)| id).to_owned()
}

/// `docker-pullable://repo@sha256:…` without the scheme. Nothing where there is no digest at all, as with Fluent Bit.
fn image_hash(image_id: &str) -> String {
    let without_scheme = image_id.split_once("://").filter(|(scheme, _)| !scheme.contains(':')).map(|(_, rest)| rest);
    without_scheme.or(image_id.contains(':').then_some(image_id)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::names::parse_flat;

    #[test]
    fn a_pod_without_labels_has_none_and_one_with_an_empty_map_has_that() {
        let names = parse_flat(&format!("web_shop_app-{:064x}.log", 7)).unwrap();
        for (metadata, labels, annotations) in [
            (r#"{"name":"web","namespace":"shop"}"#, false, false),
            (r#"{"name":"web","namespace":"shop","labels":null,"annotations":{}}"#, false, true),
            (r#"{"name":"web","namespace":"shop","labels":{"a":"b"}}"#, true, false),
        ] {
            let pod: Pod = serde_json::from_str(&format!("{{\"metadata\":{metadata}}}")).unwrap();
            let record: Value = serde_json::from_str(&Identity::new(&names, Some(&pod)).to_json(true, true)).unwrap();
            assert_eq!((record.get("labels").is_some(), record.get("annotations").is_some()), (labels, annotations), "{metadata}");
        }
    }

    #[test]
    fn the_image_is_told_by_its_digest_alone() {
        for (image_id, hash) in [
            ("docker-pullable://repo/web@sha256:ab", "repo/web@sha256:ab"),
            ("public.ecr.aws/x/web@sha256:ab", "public.ecr.aws/x/web@sha256:ab"),
            ("registry:5000/web@sha256:ab", "registry:5000/web@sha256:ab"),
            ("sha256:ab", "sha256:ab"),
            ("0123abcd", ""),
            ("", ""),
        ] {
            assert_eq!(image_hash(image_id), hash, "{image_id}");
        }
    }

    #[test]
    fn which_annotation_counts() {
        let names = parse_flat(&format!("web_shop_app-{:064x}.log", 7)).unwrap();
        for (annotations, stdout, stderr) in [
            (r#"{"fluentbit.io/exclude":"true"}"#, true, true),
            (r#"{"fluentbit.io/exclude_stderr":"On"}"#, false, true),
            (r#"{"fluentbit.io/exclude":"false","fluentbit.io/exclude_stderr":"true"}"#, false, false),
            (r#"{"fluentbit.io/exclude":"true","fluentbit.io/exclude-app":"false"}"#, false, false),
            (r#"{"fluentbit.io/exclude-app":"false","fluentbit.io/exclude_stdout-app":"yes"}"#, true, false),
            (r#"{"fluentbit.io/exclude-other":"true","fluentbit.io/exclude_stdout-other":"true"}"#, false, false),
            (r#"{"fluentbit.io/exclude":"1"}"#, false, false),
        ] {
            let pod: Pod =
                serde_json::from_str(&format!(r#"{{"metadata":{{"name":"web","namespace":"shop","annotations":{annotations}}}}}"#))
                    .unwrap();
            let identity = Identity::new(&names, Some(&pod));
            assert_eq!((identity.is_excluded(Output::Stdout), identity.is_excluded(Output::Stderr)), (stdout, stderr), "{annotations}");
        }
    }
}
