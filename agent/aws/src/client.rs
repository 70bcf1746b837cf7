//! Credentials, region and endpoints, found as every AWS program finds them.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use aws_config::meta::region::RegionProviderChain;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_ec2::config::{Credentials, IdentityCache, StalledStreamProtectionConfig};

use crate::credentials::Chain;
use crate::renew::Renewable;
use crate::{CloudWatchSink, SdkEc2, Signer, http};

/// To a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// EC2 answers Describe of a busy account in seconds; longer is a lost reply. For those who set nothing.
const EC2_TIMEOUT: Duration = Duration::from_secs(15);
/// A full batch over a slow link.
const LOGS_TIMEOUT: Duration = Duration::from_secs(30);

/// What is set here goes before the environment; the default leaves everything to it.
#[derive(Clone, Default)]
pub struct Overrides {
    /// Used when the environment names no region: the one that IMDS told.
    pub region: Option<String>,
    /// Instead of `AWS_ENDPOINT_URL_EC2`.
    pub ec2_endpoint: Option<String>,
    /// How long a request to EC2 may take.
    pub ec2_timeout: Option<Duration>,
    /// Instead of `AWS_ENDPOINT_URL_CLOUDWATCH_LOGS`.
    pub logs_endpoint: Option<String>,
    /// Access key id and secret instead of the credentials chain.
    pub static_keys: Option<(String, String)>,
    /// PEM certificates trusted besides the machine's, instead of `AWS_CA_BUNDLE`.
    pub ca_bundle: Option<PathBuf>,
}

/// Why no client could be built.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The CA bundle cannot be read.
    #[error("cannot read the CA bundle {}", path.display())]
    ReadBundle {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The CA bundle holds something else.
    #[error("{} is no CA bundle: {why}", path.display())]
    BadBundle {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// An endpoint that is no URI.
    #[error("{text:?} is no endpoint: {why}")]
    BadEndpoint {
        /// As given.
        text: String,
        /// Why.
        why: String,
    },
}

/// The clients of one process; they share connections and cached credentials.
///
/// Credentials come from the SDK's default chain: environment, IRSA (`AWS_WEB_IDENTITY_TOKEN_FILE`), EKS Pod Identity
/// (`AWS_CONTAINER_CREDENTIALS_FULL_URI`), IMDS. They are fetched at the first request and again before they expire.
#[derive(Clone, Debug)]
pub struct AwsClients {
    config: SdkConfig,
    /// Where the credentials come from, unless they are given.
    chain: Chain,
    overrides: Overrides,
}

// === impl Overrides ===

impl fmt::Debug for Overrides {
    /// Shows that keys are set, never which.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { region, ec2_endpoint, ec2_timeout, logs_endpoint, static_keys, ca_bundle } = self;
        f.debug_struct("Overrides")
            .field("region", region)
            .field("ec2_endpoint", ec2_endpoint)
            .field("ec2_timeout", ec2_timeout)
            .field("logs_endpoint", logs_endpoint)
            .field("static_keys", &static_keys.as_ref().map(|_| "set"))
            .field("ca_bundle", ca_bundle)
            .finish()
    }
}

// === impl AwsClients ===

impl AwsClients {
    /// Reads the environment and the profile files; sends nothing.
    ///
    /// # Errors
    /// When the CA bundle is not readable.
    pub async fn load(overrides: Overrides) -> Result<Self, LoadError> {
        let environment = aws_config::environment::EnvironmentVariableRegionProvider::new();
        let region = RegionProviderChain::first_try(environment).or_else(overrides.region.clone().map(Region::new));
        // Every SDK has this variable but the one for Rust.
        let named = || std::env::var_os("AWS_CA_BUNDLE").filter(|path| !path.is_empty()).map(PathBuf::from);
        let ca_bundle = overrides.ca_bundle.clone().or_else(named);
        let http = http::aws_client(ca_bundle.as_deref())?;
        let loader = move || {
            aws_config::defaults(BehaviorVersion::latest())
                .http_client(http.clone())
                .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build())
                // For the calls that fetch credentials; the service clients below have their own.
                .retry_config(RetryConfig::standard())
        };
        let config = match &overrides.region {
            Some(_) => loader().region(region),
            None => loader(),
        };
        let config = config.no_credentials().load().await;
        let region = config.region().cloned();
        let chain = Chain::new(move || loader().region(region.clone()));
        let provider = match &overrides.static_keys {
            Some((id, secret)) => SharedCredentialsProvider::new(Credentials::new(id, secret, None, None, "stanchion")),
            None => SharedCredentialsProvider::new(chain.clone()),
        };
        Ok(Self { config: config.into_builder().credentials_provider(provider).build(), chain, overrides })
    }

    /// EC2. A request is sent once: whether an action is tried again is the planner's decision, and a mutation whose reply
    /// was lost must not be repeated blindly.
    pub fn ec2(&self) -> SdkEc2 {
        let (config, chain, endpoint) = (self.config.clone(), self.chain.clone(), self.overrides.ec2_endpoint.clone());
        let timeout = self.overrides.ec2_timeout.unwrap_or(EC2_TIMEOUT);
        SdkEc2::new(Renewable::new(move || {
            // Made anew because credentials were refused: what their source keeps may be why.
            chain.forget();
            let mut builder = aws_sdk_ec2::config::Builder::from(&config)
                .retry_config(RetryConfig::disabled())
                .timeout_config(timeouts(timeout))
                .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
                .identity_cache(IdentityCache::lazy().build());
            if let Some(endpoint) = &endpoint {
                builder = builder.endpoint_url(endpoint);
            }
            aws_sdk_ec2::Client::from_conf(builder.build())
        }))
    }

    /// CloudWatch Logs. A request is sent once: back-off and order are the shipper's.
    pub fn logs(&self) -> CloudWatchSink {
        let (config, chain, endpoint) = (self.config.clone(), self.chain.clone(), self.overrides.logs_endpoint.clone());
        CloudWatchSink::new(Renewable::new(move || {
            // Made anew because credentials were refused: what their source keeps may be why.
            chain.forget();
            let mut builder = aws_sdk_cloudwatchlogs::config::Builder::from(&config)
                .retry_config(RetryConfig::disabled())
                .timeout_config(timeouts(LOGS_TIMEOUT))
                .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
                .identity_cache(IdentityCache::lazy().build());
            if let Some(endpoint) = &endpoint {
                builder = builder.endpoint_url(endpoint);
            }
            aws_sdk_cloudwatchlogs::Client::from_conf(builder.build())
        }))
    }

    /// Signs requests that are sent without the SDK; `None` where there is no source of credentials at all.
    pub fn signer(&self, service: &'static str, region: &str) -> Option<Signer> {
        Some(Signer::new(self.config.credentials_provider()?, service, region))
    }

    /// The region in use, if one was found.
    pub fn region(&self) -> Option<&str> {
        self.config.region().map(Region::as_ref)
    }
}

fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_attempt_timeout(attempt).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_printed() {
        let keys = Some(("AKIDEXAMPLE".to_owned(), "wJalrXUtnFEMI".to_owned()));
        let shown = format!("{:?}", Overrides { static_keys: keys, ..Overrides::default() });
        assert!(!shown.contains("wJalr") && !shown.contains("AKID"), "{shown}");
    }
}
