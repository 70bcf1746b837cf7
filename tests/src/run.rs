//! One run of the lab: its id, its directory, and everything that must be gone when it ends.
//!
//! Whatever a run makes carries its id: namespaces (`stlab<id>-…`) and a directory under [`RUNS_DIR`] (which also holds
//! a bpffs and a tmpfs of its own). The directory has a lock that the living process holds, so a later run can tell the leftovers of
//! a killed one and sweep them.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::netns::{self, Netns};
use crate::stray;

/// Where runs keep their files.
pub const RUNS_DIR: &str = "/run/stanchion-lab";

const PREFIX: &str = "stlab";
/// File systems of the run, by the directory of it that each is mounted on. What a node keeps below `/run` is in memory, as on a node.
const MOUNTS: [(&str, &str); 2] = [("bpf", "bpf"), ("run", "tmpfs")];

/// A run; dropping it removes all that carries its id.
#[derive(Debug)]
pub struct Run {
    id: String,
    dir: PathBuf,
    _lock: File,
}

impl Run {
    /// Sweeps what dead runs left and starts a new one.
    pub fn start() -> anyhow::Result<Self> {
        anyhow::ensure!(nix::unistd::geteuid().is_root(), "the lab makes network namespaces and loads eBPF programs: run it as root");
        fs::create_dir_all(RUNS_DIR).with_context(|| format!("make {RUNS_DIR}"))?;
        sweep();
        // Several labs may live in one process: tests run side by side.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(RUNS_DIR).join(&id);
        fs::create_dir_all(&dir)?;
        let lock = File::create(dir.join("lock"))?;
        lock.try_lock().context("another run has the same id")?;
        for (name, kind) in MOUNTS {
            let at = dir.join(name);
            fs::create_dir_all(&at)?;
            mount(Some("none"), &at, Some(kind), MsFlags::empty(), Some("mode=0700"))
                .with_context(|| format!("mount a file system of type {kind} on {}", at.display()))?;
        }
        Ok(Self { id, dir, _lock: lock })
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name of one of its namespaces.
    pub fn netns_name(&self, what: &str) -> String {
        format!("{PREFIX}{}-{what}", self.id)
    }

    /// Makes one of its namespaces.
    pub fn netns(&self, what: &str) -> anyhow::Result<Netns> {
        Netns::create(&self.netns_name(what))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        remove_all(&self.id, &self.dir);
    }
}

/// The signals by which a person or the machine asks this process to end. Make it before a [`Run`]: from then on none of
/// them kills the process, so whoever waits for [`EndSignals::asked`] can drop the run, and with it all that it made.
#[derive(Debug)]
pub struct EndSignals {
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl EndSignals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// The kernel refuses, or there is no runtime.
    pub fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Resolves with the name of the first of them that comes.
    pub async fn asked(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Removes what runs left whose process is gone, and what was made [without a run](crate::stray).
pub fn sweep() {
    stray::sweep();
    let Ok(entries) = fs::read_dir(RUNS_DIR) else { return };
    for entry in entries.flatten() {
        let Ok(id) = entry.file_name().into_string() else { continue };
        let lock = match File::open(entry.path().join("lock")) {
            Ok(lock) => lock,
            // A run between making its directory and its lock is a moment old; one that died there stays for ever.
            Err(_) if fs::metadata(entry.path()).and_then(|m| m.created()).is_ok_and(|t| t.elapsed().is_ok_and(|e| e.as_secs() < 60)) => {
                continue;
            }
            Err(_) => {
                remove_all(&id, &entry.path());
                continue;
            }
        };
        match lock.try_lock() {
            Ok(()) => remove_all(&id, &entry.path()),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

/// Removes a namespace and ends what runs in it; says what is left.
pub(crate) fn remove_netns(name: &str) {
    for pid in netns::processes(name) {
        // Our own threads are inside for a moment when they make sockets.
        if pid != std::process::id().cast_signed() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    if let Err(error) = netns::remove_name(name) {
        eprintln!("lab: {error:#}");
    }
}

/// Clean-up goes on after a failure and says what is left.
fn remove_all(id: &str, dir: &Path) {
    for name in netns::names(&format!("{PREFIX}{id}-")) {
        remove_netns(&name);
    }
    for at in MOUNTS.map(|(name, _)| dir.join(name)) {
        if at.exists()
            && let Err(error) = umount2(&at, MntFlags::MNT_DETACH)
            && error != nix::errno::Errno::EINVAL
        {
            eprintln!("lab: cannot unmount {}: {error}", at.display());
            return;
        }
    }
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("lab: cannot remove {}: {error}", dir.display());
    }
}
