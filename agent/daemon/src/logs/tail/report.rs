//! What the tailer tells: positions for the next start, its state for people.

use stanchion_core::logs::positions::{Positions, VERSION};

use super::super::counters::{FileStatus, LogsSnapshot};
use super::{Now, Tailer};

impl Tailer {
    /// The positions of the last call were not saved.
    pub fn keep_positions_dirty(&mut self) {
        self.positions_dirty = true;
    }

    /// Some file is acknowledged further than the last call of [`Self::changed_positions`] told.
    pub fn has_changed_positions(&self) -> bool {
        self.positions_dirty
    }

    /// The positions, if they changed since the last call.
    pub fn changed_positions(&mut self) -> Option<Positions> {
        std::mem::take(&mut self.positions_dirty).then(|| self.positions())
    }

    /// How far each file is acknowledged, with what was restored for files that could not be opened yet.
    pub fn positions(&self) -> Positions {
        let open = self.containers.values().flat_map(|container| {
            let generations = container.generations.iter().map(|generation| generation.position(&container.live));
            container.retired.iter().map(|(_, position)| position.clone()).chain(generations)
        });
        let files =
            open.chain(self.journal_positions()).chain(self.moved.iter().chain(self.restored.values().flatten()).cloned()).collect();
        Positions { version: VERSION, node: self.parts.node.clone(), files }
    }

    /// What could not be read although it is there, beside files that are followed: directories, rotated files; with the reason.
    pub fn unread(&self) -> impl Iterator<Item = (String, String)> {
        let directories = self.unread.iter();
        let files = self.containers.values().flat_map(|container| &container.unopened).map(|(path, error)| (path, error));
        directories.chain(files).map(|(path, error)| (path.display().to_string(), error.clone()))
    }

    /// The state for people.
    pub fn snapshot(&self, now: Now) -> LogsSnapshot {
        let mut files = Vec::new();
        for container in self.containers.values() {
            let stream = container.streams[0].or(container.streams[1]).and_then(|id| self.streams.get(id));
            let name = |field: fn(&stanchion_core::logs::names::ContainerRef) -> &String| {
                container.names.as_ref().map(field).cloned().unwrap_or_default()
            };
            for generation in &container.generations {
                let (offset, safe) = (generation.offset, generation.ledger.safe());
                // A file that waits for room grows all the same.
                let size = if generation.finished { generation.size } else { generation.source.size().unwrap_or(generation.size) };
                let size = size.max(offset);
                let behind = generation.behind.filter(|_| safe < size);
                files.push(FileStatus {
                    path: container.live.to_string_lossy().into_owned(),
                    namespace: name(|names| &names.namespace),
                    pod: name(|names| &names.pod),
                    container: name(|names| &names.container),
                    rotated: generation.rotated_ms.is_some(),
                    offset,
                    safe,
                    size,
                    lag_bytes: size - safe,
                    lag_seconds: behind.map_or(0, |behind| behind.seconds(now.mono)),
                    group: stream.map(|stream| stream.group.to_string()).unwrap_or_default(),
                    stream: stream.map(|stream| stream.name.to_string()).unwrap_or_default(),
                    last_error: generation.last_error.clone().or_else(|| stream.and_then(|stream| self.streams.error(stream))),
                });
            }
        }
        files.extend(self.journal_status(now));
        LogsSnapshot { files, counters: self.counters, memory_bytes: self.streams.bytes(), held_bytes: self.held_bytes }
    }
}
