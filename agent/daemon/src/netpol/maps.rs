//! The kernel's policy maps behind [`PolicyMaps`].
//!
//! Two things differ from the plain image. A CIDR of one address is kept in the address hash, where it costs the same
//! whatever the number of them, unless a pod's identity is there already; then it stays in the trie, which is asked only if
//! the hash knows nothing, as the image demands. And an endpoint's record has two halves, see [`Endpoint`].

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData as AyaMap};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::policy::image::{EndpointImage, MapError, MapImage, MapOp, PolicyMaps, Refusal, Slot};
use stanchion_ebpf_abi::{
    AddressKey, AddressValue, ENDPOINT_SLOTS, Endpoint, EndpointPolicy, OwnKey, VerdictKey, VerdictValue, address_flag, endpoint_flag,
    ipv4_octets, ipv4_word, ipv6_octets, ipv6_words, map_name,
};

use super::object::{LoadError, Loaded, Raw};

/// The maps that hold policy.
pub struct KernelMaps {
    endpoints: Array<AyaMap, Raw<Endpoint>>,
    own: HashMap<AyaMap, Raw<OwnKey>, u32>,
    addresses: HashMap<AyaMap, Raw<AddressKey>, Raw<AddressValue>>,
    cidrs4: LpmTrie<AyaMap, u32, u32>,
    cidrs6: LpmTrie<AyaMap, [u32; 4], u32>,
    verdicts: LpmTrie<AyaMap, Raw<VerdictKey>, Raw<VerdictValue>>,
    /// Each slot's addresses in [`map_name::OWN`].
    owned: BTreeMap<u32, Vec<(OwnKey, u32)>>,
    generation: Array<AyaMap, u32>,
    /// What was changed since the programs were told.
    changed: Option<Remembered>,
    writes: u64,
}

/// What each CPU remembers of the tables, see [`map_name::GENERATION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remembered {
    Address,
    Verdict,
}

