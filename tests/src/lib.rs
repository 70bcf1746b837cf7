//! The VPC lab: a VPC on one machine, made of network namespaces and a strict fake of the AWS APIs.

pub mod bench;
