//! Tables of an SQLite database, read from the bytes of its file and of its write-ahead log:
//! <https://www.sqlite.org/fileformat2.html>.
//!
//! It reads what Fluent Bit's databases are made of: tables with row ids, committed. It has no indexes, no SQL, and takes no locks: whoever
//! writes at the same time makes a page that does not fit, which is an error, or a frame whose checksum is wrong, which is not there yet.
//! SQLite's library would bring all of its C into the agent for one table that is read once; it is what the tests compare with.

use std::collections::HashMap;

/// Bytes before the first page's own header.
const FILE_HEADER: usize = 100;
/// Bytes before a log's first frame, and before a frame's page.
const LOG_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// Why a database is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SqliteError {
    /// Another file, or one that is encrypted.
    #[error("it does not begin as an SQLite database does")]
    NotADatabase,
    /// A page that is named is not there, or is not what it is named as.
    #[error("page {0} is not what the database says it is; another process may be writing it")]
    Page(u32),
    /// More pages lead to a table than there are.
    #[error("its pages go in circles")]
    Circle,
}

/// A value of a row; floating-point numbers and blobs are not told apart from NULL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// NULL, and what is not read.
    Null,
    /// A number, also a boolean.
    Integer(i64),
    /// Text, in the encoding of the database.
    Text(Vec<u8>),
}

/// A row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// What an `INTEGER PRIMARY KEY` is; the column itself is NULL.
    pub(super) id: i64,
    /// Columns as the table declares them. Columns that were added to the table later may be missing.
    pub(super) values: Vec<Value>,
}

/// A database in memory.
#[derive(Debug)]
pub(super) struct Database<'a> {
    file: &'a [u8],
    /// Pages as the log has them, by their numbers.
    log: HashMap<u32, &'a [u8]>,
    page_size: usize,
    /// Bytes of a page that hold content.
    usable: usize,
}

impl<'a> Database<'a> {
    /// Of the file's bytes, and those of its `-wal`, which is empty where there is none.
    ///
    /// # Errors
    /// It is no database.
    pub(super) fn open(file: &'a [u8], log: &'a [u8]) -> Result<Self, SqliteError> {
        let log = committed(log);
        // A new database may be in its log alone.
        let first = log.get(&1).copied().unwrap_or(file);
        if !first.starts_with(b"SQLite format 3\0") || first.len() < FILE_HEADER {
            return Err(SqliteError::NotADatabase);
        }
        let page_size = page_size(u32::from(be16(first, 16).unwrap_or(0))).ok_or(SqliteError::NotADatabase)?;
        let usable = page_size - usize::from(first[20]);
        if usable < 480 || log.values().any(|page| page.len() != page_size) {
            return Err(SqliteError::NotADatabase);
        }
        Ok(Self { file, log, page_size, usable })
    }

    /// Rows of the table, in the order of their ids; `None` where there is no such table.
    ///
    /// # Errors
    /// Pages that do not fit together.
    pub(super) fn table(&self, name: &str) -> Result<Option<Vec<Row>>, SqliteError> {
        // sqlite_schema: type, name, tbl_name, rootpage, sql.
        for row in self.rows(1)? {
            if let [Value::Text(kind), Value::Text(named), _, Value::Integer(root), ..] = &row.values[..]
                && kind == b"table"
                && named == name.as_bytes()
            {
                return self.rows(u32::try_from(*root).map_err(|_| SqliteError::Page(1))?).map(Some);
            }
        }
        Ok(None)
    }

    /// Rows of the tree with this root.
    fn rows(&self, root: u32) -> Result<Vec<Row>, SqliteError> {
        let mut left = self.file.len() / self.page_size + self.log.len();
        let mut rows = Vec::new();
        let mut stack = vec![root];
        while let Some(number) = stack.pop() {
            left = left.checked_sub(1).ok_or(SqliteError::Circle)?;
            let page = self.page(number)?;
            let bad = SqliteError::Page(number);
            let header = if number == 1 { FILE_HEADER } else { 0 };
            let cells = usize::from(be16(page, header + 3).ok_or(bad)?);
            match page.get(header) {
                // An inner page: children, each with the greatest id below it, and the last child.
                Some(0x05) => {
                    stack.push(be32(page, header + 8).ok_or(bad)?);
                    for cell in (0..cells).rev() {
                        let at = be16(page, header + 12 + 2 * cell).ok_or(bad)?;
                        stack.push(be32(page, usize::from(at)).ok_or(bad)?);
                    }
                }
                Some(0x0d) => {
                    for cell in 0..cells {
                        let at = usize::from(be16(page, header + 8 + 2 * cell).ok_or(bad)?);
                        let cell = page.get(at..self.usable).ok_or(bad)?;
                        rows.push(self.row(cell, &mut left)?.ok_or(bad)?);
                    }
                }
                _ => return Err(bad),
            }
        }
        Ok(rows)
    }

