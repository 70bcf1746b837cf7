//! Container logs as containerd and the kubelet keep them: CRI lines under `pods/`, symbolic links under `containers/`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Longest piece that containerd writes before it marks a line as partial.
pub const PIECE_BYTES: usize = 16 * 1024;

/// The log of one container.
#[derive(Debug)]
pub struct ContainerLog {
    file: File,
    path: PathBuf,
    link: PathBuf,
    rotations: u32,
}

/// Which of the container's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl ContainerLog {
    /// Makes file and link under a `/var/log` of the lab.
    pub fn create(var_log: &Path, namespace: &str, pod: &str, uid: &str, container: &str, container_id: &str) -> io::Result<Self> {
        let dir = var_log.join("pods").join(format!("{namespace}_{pod}_{uid}")).join(container);
        fs::create_dir_all(&dir)?;
        let links = var_log.join("containers");
        fs::create_dir_all(&links)?;
        let path = dir.join("0.log");
        let file = append_to(&path)?;
        let link = links.join(format!("{pod}_{namespace}_{container}-{container_id}.log"));
        symlink(&path, &link)?;
        Ok(Self { file, path, link, rotations: 0 })
    }

    /// Appends one line of the container as one write, split as containerd splits long ones.
    pub fn line(&mut self, output: Output, text: &str) -> io::Result<()> {
        let stream = match output {
            Output::Stdout => "stdout",
            Output::Stderr => "stderr",
        };
        let now = jiff::Timestamp::now();
        let mut bytes = Vec::with_capacity(text.len() + 64);
        let mut pieces = text.as_bytes().chunks(PIECE_BYTES).peekable();
        if pieces.peek().is_none() {
            writeln!(bytes, "{now:.9} {stream} F ")?;
        }
        while let Some(piece) = pieces.next() {
            write!(bytes, "{now:.9} {stream} {} ", if pieces.peek().is_some() { "P" } else { "F" })?;
            bytes.extend_from_slice(piece);
            bytes.push(b'\n');
        }
        self.file.write_all(&bytes)
    }

    /// Its name under `containers/`.
    pub fn link(&self) -> &Path {
        &self.link
    }

    /// Rotates as the kubelet does: the file is renamed, the next line goes to a new one.
    pub fn rotate(&mut self) -> io::Result<()> {
        self.rotations += 1;
        let stamp = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S");
        fs::rename(&self.path, self.path.with_extension(format!("log.{stamp}-{}", self.rotations)))?;
        self.file = append_to(&self.path)?;
        Ok(())
    }

    /// Deletes everything, as the kubelet does with the pod.
    pub fn delete(self) -> io::Result<()> {
        fs::remove_file(&self.link)?;
        let pod = self.path.parent().and_then(Path::parent).expect("created two directories deep");
        fs::remove_dir_all(pod)
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_written_in_pieces_and_rotation_starts_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = ContainerLog::create(dir.path(), "shop", "db", "uid-1", "c", "abc").unwrap();
        log.line(Output::Stdout, &"x".repeat(PIECE_BYTES + 1)).unwrap();
        log.rotate().unwrap();
        log.line(Output::Stderr, "after").unwrap();
        let link = dir.path().join("containers/db_shop_c-abc.log");
        let now = fs::read_to_string(&link).unwrap();
        assert!(now.ends_with(" stderr F after\n"), "{now}");
        // 2026-11-21T03:35:18.831168338Z
        assert_eq!(now.split(' ').next().map(str::len), Some(30), "{now}");
        let rotated = fs::read_dir(dir.path().join("pods/shop_db_uid-1/c")).unwrap().flatten();
        let rotated = rotated.map(|e| e.path()).find(|p| !p.ends_with("0.log")).unwrap();
        let pieces: Vec<_> = fs::read_to_string(rotated).unwrap().lines().map(|l| l.split(' ').nth(2).unwrap().to_owned()).collect();
        assert_eq!(pieces, ["P", "F"]);
        log.delete().unwrap();
        assert!(!link.exists());
    }
}
