//! Sysctls of the calling thread's network namespace.

use std::io;
use std::path::Path;

/// Where sysctls are, for whoever sees the host's.
pub const ROOT: &str = "/proc/sys";

/// The present value below `root`; `None` when the kernel has no such sysctl.
///
/// # Errors
/// When it is there but cannot be read.
pub fn read(root: &Path, path: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(root.join(path)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value.
///
/// # Errors
/// When there is no such sysctl, or it cannot be written.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    std::fs::write(Path::new(ROOT).join(path), value)
}

/// Writes a value below `root` if it is another one: a read-only `/proc/sys` with the wanted values is good enough. A sysctl
/// that the kernel does not have (IPv6 switched off at boot) is left out silently.
///
/// # Errors
/// When it has another value and cannot be written.
pub fn ensure(root: &Path, path: &str, value: &str) -> io::Result<()> {
    match read(root, path)? {
        None => Ok(()),
        Some(present) if present == value => Ok(()),
        Some(_) => std::fs::write(root.join(path), value),
    }
}
