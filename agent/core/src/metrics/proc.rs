//! Parsers of files under /proc. Formats: `Documentation/filesystems/proc.rst`, `Documentation/admin-guide/iostats.rst`, proc(5).

/// Clock ticks a second in what /proc tells; user space always sees 100 (`USER_HZ`) on the platforms of EKS.
pub const USER_HZ: u64 = 100;
/// Sectors in /proc/diskstats are of 512 bytes whatever the device says.
pub const SECTOR: u64 = 512;

/// CPU time since boot, in clock ticks ([`USER_HZ`]), of one line of /proc/stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTicks {
    /// Includes guests.
    pub user: u64,
    /// Niced user time.
    pub nice: u64,
    /// Kernel.
    pub system: u64,
    /// Idle.
    pub idle: u64,
    /// Idle with I/O outstanding.
    pub iowait: u64,
    /// Hard interrupts.
    pub irq: u64,
    /// Soft interrupts.
    pub softirq: u64,
    /// Taken by the hypervisor: not ours.
    pub steal: u64,
}

impl CpuTicks {
    /// In user code, nanoseconds.
    pub fn user_ns(&self) -> u64 {
        ticks_to_ns(self.user.saturating_add(self.nice))
    }

    /// In the kernel, interrupts included, nanoseconds.
    pub fn system_ns(&self) -> u64 {
        ticks_to_ns(self.system.saturating_add(self.irq).saturating_add(self.softirq))
    }

    /// Taken by the hypervisor, nanoseconds.
    pub fn steal_ns(&self) -> u64 {
        ticks_to_ns(self.steal)
    }

    /// Neither used nor taken, nanoseconds.
    pub fn idle_ns(&self) -> u64 {
        ticks_to_ns(self.idle.saturating_add(self.iowait))
    }
}

fn ticks_to_ns(ticks: u64) -> u64 {
    ticks.saturating_mul(1_000_000_000 / USER_HZ)
}

/// What /proc/stat tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// All processors together.
    pub cpu: CpuTicks,
    /// Processors online: lines `cpuN`.
    pub online: u32,
    /// Context switches since boot.
    pub context_switches: u64,
    /// Seconds since 1970 at boot.
    pub boot_time: u64,
    /// Processes made since boot.
    pub forks: u64,
    /// Runnable now.
    pub running: u64,
    /// Waiting for I/O now.
    pub blocked: u64,
}

/// Reads /proc/stat; `None` without the line `cpu`.
pub fn stat(text: &str) -> Option<Stat> {
    let mut out = Stat::default();
    let mut found = false;
    for line in text.lines() {
        let Some((key, rest)) = line.split_once(' ') else { continue };
        let number = || rest.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match key {
            "cpu" => {
                let mut words = rest.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
                let mut next = || words.next().flatten();
                // The first four are as old as /proc; older kernels lack the rest.
                out.cpu = CpuTicks {
                    user: next()?,
                    nice: next()?,
                    system: next()?,
                    idle: next()?,
                    iowait: next().unwrap_or(0),
                    irq: next().unwrap_or(0),
                    softirq: next().unwrap_or(0),
                    steal: next().unwrap_or(0),
                };
                found = true;
            }
            "ctxt" => out.context_switches = number(),
            "btime" => out.boot_time = number(),
            "processes" => out.forks = number(),
            "procs_running" => out.running = number(),
            "procs_blocked" => out.blocked = number(),
            _ if key.len() > 3 && key.starts_with("cpu") && key.as_bytes()[3..].iter().all(u8::is_ascii_digit) => out.online += 1,
            _ => {}
        }
    }
    found.then_some(out)
}

/// Sizes from /proc/meminfo, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// All that the kernel manages.
    pub total: u64,
    /// Unused.
    pub free: u64,
    /// Obtainable without swapping; 0 before Linux 3.14.
    pub available: u64,
    /// Block device cache.
    pub buffers: u64,
    /// Page cache.
    pub cached: u64,
    /// File pages not used lately.
    pub inactive_file: u64,
    /// Anonymous pages mapped.
    pub anon: u64,
    /// File pages mapped.
    pub mapped: u64,
    /// Swap space.
    pub swap_total: u64,
    /// Swap space unused.
    pub swap_free: u64,
    /// To be written back.
    pub dirty: u64,
    /// Kernel objects.
    pub slab: u64,
    /// Of them, reclaimable.
    pub slab_reclaimable: u64,
}

/// Reads /proc/meminfo; `None` without `MemTotal`.
pub fn meminfo(text: &str) -> Option<MemInfo> {
    let mut out = MemInfo::default();
    for line in text.lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        let slot = match key {
            "MemTotal" => &mut out.total,
            "MemFree" => &mut out.free,
            "MemAvailable" => &mut out.available,
            "Buffers" => &mut out.buffers,
            "Cached" => &mut out.cached,
            "Inactive(file)" => &mut out.inactive_file,
            "AnonPages" => &mut out.anon,
            "Mapped" => &mut out.mapped,
            "SwapTotal" => &mut out.swap_total,
            "SwapFree" => &mut out.swap_free,
            "Dirty" => &mut out.dirty,
            "Slab" => &mut out.slab,
            "SReclaimable" => &mut out.slab_reclaimable,
            _ => continue,
        };
        let kib = rest.split_ascii_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        *slot = kib.unwrap_or(0).saturating_mul(1024);
    }
    (out.total > 0).then_some(out)
}