impl KernelMaps {
    /// Takes the policy maps out of the object.
    ///
    /// # Errors
    /// A map is missing from the object, or was taken before.
    pub fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        let mut maps = Self {
            endpoints: loaded.map(map_name::ENDPOINTS)?,
            own: loaded.map(map_name::OWN)?,
            addresses: loaded.map(map_name::ADDRESSES)?,
            cidrs4: loaded.map(map_name::CIDRS4)?,
            cidrs6: loaded.map(map_name::CIDRS6)?,
            verdicts: loaded.map(map_name::VERDICTS)?,
            generation: loaded.map(map_name::GENERATION)?,
            owned: BTreeMap::new(),
            changed: None,
            writes: 0,
        };
        for item in maps.own.iter() {
            let (Raw(key), position) = item.map_err(|source| LoadError::Map { name: map_name::OWN, source })?;
            maps.owned.entry(key.slot).or_default().push((key, position));
        }
        // The agent before may have been killed between a change and its word of it.
        maps.forget().map_err(|source| LoadError::Map { name: map_name::GENERATION, source })?;
        Ok(maps)
    }

    /// Writes to the kernel so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Programs remember what addresses and verdicts are: before a change of another kind they must have heard of those so far, or
    /// packets would see the two in the wrong order.
    fn in_order(&mut self, op: &MapOp) -> Result<(), MapError> {
        let kind = match op {
            MapOp::SetAddress(..)
            | MapOp::RemoveAddress(_)
            | MapOp::SetCidr(..)
            | MapOp::RemoveCidr(_)
            | MapOp::SetNodeAddress(_)
            | MapOp::RemoveNodeAddress(_) => Some(Remembered::Address),
            MapOp::SetVerdict(..) | MapOp::RemoveVerdict(..) => Some(Remembered::Verdict),
            MapOp::SetEndpoint(..) | MapOp::RemoveEndpoint(_) => None,
        };
        if kind != self.changed {
            self.settle()?;
        }
        self.changed = kind;
        self.one(op)
    }

    /// Makes the programs forget what they remember, if any of it has changed.
    fn settle(&mut self) -> Result<(), MapError> {
        if self.changed.is_some() {
            refused(map_name::GENERATION, &"next", self.forget())?;
            self.changed = None;
        }
        Ok(())
    }

    fn forget(&mut self) -> Result<(), aya::maps::MapError> {
        let present = self.generation.get(&0, 0)?;
        self.generation.set(0, present.wrapping_add(1), 0)
    }

    fn one(&mut self, op: &MapOp) -> Result<(), MapError> {
        match op {
            MapOp::SetAddress(address, identity) => self.set_address(*address, *identity),
            MapOp::RemoveAddress(address) => self.change_address(*address, |value| match value.flags & address_flag::ADDRESS {
                0 => value,
                _ => AddressValue { identity: 0, flags: value.flags & !address_flag::ADDRESS },
            }),
            MapOp::SetCidr(net, identity) => self.set_cidr(*net, *identity),
            MapOp::RemoveCidr(net) => self.remove_cidr(*net),
            MapOp::SetVerdict(key, bits, value) => {
                self.writes += 1;
                let result = self.verdicts.insert(&Key::new(*bits, Raw(*key)), Raw(*value), 0);
                refused(map_name::VERDICTS, op, result)
            }
            MapOp::RemoveVerdict(key, bits) => {
                self.writes += 1;
                absent_is_fine(map_name::VERDICTS, op, self.verdicts.remove(&Key::new(*bits, Raw(*key))))
            }
            MapOp::SetEndpoint(slot, image) => self.set_endpoint(*slot, image),
            MapOp::RemoveEndpoint(slot) => {
                self.set_policy(*slot, 0, EndpointPolicy::default())?;
                self.set_own(*slot, &[])
            }
            MapOp::SetNodeAddress(address) => self.change_address(*address, |mut value| {
                value.flags |= address_flag::NODE;
                value
            }),
            MapOp::RemoveNodeAddress(address) => self.change_address(*address, |mut value| {
                value.flags &= !address_flag::NODE;
                value
            }),
        }
    }

    fn address(&self, address: IpAddr) -> Result<AddressValue, MapError> {
        match self.addresses.get(&Raw(address_key(address)), 0) {
            Ok(Raw(value)) => Ok(value),
            Err(aya::maps::MapError::KeyNotFound) => Ok(AddressValue::default()),
            Err(error) => refused(map_name::ADDRESSES, &address, Err(error)),
        }
    }

    /// Writes what `change` makes of the present value; a value without flags is none.
    fn change_address(&mut self, address: IpAddr, change: impl FnOnce(AddressValue) -> AddressValue) -> Result<(), MapError> {
        let present = self.address(address)?;
        let next = change(present);
        if next == present {
            return Ok(());
        }
        self.writes += 1;
        let key = Raw(address_key(address));
        if next.flags == 0 {
            return absent_is_fine(map_name::ADDRESSES, &address, self.addresses.remove(&key));
        }
        refused(map_name::ADDRESSES, &address, self.addresses.insert(key, Raw(next), 0))
    }

    fn set_address(&mut self, address: IpAddr, identity: u32) -> Result<(), MapError> {
        let present = self.address(address)?;
        if present.flags & address_flag::HOST_CIDR != 0 {
            self.set_trie(IpNet::from(address), present.identity)?;
        }
        self.change_address(address, |value| AddressValue {
            identity,
            flags: value.flags & !address_flag::HOST_CIDR | address_flag::ADDRESS,
        })
    }

    fn set_cidr(&mut self, net: IpNet, identity: u32) -> Result<(), MapError> {
        if net.prefix_len() != net.max_prefix_len() || self.address(net.addr())?.flags & address_flag::ADDRESS != 0 {
            return self.set_trie(net, identity);
        }
        self.change_address(net.addr(), |value| AddressValue { identity, flags: value.flags | address_flag::HOST_CIDR })?;
        // Of a time when a pod had this address.
        self.remove_trie(net)
    }

    fn remove_cidr(&mut self, net: IpNet) -> Result<(), MapError> {
        if net.prefix_len() == net.max_prefix_len() && self.address(net.addr())?.flags & address_flag::HOST_CIDR != 0 {
            self.change_address(net.addr(), |value| AddressValue { identity: 0, flags: value.flags & !address_flag::HOST_CIDR })?;
        }
        // From both: the kernel may have refused the second write of a move.
        self.remove_trie(net)
    }

    fn set_trie(&mut self, net: IpNet, identity: u32) -> Result<(), MapError> {
        self.writes += 1;
        let bits = u32::from(net.prefix_len());
        match net {
            IpNet::V4(n) => {
                refused(map_name::CIDRS4, &net, self.cidrs4.insert(&Key::new(bits, ipv4_word(n.network().octets())), identity, 0))
            }
            IpNet::V6(n) => {
                refused(map_name::CIDRS6, &net, self.cidrs6.insert(&Key::new(bits, ipv6_words(n.network().octets())), identity, 0))
            }
        }
    }

    fn remove_trie(&mut self, net: IpNet) -> Result<(), MapError> {
        self.writes += 1;
        let bits = u32::from(net.prefix_len());
        match net {
            IpNet::V4(n) => absent_is_fine(map_name::CIDRS4, &net, self.cidrs4.remove(&Key::new(bits, ipv4_word(n.network().octets())))),
            IpNet::V6(n) => absent_is_fine(map_name::CIDRS6, &net, self.cidrs6.remove(&Key::new(bits, ipv6_words(n.network().octets())))),
        }
    }

    fn set_endpoint(&mut self, slot: Slot, image: &EndpointImage) -> Result<(), MapError> {
        let mut flags = endpoint_flag::READY;
        for (set, flag) in [(image.ingress, endpoint_flag::ISOLATED_INGRESS), (image.egress, endpoint_flag::ISOLATED_EGRESS)] {
            if set.is_some() {
                flags |= flag;
            }
        }
        if image.audit {
            flags |= endpoint_flag::AUDIT;
        }
        if image.by_name {
            flags |= endpoint_flag::BY_NAME;
        }
        let policy = EndpointPolicy { revision: image.revision, policy: [image.ingress.unwrap_or(0), image.egress.unwrap_or(0)] };
        self.set_own(slot, &image.addresses)?;
        self.set_policy(slot, flags, policy)
    }

    /// Writes the half that is not in use, then makes it the one in use.
    fn set_policy(&mut self, slot: Slot, flags: u8, policy: EndpointPolicy) -> Result<(), MapError> {
        let index = u32::from(slot.0);
        if index == 0 || index >= ENDPOINT_SLOTS {
            let message = format!("slots are 1 to {}", ENDPOINT_SLOTS - 1);
            return Err(MapError { map: map_name::ENDPOINTS, operation: format!("{slot:?}"), refusal: Refusal::Full, message });
        }
        let Raw(record) = refused(map_name::ENDPOINTS, &slot, self.endpoints.get(&index, 0))?;
        if record.policy() == (flags, &policy) {
            return Ok(());
        }
        self.writes += 2;
        for record in record.change(flags, policy) {
            refused(map_name::ENDPOINTS, &slot, self.endpoints.set(index, Raw(record), 0))?;
        }
        Ok(())
    }

    fn own_keys(&self) -> Result<Vec<(OwnKey, u32)>, MapError> {
        let mut keys = Vec::new();
        for item in self.own.iter() {
            let (Raw(key), position) = refused(map_name::OWN, &"read", item)?;
            keys.push((key, position));
        }
        Ok(keys)
    }

    fn set_own(&mut self, slot: Slot, addresses: &[IpAddr]) -> Result<(), MapError> {
        let wanted: Vec<(OwnKey, u32)> = (0..).zip(addresses).map(|(position, address)| (own_key(slot, *address), position)).collect();
        let present = self.owned.remove(&u32::from(slot.0)).unwrap_or_default();
        let mut result = Ok(());
        for (key, position) in wanted.iter().filter(|pair| !present.contains(pair)) {
            self.writes += 1;
            result = result.and(refused(map_name::OWN, &slot, self.own.insert(Raw(*key), *position, 0)));
        }
        for (key, _) in present.iter().filter(|(key, _)| !wanted.iter().any(|(still, _)| still == key)) {
            self.writes += 1;
            result = result.and(absent_is_fine(map_name::OWN, &slot, self.own.remove(&Raw(*key))));
        }
        if result.is_ok() && !wanted.is_empty() {
            self.owned.insert(u32::from(slot.0), wanted);
        } else if result.is_err() {
            // Tried anew as a whole, with what is there.
            let read = self.own_keys()?;
            self.owned.insert(u32::from(slot.0), read.into_iter().filter(|(key, _)| key.slot == u32::from(slot.0)).collect());
        }
        result
    }
}

