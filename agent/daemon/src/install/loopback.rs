//! The plugin `loopback`, which runtimes call for every pod before any other: the CNI project's where it is installed, else
//! ours, which answers to that name too.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use stanchion_core::conflist::PLUGIN;

/// The plugin's name.
pub(super) const NAME: &str = "loopback";

/// Makes sure that there is one; true if it was made. Our binary must be in place.
///
/// # Errors
/// The directory cannot be written.
pub(super) fn ensure(bin_dir: &Path) -> io::Result<bool> {
    let path = bin_dir.join(NAME);
    if path.symlink_metadata().is_ok() {
        return Ok(false);
    }
    symlink(PLUGIN, path).map(|()| true)
}

/// Takes it away where it is ours; true if it was.
///
/// # Errors
/// It is ours and cannot be removed.
pub(super) fn remove(bin_dir: &Path) -> io::Result<bool> {
    let path = bin_dir.join(NAME);
    let ours = fs::read_link(&path).is_ok_and(|target| target == Path::new(PLUGIN));
    if ours { fs::remove_file(path).map(|()| true) } else { Ok(false) }
}
