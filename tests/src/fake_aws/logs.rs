//! CloudWatch Logs: groups, streams, and every limit of PutLogEvents.

use std::collections::BTreeMap;

use super::faults::ApiError;
use super::logs_wire::Entity;

/// Bytes of a batch: Σ (UTF-8 bytes + 26) (PutLogEvents API reference).
const BATCH_BYTES: usize = 1_048_576;
/// Bytes that the service adds to each event.
const EVENT_OVERHEAD: usize = 26;
/// Events of a batch.
const BATCH_EVENTS: usize = 10_000;
/// Longest event with its overhead: 1 MiB.
const EVENT_BYTES: usize = 1_048_576;
/// A batch spans at most 24 hours.
const SPAN_MS: i64 = 24 * 3_600_000;
/// Events further ahead are rejected.
const FUTURE_MS: i64 = 2 * 3_600_000;
/// Events older than this are rejected.
const PAST_MS: i64 = 14 * 24 * 3_600_000;
/// Longest name of a group or stream.
const NAME_MAX: usize = 512;
/// What PutRetentionPolicy takes.
const RETENTION_DAYS: [u32; 22] = [1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653];

/// An event that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    /// Milliseconds since 1970, of the event.
    pub timestamp_ms: i64,
    /// The text.
    pub message: String,
    /// Milliseconds since 1970, when it came in.
    pub ingested_ms: i64,
}

/// Counters over all streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogsTotals {
    /// Accepted PutLogEvents calls.
    pub puts: u64,
    /// Events taken.
    pub events: u64,
    /// Bytes as billed: UTF-8 plus 26 an event.
    pub billed_bytes: u64,
    /// Puts that came with the header of the embedded metric format.
    pub emf_puts: u64,
    /// Events rejected within accepted batches.
    pub rejected: u64,
}

/// A CloudWatch Logs request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the parameters of the action of that name")]
pub enum LogsCall {
    PutLogEvents { group: String, stream: String, events: Vec<(i64, String)>, emf: bool, entity: Option<Entity> },
    CreateLogGroup { group: String, class: String, tags: BTreeMap<String, String> },
    CreateLogStream { group: String, stream: String },
    PutRetentionPolicy { group: String, days: u32 },
    DescribeLogGroups { prefix: String, limit: usize, next_token: Option<String> },
    DescribeLogStreams { group: String, prefix: String, limit: usize, next_token: Option<String> },
    TagResource { group: String, tags: BTreeMap<String, String> },
}

/// What CloudWatch Logs answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the elements of the replies")]
pub enum LogsReply {
    /// Index ranges as the API gives them.
    Put {
        too_new_from: Option<usize>,
        too_old_until: Option<usize>,
        expired_until: Option<usize>,
    },
    Groups {
        items: Vec<GroupView>,
        next_token: Option<String>,
    },
    Streams {
        names: Vec<String>,
        next_token: Option<String>,
    },
    Done,
}

/// A group as DescribeLogGroups shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// Days; `None` for ever.
    pub retention_days: Option<u32>,
    /// `STANDARD` or `INFREQUENT_ACCESS`.
    pub class: String,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Milliseconds since 1970.
    pub created_ms: i64,
}

#[derive(Debug, Default)]
pub(super) struct LogsState {
    groups: BTreeMap<String, Group>,
    totals: LogsTotals,
    /// Of the latest put to each stream.
    entities: BTreeMap<(String, String), Option<Entity>>,
}

#[derive(Debug, Default)]
struct Group {
    view: GroupView,
    streams: BTreeMap<String, Vec<StoredEvent>>,
}

impl LogsCall {
    /// The action's name in the API.
    pub fn action(&self) -> &'static str {
        match self {
            Self::PutLogEvents { .. } => "PutLogEvents",
            Self::CreateLogGroup { .. } => "CreateLogGroup",
            Self::CreateLogStream { .. } => "CreateLogStream",
            Self::PutRetentionPolicy { .. } => "PutRetentionPolicy",
            Self::DescribeLogGroups { .. } => "DescribeLogGroups",
            Self::DescribeLogStreams { .. } => "DescribeLogStreams",
            Self::TagResource { .. } => "TagResource",
        }
    }
}

