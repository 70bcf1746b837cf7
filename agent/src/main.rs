//! stanchion: one node agent for Amazon EKS.

mod app;
mod cli;
mod logging;
mod parts;
mod privileges;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

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
    /// Put the plugin, kernel settings and network configuration on the host; or take them away
    Install(cli::install::InstallArgs),
    /// An archive without secrets for a person who looks at this node from elsewhere
    Support(cli::support::SupportArgs),
    /// Completions for a shell
    Completions(cli::shell::CompletionsArgs),
    /// The manual pages
    Man(cli::shell::ManArgs),
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
    let Args { command, connection } = args;
    if !matches!(command, Command::Agent(_)) {
        stanchion_netlink::process::end_when_the_reader_goes();
    }
    match command {
        Command::Ship(args) => cli::ship::run(&args),
        Command::Migrate(args) => cli::migrate::run(&args),
        Command::Plan(plan) => cli::plan::run(&plan, &connection),
        Command::Agent(agent) => app::run(*agent),
        Command::Install(args) => cli::install::run(&args, &connection),
        Command::Support(args) => cli::support::run(&args, &connection),
        Command::Completions(args) => cli::shell::completions(&args, Args::command()),
        Command::Man(args) => cli::shell::man(&args, Args::command()),
        Command::Top(top) => cli::top::run(&top, &connection),
        Command::Ask(question) => cli::inspect::run(&connection, &question),
        Command::Policy(policy) => cli::policy::run(policy, &connection),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
        for line in [
            "plan pool --instance-type m5.large --pods 3 -o json",
            "status -o json",
            "policy show -o table",
            "agent --node-name n",
            "migrate aws-node -",
        ] {
            let words = std::iter::once("stanchion").chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_ok(), "{line}");
        }
    }
}
