//! The sweep: which files there are, which are new, renamed or gone, and which are given up.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stanchion_core::logs::join::Joiner;
use stanchion_core::logs::record::RecordWriter;
use stanchion_core::logs::settings::ReadFrom;
use tracing::{info, warn};

use super::super::container::{Behind, Container, Generation};
use super::super::discover::{self, Found, Listing, Siblings, Unread};
use super::super::follow::{follow, open_generations};
use super::{METADATA_WAIT_MS, Now, ROTATE_WAIT_MS, Tailer};

impl Tailer {
    /// Looks which files there are, and follows what is new, renamed or gone. Safe to call at any time; the truth when events of
    /// the file system were missed.
    ///
    /// # Errors
    /// The directory cannot be listed; nothing changed then.
    pub fn scan(&mut self, now: Now) -> io::Result<()> {
        let Listing { found, unread, odd } = discover::list(&self.parts.log_dir, &self.parts.settings, &self.by_name)?;
        let mut unopened = HashSet::new();
        let mut siblings = Siblings::default();
        let errors = self.counters.file_errors;
        for found in found {
            unopened.insert(found.live.clone());
            match self.by_path.get(&found.live) {
                Some(id) => {
                    let id = *id;
                    self.follow_rotation(id, now);
                }
                None => self.begin_container(found, &mut siblings, now),
            }
        }
        let journal = self.parts.settings.journal.as_ref().map(|journal| journal.read_from);
        self.scan_journals(journal.filter(|_| self.journal_is_new));
        // What follows appears while we are here: it is read from its first byte.
        self.begin = ReadFrom::Head;
        self.journal_is_new = false;
        self.new_hosts.clear();
        if unread.is_empty() {
            self.moved.clear();
        }
        if unread.is_empty() && self.counters.file_errors == errors {
            self.inherited = None;
        }
        // What is in a directory that cannot be listed may be there.
        self.restored.retain(|path, _| !unread.is_empty() || unopened.contains(path));
        self.tell_unread(unread, odd);
        let ids: Vec<_> = self.containers.keys().copied().collect();
        for id in ids {
            self.check_gone(id, now);
        }
        self.note_waiting(now);
        self.evict(now);
        Ok(())
    }

    /// Directories are told until they can be listed, and odd names until they are gone; they are said once.
    fn tell_unread(&mut self, unread: Unread, odd: BTreeMap<PathBuf, String>) {
        let told = std::mem::take(&mut self.unread);
        for (path, error) in &unread {
            self.counters.file_errors += 1;
            if !told.contains_key(path) {
                warn!(path = %path.display(), %error, "cannot list log files; tried again at every sweep");
            }
        }
        for (path, why) in odd.iter().filter(|(path, _)| !told.contains_key(*path)) {
            self.counters.file_errors += 1;
            warn!(path = %path.display(), why, "not read: it is named as a container's log and is none");
        }
        self.unread = unread.into_iter().map(|(path, error)| (path, error.to_string())).chain(odd).collect();
    }

    /// The file is open under another name, and read there to its end: a file of the node that was renamed.
    fn is_held(&self, live: &Path, but: Option<u64>) -> bool {
        let Ok(metadata) = std::fs::metadata(live) else { return false };
        let is_it = |generation: &Generation| (generation.dev, generation.inode) == (metadata.dev(), metadata.ino());
        let hosts = self.containers.values().filter(|container| container.host.is_some() && Some(container.id) != but);
        hosts.flat_map(|container| &container.generations).any(is_it)
    }

