//! From bytes of container log files to legal PutLogEvents batches, and back to safe file offsets.
//!
//! | module | what it decides |
//! |---|---|
//! | [`json`] | escaping on the hot path |
//! | [`batch`] | when a batch is full, and its wire form |

pub mod batch;
pub mod json;

pub use batch::{BatchBuilder, LogBatch};
