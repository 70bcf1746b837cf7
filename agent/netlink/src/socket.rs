//! One netlink socket, synchronous: batches of requests, dumps that are tried again when the kernel says they are torn.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A dump that the table's owner keeps changing is given up after this many tries.
const DUMP_TRIES: u32 = 16;
/// The kernel writes at most 32 KiB at a time into a dump's buffer (`netlink_dump`, `max_recvmsg_len`).
const RECEIVE_BUFFER: usize = 64 * 1024;

/// A socket of family NETLINK_ROUTE, bound to the namespace in which it was opened.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Why the kernel was not asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket itself failed.
    #[error("netlink socket: cannot {op}")]
    Socket {
        /// What was tried.
        op: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel answered with an error; `detail` are its words, if it had any.
    #[error("{request}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Refused {
        /// The request, in words.
        request: String,
        /// The kernel's explanation (extended acknowledgement).
        detail: String,
        /// The error number.
        source: io::Error,
    },
    /// A dump was interrupted by changes every time.
    #[error("{request}: the table changed during each of {DUMP_TRIES} dumps")]
    Torn {
        /// The request, in words.
        request: String,
    },
    /// The kernel's answer cannot be read.
    #[error("cannot read the kernel's answer to {request}: {reason}")]
    Malformed {
        /// The request, in words.
        request: String,
        /// What is wrong.
        reason: String,
    },
}

/// A request: the message, how it is meant, and how a person would call it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) mode: Mode,
    pub(crate) words: String,
}

/// Flags of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Change or remove what is there; fail if it is not.
    Change,
    /// Create; fail if it is there.
    Create,
    /// Create or replace.
    Replace,
}

// === impl NetlinkError ===

