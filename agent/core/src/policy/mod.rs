//! Network policy, pure: model, resolve, compile, diff, verdict and explanation.

pub mod image;
pub mod objects;
