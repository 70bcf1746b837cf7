//! What the agent costs while nothing happens: the whole agent, and by itself the metric tick of a full node over real cgroups.

use std::time::Duration;

use super::{Progress, Row, idle_agent, tick};

/// Measures the tick, then the whole agent for `window`.
///
/// # Errors
/// When the lab or cgroups cannot be made, /proc cannot be read, or the agent does not settle within its deadlines.
pub fn run(quick: bool, window: Duration) -> anyhow::Result<Vec<Row>> {
    let progress = Progress::start();
    let mut rows = tick::run(quick, &progress)?;
    rows.extend(idle_agent::run(quick, window, &progress)?);
    Ok(rows)
}
