//! One line a call in `pluginLogFile`: what was asked, how long each phase took, how it ended.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use stanchion_core::cni::config::LogLevel;
use stanchion_core::cni::{CniError, Invocation, NetConf};

/// The line while it is being written.
pub(crate) struct Journal {
    file: Option<PathBuf>,
    level: LogLevel,
    text: String,
    started: Instant,
    phase: Instant,
}

impl Journal {
    /// Starts the line.
    pub(crate) fn start(conf: &NetConf, invocation: &Invocation) -> Self {
        let Invocation { verb, container_id, pod, .. } = invocation;
        let now = Instant::now();
        let text = format!("verb={verb:?} pod={pod} container={container_id}");
        Self { file: conf.log_file.clone(), level: conf.log_level, text, started: now, phase: now }
    }

    /// Ends a phase.
    pub(crate) fn phase(&mut self, name: &str) {
        let now = Instant::now();
        self.text.push_str(&format!(" {name}_us={}", now.duration_since(self.phase).as_micros()));
        self.phase = now;
    }

    /// Something that a person should know and that is no failure.
    pub(crate) fn note(&mut self, text: &str) {
        self.text.push_str(&format!(" note={text:?}"));
    }

    /// Writes the line. A log that cannot be written is no reason to fail a pod.
    pub(crate) fn finish(self, error: Option<&CniError>) {
        let Some(path) = self.file else { return };
        if !self.level.wants(error.is_some()) {
            return;
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let outcome = match error {
            None => "ok".to_owned(),
            Some(error) => format!("failed code={} error={:?}", error.code.number(), error.msg),
        };
        let total = self.started.elapsed().as_micros();
        let line = format!("time={}.{:03} {} total_us={total} outcome={outcome}\n", time.as_secs(), time.subsec_millis(), self.text);
        if path.as_os_str() == "stderr" {
            eprint!("{line}");
        } else if let Ok(mut file) = open(&path) {
            // One write: lines of concurrent calls do not mix.
            let _ = file.write_all(line.as_bytes());
        }
    }
}

/// The directory of aws-node's journal is only there where aws-node was.
fn open(path: &Path) -> io::Result<File> {
    let append = || OpenOptions::new().create(true).append(true).open(path);
    append().or_else(|error| match path.parent() {
        Some(directory) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(directory).and_then(|()| append()),
        _ => Err(error),
    })
}
