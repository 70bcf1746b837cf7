//! A VPC on one machine, made of network namespaces, and a strict fake of the AWS APIs, so that stanchion is exercised on
//! real wires with its real binaries.
//!
//! `cargo xtask demo` plays a story in it, `cargo xtask lab` leaves it to you, and the scenario tests live in it.

pub mod agent;
pub mod bench;
pub mod binaries;
pub mod breed;
mod cables;
pub mod chaos;
pub mod cloudwatch;
pub mod cluster;
pub mod container_log;
pub mod datapath;
pub mod fake_aws;
pub mod fake_kube;
pub mod ipam_world;
pub mod leftovers;
pub mod manifests;
pub mod netns;
pub mod node;
pub mod pod;
pub mod pod_cgroups;
pub mod probe;
pub mod refusals;
pub mod router;
pub mod run;
pub mod schema;
mod sctp;
pub mod simulation;
pub mod stray;
pub mod tour;
pub mod vpc;
pub mod wait;
pub mod wall;
pub mod wires;

pub use vpc::{Vpc, VpcBuilder};
