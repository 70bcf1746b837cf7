//! Tells the cluster about this node: events on pods and the node, its condition NetworkUnavailable, the start-up taint
//! taken off, the CNINode's features.
//!
//! Level-triggered on a tick over what the other tasks publish; pods' failures come by a bounded channel. Nothing here
//! holds up a pod: a full channel drops the event.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stanchion_core::config::Config;
use stanchion_core::events::{Event, Post, Recorder, Regarding};
use stanchion_core::ids::PodName;
use stanchion_core::ipam::{Time, eni_config_name};
use stanchion_core::metrics::model::AllowanceAlarm;
use stanchion_core::objects::Condition;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::ClusterHandle;
use super::write::{NETWORK_UNAVAILABLE, WriteError, Writer};
use crate::ipamd::{IpamHandle, IpamSnapshot, SubnetView};
use crate::netpol::{Alarms, NetpolHandle, NetpolSnapshot};

/// How often the state is looked at.
const TICK: Duration = Duration::from_secs(1);
/// How often policy's alarms are looked at: a snapshot reads every endpoint's counters.
const POLICY_EVERY: Duration = Duration::from_secs(30);
/// How often the CNINode is looked at.
const FEATURE_EVERY: Duration = Duration::from_secs(300);
/// The same while a trunk is wanted: pods wait for it. Each time later, up to [`FEATURE_EVERY`].
const TRUNK_EVERY: Duration = Duration::from_secs(10);
/// How soon a condition that somebody took away again is written anew.
const CONDITION_EVERY: Duration = Duration::from_secs(30);
/// Pods' events that may wait; a node starts a few pods a second.
const MAILBOX: usize = 128;
/// Events that wait for an API server that is away; older ones go first.
const KEPT: usize = 64;
/// Pause after a write that failed.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Where others leave what a person should know.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Event>);

impl Events {
    /// About a pod; dropped when too many wait.
    pub fn pod_warning(&self, pod: &PodName, uid: &str, reason: &'static str, action: &'static str, note: String) {
        let event = Event { regarding: Regarding::Pod(pod.clone(), uid.to_owned()), warning: true, reason, action, note };
        if self.0.try_send(event).is_err() {
            debug!(%pod, reason, "an event is dropped: too many wait");
        }
    }

    /// Tells on the node each network allowance of its instance that was exceeded, until nobody looks at them any more.
    pub async fn follow_allowances(self, node: String, mut alarms: broadcast::Receiver<AllowanceAlarm>) {
        loop {
            let note = match alarms.recv().await {
                Ok(alarm) => alarm.sentence(),
                // Those that were missed were like those that come.
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            };
            let (reason, action) = ("NetworkAllowanceExceeded", "CarryPackets");
            if self.0.try_send(Event { regarding: Regarding::Node(node.clone()), warning: true, reason, action, note }).is_err() {
                debug!(reason, "an event is dropped: too many wait");
            }
        }
    }
}

/// What the task works with.
pub struct TellParts {
    /// The API server.
    pub writer: Writer,
    /// Every setting.
    pub config: Arc<Config>,
    /// The cluster's objects.
    pub cluster: ClusterHandle,
    /// Addresses.
    pub ipam: IpamHandle,
    /// Policy.
    pub netpol: Option<NetpolHandle>,
    /// This node.
    pub node_name: String,
    /// Ends the task.
    pub shutdown: CancellationToken,
}

/// Starts the task.
pub fn spawn(parts: TellParts) -> (Events, JoinHandle<()>) {
    let (sender, mailbox) = mpsc::channel(MAILBOX);
    let shutdown = parts.shutdown.clone();
    let task = tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = Teller::new(parts).run(mailbox) => {}
        }
    });
    (Events(sender), task)
}

/// When to write again after failures.
struct Backoff {
    pause: Duration,
    not_before: tokio::time::Instant,
}

impl Backoff {
    fn new() -> Self {
        Self { pause: PAUSE.0, not_before: tokio::time::Instant::now() }
    }

    fn is_due(&self) -> bool {
        tokio::time::Instant::now() >= self.not_before
    }

