//! The settings file of log shipping: YAML, strict, over the settings that environment variables make.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use regex_lite::Regex;
use serde::{Deserialize, Serialize};

use super::journal::JournalSettings;
use super::multiline::{Rule, UserRule};
use super::parser::{Format, Kind, Parser};
use super::quota::Quota;
use super::record::{Layout, Merge};
use super::route::{Template, TemplateError};
use super::settings::{HostFiles, LogSettings, Oversize, ReadFrom, Redaction, Route};

/// The file. What it does not say stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct LogFile {
    /// Layout of events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record: Option<Layout>,
    /// JSON lines: `off`, `top`, or `{under: KEY}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merge: Option<Merge>,
    /// `log` stays beside its merged object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_log: Option<bool>,
    /// The pod's labels in each record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<bool>,
    /// The pod's annotations in each record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<bool>,
    /// Follow `fluentbit.io/exclude`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub honour_exclude: Option<bool>,
    /// Follow `fluentbit.io/parser`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub honour_parser: Option<bool>,
    /// Tell CloudWatch which workload a stream is of (Fluent Bit's `add_entity`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entity: Option<bool>,
    /// Template of the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Template of the group where a value of `group` is not there; without it such a value is `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_else: Option<String>,
    /// Template of the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// Template of the stream where a value of `stream` is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_else: Option<String>,
    /// Days that a group made here keeps its events; 0 is for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention_days: Option<u32>,
    /// Class of a group made here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<GroupClass>,
    /// Tags of a group made here.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// File names to read, as globs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// File names to leave out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Where files begin that were there before the agent: `head` or `tail`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_from: Option<Begin>,
    /// Directory of Fluent Bit's databases, where that is not `/var/fluent-bit/state`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fluent_bit_state: Option<String>,
    /// How long a line may wait for company.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_seconds: Option<f64>,
    /// Built-in rules for stack traces, in order of preference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub multiline: Vec<String>,
    /// Rules of the user's own, after the built-in ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub multiline_rules: Vec<RuleEntry>,
    /// How long a group of lines waits for its next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiline_flush_seconds: Option<f64>,
    /// Parsers that pods may name, besides the built-in ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parsers: Vec<ParserEntry>,
    /// Text that never leaves the node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub redact: Vec<RedactEntry>,
    /// How fast namespaces are read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<QuotaEntry>,
    /// Files that go elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routes: Option<Vec<RouteEntry>>,
    /// Log files of the node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub host_files: Vec<HostEntry>,
    /// The node's journal, in Container Insights' streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalEntry>,
    /// Events larger than the service takes: `split` or `truncate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oversize: Option<OversizeWord>,
    /// Compress what is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gzip: Option<bool>,
    /// Events are metric documents (`json/emf`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emf: Option<bool>,
    /// Disk space that deleted files may keep while they are read, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_mib: Option<u64>,
}

/// Class of a log group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the service's own words")]
pub enum GroupClass {
    Standard,
    InfrequentAccess,
}

/// Where old files begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "as ReadFrom")]
pub enum Begin {
    Head,
    Tail,
}

/// What becomes of large events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "as Oversize")]
pub enum OversizeWord {
    Split,
    Truncate,
}

/// A multiline rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RuleEntry {
    /// For messages.
    pub name: String,
    /// First line of a group.
    pub start: String,
    /// Its following lines; without it every line that does not start one.
    #[serde(default, rename = "continue", skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A parser.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ParserEntry {
    /// What annotations call it.
    pub name: String,
    /// Named groups; without it the format says how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// `json`, `logfmt` or `regex`.
    pub format: String,
    /// Members that are `integer`, `float` or `bool`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub types: BTreeMap<String, String>,
}

/// A replacement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RedactEntry {
    /// What to find.
    pub pattern: String,
    /// What stands there instead.
    #[serde(default = "masked")]
    pub replace: String,
}

fn masked() -> String {
    "[REDACTED]".to_owned()
}

/// A quota.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QuotaEntry {
    /// Namespaces, as a glob.
    pub namespace: String,
    /// Bytes in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Lines in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines_per_second: Option<u64>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RouteEntry {
    /// File names, as globs.
    pub files: Vec<String>,
    /// Template of the group.
    pub group: String,
    /// Template of the stream.
    pub stream: String,
    /// Template of the group where a value of `group` is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_else: Option<String>,
    /// Template of the stream where a value of `stream` is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_else: Option<String>,
    /// False: without the pod's metadata, and without merging.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<bool>,
    /// With the node's zone and instance, as Fluent Bit's filter `aws` has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<bool>,
}