impl LogsState {
    pub(super) fn call(&mut self, call: LogsCall, now_ms: i64) -> Result<LogsReply, ApiError> {
        match call {
            LogsCall::PutLogEvents { group, stream, events, emf, entity } => {
                entity.as_ref().map_or(Ok(()), check_entity)?;
                let reply = self.put(&group, &stream, events, now_ms)?;
                self.entities.insert((group, stream), entity);
                self.totals.emf_puts += u64::from(emf);
                Ok(reply)
            }
            LogsCall::CreateLogGroup { group, class, tags } => self.create_group(group, class, tags, now_ms),
            LogsCall::CreateLogStream { group, stream } => self.create_stream(&group, stream),
            LogsCall::PutRetentionPolicy { group, days } => {
                if !RETENTION_DAYS.contains(&days) {
                    return Err(invalid(format!("{days} is not a valid value for retentionInDays")));
                }
                self.group(&group)?.view.retention_days = Some(days);
                Ok(LogsReply::Done)
            }
            LogsCall::DescribeLogGroups { prefix, limit, next_token } => {
                let items = self.groups.values().map(|g| &g.view).filter(|v| v.name.starts_with(&prefix)).cloned().collect();
                let (items, next_token) = page(items, limit, next_token.as_deref())?;
                Ok(LogsReply::Groups { items, next_token })
            }
            LogsCall::DescribeLogStreams { group, prefix, limit, next_token } => {
                let streams = &self.group(&group)?.streams;
                let names = streams.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
                let (names, next_token) = page(names, limit, next_token.as_deref())?;
                Ok(LogsReply::Streams { names, next_token })
            }
            LogsCall::TagResource { group, tags } => {
                self.group(&group)?.view.tags.extend(tags);
                Ok(LogsReply::Done)
            }
        }
    }

    fn put(&mut self, group: &str, stream: &str, events: Vec<(i64, String)>, now_ms: i64) -> Result<LogsReply, ApiError> {
        check_batch(&events, now_ms)?;
        let group = self.group(group)?;
        let retention = group.view.retention_days.map(|days| i64::from(days) * 24 * 3_600_000);
        let stored = group.streams.get_mut(stream).ok_or_else(no_stream)?;
        let too_old = events.partition_point(|(at, _)| *at < now_ms - PAST_MS);
        let expired = retention.map_or(0, |kept| events.partition_point(|(at, _)| *at < now_ms - kept));
        let too_new = events.partition_point(|(at, _)| *at <= now_ms + FUTURE_MS);
        let (from, all) = (too_old.max(expired).min(too_new), events.len());
        let mut taken = LogsTotals { puts: 1, ..LogsTotals::default() };
        for (timestamp_ms, message) in events.into_iter().take(too_new).skip(from) {
            taken.events += 1;
            taken.billed_bytes += (message.len() + EVENT_OVERHEAD) as u64;
            stored.push(StoredEvent { timestamp_ms, message, ingested_ms: now_ms });
        }
        self.totals.puts += 1;
        self.totals.events += taken.events;
        self.totals.billed_bytes += taken.billed_bytes;
        self.totals.rejected += all as u64 - taken.events;
        let some = |index: usize| (index > 0).then_some(index);
        Ok(LogsReply::Put { too_new_from: (too_new < all).then_some(too_new), too_old_until: some(too_old), expired_until: some(expired) })
    }

    fn create_group(&mut self, name: String, class: String, tags: BTreeMap<String, String>, now_ms: i64) -> Result<LogsReply, ApiError> {
        let legal = |c: char| c.is_ascii_alphanumeric() || "_/.#-".contains(c);
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(legal) || name.starts_with("aws/") {
            return Err(invalid(format!("Value '{name}' at 'logGroupName' failed to satisfy constraint")));
        }
        let class = if class.is_empty() { "STANDARD".to_owned() } else { class };
        if !["STANDARD", "INFREQUENT_ACCESS", "DELIVERY"].contains(&class.as_str()) {
            return Err(invalid(format!("Value '{class}' at 'logGroupClass' failed to satisfy constraint")));
        }
        if self.groups.contains_key(&name) {
            return Err(exists("The specified log group already exists"));
        }
        let view = GroupView { name: name.clone(), retention_days: None, class, tags, created_ms: now_ms };
        self.groups.insert(name, Group { view, streams: BTreeMap::new() });
        Ok(LogsReply::Done)
    }

