//! Which log group and stream a container's events go to: templates with names in braces.

use serde::{Deserialize, Serialize};

use super::cri::Output;
use super::enrich::Identity;

/// Group of Container Insights' application logs.
pub const FLUENT_BIT_GROUP: &str = "/aws/containerinsights/{cluster}/application";
/// Stream of Container Insights' Fluent Bit: one for each container instance.
pub const FLUENT_BIT_STREAM: &str = "{node}-application.var.log.containers.{file}";
/// Stream of the compact layout: says what the record leaves out.
pub const COMPACT_STREAM: &str = "{node}/{namespace}/{pod}/{container}/{id}/{output}";

/// Longest name of a group or stream.
const MAX_NAME: usize = 512;

/// A name with placeholders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template {
    parts: Vec<Part>,
    /// Where one of its values is not there.
    otherwise: Option<Box<Template>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Field {
    Cluster,
    Node,
    Namespace,
    Pod,
    Uid,
    Container,
    Id,
    FullId,
    Output,
    File,
    Label(String),
    Annotation(String),
}

/// A template that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// No text at all.
    #[error("the template is empty; a log group and a stream need a name, as in /aws/containerinsights/{{cluster}}/application")]
    Empty,
    /// A `{` without `}`.
    #[error("the template {0:?} has an opening brace without its closing one")]
    Unclosed(String),
    /// An unknown name in braces.
    #[error(
        "the template names {{{0}}}; known are cluster, node, namespace, pod, uid, container, id, fullid, output, file, label:KEY, annotation:KEY"
    )]
    UnknownField(String),
}

/// Where and from whom, besides the container's identity.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Cluster name.
    pub cluster: &'a str,
    /// Node name.
    pub node: &'a str,
    /// File name as under /var/log/containers.
    pub file: &'a str,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// Empty, unbalanced braces, unknown names.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        if text.is_empty() {
            return Err(TemplateError::Empty);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let (name, after) = after.split_once('}').ok_or_else(|| TemplateError::Unclosed(text.to_owned()))?;
            parts.push(Part::Field(field(name)?));
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { parts, otherwise: None })
    }

    /// The other template counts where a value of this one is not there.
    #[must_use]
    pub fn or_else(self, otherwise: Self) -> Self {
        Self { otherwise: Some(Box::new(otherwise)), ..self }
    }

    fn render(&self, place: Place<'_>, identity: Option<&Identity>, output: Output, legal: fn(char) -> bool) -> String {
        let names = identity.map(|identity| &identity.names);
        let pod = identity.and_then(|identity| identity.pod.as_ref());
        let value = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Field(field) => match field {
                Field::Cluster => place.cluster,
                Field::Node => place.node,
                Field::File => place.file,
                Field::Output => output.name(),
                Field::Namespace => names.map_or("", |names| &names.namespace),
                Field::Pod => names.map_or("", |names| &names.pod),
                Field::Uid => names.map_or("", |names| &names.uid),
                Field::Container => names.map_or("", |names| &names.container),
                Field::Id => names.map_or("", |names| names.id.get(..12).unwrap_or(&names.id)),
                Field::FullId => names.map_or("", |names| &names.id),
                Field::Label(key) => pod.and_then(|pod| pod.labels.get(key)).map_or("", String::as_str),
                Field::Annotation(key) => pod.and_then(|pod| pod.annotations.get(key)).map_or("", String::as_str),
            }
            .to_owned(),
        };
        let values: Vec<String> = self.parts.iter().map(value).collect();
        if let Some(otherwise) = &self.otherwise
            && values.iter().any(String::is_empty)
        {
            return otherwise.render(place, identity, output, legal);
        }
        let mut out = String::new();
        for value in &values {
            // An absent value must not make two slashes, nor an empty name.
            let value = if value.is_empty() { "none" } else { value };
            out.extend(value.chars().map(|c| if legal(c) { c } else { '_' }));
        }
        out.truncate(out.floor_char_boundary(MAX_NAME));
        out
    }

    /// A legal group name.
    pub fn group(&self, place: Place<'_>, identity: Option<&Identity>, output: Output) -> String {
        self.render(place, identity, output, |c| c.is_ascii_alphanumeric() || "_/.#-".contains(c))
    }

    /// A legal stream name.
    pub fn stream(&self, place: Place<'_>, identity: Option<&Identity>, output: Output) -> String {
        self.render(place, identity, output, |c| c != ':' && c != '*' && !c.is_control())
    }
}

