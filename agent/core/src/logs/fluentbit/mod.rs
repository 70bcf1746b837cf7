//! From a Fluent Bit configuration to ours: what has a counterpart, what is not needed here, and what is missing.

mod read;
mod sqlite;
mod state;
mod templates;

use std::collections::BTreeMap;

use regex_lite::Regex;
use serde_json::Value;

pub use read::{Find, ReadError, Section, sections};
pub use sqlite::SqliteError;
pub use state::{TailFiles, chunk_may_be_of};

use super::config::{Begin, GroupClass, HostEntry, JournalEntry, LogFile, ParserEntry, RouteEntry, RuleEntry};
use super::names::glob;
use super::record::{Layout, Merge};
use super::settings::FLUENT_BIT_STATE;
use crate::yaml::{comment, printable};
use templates::Names;

/// What became of the configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Migration {
    /// The settings file.
    pub file: LogFile,
    /// Environment variables of the agent.
    pub environment: BTreeMap<String, String>,
    /// What has no counterpart, and what is to be looked at: section and key, and why.
    pub missing: Vec<(String, String)>,
    /// What needs no counterpart.
    pub needless: Vec<(String, &'static str)>,
}

impl Migration {
    fn miss(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.missing.push((what.into(), why.into()));
    }

    /// For people and for the agent: YAML, with what has no counterpart as comments.
    pub fn to_yaml(&self) -> String {
        let mut out = String::from(
            "# Settings of log shipping: telemetry.logConfig of the chart (--set-file), or mount this file and name it in STANCHION_LOG_CONFIG.\n",
        );
        for (name, value) in &self.environment {
            comment(&mut out, &format!("environment: {name}={value}"));
        }
        for (what, why) in &self.missing {
            comment(&mut out, &format!("NO COUNTERPART {what}: {why}"));
        }
        for (what, why) in &self.needless {
            comment(&mut out, &format!("not needed {what}: {why}"));
        }
        let value = serde_json::to_value(&self.file).expect("settings are JSON");
        match &value {
            Value::Object(members) if members.is_empty() => out.push_str("{}\n"),
            // JSON is YAML: one setting a line, as people read it.
            Value::Object(members) => members.iter().for_each(|(name, value)| yaml(&mut out, name, value)),
            _ => {}
        }
        out
    }
}

fn yaml(out: &mut String, name: &str, value: &Value) {
    match value {
        Value::Array(items) if items.iter().any(Value::is_object) => {
            out.push_str(&format!("{name}:\n"));
            items.iter().for_each(|item| out.push_str(&format!("  - {}\n", printable(item))));
        }
        value => out.push_str(&format!("{name}: {}\n", printable(value))),
    }
}

/// Translates sections.
pub fn migrate(sections: &[Section]) -> Migration {
    let mut migration = Migration::default();
    let of = |kind: &str| sections.iter().filter(move |section| section.kind == kind).cloned().collect::<Vec<_>>();
    let outputs = of("output");
    of("service").iter().for_each(|service| self::service(&mut migration, service));
    of("parser").iter().for_each(|parser| self::parser(&mut migration, parser));
    let rules = of("multiline_parser");
    let filters = of("filter");
    for filter in &filters {
        self::filter(&mut migration, filter, &rules);
    }
    let mut main = false;
    let inputs = of("input");
    for input in &inputs {
        let others: Vec<&str> = inputs.iter().filter(|other| *other != input).filter_map(|other| other.get("path")).collect();
        let around = Around { others: &others, filters: &filters, outputs: &outputs, rules: &rules };
        self::input(&mut migration, input, &around, &mut main);
    }
    if main {
        defaults(&mut migration.file);
    }
    for output in &outputs {
        if !is_cloudwatch(output) {
            migration.miss(format!("[OUTPUT] {}", output.name()), "events go to CloudWatch Logs, standard output or a file");
        }
    }
    migration
}

/// What the filter does not do unless it says so, and the agent does.
fn defaults(file: &mut LogFile) {
    file.honour_exclude.get_or_insert(false);
    file.honour_parser.get_or_insert(false);
    if file.record != Some(Layout::Raw) {
        file.merge.get_or_insert(Merge::Off);
    }
}

