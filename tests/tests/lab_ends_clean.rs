//! A lab that is asked to end takes everything with it: namespaces, its directory, the agents in it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stanchion_lab::cluster::SOON;
use stanchion_lab::{netns, run};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

async fn a_lab_ended_by(signal: Signal) {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["up", "--nodes", "t3.small", "--pods", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("the lab starts");
    let pid = lab.id().expect("it has not ended");
    let id = format!("{pid}x0");
    let mut lines = BufReader::new(lab.stdout.take().expect("its output is piped")).lines();
    // The node's agent is about to start: namespaces, interfaces and a bpffs are there.
    let mut said = Vec::new();
    let deadline = tokio::time::Instant::now() + SOON;
    while let Some(line) = tokio::time::timeout_at(deadline, lines.next_line()).await.expect("it gets there").expect("read its output") {
        let there = line.contains("starting its agent");
        said.push(line);
        if there {
            break;
        }
    }
    assert!(!netns::names(&format!("stlab{id}-")).is_empty(), "the lab made no namespace; it said {said:?}");

    kill(Pid::from_raw(pid.cast_signed()), signal).expect("the lab lives");
    let ended = tokio::time::timeout(Duration::from_secs(30), lab.wait()).await.expect("the lab ends").expect("its status");
    assert!(ended.success(), "after {signal} the lab ended with {ended}");
    assert_eq!(netns::names(&format!("stlab{id}-")), Vec::<String>::new(), "namespaces left after {signal}");
    assert!(!Path::new(run::RUNS_DIR).join(&id).exists(), "its directory is left after {signal}");
}

#[tokio::test]
async fn sigterm_takes_everything_down() {
    a_lab_ended_by(Signal::SIGTERM).await;
}

#[tokio::test]
async fn a_closed_terminal_takes_everything_down() {
    a_lab_ended_by(Signal::SIGHUP).await;
}

#[tokio::test]
async fn control_c_takes_everything_down() {
    a_lab_ended_by(Signal::SIGINT).await;
}
