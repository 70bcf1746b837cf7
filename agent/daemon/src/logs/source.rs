//! Bytes of one generation of a log file: the open file itself, or what gzip left of it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use stanchion_core::logs::positions::{FINGERPRINT_BYTES, Fingerprint, Position};

/// An open generation. The descriptor is kept, so that neither rename, unlink nor compression takes the bytes away.
pub(super) enum Source {
    Plain(File),
    Gz(Box<Gz>),
}

/// Bytes of one read of a compressed file's head.
const HEAD: usize = FINGERPRINT_BYTES;
/// Decompressors at work at the same time: each takes a hundred kilobytes, and there may be thousands of compressed files.
const MOST_DECODERS: usize = 8;

/// Counts the decompressors at work.
#[derive(Clone, Debug, Default)]
pub(super) struct Decoders(Arc<()>);

impl Decoders {
    fn at_work(&self) -> usize {
        // One is the tailer's own, one for each file's link to it.
        Arc::strong_count(&self.0) - 1
    }
}

/// A compressed file, read once from its beginning. Bytes that the caller did not use are kept for its next read.
pub(super) struct Gz {
    file: File,
    head: Vec<u8>,
    /// At work, and the entry in the count.
    decoder: Option<(MultiGzDecoder<File>, Decoders)>,
    kept: Vec<u8>,
    kept_at: u64,
    ended: bool,
}

/// Opens a file for reading that pods may have had their hands in, as those that mount the node's /var/log. The path holds no links:
/// where one came into it meanwhile, the file is not where it says.
///
/// # Errors
/// It cannot be opened, lies elsewhere, or is a pipe, a device or a directory, which could block or answer without end.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if opened.parent() != path.parent() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a link leads to {}", opened.display())));
    }
    Ok(file)
}

impl Source {
    /// See [`open_regular`].
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::Plain(open_regular(path)?))
    }

    pub(super) fn open_gz(path: &Path) -> io::Result<Self> {
        let file = open_regular(path)?;
        let mut head = Vec::new();
        MultiGzDecoder::new(&file).take(HEAD as u64).read_to_end(&mut head)?;
        Ok(Self::Gz(Box::new(Gz { file, head, decoder: None, kept: Vec::new(), kept_at: 0, ended: false })))
    }

    /// Whether it can be read now: a compressed file waits for a decompressor, and has one from then on until its end.
    pub(super) fn may_read(&mut self, decoders: &Decoders) -> io::Result<bool> {
        let Self::Gz(gz) = self else { return Ok(true) };
        if gz.decoder.is_none() && !gz.ended {
            if decoders.at_work() >= MOST_DECODERS {
                return Ok(false);
            }
            let mut file = gz.file.try_clone()?;
            file.rewind()?;
            gz.decoder = Some((MultiGzDecoder::new(file), decoders.clone()));
        }
        Ok(true)
    }

    /// A second handle of the same plain file, for what follows a truncation.
    pub(super) fn again(&self) -> io::Result<Option<Self>> {
        match self {
            Self::Plain(file) => Ok(Some(Self::Plain(file.try_clone()?))),
            Self::Gz(_) => Ok(None),
        }
    }

    pub(super) fn metadata(&self) -> io::Result<Metadata> {
        match self {
            Self::Plain(file) => file.metadata(),
            Self::Gz(gz) => gz.file.metadata(),
        }
    }

    /// A compressed file that had no decompressor yet.
    pub(super) fn waits(&self) -> bool {
        matches!(self, Self::Gz(gz) if gz.decoder.is_none() && !gz.ended)
    }

    /// Device and inode.
    pub(super) fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Size in uncompressed bytes, of a compressed file what is known so far and one more than that until it ended; and the time of its
    /// last change, in nanoseconds since 1970.
    pub(super) fn state(&self) -> io::Result<(u64, i128)> {
        let metadata = self.metadata()?;
        let size = match self {
            Self::Plain(_) => metadata.len(),
            Self::Gz(gz) => gz.kept_at + gz.kept.len() as u64 + u64::from(!gz.ended),
        };
        Ok((size, i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())))
    }

    /// Size, as in [`Self::state`].
    pub(super) fn size(&self) -> io::Result<u64> {
        self.state().map(|(size, _)| size)
    }

    /// Of its first bytes.
    pub(super) fn fingerprint(&self) -> io::Result<Fingerprint> {
        self.with_head(Fingerprint::of)
    }

    /// The first bytes still are what the fingerprint was taken of.
    pub(super) fn begins_with(&self, fingerprint: Fingerprint) -> io::Result<bool> {
        self.with_head(|head| fingerprint.matches(head))
    }

    /// It is the file of the position. An empty fingerprint fits every file, and the inode may have been given to another: it says nothing.
    pub(super) fn is_at(&self, position: &Position) -> io::Result<bool> {
        let (dev, inode) = self.identity()?;
        // What is compressed is a file of its own.
        let same_file = matches!(self, Self::Gz(_)) || (inode == position.inode && (dev == position.dev || position.fingerprint.is_full()));
        Ok(same_file && position.fingerprint.len > 0 && self.begins_with(position.fingerprint)?)
    }

    fn with_head<T>(&self, of: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        match self {
            Self::Plain(file) => {
                let mut head = [0; HEAD];
                let len = file.read_at(&mut head, 0)?;
                Ok(of(&head[..len]))
            }
            Self::Gz(gz) => Ok(of(&gz.head)),
        }
    }

    /// Fills `buffer` from `offset`, as far as there is something. A compressed file can only go forward.
    pub(super) fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(buffer, offset),
            Self::Gz(gz) => gz.read_at(offset, buffer),
        }
    }
}

