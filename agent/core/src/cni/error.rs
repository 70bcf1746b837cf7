//! The error that a runtime reads from standard output.

use serde_json::{Value, json};

/// A failure of the plugin, with the specification's code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct CniError {
    /// What kind.
    pub code: ErrorCode,
    /// One sentence, which ends up in the kubelet's event.
    pub msg: String,
    /// More, for the log.
    pub details: String,
}

/// The specification's codes that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// 1
    IncompatibleVersion,
    /// 2
    UnsupportedField,
    /// 3
    UnknownContainer,
    /// 4
    InvalidEnvironment,
    /// 5
    Io,
    /// 6
    Decode,
    /// 7
    InvalidConfig,
    /// 11: the runtime may try again
    TryAgain,
    /// 50, STATUS: an ADD could not be served now
    NotAvailable,
    /// 100: the kernel refused
    Kernel,
    /// 101, CHECK: the pod's network is not as it was set up
    Differs,
}

// === impl ErrorCode ===

impl ErrorCode {
    /// The number.
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::UnknownContainer => 3,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgain => 11,
            Self::NotAvailable => 50,
            Self::Kernel => 100,
            Self::Differs => 101,
        }
    }
}

// === impl CniError ===

impl CniError {
    /// An error without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// The same error with `details`.
    #[must_use]
    pub fn with_details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }

    /// The document for standard output; `version` is the configuration's.
    pub fn to_json(&self, version: &str) -> Value {
        let mut document = json!({"cniVersion": version, "code": self.code.number(), "msg": self.msg});
        if !self.details.is_empty() {
            document["details"] = self.details.clone().into();
        }
        document
    }
}
