//! Parsers of cgroup files of both versions, and what a cgroup's directory name says.
//! Formats: `Documentation/admin-guide/cgroup-v2.rst`, `Documentation/admin-guide/cgroup-v1/{cpuacct,memory}.rst`.

use super::proc::USER_HZ;

/// CPU time that a cgroup and those below it used, in nanoseconds since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuCounters {
    /// All of it.
    pub usage_ns: u64,
    /// User mode.
    pub user_ns: u64,
    /// Kernel mode.
    pub system_ns: u64,
}

/// What memory.stat and its neighbours tell, in bytes; page faults as counts since the cgroup exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounters {
    /// All that is charged.
    pub usage: u64,
    /// The highest it was; 0 where the kernel does not tell (v2 before 5.19).
    pub max_usage: u64,
    /// How often the limit was hit (v1 `failcnt`; v2 has no such count in cAdvisor's terms: 0).
    pub failcnt: u64,
    /// Page cache.
    pub cache: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Swapped out.
    pub swap: u64,
    /// File pages not used lately: usage less these is the working set.
    pub inactive_file: u64,
    /// Page faults of the cgroup itself (v2 does not tell them apart: with descendants).
    pub pgfault: u64,
    /// Of them, those that needed I/O.
    pub pgmajfault: u64,
    /// Page faults with descendants.
    pub hierarchical_pgfault: u64,
    /// Of them, those that needed I/O.
    pub hierarchical_pgmajfault: u64,
}

impl MemoryCounters {
    /// What could not be taken away without hurting: usage less inactive file pages, never below 0.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }
}

impl MemoryCounters {
    /// With `op` on what is summed over a cgroup and those below it; what belongs to the cgroup alone (the highest use, the hits of its
    /// limit, its own faults) stays.
    #[must_use]
    pub fn combined(&self, other: &Self, op: fn(u64, u64) -> u64) -> Self {
        Self {
            usage: op(self.usage, other.usage),
            cache: op(self.cache, other.cache),
            rss: op(self.rss, other.rss),
            mapped_file: op(self.mapped_file, other.mapped_file),
            swap: op(self.swap, other.swap),
            inactive_file: op(self.inactive_file, other.inactive_file),
            hierarchical_pgfault: op(self.hierarchical_pgfault, other.hierarchical_pgfault),
            hierarchical_pgmajfault: op(self.hierarchical_pgmajfault, other.hierarchical_pgmajfault),
            ..*self
        }
    }
}

/// Lines `key value`; a line of any other form is left out.
pub fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// A file of one number; `max` is the largest (no limit).
pub fn single(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// v2 `cpu.stat`.
pub fn cpu_stat_v2(text: &str) -> Option<CpuCounters> {
    let (mut cpu, mut found) = (CpuCounters::default(), false);
    for (key, value) in pairs(text) {
        let ns = value.saturating_mul(1000);
        match key {
            "usage_usec" => (cpu.usage_ns, found) = (ns, true),
            "user_usec" => cpu.user_ns = ns,
            "system_usec" => cpu.system_ns = ns,
            _ => {}
        }
    }
    found.then_some(cpu)
}

/// v1 `cpuacct.stat`: user and system time in nanoseconds, from clock ticks.
pub fn cpuacct_stat(text: &str) -> Option<(u64, u64)> {
    let (mut user, mut system) = (None, None);
    for (key, ticks) in pairs(text) {
        let ns = ticks.saturating_mul(1_000_000_000 / USER_HZ);
        match key {
            "user" => user = Some(ns),
            "system" => system = Some(ns),
            _ => {}
        }
    }
    Some((user?, system?))
}

/// v2 `memory.stat`, all but what its neighbours (`memory.current`, `memory.peak`, `memory.swap.current`) tell.
pub fn memory_stat_v2(text: &str) -> Option<MemoryCounters> {
    let (mut out, mut found) = (MemoryCounters::default(), false);
    for (key, value) in pairs(text) {
        match key {
            "anon" => (out.rss, found) = (value, true),
            "file" => out.cache = value,
            "file_mapped" => out.mapped_file = value,
            "inactive_file" => out.inactive_file = value,
            "pgfault" => (out.pgfault, out.hierarchical_pgfault) = (value, value),
            "pgmajfault" => (out.pgmajfault, out.hierarchical_pgmajfault) = (value, value),
            _ => {}
        }
    }
    found.then_some(out)
}

/// v1 `memory.stat`, all but what its neighbours (`memory.usage_in_bytes` …) tell; sizes with descendants.
pub fn memory_stat_v1(text: &str) -> Option<MemoryCounters> {
    let (mut out, mut found) = (MemoryCounters::default(), false);
    for (key, value) in pairs(text) {
        match key {
            "total_rss" => (out.rss, found) = (value, true),
            "total_cache" => out.cache = value,
            "total_mapped_file" => out.mapped_file = value,
            "total_swap" => out.swap = value,
            "total_inactive_file" => out.inactive_file = value,
            "pgfault" => out.pgfault = value,
            "pgmajfault" => out.pgmajfault = value,
            "total_pgfault" => out.hierarchical_pgfault = value,
            "total_pgmajfault" => out.hierarchical_pgmajfault = value,
            _ => {}
        }
    }
    found.then_some(out)
}

/// What a directory below the Kubernetes root of a cgroup tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A class of service, or a slice around one: pods are inside.
    Group,
    /// A pod.
    Pod {
        /// As written: systemd's driver has `_` for `-` ([`pod_uid`] undoes it).
        uid: &'a str,
    },
    /// A container or sandbox.
    Container {
        /// The runtime's id.
        id: &'a str,
    },
    /// Both at once: runtime set for systemd's driver, kubelet for the other (`…-pod<uid>.slice:cri-containerd:<id>`).
    PodContainer {
        /// As written.
        uid: &'a str,
        /// The runtime's id.
        id: &'a str,
    },
    /// Of no interest: a monitor process, a container's own cgroups.
    Other,
}

