//! EC2, IMDS and CloudWatch Logs over the AWS SDK: the only crate that builds it.
//!
//! Spawns no task and decides nothing: a method is one request and its translation. State is the SDK's connection pool
//! and credential cache (thrown away when a service refuses the credentials), the credentials of a signer, and whether an endpoint takes gzip. Endpoints come from the SDK's own variables
//! (`AWS_ENDPOINT_URL_EC2`, `AWS_ENDPOINT_URL_CLOUDWATCH_LOGS`, `AWS_EC2_METADATA_SERVICE_ENDPOINT`), credentials from its
//! default chain: environment, IRSA, EKS Pod Identity, IMDS.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use stanchion_aws::{AwsClients, Overrides, SdkImds};
//! use stanchion_core::cloud::{Ec2Api as _, Imds as _};
//!
//! let imds = SdkImds::new(None)?;
//! let me = imds.identity().await?;
//! let aws = AwsClients::load(Overrides { region: Some(me.region), ..Overrides::default() }).await?;
//! let attached = aws.ec2().describe_attached(&me.instance).await?;
//! # Ok(())
//! # }
//! ```

mod addresses;
mod classify;
mod client;
mod convert;
mod credentials;
mod ec2;
mod failure;
mod http;
mod imds;
mod logs;
mod renew;
mod sign;

pub use addresses::ByKind;
pub use classify::{ec2_error, sink_error};
pub use client::{AwsClients, LoadError, Overrides};
pub use ec2::SdkEc2;
pub use imds::SdkImds;
pub use logs::CloudWatchSink;
pub use sign::{SignError, Signer};
