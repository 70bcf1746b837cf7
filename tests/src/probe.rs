//! Real sockets inside namespaces: servers that say who they see, probes, and a long conversation that notices gaps.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::netns::Netns;
use crate::sctp;

/// What a probe speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// A connection on which the server says whom it sees.
    Tcp,
    /// A datagram which the server answers likewise.
    Udp,
    /// An INIT, answered by an INIT-ACK whose cookie says whom the server sees.
    Sctp,
}

/// What came of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The server answered; this is the address that it saw.
    Reached {
        /// The client as the server sees it.
        seen_as: IpAddr,
    },
    /// The other end said no.
    Refused,
    /// A router knows no way there.
    Unreachable,
    /// Nothing within the time.
    Silent,
}

impl Answer {
    /// Whether the server answered.
    pub fn reached(self) -> bool {
        matches!(self, Self::Reached { .. })
    }
}

/// How long a probe waits on an idle machine's veths; the answer comes within a millisecond.
pub const PATIENCE: Duration = Duration::from_millis(800);

/// Servers in one namespace; dropping it stops them.
#[derive(Debug)]
pub struct Servers {
    tasks: JoinSet<()>,
}

impl Servers {
    /// Serves every port on TCP, UDP and SCTP, on all IPv4 addresses of the namespace.
    pub fn start(netns: &Netns, ports: &[u16]) -> anyhow::Result<Self> {
        let mut servers = Self::start_on(netns, Ipv4Addr::UNSPECIFIED, ports)?;
        let (netns, ports) = (netns.clone(), ports.to_vec());
        servers.tasks.spawn(async move {
            if let Err(error) = sctp::serve(netns, ports).await {
                eprintln!("lab: the SCTP server ended: {error}");
            }
        });
        Ok(servers)
    }

    /// Serves every port on TCP and UDP, on one address.
    pub fn start_on(netns: &Netns, address: impl Into<IpAddr>, ports: &[u16]) -> anyhow::Result<Self> {
        let address = address.into();
        let mut tasks = JoinSet::new();
        for port in ports {
            let address = SocketAddr::from((address, *port));
            let listener = netns.tcp_listener(address).with_context(|| format!("listen on TCP {port} in {}", netns.name()))?;
            tasks.spawn(serve_tcp(listener));
            let socket = netns.udp_socket(address).with_context(|| format!("listen on UDP {port} in {}", netns.name()))?;
            tasks.spawn(async move {
                let mut buffer = [0; 2048];
                while let Ok((_, peer)) = socket.recv_from(&mut buffer).await {
                    let _ = socket.send_to(format!("{}\n", peer.ip()).as_bytes(), peer).await;
                }
            });
        }
        Ok(Self { tasks })
    }
}

/// Says whom it sees, then echoes.
async fn serve_tcp(listener: tokio::net::TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, peer)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            if stream.write_all(format!("{}\n", peer.ip()).as_bytes()).await.is_err() {
                return;
            }
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Asks a server of [`Servers`] from inside a namespace. Blocks for `patience` at most.
pub fn probe(netns: &Netns, protocol: Protocol, to: SocketAddr, patience: Duration) -> io::Result<Answer> {
    netns.run(|| {
        let answer = match protocol {
            Protocol::Tcp => tcp(to, patience),
            Protocol::Udp => udp(to, patience),
            Protocol::Sctp => sctp::probe(to, patience),
        };
        match answer {
            Ok(seen_as) => Ok(Answer::Reached { seen_as }),
            Err(error) => match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Ok(Answer::Silent),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => Ok(Answer::Refused),
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Ok(Answer::Unreachable),
                _ => Err(error),
            },
        }
    })?
}

fn tcp(to: SocketAddr, patience: Duration) -> io::Result<IpAddr> {
    let stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    address(&line)
}

fn udp(to: SocketAddr, patience: Duration) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience))?;
    socket.send(b"who am I?\n")?;
    let mut buffer = [0; 128];
    let n = socket.recv(&mut buffer)?;
    address(&String::from_utf8_lossy(&buffer[..n]))
}

fn address(line: &str) -> io::Result<IpAddr> {
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("the server said {line:?}")))
}

/// Who reached whom: row is the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matrix {
    /// Names in order, rows and columns alike.
    pub names: Vec<String>,
    /// What came of each pair; a name with itself is left out.
    pub cells: BTreeMap<(String, String), bool>,
}

/// An end of a matrix.
#[derive(Clone, Debug)]
pub struct End {
    /// Row and column title.
    pub name: String,
    /// Where it probes from.
    pub netns: Netns,
    /// Where it is probed.
    pub address: IpAddr,
}

impl Matrix {
    /// Probes every pair at once.
    pub async fn probe(ends: &[End], protocol: Protocol, port: u16, patience: Duration) -> anyhow::Result<Self> {
        let mut probes = JoinSet::new();
        for from in ends {
            for to in ends.iter().filter(|to| to.name != from.name) {
                let (from, to) = (from.clone(), to.clone());
                probes.spawn_blocking(move || {
                    let answer = probe(&from.netns, protocol, SocketAddr::new(to.address, port), patience);
                    answer.map(|answer| ((from.name, to.name), answer.reached()))
                });
            }
        }
        let mut cells = BTreeMap::new();
        while let Some(cell) = probes.join_next().await {
            let (pair, reached) = cell??;
            cells.insert(pair, reached);
        }
        Ok(Self { names: ends.iter().map(|end| end.name.clone()).collect(), cells })
    }

