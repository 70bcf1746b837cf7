//! Network policy in the kernel.
//!
//! One task, the actor, owns all of it. Input: requests of the CNI server, the cluster's state, a timer. Output: map
//! writes, attached programs, flow records. If it panics, what is in the kernel stays in force; handles answer `Busy`, and the process ends.
//!
//! | file | what is there |
//! |---|---|
//! | `handle` | requests, replies and views; what others use |
//! | `actor` | the task |
//! | `slots` | which sandbox holds which slot |
//! | `files` | where that and what DNS taught are kept |
//! | `interfaces` | which pod is behind which veth |
//! | `maps` | the kernel's maps behind `PolicyMaps` |
//! | `flows`, `batch`, `conntrack` | flow tables: collection, seeding from the kernel's connection tracking |
//! | `ring`, `events` | the ring buffers; events with names |
//! | `follow` | who listens to flow records |
//! | `flow_log` | flow records as a log |
//! | `names` | DNS answers of the pods |
//! | `attach` | TCX links and clsact filters |
//! | `object`, `verify`, `raw`, `clock` | pinning, loading, the kernel's calls for it, time |

mod actor;
mod attach;
mod batch;
mod clock;
mod conntrack;
mod events;
mod files;
pub mod flow_log;
mod flows;
mod follow;
mod handle;
mod interfaces;
mod maps;
mod names;
mod object;
mod raw;
mod ring;
mod slots;
mod verify;

pub use actor::{NetpolParts, SpawnError, spawn};
pub use attach::{AttachError, AttachMode, attach, detach, remove_from_host};
pub use clock::Clock;
pub use files::take_files;
pub use follow::FlowRecords;
pub use handle::*;
pub use maps::KernelMaps;
pub use object::{BPFFS, LoadError, LoadOptions, Loaded, PIN_ROOT, POD_EGRESS, POD_INGRESS, ensure_bpffs, load};
