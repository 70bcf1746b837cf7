//! The eBPF object: embedded, loaded once, its maps and programs pinned so that they outlive the agent. An agent with the same
//! object takes what is pinned: the kernel verifies an object once a boot.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, MapError, MapInfo};
use aya::pin::PinError;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{EbpfError, include_bytes_aligned};
use stanchion_ebpf_abi::{self as abi, LAYOUT_VERSION, map_name};
use stanchion_netlink::{Netlink, NetlinkError};

use super::clock::Clock;
use super::verify::verify;

/// Empty when it had not been built; see the build script.
pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/stanchion-ebpf.o"));

/// Where bpffs is expected, and mounted if it is not.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The pins' directory of an agent that is alone on its kernel.
pub const PIN_ROOT: &str = "/sys/fs/bpf/stanchion";

/// Every map that is pinned: all of them.
pub(super) const PINNED: [&str; 19] = [
    map_name::INTERFACES,
    map_name::INTERFACES_FAR,
    map_name::ENDPOINTS,
    map_name::OWN,
    map_name::ADDRESSES,
    map_name::CIDRS4,
    map_name::CIDRS6,
    map_name::VERDICTS,
    map_name::FLOWS4,
    map_name::FLOWS6,
    map_name::FLOWS_INSERTED,
    map_name::FLOWS_REMOVED,
    map_name::FRAGMENTS,
    map_name::COUNTERS,
    map_name::STATS,
    map_name::GENERATION,
    map_name::CONFIG,
    map_name::EVENTS,
    map_name::NAMES,
];

/// The bytes of an ABI type, as aya wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Raw<T: abi::MapData>(pub(super) T);

// SAFETY: the contract of `MapData` is that of `Pod`.
unsafe impl<T: abi::MapData> aya::Pod for Raw<T> {}

/// Root is refused a directory of the BPF file system by a security module only.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            " (a container needs an AppArmor profile that lets it write below /sys/fs/bpf, such as Unconfined, \
             and with SELinux a type such as super_t)"
        }
        _ => "",
    }
}

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Directory below a bpffs; the layout's version is appended. Several agents on one kernel use different ones.
    pub pin_root: PathBuf,
    /// Entries of each flow table. An existing pin keeps its size.
    pub flow_entries: u32,
}

