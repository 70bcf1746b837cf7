//! Which pod is behind which host veth, for the programs; and which addresses are the node's own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use aya::maps::{Array, HashMap, MapData as AyaMap, MapError as AyaError};
use stanchion_core::policy::image::MapError;
use stanchion_ebpf_abi::{INTERFACE_PLACES, Interface, flow_head, interface_flag, ipv4_word, ipv6_words, map_name};
use stanchion_netlink::{Netlink, NetlinkError};

use super::maps::refused;
use super::object::{LoadError, Loaded, Raw};
use super::slots::Sandbox;

/// The interface records.
pub(super) struct Interfaces {
    near: Array<AyaMap, Raw<Interface>>,
    far: HashMap<AyaMap, u32, Raw<Interface>>,
}

impl Interfaces {
    pub(super) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self { near: loaded.map(map_name::INTERFACES)?, far: loaded.map(map_name::INTERFACES_FAR)? })
    }

    /// Writes the records of a sandbox's host veths.
    pub(super) fn set(&mut self, sandbox: &Sandbox) -> Result<(), MapError> {
        let mut position = 0u8;
        let mut next = || {
            position += 1;
            position - 1
        };
        let flags = if sandbox.interfaces.len() > 1 { interface_flag::MORE_ADDRESSES } else { 0 };
        for interface in &sandbox.interfaces {
            let local4 = interface.ipv4.map_or(0, |_| next());
            let local6 = interface.ipv6.map_or(0, |_| next());
            self.set_one(Interface {
                if_index: interface.index,
                slot: sandbox.slot,
                flags,
                head4: flow_head(sandbox.slot, local4),
                head6: flow_head(sandbox.slot, local6),
                ipv4: interface.ipv4.map_or(0, |address| ipv4_word(address.octets())),
                ipv6: interface.ipv6.map_or([0; 4], |address| ipv6_words(address.octets())),
                ..Interface::default()
            })?;
        }
        Ok(())
    }

    fn set_one(&mut self, interface: Interface) -> Result<(), MapError> {
        let (index, place) = (interface.if_index, interface.if_index % INTERFACE_PLACES);
        let Raw(present) = refused(map_name::INTERFACES, &index, self.near.get(&place, 0))?;
        if present == interface {
            return Ok(());
        }
        if present.if_index == 0 || present.if_index == index {
            return refused(map_name::INTERFACES, &index, self.near.set(place, Raw(interface), 0));
        }
        refused(map_name::INTERFACES_FAR, &index, self.far.insert(index, Raw(interface), 0))
    }

    /// Forgets an interface; programs still attached there let nothing pass.
    pub(super) fn remove(&mut self, index: u32) -> Result<(), MapError> {
        let place = index % INTERFACE_PLACES;
        let Raw(present) = refused(map_name::INTERFACES, &index, self.near.get(&place, 0))?;
        if present.if_index == index {
            return refused(map_name::INTERFACES, &index, self.near.set(place, Raw(Interface::default()), 0));
        }
        match self.far.remove(&index) {
            Ok(()) | Err(AyaError::KeyNotFound) => Ok(()),
            Err(AyaError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => refused(map_name::INTERFACES_FAR, &index, other),
        }
    }
}

/// True if the index still belongs to that name. Asked by the index: by the name of an interface that is gone, as every deleted pod's
/// is, the kernel looks for a module to load and runs modprobe, twice.
pub(super) fn exists(name: &str, index: u32) -> bool {
    nix::net::if_::if_indextoname(index).is_ok_and(|present| present.as_bytes() == name.as_bytes())
}

/// The interface on which kube-proxy in IPVS mode puts the address of every service.
const IPVS: &str = "kube-ipvs0";

/// The addresses of this network namespace that are the node's own: without loopback's, link-local ones, and those of services
/// that IPVS answers.
///
/// # Errors
/// The kernel's.
pub(super) fn node_addresses() -> Result<BTreeSet<IpAddr>, NetlinkError> {
    let mut addresses = Netlink::open()?.addresses()?;
    addresses.retain(|present| match present.address.addr() {
        IpAddr::V4(a) => !a.is_loopback(),
        IpAddr::V6(a) => !a.is_loopback() && !a.is_unicast_link_local(),
    });
    let interfaces: BTreeSet<u32> = addresses.iter().map(|present| present.index).collect();
    let ipvs = interfaces.into_iter().find(|index| exists(IPVS, *index));
    Ok(addresses.into_iter().filter(|present| Some(present.index) != ipvs).map(|present| present.address.addr()).collect())
}
