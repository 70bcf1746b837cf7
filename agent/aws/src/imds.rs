//! The instance metadata service over the SDK's IMDSv2 client.
//!
//! The SDK keeps its token until the node's clock says that it has expired, whatever the service says of it: after a clock that was set
//! back, or a token that came damaged, every read would end with 401 for hours. So a client whose token is refused is replaced.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use aws_config::imds::client::Client;
use aws_config::imds::client::error::ImdsError as SdkError;
use aws_config::provider_config::ProviderConfig;
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction, SharedRetryClassifier};
use ipnet::{Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{Imds, ImdsEni, ImdsError, InstanceIdentity};
use stanchion_core::ids::{EniId, InstanceId, Mac, SecurityGroupId, SubnetId, VpcId};

use crate::failure::chain;
use crate::renew::Renewable;
use crate::{LoadError, http};

/// To the link-local address, which is on the same machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// One answer. IMDS answers within milliseconds; under its own throttle (1,024 packets a second an ENI) it stays silent.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// An answer with the client's retries of 5xx.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);
/// Tries of one read within [`OPERATION_TIMEOUT`].
const ATTEMPTS: u32 = 3;

const MACS: &str = "meta-data/network/interfaces/macs/";

/// The token was not taken.
const UNAUTHORIZED: u16 = 401;

/// [`Imds`] over the SDK: token handling and retries are the SDK's. Reads one path after the other on one connection.
#[derive(Clone, Debug)]
pub struct SdkImds {
    client: Renewable<Client>,
}

/// Answers that the same client is asked for again. Not 401: it would send the same token.
#[derive(Debug)]
struct ServerErrors;

impl ClassifyRetry for ServerErrors {
    fn name(&self) -> &'static str {
        "server errors"
    }

    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        match context.response() {
            Some(response) if response.status().is_server_error() => RetryAction::server_error(),
            _ => RetryAction::NoActionIndicated,
        }
    }
}

impl SdkImds {
    /// A client for `endpoint`, or where `AWS_EC2_METADATA_SERVICE_ENDPOINT` (then 169.254.169.254) points; sends nothing.
    ///
    /// # Errors
    /// When the endpoint is no URI.
    pub fn new(endpoint: Option<&str>) -> Result<Self, LoadError> {
        let config = ProviderConfig::default().with_http_client(http::link_local_client());
        let mut builder = Client::builder()
            .configure(&config)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(ATTEMPT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .operation_timeout(OPERATION_TIMEOUT)
            .max_attempts(ATTEMPTS)
            .retry_classifier(SharedRetryClassifier::new(ServerErrors));
        if let Some(endpoint) = endpoint {
            builder =
                builder.endpoint(endpoint).map_err(|error| LoadError::BadEndpoint { text: endpoint.to_owned(), why: error.to_string() })?;
        }
        Ok(Self { client: Renewable::new(move || builder.clone().build()) })
    }

    /// A value under `latest/`; `None` when IMDS has none.
    async fn get(&self, path: &str) -> Result<Option<String>, ImdsError> {
        let (number, client) = self.client.get();
        let mut answer = client.get(format!("/latest/{path}")).await;
        if status(&answer) == Some(UNAUTHORIZED) {
            self.client.renew(number);
            answer = self.client.get().1.get(format!("/latest/{path}")).await;
        }
        // The SDK's own text prints the whole response.
        match (status(&answer), answer) {
            (_, Ok(text)) => Ok(Some(String::from(text))),
            (Some(404), _) => Ok(None),
            (Some(status), _) => Err(ImdsError::Unreachable { path: path.to_owned(), message: format!("status {status}") }),
            (None, Err(error)) => Err(ImdsError::Unreachable { path: path.to_owned(), message: chain(&error) }),
        }
    }

    async fn value<T: FromStr<Err: Display>>(&self, path: &str) -> Result<Option<T>, ImdsError> {
        let Some(text) = self.get(path).await? else { return Ok(None) };
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        parse(path, text).map(Some)
    }

    /// One value a line; nothing there is an empty list.
    async fn list<T: FromStr<Err: Display>>(&self, path: &str) -> Result<Vec<T>, ImdsError> {
        let text = self.get(path).await?.unwrap_or_default();
        text.split_whitespace().map(|text| parse(path, text)).collect()
    }

    async fn needed<T: FromStr<Err: Display>>(&self, path: &str) -> Result<T, ImdsError> {
        let missing = || ImdsError::Unreachable { path: path.to_owned(), message: "status 404".to_owned() };
        self.value(path).await?.ok_or_else(missing)
    }

    /// The ENI, or `None` while its fields are not complete.
    async fn eni(&self, mac: Mac) -> Result<Option<ImdsEni>, ImdsError> {
        let Some(fields) = self.get(&format!("{MACS}{mac}/")).await? else { return Ok(None) };
        let eni = EniFields { imds: self, mac, fields };
        let (Some(id), Some(device_index), Some(subnet), Some(vpc)) = (
            eni.value::<String>("interface-id").await?,
            eni.value("device-number").await?,
            eni.value::<String>("subnet-id").await?,
            eni.value::<String>("vpc-id").await?,
        ) else {
            return Ok(None);
        };
        let groups: Vec<String> = eni.list("security-group-ids").await?;
        Ok(Some(ImdsEni {
            mac,
            id: EniId::new(id),
            device_index,
            network_card: eni.value("network-card").await?.unwrap_or(0),
            subnet: SubnetId::new(subnet),
            subnet_cidr: eni.value("subnet-ipv4-cidr-block").await?,
            subnet_ipv6_cidrs: eni.list("subnet-ipv6-cidr-blocks").await?,
            vpc: VpcId::new(vpc),
            security_groups: groups.into_iter().map(SecurityGroupId::new).collect(),
            local_ipv4s: eni.list("local-ipv4s").await?,
            prefixes_v4: eni.list("ipv4-prefix").await?,
            ipv6s: eni.list("ipv6s").await?,
            prefixes_v6: eni.list("ipv6-prefix").await?,
        }))
    }
}

/// An ENI's directory: only what it lists is asked for, so that an IPv4 ENI costs no 404s.
struct EniFields<'a> {
    imds: &'a SdkImds,
    mac: Mac,
    fields: String,
}

