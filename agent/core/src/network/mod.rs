//! The node's and the pods' network as desired state, and the difference from what is there.
//!
//! ```text
//! HostPlan (ipamd: ENIs, pods, settings) ─┐
//!                                         ├─ diff ─> Vec<NetOp> ─> executor (stanchion-netlink)
//! HostObserved (dumps of the kernel) ─────┘
//! PodPlan (plugin: one attachment) ─> pod_ops, host_ops ─> the same executor
//! ```
//!
//! Everything is level-triggered: applying the same plan twice yields no operation the second time, and foreign damage
//! is a difference like any other.

pub mod branch;
pub mod diff;
pub mod egress;
pub mod host;
pub mod names;
pub mod nft;
pub mod ops;
pub mod pod;
pub mod takeover;

use std::future::Future;

use serde::Serialize;

pub use branch::{BranchLink, BranchPod};
pub use diff::{diff, host_sysctls};
pub use host::{Egress, EniPlan, EniRole, HostPlan, PodHost, Randomize, Snat};
pub use names::{eni_route_table, host_veth_name, subnet_gateway};
pub use ops::{HostObserved, NetOp, NodeIf, Route, Rule, VlanLink};
pub use pod::PodPlan;

use crate::ids::Mac;

/// The seam "make the host network so". `stanchion-netlink` implements it on the kernel; the simulation keeps a model.
///
/// An implementation observes, computes [`diff`] and performs its operations; it decides nothing itself.
pub trait HostNetwork: Send + Sync + 'static {
    /// Brings the host network to `desired` as far as it can and says what it did.
    ///
    /// # Errors
    /// [`HostError::Observe`] when the kernel could not be read (nothing was changed). A failed operation is no error of the whole:
    /// the others are performed and it is listed in [`HostReport::failed`].
    fn apply(&self, desired: &HostPlan) -> impl Future<Output = Result<HostReport, HostError>> + Send;
}

/// What [`HostNetwork::apply`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// The operations that were needed, and succeeded. Empty: all was as desired.
    pub applied: Vec<NetOp>,
    /// Those that the kernel refused.
    pub failed: Vec<FailedOp>,
    /// ENIs of the plan whose interface is not there (yet): apply again when it appears.
    pub missing: Vec<Mac>,
}

/// An operation and why it failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailedOp {
    /// What was tried.
    pub op: NetOp,
    /// The kernel's or `nft`'s words.
    pub error: String,
}

/// Why a plan could not be applied at all.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The present state could not be read; nothing was changed.
    #[error("reading the host's {what} failed: {error}")]
    Observe {
        /// `links`, `routes`, `rules`, `nft ruleset` …
        what: &'static str,
        /// The kernel's or `nft`'s words.
        error: String,
    },
    /// The task that applies plans is gone: the process is ending.
    #[error("the host network task has ended")]
    Closed,
}
