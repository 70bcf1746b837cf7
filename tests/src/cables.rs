//! Keeps real interfaces in step with the cloud: what is attached there has a cable here.
//!
//! Level-triggered: an event or a due time only says that it is worth looking; the wiring comes from the cloud's state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::cloud::{Eni, EniKind};
use stanchion_core::ids::{EniId, InstanceId};
use stanchion_core::network::branch::vlan_if_name;
use stanchion_netlink::Netlink;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use crate::fake_aws::{Cloud, EniEvent};
use crate::router::Router;
use crate::wires::Wire;

/// Where the cables of an instance end.
#[derive(Clone, Debug)]
pub(crate) struct Socket {
    pub(crate) netns: String,
    /// What the internet sees of the primary address.
    pub(crate) public: Ipv4Addr,
}

/// Shared by the task that follows the cloud and the lab that adds nodes.
#[derive(Clone, Debug)]
pub(crate) struct Cables {
    inner: Arc<Mutex<Inner>>,
    cloud: Cloud,
}

#[derive(Debug)]
struct Inner {
    router: Router,
    sockets: BTreeMap<InstanceId, Socket>,
    /// Branch ENIs, which EC2 shows as attached to nothing: the instance with their trunk, and their VLAN id.
    branches: BTreeMap<EniId, (InstanceId, u16)>,
    /// When an attached ENI's interface appears.
    appears: BTreeMap<EniId, Instant>,
    /// This machine's kernel has 802.1Q.
    has_vlans: bool,
}

impl Cables {
    pub(crate) fn new(router: Router, cloud: Cloud) -> anyhow::Result<Self> {
        let has_vlans = router.netns().run(|| Netlink::open()?.has_vlans())??;
        let inner = Inner { router, sockets: BTreeMap::new(), branches: BTreeMap::new(), appears: BTreeMap::new(), has_vlans };
        Ok(Self { inner: Arc::new(Mutex::new(inner)), cloud })
    }

    pub(crate) fn add_node(&self, instance: InstanceId, socket: Socket) {
        self.lock().sockets.insert(instance, socket);
    }

    /// Ties a branch ENI to the trunk of an instance and waits until it is wired: as a VLAN on the trunk's cable. Where this machine's kernel
    /// has no VLANs it gets a cable of its own, which ends in an interface of the name that the VLAN's would have, with the branch's
    /// Ethernet address, as if the trunk's had been split.
    pub(crate) async fn add_branch(&self, branch: EniId, instance: InstanceId, vlan_id: u16) -> anyhow::Result<()> {
        self.lock().branches.insert(branch, (instance, vlan_id));
        self.settled().await
    }

    /// The wiring is what the cloud says now.
    pub(crate) async fn settled(&self) -> anyhow::Result<()> {
        let cables = self.clone();
        tokio::task::spawn_blocking(move || cables.sync(Instant::now())).await?
    }

    pub(crate) fn refused(&self) -> anyhow::Result<crate::router::Refused> {
        self.lock().router.refused()
    }

    /// ENIs that have a cable now.
    pub(crate) fn plugged(&self) -> BTreeMap<EniId, Wire> {
        self.lock().router.wiring().clone()
    }

    /// Follows the cloud until it is gone.
    pub(crate) async fn follow(self, mut events: UnboundedReceiver<EniEvent>) {
        let mut due = BTreeSet::new();
        loop {
            let next = due.first().copied();
            let event = tokio::select! {
                event = events.recv() => match event {
                    Some(event) => Some(event),
                    None => return,
                },
                () = sleep_until(next) => None,
            };
            let mut batch: Vec<EniEvent> = event.into_iter().collect();
            while let Ok(event) = events.try_recv() {
                batch.push(event);
            }
            let now = Instant::now();
            due.retain(|at| *at > now);
            for event in batch {
                match event {
                    EniEvent::Attached { eni, after, .. } => {
                        self.lock().appears.insert(eni.id, now + after);
                        due.insert(now + after);
                    }
                    // The cloud's clock started a moment before ours.
                    EniEvent::Detached { after, .. } => {
                        due.insert(now + after + Duration::from_millis(5));
                    }
                    EniEvent::Deleted { eni } => {
                        self.lock().appears.remove(&eni.id);
                    }
                    EniEvent::AddressesChanged { .. } => {}
                }
            }
            let cables = self.clone();
            let synced = tokio::task::spawn_blocking(move || cables.sync(now)).await;
            if let Err(error) = synced.map_err(anyhow::Error::from).and_then(std::convert::identity) {
                eprintln!("lab: the wiring no longer follows the cloud: {error:#}");
            }
        }
    }

    fn sync(&self, now: Instant) -> anyhow::Result<()> {
        let enis = self.cloud.enis();
        let subnets: BTreeMap<_, _> = self.cloud.subnets().into_iter().map(|subnet| (subnet.id.clone(), subnet.cidr)).collect();
        let inner = &mut *self.lock();
        let there: Vec<&Eni> = enis.iter().filter(|eni| inner.appears.get(&eni.id).is_none_or(|at| *at <= now)).collect();
        let trunks: BTreeMap<&InstanceId, &EniId> = there
            .iter()
            .filter(|eni| eni.kind == EniKind::Trunk)
            .filter_map(|eni| Some((&eni.attachment.as_ref()?.instance, &eni.id)))
            .collect();
        let wanted =
            there.iter().filter_map(|eni| Some((eni.id.clone(), wire(eni, *subnets.get(&eni.subnet)?, &trunks, inner)?))).collect();
        inner.router.apply(&wanted)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wire(eni: &Eni, subnet: Ipv4Net, trunks: &BTreeMap<&InstanceId, &EniId>, inner: &Inner) -> Option<Wire> {
    let sockets = &inner.sockets;
    if let Some((instance, vlan_id)) = inner.branches.get(&eni.id) {
        return Some(Wire {
            eni: eni.id.clone(),
            mac: eni.mac,
            netns: sockets.get(instance)?.netns.clone(),
            if_name: vlan_if_name(*vlan_id),
            subnet,
            primary: eni.primary_ipv4?,
            secondary: BTreeSet::new(),
            public: None,
            over: if inner.has_vlans { Some(((*trunks.get(instance)?).clone(), *vlan_id)) } else { None },
        });
    }
    let attachment = eni.attachment.as_ref()?;
    let socket = sockets.get(&attachment.instance)?;
    let is_primary = attachment.device_index == 0 && attachment.network_card == 0;
    let if_name = match attachment.network_card {
        0 => format!("eth{}", attachment.device_index),
        card => format!("eth{card}c{}", attachment.device_index),
    };
    let ipv4 = eni.secondary_ipv4.iter().map(|address| Ipv4Net::from(*address)).chain(eni.prefixes_v4.iter().copied());
    let ipv6 = eni.ipv6.iter().map(|address| Ipv6Net::from(*address)).chain(eni.prefixes_v6.iter().copied());
    Some(Wire {
        eni: eni.id.clone(),
        mac: eni.mac,
        netns: socket.netns.clone(),
        if_name,
        subnet,
        primary: eni.primary_ipv4?,
        secondary: ipv4.map(IpNet::from).chain(ipv6.map(IpNet::from)).collect(),
        public: is_primary.then_some(socket.public),
        over: None,
    })
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
