//! What the plugin does with the agent and the node: the same calls in the same order, undoing, and the spool.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::net::if_::{if_nameindex, if_nametoindex};
use stanchion_core::cni::Spooled;
use stanchion_core::ids::PodName;
use stanchion_core::network::host_veth_name;
use stanchion_daemon::cni::CniService;
use stanchion_proto as wire;
use stanchion_proto::cni_server::Cni as _;
use tonic::Request;

const NETWORK: &str = "aws-cni";

/// A pod's sandbox.
#[derive(Clone, Debug)]
pub(super) struct Sandbox {
    pub(super) pod: PodName,
    pub(super) link: String,
    container: String,
}

impl Sandbox {
    pub(super) fn new(pod: &PodName, number: u32) -> Self {
        Self { pod: pod.clone(), link: host_veth_name("eni", pod, 0), container: format!("{number:064x}") }
    }

    fn wire(&self) -> wire::Sandbox {
        wire::Sandbox {
            network_name: NETWORK.to_owned(),
            container_id: self.container.clone(),
            if_name: "eth0".to_owned(),
            pod_namespace: self.pod.namespace.clone(),
            pod_name: self.pod.name.clone(),
            pod_uid: String::new(),
            netns: String::new(),
        }
    }
}

/// The plugin; `None`: nobody listens on the agent's socket.
#[derive(Clone)]
pub(super) struct Plugin {
    pub(super) service: Option<CniService>,
    pub(super) spool: PathBuf,
}

impl Plugin {
    /// ADD; a step that fails undoes those before it.
    pub(super) async fn add(&self, sandbox: &Sandbox, wait: Duration) -> anyhow::Result<Ipv4Addr> {
        let added = self.try_add(sandbox, wait).await;
        if added.is_err() {
            self.del(sandbox, "SetupNSFailed").await;
        }
        added
    }

    async fn try_add(&self, sandbox: &Sandbox, wait: Duration) -> anyhow::Result<Ipv4Addr> {
        let service = self.service.as_ref().context("the agent does not answer")?;
        let request = wire::AddNetworkRequest {
            sandbox: Some(sandbox.wire()),
            wait_ms: u32::try_from(wait.as_millis())?,
            ..wire::AddNetworkRequest::default()
        };
        let reply = service.add_network(Request::new(request)).await?.into_inner();
        let address: Ipv4Addr = reply.attachments.first().context("no address in the reply")?.ipv4.parse()?;
        // Down until its policy is in force. The pod's end stays in the same namespace: nothing is sent.
        let peer = sandbox.link.replacen("eni", "pod", 1);
        link(&["add", &sandbox.link, "type", "veth", "peer", "name", &peer])?;
        let endpoint = wire::Endpoint {
            host_if_name: sandbox.link.clone(),
            host_if_index: if_nametoindex(sandbox.link.as_str())?,
            ipv4: address.to_string(),
            ..wire::Endpoint::default()
        };
        let request = wire::ActivateEndpointRequest {
            sandbox: Some(sandbox.wire()),
            endpoints: vec![endpoint],
            ..wire::ActivateEndpointRequest::default()
        };
        service.activate_endpoint(Request::new(request)).await?;
        link(&["set", &sandbox.link, "up"])?;
        ip(&["route", "add", &address.to_string(), "dev", &sandbox.link])?;
        Ok(address)
    }

    /// GC: the runtime names the sandboxes that live. How many attachments were released.
    pub(super) async fn collect_garbage<'a>(&self, living: impl Iterator<Item = &'a Sandbox>) -> anyhow::Result<u32> {
        let service = self.service.as_ref().context("the agent does not answer")?;
        let attachment = |sandbox: &Sandbox| wire::ValidAttachment { container_id: sandbox.container.clone(), if_name: "eth0".to_owned() };
        let request = wire::CollectGarbageRequest { network_name: NETWORK.to_owned(), valid: living.map(attachment).collect() };
        Ok(service.collect_garbage(Request::new(request)).await?.into_inner().released)
    }

    /// DEL; never fails because the agent is away: what it was not told is left in the spool.
    pub(super) async fn del(&self, sandbox: &Sandbox, reason: &str) {
        remove_link(&sandbox.link);
        let request =
            wire::DelNetworkRequest { sandbox: Some(sandbox.wire()), reason: reason.to_owned(), ..wire::DelNetworkRequest::default() };
        let told = match &self.service {
            Some(service) => service.del_network(Request::new(request)).await.is_ok(),
            None => false,
        };
        if !told {
            let left = Spooled {
                version: 1,
                network_name: NETWORK.to_owned(),
                container_id: sandbox.container.clone(),
                if_name: "eth0".to_owned(),
                pod_namespace: sandbox.pod.namespace.clone(),
                pod_name: sandbox.pod.name.clone(),
                reason: reason.to_owned(),
            };
            let text = serde_json::to_vec(&left).expect("strings are JSON");
            std::fs::write(self.spool.join(left.file_name()), text).expect("the spool can be written");
        }
    }
}

fn link(args: &[&str]) -> anyhow::Result<()> {
    ip(&[&["link"], args].concat())
}

/// `ip`, in this thread's namespace.
fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("run ip")?;
    ensure!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A link that may be gone.
pub(super) fn remove_link(name: &str) {
    if if_nametoindex(name).is_ok() {
        // It goes with the world at the latest, and a check finds it before.
        let _ = link(&["delete", name]);
    }
}

/// Names of the namespace's links.
pub(super) fn links() -> anyhow::Result<Vec<String>> {
    let all = if_nameindex().context("list interfaces")?;
    Ok(all.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect())
}