impl Debug for KernelMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelMaps").field("writes", &self.writes).finish_non_exhaustive()
    }
}

impl PolicyMaps for KernelMaps {
    fn apply(&mut self, ops: &[MapOp]) -> Result<(), (usize, MapError)> {
        let result = ops.iter().enumerate().try_for_each(|(index, op)| self.in_order(op).map_err(|error| (index, error)));
        // After a failure, too: what was written holds.
        result.and(self.settle().map_err(|error| (ops.len().saturating_sub(1), error)))
    }

    fn read(&self) -> Result<MapImage, MapError> {
        let mut image = MapImage::default();
        for item in self.addresses.iter() {
            let (Raw(key), Raw(value)) = refused(map_name::ADDRESSES, &"read", item)?;
            read_address(&mut image, address_of(key.family, key.address), value);
        }
        for item in self.cidrs4.iter() {
            let (key, identity) = refused(map_name::CIDRS4, &"read", item)?;
            let net = Ipv4Net::new(ipv4_octets(key.data()).into(), prefix(key.prefix_len())).expect("the kernel bounds prefixes");
            // The hash decides where both have it.
            image.cidrs.entry(net.into()).or_insert(identity);
        }
        for item in self.cidrs6.iter() {
            let (key, identity) = refused(map_name::CIDRS6, &"read", item)?;
            let net = Ipv6Net::new(ipv6_octets(key.data()).into(), prefix(key.prefix_len())).expect("the kernel bounds prefixes");
            image.cidrs.entry(net.into()).or_insert(identity);
        }
        for item in self.verdicts.iter() {
            let (key, Raw(value)) = refused(map_name::VERDICTS, &"read", item)?;
            image.verdicts.insert((key.data().0, key.prefix_len()), value);
        }
        let mut addresses: BTreeMap<u32, BTreeMap<u32, IpAddr>> = BTreeMap::new();
        for (key, position) in self.own_keys()? {
            addresses.entry(key.slot).or_default().insert(position, address_of(key.family, key.address));
        }
        for (index, item) in (0..).zip(self.endpoints.iter()) {
            let Raw(record) = refused(map_name::ENDPOINTS, &"read", item)?;
            let (flags, &EndpointPolicy { revision, policy: [ingress, egress] }) = record.policy();
            if flags & endpoint_flag::READY == 0 {
                continue;
            }
            let endpoint = EndpointImage {
                addresses: addresses.remove(&index).unwrap_or_default().into_values().collect(),
                ingress: (flags & endpoint_flag::ISOLATED_INGRESS != 0).then_some(ingress),
                egress: (flags & endpoint_flag::ISOLATED_EGRESS != 0).then_some(egress),
                revision,
                audit: flags & endpoint_flag::AUDIT != 0,
                by_name: flags & endpoint_flag::BY_NAME != 0,
            };
            image.endpoints.insert(Slot(u16::try_from(index).expect("slots fit")), endpoint);
        }
        Ok(image)
    }
}

