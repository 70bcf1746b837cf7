//! What can be looked at, as JSON documents: gRPC, HTTP and the support bundle show the same ones.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stanchion_core::config::Config;
use stanchion_core::ids::ContainerId;
use stanchion_core::ipam::IpamKey;

use super::introspection;
use crate::cluster::ClusterHandle;
use crate::ipamd::IpamHandle;
use crate::logs::LogsHandle;
use crate::netpol::flow_log::FlowLog;
use crate::netpol::{NetpolHandle, NetpolSnapshot};
use crate::telemetry::{Sources, TelemetryHandle, render};
use stanchion_core::metrics::exposition::Format;

/// The running parts; a part whose role is not run here is absent.
pub struct Views {
    /// The version of the binary.
    pub version: &'static str,
    /// When the process started, milliseconds since 1970.
    pub started_ms: i64,
    /// This node.
    pub node_name: String,
    /// `network`, `telemetry`.
    pub roles: Vec<String>,
    /// Settings with origins.
    pub config: Arc<Config>,
    /// The cluster's state.
    pub cluster: ClusterHandle,
    /// Addresses.
    pub ipam: Option<IpamHandle>,
    /// Policy.
    pub netpol: Option<NetpolHandle>,
    /// The log of judged flows.
    pub flow_log: Option<FlowLog>,
    /// Logs.
    pub logs: Option<LogsHandle>,
    /// Metrics.
    pub telemetry: Option<TelemetryHandle>,
}

fn value(part: impl serde::Serialize) -> Value {
    serde_json::to_value(part).unwrap_or_else(|error| json!({"error": format!("cannot be shown: {error}")}))
}

impl Views {
    /// The whole agent on a page.
    pub async fn status(&self) -> Value {
        let cluster = self.cluster.latest();
        let ipam = self.ipam.as_ref().map(|ipam| {
            let snapshot = ipam.snapshot();
            json!({
                "ready": snapshot.status.ready, "reason": snapshot.status.reason, "instance": snapshot.instance,
                "instance_type": snapshot.instance_type, "mode": snapshot.mode, "max_pods": snapshot.max_pods,
                "max_enis": snapshot.max_enis, "enis": snapshot.enis.len(), "pools": snapshot.pools,
                "waiting": snapshot.waiting, "recent_errors": snapshot.recent_errors,
            })
        });
        let netpol = match &self.netpol {
            Some(netpol) => {
                let snapshot = netpol.snapshot().await;
                let isolated = snapshot.endpoints.iter().filter(|e| e.ingress_isolated || e.egress_isolated).count();
                Some(json!({
                    "ready": snapshot.ready, "reason": snapshot.reason, "endpoints": snapshot.endpoints.len(), "isolated": isolated,
                    "flows": snapshot.flows, "flow_capacity": snapshot.flow_capacity, "alarms": snapshot.alarms, "last_error": snapshot.last_error,
                }))
            }
            None => None,
        };
        json!({
            "version": self.version, "node": self.node_name, "roles": self.roles, "started_ms": self.started_ms,
            "cluster": {
                "synced": cluster.synced, "node_known": cluster.nodes.contains_key(&self.node_name), "pods": cluster.pods.len(), "namespaces": cluster.namespaces.len(),
                "network_policies": cluster.network_policies.len(), "trouble": cluster.trouble,
            },
            "ipam": ipam, "policy": netpol, "flow_log": self.flow_log.as_ref().map(|log| value(log.counters())),
            "logs": self.logs.as_ref().map(|logs| value(logs.counters())),
            "telemetry": self.telemetry.as_ref().map(|telemetry| {
                let shipped = telemetry.shipped();
                let count = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
                json!({"last_tick_ms": telemetry.snapshot().wall_ms, "documents_sent": count(&shipped.sent), "documents_dropped": count(&shipped.dropped)})
            }),
        })
    }

    /// ENIs with their addresses, and the pool's numbers; `None` without the network role.
    pub fn enis(&self) -> Option<Value> {
        self.ipam.as_ref().map(|ipam| value(&*ipam.snapshot()))
    }

    /// The same in aws-node's shape.
    pub fn aws_enis(&self) -> Option<Value> {
        self.ipam.as_ref().map(|ipam| introspection::enis(&ipam.snapshot()))
    }

