//! `stanchion policy`: what the network policies of a set of manifests allow, and why (offline); what the running agent
//! enforces (`show`).

use std::io::{BufRead as _, BufWriter, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use stanchion_core::cluster::ClusterState;
use stanchion_core::policy::engine::{Source, UnselectedPod};
use stanchion_core::policy::model::PacketProtocol;
use stanchion_core::policy::names::Names;
use stanchion_core::policy::verdict::{End, Evaluator, NoVerdict, SideVerdict, Verdict};
use stanchion_daemon::cluster::read_once;

use super::client::Connection;

/// Questions about policies.
#[derive(clap::Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    question: Question,
}

#[derive(clap::Subcommand)]
enum Question {
    /// The running agent's policed pods and the policies that select them
    Show {
        /// Only this pod: namespace/name
        #[arg(default_value = "")]
        pod: String,
    },
    /// Judge connections: JSON lines in, JSON lines out in the same order
    Verdict {
        /// Directory of Kubernetes manifests
        #[arg(long)]
        manifests: PathBuf,
        /// File of probes, `-` for standard input: {"from":"x/a","to":"y/b","family":4,"protocol":"TCP","port":80};
        /// an end is namespace/pod, node:NAME or an address
        #[arg(long)]
        probes: PathBuf,
        #[command(flatten)]
        world: World,
    },
    /// Say who decides about one connection, and what is missing to allow it
    Explain {
        /// Directory of Kubernetes manifests
        #[arg(long)]
        manifests: PathBuf,
        /// Source: namespace/pod, node:NAME or an address
        #[arg(long)]
        from: End,
        /// Destination: namespace/pod, node:NAME or an address (a service's too)
        #[arg(long)]
        to: End,
        /// Destination port
        #[arg(long, default_value_t = 0)]
        port: u16,
        /// TCP, UDP, SCTP, ICMP or an IP protocol number
        #[arg(long, default_value = "TCP", value_parser = protocol)]
        protocol: PacketProtocol,
        /// IP family: 4 or 6; by default that of an address given, else 4
        #[arg(long, value_parser = clap::value_parser!(u8).range(4..=6))]
        family: Option<u8>,
        #[command(flatten)]
        world: World,
    },
}

/// What manifests leave open.
#[derive(clap::Args)]
struct World {
    /// Objects that policies are read from: policies or policy-endpoints
    #[arg(long, default_value = "policies", value_parser = source)]
    source: Source,
    /// As with NETWORK_POLICY_ENFORCING_MODE=strict: a pod that no NetworkPolicy selects is closed
    #[arg(long)]
    strict: bool,
    /// An address that a DNS name has, for rules with domainNames: name=address; may be repeated
    #[arg(long = "name", value_name = "NAME=ADDRESS", value_parser = named)]
    names: Vec<(String, IpAddr)>,
}

fn source(text: &str) -> Result<Source> {
    match text {
        "policies" => Ok(Source::Policies),
        "policy-endpoints" => Ok(Source::Endpoints),
        _ => bail!("write policies or policy-endpoints"),
    }
}

fn named(text: &str) -> Result<(String, IpAddr)> {
    let (name, address) = text.split_once('=').context("write name=address")?;
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    Ok((name, address.parse().with_context(|| format!("{address:?} is no address"))?))
}

impl World {
    /// The evaluator of a snapshot; what is wrong or open in its policies goes to standard error, answers hold nevertheless.
    fn evaluator<'a>(&self, cluster: &'a ClusterState) -> Result<Evaluator<'a>> {
        let mut names = Names::default();
        for (name, address) in &self.names {
            names.set(name, *address)?;
        }
        let unselected_pod = if self.strict { UnselectedPod::Closed } else { UnselectedPod::Open };
        let evaluator = Evaluator::new(cluster, self.source, names).with_unselected_pod(unselected_pod);
        for problem in &evaluator.problems {
            eprintln!("stanchion: {problem}");
        }
        if evaluator.is_by_name() && self.names.is_empty() {
            eprintln!(
                "stanchion: some rules speak of DNS names; on a node they match the addresses in the pods' DNS answers, here none. Give --name NAME=ADDRESS."
            );
        }
        Ok(evaluator)
    }
}

/// A connection to judge.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Probe {
    from: String,
    to: String,
    family: Option<u8>,
    #[serde(default = "tcp")]
    protocol: String,
    #[serde(default)]
    port: u16,
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// An answer line.
#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Verdict(Box<Verdict>),
    /// Nothing can be said: no such end, or no address of the family.
    None {
        allowed: Option<bool>,
        error: String,
    },
}

