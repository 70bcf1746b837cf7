//! Where the actor's files are: in memory, beside the checkpoint, as what they explain dies with the kernel's maps.

use std::fs;
use std::io;
use std::path::Path;

/// Which sandbox holds which slot.
pub(super) const ENDPOINTS: &str = "endpoints.json";
/// Which names the addresses of rules by name stand for.
pub(super) const NAMES: &str = "names.json";

/// Takes over the files of an agent that kept them on the disk, in `former`; those that are in `now` already are newer.
///
/// # Errors
/// A file could not be copied or removed; nothing is lost then, and the next start tries again.
pub fn take_files(former: &Path, now: &Path) -> io::Result<()> {
    if former == now {
        return Ok(());
    }
    for name in [ENDPOINTS, NAMES] {
        let (old, new) = (former.join(name), now.join(name));
        if !old.try_exists()? {
            continue;
        }
        if !new.try_exists()? {
            fs::create_dir_all(now)?;
            // The directories are of two file systems.
            let fresh = new.with_extension("json.new");
            fs::copy(&old, &fresh)?;
            fs::rename(&fresh, &new)?;
        }
        fs::remove_file(&old)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_former_place_move_once_and_never_over_newer_ones() {
        let (former, now) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let place = now.path().join("aws-node");
        take_files(former.path(), &place).unwrap();
        assert!(!place.exists(), "nothing was there");
        fs::write(former.path().join(ENDPOINTS), "old").unwrap();
        fs::write(former.path().join(NAMES), "names").unwrap();
        take_files(former.path(), &place).unwrap();
        let read = |name| fs::read_to_string(place.join(name)).unwrap();
        assert_eq!((read(ENDPOINTS), read(NAMES)), ("old".to_owned(), "names".to_owned()));
        fs::write(place.join(ENDPOINTS), "new").unwrap();
        fs::write(former.path().join(ENDPOINTS), "of an agent that was there in between").unwrap();
        take_files(former.path(), &place).unwrap();
        assert_eq!(read(ENDPOINTS), "new");
        assert_eq!(fs::read_dir(former.path()).unwrap().count(), 0);
        take_files(&place, &place).unwrap();
        assert_eq!(read(ENDPOINTS), "new", "the same place");
    }
}