    /// Whether a pod could be connected now.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), String> {
        let Some(ipam) = &self.ipam else { return Ok(()) };
        let status = ipam.status();
        if status.ready { Ok(()) } else { Err(status.reason) }
    }

    /// Whether the tasks that pods depend on still answer. A task that is still starting waits for others (IMDS): starting
    /// it anew would not help.
    ///
    /// # Errors
    /// Which one does not.
    pub async fn alive(&self) -> Result<(), String> {
        const WITHIN: Duration = Duration::from_secs(5);
        if self.ipam.as_ref().is_some_and(IpamHandle::has_ended) {
            return Err("address management has ended".to_owned());
        }
        if let Some(ipam) = self.ipam.as_ref().filter(|ipam| !ipam.snapshot().instance.as_str().is_empty()) {
            let nobody = IpamKey { network_name: String::new(), container_id: ContainerId::new(""), if_name: String::new() };
            tokio::time::timeout(WITHIN, ipam.lookup(nobody)).await.map_err(|_| "address management does not answer".to_owned())?.ok();
        }
        if let Some(netpol) = &self.netpol {
            tokio::time::timeout(WITHIN, netpol.snapshot()).await.map_err(|_| "network policy does not answer".to_owned())?;
            if netpol.has_ended() {
                return Err("network policy has ended".to_owned());
            }
        }
        Ok(())
    }

    /// `/v1/networkutils-env-settings`.
    pub fn network_settings(&self) -> Value {
        introspection::network_settings(&self.config.render())
    }

    /// `/v1/ipamd-env-settings`.
    pub fn ipamd_settings(&self) -> Value {
        introspection::ipamd_settings(&self.config.render())
    }

    /// Policed pods; `None` without the network role.
    pub async fn endpoints(&self) -> Option<Value> {
        Some(value(&*self.netpol_snapshot().await?))
    }

    /// Flows that are open.
    pub async fn conntrack(&self) -> Option<Value> {
        Some(json!({"flows": self.netpol.as_ref()?.conntrack().await}))
    }

    async fn netpol_snapshot(&self) -> Option<Arc<NetpolSnapshot>> {
        Some(self.netpol.as_ref()?.snapshot().await)
    }

    /// Policies that select pods of this node, and each pod's state.
    pub async fn policy(&self, pod: &str) -> Option<Value> {
        let snapshot = self.netpol_snapshot().await?;
        let endpoints: Vec<Value> = snapshot
            .endpoints
            .iter()
            .filter(|endpoint| pod.is_empty() || endpoint.pod.to_string() == pod)
            .map(|endpoint| json!({"endpoint": endpoint, "policies": endpoint.policies}))
            .collect();
        Some(json!({"ready": snapshot.ready, "reason": snapshot.reason, "problems": snapshot.problems, "endpoints": endpoints}))
    }

    /// Tailed files; `None` without the telemetry role.
    pub async fn logs(&self) -> Option<Value> {
        let logs = self.logs.as_ref()?;
        let snapshot = logs.snapshot().await.unwrap_or_default();
        Some(json!({"totals": logs.counters(), "files": snapshot.files}))
    }

    /// The latest tick; `None` without the telemetry role.
    pub fn latest_metrics(&self) -> Option<Value> {
        self.telemetry.as_ref().map(|telemetry| value(&*telemetry.snapshot()))
    }

    /// ENIConfigs that are known.
    pub fn eni_configs(&self) -> Option<Value> {
        let cluster = self.cluster.latest();
        self.ipam.as_ref().map(|_| value(cluster.eni_configs.values().map(|config| &**config).collect::<Vec<_>>()))
    }

    /// Every setting with its origin.
    pub fn config(&self) -> Value {
        value(self.config.render())
    }

    /// Prometheus text.
    pub async fn metrics_text(&self, format: Format) -> String {
        let netpol = self.netpol_snapshot().await;
        let ipam = self.ipam.as_ref().map(IpamHandle::snapshot);
        let logs = match &self.logs {
            Some(logs) => logs.snapshot().await,
            None => None,
        };
        let sources = Sources {
            ipam: ipam.as_deref(),
            netpol: netpol.as_deref(),
            flow_log: self.flow_log.as_ref().map(FlowLog::counters),
            logs: logs.as_ref(),
            telemetry: self.telemetry.as_ref(),
            version: self.version,
            node_and_containers: self.config.telemetry.node_metrics,
        };
        render(&sources, format)
    }
}

#[cfg(test)]
mod tests {
    use stanchion_core::cluster::ClusterState;

    use super::*;
    use crate::ipamd::IpamSnapshot;

    #[tokio::test]
    async fn an_agent_without_one_of_its_actors_is_not_alive() {
        let views = |ipam, netpol| Views {
            version: "0",
            started_ms: 0,
            node_name: "n".to_owned(),
            roles: Vec::new(),
            config: Arc::new(Config::read(&|_| None).unwrap()),
            cluster: ClusterHandle::fixed(ClusterState::default()),
            ipam,
            netpol,
            flow_log: None,
            logs: None,
            telemetry: None,
        };
        assert_eq!(views(None, None).alive().await, Ok(()));
        // While it starts, and afterwards.
        for instance in ["", "i-1"] {
            let ipam = IpamHandle::fixed(IpamSnapshot { instance: instance.into(), ..IpamSnapshot::default() });
            assert_eq!(views(Some(ipam), None).alive().await, Err("address management has ended".to_owned()));
        }
        assert_eq!(views(None, Some(NetpolHandle::of_nobody())).alive().await, Err("network policy has ended".to_owned()));
    }
}
