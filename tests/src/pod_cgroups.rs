//! Real cgroups of pods that do not exist, under a directory of our own, seen through a private cgroup root: no agent of the
//! same machine mistakes them for its node's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stanchion_core::cluster::ClusterState;
use stanchion_core::objects::{Container, ContainerStatus, Node, Pod, Quantity};

/// Controllers in which pods get directories: v1 trees, or the one v2 tree.
const V1_TREES: [&str; 2] = ["memory", "cpuacct"];

/// Pods' cgroups, removed on drop.
#[derive(Debug)]
pub struct PodCgroups {
    /// What the agent gets as `--cgroup-root`.
    pub root: tempfile::TempDir,
    trees: Vec<PathBuf>,
    made: Vec<PathBuf>,
    /// The pods as the API server shows them, bound to `node`.
    pub pods: Vec<Pod>,
    node: String,
}

impl PodCgroups {
    /// Cgroups of `pods` pods with `containers` containers each, cgroupfs driver, burstable.
    ///
    /// # Errors
    /// When cgroups cannot be made: not root, or the tree is mounted elsewhere.
    pub fn make(node: &str, pods: usize, containers: usize) -> io::Result<Self> {
        let mut out = Self::empty(node)?;
        for index in 0..pods {
            out.add_pod(index, containers)?;
        }
        Ok(out)
    }

    /// As [`PodCgroups::make`], but processor time is told by the v2 tree also where v1 has its controller: every v2 cgroup has the
    /// file for it.
    ///
    /// # Errors
    /// As [`PodCgroups::make`]; also when no v2 tree is mounted.
    pub fn make_with_v2_cpu(node: &str, pods: usize, containers: usize) -> io::Result<Self> {
        let mut out = Self::of_trees(node, &["memory", "unified"])?;
        for index in 0..pods {
            out.add_pod(index, containers)?;
        }
        Ok(out)
    }

    /// The tree, without pods.
    ///
    /// # Errors
    /// As [`PodCgroups::make`].
    pub fn empty(node: &str) -> io::Result<Self> {
        Self::of_trees(node, &V1_TREES)
    }

    fn of_trees(node: &str, hybrid: &[&str]) -> io::Result<Self> {
        let root = tempfile::tempdir()?;
        let name =
            format!("stmetrics-{}-{}", std::process::id(), root.path().file_name().and_then(|name| name.to_str()).unwrap_or_default());
        let mut out = Self { root, trees: Vec::new(), made: Vec::new(), pods: Vec::new(), node: node.to_owned() };
        let host = Path::new("/sys/fs/cgroup");
        if host.join("cgroup.controllers").exists() {
            let tree = host.join(&name);
            out.directory(&tree)?;
            // The root is the tree itself: links cannot replace a directory that is there already.
            std::os::unix::fs::symlink(&tree, out.root.path().join("unified"))?;
            out.trees.push(tree);
        } else {
            for controller in hybrid {
                let tree = host.join(controller).join(&name);
                out.directory(&tree)?;
                std::os::unix::fs::symlink(&tree, out.root.path().join(controller))?;
                out.trees.push(tree);
            }
        }
        Ok(out)
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)?;
        self.made.push(path.to_owned());
        // v2: children get controllers only where the parent passes them on; v1 has no such file.
        if let Ok(there) = fs::read_to_string(path.join("cgroup.controllers")) {
            let wanted = ["cpu", "memory"].into_iter().filter(|wanted| there.split_whitespace().any(|there| there == *wanted));
            let on: String = wanted.map(|controller| format!("+{controller} ")).collect();
            fs::write(path.join("cgroup.subtree_control"), on.trim_end())?;
        }
        Ok(())
    }

    fn add_pod(&mut self, index: usize, containers: usize) -> io::Result<()> {
        let uid = format!("{index:08x}-0000-4000-8000-000000000000");
        let ids: Vec<String> = (0..containers).map(|container| format!("{:064x}", index * 1000 + container + 1)).collect();
        self.add(&uid, &ids)?;
        let mut pod = Pod::default();
        pod.metadata.name = format!("pod-{index}");
        pod.metadata.namespace = "default".into();
        pod.metadata.uid = uid;
        pod.metadata.labels.insert("app".into(), format!("app-{}", index % 20));
        pod.spec.node_name = self.node.clone();
        pod.status.phase = "Running".into();
        for (number, id) in ids.iter().enumerate() {
            let mut container = Container { name: format!("c{number}"), ..Container::default() };
            container.resources.limits.insert("cpu".into(), Quantity("2".into()));
            container.resources.limits.insert("memory".into(), Quantity("1Gi".into()));
            pod.spec.containers.push(container);
            let mut status =
                ContainerStatus { name: format!("c{number}"), container_id: format!("containerd://{id}"), ..Default::default() };
            status.state.insert("running".into(), serde_json::json!({}));
            pod.status.container_statuses.push(status);
        }
        self.pods.push(pod);
        Ok(())
    }

    /// Cgroups of a pod and its containers, by uid and runtime ids.
    ///
    /// # Errors
    /// As [`PodCgroups::make`].
    pub fn add(&mut self, uid: &str, ids: &[String]) -> io::Result<()> {
        for tree in self.trees.clone() {
            for parent in [tree.join("kubepods"), tree.join("kubepods/burstable")] {
                if !parent.exists() {
                    self.directory(&parent)?;
                }
            }
            let pod = tree.join("kubepods/burstable").join(format!("pod{uid}"));
            self.directory(&pod)?;
            for id in ids {
                let container = pod.join(id);
                fs::create_dir(&container)?;
                self.made.push(container);
            }
        }
        Ok(())
    }

    /// A container ends and another of the pod, with this runtime id, takes its place.
    ///
    /// # Errors
    /// As [`PodCgroups::make`]; also while a process is in the container's cgroups.
    pub fn replace(&mut self, pod: usize, container: usize, id: &str) -> io::Result<()> {
        for gone in self.container(pod, container) {
            fs::remove_dir(&gone)?;
            self.made.retain(|made| *made != gone);
            let new = gone.with_file_name(id);
            fs::create_dir(&new)?;
            self.made.push(new);
        }
        self.pods[pod].status.container_statuses[container].container_id = format!("containerd://{id}");
        Ok(())
    }

    /// The cluster's state with these pods.
    pub fn cluster(&self) -> ClusterState {
        let mut state = ClusterState { synced: true, ..ClusterState::default() };
        for pod in &self.pods {
            state.pods.insert(pod.full_name(), Arc::new(pod.clone()));
        }
        let mut node = Node::default();
        node.metadata.name = self.node.clone();
        state.nodes.insert(self.node.clone(), Arc::new(node));
        state
    }

    /// Moves a process into a container's cgroups.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self, pod: usize, container: usize, process: u32) -> io::Result<()> {
        for directory in self.container(pod, container) {
            fs::write(directory.join("cgroup.procs"), process.to_string())?;
        }
        Ok(())
    }

    /// A container's directory in each tree: memory first where there are several.
    pub fn container(&self, pod: usize, container: usize) -> Vec<PathBuf> {
        let uid = &self.pods[pod].metadata.uid;
        let id = self.pods[pod].status.container_statuses[container].container_id.trim_start_matches("containerd://");
        self.trees.iter().map(|tree| tree.join(format!("kubepods/burstable/pod{uid}/{id}"))).collect()
    }
}

impl Drop for PodCgroups {
    fn drop(&mut self) {
        for directory in self.made.iter().rev() {
            if let Err(error) = fs::remove_dir(directory) {
                eprintln!("{} stays behind: {error}", directory.display());
            }
        }
    }
}
