//! DNS answers (RFC 1035), as far as `domainNames` peers need them: which names an answer gives to which addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address that a name has, by one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Lower case, without the final dot: the name asked for, or one of those that it is an alias of.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Seconds for which the answer holds: the least along the aliases.
    pub ttl: u32,
}

/// Bytes that are no answer to a question for addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DnsError {
    /// Shorter than a header, or its question is cut off or not a name.
    #[error("the message is cut off or malformed before its answers")]
    Malformed,
    /// A query, another operation than a standard query, not exactly one question, or a failure.
    #[error("the message is no answer to one question")]
    NotAnAnswer,
}

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Longest name in text form (RFC 1035, 2.3.4: 255 octets with lengths).
const MAX_NAME: usize = 253;
/// Pointers followed in one name; each must go backwards, so this only bounds work.
const MAX_POINTERS: usize = 32;
/// Aliases followed from the question.
const MAX_ALIASES: usize = 16;

/// The addresses that a message (the payload of a UDP datagram) gives to the name it was asked for and to that name's
/// aliases. Records about other names are passed over: nobody asked. A message that ends early gives what is whole.
///
/// # Errors
/// See [`DnsError`].
pub fn answers(message: &[u8]) -> Result<Vec<Answer>, DnsError> {
    let word = |at: usize| message.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let header = |index: usize| word(index * 2).ok_or(DnsError::Malformed);
    let flags = header(1)?;
    // QR set, opcode 0, no error; one question.
    if flags & 0xf80f != 0x8000 || header(2)? != 1 {
        return Err(DnsError::NotAnAnswer);
    }
    let count = header(3)?;
    let (question, mut at) = name(message, HEADER).ok_or(DnsError::Malformed)?;
    let (Some(question), Some(_), Some(_)) = (question, word(at), word(at + 2)) else { return Err(DnsError::Malformed) };
    at += 4;
    // Aliases in the order in which answers give them: of the question first.
    let mut chain = vec![(question, u32::MAX)];
    let mut found = Vec::new();
    for _ in 0..count {
        let Some((owner, after)) = name(message, at) else { break };
        let Some(fixed) = message.get(after..after + 10) else { break };
        let (kind, class) = (u16::from_be_bytes([fixed[0], fixed[1]]), u16::from_be_bytes([fixed[2], fixed[3]]));
        let ttl = ttl(u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]));
        let data_at = after + 10;
        at = data_at + usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let Some(data) = message.get(data_at..at) else { break };
        let Some(owner) = owner.filter(|_| class == CLASS_IN) else { continue };
        match kind {
            TYPE_CNAME if chain.len() <= MAX_ALIASES && chain.last().is_some_and(|(last, _)| *last == owner) => {
                let Some((Some(target), _)) = name(message, data_at) else { continue };
                if let Some(last) = chain.last_mut() {
                    last.1 = ttl;
                }
                chain.push((target, u32::MAX));
            }
            TYPE_A => {
                if let Ok(octets) = <[u8; 4]>::try_from(data) {
                    found.push((owner, IpAddr::from(Ipv4Addr::from(octets)), ttl));
                }
            }
            TYPE_AAAA => {
                if let Ok(octets) = <[u8; 16]>::try_from(data) {
                    found.push((owner, IpAddr::from(Ipv6Addr::from(octets)), ttl));
                }
            }
            _ => {}
        }
    }
    let mut answers = Vec::new();
    for (owner, address, mut ttl) in found {
        let Some(place) = chain.iter().position(|(name, _)| *name == owner) else { continue };
        for (index, (name, alias_ttl)) in chain[..=place].iter().enumerate().rev() {
            if index < place {
                ttl = ttl.min(*alias_ttl);
            }
            answers.push(Answer { name: name.clone(), address, ttl });
        }
    }
    Ok(answers)
}

/// A TTL with its highest bit set means 0 (RFC 2181, 8).
fn ttl(seconds: u32) -> u32 {
    if seconds > i32::MAX.cast_unsigned() { 0 } else { seconds }
}

