//! The real binaries, as cargo built them beside this one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What the lab runs.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `stanchion`: agent and command line.
    pub stanchion: PathBuf,
    /// `stanchion-cni`: the plugin.
    pub plugin: PathBuf,
}

/// Where `cargo xtask coverage` has a process leave its counters: the one variable that outlives a cleared environment.
pub fn counters() -> Option<(&'static str, OsString)> {
    const NAME: &str = "LLVM_PROFILE_FILE";
    std::env::var_os(NAME).map(|value| (NAME, value))
}

impl Binaries {
    /// Looks beside the running binary: `target/<profile>/`, or its parent when it runs from `deps/`.
    ///
    /// # Errors
    /// When one is missing, with the command that builds it.
    pub fn find() -> anyhow::Result<Self> {
        let here = std::env::current_exe()?;
        let mut dir = here.parent().unwrap_or(Path::new("."));
        if dir.ends_with("deps") {
            dir = dir.parent().unwrap_or(dir);
        }
        let find = |name: &str| {
            let path = dir.join(name);
            let missing = || anyhow::anyhow!("{} is not there: build it with `cargo build --workspace --bins`", path.display());
            path.is_file().then(|| path.clone()).ok_or_else(missing)
        };
        Ok(Self { stanchion: find("stanchion")?, plugin: find("stanchion-cni")? })
    }
}
