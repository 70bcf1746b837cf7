//! Which versions of the specification the plugins after ours speak: each is asked with VERSION, as a runtime asks it. A
//! distribution's may be years older than the runtime.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use stanchion_core::conflist::{Chained, VERSION_QUESTION, kind, others, spoken, version_for};
use tracing::warn;

/// A plugin answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where runtimes look for plugins unless told otherwise.
const USUAL: &str = "/opt/cni/bin";
/// Where those of some distributions look before: Debian's containerd, CRI-O. Not seen from a container, whose nodes have none.
const BEFORE: [&str; 2] = ["/usr/lib/cni", "/usr/libexec/cni"];

/// The newest version that everybody speaks who may be called with it: the runtime, and each copy of a chained plugin, ours and those that
/// others chained into the configuration that is `present`.
///
/// # Errors
/// There is none; the text says what to do.
pub(super) fn version(
    bin_dir: &Path,
    chained: &[Chained],
    present: &Value,
    runtime: &str,
    spoken: &mut Spoken,
) -> Result<&'static str, String> {
    let called = chained.iter().map(|plugin| plugin.binary()).chain(others(present).map(kind));
    let before = BEFORE.iter().map(Path::new).filter(|_| bin_dir == Path::new(USUAL));
    let places: Vec<&Path> = before.chain([bin_dir]).collect();
    let copies: Vec<PathBuf> =
        called.flat_map(|plugin| places.iter().map(move |place| place.join(plugin))).filter(|copy| copy.is_file()).collect();
    let versions: Vec<_> = copies.iter().map(|copy| spoken.of(copy)).collect();
    version_for(runtime, &versions).map_err(|index| {
        let copy = copies.get(index).map(|copy| copy.display().to_string()).unwrap_or_default();
        format!("{copy} speaks no CNI version since 0.4.0 that the others speak: install newer CNI plugins")
    })
}

/// What plugins have said; one is asked anew when its file has changed.
#[derive(Debug, Default)]
pub(super) struct Spoken(HashMap<PathBuf, (Signature, Option<Vec<String>>)>);

type Signature = (Option<SystemTime>, u64);

impl Spoken {
    /// The versions that this plugin speaks; `None` if it does not say. Blocks while it is asked.
    pub(super) fn of(&mut self, plugin: &Path) -> Option<Vec<String>> {
        let signature = fs::metadata(plugin).map(|meta| (meta.modified().ok(), meta.len())).unwrap_or_default();
        if let Some((seen, versions)) = self.0.get(plugin)
            && *seen == signature
        {
            return versions.clone();
        }
        let versions = match ask(plugin) {
            Ok(answer) => spoken(&answer),
            // It is being replaced at this moment: asked again at the next look.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => return None,
            Err(error) => {
                warn!(plugin = %plugin.display(), %error, "it does not say which CNI versions it speaks: taken to know 1.0.0");
                None
            }
        };
        self.0.insert(plugin.to_owned(), (signature, versions.clone()));
        versions
    }
}

fn ask(plugin: &Path) -> io::Result<Vec<u8>> {
    let mut command = Command::new(plugin);
    command.env_clear().env("CNI_COMMAND", "VERSION").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends without reading has its answer looked at all the same.
        let _unread = input.write_all(VERSION_QUESTION.as_bytes());
    }
    let (send, receive) = mpsc::channel();
    if let Some(mut output) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut answer = Vec::new();
            let read = output.read_to_end(&mut answer).map(|_| answer);
            // Nobody waits any more after a time-out.
            let _late = send.send(read);
        });
    }
    let answer = receive.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    // It has ended, or is to.
    let _ended = child.kill();
    child.wait()?;
    answer
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A plugin that is this script. Another test's fork may hold the file open for writing for an instant.
    fn plugin(directory: &Path, name: &str, script: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn answer(path: &Path) -> io::Result<Vec<u8>> {
        loop {
            match ask(path) {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                answer => return answer,
            }
        }
    }

    #[test]
    fn a_plugin_is_asked_as_a_runtime_asks_it() {
        let directory = tempfile::tempdir().unwrap();
        let echo = plugin(directory.path(), "echo", "read -r question; echo \"$CNI_COMMAND $question $HOME\"");
        assert_eq!(answer(&echo).unwrap(), format!("VERSION {VERSION_QUESTION} \n").as_bytes());
        let closed = plugin(directory.path(), "closed", "exec 0<&-; echo '{}'");
        assert_eq!(answer(&closed).unwrap(), b"{}\n");
        assert_eq!(answer(&directory.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn one_that_hangs_or_cannot_run_does_not_say_and_a_new_file_is_asked_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = plugin(directory.path(), "portmap", "exec sleep 60");
        let mut known = Spoken::default();
        assert_eq!(known.of(&path), None);
        fs::write(&path, "\x7fELF of another machine").unwrap();
        assert_eq!(known.of(&path), None);
        let speaks = r#"echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0","1.1.0"]}'"#;
        plugin(directory.path(), "portmap", speaks);
        let versions = (0..10_000).find_map(|_| known.of(&path));
        assert_eq!(versions, Some(vec!["1.0.0".to_owned(), "1.1.0".to_owned()]));
        assert_eq!(known.of(&path), versions, "remembered");
    }
}
