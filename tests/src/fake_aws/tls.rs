//! TLS for the fakes, with a committed certificate that nothing but tests trusts.
//!
//! The CA's key was thrown away after it signed the one server certificate, so trusting the CA opens nothing.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// The CA, to be given to a client (`AWS_CA_BUNDLE`). The server certificate is good for localhost, 127.0.0.1,
/// 203.0.113.80, 203.0.113.81 and `*.eu-west-1.amazonaws.com`.
pub const TEST_CA_PEM: &str = include_str!("tls/ca.pem");

/// An acceptor that shows the server certificate.
pub fn test_acceptor() -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_slice(include_bytes!("tls/server.pem")).expect("a committed file");
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("tls/server.key")).expect("a committed file");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has both versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("the key belongs to the certificate");
    TlsAcceptor::from(Arc::new(config))
}
