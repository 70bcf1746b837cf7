//! `stanchion install`: what must be on the host before the first pod, each step said, the configuration last; and the way
//! back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stanchion_core::conflist::{Chained, Conflist, FILE_NAME, Owner, PLUGIN, ready_mark};
use stanchion_core::network::host_sysctls;

use super::chained::{Spoken, version};
use super::conflist::{earlier, present};
use super::files::{self, Outcome};
use super::loopback;

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// It was so already.
    Present,
    /// It was made so.
    Done,
    /// Something works less well; the text says what and why.
    Warning,
    /// The installation does not hold.
    Failed,
}

/// A step with what to know of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was looked at or done.
    pub what: String,
    /// How it went.
    pub mark: Mark,
    /// Detail, and the remedy where one is needed.
    pub text: String,
}

/// Where things are and go.
#[derive(Clone, Debug)]
pub struct Places {
    /// Our plugin.
    pub plugin: PathBuf,
    /// The runtime's plugins on the host.
    pub bin_dir: PathBuf,
    /// The runtime's configurations on the host; `None`: the agent writes it when it is ready.
    pub conf_dir: Option<PathBuf>,
    /// The agent's socket on the host.
    pub socket: PathBuf,
    /// `/proc`, `/sys`, `/lib/modules`.
    pub proc_root: PathBuf,
    /// See above.
    pub sys_root: PathBuf,
    /// See above.
    pub modules: PathBuf,
    /// `net.ipv4.tcp_early_demux` is to be 0 (DISABLE_TCP_EARLY_DEMUX).
    pub disable_early_demux: bool,
    /// IPv6 pods.
    pub ipv6: bool,
    /// Pods reach the other address family (ENABLE_V4_EGRESS, ENABLE_V6_EGRESS).
    pub egress: bool,
}

fn step(what: impl Into<String>, mark: Mark, text: impl Into<String>) -> Step {
    Step { what: what.into(), mark, text: text.into() }
}

/// What helps against a failure to write to the host.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            ". Mount the host's directory writable, or name one that is (HOST_CNI_BIN_PATH, HOST_CNI_CONFDIR_PATH)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ". What was there stays: free space on the host's disk and try again",
        io::ErrorKind::PermissionDenied => ". Run it as the host's root",
        _ => "",
    }
}

/// The lowest kernel whose verifier and helpers the programs need.
const KERNEL_FLOOR: (u32, u32) = (5, 10);

/// Makes the host ready; the configuration is written last, and only when no step failed.
pub fn install(places: &Places) -> Vec<Step> {
    let mut steps = vec![kernel(places), bpf(places)];
    steps.extend(["nf_tables", "nf_conntrack", "veth", "sch_ingress", "cls_bpf"].map(|name| module(places, name)));
    steps.extend(sysctls(places));
    steps.push(binary(places));
    steps.push(match loopback::ensure(&places.bin_dir) {
        Ok(false) => step(loopback::NAME, Mark::Present, "there"),
        Ok(true) => step(loopback::NAME, Mark::Done, "was missing: our plugin stands in"),
        Err(error) => {
            let text = format!("the runtime needs it for every pod, and it cannot be put into {}: {error}", places.bin_dir.display());
            step(loopback::NAME, Mark::Failed, text + remedy(&error))
        }
    });
    if !places.bin_dir.join(Chained::Portmap.binary()).is_file() {
        let remedy = format!("pods' hostPorts need it: install the CNI plugins of the distribution into {}", places.bin_dir.display());
        steps.push(step(Chained::Portmap.binary(), Mark::Warning, remedy));
    }
    if let Some(directory) = &places.conf_dir {
        let failed: Vec<&str> = steps.iter().filter(|s| s.mark == Mark::Failed).map(|s| s.what.as_str()).collect();
        steps.push(match failed.as_slice() {
            [] => configuration(places, directory),
            failed => step(FILE_NAME, Mark::Failed, format!("not written because of: {}", failed.join(", "))),
        });
    }
    steps
}

