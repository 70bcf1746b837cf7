//! Releases that wait for the agent: one small file each, written by the plugin, read and removed by the agent.
//!
//! ```text
//! /var/run/stanchion/spool/<CNI_CONTAINERID>-<CNI_IFNAME>.json
//! ```
//! The name makes a repeated DEL write the same file again. A file is complete or not there (temporary name, fsync, rename);
//! temporary names start with a dot.

use serde::{Deserialize, Serialize};

/// A release that could not be delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spooled {
    /// Of this file's form; 1.
    pub version: u32,
    /// The conflist's name.
    pub network_name: String,
    /// The sandbox.
    pub container_id: String,
    /// Its interface.
    pub if_name: String,
    /// The pod's namespace, empty if the runtime did not say.
    pub pod_namespace: String,
    /// The pod's name.
    pub pod_name: String,
    /// `PodDeleted` or `SetupNSFailed`.
    pub reason: String,
}

/// The present [`Spooled::version`].
pub const VERSION: u32 = 1;

/// Why a file of the spool directory is not a release.
#[derive(Debug, thiserror::Error)]
pub enum BadSpooled {
    /// No JSON of this form.
    #[error("not readable")]
    Json(#[from] serde_json::Error),
    /// Written by a later plugin.
    #[error("version {0} is not known here")]
    Version(u32),
}

// === impl Spooled ===

impl Spooled {
    /// Reads a file's content.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(text: &[u8]) -> Result<Self, BadSpooled> {
        let spooled: Self = serde_json::from_slice(text)?;
        if spooled.version == VERSION { Ok(spooled) } else { Err(BadSpooled::Version(spooled.version)) }
    }

    /// The file's name. Container ids and interface names have no `/` (checked when the call was read).
    pub fn file_name(&self) -> String {
        format!("{}-{}.json", self.container_id, self.if_name)
    }

    /// Whether a directory entry is a complete release.
    pub fn is_file_name(name: &str) -> bool {
        !name.starts_with('.') && name.ends_with(".json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_survives_the_file() {
        let spooled = Spooled {
            version: VERSION,
            network_name: "aws-cni".into(),
            container_id: "57601f51".into(),
            if_name: "eth0".into(),
            pod_namespace: "default".into(),
            pod_name: "cli".into(),
            reason: "PodDeleted".into(),
        };
        let text = serde_json::to_vec(&spooled).unwrap();
        assert_eq!(Spooled::parse(&text).unwrap(), spooled);
        assert!(Spooled::is_file_name(&spooled.file_name()));
        assert!(!Spooled::is_file_name(".57601f51-eth0.json"));
        let later = Spooled { version: 2, ..spooled };
        assert!(matches!(Spooled::parse(&serde_json::to_vec(&later).unwrap()), Err(BadSpooled::Version(2))));
    }
}
