//! VLAN interfaces, which carry branch ENIs on the trunk's interface.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::InfoKind;
use rtnetlink::LinkMessageBuilder;
use stanchion_core::network::{NetOp, VlanLink};

use crate::message::request;
use crate::socket::{Mode, Netlink, NetlinkError, Request};

impl Netlink {
    /// Makes a VLAN interface, up; its number.
    ///
    /// # Errors
    /// When the name is taken, the parent is gone or the kernel has no VLANs, see [`lacks_vlans`].
    pub fn create_vlan(&mut self, vlan: &VlanLink) -> Result<u32, NetlinkError> {
        if let Some(request) = request(&NetOp::AddVlan(vlan.clone())) {
            self.request(request)?;
        }
        self.link_index(&vlan.name)
    }

    /// Whether the kernel can make VLAN interfaces; it loads its module (`8021q`) if it has to. Asks for one that cannot be made, as it
    /// names no parent: nothing is changed.
    ///
    /// # Errors
    /// When the kernel could not be asked.
    pub fn has_vlans(&mut self) -> Result<bool, NetlinkError> {
        let message = LinkMessageBuilder::<()>::new_with_info_kind(InfoKind::Vlan).build();
        let words = "ask for VLAN interfaces".to_owned();
        match self.request(Request { message: RouteNetlinkMessage::NewLink(message), mode: Mode::Create, words }) {
            Err(error @ NetlinkError::Socket { .. }) => Err(error),
            Err(error) if lacks_vlans(&error) => Ok(false),
            Ok(()) | Err(_) => Ok(true),
        }
    }
}

/// The kernel does not know the kind of interface.
pub fn lacks_vlans(error: &NetlinkError) -> bool {
    error.errno() == Some(libc::EOPNOTSUPP)
}
