//! A driver's own counters, as `ethtool -S` shows them.
//!
//! ENA tells there what no other interface tells: packets that the instance's network allowances queued or dropped.
//! <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/monitoring-network-performance-ena.html>

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
/// The string set of statistics.
const ETH_SS_STATS: u32 = 1;
/// Bytes of a name in a string set, padded with NUL.
const ETH_GSTRING_LEN: usize = 32;
/// Room for counters: the kernel fills in as many as the driver has at that moment, whatever we say, and ENA with 32 queues has
/// under 2,000. A driver that has more is not asked.
const MAX_COUNTERS: usize = 8192;

/// Names and values of the driver's counters of an interface in the calling thread's network namespace; none for a driver that
/// has none.
///
/// # Errors
/// When the interface is not there or the kernel refuses.
pub fn statistics(interface: &str) -> io::Result<Vec<(String, u64)>> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let request = |buffer: &mut [u64]| ethtool(socket.as_fd().as_raw_fd(), interface, buffer);
    // struct ethtool_sset_info: cmd, reserved, mask (u64), one u32 for each set bit.
    let mut info = [u64::from(ETHTOOL_GSSET_INFO), 1 << ETH_SS_STATS, 0];
    match request(&mut info) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        outcome => outcome?,
    }
    let count = bytes(&info[2..]).first_chunk().map_or(0, |word| u32::from_ne_bytes(*word)) as usize;
    if info[1] == 0 || count == 0 || count > MAX_COUNTERS / 2 {
        return Ok(Vec::new());
    }
    let length = u32::try_from(count).expect("at most MAX_COUNTERS");
    // struct ethtool_gstrings: cmd, set, length, names.
    let mut names = vec![0u64; (12 + MAX_COUNTERS * ETH_GSTRING_LEN).div_ceil(8)];
    names[0] = pair(ETHTOOL_GSTRINGS, ETH_SS_STATS);
    names[1] = pair(length, 0);
    request(&mut names)?;
    // struct ethtool_stats: cmd, count, values.
    let mut values = vec![0u64; 1 + MAX_COUNTERS];
    values[0] = pair(ETHTOOL_GSTATS, length);
    request(&mut values)?;
    let names = bytes(&names[..(12 + count * ETH_GSTRING_LEN).div_ceil(8)]);
    let names = names[12..].chunks_exact(ETH_GSTRING_LEN).take(count).map(|name| {
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        String::from_utf8_lossy(&name[..end]).into_owned()
    });
    Ok(names.zip(values.into_iter().skip(1)).collect())
}

/// Two neighbouring u32 members in memory order.
fn pair(first: u32, second: u32) -> u64 {
    let mut out = [0; 8];
    out[..4].copy_from_slice(&first.to_ne_bytes());
    out[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(out)
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// One SIOCETHTOOL: the kernel reads and writes `buffer`, whose first member is the command.
fn ethtool(socket: libc::c_int, interface: &str, buffer: &mut [u64]) -> io::Result<()> {
    if interface.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    // SAFETY: an ifreq of zeros is valid: integers, and a union of such and null pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: the name ends with a NUL, as it is shorter than the array; `ifru_data` points to `buffer`, which outlives the call,
    // is aligned for u64 and long enough for the command's structure with MAX_COUNTERS members (or, for the question how many, one).
    let outcome = unsafe { libc::ioctl(socket, SIOCETHTOOL, &raw mut request) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_veth_tells_its_peer() {
        // In a namespace of its own, which ends with the thread.
        let seen = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("tests run as root");
            let made = std::process::Command::new("ip").args(["link", "add", "sta", "type", "veth", "peer", "name", "stb"]).status();
            assert!(made.expect("iproute2 is installed").success());
            let peer = nix::net::if_::if_nametoindex("stb").expect("just made");
            (statistics("sta").expect("it is there"), peer, statistics("lo"), statistics("nobody"))
        });
        let (counters, peer, loopback, nobody) = seen.join().expect("no panic");
        let told = counters.iter().find(|(name, _)| name == "peer_ifindex").expect("the veth driver tells it");
        assert_eq!(told.1, u64::from(peer));
        assert_eq!(loopback.expect("there").len(), 0);
        assert_eq!(nobody.expect_err("not there").raw_os_error(), Some(libc::ENODEV));
    }
}