    /// Pairs that differ from what `expected` says.
    pub fn differences(&self, expected: impl Fn(&str, &str) -> bool) -> Vec<String> {
        let wrong = self.cells.iter().filter(|((from, to), reached)| expected(from, to) != **reached);
        wrong.map(|((from, to), reached)| format!("{from} -> {to} {}", if *reached { "gets through" } else { "is blocked" })).collect()
    }
}

/// A TCP connection that exchanges a message every few milliseconds until it is stopped.
#[derive(Debug)]
pub struct Conversation {
    stop: Arc<AtomicBool>,
    exchanges: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Talk>,
}

/// What a [`Conversation`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Talk {
    /// Messages that came back.
    pub exchanges: u64,
    /// The longest time that one took.
    pub longest: Duration,
    /// Why it ended early, if it did.
    pub broken: Option<String>,
}

impl Conversation {
    /// Connects from inside a namespace to a server of [`Servers`] and goes on talking on a thread.
    pub fn start(netns: &Netns, to: SocketAddr) -> anyhow::Result<Self> {
        let stream = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE))?.with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        // Far longer than any gap that a test allows, so that the report shows the gap.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let (stop, exchanges) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, so_far) = (Arc::clone(&stop), Arc::clone(&exchanges));
        let thread = std::thread::spawn(move || talk(stream, &stopped, &so_far));
        Ok(Self { stop, exchanges, thread })
    }

    /// Messages that came back so far.
    pub fn exchanges(&self) -> u64 {
        self.exchanges.load(Ordering::Relaxed)
    }

    /// Whether it ended by itself, which only a broken connection makes it do.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it and tells how it went.
    pub fn stop(self) -> Talk {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn talk(mut stream: TcpStream, stop: &AtomicBool, so_far: &AtomicU64) -> Talk {
    let mut talk = Talk { exchanges: 0, longest: Duration::ZERO, broken: None };
    let mut greeting = [0; 1];
    while talk.broken.is_none() && greeting[0] != b'\n' {
        talk.broken = stream.read_exact(&mut greeting).err().map(|error| error.to_string());
    }
    while talk.broken.is_none() && !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let message = talk.exchanges.to_be_bytes();
        let mut back = [0; 8];
        match stream.write_all(&message).and_then(|()| stream.read_exact(&mut back)) {
            Ok(()) if back == message => talk.exchanges += 1,
            Ok(()) => talk.broken = Some("the echo differs from what was sent".to_owned()),
            Err(error) => talk.broken = Some(error.to_string()),
        }
        so_far.store(talk.exchanges, Ordering::Relaxed);
        talk.longest = talk.longest.max(began.elapsed());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    talk
}

/// Numbered datagrams from one namespace to another, one every few milliseconds until they are stopped: nothing sends again what is lost.
#[derive(Debug)]
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    sender: std::thread::JoinHandle<io::Result<u64>>,
    receiver: std::thread::JoinHandle<io::Result<Vec<u64>>>,
}

/// What became of [`Datagrams`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// How many were sent.
    pub sent: u64,
    /// The numbers of those that did not arrive.
    pub lost: Vec<u64>,
}

/// Room of the receiver's socket: for more than a minute of them, however long its thread is kept waiting.
const RECEIVE_BUFFER: usize = 16 << 20;

impl Datagrams {
    /// `to` is an address of `at`, with a port that nobody has.
    ///
    /// # Errors
    /// The sockets cannot be made.
    pub fn start(from: &Netns, at: &Netns, to: SocketAddr) -> anyhow::Result<Self> {
        let receiver = at.run(|| UdpSocket::bind(to))?.with_context(|| format!("listen on {to}"))?;
        setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        // Longer than a datagram is on its way.
        receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
        let sender = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| socket.connect(to).map(|()| socket)))??;
        let stop = Arc::new(AtomicBool::new(false));
        let (until, ended) = (Arc::clone(&stop), Arc::clone(&stop));
        let sender = std::thread::spawn(move || {
            let mut sent = 0_u64;
            while !until.load(Ordering::Relaxed) {
                sender.send(&sent.to_be_bytes())?;
                sent += 1;
                std::thread::park_timeout(Duration::from_millis(4));
            }
            Ok(sent)
        });
        let receiver = std::thread::spawn(move || {
            let (mut arrived, mut number) = (Vec::new(), [0; 8]);
            loop {
                match receiver.recv(&mut number) {
                    Ok(_) => arrived.push(u64::from_be_bytes(number)),
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    Err(_) if ended.load(Ordering::Relaxed) => return Ok(arrived),
                    Err(_) => {}
                }
            }
        });
        Ok(Self { stop, sender, receiver })
    }

    /// Ends them, and waits for those on their way.
    ///
    /// # Errors
    /// A socket failed.
    pub fn stop(self) -> io::Result<Stream> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let arrived = self.receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let arrived: BTreeSet<u64> = arrived.into_iter().collect();
        Ok(Stream { sent, lost: (0..sent).filter(|number| !arrived.contains(number)).collect() })
    }
}
