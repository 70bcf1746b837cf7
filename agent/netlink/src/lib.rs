//! The kernel's side of the network plans: typed verbs over rtnetlink, network namespaces, sysctls, nft.
//!
//! Shared by the plugin (one attachment, two sockets, no runtime) and the agent ([`HostNet`], the real `HostNetwork`).
//! Requests are synchronous: the kernel answers within the call, and a batch of requests is one `sendto`.
//!
//! | task | input | output | ends |
//! |---|---|---|---|
//! | [`HostNet`]'s thread | plans, one at a time | a `HostReport` each | when the last handle is dropped; a panic makes `apply` answer `Closed` |
//! | [`monitor`] | the kernel's multicast groups | "something changed" | when its receiver is dropped |

pub mod apply;
pub mod arena;
pub mod ethtool;
mod host;
mod legacy;
mod message;
pub mod monitor;
pub mod netfilter;
pub mod netns;
pub mod nft;
pub mod observe;
pub mod process;
mod socket;
pub mod sysctl;
pub mod tc;
pub mod veth;
pub mod vlan;

pub use host::HostNet;
pub use legacy::has_legacy_tables;
pub use netns::{Netns, NetnsId};
pub use socket::{Netlink, NetlinkError};
