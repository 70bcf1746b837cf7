//! Addresses: who holds which, how many to keep ready, what to ask EC2 for.
//!
//! Everything is a function of its arguments, the time among them ([`Time`]).
//!
//! * [`Datastore`]: ENIs, their CIDRs, owners and cool-downs;
//! * [`plan()`]: the pool planner, from a [`PlanInput`] to a [`Plan`];
//! * [`Memory`]: what the planner remembers of EC2's refusals;
//! * [`steady_state`]: the same planner against an EC2 that always obeys, for capacity questions.

mod decide;
mod memory;
mod plan;
mod simulate;
mod store;
mod types;

pub use decide::{ENI_MIN_AGE, SHRINK_AFTER, addresses_in, plan};
pub use memory::{AddressKind, Budget, Memory, Shortage};
pub use plan::{Action, Blocked, Demand, Placement, Plan, PlanInput, PoolLimits, Provisioning, Reason, Targets};
pub use simulate::{PoolAnswer, PoolQuestion, steady_state};
pub use store::{AddressState, Allocation, Datastore, EniRole, Held, PoolMode, Stats, StoredEni, addresses_of};
pub use types::{IpamKey, Time};
