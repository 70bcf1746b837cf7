//! Addresses of the pods' second family: reserved on the node, a file each, in the directories and the form of aws-node's egress plugin.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use stanchion_core::cni::config::ValidAttachment;
use stanchion_core::cni::{CniError, ErrorCode};
use stanchion_core::network::egress::{EgressFamily, candidates, is_reserved_for, reservation};

/// The address that was given last, so that a released one rests as long as possible.
const LAST: &str = "last_reserved_ip.0";

fn directory(family: EgressFamily, network: &str) -> PathBuf {
    Path::new(family.reservations()).join(network)
}

/// Reserves an address for the sandbox; again, the same.
pub(crate) fn reserve(family: EgressFamily, network: &str, container_id: &str) -> Result<IpAddr, CniError> {
    let directory = directory(family, network);
    let failed = |error: io::Error| {
        let directory = directory.display();
        CniError::new(ErrorCode::Io, format!("cannot reserve an address for {} in {directory}: {error}", family.pod_if()))
    };
    fs::create_dir_all(&directory).map_err(failed)?;
    if let Some((address, _)) =
        reservations(&directory).map_err(failed)?.into_iter().find(|(_, text)| is_reserved_for(text, container_id, family.pod_if()))
    {
        return Ok(address);
    }
    let last = fs::read_to_string(directory.join(LAST)).ok().and_then(|text| text.trim().parse().ok());
    for address in candidates(family.range(), last) {
        // Complete or not there: a plugin may be killed between creating and writing.
        match OpenOptions::new().write(true).create_new(true).open(directory.join(address.to_string())) {
            Ok(mut file) => {
                file.write_all(reservation(container_id, family.pod_if()).as_bytes()).map_err(failed)?;
                // Only a hint.
                let _ = fs::write(directory.join(LAST), address.to_string());
                return Ok(address);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let text = format!(
        "all addresses of {} are reserved in {}: do files of pods that are gone remain there?",
        family.range(),
        directory.display()
    );
    Err(CniError::new(ErrorCode::TryAgain, text))
}

/// Releases what the sandbox holds in either family; having nothing is success.
pub(crate) fn release(network: &str, container_id: &str) -> Result<(), CniError> {
    release_where(network, |family, text| is_reserved_for(text, container_id, family.pod_if()))
}

/// Releases what none of the living holds.
pub(crate) fn collect(network: &str, valid: &[ValidAttachment]) -> Result<(), CniError> {
    let lives =
        |family: EgressFamily, text: &str| valid.iter().any(|attachment| is_reserved_for(text, &attachment.container_id, family.pod_if()));
    // One without content is being written.
    release_where(network, |family, text| !text.is_empty() && !lives(family, text))
}

fn release_where(network: &str, goes: impl Fn(EgressFamily, &str) -> bool) -> Result<(), CniError> {
    for family in EgressFamily::ALL {
        let directory = directory(family, network);
        let failed = |error: io::Error| CniError::new(ErrorCode::Io, format!("cannot release in {}: {error}", directory.display()));
        for (address, text) in reservations(&directory).map_err(failed)? {
            if goes(family, &text) {
                match fs::remove_file(directory.join(address.to_string())) {
                    Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// The addresses that are reserved, and for whom.
fn reservations(directory: &Path) -> io::Result<Vec<(IpAddr, String)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Some(address) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match fs::read_to_string(entry.path()) {
            Ok(text) => found.push((address, text)),
            // Released meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
