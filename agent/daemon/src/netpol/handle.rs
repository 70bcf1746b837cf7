//! How others ask the actor.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::policy::engine::Missing;
use stanchion_core::policy::image::MapError;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::attach::AttachError;
use super::follow::{FlowRecords, Listeners};

/// Requests that may wait in the mailbox: one ADD or DEL for each of a few hundred pods. Full means that the actor hangs.
pub(super) const MAILBOX: usize = 512;

/// Those who may wait for a picture beside the mailbox, so that nobody who looks takes the place of a pod; more wait until these have
/// theirs.
pub(super) const LOOKS: usize = 64;

/// Flow records kept for a slow subscriber; older ones are lost to it, and it is told how many.
pub(super) const FLOW_BACKLOG: usize = 4_096;

/// A sandbox whose host ends exist and are still down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActivateRequest {
    /// The pod.
    pub pod: PodName,
    /// Its uid; empty if the runtime did not say.
    pub pod_uid: String,
    /// The sandbox.
    pub container_id: ContainerId,
    /// One a host veth.
    pub endpoints: Vec<ActivateIf>,
    /// Another plugin of the chain will put an ingress qdisc on the host veths: filters below clsact would be in its way.
    pub shares_ingress: bool,
}

/// A host veth and the addresses behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActivateIf {
    /// Name in the node's network namespace.
    pub host_if_name: String,
    /// Index there.
    pub host_if_index: u32,
    /// The pod's IPv4 address on it.
    pub ipv4: Option<Ipv4Addr>,
    /// The pod's IPv6 address on it.
    pub ipv6: Option<Ipv6Addr>,
}

impl ActivateIf {
    /// The addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from))
    }
}

/// An activation that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivateReport {
    /// Microseconds from the request's arrival at the actor to programs attached.
    pub policy_us: u32,
}

