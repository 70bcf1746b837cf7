//! Programs on interfaces: clsact filters, which stay by themselves, or TCX links (Linux 6.6) that are pinned. Both outlive
//! the agent, and both are replaced without a moment in which neither program is there.
//!
//! A filter is attached in 0.1 ms; a TCX link makes the kernel wait for two RCU grace periods with the network lock held (15 to
//! 40 ms, in which no other pod can start), and two more when the veth goes. Links are for nodes whose interfaces have another
//! ingress qdisc: the bandwidth plugin's excludes clsact.

use std::error::Error;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use serde::Serialize;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_netlink::tc::{TcHook, TcPlace, TcProgram};
use stanchion_netlink::{Netlink, NetlinkError};

use super::object::{LoadError, Loaded, POD_EGRESS, POD_INGRESS};

/// How programs are attached to interfaces that have none yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// TCX links.
    Tcx,
    /// tc filters; TCX links where something else has the interface's ingress place and the kernel has them.
    Clsact,
}

impl AttachMode {
    /// For pods whose host veth another plugin gives an ingress qdisc: links where the kernel has them. Where it has not, the
    /// other plugin will say that the place is taken.
    pub fn beside_ingress_qdisc() -> Self {
        if has_tcx() { Self::Tcx } else { Self::Clsact }
    }
}

fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
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

/// A program, its place as the host end sees it, the direction as the pod sees it, and aws-network-policy-agent's program for it.
struct Hook {
    program: &'static str,
    tcx: TcAttachType,
    filter: TcHook,
    direction: &'static str,
    upstream: &'static str,
}

const HOOKS: [Hook; 2] = [
    Hook { program: POD_EGRESS, tcx: TcAttachType::Ingress, filter: TcHook::Ingress, direction: "egress", upstream: "handle_egress" },
    Hook { program: POD_INGRESS, tcx: TcAttachType::Egress, filter: TcHook::Egress, direction: "ingress", upstream: "handle_ingress" },
];

/// Attaches both programs to a host veth, or replaces what an earlier agent attached there, in the way that it chose.
///
/// # Errors
/// The interface is gone, or the kernel refuses. A program that was attached before stays.
pub fn attach(loaded: &mut Loaded, mode: AttachMode, interface: &str, index: u32) -> Result<(), AttachError> {
    if mode == AttachMode::Clsact && !update_links(loaded, interface, index)? {
        match attach_filters(loaded, index) {
            // Of two links one may have been left.
            Ok(true) => return remove_pins(loaded, interface, index),
            Ok(false) if has_tcx() => {}
            Ok(false) => return Err(failed("attach", POD_EGRESS, interface, FilterError::Taken)),
            Err(error) => return Err(failed("attach", POD_EGRESS, interface, error)),
        }
    } else if mode == AttachMode::Clsact {
        return Ok(());
    }
    for hook in &HOOKS {
        let pin = pin_path(loaded, index, hook.direction);
        let program = loaded.program(hook.program).map_err(|error| failed("attach", hook.program, interface, error))?;
        attach_link(program, &pin, interface, hook.tcx).map_err(|error| failed("attach", hook.program, interface, error))?;
    }
    if mode == AttachMode::Tcx {
        // An agent of the other mode was here: one judgement is enough.
        remove_filters(index).map_err(|error| failed("detach the filters of", POD_EGRESS, interface, error))?;
    }
    Ok(())
}

/// How the programs are attached to an interface: `tcx` or `clsact`.
pub(super) fn attached_by(loaded: &Loaded, index: u32) -> &'static str {
    if pin_path(loaded, index, HOOKS[0].direction).exists() { "tcx" } else { "clsact" }
}

fn failed(operation: &'static str, program: &'static str, interface: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> AttachError {
    AttachError { operation, program, interface: interface.to_owned(), source: source.into() }
}

#[derive(Debug, thiserror::Error)]
enum FilterError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("cannot duplicate the program's descriptor")]
    Descriptor(#[from] io::Error),
    #[error(transparent)]
    Kernel(#[from] NetlinkError),
    #[error("the interface has an ingress qdisc of another kind, beside which only Linux 6.6 can attach programs")]
    Taken,
}

/// False: the interface has an ingress qdisc of another kind.
fn attach_filters(loaded: &mut Loaded, index: u32) -> Result<bool, FilterError> {
    let mut programs = Vec::with_capacity(HOOKS.len());
    for hook in &HOOKS {
        programs.push((hook, loaded.program(hook.program)?.fd()?.try_clone()?));
    }
    let programs: Vec<_> =
        programs.iter().map(|(hook, fd)| TcProgram { hook: hook.filter, program: fd.as_fd(), name: hook.program }).collect();
    Ok(loaded.netlink()?.attach_programs(index, place(), &programs)?)
}

fn remove_filters(index: u32) -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open()?;
    for hook in &HOOKS {
        netlink.detach_program(index, hook.filter, place())?;
    }
    Ok(())
}

