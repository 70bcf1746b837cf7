use proptest::prelude::*;
use serde_json::json;

use super::*;

const FIRST: &str = r#"# HELP http_requests_total Requests.
# TYPE http_requests_total counter
http_requests_total{code="200",path="/a \"b\"\\"} 10
http_requests_total{code="500",path="/"} 1 1795232118300
# TYPE queue gauge
queue 3.5
# TYPE rpc summary
rpc{quantile="0.5"} 0.2
rpc_sum 8
rpc_count 4
# TYPE size histogram
size_bucket{le="1"} 4
size_sum 2
size_count 4
odd 7
# TYPE bad gauge
bad NaN
"#;

const RULES: &str = r#"{"metric_declaration": [
  {"source_labels": ["job", "Namespace"], "label_matcher": "^kubernetes-pod;shop$",
   "dimensions": [["ClusterName", "Namespace"], ["ClusterName", "Namespace", "code"]], "metric_selectors": ["^http_requests_total$", "^queue$"]},
  {"source_labels": ["code"], "label_matcher": "^5", "dimensions": [["ClusterName"]], "metric_selectors": ["^http_"]},
  {"source_labels": ["Namespace"], "label_matcher": "^bank$", "dimensions": [["ClusterName"]], "metric_selectors": [".*"]}
]}"#;

fn target() -> Target {
    let labels = [("ClusterName", "demo"), ("Namespace", "shop"), ("job", "kubernetes-pod"), ("instance", "10.0.1.7:9102")];
    Target { url: "http://10.0.1.7:9102/metrics".into(), labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into() }
}