/// Hands the host back: first the configuration, so that no new pod comes, then the binary. What pods use stays.
pub fn remove(places: &Places) -> Vec<Step> {
    let mut steps = Vec::new();
    if let Some(directory) = &places.conf_dir {
        let path = directory.join(FILE_NAME);
        steps.push(match present(&path) {
            None => step(FILE_NAME, Mark::Present, "was not there"),
            Some(Owner::Stanchion) => removed(&path),
            Some(_) => step(FILE_NAME, Mark::Present, "is not ours and stays"),
        });
    }
    if steps.iter().all(|s| s.mark != Mark::Failed) {
        // A loopback that is ours would point to nothing.
        match loopback::remove(&places.bin_dir) {
            Ok(false) => {}
            Ok(true) => steps.push(step(loopback::NAME, Mark::Done, "removed")),
            Err(error) => steps.push(step(loopback::NAME, Mark::Failed, error.to_string())),
        }
        steps.push(removed(&places.bin_dir.join(PLUGIN)));
        // Nobody asks our plugin any more; if it comes back in this boot, it is asked anew.
        let mark = ready_mark(&places.socket);
        if mark.exists() {
            steps.push(removed(&mark));
        }
    }
    steps
}

fn removed(path: &Path) -> Step {
    let what = path.display().to_string();
    match files::remove(path) {
        Ok(true) => step(what, Mark::Done, "removed"),
        Ok(false) => step(what, Mark::Present, "was not there"),
        Err(error) => step(what, Mark::Failed, error.source.to_string() + remedy(&error.source)),
    }
}

fn kernel(places: &Places) -> Step {
    let text = fs::read_to_string(places.proc_root.join("sys/kernel/osrelease")).unwrap_or_default();
    let release = text.trim();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if version >= KERNEL_FLOOR {
        step("kernel", Mark::Present, release)
    } else {
        let (major, minor) = KERNEL_FLOOR;
        step("kernel", Mark::Failed, format!("{release:?} is older than {major}.{minor}, which the eBPF programs need"))
    }
}

fn bpf(places: &Places) -> Step {
    let mounts = fs::read_to_string(places.proc_root.join("mounts")).unwrap_or_default();
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next().is_some_and(|at| at.ends_with("sys/fs/bpf")) && fields.next() == Some("bpf")
    });
    if !mounted {
        return step("bpf file system", Mark::Failed, "not mounted: mount -t bpf bpf /sys/fs/bpf (systemd does so by itself)");
    }
    if !places.sys_root.join("kernel/btf/vmlinux").exists() {
        return step("bpf file system", Mark::Warning, "mounted; the kernel has no BTF, so links are attached the older way");
    }
    step("bpf file system", Mark::Present, "mounted, and the kernel has BTF")
}

/// A module that is loaded or built in, or can be loaded when it is first used.
fn module(places: &Places, name: &str) -> Step {
    let what = format!("module {name}");
    if places.sys_root.join("module").join(name).is_dir() {
        return step(what, Mark::Present, "loaded");
    }
    let release = fs::read_to_string(places.proc_root.join("sys/kernel/osrelease")).unwrap_or_default();
    let directory = places.modules.join(release.trim());
    let listed = |file: &str| {
        let list = fs::read_to_string(directory.join(file)).unwrap_or_default();
        let in_path = format!("/{name}.ko");
        list.lines().any(|line| line.split(':').next().is_some_and(|path| path.contains(&in_path)))
    };
    if listed("modules.builtin") {
        step(what, Mark::Present, "built in")
    } else if listed("modules.dep") {
        step(what, Mark::Present, "loaded on first use")
    } else {
        // A kernel without module lists (a container without /lib/modules) may have it all the same.
        step(what, Mark::Warning, format!("not found in {}: if pods do not start, load it (modprobe {name})", directory.display()))
    }
}

