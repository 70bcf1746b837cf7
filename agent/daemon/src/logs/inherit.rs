//! Where Fluent Bit ended on this node: from its databases, read once by an agent that never ran here.
//!
//! Fluent Bit notes what it has read, not what was delivered. What it read and did not send is in chunks beside its databases: files that
//! these may be of are begun anew, rather twice than not at all.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use stanchion_core::logs::cri::{Header, Line};
use stanchion_core::logs::fluentbit::{TailFiles, chunk_may_be_of};
use stanchion_core::logs::positions::Position;
use tracing::{info, warn};

use super::discover::Siblings;
use super::source::Source;

/// Fluent Bit's grace in the Container Insights layout, and a little more: so long it may take to end.
const ENDS: Duration = Duration::from_secs(35);
/// How often it is looked whether it ended.
const LOOK: Duration = Duration::from_secs(1);
/// More is no database of positions: a row is 200 bytes.
const LARGEST: u64 = 64 << 20;
/// What a chunk begins with, and where the length of the metadata is that follow it; in them is the tag
/// (<https://github.com/fluent/chunkio>, "File Layout").
const CHUNK_MAGIC: [u8; 2] = [0xc1, 0x00];
const METADATA_LENGTH_AT: usize = 22;
/// How far back the beginning of a line is looked for; lines of containerd have at most 16 KiB.
const BACK: u64 = 256 << 10;

/// What Fluent Bit left.
#[derive(Debug, Default)]
pub struct Inherited {
    databases: Vec<TailFiles>,
    /// Metadata of chunks that `tail` inputs made and no output took; empty where they are not known.
    chunks: Vec<Vec<u8>>,
}

impl Inherited {
    /// What is in the directory, once nobody writes there any more, or after [`ENDS`]; `None` where it read no log files.
    pub(super) async fn of(dir: &Path, wall: fn() -> SystemTime) -> Option<Self> {
        let databases = databases(dir)?;
        let deadline = tokio::time::Instant::now() + ENDS;
        if is_written(&databases, wall()) {
            info!(dir = %dir.display(), most_s = ENDS.as_secs(), "Fluent Bit writes its positions: log files wait until it ended");
        }
        while is_written(&databases, wall()) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
        if is_written(&databases, wall()) {
            warn!(dir = %dir.display(), "Fluent Bit goes on: both ship logs until it ends");
        }
        let mut inherited = Self::default();
        let mut unread = 0;
        for path in databases {
            match read(&path) {
                // Of another input, or of one that had nothing to read.
                Ok(files) if files.is_empty() => {}
                Ok(files) => {
                    info!(path = %path.display(), files = files.len(), "log files are read from where Fluent Bit ended");
                    inherited.databases.push(files);
                }
                Err(error) => {
                    unread += 1;
                    warn!(path = %path.display(), error = format!("{error:#}"), "positions of Fluent Bit are not used: its files are read from their beginning");
                }
            }
        }
        if inherited.databases.is_empty() && unread == 0 {
            return None;
        }
        inherited.chunks = chunks(&dir.join("flb-storage"));
        if !inherited.chunks.is_empty() {
            let chunks = inherited.chunks.len();
            warn!(chunks, dir = %dir.display(), "Fluent Bit left lines that it did not send: their files are read from their beginning");
        }
        Some(inherited)
    }

    /// Positions of a log's files, in the order of the files; empty where Fluent Bit did not read them.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(super) fn positions(&self, live: &Path, file_name: &str, siblings: &mut Siblings) -> io::Result<Vec<Position>> {
        let unsent = self.chunks.iter().any(|chunk| chunk_may_be_of(chunk, file_name));
        let family = siblings.rotated(live)?.into_iter().filter(|(rotated, _)| !rotated.gz).map(|(_, path)| path);
        let mut positions = Vec::new();
        for path in family.chain([live.to_owned()]) {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let metadata = file.metadata()?;
            // A file is noted by the name by which it was found, and by its place in the tree once it was rotated: what is live now is not
            // what had its inode then.
            let is_its = |name: &str| {
                let name = Path::new(name);
                let moved = path != live && name.parent() == live.parent();
                name == live || moved || name.file_name().is_some_and(|name| name == file_name)
            };
            // Two inputs may have read it: what the slower one has not read was not sent by both.
            let read = self.databases.iter().filter_map(|files| files.offset(metadata.ino(), is_its)).min();
            let Some(read) = read.filter(|read| *read <= metadata.len()) else { continue };
            let offset = if unsent { 0 } else { beginning_of_line(&file, read)? };
            let fingerprint = Source::Plain(file).fingerprint()?;
            let path = live.to_string_lossy().into_owned();
            positions.push(Position { path, dev: metadata.dev(), inode: metadata.ino(), fingerprint, offset });
        }
        Ok(positions)
    }
}

