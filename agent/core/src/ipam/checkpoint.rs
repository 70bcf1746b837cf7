//! The checkpoint: aws-node's own file, so that a node can be taken over and handed back, and a second one for what that
//! file has no room for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::store::{Allocation, Datastore, Held, Rest};
use super::types::{IpamKey, Time};
use crate::boot::Boot;
use crate::ids::{ContainerId, EniId, PodName};

/// The format that aws-node writes and reads.
const CHECKPOINT_VERSION: &str = "vpc-cni-ipam/1";
/// The format of the second file.
const COOLING_VERSION: &str = "stanchion-ipam/1";

/// aws-node's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// [`CHECKPOINT_VERSION`].
    pub version: String,
    /// What is held.
    pub allocations: Vec<CheckpointEntry>,
}

/// One held address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointEntry {
    /// The conflist's name.
    pub network_name: String,
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: ContainerId,
    /// `eth0`.
    pub if_name: String,
    /// In IPv4 mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// In IPv6 mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// Nanoseconds since 1970.
    pub allocation_timestamp: i64,
    /// The pod.
    #[serde(default)]
    pub metadata: CheckpointMetadata,
}

/// Whose address it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointMetadata {
    /// Namespace; empty in files of old releases.
    #[serde(rename = "k8sPodNamespace", skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name; empty in files of old releases.
    #[serde(rename = "k8sPodName", skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Cards on which the pod holds an address.
    #[serde(rename = "interfacesCount", skip_serializing_if = "is_zero")]
    pub interfaces: u32,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// The second file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoolingFile {
    /// [`COOLING_VERSION`].
    pub version: String,
    /// By which its times are reckoned; missing in files of earlier releases and where the kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
    /// Addresses that pods released or that went back to EC2 lately.
    pub cooling: Vec<CoolingEntry>,
    /// Ranges that went from one ENI to another lately.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moved: Vec<MovedEntry>,
}

/// A range that EC2 gave to another ENI: an old picture still shows it on the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedEntry {
    /// The range.
    pub cidr: IpNet,
    /// Where it is.
    pub eni: EniId,
    /// No picture is older than this.
    pub until: Time,
}

/// An address that rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoolingEntry {
    /// The address.
    pub address: IpAddr,
    /// Not given out before.
    pub until: Time,
    /// [`Rest::going`]. Earlier releases do not say it: what rests longer than a pod's address does is going.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub going: Option<bool>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Not our JSON.
    #[error("the file is no checkpoint")]
    Unreadable(#[from] serde_json::Error),
    /// Another version.
    #[error("the file has version {found:?}, this agent reads {expected:?}")]
    Version {
        /// What it says.
        found: String,
        /// What it should say.
        expected: &'static str,
    },
}

impl Checkpoint {
    /// What is held on one card; the file of card 0 is aws-node's, each further card has its own.
    pub fn of(store: &Datastore, network_card: u16) -> Self {
        let allocations = store.allocations().iter().flat_map(|(key, allocation)| {
            let held = allocation.held.iter().filter(move |held| held.network_card == network_card);
            held.map(move |held| CheckpointEntry::of(key, allocation, held.address))
        });
        Self { version: CHECKPOINT_VERSION.to_owned(), allocations: allocations.collect() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it is of another version or no checkpoint at all.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let file: Self = serde_json::from_str(text)?;
        if file.version != CHECKPOINT_VERSION {
            return Err(CheckpointError::Version { found: file.version, expected: CHECKPOINT_VERSION });
        }
        Ok(file)
    }
}

impl CheckpointEntry {
    fn of(key: &IpamKey, allocation: &Allocation, address: IpAddr) -> Self {
        let (ipv4, ipv6) = match address {
            IpAddr::V4(address) => (Some(address), None),
            IpAddr::V6(address) => (None, Some(address)),
        };
        Self {
            network_name: key.network_name.clone(),
            container_id: key.container_id.clone(),
            if_name: key.if_name.clone(),
            ipv4,
            ipv6,
            allocation_timestamp: allocation.since_ns,
            metadata: CheckpointMetadata {
                namespace: allocation.pod.namespace.clone(),
                name: allocation.pod.name.clone(),
                interfaces: u32::try_from(allocation.held.len()).unwrap_or(u32::MAX),
            },
        }
    }
}

impl CoolingFile {
    /// The cool-downs that have not ended. `boot` began by the clock of `now`.
    pub fn of(store: &Datastore, now: Time, boot: Option<Boot>) -> Self {
        let cooling =
            store.cooling(now).map(|(address, Rest { until, going })| CoolingEntry { address, until, going: Some(going) }).collect();
        let moved = store.moved(now).map(|(cidr, eni, until)| MovedEntry { cidr, eni: eni.clone(), until }).collect();
        Self { version: COOLING_VERSION.to_owned(), boot, cooling, moved }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it is of another version or no such file at all.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let file: Self = serde_json::from_str(text)?;
        if file.version != COOLING_VERSION {
            return Err(CheckpointError::Version { found: file.version, expected: COOLING_VERSION });
        }
        Ok(file)
    }