impl Gz {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut skip = offset.checked_sub(self.kept_at).ok_or(io::ErrorKind::InvalidInput)?;
        let from_kept = skip.min(self.kept.len() as u64);
        self.kept.drain(..usize::try_from(from_kept).unwrap_or(usize::MAX));
        self.kept_at += from_kept;
        skip -= from_kept;
        while skip > 0 && !self.ended {
            let step = buffer.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
            let read = self.decode(&mut buffer[..step])?;
            self.kept_at += read as u64;
            skip -= read as u64;
        }
        while self.kept.len() < buffer.len() && !self.ended {
            let start = self.kept.len();
            let mut more = vec![0; buffer.len() - start];
            let read = self.decode(&mut more)?;
            self.kept.extend_from_slice(&more[..read]);
        }
        let len = self.kept.len().min(buffer.len());
        buffer[..len].copy_from_slice(&self.kept[..len]);
        Ok(len)
    }

    fn decode(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some((decoder, _)) = &mut self.decoder else { return Err(io::Error::other("no decompressor is at work for it")) };
        let read = decoder.read(into)?;
        if read == 0 {
            self.ended = true;
            self.decoder = None;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_compressed_file_reads_like_the_plain_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log.1.gz");
        let text: Vec<u8> = (0..100_000_u32).flat_map(|n| format!("{n}\n").into_bytes()).collect();
        let mut encoder = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        encoder.write_all(&text).unwrap();
        encoder.finish().unwrap();
        let decoders = Decoders::default();
        let mut source = Source::open_gz(&path).unwrap();
        assert!(source.may_read(&decoders).unwrap());
        assert_eq!(source.fingerprint().unwrap(), Fingerprint::of(&text));
        assert!(source.begins_with(Fingerprint::of(&text[..100])).unwrap());
        let mut seen = Vec::new();
        let mut buffer = [0; 1000];
        let mut at = 5000;
        loop {
            let read = source.read_at(at, &mut buffer).unwrap();
            // Half of it is used, the rest is asked for again.
            let used = read.div_ceil(2);
            seen.extend_from_slice(&buffer[..used]);
            at += used as u64;
            if read == 0 {
                break;
            }
        }
        assert!(seen == text[5000..]);
        assert_eq!(source.size().unwrap(), text.len() as u64);
    }
}
