//! The text of :61678/metrics, made at each scrape from the parts' latest snapshots: nothing is counted twice or kept here.

pub(super) mod node;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use stanchion_core::metrics::exposition::{Exposition, Format};
use stanchion_core::metrics::families as f;
use stanchion_core::metrics::proc;

use super::{ExtraCounters, TelemetryHandle};
use crate::ipamd::IpamSnapshot;
use crate::logs::LogsSnapshot;
use crate::netpol::NetpolSnapshot;
use crate::netpol::flow_log::FlowLogCounters;

/// What is known at a scrape; a part whose role does not run here is absent, and so are its families.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sources<'a> {
    /// Addresses.
    pub ipam: Option<&'a IpamSnapshot>,
    /// Policy.
    pub netpol: Option<&'a NetpolSnapshot>,
    /// The log of judged flows.
    pub flow_log: Option<FlowLogCounters>,
    /// Log shipping.
    pub logs: Option<&'a LogsSnapshot>,
    /// Metric ticks.
    pub telemetry: Option<&'a TelemetryHandle>,
    /// The agent's version.
    pub version: &'a str,
    /// Also gauges under the names of node_exporter and cAdvisor, for nodes that run neither.
    pub node_and_containers: bool,
}

/// The whole text.
pub fn render(sources: &Sources<'_>, format: Format) -> String {
    let mut out = Exposition::new(format);
    out.family(&f::BUILD_INFO).value(&[sources.version, "none"], 1.0);
    if let Some(ipam) = sources.ipam {
        addresses(&mut out, ipam);
        calls(&mut out, ipam);
    }
    if let Some(netpol) = sources.netpol {
        policy(&mut out, netpol);
    }
    if let Some(flow_log) = sources.flow_log {
        out.single(&f::FLOW_LOG_SENT, flow_log.lines_sent as f64);
        out.single(&f::FLOW_LOG_DROPPED, flow_log.lines_dropped as f64);
        out.single(&f::FLOW_LOG_LOST, flow_log.records_lost as f64);
    }
    if let Some(logs) = sources.logs {
        log_shipping(&mut out, logs);
    }
    if let Some(telemetry) = sources.telemetry {
        ticks(&mut out, telemetry);
        if sources.node_and_containers {
            node::node_and_containers(&mut out, &telemetry.snapshot());
        }
    }
    process(&mut out);
    let capped = out.capped() as f64;
    out.single(&f::CAPPED, capped);
    out.finish()
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn addresses(out: &mut Exposition, ipam: &IpamSnapshot) {
    let counters = &ipam.counters;
    out.single(&f::ENI_MAX, f64::from(ipam.max_enis));
    out.single(&f::IP_MAX, ipam.max_addresses as f64);
    out.single(&f::ENI_ALLOCATED, ipam.enis.len() as f64);
    out.single(&f::TOTAL_IPS, ipam.pools.iter().map(|pool| pool.total).sum::<u64>() as f64);
    out.single(&f::ASSIGNED_IPS, ipam.pools.iter().map(|pool| pool.assigned).sum::<u64>() as f64);
    out.single(&f::TOTAL_PREFIXES, ipam.pools.iter().map(|pool| f64::from(pool.prefixes)).sum());
    let mut samples = out.family(&f::ASSIGNED_PER_CIDR);
    for cidr in ipam.enis.iter().flat_map(|eni| &eni.cidrs) {
        samples.value(&[&cidr.cidr.to_string()], cidr.assigned as f64);
    }
    let mut samples = out.family(&f::ASSIGNED_PER_ENI);
    for eni in &ipam.enis {
        samples.value(&[eni.id.as_str()], eni.assigned as f64);
    }
    by_function(out, &f::ACTION_IN_PROGRESS, &counters.in_progress);
    by_function(out, &f::IPAMD_ERRORS, &counters.errors);
    by_function(out, &f::POD_ENI_ERRORS, &counters.pod_eni_errors);
    by_function(out, &f::RECONCILES, &counters.reconciles);
    out.single(&f::ADD_REQUESTS, counters.add_requests as f64);
    let mut samples = out.family(&f::DEL_REQUESTS);
    for (reason, count) in &counters.del_requests {
        samples.value(&[reason], *count as f64);
    }
    out.single(&f::NO_AVAILABLE, counters.no_available as f64);
    out.single(&f::FORCE_REMOVED_ENIS, counters.force_removed_enis as f64);
    out.single(&f::FORCE_REMOVED_IPS, counters.force_removed_ips as f64);
    if let Some(seconds) = counters.startup_seconds {
        out.family(&f::STARTUP_SECONDS).histogram(&["true", "true", ""], &[seconds]);
        out.family(&f::NODE_INIT_SECONDS).histogram(&["true"], &[seconds]);
    }
    out.family(&f::CONNMARK_BACKEND).value(&["nftables"], 1.0);
    out.single(&f::IPAM_READY, flag(ipam.status.ready));
    let mut samples = out.family(&f::IPAM_FREE);
    for pool in &ipam.pools {
        samples.value(&[&pool.network_card.to_string()], pool.free as f64);
    }
    let mut samples = out.family(&f::IPAM_COOLING);
    for pool in &ipam.pools {
        samples.value(&[&pool.network_card.to_string()], pool.cooling as f64);
    }
    out.single(&f::IPAM_WAITING, f64::from(ipam.waiting));
    out.single(&f::IPAM_BOUND, f64::from(ipam.bound));
    out.single(&f::IPAM_WAITED, counters.waited as f64);
    out.single(&f::IPAM_CHECKPOINTS, counters.checkpoint_writes as f64);
    by_function(out, &f::HOST_HEALED, &counters.healed);
}

fn by_function(out: &mut Exposition, family: &'static stanchion_core::metrics::exposition::Family, counts: &BTreeMap<&'static str, u64>) {
    let mut samples = out.family(family);
    for (function, count) in counts {
        samples.value(&[function], *count as f64);
    }
}

/// EC2 calls: requests and errors by action, latency by action and outcome.
fn calls(out: &mut Exposition, ipam: &IpamSnapshot) {
    let calls = &ipam.counters.ec2_calls;
    let mut requests: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for call in calls {
        let (all, failed) = requests.entry(call.api).or_default();
        *all += call.count;
        if call.error.is_some() {
            *failed += call.count;
        }
    }
    let mut samples = out.family(&f::EC2_REQUESTS);
    for (api, (all, _)) in &requests {
        samples.value(&[api], *all as f64);
    }
    let mut samples = out.family(&f::EC2_ERRORS);
    for (api, (_, failed)) in requests.iter().filter(|(_, (_, failed))| *failed > 0) {
        samples.value(&[api], *failed as f64);
    }
    // Several error codes of an action are one series here.
    let mut latencies: BTreeMap<(&str, bool), (f64, u64)> = BTreeMap::new();
    for call in calls {
        let (sum, count) = latencies.entry((call.api, call.error.is_some())).or_default();
        *sum += call.total_ms;
        *count += call.count;
    }
    let mut samples = out.family(&f::API_LATENCY);
    for ((api, failed), (sum, count)) in latencies {
        // EC2 answers a request that it refuses with 400.
        let (failed, status) = if failed { ("true", "400") } else { ("false", "200") };
        samples.summary(&[api, failed, status], sum, count);
    }
    let mut samples = out.family(&f::API_ERRORS);
    for call in calls {
        if let Some(error) = &call.error {
            samples.value(&[call.api, error], call.count as f64);
        }
    }
}

fn policy(out: &mut Exposition, netpol: &NetpolSnapshot) {
    out.single(&f::POLICY_READY, flag(netpol.ready));
    let count = |ingress: bool, egress: bool| {
        netpol.endpoints.iter().filter(|e| e.ingress_isolated == ingress && e.egress_isolated == egress).count() as f64
    };
    let mut samples = out.family(&f::POLICY_ENDPOINTS);
    for (isolation, ingress, egress) in [("none", false, false), ("ingress", true, false), ("egress", false, true), ("both", true, true)] {
        samples.value(&[isolation], count(ingress, egress));
    }
    let mut samples = out.family(&f::POLICY_FLOWS);
    samples.value(&["IPv4"], netpol.flows[0] as f64);
    samples.value(&["IPv6"], netpol.flows[1] as f64);
    out.single(&f::POLICY_FLOW_CAPACITY, f64::from(netpol.flow_capacity));
    out.single(&f::POLICY_MAP_WRITES, netpol.map_writes as f64);
    out.single(&f::POLICY_EVENTS_LOST, netpol.alarms.events_lost as f64);
    out.single(&f::POLICY_TABLE_FULL, netpol.alarms.flow_table_full as f64);
    out.single(&f::POLICY_POD_CAP, netpol.alarms.pod_flow_cap as f64);
    out.single(&f::POLICY_NO_ENDPOINT, netpol.alarms.no_endpoint as f64);
    out.single(&f::POLICY_NAMES_LOST, netpol.alarms.names_lost as f64);
    for (family, bytes) in [(&f::POLICY_PACKETS, false), (&f::POLICY_BYTES, true)] {
        let mut samples = out.family(family);
        for endpoint in netpol.endpoints.iter().filter(|e| e.ingress_isolated || e.egress_isolated) {
            let counters = &endpoint.counters;
            for (direction, verdict, count) in [
                ("ingress", "allowed", counters.ingress_allowed),
                ("ingress", "denied", counters.ingress_denied),
                ("egress", "allowed", counters.egress_allowed),
                ("egress", "denied", counters.egress_denied),
            ] {
                let value = if bytes { count.bytes } else { count.packets };
                samples.value(&[&endpoint.pod.namespace, &endpoint.pod.name, direction, verdict], value as f64);
            }
        }
    }
}

fn log_shipping(out: &mut Exposition, logs: &LogsSnapshot) {
    let counters = &logs.counters;
    out.single(&f::LOG_LINES, counters.lines_read as f64);
    out.single(&f::LOG_BYTES, counters.bytes_read as f64);
    out.single(&f::LOG_EVENTS, counters.events_shipped as f64);
    out.single(&f::LOG_BILLED, counters.bytes_shipped as f64);
    out.single(&f::LOG_BATCHES, counters.batches as f64);
    let mut samples = out.family(&f::LOG_RETRIES);
    samples.value(&["throttled"], counters.throttled as f64);
    samples.value(&["other"], counters.retries.saturating_sub(counters.throttled) as f64);
    let mut samples = out.family(&f::LOG_LOST);
    for (reason, count) in [
        ("rejected_too_old", counters.rejected_too_old),
        ("rejected_too_new", counters.rejected_too_new),
        ("rejected_expired", counters.rejected_expired),
        ("invalid", counters.dropped_invalid),
        ("too_old", counters.dropped_too_old),
    ] {
        samples.value(&[reason], count as f64);
    }
    for (family, counts) in [
        (&f::LOG_LEFT_OUT, &[("excluded", counters.excluded), ("empty", counters.dropped_empty)][..]),
        (
            &f::LOG_CHANGED,
            &[
                ("masked", counters.redacted),
                ("truncated", counters.truncated_events),
                ("time", counters.clamped_too_new),
                ("memory", counters.cut_for_memory),
                ("unparsed", counters.unparsed),
            ],
        ),
    ] {
        let mut samples = out.family(family);
        for (label, count) in counts {
            samples.value(&[label], *count as f64);
        }
    }
    let mut samples = out.family(&f::LOG_JOURNAL);
    samples.value(&["read"], counters.journal_entries as f64);
    samples.value(&["unreadable"], counters.journal_unreadable as f64);
    out.single(&f::LOG_QUOTA_WAITS, counters.quota_waits as f64);
    out.single(&f::LOG_TRUNCATIONS, counters.truncations as f64);
    out.single(&f::LOG_POSITION_ERRORS, counters.position_errors as f64);
    out.single(&f::LOG_FILES, logs.files.len() as f64);
    out.single(&f::LOG_LAG_BYTES, logs.files.iter().map(|file| file.lag_bytes).sum::<u64>() as f64);
    out.single(&f::LOG_LAG_SECONDS, logs.files.iter().map(|file| file.lag_seconds).max().unwrap_or(0) as f64);
    out.single(&f::LOG_MEMORY, logs.memory_bytes as f64);
    out.single(&f::LOG_HELD, logs.held_bytes as f64);
    out.single(&f::LOG_EVICTED, counters.evicted_bytes as f64);
    out.single(&f::LOG_FILE_ERRORS, counters.file_errors as f64);
}

fn ticks(out: &mut Exposition, telemetry: &TelemetryHandle) {
    let (shipped, ticks) = (telemetry.shipped(), telemetry.ticks());
    let mut samples = out.family(&f::DOCUMENTS);
    samples.value(&["sent"], shipped.sent.load(Ordering::Relaxed) as f64);
    samples.value(&["dropped"], shipped.dropped.load(Ordering::Relaxed) as f64);
    out.single(&f::DOCUMENT_RETRIES, shipped.retries.load(Ordering::Relaxed) as f64);
    out.single(&f::TICKS, ticks.done.load(Ordering::Relaxed) as f64);
    out.single(&f::TICK_ERRORS, ticks.failed.load(Ordering::Relaxed) as f64);
    out.single(&f::TICK_SECONDS, ticks.cpu_us.load(Ordering::Relaxed) as f64 / 1e6);
    extras(out, telemetry);
    let snapshot = telemetry.snapshot();
    out.single(&f::UNKNOWN_PODS, snapshot.unknown_pods as f64);
    let mut samples = out.family(&f::ENA_EXCEEDED);
    for sample in &snapshot.allowances {
        for (allowance, packets) in sample.exceeded() {
            samples.value(&[&sample.interface, allowance], packets as f64);
        }
    }
    let mut samples = out.family(&f::ENA_AVAILABLE);
    for sample in &snapshot.allowances {
        if let Some(connections) = sample.conntrack_available {
            samples.value(&[&sample.interface], connections as f64);
        }
    }
}

/// What does not run counts nothing.
fn extras(out: &mut Exposition, telemetry: &TelemetryHandle) {
    let ExtraCounters { kubelet, exporters, otlp, scrape, statsd } = telemetry.extras();
    for (family, [(good, done), (bad, failed)]) in [
        (&f::KUBELET_READS, [("read", &kubelet.read), ("failed", &kubelet.failed)]),
        (&f::EXPORTER_READS, [("read", &exporters.read), ("failed", &exporters.failed)]),
        (&f::OTLP_REQUESTS, [("sent", &otlp.sent), ("dropped", &otlp.dropped)]),
        (&f::SCRAPES, [("read", &scrape.done), ("failed", &scrape.failed)]),
        (&f::STATSD_LOST, [("malformed", &statsd.malformed), ("no_room", &statsd.dropped)]),
    ] {
        let mut samples = out.family(family);
        samples.value(&[good], done.load(Ordering::Relaxed) as f64);
        samples.value(&[bad], failed.load(Ordering::Relaxed) as f64);
    }
    out.single(&f::OTLP_REJECTED, otlp.rejected_points.load(Ordering::Relaxed) as f64);
    out.single(&f::SCRAPE_DROPPED, scrape.dropped_series.load(Ordering::Relaxed) as f64);
    out.single(&f::STATSD_PACKETS, statsd.packets.load(Ordering::Relaxed) as f64);
}

/// This process, under the names that Prometheus' client libraries use.
fn process(out: &mut Exposition) {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let Some(stat) = read("/proc/self/stat").as_deref().and_then(proc::process_stat) else { return };
    let hertz = proc::USER_HZ as f64;
    out.single(&f::PROCESS_CPU, (stat.user_ticks + stat.system_ticks) as f64 / hertz);
    out.single(&f::PROCESS_RSS, stat.resident_pages as f64 * page_size());
    out.single(&f::PROCESS_VIRTUAL, stat.virtual_bytes as f64);
    out.single(&f::PROCESS_THREADS, stat.threads as f64);
    if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
        // One of them is the directory itself.
        out.single(&f::PROCESS_FDS, entries.count().saturating_sub(1) as f64);
    }
    if let Some(kernel) = read("/proc/stat").as_deref().and_then(proc::stat) {
        out.single(&f::PROCESS_START, kernel.boot_time as f64 + stat.start_ticks as f64 / hertz);
    }
}

fn page_size() -> f64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096) as f64
}
