//! The Container Network Interface: configuration, environment, results and errors as the specification has them.
//!
//! <https://www.cni.dev/docs/spec/>. Versions 0.3.0 to 1.1.0; what a runtime of one version sends or expects differs in small things, all
//! of which are in [`result`].

pub mod args;
pub mod config;
pub mod error;
pub mod result;
pub mod spool;
pub mod version;

pub use args::{Invocation, Verb};
pub use config::NetConf;
pub use error::{CniError, ErrorCode};
pub use result::{CniResult, Interface, IpConfig, PrevResult};
pub use spool::Spooled;
pub use version::Version;