/// Files of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostEntry {
    /// A path; its last part may be a glob.
    pub path: String,
    /// Template of the group.
    #[serde(default = "host_group")]
    pub group: String,
    /// Template of the stream.
    #[serde(default = "host_stream")]
    pub stream: String,
}

/// The node's journal. What it does not say is as Container Insights has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct JournalEntry {
    /// Directories of journals, instead of `/var/log/journal` and `/run/log/journal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirs: Option<Vec<String>>,
    /// The streams dmesg, messages and secure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<bool>,
    /// Units with a stream in the dataplane group, instead of docker, containerd and kubelet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub units: Option<Vec<String>>,
    /// Where files begin that were there before the agent: `tail` unless this says `head`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_from: Option<Begin>,
}

impl JournalEntry {
    fn settings(&self) -> Result<JournalSettings, LogFileError> {
        let mut settings = JournalSettings::default();
        set(&mut settings.dirs, self.dirs.clone());
        set(&mut settings.host, self.host);
        set(&mut settings.units, self.units.clone());
        set(&mut settings.read_from, self.read_from.map(ReadFrom::from));
        if let Some(dir) = settings.dirs.iter().find(|dir| !dir.starts_with('/')) {
            return Err(value("journal, dirs", dir.clone(), "use absolute paths"));
        }
        if let Some(unit) = settings.units.iter().find(|unit| !unit.contains('.')) {
            return Err(value("journal, units", unit.clone(), "name the unit whole, as kubelet.service"));
        }
        if !settings.host && settings.units.is_empty() {
            return Err(value("journal", "host: false".to_owned(), "without units there is nothing to ship; leave the journal out"));
        }
        Ok(settings)
    }
}

impl From<Begin> for ReadFrom {
    fn from(begin: Begin) -> Self {
        match begin {
            Begin::Head => Self::Head,
            Begin::Tail => Self::Tail,
        }
    }
}

fn host_group() -> String {
    "/aws/containerinsights/{cluster}/host".to_owned()
}

fn host_stream() -> String {
    "{node}.host.{file}".to_owned()
}

/// Why a settings file is refused.
#[derive(Debug, thiserror::Error)]
pub enum LogFileError {
    /// Not YAML, or not of this shape.
    #[error("not a settings file of log shipping: {0}")]
    Shape(String),
    /// A pattern that is none.
    #[error("{place}: {pattern:?} is no regular expression: {why}")]
    Pattern {
        /// Which setting.
        place: String,
        /// Its text.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// A template that cannot be read.
    #[error("{place}")]
    Template {
        /// Which setting.
        place: &'static str,
        /// What is wrong with it.
        #[source]
        source: TemplateError,
    },
    /// A value that has no meaning.
    #[error("{place}: {value:?} is not possible: {remedy}")]
    Value {
        /// Which setting.
        place: String,
        /// Its value.
        value: String,
        /// What is.
        remedy: &'static str,
    },
}

impl LogFile {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Not YAML, unknown settings, values of another type.
    pub fn parse(text: &str) -> Result<Self, LogFileError> {
        serde_saphyr::from_str(text).map_err(|error| LogFileError::Shape(error.to_string()))
    }

