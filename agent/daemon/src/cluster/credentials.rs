//! Who the agent is to the API server: the service account, or a kubeconfig; both change while it runs.
//!
//! Token files are read again by the client at least once a minute. What the client reads only once (the kubeconfig itself,
//! client certificates, CAs) is looked at here, and a new client is made when it changed.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::ConfigExt as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::limits::Limits;

/// How often files are compared with what the client was made from. A rotated certificate overlaps its predecessor by
/// hours.
const LOOK_EVERY: Duration = Duration::from_secs(20);
/// A silent connection is probed after this time ...
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// ... this often ...
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// ... and given up after so many unanswered probes: a watch only listens, so nothing else would notice that the other
/// end is gone.
const KEEPALIVE_TRIES: u32 = 3;
/// Time until the answer to a request begins, connecting and TLS included.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// The client in force, and notice of later ones.
pub type Clients = watch::Receiver<Client>;

/// A client for a kubeconfig, or for the service account when there is none, renewed when its files change. `endpoint`
/// (CLUSTER_ENDPOINT) replaces the address, so that nothing depends on kube-proxy at boot.
///
/// # Errors
/// No credentials are found, they cannot be read, or they are of a kind that is refused.
pub async fn connect(kubeconfig: Option<&Path>, endpoint: &str, shutdown: CancellationToken) -> anyhow::Result<Clients> {
    let Some(path) = kubeconfig else {
        let mut config =
            kube::Config::incluster().context("no service account: pass --kubeconfig, or --manifests for a cluster without API server")?;
        point_at(&mut config, endpoint)?;
        return Ok(fixed(build(&config)?));
    };
    let (client, seen) = from_kubeconfig(path, endpoint).await?;
    let (publish, clients) = watch::channel(client);
    let (path, endpoint) = (path.to_owned(), endpoint.to_owned());
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = renew(path, endpoint, seen, publish) => {}
        }
    });
    Ok(clients)
}

/// A client that never changes.
pub fn fixed(client: Client) -> Clients {
    watch::channel(client).1
}

/// A client for a plain HTTP endpoint without credentials: a proxy beside the agent, or a test.
///
/// # Errors
/// The URL cannot be read.
pub fn plain(url: &str) -> anyhow::Result<Client> {
    build(&kube::Config::new(url.parse()?))
}

async fn renew(path: PathBuf, endpoint: String, mut seen: Vec<Seen>, publish: watch::Sender<Client>) {
    let mut complaint = String::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if !seen.iter().any(Seen::has_changed) {
            continue;
        }
        match from_kubeconfig(&path, &endpoint).await {
            Ok((client, read)) => {
                info!(kubeconfig = %path.display(), "credentials changed: a new client is used");
                seen = read;
                complaint.clear();
                if publish.send(client).is_err() {
                    return;
                }
            }
            // A file may be half-written: the old client stays, and the files are looked at again.
            Err(error) => {
                let text = format!("{error:#}");
                if text != complaint {
                    warn!(error = text, "the changed credentials cannot be used; the old ones stay in force");
                    complaint = text;
                }
            }
        }
    }
}

/// A file as it was just before it was read: what is written to it from then on is a change.
struct Seen {
    path: PathBuf,
    signature: Option<(SystemTime, u64)>,
}

impl Seen {
    fn now(path: PathBuf) -> Self {
        Self { signature: Self::signature(&path), path }
    }

    fn has_changed(&self) -> bool {
        Self::signature(&self.path) != self.signature
    }

    /// Modification time and length; `None` for what cannot be asked.
    fn signature(path: &Path) -> Option<(SystemTime, u64)> {
        std::fs::metadata(path).ok().and_then(|meta| Some((meta.modified().ok()?, meta.len())))
    }
}

/// The client, and the files that it was made from.
async fn from_kubeconfig(path: &Path, endpoint: &str) -> anyhow::Result<(Client, Vec<Seen>)> {
    let shown = path.display();
    let mut seen = vec![Seen::now(path.to_owned())];
    let file = Kubeconfig::read_from(path).with_context(|| format!("read the kubeconfig {shown}"))?;
    refuse_programs(&file, path)?;
    refuse_proxies(&file, path)?;
    let clients =
        file.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()).flat_map(|auth| [&auth.client_certificate, &auth.client_key]);
    let authorities = file.clusters.iter().filter_map(|named| named.cluster.as_ref()).map(|cluster| &cluster.certificate_authority);
    seen.extend(clients.chain(authorities).flatten().map(|named| Seen::now(named.into())));
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("use the kubeconfig {shown}"))?;
    point_at(&mut config, endpoint)?;
    Ok((build(&config).with_context(|| format!("use the kubeconfig {shown}"))?, seen))
}

/// The agent is root and runs nothing that it was not shipped with.
fn refuse_programs(file: &Kubeconfig, path: &Path) -> anyhow::Result<()> {
    let context = file.current_context.as_deref().unwrap_or_default();
    let user = file.contexts.iter().find(|c| c.name == context).and_then(|c| c.context.as_ref()).and_then(|c| c.user.as_deref());
    let auth = file.auth_infos.iter().find(|a| Some(a.name.as_str()) == user).and_then(|a| a.auth_info.as_ref());
    let Some(auth) = auth else { return Ok(()) };
    let (shown, user) = (path.display(), user.unwrap_or_default());
    let remedy = "use a client certificate, a token or a tokenFile, or run in the cluster with a service account";
    if let Some(exec) = &auth.exec {
        let command = exec.command.as_deref().unwrap_or("a program");
        bail!("{shown}: user {user:?} gets its credentials by running {command:?} (exec), which the agent does not do: {remedy}");
    }
    if let Some(provider) = &auth.auth_provider {
        bail!(
            "{shown}: user {user:?} gets its credentials from the auth-provider {:?}, which the agent does not know: {remedy}",
            provider.name
        );
    }
    Ok(())
}

