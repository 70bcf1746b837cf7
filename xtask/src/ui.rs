//! What a person sees of a task.

use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// ANSI bold.
pub(crate) const BOLD: &str = "1";
/// ANSI red.
pub(crate) const RED: &str = "31";

/// The text in a colour, on a terminal only.
pub(crate) fn paint(text: &str, code: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Runs a command that a person waits for; says what, and how long it took.
pub(crate) fn step(what: &str, command: &mut Command) -> Result<()> {
    println!("{} {what}", paint("run", BOLD));
    let start = Instant::now();
    let status = command.status().with_context(|| format!("{what}: start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{what}: {} ended with {status}", command.get_program().display());
    }
    println!("    {what} done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Becomes the last command of a task, so that its exit code is the task's and a signal to the task reaches it.
///
/// # Errors
/// It cannot be started; otherwise this does not return.
pub(crate) fn become_command(command: &mut Command) -> Result<ExitCode> {
    let error = command.exec();
    Err(error).with_context(|| format!("start {}", command.get_program().display()))
}
