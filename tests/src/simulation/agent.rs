//! The agent's parts, as the binary puts them together.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_core::metrics::insights::NodeIdentity;
use stanchion_core::policy::engine::Source;
use stanchion_daemon::cni::{self, AdoptParts, CniService, CniSettings, Told};
use stanchion_daemon::ipamd::{self, IpamHandle, IpamdParts};
use stanchion_daemon::logs::{self, LogsHandle, LogsParts};
use stanchion_daemon::netpol::{self, AttachMode, EnforcingMode, NetpolHandle, NetpolParts};
use stanchion_daemon::telemetry::{self, Extras, Roots, TelemetryHandle, TelemetryParts, TelemetrySettings};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Ground, MINUTE};
use crate::fake_aws::{DirectEc2, DirectImds, DirectLogs};
use crate::node::CLUSTER_NAME;
use crate::wall;

/// aws-node's checkpoint, and what it has no room for.
pub(super) const CHECKPOINT: &str = "ipam.json";
pub(super) const COOLING: &str = "stanchion-cooling.json";
/// The slots of policed pods.
pub(super) const ENDPOINTS: &str = "endpoints.json";
/// Of every call to AWS.
const LATENCY: Duration = Duration::from_millis(100);
/// How long a pod waits for its object and policies.
const SYNC_WAIT: Duration = Duration::from_secs(5);
/// Ticks read the machine's own files: seldom enough that hours of them cost seconds.
const METRICS_EVERY: Duration = Duration::from_secs(300);

/// One life of the daemon.
pub(super) struct Agent {
    pub(super) ipam: IpamHandle,
    pub(super) netpol: NetpolHandle,
    pub(super) logs: LogsHandle,
    pub(super) telemetry: TelemetryHandle,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    adoption: AbortOnDrop<()>,
    shutdown: CancellationToken,
}

impl Agent {
    pub(super) fn start(ground: &Ground) -> anyhow::Result<Self> {
        let shutdown = CancellationToken::new();
        let state_dir = ground.dir("state");
        let (netpol, policy) = netpol::spawn(NetpolParts {
            loaded: netpol::load(&ground.load_options())?,
            attach: AttachMode::Clsact,
            cluster: ground.cluster.clone(),
            node_name: ground.node().to_owned(),
            source: Source::Policies,
            mode: EnforcingMode::Strict,
            annotated_pods: false,
            sync_wait: SYNC_WAIT,
            pod_flows: ground.load_options().flow_entries,
            flow_capacity: ground.load_options().flow_entries,
            state_dir: state_dir.clone(),
            shutdown: shutdown.clone(),
        })?;
        let interfaces: BTreeSet<String> = super::plugin::links()?.into_iter().collect();
        let (ipam, addresses) = ipamd::spawn(IpamdParts {
            config: Arc::clone(&ground.config),
            ec2: DirectEc2::new(&ground.cloud, LATENCY),
            imds: DirectImds::new(&ground.cloud, &ground.instance),
            host: ground.host.clone(),
            checkpoint: state_dir.join(CHECKPOINT),
            interfaces,
            cluster: ground.cluster.watch(),
            node_name: ground.node().to_owned(),
            succeeds: false,
            shutdown: shutdown.clone(),
            time_of_day: wall::now(),
            boot: Some(wall::boot(&ground.cloud)),
        });
        let addresses = tokio::spawn(async move {
            // An abort of this task is to reach the one within.
            let mut within = AbortOnDrop(addresses);
            (&mut within.0).await.expect("the address actor does not panic").expect("the address actor starts");
        });
        let sink = || DirectLogs::new(&ground.cloud, LATENCY);
        let (logs, shipping) = logs::spawn(LogsParts {
            settings: LogSettings { age: None, ..LogSettings::new(Layout::Raw) },
            sink: sink(),
            cluster: ground.cluster.watch(),
            node: ground.node().to_owned(),
            cluster_name: CLUSTER_NAME.to_owned(),
            state_dir,
            log_dir: ground.dir("containers"),
            shutdown: shutdown.clone(),
            grace: Duration::from_secs(10),
            wall: wall::now,
        });
        let (telemetry, metrics) = telemetry::spawn(TelemetryParts {
            sink: Arc::new(sink()),
            cluster: ground.cluster.watch(),
            roots: Roots { cgroup: ground.dir("cgroup"), ..Roots::default() },
            identity: NodeIdentity { cluster: CLUSTER_NAME.into(), node: ground.node().into(), ..NodeIdentity::default() },
            settings: TelemetrySettings { interval: METRICS_EVERY, ..TelemetrySettings::default() },
            netpol: Some(netpol.clone()),
            logs: Some(logs.clone()),
            extras: Extras::default(),
            shutdown: shutdown.clone(),
        });
        let spool = cni::spawn_spool(ground.dir("spool"), ipam.clone(), Some(netpol.clone()), shutdown.clone());
        let adoption = cni::spawn_adoption(AdoptParts {
            ipam: ipam.clone(),
            netpol: netpol.clone(),
            cluster: ground.cluster.watch(),
            node_name: ground.node().to_owned(),
            veth_prefix: "eni".to_owned(),
            shutdown: shutdown.clone(),
        });
        let tasks = vec![("policy", policy), ("addresses", addresses), ("logs", shipping), ("metrics", metrics), ("spool", spool)];
        Ok(Self { ipam, netpol, logs, telemetry, tasks, adoption: AbortOnDrop(adoption), shutdown })
    }

    /// What answers the plugin.
    pub(super) fn service(&self) -> CniService {
        let settings = CniSettings { pod_mtu: 9_001, veth_prefix: "eni".to_owned(), egress: None, strict_policy: true };
        CniService::new(self.ipam.clone(), Some(self.netpol.clone()), None, settings, Told::default())
    }

    /// A part that has ended by itself.
    pub(super) fn ended(&self) -> Option<&'static str> {
        self.tasks.iter().find(|(_, task)| task.is_finished()).map(|(name, _)| *name)
    }

    /// Whether pods that ran before this agent are under its policy.
    pub(super) fn has_adopted(&self) -> bool {
        self.adoption.0.is_finished()
    }

    /// Every task ends where it waits.
    pub(super) async fn kill(mut self) -> anyhow::Result<()> {
        for (_, task) in &self.tasks {
            task.abort();
        }
        for (name, task) in &mut self.tasks {
            let ended = task.await;
            ensure!(!ended.is_err_and(|error| error.is_panic()), "{name} panicked");
        }
        Ok(())
    }

    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        for (name, task) in &mut self.tasks {
            tokio::time::timeout(MINUTE, task).await.with_context(|| format!("{name} does not end"))?.with_context(|| name.to_owned())?;
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for (_, task) in &self.tasks {
            task.abort();
        }
    }
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
