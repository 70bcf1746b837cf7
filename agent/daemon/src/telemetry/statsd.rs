//! Listens for statsd packets and tells them at each tick.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stanchion_core::cloud::LogEvent;
use stanchion_core::metrics::statsd::Statsd;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::wall_ms;

/// The largest UDP packet.
const MAX_PACKET: usize = 65_535;
const BIND_AGAIN: Duration = Duration::from_secs(10);

/// What became of packets, since the start.
#[derive(Debug, Default)]
pub struct StatsdCounters {
    /// Packets read.
    pub packets: AtomicU64,
    /// Lines that could not be read.
    pub malformed: AtomicU64,
    /// Values left out for want of room.
    pub dropped: AtomicU64,
}

/// What the task needs.
pub(super) struct Listener {
    pub(super) address: SocketAddr,
    pub(super) node: String,
    pub(super) cluster_name: String,
    pub(super) interval: Duration,
    pub(super) documents: mpsc::Sender<Vec<LogEvent>>,
    pub(super) counters: Arc<StatsdCounters>,
    pub(super) shutdown: CancellationToken,
}

impl Listener {
    /// Listens until the shutdown; what came since the last tick is told then.
    pub(super) async fn run(self) {
        let Some(socket) = self.bind().await else { return };
        let mut statsd = Statsd::default();
        let mut buffer = vec![0; MAX_PACKET];
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + self.interval, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                received = socket.recv(&mut buffer) => match received {
                    Ok(length) => {
                        self.counters.packets.fetch_add(1, Ordering::Relaxed);
                        statsd.packet(&buffer[..length]);
                    }
                    // An ICMP answer to somebody else's packet; nothing is lost.
                    Err(error) => warn!(%error, "statsd socket"),
                },
                _ = ticks.tick() => self.tell(&mut statsd),
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    fn tell(&self, statsd: &mut Statsd) {
        let wall_ms = wall_ms();
        let documents = statsd.documents(wall_ms, &[("ClusterName", &self.cluster_name), ("NodeName", &self.node)]);
        self.counters.malformed.store(statsd.malformed, Ordering::Relaxed);
        self.counters.dropped.store(statsd.dropped, Ordering::Relaxed);
        let events: Vec<_> = documents.into_iter().map(|message| LogEvent { timestamp_ms: wall_ms, message }).collect();
        if !events.is_empty() && self.documents.try_send(events).is_err() {
            warn!("statsd documents dropped: the shipping task does not take them");
        }
    }

    /// The port may still be held by the agent that this one replaces.
    async fn bind(&self) -> Option<UdpSocket> {
        loop {
            match UdpSocket::bind(self.address).await {
                Ok(socket) => {
                    info!(address = %self.address, "statsd listens");
                    return Some(socket);
                }
                Err(error) => warn!(address = %self.address, %error, "statsd cannot listen; tried again"),
            }
            tokio::select! {
                () = tokio::time::sleep(BIND_AGAIN) => {}
                () = self.shutdown.cancelled() => return None,
            }
        }
    }
}
