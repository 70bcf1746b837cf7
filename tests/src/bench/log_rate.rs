//! What the agent costs at so many log lines a second: the whole agent with both roles, its node's pods writing at a steady rate.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::plot::Plot;
use super::{Progress, Row};
use crate::container_log::Output;
use crate::node::Node;
use crate::pod::Pod;
use crate::wait::wait_for;

/// Lines a second of the whole node. At none of them: what the agent does besides, which is the yardstick.
const RATES: [u32; 5] = [0, 1_000, MEGABYTE, 10_000, 20_000];
/// Lines that are a megabyte.
const MEGABYTE: u32 = 1_000_000 / LINE as u32;
/// What shipping a megabyte a second may take besides what the agent takes anyway, in percent of a core.
const MOST_PERCENT: f64 = 1.0;
/// The smaller run leaves out what a debug build cannot keep up with.
const QUICK: usize = 3;
/// Pods that write, as many as `bench logs` has files; the others stay silent.
const WRITERS: usize = 10;
/// Bytes of a line, as `bench logs` has them.
const LINE: usize = 200;
/// Lines are written this long before the agent's time is taken: streams are there, connections are open, batches come and go.
const WARM_UP: Duration = Duration::from_secs(3);
/// Lines come in portions, this often.
const PORTION: Duration = Duration::from_millis(20);
/// Until everything that was written is acknowledged.
const SHIPPED_WITHIN: Duration = Duration::from_secs(60);

/// CPU time of a process, to the nanosecond.
fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).context("find the agent's CPU clock")?;
    Ok(Duration::from(clock_gettime(clock).context("read the agent's CPU clock")?))
}

fn shipped(node: &Node) -> anyhow::Result<u64> {
    let logs = node.cli_json(&["logs"])?;
    logs["totals"]["events_shipped"].as_u64().with_context(|| format!("no count of shipped events in {logs}"))
}

/// A row for each rate: the agent's CPU time while the rate goes on, by that time.
///
/// # Errors
/// When a line cannot be written or is not acknowledged.
pub(super) async fn run(quick: bool, node: &Node, agent: u32, pods: &mut [Pod], progress: &Progress) -> anyhow::Result<Vec<Row>> {
    let (rates, seconds) = if quick { (&RATES[..QUICK], 5) } else { (&RATES[..], 15) };
    let window = Duration::from_secs(seconds);
    let (mut rows, mut at_rest) = (Vec::new(), 0.0);
    for rate in rates {
        progress.at(format_args!("log lines: {rate} a second for {seconds} s"));
        let before = shipped(node)?;
        let mut warmed_up = (cpu(agent)?, Instant::now());
        let written = write(pods, *rate, WARM_UP + window, || {
            warmed_up = (cpu(agent)?, Instant::now());
            Ok(())
        })
        .await?;
        let percent = (cpu(agent)? - warmed_up.0).as_secs_f64() / warmed_up.1.elapsed().as_secs_f64() * 100.0;
        wait_for("every line to be acknowledged", SHIPPED_WITHIN, || async {
            let shipped = shipped(node)? - before;
            ensure!(shipped >= written, "{shipped} of {written} lines");
            Ok(())
        })
        .await?;
        let row = Row::plain(format!("agent at {rate} log lines a second, CPU of one core"), percent, "%");
        rows.push(row.at(Plot::LogRate, "agent", f64::from(*rate)));
        if *rate == 0 {
            at_rest = percent;
        } else if *rate == MEGABYTE {
            rows.push(Row::plain("of it for a megabyte of lines a second", percent - at_rest, "%").target(MOST_PERCENT));
        }
    }
    Ok(rows)
}

/// Lines that were written in this time, `rate` a second; tells when the warm-up is over.
async fn write(pods: &mut [Pod], rate: u32, window: Duration, warmed_up: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<u64> {
    let mut warmed_up = Some(warmed_up);
    let filler = "status=200 bytes=5123 agent=curl/8.4 ".repeat(LINE / 30);
    let start = Instant::now();
    let mut portions = interval(PORTION);
    portions.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut written = 0_u64;
    loop {
        portions.tick().await;
        let elapsed = start.elapsed().min(window);
        if elapsed >= WARM_UP
            && let Some(warmed_up) = warmed_up.take()
        {
            warmed_up()?;
        }
        let due = (elapsed.as_millis() * u128::from(rate) / 1_000) as u64;
        while written < due {
            // Digits that no compressor can know.
            let id = written.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut line = format!("level=info msg=\"request served\" id={id:016x} n={written} {filler}");
            // The runtime's own stamp and newline are 41 bytes.
            line.truncate(LINE - 41);
            let at = written as usize % WRITERS.min(pods.len());
            pods[at].log.line(Output::Stdout, &line).context("write a log line")?;
            written += 1;
        }
        if elapsed == window {
            return Ok(written);
        }
    }
}
