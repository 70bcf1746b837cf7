//! CPU, memory and wire bytes of shipping container logs over TLS, beside a one-thread floor of the same run.
//!
//! The measured side is the real binary (`stanchion ship --once --sink cloudwatch`: its tailer, its SDK client, its TLS)
//! as a child process, so that its CPU-seconds and peak RSS are the kernel's own account. The endpoint only reads, counts
//! and answers; that every line arrived is checked.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};
use stanchion_core::logs::cri::Line;
use stanchion_core::logs::enrich::Identity;
use stanchion_core::logs::join::{Event, Mark};
use stanchion_core::logs::names::parse_flat;
use stanchion_core::logs::record::{Layout, RecordOptions, RecordWriter};
use stanchion_core::logs::{BatchBuilder, LogBatch};
use stanchion_core::objects::Pod;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use super::Row;
use crate::binaries::Binaries;
use crate::fake_aws::{TEST_CA_PEM, test_acceptor};

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// Bytes of CRI lines: the whole run, and the quick one. `STANCHION_BENCH_LOG_BYTES` sets another.
const SIZES: (u64, u64) = (1 << 30, 64 << 20);

/// What is read.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    name: &'static str,
    files: usize,
    line: usize,
    json: bool,
}

const PLAIN: Kind = Kind { name: "", files: 10, line: 200, json: false };
const LONG: Kind = Kind { name: ", 2 KB lines", files: 10, line: 2000, json: false };
const JSON: Kind = Kind { name: ", JSON lines merged", files: 10, line: 200, json: true };
const MANY: Kind = Kind { name: ", 1,000 small files", files: 1000, line: 200, json: false };

/// What is shipped, and what it may cost: CPU-seconds per GiB of CRI lines. The default is gzip.
struct Case {
    name: &'static str,
    kind: Kind,
    record: &'static str,
    layout: Layout,
    gzip: bool,
    target: Option<f64>,
}

const fn case(name: &'static str, kind: Kind, layout: Layout, gzip: bool, target: Option<f64>) -> Case {
    let record = if matches!(layout, Layout::FluentBit) { "fluent-bit" } else { "compact" };
    Case { name, kind, record, layout, gzip, target }
}

const CASES: [Case; 8] = [
    case("fluent-bit record", PLAIN, Layout::FluentBit, true, Some(5.0)),
    case("fluent-bit record, plain bodies", PLAIN, Layout::FluentBit, false, None),
    case("compact", PLAIN, Layout::Compact, true, Some(2.5)),
    case("compact, plain bodies", PLAIN, Layout::Compact, false, None),
    case("compact", LONG, Layout::Compact, true, None),
    case("fluent-bit record", JSON, Layout::FluentBit, true, None),
    case("fluent-bit record", MANY, Layout::FluentBit, true, None),
    case("compact", MANY, Layout::Compact, true, None),
];

