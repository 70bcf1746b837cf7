//! A subnet's addresses, counted one by one as EC2 does.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use stanchion_core::cloud::Subnet;

/// Addresses of a /28.
const PREFIX_SIZE: u32 = 16;

/// How many slots of a new IPv6 /80 are looked at before the subnet counts as full; a /64 has 65,536 of them.
const IPV6_PREFIXES: u32 = 1 << 16;

/// Which free address EC2 picks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// The lowest: tests can name addresses.
    #[default]
    Lowest,
    /// Anywhere, by seed: fragments the subnet as real traffic does.
    Scattered {
        /// Of the generator.
        seed: u64,
    },
}

/// Why no address was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Too few free addresses.
    Addresses,
    /// Enough addresses, but no whole /28.
    Fragmented,
}

/// A subnet and who holds which address.
#[derive(Clone, Debug)]
pub(super) struct SubnetState {
    pub(super) described: Subnet,
    placement: Placement,
    draws: u64,
    /// One a host address, network and broadcast included.
    taken: Vec<bool>,
    free: u32,
    taken_ipv6: std::collections::BTreeSet<u128>,
}

impl SubnetState {
    pub(super) fn new(described: Subnet, placement: Placement) -> Self {
        let size = 1usize << (32 - described.cidr.prefix_len());
        let mut state =
            Self { described, placement, draws: 0, taken: vec![false; size], free: size as u32, taken_ipv6: Default::default() };
        // VPC user guide: the first four addresses and the last one of a subnet are reserved.
        for index in [0, 1, 2, 3, size - 1] {
            state.take(index);
        }
        state
    }

    /// As DescribeSubnets shows it.
    pub(super) fn describe(&self) -> Subnet {
        Subnet { available_addresses: self.free, ..self.described.clone() }
    }

    /// Whole free /28 blocks.
    pub(super) fn free_prefixes(&self) -> u32 {
        (0..self.taken.len()).step_by(PREFIX_SIZE as usize).filter(|&start| self.block_is_free(start)).count() as u32
    }

    /// Takes a given address.
    pub(super) fn take_address(&mut self, address: Ipv4Addr) -> bool {
        self.index(address).is_some_and(|index| self.take(index))
    }

    /// Takes `count` single addresses, or none.
    pub(super) fn take_addresses(&mut self, count: u16) -> Result<Vec<Ipv4Addr>, NoRoom> {
        if self.free < u32::from(count) {
            return Err(NoRoom::Addresses);
        }
        let mut addresses = Vec::with_capacity(count.into());
        for _ in 0..count {
            let start = self.draw(self.taken.len());
            let index = (start..self.taken.len()).chain(0..start).find(|&i| !self.taken[i]).ok_or(NoRoom::Addresses)?;
            self.take(index);
            addresses.push(self.address(index));
        }
        Ok(addresses)
    }

    /// Takes `count` aligned /28 blocks, or none.
    pub(super) fn take_prefixes(&mut self, count: u16) -> Result<Vec<Ipv4Net>, NoRoom> {
        if self.free < u32::from(count) * PREFIX_SIZE {
            return Err(NoRoom::Addresses);
        }
        if self.free_prefixes() < u32::from(count) {
            return Err(NoRoom::Fragmented);
        }
        let blocks = self.taken.len() / PREFIX_SIZE as usize;
        let mut prefixes = Vec::with_capacity(count.into());
        for _ in 0..count {
            let first = self.draw(blocks);
            let block =
                (first..blocks).chain(0..first).find(|&b| self.block_is_free(b * PREFIX_SIZE as usize)).ok_or(NoRoom::Fragmented)?;
            let start = block * PREFIX_SIZE as usize;
            for index in start..start + PREFIX_SIZE as usize {
                self.take(index);
            }
            prefixes.push(Ipv4Net::new(self.address(start), 28).expect("28 is a prefix length"));
        }
        Ok(prefixes)
    }

    /// Gives addresses back.
    pub(super) fn give_back(&mut self, net: Ipv4Net) {
        for address in net.subnets(32).into_iter().flatten() {
            if let Some(index) = self.index(address.addr())
                && std::mem::replace(&mut self.taken[index], false)
            {
                self.free += 1;
            }
        }
    }

