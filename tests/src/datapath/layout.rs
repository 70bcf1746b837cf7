//! A node as an agent with other programs and maps leaves it.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use aya::maps::{MapData, MapInfo};
use aya::programs::loaded_programs;
use serde_json::Value;
use stanchion_ebpf_abi::LAYOUT_VERSION;
use stanchion_netlink::Netlink;
use stanchion_netlink::tc::{TcHook, TcPlace, TcProgram};

use super::raw;
use crate::netns::{Netns, ip_json};

/// Makes what an agent that has stopped left on a node what one of `layout` leaves: its pins, and the filters of every host
/// interface that begins with `eni`.
///
/// # Errors
/// No agent ran, or what it left cannot be moved.
pub fn leave_as(node: &Netns, pin_root: &Path, layout: u16) -> anyhow::Result<()> {
    std::fs::rename(pin_root.join(format!("v{LAYOUT_VERSION}")), pin_root.join(format!("v{layout}"))).context("move the pins")?;
    let links = ip_json(node, &["link"])?;
    let names = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
    for name in names.filter(|name| name.starts_with("eni")) {
        move_filters(node, name, layout).with_context(|| format!("the filters of {name}"))?;
    }
    Ok(())
}

/// Makes an interface's filters those of another layout: the same programs under that layout's handle.
///
/// # Errors
/// There are none, or they cannot be moved.
pub fn move_filters(node: &Netns, interface: &str, layout: u16) -> anyhow::Result<()> {
    let own = u16::try_from(LAYOUT_VERSION)?;
    for (direction, hook) in [("ingress", TcHook::Ingress), ("egress", TcHook::Egress)] {
        let shown = node.output(Command::new("tc").args(["-j", "filter", "show", "dev", interface, direction]))?;
        let filters: Value = serde_json::from_slice(&shown.stdout)?;
        let id = filters.as_array().into_iter().flatten().find_map(|filter| filter.pointer("/options/prog/id")?.as_u64());
        let id = u32::try_from(id.with_context(|| format!("no filter at {direction}: {filters}"))?)?;
        let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id).context("its program is gone")?.fd()?;
        node.run(|| -> anyhow::Result<()> {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(interface)?;
            let moved = [TcProgram { hook, program: program.as_fd(), name: direction }];
            ensure!(netlink.attach_programs(index, TcPlace::ours(layout), &moved)?, "the other filter was there");
            ensure!(netlink.detach_program(index, hook, TcPlace::ours(own))?, "the own filter was not there");
            Ok(())
        })??;
    }
    Ok(())
}

/// Makes a pinned map, which no program that is attached uses, one of so few entries: empty, and what the next agent works on.
///
/// # Errors
/// There is none, or it cannot be replaced.
pub fn shrink(pin_root: &Path, map: &str, entries: u32) -> anyhow::Result<()> {
    let pin = pin_root.join(format!("v{LAYOUT_VERSION}")).join(map);
    let info = MapInfo::from_pin(&pin)?;
    let small = raw::create_map(info.map_type()? as u32, info.key_size(), info.value_size(), entries, info.map_flags())?;
    std::fs::remove_file(&pin)?;
    MapData::from_fd(small)?.pin(&pin)?;
    Ok(())
}
