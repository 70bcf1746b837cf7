//! `status`, `enis`, `ips`, `endpoints`, `policy`, `conntrack`, `logs`, `config`, `flows`: what the running agent says.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use serde_json::Value;
use stanchion_proto::debug_client::DebugClient;
use stanchion_proto::{FlowEvent, GetStatusRequest, JsonReply, ListRequest, PolicyRequest, SetLogLevelRequest, StreamFlowsRequest};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use super::client::{Connection, block_on, connect};
use super::table::Table;

/// Questions to the running agent.
#[derive(Subcommand)]
pub(crate) enum Question {
    /// The whole agent on a page
    Status,
    /// ENIs, their prefixes and addresses
    Enis,
    /// Addresses and who holds them
    Ips,
    /// Policed pods with their counters
    Endpoints,
    /// Open flows
    Conntrack,
    /// Tailed log files: lag, offset, last error
    Logs,
    /// Settings in force and where they come from
    Config,
    /// Denied flows as they happen
    Flows {
        /// Go on until interrupted; without it, one flow ends the command
        #[arg(short, long)]
        follow: bool,
        /// Also flows that were allowed
        #[arg(long)]
        allowed: bool,
        /// Only those of a pod (namespace/name) or namespace (namespace/)
        #[arg(long, default_value = "")]
        pod: String,
        #[command(flatten)]
        filter: FlowFilter,
    },
    /// Change the log filter of the running agent, e.g. info,stanchion_daemon::ipamd=debug
    LogLevel {
        /// A tracing filter
        filter: String,
    },
}

/// Which flows are shown: those that meet every condition given.
#[derive(clap::Args, Default)]
pub(crate) struct FlowFilter {
    /// ingress or egress, as the pod that was judged sees it
    #[arg(long, value_parser = ["ingress", "egress"])]
    direction: Option<String>,
    /// denied, allowed or audited
    #[arg(long, value_parser = ["denied", "allowed", "audited"])]
    verdict: Option<String>,
    /// TCP, UDP, SCTP, ICMP, ICMPv6 or a number
    #[arg(long)]
    protocol: Option<String>,
    /// Source or destination port
    #[arg(long)]
    port: Option<u32>,
    /// Source or destination address
    #[arg(long)]
    ip: Option<std::net::IpAddr>,
    /// Part of the name of the policy that decided
    #[arg(long)]
    policy: Option<String>,
}

impl FlowFilter {
    fn admits(&self, event: &FlowEvent) -> bool {
        let same = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(found));
        let ip = self.ip.map(|ip| ip.to_string());
        same(&self.direction, &event.direction)
            && same(&self.verdict, &event.verdict)
            && same(&self.protocol, &event.protocol)
            && self.port.is_none_or(|port| [event.source_port, event.destination_port].contains(&port))
            && ip.is_none_or(|ip| [&event.source, &event.destination].contains(&&ip))
            && self.policy.as_ref().is_none_or(|policy| event.policy.contains(policy))
    }
}

/// Asks and shows.
pub(crate) fn run(connection: &Connection, question: &Question) -> Result<ExitCode> {
    block_on(async {
        if let (Some(seconds), false) = (connection.watch, matches!(question, Question::Flows { .. } | Question::LogLevel { .. })) {
            return watch(connection, question, std::time::Duration::from_secs(seconds.into())).await;
        }
        let mut agent = connect(&connection.socket).await?;
        if let Question::Flows { follow, allowed, pod, filter } = question {
            return flows(&mut agent, connection, *follow, *allowed, pod, filter).await;
        }
        let document = ask(&mut agent, question).await?;
        if connection.output == "json" {
            println!("{}", serde_json::to_string_pretty(&document)?);
        } else {
            print!("{}", render(question, &document));
        }
        let ready = document.pointer("/ipam/ready").and_then(Value::as_bool).unwrap_or(true);
        Ok(if matches!(question, Question::Status) && !ready { ExitCode::from(3) } else { ExitCode::SUCCESS })
    })
}