/// Puts our programs into the links that an earlier agent left; false if there are not two.
fn update_links(loaded: &mut Loaded, interface: &str, index: u32) -> Result<bool, AttachError> {
    let mut updated = 0;
    for hook in &HOOKS {
        let pin = pin_path(loaded, index, hook.direction);
        if !pin.exists() {
            continue;
        }
        let program = loaded.program(hook.program).map_err(|error| failed("attach", hook.program, interface, error))?;
        updated += usize::from(update_link(program, &pin).map_err(|error| failed("attach", hook.program, interface, error))?);
    }
    Ok(updated == HOOKS.len())
}

/// False: there is no link, or it is that of an interface that no longer exists and whose index has come again.
fn update_link(program: &mut SchedClassifier, pin: &Path) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let Ok(pinned) = PinnedLink::from_pin(pin) else { return Ok(false) };
    let link = SchedClassifierLink::try_from(FdLink::from(pinned))?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // The pin holds the link; ours was only to change it.
            drop(program.take_link(id)?);
            Ok(true)
        }
        Err(_) => {
            fs::remove_file(pin)?;
            Ok(false)
        }
    }
}

fn attach_link(program: &mut SchedClassifier, pin: &Path, interface: &str, hook: TcAttachType) -> Result<(), Box<dyn Error + Send + Sync>> {
    if update_link(program, pin)? {
        return Ok(());
    }
    let id = program.attach_with_options(interface, hook, TcAttachOptions::TcxOrder(LinkOrder::default()))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin)?;
    Ok(())
}

fn remove_pins(loaded: &Loaded, interface: &str, index: u32) -> Result<(), AttachError> {
    for hook in &HOOKS {
        match fs::remove_file(pin_path(loaded, index, hook.direction)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("detach", hook.program, interface, error)),
            _ => {}
        }
    }
    Ok(())
}

/// Forgets an interface that is gone: its filters went with it, and asking the kernel for them would wait for the network lock, which
/// the deletion of other pods' veths holds for tens of milliseconds each.
///
/// # Errors
/// A pin could not be removed.
pub fn detach(loaded: &Loaded, interface: &str, index: u32) -> Result<(), AttachError> {
    remove_pins(loaded, interface, index)
}

/// Takes the programs from an interface that is still there.
///
/// # Errors
/// A pin could not be removed, or the kernel refuses.
pub(super) fn clear(loaded: &Loaded, interface: &str, index: u32) -> Result<(), AttachError> {
    remove_pins(loaded, interface, index)?;
    remove_filters(index).map_err(|error| failed("detach", POD_EGRESS, interface, error))
}

/// Takes away what agents of other layouts left: their filters on these interfaces, their links, their maps.
///
/// # Errors
/// A directory of pins could not be removed, or the kernel refuses.
pub(super) fn retire(loaded: &Loaded, interfaces: &[u32]) -> Result<(), AttachError> {
    let failed = |error: Box<dyn Error + Send + Sync>| failed("retire other layouts'", POD_EGRESS, "every interface", error);
    let others = loaded.others().map_err(|error| failed(error.into()))?;
    if others.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().map_err(|error| failed(error.into()))?;
    let layouts: Vec<u16> = others.iter().filter_map(|pins| pins.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()).collect();
    for index in interfaces {
        for hook in &HOOKS {
            for layout in layouts.iter().copied() {
                netlink.detach_program(*index, hook.filter, TcPlace::ours(layout)).map_err(|error| failed(error.into()))?;
            }
        }
    }
    others.into_iter().try_for_each(fs::remove_dir_all).map_err(|error| failed(error.into()))
}

/// Where aws-network-policy-agent's filters sit (`pkg/tc` of aws-ebpf-sdk-go). Its programs decide in direct-action mode, so that ours,
/// which come after, are not asked; without that agent they go on deciding by what it knew last.
const UPSTREAM: TcPlace = TcPlace { priority: 1, handle: 1 };

