//! Credentials as a pod gets them: IRSA, EKS Pod Identity and IMDS, and sessions that end before they said. Each case runs
//! in a process with its own environment, since the SDK reads the real one.
#![allow(clippy::unwrap_used, reason = "a test panics")]

mod aws_common;

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aws_common::{Bed, bed, listen};
use stanchion_aws::{AwsClients, Overrides};
use stanchion_core::cloud::{Ec2Api as _, LogEvent, LogSink as _};
use stanchion_core::logs::LogBatch;
use stanchion_lab::binaries::counters;
use stanchion_lab::fake_aws::{Effect, Fault, TEST_CA_PEM, serve_credentials, serve_logs, test_acceptor};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const GROUP: &str = "/g";
const STREAM: &str = "s";
const TOKEN: &str = "service-account-token";

/// A process that puts one event for each line on its standard input and says how it went.
struct Putter {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Putter {
    fn start(environment: &[(&str, String)]) -> Self {
        let program = std::env::current_exe().expect("a test has a file");
        let mut command = Command::new(program);
        command.args(["--ignored", "--exact", "puts_for_each_line", "--nocapture", "--test-threads=1"]).env_clear().envs(counters());
        command.envs(environment.iter().map(|(name, value)| (name, value.as_str())));
        command.env("AWS_REGION", "eu-west-1").env("HOME", "/nonexistent");
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("this program starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, input, output }
    }

    /// One put and one Describe; `ok ok`, or the errors.
    async fn put(&mut self) -> String {
        self.input.write_all(b"put\n").await.expect("it reads");
        loop {
            let line = self.output.next_line().await.expect("text").expect("it has not ended");
            if let Some((_, said)) = line.split_once("said: ") {
                return said.to_owned();
            }
        }
    }

    async fn end(mut self) {
        drop(self.input);
        assert!(self.child.wait().await.expect("it ends").success());
    }
}

#[test]
#[ignore = "is the process that the other tests start"]
fn puts_for_each_line() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let clients = AwsClients::load(Overrides::default()).await.unwrap();
        let (logs, ec2) = (clients.logs(), clients.ec2());
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while lines.next_line().await.unwrap().is_some() {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
            let event = LogEvent { timestamp_ms: i64::try_from(now).unwrap(), message: "x".into() };
            let batch = LogBatch::from_events(GROUP, STREAM, false, vec![event]).remove(0);
            let said = |reply: Result<(), String>| reply.err().unwrap_or_else(|| "ok".to_owned()).replace('\n', " ");
            let put = said(logs.put(&batch).await.map(|_| ()).map_err(|error| format!("{error:?}")));
            let described = said(ec2.describe_attached(&"i-1".into()).await.map(|_| ()).map_err(|error| format!("{error:?}")));
            println!("said: {put} {described}");
        }
    });
}

fn endpoints(bed: &Bed) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", format!("http://{}", bed.logs_at)),
        ("AWS_ENDPOINT_URL_EC2", format!("http://{}", bed.ec2_at)),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{}", bed.imds_at)),
    ]
}

fn token_file(directory: &Path) -> String {
    let path = directory.join("token");
    std::fs::write(&path, TOKEN).expect("a fresh directory");
    path.display().to_string()
}

async fn prepared() -> Bed {
    let bed = bed().await;
    // A key that nobody has: from now on every signature is checked.
    bed.cloud.add_access_key("AKIDOTHER", "other", None, None);
    bed.cloud.add_log_group(GROUP);
    bed.cloud.add_log_stream(GROUP, STREAM);
    bed
}

#[tokio::test]
async fn irsa_keys_are_fetched_once_and_again_when_the_session_is_refused() {
    let (bed, directory) = (prepared().await, tempfile::tempdir().unwrap());
    let (listener, at) = listen().await;
    let server = tokio::spawn(serve_credentials(listener, bed.cloud.clone(), TOKEN.into(), Duration::from_secs(3600)));
    let mut environment = endpoints(&bed);
    environment.extend([
        ("AWS_ENDPOINT_URL_STS", format!("http://{at}")),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/stanchion".to_owned()),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token_file(directory.path())),
    ]);
    let mut putter = Putter::start(&environment);
    for _ in 0..3 {
        assert_eq!(putter.put().await, "ok ok");
    }
    // One client for logs and one for EC2: each has its cache.
    let fetched = bed.cloud.count("AssumeRoleWithWebIdentity");
    assert!(fetched <= 2, "fetched {fetched} times");
    bed.cloud.expire_keys();
    let said = putter.put().await;
    assert!(said.starts_with("ok Unauthorized"), "the put got new keys at once, EC2 gets them next time: {said}");
    assert_eq!(putter.put().await, "ok ok");
    assert!(bed.cloud.count("AssumeRoleWithWebIdentity") <= fetched + 2);
    assert_eq!(bed.cloud.logs_totals().events, 5, "each event once");
    putter.end().await;
    server.abort();
}

#[tokio::test]
async fn pod_identity_keys_that_end_soon_are_renewed_before() {
    let (bed, directory) = (prepared().await, tempfile::tempdir().unwrap());
    let (listener, at) = listen().await;
    // Shorter than the margin with which the SDK renews: every request asks again, and none fails.
    let server = tokio::spawn(serve_credentials(listener, bed.cloud.clone(), TOKEN.into(), Duration::from_secs(5)));
    let mut environment = endpoints(&bed);
    environment.extend([
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{at}/v1/credentials")),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token_file(directory.path())),
    ]);
    let mut putter = Putter::start(&environment);
    for _ in 0..4 {
        assert_eq!(putter.put().await, "ok ok");
    }
    assert!(bed.cloud.count("PodIdentity") >= 4);
    putter.end().await;
    server.abort();
}

