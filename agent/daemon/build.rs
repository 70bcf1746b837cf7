//! Embeds the eBPF object if `cargo xtask build-ebpf` has made it, else nothing: the daemon then says so when it should
//! load it. So `cargo check` and `cargo clippy` need no BPF toolchain.

use std::path::Path;
use std::{env, fs, io};

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
    let out = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("stanchion-ebpf.o");
    fs::copy(&object, out)?;
    Ok(())
}
