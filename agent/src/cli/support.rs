//! `stanchion support`: what a person needs who looks at this node from elsewhere, in one archive without secrets.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use stanchion_core::scrub::scrub;

use super::client::{Connection, block_on, connect};
use super::inspect;

/// No file of the bundle is longer: the end is kept, where the trouble is.
const LONGEST: usize = 2 << 20;
/// A program that does not end by then is left out.
const PATIENCE: Duration = Duration::from_secs(10);

/// Flags of `support`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SupportArgs {
    /// The archive; `-` is standard output
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The agent's log, to take its end along
    #[arg(long)]
    agent_log: Option<PathBuf>,
    /// The runtime's network configurations on the host
    #[arg(long, env = "HOST_CNI_CONFDIR_PATH", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
}

/// What kernel and programs say: (file in the bundle, program and arguments).
const PROGRAMS: [(&str, &[&str]); 9] = [
    ("network/links.json", &["ip", "-d", "-s", "-j", "link"]),
    ("network/addresses.json", &["ip", "-j", "address"]),
    ("network/rules.json", &["ip", "-j", "rule"]),
    ("network/rules6.json", &["ip", "-6", "-j", "rule"]),
    ("network/routes.json", &["ip", "-j", "route", "show", "table", "all"]),
    ("network/routes6.json", &["ip", "-6", "-j", "route", "show", "table", "all"]),
    ("network/neighbours.json", &["ip", "-j", "neighbour"]),
    ("network/ruleset.json", &["nft", "-j", "list", "ruleset"]),
    ("network/conntrack.txt", &["conntrack", "-S"]),
];

/// Files of the kernel.
const FILES: [&str; 13] = [
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/mounts",
    "/proc/pressure/cpu",
    "/proc/pressure/memory",
    "/proc/net/dev",
    "/proc/net/snmp",
    "/proc/net/netstat",
    "/proc/net/softnet_stat",
    "/proc/net/stat/nf_conntrack",
    "/proc/sys/net/netfilter/nf_conntrack_max",
];

