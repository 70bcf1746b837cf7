//! `stanchion plan fleet`: thousands of nodes on virtual time, by aws-node's rules and by the planner that the daemon runs.

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use stanchion_core::ipam::{Ec2Model, FleetAnswer, FleetQuestion, Rules, Scenario, fleet};

use super::plan::{NodeArgs, describe};
use super::table::Table;

/// A simulation that is quicker shows no progress.
const PROGRESS_AFTER: Duration = Duration::from_secs(2);
/// How often the progress is drawn.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// A fleet.
#[derive(Args, Clone)]
pub(super) struct FleetArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Nodes of the fleet, all of one type
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// Pods of a node that need an address
    #[arg(long, default_value_t = 20)]
    pods: u32,
    /// What happens to the pods; all three if absent
    #[arg(long, value_enum)]
    scenario: Option<ScenarioArg>,
    /// Seconds within which it happens to all pods
    #[arg(long, default_value_t = 120)]
    over: u32,
    /// IP_COOLDOWN_PERIOD
    #[arg(long, default_value_t = 30)]
    cooldown: u32,
    /// Tokens that the account's bucket of an EC2 action holds
    #[arg(long, default_value_t = 100.0, value_parser = positive)]
    bucket: f64,
    /// Tokens a second of an action that changes something
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    mutating_rate: f64,
    /// Tokens a second of a Describe
    #[arg(long, default_value_t = 20.0, value_parser = positive)]
    describe_rate: f64,
    /// Milliseconds of an EC2 call
    #[arg(long, default_value_t = 300)]
    latency_ms: u32,
    /// Milliseconds from AttachNetworkInterface to the interface
    #[arg(long, default_value_t = 4_000)]
    attach_ms: u32,
    /// Nodes that are simulated one by one; a larger fleet is scaled from them
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    most_nodes: u32,
    /// Another order of events
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScenarioArg {
    /// A warm fleet without pods gets all of them
    Burst,
    /// Every pod is replaced by another on the same node
    Rolling,
    /// Every pod ends
    Zero,
}

/// One row of the JSON answer.
#[derive(Serialize)]
struct Row {
    scenario: Scenario,
    rules: Rules,
    #[serde(flatten)]
    answer: FleetAnswer,
}

/// The JSON answer.
#[derive(Serialize)]
struct Document<'a> {
    instance_type: &'a str,
    targets: String,
    nodes: u32,
    pods_per_node: u32,
    over_s: u32,
    ec2: Ec2Model,
    seed: u64,
    rows: &'a [Row],
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|number| *number > 0.0 && number.is_finite()).ok_or_else(|| format!("{text:?} is no number above 0"))
}

