//! Building the workspace: always the whole of it in one feature set, so that the EC2 SDK compiles once a profile.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

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

/// Cargo in the root of the checkout, without what `cargo run` told this task of its own package: build scripts that read such a variable
/// (ring's does) would run again, and all that needs them be compiled again, whenever a person and a task take turns.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|of_this_task| name.to_string_lossy().starts_with(of_this_task)) {
            cargo.env_remove(name);
        }
    }
    cargo.current_dir(root);
    cargo
}

/// What builds every binary.
pub(crate) fn command(root: &Path, profile: Profile) -> Command {
    let mut cargo = cargo(root);
    cargo.args(["build", "--workspace", "--bins"]);
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

/// The plugin that is shipped: static, because it runs on the host, whose C library may be another; and on musl, because what happens
/// before `main` is a third of an ADD. The dynamic linker takes longer than an ADD's netlink requests, and glibc's static start 0.3 ms
/// more than musl's: it asks the processor for its features (`cpuid`), an exit to the hypervisor each time. Left in `target/plugin` and
/// `target/release`.
pub(crate) fn plugin(root: &Path) -> Result<()> {
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let libraries = Command::new("rustc").args(["--print", "target-libdir", "--target", &target]).current_dir(root).output()?;
    if !Path::new(String::from_utf8_lossy(&libraries.stdout).trim()).exists() {
        ui::step("install Rust's standard library for musl", Command::new("rustup").args(["target", "add", &target]).current_dir(root))
            .with_context(|| format!("without rustup: the standard library of this rustc for {target}"))?;
    }
    let mut cargo = cargo(root);
    cargo.args(["build", "--package", "stanchion-cni", "--profile", "plugin", "--target", &target]);
    // With a target of its own the flags reach no build script, and what else was built stays as it is. One short hash a pod is not worth
    // three questions to the processor.
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    cargo.env(flags, "-C target-feature=+crt-static -C relocation-model=static --cfg sha1_backend=\"soft\"");
    ui::step("build the CNI plugin (static, on musl)", &mut cargo)?;
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
