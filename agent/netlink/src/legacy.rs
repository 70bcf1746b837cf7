//! iptables-legacy: rules in the kernel's old tables, which nft does not show. Read by the kernel's own call, so that a node without
//! the old tools is told the truth; changed by those tools, which know the format.

use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use stanchion_core::network::takeover;

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES` of `linux/netfilter_ipv4/ip_tables.h`.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Bytes of a table's name (`XT_TABLE_MAXNAMELEN`).
const NAME: usize = 32;
/// `struct ipt_getinfo`: the name, five words and twice five hooks less one; its last word is the size of the entries.
const INFO: usize = NAME + 13 * 4;
/// A table larger than this (some 500,000 rules) is not looked into.
const MOST: usize = 128 << 20;

/// The documents for `iptables-legacy-restore --noflush` that remove what aws-node left in the old tables; empty on a node without.
pub(crate) fn observe_upstream() -> Result<Vec<String>, String> {
    let mut documents = Vec::new();
    for table in takeover::LEGACY_TABLES {
        // Asking for a table makes the kernel load it: only those that are there.
        if !is_loaded(table)
            || !takeover::is_in_legacy_table(&entries(table).map_err(|error| format!("iptables-legacy table {table}: {error}"))?)
        {
            continue;
        }
        let output = Command::new("iptables-legacy-save").args(["-t", table]).output().map_err(not_started)?;
        if !output.status.success() {
            return Err(format!("iptables-legacy-save: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        documents.extend(takeover::legacy_removal(&String::from_utf8_lossy(&output.stdout)));
    }
    Ok(documents)
}

/// Whether iptables-legacy has made one of the tables that aws-node writes, in the calling thread's namespace.
pub fn has_legacy_tables() -> bool {
    takeover::LEGACY_TABLES.iter().any(|table| is_loaded(table))
}

/// Applies a document; each table in one step.
pub(crate) fn apply(document: &str) -> Result<(), String> {
    let mut child = Command::new("iptables-legacy-restore")
        .args(["--noflush", "--wait", "5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_started)?;
    let mut stdin = child.stdin.take().ok_or("iptables-legacy-restore: no standard input")?;
    let written = stdin.write_all(document.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| format!("iptables-legacy-restore: {error}"))?;
    if !output.status.success() {
        return Err(format!("iptables-legacy-restore: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    written.map_err(|error| format!("iptables-legacy-restore: cannot write the document: {error}"))
}

fn not_started(error: io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        "aws-node's rules are in iptables-legacy, and its tools are not here to remove them (package iptables)".to_owned()
    } else {
        format!("iptables-legacy: {error}")
    }
}

fn is_loaded(table: &str) -> bool {
    std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").is_ok_and(|names| names.lines().any(|name| name == table))
}

/// The table as the kernel holds it.
fn entries(table: &str) -> io::Result<Vec<u8>> {
    // Any socket of the family will do; a raw one would need CAP_NET_RAW.
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut info = vec![0; INFO];
    info[..table.len()].copy_from_slice(table.as_bytes());
    get(&socket, GET_INFO, &mut info)?;
    let size = info.last_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if length > MOST {
        return Err(io::Error::other(format!("{length} bytes of rules")));
    }
    // struct ipt_get_entries: the name, the size, the entries at the next multiple of eight.
    let head = (NAME + 4).next_multiple_of(8);
    let mut all = vec![0; head + length];
    all[..table.len()].copy_from_slice(table.as_bytes());
    all[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    get(&socket, GET_ENTRIES, &mut all)?;
    Ok(all.split_off(head))
}

fn get(socket: &impl std::os::fd::AsFd, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: `buffer` is writable for `length` bytes and outlives the call; the kernel checks the length against what it writes
    // and needs no alignment.
    let outcome =
        unsafe { libc::getsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_IP, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