/// Answers the question.
pub(crate) fn run(args: PolicyArgs, connection: &Connection) -> Result<ExitCode> {
    match args.question {
        Question::Show { pod } => super::inspect::policy(connection, &pod),
        Question::Verdict { manifests, probes, world } => verdicts(&manifests, &probes, &world),
        Question::Explain { manifests, from, to, port, protocol, family, world } => {
            explain(&manifests, &world, (&from, &to), family_of(family, &from, &to)?, protocol, port)
        }
    }
}

fn protocol(text: &str) -> Result<PacketProtocol> {
    Ok(PacketProtocol::from_number(match text.to_ascii_uppercase().as_str() {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        "ICMP" => 1,
        "ICMPV6" => 58,
        other => other.parse().ok().with_context(|| format!("{text:?} is no protocol: write TCP, UDP, SCTP, ICMP or a number"))?,
    }))
}

fn family_of(given: Option<u8>, from: &End, to: &End) -> Result<u8> {
    let mut family = given;
    for end in [from, to] {
        if let End::Address(address) = end {
            let of_address = if address.is_ipv4() { 4 } else { 6 };
            if *family.get_or_insert(of_address) != of_address {
                bail!("{address} is no IPv{} address", family.unwrap_or(4));
            }
        }
    }
    match family.unwrap_or(4) {
        family @ (4 | 6) => Ok(family),
        other => bail!("family {other}: write 4 or 6"),
    }
}

fn verdicts(directory: &Path, probes: &Path, world: &World) -> Result<ExitCode> {
    let cluster = read_once(directory)?;
    let evaluator = world.evaluator(&cluster)?;
    let input: Box<dyn std::io::Read> = if probes == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(probes).with_context(|| format!("open {}", probes.display()))?)
    };
    let mut output = BufWriter::new(std::io::stdout().lock());
    let mut bad = 0;
    for (index, line) in std::io::BufReader::new(input).lines().enumerate() {
        let line = line.with_context(|| format!("read {}", probes.display()))?;
        if line.trim().is_empty() {
            continue;
        }
        // Each probe has its answer, so that one bad line shifts nobody else's.
        let answer = judge(&evaluator, &line).unwrap_or_else(|error| {
            bad += 1;
            eprintln!("stanchion: {} line {}: {error:#}", probes.display(), index + 1);
            Answer::None { allowed: None, error: format!("{error:#}") }
        });
        serde_json::to_writer(&mut output, &answer)?;
        output.write_all(b"\n")?;
    }
    output.flush()?;
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn judge(evaluator: &Evaluator<'_>, line: &str) -> Result<Answer> {
    let probe: Probe = serde_json::from_str(line).context("no probe")?;
    let (from, to): (End, End) = (probe.from.parse()?, probe.to.parse()?);
    let family = family_of(probe.family, &from, &to)?;
    Ok(match evaluator.verdict(&from, &to, family, protocol(&probe.protocol)?, probe.port) {
        Ok(verdict) => Answer::Verdict(Box::new(verdict)),
        Err(error @ (NoVerdict::Unknown(_) | NoVerdict::NoAddress(..))) => Answer::None { allowed: None, error: error.to_string() },
    })
}

fn explain(directory: &Path, world: &World, (from, to): (&End, &End), family: u8, protocol: PacketProtocol, port: u16) -> Result<ExitCode> {
    let cluster = read_once(directory)?;
    let evaluator = world.evaluator(&cluster)?;
    let verdict = evaluator.verdict(from, to, family, protocol, port)?;
    let word = if verdict.allowed { "ALLOWED" } else { "DENIED" };
    let what = match protocol {
        PacketProtocol::Transport(_) => format!("{protocol} port {port}"),
        PacketProtocol::Other(_) => protocol.to_string(),
    };
    println!("{word}: {from} -> {to}, {what}, IPv{family}\n");
    print_side(&format!("egress of {from}"), &verdict.egress);
    print_side(&format!("ingress of {to}"), &verdict.ingress);
    Ok(ExitCode::SUCCESS)
}

fn print_side(title: &str, side: &SideVerdict) {
    println!("{title}: {}", if side.allowed { "allowed" } else { "denied" });
    println!("  {}", side.reason);
    if let Some(rule) = &side.decided {
        let name = if rule.name.is_empty() { String::new() } else { format!(" ({})", rule.name) };
        println!("  rule {}{name} of {}, tier {}", rule.rule, rule.policy, rule.tier);
        println!("  peer: {}", rule.peer.as_deref().unwrap_or("anyone"));
    }
    for line in &side.missing {
        println!("  {line}");
    }
    if side.decided.is_none() && !side.selected_by.is_empty() {
        println!("  selected by: {}", side.selected_by.join(", "));
    }
    println!();
}
