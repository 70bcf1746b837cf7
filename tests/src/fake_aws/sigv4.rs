//! Checks request signatures, so that a body changed after signing fails here as it does at AWS.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::http::request::Parts;
use sha2::{Digest as _, Sha256};

use super::http::header_text;
use super::model::AccessKey;

/// Why a request is not taken; the services word it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// Not signed at all.
    Unsigned,
    /// An access key or session token that does not exist.
    UnknownKey,
    /// The session has ended.
    Expired,
    /// Signed at another time than this; as written.
    Skewed(i64),
    /// The signature is not that of this request.
    WrongSignature,
}

/// A signature holds five minutes.
const MAX_SKEW_MS: i64 = 300_000;

/// `20261120T100013Z` in milliseconds since 1970.
fn signed_at_ms(date: &str) -> Option<i64> {
    jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", date)
        .ok()?
        .to_zoned(jiff::tz::TimeZone::UTC)
        .ok()
        .map(|at| at.timestamp().as_millisecond())
}

/// Checks a request against the known keys. Without any key only a signature of the right form is asked for.
pub(super) fn check(keys: &BTreeMap<String, AccessKey>, now: Duration, unix_ms: i64, parts: &Parts, body: &[u8]) -> Result<(), Denied> {
    let fields = header_text(parts, "authorization").strip_prefix("AWS4-HMAC-SHA256 ").ok_or(Denied::Unsigned)?;
    let field = |name: &str| fields.split(',').find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('=')).ok_or(Denied::Unsigned);
    let (id, scope) = field("Credential")?.split_once('/').ok_or(Denied::Unsigned)?;
    let (signed_headers, signature) = (field("SignedHeaders")?, field("Signature")?);
    if keys.is_empty() {
        return Ok(());
    }
    let key = keys.get(id).ok_or(Denied::UnknownKey)?;
    if key.session_token.as_deref().unwrap_or_default() != header_text(parts, "x-amz-security-token") {
        return Err(Denied::UnknownKey);
    }
    if key.expires.is_some_and(|expires| expires <= now) {
        return Err(Denied::Expired);
    }
    let canonical = canonical_request(parts, signed_headers, body);
    let date = header_text(parts, "x-amz-date");
    let signed_ms = signed_at_ms(date).ok_or(Denied::WrongSignature)?;
    if (signed_ms - unix_ms).abs() > MAX_SKEW_MS {
        return Err(Denied::Skewed(signed_ms));
    }
    let to_sign = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
    let mut signing_key = format!("AWS4{}", key.secret).into_bytes();
    for part in scope.split('/') {
        signing_key = hmac(&signing_key, part.as_bytes()).to_vec();
    }
    if hex(&hmac(&signing_key, to_sign.as_bytes())) == signature { Ok(()) } else { Err(Denied::WrongSignature) }
}

/// The scope (`date/region/service/aws4_request`) of a request that the key's secret signed.
///
/// # Errors
/// Says what is wrong with the signature.
pub fn signed_scope(key: (&str, &str), parts: &Parts, body: &[u8]) -> Result<String, String> {
    let access = AccessKey { secret: key.1.to_owned(), session_token: None, expires: None };
    // The agent signs with the time of this machine.
    let now_ms = jiff::Timestamp::now().as_millisecond();
    check(&BTreeMap::from([(key.0.to_owned(), access)]), Duration::ZERO, now_ms, parts, body).map_err(|denied| format!("{denied:?}"))?;
    let fields = header_text(parts, "authorization");
    let scope = fields.split_once("Credential=").and_then(|(_, rest)| rest.split(',').next()?.split_once('/'));
    scope.map(|(_, scope)| scope.to_owned()).ok_or_else(|| "no scope".to_owned())
}

fn canonical_request(parts: &Parts, signed_headers: &str, body: &[u8]) -> String {
    let mut query: Vec<&str> = parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).collect();
    query.sort_unstable();
    let mut text = format!("{}\n{}\n{}\n", parts.method, parts.uri.path(), query.join("&"));
    for name in signed_headers.split(';') {
        let value = header_text(parts, name).split_whitespace().collect::<Vec<_>>().join(" ");
        text.push_str(&format!("{name}:{value}\n"));
    }
    text.push_str(&format!("\n{signed_headers}\n{}", hex(&Sha256::digest(body))));
    text
}

/// HMAC-SHA256 (RFC 2104).
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_is_rfc_4231s() {
        let mac = hmac(b"Jefe", b"what do ya want for nothing?");
        assert_eq!(hex(&mac), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        let mac = hmac(&[0xaa; 131], b"Test Using Larger Than Block-Size Key - Hash Key First");
        assert_eq!(hex(&mac), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    }
}
