//! Files that others read at any moment: written beside, then renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was there with this content and mode.
    Unchanged,
    /// It was made or replaced.
    Written,
}

/// A file that cannot be put in place.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}")]
pub struct FileError {
    /// What was tried.
    pub operation: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

fn fail(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { operation, path, source }
}

/// Puts a file in place: whoever opens the path sees the old content or the new one, also across a crash.
///
/// # Errors
/// The directory does not exist, or cannot be written.
pub fn put(path: &Path, content: &[u8], mode: u32) -> Result<Outcome, FileError> {
    let present = fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o7777 == mode);
    if present && fs::read(path).is_ok_and(|old| old == content) {
        return Ok(Outcome::Unchanged);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A dot in front: runtimes pass over what does not end in .conf, .conflist or .json, and over nothing half-written.
    let temporary = directory.join(format!(".{name}.{}.new", std::process::id()));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary).map_err(fail("create", &temporary))?;
    let written =
        file.write_all(content).and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode))).and_then(|()| file.sync_all());
    drop(file);
    let placed = written.map_err(fail("write", &temporary)).and_then(|()| fs::rename(&temporary, path).map_err(fail("rename to", path)));
    if let Err(error) = placed {
        // The failure that matters is the one above.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail("fsync the directory of", path))?;
    Ok(Outcome::Written)
}

/// What differs whenever a file is another or was written: device, inode, length, and its last change in seconds and nanoseconds.
pub(super) type Stamp = (u64, u64, u64, i64, i64);

/// `None` where there is no file.
pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()))
}

/// Removes a file; true if it was there.
///
/// # Errors
/// It is there and cannot be removed.
pub fn remove(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(fail("remove", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_binary_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugin");
        assert_eq!(put(&path, b"one", 0o755).unwrap(), Outcome::Written);
        // An open file is not written through: its reader keeps the old one.
        let mut open = File::open(&path).unwrap();
        assert_eq!(put(&path, b"one", 0o755).unwrap(), Outcome::Unchanged);
        assert_eq!(put(&path, b"two", 0o755).unwrap(), Outcome::Written);
        let mut old = String::new();
        io::Read::read_to_string(&mut open, &mut old).unwrap();
        assert_eq!((old.as_str(), fs::read(&path).unwrap().as_slice()), ("one", &b"two"[..]));
        assert_eq!(put(&path, b"two", 0o644).unwrap(), Outcome::Written, "the mode counts");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(remove(&path).unwrap() && !remove(&path).unwrap());
        let error = put(&directory.path().join("none/plugin"), b"", 0o755).unwrap_err();
        assert!(error.to_string().starts_with("create "), "{error}");
    }
}
