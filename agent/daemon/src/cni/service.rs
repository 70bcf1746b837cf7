//! The service `Cni` of `stanchion.proto`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::network::egress::{EgressFamily, is_egress_address};
use stanchion_core::network::host_veth_name;
use stanchion_proto as wire;
use stanchion_proto::cni_server::Cni;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::branch::{Branches, Ready};
use super::convert::{Caller, activate_status, assign_status, attachments, caller, chain, endpoint, key, release_status};
use crate::cluster::tell::Events;
use crate::cluster::write::Writer;
use crate::ipamd::{AddressView, AssignRequest, Assignment, IpamHandle};
use crate::netpol::{ActivateIf, ActivateRequest, NetpolHandle};

/// The longest wait for an address that a request may ask for.
const MAX_WAIT: Duration = Duration::from_secs(110);
/// The wait of a request that does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(20);

/// What the plugin is told with each address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniSettings {
    /// `POD_MTU` in bytes.
    pub pod_mtu: u32,
    /// `AWS_VPC_K8S_CNI_VETHPREFIX`.
    pub veth_prefix: String,
    /// Pods get an interface of the family that the cluster does not have.
    pub egress: Option<EgressFamily>,
    /// Pods do not start while the policy is not known (`NETWORK_POLICY_ENFORCING_MODE=strict`).
    pub strict_policy: bool,
}

/// Who else hears of a pod's addresses; nobody without an API server.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Kubernetes events about pods that got none.
    pub events: Option<Events>,
    /// ANNOTATE_POD_IP.
    pub annotator: Option<Writer>,
}

/// Answers the plugin.
#[derive(Clone, Debug)]
pub struct CniService {
    told: Told,
    /// `None`: no pod has security groups of its own.
    branches: Option<Branches>,
    ipam: IpamHandle,
    /// `None`: network policy is off, the plugin skips `ActivateEndpoint`.
    netpol: Option<NetpolHandle>,
    settings: CniSettings,
}

impl CniService {
    /// Answers from these two actors.
    pub fn new(ipam: IpamHandle, netpol: Option<NetpolHandle>, branches: Option<Branches>, settings: CniSettings, told: Told) -> Self {
        Self { told, branches, ipam, netpol, settings }
    }

    /// The addresses of an ordinary pod.
    async fn assign(&self, caller: &Caller, multi_nic: bool, deadline: Instant) -> Result<Assignment, Status> {
        let request =
            AssignRequest { key: caller.key.clone(), pod: caller.pod.clone(), pod_uid: caller.pod_uid.clone(), multi_nic, deadline };
        self.ipam.assign(request).await.map_err(|error| {
            self.no_address(caller, "NoFreeAddress", &error);
            assign_status(&error)
        })
    }

    /// The branch ENI of a pod with security groups of its own.
    async fn branch(&self, caller: &Caller, deadline: Instant) -> Result<Option<Ready>, Status> {
        let Some(branches) = &self.branches else { return Ok(None) };
        branches.of(&caller.pod, &caller.pod_uid, &self.ipam, deadline).await.map_err(|error| {
            self.ipam.branch_failed("AddNetwork");
            self.no_address(caller, "NoBranchENI", &error);
            Status::unavailable(chain(&error))
        })
    }

    fn no_address(&self, caller: &Caller, reason: &'static str, error: &(dyn std::error::Error + 'static)) {
        warn!(pod = %caller.pod, key = %caller.key, error, "no address");
        if let Some(events) = &self.told.events {
            events.pod_warning(&caller.pod, &caller.pod_uid, reason, "AssignAddress", chain(error));
        }
    }

    fn knows_branch(&self, caller: &Caller) -> Option<wire::Attachment> {
        let branches = self.branches.as_ref()?;
        Some(branches.attachment(&branches.known(&caller.pod, &caller.pod_uid)?))
    }
}

