//! The connection to the agent: one, with one deadline for everything, in frames (see [`frame`]).

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use prost::Message;
use stanchion_core::cni::{CniError, ErrorCode, Invocation, NetConf};
use stanchion_proto::frame::{self, HEADER, MAGIC, Method};
use stanchion_proto::{DelNetworkReply, DelNetworkRequest, Sandbox};
use tonic::{Code, Status};

/// The agent, as long as the deadline has not passed.
pub(crate) struct Agent {
    stream: UnixStream,
    deadline: Instant,
    socket: PathBuf,
    /// The first request carries the greeting: one packet less.
    greeted: bool,
}

impl Agent {
    /// Connects; everything that is asked must be answered within `patience`.
    pub(crate) fn connect(path: &Path, patience: Duration) -> Result<Self, CniError> {
        let deadline = Instant::now() + patience;
        let stream = open(path, patience).map_err(|error| away(path, &error.to_string()))?;
        Ok(Self { stream, deadline, socket: path.to_owned(), greeted: false })
    }

    /// One call, within what is left of the time.
    pub(crate) fn call<T: Message + Default>(&mut self, what: &'static str, method: Method, request: &impl Message) -> Result<T, CniError> {
        self.ask(what, method, request)?;
        self.answer(what)
    }

    /// The first half of a call: what is done until [`Agent::answer`] costs no time of its own.
    pub(crate) fn ask(&mut self, what: &'static str, method: Method, request: &impl Message) -> Result<(), CniError> {
        let mut bytes = if self.greeted { Vec::new() } else { MAGIC.to_vec() };
        bytes.extend(frame::encode(method as u8, request).map_err(|status| refused(what, &status))?);
        self.greeted = true;
        self.write(&bytes).map_err(|error| self.failed(what, &error))
    }

    /// The second half.
    pub(crate) fn answer<T: Message + Default>(&mut self, what: &'static str) -> Result<T, CniError> {
        let (code, body) = self.receive().map_err(|error| self.failed(what, &error))?;
        frame::reply(code, &body).map_err(|status| refused(what, &status))
    }

    fn failed(&self, what: &str, error: &io::Error) -> CniError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                CniError::new(ErrorCode::TryAgain, format!("{what}: the agent did not answer in time"))
            }
            ErrorKind::UnexpectedEof => away(&self.socket, "it closed the connection"),
            _ => away(&self.socket, &error.to_string()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.time_left()?))?;
        self.stream.write_all(bytes)
    }

    fn receive(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.read(&mut header)?;
        let (code, length) = frame::header(header).map_err(|status| io::Error::new(ErrorKind::InvalidData, status.message().to_owned()))?;
        let mut body = vec![0; length];
        self.read(&mut body)?;
        Ok((code, body))
    }

    fn read(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.time_left()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = buffer.split_at_mut(count).1,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn time_left(&self) -> io::Result<Duration> {
        let left = self.left();
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    /// What is left of the time.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Releases what the sandbox holds.
    pub(crate) fn release(&mut self, sandbox: Sandbox, reason: &str) -> Result<DelNetworkReply, CniError> {
        let request = DelNetworkRequest { sandbox: Some(sandbox), reason: reason.to_owned(), plugin_version: plugin_version() };
        self.call("release the pod's addresses", Method::DelNetwork, &request)
    }
}

/// Connects within `patience`: with its backlog full, an agent that hangs would hold us for ever.
fn open(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::microseconds(i64::try_from(patience.as_micros()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Who asks, in the protocol's words.
pub(crate) fn sandbox(invocation: &Invocation, conf: &NetConf) -> Sandbox {
    Sandbox {
        network_name: conf.name.clone(),
        container_id: invocation.container_id.clone(),
        if_name: invocation.if_name.clone(),
        pod_namespace: invocation.pod.namespace.clone(),
        pod_name: invocation.pod.name.clone(),
        pod_uid: invocation.pod_uid.clone(),
        netns: invocation.netns.as_deref().map(|path| path.display().to_string()).unwrap_or_default(),
    }
}

pub(crate) fn plugin_version() -> String {
    stanchion_proto::PROTOCOL_VERSION.to_owned()
}

fn away(socket: &Path, why: &str) -> CniError {
    let socket = socket.display();
    CniError::new(ErrorCode::TryAgain, format!("the stanchion agent does not answer at {socket} ({why}): is its pod running on this node?"))
}

fn refused(what: &str, status: &Status) -> CniError {
    let code = match status.code() {
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Aborted => ErrorCode::TryAgain,
        Code::InvalidArgument => ErrorCode::InvalidEnvironment,
        _ => ErrorCode::Io,
    };
    CniError::new(code, format!("{what}: {}", status.message()))
}
