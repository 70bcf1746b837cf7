//! BPF programs on an interface as tc filters.
//!
//! Attaching a TCX link makes the kernel wait for an RCU grace period with the network lock held, twice for a pod and twice more
//! when its veth goes (`tcx_entry_sync`): 10 to 40 ms each that no other pod's interface can be made in. A filter below clsact
//! waits at most for an expedited one.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_route::tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::socket::{Mode, Netlink, NetlinkError, Request};

/// A filter's place among others below the same qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcPlace {
    /// Filters are asked from the lowest on; a program in direct-action mode that decides leaves those after it unasked.
    pub priority: u16,
    /// Among those of one priority.
    pub handle: u16,
}

impl TcPlace {
    /// Where stanchion's programs sit.
    pub fn ours(handle: u16) -> Self {
        Self { priority: 50, handle }
    }
}

/// `ETH_P_ALL` of `linux/if_ether.h`.
const ALL_PROTOCOLS: u16 = 3;

/// Where a program sits, as the host end of the veth sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcHook {
    /// Packets that come in.
    Ingress,
    /// Packets that go out.
    Egress,
}

impl TcHook {
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: u16::MAX, minor }
    }
}

/// A program for a hook.
#[derive(Clone, Copy, Debug)]
pub struct TcProgram<'a> {
    /// Where.
    pub hook: TcHook,
    /// The loaded program.
    pub program: BorrowedFd<'a>,
    /// What `tc filter show` calls it.
    pub name: &'a str,
}

impl Netlink {
    /// Puts the programs on an interface; a program that an earlier call put in the same place is replaced without a moment in which
    /// neither is there.
    ///
    /// False: another kind of qdisc has the interface's ingress place, and nothing was done. (Below `ingress` a filter for what goes
    /// out would judge what comes in.)
    ///
    /// # Errors
    /// The interface is gone, or the kernel refuses.
    pub fn attach_programs(&mut self, index: u32, place: TcPlace, programs: &[TcProgram<'_>]) -> Result<bool, NetlinkError> {
        // Made, or found to be of this kind; a single question for it is not answered (6.18 acknowledges and says nothing).
        match self.request(Request { message: qdisc(index), mode: Mode::Replace, words: format!("add qdisc clsact to link {index}") }) {
            Err(error) if error.errno() == Some(libc::EINVAL) => return Ok(false),
            made => made?,
        }
        let requests = programs.iter().map(|program| Request {
            message: RouteNetlinkMessage::NewTrafficFilter(filter(index, program.hook, place, Some(program))),
            mode: Mode::Replace,
            words: format!("add filter {} to link {index}", program.name),
        });
        self.batch(requests.collect())?.into_iter().collect::<Result<(), _>>().map(|()| true)
    }

    /// The name of the BPF filter at a place, as `tc filter show` has it; `None`: there is none, or it has no name.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn program_name(&mut self, index: u32, hook: TcHook, place: TcPlace) -> Result<Option<String>, NetlinkError> {
        let mut question = message(index);
        question.header.parent = hook.parent();
        let filters = self.dump(&RouteNetlinkMessage::GetTrafficFilter(question), "list filters")?;
        let is_there = |message: &TcMessage| {
            message.header.index == index.cast_signed()
                && message.header.info >> 16 == u32::from(place.priority)
                && u32::from(message.header.handle) == u32::from(place.handle)
        };
        Ok(filters.iter().find_map(|filter| match filter {
            RouteNetlinkMessage::NewTrafficFilter(message) if is_there(message) => name(message),
            _ => None,
        }))
    }

    /// Takes the filter of a place from a hook; whether it was there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn detach_program(&mut self, index: u32, hook: TcHook, place: TcPlace) -> Result<bool, NetlinkError> {
        let message = RouteNetlinkMessage::DelTrafficFilter(filter(index, hook, place, None));
        match self.request(Request { message, mode: Mode::Change, words: format!("delete filter from link {index}") }) {
            Ok(()) => Ok(true),
            // No qdisc: "Parent Qdisc doesn't exists" is EINVAL.
            Err(error) if error.is_absent() || error.errno() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn message(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.family = AddressFamily::Unspec;
    message.header.index = index.cast_signed();
    message
}

fn qdisc(index: u32) -> RouteNetlinkMessage {
    let mut message = message(index);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.header.parent = TcHandle::CLSACT;
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// `None`: only its place, to delete it.
fn filter(index: u32, hook: TcHook, place: TcPlace, program: Option<&TcProgram<'_>>) -> TcMessage {
    let mut message = message(index);
    message.header.parent = hook.parent();
    message.header.handle = TcHandle { major: 0, minor: place.handle };
    message.header.info = u32::from(place.priority) << 16 | u32::from(ALL_PROTOCOLS.to_be());
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    if let Some(program) = program {
        message.attributes.push(TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.program.as_raw_fd().cast_unsigned())),
            TcOption::Bpf(TcFilterBpfOption::ProgName(program.name.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]));
    }
    message
}

fn name(filter: &TcMessage) -> Option<String> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    })
}
