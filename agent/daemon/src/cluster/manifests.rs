//! The cluster's state as a directory of manifests, watched for changes.
//!
//! inotify says when to look, a sweep is the truth. A file that cannot be read keeps its last good content, and says so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::Watcher as _;
use notify::event::{AccessKind, AccessMode, EventKind};
use stanchion_core::cluster::{ClusterState, Object};
use stanchion_core::manifests::{ManifestError, parse};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ClusterHandle;

/// How often the directory is compared with what is known, whatever inotify says.
const SWEEP: Duration = Duration::from_secs(2);
/// Editors write in several steps: changes this close together are read once.
const SETTLE: Duration = Duration::from_millis(20);

/// A source that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The directory or a file in it.
    #[error("read {path}")]
    Io {
        /// What was read.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file's content.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// What tells one version of a file from another.
type Signature = (SystemTime, u64, u64);

#[derive(Default)]
struct File {
    signature: Option<Signature>,
    objects: Vec<Object>,
    error: Option<String>,
}

/// The task that owns a manifests directory.
pub struct ManifestsDir {
    directory: PathBuf,
    files: BTreeMap<PathBuf, File>,
    state: Arc<ClusterState>,
    publish: watch::Sender<Arc<ClusterState>>,
}

impl ManifestsDir {
    /// Reads the directory once, then watches it until `shutdown`. A file that cannot be read is passed over with a
    /// warning; a directory that cannot be read is an error.
    ///
    /// # Errors
    /// The directory does not exist or cannot be listed.
    pub fn spawn(directory: PathBuf, shutdown: CancellationToken) -> Result<ClusterHandle, SourceError> {
        let (publish, state) = watch::channel(Arc::new(ClusterState::default()));
        let mut source = Self { directory, files: BTreeMap::new(), state: Arc::default(), publish };
        source.sweep()?;
        tokio::spawn(source.run(shutdown));
        Ok(ClusterHandle { state, _fixed: None })
    }

    async fn run(mut self, shutdown: CancellationToken) {
        // One pending wake-up is enough: a sweep reads everything.
        let (wake, mut woken) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // The sweep itself opens the directory and its files, which is an event too: to follow that would never end.
            if event.is_ok_and(|event| is_change(&event.kind)) {
                let _ = wake.try_send(());
            }
        });
        let _watcher = match watcher {
            Ok(mut watcher) => match watcher.watch(&self.directory, notify::RecursiveMode::Recursive) {
                Ok(()) => Some(watcher),
                Err(error) => {
                    warn!(directory = %self.directory.display(), %error, "no inotify: changes are seen by the sweep only");
                    None
                }
            },
            Err(error) => {
                warn!(%error, "no inotify: changes are seen by the sweep only");
                None
            }
        };
        let mut tick = tokio::time::interval(SWEEP);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tick.tick() => {}
                Some(()) = woken.recv() => tokio::time::sleep(SETTLE).await,
            }
            while woken.try_recv().is_ok() {}
            if let Err(error) = self.sweep() {
                warn!(%error, "the manifests stay as they were");
            }
        }
    }

    /// Reads what changed and publishes the state if it did.
    fn sweep(&mut self) -> Result<(), SourceError> {
        let found = list(&self.directory)?;
        let mut changed = self.files.len() != found.len() || !self.state.synced;
        self.files.retain(|path, _| found.contains_key(path));
        for (path, signature) in found {
            let file = self.files.entry(path.clone()).or_default();
            if file.signature == Some(signature) {
                continue;
            }
            changed = true;
            match read_file(&path) {
                Ok(objects) => *file = File { signature: Some(signature), objects, error: None },
                Err(error) => {
                    let text = chain(&error);
                    if file.error.as_ref() != Some(&text) {
                        warn!(file = %path.display(), error = text, "manifest not applied; its last good content stays");
                    }
                    file.signature = Some(signature);
                    file.error = Some(text);
                }
            }
        }
        if changed {
            let next = self.state.replaced_by(self.files.values().flat_map(|file| file.objects.iter().cloned()));
            if next != *self.state {
                info!(files = self.files.len(), pods = next.pods.len(), policies = next.network_policies.len(), "manifests read");
                self.state = Arc::new(next);
                self.publish.send_replace(Arc::clone(&self.state));
            }
        }
        Ok(())
    }
}

/// Reads a manifests directory strictly, once: for offline questions, where a file that cannot be read is an error.
///
/// # Errors
/// The first file that cannot be read.
pub fn read_once(directory: &Path) -> Result<ClusterState, SourceError> {
    let mut objects = Vec::new();
    for path in list(directory)?.into_keys() {
        objects.extend(read_file(&path)?);
    }
    Ok(ClusterState::default().replaced_by(objects))
}

/// Whether something is there that was not before: opening and reading changes nothing.
fn is_change(kind: &EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}

fn read_file(path: &Path) -> Result<Vec<Object>, SourceError> {
    let text = std::fs::read_to_string(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
    Ok(parse(&path.display().to_string(), &text)?)
}

/// Every manifest below the directory, in order of path; hidden files and directories are passed over, as are links that
/// lead nowhere. Follows links, so that a mounted ConfigMap works.
fn list(directory: &Path) -> Result<BTreeMap<PathBuf, Signature>, SourceError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| SourceError::Io { path, source }
    };
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).map_err(io(&directory))? {
            let path = entry.map_err(io(&directory))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if name.starts_with('.') {
                continue;
            }
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if meta.is_dir() {
                pending.push(path);
            } else if matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json")) {
                let inode = std::os::unix::fs::MetadataExt::ino(&meta);
                let modified = meta.modified().map_err(io(&path))?;
                found.insert(path, (modified, meta.len(), inode));
            }
        }
    }
    Ok(found)
}

/// The error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use stanchion_core::ids::PodName;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: x}\n";

    #[tokio::test]
    async fn changes_are_seen_and_a_broken_file_keeps_its_last_good_content() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.yaml"), POD).unwrap();
        let shutdown = CancellationToken::new();
        let handle = ManifestsDir::spawn(directory.path().to_owned(), shutdown.clone()).unwrap();
        let mut watch = handle.watch();
        let key = PodName::new("x", "a");
        assert!(handle.latest().pods.contains_key(&key));
        std::fs::write(directory.path().join("a.yaml"), "kind: [").unwrap();
        std::fs::write(directory.path().join("b.yaml"), POD.replace("name: a", "name: b")).unwrap();
        let deadline = Duration::from_secs(20);
        let two = tokio::time::timeout(deadline, watch.wait_for(|state| state.pods.len() == 2)).await.unwrap().unwrap();
        assert!(two.pods.contains_key(&key));
        drop(two);
        std::fs::remove_file(directory.path().join("a.yaml")).unwrap();
        tokio::time::timeout(deadline, watch.wait_for(|state| !state.pods.contains_key(&key))).await.unwrap().unwrap();
        shutdown.cancel();
    }

    #[test]
    fn offline_reading_is_strict() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.yaml"), "kind: [").unwrap();
        assert!(read_once(directory.path()).is_err());
    }
}