/// Runs the bench.
///
/// # Errors
/// When the binary is missing or fails, or a line did not arrive.
pub fn run(quick: bool) -> anyhow::Result<Vec<Row>> {
    let default = if quick { SIZES.1 } else { SIZES.0 };
    let bytes =
        std::env::var("STANCHION_BENCH_LOG_BYTES").ok().map_or(Ok(default), |text| text.parse()).context("STANCHION_BENCH_LOG_BYTES")?;
    let binary = Binaries::find()?.stanchion;
    // Memory, where there is room, so that the disk is not what is measured.
    let root = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut rows = Vec::new();
    let mut made: Option<(Kind, tempfile::TempDir, Input)> = None;
    for case in &CASES {
        if made.as_ref().is_none_or(|(kind, _, _)| *kind != case.kind) {
            // One input at a time is on the disk.
            drop(made.take());
            let place = tempfile::tempdir_in(root.path())?;
            let input = generate(place.path(), bytes, case.kind)?;
            made = Some((case.kind, place, input));
        }
        let Some((_, place, input)) = &made else { continue };
        let name = format!("{}{}", case.name, case.kind.name);
        let sink = Sink::serve(&runtime)?;
        let child = ship(&binary, place.path(), input, case, sink.port)?;
        let events = sink.counts.events.load(Ordering::Relaxed);
        ensure!(events == input.lines, "{name}: {events} of {} lines arrived", input.lines);
        let gib = input.bytes as f64 / GIB;
        let value = child.cpu_seconds / gib;
        let mut cost = Row::plain(format!("{name}: CPU"), value, "s/GiB");
        cost.target = case.target;
        rows.push(cost);
        if case.kind == PLAIN && !case.gzip {
            rows.push(Row::against(format!("{name}: CPU over the floor"), value, "s/GiB", floor(input, case)? / gib));
        }
        rows.push(Row::plain(format!("{name}: rate"), input.lines as f64 / child.wall_seconds, "lines/s"));
        rows.push(Row::plain(format!("{name}: peak RSS"), child.rss_mib, "MiB").target(48.0));
        let sent = sink.counts.bytes.load(Ordering::Relaxed);
        rows.push(Row::plain(format!("{name}: body bytes per byte read"), sent as f64 / input.bytes as f64, "x"));
        rows.push(Row::plain(format!("{name}: puts"), sink.counts.puts.load(Ordering::Relaxed) as f64, "puts"));
    }
    Ok(rows)
}

/// The generated files.
struct Input {
    containers: PathBuf,
    pods: PathBuf,
    lines: u64,
    bytes: u64,
}

fn file_name(index: usize) -> String {
    format!("web-{index}_shop_app-{:064x}.log", 0xabcd_0000 + index)
}

fn pod(index: usize) -> serde_json::Value {
    let digest = format!("{index:064x}");
    serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("web-{index}"), "namespace": "shop", "uid": format!("0b8f8c1e-1111-2222-3333-{index:012x}"), "labels": {"app": "web"}},
        "spec": {"nodeName": "ip-10-0-1-23.eu-west-1.compute.internal", "containers": [{"name": "app", "image": "public.ecr.aws/x/web:1.2.3"}]},
        "status": {"podIP": "10.0.1.77", "containerStatuses": [{
            "name": "app", "containerID": format!("containerd://{:064x}", 0xabcd_0000 + index),
            "image": "public.ecr.aws/x/web:1.2.3", "imageID": format!("public.ecr.aws/x/web@sha256:{digest}"),
        }]},
    })
}

fn generate(root: &Path, bytes: u64, kind: Kind) -> anyhow::Result<Input> {
    let (containers, pods) = (root.join("containers"), root.join("manifests"));
    std::fs::create_dir(&containers)?;
    std::fs::create_dir(&pods)?;
    let mut input = Input { containers, pods, lines: 0, bytes: 0 };
    // Today's times: older events are not for CloudWatch Logs.
    let start = jiff::Timestamp::now().as_millisecond() - 3_600_000;
    for index in 0..kind.files {
        std::fs::write(input.pods.join(format!("web-{index}.json")), pod(index).to_string())?;
        let mut file = BufWriter::new(File::create(input.containers.join(file_name(index)))?);
        let mut written = 0;
        let mut number = 0_i64;
        while written < bytes / kind.files as u64 {
            let stamp = format!("{:.9}", jiff::Timestamp::from_millisecond(start + number / 4)?);
            let line = line(kind, &stamp, number);
            file.write_all(&line)?;
            written += line.len() as u64;
            number += 1;
        }
        file.flush()?;
        input.lines += u64::try_from(number)?;
        input.bytes += written;
    }
    Ok(input)
}

