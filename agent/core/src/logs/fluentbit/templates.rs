//! Names of groups and streams: Fluent Bit's variables and record accessors as our templates.

use super::{Migration, Section};

/// Our templates for one input and its output.
pub(super) struct Names {
    pub(super) group: String,
    pub(super) group_else: Option<String>,
    pub(super) stream: String,
    pub(super) stream_else: Option<String>,
}

impl Names {
    pub(super) fn of(migration: &mut Migration, output: &Section, tag: &str, containers: bool) -> Self {
        let tag = variables(tag);
        let tag = match (tag.split_once('*'), containers) {
            (Some((before, after)), true) => format!("{before}var.log.containers.{{file}}{after}"),
            (Some((before, after)), false) => format!("{before}{{file}}{after}"),
            (None, _) => tag,
        };
        let name = |key: &str| output.get(key).map(variables);
        // A record that lacks what a template names goes to the fixed name.
        let group = template(migration, output, "log_group_template", &tag, containers);
        let (group, group_else) = or_fixed(group, name("log_group_name"), super::super::route::FLUENT_BIT_GROUP);
        let stream = template(migration, output, "log_stream_template", &tag, containers);
        let fixed = name("log_stream_name").or_else(|| name("log_stream_prefix").map(|prefix| format!("{prefix}{tag}")));
        let (stream, stream_else) = or_fixed(stream, fixed, super::super::route::FLUENT_BIT_STREAM);
        Self { group, group_else, stream, stream_else }
    }
}

fn or_fixed(template: Option<String>, fixed: Option<String>, default: &str) -> (String, Option<String>) {
    match template {
        Some(template) => (template, fixed),
        None => (fixed.unwrap_or_else(|| default.to_owned()), None),
    }
}

/// `${CLUSTER_NAME}` and its kin.
fn variables(text: &str) -> String {
    let known = [
        ("${CLUSTER_NAME}", "{cluster}"),
        ("${HOST_NAME}", "{node}"),
        ("${HOSTNAME}", "{node}"),
        ("${NODE_NAME}", "{node}"),
        ("$(cluster_name)", "{cluster}"),
    ];
    known.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// `None` where the output has no such key, or names what is not known, which is told.
fn template(migration: &mut Migration, output: &Section, key: &str, tag: &str, containers: bool) -> Option<String> {
    let text = variables(output.get(key)?);
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let end = accessor_end(after);
        let found = field(&after[..end], tag, containers);
        // Without them in the record Fluent Bit takes the fixed name for every pod.
        let off = |field: &String| {
            field.starts_with("{label:") && migration.file.labels == Some(false)
                || field.starts_with("{annotation:") && migration.file.annotations == Some(false)
        };
        match found {
            Some(field) if !off(&field) => out.push_str(&field),
            found => {
                let why = if found.is_some() { "is not in the records" } else { "is not known here" };
                migration.miss(format!("[OUTPUT] {key} {text}"), format!("${} {why}; the fixed name is used", &after[..end]));
                return None;
            }
        }
        rest = &after[end..];
    }
    out.push_str(rest);
    Some(out)
}

/// Where an accessor ends: at what is neither of its name nor in brackets.
fn accessor_end(text: &str) -> usize {
    let mut inside = false;
    for (at, c) in text.char_indices() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ if inside || c.is_ascii_alphanumeric() || c == '_' => {}
            _ => return at,
        }
    }
    text.len()
}

/// Lines of the node's files have no members of containers.
fn field(accessor: &str, tag: &str, containers: bool) -> Option<String> {
    if accessor == "tag" {
        return Some(tag.to_owned());
    }
    if !containers {
        return None;
    }
    if accessor == "stream" {
        return Some("{output}".to_owned());
    }
    let parts: Vec<&str> = accessor.split(['[', ']']).map(|part| part.trim_matches(['\'', '"'])).filter(|part| !part.is_empty()).collect();
    Some(match parts[..] {
        ["kubernetes", "namespace_name"] => "{namespace}".to_owned(),
        ["kubernetes", "pod_name"] => "{pod}".to_owned(),
        ["kubernetes", "pod_id"] => "{uid}".to_owned(),
        ["kubernetes", "container_name"] => "{container}".to_owned(),
        ["kubernetes", "docker_id"] => "{fullid}".to_owned(),
        ["kubernetes", "host"] => "{node}".to_owned(),
        ["kubernetes", "labels", label] => format!("{{label:{label}}}"),
        ["kubernetes", "annotations", annotation] => format!("{{annotation:{annotation}}}"),
        _ => return None,
    })
}
