//! Address blocks cut into elementary classes: within a class every address is in the same peer lists.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use super::model::Peer;

/// A sorted set of peer lists, by their interned numbers.
pub(super) type Terms = Vec<u32>;

/// The classes of a set of peer lists.
#[derive(Debug, Default)]
pub(super) struct Classes {
    v4: PrefixMap<Ipv4Net, Terms>,
    v6: PrefixMap<Ipv6Net, Terms>,
    /// Every boundary with the peer lists of the addresses from it down to the next boundaries.
    pub(super) boundaries: BTreeMap<IpNet, Terms>,
}

/// What happens to the set of matching blocks at a boundary.
#[derive(Default)]
struct Boundary {
    begins: Vec<(u32, usize)>,
    ends: Vec<(u32, usize)>,
}

impl Classes {
    /// Cuts the address blocks of the peer lists.
    pub(super) fn new<'a>(lists: impl IntoIterator<Item = (u32, &'a [Peer])>) -> Self {
        let mut classes = Self::default();
        cut(lists, |net, blocks| {
            let mut terms: Terms = blocks.iter().map(|(term, _)| *term).collect();
            terms.dedup();
            classes.boundaries.insert(net, terms.clone());
            match net {
                IpNet::V4(net) => drop(classes.v4.insert(net, terms)),
                IpNet::V6(net) => drop(classes.v6.insert(net, terms)),
            }
            true
        });
        classes
    }

    /// Whether the peer lists, counted in each of their classes, are more than so many.
    pub(super) fn exceed<'a>(lists: impl IntoIterator<Item = (u32, &'a [Peer])>, most: usize) -> bool {
        let mut count = 0;
        cut(lists, |_, blocks| {
            count += blocks.len();
            count <= most
        });
        count > most
    }

    /// The peer lists whose blocks hold the address.
    pub(super) fn terms(&self, address: IpAddr) -> &[u32] {
        let found = match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, terms)| terms),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, terms)| terms),
        };
        found.map_or(&[], Vec::as_slice)
    }
}

/// Gives each boundary with the blocks that hold from it down to the next boundaries, sorted, by peer list and place in it; until `each`
/// says no.
fn cut<'a>(lists: impl IntoIterator<Item = (u32, &'a [Peer])>, mut each: impl FnMut(IpNet, &[(u32, usize)]) -> bool) {
    let mut boundaries: BTreeMap<IpNet, Boundary> = BTreeMap::new();
    for (term, peers) in lists {
        for (index, peer) in peers.iter().enumerate() {
            let Peer::Block { net, except } = peer else { continue };
            if except.iter().any(|cut| cut.contains(net)) {
                continue;
            }
            boundaries.entry(*net).or_default().begins.push((term, index));
            for cut in except.iter().filter(|cut| net.contains(*cut)) {
                boundaries.entry(*cut).or_default().ends.push((term, index));
            }
        }
    }
    // In the order of networks a prefix comes before all that it contains: a stack holds the ancestors.
    let mut stack: Vec<(IpNet, Vec<(u32, usize)>)> = Vec::new();
    for (net, change) in boundaries {
        while stack.last().is_some_and(|(outer, _)| !outer.contains(&net)) {
            stack.pop();
        }
        let mut blocks = stack.last().map(|(_, blocks)| blocks.clone()).unwrap_or_default();
        blocks.extend(change.begins);
        blocks.retain(|block| !change.ends.contains(block));
        blocks.sort_unstable();
        if !each(net, &blocks) {
            return;
        }
        stack.push((net, blocks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net() -> impl Strategy<Value = IpNet> {
        (0u32..16, 24u8..=32, any::<bool>()).prop_map(|(low, length, v6)| {
            if v6 {
                IpNet::V6(Ipv6Net::new(u128::from(low).into(), 96 + length).unwrap().trunc())
            } else {
                IpNet::V4(Ipv4Net::new(low.into(), length).unwrap().trunc())
            }
        })
    }

    proptest! {
        #[test]
        fn an_address_is_in_the_lists_that_say_so(
            lists in proptest::collection::vec(proptest::collection::vec((net(), proptest::collection::vec(net(), 0..4)), 0..4), 0..5)
        ) {
            let lists: Vec<Vec<Peer>> = lists.into_iter()
                .map(|blocks| blocks.into_iter().map(|(net, except)| Peer::Block { net, except }).collect()).collect();
            let classes = Classes::new(lists.iter().enumerate().map(|(i, peers)| (i as u32, peers.as_slice())));
            for low in 0u32..20 {
                for address in [IpAddr::V4(low.into()), IpAddr::V6(u128::from(low).into())] {
                    let wanted: Vec<u32> = lists.iter().enumerate().filter(|(_, peers)| peers.iter().any(|peer| {
                        matches!(peer, Peer::Block { net, except } if net.contains(&address) && !except.iter().any(|cut| cut.contains(&address)))
                    })).map(|(i, _)| i as u32).collect();
                    prop_assert_eq!(classes.terms(address), wanted.as_slice());
                }
            }
        }
    }
}
