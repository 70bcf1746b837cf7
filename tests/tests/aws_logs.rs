//! The SDK's CloudWatch Logs client against the strict fake: pre-encoded bodies, every error, gzip with its fall-back.
#![allow(clippy::unwrap_used, reason = "a test panics")]

mod aws_common;

use std::collections::BTreeMap;
use std::time::Duration;

use aws_common::{Bed, bed, bed_at, listen};
use stanchion_aws::{AwsClients, CloudWatchSink, Overrides};
use stanchion_core::cloud::{LogEvent, LogGroupSpec, LogSink as _, Rejected, SinkError};
use stanchion_core::cluster::{ClusterState, Object};
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::logs::{TailerParts, ship_once};
use stanchion_lab::fake_aws::{ApiError, Bucket, Clock, DirectLogs, Effect, Fault};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const GROUP: &str = "/aws/containerinsights/demo/application";
const STREAM: &str = "node1-application.var.log.containers.web";
const HOUR: i64 = 3_600_000;

fn batch(events: &[(i64, &str)]) -> LogBatch {
    batch_of(events, false)
}

fn batch_of(events: &[(i64, &str)], emf: bool) -> LogBatch {
    let events = events.iter().map(|(at, text)| LogEvent { timestamp_ms: *at, message: (*text).to_owned() }).collect();
    let mut batches = LogBatch::from_events(GROUP, STREAM, emf, events);
    assert_eq!(batches.len(), 1);
    batches.remove(0)
}

async fn ready() -> (Bed, i64) {
    let bed = bed().await;
    bed.logs.create_group(GROUP, &LogGroupSpec::default()).await.expect("a legal name");
    bed.logs.create_stream(GROUP, STREAM).await.expect("a legal name");
    let now = bed.cloud.clock().unix_ms();
    (bed, now)
}

fn messages(bed: &Bed) -> Vec<String> {
    bed.cloud.events(GROUP, STREAM).into_iter().map(|event| event.message).collect()
}

#[tokio::test]
async fn events_arrive_as_they_were_whatever_bytes_they_hold() {
    let (bed, now) = ready().await;
    bed.cloud.add_access_key("AKIDTEST", "secret", None, None);
    let texts = [
        "plain",
        "quote \" backslash \\ slash /",
        "tab\tnewline\nnul \u{0} bell \u{7}",
        "ünïcödé ✓ 𝄞",
        "{\"json\":true}",
        "\u{7f}\u{2028}",
    ];
    let events: Vec<_> = texts.iter().map(|text| (now, *text)).collect();
    assert_eq!(bed.logs.put(&batch(&events)).await, Ok(Rejected::default()), "and the signature covers the body");
    assert_eq!(messages(&bed), texts);
    let totals = bed.cloud.logs_totals();
    let counted: usize = texts.iter().map(|text| text.len() + 26).sum();
    assert_eq!((totals.puts, totals.events, totals.billed_bytes), (1, texts.len() as u64, counted as u64));
}

#[tokio::test]
async fn the_largest_legal_batch_is_taken() {
    let (bed, now) = ready().await;
    let many: Vec<_> = (0..10_000).map(|_| (now, "x")).collect();
    bed.logs.put(&batch(&many)).await.unwrap();
    let long = "y".repeat(1_048_576 - 26);
    bed.logs.put(&batch(&[(now, &long)])).await.unwrap();
    assert_eq!(bed.cloud.logs_totals().events, 10_001);
}

#[tokio::test]
async fn rejected_events_are_told_by_index() {
    let (bed, now) = ready().await;
    let events = [(now - 3 * HOUR, "ok"), (now, "ok"), (now + 2 * HOUR + 60_000, "too new")];
    let rejected = bed.logs.put(&batch(&events)).await.unwrap();
    assert_eq!(rejected, Rejected { too_new_from: Some(2), ..Rejected::default() });
    let old = [(now - 14 * 24 * HOUR - 1000, "too old"), (now - 14 * 24 * HOUR + 60_000, "ok")];
    let rejected = bed.logs.put(&batch(&old)).await.unwrap();
    assert_eq!(rejected, Rejected { too_old_until: Some(1), ..Rejected::default() });
    assert_eq!(bed.cloud.logs_totals().rejected, 2);
}

