//! A file system of one mebibyte that can be filled.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A tmpfs over a directory; dropping it unmounts it, and the directory has its old contents again.
#[derive(Debug)]
pub(super) struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts it with the files that are in the directory now.
    pub(super) fn over(dir: &Path) -> anyhow::Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_file() {
                files.push((fs::read(&path)?, path));
            }
        }
        mount(Some("none"), dir, Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=0700"))
            .with_context(|| format!("mount a tmpfs on {}", dir.display()))?;
        let disk = Self { dir: dir.to_owned() };
        for (bytes, path) in files {
            fs::write(path, bytes)?;
        }
        Ok(disk)
    }

    /// Takes every free byte.
    pub(super) fn fill(&self) -> anyhow::Result<()> {
        let mut file = fs::File::create(self.ballast())?;
        loop {
            match file.write(&[0; 4096]) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives them back.
    pub(super) fn empty(&self) -> anyhow::Result<()> {
        match fs::remove_file(self.ballast()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.dir, MntFlags::MNT_DETACH) {
            eprintln!("lab: cannot unmount {}: {error}", self.dir.display());
        }
    }
}