/// An application's line: text or an object, with an id and a path that differ from line to line.
fn line(kind: Kind, stamp: &str, number: i64) -> Vec<u8> {
    // A request's own hexadecimal digits, as no compressor can know them.
    let id = number.cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let (before, after) =
        if kind.json { ("{\"level\":\"info\",\"msg\":\"request served\",", "\"}") } else { ("level=info msg=\"request served\" ", "") };
    let own = if kind.json {
        format!("\"id\":\"{id:016x}\",\"n\":{number},\"path\":\"/api/v1/items/{}\",\"agent\":\"", number % 977)
    } else {
        format!("id={id:016x} n={number} path=/api/v1/items/{} ", number % 977)
    };
    let mut line = format!("{stamp} stdout F {before}{own}").into_bytes();
    let fill = "status=200 bytes=5123 agent=curl/8.4 ".bytes().cycle().take((kind.line - 1).saturating_sub(line.len() + after.len()));
    line.extend(fill);
    line.extend_from_slice(after.as_bytes());
    line.push(b'\n');
    line
}

/// What a child cost.
struct Cost {
    cpu_seconds: f64,
    wall_seconds: f64,
    rss_mib: f64,
}

fn ship(binary: &Path, root: &Path, input: &Input, case: &Case, port: u16) -> anyhow::Result<Cost> {
    let bundle = root.join("ca.pem");
    std::fs::write(&bundle, TEST_CA_PEM)?;
    let before = children()?;
    let begun = Instant::now();
    let mut command = std::process::Command::new(binary);
    command.args([
        "ship",
        "--once",
        "--sink",
        "cloudwatch",
        "--node-name",
        "ip-10-0-1-23",
        "--cluster-name",
        "bench",
        "--record",
        case.record,
    ]);
    command.arg("--log-dir").arg(&input.containers).arg("--manifests").arg(&input.pods);
    if case.kind.json {
        command.args(["--merge-log-key", "log_processed"]);
    }
    command.args(["--gzip", if case.gzip { "true" } else { "false" }]);
    command
        .env("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", format!("https://localhost:{port}"))
        .env("AWS_CA_BUNDLE", &bundle)
        .env("AWS_REGION", "eu-west-1")
        .env("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        .env("AWS_SECRET_ACCESS_KEY", "bench");
    // Peak RSS of children is the largest of all so far: read the child's own while it runs instead.
    let mut child = command.stderr(std::process::Stdio::null()).spawn().with_context(|| format!("cannot run {}", binary.display()))?;
    let status_file = format!("/proc/{}/status", child.id());
    let mut rss_kib = 0;
    let status = loop {
        let text = std::fs::read_to_string(&status_file).unwrap_or_default();
        let peak =
            text.lines().find_map(|line| line.strip_prefix("VmHWM:")).and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
        rss_kib = rss_kib.max(peak.unwrap_or(0_u64));
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    };
    let wall_seconds = begun.elapsed().as_secs_f64();
    ensure!(status.success(), "{}: ship ended with {status}", case.name);
    Ok(Cost { cpu_seconds: children()? - before, wall_seconds, rss_mib: rss_kib as f64 / 1024.0 })
}

/// CPU-seconds of children that ended.
fn children() -> anyhow::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)?;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

fn seconds(time: nix::sys::time::TimeVal) -> f64 {
    use nix::sys::time::TimeValLike as _;
    time.num_microseconds() as f64 / 1e6
}

/// The endpoint.
struct Sink {
    port: u16,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    puts: AtomicU64,
    events: AtomicU64,
    bytes: AtomicU64,
}

impl Sink {
    fn serve(runtime: &tokio::runtime::Runtime) -> anyhow::Result<Self> {
        let counts = Arc::new(Counts::default());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let port = listener.local_addr()?.port();
        let acceptor = test_acceptor();
        let shared = Arc::clone(&counts);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, counts) = (acceptor.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    // A connection that ends in the middle shows as lines that are missing.
                    if let Ok(stream) = acceptor.accept(socket).await {
                        let _ = answer(stream, &counts).await;
                    }
                });
            }
        });
        Ok(Self { port, counts })
    }
}