#[tokio::test]
async fn groups_and_streams_are_made_once_with_retention_class_and_tags() {
    let bed = bed().await;
    let now = bed.cloud.clock().unix_ms();
    let error = bed.logs.put(&batch(&[(now, "x")])).await.unwrap_err();
    assert!(matches!(&error, SinkError::NotFound(text) if text.contains("log group")), "{error:?}");
    let spec = LogGroupSpec {
        retention_days: Some(7),
        class: "INFREQUENT_ACCESS".into(),
        tags: BTreeMap::from([("team".to_owned(), "a".to_owned())]),
    };
    for _ in 0..2 {
        bed.logs.create_group(GROUP, &spec).await.unwrap();
    }
    let group = bed.cloud.log_group(GROUP).unwrap();
    assert_eq!((group.retention_days, group.class.as_str(), group.tags), (Some(7), "INFREQUENT_ACCESS", spec.tags.clone()));
    assert_eq!(bed.cloud.count("PutRetentionPolicy"), 1, "a group that exists keeps its retention");
    let error = bed.logs.put(&batch(&[(now, "x")])).await.unwrap_err();
    assert!(matches!(&error, SinkError::NotFound(text) if text.contains("log stream")), "{error:?}");
    for _ in 0..2 {
        bed.logs.create_stream(GROUP, STREAM).await.unwrap();
    }
    bed.logs.put(&batch(&[(now, "x")])).await.unwrap();
    let error = bed.logs.create_group("with space", &LogGroupSpec::default()).await.unwrap_err();
    assert!(matches!(error, SinkError::Invalid(_)), "{error:?}");
}

#[tokio::test]
async fn a_retention_is_asked_for_until_it_holds() {
    let bed = bed().await;
    let now = bed.cloud.clock().unix_ms();
    let throttled = ApiError::bad("ThrottlingException", "Rate exceeded");
    bed.cloud.inject(Fault::times("PutRetentionPolicy", 1, Effect::Error(throttled)));
    // The group is there: nothing is to wait for its retention.
    bed.logs.create_group(GROUP, &LogGroupSpec { retention_days: Some(7), ..LogGroupSpec::default() }).await.unwrap();
    assert_eq!(bed.cloud.log_group(GROUP).unwrap().retention_days, None);
    bed.logs.create_stream(GROUP, STREAM).await.unwrap();
    for _ in 0..2 {
        bed.logs.put(&batch(&[(now, "x")])).await.unwrap();
        assert_eq!(bed.cloud.log_group(GROUP).unwrap().retention_days, Some(7));
    }
    assert_eq!(bed.cloud.count("PutRetentionPolicy"), 2);

    // What is denied for good is not asked for with every batch, and what cannot be not at all.
    for (days, denied, asked) in [(7, 100, 4), (8, 0, 1)] {
        bed.cloud.delete_log_group(GROUP);
        bed.cloud.clear_calls();
        let error = ApiError::bad("AccessDeniedException", "not authorized to perform: logs:PutRetentionPolicy");
        if denied > 0 {
            bed.cloud.inject(Fault::times("PutRetentionPolicy", denied, Effect::Error(error)));
        }
        bed.logs.create_group(GROUP, &LogGroupSpec { retention_days: Some(days), ..LogGroupSpec::default() }).await.unwrap();
        bed.logs.create_stream(GROUP, STREAM).await.unwrap();
        for _ in 0..20 {
            bed.logs.put(&batch(&[(now, "x")])).await.unwrap();
        }
        assert!((1..=asked).contains(&bed.cloud.count("PutRetentionPolicy")), "{days} days");
        bed.cloud.clear_faults();
    }
}

