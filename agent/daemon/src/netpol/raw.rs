//! Programs of a few instructions, loaded and run by hand.

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

/// A classifier.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl Program {
    pub(super) fn load(instructions: &[u64]) -> io::Result<Self> {
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
        let fd = i32::try_from(fd).expect("file descriptors fit");
        // SAFETY: the call gave us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
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
            program: u32::try_from(self.0.as_raw_fd()).expect("file descriptors are not negative"),
            data_size_in: u32::try_from(frame.len()).expect("frames are small"),
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
