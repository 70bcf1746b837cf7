//! Which log files there are: the flat directory of links, or the tree of pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::DirEntry;
use std::io;
use std::path::{Path, PathBuf};

use stanchion_core::logs::names::{ContainerRef, Rotated, glob, parse_flat, parse_pod_dir, parse_rotated};
use stanchion_core::logs::settings::{HostFiles, LogSettings};

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

/// What cannot be read, and why: of it nothing is known, and of the rest all.
pub(super) type Unread = BTreeMap<PathBuf, io::Error>;

/// What a look at the directories finds.
#[derive(Default)]
pub(super) struct Listing {
    pub(super) found: Vec<Found>,
    /// Directories that cannot be listed: what is in them may be there.
    pub(super) unread: Unread,
    /// Names of logs that lead to none, and why.
    pub(super) odd: BTreeMap<PathBuf, String>,
}

/// The process or the kernel has no room for what was asked: it would fail for any other file too.
pub(super) fn is_want_of_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Lists the live log files under `dir`; `known` names need no resolving. A link whose file does not exist is left out.
pub(super) fn list(dir: &Path, settings: &LogSettings, known: &HashMap<String, PathBuf>) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let homes = homes(dir);
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(".log") {
            if !wanted(name, settings) {
                continue;
            }
            // A link's name holds the container's id, so it never comes to mean another file.
            let live = known.get(name).cloned().or_else(|| listing.log_at(&entry.path(), &homes));
            if let Some(live) = live {
                let names = names_of_flat(name, &live);
                listing.found.push(Found { live, file_name: name.to_owned(), names, host: None });
            }
        } else if name.contains('_') && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            listing.pod_dir(&entry.path(), name, settings, &homes)?;
        }
    }
    for (index, entry) in settings.host_files.iter().enumerate() {
        listing.host_files(index, &entry.path)?;
    }
    listing.found.sort_by(|a, b| a.live.cmp(&b.live));
    listing.found.dedup_by(|a, b| a.live == b.live);
    Ok(listing)
}

/// Where dockerd has the files that links of pods lead to.
const DOCKER: &str = "/var/lib/docker/containers";

