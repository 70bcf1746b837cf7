//! Which pod is behind which host veth, for the programs; and which addresses are the node's own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use aya::maps::{Array, HashMap, MapData as AyaMap, MapError as AyaError};
use stanchion_core::policy::image::{MapError, Refusal};
use stanchion_ebpf_abi::{FAR_PLACES, INTERFACE_PLACES, Interface, flow_head, interface_flag, ipv4_word, ipv6_words, map_name};
use stanchion_netlink::{Netlink, NetlinkError};

use super::maps::refused;
use super::object::{LoadError, Loaded, Raw};
use super::slots::{HostInterface, Sandbox};

/// The interface records.
pub(super) struct Interfaces {
    places: Array<AyaMap, Raw<Interface>>,
    /// Places of those whose own is taken.
    far: HashMap<AyaMap, u32, u32>,
}

impl Interfaces {
    pub(super) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self { places: loaded.map(map_name::INTERFACES)?, far: loaded.map(map_name::INTERFACES_FAR)? })
    }

    /// Writes the records of those of a sandbox's host veths that are there.
    pub(super) fn set(&mut self, sandbox: &Sandbox, is_there: impl Fn(&HostInterface) -> bool) -> Result<(), MapError> {
        let mut position = 0u8;
        let mut next = || {
            position += 1;
            position - 1
        };
        let flags = if sandbox.interfaces.len() > 1 { interface_flag::MORE_ADDRESSES } else { 0 };
        for interface in &sandbox.interfaces {
            let local4 = interface.ipv4.map_or(0, |_| next());
            let local6 = interface.ipv6.map_or(0, |_| next());
            if !is_there(interface) {
                continue;
            }
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

    fn at(&self, place: u32) -> Result<Interface, MapError> {
        refused(map_name::INTERFACES, &place, self.places.get(&place, 0)).map(|Raw(present)| present)
    }

    fn write(&mut self, place: u32, interface: Interface) -> Result<(), MapError> {
        refused(map_name::INTERFACES, &place, self.places.set(place, Raw(interface), 0))
    }

    fn far(&self, index: u32) -> Result<Option<u32>, MapError> {
        match self.far.get(&index, 0) {
            Ok(place) => Ok(Some(place)),
            Err(AyaError::KeyNotFound) => Ok(None),
            Err(error) => refused(map_name::INTERFACES_FAR, &index, Err(error)),
        }
    }

    fn set_one(&mut self, interface: Interface) -> Result<(), MapError> {
        let (index, own) = (interface.if_index, interface.if_index % INTERFACE_PLACES);
        let present = self.at(own)?;
        if present == interface {
            return Ok(());
        }
        if present.if_index == 0 || present.if_index == index {
            return self.write(own, interface);
        }
        if let Some(place) = self.far(index)? {
            return self.write(place, interface);
        }
        for place in INTERFACE_PLACES..INTERFACE_PLACES + FAR_PLACES {
            if self.at(place)?.if_index == 0 {
                // The record first: who finds the place finds it there.
                self.write(place, interface)?;
                let result = refused(map_name::INTERFACES_FAR, &index, self.far.insert(index, place, 0));
                // Nobody would find the place again.
                return result.or_else(|refusal| self.write(place, Interface::default()).and(Err(refusal)));
            }
        }
        let message = format!("{FAR_PLACES} interfaces have their places behind the others'");
        Err(MapError { map: map_name::INTERFACES, operation: format!("{index:?}"), refusal: Refusal::Full, message })
    }

    /// Forgets an interface; programs still attached there let nothing pass.
    pub(super) fn remove(&mut self, index: u32) -> Result<(), MapError> {
        let own = index % INTERFACE_PLACES;
        if self.at(own)?.if_index == index {
            self.write(own, Interface::default())?;
        }
        let Some(place) = self.far(index)? else { return Ok(()) };
        refused(map_name::INTERFACES_FAR, &index, self.far.remove(&index))?;
        if self.at(place)?.if_index == index { self.write(place, Interface::default()) } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::super::object::{LoadOptions, load};
    use super::*;

    #[test]
    fn an_interface_whose_place_cannot_be_found_has_none() {
        let pin_root = PathBuf::from(format!("/sys/fs/bpf/strig{}-far", std::process::id()));
        let mut loaded = load(&LoadOptions { pin_root: pin_root.clone(), flow_entries: 16 }).unwrap();
        let mut interfaces = Interfaces::new(&mut loaded).unwrap();
        interfaces.set_one(Interface { if_index: 5, slot: 1, ..Interface::default() }).unwrap();
        let others = 1_000_000..1_000_000 + FAR_PLACES;
        others.clone().for_each(|index| interfaces.far.insert(index, 0, 0).unwrap());
        let second = Interface { if_index: 5 + INTERFACE_PLACES, slot: 2, ..Interface::default() };
        for _ in 0..2 {
            assert_eq!(interfaces.set_one(second).unwrap_err().refusal, Refusal::Full);
            assert_eq!(interfaces.at(INTERFACE_PLACES).unwrap(), Interface::default(), "its place is free again");
        }
        others.for_each(|index| interfaces.far.remove(&index).unwrap());
        interfaces.set_one(second).unwrap();
        assert_eq!(interfaces.far(second.if_index).unwrap(), Some(INTERFACE_PLACES));
        std::fs::remove_dir_all(pin_root).unwrap();
    }

    #[test]
    fn interfaces_whose_indices_share_a_place_have_one_each() {
        let pin_root = PathBuf::from(format!("/sys/fs/bpf/strig{}-interfaces", std::process::id()));
        let mut loaded = load(&LoadOptions { pin_root: pin_root.clone(), flow_entries: 16 }).unwrap();
        let interfaces = RefCell::new(Interfaces::new(&mut loaded).unwrap());
        // What the programs do.
        let find = |interfaces: &Interfaces, index: u32| {
            let own = interfaces.at(index % INTERFACE_PLACES).unwrap();
            let found = if own.if_index == index { Some(own) } else { interfaces.far(index).unwrap().map(|at| interfaces.at(at).unwrap()) };
            found.filter(|found| found.if_index == index).map(|found| found.slot)
        };
        let step = (prop_oneof![Just(5u32), Just(5 + INTERFACE_PLACES), Just(5 + 2 * INTERFACE_PLACES), Just(6)], 0u16..4);
        let model: RefCell<BTreeMap<u32, u16>> = RefCell::default();
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        runner
            .run(&prop::collection::vec(step, 1..40), |steps| {
                let (mut interfaces, mut model) = (interfaces.borrow_mut(), model.borrow_mut());
                for (if_index, slot) in steps {
                    if slot == 0 {
                        interfaces.remove(if_index).unwrap();
                        model.remove(&if_index);
                    } else {
                        interfaces.set_one(Interface { if_index, slot, ..Interface::default() }).unwrap();
                        model.insert(if_index, slot);
                    }
                    for index in [5, 5 + INTERFACE_PLACES, 5 + 2 * INTERFACE_PLACES, 6] {
                        prop_assert_eq!(find(&interfaces, index), model.get(&index).copied());
                    }
                }
                Ok(())
            })
            .unwrap();
        let mut interfaces = interfaces.into_inner();
        for index in model.into_inner().into_keys() {
            interfaces.remove(index).unwrap();
        }
        assert_eq!(interfaces.far.keys().count(), 0);
        assert!((INTERFACE_PLACES..INTERFACE_PLACES + FAR_PLACES).all(|place| interfaces.at(place).unwrap().if_index == 0));
        std::fs::remove_dir_all(pin_root).unwrap();
    }
}