    /// A row from its cell: the length of its record, its id, the record. What does not fit is in a chain of other pages.
    fn row(&self, cell: &[u8], left: &mut usize) -> Result<Option<Row>, SqliteError> {
        let Some((len, rest)) = varint(cell) else { return Ok(None) };
        let Some((id, rest)) = varint(rest) else { return Ok(None) };
        let Ok(len) = usize::try_from(len) else { return Ok(None) };
        if len > self.file.len() + self.log.len() * self.page_size {
            return Ok(None);
        }
        let most = self.usable - 35;
        let here = if len <= most {
            len
        } else {
            let least = (self.usable - 12) * 32 / 255 - 23;
            let here = least + (len - least) % (self.usable - 4);
            if here > most { least } else { here }
        };
        let Some(begin) = rest.get(..here) else { return Ok(None) };
        let mut record = begin.to_vec();
        let mut next = if here < len { be32(rest, here) } else { Some(0) };
        while record.len() < len {
            let Some(number) = next.filter(|number| *number != 0) else { return Ok(None) };
            *left = left.checked_sub(1).ok_or(SqliteError::Circle)?;
            let page = self.page(number)?;
            record.extend_from_slice(&page[4..self.usable.min(4 + len - record.len())]);
            next = be32(page, 0);
        }
        #[expect(clippy::cast_possible_wrap, reason = "ids are signed, in two's complement")]
        Ok(values(&record).map(|values| Row { id: id as i64, values }))
    }

    fn page(&self, number: u32) -> Result<&'a [u8], SqliteError> {
        let from_file = || {
            let at = (number as usize).checked_sub(1)?.checked_mul(self.page_size)?;
            self.file.get(at..at.checked_add(self.page_size)?)
        };
        self.log.get(&number).copied().or_else(from_file).ok_or(SqliteError::Page(number))
    }
}

/// The pages that the log's last commit left, by their numbers.
fn committed(log: &[u8]) -> HashMap<u32, &[u8]> {
    let mut done = HashMap::new();
    let Some((header, mut rest)) = log.split_at_checked(LOG_HEADER) else { return done };
    let big_endian = match be32(header, 0) {
        Some(0x377f_0682) => false,
        Some(0x377f_0683) => true,
        _ => return done,
    };
    let Some(size) = be32(header, 8).and_then(page_size) else { return done };
    let mut sum = checksum((0, 0), &header[..24], big_endian);
    if sums(header, 24) != Some(sum) {
        return done;
    }
    let mut open = Vec::new();
    while let Some((frame, after)) = rest.split_at_checked(FRAME_HEADER + size) {
        let (head, page) = frame.split_at(FRAME_HEADER);
        sum = checksum(checksum(sum, &head[..8], big_endian), page, big_endian);
        // Salts of an earlier turn of the log: what follows was overwritten in part, and is in the file already.
        if head[8..16] != header[16..24] || sums(head, 16) != Some(sum) {
            break;
        }
        open.push((be32(head, 0).unwrap_or(0), page));
        if be32(head, 4) != Some(0) {
            done.extend(open.drain(..));
        }
        rest = after;
    }
    done
}

/// The log's checksum goes on over these bytes, whose number is a multiple of eight.
fn checksum((mut a, mut b): (u32, u32), bytes: &[u8], big_endian: bool) -> (u32, u32) {
    let word = |word: u32| if big_endian { word } else { word.swap_bytes() };
    for pair in bytes.as_chunks::<8>().0 {
        let pair = u64::from_be_bytes(*pair);
        a = a.wrapping_add(word((pair >> 32) as u32)).wrapping_add(b);
        b = b.wrapping_add(word(pair as u32)).wrapping_add(a);
    }
    (a, b)
}

fn sums(bytes: &[u8], at: usize) -> Option<(u32, u32)> {
    Some((be32(bytes, at)?, be32(bytes, at + 4)?))
}

