//! Repairs the host network when somebody else changed it: a rule deleted by hand, a firewall reload, a network manager.

use std::time::Duration;

use stanchion_core::network::{HostError, HostReport, NetOp};
use stanchion_netlink::{HostNet, NetlinkError, monitor};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The kernel does not tell of every sysctl, and a message may be lost: everything is looked at this often.
const PERIOD: Duration = Duration::from_secs(15);
/// At most one look in this time, however much is going on: it costs some milliseconds.
const PAUSE: Duration = Duration::from_secs(1);

/// Watches the calling thread's network namespace until `shutdown` and applies the last plan again whenever it changed; `healed` hears
/// the [subject](NetOp::subject) of everything that was mended.
///
/// The pods' own coming and going is a change too, which costs a look and nothing else.
///
/// # Errors
/// When the kernel's messages cannot be subscribed to.
pub fn spawn(
    host: HostNet,
    mut healed: impl FnMut(&'static str) + Send + 'static,
    shutdown: CancellationToken,
) -> Result<JoinHandle<()>, NetlinkError> {
    let (mut changes, _monitor) = monitor::spawn()?;
    Ok(tokio::spawn(async move {
        let (mut earliest, mut is_told) = (Instant::now(), true);
        loop {
            tokio::select! {
                // Whom nobody tells looks by the clock.
                changed = changes.changed(), if is_told => is_told = changed.is_ok(),
                () = tokio::time::sleep(PERIOD) => {}
                () = shutdown.cancelled() => return,
            }
            tokio::time::sleep_until(earliest).await;
            changes.mark_unchanged();
            match host.reapply().await {
                Ok(Some(report)) => {
                    tell(&report);
                    report.applied.iter().for_each(|op| healed(op.subject()));
                }
                // Nothing was applied yet.
                Ok(None) => {}
                Err(HostError::Closed) => return,
                Err(error) => warn!(%error, "the host network cannot be checked"),
            }
            earliest = Instant::now() + PAUSE;
        }
    }))
}

fn tell(report: &HostReport) {
    for op in &report.applied {
        match op {
            NetOp::Nft { .. } => warn!("healed: the nft table was changed by somebody else"),
            NetOp::Legacy { .. } => warn!("removed aws-node's rules from iptables-legacy"),
            op => warn!(?op, "healed: the host network was not as planned; somebody changed it, or an interface has just come"),
        }
    }
    for failed in &report.failed {
        warn!(op = ?failed.op, error = failed.error, "the host network cannot be healed");
    }
}