/// The name at an offset and where it ends; `None` in front if it is a name that policies cannot mean (other bytes than
/// letters, digits, `-` and `_`: a dot inside a label would forge another name).
fn name(message: &[u8], start: usize) -> Option<(Option<String>, usize)> {
    let mut text = String::new();
    let (mut at, mut end, mut pointers, mut plain) = (start, None, 0, true);
    loop {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => {
                let end = end.unwrap_or(at + 1);
                return Some(((plain && !text.is_empty()).then_some(text), end));
            }
            1..=63 => {
                let label = message.get(at + 1..at + 1 + length)?;
                if !text.is_empty() {
                    text.push('.');
                }
                for byte in label {
                    plain &= byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
                    text.push(char::from(byte.to_ascii_lowercase()));
                }
                at += 1 + length;
                if text.chars().count() > MAX_NAME {
                    return None;
                }
            }
            0xc0.. => {
                let target = (length & 0x3f) << 8 | usize::from(*message.get(at + 1)?);
                end = end.or(Some(at + 2));
                pointers += 1;
                // Only backwards: a loop is impossible.
                if target >= at || pointers > MAX_POINTERS {
                    return None;
                }
                at = target;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wire_name(name: &str) -> Vec<u8> {
        let labels = name.split('.').flat_map(|label| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat());
        labels.chain([0]).collect()
    }

    fn message(question: &str, records: &[(&str, u16, u32, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 0x81, 0x80, 0, 1, 0, u8::try_from(records.len()).unwrap(), 0, 0, 0, 0];
        bytes.extend(wire_name(question));
        bytes.extend([0, 1, 0, 1]);
        for (owner, kind, ttl, data) in records {
            // The question's name as everybody writes it: a pointer.
            if owner.eq_ignore_ascii_case(question) {
                bytes.extend([0xc0, 12]);
            } else {
                bytes.extend(wire_name(owner));
            }
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0, 1]);
            bytes.extend(ttl.to_be_bytes());
            bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
        }
        bytes
    }

    fn answer(name: &str, address: &str, ttl: u32) -> Answer {
        Answer { name: name.to_owned(), address: address.parse().unwrap(), ttl }
    }

    #[test]
    fn an_alias_gives_its_addresses_to_every_name_on_the_way_for_the_least_time() {
        let bytes = message(
            "WWW.example.com",
            &[
                ("www.example.com", TYPE_CNAME, 30, wire_name("edge.cdn.net")),
                ("edge.cdn.net", TYPE_A, 60, vec![192, 0, 2, 1]),
                ("edge.cdn.net", TYPE_AAAA, 20, [0x20, 1, 0xd, 0xb8].iter().copied().chain([0; 11]).chain([1]).collect()),
                ("other.example.com", TYPE_A, 60, vec![10, 0, 0, 1]),
            ],
        );
        let wanted = [
            answer("edge.cdn.net", "192.0.2.1", 60),
            answer("www.example.com", "192.0.2.1", 30),
            answer("edge.cdn.net", "2001:db8::1", 20),
            answer("www.example.com", "2001:db8::1", 20),
        ];
        assert_eq!(answers(&bytes).unwrap(), wanted);
    }

    #[test]
    fn what_is_no_answer_is_refused_and_what_was_not_asked_is_passed_over() {
        let good = message("a.example", &[("a.example", TYPE_A, 5, vec![192, 0, 2, 1])]);
        assert_eq!(answers(&good).unwrap(), [answer("a.example", "192.0.2.1", 5)]);
        for (at, byte) in [(2, 0x01), (2, 0x89), (3, 0x83), (5, 0), (5, 2)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(answers(&bad), Err(DnsError::NotAnAnswer), "byte {at} = {byte:#x}");
        }
        let foreign = message("a.example", &[("b.example", TYPE_A, 5, vec![192, 0, 2, 1])]);
        assert_eq!(answers(&foreign).unwrap(), []);
        // One label with a dot in it is not the name that it reads like.
        let mut forged = good[..12].to_vec();
        forged.extend([9]);
        forged.extend(b"a.example");
        forged.extend([0, 0, 1, 0, 1, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 1]);
        assert_eq!(answers(&forged), Err(DnsError::Malformed));
        let forever = message("a.example", &[("a.example", TYPE_A, u32::MAX, vec![192, 0, 2, 1])]);
        assert_eq!(answers(&forever).unwrap()[0].ttl, 0);
    }

    #[test]
    fn a_pointer_that_does_not_go_back_ends_the_name() {
        let mut bytes = message("a.example", &[]);
        bytes[7] = 1;
        let at = u8::try_from(bytes.len()).unwrap();
        bytes.extend([0xc0, at, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 1]);
        assert_eq!(answers(&bytes).unwrap(), []);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut message = bytes;
            drop(answers(&message));
            // Past the header's checks, too.
            if message.len() >= 12 {
                message[2..6].copy_from_slice(&[0x81, 0x80, 0, 1]);
                drop(answers(&message));
            }
        }

        #[test]
        fn a_cut_or_damaged_answer_gives_no_name_that_was_not_there(cut in 0usize..120, at in 0usize..120, byte in any::<u8>()) {
            let whole = message("www.example.com", &[
                ("www.example.com", TYPE_CNAME, 30, wire_name("edge.cdn.net")),
                ("edge.cdn.net", TYPE_A, 60, vec![192, 0, 2, 1]),
                ("edge.cdn.net", TYPE_A, 60, vec![192, 0, 2, 2]),
            ]);
            let all = answers(&whole).unwrap();
            if let Ok(some) = answers(&whole[..cut.min(whole.len())]) {
                prop_assert!(some.iter().all(|answer| all.contains(answer)));
            }
            let mut damaged = whole;
            let at = at.min(damaged.len() - 1);
            damaged[at] = byte;
            drop(answers(&damaged));
        }
    }
}
