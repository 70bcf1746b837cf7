//! How others ask the actor.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;
use stanchion_core::ids::{EniId, PodName};
use stanchion_core::ipam::IpamKey;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::snapshot::IpamSnapshot;

/// Requests that may wait in the mailbox. A node holds at most a few hundred pods and each has one ADD or DEL at a time,
/// so a full mailbox means that the actor hangs, and a caller should hear it rather than queue.
pub(super) const MAILBOX: usize = 512;

/// The actor answers at the deadline; a caller hears at the latest this much later that it is still starting.
const REPLY_GRACE: Duration = Duration::from_millis(200);
/// An actor that has not taken a turn for so long hangs: its slow tick is 30 s.
const HUNG_AFTER: Duration = Duration::from_secs(90);
/// A release needs no EC2, so only a starting actor takes this long. The runtime repeats a DEL.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);

/// The mailbox is full, or the actor is gone: try again later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address management is busy or stopping; try again")]
pub struct Busy;

/// An ADD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignRequest {
    /// The attachment; asking again with the same key gives the same addresses.
    pub key: IpamKey,
    /// The pod.
    pub pod: PodName,
    /// Its uid; empty if the runtime did not say.
    pub pod_uid: String,
    /// One address on every managed network card instead of one.
    pub multi_nic: bool,
    /// How long to wait for EC2 when no address is free.
    pub deadline: Instant,
}

/// What a pod holds, on disk before anybody is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// One a network card, the default card first.
    pub attachments: Vec<AssignedAddress>,
    /// Pods' traffic leaves the VPC with their own address.
    pub external_snat: bool,
    /// The VPC's ranges, and those excluded from SNAT unless it is external.
    pub vpc_cidrs: Vec<IpNet>,
}

/// An address and where it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AssignedAddress {
    /// In IPv4 mode.
    pub ipv4: Option<Ipv4Addr>,
    /// In IPv6 mode.
    pub ipv6: Option<Ipv6Addr>,
    /// The ENI that owns it.
    pub eni: EniId,
    /// The ENI's device index.
    pub device_index: u16,
    /// The ENI's card.
    pub network_card: u16,
    /// The ENI's routing table; 254 is main.
    pub route_table: u32,
}

/// Why an ADD got no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// Not even queued.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The agent has not finished its start.
    #[error("not ready: {reason}")]
    NotReady {
        /// What is missing.
        reason: String,
    },
    /// None came before the deadline. `reason` names the ENI, the subnet and EC2's words.
    #[error("no free address after {} ms: {reason}", waited.as_millis())]
    NoAddress {
        /// How long the request waited.
        waited: Duration,
        /// Why, for the kubelet's event.
        reason: String,
    },
    /// The address could not be made durable; nothing is held.
    #[error("cannot write the checkpoint {path}: {message}")]
    NotDurable {
        /// The file.
        path: String,
        /// The I/O error.
        message: String,
    },
    /// The address is held, but the ENI's routes could not be made; ask again.
    #[error("the host network of {eni} is not ready: {message}")]
    HostNetwork {
        /// The ENI.
        eni: EniId,
        /// What failed.
        message: String,
    },
}

/// Why a release did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// Not even queued.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The agent has not finished its start: the state is not known yet.
    #[error("not ready: {reason}")]
    NotReady {
        /// What is missing.
        reason: String,
    },
    /// The release could not be made durable; the address is still held.
    #[error("cannot write the checkpoint {path}: {message}")]
    NotDurable {
        /// The file.
        path: String,
        /// The I/O error.
        message: String,
    },
}

/// Whether an ADD could succeed now, for the CNI verb STATUS and the node's readiness.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IpamStatus {
    /// Started, and an address is free or can be had.
    pub ready: bool,
    /// Why not, and what to do; empty when ready.
    pub reason: String,
}

/// What the mailbox carries.
#[derive(Debug)]
pub(super) enum Message {
    Assign(AssignRequest, oneshot::Sender<Result<Assignment, AssignError>>),
    Lookup(IpamKey, oneshot::Sender<Option<Assignment>>),
    Release(IpamKey, String, oneshot::Sender<Result<Option<Assignment>, ReleaseError>>),
    BranchFailed(&'static str),
    Healed(&'static str),
    CollectGarbage(String, Vec<IpamKey>, oneshot::Sender<Result<u32, ReleaseError>>),
}

/// Asks the actor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct IpamHandle {
    pub(super) mailbox: mpsc::Sender<Message>,
    pub(super) snapshot: watch::Receiver<Arc<IpamSnapshot>>,
}

impl IpamHandle {
    /// Of an actor that is not there: only its last picture is.
    #[cfg(test)]
    pub(crate) fn fixed(snapshot: IpamSnapshot) -> Self {
        Self { mailbox: mpsc::channel(1).0, snapshot: watch::channel(Arc::new(snapshot)).1 }
    }

