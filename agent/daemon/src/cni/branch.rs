//! Security groups for pods: waits for what AWS's resource controller writes of a pod's branch ENI.

use std::sync::Arc;
use std::time::Duration;

use stanchion_core::branch::{self, BranchEni, POD_ENI, branch_of, wants_branch};
use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::{Mac, PodName};
use stanchion_core::network::names::branch_route_table;
use stanchion_core::network::subnet_gateway;
use stanchion_core::objects::Pod;
use stanchion_proto as wire;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::ipamd::IpamHandle;

/// How often the trunk is looked for once all else is known.
const TRUNK_PERIOD: Duration = Duration::from_millis(250);

/// What is needed to connect pods to branch ENIs; absent unless `ENABLE_POD_ENI=true`.
#[derive(Clone, Debug)]
pub struct Branches {
    /// The cluster's objects.
    pub cluster: watch::Receiver<Arc<ClusterState>>,
    /// Pods' family.
    pub ipv6: bool,
    /// `POD_SECURITY_GROUP_ENFORCING_MODE=strict`.
    pub strict: bool,
}

/// Why a pod's branch ENI cannot be used (yet). The kubelet shows it to people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BranchFailure {
    /// Not even the pod is known.
    #[error(
        "pod {pod} is not known from the API server after {} ms, so nobody can tell whether it has security groups of its own \
         (ENABLE_POD_ENI): see whether this node's agent reaches the API server",
        waited.as_millis()
    )]
    UnknownPod {
        /// Which.
        pod: PodName,
        /// Since the request.
        waited: Duration,
    },
    /// The controller has not written it.
    #[error(
        "pod {pod} has security groups of its own (limit {POD_ENI}), and AWS's resource controller has not written its branch ENI \
         (annotation {POD_ENI}) after {} ms: see the pod's events",
        waited.as_millis()
    )]
    NoBranch {
        /// Which.
        pod: PodName,
        /// Since the request.
        waited: Duration,
    },
    /// What it wrote cannot be used.
    #[error("pod {pod}")]
    Unreadable {
        /// Which.
        pod: PodName,
        /// The annotation's fault.
        source: branch::BranchError,
    },
    /// The branch has no address of the cluster's family.
    #[error("pod {pod}: its branch ENI has no {family} address (annotation {POD_ENI}): see the subnets of its security group policy")]
    NoAddress {
        /// Which.
        pod: PodName,
        /// IPv4 or IPv6.
        family: &'static str,
    },
    /// No trunk.
    #[error(
        "pod {pod} has security groups of its own, and this node has no trunk ENI after {} ms: AWS's resource controller attaches one where the \
         node's CNINode has the feature SecurityGroupsForPods and an ENI is left (see `stanchion enis`)",
        waited.as_millis()
    )]
    NoTrunk {
        /// Which.
        pod: PodName,
        /// Since the request.
        waited: Duration,
    },
}

/// A branch ENI that can be connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) branch: BranchEni,
    trunk: Mac,
}

impl Branches {
    /// The pod's branch ENI, waited for until `deadline`; `None` for a pod without security groups of its own.
    pub(super) async fn of(&self, pod: &PodName, uid: &str, ipam: &IpamHandle, deadline: Instant) -> Result<Option<Ready>, BranchFailure> {
        let began = Instant::now();
        let mut cluster = self.cluster.clone();
        let known = cluster.wait_for(|state| {
            find(state, pod, uid).is_some_and(|pod| !wants_branch(pod) || pod.metadata.annotations.contains_key(POD_ENI))
        });
        // At the deadline, or when the source of objects has ended: what is known says what is missing.
        let _ = timeout_at(deadline, known).await.map(drop);
        let object = find(&self.cluster.borrow(), pod, uid).cloned();
        let object = object.ok_or_else(|| BranchFailure::UnknownPod { pod: pod.clone(), waited: began.elapsed() })?;
        if !wants_branch(&object) {
            return Ok(None);
        }
        let branch = branch_of(&object).map_err(|source| BranchFailure::Unreadable { pod: pod.clone(), source })?;
        let branch = branch.ok_or_else(|| BranchFailure::NoBranch { pod: pod.clone(), waited: began.elapsed() })?;
        if branch.addresses(self.ipv6).next().is_none() {
            return Err(BranchFailure::NoAddress { pod: pod.clone(), family: if self.ipv6 { "IPv6" } else { "IPv4" } });
        }
        loop {
            if let Some(trunk) = ipam.snapshot().trunk() {
                return Ok(Some(Ready { branch, trunk }));
            }
            if Instant::now() >= deadline {
                return Err(BranchFailure::NoTrunk { pod: pod.clone(), waited: began.elapsed() });
            }
            tokio::time::sleep_until(deadline.min(Instant::now() + TRUNK_PERIOD)).await;
        }
    }

    /// What is known of a pod's branch ENI now: for CHECK and DEL, which do not wait.
    pub(super) fn known(&self, pod: &PodName, uid: &str) -> Option<BranchEni> {
        let state = self.cluster.borrow();
        let object = find(&state, pod, uid).filter(|pod| wants_branch(pod))?;
        branch_of(object).ok().flatten()
    }

