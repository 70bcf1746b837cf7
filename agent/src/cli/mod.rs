//! The subcommands: arguments in, a view for people or JSON for scripts out.

pub(crate) mod agent;
pub(crate) mod client;
pub(crate) mod cost;
mod fleet;
pub(crate) mod inspect;
pub(crate) mod install;
pub(crate) mod migrate;
pub(crate) mod plan;
pub(crate) mod policy;
pub(crate) mod shell;
pub(crate) mod ship;
pub(crate) mod support;
mod table;
pub(crate) mod top;