impl NetlinkError {
    /// The kernel's error number, if it was the kernel.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Socket { source, .. } => source.raw_os_error(),
            Self::Torn { .. } | Self::Malformed { .. } => None,
        }
    }

    /// Whether what was to be removed or asked for is not there.
    pub fn is_absent(&self) -> bool {
        matches!(self.errno(), Some(libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO))
    }

    /// The whole chain in one line.
    pub fn chain(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

// === impl Mode ===

impl Mode {
    fn flags(self) -> u16 {
        NLM_F_REQUEST
            | NLM_F_ACK
            | match self {
                Self::Change => 0,
                Self::Create => NLM_F_CREATE | NLM_F_EXCL,
                Self::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            }
    }
}

// === impl Netlink ===

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |op| move |source| NetlinkError::Socket { op, source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed("open it"))?;
        socket.bind_auto().map_err(failed("bind it"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect to the kernel"))?;
        // Explanations instead of bare numbers, without our own request echoed; filters in dumps are obeyed.
        socket.set_ext_ack(true).map_err(failed("ask for explanations"))?;
        socket.set_cap_ack(true).map_err(failed("shorten acknowledgements"))?;
        socket.set_netlink_get_strict_chk(true).map_err(failed("turn strict checking on"))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Sends all requests at once. The kernel performs them in order, each on its own; one result for each.
    pub(crate) fn batch(&mut self, requests: Vec<Request>) -> Result<Vec<Result<(), NetlinkError>>, NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(128 * requests.len());
        let mut words = Vec::with_capacity(requests.len());
        for Request { message, mode, words: text } in requests {
            self.emit(message, mode.flags(), &mut out);
            words.push(text);
        }
        if words.is_empty() {
            return Ok(Vec::new());
        }
        self.send(&out)?;
        let mut results: Vec<Option<Result<(), NetlinkError>>> = words.iter().map(|_| None).collect();
        let mut missing = words.len();
        while missing > 0 {
            self.receive()?;
            for message in parse::<RouteNetlinkMessage>(&self.buffer, "a batch")? {
                let Some(index) = usize::try_from(message.header.sequence_number.wrapping_sub(first)).ok() else { continue };
                if let (NetlinkPayload::Error(error), Some(slot @ None)) = (message.payload, results.get_mut(index)) {
                    *slot = Some(match error.code {
                        None => Ok(()),
                        Some(_) => Err(NetlinkError::Refused {
                            request: std::mem::take(&mut words[index]),
                            detail: explanation(&error.header),
                            source: error.to_io(),
                        }),
                    });
                    missing -= 1;
                }
            }
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// One request.
    pub(crate) fn request(&mut self, request: Request) -> Result<(), NetlinkError> {
        self.batch(vec![request])?.pop().unwrap_or(Ok(()))
    }

    /// One request that makes an object, and what the kernel made of it; `None` from kernels that do not tell (links: before 6.2).
    pub(crate) fn create<T: NetlinkDeserializable>(&mut self, request: Request) -> Result<Option<T>, NetlinkError> {
        let Request { message, mode, words } = request;
        let mut out = Vec::with_capacity(256);
        self.emit(message, mode.flags() | NLM_F_ECHO, &mut out);
        self.send(&out)?;
        let mut made = None;
        loop {
            self.receive()?;
            for message in parse(&self.buffer, &words)? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(echo) => made = Some(echo),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(made),
                    NetlinkPayload::Error(error) => {
                        let detail = explanation(&error.header);
                        return Err(NetlinkError::Refused { request: words, detail, source: error.to_io() });
                    }
                    _ => {}
                }
            }
        }
    }

    /// Asks for one object; the kernel answers with it, or with an error. Only for kinds of objects that it does answer for.
    pub(crate) fn get<T: NetlinkDeserializable>(&mut self, message: RouteNetlinkMessage, words: &str) -> Result<T, NetlinkError> {
        let mut out = Vec::with_capacity(128);
        self.emit(message, NLM_F_REQUEST, &mut out);
        self.send(&out)?;
        loop {
            self.receive()?;
            for message in parse(&self.buffer, words)? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => return Ok(answer),
                    NetlinkPayload::Error(error) => {
                        let detail = explanation(&error.header);
                        return Err(NetlinkError::Refused { request: words.to_owned(), detail, source: error.to_io() });
                    }
                    _ => {}
                }
            }
        }
    }

    /// Reads a whole table. A dump during which the table changed may lack entries that were there all the time: it is
    /// thrown away and read again.
    pub(crate) fn dump(&mut self, message: &RouteNetlinkMessage, words: &str) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            if let Some(entries) = self.try_dump(message.clone(), words)? {
                return Ok(entries);
            }
        }
        Err(NetlinkError::Torn { request: words.to_owned() })
    }

    /// `None`: it was torn.
    fn try_dump(&mut self, message: RouteNetlinkMessage, words: &str) -> Result<Option<Vec<RouteNetlinkMessage>>, NetlinkError> {
        let mut out = Vec::with_capacity(64);
        self.emit(message, NLM_F_REQUEST | NLM_F_DUMP, &mut out);
        self.send(&out)?;
        let mut entries = Vec::new();
        let mut torn = false;
        loop {
            self.receive()?;
            for message in parse::<RouteNetlinkMessage>(&self.buffer, words)? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(entry) => entries.push(entry),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok((!torn).then_some(entries)),
                    NetlinkPayload::Done(done) if done.code.abs() == libc::EINTR => return Ok(None),
                    NetlinkPayload::Done(done) => {
                        let source = io::Error::from_raw_os_error(done.code.abs());
                        return Err(NetlinkError::Refused { request: words.to_owned(), detail: String::new(), source });
                    }
                    NetlinkPayload::Error(error) => {
                        let detail = explanation(&error.header);
                        return Err(NetlinkError::Refused { request: words.to_owned(), detail, source: error.to_io() });
                    }
                    NetlinkPayload::Overrun(_) => torn = true,
                    _ => {}
                }
            }
        }
    }

    fn emit(&mut self, message: RouteNetlinkMessage, flags: u16, out: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = out.len();
        // Messages of a batch start at multiples of four (NLMSG_ALIGN).
        out.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut out[start..]);
    }

    fn send(&self, out: &[u8]) -> Result<(), NetlinkError> {
        loop {
            match self.socket.send(out, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(NetlinkError::Socket { op: "send", source }),
            }
        }
    }

    fn receive(&mut self) -> Result<(), NetlinkError> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(NetlinkError::Socket { op: "receive", source }),
            }
        }
    }
}

fn parse<T: NetlinkDeserializable>(mut bytes: &[u8], words: &str) -> Result<Vec<NetlinkMessage<T>>, NetlinkError> {
    let malformed = |reason: String| NetlinkError::Malformed { request: words.to_owned(), reason };
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkMessage::deserialize(bytes).map_err(|error| malformed(error.to_string()))?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
        messages.push(message);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(messages)
}

/// The text of an extended acknowledgement: attributes behind the 16 bytes of the request's header.
fn explanation(bytes: &[u8]) -> String {
    /// `NLMSGERR_ATTR_MSG`
    const MESSAGE: u16 = 1;
    let mut rest = bytes.get(16..).unwrap_or_default();
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = rest.get(4..length) else { break };
        if u16::from_ne_bytes([k0, k1]) == MESSAGE {
            let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
            return String::from_utf8_lossy(text).into_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}
