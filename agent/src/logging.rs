//! The process's own log: one line an event on stderr, its filter changeable while it runs.

use anyhow::{Context as _, Result};
use stanchion_daemon::admin::debug::SetLogFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, reload};

/// Starts logging; `level` is a tracing filter or one of aws-node's words (DEBUG, INFO, WARN, ERROR, FATAL). DEBUG and TRACE as a word
/// are about this agent: its libraries tell of each request, of those too that ship these very lines.
///
/// # Errors
/// The filter cannot be read.
pub(crate) fn init(level: &str) -> Result<SetLogFilter> {
    let (filter, handle) = reload::Layer::new(parse(level).with_context(|| format!("AWS_VPC_K8S_CNI_LOGLEVEL={level:?}"))?);
    tracing_subscriber::registry().with(filter).with(fmt::layer().with_writer(std::io::stderr).with_target(true)).init();
    Ok(std::sync::Arc::new(move |text| {
        let filter = parse(text).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    }))
}

fn parse(text: &str) -> Result<EnvFilter> {
    let text = match text.to_ascii_lowercase().as_str() {
        "fatal" => "error".to_owned(),
        "warning" => "warn".to_owned(),
        word @ ("debug" | "trace") => format!("warn,stanchion={word}"),
        _ => text.to_owned(),
    };
    Ok(EnvFilter::try_new(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aws_nodes_words_are_about_the_agent_and_filters_mean_what_they_say() {
        for (text, filter) in [
            ("DEBUG", "stanchion=debug,warn"),
            ("trace", "stanchion=trace,warn"),
            ("FATAL", "error"),
            ("Warning", "warn"),
            ("info", "info"),
            ("debug,aws_smithy_runtime=trace", "aws_smithy_runtime=trace,debug"),
        ] {
            assert_eq!(parse(text).expect("a filter").to_string(), filter, "{text}");
        }
        assert!(parse("stanchion=loud").is_err());
    }
}
