//! A model of the kernel's policy maps, and what the eBPF program reads from them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use stanchion_ebpf_abi::{IDENTITY_UNKNOWN, PROTOCOL_ANY, VERDICT_PREFIX_ANY, VERDICT_PREFIX_PROTOCOL, VerdictKey, VerdictValue, verdict};

use super::image::{MapError, MapImage, MapOp, PolicyMaps, Slot};
use super::model::Direction;

/// Policy maps in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelMaps {
    /// What they hold.
    pub image: MapImage,
}

impl PolicyMaps for ModelMaps {
    fn apply(&mut self, ops: &[MapOp]) -> Result<(), (usize, MapError)> {
        for op in ops {
            self.image.apply(op);
        }
        Ok(())
    }

    fn read(&self) -> Result<MapImage, MapError> {
        Ok(self.image.clone())
    }
}

impl MapImage {
    /// What the maps hold after the operation.
    pub fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::SetAddress(address, identity) => drop(self.addresses.insert(*address, *identity)),
            MapOp::RemoveAddress(address) => drop(self.addresses.remove(address)),
            MapOp::SetCidr(net, identity) => drop(self.cidrs.insert(*net, *identity)),
            MapOp::RemoveCidr(net) => drop(self.cidrs.remove(net)),
            MapOp::SetVerdict(key, length, value) => drop(self.verdicts.insert((*key, *length), *value)),
            MapOp::RemoveVerdict(key, length) => drop(self.verdicts.remove(&(*key, *length))),
            MapOp::SetEndpoint(slot, endpoint) => drop(self.endpoints.insert(*slot, endpoint.clone())),
            MapOp::RemoveEndpoint(slot) => drop(self.endpoints.remove(slot)),
            MapOp::SetNodeAddress(address) => {
                if !self.node_addresses.contains(address) {
                    self.node_addresses.push(*address);
                    self.node_addresses.sort_unstable();
                }
            }
            MapOp::RemoveNodeAddress(address) => self.node_addresses.retain(|present| present != address),
        }
    }

    /// The identity of an address: the exact entry, else the longest prefix, else [`IDENTITY_UNKNOWN`].
    pub fn identity(&self, address: IpAddr) -> u32 {
        self.addresses.get(&address).copied().unwrap_or_else(|| longest_match(&self.cidrs, address))
    }
}

/// The value of the longest prefix that holds the address, else [`IDENTITY_UNKNOWN`].
pub fn longest_match(cidrs: &BTreeMap<IpNet, u32>, address: IpAddr) -> u32 {
    let width = if address.is_ipv4() { 32 } else { 128 };
    (0..=width)
        .rev()
        .filter_map(|length| IpNet::new(address, length).ok())
        .find_map(|net| cidrs.get(&net.trunc()).copied())
        .unwrap_or(IDENTITY_UNKNOWN)
}

/// The verdict of a new flow's first packet for one pod and direction, just as the eBPF program finds it. `None`: no
/// rule was asked (unknown slot, not isolated, own node, own address), the packet passes.
pub fn image_verdict(image: &MapImage, slot: Slot, direction: Direction, peer: IpAddr, protocol: u8, port: u16) -> Option<VerdictValue> {
    let endpoint = image.endpoints.get(&slot)?;
    if image.node_addresses.contains(&peer) || endpoint.addresses.contains(&peer) {
        return None;
    }
    let policy = match direction {
        Direction::Ingress => endpoint.ingress?,
        Direction::Egress => endpoint.egress?,
    };
    let identity = image.identity(peer);
    let specific = look_up(image, policy, identity, direction, protocol, port);
    let found = specific.or_else(|| look_up(image, policy, IDENTITY_UNKNOWN, direction, protocol, port));
    Some(found.unwrap_or(VerdictValue { rule: 0, verdict: verdict::DENY, reserved: [0; 3] }))
}

/// Whether the packet passes. Audit lifts isolation; a rule that denies is a cluster policy's, and denies all the same.
pub fn image_allows(image: &MapImage, slot: Slot, direction: Direction, peer: IpAddr, protocol: u8, port: u16) -> bool {
    let is_audited = image.endpoints.get(&slot).is_some_and(|endpoint| endpoint.audit);
    let passes = |value: VerdictValue| value.verdict == verdict::ALLOW || (is_audited && value.rule == 0);
    image_verdict(image, slot, direction, peer, protocol, port).is_none_or(passes)
}

/// Longest prefix match in the verdict trie.
fn look_up(image: &MapImage, policy: u32, identity: u32, direction: Direction, protocol: u8, port: u16) -> Option<VerdictValue> {
    let key = |protocol: u8, port: u16| VerdictKey { policy, identity, direction: direction.abi(), protocol, port: port.to_be_bytes() };
    let blocks = (0..=16u32).rev().map(|bits| {
        let mask = u16::try_from(0xffff_0000u32 >> bits & 0xffff).expect("masked to 16 bits");
        (key(protocol, port & mask), VERDICT_PREFIX_PROTOCOL + bits)
    });
    blocks.chain([(key(PROTOCOL_ANY, 0), VERDICT_PREFIX_ANY)]).find_map(|entry| image.verdicts.get(&entry).copied())
}