    /// Says the failure and puts off the next try, each time longer.
    fn put_off(&mut self, what: &str, error: &WriteError) {
        warn!(what, error = error as &dyn std::error::Error, pause = ?self.pause, "not written to the API server; tried again");
        self.not_before = tokio::time::Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

struct Teller {
    parts: TellParts,
    recorder: Recorder,
    queue: VecDeque<Post>,
    /// Of the node's own objects, and of events: what refuses the one may take the other.
    writes: Backoff,
    posts: Backoff,
    /// The newest failure of addresses that was told.
    errors_told: Time,
    was_ready: bool,
    /// Policy is looked at next.
    policy_due: tokio::time::Instant,
    alarms: Option<Alarms>,
    /// What was wrong in policies at the last look.
    problems: Vec<String>,
    /// The node's condition is written next, if it is not there.
    condition_due: tokio::time::Instant,
    /// The CNINode is looked at next, and the pause after that while a trunk is wanted.
    feature_due: tokio::time::Instant,
    trunk_pause: Duration,
    /// Subnets without addresses as they were told.
    subnets_told: Vec<SubnetView>,
}

impl Teller {
    fn new(parts: TellParts) -> Self {
        Self {
            recorder: Recorder::new(&parts.node_name),
            parts,
            queue: VecDeque::new(),
            writes: Backoff::new(),
            posts: Backoff::new(),
            errors_told: Time::default(),
            was_ready: false,
            policy_due: tokio::time::Instant::now(),
            alarms: None,
            problems: Vec::new(),
            condition_due: tokio::time::Instant::now(),
            feature_due: tokio::time::Instant::now(),
            trunk_pause: TRUNK_EVERY,
            subnets_told: Vec::new(),
        }
    }

    async fn run(mut self, mut mailbox: mpsc::Receiver<Event>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = mailbox.recv() => match event {
                    Some(event) => self.record(event),
                    // Nobody may report about pods any more; the node's state is told on.
                    None => drop(tick.tick().await),
                },
                _ = tick.tick() => {}
            }
            self.look().await;
            self.send().await;
        }
    }

    fn record(&mut self, event: Event) {
        if let Some(post) = self.recorder.record(event, now_ms()) {
            if self.queue.len() >= KEPT {
                self.queue.pop_front();
            }
            self.queue.push_back(post);
        }
    }

    fn node_event(&mut self, warning: bool, reason: &'static str, action: &'static str, note: String) {
        self.record(Event { regarding: Regarding::Node(self.parts.node_name.clone()), warning, reason, action, note });
    }

    async fn look(&mut self) {
        let snapshot = self.parts.ipam.snapshot();
        self.tell_addresses(&snapshot);
        self.tell_policy().await;
        if snapshot.status.ready && self.writes.is_due() {
            self.set_condition().await;
            self.remove_taint().await;
            self.set_features(&snapshot).await;
        }
    }

    fn tell_addresses(&mut self, snapshot: &IpamSnapshot) {
        let told = self.errors_told;
        for error in snapshot.recent_errors.iter().filter(|error| error.time > told) {
            self.errors_told = self.errors_told.max(error.time);
            let denied = ["UnauthorizedOperation", "AccessDenied"].iter().any(|code| error.error.contains(code));
            let note = format!("{}: {}", error.operation, error.error);
            match self.parts.config.operations.own_pod.clone().filter(|_| denied) {
                // aws-node's word for it and the object that it is about, which people's alarms know.
                Some((pod, uid)) => {
                    let (reason, action) = ("MissingIAMPermissions", "ManageAddresses");
                    self.record(Event { regarding: Regarding::Pod(pod, uid), warning: true, reason, action, note });
                }
                None if denied => self.node_event(true, "MissingIAMPermissions", "ManageAddresses", note),
                None => self.node_event(true, "AddressManagementFailed", "ManageAddresses", note),
            }
        }
        // Once for each refusal.
        let told = std::mem::replace(&mut self.subnets_told, snapshot.subnets.clone());
        for subnet in snapshot.subnets.iter().filter(|subnet| !told.contains(subnet)) {
            let note = format!("subnet {} has no {} left: {}", subnet.subnet, subnet.what, subnet.reason);
            self.node_event(true, "SubnetExhausted", "ManageAddresses", note);
        }
        if snapshot.status.ready && !self.was_ready {
            let note = format!("pods can be connected: {} ENIs, at most {} pods", snapshot.enis.len(), snapshot.max_pods);
            self.node_event(false, "NetworkReady", "Start", note);
        }
        self.was_ready |= snapshot.status.ready;
    }

