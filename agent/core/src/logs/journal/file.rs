//! Files of systemd's journal, read as they lie on the disk: a header, and objects that point at each other by their place in the file.
//!
//! Only what a sequential reader needs is followed: the chain of entry arrays, the entries in them, and the data objects that an entry
//! lists. Numbers are little-endian, objects begin at multiples of eight. An entry counts once the header counts it, so that a reader
//! beside the writer never sees half of one. The format: <https://systemd.io/JOURNAL_FILE_FORMAT/>.

use std::borrow::Cow;
use std::io::Read as _;

use ruzstd::decoding::StreamingDecoder;
use xz4rust::{XzDecoder, XzNextBlockResult};

/// Bytes of the header that are read: up to its last field that is used.
const HEADER_BYTES: usize = 208;
/// Largest object that is read whole; what is larger is no log line.
const MAX_OBJECT: u64 = 8 << 20;
/// Most bytes of a field once inflated; the rest is left out.
const MAX_FIELD: usize = 1 << 20;
/// Largest dictionary of an XZ stream, in bytes: what systemd's encoder is set to (`compress_blob_xz` in its src/basic/compress.c).
const XZ_DICTIONARY: usize = 1 << 20;
/// Bytes that an XZ stream is inflated by at a time.
const XZ_PORTION: usize = 16 << 10;

/// Flags of the header that change how objects lie; a file with others is not read.
const KEYED_HASH: u32 = 4;
const COMPRESSED: u32 = 1 | 2 | 8;
const COMPACT: u32 = 16;

const DATA: u8 = 1;
const ENTRY: u8 = 3;
const ENTRY_ARRAY: u8 = 6;

/// Why a journal file, or something in it, is not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Another file.
    #[error("not a journal file")]
    Signature,
    /// Written by a later systemd.
    #[error("journal file with unknown features {0:#x}")]
    Features(u32),
    /// The file does not go as far as its header says.
    #[error("journal file ends before byte {0}")]
    Short(u64),
    /// What is there is not what the pointer to it says.
    #[error("no object of the expected kind at byte {0}")]
    Object(u64),
    /// A field that cannot be inflated.
    #[error("cannot inflate the field at byte {0}")]
    Compression(u64),
}

/// Fills the buffer from the place; false if the file does not have so much.
pub trait ReadAt: Fn(u64, &mut [u8]) -> bool {}
impl<F: Fn(u64, &mut [u8]) -> bool> ReadAt for F {}

/// What the file's header says now; it changes with each entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The file's own id: it keeps it when it is renamed.
    pub file_id: [u8; 16],
    /// Entries that are complete.
    pub entries: u64,
    /// Where the last object begins, in bytes.
    pub tail: u64,
    entry_array: u64,
    compact: bool,
}

/// A place in the chain of entry arrays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    array: u64,
    index: u64,
    passed: u64,
}

/// Where an entry lies and when it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the file, in bytes. Entries lie in the order in which they were written.
    pub offset: u64,
    /// Microseconds since 1970.
    pub realtime_us: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |field| u32::from_le_bytes(field.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |field| u64::from_le_bytes(field.try_into().expect("eight bytes")))
}

