//! What the cloud holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use rand::RngExt as _;
use rand::rngs::StdRng;
use stanchion_core::cloud::{Eni, Subnet};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId, VpcId};
use stanchion_core::limits::InstanceLimits;
use tokio::sync::mpsc::UnboundedSender;

use super::clock::Clock;
use super::cloud::LoggedCall;
use super::faults::{ApiError, Faults, mix};
use super::logs::LogsState;
use super::subnet::{Placement, SubnetState};

/// A cloud to build.
#[derive(Clone, Debug)]
pub struct CloudConfig {
    /// `eu-west-1`.
    pub region: String,
    /// Id of the VPC.
    pub vpc: VpcId,
    /// The VPC's IPv4 ranges, its first one first.
    pub vpc_cidrs: Vec<Ipv4Net>,
    /// The VPC's IPv6 ranges.
    pub vpc_ipv6_cidrs: Vec<Ipv6Net>,
    /// Security groups that exist.
    pub security_groups: BTreeSet<SecurityGroupId>,
    /// How long things take.
    pub timing: Timing,
    /// Which free address is picked.
    pub placement: Placement,
    /// Most items of a Describe reply, whatever MaxResults asks for.
    pub page_size: usize,
    /// Replaces or adds to the built-in instance table.
    pub instance_types: Vec<InstanceLimits>,
}

impl Default for CloudConfig {
    /// 10.0.0.0/16 in eu-west-1 with one security group, `sg-nodes`, and no delays.
    fn default() -> Self {
        Self {
            region: "eu-west-1".to_owned(),
            vpc: "vpc-0a1b2c3d4e5f60718".into(),
            vpc_cidrs: vec![Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), 16).expect("16 is a prefix length")],
            vpc_ipv6_cidrs: Vec::new(),
            security_groups: BTreeSet::from(["sg-nodes".into(), "sg-pods".into()]),
            timing: Timing::default(),
            placement: Placement::default(),
            page_size: 1000,
            instance_types: Vec::new(),
        }
    }
}

/// How long things take; all zero unless set. Lags are drawn between the value and `1 + jitter` times it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// From AttachNetworkInterface to `attached`, and to the interface in the instance.
    pub attach: Duration,
    /// From DetachNetworkInterface to `available`.
    pub detach: Duration,
    /// From a change to Describe showing it.
    pub describe_lag: Duration,
    /// From a change to IMDS showing it.
    pub imds_lag: Duration,
    /// How long IMDS lists a new ENI's MAC without most of its fields.
    pub imds_incomplete: Duration,
    /// Most that a lag grows, as a part of it.
    pub jitter: f64,
    /// Of the jitter.
    pub seed: u64,
}

impl Timing {
    /// One of many regions on one of many days: lags up to what the services are known to take.
    pub fn drawn(random: &mut StdRng, seed: u64) -> Self {
        let mut up_to = |milliseconds: u64| Duration::from_millis(random.random_range(0..milliseconds));
        Self {
            attach: up_to(6_000),
            detach: up_to(4_000),
            describe_lag: up_to(2_000),
            imds_lag: up_to(20_000),
            imds_incomplete: up_to(1_000),
            jitter: 0.5,
            seed,
        }
    }
}

