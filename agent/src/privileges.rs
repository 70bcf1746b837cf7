//! What the process keeps of root's capabilities: dropped before the first thread starts, as each thread has its own, and
//! from the bounding set, so that `nft`, which it runs, gets no more either. `deploy/SECURITY.md` names the call that needs
//! each one.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};
use tracing::{info, warn};

use crate::cli::agent::Role;

/// Network role. Interfaces, routes, rules, nft and attached programs (NET_ADMIN); maps and programs (BPF), and reading
/// kernel memory by tracing helpers as the verifier asks for them (PERFMON); the memory limit of maps before Linux 5.11
/// (SYS_RESOURCE).
const NETWORK: [Capability; 4] = [Capability::CAP_NET_ADMIN, Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_SYS_RESOURCE];

/// Drops what the roles do not need. The telemetry role alone needs none: its files belong to root, as it does.
///
/// # Errors
/// The kernel refuses to say or to drop.
pub(crate) fn drop_all_but_needed(roles: &[Role]) -> Result<()> {
    let mut wanted = CapsHashSet::new();
    if roles.contains(&Role::Network) {
        wanted.extend(NETWORK);
        // The tools that take aws-node's rules out of the old tables open a raw socket.
        wanted.extend(stanchion_netlink::has_legacy_tables().then_some(Capability::CAP_NET_RAW));
    }
    let held = caps::read(None, CapSet::Permitted).context("read this process's capabilities")?;
    let kept: CapsHashSet = wanted.intersection(&held).copied().collect();
    for missing in wanted.difference(&held) {
        warn!(capability = %missing, "not held: what needs it will fail (deploy/SECURITY.md)");
    }
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).context("read this process's capabilities")? {
        for capability in caps::read(None, CapSet::Bounding).context("read the bounding set")?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability).with_context(|| format!("drop {capability} from the bounding set"))?;
        }
    }
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        let target = if matches!(set, CapSet::Effective | CapSet::Permitted) { kept.clone() } else { CapsHashSet::new() };
        caps::set(None, set, &target).with_context(|| format!("lower the {set:?} capabilities"))?;
    }
    let mut names: Vec<String> = kept.iter().map(ToString::to_string).collect();
    names.sort();
    info!(kept = names.join(","), "capabilities");
    Ok(())
}
