//! Which log files there are: the flat directory of links, or the tree of pods.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use stanchion_core::logs::names::{ContainerRef, Rotated, glob, parse_flat, parse_pod_dir, parse_rotated};
use stanchion_core::logs::settings::LogSettings;

/// A live log file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Symlinks resolved.
    pub(super) live: PathBuf,
    /// As under /var/log/containers, as far as known.
    pub(super) file_name: String,
    /// What the names say.
    pub(super) names: Option<ContainerRef>,
    /// A file of the node: which entry of the settings says so.
    pub(super) host: Option<usize>,
}

/// Lists the live log files under `dir`; `known` names need no resolving. A link whose file does not exist is left out.
pub(super) fn list(dir: &Path, settings: &LogSettings, known: &HashMap<String, PathBuf>) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(".log") {
            // A link's name holds the container's id, so it never comes to mean another file.
            let live = known.get(name).cloned().map_or_else(|| std::fs::canonicalize(entry.path()), Ok);
            // Deleted between the listing and here: not there.
            if let Ok(live) = live
                && wanted(name, settings)
            {
                let names = names_of_flat(name, &live);
                found.push(Found { live, file_name: name.to_owned(), names, host: None });
            }
        } else if name.contains('_') && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pod_dir(&entry.path(), name, settings, &mut found);
        }
    }
    settings.host_files.iter().enumerate().for_each(|(index, entry)| host_files(index, &entry.path, &mut found));
    found.sort_by(|a, b| a.live.cmp(&b.live));
    found.dedup_by(|a, b| a.live == b.live);
    Ok(found)
}

/// The link's target in the tree says the pod's uid too.
fn names_of_flat(name: &str, live: &Path) -> Option<ContainerRef> {
    let mut names = parse_flat(name)?;
    let container = live.parent();
    let pod = container.and_then(Path::parent).and_then(Path::file_name).and_then(|name| name.to_str());
    if let Some(tree) = pod.and_then(|pod| parse_pod_dir(pod, &names.container))
        && (&tree.namespace, &tree.pod) == (&names.namespace, &names.pod)
    {
        names.uid = tree.uid;
    }
    Some(names)
}

fn pod_dir(path: &Path, name: &str, settings: &LogSettings, found: &mut Vec<Found>) {
    for container in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let container_name = container.file_name();
        let Some(names) = container_name.to_str().and_then(|container| parse_pod_dir(name, container)) else { continue };
        for file in std::fs::read_dir(container.path()).into_iter().flatten().flatten() {
            let file_name = file.file_name();
            let Some(number) = file_name.to_str().and_then(|file| file.strip_suffix(".log")) else { continue };
            let flat = format!("{}_{}_{}-{}-{number}.log", names.pod, names.namespace, names.container, names.uid);
            if let Ok(live) = std::fs::canonicalize(file.path())
                && wanted(&flat, settings)
            {
                found.push(Found { live, file_name: flat, names: Some(names.clone()), host: None });
            }
        }
    }
}

/// A directory that is not there has no files.
fn host_files(index: usize, path: &str, found: &mut Vec<Found>) {
    let Some((dir, pattern)) = path.rsplit_once('/') else { return };
    for entry in std::fs::read_dir(if dir.is_empty() { "/" } else { dir }).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Some(name) = name.to_str()
            && glob(pattern, name)
            && !name.ends_with(".gz")
            && let Ok(live) = std::fs::canonicalize(entry.path())
            && live.is_file()
        {
            found.push(Found { live, file_name: name.to_owned(), names: None, host: Some(index) });
        }
    }
}

fn wanted(name: &str, settings: &LogSettings) -> bool {
    let any = |globs: &[String]| globs.iter().any(|pattern| glob(pattern, name));
    (settings.include.is_empty() || any(&settings.include)) && !any(&settings.exclude)
}

/// Names in directories, listed once for all the files of one look: thousands may share a directory.
#[derive(Default)]
pub(super) struct Siblings(HashMap<PathBuf, BTreeSet<String>>);

impl Siblings {
    /// Rotated siblings of a live file, oldest first. Where both forms of one are there, compression is at work: the plain
    /// one is whole.
    pub(super) fn rotated(&mut self, live: &Path) -> Vec<(Rotated, PathBuf)> {
        let (Some(dir), Some(name)) = (live.parent(), live.file_name().and_then(|name| name.to_str())) else { return Vec::new() };
        if !self.0.contains_key(dir) {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            self.0.insert(dir.to_owned(), entries.filter_map(|entry| entry.file_name().into_string().ok()).collect());
        }
        let Some(names) = self.0.get(dir) else { return Vec::new() };
        let family = names.range(format!("{name}.")..).take_while(|sibling| sibling.starts_with(name));
        let mut siblings: Vec<_> = family.filter_map(|sibling| Some((parse_rotated(name, sibling)?, dir.join(sibling)))).collect();
        siblings.sort();
        siblings.dedup_by(|later, earlier| later.0.suffix == earlier.0.suffix);
        siblings
    }
}
