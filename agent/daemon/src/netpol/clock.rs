//! The clock of the flow table: the kernel's jiffies, asked of a program of three instructions.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// `bpf_attr` of BPF_PROG_LOAD, as far as used; the kernel takes the rest as zero.
#[derive(Default)]
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// `bpf_attr` of BPF_PROG_TEST_RUN.
#[derive(Default)]
#[repr(C)]
struct TestRun {
    program: u32,
    return_value: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
}

fn bpf<T>(command: libc::c_int, attribute: &mut T) -> io::Result<i64> {
    let size = u32::try_from(size_of::<T>()).expect("attributes are small");
    // SAFETY: `attribute` is a bpf_attr of `size` bytes for this command; the pointers in it outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Answers `(bpf_jiffies64() >> shift) as u32`.
#[derive(Debug)]
struct Counter(OwnedFd);

impl Counter {
    fn load(shift: u32) -> io::Result<Self> {
        const PROG_LOAD: libc::c_int = 5;
        const SCHED_CLS: u32 = 3;
        const JIFFIES64: u64 = 118;
        // call bpf_jiffies64; r0 >>= shift; exit
        let instructions: [u64; 3] = [0x85 | JIFFIES64 << 32, 0x77 | u64::from(shift) << 32, 0x95];
        let license = c"GPL";
        let mut attribute = Load {
            program_type: SCHED_CLS,
            instruction_count: 3,
            instructions: instructions.as_ptr().addr() as u64,
            license: license.as_ptr().addr() as u64,
            ..Load::default()
        };
        let fd = bpf(PROG_LOAD, &mut attribute)?;
        let fd = i32::try_from(fd).expect("file descriptors fit");
        // SAFETY: the call gave us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn read(&self) -> io::Result<u32> {
        const PROG_TEST_RUN: libc::c_int = 10;
        // The kernel wants a frame at least as long as an Ethernet header.
        let frame = [0u8; 64];
        let mut attribute = TestRun {
            program: u32::try_from(self.0.as_raw_fd()).expect("file descriptors are not negative"),
            data_size_in: 64,
            data_in: frame.as_ptr().addr() as u64,
            repeat: 1,
            ..TestRun::default()
        };
        bpf(PROG_TEST_RUN, &mut attribute)?;
        Ok(attribute.return_value)
    }
}

/// Reads ticks. A tick is `1 << shift` jiffies, between 1.0 and 1.7 seconds.
#[derive(Debug)]
pub struct Clock {
    ticks: Counter,
    hertz: u32,
    shift: u32,
}

impl Clock {
    /// Finds out the kernel's rate.
    ///
    /// # Errors
    /// The kernel refuses the program: no privilege, or older than 5.6.
    pub fn new() -> io::Result<Self> {
        let jiffies = Counter::load(0)?.read()?;
        let hertz = hertz_from(jiffies, uptime_seconds());
        let shift = hertz.next_power_of_two().trailing_zeros();
        Ok(Self { ticks: Counter::load(shift)?, hertz, shift })
    }

    /// The present tick; wraps.
    ///
    /// # Errors
    /// The kernel's, for want of memory.
    pub fn now(&self) -> io::Result<u32> {
        self.ticks.read()
    }

    /// The constant that the programs are loaded with.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// Length of a tick in seconds.
    pub fn tick_seconds(&self) -> f64 {
        f64::from(1u32 << self.shift) / f64::from(self.hertz)
    }
}

/// Time since boot by the clock that jiffies follow (suspended time not counted).
fn uptime_seconds() -> f64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("the monotonic clock always exists");
    std::time::Duration::from(now).as_secs_f64()
}

/// The rate, of those that kernels are built with, that explains the low half of jiffies best: their count begins at -300 s.
/// In the fifth minute after boot all explain it about equally; a wrong guess then makes timeouts a few times longer or
/// shorter.
fn hertz_from(jiffies: u32, uptime: f64) -> u32 {
    const RATES: [u32; 4] = [100, 250, 300, 1000];
    let error = |rate: &u32| {
        let expected = (uptime - 300.0) * f64::from(*rate);
        let modulus = f64::from(u32::MAX) + 1.0;
        let difference = (f64::from(jiffies) - expected).rem_euclid(modulus);
        difference.min(modulus - difference) / f64::from(*rate)
    };
    RATES.into_iter().min_by(|a, b| error(a).total_cmp(&error(b))).expect("the list is not empty")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_rate_is_found_from_one_reading() {
        for rate in [100u32, 250, 300, 1000] {
            for uptime in [12.0, 200.0, 4_000.0, 9_000_000.0] {
                let jiffies = ((uptime - 300.0) * f64::from(rate)).rem_euclid(4_294_967_296.0) as u32;
                assert_eq!(hertz_from(jiffies, uptime + 0.004), rate, "uptime {uptime}");
            }
        }
    }

    #[test]
    fn ticks_are_a_second_or_a_little_more() {
        let clock = Clock::new().unwrap();
        assert!((1.0..1.8).contains(&clock.tick_seconds()), "{clock:?}");
        let (first, second) = (clock.now().unwrap(), clock.now().unwrap());
        assert!(second.wrapping_sub(first) <= 1);
    }
}
