//! Node, pod and container metrics: kernel text in, samples out, documents made of samples.
//!
//! | module | what |
//! |---|---|
//! | [`proc`] | parsers of files under /proc |
//! | [`cgroup`] | parsers of cgroup v1 and v2 files, and what a cgroup's path says |
//! | [`rate`] | rates over monotonic time |
//! | [`pods`] | this node's pods: names, owners, requests, limits, states |
//! | [`model`] | the samples of one tick |
//! | [`track`] | readings and pods to samples, keeping the counters of the last tick |
//! | [`catalog`] | every metric of Container Insights: type, field, unit, dimensions, preset |
//! | [`insights`] | samples to Container Insights documents (EMF version 0) |
//! | [`otlp`] | samples to OTLP metrics |
//! | [`kubelet`] | what the kubelet's summary adds: containers' own files |
//! | [`devices`] | EFA, GPUs, EBS volumes: who tells their figures, and what they are called |
//! | [`log_meter`] | bytes of logs by pod |
//! | [`scrape`] | pods' Prometheus text to documents, by the CloudWatch agent's rules |
//! | [`statsd`] | statsd packets to documents |
//! | [`emf`] | documents of the two above |
//! | [`exposition`], [`families`] | Prometheus and OpenMetrics text; the families on :61678/metrics |
//!
//! [`cost`]: what a preset costs a month.
//!
//! The parsers take text as the kernel writes it and never panic on anything else: a malformed line is left out, a
//! malformed file is `None`.

pub mod catalog;
pub mod cgroup;
pub mod cost;
pub mod devices;
pub mod emf;
pub mod exposition;
pub mod families;
pub mod insights;
#[cfg(test)]
mod insights_tests;
pub mod kubelet;
pub mod log_meter;
pub mod model;
pub mod otlp;
pub mod pods;
pub mod proc;
pub mod rate;
pub mod scrape;
pub mod statsd;
pub mod track;
