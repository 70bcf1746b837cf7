//! EC2, IMDSv2, CloudWatch Logs and credential endpoints over HTTP.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Method;
use axum::http::request::Parts;
use stanchion_core::ids::InstanceId;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::cloud::Cloud;
use super::faults::ApiError;
use super::http::{self, Dropped, Reply, header_text, play, response};
use super::sigv4::{self, Denied};
use super::{logs_wire, query, xml};

const XML: &str = "text/xml;charset=UTF-8";
const JSON: &str = "application/x-amz-json-1.1";
/// Longest life of an IMDS token: six hours.
const TOKEN_MAX_SECONDS: u64 = 21_600;
/// Longest body of a gzip-compressed request after decompression.
const MAX_INFLATED: u64 = 16 * 1024 * 1024;

/// EC2's Query API.
pub async fn serve_ec2(listener: TcpListener, cloud: Cloud) -> Infallible {
    http::serve(listener, None, move |parts, body| dated(cloud.clone(), ec2(cloud.clone(), parts, body))).await
}

/// The metadata service as one instance sees it, IMDSv2 only.
pub async fn serve_imds(listener: TcpListener, cloud: Cloud, instance: InstanceId) -> Infallible {
    let tokens = Arc::new(Mutex::new(BTreeMap::new()));
    http::serve(listener, None, move |parts, _| imds(cloud.clone(), instance.clone(), tokens.clone(), parts)).await
}

/// CloudWatch Logs; with an acceptor over TLS.
pub async fn serve_logs(listener: TcpListener, cloud: Cloud, tls: Option<TlsAcceptor>) -> Infallible {
    http::serve(listener, tls, move |parts, body| dated(cloud.clone(), logs(cloud.clone(), parts, body))).await
}

/// STS's AssumeRoleWithWebIdentity (IRSA) and the EKS Pod Identity agent (`/v1/credentials`): keys that expire after
/// `lifetime`, for whoever shows `token`.
pub async fn serve_credentials(listener: TcpListener, cloud: Cloud, token: String, lifetime: Duration) -> Infallible {
    http::serve(listener, None, move |parts, body| credentials(cloud.clone(), token.clone(), lifetime, parts, body)).await
}

/// With the cloud's time in its `Date` header.
async fn dated(cloud: Cloud, reply: impl Future<Output = Reply>) -> Reply {
    let mut reply = reply.await?;
    let now = jiff::Timestamp::from_millisecond(cloud.clock().unix_ms()).unwrap_or_default();
    if let Ok(date) = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string().parse() {
        reply.headers_mut().insert("date", date);
    }
    Ok(reply)
}

async fn ec2(cloud: Cloud, parts: Parts, body: Bytes) -> Reply {
    let denied = cloud.check_signature(&parts, &body).map_err(|denied| match denied {
        Denied::Unsigned => ApiError::bad("MissingAuthenticationToken", "Request is missing Authentication Token"),
        Denied::Expired | Denied::Skewed(_) => ApiError::bad("RequestExpired", "Request has expired."),
        Denied::UnknownKey | Denied::WrongSignature => {
            ApiError::with_status(401, "AuthFailure", "AWS was not able to validate the provided access credentials")
        }
    });
    match denied.and_then(|()| query::parse(&body)) {
        Ok(call) => play(cloud.ec2(&call), XML, |reply| xml::render(call.action(), reply), xml::render_error).await,
        Err(error) => Ok(response(error.status, XML, xml::render_error(&error))),
    }
}

async fn imds(cloud: Cloud, instance: InstanceId, tokens: Arc<Mutex<BTreeMap<String, Duration>>>, parts: Parts) -> Reply {
    let now = cloud.clock().now();
    let path = parts.uri.path();
    let plain = |status: u16, text: &str| Ok(response(status, "text/plain", text.to_owned()));
    if path == "/latest/api/token" {
        let ttl = header_text(&parts, "x-aws-ec2-metadata-token-ttl-seconds").parse::<u64>();
        let outcome = cloud.imds(path, |state| match (parts.method == Method::PUT, ttl) {
            (true, Ok(ttl @ 1..=TOKEN_MAX_SECONDS)) => Ok((state.fresh_hex(), ttl)),
            (true, _) => Err(ApiError::with_status(400, "BadRequest", "")),
            (false, _) => Err(ApiError::with_status(405, "MethodNotAllowed", "")),
        });
        if let Some(Ok((token, ttl))) = &outcome.reply {
            let mut tokens = tokens.lock().unwrap_or_else(PoisonError::into_inner);
            tokens.insert(token.clone(), now + Duration::from_secs(*ttl));
        }
        let ttl = outcome.reply.as_ref().and_then(|r| r.as_ref().ok()).map(|(_, ttl)| *ttl);
        let mut reply = play(outcome, "text/plain", |(token, _)| token.clone(), |_| String::new()).await?;
        if let Some(ttl) = ttl {
            reply.headers_mut().insert("x-aws-ec2-metadata-token-ttl-seconds", ttl.into());
        }
        return Ok(reply);
    }
    let valid = {
        let tokens = tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(header_text(&parts, "x-aws-ec2-metadata-token")).is_some_and(|until| now < *until)
    };
    if !valid {
        return plain(401, "");
    }
    if parts.method != Method::GET {
        return plain(405, "");
    }
    play(cloud.imds(path, |state| state.imds(&instance, path)), "text/plain", String::clone, |_| String::new()).await
}

