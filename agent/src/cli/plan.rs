//! `stanchion plan`: what the pool planner would do, without a node.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;
use stanchion_core::ipam::{PoolAnswer, PoolLimits, PoolMode, PoolQuestion, Targets, steady_state};
use stanchion_core::limits::InstanceLimits;

use super::table::Table;

/// Questions to the planner.
#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// ENIs, addresses and EC2 calls of one node with so many pods
    Pool(PoolArgs),
    /// A whole fleet against one account's EC2 limits, by aws-node's rules and by ours
    Fleet(super::fleet::FleetArgs),
    /// What Container Insights costs a month, preset by preset
    Cost(super::cost::CostArgs),
}

/// One node.
#[derive(Args, Clone)]
struct PoolArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Pods that need an address; those with host network do not
    #[arg(long)]
    pods: u32,
    /// AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG: the primary ENI is not for pods
    #[arg(long)]
    custom_networking: bool,
    /// ENABLE_POD_ENI: one ENI is kept for the trunk
    #[arg(long)]
    pod_eni: bool,
}

/// The instance and its warm targets.
#[derive(Args, Clone)]
pub(super) struct NodeArgs {
    /// m5.large
    #[arg(long)]
    pub(super) instance_type: String,
    /// WARM_ENI_TARGET
    #[arg(long, default_value_t = 1)]
    warm_eni_target: u32,
    /// WARM_IP_TARGET; 0 is unset
    #[arg(long, default_value_t = 0)]
    warm_ip_target: u32,
    /// MINIMUM_IP_TARGET; 0 is unset
    #[arg(long, default_value_t = 0)]
    minimum_ip_target: u32,
    /// WARM_PREFIX_TARGET; 1 with prefix delegation, as the manifest sets it
    #[arg(long)]
    warm_prefix_target: Option<u32>,
    /// MAX_ENI
    #[arg(long)]
    max_eni: Option<u16>,
    /// ENABLE_PREFIX_DELEGATION
    #[arg(long)]
    pub(super) prefix_delegation: bool,
    /// The kubelet's limit; EKS's number for the type if absent
    #[arg(long)]
    max_pods: Option<u32>,
}

impl NodeArgs {
    /// The type's limits.
    pub(super) fn limits(&self) -> anyhow::Result<&'static InstanceLimits> {
        InstanceLimits::lookup(&self.instance_type).with_context(|| unknown_type(&self.instance_type))
    }

    /// The targets on that type.
    pub(super) fn targets(&self, limits: &InstanceLimits) -> Targets {
        let prefixes = self.prefix_delegation && limits.supports_prefixes();
        Targets {
            mode: if prefixes { PoolMode::Prefixes } else { PoolMode::SecondaryIps },
            warm_eni: self.warm_eni_target,
            warm_ip: self.warm_ip_target,
            minimum_ip: self.minimum_ip_target,
            warm_prefix: self.warm_prefix_target.unwrap_or(u32::from(self.prefix_delegation)),
            reserve_trunk: false,
        }
    }

    /// What the node can hold when `kept` ENIs are not for pods.
    pub(super) fn pool_limits(&self, limits: &InstanceLimits, mode: PoolMode, kept: u16) -> PoolLimits {
        let enis = self.max_eni.filter(|max| *max > 0).map_or(limits.max_enis, |max| max.min(limits.max_enis));
        let max_pods = self.max_pods.unwrap_or_else(|| limits.max_pods(enis.saturating_sub(kept), mode == PoolMode::Prefixes));
        PoolLimits { cards: vec![(0, enis)], slots_per_eni: limits.slots_per_eni(), max_pods }
    }
}

/// The JSON answer.
#[derive(Serialize)]
struct PoolDocument<'a> {
    instance_type: &'a str,
    mode: &'static str,
    max_pods: u32,
    pods: u32,
    #[serde(flatten)]
    answer: &'a PoolAnswer,
}

