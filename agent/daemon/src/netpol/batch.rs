//! Whole hash maps in few system calls (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _};

use stanchion_ebpf_abi::MapData;

/// Entries a call asks for.
const CHUNK: usize = 4_096;

/// `bpf_attr` of BPF_MAP_LOOKUP_BATCH.
#[repr(C)]
struct Attribute {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Calls `each` with every entry. Entries that come or go meanwhile may be missed, none is given twice but one that was removed
/// and added.
///
/// # Errors
/// The kernel's; `EINVAL` or `ENOTSUPP` (524) where it has no such call for the map.
pub(super) fn for_each<K: MapData, V: MapData>(map: impl AsFd, mut each: impl FnMut(K, V)) -> io::Result<()> {
    const LOOKUP_BATCH: libc::c_int = 24;
    let mut size = CHUNK;
    let (mut place, mut next) = (0u32, 0u32);
    let mut is_first = true;
    let mut keys: Vec<MaybeUninit<K>> = Vec::new();
    let mut values: Vec<MaybeUninit<V>> = Vec::new();
    loop {
        keys.resize_with(size, MaybeUninit::uninit);
        values.resize_with(size, MaybeUninit::uninit);
        let mut attribute = Attribute {
            in_batch: if is_first { 0 } else { std::ptr::from_mut(&mut place).addr() as u64 },
            out_batch: std::ptr::from_mut(&mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: u32::try_from(size).expect("a chunk is small"),
            map: u32::try_from(map.as_fd().as_raw_fd()).expect("descriptors are not negative"),
            element_flags: 0,
            flags: 0,
        };
        let length = u32::try_from(size_of::<Attribute>()).expect("small");
        // SAFETY: a bpf_attr of `length` bytes whose pointers are to buffers of `count` entries that outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, std::ptr::from_mut(&mut attribute), length) };
        let error = (result < 0).then(io::Error::last_os_error);
        let ended = match &error {
            None => false,
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket has more entries than were asked for.
            Some(error) if error.raw_os_error() == Some(libc::ENOSPC) && size < CHUNK << 8 => {
                size *= 2;
                continue;
            }
            Some(_) => return Err(error.expect("just matched")),
        };
        let count = usize::try_from(attribute.count).expect("fits").min(size);
        for (key, value) in keys[..count].iter().zip(&values[..count]) {
            // SAFETY: the kernel wrote the first `count` of both; every bit pattern is a value.
            each(unsafe { key.assume_init() }, unsafe { value.assume_init() });
        }
        if ended {
            return Ok(());
        }
        (place, is_first) = (next, false);
    }
}