/// Reads requests and says yes.
async fn answer<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(stream: S, counts: &Counts) -> std::io::Result<()> {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    let mut body = Vec::new();
    loop {
        let (mut length, mut gzip, mut put) = (0, false, false);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            gzip |= line.starts_with("content-encoding:") && line.ends_with("gzip");
            put |= line.ends_with("putlogevents");
        }
        body.resize(length, 0);
        stream.read_exact(&mut body).await?;
        if put {
            let mut plain = Vec::new();
            if gzip {
                flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut plain)?;
            }
            let text = if gzip { &plain } else { &body };
            let events = memchr::memmem::find_iter(text, b"{\"timestamp\":").count();
            counts.events.fetch_add(events as u64, Ordering::Relaxed);
            counts.bytes.fetch_add(length as u64, Ordering::Relaxed);
            counts.puts.fetch_add(1, Ordering::Relaxed);
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\nx-amzn-requestid: 1\r\ncontent-length: 2\r\n\r\n{}")
            .await?;
        stream.flush().await?;
    }
}

/// CPU-seconds of one thread that reads, parses, encodes, hashes and encrypts the same bytes, and does nothing else.
fn floor(input: &Input, case: &Case) -> anyhow::Result<f64> {
    let mut tls = Encryptor::connect()?;
    let begun = own_thread()?;
    let mut block = vec![0; 256 << 10];
    let mut events = 0;
    let mut send = |batch: LogBatch| -> anyhow::Result<()> {
        events += batch.len() as u64;
        std::hint::black_box(Sha256::digest(batch.body()));
        tls.send(&batch.body())
    };
    for index in 0..case.kind.files {
        let name = file_name(index);
        let pod: Pod = serde_json::from_value(pod(index))?;
        let identity = Identity::new(&parse_flat(&name).context("a container's name")?, Some(&pod));
        let writer = RecordWriter::new(&RecordOptions { layout: case.layout, ..RecordOptions::default() }, Some(&identity));
        let mut builder = BatchBuilder::new("/aws/containerinsights/bench/application".into(), name.as_str().into(), false);
        let mut file = File::open(input.containers.join(&name))?;
        let mut held = 0;
        loop {
            let read = file.read(&mut block[held..])?;
            if read == 0 {
                break;
            }
            let filled = held + read;
            let mut at = 0;
            for newline in memchr::memchr_iter(b'\n', &block[..filled]) {
                let line = Line::parse(&block[at..newline]);
                let marks = [Mark { generation: 0, offset: 0 }];
                let event = Event {
                    header: line.header,
                    output: line.output,
                    timestamp_ms: line.timestamp_ms.unwrap_or(0),
                    content: &line.content,
                    marks: &marks,
                };
                if let Some(batch) = builder.push_with(event.timestamp_ms, |out| writer.write(&event, 0, out).message) {
                    send(batch)?;
                }
                at = newline + 1;
            }
            block.copy_within(at..filled, 0);
            held = filled - at;
        }
        if let Some(batch) = builder.finish() {
            send(batch)?;
        }
    }
    let spent = own_thread()? - begun;
    ensure!(events == input.lines, "the floor encoded {events} of {} lines", input.lines);
    Ok(spent)
}

fn own_thread() -> anyhow::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD)?;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// A TLS client whose peer is another thread that reads and drops: the sender's half of the cost, socket included.
struct Encryptor {
    stream: rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>,
}

impl Encryptor {
    fn connect() -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || -> std::io::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (socket, _) = listener.accept()?;
            socket.set_nonblocking(true)?;
            runtime.block_on(async {
                let mut stream = test_acceptor().accept(tokio::net::TcpStream::from_std(socket)?).await?;
                tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.map(|_| ())
            })
        });
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls::pki_types::CertificateDer::from_pem_slice(TEST_CA_PEM.as_bytes())?)?;
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connection = rustls::ClientConnection::new(Arc::new(config), "localhost".try_into()?)?;
        Ok(Self { stream: rustls::StreamOwned::new(connection, std::net::TcpStream::connect(address)?) })
    }

    fn send(&mut self, body: &[u8]) -> anyhow::Result<()> {
        Ok(self.stream.write_all(body)?)
    }
}
