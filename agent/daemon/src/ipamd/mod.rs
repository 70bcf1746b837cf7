//! The owner of addresses and ENIs: one actor that holds the datastore, asks the planner and lets EC2 calls run beside it.
//!
//! Input: requests on [`IpamHandle`], results of EC2 actions, the cluster watch, a slow safety tick. Output: replies, the
//! checkpoint on disk, the host network, EC2 calls. A panic ends the agent's network role: the supervisor starts it anew
//! and everything is read back from EC2, IMDS and the checkpoint.

mod actor;
mod branches;
mod clock;
mod execute;
mod files;
mod groups;
mod handle;
mod meter;
mod observe;
mod pool;
mod retry;
mod snapshot;
mod start;
mod views;

pub use files::FileError;
pub use handle::{AssignError, AssignRequest, AssignedAddress, Assignment, Busy, IpamHandle, IpamStatus, ReleaseError};
pub use snapshot::{AddressView, CidrView, EXCLUDED, Ec2CallStats, EniView, IpamCounters, IpamSnapshot, PoolView, RecentError, SubnetView};
pub use start::{IpamdParts, StartError, spawn};
