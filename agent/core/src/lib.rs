//! The decisions of stanchion, pure: no tokio, no file system, no AWS, no clock.
//!
//! Every function here takes what it needs, `now` included, and returns data: actions, plans, documents, verdicts. The
//! daemon, the plugin, the simulation and the offline commands all call the same code.
//!
//! | module | what is decided there |
//! |---|---|
//! | [`ids`] | newtypes for what has an id: ENIs, subnets, MACs, pods |
//! | [`objects`] | the slim forms of the Kubernetes objects that the agent reads, from JSON or YAML |
//! | [`cluster`] | the snapshot of all objects |
//! | [`manifests`] | objects from YAML and JSON text |
//! | [`boot`] | times in files, reckoned by the boot that they were written in |
//! | [`branch`] | security groups for pods: which pods have a branch ENI, and what is known of it |
//! | [`config`] | every setting, its default, its origin, its parsing quirks |
//! | [`conflist`] | the network configuration that the runtime reads |
//! | [`events`] | which Kubernetes events are written, counted, kept back |
//! | [`scrub`] | secrets out of text that leaves the node |
//! | [`shared_map`] | an ordered map whose copies share what they have in common |
//! | [`limits`] | instance types: ENIs, addresses, cards |
//! | [`cloud`] | what EC2, IMDS and CloudWatch Logs are asked and how they answer: the `Ec2Api`, `Imds` and `LogSink` seams |
//! | [`ipam`] | datastore, pool planner, reconcile, checkpoint |
//! | [`network`] | host and pod network plans, diff, SNAT, names |
//! | [`policy`] | network policy: model, resolve, compile, diff, verdict and explanation |
//! | [`cni`] | the CNI specification's types, versions and errors |
//! | [`logs`] | CRI lines, reassembly, multiline, enrichment, batches, positions, routing |
//! | [`metrics`] | parsers of kernel text, rates, Container Insights documents, EMF |
#![forbid(unsafe_code)]

pub mod boot;
pub mod branch;
pub mod cloud;
pub mod cluster;
pub mod cni;
pub mod config;
pub mod conflist;
pub mod events;
pub mod ids;
pub mod ipam;
pub mod limits;
pub mod logs;
pub mod manifests;
pub mod metrics;
pub mod network;
pub mod objects;
pub mod policy;
pub mod scrub;
pub mod shared_map;
mod yaml;
