//! The whole agent in a simulated world; `stanchion_lab::simulation` says what is inside.
//!
//! ```text
//! STANCHION_SIM_SEED=17 cargo test -p stanchion-lab --test simulation     # one seed, with what the daemon logs
//! cargo xtask soak --simulate --minutes 60                                # seed after seed
//! ```

use stanchion_lab::simulation::{EVENTS, STEPS, Told, again, run};

/// What CI runs.
const SEEDS: u64 = 4;

#[test]
fn no_seed_breaks_a_promise() {
    let seeds = match std::env::var("STANCHION_SIM_SEED") {
        Ok(text) => {
            let seed: u64 = text.parse().expect("STANCHION_SIM_SEED is a number");
            // As the daemon logs it: RUST_LOG=stanchion_daemon=debug.
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    };
    let mut sum = Told::default();
    let count = seeds.end - seeds.start;
    for seed in seeds {
        sum += run(seed, STEPS).unwrap_or_else(|error| panic!("{error:#}; again: {}", again(seed, STEPS)));
    }
    println!("{sum:#?}");
    assert_eq!(sum.steps, count * STEPS);
    if count == SEEDS {
        let unseen: Vec<_> = EVENTS.into_iter().filter(|event| !sum.events.contains_key(event)).collect();
        assert!(unseen.is_empty(), "{unseen:?} never happened");
        assert!(sum.refused > 0, "{sum:?}");
    }
    assert!(sum.healthy >= 3 * count, "{sum:?}");
    assert!(sum.pods > 0 && sum.lines > 0 && sum.verdicts > 1_000 && sum.seconds > 3_600, "{sum:?}");
}