    /// Takes an IPv6 address (/128) or prefix (/80): the lowest free /80 of the first range, whose first address a
    /// single one is.
    pub(super) fn take_ipv6(&mut self) -> Result<std::net::Ipv6Addr, NoRoom> {
        let range = self.described.ipv6_cidrs.first().ok_or(NoRoom::Addresses)?;
        let base = u128::from(range.network());
        // Slot 0 holds the addresses that the VPC reserves.
        let start = (1..IPV6_PREFIXES)
            .map(|slot| base + (u128::from(slot) << 48))
            .find(|start| !self.taken_ipv6.contains(start))
            .ok_or(NoRoom::Addresses)?;
        self.taken_ipv6.insert(start);
        Ok(start.into())
    }

    /// Gives an IPv6 address or prefix back.
    pub(super) fn give_back_ipv6(&mut self, start: std::net::Ipv6Addr) {
        self.taken_ipv6.remove(&start.into());
    }

    fn take(&mut self, index: usize) -> bool {
        let was_free = !std::mem::replace(&mut self.taken[index], true);
        self.free -= u32::from(was_free);
        was_free
    }

    fn block_is_free(&self, start: usize) -> bool {
        self.taken.get(start..start + PREFIX_SIZE as usize).is_some_and(|block| block.iter().all(|taken| !taken))
    }

    fn draw(&mut self, below: usize) -> usize {
        match self.placement {
            Placement::Lowest => 0,
            Placement::Scattered { seed } => {
                self.draws += 1;
                super::faults::mix(seed, self.draws) as usize % below
            }
        }
    }

    fn index(&self, address: Ipv4Addr) -> Option<usize> {
        self.described.cidr.contains(&address).then(|| (u32::from(address) - u32::from(self.described.cidr.network())) as usize)
    }

    fn address(&self, index: usize) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.described.cidr.network()) + index as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(cidr: &str, placement: Placement) -> SubnetState {
        SubnetState::new(
            Subnet {
                id: "subnet-1".into(),
                vpc: "vpc-1".into(),
                availability_zone: "eu-west-1a".to_owned(),
                cidr: cidr.parse().unwrap(),
                ipv6_cidrs: vec!["2001:db8::/64".parse().unwrap()],
                available_addresses: 0,
                tags: Default::default(),
            },
            placement,
        )
    }

    #[test]
    fn five_addresses_are_reserved_and_the_edge_blocks_hold_no_prefix() {
        let mut state = subnet("10.0.0.0/26", Placement::Lowest);
        assert_eq!((state.describe().available_addresses, state.free_prefixes()), (59, 2));
        assert_eq!(state.take_addresses(1).unwrap(), ["10.0.0.4".parse::<Ipv4Addr>().unwrap()]);
        let prefixes = state.take_prefixes(2).unwrap();
        assert_eq!(prefixes.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.16/28", "10.0.0.32/28"]);
        assert_eq!(state.take_prefixes(1), Err(NoRoom::Fragmented));
        state.give_back(prefixes[1]);
        assert_eq!(state.take_prefixes(1).unwrap(), [prefixes[1]]);
    }

    #[test]
    fn a_request_takes_all_or_nothing() {
        let mut state = subnet("10.0.0.0/28", Placement::Lowest);
        assert_eq!(state.take_addresses(12), Err(NoRoom::Addresses));
        assert_eq!(state.describe().available_addresses, 11);
        assert_eq!(state.take_addresses(11).unwrap().len(), 11);
        assert_eq!(state.describe().available_addresses, 0);
        assert!(!state.take_address("10.0.0.4".parse().unwrap()));
    }

    #[test]
    fn scattered_placement_fragments_and_repeats_with_its_seed() {
        let take = |seed| subnet("10.0.0.0/24", Placement::Scattered { seed }).take_addresses(20).unwrap();
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
        let mut state = subnet("10.0.0.0/24", Placement::Scattered { seed: 3 });
        state.take_addresses(60).unwrap();
        assert!(state.free_prefixes() < 4, "{} whole blocks left", state.free_prefixes());
    }

    #[test]
    fn ipv6_prefixes_are_80s_of_the_range() {
        let mut state = subnet("10.0.0.0/24", Placement::Lowest);
        let first = state.take_ipv6().unwrap();
        assert_eq!(first, "2001:db8:0:0:1::".parse::<std::net::Ipv6Addr>().unwrap());
        assert_eq!(state.take_ipv6().unwrap(), "2001:db8:0:0:2::".parse::<std::net::Ipv6Addr>().unwrap());
        state.give_back_ipv6(first);
        assert_eq!(state.take_ipv6().unwrap(), first);
    }
}
