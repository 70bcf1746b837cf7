//! The one place where an HTTP client is built: rustls with ring, as everywhere in the product.
//!
//! The SDK is built without its default client, so every SDK client must be handed one of these; an IMDS client without
//! one panics in debug builds and fails each request in release builds.

use std::path::Path;

use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector, proxy::ProxyConfig};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::LoadError;

/// Where certificates are looked for by the SDK (rustls-native-certs) on the distributions that nodes run.
const CERTIFICATE_PLACES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A client for AWS endpoints: TLS, and a proxy where `HTTPS_PROXY` and its kin name one.
pub(crate) fn aws_client(ca_bundle: Option<&Path>) -> Result<SharedHttpClient, LoadError> {
    let mut trust = TrustStore::empty().with_native_roots(machine_has_certificates());
    if let Some(path) = ca_bundle {
        trust = trust.with_pem_certificate(read_bundle(path)?);
    }
    Ok(client(trust, ProxyConfig::from_env()))
}

/// A client for the link-local metadata service: never through a proxy.
pub(crate) fn link_local_client() -> SharedHttpClient {
    client(TrustStore::empty(), ProxyConfig::disabled())
}

fn client(trust: TrustStore, proxy: ProxyConfig) -> SharedHttpClient {
    let context = TlsContext::builder().with_trust_store(trust).build().unwrap_or_default();
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector =
            Connector::builder().tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(context.clone()).proxy_config(proxy.clone());
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(|components| components.sleep_impl()));
        connector.build()
    })
}

/// Without any certificate the SDK's TLS set-up asserts; a client for plain HTTP endpoints must still work there.
fn machine_has_certificates() -> bool {
    let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"].iter().any(|name| std::env::var_os(name).is_some());
    let has = named || CERTIFICATE_PLACES.iter().any(|place| Path::new(place).exists());
    if !has {
        tracing::warn!("no CA certificates found: HTTPS endpoints cannot be verified, only plain HTTP ones work");
    }
    has
}

/// Reads and checks a PEM bundle; the SDK panics on a broken one.
fn read_bundle(path: &Path) -> Result<Vec<u8>, LoadError> {
    let pem = std::fs::read(path).map_err(|source| LoadError::ReadBundle { path: path.to_owned(), source })?;
    let bad = |why: String| LoadError::BadBundle { path: path.to_owned(), why };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(bad("no certificate in it".to_owned()));
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_bundle_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        assert!(matches!(aws_client(Some(&path)), Err(LoadError::ReadBundle { .. })));
        for text in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&path, text).unwrap();
            let error = aws_client(Some(&path)).unwrap_err();
            assert!(matches!(&error, LoadError::BadBundle { .. }), "{text:?}: {error:?}");
            assert!(error.to_string().contains("ca.pem"));
        }
    }
}
