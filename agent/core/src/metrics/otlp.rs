//! Samples as OTLP metrics, under the names of the OpenTelemetry collector's kubeletstats receiver, which the newer Container
//! Insights takes over.
//!
//! Figures are gauges. Traffic is a sum of delta temporality: what was counted since the tick before.
//! <https://opentelemetry.io/docs/specs/otlp/>, `opentelemetry/proto/metrics/v1/metrics.proto`.

use prost::Message as _;

use super::insights::NodeIdentity;
use super::model::{Cpu, FilesystemSize, Flow, Memory, NodeSample, PodSample, Snapshot, Traffic};
use super::pods::Amounts;
use wire::{
    AnyValue, ExportMetricsServiceRequest, Gauge, InstrumentationScope, KeyValue, Metric, NumberDataPoint, Resource, ResourceMetrics,
    ScopeMetrics, Sum, metric,
};

/// Data points of one request at most: CloudWatch's bound.
pub const MAX_POINTS: usize = 1000;
/// `AGGREGATION_TEMPORALITY_DELTA`
const DELTA: i32 = 1;

/// How many data points a receiver says, in its answer to a request it took, that it left out, and its words; words without points are a
/// warning (<https://opentelemetry.io/docs/specs/otlp/#partial-success>). An answer that is no such message says nothing.
pub fn rejected(answer: &[u8]) -> (u64, String) {
    let answer = wire::ExportMetricsServiceResponse::decode(answer).unwrap_or_default();
    let partial = answer.partial_success.unwrap_or_default();
    (u64::try_from(partial.rejected_data_points).unwrap_or(0), partial.error_message)
}