pub(crate) fn run(args: &PlanArgs, connection: &super::client::Connection) -> anyhow::Result<ExitCode> {
    match &args.question {
        Question::Pool(pool) => run_pool(pool, connection.output == "json"),
        Question::Fleet(fleet) => super::fleet::run(fleet, connection.output == "json"),
        Question::Cost(cost) => super::cost::run(cost, connection.output == "json"),
    }
}

fn run_pool(args: &PoolArgs, json: bool) -> anyhow::Result<ExitCode> {
    let limits = args.node.limits()?;
    let asked = targets(args, limits);
    let (max_pods, answer) = answer(args, limits, asked);
    if json {
        let document =
            PoolDocument { instance_type: &args.node.instance_type, mode: asked.mode.name(), max_pods, pods: args.pods, answer: &answer };
        println!("{}", serde_json::to_string(&document)?);
    } else {
        print!("{}", render(args, limits, asked, max_pods, &answer));
    }
    Ok(ExitCode::SUCCESS)
}

fn unknown_type(name: &str) -> String {
    let family = name.split('.').next().unwrap_or(name);
    let known: Vec<&str> = InstanceLimits::all()
        .map(|limits| limits.instance_type.as_str())
        .filter(|known| known.split('.').next() == Some(family))
        .take(12)
        .collect();
    if known.is_empty() {
        format!("instance type {name:?} is not in the built-in table")
    } else {
        format!("instance type {name:?} is not in the built-in table; of its family it has {}", known.join(", "))
    }
}

fn targets(args: &PoolArgs, limits: &InstanceLimits) -> Targets {
    Targets { reserve_trunk: args.pod_eni && limits.supports_trunk(), ..args.node.targets(limits) }
}

/// Max pods and where the node ends up.
fn answer(args: &PoolArgs, limits: &InstanceLimits, targets: Targets) -> (u32, PoolAnswer) {
    let kept = u16::from(args.custom_networking) + u16::from(targets.reserve_trunk);
    let limits = args.node.pool_limits(limits, targets.mode, kept);
    let max_pods = limits.max_pods;
    let question = PoolQuestion { targets, limits, pods: args.pods, custom_networking: args.custom_networking };
    (max_pods, steady_state(&question))
}

/// The answer, and beside it what other targets would do.
fn render(args: &PoolArgs, limits: &InstanceLimits, asked: Targets, max_pods: u32, found: &PoolAnswer) -> String {
    let mut table = Table::new(&["TARGETS", ">PODS", ">ENIS", "PER ENI", ">TOTAL", ">UNUSED", ">EC2 STEPS", "IN ORDER"]);
    row(&mut table, &format!("{} (asked)", describe(&asked)), found);
    let ip = |warm_ip, minimum_ip| Targets { warm_ip, minimum_ip, ..asked };
    let mut others = vec![Targets { warm_eni: 1, ..ip(0, 0) }, ip(1, 0), ip(2, 5), ip(5, 10)];
    if limits.supports_prefixes() {
        others.push(Targets { mode: PoolMode::Prefixes, warm_prefix: 1, ..ip(0, 0) });
    }
    for other in others {
        if describe(&other) != describe(&asked) {
            row(&mut table, &describe(&other), &answer(args, limits, other).1);
        }
    }
    let mut text = format!(
        "{}: {} ENIs of {} addresses, max pods {max_pods}{}\n\n",
        limits.instance_type,
        limits.max_enis,
        limits.ipv4_per_eni,
        if args.node.prefix_delegation && !limits.supports_prefixes() { "; it has no prefix delegation" } else { "" }
    );
    text.push_str(&table.render("no targets"));
    if found.running < args.pods {
        text.push_str(&format!("\n{} of {} pods get no address.\n", args.pods - found.running, args.pods));
    }
    text
}

