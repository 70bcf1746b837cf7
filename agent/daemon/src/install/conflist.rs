//! Keeps `10-aws.conflist`: taken away when it is from before this boot, written when a pod could be connected, put back
//! when somebody removed it.
//!
//! A kubelet says Ready as soon as a configuration is there, so it must not be there before the agent can serve: one that
//! survived a reboot would bring pods to a node that cannot connect them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;
use stanchion_core::conflist::{Chained, Conflist, FILE_NAME, Owner, PLUGIN, boot_time, owner, ready_mark};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::chained::{Spoken, version};
use super::files::{self, Outcome};
use super::loopback;
use crate::cluster::ClusterHandle;
use crate::ipamd::IpamHandle;
use crate::netpol::NetpolHandle;

/// How often a ready agent asks whether the Node object has come. A kubelet hears of the file by inotify.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a ready agent looks for a directory that the runtime has yet to make.
const DIRECTORY_EVERY: Duration = Duration::from_secs(1);
/// How often the file is looked at afterwards.
const KEEP_EVERY: Duration = Duration::from_secs(5);
/// How long a ready agent waits for the Node object, which names the runtime, before it writes the version that every
/// runtime knows.
const RUNTIME_WITHIN: Duration = Duration::from_secs(5);

/// What the task works with.
#[derive(Debug)]
pub struct ConflistParts {
    /// Where the runtime looks for configurations. Not made: a runtime makes it.
    pub directory: PathBuf,
    /// Where the runtime looks for plugins.
    pub bin_dir: PathBuf,
    /// Where our plugin is to be had; put into `bin_dir` when it is there and differs.
    pub plugin: Option<PathBuf>,
    /// The agent's socket as the plugin sees it.
    pub socket: PathBuf,
    /// The plugin's journal and its level.
    pub log: (String, String),
    /// Plugins that the settings ask for; a missing binary keeps the configuration away. `portmap` is chained where it is
    /// installed.
    pub chained: Vec<Chained>,
    /// The proc file system, for the boot time.
    pub proc_root: PathBuf,
    /// Addresses.
    pub ipam: IpamHandle,
    /// Policy that must be known before a pod may start.
    pub strict_policy: Option<NetpolHandle>,
    /// Names the runtime.
    pub cluster: ClusterHandle,
    /// This node.
    pub node_name: String,
    /// Ends the task; the file stays.
    pub shutdown: CancellationToken,
}

/// Starts the task.
pub fn spawn(parts: ConflistParts) -> JoinHandle<()> {
    tokio::spawn(async move {
        let shutdown = parts.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = keep(parts) => {}
        }
    })
}

/// What need not be found out again while its files stay as they are.
#[derive(Default)]
struct Known {
    spoken: Spoken,
    plugin: Option<[files::Stamp; 2]>,
}

async fn keep(parts: ConflistParts) {
    let path = parts.directory.join(FILE_NAME);
    remove_stale(&parts, &path);
    let mut complaint = String::new();
    let mut ready_since = None;
    let mut known = Known::default();
    loop {
        until_ready(&parts).await;
        mark_ready(&parts);
        let mut pause = DIRECTORY_EVERY;
        if parts.directory.is_dir() {
            pause = LOOK_EVERY;
            let since = *ready_since.get_or_insert_with(tokio::time::Instant::now);
            let runtime = runtime(&parts);
            if runtime.is_some() || since.elapsed() >= RUNTIME_WITHIN {
                // Asking a plugin runs it: this worker's other tasks go on.
                let placed = tokio::task::block_in_place(|| place(&parts, &path, runtime.as_deref().unwrap_or_default(), &mut known));
                match placed {
                    Ok(true) => info!(path = %path.display(), runtime, "network configuration written: the node can take pods"),
                    Ok(false) => complaint.clear(),
                    Err(problem) => complain(&mut complaint, problem),
                }
                pause = KEEP_EVERY;
            }
        } else {
            let problem = format!(
                "{} is not there: a runtime makes it; where yours looks elsewhere, say so in HOST_CNI_CONFDIR_PATH",
                parts.directory.display()
            );
            complain(&mut complaint, problem);
        }
        tokio::time::sleep(pause).await;
    }
}

/// Says once what keeps the file away.
fn complain(said: &mut String, problem: String) {
    if problem != *said {
        warn!(problem, "the network configuration is not in place; tried again");
        *said = problem;
    }
}

/// Returns when STATUS would tell the runtime that pods can start; never once the agent's parts are gone.
async fn until_ready(parts: &ConflistParts) {
    let policy = async {
        match &parts.strict_policy {
            Some(netpol) => netpol.ready().wait_for(|ready| *ready).await.is_ok(),
            None => true,
        }
    };
    if !(parts.ipam.ready().await.is_ok() && policy.await) {
        std::future::pending::<()>().await;
    }
}

