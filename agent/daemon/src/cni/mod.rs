//! Serves the plugin: translates its calls to the address and policy actors. Holds no state of its own.
//!
//! | file | what is there |
//! |---|---|
//! | `service` | the service: what each call means |
//! | `frames` | the service in the plugin's frames, on the socket that also carries gRPC |
//! | `adopt` | the task that puts pods under policy that ran before there was any |
//! | `branch` | pods with security groups of their own |
//! | `convert` | wire types to requests, errors to status codes |
//! | `heal` | the task that repairs the host network when somebody else changed it |
//! | `spool` | the task that delivers releases left behind while the agent was away |
//!
//! The socket's owner ([`admin`](crate::admin)) lets only root connect.

mod adopt;
mod branch;
mod convert;
mod frames;
mod heal;
mod service;
mod spool;

pub use adopt::{AdoptParts, spawn as spawn_adoption};
pub use branch::{BranchFailure, Branches};
pub use frames::take_plugins;
pub use heal::spawn as spawn_heal;
pub use service::{CniService, CniSettings, Told};
pub use spool::{drain, spawn as spawn_spool};
