//! The `nft` binary: one document in, one transaction; JSON out.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use serde_json::Value;
use stanchion_core::network::nft::{TABLE, parse_listing};
use stanchion_core::network::ops::NftObserved;
use stanchion_core::network::takeover;

/// Applies a document in one transaction, in the calling thread's namespace.
pub(crate) fn apply(document: &str) -> Result<(), String> {
    let mut child = Command::new("nft")
        .args(["-j", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_started)?;
    let mut stdin = child.stdin.take().ok_or("nft: no standard input")?;
    let written = stdin.write_all(document.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| format!("nft: {error}"))?;
    if !output.status.success() {
        return Err(complaint(&output.stderr));
    }
    written.map_err(|error| format!("nft: cannot write the document: {error}"))
}

/// Our table of the family (`ip`, `ip6`) as the kernel has it; `None`: there is none.
pub(crate) fn observe(family: &str) -> Result<Option<NftObserved>, String> {
    let output = Command::new("nft").args(["-j", "list", "table", family, TABLE]).output().map_err(not_started)?;
    if output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        return parse_listing(&text).map(Some).map_err(|error| format!("nft: cannot read its listing: {error}"));
    }
    let complaint = complaint(&output.stderr);
    if complaint.contains("No such file or directory") { Ok(None) } else { Err(complaint) }
}

/// The commands that remove what aws-node left and no pod needs; `None` on a node that has nothing of it (any more), which costs a
/// listing of the chains only.
pub(crate) fn observe_upstream(lives: impl Fn(IpAddr) -> bool) -> Result<Option<Vec<Value>>, String> {
    if !takeover::is_present(&listing("chains")?) {
        return Ok(None);
    }
    Ok(Some(takeover::removal(&listing("ruleset")?, lives)))
}

fn listing(what: &str) -> Result<Value, String> {
    let output = Command::new("nft").args(["-j", "list", what]).output().map_err(not_started)?;
    if !output.status.success() {
        return Err(complaint(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("nft: cannot read its list of {what}: {error}"))
}

fn not_started(error: io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        "nft is not installed: source NAT and node-port marks need it (package nftables)".to_owned()
    } else {
        format!("nft: {error}")
    }
}

fn complaint(stderr: &[u8]) -> String {
    format!("nft: {}", String::from_utf8_lossy(stderr).trim())
}
