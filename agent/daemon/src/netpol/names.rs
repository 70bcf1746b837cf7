//! Frames of pods with rules about names: the DNS answers they got and what they sent too early; and the file in which what they said outlives the agent.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stanchion_core::policy::image::Slot;
use stanchion_core::policy::names::Names;
use stanchion_ebpf_abi::map_name;

use super::files::NAMES;
use super::object::{LoadError, Loaded};
use super::ring::Ring;

/// Frames read in one go, so that a flood cannot keep the actor from its mailbox.
const BATCH: usize = 128;

/// Bumped when the file's meaning changes; another version is passed over.
const VERSION: u32 = 1;

/// The ring's reader.
pub(super) struct PodFrames(Ring);

impl PodFrames {
    /// Must be called in the runtime that will wait.
    pub(super) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self(Ring::new(loaded, map_name::NAMES)?))
    }

    /// Returns when there is something to take.
    pub(super) async fn wait(&self) {
        self.0.wait().await;
    }

    /// Hands over what is there, up to a batch: the pod, the [`stanchion_ebpf_abi::frame_kind`] and the frame. The programs see a
    /// frame as unread until `each` returns.
    pub(super) fn take(&mut self, mut each: impl FnMut(Slot, u8, &[u8])) {
        self.0.take(BATCH, |record| {
            if let [s0, s1, l0, l1, kind, _, _, _, frame @ ..] = record
                && let Some(frame) = frame.get(..usize::from(u16::from_ne_bytes([*l0, *l1])))
            {
                each(Slot(u16::from_ne_bytes([*s0, *s1])), *kind, frame);
            }
        });
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// Address, name, and the second since 1970 until which it holds.
    names: Vec<(IpAddr, String, u64)>,
}

/// The names that an earlier agent knew. Without them the addresses they stand for are denied until a pod asks again, so
/// a file that cannot be read is no reason not to start.
pub(super) fn read(state_dir: &Path) -> io::Result<Vec<(IpAddr, String, u64)>> {
    match fs::read(path(state_dir)) {
        Ok(bytes) => {
            let file: File = serde_json::from_slice(&bytes)?;
            Ok(if file.version == VERSION { file.names } else { Vec::new() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes the names, by rename without fsync: the maps that they explain do not outlive the kernel either.
pub(super) fn save(state_dir: &Path, names: &Names) -> io::Result<()> {
    let names = names.all().map(|(address, name, until)| (address, name.to_owned(), until)).collect();
    let fresh = path(state_dir).with_extension("json.new");
    fs::write(&fresh, serde_json::to_vec(&File { version: VERSION, names })?)?;
    fs::rename(&fresh, path(state_dir))
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(NAMES)
}
