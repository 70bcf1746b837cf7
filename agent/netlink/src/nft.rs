//! Our nft table: looked at by netlink, changed by the `nft` binary (one document in, one transaction). Looks are frequent and
//! changes rare, so that a node at rest starts no process.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use serde_json::Value;
use stanchion_core::network::nft::{TABLE, document, removal};
use stanchion_core::network::ops::NftObserved;
use stanchion_core::network::takeover;

use crate::netfilter;

/// A table that somebody keeps changing is given up after this many dumps.
const DUMP_TRIES: u32 = 16;

/// The family of a table, as nfnetlink numbers it (`NFPROTO_IPV4`, `NFPROTO_IPV6` of `linux/netfilter.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Ip = 2,
    Ip6 = 10,
}

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

/// Our table of the family as the kernel has it; `None`: there is none. A chain without rules is not told of: none of ours is.
pub(crate) fn observe(family: Family) -> Result<Option<NftObserved>, String> {
    const TABLE_OF_TABLE: u16 = 1;
    const TABLE_OF_RULE: u16 = 1;
    let failed = |error| format!("nf_tables: {error}");
    if !netfilter::exists(netfilter::GET_TABLE, family as u8, &netfilter::string(TABLE_OF_TABLE, TABLE)).map_err(failed)? {
        return Ok(None);
    }
    for _ in 0..DUMP_TRIES {
        let mut observed = NftObserved::default();
        let each = |rule: &[u8]| {
            if let Some((chain, comment)) = rule_comment(rule) {
                observed.chains.entry(chain).or_default().push(comment);
            }
        };
        if netfilter::dump(netfilter::GET_RULE, family as u8, &netfilter::string(TABLE_OF_RULE, TABLE), each).map_err(failed)? {
            return Ok(Some(observed));
        }
    }
    Err(format!("nf_tables: the rules changed during each of {DUMP_TRIES} dumps"))
}

/// The way back: takes source NAT and marks of this network namespace away. What stays, if the table was there: the rules of the pods'
/// second address family.
///
/// # Errors
/// The kernel or `nft` refuses.
pub fn remove_from_host() -> Result<Option<bool>, String> {
    let Some(observed) = observe(Family::Ip)? else { return Ok(None) };
    let (commands, stays) = removal(&observed);
    if !commands.is_empty() {
        apply(&document(&commands))?;
    }
    Ok(Some(stays))
}

/// A rule's chain and its comment, which is empty for a rule without.
fn rule_comment(rule: &[u8]) -> Option<(String, String)> {
    const CHAIN: u16 = 2;
    const USER_DATA: u16 = 7;
    /// What nft keeps with a rule: type and length in a byte each, then the value (`NFTNL_UDATA_RULE_COMMENT` of libnftnl).
    const COMMENT: u8 = 0;
    let mut rest = netfilter::find(rule, USER_DATA).unwrap_or_default();
    let mut comment: &[u8] = &[];
    while let [kind, length, tail @ ..] = rest {
        let Some((value, after)) = tail.split_at_checked(usize::from(*length)) else { break };
        if *kind == COMMENT {
            comment = netfilter::text(value);
        }
        rest = after;
    }
    let chain = netfilter::text(netfilter::find(rule, CHAIN)?);
    Some((String::from_utf8_lossy(chain).into_owned(), String::from_utf8_lossy(comment).into_owned()))
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
