//! A VPC to play with: `cargo xtask lab`. Everything in it is gone when it ends.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use stanchion_lab::pod::PodSpec;
use stanchion_lab::run::EndSignals;
use stanchion_lab::{Vpc, tour};

#[derive(Parser)]
#[command(about = "A VPC made of network namespaces, with a fake EC2, to play with")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Build it, start agents and pods, and keep it until Ctrl-C (the default)
    Up(Up),
    /// Remove what runs left whose process was killed
    Sweep,
}

#[derive(clap::Args)]
struct Up {
    /// Instance type of each node, one node a type
    #[arg(long, value_delimiter = ',', default_value = "t3.small,m5.large")]
    nodes: Vec<String>,
    /// Pods on each node
    #[arg(long, default_value_t = 2)]
    pods: u32,
    /// Nodes alone: agents, runtimes and pods are yours to start
    #[arg(long, conflicts_with_all = ["pods", "settings"])]
    bare: bool,
    /// Settings of the agents: NAME=VALUE
    #[arg(long = "env", value_parser = setting)]
    settings: Vec<(String, String)>,
}

impl Default for Up {
    fn default() -> Self {
        Self { nodes: vec!["t3.small".to_owned(), "m5.large".to_owned()], pods: 2, bare: false, settings: Vec::new() }
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).ok_or_else(|| format!("{text}: write NAME=VALUE"))
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Args::parse().command.unwrap_or(Command::Up(Up::default())) {
        Command::Sweep => {
            stanchion_lab::run::sweep();
            Ok(())
        }
        Command::Up(up) => run_until_asked(&up).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run_until_asked(up: &Up) -> anyhow::Result<()> {
    let mut signals = EndSignals::install().context("install the signal handlers")?;
    tokio::select! {
        done = run(up) => done,
        _ = signals.asked() => Ok(()),
    }
}

async fn run(up: &Up) -> anyhow::Result<()> {
    println!("building the VPC ...");
    let mut vpc = Vpc::builder().start().await?;
    vpc.manifests().namespace("default", &[])?;
    let settings: Vec<(&str, &str)> = up.settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let (mut nodes, mut agents, mut pods) = (Vec::new(), Vec::new(), Vec::new());
    for (number, instance_type) in (1..).zip(&up.nodes) {
        let name = format!("node{number}");
        let node = vpc.node(&name, instance_type).await?;
        if up.bare {
            println!("{name} ({instance_type}):");
            // For a runtime, a kubelet and an agent of one's own.
            println!("  ip netns exec {} env {} bash", node.netns().name(), node.agent_env().join(" "));
            nodes.push(node);
            continue;
        }
        println!("{name} ({instance_type}): starting its agent ...");
        let mut agent = node.start_agent(&settings)?;
        node.ready(&mut agent, Duration::from_secs(30)).await?;
        agents.push(agent);
        nodes.push(node);
    }
    if up.bare {
        println!("\nCtrl-C ends it.");
        return std::future::pending().await;
    }
    for (number, node) in (1..).zip(&nodes) {
        for pod in 0..up.pods {
            let name = format!("app{number}-{pod}");
            pods.push(node.add_pod(PodSpec::new("default", &name)).await.with_context(|| format!("start {name}"))?);
        }
    }
    println!("{}\nCtrl-C ends it.", tour::of(&vpc, &nodes, &pods));
    std::future::pending().await
}