impl EniFields<'_> {
    fn path(&self, field: &str) -> Option<String> {
        let listed = self.fields.split_whitespace().any(|listed| listed.trim_end_matches('/') == field);
        listed.then(|| format!("{MACS}{}/{field}", self.mac))
    }

    async fn value<T: FromStr<Err: Display>>(&self, field: &str) -> Result<Option<T>, ImdsError> {
        match self.path(field) {
            Some(path) => self.imds.value(&path).await,
            None => Ok(None),
        }
    }

    async fn list<T: FromStr<Err: Display>>(&self, field: &str) -> Result<Vec<T>, ImdsError> {
        match self.path(field) {
            Some(path) => self.imds.list(&path).await,
            None => Ok(Vec::new()),
        }
    }
}

impl Imds for SdkImds {
    async fn identity(&self) -> Result<InstanceIdentity, ImdsError> {
        let instance: String = self.needed("meta-data/instance-id").await?;
        Ok(InstanceIdentity {
            instance: InstanceId::new(instance),
            instance_type: self.needed("meta-data/instance-type").await?,
            region: self.needed("meta-data/placement/region").await?,
            availability_zone: self.needed("meta-data/placement/availability-zone").await?,
            primary_mac: self.needed("meta-data/mac").await?,
            local_ipv4: self.value("meta-data/local-ipv4").await?,
            ipv6: self.value("meta-data/ipv6").await?,
            auto_scaling_group: self.value("meta-data/tags/instance/aws:autoscaling:groupName").await?,
        })
    }

    async fn enis(&self) -> Result<Vec<ImdsEni>, ImdsError> {
        let listed = self.get(MACS).await?.unwrap_or_default();
        let mut enis = Vec::new();
        for mac in listed.split_whitespace() {
            let mac = parse(MACS, mac.trim_end_matches('/'))?;
            enis.extend(self.eni(mac).await?);
        }
        Ok(enis)
    }

    async fn vpc_ipv4_cidrs(&self, primary: Mac) -> Result<Vec<Ipv4Net>, ImdsError> {
        self.list(&format!("{MACS}{primary}/vpc-ipv4-cidr-blocks")).await
    }

    async fn vpc_ipv6_cidrs(&self, primary: Mac) -> Result<Vec<Ipv6Net>, ImdsError> {
        self.list(&format!("{MACS}{primary}/vpc-ipv6-cidr-blocks")).await
    }
}

/// Of an answer that is an error.
fn status<T>(answer: &Result<T, SdkError>) -> Option<u16> {
    match answer {
        Err(SdkError::ErrorResponse(error)) => Some(error.response().status().as_u16()),
        _ => None,
    }
}

fn parse<T: FromStr<Err: Display>>(path: &str, text: &str) -> Result<T, ImdsError> {
    text.parse().map_err(|error: T::Err| {
        let text = text.chars().take(120).collect();
        ImdsError::Unreadable { path: path.to_owned(), text, message: error.to_string() }
    })
}