    /// As the plugin is told.
    pub(super) fn attachment(&self, branch: &BranchEni) -> wire::Attachment {
        let text = |wanted: bool| {
            let of_family = branch.addresses(self.ipv6).find(|address| address.is_ipv6() == wanted);
            of_family.map(|address| address.to_string()).unwrap_or_default()
        };
        wire::Attachment {
            ipv4: text(false),
            ipv6: text(true),
            route_table: branch_route_table(branch.vlan_id),
            ..wire::Attachment::default()
        }
    }

    /// The rest of what the plugin is told.
    pub(super) fn wire(&self, ready: &Ready) -> wire::BranchEni {
        let gateway = ready.branch.subnet.filter(|_| !self.ipv6).map(|subnet| subnet_gateway(subnet).to_string());
        wire::BranchEni {
            vlan_id: ready.branch.vlan_id.into(),
            mac: ready.branch.mac.to_string(),
            subnet_gateway: gateway.unwrap_or_default(),
            enforcing_mode: if self.strict { "strict" } else { "standard" }.to_owned(),
            trunk_mac: ready.trunk.to_string(),
        }
    }
}

/// The pod's object, unless that is of another pod of the same name.
fn find<'a>(state: &'a ClusterState, name: &PodName, uid: &str) -> Option<&'a Arc<Pod>> {
    state.pods.get(name).filter(|pod| pod.is_known_as(uid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipamd::{EniView, IpamSnapshot};

    fn state(uid: &str, annotations: &str, limits: &str) -> ClusterState {
        let text = format!(
            r#"{{"metadata":{{"namespace":"default","name":"a","uid":"{uid}","annotations":{annotations}}},"spec":{{"containers":[{{"name":"c","resources":{{"limits":{limits}}}}}]}}}}"#
        );
        let pod: Pod = serde_json::from_str(&text).unwrap();
        let mut state = ClusterState { synced: true, ..ClusterState::default() };
        state.apply(stanchion_core::cluster::Object::Pod(pod));
        state
    }

    const LIMIT: &str = r#"{"vpc.amazonaws.com/pod-eni":"1"}"#;
    const BRANCH: &str = r#"{"vpc.amazonaws.com/pod-eni":"[{\"eniId\":\"eni-9\",\"ifAddress\":\"02:00:00:00:00:09\",\"privateIp\":\"10.0.3.9\",\"vlanId\":7,\"subnetCidr\":\"10.0.3.0/24\"}]"}"#;

    fn eni() -> EniView {
        EniView {
            id: "eni-8".into(),
            mac: Mac([0; 6]),
            network_card: 0,
            device_index: 2,
            subnet: "subnet-1".into(),
            primary_ipv4: None,
            kind: String::new(),
            role: String::new(),
            route_table: 3,
            slots: 0,
            cidrs: Vec::new(),
            total: 0,
            assigned: 0,
        }
    }

    async fn asked(states: Vec<ClusterState>, trunk: bool) -> Result<Option<Ready>, BranchFailure> {
        let (sender, cluster) = watch::channel(Arc::new(ClusterState::default()));
        let enis = EniView { mac: Mac([2, 0, 0, 0, 0, 8]), kind: if trunk { "trunk" } else { "interface" }.to_owned(), ..eni() };
        let ipam = IpamHandle::fixed(IpamSnapshot { enis: vec![enis], ..IpamSnapshot::default() });
        let branches = Branches { cluster, ipv6: false, strict: true };
        let feed = async {
            for state in states {
                tokio::time::advance(Duration::from_secs(1)).await;
                sender.send_replace(Arc::new(state));
                tokio::task::yield_now().await;
            }
            std::future::pending::<()>().await;
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let pod = PodName::new("default", "a");
        tokio::select! {
            answer = branches.of(&pod, "u-1", &ipam, deadline) => answer,
            () = feed => unreachable!("it never ends"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_annotation_is_waited_for_and_an_ordinary_pod_waits_for_nothing_more() {
        let ordinary = asked(vec![state("u-1", "{}", r#"{"cpu":"1"}"#)], false).await;
        assert_eq!(ordinary, Ok(None));
        // An earlier pod of the same name counts for nothing.
        let states = vec![state("u-0", BRANCH, LIMIT), state("u-1", "{}", LIMIT), state("u-1", BRANCH, LIMIT)];
        let ready = asked(states, true).await.unwrap().unwrap();
        assert_eq!((ready.branch.vlan_id, ready.trunk), (7, Mac([2, 0, 0, 0, 0, 8])));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_missing_at_the_deadline_is_named_with_its_remedy() {
        for (states, trunk, says) in [
            (vec![], true, "not known from the API server after 10000 ms"),
            (vec![state("u-0", BRANCH, LIMIT)], true, "not known from the API server"),
            (vec![state("u-1", "{}", LIMIT)], true, "has not written its branch ENI"),
            (vec![state("u-1", BRANCH, LIMIT)], false, "no trunk ENI after"),
            (
                vec![state("u-1", &BRANCH.replace("privateIp", "ipv6Addr").replace("10.0.3.9", "2001:db8::9"), LIMIT)],
                true,
                "no IPv4 address",
            ),
        ] {
            let error = asked(states, trunk).await.unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("pod default/a"), "{error}");
        }
        let broken = asked(vec![state("u-1", &BRANCH.replace(":7,", ":0,"), LIMIT)], true).await.unwrap_err();
        assert!(super::super::convert::chain(&broken).contains("vlanId is 0"), "{broken:?}");
    }
}