fn take(read: &impl ReadAt, at: u64, buffer: &mut [u8]) -> Result<(), JournalError> {
    if read(at, buffer) { Ok(()) } else { Err(JournalError::Short(at.saturating_add(buffer.len() as u64))) }
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// Another file, or one of a later systemd.
    pub fn read(read: &impl ReadAt) -> Result<Self, JournalError> {
        let mut bytes = [0; HEADER_BYTES];
        if !read(0, &mut bytes) || !bytes.starts_with(b"LPKSHHRH") {
            return Err(JournalError::Signature);
        }
        let features = u32_at(&bytes, 12);
        if features & !(KEYED_HASH | COMPRESSED | COMPACT) != 0 {
            return Err(JournalError::Features(features));
        }
        Ok(Self {
            file_id: bytes[24..40].try_into().expect("sixteen bytes"),
            entries: u64_at(&bytes, 152),
            tail: u64_at(&bytes, 136),
            entry_array: u64_at(&bytes, 176),
            compact: features & COMPACT != 0,
        })
    }

    /// The file's id as text.
    pub fn id(&self) -> String {
        self.file_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn item_bytes(&self) -> u64 {
        if self.compact { 4 } else { 8 }
    }

    /// The items that an entry array has room for, and the next array.
    fn array(&self, read: &impl ReadAt, at: u64) -> Result<(u64, u64), JournalError> {
        let mut head = [0; 24];
        take(read, at, &mut head)?;
        let size = u64_at(&head, 8);
        if head[0] != ENTRY_ARRAY || size < 24 {
            return Err(JournalError::Object(at));
        }
        Ok(((size - 24) / self.item_bytes(), u64_at(&head, 16)))
    }

    fn item(&self, read: &impl ReadAt, array: u64, index: u64) -> Result<u64, JournalError> {
        let mut item = [0; 8];
        let width = if self.compact { 4 } else { 8 };
        // An array says how long it is, and may say anything: what is behind the last number is nowhere.
        let at = array.saturating_add(24).saturating_add(index.saturating_mul(self.item_bytes()));
        take(read, at, &mut item[..width])?;
        Ok(u64::from_le_bytes(item))
    }

    /// The place of the next entry, and the cursor behind it; `None` where no entry is complete yet.
    ///
    /// # Errors
    /// The chain of arrays is broken.
    pub fn next(&self, read: &impl ReadAt, cursor: &mut Cursor) -> Result<Option<u64>, JournalError> {
        while cursor.passed < self.entries {
            if cursor.array == 0 {
                if self.entry_array == 0 {
                    return Ok(None);
                }
                cursor.array = self.entry_array;
            }
            let (room, next) = self.array(read, cursor.array)?;
            if cursor.index < room {
                let offset = self.item(read, cursor.array, cursor.index)?;
                if offset == 0 {
                    return Ok(None);
                }
                cursor.index += 1;
                cursor.passed += 1;
                return Ok(Some(offset));
            }
            if next <= cursor.array {
                return if next == 0 { Ok(None) } else { Err(JournalError::Object(cursor.array)) };
            }
            *cursor = Cursor { array: next, index: 0, passed: cursor.passed };
        }
        Ok(None)
    }

    /// A cursor before the first entry at or behind `offset`.
    ///
    /// # Errors
    /// The chain of arrays is broken.
    pub fn seek(&self, read: &impl ReadAt, offset: u64) -> Result<Cursor, JournalError> {
        let mut cursor = Cursor::default();
        if offset == 0 || self.entry_array == 0 {
            return Ok(cursor);
        }
        cursor.array = self.entry_array;
        loop {
            let (room, next) = self.array(read, cursor.array)?;
            let filled = room.min(self.entries - cursor.passed);
            if filled == 0 {
                return Ok(cursor);
            }
            let last = self.item(read, cursor.array, filled - 1)?;
            if last != 0 && last < offset && filled == room && next > cursor.array {
                cursor = Cursor { array: next, index: 0, passed: cursor.passed + filled };
                continue;
            }
            // The first of the array's items that is not before the place.
            let (mut low, mut high) = (0, filled);
            while low < high {
                let middle = u64::midpoint(low, high);
                let item = self.item(read, cursor.array, middle)?;
                if item != 0 && item < offset { low = middle + 1 } else { high = middle }
            }
            return Ok(Cursor { array: cursor.array, index: low, passed: cursor.passed + low });
        }
    }

    /// Reads the entry at the place; `field` gets each of its fields as `NAME=value`.
    ///
    /// # Errors
    /// No entry is there, or a field cannot be read.
    pub fn entry(&self, read: &impl ReadAt, offset: u64, mut field: impl FnMut(&[u8])) -> Result<Entry, JournalError> {
        let mut head = [0; 64];
        take(read, offset, &mut head)?;
        let size = u64_at(&head, 8);
        if head[0] != ENTRY || !(64..=MAX_OBJECT).contains(&size) {
            return Err(JournalError::Object(offset));
        }
        let mut items = vec![0; usize::try_from(size - 64).unwrap_or(0)];
        take(read, offset + 64, &mut items)?;
        let mut object = Vec::new();
        for item in items.chunks_exact(if self.compact { 4 } else { 16 }) {
            let at = if self.compact { u64::from(u32_at(item, 0)) } else { u64_at(item, 0) };
            field(&self.data(read, at, &mut object)?);
        }
        Ok(Entry { offset, realtime_us: u64_at(&head, 24) })
    }

    fn data<'a>(&self, read: &impl ReadAt, at: u64, object: &'a mut Vec<u8>) -> Result<Cow<'a, [u8]>, JournalError> {
        let mut head = [0; 16];
        take(read, at, &mut head)?;
        let (size, payload) = (u64_at(&head, 8), if self.compact { 72 } else { 64 });
        if head[0] != DATA || !(payload..=MAX_OBJECT).contains(&size) {
            return Err(JournalError::Object(at));
        }
        object.resize(usize::try_from(size - payload).unwrap_or(0), 0);
        take(read, at + payload, object)?;
        match head[1] & 7 {
            0 => Ok(Cow::Borrowed(object)),
            1 => xz(object).map(Cow::Owned).ok_or(JournalError::Compression(at)),
            2 => lz4(object).map(Cow::Owned).ok_or(JournalError::Compression(at)),
            4 => zstd(object).map(Cow::Owned).ok_or(JournalError::Compression(at)),
            _ => Err(JournalError::Compression(at)),
        }
    }
}