fn field(name: &str) -> Result<Field, TemplateError> {
    Ok(match name {
        "cluster" => Field::Cluster,
        "node" => Field::Node,
        "namespace" => Field::Namespace,
        "pod" => Field::Pod,
        "uid" => Field::Uid,
        "container" => Field::Container,
        "id" => Field::Id,
        "fullid" => Field::FullId,
        "output" => Field::Output,
        "file" => Field::File,
        _ => match name.split_once(':') {
            Some(("label", key)) => Field::Label(key.to_owned()),
            Some(("annotation", key)) => Field::Annotation(key.to_owned()),
            _ => return Err(TemplateError::UnknownField(name.to_owned())),
        },
    })
}

impl TryFrom<String> for Template {
    type Error = TemplateError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        let show = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Field(Field::Label(key)) => format!("{{label:{key}}}"),
            Part::Field(Field::Annotation(key)) => format!("{{annotation:{key}}}"),
            Part::Field(field) => format!("{{{}}}", format!("{field:?}").to_lowercase()),
        };
        template.parts.iter().map(show).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::names::parse_flat;

    fn identity() -> Identity {
        let id = "bdcf5b69a76602aeae355a5751ae7acce946b03f8c251b031aadaabf4005753b";
        let mut identity = Identity::new(&parse_flat(&format!("web_shop_app-{id}.log")).unwrap(), None);
        let labels = [("team".to_owned(), "a:b*c".to_owned())].into();
        identity.pod = Some(crate::logs::enrich::PodIdentity { labels, ..Default::default() });
        identity
    }

    const PLACE: Place<'_> = Place { cluster: "gold", node: "ip-10-0-1-23", file: "web_shop_app-x.log" };

    #[test]
    fn an_empty_template_names_nothing() {
        assert_eq!(Template::parse(""), Err(TemplateError::Empty));
    }

    #[test]
    fn container_insights_names() {
        let (group, stream) = (Template::parse(FLUENT_BIT_GROUP).unwrap(), Template::parse(FLUENT_BIT_STREAM).unwrap());
        assert_eq!(group.group(PLACE, Some(&identity()), Output::Stdout), "/aws/containerinsights/gold/application");
        assert_eq!(
            stream.stream(PLACE, Some(&identity()), Output::Stdout),
            "ip-10-0-1-23-application.var.log.containers.web_shop_app-x.log"
        );
        let compact = Template::parse(COMPACT_STREAM).unwrap();
        assert_eq!(compact.stream(PLACE, Some(&identity()), Output::Stderr), "ip-10-0-1-23/shop/web/app/bdcf5b69a766/stderr");
    }

    #[test]
    fn another_template_counts_where_a_value_is_not_there() {
        let template = |text: &str, otherwise: &str| Template::parse(text).unwrap().or_else(Template::parse(otherwise).unwrap());
        let by_team = template("/team/{label:team}", "/team/{namespace}/{label:team}");
        assert_eq!(by_team.group(PLACE, Some(&identity()), Output::Stdout), "/team/a_b_c");
        assert_eq!(by_team.group(PLACE, None, Output::Stdout), "/team/none/none", "that one has no other");
        let by_owner = template("{label:owner}.{fullid}", "fixed-{file}");
        assert_eq!(by_owner.stream(PLACE, Some(&identity()), Output::Stdout), "fixed-web_shop_app-x.log");
        let full = Template::parse("{fullid}").unwrap().stream(PLACE, Some(&identity()), Output::Stdout);
        assert_eq!(full, identity().names.id);
    }

    #[test]
    fn what_the_service_refuses_is_replaced() {
        let by_team = Template::parse("/team/{label:team}/{label:absent}/{uid}").unwrap();
        assert_eq!(by_team.stream(PLACE, Some(&identity()), Output::Stdout), "/team/a_b_c/none/none");
        assert_eq!(by_team.group(PLACE, None, Output::Stdout), "/team/none/none/none");
        let long = Template::parse(&"é".repeat(600)).unwrap();
        assert!(long.stream(PLACE, None, Output::Stdout).len() <= MAX_NAME);
    }

    #[test]
    fn templates_print_as_they_were_written_and_errors_name_the_place() {
        for text in [FLUENT_BIT_STREAM, COMPACT_STREAM, "{label:a}{annotation:b/c}x{uid}{fullid}"] {
            assert_eq!(String::from(Template::parse(text).unwrap()), text);
        }
        assert_eq!(Template::parse("{pot}"), Err(TemplateError::UnknownField("pot".into())));
        assert_eq!(Template::parse("{pod"), Err(TemplateError::Unclosed("{pod".into())));
    }
}
