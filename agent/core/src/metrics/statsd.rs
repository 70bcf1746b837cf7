//! Statsd packets, aggregated over a tick, as CloudWatch documents.
//!
//! Names and dimensions are the CloudWatch agent's: namespace `CWAgent`, `_` for the dots of a name, the dimension `metric_type` and the
//! packet's tags. The agent puts metrics directly; here they are documents of the embedded metric format, from which CloudWatch makes the
//! same metrics. Types: `c` with sampling rate, `g` with signed steps, which begin anew with each tick as there, `ms`, `h`, `s`. Tags
//! behind the name (`name,key=value:1|c`) and in Datadog's form (`|#key:value,other`).
//! <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch-Agent-custom-metrics-statsd.html>

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::emf::{self, Directive, MAX_DIMENSIONS};

/// The CloudWatch namespace.
pub const NAMESPACE: &str = "CWAgent";
/// Series of a tick; more are counted and left out, so that a name with a number in it cannot fill the memory.
const MAX_SERIES: usize = 10_000;
/// Distinct values of a timing or members of a set in a tick.
const MAX_VALUES: usize = 5_000;
/// Bytes that a tick keeps in all, about: one pod's packets are not to take the memory that log shipping needs.
const MAX_BYTES: usize = 16 << 20;
/// What a series, a value or a member takes beside its text.
const OVERHEAD: usize = 96;
/// Values in one array of a document: <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html>
const MAX_ARRAY: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Counter,
    Gauge,
    Timing,
    Histogram,
    Set,
}

impl Kind {
    /// The value of `metric_type`.
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Timing => "timing",
            Self::Histogram => "histogram",
            Self::Set => "set",
        }
    }
}

type Key = (Kind, String, BTreeMap<String, String>);

#[derive(Debug)]
enum Aggregate {
    Sum(f64),
    Last(f64),
    /// Values by their bits, each with how often it came.
    Values(BTreeMap<u64, f64>),
    Members(BTreeSet<String>),
}

/// Counts since the last tick.
#[derive(Debug, Default)]
pub struct Statsd {
    series: BTreeMap<Key, Aggregate>,
    bytes: usize,
    /// Lines that could not be read.
    pub malformed: u64,
    /// Values left out for want of room.
    pub dropped: u64,
}

impl Statsd {
    /// Takes a packet: one metric a line.
    pub fn packet(&mut self, packet: &[u8]) {
        for line in String::from_utf8_lossy(packet).lines().map(str::trim).filter(|line| !line.is_empty()) {
            if self.line(line).is_none() {
                self.malformed += 1;
            }
        }
    }

    /// `name:value|type|@rate|#tags`, with several `value|type|@rate` after one name; `None` if it is of another form.
    fn line(&mut self, line: &str) -> Option<()> {
        let (line, mut tags) = match line.split_once("|#") {
            Some((line, tags)) => (line, parse_tags(tags)),
            None => (line, BTreeMap::new()),
        };
        let (bucket, values) = line.split_once(':')?;
        let mut parts = bucket.split(',');
        let name = parts.next()?;
        for (key, value) in parts.filter_map(|tag| tag.split_once('=').filter(|(_, value)| !value.contains('='))) {
            // What is said at the line's end counts.
            if is_tag(key, value) {
                tags.entry(key.to_owned()).or_insert_with(|| value.to_owned());
            }
        }
        if name.is_empty() || name.len() > 255 || tags.len() >= MAX_DIMENSIONS {
            return None;
        }
        let name: String =
            name.chars().map(|letter| if letter.is_ascii_alphanumeric() || "_-/#".contains(letter) { letter } else { '_' }).collect();
        // All or nothing: the type may stand only after the last value ("1:2|ms").
        let mut pending = Vec::new();
        let mut taken = Vec::new();
        for part in values.split(':') {
            let mut fields = part.split('|');
            pending.push(fields.next()?);
            let Some(kind) = fields.next() else { continue };
            let rate = match fields.next() {
                Some(rate) => rate.strip_prefix('@')?.parse::<f64>().ok().filter(|rate| *rate > 0.0 && *rate <= 1.0)?,
                None => 1.0,
            };
            for value in pending.drain(..) {
                taken.push(reading(value, kind, rate)?);
            }
        }
        if !pending.is_empty() || taken.is_empty() {
            return None;
        }
        for (kind, reading) in taken {
            self.add((kind, name.clone(), tags.clone()), reading);
        }
        Some(())
    }

