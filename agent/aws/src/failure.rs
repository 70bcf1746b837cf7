//! An SDK error, reduced to what the product asks of it.

use std::error::Error;
use std::time::{Duration, SystemTime};

use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

use crate::classify::is_bad_credentials;

/// Below it a difference is that of a slow answer, not of a clock; signatures hold five minutes.
const TOLERATED: Duration = Duration::from_secs(240);
/// Longest pause that a service can ask for; more is taken for nonsense.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// What became of a request that gave no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The service said no.
    Refused { code: String, message: String, status: u16, retry_after: Option<Duration>, date: Option<SystemTime> },
    /// No credentials to sign with.
    NoCredentials(String),
    /// It was not sent: a mistake in the request.
    NotSent(String),
    /// Nobody knows: no reply, half a reply, or one that cannot be read.
    NoReply(String),
}

impl Failure {
    /// The service did not take the credentials, so it did nothing either.
    pub(crate) fn is_bad_credentials(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code == "AuthFailure" || is_bad_credentials(code.rsplit('#').next().unwrap_or(code)),
            _ => false,
        }
    }

    /// The service's time is far from the node's, so that no signature of it holds.
    pub(crate) fn tells_another_time(&self) -> bool {
        let Self::Refused { date: Some(date), .. } = self else { return false };
        let now = SystemTime::now();
        now.duration_since(*date).or_else(|_| date.duration_since(now)).is_ok_and(|difference| difference > TOLERATED)
    }
}

impl<E: ProvideErrorMetadata + Error + 'static> From<SdkError<E, HttpResponse>> for Failure {
    fn from(error: SdkError<E, HttpResponse>) -> Self {
        match &error {
            // A success whose body cannot be read.
            SdkError::ServiceError(context) if context.raw().status().is_success() => Self::NoReply(chain(&error)),
            SdkError::ServiceError(context) => {
                let raw = context.raw();
                let meta = context.err().meta();
                let status = raw.status().as_u16();
                let code = meta.code().map_or_else(|| format!("HTTP {status}"), str::to_owned);
                Self::Refused {
                    code,
                    message: meta.message().unwrap_or_default().to_owned(),
                    status,
                    retry_after: raw.headers().get("retry-after").and_then(parse_retry_after),
                    date: raw.headers().get("date").and_then(parse_date),
                }
            }
            SdkError::ConstructionFailure(_) if has_source::<CredentialsError>(&error) => Self::NoCredentials(chain(&error)),
            SdkError::DispatchFailure(_) if has_source::<CredentialsError>(&error) => Self::NoCredentials(chain(&error)),
            SdkError::ConstructionFailure(_) => Self::NotSent(chain(&error)),
            // An error status with a body that is no error document (a proxy's page) is still an answer.
            SdkError::ResponseError(context) if context.raw().status().is_server_error() => Self::Refused {
                code: format!("HTTP {}", context.raw().status().as_u16()),
                message: chain(&error),
                status: context.raw().status().as_u16(),
                retry_after: context.raw().headers().get("retry-after").and_then(parse_retry_after),
                date: None,
            },
            _ => Self::NoReply(chain(&error)),
        }
    }
}

/// Every message of the chain, without repeating one.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if !text.ends_with(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        source = cause.source();
    }
    text
}

fn has_source<T: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if cause.is::<T>() {
            return true;
        }
        source = cause.source();
    }
    false
}

/// Seconds; the form with a date is not used by the services.
fn parse_retry_after(text: &str) -> Option<Duration> {
    let seconds = text.trim().parse::<u64>().ok()?;
    Some(Duration::from_secs(seconds)).filter(|pause| *pause <= MAX_RETRY_AFTER)
}

/// The form of HTTP's `Date` header (RFC 9110, IMF-fixdate).
fn parse_date(text: &str) -> Option<SystemTime> {
    SystemTime::try_from(DateTime::from_str(text.trim(), Format::HttpDate).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_servers_write_them() {
        let seconds = |text| parse_date(text)?.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs());
        assert_eq!(seconds("Fri, 20 Nov 2026 10:00:13 GMT"), Some(1_795_168_813));
        for nonsense in ["", "now", "2026-11-20T10:00:13Z"] {
            assert_eq!(seconds(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn retry_after_is_seconds_within_reason() {
        assert_eq!(parse_retry_after(" 7 "), Some(Duration::from_secs(7)));
        for nonsense in ["", "-1", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", "99999999999999999999", "301"] {
            assert_eq!(parse_retry_after(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn a_chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        assert_eq!(chain(&Outer(std::io::Error::other("inner"))), "outer: inner");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("refused")]
    struct Told(#[source] aws_smithy_types::error::ErrorMetadata);

    impl ProvideErrorMetadata for Told {
        fn meta(&self) -> &aws_smithy_types::error::ErrorMetadata {
            &self.0
        }
    }

    fn response(status: u16, headers: &[(&'static str, &'static str)]) -> HttpResponse {
        let status = aws_smithy_runtime_api::http::StatusCode::try_from(status).expect("a status");
        let mut response = HttpResponse::new(status, aws_smithy_types::body::SdkBody::empty());
        headers.iter().for_each(|(name, value)| drop(response.headers_mut().insert(*name, *value)));
        response
    }

    /// What decides whether a call is repeated, and whether what it asked for may have happened.
    #[test]
    fn each_way_to_fail_is_told_apart() {
        let no_keys = || CredentialsError::not_loaded("no provider has any");
        let told = |code: Option<&str>| {
            let meta = aws_smithy_types::error::ErrorMetadata::builder().message("because");
            Told(code.into_iter().fold(meta, |meta, code| meta.code(code)).build())
        };
        let broken = || std::io::Error::other("broken");
        let name = |error: SdkError<Told, HttpResponse>| match Failure::from(error) {
            Failure::Refused { code, status, retry_after, .. } => format!("{code} {status} {retry_after:?}"),
            Failure::NoCredentials(_) => "no credentials".to_owned(),
            Failure::NotSent(_) => "not sent".to_owned(),
            Failure::NoReply(_) => "no reply".to_owned(),
        };
        for (error, want) in [
            (SdkError::construction_failure(no_keys()), "no credentials"),
            (SdkError::construction_failure(broken()), "not sent"),
            (SdkError::timeout_error(broken()), "no reply"),
            (SdkError::response_error(broken(), response(200, &[])), "no reply"),
            (SdkError::response_error(broken(), response(404, &[])), "no reply"),
            (SdkError::response_error(broken(), response(503, &[("retry-after", "7")])), "HTTP 503 503 Some(7s)"),
            (SdkError::service_error(told(Some("Busy")), response(400, &[])), "Busy 400 None"),
            (SdkError::service_error(told(None), response(502, &[("retry-after", "soon")])), "HTTP 502 502 None"),
            (SdkError::service_error(told(Some("Odd")), response(200, &[])), "no reply"),
        ] {
            assert_eq!(name(error), want);
        }
    }
}
