//! The interface of the agent: the gRPC services and messages of `stanchion.proto`, and the frames in which the plugin sends
//! them.
#![allow(missing_docs, reason = "generated; the documentation is in stanchion.proto")]

pub mod frame;

tonic::include_proto!("stanchion.v1");

/// The version of the plugin-agent protocol that this build speaks; one version apart must work together.
pub const PROTOCOL_VERSION: &str = "1";
/// Where the agent listens when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/stanchion/agent.sock";
