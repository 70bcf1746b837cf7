//! Compiles `stanchion.proto` without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=stanchion.proto");
    let descriptors = protox::compile(["stanchion.proto"], ["."])?;
    tonic_prost_build::configure().build_transport(true).compile_fds(descriptors)?;
    Ok(())
}
