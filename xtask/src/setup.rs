//! What building and testing need, installed when it lacks.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{bpf, ui};

/// (a file that shows it is there, Debian package)
const TOOLS: [(&str, &str); 11] = [
    ("/usr/sbin/ip", "iproute2"),
    ("/usr/sbin/nft", "nftables"),
    ("/usr/sbin/conntrack", "conntrack"),
    ("/usr/bin/tcpdump", "tcpdump"),
    ("/usr/bin/iperf3", "iperf3"),
    ("/usr/bin/ping", "iputils-ping"),
    ("/usr/bin/nc.openbsd", "netcat-openbsd"),
    ("/usr/sbin/bpftool", "bpftool"),
    // What stands beside the agent on a node: kube-proxy's and old aws-node's rules, the chained plugins. strace kills at a system call.
    ("/usr/sbin/iptables-legacy", "iptables"),
    ("/usr/lib/cni/portmap", "containernetworking-plugins"),
    ("/usr/bin/strace", "strace"),
];

/// The lab's tools and the eBPF toolchain.
pub(crate) fn everything(_root: &Path) -> Result<()> {
    if !is_root() {
        bail!("network namespaces and eBPF need root: run this as root (sudo -E cargo xtask ...)");
    }
    apt_install("install the lab's tools", &missing(&TOOLS))?;
    bpf::ensure_toolchain()
}

/// The packages whose file is not there.
pub(crate) fn missing(tools: &[(&str, &'static str)]) -> Vec<&'static str> {
    tools.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect()
}

/// The browser and the test runner, which only tests need. The runner unoptimized, as it builds in a third of the time and only starts
/// processes.
pub(crate) fn test_runner() -> Result<()> {
    if !Path::new("/usr/bin/chromium").exists() {
        apt_install("install the browser that the status page is opened in", &["chromium"])?;
    }
    if has_nextest() {
        return Ok(());
    }
    ui::step("install cargo-nextest (some minutes)", Command::new("cargo").args(["install", "--debug", "--locked", "cargo-nextest"]))
}

/// Installs Debian packages; none is no work.
pub(crate) fn apt_install(what: &str, packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("{what}: this is no Debian machine; install the equivalents of: {}", packages.join(" "));
    }
    ui::step("refresh the package lists", Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
    ui::step(&format!("{what}: {}", packages.join(" ")), &mut install)
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

fn has_nextest() -> bool {
    Command::new("cargo").args(["nextest", "--version"]).output().is_ok_and(|o| o.status.success())
}
