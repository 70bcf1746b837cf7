//! Waiting for a condition, with a deadline and the last reason why it does not hold.

use std::time::Duration;

use anyhow::bail;
use tokio::time::Instant;

/// Asks `check` again and again until it gives a value; its last error becomes part of the failure.
pub async fn wait_for<T, F>(what: &str, at_most: Duration, mut check: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let deadline = Instant::now() + at_most;
    loop {
        match check().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => bail!("waited {at_most:?} for {what}: {error:#}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(30)).await,
        }
    }
}
