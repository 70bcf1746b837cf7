//! A whole cluster in one call: a VPC, nodes, and a ready agent on each.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::Vpc;
use crate::agent::Agent;
use crate::node::Node;
use crate::pod::{Pod, PodSpec};
use crate::probe::{End, Matrix, PATIENCE, Protocol};
use crate::vpc::VpcBuilder;
use crate::wait::wait_for;

/// How long anything may take that is not the thing under test: tests run side by side on few cores.
pub const SOON: Duration = Duration::from_secs(40);

/// A VPC, its nodes, their agents and pods. Dropping it removes all of it.
#[derive(Debug)]
pub struct Cluster {
    agents: BTreeMap<String, Agent>,
    pods: BTreeMap<String, (Node, Pod)>,
    nodes: Vec<Node>,
    vpc: Vpc,
    settings: Vec<(String, String)>,
}

impl Cluster {
    /// Builds a VPC with a node `node1`, `node2` ... of each type, starts the agents with these settings, and waits until
    /// each is ready. Namespaces `x` and `y` exist, labelled `ns: <name>`.
    pub async fn start(types: &[&str], settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        Self::start_in(Vpc::builder(), types, settings).await
    }

    /// As [`Cluster::start`], in another VPC than the usual.
    pub async fn start_in(vpc: VpcBuilder, types: &[&str], settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut vpc = vpc.start().await?;
        for namespace in ["x", "y"] {
            vpc.manifests().namespace(namespace, &[("ns", namespace)])?;
        }
        let mut nodes = Vec::new();
        for (number, instance_type) in (1..).zip(types) {
            nodes.push(vpc.node(&format!("node{number}"), instance_type).await?);
        }
        let settings = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut cluster = Self { agents: BTreeMap::new(), pods: BTreeMap::new(), nodes, vpc, settings };
        for index in 0..types.len() {
            cluster.start_agent(index).await?;
        }
        Ok(cluster)
    }

    /// The VPC.
    pub fn vpc(&self) -> &Vpc {
        &self.vpc
    }

    /// A node, counted from 0.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// The agent of a node.
    pub fn agent(&mut self, index: usize) -> anyhow::Result<&mut Agent> {
        let name = self.nodes[index].name().to_owned();
        self.agents.get_mut(&name).with_context(|| format!("no agent was started on {name}"))
    }

    /// Starts the agent of a node and waits until it is ready.
    pub async fn start_agent(&mut self, index: usize) -> anyhow::Result<()> {
        let program = self.nodes[index].binaries().stanchion.clone();
        self.start_other_agent(index, &program).await
    }

    /// As [`Cluster::start_agent`], with the binary of another build.
    pub async fn start_other_agent(&mut self, index: usize, program: &Path) -> anyhow::Result<()> {
        let node = &self.nodes[index];
        let settings: Vec<(&str, &str)> = self.settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let mut agent = node.start_other_agent(program, &settings)?;
        node.ready(&mut agent, SOON).await?;
        self.agents.insert(node.name().to_owned(), agent);
        Ok(())
    }

    /// Starts a pod.
    pub async fn add_pod(&mut self, index: usize, spec: PodSpec) -> anyhow::Result<()> {
        let node = self.nodes[index].clone();
        let pod = node.add_pod(spec).await?;
        self.pods.insert(pod.name(), (node, pod));
        Ok(())
    }

    /// Deletes a pod.
    pub async fn delete_pod(&mut self, name: &str) -> anyhow::Result<()> {
        let (node, pod) = self.pods.remove(name).with_context(|| format!("no pod {name}"))?;
        node.delete_pod(pod).await
    }

    /// A pod by `namespace/name`.
    ///
    /// # Panics
    /// When there is none: a mistake of the test.
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods.get(name).map_or_else(|| panic!("no pod {name}"), |(_, pod)| pod)
    }

    /// A pod by `namespace/name`, to write its log.
    ///
    /// # Panics
    /// When there is none: a mistake of the test.
    pub fn pod_mut(&mut self, name: &str) -> &mut Pod {
        self.pods.get_mut(name).map_or_else(|| panic!("no pod {name}"), |(_, pod)| pod)
    }

    /// Every pod with its node.
    pub fn pods(&self) -> impl Iterator<Item = (&Node, &Pod)> {
        self.pods.values().map(|(node, pod)| (node, pod))
    }

    /// The names of all pods.
    pub fn pod_names(&self) -> Vec<String> {
        self.pods.keys().cloned().collect()
    }

    /// Who reaches whom now.
    pub async fn matrix(&self, protocol: Protocol, port: u16) -> anyhow::Result<Matrix> {
        let ends: Vec<End> = self.pods().map(|(_, pod)| pod.end()).collect();
        Matrix::probe(&ends, protocol, port, PATIENCE).await
    }

    /// Waits until exactly the connections work that should.
    pub async fn settles(&self, protocol: Protocol, port: u16, expected: impl Fn(&str, &str) -> bool) -> anyhow::Result<()> {
        wait_for(&format!("the expected {protocol:?}/{port} matrix"), SOON, || async {
            let wrong = self.matrix(protocol, port).await?.differences(&expected);
            anyhow::ensure!(wrong.is_empty(), "{}", wrong.join(", "));
            Ok(())
        })
        .await
    }

    /// Deletes every pod, and waits until no node has anything of one.
    ///
    /// # Errors
    /// A pod cannot be deleted, or something stays.
    pub async fn empty(&mut self) -> anyhow::Result<()> {
        for name in self.pod_names() {
            self.delete_pod(&name).await?;
        }
        wait_for("clean nodes", SOON, || async {
            let left = self.leftovers()?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .await
    }

    /// What each node still has of pods.
    pub fn leftovers(&self) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        for node in &self.nodes {
            found.extend(crate::leftovers::of_pods(node)?);
        }
        Ok(found)
    }
}
