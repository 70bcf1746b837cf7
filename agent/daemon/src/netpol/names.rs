//! Frames of pods with rules about names: the DNS answers they got and what they sent too early; and the file in which what they said outlives the agent.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use stanchion_core::boot::Boot;
use stanchion_core::policy::image::Slot;
use stanchion_core::policy::names::{KnownName, Names};
use stanchion_ebpf_abi::map_name;
use tokio::time::Instant;

use super::files::NAMES;
use super::object::{LoadError, Loaded};
use super::ring::Ring;
use crate::boot::this_boot;

/// Frames read in one go, so that a flood cannot keep the actor from its mailbox.
const BATCH: usize = 128;

/// Bumped when the file's meaning changes; a later version is passed over.
const VERSION: u32 = 2;

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
#[derive(Clone, Debug)]
pub(super) struct NameClock {
    began: u64,
    since: Instant,
    /// This one, by the clock when the agent started.
    boot: Option<Boot>,
}

impl NameClock {
    pub(super) fn start() -> Self {
        let time_of_day = SystemTime::now();
        Self { began: since_1970(time_of_day), since: Instant::now(), boot: this_boot(time_of_day) }
    }

    pub(super) fn now(&self) -> u64 {
        self.began.saturating_add(self.since.elapsed().as_secs())
    }
}

fn since_1970(time_of_day: SystemTime) -> u64 {
    time_of_day.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// The second since 1970, by the node's clock, in which this was written; 0 in files of earlier releases.
    #[serde(default)]
    saved: u64,
    /// In which this was written, by the same clock; missing in files of earlier releases and where the kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot: Option<Boot>,
    names: Vec<Name>,
}

/// Address, name, the second since 1970 until which it holds, by the same clock, and the namespace for which it does.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Name {
    OfNamespace(IpAddr, String, u64, String),
    /// In files of version 1: for all.
    OfAll(IpAddr, String, u64),
}

impl From<Name> for KnownName {
    fn from(name: Name) -> Self {
        match name {
            Name::OfNamespace(address, name, until, namespace) => Self { address, name, namespace, until },
            Name::OfAll(address, name, until) => Self { address, name, namespace: String::new(), until },
        }
    }
}

impl File {
    /// `boot` is the present one by the clock of `saved`.
    fn of(names: impl Iterator<Item = KnownName>, now: u64, saved: u64, boot: Option<Boot>) -> Self {
        let lives = |until: u64| saved.saturating_add(until.saturating_sub(now));
        let names = names.map(|known| Name::OfNamespace(known.address, known.name, lives(known.until), known.namespace)).collect();
        Self { version: VERSION, saved, boot, names }
    }

    /// By a clock that says `now`, and by which `boot` is the present one. None lives longer from now than when this was written: where the
    /// boot does not tell how far the clock was set since, it may have been set back.
    fn known(self, now: u64, boot: Option<&Boot>) -> Vec<KnownName> {
        if self.version > VERSION {
            return Vec::new();
        }
        let (saved, boots) = (self.saved, boot.zip(self.boot.as_ref()));
        let reckoned =
            |until: u64| boots.and_then(|(boot, written)| boot.reckon(written, until.saturating_mul(1_000))).map(|ms| ms / 1_000);
        let ends = |until: u64| reckoned(until).unwrap_or(until).min(now.saturating_add(until.saturating_sub(saved)));
        self.names.into_iter().map(KnownName::from).map(|known| KnownName { until: ends(known.until), ..known }).collect()
    }
}

/// The names that an earlier agent knew. Without them the addresses they stand for are denied until a pod asks again, so
/// a file that cannot be read is no reason not to start.
pub(super) fn read(state_dir: &Path, clock: &NameClock) -> io::Result<Vec<KnownName>> {
    match fs::read(path(state_dir)) {
        Ok(bytes) => Ok(serde_json::from_slice::<File>(&bytes)?.known(clock.now(), clock.boot.as_ref())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes the names, by rename without fsync: the maps that they explain do not outlive the kernel either.
pub(super) fn save(state_dir: &Path, names: &Names, clock: &NameClock) -> io::Result<()> {
    let time_of_day = SystemTime::now();
    let file = File::of(names.all(), clock.now(), since_1970(time_of_day), this_boot(time_of_day));
    let fresh = path(state_dir).with_extension("json.new");
    fs::write(&fresh, serde_json::to_vec(&file)?)?;
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
    fn a_clock_that_is_set_makes_no_name_live_longer_or_shorter() {
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        let of = |until| KnownName { address, name: "a.example".to_owned(), namespace: "x".to_owned(), until };
        // The node has been up for 500 seconds when the file is written, and for 520 when the next agent starts.
        let boot = |id: &str, seconds: u64| Some(Boot { id: id.to_owned(), began_ms: seconds as i64 * 1_000 });
        for (saved, start, until, until_of_another_boot) in [
            (1_000, 1_020, 1_060, 1_060),
            // The clock was set while the agent ran, forward or back.
            (8_200, 8_220, 8_260, 8_260),
            (700, 720, 760, 760),
            // It was set back between the two, or forward.
            (9_000, 1_020, 1_060, 1_080),
            (1_000, 9_020, 9_060, 1_060),
        ] {
            let text = serde_json::to_vec(&File::of(std::iter::once(of(1_060)), 1_000, saved, boot("a", saved - 500))).expect("JSON");
            for (id, until) in [("a", until), ("b", until_of_another_boot)] {
                let file: File = serde_json::from_slice(&text).expect("what was written");
                let names = file.known(start, boot(id, start - 520).as_ref());
                assert_eq!(names, [of(until)], "written at {saved}, read at {start} in {id}");
            }
        }
    }

    #[test]
    fn a_file_of_an_earlier_release_is_read() {
        let file: File = serde_json::from_str(r#"{"version":1,"names":[["192.0.2.1","a.example",1060]]}"#).expect("its form");
        let known = file.known(1_000, None);
        assert_eq!((known[0].until, known[0].namespace.as_str()), (1_060, ""), "it counts for all, as it did");
        let file: File = serde_json::from_str(r#"{"version":3,"names":[["192.0.2.1","a.example",1060]]}"#).expect("its form");
        assert!(file.known(1_000, None).is_empty(), "who knows what it means");
    }
}
