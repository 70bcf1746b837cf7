//! The handle to the model: building it, breaking it, calling it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use stanchion_core::cloud::{Attachment, ConnectionTracking, Eni, EniKind, Subnet};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId};

use super::clock::Clock;
use super::ec2::{Ec2Call, Ec2Reply};
use super::faults::{ApiError, Bucket, Chaos, Effect, Fault};
use super::logs::{LogsCall, LogsReply};
use super::model::{AccessKey, CloudConfig, EniEvent, InstanceSpec, InstanceView, State, SubnetSpec};
use super::subnet::SubnetState;

/// One call as it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedCall {
    /// Time since the clock's start.
    pub at: Duration,
    /// `CreateNetworkInterface`, `PutLogEvents`, `imds:/latest/meta-data/mac`.
    pub action: String,
    /// Error code of the reply, if it was one.
    pub error: Option<String>,
    /// The reply never went out.
    pub lost: bool,
}

/// What a transport does with a call.
#[derive(Clone, Debug)]
pub(super) struct Outcome<R> {
    /// The reply, or `None` to close the connection.
    pub(super) reply: Option<Result<R, ApiError>>,
    /// Before replying.
    pub(super) delay: Duration,
    /// What becomes of the reply's body.
    pub(super) spoilt: Option<Spoilt>,
}

/// A body that is not as the service made it.
#[derive(Clone, Debug)]
pub(super) enum Spoilt {
    /// This text instead, with status 200.
    Replaced(String),
    /// Damaged, by this seed.
    Damaged(u64),
}

/// A VPC and an account's log groups; clones share them.
#[derive(Clone, Debug)]
pub struct Cloud {
    state: Arc<Mutex<State>>,
}

// === building ===

impl Cloud {
    /// An empty VPC, with the built-in instance table.
    pub fn new(config: CloudConfig, clock: Clock) -> Self {
        Self { state: Arc::new(Mutex::new(State::new(config, clock))) }
    }

    /// Adds a subnet.
    ///
    /// # Panics
    /// When it lies outside the VPC, overlaps another, or is larger than /16 or smaller than /28: a mistake of the test.
    pub fn add_subnet(&self, spec: SubnetSpec) -> SubnetId {
        let mut state = self.lock();
        assert!(state.config.vpc_cidrs.iter().any(|vpc| vpc.contains(&spec.cidr)), "{} is outside the VPC", spec.cidr);
        assert!((16..=28).contains(&spec.cidr.prefix_len()), "{} is not between /16 and /28", spec.cidr);
        for other in state.subnets.values() {
            let other = other.describe().cidr;
            assert!(!other.contains(&spec.cidr) && !spec.cidr.contains(&other), "{} overlaps {other}", spec.cidr);
        }
        let subnet = Subnet {
            id: spec.id.clone(),
            vpc: state.config.vpc.clone(),
            availability_zone: spec.availability_zone,
            cidr: spec.cidr,
            ipv6_cidrs: spec.ipv6_cidrs,
            available_addresses: 0,
            tags: spec.tags,
        };
        let placement = state.config.placement;
        state.subnets.insert(spec.id.clone(), SubnetState::new(subnet, placement));
        spec.id
    }

    /// Launches an instance: its primary ENI is there at once, described and shown by IMDS.
    ///
    /// # Panics
    /// When the type or subnet is unknown or the subnet is full: a mistake of the test.
    pub fn run_instance(&self, spec: InstanceSpec) -> EniId {
        let mut state = self.lock();
        let limits = state.limits.get(&spec.instance_type).unwrap_or_else(|| panic!("unknown type {}", spec.instance_type)).clone();
        let (card, mac) = (limits.default_network_card, state.fresh_mac());
        let (id, attachment) = (format!("eni-{}", state.fresh_hex()), format!("eni-attach-{}", state.fresh_hex()));
        let vpc = state.config.vpc.clone();
        let subnet = state.subnets.get_mut(&spec.subnet).unwrap_or_else(|| panic!("unknown subnet {}", spec.subnet));
        let primary = match spec.primary_ipv4 {
            Some(address) => {
                assert!(subnet.take_address(address), "{address} is taken or outside {}", spec.subnet);
                address
            }
            None => subnet.take_addresses(1).expect("the subnet has a free address")[0],
        };
        let ipv6 = if spec.ipv6 { vec![subnet.take_ipv6().expect("the subnet has a free IPv6 address")] } else { Vec::new() };
        let described = subnet.describe();
        let eni = Eni {
            id: EniId::new(id),
            mac,
            kind: EniKind::Interface,
            subnet: spec.subnet.clone(),
            vpc,
            status: "in-use".to_owned(),
            description: String::new(),
            primary_ipv4: Some(primary),
            secondary_ipv4: Vec::new(),
            prefixes_v4: Vec::new(),
            ipv6,
            prefixes_v6: Vec::new(),
            security_groups: spec.security_groups,
            attachment: Some(Attachment {
                id: AttachmentId::new(attachment),
                instance: spec.id.clone(),
                device_index: spec.device_index,
                network_card: card,
                delete_on_termination: true,
            }),
            connection_tracking: None,
            tags: BTreeMap::new(),
        };
        state.store_now(eni.clone());
        let view = InstanceView {
            id: spec.id.clone(),
            limits,
            primary: eni.id.clone(),
            subnet: spec.subnet,
            availability_zone: described.availability_zone.clone(),
            tags: spec.tags,
        };
        state.instances.insert(spec.id.clone(), view);
        let id = eni.id.clone();
        state.emit(&EniEvent::Attached { instance: spec.id, eni, subnet: described, after: Duration::ZERO });
        id
    }