#[tokio::test]
async fn each_error_is_what_the_shipper_takes_it_for() {
    let (bed, now) = ready().await;
    let one = batch(&[(now, "x")]);
    for (status, code, check) in [
        (400, "ThrottlingException", (|e| matches!(e, SinkError::Throttled { .. })) as fn(&SinkError) -> bool),
        (503, "ServiceUnavailableException", |e| matches!(e, SinkError::Throttled { .. })),
        (500, "InternalFailure", |e| matches!(e, SinkError::Unavailable(_))),
        (400, "AccessDeniedException", |e| matches!(e, SinkError::Unauthorized(_))),
        (400, "InvalidParameterException", |e| matches!(e, SinkError::Invalid(_))),
        (400, "com.amazonaws.logs#ResourceNotFoundException", |e| matches!(e, SinkError::NotFound(_))),
        (400, "OperationAbortedException", |e| matches!(e, SinkError::Throttled { .. })),
    ] {
        bed.cloud.inject(Fault::once("PutLogEvents", Effect::Error(ApiError::with_status(status, code, "because"))));
        let error = bed.logs.put(&one).await.unwrap_err();
        assert!(check(&error), "{code}: {error:?}");
    }
    assert_eq!(bed.cloud.count("PutLogEvents"), 7, "one request each: the shipper decides about another");
    // But for credentials that were refused: once more with new ones.
    let expired = ApiError::bad("ExpiredTokenException", "The security token included in the request is expired");
    bed.cloud.inject(Fault::times("PutLogEvents", 2, Effect::Error(expired)));
    let error = bed.logs.put(&one).await.unwrap_err();
    assert!(matches!(&error, SinkError::Unauthorized(text) if text.contains("expired")), "{error:?}");
    assert_eq!(bed.cloud.count("PutLogEvents"), 9);
    assert_eq!(messages(&bed), Vec::<String>::new());
}

