//! The address actor with the AWS model and a model of the host network, on tokio's clock (which a test may pause).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::ids::{ContainerId, InstanceId, Mac, PodName, SubnetId};
use stanchion_core::ipam::IpamKey;
use stanchion_core::network::{FailedOp, HostError, HostNetwork, HostPlan, HostReport, NetOp, host_veth_name};
use stanchion_daemon::ipamd::{self, AssignError, AssignRequest, Assignment, IpamHandle, IpamdParts, ReleaseError, StartError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::fake_aws::{Clock, Cloud, CloudConfig, DirectEc2, DirectImds, EniEvent, InstanceSpec, SubnetSpec, Timing};
use crate::wall;

/// The calls of EC2 that change something of an IPv4 node. Faults are drawn by place: another order is another simulation for a seed.
pub const MUTATING: [&str; 8] = [
    "CreateNetworkInterface",
    "AttachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
    "DetachNetworkInterface",
    "DeleteNetworkInterface",
    "CreateTags",
];

/// A host network that is always as desired, once the interfaces are there.
#[derive(Clone, Debug, Default)]
pub struct ModelHost(Arc<Mutex<HostState>>);

#[derive(Debug, Default)]
struct HostState {
    /// Interfaces, and when they appear.
    links: BTreeMap<Mac, Instant>,
    plan: HostPlan,
    applied: u64,
    damage: Vec<NetOp>,
    refused: Vec<NetOp>,
}

impl ModelHost {
    fn with<T>(&self, f: impl FnOnce(&mut HostState) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest plan that was applied.
    pub fn plan(&self) -> HostPlan {
        self.with(|state| state.plan.clone())
    }

    /// How often a plan was applied.
    pub fn applied(&self) -> u64 {
        self.with(|state| state.applied)
    }

    /// Somebody else undoes what these did: the next plan that is applied does them again.
    pub fn damage(&self, ops: impl IntoIterator<Item = NetOp>) {
        self.with(|state| state.damage.extend(ops));
    }

    /// From now on the kernel refuses these, which every plan needs.
    pub fn refuse(&self, ops: impl IntoIterator<Item = NetOp>) {
        self.with(|state| state.refused = ops.into_iter().collect());
    }

    /// Takes an interface away for a while.
    pub fn delay_link(&self, mac: Mac, lasts: Duration) {
        self.with(|state| state.links.insert(mac, Instant::now() + lasts));
    }

    /// Follows the cloud: interfaces appear and go with their ENIs.
    pub(crate) fn follow(&self, cloud: &Cloud, instance: &InstanceId) -> JoinHandle<()> {
        let mut events = cloud.subscribe();
        let now = Instant::now();
        for eni in cloud.enis_of(instance) {
            self.with(|state| state.links.insert(eni.mac, now));
        }
        let (this, own) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    EniEvent::Attached { instance, eni, after, .. } if instance == own => {
                        this.with(|state| state.links.insert(eni.mac, Instant::now() + after));
                    }
                    EniEvent::Detached { instance, eni, .. } if instance == own => {
                        this.with(|state| state.links.remove(&eni.mac));
                    }
                    _ => {}
                }
            }
        })
    }
}

impl HostNetwork for ModelHost {
    async fn apply(&self, desired: &HostPlan) -> Result<HostReport, HostError> {
        let now = Instant::now();
        Ok(self.with(|state| {
            state.applied += 1;
            state.plan = desired.clone();
            let there = |mac: &Mac| state.links.get(mac).is_some_and(|at| *at <= now);
            let missing = desired.enis.iter().map(|eni| eni.mac).filter(|mac| !there(mac)).collect();
            let refused = |op: &NetOp| FailedOp { op: op.clone(), error: "Read-only file system (os error 30)".to_owned() };
            HostReport { missing, applied: std::mem::take(&mut state.damage), failed: state.refused.iter().map(refused).collect() }
        }))
    }
}

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct WorldSpec {
    /// `m5.large`.
    pub instance_type: String,
    /// The subnet's range.
    pub subnet: Ipv4Net,
    /// The cloud's delays.
    pub timing: Timing,
    /// Time of each EC2 call.
    pub latency: Duration,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Where the primary ENI is attached.
    pub device_index: u16,
}

