//! Inputs bred from good ones: cut, spliced, repeated, with a bit turned or bytes in them that mean something to a parser.

use rand::RngExt as _;
use rand::rngs::StdRng;

/// Bytes that mean something to one parser or another.
const TOKENS: [&[u8]; 24] = [
    b"\n",
    b"\0",
    b"\xff",
    b"\xe2\x82",
    b"\"",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"null",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"0x7f",
    b" ",
    b"\t",
    b"/",
    b"..",
    b":",
    b"%",
    b"*",
    b"2026-11-21T10:00:00.5Z stdout P ",
    b"true",
];

/// One of the inputs, changed in one to five places; the same for the same state of `random`. There must be an input.
pub fn bred(corpus: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = corpus[random.random_range(0..corpus.len())].clone();
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(0..=bytes.len());
        let to = random.random_range(at..=bytes.len().min(at + 40));
        match random.random_range(0..7) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8_u32),
            2 => drop(bytes.splice(at..at, TOKENS[random.random_range(0..TOKENS.len())].iter().copied())),
            3 => drop(bytes.splice(at..to, TOKENS[random.random_range(0..TOKENS.len())].iter().copied())),
            4 => drop(bytes.drain(at..to)),
            5 => {
                let piece = bytes[at..to].repeat(random.random_range(1..50));
                drop(bytes.splice(at..at, piece));
            }
            _ => {
                let other = &corpus[random.random_range(0..corpus.len())];
                let from = random.random_range(0..=other.len());
                drop(bytes.splice(at.., other[from..].iter().copied()));
            }
        }
    }
    bytes
}