/// Why a pod was not activated. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// Not even queued, or the actor is gone.
    #[error("network policy is busy or stopping; try again")]
    Busy,
    /// Strict mode, and something that the pod's policies depend on is not known.
    #[error("{missing}; waited {} s, as NETWORK_POLICY_ENFORCING_MODE is strict", waited.as_secs())]
    NotKnown {
        /// What.
        missing: Missing,
        /// How long the request waited.
        waited: Duration,
    },
    /// All slots are taken.
    #[error("no endpoint slot is free: {used} pods are active")]
    NoSlot {
        /// Pods that hold one.
        used: usize,
    },
    /// The kernel's maps refused the pod's policy.
    #[error("the pod's policy cannot be written")]
    Maps(#[source] MapError),
    /// The programs could not be attached.
    #[error("the pod's programs cannot be attached")]
    Attach(#[source] AttachError),
    /// The slot table could not be made durable.
    #[error("cannot write {path}")]
    NotDurable {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What happens to pods while the cluster's state is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EnforcingMode {
    /// They start unpoliced, and are policed as soon as it is known.
    #[default]
    Standard,
    /// They do not start.
    Strict,
}

impl std::str::FromStr for EnforcingMode {
    type Err = BadMode;

    fn from_str(text: &str) -> Result<Self, BadMode> {
        match text {
            "standard" => Ok(Self::Standard),
            "strict" => Ok(Self::Strict),
            _ => Err(BadMode(text.to_owned())),
        }
    }
}

/// A word that is no enforcing mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither \"standard\" nor \"strict\"")]
pub struct BadMode(pub String);

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowVerdict {
    /// Dropped.
    Denied,
    /// Passed, and opened a flow.
    Allowed,
    /// Would have been dropped; passed because of audit mode.
    Audited,
}

/// Direction as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowDirection {
    /// Into the pod.
    Ingress,
    /// Out of it.
    Egress,
}

/// A judged packet with the names that belong to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRecord {
    /// When the agent read it, at most a tenth of a second after the packet.
    pub time: SystemTime,
    /// Outcome.
    pub verdict: FlowVerdict,
    /// At the pod that was judged.
    pub direction: FlowDirection,
    /// The pod that was judged.
    pub pod: Option<PodName>,
    /// The other end, if its address is a pod's.
    pub peer: Option<PodName>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6` or the number.
    pub protocol: String,
    /// 0 where the protocol has none.
    pub source_port: u16,
    /// 0 where the protocol has none.
    pub destination_port: u16,
    /// Bytes of the packet.
    pub length: u32,
    /// The policy that decided, as `kind namespace/name`; empty for the default of an isolated pod.
    pub policy: String,
    /// The rule in it; empty for none.
    pub rule: String,
    /// `policy`, `source`, `malformed`, `ethertype`, `fragment`, `no-endpoint` or `exempt`.
    pub reason: &'static str,
}

impl FlowRecord {
    /// The pod that sent it, if known.
    pub fn source_pod(&self) -> Option<&PodName> {
        match self.direction {
            FlowDirection::Ingress => self.peer.as_ref(),
            FlowDirection::Egress => self.pod.as_ref(),
        }
    }

    /// The pod it went to, if known.
    pub fn destination_pod(&self) -> Option<&PodName> {
        match self.direction {
            FlowDirection::Ingress => self.pod.as_ref(),
            FlowDirection::Egress => self.peer.as_ref(),
        }
    }
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes with Ethernet headers.
    pub bytes: u64,
}

/// A policed pod's counters since its activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EndpointCounters {
    /// Into the pod, passed.
    pub ingress_allowed: Count,
    /// Into the pod, dropped.
    pub ingress_denied: Count,
    /// Out of the pod, passed.
    pub egress_allowed: Count,
    /// Out of the pod, dropped.
    pub egress_denied: Count,
}

/// One active pod.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointView {
    /// Its place in the endpoint array.
    pub slot: u16,
    /// The pod.
    pub pod: PodName,
    /// Its uid.
    pub pod_uid: String,
    /// The sandbox.
    pub container_id: ContainerId,
    /// Its host veths.
    pub interfaces: Vec<InterfaceView>,
    /// The policies that select it, as `kind namespace/name`.
    pub policies: Vec<String>,
    /// Ingress is isolated.
    pub ingress_isolated: bool,
    /// Egress is isolated.
    pub egress_isolated: bool,
    /// Denials are only reported.
    pub audit: bool,
    /// Of its policy.
    pub revision: u32,
    /// Live flow entries.
    pub flows: u64,
    /// Packets judged. Pods without policy are not counted: they pay nothing.
    pub counters: EndpointCounters,
}

/// A host veth of an active pod.
#[derive(Clone, Debug, Serialize)]
pub struct InterfaceView {
    /// Name in the node's network namespace.
    pub name: String,
    /// Index there.
    pub index: u32,
    /// The pod's addresses behind it.
    pub addresses: Vec<IpAddr>,
    /// `tcx` or `clsact`.
    pub attached: &'static str,
}

/// An entry of the flow table.
#[derive(Clone, Debug, Serialize)]
pub struct FlowView {
    /// The pod.
    pub pod: Option<PodName>,
    /// Which of its addresses.
    pub local: Option<IpAddr>,
    /// Its port.
    pub local_port: u16,
    /// The peer.
    pub remote: IpAddr,
    /// The peer's port.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The pod opened it.
    pub opened_by_pod: bool,
    /// `opening`, `established`, `half-closed`, `closed`, `reset`.
    pub state: &'static str,
    /// Seconds since the last packet, at a granularity of about one.
    pub idle_seconds: u32,
    /// Seconds of idleness after which it is forgotten.
    pub timeout_seconds: u32,
    /// It was judged under the pod's present policy.
    pub current: bool,
}

impl FlowView {
    /// Among the others.
    fn place(&self) -> impl Ord + '_ {
        (&self.pod, self.remote, self.remote_port, self.protocol, self.local, self.local_port)
    }
}

/// The actor's state as views and metrics read it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NetpolSnapshot {
    /// The programs are loaded and the cluster's state is known.
    pub ready: bool,
    /// Why not; empty when ready.
    pub reason: String,
    /// Active pods by slot.
    pub endpoints: Vec<EndpointView>,
    /// Live entries of the IPv4 and IPv6 flow tables at the last collection.
    pub flows: [u64; 2],
    /// Room of each flow table.
    pub flow_capacity: u32,
    /// Since the maps were made.
    pub alarms: Alarms,
    /// Map writes since the agent's start.
    pub map_writes: u64,
    /// What is wrong in the policies: object, field, consequence, remedy.
    pub problems: Vec<String>,
    /// The last failure of a map write or attachment; empty when none since the last success.
    pub last_error: String,
}

/// Counters that should stay at zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Alarms {
    /// Events that found the ring full.
    pub events_lost: u64,
    /// Flows that found the table full and are judged packet by packet.
    pub flow_table_full: u64,
    /// Flows that found their pod at its cap and are judged packet by packet.
    pub pod_flow_cap: u64,
    /// Packets dropped for want of an endpoint record.
    pub no_endpoint: u64,
    /// DNS answers that found their ring full: connections to what they name are denied until the pod asks again.
    pub names_lost: u64,
}

/// What the mailbox carries.
#[derive(Debug)]
pub(super) enum Message {
    Activate(ActivateRequest, oneshot::Sender<Result<ActivateReport, ActivateError>>),
    Adopt(Vec<ActivateRequest>, oneshot::Sender<Result<usize, ActivateError>>),
    Deactivate(ContainerId, oneshot::Sender<bool>),
    Flows(oneshot::Sender<Vec<FlowView>>),
    /// Someone listens who did not before; answered when the programs know.
    Listen(oneshot::Sender<()>),
}

/// Asks the actor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetpolHandle {
    pub(super) mailbox: mpsc::Sender<Message>,
    pub(super) looks: mpsc::Sender<oneshot::Sender<Arc<NetpolSnapshot>>>,
    pub(super) flows: broadcast::Sender<Arc<FlowRecord>>,
    pub(super) listeners: Arc<watch::Sender<Listeners>>,
    pub(super) ready: watch::Receiver<bool>,
}

impl NetpolHandle {
    /// Of an actor that is gone.
    #[cfg(test)]
    pub(crate) fn of_nobody() -> Self {
        let (mailbox, looks, flows, listeners) =
            (mpsc::channel(1).0, mpsc::channel(1).0, broadcast::channel(1).0, watch::channel(Listeners::default()).0);
        Self { mailbox, looks, flows, listeners: Arc::new(listeners), ready: watch::channel(false).1 }
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.try_send(message(reply)).ok()?;
        answer.await.ok()
    }

    /// Evaluates the pod's policy, writes it, and attaches the programs to its host veths. When this returns, the policy is
    /// in force for the first packet. Repeating it for the same sandbox is harmless.
    ///
    /// # Errors
    /// See [`ActivateError`]; nothing of the pod is left behind.
    pub async fn activate(&self, request: ActivateRequest) -> Result<ActivateReport, ActivateError> {
        self.ask(|reply| Message::Activate(request, reply)).await.ok_or(ActivateError::Busy)?
    }

    /// Polices sandboxes that have run without: aws-node connected them, or network policy was off. They keep the connections they have,
    /// and aws-network-policy-agent's programs go where ours are in force. Waits until the cluster's state is known. Sandboxes that are
    /// active already, and those whose host veths are gone, are left out; returns how many were not.
    ///
    /// # Errors
    /// The actor is busy or gone, or the kernel refuses the policy of one; then none was touched. Programs that cannot be attached are told
    /// in the log, and tried again while the veths live.
    pub async fn adopt(&self, running: Vec<ActivateRequest>) -> Result<usize, ActivateError> {
        self.ready().wait_for(|ready| *ready).await.map_err(|_| ActivateError::Busy)?;
        self.ask(|reply| Message::Adopt(running, reply)).await.ok_or(ActivateError::Busy)?
    }

    /// Forgets a sandbox. True if it was active.
    pub async fn deactivate(&self, container_id: ContainerId) -> bool {
        self.ask(|reply| Message::Deactivate(container_id, reply)).await.unwrap_or(false)
    }

    /// The present state; a default one (not ready) if the actor is gone. Those who wait at one time share it.
    pub async fn snapshot(&self) -> Arc<NetpolSnapshot> {
        let (asker, picture) = oneshot::channel();
        let gone = || Arc::new(NetpolSnapshot { reason: "network policy is stopping".to_owned(), ..NetpolSnapshot::default() });
        // What was not taken is dropped here, and the asker in it.
        if self.looks.send(asker).await.is_err() {
            return gone();
        }
        picture.await.unwrap_or_else(|_| gone())
    }

    /// The actor is gone.
    pub fn has_ended(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Every entry of the flow tables, by pod, peer and ports: who looks again finds them in the same places.
    pub async fn conntrack(&self) -> Vec<FlowView> {
        let mut flows: Vec<FlowView> = self.ask(Message::Flows).await.unwrap_or_default();
        flows.sort_unstable_by(|a, b| a.place().cmp(&b.place()));
        flows
    }

    /// Flow records from now on: denied and audited packets, and flows that open if `allowed`.
    pub async fn follow(&self, allowed: bool) -> FlowRecords {
        let records = FlowRecords::new(&self.flows, &self.listeners, allowed);
        // A busy actor learns it from the count of listeners a little later.
        let _busy = self.ask(Message::Listen).await;
        records
    }

    /// Turns true once the cluster's state was known and applied.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }
}
