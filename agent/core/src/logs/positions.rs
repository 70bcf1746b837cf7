//! The positions file: how far each log file is acknowledged, across restarts.
//!
//! A hint, not the truth: a file counts as the same only when inode and the fingerprint of its first bytes agree, as ext4 and xfs give a
//! freed inode number to the next file, and for less than a full fingerprint the device too. A boot numbers devices in the order in which
//! they are found. Whatever cannot be read leaves the files without position.

use serde::{Deserialize, Serialize};

/// Format of the file; another number is refused.
pub const VERSION: u32 = 1;
/// First bytes that the fingerprint covers; a CRI line begins with a time in nanoseconds, so its first line is unique.
pub const FINGERPRINT_BYTES: usize = 256;

/// The first bytes of a file, hashed, and how many they were when it was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Number of bytes hashed: at most [`FINGERPRINT_BYTES`], 0 for a file that was empty.
    pub len: u32,
    /// FNV-1a, 64 bits.
    pub hash: u64,
}

impl Fingerprint {
    /// Of the first bytes of `head`.
    pub fn of(head: &[u8]) -> Self {
        let head = &head[..head.len().min(FINGERPRINT_BYTES)];
        let hash = head.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self { len: u32::try_from(head.len()).unwrap_or(0), hash }
    }

    /// Whether a file that begins with `head` can be the one this was taken of: files only grow.
    pub fn matches(self, head: &[u8]) -> bool {
        head.get(..self.len as usize).is_some_and(|same| Self::of(same) == self)
    }

    /// It covers as much as a fingerprint can.
    pub fn is_full(self) -> bool {
        self.len as usize == FINGERPRINT_BYTES
    }
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The live path it was followed under: names the container, also when the file is rotated.
    pub path: String,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
    /// First bytes.
    pub fingerprint: Fingerprint,
    /// Acknowledged bytes.
    pub offset: u64,
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// [`VERSION`].
    pub version: u32,
    /// The node that wrote it: a file that came with a disk image of another node is not ours.
    pub node: String,
    /// In no order that matters.
    pub files: Vec<Position>,
}

/// Why a positions file is not used.
#[derive(Debug, thiserror::Error)]
pub enum PositionsError {
    /// Cut off, or not JSON.
    #[error("positions file is not readable")]
    Unreadable(#[from] serde_json::Error),
    /// Written by another version.
    #[error("positions file has version {0}, this agent reads {VERSION}")]
    Version(u32),
    /// Written on another node.
    #[error("positions file is of node {0}")]
    OtherNode(String),
}

impl Positions {
    /// Reads the file's text, written on `node`.
    ///
    /// # Errors
    /// Not JSON, another version, another node.
    pub fn parse(text: &[u8], node: &str) -> Result<Self, PositionsError> {
        let positions: Self = serde_json::from_slice(text)?;
        if positions.version != VERSION {
            return Err(PositionsError::Version(positions.version));
        }
        if positions.node != node {
            return Err(PositionsError::OtherNode(positions.node));
        }
        Ok(positions)
    }

    /// The file's text.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and strings are JSON")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_grown_file_still_matches(head in proptest::collection::vec(any::<u8>(), 0..400), more in proptest::collection::vec(any::<u8>(), 0..400)) {
            let taken = Fingerprint::of(&head);
            let grown: Vec<u8> = head.iter().chain(&more).copied().collect();
            prop_assert!(taken.matches(&grown));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Positions::parse(&bytes, "n");
        }

        #[test]
        fn a_file_cut_off_anywhere_is_refused(cut in 0_usize..1000) {
            let position = Position { path: "/var/log/x".into(), dev: 1, inode: 2, fingerprint: Fingerprint::of(b"abc"), offset: 7 };
            let whole = Positions { version: VERSION, node: "n".into(), files: vec![position] };
            let text = whole.to_json();
            prop_assert_eq!(&Positions::parse(&text, "n").unwrap(), &whole);
            prop_assert!(Positions::parse(&text[..cut.min(text.len() - 1)], "n").is_err());
        }
    }

    /// A file as version 1 was first written: every later agent reads it, so that an upgrade sends no line twice.
    #[test]
    fn a_file_of_version_1_is_read() {
        let file = r#"{"version":1,"node":"n1","files":[{"path":"/var/log/pods/default_web-f4ght_fb82973a/main/0.log","dev":65024,"inode":6570906,"fingerprint":{"len":256,"hash":6238434280504828607},"offset":82187}]}"#;
        let positions = Positions::parse(file.as_bytes(), "n1").unwrap();
        let expected = Position {
            path: "/var/log/pods/default_web-f4ght_fb82973a/main/0.log".into(),
            dev: 65024,
            inode: 6_570_906,
            fingerprint: Fingerprint { len: 256, hash: 6_238_434_280_504_828_607 },
            offset: 82187,
        };
        assert_eq!(positions.files, [expected]);
        assert_eq!(positions.to_json(), file.as_bytes(), "what is written now is read by the agent before");
    }

    #[test]
    fn another_node_and_version_are_refused() {
        let text = Positions { version: VERSION, node: "n".into(), files: Vec::new() }.to_json();
        assert!(matches!(Positions::parse(&text, "other"), Err(PositionsError::OtherNode(_))));
        let text = Positions { version: 9, node: "n".into(), files: Vec::new() }.to_json();
        assert!(matches!(Positions::parse(&text, "n"), Err(PositionsError::Version(9))));
    }

    #[test]
    fn another_file_does_not_match() {
        assert!(!Fingerprint::of(b"2026-11-20T10:00:01").matches(b"2026-11-20T10:00:02"));
        assert!(!Fingerprint::of(b"long first line").matches(b"long"));
    }
}
