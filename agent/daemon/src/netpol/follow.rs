//! Who listens to flow records. The programs tell only what somebody listens to.

use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use super::handle::{FlowRecord, FlowVerdict};

/// How many listen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Listeners {
    /// To denied packets; that is everyone.
    pub(super) all: usize,
    /// To flows that open as well.
    pub(super) allowed: usize,
}

/// Flow records from the moment this was made. While none of these lives, no event costs a packet anything.
#[derive(Debug)]
pub struct FlowRecords {
    records: broadcast::Receiver<Arc<FlowRecord>>,
    allowed: bool,
    listeners: Arc<watch::Sender<Listeners>>,
}

impl FlowRecords {
    pub(super) fn new(records: &broadcast::Sender<Arc<FlowRecord>>, listeners: &Arc<watch::Sender<Listeners>>, allowed: bool) -> Self {
        listeners.send_modify(|count| {
            count.all += 1;
            count.allowed += usize::from(allowed);
        });
        Self { records: records.subscribe(), allowed, listeners: Arc::clone(listeners) }
    }

    /// The next record: denied and audited packets, and flows that opened if they were asked for.
    ///
    /// # Errors
    /// Records were lost because this reader is slow, with their number; or the agent ends.
    pub async fn recv(&mut self) -> Result<Arc<FlowRecord>, RecvError> {
        loop {
            let record = self.records.recv().await?;
            // Told because someone else listens to them.
            if self.allowed || record.verdict != FlowVerdict::Allowed {
                return Ok(record);
            }
        }
    }
}

impl Drop for FlowRecords {
    fn drop(&mut self) {
        self.listeners.send_modify(|count| {
            count.all -= 1;
            count.allowed -= usize::from(self.allowed);
        });
    }
}
