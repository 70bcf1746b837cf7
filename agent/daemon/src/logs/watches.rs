//! Which directories are watched: those of files that are quiet. A file that grows is looked at anyway, and an event for each of
//! its writes would cost more than the looks.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::container::Container;

/// The directories of quiet files.
#[derive(Debug, Default)]
pub(super) struct Watches {
    dirs: HashMap<PathBuf, Dir>,
    changes: Vec<(PathBuf, bool)>,
}

#[derive(Debug, Default)]
struct Dir {
    /// Events come.
    live: bool,
    quiet: BTreeSet<u64>,
}

impl Watches {
    /// The container is quiet.
    pub(super) fn ask(&mut self, container: &mut Container) {
        let Some(parent) = container.live.parent() else { return };
        let dir = self.dirs.entry(parent.to_owned()).or_insert_with(|| {
            self.changes.push((parent.to_owned(), true));
            Dir::default()
        });
        dir.quiet.insert(container.id);
        container.watched = dir.live;
    }

    /// The container grows, or is no more.
    pub(super) fn leave(&mut self, container: &mut Container) {
        container.watched = false;
        let Some(parent) = container.live.parent() else { return };
        let Some(dir) = self.dirs.get_mut(parent) else { return };
        dir.quiet.remove(&container.id);
        if dir.quiet.is_empty() {
            self.dirs.remove(parent);
            self.changes.push((parent.to_owned(), false));
        }
    }

    /// Events of the directory come from now on; who waits for them.
    pub(super) fn confirm(&mut self, dir: &Path) -> Vec<u64> {
        let Some(dir) = self.dirs.get_mut(dir) else { return Vec::new() };
        dir.live = true;
        dir.quiet.iter().copied().collect()
    }

    /// What to watch (true) and what not any more, in order.
    pub(super) fn take_changes(&mut self) -> Vec<(PathBuf, bool)> {
        std::mem::take(&mut self.changes)
    }
}
