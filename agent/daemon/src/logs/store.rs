//! The positions file on disk: written beside, synced, renamed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use stanchion_core::logs::positions::Positions;
use tracing::warn;

use super::tail::Restored;

/// Reads the positions that were saved on this node.
pub(super) fn load(path: &Path, node: &str) -> Restored {
    match std::fs::read(path) {
        Ok(text) => match Positions::parse(&text, node) {
            Ok(positions) => Restored::Positions(positions),
            Err(error) => {
                warn!(path = %path.display(), %error, "positions cannot be used; every log file is read from its beginning");
                Restored::Unusable
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Restored::Fresh,
        Err(error) => {
            warn!(path = %path.display(), %error, "positions cannot be read; every log file is read from its beginning");
            Restored::Unusable
        }
    }
}

/// Replaces the file, so that a crash leaves the old or the new one.
pub(super) fn save(path: &Path, positions: &Positions) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(&positions.to_json())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}
