//! Answers to people and tools: the Debug gRPC service on the Unix socket, aws-node's HTTP paths, the status page.

pub mod debug;
pub mod health;
pub mod http;
mod introspection;
mod listen;
pub mod socket;
pub mod views;
