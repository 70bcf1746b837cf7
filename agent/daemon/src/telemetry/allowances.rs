//! Watches the network allowances of the instance where no metric tick does: in the container of the network role, when telemetry
//! has a container of its own, which may not write events.

use std::path::{Path, PathBuf};
use std::time::Duration;

use stanchion_core::metrics::model::{AllowanceAlarm, AllowanceSample};
use stanchion_netlink::ethtool;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::WAITING_ALARMS;

/// Whether a device is behind an interface.
pub(super) fn is_physical(sys: &Path, interface: &str) -> bool {
    sys.join("class/net").join(interface).join("device").exists()
}

/// The allowance counters of an interface; `None` if its driver is not ENA.
pub(super) fn counters(interface: &str) -> Option<AllowanceSample> {
    let counters = ethtool::statistics(interface).ok()?;
    AllowanceSample::from_counters(interface, counters.iter().map(|(name, value)| (name.as_str(), *value)))
}

/// Looks at the counters of this network namespace every `interval` and tells those that rose.
pub fn watch(sys: PathBuf, interval: Duration, shutdown: CancellationToken) -> (broadcast::Receiver<AllowanceAlarm>, JoinHandle<()>) {
    let (alarms, receiver) = broadcast::channel(WAITING_ALARMS);
    let look = move || {
        let names = std::fs::read_dir(sys.join("class/net")).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| is_physical(&sys, name)).filter_map(|name| counters(&name)).collect()
    };
    (receiver, tokio::spawn(follow(look, interval, alarms, shutdown)))
}

async fn follow(
    mut look: impl FnMut() -> Vec<AllowanceSample> + Send,
    interval: Duration,
    alarms: broadcast::Sender<AllowanceAlarm>,
    shutdown: CancellationToken,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut before: Vec<AllowanceSample> = Vec::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let now = look();
        for sample in &now {
            let last = before.iter().find(|last| last.interface == sample.interface);
            for alarm in last.into_iter().flat_map(|last| sample.risen_since(last)) {
                // Nobody may be listening.
                let _heard = alarms.send(alarm);
            }
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The driver counts from the instance's start: what was before the first look is not new, and nor is what a driver that was
    /// loaded anew counts until it is more.
    #[tokio::test(start_paused = true)]
    async fn what_rises_between_two_looks_is_told_once() {
        let counts = [7, 7, 10, 2, 3];
        let mut looks = counts.into_iter();
        let look = move || match looks.next() {
            Some(pps) => vec![AllowanceSample { interface: "ens5".into(), pps, ..AllowanceSample::default() }],
            None => Vec::new(),
        };
        let (sender, mut alarms) = broadcast::channel(8);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(follow(look, Duration::from_secs(60), sender, shutdown.clone()));
        let told = [alarms.recv().await.unwrap(), alarms.recv().await.unwrap()];
        assert_eq!(told.each_ref().map(|alarm| (alarm.allowance, alarm.packets)), [("pps", 3), ("pps", 1)]);
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(alarms.try_recv().is_err(), "nothing rose");
        shutdown.cancel();
        task.await.unwrap();
    }
}
