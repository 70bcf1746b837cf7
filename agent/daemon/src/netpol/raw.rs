//! The kernel's BPF calls that `aya` makes only for a whole object; and programs of a few instructions, loaded and run by hand.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::bpf_insn;

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
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    types: u32,
    function_bytes: u32,
    functions: u64,
    function_count: u32,
    line_bytes: u32,
    lines: u64,
    line_count: u32,
    reserved: u32,
}

/// `bpf_attr` of BPF_BTF_LOAD.
#[derive(Default)]
#[repr(C)]
struct LoadTypes {
    types: u64,
    log_buffer: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    reserved: u32,
}

/// `bpf_attr` of BPF_OBJ_PIN.
#[derive(Default)]
#[repr(C)]
struct Pin {
    path: u64,
    object: u32,
    flags: u32,
}

/// `bpf_attr` of BPF_MAP_UPDATE_ELEM, and of BPF_MAP_FREEZE, which looks at its first word alone.
#[derive(Default)]
#[repr(C)]
struct Element {
    map: u32,
    reserved: u32,
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

fn bpf<T>(command: libc::c_int, attribute: &mut T) -> io::Result<i64> {
    let size = u32::try_from(size_of::<T>()).expect("attributes are small");
    // SAFETY: `attribute` is a bpf_attr of `size` bytes for this command; the pointers in it outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(result: i64) -> OwnedFd {
    let fd = i32::try_from(result).expect("file descriptors fit");
    // SAFETY: the caller has it from a call that makes descriptors, and nowhere else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: i32) -> u32 {
    u32::try_from(fd).expect("file descriptors are not negative")
}

fn size(length: usize) -> u32 {
    u32::try_from(length).expect("what the kernel is given is small")
}

/// The types that functions and lines of a program are told in.
#[derive(Debug)]
pub(super) struct Types(OwnedFd);

pub(super) fn load_types(types: &[u8]) -> io::Result<Types> {
    const BTF_LOAD: libc::c_int = 18;
    let mut attribute = LoadTypes { types: types.as_ptr().addr() as u64, size: size(types.len()), ..LoadTypes::default() };
    bpf(BTF_LOAD, &mut attribute).map(|fd| Types(descriptor(fd)))
}

/// Writes the only value of a map and lets nobody change it: the verifier then takes what is in it for constants.
pub(super) fn set_constants(map: BorrowedFd<'_>, value: &[u8]) -> io::Result<()> {
    const MAP_UPDATE_ELEM: libc::c_int = 2;
    const MAP_FREEZE: libc::c_int = 22;
    let key = 0u32;
    let map = number(map.as_raw_fd());
    let mut attribute = Element { map, key: (&raw const key).addr() as u64, value: value.as_ptr().addr() as u64, ..Element::default() };
    bpf(MAP_UPDATE_ELEM, &mut attribute)?;
    // The rest of the attribute must be zero.
    bpf(MAP_FREEZE, &mut Element { map, ..Element::default() }).map(drop)
}

/// Gives a program a name in bpffs.
pub(super) fn pin(program: &Program, path: &Path) -> io::Result<()> {
    const OBJ_PIN: libc::c_int = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attribute = Pin { path: path.as_ptr().addr() as u64, object: number(program.0.as_raw_fd()), flags: 0 };
    bpf(OBJ_PIN, &mut attribute).map(drop)
}

/// A classifier of an object.
#[derive(Debug)]
pub(super) struct Verified<'a> {
    pub(super) name: &'a CStr,
    pub(super) license: &'a CStr,
    pub(super) instructions: &'a [bpf_insn],
    pub(super) types: &'a Types,
    /// Records, and the size of each.
    pub(super) functions: (&'a [u8], usize),
    /// The same.
    pub(super) lines: (&'a [u8], usize),
}

/// A classifier.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

const PROG_LOAD: libc::c_int = 5;
const SCHED_CLS: u32 = 3;

impl Program {
    pub(super) fn load(instructions: &[u64]) -> io::Result<Self> {
        let license = c"GPL";
        let mut attribute = Load {
            program_type: SCHED_CLS,
            instruction_count: size(instructions.len()),
            instructions: instructions.as_ptr().addr() as u64,
            license: license.as_ptr().addr() as u64,
            ..Load::default()
        };
        bpf(PROG_LOAD, &mut attribute).map(|fd| Self(descriptor(fd)))
    }

    /// Loads a classifier of an object. What the verifier says is written to `log`, if that has room.
    pub(super) fn verify(verified: &Verified<'_>, log: &mut [u8]) -> io::Result<Self> {
        let &Verified { name, license, instructions, types, functions: (functions, function_bytes), lines: (lines, line_bytes) } = verified;
        let mut attribute = Load {
            program_type: SCHED_CLS,
            instruction_count: size(instructions.len()),
            instructions: instructions.as_ptr().addr() as u64,
            license: license.as_ptr().addr() as u64,
            types: number(types.0.as_raw_fd()),
            function_bytes: size(function_bytes),
            functions: functions.as_ptr().addr() as u64,
            function_count: size(functions.len().checked_div(function_bytes).unwrap_or(0)),
            line_bytes: size(line_bytes),
            lines: lines.as_ptr().addr() as u64,
            line_count: size(lines.len().checked_div(line_bytes).unwrap_or(0)),
            ..Load::default()
        };
        let length = name.to_bytes().len().min(attribute.name.len() - 1);
        attribute.name[..length].copy_from_slice(&name.to_bytes()[..length]);
        if !log.is_empty() {
            (attribute.log_level, attribute.log_size, attribute.log_buffer) = (1, size(log.len()), log.as_mut_ptr().addr() as u64);
        }
        bpf(PROG_LOAD, &mut attribute).map(|fd| Self(descriptor(fd)))
    }

    /// Runs it on a frame, as if that were on an interface of this namespace (0: none); what it returned. The kernel wants a frame
    /// to have a whole Ethernet header and more.
    pub(super) fn run(&self, frame: &[u8], if_index: u32) -> io::Result<u32> {
        const PROG_TEST_RUN: libc::c_int = 10;
        /// Offset of `ifindex` in `__sk_buff`.
        const IF_INDEX: usize = 40;
        let mut context = [0u8; 192];
        context[IF_INDEX..IF_INDEX + 4].copy_from_slice(&if_index.to_ne_bytes());
        let mut attribute = TestRun {
            program: number(self.0.as_raw_fd()),
            data_size_in: size(frame.len()),
            data_in: frame.as_ptr().addr() as u64,
            repeat: 1,
            context_size_in: if if_index == 0 { 0 } else { 192 },
            context_in: if if_index == 0 { 0 } else { context.as_ptr().addr() as u64 },
            ..TestRun::default()
        };
        bpf(PROG_TEST_RUN, &mut attribute)?;
        Ok(attribute.return_value)
    }
}

/// Gives a host veth a frame as if its pod had sent it again.
#[derive(Debug)]
pub(super) struct Resender(Program);

impl Resender {
    pub(super) fn new() -> io::Result<Self> {
        const CLONE_REDIRECT: u64 = 13;
        const IF_INDEX: u64 = 40;
        const INGRESS: u64 = 1;
        Program::load(&[
            0x61 | 2 << 8 | 1 << 12 | IF_INDEX << 16, // r2 = *(u32 *)(r1 + IF_INDEX)
            0xb7 | 3 << 8 | INGRESS << 32,            // r3 = INGRESS
            0x85 | CLONE_REDIRECT << 32,              // call bpf_clone_redirect
            0x95,                                     // exit
        ])
        .map(Self)
    }

    pub(super) fn send(&self, frame: &[u8], if_index: u32) -> io::Result<()> {
        match self.0.run(frame, if_index)?.cast_signed() {
            // NET_RX_DROP is positive: the queue is full, as it may be for any packet.
            result if result >= 0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}
