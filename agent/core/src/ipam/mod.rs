//! Addresses: who holds which, how many to keep ready, what to ask EC2 for.
//!
//! Everything is a function of its arguments, the time among them ([`Time`]).
//!
//! * [`Datastore`]: ENIs, their CIDRs, owners and cool-downs;
//! * [`plan()`]: the pool planner, from a [`PlanInput`] to a [`Plan`];
//! * [`Memory`]: what the planner remembers of EC2's refusals;
//! * [`Adoption`]: from what IMDS and EC2 show to what the store holds;
//! * [`Checkpoint`]: aws-node's file, [`restore`] and its rules;
//! * [`steady_state`]: the same planner against an EC2 that always obeys, for capacity questions.

mod adopt;
mod checkpoint;
mod decide;
mod memory;
mod plan;
mod simulate;
mod store;
mod types;

pub use adopt::{
    Adoption, DESCRIPTION_PREFIX, Leak, TAG_CLUSTER, TAG_CREATED, TAG_INSTANCE, TAG_NO_MANAGE, ec2_cidrs, eni_config_name,
    excluded_subnets, imds_cidrs, judge_leak, missing_tags, place_by_discovery, place_by_eni_config, tags_for_new,
};
pub use checkpoint::{Checkpoint, CheckpointEntry, CheckpointError, CoolingEntry, CoolingFile, Restored, restore};
pub use decide::{ENI_MIN_AGE, SHRINK_AFTER, addresses_in, plan};
pub use memory::{AddressKind, Budget, Memory, Shortage};
pub use plan::{Action, Blocked, Demand, Placement, Plan, PlanInput, PoolLimits, Provisioning, Reason, Targets};
pub use simulate::{PoolAnswer, PoolQuestion, steady_state};
pub use store::{AddressState, Allocation, Datastore, EniRole, Held, PoolMode, Stats, StoredEni, addresses_of};
pub use types::{IpamKey, Time};
