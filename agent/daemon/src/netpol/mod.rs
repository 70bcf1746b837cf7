//! Network policy in the kernel.
//!
//! | file | what is there |
//! |---|---|
//! | `handle` | requests, replies and views; what others use |
//! | `maps` | the kernel's maps behind `PolicyMaps` |
//! | `attach` | TCX links and clsact filters |
//! | `object` | the eBPF object: loading and pinning |
//! | `clock` | the flow table's clock |

mod attach;
mod clock;
mod handle;
mod maps;
mod object;

pub use attach::{AttachError, AttachMode, attach, detach};
pub use clock::Clock;
pub use handle::*;
pub use maps::KernelMaps;
pub use object::{BPFFS, LoadError, LoadOptions, Loaded, PIN_ROOT, POD_EGRESS, POD_INGRESS, load};