    pub(super) fn begin_container(&mut self, found: Found, siblings: &mut Siblings, now: Now) {
        if found.host.is_some() && self.is_held(&found.live, None) {
            return;
        }
        let id = self.next_container;
        let settings = &self.parts.settings;
        let mut container = Container {
            id,
            live: found.live,
            file_name: found.file_name,
            names: found.names,
            identity: None,
            writer: RecordWriter::new(&settings.record, None),
            streams: [None, None],
            joiner: Joiner::new(settings.rules.clone(), settings.bounds).sparing(settings.redactions.clone()),
            generations: Default::default(),
            next_generation: 0,
            known_rotated: Default::default(),
            retired: None,
            gone_ms: None,
            wait_until_ms: now.mono + METADATA_WAIT_MS,
            due: None,
            quiet_ms: now.mono,
            watched: false,
            open_bytes: 0,
            host: found.host,
            unopened: Vec::new(),
        };
        let begin = if container.host.is_some_and(|entry| self.new_hosts.contains(&entry)) { settings.read_from } else { self.begin };
        let positions = self.restored.remove(&container.live).unwrap_or_default();
        let inherited = match &self.inherited {
            Some(inherited) if positions.is_empty() => inherited.positions(&container.live, &container.file_name, siblings),
            _ => Ok(positions.clone()),
        };
        let moved = if container.host.is_some() { self.moved.as_slice() } else { &[] };
        let mut unread = Unread::default();
        let opened =
            inherited.and_then(|positions| open_generations(&mut container, (&positions, moved), begin, siblings, now.mono, &mut unread));
        match opened {
            Ok(()) => {
                self.counters.file_errors += container.pass_over(unread);
                self.next_container += 1;
                self.identify(&mut container);
                info!(path = %container.live.display(), generations = container.generations.len(), "following");
                self.by_path.insert(container.live.clone(), id);
                self.by_name.insert(container.file_name.clone(), container.live.clone());
                self.containers.insert(id, container);
                self.schedule(id, now.mono);
                self.positions_dirty = true;
            }
            Err(error) => {
                self.counters.file_errors += 1;
                if !positions.is_empty() {
                    self.restored.insert(container.live.clone(), positions);
                }
                warn!(path = %container.live.display(), %error, "cannot open; tried again at the next sweep");
            }
        }
    }

    pub(super) fn follow_rotation(&mut self, id: u64, now: Now) {
        let Some(container) = self.containers.get(&id) else { return };
        if container.host.is_some() && self.is_held(&container.live, Some(id)) {
            return;
        }
        let Some(container) = self.containers.get_mut(&id) else { return };
        let mut unread = Unread::default();
        let result = follow(container, &self.moved, now.mono, &mut unread);
        self.counters.file_errors += container.pass_over(unread);
        match result {
            Ok(false) => {}
            Ok(true) => {
                self.positions_dirty = true;
                self.schedule(id, now.mono);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.counters.file_errors += 1;
                warn!(path = %container.live.display(), %error, "cannot follow the rotation");
            }
        }
    }

    pub(super) fn check_gone(&mut self, id: u64, now: Now) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        if container.gone_ms.is_none() && container.live.try_exists().is_ok_and(|exists| !exists) {
            container.gone_ms = Some(now.mono);
            for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_none()) {
                generation.rotated_ms = Some(now.mono);
            }
            self.schedule(id, now.mono);
        }
    }

    /// Files that are not looked at, because there is no room for what they have: since when they wait.
    fn note_waiting(&mut self, now: Now) {
        let full = self.is_full();
        for (id, container) in &mut self.containers {
            if !full && !self.blocked.contains(id) {
                continue;
            }
            for generation in container.generations.iter_mut().filter(|generation| !generation.finished) {
                if let Ok(size) = generation.source.size()
                    && size > generation.offset
                {
                    generation.behind = Some(Behind::since(generation.behind, size, now.mono));
                }
            }
        }
    }

    /// Deleted files keep their disk space while they are open here: beyond the budget the oldest are given up, loudly.
    pub(super) fn evict(&mut self, now: Now) {
        let mut held = Vec::new();
        for container in self.containers.values_mut() {
            for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_some()) {
                if let Ok(metadata) = generation.source.metadata()
                    && metadata.nlink() == 0
                {
                    held.push((generation.rotated_ms, container.id, generation.number, metadata.len()));
                }
            }
        }
        held.sort_unstable();
        let mut total: u64 = held.iter().map(|(_, _, _, size)| size).sum();
        for (_, id, number, size) in held {
            if total <= self.parts.settings.held_bytes {
                break;
            }
            total -= size;
            let Some(container) = self.containers.get_mut(&id) else { continue };
            let Some(generation) = container.generation_mut(number) else { continue };
            let lost = generation.source.size().unwrap_or(size).saturating_sub(generation.offset);
            self.counters.evicted_bytes += lost;
            warn!(path = %container.live.display(), lost, "gave up a deleted file: too much disk is held by files not read yet");
            if let Some(generation) = container.generation_mut(number) {
                generation.finished = true;
                generation.rotated_ms = Some(now.mono - ROTATE_WAIT_MS);
            }
            container.generations.retain(|generation| generation.number != number);
        }
        self.held_bytes = total;
    }

    pub(super) fn forget(&mut self, mut container: Container) {
        self.watches.leave(&mut container);
        self.open_bytes -= container.open_bytes;
        self.by_path.remove(&container.live);
        self.by_name.remove(&container.file_name);
        container.streams.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
        self.positions_dirty = true;
    }
}