/// Simulates and prints.
pub(super) fn run(args: &FleetArgs, json: bool) -> anyhow::Result<ExitCode> {
    let questions = questions(args)?;
    let mut rows = Vec::new();
    let total = questions.len() * 2;
    let mut progress = Progress::new();
    for question in &questions {
        for rules in [Rules::AwsNode, Rules::Stanchion] {
            let done = rows.len();
            let answer = fleet(question, rules, &mut |share| progress.tell((done as f64 + share) / total as f64));
            rows.push(Row { scenario: question.scenario, rules, answer });
        }
    }
    progress.clear();
    if json {
        let ec2 = questions[0].ec2;
        let targets = describe(&questions[0].targets);
        let document = Document {
            instance_type: &args.node.instance_type,
            targets,
            nodes: args.nodes,
            pods_per_node: questions[0].pods_per_node,
            over_s: args.over,
            ec2,
            seed: args.seed,
            rows: &rows,
        };
        println!("{}", serde_json::to_string(&document)?);
    } else {
        print!("{}", render(args, &questions[0], &rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn questions(args: &FleetArgs) -> anyhow::Result<Vec<FleetQuestion>> {
    let limits = args.node.limits()?;
    let targets = args.node.targets(limits);
    let pool = args.node.pool_limits(limits, targets.mode, 0);
    let most = pool.addresses(targets.mode).min(u64::from(pool.max_pods));
    anyhow::ensure!(
        u64::from(args.pods) <= most,
        "{} holds {most} pods that need an address with these settings, not {}: ask with --pods {most} or fewer",
        args.node.instance_type,
        args.pods
    );
    let scenarios = match args.scenario {
        None => vec![Scenario::Burst, Scenario::Rolling, Scenario::Zero],
        Some(ScenarioArg::Burst) => vec![Scenario::Burst],
        Some(ScenarioArg::Rolling) => vec![Scenario::Rolling],
        Some(ScenarioArg::Zero) => vec![Scenario::Zero],
    };
    let question = |scenario| FleetQuestion {
        nodes: args.nodes,
        pods_per_node: args.pods,
        targets,
        limits: pool.clone(),
        scenario,
        over: Duration::from_secs(u64::from(args.over)),
        cooldown: Duration::from_secs(u64::from(args.cooldown)),
        ec2: Ec2Model {
            bucket: args.bucket,
            mutating_rate: args.mutating_rate,
            describe_rate: args.describe_rate,
            latency: Duration::from_millis(u64::from(args.latency_ms)),
            attach: Duration::from_millis(u64::from(args.attach_ms)),
        },
        most_nodes: args.most_nodes,
        seed: args.seed,
    };
    Ok(scenarios.into_iter().map(question).collect())
}

fn name(scenario: Scenario) -> &'static str {
    match scenario {
        Scenario::Burst => "burst",
        Scenario::Rolling => "rolling",
        Scenario::Zero => "scale to zero",
    }
}

fn render(args: &FleetArgs, question: &FleetQuestion, rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "SCENARIO",
        "RULES",
        ">PODS",
        ">UNSERVED",
        ">WAIT P50",
        ">P99",
        ">MAX",
        ">EC2 CALLS",
        ">THROTTLED",
        ">IDLE IPS",
        ">ENIS",
        ">BUSY",
    ]);
    let rules = |rules| if rules == Rules::AwsNode { "aws-node (model)" } else { "stanchion" };
    for Row { scenario, rules: whose, answer } in rows {
        let seconds = |value: f64| if answer.pods == 0 { String::new() } else { format!("{value:.1} s") };
        table.row([
            name(*scenario).to_owned(),
            rules(*whose).to_owned(),
            answer.pods.to_string(),
            answer.unserved.to_string(),
            seconds(answer.wait_p50_s),
            seconds(answer.wait_p99_s),
            seconds(answer.wait_max_s),
            answer.calls_total.to_string(),
            answer.throttled_total.to_string(),
            answer.idle_addresses.to_string(),
            answer.enis.to_string(),
            format!("{:.0} s", answer.busy_s),
        ]);
    }
    let mut actions = Table::new(&["SCENARIO", "EC2 ACTION", ">AWS-NODE", ">THROTTLED", ">STANCHION", ">THROTTLED"]);
    for pair in rows.chunks(2) {
        let names: BTreeSet<&String> = pair.iter().flat_map(|row| row.answer.calls.keys()).collect();
        for action in names {
            let count = |row: usize| pair.get(row).and_then(|row| row.answer.calls.get(action)).copied().unwrap_or_default();
            let (theirs, ours) = (count(0), count(1));
            actions.row([
                name(pair[0].scenario).to_owned(),
                action.clone(),
                theirs.sent.to_string(),
                theirs.throttled.to_string(),
                ours.sent.to_string(),
                ours.throttled.to_string(),
            ]);
        }
    }
    let mut text = format!(
        "{} nodes of {} ({}), {} pods each within {} s; EC2: {} tokens an action and {} a second ({} for a Describe), {} ms a call, {} ms to attach\n",
        args.nodes,
        args.node.instance_type,
        describe(&question.targets),
        question.pods_per_node,
        args.over,
        args.bucket,
        args.mutating_rate,
        args.describe_rate,
        args.latency_ms,
        args.attach_ms,
    );
    if args.nodes > args.most_nodes {
        text.push_str(&format!(
            "{} nodes are simulated one by one against buckets smaller in proportion, and counted {:.1} times (--most-nodes)\n",
            args.most_nodes,
            f64::from(args.nodes) / f64::from(args.most_nodes)
        ));
    }
    text.push('\n');
    text.push_str(&table.render("nothing was asked"));
    text.push('\n');
    text.push_str(&actions.render("no EC2 calls"));
    text
}

/// A line on the terminal, once it takes long.
struct Progress {
    started: Instant,
    drawn: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self { started: Instant::now(), drawn: None, terminal: std::io::stderr().is_terminal() }
    }

    fn tell(&mut self, share: f64) {
        let due = self.drawn.map_or(self.started + PROGRESS_AFTER, |drawn| drawn + PROGRESS_EVERY);
        if self.terminal && Instant::now() >= due {
            self.drawn = Some(Instant::now());
            let bar = "#".repeat((share * 30.0) as usize);
            eprint!("\rsimulating [{bar:30}] {:3.0} %", share * 100.0);
            // A terminal that went away is no reason to stop.
            drop(std::io::stderr().flush());
        }
    }

    fn clear(&self) {
        if self.drawn.is_some() {
            eprint!("\r{:60}\r", "");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        fleet: FleetArgs,
    }

    fn parse(args: &[&str]) -> FleetArgs {
        Cli::parse_from(["fleet", "--instance-type", "m5.large"].iter().chain(args)).fleet
    }

    #[test]
    fn the_table_shows_both_rules_in_every_scenario() {
        let args = parse(&["--nodes", "40", "--most-nodes", "10", "--pods", "15"]);
        let questions = questions(&args).expect("fits");
        let rows: Vec<Row> = questions
            .iter()
            .flat_map(|question| {
                [Rules::AwsNode, Rules::Stanchion].map(|rules| Row {
                    scenario: question.scenario,
                    rules,
                    answer: fleet(question, rules, &mut |_| {}),
                })
            })
            .collect();
        let text = render(&args, &questions[0], &rows);
        for needle in ["burst", "rolling", "scale to zero", "aws-node (model)", "stanchion", "CreateNetworkInterface", "counted 4.0 times"]
        {
            assert!(text.contains(needle), "{needle}\n{text}");
        }
        assert_eq!(rows.iter().map(|row| row.answer.pods).collect::<Vec<_>>(), [600, 600, 600, 600, 0, 0]);
    }

    #[test]
    fn more_pods_than_a_node_holds_is_an_error_that_says_how_many() {
        let error = questions(&parse(&["--pods", "28"])).expect_err("27 addresses").to_string();
        assert!(error.contains("holds 27 pods") && error.contains("--pods 27"), "{error}");
        assert!(positive("0").is_err() && positive("NaN").is_err() && positive("0.5").is_ok());
    }
}
