//! Every EC2 call is counted and timed in one place.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use stanchion_core::cloud::{Ec2Action, Ec2Error};
use tokio::time::Instant;

use super::snapshot::Ec2CallStats;

/// (calls, milliseconds) by action and error code.
type Rows = BTreeMap<(Ec2Action, Option<String>), (u64, f64)>;

/// Counts EC2 calls; clones share the counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter(Arc<Mutex<Rows>>);

impl Meter {
    /// Awaits a call and counts it.
    pub(super) async fn run<T>(&self, action: Ec2Action, call: impl Future<Output = Result<T, Ec2Error>>) -> Result<T, Ec2Error> {
        let started = Instant::now();
        let result = call.await;
        let elapsed = started.elapsed().as_secs_f64() * 1_000.0;
        let code = result.as_ref().err().map(error_code);
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let row = rows.entry((action, code)).or_default();
        row.0 += 1;
        row.1 += elapsed;
        result
    }

    pub(super) fn rows(&self) -> Vec<Ec2CallStats> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.iter()
            .map(|((action, error), (count, total_ms))| Ec2CallStats {
                api: action_name(*action),
                error: error.clone(),
                count: *count,
                total_ms: *total_ms,
            })
            .collect()
    }
}

fn error_code(error: &Ec2Error) -> String {
    match error {
        Ec2Error::Throttled { code, .. }
        | Ec2Error::InsufficientAddresses { code, .. }
        | Ec2Error::AttachmentConflict { code, .. }
        | Ec2Error::NotFound { code, .. }
        | Ec2Error::Unauthorized { code, .. }
        | Ec2Error::Other { code, .. } => code.clone(),
        Ec2Error::AddressLimit { .. } => "PrivateIpAddressLimitExceeded".to_owned(),
        Ec2Error::NoReply { .. } => "NoReply".to_owned(),
    }
}

/// EC2's name of the action, as aws-node's metrics have it.
fn action_name(action: Ec2Action) -> &'static str {
    match action {
        Ec2Action::DescribeInstances => "DescribeInstances",
        Ec2Action::DescribeInstanceTypes => "DescribeInstanceTypes",
        Ec2Action::DescribeNetworkInterfaces => "DescribeNetworkInterfaces",
        Ec2Action::DescribeSubnets => "DescribeSubnets",
        Ec2Action::DescribeSecurityGroups => "DescribeSecurityGroups",
        Ec2Action::CreateNetworkInterface => "CreateNetworkInterface",
        Ec2Action::AttachNetworkInterface => "AttachNetworkInterface",
        Ec2Action::ModifyNetworkInterfaceAttribute => "ModifyNetworkInterfaceAttribute",
        Ec2Action::AssignPrivateIpAddresses => "AssignPrivateIpAddresses",
        Ec2Action::UnassignPrivateIpAddresses => "UnassignPrivateIpAddresses",
        Ec2Action::AssignIpv6Addresses => "AssignIpv6Addresses",
        Ec2Action::UnassignIpv6Addresses => "UnassignIpv6Addresses",
        Ec2Action::DetachNetworkInterface => "DetachNetworkInterface",
        Ec2Action::DeleteNetworkInterface => "DeleteNetworkInterface",
        Ec2Action::CreateTags => "CreateTags",
    }
}