/// Whether a directory is the root of the kubelet's pods: `kubepods`, `kubepods.slice`, `kubelet-kubepods.slice`.
pub fn is_kubepods_root(name: &str) -> bool {
    let stem = name.strip_suffix(".slice").unwrap_or(name);
    stem == "kubepods" || (stem.ends_with("-kubepods") && name.ends_with(".slice"))
}

/// What a directory inside the pods' root is, by its name: drivers systemd and cgroupfs, names of containerd, CRI-O and Docker.
pub fn classify(name: &str) -> Kind<'_> {
    if let Some((slice, rest)) = name.rsplit_once(".slice:") {
        let slice = slice.rsplit_once(':').map_or(slice, |(_, last)| last);
        return match (slice.rsplit_once("-pod"), rest.rsplit_once(':')) {
            (Some((_, uid)), Some((_, id))) if is_uid(uid) && is_id(id) => Kind::PodContainer { uid, id },
            _ => Kind::Other,
        };
    }
    if let Some(stem) = name.strip_suffix(".slice") {
        return match stem.rsplit_once("-pod") {
            Some((_, uid)) if is_uid(uid) => Kind::Pod { uid },
            _ => Kind::Group,
        };
    }
    if let Some(stem) = name.strip_suffix(".scope") {
        if stem.starts_with("crio-conmon-") {
            return Kind::Other;
        }
        return match stem.rsplit_once('-') {
            Some((_, id)) if is_id(id) => Kind::Container { id },
            _ => Kind::Other,
        };
    }
    if matches!(name, "burstable" | "besteffort" | "guaranteed") {
        return Kind::Group;
    }
    if let Some(uid) = name.strip_prefix("pod").filter(|uid| is_uid(uid)) {
        return Kind::Pod { uid };
    }
    if name.starts_with("crio-conmon-") {
        return Kind::Other;
    }
    let id = name.strip_prefix("crio-").unwrap_or(name);
    if is_id(id) { Kind::Container { id } } else { Kind::Other }
}

/// A pod's uid in the API's form: 36 characters with `-`; a static pod's is 32 hexadecimal digits, its configuration's hash.
pub fn pod_uid(written: &str) -> String {
    written.replace('_', "-")
}

