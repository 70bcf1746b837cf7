//! Fast compression for bodies of log events: DEFLATE (RFC 1951) with fixed codes, in a gzip member (RFC 1952).
//!
//! What repeats in such a body repeats as a whole and soon: an event's head, its pod's metadata. One look at the last place with the same
//! four bytes finds it, and a match goes on at the same distance for as long as it lasts. That costs half of what the fastest level of a
//! general compressor costs, for bodies that are a few percent larger.

/// Entries of the table of last places, as a power of two: 32 KiB in all, which the first-level cache shares with the body.
const TABLE_BITS: u32 = 13;
/// Farthest match, and its shortest and longest length: the format's.
const WINDOW: usize = 32_768;
const SHORTEST: usize = 4;
const LONGEST: usize = 258;

/// Bits from the lowest on, as the format has them. Up to 56 bits may be put between two flushes.
struct Bits<'a> {
    /// As long as the worst case needs.
    out: &'a mut [u8],
    at: usize,
    hold: u64,
    count: u32,
}

impl Bits<'_> {
    #[inline(always)]
    fn put(&mut self, bits: u32, count: u32) {
        self.hold |= u64::from(bits) << self.count;
        self.count += count;
    }

    #[inline(always)]
    fn flush(&mut self) {
        self.out[self.at..self.at + 8].copy_from_slice(&self.hold.to_le_bytes());
        let bytes = self.count / 8;
        self.at += bytes as usize;
        self.hold >>= bytes * 8;
        self.count %= 8;
    }

    /// Nine bits each at most: five fit beside what a flush leaves.
    #[inline(always)]
    fn literals(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(5);
        for chunk in &mut chunks {
            for &byte in chunk {
                let (code, count) = CODES.literal[usize::from(byte)];
                self.put(code, count);
            }
            self.flush();
        }
        for &byte in chunks.remainder() {
            let (code, count) = CODES.literal[usize::from(byte)];
            self.put(code, count);
        }
        self.flush();
    }

    /// The number of bytes written.
    fn finish(mut self) -> usize {
        self.flush();
        self.at + usize::from(self.count > 0)
    }
}

/// A code with its extra bits, and how many bits that is.
type Code = (u32, u32);

struct Codes {
    literal: [Code; 256],
    /// By length less three.
    length: [Code; 256],
    /// By code of the distance: the reversed code, extra bits, first distance.
    distance: [(u32, u32, u32); 30],
    /// Code of a distance less one below 256, and of those above, by their upper bits.
    near: [u8; 256],
    far: [u8; 256],
}

const fn reversed(code: u32, bits: u32) -> u32 {
    code.reverse_bits() >> (32 - bits)
}

const fn fixed(symbol: u32) -> Code {
    match symbol {
        0..=143 => (reversed(0x30 + symbol, 8), 8),
        144..=255 => (reversed(0x190 + symbol - 144, 9), 9),
        256..=279 => (reversed(symbol - 256, 7), 7),
        _ => (reversed(0xc0 + symbol - 280, 8), 8),
    }
}

static CODES: Codes = codes();

const fn codes() -> Codes {
    let mut codes = Codes { literal: [(0, 0); 256], length: [(0, 0); 256], distance: [(0, 0, 0); 30], near: [0; 256], far: [0; 256] };
    let mut symbol = 0;
    while symbol < 256 {
        codes.literal[symbol as usize] = fixed(symbol);
        symbol += 1;
    }
    // Lengths 3 to 257: eight codes of one length each, then groups of four with one more extra bit each.
    let mut code = 257;
    let mut length = 0;
    while length < 255 {
        let extra = if code < 265 { 0 } else { (code - 261) / 4 };
        let mut step = 0;
        while step < 1 << extra && length < 255 {
            let (bits, count) = fixed(code);
            codes.length[length] = (bits | (step << count), count + extra);
            length += 1;
            step += 1;
        }
        code += 1;
    }
    codes.length[255] = fixed(285);
    let mut first = 1;
    let mut code = 0;
    while code < 30 {
        let extra = if code < 4 { 0 } else { code / 2 - 1 };
        codes.distance[code as usize] = (reversed(code, 5), extra, first);
        let mut step = 0;
        while step < 1 << extra {
            let less = first + step - 1;
            if less < 256 {
                codes.near[less as usize] = code as u8;
            }
            codes.far[(less >> 7) as usize] = code as u8;
            step += if first > 256 { 128 } else { 1 };
        }
        first += 1 << extra;
        code += 1;
    }
    codes
}

#[inline(always)]
fn word(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"))
}

#[inline(always)]
fn slot(word: u64) -> usize {
    ((word as u32).wrapping_mul(0x9e37_79b1) >> (32 - TABLE_BITS)) as usize
}

/// How many bytes from `a` on are as those from `b` on; `b` is the later.
#[inline(always)]
fn common(body: &[u8], a: usize, b: usize, most: usize) -> usize {
    let mut len = 0;
    while len + 8 <= most {
        let differ = word(body, a + len) ^ word(body, b + len);
        if differ != 0 {
            return len + (differ.trailing_zeros() / 8) as usize;
        }
        len += 8;
    }
    while len < most && body[a + len] == body[b + len] {
        len += 1;
    }
    len
}

