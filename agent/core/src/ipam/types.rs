//! The words that every part of IPAM shares.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::ContainerId;

/// A point in time as milliseconds since 1970. The wall clock, because cool-downs outlive the process; the caller reads
/// it once a turn and passes it in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// How long after `earlier` this is; zero if it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(rhs.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Time {
    type Output = Self;

    fn sub(self, rhs: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(rhs.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Time {
    /// RFC 3339 in UTC.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()) {
            Some(timestamp) => f.pad(&timestamp.to_string()),
            None => write!(f, "{} ms", self.0),
        }
    }
}

/// What an address is held for: the CNI specification's attachment (network, container, interface).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IpamKey {
    /// The conflist's name: `aws-cni`.
    pub network_name: String,
    /// The sandbox.
    pub container_id: ContainerId,
    /// `CNI_IFNAME`: `eth0`.
    pub if_name: String,
}

impl IpamKey {
    /// The key under which releases before 1.7 stored what they read from the runtime; tried once when a release finds
    /// nothing under its own key.
    pub fn legacy(&self) -> Self {
        Self { network_name: "_migrated-from-cri".to_owned(), container_id: self.container_id.clone(), if_name: "unknown".to_owned() }
    }
}

impl fmt::Display for IpamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network_name, self.container_id, self.if_name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_saturates_and_prints_as_utc() {
        assert_eq!(Time(5) - Duration::from_secs(1), Time(0));
        assert_eq!(Time(5).since(Time(9)), Duration::ZERO);
        assert_eq!((Time(0) + Duration::from_secs(90)).to_string(), "1970-01-01T00:01:30Z");
    }
}