/// A power of two from 512; the file's two bytes say 1 for 65536.
fn page_size(said: u32) -> Option<usize> {
    let size = if said == 1 { 65536 } else { said };
    ((512..=65536).contains(&size) && size.is_power_of_two()).then_some(size as usize)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Seven bits a byte, the greatest first; a ninth byte has eight.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(9) {
        if index == 8 {
            return Some((value << 8 | u64::from(*byte), &bytes[9..]));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

/// A record: the length of its header, a type for each column, then their contents.
fn values(record: &[u8]) -> Option<Vec<Value>> {
    let (header, _) = varint(record)?;
    let (header, mut body) = record.split_at_checked(usize::try_from(header).ok()?)?;
    let (_, mut types) = varint(header)?;
    let mut values = Vec::new();
    while !types.is_empty() {
        let (kind, rest) = varint(types)?;
        types = rest;
        let len = match kind {
            0 | 8 | 9 => 0,
            1..=4 => kind,
            5 => 6,
            6 | 7 => 8,
            12.. => (kind - 12) / 2,
            _ => return None,
        };
        let (content, rest) = body.split_at_checked(usize::try_from(len).ok()?)?;
        body = rest;
        values.push(match kind {
            1..=6 => {
                let sign = if content.first().is_some_and(|byte| byte & 0x80 != 0) { -1 } else { 0 };
                Value::Integer(content.iter().fold(sign, |value, byte| value << 8 | i64::from(*byte)))
            }
            8 => Value::Integer(0),
            9 => Value::Integer(1),
            kind if kind >= 13 && kind % 2 == 1 => Value::Text(content.to_vec()),
            _ => Value::Null,
        });
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use rusqlite::{Connection, params};

    use super::*;

    /// Fluent Bit's table, and statements like its own.
    const CREATE: &str = "CREATE TABLE IF NOT EXISTS in_tail_files (id INTEGER PRIMARY KEY, name TEXT NOT NULL, offset INTEGER, inode INTEGER, created INTEGER, rotated INTEGER DEFAULT 0);";
    const INSERT: &str = "INSERT INTO in_tail_files (name, offset, inode, created) VALUES (?, ?, ?, 1700000000)";

    #[derive(Clone, Debug)]
    enum Statement {
        Insert { name: usize, offset: i64, inode: i64 },
        Offset { row: i64, offset: i64 },
        Rotate { row: i64, name: usize },
        Delete { row: i64 },
        Column { number: usize },
        Checkpoint,
    }

    fn statement() -> impl Strategy<Value = Statement> {
        // Of every length that a column's type can have, and longer than a page.
        let number =
            || prop_oneof![Just(0), Just(1), Just(-1), any::<i8>().prop_map(i64::from), any::<i32>().prop_map(i64::from), any::<i64>()];
        let name = || prop_oneof![0_usize..200, 0_usize..200, 0_usize..9000];
        let row = || 1_i64..40;
        prop_oneof![
            4 => (name(), number(), number()).prop_map(|(name, offset, inode)| Statement::Insert { name, offset, inode }),
            4 => (row(), number()).prop_map(|(row, offset)| Statement::Offset { row, offset }),
            1 => (row(), name()).prop_map(|(row, name)| Statement::Rotate { row, name }),
            1 => row().prop_map(|row| Statement::Delete { row }),
            1 => (0_usize..3).prop_map(|number| Statement::Column { number }),
            1 => Just(Statement::Checkpoint),
        ]
    }

    fn execute(connection: &Connection, statement: &Statement) {
        let name = |len: &usize| format!("/var/log/containers/{}.log", "x".repeat(*len));
        let done = match statement {
            Statement::Insert { name: len, offset, inode } => connection.execute(INSERT, params![name(len), offset, inode]),
            Statement::Offset { row, offset } => connection.execute("UPDATE in_tail_files set offset=? WHERE id=?", params![offset, row]),
            Statement::Rotate { row, name: len } => {
                connection.execute("UPDATE in_tail_files set name=?,rotated=1 WHERE id=?", params![name(len), row])
            }
            Statement::Delete { row } => connection.execute("DELETE FROM in_tail_files WHERE id=?", params![row]),
            Statement::Column { number } => {
                let sql = format!("ALTER TABLE in_tail_files ADD COLUMN more_{number} INTEGER DEFAULT 0");
                // It may be there already.
                Ok(connection.execute(&sql, []).unwrap_or(0))
            }
            Statement::Checkpoint => connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(0)),
        };
        done.unwrap();
    }

    fn database(dir: &Path, page_size: u32, log: Option<u32>, statements: &[Statement]) -> Connection {
        let connection = Connection::open(dir.join("flb.db")).unwrap();
        let mode = if log.is_some() { "WAL" } else { "DELETE" };
        let pragmas =
            format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={mode}; PRAGMA wal_autocheckpoint={}", log.unwrap_or_default());
        connection.execute_batch(&pragmas).unwrap();
        connection.execute_batch("PRAGMA synchronous=NORMAL").unwrap();
        connection.execute(CREATE, []).unwrap();
        statements.iter().for_each(|statement| execute(&connection, statement));
        connection
    }

    fn files(dir: &Path) -> (Vec<u8>, Vec<u8>) {
        (std::fs::read(dir.join("flb.db")).unwrap(), std::fs::read(dir.join("flb.db-wal")).unwrap_or_default())
    }

    type Found = Vec<(i64, Vec<u8>, i64, i64)>;

    fn as_sqlite_says(connection: &Connection) -> Found {
        let mut query = connection.prepare("SELECT id, name, offset, inode FROM in_tail_files ORDER BY id").unwrap();
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?.into_bytes(), row.get(2)?, row.get(3)?))).unwrap();
        rows.map(Result::unwrap).collect()
    }

    fn as_read_here((file, log): &(Vec<u8>, Vec<u8>)) -> Found {
        let rows = Database::open(file, log).unwrap().table("in_tail_files").unwrap().unwrap();
        let rows = rows.into_iter().map(|row| match <[Value; 4]>::try_from(row.values[..4].to_vec()) {
            Ok([Value::Null, Value::Text(name), Value::Integer(offset), Value::Integer(inode)]) => (row.id, name, offset, inode),
            values => panic!("{values:?}"),
        });
        rows.collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_sqlite_wrote_is_read(
            page_size in prop::sample::select(&[512_u32, 1024, 4096, 65536][..]),
            log in prop::option::of(prop::sample::select(&[1_u32, 10, 1000][..])),
            statements in prop::collection::vec(statement(), 0..80),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let connection = database(dir.path(), page_size, log, &statements);
            let wanted = as_sqlite_says(&connection);
            prop_assert_eq!(as_read_here(&files(dir.path())), wanted.clone(), "while it is open");
            connection.close().unwrap();
            let closed = files(dir.path());
            prop_assert!(closed.1.is_empty(), "the log goes when it is closed");
            prop_assert_eq!(as_read_here(&closed), wanted);
        }

        #[test]
        fn damaged_bytes_are_read_or_refused(
            statements in prop::collection::vec(statement(), 1..30),
            places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
            cut in any::<prop::sample::Index>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let _open = database(dir.path(), 512, Some(10), &statements);
            let (mut file, log) = files(dir.path());
            for (place, byte) in &places {
                let at = place.index(file.len());
                file[at] = *byte;
            }
            for (file, log) in [(&file[..], &log[..]), (&file[..], b""), (&file[..cut.index(file.len())], b"")] {
                let _ = Database::open(file, log).and_then(|database| database.table("in_tail_files"));
            }
        }
    }

    fn inserts(count: i64) -> Vec<Statement> {
        (0..count).map(|inode| Statement::Insert { name: 60, offset: 70_000, inode }).collect()
    }

    #[test]
    fn a_commit_that_was_cut_off_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let _open = database(dir.path(), 1024, Some(1000), &inserts(11));
        let (file, log) = files(dir.path());
        let frame = FRAME_HEADER + 1024;
        let rows = |log: &[u8]| {
            Database::open(&file, log).and_then(|database| database.table("in_tail_files")).map(|rows| rows.map_or(0, |rows| rows.len()))
        };
        let mut counts = Vec::new();
        for end in (LOG_HEADER..=log.len()).step_by(frame) {
            let whole = rows(&log[..end]);
            assert_eq!(whole, rows(&log[..(end + frame / 2).min(log.len())]), "half a frame more says nothing");
            counts.extend(whole);
        }
        assert!(counts.is_sorted());
        assert_eq!(counts.last(), Some(&11));
        let mut torn = log.clone();
        torn[LOG_HEADER + FRAME_HEADER + 100] ^= 1;
        assert!(committed(&torn).is_empty(), "a frame with a wrong sum ends the log");
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(Database::open(b"", b"").unwrap_err(), SqliteError::NotADatabase);
        assert_eq!(Database::open(b"# a file\n", b"").unwrap_err(), SqliteError::NotADatabase);
        let dir = tempfile::tempdir().unwrap();
        drop(database(dir.path(), 1024, None, &inserts(100)));
        let (mut file, _) = files(dir.path());
        assert_eq!(Database::open(&file, b"").unwrap().table("in_systemd_cursor").unwrap(), None);
        assert_eq!(Database::open(&file[..1024], b"").unwrap().table("in_tail_files"), Err(SqliteError::Page(2)), "cut off");
        // The first page becomes an inner one whose only child is itself.
        file[FILE_HEADER] = 0x05;
        file[FILE_HEADER + 3..FILE_HEADER + 5].fill(0);
        file[FILE_HEADER + 8..FILE_HEADER + 12].copy_from_slice(&1_u32.to_be_bytes());
        assert_eq!(Database::open(&file, b"").unwrap().table("in_tail_files"), Err(SqliteError::Circle));
    }
}
