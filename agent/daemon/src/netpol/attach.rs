//! Programs on interfaces: TCX links (Linux 6.6) that are pinned, or clsact filters, which stay by themselves. Both outlive
//! the agent, and both are replaced without a moment in which neither program is there.

use std::error::Error;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use serde::Serialize;

use super::object::{LoadError, Loaded, POD_EGRESS, POD_INGRESS};

/// The filter's place under clsact. Ours lets the next filter decide, so its rank among others is immaterial; handle and
/// priority only make it findable.
const PRIORITY: u16 = 50;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// TCX links.
    Tcx,
    /// tc filters.
    Clsact,
}

impl AttachMode {
    /// TCX where the kernel has it.
    pub fn of_this_kernel() -> Self {
        let has_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        if has_tcx { Self::Tcx } else { Self::Clsact }
    }

    /// As shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A program could not be put on an interface, or taken from it.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {program} on {interface}")]
pub struct AttachError {
    /// What was tried.
    pub operation: &'static str,
    /// Which program.
    pub program: &'static str,
    /// Where.
    pub interface: String,
    /// Why.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

/// A program and its hook.
const HOOKS: [(&str, TcAttachType, &str); 2] =
    [(POD_EGRESS, TcAttachType::Ingress, "egress"), (POD_INGRESS, TcAttachType::Egress, "ingress")];

/// Attaches both programs to a host veth, or replaces what an earlier agent attached there.
///
/// # Errors
/// The interface is gone, or the kernel refuses. A program that was attached before stays.
pub fn attach(loaded: &mut Loaded, mode: AttachMode, interface: &str, index: u32) -> Result<(), AttachError> {
    let links = loaded.pins.join("links");
    for (name, hook, direction) in HOOKS {
        let failed = |source: Box<dyn Error + Send + Sync>| AttachError {
            operation: "attach",
            program: name,
            interface: interface.to_owned(),
            source,
        };
        let program = loaded.program(name).map_err(|source: LoadError| failed(source.into()))?;
        match mode {
            AttachMode::Tcx => attach_tcx(program, &links.join(format!("{index}-{direction}")), interface, hook),
            AttachMode::Clsact => attach_clsact(program, interface, hook),
        }
        .map_err(failed)?;
    }
    Ok(())
}

fn attach_tcx(program: &mut SchedClassifier, pin: &Path, interface: &str, hook: TcAttachType) -> Result<(), Box<dyn Error + Send + Sync>> {
    if let Ok(pinned) = PinnedLink::from_pin(pin) {
        let link = SchedClassifierLink::try_from(FdLink::from(pinned))?;
        if let Ok(id) = program.attach_to_link(link) {
            // The pin holds the link; ours was only to change it.
            drop(program.take_link(id)?);
            return Ok(());
        }
        // The link of an interface that no longer exists, whose index has come again.
        fs::remove_file(pin)?;
    }
    let id = program.attach_with_options(interface, hook, TcAttachOptions::TcxOrder(LinkOrder::default()))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin)?;
    Ok(())
}

fn attach_clsact(program: &mut SchedClassifier, interface: &str, hook: TcAttachType) -> Result<(), Box<dyn Error + Send + Sync>> {
    // Being there already is the only failure that does not show again in the next step.
    let _there = qdisc_add_clsact(interface);
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let id = match program.attach_with_options(interface, hook, TcAttachOptions::Netlink(options)) {
        Ok(id) => id,
        Err(_) => program.attach_to_link(SchedClassifierLink::attached(interface, hook, PRIORITY, HANDLE, None)?)?,
    };
    // Dropping the link would take the filter away.
    let _stays = ManuallyDrop::new(program.take_link(id)?);
    Ok(())
}

/// Takes the programs from an interface; one that is gone is no failure.
///
/// # Errors
/// A pin could not be removed, or the kernel refuses.
pub fn detach(loaded: &Loaded, mode: AttachMode, interface: &str, index: u32) -> Result<(), AttachError> {
    for (name, hook, direction) in HOOKS {
        let failed = |source: Box<dyn Error + Send + Sync>| AttachError {
            operation: "detach",
            program: name,
            interface: interface.to_owned(),
            source,
        };
        match mode {
            AttachMode::Tcx => match fs::remove_file(pin_path(loaded, index, direction)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error.into())),
                _ => {}
            },
            AttachMode::Clsact => {
                if let Ok(link) = SchedClassifierLink::attached(interface, hook, PRIORITY, HANDLE, None) {
                    // Detached by being dropped; a filter that is not there is as wanted.
                    drop(link);
                }
            }
        }
    }
    Ok(())
}

fn pin_path(loaded: &Loaded, index: u32, direction: &str) -> PathBuf {
    loaded.pins.join("links").join(format!("{index}-{direction}"))
}

/// Interface indices for which link pins exist.
pub(super) fn pinned_interfaces(loaded: &Loaded) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(loaded.pins.join("links")) else {
        return Vec::new();
    };
    let mut indices: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.split('-').next()?.parse().ok()).collect();
    indices.sort_unstable();
    indices.dedup();
    indices
}
