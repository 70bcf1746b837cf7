//! The agent's tasks: each owns one state, others send it typed requests on a bounded mailbox.
//!
//! | module | owns | asked by |
//! |---|---|---|
//! | [`cluster`] | the Kubernetes objects of this node's world: a manifests directory or the API server | policy, logs, ipamd |
//! | [`ipamd`] | datastore, pool, ENIs, checkpoint, ENI routes and rules | CNI server, admin |
//! | [`cni`] | the gRPC server of the plugin | the plugin |
//! | [`netpol`] | endpoints, compiled policy, kernel maps and programs | CNI server, cluster watch, admin |
//! | [`logs`] | tailed files, batches, positions | admin |
//! | [`telemetry`] | metric ticks, documents, the Prometheus registry | admin |
//! | [`admin`] | debug gRPC service, introspection and metrics HTTP | people and tools |
//!
//! A task that panics, or ends before the agent is told to, ends the process (`stanchion`'s `parts`): its supervisor starts it anew.
//!
//! [`boot`] tells the boot of the node by which times in their files are reckoned; [`predecessor`] keeps the network's tasks from starting
//! while aws-node still serves the node.

pub mod admin;
pub mod boot;
pub mod cluster;
pub mod cni;
pub mod install;
pub mod ipamd;
pub mod logs;
pub mod netpol;
pub mod predecessor;
pub mod telemetry;