/// Where the logs of containers are: beside the directory of their links (/var/log), where its neighbour `pods` leads if that is a link,
/// and in dockerd's directory.
fn homes(dir: &Path) -> Vec<PathBuf> {
    let Some(beside) = std::fs::canonicalize(dir).ok().and_then(|dir| dir.parent().map(Path::to_owned)) else { return Vec::new() };
    let moved = [beside.join("pods"), DOCKER.into()].into_iter().filter_map(|path: PathBuf| std::fs::canonicalize(path).ok());
    let moved: Vec<_> = moved.filter(|path| !path.starts_with(&beside)).collect();
    std::iter::once(beside).chain(moved).collect()
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

/// Entries of a directory; one that is not there has none.
fn entries(dir: &Path) -> io::Result<Vec<DirEntry>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

impl Listing {
    /// Entries of a directory, or word that it cannot be listed: others are not to wait for it.
    ///
    /// # Errors
    /// There is no room to list anything: a file that is not seen because the process has no descriptor left would be a lost file.
    fn entries_if_readable(&mut self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        entries(dir).or_else(|error| {
            if is_want_of_room(&error) {
                return Err(error);
            }
            self.unread.insert(dir.to_owned(), error);
            Ok(Vec::new())
        })
    }

    /// The file that a name of a container's log leads to; `None` if it is not there (any more), or is no log: a pod that mounts the
    /// node's /var/log could have the agent send any file that it can read, or wait at a pipe.
    fn log_at(&mut self, path: &Path, homes: &[PathBuf]) -> Option<PathBuf> {
        let live = std::fs::canonicalize(path).ok()?;
        let why = if !homes.iter().any(|home| live.starts_with(home)) {
            let places: Vec<String> = homes.iter().map(|home| home.display().to_string()).collect();
            format!("it leads to {}, which is not below {}", live.display(), places.join(" or "))
        } else if !std::fs::metadata(&live).ok()?.is_file() {
            "it is no regular file".to_owned()
        } else {
            return Some(live);
        };
        self.odd.insert(path.to_owned(), why);
        None
    }

    fn pod_dir(&mut self, path: &Path, name: &str, settings: &LogSettings, homes: &[PathBuf]) -> io::Result<()> {
        for container in self.entries_if_readable(path)? {
            let container_name = container.file_name();
            let Some(names) = container_name.to_str().and_then(|container| parse_pod_dir(name, container)) else { continue };
            for file in self.entries_if_readable(&container.path())? {
                let file_name = file.file_name();
                let Some(number) = file_name.to_str().and_then(|file| file.strip_suffix(".log")) else { continue };
                let flat = format!("{}_{}_{}-{}-{number}.log", names.pod, names.namespace, names.container, names.uid);
                if wanted(&flat, settings)
                    && let Some(live) = self.log_at(&file.path(), homes)
                {
                    self.found.push(Found { live, file_name: flat, names: Some(names.clone()), host: None });
                }
            }
        }
        Ok(())
    }

    fn host_files(&mut self, index: usize, path: &str) -> io::Result<()> {
        let Some((dir, pattern)) = path.rsplit_once('/') else { return Ok(()) };
        for entry in self.entries_if_readable(Path::new(if dir.is_empty() { "/" } else { dir }))? {
            let name = entry.file_name();
            if let Some(name) = name.to_str()
                && glob(pattern, name)
                && !name.ends_with(".gz")
                && let Ok(live) = std::fs::canonicalize(entry.path())
                && live.is_file()
            {
                self.found.push(Found { live, file_name: name.to_owned(), names: None, host: Some(index) });
            }
        }
        Ok(())
    }
}

/// The path is one of the entry's.
pub(super) fn is_of_entry(entry: &HostFiles, live: &str) -> bool {
    let (Some((dir, pattern)), Some((parent, name))) = (entry.path.rsplit_once('/'), live.rsplit_once('/')) else { return false };
    glob(pattern, name) && (dir == parent || std::fs::canonicalize(dir).is_ok_and(|dir| dir == Path::new(parent)))
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
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub(super) fn rotated(&mut self, live: &Path) -> io::Result<Vec<(Rotated, PathBuf)>> {
        let (Some(dir), Some(name)) = (live.parent(), live.file_name().and_then(|name| name.to_str())) else { return Ok(Vec::new()) };
        if !self.0.contains_key(dir) {
            let names = entries(dir)?.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
            self.0.insert(dir.to_owned(), names.collect());
        }
        let Some(names) = self.0.get(dir) else { return Ok(Vec::new()) };
        let family = names.range(format!("{name}.")..).take_while(|sibling| sibling.starts_with(name));
        let mut siblings: Vec<_> = family.filter_map(|sibling| Some((parse_rotated(name, sibling)?, dir.join(sibling)))).collect();
        siblings.sort();
        siblings.dedup_by(|later, earlier| later.0.suffix == earlier.0.suffix);
        Ok(siblings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_listed_is_told_and_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let in_the_way = dir.path().join("pods");
        let rotated = |path: &Path| Siblings::default().rotated(&path.join("0.log"));
        assert_eq!(rotated(&in_the_way).unwrap(), [], "not there");
        std::fs::write(&in_the_way, "a file").unwrap();
        assert_eq!(rotated(&in_the_way).unwrap_err().kind(), io::ErrorKind::NotADirectory);
        let told = |list: &dyn Fn(&mut Listing)| {
            let mut listing = Listing::default();
            list(&mut listing);
            listing.unread.into_iter().map(|(path, error)| (path, error.kind())).collect::<Vec<_>>()
        };
        let host = |path: &Path| {
            let path = path.join("*.log").display().to_string();
            told(&|listing| listing.host_files(0, &path).unwrap())
        };
        assert_eq!(host(&in_the_way), [(in_the_way.clone(), io::ErrorKind::NotADirectory)]);
        assert_eq!(host(&dir.path().join("none")), []);
        let settings = LogSettings::new(stanchion_core::logs::record::Layout::Raw);
        let pod = told(&|listing| listing.pod_dir(&in_the_way, "ns_pod_uid", &settings, &[]).unwrap());
        assert_eq!(pod, [(in_the_way, io::ErrorKind::NotADirectory)]);
        assert!(is_want_of_room(&io::Error::from_raw_os_error(libc::EMFILE)));
    }
}
