//! Instance types: how many ENIs, addresses and cards they have.

use serde::{Deserialize, Serialize};

/// Limits of an instance type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLimits {
    /// `m5.large`.
    pub instance_type: String,
    /// ENIs on the default network card, the primary among them.
    pub max_enis: u16,
    /// IPv4 addresses of an ENI, its own among them.
    pub ipv4_per_eni: u16,
    /// `nitro`, `xen`, `unknown` or empty.
    pub hypervisor: String,
    /// Metal.
    pub bare_metal: bool,
    /// Index of the card that the primary ENI is on.
    pub default_network_card: u16,
    /// ENIs a card: (card index, maximum).
    pub network_cards: Vec<(u16, u16)>,
}

impl InstanceLimits {
    /// /28 prefixes can be delegated: Nitro or metal.
    pub fn supports_prefixes(&self) -> bool {
        self.hypervisor == "nitro" || self.bare_metal
    }

    /// Slots for secondary addresses or prefixes on an ENI.
    pub fn slots_per_eni(&self) -> u16 {
        self.ipv4_per_eni.saturating_sub(1)
    }
}
