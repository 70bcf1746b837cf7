//! A container's family of files: the live one and its rotated siblings, at the start and while it runs.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;

use stanchion_core::logs::positions::Position;
use stanchion_core::logs::settings::ReadFrom;

use super::container::Container;
use super::discover::{Siblings, Unread, is_want_of_room};
use super::source::Source;

/// Opens what of a container's family has unacknowledged bytes, oldest first; what of it cannot be opened is told in `unread`. The first
/// positions are the family's, the others of files that may have had another name.
pub(super) fn open_generations(
    container: &mut Container,
    (positions, moved): (&[Position], &[Position]),
    begin: ReadFrom,
    siblings: &mut Siblings,
    now_ms: i64,
    unread: &mut Unread,
) -> io::Result<()> {
    let mut family = Vec::new();
    for (rotated, path) in siblings.rotated(&container.live)? {
        container.known_rotated.insert(rotated.suffix);
        match if rotated.gz { Source::open_gz(&path) } else { Source::open(&path) } {
            // The node's own files are renamed in many ways: only what was read before is known to be older.
            Ok(source) if container.host.is_some() && !is_remembered(&source, positions)? => {}
            Ok(source) => family.push((source, true)),
            // Compressed or deleted since the listing; its bytes may be gone, or in the next sweep's listing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if is_want_of_room(&error) => return Err(error),
            Err(error) => drop(unread.insert(path, error)),
        }
    }
    let live = Source::open(&container.live)?;
    let moved = offset_of(&live, moved)?;
    family.push((live, false));
    let tail_only = positions.is_empty() && moved.is_none() && begin == ReadFrom::Tail;
    let mut open = Vec::new();
    let mut matched = BTreeSet::new();
    let mut first_match = None;
    for (index, (source, rotated)) in family.into_iter().enumerate() {
        let mut found = None;
        for (number, position) in positions.iter().enumerate() {
            if source.is_at(position)? {
                found = found.max(Some(position.offset));
                matched.insert(number);
                first_match.get_or_insert((index, number));
            }
        }
        open.push((source, rotated, found));
    }
    // Positions are in the order of the files. What is older than the first one found was done, but for files that are
    // remembered and not found, as they were empty then.
    let begin_at =
        first_match.map_or(0, |(index, number)| index.saturating_sub((0..number).filter(|earlier| !matched.contains(earlier)).count()));
    for (index, (source, rotated, found)) in open.into_iter().enumerate() {
        if index < begin_at || (tail_only && rotated) {
            continue;
        }
        let size = source.size()?;
        let found = if rotated { found } else { found.max(moved) };
        let offset = found.unwrap_or(if tail_only { size } else { 0 });
        // A shorter file than acknowledged was truncated while nobody looked.
        let offset = if offset > size && matches!(source, Source::Plain(_)) { 0 } else { offset };
        container.push_generation(source, offset, rotated.then_some(now_ms))?;
    }
    Ok(())
}

/// The live path may name another file than the newest generation: then that was renamed, perhaps more than once. True
/// when there is something new. A sibling that cannot be opened is told in `unread`, once. A file of the node may have been followed under
/// another name, up to a position of `moved`.
pub(super) fn follow(container: &mut Container, moved: &[Position], now_ms: i64, unread: &mut Unread) -> io::Result<bool> {
    let metadata = std::fs::metadata(&container.live)?;
    container.gone_ms = None;
    let newest = container.generations.back();
    if newest.is_some_and(|newest| (newest.dev, newest.inode) == (metadata.dev(), metadata.ino()) && newest.rotated_ms.is_none()) {
        return Ok(false);
    }
    for generation in container.generations.iter_mut().filter(|generation| generation.rotated_ms.is_none()) {
        generation.rotated_ms = Some(now_ms);
    }
    let rotated = if container.host.is_some() { Vec::new() } else { Siblings::default().rotated(&container.live)? };
    for (rotated, path) in rotated {
        if container.known_rotated.contains(&rotated.suffix) {
            continue;
        }
        let missed = match if rotated.gz { Source::open_gz(&path) } else { Source::open(&path) } {
            Ok(missed) => missed,
            Err(error) if error.kind() == io::ErrorKind::NotFound || is_want_of_room(&error) => return Err(error),
            Err(error) => {
                unread.insert(path, error);
                container.known_rotated.insert(rotated.suffix);
                continue;
            }
        };
        let identity = missed.identity()?;
        // The newest generation was renamed, and perhaps compressed, since we looked: it is open here already, or was read to its end.
        if let Some(offset) = retired_at(container, &missed)? {
            // The runtime may have written to it since, if it was long in opening the next.
            container.push_generation(missed, offset, Some(now_ms))?;
        } else {
            let known = if rotated.gz {
                is_compressed_form(container, &missed)?
            } else {
                container.generations.iter().any(|generation| (generation.dev, generation.inode) == identity)
            };
            if !known {
                container.push_generation(missed, 0, Some(now_ms))?;
            }
        }
        container.known_rotated.insert(rotated.suffix);
    }
    let source = Source::open(&container.live)?;
    let identity = source.identity()?;
    if !container.generations.iter().any(|generation| (generation.dev, generation.inode) == identity) {
        // It may be the one that was read to its end: the kubelet takes the rename back when the runtime opens no other file.
        let offset = if container.host.is_some() { offset_of(&source, moved)? } else { retired_at(container, &source)? };
        let offset = offset.filter(|offset| source.size().is_ok_and(|size| *offset <= size)).unwrap_or(0);
        container.push_generation(source, offset, None)?;
    }
    Ok(true)
}

/// How far the file was read, if it is the one that was read to its end last.
fn retired_at(container: &Container, source: &Source) -> io::Result<Option<u64>> {
    let Some((_, position)) = &container.retired else { return Ok(None) };
    Ok(source.is_at(position)?.then_some(position.offset))
}

/// A compressed sibling that holds the same bytes as a generation that is open.
fn is_compressed_form(container: &mut Container, compressed: &Source) -> io::Result<bool> {
    for generation in &mut container.generations {
        if generation.fingerprint.len == 0 && matches!(generation.source, Source::Plain(_)) {
            // Written to since it was opened empty.
            generation.fingerprint = generation.source.fingerprint()?;
        }
        if generation.fingerprint.len > 0 && compressed.begins_with(generation.fingerprint)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How far the file was read: what is acknowledged under any name is.
fn offset_of(source: &Source, positions: &[Position]) -> io::Result<Option<u64>> {
    let mut furthest = None;
    for position in positions {
        if source.is_at(position)? {
            furthest = furthest.max(Some(position.offset));
        }
    }
    Ok(furthest)
}

fn is_remembered(source: &Source, positions: &[Position]) -> io::Result<bool> {
    let identity = source.identity()?;
    for position in positions {
        // What was empty when it was remembered has no fingerprint.
        if (position.dev, position.inode) == identity || source.is_at(position)? {
            return Ok(true);
        }
    }
    Ok(false)
}
