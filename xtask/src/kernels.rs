//! Tests under kernels other than this machine's: Debian's builds of the series that EKS nodes run, each booted in an emulated machine
//! that sees this machine's files read-only, with whatever it writes kept in its memory.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::{build, setup, ui};

/// A kernel that can be booted.
struct Series {
    /// As `uname -r` begins.
    name: &'static str,
    /// Which nodes run it.
    nodes: &'static str,
    /// Debian's archive and suite whose `linux-image-cloud-amd64` it is.
    source: &'static str,
    /// Tests that ask the kernel for what it has not, as nextest's expression.
    except: &'static str,
}

const SERIES: [Series; 4] = [
    Series {
        name: "5.10",
        nodes: "Amazon Linux 2; the oldest that is supported",
        source: "http://deb.debian.org/debian-security bullseye-security",
        // BPF_PROG_TEST_RUN takes the interface a frame came in by from Linux 5.16.
        except: "test(a_pod_reaches_itself_through_a_service_unless_a_rule_denies_it)",
    },
    Series {
        name: "6.1",
        nodes: "Amazon Linux 2023, Bottlerocket",
        source: "http://deb.debian.org/debian-security bookworm-security",
        except: "none()",
    },
    Series { name: "6.12", nodes: "Amazon Linux 2023, Bottlerocket", source: "http://deb.debian.org/debian trixie", except: "none()" },
    Series { name: "7", nodes: "the newest that Debian has", source: "http://deb.debian.org/debian trixie-backports", except: "none()" },
];

/// What asks something of the kernel. One test kills a plugin at each of its system calls, which an emulated machine takes minutes for.
pub(crate) const EVERYTHING: &str =
    "binary(/^(datapath|cni|scenario)_/) + binary(metrics_cgroups) + package(stanchion-netlink) - binary(cni_killed)";

/// What the kernel of a usual node has and this machine's may lack (802.1Q, clsact alone, cgroup v2), and the verifier's word.
pub(crate) const IN_SHORT: &str = "binary(/^(datapath_(packets|truth|sockets)|cni_branch|scenario_branch|metrics_cgroups)$/)";

/// All that the emulator has but cmpxchg16b: around it qemu 7.2 loses flags now and then, and allocators of kernels from 6.12 on, which
/// would use it, fall over that within minutes.
const CPU: &str = "max,-cx16";

/// Whether this machine is of the kernels' kind.
pub(crate) const HERE: bool = cfg!(target_arch = "x86_64");

/// The series that every run of CI boots.
pub(crate) const USUAL: &str = "6.1";

/// Runs the tests that `filter` (an expression of nextest's) picks under each series named; all series when none is. They have to be
/// built.
///
/// # Errors
/// A series nobody knows, a kernel that could not be had or booted, a test that failed: with the remedy or the names.
pub(crate) fn run(root: &Path, names: &[String], filter: &str) -> Result<()> {
    let known = || SERIES.map(|series| series.name).join(", ");
    if let Some(unknown) = names.iter().find(|name| !SERIES.iter().any(|series| series.name == name.as_str())) {
        bail!("no kernel {unknown} here; there are {}", known());
    }
    if !HERE {
        bail!("the kernels are x86_64's; this machine is {}", std::env::consts::ARCH);
    }
    setup::apt_install("install what boots a kernel", &setup::missing(&TOOLS))?;
    let described = describe_tests(root)?;
    let mut failed = Vec::new();
    for series in SERIES.iter().filter(|series| names.is_empty() || names.iter().any(|name| name == series.name)) {
        println!("{} the tests under Linux {} ({})", ui::paint("run", ui::BOLD), series.name, series.nodes);
        let start = Instant::now();
        let kernel = fetch(root, series)?;
        let passed = boot(&kernel, &script(root, &described, &format!("({filter}) - {}", series.except)))?;
        println!("    Linux {}: {} after {:.0} s", series.name, if passed { "passed" } else { "failed" }, start.elapsed().as_secs_f64());
        if !passed {
            failed.push(series.name);
        }
    }
    if !failed.is_empty() {
        bail!("tests failed under Linux {}", failed.join(", "));
    }
    Ok(())
}