    /// Puts what the file says over `settings`.
    ///
    /// # Errors
    /// Patterns, templates and values that cannot be; settings of a layout that has no place for them.
    pub fn apply(&self, settings: LogSettings) -> Result<LogSettings, LogFileError> {
        let mut settings = match self.record {
            Some(layout) if layout != settings.record.layout => LogSettings {
                group: settings.group,
                group_spec: settings.group_spec,
                flush: settings.flush,
                routes: settings.routes,
                node: settings.node,
                fluent_bit_state: settings.fluent_bit_state,
                ..LogSettings::container_insights(layout)
            },
            _ => settings,
        };
        let record = &mut settings.record;
        set(&mut record.merge, self.merge.clone());
        set(&mut record.keep_log, self.keep_log);
        set(&mut record.labels, self.labels);
        set(&mut record.annotations, self.annotations);
        let fills = [self.merge.is_some(), self.keep_log.is_some(), self.labels.is_some(), self.annotations.is_some()];
        if record.layout != Layout::FluentBit && fills.contains(&true) {
            let remedy = "merge, keep-log, labels and annotations fill Fluent Bit's record; the others have no place for them";
            return Err(value("record", format!("{:?}", record.layout), remedy));
        }
        set(&mut settings.honour_exclude, self.honour_exclude);
        set(&mut settings.honour_parser, self.honour_parser);
        set(&mut settings.entity, self.entity.map(|on| on.then(String::new)));
        set(&mut settings.emf, self.emf);
        set(&mut settings.compress, self.gzip);
        set(&mut settings.group, template("group", self.group.as_deref())?);
        set(&mut settings.stream, template("stream", self.stream.as_deref())?);
        settings.group = or_else(settings.group, "group-else", self.group_else.as_deref())?;
        settings.stream = or_else(settings.stream, "stream-else", self.stream_else.as_deref())?;
        if let Some(days) = self.retention_days {
            settings.group_spec.retention_days = (days > 0).then_some(days);
        }
        match self.class {
            Some(GroupClass::Standard) => "STANDARD".clone_into(&mut settings.group_spec.class),
            Some(GroupClass::InfrequentAccess) => "INFREQUENT_ACCESS".clone_into(&mut settings.group_spec.class),
            None => {}
        }
        settings.group_spec.tags.extend(self.tags.clone());
        settings.include.extend(self.include.iter().cloned());
        settings.exclude.extend(self.exclude.iter().cloned());
        set(&mut settings.read_from, self.read_from.map(ReadFrom::from));
        if let Some(dir) = &self.fluent_bit_state {
            if !dir.starts_with('/') {
                return Err(value("fluent-bit-state", dir.clone(), "use an absolute path"));
            }
            settings.fluent_bit_state = dir.into();
        }
        set(
            &mut settings.oversize,
            self.oversize.map(|word| match word {
                OversizeWord::Split => Oversize::Split,
                OversizeWord::Truncate => Oversize::Truncate,
            }),
        );
        set(&mut settings.flush, seconds("flush-seconds", self.flush_seconds)?);
        if let Some(wait) = seconds("multiline-flush-seconds", self.multiline_flush_seconds)? {
            settings.bounds.group_ms = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        }
        if let Some(mib) = self.held_mib {
            settings.held_bytes = mib.saturating_mul(1 << 20);
        }
        self.apply_rules(&mut settings)?;
        self.apply_places(&mut settings)?;
        Ok(settings)
    }

    fn apply_rules(&self, settings: &mut LogSettings) -> Result<(), LogFileError> {
        if !self.multiline.is_empty() || !self.multiline_rules.is_empty() {
            let mut rules = Vec::new();
            for name in &self.multiline {
                let rule = Rule::built_in(name);
                rules.push(rule.map_err(|_| value("multiline", name.clone(), "java, go, python and ruby are built in"))?);
            }
            for entry in &self.multiline_rules {
                let place = format!("multiline-rules, {}", entry.name);
                let next = entry.next.as_deref().map(|next| pattern(&place, next)).transpose()?;
                rules.push(Rule::User(UserRule { name: entry.name.clone(), start: pattern(&place, &entry.start)?, next }));
            }
            settings.rules = rules.into();
        }
        let mut parsers: Vec<Parser> = settings.parsers.to_vec();
        for entry in &self.parsers {
            let parser = entry.parser()?;
            parsers.retain(|known| known.name != parser.name);
            parsers.push(parser);
        }
        settings.parsers = parsers.into();
        let redactions = self.redact.iter().map(|entry| {
            let found = pattern("redact", &entry.pattern)?;
            if found.is_match("") {
                return Err(value("redact", entry.pattern.clone(), "a pattern that matches nothing at all would match everywhere"));
            }
            Ok(Redaction { pattern: found, replacement: entry.replace.clone() })
        });
        settings.redactions =
            settings.redactions.iter().cloned().map(Ok).chain(redactions).collect::<Result<Vec<_>, _>>().map(Arc::from)?;
        for entry in &self.quotas {
            if [entry.bytes_per_second, entry.lines_per_second].contains(&Some(0)) {
                return Err(value("quotas", entry.namespace.clone(), "a rate of 0 never reads; leave the files out with exclude"));
            }
            settings.quotas.push(Quota {
                namespace: entry.namespace.clone(),
                bytes_per_second: entry.bytes_per_second,
                lines_per_second: entry.lines_per_second,
            });
        }
        Ok(())
    }

