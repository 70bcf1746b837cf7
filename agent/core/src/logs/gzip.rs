//! Compression of a body while it is being written.
//!
//! A body of a mebibyte would lie in memory until its last event, once for each log stream. Instead it is compressed in parts, each of which
//! begins with nothing known, so that one compressor serves all streams; together they are one gzip member (RFC 1952), as any reader of
//! gzip takes it. What is lost by forgetting is about one in a hundred bytes.

use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::read::GzDecoder;
use flate2::{Compress, Compression, Crc, FlushCompress, Status};

/// Level 1: 5:1 to 30:1 on container logs at a tenth of level 6's CPU.
const LEVEL: u32 = 1;
/// Magic number, method 8 (deflate), no flags, no time, no extra flags, unknown system.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
/// Space that is made for output at once, in bytes.
const ROOM: usize = 8 << 10;

/// A deflate compressor that many bodies take turns with.
#[derive(Clone, Debug)]
pub struct Compressor(Arc<Mutex<Compress>>);

impl Default for Compressor {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Compress::new(Compression::new(LEVEL), false))))
    }
}

/// The beginning of a gzip member: whole parts. Nothing at first.
#[derive(Debug, Default)]
pub struct Member {
    compressed: Vec<u8>,
    checksum: Crc,
    plain: usize,
}

impl Member {
    /// Length of a part, in bytes: several times the 32 KiB that deflate looks back, and little enough for a processor's cache.
    pub const PART: usize = 64 << 10;

    /// Bytes of memory that it takes.
    pub fn held_bytes(&self) -> usize {
        self.compressed.capacity()
    }

    /// Length before compression.
    pub fn plain_bytes(&self) -> usize {
        self.plain
    }
}

impl Compressor {
    /// Adds a part to the member.
    pub fn append(&self, member: &mut Member, part: &[u8]) {
        self.deflate(member, part, FlushCompress::Sync);
    }

    /// Adds the last part, which may be empty, and closes the member.
    pub fn finish(&self, mut member: Member, part: &[u8]) -> Vec<u8> {
        self.deflate(&mut member, part, FlushCompress::Finish);
        let Member { mut compressed, checksum, .. } = member;
        compressed.extend_from_slice(&checksum.sum().to_le_bytes());
        compressed.extend_from_slice(&checksum.amount().to_le_bytes());
        compressed.shrink_to_fit();
        compressed
    }

    fn deflate(&self, member: &mut Member, part: &[u8], flush: FlushCompress) {
        // Whoever panicked with it in hand left nothing in it that matters: it is reset.
        let mut deflate = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        deflate.reset();
        if member.compressed.is_empty() {
            member.compressed.extend_from_slice(&HEADER);
        }
        member.checksum.update(part);
        member.plain += part.len();
        loop {
            member.compressed.reserve(ROOM);
            let taken = usize::try_from(deflate.total_in()).expect("a part is in memory");
            let status = deflate.compress_vec(&part[taken..], &mut member.compressed, flush).expect("the compressor is not finished yet");
            let done = if matches!(flush, FlushCompress::Finish) {
                status == Status::StreamEnd
            } else {
                // All is out when there was room for more.
                deflate.total_in() == part.len() as u64 && member.compressed.len() < member.compressed.capacity()
            };
            if done {
                return;
            }
        }
    }
}

/// The plain bytes of a member that was made here.
pub fn inflate(gzip: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    GzDecoder::new(gzip).read_to_end(&mut plain).expect("the compressor made it");
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_of_any_length_are_one_member(
            parts in proptest::collection::vec(prop_oneof![
                "[a-z ]{0,200}".prop_map(String::into_bytes),
                proptest::collection::vec(any::<u8>(), 0..2000),
                (0_usize..100_000).prop_map(|len| vec![b'x'; len]),
            ], 0..6),
            last in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let compressor = Compressor::default();
            let (mut one, mut other) = (Member::default(), Member::default());
            for part in &parts {
                compressor.append(&mut one, part);
                // Another stream's turn leaves no trace.
                compressor.append(&mut other, b"another body");
            }
            let plain: Vec<u8> = parts.concat();
            prop_assert_eq!(one.plain_bytes(), plain.len());
            prop_assert_eq!(inflate(&compressor.finish(one, &last)), [plain, last].concat());
            prop_assert_eq!(inflate(&compressor.finish(other, b"")), b"another body".repeat(parts.len()));
        }
    }

    #[test]
    fn parts_cost_little() {
        let body: Vec<u8> = (0..8000)
            .flat_map(|n| format!("{{\"timestamp\":{n},\"message\":\"GET /items/{} took {} ms\"}},", n * 7919 % 977, n % 31).into_bytes())
            .collect();
        let compressor = Compressor::default();
        let whole = compressor.finish(Member::default(), &body).len();
        let mut member = Member::default();
        body.chunks(Member::PART).for_each(|part| compressor.append(&mut member, part));
        let parted = compressor.finish(member, b"").len();
        assert!(parted * 100 < whole * 103, "{parted} bytes in parts, {whole} in one");
    }
}