#[tonic::async_trait]
impl Cni for CniService {
    async fn add_network(&self, request: Request<wire::AddNetworkRequest>) -> Result<Response<wire::AddNetworkReply>, Status> {
        let request = request.into_inner();
        let caller = caller(request.sandbox)?;
        let wait = if request.wait_ms == 0 { DEFAULT_WAIT } else { Duration::from_millis(request.wait_ms.into()).min(MAX_WAIT) };
        let started = Instant::now();
        let branch = self.branch(&caller, started + wait).await?;
        let mut reply = wire::AddNetworkReply::default();
        match (&self.branches, &branch) {
            (Some(branches), Some(ready)) => {
                reply.attachments = vec![branches.attachment(&ready.branch)];
                reply.branch = Some(branches.wire(ready));
            }
            _ => {
                let assignment = self.assign(&caller, request.multi_nic, started + wait).await?;
                reply.attachments = attachments(&assignment);
                reply.external_snat = assignment.external_snat;
                reply.vpc_cidrs = assignment.vpc_cidrs.iter().map(ToString::to_string).collect();
            }
        }
        let ip = reply.attachments.first().map(|attachment| format!("{}{}", attachment.ipv4, attachment.ipv6)).unwrap_or_default();
        info!(pod = %caller.pod, key = %caller.key, ip, waited_us = started.elapsed().as_micros(), "assigned");
        if let Some(annotator) = &self.told.annotator {
            annotator.annotate(&caller.pod, &caller.pod_uid, &ip).await.map_err(|error| {
                warn!(pod = %caller.pod, error = &error as &dyn std::error::Error, "pod not annotated");
                Status::unavailable(format!("ANNOTATE_POD_IP is on and the pod could not be annotated with {ip}: {error}"))
            })?;
        }
        let policy_mode = match (&self.netpol, self.settings.strict_policy) {
            (None, _) => "",
            (Some(_), false) => "standard",
            (Some(_), true) => "strict",
        };
        Ok(Response::new(wire::AddNetworkReply {
            policy_mode: policy_mode.to_owned(),
            pod_mtu: self.settings.pod_mtu,
            veth_prefix: self.settings.veth_prefix.clone(),
            egress: self.settings.egress.map(|family| wire::Egress { if_name: family.pod_if().to_owned() }),
            ..reply
        }))
    }

    async fn activate_endpoint(
        &self,
        request: Request<wire::ActivateEndpointRequest>,
    ) -> Result<Response<wire::ActivateEndpointReply>, Status> {
        let request = request.into_inner();
        let caller = caller(request.sandbox)?;
        let endpoints = request.endpoints.iter().map(endpoint).collect::<Result<Vec<_>, _>>()?;
        let Some(netpol) = &self.netpol else { return Ok(Response::new(wire::ActivateEndpointReply::default())) };
        let activate = ActivateRequest {
            pod: caller.pod.clone(),
            pod_uid: caller.pod_uid,
            container_id: caller.key.container_id,
            endpoints,
            shares_ingress: request.shares_ingress,
        };
        let report = netpol.activate(activate).await.map_err(|error| {
            warn!(pod = %caller.pod, error = &error as &dyn std::error::Error, "policy not in force");
            activate_status(&error)
        })?;
        Ok(Response::new(wire::ActivateEndpointReply { policy_us: report.policy_us }))
    }

    async fn del_network(&self, request: Request<wire::DelNetworkRequest>) -> Result<Response<wire::DelNetworkReply>, Status> {
        let request = request.into_inner();
        let caller = caller(request.sandbox)?;
        // First the policy: an address that is free belongs to no endpoint.
        if let Some(netpol) = &self.netpol {
            netpol.deactivate(caller.key.container_id.clone()).await;
        }
        let released = self.ipam.release(caller.key.clone(), &request.reason).await.map_err(|error| {
            warn!(pod = %caller.pod, key = %caller.key, error = &error as &dyn std::error::Error, "not released");
            release_status(&error)
        })?;
        if released.is_some() {
            info!(pod = %caller.pod, key = %caller.key, reason = request.reason, "released");
        }
        let attachments = released.as_ref().map(attachments).unwrap_or_default();
        let branch = self.branches.as_ref().and_then(|branches| branches.known(&caller.pod, &caller.pod_uid));
        if let (Some(annotator), Some(first)) = (self.told.annotator.clone(), attachments.first()) {
            let (pod, ip) = (caller.pod, format!("{}{}", first.ipv4, first.ipv6));
            tokio::spawn(async move {
                if let Err(error) = annotator.clear_annotation(&pod, &ip).await {
                    warn!(%pod, error = &error as &dyn std::error::Error, "the pod's address annotation stays");
                }
            });
        }
        Ok(Response::new(wire::DelNetworkReply { attachments, vlan_id: branch.map_or(0, |branch| branch.vlan_id.into()) }))
    }

