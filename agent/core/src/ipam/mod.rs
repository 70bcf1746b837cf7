//! Addresses: who holds which, how many to keep ready, what to ask EC2 for.
//!
//! Everything is a function of its arguments, the time among them ([`Time`]).

mod types;

pub use types::{IpamKey, Time};