fn documents(scraper: &mut Scraper, text: &str, at: i64) -> Vec<Value> {
    scraper.documents(&target(), text, at).documents.iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

#[test]
fn gauges_at_once_counters_by_what_they_grew() {
    let mut scraper = Scraper::new(Rules::parse(RULES).unwrap());
    let first = documents(&mut scraper, FIRST, 1_795_232_118_300);
    let kinds: Vec<_> = first.iter().map(|document| document["prom_metric_type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["gauge", "summary"], "no counter before its second scrape");
    assert_eq!((&first[0]["queue"], &first[0]["Version"], &first[0]["Timestamp"]), (&json!(3.5), &json!("0"), &json!("1795232118300")));
    assert_eq!((&first[1]["rpc"], &first[1]["quantile"]), (&json!(0.2), &json!("0.5")));
    let later = FIRST.replace("} 10\n", "} 25\n").replace("rpc_sum 8", "rpc_sum 9.5").replace("rpc_count 4", "rpc_count 6");
    let second = documents(&mut scraper, &later, 1_795_232_178_300);
    let find = |key: &str, value: &str| second.iter().find(|document| document[key] == value).unwrap();
    let ok = find("code", "200");
    assert_eq!((&ok["http_requests_total"], &ok["path"], &ok["prom_metric_type"]), (&json!(15), &json!("/a \"b\"\\"), &json!("counter")));
    assert_eq!(find("code", "500")["http_requests_total"], 0);
    let summary = second.iter().find(|document| !document["rpc_sum"].is_null()).unwrap();
    assert_eq!((&summary["rpc_sum"], &summary["rpc_count"]), (&json!(1.5), &json!(2)));
    assert!(
        second.iter().all(|document| document.get("size_sum").is_none() && document.get("odd").is_none() && document.get("bad").is_none())
    );
    // A restarted process counts from 0: all that it has is new.
    let restarted = documents(&mut scraper, &FIRST.replace("} 10\n", "} 2\n"), 1_795_232_238_300);
    assert_eq!(restarted.iter().find(|document| document["code"] == "200").unwrap()["http_requests_total"], 2);
}

#[test]
fn declarations_make_metrics() {
    let mut scraper = Scraper::new(Rules::parse(RULES).unwrap());
    documents(&mut scraper, FIRST, 1);
    let second = documents(&mut scraper, FIRST, 2);
    let of = |key: &str, value: Value| second.iter().find(|document| document[key] == value).unwrap()["CloudWatchMetrics"].clone();
    let namespace = "ContainerInsights/Prometheus";
    let metric = json!([{"Name": "http_requests_total"}]);
    let sets = json!([["ClusterName", "Namespace"], ["ClusterName", "Namespace", "code"]]);
    assert_eq!(of("code", json!("200")), json!([{"Namespace": namespace, "Dimensions": sets, "Metrics": metric}]));
    assert_eq!(of("code", json!("500"))[1], json!({"Namespace": namespace, "Dimensions": [["ClusterName"]], "Metrics": metric}));
    // No label `code`: the set that names it does not count.
    assert_eq!(of("queue", json!(3.5))[0]["Dimensions"], json!([["ClusterName", "Namespace"]]));
    assert_eq!(of("quantile", json!("0.5")), Value::Null);
}

#[test]
fn rules_as_the_agents_file_has_them_and_wrong_ones() {
    let whole = format!(r#"{{"logs": {{"metrics_collected": {{"prometheus": {{"emf_processor": {RULES}}}}}}}}}"#);
    let labels = BTreeMap::from(
        [("Namespace", "shop"), ("job", "kubernetes-pod"), ("ClusterName", "demo")].map(|(k, v)| (k.to_owned(), v.to_owned())),
    );
    assert_eq!(Rules::parse(&whole).unwrap().directives(&labels, ["queue"].into_iter()).len(), 1);
    for (text, want) in [
        ("nonsense", "no JSON object"),
        (r#"{"metric_declaration": [{"source_labels": [], "label_matcher": "(", "metric_selectors": []}]}"#, "metric_declaration[0]"),
        (r#"{"metric_declaration": [{"source_labels": []}]}"#, "no JSON object"),
    ] {
        let error = Rules::parse(text).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn annotated_running_pods_of_this_node_are_targets() {
    let pod = |name: &str, node: &str, phase: &str, annotations: Value| {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
            "spec": {"nodeName": node, "containers": [{"name": "c", "ports": [{"containerPort": 8080}]}]},
            "status": {"phase": phase, "podIP": "10.0.1.7"},
        }))
        .unwrap();
        (pod.full_name(), Arc::new(pod))
    };
    let mut cluster = ClusterState::default();
    let scrape = json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9102", "prometheus.io/path": "stats", "prometheus.io/scheme": "https"});
    cluster.pods.extend([
        pod("all", "node1", "Running", scrape.clone()),
        pod("declared", "node1", "Running", json!({"prometheus.io/scrape": "true"})),
        pod("odd", "node1", "Running", json!({"prometheus.io/scrape": "true", "prometheus.io/port": "http"})),
        pod("off", "node1", "Running", json!({"prometheus.io/scrape": "false"})),
        pod("elsewhere", "node2", "Running", scrape.clone()),
        pod("ended", "node1", "Succeeded", scrape),
    ]);
    let urls: Vec<_> = targets(&cluster, "node1", "demo").into_iter().map(|target| target.url).collect();
    assert_eq!(urls, ["https://10.0.1.7:9102/stats", "http://10.0.1.7:8080/metrics"]);
    let labels = &targets(&cluster, "node1", "demo")[0].labels;
    assert_eq!(
        (labels["pod_name"].as_str(), labels["container_name"].as_str(), labels["instance"].as_str()),
        ("all", "c", "10.0.1.7:9102")
    );
}

/// The agent's own text is read by the agent's own parser.
#[test]
fn our_own_text_is_read() {
    use crate::metrics::exposition::{Exposition, Format};
    use crate::metrics::families as f;
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let mut text = Exposition::new(format);
        text.single(&f::ENI_MAX, 3.0);
        text.family(&f::LOG_LOST).value(&["too \"old\"\n"], 2.0);
        text.family(&f::API_LATENCY).summary(&["a", "false", "200"], 5.0, 2);
        let text = text.finish();
        let all: Vec<_> = parse(&text).collect();
        assert_eq!(
            all.iter().map(|sample| (sample.name, sample.kind, sample.value)).collect::<Vec<_>>(),
            [
                ("awscni_eni_max", Kind::Gauge, 3.0),
                ("stanchion_log_events_lost_total", Kind::Counter, 2.0),
                ("awscni_aws_api_latency_ms_sum", Kind::Summary, 5.0),
                ("awscni_aws_api_latency_ms_count", Kind::Summary, 2.0),
            ]
        );
        assert_eq!(all[1].labels, [("reason".to_owned(), "too \"old\"\n".to_owned())]);
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "([a-z_]{1,3}|# TYPE [a-z] (counter|gauge|summary)|\\{[a-z]=\"|\\}|,|\"|\\\\| |\n|[0-9.eE+-]{1,4}|NaN|é){0,60}") {
        let mut scraper = Scraper::new(Rules::parse(RULES).unwrap());
        for _ in 0..2 {
            let scraped = scraper.documents(&target(), &text, 1);
            for document in scraped.documents {
                let document: Value = serde_json::from_str(&document).unwrap();
                prop_assert_eq!(&document["Version"], "0");
            }
        }
    }

    /// Over any number of scrapes, what the documents say of a counter is what it counted since the first.
    #[test]
    fn deltas_add_up(steps in prop::collection::vec(0u32..1000, 2..20)) {
        let mut scraper = Scraper::default();
        let (mut value, mut told) = (0u64, 0u64);
        for (index, step) in steps.iter().enumerate() {
            value += u64::from(*step);
            let text = format!("# TYPE a_total counter\na_total{{b=\"c\"}} {value}\n");
            for document in documents(&mut scraper, &text, index as i64) {
                told += document["a_total"].as_u64().unwrap();
            }
        }
        prop_assert_eq!(told, value - u64::from(steps[0]));
    }
}
