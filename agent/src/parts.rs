//! The agent's parts, which run until it is told to end. One that ends before, by a panic or by itself, ends the agent: what supervises the
//! process starts it anew, and pods keep network and policy meanwhile. A part that is gone would be missed only when a pod needs it.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// When a part ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    WithTheAgent,
    WhenDone,
}

/// A part's name, when it ends, and how it did.
type Ended = (&'static str, Ends, Result<()>);

/// The parts that run.
pub(crate) struct Parts {
    running: FuturesUnordered<BoxFuture<'static, Ended>>,
    shutdown: CancellationToken,
}

impl Parts {
    /// None yet.
    pub(crate) fn new(shutdown: CancellationToken) -> Self {
        Self { running: FuturesUnordered::new(), shutdown }
    }

    /// A part that runs as long as the agent.
    pub(crate) fn add(&mut self, name: &'static str, task: JoinHandle<()>) {
        self.push(name, Ends::WithTheAgent, async move { task.await.map_err(fault) });
    }

    /// The same, of a part that may fail to start.
    pub(crate) fn add_fallible<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        name: &'static str,
        task: JoinHandle<Result<(), E>>,
    ) {
        self.push(name, Ends::WithTheAgent, async move { Ok(task.await.map_err(fault)??) });
    }

    /// A part that ends when its work is done.
    pub(crate) fn add_errand(&mut self, name: &'static str, task: JoinHandle<()>) {
        self.push(name, Ends::WhenDone, async move { task.await.map_err(fault) });
    }

    fn push(&mut self, name: &'static str, ends: Ends, outcome: impl Future<Output = Result<()>> + Send + 'static) {
        self.running.push(Box::pin(async move { (name, ends, outcome.await) }));
    }

    /// Returns when a part ended that should not have, with the reason; not for an agent that was told to end.
    pub(crate) async fn failed(&mut self) -> anyhow::Error {
        while let Some((name, ends, how)) = self.running.next().await {
            let failure = match (how, ends) {
                _ if self.shutdown.is_cancelled() => break,
                (Ok(()), Ends::WhenDone) => continue,
                (Ok(()), Ends::WithTheAgent) => anyhow!("it returned"),
                (Err(failure), _) => failure,
            };
            return failure.context(format!("{name} ended, and the agent with it"));
        }
        std::future::pending().await
    }

    /// Waits for the end of all that are left.
    pub(crate) async fn end(mut self, within: Duration) {
        let all = async {
            while let Some((name, _, how)) = self.running.next().await {
                if let Err(error) = how {
                    warn!(task = name, error = format!("{error:#}"), "ended badly");
                }
            }
        };
        if tokio::time::timeout(within, all).await.is_err() {
            warn!("not every task ended in time");
        }
    }
}

/// Serves until the agent is told to end, then waits for its parts.
///
/// # Errors
/// The server's; or that of the first part that ended before.
pub(crate) async fn serve<E>(mut parts: Parts, server: impl Future<Output = Result<(), E>>, grace: Duration) -> Result<()>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let shutdown = parts.shutdown.clone();
    let outcome = tokio::select! {
        served = server => match served {
            Ok(()) if !shutdown.is_cancelled() => Err(anyhow!("nobody listens at the socket any more")),
            served => served.context("serve the socket"),
        },
        failure = parts.failed() => Err(failure),
    };
    if let Err(failure) = &outcome {
        error!(error = format!("{failure:#}"), "the agent ends; pods keep network and policy");
    }
    shutdown.cancel();
    parts.end(grace).await;
    outcome
}

/// Why a task has no result.
fn fault(error: JoinError) -> anyhow::Error {
    match error.try_into_panic() {
        Ok(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
            anyhow!("it panicked: {}", text.unwrap_or_else(|| "for no reason that is text".to_owned()))
        }
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const GRACE: Duration = Duration::from_secs(12);

    /// A part that runs until the agent ends, and says that it did.
    fn orderly(shutdown: &CancellationToken) -> (Arc<AtomicBool>, JoinHandle<()>) {
        let (ended, shutdown) = (Arc::new(AtomicBool::new(false)), shutdown.clone());
        let told = Arc::clone(&ended);
        let task = tokio::spawn(async move {
            shutdown.cancelled().await;
            told.store(true, Ordering::Relaxed);
        });
        (ended, task)
    }

    /// As the socket's: it ends with the agent, but not while a client holds its connection.
    async fn server(shutdown: CancellationToken, is_held: bool) -> Result<(), std::io::Error> {
        shutdown.cancelled().await;
        if is_held { std::future::pending().await } else { Ok(()) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_ends_early_ends_the_agent_and_is_named() {
        type How = fn() -> Result<(), std::fmt::Error>;
        let bad: [(How, &str); 3] = [
            (|| panic!("slot {} has no pod", 7), "policy ended, and the agent with it: it panicked: slot 7 has no pod"),
            (|| Ok(()), "policy ended, and the agent with it: it returned"),
            (|| Err(std::fmt::Error), "policy ended, and the agent with it: an error occurred when formatting an argument"),
        ];
        for (how, told) in bad {
            let shutdown = CancellationToken::new();
            let mut parts = Parts::new(shutdown.clone());
            let (ended, task) = orderly(&shutdown);
            parts.add("logs", task);
            parts.add_errand("policy for running pods", tokio::spawn(async {}));
            parts.add_fallible(
                "policy",
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(5)).await;
                    how()
                }),
            );
            let error = serve(parts, server(shutdown.clone(), true), GRACE).await.expect_err("a part is gone");
            assert_eq!(format!("{error:#}"), told);
            assert!(shutdown.is_cancelled() && ended.load(Ordering::Relaxed), "the others end in order");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_errand_that_panics_ends_the_agent_too() {
        let shutdown = CancellationToken::new();
        let mut parts = Parts::new(shutdown.clone());
        parts.add_errand("policy for running pods", tokio::spawn(async { panic!("no route") }));
        let error = serve(parts, server(shutdown, false), GRACE).await.expect_err("it is gone");
        assert_eq!(format!("{error:#}"), "policy for running pods ended, and the agent with it: it panicked: no route");
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_is_told_to_end_waits_for_its_parts_and_not_for_ever() {
        let shutdown = CancellationToken::new();
        let mut parts = Parts::new(shutdown.clone());
        let (ended, task) = orderly(&shutdown);
        parts.add("logs", task);
        parts.add("policy", tokio::spawn(std::future::pending()));
        let teller = shutdown.clone();
        let _signal = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            teller.cancel();
        });
        serve(parts, server(shutdown, false), GRACE).await.expect("it was told to");
        assert!(ended.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_nobody_serves_ends_the_agent() {
        let shutdown = CancellationToken::new();
        let served = serve(Parts::new(shutdown.clone()), async { Ok::<_, std::io::Error>(()) }, GRACE).await;
        assert_eq!(served.expect_err("nobody listens").to_string(), "nobody listens at the socket any more");
        assert!(shutdown.is_cancelled());
    }
}
