//! The process's own log: one line an event on stderr, its filter changeable while it runs.

use anyhow::{Context as _, Result};
use stanchion_daemon::admin::debug::SetLogFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, reload};

/// Starts logging; `level` is a tracing filter or one of aws-node's words (DEBUG, INFO, WARN, ERROR, FATAL).
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
        _ => text.to_owned(),
    };
    Ok(EnvFilter::try_new(text)?)
}
