//! A VPC on one machine, made of network namespaces, and a strict fake of the AWS APIs, so that stanchion is exercised on
//! real wires with its real binaries.
//!
//! `cargo xtask demo` plays a story in it, `cargo xtask lab` leaves it to you, and the scenario tests live in it.

pub mod bench;
pub mod fake_aws;
pub mod fake_kube;
pub mod netns;
pub mod router;
pub mod run;
pub mod wires;
