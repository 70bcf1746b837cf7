//! Network namespaces by name: made, entered on a thread of their own, and removed.
//!
//! Nothing here changes the namespace of a thread that outlives the call, so the machine's own networking stays as it is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where `ip netns` looks for names.
pub const NETNS_DIR: &str = "/run/netns";

/// A named network namespace. Cloning shares it; it lives until [`Netns::remove`].
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes a namespace that `ip netns exec NAME` finds, with `lo` up.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(NETNS_DIR).with_context(|| format!("make {NETNS_DIR}"))?;
        let path = Self::path_of(name);
        File::create_new(&path).with_context(|| format!("name the namespace {}", path.display()))?;
        let target = path.clone();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        })
        .join()
        .expect("the thread only makes two system calls")
        .with_context(|| format!("make network namespace {name} (this needs root)"))?;
        let netns = Self::open(name)?;
        ip_batch(name, "link set lo up\n")?;
        Ok(netns)
    }

    /// Opens an existing one.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let path = Self::path_of(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// The name that `ip netns` knows.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it, as a runtime passes it in `CNI_NETNS`.
    pub fn path(&self) -> PathBuf {
        Self::path_of(&self.name)
    }

    fn path_of(name: &str) -> PathBuf {
        Path::new(NETNS_DIR).join(name)
    }

    /// Runs `work` on a thread inside the namespace and waits for it. Sockets and processes made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// [`Netns::run`] for async callers: the runtime's threads stay free.
    pub async fn run_async<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let netns = self.clone();
        tokio::task::spawn_blocking(move || netns.run(work)).await.map_err(io::Error::other)?
    }

    /// Starts a process inside.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())?
    }

    /// Runs a process inside to its end and returns what it printed.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        self.run(|| command.output())?
    }

    /// A TCP listener inside, ready for tokio.
    pub fn tcp_listener(&self, address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
        tokio::net::TcpListener::from_std(self.std_listener(address, None)?)
    }

    /// A TCP listener inside that only takes what arrives on `device`: several may share an address.
    pub fn tcp_listener_on(&self, address: SocketAddr, device: &str) -> io::Result<tokio::net::TcpListener> {
        tokio::net::TcpListener::from_std(self.std_listener(address, Some(device))?)
    }

    fn std_listener(&self, address: SocketAddr, device: Option<&str>) -> io::Result<TcpListener> {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt};
        self.run(|| {
            let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let socket = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            if let Some(device) = device {
                setsockopt(&socket, sockopt::BindToDevice, &device.into())?;
            }
            bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(address))?;
            listen(&socket, Backlog::MAXCONN)?;
            Ok(TcpListener::from(socket))
        })?
    }

    /// A UDP socket inside, ready for tokio.
    pub fn udp_socket(&self, address: SocketAddr) -> io::Result<tokio::net::UdpSocket> {
        let socket = self.run(|| {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        })??;
        tokio::net::UdpSocket::from_std(socket)
    }

    /// Removes the name; the kernel frees the namespace when its last process and socket are gone.
    pub fn remove(&self) -> anyhow::Result<()> {
        remove_name(&self.name)
    }
}

/// Removes the name of a namespace; not there is success.
pub fn remove_name(name: &str) -> anyhow::Result<()> {
    let path = Netns::path_of(name);
    if !path.exists() {
        return Ok(());
    }
    // EINVAL: the file is there but nothing is mounted on it (a run that died between the two steps).
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(error) => return Err(error).with_context(|| format!("unmount {}", path.display())),
    }
    fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

/// The names that begin with `prefix`.
pub fn names(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(NETNS_DIR) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect();
    names.sort();
    names
}

/// Processes whose network namespace is this one.
pub fn processes(name: &str) -> Vec<i32> {
    let output = Command::new("ip").args(["netns", "pids", name]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Feeds lines to `ip -n NAMESPACE -batch -`; the first that fails ends it.
pub fn ip_batch(namespace: &str, lines: &str) -> anyhow::Result<()> {
    feed(Command::new("ip").args(["-n", namespace, "-batch", "-"]), lines)
}

/// Runs a command with `input` on stdin; an error carries what it printed and what it was fed.
pub(crate) fn feed(command: &mut Command, input: &str) -> anyhow::Result<()> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = feed_for_output(command, input)?;
    if !output.status.success() {
        let program = Path::new(command.get_program()).display();
        bail!("{program} failed: {}\nfed with:\n{input}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Runs a command with `input` on stdin.
pub(crate) fn feed_for_output(command: &mut Command, input: &str) -> anyhow::Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {} (is it installed?)", Path::new(command.get_program()).display()))?;
    // The reader may end early on an error that its exit status tells.
    let _ = child.stdin.take().expect("stdin is piped").write_all(input.as_bytes());
    Ok(child.wait_with_output()?)
}

/// Writes a sysctl of a namespace: `net/ipv4/ip_forward`.
pub fn sysctl(netns: &Netns, key: &str, value: &str) -> anyhow::Result<()> {
    let path = Path::new("/proc/sys").join(key);
    netns.run(|| fs::write(&path, value))?.with_context(|| format!("write {value} to {} in {}", path.display(), netns.name()))
}

/// `ip -j ARGS` inside a namespace, parsed.
pub fn ip_json(netns: &Netns, args: &[impl AsRef<OsStr>]) -> anyhow::Result<serde_json::Value> {
    let output = Command::new("ip").args(["-n", netns.name(), "-j"]).args(args).output()?;
    if !output.status.success() {
        bail!("ip in {}: {}", netns.name(), String::from_utf8_lossy(&output.stderr).trim());
    }
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(serde_json::Value::Array(Vec::new()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
