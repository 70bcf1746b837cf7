//! Kubernetes events: which to write, which to count on one already written, which to keep back.
//!
//! The same complaint about the same object is one event with a count; a storm of different ones is cut off by a token
//! bucket. Field rules: events.k8s.io/v1, <https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/>.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::ids::PodName;

/// The longest note, bytes; longer ones are refused.
const LONGEST_NOTE: usize = 1024;
/// Different events that are remembered; the one quiet for longest is forgotten first.
const REMEMBERED: usize = 256;
/// After so long without a repetition the next one is an event of its own, milliseconds.
const SERIES_ENDS: u64 = 6 * 60_000;
/// A count is written at most this often, milliseconds.
const COUNT_EVERY: u64 = 30_000;
/// Events that may be written at once, and how long each takes to earn anew, milliseconds.
const BURST: (u64, u64) = (25, 12_000);

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Regarding {
    /// A pod with its uid; empty if not known.
    Pod(PodName, String),
    /// A node. Its events are in the namespace `default`, with the name as uid, as the kubelet writes them.
    Node(String),
}

/// Something that a person should know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    /// About what.
    pub regarding: Regarding,
    /// A warning, or news.
    pub warning: bool,
    /// CamelCase, short, from a closed set: people filter by it.
    pub reason: &'static str,
    /// What was being done: CamelCase.
    pub action: &'static str,
    /// The sentence for people.
    pub note: String,
}

/// What is to be sent to the API server.
#[derive(Clone, Debug, PartialEq)]
pub enum Post {
    /// A new object.
    Create {
        /// Its namespace.
        namespace: String,
        /// The object.
        object: Value,
    },
    /// A merge patch of one that was made.
    Count {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The patch.
        patch: Value,
    },
}

struct Written {
    name: String,
    count: u64,
    last: u64,
    /// Count and time of the last patch.
    told: (u64, u64),
}

/// The memory of what was written. Times are milliseconds since 1970.
pub struct Recorder {
    node: String,
    written: BTreeMap<Event, Written>,
    tokens: u64,
    earned: u64,
    /// Events that the bucket kept back.
    pub suppressed: u64,
}

impl Recorder {
    /// For the agent of a node.
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), written: BTreeMap::new(), tokens: BURST.0, earned: 0, suppressed: 0 }
    }

    /// Takes an event: a new one is to be created at once, a repetition is counted and told by [`Recorder::due`]. `now` is the node's time
    /// of day, in milliseconds: it may have been set, either way, since the last one.
    pub fn record(&mut self, mut event: Event, now: u64) -> Option<Post> {
        cut(&mut event.note);
        // Waiting times and the like differ in each repetition.
        let key = Event { note: event.note.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect(), ..event.clone() };
        if let Some(written) = self.written.get_mut(&key)
            && now.abs_diff(written.last) < SERIES_ENDS
        {
            written.count += 1;
            written.last = now;
            return None;
        }
        let earned = now.abs_diff(self.earned) / BURST.1;
        if earned > 0 {
            self.tokens = (self.tokens + earned).min(BURST.0);
            self.earned = now;
        }
        if self.tokens == 0 {
            self.suppressed += 1;
            return None;
        }
        self.tokens -= 1;
        if self.written.len() >= REMEMBERED
            && let Some(quiet) = self.written.iter().min_by_key(|(_, written)| written.last).map(|(key, _)| key.clone())
        {
            self.written.remove(&quiet);
        }
        let (namespace, regarding, object_name) = match &event.regarding {
            Regarding::Pod(pod, uid) => (
                pod.namespace.clone(),
                json!({"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": uid}),
                &pod.name,
            ),
            Regarding::Node(name) => ("default".to_owned(), json!({"apiVersion": "v1", "kind": "Node", "name": name, "uid": name}), name),
        };
        // As client-go names them: unique by time; a name has at most 253 characters.
        let name = format!("{}.{now:x}{:02x}", &object_name[..object_name.len().min(230)], self.written.len());
        let object = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": micro_time(now), "regarding": regarding,
            "type": if event.warning { "Warning" } else { "Normal" },
            "reason": event.reason, "action": event.action, "note": event.note,
            "reportingController": "stanchion/agent", "reportingInstance": self.node,
        });
        self.written.insert(key, Written { name, count: 1, last: now, told: (1, now) });
        Some(Post::Create { namespace, object })
    }

    /// Counts that are to be told now.
    pub fn due(&mut self, now: u64) -> Vec<Post> {
        let mut posts = Vec::new();
        for (event, written) in &mut self.written {
            if written.count == written.told.0 || now.abs_diff(written.told.1) < COUNT_EVERY {
                continue;
            }
            written.told = (written.count, now);
            let namespace = match &event.regarding {
                Regarding::Pod(pod, _) => pod.namespace.clone(),
                Regarding::Node(_) => "default".to_owned(),
            };
            let patch = json!({"series": {"count": written.count, "lastObservedTime": micro_time(written.last)}});
            posts.push(Post::Count { namespace, name: written.name.clone(), patch });
        }
        posts
    }
}