fn is_uid(text: &str) -> bool {
    (text.len() == 36 || text.len() == 32) && text.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b'-' | b'_'))
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "58a5e7a7dbda17b141a0dc3ad4bd0c516fb8c2b89c50668a75a9812c3cf51fff";
    const UID: &str = "b0839fa0-6ab0-4be2-85bf-944547b6ef59";
    const STATIC_UID: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn names_of_both_drivers_and_three_runtimes() {
        let dashed = UID.replace('-', "_");
        for (name, want) in [
            (format!("pod{UID}"), Kind::Pod { uid: UID }),
            (format!("pod{STATIC_UID}"), Kind::Pod { uid: STATIC_UID }),
            (format!("kubepods-burstable-pod{dashed}.slice"), Kind::Pod { uid: &dashed }),
            (format!("kubepods-pod{dashed}.slice"), Kind::Pod { uid: &dashed }),
            (format!("kubelet-kubepods-besteffort-pod{dashed}.slice"), Kind::Pod { uid: &dashed }),
            (format!("cri-containerd-{ID}.scope"), Kind::Container { id: ID }),
            (format!("crio-{ID}.scope"), Kind::Container { id: ID }),
            (format!("crio-{ID}"), Kind::Container { id: ID }),
            (format!("docker-{ID}.scope"), Kind::Container { id: ID }),
            (ID.to_owned(), Kind::Container { id: ID }),
            (format!("crio-conmon-{ID}.scope"), Kind::Other),
            (format!("crio-conmon-{ID}"), Kind::Other),
            ("burstable".to_owned(), Kind::Group),
            ("kubepods-besteffort.slice".to_owned(), Kind::Group),
            ("init.scope".to_owned(), Kind::Other),
            ("podium".to_owned(), Kind::Other),
            (
                format!("system.slice:containerd.service:kubepods-burstable-pod{dashed}.slice:cri-containerd:{ID}"),
                Kind::PodContainer { uid: &dashed, id: ID },
            ),
            (format!("kubepods-pod{dashed}.slice:cri-containerd:{ID}"), Kind::PodContainer { uid: &dashed, id: ID }),
        ] {
            assert_eq!(classify(&name), want, "{name}");
        }
        assert_eq!(pod_uid(&dashed), UID);
    }

    #[test]
    fn recorded_paths_are_understood() {
        let (mut pods, mut containers, mut groups) = (0, 0, 0);
        for line in include_str!("../../testdata/cgroups-v1.txt").lines() {
            let inside = line.split_once("/kubepods").expect("below the root").1;
            match inside.rsplit('/').next().filter(|name| !name.is_empty()).map(classify) {
                None => {}
                Some(Kind::Pod { uid }) => {
                    assert_eq!(uid.len(), 36);
                    pods += 1;
                }
                Some(Kind::Container { .. }) => containers += 1,
                Some(Kind::Group) => groups += 1,
                Some(other) => panic!("{line}: {other:?}"),
            }
        }
        assert_eq!((pods, containers, groups), (4, 4, 2));
    }

    #[test]
    fn roots() {
        for root in ["kubepods", "kubepods.slice", "kubelet-kubepods.slice"] {
            assert!(is_kubepods_root(root), "{root}");
        }
        for other in ["kubepods-burstable.slice", "system.slice", "mykubepods", "x-kubepods"] {
            assert!(!is_kubepods_root(other), "{other}");
        }
    }

    const V2_CPU: &str =
        "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnice_usec 0\nnr_periods 18\nnr_throttled 1\nthrottled_usec 77\n";
    const V2_MEMORY: &str =
        "anon 4096\nfile 8192\nkernel 100\nfile_mapped 1024\ninactive_anon 0\ninactive_file 2048\npgfault 12\npgmajfault 3\n";
    const V1_MEMORY: &str = "cache 1\nrss 2\npgfault 5\npgmajfault 1\ninactive_file 9\nhierarchical_memory_limit 67108864\ntotal_cache 8192\ntotal_rss 4096\ntotal_mapped_file 1024\ntotal_swap 7\ntotal_pgfault 50\ntotal_pgmajfault 10\ntotal_inactive_file 2048\n";

    #[test]
    fn both_versions_give_one_form() {
        assert_eq!(cpu_stat_v2(V2_CPU), Some(CpuCounters { usage_ns: 1_500_000, user_ns: 1_000_000, system_ns: 500_000 }));
        assert_eq!(cpuacct_stat("user 100\nsystem 50\n"), Some((1_000_000_000, 500_000_000)));
        let v2 = memory_stat_v2(V2_MEMORY).unwrap();
        let v1 = memory_stat_v1(V1_MEMORY).unwrap();
        assert_eq!((v1.rss, v1.cache, v1.mapped_file, v1.inactive_file), (v2.rss, v2.cache, v2.mapped_file, v2.inactive_file));
        assert_eq!((v1.pgfault, v1.hierarchical_pgfault, v1.swap), (5, 50, 7));
        assert_eq!((v2.pgfault, v2.hierarchical_pgfault), (12, 12));
        assert_eq!(MemoryCounters { usage: 5, inactive_file: 7, ..v2 }.working_set(), 0);
        assert_eq!((single("max\n"), single("42\n"), single("-1"), single("")), (Some(u64::MAX), Some(42), None, None));
    }

    fn parse_everything(text: &str) {
        let _ = (cpu_stat_v2(text), cpuacct_stat(text), memory_stat_v1(text), memory_stat_v2(text), single(text));
        let _ = (classify(text), is_kubepods_root(text), pod_uid(text));
    }

    #[test]
    fn truncated_anywhere_nothing_panics() {
        for whole in [V2_CPU, V2_MEMORY, V1_MEMORY] {
            (0..=whole.len()).for_each(|end| parse_everything(&whole[..end]));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in "(?s).{0,200}") {
            parse_everything(&text);
        }

        #[test]
        fn names_of_nearly_the_right_shape_never_panic(name in "(kubepods|pod|crio-|cri-containerd-|[0-9a-f]{32}|[0-9a-f_]{36}|\\.slice|\\.scope|:|-|é){0,8}") {
            parse_everything(&name);
        }
    }
}