/// A subnet to add.
#[derive(Clone, Debug)]
pub struct SubnetSpec {
    /// `subnet-…`.
    pub id: SubnetId,
    /// `eu-west-1a`.
    pub availability_zone: String,
    /// Within the VPC; /28 to /16.
    pub cidr: Ipv4Net,
    /// /64 ranges.
    pub ipv6_cidrs: Vec<Ipv6Net>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

impl SubnetSpec {
    /// An IPv4 subnet without tags.
    pub fn new(id: impl Into<String>, availability_zone: &str, cidr: Ipv4Net) -> Self {
        Self { id: SubnetId::new(id), availability_zone: availability_zone.to_owned(), cidr, ipv6_cidrs: Vec::new(), tags: BTreeMap::new() }
    }
}

/// An instance to launch.
#[derive(Clone, Debug)]
pub struct InstanceSpec {
    /// `i-…`.
    pub id: InstanceId,
    /// In the instance table.
    pub instance_type: String,
    /// Of the primary ENI.
    pub subnet: SubnetId,
    /// Of the primary ENI.
    pub security_groups: Vec<SecurityGroupId>,
    /// The primary ENI's address; chosen if none.
    pub primary_ipv4: Option<Ipv4Addr>,
    /// Where the primary ENI is attached: 0, but on SageMaker HyperPod.
    pub device_index: u16,
    /// Gives the primary ENI an IPv6 address.
    pub ipv6: bool,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

impl InstanceSpec {
    /// An instance with the security group `sg-nodes` and no tags.
    pub fn new(id: impl Into<String>, instance_type: &str, subnet: &SubnetId) -> Self {
        Self {
            id: InstanceId::new(id),
            instance_type: instance_type.to_owned(),
            subnet: subnet.clone(),
            security_groups: vec!["sg-nodes".into()],
            primary_ipv4: None,
            device_index: 0,
            ipv6: false,
            tags: BTreeMap::new(),
        }
    }
}

/// An instance as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceView {
    /// `i-…`.
    pub id: InstanceId,
    /// Limits of its type.
    pub limits: InstanceLimits,
    /// The primary ENI.
    pub primary: EniId,
    /// Of the primary ENI.
    pub subnet: SubnetId,
    /// `eu-west-1a`.
    pub availability_zone: String,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// A change of an ENI, for whoever keeps real interfaces and routes in step. `after` is how long from now until it
/// takes effect on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EniEvent {
    /// The interface appears in the instance; `eni.attachment` says at which index and card. Launching an instance
    /// gives this for its primary ENI.
    Attached {
        /// Where.
        instance: InstanceId,
        /// With its addresses and MAC.
        eni: Eni,
        /// The ENI's subnet.
        subnet: Subnet,
        /// Time until it appears.
        after: Duration,
    },
    /// Addresses or prefixes came or went.
    AddressesChanged {
        /// As it is now.
        eni: Eni,
        /// As it was.
        before: Eni,
    },
    /// The interface leaves the instance.
    Detached {
        /// Where it was.
        instance: InstanceId,
        /// As it was, with its attachment.
        eni: Eni,
        /// Time until it is gone.
        after: Duration,
    },
    /// The ENI and its addresses are gone.
    Deleted {
        /// As it was.
        eni: Eni,
    },
}

/// An ENI and what readers see of it.
#[derive(Clone, Debug)]
pub(super) struct EniRecord {
    pub(super) eni: Eni,
    /// When a running attachment or detachment ends.
    pub(super) settles: Option<(Duration, Settle)>,
    /// When IMDS shows every field of the present attachment.
    pub(super) imds_complete_at: Duration,
    /// Versions, oldest first, each from when Describe and IMDS show it; `None` is "not there".
    versions: Vec<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settle {
    Attached,
    Available,
}

#[derive(Clone, Debug)]
struct Version {
    describe_at: Duration,
    imds_at: Duration,
    eni: Option<Eni>,
}

/// Everything behind the mutex.
#[derive(Debug)]
pub(super) struct State {
    pub(super) config: CloudConfig,
    pub(super) clock: Clock,
    pub(super) limits: BTreeMap<String, InstanceLimits>,
    pub(super) subnets: BTreeMap<SubnetId, SubnetState>,
    pub(super) enis: BTreeMap<EniId, EniRecord>,
    pub(super) instances: BTreeMap<InstanceId, InstanceView>,
    /// Reply of the first CreateNetworkInterface with a token, and what it asked for.
    pub(super) tokens: BTreeMap<String, (String, Eni)>,
    /// Tags of security groups, by group and key.
    pub(super) group_tags: BTreeMap<(SecurityGroupId, String), String>,
    pub(super) hidden_from_imds: BTreeMap<EniId, Duration>,
    pub(super) faults: Faults,
    pub(super) calls: Vec<LoggedCall>,
    pub(super) subscribers: Vec<UnboundedSender<EniEvent>>,
    pub(super) logs: LogsState,
    /// Access keys that sign requests: secret, session token, when it expires.
    pub(super) keys: BTreeMap<String, AccessKey>,
    /// Name of the role that IMDS gives keys of, and how long they live.
    pub(super) instance_role: Option<(String, Duration)>,
    /// Compressed PutLogEvents bodies are read.
    pub(super) takes_gzip: bool,
    pub(super) serial: u64,
    /// Versions written, for the jitter.
    draws: u64,
}

/// An access key that the fake accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AccessKey {
    pub(super) secret: String,
    pub(super) session_token: Option<String>,
    pub(super) expires: Option<Duration>,
}

/// A key that was just made, in the texts that credential endpoints give.
#[derive(Clone, Debug)]
pub(super) struct MintedKey {
    pub(super) id: String,
    pub(super) secret: String,
    pub(super) session_token: String,
    pub(super) issued: String,
    pub(super) expiration: String,
}

impl State {
    /// Makes a key that expires.
    pub(super) fn mint_key(&mut self, lifetime: Duration) -> MintedKey {
        let (id, secret, session_token) = (self.fresh_hex(), self.fresh_hex(), self.fresh_hex());
        let id = format!("ASIA{}", id.to_uppercase());
        let (now, unix_ms) = (self.now(), self.clock.unix_ms());
        let time = |ms: i64| jiff::Timestamp::from_millisecond(ms).map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        let until = unix_ms.saturating_add(i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX / 2));
        let key = AccessKey { secret: secret.clone(), session_token: Some(session_token.clone()), expires: Some(now + lifetime) };
        self.keys.insert(id.clone(), key);
        MintedKey { id, secret, session_token, issued: time(unix_ms).unwrap_or_default(), expiration: time(until).unwrap_or_default() }
    }