async fn logs(cloud: Cloud, parts: Parts, body: Bytes) -> Reply {
    let denied = cloud.check_signature(&parts, &body).map_err(|denied| match denied {
        Denied::Unsigned => ApiError::bad("MissingAuthenticationTokenException", "Missing Authentication Token"),
        Denied::Expired => ApiError::bad("ExpiredTokenException", "The security token included in the request is expired"),
        Denied::Skewed(signed_ms) => {
            let order = if signed_ms < cloud.clock().unix_ms() { "expired" } else { "not yet current" };
            ApiError::bad("InvalidSignatureException", format!("Signature {order}: the node's clock is off"))
        }
        Denied::UnknownKey => ApiError::bad("UnrecognizedClientException", "The security token included in the request is invalid."),
        Denied::WrongSignature => {
            ApiError::bad("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
        }
    });
    let region = cloud.region();
    let call = denied.and_then(|()| {
        if header_text(&parts, "content-type") != JSON {
            return Err(ApiError::bad("UnknownOperationException", "not application/x-amz-json-1.1"));
        }
        let target = header_text(&parts, "x-amz-target");
        let emf = header_text(&parts, "x-amzn-logs-format") == "json/emf";
        match header_text(&parts, "content-encoding") {
            "" => logs_wire::parse(target, emf, &body),
            "gzip" if cloud.takes_gzip() => logs_wire::parse(target, emf, &inflate(&body)?),
            // Such an endpoint reads the compressed bytes as JSON.
            _ => Err(ApiError::bad("SerializationException", "Unexpected character")),
        }
    });
    match call {
        Ok(call) => play(cloud.logs(call), JSON, |reply| logs_wire::render(reply, &region), logs_wire::render_error).await,
        Err(error) => Ok(response(error.status, JSON, logs_wire::render_error(&error))),
    }
}

async fn credentials(cloud: Cloud, token: String, lifetime: Duration, parts: Parts, body: Bytes) -> Reply {
    if parts.method == Method::GET {
        let shown = header_text(&parts, "authorization").to_owned();
        let outcome = cloud.credential_call("PodIdentity", |state| {
            if parts.uri.path() != "/v1/credentials" || shown != token {
                return Err(ApiError::with_status(400, "InvalidToken", "the service account token is not valid"));
            }
            let key = state.mint_key(lifetime);
            Ok(serde_json::json!({
                "AccessKeyId": key.id, "SecretAccessKey": key.secret, "Token": key.session_token,
                "AccountId": "123456789012", "Expiration": key.expiration,
            })
            .to_string())
        });
        let error = |error: &ApiError| serde_json::json!({ "code": error.code, "message": error.message }).to_string();
        return play(outcome, "application/json", String::clone, error).await;
    }
    let form = query::Form::new(&body).map_err(|_| Dropped)?;
    let outcome = cloud.credential_call("AssumeRoleWithWebIdentity", |state| {
        let (action, shown) = (form.text("Action"), form.text("WebIdentityToken"));
        if action.as_deref() != Some("AssumeRoleWithWebIdentity") || form.text("RoleArn").is_none() {
            return Err(ApiError::bad("InvalidAction", "Could not find operation"));
        }
        if shown.as_ref() != Some(&token) {
            return Err(ApiError::bad("InvalidIdentityToken", "The ID Token provided is not a valid JWT."));
        }
        let key = state.mint_key(lifetime);
        Ok(format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{}</AccessKeyId><SecretAccessKey>{}</SecretAccessKey>\
             <SessionToken>{}</SessionToken><Expiration>{}</Expiration></Credentials><AssumedRoleUser>\
             <Arn>arn:aws:sts::123456789012:assumed-role/stanchion/s</Arn><AssumedRoleId>AROA:s</AssumedRoleId>\
             </AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
            key.id, key.secret, key.session_token, key.expiration
        ))
    });
    let error = |error: &ApiError| {
        format!(
            "<ErrorResponse><Error><Type>Sender</Type><Code>{}</Code><Message>{}</Message></Error></ErrorResponse>",
            error.code, error.message
        )
    };
    play(outcome, "text/xml", String::clone, error).await
}

fn inflate(body: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut text = Vec::new();
    let read = flate2::read::GzDecoder::new(body).take(MAX_INFLATED).read_to_end(&mut text);
    read.map_err(|error| ApiError::bad("SerializationException", error.to_string()))?;
    Ok(text)
}

impl Cloud {
    fn check_signature(&self, parts: &Parts, body: &[u8]) -> Result<(), Denied> {
        let (keys, now) = {
            let state = self.lock();
            (state.keys.clone(), state.now())
        };
        sigv4::check(&keys, now, self.clock().unix_ms(), parts, body)
    }
}
