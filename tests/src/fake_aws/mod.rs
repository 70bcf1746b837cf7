//! A strict fake of EC2, IMDSv2 and CloudWatch Logs with one shared model.
//!
//! [`Cloud`] is a VPC with subnets, ENIs and instances, and the log groups of an account, behind one mutex and a
//! [`Clock`]. It is as strict as the services are and as unreliable: limits a type, addresses counted one by one, /28s
//! that need a whole block, lag between a change and what Describe and IMDS show, throttling, lost replies.
//! The same model is reached over HTTP by the real SDK ([`serve_ec2`], [`serve_imds`], [`serve_logs`]) and without HTTP, on paused time, through the product's own traits ([`DirectEc2`], [`DirectImds`], [`DirectLogs`]).
//! No call does anything in the background: whatever happens later (an attachment that completes, lag that ends) is
//! computed from the clock when it is asked for. A subscriber of [`Cloud::subscribe`] gets every change of an ENI.

mod clock;
mod cloud;
mod direct;
mod ec2;
mod ec2_change;
mod ec2_describe;
mod faults;
mod http;
mod imds_view;
mod inspect;
mod logs;
mod logs_wire;
mod model;
mod query;
mod servers;
mod sigv4;
mod subnet;
mod tls;
mod xml;

pub use clock::Clock;
pub use cloud::{Cloud, LoggedCall};
pub use direct::{DirectEc2, DirectImds, DirectLogs};
pub use ec2::{Ec2Call, Ec2Reply, Filter, Page};
pub use faults::{ApiError, Bucket, Chaos, Effect, Fault};
pub use logs::{GroupView, LogsCall, LogsReply, LogsTotals, StoredEvent};
pub use logs_wire::Entity;
pub use model::{CloudConfig, EniEvent, InstanceSpec, InstanceView, SubnetSpec, Timing};
pub use servers::{serve_credentials, serve_ec2, serve_imds, serve_logs};
pub use sigv4::signed_scope;
pub use subnet::Placement;
pub use tls::{TEST_CA_PEM, test_acceptor};
