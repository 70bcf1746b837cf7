//! A few thousand inputs for every fuzz target, bred from its corpus: what CI can afford of fuzzing. Long runs are
//! `cargo fuzz run TARGET` in `tests/`.
//!
//! `STANCHION_FUZZ_INPUTS` sets how many inputs a target gets, `STANCHION_FUZZ_SEED` repeats a run: a failure prints both
//! and leaves the input in the temporary directory.

#[path = "../fuzz/targets.rs"]
#[allow(dead_code, unreachable_pub, reason = "the fuzzer's binaries name the targets one by one")]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use stanchion_lab::breed::bred;

use targets::TARGETS;

/// A commit is judged by the same inputs wherever it is tested; other seeds are for long runs.
const SEED: u64 = 20_261_121;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("read the corpus").path())
        .collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("read the corpus")).collect()
}

fn run(name: &str, seed: u64, input: &[u8], target: targets::Target) {
    if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        let file = std::env::temp_dir().join(format!("stanchion-fuzz-{name}-{seed}"));
        let kept = std::fs::write(&file, input).map_or_else(|error| format!("not kept: {error}"), |()| file.display().to_string());
        panic!("{name} fails with STANCHION_FUZZ_SEED={seed}; the input: {kept}");
    }
}

#[test]
fn no_target_fails_on_what_its_corpus_breeds() {
    let seed = setting("STANCHION_FUZZ_SEED", SEED);
    let inputs = setting("STANCHION_FUZZ_INPUTS", 2_000);
    println!("STANCHION_FUZZ_SEED={seed} STANCHION_FUZZ_INPUTS={inputs}");
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "{name} has no corpus");
        let mut random = StdRng::seed_from_u64(seed);
        let began = Instant::now();
        for input in &corpus {
            run(name, seed, input, target);
        }
        for _ in 0..inputs {
            run(name, seed, &bred(&corpus, &mut random), target);
        }
        println!("{name}: {:.1?}", began.elapsed());
    }
}

#[test]
fn every_target_has_a_fuzzer_of_its_own() {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml")).expect("the fuzzer's manifest");
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name} is not in tests/fuzz/Cargo.toml");
    }
}
