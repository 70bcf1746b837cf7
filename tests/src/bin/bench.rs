//! `cargo xtask bench [NAMES] [--quick] [-o table|json] [--report DIR] [--compare FILE]`: figures beside their floors.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use stanchion_lab::bench::{Row, report};

#[derive(Parser)]
struct Args {
    /// cni, datapath, policy, throughput, logs, pool, idle; all when absent
    names: Vec<String>,
    /// Smaller inputs
    #[arg(long)]
    quick: bool,
    /// Seconds for which the idle agent is watched; 60 hold one metric tick (with --quick 30 at most, and three ticks)
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=3600))]
    window: u64,
    /// table or json
    #[arg(short, long, default_value = "table")]
    output: String,
    /// Directory for bench.md, bench.json and plots of cost against scale
    #[arg(long)]
    report: Option<PathBuf>,
    /// bench.json of an earlier run: fails where a figure by its floor became worse, crossed its bound or is gone
    #[arg(long)]
    compare: Option<PathBuf>,
    /// How many times the earlier figure is still fine
    #[arg(long, default_value_t = 1.3)]
    tolerance: f64,
}

type Bench = fn(&Args) -> anyhow::Result<Vec<Row>>;

/// Every bench by its name.
const BENCHES: [(&str, Bench); 7] = [
    ("cni", |args| stanchion_lab::bench::cni::run(args.quick)),
    ("datapath", |args| stanchion_lab::bench::datapath::run(args.quick)),
    ("policy", |args| stanchion_lab::bench::policy::run(args.quick)),
    ("throughput", |args| stanchion_lab::bench::throughput::run(args.quick)),
    ("logs", |args| stanchion_lab::bench::logs::run(args.quick)),
    ("pool", |args| stanchion_lab::bench::pool::run(args.quick)),
    ("idle", |args| stanchion_lab::bench::idle::run(args.quick, Duration::from_secs(args.window))),
];

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(unknown) = args.names.iter().find(|n| *n != "all" && !BENCHES.iter().any(|(name, _)| name == n)) {
        let known: Vec<&str> = BENCHES.iter().map(|(name, _)| *name).collect();
        eprintln!("no bench {unknown}; there are: {} or all", known.join(", "));
        return ExitCode::from(2);
    }
    let all = args.names.is_empty() || args.names.iter().any(|n| n == "all");
    let mut failed = false;
    let mut done = report::Benches::new();
    for (name, bench) in BENCHES.iter().filter(|(name, _)| all || args.names.iter().any(|n| n == name)) {
        eprintln!("bench {name} ...");
        match bench(&args) {
            Ok(rows) => {
                if args.output != "json" {
                    print_table(name, &rows);
                }
                done.push(((*name).to_owned(), rows));
            }
            Err(error) => {
                eprintln!("bench {name}: {error:#}");
                failed = true;
            }
        }
    }
    if args.output == "json" {
        println!("{}", report::json(&done));
    }
    // Some are known not to be (SPECIFICATION.md): what was held and is no more is told by a comparison.
    let missed = done.iter().flat_map(|(_, rows)| rows).filter(|row| row.holds() == Some(false)).count();
    if missed > 0 {
        eprintln!("{missed} bounds are not reached");
    }
    if let Err(error) = conclude(&args, &done) {
        eprintln!("bench: {error:#}");
        failed = true;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Writes the report, then holds the figures against an earlier run's.
fn conclude(args: &Args, done: &report::Benches) -> anyhow::Result<()> {
    let before = args.compare.as_ref().map(|path| -> anyhow::Result<_> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let before: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("{} is no bench.json", path.display()))?;
        Ok((path, before))
    });
    // Read before the report is written: it may take the place of what is compared with.
    let before = before.transpose();
    if let Some(directory) = &args.report {
        report::write(directory, done)?;
        eprintln!("tables and plots are in {}", directory.display());
    }
    let Some((path, before)) = before? else { return Ok(()) };
    let worse = report::worse(&before, done, args.tolerance, args.quick).with_context(|| format!("compare with {}", path.display()))?;
    anyhow::ensure!(worse.is_empty(), "worse than {} x what {} has:\n  {}", args.tolerance, path.display(), worse.join("\n  "));
    eprintln!("no figure is worse than {} x what {} has", args.tolerance, path.display());
    Ok(())
}

fn print_table(name: &str, rows: &[Row]) {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(name.len());
    println!("\n{name:width$}  {:>12}  {:>12}  {:>7}  {:>7}", "value", "floor", "ratio", "target");
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
    for row in rows {
        let mark = match row.holds() {
            Some(true) => "  ok",
            Some(false) => "  NOT REACHED",
            None => "",
        };
        let mark =
            if std::io::stdout().is_terminal() && row.holds() == Some(false) { format!("\x1b[31m{mark}\x1b[0m") } else { mark.to_owned() };
        println!(
            "{:width$}  {:>12}  {:>12}  {:>7}  {:>7}  {}{mark}",
            row.name,
            number(Some(row.value)),
            number(row.floor),
            number(row.ratio),
            number(row.target),
            row.unit
        );
    }
}
