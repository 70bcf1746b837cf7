//! The first load of the object after a boot or with another object: maps, then the programs through the kernel's verifier.
//!
//! `aya-obj` reads and links the object. Not `aya::EbpfLoader`: that reads the kernel's own types too, which takes longer than all
//! else that this process does here, and which an object without relocations against them does not need.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use aya::maps::{MapData, MapError};
use aya::programs::ProgramError;
use aya::sys::SyscallError;
use aya::{EbpfError, pin::PinError};
use aya_obj::btf::BtfFeatures;
use aya_obj::{EbpfSectionKind, Object, VerifierLog};
use stanchion_ebpf_abi::map_name;

use super::object::{LoadError, LoadOptions, PINNED, POD_EGRESS, POD_INGRESS};
use super::raw::{self, Program, Verified};

/// What every kernel since 5.10 knows in the types of an object; the rest of them is put in older words for all kernels alike.
const TYPES: BtfFeatures = BtfFeatures::new(true, true, true, false, false, false, false, false);

/// Makes the maps that are not pinned yet, has the kernel verify the programs and pins them in `home`.
pub(super) fn verify(object: &[u8], options: &LoadOptions, pins: &Path, home: &Path, tick_shift: u32) -> Result<(), LoadError> {
    let mut object = Object::parse(object).map_err(EbpfError::from)?;
    let tick_shift = tick_shift.to_ne_bytes();
    object.patch_map_data(HashMap::from([("TICK_SHIFT", (tick_shift.as_slice(), true))])).map_err(EbpfError::from)?;
    let types = object.fixup_and_sanitize_btf(&TYPES).map_err(EbpfError::from)?.map(aya_obj::btf::Btf::to_bytes).unwrap_or_default();
    let types = raw::load_types(&types).map_err(LoadError::Types)?;

    let definitions = std::mem::take(&mut object.maps);
    let mut maps = Vec::with_capacity(definitions.len());
    for (name, definition) in &definitions {
        maps.push((name.as_str(), map(name, definition, options, pins)?, definition));
    }
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object
        .relocate_maps(maps.iter().map(|(name, map, definition)| (*name, map.fd().as_fd().as_raw_fd(), *definition)), &sections)
        .and_then(|()| object.relocate_calls(&sections))
        .map_err(EbpfError::from)?;

    for name in [POD_EGRESS, POD_INGRESS] {
        let unknown = || EbpfError::MapError(MapError::InvalidName { name: name.to_owned() });
        let program = object.programs.get(name).ok_or_else(unknown)?;
        let function = object.functions.get(&program.function_key()).ok_or_else(unknown)?;
        let (functions, lines) = (function.func_info.func_info_bytes(), function.line_info.line_info_bytes());
        let program = load(&Verified {
            name: &CString::new(name).expect("no NUL in a constant"),
            license: &program.license,
            instructions: &function.instructions,
            types: &types,
            functions: (&functions, function.func_info_rec_size),
            lines: (&lines, function.line_info_rec_size),
        });
        let program = program.map_err(|source| LoadError::Program { name, source })?;
        raw::pin(&program, &home.join(name))
            .map_err(|io_error| LoadError::Pin { name, source: PinError::SyscallError(SyscallError { call: "BPF_OBJ_PIN", io_error }) })?;
    }
    Ok(())
}

/// The pinned map, or one that is made now and pinned if it is to be.
fn map(name: &str, definition: &aya_obj::Map, options: &LoadOptions, pins: &Path) -> Result<MapData, LoadError> {
    let failed = |source| LoadError::Object(EbpfError::MapError(source));
    let pin = PINNED.contains(&name).then(|| pins.join(name));
    if let Some(pin) = &pin
        && pin.exists()
    {
        return MapData::from_pin(pin).map_err(failed);
    }
    let mut definition = definition.clone();
    if [map_name::FLOWS4, map_name::FLOWS6].contains(&name) {
        definition.set_max_entries(options.flow_entries);
    }
    let constants = (definition.section_kind() == EbpfSectionKind::Rodata).then(|| definition.data().to_vec());
    let map = MapData::create(definition, name, None).map_err(failed)?;
    if let Some(constants) = constants {
        raw::set_constants(map.fd().as_fd(), &constants)
            .map_err(|io_error| failed(MapError::SyscallError(SyscallError { call: "BPF_MAP_FREEZE", io_error })))?;
    }
    if let Some(pin) = &pin {
        map.pin(pin).map_err(|error| failed(MapError::PinError { name: Some(name.to_owned()), error }))?;
    }
    Ok(map)
}

/// Loads a program; what the verifier had to say comes with the error.
fn load(verified: &Verified<'_>) -> Result<Program, ProgramError> {
    const LOG_BYTES: usize = 16 << 20;
    Program::verify(verified, &mut []).or_else(|_| {
        let mut log = vec![0; LOG_BYTES];
        Program::verify(verified, &mut log).map_err(|io_error| {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            ProgramError::LoadError { io_error, verifier_log: VerifierLog::new(String::from_utf8_lossy(&log[..end]).into_owned()) }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use aya_obj::generated::bpf_insn;

    use super::super::object::OBJECT;
    use super::*;

    #[test]
    fn what_the_verifier_says_is_part_of_the_error() {
        let mut object = Object::parse(OBJECT).unwrap();
        let types = raw::load_types(&object.fixup_and_sanitize_btf(&TYPES).unwrap().unwrap().to_bytes()).unwrap();
        let license = c"GPL";
        let load = |instructions: &[bpf_insn]| {
            load(&Verified { name: c"a_test", license, instructions, types: &types, functions: (&[], 0), lines: (&[], 0) })
        };
        let [answer, exit] =
            [0xb7, 0x95].map(|code| bpf_insn { code, _bitfield_align_1: [], _bitfield_1: Default::default(), off: 0, imm: 0 });
        load(&[answer, exit]).unwrap();
        let refused = load(&[exit]).unwrap_err();
        assert!(refused.to_string().contains("R0 !read_ok"), "{refused}");
        assert_eq!(refused.source().unwrap().downcast_ref::<std::io::Error>().unwrap().raw_os_error(), Some(libc::EACCES));
    }
}
