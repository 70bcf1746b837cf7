//! Embeds the eBPF object if `cargo xtask build-ebpf` has made it, else nothing: the daemon then says so when it should
//! load it. So `cargo check` and `cargo clippy` need no BPF toolchain.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// What the object is made of.
const SOURCES: [&str; 2] = ["../../ebpf/programs/src", "../../ebpf/abi/src"];

fn main() -> io::Result<()> {
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("set by cargo");
    let directory = Path::new(&manifest).join("../../target/bpf");
    let object = directory.join("stanchion-ebpf.o");
    // The file must exist: cargo runs a build script again and again for one that does not. Empty stands for "not built".
    fs::create_dir_all(&directory)?;
    if !object.exists() {
        fs::write(&object, [])?;
    }
    println!("cargo:rerun-if-changed={}", object.display());
    warn_of_age(&object, SOURCES.map(|source| Path::new(&manifest).join(source)))?;
    let out = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("stanchion-ebpf.o");
    fs::copy(&object, out)?;
    Ok(())
}

/// A build that is not `cargo xtask`'s embeds whatever object is there: one of other sources would be refused at load, or worse, taken.
fn warn_of_age(object: &Path, sources: [PathBuf; 2]) -> io::Result<()> {
    let object = fs::metadata(object)?;
    for directory in sources {
        println!("cargo:rerun-if-changed={}", directory.display());
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if object.len() > 0 && entry.metadata()?.modified()? > object.modified()? {
                println!("cargo:warning={} is newer than the eBPF object: run `cargo xtask build-ebpf` first", entry.path().display());
            }
        }
    }
    Ok(())
}