/// The three averages of /proc/loadavg over 1, 5 and 15 minutes.
pub fn loadavg(text: &str) -> Option<[f64; 3]> {
    let mut words = text.split_ascii_whitespace().map(|word| word.parse::<f64>().ok().filter(|load| load.is_finite()));
    Some([words.next()??, words.next()??, words.next()??])
}

/// Counters of one direction of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Dropped.
    pub dropped: u64,
}

/// Counters of an interface since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounters<'a> {
    /// Its name.
    pub name: &'a str,
    /// Received.
    pub rx: Direction,
    /// Sent.
    pub tx: Direction,
}

/// The interfaces of a /proc/…/net/dev; lines that are not of its form (the two headings) are left out.
pub fn net_dev(text: &str) -> impl Iterator<Item = InterfaceCounters<'_>> {
    text.lines().filter_map(|line| {
        // An alias may hold a colon ("eth0:1"); counters never do.
        let (name, rest) = line.rsplit_once(':')?;
        let mut words = rest.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
        let mut next = || words.next().flatten();
        let rx = Direction { bytes: next()?, packets: next()?, errors: next()?, dropped: next()? };
        for _fifo_frame_compressed_multicast in 0..4 {
            next()?;
        }
        let tx = Direction { bytes: next()?, packets: next()?, errors: next()?, dropped: next()? };
        Some(InterfaceCounters { name: name.trim(), rx, tx })
    })
}

/// Counters of a block device since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounters<'a> {
    /// `nvme0n1`.
    pub name: &'a str,
    /// Device number.
    pub device: (u32, u32),
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Milliseconds of reads, summed over them.
    pub read_ms: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Milliseconds of writes.
    pub write_ms: u64,
    /// Under way now.
    pub in_flight: u64,
    /// Milliseconds with anything under way.
    pub busy_ms: u64,
}

/// The devices of /proc/diskstats.
pub fn diskstats(text: &str) -> impl Iterator<Item = DiskCounters<'_>> {
    text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let device = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let name = words.next()?;
        let mut next = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (reads, _read_merges, read_sectors, read_ms) = (next()?, next()?, next()?, next()?);
        let (writes, _write_merges, write_sectors, write_ms) = (next()?, next()?, next()?, next()?);
        Some(DiskCounters {
            name,
            device,
            reads,
            read_bytes: read_sectors.saturating_mul(SECTOR),
            read_ms,
            writes,
            write_bytes: write_sectors.saturating_mul(SECTOR),
            write_ms,
            in_flight: next()?,
            busy_ms: next()?,
        })
    })
}

/// A line of /proc/…/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Device number of the file system.
    pub device: (u32, u32),
    /// Where it is mounted, with the kernel's escapes (`\040`) undone.
    pub point: std::borrow::Cow<'a, str>,
    /// `ext4`, `xfs` ...
    pub fs_type: &'a str,
    /// `/dev/nvme0n1p1`, `tmpfs` ...
    pub source: &'a str,
}

/// The mounts of a mountinfo file.
pub fn mountinfo(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let (major, minor) = left.nth(2)?.split_once(':')?;
        let point = left.nth(1)?;
        let mut right = right.split(' ');
        let (fs_type, source) = (right.next()?, right.next()?);
        Some(Mount { device: (major.parse().ok()?, minor.parse().ok()?), point: unescape(point), fs_type, source })
    })
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.contains('\\') {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let code = escape.get(1..4).and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(u8::is_ascii);
        match code {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &escape[4..];
            }
            None => {
                out.push('\\');
                rest = &escape[1..];
            }
        }
    }
    out.push_str(rest);
    out.into()
}

/// What a process uses, from its /proc/PID/stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessStat {
    /// User mode, clock ticks.
    pub user_ticks: u64,
    /// Kernel mode, clock ticks.
    pub system_ticks: u64,
    /// Threads.
    pub threads: u64,
    /// Clock ticks after boot.
    pub start_ticks: u64,
    /// Bytes of address space.
    pub virtual_bytes: u64,
    /// Pages resident.
    pub resident_pages: u64,
}