impl WorldSpec {
    /// No delays, a /20, aws-node's defaults.
    pub fn new(instance_type: &str, env: &[(&str, &str)]) -> Self {
        Self {
            instance_type: instance_type.to_owned(),
            subnet: Ipv4Net::new_assert([10, 0, 16, 0].into(), 20),
            timing: Timing::default(),
            latency: Duration::from_millis(100),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            device_index: 0,
        }
    }
}

/// A node with its actor.
#[derive(Debug)]
pub struct World {
    /// The AWS side.
    pub cloud: Cloud,
    /// The node's instance.
    pub instance: InstanceId,
    /// The node's subnet.
    pub subnet: SubnetId,
    /// The host network.
    pub host: ModelHost,
    /// The actor.
    pub handle: IpamHandle,
    /// The cluster's objects.
    pub cluster: watch::Sender<Arc<ClusterState>>,
    /// Pods whose veth lives, by what the next start is told.
    pub veths: BTreeSet<String>,
    spec: WorldSpec,
    task: JoinHandle<Result<(), StartError>>,
    shutdown: CancellationToken,
    directory: tempfile::TempDir,
    follower: JoinHandle<()>,
}

/// The node's name in every world.
pub const NODE: &str = "node-1";

impl World {
    /// Launches the instance and starts the actor.
    ///
    /// # Panics
    /// When the settings are wrong: a mistake of the test.
    pub fn start(spec: WorldSpec) -> Self {
        Self::start_with(spec, |_, _| {})
    }

    /// The same, with a cloud that `prepare` has changed before the agent sees it.
    ///
    /// # Panics
    /// As [`World::start`].
    pub fn start_with(spec: WorldSpec, prepare: impl FnOnce(&Cloud, &SubnetId)) -> Self {
        let mut config = CloudConfig { timing: spec.timing, ..CloudConfig::default() };
        config.vpc_cidrs = vec![Ipv4Net::new_assert([10, 0, 0, 0].into(), 16)];
        let ipv6 = spec.env.get("ENABLE_IPv6").is_some_and(|value| value == "true");
        if ipv6 {
            config.vpc_ipv6_cidrs = vec![Ipv6Net::new_assert([0x2600, 0x1f18, 0, 0, 0, 0, 0, 0].into(), 56)];
        }
        let cloud = Cloud::new(config, Clock::tokio());
        let mut described = SubnetSpec::new("subnet-0a", "eu-west-1a", spec.subnet);
        if ipv6 {
            described.ipv6_cidrs = vec![Ipv6Net::new_assert([0x2600, 0x1f18, 0, 7, 0, 0, 0, 0].into(), 64)];
        }
        let subnet = cloud.add_subnet(described);
        let instance = InstanceId::from("i-0000000000000000a");
        let launched = InstanceSpec::new("i-0", &spec.instance_type, &subnet);
        cloud.run_instance(InstanceSpec { id: instance.clone(), ipv6, device_index: spec.device_index, ..launched });
        prepare(&cloud, &subnet);
        Self::start_on(cloud, subnet, instance, spec)
    }

    /// Starts the actor on an instance that is there. The node's time of day is the cloud's until [`wall::set`] says another.
    ///
    /// # Panics
    /// When the settings are wrong or there is no temporary directory.
    pub fn start_on(cloud: Cloud, subnet: SubnetId, instance: InstanceId, spec: WorldSpec) -> Self {
        wall::set(&cloud, 0);
        let host = ModelHost::default();
        let follower = host.follow(&cloud, &instance);
        let (cluster, _) = watch::channel(Arc::new(ClusterState::default()));
        // In memory where that is to be had, as /var/run is: simulations write the checkpoint thousands of times.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary directory");
        let (handle, task, shutdown) =
            spawn(&cloud, &instance, &host, &cluster, &BTreeSet::new(), &spec, directory.path().join("ipam.json"));
        Self { cloud, instance, subnet, host, handle, cluster, veths: BTreeSet::new(), spec, task, shutdown, directory, follower }
    }

    /// The checkpoint file.
    pub fn checkpoint(&self) -> PathBuf {
        self.directory.path().join("ipam.json")
    }

    /// Kills the actor, as `kill -9` would: EC2 calls that are on their way go on, nothing else does.
    pub fn kill(&mut self) {
        self.task.abort();
    }