    fn apply_places(&self, settings: &mut LogSettings) -> Result<(), LogFileError> {
        if let Some(routes) = &self.routes {
            let read = routes.iter().map(|entry| {
                let group = or_else(place("routes", &entry.group)?, "routes", entry.group_else.as_deref())?;
                let stream = or_else(place("routes", &entry.stream)?, "routes", entry.stream_else.as_deref())?;
                let (kubernetes, node) = (entry.kubernetes.unwrap_or(true), entry.node.unwrap_or(false));
                Ok(Route { files: entry.files.clone(), group, stream, kubernetes, node })
            });
            settings.routes = read.collect::<Result<_, LogFileError>>()?;
        }
        if let Some(journal) = &self.journal {
            settings.journal = Some(journal.settings()?);
        }
        for entry in &self.host_files {
            if !entry.path.starts_with('/')
                || entry.path.rsplit_once('/').is_none_or(|(dir, name)| name.is_empty() || dir.contains(['*', '?']))
            {
                return Err(value("host-files", entry.path.clone(), "use an absolute path; only its last part may be a glob"));
            }
            let (group, stream) = (place("host-files", &entry.group)?, place("host-files", &entry.stream)?);
            settings.host_files.push(HostFiles { path: entry.path.clone(), group, stream });
        }
        Ok(())
    }
}

impl ParserEntry {
    fn parser(&self) -> Result<Parser, LogFileError> {
        let place = format!("parsers, {}", self.name);
        let format = match (self.format.as_str(), &self.regex) {
            ("json", None) => Format::Json,
            ("logfmt", None) => Format::Logfmt,
            ("regex", Some(regex)) => Format::Regex(pattern(&place, regex)?),
            _ => return Err(value(&place, self.format.clone(), "json and logfmt without a regex, or regex with one")),
        };
        let types = self.types.iter().map(|(member, kind)| {
            let kind = Kind::named(kind).ok_or_else(|| value(&place, kind.clone(), "types are integer, float, bool and string"))?;
            Ok((member.clone(), kind))
        });
        Ok(Parser { name: self.name.clone(), format, types: types.collect::<Result<_, LogFileError>>()? })
    }
}

fn set<T>(place: &mut T, said: Option<T>) {
    if let Some(said) = said {
        *place = said;
    }
}

fn value(place: &str, value: String, remedy: &'static str) -> LogFileError {
    LogFileError::Value { place: place.to_owned(), value, remedy }
}

fn seconds(place: &str, said: Option<f64>) -> Result<Option<Duration>, LogFileError> {
    let Some(said) = said else { return Ok(None) };
    if !(0.05..=3600.0).contains(&said) {
        return Err(value(place, said.to_string(), "use 0.05 to 3600 seconds"));
    }
    Ok(Some(Duration::from_secs_f64(said)))
}

fn pattern(place: &str, text: &str) -> Result<Regex, LogFileError> {
    Regex::new(text).map_err(|error| LogFileError::Pattern { place: place.to_owned(), pattern: text.to_owned(), why: error.to_string() })
}

fn place(place: &'static str, text: &str) -> Result<Template, LogFileError> {
    Template::parse(text).map_err(|source| LogFileError::Template { place, source })
}

fn or_else(first: Template, name: &'static str, text: Option<&str>) -> Result<Template, LogFileError> {
    Ok(match template(name, text)? {
        Some(otherwise) => first.or_else(otherwise),
        None => first,
    })
}

fn template(name: &'static str, text: Option<&str>) -> Result<Option<Template>, LogFileError> {
    text.map(|text| place(name, text)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str) -> Result<LogSettings, LogFileError> {
        LogFile::parse(text)?.apply(LogSettings::new(Layout::FluentBit))
    }

    #[test]
    fn every_setting_has_its_effect() {
        let settings = applied(
            r#"
merge: {under: log_processed}
keep-log: false
labels: true
annotations: true
honour-exclude: false
honour-parser: false
entity: true
group: "/x/{namespace}"
stream: "{pod}"
retention-days: 7
class: INFREQUENT_ACCESS
tags: {team: a}
include: ["*_shop_*"]
exclude: ["noisy-*"]
read-from: tail
fluent-bit-state: /var/log
flush-seconds: 2.5
multiline: [java]
multiline-rules: [{name: mine, start: '^\d', continue: '^\s'}]
multiline-flush-seconds: 1
parsers: [{name: mine, format: regex, regex: '(?<n>\d+)', types: {n: integer}}]
redact: [{pattern: 'password=\S+'}, {pattern: 'x(y)', replace: '$1'}]
quotas: [{namespace: "dev-*", bytes-per-second: 1000, lines-per-second: 10}]
routes: [{files: ["kube-*"], group: g, stream: s}, {files: [b], group: g, stream: s, kubernetes: false, node: true}]
host-files: [{path: /var/log/*.log}]
oversize: truncate
gzip: false
emf: true
held-mib: 5
"#,
        )
        .unwrap();
        assert_eq!(settings.record.merge, Merge::Under("log_processed".into()));
        assert_eq!((settings.record.keep_log, settings.record.labels, settings.record.annotations), (false, true, true));
        assert_eq!((settings.honour_exclude, settings.honour_parser, settings.emf, settings.compress), (false, false, true, false));
        assert_eq!(settings.entity.as_deref(), Some(""), "the agent fills in its instance");
        assert_eq!((String::from(settings.group), String::from(settings.stream)), ("/x/{namespace}".into(), "{pod}".into()));
        assert_eq!((settings.group_spec.retention_days, settings.group_spec.class.as_str()), (Some(7), "INFREQUENT_ACCESS"));
        assert_eq!(settings.group_spec.tags["team"], "a");
        assert_eq!((settings.include.len(), settings.exclude.len(), settings.read_from), (1, 1, ReadFrom::Tail));
        assert_eq!(settings.fluent_bit_state, std::path::Path::new("/var/log"));
        assert_eq!((settings.flush, settings.bounds.group_ms), (Duration::from_millis(2500), 1000));
        assert_eq!((settings.rules.len(), settings.redactions.len(), settings.quotas.len()), (2, 2, 1));
        assert_eq!(settings.redactions[0].replacement, "[REDACTED]");
        assert!(settings.parsers.iter().any(|parser| parser.name == "mine" && parser.object(b"7").unwrap() == r#"{"n":7}"#));
        assert_eq!(
            (settings.routes.len(), settings.host_files.len(), settings.oversize, settings.held_bytes),
            (2, 1, Oversize::Truncate, 5 << 20)
        );
        assert_eq!(settings.routes.iter().map(|route| (route.kubernetes, route.node)).collect::<Vec<_>>(), [(true, false), (false, true)]);
        let fluent_bit = LogSettings { fluent_bit_state: "/state".into(), ..LogSettings::new(Layout::FluentBit) };
        let compact = LogFile::parse("record: compact").unwrap().apply(fluent_bit).unwrap();
        assert_eq!(compact.fluent_bit_state, std::path::Path::new("/state"), "of no layout");
        assert_eq!(
            (compact.record.layout, String::from(compact.stream)),
            (Layout::Compact, super::super::route::COMPACT_STREAM.to_owned())
        );
        assert_eq!(applied("{}").unwrap().rules.len(), 0);
    }

    /// What the file does not say is the agent's default of the layout that counts.
    #[test]
    fn the_layouts_own_defaults() {
        let of = |variable: Layout, text: &str| {
            let settings = LogFile::parse(text).unwrap().apply(LogSettings::container_insights(variable)).unwrap();
            (settings.record.merge, settings.honour_exclude, settings.honour_parser)
        };
        let container_insights = (Merge::Under("log_processed".into()), false, true);
        assert_eq!(of(Layout::FluentBit, "flush-seconds: 2"), container_insights);
        assert_eq!(of(Layout::Compact, "record: fluent-bit"), container_insights);
        assert_eq!(of(Layout::FluentBit, "merge: off\nhonour-exclude: true"), (Merge::Off, true, true));
        for layout in ["compact", "raw"] {
            assert_eq!(of(Layout::FluentBit, &format!("record: {layout}")), (Merge::Off, true, true), "{layout}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, part) in [
            ("mergee: off", "mergee"),
            ("record: compact\nlabels: true", "labels"),
            ("multiline: [perl]", "perl"),
            ("redact: [{pattern: '('}]", "redact"),
            ("redact: [{pattern: 'x*'}]", "everywhere"),
            ("group: '{pot}'", "group"),
            ("stream-else: '{pot}'", "stream-else"),
            ("flush-seconds: 0", "flush-seconds"),
            ("quotas: [{namespace: a, bytes-per-second: 0}]", "quotas"),
            ("host-files: [{path: /var/*/x}]", "host-files"),
            ("host-files: [{path: var/x}]", "host-files"),
            ("fluent-bit-state: state", "fluent-bit-state"),
            ("parsers: [{name: p, format: regex}]", "parsers, p"),
            ("parsers: [{name: p, format: json, types: {a: date}}]", "date"),
            ("routes: [{files: [a], group: '{', stream: s}]", "routes"),
            ("- a", "settings file"),
        ] {
            let error = applied(text).unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}
