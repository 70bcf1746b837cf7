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

/// What builds every binary.
pub(crate) fn command(root: &Path, profile: Profile) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--workspace", "--bins"]).current_dir(root);
    if matches!(profile, Profile::Release) {
        cargo.arg("--release");
    }
    cargo
}

/// Builds every binary.
pub(crate) fn workspace(root: &Path, profile: Profile) -> Result<()> {
    ui::step("build the binaries (the first time takes some minutes: the EC2 SDK)", &mut command(root, profile))?;
    if matches!(profile, Profile::Release) {
        plugin(root)?;
    }
    Ok(())
}

/// The plugin that is shipped: small, and static, because it runs on the host, whose C library may be another, and because the
/// dynamic linker takes longer than an ADD's netlink requests. Left in `target/plugin` and `target/release`.
pub(crate) fn plugin(root: &Path) -> Result<()> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--package", "stanchion-cni", "--profile", "plugin", "--target", &target]).current_dir(root);
    // With a target of its own the flags reach no build script, and what else was built stays as it is.
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    cargo.env(flags, "-C target-feature=+crt-static -C relocation-model=static");
    ui::step("build the CNI plugin (static, size-optimised)", &mut cargo)?;
    let built = root.join("target").join(target).join("plugin/stanchion-cni");
    for directory in ["target/plugin", "target/release"] {
        std::fs::create_dir_all(root.join(directory))?;
        std::fs::copy(&built, root.join(directory).join("stanchion-cni"))?;
    }
    Ok(())
}

/// Where a built binary is.
pub(crate) fn binary(root: &Path, profile: Profile, name: &str) -> PathBuf {
    root.join("target").join(profile.directory()).join(name)
}