fn is_cloudwatch(output: &Section) -> bool {
    matches!(output.name(), "cloudwatch_logs" | "cloudwatch")
}

fn truth(text: &str) -> bool {
    matches!(text.to_ascii_lowercase().as_str(), "on" | "true" | "yes")
}

/// A number of which `a_second` make a second, as the nearest that our settings take; `None` for what is no finite number.
fn seconds(text: &str, a_second: f64) -> Option<f64> {
    text.parse::<f64>().ok().filter(|number| number.is_finite()).map(|number| (number / a_second).clamp(0.05, 3600.0))
}

fn service(migration: &mut Migration, service: &Section) {
    for (key, value) in &service.properties {
        match key.as_str() {
            "flush" => match seconds(value, 1.0) {
                Some(flush) => migration.file.flush_seconds = Some(flush),
                None => migration.miss(format!("[SERVICE] flush {value}"), "not a number of seconds"),
            },
            "grace" => migration
                .needless
                .push((format!("[SERVICE] grace {value}"), "last lines are sent for ten seconds; what is left is read at the next start")),
            "log_level" => migration.needless.push((format!("[SERVICE] log_level {value}"), "AWS_VPC_K8S_CNI_LOGLEVEL sets the agent's")),
            "parsers_file" | "plugins_file" | "daemon" => {}
            key if key.starts_with("http_") || key.starts_with("hc_") || key == "health_check" => {
                migration.needless.push((format!("[SERVICE] {key}"), "metrics and health are served on port 61678"));
            }
            key if key.starts_with("storage.") || key.starts_with("scheduler.") => {
                migration.needless.push((format!("[SERVICE] {key}"), "the log files are the buffer, and nothing is given up"));
            }
            key => migration.miss(format!("[SERVICE] {key} {value}"), "no such setting"),
        }
    }
}

fn parser(migration: &mut Migration, section: &Section) {
    let name = section.name().to_owned();
    if matches!(name.as_str(), "docker" | "cri" | "containerd") {
        return migration.needless.push((format!("[PARSER] {name}"), "lines of both runtimes are always understood"));
    }
    let format = section.get("format").unwrap_or_default().to_ascii_lowercase();
    let entry = match format.as_str() {
        "json" | "logfmt" => ParserEntry { name: name.clone(), regex: None, format, types: types(section) },
        "regex" => {
            let regex = section.get("regex").unwrap_or_default().trim_matches('/').to_owned();
            if let Err(error) = Regex::new(&regex) {
                return migration.miss(format!("[PARSER] {name}"), format!("its pattern needs another engine: {error}"));
            }
            ParserEntry { name: name.clone(), regex: Some(regex), format, types: types(section) }
        }
        other => return migration.miss(format!("[PARSER] {name}"), format!("no format {other:?}")),
    };
    if section.get("time_key").is_some() {
        migration.needless.push((format!("[PARSER] {name} time_key"), "an event has the runtime's time; the parsed one stays a member"));
    }
    migration.file.parsers.push(entry);
}

fn types(section: &Section) -> BTreeMap<String, String> {
    let pairs = section.get("types").unwrap_or_default().split_whitespace().filter_map(|pair| pair.split_once(':'));
    pairs.filter(|(_, kind)| super::parser::Kind::named(kind).is_some()).map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// Names of multiline parsers: built in here, the user's own, or those of the runtimes.
fn multiline(migration: &mut Migration, names: &str, rules: &[Section]) {
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match name {
            "docker" | "cri" => {}
            "java" | "go" | "python" | "ruby" => {
                if !migration.file.multiline.iter().any(|known| known == name) {
                    migration.file.multiline.push(name.to_owned());
                }
            }
            _ => match rules.iter().find(|rule| rule.name() == name) {
                Some(rule) => user_rule(migration, rule),
                None => migration.miss(format!("multiline.parser {name}"), "no such parser in this configuration"),
            },
        }
    }
}

