//! EC2, IMDS and CloudWatch Logs over the AWS SDK: the only crate that builds it.
//!
//! Spawns nothing and keeps no state besides the SDK's connection pools and credential cache: each method is one request
//! and its translation.

mod addresses;
mod classify;

pub use addresses::ByKind;
pub use classify::{ec2_error, sink_error};
