//! Sinks without AWS: standard output or a file, one JSON line an event.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::logs::LogBatch;

/// Writes `{"group","stream","timestamp","message"}` lines.
pub struct JsonLines<W> {
    out: Mutex<W>,
}

impl JsonLines<io::Stdout> {
    /// To standard output.
    pub fn stdout() -> Self {
        Self { out: Mutex::new(io::stdout()) }
    }
}

impl JsonLines<File> {
    /// Appended to a file.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        Ok(Self { out: Mutex::new(File::options().create(true).append(true).open(path)?) })
    }
}

impl<W: Write + Send + 'static> LogSink for JsonLines<W> {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        let mut text = Vec::new();
        for event in batch.events() {
            let line = serde_json::json!({
                "group": batch.group(), "stream": batch.stream(), "timestamp": event.timestamp_ms, "message": event.message,
            });
            serde_json::to_writer(&mut text, &line).expect("strings and numbers are JSON");
            text.push(b'\n');
        }
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.write_all(&text).and_then(|()| out.flush()).map_err(|error| SinkError::Unavailable(error.to_string()))?;
        Ok(Rejected::default())
    }

    async fn create_group(&self, _group: &str, _spec: &LogGroupSpec) -> Result<(), SinkError> {
        Ok(())
    }

    async fn create_stream(&self, _group: &str, _stream: &str) -> Result<(), SinkError> {
        Ok(())
    }
}