    async fn check_network(&self, request: Request<wire::CheckNetworkRequest>) -> Result<Response<wire::CheckNetworkReply>, Status> {
        let request = request.into_inner();
        let caller = caller(request.sandbox)?;
        let seen = request.endpoints.iter().map(endpoint).collect::<Result<Vec<_>, _>>()?;
        let held = match self.knows_branch(&caller) {
            Some(branch) => vec![branch],
            None => {
                let held = self.ipam.lookup(caller.key).await.map_err(|busy| Status::unavailable(busy.to_string()))?;
                held.as_ref().map(attachments).unwrap_or_default()
            }
        };
        let mut differences = address_differences(&held, &seen);
        let mut held_by = others_interface(&self.ipam.snapshot().addresses, &self.settings.veth_prefix, &caller.pod, &seen);
        if let Some(netpol) = &self.netpol {
            let snapshot = netpol.snapshot().await;
            let active = snapshot.endpoints.iter().find(|endpoint| endpoint.pod == caller.pod);
            for veth in &seen {
                if !active.is_some_and(|endpoint| endpoint.interfaces.iter().any(|interface| interface.index == veth.host_if_index)) {
                    differences.push(format!("no network policy is in force on {}", veth.host_if_name));
                }
            }
            let others = snapshot.endpoints.iter().filter(|endpoint| endpoint.pod != caller.pod);
            let mut holders = others.filter(|endpoint| {
                endpoint.interfaces.iter().any(|interface| seen.iter().any(|veth| veth.host_if_index == interface.index))
            });
            held_by = holders.next().map(|endpoint| endpoint.pod.clone()).or(held_by);
        }
        let held_by = held_by.map(|pod| pod.to_string()).unwrap_or_default();
        Ok(Response::new(wire::CheckNetworkReply { differences, held_by }))
    }

    async fn collect_garbage(&self, request: Request<wire::CollectGarbageRequest>) -> Result<Response<wire::CollectGarbageReply>, Status> {
        let wire::CollectGarbageRequest { network_name, valid } = request.into_inner();
        if network_name.is_empty() {
            return Err(Status::invalid_argument("the request names no network"));
        }
        let living: Vec<ContainerId> = valid.iter().map(|attachment| ContainerId::new(attachment.container_id.as_str())).collect();
        let keys = valid.into_iter().map(|a| key(network_name.clone(), &a.container_id, a.if_name)).collect();
        if let Some(netpol) = &self.netpol {
            let policed = netpol.snapshot().await;
            let others = held_elsewhere(&self.ipam.snapshot().addresses, &network_name);
            for container in policed.endpoints.iter().map(|endpoint| &endpoint.container_id) {
                // Of a sandbox that nobody can name the end is seen by its veth's.
                if !living.contains(container) && !others.contains(container) && !container.is_stand_in() {
                    netpol.deactivate(container.clone()).await;
                }
            }
        }
        let released = self.ipam.collect_garbage(&network_name, keys).await.map_err(|error| release_status(&error))?;
        info!(released, "garbage collected");
        Ok(Response::new(wire::CollectGarbageReply { released }))
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        let status = self.ipam.status();
        if !status.ready {
            return Ok(Response::new(wire::StatusReply { ready: false, reason: status.reason }));
        }
        // In standard mode pods may start before their policy is known.
        if let (Some(netpol), true) = (&self.netpol, self.settings.strict_policy)
            && !*netpol.ready().borrow()
        {
            let reason = "the cluster's policies are not read yet, and NETWORK_POLICY_ENFORCING_MODE is strict".to_owned();
            return Ok(Response::new(wire::StatusReply { ready: false, reason }));
        }
        Ok(Response::new(wire::StatusReply { ready: true, reason: String::new() }))
    }
}

/// Containers that are attached to other networks: their policy is not this network's garbage.
fn held_elsewhere(addresses: &[AddressView], network_name: &str) -> BTreeSet<ContainerId> {
    let keys = addresses.iter().filter_map(|address| address.key.as_ref());
    keys.filter(|key| key.network_name != network_name).map(|key| key.container_id.clone()).collect()
}

/// Another pod that holds addresses and of which one of these veths has the name.
fn others_interface(addresses: &[AddressView], prefix: &str, own: &PodName, seen: &[ActivateIf]) -> Option<PodName> {
    let mut attachments: BTreeMap<&PodName, usize> = BTreeMap::new();
    for pod in addresses.iter().filter_map(|address| address.pod.as_ref()).filter(|pod| *pod != own) {
        *attachments.entry(pod).or_default() += 1;
    }
    let has = |name: &str| seen.iter().any(|veth| veth.host_if_name == name);
    let names = |pod: &PodName, count: usize| {
        let egress = EgressFamily::ALL.into_iter().map(|family| family.host_if(prefix, pod));
        (0..count).map(|number| host_veth_name(prefix, pod, number)).chain(egress).any(|name| has(&name))
    };
    attachments.into_iter().find(|(pod, count)| names(pod, *count)).map(|(pod, _)| pod.clone())
}