    /// Its times by the clock by which `boot` began; those of another boot as they are.
    #[must_use]
    pub fn reckoned(mut self, boot: Option<&Boot>) -> Self {
        if let (Some(boot), Some(written)) = (boot, self.boot.take()) {
            let ends = self.cooling.iter_mut().map(|entry| &mut entry.until).chain(self.moved.iter_mut().map(|entry| &mut entry.until));
            for until in ends {
                until.0 = boot.reckon(&written, until.0).unwrap_or(until.0);
            }
        }
        self
    }
}

/// What became of a checkpoint's entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Entries that hold their address again.
    pub kept: usize,
    /// Entries of pods whose veth is gone: their address cools down.
    pub released: Vec<(IpamKey, IpAddr)>,
    /// Kept, but no ENI has the address: EC2 will tell.
    pub without_eni: Vec<(IpamKey, IpAddr)>,
    /// Two entries with one address; the second is not taken.
    pub refused: Vec<(IpamKey, IpAddr)>,
}

/// Takes a checkpoint's entries into the store. An allocation is given up only when its pod's veth is gone; entries without
/// a pod's name (old releases) are kept, as nobody can tell. `has_veth` says whether a pod's host veth is there.
pub fn restore(store: &mut Datastore, file: &Checkpoint, network_card: u16, now: Time, has_veth: impl Fn(&PodName) -> bool) -> Restored {
    let mut out = Restored::default();
    for entry in &file.allocations {
        let Some(address) = entry.ipv4.map(IpAddr::V4).or(entry.ipv6.map(IpAddr::V6)) else { continue };
        let key =
            IpamKey { network_name: entry.network_name.clone(), container_id: entry.container_id.clone(), if_name: entry.if_name.clone() };
        let pod = PodName::new(entry.metadata.namespace.clone(), entry.metadata.name.clone());
        let allocation = Allocation { pod: pod.clone(), since_ns: entry.allocation_timestamp, held: vec![Held { network_card, address }] };
        if store.restore(key.clone(), allocation).is_err() {
            out.refused.push((key, address));
        } else if !pod.name.is_empty() && !has_veth(&pod) {
            store.release(&key, now);
            out.released.push((key, address));
        } else {
            out.kept += 1;
            if store.eni_of(address).is_none() {
                out.without_eni.push((key, address));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::store::PoolMode;
    use super::*;

    /// As aws-node v1.23 writes it.
    const UPSTREAM: &str = r#"{"version":"vpc-cni-ipam/1","allocations":[{"networkName":"aws-cni","containerID":"3e1f","ifName":"eth0","ipv4":"10.0.5.7","allocationTimestamp":1700000000000000000,"metadata":{"k8sPodNamespace":"default","k8sPodName":"web-1","interfacesCount":1}},{"networkName":"_migrated-from-cri","containerID":"77aa","ifName":"unknown","ipv4":"10.0.5.8","allocationTimestamp":1700000000000000001,"metadata":{}}]}"#;

    #[test]
    fn aws_nodes_file_is_written_as_it_was_read() {
        let file = Checkpoint::parse(UPSTREAM).expect("upstream's file");
        assert_eq!(serde_json::to_string(&file).expect("serialises"), UPSTREAM);
        let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        let restored = restore(&mut store, &file, 0, Time(5), |_| true);
        assert_eq!((restored.kept, restored.without_eni.len()), (2, 2), "no ENI has them, and they are kept all the same");
        let mut written = Checkpoint::of(&store, 0);
        written.allocations.sort_by_key(|entry| entry.allocation_timestamp);
        let mut unnamed = file.clone();
        unnamed.allocations[1].metadata.interfaces = 1;
        assert_eq!(written, unnamed);
    }

    #[test]
    fn a_pod_without_veth_gives_its_address_up_and_one_without_name_keeps_it() {
        let file = Checkpoint::parse(UPSTREAM).expect("upstream's file");
        let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        let restored = restore(&mut store, &file, 0, Time(5), |_| false);
        assert_eq!(restored.kept, 1);
        assert_eq!(restored.released.len(), 1);
        assert_eq!(store.cooling(Time(5)).count(), 1, "the address of the pod that is gone cools down");
    }

    #[test]
    fn one_address_is_never_held_twice() {
        let mut file = Checkpoint::parse(UPSTREAM).expect("upstream's file");
        file.allocations[1].ipv4 = file.allocations[0].ipv4;
        let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        let restored = restore(&mut store, &file, 0, Time(5), |_| true);
        assert_eq!((restored.kept, restored.refused.len()), (1, 1));
    }

    #[test]
    fn other_versions_are_refused() {
        assert!(matches!(Checkpoint::parse(r#"{"version":"vpc-cni-ipam/2","allocations":[]}"#), Err(CheckpointError::Version { .. })));
        assert!(matches!(Checkpoint::parse("[]"), Err(CheckpointError::Unreadable(_))));
        let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        store.restore_cooling("10.0.0.9".parse().expect("address"), Rest { until: Time(40_000), going: false });
        store.cool("10.0.0.16/30".parse().expect("range"), Time(39_000));
        let file = CoolingFile::of(&store, Time(10), None);
        let read = CoolingFile::parse(&serde_json::to_string(&file).expect("serialises")).expect("reads");
        assert_eq!(read, file);
        assert!(CoolingFile::of(&store, Time(40_000), None).cooling.is_empty());
    }

    #[test]
    fn an_old_picture_does_not_bring_a_range_back_to_the_eni_it_left() {
        let (left, came): (EniId, EniId) = ("eni-1".into(), "eni-2".into());
        let range: IpNet = "10.0.0.9/32".parse().expect("range");
        let mut store = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        store.cool(range, Time(180_000));
        assert!(store.granted(&came, range, Time(400)), "must be on disk first");
        assert!(!store.granted(&came, "10.0.0.10/32".parse().expect("range"), Time(400)), "was on no other");
        let text = serde_json::to_string(&CoolingFile::of(&store, Time(500), None)).expect("serialises");
        // The process ends, and EC2's first answer to the next one is older than the move.
        let mut next = Datastore::new(PoolMode::SecondaryIps, Duration::from_secs(30));
        for MovedEntry { cidr, eni, until } in CoolingFile::parse(&text).expect("reads").moved {
            next.restore_moved(cidr, eni, until);
        }
        assert!(next.is_elsewhere(&left, range, Time(1_000)) && !next.is_elsewhere(&came, range, Time(1_000)));
        assert!(!next.is_elsewhere(&left, range, Time(180_000)), "no picture is that old");
        next.cool(range, Time(200_000));
        assert!(!next.is_elsewhere(&left, range, Time(1_000)), "it leaves again");
    }
}