#[tokio::test]
async fn without_anything_else_the_instances_role_is_used() {
    let bed = prepared().await;
    bed.cloud.set_instance_role("node-role", Duration::from_secs(3600));
    let mut putter = Putter::start(&endpoints(&bed));
    assert_eq!(putter.put().await, "ok ok");
    putter.end().await;
}

/// The SDK's source keeps the token for six hours, and the last keys when it gets no others.
#[tokio::test]
async fn a_token_that_the_metadata_service_does_not_take_is_not_kept() {
    let bed = prepared().await;
    bed.cloud.set_instance_role("node-role", Duration::from_secs(3600));
    bed.cloud.inject(Fault::times("imds:/latest/api/token", 2, Effect::Garbage("damaged".to_owned())));
    let mut putter = Putter::start(&endpoints(&bed));
    let said = putter.put().await;
    assert!(said.contains("Unauthorized"), "{said}");
    assert_eq!(putter.put().await, "ok ok");
    putter.end().await;
}

#[tokio::test]
async fn without_credentials_a_person_is_told_and_their_coming_is_noticed() {
    let bed = prepared().await;
    let mut putter = Putter::start(&endpoints(&bed));
    let said = putter.put().await;
    assert!(said.starts_with("Unauthorized") && said.contains("NoCredentials"), "{said}");
    assert!(!said.contains(TOKEN));
    bed.cloud.set_instance_role("node-role", Duration::from_secs(3600));
    assert_eq!(putter.put().await, "ok ok");
    putter.end().await;
}

#[tokio::test]
async fn tls_is_verified_and_a_bundle_makes_it_trusted() {
    let (bed, directory) = (prepared().await, tempfile::tempdir().unwrap());
    let (listener, at) = listen().await;
    let server = tokio::spawn(serve_logs(listener, bed.cloud.clone(), Some(test_acceptor())));
    bed.cloud.set_instance_role("node-role", Duration::from_secs(3600));
    let mut environment = endpoints(&bed);
    environment[0].1 = format!("https://{at}");
    let mut stranger = Putter::start(&environment);
    let said = stranger.put().await;
    assert!(said.starts_with("Unavailable") && said.ends_with("ok"), "{said}");
    stranger.end().await;
    let bundle = directory.path().join("ca.pem");
    std::fs::write(&bundle, TEST_CA_PEM).unwrap();
    environment.push(("AWS_CA_BUNDLE", bundle.display().to_string()));
    let mut putter = Putter::start(&environment);
    assert_eq!(putter.put().await, "ok ok");
    putter.end().await;
    server.abort();
}

/// An HTTP proxy that opens tunnels and counts them.
async fn proxy(listener: TcpListener, tunnels: Arc<AtomicU32>) {
    while let Ok((client, _)) = listener.accept().await {
        let tunnels = tunnels.clone();
        tokio::spawn(async move {
            let mut client = BufReader::new(client);
            let (mut head, mut line) = (String::new(), String::new());
            while client.read_line(&mut line).await? > 2 {
                head.push_str(&std::mem::take(&mut line));
            }
            let asked = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
            let asked = asked.ok_or_else(|| std::io::Error::other(format!("no tunnel is asked for: {head}")))?;
            let mut server = TcpStream::connect(asked).await?;
            tunnels.fetch_add(1, Ordering::SeqCst);
            client.get_mut().write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
            tokio::io::copy_bidirectional(&mut client, &mut server).await
        });
    }
}

#[tokio::test]
async fn a_proxy_that_the_environment_names_is_gone_through() {
    let (bed, directory) = (prepared().await, tempfile::tempdir().unwrap());
    let (listener, at) = listen().await;
    let server = tokio::spawn(serve_logs(listener, bed.cloud.clone(), Some(test_acceptor())));
    let (listener, proxy_at) = listen().await;
    let tunnels = Arc::new(AtomicU32::new(0));
    let proxy = tokio::spawn(proxy(listener, tunnels.clone()));
    bed.cloud.set_instance_role("node-role", Duration::from_secs(3600));
    let bundle = directory.path().join("ca.pem");
    std::fs::write(&bundle, TEST_CA_PEM).unwrap();
    let mut environment = endpoints(&bed);
    environment[0].1 = format!("https://localhost:{}", at.port());
    environment.push(("AWS_CA_BUNDLE", bundle.display().to_string()));
    environment.push(("HTTPS_PROXY", format!("http://{proxy_at}")));
    let mut putter = Putter::start(&environment);
    assert_eq!(putter.put().await, "ok ok", "IMDS and plain HTTP go without it");
    putter.end().await;
    assert_eq!(tunnels.load(Ordering::SeqCst), 1);
    environment.push(("NO_PROXY", "localhost".to_owned()));
    let mut putter = Putter::start(&environment);
    assert_eq!(putter.put().await, "ok ok");
    putter.end().await;
    assert_eq!(tunnels.load(Ordering::SeqCst), 1, "what NO_PROXY names is asked directly");
    server.abort();
    proxy.abort();
}
