//! `stanchion-cni`: what the container runtime executes for every pod.
//!
//! The CNI environment and standard input in, one JSON document out. It asks the agent for addresses and policy over the
//! root-only socket and builds the pod's network itself: two calls on one connection, one deadline, every step undone on
//! failure. One file a verb. One thread and no runtime: it lives for a millisecond.

mod add;
mod agent;
mod branch;
mod check;
mod del;
mod egress;
mod gc;
mod journal;
mod loopback;
mod sandbox;
mod spool;
mod status;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf, Verb, Version};
use stanchion_netlink::arena::Arena;

use crate::journal::Journal;

#[global_allocator]
static MEMORY: Arena = Arena::new();

fn main() -> ExitCode {
    let mut stdin = Vec::new();
    let outcome = match std::io::stdin().lock().read_to_end(&mut stdin) {
        Ok(_) if is_loopback() => loopback::call(&stdin),
        Ok(_) => call(&stdin),
        Err(error) => Err(CniError::new(ErrorCode::Io, format!("cannot read the network configuration from standard input: {error}"))),
    };
    let (document, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(document)) => (document, ExitCode::SUCCESS),
        Err(error) => {
            let version = NetConf::peek_version(&stdin).unwrap_or_else(|| Version::V110.as_str().to_owned());
            (error.to_json(&version), ExitCode::FAILURE)
        }
    };
    match writeln!(std::io::stdout(), "{document}") {
        Ok(()) => code,
        // The runtime has closed the pipe: it will call DEL.
        Err(_) => ExitCode::FAILURE,
    }
}

/// Executed under the name of the plugin that brings up `lo`.
fn is_loopback() -> bool {
    std::env::args_os().next().is_some_and(|program| Path::new(&program).file_name() == Some(loopback::NAME.as_ref()))
}

/// Performs the call; `None`: nothing is to be printed.
fn call(stdin: &[u8]) -> Result<Option<serde_json::Value>, CniError> {
    let invocation = Invocation::from_env(|name| std::env::var(name).ok())?;
    if invocation.verb == Verb::Version {
        return Ok(Some(Version::report(NetConf::peek_version(stdin).as_deref())));
    }
    let conf = NetConf::parse(stdin)?;
    let mut journal = Journal::start(&conf, &invocation);
    let outcome = match invocation.verb {
        Verb::Add => add::run(&invocation, &conf, &mut journal).map(Some),
        Verb::Del => del::run(&invocation, &conf, &mut journal).map(|()| None),
        Verb::Check => check::run(&invocation, &conf).map(|()| None),
        Verb::Gc => gc::run(&conf).map(|()| None),
        Verb::Status => status::run(&conf).map(|()| None),
        Verb::Version => Ok(None),
    };
    journal.finish(outcome.as_ref().err());
    outcome
}
