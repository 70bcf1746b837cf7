//! The fake API behind TLS, as a real one is: its clients may show a certificate.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, crypto::ring};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// The CA of the client certificates below; its key was thrown away.
const CLIENT_CA: &[u8] = include_bytes!("tls/client-ca.pem");
/// A client certificate and its key, PEM.
pub const CLIENT_1: (&str, &str) = (include_str!("tls/client1.pem"), include_str!("tls/client1.key"));
/// The certificate that follows it.
pub const CLIENT_2: (&str, &str) = (include_str!("tls/client2.pem"), include_str!("tls/client2.key"));

/// A listener for axum; the certificates that clients showed are kept.
pub struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    shown: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl TlsListener {
    /// On a free port of 127.0.0.1, with the server certificate of [`crate::fake_aws::TEST_CA_PEM`]'s CA. A client
    /// certificate is optional, and must be of the client CA.
    ///
    /// # Errors
    /// No port is free.
    pub async fn bind() -> anyhow::Result<Self> {
        Self::over(TcpListener::bind("127.0.0.1:0").await?)
    }

    /// The same over a socket that is bound to an address of 127.0.0.0/8, maybe in another network namespace.
    ///
    /// # Errors
    /// The committed certificates cannot be read.
    pub fn over(tcp: TcpListener) -> anyhow::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(CLIENT_CA)?)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).allow_unauthenticated().build()?;
        let certificate = CertificateDer::from_pem_slice(include_bytes!("../fake_aws/tls/server.pem"))?;
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("../fake_aws/tls/server.key"))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)?;
        Ok(Self { tcp, acceptor: TlsAcceptor::from(Arc::new(config)), shown: Arc::default() })
    }

    /// `https://127.0.0.1:port`.
    ///
    /// # Errors
    /// The socket has no address.
    pub fn url(&self) -> anyhow::Result<String> {
        Ok(format!("https://{}", self.tcp.local_addr()?))
    }

    /// The client certificates (DER) shown so far, in order of connections; filled in while it serves.
    pub fn shown(&self) -> Arc<Mutex<Vec<Vec<u8>>>> {
        Arc::clone(&self.shown)
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.tcp.accept().await else { continue };
            let Ok(stream) = self.acceptor.accept(stream).await else { continue };
            if let Some(certificate) = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
                self.shown.lock().expect("no holder panics").push(certificate.to_vec());
            }
            return (stream, address);
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
