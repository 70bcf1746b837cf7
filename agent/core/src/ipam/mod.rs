//! Addresses: who holds which, how many to keep ready, what to ask EC2 for.
//!
//! Everything is a function of its arguments, the time among them ([`Time`]).
//!
//! * [`Datastore`]: ENIs, their CIDRs, owners and cool-downs;
//! * [`plan()`]: the pool planner, from a [`PlanInput`] to a [`Plan`];
//! * [`Memory`]: what the planner remembers of EC2's refusals;
//! * [`Adoption`]: from what IMDS and EC2 show to what the store holds;
//! * [`Checkpoint`]: aws-node's file, [`restore`] and its rules;
//! * [`steady_state`]: the same planner against an EC2 that always obeys, for capacity questions;
//! * [`fleet()`]: the same planner on thousands of nodes against one account's token buckets, beside aws-node's rules.

//!
//! Where the pool differs from aws-node's (v1.23), on purpose:
//!
//! | aws-node | here | why |
//! |---|---|---|
//! | free = total - assigned | cooling addresses are not free either | they cannot be given out (#2896) |
//! | a tick of 5 s, one step each | every event plans, all steps at once | 110 pods wait seconds, not minutes |
//! | the warm targets are refilled a step a tick | at once for pods, else at most every 5 s, in one call | pods that come one by one share a call |
//! | MINIMUM_IP_TARGET alone never grows beyond it | waiting requests are served whatever the targets say | the 12th pod of "minimum 11" starved (#2650) |
//! | WARM_ENI_TARGET=0 attaches and frees an ENI every minute at k x slots pods | a release must leave every target met | #1775, #1451 |
//! | WARM_PREFIX_TARGET=0 gives the only free prefix back and asks again | the same rule | as above |
//! | idle addresses are unassigned first, then ENIs freed | a whole idle ENI goes as one | fewer calls |
//! | a surplus is given back within 30 s | after it has lasted 60 s | pods' churn is not EC2's |
//! | random map order | fullest ENI and prefix first, the longest-free address of it | empties appear and can go back |
//! | one 120 s timer for any shortage | a memory for each subnet and kind, growing pauses, halved requests | another subnet is tried at once |
//! | prefixes or nothing | single addresses where a subnet is fragmented | #3105 |
//! | the 400-step cut-off of the vectors' `p3dn, 1/1, 735 pods` row | all 735 run | the model stopped counting |

mod adopt;
mod checkpoint;
mod decide;
mod fleet;
mod memory;
mod plan;
mod simulate;
mod store;
mod types;

pub use adopt::{
    Adoption, DESCRIPTION_PREFIX, Leak, TAG_CLUSTER, TAG_CREATED, TAG_GROUP_ROLE, TAG_INSTANCE, TAG_NO_MANAGE, ec2_cidrs, eni_config_name,
    enis_with_other_groups, excluded_subnets, finds_other_subnets, groups_in, imds_cidrs, judge_leak, managed_cards, missing_tags,
    place_by_discovery, place_by_eni_config, tags_for_new,
};
pub use checkpoint::{Checkpoint, CheckpointEntry, CheckpointError, CoolingEntry, CoolingFile, MovedEntry, Restored, restore};
pub use decide::{ENI_MIN_AGE, JOIN_PATIENCE, REFILL_PAUSE, SHRINK_AFTER, addresses_in, plan};
pub use fleet::{CallCount, Ec2Model, FleetAnswer, FleetQuestion, Rules, Scenario, fleet};
pub use memory::{AddressKind, Budget, Closed, Memory, Shortage};
pub use plan::{Action, Blocked, Demand, Placement, Plan, PlanInput, PoolLimits, Provisioning, Reason, Targets};
pub use simulate::{PoolAnswer, PoolQuestion, steady_state};
pub use store::{AddressState, Allocation, Datastore, EniRole, EniState, Held, PoolMode, Rest, Stats, StoredEni, addresses_of};
pub use types::{IpamKey, Time};
