//! Veth pairs, each end created where it shall live.

use std::os::fd::{AsFd, AsRawFd as _};

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage};
use rtnetlink::{LinkUnspec, LinkVeth};
use stanchion_core::ids::Mac;
use stanchion_core::network::NodeIf;

use crate::observe::node_if;
use crate::socket::{Mode, Netlink, NetlinkError, Request};

/// One end of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethEnd {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// An interface and what a veth says of its other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkFacts {
    /// The interface.
    pub link: NodeIf,
    /// The other end's number, in the other end's namespace.
    pub peer_index: Option<u32>,
}

/// The kernel's numbers of a pair, each in the namespace of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VethIndices {
    /// Of the end in the socket's namespace.
    pub own: u32,
    /// Of the other end.
    pub peer: u32,
}

/// What ADD asks of a link; to read the other fifty attributes takes as long as the request.
struct Brief {
    index: u32,
    flags: LinkFlags,
    /// `IFLA_LINK`: of a veth the other end.
    link: Option<u32>,
}

impl NetlinkDeserializable for Brief {
    type Error = DecodeError;

    /// `struct ifinfomsg` of `linux/rtnetlink.h` and the attributes behind it.
    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        const IFLA_LINK: u16 = 5;
        let Some(([_, _, _, _, i0, i1, i2, i3, f0, f1, f2, f3, ..], attributes)) = payload.split_first_chunk::<16>() else {
            return Err(DecodeError::from("a link's message is shorter than its header"));
        };
        let mut brief = Self {
            index: u32::from_ne_bytes([*i0, *i1, *i2, *i3]),
            flags: LinkFlags::from_bits_retain(u32::from_ne_bytes([*f0, *f1, *f2, *f3])),
            link: None,
        };
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            if attribute.kind() == IFLA_LINK {
                brief.link = attribute.value().try_into().ok().map(u32::from_ne_bytes);
            }
        }
        Ok(brief)
    }
}

impl Netlink {
    /// Creates a pair: `own` in this socket's namespace and up, `peer` in `peer_netns` and down. Each end has one queue, whatever
    /// the number of CPUs.
    ///
    /// Creating both ends in one namespace and moving one would make the kernel wait for an RCU barrier with the network lock
    /// held (aws/amazon-vpc-cni-k8s PR 3764: 5 s against 0.75 s for a burst of 30 pods).
    ///
    /// # Errors
    /// When a name is taken or the kernel refuses.
    pub fn create_veth(&mut self, own: &VethEnd, peer: &VethEnd, peer_netns: impl AsFd, mtu: u32) -> Result<VethIndices, NetlinkError> {
        let peer_message = LinkUnspec::new_with_name(&peer.name)
            .mtu(mtu)
            .address(peer.mac.0.to_vec())
            .setns_by_fd(peer_netns.as_fd().as_raw_fd())
            .append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1))
            .build();
        let message = LinkVeth::new(&own.name, &peer.name)
            .mtu(mtu)
            .address(own.mac.0.to_vec())
            .up()
            .append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1))
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer_message)))
            .build();
        let words = format!("create veth {} with peer {}", own.name, peer.name);
        let made = self.create(Request { message: RouteNetlinkMessage::NewLink(message), mode: Mode::Create, words: words.clone() })?;
        let made = match made {
            Some(made) => made,
            None => self.brief(&own.name)?,
        };
        let absent = || NetlinkError::Malformed { request: words, reason: "the pair's numbers are not told".to_owned() };
        Ok(VethIndices { own: made.index, peer: made.link.ok_or_else(absent)? })
    }

    /// The interface with this name; `None` when there is none.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn link(&mut self, name: &str) -> Result<Option<LinkFacts>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.get_link(message, &format!("get link {name}"))
    }

    /// The interface with this number; `None` when there is none.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<LinkFacts>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.get_link(message, &format!("get link {index}"))
    }

    fn get_link(&mut self, message: LinkMessage, words: &str) -> Result<Option<LinkFacts>, NetlinkError> {
        match self.get(RouteNetlinkMessage::GetLink(message), words) {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(facts(&message))),
            Ok(_) => Ok(None),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of an interface that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn link_index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        let absent = || NetlinkError::Refused {
            request: format!("get link {name}"),
            detail: String::new(),
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        };
        self.link(name)?.map(|facts| facts.link.index).ok_or_else(absent)
    }

    /// Whether the interface passes packets by now.
    ///
    /// A veth end that was set up before its other end begins to send only when the kernel's link watcher has run, which may
    /// take until long after the request that set the other end up; what is sent before is dropped. Asking for the one
    /// interface makes newer kernels (6.9) run the watcher's part at once.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn is_running(&mut self, name: &str) -> Result<bool, NetlinkError> {
        Ok(self.brief(name)?.flags.contains(LinkFlags::Running))
    }

    fn brief(&mut self, name: &str) -> Result<Brief, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        // Counters are summed up over all CPUs.
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        self.get(RouteNetlinkMessage::GetLink(message), &format!("get link {name}"))
    }

    /// Deletes an interface, with a veth its other end; whether there was one.
    ///
    /// # Errors
    /// When it is there and the kernel refuses.
    pub fn delete_link(&mut self, name: &str) -> Result<bool, NetlinkError> {
        self.delete(LinkUnspec::new_with_name(name).build(), format!("delete link {name}"))
    }

    /// The same for the interface with this number: one that was looked at before, whatever has its name by now.
    ///
    /// # Errors
    /// When it is there and the kernel refuses.
    pub fn delete_link_by_index(&mut self, index: u32) -> Result<bool, NetlinkError> {
        self.delete(LinkUnspec::new_with_index(index).build(), format!("delete link {index}"))
    }

    fn delete(&mut self, message: LinkMessage, words: String) -> Result<bool, NetlinkError> {
        match self.request(Request { message: RouteNetlinkMessage::DelLink(message), mode: Mode::Change, words }) {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn facts(message: &LinkMessage) -> LinkFacts {
    let link = node_if(message);
    let peer_index = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) if link.kind == "veth" => Some(*index),
        _ => None,
    });
    LinkFacts { link, peer_index }
}
