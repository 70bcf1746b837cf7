//! Newtypes for what has an id, so that a subnet id is never passed for an ENI id.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Wraps the text as it came.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The text as it came.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

text_id!(
    /// An elastic network interface: `eni-0123456789abcdef0`.
    EniId
);
text_id!(
    /// The attachment of an ENI to an instance: `eni-attach-…`.
    AttachmentId
);
text_id!(
    /// `subnet-…`.
    SubnetId
);
text_id!(
    /// `vpc-…`.
    VpcId
);
text_id!(
    /// `sg-…`.
    SecurityGroupId
);
text_id!(
    /// An EC2 instance: `i-…`.
    InstanceId
);
text_id!(
    /// The runtime's id of a sandbox or container, as in `CNI_CONTAINERID`.
    ContainerId
);

impl ContainerId {
    /// Stands for the sandbox of a pod that runs, of which nobody has told the id. No runtime's id has a space in it.
    pub fn stand_in(pod: &PodName) -> Self {
        Self::new(format!("of pod {pod}"))
    }

    /// Whether this only stands for a sandbox: no list of a runtime has it.
    pub fn is_stand_in(&self) -> bool {
        self.as_str().contains(' ')
    }
}

/// An Ethernet address, written `02:00:0a:00:00:01`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// A text that is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address of the form 02:00:0a:00:00:01")]
pub struct BadMac(pub String);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        f.pad(&format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}"))
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A pod by namespace and name, written `namespace/name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodName {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name in it.
    pub name: String,
}

impl PodName {
    /// Joins a namespace and a name.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.namespace, self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_round_trips_and_refuses_nonsense() {
        let mac: Mac = "02:00:0a:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:0a:00:00:01");
        for bad in ["", "02", "02:00:0a:00:00", "02:00:0a:00:00:01:02", "zz:00:0a:00:00:01", "+2:00:0a:00:00:01", "2:0:a:0:0:1"] {
            assert_eq!(bad.parse::<Mac>(), Err(BadMac(bad.to_owned())));
        }
    }
}
