//! One account's EC2: a token bucket an action, shared by every node of the fleet.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::cloud::Ec2Action;

/// EC2 as a fleet sees it. Buckets and rates: "Request throttling for the Amazon EC2 API" of the EC2 developer guide.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ec2Model {
    /// Most tokens that an action's bucket holds.
    pub bucket: f64,
    /// Tokens a second of an action that changes something.
    pub mutating_rate: f64,
    /// Tokens a second of a Describe.
    pub describe_rate: f64,
    /// From a call to its reply.
    pub latency: Duration,
    /// From AttachNetworkInterface's reply to the interface.
    pub attach: Duration,
}

impl Default for Ec2Model {
    fn default() -> Self {
        Self { bucket: 100.0, mutating_rate: 5.0, describe_rate: 20.0, latency: Duration::from_millis(300), attach: Duration::from_secs(4) }
    }
}

/// Calls of an action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallCount {
    /// All that were sent.
    pub sent: u64,
    /// Those that were refused.
    pub throttled: u64,
}

/// The account's state.
#[derive(Debug)]
pub(super) struct Account {
    model: Ec2Model,
    /// Nodes that one simulated node stands for: the bucket is that much smaller.
    scale: f64,
    /// Tokens, and when they were counted.
    buckets: BTreeMap<Ec2Action, (f64, u64)>,
    counts: BTreeMap<Ec2Action, CallCount>,
}

impl Account {
    pub(super) fn new(model: Ec2Model, scale: f64) -> Self {
        Self { model, scale, buckets: BTreeMap::new(), counts: BTreeMap::new() }
    }

    /// Whether the call is let through at `now` (ms).
    pub(super) fn call(&mut self, action: Ec2Action, now: u64) -> bool {
        let describes = matches!(
            action,
            Ec2Action::DescribeInstances
                | Ec2Action::DescribeInstanceTypes
                | Ec2Action::DescribeNetworkInterfaces
                | Ec2Action::DescribeSubnets
        );
        let rate = if describes { self.model.describe_rate } else { self.model.mutating_rate };
        // A bucket below one token would never let anything through.
        let size = (self.model.bucket / self.scale).max(1.0);
        let (tokens, counted) = self.buckets.entry(action).or_insert((size, now));
        *tokens = (*tokens + rate / self.scale * (now - *counted) as f64 / 1_000.0).min(size);
        *counted = now;
        let admitted = *tokens >= 1.0;
        let count = self.counts.entry(action).or_default();
        count.sent += 1;
        if admitted {
            *tokens -= 1.0;
        } else {
            count.throttled += 1;
        }
        admitted
    }

    pub(super) fn latency(&self) -> u64 {
        millis(self.model.latency)
    }

    pub(super) fn attach(&self) -> u64 {
        millis(self.model.attach)
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = (Ec2Action, CallCount)> + '_ {
        self.counts.iter().map(|(action, count)| (*action, *count))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