    /// The actor is gone, or could not start.
    pub fn has_ended(&self) -> bool {
        self.mailbox.is_closed()
    }

    fn send(&self, message: Message) -> Result<(), Busy> {
        self.mailbox.try_send(message).map_err(|_| Busy)
    }

    /// Gives the attachment an address, on disk before the reply. Waits for EC2 until the request's deadline when none is
    /// free. A caller that stops waiting keeps nothing: what was assigned meanwhile is released.
    pub async fn assign(&self, request: AssignRequest) -> Result<Assignment, AssignError> {
        let (reply, answer) = oneshot::channel();
        let deadline = request.deadline + REPLY_GRACE;
        self.send(Message::Assign(request, reply))?;
        match timeout_at(deadline, answer).await {
            Ok(answer) => answer.unwrap_or(Err(AssignError::Busy(Busy))),
            // The actor answers at the deadline itself unless it is still starting.
            Err(_) => Err(AssignError::NotReady { reason: self.status().reason }),
        }
    }

    /// Counts a pod whose branch ENI could not be used, and what was tried. A full mailbox costs the count, nothing else.
    pub fn branch_failed(&self, operation: &'static str) {
        let _ = self.send(Message::BranchFailed(operation));
    }

    /// Counts something of the host network that somebody else had changed, by its subject. A full mailbox costs the count.
    pub fn healed(&self, subject: &'static str) {
        let _ = self.send(Message::Healed(subject));
    }

    /// What the attachment holds, for CHECK.
    pub async fn lookup(&self, key: IpamKey) -> Result<Option<Assignment>, Busy> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Lookup(key, reply))?;
        answer.await.map_err(|_| Busy)
    }

    /// Releases what the attachment holds and returns it; holding nothing is `None`. The addresses cool down before they
    /// are given again. `reason` is `PodDeleted` or `SetupNSFailed`.
    pub async fn release(&self, key: IpamKey, reason: &str) -> Result<Option<Assignment>, ReleaseError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Release(key, reason.to_owned(), reply))?;
        self.released(answer).await
    }

    /// Releases every attachment of the network that is not in `valid`; returns how many.
    pub async fn collect_garbage(&self, network_name: &str, valid: Vec<IpamKey>) -> Result<u32, ReleaseError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::CollectGarbage(network_name.to_owned(), valid, reply))?;
        self.released(answer).await
    }

    /// A release that is queued while the agent starts is done later all the same.
    async fn released<T>(&self, answer: oneshot::Receiver<Result<T, ReleaseError>>) -> Result<T, ReleaseError> {
        match timeout(RELEASE_WITHIN, answer).await {
            Ok(answer) => answer.unwrap_or(Err(ReleaseError::Busy(Busy))),
            Err(_) => Err(ReleaseError::NotReady { reason: self.status().reason }),
        }
    }

    /// Whether an ADD could succeed now. The actor tells at least twice a minute that it lives; one that does not hangs.
    pub fn status(&self) -> IpamStatus {
        let snapshot = self.snapshot.borrow();
        match snapshot.taken.map(|taken| taken.elapsed()).filter(|silent| *silent > HUNG_AFTER) {
            Some(silent) => {
                let reason = format!("address management has not moved for {} s; restart the agent if it stays so", silent.as_secs());
                IpamStatus { ready: false, reason }
            }
            None => snapshot.status.clone(),
        }
    }

    /// The newest picture of the state; taken after every change, at most some milliseconds old.
    pub fn snapshot(&self) -> Arc<IpamSnapshot> {
        self.snapshot.borrow().clone()
    }

    /// Waits until the agent can serve addresses; `Busy` if it ended before.
    pub async fn ready(&self) -> Result<(), Busy> {
        let mut snapshot = self.snapshot.clone();
        snapshot.wait_for(|snapshot| snapshot.status.ready).await.map(|_| ()).map_err(|_| Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Defect 10 of aws-node: its health was constant, and a pool loop that hung for minutes went unnoticed.
    #[tokio::test(start_paused = true)]
    async fn a_pool_that_hangs_is_not_ready_and_says_so() {
        let (mailbox, _inbox) = mpsc::channel(1);
        let taken = Some(Instant::now());
        let status = IpamStatus { ready: true, reason: String::new() };
        let (_sender, snapshot) = watch::channel(Arc::new(IpamSnapshot { taken, status, ..IpamSnapshot::default() }));
        let handle = IpamHandle { mailbox, snapshot };
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(handle.status().ready);
        tokio::time::advance(Duration::from_secs(60)).await;
        let status = handle.status();
        assert!(!status.ready && status.reason.contains("has not moved for 120 s"), "{status:?}");
    }
}
