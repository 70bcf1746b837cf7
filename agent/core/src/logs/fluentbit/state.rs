//! What Fluent Bit leaves on a node: how far it read each file, and what it read but did not send.

use std::collections::HashMap;

use super::sqlite::{Database, SqliteError, Value};

/// A row of the table `in_tail_files`. The number of bytes that were read, not of those that were delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TailFile {
    id: i64,
    name: String,
    offset: u64,
}

/// How far the files of one `tail` input were read, by their inodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TailFiles(HashMap<u64, Vec<TailFile>>);

impl TailFiles {
    /// Of the bytes of a database, and of those of its `-wal`. Empty for a database of another input.
    ///
    /// # Errors
    /// It is no database, or its pages do not fit together.
    pub fn read(file: &[u8], log: &[u8]) -> Result<Self, SqliteError> {
        let rows = Database::open(file, log)?.table("in_tail_files")?.unwrap_or_default();
        let mut files: HashMap<u64, Vec<TailFile>> = HashMap::new();
        for row in rows {
            // id, name, offset, inode, created, rotated, and what later releases added.
            if let [_, Value::Text(name), Value::Integer(offset), Value::Integer(inode), ..] = &row.values[..]
                && let (Ok(name), Ok(offset)) = (std::str::from_utf8(name), u64::try_from(*offset))
            {
                // Inode numbers are kept in signed columns.
                files.entry(inode.cast_unsigned()).or_default().push(TailFile { id: row.id, name: name.to_owned(), offset });
            }
        }
        Ok(Self(files))
    }

    /// How far the file with this inode was read. Rows stay when files go, and the file system gives their inodes to others: only names
    /// that `is_its` tells to be the file's count, and of these the latest.
    pub fn offset(&self, inode: u64, is_its: impl Fn(&str) -> bool) -> Option<u64> {
        let rows = self.0.get(&inode)?.iter().filter(|row| is_its(&row.name));
        rows.max_by_key(|row| row.id).map(|row| row.offset)
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether a chunk, by its metadata, may hold lines of the file with this name under /var/log/containers. They have the tag, into which
/// the Container Insights layout and the input's own default put the file's path with dots for slashes; a tag without it may be of any file.
pub fn chunk_may_be_of(metadata: &[u8], file_name: &str) -> bool {
    let names_a_file = memchr::memmem::find(metadata, b"var.log.containers.").is_some();
    !names_a_file || memchr::memmem::find(metadata, file_name.as_bytes()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_that_went_to_another_file_says_nothing_of_it() {
        let row = |id, name: &str, offset| TailFile { id, name: name.to_owned(), offset };
        let files = TailFiles(HashMap::from([(7, vec![row(3, "/a.log", 10), row(9, "/a.log", 30), row(12, "/b.log", 50)])]));
        assert_eq!(files.offset(7, |name| name == "/a.log"), Some(30));
        assert_eq!(files.offset(7, |name| name == "/c.log"), None);
        assert_eq!(files.offset(8, |_| true), None);
    }

    #[test]
    fn a_chunk_is_of_the_file_that_its_tag_names() {
        let metadata = b"\xf1\x77\x00\x00application.var.log.containers.web-1_shop_app-0a.log";
        assert!(chunk_may_be_of(metadata, "web-1_shop_app-0a.log"));
        assert!(!chunk_may_be_of(metadata, "web-2_shop_app-0b.log"));
        assert!(chunk_may_be_of(b"\xf1\x77\x00\x00kube", "web-2_shop_app-0b.log"), "of any");
    }
}
