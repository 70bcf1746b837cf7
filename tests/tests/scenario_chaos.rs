//! Storms of faults over a living node. `cargo xtask soak` runs them for as long as it is told.

use stanchion_lab::chaos::{self, Until};

/// The number in an environment variable.
fn asked(variable: &str, default: u32) -> u32 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn storms_break_no_promise() {
    let (seed, storms) = (asked("STANCHION_CHAOS_SEED", 1), asked("STANCHION_CHAOS_STORMS", 6));
    let report =
        chaos::run(seed.into(), Until::Storms(storms), |line| println!("{line}")).await.unwrap_or_else(|error| panic!("{error:#}"));
    println!("{report:#?}");
    assert_eq!(report.storms, storms);
    assert!(report.faults.values().map(|drawn| drawn.times).sum::<u32>() >= storms, "{report:?}");
    assert!(report.faults.get("agent killed").is_some_and(|drawn| drawn.hit > 0), "{report:?}");
    assert!(report.pods[0] >= storms && report.probes.iter().all(|probes| *probes > 0) && report.denied > 0, "{report:?}");
    assert!(report.exchanges > 0 && report.intrusions > 0 && report.lines > 0, "{report:?}");
}