    fn add(&mut self, key: Key, reading: Reading) {
        let Some(more) = self.bytes_more(&key, &reading).filter(|more| self.bytes + more <= MAX_BYTES) else {
            self.dropped += 1;
            return;
        };
        self.bytes += more;
        let aggregate = self.series.entry(key).or_insert_with(|| match reading {
            Reading::Count(_) => Aggregate::Sum(0.0),
            Reading::Level { .. } => Aggregate::Last(0.0),
            Reading::Time { .. } => Aggregate::Values(BTreeMap::new()),
            Reading::Member(_) => Aggregate::Members(BTreeSet::new()),
        });
        match (aggregate, reading) {
            (Aggregate::Sum(sum), Reading::Count(count)) => *sum += count,
            (Aggregate::Last(level), Reading::Level { value, step }) => *level = value + if step { *level } else { 0.0 },
            (Aggregate::Values(values), Reading::Time { value, weight }) => *values.entry(value.to_bits()).or_default() += weight,
            (Aggregate::Members(members), Reading::Member(member)) => drop(members.insert(member)),
            _ => unreachable!("the key has the kind"),
        }
    }

    /// What a reading takes that is not there yet; `None` where its series, or one more series, has no room.
    fn bytes_more(&self, key: &Key, reading: &Reading) -> Option<usize> {
        let Some(aggregate) = self.series.get(key) else {
            let (_, name, tags) = key;
            let texts = name.len() + tags.iter().map(|(key, value)| OVERHEAD + key.len() + value.len()).sum::<usize>();
            let member = if let Reading::Member(member) = reading { member.len() } else { 0 };
            return (self.series.len() < MAX_SERIES).then_some(2 * OVERHEAD + texts + member);
        };
        match (aggregate, reading) {
            (Aggregate::Values(values), Reading::Time { value, .. }) if !values.contains_key(&value.to_bits()) => {
                (values.len() < MAX_VALUES).then_some(OVERHEAD)
            }
            (Aggregate::Members(members), Reading::Member(member)) if !members.contains(member) => {
                (members.len() < MAX_VALUES).then_some(OVERHEAD + member.len())
            }
            _ => Some(0),
        }
    }

    /// The documents of a tick; counting begins anew. `labels` are members of each document (node, cluster) that are no dimensions.
    pub fn documents(&mut self, wall_ms: i64, labels: &[(&str, &str)]) -> Vec<String> {
        let mut out = Vec::new();
        self.bytes = 0;
        for ((kind, name, tags), aggregate) in std::mem::take(&mut self.series) {
            let values: Vec<Value> = match aggregate {
                Aggregate::Sum(value) | Aggregate::Last(value) => emf::number(value).into_iter().collect(),
                Aggregate::Members(members) => vec![members.len().into()],
                Aggregate::Values(values) => {
                    let values: Vec<_> = values.into_iter().collect();
                    values.chunks(MAX_ARRAY).filter_map(histogram).collect()
                }
            };
            for value in values {
                let mut members: Map<String, Value> = labels.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
                members.extend(tags.iter().map(|(key, value)| (key.clone(), Value::from(value.as_str()))));
                members.insert("metric_type".into(), kind.name().into());
                members.insert(name.clone(), value);
                let mut dimensions: Vec<String> = tags.keys().cloned().collect();
                dimensions.push("metric_type".into());
                let directive = Directive { namespace: NAMESPACE.into(), dimensions: vec![dimensions], metrics: vec![name.clone()] };
                out.push(emf::document(wall_ms, members, &[directive]));
            }
        }
        out
    }
}