/// From now on STATUS says yes, until the node boots again: what a runtime makes of a no is a node that is not Ready, whose pods leave
/// their services and are evicted after minutes, all of them connected. An agent that is started anew is no reason for that.
fn mark_ready(parts: &ConflistParts) {
    let path = ready_mark(&parts.socket);
    let boot = fs::read_to_string(parts.proc_root.join("sys/kernel/random/boot_id")).unwrap_or_default();
    if !boot.is_empty()
        && fs::read_to_string(&path).unwrap_or_default() != boot
        && let Err(error) = files::put(&path, boot.as_bytes(), 0o644)
    {
        warn!(error = &error as &dyn std::error::Error, "STATUS will fail while no agent answers");
    }
}

/// `containerd://2.3.4`; `None` while the Node is not known.
fn runtime(parts: &ConflistParts) -> Option<String> {
    let cluster = parts.cluster.latest();
    let node = cluster.nodes.get(&parts.node_name)?;
    let runtime = &node.status.node_info.container_runtime_version;
    (!runtime.is_empty() || cluster.synced).then(|| runtime.clone())
}

fn remove_stale(parts: &ConflistParts, path: &std::path::Path) {
    let stat = fs::read_to_string(parts.proc_root.join("stat")).unwrap_or_default();
    let written = fs::metadata(path).and_then(|meta| meta.modified()).ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let (Some(boot), Some(written)) = (boot_time(&stat), written) else { return };
    if written.as_secs() >= boot {
        return;
    }
    match files::remove(path) {
        Ok(_) => info!(path = %path.display(), "removed: it is from before this boot, and pods cannot be connected yet"),
        Err(error) => warn!(error = &error as &dyn std::error::Error, "a network configuration from before this boot stays"),
    }
}

/// Binary first, configuration last. True when the configuration was written.
fn place(parts: &ConflistParts, path: &std::path::Path, runtime: &str, known: &mut Known) -> Result<bool, String> {
    place_plugin(parts, &mut known.plugin)?;
    if let Some(missing) = parts.chained.iter().find(|plugin| !parts.bin_dir.join(plugin.binary()).is_file()) {
        return Err(format!("the settings chain {0}, and {0} is not in {1}", missing.binary(), parts.bin_dir.display()));
    }
    let portmap = parts.bin_dir.join(Chained::Portmap.binary()).is_file().then_some(Chained::Portmap);
    let chained: Vec<Chained> = portmap.into_iter().chain(parts.chained.iter().copied()).collect();
    let there = fs::read_to_string(path).unwrap_or_default();
    let present = serde_json::from_str(&there).unwrap_or(Value::Null);
    let conflist = Conflist {
        version: version(&parts.bin_dir, &chained, &present, runtime, &mut known.spoken)?,
        socket: &parts.socket,
        log_file: &parts.log.0,
        log_level: &parts.log.1,
        chained: &chained,
    };
    let mut wanted = conflist.render(&present);
    if serde_json::from_str::<Value>(&wanted).is_ok_and(|document| document == present) {
        // Who chains itself in writes the file in its own way.
        wanted = there;
    }
    let written = files::put(path, wanted.as_bytes(), 0o644).map_err(words)? == Outcome::Written;
    if written && let Err(error) = loopback::ensure(&parts.bin_dir) {
        warn!(%error, directory = %parts.bin_dir.display(), "no plugin loopback, and none can be put there: runtimes that need it start no pod");
    }
    if written && let Some(other) = earlier(path) {
        warn!(other, "the runtime uses the first configuration by name, which is not ours: remove it");
    }
    Ok(written)
}

/// Puts our plugin where the runtime looks for it, or says that it is not there. `same` are the two files that were found alike.
fn place_plugin(parts: &ConflistParts, same: &mut Option<[files::Stamp; 2]>) -> Result<(), String> {
    let installed = parts.bin_dir.join(PLUGIN);
    let Some(plugin) = &parts.plugin else {
        let missing = || format!("{} is not there: `stanchion install` puts it there", installed.display());
        return installed.is_file().then_some(()).ok_or_else(missing);
    };
    let now = || files::stamp(plugin).zip(files::stamp(&installed)).map(<[_; 2]>::from);
    if same.is_some() && *same == now() {
        return Ok(());
    }
    let content = fs::read(plugin).map_err(|error| format!("read {}: {error}", plugin.display()))?;
    // A mount that cannot be written but holds the same binary is good enough.
    if !fs::read(&installed).is_ok_and(|old| old == content) {
        fs::create_dir_all(&parts.bin_dir).map_err(|error| format!("make {}: {error}", parts.bin_dir.display()))?;
        files::put(&installed, &content, 0o755).map_err(words)?;
        info!(path = %installed.display(), "plugin installed");
    }
    *same = now();
    Ok(())
}

fn words(error: files::FileError) -> String {
    format!("{error}: {}", error.source)
}

/// A configuration that the runtime would take before ours.
pub(super) fn earlier(path: &std::path::Path) -> Option<String> {
    let names = fs::read_dir(path.parent()?).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let is_conf = |name: &String| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) && !name.starts_with('.');
    names.filter(|name| is_conf(name) && name.as_str() < FILE_NAME).min()
}

/// Whose configuration is in place; `None`: nobody's.
pub fn present(path: &std::path::Path) -> Option<Owner> {
    fs::read_to_string(path).ok().map(|content| owner(&content))
}