/// Those that the agent would set itself where it may; read before they are written.
fn sysctls(places: &Places) -> Vec<Step> {
    let primary = primary_interface(&places.proc_root);
    let wanted = host_sysctls(places.ipv6, places.egress, !places.disable_early_demux, primary.as_deref());
    let set = |(name, value): (String, String)| {
        let what = format!("sysctl {}", name.replace('/', "."));
        let path = places.proc_root.join("sys").join(&name);
        match fs::read_to_string(&path) {
            Ok(old) if old.trim() == value => step(what, Mark::Present, value),
            Ok(old) => match fs::write(&path, &value) {
                Ok(()) => step(what, Mark::Done, format!("{value} (was {})", old.trim())),
                Err(error) => step(what, Mark::Failed, format!("is {}, must be {value}, and cannot be written: {error}", old.trim())),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => step(what, Mark::Warning, "this kernel does not have it"),
            Err(error) => step(what, Mark::Failed, format!("cannot be read: {error}")),
        }
    };
    wanted.into_iter().map(set).collect()
}

/// The interface of the default route, by `/proc/net/route`.
fn primary_interface(proc_root: &Path) -> Option<String> {
    let table = fs::read_to_string(proc_root.join("net/route")).ok()?;
    let default = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000"))?;
    default.first().map(|name| (*name).to_owned())
}

fn binary(places: &Places) -> Step {
    let path = places.bin_dir.join(PLUGIN);
    let what = path.display().to_string();
    let content = match fs::read(&places.plugin) {
        Ok(content) => content,
        Err(error) => return step(what, Mark::Failed, format!("read {}: {error}", places.plugin.display())),
    };
    if let Err(error) = fs::create_dir_all(&places.bin_dir) {
        return step(what, Mark::Failed, format!("make {}: {error}", places.bin_dir.display()) + remedy(&error));
    }
    match files::put(&path, &content, 0o755) {
        Ok(Outcome::Unchanged) => step(what, Mark::Present, "this version"),
        Ok(Outcome::Written) => step(what, Mark::Done, format!("{} bytes", content.len())),
        Err(error) => step(what, Mark::Failed, format!("{error}: {}", error.source) + remedy(&error.source)),
    }
}

fn configuration(places: &Places, directory: &Path) -> Step {
    if let Err(error) = fs::create_dir_all(directory) {
        return step(FILE_NAME, Mark::Failed, format!("make {}: {error}", directory.display()) + remedy(&error));
    }
    let path = directory.join(FILE_NAME);
    let chained = if places.bin_dir.join(Chained::Portmap.binary()).is_file() { &[Chained::Portmap][..] } else { &[] };
    // The runtime is not known here; the agent writes its version when it has read the Node.
    let present = fs::read_to_string(&path).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let version = match version(&places.bin_dir, chained, &present, "", &mut Spoken::default()) {
        Ok(version) => version,
        Err(problem) => return step(FILE_NAME, Mark::Failed, problem),
    };
    let conflist = Conflist { version, socket: &places.socket, log_file: "", log_level: "", chained };
    match files::put(&path, conflist.render(&present).as_bytes(), 0o644) {
        Err(error) => step(path.display().to_string(), Mark::Failed, format!("{error}: {}", error.source) + remedy(&error.source)),
        Ok(outcome) => {
            let what = path.display().to_string();
            match earlier(&path) {
                Some(other) => step(what, Mark::Warning, format!("the runtime takes {other} before it: remove that one")),
                None if outcome == Outcome::Written => step(what, Mark::Done, "written"),
                None => step(what, Mark::Present, "this version"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        root: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let host = Self { root };
            for (path, content) in [
                ("image/stanchion-cni", "binary"),
                ("bin/loopback", ""),
                ("bin/portmap", ""),
                ("proc/sys/kernel/osrelease", "6.12.40-63.amzn2023.x86_64\n"),
                ("proc/mounts", "sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n"),
                (
                    "proc/net/route",
                    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\nens5\t00000000\t0101000A\t0003\t0\t0\t512\t00000000\n",
                ),
                ("proc/sys/net/ipv4/ip_forward", "0\n"),
                ("proc/sys/net/ipv4/tcp_early_demux", "1\n"),
                ("proc/sys/net/ipv4/conf/ens5/rp_filter", "1\n"),
                ("sys/kernel/btf/vmlinux", ""),
                ("modules/6.12.40-63.amzn2023.x86_64/modules.builtin", "kernel/net/sched/sch_ingress.ko\nkernel/net/sched/cls_bpf.ko\n"),
                (
                    "modules/6.12.40-63.amzn2023.x86_64/modules.dep",
                    "kernel/net/netfilter/nf_tables.ko.xz: kernel/lib/libcrc32c.ko\nkernel/drivers/net/veth.ko.xz:\n",
                ),
            ] {
                host.write(path, content);
            }
            fs::create_dir_all(host.path("sys/module/nf_conntrack")).unwrap();
            host
        }

        fn path(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn write(&self, path: &str, content: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.path(path)).unwrap_or_default().trim().to_owned()
        }

        fn places(&self) -> Places {
            Places {
                plugin: self.path("image/stanchion-cni"),
                bin_dir: self.path("bin"),
                conf_dir: Some(self.path("net.d")),
                socket: self.path("run/agent.sock"),
                proc_root: self.path("proc"),
                sys_root: self.path("sys"),
                modules: self.path("modules"),
                disable_early_demux: false,
                ipv6: false,
                egress: false,
            }
        }
    }

    fn of(steps: &[Step], mark: Mark) -> Vec<&str> {
        steps.iter().filter(|s| s.mark == mark).map(|s| s.what.rsplit('/').next().unwrap_or_default()).collect()
    }

    #[test]
    fn a_second_run_changes_nothing_and_the_way_back_leaves_what_others_use() {
        let host = Host::new();
        let first = install(&host.places());
        assert_eq!(of(&first, Mark::Failed), Vec::<&str>::new(), "{first:#?}");
        assert_eq!(
            of(&first, Mark::Done),
            ["sysctl net.ipv4.ip_forward", "sysctl net.ipv4.conf.ens5.rp_filter", "stanchion-cni", "10-aws.conflist"]
        );
        assert_eq!(first.last().unwrap().what, host.path("net.d/10-aws.conflist").display().to_string(), "the configuration is last");
        assert_eq!(
            (host.read("proc/sys/net/ipv4/ip_forward"), host.read("proc/sys/net/ipv4/conf/ens5/rp_filter")),
            ("1".into(), "2".into())
        );
        let second = install(&host.places());
        assert!(second.iter().all(|s| s.mark == Mark::Present), "{second:#?}");
        host.write("run/ready", "of this boot");
        let back = remove(&host.places());
        assert_eq!(of(&back, Mark::Done), ["10-aws.conflist", "stanchion-cni", "ready"]);
        assert!(host.path("bin/portmap").is_file());
        assert!(remove(&host.places()).iter().all(|s| s.mark == Mark::Present));
    }

    #[test]
    fn with_egress_to_ipv6_the_host_forwards_it_and_still_hears_its_router() {
        let host = Host::new();
        host.write("proc/sys/net/ipv6/conf/all/forwarding", "0\n");
        host.write("proc/sys/net/ipv6/conf/ens5/accept_ra", "1\n");
        let steps = install(&Places { egress: true, ..host.places() });
        let done = of(&steps, Mark::Done);
        assert_eq!(done[2..4], ["sysctl net.ipv6.conf.ens5.accept_ra", "sysctl net.ipv6.conf.all.forwarding"], "{steps:#?}");
        assert_eq!(
            (host.read("proc/sys/net/ipv6/conf/all/forwarding"), host.read("proc/sys/net/ipv6/conf/ens5/accept_ra")),
            ("1".into(), "2".into())
        );
    }

    #[test]
    fn a_failed_step_keeps_the_configuration_away() {
        let host = Host::new();
        host.write("proc/sys/kernel/osrelease", "4.14.1\n");
        let steps = install(&host.places());
        assert_eq!(of(&steps, Mark::Failed), ["kernel", "10-aws.conflist"]);
        assert!(!host.path("net.d/10-aws.conflist").exists());
    }

    #[test]
    fn what_works_less_well_is_said_with_its_remedy() {
        let host = Host::new();
        fs::remove_file(host.path("bin/portmap")).unwrap();
        host.write("net.d/05-other.conf", "{}");
        let steps = install(&host.places());
        let warnings: Vec<&Step> = steps.iter().filter(|s| s.mark == Mark::Warning).collect();
        assert_eq!(warnings.iter().map(|s| s.what.rsplit('/').next().unwrap()).collect::<Vec<_>>(), ["portmap", "10-aws.conflist"]);
        assert!(warnings[1].text.contains("05-other.conf"));
    }

    #[test]
    fn a_node_without_loopback_gets_ours_and_loses_it_on_the_way_back() {
        let host = Host::new();
        fs::remove_file(host.path("bin/loopback")).unwrap();
        assert!(of(&install(&host.places()), Mark::Done).contains(&"loopback"));
        assert_eq!(host.read("bin/loopback"), "binary", "our plugin answers to the name");
        assert!(of(&install(&host.places()), Mark::Present).contains(&"loopback"));
        assert!(of(&remove(&host.places()), Mark::Done).contains(&"loopback"));
        assert!(!host.path("bin/loopback").exists());
    }

    /// Another file system over a directory of the host; gone with this.
    struct Mounted(PathBuf);

    impl Mounted {
        fn over(path: PathBuf, size: &str) -> Self {
            use nix::mount::{MsFlags, mount};
            mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), Some(size)).unwrap();
            Self(path)
        }

        fn make_read_only(&self) {
            use nix::mount::{MsFlags, mount};
            mount(None::<&str>, &self.0, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>).unwrap();
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named_with_the_remedy_and_keeps_what_it_has() {
        for read_only in [false, true] {
            let host = Host::new();
            let mounted = Mounted::over(host.path("bin"), "size=4k");
            // All that there is room for.
            host.write("bin/stanchion-cni", "an older one");
            if read_only {
                mounted.make_read_only();
            }
            let steps = install(&host.places());
            let failed = of(&steps, Mark::Failed);
            assert_eq!(failed.first(), Some(&"stanchion-cni"), "{steps:#?}");
            assert_eq!(failed.last(), Some(&"10-aws.conflist"), "no pod comes to it: {steps:#?}");
            let said = &steps.iter().find(|step| step.what.ends_with("stanchion-cni")).unwrap().text;
            let remedy = if read_only { "Mount the host's directory writable" } else { "free space" };
            assert!(said.contains(&host.path("bin").display().to_string()) && said.contains(remedy), "{said}");
            assert_eq!(host.read("bin/stanchion-cni"), "an older one");
            let names = fs::read_dir(host.path("bin")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            assert_eq!(names.filter(|name| name != "loopback").collect::<Vec<_>>(), ["stanchion-cni"], "nothing half-written is left");
        }
    }

    #[test]
    fn a_configuration_of_aws_node_survives_the_way_back() {
        let host = Host::new();
        host.write("net.d/10-aws.conflist", r#"{"plugins":[{"type":"aws-cni"}]}"#);
        assert_eq!(of(&remove(&host.places()), Mark::Done), Vec::<&str>::new());
        assert!(host.read("net.d/10-aws.conflist").contains("aws-cni"));
    }
}