    pub(super) fn new(config: CloudConfig, clock: Clock) -> Self {
        let types = InstanceLimits::all().cloned().chain(config.instance_types.iter().cloned());
        let limits = types.map(|limits| (limits.instance_type.clone(), limits)).collect();
        Self {
            config,
            clock,
            limits,
            subnets: BTreeMap::new(),
            enis: BTreeMap::new(),
            instances: BTreeMap::new(),
            tokens: BTreeMap::new(),
            group_tags: BTreeMap::new(),
            hidden_from_imds: BTreeMap::new(),
            faults: Faults::default(),
            calls: Vec::new(),
            subscribers: Vec::new(),
            logs: LogsState::default(),
            keys: BTreeMap::new(),
            instance_role: None,
            takes_gzip: true,
            serial: 0,
            draws: 0,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// 17 hexadecimal digits that no other id has; the order of calls decides them.
    pub(super) fn fresh_hex(&mut self) -> String {
        self.serial += 1;
        format!("0{:016x}", mix(0x5eed, self.serial))
    }

    pub(super) fn fresh_mac(&mut self) -> stanchion_core::ids::Mac {
        self.serial += 1;
        let [_, _, _, _, c, d, e, f] = self.serial.to_be_bytes();
        stanchion_core::ids::Mac([0x0a, 0x57, c, d, e, f])
    }

    pub(super) fn emit(&mut self, event: &EniEvent) {
        self.subscribers.retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }

    /// Writes a changed ENI; readers see it after their lag.
    pub(super) fn store(&mut self, eni: Eni) {
        let version = self.version(Some(eni.clone()), self.enis.get(&eni.id));
        let id = eni.id.clone();
        let record = self.enis.entry(id).or_insert_with(|| EniRecord {
            eni: eni.clone(),
            settles: None,
            imds_complete_at: Duration::ZERO,
            versions: Vec::new(),
        });
        record.eni = eni;
        record.versions.push(version);
    }

    /// Writes an ENI that every reader sees at once.
    pub(super) fn store_now(&mut self, eni: Eni) {
        let now = self.now();
        let version = Version { describe_at: now, imds_at: now, eni: Some(eni.clone()) };
        let record = EniRecord { eni: eni.clone(), settles: None, imds_complete_at: now, versions: vec![version] };
        self.enis.insert(eni.id, record);
    }

    /// Deletes an ENI; readers go on seeing it for their lag.
    pub(super) fn remove(&mut self, id: &EniId) -> Option<Eni> {
        let record = self.enis.get(id)?;
        let version = self.version(None, Some(record));
        let record = self.enis.get_mut(id)?;
        let eni = record.eni.clone();
        record.versions.push(version);
        record.settles = None;
        if let Some(subnet) = self.subnets.get_mut(&eni.subnet) {
            for address in eni.primary_ipv4.iter().chain(&eni.secondary_ipv4) {
                subnet.give_back((*address).into());
            }
            for prefix in &eni.prefixes_v4 {
                subnet.give_back(*prefix);
            }
            for address in &eni.ipv6 {
                subnet.give_back_ipv6(*address);
            }
            for prefix in &eni.prefixes_v6 {
                subnet.give_back_ipv6(prefix.network());
            }
        }
        self.emit(&EniEvent::Deleted { eni: eni.clone() });
        Some(eni)
    }

    fn version(&self, eni: Option<Eni>, record: Option<&EniRecord>) -> Version {
        let timing = &self.config.timing;
        let last = record.and_then(|r| r.versions.last()).map_or((Duration::ZERO, Duration::ZERO), |v| (v.describe_at, v.imds_at));
        let n = record.map_or(0, |r| r.versions.len() as u64) + self.serial + self.draws;
        let lag = |base: Duration, salt: u64| {
            let part = (mix(timing.seed ^ salt, n) >> 11) as f64 / (1u64 << 53) as f64;
            self.now() + base.mul_f64(1.0 + timing.jitter.max(0.0) * part)
        };
        Version { describe_at: lag(timing.describe_lag, 1).max(last.0), imds_at: lag(timing.imds_lag, 2).max(last.1), eni }
    }

    /// Completes what the clock has passed; every entry point calls this first.
    pub(super) fn settle(&mut self) {
        self.draws += 1;
        let now = self.now();
        let imds_lag = self.config.timing.imds_lag;
        let mut delete = Vec::new();
        for record in self.enis.values_mut() {
            if let Some((at, settle)) = record.settles
                && at <= now
            {
                record.settles = None;
                if settle == Settle::Available {
                    record.eni.status = "available".to_owned();
                    record.eni.attachment = None;
                    record.store_at(at, imds_lag);
                }
            }
            // What both readers have passed is history.
            let current = record.versions.iter().rposition(|v| v.describe_at <= now && v.imds_at <= now).unwrap_or(0);
            record.versions.drain(..current);
            if matches!(record.versions.as_slice(), [Version { eni: None, describe_at, imds_at }] if *describe_at <= now && *imds_at <= now)
            {
                delete.push(record.eni.id.clone());
            }
        }
        for id in delete {
            self.enis.remove(&id);
        }
    }

    /// The ENI as it is, unless deleted.
    pub(super) fn eni(&self, id: &EniId) -> Result<&Eni, ApiError> {
        self.live(id)
            .ok_or_else(|| ApiError::bad("InvalidNetworkInterfaceID.NotFound", format!("The networkInterface ID '{id}' does not exist")))
    }

    pub(super) fn live(&self, id: &EniId) -> Option<&Eni> {
        let record = self.enis.get(id)?;
        record.versions.last()?.eni.is_some().then_some(&record.eni)
    }

    /// Every ENI that is not deleted.
    pub(super) fn live_enis(&self) -> impl Iterator<Item = &Eni> {
        self.enis.keys().filter_map(|id| self.live(id))
    }

    /// The ENI of an attachment.
    pub(super) fn by_attachment(&self, attachment: &AttachmentId) -> Option<&Eni> {
        self.live_enis().find(|eni| eni.attachment.as_ref().is_some_and(|a| a.id == *attachment))
    }

    /// What Describe shows now.
    pub(super) fn described(&self) -> impl Iterator<Item = &Eni> {
        let now = self.now();
        self.enis.values().filter_map(move |r| r.versions.iter().rev().find(|v| v.describe_at <= now)?.eni.as_ref())
    }

    /// What IMDS shows the instance now, with whether the ENI's fields are complete.
    pub(super) fn seen_by_imds(&self, instance: &InstanceId) -> Vec<(Eni, bool)> {
        let now = self.now();
        let mut seen: Vec<_> = self
            .enis
            .values()
            .filter_map(|record| {
                let version = record.versions.iter().rev().find(|v| v.imds_at <= now)?;
                let eni = version.eni.as_ref()?;
                eni.attachment.as_ref().filter(|a| a.instance == *instance)?;
                // The interface itself takes as long as the attachment does.
                if matches!(record.settles, Some((at, Settle::Attached)) if at > now) {
                    return None;
                }
                if self.hidden_from_imds.get(&eni.id).is_some_and(|until| now < *until) {
                    return None;
                }
                Some((eni.clone(), now >= record.imds_complete_at))
            })
            .collect();
        seen.sort_by_key(|(eni, _)| eni.mac);
        seen
    }
}

impl EniRecord {
    /// Whether the attachment is complete, for `status` of the attachment.
    pub(super) fn attachment_status(&self, now: Duration) -> &'static str {
        match self.settles {
            Some((at, Settle::Attached)) if at > now => "attaching",
            Some((at, Settle::Available)) if at > now => "detaching",
            _ => "attached",
        }
    }

    /// The attachment completes at `at`; IMDS has its fields when it shows the ENI plus `incomplete`.
    pub(super) fn attaching(&mut self, at: Duration, incomplete: Duration) {
        self.settles = Some((at, Settle::Attached));
        let shown = self.versions.last().map_or(at, |version| version.imds_at);
        self.imds_complete_at = shown.max(at) + incomplete;
    }

    /// A change that Describe shows from `at` on.
    fn store_at(&mut self, at: Duration, imds_lag: Duration) {
        let last = self.versions.last().map_or((Duration::ZERO, Duration::ZERO), |v| (v.describe_at, v.imds_at));
        let version = Version { describe_at: at.max(last.0), imds_at: (at + imds_lag).max(last.1), eni: Some(self.eni.clone()) };
        self.versions.push(version);
    }
}