fn cut(note: &mut String) {
    if note.len() > LONGEST_NOTE {
        let mut end = LONGEST_NOTE - '…'.len_utf8();
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
}

/// RFC 3339 with microseconds, as the API wants it.
fn micro_time(ms: u64) -> String {
    let time = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).unwrap_or_default();
    format!("{time:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_795_000_000_000;

    fn event(note: &str) -> Event {
        let regarding = Regarding::Pod(PodName::new("x", "a"), "u1".to_owned());
        Event { regarding, warning: true, reason: "NoFreeAddress", action: "AssignAddress", note: note.to_owned() }
    }

    #[test]
    fn a_repetition_is_counted_on_the_first_one() {
        let mut recorder = Recorder::new("n1");
        let Some(Post::Create { namespace, object }) = recorder.record(event("waited 20001 ms"), NOW) else { panic!("not written") };
        assert_eq!((namespace.as_str(), object["regarding"]["uid"].as_str(), object["type"].as_str()), ("x", Some("u1"), Some("Warning")));
        assert_eq!(object["eventTime"], "2026-11-18T11:06:40.000000Z");
        assert_eq!(recorder.record(event("waited 20444 ms"), NOW + 1000), None);
        assert_eq!(recorder.due(NOW + 2000), [], "not so soon");
        let due = recorder.due(NOW + 31_000);
        let [Post::Count { name, patch, .. }] = due.as_slice() else { panic!("{due:?}") };
        assert_eq!((name.as_str(), patch["series"]["count"].as_u64()), (object["metadata"]["name"].as_str().unwrap(), Some(2)));
        assert_eq!(recorder.due(NOW + 99_000), [], "nothing new");
        assert!(recorder.record(event("waited 1 ms"), NOW + 1000 + SERIES_ENDS).is_some(), "after a quiet time it is news again");
    }

    /// Far back: what was to come in half a minute is not hours away.
    #[test]
    fn a_clock_that_is_set_back_silences_nothing() {
        let mut recorder = Recorder::new("n1");
        // Notes differ by a letter each: digits are the same event's.
        let story = |n: u64| event(&"a".repeat(usize::try_from(n).unwrap()));
        let told = (1..=BURST.0 + 1).filter(|n| recorder.record(story(*n), NOW).is_some()).count() as u64;
        assert_eq!(told, BURST.0, "the burst is used up");
        assert_eq!(recorder.record(story(1), NOW), None, "a repetition");
        let earlier = NOW - 3 * 3_600_000;
        assert_eq!(recorder.due(earlier).len(), 1, "its count is told");
        assert!(recorder.record(story(BURST.0 + 1), earlier).is_some(), "what is new is told");
        assert!(recorder.record(story(2), earlier + BURST.1).is_some(), "what was long ago is news again");
    }

    #[test]
    fn nodes_are_named_as_the_kubelet_names_them() {
        let mut recorder = Recorder::new("n1");
        let about = Event { regarding: Regarding::Node("n1".into()), ..event("x") };
        let Some(Post::Create { namespace, object }) = recorder.record(about, NOW) else { panic!("not written") };
        assert_eq!((namespace.as_str(), object["regarding"]["uid"].as_str()), ("default", Some("n1")));
    }

    proptest! {
        /// Whatever storm comes, the API server sees a bounded rate, and what is remembered is bounded.
        #[test]
        fn a_storm_is_bounded(steps in proptest::collection::vec((0_u64..5_000, "[a-zé]{0,6}", 0_usize..400), 1..200)) {
            let mut recorder = Recorder::new("n1");
            let (mut now, mut created) = (NOW, 0_u64);
            for (pause, word, times) in steps {
                let note = word.repeat(times);
                now += pause;
                if let Some(Post::Create { object, .. }) = recorder.record(event(&note), now) {
                    created += 1;
                    prop_assert!(object["note"].as_str().unwrap().len() <= LONGEST_NOTE);
                }
            }
            prop_assert!(created <= 2 * BURST.0 + (now - NOW) / BURST.1 + 1, "{created}");
            prop_assert!(recorder.written.len() <= REMEMBERED);
        }
    }
}
