//! Storms of faults, or simulated lives, for as long as it is told: `cargo xtask soak [--simulate]`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use stanchion_lab::chaos::{self, Report, Until};
use stanchion_lab::run::EndSignals;
use stanchion_lab::simulation;
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(about = "Faults of every kind on a node with traffic, policy, logs and churn; ends with the first broken promise")]
struct Args {
    /// Minutes; the storm that is on is finished
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Which faults, in which order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Simulated lives of a node instead, one seed after the other
    #[arg(long)]
    simulate: bool,
    /// Steps of a simulated life; 70 are about an hour
    #[arg(long, default_value_t = simulation::STEPS, requires = "simulate")]
    steps: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    // What the daemon logs: RUST_LOG=stanchion_daemon=debug.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(std::io::stderr).init();
    match if args.simulate { simulate(&args).await } else { soak(&args).await } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn soak(args: &Args) -> anyhow::Result<()> {
    let mut signals = EndSignals::install().context("install the signal handlers")?;
    let began = Instant::now();
    let say = |line: &str| println!("{:>5.0} s  {line}", began.elapsed().as_secs_f64());
    let report = tokio::select! {
        report = chaos::run(args.seed, Until::Elapsed(Duration::from_secs(args.minutes * 60)), say) => report?,
        name = signals.asked() => anyhow::bail!("{name} before the end: nothing was broken so far"),
    };
    print_report(&report);
    Ok(())
}

/// Seed after seed; a signal ends it with the life that is on.
async fn simulate(args: &Args) -> anyhow::Result<()> {
    let mut signals = EndSignals::install().context("install the signal handlers")?;
    let asked = signals.asked();
    tokio::pin!(asked);
    let began = Instant::now();
    let time = Duration::from_secs(args.minutes * 60);
    let mut sum = simulation::Told::default();
    let mut ended = None;
    let mut lives = 0_u32;
    for seed in args.seed.. {
        let steps = args.steps;
        let mut life = tokio::task::spawn_blocking(move || simulation::run(seed, steps));
        let told = loop {
            tokio::select! {
                told = &mut life => break told?,
                name = &mut asked, if ended.is_none() => ended = Some(name),
            }
        };
        let told = told.with_context(|| format!("again: {}", simulation::again(seed, steps)))?;
        println!("{:>5.0} s  seed {seed}: {} simulated hours, {} pods", began.elapsed().as_secs_f64(), told.seconds / 3_600, told.pods);
        sum += told;
        lives += 1;
        if ended.is_some() || began.elapsed() >= time {
            break;
        }
    }
    println!("\n{lives} lives, {} simulated days, every promise held\n{sum:#?}", sum.seconds / 86_400);
    anyhow::ensure!(ended.is_none(), "{} before the end: nothing was broken so far", ended.unwrap_or_default());
    Ok(())
}

fn print_report(report: &Report) {
    let [connected, refused, killed] = report.pods;
    let [before, after] = report.held;
    println!("\n{} storms, every promise held", report.storms);
    println!("  drawn   hit");
    for (name, drawn) in &report.faults {
        println!("  {:>5} {:>5}  {name}", drawn.times, drawn.hit);
    }
    println!("pods            {connected} connected, {refused} refused while things were broken, {killed} with a killed plugin");
    let [let_through, stopped] = report.probes;
    println!(
        "  after storms  {let_through} probes that had to get through, {stopped} that had to be stopped ({} packets denied)",
        report.denied
    );
    println!("open connection {} messages, the longest took {:.2?}", report.exchanges, report.longest);
    println!("intruder        {} attempts, none got through", report.intrusions);
    println!("log lines       {}, none lost", report.lines);
    println!(
        "agent           files {} then {}, threads {} then {}, RSS {:.1} then {:.1} MiB",
        before.files,
        after.files,
        before.threads,
        after.threads,
        mebibytes(before.rss_bytes),
        mebibytes(after.rss_bytes)
    );
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