/// Databases in the directory; `None` where there is none.
fn databases(dir: &Path) -> Option<Vec<PathBuf>> {
    if dir.as_os_str().is_empty() {
        return None;
    }
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(dir = %dir.display(), %error, "positions of Fluent Bit cannot be looked for: log files are read from their beginning");
            return None;
        }
    };
    let mut paths: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "db")).collect();
    paths.sort();
    (!paths.is_empty()).then_some(paths)
}

/// The file that SQLite writes beside a database while it is open, and takes away when it is closed.
fn log_of(database: &Path) -> PathBuf {
    let mut log = database.as_os_str().to_owned();
    log.push("-wal");
    log.into()
}

/// Whether a process has one of the databases open, as far as that can be told: one that was killed leaves its log too.
fn is_written(databases: &[PathBuf], now: SystemTime) -> bool {
    databases.iter().any(|path| {
        let modified = fs::metadata(log_of(path)).and_then(|log| log.modified());
        modified.is_ok_and(|modified| now.duration_since(modified).is_ok_and(|quiet| quiet < ENDS))
    })
}

fn read(path: &Path) -> anyhow::Result<TailFiles> {
    // The log first: what a checkpoint moves into the file meanwhile is seen there.
    let log = match File::open(log_of(path)) {
        Ok(file) => bytes(file)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let file = bytes(File::open(path)?)?;
    anyhow::ensure!(!path.with_extension("db-journal").exists(), "a transaction was not ended");
    Ok(TailFiles::read(&file, &log)?)
}

fn bytes(file: File) -> anyhow::Result<Vec<u8>> {
    let size = file.metadata()?.len();
    anyhow::ensure!(size <= LARGEST, "{size} bytes are more than a database of positions has");
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Metadata of the chunks of `tail` inputs: each input has a directory of its own name.
fn chunks(storage: &Path) -> Vec<Vec<u8>> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let inputs = entries(storage).filter(|input| input.file_name().to_str().is_some_and(|name| name.starts_with("tail")));
    let files = inputs.flat_map(|input| entries(&input.path())).filter(|chunk| chunk.path().extension().is_some_and(|it| it == "flb"));
    files.map(|chunk| File::open(chunk.path()).and_then(metadata).unwrap_or_default()).collect()
}

/// Of a chunk; empty for a file that is none.
fn metadata(mut chunk: File) -> io::Result<Vec<u8>> {
    let mut header = [0; METADATA_LENGTH_AT + 2];
    chunk.read_exact(&mut header)?;
    let mut metadata = Vec::new();
    if header.starts_with(&CHUNK_MAGIC) {
        let len = u16::from_be_bytes([header[METADATA_LENGTH_AT], header[METADATA_LENGTH_AT + 1]]);
        chunk.take(len.into()).read_to_end(&mut metadata)?;
    }
    Ok(metadata)
}

/// Where the line begins that `offset` is in, or before it the first of the parts of a line that the runtime has cut.
fn beginning_of_line(file: &File, offset: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt as _;

    let from = offset.saturating_sub(BACK);
    let mut before = vec![0; usize::try_from(offset - from).unwrap_or(0)];
    file.read_exact_at(&mut before, from)?;
    let newline = |before: &[u8]| memchr::memrchr(b'\n', before).map_or(0, |at| at + 1);
    let mut begin = newline(&before);
    while begin > 0 {
        let earlier = newline(&before[..begin - 1]);
        let line = Line::parse(&before[earlier..begin - 1]);
        if !(line.partial && matches!(line.header, Header::Cri { .. })) {
            break;
        }
        begin = earlier;
    }
    Ok(from + begin as u64)
}