/// Collects; an agent that does not answer is a finding, not a failure.
pub(crate) fn run(args: &SupportArgs, connection: &Connection) -> Result<ExitCode> {
    let mut bundle = Bundle::new();
    block_on(async {
        match connect(&connection.socket).await {
            Ok(mut agent) => {
                for (name, document) in inspect::everything(&mut agent).await {
                    match document {
                        Ok(document) => bundle.add(&format!("agent/{name}.json"), &format!("{document:#}\n")),
                        Err(error) => bundle.note(&format!("agent/{name}.json: {error:#}")),
                    }
                }
            }
            Err(error) => bundle.note(&format!("agent: {error:#}")),
        }
        for (name, command) in PROGRAMS {
            match output(command).await {
                Ok(text) => bundle.add(name, &text),
                Err(error) => bundle.note(&format!("{name}: {error:#}")),
            }
        }
        Ok(())
    })?;
    for path in FILES {
        bundle.add_file(path.trim_start_matches('/'), Path::new(path));
    }
    for entry in fs::read_dir(&args.conf_dir).into_iter().flatten().flatten() {
        bundle.add_file(&format!("cni/{}", entry.file_name().to_string_lossy()), &entry.path());
    }
    for path in ["/var/run/aws-node/ipam.json", "/var/log/aws-routed-eni/plugin.log"] {
        bundle.add_file(path.trim_start_matches('/'), Path::new(path));
    }
    if let Some(log) = &args.agent_log {
        bundle.add_file("agent/agent.log", log);
    }
    let archive = bundle.finish()?;
    match &args.file {
        Some(path) if path.as_os_str() == "-" => std::io::stdout().write_all(&archive).context("write the archive")?,
        path => {
            let path = path.clone().unwrap_or_else(default_name);
            fs::write(&path, &archive).with_context(|| format!("write {}", path.display()))?;
            println!("{} ({} bytes)", path.display(), archive.len());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn default_name() -> PathBuf {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    PathBuf::from(format!("stanchion_{host}_{now}.tar.gz"))
}

async fn output(command: &[&str]) -> Result<String> {
    let (program, arguments) = command.split_first().context("no program")?;
    let output = tokio::process::Command::new(program).args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(PATIENCE, output).await {
        Ok(output) => output.with_context(|| format!("{program} cannot be run"))?,
        Err(_) => anyhow::bail!("{program} did not end within {} s", PATIENCE.as_secs()),
    };
    anyhow::ensure!(output.status.success(), "{program} ended with {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The archive while it grows. Everything that goes in is scrubbed.
struct Bundle {
    tar: Vec<u8>,
    notes: String,
    now: u64,
}

impl Bundle {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { tar: Vec::new(), notes: String::new(), now }
    }

    /// Something that is not there, with the reason.
    fn note(&mut self, text: &str) {
        self.notes.push_str(text);
        self.notes.push('\n');
    }

    fn add_file(&mut self, name: &str, path: &Path) {
        match fs::read(path) {
            Ok(content) => self.add(name, &String::from_utf8_lossy(&content)),
            Err(error) => self.note(&format!("{name}: {error}")),
        }
    }

    fn add(&mut self, name: &str, text: &str) {
        let clean = scrub(text);
        let mut from = clean.len().saturating_sub(LONGEST);
        while !clean.is_char_boundary(from) {
            from += 1;
        }
        self.append(name, &clean.as_bytes()[from..]);
    }

    /// One member: a ustar header (POSIX 1003.1-1988) and the content in blocks of 512 bytes.
    fn append(&mut self, name: &str, content: &[u8]) {
        let mut header = [0_u8; 512];
        let mut field = |at: usize, text: &str, room: usize| {
            let text = &text.as_bytes()[..text.len().min(room)];
            header[at..at + text.len()].copy_from_slice(text);
        };
        field(0, name, 100);
        field(100, "0000600\0", 8);
        field(108, "0000000\0", 8);
        field(116, "0000000\0", 8);
        field(124, &format!("{:011o}\0", content.len()), 12);
        field(136, &format!("{:011o}\0", self.now), 12);
        field(148, "        ", 8);
        field(156, "0", 1);
        field(257, "ustar\0", 6);
        field(263, "00", 2);
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.tar.extend_from_slice(&header);
        self.tar.extend_from_slice(content);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        let notes = scrub(&self.notes);
        self.append("missing.txt", notes.as_bytes());
        self.tar.resize(self.tar.len() + 1024, 0);
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&self.tar).context("compress the archive")?;
        gzip.finish().context("compress the archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_the_archive_and_it_holds_no_secret() {
        let directory = tempfile::tempdir().unwrap();
        let mut bundle = Bundle::new();
        bundle.add("cni/05-other.conflist", "{\"token\": \"hunter2-hunter2\", \"name\": \"other\"}\n");
        bundle.add_file("none", &directory.path().join("none"));
        bundle.note("agent: Authorization: Bearer hunter2-hunter2");
        bundle.add("long.log", &"x".repeat(LONGEST + 5));
        let archive = directory.path().join("a.tar.gz");
        fs::write(&archive, bundle.finish().unwrap()).unwrap();
        let run = |arguments: &[&str]| {
            let output = std::process::Command::new("tar").args(arguments).current_dir(directory.path()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(run(&["-tzf", "a.tar.gz"]), "cni/05-other.conflist\nlong.log\nmissing.txt\n");
        run(&["-xzf", "a.tar.gz"]);
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("cni/05-other.conflist"), "{\"token\": <removed>, \"name\": \"other\"}\n");
        assert_eq!(read("long.log").len(), LONGEST);
        let missing = read("missing.txt");
        assert!(missing.contains("none: No such file") && !missing.contains("hunter2"), "{missing}");
    }
}
