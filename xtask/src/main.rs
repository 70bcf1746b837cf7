//! Development tasks: `cargo xtask <task>`. Each does its own set-up and says what it does.

mod bpf;
mod build;
mod chart;
mod coverage;
mod image;
mod kernels;
mod setup;
mod ui;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development tasks of stanchion", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need (Debian packages, the BPF linker)
    Setup,
    /// Build the eBPF object
    BuildEbpf,
    /// Build the CNI plugin as it is shipped: static
    Plugin,
    /// Play the main job end to end in a VPC made of network namespaces
    Demo {
        /// Leave the lab up and say how to look around
        #[arg(long)]
        keep: bool,
    },
    /// A VPC to play with: nodes, router, fake AWS; until Ctrl-C
    Lab {
        /// Arguments of the lab
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Storms of faults over a living node, with traffic, policy, logs and churn
    Soak {
        /// Minutes
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Which faults, in which order
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Lives of the agent's parts in a simulated world instead, one seed after the other: days in minutes
        #[arg(long)]
        simulate: bool,
        /// Steps of a simulated life: 70 are about an hour, 150 unless told
        #[arg(long, requires = "simulate")]
        steps: Option<u64>,
    },
    /// Everything that CI checks: format, lints, every test with real namespaces and eBPF
    Test {
        /// Only tests whose name contains one of these
        filter: Vec<String>,
    },
    /// Run the tests with counters and say which lines none reaches: target/coverage/
    Coverage {
        /// Only tests whose name contains one of these
        filter: Vec<String>,
    },
    /// Run the tests that ask something of the kernel under those of EKS nodes, each booted in an emulated machine
    Kernels {
        /// 5.10, 6.1, 6.12, 7; all when absent
        series: Vec<String>,
        /// Which tests, as an expression of nextest's
        #[arg(short = 'E', long, default_value = kernels::EVERYTHING)]
        filter: String,
    },
    /// Pack the container image without an engine: target/image/stanchion.oci.tar
    Image {
        /// Pack the unoptimised binaries, to try the packing
        #[arg(long)]
        dev: bool,
    },
    /// Measure against a floor in the same run: cni, datapath, policy, throughput, logs, pool, idle or all
    Bench {
        /// Which; all when absent
        names: Vec<String>,
        /// Smaller inputs
        #[arg(long)]
        quick: bool,
        /// Seconds for which the idle agent is watched
        #[arg(long)]
        window: Option<u64>,
        /// table or json
        #[arg(short, long, default_value = "table")]
        output: String,
        /// Directory for bench.md, bench.json and plots of cost against scale; target/bench when all are run
        #[arg(long)]
        report: Option<PathBuf>,
        /// bench.json of an earlier run: fails where a figure by its floor became worse, crossed its bound or is gone
        #[arg(long)]
        compare: Option<PathBuf>,
        /// How many times the earlier figure is still fine
        #[arg(long)]
        tolerance: Option<f64>,
    },
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{} {error:#}", ui::paint("error:", ui::RED));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let root = root()?;
    match Args::parse().task {
        Task::Setup => {
            setup::everything(&root)?;
            setup::test_runner()?;
        }
        Task::BuildEbpf => {
            bpf::ensure_toolchain()?;
            bpf::build(&root)?;
        }
        Task::Plugin => build::plugin(&root)?,
        Task::Demo { keep } => {
            prepare(&root, build::Profile::Dev)?;
            let mut demo = Command::new(build::binary(&root, build::Profile::Dev, "demo"));
            if keep {
                demo.arg("--keep");
            }
            return ui::become_command(demo.current_dir(&root));
        }
        Task::Lab { args } => {
            prepare(&root, build::Profile::Dev)?;
            let mut lab = Command::new(build::binary(&root, build::Profile::Dev, "lab"));
            return ui::become_command(lab.args(args).current_dir(&root));
        }
        Task::Soak { minutes, seed, simulate, steps } => {
            prepare(&root, build::Profile::Dev)?;
            let mut soak = Command::new(build::binary(&root, build::Profile::Dev, "soak"));
            soak.args(["--minutes", &minutes.to_string(), "--seed", &seed.to_string()]);
            if simulate {
                soak.arg("--simulate");
            }
            if let Some(steps) = steps {
                soak.args(["--steps", &steps.to_string()]);
            }
            return ui::become_command(soak.current_dir(&root));
        }
        Task::Test { filter } => return test(&root, &filter),
        Task::Coverage { filter } => {
            setup::everything(&root)?;
            setup::test_runner()?;
            bpf::build(&root)?;
            return coverage::run(&root, &filter);
        }
        Task::Kernels { series, filter } => {
            prepare(&root, build::Profile::Dev)?;
            setup::test_runner()?;
            kernels::run(&root, &series, &filter)?;
        }
        Task::Image { dev } => {
            let profile = if dev { build::Profile::Dev } else { build::Profile::Release };
            prepare(&root, profile)?;
            image::build(&root, profile)?;
        }
        Task::Bench { names, quick, window, output, report, compare, tolerance } => {
            prepare(&root, build::Profile::Release)?;
            let mut bench = Command::new(build::binary(&root, build::Profile::Release, "bench"));
            let all = names.is_empty() || names.iter().any(|name| name == "all");
            bench.args(names).args(["-o", &output]);
            if quick {
                bench.arg("--quick");
            }
            if let Some(seconds) = window {
                bench.args(["--window", &seconds.to_string()]);
            }
            // The bench runs in the root of the checkout.
            let report = report.or_else(|| all.then(|| root.join("target/bench")));
            for (flag, path) in [("--report", report), ("--compare", compare)] {
                if let Some(path) = path {
                    bench.arg(flag).arg(std::path::absolute(path)?);
                }
            }
            if let Some(tolerance) = tolerance {
                bench.args(["--tolerance", &tolerance.to_string()]);
            }
            return ui::become_command(bench.current_dir(&root));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Toolchain, eBPF object, binaries.
fn prepare(root: &Path, profile: build::Profile) -> Result<()> {
    setup::everything(root)?;
    bpf::build(root)?;
    build::workspace(root, profile)
}

/// proptest's: the same commit is judged by the same cases everywhere. `cargo nextest run` by itself draws new ones.
const PROPERTY_SEED: &str = "PROPTEST_RNG_SEED";

fn test(root: &Path, filter: &[String]) -> Result<ExitCode> {
    setup::everything(root)?;
    setup::test_runner()?;
    bpf::build(root)?;
    if filter.is_empty() {
        chart::check(root)?;
        ui::step("format", build::cargo(root).args(["fmt", "--all", "--check"]))?;
        ui::step("lints", build::cargo(root).args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    }
    // The scenarios run the shipped binaries, so these are built first.
    build::workspace(root, build::Profile::Dev)?;
    let mut tests = build::cargo(root);
    tests.args(["nextest", "run", "--workspace", "--no-fail-fast"]).args(filter);
    if std::env::var_os(PROPERTY_SEED).is_none() {
        tests.env(PROPERTY_SEED, "20261121");
    }
    println!("{} tests", ui::paint("run", ui::BOLD));
    if !filter.is_empty() {
        return ui::become_command(&mut tests);
    }
    let passed = tests.status().context("start cargo nextest")?.success();
    if kernels::HERE {
        kernels::run(root, &[kernels::USUAL.to_owned()], kernels::IN_SHORT)?;
    } else {
        println!("    no other kernel is booted: they are x86_64's");
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    match here.parent() {
        Some(root) if root.join("Cargo.toml").is_file() => Ok(root.to_owned()),
        _ => bail!("{} is not inside the workspace", here.display()),
    }
}
