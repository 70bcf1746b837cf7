//! The agent's process in a node's namespace.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binaries::counters;
use crate::netns::Netns;
use crate::refusals::Refusals;
use crate::wait::wait_for;

/// A running agent; dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    output: PathBuf,
}

/// How to start one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    /// Gets stdout and stderr, appended.
    pub(crate) output: PathBuf,
    /// What it may be refused.
    pub(crate) refusals: Option<Refusals>,
}

impl Agent {
    pub(crate) fn start(netns: &Netns, start: &Start) -> anyhow::Result<Self> {
        let output: File = OpenOptions::new().create(true).append(true).open(&start.output)?;
        let mut command = Command::new(&start.program);
        command.args(&start.args).env_clear().envs(counters()).envs(&start.env).stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output);
        let child = netns.run(|| {
            if let Some(refusals) = &start.refusals {
                refusals.install()?;
            }
            command.spawn()
        })?;
        let child = child.with_context(|| format!("start {}", start.program.display()))?;
        Ok(Self { child, output: start.output.clone() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// `Some` when it ended by itself.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// kill -9.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Any other signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self, at_most: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        wait_for("the agent to stop", at_most, || {
            let status = self.child.try_wait();
            async { status?.context("it still runs") }
        })
        .await
    }

    /// The last lines that it printed, for a failure's message.
    pub fn tail(&self) -> String {
        tail(&self.output)
    }
}

/// The last lines of a file.
pub(crate) fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