fn row(table: &mut Table, targets: &str, answer: &PoolAnswer) {
    let per_eni: Vec<String> = answer.per_eni.iter().map(ToString::to_string).collect();
    table.row([
        targets.to_owned(),
        answer.running.to_string(),
        answer.per_eni.len().to_string(),
        per_eni.join(" "),
        answer.total.to_string(),
        answer.unused.to_string(),
        answer.calls.len().to_string(),
        abbreviate(&answer.calls),
    ]);
}

/// `WARM_ENI_TARGET=1`: those that count.
pub(super) fn describe(targets: &Targets) -> String {
    let mut parts = Vec::new();
    if targets.mode == PoolMode::Prefixes {
        parts.push("prefixes".to_owned());
    }
    match (targets.warm_ip, targets.minimum_ip, targets.mode) {
        (0, 0, PoolMode::Prefixes) => parts.push(format!("WARM_PREFIX_TARGET={}", targets.warm_prefix)),
        (0, 0, _) => parts.push(format!("WARM_ENI_TARGET={}", targets.warm_eni)),
        (warm, 0, _) => parts.push(format!("WARM_IP_TARGET={warm}")),
        (0, minimum, _) => parts.push(format!("MINIMUM_IP_TARGET={minimum}")),
        (warm, minimum, _) => parts.push(format!("WARM_IP_TARGET={warm} MINIMUM_IP_TARGET={minimum}")),
    }
    parts.join(" ")
}

/// `Assign9 ENI+9x2`: repetitions are counted.
fn abbreviate(calls: &[String]) -> String {
    calls
        .chunk_by(|a, b| a == b)
        .map(|same| if same.len() == 1 { same[0].clone() } else { format!("{}x{}", same[0], same.len()) })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        plan: PlanArgs,
    }

    fn pool(args: &[&str]) -> (PoolArgs, u32, PoolAnswer) {
        let cli = Cli::parse_from(["plan", "pool"].iter().chain(args));
        let Question::Pool(args) = cli.plan.question else { panic!("asked for the pool") };
        let limits = InstanceLimits::lookup(&args.node.instance_type).expect("known type");
        let (max_pods, answer) = answer(&args, limits, targets(&args, limits));
        (args, max_pods, answer)
    }

    #[test]
    fn the_pool_of_a_node() {
        let (_, max_pods, found) = pool(&["--instance-type", "m5.large", "--pods", "10"]);
        assert_eq!((max_pods, found.per_eni, found.total, found.unused), (29, vec![9, 9, 9], 27, 17));
        assert_eq!(found.calls, ["Assign9", "ENI+9", "ENI+9"]);
        let (_, max_pods, found) = pool(&["--instance-type", "m5.large", "--pods", "95", "--prefix-delegation"]);
        assert_eq!((max_pods, found.per_eni, found.total), (110, vec![7], 112));
        let (_, max_pods, found) = pool(&["--instance-type", "m5.large", "--pods", "10", "--custom-networking"]);
        assert_eq!((max_pods, found.per_eni, found.running), (20, vec![0, 9, 9], 10));
        let (_, _, found) = pool(&["--instance-type", "m5.large", "--pods", "12", "--minimum-ip-target", "11"]);
        assert_eq!(found.running, 12, "a minimum alone starves nobody");
    }

    #[test]
    fn the_table_shows_other_targets_and_what_is_short() {
        let (args, max_pods, found) = pool(&["--instance-type", "m5.large", "--pods", "28"]);
        let limits = InstanceLimits::lookup("m5.large").expect("known type");
        let text = render(&args, limits, targets(&args, limits), max_pods, &found);
        assert!(text.contains("WARM_ENI_TARGET=1 (asked)") && text.contains("WARM_IP_TARGET=5 MINIMUM_IP_TARGET=10"), "{text}");
        assert!(text.contains("1 of 28 pods get no address"), "{text}");
        assert!(unknown_type("m5.huge").contains("m5.large"));
        assert_eq!(abbreviate(&["Assign9".into(), "ENI+9".into(), "ENI+9".into()]), "Assign9 ENI+9x2");
    }
}