    fn create_stream(&mut self, group: &str, stream: String) -> Result<LogsReply, ApiError> {
        if stream.is_empty() || stream.chars().count() > NAME_MAX || stream.contains([':', '*']) {
            return Err(invalid(format!("Value '{stream}' at 'logStreamName' failed to satisfy constraint")));
        }
        let streams = &mut self.group(group)?.streams;
        if streams.contains_key(&stream) {
            return Err(exists("The specified log stream already exists"));
        }
        streams.insert(stream, Vec::new());
        Ok(LogsReply::Done)
    }

    fn group(&mut self, name: &str) -> Result<&mut Group, ApiError> {
        self.groups.get_mut(name).ok_or_else(|| ApiError::bad("ResourceNotFoundException", "The specified log group does not exist."))
    }

    // === for tests ===

    pub(super) fn add_group(&mut self, name: &str, now_ms: i64) {
        let view = GroupView { name: name.to_owned(), class: "STANDARD".to_owned(), created_ms: now_ms, ..GroupView::default() };
        self.groups.entry(name.to_owned()).or_insert(Group { view, streams: BTreeMap::new() });
    }

    pub(super) fn add_stream(&mut self, group: &str, stream: &str) {
        if let Some(group) = self.groups.get_mut(group) {
            group.streams.entry(stream.to_owned()).or_default();
        }
    }

    pub(super) fn delete_group(&mut self, name: &str) {
        self.groups.remove(name);
    }

    pub(super) fn events(&self, group: &str, stream: &str) -> Vec<StoredEvent> {
        self.groups.get(group).and_then(|g| g.streams.get(stream)).cloned().unwrap_or_default()
    }

    pub(super) fn group_names(&self) -> Vec<String> {
        self.groups.keys().cloned().collect()
    }

    pub(super) fn stream_names(&self, group: &str) -> Vec<String> {
        self.groups.get(group).map(|g| g.streams.keys().cloned().collect()).unwrap_or_default()
    }

    pub(super) fn view(&self, group: &str) -> Option<GroupView> {
        self.groups.get(group).map(|g| g.view.clone())
    }

    pub(super) fn entity(&self, group: &str, stream: &str) -> Option<Entity> {
        self.entities.get(&(group.to_owned(), stream.to_owned())).cloned().flatten()
    }

    pub(super) fn totals(&self) -> LogsTotals {
        self.totals
    }
}

/// The limits of an entity (PutLogEvents API reference, `Entity`).
fn check_entity(entity: &Entity) -> Result<(), ApiError> {
    const KEYS: [&str; 5] = ["Type", "ResourceType", "Identifier", "Name", "Environment"];
    let fits = |text: &str, most: usize| (1..=most).contains(&text.chars().count());
    let keys = &entity.key_attributes;
    if !(2..=4).contains(&keys.len()) || !keys.iter().all(|(key, value)| KEYS.contains(&key.as_str()) && fits(value, 512)) {
        return Err(invalid(format!("keyAttributes {keys:?} failed to satisfy constraint")));
    }
    let attributes = &entity.attributes;
    if attributes.len() > 10 || !attributes.iter().all(|(key, value)| fits(key, 256) && fits(value, 512)) {
        return Err(invalid(format!("attributes {attributes:?} failed to satisfy constraint")));
    }
    Ok(())
}

