//! Serves the plugin: translates its calls to the address and policy actors. Holds no state of its own.
//!
//! | file | what is there |
//! |---|---|
//! | `service` | the gRPC service |
//! | `convert` | wire types to requests, errors to status codes |
//! | `heal` | the task that repairs the host network when somebody else changed it |
//! | `spool` | the task that delivers releases left behind while the agent was away |
//!
//! The socket's owner ([`admin`](crate::admin)) lets only root connect.

mod convert;
mod heal;
mod service;
mod spool;

pub use heal::spawn as spawn_heal;
pub use service::{CniService, CniSettings, service};
pub use spool::{drain, spawn as spawn_spool};