    /// Ends an instance: ENIs with delete-on-termination go, the others become `available`.
    pub fn terminate_instance(&self, instance: &InstanceId) {
        let mut state = self.lock();
        if state.instances.remove(instance).is_none() {
            return;
        }
        let attached: Vec<Eni> = state.live_enis().filter(|e| attached_to(e, instance)).cloned().collect();
        for eni in attached {
            state.emit(&EniEvent::Detached { instance: instance.clone(), eni: eni.clone(), after: Duration::ZERO });
            if eni.attachment.as_ref().is_some_and(|a| a.delete_on_termination) {
                state.remove(&eni.id);
            } else {
                state.store(Eni { attachment: None, status: "available".to_owned(), ..eni });
            }
        }
    }

    /// Makes a security group exist.
    pub fn add_security_group(&self, group: SecurityGroupId) {
        self.lock().config.security_groups.insert(group);
    }

    /// Sets a tag of a security group.
    pub fn tag_security_group(&self, group: &SecurityGroupId, key: &str, value: &str) {
        self.lock().group_tags.insert((group.clone(), key.to_owned()), value.to_owned());
    }

    /// Takes a tag off a security group.
    pub fn untag_security_group(&self, group: &SecurityGroupId, key: &str) {
        self.lock().group_tags.remove(&(group.clone(), key.to_owned()));
    }

    /// Somebody else takes addresses of the subnet; false when one of them is taken already.
    pub fn occupy(&self, subnet: &SubnetId, addresses: impl IntoIterator<Item = Ipv4Addr>) -> bool {
        let mut state = self.lock();
        let Some(subnet) = state.subnets.get_mut(subnet) else { return false };
        let taken = addresses.into_iter().filter(|address| !subnet.take_address(*address)).count();
        taken == 0
    }

    /// Somebody else leaves addresses of the subnet.
    pub fn vacate(&self, subnet: &SubnetId, addresses: impl IntoIterator<Item = Ipv4Addr>) {
        if let Some(subnet) = self.lock().subnets.get_mut(subnet) {
            addresses.into_iter().for_each(|address| subnet.give_back(address.into()));
        }
    }

    /// Somebody deletes a subnet.
    pub fn remove_subnet(&self, subnet: &SubnetId) {
        self.lock().subnets.remove(subnet);
    }

    /// Sets a tag of a subnet.
    pub fn tag_subnet(&self, subnet: &SubnetId, key: &str, value: &str) {
        if let Some(subnet) = self.lock().subnets.get_mut(subnet) {
            subnet.described.tags.insert(key.to_owned(), value.to_owned());
        }
    }

    /// Somebody else takes one address of every /28, so that no prefix is left.
    pub fn fragment(&self, subnet: &SubnetId) {
        let mut state = self.lock();
        let Some(subnet) = state.subnets.get_mut(subnet) else { return };
        for block in subnet.describe().cidr.subnets(28).into_iter().flatten() {
            subnet.take_address(Ipv4Addr::from(u32::from(block.network()) + 8));
        }
    }

    /// Attaches an ENI by hand, as the VPC resource controller or a person does, with a type of its own.
    pub fn set_kind(&self, eni: &EniId, kind: EniKind) {
        let mut state = self.lock();
        if let Some(eni) = state.live(eni).cloned() {
            state.store(Eni { kind, ..eni });
        }
    }

    /// Gives an ENI times of its own for idle connections.
    pub fn set_connection_tracking(&self, eni: &EniId, connection_tracking: Option<ConnectionTracking>) {
        let mut state = self.lock();
        if let Some(eni) = state.live(eni).cloned() {
            state.store(Eni { connection_tracking, ..eni });
        }
    }

    /// IMDS gives the instances keys of this role, each good for `lifetime`.
    pub fn set_instance_role(&self, role: &str, lifetime: Duration) {
        self.lock().instance_role = Some((role.to_owned(), lifetime));
    }

    /// Makes an access key that requests must be signed with. Without any key, signatures are not looked at.
    pub fn add_access_key(&self, id: &str, secret: &str, session_token: Option<&str>, expires_in: Option<Duration>) {
        let mut state = self.lock();
        let expires = expires_in.map(|d| state.now() + d);
        let key = AccessKey { secret: secret.to_owned(), session_token: session_token.map(str::to_owned), expires };
        state.keys.insert(id.to_owned(), key);
    }
}

// === breaking ===

impl Cloud {
    /// Whether CloudWatch Logs reads compressed bodies.
    pub fn set_takes_gzip(&self, takes: bool) {
        self.lock().takes_gzip = takes;
    }