const TOOLS: [(&str, &str); 7] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/lib/qemu/virtiofsd", "qemu-system-common"),
    ("/usr/bin/busybox", "busybox-static"),
    ("/usr/sbin/modprobe", "kmod"),
    ("/usr/bin/cpio", "cpio"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
];

/// The files by which nextest knows tests that it did not build.
struct Described {
    binaries: PathBuf,
    workspace: PathBuf,
}

fn describe_tests(root: &Path) -> Result<Described> {
    let directory = root.join("target/kernels");
    fs::create_dir_all(&directory)?;
    let described = Described { binaries: directory.join("binaries.json"), workspace: directory.join("workspace.json") };
    let mut list = build::cargo(root);
    list.args(["nextest", "list", "--workspace", "--list-type=binaries-only", "--message-format=json"]);
    list.stdout(fs::File::create(&described.binaries)?);
    ui::step("build the tests", &mut list)?;
    let mut metadata = build::cargo(root);
    metadata.args(["metadata", "--format-version=1", "--all-features"]);
    let metadata = metadata.output().context("start cargo metadata")?;
    fs::write(&described.workspace, metadata.stdout)?;
    Ok(described)
}

/// A kernel as it lies unpacked.
struct Kernel {
    image: PathBuf,
    /// `.../lib/modules/<release>`.
    modules: PathBuf,
}

/// Brings the series' newest kernel, by apt, which checks its signature; once fetched it is taken as it is.
fn fetch(root: &Path, series: &Series) -> Result<Kernel> {
    let directory = root.join("target/kernels").join(series.name);
    if let Ok(kernel) = unpacked(&directory) {
        return Ok(kernel);
    }
    let (lists, packages) = (directory.join("lists/partial"), directory.join("packages"));
    for made in [&lists, &packages] {
        fs::create_dir_all(made).with_context(|| format!("make {}", made.display()))?;
    }
    let sources = directory.join("sources.list");
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    // An archive that is no longer updated still has its signature: how old its list is does not matter here.
    fs::write(&sources, format!("deb [signed-by={keyring} check-valid-until=no] {} main\n", series.source))?;
    let apt = |program: &str| {
        let mut apt = Command::new(program);
        apt.arg("-qq").arg("-o").arg(format!("Dir::Etc::SourceList={}", sources.display()));
        apt.args(["-o", "Dir::Etc::SourceParts=/dev/null", "-o", "Dir::State::Status=/dev/null", "-o", "APT::Sandbox::User=root"]);
        apt.arg("-o").arg(format!("Dir::State::Lists={}", directory.join("lists").display()));
        apt.arg("-o").arg("Dir::Cache::pkgcache=").arg("-o").arg("Dir::Cache::srcpkgcache=").current_dir(&packages);
        apt
    };
    ui::step(&format!("ask Debian for Linux {}", series.name), apt("apt-get").arg("update"))?;
    let mut depends = apt("apt-cache");
    depends.args(["depends", "--recurse", "--important", "linux-image-cloud-amd64"]);
    let depends = depends.output().context("start apt-cache")?;
    let listed = String::from_utf8_lossy(&depends.stdout);
    let parts = ["linux-image-", "linux-binary-", "linux-modules-"];
    let names: Vec<&str> = listed
        .lines()
        .filter(|line| parts.iter().any(|part| line.strip_prefix(part).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))))
        .collect();
    if names.is_empty() {
        bail!(
            "{} has no linux-image-cloud-amd64: look in https://packages.debian.org which suite has Linux {}",
            series.source,
            series.name
        );
    }
    ui::step(&format!("fetch {}", names.join(" ")), apt("apt-get").arg("download").args(&names))?;
    for package in fs::read_dir(&packages)? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(package?.path()).arg(&directory);
        if !unpack.status().context("start dpkg-deb")?.success() {
            bail!("a package of Linux {} could not be unpacked: remove {} and try again", series.name, directory.display());
        }
    }
    let kernel = unpacked(&directory)?;
    let (base, release) = (base(&kernel.modules)?, release(&kernel.modules)?);
    ui::step("index its modules", Command::new("depmod").arg("-b").arg(base).arg(release))?;
    Ok(kernel)
}

