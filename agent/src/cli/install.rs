//! `stanchion install`: the host before the first pod, and the way back.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use stanchion_core::config::Config;
use stanchion_core::conflist::{FILE_NAME, Owner, PLUGIN, owner};
use stanchion_daemon::install::steps::{self, Mark, Places, Step};
use stanchion_daemon::netpol;
use stanchion_netlink::nft;

use super::client::Connection;

/// Flags of `install`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct InstallArgs {
    /// The runtime's plugins on the host
    #[arg(long, env = "HOST_CNI_BIN_PATH", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The runtime's network configurations on the host
    #[arg(long, env = "HOST_CNI_CONFDIR_PATH", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Leave the configuration to the agent, which writes it when it can connect pods
    #[arg(long)]
    no_conflist: bool,
    /// Our plugin; default: beside this program
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// The way back, once the agent has ended: take away the configuration, if it is ours, the plugin, the programs that enforce network
    /// policy and, once aws-node has written its configuration, source NAT; pods keep their network
    #[arg(long)]
    remove: bool,
    /// Where the programs' maps are pinned
    #[arg(long, default_value = netpol::PIN_ROOT)]
    bpf_dir: PathBuf,
}

/// Exit status 0: everything holds; 1: a step failed; 64: a setting cannot be used.
pub(crate) fn run(args: &InstallArgs, connection: &Connection) -> Result<ExitCode> {
    let config = match Config::read(&|name| std::env::var(name).ok()) {
        Ok(config) => config,
        Err(errors) => {
            for error in errors {
                eprintln!("stanchion install: {error}");
            }
            return Ok(ExitCode::from(64));
        }
    };
    let plugin = match &args.plugin {
        Some(plugin) => plugin.clone(),
        None => beside_this_program(PLUGIN)?,
    };
    let places = Places {
        plugin,
        bin_dir: args.bin_dir.clone(),
        conf_dir: (!args.no_conflist).then(|| args.conf_dir.clone()),
        socket: connection.socket.clone(),
        proc_root: "/proc".into(),
        sys_root: "/sys".into(),
        modules: "/lib/modules".into(),
        disable_early_demux: config.network.disable_tcp_early_demux,
        ipv6: config.pool.ipv6,
        egress: if config.pool.ipv6 { config.network.v4_egress } else { config.network.v6_egress },
    };
    let steps = if args.remove { remove(&places, args) } else { steps::install(&places) };
    if connection.output == "json" {
        println!("{}", serde_json::to_string_pretty(&steps)?);
    } else {
        print!("{}", render(&steps));
    }
    Ok(if steps.iter().any(|step| step.mark == Mark::Failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Nothing while an agent serves the node: it would put all of it back.
fn remove(places: &Places, args: &InstallArgs) -> Vec<Step> {
    if UnixStream::connect(&places.socket).is_ok() {
        let text = format!("one answers at {}: end it first; nothing was removed", places.socket.display());
        return vec![Step { what: "agent".to_owned(), mark: Mark::Failed, text }];
    }
    let mut steps = steps::remove(places);
    let (mark, text) = match netpol::remove_from_host(&args.bpf_dir) {
        Ok(0) => (Mark::Present, "no pod's interface has our programs".to_owned()),
        Ok(interfaces) => {
            (Mark::Done, format!("our programs were taken from {interfaces} interfaces of pods; who comes after us enforces"))
        }
        Err(error) => (Mark::Failed, format!("{:#}", anyhow::Error::new(error))),
    };
    steps.push(Step { what: "network policy".to_owned(), mark, text });
    steps.push(source_nat(&args.conf_dir));
    steps
}

/// Pods need it until another agent's is there: aws-node writes its configuration when it is ready.
fn source_nat(conf_dir: &Path) -> Step {
    let conflist = std::fs::read_to_string(conf_dir.join(FILE_NAME)).unwrap_or_default();
    let (mark, text) = if owner(&conflist) == Owner::AwsNode {
        match nft::remove_from_host() {
            Ok(None) => (Mark::Present, "there is no table of ours".to_owned()),
            Ok(Some(false)) => (Mark::Done, "our table was removed; aws-node's rules translate".to_owned()),
            Ok(Some(true)) => {
                (Mark::Done, "our rules were removed, but those for the second address family of pods that we connected".to_owned())
            }
            Err(error) => (Mark::Failed, error),
        }
    } else {
        let remedy = "our table stays, as pods need it: run this again when aws-node has written its configuration, or nft delete table ip stanchion";
        (Mark::Warning, remedy.to_owned())
    };
    Step { what: "source NAT".to_owned(), mark, text }
}

/// A file in the directory of this program.
pub(crate) fn beside_this_program(name: &str) -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.parent().unwrap_or(Path::new("/")).join(name))
}

fn render(steps: &[Step]) -> String {
    let width = steps.iter().map(|step| step.what.chars().count()).max().unwrap_or(0);
    let line = |step: &Step| {
        let mark = match step.mark {
            Mark::Present => "ok     ",
            Mark::Done => "done   ",
            Mark::Warning => "WARNING",
            Mark::Failed => "FAILED ",
        };
        format!("{mark}  {:width$}  {}\n", step.what, step.text)
    };
    steps.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_nat_stays_until_aws_node_has_written_its_configuration() {
        let conf_dir = tempfile::tempdir().expect("a directory");
        for text in [None, Some(""), Some(r#"{"plugins": [{"type": "stanchion-cni"}]}"#), Some(r#"{"plugins": [{"type": "cilium-cni"}]}"#)]
        {
            if let Some(text) = text {
                std::fs::write(conf_dir.path().join(FILE_NAME), text).expect("written");
            }
            let step = source_nat(conf_dir.path());
            assert_eq!(step.mark, Mark::Warning, "{text:?}: {step:?}");
        }
    }

    #[test]
    fn a_report_is_a_line_a_step() {
        let steps = [
            Step { what: "kernel".into(), mark: Mark::Present, text: "6.12".into() },
            Step { what: "10-aws.conflist".into(), mark: Mark::Failed, text: "no room".into() },
        ];
        assert_eq!(render(&steps), "ok       kernel           6.12\nFAILED   10-aws.conflist  no room\n");
    }
}