/// The rules that refuse a whole batch.
fn check_batch(events: &[(i64, String)], now_ms: i64) -> Result<(), ApiError> {
    if events.is_empty() || events.len() > BATCH_EVENTS {
        return Err(invalid(format!("{} log events: a batch holds 1 to {BATCH_EVENTS}", events.len())));
    }
    let mut bytes = 0;
    for (timestamp, message) in events {
        if *timestamp < 0 {
            return Err(invalid("Log event timestamp must not be negative".to_owned()));
        }
        if message.is_empty() {
            return Err(invalid("Log event message must not be empty".to_owned()));
        }
        let size = message.len() + EVENT_OVERHEAD;
        if size > EVENT_BYTES {
            return Err(invalid(format!("Log event too large: {size} bytes exceeds limit of {EVENT_BYTES}")));
        }
        bytes += size;
    }
    if bytes > BATCH_BYTES {
        return Err(invalid(format!("Upload too large: {bytes} bytes exceeds limit of {BATCH_BYTES}")));
    }
    if !events.is_sorted_by_key(|(timestamp, _)| *timestamp) {
        return Err(invalid("Log events in a single PutLogEvents request must be in chronological order.".to_owned()));
    }
    let mut valid = events.iter().map(|(at, _)| *at).filter(|at| (now_ms - PAST_MS..=now_ms + FUTURE_MS).contains(at));
    if let Some(first) = valid.next()
        && valid.next_back().is_some_and(|last| last - first > SPAN_MS)
    {
        return Err(invalid("The batch of log events in a single PutLogEvents request cannot span more than 24 hours.".to_owned()));
    }
    Ok(())
}

fn page<T>(mut items: Vec<T>, limit: usize, token: Option<&str>) -> Result<(Vec<T>, Option<String>), ApiError> {
    if !(1..=50).contains(&limit) {
        return Err(invalid(format!("Value '{limit}' at 'limit' failed to satisfy constraint")));
    }
    let start = match token {
        None => 0,
        Some(token) => {
            token.parse::<usize>().ok().filter(|s| *s <= items.len()).ok_or_else(|| invalid("nextToken is invalid".to_owned()))?
        }
    };
    let end = start + limit;
    let next = (end < items.len()).then(|| end.to_string());
    items.truncate(end);
    items.drain(..start);
    Ok((items, next))
}

fn invalid(message: String) -> ApiError {
    ApiError::bad("InvalidParameterException", message)
}

fn exists(message: &str) -> ApiError {
    ApiError::bad("ResourceAlreadyExistsException", message)
}