/// The messages of `opentelemetry.proto`, as far as they are used.
pub mod wire {
    #![allow(missing_docs, reason = "names and numbers are the protocol's")]

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ExportMetricsServiceRequest {
        #[prost(message, repeated, tag = "1")]
        pub resource_metrics: Vec<ResourceMetrics>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ExportMetricsServiceResponse {
        #[prost(message, optional, tag = "1")]
        pub partial_success: Option<ExportMetricsPartialSuccess>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ExportMetricsPartialSuccess {
        #[prost(int64, tag = "1")]
        pub rejected_data_points: i64,
        #[prost(string, tag = "2")]
        pub error_message: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ResourceMetrics {
        #[prost(message, optional, tag = "1")]
        pub resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub scope_metrics: Vec<ScopeMetrics>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ScopeMetrics {
        #[prost(message, optional, tag = "1")]
        pub scope: Option<InstrumentationScope>,
        #[prost(message, repeated, tag = "2")]
        pub metrics: Vec<Metric>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct InstrumentationScope {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub version: String,
        #[prost(message, repeated, tag = "3")]
        pub attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metric {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "3")]
        pub unit: String,
        #[prost(oneof = "metric::Data", tags = "5, 7")]
        pub data: Option<metric::Data>,
    }

    pub mod metric {
        #[derive(Clone, PartialEq, prost::Oneof)]
        pub enum Data {
            #[prost(message, tag = "5")]
            Gauge(super::Gauge),
            #[prost(message, tag = "7")]
            Sum(super::Sum),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Gauge {
        #[prost(message, repeated, tag = "1")]
        pub data_points: Vec<NumberDataPoint>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sum {
        #[prost(message, repeated, tag = "1")]
        pub data_points: Vec<NumberDataPoint>,
        #[prost(int32, tag = "2")]
        pub aggregation_temporality: i32,
        #[prost(bool, tag = "3")]
        pub is_monotonic: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct NumberDataPoint {
        #[prost(message, repeated, tag = "7")]
        pub attributes: Vec<KeyValue>,
        #[prost(fixed64, tag = "2")]
        pub start_time_unix_nano: u64,
        #[prost(fixed64, tag = "3")]
        pub time_unix_nano: u64,
        #[prost(double, optional, tag = "4")]
        pub as_double: Option<f64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct KeyValue {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<AnyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub string_value: Option<String>,
    }
}

/// Turns ticks into requests.
#[derive(Debug)]
pub struct OtlpEncoder {
    node: Vec<KeyValue>,
    scope: InstrumentationScope,
    last_ms: Option<i64>,
}

/// Metrics of one resource under construction.
struct Told<'a> {
    metrics: &'a mut Vec<Metric>,
    /// Of the tick and of the one before, nanoseconds since 1970.
    now: u64,
    before: u64,
}

impl OtlpEncoder {
    /// For one node; `version` is the agent's.
    pub fn new(identity: &NodeIdentity, version: &str) -> Self {
        let zone = &identity.availability_zone;
        // eu-west-1a is in eu-west-1; local zones (us-west-2-lax-1a) have a longer name, and a digit before the letter all the same.
        let region = zone.trim_end_matches(|letter: char| letter.is_ascii_lowercase());
        let node = [
            ("k8s.cluster.name", identity.cluster.as_str()),
            ("k8s.node.name", &identity.node),
            ("cloud.provider", "aws"),
            ("cloud.platform", "aws_eks"),
            ("cloud.region", region),
            ("cloud.availability_zone", zone),
            ("host.id", &identity.instance_id),
            ("host.name", &identity.node),
            ("host.type", &identity.instance_type),
        ];
        let scope = InstrumentationScope {
            name: "stanchion".into(),
            version: version.to_owned(),
            attributes: vec![attribute("cloudwatch.source", "stanchion"), attribute("cloudwatch.solution", "k8s-otel-container-insights")],
        };
        Self { node: attributes(&node), scope, last_ms: None }
    }

    /// The requests of a tick, each within [`MAX_POINTS`]; none for the first, which has nothing to count from.
    pub fn requests(&mut self, snapshot: &Snapshot) -> Vec<Vec<u8>> {
        let nanos = |ms: i64| u64::try_from(ms).unwrap_or(0).saturating_mul(1_000_000);
        let Some(before) = self.last_ms.replace(snapshot.wall_ms) else { return Vec::new() };
        let (now, before) = (nanos(snapshot.wall_ms), nanos(before));
        let mut requests = Vec::new();
        let mut current = ExportMetricsServiceRequest::default();
        let mut points = 0;
        for resource in self.resources(snapshot, now, before) {
            let count: usize = resource.scope_metrics.iter().flat_map(|scope| &scope.metrics).map(points_of).sum();
            if points + count > MAX_POINTS && points > 0 {
                requests.push(std::mem::take(&mut current).encode_to_vec());
                points = 0;
            }
            points += count;
            current.resource_metrics.push(resource);
        }
        if points > 0 {
            requests.push(current.encode_to_vec());
        }
        requests
    }

    fn resources(&self, snapshot: &Snapshot, now: u64, before: u64) -> Vec<ResourceMetrics> {
        let mut out = vec![self.resource(&[], now, before, |told| node_metrics(told, snapshot))];
        for pod in snapshot.pods.iter().filter(|pod| pod.is_told()) {
            let meta = &pod.meta;
            let mut of_pod = vec![
                ("k8s.namespace.name", meta.namespace.as_str()),
                ("k8s.pod.name", &meta.name),
                ("k8s.pod.uid", &meta.uid),
                ("k8s.workload.name", meta.owner.as_ref().map_or(meta.workload.as_str(), |(_, name)| name.as_str())),
            ];
            of_pod.extend(meta.owner.as_ref().map(|(kind, _)| ("k8s.workload.type", *kind)));
            out.push(self.resource(&of_pod, now, before, |told| pod_metrics(told, pod, snapshot.wall_ms)));
            for sample in &pod.containers {
                let container = &meta.containers[sample.index];
                let mut of_container = of_pod.clone();
                of_container.extend([("k8s.container.name", container.name.as_str()), ("container.id", &container.id)]);
                out.push(self.resource(&of_container, now, before, |told| {
                    use_metrics(told, "container", sample.cpu, sample.memory.as_ref());
                    limit_metrics(told, "k8s.container", sample.cpu, sample.memory.as_ref(), container.requests, container.limits);
                    told.gauge("k8s.container.restarts", "{restart}", container.restarts as f64);
                    told.uptime("container.uptime", container.started_ms, snapshot.wall_ms);
                    if let Some(files) = &sample.files {
                        file_metrics(told, "container.filesystem", files, &[]);
                    }
                }));
            }
        }
        out.retain(|resource| resource.scope_metrics.iter().any(|scope| !scope.metrics.is_empty()));
        out
    }

    fn resource(&self, of: &[(&str, &str)], now: u64, before: u64, tell: impl FnOnce(&mut Told<'_>)) -> ResourceMetrics {
        let mut metrics = Vec::new();
        tell(&mut Told { metrics: &mut metrics, now, before });
        let attributes = self.node.iter().cloned().chain(attributes(of)).collect();
        ResourceMetrics {
            resource: Some(Resource { attributes }),
            scope_metrics: vec![ScopeMetrics { scope: Some(self.scope.clone()), metrics }],
        }
    }
}

impl Told<'_> {
    fn gauge(&mut self, name: &str, unit: &str, value: f64) {
        self.gauge_of(name, unit, value, &[]);
    }

    fn gauge_of(&mut self, name: &str, unit: &str, value: f64, of: &[(&str, &str)]) {
        if !value.is_finite() {
            return;
        }
        let point = NumberDataPoint { attributes: attributes(of), time_unix_nano: self.now, as_double: Some(value), ..Default::default() };
        match self.metrics.iter_mut().find(|metric| metric.name == name) {
            Some(Metric { data: Some(metric::Data::Gauge(gauge)), .. }) => gauge.data_points.push(point),
            _ => self.metrics.push(Metric {
                name: name.to_owned(),
                unit: unit.to_owned(),
                data: Some(metric::Data::Gauge(Gauge { data_points: vec![point] })),
            }),
        }
    }

    fn maybe(&mut self, name: &str, unit: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.gauge(name, unit, value);
        }
    }

    fn uptime(&mut self, name: &str, started_ms: Option<i64>, now_ms: i64) {
        let since = started_ms.and_then(|started| now_ms.checked_sub(started)).filter(|ms| *ms >= 0);
        self.maybe(name, "s", since.map(|ms| ms as f64 / 1000.0));
    }

    /// What a rate counted between the two ticks.
    fn counted(&mut self, name: &str, unit: &str, parts: &[(f64, &str, &str)]) {
        let seconds = self.now.saturating_sub(self.before) as f64 / 1e9;
        let points = parts.iter().map(|(rate, interface, direction)| NumberDataPoint {
            attributes: attributes(&[("interface", interface), ("direction", direction)]),
            start_time_unix_nano: self.before,
            time_unix_nano: self.now,
            as_double: Some((rate * seconds).round()),
        });
        let data_points: Vec<_> = points.collect();
        if !data_points.is_empty() {
            let sum = Sum { data_points, aggregation_temporality: DELTA, is_monotonic: true };
            self.metrics.push(Metric { name: name.to_owned(), unit: unit.to_owned(), data: Some(metric::Data::Sum(sum)) });
        }
    }

    fn traffic(&mut self, prefix: &str, interfaces: &[(&str, Traffic)]) {
        let of = |what: fn(&Flow) -> f64| -> Vec<(f64, &str, &str)> {
            let both =
                interfaces.iter().map(|(name, traffic)| [(what(&traffic.rx), *name, "receive"), (what(&traffic.tx), *name, "transmit")]);
            both.flatten().collect()
        };
        self.counted(&format!("{prefix}.network.io"), "By", &of(|flow| flow.bytes));
        self.counted(&format!("{prefix}.network.errors"), "1", &of(|flow| flow.errors));
    }
}

fn node_metrics(told: &mut Told<'_>, snapshot: &Snapshot) {
    let node: &NodeSample = &snapshot.node;
    use_metrics(told, "k8s.node", node.cpu, Some(&node.memory));
    told.gauge("k8s.node.memory.available", "By", node.memory_limit.saturating_sub(node.memory.working_set) as f64);
    told.uptime("k8s.node.uptime", (node.boot_ms > 0).then_some(node.boot_ms), snapshot.wall_ms);
    for filesystem in &snapshot.filesystems {
        file_metrics(told, "k8s.node.filesystem", &filesystem.size, &[("device", &filesystem.device)]);
    }
    let interfaces: Vec<_> = snapshot.interfaces.iter().map(|interface| (interface.name.as_str(), interface.traffic)).collect();
    told.traffic("k8s.node", &interfaces);
}

fn pod_metrics(told: &mut Told<'_>, pod: &PodSample, now_ms: i64) {
    use_metrics(told, "k8s.pod", pod.cpu, pod.memory.as_ref());
    limit_metrics(told, "k8s.pod", pod.cpu, pod.memory.as_ref(), pod.meta.requests, pod.meta.limits);
    told.uptime("k8s.pod.uptime", pod.meta.started_ms, now_ms);
    if let Some(traffic) = pod.net {
        told.traffic("k8s.pod", &[("eth0", traffic)]);
    }
}

fn use_metrics(told: &mut Told<'_>, prefix: &str, cpu: Option<Cpu>, memory: Option<&Memory>) {
    told.maybe(&format!("{prefix}.cpu.usage"), "{cpu}", cpu.map(|cpu| cpu.total / 1000.0));
    if let Some(memory) = memory {
        told.gauge(&format!("{prefix}.memory.usage"), "By", memory.usage as f64);
        told.gauge(&format!("{prefix}.memory.working_set"), "By", memory.working_set as f64);
        told.gauge(&format!("{prefix}.memory.rss"), "By", memory.rss as f64);
    }
}

/// Shares of what was asked and of the bound, 1 is all of it.
fn limit_metrics(told: &mut Told<'_>, prefix: &str, cpu: Option<Cpu>, memory: Option<&Memory>, requests: Amounts, limits: Amounts) {
    let share = |used: Option<f64>, of: Option<f64>| Some(used? / of.filter(|of| *of > 0.0)?);
    let (cpu, memory) = (cpu.map(|cpu| cpu.total), memory.map(|memory| memory.working_set as f64));
    told.maybe(&format!("{prefix}.cpu_limit_utilization"), "1", share(cpu, limits.cpu));
    told.maybe(&format!("{prefix}.cpu_request_utilization"), "1", share(cpu, requests.cpu));
    told.maybe(&format!("{prefix}.memory_limit_utilization"), "1", share(memory, limits.memory));
    told.maybe(&format!("{prefix}.memory_request_utilization"), "1", share(memory, requests.memory));
}

fn file_metrics(told: &mut Told<'_>, prefix: &str, size: &FilesystemSize, of: &[(&str, &str)]) {
    told.gauge_of(&format!("{prefix}.available"), "By", size.available as f64, of);
    told.gauge_of(&format!("{prefix}.capacity"), "By", size.capacity as f64, of);
    told.gauge_of(&format!("{prefix}.usage"), "By", size.usage as f64, of);
}

fn points_of(metric: &Metric) -> usize {
    match &metric.data {
        Some(metric::Data::Gauge(gauge)) => gauge.data_points.len(),
        Some(metric::Data::Sum(sum)) => sum.data_points.len(),
        None => 0,
    }
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { string_value: Some(value.to_owned()) }) }
}

/// Those that have a value.
fn attributes(of: &[(&str, &str)]) -> Vec<KeyValue> {
    of.iter().filter(|(_, value)| !value.is_empty()).map(|(key, value)| attribute(key, value)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::insights_tests::Machine;
    use super::super::track::Figures;
    use super::*;

    fn identity() -> NodeIdentity {
        NodeIdentity {
            cluster: "demo".into(),
            node: "node1".into(),
            instance_id: "i-0123456789abcdef0".into(),
            instance_type: "m5.large".into(),
            availability_zone: "eu-west-1a".into(),
            auto_scaling_group: None,
        }
    }

    fn of(attributes: &[KeyValue]) -> BTreeMap<&str, &str> {
        attributes.iter().map(|pair| (pair.key.as_str(), pair.value.as_ref().unwrap().string_value.as_deref().unwrap())).collect()
    }

    #[test]
    fn a_tick_has_the_figures_of_the_documents() {
        let mut machine = Machine::new(Figures::Correct);
        let mut encoder = OtlpEncoder::new(&identity(), "0.1.0");
        assert!(encoder.requests(&machine.pass(100)).is_empty(), "there is nothing to count from");
        let [request] = &encoder.requests(&machine.pass(160))[..] else { panic!("one request") };
        let request = ExportMetricsServiceRequest::decode(&request[..]).unwrap();
        let mut told = BTreeMap::new();
        for resource in &request.resource_metrics {
            let who = of(&resource.resource.as_ref().unwrap().attributes);
            assert_eq!((who["k8s.cluster.name"], who["cloud.region"], who["host.id"]), ("demo", "eu-west-1", "i-0123456789abcdef0"));
            let pod = who.get("k8s.pod.name").copied().unwrap_or_default();
            for metric in resource.scope_metrics.iter().flat_map(|scope| &scope.metrics) {
                let (points, sum) = match metric.data.as_ref().unwrap() {
                    metric::Data::Gauge(gauge) => (&gauge.data_points, false),
                    metric::Data::Sum(sum) => {
                        assert!(sum.is_monotonic && sum.aggregation_temporality == DELTA);
                        (&sum.data_points, true)
                    }
                };
                for point in points {
                    assert_eq!(point.start_time_unix_nano != 0, sum);
                    let direction = of(&point.attributes).get("direction").copied().unwrap_or_default().to_owned();
                    told.insert((pod.to_owned(), metric.name.clone(), direction), (point.as_double.unwrap(), metric.unit.clone()));
                }
            }
        }
        let get = |pod: &str, name: &str, direction: &str| told[&(pod.to_owned(), name.to_owned(), direction.to_owned())].0;
        let web = "web-6b9c4cb4dc-8zpz5";
        assert_eq!(get("", "k8s.node.cpu.usage", ""), 0.5);
        assert_eq!(get("", "k8s.node.network.io", "receive"), 1000.0 * 60.0);
        assert_eq!(get(web, "k8s.pod.cpu.usage", ""), 0.1);
        assert_eq!(get(web, "k8s.pod.cpu_limit_utilization", ""), 0.5);
        assert_eq!(get(web, "k8s.pod.memory_limit_utilization", ""), 0.25);
        assert_eq!(get(web, "k8s.pod.network.io", "transmit"), 70.0 * 60.0);
        assert_eq!(get(web, "container.cpu.usage", ""), 0.1);
        assert_eq!(get(web, "k8s.container.cpu_limit_utilization", ""), 0.5);
        assert_eq!(get(web, "container.filesystem.usage", ""), 40.0);
        assert!(get(web, "container.uptime", "") > 0.0 && get(web, "k8s.pod.uptime", "") >= get(web, "container.uptime", ""));
        let names: BTreeSet<&str> = told.keys().map(|(_, name, _)| name.as_str()).collect();
        for name in ["k8s.node.uptime", "k8s.node.memory.available", "k8s.node.filesystem.capacity", "k8s.container.restarts"] {
            assert!(names.contains(name), "{name} in {names:?}");
        }
        assert_eq!(told[&(String::new(), "k8s.node.cpu.usage".to_owned(), String::new())].1, "{cpu}");
    }

    /// A request that the OpenTelemetry project's own classes (opentelemetry-proto 1.45, Python) wrote.
    #[test]
    fn the_wire_types_are_the_protocols() {
        let theirs = include_bytes!("../../testdata/otlp/request.bin");
        let request = ExportMetricsServiceRequest::decode(&theirs[..]).unwrap();
        assert_eq!(request.encode_to_vec(), theirs);
        let scope = &request.resource_metrics[0].scope_metrics[0];
        assert_eq!(of(&request.resource_metrics[0].resource.as_ref().unwrap().attributes)["k8s.node.name"], "node1");
        assert_eq!(scope.scope.as_ref().map(|scope| (scope.name.as_str(), scope.attributes.len())), Some(("stanchion", 1)));
        assert_eq!(
            scope.metrics.iter().map(|metric| (metric.name.as_str(), metric.unit.as_str())).collect::<Vec<_>>(),
            [("k8s.node.cpu.usage", "{cpu}"), ("k8s.node.network.io", "By")]
        );
        let Some(metric::Data::Sum(sum)) = &scope.metrics[1].data else { panic!("a sum") };
        assert!(sum.is_monotonic && sum.aggregation_temporality == DELTA);
        assert_eq!((sum.data_points[0].as_double, sum.data_points[0].start_time_unix_nano), (Some(0.0), 1_795_232_058_300_000_000));
    }

    #[test]
    fn a_full_node_is_told_in_bounded_requests() {
        let mut machine = Machine::new(Figures::Correct);
        let mut encoder = OtlpEncoder::new(&identity(), "0.1.0");
        encoder.requests(&machine.pass(100));
        let mut snapshot = machine.pass(160);
        let pods: Vec<_> = snapshot.pods.iter().cycle().take(110).cloned().collect();
        snapshot.pods = pods;
        let requests = encoder.requests(&snapshot);
        let mut all = 0;
        for request in &requests {
            let request = ExportMetricsServiceRequest::decode(&request[..]).unwrap();
            let metrics = request.resource_metrics.iter().flat_map(|resource| &resource.scope_metrics).flat_map(|scope| &scope.metrics);
            let points: usize = metrics.map(points_of).sum();
            assert!((1..=MAX_POINTS).contains(&points), "{points}");
            all += points;
        }
        assert!(
            requests.len() == all.div_ceil(MAX_POINTS) || requests.len() == all.div_ceil(MAX_POINTS) + 1,
            "{} for {all}",
            requests.len()
        );
    }
}
