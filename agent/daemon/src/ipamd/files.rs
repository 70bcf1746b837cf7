//! The checkpoint on disk: temp file, fsync, rename, fsync of the directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use stanchion_core::boot::Boot;
use stanchion_core::ipam::{Checkpoint, CheckpointError, CoolingFile, Datastore, Time};

/// The checkpoint of card 0, those of the other cards and the cool-downs beside it.
#[derive(Clone, Debug)]
pub(super) struct Files {
    checkpoint: PathBuf,
    cooling: PathBuf,
    /// By the process's clock.
    boot: Option<Boot>,
    /// What was written last for each card but the first: most pods have no address there, and a write is an fsync.
    further: BTreeMap<u16, Option<Checkpoint>>,
}

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("{op} {path}")]
    Io {
        /// `read`, `write`, `rename` ...
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a checkpoint, or of another version. Starting anew would give pods' addresses away: a person must look.
    #[error("{path}: move it away only if no pod runs on this node")]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CheckpointError,
    },
}

impl Files {
    /// `checkpoint` is AWS_VPC_K8S_CNI_BACKING_STORE; the other files lie beside it. `cards` are the managed ones.
    pub(super) fn new(checkpoint: &Path, cards: &[(u16, u16)], boot: Option<Boot>) -> Self {
        let cooling = cooling_beside(checkpoint);
        let further = cards.iter().filter(|(card, _)| *card != 0).map(|(card, _)| (*card, None)).collect();
        Self { checkpoint: checkpoint.to_path_buf(), cooling, boot, further }
    }

    /// Whether the node's addresses were another agent's so far: there is a checkpoint, and none of our files beside it.
    pub(super) fn another_agents(checkpoint: &Path) -> bool {
        checkpoint.exists() && !cooling_beside(checkpoint).exists()
    }

    /// As aws-node names it: `ipam.json`, `ipam-nic-1.json`, …
    fn path_of(&self, card: u16) -> PathBuf {
        if card == 0 {
            return self.checkpoint.clone();
        }
        let stem = self.checkpoint.file_stem().unwrap_or_default().to_string_lossy();
        self.checkpoint.with_file_name(format!("{stem}-nic-{card}.json"))
    }

    pub(super) fn checkpoint_path(&self) -> &Path {
        &self.checkpoint
    }

    /// What is held on a card; `None` on a fresh node.
    pub(super) fn read_checkpoint(&mut self, card: u16) -> Result<Option<Checkpoint>, FileError> {
        let path = self.path_of(card);
        let Some(text) = read(&path)? else { return Ok(None) };
        let file = Checkpoint::parse(&text).map_err(|source| FileError::Content { path, source })?;
        if let Some(written) = self.further.get_mut(&card) {
            *written = Some(file.clone());
        }
        Ok(Some(file))
    }

    /// Cool-downs, by the process's clock where it is the boot in which they were written; none when the file is missing. A file that
    /// cannot be read is told and ignored: it is a courtesy to others' connection tables, not ownership.
    pub(super) fn read_cooling(&self) -> Result<Option<CoolingFile>, FileError> {
        let Some(text) = read(&self.cooling)? else { return Ok(None) };
        let file = CoolingFile::parse(&text).map_err(|source| FileError::Content { path: self.cooling.clone(), source })?;
        Ok(Some(file.reckoned(self.boot.as_ref())))
    }

    /// Makes what is held durable. A crash between two files leaves an attachment with an address of some cards only; nobody was
    /// told of it, so its pod has no veth and the next start releases it.
    pub(super) fn write_checkpoint(&mut self, store: &Datastore) -> Result<(), FileError> {
        for card in self.further.keys().copied().collect::<Vec<_>>() {
            let now = Checkpoint::of(store, card);
            let written = self.further.get(&card).and_then(Option::as_ref);
            if written.map_or(!now.allocations.is_empty(), |written| *written != now) {
                write(&self.path_of(card), &now)?;
                self.further.insert(card, Some(now));
            }
        }
        write(&self.checkpoint, &Checkpoint::of(store, 0))
    }

    /// Makes the cool-downs durable.
    pub(super) fn write_cooling(&self, store: &Datastore, now: Time) -> Result<(), FileError> {
        write(&self.cooling, &CoolingFile::of(store, now, self.boot.clone()))
    }
}

fn cooling_beside(checkpoint: &Path) -> PathBuf {
    checkpoint.with_file_name("stanchion-cooling.json")
}

fn read(path: &Path) -> Result<Option<String>, FileError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError::Io { op: "read", path: path.to_path_buf(), source }),
    }
}

fn write(path: &Path, content: &impl Serialize) -> Result<(), FileError> {
    let fail = |op: &'static str| move |source: io::Error| FileError::Io { op, path: path.to_path_buf(), source };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(fail("create the directory of"))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let text = serde_json::to_vec(content).map_err(|error| fail("serialise")(error.into()))?;
    let mut file = File::create(&temporary).map_err(fail("create"))?;
    file.write_all(&text).map_err(fail("write"))?;
    file.sync_all().map_err(fail("fsync"))?;
    fs::rename(&temporary, path).map_err(fail("rename"))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail("fsync the directory of"))
}
