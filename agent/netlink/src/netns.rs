//! Network namespaces: a path names one today and another tomorrow; device and inode number are the identity.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};

/// `NSFS_MAGIC` of `linux/magic.h`: what a namespace file lives on.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// An open network namespace; it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
}

/// Which namespace it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Of nsfs.
    pub device: u64,
    /// Unique while the namespace lives.
    pub inode: u64,
}

/// Why a namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The file cannot be opened.
    #[error("cannot open network namespace {path:?}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file, but no namespace: the sandbox is gone and its mount with it.
    #[error("{path:?} is no network namespace (any more)")]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// The thread could not move.
    #[error("cannot {op} the network namespace")]
    Enter {
        /// `enter` or `leave`.
        op: &'static str,
        /// Why.
        source: io::Error,
    },
}

// === impl Netns ===

impl Netns {
    /// Opens the namespace that `path` names now.
    ///
    /// # Errors
    /// [`NetnsError::Gone`] for a path that does not exist or is an ordinary file (a runtime's mount point after unmounting).
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NetnsError::Gone { path: path.to_owned() }),
            Err(source) => return Err(NetnsError::Open { path: path.to_owned(), source }),
        };
        let open = |source: io::Error| NetnsError::Open { path: path.to_owned(), source };
        let on = fstatfs(&file).map_err(|errno| open(errno.into()))?;
        if on.filesystem_type() != NSFS_MAGIC {
            return Err(NetnsError::Gone { path: path.to_owned() });
        }
        let metadata = file.metadata().map_err(open)?;
        Ok(Self { file, id: NetnsId { device: metadata.dev(), inode: metadata.ino() } })
    }

    /// The calling thread's namespace.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Its identity.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `f` with the calling thread in this namespace. Sockets that `f` opens stay in it.
    ///
    /// # Errors
    /// When the thread may not enter it.
    ///
    /// # Panics
    /// When the thread cannot return: everything after would happen in the wrong namespace.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let home = Self::current()?;
        if home.id == self.id {
            return Ok(f());
        }
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter { op: "enter", source: errno.into() })?;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        setns(&home.file, CloneFlags::CLONE_NEWNET).expect("returning to a namespace that this thread holds open must not fail");
        Ok(result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// Moves the calling thread for good.
    ///
    /// # Errors
    /// When the thread may not enter it.
    pub fn enter(&self) -> Result<(), NetnsError> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter { op: "enter", source: errno.into() })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