/// Who decides on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decides {
    /// Our programs.
    Ours,
    /// aws-network-policy-agent's, which come before ours.
    Upstreams,
    /// Ours are not there yet.
    NotOurs,
}

/// Who decides on an interface.
///
/// # Errors
/// When the kernel could not be asked.
pub(super) fn who_decides(loaded: &mut Loaded, interface: &str, index: u32) -> Result<Decides, AttachError> {
    let linked = linked(&loaded.pins, index);
    let failed = |hook: &Hook, error| failed("look for", hook.upstream, interface, error);
    let netlink = loaded.netlink().map_err(|error| failed(&HOOKS[0], error))?;
    let mut upstreams = false;
    for hook in &HOOKS {
        let mut name = |place| netlink.program_name(index, hook.filter, place).map_err(|error| failed(hook, error));
        if !linked && name(place())?.is_none() {
            return Ok(Decides::NotOurs);
        }
        upstreams |= name(UPSTREAM)?.as_deref() == Some(hook.upstream);
    }
    Ok(if upstreams { Decides::Upstreams } else { Decides::Ours })
}

/// Takes aws-network-policy-agent's programs from an interface, and no other that may have that place.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn remove_upstreams(loaded: &mut Loaded, interface: &str, index: u32) -> Result<(), AttachError> {
    let failed = |hook: &Hook, error| failed("remove", hook.upstream, interface, error);
    let netlink = loaded.netlink().map_err(|error| failed(&HOOKS[0], error))?;
    for hook in &HOOKS {
        let name = netlink.program_name(index, hook.filter, UPSTREAM).map_err(|error| failed(hook, error))?;
        if name.as_deref() == Some(hook.upstream) {
            netlink.detach_program(index, hook.filter, UPSTREAM).map_err(|error| failed(hook, error))?;
        }
    }
    Ok(())
}

/// The way back: takes our programs, of whatever layout, from every veth of this network namespace, and removes the pins. Filters of others
/// stay, as does the qdisc below which they are. Returns from how many interfaces programs were taken.
///
/// # Errors
/// The kernel refuses, or the pins cannot be removed.
pub fn remove_from_host(pin_root: &Path) -> Result<usize, AttachError> {
    let failed = |interface: &str, error: Box<dyn Error + Send + Sync>| failed("remove", "pod_*", interface, error);
    let mut netlink = Netlink::open().map_err(|error| failed("every interface", error.into()))?;
    let links = netlink.links().map_err(|error| failed("every interface", error.into()))?;
    let newest = place().handle;
    let mut taken = 0;
    for link in links.iter().filter(|link| link.kind == "veth") {
        let mut found = linked(&pin_root.join(format!("v{newest}")), link.index);
        for hook in &HOOKS {
            for place in (1..=newest).map(TcPlace::ours) {
                let name = netlink.program_name(link.index, hook.filter, place).map_err(|error| failed(&link.name, error.into()))?;
                if name.as_deref() == Some(hook.program) {
                    found |= netlink.detach_program(link.index, hook.filter, place).map_err(|error| failed(&link.name, error.into()))?;
                }
            }
        }
        taken += usize::from(found);
    }
    match fs::remove_dir_all(pin_root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("every interface", error.into())),
        _ => Ok(taken),
    }
}

fn linked(pins: &Path, index: u32) -> bool {
    HOOKS.iter().all(|hook| link_pin(pins, index, hook.direction).exists())
}

/// Removes what aws-network-policy-agent pinned: its programs, and its maps, which hold some 50 MB of the kernel's memory. False: nothing
/// was there.
///
/// # Errors
/// The file system's.
pub(super) fn remove_upstream_pins(loaded: &Loaded) -> io::Result<bool> {
    // Beside `stanchion/vN`.
    let Some(root) = loaded.pins.parent().and_then(Path::parent) else { return Ok(false) };
    match fs::remove_dir_all(root.join("globals/aws")) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The filters' place: each layout has a handle of its own, so that its programs stand beside an older one's until these are retired.
fn place() -> TcPlace {
    TcPlace::ours(u16::try_from(LAYOUT_VERSION).expect("layouts are few"))
}

fn pin_path(loaded: &Loaded, index: u32, direction: &str) -> PathBuf {
    link_pin(&loaded.pins, index, direction)
}

/// `pins`: those of a layout.
fn link_pin(pins: &Path, index: u32, direction: &str) -> PathBuf {
    pins.join("links").join(format!("{index}-{direction}"))
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