fn unpacked(directory: &Path) -> Result<Kernel> {
    let places = ["lib/modules", "usr/lib/modules"].map(|place| directory.join(place));
    let modules = places.iter().find_map(|place| Some(fs::read_dir(place).ok()?.flatten().next()?.path()));
    let modules = modules.with_context(|| format!("no modules in {}", directory.display()))?;
    let images = [directory.join("boot").join(format!("vmlinuz-{}", release(&modules)?)), modules.join("vmlinuz")];
    let image = images.into_iter().find(|image| image.exists()).with_context(|| format!("no kernel in {}", directory.display()))?;
    Ok(Kernel { image, modules })
}

fn release(modules: &Path) -> Result<&str> {
    modules.file_name().and_then(|name| name.to_str()).context("a release has a name")
}

/// What `modprobe -d` and `depmod -b` want: the directory that has `lib/modules`.
fn base(modules: &Path) -> Result<&Path> {
    modules.ancestors().nth(3).context("modules lie in lib/modules")
}

/// What the machine runs: the tests, as nextest runs them here.
fn script(root: &Path, described: &Described, filter: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let (root, binaries, workspace) = (root.display(), described.binaries.display(), described.workspace.display());
    format!(
        "export PATH={path}:/usr/sbin:/sbin HOME=/root\ncd {root}\n\
         cargo-nextest nextest run --binaries-metadata {binaries} --cargo-metadata {workspace} \
         --no-fail-fast --test-threads 1 --color never -E '{filter}' 2>&1 | cat\n"
    )
}

/// What the last line of the machine's console begins with; the script's exit code follows.
const END: &str = "kernels: ended with ";
/// For the longest of the scripts, on a slow machine; a machine that hangs is ended.
const PATIENCE: Duration = Duration::from_secs(60 * 60);
/// The machine's memory; what it writes to files is kept there too.
const MEMORY: &str = "3G";

/// Boots the kernel, shows its console, and says whether the script ended well.
fn boot(kernel: &Kernel, script: &str) -> Result<bool> {
    let work = Scratch::make()?;
    let run = work.0.join("run.sh");
    fs::write(&run, guest(script)).with_context(|| format!("write {}", run.display()))?;
    let initrd = work.0.join("initrd");
    make_initrd(kernel, &work.0.join("tree"), &initrd, &run)?;

    let socket = work.0.join("files.sock");
    // It listens already when virtiofsd gets it, so that nobody waits.
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let mut files = Command::new("/usr/lib/qemu/virtiofsd");
    files.args(["--fd=0", "-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"]);
    files.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
    let _files = Ended(files.spawn().context("start virtiofsd")?);

    let mut machine = Command::new("timeout");
    machine.arg(PATIENCE.as_secs().to_string()).arg("qemu-system-x86_64");
    machine.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2", "-m", MEMORY, "-nographic", "-no-reboot", "-nic", "none"]);
    machine.arg("-object").arg(format!("memory-backend-memfd,id=mem,size={MEMORY},share=on")).args(["-numa", "node,memdev=mem"]);
    machine.arg("-chardev").arg(format!("socket,id=files,path={}", socket.display()));
    machine.args(["-device", "vhost-user-fs-pci,chardev=files,tag=host"]);
    machine.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initrd);
    machine.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    let mut machine = Ended(machine.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start qemu")?);
    let console = BufReader::new(machine.0.stdout.take().context("its console is piped")?);
    let mut end = None;
    for line in console.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        match line.split_once(END) {
            Some((_, code)) => end = Some(code.to_owned()),
            None if end.is_none() => writeln!(std::io::stdout(), "    {line}")?,
            None => {}
        }
    }
    let code = end.context("the machine ended before its tests did: its console above says why")?;
    Ok(code == "0")
}

