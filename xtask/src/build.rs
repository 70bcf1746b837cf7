//! Building the workspace: always the whole of it in one feature set, so that the EC2 SDK compiles once a profile.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::ui;

/// Which binaries.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// Quick to build: tests and demo.
    Dev,
    /// What is shipped: benches and images.
    Release,
}

impl Profile {
    fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds every binary.
pub(crate) fn workspace(root: &Path, profile: Profile) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--workspace", "--bins"]).current_dir(root);
    if matches!(profile, Profile::Release) {
        cargo.arg("--release");
    }
    ui::step("build the binaries (the first time takes some minutes: the EC2 SDK)", &mut cargo)?;
    if matches!(profile, Profile::Release) {
        let mut plugin = Command::new("cargo");
        plugin.args(["build", "--package", "stanchion-cni", "--profile", "plugin"]).current_dir(root);
        ui::step("build the CNI plugin (size-optimised)", &mut plugin)?;
        std::fs::copy(root.join("target/plugin/stanchion-cni"), root.join("target/release/stanchion-cni"))?;
    }
    Ok(())
}

/// Where a built binary is.
pub(crate) fn binary(root: &Path, profile: Profile, name: &str) -> PathBuf {
    root.join("target").join(profile.directory()).join(name)
}
