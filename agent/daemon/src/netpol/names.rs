//! Frames of pods with rules about names: the DNS answers they got and what they sent too early; and the file in which what they said outlives the agent.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use stanchion_core::policy::image::Slot;
use stanchion_core::policy::names::Names;
use stanchion_ebpf_abi::map_name;
use tokio::time::Instant;

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

/// The seconds since 1970 by which names end: those of the node's clock when the agent started, and what has passed since. Whoever sets
/// the clock makes no name live longer or shorter.
#[derive(Clone, Copy, Debug)]
pub(super) struct NameClock {
    began: u64,
    since: Instant,
}

impl NameClock {
    pub(super) fn start() -> Self {
        Self { began: time_of_day(), since: Instant::now() }
    }

    pub(super) fn now(&self) -> u64 {
        self.began.saturating_add(self.since.elapsed().as_secs())
    }
}

fn time_of_day() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// The second since 1970, by the node's clock, in which this was written; 0 in files of earlier releases.
    #[serde(default)]
    saved: u64,
    /// Address, name, and the second since 1970 until which it holds, by the same clock.
    names: Vec<(IpAddr, String, u64)>,
}

impl File {
    fn of<'a>(names: impl Iterator<Item = (IpAddr, &'a str, u64)>, now: u64, saved: u64) -> Self {
        let lives = |until: u64| saved.saturating_add(until.saturating_sub(now));
        Self { version: VERSION, saved, names: names.map(|(address, name, until)| (address, name.to_owned(), lives(until))).collect() }
    }

    /// None lives longer from now than when this was written: the node's clock may have been set back since.
    fn known(self, now: u64) -> Vec<(IpAddr, String, u64)> {
        if self.version != VERSION {
            return Vec::new();
        }
        let saved = self.saved;
        let ends = |until: u64| until.min(now.saturating_add(until.saturating_sub(saved)));
        self.names.into_iter().map(|(address, name, until)| (address, name, ends(until))).collect()
    }
}

/// The names that an earlier agent knew. Without them the addresses they stand for are denied until a pod asks again, so
/// a file that cannot be read is no reason not to start.
pub(super) fn read(state_dir: &Path, now: u64) -> io::Result<Vec<(IpAddr, String, u64)>> {
    match fs::read(path(state_dir)) {
        Ok(bytes) => Ok(serde_json::from_slice::<File>(&bytes)?.known(now)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes the names, by rename without fsync: the maps that they explain do not outlive the kernel either.
pub(super) fn save(state_dir: &Path, names: &Names, clock: NameClock) -> io::Result<()> {
    let fresh = path(state_dir).with_extension("json.new");
    fs::write(&fresh, serde_json::to_vec(&File::of(names.all(), clock.now(), time_of_day()))?)?;
    fs::rename(&fresh, path(state_dir))
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(NAMES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The minute that a name has left when it is written is what it has left, wherever the clock is then and at the next start.
    #[test]
    fn a_clock_that_is_set_makes_no_name_live_longer() {
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        let known = [(address, "a.example", 1_060)];
        for (saved, start, until) in [
            (1_000, 1_000, 1_060),
            // The next agent starts twenty seconds later.
            (1_000, 1_020, 1_060),
            // The clock was set while the agent ran, forward or back.
            (8_200, 8_200, 8_260),
            (100, 120, 160),
            // It was set back between the two.
            (9_000, 1_000, 1_060),
        ] {
            let text = serde_json::to_vec(&File::of(known.into_iter(), 1_000, saved)).expect("JSON");
            let file: File = serde_json::from_slice(&text).expect("what was written");
            assert_eq!(file.known(start), [(address, "a.example".to_owned(), until)], "written at {saved}, read at {start}");
        }
    }

    #[test]
    fn a_file_of_an_earlier_release_is_read() {
        let file: File = serde_json::from_str(r#"{"version":1,"names":[["192.0.2.1","a.example",1060]]}"#).expect("its form");
        assert_eq!(file.known(1_000)[0].2, 1_060);
        let file: File = serde_json::from_str(r#"{"version":2,"names":[["192.0.2.1","a.example",1060]]}"#).expect("its form");
        assert!(file.known(1_000).is_empty(), "who knows what it means");
    }
}
