//! From bytes of container log files to legal PutLogEvents batches, and back to safe file offsets.
//!
//! | module | what it decides |
//! |---|---|
//! | [`names`] | which container a file belongs to, which files are its rotated siblings |
//! | [`cri`] | the parts of one line |
//! | [`parser`] | the members that a pod's own parser finds in one |
//! | [`quota`] | how fast a namespace is read |
//! | [`config`] | the settings file |
//! | [`fluentbit`] | what of a Fluent Bit configuration has a counterpart |
//! | [`join`] | which lines are one event: split lines, then stack traces by the rules of [`multiline`] |
//! | [`journal`] | entries of the node's journal, and the streams that they go to |
//! | [`json`] | escaping on the hot path |
//! | [`batch`] | when a batch is full, and its wire form |
//! | [`entity`] | what CloudWatch is told a stream is about |
//! | [`gzip`] | how a body is compressed while it is written |
//! | [`ledger`] | how far a file is acknowledged |
//! | [`positions`] | what of that survives a restart |

pub mod batch;
pub mod config;
pub mod cri;
pub mod enrich;
pub mod entity;
pub mod fluentbit;
pub mod gzip;
pub mod join;
pub mod journal;
pub mod json;
pub mod ledger;
pub mod merge;
pub mod multiline;
pub mod names;
pub mod parser;
pub mod positions;
pub mod quota;
pub mod record;
pub mod route;
pub mod settings;

pub use batch::{BatchBuilder, LogBatch};