/// Values with their counts, as CloudWatch takes a distribution.
fn histogram(values: &[(u64, f64)]) -> Option<Value> {
    let pairs: Vec<(f64, f64)> = values.iter().map(|(bits, count)| (f64::from_bits(*bits), *count)).collect();
    let count: f64 = pairs.iter().map(|(_, count)| count).sum();
    let sum: f64 = pairs.iter().map(|(value, count)| value * count).sum();
    let min = pairs.iter().map(|(value, _)| *value).reduce(f64::min)?;
    let max = pairs.iter().map(|(value, _)| *value).reduce(f64::max)?;
    let list = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).map(emf::number).collect::<Option<Vec<Value>>>();
    Some(serde_json::json!({
        "Values": list(|pair| pair.0)?, "Counts": list(|pair| pair.1)?,
        "Min": emf::number(min)?, "Max": emf::number(max)?, "Sum": emf::number(sum)?, "Count": emf::number(count)?,
    }))
}

enum Reading {
    Count(f64),
    Level { value: f64, step: bool },
    Time { value: f64, weight: f64 },
    Member(String),
}

fn reading(value: &str, kind: &str, rate: f64) -> Option<(Kind, Reading)> {
    let number = || value.parse::<f64>().ok().filter(|number| number.is_finite());
    Some(match kind {
        "c" => (Kind::Counter, Reading::Count(number()? / rate)),
        "g" => (Kind::Gauge, Reading::Level { value: number()?, step: value.starts_with(['+', '-']) }),
        "ms" => (Kind::Timing, Reading::Time { value: number()?, weight: 1.0 / rate }),
        "h" => (Kind::Histogram, Reading::Time { value: number()?, weight: 1.0 / rate }),
        "s" => (Kind::Set, Reading::Member(value.to_owned())),
        _ => return None,
    })
}

/// CloudWatch has no empty dimensions, and no longer ones.
fn is_tag(key: &str, value: &str) -> bool {
    (1..=255).contains(&key.len()) && (1..=1024).contains(&value.len())
}