    async fn tell_policy(&mut self) {
        let Some(netpol) = &self.parts.netpol else { return };
        if tokio::time::Instant::now() < self.policy_due {
            return;
        }
        self.policy_due = tokio::time::Instant::now() + POLICY_EVERY;
        let (snapshot, is_known) = (netpol.snapshot().await, *netpol.ready().borrow());
        if let Some(note) = behind(is_known, &snapshot) {
            self.node_event(true, "NetworkPolicyNotWritten", "EnforcePolicy", note);
        }
        let known = std::mem::replace(&mut self.problems, snapshot.problems.clone());
        for problem in snapshot.problems.iter().filter(|problem| !known.contains(problem)) {
            self.node_event(true, "NetworkPolicyProblem", "EnforcePolicy", problem.clone());
        }
        let now = snapshot.alarms;
        let before = self.alarms.replace(now).unwrap_or_default();
        for note in alarm_notes(&before, &now) {
            self.node_event(true, "NetworkPolicyAlarm", "EnforcePolicy", note);
        }
    }

    /// Never the other way: a node whose agent ended in the wrong moment would get no pods until somebody looks.
    async fn set_condition(&mut self) {
        let cluster = self.parts.cluster.latest();
        let Some(node) = cluster.nodes.get(&self.parts.node_name).filter(|_| self.parts.config.operations.node_condition) else { return };
        let said = |condition: &Condition| condition.kind == NETWORK_UNAVAILABLE && condition.status == "False";
        if node.status.conditions.iter().any(said) || tokio::time::Instant::now() < self.condition_due {
            return;
        }
        // The watch tells it back; until then it is not written again.
        self.condition_due = tokio::time::Instant::now() + CONDITION_EVERY;
        let now = jiff::Timestamp::from_second(i64::try_from(now_ms() / 1000).unwrap_or_default()).unwrap_or_default().to_string();
        let result = self.parts.writer.network_available(&self.parts.node_name, &now).await;
        if self.settled("the node's condition", result).is_some() {
            info!(condition = NETWORK_UNAVAILABLE, "the node's condition says that its network is there");
        }
    }

    async fn remove_taint(&mut self) {
        let key = self.parts.config.operations.startup_taint.clone();
        let cluster = self.parts.cluster.latest();
        let tainted = cluster.nodes.get(&self.parts.node_name).is_some_and(|node| node.spec.taints.iter().any(|taint| taint.key == key));
        if key.is_empty() || !tainted {
            return;
        }
        let result = self.parts.writer.remove_taint(&self.parts.node_name, &key).await;
        if self.settled("the start-up taint", result) == Some(true) {
            info!(key, "start-up taint taken off");
            self.node_event(false, "StartupTaintRemoved", "Start", format!("pods can be connected: taint {key} was taken off"));
        }
    }

    /// As aws-node does: the resource controller reads from it which ENIConfig the node uses, and that it wants a trunk. Also with the trunk there:
    /// a node that was registered anew has another CNINode, and without the feature the controller gives its pods no branches.
    async fn set_features(&mut self, snapshot: &IpamSnapshot) {
        let wants_trunk = snapshot.wants_trunk;
        if !wants_trunk {
            self.trunk_pause = TRUNK_EVERY;
        } else if self.trunk_pause == TRUNK_EVERY {
            self.feature_due = self.feature_due.min(tokio::time::Instant::now() + TRUNK_EVERY);
        }
        let trunk = wants_trunk || (self.parts.config.pool.pod_eni && snapshot.trunk().is_some());
        let trunk = trunk.then(|| ("SecurityGroupsForPods", String::new()));
        let wanted: Vec<_> = self.eni_config().map(|name| ("CustomNetworking", name)).into_iter().chain(trunk).collect();
        if wanted.is_empty() || tokio::time::Instant::now() < self.feature_due {
            return;
        }
        // The CNINode may come later than the node, and somebody may change it. Pods wait for a trunk.
        self.feature_due = tokio::time::Instant::now() + if wants_trunk { self.trunk_pause } else { FEATURE_EVERY };
        if wants_trunk {
            self.trunk_pause = (self.trunk_pause * 2).min(FEATURE_EVERY);
        }
        for (feature, value) in wanted {
            let result = self.parts.writer.set_feature(&self.parts.node_name, feature, &value).await;
            if self.settled("the CNINode", result) == Some(true) {
                info!(feature, value, "written to the CNINode");
            }
        }
    }