fn zstd(frame: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    StreamingDecoder::new(frame).ok()?.take(MAX_FIELD as u64).read_to_end(&mut text).ok()?;
    Some(text)
}

/// A whole `.xz` stream, as systemd writes it where it was built without the others.
fn xz(stream: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = XzDecoder::in_heap_with_alloc_dict_size(0, XZ_DICTIONARY);
    let (mut text, mut portion, mut at) = (Vec::new(), vec![0; XZ_PORTION], 0);
    while text.len() < MAX_FIELD {
        let step = decoder.decode(stream.get(at..)?, &mut portion).ok()?;
        let (used, filled) = (step.input_consumed(), step.output_produced());
        text.extend_from_slice(&portion[..filled]);
        at += used;
        if matches!(step, XzNextBlockResult::EndOfStream(..)) {
            return Some(text);
        }
        // What ends too early asks for more for ever.
        if used == 0 && filled == 0 {
            return None;
        }
    }
    text.truncate(MAX_FIELD);
    Some(text)
}

/// The size of the text in eight bytes, then a raw block (<https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md>).
fn lz4(object: &[u8]) -> Option<Vec<u8>> {
    let size = usize::try_from(u64_at(object, 0)).ok()?.min(MAX_FIELD);
    let mut rest = object.get(8..)?;
    let mut text = Vec::new();
    while let Some((&token, after)) = rest.split_first() {
        rest = after;
        let literals = length(usize::from(token >> 4), &mut rest)?;
        text.extend_from_slice(rest.get(..literals)?);
        rest = &rest[literals..];
        if text.len() >= size || rest.is_empty() {
            break;
        }
        let back = usize::from(u16::from_le_bytes([*rest.first()?, *rest.get(1)?]));
        rest = &rest[2..];
        let count = length(usize::from(token & 15), &mut rest)? + 4;
        let from = text.len().checked_sub(back).filter(|_| back > 0)?;
        if text.len() + count > MAX_FIELD + (64 << 10) {
            break;
        }
        // A match may reach into what it writes itself.
        for at in from..from + count {
            text.push(text[at]);
        }
    }
    text.truncate(size);
    Some(text)
}

