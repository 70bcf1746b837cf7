//! System calls that the kernel refuses for a while: updates of BPF maps, and netlink.
//!
//! A seccomp filter hands these calls to a thread of this process, which has the kernel carry them out or answers in its place. So
//! errors come that a machine cannot be brought to by other means wherever tests run: no memory for an entry, no buffer for a message.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use libc::{c_long, seccomp_data, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What is refused to the threads and processes that [`Refusals::install`] was called in. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Refusals {
    told: Arc<Mutex<Told>>,
}

#[derive(Debug, Default)]
struct Told {
    maps: Option<MapRefusal>,
    /// The error of every netlink socket and request.
    netlink: Option<i32>,
    refused: u64,
}

#[derive(Clone, Copy, Debug)]
struct MapRefusal {
    /// Updates that are still let through.
    first: u32,
    errno: i32,
}

/// BPF_MAP_UPDATE_ELEM.
const MAP_UPDATE_ELEM: u32 = 2;
/// BPF_F_NO_PREALLOC: the map takes memory for an entry when it comes.
const NO_PREALLOC: u32 = 1;

impl Refusals {
    /// From now on this thread, and the threads and processes that it starts, can be refused something. The filter ends with them.
    ///
    /// # Errors
    /// The kernel has no seccomp notifications, or the thread is watched by another already.
    pub fn install(&self) -> io::Result<()> {
        let listener = listen()?;
        let refusals = self.clone();
        std::thread::Builder::new().name("refusals".to_owned()).spawn(move || refusals.answer(&listener))?;
        Ok(())
    }

    /// After `first` more of them, every update of a map that takes memory for it fails.
    pub fn refuse_map_updates(&self, first: u32, errno: i32) {
        self.told().maps = Some(MapRefusal { first, errno });
    }

    /// No netlink socket can be opened, and no request sent.
    pub fn refuse_netlink(&self, errno: i32) {
        self.told().netlink = Some(errno);
    }

    /// Nothing is refused any more. How many calls were.
    pub fn lift(&self) -> u64 {
        std::mem::take(&mut *self.told()).refused
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until nobody is left who could call.
    fn answer(&self, listener: &OwnedFd) {
        loop {
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let woken = poll(&mut fds, PollTimeout::NONE);
            if woken.is_ok() && !fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
                return;
            }
            // The caller may have been killed meanwhile, before and after.
            let Ok(call) = receive(listener) else { continue };
            let errno = self.errno(&call).unwrap_or(0);
            let _gone = send(listener, call.id, errno);
        }
    }

    fn errno(&self, call: &seccomp_notif) -> Option<i32> {
        let mut told = self.told();
        let errno = if c_long::from(call.data.nr) != libc::SYS_bpf {
            told.netlink.filter(|_| is_netlink(call))
        } else if told.maps.is_some() && takes_memory(call).unwrap_or(false) {
            told.maps.as_mut().and_then(|refusal| match refusal.first.checked_sub(1) {
                None => Some(refusal.errno),
                Some(left) => {
                    refusal.first = left;
                    None
                }
            })
        } else {
            None
        };
        told.refused += u64::from(errno.is_some());
        errno
    }
}

/// Whether the map of an update takes memory for it.
fn takes_memory(call: &seccomp_notif) -> io::Result<bool> {
    // `bpf_attr` begins with the map's descriptor.
    let mut map = [0; 4];
    File::open(format!("/proc/{}/mem", call.pid))?.read_exact_at(&mut map, call.data.args[1])?;
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/{}", call.pid, u32::from_ne_bytes(map)))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("map_flags:")?.trim().strip_prefix("0x"));
    Ok(flags.and_then(|flags| u32::from_str_radix(flags, 16).ok()).is_some_and(|flags| flags & NO_PREALLOC != 0))
}

/// A socket that is to be netlink's (others do not come here), or a message by one that is.
fn is_netlink(call: &seccomp_notif) -> bool {
    if c_long::from(call.data.nr) == libc::SYS_socket {
        return true;
    }
    let inode = fs::read_link(format!("/proc/{}/fd/{}", call.pid, call.data.args[0]));
    let inode = inode.ok().and_then(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned));
    let sockets = fs::read_to_string(format!("/proc/{}/net/netlink", call.pid)).unwrap_or_default();
    inode.is_some_and(|inode| sockets.lines().any(|line| line.split_whitespace().next_back() == Some(inode.as_str())))
}

/// Of the architectures of EC2.
const ARCHITECTURE: u32 = if cfg!(target_arch = "aarch64") { 0xc000_00b7 } else { 0xc000_003e };

/// Installs the filter; what it hands over comes to the descriptor.
fn listen() -> io::Result<OwnedFd> {
    const ALLOW: u8 = 13;
    const HAND_OVER: u8 = 14;
    let load = |offset: usize| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, u32::try_from(offset).expect("a few bytes"), 0, 0);
    // The number of instructions to skip if equal, and if not.
    let equal = |value: u32, yes: u8, no: u8| step(libc::BPF_JMP | libc::BPF_JEQ, value, yes, no);
    let is_call = |number: c_long, at: u8, to: u8| equal(u32::try_from(number).expect("calls are numbered from 0"), to - at - 1, 0);
    let argument = |index: usize| load(std::mem::offset_of!(seccomp_data, args) + 8 * index);
    let hand_over_if = |value: u32, at: u8| equal(value, HAND_OVER - at - 1, ALLOW - at - 1);
    let mut filter = [
        load(std::mem::offset_of!(seccomp_data, arch)),
        equal(ARCHITECTURE, 0, ALLOW - 2),
        load(std::mem::offset_of!(seccomp_data, nr)),
        is_call(libc::SYS_bpf, 3, 7),
        is_call(libc::SYS_socket, 4, 9),
        is_call(libc::SYS_sendto, 5, 11),
        step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0, 0),
        argument(0),
        hand_over_if(MAP_UPDATE_ELEM, 8),
        argument(0),
        hand_over_if(libc::AF_NETLINK.cast_unsigned(), 10),
        // The flags: what streams send, they send with MSG_NOSIGNAL.
        argument(3),
        hand_over_if(0, 12),
        step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(libc::BPF_RET, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
    ];
    let program = sock_fprog { len: u16::try_from(filter.len()).expect("a few instructions"), filter: filter.as_mut_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the program and its instructions live until the call has ended, which copies them.
    let fd = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn step(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("codes have eight bits"), jt, jf, k }
}

fn receive(listener: &OwnedFd) -> io::Result<seccomp_notif> {
    let data = seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] };
    // All zero, as the kernel demands.
    let mut call = seccomp_notif { id: 0, pid: 0, flags: 0, data };
    // SAFETY: the ioctl writes a `seccomp_notif`.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(call) }
}

/// Answers a call with an error; 0: the kernel is to carry it out.
fn send(listener: &OwnedFd, id: u64, errno: i32) -> io::Result<()> {
    let flags = if errno == 0 { u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).expect("a bit") } else { 0 };
    let mut answer = seccomp_notif_resp { id, val: 0, error: -errno, flags };
    // SAFETY: the ioctl reads a `seccomp_notif_resp`.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