    /// The node's ENIConfig, if it has one of its own.
    fn eni_config(&self) -> Option<String> {
        let pool = &self.parts.config.pool;
        let cluster = self.parts.cluster.latest();
        let node = cluster.nodes.get(&self.parts.node_name).filter(|_| pool.custom_networking)?;
        Some(eni_config_name(node, &pool.eni_config_annotation, &pool.eni_config_label).to_owned()).filter(|name| name != "default")
    }

    /// A failure is said and puts off the next try.
    fn settled<T>(&mut self, what: &str, result: Result<T, WriteError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.writes = Backoff::new();
                Some(value)
            }
            Err(error) => {
                self.writes.put_off(what, &error);
                None
            }
        }
    }

    async fn send(&mut self) {
        self.queue.extend(self.recorder.due(now_ms()));
        while self.posts.is_due()
            && let Some(post) = self.queue.pop_front()
        {
            match self.parts.writer.post(post.clone()).await {
                Ok(()) => self.posts = Backoff::new(),
                // An event that is gone cannot be counted on, one that is refused will be refused again.
                Err(error) if error.is_gone() => debug!(error = &error as &dyn std::error::Error, "an event is dropped"),
                Err(error) if error.is_final() => {
                    warn!(error = &error as &dyn std::error::Error, "the API server refuses an event: it is dropped");
                }
                Err(error) => {
                    self.queue.push_front(post);
                    self.posts.put_off("an event", &error);
                }
            }
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// What the kernel's maps do not take, once policies are known.
fn behind(is_known: bool, snapshot: &NetpolSnapshot) -> Option<String> {
    (is_known && !snapshot.ready).then(|| format!("what is enforced stays as it is, and no pod starts: {}", snapshot.reason))
}

/// One sentence a table that overflowed since the last look.
fn alarm_notes(before: &Alarms, now: &Alarms) -> Vec<String> {
    let grown = |before: u64, now: u64, what: &str| (now > before).then(|| format!("{} {what}", now - before));
    [
        grown(before.flow_table_full, now.flow_table_full, "flows found the flow table full and are judged packet by packet"),
        grown(before.pod_flow_cap, now.pod_flow_cap, "flows found their pod at its cap of open flows and are judged packet by packet"),
        grown(before.no_endpoint, now.no_endpoint, "packets were dropped because their pod's policy record is missing"),
        grown(before.events_lost, now.events_lost, "denied flows were not recorded: too many at once"),
        grown(before.names_lost, now.names_lost, "DNS answers were not read: too many at once; connections to what they name are denied"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::Json;
    use axum::http::{Method, StatusCode, Uri};
    use axum::response::IntoResponse as _;
    use serde_json::json;
    use stanchion_core::cluster::ClusterState;
    use stanchion_core::manifests;

    use super::super::credentials;
    use super::*;
    use crate::ipamd::{EniView, IpamStatus, RecentError};

    const TAINTED: &str = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": {"taints": [{"key": "start"}]}}"#;

    /// An API server that refuses events as one does for a namespace that ends, and those of namespace `unheard` for want of a right;
    /// and a teller on a node that is ready and tainted. What was asked, as `METHOD path`.
    async fn teller() -> (Teller, Arc<Mutex<Vec<String>>>) {
        teller_with(&[], IpamSnapshot::default()).await
    }

    async fn teller_with(settings: &[(&str, &str)], snapshot: IpamSnapshot) -> (Teller, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let answer = move |method: Method, uri: Uri| {
            seen.lock().unwrap().push(format!("{method} {}", uri.path()));
            let refused = |message: &str| {
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "reason": "Forbidden", "message": message});
                (StatusCode::FORBIDDEN, Json(status))
            };
            let answer = if uri.path().contains("/ending/") {
                refused(
                    "events.events.k8s.io \"a\" is forbidden: unable to create new content in namespace ending because it is being terminated",
                )
            } else if uri.path().contains("/unheard/") {
                refused("events.events.k8s.io is forbidden: User \"u\" cannot create resource \"events\" in the namespace \"unheard\"")
            } else if uri.path().contains("/events") {
                (StatusCode::CREATED, Json(json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}})))
            } else {
                (StatusCode::OK, Json(serde_json::from_str(TAINTED).unwrap()))
            };
            std::future::ready(answer.into_response())
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await.unwrap() });
        let snapshot = IpamSnapshot { status: IpamStatus { ready: true, reason: String::new() }, ..snapshot };
        let cluster = ClusterState::default().replaced_by(manifests::parse("node.json", TAINTED).unwrap());
        let set = [settings, &[("STANCHION_STARTUP_TAINT", "start")]].concat();
        let parts = TellParts {
            writer: Writer::new(credentials::fixed(credentials::plain(&url).unwrap())),
            config: Arc::new(Config::read(&|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())).unwrap()),
            cluster: ClusterHandle::fixed(cluster),
            ipam: IpamHandle::fixed(snapshot),
            netpol: None,
            node_name: "n1".into(),
            shutdown: CancellationToken::new(),
        };
        (Teller::new(parts), asked)
    }

    fn of_pod(namespace: &str) -> Event {
        let regarding = Regarding::Pod(PodName::new(namespace, "a"), String::new());
        Event { regarding, warning: true, reason: "NoFreeAddress", action: "AssignAddress", note: "none".into() }
    }

    #[tokio::test]
    async fn an_event_for_a_namespace_that_ends_holds_no_other_up() {
        let (mut teller, asked) = teller().await;
        ["ending", "x"].into_iter().for_each(|namespace| teller.record(of_pod(namespace)));
        teller.send().await;
        let asked = asked.lock().unwrap().clone();
        assert!(asked.iter().any(|request| request.contains("/namespaces/x/events")), "{asked:?}");
        assert!(teller.queue.is_empty(), "{:?}", teller.queue);
    }

    #[tokio::test]
    async fn events_that_may_not_be_written_hold_up_nothing_else() {
        let (mut teller, asked) = teller().await;
        teller.record(of_pod("unheard"));
        teller.send().await;
        assert_eq!(teller.queue.len(), 1, "the right may come");
        teller.look().await;
        let asked = asked.lock().unwrap().clone();
        assert!(asked.contains(&"PATCH /api/v1/nodes/n1".to_owned()), "the taint goes: {asked:?}");
    }

    fn failed(error: &str) -> IpamSnapshot {
        let (time, operation) = (Time(1), "describe subnets".to_owned());
        IpamSnapshot { recent_errors: vec![RecentError { time, operation, error: error.to_owned() }], ..IpamSnapshot::default() }
    }

    #[tokio::test]
    async fn a_missing_permission_is_told_on_the_agents_own_pod() {
        let own = [("MY_POD_NAME", "stanchion-x"), ("MY_POD_NAMESPACE", "kube-system"), ("MY_POD_UID", "u1")];
        let denied = || failed("DescribeSubnets: not allowed (UnauthorizedOperation)");
        for (settings, snapshot, namespace) in [
            (&own[..], denied(), "kube-system"),
            (&[], denied(), "default"),
            (&own[..], failed("DescribeSubnets: EC2 throttles"), "default"),
        ] {
            let (mut teller, asked) = teller_with(settings, snapshot).await;
            teller.look().await;
            teller.send().await;
            let asked = asked.lock().unwrap().clone();
            let path = format!("POST /apis/events.k8s.io/v1/namespaces/{namespace}/events");
            assert!(asked.contains(&path), "{settings:?}: {asked:?}");
        }
    }

    /// A shortage lasts for minutes, and a tick is a second.
    #[tokio::test]
    async fn an_exhausted_subnet_is_told_once_a_refusal() {
        let subnet = |until| SubnetView { subnet: "subnet-1".into(), what: "addresses", since: Time(1), until, reason: "none".into() };
        let (mut teller, _) =
            teller_with(&[("STANCHION_STARTUP_TAINT", "")], IpamSnapshot { subnets: vec![subnet(Time(9))], ..IpamSnapshot::default() })
                .await;
        for _ in 0..5 {
            teller.look().await;
        }
        let later = now_ms() + 60_000;
        assert_eq!(teller.recorder.due(later), [], "it is no news");
        teller.parts.ipam = IpamHandle::fixed(IpamSnapshot { subnets: vec![subnet(Time(20))], ..IpamSnapshot::default() });
        teller.look().await;
        assert_eq!(teller.recorder.due(later).len(), 1, "refused again");
    }

    /// A node that was registered anew has another CNINode, while its trunk is still there.
    #[tokio::test]
    async fn the_cni_node_is_looked_after_with_the_trunk_there_and_ever_less_without() {
        let trunk = EniView {
            id: "eni-9".into(),
            mac: "02:00:00:00:00:09".parse().unwrap(),
            network_card: 0,
            device_index: 2,
            subnet: "subnet-1".into(),
            primary_ipv4: None,
            kind: "trunk".into(),
            role: "trunk".into(),
            route_table: 3,
            slots: 9,
            cidrs: Vec::new(),
            total: 0,
            assigned: 0,
        };
        let with_trunk = IpamSnapshot { enis: vec![trunk], ..IpamSnapshot::default() };
        let wanted = IpamSnapshot { wants_trunk: true, ..IpamSnapshot::default() };
        for (settings, snapshot, pauses) in [
            (&[("ENABLE_POD_ENI", "true")][..], with_trunk.clone(), &[300, 300][..]),
            (&[("ENABLE_POD_ENI", "true")], wanted, &[10, 20, 40, 80, 160, 300, 300]),
            (&[], with_trunk, &[]),
        ] {
            let (mut teller, asked) = teller_with(settings, snapshot).await;
            let mut put_off = Vec::new();
            for _ in 0..pauses.len().max(1) {
                let due = tokio::time::Instant::now();
                teller.feature_due = due;
                teller.look().await;
                put_off.extend(Some((teller.feature_due - due).as_secs()).filter(|pause| *pause > 0));
            }
            assert_eq!(put_off, pauses, "{settings:?}");
            let seen =
                asked.lock().unwrap().iter().filter(|request| request.starts_with("GET") && request.ends_with("/cninodes/n1")).count();
            assert_eq!(seen, pauses.len(), "{settings:?}");
        }
    }

    #[test]
    fn policy_that_the_kernel_does_not_take_is_told_once_policies_are_known() {
        let snapshot = |ready| NetpolSnapshot { ready, reason: "map VERDICTS".into(), ..NetpolSnapshot::default() };
        assert_eq!(behind(false, &snapshot(false)), None, "at the start");
        assert_eq!(behind(true, &snapshot(true)), None);
        assert!(behind(true, &snapshot(false)).unwrap().contains("map VERDICTS"));
    }

    #[tokio::test]
    async fn an_exceeded_allowance_is_a_warning_on_the_node() {
        let (sender, mut mailbox) = mpsc::channel(1);
        let (alarms, receiver) = broadcast::channel(4);
        for packets in [7, 8] {
            alarms.send(AllowanceAlarm { interface: "ens5".into(), allowance: "pps", packets }).unwrap();
        }
        drop(alarms);
        // The second finds no room; nothing waits for it.
        Events(sender).follow_allowances("n1".into(), receiver).await;
        let event = mailbox.recv().await.expect("the first");
        assert_eq!((event.regarding, event.warning, event.reason), (Regarding::Node("n1".into()), true, "NetworkAllowanceExceeded"));
        assert!(event.note.starts_with("7 packets of ens5"), "{}", event.note);
        assert!(mailbox.recv().await.is_none());
    }

    #[test]
    fn an_alarm_is_told_when_it_grows() {
        let before = Alarms { events_lost: 3, ..Alarms::default() };
        let now = Alarms { events_lost: 5, no_endpoint: 1, ..Alarms::default() };
        let notes = alarm_notes(&before, &now);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[1].starts_with("2 denied flows"), "{notes:?}");
        assert!(alarm_notes(&now, &now).is_empty());
    }
}
