//! stanchion: one node agent for Amazon EKS.

mod app;
mod cli;
mod logging;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "stanchion", version, about = "One node agent for Amazon EKS: addresses, network policy, logs and metrics")]
struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: cli::client::Connection,
}

#[derive(Subcommand)]
enum Command {
    /// Ship container logs once
    Ship(cli::ship::ShipArgs),
    /// Translate another agent's configuration
    Migrate(cli::migrate::MigrateArgs),
    /// Ask the pool planner
    Plan(cli::plan::PlanArgs),
    /// Run the daemon
    Agent(Box<cli::agent::AgentArgs>),
    /// A live table of pods: processor, memory, network, drops, logs
    Top(cli::top::TopArgs),
    #[command(flatten)]
    Ask(cli::inspect::Question),
    /// What network policies allow, and why
    Policy(cli::policy::PolicyArgs),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("stanchion: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Ship(args) => cli::ship::run(&args),
        Command::Migrate(args) => cli::migrate::run(&args),
        Command::Plan(plan) => cli::plan::run(&plan, &args.connection),
        Command::Agent(agent) => app::run(*agent),
        Command::Top(top) => cli::top::run(&top, &args.connection),
        Command::Ask(question) => cli::inspect::run(&args.connection, &question),
        Command::Policy(policy) => cli::policy::run(policy, &args.connection),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
        for line in ["plan pool --instance-type m5.large --pods 3 -o json", "status -o json", "policy show -o table", "agent --node-name n"]
        {
            let words = std::iter::once("stanchion").chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_ok(), "{line}");
        }
    }
}
