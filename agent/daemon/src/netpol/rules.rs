//! The policy engine as the actor uses it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::policy::image::{EndpointImage, MapImage, MapOp, Slot};

/// Endpoints without policies: every pod is open.
pub(super) struct Rules {
    image: MapImage,
}

impl Rules {
    pub(super) fn new(_node: &str, kernel: MapImage) -> Self {
        Self { image: kernel }
    }

    pub(super) fn set_cluster(&mut self, _cluster: &ClusterState) -> Vec<MapOp> {
        Vec::new()
    }

    pub(super) fn set_node_addresses(&mut self, wanted: &BTreeSet<IpAddr>) -> Vec<MapOp> {
        let present: BTreeSet<IpAddr> = self.image.node_addresses.iter().copied().collect();
        let ops = wanted.difference(&present).map(|address| MapOp::SetNodeAddress(*address));
        let ops = ops.chain(present.difference(wanted).map(|address| MapOp::RemoveNodeAddress(*address))).collect();
        self.image.node_addresses = wanted.iter().copied().collect();
        ops
    }

    pub(super) fn add_endpoint(&mut self, slot: Slot, _pod: &PodName, _uid: &str, addresses: Vec<IpAddr>) -> Vec<MapOp> {
        let revision = self.image.endpoints.get(&slot).map_or(1, |present| present.revision);
        let endpoint = EndpointImage { addresses, revision, ..EndpointImage::default() };
        if self.image.endpoints.get(&slot) == Some(&endpoint) {
            return Vec::new();
        }
        self.image.endpoints.insert(slot, endpoint.clone());
        vec![MapOp::SetEndpoint(slot, endpoint)]
    }

    pub(super) fn remove_endpoint(&mut self, slot: Slot) -> Vec<MapOp> {
        self.image.endpoints.remove(&slot).map(|_| MapOp::RemoveEndpoint(slot)).into_iter().collect()
    }

    pub(super) fn endpoint(&self, slot: Slot) -> Option<&EndpointImage> {
        self.image.endpoints.get(&slot)
    }

    /// The policy and the rule behind a rule id.
    pub(super) fn names(&self, _rule: u32) -> (String, String) {
        (String::new(), String::new())
    }
}