    /// Ends every session: keys that expire have expired.
    pub fn expire_keys(&self) {
        let mut state = self.lock();
        let now = state.now();
        state.keys.values_mut().for_each(|key| key.expires = key.expires.map(|_| now));
    }

    /// Adds a scripted fault; they are tried in the order of their adding.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.add(fault);
    }

    /// Random faults from now on.
    pub fn set_chaos(&self, chaos: Chaos) {
        self.lock().faults.set_chaos(chaos);
    }

    /// Ends every scripted and random fault; buckets stay.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// Throttles an action (`CreateNetworkInterface`, `PutLogEvents`) by a full bucket.
    pub fn set_bucket(&self, action: &str, bucket: Bucket) {
        let mut state = self.lock();
        let now = state.now();
        state.faults.set_bucket(action, bucket, now);
    }

    /// IMDS stops showing an attached ENI for a while (seen on real nodes after address changes).
    pub fn hide_from_imds(&self, eni: &EniId, lasts: Duration) {
        let mut state = self.lock();
        let until = state.now() + lasts;
        state.hidden_from_imds.insert(eni.clone(), until);
    }
}

// === calling ===

impl Cloud {
    /// One EC2 call: throttled, hit by a fault, or done.
    pub(super) fn ec2(&self, call: &Ec2Call) -> Outcome<Ec2Reply> {
        self.call(call.action(), throttled_by_ec2, |state| state.ec2(call))
    }

    /// One CloudWatch Logs call.
    pub(super) fn logs(&self, call: LogsCall) -> Outcome<LogsReply> {
        self.call(call.action(), throttled_by_logs, |state| {
            let now = state.clock.unix_ms();
            state.logs.call(call, now)
        })
    }

    /// One IMDS read; the closure answers from the model.
    pub(super) fn imds<R>(&self, path: &str, act: impl FnOnce(&mut State) -> Result<R, ApiError>) -> Outcome<R> {
        let unavailable = || ApiError::with_status(503, "ServiceUnavailable", "");
        self.call(&format!("imds:{path}"), unavailable, act)
    }

    /// One call to a credential endpoint.
    pub(super) fn credential_call<R>(&self, action: &str, act: impl FnOnce(&mut State) -> Result<R, ApiError>) -> Outcome<R> {
        self.call(action, throttled_by_logs, act)
    }

    pub(super) fn takes_gzip(&self) -> bool {
        self.lock().takes_gzip
    }

    fn call<R>(&self, action: &str, throttled: fn() -> ApiError, act: impl FnOnce(&mut State) -> Result<R, ApiError>) -> Outcome<R> {
        let mut state = self.settled();
        let at = state.now();
        let effect = state.faults.draw(action, throttled);
        let mut outcome = Outcome { reply: None, delay: Duration::ZERO, spoilt: None };
        let mut lost = false;
        match effect {
            _ if !state.faults.admit(action, at) => outcome.reply = Some(Err(throttled())),
            Some(Effect::Error(error)) => outcome.reply = Some(Err(error)),
            Some(Effect::DropRequest) => lost = true,
            Some(Effect::LoseReply) => {
                lost = true;
                // Nobody hears whether it was an error.
                let _unheard = act(&mut state);
            }
            Some(Effect::Delay(delay)) => {
                outcome.delay = delay;
                outcome.reply = Some(act(&mut state));
            }
            Some(Effect::Garbage(text)) => {
                outcome.reply = Some(act(&mut state));
                outcome.spoilt = Some(Spoilt::Replaced(text));
            }
            Some(Effect::Damage(seed)) => {
                outcome.reply = Some(act(&mut state));
                outcome.spoilt = Some(Spoilt::Damaged(seed));
            }
            None => outcome.reply = Some(act(&mut state)),
        }
        let error = outcome.reply.as_ref().and_then(|r| r.as_ref().err()).map(|e| e.code.clone());
        state.calls.push(LoggedCall { at, action: action.to_owned(), error, lost });
        outcome
    }

    /// The model, whatever a panicking test thread left of it.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settled(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.settle();
        state
    }
}

/// Every address and prefix of an ENI.
pub(super) fn cidrs_of(eni: &Eni) -> impl Iterator<Item = IpNet> {
    let v4 = eni.primary_ipv4.iter().chain(&eni.secondary_ipv4).map(|a| IpNet::from(std::net::IpAddr::from(*a)));
    let v6 = eni.ipv6.iter().map(|a| IpNet::from(std::net::IpAddr::from(*a)));
    v4.chain(eni.prefixes_v4.iter().map(|p| IpNet::V4(*p))).chain(v6).chain(eni.prefixes_v6.iter().map(|p| IpNet::V6(*p)))
}

pub(super) fn attached_to(eni: &Eni, instance: &InstanceId) -> bool {
    eni.attachment.as_ref().is_some_and(|a| a.instance == *instance)
}

fn throttled_by_ec2() -> ApiError {
    ApiError::with_status(503, "RequestLimitExceeded", "Request limit exceeded.")
}

fn throttled_by_logs() -> ApiError {
    ApiError::bad("ThrottlingException", "Rate exceeded")
}
