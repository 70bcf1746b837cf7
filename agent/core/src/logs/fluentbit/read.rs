//! Fluent Bit's configuration as sections: the classic form, YAML, and a Kubernetes ConfigMap that holds files of either.

use serde_json::Value;

/// A section: `[INPUT]` and its like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// `service`, `input`, `filter`, `output`, `parser`, `multiline_parser`; in lower case.
    pub kind: String,
    /// Keys in lower case, in order; a key may come several times.
    pub properties: Vec<(String, String)>,
}

impl Section {
    /// The first value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.properties.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Which plugin, or what it is called.
    pub fn name(&self) -> &str {
        self.get("name").unwrap_or_default()
    }
}

/// Why a configuration cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// A property before any section, or a line that is none.
    #[error("line {line}: {text:?} is neither a section, a property nor a comment")]
    Line {
        /// From 1.
        line: usize,
        /// As it stands.
        text: String,
    },
    /// YAML that cannot be read.
    #[error("not YAML: {0}")]
    Yaml(String),
    /// YAML without a pipeline.
    #[error("no Fluent Bit configuration: it has neither sections, a pipeline, nor a ConfigMap's data")]
    Foreign,
    /// A file that is not there.
    #[error("@INCLUDE {0}: there is no such file")]
    Include(String),
    /// Files that include each other.
    #[error("@INCLUDE goes deeper than 10 files")]
    Depth,
}

/// Finds an included file by its name, or all that a glob names.
pub type Find<'a> = &'a dyn Fn(&str) -> Vec<String>;

/// Reads a configuration of any form; `find` gives the texts of included files.
///
/// # Errors
/// What is no configuration; files that are not there.
pub fn sections(text: &str, find: Find<'_>) -> Result<Vec<Section>, ReadError> {
    let classic = text.lines().map(str::trim).any(|line| line.starts_with('[') && line.ends_with(']') && !line.contains(','));
    if classic && !text.contains("kind: ConfigMap") {
        return read_classic(text, find, 0);
    }
    let mut found = Vec::new();
    for document in yaml_documents(text) {
        let value: Value = serde_saphyr::from_str(document).map_err(|error| ReadError::Yaml(error.to_string()))?;
        if let Some(data) = value.get("data").and_then(Value::as_object) {
            found.extend(config_map(data)?);
        } else if value.get("pipeline").is_some() {
            found.extend(yaml(&value, find, 0)?);
        }
    }
    if found.is_empty() { Err(ReadError::Foreign) } else { Ok(found) }
}

fn yaml_documents(text: &str) -> Vec<&str> {
    text.split("\n---").filter(|document| !document.trim().trim_start_matches("---").trim().is_empty()).collect()
}

/// The file that includes the others comes first; parsers are read wherever they are.
fn config_map(data: &serde_json::Map<String, Value>) -> Result<Vec<Section>, ReadError> {
    let text = |name: &str| data.get(name).and_then(Value::as_str).map(str::to_owned);
    let find = |name: &str| {
        let name = name.rsplit('/').next().unwrap_or(name);
        let matches = data.keys().filter(|key| super::super::names::glob(name, key));
        matches.filter_map(|key| text(key)).collect::<Vec<_>>()
    };
    let main = ["fluent-bit.conf", "fluent-bit.yaml", "fluent-bit.yml"].into_iter().find_map(text);
    let mut found = match main {
        Some(main) => sections(&main, &find)?,
        None => {
            let mut found = Vec::new();
            for value in data.values().filter_map(Value::as_str) {
                found
                    .extend(sections(value, &find).or_else(|error| if error == ReadError::Foreign { Ok(Vec::new()) } else { Err(error) })?);
            }
            found
        }
    };
    for (key, value) in data {
        if key.contains("parser")
            && let Some(parsers) = value.as_str()
        {
            let parsers = sections(parsers, &find)?;
            found.extend(parsers.into_iter().filter(|section| section.kind.ends_with("parser")));
        }
    }
    Ok(found)
}

fn read_classic(text: &str, find: Find<'_>, depth: usize) -> Result<Vec<Section>, ReadError> {
    if depth > 10 {
        return Err(ReadError::Depth);
    }
    let mut sections: Vec<Section> = Vec::new();
    let mut set: Vec<(String, String)> = Vec::new();
    for (index, raw) in text.lines().enumerate() {
        let line = raw.trim();
        let (word, rest) = line.split_once(char::is_whitespace).map_or((line, ""), |(word, rest)| (word, rest.trim()));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(kind) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            sections.push(Section { kind: kind.trim().to_ascii_lowercase(), properties: Vec::new() });
        } else if word.eq_ignore_ascii_case("@include") {
            let files = find(rest);
            if files.is_empty() && !rest.contains('*') {
                return Err(ReadError::Include(rest.to_owned()));
            }
            for file in files {
                sections.extend(read_classic(&file, find, depth + 1)?);
            }
        } else if word.eq_ignore_ascii_case("@set") {
            if let Some((name, value)) = rest.split_once('=') {
                set.push((name.trim().to_owned(), value.trim().to_owned()));
            }
        } else if let Some(section) = sections.last_mut().filter(|_| !word.is_empty()) {
            let value = set.iter().fold(rest.to_owned(), |value, (name, to)| value.replace(&format!("${{{name}}}"), to));
            section.properties.push((word.to_ascii_lowercase(), value));
        } else {
            return Err(ReadError::Line { line: index + 1, text: raw.to_owned() });
        }
    }
    Ok(sections)
}

fn yaml(value: &Value, find: Find<'_>, depth: usize) -> Result<Vec<Section>, ReadError> {
    if depth > 10 {
        return Err(ReadError::Depth);
    }
    let mut found = Vec::new();
    let one = |kind: &str, value: &Value| {
        let properties = value.as_object().into_iter().flatten().flat_map(|(key, value)| {
            let key = key.to_ascii_lowercase();
            match value {
                Value::Array(items) if key != "rules" => items.iter().map(|item| (key.clone(), scalar(item))).collect(),
                Value::Array(items) => items.iter().map(|rule| ("rule".to_owned(), yaml_rule(rule))).collect(),
                value => vec![(key, scalar(value))],
            }
        });
        Section { kind: kind.to_owned(), properties: properties.collect() }
    };
    found.extend(value.get("service").map(|service| one("service", service)));
    for (list, kind) in [("parsers", "parser"), ("multiline_parsers", "multiline_parser")] {
        found.extend(value.get(list).and_then(Value::as_array).into_iter().flatten().map(|item| one(kind, item)));
    }
    for file in value.get("includes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        let texts = find(file);
        if texts.is_empty() {
            return Err(ReadError::Include(file.to_owned()));
        }
        for text in texts {
            let value: Value = serde_saphyr::from_str(&text).map_err(|error| ReadError::Yaml(error.to_string()))?;
            found.extend(yaml(&value, find, depth + 1)?);
        }
    }
    for (list, kind) in [("inputs", "input"), ("filters", "filter"), ("outputs", "output")] {
        let items = value.get("pipeline").and_then(|pipeline| pipeline.get(list)).and_then(Value::as_array);
        for item in items.into_iter().flatten() {
            found.push(one(kind, item));
            // Processors are filters of one input or output.
            for processor in item.pointer("/processors/logs").and_then(Value::as_array).into_iter().flatten() {
                found.push(one("filter", processor));
            }
        }
    }
    Ok(found)
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn yaml_rule(rule: &Value) -> String {
    let part = |name: &str| rule.get(name).map(scalar).unwrap_or_default();
    format!("\"{}\" \"{}\" \"{}\"", part("state"), part("regex"), part("next_state"))
}
