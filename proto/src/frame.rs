//! The plugin's way to the agent: the messages of `stanchion.proto` in plain frames on the agent's Unix socket.
//!
//! A plugin lives for two calls. An HTTP/2 connection for them (preface, settings, header tables, a runtime to drive it) costs
//! more than all netlink requests of an ADD, so the plugin writes frames instead; the same service answers both, and tells
//! them apart by the first byte of a connection: gRPC's begins with `PRI`.
//!
//! ```text
//! connection: MAGIC request reply request reply …            one request at a time
//! request:    length u32 LE | method u8 | message            length counts what follows it
//! reply:      length u32 LE | code   u8 | message or text    code 0: a message; else a gRPC status code and its words
//! ```
//! Messages may gain fields and methods may be added: unknown fields are skipped, an unknown method is code 12
//! (unimplemented). Anything else that changes needs another [`MAGIC`].

use prost::Message;
use tonic::{Code, Status};

/// The first bytes of a connection that speaks frames.
pub const MAGIC: [u8; 8] = *b"\0stncni1";
/// The longest frame: a list of what lives on the largest node (about 1,000 pods) is 100 KiB.
pub const MAX_FRAME: usize = 1 << 20;
/// Bytes before the message: length, and method or code.
pub const HEADER: usize = 5;

/// What is asked; one for each method of the service `Cni`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Method {
    /// `AddNetwork`
    AddNetwork = 1,
    /// `ActivateEndpoint`
    ActivateEndpoint = 2,
    /// `DelNetwork`
    DelNetwork = 3,
    /// `CheckNetwork`
    CheckNetwork = 4,
    /// `CollectGarbage`
    CollectGarbage = 5,
    /// `Status`
    Status = 6,
}

impl Method {
    /// From its number; `None` for one of a later plugin.
    pub fn from_number(number: u8) -> Option<Self> {
        let all = [Self::AddNetwork, Self::ActivateEndpoint, Self::DelNetwork, Self::CheckNetwork, Self::CollectGarbage, Self::Status];
        all.into_iter().find(|method| *method as u8 == number)
    }
}

/// A request, or a reply that is a message (`first` 0).
///
/// # Errors
/// `OutOfRange` when it is longer than [`MAX_FRAME`].
pub fn encode(first: u8, message: &impl Message) -> Result<Vec<u8>, Status> {
    let length = 1 + message.encoded_len();
    if length > MAX_FRAME {
        return Err(Status::out_of_range(format!("a message of {length} bytes; the limit is {MAX_FRAME}")));
    }
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    frame.push(first);
    // A Vec grows: there is always room.
    let _never = message.encode(&mut frame);
    Ok(frame)
}

/// A reply that is an error.
pub fn encode_error(status: &Status) -> Vec<u8> {
    let code = u8::try_from(i32::from(status.code())).unwrap_or(2);
    let text = status.message().as_bytes();
    let text = &text[..text.len().min(MAX_FRAME - 1)];
    let mut frame = Vec::with_capacity(HEADER + text.len());
    frame.extend_from_slice(&u32::try_from(1 + text.len()).unwrap_or(u32::MAX).to_le_bytes());
    frame.push(if code == 0 { 2 } else { code });
    frame.extend_from_slice(text);
    frame
}

/// Reads a header: the method or code, and how many bytes follow.
///
/// # Errors
/// `InvalidArgument` for a length of nothing or of more than [`MAX_FRAME`].
pub fn header(bytes: [u8; HEADER]) -> Result<(u8, usize), Status> {
    let [a, b, c, d, first] = bytes;
    let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length == 0 || length > MAX_FRAME {
        return Err(Status::invalid_argument(format!("a frame of {length} bytes; 1 to {MAX_FRAME} are allowed")));
    }
    Ok((first, length - 1))
}

/// A message of a frame; what it does not know it skips.
///
/// # Errors
/// `InvalidArgument` when it is no message of that type.
pub fn decode<M: Message + Default>(body: &[u8]) -> Result<M, Status> {
    M::decode(body).map_err(|error| Status::invalid_argument(format!("cannot read the message: {error}")))
}