/// The script with what comes before and after it in the machine.
fn guest(script: &str) -> String {
    format!(
        "for link in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -sfn /proc/self/${{link#*:}} /dev/${{link%%:*}}; done\n\
         mkdir -p /dev/pts /dev/shm /sys/fs/cgroup\nmount -t devpts devpts /dev/pts\nmount -t tmpfs tmpfs /dev/shm\nmount -t bpf bpf /sys/fs/bpf\n\
         ulimit -l unlimited\nmount -t cgroup2 cgroup2 /sys/fs/cgroup\nfor c in cpu memory io pids cpuset; do echo +$c >/sys/fs/cgroup/cgroup.subtree_control; done\n\
         ip link set lo up\necho \"Linux $(uname -r), booted in $(cut -d' ' -f1 /proc/uptime) s\"\n\
         set -o pipefail\n({script})\necho \"{END}$?\"\necho o >/proc/sysrq-trigger\nsleep 60\n"
    )
}

/// What mounts this machine's files under a layer of memory and goes on there.
fn make_initrd(kernel: &Kernel, tree: &Path, initrd: &Path, run: &Path) -> Result<()> {
    let (modules, release) = (kernel.modules.display(), release(&kernel.modules)?);
    for directory in ["bin", "proc", "sys", "dev", "modules", "host", "written", "root"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    fs::copy("/usr/bin/busybox", tree.join("bin/busybox"))?;
    let mut loaded = Vec::new();
    for module in ["virtio_pci", "virtiofs", "overlay"] {
        let mut needs = Command::new("modprobe");
        needs.arg("-d").arg(base(&kernel.modules)?).args(["-S", release, "--show-depends", module]);
        let needs = needs.output().context("start modprobe")?;
        for file in String::from_utf8_lossy(&needs.stdout).lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let file = PathBuf::from(file.trim());
            if !loaded.contains(&file) {
                let copy = tree.join(format!("modules/{:03}.ko", loaded.len()));
                let bytes = if file.extension().is_some_and(|ending| ending == "xz") {
                    Command::new("xz").arg("-dc").arg(&file).output().context("start xz")?.stdout
                } else {
                    fs::read(&file)?
                };
                fs::write(copy, bytes)?;
                loaded.push(file);
            }
        }
    }
    let init = format!(
        "#!/bin/busybox sh\nb=/bin/busybox\n$b mount -t proc proc /proc\n$b mount -t sysfs sysfs /sys\n$b mount -t devtmpfs devtmpfs /dev\n\
         for m in /modules/*; do $b insmod $m; done\n$b mount -t virtiofs host /host -o ro\n$b mount -t tmpfs -o size=90% tmpfs /written\n\
         $b mkdir /written/upper /written/work\n\
         $b mount -t overlay -o lowerdir=/host,upperdir=/written/upper,workdir=/written/work overlay /root\n\
         for m in proc sys dev; do $b mount --move /$m /root/$m; done\n$b mount -t tmpfs tmpfs /root/run\n\
         $b mkdir -p /root/lib/modules/{release}\n$b mount --bind /root{modules} /root/lib/modules/{release}\n\
         exec $b switch_root /root /bin/bash {}\n",
        run.display()
    );
    fs::write(tree.join("init"), init)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | cpio --create --format=newc --quiet | gzip -1"]).current_dir(tree).stdout(fs::File::create(initrd)?);
    if !pack.status().context("start cpio")?.success() {
        bail!("the initial file system of the machine could not be packed");
    }
    Ok(())
}

/// A process that is ended with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that goes with its owner. Not below the checkout, whose path may be too long for a socket's.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("stanchion-kernels-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays of it says only that this was here.
        let _ = fs::remove_dir_all(&self.0);
    }
}