fn read_address(image: &mut MapImage, address: IpAddr, value: AddressValue) {
    if value.flags & address_flag::ADDRESS != 0 {
        image.addresses.insert(address, value.identity);
    }
    if value.flags & address_flag::HOST_CIDR != 0 {
        image.cidrs.insert(IpNet::from(address), value.identity);
    }
    if value.flags & address_flag::NODE != 0 {
        image.node_addresses.push(address);
    }
}

/// The key of a pod's address.
pub(super) fn own_key(slot: Slot, address: IpAddr) -> OwnKey {
    let AddressKey { address, family } = address_key(address);
    OwnKey { slot: u32::from(slot.0), family, address }
}

fn address_key(address: IpAddr) -> AddressKey {
    match address {
        IpAddr::V4(a) => AddressKey { address: [ipv4_word(a.octets()), 0, 0, 0], family: 4 },
        IpAddr::V6(a) => AddressKey { address: ipv6_words(a.octets()), family: 6 },
    }
}

fn address_of(family: u32, address: [u32; 4]) -> IpAddr {
    if family == 4 { Ipv4Addr::from(ipv4_octets(address[0])).into() } else { Ipv6Addr::from(ipv6_octets(address)).into() }
}

fn prefix(bits: u32) -> u8 {
    u8::try_from(bits).expect("the kernel bounds prefixes")
}

/// Puts the map and what was tried to a refusal.
pub(super) fn refused<T>(map: &'static str, what: &dyn Debug, result: Result<T, aya::maps::MapError>) -> Result<T, MapError> {
    result.map_err(|error| {
        let refusal = match errno(&error) {
            // The hash says the one, the trie the other.
            Some(libc::E2BIG | libc::ENOSPC) => Refusal::Full,
            Some(libc::ENOMEM) => Refusal::NoMemory,
            _ => Refusal::Other,
        };
        let message = match &error {
            aya::maps::MapError::SyscallError(syscall) => syscall.io_error.to_string(),
            other => other.to_string(),
        };
        MapError { map, operation: format!("{what:?}"), refusal, message }
    })
}