/// The message of a reply, or the error that it is.
///
/// # Errors
/// The agent's, or `InvalidArgument` when the message cannot be read.
pub fn reply<M: Message + Default>(code: u8, body: &[u8]) -> Result<M, Status> {
    match Code::from(i32::from(code)) {
        Code::Ok => decode(body),
        code => Err(Status::new(code, String::from_utf8_lossy(body))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]

    use super::*;
    use crate::{AddNetworkReply, AddNetworkRequest, Attachment, Sandbox};

    fn parts(frame: &[u8]) -> (u8, &[u8]) {
        let (first, length) = header(frame[..HEADER].try_into().unwrap()).unwrap();
        assert_eq!(frame.len(), HEADER + length);
        (first, &frame[HEADER..])
    }

    /// The plugin on the node and the agent are a version apart while a node is upgraded: the bytes stay, and what only the
    /// other knows is passed over.
    #[test]
    fn the_bytes_of_version_0_1_stay_and_later_fields_are_passed_over() {
        let request = AddNetworkRequest {
            sandbox: Some(Sandbox { network_name: "n".into(), container_id: "c".into(), pod_name: "a".into(), ..Sandbox::default() }),
            plugin_version: "1".into(),
            multi_nic: true,
            wait_ms: 7,
        };
        let bytes = b"\x0a\x09\x0a\x01n\x12\x01c\x2a\x01a\x12\x011\x18\x01\x20\x07";
        assert_eq!(&encode(Method::AddNetwork as u8, &request).unwrap()[HEADER..], bytes);
        assert_eq!(decode::<AddNetworkRequest>(bytes).unwrap(), request);
        // A field 15 of a later version: text.
        assert_eq!(decode::<AddNetworkRequest>(&[bytes.as_slice(), b"\x7a\x03new"].concat()).unwrap(), request);

        let attachment = Attachment { ipv4: "10.0.0.9".into(), device_index: 1, route_table: 2, ..Attachment::default() };
        let answer = AddNetworkReply { attachments: vec![attachment], pod_mtu: 9001, veth_prefix: "eni".into(), ..Default::default() };
        let bytes = b"\x0a\x0e\x0a\x0810.0.0.9\x18\x01\x28\x02\x28\xa9\x46\x32\x03eni";
        assert_eq!(&encode(0, &answer).unwrap()[HEADER..], bytes);
        assert_eq!(reply::<AddNetworkReply>(0, &[bytes.as_slice(), b"\x7a\x03new"].concat()).unwrap(), answer);
    }

    #[test]
    fn requests_and_replies_come_through() {
        let request =
            AddNetworkRequest { sandbox: Some(Sandbox { pod_name: "a".into(), ..Sandbox::default() }), wait_ms: 7, ..Default::default() };
        let frame = encode(Method::AddNetwork as u8, &request).unwrap();
        let (method, body) = parts(&frame);
        assert_eq!(Method::from_number(method), Some(Method::AddNetwork));
        assert_eq!(decode::<AddNetworkRequest>(body).unwrap(), request);

        let answer =
            AddNetworkReply { attachments: vec![Attachment { ipv4: "10.0.0.9".into(), ..Default::default() }], ..Default::default() };
        let frame = encode(0, &answer).unwrap();
        let (code, body) = parts(&frame);
        assert_eq!(reply::<AddNetworkReply>(code, body).unwrap(), answer);

        let frame = encode_error(&Status::resource_exhausted("subnet-1 is full"));
        let (code, body) = parts(&frame);
        let status = reply::<AddNetworkReply>(code, body).unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "subnet-1 is full"));
    }

    /// A field of a later version, number 99: `text`.
    fn with_unknown_field(mut message: Vec<u8>) -> Vec<u8> {
        message.extend_from_slice(&[0x9a, 0x06, 4]);
        message.extend_from_slice(b"text");
        message
    }

    #[test]
    fn fields_of_another_version_do_no_harm() {
        let request = AddNetworkRequest { plugin_version: "2".into(), ..Default::default() };
        let longer = with_unknown_field(request.encode_to_vec());
        assert_eq!(decode::<AddNetworkRequest>(&longer).unwrap(), request);
        // An agent that knows nothing of the mode and the prefix sends neither.
        let shorter = AddNetworkReply::default().encode_to_vec();
        assert!(shorter.is_empty());
        assert_eq!(reply::<AddNetworkReply>(0, &shorter).unwrap(), AddNetworkReply::default());
        assert_eq!(reply::<AddNetworkReply>(0, &with_unknown_field(shorter)).unwrap(), AddNetworkReply::default());
        assert_eq!(Method::from_number(77), None);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(header([0, 0, 0, 0, 1]).is_err());
        assert!(header([0xff, 0xff, 0xff, 0xff, 1]).is_err());
        assert!(decode::<AddNetworkRequest>(&[0xff; 9]).is_err());
        let endless = AddNetworkRequest { plugin_version: "x".repeat(MAX_FRAME), ..Default::default() };
        assert_eq!(encode(1, &endless).unwrap_err().code(), Code::OutOfRange);
        // A code that gRPC does not have is an error all the same.
        assert!(reply::<AddNetworkReply>(200, b"?").is_err());
        assert_ne!(encode_error(&Status::new(Code::Ok, "no error"))[4], 0);
    }
}