/// What the books hold against what the plugin saw on the veths.
fn address_differences(held: &[wire::Attachment], seen: &[ActivateIf]) -> Vec<String> {
    if held.is_empty() {
        return vec!["the agent holds no address for this sandbox".to_owned()];
    }
    let held: Vec<IpAddr> =
        held.iter().flat_map(|attachment| [&attachment.ipv4, &attachment.ipv6]).filter_map(|text| text.parse().ok()).collect();
    let carried = |address: &IpAddr| seen.iter().any(|veth| veth.addresses().any(|present| present == *address));
    let absent = held.iter().filter(|address| !carried(address));
    let mut differences: Vec<String> =
        absent.map(|address| format!("the agent holds {address} for this sandbox, which no veth carries")).collect();
    for veth in seen {
        for address in veth.addresses().filter(|address| !is_egress_address(*address) && !held.contains(address)) {
            differences.push(format!("{} carries {address}, which the agent does not hold for this sandbox", veth.host_if_name));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(ipv4: &str) -> ActivateIf {
        ActivateIf { host_if_name: "eni1".into(), host_if_index: 7, ipv4: Some(ipv4.parse().unwrap()), ipv6: None }
    }

    #[test]
    fn what_another_network_holds_is_not_this_ones_garbage() {
        let view = |address: &str, held: Option<(&str, &str)>| AddressView {
            address: address.parse().unwrap(),
            eni: "eni-1".into(),
            state: if held.is_some() { "assigned" } else { "cooling" },
            pod: None,
            key: held.map(|(network, container)| key(network.to_owned(), container, "eth0".to_owned())),
            time: stanchion_core::ipam::Time::default(),
        };
        let addresses = [
            view("10.0.0.9", Some(("aws-cni", "a"))),
            view("10.0.0.10", Some(("renamed", "b"))),
            view("10.0.0.11", None),
            view("10.0.0.12", Some(("renamed", "a"))),
        ];
        let held = |network| held_elsewhere(&addresses, network).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(held("aws-cni"), ["a", "b"]);
        assert_eq!(held("renamed"), ["a"]);
        assert_eq!(held("third"), ["a", "b"]);
    }

    #[test]
    fn a_veth_of_another_pod_is_known_by_its_name() {
        let view = |pod: &str, address: &str| AddressView {
            address: address.parse().unwrap(),
            eni: "eni-1".into(),
            state: "assigned",
            pod: Some(PodName::new("x", pod)),
            key: Some(key("aws-cni".to_owned(), pod, "eth0".to_owned())),
            time: stanchion_core::ipam::Time::default(),
        };
        let addresses = [view("db.1", "10.0.0.9"), view("web", "10.0.0.10"), view("web", "10.0.1.10")];
        let asked = |own: &str, number: usize, of: &str| {
            let name = host_veth_name("eni", &PodName::new("x", of), number);
            let seen = [ActivateIf { host_if_name: name, ..veth("10.0.0.11") }];
            others_interface(&addresses, "eni", &PodName::new("x", own), &seen).map(|pod| pod.name)
        };
        assert_eq!(asked("db", 1, "db").as_deref(), Some("db.1"));
        assert_eq!(asked("db.1", 0, "db.1"), None, "its own, of an earlier sandbox");
        assert_eq!(asked("web.1", 0, "web.1").as_deref(), Some("web"));
        assert_eq!(asked("web.2", 0, "web.2"), None, "it has two");
        assert_eq!(asked("gone", 0, "gone"), None);
    }

    #[test]
    fn check_names_each_difference() {
        let held = [wire::Attachment { ipv4: "10.0.0.9".to_owned(), route_table: 2, ..wire::Attachment::default() }];
        assert_eq!(address_differences(&held, &[veth("10.0.0.9")]), Vec::<String>::new());
        assert_eq!(address_differences(&held, &[veth("10.0.0.8")]).len(), 2);
        assert_eq!(address_differences(&[], &[veth("10.0.0.9")]).len(), 1);
    }
}