fn user_rule(migration: &mut Migration, section: &Section) {
    let name = section.name().to_owned();
    let (mut start, mut next) = (Vec::new(), Vec::new());
    for (_, rule) in section.properties.iter().filter(|(key, _)| key == "rule") {
        let parts: Vec<&str> = rule.split('"').skip(1).step_by(2).collect();
        let [state, pattern, _] = parts[..] else {
            migration.miss(format!("[MULTILINE_PARSER] {name} rule {rule}"), "not of three parts in quotes");
            continue;
        };
        let pattern = pattern.strip_prefix('/').and_then(|pattern| pattern.strip_suffix('/')).unwrap_or(pattern);
        if let Err(error) = Regex::new(pattern) {
            migration.miss(format!("[MULTILINE_PARSER] {name}"), format!("its pattern needs another engine: {error}"));
            return;
        }
        if state == "start_state" { start.push(pattern.to_owned()) } else { next.push(pattern.to_owned()) }
    }
    let joined = |patterns: Vec<String>| match patterns.len() {
        1 => patterns.into_iter().next().unwrap_or_default(),
        _ => patterns.iter().map(|pattern| format!("(?:{pattern})")).collect::<Vec<_>>().join("|"),
    };
    if start.is_empty() {
        return migration.miss(format!("[MULTILINE_PARSER] {name}"), "it has no rule for start_state");
    }
    if next.len() > 1 {
        migration.miss(format!("[MULTILINE_PARSER] {name}"), "look at it: its states are joined into one pattern for all following lines");
    }
    if let Some(flush) = section.get("flush_timeout").and_then(|text| seconds(text, 1000.0)) {
        migration.file.multiline_flush_seconds = Some(flush);
    }
    if !migration.file.multiline_rules.iter().any(|known| known.name == name) {
        let next = (!next.is_empty()).then(|| joined(next));
        migration.file.multiline_rules.push(RuleEntry { name, start: joined(start), next });
    }
}

fn filter(migration: &mut Migration, section: &Section, rules: &[Section]) {
    match section.name() {
        "kubernetes" => kubernetes(migration, section),
        "multiline" => {
            if section.get("multiline.key_content").is_some_and(|key| key != "log") {
                migration.miss("[FILTER] multiline multiline.key_content", "lines are joined before they become members");
            }
            for (_, names) in section.properties.iter().filter(|(key, _)| key == "multiline.parser") {
                multiline(migration, names, rules);
            }
        }
        "throttle" => migration.miss("[FILTER] throttle", "use quotas: they delay, they do not drop"),
        // Inputs say whether they have it.
        "aws" => {}
        other => migration.miss(format!("[FILTER] {other}"), "no such filter; redact masks text, include and exclude choose files"),
    }
}

fn kubernetes(migration: &mut Migration, section: &Section) {
    let on = |key: &str| section.get(key).map(truth);
    let file = &mut migration.file;
    if on("merge_log") == Some(true) {
        file.merge = Some(section.get("merge_log_key").map_or(Merge::Top, |key| Merge::Under(key.to_owned())));
        file.keep_log = on("keep_log").filter(|keep| !keep);
    }
    // On unless said otherwise, there.
    file.labels = Some(on("labels").unwrap_or(true));
    file.annotations = Some(on("annotations").unwrap_or(true));
    file.honour_exclude = Some(on("k8s-logging.exclude").unwrap_or(false));
    file.honour_parser = Some(on("k8s-logging.parser").unwrap_or(false));
    for (key, value) in &section.properties {
        match key.as_str() {
            "name"
            | "match"
            | "match_regex"
            | "merge_log"
            | "merge_log_key"
            | "keep_log"
            | "labels"
            | "annotations"
            | "merge_log_trim"
            | "k8s-logging.exclude"
            | "k8s-logging.parser" => {}
            "merge_parser" | "namespace_labels" | "namespace_annotations" | "owner_references" | "regex_parser" if value != "off" => {
                migration.miss(format!("[FILTER] kubernetes {key} {value}"), "no such setting");
            }
            key => migration.needless.push((format!("[FILTER] kubernetes {key}"), "pods are known from the agent's own watch")),
        }
    }
}