/// A gzip member of `body`.
pub fn gzip(body: &[u8]) -> Vec<u8> {
    // Method 8, no name, no time, no system.
    const HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    // Nine bits a byte, and what a flush writes beyond its end. Pages that stay untouched are not taken from the system.
    let mut out = vec![0; HEAD.len() + body.len() + body.len() / 8 + 40];
    out[..HEAD.len()].copy_from_slice(&HEAD);
    let written = deflate(body, &mut out[HEAD.len()..]);
    out.truncate(HEAD.len() + written);
    let mut sum = flate2::Crc::new();
    sum.update(body);
    out.extend_from_slice(&sum.sum().to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.shrink_to_fit();
    out
}

/// Writes `body` as one final block; returns how many bytes that is. `out` has room for nine bits a byte and 32 bytes more.
fn deflate(body: &[u8], out: &mut [u8]) -> usize {
    let codes = &CODES;
    let mut table = vec![0_u32; 1 << TABLE_BITS];
    let table: &mut [u32; 1 << TABLE_BITS] = table.as_mut_slice().try_into().expect("made of this size");
    let mut bits = Bits { out, at: 0, hold: 0, count: 0 };
    // Final block, fixed codes.
    bits.put(0b011, 3);
    let mut at = 0;
    let mut plain = 0;
    // Reads of eight bytes stay inside.
    let last = body.len().saturating_sub(12);
    while at < last {
        let here = word(body, at);
        let entry = &mut table[slot(here)];
        // Places are kept plus one: nothing is there at zero.
        let before = *entry as usize;
        *entry = at as u32 + 1;
        let candidate = before.wrapping_sub(1);
        if before == 0 || at - candidate > WINDOW || word(body, candidate) as u32 != here as u32 {
            // The longer nothing was found, the faster it goes on.
            at += 1 + ((at - plain) >> 6);
            continue;
        }
        bits.literals(&body[plain..at]);
        let distance = at - candidate;
        let less = distance - 1;
        let code = if less < 256 { codes.near[less] } else { codes.far[less >> 7] };
        let (distance_code, extra, first) = codes.distance[usize::from(code)];
        let (distance_bits, distance_count) = (distance_code | ((distance as u32 - first) << 5), 5 + extra);
        loop {
            let most = LONGEST.min(body.len() - at);
            let length = common(body, at - distance, at, most);
            if length < SHORTEST {
                break;
            }
            let (code, count) = codes.length[length - 3];
            bits.put(code, count);
            bits.put(distance_bits, distance_count);
            bits.flush();
            at += length;
            if length < LONGEST {
                break;
            }
        }
        plain = at;
        if at < last {
            let behind = word(body, at - 2);
            table[slot(behind)] = at as u32 - 1;
        }
    }
    bits.literals(&body[plain..]);
    // End of block.
    bits.put(0, 7);
    bits.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;
    use proptest::prelude::*;

    use super::*;

    fn inflated(gzip: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        GzDecoder::new(gzip).read_to_end(&mut out).unwrap();
        out
    }

    /// Copies of earlier parts at any distance and of any length, between random bytes.
    fn body() -> impl Strategy<Value = Vec<u8>> {
        let step = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| (bytes, 0, 0)),
            proptest::collection::vec(97_u8..100, 0..200).prop_map(|bytes| (bytes, 0, 0)),
            (1_usize..70_000, 1_usize..2000).prop_map(|(distance, length)| (Vec::new(), distance, length)),
        ];
        proptest::collection::vec(step, 0..120).prop_map(|steps| {
            let mut body: Vec<u8> = Vec::new();
            for (bytes, distance, length) in steps {
                body.extend_from_slice(&bytes);
                if distance > 0 && !body.is_empty() {
                    let from = body.len() - 1 - (distance - 1) % body.len();
                    (0..length).for_each(|step| body.push(body[from + step]));
                }
            }
            body
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_is_compressed_inflates_to_what_it_was(body in body()) {
            prop_assert!(inflated(&gzip(&body)) == body);
        }

        #[test]
        fn so_do_random_bytes(body in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(inflated(&gzip(&body)) == body);
        }
    }

    #[test]
    fn every_distance_and_length_has_its_code() {
        // A word of its own, then filler without it, then the word again at each distance.
        for distance in (1..300).chain((300..=WINDOW).step_by(97)).chain([WINDOW - 1, WINDOW, WINDOW + 1]) {
            let mut body: Vec<u8> = (0..distance).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            (0..300).for_each(|step| body.push(body[step]));
            assert!(inflated(&gzip(&body)) == body, "distance {distance}");
        }
        for length in 1..600 {
            let body: Vec<u8> = (0..400 + length)
                .map(|at: usize| if at < 400 { (at * at / 7) as u8 } else { ((at - 400) * (at - 400) / 7) as u8 })
                .collect();
            assert!(inflated(&gzip(&body)) == body, "length {length}");
        }
        for len in 0..40 {
            let body = vec![b'x'; len];
            assert!(inflated(&gzip(&body)) == body, "{len} bytes");
        }
    }

    #[test]
    fn bodies_of_events_become_small() {
        let event = |n: u64| {
            let id = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            format!(
                "{{\"timestamp\":{},\"message\":\"level=info id={id:016x} n={n} msg=served path=/api/v1/items/{}\"}},",
                1_795_168_801_000 + n,
                n % 977
            )
        };
        let body: String = (0..5000).map(event).collect();
        let ratio = body.len() as f64 / gzip(body.as_bytes()).len() as f64;
        assert!(ratio > 2.5, "{ratio}");
    }
}