fn no_stream() -> ApiError {
    ApiError::bad("ResourceNotFoundException", "The specified log stream does not exist.")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_790_000_000_000;
    const HOUR: i64 = 3_600_000;

    fn state() -> LogsState {
        let mut state = LogsState::default();
        state.call(LogsCall::CreateLogGroup { group: "/g".into(), class: String::new(), tags: BTreeMap::new() }, NOW).unwrap();
        state.call(LogsCall::CreateLogStream { group: "/g".into(), stream: "s".into() }, NOW).unwrap();
        state
    }

    fn put(state: &mut LogsState, events: Vec<(i64, String)>) -> Result<LogsReply, ApiError> {
        state.call(LogsCall::PutLogEvents { group: "/g".into(), stream: "s".into(), events, emf: false, entity: None }, NOW)
    }

    #[test]
    fn a_batch_just_legal_is_taken_and_one_byte_more_is_not() {
        let full = |more: usize| {
            let mut events = vec![(NOW, "x".repeat(1_000)); 1_021];
            let used: usize = events.iter().map(|(_, m)| m.len() + EVENT_OVERHEAD).sum();
            events.push((NOW, "y".repeat(BATCH_BYTES - used - EVENT_OVERHEAD + more)));
            events
        };
        assert!(put(&mut state(), full(0)).is_ok());
        assert_eq!(put(&mut state(), full(1)).unwrap_err().code, "InvalidParameterException");
        assert!(put(&mut state(), vec![(NOW, "x".into()); BATCH_EVENTS]).is_ok());
        assert!(put(&mut state(), vec![(NOW, "x".into()); BATCH_EVENTS + 1]).is_err());
        assert!(put(&mut state(), vec![(NOW, "x".repeat(EVENT_BYTES - EVENT_OVERHEAD))]).is_ok());
        assert!(put(&mut state(), vec![(NOW, "x".repeat(EVENT_BYTES - EVENT_OVERHEAD + 1))]).is_err());
    }

    #[test]
    fn order_span_and_emptiness_refuse_the_whole_batch() {
        let batch = |times: &[i64]| times.iter().map(|t| (NOW + t, "x".to_owned())).collect::<Vec<_>>();
        assert!(put(&mut state(), batch(&[0, 0, 1])).is_ok());
        assert!(put(&mut state(), batch(&[1, 0])).is_err());
        assert!(put(&mut state(), batch(&[-24 * HOUR, 0])).is_ok());
        assert!(put(&mut state(), batch(&[-24 * HOUR - 1, 0])).is_err());
        assert!(put(&mut state(), Vec::new()).is_err());
        assert!(put(&mut state(), vec![(NOW, String::new())]).is_err());
    }

    #[test]
    fn old_new_and_expired_events_are_rejected_one_by_one() {
        let mut state = state();
        let times = [-14 * 24 * HOUR - 1, -2 * HOUR, 0, 2 * HOUR, 2 * HOUR + 1];
        let events = times.iter().map(|t| (NOW + t, format!("{t}"))).collect::<Vec<_>>();
        let reply = put(&mut state, events.clone()).unwrap();
        assert_eq!(reply, LogsReply::Put { too_new_from: Some(4), too_old_until: Some(1), expired_until: None });
        assert_eq!(state.events("/g", "s").len(), 3);
        assert_eq!(state.totals(), LogsTotals { puts: 1, events: 3, billed_bytes: 94, rejected: 2, emf_puts: 0 });
        state.call(LogsCall::PutRetentionPolicy { group: "/g".into(), days: 1 }, NOW).unwrap();
        let reply = put(&mut state, vec![(NOW - 25 * HOUR, "x".into()), (NOW - 24 * HOUR, "y".into())]).unwrap();
        assert_eq!(reply, LogsReply::Put { too_new_from: None, too_old_until: None, expired_until: Some(1) });
    }

    #[test]
    fn names_are_checked_and_what_is_missing_is_named() {
        let mut state = state();
        let mut group = |name: &str| {
            let call = LogsCall::CreateLogGroup { group: name.to_owned(), class: String::new(), tags: BTreeMap::new() };
            state.call(call, NOW).err().map(|e| e.code)
        };
        assert_eq!(group("/aws/containerinsights/c/application"), None);
        assert_eq!(group("/g").as_deref(), Some("ResourceAlreadyExistsException"));
        for bad in ["", "aws/x", "with space", "colon:"] {
            assert_eq!(group(bad).as_deref(), Some("InvalidParameterException"), "{bad:?}");
        }
        let missing =
            LogsCall::PutLogEvents { group: "/none".into(), stream: "s".into(), events: vec![(NOW, "x".into())], emf: false, entity: None };
        assert!(state.call(missing, NOW).unwrap_err().message.contains("log group"));
        let missing =
            LogsCall::PutLogEvents { group: "/g".into(), stream: "none".into(), events: vec![(NOW, "x".into())], emf: false, entity: None };
        assert!(state.call(missing, NOW).unwrap_err().message.contains("log stream"));
        let retention = LogsCall::PutRetentionPolicy { group: "/g".into(), days: 2 };
        assert_eq!(state.call(retention, NOW).unwrap_err().code, "InvalidParameterException");
    }

    #[test]
    fn an_entity_beyond_its_limits_is_refused() {
        let entity = |keys: &[(&str, &str)], attributes: usize| Entity {
            key_attributes: keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            attributes: (0..attributes).map(|number| (number.to_string(), "v".to_owned())).collect(),
        };
        let good = [("Type", "Service"), ("Name", "n")];
        assert_eq!(check_entity(&entity(&good, 10)), Ok(()));
        for (keys, attributes) in
            [(&good[..1], 0), (&good[..], 11), (&[("Type", "Service"), ("Name", "")], 0), (&[("Type", "Service"), ("name", "n")], 0)]
        {
            assert!(check_entity(&entity(keys, attributes)).is_err(), "{keys:?} {attributes}");
        }
    }
}
