//! `grpc.health.v1` on the agent's socket, for probes that ask it: it says what readiness says.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// How often readiness is looked at. It also changes when nothing happens: a task that hangs tells nobody.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Keeps the whole agent's health (the service with the empty name) at what `ready` answers, until the agent ends.
pub async fn follow(health: HealthReporter, ready: impl Fn() -> bool, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        let status = if ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.set_service_status("", status).await;
    }
    health.set_service_status("", ServingStatus::NotServing).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_server::Health as _;
    use tonic_health::server::HealthService;

    use super::*;

    async fn serving(service: &HealthService) -> bool {
        let reply = service.check(tonic::Request::new(HealthCheckRequest::default())).await.expect("the empty service is known");
        reply.into_inner().status == i32::from(ServingStatus::Serving as u8)
    }

    #[tokio::test(start_paused = true)]
    async fn health_is_readiness() {
        let (health, ready, shutdown) = (HealthReporter::new(), Arc::new(AtomicBool::new(false)), CancellationToken::new());
        let service = HealthService::from_health_reporter(health.clone());
        let asked = Arc::clone(&ready);
        let task = tokio::spawn(follow(health, move || asked.load(Ordering::Relaxed), shutdown.clone()));
        for now in [false, true, false, true] {
            ready.store(now, Ordering::Relaxed);
            tokio::time::sleep(LOOK_EVERY * 2).await;
            assert_eq!(serving(&service).await, now);
        }
        shutdown.cancel();
        task.await.expect("no panic");
        assert!(!serving(&service).await, "an agent that ends serves nobody");
    }
}
