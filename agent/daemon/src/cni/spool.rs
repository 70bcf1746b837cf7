//! Delivers the releases that the plugin left while the agent was away.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use stanchion_core::cni::Spooled;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::convert::key;
use crate::ipamd::IpamHandle;
use crate::netpol::NetpolHandle;

/// A release is left only while the agent does not answer; looking for one costs one `readdir` of an empty directory.
const PERIOD: Duration = Duration::from_secs(5);

/// Empties the spool now and then until `shutdown`. What cannot be delivered stays for the next round.
pub fn spawn(directory: PathBuf, ipam: IpamHandle, netpol: Option<NetpolHandle>, shutdown: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while tokio::select! { _ = ticks.tick() => true, () = shutdown.cancelled() => false } {
            match drain(&directory, &ipam, netpol.as_ref()).await {
                Ok(0) => {}
                Ok(delivered) => info!(delivered, "spooled releases"),
                Err(error) => warn!(directory = %directory.display(), %error, "cannot read the spool"),
            }
        }
    })
}

/// One round; returns how many were delivered.
///
/// # Errors
/// When the directory exists and cannot be read.
pub async fn drain(directory: &Path, ipam: &IpamHandle, netpol: Option<&NetpolHandle>) -> io::Result<u32> {
    let mut entries = match tokio::fs::read_dir(directory).await {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut delivered = 0;
    while let Some(entry) = entries.next_entry().await? {
        if !entry.file_name().to_str().is_some_and(Spooled::is_file_name) {
            continue;
        }
        let path = entry.path();
        let spooled = match tokio::fs::read(&path).await.map(|text| Spooled::parse(&text)) {
            Ok(Ok(spooled)) => spooled,
            Ok(Err(error)) => {
                // Kept for a person; the address is found by garbage collection.
                warn!(path = %path.display(), error = &error as &dyn std::error::Error, "a spooled release cannot be read");
                continue;
            }
            // Another drain was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let key = key(spooled.network_name, &spooled.container_id, spooled.if_name);
        if let Some(netpol) = netpol {
            netpol.deactivate(key.container_id.clone()).await;
        }
        match ipam.release(key, &spooled.reason).await {
            Ok(_) => {
                tokio::fs::remove_file(&path).await?;
                delivered += 1;
            }
            // Starting, or the disk is full: next time.
            Err(_) => break,
        }
    }
    Ok(delivered)
}
