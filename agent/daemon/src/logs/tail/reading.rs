//! Reading a container's files, oldest generation first, to where they end or were truncated.

use std::io;

use tracing::warn;

use super::super::container::{Behind, Container};
use super::super::discover::Siblings;
use super::super::source::Source;
use super::{Drain, Now, ROTATE_WAIT_MS, Tailer};

/// What a look at a container's files found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing new.
    Nothing,
    /// A block, perhaps with more behind it.
    Block,
    /// All that the live file had.
    Rest,
}

impl Tailer {
    /// Reads one block of the oldest generation that has one.
    pub(super) fn read(&mut self, container: &mut Container, portion: usize, now: Now) -> Found {
        let mut whole = std::mem::take(&mut self.block);
        let block = &mut whole[..portion];
        let mut found = Found::Nothing;
        for index in 0..container.generations.len() {
            if container.generations[index].finished {
                continue;
            }
            match self.read_generation(container, index, block, now) {
                Ok(read) => found = read,
                Err(error) => {
                    self.counters.file_errors += 1;
                    let generation = &mut container.generations[index];
                    // What is broken in a compressed file stays so: the rest of the family must not wait for it.
                    if matches!(generation.source, Source::Gz(_)) {
                        warn!(path = %container.live.display(), %error, "a compressed sibling cannot be read to its end");
                        generation.finished = true;
                    }
                    // A plain file is tried again at every look, for as long as it is there.
                    let error = error.to_string();
                    if !generation.finished && generation.last_error.as_ref() != Some(&error) {
                        warn!(path = %container.live.display(), number = generation.number, error, "a log file cannot be read; tried again");
                    }
                    generation.last_error = Some(error);
                }
            }
            if found != Found::Nothing {
                break;
            }
        }
        self.block = whole;
        found
    }

    fn read_generation(&mut self, container: &mut Container, index: usize, block: &mut [u8], now: Now) -> io::Result<Found> {
        let newest = index + 1 == container.generations.len();
        let generation = &mut container.generations[index];
        if !generation.source.may_read(&self.decoders)? {
            return Ok(Found::Nothing);
        }
        // What is compressed does not change any more, and cannot be read again from its beginning.
        let plain = matches!(generation.source, Source::Plain(_));
        // A file that was truncated may have the same size again.
        let (size, modified_ns) = generation.source.state()?;
        let grown = plain && (size, modified_ns) != (generation.size, generation.modified_ns);
        (generation.size, generation.modified_ns) = (size, modified_ns);
        let truncated = plain && size < generation.offset;
        if truncated || (grown && !generation.source.begins_with(generation.fingerprint)?) {
            self.restart(container, index, now)?;
            return Ok(Found::Block);
        }
        let generation = &mut container.generations[index];
        let read = if plain && generation.offset >= size { 0 } else { generation.source.read_at(generation.offset, block)? };
        if generation.fingerprint.len < 256 && grown {
            generation.fingerprint = generation.source.fingerprint()?;
        }
        let full = read == block.len();
        let safe = generation.ledger.safe();
        let used = container.take_block(index, &block[..read], full, &mut self.context(now));
        let generation = &mut container.generations[index];
        // Lines that are not sent, as of excluded pods, are done with at once.
        self.positions_dirty |= generation.ledger.safe() != safe;
        generation.last_error = None;
        if used > 0 {
            // Behind a full block there is more.
            let until = if full { size.max(generation.offset) } else { generation.offset };
            generation.behind = Some(Behind::since(generation.behind, until, now.mono));
            return Ok(if plain && newest && !full { Found::Rest } else { Found::Block });
        }
        let waited = generation.rotated_ms.is_some_and(|since| self.single_pass || now.mono - since >= ROTATE_WAIT_MS);
        if waited && read < block.len() {
            self.finish_generation(container, index, &block[..read], now);
            return Ok(if read > 0 { Found::Block } else { Found::Nothing });
        }
        Ok(Found::Nothing)
    }

