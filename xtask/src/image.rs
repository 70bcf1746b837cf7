//! The container image without a container engine: a root file system of what is needed and nothing else (no shell, no
//! package manager), packed as an OCI archive that `ctr images import`, `podman load`, `skopeo copy oci-archive:` and
//! `docker load` take.
//!
//! The agent is linked to glibc, whose allocator gives memory back when it is told to; so the libraries that `ldd` names come along,
//! and `nft` with its own. Same inputs give the same bytes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{build, setup, ui};

/// The largest image that is accepted, compressed, bytes.
const LIMIT: u64 = 25_000_000;
/// What the image needs of this machine: (a file, its Debian package).
const NEEDED: [(&str, &str); 2] = [("/usr/sbin/nft", "nftables"), ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates")];

/// Builds `target/image/stanchion.oci.tar`, starts each program in the image's root, and says the size.
pub(crate) fn build(root: &Path, profile: build::Profile) -> Result<()> {
    let missing: Vec<&str> = NEEDED.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    setup::apt_install("install what the image takes along", &missing)?;
    let work = root.join("target/image");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("clear {}", work.display()))?;
    }
    let rootfs = work.join("rootfs");
    for (program, at) in [("stanchion", "usr/bin"), ("stanchion-cni", "usr/bin")] {
        put(&build::binary(root, profile, program), &rootfs.join(at).join(program))?;
    }
    put(Path::new("/usr/sbin/nft"), &rootfs.join("usr/sbin/nft"))?;
    put(Path::new(NEEDED[1].0), &rootfs.join("etc/ssl/certs/ca-certificates.crt"))?;
    for library in libraries(&["usr/bin/stanchion", "usr/bin/stanchion-cni", "usr/sbin/nft"].map(|path| rootfs.join(path)))? {
        put(&library, &rootfs.join(library.strip_prefix("/").unwrap_or(&library)))?;
    }
    fs::create_dir_all(rootfs.join("tmp"))?;
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/:/usr/bin/stanchion\n")?;
    fs::write(rootfs.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    try_programs(&rootfs)?;
    let archive = pack(&work, &rootfs)?;
    let size = fs::metadata(&archive)?.len();
    println!("{} {} ({:.1} MB compressed)", ui::paint("image", ui::BOLD), archive.display(), size as f64 / 1e6);
    if matches!(profile, build::Profile::Release) {
        ensure!(size < LIMIT, "the image has {size} bytes, more than {LIMIT}");
    }
    Ok(())
}

/// Copies what a path leads to, readable and executable by all.
fn put(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    let mode = if fs::metadata(from)?.permissions().mode() & 0o111 != 0 || from.to_string_lossy().contains(".so") { 0o755 } else { 0o644 };
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// The libraries of these programs, the loader among them.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().context("run ldd")?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            ensure!(!line.contains("not found"), "{}: {line}", program.display());
            let path = line.split_whitespace().find(|word| word.starts_with('/'));
            found.extend(path.map(PathBuf::from));
        }
    }
    Ok(found)
}

/// Each program answers inside the root: nothing is missing there.
fn try_programs(rootfs: &Path) -> Result<()> {
    for command in [["/usr/bin/stanchion", "--version"], ["/usr/sbin/nft", "--version"]] {
        let output = Command::new("chroot").arg(rootfs).args(command).output().context("run chroot")?;
        ensure!(output.status.success(), "{} does not run in the image: {}", command[0], String::from_utf8_lossy(&output.stderr));
    }
    let mut plugin = Command::new("chroot");
    plugin.arg(rootfs).arg("/usr/bin/stanchion-cni").env("CNI_COMMAND", "VERSION").stdin(Stdio::null());
    let output = plugin.output().context("run chroot")?;
    ensure!(output.status.success() && output.stdout.starts_with(b"{"), "stanchion-cni does not run in the image");
    Ok(())
}

/// Layer, configuration, manifest, index: <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>.
fn pack(work: &Path, rootfs: &Path) -> Result<PathBuf> {
    let layout = work.join("oci");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer = work.join("layer.tar");
    tar(rootfs, &layer)?;
    let diff = digest(&layer)?;
    run(Command::new("gzip").args(["-n", "-9", "-k"]).arg(&layer))?;
    let blob = |from: &Path| -> Result<(String, u64)> {
        let (name, size) = (digest(from)?, fs::metadata(from)?.len());
        fs::rename(from, blobs.join(&name))?;
        Ok((name, size))
    };
    let (layer, layer_size) = blob(&work.join("layer.tar.gz"))?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => bail!("no image is made for {other}"),
    };
    let version = env!("CARGO_PKG_VERSION");
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{"Entrypoint":["/usr/bin/stanchion"],"Cmd":["agent"],"Env":["PATH=/usr/bin:/usr/sbin"],"Labels":{{"org.opencontainers.image.title":"stanchion","org.opencontainers.image.version":"{version}","org.opencontainers.image.licenses":"Apache-2.0"}}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{diff}"]}}}}"#
    );
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = work.join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let (config, config_size) = blob(&write("config.json", &config)?)?;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config}","size":{config_size}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:{layer}","size":{layer_size}}}]}}"#
    );
    let (manifest, manifest_size) = blob(&write("manifest.json", &manifest)?)?;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest}","size":{manifest_size},"platform":{{"architecture":"{architecture}","os":"linux"}},"annotations":{{"io.containerd.image.name":"localhost/stanchion:{version}","org.opencontainers.image.ref.name":"localhost/stanchion:{version}"}}}}]}}"#
    );
    fs::write(layout.join("index.json"), index)?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let archive = work.join("stanchion.oci.tar");
    tar(&layout, &archive)?;
    Ok(archive)
}

/// The same bytes for the same files.
fn tar(directory: &Path, archive: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--format=ustar", "-C"]).arg(directory);
    run(tar.arg("-cf").arg(archive).arg("."))
}

fn digest(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("run sha256sum")?;
    let text = String::from_utf8(output.stdout)?;
    text.split_whitespace().next().map(str::to_owned).with_context(|| format!("sha256sum of {}", file.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {}", command.get_program().to_string_lossy()))?;
    ensure!(status.success(), "{} ended with {status}", command.get_program().to_string_lossy());
    Ok(())
}
