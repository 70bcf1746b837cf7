//! The clock of the flow table: the kernel's jiffies, asked of a program of three instructions.

use std::io;

use super::raw::Program;

/// Answers `(bpf_jiffies64() >> shift) as u32`.
#[derive(Debug)]
struct Counter(Program);

impl Counter {
    fn load(shift: u32) -> io::Result<Self> {
        const JIFFIES64: u64 = 118;
        // call bpf_jiffies64; r0 >>= shift; exit
        Program::load(&[0x85 | JIFFIES64 << 32, 0x77 | u64::from(shift) << 32, 0x95]).map(Self)
    }

    fn read(&self) -> io::Result<u32> {
        self.0.run(&[0u8; 64], 0)
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