    /// Nothing more comes: a line without its end is complete.
    pub(super) fn finish_generation(&mut self, container: &mut Container, index: usize, rest: &[u8], now: Now) {
        if !rest.is_empty() {
            container.take_tail(index, rest, &mut self.context(now));
        }
        container.generations[index].finished = true;
    }

    /// The file is shorter than what was read, or begins with other bytes: it was truncated and is written anew. What was
    /// not read before is lost by the nature of it.
    pub(super) fn restart(&mut self, container: &mut Container, index: usize, now: Now) -> io::Result<()> {
        self.counters.truncations += 1;
        let generation = &mut container.generations[index];
        warn!(path = %container.live.display(), offset = generation.offset, size = generation.size, "truncated; reading from its beginning");
        let again = generation.source.again()?;
        let rotated_ms = generation.rotated_ms;
        generation.rotated_ms.get_or_insert(now.mono);
        generation.finished = true;
        generation.truncated = true;
        if let Some(source) = again {
            container.push_again(index, source, rotated_ms)?;
        }
        self.positions_dirty = true;
        Ok(())
    }

    /// Forgets generations that are done; true when the container has none left and is gone for good.
    pub(super) fn retire(&mut self, container: &mut Container) -> bool {
        let live = &container.live;
        let (retired, moved) = (&mut container.retired, &mut self.moved);
        let host = container.host.is_some();
        let before = container.generations.len();
        container.generations.retain(|generation| {
            let done = generation.is_done();
            // What was truncated, or is empty, is no file that could be found again.
            let findable = !generation.truncated && generation.fingerprint.len > 0;
            if done && findable && host {
                moved.push(generation.position(live));
            }
            if done && findable && retired.as_ref().is_none_or(|(number, _)| *number < generation.number) {
                *retired = Some((generation.number, generation.position(live)));
            }
            !done
        });
        self.positions_dirty |= before != container.generations.len();
        let done = container.gone_ms.is_some() && container.generations.is_empty() && !container.joiner.is_open();
        // The kubelet renames the live file, and the runtime may be long in opening the next: what is known of the rotated ones is not to
        // be forgotten. Of a container that is removed none are left.
        done && (container.host.is_some() || Siblings::default().rotated(&container.live).is_ok_and(|siblings| siblings.is_empty()))
    }

    /// Reads everything to its end, whatever the clocks say, and closes all lines and batches; for a single pass. Batches
    /// are to be taken after each call.
    pub fn drain(&mut self, now: Now) -> Drain {
        self.single_pass = true;
        if self.turn(now).progress {
            return Drain::Progress;
        }
        if self.is_full() || !self.blocked.is_empty() || self.has_unread_journals() {
            return Drain::Waiting;
        }
        if let Some((due_ms, _, _)) = self.due.first() {
            return Drain::Later(*due_ms);
        }
        let unread = |container: &Container| container.generations.iter().any(|generation| !generation.finished);
        let ids: Vec<_> = self.containers.iter().filter(|(_, container)| unread(container)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(mut container) = self.containers.remove(&id) else { continue };
            if self.has_room(&container) {
                self.end_of_container(&mut container, now);
            }
            self.containers.insert(id, container);
        }
        self.streams.seal_older_than(i64::MAX);
        if self.containers.values().any(unread) { Drain::Waiting } else { Drain::Done }
    }

    pub(super) fn end_of_container(&mut self, container: &mut Container, now: Now) {
        let mut block = std::mem::take(&mut self.block);
        for index in 0..container.generations.len() {
            let generation = &mut container.generations[index];
            if !generation.finished {
                let read = match generation.source.may_read(&self.decoders) {
                    Ok(false) => continue,
                    Ok(true) => generation.source.read_at(generation.offset, &mut block),
                    Err(error) => Err(error),
                };
                match read {
                    Ok(read) => self.finish_generation(container, index, &block[..read], now),
                    Err(error) => {
                        self.counters.file_errors += 1;
                        let generation = &mut container.generations[index];
                        generation.last_error = Some(error.to_string());
                        generation.finished = true;
                    }
                }
            }
        }
        self.block = block;
        container.expire(true, &mut self.context(now));
    }
}
