//! Network policy, pure: model, resolve, compile, diff, verdict and explanation.

mod classes;
pub mod dns;
pub mod engine;
pub mod frames;
pub mod image;
mod intern;
pub mod maps;
pub mod model;
pub mod names;
pub mod objects;
mod order;
pub mod ports;
mod program;
pub mod resolve;
mod resolved;
pub mod services;
mod subjects;
pub mod verdict;
pub mod world;

pub use intern::RuleName;

#[cfg(test)]
mod proof;
