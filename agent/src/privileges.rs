//! What the process keeps of root's capabilities: dropped before the first thread starts, as each thread has its own, and
//! from the bounding set, so that `nft`, which it runs, gets no more either. `deploy/SECURITY.md` names the call that needs
//! each one.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tracing::{info, warn};

use crate::cli::agent::Role;

/// Network role. Interfaces, routes, rules, nft and attached programs (NET_ADMIN); maps and programs (BPF), and reading
/// kernel memory by tracing helpers as the verifier asks for them (PERFMON).
const NETWORK: [Capability; 3] = [Capability::CAP_NET_ADMIN, Capability::CAP_BPF, Capability::CAP_PERFMON];
/// Before this kernel the memory of maps counts as locked memory, whose limit only SYS_RESOURCE raises: done once, at start.
const MAPS_ARE_ACCOUNTED: (u32, u32) = (5, 11);

/// Drops what the roles do not need. The telemetry role alone needs none: its files belong to root, as it does.
///
/// # Errors
/// The kernel refuses to say or to drop.
pub(crate) fn drop_all_but_needed(roles: &[Role]) -> Result<()> {
    let mut wanted = CapsHashSet::new();
    if roles.contains(&Role::Network) {
        lift_locked_memory();
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

/// Lets maps be as large as they are on kernels that count them as locked memory.
fn lift_locked_memory() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if locks_maps(&release)
        && let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
    {
        let remedy = "give the network container CAP_SYS_RESOURCE, or the runtime LimitMEMLOCK=infinity";
        warn!(%error, kernel = release.trim(), remedy, "the limit of locked memory stays: policy's maps may not fit");
    }
}

/// Whether a kernel of this release counts maps as locked memory; one that cannot be read does not.
fn locks_maps(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version < MAPS_ARE_ACCOUNTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_kernels_count_maps_as_locked_memory() {
        for (release, locks) in [
            ("5.10.236-228.935.amzn2.x86_64\n", true),
            ("4.14.1", true),
            ("5.11.0", false),
            ("6.12.40-63.amzn2023.x86_64\n", false),
            ("6.1.141\n", false),
            ("", false),
        ] {
            assert_eq!(locks_maps(release), locks, "{release}");
        }
    }
}