fn absent_is_fine(map: &'static str, what: &dyn Debug, result: Result<(), aya::maps::MapError>) -> Result<(), MapError> {
    match result {
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
        other => refused(map, what, other),
    }
}

fn errno(error: &aya::maps::MapError) -> Option<i32> {
    match error {
        aya::maps::MapError::SyscallError(syscall) => syscall.io_error.raw_os_error(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::object::{LoadOptions, load};
    use super::*;
    use stanchion_ebpf_abi::{VERDICT_PREFIX_ANY, VERDICT_PREFIX_PORT, direction, verdict};
    use std::path::PathBuf;

    /// A pin directory of this test's own, removed with it.
    struct Pins(PathBuf);

    impl Pins {
        fn new(name: &str) -> Self {
            // As the lab names what a datapath test makes, so that its sweep knows what a killed one left.
            Self(format!("/sys/fs/bpf/stdp{}-{name}", std::process::id()).into())
        }

        fn maps(&self) -> KernelMaps {
            let options = LoadOptions { pin_root: self.0.clone(), flow_entries: 1_024 };
            KernelMaps::new(&mut load(&options).unwrap()).unwrap()
        }
    }

    impl Drop for Pins {
        fn drop(&mut self) {
            let _left = std::fs::remove_dir_all(&self.0);
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_by_the_next_agent_and_writing_it_again_writes_nothing() {
        let pins = Pins::new("maps");
        let key = VerdictKey { policy: 7, identity: 3, direction: direction::INGRESS, protocol: 6, port: 80u16.to_be_bytes() };
        let any = VerdictKey { policy: 7, identity: 0, direction: direction::INGRESS, protocol: 0, port: [0; 2] };
        let allow = VerdictValue { rule: 9, verdict: verdict::ALLOW, reserved: [0; 3] };
        let endpoint = EndpointImage {
            addresses: vec![ip("10.0.0.9"), ip("fd00::9"), ip("10.0.0.8")],
            ingress: Some(7),
            egress: None,
            revision: 5,
            audit: true,
            by_name: true,
        };
        let ops = [
            MapOp::SetAddress(ip("10.0.0.1"), 3),
            MapOp::SetAddress(ip("fd00::1"), 4),
            MapOp::SetNodeAddress(ip("10.0.0.1")),
            MapOp::SetNodeAddress(ip("10.9.9.9")),
            MapOp::SetCidr(net("10.0.0.0/8"), 11),
            MapOp::SetCidr(net("10.0.0.2/32"), 12),
            MapOp::SetCidr(net("10.0.0.1/32"), 13),
            MapOp::SetCidr(net("2001:db8::/32"), 14),
            MapOp::SetCidr(net("2001:db8::1/128"), 15),
            MapOp::SetVerdict(key, VERDICT_PREFIX_PORT, allow),
            MapOp::SetVerdict(any, VERDICT_PREFIX_ANY, VerdictValue { verdict: verdict::DENY, ..allow }),
            MapOp::SetEndpoint(Slot(5), endpoint.clone()),
        ];
        pins.maps().apply(&ops).unwrap();
        // The first maps are closed; only the pins are left.
        let mut maps = pins.maps();
        let image = maps.read().unwrap();
        let expected = MapImage {
            addresses: BTreeMap::from([(ip("10.0.0.1"), 3), (ip("fd00::1"), 4)]),
            cidrs: BTreeMap::from([
                (net("10.0.0.0/8"), 11),
                (net("10.0.0.1/32"), 13),
                (net("10.0.0.2/32"), 12),
                (net("2001:db8::/32"), 14),
                (net("2001:db8::1/128"), 15),
            ]),
            verdicts: BTreeMap::from([
                ((key, VERDICT_PREFIX_PORT), allow),
                ((any, VERDICT_PREFIX_ANY), VerdictValue { verdict: verdict::DENY, ..allow }),
            ]),
            endpoints: BTreeMap::from([(Slot(5), endpoint.clone())]),
            node_addresses: { image.node_addresses.clone() },
        };
        assert_eq!(image, expected);
        let mut nodes = image.node_addresses;
        nodes.sort_unstable();
        assert_eq!(nodes, [ip("10.0.0.1"), ip("10.9.9.9")]);
        maps.apply(&[MapOp::SetEndpoint(Slot(5), endpoint)]).unwrap();
        assert_eq!(maps.writes(), 0, "an unchanged endpoint costs no write");
    }

    #[test]
    fn a_pod_address_and_a_cidr_of_one_address_come_and_go_in_any_order() {
        let pins = Pins::new("host");
        let mut maps = pins.maps();
        let (address, cidr) = (ip("10.1.1.1"), net("10.1.1.1/32"));
        let steps = [MapOp::SetAddress(address, 1), MapOp::SetCidr(cidr, 2), MapOp::RemoveAddress(address), MapOp::RemoveCidr(cidr)];
        // Every order of the four, each from an empty table; removing what is absent is no error.
        for order in 0..256usize {
            let picks = [order & 3, order >> 2 & 3, order >> 4 & 3, order >> 6 & 3];
            let (mut addresses, mut cidrs) = (BTreeMap::new(), BTreeMap::new());
            for pick in picks {
                maps.apply(&steps[pick..=pick]).unwrap();
                match pick {
                    0 => drop(addresses.insert(address, 1)),
                    1 => drop(cidrs.insert(cidr, 2)),
                    2 => drop(addresses.remove(&address)),
                    _ => drop(cidrs.remove(&cidr)),
                }
                let image = maps.read().unwrap();
                assert_eq!((image.addresses, image.cidrs), (addresses.clone(), cidrs.clone()), "{picks:?}");
            }
            maps.apply(&steps[2..]).unwrap();
        }
    }

    /// Each of the two writes by which one goes from a table to the other may be the last.
    #[test]
    fn a_cidr_of_one_address_that_stands_in_both_tables_is_what_the_programs_take_it_for_and_goes_from_both() {
        let pins = Pins::new("both");
        let mut maps = pins.maps();
        let net = net("10.1.1.1/32");
        maps.apply(&[MapOp::SetCidr(net, 3)]).unwrap();
        maps.set_trie(net, 2).unwrap();
        assert_eq!(maps.read().unwrap().cidrs, BTreeMap::from([(net, 3)]), "the hash is asked first");
        maps.apply(&[MapOp::RemoveCidr(net)]).unwrap();
        assert_eq!(maps.read().unwrap(), MapImage::default());
    }

    #[test]
    fn the_programs_forget_before_each_change_of_another_kind() {
        let pins = Pins::new("order");
        let mut maps = pins.maps();
        let key = VerdictKey { policy: 7, identity: 3, direction: direction::INGRESS, protocol: 6, port: 80u16.to_be_bytes() };
        let allow = VerdictValue { rule: 9, verdict: verdict::ALLOW, reserved: [0; 3] };
        let generation = |maps: &KernelMaps| maps.generation.get(&0, 0).unwrap();
        let started = generation(&maps);
        let ops = [
            (MapOp::SetAddress(ip("10.0.0.1"), 3), 0),
            (MapOp::SetCidr(net("10.1.0.0/16"), 4), 0),
            (MapOp::SetVerdict(key, VERDICT_PREFIX_PORT, allow), 1),
            (MapOp::SetEndpoint(Slot(5), EndpointImage { ingress: Some(7), ..EndpointImage::default() }), 2),
            // Of an endpoint the programs remember nothing.
            (MapOp::SetAddress(ip("10.0.0.2"), 3), 2),
            (MapOp::RemoveVerdict(key, VERDICT_PREFIX_PORT), 3),
        ];
        for (op, forgotten) in &ops {
            maps.in_order(op).unwrap();
            assert_eq!(generation(&maps) - started, *forgotten, "{op:?}");
        }
        maps.settle().unwrap();
        assert_eq!(generation(&maps) - started, 4, "and after the last");
        maps.apply(&ops.map(|(op, _)| op)[..4]).unwrap();
        assert_eq!(generation(&maps) - started, 6, "nothing is left to be forgotten after an endpoint");
        maps.apply(&[MapOp::SetEndpoint(Slot(6), EndpointImage::default()), MapOp::SetEndpoint(Slot(600), EndpointImage::default())])
            .unwrap();
        assert_eq!(generation(&maps) - started, 6);
        let fails = MapOp::SetEndpoint(Slot(60_000), EndpointImage::default());
        assert!(maps.apply(&[MapOp::SetAddress(ip("10.0.0.3"), 3), fails]).is_err());
        assert_eq!(generation(&maps) - started, 7, "what was written before a refusal holds");
    }

    #[test]
    fn a_slot_out_of_range_is_refused_by_name() {
        let pins = Pins::new("range");
        let mut maps = pins.maps();
        let (index, error) = maps.apply(&[MapOp::SetEndpoint(Slot(60_000), EndpointImage::default())]).unwrap_err();
        assert_eq!((index, error.map, error.refusal), (0, "ENDPOINTS", Refusal::Full));
    }
}
