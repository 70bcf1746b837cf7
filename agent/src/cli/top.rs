//! `stanchion top`: the node's pods by what they use, from the agent's last metric tick.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use stanchion_proto::ListRequest;

use super::client::{self, Connection};
use super::table::Table;

/// Shows pods by what they use.
#[derive(clap::Args)]
pub(crate) struct TopArgs {
    /// Only this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// What to sort by
    #[arg(long, value_parser = ["cpu", "memory", "network", "drops", "logs", "restarts", "name"], default_value = "cpu")]
    sort: String,
    /// Rows shown
    #[arg(long, default_value_t = 40)]
    rows: usize,
    /// Print once and end, also on a terminal
    #[arg(long)]
    once: bool,
    /// Seconds between looks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

/// The parts of the agent's metrics document that are shown; a figure that is not known yet is absent.
#[derive(Deserialize)]
struct Document {
    wall_ms: i64,
    node: Node,
    pods: Vec<Pod>,
}

#[derive(Deserialize)]
struct Node {
    cpu: Option<Cpu>,
    cpu_limit: f64,
    memory: Memory,
    memory_limit: u64,
    net: Option<Traffic>,
    load: [f64; 3],
    running_pods: u64,
}

#[derive(Deserialize)]
struct Pod {
    meta: Meta,
    cpu: Option<Cpu>,
    memory: Option<Memory>,
    net: Option<Traffic>,
    denied: Option<f64>,
    log_bytes: Option<f64>,
}

#[derive(Deserialize)]
struct Meta {
    namespace: String,
    name: String,
    phase: String,
    limits: Limits,
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct Limits {
    cpu: Option<f64>,
    memory: Option<f64>,
}

#[derive(Deserialize)]
struct Container {
    restarts: u64,
}

#[derive(Clone, Copy, Deserialize)]
struct Cpu {
    total: f64,
}

#[derive(Clone, Copy, Deserialize)]
struct Memory {
    working_set: u64,
}

#[derive(Clone, Copy, Deserialize)]
struct Traffic {
    rx: Flow,
    tx: Flow,
}

#[derive(Clone, Copy, Deserialize)]
struct Flow {
    bytes: f64,
}

impl Pod {
    fn restarts(&self) -> u64 {
        self.meta.containers.iter().map(|container| container.restarts).sum()
    }
}

/// Shows the table until interrupted; once where the output is no terminal, and for JSON.
pub(crate) fn run(args: &TopArgs, connection: &Connection) -> Result<ExitCode> {
    client::block_on(async {
        let mut agent = client::connect(&connection.socket).await?;
        let json = connection.output == "json";
        let live = !args.once && !json && std::io::stdout().is_terminal();
        let mut looks = tokio::time::interval(Duration::from_secs(args.interval));
        loop {
            looks.tick().await;
            let reply = agent.get_metrics(ListRequest {}).await.context("ask for the metrics")?.into_inner();
            if json {
                println!("{}", reply.json);
                return Ok(ExitCode::SUCCESS);
            }
            let document: Document = serde_json::from_str(&reply.json).context("read the agent's metrics document")?;
            let text = render(args, &document);
            if !live {
                print!("{text}");
                return Ok(ExitCode::SUCCESS);
            }
            // Home, and clear to the end: no flicker.
            print!("\x1b[H\x1b[J{text}");
            std::io::Write::flush(&mut std::io::stdout()).context("write the table")?;
        }
    })
}

fn render(args: &TopArgs, document: &Document) -> String {
    if document.wall_ms == 0 {
        return "the agent has not finished its first metric tick yet\n".to_owned();
    }
    let mut pods: Vec<&Pod> =
        document.pods.iter().filter(|pod| args.namespace.as_ref().is_none_or(|wanted| pod.meta.namespace == *wanted)).collect();
    let key = |pod: &Pod| match args.sort.as_str() {
        "cpu" => pod.cpu.map_or(-1.0, |cpu| cpu.total),
        "memory" => pod.memory.map_or(-1.0, |memory| memory.working_set as f64),
        "network" => pod.net.map_or(-1.0, |net| net.rx.bytes + net.tx.bytes),
        "drops" => pod.denied.unwrap_or(-1.0),
        "logs" => pod.log_bytes.unwrap_or(-1.0),
        "restarts" => pod.restarts() as f64,
        _ => 0.0,
    };
    // The document is in order of names; a stable sort keeps it where the keys are equal.
    pods.sort_by(|a, b| key(b).total_cmp(&key(a)));
    let mut table = Table::new(&[
        "NAMESPACE",
        "POD",
        "PHASE",
        ">CPU m",
        ">OF LIMIT",
        ">MEMORY",
        ">OF LIMIT",
        ">RX/s",
        ">TX/s",
        ">DROPS/s",
        ">LOGS/s",
        ">RESTARTS",
    ]);
    for pod in pods.iter().take(args.rows) {
        let (cpu, memory) = (pod.cpu.map(|cpu| cpu.total), pod.memory.map(|memory| memory.working_set as f64));
        table.row([
            pod.meta.namespace.clone(),
            pod.meta.name.clone(),
            pod.meta.phase.clone(),
            cpu.map_or_else(String::new, |cpu| format!("{cpu:.1}")),
            share(cpu, pod.meta.limits.cpu),
            memory.map_or_else(String::new, bytes),
            share(memory, pod.meta.limits.memory),
            pod.net.map_or_else(String::new, |net| bytes(net.rx.bytes)),
            pod.net.map_or_else(String::new, |net| bytes(net.tx.bytes)),
            pod.denied.map_or_else(String::new, |denied| format!("{denied:.1}")),
            pod.log_bytes.map_or_else(String::new, bytes),
            pod.restarts().to_string(),
        ]);
    }
    let hidden = pods.len().saturating_sub(args.rows);
    let more = if hidden > 0 { format!("... and {hidden} more (--rows)\n") } else { String::new() };
    format!("{}\n{}{more}", summary(&document.node, document.wall_ms), table.render("no pods on this node"))
}

fn summary(node: &Node, wall_ms: i64) -> String {
    let cpu = node.cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{:.0}m", cpu.total));
    let net = node.net.map_or_else(|| "-".to_owned(), |net| format!("{}/s in, {}/s out", bytes(net.rx.bytes), bytes(net.tx.bytes)));
    let at = jiff::Timestamp::from_millisecond(wall_ms).map_or_else(|_| String::new(), |at| at.strftime("%H:%M:%S UTC").to_string());
    let [one, five, fifteen] = node.load;
    format!(
        "{at}  cpu {cpu} of {:.0}m  memory {} of {}  network {net}  load {one:.2} {five:.2} {fifteen:.2}  pods {}\n",
        node.cpu_limit,
        bytes(node.memory.working_set as f64),
        bytes(node.memory_limit as f64),
        node.running_pods,
    )
}

fn share(used: Option<f64>, limit: Option<f64>) -> String {
    match (used, limit) {
        (Some(used), Some(limit)) if limit > 0.0 => format!("{:.0}%", used / limit * 100.0),
        _ => String::new(),
    }
}

/// Bytes for people: `1.5 MiB`.
fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use stanchion_core::metrics::model::{Cpu as CpuSample, PodSample, Snapshot};
    use stanchion_core::metrics::pods::PodMeta;