/// Inputs of the journal: what they filter for says which of Container Insights' streams they are.
fn journal(migration: &mut Migration, section: &Section) {
    let tag = section.get("tag").unwrap_or("systemd.*");
    let entry = migration.file.journal.get_or_insert_with(|| JournalEntry {
        host: Some(false),
        units: Some(Vec::new()),
        ..JournalEntry::default()
    });
    let mut found = false;
    for (_, filter) in section.properties.iter().filter(|(key, _)| key == "systemd_filter") {
        match filter.split_once('=') {
            Some(("_SYSTEMD_UNIT", unit)) => entry.units.get_or_insert_default().push(unit.trim().to_owned()),
            Some(("_TRANSPORT" | "PRIORITY" | "SYSLOG_FACILITY", _)) => entry.host = Some(true),
            _ => continue,
        }
        found = true;
    }
    if let Some(path) = section.get("path") {
        let dirs = entry.dirs.get_or_insert_default();
        if !dirs.iter().any(|dir| dir == path) {
            dirs.push(path.to_owned());
        }
    }
    if section.get("read_from_tail").is_none_or(|value| matches!(value.to_ascii_lowercase().as_str(), "off" | "false" | "no")) {
        entry.read_from = Some(Begin::Head);
    }
    if !found {
        entry.host = Some(true);
        migration.miss(
            format!("[INPUT] systemd {tag}"),
            "it takes the whole journal; here are dmesg, messages, secure and the units that are named",
        );
    }
}

/// The rest of the configuration, as an input sees it.
struct Around<'a> {
    /// Paths of other inputs.
    others: &'a [&'a str],
    filters: &'a [Section],
    outputs: &'a [Section],
    /// Multiline parsers.
    rules: &'a [Section],
}

impl Around<'_> {
    /// A filter of that name takes records with the tag.
    fn filters(&self, name: &str, tag: &str) -> bool {
        let takes =
            |filter: &Section| filter.get("match_regex").is_some() || filter.get("match").is_none_or(|match_| tag_matches(match_, tag));
        self.filters.iter().any(|filter| filter.name() == name && takes(filter))
    }
}

fn input(migration: &mut Migration, section: &Section, around: &Around<'_>, main: &mut bool) {
    let Around { others, outputs, rules, .. } = *around;
    match section.name() {
        "tail" => {}
        "systemd" => return journal(migration, section),
        other => return migration.miss(format!("[INPUT] {other}"), "only log files and the journal are read"),
    }
    let path = section.get("path").unwrap_or_default();
    let containers =
        path.split(',').any(|path| path.trim().starts_with("/var/log/containers/") || path.trim().starts_with("/var/log/pods/"));
    let tag = section.get("tag").unwrap_or("tail.*");
    let output = outputs.iter().filter(|output| is_cloudwatch(output)).find(|output| {
        let matches = output.get("match").is_some_and(|pattern| tag_matches(pattern, tag));
        matches || output.get("match_regex").is_some()
    });
    let Some(output) = output else {
        return migration.miss(format!("[INPUT] tail {path}"), "no output of CloudWatch Logs has its tag");
    };
    for (_, names) in section.properties.iter().filter(|(key, _)| key == "multiline.parser") {
        multiline(migration, names, rules);
    }
    let names = Names::of(migration, output, tag, containers);
    let (kubernetes, node) = (around.filters("kubernetes", tag), around.filters("aws", tag));
    if node && !(containers && *main) {
        migration.miss(
            format!("[FILTER] aws, {tag}"),
            "az and ec2_instance_id are added in routes (node: true) and in the journal; the stream's name has the node",
        );
    }
    let globs = |list: &str| {
        list.split(',')
            .map(|path| path.trim().rsplit('/').next().unwrap_or_default().to_owned())
            .filter(|name| !name.is_empty())
            .collect::<Vec<_>>()
    };
    if !containers {
        for path in path.split(',').map(str::trim).filter(|path| !path.is_empty()) {
            migration.file.host_files.push(HostEntry { path: path.to_owned(), group: names.group.clone(), stream: names.stream.clone() });
        }
    } else if *main {
        migration.file.routes.get_or_insert_default().push(RouteEntry {
            files: globs(path),
            group: names.group,
            stream: names.stream,
            group_else: names.group_else,
            stream_else: names.stream_else,
            kubernetes: (!kubernetes).then_some(false),
            node: node.then_some(true),
        });
    } else {
        *main = true;
        let include = globs(path);
        if include.iter().all(|name| name != "*.log" && name != "*") {
            migration.file.include = include;
        }
        (migration.file.group, migration.file.stream) = (Some(names.group), Some(names.stream));
        (migration.file.group_else, migration.file.stream_else) = (names.group_else, names.stream_else);
        self::output(migration, output);
        if !kubernetes && migration.file.record != Some(Layout::Raw) {
            migration.miss(
                format!("[INPUT] tail {path}"),
                "no filter adds the pod's metadata; records have it here, but for routes (kubernetes: false)",
            );
        }
    }
    for (key, value) in &section.properties {
        match key.as_str() {
            "name" | "tag" | "path" | "multiline.parser" => {}
            "exclude_path" if containers => {
                // What another input reads is left out of this one, not of all: a route says where it goes.
                let elsewhere = |name: &String| others.iter().any(|path| globs(path).contains(name));
                migration.file.exclude.extend(globs(value).into_iter().filter(|name| !elsewhere(name)));
            }
            "read_from_head" => {
                let begin = if truth(value) || value.starts_with("${") { Begin::Head } else { Begin::Tail };
                migration.file.read_from = migration.file.read_from.or(Some(begin));
                if value.starts_with("${") {
                    migration.miss(format!("[INPUT] tail read_from_head {value}"), "a variable: head is taken, set read-from otherwise");
                }
            }
            "db" => {
                let dir = value.rsplit_once('/').map_or("", |(dir, _)| dir);
                if dir.starts_with('/') && dir != FLUENT_BIT_STATE {
                    migration.file.fluent_bit_state = Some(dir.to_owned());
                }
                migration.needless.push(("[INPUT] tail db".to_owned(), "files are read from where it says that Fluent Bit ended"));
            }
            "parser" | "docker_mode" if matches!(value.as_str(), "docker" | "cri" | "containerd" | "On" | "on") => {}
            "parser" | "exclude_path" | "multiline" | "parser_firstline" | "path_key" | "offset_key" | "tag_regex" | "ignore_older" => {
                migration.miss(format!("[INPUT] tail {key} {value}"), "no such setting");
            }
            key => migration
                .needless
                .push((format!("[INPUT] tail {key}"), "files are followed through rotation, however long their lines; positions are kept")),
        }
    }
}

