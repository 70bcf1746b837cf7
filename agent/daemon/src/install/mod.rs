//! What the host gets: the plugin's binary, the network configuration, kernel settings.
//!
//! | task | input | output | owns | on panic |
//! |---|---|---|---|---|
//! | conflist | readiness of addresses and policy, the runtime's version | `10-aws.conflist` | that file | the file stays as it is; pods keep their network |

mod chained;
pub mod conflist;
pub mod files;
mod loopback;
pub mod steps;
