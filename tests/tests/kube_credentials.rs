//! Who the agent is to the API server: every form of kubeconfig over TLS, and credentials that change under it.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use stanchion_daemon::cluster::credentials::{self, Clients};
use stanchion_lab::fake_aws::TEST_CA_PEM;
use stanchion_lab::fake_kube::FakeKube;
use stanchion_lab::fake_kube::tls::{CLIENT_1, CLIENT_2, TlsListener};
use tokio_util::sync::{CancellationToken, DropGuard};

struct World {
    kube: FakeKube,
    url: String,
    shown: Arc<Mutex<Vec<Vec<u8>>>>,
    directory: tempfile::TempDir,
    shutdown: CancellationToken,
    _guard: DropGuard,
}

async fn world() -> World {
    let kube = FakeKube::default();
    kube.serve_collection("/api/v1/pods");
    let listener = TlsListener::bind().await.unwrap();
    let (url, shown) = (listener.url().unwrap(), listener.shown());
    tokio::spawn(kube.clone().serve(listener));
    let shutdown = CancellationToken::new();
    World { kube, url, shown, directory: tempfile::tempdir().unwrap(), _guard: shutdown.clone().drop_guard(), shutdown }
}

impl World {
    fn write(&self, name: &str, content: &str) {
        let temporary = self.directory.path().join(format!(".{name}"));
        std::fs::write(&temporary, content).unwrap();
        std::fs::rename(temporary, self.directory.path().join(name)).unwrap();
    }

    /// A kubeconfig of this cluster part and user part (JSON without braces).
    fn kubeconfig(&self, cluster: &str, user: &str) -> std::path::PathBuf {
        self.kubeconfig_for(&self.url, cluster, user)
    }

    fn kubeconfig_for(&self, url: &str, cluster: &str, user: &str) -> std::path::PathBuf {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{server: {url:?}, {cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
        );
        self.write("kubeconfig", &text);
        self.directory.path().join("kubeconfig")
    }

    async fn connect(&self, kubeconfig: &Path, endpoint: &str) -> anyhow::Result<Clients> {
        credentials::connect(Some(kubeconfig), endpoint, self.shutdown.clone()).await
    }
}

async fn list(client: Client) -> Result<usize, kube::Error> {
    let pods = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    let api: Api<DynamicObject> = Api::all_with(client, &pods);
    api.list(&Default::default()).await.map(|list| list.items.len())
}

fn base64(text: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |n: u32| char::from(ALPHABET[(n & 63) as usize]);
    text.as_bytes()
        .chunks(3)
        .map(|chunk| {
            let bits = chunk.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            let four: String = [18, 12, 6, 0].map(|shift| digit(bits >> shift)).iter().collect();
            format!("{}{}", &four[..chunk.len() + 1], "=".repeat(3 - chunk.len()))
        })
        .collect()
}

#[tokio::test]
async fn certificates_as_data_and_as_relative_files_are_shown_to_a_server_whose_ca_is_checked() {
    let world = world().await;
    world.write("ca.pem", TEST_CA_PEM);
    world.write("client.pem", CLIENT_1.0);
    world.write("client.key", CLIENT_1.1);
    let data = format!("client-certificate-data: {}, client-key-data: {}", base64(CLIENT_1.0), base64(CLIENT_1.1));
    let forms = [
        (format!("certificate-authority-data: {}", base64(TEST_CA_PEM)), data.clone()),
        ("certificate-authority: ca.pem".to_owned(), "client-certificate: client.pem, client-key: client.key".to_owned()),
    ];
    for (index, (cluster, user)) in forms.iter().enumerate() {
        let clients = world.connect(&world.kubeconfig(cluster, user), "").await.unwrap();
        assert_eq!(list(clients.borrow().clone()).await.unwrap(), 0);
        assert_eq!(world.shown.lock().unwrap().len(), index + 1, "the certificate was shown");
    }
    // Without the CA the server is not believed.
    let clients = world.connect(&world.kubeconfig("", &data), "").await.unwrap();
    assert!(list(clients.borrow().clone()).await.is_err());
}

#[tokio::test]
async fn the_endpoint_replaces_the_address_of_the_kubeconfig() {
    let world = world().await;
    let ca = format!("certificate-authority-data: {}", base64(TEST_CA_PEM));
    let kubeconfig = world.kubeconfig_for("https://127.0.0.1:1", &ca, "token: secret");
    let clients = world.connect(&kubeconfig, world.url.trim_start_matches("https://")).await.unwrap();
    list(clients.borrow().clone()).await.unwrap();
    assert_eq!(world.kube.authorizations(), ["Bearer secret"]);
}

#[tokio::test]
async fn programs_that_give_credentials_are_refused() {
    let world = world().await;
    let kubeconfig = world.kubeconfig("", "exec: {apiVersion: client.authentication.k8s.io/v1, command: aws}");
    let error = world.connect(&kubeconfig, "").await.err().unwrap();
    assert!(format!("{error:#}").contains("by running \"aws\""), "{error:#}");
    let missing = world.connect(&world.directory.path().join("none"), "").await.err().unwrap();
    assert!(format!("{missing:#}").contains("read the kubeconfig"), "{missing:#}");
}

#[tokio::test(start_paused = true)]
async fn a_rotated_certificate_and_a_rotated_token_are_taken_up() {
    let world = world().await;
    world.write("client.pem", CLIENT_1.0);
    world.write("client.key", CLIENT_1.1);
    let ca = format!("certificate-authority-data: {}", base64(TEST_CA_PEM));
    let kubeconfig = world.kubeconfig(&ca, "client-certificate: client.pem, client-key: client.key");
    let mut clients = world.connect(&kubeconfig, "").await.unwrap();
    // A half-written pair leaves the old client in force.
    world.write("client.pem", "-----BEGIN CERTIFICATE-----\n");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!clients.has_changed().unwrap());
    world.write("client.pem", CLIENT_2.0);
    world.write("client.key", CLIENT_2.1);
    clients.changed().await.unwrap();
    tokio::time::resume();
    list(clients.borrow_and_update().clone()).await.unwrap();
    assert_eq!(world.shown.lock().unwrap().len(), 1);
    // The same for another kubeconfig in its place.
    tokio::time::pause();
    world.kubeconfig(&ca, "token: second");
    clients.changed().await.unwrap();
    tokio::time::resume();
    list(clients.borrow_and_update().clone()).await.unwrap();
    assert_eq!(world.kube.authorizations(), ["", "Bearer second"]);
}