    use super::*;

    fn args(sort: &str) -> TopArgs {
        TopArgs { namespace: None, sort: sort.into(), rows: 2, once: true, interval: 2 }
    }

    /// The table reads the very document that the agent's samples make.
    #[test]
    fn the_agents_document_becomes_a_table() {
        let pod = |name: &str, cpu: f64, denied| PodSample {
            meta: Arc::new(PodMeta { namespace: "default".into(), name: name.into(), phase: "Running".into(), ..PodMeta::default() }),
            cpu: Some(CpuSample { total: cpu, user: cpu, system: 0.0 }),
            memory: None,
            net: None,
            net_totals: None,
            restarts: 0,
            denied,
            log_bytes: denied.map(|denied| denied * 1024.0),
            containers: Vec::new(),
        };
        let snapshot = Snapshot {
            wall_ms: 1_795_232_118_300,
            pods: vec![pod("idle", 0.5, None), pod("busy", 900.0, Some(2.0)), pod("middle", 10.0, None)],
            ..Snapshot::default()
        };
        let document: Document = serde_json::from_str(&serde_json::to_string(&snapshot).unwrap()).unwrap();
        let names = |text: &str| -> Vec<String> {
            let rows = text.lines().skip_while(|line| !line.starts_with("NAMESPACE")).skip(1);
            rows.filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned)).collect()
        };
        let by_cpu = render(&args("cpu"), &document);
        assert_eq!(names(&by_cpu), ["busy", "middle", "and"], "{by_cpu}");
        assert_eq!(names(&render(&args("name"), &document))[..2], ["idle", "busy"]);
        assert_eq!(names(&render(&args("logs"), &document))[0], "busy");
        assert!(by_cpu.contains("2.0 KiB"), "{by_cpu}");
        assert!(by_cpu.contains("... and 1 more"));
        let other = TopArgs { namespace: Some("other".into()), ..args("cpu") };
        assert!(render(&other, &document).contains("no pods on this node"));
        assert!(
            render(&args("cpu"), &serde_json::from_str(&serde_json::to_string(&Snapshot::default()).unwrap()).unwrap())
                .contains("not finished")
        );
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!([0.0, 1023.0, 1536.0, 3.0 * 1024.0 * 1024.0 * 1024.0].map(bytes), ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]);
    }
}
