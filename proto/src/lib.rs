//! The gRPC interface of the agent, generated from `stanchion.proto`.
#![allow(missing_docs, reason = "generated; the documentation is in stanchion.proto")]

tonic::include_proto!("stanchion.v1");

/// The version of the plugin-agent protocol that this build speaks; one version apart must work together.
pub const PROTOCOL_VERSION: &str = "1";
/// Where the agent listens when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/stanchion/agent.sock";