/// A length whose four bits are all ones goes on in bytes, the last of which is below 255.
fn length(bits: usize, rest: &mut &[u8]) -> Option<usize> {
    let mut length = bits;
    if bits == 15 {
        loop {
            let (&byte, after) = rest.split_first()?;
            *rest = after;
            length += usize::from(byte);
            if byte < 255 {
                break;
            }
        }
    }
    Some(length)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::super::tests::{FILES, file, in_memory};
    use super::*;

    /// Where the first array of entries begins in both files, about.
    const FIRST_ARRAY: usize = 3_735_220;
    static INTACT: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| FILES.map(file));

    fn offsets(bytes: &[u8], from: u64) -> Vec<u64> {
        let read = in_memory(bytes);
        let header = Header::read(&read).unwrap();
        let mut cursor = header.seek(&read, from).unwrap();
        std::iter::from_fn(|| header.next(&read, &mut cursor).unwrap()).collect()
    }

    #[test]
    fn entries_are_found_from_any_place_on() {
        for name in FILES {
            let bytes = file(name);
            let all = offsets(&bytes, 0);
            assert_eq!(all.len(), 308, "{name}");
            assert!(all.is_sorted());
            for (index, offset) in all.iter().enumerate() {
                assert_eq!(offsets(&bytes, *offset), all[index..], "{name}");
                assert_eq!(offsets(&bytes, *offset + 1), all[index + 1..], "{name}");
            }
        }
    }

    #[test]
    fn an_entry_that_the_header_does_not_count_is_not_there_yet() {
        let mut bytes = file("zstd");
        bytes[152..160].copy_from_slice(&5_u64.to_le_bytes());
        assert_eq!(offsets(&bytes, 0).len(), 5);
        let all = offsets(&file("zstd"), 0);
        assert_eq!(offsets(&bytes, all[200]), Vec::<u64>::new());
    }

    #[test]
    fn what_is_no_journal_is_told() {
        let header = |bytes: &[u8]| Header::read(&in_memory(bytes)).unwrap_err();
        assert_eq!(header(b"LPKSHHRH"), JournalError::Signature);
        assert_eq!(header(&[0; 300]), JournalError::Signature);
        let mut later = file("zstd");
        later[13] = 1;
        assert_eq!(header(&later), JournalError::Features(0x10c));
    }

    /// Of [`TEXT`], with systemd's filter and without a checksum, as liblzma 5.4 encodes it.
    const XZ: &str = "fd377a585a000000ff12d9410200210110000000a8708e86e00e1c002f5d00269146acd06f74b8a61d01d7f1a9ee27714df9fa052e4646bd3c06\
                      69175bcec43212f12161750a333d26087d9b620000000001439d1c00000099a7c079a8000afc020000000000595a";
    static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| format!("MESSAGE=long {}", "abcdefgh ".repeat(400)).into_bytes());

    fn xz_stream() -> Vec<u8> {
        XZ.as_bytes().chunks(2).map(|digits| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn an_xz_stream_is_inflated() {
        let stream = xz_stream();
        assert_eq!(xz(&stream).unwrap(), *TEXT);
        for end in 0..stream.len() {
            assert_eq!(xz(&stream[..end]), None, "it ends after {end} bytes");
        }
    }

    #[test]
    fn a_field_in_xz_is_read_as_in_zstd() {
        for (name, (payload, pointer)) in FILES.into_iter().zip([(64, 8), (72, 4)]) {
            let mut bytes = file(name);
            let zstd = bytes.windows(4).position(|four| four == [0x28, 0xb5, 0x2f, 0xfd]).unwrap() - payload;
            // The object anew, behind all others, and the entry points there.
            let stream = xz_stream();
            let place = bytes.len().next_multiple_of(8);
            bytes.resize(place, 0);
            bytes.extend([DATA, 1, 0, 0, 0, 0, 0, 0]);
            bytes.extend(((payload + stream.len()) as u64).to_le_bytes());
            bytes.resize(place + payload, 0);
            bytes.extend(stream);
            let (old, new) = (zstd.to_le_bytes(), place.to_le_bytes());
            let pointers: Vec<usize> = (0..place - 8).step_by(4).filter(|at| bytes[*at..*at + pointer] == old[..pointer]).collect();
            for at in pointers {
                bytes[at..at + pointer].copy_from_slice(&new[..pointer]);
            }
            let read = in_memory(&bytes);
            let header = Header::read(&read).unwrap();
            let (mut cursor, mut seen) = (Cursor::default(), 0);
            while let Some(offset) = header.next(&read, &mut cursor).unwrap() {
                header.entry(&read, offset, |field| seen += usize::from(field == *TEXT)).unwrap();
            }
            assert_eq!(seen, 1, "{name}");
        }
    }

    #[test]
    fn an_lz4_block_is_inflated() {
        // "abcabcabcabcabc!": three literals, a match of twelve that overlaps itself, one literal.
        let block = [&16_u64.to_le_bytes()[..], &[0x38, b'a', b'b', b'c', 3, 0, 0x10, b'!']].concat();
        assert_eq!(lz4(&block).unwrap(), b"abcabcabcabcabc!");
        let long = [&300_u64.to_le_bytes()[..], &[0xf0, 255, 30], &[b'x'; 300]].concat();
        assert_eq!(lz4(&long).unwrap(), [b'x'; 300]);
        assert_eq!(lz4(&[&9_u64.to_le_bytes()[..], &[0x10, b'a', 9, 0]].concat()), None, "a match from before the text");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// Whatever bytes a broken disk gives: an error, an end, or entries, but no panic and no endless chain.
        #[test]
        fn broken_files_end(changes in proptest::collection::vec((0_usize..30_000, any::<u8>()), 1..60), compact in any::<bool>()) {
            let mut bytes = INTACT[usize::from(compact)].clone();
            for (at, byte) in changes {
                // The header is hit as often as the first objects behind the hash tables.
                bytes[if at % 3 == 0 { at % 208 } else { FIRST_ARRAY + at }] = byte;
            }
            let read = in_memory(&bytes);
            if let Ok(header) = Header::read(&read) {
                let mut cursor = header.seek(&read, 9000).unwrap_or_default();
                let mut seen = 0;
                while let Ok(Some(offset)) = header.next(&read, &mut cursor) {
                    let _ = header.entry(&read, offset, |_| {});
                    seen += 1;
                    prop_assert!(seen < 50_000);
                }
            }
        }

        #[test]
        fn any_block_ends(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = lz4(&block);
            let _ = zstd(&block);
            let _ = xz(&block);
        }
    }
}