/// Whether a `Match` takes records of an input's tag, both of which may have a star.
fn tag_matches(pattern: &str, tag: &str) -> bool {
    let fixed = tag.split('*').next().unwrap_or(tag);
    glob(pattern, tag) || glob(pattern, &format!("{fixed}x"))
}

fn output(migration: &mut Migration, section: &Section) {
    for (key, value) in &section.properties {
        match key.as_str() {
            "name"
            | "match"
            | "match_regex"
            | "log_group_name"
            | "log_stream_name"
            | "log_stream_prefix"
            | "log_group_template"
            | "log_stream_template"
            | "auto_create_group" => {}
            "region" if value.starts_with("${") => {}
            "region" => drop(migration.environment.insert("AWS_REGION".into(), value.clone())),
            "endpoint" => drop(migration.environment.insert("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS".into(), format!("https://{value}"))),
            "log_retention_days" => migration.file.retention_days = value.parse().ok(),
            "log_group_class" => {
                migration.file.class =
                    Some(if value.eq_ignore_ascii_case("infrequent_access") { GroupClass::InfrequentAccess } else { GroupClass::Standard });
            }
            "log_key" if value == "log" => {
                let file = &mut migration.file;
                file.record = Some(Layout::Raw);
                (file.merge, file.keep_log, file.labels, file.annotations) = (None, None, None, None);
            }
            "add_entity" => migration.file.entity = Some(value.eq_ignore_ascii_case("true") || value.eq_ignore_ascii_case("on")),
            "log_format" if value == "json/emf" => migration.file.emf = Some(true),
            "profile" => drop(migration.environment.insert("AWS_PROFILE".into(), value.clone())),
            "role_arn" | "external_id" | "sts_endpoint" => {
                migration.miss(format!("[OUTPUT] {key} {value}"), "give the agent's service account the role (IRSA or Pod Identity)");
            }
            "log_key" | "log_format" | "metric_namespace" | "metric_dimensions" | "port" => {
                migration.miss(format!("[OUTPUT] {key} {value}"), "no such setting");
            }
            key => migration.needless.push((format!("[OUTPUT] {key}"), "batches are sent in parallel and tried until they are taken")),
        }
    }
}

#[cfg(test)]
mod tests;
