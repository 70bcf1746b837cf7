//! The main job end to end, as a story: `cargo xtask demo`. Ends 0 only if every check held.

mod scenes;
mod story;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use stanchion_lab::run::EndSignals;

use crate::scenes::Stage;
use crate::story::Story;

#[derive(Parser)]
#[command(about = "Plays stanchion's main job in a VPC made of network namespaces, and checks each step")]
struct Args {
    /// Leave the lab up before the pods are deleted, and say how to look around
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let mut story = Story::begin();
    let outcome = play_until_asked(&mut story, args.keep).await;
    story.end(&outcome);
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A signal drops the stage, and with it everything in the lab.
async fn play_until_asked(story: &mut Story, keep: bool) -> anyhow::Result<()> {
    let mut signals = EndSignals::install().context("install the signal handlers")?;
    tokio::select! {
        outcome = play(story, keep) => outcome,
        signal = signals.asked() => Err(anyhow::anyhow!("ended by {signal}")),
    }
}

async fn play(story: &mut Story, keep: bool) -> anyhow::Result<()> {
    let mut stage = Stage::set(story).await?;
    let played = stage.play(story, keep).await;
    if let Err(error) = &played {
        stage.show_agents(story);
        if keep {
            println!("\n{error:#}\nThe lab stays up as it is.");
            stage.look_around().await?;
        }
    }
    played?;
    stage.strike(story).await
}
