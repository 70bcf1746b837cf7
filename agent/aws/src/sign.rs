//! Signature version 4 for requests that go to AWS without the SDK.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials as _, SharedCredentialsProvider};
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningError, SigningSettings, sign};
use aws_sigv4::sign::v4;
use tokio::sync::Mutex;

/// Credentials are asked for anew this long before they expire: a request signed with them may be under way for a while.
const BEFORE_EXPIRY: Duration = Duration::from_secs(300);
/// Those that do not say when they expire are asked for this often: a file or variable may have others by then.
const WITHOUT_EXPIRY: Duration = Duration::from_secs(900);

/// Why a request has no signature.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// No source gave any.
    #[error("no AWS credentials")]
    Credentials(#[from] CredentialsError),
    /// The request has no form that can be signed.
    #[error("the request cannot be signed")]
    Request(#[from] SigningError),
    /// A signing parameter is missing.
    #[error("the signature lacks a parameter")]
    Parameters(#[from] v4::signing_params::BuildError),
}

/// Signs requests to one service in one region. Clones share the credentials that they keep.
#[derive(Clone, Debug)]
pub struct Signer {
    provider: SharedCredentialsProvider,
    service: &'static str,
    region: String,
    kept: Arc<Mutex<Option<(Credentials, SystemTime)>>>,
}

impl Signer {
    pub(crate) fn new(provider: SharedCredentialsProvider, service: &'static str, region: &str) -> Self {
        Self { provider, service, region: region.to_owned(), kept: Arc::default() }
    }

    /// The headers that make a POST of `body` to `url` a signed one; `host` is what its header of that name says.
    ///
    /// # Errors
    /// When no credentials can be had, or `url` is no URL.
    pub async fn headers(&self, url: &str, host: &str, body: &[u8], now: SystemTime) -> Result<Vec<(String, String)>, SignError> {
        let identity = self.credentials(now).await?.into();
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(self.service)
            .time(now)
            .settings(SigningSettings::default())
            .build()?
            .into();
        let request = SignableRequest::new("POST", url, std::iter::once(("host", host)), SignableBody::Bytes(body))?;
        let (instructions, _) = sign(request, &parameters)?.into_parts();
        Ok(instructions.headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    async fn credentials(&self, now: SystemTime) -> Result<Credentials, CredentialsError> {
        let mut kept = self.kept.lock().await;
        if let Some((credentials, until)) = &*kept
            && now < *until
        {
            return Ok(credentials.clone());
        }
        let fresh = self.provider.provide_credentials().await?;
        let until = fresh.expiry().map_or(now + WITHOUT_EXPIRY, |expiry| expiry - BEFORE_EXPIRY);
        *kept = Some((fresh.clone(), until));
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::UNIX_EPOCH;

    use aws_credential_types::provider::{ProvideCredentials, future};

    use super::*;

    /// Gives session credentials that live an hour, and counts.
    #[derive(Debug, Default)]
    struct Hourly(Arc<AtomicU32>);

    impl ProvideCredentials for Hourly {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            let number = self.0.fetch_add(1, Ordering::Relaxed);
            let expiry = UNIX_EPOCH + Duration::from_secs(3600 * u64::from(number + 1));
            let token = Some(format!("token-{number}"));
            future::ProvideCredentials::ready(Ok(Credentials::new(format!("AKID{number}"), "secret", token, Some(expiry), "test")))
        }
    }

    #[tokio::test]
    async fn credentials_are_kept_until_shortly_before_they_expire() {
        let asked = Arc::default();
        let signer = Signer::new(SharedCredentialsProvider::new(Hourly(Arc::clone(&asked))), "monitoring", "eu-west-1");
        let at = |second| UNIX_EPOCH + Duration::from_secs(second);
        let mut seen = Vec::new();
        for second in [0, 60, 3299, 3301, 3400] {
            let headers = signer.headers("https://monitoring.eu-west-1.amazonaws.com/v1/metrics", "h", b"x", at(second)).await.unwrap();
            let header = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).unwrap_or_default();
            assert!(header("authorization").contains("/19700101/eu-west-1/monitoring/aws4_request"), "{headers:?}");
            seen.push(header("x-amz-security-token"));
        }
        assert_eq!(seen, ["token-0", "token-0", "token-0", "token-1", "token-1"]);
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
