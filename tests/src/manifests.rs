//! The cluster's state as the agent reads it with `--manifests`: a directory that the lab writes as an API server would
//! show it.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The directory; a file an object, each replaced at once.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
}

/// A container as a pod's spec lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// Named TCP ports.
    pub ports: Vec<(String, u16)>,
    /// Limits of resources.
    pub limits: Vec<(String, String)>,
}

/// A pod as the API server shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodManifest {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Where it was scheduled.
    pub node: String,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Annotations.
    pub annotations: Vec<(String, String)>,
    /// Containers.
    pub containers: Vec<ContainerSpec>,
    /// Empty while pending.
    pub ips: Vec<IpAddr>,
}

impl Manifests {
    /// Makes the directory.
    pub fn create(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a namespace.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> io::Result<()> {
        let labels: serde_json::Map<String, Value> = labels.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.write(&format!("namespace-{name}.json"), &object.to_string())
    }

    /// Writes a node.
    pub fn node(&self, name: &str, address: IpAddr, instance_type: &str) -> io::Result<()> {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "node.kubernetes.io/instance-type": instance_type}},
            "status": {
                "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        self.write(&format!("node-{name}.json"), &object.to_string())
    }

    /// Writes a pod.
    pub fn pod(&self, pod: &PodManifest) -> io::Result<()> {
        let map =
            |pairs: &[(String, String)]| -> serde_json::Map<String, Value> { pairs.iter().map(|(k, v)| (k.clone(), json!(v))).collect() };
        let (labels, annotations) = (map(&pod.labels), map(&pod.annotations));
        let containers: Vec<Value> = pod
            .containers
            .iter()
            .map(|container| {
                let port = |(name, port): &(String, u16)| json!({"name": name, "containerPort": port, "protocol": "TCP"});
                let ports: Vec<Value> = container.ports.iter().map(port).collect();
                json!({"name": container.name, "image": container.image, "ports": ports, "resources": {"limits": map(&container.limits)}})
            })
            .collect();
        let mut status = json!({"phase": if pod.ips.is_empty() { "Pending" } else { "Running" }});
        if let Some(first) = pod.ips.first() {
            status["podIP"] = json!(first);
            status["podIPs"] = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
        }
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid, "labels": labels, "annotations": annotations},
            "spec": {"nodeName": pod.node, "containers": containers},
            "status": status,
        });
        self.write(&Self::pod_file(&pod.namespace, &pod.name), &object.to_string())
    }

    /// Deletes a pod.
    pub fn delete_pod(&self, namespace: &str, name: &str) -> io::Result<()> {
        self.delete(&Self::pod_file(namespace, name))
    }

    /// Writes any manifest under a name of your choice.
    pub fn apply(&self, file: &str, text: &str) -> io::Result<()> {
        self.write(file, text)
    }

    /// Removes a file.
    pub fn delete(&self, file: &str) -> io::Result<()> {
        fs::remove_file(self.dir.join(file))
    }

    fn pod_file(namespace: &str, name: &str) -> String {
        format!("pod-{namespace}-{name}.json")
    }

    /// A reader sees the old text or the new one.
    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let temporary = self.dir.join(format!(".{file}.new"));
        fs::write(&temporary, text)?;
        fs::rename(temporary, self.dir.join(file))
    }
}