/// Reads /proc/PID/stat; the command name may hold spaces and brackets.
pub fn process_stat(text: &str) -> Option<ProcessStat> {
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Field numbers of proc(5), less the pid, the name and one for counting from 0.
    let field = |number: usize| fields.get(number - 3).and_then(|word| word.parse::<u64>().ok());
    Some(ProcessStat {
        user_ticks: field(14)?,
        system_ticks: field(15)?,
        threads: field(20)?,
        start_ticks: field(22)?,
        virtual_bytes: field(23)?,
        resident_pages: field(24)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAT: &str = "cpu  46175 7 19060 599724 998 3 116 77 5 0\ncpu0 22438 0 8673 301555 259 0 24 33 0 0\ncpu1 1 0 1 1 1 0 1 1 0 0\nintr 531593 0 0\nctxt 694863\nbtime 1795231040\nprocesses 9000\nprocs_running 2\nprocs_blocked 1\n";
    const NET: &str = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0    0     0       0          0\n  eth0: 380357084   13169    1    2    0     0          0         0   675914    7259    3    4    0     0       0          0\neni1234567890a:12 1 0 0 0 0 0 0 24 2 0 0 0 0 0 0\n";
    const DISKS: &str = "   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n 254       0 vda 80813 19004 20608186 52502 22381 93526 48783664 146536 3 24712 200538 7660 53 842192 1474 816 23\n";
    const MOUNTS: &str =
        "22 1 259:1 / / rw,noatime shared:1 - xfs /dev/nvme0n1p1 rw,attr2\n30 22 0:25 / /mnt/a\\040b\\134 rw - tmpfs tmpfs rw,size=1k\n";

    #[test]
    fn stat_of_a_small_machine() {
        let got = stat(STAT).unwrap();
        assert_eq!((got.online, got.context_switches, got.boot_time, got.forks), (2, 694_863, 1_795_231_040, 9000));
        assert_eq!((got.running, got.blocked), (2, 1));
        assert_eq!(got.cpu.user_ns(), (46_175 + 7) * 10_000_000);
        assert_eq!(got.cpu.system_ns(), (19_060 + 3 + 116) * 10_000_000);
        assert_eq!(got.cpu.steal_ns(), 77 * 10_000_000);
        assert_eq!(stat("cpu 1 2"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        let got = meminfo("MemTotal:       32768 kB\nMemFree:  1024 kB\nInactive(file):   16 kB\nHugePages_Total:   0\n").unwrap();
        assert_eq!((got.total, got.free, got.inactive_file), (32 << 20, 1 << 20, 16 << 10));
        assert_eq!(meminfo("MemFree: 1 kB"), None);
    }

    #[test]
    fn interfaces_and_headings() {
        let got: Vec<_> = net_dev(NET).collect();
        assert_eq!(got.iter().map(|i| i.name).collect::<Vec<_>>(), ["lo", "eth0", "eni1234567890a"]);
        assert_eq!(got[1].rx, Direction { bytes: 380_357_084, packets: 13_169, errors: 1, dropped: 2 });
        assert_eq!(got[1].tx, Direction { bytes: 675_914, packets: 7259, errors: 3, dropped: 4 });
        assert_eq!(got[2].tx.bytes, 24);
    }

    #[test]
    fn disks_mounts_load_processes() {
        let disks: Vec<_> = diskstats(DISKS).collect();
        assert_eq!((disks[1].name, disks[1].device, disks[1].reads, disks[1].in_flight), ("vda", (254, 0), 80_813, 3));
        assert_eq!(disks[1].write_bytes, 48_783_664 * 512);
        let mounts: Vec<_> = mountinfo(MOUNTS).collect();
        assert_eq!((mounts[0].device, &*mounts[0].point, mounts[0].fs_type, mounts[0].source), ((259, 1), "/", "xfs", "/dev/nvme0n1p1"));
        assert_eq!(mounts[1].point, "/mnt/a b\\");
        assert_eq!(loadavg("0.50 1.25 2.00 1/200 4242\n"), Some([0.5, 1.25, 2.0]));
        let stat = process_stat("42 (a (b) c) S 1 1 1 0 -1 4194304 10 0 0 0 7 8 0 0 20 0 5 0 999 4096 33 18446744073709551615 1").unwrap();
        assert_eq!(
            stat,
            ProcessStat { user_ticks: 7, system_ticks: 8, threads: 5, start_ticks: 999, virtual_bytes: 4096, resident_pages: 33 }
        );
    }

    fn parse_everything(text: &str) -> usize {
        let counted = net_dev(text).count() + diskstats(text).count() + mountinfo(text).count();
        counted
            + usize::from(stat(text).is_some())
            + usize::from(meminfo(text).is_some())
            + usize::from(loadavg(text).is_some())
            + usize::from(process_stat(text).is_some())
    }

    #[test]
    fn truncated_anywhere_nothing_panics_and_nothing_is_invented() {
        for whole in [STAT, NET, DISKS, MOUNTS] {
            let most = parse_everything(whole);
            for end in (0..=whole.len()).filter(|end| whole.is_char_boundary(*end)) {
                assert!(parse_everything(&whole[..end]) <= most + 1, "{:?}", &whole[..end]);
            }
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in "(?s).{0,200}") {
            parse_everything(&text);
        }

        #[test]
        fn words_of_the_right_shape_never_panic(text in "((cpu|cpu[0-9]|MemTotal:|eth0:|[0-9]{1,25}|-|\\)|\\\\0|é) ?\n?){0,60}") {
            parse_everything(&text);
        }
    }
}