/// Requests would go past it unseen.
fn refuse_proxies(file: &Kubeconfig, path: &Path) -> anyhow::Result<()> {
    let with_proxy = |named: &&kube::config::NamedCluster| named.cluster.as_ref().is_some_and(|cluster| cluster.proxy_url.is_some());
    match file.clusters.iter().find(with_proxy) {
        None => Ok(()),
        Some(named) => bail!(
            "{}: cluster {:?} is reached by a proxy (proxy-url), which the agent does not do: take it out, or name an address that nodes reach",
            path.display(),
            named.name
        ),
    }
}

fn point_at(config: &mut kube::Config, endpoint: &str) -> anyhow::Result<()> {
    if endpoint.is_empty() {
        return Ok(());
    }
    let url = if endpoint.contains("://") { endpoint.to_owned() } else { format!("https://{endpoint}") };
    config.cluster_url = url.parse().with_context(|| format!("CLUSTER_ENDPOINT={endpoint:?} is no URL such as https://host:443"))?;
    Ok(())
}

/// kube's own stack, over connections that notice when the other end is gone.
fn build(config: &kube::Config) -> anyhow::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_keepalive(Some(KEEPALIVE_AFTER));
    connector.set_keepalive_interval(Some(KEEPALIVE_EVERY));
    connector.set_keepalive_retries(Some(KEEPALIVE_TRIES));
    connector.set_connect_timeout(Some(Duration::from_secs(10)));
    let connector = config.rustls_https_connector_with_connector(connector).context("the API server's CA or the client certificate")?;
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    let limits = Limits::default();
    let bounded = tower::service_fn(move |request: axum::http::Request<kube::client::Body>| {
        let (client, limits) = (client.clone(), limits.clone());
        async move {
            let uri = request.uri().clone();
            limits.admit(&uri).await;
            let answer = match tokio::time::timeout(ANSWER_WITHIN, client.request(request)).await {
                Ok(answer) => answer.map_err(tower::BoxError::from),
                Err(_) => Err(tower::BoxError::from(format!("no answer within {} s", ANSWER_WITHIN.as_secs()))),
            };
            if !answer.as_ref().is_ok_and(|answer| answer.status().is_success()) {
                limits.refused(&uri);
            }
            answer
        }
    });
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("the API server's credentials")?)
        .layer(config.extra_headers_layer().context("the kubeconfig's headers")?)
        .map_err(tower::BoxError::from)
        .service(bounded);
    Ok(Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(user: &str) -> Kubeconfig {
        let text = format!(
            "{{\"apiVersion\":\"v1\",\"kind\":\"Config\",\"current-context\":\"c\",\"contexts\":[{{\"name\":\"c\",\"context\":{{\"cluster\":\"k\",\"user\":\"u\"}}}}],\
             \"clusters\":[{{\"name\":\"k\",\"cluster\":{{\"server\":\"https://127.0.0.1:1\"}}}}],\"users\":[{{\"name\":\"u\",\"user\":{user}}}]}}"
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn programs_are_refused_by_name_with_a_remedy() {
        let exec = kubeconfig(r#"{"exec":{"apiVersion":"client.authentication.k8s.io/v1","command":"aws"}}"#);
        let error = refuse_programs(&exec, Path::new("/k")).unwrap_err().to_string();
        assert!(error.starts_with("/k: user \"u\" gets its credentials by running \"aws\""), "{error}");
        assert!(error.contains("tokenFile"), "{error}");
        assert!(refuse_programs(&kubeconfig(r#"{"auth-provider":{"name":"gcp","config":{}}}"#), Path::new("/k")).is_err());
        assert!(refuse_programs(&kubeconfig(r#"{"token":"t"}"#), Path::new("/k")).is_ok());
    }

    #[test]
    fn a_proxy_is_refused_rather_than_passed_by() {
        let mut file = kubeconfig(r#"{"token":"t"}"#);
        assert!(refuse_proxies(&file, Path::new("/k")).is_ok());
        file.clusters[0].cluster.as_mut().unwrap().proxy_url = Some("http://proxy:3128".to_owned());
        let error = refuse_proxies(&file, Path::new("/k")).unwrap_err().to_string();
        assert!(error.starts_with("/k: cluster \"k\" is reached by a proxy"), "{error}");
    }

    #[test]
    fn an_endpoint_may_leave_out_its_scheme() {
        let mut config = kube::Config::new("https://10.100.0.1".parse().unwrap());
        point_at(&mut config, "abc.gr7.eu-west-1.eks.amazonaws.com:443").unwrap();
        assert_eq!(config.cluster_url.to_string(), "https://abc.gr7.eu-west-1.eks.amazonaws.com:443/");
        point_at(&mut config, "").unwrap();
        assert_eq!(config.cluster_url.host(), Some("abc.gr7.eu-west-1.eks.amazonaws.com"));
        assert!(point_at(&mut config, "https://no host").is_err());
    }
}
