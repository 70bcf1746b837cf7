//! Builds the eBPF object with what the machine has: Debian's rustc and LLVM, or rustup's nightly with rust-src.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};

use crate::{setup, ui};

/// Debian's packages: a compiler whose `core` for BPF is prebuilt, and the LLVM that bpf-linker links against.
const PACKAGES: [&str; 7] =
    ["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";
const BPF_LINKER: &str = "0.13.0";
const TARGET: &str = "bpfel-unknown-none";

/// Which compiler makes the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Toolchain {
    /// `/usr/bin/rustc` with a prebuilt `core`.
    Debian,
    /// `cargo +nightly -Z build-std`.
    Nightly,
}

impl Toolchain {
    /// The one that is complete on this machine; rustup's nightly first, as it needs nothing from the distribution.
    fn find() -> Option<Self> {
        if !succeeds(Command::new("bpf-linker").arg("--version")) {
            return None;
        }
        if has_nightly() {
            return Some(Self::Nightly);
        }
        has_debian_rustc().then_some(Self::Debian)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc",
            Self::Nightly => "rustup's nightly with rust-src",
        }
    }
}

fn has_nightly() -> bool {
    let Some(sysroot) = output(Command::new("rustc").args(["+nightly", "--print", "sysroot"])) else {
        return false;
    };
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir()
}

fn has_debian_rustc() -> bool {
    output(Command::new(DEBIAN_RUSTC).args(["--print", "target-libdir", "--target", TARGET]))
        .is_some_and(|directory| Path::new(directory.trim()).is_dir())
}

fn succeeds(command: &mut Command) -> bool {
    output(command).is_some()
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Installs what is missing for [`build`]: nothing where a toolchain is complete, else Debian's packages and bpf-linker.
pub(crate) fn ensure_toolchain() -> Result<()> {
    if Toolchain::find().is_some() {
        return Ok(());
    }
    let nightly = has_nightly();
    let llvm = Path::new(DEBIAN_LLVM).join("lib");
    if !(nightly || has_debian_rustc() && llvm.is_dir()) {
        setup::apt_install("install the eBPF toolchain", &PACKAGES).context(
            "without Debian's packages: `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`, then run this again",
        )?;
    }
    if !succeeds(Command::new("bpf-linker").arg("--version")) {
        let mut install = Command::new("cargo");
        install.args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"]);
        if llvm.is_dir() {
            install
                .args(["--no-default-features", "--features", "llvm-22"])
                .env("LLVM_PREFIX", DEBIAN_LLVM)
                .env("RUSTFLAGS", format!("-L {}", llvm.display()));
        }
        ui::step("install bpf-linker (about a minute)", &mut install)?;
    }
    Toolchain::find()
        .map(|_| ())
        .context("the eBPF toolchain is still incomplete: see `bpf-linker --version` and `rustc +nightly --print sysroot`")
}

/// Where [`build`] puts the object; the daemon's build script embeds it from there.
pub(crate) fn object_path(root: &Path) -> PathBuf {
    root.join("target/bpf/stanchion-ebpf.o")
}

/// Builds the object unless it is newer than all its sources.
///
/// # Errors
/// No complete toolchain (the remedy is in the message), or the compiler's failure.
pub(crate) fn build(root: &Path) -> Result<()> {
    let programs = root.join("ebpf/programs");
    let object = object_path(root);
    if up_to_date(&object, &[programs.join("src"), programs.join("Cargo.toml"), programs.join("Cargo.lock"), root.join("ebpf/abi")])? {
        return Ok(());
    }
    let Some(toolchain) = Toolchain::find() else {
        bail!("no BPF toolchain on this machine: run `cargo xtask setup`");
    };
    let target = root.join("target/bpf/build");
    let mut cargo = Command::new("cargo");
    match toolchain {
        Toolchain::Debian => cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").args(["build", "--release"]),
        Toolchain::Nightly => cargo.args(["+nightly", "build", "--release", "-Z", "build-std=core"]),
    };
    // Variables of the cargo that runs this task would override the toolchain chosen here.
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"] {
        cargo.env_remove(variable);
    }
    cargo
        .current_dir(&programs)
        .args(["--locked", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Clinker=bpf-linker\u{1f}-Clink-arg=--btf");
    ui::step(&format!("build the eBPF object with {}", toolchain.name()), &mut cargo)?;
    let built = target.join(TARGET).join("release/stanchion-ebpf");
    let fresh = object.with_extension("o.new");
    fs::copy(&built, &fresh).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&fresh, &object).with_context(|| format!("cannot write {}", object.display()))?;
    Ok(())
}

/// True if the object is there and newer than every file below `sources`.
fn up_to_date(object: &Path, sources: &[PathBuf]) -> Result<bool> {
    let Ok(made) = fs::metadata(object) else {
        return Ok(false);
    };
    let made_at = made.modified()?;
    if made.len() == 0 {
        return Ok(false);
    }
    for source in sources {
        if newest(source)? > made_at {
            return Ok(false);
        }
    }
    Ok(true)
}

fn newest(path: &Path) -> Result<SystemTime> {
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut newest_of = metadata.modified()?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            newest_of = newest_of.max(newest(&entry?.path())?);
        }
    }
    Ok(newest_of)
}