/// An endpoint that answers everything with this.
async fn stranger(status: u16, body: &'static str) -> CloudWatchSink {
    let (listener, at) = listen().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let length = body.len();
            let answer =
                format!("HTTP/1.1 {status} So\r\nContent-Type: text/html\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
            let mut request = vec![0; 65_536];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let overrides = Overrides {
        region: Some("eu-west-1".to_owned()),
        logs_endpoint: Some(format!("http://{at}")),
        static_keys: Some(("AKIDTEST".to_owned(), "secret".to_owned())),
        ..Overrides::default()
    };
    AwsClients::load(overrides).await.expect("no CA bundle to read").logs()
}

#[tokio::test]
async fn what_a_stranger_on_the_way_says_is_not_the_batchs_fault() {
    const PAGE: &str = "<html><body>Blocked by your administrator</body></html>";
    // A proxy's page, a gateway's, a service that invents a code tomorrow: the events are kept.
    for (status, body) in [
        (302, PAGE),
        (400, PAGE),
        (403, PAGE),
        (404, PAGE),
        (407, PAGE),
        (408, ""),
        (418, PAGE),
        (451, PAGE),
        (502, PAGE),
        (503, ""),
        (400, r#"{"__type":"NewlyInventedException","message":"later"}"#),
        (403, r#"{"message":"Forbidden"}"#),
    ] {
        let error = stranger(status, body).await.put(&batch(&[(1_795_168_813_000, "x")])).await.unwrap_err();
        assert!(!matches!(error, SinkError::Invalid(_)), "{status} {body}: {error:?}");
    }
}

#[tokio::test]
async fn what_is_created_is_asked_for_again_when_the_credentials_are_refused() {
    let bed = bed().await;
    for action in ["CreateLogGroup", "PutRetentionPolicy", "CreateLogStream"] {
        let expired = ApiError::bad("ExpiredTokenException", "The security token included in the request is expired");
        bed.cloud.inject(Fault::once(action, Effect::Error(expired)));
    }
    bed.logs.create_group(GROUP, &LogGroupSpec { retention_days: Some(7), ..LogGroupSpec::default() }).await.unwrap();
    bed.logs.create_stream(GROUP, STREAM).await.unwrap();
    assert_eq!(bed.cloud.log_group(GROUP).unwrap().retention_days, Some(7));
    for action in ["CreateLogGroup", "PutRetentionPolicy", "CreateLogStream"] {
        assert_eq!(bed.cloud.count(action), 2, "{action}");
    }
}

#[tokio::test]
async fn no_reply_is_unavailable_and_the_batch_can_be_sent_again() {
    let (bed, now) = ready().await;
    let one = batch(&[(now, "x")]);
    bed.cloud.inject(Fault::once("PutLogEvents", Effect::DropRequest));
    assert!(matches!(bed.logs.put(&one).await, Err(SinkError::Unavailable(_))));
    bed.cloud.inject(Fault::once("PutLogEvents", Effect::LoseReply));
    assert!(matches!(bed.logs.put(&one).await, Err(SinkError::Unavailable(_))));
    assert_eq!(messages(&bed), ["x"], "the lost reply was that of a batch that was taken");
    bed.logs.put(&one).await.unwrap();
    for text in ["<html>", "{\"rejectedLogEventsInfo\":7}", "{\"rejectedLogEventsInfo\":{\"tooNewLogEventStartIndex\":"] {
        bed.cloud.inject(Fault::once("PutLogEvents", Effect::Garbage(text.to_owned())));
        let reply = bed.logs.put(&one).await;
        assert!(matches!(reply, Err(SinkError::Unavailable(_))), "{text}: {reply:?}");
    }
    bed.cloud.inject(Fault::once("PutLogEvents", Effect::Garbage("{\"rejectedLogEventsInfo\":{\"tooNewLogEventStartIndex\":-5}}".into())));
    assert_eq!(bed.logs.put(&one).await, Ok(Rejected::default()), "an index that cannot be is none");
}

#[tokio::test]
async fn a_throttled_account_is_told_so_without_a_retry() {
    let (bed, now) = ready().await;
    bed.cloud.set_bucket("PutLogEvents", Bucket { size: 3.0, per_second: 0.001 });
    let one = batch(&[(now, "x")]);
    for _ in 0..3 {
        bed.logs.put(&one).await.unwrap();
    }
    assert!(matches!(bed.logs.put(&one).await, Err(SinkError::Throttled { .. })));
    assert_eq!(bed.cloud.count("PutLogEvents"), 4);
}

/// The whole way: a pod's file, the tailer, the batch, the service's limits.
#[tokio::test]
async fn a_stream_of_one_workload_says_whose_it_is() {
    let bed = bed().await;
    let dir = tempfile::tempdir().unwrap();
    let at = jiff::Timestamp::from_millisecond(bed.cloud.clock().unix_ms()).unwrap();
    let file = |pod: &str| format!("{pod}_shop_app-{}.log", "5".repeat(64));
    let mut cluster = ClusterState::default();
    for pod in ["web-6b9c4cb4dc-8zpz5", "cart-6b9c4cb4dc-bcdfg"] {
        std::fs::write(dir.path().join(file(pod)), format!("{at} stdout F hello\n")).unwrap();
        let (set, _) = pod.rsplit_once('-').unwrap();
        let pod = serde_json::json!({"metadata": {"name": pod, "namespace": "shop", "uid": pod,
            "ownerReferences": [{"kind": "ReplicaSet", "name": set, "controller": true}]}});
        cluster.apply(Object::Pod(serde_json::from_value(pod).unwrap()));
    }
    for (entity, stream, expected) in [(Some("i-1"), "{pod}", Some("web")), (Some("i-1"), "{namespace}", None), (None, "{pod}.quiet", None)]
    {
        let settings = LogSettings {
            entity: entity.map(str::to_owned),
            stream: stream.to_owned().try_into().unwrap(),
            age: None,
            ..LogSettings::new(Layout::FluentBit)
        };
        let parts = TailerParts { settings, log_dir: dir.path().to_owned(), node: "n".to_owned(), cluster_name: "c".to_owned() };
        ship_once(parts, std::sync::Arc::new(cluster.clone()), bed.logs.clone(), std::time::SystemTime::now).await.unwrap();
        let name = stream.replace("{pod}", "web-6b9c4cb4dc-8zpz5").replace("{namespace}", "shop");
        let group = "/aws/containerinsights/c/application";
        assert!(!bed.cloud.events(group, &name).is_empty(), "{stream}");
        let entity = bed.cloud.log_entity(group, &name);
        assert_eq!(entity.as_ref().map(|entity| entity.key_attributes["Name"].as_str()), expected, "{stream}");
        if let Some(entity) = entity {
            assert_eq!(entity.key_attributes["Environment"], "eks:c/shop");
            assert_eq!(entity.attributes["EC2.InstanceId"], "i-1");
        }
    }
}

#[tokio::test]
async fn gzip_is_used_where_it_is_taken_and_given_up_where_it_is_not() {
    let (bed, now) = ready().await;
    bed.cloud.add_access_key("AKIDTEST", "secret", None, None);
    let sink = bed.logs.clone();
    assert!(sink.gzip(), "on until an endpoint refuses it");
    sink.put(&batch(&[(now, "compressed")])).await.unwrap();
    assert!(sink.gzip());
    bed.cloud.set_takes_gzip(false);
    sink.put(&batch(&[(now, "plain")])).await.expect("sent again without compression");
    assert!(!sink.gzip(), "and not tried again");
    sink.put(&batch(&[(now, "plain too")])).await.unwrap();
    assert_eq!(messages(&bed), ["compressed", "plain", "plain too"]);
    // The refused one was answered before it reached the model.
    assert_eq!(bed.cloud.count("PutLogEvents"), 3);
}

#[tokio::test]
async fn metric_documents_go_with_their_format_header() {
    let (bed, now) = ready().await;
    bed.logs.put(&batch_of(&[(now, "{\"_aws\":{}}")], true)).await.unwrap();
    bed.logs.put(&batch(&[(now, "a line")])).await.unwrap();
    assert_eq!(bed.cloud.logs_totals().emf_puts, 1);
}

#[tokio::test]
async fn the_direct_way_answers_the_same() {
    let (bed, now) = ready().await;
    let direct = DirectLogs::new(&bed.cloud, Duration::ZERO);
    let events = [(now, "x"), (now + 3 * HOUR, "too new")];
    let over_http = bed.logs.put(&batch(&events)).await;
    assert_eq!(direct.put(&batch(&events)).await, over_http);
    bed.cloud.delete_log_group(GROUP);
    let (a, b) = (direct.put(&batch(&events)).await, bed.logs.put(&batch(&events)).await);
    assert_eq!(a, b);
    assert!(matches!(a, Err(SinkError::NotFound(_))));
    bed.cloud.clear_calls();
    for _ in 0..2 {
        direct.create_group(GROUP, &LogGroupSpec { retention_days: Some(1), ..LogGroupSpec::default() }).await.unwrap();
        direct.create_stream(GROUP, STREAM).await.unwrap();
    }
    assert_eq!(bed.cloud.count("PutRetentionPolicy"), 1);
}

/// The service signs off on at least the batches that the product's own builder calls legal.
#[tokio::test]
async fn a_day_of_events_in_one_batch_is_legal() {
    let (bed, now) = ready().await;
    bed.logs.put(&batch(&[(now - 24 * HOUR, "first"), (now, "last")])).await.unwrap();
    assert_eq!(bed.cloud.logs_totals().events, 2);
}

#[tokio::test]
async fn a_node_whose_clock_is_off_signs_with_the_services_time() {
    let here = Clock::tokio().unix_ms();
    for minutes in [-10, 10, 60 * 24 * 400] {
        let bed = bed_at(Bed::config(), Clock::tokio_from(here + minutes * 60_000)).await;
        bed.cloud.add_access_key("AKIDTEST", "secret", None, None);
        bed.cloud.add_log_group(GROUP);
        bed.cloud.add_log_stream(GROUP, STREAM);
        let now = bed.cloud.clock().unix_ms();
        assert_eq!(bed.logs.put(&batch(&[(now, "x")])).await, Ok(Rejected::default()), "{minutes} minutes");
        assert_eq!(bed.cloud.count("PutLogEvents"), 1, "what was signed at another time did not get there");
        assert_eq!(bed.logs.put(&batch(&[(now, "y")])).await, Ok(Rejected::default()));
        assert_eq!(messages(&bed), ["x", "y"]);
    }
}
