//! Programs run by hand: `BPF_PROG_TEST_RUN` with a context, and the yardstick programs of a few instructions.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

/// `bpf_attr` of BPF_PROG_LOAD, as far as used.
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

/// `bpf_attr` of BPF_MAP_CREATE, as far as used.
#[derive(Default)]
#[repr(C)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// `bpf_attr` of BPF_MAP_UPDATE_ELEM.
#[repr(C)]
struct Update {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr` of BPF_MAP_LOOKUP_ELEM and, its value the next key, of BPF_MAP_GET_NEXT_KEY.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
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

fn bpf<T>(command: libc::c_int, attribute: &mut T) -> io::Result<i32> {
    let size = u32::try_from(size_of::<T>()).expect("attributes are small");
    // SAFETY: `attribute` is a bpf_attr of `size` bytes for this command; the pointers in it outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("descriptors are not negative")
}

/// Runs a classifier once on a frame, as if it came from interface `if_index`; its return value.
///
/// # Errors
/// The kernel's: frames without a byte behind the Ethernet header are refused.
pub fn run(program: BorrowedFd<'_>, frame: &[u8], if_index: u32) -> io::Result<i32> {
    repeat(program, frame, if_index, 1).map(|(result, _)| result)
}

/// The same for a frame that came into the machine through that very interface.
///
/// # Errors
/// See [`run`].
pub fn run_back(program: BorrowedFd<'_>, frame: &[u8], if_index: u32) -> io::Result<i32> {
    attempt(program, frame, [if_index; 2], 1).map(|(result, _)| result)
}

/// Runs a classifier `times` times on one frame; its last return value and the kernel's mean duration.
///
/// # Errors
/// See [`run`].
pub fn repeat(program: BorrowedFd<'_>, frame: &[u8], if_index: u32, times: u32) -> io::Result<(i32, Duration)> {
    attempt(program, frame, [0, if_index], times)
}

/// `interfaces`: where the frame came in, and where it is.
fn attempt(program: BorrowedFd<'_>, frame: &[u8], interfaces: [u32; 2], times: u32) -> io::Result<(i32, Duration)> {
    const PROG_TEST_RUN: libc::c_int = 10;
    /// Offset of `ingress_ifindex` in `__sk_buff`; `ifindex` follows.
    const INTERFACES: usize = 36;
    let mut context = [0u8; 192];
    let [came_in, is_at] = interfaces.map(u32::to_ne_bytes);
    context[INTERFACES..INTERFACES + 4].copy_from_slice(&came_in);
    context[INTERFACES + 4..INTERFACES + 8].copy_from_slice(&is_at);
    let mut attribute = TestRun {
        program: number(program),
        data_size_in: u32::try_from(frame.len()).expect("frames are small"),
        data_in: frame.as_ptr().addr() as u64,
        repeat: times,
        context_size_in: 192,
        context_in: context.as_ptr().addr() as u64,
        ..TestRun::default()
    };
    bpf(PROG_TEST_RUN, &mut attribute)?;
    Ok((attribute.return_value.cast_signed(), Duration::from_nanos(attribute.duration.into())))
}

/// A new map.
///
/// # Errors
/// The kernel's.
pub fn create_map(kind: u32, key_size: u32, value_size: u32, max_entries: u32, flags: u32) -> io::Result<OwnedFd> {
    const MAP_CREATE: libc::c_int = 0;
    let fd = bpf(MAP_CREATE, &mut Create { kind, key_size, value_size, max_entries, flags })?;
    // SAFETY: the call gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Every key of a map, which has one value for all CPUs, with its value.
///
/// # Errors
/// The kernel's.
pub fn entries(map: BorrowedFd<'_>, key_size: u32, value_size: u32) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    const LOOKUP: libc::c_int = 1;
    const NEXT_KEY: libc::c_int = 4;
    let ask = |command, key: Option<&[u8]>, answer: &mut [u8]| {
        let key = key.map_or(0, |key| key.as_ptr().addr() as u64);
        bpf(command, &mut Element { map: number(map), pad: 0, key, value: answer.as_mut_ptr().addr() as u64, flags: 0 })
    };
    let is_end = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    let (mut found, mut last) = (Vec::new(), None::<Vec<u8>>);
    loop {
        let mut key = vec![0; key_size as usize];
        match ask(NEXT_KEY, last.as_deref(), &mut key) {
            Err(error) if is_end(&error) => return Ok(found),
            result => result?,
        };
        let mut value = vec![0; value_size as usize];
        match ask(LOOKUP, Some(&key), &mut value) {
            // It went meanwhile.
            Err(error) if is_end(&error) => {}
            result => {
                result?;
                found.push((key.clone(), value));
            }
        }
        last = Some(key);
    }
}

/// A program of our own instructions, with the map that it uses.
#[derive(Debug)]
pub struct Yardstick {
    program: OwnedFd,
    _map: Option<OwnedFd>,
}

impl AsFd for Yardstick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

impl Yardstick {
    /// Does nothing: what every other figure has subtracted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn empty() -> io::Result<Self> {
        // r0 = 0; exit
        Ok(Self { program: load(&[0xb7, 0x95])?, _map: None })
    }

    /// Looks up one of a thousand entries in a HASH with 4-byte keys.
    ///
    /// # Errors
    /// The kernel's.
    pub fn hash() -> io::Result<Self> {
        const MAP_UPDATE: libc::c_int = 2;
        const HASH: u32 = 1;
        let map = create_map(HASH, 4, 8, 1_024, 0)?;
        for key in 0u32..1_000 {
            let value = u64::from(key);
            let mut update = Update {
                map: number(map.as_fd()),
                pad: 0,
                key: std::ptr::from_ref(&key).addr() as u64,
                value: std::ptr::from_ref(&value).addr() as u64,
                flags: 0,
            };
            bpf(MAP_UPDATE, &mut update)?;
        }
        let program = load(&[
            0x62 | 10 << 8 | (0xfffc << 16) | 42 << 32,                     // *(u32 *)(r10 - 4) = 42
            0xbf | 2 << 8 | 10 << 12,                                       // r2 = r10
            0x07 | 2 << 8 | 0xffff_fffc << 32,                              // r2 += -4
            0x18 | 1 << 8 | 1 << 12 | u64::from(number(map.as_fd())) << 32, // r1 = map
            0,
            0x85 | 1 << 32, // call bpf_map_lookup_elem
            0x15 | 1 << 16, // if r0 == 0 goto +1
            0x79,           // r0 = *(u64 *)(r0 + 0)
            0xb7,           // r0 = 0
            0x95,           // exit
        ])?;
        Ok(Self { program, _map: Some(map) })
    }
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    const PROG_LOAD: libc::c_int = 5;
    const SCHED_CLS: u32 = 3;
    let license = c"GPL";
    let mut attribute = Load {
        program_type: SCHED_CLS,
        instruction_count: u32::try_from(instructions.len()).expect("a few"),
        instructions: instructions.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        ..Load::default()
    };
    let fd = bpf(PROG_LOAD, &mut attribute)?;
    // SAFETY: the call gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