    /// Starts the actor anew on what the last one left.
    pub fn restart(&mut self) {
        self.kill();
        let (handle, task, shutdown) =
            spawn(&self.cloud, &self.instance, &self.host, &self.cluster, &self.veths, &self.spec, self.checkpoint());
        (self.handle, self.task, self.shutdown) = (handle, task, shutdown);
    }

    /// Changes an environment variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.spec.env.insert(name.to_owned(), value.to_owned());
    }

    /// Ends the actor in good order.
    ///
    /// # Panics
    /// When it ended with an error or a panic before.
    pub async fn stop(&mut self) {
        self.shutdown.cancel();
        (&mut self.task).await.expect("the actor did not panic").expect("the actor started");
    }

    /// Whether the actor has ended.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// A pod asks for an address; its veth lives from then on.
    ///
    /// # Errors
    /// What the actor says.
    pub async fn add(&mut self, name: &str, wait: Duration) -> Result<Assignment, AssignError> {
        let result = self.handle.assign(request(name, wait)).await;
        if result.is_ok() {
            self.veths.insert(host_veth_name("eni", &PodName::new("default", name), 0));
        }
        result
    }

    /// Its pod ends.
    ///
    /// # Errors
    /// What the actor says.
    pub async fn delete(&mut self, name: &str) -> Result<Option<Assignment>, ReleaseError> {
        self.veths.remove(&host_veth_name("eni", &PodName::new("default", name), 0));
        self.handle.release(key(name), "PodDeleted").await
    }

    /// Waits until the pool rests: nothing under way for `quiet`.
    ///
    /// # Panics
    /// When it does not within an hour.
    pub async fn settle(&self, quiet: Duration) {
        let deadline = Instant::now() + Duration::from_secs(3_600);
        let mut calls = usize::MAX;
        loop {
            tokio::time::sleep(quiet).await;
            let now = self.cloud.calls().iter().filter(|call| !call.action.starts_with("imds")).count();
            if now == calls && self.handle.snapshot().in_flight.is_empty() {
                return;
            }
            calls = now;
            assert!(Instant::now() < deadline, "the pool does not come to rest: {:?}", self.handle.snapshot());
        }
    }

    /// Secondary addresses or prefixes on each ENI, by device index, as EC2 has them.
    pub fn per_eni(&self) -> Vec<usize> {
        let enis = self.cloud.enis_of(&self.instance);
        enis.iter().map(|eni| eni.secondary_ipv4.len() + eni.prefixes_v4.len() + eni.prefixes_v6.len()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
        self.follower.abort();
    }
}

/// The request of a pod of `default`.
pub fn request(name: &str, wait: Duration) -> AssignRequest {
    AssignRequest {
        key: key(name),
        pod: PodName::new("default", name),
        pod_uid: String::new(),
        multi_nic: false,
        deadline: Instant::now() + wait,
    }
}

/// The attachment of a pod of `default`.
pub fn key(name: &str) -> IpamKey {
    IpamKey { network_name: "aws-cni".to_owned(), container_id: ContainerId::new(name), if_name: "eth0".to_owned() }
}

type Running = (IpamHandle, JoinHandle<Result<(), StartError>>, CancellationToken);

fn spawn(
    cloud: &Cloud,
    instance: &InstanceId,
    host: &ModelHost,
    cluster: &watch::Sender<Arc<ClusterState>>,
    veths: &BTreeSet<String>,
    spec: &WorldSpec,
    checkpoint: PathBuf,
) -> Running {
    let shutdown = CancellationToken::new();
    let config = Config::read(&|name| spec.env.get(name).cloned()).expect("valid settings");
    let (handle, task) = ipamd::spawn(IpamdParts {
        config: Arc::new(config),
        ec2: DirectEc2::new(cloud, spec.latency),
        imds: DirectImds::new(cloud, instance),
        host: host.clone(),
        checkpoint,
        interfaces: veths.clone(),
        cluster: cluster.subscribe(),
        node_name: NODE.to_owned(),
        succeeds: false,
        shutdown: shutdown.clone(),
        time_of_day: wall::now(),
        boot: Some(wall::boot(cloud)),
    });
    (handle, task, shutdown)
}