/// Asks again and again until it is interrupted. An agent that restarts is waited for.
async fn watch(connection: &Connection, question: &Question, pause: std::time::Duration) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    loop {
        let document = async { ask(&mut connect(&connection.socket).await?, question).await }.await;
        if connection.output == "json" {
            println!("{}", document?);
        } else {
            let text = document.map_or_else(|error| format!("{error:#}\n"), |document| render(question, &document));
            // On a terminal each picture replaces the last one.
            let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            print!("{clear}{text}");
            std::io::stdout().flush().context("write the table")?;
        }
        tokio::select! {
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Every document of the agent, by name; one that its role does not have is an error.
pub(crate) async fn everything(agent: &mut DebugClient<Channel>) -> Vec<(&'static str, Result<Value>)> {
    let list = ListRequest {};
    vec![
        ("status", read(agent.get_status(GetStatusRequest {}).await)),
        ("addresses", read(agent.list_enis(list).await)),
        ("endpoints", read(agent.list_endpoints(list).await)),
        ("policy", read(agent.get_policy(PolicyRequest::default()).await)),
        ("conntrack", read(agent.list_conntrack(list).await)),
        ("logs", read(agent.list_logs(list).await)),
        ("config", read(agent.get_config(list).await)),
        ("metrics", read(agent.get_metrics(list).await)),
    ]
}

/// `stanchion policy show`: the state of the policed pods.
pub(crate) fn policy(connection: &Connection, pod: &str) -> Result<ExitCode> {
    block_on(async {
        let mut agent = connect(&connection.socket).await?;
        let document = read(agent.get_policy(PolicyRequest { pod: pod.to_owned() }).await)?;
        if !pod.is_empty() && items(&document, "/endpoints").is_empty() {
            bail!("{pod} is no policed pod of this node; `stanchion endpoints` lists them");
        }
        if connection.output == "json" {
            println!("{}", serde_json::to_string_pretty(&document)?);
            return Ok(ExitCode::SUCCESS);
        }
        let mut table = Table::new(&["POD", "INGRESS", "EGRESS", "POLICIES", ">REVISION"]);
        for item in items(&document, "/endpoints") {
            let policies: Vec<String> = items(item, "/policies").iter().map(text).collect();
            table.row([
                pod_name(item.pointer("/endpoint/pod")),
                isolation(item, "/endpoint/ingress_isolated"),
                isolation(item, "/endpoint/egress_isolated"),
                policies.join(", "),
                at(item, "/endpoint/revision"),
            ]);
        }
        print!("{}", table.render("no policed pods on this node"));
        for problem in items(&document, "/problems") {
            println!("problem: {}", text(problem));
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn ask(agent: &mut DebugClient<Channel>, question: &Question) -> Result<Value> {
    let list = ListRequest {};
    read(match question {
        Question::Status => agent.get_status(GetStatusRequest {}).await,
        Question::Enis => agent.list_enis(list).await,
        Question::Ips => agent.list_ips(list).await,
        Question::Endpoints => agent.list_endpoints(list).await,
        Question::Conntrack => agent.list_conntrack(list).await,
        Question::Logs => agent.list_logs(list).await,
        Question::Config => agent.get_config(list).await,
        Question::LogLevel { filter } => agent.set_log_level(SetLogLevelRequest { filter: filter.clone() }).await,
        Question::Flows { .. } => bail!("flows are a stream"),
    })
}

fn read(reply: Result<tonic::Response<JsonReply>, tonic::Status>) -> Result<Value> {
    match reply {
        Ok(reply) => serde_json::from_str(&reply.get_ref().json).context("the agent's answer is no JSON: versions apart?"),
        Err(status) => bail!("{}", status.message()),
    }
}

async fn flows(
    agent: &mut DebugClient<Channel>,
    connection: &Connection,
    follow: bool,
    allowed: bool,
    pod: &str,
    filter: &FlowFilter,
) -> Result<ExitCode> {
    // To ask for allowed flows is to want them told.
    let allowed = allowed || filter.verdict.as_deref() == Some("allowed");
    let mut stream = match agent.stream_flows(StreamFlowsRequest { allowed, pod: pod.to_owned() }).await {
        Ok(reply) => reply.into_inner(),
        Err(status) => bail!("{}", status.message()),
    };
    while let Some(event) = stream.message().await.map_err(|status| anyhow::anyhow!("{}", status.message()))? {
        if !filter.admits(&event) {
            continue;
        }
        let named = |pod: &str, address: &str| if pod.is_empty() { address.to_owned() } else { format!("{pod} ({address})") };
        if connection.output == "json" {
            let line = serde_json::json!({
                "time_unix_ns": event.time_unix_ns, "verdict": event.verdict, "direction": event.direction, "source": event.source,
                "source_pod": event.source_pod, "source_port": event.source_port, "destination": event.destination,
                "destination_pod": event.destination_pod, "destination_port": event.destination_port, "protocol": event.protocol,
                "policy": event.policy, "rule": event.rule, "reason": event.reason, "packets": event.packets, "bytes": event.bytes,
            });
            println!("{line}");
        } else {
            let time = jiff::Timestamp::from_nanosecond(event.time_unix_ns.into()).map_or_else(|_| "-".to_owned(), |t| format!("{t:.3}"));
            let by = [event.policy.as_str(), event.rule.as_str(), event.reason.as_str()]
                .iter()
                .filter(|p| !p.is_empty())
                .copied()
                .collect::<Vec<_>>()
                .join(", ");
            println!(
                "{time}  {:7}  {:7}  {}:{} -> {}:{}  {}  {by}",
                event.verdict,
                event.direction,
                named(&event.source_pod, &event.source),
                event.source_port,
                named(&event.destination_pod, &event.destination),
                event.destination_port,
                event.protocol,
            );
        }
        if !follow {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn items<'a>(document: &'a Value, pointer: &str) -> &'a [Value] {
    document.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn at(document: &Value, pointer: &str) -> String {
    document.pointer(pointer).map(text).unwrap_or_default()
}

fn pod_name(value: Option<&Value>) -> String {
    match value {
        Some(Value::Object(pod)) => {
            format!("{}/{}", pod.get("namespace").map(text).unwrap_or_default(), pod.get("name").map(text).unwrap_or_default())
        }
        Some(other) => text(other),
        None => String::new(),
    }
}

fn isolation(item: &Value, pointer: &str) -> String {
    if item.pointer(pointer).and_then(Value::as_bool) == Some(true) { "isolated" } else { "open" }.to_owned()
}

fn render(question: &Question, document: &Value) -> String {
    match question {
        Question::Status => status(document),
        Question::Enis => enis(document),
        Question::Ips => ips(document),
        Question::Endpoints => endpoints(document),
        Question::Conntrack => conntrack(document),
        Question::Logs => logs(document),
        Question::Config => config(document),
        Question::LogLevel { .. } => format!("log filter is now {}\n", at(document, "/filter")),
        Question::Flows { .. } => String::new(),
    }
}

fn status(document: &Value) -> String {
    let mut lines = vec![format!(
        "stanchion {} on node {} ({})",
        at(document, "/version"),
        at(document, "/node"),
        items(document, "/roles").iter().map(text).collect::<Vec<_>>().join(", ")
    )];
    let state = |ready: Option<&Value>, reason: String| match ready.and_then(Value::as_bool) {
        Some(true) => "ready".to_owned(),
        _ => format!("NOT READY: {reason}"),
    };
    if document.pointer("/ipam").is_some_and(|v| !v.is_null()) {
        lines.push(format!("  addresses  {}", state(document.pointer("/ipam/ready"), at(document, "/ipam/reason"))));
        lines.push(format!(
            "             {} {}, {} of {} ENIs, at most {} pods",
            at(document, "/ipam/instance_type"),
            at(document, "/ipam/instance"),
            at(document, "/ipam/enis"),
            at(document, "/ipam/max_enis"),
            at(document, "/ipam/max_pods")
        ));
        for pool in items(document, "/ipam/pools") {
            lines.push(format!(
                "             card {}: {} addresses, {} assigned, {} free, {} cooling",
                at(pool, "/network_card"),
                at(pool, "/total"),
                at(pool, "/assigned"),
                at(pool, "/free"),
                at(pool, "/cooling")
            ));
        }
        for error in items(document, "/ipam/recent_errors").iter().rev().take(3) {
            lines.push(format!("             last error: {}: {}", at(error, "/operation"), at(error, "/error")));
        }
    }
    if document.pointer("/policy").is_some_and(|v| !v.is_null()) {
        lines.push(format!("  policy     {}", state(document.pointer("/policy/ready"), at(document, "/policy/reason"))));
        lines.push(format!(
            "             {} pods policed, {} isolated; {} policies known",
            at(document, "/policy/endpoints"),
            at(document, "/policy/isolated"),
            at(document, "/cluster/network_policies")
        ));
    }
    if let Some(Value::Object(logs)) = document.pointer("/logs") {
        let counted = logs.iter().filter(|(_, value)| value.as_u64() != Some(0));
        let parts: Vec<String> = counted.map(|(name, value)| format!("{} {}", text(value), name.replace('_', " "))).collect();
        lines.push(format!("  logs       {}", if parts.is_empty() { "nothing read yet".to_owned() } else { parts.join(", ") }));
    }
    if let Some(Value::Object(telemetry)) = document.pointer("/telemetry") {
        let parts: Vec<String> = telemetry.iter().map(|(name, value)| format!("{} {}", name.replace('_', " "), text(value))).collect();
        lines.push(format!("  metrics    {}", parts.join(", ")));
    }
    let synced = if document.pointer("/cluster/synced").and_then(Value::as_bool) == Some(true) { "synced" } else { "not read yet" };
    lines.push(format!(
        "  cluster    {synced}: {} pods in {} namespaces",
        at(document, "/cluster/pods"),
        at(document, "/cluster/namespaces")
    ));
    let is = |pointer: &str, value: bool| document.pointer(pointer).and_then(Value::as_bool) == Some(value);
    if is("/cluster/synced", true) && is("/cluster/node_known", false) {
        lines.push(format!("             no node {} there: if it does not come, MY_NODE_NAME is not its name", at(document, "/node")));
    }
    lines.join("\n") + "\n"
}

fn enis(document: &Value) -> String {
    let mut table = Table::new(&["ENI", ">CARD", ">DEVICE", "MAC", "SUBNET", "ADDRESS", "ROLE", ">TABLE", ">TOTAL", ">ASSIGNED", "CIDRS"]);
    for eni in items(document, "/enis") {
        let cidrs = items(eni, "/cidrs");
        let prefixes: Vec<String> = cidrs.iter().map(|c| at(c, "/cidr")).filter(|c| !c.ends_with("/32") && !c.ends_with("/128")).collect();
        let singles = cidrs.len() - prefixes.len();
        let mut shown = prefixes;
        if singles > 0 {
            shown.push(format!("{singles} single"));
        }
        table.row([
            at(eni, "/id"),
            at(eni, "/network_card"),
            at(eni, "/device_index"),
            at(eni, "/mac"),
            at(eni, "/subnet"),
            at(eni, "/primary_ipv4"),
            at(eni, "/role"),
            at(eni, "/route_table"),
            at(eni, "/total"),
            at(eni, "/assigned"),
            shown.join(" "),
        ]);
    }
    table.render("no ENIs are known yet")
}

fn ips(document: &Value) -> String {
    let mut table = Table::new(&["ADDRESS", "STATE", "POD", "ENI", "SANDBOX"]);
    for address in items(document, "/addresses") {
        let sandbox = at(address, "/key/container_id");
        table.row([
            at(address, "/address"),
            at(address, "/state"),
            pod_name(address.get("pod")),
            at(address, "/eni"),
            sandbox.chars().take(12).collect(),
        ]);
    }
    table.render("no addresses are held yet")
}

fn endpoints(document: &Value) -> String {
    let mut table =
        Table::new(&["POD", "ADDRESS", "VETH", "INGRESS", "EGRESS", ">IN OK", ">IN DENIED", ">OUT OK", ">OUT DENIED", ">FLOWS"]);
    for endpoint in items(document, "/endpoints") {
        let interfaces = items(endpoint, "/interfaces");
        let addresses: Vec<String> = interfaces.iter().flat_map(|i| items(i, "/addresses")).map(text).collect();
        let names: Vec<String> = interfaces.iter().map(|i| at(i, "/name")).collect();
        table.row([
            pod_name(endpoint.get("pod")),
            addresses.join(" "),
            names.join(" "),
            isolation(endpoint, "/ingress_isolated"),
            isolation(endpoint, "/egress_isolated"),
            at(endpoint, "/counters/ingress_allowed/packets"),
            at(endpoint, "/counters/ingress_denied/packets"),
            at(endpoint, "/counters/egress_allowed/packets"),
            at(endpoint, "/counters/egress_denied/packets"),
            at(endpoint, "/flows"),
        ]);
    }
    table.render("no policed pods on this node")
}

fn conntrack(document: &Value) -> String {
    let mut table = Table::new(&["POD", "LOCAL", "REMOTE", ">PROTO", "STATE", ">IDLE S", ">TIMEOUT S"]);
    for flow in items(document, "/flows") {
        table.row([
            pod_name(flow.get("pod")),
            format!("{}:{}", at(flow, "/local"), at(flow, "/local_port")),
            format!("{}:{}", at(flow, "/remote"), at(flow, "/remote_port")),
            at(flow, "/protocol"),
            at(flow, "/state"),
            at(flow, "/idle_seconds"),
            at(flow, "/timeout_seconds"),
        ]);
    }
    table.render("no open flows of policed pods")
}

fn logs(document: &Value) -> String {
    let mut table = Table::new(&["FILE", "STREAM", ">OFFSET", ">LAG BYTES", ">LAG S", "LAST ERROR"]);
    for file in items(document, "/files") {
        table.row([
            at(file, "/path"),
            at(file, "/stream"),
            at(file, "/offset"),
            at(file, "/lag_bytes"),
            at(file, "/lag_seconds"),
            at(file, "/last_error"),
        ]);
    }
    table.render("no log files are tailed")
}

fn config(document: &Value) -> String {
    let mut table = Table::new(&["NAME", "VALUE", "FROM", "MEANING"]);
    for setting in document.as_array().map_or(&[][..], Vec::as_slice) {
        table.row([at(setting, "/name"), at(setting, "/value"), at(setting, "/origin"), at(setting, "/about")]);
    }
    table.render("no settings")
}

#[cfg(test)]
mod flow_tests {
    use super::*;

    #[test]
    fn a_flow_is_shown_if_it_meets_every_condition() {
        let event = FlowEvent {
            verdict: "denied".into(),
            direction: "egress".into(),
            source: "10.0.0.1".into(),
            destination: "10.0.0.2".into(),
            destination_port: 443,
            protocol: "TCP".into(),
            policy: "NetworkPolicy x/p".into(),
            ..FlowEvent::default()
        };
        let all = FlowFilter {
            direction: Some("egress".into()),
            verdict: Some("denied".into()),
            protocol: Some("tcp".into()),
            port: Some(443),
            ip: Some("10.0.0.2".parse().expect("an address")),
            policy: Some("x/p".into()),
        };
        assert!(FlowFilter::default().admits(&event) && all.admits(&event));
        assert!(!FlowFilter { direction: Some("ingress".into()), ..FlowFilter::default() }.admits(&event));
        assert!(!FlowFilter { port: Some(80), ..FlowFilter::default() }.admits(&event));
        assert!(!FlowFilter { ip: Some("10.0.0.3".parse().expect("an address")), ..FlowFilter::default() }.admits(&event));
        assert!(!FlowFilter { policy: Some("y/".into()), ..FlowFilter::default() }.admits(&event));
    }
}
