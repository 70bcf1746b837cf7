//! The cluster's state as the agent reads it with `--manifests`: a directory that the lab writes as an API server would
//! show it.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use crate::fake_kube::FakeKube;

/// The directory; a file an object, each replaced at once.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// Shows the same objects, where it is asked for.
    api: Arc<OnceLock<Api>>,
}

struct Api(FakeKube);

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

/// Where an API server has the objects of a kind; `None` for kinds that the lab's server does not show.
fn collection(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Pod" => "/api/v1/pods",
        "Node" => "/api/v1/nodes",
        "Namespace" => "/api/v1/namespaces",
        "NetworkPolicy" => "/apis/networking.k8s.io/v1/networkpolicies",
        _ => return None,
    })
}

/// Collections that are there and empty.
const EMPTY: [&str; 4] =
    ["/api/v1/configmaps", "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices", "/apis/events.k8s.io/v1/events"];

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
        Ok(Self { dir, api: Arc::default() })
    }

    /// An API server that shows what the directory has, from now on and as it changes: a file an object.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn api(&self) -> io::Result<FakeKube> {
        if let Some(Api(kube)) = self.api.get() {
            return Ok(kube.clone());
        }
        let kube = FakeKube::default();
        for name in EMPTY.into_iter().chain(["Pod", "Node", "Namespace", "NetworkPolicy"].into_iter().filter_map(collection)) {
            kube.serve_collection(name);
        }
        for entry in fs::read_dir(&self.dir)? {
            show(&kube, &fs::read_to_string(entry?.path())?)?;
        }
        Ok(self.api.get_or_init(|| Api(kube)).0.clone())
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
        let path = self.dir.join(file);
        if let Some(Api(kube)) = self.api.get() {
            let object: Value = parsed(&fs::read_to_string(&path)?)?;
            if let Some(collection) = object["kind"].as_str().and_then(collection) {
                let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
                kube.delete(collection, &format!("{}/{}", part("namespace"), part("name")));
            }
        }
        fs::remove_file(path)
    }

    fn pod_file(namespace: &str, name: &str) -> String {
        format!("pod-{namespace}-{name}.json")
    }

    /// A reader sees the old text or the new one.
    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let temporary = self.dir.join(format!(".{file}.new"));
        fs::write(&temporary, text)?;
        fs::rename(temporary, self.dir.join(file))?;
        match self.api.get() {
            Some(Api(kube)) => show(kube, text),
            None => Ok(()),
        }
    }
}

fn parsed(text: &str) -> io::Result<Value> {
    serde_saphyr::from_str(text).map_err(io::Error::other)
}

fn show(kube: &FakeKube, text: &str) -> io::Result<()> {
    let object = parsed(text)?;
    if let Some(collection) = object["kind"].as_str().and_then(collection) {
        kube.put(collection, object);
    }
    Ok(())
}
