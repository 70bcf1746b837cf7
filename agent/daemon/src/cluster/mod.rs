//! Where the cluster's state comes from, and who hears of it.
//!
//! One task owns the source and publishes snapshots on a watch channel: readers see the latest, never a queue.

pub mod api_server;
pub mod credentials;
mod follow;
mod limits;
mod manifests;
pub mod own_node;
mod slim;
pub mod tell;
pub mod write;

use std::sync::Arc;

use stanchion_core::cluster::ClusterState;
use tokio::sync::watch;

pub use manifests::{ManifestsDir, SourceError, read_once};

/// Readers' end of the cluster's state.
#[derive(Clone, Debug)]
pub struct ClusterHandle {
    state: watch::Receiver<Arc<ClusterState>>,
    // Keeps a fixed state's channel open.
    _fixed: Option<Arc<watch::Sender<Arc<ClusterState>>>>,
}

impl ClusterHandle {
    /// The latest state and notice of later ones.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    /// The latest state.
    pub fn latest(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// A state that never changes: tests, offline commands.
    pub fn fixed(state: ClusterState) -> Self {
        let (sender, receiver) = watch::channel(Arc::new(state));
        Self { state: receiver, _fixed: Some(Arc::new(sender)) }
    }

    /// A state that the caller changes.
    pub fn channel(state: ClusterState) -> (watch::Sender<Arc<ClusterState>>, Self) {
        let (sender, receiver) = watch::channel(Arc::new(state));
        (sender, Self { state: receiver, _fixed: None })
    }
}
