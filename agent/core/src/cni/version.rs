//! Which versions of the specification are spoken.

use serde_json::{Value, json};

use super::error::{CniError, ErrorCode};

/// A version of the specification, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0
    V030,
    /// 0.3.1
    V031,
    /// 0.4.0: CHECK
    V040,
    /// 1.0.0: no `version` in addresses
    V100,
    /// 1.1.0: GC, STATUS
    V110,
}

// === impl Version ===

impl Version {
    /// All, oldest first.
    pub const ALL: [Self; 5] = [Self::V030, Self::V031, Self::V040, Self::V100, Self::V110];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V030 => "0.3.0",
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// The version of a configuration.
    ///
    /// # Errors
    /// Code 1 when it is not among [`Version::ALL`].
    pub fn negotiate(text: &str) -> Result<Self, CniError> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            CniError::new(ErrorCode::IncompatibleVersion, format!("cniVersion {text:?} is not supported; this plugin speaks {all}"))
        })
    }

    /// The answer to VERSION; `asked` is what the runtime's configuration said, if anything.
    pub fn report(asked: Option<&str>) -> Value {
        let asked = asked.unwrap_or(Self::V110.as_str());
        json!({"cniVersion": asked, "supportedVersions": Self::ALL.map(Self::as_str)})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_versions_are_taken() {
        assert_eq!(Version::negotiate("1.1.0"), Ok(Version::V110));
        assert_eq!(Version::negotiate("0.3.1"), Ok(Version::V031));
        for unknown in ["", "0.2.0", "1.2.0", "1.1", "v1.0.0"] {
            assert_eq!(Version::negotiate(unknown).unwrap_err().code, ErrorCode::IncompatibleVersion, "{unknown:?}");
        }
        assert!(Version::V040 < Version::V100);
    }
}