/// `key:value,flag`: a tag without value has the value `<empty>`.
fn parse_tags(text: &str) -> BTreeMap<String, String> {
    let text = text.split('|').next().unwrap_or_default();
    let pairs = text.split(',').map(|tag| tag.split_once(':').unwrap_or((tag, "<empty>")));
    pairs.filter(|(key, value)| is_tag(key, value)).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn documents(statsd: &mut Statsd) -> Vec<Value> {
        statsd.documents(1_795_232_118_300, &[("NodeName", "node1")]).iter().map(|text| serde_json::from_str(text).unwrap()).collect()
    }

    fn value(documents: &[Value], name: &str) -> Value {
        let found: Vec<_> = documents.iter().filter_map(|document| document.get(name)).collect();
        assert_eq!(found.len(), 1, "{name} in {documents:?}");
        found[0].clone()
    }

    #[test]
    fn what_is_kept_is_bounded_in_bytes() {
        let mut statsd = Statsd::default();
        let long = "v".repeat(1_000);
        for number in 0..9_000 {
            statsd.packet(format!("m{number}:1|c|#a:{long},b:{long},c:{long}\nusers:{number}{long}{long}|s").as_bytes());
        }
        assert!(statsd.dropped > 0 && statsd.bytes <= MAX_BYTES);
        let told = documents(&mut statsd);
        assert!((3_000..9_000).contains(&told.len()), "{}", told.len());
        statsd.packet(b"after:1|c");
        assert_eq!(value(&documents(&mut statsd), "after"), 1, "a tick later there is room");
    }

    #[test]
    fn every_type_of_the_protocol() {
        let mut statsd = Statsd::default();
        statsd.packet(b"hits:1|c\nhits:2|c|@0.5\nqueue:7|g\nqueue:+3|g\nusers:ann|s\nusers:bob|s\nusers:ann|s\n");
        statsd.packet(b"took:10|ms\ntook:10|ms\ntook:30:50|ms|@0.5\nsize:7|h\nboth:1|c:5|g\nshop.cart sum:4|c|#region:eu,beta");
        let told = documents(&mut statsd);
        assert_eq!(value(&told, "hits"), 5);
        assert_eq!(value(&told, "queue"), 10);
        assert_eq!(value(&told, "users"), 2);
        assert_eq!(
            value(&told, "took"),
            json!({"Values": [10, 30, 50], "Counts": [2, 2, 2], "Min": 10, "Max": 50, "Sum": 180, "Count": 6})
        );
        let size = told.iter().find(|document| document.get("size").is_some()).unwrap();
        assert_eq!((&size["metric_type"], &size["size"]["Sum"]), (&json!("histogram"), &json!(7)));
        assert_eq!(told.iter().filter(|document| document.get("both").is_some()).count(), 2, "a counter and a gauge");
        let tagged = told.iter().find(|document| document.get("shop_cart_sum").is_some()).unwrap();
        assert_eq!((&tagged["region"], &tagged["beta"], &tagged["metric_type"]), (&json!("eu"), &json!("<empty>"), &json!("counter")));
        assert_eq!(
            tagged["CloudWatchMetrics"],
            json!([{"Namespace": "CWAgent", "Dimensions": [["beta", "region", "metric_type"]], "Metrics": [{"Name": "shop_cart_sum"}]}])
        );
        assert_eq!((&tagged["NodeName"], &tagged["Version"], statsd.malformed), (&json!("node1"), &json!("0"), 0));
        assert!(documents(&mut statsd).is_empty(), "a tick begins anew");
        statsd.packet(b"queue:-4|g");
        assert_eq!(value(&documents(&mut statsd), "queue"), -4, "nobody said what it was");
    }

    #[test]
    fn tags_behind_the_name() {
        let mut statsd = Statsd::default();
        statsd.packet(b"hits,env=prod,,flag,a=b=c,none=,zone=a:1|c|#zone:b\nhits:2|c\nhits,env=prod,zone=b:3|c");
        let told = documents(&mut statsd);
        let of = |env: Option<&str>| told.iter().find(|document| document.get("env").and_then(Value::as_str) == env).unwrap();
        assert_eq!((told.len(), &of(None)["hits"], &of(Some("prod"))["hits"]), (2, &json!(2), &json!(4)));
        assert_eq!(of(Some("prod"))["CloudWatchMetrics"][0]["Dimensions"], json!([["env", "zone", "metric_type"]]));
        assert_eq!((&of(Some("prod"))["zone"], statsd.malformed), (&json!("b"), 0));
    }

    #[test]
    fn what_is_malformed_is_counted() {
        let mut statsd = Statsd::default();
        for line in [
            "",
            "name",
            "name:",
            ":1|c",
            "name:1",
            "name:x|c",
            "name:1|z",
            "name:1|c|0.5",
            "name:1|c|@0",
            "name:1|c|@2",
            "name:1|c:2",
            "n:NaN|g",
        ] {
            statsd.packet(line.as_bytes());
        }
        assert_eq!(statsd.malformed, 11);
        assert!(documents(&mut statsd).is_empty());
    }

    #[test]
    fn a_name_with_a_number_in_it_cannot_fill_the_memory() {
        let mut statsd = Statsd::default();
        for number in 0..MAX_SERIES + 5 {
            statsd.packet(format!("request_{number}:1|c").as_bytes());
        }
        for number in 0..MAX_VALUES + 3 {
            statsd.packet(format!("request_0:{number}|ms\nrequest_1:1|c").as_bytes());
        }
        assert!(statsd.series.len() <= MAX_SERIES);
        assert!(statsd.dropped >= 5);
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in "([a-z.]{1,3}|:|\\||c|g|ms|s|@|#|,|[0-9.+-]{1,4}|\n|é| ){0,40}") {
            let mut statsd = Statsd::default();
            statsd.packet(packet.as_bytes());
            for document in statsd.documents(1, &[]) {
                let document: Value = serde_json::from_str(&document).unwrap();
                prop_assert!(document["CloudWatchMetrics"][0]["Metrics"][0]["Name"].is_string());
            }
        }

        #[test]
        fn bytes_that_are_no_text_do_not_panic(packet: Vec<u8>) {
            Statsd::default().packet(&packet);
        }

        #[test]
        fn counters_add_up(values in prop::collection::vec(0u32..10_000, 1..50)) {
            let mut statsd = Statsd::default();
            for value in &values {
                statsd.packet(format!("a:{value}|c").as_bytes());
            }
            prop_assert_eq!(value(&documents(&mut statsd), "a"), values.iter().map(|value| u64::from(*value)).sum::<u64>());
        }
    }
}
