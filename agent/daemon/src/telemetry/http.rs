//! A small HTTP/1.1 client for the three things that telemetry asks or tells over HTTP: the kubelet, pods that are scraped, an OTLP
//! receiver. One connection a request: each is asked once or twice a minute.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Whose certificates are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Those of the system's bundle.
    System,
    /// Those that the CA in this PEM file signed.
    File(PathBuf),
    /// Any: who listens at the address is believed.
    Anyone,
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("{url:?} is no URL of the form http://host:port/path or https://host:port/path")]
    Url { url: String },
    #[error("cannot read certificates from {}", path.display())]
    Certificates { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("no usable certificate in {}", path.display())]
    NoCertificate { path: PathBuf },
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    #[error("cannot connect to {to}")]
    Connect { to: String, source: std::io::Error },
    #[error("the exchange with {to} failed")]
    Exchange { to: String, source: hyper::Error },
    #[error("the reply of {to} is longer than {limit} bytes")]
    TooLong { to: String, limit: usize },
    #[error("the body of {to} broke off")]
    Body { to: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the request to {to} cannot be signed")]
    Sign { to: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("no reply of {to} within {within:?}")]
    Late { to: String, within: Duration },
}

/// What came back.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// What is asked.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) url: &'a str,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) body: Bytes,
    /// Bytes of the reply at most.
    pub(super) limit: usize,
    /// For the whole exchange.
    pub(super) within: Duration,
}

impl<'a> Ask<'a> {
    pub(super) fn get(url: &'a str, limit: usize, within: Duration) -> Self {
        Self { method: Method::GET, url, headers: Vec::new(), body: Bytes::new(), limit, within }
    }
}

/// Asks; TLS is set up only when a URL needs it.
pub(super) struct Client {
    trust: Trust,
    tls: Option<TlsConnector>,
}

impl Client {
    pub(super) fn new(trust: Trust) -> Self {
        Self { trust, tls: None }
    }

    /// Forgets the certificates: the file may have others by now.
    pub(super) fn forget_certificates(&mut self) {
        self.tls = None;
    }

    pub(super) async fn ask(&mut self, ask: Ask<'_>) -> Result<Reply, HttpError> {
        let (url, within) = (ask.url, ask.within);
        tokio::time::timeout(within, self.exchange(ask)).await.unwrap_or_else(|_| Err(HttpError::Late { to: url.to_owned(), within }))
    }

    async fn exchange(&mut self, ask: Ask<'_>) -> Result<Reply, HttpError> {
        let wrong = || HttpError::Url { url: ask.url.to_owned() };
        let uri: Uri = ask.url.parse().map_err(|_| wrong())?;
        let (Some(host), Some(scheme), Some(authority)) = (uri.host(), uri.scheme_str(), uri.authority()) else { return Err(wrong()) };
        let default_port = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return Err(wrong()),
        };
        // An IPv6 address stands in brackets.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let to = ask.url.to_owned();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::builder().method(ask.method).uri(path).header(HOST, authority.as_str());
        if !ask.body.is_empty() {
            request = request.header(CONTENT_LENGTH, ask.body.len());
        }
        for (name, value) in ask.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(ask.body)).map_err(|_| wrong())?;
        let port = uri.port_u16().unwrap_or(default_port);
        let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|source| HttpError::Connect { to: to.clone(), source })?;
        if scheme == "http" {
            return converse(stream, request, to, ask.limit).await;
        }
        let name = ServerName::try_from(host).map_err(|_| wrong())?;
        let stream = self.tls()?.connect(name, stream).await.map_err(|source| HttpError::Connect { to: to.clone(), source })?;
        converse(stream, request, to, ask.limit).await
    }

    fn tls(&mut self) -> Result<&TlsConnector, HttpError> {
        if self.tls.is_none() {
            self.tls = Some(TlsConnector::from(Arc::new(configuration(&self.trust)?)));
        }
        Ok(self.tls.as_ref().expect("just set"))
    }
}

async fn converse<S>(stream: S, request: Request<Full<Bytes>>, to: String, limit: usize) -> Result<Reply, HttpError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |source| HttpError::Exchange { to: to.clone(), source };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with the sender; what goes wrong there is told by the sender too.
    let connection = tokio::spawn(connection);
    let reply = sender.send_request(request).await.map_err(failed)?;
    let (parts, body) = reply.into_parts();
    let body = match Limited::new(body, limit).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => return Err(HttpError::TooLong { to, limit }),
        Err(source) => return Err(HttpError::Body { to, source }),
    };
    drop(sender);
    connection.abort();
    Ok(Reply { status: parts.status, headers: parts.headers, body })
}

fn configuration(trust: &Trust) -> Result<ClientConfig, HttpError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match trust {
        Trust::Anyone => builder.dangerous().with_custom_certificate_verifier(Arc::new(Believe(provider))),
        Trust::File(path) => builder.with_root_certificates(roots_of(path)?),
        Trust::System => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            builder.with_root_certificates(roots)
        }
    };
    Ok(builder.with_no_client_auth())
}

fn roots_of(path: &Path) -> Result<RootCertStore, HttpError> {
    let unreadable = |source| HttpError::Certificates { path: path.to_owned(), source };
    let mut roots = RootCertStore::empty();
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path).map_err(unreadable)?.collect::<Result<_, _>>().map_err(unreadable)?;
    let (taken, _) = roots.add_parsable_certificates(certificates);
    if taken == 0 { Err(HttpError::NoCertificate { path: path.to_owned() }) } else { Ok(roots) }
}

/// Takes any certificate, but still wants its key to be there.
#[derive(Debug)]
struct Believe(Arc<CryptoProvider>);

impl ServerCertVerifier for Believe {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