/// Why the object is not in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// This binary was built without it.
    #[error("this binary was built without the eBPF object: run `cargo xtask setup`, then `cargo xtask build-ebpf`, and build again")]
    NotBuilt,
    /// No bpffs, and none could be mounted.
    #[error("cannot mount a BPF file system at {path}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The pins' directory.
    #[error("cannot create {path}{}", remedy(.source))]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not even three instructions.
    #[error("cannot load a BPF program (CAP_BPF or CAP_SYS_ADMIN, and Linux 5.10, are needed)")]
    Clock(#[source] io::Error),
    /// The kernel or the loader refused the object.
    #[error("cannot load the eBPF object")]
    Object(#[from] EbpfError),
    /// The kernel does not take the object's description of its functions.
    #[error("cannot load the types of the eBPF object")]
    Types(#[source] io::Error),
    /// The verifier refused a program.
    #[error("cannot load program {name}")]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// A program cannot be pinned.
    #[error("cannot pin program {name}")]
    Pin {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: PinError,
    },
    /// The ring of DNS answers cannot be waited for.
    #[error("cannot wait for DNS answers")]
    Poll(#[source] io::Error),
    /// A map of the object is missing or has another type.
    #[error("map {name}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
}

/// The loaded object.
#[derive(Debug)]
pub struct Loaded {
    /// The maps that nobody has taken yet.
    maps: HashMap<&'static str, Map>,
    programs: [(&'static str, SchedClassifier); 2],
    /// The versioned pin directory.
    pub(super) pins: PathBuf,
    /// The flow table's clock.
    pub(super) clock: Clock,
    /// What attaches programs to interfaces.
    netlink: Option<Netlink>,
}

impl Loaded {
    /// A socket for the calling thread's namespace; the same one every time.
    pub(super) fn netlink(&mut self) -> Result<&mut Netlink, NetlinkError> {
        if self.netlink.is_none() {
            self.netlink = Some(Netlink::open()?);
        }
        Ok(self.netlink.as_mut().expect("just opened"))
    }

    /// Takes a map out of the object.
    pub(super) fn map<T: TryFrom<Map, Error = MapError>>(&mut self, name: &'static str) -> Result<T, LoadError> {
        let missing = || LoadError::Map { name, source: MapError::InvalidName { name: name.to_owned() } };
        let map = self.maps.remove(name).ok_or_else(missing)?;
        T::try_from(map).map_err(|source| LoadError::Map { name, source })
    }

    /// Room of each flow table: what was asked for when it was made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flow_capacity(&self) -> Result<u32, LoadError> {
        let name = map_name::FLOWS4;
        let info = MapInfo::from_pin(self.pins.join(name));
        info.map(|info| info.max_entries()).map_err(|source| LoadError::Map { name, source })
    }

    /// A descriptor of a hash map or ring of the object, before it is taken out.
    pub(super) fn map_fd(&self, name: &'static str) -> Result<OwnedFd, LoadError> {
        let failed = |source| LoadError::Map { name, source };
        let Some(Map::HashMap(map) | Map::RingBuf(map)) = self.maps.get(name) else {
            return Err(failed(MapError::InvalidName { name: name.to_owned() }));
        };
        map.fd().as_fd().try_clone_to_owned().map_err(|source| failed(MapError::IoError(source)))
    }

    /// The pin directories of other layouts, older or newer.
    pub(super) fn others(&self) -> io::Result<Vec<PathBuf>> {
        let root = self.pins.parent().unwrap_or(&self.pins);
        let mut others = Vec::new();
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_layout = name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
            if is_layout && path != self.pins {
                others.push(path);
            }
        }
        Ok(others)
    }

    /// A program by its name in the object.
    pub fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, LoadError> {
        let unknown = || EbpfError::MapError(MapError::InvalidName { name: name.to_owned() });
        let found = self.programs.iter_mut().find(|(known, _)| *known == name);
        Ok(found.map(|(_, program)| program).ok_or_else(unknown)?)
    }
}

/// tc ingress of the host veth.
pub const POD_EGRESS: &str = "pod_egress";
/// tc egress of the host veth.
pub const POD_INGRESS: &str = "pod_ingress";

/// The object in the kernel: mounts bpffs if need be, and takes the pinned maps and programs of an earlier agent with the same
/// object. Of another object only the maps are taken; its programs stay where they are attached until they are replaced.
/// Attaches nothing.
///
/// # Errors
/// See [`LoadError`].
pub fn load(options: &LoadOptions) -> Result<Loaded, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NotBuilt);
    }
    ensure_bpffs(&options.pin_root)?;
    let pins = options.pin_root.join(format!("v{LAYOUT_VERSION}"));
    fs::create_dir_all(pins.join("links")).map_err(|source| LoadError::Directory { path: pins.clone(), source })?;
    let clock = Clock::new().map_err(LoadError::Clock)?;
    let programs = pins.join("programs");
    let home = programs.join(object_hash(clock.shift()));
    if !are_whole(&pins, &home) {
        let failed = |path: &Path, source| LoadError::Directory { path: path.to_owned(), source };
        if programs.exists() {
            fs::remove_dir_all(&programs).map_err(|source| failed(&programs, source))?;
        }
        fs::create_dir_all(&home).map_err(|source| failed(&home, source))?;
        verify(OBJECT, options, &pins, &home, clock.shift())?;
    }
    let program = |name| {
        let program = SchedClassifier::from_pin(home.join(name)).map_err(|source| LoadError::Program { name, source })?;
        Ok::<_, LoadError>((name, program))
    };
    let programs = [program(POD_EGRESS)?, program(POD_INGRESS)?];
    let mut maps = HashMap::with_capacity(PINNED.len());
    for name in PINNED {
        let map = MapData::from_pin(pins.join(name)).and_then(Map::from_map_data);
        maps.insert(name, map.map_err(|source| LoadError::Map { name, source })?);
    }
    Ok(Loaded { maps, programs, pins, clock, netlink: None })
}

/// Tells objects and their constants apart. That another build of the agent may hash differently costs one verification.
fn object_hash(tick_shift: u32) -> String {
    let mut hasher = DefaultHasher::new();
    (OBJECT, tick_shift).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Whether both programs are pinned in `home`, and work on the maps that are pinned in `pins` and on no others.
fn are_whole(pins: &Path, home: &Path) -> bool {
    let mut used = HashSet::new();
    for name in [POD_EGRESS, POD_INGRESS] {
        let info = SchedClassifier::from_pin(home.join(name)).and_then(|program| program.info());
        let Ok(Some(maps)) = info.and_then(|info| info.map_ids()) else { return false };
        used.extend(maps);
    }
    PINNED.iter().all(|name| MapInfo::from_pin(pins.join(name)).is_ok_and(|map| used.contains(&map.id())))
}

/// Mounts bpffs where the pins are to be, if that is below [`BPFFS`] and nothing is mounted there.
///
/// # Errors
/// It cannot be mounted: the process is not root of the machine.
pub fn ensure_bpffs(pin_root: &Path) -> Result<(), LoadError> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    if !pin_root.starts_with(BPFFS) {
        return Ok(());
    }
    let path = PathBuf::from(BPFFS);
    if fs::create_dir_all(&path).is_ok() && nix::sys::statfs::statfs(BPFFS).is_ok_and(|s| s.filesystem_type().0 == BPF_FS_MAGIC) {
        return Ok(());
    }
    let target = CString::new(BPFFS).expect("no NUL in a constant");
    nix::mount::mount(Some(c"bpf"), target.as_c_str(), Some(c"bpf"), nix::mount::MsFlags::empty(), None::<&std::ffi::CStr>)
        .map_err(|errno| LoadError::Mount { path, source: errno.into() })
}
